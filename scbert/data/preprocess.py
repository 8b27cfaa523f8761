"""From counts to the tokens scBERT reads: aligned genes -> counts per 10,000 -> log2 -> floor, cap."""

import hashlib
from collections.abc import Sequence

import anndata
import numpy as np
import pandas as pd
from scipy import sparse

from .checks import check_names, check_not_empty, check_rows, check_totals, check_unique
from .counts import iterate_rows, read_notes


def hash_genes(genes: Sequence[str]) -> str:
    """Return the sha256 of the gene names in order, one a line: two models fit only if it agrees."""
    return hashlib.sha256("\n".join(genes).encode()).hexdigest()


def library_size(adata: anndata.AnnData) -> np.ndarray:
    """Return each cell's total counts over all measured genes, (cells,).

    That is ``obs["n_counts"]`` where it is there (the matrix may hold a selection of the genes), else the row sum.

    Raises
    ------
    ValueError
        ``n_counts`` is no number, or less than the counts in the matrix.
    """
    totals = np.concatenate([np.asarray(rows.sum(1), np.float64).ravel() for _, rows in iterate_rows(adata)])
    return check_totals(totals, adata.obs["n_counts"]) if "n_counts" in adata.obs else totals


def lognormalize(adata: anndata.AnnData, totals: np.ndarray | None = None) -> sparse.csr_matrix:
    """Return natural log1p of counts per 10,000 of all measured genes, (cells, genes): what the baselines read.

    `totals`, (cells,), are those of `library_size`, counted if None.
    """
    per_10k = sparse.diags(10_000 / (library_size(adata) if totals is None else totals)) @ sparse.csr_matrix(
        adata.X, dtype=np.float64
    )
    return per_10k.log1p().tocsr()


def align(counts: sparse.csr_matrix, names: Sequence[str], vocabulary: Sequence[str]) -> sparse.csr_matrix:
    """Put columns in the order of a vocabulary, by name: (cells, names) -> (cells, vocabulary), absent genes zero.

    One product with a sparse matrix of ones, whose cost is that of copying the non-zeros.
    """
    column = pd.Index(vocabulary).get_indexer(pd.Index(names))  # where each gene of the data goes, -1 for nowhere
    known = np.flatnonzero(column >= 0)
    ones = np.ones(len(known), np.float32)
    placement = sparse.csr_matrix((ones, (known, column[known])), shape=(len(column), len(vocabulary)))
    return sparse.csr_matrix(counts) @ placement


def bin_counts(counts: sparse.csr_matrix, totals: np.ndarray, n_bins: int = 5) -> sparse.csr_matrix:
    """Return min(floor(log2(1 + CP10K)), n_bins), (cells, genes), uint8.

    Floor(log2(1 + x)) >= b exactly when x >= 2^b - 1, so the counts are compared with the edges 1, 3, 7, 15, 31
    times total / 10,000: no logarithm, and no rounding at an edge.

    Paper: Methods, "data preprocessing" and "expression embedding" (base and bins: the script's).
    """
    counts = counts.tocsr()
    per_value = np.repeat(np.where(totals > 0, totals, np.inf), np.diff(counts.indptr))  # (non-zeros,)
    bins = np.zeros(counts.nnz, dtype=np.uint8)
    for b in range(1, n_bins + 1):
        bins += counts.data * 10_000.0 >= (2**b - 1) * per_value
    result = sparse.csr_matrix((bins, counts.indices, counts.indptr), shape=counts.shape, copy=True)
    result.eliminate_zeros()
    return result


def thin_counts(
    counts: sparse.csr_matrix, totals: np.ndarray, least: float, random: np.random.Generator
) -> tuple[sparse.csr_matrix, np.ndarray]:
    """Return counts (cells, genes) and totals (cells,) as if the cells had been sequenced less deeply.

    Each cell keeps a share of its counts, drawn between `least` and 1, evenly in its logarithm. Not in the paper.
    """
    share = np.exp(random.uniform(np.log(least), 0, len(totals)))
    kept = counts.tocsr().copy()
    kept.data = random.binomial(np.rint(kept.data).astype(np.int64), np.repeat(share, np.diff(kept.indptr)))
    return kept, totals * share


