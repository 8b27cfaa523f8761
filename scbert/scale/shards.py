"""More cells than memory: cells tokenized block by block, and written as shards for `scbert.stream` to read."""

import contextlib
import errno
import hashlib
import json
import os
import shutil
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import anndata
import h5py
import numpy as np
import pandas as pd
from anndata.io import read_elem, sparse_dataset, write_elem
from scipy import sparse
from tqdm import tqdm

from ..data.checks import check_unique
from ..data.counts import hash_data
from ..data.preprocess import hash_genes, tokenize
from ..paths import find_file, first_line, seal, write_text
from .stream import (
    FORMAT,
    STORE,
    UNFINISHED,
    CellStore,
    hash_column,
    is_complete,
    join_runs,
    open_store,
    read_column,
    read_runs,
    read_state,
)

CELLS_AT_ONCE = 2_000  # tokenized in one go
SPARE_DISK = 2**26  # bytes of the disk that are left to others
SAMPLE = 1_000  # cells of each source that are looked at before anything is written


def write_store(
    source: anndata.AnnData | str | Path | Sequence[anndata.AnnData | str | Path],
    path: str | Path,
    *,
    genes: Sequence[str] | None = None,
    n_bins: int = 5,
    library: str = "all",
    shard_cells: int = 50_000,
    progress: bool = True,
) -> CellStore:
    """Tokenize cells block by block, by the rules of `scbert.preprocess.tokenize`, into a folder of shards.

    Parameters
    ----------
    source
        Raw counts in ``X``: the path of an ``.h5ad`` file, of which a block of cells is in memory at a time; an
        AnnData, in memory or backed; or several of these, whose cells follow one another.
    path
        The folder to write. A call that was interrupted continues where it was; a finished one writes nothing.
    genes, n_bins, library
        As in `tokenize`; a model's vocabulary is ``genes=model.genes``.
    shard_cells
        Most cells a shard; a shard holds cells of one source.

    Written are ``shard-00000.h5ad`` ..., each an AnnData with ``layers["bins"]``, the ``obs`` of its cells and no
    counts, with checksums. Then ``store.json``: without it no store opens.

    Raises
    ------
    ValueError
        What `tokenize` and `scbert.datasets.load` refuse (of each source, the first 1,000 cells are checked before
        anything is written, the others as they are read; names that two sources share, among those first cells only);
        sources of different genes without `genes`; an ``.h5ad`` stored by genes, or by anndata before 0.8; too little
        room on the disk; or a folder that holds anything else.
    OSError
        The disk is full, or fails: whole shards are kept, and the same call continues.

    Paper: not in it. Differs from the published code: that reads all cells into memory.
    """
    path, sources = Path(path), [source] if isinstance(source, (anndata.AnnData, str, Path)) else list(source)
    if not sources:
        raise ValueError("There is no source of cells: give an AnnData, the path of an .h5ad file, or several.")
    if shard_cells < 1:
        raise ValueError(f"shard_cells must be at least 1, not {shard_cells}.")
    with contextlib.ExitStack() as stack:
        parts = [stack.enter_context(_open_source(each)) for each in sources]
        if genes is None and any(set(part.genes) != set(parts[0].genes) for part in parts):
            raise ValueError("The sources have different genes: pass genes=, the vocabulary that all are aligned to.")
        genes = pd.Index(parts[0].genes if genes is None else genes)
        options = {"genes": genes, "n_bins": n_bins, "library": library}
        bytes_needed, columns, names = 0, None, pd.Index([])
        for part in parts:
            sample = _tokenize_block(part, 0, min(SAMPLE, part.n_cells), **options)
            # A byte and a column number a token, and obs.
            sample_bytes = 5 * sample.layers["bins"].nnz + sample.obs.memory_usage(deep=True).sum()
            bytes_needed += part.n_cells * (sample_bytes / sample.n_obs + 8)
            columns = [name for name in sample.obs if columns is None or name in columns]
            names = names.append(sample.obs_names)
        check_unique(names, "Cell names, among the first of each source,")
        store = {"format": FORMAT, "genes_sha256": hash_genes(genes), "n_bins": n_bins, "library": library}
        store |= {"shard_cells": shard_cells, "sources": [part.identity for part in parts]}
        done = _find_shards(path, store)
        starts = [(part, first) for part in parts for first in range(0, part.n_cells, shard_cells)]
        plan = [(part, first, min(first + shard_cells, part.n_cells)) for part, first in starts]
        plan = {f"shard-{number:05d}.h5ad": shard for number, shard in enumerate(plan)}
        if set(plan) != set(done) or not (path / STORE).exists():
            n_cells, n_done = sum(part.n_cells for part in parts), sum(shard["cells"] for shard in done.values())
            _check_room(path, bytes_needed * (1 - n_done / n_cells))
            found = genes.isin(np.concatenate([part.genes for part in parts]))
            store |= {"cells": n_cells, "obs": columns, "genes": list(genes), "matched_share": found.mean()}
            bar = tqdm(desc="tokenize", total=n_cells, initial=n_done, unit="cell", file=sys.stdout, mininterval=1,
                       disable=not progress)  # fmt: skip
            try:
                with bar:
                    _write_shards(path, store, plan, done, options, bar)
            except (OSError, RuntimeError) as error:  # h5py raises either
                raise OSError(
                    f"The store {path} could not be written ({first_line(error)}): whole shards are kept, so free some "
                    "space and call write_store again with the same arguments."
                ) from None
    return open_store(path)


