"""Cells of a type that no training cell has: how new a cell looks, where to draw the line, and what that is worth."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
from scipy import special
from sklearn.metrics import roc_curve

from .calibration import GROUP, check_logits
from .metrics import draw_weights

SCORES = ("max_probability", "margin", "entropy", "energy", "temperature", "distance")
PAPER = 0.5  # a cell whose largest probability is below this is Unassigned
PROBABILITIES = ("max_probability", "temperature")  # the scores to which it applies


def score_cells(
    logits: pd.DataFrame | np.ndarray, distance: np.ndarray | None = None, temperature: float = 1.0
) -> pd.DataFrame:
    """Score how new each cell looks, in six ways, each larger for cells that look newer.

    The softmax of a row of logits, (cells, labels), is the method's probabilities. `distance`, (cells,), is that to the
    nearest label's cells in some embedding; without it that score is left out. The temperature is that of
    `scbert.calibration.fit_temperature`. Logits that are not finite, or of one label only, are a ValueError.

    Returns
    -------
    Cells x `SCORES`: 1 - p of the largest probability p (the paper's score: Unassigned if above 0.5), 1 - (p - the second
    largest), the entropy over its largest possible value, the energy -log sum exp(logits) (Liu et al. 2020), 1 - the
    largest probability at that temperature, and the distance. The energy means something where the sum of the
    exponentials does, such as one "yes" or "no" a label; a softmax leaves it free, though training moves it.

    Paper: Methods, "novel cell type detection".
    """
    array = check_logits(logits)  # (cells, labels)
    p = special.softmax(array, axis=1)
    second, first = np.partition(p, -2, axis=1)[:, -2:].T
    scores = {
        "max_probability": 1 - first,
        "margin": 1 - (first - second),
        "entropy": special.entr(p).sum(1) / np.log(p.shape[1]),
        "energy": -special.logsumexp(array, axis=1),
        "temperature": 1 - special.softmax(array / temperature, axis=1).max(1),
    }
    scores |= {} if distance is None else {"distance": np.asarray(distance, dtype=float)}
    return pd.DataFrame(scores, index=getattr(logits, "index", None))


def take_held_out(cells: pd.DataFrame, level: str | None = None) -> pd.DataFrame:
    """Return the test cells of `scbert.novel_types.score_jobs` whose training lacks the types held out, none for tuning.

    The level is "together", or the type that was held out alone; all if None.
    """
    test = cells[(cells["purpose"] == "held_out") & (cells["part"] == "test")]
    return test if level is None else test[test["level"] == level]


def choose_threshold(scores: Sequence[float], is_novel: Sequence[bool]) -> float:
    """Return the threshold with the best mean of two shares: of novel cells above it, and of known ones not above it.

    It lies midway between two scores, or is the largest score; of several that are best, the largest, which leaves
    fewest cells unassigned. No novel or no known cells are a ValueError.
    """
    scores, is_novel = np.asarray(scores, float), np.asarray(is_novel, bool)
    if is_novel.all() or not is_novel.any():
        raise ValueError("A threshold is chosen on cells of both kinds: there are no novel, or no known, ones.")
    false, true, cuts = roc_curve(is_novel, scores, drop_intermediate=False)  # unassigned: at least the cut
    best = np.argmax(np.round(true - false, 12))  # the first of those that are best is the largest
    if best == 0:
        return float(scores.max())
    below = scores[scores < cuts[best]]
    return float((cuts[best] + below.max()) / 2 if len(below) else np.nextafter(cuts[best], -np.inf))


def choose_thresholds(cells: pd.DataFrame) -> pd.DataFrame:
    """Choose a threshold for each held-out training and score of `scbert.novel_types.score_jobs`, by three rules.

    A row is data, level, method, repeat, score, rule, threshold. The rules: "tuned" on the tuning training of the same
    repeat, for which other types were left out; "paper", 0.5, of the two scores that are probabilities; "best", on the
    test cells themselves, which nobody could know: the difference to it is what tuning costs.
    """
    rows = []
    test = cells[cells["part"] == "test"]
    rules = {"held_out": "best", "tuning": "tuned"}
    for (purpose, *own), part in test.groupby(["purpose", *GROUP, "repeat"], sort=False):
        for score in [name for name in SCORES if name in part]:
            rows.append([*own, score, rules[purpose], choose_threshold(part[score], ~part["seen"].to_numpy())])
            if purpose == "held_out" and score in PROBABILITIES:
                rows.append([*own, score, "paper", PAPER])
    return pd.DataFrame(rows, columns=[*GROUP, "repeat", "score", "rule", "threshold"])


def resample_novelty(
    table: pd.DataFrame, thresholds: pd.DataFrame, *, seed: int = 0, n_resamples: int = 1000
) -> tuple[pd.MultiIndex, np.ndarray, np.ndarray]:
    """Measure one method at one level on its test cells as they are, and on resampled ones; see `measure_novelty`.

    Returned are (score, rule, metric), values, and resampled values (resamples, values), which for two methods on the
    same cells are of the same resamples. A repeat with no novel or no known cells is a ValueError.
    """
    table = table.sort_values(["repeat", "cell"])
    cells, repeats = pd.Index(table["cell"].unique()).sort_values(), sorted(table["repeat"].unique())
    if (table.groupby("repeat")["seen"].nunique() < 2).any():
        raise ValueError("Novelty is measured on cells of both kinds: a repeat has no novel, or no known, test cells.")
    first = table.drop_duplicates("cell").set_index("cell").reindex(cells)
    sizes = first["truth"].map(first["truth"].value_counts()).to_numpy()
    strata = first["seen"].to_numpy(int)
    parts = [table[table["repeat"] == repeat] for repeat in repeats]

    def average(weights, of_repeats):
        found = [
            _measure(part, thresholds[thresholds["repeat"] == repeat], weights[:, cells.get_indexer(part["cell"])])
            for repeat, part in zip(repeats, parts, strict=True)
        ]
        values = np.stack([np.stack([*own.values()], axis=1) for own in found])  # (repeats, resamples, names)
        return [*found[-1]], np.einsum("rbv,br->bv", values, of_repeats) / of_repeats.sum(1, keepdims=True)

    names, value = average(np.ones((1, len(cells))), np.ones((1, len(repeats))))
    block = max(1, 1_000_000 // len(cells))
    drawn = [average(*pair)[1] for pair in draw_weights(strata, sizes, len(repeats), seed, n_resamples, block)]
    return pd.MultiIndex.from_tuples(names, names=["score", "rule", "metric"]), value[0], np.concatenate(drawn)


def measure_novelty(
    table: pd.DataFrame, thresholds: pd.DataFrame, *, seed: int = 0, n_resamples: int = 1000
) -> pd.DataFrame:
    """Measure how well one method tells novel from known cells, at one level, with 95 % intervals over cells.

    Parameters
    ----------
    table
        Rows of `scbert.novel_types.score_jobs`: test cells of one method, data set and level.
    thresholds
        repeat, score, rule and threshold; a cell is unassigned if its score is above.
    seed, n_resamples
        Of the bootstrap: weights of `scbert.metrics.draw_weights`, novel and known cells apart. It is about these types.
        Simulated, intervals held the true AUROC and AUPR in 89 to 97 of 100 cases, but only in 80 where 15 novel cells are
        almost all found, and where aupr is at chance (there it is too high).

    Returns
    -------
    By score, rule and metric: value (mean over repeats), low, high, n (different cells that it is about). Under rule "":
    auroc and aupr (average precision, whose chance level is the share of novel cells), cost_of_tuning, the balanced accuracy
    at the threshold that is best for these cells minus that at the tuned one, and, with score "", known_accuracy_all,
    without rejection. Under each rule: jaccard, cells both novel and unassigned among those that are either (the paper's
    "accuracy" of novel types); recall, of novel cells (Khan's); known_accuracy, where an unassigned cell is a wrong one;
    kept, the share of known cells that are assigned; balanced_accuracy, the mean of recall and kept.

    Paper: Fig. 4a; Methods, "novel cell type detection".
    """
    index, value, drawn = resample_novelty(table, thresholds, seed=seed, n_resamples=n_resamples)
    low, high = np.quantile(drawn, [0.025, 0.975], axis=0)
    low, high = np.minimum(low, value), np.maximum(high, value)
    kinds = table.drop_duplicates("cell")["seen"].value_counts()
    n = {"recall": kinds[False]} | dict.fromkeys(["known_accuracy_all", "known_accuracy", "kept"], kinds[True])
    sizes = [n.get(metric, kinds.sum()) for metric in index.get_level_values("metric")]
    return pd.DataFrame({"value": value, "low": low, "high": high, "n": sizes}, index=index)


def compare_methods(
    cells: pd.DataFrame, thresholds: pd.DataFrame, method: str, other: str, *, seed: int = 0
) -> pd.DataFrame:
    """Return what a method has more than another on the same resampled cells, by data, level, score, rule and metric.

    A row is value, low, high (95 %, paired), see `measure_novelty`. Methods tested on other cells are a ValueError.
    """
    test = take_held_out(cells)
    found = {}
    for key, part in test.groupby(GROUP[:2], sort=False):
        pair = [part[part["method"] == name] for name in (method, other)]
        tested, tested_too = (set(zip(own["cell"], own["repeat"], strict=True)) for own in pair)
        if tested != tested_too:
            raise ValueError(f"{method} and {other} were not tested on the same cells of {key[0]}.")
        at = thresholds[(thresholds["data"] == key[0]) & (thresholds["level"] == key[1])]
        one, two = (
            resample_novelty(own, at[at["method"] == name], seed=seed)
            for own, name in zip(pair, (method, other), strict=True)
        )
        low, high = np.quantile(one[2] - two[2], [0.025, 0.975], axis=0)
        found[key] = pd.DataFrame({"value": one[1] - two[1], "low": low, "high": high}, index=one[0])
    return pd.concat(found, names=GROUP[:2])


def sweep_thresholds(table: pd.DataFrame, score: str = "max_probability", *, n_steps: int = 41) -> pd.DataFrame:
    """Measure one method at one level as in `measure_novelty`, at thresholds from 0 to 1 of a probability.

    By threshold (a cell whose probability is below it is unassigned) and metric: value, low, high, n.
    """
    at = pd.MultiIndex.from_product([table["repeat"].unique(), np.linspace(0, 1, n_steps)], names=["repeat", "rule"])
    at = at.to_frame(index=False).assign(score=score, threshold=lambda rows: 1 - rows["rule"])
    found = measure_novelty(table, at, n_resamples=300)
    found = found.droplevel("score").rename_axis(["threshold", "metric"]).reset_index()
    found = found[found["threshold"] != ""].astype({"threshold": float})  # without the metrics of no threshold
    return found.set_index(["threshold", "metric"])


def trace_curves(cells: pd.DataFrame, scores: Sequence[str] = SCORES, *, n_steps: int = 200) -> pd.DataFrame:
    """Return points of the ROC and precision-recall curves of each method, at thresholds between equal numbers of cells.

    Of test cells of `scbert.novel_types.score_jobs`, of one data set and level; repeats are pooled. A row is method, score,
    threshold (the paper's is among them), false_alarms (share of known cells that are unassigned), recall (of novel
    ones), precision (share of novel cells among those unassigned; one where there are none).
    """
    tables = []
    for method, part in cells.groupby("method", sort=False):
        novel = ~part["seen"].to_numpy()
        for score in scores:
            cuts = np.quantile(part[score], np.linspace(0, 1, n_steps), method="lower")
            cuts = np.unique(np.append(cuts, [1 - PAPER] if score in PROBABILITIES else []))[::-1]
            above = part[score].to_numpy() > np.append(cuts, -np.inf)[:, None]  # (thresholds, cells)
            found, lost = above @ novel.astype(float), above @ (~novel).astype(float)
            point = {"method": method, "score": score, "threshold": np.append(cuts, -np.inf)}
            point |= {"false_alarms": lost / (~novel).sum(), "recall": found / novel.sum()}
            precision = np.divide(found, found + lost, out=np.ones(len(found)), where=found + lost > 0)
            tables.append(pd.DataFrame(point | {"precision": precision}))
    return pd.concat(tables, ignore_index=True)


def count_calls(cells: pd.DataFrame, threshold: float = PAPER) -> pd.DataFrame:
    """Count what the cells of each type are called, Unassigned if their largest probability is below the threshold.

    Of test cells as in `trace_curves`; a row is method, truth, novel, called, cells (how many).
    """
    called = cells["predicted"].where(cells["max_probability"] <= 1 - threshold, "Unassigned")
    table = cells.assign(called=called, novel=~cells["seen"])
    return table.groupby(["method", "truth", "novel", "called"], sort=False).size().rename("cells").reset_index()


def _measure(part, thresholds, weights):
    """Return (score, rule, metric) -> values (resamples,) of one training under weights (resamples, cells)."""
    novel = ~part["seen"].to_numpy()
    right = (part["truth"] == part["predicted"]).to_numpy() & ~novel
    n_novel, n_known = weights @ novel, weights @ ~novel
    values = {("", "", "known_accuracy_all"): (weights @ right) / n_known}
    for score in [name for name in SCORES if name in part]:
        values[score, "", "auroc"], values[score, "", "aupr"] = _rank_cells(part[score].to_numpy(), novel, weights)
    for score, rule, threshold in thresholds[["score", "rule", "threshold"]].itertuples(index=False):
        unassigned = part[score].to_numpy() > threshold
        found, lost = weights @ (novel & unassigned), weights @ (~novel & unassigned)
        recall, kept = found / n_novel, 1 - lost / n_known
        at = {"jaccard": found / (n_novel + lost), "recall": recall, "kept": kept}
        at |= {"known_accuracy": (weights @ (right & ~unassigned)) / n_known, "balanced_accuracy": (recall + kept) / 2}
        values |= {(score, rule, metric): value for metric, value in at.items()}
    for score, rule, metric in list(values):
        if (rule, metric) == ("tuned", "balanced_accuracy") and (score, "best", metric) in values:
            values[score, "", "cost_of_tuning"] = values[score, "best", metric] - values[score, rule, metric]
    return values


def _rank_cells(score, novel, weights):
    """Return AUROC and average precision under each row of weights, sorted once; cells with equal scores go together."""
    order = np.argsort(-score, kind="stable")
    starts = np.flatnonzero(np.diff(score[order], prepend=np.inf))
    by_value = np.add.reduceat(weights[:, order], starts, axis=1)  # (resamples, different scores), newest first
    novel_here = np.add.reduceat(weights[:, order] * novel[order], starts, axis=1)
    known_here = by_value - novel_here
    novel_so_far, known_so_far = novel_here.cumsum(1), known_here.cumsum(1)
    n_novel, n_known = novel_so_far[:, -1], known_so_far[:, -1]
    auroc = ((novel_so_far - novel_here / 2) * known_here).sum(1) / (n_novel * n_known)
    precision = novel_so_far / (novel_so_far + known_so_far)
    return auroc, (precision * novel_here).sum(1) / n_novel
