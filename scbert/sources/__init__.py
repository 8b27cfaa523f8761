"""Cells, genes and weights from outside: by name, and from any file."""
