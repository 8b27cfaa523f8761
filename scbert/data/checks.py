"""Every refusal of cells that scBERT cannot use, in one sentence each: what, where, and what to do."""

from collections.abc import Iterable
from typing import TYPE_CHECKING

import anndata
import numpy as np
import pandas as pd
from scipy import sparse

from .counts import iterate_rows, read_notes

if TYPE_CHECKING:
    from ..model.classifier import Classifier
    from ..model.encoder import ScBert
    from ..scale.stream import CellStore
    from .cells import CellDataset

LEAST_SHARE = 0.1  # of a vocabulary, to train on it
NOT_TOKENIZED = "These cells are not tokenized: call scbert.preprocess.tokenize(adata) first."


def check_unique(names: pd.Index, what: str) -> None:
    """Raise a ValueError that begins with `what` if a name stands twice."""
    twice = names[names.duplicated()]
    if len(twice):
        raise ValueError(
            f"{what} are duplicated ({twice.nunique()} of them, first: {twice[0]}): sum or rename them first."
        )


def check_names(adata: anndata.AnnData, name: str) -> None:
    """Raise a ValueError if there is no cell, gene or matrix, or if a cell or gene name stands twice."""
    if not adata.n_obs or not adata.n_vars:
        raise ValueError(f"{name} has {adata.n_obs} cells and {adata.n_vars} genes: there is nothing to work on.")
    if adata.X is None:
        raise ValueError(f"{name} has no X: put the raw counts there{_say_where_counts_are(adata)}.")
    check_unique(adata.obs_names, f"Cell names of {name}")
    check_unique(adata.var_names, f"Gene names of {name}")


def check_rows(adata: anndata.AnnData, rows: sparse.csr_matrix, name: str) -> np.ndarray:
    """Return the totals of a block of rows, (cells,) float64; a ValueError if it is not whole, non-negative counts.

    Fractional counts, of molecules that were estimated, pass where ``uns["scbert"]["fractional_counts"]`` says why.
    """
    values = rows.data
    if not np.isfinite(values).all():
        raise ValueError(f"X of {name} holds NaN or infinite values: scBERT needs raw counts.")
    if (values < 0).any():
        where = _say_where_counts_are(adata)
        raise ValueError(f"X of {name} holds negative values (scaled data?): scBERT needs raw counts{where}.")
    fractional = values[values != np.rint(values)]
    if len(fractional) and not read_notes(adata).get("fractional_counts"):
        example = fractional[np.abs(fractional - np.rint(fractional)).argmax()]
        raise ValueError(
            f"X of {name} holds fractional values such as {example!s} (log-normalised?): put the raw counts into "
            f"X{_say_where_counts_are(adata)}. Estimated or corrected counts pass if uns['scbert']['fractional_counts'] says "
            "why, and are rounded by round_counts=True (scbert annotate --round-counts)."
        )
    return np.asarray(rows.sum(1), np.float64).ravel()


def check_not_empty(totals: np.ndarray, names: pd.Index, name: str) -> None:
    """Raise a ValueError if a cell has no counts at all, by its total."""
    empty = np.flatnonzero(totals == 0)
    if len(empty):
        raise ValueError(
            f"{name} has empty cells, without a single count ({len(empty)} in this block, first: {names[empty[0]]}): "
            "drop them with scanpy.pp.filter_cells(adata, min_counts=1)."
        )


def _say_where_counts_are(adata):
    """Return "; layers['counts'] may hold them" where values of that kind are, else nothing."""
    where = [f"layers[{key!r}]" for key in adata.layers if may_be_counts(adata.layers[key])]
    if adata.raw is not None and may_be_counts(adata.raw.X):
        where.append(".raw")
    return f"; {' and '.join(where)} may hold them" if where else ""


def may_be_counts(matrix: np.ndarray | sparse.spmatrix) -> bool:
    """Return whether the first cells of a matrix are whole, non-negative numbers."""
    values = matrix[:100]
    values = values.data if sparse.issparse(values) else np.asarray(values)
    return np.array_equal(values, np.rint(values)) and not (values < 0).any()


def check_counts(adata: anndata.AnnData, name: str) -> None:
    """Raise a ValueError that says what is wrong if `X` is not whole, non-negative counts of named genes: one pass over it."""
    check_names(adata, name)
    for start, rows in iterate_rows(adata):
        check_not_empty(check_rows(adata, rows, name), adata.obs_names[start : start + rows.shape[0]], name)


def check_totals(totals: np.ndarray, n_counts: pd.Series) -> np.ndarray:
    """Return ``obs["n_counts"]`` of cells, (cells,) float64; a ValueError if one is no number, or less than the cell's counts."""
    numbers = pd.to_numeric(n_counts.astype(object), errors="coerce").to_numpy(np.float64, na_value=np.nan)
    wrong = np.flatnonzero(~(totals <= numbers + 0.5) | np.isinf(numbers))
    if len(wrong):
        raise ValueError(
            f"obs['n_counts'] must be each cell's total over all measured genes, but {len(wrong)} cells have more counts than "
            f"that, or no number there (first: {n_counts.index[wrong[0]]}, with {n_counts.iloc[wrong[0]]!s}): correct the "
            "column or delete it if X holds all genes."
        )
    return numbers


