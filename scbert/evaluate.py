"""Splits, baselines and metrics: the same cells for every method, and an interval on every number."""

import copy
import math
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold, StratifiedShuffleSplit
from sklearn.multiclass import OneVsRestClassifier

from .annotate import predict_proba
from .genes import hash_genes
from .hygiene import load_split, saved_splits
from .model import ScBert, ScBertConfig
from .preprocess import lognormalize
from .recipe import Recipe
from .train import finetune, pretrain

Split = tuple[np.ndarray, np.ndarray, np.ndarray]


def stratified_splits(labels: Sequence[str], n_folds: int = 5, seed: int = 0) -> list[Split]:
    """Split cells into training, validation and test, label by label.

    Parameters
    ----------
    labels
        (cells,)
    n_folds
        How many of five folds to return for 1, else how many folds to make: with 1, a fifth of the cells is
        tested once; with k of 2 or more, each cell is tested once.
    seed
        Fixes the splits.

    Returns
    -------
    A list of (training, validation, test) cell numbers, sorted. An eighth of what is not test is validation.

    Raises
    ------
    ValueError
        A label has fewer cells than folds (than five, for one fold).

    Paper: Methods, "benchmarking" (five-fold cross-validation).
    Differs from the published code: real folds, where the script draws one 80/20 split and reports on the
    cells that stopped the training.
    """
    labels = np.asarray(labels, dtype=str)
    n_made = 5 if n_folds == 1 else n_folds
    counts = pd.Series(labels).value_counts()
    if n_folds < 1:
        raise ValueError(f"n_folds must be at least 1, not {n_folds}.")
    if len(counts) < 2:
        raise ValueError(f"All cells have the label {counts.index[0]!r}: there is nothing to tell apart.")
    smallest = counts.iloc[-1]
    if smallest < n_made or smallest - math.ceil(smallest / n_made) < 2:  # two must remain for training and validation
        folds = f"fewer than the {n_made} folds need" if n_folds > 1 else "fewer than 5, and a fifth is tested"
        raise ValueError(f"Label {counts.index[-1]!r} has {smallest} cells, {folds}: merge or drop it.")
    splits = []
    for rest, test in StratifiedKFold(n_made, shuffle=True, random_state=seed).split(labels, labels):
        inner = StratifiedShuffleSplit(1, test_size=max(len(rest) // 8, len(counts)), random_state=seed)
        train, validation = next(inner.split(rest, labels[rest]))
        splits.append((np.sort(rest[train]), np.sort(rest[validation]), test))
    return splits[:n_folds]


def split_cells(
    adata: anndata.AnnData, dataset: str, *, label_key: str = "cell_type", n_folds: int = 1, seed: int = 0
) -> list[Split]:
    """Split the cells of a data set: by its saved split where it has one, else by `stratified_splits`.

    Parameters
    ----------
    adata
        All cells of the set.
    dataset
        Its name; "zheng_facs" has a saved split, whose 30 % are always the test cells, see `scbert.hygiene.load_split`.
    label_key, n_folds, seed
        As in `stratified_splits`; an eighth of the saved training cells is validation, drawn by `seed`.

    Raises
    ------
    ValueError
        Folds are asked of a set with a saved split, cells are missing, or see `stratified_splits`.
    """
    if dataset not in saved_splits():
        return stratified_splits(adata.obs[label_key], n_folds, seed)
    if n_folds != 1:
        raise ValueError(f"{dataset} has one saved split, whose test cells train nothing: n_folds must be 1.")
    rest, test = load_split(adata, dataset)
    labels = adata.obs[label_key].astype(str).to_numpy()
    inner = StratifiedShuffleSplit(1, test_size=max(len(rest) // 8, len(set(labels))), random_state=seed)
    train, validation = next(inner.split(rest, labels[rest]))
    return [(np.sort(rest[train]), np.sort(rest[validation]), test)]


def fit_majority(train: anndata.AnnData, validation: anndata.AnnData, *, label_key: str, seed: int = 0) -> Callable:
    """Learn the commonest label; see `cross_validate` for the signature that all methods share."""
    shares = train.obs[label_key].astype(str).value_counts(normalize=True, sort=True)
    return lambda adata: pd.DataFrame(
        np.tile(shares.to_numpy(), (adata.n_obs, 1)), index=adata.obs_names, columns=list(shares.index)
    )


def fit_logistic_regression(
    train: anndata.AnnData,
    validation: anndata.AnnData,
    *,
    label_key: str,
    seed: int = 0,
    penalties: Sequence[str] = ("l1", "l2"),
    strengths: Sequence[float] = (0.01, 0.1, 1.0, 10.0),
) -> Callable:
    """Fit logistic regression on log-normalised counts, penalty and strength C chosen on validation cells.

    L1 is one-against-the-rest by liblinear, as in Boiarsky et al. 2023; L2 is multinomial. The best macro-F1 on
    validation cells wins, ties go to the smaller loss. The choice is ``predict.chosen``; see `cross_validate`.
    """
    x, y = lognormalize(train), train.obs[label_key].astype(str).to_numpy()
    x_validation, truth = lognormalize(validation), validation.obs[label_key].astype(str).to_numpy()
    best = None
    for penalty in penalties:
        for strength in strengths:
            if penalty == "l1":
                model = LogisticRegression(penalty="l1", C=strength, solver="liblinear", random_state=seed)
                model = OneVsRestClassifier(model)
            else:
                model = LogisticRegression(C=strength, max_iter=1000)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", ConvergenceWarning)  # validation judges the fit, converged or not
                model.fit(x, y)
            probabilities = model.predict_proba(x_validation)
            column = pd.Index(model.classes_).get_indexer(truth)
            loss = -np.log(probabilities[np.arange(len(truth)), column].clip(1e-12)).mean()
            score = (macro_f1(truth, model.classes_[probabilities.argmax(1)]), -loss)
            if best is None or score > best[0]:
                best = (score, model, f"{penalty}, C={strength:g}")

    def predict(adata):
        return pd.DataFrame(best[1].predict_proba(lognormalize(adata)), index=adata.obs_names, columns=best[1].classes_)

    predict.chosen = best[2]
    return predict


def fit_scbert(
    train: anndata.AnnData,
    validation: anndata.AnnData,
    *,
    label_key: str,
    seed: int = 0,
    encoder: ScBert | ScBertConfig,
    pretrain_epochs: int = 0,
    n_epochs: int = 6,
    recipe: Recipe = Recipe(),
    checkpoints: str | Path | None = None,
    progress: bool = True,
) -> Callable:
    """Fine-tune scBERT; see `cross_validate` for the signature.

    Parameters
    ----------
    encoder
        A pretrained encoder, or the shape of a new one.
    pretrain_epochs
        Epochs of pretraining on the training cells, without labels, before fine-tuning.
    n_epochs, recipe
        As in `scbert.finetune`.
    checkpoints
        A folder of this method alone, for continuing after an interruption.

    The trained model is ``predict.classifier``.
    """
    model = ScBert(encoder, seed=seed) if isinstance(encoder, ScBertConfig) else copy.deepcopy(encoder)
    stage = None if checkpoints is None else Path(checkpoints) / hash_genes(list(train.obs_names))[:12]
    if pretrain_epochs:
        pretrain(
            model, train, n_epochs=pretrain_epochs, learning_rate=3e-3, seed=seed, progress=progress,
            checkpoint=stage and f"{stage}-pretrain.pt",
        )  # fmt: skip
    classifier = finetune(
        model, train, label_key=label_key, validation=validation, n_epochs=n_epochs, recipe=recipe, seed=seed,
        checkpoint=stage and f"{stage}-finetune.pt", progress=progress,
    )  # fmt: skip

    def predict(adata):
        return predict_proba(classifier, adata)

    predict.classifier = classifier
    return predict


def cross_validate(
    adata: anndata.AnnData,
    methods: dict[str, Callable],
    *,
    label_key: str = "cell_type",
    n_folds: int = 5,
    splits: list[Split] | None = None,
    recipe: Recipe = Recipe(),
    seed: int = 0,
) -> pd.DataFrame:
    """Predict the test cells with each method, on the same splits.

    Parameters
    ----------
    adata
        Counts, tokenized if a method needs it.
    methods
        Name -> ``fit(train, validation, label_key=, seed=)``, which returns ``predict(adata)``, which returns
        probabilities (cells x labels, a DataFrame).
    label_key, n_folds, seed
        See `stratified_splits`.
    splits
        Splits already made, by `split_cells` say, in place of `n_folds`.
    recipe
        Its `report_on` says which cells are predicted: test cells, or as published the validation cells.

    Returns
    -------
    One row for each method and test cell, pooled over folds: method, fold, cell, truth, predicted, confidence.

    Raises
    ------
    ValueError
        See `stratified_splits`.

    Paper: Methods, "benchmarking"; Fig. 2a.
    """
    rows = []
    splits = stratified_splits(adata.obs[label_key], n_folds, seed) if splits is None else splits
    for fold, (train, validation, test) in enumerate(splits):
        check_disjoint(*(adata.obs_names[part] for part in (train, validation, test)))
        scored = test if recipe.report_on == "test" else validation
        for name, fit in methods.items():
            predict = fit(adata[train].copy(), adata[validation].copy(), label_key=label_key, seed=seed)
            rows.append(predict_cells(name, predict, adata[scored].copy(), label_key=label_key, fold=fold))
    return pd.concat(rows, ignore_index=True)


def predict_cells(
    method: str, predict: Callable, adata: anndata.AnnData, *, label_key: str = "cell_type", fold: int = 0
) -> pd.DataFrame:
    """Predict cells with a fitted method: one row a cell, in the columns of `cross_validate`."""
    probabilities = predict(adata)
    return pd.DataFrame(
        {
            "method": method,
            "fold": fold,
            "cell": adata.obs_names,
            "truth": adata.obs[label_key].astype(str).to_numpy(),
            "predicted": probabilities.columns[probabilities.to_numpy().argmax(1)],
            "confidence": probabilities.max(axis=1).to_numpy(),
        }
    )


def check_disjoint(*parts: Sequence[str]) -> None:
    """Raise a ValueError if a cell stands in two of the parts (training, validation, test)."""
    cells = pd.Index(np.concatenate([np.asarray(part, dtype=object) for part in parts]))
    if cells.has_duplicates:
        shared = cells[cells.duplicated()].unique()
        raise ValueError(
            f"{len(shared)} cells are in more than one of training, validation and test (first: {shared[0]})."
        )


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
