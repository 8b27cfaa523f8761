"""Files of anndata."""

import gzip
import shutil
import tempfile
import warnings
from pathlib import Path

import anndata
import h5py

NEEDED, REST = ("X", "obs", "var"), ("layers", "obsm", "uns")


def read_h5ad(path: Path, backed: bool = False) -> anndata.AnnData:
    """Read an ``.h5ad`` file, whatever its name; of one with a part that this anndata can't read, the rest."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*names are not unique")  # check_counts says it
        warnings.filterwarnings(
            "ignore", message=".*without encoding metadata"
        )  # by an older anndata, and read as well
        try:
            return anndata.read_h5ad(path, backed="r" if backed else None)
        except (OSError, MemoryError):
            raise
        except Exception:  # one of many types, such as a name with a slash, which older versions wrote
            if backed:
                raise
            return _read_parts(path)


def _read_parts(path):
    parts, left_out = {}, []
    with h5py.File(path) as file:
        for key in NEEDED:
            parts[key] = anndata.io.read_elem(file[key])
        for key in REST:
            parts[key] = {}
            for name, part in file.get(key, {}).items():
                try:
                    value = anndata.io.read_elem(part)
                except Exception:  # one of many types
                    value = None
                if value is None or (key != "uns" and len(getattr(value, "shape", ())) < 2):
                    left_out.append(f"{key}[{name!r}]")
                else:
                    parts[key][name] = value
    print(
        f"{path.name}: anndata can't read {', '.join(left_out) or 'a part'}: left out, with what is beside X, obs and obsm."
    )
    return anndata.AnnData(**parts)


def read_gzipped_h5ad(path: Path) -> anndata.AnnData:
    """Read an ``.h5ad.gz`` file, unpacked beside the temporary files."""
    with tempfile.NamedTemporaryFile(suffix=".h5ad") as plain:
        with gzip.open(path, "rb") as packed:
            shutil.copyfileobj(packed, plain, 2**20)
        plain.flush()
        return read_h5ad(Path(plain.name))
