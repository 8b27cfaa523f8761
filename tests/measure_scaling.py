"""What more cells and a wider encoder are worth with few labels: the lead of scBERT over random weights and over a line.

    SCBERT_MIRROR=... python tests/measure_scaling.py scaling.csv encoders/ [--minutes 60] [--plan]

Encoders of three widths (`WIDTHS`) are pretrained on 0 (random weights), 1,000, 3,000, 9,000 or all cells of the pool of
notebook 02's large profile, the 1,000 published genes that vary most in it, `VISITS` cells seen by each whatever the pool;
the cells of fewer are among those of more. Each is then fine-tuned, with the sound head, all layers, on 10 and 25 cells of
each label of two sets: `zheng_facs` (its training 70 %) and `kang_pbmc` (six donors); 100 other cells choose the epoch,
and 400 test cells are named (of the 30 %, and of the two donors who are in no pool). Logistic regression on the same cells
and genes, its penalty and strength chosen on the same 100, stands beside. Another draw and another head for each seed.

`PLAN` says what is run, and in which order: the points that answer most come first. An encoder or a row that is there is
not made again, so the work goes on another day; `--minutes` ends it after the first row beyond. `--plan` counts what is
left, and its hours from those that were run.
"""

import argparse
import itertools
import math
import time
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from measure_heads import LABEL, draw

import scbert
from scbert import methods, pretraining

POOL = (
    "kang_pbmc + zheng_facs + zheng_pbmc14k + pbmc_pool + pool_kang_extra + pool_pbmc_10studies + pool_malt + "
    "pool_pbmc_pisces + pool_293t + pool_fetal_thymus"
)
SETS, LABELS, WIDTHS, VISITS = ("zheng_facs", "kang_pbmc"), (10, 25), (32, 64, 16), 100_000
EVERY = 10**9  # of the pool
SIZES = (0, EVERY, 9_000, 3_000, 1_000)
PLAN = [(32, size) for size in SIZES] + [(width, size) for width in (64, 16) for size in (0, EVERY, 9_000)]
LEFT_OUT = [point for point in itertools.product(WIDTHS, SIZES) if point not in PLAN]
KEY = ["set", "cells a label", "seed", "width", "cells"]


def load_pool():
    """Return the pool's training and held-out cells on the 1,000 genes, tokenized."""
    sets = pretraining.load_sets(POOL, label_key=LABEL)
    learn, held_out = pretraining.join_sets(sets, label_key=LABEL, genes="published 1000")
    genes = scbert.genes.choose_genes(learn, "published 1000")
    return [scbert.preprocess.tokenize(adata, genes=genes) for adata in (learn, held_out)]


def make_encoder(width, size, seed, genes, folder, pool):
    """Return the encoder of a point, pretrained if it is not in the folder yet; `pool` is called if it is needed.

    Random weights are others for each seed; of pretrained encoders there is one.
    """
    config = scbert.ScBertConfig(len(genes), dim=width, depth=2, heads=width // 8, dim_head=16, expressed_only=True)
    if not size:
        return scbert.ScBert(config, genes=genes, seed=seed)
    path = folder / f"width-{width}-cells-{'all' if size == EVERY else size}"
    if not path.exists():
        learn, held_out = pool()
        cells = np.sort(np.random.default_rng(0).permutation(learn.n_obs)[:size])
        measured = np.random.default_rng(1).permutation(held_out.n_obs)[:600]
        encoder = scbert.ScBert(config, genes=genes, seed=0)
        options = {"n_epochs": max(1, round(VISITS / len(cells))), "learning_rate": 0.003, "seed": 0, "progress": False}
        history = scbert.pretrain(
            encoder, learn[cells].copy(), validation=held_out[measured].copy(),
            checkpoint=folder / f"{path.name}.pt", **options,
        )  # fmt: skip
        history.to_csv(folder / f"{path.name}.csv", index=False)
        encoder.save(path)
    return scbert.load_encoder(str(path))


def draw_known(adata, name, n, seed):
    """Return what `measure_heads.draw` does, without validation cells of a label that was not drawn."""
    (split,) = scbert.protocols.split_cells(adata, name, label_key=LABEL, seed=0)
    learn, choose, test = draw(adata, split, n, seed)
    return learn, choose[choose.obs[LABEL].isin(set(learn.obs[LABEL]))].copy(), test


def measure(parts, encoder, seed):
    """Return accuracy on the test cells, of scBERT or, without an encoder, of logistic regression; and CPU seconds."""
    learn, choose, test = parts
    start = time.process_time()
    if encoder is None:
        named, state = methods.fit_logistic_regression(learn, choose, label_key=LABEL, seed=seed)(test), "converged"
    else:
        n_epochs = max(6, math.ceil(180 / math.ceil(learn.n_obs / 16)))
        options = {"n_epochs": n_epochs, "patience": n_epochs, "seed": seed, "companions": False, "progress": False}
        classifier = scbert.finetune(encoder, learn, label_key=LABEL, validation=choose, **options)
        named, state = scbert.predict_proba(classifier, test), classifier.outcome["state"]
    right = (named.idxmax(axis=1) == test.obs[LABEL].astype(str)).to_numpy()
    return {"test accuracy": right.mean(), "state": state, "seconds": round(time.process_time() - start, 1),
            "right": "".join(map(str, right.astype(int)))}  # fmt: skip


def plan_rows(seeds):
    """Return the keys of all rows, those that answer most first; width 0 is logistic regression."""
    points = [(0, 0), *PLAN]
    return [(name, n, seed, *point) for point in points for n in LABELS for seed in range(seeds) for name in SETS]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--minutes", type=float, default=math.inf)
    parser.add_argument("--plan", action="store_true")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    rows = pd.read_csv(chosen.file, dtype={"right": str}).to_dict("records") if chosen.file.exists() else []
    done = {tuple(row[name] for name in KEY) for row in rows}
    left = [key for key in plan_rows(chosen.seeds) if key not in done]
    if chosen.plan:
        seconds = np.mean([row["seconds"] for row in rows if row["width"]] or [np.nan])
        print(f"{len(left)} rows are left, some {sum(key[3] > 0 for key in left) * seconds / 3600:.1f} hours of one core, "
              f"and {len(PLAN)} encoders; left out: {LEFT_OUT}")  # fmt: skip
        return
    chosen.folder.mkdir(parents=True, exist_ok=True)
    kept, listed = [], chosen.folder / "genes.txt"

    def pool():
        kept.extend([] if kept else load_pool())
        return kept

    if not listed.exists():
        listed.write_text("\n".join(pool()[0].var_names) + "\n")
    genes, start, cells, encoders = listed.read_text().split(), time.monotonic(), {}, {}
    for key in left:
        name, n, seed, width, size = key
        if name not in cells:
            cells[name] = scbert.preprocess.tokenize(scbert.datasets.load(name, label_key=LABEL), genes=genes)
        if width and (not size or (width, size) not in encoders):
            encoders[width, size] = make_encoder(width, size, seed, genes, chosen.folder, pool)
        found = measure(draw_known(cells[name], name, n, seed), encoders.get((width, size)), seed)
        rows.append(dict(zip(KEY, key, strict=True)) | found)
        pd.DataFrame(rows).round(4).to_csv(chosen.file, index=False)
        print(key, {k: v for k, v in found.items() if k != "right"}, flush=True)
        if time.monotonic() - start > 60 * chosen.minutes:
            break


if __name__ == "__main__":
    main()
