"""Notebook 04, and what several notebooks share: the choice of methods and encoder, and tables of a benchmark's levels."""

import copy
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from itertools import chain
from typing import TYPE_CHECKING

import anndata
import numpy as np
import pandas as pd
from lightning_fabric import Fabric
from scipy import stats

from ..evaluate import metrics, significance
from ..evaluate.methods import FITS, check_methods, fit_neighbours, fit_rebalanced, fit_scbert
from ..evaluate.protocols import Split
from ..evaluate.tuning import fit_on_all, fit_tuned
from ..model.config import ScBertConfig
from ..model.encoder import ScBert
from ..sources.genes import is_published, rename_genes
from ..sources.weights import load_encoder
from ..train.recipe import Recipe

if TYPE_CHECKING:
    from ..run.record import Run

COMPARED = ["value", "low", "high", "n", "t_p_holm", "wilcoxon_p_holm", "wilcoxon_p_smallest", "verdict"]
"""Columns of `scbert.significance.compare_all` that `say_comparison` shows."""
QUOTED = re.compile(r"""(?:(?<=[,;|])|^)\s*(['"])(.+?)\1\s*(?=[,;|]|$)""")
"""A label in quotes, alone between separators."""
SIZE_OF_RARE = "reference cells of the rare type"
"""The sizes in a table of `score_rare`."""


def choose_encoder(
    encoder: str, adata: anndata.AnnData, *, least: float = 0.5
) -> tuple[anndata.AnnData, ScBert | ScBertConfig, str | list]:
    """Return the data, where scBERT starts on them, and the genes that all methods then read.

    The `encoder` is named as in `scbert.load_encoder`, and is of use if the data have at least the share `least` of its
    genes. For published weights the data's genes are renamed. If `encoder` is empty or of no use, scBERT starts from
    the shape of a small one, to be pretrained on the training cells of each split, and reads the 1,000 most variable
    genes, or all if there are fewer, see `scbert.genes.choose_genes`.

    A pretrained encoder reads what it was pretrained on, all genes or those that a cell expresses only; a new shape reads the
    latter (`ScBertConfig.expressed_only`). It is on the device that trains.
    """
    if encoder:
        pretrained = load_encoder(encoder)
        if is_published(pretrained.genes):
            adata = rename_genes(adata, pretrained.genes)
        share = adata.var_names.isin(pretrained.genes).sum() / len(pretrained.genes)
        print(f"{share:.0%} of the {len(pretrained.genes):,} genes of {encoder} are in the data", end="")
        if share >= least:
            print()
            return adata, pretrained.to(Fabric(devices=1).device), list(pretrained.genes)
        print(": too few, so scBERT is pretrained on the training cells of each split instead")
    n_genes = min(1000, adata.n_vars)
    return adata, shape_small(n_genes), str(n_genes)


def shape_small(n_genes: int) -> ScBertConfig:
    """Return the shape of a small encoder, that of `pbmc-small`: for a laptop, reading the genes that a cell expresses."""
    return ScBertConfig(n_genes, dim=32, depth=2, heads=4, dim_head=16, expressed_only=True)


