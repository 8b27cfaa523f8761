"""The totals of cells whose file holds a selection of the genes: taken from the file where they are, else asked for."""

import re
import warnings

import anndata
import numpy as np

from ..data.checks import may_be_counts
from ..data.counts import iterate_rows, read_notes
from .gene_names import find_names
from .readers.names import GENE_FAMILY

WHOLE = 10_000  # genes: a file of so many holds nearly all counts
RIBOSOMAL = re.compile(r"RP[LS](\d+[AXLYK]?\d?|P[0-2])", re.I)
N_RIBOSOMAL, N_KNOWN = 50, 40
"""Fewer genes of ribosomal proteins, of some 80, beside so many of other families: a selection. tests/measure_data.py
totals: no whole file is named, of 50 cells with 300 counts neither; of its variable genes, those by Pearson residuals pass."""

TOTALS = re.compile(
    r"total_counts|nCount_(RNA|originalexp|Spatial)|(n|total)?_?umi_?(s|counts?)?|n_?counts?|raw_sum|lib(rary)?_?size"
    r"|tscp_count|sum|total",
    re.I,
)
"""What scanpy, Seurat, scater, Parse and others call the counts of a cell; and the number of its genes."""
N_GENES = re.compile(r"n_?genes?(_by_counts)?|nFeature_(RNA|originalexp|Spatial)|detected|gene_count", re.I)


def supply_totals(adata: anndata.AnnData, name: str) -> None:
    """Give cells of a selection of genes their totals over all genes, in place, as ``obs["n_counts"]``, where they lack it.

    They are taken from a column of `obs` that is called as totals are, whole numbers above the sums of the matrix, or from
    counts of more genes in ``.raw``; that is printed, and noted in ``uns["scbert"]["totals"]``. Without them, a file that
    seems to hold a selection of genes gets a warning, which says what to do.
    """
    if "n_counts" in adata.obs or adata.X is None or not adata.n_obs or not 0 < adata.n_vars < WHOLE:
        return
    found = {f"obs[{key!r}]": adata.obs[key] for key in adata.obs if TOTALS.fullmatch(str(key))}
    if adata.raw is not None and adata.raw.n_vars > adata.n_vars and may_be_counts(adata.raw.X):
        found[".raw"] = np.asarray(adata.raw.X[:].sum(1)).ravel()
    counted = {f"obs[{key!r}]": adata.obs[key] for key in adata.obs if N_GENES.fullmatch(str(key))}
    if found or counted:  # a pass over the matrix only where there is something to compare with
        blocks = [(np.asarray(rows.sum(1)).ravel(), rows.getnnz(1)) for _, rows in iterate_rows(adata)]
        sums, n_genes = (np.concatenate(parts).astype(np.float64) for parts in zip(*blocks, strict=True))
    for source, totals in found.items():
        if _are_above(totals, sums):
            adata.obs["n_counts"] = np.asarray(totals, np.float64)
            adata.uns["scbert"] = read_notes(adata) | {"totals": source}
            ratio = np.median(adata.obs["n_counts"] / np.maximum(sums, 1))
            print(f"{name}: totals over all genes are those of {source}, {ratio:.1f} times the counts here (median).")
            return
    more = [source for source, numbers in counted.items() if _are_above(numbers, n_genes)]
    sign = _find_sign(adata, more)
    if sign:
        warnings.warn(
            f"{name} seems to hold a selection of its genes ({adata.n_vars:,}; {sign}) without the cells' totals over all of "
            "them, so that most tokens are too high: put these totals into obs['n_counts'], or take the file with all genes, "
            "unless no others were measured.",
            stacklevel=3,
        )


def _find_sign(adata, more):
    """Return what shows that genes were selected, or None; `more` are columns that count more genes than are here."""
    if "highly_variable" in adata.var and adata.var["highly_variable"].eq(True).all():
        return "var['highly_variable'] marks all"
    if more:
        return f"{more[0]} counts more a cell than are here"
    names = set(find_names(adata)[0].str.upper())
    ribosomal = set(filter(RIBOSOMAL.fullmatch, names))
    if len(ribosomal) < N_RIBOSOMAL and len(list(filter(GENE_FAMILY.fullmatch, names - ribosomal))) >= N_KNOWN:
        return f"{len(ribosomal)} of some 80 ribosomal ones"
    return None


def _are_above(values, sums):
    """Return whether these are whole numbers, not all alike, below no cell's sum and well above that of most."""
    values = np.asarray(values)
    if values.dtype.kind not in "iuf" or not np.isfinite(values).all() or (values != np.rint(values)).any():
        return False
    return bool((values >= sums - 0.5).all() and (values > 1.05 * sums).mean() > 0.5 and np.ptp(values) > 0)