class _Source(NamedTuple):
    name: str
    n_cells: int
    genes: pd.Index
    identity: dict
    read_counts: Callable[[int, int], sparse.csr_matrix | np.ndarray]
    read_obs: Callable[[int, int], pd.DataFrame]


@contextlib.contextmanager
def _open_source(source):
    if isinstance(source, anndata.AnnData):
        yield _open_adata(source)
        return
    path = find_file(source)
    try:
        file = h5py.File(path, "r")
    except OSError as error:
        raise ValueError(
            f"{path} cannot be read as an h5ad file ({first_line(error)}): a store is written from .h5ad files, or from what "
            "scbert.datasets.load returns."
        ) from None
    with file:
        if file.attrs.get("encoding-type") != "anndata" or "X" not in file:
            raise ValueError(f"{path} has no X, or is older than anndata 0.8: read it with anndata and write it again.")
        if file["X"].attrs["encoding-type"] == "csc_matrix":
            raise ValueError(
                f"X of {path} is stored by genes (csc_matrix), and reading cells of it is slow: write it again with "
                "adata.X = adata.X.tocsr()."
            )
        yield _open_file(path, file)


def _open_adata(adata):
    if adata.X is None:
        raise ValueError("The AnnData has no X: put the raw counts there.")
    name = Path(adata.filename).name if adata.isbacked else "The AnnData"
    check_unique(adata.var_names, f"Gene names of {name}")
    counts = adata.X if adata.isbacked or not sparse.issparse(adata.X) else adata.X.tocsr()
    obs = hashlib.sha256(repr(list(adata.obs)).encode() + pd.util.hash_pandas_object(adata.obs).to_numpy().tobytes())
    identity = _identify_file(Path(adata.filename)) if adata.isbacked else {"sha256": hash_data(adata)}
    identity |= {"cells": adata.n_obs, "obs_sha256": obs.hexdigest()}
    return _Source(
        name, adata.n_obs, adata.var_names, identity,
        read_counts=lambda start, stop: counts[start:stop],
        read_obs=lambda start, stop: adata.obs.iloc[start:stop],
    )  # fmt: skip


def _open_file(path, file):
    counts, obs = file["X"], file["obs"]
    genes = read_elem(file["var"]).index
    check_unique(genes, f"Gene names of {path}")
    is_sparse, names = isinstance(counts, h5py.Group), obs[obs.attrs["_index"]]
    n_cells = len(names)

    def read_counts(start, stop):
        return join_runs(read_runs(counts, [(start, stop)]), len(genes)) if is_sparse else counts[start:stop]

    def read_obs(start, stop):
        rows = slice(start, stop)
        columns = {name: read_column(obs[name], rows) for name in obs.attrs["column-order"]}
        return pd.DataFrame(columns, index=read_column(names, rows))

    return _Source(str(path), n_cells, genes, _identify_file(path) | {"cells": n_cells}, read_counts, read_obs)


def _identify_file(path):
    return {"file": path.name, "bytes": path.stat().st_size, "modified": path.stat().st_mtime_ns}


