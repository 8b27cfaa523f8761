"""Cells by name or by path: always counts in `X`, and labels and batches where they are asked for."""

import warnings
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
from scipy import sparse

from .preprocess import check_unique, iterate_rows
from .record import find_file


def load(
    name: str | Path, *, label_key: str | None = None, batch_key: str | None = None, backed: bool = False
) -> anndata.AnnData:
    """Load a data set of the catalogue, or one's own ``.h5ad``, as counts.

    Parameters
    ----------
    name
        A name of the catalogue ("pbmc68k_reduced"), or the path of an ``.h5ad`` file with raw counts in ``X``, from
        the current folder or from the root of the project.
    label_key, batch_key
        Columns of ``obs`` that must be there; catalogue sets have "cell_type" and "batch".
    backed
        Leave the matrix on disk (files only).

    Returns
    -------
    Cells x genes with whole, non-negative counts in ``X``. ``obs["n_counts"]`` is the total over all measured
    genes where ``X`` holds a selection of them.

    Raises
    ------
    ValueError
        No such set or file, not an h5ad file, no counts, duplicated genes, an empty cell, or a label or batch
        column that is missing, incomplete or (labels) constant.
    """
    if str(name) in CATALOGUE:
        adata = CATALOGUE[str(name)]()
    else:
        adata = _read_h5ad(find_file(name), backed)
    check_counts(adata, str(name))
    if label_key:
        check_column(adata, label_key, str(name), constant_is_fine=False)
        adata.obs[label_key] = adata.obs[label_key].astype(str).astype("category")  # cluster numbers are names too
    if batch_key:
        check_column(adata, batch_key, str(name), constant_is_fine=True)
    return adata


def _read_h5ad(path, backed):
    if not path.exists():
        known = ", ".join(CATALOGUE)
        raise ValueError(f"There is no file {path}, and no data set of that name in the catalogue ({known}).")
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*names are not unique")  # check_counts says it
            return anndata.read_h5ad(path, backed="r" if backed else None)
    except (OSError, KeyError, AttributeError, TypeError) as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise ValueError(
            f"{path} cannot be read as an h5ad file ({reason[0]}): is it another format, or damaged?"
        ) from None


def check_counts(adata: anndata.AnnData, name: str) -> None:
    """Raise a ValueError that says what is wrong if `X` is not whole, non-negative counts of named genes."""
    if not adata.n_obs or not adata.n_vars:
        raise ValueError(f"{name} has {adata.n_obs} cells and {adata.n_vars} genes: there is nothing to work on.")
    if adata.X is None:
        raise ValueError(f"{name} has no X: put the raw counts there.")
    check_unique(adata.obs_names, f"Cell names of {name}")
    check_unique(adata.var_names, f"Gene names of {name}")
    for start, rows in iterate_rows(adata):
        values = rows.data
        if not np.isfinite(values).all():
            raise ValueError(f"X of {name} holds NaN or infinite values: scBERT needs raw counts.")
        if (values < 0).any():
            raise ValueError(f"X of {name} holds negative values (scaled data?): scBERT needs raw counts.")
        fractional = values[values != np.rint(values)]
        if len(fractional):
            where = [f"layers[{key!r}]" for key in adata.layers if not _is_fractional(adata.layers[key])]
            if adata.raw is not None and not _is_fractional(adata.raw.X):
                where.append(".raw")
            hint = f"; {' and '.join(where)} may hold them" if where else ""
            raise ValueError(
                f"X of {name} holds fractional values such as {fractional[0]:.3g} (log-normalised?): "
                f"put the raw counts into X{hint}."
            )
        empty = np.flatnonzero(np.asarray(rows.sum(1)).ravel() == 0)
        if len(empty):
            raise ValueError(
                f"{name} has empty cells, without a single count ({len(empty)} in this block, first: "
                f"{adata.obs_names[start + empty[0]]}): drop them with scanpy.pp.filter_cells(adata, min_counts=1)."
            )


def _is_fractional(matrix):
    values = matrix[:100]
    values = values.data if sparse.issparse(values) else np.asarray(values)
    return not np.array_equal(values, np.rint(values))


def check_column(adata: anndata.AnnData, key: str, name: str, *, constant_is_fine: bool) -> None:
    """Raise a ValueError if a column of `obs` is missing, has missing values, or has one value only."""
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


def _load_pbmc68k_reduced():
    """700 cells of Zheng68K from scanpy's bundled file: 765 selected genes, UMAP, labels of Zheng et al. 2017.

    The file keeps natural log1p of counts per 10,000, rounded to three decimals, in `.raw`, and each cell's
    total over all genes; together they give the integer counts back.
    """
    import scanpy

    source = scanpy.datasets.pbmc68k_reduced()
    counts = recover_counts(source.raw.X, source.obs["n_counts"].to_numpy(np.float64))
    obs = pd.DataFrame(
        {
            "cell_type": source.obs["bulk_labels"],
            "batch": source.obs_names.str.rsplit("-", n=1).str[-1].astype("category"),  # the 10x well
            "n_counts": source.obs["n_counts"].astype(np.float64),
            "louvain": source.obs["louvain"],
        },
        index=source.obs_names.rename(None),
    )
    var = pd.DataFrame(index=source.raw.var_names.rename(None))
    return anndata.AnnData(counts, obs=obs, var=var, obsm={"X_umap": source.obsm["X_umap"]})


def recover_counts(
    lognormalised: sparse.spmatrix | np.ndarray, totals: np.ndarray, tolerance: float = 0.1
) -> sparse.csr_matrix:
    """Turn natural log1p of counts per 10,000 back into the integer counts it was made from.

    Parameters
    ----------
    lognormalised
        (cells, genes)
    totals
        (cells,) total counts that the cells were divided by.
    tolerance
        Largest distance to a whole number that is still taken for rounding in the file.

    Raises
    ------
    ValueError
        A value is further from a whole number, or a cell has more counts than its total.
    """
    counts = sparse.csr_matrix(lognormalised, dtype=np.float64)
    counts.data = np.expm1(counts.data) * np.repeat(totals, np.diff(counts.indptr)) / 10_000
    distance = np.abs(counts.data - np.rint(counts.data)).max(initial=0)
    if distance >= tolerance:
        raise ValueError(f"These values are not log1p of counts per 10,000: off a whole number by {distance:.2f}.")
    counts.data = np.rint(counts.data)
    if (np.asarray(counts.sum(1)).ravel() > totals).any():
        raise ValueError("These totals are too small: a cell has more counts than its total.")
    return counts.astype(np.float32)


CATALOGUE = {"pbmc68k_reduced": _load_pbmc68k_reduced}