def tokenize(
    adata: anndata.AnnData,
    genes: Sequence[str] | None = None,
    n_bins: int = 5,
    library: str = "all",
    *,
    name: str = "adata",
) -> anndata.AnnData:
    """Turn counts into tokens 0 ... n_bins, aligned to a gene vocabulary by name.

    The matrix is passed over once: each block of cells is checked, totalled, aligned and binned.

    Parameters
    ----------
    adata
        Cells with counts in ``X``, dense, sparse or backed.
    genes
        The vocabulary; the data's own genes, in their order, if None. A vocabulary gene that the data lack is 0.
    n_bins
        Highest token. Published: 5, with edges 1, 3, 7, 15 and 31 counts per 10,000.
    library
        What counts per 10,000 are divided by: "all" measured genes (`library_size`), or the row sum over
        the "aligned" genes alone.
    name
        What error messages call the cells.

    Returns
    -------
    `adata` itself, or for another vocabulary a new AnnData with its genes and the same cells; with
    ``layers["bins"]`` (uint8, sparse) and a report in ``uns["scbert"]["tokenize"]``: genes matched, share of the
    vocabulary, and how many cells are left without a single token.

    Raises
    ------
    ValueError
        `X` is not whole, non-negative counts, a cell is empty or has more counts than its ``obs["n_counts"]``, names are
        duplicated, or no gene is shared with the vocabulary.

    Paper: Methods, "data preprocessing".
    Differs from the published code: the library size counts all measured genes unless ``library="aligned"``;
    duplicated genes are refused, not dropped; losses are reported; vectorised.
    """
    notes, vocabulary = read_notes(adata), pd.Index(adata.var_names) if genes is None else pd.Index(genes)
    bins, counts, totals, report = bin_cells(adata, vocabulary, n_bins, library, name)
    if not vocabulary.equals(pd.Index(adata.var_names)):
        var = pd.DataFrame({"matched": vocabulary.isin(adata.var_names)}, index=vocabulary)
        kept = {"obs": adata.obs.copy(), "obsm": dict(adata.obsm), "uns": dict(adata.uns)}
        adata = anndata.AnnData(counts, var=var, **kept)
        if library == "all":
            adata.obs["n_counts"] = totals  # the matrix no longer holds all measured genes
    adata.layers["bins"] = bins
    adata.uns["scbert"] = notes | {"tokenize": report}
    return adata


def bin_cells(
    adata: anndata.AnnData, vocabulary: pd.Index, n_bins: int = 5, library: str = "all", name: str = "adata"
) -> tuple[sparse.csr_matrix, sparse.csr_matrix, np.ndarray, dict]:
    """Check, total, align and bin cells in one pass over their matrix, and leave them as they are: see `tokenize`.

    Returns
    -------
    Tokens and counts of the vocabulary's genes, (cells, vocabulary) each; totals over all measured genes, (cells,); and
    the report.
    """
    if library not in ("all", "aligned"):
        raise ValueError(f"library must be 'all' or 'aligned', not {library!r}.")
    names = pd.Index(adata.var_names)
    check_names(adata, name)
    check_unique(vocabulary, "Gene names of the vocabulary")
    matched = names.isin(vocabulary)
    if not matched.any():
        raise ValueError(
            f"None of the data's {len(names)} genes ({', '.join(names[:3])}, ...) is in the vocabulary of "
            f"{len(vocabulary)} ({', '.join(vocabulary[:3])}, ...): both must use the same gene symbols. "
            "scbert.genes.rename_genes, or scbert annotate --rename-genes, traces old symbols and Ensembl identifiers."
        )
    is_same = names.equals(vocabulary)
    blocks, counts, totals = [], [], []
    for start, rows in iterate_rows(adata):
        own = slice(start, start + rows.shape[0])
        sums = check_rows(adata, rows, name)
        if "n_counts" in adata.obs:
            sums = check_totals(sums, adata.obs["n_counts"].iloc[own])
        check_not_empty(sums, adata.obs_names[own], name)
        aligned = rows if is_same else align(rows, names, vocabulary)
        size = sums if library == "all" else np.asarray(aligned.sum(1)).ravel()
        blocks.append(bin_counts(aligned, size, n_bins))
        counts.append(aligned)
        totals.append(sums)
    bins = sparse.vstack(blocks, format="csr")
    report = {
        "n_bins": n_bins,
        "library": library,
        "genes_sha256": hash_genes(list(vocabulary)),
        "genes_in_data": len(names),
        "genes_in_vocabulary": len(vocabulary),
        "genes_matched": int(matched.sum()),
        "matched_share": float(matched.sum() / len(vocabulary)),
        "cells_without_tokens": int((bins.getnnz(axis=1) == 0).sum()),
    }
    counts = sparse.vstack(counts, format="csr") if len(counts) > 1 else counts[0]
    return bins, counts, np.concatenate(totals), report
