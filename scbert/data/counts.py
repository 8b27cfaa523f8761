"""Counts, read in blocks of rows."""

import hashlib
from collections.abc import Iterator, Mapping

import anndata
import numpy as np
from scipy import sparse

CELLS_AT_ONCE = 10_000  # rows of a block: what is read of a backed file, and worked on, in one go


def read_notes(adata: anndata.AnnData) -> dict:
    """Return a copy of what this package noted of the cells in ``uns["scbert"]``; a ValueError if others hold that name."""
    notes = adata.uns.get("scbert", {})
    if not isinstance(notes, Mapping):
        raise ValueError(
            f"uns['scbert'] holds something of another program ({type(notes).__name__}): rename it, or delete it by "
            "del adata.uns['scbert']."
        )
    return dict(notes)


def iterate_rows(adata: anndata.AnnData) -> Iterator[tuple[int, sparse.csr_matrix]]:
    """Yield (first row, CSR block of counts), each entry once: repeated ones are summed, as everywhere in scipy."""
    for start in range(0, adata.n_obs, CELLS_AT_ONCE):
        rows = adata.X[start : start + CELLS_AT_ONCE]
        rows = sparse.csr_matrix(rows.astype(np.float32) if rows.dtype == np.float16 else rows)  # scipy has no half
        if not rows.has_canonical_format:
            rows = rows.copy()  # a block may be a view of the caller's matrix
            rows.sum_duplicates()
        yield start, rows


def is_whole(values: sparse.csr_matrix) -> bool:
    """Return whether all values are whole numbers."""
    return bool((values.data == np.rint(values.data)).all())


def survey_counts(adata: anndata.AnnData) -> tuple[str, float]:
    """Return the sha256 of counts, cell names and gene names, and the largest count; one pass over the matrix."""
    digest = hashlib.sha256("\n".join([*adata.obs_names, "", *adata.var_names]).encode())
    largest = 0.0
    for _, rows in iterate_rows(adata):
        for array in (rows.indptr.astype("<i8"), rows.indices.astype("<i8"), rows.data.astype("<f8")):
            digest.update(array.tobytes())
        largest = max(largest, float(rows.max()))
    return digest.hexdigest(), largest


def hash_data(adata: anndata.AnnData) -> str:
    """Return the sha256 of the counts, cell names and gene names."""
    return survey_counts(adata)[0]
