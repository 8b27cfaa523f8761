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
from .readers import r_objects as r
from .readers import read_cells
from .readers.h5ad import read_h5ad
from .readers.matrices import make_cells, recover_counts
from .readers.r_cells import read_seurat
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
    source, parts = r.take_apart(r.open_r(paths[0])["pbmc_facs"]), []
    symbols = r.read_frame(source["genes"]).set_index("ensembl")["symbol"]
    for counts, samples in (("counts", "samples"), ("counts_test", "samples_test")):
        matrix, cells, ensembl = r.read_matrix(source[counts])  # cells x genes here
        obs = pd.DataFrame({"label": r.read_frame(source[samples])["celltype"].astype(str).to_numpy()})
        obs["batch"] = [cell.split("-", 2)[2] for cell in cells]  # the run, one for each population
        obs["part"] = counts
        parts.append(make_cells(matrix, cells, symbols[ensembl], obs))
    return anndata.concat(parts)


def read_lognormalised(paths: list[Path]) -> anndata.AnnData:
    """Read log-normalised values and the table of cells beside them, which has each cell's total."""
    (values,), (table,) = (r.open_r(path).values() for path in paths)
    values, genes, cells = r.read_matrix(values)
    table = r.read_frame(table).rename(columns={"classified": "cell_type", "nCount_RNA": "nUMI"})
    table = (table.set_index("cell_id") if "cell_id" in table else table).loc[cells]
    obs = pd.DataFrame({"label": table["cell_type"], "batch": table.get("donor", "pbmc3k"), "n_counts": table["nUMI"]})
    return make_cells(recover_counts(values.T, table["nUMI"].to_numpy(np.float64)), cells, genes, obs)


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


def read_pool(paths: list[Path]) -> anndata.AnnData:
    """Read unlabelled cells, `batch` the file; a gene that a file lacks is 0 there, `n_counts` is the total within it."""
    parts = []
    for path in paths:
        part, batch = read_cells(path), path.name.split(".")[0]
        part = make_cells(part.X, [f"{batch}_{cell}" for cell in part.obs_names], part.var_names.str.strip(), part.obs)
        runs = part.obs["file"].str.extract(r"data/(\w+)_\d/")[0] if "file" in part.obs else batch
        part.obs = pd.DataFrame({"batch": runs}, index=part.obs_names)
        parts.append(part)
    adata = anndata.concat(parts, join="outer", fill_value=0)
    adata.obs["n_counts"] = np.asarray(adata.X.sum(1), np.float64).ravel()
    return adata


def read_whole_pool(paths: list[Path]) -> anndata.AnnData:
    """Read a pool as `read_pool` does, without the cells of under 200 genes, and those with fractional counts."""
    adata = read_pool(paths)
    fractional = np.asarray((adata.X.floor() != adata.X).sum(1)).ravel() > 0
    return adata[(adata.X.getnnz(1) >= 200) & ~fractional].copy()


def read_kang(paths: list[Path]) -> anndata.AnnData:
    """Read both conditions, of the cells that have a label (by RISC's authors) and a donor (by demuxlet), the batch."""
    adata = _read_conditions(paths[:2], paths[3:])
    table = pd.read_csv(paths[2], sep="\t", dtype=str)
    cells = table["Set"].map({"IFN-": "ctrl", "IFN+": "stim"}) + "_" + table["scBarcode"]
    labels = table["Type0"].str.replace(r"^IFN[+-] ", "", regex=True).set_axis(cells)
    adata.obs.insert(0, "label", labels.reindex(adata.obs_names))
    return adata[adata.obs["label"].notna() & adata.obs["batch"].notna()].copy()


