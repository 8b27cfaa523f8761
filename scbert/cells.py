"""Tokenized cells as torch tensors: one at a time, in batches, and with some of their tokens hidden."""

import anndata
import numpy as np
import torch
from torch.utils.data import Dataset


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
        self.targets = np.zeros(adata.n_obs, dtype=np.int64) if targets is None else np.asarray(targets, np.int64)

    def __len__(self) -> int:
        return self.bins.shape[0]

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        bins, targets = self.batch([index])
        return bins[0], targets[0]

    def batch(self, indices) -> tuple[torch.Tensor, torch.Tensor]:
        """Return cells by number: bins (cells, genes + 1) and targets (cells,), both int64."""
        bins = np.zeros((len(indices), self.bins.shape[1] + 1), dtype=np.int64)
        bins[:, :-1] = self.bins[indices].toarray()
        return torch.from_numpy(bins), torch.from_numpy(self.targets[indices])

    def in_order(self, batch_size: int):
        """Yield (number of the first cell, bins) of batches that visit each cell once, in order."""
        for start in range(0, len(self), batch_size):
            yield start, self.batch(np.arange(start, min(start + batch_size, len(self))))[0]


def order_cells(n_cells: int, seed: int, epoch: int, sampling: str = "epoch") -> np.ndarray:
    """Return the order in which an epoch visits the cells, a function of seed and epoch alone.

    ``"epoch"`` visits each cell once; ``"bootstrap"`` draws with replacement, as published, and so meets about
    63 % of the cells.
    """
    random = np.random.default_rng([seed, epoch])
    return random.permutation(n_cells) if sampling == "epoch" else random.integers(n_cells, size=n_cells)


def mask_bins(
    bins: torch.Tensor,
    mask_token: int,
    seed: int | tuple[int, ...],
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
        Fixes which tokens are hidden.
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
    random = np.random.default_rng(seed)
    noise = torch.from_numpy(random.random(bins.shape, dtype=np.float32))  # (cells, genes + 1)
    keep = torch.from_numpy(random.random(bins.shape, dtype=np.float32)) >= replace_share
    noise[bins == 0] = 2.0  # zeros rank last and are never chosen
    n_tokens = (bins != 0).sum(1, keepdim=True)
    n_masked = (n_tokens * mask_share).round().clamp(min=1).minimum(n_tokens)
    chosen = noise.argsort(1).argsort(1) < n_masked
    return bins.masked_fill(chosen & ~keep, mask_token), chosen


def find_commonest_bin(bins: torch.Tensor, n_bins: int) -> torch.Tensor:
    """Return each cell's commonest non-zero token, (cells, 1); the lowest of several, and 1 for a cell without any."""
    counts = torch.stack([(bins == token).sum(1) for token in range(1, n_bins + 1)], dim=1)  # (cells, n_bins)
    return counts.argmax(1, keepdim=True) + 1