def choose_methods(names: str, encoder: ScBert | ScBertConfig, *, n_epochs: int = 6) -> dict[str, Callable]:
    """Return name -> fit of the methods named, with blanks between: a notebook's parameter `methods`.

    Majority, logistic regression and scBERT are among them, named or not: a table without them says little.

    - Any of `scbert.methods.FITS`; a ValueError if one is unknown, or its package is not installed;
    - "scbert", from the encoder of `choose_encoder`, or pretrained for `n_epochs` on the training cells if that is a shape;
    - "scbert_scratch", of the same shape, from random weights;
    - "scbert_tuned", as "scbert", with learning rate and layers that validation cells choose among eight settings;
    - "knn_scbert", the labels of the nearest cells in the encoder's space, nothing trained (`scbert.methods.fit_neighbours`);
    - "scbert_published", as "scbert" under `Recipe.published()`, in at least 15 epochs, of which its learning rate takes
      five to rise; from the published weights with the script's batches, rate and patience, in at most 40 epochs, two cycles
      of its learning rate, and frozen layers run once a cell: features are not redrawn, nor stabilised by the batch;
    - "scbert_letter", the same as the script has it, in at most 100 epochs, and nothing kept.

    But for these two, published weights are trained on in the mode ``expressed_only``, in a twentieth of the time. There
    are `n_epochs` passes over the training cells, at least: few cells get more, until 30 optimiser steps for each.
    """
    config = encoder if isinstance(encoder, ScBertConfig) else encoder.config
    start = {"encoder": encoder, "pretrain_epochs": n_epochs if encoder is config else 0}
    train = partial(fit_scbert, n_epochs=n_epochs, min_steps=30 * n_epochs)
    published = partial(fit_scbert, n_epochs=max(n_epochs, 15), recipe=Recipe.published(), **start)
    letter = partial(published, n_epochs=100)
    if encoder is not config and is_published(encoder.genes):
        train = partial(train, learning_rate=1e-4)  # what the published weights were tuned at
        letter = partial(letter, patience=10, batch_size=3, accumulate=60, learning_rate=1e-4)
        frozen = replace(Recipe.published(), redraw_features=False, key_stabiliser="head")
        published = partial(letter, n_epochs=40, recipe=frozen, cache="float16")
        start["encoder"], config = read_expressed(encoder), replace(config, expressed_only=True)
    vectors = encoder.pos_emb.emb.weight[:-1].cpu() if config.gene_embedding == "frozen" else None
    own = {
        "scbert": partial(train, **start),
        "scbert_scratch": partial(train, encoder=config if vectors is None else ScBert(config, gene_vectors=vectors)),
        "scbert_tuned": partial(fit_tuned, fit=partial(train, **start)),
        "knn_scbert": partial(fit_neighbours, space=encoder),
        "scbert_published": published,
        "scbert_letter": letter,
    }
    chosen = list(dict.fromkeys(names.split()))
    if "knn_scbert" in chosen and encoder is config:
        raise ValueError("knn_scbert needs an encoder that is pretrained before: name one in the parameter encoder.")
    chosen = [name for name in ("majority", "logistic_regression", "scbert") if name not in chosen] + chosen
    check_methods(chosen, also=tuple(own))
    return {name: (FITS | own)[name] for name in chosen}


def read_expressed(encoder: ScBert) -> ScBert:
    """Return a copy of an encoder that reads the genes that a cell expresses only, to be trained on in this mode."""
    encoder = copy.deepcopy(encoder)
    encoder.set_expressed_only(True)
    return encoder


def add_remedies(methods: dict[str, Callable]) -> dict[str, Callable]:
    """Return the methods, and for scBERT and logistic regression among them three remedies for unequal classes.

    Those of `scbert.methods.rebalance`, as "scbert:class_weight", "scbert:subsample" and "scbert:oversample".
    """
    more = {}
    for name in ("scbert", "logistic_regression"):
        if name in methods:
            weight = {"recipe": Recipe(class_weight="balanced")} if name == "scbert" else {"class_weight": "balanced"}
            more[f"{name}:class_weight"] = partial(methods[name], **weight)
            for how in ("subsample", "oversample"):
                more[f"{name}:{how}"] = partial(fit_rebalanced, fit=methods[name], how=how)
    return methods | more


def share_work(
    chosen: dict[str, Callable],
    folds: Sequence[Split],
    smaller: Sequence[Split],
    uneven: Sequence[Split],
    n_common: int,
) -> list[tuple[list[Split], dict[str, Callable]]]:
    """Return which methods run on which splits of notebook 04: all on the folds, costly recipes nowhere else.

    With few cells of each label ("few:10") all learn by `scbert.tuning.fit_on_all`, "scbert_tuned" among them. Where references
    are uneven there is no "scbert_scratch" and, but for the level of equally many, `n_common`, there are remedies.
    """
    costly = ("scbert_published", "scbert_letter", "scbert_tuned")
    base = {name: fit for name, fit in chosen.items() if name not in costly}
    few = {name: partial(fit_on_all, fit=fit) for name, fit in chosen.items() if name not in costly[:2]}
    pair = {name: fit for name, fit in base.items() if name != "scbert_scratch"}
    work, even = [(folds, chosen, ""), (smaller, base, "reference:"), (smaller, few, "few:")], f"imbalance:{n_common}"
    shares = [([split for split in splits if split.protocol.startswith(start)], fits) for splits, fits, start in work]
    shares.append(([split for split in uneven if split.protocol == even], pair))
    return [*shares, ([split for split in uneven if split.protocol != even], add_remedies(pair))]


