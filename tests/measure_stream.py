"""Measure a store of more cells than memory: python tests/measure_stream.py [--cells 1000000] [--folder FOLDER]

Makes a file of synthetic counts, writes it as a store, reads an epoch of it and annotates a thousand cells, at a
tenth of the cells and at all of them: the memory of each step should be the same. Each step is a process of its own,
and its memory is the most it held above what it held when everything was imported. Beside it, what a user would
write first: random batches from the backed AnnData. Removes all it made. About 7.5 GB of disk and a quarter of an
hour for a million cells; Linux only.
"""

import argparse
import json
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

N_GENES, N_EXPRESSED = 16_906, 512  # genes in all, genes of a cell with counts
BATCH = 64
BYTES_A_CELL = 7_500  # counts and store


def make(folder, n_cells):
    """Write counts.h5ad: a cell has counts of one gene of every 33, labels and a name, written block by block."""
    import anndata
    import h5py
    import numpy as np
    import pandas as pd
    from anndata.io import sparse_dataset, write_elem
    from scipy import sparse

    random, step = np.random.default_rng(0), 10_000
    stride = N_GENES // N_EXPRESSED
    empty = anndata.AnnData(
        sparse.csr_matrix((0, N_GENES), dtype=np.float32),
        obs=pd.DataFrame({"cell_type": pd.Categorical([], categories=["A", "B"])}, index=pd.Index([], dtype=str)),
        var=pd.DataFrame(index=[f"gene{i}" for i in range(N_GENES)]),
    )
    empty.write_h5ad(folder / "counts.h5ad")
    with h5py.File(folder / "counts.h5ad", "r+") as file:
        write_elem(file, "X", empty.X.astype(np.float32), dataset_kwargs={"chunks": (65_536,)})
        counts, obs = sparse_dataset(file["X"]), file["obs"]
        del obs["_index"], obs["cell_type/codes"]
        obs.create_dataset("_index", n_cells, dtype=h5py.string_dtype(), chunks=(min(step, n_cells),))
        obs["_index"].attrs.update({"encoding-type": "string-array", "encoding-version": "0.2.0"})
        obs.create_dataset("cell_type/codes", n_cells, dtype=np.int8, chunks=(min(step, n_cells),))
        obs["cell_type/codes"].attrs.update({"encoding-type": "array", "encoding-version": "0.2.0"})
        for start in range(0, n_cells, step):
            n = min(step, n_cells - start)
            columns = np.arange(N_EXPRESSED) * stride + random.integers(stride, size=(n, N_EXPRESSED))
            values = random.geometric(0.5, columns.size).astype(np.float32)
            indptr = np.arange(n + 1, dtype=np.int64) * N_EXPRESSED
            block = sparse.csr_matrix((values, columns.ravel().astype(np.int32), indptr), shape=(n, N_GENES))
            block.indptr = indptr
            counts.append(block)
            obs["_index"][start : start + n] = [f"cell{i}" for i in range(start, start + n)]
            obs["cell_type/codes"][start : start + n] = random.integers(2, size=n)
    return n_cells


def write(folder, n_cells):
    from scbert.scale.shards import write_store

    return len(write_store(folder / "counts.h5ad", folder / "store", progress=False))


