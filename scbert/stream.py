"""More cells than memory: a store of tokenized cells, in shards on disk, to train on and to annotate from.

Writing holds a block of cells in memory, reading some thousands of cells' tokens, however many cells there are.
"""

import contextlib
import copy
import errno
import hashlib
import json
import os
import shutil
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import anndata
import h5py
import numpy as np
import pandas as pd
import torch
from anndata.io import read_elem, sparse_dataset, write_elem
from pandas.api.types import union_categoricals
from scipy import sparse
from tqdm import tqdm

from .cells import to_tokens
from .datasets import check_counts
from .genes import hash_genes
from .preprocess import check_unique, tokenize
from .record import find_file, hash_data, write_text

FORMAT = 1
STORE, UNFINISHED = "store.json", "unfinished.json"
CELLS_AT_ONCE = 2_000  # tokenized in one go
CELLS_A_FETCH = 8_192  # read, and mixed, in one go while training
CELLS_A_RUN = 16  # neighbours that an epoch reads together: fewer mix better, more read faster
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
) -> "CellStore":
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
    progress
        Show a progress bar.

    Returns
    -------
    The store, see `open_store`.

    Writes
    ------
    ``shard-00000.h5ad`` ..., each an AnnData with ``layers["bins"]``, the ``obs`` of its cells and no counts, with
    checksums; each is written under another name first. Then ``store.json``: without it no store opens.

    Raises
    ------
    ValueError
        What `tokenize` and `scbert.datasets.load` refuse (of each source, the first 1,000 cells are checked before
        anything is written, the others as they are read); sources of different genes without `genes`; an
        ``.h5ad`` stored by genes, or by anndata before 0.8; too little room on the disk; or a folder that holds
        anything else.
    OSError
        The disk is full, or fails: whole shards are kept, and the same call continues.

    Paper: not in it. Differs from the published code: that reads all cells into memory.
    """
    path, sources = Path(path), [source] if isinstance(source, (anndata.AnnData, str, Path)) else list(source)
    if shard_cells < 1 or not sources:
        raise ValueError(f"There must be at least one cell a shard and one source, not {shard_cells}, {len(sources)}.")
    with contextlib.ExitStack() as stack:
        parts = [stack.enter_context(_open_source(each)) for each in sources]
        if genes is None and any(set(part.genes) != set(parts[0].genes) for part in parts):
            raise ValueError("The sources have different genes: pass genes=, the vocabulary that all are aligned to.")
        genes = pd.Index(parts[0].genes if genes is None else genes)
        options = {"genes": genes, "n_bins": n_bins, "library": library}
        bytes_needed, columns = 0, None
        for part in parts:
            sample = _tokenize_block(part, 0, min(SAMPLE, part.n_cells), **options)
            bytes_needed += part.n_cells * _bytes_a_cell(sample)
            columns = [name for name in sample.obs if columns is None or name in columns]
        store = {
            **{"format": FORMAT, "genes_sha256": hash_genes(genes), "n_bins": n_bins, "library": library},
            **{"shard_cells": shard_cells, "sources": [part.identity for part in parts]},
        }
        done = _find_shards(path, store)
        plan = [
            (part, i, min(i + shard_cells, part.n_cells)) for part in parts for i in range(0, part.n_cells, shard_cells)
        ]
        plan = {f"shard-{number:05d}.h5ad": shard for number, shard in enumerate(plan)}
        if set(plan) != set(done) or not (path / STORE).exists():
            n_cells, n_done = sum(part.n_cells for part in parts), sum(shard["cells"] for shard in done.values())
            _check_room(path, bytes_needed * (1 - n_done / n_cells))
            store |= {"cells": n_cells, "obs": columns, "genes": list(genes)}
            bar = tqdm(desc="tokenize", total=n_cells, initial=n_done, unit="cell", file=sys.stdout, mininterval=1,
                       disable=not progress)  # fmt: skip
            with _say_what_failed(path), bar:
                _write_shards(path, store, plan, done, options, bar)
    return open_store(path)


def open_store(path: str | Path) -> "CellStore":
    """Open a store of tokenized cells.

    Parameters
    ----------
    path
        A folder that `write_store` wrote.

    Raises
    ------
    ValueError
        It is no store or an unfinished one, or a shard is missing or is not as long as it was.
    """
    path = find_file(path)
    if not (path / STORE).is_file():
        raise ValueError(
            f"The store {path} is unfinished: call write_store again with the same arguments, and it continues."
            if (path / UNFINISHED).is_file()
            else f"{path} is no store of cells: {STORE} is missing."
        )
    store = _read_state(path / STORE)
    for shard in store["shards"]:
        if not _is_whole(path, shard):
            raise ValueError(
                f"{shard['file']} of the store {path} is missing or damaged: call write_store again with the same "
                "arguments, which writes only what is missing."
            )
    return CellStore(path, store)


class CellStore:
    """Tokenized cells on disk, in place of an AnnData where scbert trains and annotates; see `open_store`.

    ``store.obs["cell_type"]`` reads one column of all cells; ``store[rows]``, with a slice, a mask or increasing
    numbers, is a store of these cells. `genes`, `n_bins` and `n_obs` are attributes.

    What grows with the number of cells: a column that is asked for, labels, the numbers of chosen cells, and the
    order of a ``"bootstrap"`` epoch (8 to 24 bytes a cell each).
    """

    def __init__(self, path: Path, state: dict):
        self.path, self.genes, self.n_bins, self.sha256 = path, state["genes"], state["n_bins"], state["sha256"]
        self.files = [shard["file"] for shard in state["shards"]]
        self.starts = np.cumsum([0, *(shard["cells"] for shard in state["shards"])])  # (shards + 1,)
        self.obs = _Columns(self, state["obs"])
        self.rows = self.targets = None

    def __len__(self) -> int:
        return int(self.starts[-1]) if self.rows is None else len(self.rows)

    n_obs = property(__len__, doc="Number of cells.")

    @property
    def obs_names(self) -> pd.Index:
        """Names of the cells, read when asked for: about 100 bytes of memory a cell."""
        return pd.Index(self._read_column(None))

    def __getitem__(self, rows) -> "CellStore":
        if isinstance(rows, slice):
            rows = range(*rows.indices(len(self)))
        rows = np.atleast_1d(rows)
        rows = np.flatnonzero(rows) if rows.dtype == bool else rows.astype(np.int64)
        if len(rows) and (rows[0] < 0 or rows[-1] >= len(self) or (np.diff(rows) <= 0).any()):
            raise ValueError(f"Cells of a store are chosen by increasing numbers below {len(self)}, or by a mask.")
        part = copy.copy(self)
        part.obs, part.targets = _Columns(part, list(self.obs)), None if self.targets is None else self.targets[rows]
        part.rows = rows if self.rows is None else self.rows[rows]
        return part

    def with_targets(self, targets: np.ndarray) -> "CellStore":
        """Return the same cells with one integer each, which `batch` returns beside their tokens."""
        part = copy.copy(self)
        part.obs, part.targets = _Columns(part, list(self.obs)), np.asarray(targets, np.int64)
        return part

    def read(self, indices: np.ndarray) -> sparse.csr_matrix:
        """Return tokens of cells by number, in any order: (cells, genes) uint8."""
        rows = np.asarray(indices, np.int64) if self.rows is None else self.rows[indices]
        chosen, where = np.unique(rows, return_inverse=True)
        runs = []
        for number, local in self._split(chosen):
            neighbours = np.split(local, np.flatnonzero(np.diff(local) > 1) + 1)
            with self._open_shard(number) as file:
                runs += _read_runs(file["layers/bins"], [(int(run[0]), int(run[-1]) + 1) for run in neighbours])
        bins = _join_runs(runs, len(self.genes)) if runs else sparse.csr_matrix((0, len(self.genes)), dtype=np.uint8)
        return bins if np.array_equal(where, np.arange(len(chosen))) else bins[where]

    def batch(self, indices) -> tuple[torch.Tensor, torch.Tensor]:
        """Return cells by number: bins (cells, genes + 1) and targets (cells,), 0 without any, both int64."""
        targets = np.zeros(len(indices), np.int64) if self.targets is None else self.targets[indices]
        return to_tokens(self.read(indices)), torch.from_numpy(targets)

    def in_order(self, batch_size: int) -> Iterator[tuple[int, torch.Tensor]]:
        """Yield (number of the first cell, bins) of batches that visit each cell once, in order."""
        step = batch_size * max(1, CELLS_A_FETCH // batch_size)
        for start in range(0, len(self), step):
            bins = self.read(np.arange(start, min(start + step, len(self))))
            for first in range(0, bins.shape[0], batch_size):
                yield start + first, to_tokens(bins[first : first + batch_size])

    def epoch(
        self, batch_size: int, seed: int, epoch: int, sampling: str = "epoch"
    ) -> Iterator[tuple[np.ndarray, torch.Tensor]]:
        """Yield (numbers of the cells, bins) of an epoch's batches, in an order that seed and epoch alone fix.

        Runs of 16 neighbours are put in random order, and cells mixed within each 8,192 that are read in one go.
        ``"epoch"`` visits each cell once, ``"bootstrap"`` draws with replacement.

        Raises
        ------
        ModuleNotFoundError
            scDataset, which does this, is not installed.
        """
        try:
            from scdataset import BlockShuffling, BlockWeightedSampling, scDataset
        except ModuleNotFoundError:
            raise ModuleNotFoundError("Training from a store reads it through scDataset: install that.") from None
        if sampling == "epoch":
            strategy = BlockShuffling(CELLS_A_RUN)
            # Its own order takes 24 bytes a cell; scDataset asks for the length of one, and for slices.
            strategy.get_indices = lambda cells, seed: _RunOrder(len(cells), seed)
        else:
            strategy = BlockWeightedSampling(CELLS_A_RUN, total_size=len(self), replace=True)
        yield from scDataset(
            self,
            strategy,
            batch_size,
            fetch_factor=max(1, CELLS_A_FETCH // batch_size),
            fetch_callback=lambda store, indices: (indices, store.read(indices)),
            batch_callback=lambda fetched, chosen: (fetched[0][chosen], to_tokens(fetched[1][chosen])),
            rank=0,  # every process sees all cells
            world_size=1,
            # One number of both: scDataset's own epochs are a thousand seeds apart.
            seed=int(np.random.SeedSequence([seed, epoch]).generate_state(1, np.uint64)[0]),
        )

    def identity(self) -> Iterator[bytes]:
        """Yield what tells these cells from others."""
        yield self.sha256.encode()
        if self.rows is not None:
            yield self.rows.tobytes()

    def _split(self, rows):
        """Yield (shard, numbers within it) of increasing cell numbers."""
        if len(rows) and not 0 <= rows[0] <= rows[-1] < self.starts[-1]:
            raise IndexError(f"The store {self.path} has cells 0 to {self.starts[-1] - 1}.")
        ends = np.searchsorted(rows, self.starts)
        for number, (start, end) in enumerate(zip(ends[:-1], ends[1:], strict=True)):
            if start < end:
                yield number, rows[start:end] - self.starts[number]

    @contextlib.contextmanager
    def _open_shard(self, number):
        # Opened for each read: a large store has more shards than a process may have open files.
        file = self.path / self.files[number]
        try:
            with h5py.File(file, "r") as opened:
                yield opened
        except (OSError, KeyError, RuntimeError) as error:
            raise ValueError(
                f"{file} is damaged ({_first_line(error)}): remove it and call write_store again with the same arguments, "
                "which writes only what is missing."
            ) from None

    def _read_column(self, name):
        """Return a column of obs, of the names if None."""
        pieces = []
        chosen = ((i, slice(None)) for i in range(len(self.files))) if self.rows is None else self._split(self.rows)
        for number, rows in chosen:
            with self._open_shard(number) as file:
                obs = file["obs"]
                pieces.append(_read_column(obs[name or obs.attrs["_index"]], slice(None))[rows])
        if pieces and all(isinstance(piece, pd.Categorical) for piece in pieces):
            return union_categoricals(pieces, ignore_order=True)
        return np.concatenate([np.asarray(piece) for piece in pieces]) if pieces else np.array([])


class _Columns(Mapping):
    """The columns of a store's obs, each read when it is asked for."""

    def __init__(self, store, names):
        self.store, self.columns = store, names

    def __getitem__(self, name):
        if name not in self.columns:
            raise KeyError(name)
        return pd.Series(self.store._read_column(name), name=name)

    def __contains__(self, name):
        return name in self.columns

    def __iter__(self):
        return iter(self.columns)

    def __len__(self):
        return len(self.columns)


