"""The sets of the catalogue, from the files that their authors published.

A function ``read_<set>`` takes a set's files, in the catalogue's order, and returns counts with the source's own columns
in `obs`; `scbert.datasets.load` does the rest.
"""

import warnings
from importlib.util import find_spec
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
from scipy import sparse

from ..data.counts import is_whole
from .readers import read_cells
from .readers.h5ad import read_h5ad
from .readers.matrices import make_cells, recover_counts
from .readers.r_cells import read_seurat
from .readers.r_objects import make_plain, read_r, to_sparse
from .readers.tables import find_separator


def read_pbmc68k_reduced(paths: list[Path]) -> anndata.AnnData:
    """Read scanpy's bundled file: natural log1p of counts per 10,000, rounded to three decimals, and the totals."""
    # By its path: importing scanpy, which has numba, takes ten times as long as reading the file that comes with it.
    file = Path(find_spec("scanpy").origin).parent / "datasets" / "10x_pbmc68k_reduced.h5ad"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the old form of the file, which is the same for ever
        source = anndata.read_h5ad(file)
    counts = recover_counts(source.raw.X, source.obs["n_counts"].to_numpy(np.float64))
    obs = source.obs[["bulk_labels", "n_counts", "louvain"]].rename(columns={"bulk_labels": "label"}).rename_axis(None)
    obs.insert(1, "batch", source.obs_names.str.rsplit("-", n=1).str[-1].astype("category"))  # the 10x well
    obs["n_counts"] = obs["n_counts"].astype(np.float64)
    var = pd.DataFrame(index=source.raw.var_names.rename(None))
    return anndata.AnnData(counts, obs=obs, var=var, obsm={"X_umap": source.obsm["X_umap"]})


def read_zheng_facs(paths: list[Path]) -> anndata.AnnData:
    """Read both parts of fastTopics' file, 3,774 and 100 cells; genes are named by symbol, 9 repeats summed."""
    source = read_r(paths[0])["pbmc_facs"]
    parts = []
    for counts, samples in (("counts", "samples"), ("counts_test", "samples_test")):
        matrix, cells, ensembl = to_sparse(source[counts])  # cells x genes here
        genes = source["genes"].set_index("ensembl").loc[ensembl, "symbol"]
        table = source[samples]
        obs = pd.DataFrame({"label": table["celltype"].astype(str).to_numpy()})
        obs["batch"] = [cell.split("-", 2)[2] for cell in cells]  # the run, one for each population
        obs["part"] = counts
        parts.append(make_cells(matrix, cells, genes, obs))
    return anndata.concat(parts)


def read_pbmc3k(paths: list[Path]) -> anndata.AnnData:
    """Read log-normalised values and the cell table beside them."""
    values, genes, cells = to_sparse(read_r(paths[0])["pbmc_matrix"])
    obs = make_plain(read_r(paths[1])["pbmc_meta"]).loc[cells]
    counts = recover_counts(values.T, obs["nCount_RNA"].to_numpy(np.float64))
    obs = pd.DataFrame({"label": obs["classified"], "batch": "pbmc3k", "n_counts": obs["nCount_RNA"]})
    return make_cells(counts, cells, genes, obs)


def read_pbmc_3tech(paths: list[Path]) -> anndata.AnnData:
    """Read log-normalised values of selected genes, and the cell table with the totals over all."""
    values, genes, cells = to_sparse(read_r(paths[0])["pbmcs_exprs_small"])
    obs = make_plain(read_r(paths[1])["pbmcs_meta_small"]).set_index("cell_id").loc[cells]
    counts = recover_counts(values.T, obs["nUMI"].to_numpy(np.float64))
    obs = pd.DataFrame({"label": obs["cell_type"], "batch": obs["donor"], "n_counts": obs["nUMI"]})
    return make_cells(counts, cells, genes, obs)


def read_pancreas_5tech(paths: list[Path]) -> anndata.AnnData:
    """Read a Seurat object of five technologies; `batch` is the technology."""
    adata = read_seurat(paths[0])
    columns = {"celltype": "label", "tech": "batch", "orig.ident": "sample"}
    adata.obs = adata.obs[list(columns)].rename(columns=columns)
    return adata


def read_baron_mini(paths: list[Path]) -> anndata.AnnData:
    """Read a Seurat object of human and mouse cells, repeats dropped; `batch` is the donor or animal.

    The file fills up its mouse stellate cells to 35 with repeats of the same cells: 22 of them, dropped here.
    """
    adata = read_seurat(paths[0])
    adata = adata[~adata.obs_names.str.contains(r"\.\d+$")].copy()
    adata.obs = pd.DataFrame({"label": adata.obs["Group"], "batch": adata.obs["Sample"], "species": adata.obs["Batch"]})
    return adata


