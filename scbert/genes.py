"""Gene vocabularies: which genes a model reads, and in what order."""

import hashlib
from collections.abc import Sequence


def hash_genes(genes: Sequence[str]) -> str:
    """Return the sha256 of the gene names in order, one a line: two models fit only if it agrees."""
    return hashlib.sha256("\n".join(genes).encode()).hexdigest()
