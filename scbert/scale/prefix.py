"""The frozen layers of an encoder, run once for each cell instead of once for each cell and epoch."""

import shutil
import sys
import tempfile
import warnings
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from ..data.cells import CellDataset
from ..model.encoder import ScBert
from .stream import CellStore

SPARE_DISK = 20 * 10**9
"""Bytes of the disk that the cache leaves to others, at least: a tenth of the disk where that is more."""


class FrozenPrefix:
    """What the first layers make of each cell, computed once, without gradients, in the order of the cells.

    It is kept in memory if all cells fit into `memory` bytes, else in an unnamed file in `folder` (the system's temporary
    one, if None) that `close`, or the end of the process, removes, and that leaves `SPARE_DISK` free, whoever else writes.
    Cells without room are computed whenever they are asked for. The encoder's first `n_layers` must not change while this
    is in use; with 0 there is nothing to keep, and `batch` returns tokens. Precision "float16" takes half the bytes of
    "float32".

    Paper: not in it. Differs from the published code: that runs all layers for every cell in every epoch.
    """

    def __init__(
        self,
        encoder: ScBert,
        cells: CellDataset | CellStore,
        n_layers: int,
        *,
        precision: str = "float32",
        memory: int = 2 * 2**30,
        folder: str | Path | None = None,
        batch_size: int = 16,
        progress: bool = True,
    ):
        self.encoder, self.cells, self.n_layers, self.n_kept, self.bytes_in_memory = encoder, cells, n_layers, 0, 0
        self.kept = self.file = None
        if n_layers == 0:
            return
        self.dtype = np.dtype(precision)
        self.shape = (encoder.config.n_genes + 1, encoder.config.dim)  # of one cell
        self.cell_bytes = self.dtype.itemsize * self.shape[0] * self.shape[1]
        needed = len(cells) * self.cell_bytes
        if needed <= memory:
            self.bytes_in_memory = needed
            self.kept, n_cells = np.empty((len(cells), *self.shape), self.dtype), len(cells)
        else:
            n_cells = self._open_file(Path(folder or tempfile.gettempdir()), needed, progress)
        self._fill(n_cells, batch_size, progress)

    def batch(self, indices: np.ndarray, bins: torch.Tensor | None = None) -> torch.Tensor:
        """Return cells by number: (cells, genes + 1, dim) float32 on the encoder's device, or tokens without layers.

        With `bins`, the tokens of these cells, they are not read again.
        """
        device = next(self.encoder.parameters()).device
        if bins is None:
            bins = self.cells.batch(indices)
        if self.n_layers == 0:
            return bins.to(device)
        kept = torch.from_numpy(np.flatnonzero(indices < self.n_kept))
        missing = torch.from_numpy(np.flatnonzero(indices >= self.n_kept))
        x = torch.empty(len(indices), *self.shape, device=device)
        if len(kept):
            x[kept] = torch.from_numpy(self._read(indices[kept.numpy()])).to(device, torch.float32)
        if len(missing):
            x[missing] = self._compute(bins[missing])
        return x

    def close(self) -> None:
        """Give memory and file back; cells asked for later are computed."""
        self.n_kept, self.kept = 0, None
        if self.file is not None:
            self.file.close()

    @torch.no_grad()
    def _compute(self, bins):
        device = next(self.encoder.parameters()).device
        return self.encoder.run_layers(self.encoder.embed(bins.to(device)), stop=self.n_layers)

    def _open_file(self, folder, needed, progress):
        """Open the file and return the number of cells that the disk has room for."""
        self.folder = folder
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self.file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 - closed by `close`
            free = max(0, self._measure_room())
        except OSError as error:
            self._warn(0, str(error))
            return 0
        n_cells = min(len(self.cells), free // self.cell_bytes)
        what = f"{needed / 1e9:.1f} GB are needed, and {free / 1e9:.1f} GB of the disk of {folder} can be taken"
        if n_cells < len(self.cells):
            self._warn(n_cells, what)
        elif progress:
            print(f"To keep the frozen layers of {n_cells} cells {what}.")
        return n_cells

    def _measure_room(self):
        disk = shutil.disk_usage(self.folder)
        return disk.free - max(SPARE_DISK, disk.total // 10)

    def _fill(self, n_cells, batch_size, progress):
        with tqdm(desc="frozen layers", total=n_cells, unit="cell", file=sys.stdout, mininterval=1,
                  disable=not progress) as bar:  # fmt: skip
            for start, bins in self.cells.in_order(batch_size):
                bins = bins[: max(0, n_cells - start)]
                if not len(bins):
                    return
                with np.errstate(over="ignore"):
                    rows = self._compute(bins).float().cpu().numpy().astype(self.dtype)
                try:
                    if not np.isfinite(rows).all():
                        raise OverflowError(f"{self.dtype} cannot hold them: cache='float32' can")
                    self._write(start, rows)
                except (OSError, OverflowError) as error:  # a full disk must not end the training
                    self._warn(self.n_kept, str(error))
                    return
                self.n_kept = start + len(bins)
                bar.update(len(bins))

    def _write(self, start, rows):
        if self.file is None:
            self.kept[start : start + len(rows)] = rows
        else:
            # A write that fails raises; a memory map on a full disk would kill the process.
            if self._measure_room() < rows.nbytes:
                raise OSError("the rest of the disk is left to others")
            self.file.seek(start * self.cell_bytes)
            self.file.write(rows.tobytes())
            self.file.flush()

    def _read(self, indices):
        if self.file is None:
            return self.kept[indices]
        rows = np.empty((len(indices), *self.shape), self.dtype)
        for row, index in zip(rows, indices, strict=True):
            self.file.seek(int(index) * self.cell_bytes)
            self.file.readinto(memoryview(row).cast("B"))
        return rows

    def _warn(self, n_cells, why):
        warnings.warn(
            f"The frozen layers of {n_cells} of {len(self.cells)} cells are kept ({why}): those of the others are "
            "computed in every epoch. Free some disk space, or set cache='float16', to train faster.",
            stacklevel=5,
        )
