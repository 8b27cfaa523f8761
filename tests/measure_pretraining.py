"""Measure what pretraining is worth with few labels, and what the expressed-genes mode saves and costs.

    python tests/measure_pretraining.py few_shot --out runs/measured
    python tests/measure_pretraining.py modes --out runs/measured

Both read the files of the small profile. `few_shot`, about half an hour on one core: 10, 25 and 100 cells a type of
the training 70 % of zheng_facs, five seeds, six methods on the same cells, tested on its 30 %. `modes`, about half an
hour: pretraining with all genes and with expressed genes alone, for as many epochs and for as long, then 25 cells a
type. Predictions are added to a CSV as they come, and what is there is not computed again.
"""

import math
import time
from pathlib import Path

import click
import numpy as np
import pandas as pd
from sklearn.model_selection import StratifiedShuffleSplit

import scbert
from scbert import corpus, evaluate, probe
from scbert.performance import measure_peak
from scbert.train import F, mask_bins

SIZES, SEEDS, LABEL = (10, 25, 100), (0, 1, 2, 3, 4), "cell_type"
METHODS = ["scbert", "pretrained_frozen", "random_frozen", "scbert_scratch", "logistic_regression", "majority"]
RESAMPLES = 1000


def draw_few(labels, candidates, n_per_type, seed):
    """Return (training, validation) numbers of `n_per_type` cells of each type, of which a fifth is validation."""
    random, labels = np.random.default_rng([seed, n_per_type]), np.asarray(labels, str)
    chosen = []
    for label in np.unique(labels[candidates]):
        own = candidates[labels[candidates] == label]
        chosen += list(random.choice(own, min(n_per_type, len(own)), replace=False))
    chosen = np.sort(chosen)
    split = StratifiedShuffleSplit(1, test_size=0.2, random_state=seed)
    train, validation = next(split.split(chosen, labels[chosen]))
    return np.sort(chosen[train]), np.sort(chosen[validation])


def fit_arm(encoder, layers, name):
    """Return a method of `cross_validate`: 15 epochs, or as many as make 100 steps of the optimiser."""

    def fit(train, validation, label_key, seed):
        model = encoder if encoder is not None else scbert.ScBert(name, seed=seed)  # of random weights: its config
        n_epochs = max(15, math.ceil(100 / math.ceil(train.n_obs / 16)))
        return evaluate.fit_scbert(
            train, validation, label_key=label_key, seed=seed, encoder=model, n_epochs=n_epochs,
            recipe=scbert.Recipe(trainable_layers=layers), progress=False,
        )  # fmt: skip

    return fit


def run_few_shot(encoders, sizes, seeds, file):
    """Add the predictions of each method, size and seed to a CSV file; return all of them."""
    adata = scbert.datasets.load("zheng_facs", label_key=LABEL)
    candidates, test = scbert.hygiene.load_split(adata)
    first = next(iter(encoders.values()))
    adata = scbert.preprocess.tokenize(adata, genes=first.genes)
    methods = {"majority": evaluate.fit_majority, "logistic_regression": evaluate.fit_logistic_regression}
    for name, encoder in encoders.items():
        methods[name] = fit_arm(encoder, "all", None)
    if len(encoders) == 1:
        methods["pretrained_frozen"] = fit_arm(first, "head", None)
        methods["random_frozen"] = fit_arm(None, "head", first.config)
        methods["scbert_scratch"] = fit_arm(None, "all", first.config)
    done = pd.read_csv(file) if file.exists() else pd.DataFrame(columns=["size", "seed", "method"])
    known = set(zip(done["size"], done["seed"], done["method"], strict=True))
    for seed in seeds:
        for size in sizes:
            train, validation = draw_few(adata.obs[LABEL], candidates, size, seed)
            for name, method in methods.items():
                if (size, seed, name) in known:
                    continue
                start = time.monotonic()
                found = evaluate.cross_validate(
                    adata, {name: method}, label_key=LABEL, splits=[(train, validation, test)], seed=seed
                )
                found = found[["cell", "method", "truth", "predicted"]].assign(size=size, seed=seed)
                found.to_csv(file, mode="a", header=not file.exists(), index=False)
                print(f"{size} cells a type, seed {seed}, {name}: {time.monotonic() - start:.0f} s", flush=True)
    return pd.read_csv(file)


def summarise(predictions, one="scbert"):
    """Print mean scores over seeds, and differences to `one` with intervals over test cells, shared by all seeds."""
    names = np.unique(predictions[["truth", "predicted"]])
    for size, part in predictions.groupby("size"):
        tables = {m: p.pivot(index="cell", columns="seed", values="predicted") for m, p in part.groupby("method")}
        truth = part.drop_duplicates("cell").set_index("cell")["truth"].loc[tables[one].index]
        truth = np.searchsorted(names, truth)  # (cells,)
        codes = {m: np.searchsorted(names, table.loc[tables[one].index].to_numpy()) for m, table in tables.items()}
        rows = np.random.default_rng(0).integers(len(truth), size=(RESAMPLES, len(truth)))

        def score(method, rows, truth=truth, codes=codes):  # (resamples, 2): accuracy and macro-F1, mean over seeds
            labels, seeds = np.unique(truth), codes[method].T
            parts = [
                np.stack([(truth[rows] == p[rows]).mean(-1), evaluate.macro_f1(truth[rows], p[rows], -1, labels)], -1)
                for p in seeds
            ]
            return np.mean(parts, 0)

        whole = np.arange(len(truth))[None]
        print(
            f"\n{size} cells a type, {len(truth)} test cells, {codes[one].shape[1]} seeds: mean [95 % over cells], seeds"
        )
        resampled = {method: score(method, rows) for method in codes}
        for method in [m for m in METHODS if m in codes] + [m for m in codes if m not in METHODS]:
            each = [evaluate.macro_f1(truth, p, -1, np.unique(truth)) for p in codes[method].T]
            text = ""
            for number, metric in enumerate(("accuracy", "macro-F1")):
                value = score(method, whole)[0, number]
                low, high = np.quantile(resampled[method][:, number], [0.025, 0.975])
                text += f"{metric} {value:.3f} [{low:.3f}, {high:.3f}]  "
                if method != one:
                    difference = resampled[one][:, number] - resampled[method][:, number]
                    low, high = np.quantile(difference, [0.025, 0.975])
                    text += f"({one} minus it {score(one, whole)[0, number] - value:+.3f} [{low:+.3f}, {high:+.3f}])  "
            print(f"  {method:20s} {text} seeds " + " ".join(f"{float(value):.3f}" for value in each))


