"""More cells than memory: tokenized cells in shards on disk, to train on and to annotate from; `scbert.shards` writes them."""

import contextlib
import copy
import hashlib
import itertools
import json
from collections import UserDict
from collections.abc import Iterator
from pathlib import Path

import h5py
import numpy as np
import pandas as pd
import torch
from anndata.io import read_elem
from pandas.api.types import union_categoricals
from scipy import sparse

from ..data.cells import take_share, to_tokens
from ..data.preprocess import hash_genes
from ..model.config import ScBertConfig
from ..paths import find_file, first_line, seal

FORMAT = 1
STORE, UNFINISHED = "store.json", "unfinished.json"
CELLS_A_FETCH = 8_192  # read, and mixed, in one go while training
CELLS_A_RUN = 16  # neighbours that an epoch reads together: fewer mix better, more read faster

CELLS_A_WINDOW = 4_096  # sorted by length and annotated before the next are read
POSITIONS = 8_000  # of a batch of expressed genes (measured: fewer cost time between them, more leave the cache)


def open_store(path: str | Path) -> "CellStore":
    """Open a folder of tokenized cells that `write_store` wrote.

    A ValueError says that it is no store or an unfinished one, or that a shard is missing or not as long as it was.
    """
    path = find_file(path)
    if not (path / STORE).is_file():
        raise ValueError(
            f"The store {path} is unfinished: call write_store again with the same arguments, and it continues."
            if (path / UNFINISHED).is_file()
            else f"{path} is no store of cells: {STORE} is missing."
        )
    store = read_state(path / STORE)
    for shard in store["shards"]:
        if not is_complete(path, shard):
            raise ValueError(
                f"{shard['file']} of the store {path} is missing or damaged: call write_store again with the same "
                "arguments, which writes only what is missing."
            )
    return CellStore(path, store)


def plan_batches(lengths: np.ndarray, config: ScBertConfig, batch_size: int | None) -> list[np.ndarray]:
    """Return numbers of cells, a batch each, in order, or sorted by `lengths` where only expressed genes enter.

    Without a `batch_size` a batch is 32 cells, or of expressed genes as many as have some `POSITIONS`.
    """
    by_length = config.expressed_only and config.key_stabiliser != "batch"
    order = np.argsort(lengths, kind="stable") if by_length else np.arange(len(lengths))
    if by_length and not batch_size:
        batch = lengths[order].cumsum() // POSITIONS
    else:
        batch = np.arange(len(order)) // (batch_size or 32)
    return np.split(order, np.flatnonzero(np.diff(batch)) + 1)


