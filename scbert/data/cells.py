"""Tokenized cells as torch tensors: one at a time, in batches, and with some of their tokens hidden."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

import anndata
import numpy as np
import torch
from scipy import sparse
from torch.utils.data import Dataset

if TYPE_CHECKING:
    from ..model.encoder import Classifier, ScBert
    from ..scale.stream import CellStore


class CellDataset(Dataset):
    """Tokenized cells: item `i` is cell `i`.

    Parameters
    ----------
    adata
        Cells with ``layers["bins"]``, see `scbert.preprocess.tokenize`.
    targets
        One integer a cell, 0 if None.

    Each item is ``(bins, target)``, bins being (genes + 1,) int64 with a trailing 0.

    Raises
    ------
    ValueError
        The cells are not tokenized.

    Differs from the published code: it returns the cell it is asked for, where the script returns a random
    one, in validation too.
    """

    def __init__(self, adata: anndata.AnnData, targets: np.ndarray | None = None):
        if "bins" not in adata.layers:
            raise ValueError("These cells are not tokenized: call scbert.preprocess.tokenize(adata) first.")
        self.bins = adata.layers["bins"].tocsr()
        self.genes = list(adata.var_names)
        self.n_bins = adata.uns.get("scbert", {}).get("tokenize", {}).get("n_bins")
        self.targets = np.zeros(adata.n_obs, dtype=np.int64) if targets is None else np.asarray(targets, np.int64)

    def __len__(self) -> int:
        return self.bins.shape[0]

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        bins, targets = self.batch([index])
        return bins[0], targets[0]

    def batch(self, indices) -> tuple[torch.Tensor, torch.Tensor]:
        """Return cells by number: bins (cells, genes + 1) and targets (cells,), both int64."""
        return to_tokens(self.bins[indices]), torch.from_numpy(self.targets[indices])

    def in_order(self, batch_size: int) -> Iterator[tuple[int, torch.Tensor]]:
        """Yield (number of the first cell, bins) of batches that visit each cell once, in order."""
        for start in range(0, len(self), batch_size):
            yield start, self.batch(np.arange(start, min(start + batch_size, len(self))))[0]

    def epoch(
        self,
        batch_size: int,
        seed: int,
        epoch: int,
        sampling: str = "epoch",
        *,
        skip: int = 0,
        part: tuple[int, int] = (0, 1),
    ) -> Iterator[tuple[np.ndarray, torch.Tensor]]:
        """Yield (numbers of the cells, bins) of an epoch's batches, in the order of `order_cells`.

        The first `skip` batches are left out, unread. With ``part=(i, n)``, of each batch the share of process i of
        n: as many batches for each of them, whose shares together are the batch, and may be empty.
        """
        order = order_cells(len(self), seed, epoch, sampling)
        for start in range(skip * batch_size, len(order), batch_size):
            indices = take_share(order[start : start + batch_size], part)
            yield indices, self.batch(indices)[0]

    def identity(self) -> Iterator[bytes]:
        """Yield what tells these cells from others."""
        for array in (self.bins.indptr, self.bins.indices, self.bins.data):
            yield np.ascontiguousarray(array).tobytes()


def open_cells(
    adata: "anndata.AnnData | CellDataset | CellStore", targets: np.ndarray | None = None
) -> "CellDataset | CellStore":
    """Return tokenized cells, given as an AnnData or as a store of more cells than memory, as what is trained on.

    Raises
    ------
    ValueError
        The cells are not tokenized.
    """
    if isinstance(adata, anndata.AnnData):
        return CellDataset(adata, targets)
    return adata if targets is None else adata.with_targets(targets)


def to_tokens(bins: sparse.csr_matrix) -> torch.Tensor:
    """Return bins (cells, genes) as what a model reads: (cells, genes + 1) int64 with a trailing 0."""
    tokens = np.zeros((bins.shape[0], bins.shape[1] + 1), dtype=np.int64)
    tokens[:, :-1] = bins.toarray()
    return torch.from_numpy(tokens)


def check_tokenized(cells: "CellDataset | CellStore") -> None:
    """Raise a ValueError unless it is known into how many bins the cells are tokenized."""
    if cells.n_bins is None:
        raise ValueError("These cells are not tokenized: call scbert.preprocess.tokenize(adata) first.")


def check_cells(model: "ScBert | Classifier", adata: "anndata.AnnData | CellDataset | CellStore") -> None:
    """Raise a ValueError unless the cells are tokenized, for this model's vocabulary and bins."""
    cells = open_cells(adata)
    check_tokenized(cells)
    if cells.n_bins != model.config.n_bins:
        raise ValueError(
            f"The cells are tokenized into {cells.n_bins} bins, but the model reads {model.config.n_bins}: tokenize them, "
            f"or write their store, with n_bins={model.config.n_bins}."
        )
    if len(cells.genes) != model.config.n_genes or (model.genes and model.genes != cells.genes):
        raise ValueError(
            f"The cells have {len(cells.genes)} genes, and the model's {model.config.n_genes} are others or in another "
            "order: call scbert.preprocess.tokenize(adata, genes=model.genes) and use what it returns, or write their "
            "store with genes=model.genes."
        )


