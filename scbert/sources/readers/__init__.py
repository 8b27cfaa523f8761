"""From a file of any common format to cells x genes: h5ad, 10x matrices, tables, R objects."""

import csv
import gzip
import shutil
import tarfile
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
from scipy import sparse

from ...evaluate.hygiene import BARCODE
from ...run.record import first_line

FORMATS = ".h5ad, .h5ad.gz, 10x .h5, .mtx or .tar.gz, .csv or .tsv (.gz), R .rds, .rda or .RData"


def read_cells(path: str | Path, backed: bool = False) -> anndata.AnnData:
    """Read cells from a file of any common format, by its name.

    Parameters
    ----------
    path
        ``.h5ad`` or ``.h5ad.gz``; 10x ``.h5``, a folder or ``.tar.gz`` with ``matrix.mtx``; ``.csv``, ``.tsv`` or
        ``.txt`` (gzipped or not) with genes in rows and cells in columns; R's ``.rds``, ``.rda`` or ``.RData`` with a
        sparse matrix of genes x cells or a Seurat object. Counts of genes of one name are summed, but in ``.h5ad``.
    backed
        Leave the matrix on disk (``.h5ad`` only).

    Raises
    ------
    ValueError
        Another format, or a damaged file.
    """
    path = Path(path)
    name = path.name.lower()
    try:
        if name.endswith(".h5ad"):
            return read_h5ad(path, backed)
        if name.endswith(".h5ad.gz"):
            return _read_gzipped_h5ad(path)
        if name.endswith(".h5"):
            return _read_10x_h5(path)
        if name.endswith((".tar.gz", ".tgz")):
            return _read_10x_archive(path)
        if path.is_dir() or name.endswith((".mtx", ".mtx.gz")):
            return _read_10x_files(_find_matrix(path) if path.is_dir() else path)
        if name.endswith((".rds", ".rda", ".rdata")):
            return _read_r_matrix(path)
        if name.removesuffix(".gz").endswith((".csv", ".tsv", ".txt")):
            return _read_table(path)
    except (OSError, KeyError, AttributeError, TypeError, ValueError, EOFError, IndexError, tarfile.TarError) as error:
        kind = "an h5ad file" if ".h5ad" in name else f"cells from a {''.join(path.suffixes[-2:]) or 'folder'}"
        raise ValueError(
            f"{path} cannot be read as {kind} ({first_line(error)[:300]}): is it another format, or damaged?"
        ) from None
    raise ValueError(f"{path} is of no format that is read here: {FORMATS}.")