def read_pbmc_pool(paths: list[Path]) -> anndata.AnnData:
    """Read five matrices of counts; a gene that a file lacks is 0 there, `n_counts` is the total within the file."""
    parts = []
    for path in paths:
        source = read_r(path)
        matrix, rows, columns = to_sparse(next(iter(source.values())) if isinstance(source, dict) else source)
        if path.name.startswith("pbmc.rna"):  # cells x genes; the others are genes x cells
            matrix, rows, columns = matrix.T, columns, rows
        batch = path.name.split(".")[0]
        part = make_cells(matrix.T, [f"{batch}_{cell}" for cell in columns], rows)
        part.obs["batch"] = batch
        parts.append(part)
    adata = anndata.concat(parts, join="outer", fill_value=0)
    adata.obs["n_counts"] = np.asarray(adata.X.sum(1), np.float64).ravel()
    return adata


def read_zheng68k(paths: list[Path]) -> anndata.AnnData:
    """Read 10x's matrix and the published table of labels, matched by barcode."""
    adata = read_cells(paths[0])
    table = pd.read_csv(paths[1], sep="\t", dtype=str)
    table.columns = [name.strip().lower() for name in table.columns]
    barcode = "barcodes" if "barcodes" in table else "barcode"
    adata.obs["label"] = table.set_index(barcode)["celltype"].reindex(adata.obs_names)
    adata.obs["batch"] = [name.rsplit("-", 1)[-1] for name in adata.obs_names]  # the 10x well
    return adata


def read_published_h5ad(paths: list[Path]) -> anndata.AnnData:
    """Read a file of the scBERT authors: log2(1 + CP10K) over the 16,906 genes, or counts."""
    adata = read_cells(paths[0])
    values = sparse.csr_matrix(adata.X)
    if not is_whole(values):
        values = recover_counts(values, None, base=2)
    obs = pd.DataFrame(index=adata.obs_names)
    if "celltype" in adata.obs:
        obs["label"] = adata.obs["celltype"].astype(str)
    obs["batch"] = "all"
    return make_cells(values, adata.obs_names, adata.var_names, obs)


def read_pancreas_scib(paths: list[Path]) -> anndata.AnnData:
    """Read the paper's four studies and four types out of the scIB file; `batch` is the study."""
    adata = read_h5ad(paths[0])  # a file without a suffix
    tech = adata.obs["tech"].astype(str)
    studies = {"celseq2": "Muraro", "smartseq2": "Segerstolpe", "smarter": "Xin"}
    studies |= {name: "Baron" for name in set(tech) if name.startswith("inDrop")}
    kept = (tech.isin(list(studies)) & adata.obs["celltype"].isin(["alpha", "beta", "delta", "gamma"])).to_numpy()
    obs = pd.DataFrame({"label": adata.obs["celltype"].astype(str), "batch": tech.map(studies)})[kept]
    return make_cells(sparse.csr_matrix(adata.layers["counts"])[kept], obs.index, adata.var_names, obs)


def read_by_hand(paths: list[Path]) -> anndata.AnnData:
    """Read a matrix and a table of its cells that the user downloaded: barcode, label and, if there, batch.

    Log-normalised values are turned back into counts where each cell's values are multiples of its smallest.
    """
    adata = read_cells(paths[0])
    table = pd.read_csv(paths[1], sep=find_separator(paths[1]), dtype=str)
    table.columns = [str(name).strip() for name in table.columns]
    cell = next((name for name in ("cell", "CellName", "barcode", "barcodes") if name in table), table.columns[0])
    label = next((name for name in ("cell_type", "Cluster", "celltype", "label") if name in table), None)
    if label is None:
        raise ValueError(f"{paths[1]} has no column cell_type; it has: {', '.join(table.columns)}.")
    table = table.set_index(cell).reindex(adata.obs_names)
    if table[label].isna().any():
        raise ValueError(f"{paths[1]} has no label for {int(table[label].isna().sum())} of the {adata.n_obs} cells.")
    obs = pd.DataFrame({"label": table[label], "batch": table.get("batch", "all")})
    values = sparse.csr_matrix(adata.X)
    if not is_whole(values):
        try:
            values = recover_counts(values, None, base=2)
        except ValueError:
            values = recover_counts(values, None)
    return make_cells(values, adata.obs_names, adata.var_names, obs)
