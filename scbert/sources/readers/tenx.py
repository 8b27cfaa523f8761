"""10x: h5, and matrix.mtx with its two tables, in a folder or an archive."""

import tarfile
import tempfile
import warnings
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
from scipy import sparse

from .matrices import make_cells


def read_10x_h5(path: Path) -> anndata.AnnData:
    """Read an ``.h5`` file of Cell Ranger."""
    import scanpy

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*names are not unique")
        adata = scanpy.read_10x_h5(path)
    return make_cells(adata.X, adata.obs_names, adata.var_names)


def read_10x_archive(path: Path) -> anndata.AnnData:
    """Read a ``.tar.gz`` archive that holds one matrix.mtx with its tables."""
    with tempfile.TemporaryDirectory() as folder:
        with tarfile.open(path) as archive:
            archive.extractall(folder, filter="data")
        return read_10x_files(find_matrix(Path(folder), "**/*matrix.mtx*"))


def find_matrix(folder: Path, pattern: str = "*matrix.mtx*") -> Path:
    """Return the one matrix.mtx, gzipped or not, in a folder; a ValueError if there is none or several."""
    matrices = sorted(folder.glob(pattern))
    if len(matrices) != 1:
        raise ValueError(f"it holds {len(matrices)} files matrix.mtx where one is due")
    return matrices[0]


def read_10x_files(matrix: Path) -> anndata.AnnData:
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
