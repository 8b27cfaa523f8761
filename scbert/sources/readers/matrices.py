"""What all readers make: cells x genes as float32 CSR, and whole counts recovered from log-normalised ones."""

from collections.abc import Sequence

import anndata
import numpy as np
import pandas as pd
from scipy import sparse


def make_cells(counts, cells: Sequence[str], genes: Sequence[str], obs: pd.DataFrame | None = None) -> anndata.AnnData:
    """Return cells x genes as float32 CSR, with the counts of repeated gene names summed."""
    obs = pd.DataFrame(index=pd.Index(cells, dtype=str)) if obs is None else obs.set_axis(pd.Index(cells, dtype=str))
    counts, genes = sum_repeats(sparse.csr_matrix(counts, dtype=np.float32), genes)
    return anndata.AnnData(counts, obs=obs, var=pd.DataFrame(index=pd.Index(genes, dtype=str)))


def sum_repeats(counts: sparse.csr_matrix, genes: Sequence[str]) -> tuple[sparse.csr_matrix, Sequence[str]]:
    """Sum the columns of one name, in the order of their first mention."""
    codes, names = pd.factorize(np.asarray(genes, dtype=object))
    if len(names) == len(codes):
        return counts, genes
    placement = sparse.csr_matrix((np.ones(len(codes), counts.dtype), (np.arange(len(codes)), codes)))
    return counts @ placement, names


def recover_counts(
    lognormalised: sparse.spmatrix | np.ndarray,
    totals: np.ndarray | None,
    tolerance: float = 0.1,
    base: float = np.e,
) -> sparse.csr_matrix:
    """Turn the log of 1 + counts per 10,000 back into the integer counts it was made from.

    Parameters
    ----------
    lognormalised
        (cells, genes)
    totals
        (cells,) total counts that the cells were divided by; if None, a cell's smallest value is taken for one count.
    tolerance
        Largest distance to a whole number that is still taken for rounding in the file.
    base
        Of the logarithm.

    Raises
    ------
    ValueError
        A value is further from a whole number, or a cell has more counts than its total.
    """
    counts = sparse.csr_matrix(lognormalised, dtype=np.float64)
    counts.eliminate_zeros()
    per_cell = np.diff(counts.indptr)
    counts.data = np.expm1(counts.data * np.log(base))
    if totals is None:
        starts = counts.indptr[:-1][per_cell > 0]
        counts.data /= np.repeat(np.minimum.reduceat(counts.data, starts), per_cell[per_cell > 0])
    else:
        counts.data *= np.repeat(totals, per_cell) / 10_000
    distance = np.abs(counts.data - np.rint(counts.data)).max(initial=0)
    if distance >= tolerance:
        raise ValueError(f"These values are not log1p of counts per 10,000: off a whole number by {distance:.2f}.")
    counts.data = np.rint(counts.data)
    if totals is not None and (np.asarray(counts.sum(1)).ravel() > totals).any():
        raise ValueError("These totals are too small: a cell has more counts than its total.")
    return counts.astype(np.float32)
