"""Measure how fast things are that people wait for: run by hand, python tests/measure_speed.py annotate --before FOLDER.

annotate   `scbert annotate` of 20,000 cells x 2,000 genes, some 340 expressed, with a small annotator of random weights
step       a training step of the published layout on eight cells that express 500 to 1,500 of 16,906 genes
attention  FAVOR+ against exact softmax over so many expressed genes, forward and training; needs no --before

Each alternates between the package in FOLDER, such as an unpacked earlier version, and this one, on one thread, and prints
medians: CPU seconds, which other programs disturb little, and wall-clock seconds.
"""

import argparse
import functools
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import anndata
import numpy as np
import torch
from scipy import sparse
from torch.nn.functional import cross_entropy

import scbert

HERE = Path(__file__).resolve().parent.parent


def spend(command, root):
    """Run a command with the package in `root`; return what it printed, CPU seconds and wall-clock seconds."""
    settings = os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "PYTHONPATH": str(root)}
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    command = [sys.executable, *map(str, command)]
    done = subprocess.run(command, env=settings, cwd=root, text=True, stdout=subprocess.PIPE, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return done.stdout, {"cpu": cpu, "wall": time.perf_counter() - start}


def compare(measure, before, n_pairs):
    """Print medians of what ``measure(root)`` returns, numbers by name, of alternating pairs, and their ratios."""
    pairs = []
    for number in range(n_pairs):
        pairs.append((measure(before), measure(HERE)))
        print(f"pair {number + 1}:", *(json.dumps({k: round(v, 3) for k, v in one.items()}) for one in pairs[-1]))
    for name in pairs[0][0]:
        old, new = (statistics.median(pair[which][name] for pair in pairs) for which in (0, 1))
        print(f"{name}: before {old:.3f}, now {new:.3f}, {old / new:.2f} times; median of {n_pairs} pairs")


def annotate(options):
    """Time the command, of a process from start to end."""
    with tempfile.TemporaryDirectory() as folder:
        spend([__file__, "make-cells", "--folder", folder, "--cells", options.cells], options.before)

        def measure(root):
            Path(folder, "out.h5ad").unlink(missing_ok=True)
            paths = [f"{folder}/cells.h5ad", "--model", f"{folder}/bundle", "-o", f"{folder}/out.h5ad"]
            return spend(["-m", "scbert", "annotate", *paths], root)[1]

        compare(measure, options.before, options.pairs)


def make_cells(options):
    """Write cells of random counts, and an annotator of random weights; by the earlier version, which both can read."""
    random, genes = np.random.default_rng(0), [f"gene{i}" for i in range(2_000)]
    rate = random.gamma(0.3, 1, size=2_000)
    depths = np.array_split(random.lognormal(6.2, 0.4, size=options.cells), max(1, options.cells // 1_000))
    counts = [random.poisson(np.outer(depth, rate / rate.sum())).astype(np.float32) for depth in depths]
    cells = anndata.AnnData(sparse.vstack([sparse.csr_matrix(part) for part in counts]).tocsr())
    cells.var_names = genes
    cells.write_h5ad(f"{options.folder}/cells.h5ad")
    model = scbert.ScBert(scbert.ScBertConfig(2_000, 5, 32, 2, 4, 16, expressed_only=True), genes=genes)
    scbert.Classifier(model, [f"type {i}" for i in range(10)]).save(f"{options.folder}/bundle")


def step(options):
    """Time the step, in a process of its own."""
    compare(lambda root: json.loads(spend([__file__, "one-step"], root)[0]), options.before, options.pairs)


def one_step(_):
    """Print CPU seconds a cell, and the share of the rate at which torch multiplies large matrices in the same minute."""
    lengths = torch.linspace(500, 1_500, 8).int().tolist()
    config = scbert.ScBertConfig(16_906, expressed_only=True)
    model, bins = scbert.ScBert(config), draw_bins(lengths, 16_906)
    where = (bins > 0) & (torch.rand(bins.shape) < 0.15)
    inner, features = config.heads * config.dim_head, config.n_features
    a_position = (
        8 * config.dim * inner + 4 * inner * features + 4 * (inner + config.heads) * features + 16 * config.dim**2
    )
    gflop = 3 * config.depth * a_position * (sum(lengths) + 8) / 1e9  # the backward pass twice the forward pass
    square, seconds, rates = torch.randn(2_048, 2_048), [], []
    for _ in range(3):
        rates.append(2 * 2.048**3 / clock(lambda: square @ square))
        seconds.append(clock(lambda: cross_entropy(model(bins, where), bins[where]).backward()))
    seconds, rate = min(seconds), max(rates)
    print(json.dumps({"cpu_a_cell": seconds / 8, "gflop_a_second": gflop / seconds, "share": gflop / seconds / rate}))


def attention(options):
    """Print milliseconds a cell of both attentions, best of three, over lengths, at a small and the published layout."""
    torch.set_num_threads(1)
    for layout in ((32, 2, 4, 16), (200, 1, 10, 64)):
        for length in map(int, options.lengths.split(",")):
            cells, line = max(1, 2_000 // length), []
            for kind in ("favor", "softmax"):
                config = scbert.ScBertConfig(length, 5, *layout, expressed_only=True, attention=kind)
                encode = functools.partial(
                    scbert.ScBert(config).encode_expressed, draw_bins([length - 1] * cells, length)
                )
                with torch.no_grad():
                    forward = min(clock(encode) for _ in range(3)) / cells
                training = min(clock(lambda encode=encode: encode()[0].sum().backward()) for _ in range(3)) / cells
                line.append(f"{kind} {forward * 1e3:.1f} and {training * 1e3:.1f} ms")
            print(f"dim, depth, heads, dim_head {layout}, {length} positions, forward and training:", ", ".join(line))


def draw_bins(lengths, n_genes):
    """Return tokens of cells that express so many genes each."""
    bins = torch.zeros(len(lengths), n_genes + 1, dtype=torch.int64)
    for cell, n in enumerate(lengths):
        bins[cell, torch.randperm(n_genes)[:n]] = torch.randint(1, 6, (n,))
    return bins


def clock(function):
    """Return the CPU seconds that a function takes."""
    start, _ = time.process_time(), function()
    return time.process_time() - start


if __name__ == "__main__":
    commands = {"annotate": annotate, "step": step, "attention": attention}
    commands |= {"make-cells": make_cells, "one-step": one_step}  # in a process of their own, for those above
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=commands)
    parser.add_argument("--before", type=Path, help="folder in which another version of the package lies")
    for option, default in {"--pairs": 5, "--cells": 20_000}.items():
        parser.add_argument(option, type=int, default=default)
    for option, default in {"--folder": "", "--lengths": "128,256,340,512,768,1024,1536"}.items():
        parser.add_argument(option, default=default)
    commands[parser.parse_args().what](parser.parse_args())
