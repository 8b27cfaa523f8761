"""The shape of a model."""

import math
from dataclasses import dataclass
from numbers import Integral


@dataclass(frozen=True)
class ScBertConfig:
    """Shape of a model. Paper: Methods, "scBERT architecture"; sizes that it leaves out are the script's."""

    n_genes: int
    """Genes in the vocabulary; a trailing token 0 makes the sequence one longer."""
    n_bins: int = 5
    """Highest expression token; token ``n_bins + 1`` is the mask, so there are ``n_bins + 2`` in all."""
    dim: int = 200
    depth: int = 6
    """Encoder layers; 0 leaves the embeddings and the norm alone (a control)."""
    heads: int = 10
    dim_head: int = 64
    gene_embedding: str = "learned"
    """"frozen" (vectors given, as published), "learned", or "none"."""
    key_stabiliser: str = "head"
    """"head": a cell's result does not depend on its batch; "batch": as published."""
    expressed_only: bool = False
    """Only genes with a non-zero token enter the encoder, and the trailing token: see `ScBert`. Not as published."""

    attention: str = "favor"
    """"favor", or "softmax": with `expressed_only`, exact attention in place of random features; not as published."""

    def __post_init__(self):
        for name in ("n_genes", "n_bins", "dim", "depth", "heads", "dim_head"):
            if not isinstance(getattr(self, name), Integral):
                raise ValueError(f"{name} must be a whole number, not {getattr(self, name)!r}.")
        if not isinstance(self.expressed_only, bool):
            raise ValueError(f"expressed_only must be true or false, not {self.expressed_only!r}.")
        if self.heads < 1 or self.dim_head < 2:
            raise ValueError(f"heads must be at least 1 and dim_head at least 2, got {self}.")
        if self.n_genes < 1 or self.n_bins < 1 or self.dim < 1 or self.depth < 0:
            raise ValueError(f"n_genes, n_bins and dim must be at least 1 and depth at least 0, got {self}.")
        if self.depth and self.dim % self.heads:
            raise ValueError(
                f"dim ({self.dim}) must be a multiple of heads ({self.heads}): performer-pytorch needs it."
            )
        if self.gene_embedding not in ("frozen", "learned", "none"):
            raise ValueError(f"gene_embedding must be 'frozen', 'learned' or 'none', not {self.gene_embedding!r}.")
        if self.key_stabiliser not in ("head", "batch"):
            raise ValueError(f"key_stabiliser must be 'head' or 'batch', not {self.key_stabiliser!r}.")
        if self.attention not in ("favor", "softmax"):
            raise ValueError(f"attention must be 'favor' or 'softmax', not {self.attention!r}.")
        if self.attention == "softmax" and not self.expressed_only:
            raise ValueError("attention='softmax' needs expressed_only=True: over all genes it is far too expensive.")
        if self.expressed_only and self.gene_embedding == "none":
            raise ValueError(
                "expressed_only needs a gene embedding, 'learned' or 'frozen': without one nothing tells the genes of "
                "a cell apart."
            )

    @classmethod
    def published(cls) -> "ScBertConfig":
        """Return the published shape: 16,906 genes, 6 layers, 10 heads of 64, dim 200, frozen gene2vec."""
        return cls(n_genes=16_906, gene_embedding="frozen")

    @property
    def n_features(self) -> int:
        """Random features a head: int(d ln d), 266 for heads of 64."""
        return int(self.dim_head * math.log(self.dim_head))

    @property
    def mask_token(self) -> int:
        """The token that hides an expression value."""
        return self.n_bins + 1
