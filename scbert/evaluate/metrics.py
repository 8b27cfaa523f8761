"""Metrics: an interval on every number, and paired comparisons of methods that named the same cells."""

import warnings
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import pandas as pd
from scipy import sparse

METRICS = ("accuracy", "macro_f1", "macro_f1_common", "balanced_accuracy", "mcc")
RUN = ["data", "protocol", "repeat", "fold"]


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


def measure(counts: np.ndarray, common: np.ndarray) -> np.ndarray:
    """Compute `METRICS`, (..., metrics), from counts of cells: right, true and predicted of each label, (..., 3, labels).

    Counts may have any positive weights. Labels without a true cell are no part of a macro mean; `common`, (labels,), says
    which have part in macro_f1_common. Each metric is as scikit-learn defines it, an F1 of zero for a label that is never
    predicted, an MCC of zero where all cells are called the same, and NaN where no cell, or no common one, is tested.
    """
    right, true, predicted = np.moveaxis(counts, -2, 0)  # (..., labels)
    total = true.sum(-1)
    with np.errstate(invalid="ignore", divide="ignore"):
        present = true > 0
        f1 = np.where(present, 2 * right / (true + predicted), 0)
        recall = np.where(present, right / true, 0)
        spread = (total**2 - (true**2).sum(-1)) * (total**2 - (predicted**2).sum(-1))
        above_chance = right.sum(-1) * total - (true * predicted).sum(-1)
        largest = np.maximum(true.max(-1), predicted.max(-1))
        one_label = largest >= (1 - 1e-12) * total  # under weights, rounding leaves the spread no exact zero
        values = [
            right.sum(-1) / total,
            f1.sum(-1) / present.sum(-1),
            (f1 * common).sum(-1) / (present & common).sum(-1),
            recall.sum(-1) / present.sum(-1),
            np.where(one_label, 0 * total / total, above_chance / np.sqrt(spread)),
        ]
    return np.stack(values, axis=-1)


def measure_classes(counts: np.ndarray) -> np.ndarray:
    """Compute precision, recall and F1 of each label from counts as in `measure`: (..., 3 * labels), label after label.

    They are zero where a label is never predicted, and NaN where it has no true cell.
    """
    right, true, predicted = np.moveaxis(counts, -2, 0)
    with np.errstate(invalid="ignore", divide="ignore"):
        each = [np.where(predicted > 0, right / predicted, 0), right / true, 2 * right / (true + predicted)]
    values = np.where((true > 0)[..., None], np.stack(each, axis=-1), np.nan)  # (..., labels, 3)
    return values.reshape(*values.shape[:-2], -1)


def check_predictions(predictions: pd.DataFrame) -> pd.DataFrame:
    """Return the predictions with all of `RUN` as columns, labels as text, and a new index.

    A ValueError: a column or label is missing, a cell has two true labels or is twice in a training, or data sets are mixed.
    """
    missing = [column for column in ("method", "cell", "truth", "predicted") if column not in predictions]
    if missing or predictions.empty:
        raise ValueError(f"Predictions need a column {missing[0]!r}." if missing else "There are no predictions.")
    table = pd.DataFrame({"data": "", "protocol": "", "repeat": 0, "fold": 0} | dict(predictions))
    table = table.reset_index(drop=True)
    if table[["truth", "predicted"]].isna().any(axis=None):
        raise ValueError("Some cells have no true or no predicted label: leave them out, or call them Unassigned.")
    table[["truth", "predicted"]] = table[["truth", "predicted"]].astype(str)
    kinds = table[["data", "protocol"]].drop_duplicates()
    if len(kinds) > 1:
        names = ", ".join(":".join(filter(None, map(str, row))) for row in kinds.head(3).to_numpy())
        raise ValueError(f"Predictions are of {len(kinds)} data sets or protocols ({names}, ...): take one at a time.")
    truths = table[["cell", "truth"]].drop_duplicates()
    if truths["cell"].duplicated().any():
        cell = truths.loc[truths["cell"].duplicated(), "cell"].iloc[0]
        raise ValueError(f"Cell {cell} has two true labels: make the names of cells unique.")
    twice = table.duplicated(["method", "repeat", "fold", "cell"])
    if twice.any():
        cell, method = table.loc[twice, ["cell", "method"]].iloc[0]
        raise ValueError(f"Cell {cell} is named twice by {method} in one training: number the repeats and the folds.")
    return table


