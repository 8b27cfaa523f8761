"""Which annotator a newcomer should get: trained on one study, tried on studies it never saw, beside logistic regression.

    SCBERT_MIRROR=... python tests/measure_studies.py studies.csv [arm ...]

Each arm is a choice of encoder, genes and reading mode for `scbert.finetune` as notebook 03 calls it. The pairs of `CHOOSE`
may choose a default; those of `REPORT` (the Kang study, ctrl and stim) may not. Labels are compared at the level of
``cell_type_broad``, over the query's cells whose type the reference has. Rows that the file holds already are not made again.
"""

import contextlib
import io
import sys
import time
import warnings
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pandas as pd
from measure_queries import read_kang

import scbert
from scbert import metrics

CHOOSE = [
    ("zheng_facs", "pbmc3k"),
    ("zheng_facs", "pbmc68k_reduced"),
    ("pbmc68k_reduced", "pbmc3k"),
    ("pbmc_3tech:3pv2", "pbmc_3tech:5p"),
]
REPORT = [(one, f"kang:{other}") for one in ("zheng_facs", "pbmc68k_reduced") for other in ("ctrl", "stim")]
# arm: encoder ("" for random weights), genes chosen on training cells, genes that enter, epochs of pretraining on them, of
# fine-tuning at most
ARMS = {
    "pbmc-small": ("pbmc-small", "", "all", 0, 6),
    "pbmc-small, expressed": ("pbmc-small", "", "expressed", 0, 6),
    "scratch 1000": ("", "1000", "all", 0, 6),
    "scratch 1000, expressed": ("", "1000", "expressed", 0, 6),
    "scratch 2000, expressed": ("", "2000", "expressed", 0, 6),
    "own 1000, expressed": ("", "1000", "expressed", 6, 6),
    "scratch 1000, expressed, 20": ("", "1000", "expressed", 0, 20),
    "scratch 2000, expressed, 20": ("", "2000", "expressed", 0, 20),
}
SEEDS = range(3)
EXTRA = {"Haematopoietic stem cell": "Progenitor"}  # named otherwise in another set


@cache
def read(name: str):
    """Return cells with ``obs["type"]``, the finest label, and ``obs["broad"]``."""
    name, _, part = name.partition(":")
    if name == "kang":
        return read_kang(part)
    cells = scbert.datasets.load(name)
    cells.obs["type"] = cells.obs["cell_type"].astype(str)
    cells.obs["broad"] = cells.obs["cell_type_broad"].astype(str).replace(EXTRA)
    return cells[cells.obs["batch"] == part].copy() if part else cells


def train(reference: str, arm: str, seed: int):
    """Fine-tune as notebook 03 does; return the classifier and what each of its labels is at the broad level."""
    encoder, genes, enter, pretrain_epochs, n_epochs = ARMS[arm]
    cells = scbert.protocols.drop_rare(read(reference), label_key="type", minimum=8)
    split = scbert.protocols.split_cells(cells, reference if reference == "zheng_facs" else "", label_key="type", seed=seed)[0]
    learn, choose = (cells[list(part)].copy() for part in (split.train, split.validation))
    model = scbert.load_encoder(encoder) if encoder else None
    vocabulary = model.genes if model else scbert.genes.choose_genes(learn, genes if learn.n_vars > int(genes) else "all")
    if not model:
        config = scbert.ScBertConfig(len(vocabulary), dim=32, depth=2, heads=4, dim_head=16)
        model = scbert.ScBert(replace(config, expressed_only=enter == "expressed"), seed=seed)
    model.set_expressed_only(enter == "expressed")
    learn, choose = (scbert.preprocess.tokenize(part, genes=vocabulary) for part in (learn, choose))
    if pretrain_epochs:
        scbert.pretrain(model, learn, n_epochs=pretrain_epochs, learning_rate=3e-3, seed=seed, progress=False)
    classifier = scbert.finetune(
        model, learn, label_key="type", validation=choose, n_epochs=n_epochs, seed=seed, progress=False
    )
    return classifier, dict(zip(cells.obs["type"], cells.obs["broad"], strict=True))


def score(classifier, broad: dict[str, str], query):
    """Yield a row a method: accuracy and macro-F1 at the broad level, and the share that is Unassigned."""
    query = query.copy()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scbert.annotate(query, classifier, unassigned_below=0.5)
    kept = query.obs["broad"].isin(set(broad.values())).to_numpy()
    truth = query.obs["broad"].to_numpy(str)[kept]
    best = query.obsm["scbert_probabilities"].idxmax(axis=1)
    named = {"scbert": best, "majority": pd.Series(truth[0], query.obs_names)}
    sizes = pd.Series(classifier.memory["class_counts"].numpy(), [broad[name] for name in classifier.labels])
    commonest = sizes.groupby(level=0).sum().idxmax()
    for method in ("logistic_regression", "nearest_centroid", "consensus"):
        named[method] = query.obs[f"scbert_{method}"].astype(object).where(lambda c: c.notna(), "none")
    for method, labels in named.items():
        called = np.array([broad.get(name, "none") for name in labels.to_numpy(object)[kept]])
        if method == "majority":
            called = np.full(len(truth), commonest)
        yield {
            "method": method, "n": len(truth), "accuracy": metrics.accuracy(truth, called),
            "macro_f1": metrics.macro_f1(truth, called, labels=np.unique(truth)),
            "unassigned": (query.obs["scbert_cell_type"] == "Unassigned").mean() if method == "scbert" else np.nan,
        }  # fmt: skip


def main():
    """Train what is missing, and print the table."""
    path, arms = Path(sys.argv[1]), sys.argv[2:] or list(ARMS)
    done = pd.read_csv(path) if path.exists() else pd.DataFrame(columns=["reference", "arm", "seed"])
    pairs = pd.DataFrame(CHOOSE + REPORT, columns=["reference", "query"])
    for arm in arms:
        for seed in SEEDS:
            for reference, queries in pairs.groupby("reference", sort=False)["query"]:
                if ((done["reference"] == reference) & (done["arm"] == arm) & (done["seed"] == seed)).any():
                    continue
                start = time.process_time()
                with contextlib.redirect_stdout(io.StringIO()):
                    classifier, broad = train(reference, arm, seed)
                seconds, rows = time.process_time() - start, []
                for query in queries:
                    about = {"reference": reference, "query": query, "arm": arm, "seed": seed, "seconds": round(seconds)}
                    about["val_accuracy"] = classifier.history.query("best")["val_accuracy"].item()
                    rows += [about | row for row in score(classifier, broad, read(query))]
                done = pd.concat([done, pd.DataFrame(rows)], ignore_index=True)
                done.to_csv(path, index=False)
                print(arm, reference, seed, round(seconds), flush=True)
    mean = done.groupby(["reference", "query", "arm", "method"], sort=False)[["accuracy", "macro_f1", "unassigned"]].mean()
    print(mean.round(3).to_string())


if __name__ == "__main__":
    main()