def leave_out_dead(run: "Run", predictions: pd.DataFrame, costs: pd.DataFrame) -> pd.DataFrame:
    """Leave out the splits on which a training of scBERT has not learnt, for all methods, and say how many those are.

    Both tables are from `scbert.runner.run`. Where all splits of a level are such, they stay: that is then its result. A
    warning on record tells, for each method and level, the accuracy with its dead trainings and without them.
    """
    trained = costs.reindex(columns=pd.Index([*costs, "state", "attempts"]).unique()).dropna(subset="state")
    counts = trained["state"].value_counts().reindex(["converged", "unfinished", "guessing", "dead"], fill_value=0)
    print(f"{len(trained)} trainings of scBERT: {', '.join(f'{n} {state}' for state, n in counts.items())}; "
          f"{(trained['attempts'] > 1).sum()} needed another head")  # fmt: skip
    level, dead = ["data", "protocol"], trained[trained["state"] == "dead"]
    split = [*level, "repeat", "fold"]
    is_dead = predictions[split].merge(dead[split].drop_duplicates(), how="left", indicator="of")["of"] == "both"
    is_dead = is_dead.set_axis(predictions.index)
    kept = predictions[~is_dead | is_dead.groupby([predictions[name] for name in level]).transform("all")]
    for (data, protocol, method), rows in dead.groupby([*level, "method"], sort=False):
        own = f"data == {data!r} and protocol == {protocol!r} and method == {method!r}"
        with_dead, without = (part.query(own).eval("truth == predicted").mean() for part in (predictions, kept))
        run.warn(
            f"{len(rows)} trainings of {method} on {name_level(data, protocol)} have not learnt; accuracy "
            f"{with_dead:.3f} with them, {without:.3f} without."
        )
    return kept


def summarise_costs(costs: pd.DataFrame, protocol: str | None = None) -> pd.DataFrame:
    """Return what each method took a training, and sums over all jobs, from the costs of `scbert.runner.run`.

    A row a method: seconds and cpu_seconds, medians over the trainings of `protocol` (all if None); memory_mb, the most
    of one of them, since later ones reuse what earlier ones left; cpu_hours_in_all and cell_steps_in_all.
    """
    trainings = costs if protocol is None else costs[costs["protocol"] == protocol]
    by_method = trainings.groupby("method", sort=False)
    table = by_method[["seconds", "cpu_seconds"]].median().join(by_method["memory_mb"].max())
    in_all = costs.assign(cpu_hours=costs["cpu_seconds"] / 3600).groupby("method")[["cpu_hours", "cell_steps"]].sum()
    return table.join(in_all.add_suffix("_in_all"))


def say_costs(costs: pd.DataFrame) -> str:
    """Return in words what all jobs together cost, from the costs of `scbert.runner.run`."""
    hours = summarise_costs(costs)["cpu_hours_in_all"].sum()
    return f"{hours:.2f} CPU hours and {costs['cell_steps'].sum():,} cell-steps in all"


def measure_optimism(costs: pd.DataFrame) -> pd.DataFrame:
    """Return how much better each method looks on the cells that chose among its fits than on test cells.

    `costs` are from `scbert.runner.run`, of one protocol. The published code reports validation scores.

    By method and metric (accuracy, macro_f1): value, the mean over trainings of validation minus test score; low and
    high, 95 % by Student's t over trainings, lowest and highest of two; n, the trainings.
    """
    rows = []
    for method, own in costs.groupby("method", sort=False):
        for metric in ("accuracy", "macro_f1"):
            difference = (own[f"validation_{metric}"] - own[f"test_{metric}"]).dropna()
            n, mean = len(difference), difference.mean()
            half = stats.t.ppf(0.975, n - 1) * difference.std() / math.sqrt(n) if n > 2 else np.ptp(difference) / 2
            rows.append(
                {"method": method, "metric": metric, "value": mean, "low": mean - half, "high": mean + half, "n": n}
            )
    return pd.DataFrame(rows).set_index(["method", "metric"])


def name_level(data: str, level: str) -> str:
    """Return the name under which a level of a data set is on record: ``<data>:<level>``, or ``<data>`` without level."""
    return f"{data}:{level}" if level else data