class CellStore:
    """Tokenized cells on disk, in place of an AnnData where scbert trains and annotates; see `open_store`.

    ``store.obs["cell_type"]`` reads one column of all cells; ``store[rows]``, with a slice, a mask or increasing
    numbers, is a store of these cells. `genes`, `n_bins` and `n_obs` are attributes.

    Some thousands of cells' tokens are in memory. What grows with the number of cells: a column that is asked for,
    labels, the numbers of chosen cells, and the order of a ``"bootstrap"`` epoch (8 to 24 bytes a cell each).
    """

    def __init__(self, path: Path, state: dict):
        self.path, self.genes, self.n_bins, self.sha256 = path, state["genes"], state["n_bins"], state["sha256"]
        self.matched_share = state.get("matched_share", 1.0)
        self.files = [shard["file"] for shard in state["shards"]]
        self.starts = np.cumsum([0, *(shard["cells"] for shard in state["shards"])])  # (shards + 1,)
        self.obs = _Columns(self, state["obs"])
        self.rows = None

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
        part.obs = _Columns(part, list(self.obs))
        part.rows = rows if self.rows is None else self.rows[rows]
        return part

    def read(self, indices: np.ndarray) -> sparse.csr_matrix:
        """Return tokens of cells by number, in any order: (cells, genes) uint8."""
        rows = np.asarray(indices, np.int64) if self.rows is None else self.rows[indices]
        chosen, where = np.unique(rows, return_inverse=True)
        runs = []
        for number, local in self._split(chosen):
            neighbours = np.split(local, np.flatnonzero(np.diff(local) > 1) + 1)
            with self._open_shard(number) as file:
                runs += read_runs(file["layers/bins"], [(int(run[0]), int(run[-1]) + 1) for run in neighbours])
        bins = join_runs(runs, len(self.genes)) if runs else sparse.csr_matrix((0, len(self.genes)), dtype=np.uint8)
        return bins if np.array_equal(where, np.arange(len(chosen))) else bins[where]

    def batch(self, indices) -> torch.Tensor:
        """Return cells by number: (cells, genes + 1) int64 with a trailing 0."""
        return to_tokens(self.read(indices))

    def in_order(self, batch_size: int) -> Iterator[tuple[int, torch.Tensor]]:
        """Yield (number of the first cell, bins) of batches that visit each cell once, in order."""
        start = 0
        for bins in self.windows(batch_size * max(1, CELLS_A_FETCH // batch_size)):
            for first in range(0, bins.shape[0], batch_size):
                yield start + first, to_tokens(bins[first : first + batch_size])
            start += bins.shape[0]

    def windows(self, n_cells: int) -> Iterator[sparse.csr_matrix]:
        """Yield tokens (cells, genes) of so many cells at a time, in order."""
        for start in range(0, len(self), n_cells):
            yield self.read(np.arange(start, min(start + n_cells, len(self))))

    def epoch(
        self,
        batch_size: int,
        seed: int,
        epoch: int,
        sampling: str = "epoch",
        *,
        skip: int = 0,
        part: tuple[int, int] = (0, 1),
    ) -> Iterator[tuple[np.ndarray, torch.Tensor]]:
        """Yield (numbers of the cells, bins) of an epoch's batches, in an order that seed and epoch alone fix.

        Runs of 16 neighbours are put in random order, and cells mixed within each 8,192 that are read in one go.
        `sampling`, `skip` and `part` as in `CellDataset.epoch`. Without scDataset it raises a ModuleNotFoundError.
        """
        try:
            from scdataset import BlockShuffling, BlockWeightedSampling, scDataset
        except ModuleNotFoundError:
            raise ModuleNotFoundError(
                "Training from a store needs scDataset: pip install -c requirements.lock -e '.[stream]'."
            ) from None
        if sampling == "epoch":
            strategy = BlockShuffling(CELLS_A_RUN)
            # Its own order takes 24 bytes a cell; scDataset asks for the length of one, and for slices.
            strategy.get_indices = lambda cells, seed: _RunOrder(len(cells), seed)
        else:
            strategy = BlockWeightedSampling(CELLS_A_RUN, total_size=len(self), replace=True)
        batches_a_fetch = max(1, CELLS_A_FETCH // batch_size)
        # scDataset puts numbers in order, and is alike in all processes; reading is left for the cells of each.
        order = scDataset(
            self,
            strategy,
            batch_size,
            fetch_factor=batches_a_fetch,
            fetch_callback=lambda store, indices: indices,
            batch_callback=lambda fetched, chosen: fetched[chosen],
            rank=0,
            world_size=1,
            # One number of both: scDataset's own epochs are a thousand seeds apart.
            seed=int(np.random.SeedSequence([seed, epoch]).generate_state(1, np.uint64)[0]),
        )
        order = itertools.islice(order, skip, None)
        n_batches = batches_a_fetch - skip % batches_a_fetch  # up to the end of what scDataset mixed
        while batches := list(itertools.islice(order, n_batches)):
            shares = [take_share(np.asarray(indices), part) for indices in batches]
            bins, start = self.read(np.concatenate(shares)), 0
            for indices in shares:
                yield indices, to_tokens(bins[start : start + len(indices)])
                start += len(indices)
            n_batches = batches_a_fetch

    def genes_seen(self) -> np.ndarray:
        """Return which genes have a token in some cell, (genes,) bool; read in one pass."""
        seen = np.zeros(len(self.genes), bool)
        for start in range(0, len(self), CELLS_A_FETCH):
            seen |= self.read(np.arange(start, min(start + CELLS_A_FETCH, len(self)))).getnnz(axis=0) > 0
        return seen

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
                f"{file} is damaged ({first_line(error)}): remove it and call write_store again with the same arguments, "
                "which writes only what is missing."
            ) from None

    def _read_column(self, name):
        """Return a column of obs, of the names if None."""
        pieces = []
        chosen = ((i, slice(None)) for i in range(len(self.files))) if self.rows is None else self._split(self.rows)
        for number, rows in chosen:
            with self._open_shard(number) as file:
                column = file["obs"][name or file["obs"].attrs["_index"]]
                piece = read_column(column, slice(None))
                if column.attrs.get("sha256") not in (None, hash_column(piece)):  # older shards have none
                    raise ValueError(
                        f"Column {name or 'of names'} of {self.files[number]} in the store {self.path} is damaged: delete that "
                        "file, and call write_store again with the same arguments."
                    )
                pieces.append(piece[rows])
        if pieces and all(isinstance(piece, pd.Categorical) for piece in pieces):
            return union_categoricals(pieces, ignore_order=True)
        return np.concatenate([np.asarray(piece) for piece in pieces]) if pieces else np.array([])


class _Columns(UserDict):
    """The columns of a store's obs, each read when it is asked for."""

    def __init__(self, store, names):
        super().__init__(dict.fromkeys(names))
        self.store, self.columns = store, names

    def __getitem__(self, name):
        super().__getitem__(name)  # a KeyError of others
        return pd.Series(self.store._read_column(name), name=name)


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


def read_runs(matrix, runs):
    """Yield (lengths of the rows, values, columns) of runs of rows of a CSR matrix in an open file; little more is read.

    A run is (first, last + 1), and they are increasing.
    """
    first, data, indices = runs[0][0], matrix["data"], matrix["indices"]
    indptr = matrix["indptr"][first : runs[-1][1] + 1].astype(np.int64)
    for start, stop in runs:
        ends = indptr[start - first : stop - first + 1]
        yield np.diff(ends), data[ends[0] : ends[-1]], indices[ends[0] : ends[-1]]


def join_runs(runs, n_columns: int) -> sparse.csr_matrix:
    """Put what `read_runs` yields together, (rows, columns)."""
    lengths, values, columns = (np.concatenate(arrays) for arrays in zip(*runs, strict=True))
    indptr = np.concatenate([[0], np.cumsum(lengths)])
    return sparse.csr_matrix((values, columns, indptr), shape=(len(lengths), n_columns))


def read_column(element, rows):
    """Return rows of a column of an open file."""
    kind = element.attrs["encoding-type"]
    if kind == "categorical":
        categories, is_ordered = read_elem(element["categories"]), bool(element.attrs["ordered"])
        return pd.Categorical.from_codes(element["codes"][rows], categories, ordered=is_ordered)
    if kind == "string-array":
        return element.asstr()[rows]
    return element[rows] if kind == "array" else read_elem(element)[rows]  # with missing integers: read whole


def hash_column(values) -> str:
    """Return the sha256 of a column's values, whatever they are held as."""
    return hashlib.sha256(pd.util.hash_pandas_object(pd.Series(values), index=False).to_numpy().tobytes()).hexdigest()


def read_state(file: Path) -> dict:
    """Return what ``store.json``, or ``unfinished.json``, says of a store; a ValueError if it is damaged."""
    try:
        store = json.loads(file.read_text())
        is_whole = store.pop("seal", None) in (None, seal(store))  # older ones have none
        if (
            is_whole
            and store["format"] == FORMAT
            and store["genes_sha256"] == hash_genes(store["genes"])
            and "shards" in store
        ):
            return store
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        pass
    raise ValueError(f"{file} is damaged, or was written by another version: write the store again, elsewhere.")


def is_complete(path: Path, shard: dict) -> bool:
    """Return whether a shard of the store in `path` is there, and as long as it was."""
    file = path / shard["file"]
    return file.is_file() and file.stat().st_size == shard["bytes"]
