"""Several samples in one folder or archive, as GEO hands out a series: which they are, and all of them in one."""

import gzip
import re
import tarfile
import zipfile
from pathlib import Path

import anndata
import numpy as np

from .mtx import find_matrices, find_names
from .names import GENOME, join_distinct
from .refusal import Refusal

ARCHIVES = (".tar", ".tar.gz", ".tgz", ".zip")
ENDS = re.compile(r"(\.(mtx|h5|h5ad|loom|rds|rda|rdata|robj|csv|tsv|txt|tar|tgz|zip|gz))+$", re.I)
NO_COUNTS = re.compile(r"meta.?data|annot|barcodes|features|genes|cell.?types?|clusters?", re.I)
RAW = re.compile(r"(un)?filtered_?|raw_?", re.I)
OF_PIPELINE = re.compile(
    r"[_.-]*(count_matrix|matrix|DGE|cells_x_genes|quants_mat)?((un)?filtered|raw)?[_.-]?((feature|gene)_bc_matri(x|ces)"
    r"([_.-]h5)?)?$",
    re.I,
)
"""What pipelines call a matrix: before it stands the name of the sample."""


def unpack(path: Path, folder: Path) -> None:
    """Unpack a .tar, .tar.gz or .zip into a folder, read to its end: there is the checksum of what was unpacked."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            archive.extractall(folder)
        return
    with open(path, "rb") as file:
        is_gzipped = file.read(2) == b"\x1f\x8b"
    with (gzip.open if is_gzipped else open)(path, "rb") as stream:
        with tarfile.open(fileobj=stream, mode="r|") as archive:
            archive.extractall(folder, filter="data")
        while stream.read(2**20):
            pass


def find_samples(folder: Path) -> dict[str, Path]:
    """Return name -> file of each sample in a folder, or in the folders in it; one whose name is "" if there is but one.

    Samples are matrices with their names beside them and .h5 files, and what else has a name that begins with GSM.
    Of what Cell Ranger wrote twice, raw and filtered, the filtered one is taken. Raises a Refusal if there is none, or
    if there are several that have no names of their own, share their cells, or are genomes.
    """
    runs, names = {}, {path: str(path.relative_to(folder)) for path in _find_files(folder)}
    for path in sorted(names, key=lambda path: bool(re.search("raw|unfiltered", names[path], re.I))):
        runs.setdefault(RAW.sub("", names[path]), path)
    paths = sorted(runs.values())
    if len(paths) == 1:
        return {"": paths[0]}
    parts = [[*p.relative_to(folder).parts[:-1], OF_PIPELINE.sub("", ENDS.sub("", p.name))] for p in paths]
    names = ["_".join(x for x in own if x and not all(x in other for other in parts)) for own in parts]
    tables = [found[1] for found in map(find_names, paths) if found]
    if paths and all(GENOME.match(f"{name.rsplit('_', 1)[-1]}_x") for name in names):
        raise Refusal(
            f"it holds the genomes {' and '.join(names)}: name the folder of one, such as {paths[0].parent.name}"
        )
    if len(set(tables)) < len(tables):
        raise Refusal(f"it holds several matrices of the same cells ({', '.join(p.name for p in paths)}): name one")
    if not paths or not all(names) or len(set(names)) < len(names):
        raise Refusal(
            f"it holds {len(paths)} files matrix.mtx where one is due, or several with the names of samples before theirs, such "
            "as GSM1_matrix.mtx.gz; or .h5 files; or tables whose names begin with GSM"
        )
    return dict(zip(names, paths, strict=True))


def _find_files(folder):
    """Return the samples of a folder, or those of the folders in it; of each GSM number the files that are counts."""
    own = [path for path in sorted(folder.iterdir()) if path.name[0] not in "._"]
    matrices, ranked = set(find_matrices(folder)), {}
    for path in own:
        number = (re.match(r"GSM\d+", path.name) or [None])[0]
        if path in matrices or (path.suffix == ".h5" and not path.name.endswith("molecule_info.h5")):
            ranked.setdefault(number, {}).setdefault(0, []).append(path)
        elif number and path.is_file() and ENDS.search(path.name):
            rank = 1 if path.name.lower().endswith(ARCHIVES) else 2
            ranked.setdefault(number, {}).setdefault(rank, []).append(path)
    best = [ranks[min(ranks)] for ranks in ranked.values()]  # matrices, else archives, else tables and the like
    found = [p for paths in best for p in paths if len(paths) == 1 or p in matrices or not NO_COUNTS.search(p.name)]
    readable = [path for path in own if path.is_file() and ENDS.search(path.name)]
    if not found and len(readable) == 1:
        return readable
    inner = [path for path in own if path.is_dir() and (not found or path.name.startswith("GSM"))]
    return found + [file for path in inner for file in _find_files(path)]


def join_samples(samples: dict[str, anndata.AnnData], name: str) -> anndata.AnnData:
    """Join samples into one, on all genes that any of them has: what a sample does not list is 0 there.

    The union, since tables leave out genes without counts, and since a model's genes are to be found where a sample has
    them. A cell's name begins with its sample's, which is ``obs["batch"]``; ``obs["n_counts"]`` is its total in the
    sample. Raises a Refusal if a sample shares no gene with the first.
    """
    genes = [set(sample.var_names) for sample in samples.values()]
    apart = [batch for batch, own in zip(samples, genes, strict=True) if not own & genes[0]]
    if apart:
        raise Refusal(f"its samples {next(iter(samples))} and {apart[0]} have no gene in common: read them apart")
    for batch, sample in samples.items():
        sample.obs_names = [f"{batch}_{cell}" for cell in sample.obs_names]
        sample.obs["batch"] = batch
        if "n_counts" not in sample.obs:
            sample.obs["n_counts"] = np.asarray(sample.X.sum(1), np.float64).ravel()
    adata = anndata.concat(samples.values(), join="outer", fill_value=0)
    adata = adata[:, list(dict.fromkeys(gene for sample in samples.values() for gene in sample.var_names))].copy()
    ids = [sample.var["gene_ids"].astype(str) for sample in samples.values() if "gene_ids" in sample.var]
    if ids:
        codes = adata.var_names.get_indexer(np.concatenate([own.index for own in ids]))
        joined = join_distinct(np.concatenate(ids), codes)
        adata.var["gene_ids"] = joined.reindex(range(adata.n_vars), fill_value="").to_numpy()
    print(
        f"{name}: {len(samples)} samples ({', '.join(samples)}), {adata.n_vars:,} genes, {len(set.intersection(*genes)):,} of "
        "them in every sample; a gene that a sample does not list is 0 there."
    )
    return adata