def score_levels(
    predictions: pd.DataFrame, level: str = "protocol", *, sizes: pd.Series | None = None, seed: int = 0
) -> pd.DataFrame:
    """Apply `scbert.metrics.score` to each level of each data set; `level` is the column that says which a row is of.

    By data, level, method and metric, in the order of the predictions: value, low, high, n and repeats.
    """
    parts = predictions.groupby(["data", level], sort=False)
    scores = {key: metrics.score(part, sizes=sizes, seed=seed) for key, part in parts}
    return pd.concat(scores, names=["data", level])


def compare_levels(
    predictions: pd.DataFrame, method: str, other: str, level: str = "protocol", *, seed: int = 0
) -> pd.DataFrame:
    """Apply `scbert.metrics.compare` to each level of each data set: accuracy of one method minus that of another.

    As from `score_levels`, with the metric ``accuracy_minus_<other>``: value, low, high and n.
    """
    rows = {}
    for key, part in predictions.groupby(["data", level], sort=False):
        rows[*key, method, f"accuracy_minus_{other}"] = metrics.compare(part, method, other, seed=seed)
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis(["data", level, "method", "metric"])


def note_levels(run: "Run", scores: pd.DataFrame) -> None:
    """Put what `score_levels` or `compare_levels` found on record, as ``<data>:<level>/<method>/<metric>``."""
    for (data, level), own in scores.groupby(level=[0, 1], sort=False):
        run.note_scores(name_level(data, level), own.droplevel([0, 1]))


def list_methods(table: pd.DataFrame) -> list[str]:
    """Return all methods of a table of predictions or scores, in the order in which they were asked for.

    A data set may lack a method, such as scANVI where counts are fractional: the order is that of the data set that has
    most methods, and what it lacks comes last.
    """
    methods = table.reset_index().groupby("data", sort=False)["method"].unique()
    return list(dict.fromkeys(chain.from_iterable(sorted(methods, key=len, reverse=True))))


def write_levels(scores: pd.DataFrame, metric: str) -> pd.DataFrame:
    """Write out one metric of `score_levels` with its intervals: a row a data set and level, a column a method.

    The methods are those of all data sets; NaN where a data set lacks one.
    """
    text = metrics.write_out(scores.xs(metric, level="metric"))
    levels = text.index.droplevel("method").unique()
    return text.unstack("method").reindex(index=levels, columns=list_methods(scores))


def take_levels(table: pd.DataFrame, *kinds: str) -> pd.DataFrame:
    """Return the rows whose protocol, in the index, starts with one of these words, such as "reference"."""
    return table[table.index.get_level_values("protocol").str.startswith(kinds)]


def take_references(scores: pd.DataFrame) -> pd.DataFrame:
    """Return the scores of `scbert.protocols.reference_sizes` by the share of cells, a number, in place of the protocol."""
    kept = take_levels(scores, "reference:")
    shares = kept.rename(lambda level: float(level.removeprefix("reference:")), level="protocol")
    return shares.rename_axis(index={"protocol": "share of the reference cells"})


def score_rare(predictions: pd.DataFrame, rare: str, *, seed: int = 0) -> pd.DataFrame:
    """Measure how many cells of the label `rare` are found, by the size of its reference.

    `predictions` are of one data set, on splits of `scbert.protocols.class_imbalance`.

    By `SIZE_OF_RARE`, method and the metric "recall_of_rare": value, low and high, beside the other columns of
    `scbert.metrics.score_classes`.
    """
    sizes = predictions["protocol"].str.removeprefix("imbalance:").astype(int)
    by_size = predictions.groupby(sizes)
    found = pd.concat({size: metrics.score_classes(part, seed=seed) for size, part in by_size}, names=[SIZE_OF_RARE])
    found = found.xs(rare, level="label").assign(metric="recall_of_rare").set_index("metric", append=True)
    return found.rename(columns={"recall": "value", "recall_low": "low", "recall_high": "high"})


def note_comparison(run: "Run", data: str, comparison: pd.DataFrame) -> None:
    """Put a table of `scbert.significance.compare_all` on record, as ``<data>/<reference>/<metric>_minus_<other>``."""
    reference, metric = comparison.attrs["reference"], comparison.attrs["metric"]
    for other, row in comparison.iterrows():
        run.note_metric(f"{data}/{reference}/{metric}_minus_{other}", *row[["value", "low", "high", "n"]])


