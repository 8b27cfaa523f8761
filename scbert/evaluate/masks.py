"""How well masked tokens are predicted, beside rivals that need no network."""

from typing import TYPE_CHECKING

import anndata
import numpy as np
import pandas as pd
import torch

from ..data.cells import open_cells, open_for
from ..data.checks import check_tokenized
from ..data.masking import find_commonest_bin
from ..train.pretrain import predict_masks

if TYPE_CHECKING:
    from ..model.encoder import ScBert
    from ..scale.stream import CellStore

CELLS_AT_ONCE = 256
"""Cells that are counted in one go."""


def count_tokens(adata: "anndata.AnnData | CellStore") -> np.ndarray:
    """Count how often each gene has each non-zero token: what the rivals of `score_masks` know of genes.

    `adata` are tokenized training cells, else a ValueError, or a store of them, read in one pass. Returned are
    (genes + 1, n_bins) int64; column `t` counts token ``t + 1``, and the trailing token, always 0, has none.
    """
    cells = open_cells(adata)
    check_tokenized(cells)
    shape = (len(cells.genes) + 1, cells.n_bins)
    table = np.zeros(shape, np.int64)
    for _, bins in cells.in_order(CELLS_AT_ONCE):
        bins = bins.numpy()  # (cells, genes + 1)
        cell, gene = np.nonzero(bins)
        table += np.bincount(gene * cells.n_bins + bins[cell, gene] - 1, minlength=table.size).reshape(shape)
    return table


def score_masks(
    model: "ScBert", adata: "anndata.AnnData | CellStore", table: np.ndarray | None = None, **options
) -> pd.DataFrame:
    """Predict masked tokens of cells, beside rivals that know the cell, the gene, or both, and no other gene.

    Parameters
    ----------
    adata
        Tokenized cells of the model's vocabulary, which no rival has counted: test or validation cells.
    table
        `count_tokens` of training cells; without it the cell is the only rival.
    options
        Of `scbert.train.pretrain.predict_masks`: `seed` and `mask_share`, which fix the masks, and others.

    Returns
    -------
    A row for each cell and true token, 1 to n_bins, also where the cell has no such mask. Columns: `n_masked`; of the model,
    `correct` and `loss`, the summed cross-entropy in nats over all its n_bins + 2 tokens; `predicted_mode`, how often
    it says the commonest non-zero token that the cell shows; and ``<rival>_correct`` and ``<rival>_loss`` of

    - `cell`: the shares of the non-zero tokens that the cell shows, one count added to each token. It says the
      commonest, the lowest of several, and 1 for a cell that shows none.
    - `gene`: the shares of the gene's tokens in the table, with one more, spread as the tokens of all genes are.
    - `both`: p(token | gene) p(token | cell) / p(token), normalised: what gene and cell say apart.

    A ValueError if cells are not tokenized for this vocabulary, or the table has another shape.

    Paper: Methods, "pretraining"; the rivals are not in it. Boiarsky et al. 2023 measured the commonest bin.
    Differs from the published code: all cells count, where the script's validation accuracy is that of cell 0; every
    masked token is hidden, where a tenth stays visible there, as it does in training.
    """
    cells, n_bins = open_for(model, adata), model.config.n_bins
    by_gene, overall = (None, None) if table is None else _share_tokens(table, (len(cells.genes) + 1, n_bins))
    none = torch.zeros(0, len(cells.genes) + 1, dtype=torch.int64)
    rows = [np.zeros(0, np.int64)]
    sums = [_score_batch(torch.zeros(0, n_bins + 2), none, none.bool(), n_bins, by_gene, overall)]
    for start, bins, where, logits in predict_masks(model, cells, **options):
        rows.append(np.arange(start, start + len(bins)))
        sums.append(_score_batch(logits, bins, where, n_bins, by_gene, overall))
    names = pd.Index(cells.obs_names)[np.concatenate(rows)]
    index = pd.MultiIndex.from_product([names, range(1, n_bins + 1)], names=["cell", "token"])
    return pd.DataFrame({name: np.concatenate([batch[name] for batch in sums]) for name in sums[0]}, index=index)


def _share_tokens(table, shape):
    """Return the shares of each gene's tokens, (genes + 1, n_bins), and of all genes', (n_bins,)."""
    table = np.asarray(table, np.float64)
    if table.shape != shape:
        raise ValueError(
            f"The table has shape {table.shape}, but these cells need {shape}: count_tokens of training cells with the "
            "same genes and bins."
        )
    overall = table.sum(0) + 1
    overall /= overall.sum()
    return (table + overall) / (table.sum(1, keepdims=True) + 1), overall


def _score_batch(logits, bins, where, n_bins, by_gene, overall):
    """Sum each measure over the masks of each (cell, true token); logits are those of the masks, (masks, n_bins + 2)."""
    visible = bins.masked_fill(where, 0)  # (cells, genes + 1)
    cell, gene = (axis.numpy() for axis in where.nonzero(as_tuple=True))  # (masks,)
    target = bins[where].numpy()
    mode = find_commonest_bin(visible, n_bins).numpy()[cell, 0]
    predicted = logits.argmax(1).numpy()
    measures = {
        "n_masked": np.ones(len(cell), bool),
        "correct": predicted == target,
        "loss": torch.nn.functional.cross_entropy(logits, bins[where], reduction="none").numpy(),
        "predicted_mode": predicted == mode,
    }
    shown, position = visible.nonzero(as_tuple=True)
    code = (shown * n_bins + visible[shown, position] - 1).numpy()
    counts = np.bincount(code, minlength=len(bins) * n_bins).reshape(len(bins), n_bins) + 1.0
    shares = {"cell": (counts / counts.sum(1, keepdims=True))[cell]}  # (masks, n_bins) each
    if by_gene is not None:
        shares["gene"] = by_gene[gene]
        product = shares["gene"] * shares["cell"] / overall
        shares["both"] = product / product.sum(1, keepdims=True)
    for rival, share in shares.items():
        says = mode if rival == "cell" else share.argmax(1) + 1
        measures[f"{rival}_correct"] = says == target
        measures[f"{rival}_loss"] = -np.log(share[np.arange(len(target)), target - 1])
    row, n_rows = cell * n_bins + target - 1, len(bins) * n_bins
    return {  # float64 sums; what is counted stays whole
        name: np.bincount(row, values, n_rows).astype(np.int64 if values.dtype == bool else np.float64)
        for name, values in measures.items()
    }
