"""From a file of any common format to cells x genes: h5ad, 10x and other pipelines, tables, R objects, whole series.

A reader is a module for each family of formats; what all share is in `matrices` and `names`.
"""

import contextlib
import os
import signal
import sys
import tempfile
import time
import warnings
from pathlib import Path

import anndata

from ...paths import first_line
from . import matrices, mtx, r_cells, samples, stores, tables, tenx
from .h5ad import read_gzipped_h5ad, read_h5ad
from .names import find_rna
from .refusal import Refusal

SECONDS = 60  # to read a file, and one more a megabyte, before it is given up
FORMATS = (
    ".h5ad, .h5ad.gz, 10x .h5, .mtx with its names, .csv or .tsv (.gz), R .rds, .rda or .RData, .h5mu, .loom, .zarr, "
    "or a folder, .tar, .tar.gz or .zip of them"
)

CONVERTED = {
    ".h5seurat": "of SeuratDisk: in R, saveRDS(SeuratDisk::LoadH5Seurat(FILE), 'cells.rds')",
    ".qs .qs2": "of R's qs: in R, saveRDS(qs::qread(FILE), 'cells.rds'), or qs2::qs_read",
    ".xlsx .xls": "a spreadsheet (its dates were genes): pandas.read_excel(FILE).to_csv('cells.csv')",
    ".parquet .feather": "of pandas: pandas.read_parquet(FILE).to_csv('cells.csv'), or read_feather",
    ".pkl .pickle .joblib": "a pickle, which can run anything: load it where it is from, and write_h5ad('cells.h5ad')",
    ".npz .npy": "a matrix without names: anndata.AnnData(MATRIX, obs, var).write_h5ad('cells.h5ad')",
    ".cloupe": "of 10x's Loupe Browser: take filtered_feature_bc_matrix.h5, which the same run wrote",
    ".st .st.gz": "of BD Rhapsody, a row a cell and gene: take *_MolsPerCell.csv, which the same run wrote",
    "quants_mat.gz": "of salmon alevin, in its own binary form: run alevin-fry, or alevin with --dumpMtx",
    ".bam .fastq .fastq.gz": "of sequences, no counts: take what Cell Ranger, STARsolo or bustools makes of it",
}
"""Formats that are known and not read, and the line that makes them one that is."""


def read_cells(path: str | Path, backed: bool = False, *, round_counts: bool = False) -> anndata.AnnData:
    """Read cells from a file of any common format, by its name and by what it holds.

    Parameters
    ----------
    path
        - ``.h5ad`` or ``.h5ad.gz``; ``.zarr``; the RNA of an ``.h5mu``; ``.loom``;
        - 10x ``.h5``; a matrix (``.mtx``) with its names, or its folder: of Cell Ranger, STARsolo, kallisto|bustools,
          alevin-fry or Parse;
        - ``.csv``, ``.tsv`` or ``.txt`` (gzipped or not) with genes in rows, or cells where their names show it; also of
          featureCounts and BD Rhapsody;
        - R's ``.rds``, ``.rda`` or ``.RData``: a Seurat object (its active assay of RNA), a SingleCellExperiment or
          SummarizedExperiment, or a matrix of genes x cells;
        - a folder, ``.tar``, ``.tar.gz`` or ``.zip`` of these: of one, or of several samples, as a GEO series has them,
          joined on all their genes, with the sample in ``obs["batch"]`` and a cell's total in ``obs["n_counts"]``.

        Counts of genes of one name are summed, but in ``.h5ad`` and its like. Identifiers that stand beside names are
        kept in ``var["gene_ids"]``; features that are no genes are left out. What was chosen is printed.
    backed
        Leave the matrix on disk (``.h5ad`` only), as it is.
    round_counts
        Round estimated or corrected counts to whole numbers. What is within rounding of one always is.

    A ValueError for another format, a damaged file, or one that does not say which counts are meant.
    """
    path = Path(path)
    try:
        adata = _leave_out_features(_read(path, backed), path.name)
        matrices.round_counts(adata, path.name, round_counts)
        return adata
    except Refusal as error:
        is_unknown = str(error).endswith(FORMATS)
        raise ValueError(f"{path} is {'' if is_unknown else 'not read: '}{error}.") from None
    except BlockingIOError:
        raise ValueError(f"{path} is held open by another program: close it there, or copy the file.") from None
    except MemoryError:
        raise
    except Exception as error:  # damage shows as one of many types: of zlib, h5py, anndata, csv, tarfile, ...
        kind = "an h5ad file" if ".h5ad" in path.name else f"cells from a {''.join(path.suffixes[-2:]) or 'folder'}"
        raise ValueError(
            f"{path} cannot be read as {kind} ({first_line(error)[:300]}): is it another format, or damaged?"
        ) from None


