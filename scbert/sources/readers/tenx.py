"""The .h5 files of Cell Ranger."""

import warnings
from pathlib import Path

import anndata
import h5py

from .matrices import make_cells
from .names import find_rna
from .refusal import Refusal


def read_10x_h5(path: Path) -> anndata.AnnData:
    """Read an ``.h5`` file of Cell Ranger, of any version; a Refusal if it is of molecules, two genomes, or no genes."""
    import scanpy

    with h5py.File(path) as file:
        if {"umi", "barcode_idx"} <= set(file) or {"umi", "barcode"} <= set(file):
            raise Refusal(
                "it is Cell Ranger's table of molecules (molecule_info.h5): take filtered_feature_bc_matrix.h5, which stands "
                "beside it"
            )
        genomes = [key for key in file if isinstance(file[key], h5py.Group) and "indptr" in file[key]]
        features = file.get("matrix/features", {})
        if "feature_type" in features:
            find_rna(features["feature_type"].asstr()[:])
        if "genome" in features:
            genomes = sorted({genome for genome in features["genome"].asstr()[:] if genome})
    if len(genomes) > 1:
        raise Refusal(
            f"it holds two genomes, {' and '.join(genomes)}, whose names stand before the genes': keep the cells and genes of "
            f"one, by adata = scanpy.read_10x_h5({path.name!r}, genome={genomes[0]!r}), adata.var_names = "
            f"adata.var_names.str.replace('^{genomes[0]}_+', '', regex=True) and adata.write_h5ad('{genomes[0]}.h5ad')"
        )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*names are not unique")
        adata = scanpy.read_10x_h5(path)
    return make_cells(adata.X, adata.obs_names, adata.var_names, gene_ids=adata.var["gene_ids"])
