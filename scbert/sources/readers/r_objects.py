"""R: sparse matrices and Seurat objects.

A sparse matrix arrives as its slots; of a Seurat object only the counts and the
cell table are converted, since rdata stops at its "commands".
"""

import warnings
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
from scipy import sparse

from .matrices import make_cells


def read_r(path: Path) -> dict | object:
    """Return the objects of an R file: name -> object for .rda and .RData, the object for .rds."""
    return _convert(_parse(path))


def _parse(path):
    import rdata

    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Unknown file type")
            return rdata.parser.parse_file(path)
    except Exception as error:  # what is no R file raises one of many types
        raise ValueError(f"no R file: {str(error).strip() or type(error).__name__}") from None


def _convert(parsed):
    import rdata

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Missing constructor")  # what stays a bag of slots is read as such
        return rdata.conversion.convert(parsed)


def to_sparse(slots) -> tuple[sparse.csr_matrix, np.ndarray, np.ndarray]:
    """Turn the slots of a dgCMatrix or dgTMatrix into (matrix, row names, column names)."""
    kind, shape = str(slots.__dict__["class"][0]), tuple(int(n) for n in slots.Dim)
    if kind == "dgCMatrix":
        matrix = sparse.csc_matrix((slots.x, slots.i, slots.p), shape=shape).tocsr()
    elif kind == "dgTMatrix":
        matrix = sparse.coo_matrix((slots.x, (slots.i, slots.j)), shape=shape).tocsr()
    else:
        raise ValueError(f"a matrix of class {kind} is not read here, only dgCMatrix and dgTMatrix")
    if any(names is None for names in slots.Dimnames):
        raise ValueError("its matrix has no names of rows or of columns")
    return matrix, *(np.asarray(names).astype(str) for names in slots.Dimnames)


def read_seurat(path: Path) -> anndata.AnnData:
    """Read the counts of the first assay of a Seurat object, and its cell table."""
    import rdata

    parsed = _parse(path).object
    seurat = parsed.value[0] if parsed.info.type == rdata.parser.RObjectType.LIST else parsed
    slots = _attributes(seurat)
    if not {"assays", "meta.data"} <= set(slots):
        raise ValueError("it holds neither a sparse matrix nor a Seurat object")
    assay = _attributes(slots["assays"].value[0])
    counts, genes, cells = to_sparse(_convert(assay["counts"]))
    obs = _convert(slots["meta.data"])
    # R numbers the repeats of a row name (x, x.1, ...), where the counts may have x each time.
    if any(not row.startswith(cell) for row, cell in zip(obs.index.astype(str), cells, strict=True)):
        raise ValueError("the cell table of the Seurat object is not in the order of its counts")
    return make_cells(counts.T, obs.index, genes, make_plain(obs))


def _attributes(node):
    """Return slot -> node of a parsed S4 object."""
    import rdata

    found, pair = {}, node.attributes
    while pair is not None and pair.info.type == rdata.parser.RObjectType.LIST:
        tag = pair.tag.referenced_object or pair.tag
        found[tag.value.value.decode()] = pair.value[0]
        pair = pair.value[1]
    return found


def make_plain(table: pd.DataFrame) -> pd.DataFrame:
    """Return an R data frame with plain column names, strings and floats, which h5ad can hold."""
    plain = pd.DataFrame(index=table.index)
    for name in table.columns:
        column = table[name]
        is_number = pd.api.types.is_numeric_dtype(column)
        plain[str(name)] = (
            column.to_numpy(np.float64, na_value=np.nan) if is_number else column.astype(object).to_numpy()
        )
    return plain


def read_r_matrix(path: Path) -> anndata.AnnData:
    """Read one's own R file: its first sparse matrix (genes x cells), or a Seurat object."""
    parsed = _parse(path)
    try:
        found = _convert(parsed)
    except Exception:  # rdata stops at parts of a Seurat object that it does not know, with one of many types
        return read_seurat(path)
    for item in found.values() if isinstance(found, dict) else [found]:
        if hasattr(item, "Dim"):
            counts, genes, cells = to_sparse(item)
            return make_cells(counts.T, cells, genes)
    return read_seurat(path)
