"""Which annotator a newcomer should get: trained on one study, tried on studies it never saw, beside logistic regression.

    SCBERT_MIRROR=... python tests/measure_studies.py studies.csv [arm ...]

Each arm is a choice of encoder, genes and reading mode for `scbert.finetune` as notebook 03 calls it. The pairs of `CHOOSE`
may choose a default; those of `REPORT` (the Kang study, ctrl and stim) may not. Labels are compared at the level of
``cell_type_broad``, and with CD4 and CD8 T cells as one ("coarse": the labels of `pbmc68k_reduced` tell them apart by
correlation, at a depth that hardly can), over the query's cells whose type the reference has. Notebook 03 keeps "random weights" or "own pretraining", whichever
reaches the higher macro-F1 on validation cells, and so does the last table. Rows that the file holds already are not
made again.
"""

import contextlib
import io
import sys
import time
import warnings
from dataclasses import replace
from functools import cache
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
from measure_queries import read_kang

import scbert
from scbert import metrics
from scbert.data.preprocess import library_size, thin_counts

CHOOSE = [
    ("zheng_facs", "pbmc3k"),
    ("zheng_facs", "pbmc68k_reduced"),
    ("pbmc68k_reduced", "pbmc3k"),
    ("pbmc_3tech:3pv2", "pbmc_3tech:5p"),
]
REPORT = [(one, f"kang:{other}") for one in ("zheng_facs", "pbmc68k_reduced") for other in ("ctrl", "stim")]
# arm: encoder ("" for random weights), genes chosen on training cells, genes that enter, epochs at most, thinning, class
# weights, epochs of pretraining on the training cells
ARMS = {
    "random weights": ("", "1000", "expressed", 12, 0.2, "balanced", 0),
    "own pretraining": ("", "1000", "expressed", 12, 0.2, "balanced", 12),
    "pbmc-small, as it was pretrained": ("pbmc-small", "", "all", 6, 1.0, None, 0),
    "random weights, not balanced": ("", "1000", "expressed", 12, 0.2, None, 0),
    "pbmc-small, expressed, thinned, balanced": ("pbmc-small", "", "expressed", 12, 0.2, "balanced", 0),
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


def split(reference: str, seed: int):
    """Return training and validation cells, split as notebook 03 does."""
    cells = scbert.protocols.drop_rare(read(reference), label_key="type", minimum=8)
    name = reference if reference == "zheng_facs" else ""
    sides = scbert.protocols.split_cells(cells, name, label_key="type", seed=seed)[0]
    return cells[list(sides.train)].copy(), cells[list(sides.validation)].copy()


def train(reference: str, arm: str, seed: int):
    """Fine-tune as notebook 03 does; return the classifier."""
    encoder, genes, enter, n_epochs, thin, weight, pretrain_epochs = ARMS[arm]
    learn, choose = split(reference, seed)
    model = scbert.load_encoder(encoder) if encoder else None
    vocabulary = model.genes if model else scbert.genes.choose_genes(learn, genes)
    if not model:
        config = scbert.ScBertConfig(len(vocabulary), dim=32, depth=2, heads=4, dim_head=16)
        model = scbert.ScBert(replace(config, expressed_only=enter == "expressed"), seed=seed)
    model.set_expressed_only(enter == "expressed")
    learn, choose = (scbert.preprocess.tokenize(part, genes=vocabulary) for part in (learn, choose))
    if pretrain_epochs:
        scbert.pretrain(model, learn, n_epochs=pretrain_epochs, learning_rate=3e-3, seed=seed, progress=False)
    options = {"label_key": "type", "n_epochs": n_epochs, "seed": seed, "progress": False}
    recipe = scbert.Recipe(thin=thin, class_weight=weight)
    return scbert.finetune(model, learn, validation=choose, recipe=recipe, **options)


@cache
def train_regression(reference: str, seed: int, genes: tuple[str, ...]):
    """Fit logistic regression on scBERT's terms: balanced classes, the training cells and three thinned copies of them."""
    learn, choose = (scbert.preprocess.tokenize(part, genes=list(genes)) for part in split(reference, seed))
    random, copies = np.random.default_rng(seed), [learn]
    for i in range(3):
        x, totals = thin_counts(learn.X.tocsr(), library_size(learn), 0.2, random)
        obs = learn.obs.assign(n_counts=np.maximum(totals, np.asarray(x.sum(1)).ravel()))
        copy = anndata.AnnData(x.astype(np.float32), obs.set_axis(f"{i}-" + obs.index), learn.var[[]])
        copies.append(copy[np.asarray(x.sum(1)).ravel() > 0].copy())
    every = anndata.concat(copies, join="inner")
    options = {"label_key": "type", "class_weight": "balanced", "seed": seed}
    return scbert.methods.fit_logistic_regression(every, choose, **options)


def score(classifier, regression, broad: dict[str, str], query):
    """Yield a row a method: accuracy and macro-F1 at both levels, and the share that is Unassigned."""
    query = query.copy()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scbert.annotate(query, classifier, unassigned_below=0.5)
    kept = query.obs["broad"].isin(set(broad.values())).to_numpy()
    truth = query.obs["broad"].to_numpy(str)[kept]
    sizes = pd.Series(classifier.memory["class_counts"].numpy(), [broad[name] for name in classifier.labels])
    commonest = sizes.groupby(level=0).sum().idxmax()
    called = {"majority": np.full(len(truth), commonest)}
    named = {name: query.obs[f"scbert_{name}"] for name in ("logistic_regression", "nearest_centroid", "consensus")}
    named["scbert"] = query.obsm["scbert_probabilities"].set_axis(classifier.labels, axis=1).idxmax(axis=1)
    tokens = scbert.preprocess.tokenize(query.copy(), genes=classifier.genes)
    named["regression_thinned"] = regression(tokens).idxmax(axis=1)
    for method, labels in named.items():
        called[method] = np.array([broad.get(name, "none") for name in labels.to_numpy(object)[kept]])
    for method, names in called.items():
        row = {"method": method, "n": len(truth)}
        for level, change in (("", {}), ("coarse_", {"CD4 T cell": "T cell", "CD8 T cell": "T cell"})):
            here, there = (np.array([change.get(name, name) for name in part]) for part in (truth, names))
            row[f"{level}accuracy"] = metrics.accuracy(here, there)
            row[f"{level}macro_f1"] = metrics.macro_f1(here, there, labels=np.unique(here))
        unassigned = (query.obs["scbert_cell_type"] == "Unassigned").mean() if method == "scbert" else np.nan
        yield row | {"unassigned": unassigned}


def choose_arm(rows: pd.DataFrame):
    """Return the rows of the arm that notebook 03 keeps, of each reference and seed, grouped by pair and method."""
    both = rows[rows["arm"].isin(["random weights", "own pretraining"])].sort_values(
        "arm", ascending=False, kind="stable"
    )
    best = both.groupby(["reference", "seed"])["val_macro_f1"].transform("max") == both["val_macro_f1"]
    kept = both[best].drop_duplicates(["reference", "query", "seed", "method"])
    return kept.groupby(["reference", "query", "method"], sort=False)


def main():
    """Train what is missing, and print the table."""
    path, arms = Path(sys.argv[1]), sys.argv[2:] or list(ARMS)
    done = pd.read_csv(path) if path.exists() else pd.DataFrame(columns=["reference", "arm", "seed"])
    pairs = pd.DataFrame(CHOOSE + REPORT, columns=["reference", "query"])
    for seed in SEEDS:
        for arm in arms:
            for reference, queries in pairs.groupby("reference", sort=False)["query"]:
                if ((done["reference"] == reference) & (done["arm"] == arm) & (done["seed"] == seed)).any():
                    continue
                start = time.process_time()
                with contextlib.redirect_stdout(io.StringIO()):
                    classifier = train(reference, arm, seed)
                seconds, rows = time.process_time() - start, []
                regression = train_regression(reference, seed, tuple(classifier.genes))
                cells = read(reference).obs
                broad = dict(zip(cells["type"], cells["broad"], strict=True))
                for query in queries:
                    about = {
                        "reference": reference,
                        "query": query,
                        "arm": arm,
                        "seed": seed,
                        "seconds": round(seconds),
                    }
                    best = classifier.history.query("best")
                    about |= {name: best[name].item() for name in ("val_accuracy", "val_macro_f1")}
                    rows += [about | row for row in score(classifier, regression, broad, read(query))]
                done = pd.concat([done, pd.DataFrame(rows)], ignore_index=True)
                done.to_csv(path, index=False)
                print(arm, reference, seed, round(seconds), flush=True)
    columns = ["accuracy", "macro_f1", "coarse_accuracy", "coarse_macro_f1", "unassigned"]
    print(done.groupby(["reference", "query", "arm", "method"], sort=False)[columns].mean().round(3).to_string())
    print("As notebook 03 chooses\n" + choose_arm(done)[columns].agg(["mean", "min", "max"]).round(3).to_string())


if __name__ == "__main__":
    main()
