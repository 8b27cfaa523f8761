"""What all readers make: cells x genes as float32 CSR, of counts that are whole."""

from collections.abc import Sequence

import anndata
import numpy as np
import pandas as pd
from scipy import sparse

from .names import GENOME, join_distinct
from .refusal import Refusal

NEAR_WHOLE = 1e-3
"""How far from a whole number is still rounding: single precision and R's seven printed digits bring counts of up to some
10,000 back within it; what corrected counts are off by begins at about 2e-3. Above 1,000, a millionth of the value."""


def make_cells(
    counts,
    cells: Sequence[str],
    genes: Sequence[str],
    obs: pd.DataFrame | None = None,
    gene_ids: Sequence[str] | None = None,
) -> anndata.AnnData:
    """Return cells x genes as float32 CSR, with the counts of repeated gene names summed.

    `counts`, (cells, genes), are sparse or dense; `cells` and `genes` their names, and a genome that stands before all
    genes (GRCh38_CD3D) is taken off, while several raise a Refusal. `obs` is what is known of the cells, a row each, and
    `gene_ids` are kept in ``var["gene_ids"]``; those of summed genes are joined by ";".
    """
    obs = pd.DataFrame(index=pd.Index(cells, dtype=str)) if obs is None else obs.set_axis(pd.Index(cells, dtype=str))
    genomes = dict.fromkeys(match[1] for match in map(GENOME.match, genes) if match)
    if len(genomes) > 1:
        raise Refusal(
            f"its genes are of several genomes, {' and '.join(genomes)}: keep the cells and genes of one, take its name off "
            "theirs, and write_h5ad"
        )
    if genomes and all(map(GENOME.match, genes)):
        genes = [GENOME.sub("", gene) for gene in genes]
    codes = pd.factorize(np.asarray(genes, dtype=object))[0]
    counts, genes = sum_repeats(sparse.csr_matrix(counts, dtype=np.float32), genes)
    var = pd.DataFrame(index=pd.Index(genes, dtype=str))
    if gene_ids is not None:
        var["gene_ids"] = join_distinct([GENOME.sub("", str(gene_id)) for gene_id in gene_ids], codes).to_numpy()
    return anndata.AnnData(counts, obs=obs, var=var)


def sum_repeats(counts: sparse.csr_matrix, genes: Sequence[str]) -> tuple[sparse.csr_matrix, Sequence[str]]:
    """Sum the columns of one name, in the order of their first mention; narrow integers, which would wrap, as float32."""
    codes, names = pd.factorize(np.asarray(genes, dtype=object))
    if len(names) == len(codes):
        return counts, genes
    if counts.dtype.itemsize < 4:
        counts = counts.astype(np.float32)
    placement = sparse.csr_matrix((np.ones(len(codes), counts.dtype), (np.arange(len(codes)), codes)))
    return counts @ placement, names


def round_counts(adata: anndata.AnnData, name: str, everything: bool = False) -> None:
    """Round values of `X` to whole numbers, in place, and print that: if all are near to one, or everything on request.

    Cells of a backed file, and those whose ``uns["scbert"]["fractional_counts"]`` says why they are fractional, stay as
    they are. Raises a Refusal if everything is to be rounded but the values are normalised, with the same sum in each
    cell or the same after expm1.
    """
    if adata.isbacked and everything:
        raise Refusal("rounding changes its matrix, which backed=True leaves on disk: load it into memory")
    if adata.isbacked or not isinstance(adata.X, np.ndarray | sparse.spmatrix | sparse.sparray):
        return
    notes = adata.uns.get("scbert")
    is_explained = not everything and isinstance(notes, dict) and notes.get("fractional_counts")
    values = adata.X.data if sparse.issparse(adata.X) else adata.X
    if values.dtype.kind != "f" or is_explained:
        return
    whole = np.rint(values)
    fractional = values != whole
    if not fractional.any() or not np.isfinite(values).all():
        return
    distance = np.abs(values - whole)
    is_near = bool((distance <= np.maximum(NEAR_WHOLE, np.abs(values) * NEAR_WHOLE * 1e-3)).all())
    if not is_near and not everything:
        return
    if not is_near:
        _refuse_normalised(adata.X)
    why = "were off a whole number by rounding" if is_near else "had fractions"
    print(
        f"{name}: {fractional.sum():,} of {np.count_nonzero(values):,} counts {why}, such as {values.flat[distance.argmax()]!s}: "
        "rounded."
    )
    if sparse.issparse(adata.X):
        adata.X.data = whole
        adata.X.eliminate_zeros()
    else:
        adata.X = whole


def _refuse_normalised(matrix):
    forms = {"normalised": matrix}
    if matrix.max() < 20:  # expm1 of counts would overflow
        forms["logarithms of normalised counts"] = sparse.csr_matrix(matrix, dtype=np.float64).expm1()
    for what, values in forms.items():
        sums = np.asarray(values.sum(1), np.float64).ravel()
        if len(sums) > 1 and np.ptp(sums) < 0.01 * sums.mean():
            raise Refusal(
                f"its values are {what} (every cell sums to {sums.mean():.6g}): rounding makes no counts of them"
            )


def recover_counts(
    lognormalised: sparse.spmatrix | np.ndarray, totals: np.ndarray | None, base: float = np.e
) -> sparse.csr_matrix:
    """Turn the log, to a base, of 1 + counts per 10,000, (cells, genes), back into the counts it was made from.

    `totals`, (cells,), are the counts that the cells were divided by; if None, a cell's smallest value is taken for one
    count. A ValueError if a value is a tenth or more from a whole number, or a cell has more counts than its total.
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
    if distance >= 0.1:
        raise ValueError(f"These values are not log1p of counts per 10,000: off a whole number by {distance:.2f}.")
    counts.data = np.rint(counts.data)
    if totals is not None and (np.asarray(counts.sum(1)).ravel() > totals).any():
        raise ValueError("These totals are too small: a cell has more counts than its total.")
    return counts.astype(np.float32)
