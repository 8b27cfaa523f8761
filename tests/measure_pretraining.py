"""Measure what pretraining is worth with few labels, and what the expressed-genes mode saves and costs.

    python tests/measure_pretraining.py few_shot --out runs/measured
    python tests/measure_pretraining.py modes --out runs/measured

Both read the files of the small profile, want OMP_NUM_THREADS=1, and add to CSV files as they go: what is there is not
computed again.

few_shot  10, 25 and 100 cells a type of the training 70 % of zheng_facs, six methods on the same cells and genes,
          tested on its 30 %; a fifth of the cells drawn chooses the epoch, or the penalty. 15 epochs, or as many as
          make 100 steps of the optimiser, which early stopping (five epochs without a better validation score) may
          cut short: the table says how many were made. Five minutes a seed on one core, five seeds.
modes     pretraining with all genes and with expressed genes alone, for as many epochs and for as long; seconds and
          memory of a step, masked tokens of held-out cells, and 25 cells a type. Half an hour on one core. Each mode may
          run in a process of its own, at the same time (--mode); compare cpu_seconds then, and seconds only of runs
          that had a core to themselves. "--mode summary" shows what there is so far.
"""

import math
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import click
import numpy as np
import pandas as pd
import torch
from sklearn.model_selection import StratifiedShuffleSplit
from torch.nn import functional as F

import scbert
from scbert import metrics, pretraining, protocols, runner
from scbert.data.cells import CellDataset
from scbert.data.masking import mask_bins
from scbert.evaluate.methods import fit_logistic_regression, fit_majority, fit_scbert
from scbert.experiments.performance import compare, measure_peak

SIZES, N_SEEDS, LABEL, BATCH_SIZE = (10, 25, 100), 5, "cell_type", 16
METHODS = ["scbert", "pretrained_frozen", "random_frozen", "scbert_scratch", "logistic_regression", "majority"]
MODES = {"all_genes": False, "expressed": True, "expressed_as_long": True}  # mode -> expressed_only
N_RESAMPLES, N_TURNS = 1000, 31


def draw_few(labels, candidates, n_per_type, seed):
    """Return (training, validation) numbers of `n_per_type` cells of each type, of which a fifth is validation.

    A type that has fewer gives all it has, and is named.
    """
    random, labels = np.random.default_rng([seed, n_per_type]), np.asarray(labels, str)
    chosen = []
    for label in np.unique(labels[candidates]):
        own = candidates[labels[candidates] == label]
        if len(own) < n_per_type:
            print(f"{label} has {len(own)} training cells, and gives them all in place of {n_per_type}.")
        chosen += list(random.choice(own, min(n_per_type, len(own)), replace=False))
    chosen = np.sort(chosen)
    split = StratifiedShuffleSplit(1, test_size=0.2, random_state=seed)
    train, validation = next(split.split(chosen, labels[chosen]))
    return np.sort(chosen[train]), np.sort(chosen[validation])


def make_method(encoder, layers="all"):
    """Return a method, see `scbert.methods`, that fine-tunes an encoder, or one of random weights if given a config."""

    def fit(train, validation, label_key, seed):
        return fit_scbert(
            train, validation, label_key=label_key, seed=seed, encoder=encoder,
            n_epochs=max(15, math.ceil(100 / math.ceil(train.n_obs / BATCH_SIZE))),
            recipe=scbert.Recipe(trainable_layers=layers), progress=False,
        )  # fmt: skip

    return fit


