"""What the head does with few cells: accuracy by seed, from a pretrained encoder and from random weights.

    SCBERT_MIRROR=... python tests/measure_heads.py heads.csv [--encoders pbmc-small random] [--heads published sound]
        [--cells 10 25 100] [--seeds 10]

Cells are those of `zheng_facs`: so many of each label are drawn from its training 70 %, another draw for each seed; 100
others of the 70 % choose the epoch, and 400 of the 30 % are named. Each training has 120 steps or more, from one head alone,
so nothing hides one that dies. Logistic regression and the majority learn from the same cells. Rows that the file has are not made again. Printed at the end: median, least and most over
seeds, and how many trainings were dead.
"""

import argparse
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd

import scbert

LABEL = "cell_type"
KEY = ["encoder", "head", "cells a label", "seed"]


def draw(adata, split, n, seed):
    """Return n training cells of each label by seed, and validation and test cells that are always the same."""
    labels, fixed = adata.obs[LABEL].astype(str), np.random.default_rng(0)
    pool = fixed.permutation([*split.train, *split.validation])
    test = fixed.permutation(split.test)[:400]
    rest = np.random.default_rng(seed + 1).permutation(pool[100:])
    chosen = pd.Series(rest).groupby(labels[rest].to_numpy()).head(n)
    return [adata[list(part)].copy() for part in (chosen, pool[:100], test)]


def train(name, head, n, seed, adata, split, shipped):
    """Fine-tune once, and return a row."""
    learn, choose, test = draw(adata, split, n, seed)
    encoder = shipped if name != "random" else scbert.ScBert(shipped.config, genes=shipped.genes, seed=seed)
    n_epochs = max(6, math.ceil(120 / math.ceil(learn.n_obs / 16)))
    recipe = replace(scbert.Recipe(until_converged=False), head=head)
    options = {"n_epochs": n_epochs, "patience": n_epochs, "recipe": recipe, "seed": seed, "companions": False}
    classifier = scbert.finetune(encoder, learn, label_key=LABEL, validation=choose, progress=False, **options)
    row = dict(zip(KEY, (name, head, n, seed), strict=True)) | {"state": classifier.outcome["state"]}
    last = classifier.history.iloc[-1]
    row |= {"training loss": last["loss"], "validation accuracy": last["val_accuracy"]}
    named = scbert.predict_proba(classifier, test).idxmax(axis=1)  # of the best epoch on validation cells
    return row | {"test accuracy": float((named == test.obs[LABEL].astype(str)).mean())}


def name_plainly(name, n, seed, adata, split):
    """Fit logistic regression or the majority on the same cells, and return a row."""
    learn, choose, test = draw(adata, split, n, seed)
    predict = scbert.methods.FITS[name](learn, choose, label_key=LABEL, seed=seed)
    named = [predict(cells).idxmax(axis=1) for cells in (choose, test)]
    right = [
        float((labels == cells.obs[LABEL].astype(str)).mean())
        for labels, cells in zip(named, (choose, test), strict=True)
    ]
    row = dict(zip(KEY, (name, "none", n, seed), strict=True))
    return row | {"state": "", "training loss": math.nan, "validation accuracy": right[0], "test accuracy": right[1]}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("--encoders", nargs="+", default=["pbmc-small", "random"])
    parser.add_argument("--heads", nargs="+", default=["published", "sound"])
    parser.add_argument("--cells", nargs="+", type=int, default=[10, 25, 100])
    parser.add_argument("--seeds", type=int, default=10)
    chosen = parser.parse_args()
    adata = scbert.datasets.load("zheng_facs")
    (split,) = scbert.protocols.split_cells(adata, "zheng_facs", label_key=LABEL, seed=0)
    shipped = scbert.load_encoder(next((name for name in chosen.encoders if name != "random"), "pbmc-small"))
    shipped.set_expressed_only(True)
    adata = scbert.preprocess.tokenize(adata, genes=shipped.genes)
    rows = pd.read_csv(chosen.file).to_dict("records") if chosen.file.exists() else []
    done = {tuple(row[name] for name in KEY) for row in rows}
    for n in chosen.cells:
        for seed in range(chosen.seeds):
            for name in ("logistic_regression", "majority"):
                if (name, "none", n, seed) not in done:
                    rows.append(name_plainly(name, n, seed, adata, split))
            for name in chosen.encoders:
                for head in chosen.heads:
                    if (name, head, n, seed) not in done:
                        rows.append(train(name, head, n, seed, adata, split, shipped))
                        pd.DataFrame(rows).round(4).to_csv(chosen.file, index=False)
                        print(rows[-1], flush=True)
    table = pd.DataFrame(rows).round(4)
    table.to_csv(chosen.file, index=False)
    by = table.groupby(KEY[:3], sort=False)
    found = by["test accuracy"].agg(["count", "median", "min", "max"]).round(3)
    print(found.assign(dead=by["state"].agg(lambda states: (states == "dead").sum())).to_string())


if __name__ == "__main__":
    main()