def order_cells(n_cells: int, seed: int, epoch: int, sampling: str = "epoch") -> np.ndarray:
    """Return the order in which an epoch visits the cells, a function of seed and epoch alone.

    ``"epoch"`` visits each cell once; ``"bootstrap"`` draws with replacement, as published, and so meets about
    63 % of the cells.
    """
    random = np.random.default_rng([seed, epoch])
    return random.permutation(n_cells) if sampling == "epoch" else random.integers(n_cells, size=n_cells)


def take_share(indices: np.ndarray, part: tuple[int, int]) -> np.ndarray:
    """Return what process i of n takes of a batch, ``part`` being (i, n): nearly equal shares, in order."""
    number, n_parts = part
    return np.array_split(indices, n_parts)[number]


def mask_bins(
    bins: torch.Tensor,
    mask_token: int,
    seed: int | tuple[int, ...] | list[tuple[int, ...]],
    *,
    mask_share: float = 0.15,
    replace_share: float = 0.9,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Hide a share of each cell's non-zero tokens.

    Parameters
    ----------
    bins
        (cells, genes + 1) tokens.
    mask_token
        What hides a token, ``config.mask_token``.
    seed
        Fixes which tokens are hidden; a list of seeds has one a cell, whose masks then depend on no other cell.
    mask_share
        Share of each cell's non-zero tokens to predict, rounded, at least one token if there is any.
    replace_share
        Share of those that are replaced by the mask token; the others stay as they are.

    Returns
    -------
    The tokens the encoder sees, and a boolean of the same shape: the positions to predict.

    Paper: Methods, "pretraining" (shares: the script's defaults).
    Differs from the published code: a position that stays is never confused with padding; masks depend on the
    seed alone.
    """
    noise = np.empty((2, *bins.shape), np.float32)  # (2, cells, genes + 1)
    if isinstance(seed, list):
        for row, own in enumerate(seed):
            noise[:, row] = np.random.default_rng(own).random((2, bins.shape[1]), dtype=np.float32)
    else:
        np.random.default_rng(seed).random(dtype=np.float32, out=noise)
    noise, keep = torch.from_numpy(noise)
    keep = keep >= replace_share
    noise[bins == 0] = 2.0  # zeros rank last and are never chosen
    n_tokens = (bins != 0).sum(1, keepdim=True)
    n_masked = (n_tokens * mask_share).round().clamp(min=1).minimum(n_tokens)
    chosen = noise.argsort(1).argsort(1) < n_masked
    return bins.masked_fill(chosen & ~keep, mask_token), chosen


def find_commonest_bin(bins: torch.Tensor, n_bins: int) -> torch.Tensor:
    """Return each cell's commonest non-zero token, (cells, 1); the lowest of several, and 1 for a cell without any."""
    counts = torch.stack([(bins == token).sum(1) for token in range(1, n_bins + 1)], dim=1)  # (cells, n_bins)
    return counts.argmax(1, keepdim=True) + 1