@click.group()
def main():
    """Measure by hand; see the head of this file."""


@main.command("few_shot")
@click.option("--out", type=click.Path(path_type=Path), default=Path("runs/measured"))
@click.option("--encoder", default="pbmc-small", show_default=True)
@click.option("--seeds", type=int, default=len(SEEDS), show_default=True)
def few_shot(out, encoder, seeds):
    """Fine-tune on few cells a type."""
    out.mkdir(parents=True, exist_ok=True)
    summarise(run_few_shot({"scbert": scbert.load_encoder(encoder)}, SIZES, SEEDS[:seeds], out / "few_shot.csv"))
    print("One 10x run per population: run and label are confounded. The encoder met the training 70 %, unlabelled.")


@main.command("modes")
@click.option("--out", type=click.Path(path_type=Path), default=Path("runs/measured"))
@click.option("--epochs", type=int, default=4, show_default=True)
def modes(out, epochs):
    """Pretrain with all genes, and with expressed genes alone."""
    out.mkdir(parents=True, exist_ok=True)
    learn, held_out = corpus.join_sets(corpus.load_sets("pbmc_pool + zheng_facs", label_key=LABEL), label_key=LABEL)
    genes = scbert.genes.choose_genes(learn, "pbmc68k_reduced 1000")
    learn, held_out = (scbert.preprocess.tokenize(part, genes=genes) for part in (learn, held_out))
    print(f"{np.diff(learn.layers['bins'].tocsr().indptr).mean():.0f} of {len(genes)} genes have a token, on average")
    measure_steps(learn)
    table, encoders, scores = probe.count_tokens(learn), {}, {}
    ratio = 1
    for name, expressed, factor in (("all_genes", False, 1), ("expressed", True, 1), ("expressed_as_long", True, None)):
        config = scbert.ScBertConfig(len(genes), 5, 32, 2, 4, 16, expressed_only=expressed)
        model = scbert.ScBert(config, genes=genes, seed=0)
        n_epochs = epochs if factor else max(1, round(epochs * ratio))
        history = scbert.pretrain(
            model, learn, n_epochs=n_epochs, learning_rate=0.003, seed=0, checkpoint=out / f"{name}.pt", progress=False
        )
        seconds, steps = history.attrs["seconds"], n_epochs * math.ceil(learn.n_obs / 16)
        ratio = seconds if name == "all_genes" else ratio / seconds
        print(f"{name}: {n_epochs} epochs, {seconds:.0f} s, {1e3 * seconds / steps:.0f} ms a step", flush=True)
        encoders[name], scores[name] = model, probe.score_masks(model, held_out, table, seed=1)
        summary = probe.summarise_masks(scores[name])
        print(summary.loc["scbert"].round(4).to_string(), flush=True)
    base = scores["all_genes"].groupby("cell").sum()
    for name in list(encoders)[1:]:
        own = scores[name].groupby("cell").sum().loc[base.index]
        for column in ("correct", "loss"):
            found = evaluate.bootstrap(
                lambda part, masks, axis: part.sum(axis=axis) / masks.sum(axis=axis),
                own[column] - base[column], base["n_masked"],
            )  # fmt: skip
            print(f"{name} minus all_genes, {column} a mask: {found}")
    summarise(run_few_shot(encoders, (25,), SEEDS[:3], out / "modes.csv"), "all_genes")


def measure_steps(learn, n_turns=15):
    """Print the time of a training step in either mode, in turn in one process, and its peak of memory."""
    steps = {}
    bins, _ = scbert.cells.CellDataset(learn).batch(np.arange(0, learn.n_obs, learn.n_obs // 16)[:16])
    for name in ("all_genes", "expressed"):
        config = scbert.ScBertConfig(learn.n_vars, 5, 32, 2, 4, 16, expressed_only=name == "expressed")
        model = scbert.ScBert(config, seed=0)
        seen, where = mask_bins(bins, config.mask_token, 0)

        def step(model=model, seen=seen, where=where):
            model.zero_grad()
            F.cross_entropy(model(seen, where), bins[where]).backward()

        steps[name] = step
    times = scbert.performance.compare(steps, n_turns)
    peaks = {name: round(measure_peak(step)) for name, step in steps.items()}
    ratios = times["all_genes"] / times["expressed"]
    print(f"a step, median of {n_turns} turns: {times.median().round(4).to_dict()} s, ratio {ratios.median():.2f}")
    print(f"ratios from {ratios.min():.2f} to {ratios.max():.2f}; peak memory above the weights {peaks} MB", flush=True)


if __name__ == "__main__":
    main()
