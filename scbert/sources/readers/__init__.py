"""From a file of any common format to cells x genes: h5ad, 10x matrices, tables, R objects."""

import tarfile
from pathlib import Path

import anndata

from ...paths import first_line
from .h5ad import read_gzipped_h5ad, read_h5ad
from .r_objects import read_r_matrix
from .tables import read_table
from .tenx import find_matrix, read_10x_archive, read_10x_files, read_10x_h5

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
            return read_gzipped_h5ad(path)
        if name.endswith(".h5"):
            return read_10x_h5(path)
        if name.endswith((".tar.gz", ".tgz")):
            return read_10x_archive(path)
        if path.is_dir() or name.endswith((".mtx", ".mtx.gz")):
            return read_10x_files(find_matrix(path) if path.is_dir() else path)
        if name.endswith((".rds", ".rda", ".rdata")):
            return read_r_matrix(path)
        if name.removesuffix(".gz").endswith((".csv", ".tsv", ".txt")):
            return read_table(path)
    except (OSError, KeyError, AttributeError, TypeError, ValueError, EOFError, IndexError, tarfile.TarError) as error:
        kind = "an h5ad file" if ".h5ad" in name else f"cells from a {''.join(path.suffixes[-2:]) or 'folder'}"
        raise ValueError(
            f"{path} cannot be read as {kind} ({first_line(error)[:300]}): is it another format, or damaged?"
        ) from None
    raise ValueError(f"{path} is of no format that is read here: {FORMATS}.")
