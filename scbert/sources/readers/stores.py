"""HDF5 and zarr stores of other tools: what they are, and the cells of MuData, loom and zarr."""

from pathlib import Path

import anndata
import h5py
import pandas as pd
from scipy import sparse

from .matrices import make_cells
from .names import find_ids
from .refusal import Refusal

ROWS_AT_ONCE = 500  # of a loom's genes
CELL_NAMES = ["CellID", "obs_names", "cell_names", "cell_id", "barcode", "Barcode", "index"]
GENE_NAMES = ["Gene", "gene_names", "var_names", "gene", "Symbol", "gene_symbol", "gene_short_name", "Accession"]


def find_kind(path: Path) -> str:
    """Return what an HDF5 file holds, whatever its name: "loom", "mudata", "h5ad", or "10x" for anything else."""
    with h5py.File(path) as file:
        if file.attrs.get("encoding-type") == "MuData" or {"mod", "obs"} <= set(file):
            return "mudata"
        if {"matrix", "row_attrs", "col_attrs"} <= set(file):
            return "loom"
        return "h5ad" if {"X", "obs", "var"} <= set(file) else "10x"


def read_mudata(path: Path) -> anndata.AnnData:
    """Read the RNA of a MuData file, with the columns of cells that all modalities share.

    Raises a Refusal if there are several modalities and none is called rna.
    """
    with h5py.File(path) as file:
        names = list(file["mod"])
        called = [name for name in names if name.lower() in ("rna", "gex", "gene expression")]
        if len(names) != 1 and len(called) != 1:
            raise Refusal(
                f"it is MuData with the modalities {', '.join(names)}, and none is called rna: "
                f"mudata.read({path.name!r}).mod[NAME].write_h5ad('rna.h5ad')"
            )
        name = (called or names)[0]
        adata, shared = anndata.io.read_elem(file["mod"][name]), anndata.io.read_elem(file["obs"])
    print(f"{path.name}: the modality {name} is read, of {', '.join(names)}.")
    adata.obs = adata.obs.join(shared[[key for key in shared if key not in adata.obs and ":" not in key]])
    return adata


def read_loom(path: Path) -> anndata.AnnData:
    """Read the main layer of a loom file, genes in rows, some at a time; a Refusal if its cells or genes have no names."""
    with h5py.File(path) as file:
        matrix = file["matrix"]
        genes, obs = _read_attributes(file["row_attrs"]), _read_attributes(file["col_attrs"])
        starts = range(0, matrix.shape[0], ROWS_AT_ONCE)
        counts = sparse.vstack([sparse.csr_matrix(matrix[i : i + ROWS_AT_ONCE]) for i in starts], format="csr").T
    cell = next((name for name in CELL_NAMES if name in obs), None)
    gene = next((name for name in GENE_NAMES if name in genes), None)
    if cell is None or gene is None:
        raise Refusal(
            f"it is a loom file whose cells ({', '.join(obs)}) or genes ({', '.join(genes)}) have no attribute CellID or Gene"
        )
    ids = find_ids(genes[gene], genes.drop(columns=gene))
    return make_cells(counts, obs[cell].astype(str), genes[gene].astype(str), obs.drop(columns=cell), ids)


def _read_attributes(group):
    """Return the attributes of a loom's cells or genes that are one value each, as columns."""
    flat = {key: values for key, values in group.items() if values.ndim == 1}
    return pd.DataFrame({key: v.asstr()[:] if v.dtype.kind in "SO" else v[:] for key, v in flat.items()})


def read_zarr(path: Path) -> anndata.AnnData:
    """Read a zarr store of anndata; a Refusal if it is one of SpatialData or MuData, which holds several."""
    for inner, what in (("tables", "SpatialData"), ("mod", "MuData")):
        if (path / inner).is_dir() and not (path / "X").exists():
            held = ", ".join(sorted(part.name for part in (path / inner).iterdir() if part.is_dir()))
            raise Refusal(f"it is a store of {what}: name the folder of its cells, {path.name}/{inner}/NAME ({held})")
    return anndata.read_zarr(path)