def run_few_shot(methods, genes, sizes, seeds, file):
    """Add predictions of each seed, size and method to a CSV file, and how each was trained to another; return both."""
    adata = scbert.datasets.load("zheng_facs", label_key=LABEL)
    candidates, test = scbert.hygiene.load_split(adata)
    adata = scbert.preprocess.tokenize(adata, genes=genes)
    about = file.with_stem(file.stem + "_training")
    known = set()
    if file.exists():
        known = set(pd.read_csv(file)[["size", "seed", "method"]].itertuples(index=False, name=None))
    for seed in seeds:
        for size in sizes:
            train, validation = draw_few(adata.obs[LABEL], candidates, size, seed)
            protocols.check_disjoint(*(adata.obs_names[part] for part in (train, validation, test)))
            for name in (name for name in methods if (size, seed, name) not in known):
                start, cpu = time.monotonic(), time.process_time()
                parts = (adata[train].copy(), adata[validation].copy())
                predict = methods[name](*parts, label_key=LABEL, seed=seed)
                row = {"size": size, "seed": seed, "method": name, "train": len(train), "validation": len(validation)}
                row |= {"seconds": time.monotonic() - start, "cpu_seconds": time.process_time() - cpu}
                row |= {"chosen": getattr(predict, "chosen", ""), "epochs": "", "best_epoch": "", "steps": ""}
                if hasattr(predict, "classifier"):
                    history = predict.classifier.history
                    row |= {"epochs": len(history), "best_epoch": int(history.loc[history["best"], "epoch"].iloc[0])}
                    row["steps"] = len(history) * math.ceil(len(train) / BATCH_SIZE)
                found = runner.predict_cells(name, predict, adata[test].copy(), label_key=LABEL)
                found = found[["cell", "method", "truth", "predicted"]].assign(size=size, seed=seed)
                add_rows(found, file)
                add_rows(pd.DataFrame([row]), about)
                print(f"{size} cells a type, seed {seed}, {name}: {row['seconds']:.0f} s", flush=True)
    return pd.read_csv(file), pd.read_csv(about) if about.exists() else pd.DataFrame()


def add_rows(table, file):
    """Add rows to a CSV file, which gets its head with the first."""
    table.to_csv(file, mode="a", header=not file.exists(), index=False)


def score_seeds(truth, predicted, n_resamples=N_RESAMPLES):
    """Score predictions of several seeds, on all cells and on resamples of the cells, the same for each seed.

    Parameters
    ----------
    truth, predicted
        Labels as whole numbers: (cells,) and (seeds, cells).

    Returns
    -------
    Scores, (seeds, 2): accuracy and macro-F1; and (seeds, resamples, 2).
    """
    labels = np.unique(truth)
    rows = np.random.default_rng(0).integers(len(truth), size=(n_resamples, len(truth)))

    def measure(truth, predicted):
        return np.stack(
            [metrics.accuracy(truth, predicted), metrics.macro_f1(truth, predicted, labels=labels)], axis=-1
        )

    resampled = []
    for own in predicted:
        blocks = [measure(truth[block], own[block]) for block in np.array_split(rows, 10)]
        resampled.append(np.concatenate(blocks))
    return measure(np.broadcast_to(truth, predicted.shape), predicted), np.stack(resampled)


def summarise(predictions, one="scbert"):
    """Compare methods over the seeds that all of them have, size by size.

    Returns
    -------
    A row a size, method and metric: `value`, the mean over seeds, its 95 % interval `low` to `high` over test cells
    (the same resample of them for each seed), `seeds` and `n` of cells, and the least and most of a seed. Of method
    `one` minus this one, on the same cells and seeds: `difference`; its interval over cells, `cells_low` to
    `cells_high`, which is about these draws of training cells alone; over cells and seeds, both drawn again,
    `both_low` to `both_high`; and at how many seeds it is above 0, `seeds_above`.
    """
    rows, names = [], np.unique(predictions[["truth", "predicted"]].astype(str))
    for size, part in predictions.groupby("size"):
        tables = {m: p.pivot(index="seed", columns="cell", values="predicted") for m, p in part.groupby("method")}
        seeds = sorted(set.intersection(*(set(table.index) for table in tables.values())))
        if not seeds:
            continue
        cells = tables[one].columns
        truth = np.searchsorted(names, part.drop_duplicates("cell").set_index("cell")["truth"].loc[cells].astype(str))
        scores = {
            method: score_seeds(truth, np.searchsorted(names, table.loc[seeds, cells].to_numpy(str)))
            for method, table in tables.items()
        }
        chosen = np.random.default_rng(1).integers(len(seeds), size=(N_RESAMPLES, len(seeds)))
        for method in [m for m in METHODS if m in scores] + [m for m in scores if m not in METHODS]:
            each, resampled = scores[method]
            apart, apart_resampled = scores[one][0] - each, scores[one][1] - resampled  # paired by seed and cell
            both = apart_resampled[chosen, np.arange(N_RESAMPLES)[:, None]].mean(1)  # (resamples, 2)
            for number, metric in enumerate(("accuracy", "macro_f1")):
                row = {"size": size, "method": method, "metric": metric, "value": each[:, number].mean()}
                row |= find_interval("", resampled.mean(0)[:, number])
                row |= {"least": each[:, number].min(), "most": each[:, number].max()}
                row |= {"seeds": len(seeds), "n": len(truth)}
                if method != one:
                    row["difference"] = apart[:, number].mean()
                    row |= find_interval("cells_", apart_resampled.mean(0)[:, number])
                    row |= find_interval("both_", both[:, number])
                    row["seeds_above"] = int((apart[:, number] > 0).sum())
                rows.append(row)
    return pd.DataFrame(rows)


