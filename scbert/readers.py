"""From the files that others published to cells x genes: R objects, 10x matrices, tables, h5ad.

A function ``read_<set>`` for each set of the catalogue takes its files, in the catalogue's order, and returns counts
with the source's own columns in `obs`; `scbert.datasets.load` does the rest.
"""

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

FORMATS = ".h5ad, .h5ad.gz, 10x .h5, .mtx or .tar.gz, .csv or .tsv (.gz), R .rds, .rda or .RData"


def read_cells(path: str | Path, backed: bool = False) -> anndata.AnnData:
    """Read cells from a file of any common format, by its name.

    Parameters
    ----------
    path
        ``.h5ad`` or ``.h5ad.gz``; 10x ``.h5``, a folder or ``.tar.gz`` with ``matrix.mtx``; ``.csv``, ``.tsv`` or
        ``.txt`` (gzipped or not) with genes in rows and cells in columns; R's ``.rds``, ``.rda`` or ``.RData`` with a
        sparse matrix of genes x cells or a Seurat object.
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
            return _read_h5ad(path, backed)
        if name.endswith(".h5ad.gz"):
            return _read_gzipped_h5ad(path)
        if name.endswith(".h5"):
            return _read_10x_h5(path)
        if name.endswith((".tar.gz", ".tgz")):
            return _read_10x_archive(path)
        if path.is_dir() or name.endswith((".mtx", ".mtx.gz")):
            return _read_10x_folder(path if path.is_dir() else path.parent)
        if name.endswith((".rds", ".rda", ".rdata")):
            return _read_r_matrix(path)
        if name.removesuffix(".gz").endswith((".csv", ".tsv", ".txt")):
            return _read_table(path)
    except (OSError, KeyError, AttributeError, TypeError, ValueError, EOFError, IndexError, tarfile.TarError) as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        kind = "an h5ad" if name.endswith((".h5ad", ".h5ad.gz")) else "a"
        kind = f"{kind} file" if kind != "a" else f"cells from a {''.join(path.suffixes[-2:]) or 'folder'}"
        raise ValueError(
            f"{path} cannot be read as {kind} ({reason[0][:200]}): is it another format, or damaged?"
        ) from None
    raise ValueError(f"{path} is of no format that is read here: {FORMATS}.")


def _read_h5ad(path, backed=False):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*names are not unique")  # check_counts says it
        return anndata.read_h5ad(path, backed="r" if backed else None)


def _read_gzipped_h5ad(path):
    with tempfile.NamedTemporaryFile(suffix=".h5ad") as plain:
        with gzip.open(path, "rb") as packed:
            shutil.copyfileobj(packed, plain, 2**20)
        plain.flush()
        return _read_h5ad(Path(plain.name))


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
        matrices = sorted(Path(folder).rglob("matrix.mtx*"))
        if len(matrices) != 1:
            raise ValueError(f"it holds {len(matrices)} files matrix.mtx where one is due")
        return _read_10x_folder(matrices[0].parent)


def _read_10x_folder(folder):
    """Read matrix.mtx, barcodes.tsv and genes.tsv or features.tsv, gzipped or not."""
    from scipy.io import mmread

    found = {path.name.removesuffix(".gz"): path for path in Path(folder).iterdir()}
    genes_file = found.get("features.tsv", found.get("genes.tsv"))
    missing = [name for name in ("matrix.mtx", "barcodes.tsv") if name not in found]
    if missing or genes_file is None:
        raise ValueError(f"the folder lacks {', '.join(missing or ['genes.tsv or features.tsv'])}")
    genes = pd.read_csv(genes_file, sep="\t", header=None, dtype=str)
    cells = pd.read_csv(found["barcodes.tsv"], sep="\t", header=None, dtype=str)[0]
    counts = sparse.csr_matrix(mmread(found["matrix.mtx"]).T)  # (cells, genes)
    kept = (genes[2] == "Gene Expression").to_numpy() if genes.shape[1] > 2 else np.ones(len(genes), bool)
    return make_cells(counts[:, kept], cells, genes.loc[kept, 1 if genes.shape[1] > 1 else 0])


def _read_table(path):
    """Read genes x cells; the separator is that of the first line."""
    table = pd.read_csv(path, index_col=0, sep="\t" if _first_line(path).count("\t") else ",")
    return make_cells(sparse.csr_matrix(table.to_numpy(np.float32)).T, table.columns, table.index)


def _first_line(path):
    with (gzip.open if path.name.endswith(".gz") else open)(path, "rt") as file:
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
    return make_cells(counts.T, obs.index, genes, _plain(obs))


def _attributes(node):
    """Return slot -> node of a parsed S4 object."""
    import rdata

    found, pair = {}, node.attributes
    while pair is not None and pair.info.type == rdata.parser.RObjectType.LIST:
        tag = pair.tag.referenced_object or pair.tag
        found[tag.value.value.decode()] = pair.value[0]
        pair = pair.value[1]
    return found


def _plain(table):
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


# The sets of the catalogue.


def read_pbmc68k_reduced(paths: list[Path]) -> anndata.AnnData:
    """Read scanpy's bundled file: natural log1p of counts per 10,000, rounded to three decimals, and the totals."""
    import scanpy

    source = scanpy.datasets.pbmc68k_reduced()
    counts = recover_counts(source.raw.X, source.obs["n_counts"].to_numpy(np.float64))
    obs = pd.DataFrame(
        {
            "label": source.obs["bulk_labels"],
            "batch": source.obs_names.str.rsplit("-", n=1).str[-1].astype("category"),  # the 10x well
            "n_counts": source.obs["n_counts"].astype(np.float64),
            "louvain": source.obs["louvain"],
        },
        index=source.obs_names.rename(None),
    )
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
    obs = _plain(read_r(paths[1])["pbmc_meta"]).loc[cells]
    counts = recover_counts(values.T, obs["nCount_RNA"].to_numpy(np.float64))
    obs = pd.DataFrame({"label": obs["classified"], "batch": "pbmc3k", "n_counts": obs["nCount_RNA"]})
    return make_cells(counts, cells, genes, obs)