def check_vocabulary(share: float, n_genes: int) -> None:
    """Raise a ValueError if cells have less than a tenth of a vocabulary of so many genes."""
    if share < LEAST_SHARE:
        raise ValueError(
            f"The cells have {round(share * n_genes):,} of the model's {n_genes:,} genes: too few. If names differ, "
            'rename them (scbert.genes.rename_genes); else train a new model of their own genes (notebooks: encoder = "").'
        )


def check_key(key: str, *ours: str) -> None:
    """Raise a ValueError if a column of labels or batches is one that scbert itself writes, and would write over."""
    if str(key).startswith("scbert_") or key in ours:
        raise ValueError(
            f"obs[{key!r}] is a column that scbert writes itself: copy your labels to a column of another name, such as "
            f"adata.obs['my_labels'] = adata.obs[{key!r}], and name that."
        )


def check_column(adata: anndata.AnnData, key: str, name: str, *, constant_is_fine: bool) -> None:
    """Raise a ValueError if a column of `obs` is missing, `check_key` refuses it, or values are missing or all alike."""
    check_key(key)
    if key not in adata.obs:
        columns = ", ".join(map(str, adata.obs.columns)) or "none at all"
        raise ValueError(f"{name} has no column {key!r} in obs; it has: {columns}.")
    column = adata.obs[key]
    if column.isna().any():
        raise ValueError(f"obs[{key!r}] of {name} has {int(column.isna().sum())} missing values: fill or drop them.")
    if not constant_is_fine and column.nunique() < 2:
        raise ValueError(
            f"obs[{key!r}] of {name} has one value only ({column.iloc[0]}): there is nothing to tell apart."
        )


def check_known(labels: Iterable[str], known: Iterable[str]) -> None:
    """Raise a ValueError if validation cells have a label that is not among the known ones, those of training cells."""
    unknown = sorted(set(labels) - set(known))
    if unknown:
        raise ValueError(f"Validation cells have labels that no training cell has: {', '.join(unknown)}.")


def check_tokenized(cells: "CellDataset | CellStore") -> None:
    """Raise a ValueError unless it is known into how many bins the cells are tokenized."""
    if getattr(cells, "n_bins", None) is None:
        raise ValueError(NOT_TOKENIZED)


def check_tokens(adata: anndata.AnnData) -> None:
    """Raise a ValueError unless ``layers["bins"]`` are tokens of the counts in `X`: the counts may have changed since."""
    if adata.X is not None and not fit_tokens(adata):
        raise ValueError(
            "The tokens in layers['bins'] are not those of the counts in X: X was changed after tokenizing. Put the raw "
            "counts into X and call scbert.preprocess.tokenize(adata) again."
        )


def fit_tokens(adata: anndata.AnnData) -> bool:
    """Return whether, in each cell, some library size makes its tokens out of its counts; one pass over both.

    A count x has token b if (2^b - 1) T <= 10,000 x < (2^(b + 1) - 1) T, T being the library size: so each count bounds
    T from both sides, and of a cell's own tokens these bounds leave a T.
    """
    n_bins = read_notes(adata).get("tokenize", {}).get("n_bins") or 5
    for start, counts in iterate_rows(adata):
        bins = sparse.csr_matrix(adata.layers["bins"][start : start + counts.shape[0]])
        if bins.nnz and bins.data.max() > n_bins:
            return False
        rows = _number_rows(counts)
        at_counts = rows * counts.shape[1] + counts.indices  # increasing, since the block is canonical
        at_bins = _number_rows(bins) * bins.shape[1] + bins.indices
        if not np.isin(at_bins, at_counts).all():
            return False
        tokens = np.zeros(counts.nnz, np.int64)
        tokens[np.searchsorted(at_counts, at_bins)] = bins.data
        scaled, low, high = counts.data * 10_000.0, np.zeros(counts.shape[0]), np.full(counts.shape[0], np.inf)
        has_token, is_open = tokens > 0, tokens < n_bins
        np.minimum.at(high, rows[has_token], scaled[has_token] / (2.0 ** tokens[has_token] - 1))
        np.maximum.at(low, rows[is_open], scaled[is_open] / (2.0 ** (tokens[is_open] + 1) - 1))
        if ((high <= 0) | (low > high * (1 + 1e-6))).any():
            return False
    return True


def _number_rows(matrix):
    """Return the row of each entry of a CSR matrix."""
    return np.repeat(np.arange(matrix.shape[0], dtype=np.int64), np.diff(matrix.indptr))


def check_cells(model: "ScBert | Classifier", cells: "CellDataset | CellStore") -> None:
    """Raise a ValueError unless cells of `open_cells` are tokenized for this model's vocabulary and bins."""
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