def find_interval(prefix, values):
    """Return the 95 % percentile interval under two names."""
    low, high = np.quantile(values, [0.025, 0.975])
    return {f"{prefix}low": low, f"{prefix}high": high}


def say_verdicts(summary, rivals, question):
    """Print for each size and rival whether the difference in macro-F1 stands out, cells and seeds drawn again."""
    for row in summary[(summary["metric"] == "macro_f1") & summary["method"].isin(rivals)].itertuples():
        answer = "yes" if row.both_low > 0 else "no, it was worse" if row.both_high < 0 else "not shown"
        print(
            f"{row.size} cells a type: {question} {row.method}: {answer}. Macro-F1 {row.difference:+.3f} "
            f"[{row.both_low:+.3f}, {row.both_high:+.3f}] over {row.n:,} cells and {row.seeds} seeds, above at "
            f"{row.seeds_above:.0f} of {row.seeds}; [{row.cells_low:+.3f}, {row.cells_high:+.3f}] over cells alone."
        )


def show(table):
    """Print a table whole."""
    with pd.option_context("display.width", 250, "display.max_columns", None):
        print(table.to_string(index=False, float_format=lambda value: f"{value:.4f}"), flush=True)


@click.group()
def main():
    """Measure by hand; see the head of this file."""


@main.command("few_shot")
@click.option("--out", type=click.Path(path_type=Path), default=Path("runs/measured"))
@click.option("--encoder", default="pbmc-small", show_default=True, help="A name or bundle of scbert.load_encoder.")
@click.option("--seeds", type=int, default=N_SEEDS, show_default=True)
@click.option("--size", "sizes", type=int, multiple=True, default=SIZES, show_default=True)
def few_shot(out, encoder, seeds, sizes):
    """Fine-tune on few cells a type."""
    out.mkdir(parents=True, exist_ok=True)
    encoder = scbert.load_encoder(encoder)
    methods = {
        "majority": fit_majority,
        "logistic_regression": fit_logistic_regression,
        "scbert": make_method(encoder),
        "pretrained_frozen": make_method(encoder, "head"),
        "random_frozen": make_method(encoder.config, "head"),
        "scbert_scratch": make_method(encoder.config),
    }
    predictions, training = run_few_shot(methods, encoder.genes, sizes, range(seeds), out / "few_shot.csv")
    summary = summarise(predictions)
    summary.to_csv(out / "few_shot_summary.csv", index=False)
    show(summary)
    if len(training):
        show(training)
    say_verdicts(summary, ["scbert_scratch"], "did pretraining help, all layers trained, against")
    say_verdicts(summary, ["random_frozen", "logistic_regression"], "was the pretrained model better than")
    print("One 10x run per population: run and label are confounded. The encoder met the training 70 %, unlabelled.")