class _RunOrder:
    """Runs of neighbours in random order, the last cells last, as numbers of cells that are found when asked for."""

    def __init__(self, n_cells, seed):
        self.n_cells, n_runs = n_cells, n_cells // CELLS_A_RUN
        self.runs = np.append(np.random.default_rng(seed).permutation(n_runs), n_runs)

    def __len__(self):
        return self.n_cells

    def __getitem__(self, part):
        position = np.arange(*part.indices(self.n_cells))
        return self.runs[position // CELLS_A_RUN] * CELLS_A_RUN + position % CELLS_A_RUN


# Sources


class _Source(NamedTuple):
    """Cells with counts that are read from `start` to `stop`."""

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
        raise ValueError(f"{path} cannot be read as an h5ad file ({_first_line(error)}).") from None
    with file:
        if file.attrs.get("encoding-type") != "anndata" or "X" not in file:
            raise ValueError(
                f"{path} has no X, or was not written by anndata 0.8 or newer: read it with anndata and write it again."
            )
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
    is_sparse, index = isinstance(counts, h5py.Group), obs.attrs["_index"]
    n_cells = obs[index].shape[0]

    def read_counts(start, stop):
        return _join_runs(_read_runs(counts, [(start, stop)]), len(genes)) if is_sparse else counts[start:stop]

    def read_obs(start, stop):
        rows = slice(start, stop)
        columns = {name: _read_column(obs[name], rows) for name in obs.attrs["column-order"]}
        return pd.DataFrame(columns, index=_read_column(obs[index], rows))

    return _Source(str(path), n_cells, genes, _identify_file(path) | {"cells": n_cells}, read_counts, read_obs)


def _identify_file(path):
    return {"file": path.name, "bytes": path.stat().st_size, "modified": path.stat().st_mtime_ns}


def _read_runs(matrix, runs):
    """Yield (lengths of the rows, values, columns) of runs of rows of a CSR matrix in an open file; little more is read.

    A run is (first, last + 1), and they are increasing.
    """
    first, data, indices = runs[0][0], matrix["data"], matrix["indices"]
    indptr = matrix["indptr"][first : runs[-1][1] + 1].astype(np.int64)
    for start, stop in runs:
        ends = indptr[start - first : stop - first + 1]
        yield np.diff(ends), data[ends[0] : ends[-1]], indices[ends[0] : ends[-1]]


def _join_runs(runs, n_columns):
    lengths, values, columns = (np.concatenate(arrays) for arrays in zip(*runs, strict=True))
    indptr = np.concatenate([[0], np.cumsum(lengths)])
    return sparse.csr_matrix((values, columns, indptr), shape=(len(lengths), n_columns))


def _read_column(element, rows):
    """Return rows of a column of an open file."""
    kind = element.attrs["encoding-type"]
    if kind == "categorical":
        categories, is_ordered = read_elem(element["categories"]), bool(element.attrs["ordered"])
        return pd.Categorical.from_codes(element["codes"][rows], categories, ordered=is_ordered)
    if kind == "string-array":
        return element.asstr()[rows]
    return element[rows] if kind == "array" else read_elem(element)[rows]  # with missing integers: read whole


def _tokenize_block(part, start, stop, genes, n_bins, library):
    """Return cells as an AnnData of their own, checked and tokenized."""
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*names are not unique")  # check_counts says it
            block = anndata.AnnData(
                part.read_counts(start, stop), obs=part.read_obs(start, stop), var=pd.DataFrame(index=part.genes)
            )
    except (OSError, RuntimeError) as error:
        raise ValueError(f"{part.name} cannot be read at cell {start} ({_first_line(error)}): is it damaged?") from None
    check_counts(block, part.name)
    return tokenize(block, genes=None if part.genes.equals(genes) else genes, n_bins=n_bins, library=library)


# Shards


def _find_shards(path, call):
    """Return file name -> shard of an earlier, equal call, as far as they are whole."""
    found = [file for file in (path / STORE, path / UNFINISHED) if file.is_file()]
    if not found:
        if path.exists() and (not path.is_dir() or any(path.iterdir())):
            raise ValueError(f"{path} is there already and is no store of cells: give another folder.")
        return {}
    store = _read_state(found[0])
    if {key: store.get(key) for key in call} != call:
        raise ValueError(
            f"{path} holds cells of another call (other cells, genes, bins or size of shards): give another folder, or "
            "remove it."
        )
    return {shard["file"]: shard for shard in store["shards"] if _is_whole(path, shard)}


def _read_state(file):
    try:
        store = json.loads(file.read_text())
        if store["format"] == FORMAT and store["genes_sha256"] == hash_genes(store["genes"]) and "shards" in store:
            return store
    except (OSError, ValueError, KeyError, TypeError):
        pass
    raise ValueError(f"{file} is damaged, or was written by another version: write the store again, elsewhere.")


def _is_whole(path, shard):
    file = path / shard["file"]
    return file.is_file() and file.stat().st_size == shard["bytes"]


def _bytes_a_cell(sample):
    """Estimate what a cell takes on disk: a byte and a column number a token, and obs."""
    return (5 * sample.layers["bins"].nnz + sample.obs.memory_usage(deep=True).sum()) / sample.n_obs + 8


def _check_room(path, needed):
    folder = next(folder for folder in (path.absolute(), *path.absolute().parents) if folder.exists())
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise ValueError(
            f"The store needs about {needed / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free in {folder}: free some space, "
            "or give a folder on another disk."
        )


@contextlib.contextmanager
def _say_what_failed(path):
    try:
        yield
    except (OSError, RuntimeError) as error:  # h5py raises either
        raise OSError(
            f"The store {path} could not be written ({_first_line(error)}): whole shards are kept, so free some space "
            "and call write_store again with the same arguments."
        ) from None


def _write_shards(path, store, plan, done, options, bar):
    path.mkdir(parents=True, exist_ok=True)
    for number, (file, (part, start, stop)) in enumerate(plan.items()):
        if number == 0 or file not in done:
            finished = [done[name] for name in plan if name in done]
            write_text(path / UNFINISHED, json.dumps(store | {"shards": finished}))
            (path / STORE).unlink(missing_ok=True)  # a shard of it is missing
        if file not in done:
            done[file] = _write_shard(path / file, part, start, stop, options, bar)
    digest = hashlib.sha256(f"{store['genes_sha256']} {store['n_bins']}".encode())
    for file in plan:
        digest.update(done[file]["sha256"].encode())
    store |= {"shards": [done[file] for file in plan], "sha256": digest.hexdigest()}
    write_text(path / UNFINISHED, json.dumps(store))
    os.replace(path / UNFINISHED, path / STORE)


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


def _first_line(error):
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
