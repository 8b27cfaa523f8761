"""Tokens hidden from the model, for pretraining."""

import numpy as np
import torch


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