def load_corpus():
    """Return the cells to learn from and those held out, tokenized: those of notebook 02, small profile."""
    learn, held_out = pretraining.join_sets(
        pretraining.load_sets("pbmc_pool + zheng_facs", label_key=LABEL), label_key=LABEL
    )
    genes = scbert.genes.choose_genes(learn, "pbmc68k_reduced 1000")
    return tuple(scbert.preprocess.tokenize(part, genes=genes) for part in (learn, held_out))


def make_encoder(mode, genes):
    """Return an encoder of the small profile's shape, of random weights."""
    config = scbert.ScBertConfig(len(genes), 5, 32, 2, 4, 16, expressed_only=MODES[mode])
    return scbert.ScBert(config, genes=genes, seed=0)


def run_mode(mode, n_epochs, learn, held_out, out):
    """Pretrain in one mode, predict masked tokens of the held-out cells, and fine-tune on 25 cells a type."""
    bundle, masks = out / mode, out / f"{mode}_masks.csv"
    if not bundle.exists():
        model, cpu = make_encoder(mode, list(learn.var_names)), time.process_time()
        history = scbert.pretrain(
            model, learn, n_epochs=n_epochs, learning_rate=0.003, batch_size=BATCH_SIZE, seed=0,
            checkpoint=out / f"{mode}.pt", progress=False,
        )  # fmt: skip
        n_steps = n_epochs * math.ceil(learn.n_obs / BATCH_SIZE)
        row = {"mode": mode, "epochs": n_epochs, "steps": n_steps, "seconds": history.attrs["seconds"]}
        row["cpu_seconds"] = math.nan if history.attrs["earlier_seconds"] else time.process_time() - cpu
        add_rows(pd.DataFrame([row]), out / "modes_training.csv")
        model.save(bundle)
        print(f"{row}\n{history.to_string()}", flush=True)
    model = scbert.load_encoder(bundle)
    if not masks.exists():
        masks.score_masks(model, held_out, masks.count_tokens(learn), seed=1).to_csv(masks)
        print(f"{mode}: masked tokens done", flush=True)
    run_few_shot({mode: make_method(model)}, model.genes, (25,), range(3), out / f"{mode}_few_shot.csv")


def make_step(mode, genes, batches):
    """Return a function that takes the next training step over the batches, as `scbert.pretrain` does."""
    model, state = make_encoder(mode, genes).train(), {"number": 0}
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)

    def step():
        bins = batches[state["number"] % len(batches)]
        state["number"] += 1
        seen, where = mask_bins(bins, model.config.mask_token, [(0, row) for row in range(len(bins))])
        loss = F.cross_entropy(model(seen, where), bins[where])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    return step


def draw_batches(learn, n_batches):
    """Return batches of training cells in random order: a list of (cells, genes + 1) tokens."""
    order, cells = np.random.default_rng(0).permutation(learn.n_obs), CellDataset(learn)
    return [cells.batch(np.sort(order[i * BATCH_SIZE : (i + 1) * BATCH_SIZE])) for i in range(n_batches)]


def measure_steps(learn):
    """Return seconds of a training step in both modes, in turn in this process, the same batches in both."""
    batches = draw_batches(learn, N_TURNS + 1)
    return compare({mode: make_step(mode, list(learn.var_names), batches) for mode in list(MODES)[:2]}, N_TURNS)


def measure_memory(mode, genes, bins):
    """Return the MB that one training step takes at most: to be called in a process of its own."""
    torch.set_num_threads(1)
    return measure_peak(make_step(mode, genes, [torch.from_numpy(bins)]))


def measure_memories(learn, n_batches=3):
    """Return the peak of a first training step, each in a fresh process: a row a batch, a column a mode."""
    rows = []
    for bins in draw_batches(learn, n_batches):
        row = {}
        for mode in list(MODES)[:2]:
            with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
                row[mode] = pool.submit(measure_memory, mode, list(learn.var_names), bins.numpy()).result()
        rows.append(row)
    return pd.DataFrame(rows)