def _read(path, backed):
    name = path.name.lower()
    plain = name.removesuffix(".gz")
    for ends, what in CONVERTED.items():
        if name.endswith(tuple(ends.split())):
            raise Refusal(f"it is {what}".replace("FILE", repr(path.name)))
    if name.endswith(".h5ad.gz"):
        return read_gzipped_h5ad(path)
    if name.endswith((".h5ad", ".h5", ".hdf5", ".h5mu", ".loom")):
        return _read_hdf5(path, backed) if backed else _rehearse(_read_hdf5, path, backed)
    if path.is_dir():
        is_zarr = (path / ".zgroup").exists() or (path / "zarr.json").exists()
        return stores.read_zarr(path) if is_zarr else _read_samples(path, path.name)
    if name.endswith(samples.ARCHIVES):
        with tempfile.TemporaryDirectory() as folder:
            samples.unpack(path, Path(folder))
            return _read_samples(Path(folder), path.name)
    if plain.endswith(".mtx"):
        return _rehearse(mtx.read_mtx, path)
    if name.endswith((".rds", ".rda", ".rdata", ".robj")):
        return r_cells.read_r_cells(path)
    if plain.endswith((".csv", ".tsv", ".txt")):
        return tables.read_table(path)
    raise Refusal(f"of no format that is read here: {FORMATS}")


def _rehearse(read, path, *more):
    """Read in a process of its own first, and then here: what is damaged can crash, or hold up, the library that reads it."""
    if sys.platform != "linux":  # elsewhere a process can't be doubled safely
        return read(path, *more)
    seconds = SECONDS + path.stat().st_size / 10**6
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore", DeprecationWarning
        )  # of threads beside the fork: the child does nothing but read
        child = os.fork()
    if not child:
        with contextlib.suppress(BaseException):  # the same error comes here
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            os.dup2(1, 2)
            read(path, *more)
        os._exit(0)
    end, pause = time.monotonic() + seconds, 0.001
    while not (found := os.waitpid(child, os.WNOHANG))[0]:
        if time.monotonic() > end:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            raise Refusal(
                f"the library that reads it did not end within {seconds:.0f} seconds: it is damaged, most likely"
            )
        time.sleep(pause := min(0.05, 1.5 * pause))
    if os.WIFSIGNALED(found[1]):
        why = "for want of memory" if os.WTERMSIG(found[1]) == signal.SIGKILL else "since it is damaged"
        raise Refusal(f"reading it ends the program ({signal.Signals(os.WTERMSIG(found[1])).name}), most likely {why}")
    return read(path, *more)


def _read_hdf5(path, backed):
    kind = stores.find_kind(path)
    if kind == "mudata":
        return stores.read_mudata(path)
    if kind == "loom":
        return stores.read_loom(path)
    is_h5ad = kind == "h5ad" or path.name.lower().endswith(".h5ad")  # older ones may lack a part
    return read_h5ad(path, backed) if is_h5ad else tenx.read_10x_h5(path)


def _read_samples(folder, name):
    found = {}
    for sample, path in samples.find_samples(folder).items():
        try:
            found[sample] = _leave_out_features(_read(path, False), path.name)
        except Refusal as error:
            raise Refusal(f"of {path.relative_to(folder)}: {error}") from None
    return found[""] if list(found) == [""] else samples.join_samples(found, name)


def _leave_out_features(adata, name):
    """Return the genes of a file that says of its features which are none."""
    column = next((key for key in ("feature_types", "feature_type") if key in adata.var), None)
    kept = find_rna(adata.var[column]) if column else None
    if kept is None:
        return adata
    others = ", ".join(dict.fromkeys(adata.var[column][~kept].astype(str)))
    print(f"{name}: {(~kept).sum():,} features that are no genes ({others}) are left out.")
    return adata[:, kept] if adata.isbacked else adata[:, kept].copy()