def read_pbmc_3tech(paths: list[Path]) -> anndata.AnnData:
    """Read log-normalised values of selected genes, and the cell table with the totals over all."""
    values, genes, cells = to_sparse(read_r(paths[0])["pbmcs_exprs_small"])
    obs = _plain(read_r(paths[1])["pbmcs_meta_small"]).set_index("cell_id").loc[cells]
    counts = recover_counts(values.T, obs["nUMI"].to_numpy(np.float64))
    obs = pd.DataFrame({"label": obs["cell_type"], "batch": obs["donor"], "n_counts": obs["nUMI"]})
    return make_cells(counts, cells, genes, obs)


def read_pancreas_5tech(paths: list[Path]) -> anndata.AnnData:
    """Read a Seurat object of five technologies; `batch` is the technology."""
    adata = read_seurat(paths[0])
    adata.obs = pd.DataFrame(
        {"label": adata.obs["celltype"], "batch": adata.obs["tech"], "sample": adata.obs["orig.ident"]}
    )
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
    if np.abs(values.data - np.rint(values.data)).max(initial=0) > 0:
        values = recover_counts(values, None, base=2)
    obs = pd.DataFrame(index=adata.obs_names)
    if "celltype" in adata.obs:
        obs["label"] = adata.obs["celltype"].astype(str)
    obs["batch"] = "all"
    return make_cells(values, adata.obs_names, adata.var_names, obs)


def read_pancreas_scib(paths: list[Path]) -> anndata.AnnData:
    """Read the paper's four studies and four types out of the scIB file; `batch` is the study."""
    adata = read_cells(paths[0]) if paths[0].suffix == ".h5ad" else _read_h5ad(paths[0])
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
    separator = "\t" if _first_line(paths[1]).count("\t") else ","
    table = pd.read_csv(paths[1], sep=separator, dtype=str)
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
    if np.abs(values.data - np.rint(values.data)).max(initial=0) > 0:
        try:
            values = recover_counts(values, None, base=2)
        except ValueError:
            values = recover_counts(values, None)
    return make_cells(values, adata.obs_names, adata.var_names, obs)
