"""Are probabilities what they say: calibration error, temperature, and prediction sets that hold the truth as often as asked."""

import math
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from scipy import optimize, special, stats

from .metrics import bootstrap

GROUP = ["data", "level", "method"]  # of what several trainings tell, beside the metric
N_BINS = 15  # of confidence, of equal width


def fit_temperature(logits: pd.DataFrame, truth: Sequence[str]) -> float:
    """Return the temperature, between 0.05 and 20, at which softmax(logits / temperature) has the least log loss (Guo 2017).

    Fit it on cells that nothing was trained or chosen on. Above 1 the method was too sure. No cells, or a true label
    without a column in the logits, are a ValueError.
    """
    array, true = check_logits(logits), _find_columns(logits, truth)

    def loss(log_temperature):
        log_p = special.log_softmax(array / np.exp(log_temperature), axis=1)
        return -log_p[np.arange(len(true)), true].mean()

    limits = math.log(0.05), math.log(20)
    return float(np.exp(optimize.minimize_scalar(loss, bounds=limits, method="bounded").x))


def measure_calibration(
    logits: pd.DataFrame, truth: Sequence[str], temperature: float = 1.0, *, seed: int = 0, n_resamples: int = 1000
) -> dict[str, float]:
    """Return the expected calibration error: value, low, high, n, and what chance alone would give, by_chance.

    The mean, over cells, of the difference between confidence and accuracy in 15 bins of confidence. It can't be zero,
    and is the larger the fewer the cells: of a perfect method it is `by_chance` on average. So the interval is the basic
    bootstrap's, which takes that off, and starts at zero where a perfect method would exceed the value in 2.5 % of
    draws. Simulated, it held the true error in 89 to 99 of 100 cases; the percentile interval, in 0 to 95.
    """
    confidence, right = _judge(logits, truth, temperature)
    of_bin = np.eye(N_BINS)[_bin(confidence)]  # (cells, bins)
    n, random = len(right), np.random.default_rng(seed)
    value = float(np.abs((confidence - right) @ of_bin).sum() / n)
    weights = random.standard_exponential((n_resamples, n))
    drawn = np.abs((weights * (confidence - right)) @ of_bin).sum(1) / weights.sum(1)
    perfect = np.abs((confidence - (random.random((n_resamples, n)) < confidence)) @ of_bin).sum(1) / n
    q_low, q_high = np.quantile(drawn, [0.025, 0.975])
    low = 0 if value <= np.quantile(perfect, 0.975) else min(max(2 * value - q_high, 0), value)
    high = min(max(2 * value - q_low, value), 1)
    return {"value": value, "low": float(low), "high": float(high), "n": n, "by_chance": float(perfect.mean())}


def tabulate_reliability(logits: pd.DataFrame, truth: Sequence[str], temperature: float = 1.0) -> pd.DataFrame:
    """Return a row a bin of confidence with cells: confidence (mean), accuracy, low, high (95 %, Clopper-Pearson), n."""
    confidence, right = _judge(logits, truth, temperature)
    cells = pd.DataFrame({"bin": _bin(confidence), "confidence": confidence, "accuracy": right})
    table = cells.groupby("bin").mean().assign(n=cells.groupby("bin").size())
    table[["low", "high"]] = [_exact(*row) for row in table[["accuracy", "n"]].to_numpy()]
    return table


def find_quantile(logits: pd.DataFrame, truth: Sequence[str], level: float = 0.9) -> float:
    """Return how improbable a label may be and still be in a prediction set: split conformal, 1 - p of the true label.

    The ceil((n + 1) level)-th smallest of n cells that nothing was trained or chosen on. Infinite, so that every label
    is in every set, where n is below level / (1 - level): 9 cells for 0.9. A level outside 0 to 1 is a ValueError.
    """
    if not 0 < level < 1:
        raise ValueError(f"level must be between 0 and 1, not {level}: 0.9 asks for sets that hold the truth in 90 %.")
    true, n = _find_columns(logits, truth), len(truth)
    improbable = np.sort(1 - special.softmax(check_logits(logits), axis=1)[np.arange(n), true])
    rank = _rank(n, level)
    return float(improbable[rank - 1]) if rank <= n else math.inf


def predict_sets(logits: pd.DataFrame, quantile: float) -> pd.DataFrame:
    """Return which labels are in each cell's prediction set, cells x labels; an empty set is a cell like none that is known."""
    improbable = 1 - special.softmax(check_logits(logits), axis=1)
    return pd.DataFrame(improbable <= quantile, logits.index, logits.columns)


