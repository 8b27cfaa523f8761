"""Files of anndata."""

import gzip
import shutil
import tempfile
import warnings
from pathlib import Path

import anndata


def read_h5ad(path: Path, backed: bool = False) -> anndata.AnnData:
    """Read an ``.h5ad`` file, whatever its name."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*names are not unique")  # check_counts says it
        return anndata.read_h5ad(path, backed="r" if backed else None)


def read_gzipped_h5ad(path: Path) -> anndata.AnnData:
    """Read an ``.h5ad.gz`` file, unpacked beside the temporary files."""
    with tempfile.NamedTemporaryFile(suffix=".h5ad") as plain:
        with gzip.open(path, "rb") as packed:
            shutil.copyfileobj(packed, plain, 2**20)
        plain.flush()
        return read_h5ad(Path(plain.name))
