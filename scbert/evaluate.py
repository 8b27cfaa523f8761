"""Metrics: an interval on every number, and paired comparisons of methods that named the same cells."""

from collections.abc import Callable, Sequence

import numpy as np
import pandas as pd


def accuracy(truth: np.ndarray, predicted: np.ndarray, axis: int = -1) -> np.ndarray:
    """Return the share of cells with the right label, along the last axis."""
    return (truth == predicted).mean(axis=axis)


def macro_f1(truth: np.ndarray, predicted: np.ndarray, axis: int = -1, labels: Sequence | None = None) -> np.ndarray:
    """Return the mean F1 over `labels`, those in `truth` if None; one with neither true nor predicted cells is left out."""
    f1 = []
    for label in np.unique(truth) if labels is None else labels:
        is_true, is_predicted = truth == label, predicted == label
        denominator = is_true.sum(axis=axis) + is_predicted.sum(axis=axis)
        with np.errstate(invalid="ignore"):
            f1.append(np.where(denominator > 0, 2 * (is_true & is_predicted).sum(axis=axis) / denominator, np.nan))
    return np.nanmean(f1, axis=0)


def bootstrap(statistic: Callable, *arrays: np.ndarray, seed: int = 0, n_resamples: int = 2000) -> dict[str, float]:
    """Return value, low, high (95 %, percentile, over cells) and n of ``statistic(*arrays, axis=-1)``, arrays paired by cell."""
    arrays = [np.asarray(array) for array in arrays]
    n, random = len(arrays[0]), np.random.default_rng(seed)
    resamples = random.integers(n, size=(n_resamples, n))
    values = [statistic(*(array[rows] for array in arrays), axis=-1) for rows in np.array_split(resamples, 20)]
    low, high = np.quantile(np.concatenate(values), [0.025, 0.975])
    return {"value": float(statistic(*arrays, axis=-1)), "low": float(low), "high": float(high), "n": n}


def score(predictions: pd.DataFrame, *, sizes: pd.Series | None = None, rare: int = 20, seed: int = 0) -> pd.DataFrame:
    """Measure each method of `cross_validate`, with 95 % intervals by bootstrap over the pooled test cells.

    Parameters
    ----------
    predictions
        As `cross_validate` returns them.
    sizes, rare
        Cells of each label in the whole set (those tested, if None), and how many make it common.
    seed
        Fixes the resampling.

    Returns
    -------
    A row for each method and metric: accuracy, macro_f1, and macro_f1_common over the common labels alone; columns
    value, low, high and n (cells).
    """
    rows = []
    for method, cells in predictions.groupby("method", sort=False):
        # Small integers resample faster than strings.
        names = pd.Index(sorted(set(cells["truth"]) | set(cells["predicted"])))
        truth, predicted = names.get_indexer(cells["truth"]), names.get_indexer(cells["predicted"])
        labels = np.unique(truth)
        counts = (cells["truth"].value_counts() if sizes is None else sizes).reindex(names[labels]).to_numpy()
        statistics = {
            "accuracy": accuracy,
            "macro_f1": lambda t, p, axis, labels=labels: macro_f1(t, p, axis, labels),
            "macro_f1_common": lambda t, p, axis, labels=labels[counts >= rare]: macro_f1(t, p, axis, labels),
        }
        for metric, statistic in statistics.items():
            if metric == "macro_f1_common" and not (counts >= rare).any():
                continue
            rows.append({"method": method, "metric": metric} | bootstrap(statistic, truth, predicted, seed=seed))
    return pd.DataFrame(rows).set_index(["method", "metric"])


def compare(predictions: pd.DataFrame, method: str, other: str, *, seed: int = 0) -> dict[str, float]:
    """Return the accuracy of `method` minus that of `other` on the same test cells: value, low, high, n."""
    right = {name: cells.set_index("cell").eval("truth == predicted") for name, cells in predictions.groupby("method")}
    difference = right[method].astype(float) - right[other].reindex(right[method].index).astype(float)
    return bootstrap(lambda d, axis: d.mean(axis=axis), difference.to_numpy(), seed=seed)