def say_comparison(comparison: pd.DataFrame) -> str:
    """Return a table of `scbert.significance.compare_all` as text, and below it what it decides and what it can't."""
    text = comparison[COMPARED].round(3).to_string()
    return f"{text}\n{significance.say_limits(comparison)}\n"


def read_references(text: str) -> dict:
    """Return the options of `scbert.protocols.reference_sizes` that a notebook's parameter names, such as "0.1 0.3 10 rest".

    Numbers below 1 are shares of the cells, others cells of each label; "rest" tests all that is not reference.
    """
    numbers = [word for word in text.split() if word != "rest"]
    try:
        values = [float(word) for word in numbers]
        if any(value >= 1 and not value.is_integer() or math.isnan(value) for value in values):
            raise ValueError("no number of cells")
    except ValueError:
        raise ValueError(
            f"references must be numbers, and may end with rest (0.1 0.3 10 rest), not {text!r}."
        ) from None
    return {
        "fractions": [value for value in values if value < 1],
        "cells_per_label": [int(value) for value in values if value >= 1],
        "query": "rest" if "rest" in text.split() else "fixed",
    }


def read_imbalance(text: str, labels: Sequence[str]) -> dict:
    """Return the options of `scbert.protocols.class_imbalance` that a notebook's parameter names.

    With "auto" the commonest label is common, and the second rare. A quarter of the second's cells, 60 at most, and as
    many of the first are tested. Both have equally many reference cells, 170 at most; then the second has a tenth as
    many. Else the text is such as "A, B | C | 170 | 170 17 2 | 60": common labels, rare labels, reference cells of a
    common label, of a rare one (several sizes), and test cells of each; for labels with commas see `split_labels`. A
    ValueError for another form or, with "auto", too few cells.
    """
    if text == "auto":
        if len(set(labels)) < 2:
            raise ValueError("imbalance = auto needs two labels: leave it empty.")
        (common, _), (rare, size) = pd.Series(np.asarray(labels, str)).value_counts().sort_index().nlargest(2).items()
        n_query = min(60, int(size) // 4)
        n_common = min(int(size * 0.7) - n_query, 170)
        if n_common < 20:
            raise ValueError(
                f"{rare} has {size} cells: too few for imbalance = auto. Leave it empty, or name other labels."
            )
        return {"common": [common], "rare": [rare], "n_common": n_common, "n_rare": [n_common, n_common // 10],
                "n_query": n_query}  # fmt: skip
    parts = split_outside(text, "|")
    try:
        common, rare, n_common, n_rare, n_query = parts
        return {
            "common": split_labels(common, labels),
            "rare": split_labels(rare, labels),
            "n_common": int(n_common),
            "n_rare": [int(number) for number in n_rare.split()],
            "n_query": int(n_query),
        }
    except ValueError:
        raise ValueError(
            f"imbalance must be auto, empty, or like 'A, B | C | 170 | 170 17 2 | 60', not {text!r}."
        ) from None


def split_labels(text: str, labels: Sequence[str]) -> list[str]:
    """Return the labels that stand between commas, outside quotes.

    Of a label that has a comma itself, and is among the cells' `labels`, the longest is meant: "B, naive, T" is "B, naive" and
    "T" if both are there. In quotes, 'B', 'naive', it is always two.
    """
    words, found = split_outside(text, ","), []
    known = {", ".join(map(str.strip, label.split(","))): label for label in labels}
    while words:
        lengths = range(len(words), 0, -1)
        n = next((n for n in lengths if ", ".join(words[:n]) in known), 1)
        name = ", ".join(words[:n])
        found.append(known.get(name, QUOTED.sub(r"\2", name)))
        words = words[n:]
    return found


def split_outside(text: str, separator: str) -> list[str]:
    """Return what stands between separators (one of , ; |), but for those inside quotes around a whole label."""
    hidden = QUOTED.sub(lambda quoted: re.sub("[,;|]", "\0", quoted[0]), text)
    ends = [i for i, sign in enumerate(hidden) if sign == separator]
    return [text[i:j].strip() for i, j in zip([0, *(end + 1 for end in ends)], [*ends, len(text)], strict=True)]