def measure_sets(
    sets: pd.DataFrame, truth: Sequence[str], seen: Sequence[bool], *, n_aside: int, level: float = 0.9
) -> pd.DataFrame:
    """Measure sets of `predict_sets`, with each cell's true type, and whether it is a known one.

    `n_aside` cells and `level` are those that `find_quantile` was given.

    Returns
    -------
    A row a metric, of known types coverage, set_size, one_label, empty, and of novel ones, if there are any,
    novel_empty and novel_one_label; value, low, high (95 %, Clopper-Pearson; set_size: bootstrap), n. coverage has also
    expected_low and expected_high: where 95 % of test sets would be if the cells set aside were exchangeable with
    them, since it is `level` on average over draws of both (beta-binomial). Nothing is promised for novel types.
    """
    seen, inside = np.asarray(seen, bool), sets.to_numpy()
    column, size = sets.columns.get_indexer(np.asarray(truth, dtype=str)), inside.sum(1)
    covered = inside[np.arange(len(sets)), column] & (column >= 0)
    of_cells = {"coverage": covered, "one_label": size == 1, "empty": size == 0}
    shares = {name: values[seen] for name, values in of_cells.items()}
    if not seen.all():
        shares |= {"novel_empty": size[~seen] == 0, "novel_one_label": size[~seen] == 1}
    rows = {}
    for name, values in shares.items():
        low, high = _exact(values.mean(), len(values))
        rows[name] = {"value": values.mean(), "low": low, "high": high, "n": len(values)}
    rows["set_size"] = bootstrap(np.mean, size[seen])
    rank, n = _rank(n_aside, level), int(seen.sum())
    limits = stats.betabinom.ppf([0.025, 0.975], n, rank, n_aside + 1 - rank) / n if rank <= n_aside else [1, 1]
    rows["coverage"] |= dict(zip(["expected_low", "expected_high"], limits, strict=True))
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("metric")


def calibrate_jobs(kept: Mapping[tuple, tuple], level: float = 0.9, *, seed: int = 0) -> pd.DataFrame:
    """Measure calibration and prediction sets of each method on test cells; fitted on cells set aside, means over repeats.

    `kept` is as in `scbert.novel_types.score_jobs`; trainings for tuning are left out. `level` is the nominal coverage.
    A row for each data, level, method and metric: calibration_error, calibration_error_scaled (both with by_chance),
    temperature (no interval), and those of `measure_sets`; columns value, low, high (means over repeats too), n and more.
    """
    rows = {}
    for (data, protocol, repeat, method), one in kept.items():
        purpose, _, name = protocol.partition(":")
        if purpose != "held_out":
            continue
        aside, known, fitted = _fit_aside(one)
        test, logits, truth = ~aside, one.logits, one.cells["truth"]
        found = {
            "calibration_error": measure_calibration(logits[known], truth[known], seed=seed),
            "calibration_error_scaled": measure_calibration(logits[known], truth[known], fitted, seed=seed),
            "temperature": {"value": fitted, "n": int(aside.sum())},
        }
        sets = predict_sets(logits[test], find_quantile(logits[aside], truth[aside], level))
        own = measure_sets(sets, truth[test], known[test], n_aside=int(aside.sum()), level=level)
        found = pd.DataFrame.from_dict(found, orient="index").rename_axis("metric")
        rows[data, name, method, repeat] = pd.concat([found, own])
    return pd.concat(rows, names=[*GROUP, "repeat"]).groupby([*GROUP, "metric"], sort=False).mean()


def tabulate_jobs(kept: Mapping[tuple, tuple], level: str = "together") -> pd.DataFrame:
    """Return `tabulate_reliability` of the first repeat by data, method and logits ("as they are" or "scaled")."""
    tables = {}
    for (data, protocol, repeat, method), one in kept.items():
        if protocol != f"held_out:{level}" or repeat:
            continue
        _, known, fitted = _fit_aside(one)
        logits, truth = one.logits[known], one.cells["truth"][known]
        for name, temperature in (("as they are", 1.0), ("scaled", fitted)):
            tables[data, method, name] = tabulate_reliability(logits, truth, temperature)
    return pd.concat(tables, names=["data", "method", "logits"])


def _fit_aside(one):
    """Return which cells are set aside, which are tested and of a known type, and the temperature fitted on the former."""
    aside = (one.cells["part"] == "aside").to_numpy()
    known = ~aside & one.cells["seen"].to_numpy(bool)
    return aside, known, fit_temperature(one.logits[aside], one.cells["truth"][aside])


def check_logits(logits: pd.DataFrame | np.ndarray) -> np.ndarray:
    """Return logits as an array, (cells, at least two labels), or raise a ValueError."""
    array = np.asarray(logits, dtype=float)
    if array.ndim != 2 or array.shape[1] < 2 or not np.isfinite(array).all():
        raise ValueError("Logits must be finite, cells x at least two labels: log of a probability of zero isn't.")
    return array


def _find_columns(logits, truth):
    """Return the column of each true label."""
    column = logits.columns.get_indexer(np.asarray(truth, dtype=str))
    if not len(column):
        raise ValueError("There are no cells to calibrate on: set some aside.")
    if unknown := sorted(set(np.asarray(truth, dtype=str)[column < 0]))[:3]:
        raise ValueError(f"No known label: {', '.join(unknown)}; take cells of types that were trained on.")
    return column


def _judge(logits, truth, temperature):
    """Return the largest probability of each cell, and whether it is the true label's."""
    p = special.softmax(check_logits(logits) / temperature, axis=1)
    return p.max(1), p.argmax(1) == _find_columns(logits, truth)


def _bin(confidence):
    return np.clip(np.ceil(confidence * N_BINS).astype(int) - 1, 0, N_BINS - 1)  # a bin has its upper edge


def _rank(n, level):
    return math.ceil(round((n + 1) * level, 9))


def _exact(share, n):
    """Return the 95 % Clopper-Pearson interval of a share of n cells."""
    return tuple(stats.binomtest(round(share * n), int(n)).proportion_ci())
