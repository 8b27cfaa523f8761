"""Tokenized cells as torch tensors: one at a time, in batches, and with some of their tokens hidden."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

import anndata
import numpy as np
import torch
from scipy import sparse

from .checks import NOT_TOKENIZED, check_cells, check_tokens
from .counts import read_notes

if TYPE_CHECKING:
    from ..model.classifier import Classifier
    from ..model.encoder import ScBert
    from ..scale.stream import CellStore


class CellDataset:
    """Tokenized cells in memory, by number.

    Parameters
    ----------
    adata
        Cells with ``layers["bins"]``, see `scbert.preprocess.tokenize`.

    Raises
    ------
    ValueError
        The cells are not tokenized.

    Differs from the published code: it returns the cells it is asked for, where the script returns a random
    one, in validation too.
    """

    def __init__(self, adata: anndata.AnnData):
        if "bins" not in adata.layers:
            raise ValueError(NOT_TOKENIZED)
        self.bins = adata.layers["bins"].tocsr()
        self.genes, self.obs_names = list(adata.var_names), adata.obs_names
        report = read_notes(adata).get("tokenize", {})
        self.n_bins, self.matched_share = report.get("n_bins"), report.get("matched_share", 1.0)

    def __len__(self) -> int:
        return self.bins.shape[0]

    def batch(self, indices) -> torch.Tensor:
        """Return cells by number: (cells, genes + 1) int64 with a trailing 0."""
        return to_tokens(self.bins[indices])

    def windows(self, n_cells: int) -> Iterator[sparse.csr_matrix]:
        """Yield tokens (cells, genes) of so many cells at a time, in order."""
        for start in range(0, len(self), n_cells):
            yield self.bins[start : start + n_cells]

    def in_order(self, batch_size: int) -> Iterator[tuple[int, torch.Tensor]]:
        """Yield (number of the first cell, bins) of batches that visit each cell once, in order."""
        for start in range(0, len(self), batch_size):
            yield start, self.batch(np.arange(start, min(start + batch_size, len(self))))

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
            yield indices, self.batch(indices)

    def genes_seen(self) -> np.ndarray:
        """Return which genes have a token in some cell, (genes,) bool."""
        return self.bins.getnnz(axis=0) > 0

    def identity(self) -> Iterator[bytes]:
        """Yield what tells these cells from others."""
        for array in (self.bins.indptr, self.bins.indices, self.bins.data):
            yield np.ascontiguousarray(array).tobytes()


def open_cells(adata: "anndata.AnnData | CellDataset | CellStore") -> "CellDataset | CellStore":
    """Return tokenized cells, given as an AnnData or as a store of more cells than memory, as what is trained on.

    Raises
    ------
    ValueError
        The cells are not tokenized, or their tokens are not those of their counts.
    """
    if isinstance(adata, anndata.AnnData):
        cells = CellDataset(adata)
        check_tokens(adata)
        return cells
    return adata


def open_for(
    model: "ScBert | Classifier", adata: "anndata.AnnData | CellDataset | CellStore"
) -> "CellDataset | CellStore":
    """Return tokenized cells as `open_cells` does; a ValueError unless they are tokenized as the model reads them."""
    cells = open_cells(adata)
    check_cells(model, cells)
    return cells


def to_tokens(bins: sparse.csr_matrix) -> torch.Tensor:
    """Return bins (cells, genes) as what a model reads: (cells, genes + 1) int64 with a trailing 0."""
    tokens = np.zeros((bins.shape[0], bins.shape[1] + 1), dtype=np.int64)
    tokens[:, :-1] = bins.toarray()
    return torch.from_numpy(tokens)


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