def _tokenize_block(part, start, stop, genes, n_bins, library):
    """Return cells as an AnnData of their own, checked and tokenized."""
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*names are not unique")  # tokenize says it
            counts, obs = part.read_counts(start, stop), part.read_obs(start, stop)
            block = anndata.AnnData(counts, obs=obs, var=pd.DataFrame(index=part.genes))
    except (OSError, RuntimeError) as error:
        raise ValueError(f"{part.name} cannot be read at cell {start} ({first_line(error)}): is it damaged?") from None
    genes = None if part.genes.equals(genes) else genes
    return tokenize(block, genes, n_bins, library, name=part.name)


def _find_shards(path, call):
    """Return file name -> shard of an earlier, equal call, as far as they are whole."""
    found = [file for file in (path / STORE, path / UNFINISHED) if file.is_file()]
    if not found:
        if path.exists() and (not path.is_dir() or any(file.suffix != ".tmp" for file in path.iterdir())):
            raise ValueError(f"{path} is there already and is no store of cells: give another folder.")
        return {}
    store = read_state(found[0])
    if {key: store.get(key) for key in call} != call:
        raise ValueError(
            f"{path} holds cells of another call (other cells, genes, bins or size of shards): give another folder, or "
            "remove it."
        )
    return {shard["file"]: shard for shard in store["shards"] if is_complete(path, shard)}


def _check_room(path, needed):
    folder = next(folder for folder in (path.absolute(), *path.absolute().parents) if folder.exists())
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise ValueError(
            f"The store needs about {needed / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free in {folder}: free some space, "
            "or give a folder on another disk."
        )


def _write_shards(path, store, plan, done, options, bar):
    path.mkdir(parents=True, exist_ok=True)
    for number, (file, (part, start, stop)) in enumerate(plan.items()):
        if number == 0 or file not in done:
            finished = [done[name] for name in plan if name in done]
            _write_state(path, store | {"shards": finished})
            (path / STORE).unlink(missing_ok=True)  # a shard of it is missing
        if file not in done:
            done[file] = _write_shard(path / file, part, start, stop, options, bar)
    digest = hashlib.sha256(f"{store['genes_sha256']} {store['n_bins']}".encode())
    for file in plan:
        digest.update(done[file]["sha256"].encode())
    store |= {"shards": [done[file] for file in plan], "sha256": digest.hexdigest()}
    _write_state(path, store)
    os.replace(path / UNFINISHED, path / STORE)


def _write_state(path, store):
    store = json.loads(json.dumps(store))  # numbers as they will be read
    write_text(path / UNFINISHED, json.dumps(store | {"seal": seal(store)}))


def _write_shard(file, part, start, stop, options, bar):
    """Write one shard under another name, block by block, give it its name, and return its entry in the store."""
    temporary, digest = file.with_name(f"{file.name}.part"), hashlib.sha256()
    try:
        for first in range(start, stop, CELLS_AT_ONCE):
            cells = _tokenize_block(part, first, min(first + CELLS_AT_ONCE, stop), **options)
            bins = cells.layers["bins"]
            bins.sort_indices()
            bins.indptr = bins.indptr.astype(np.int64)  # a shard may hold more tokens than an int32 counts
            for array in (bins.indptr, bins.indices.astype("<i4"), bins.data):
                digest.update(array.tobytes())
            if shutil.disk_usage(file.parent).free < 5 * bins.nnz + SPARE_DISK:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))  # while HDF5 can still close its file
            if first == start:
                report = {key: value for key, value in cells.uns["scbert"]["tokenize"].items() if "without" not in key}
                shard = anndata.AnnData(
                    obs=part.read_obs(start, stop).copy(),
                    var=pd.DataFrame(index=options["genes"]),
                    uns={"scbert": {"tokenize": report}},
                )
                shard.write_h5ad(temporary)
            with h5py.File(temporary, "r+") as opened:
                for column in opened["obs"].values() if first == start else ():
                    column.attrs["sha256"] = hash_column(read_column(column, slice(None)))
                if first == start:
                    write_elem(opened, "layers/bins", bins, dataset_kwargs={"chunks": (16_384,), "fletcher32": True})
                else:
                    sparse_dataset(opened["layers/bins"]).append(bins)
            bar.update(cells.n_obs)
        size = temporary.stat().st_size
        os.replace(temporary, file)
    finally:
        temporary.unlink(missing_ok=True)
    return {"file": file.name, "cells": stop - start, "bytes": size, "sha256": digest.hexdigest()}