def count_cells(
    table: pd.DataFrame, part: np.ndarray, n_parts: int, labels: pd.Index, cells: pd.Index
) -> sparse.csr_matrix:
    """Mark what each cell adds to the counts of `measure`: (cells, parts * 3 * labels).

    Weights (resamples, cells) times this matrix are the counts of all parts. `part`, (rows,), numbers a row's training.
    """
    row, truth, predicted = (
        index.get_indexer(table[column])
        for index, column in ((cells, "cell"), (labels, "truth"), (labels, "predicted"))
    )
    column = np.stack([(part * 3 + kind) * len(labels) + label for kind, label in enumerate((truth, truth, predicted))])
    marked = np.stack([truth == predicted, np.ones(len(table), bool), np.ones(len(table), bool)])
    entries = marked[marked].astype(float), (np.tile(row, 3)[marked.ravel()], column[marked])
    return sparse.csr_matrix(entries, shape=(len(cells), n_parts * 3 * len(labels)))


def draw_weights(
    strata: np.ndarray, sizes: np.ndarray, n_repeats: int, seed: int, n_resamples: int, block: int = 1000
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield weights of cells (resamples, cells) and of repeats (resamples, repeats), `block` resamples at a time.

    Cells: gamma weights, scaled to keep the number of cells in each stratum: the Bayesian bootstrap (Rubin 1981), where
    the shape is 1. No weight is zero, so a label with few cells is in every resample, where multiplicities would leave
    it out of some and so change what a macro mean is the mean of. For a label of n cells, fewer than 50, the shape is
    (n - 2) / n, at least 1/3, so that the variance of its recall is p (1 - p) / (n - 1), unbiased, and not over n + 1.
    Repeats: multiplicities of one draw fewer than there are, for the same reason (Rao and Wu 1988).

    `strata` and `sizes`, (cells,), are the stratum of each cell, from 0, and how many cells its label has.
    """
    by_cell, by_repeat = (np.random.default_rng(child) for child in np.random.SeedSequence(seed).spawn(2))
    members = sparse.csr_matrix((np.ones(len(strata)), (np.arange(len(strata)), strata)))  # (cells, strata)
    in_stratum = np.bincount(strata)
    shape = np.where(sizes < 50, np.maximum(sizes - 2, 1) / np.maximum(sizes, 3), 1)  # 1 is drawn much faster
    for start in range(0, n_resamples, block):
        n = min(block, n_resamples - start)
        weights = by_cell.standard_gamma(shape, (n, len(strata))) / shape
        weights *= (in_stratum / (weights @ members))[:, strata]
        draws = max(n_repeats - 1, 1)
        yield weights, by_repeat.multinomial(draws, np.full(n_repeats, 1 / n_repeats), size=n) / draws


def resample(
    predictions: pd.DataFrame, statistic: Callable, labels: pd.Index, *, seed: int = 0, n_resamples: int = 2000
) -> tuple[pd.Index, np.ndarray, np.ndarray]:
    """Measure each method on the cells as they are, and on resampled cells and repeats, the same for all methods.

    Folds of a repeat are pooled, repeats are averaged. A cell has one weight, wherever it is tested, and is drawn
    within its fold if that is the same in all repeats. `statistic` maps counts (..., 3, labels) to (..., values), as
    `measure` does; NaN where a repeat has nothing to measure. `labels` are all that are true or predicted.

    Returned are methods, values (methods, values), and resampled values (resamples, methods, values).
    """
    method, methods = pd.factorize(predictions["method"])
    repeat, repeats = pd.factorize(predictions["repeat"], sort=True)
    cells = pd.Index(np.sort(predictions["cell"].unique()))
    folds = predictions.groupby("cell")["fold"].agg(["min", "max"]).reindex(cells)
    fixed = (folds["min"] == folds["max"]).all()
    strata = pd.factorize(folds["min"])[0] if fixed else np.zeros(len(cells), dtype=int)
    truth = predictions.drop_duplicates("cell").set_index("cell")["truth"].reindex(cells)
    sizes = truth.map(truth.value_counts()).to_numpy()
    marks = count_cells(predictions, method * len(repeats) + repeat, len(methods) * len(repeats), labels, cells)

    def average(weights, of_repeats):
        counts = np.asarray(weights @ marks).reshape(-1, len(methods), len(repeats), 3, len(labels))
        values = statistic(counts)  # (resamples, methods, repeats, values)
        known = ~np.isnan(values) * of_repeats[:, None, :, None]
        with np.errstate(invalid="ignore"):
            return (np.nan_to_num(values) * known).sum(2) / known.sum(2)

    found = average(np.ones((1, len(cells))), np.ones((1, len(repeats))))[0]
    block = max(1, 4_000_000 // max(marks.shape))  # 32 MB of weights or counts
    drawn = [average(*weights) for weights in draw_weights(strata, sizes, len(repeats), seed, n_resamples, block)]
    return methods, found, np.concatenate(drawn)


def resample_metrics(
    predictions: pd.DataFrame, *, sizes: pd.Series | None = None, rare: int = 20, **options
) -> tuple[pd.DataFrame, np.ndarray]:
    """Return `METRICS` of each method (methods x metrics), and resampled (resamples, methods, metrics): see `resample`."""
    labels, common = _find_labels(predictions, sizes, rare)
    methods, values, drawn = resample(predictions, lambda counts: measure(counts, common), labels, **options)
    return pd.DataFrame(values, index=methods, columns=list(METRICS)), drawn


def _find_labels(table, sizes, rare):
    """Return the labels that are true or predicted, and which of them have `rare` cells or more."""
    labels = pd.Index(sorted({*table["truth"], *table["predicted"]}))
    sizes = table.drop_duplicates("cell")["truth"].value_counts() if sizes is None else sizes
    return labels, sizes.reindex(labels).to_numpy() >= rare


def score(
    predictions: pd.DataFrame, *, sizes: pd.Series | None = None, rare: int = 20, seed: int = 0, n_resamples: int = 2000
) -> pd.DataFrame:
    """Measure each method, with 95 % intervals over test cells and, where there are several, repeats.

    The folds of a repeat are pooled, and the value is the mean over repeats. The interval is that of a bootstrap with
    the same weights for all methods, see `draw_weights`. With one repeat it is about these trained models alone: one
    training does not say how much another would differ. With few repeats it is too short if training moves the score
    more than the choice of cells does: simulated, with four times the spread it held the true accuracy in 78 of 100
    cases with two repeats, 85 with three and 89 with five; with equal spread in 96 or more.

    Parameters
    ----------
    predictions
        One row a method and test cell: method, cell, truth, predicted, and repeat and fold where there are several.
    sizes, rare
        Cells of each label in the whole set (those tested, if None), and how many make it common.

    Returns
    -------
    A row for each method and of `METRICS`: macro_f1 is over the labels that are true somewhere in the repeat,
    macro_f1_common over the common of them alone (no row where there are none); columns value, low, high, n (different
    test cells) and repeats. ValueErrors are those of `check_predictions`.
    """
    table = check_predictions(predictions)
    values, drawn = resample_metrics(table, sizes=sizes, rare=rare, seed=seed, n_resamples=n_resamples)
    index = pd.MultiIndex.from_product([values.index, METRICS], names=["method", "metric"])
    found = pd.DataFrame(_add_intervals(values, drawn).reshape(-1, 3), index, ["value", "low", "high"])
    tested = table.groupby("method")[["cell", "repeat"]].nunique().set_axis(["n", "repeats"], axis=1)
    return found.dropna(subset="value").join(tested)


def _add_intervals(values, drawn):
    """Return value, low and high of what was resampled, (resamples, ...), along a last axis; NaN if none is known."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "All-NaN slice")
        return np.stack([values, *np.nanquantile(drawn, [0.025, 0.975], axis=0)], axis=-1)


def write_out(scores: pd.DataFrame, digits: int = 3) -> pd.Series:
    """Return value and interval of each row as text, such as "0.812 [0.790, 0.833]"."""
    form = f"{{:.{digits}f}} [{{:.{digits}f}}, {{:.{digits}f}}]"
    numbers = scores[["value", "low", "high"]].to_numpy()
    return pd.Series([form.format(*row) for row in numbers], scores.index, name="text")


def score_classes(predictions: pd.DataFrame, *, seed: int = 0, n_resamples: int = 2000) -> pd.DataFrame:
    """Measure precision, recall and F1 of each label, with 95 % intervals as in `score`.

    A row for each method and true label; columns precision, precision_low, precision_high, the same of recall and f1,
    and n (different true cells). Precision and F1 are zero where a label is never predicted. The value is the mean
    over the repeats in which the label has true cells. ValueErrors are those of `check_predictions`.
    """
    table = check_predictions(predictions)
    labels, _ = _find_labels(table, None, 1)
    methods, values, drawn = resample(table, measure_classes, labels, seed=seed, n_resamples=n_resamples)
    index = pd.MultiIndex.from_product([methods, labels], names=["method", "label"])
    columns = [f"{name}{end}" for name in ("precision", "recall", "f1") for end in ("", "_low", "_high")]
    found = pd.DataFrame(_add_intervals(values, drawn).reshape(len(index), -1), index, columns)
    n = table.drop_duplicates(["method", "cell"]).groupby(["method", "truth"]).size()
    return found[index.isin(n.index)].assign(n=n.rename_axis(index.names))


def score_trainings(predictions: pd.DataFrame, *, sizes: pd.Series | None = None, rare: int = 20) -> pd.DataFrame:
    """Measure each training of each method on the cells that it tested, without intervals: the points of a box plot.

    Predictions and ValueErrors are as in `score`, but of any number of data sets and protocols, each with label sizes of its
    own where `sizes` is None. A row a training and method: data, protocol, repeat, fold, method, `METRICS`, n (cells).

    Paper: Fig. 2a.
    """
    given = [column for column in ("data", "protocol") if column in predictions]
    tables = []
    for _, part in predictions.groupby(given, sort=False) if given else [("", predictions)]:
        table = check_predictions(part)
        labels, common = _find_labels(table, sizes, rare)
        trainings = table.groupby([*RUN, "method"], sort=False)
        found = trainings.size().rename("n").reset_index()
        marks = count_cells(table, trainings.ngroup().to_numpy(), len(found), labels, pd.Index(table["cell"].unique()))
        counts = np.asarray(marks.sum(0)).reshape(len(found), 3, len(labels))
        found[list(METRICS)] = measure(counts, common)
        tables.append(found[[*RUN, "method", *METRICS, "n"]])
    return pd.concat(tables, ignore_index=True)


def resample_paired(
    table: pd.DataFrame, methods: Sequence[str], metric: str, *, sizes: pd.Series | None, rare: int, **options
) -> tuple[pd.Series, pd.DataFrame]:
    """Return a metric by method, and resampled, resamples x methods: see `resample_metrics`.

    A ValueError: no such method or metric, methods that named other cells in some training, or no common label.
    """
    if metric not in METRICS:
        raise ValueError(f"There is no metric {metric!r}: take one of {', '.join(METRICS)}.")
    known = set(table["method"])
    for method in methods:
        if method not in known:
            raise ValueError(f"No predictions of {method!r}: there are {', '.join(sorted(known))}.")
    table = table[table["method"].isin(methods)]
    named = table.groupby(["repeat", "fold", "cell"])["method"].nunique()
    if (named < len(set(methods))).any():
        repeat, fold, cell = named.index[named < len(set(methods))][0]
        raise ValueError(
            f"Not all of {', '.join(methods)} named cell {cell} in repeat {repeat}, fold {fold}: only methods that were "
            "tested on the same cells can be compared."
        )
    values, drawn = resample_metrics(table, sizes=sizes, rare=rare, **options)
    if values[metric].isna().any():
        raise ValueError(f"No label has {rare} cells: {metric} is not defined here.")
    return values[metric], pd.DataFrame(drawn[:, :, METRICS.index(metric)], columns=values.index)


def compare(
    predictions: pd.DataFrame,
    method: str,
    other: str,
    *,
    metric: str = "accuracy",
    sizes: pd.Series | None = None,
    rare: int = 20,
    seed: int = 0,
    n_resamples: int = 2000,
) -> dict[str, float]:
    """Return a metric of `method` minus that of `other`, on the same cells, repeats and weights: value, low, high, n.

    The interval is paired, so it can leave out zero where those of the two methods overlap; parameters as in `score`.
    ValueErrors are those of `check_predictions` and `resample_paired`.
    """
    table, options = check_predictions(predictions), {"sizes": sizes, "rare": rare, "seed": seed}
    values, drawn = resample_paired(table, [method, other], metric, n_resamples=n_resamples, **options)
    found = _add_intervals(values[method] - values[other], drawn[method] - drawn[other])
    n = table.loc[table["method"] == method, "cell"].nunique()
    return dict(zip(("value", "low", "high"), found.tolist(), strict=True)) | {"n": n}