@main.command("modes")
@click.option("--out", type=click.Path(path_type=Path), default=Path("runs/measured"))
@click.option("--epochs", type=int, default=4, show_default=True)
@click.option("--mode", type=click.Choice([*MODES, "steps", "summary"]), help="This alone.")
def modes(out, epochs, mode):
    """Pretrain with all genes, and with expressed genes alone."""
    out.mkdir(parents=True, exist_ok=True)
    learn, held_out = load_corpus()
    times = out / "modes_steps.csv"
    if not times.exists():
        measure_steps(learn).to_csv(times, index=False)
    seconds = pd.read_csv(times)
    ratio = (seconds["all_genes"] / seconds["expressed"]).median()
    n_epochs = {"all_genes": epochs, "expressed": epochs, "expressed_as_long": max(1, math.floor(epochs * ratio))}
    print(f"seconds a step {seconds.median().to_dict()}, ratio {ratio:.3f}, epochs {n_epochs}", flush=True)
    for name in [mode] if mode else MODES:
        if name in MODES:
            run_mode(name, n_epochs[name], learn, held_out, out)
    if mode in (None, "summary"):
        summarise_modes(learn, seconds, out)


def summarise_modes(learn, seconds, out):
    """Print what each mode takes and what it learns, with differences to all genes on the same cells and masks."""
    n_tokens = np.diff(learn.layers["bins"].tocsr().indptr)
    print(
        f"{learn.n_obs:,} cells to learn from, {n_tokens.mean():.0f} of {learn.n_vars} genes with a token on average, "
        f"{np.quantile(n_tokens, 0.95):.0f} at most in 95 % of them"
    )
    ratios = seconds["all_genes"] / seconds["expressed"]
    print(
        f"a step takes {ratios.median():.2f} times as long with all genes: the median of {len(ratios)} turns, half of "
        f"them from {ratios.quantile(0.25):.2f} to {ratios.quantile(0.75):.2f}"
    )
    memory = out / "modes_memory.csv"
    if not memory.exists():
        measure_memories(learn).to_csv(memory, index=False)
    print("MB of a step, above what the process took before, each in a fresh process")
    show(pd.read_csv(memory))
    show(pd.read_csv(out / "modes_training.csv"))
    done = [mode for mode in MODES if (out / f"{mode}_few_shot.csv").exists()]
    if "all_genes" not in done:
        raise ValueError(
            f"{out} has no results of all_genes, which the others are compared with: run --mode all_genes."
        )
    print(f"Measured to the end: {', '.join(done)}; not: {', '.join(set(MODES) - set(done)) or 'none'}")
    scores = {mode: pd.read_csv(out / f"{mode}_masks.csv", index_col=["cell", "token"]) for mode in done}
    sums = {mode: table.groupby("cell").sum() for mode, table in scores.items()}
    tables = []
    for mode in done:
        table = pretraining.summarise_masks(scores[mode]).reset_index()
        tables.append(table[(table["method"] == "scbert") | (mode == "all_genes")].assign(mode=mode))
        if mode == "all_genes":
            continue
        base = sums["all_genes"].query("n_masked > 0")
        own = sums[mode].loc[base.index]
        if not own["n_masked"].equals(base["n_masked"]):
            raise ValueError(f"The masks of {mode} are not those of all_genes: delete {out}, and measure both again.")
        for column, metric in (("correct", "masked_accuracy"), ("loss", "cross_entropy")):
            found = metrics.bootstrap(
                lambda part, masks, axis: part.sum(axis=axis) / masks.sum(axis=axis),
                own[column] - base[column], base["n_masked"],
            )  # fmt: skip
            row = {"method": "scbert", "metric": f"{metric}_minus_all_genes", "mode": mode} | found
            tables.append(pd.DataFrame([row]))
    masks = pd.concat(tables, ignore_index=True)
    masks.to_csv(out / "modes_masks_summary.csv", index=False)
    show(masks)
    summary = summarise(pd.concat([pd.read_csv(out / f"{mode}_few_shot.csv") for mode in done]), "all_genes")
    summary.to_csv(out / "modes_few_shot_summary.csv", index=False)
    show(summary)
    say_verdicts(summary, done[1:], "were all genes better than")


if __name__ == "__main__":
    main()