def read(folder, n_cells):
    """Read one epoch, shuffled, and check that each cell came once."""
    from scbert.scale.stream import open_store

    visited = total = 0
    for indices, bins in open_store(folder / "store").epoch(BATCH, seed=0, epoch=0):
        visited += len(bins)
        total += int(indices.sum())
    assert (visited, total) == (n_cells, n_cells * (n_cells - 1) // 2)
    return visited


def annotate(folder, n_cells):
    """Annotate a thousand cells from everywhere, by a small untrained classifier."""
    import scbert
    from scbert.scale.stream import open_store

    cells = open_store(folder / "store")[:: n_cells // 1_000]
    config = scbert.ScBertConfig(N_GENES, dim=8, depth=1, heads=2, dim_head=4)
    classifier = scbert.Classifier(scbert.ScBert(config, genes=cells.genes), ["A", "B", "C"]).eval()
    result = scbert.annotate(cells, classifier)
    assert result["scbert_confidence"].between(1 / 3, 1).all()
    return len(result)


def read_backed(folder, n_cells, seconds=30):
    """Read random batches of the counts, not even tokenized, from the backed AnnData, for half a minute."""
    import anndata
    import numpy as np

    adata = anndata.read_h5ad(folder / "counts.h5ad", backed="r")
    order, end, visited = np.random.default_rng(0).permutation(n_cells), time.monotonic() + seconds, 0
    while time.monotonic() < end and visited < n_cells:
        visited += adata[np.sort(order[visited : visited + BATCH])].to_memory().X.toarray().shape[0]
    return visited


STEPS = {
    "make": (make, "make the counts"),
    "write": (write, "write the store"),
    "read": (read, "read an epoch"),
    "annotate": (annotate, "annotate"),
    "backed": (read_backed, "read backed AnnData"),
}


def measure(step, folder, n_cells):
    """Run a step in this process and print what it took, as JSON."""
    import scbert.performance
    import scbert.stream
    import scdataset  # noqa: F401

    import scbert.train  # noqa: F401

    def read_memory(name):
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith(name)) / 1024  # MB

    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark falls to what is held now
    before, start = read_memory("VmRSS"), time.monotonic()
    done = STEPS[step][0](Path(folder), n_cells)
    seconds = time.monotonic() - start
    print(json.dumps({"rate": done / seconds, "seconds": seconds, "memory": read_memory("VmHWM") - before}))


def main(n_cells, folder):
    """Measure every step at a tenth of the cells and at all of them, and print a table."""
    if not Path("/proc/self/clear_refs").exists():
        sys.exit("The memory of a step is read from /proc: run this on Linux.")
    if n_cells < 10_000 or not Path(folder).is_dir():
        sys.exit("Give at least 10,000 --cells, and a --folder that is there.")
    needed, free = n_cells * BYTES_A_CELL, shutil.disk_usage(folder).free
    if needed > free:
        sys.exit(
            f"{n_cells:,} cells need {needed / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free: give another --folder."
        )
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that files are removed then, too
    results = {}
    for size in (n_cells // 10, n_cells):
        with tempfile.TemporaryDirectory(dir=folder, prefix="measure_stream_") as made:
            for step, (_, name) in STEPS.items():
                command = [sys.executable, __file__, "--step", step, "--folder", made, "--cells", str(size)]
                output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
                results[size, step] = result = json.loads(output.splitlines()[-1])
                print(
                    f"{size:>10,} cells | {name:<20} | {result['rate']:>9,.0f} cells/s | {result['seconds']:>7.1f} s "
                    f"| {result['memory']:>6.0f} MB",
                    flush=True,
                )
            sizes = [f"{name} {sum(f.stat().st_size for f in Path(made).glob(name)) / 1e9:.2f} GB" for name in
                     ("counts.h5ad", "store/*")]  # fmt: skip
            print(f"{size:>10,} cells | {', '.join(sizes)}")
    for step, (_, name) in list(STEPS.items())[1:]:
        few, many = (results[size, step]["memory"] for size in (n_cells // 10, n_cells))
        print(f"{name:<20} | memory x {many / few:.2f} for ten times the cells")
    ratio = results[n_cells, "read"]["rate"] / results[n_cells, "backed"]["rate"]
    print(f"Reading an epoch of the store is {ratio:.0f} times as fast as random batches from the backed AnnData.")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", type=int, default=1_000_000)
    parser.add_argument("--folder", default=tempfile.gettempdir())
    parser.add_argument("--step", choices=STEPS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.step:
        measure(arguments.step, arguments.folder, arguments.cells)
    else:
        main(arguments.cells, arguments.folder)
