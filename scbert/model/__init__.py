"""The encoder, its head, and what is kept of them."""