def read_kang_extra(paths: list[Path]) -> anndata.AnnData:
    """Read the cells of the same experiment that `read_kang` has not, with a donor and 200 genes or more; no labels."""
    adata, others = _read_conditions(paths[:2], paths[2:4]), _read_conditions(paths[4:], paths[2:4])
    kept = ~adata.obs_names.isin(others.obs_names) & adata.obs["batch"].notna() & (adata.X.getnnz(1) >= 200)
    adata.obs["n_counts"] = np.asarray(adata.X.sum(1), np.float64).ravel()
    return adata[kept].copy()


def _read_conditions(paths, calls):
    """Return the cells of both conditions, named <condition>_<barcode>, with their donor where demuxlet tells one."""
    parts = []
    for condition, path, call in zip(("ctrl", "stim"), paths, calls, strict=True):
        adata, table = read_h5ad(path), pd.read_csv(call, sep="\t", dtype=str).set_index("BARCODE")
        barcodes = adata.obs_names.str.removeprefix(condition).str.replace(".", "-", regex=False)
        donors = table["SNG.1ST"][table["BEST"].str.startswith("SNG-")].reindex(barcodes)
        obs = pd.DataFrame({"batch": donors.to_numpy(), "condition": condition})
        parts.append(make_cells(adata.X, f"{condition}_" + barcodes, adata.var_names, obs))
    return anndata.concat(parts)


def read_kang_labelled(paths: list[Path]) -> anndata.AnnData:
    """Read a piece of the same experiment that others labelled, its cells named as in `read_kang`."""
    adata = read_cells(paths[0])
    label, condition = ("cluster_id", "group_id") if "cluster_id" in adata.obs else ("seurat_annotations", "stim")
    condition = adata.obs[condition].astype(str).str.lower()
    cells = condition.str.cat(adata.obs_names.str.replace(".", "-", regex=False), "_")
    obs = pd.DataFrame(
        {"label": adata.obs[label].astype(str), "batch": adata.obs.get("sample_id", condition).astype(str)}
    )
    obs["condition"] = condition
    return make_cells(adata.X, cells, adata.var_names, obs)


def read_geact_organs(paths: list[Path]) -> anndata.AnnData:
    """Read a matrix and a cell table of each organ, the batch; genes that an organ's file lacks are 0 there."""
    parts = []
    for matrix, path in zip(paths[::2], paths[1::2], strict=True):
        part, organ = read_cells(matrix), matrix.parts[-5].split("_", 1)[1]
        table = pd.read_csv(path, sep="\t", dtype=str).set_index("cell").loc[part.obs_names]
        part.obs = pd.DataFrame({"label": table["ident"], "batch": organ, "plate": table["batch"]})
        parts.append(part)
    return anndata.concat(parts, join="outer", fill_value=0)


def read_zheng_pbmc14k(paths: list[Path]) -> anndata.AnnData:
    """Read log2(1 + counts per million), without the cells whose barcode `zheng_facs` has; `n_counts` is nUMI."""
    slots = r.find_slots(r.open_r(paths[0])["pbmc14k_expression.eset"])
    values, genes, cells = r.read_matrix(r.take_apart(slots["assayData"])["exprs"])
    table = r.read_frame(r.find_slots(slots["phenoData"])["data"]).loc[cells]
    obs = pd.DataFrame({"label": table["trueLabel_full"], "batch": "all", "n_counts": table["nUMI"]})
    adata = make_cells(recover_counts(values.T, None, base=2), cells, genes, obs)
    return adata[~adata.obs_names.str[:14].isin(read_zheng_facs(paths[1:]).obs_names.str[:14])].copy()


def read_heart_1k(paths: list[Path]) -> anndata.AnnData:
    """Read 1,000 variable genes and the totals over all; `batch` is the donor."""
    adata = read_h5ad(paths[0])
    columns = {"cell_type": "label", "donor": "batch", "n_counts": "n_counts", "source": "source", "sample": "sample"}
    obs = adata.obs[list(columns)].rename(columns=columns)
    return make_cells(adata.X, adata.obs_names, adata.var_names, obs.astype({"n_counts": np.float64}))


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