def read_h5ad(path: Path, backed: bool = False) -> anndata.AnnData:
    """Read an ``.h5ad`` file, whatever its name."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*names are not unique")  # check_counts says it
        return anndata.read_h5ad(path, backed="r" if backed else None)


def _read_gzipped_h5ad(path):
    with tempfile.NamedTemporaryFile(suffix=".h5ad") as plain:
        with gzip.open(path, "rb") as packed:
            shutil.copyfileobj(packed, plain, 2**20)
        plain.flush()
        return read_h5ad(Path(plain.name))


def _read_10x_h5(path):
    import scanpy

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*names are not unique")
        adata = scanpy.read_10x_h5(path)
    return make_cells(adata.X, adata.obs_names, adata.var_names)


def _read_10x_archive(path):
    with tempfile.TemporaryDirectory() as folder:
        with tarfile.open(path) as archive:
            archive.extractall(folder, filter="data")
        return _read_10x_files(_find_matrix(Path(folder), "**/*matrix.mtx*"))


def _find_matrix(folder, pattern="*matrix.mtx*"):
    matrices = sorted(folder.glob(pattern))
    if len(matrices) != 1:
        raise ValueError(f"it holds {len(matrices)} files matrix.mtx where one is due")
    return matrices[0]


def _read_10x_files(matrix):
    """Read matrix.mtx with the barcodes.tsv and genes.tsv or features.tsv beside it; all may share a prefix, or be gzipped."""
    from scipy.io import mmread

    prefix, is_10x, _ = matrix.name.partition("matrix.mtx")
    if not is_10x:
        raise ValueError("the name of a 10x matrix ends in matrix.mtx or matrix.mtx.gz")
    beside = {
        path.name.removesuffix(".gz").removeprefix(prefix): path for path in matrix.parent.glob(f"{prefix}*.tsv*")
    }
    genes_file, cells_file = beside.get("features.tsv", beside.get("genes.tsv")), beside.get("barcodes.tsv")
    if genes_file is None or cells_file is None:
        raise ValueError(
            f"it lacks {prefix}barcodes.tsv, or {prefix}genes.tsv or {prefix}features.tsv, beside {matrix.name}"
        )
    options = {"sep": "\t", "header": None, "dtype": str, "na_filter": False}
    genes, cells = pd.read_csv(genes_file, **options), pd.read_csv(cells_file, **options)[0]
    counts = sparse.csr_matrix(mmread(matrix).T)  # (cells, genes)
    if counts.shape != (len(cells), len(genes)):
        raise ValueError(
            f"{len(cells)} barcodes and {len(genes)} genes for a matrix of {counts.shape[0]} x {counts.shape[1]}"
        )
    kept = (genes[2] == "Gene Expression").to_numpy() if genes.shape[1] > 2 else np.ones(len(genes), bool)
    return make_cells(counts[:, kept], cells, genes.loc[kept, 1 if genes.shape[1] > 1 else 0])


NO_CELLS = {"chr", "start", "end", "strand", "length", "gene_id", "gene_name", "gene_symbol"}
COMMON_GENES = {"ACTB", "GAPDH", "B2M", "MALAT1", "RPLP0", "Actb", "Gapdh", "B2m", "Malat1", "Rplp0"}


def _read_table(path):
    """Read genes x cells, some rows at a time; the separator is that of the first line."""
    separator = find_separator(path)
    with _open_text(path) as file:
        header, first = next(csv.reader(file, delimiter=separator)), next(csv.reader(file, delimiter=separator))
    cells = pd.Index(header if len(header) < len(first) else header[1:])  # R leaves the corner out
    annotation = [name for name in cells if name.lower() in NO_CELLS]
    if annotation:
        raise ValueError(f"its columns {', '.join(annotation)} are no cells: drop them")
    if cells.has_duplicates:
        raise ValueError(f"its header names a cell twice ({cells[cells.duplicated()][0]}): rename one")
    options = {"header": None, "skiprows": 1, "index_col": 0, "dtype": {0: str}, "keep_default_na": False}
    blocks, genes = [], []
    with pd.read_csv(path, sep=separator, chunksize=1000, **options) as chunks:
        for chunk in chunks:
            text = [cells[i] for i in range(len(cells)) if not pd.api.types.is_numeric_dtype(chunk.iloc[:, i])]
            if text:
                raise ValueError(f"its column {text[0]} holds text where counts are due")
            blocks.append(sparse.csr_matrix(chunk.to_numpy(np.float32)))
            genes.extend(chunk.index)
    if all(gene.isdigit() for gene in genes):
        raise ValueError("its rows are numbered, where genes are named")
    rows_are_cells = sum(bool(BARCODE.search(name)) for name in genes) > len(genes) / 2
    if rows_are_cells or COMMON_GENES & set(cells) or sum(name.startswith("ENSG") for name in cells) > len(cells) / 2:
        raise ValueError("its rows are cells and its columns genes: write it the other way round, genes in rows")
    return make_cells(sparse.vstack(blocks, format="csr").T, cells, genes)


def find_separator(path: Path) -> str:
    """Return what stands between the names of a table's first line."""
    line = _first_line(path)
    separator = max("\t,; ", key=line.count)
    if not line.count(separator):
        raise ValueError("its first line has no tab, comma, semicolon or blank between names")
    return separator


def _open_text(path):
    return (gzip.open if path.name.endswith(".gz") else open)(path, "rt", newline="")


def _first_line(path):
    with _open_text(path) as file:
        return file.readline()


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


# R. A sparse matrix arrives as its slots; of a Seurat object only the counts and the cell table are converted, since
# rdata stops at its "commands".


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


def _read_r_matrix(path):
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
