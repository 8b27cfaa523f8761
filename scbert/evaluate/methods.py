"""Methods that name cells, behind one signature: ``fit(train, validation, label_key=, seed=)`` returns ``predict(adata)``.

Cells come with counts of the model's genes in ``X``, the same genes everywhere, and ``obs["n_counts"]``; `predict`
returns probabilities, cells x labels of the training cells, each row summing to one. What validation cells chose is
``predict.chosen``. ``predict.read_out(adata)``, of methods that have more to tell, returns logits (cells x labels), whose
softmax is these probabilities, and vectors (cells, dim), or None for a method without any; see `read_out`.
"""

import contextlib
import copy
import functools
import inspect
import logging
import math
import warnings
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
from scipy import sparse
from scipy.special import log_expit, log_softmax, softmax
from sklearn.decomposition import PCA
from sklearn.neighbors import NearestNeighbors
from sklearn.preprocessing import normalize

from ..annotate import embed, predict_proba
from ..annotate import read_out as read_out_scbert
from ..data.checks import check_column, check_known
from ..data.counts import is_whole
from ..data.preprocess import hash_genes, lognormalize
from ..memory.regression import (
    PENALTIES,
    STRENGTHS,
    fit_regression,
    predict_regression,
    read_logits,
    score_labels,
)
from ..model.classifier import Classifier
from ..model.config import ScBertConfig
from ..model.encoder import ScBert
from ..train.finetune import finetune
from ..train.pretrain import pretrain
from ..train.recipe import Recipe
from .embeddings import correct_by_harmony

TEMPERATURES = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0)  # of similarities between 0 and 1: from near certainty to near none

NEIGHBOURS = (1, 2, 3, 5, 10, 15, 30, 50)  # eight settings, as many as logistic regression has

# What the optional methods import, the package that brings it, and the extra that brings the package.
NEEDS = {
    "celltypist": ("celltypist", "celltypist", "baselines"),
    "singler": ("singler", "singler", "baselines"),
    "scanvi": ("scvi", "scvi-tools", "scvi"),
    "knn_harmony": ("harmonypy", "harmonypy", "integrate"),
}

SCVI_LOGGERS = ("scvi", "lightning.pytorch", "lightning.fabric")


def fit_majority(train: anndata.AnnData, validation: anndata.AnnData, *, label_key: str, seed: int = 0) -> Callable:
    """Learn the commonest label, and the share of each."""
    shares = train.obs[label_key].astype(str).value_counts(normalize=True, sort=True)
    return lambda adata: pd.DataFrame(np.tile(shares, (adata.n_obs, 1)), adata.obs_names, list(shares.index))


def fit_logistic_regression(
    train: anndata.AnnData,
    validation: anndata.AnnData,
    *,
    label_key: str,
    seed: int = 0,
    penalties: Sequence[str] = PENALTIES,
    strengths: Sequence[float] = STRENGTHS,
    class_weight: str | None = None,
) -> Callable:
    """Fit logistic regression on log-normalised counts, see `scbert.memory.regression.fit_regression`.

    Penalty and strength C are chosen on validation cells. The choice is ``predict.chosen``, what was learnt
    ``predict.arrays``. With `class_weight` "balanced", cells weigh in inverse proportion to their label's frequency:
    under L1 in each problem of a label against the rest. ValueErrors are those of `fit_nearest_centroid`.
    """
    y, truth = _read_labels(train, validation, label_key)
    labels, y = np.unique(y, return_inverse=True)
    options = {"penalties": penalties, "strengths": strengths, "class_weight": class_weight, "seed": seed}
    x, x_validation = lognormalize(train), lognormalize(validation)
    return wrap_regression(labels, *fit_regression(x, y, x_validation, np.searchsorted(labels, truth), **options))


def wrap_regression(labels: Sequence[str], arrays: dict[str, np.ndarray], chosen: str) -> Callable:
    """Return `predict` of logistic regression that was fitted before, of its arrays: see `scbert.memory.regression`."""

    def predict(adata):
        return pd.DataFrame(predict_regression(arrays, lognormalize(adata)), adata.obs_names, labels)

    def read_out(adata):
        return pd.DataFrame(read_logits(arrays, lognormalize(adata)), adata.obs_names, labels), None

    predict.labels, predict.arrays, predict.chosen, predict.read_out = list(labels), arrays, chosen, read_out
    return predict


def fit_nearest_centroid(
    train: anndata.AnnData, validation: anndata.AnnData, *, label_key: str, seed: int = 0
) -> Callable:
    """Compare cells with the mean log-normalised profile of each label, by the cosine of the angle between them.

    Nothing is drawn by lot: `seed` is there for the signature. Probabilities are the softmax of similarities over that
    of `TEMPERATURES` with the least log loss on validation cells; it moves no cell to another label.

    A ValueError says: no such label column, missing labels, one label only, no validation cells, or new labels there.
    """
    y, truth = _read_labels(train, validation, label_key)
    labels, x = np.unique(y), lognormalize(train)
    centroids = normalize(np.vstack([np.asarray(x[y == label].mean(0)) for label in labels]))  # (labels, genes)

    def score(adata):
        return normalize(lognormalize(adata)) @ centroids.T  # (cells, labels), from 0 to 1

    return _predict_from_scores(score, labels, validation, truth)


def fit_neighbours(
    train: anndata.AnnData,
    validation: anndata.AnnData,
    *,
    label_key: str,
    seed: int = 0,
    space: ScBert | str = "pca",
) -> Callable:
    """Name cells by the labels of the nearest training cells, as foundation models are used without training.

    `space` is where cells are near by Euclidean distance: an encoder, whose output is averaged over the genes that a cell
    expresses; "pca", 30 components of log-normalised counts of training cells; or "harmony", in which these are moved, with
    those of the cells to name, onto each other. Probabilities are shares of neighbours; of `NEIGHBOURS` the number with the
    best macro-F1 on validation cells is taken.

    A ValueError as of `fit_nearest_centroid`, and without the package harmonypy.
    """
    y, truth = _read_labels(train, validation, label_key)
    labels, codes = np.unique(y, return_inverse=True)
    if isinstance(space, str):
        n_components = min(30, min(train.shape) - 1)
        pca = PCA(n_components, svd_solver="arpack", random_state=seed).fit(lognormalize(train))

    def place(cells):
        return embed(space, cells) if isinstance(space, ScBert) else pca.transform(lognormalize(cells))

    known, most = place(train), min(max(NEIGHBOURS), train.n_obs)

    def vote(adata, numbers):  # -> shares of labels, (cells, numbers, labels)
        there, here = known, place(adata)
        if space == "harmony":
            sides = np.repeat(["known", "asked"], [len(there), len(here)])
            both = correct_by_harmony(np.vstack([there, here]), sides, seed=seed)
            there, here = np.split(both, [len(there)])
        nearest = NearestNeighbors(n_neighbors=most).fit(there).kneighbors(here, return_distance=False)
        votes = np.eye(len(labels))[codes[nearest]].cumsum(axis=1)  # (cells, neighbours, labels)
        return votes[:, np.subtract(numbers, 1)] / np.reshape(numbers, (-1, 1))

    numbers = [number for number in NEIGHBOURS if number <= most]
    shares = vote(validation, numbers)
    reached = [score_labels(truth, labels[shares[:, i].argmax(1)])[1] for i in range(len(numbers))]
    best = numbers[int(np.argmax(reached))]

    def predict(adata):
        return pd.DataFrame(vote(adata, [best])[:, 0], adata.obs_names, labels)

    predict.chosen = f"neighbours={best}"
    return predict


def fit_celltypist(train: anndata.AnnData, validation: anndata.AnnData, *, label_key: str, seed: int = 0) -> Callable:
    """Fit CellTypist's logistic regression: L2, one label against the rest, on scaled log-normalised counts.

    Left out is what CellTypist offers beside it: feature selection (the genes are chosen before, the same for all
    methods), mini-batches of stochastic gradient descent, and majority voting over clusters of test cells, which would
    let test cells inform each other. Everything else stays at its defaults, C=1 among them: validation cells choose nothing.

    CellTypist expects the given genes to sum to 10,000 in a cell. Here all measured genes do, so its check is switched off
    (``check_expression=False``). Its probabilities, independent for each label, are divided by their sum over labels.

    A ValueError says: its package is not installed, no such label column, missing labels, or one label only.
    """
    _check_installed("celltypist")
    y = _read_labels(train, None, label_key)
    with _silenced():
        import celltypist  # silences warnings of all packages, and has all print their remarks
    with _silenced("celltypist.logger"):
        model = celltypist.train(_lognormalized(train), labels=y, check_expression=False, random_state=seed)

    def read_out(adata):
        with _silenced("celltypist.logger"):
            scores = celltypist.annotate(_lognormalized(adata), model=model).decision_matrix
        return pd.DataFrame(log_expit(scores.to_numpy(np.float64)), adata.obs_names, scores.columns), None

    return _predict_from_logits(read_out)  # the softmax of log p is p over its sum, also where all p are tiny


def fit_singler(train: anndata.AnnData, validation: anndata.AnnData, *, label_key: str, seed: int = 0) -> Callable:
    """Fit SingleR: Spearman correlation with single training cells over markers, and fine-tuning between close labels.

    Markers ("classic"), the quantile of correlations (0.8) and the threshold of fine-tuning (0.05) are the defaults
    of the package singler. These markers are made for bulk references: they compare medians, which are zero for many
    genes of single cells; the package's other ways need a further package.

    SingleR gives a label and, from before fine-tuning, one score a label. Where fine-tuning chose another label than
    the one of the largest score, the two exchange their scores: the label of largest probability is always SingleR's.
    Probabilities, `seed` and ValueErrors are as in `fit_nearest_centroid`; another is that singler is not installed.

    Paper: Fig. 2 and 3 (SingleR in R; this is its port to Python).
    """
    _check_installed("singler")
    import singler

    y, truth = _read_labels(train, validation, label_key)
    reference = singler.train_single(lognormalize(train).T.tocsc(), list(y), list(train.var_names), num_threads=1)
    labels = np.array(list(reference.labels))

    def score(adata):
        result = singler.classify_single(lognormalize(adata).T.tocsc(), reference, num_threads=1)
        scores = np.column_stack([result["scores"][label] for label in reference.labels])  # (cells, labels)
        rows, best = np.arange(len(scores)), pd.Index(labels).get_indexer(result["best"])
        first = scores.argmax(1)
        scores[rows, first], scores[rows, best] = scores[rows, best], scores[rows, first]
        scores[rows, best] += 1e-9 * (scores.argmax(1) != best)  # several largest scores: SingleR's choice leads
        return scores

    return _predict_from_scores(score, labels, validation, truth)


def fit_scanvi(
    train: anndata.AnnData,
    validation: anndata.AnnData,
    *,
    label_key: str,
    seed: int = 0,
    max_epochs: tuple[int, int] = (50, 20),
    min_steps: tuple[int, int] = (600, 240),
) -> Callable:
    """Fit scVI, then scANVI on top of it, on whole counts of the given genes, on the CPU.

    `max_epochs` are passes over the training cells of scVI, and of scANVI; few cells get more, until `min_steps` steps of
    the optimiser, each of 128 cells. No batches are told apart, since those of test
    cells may be new; validation cells choose nothing. All else is the default of scvi-tools. `seed` sets the random numbers
    of the whole process, as scvi-tools does. ValueErrors are those of `fit_celltypist`, or that counts are fractional.
    """
    _check_installed("scanvi")
    y = _read_labels(train, None, label_key)
    unlabelled = "_" * (1 + max(len(label) for label in y))  # the name of no label
    cells = _whole_counts(train, y)
    with _silenced():
        import scvi  # sets the levels of its loggers
    with _silenced(*SCVI_LOGGERS):
        scvi.settings.seed = seed
        options = {"accelerator": "cpu", "enable_progress_bar": False}
        scvi.model.SCVI.setup_anndata(cells, labels_key="label")
        first = scvi.model.SCVI(cells, n_latent=10)
        steps_an_epoch = math.ceil(0.9 * cells.n_obs / 128)  # a tenth is held out by default
        epochs = np.maximum(max_epochs, np.ceil(np.array(min_steps) / steps_an_epoch).astype(int)).tolist()
        first.train(max_epochs=epochs[0], **options)
        model = scvi.model.SCANVI.from_scvi_model(first, unlabeled_category=unlabelled, labels_key="label")
        model.train(max_epochs=epochs[1], **options)

    def predict(adata):
        cells = _whole_counts(adata, unlabelled)
        with _silenced(*SCVI_LOGGERS):
            probabilities = model.predict(cells, soft=True).astype(np.float64)
        return probabilities.div(probabilities.sum(axis=1), axis=0)  # they come as float32

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
    min_steps: int = 0,
    patience: int = 5,
    batch_size: int = 16,
    accumulate: int = 1,
    learning_rate: float = 1e-3,
    recipe: Recipe = Recipe(),
    cache: str | None = "float32",
    checkpoints: str | Path | None = None,
    progress: bool = True,
) -> Callable:
    """Fine-tune scBERT, after pretraining it on the training cells if asked.

    Parameters
    ----------
    encoder
        A pretrained encoder, or the shape of a new one.
    pretrain_epochs
        Epochs of pretraining on the training cells, without labels, before fine-tuning.
    n_epochs, patience, batch_size, accumulate, learning_rate, recipe, cache
        Of fine-tuning, as in `scbert.finetune`. Published: batches of 3, 60 a step, rate 1e-4.
    min_steps
        Optimiser steps at least: epochs are added where `n_epochs` are fewer, and patience is a third of them, or more.
    checkpoints
        A folder of this method alone, for continuing after an interruption.

    The trained model is ``predict.classifier``, one row an epoch of fine-tuning ``predict.history``, whether it has learnt
    ``predict.outcome``, and ``predict.cell_steps`` are cells times epochs, of pretraining and of fine-tuning.
    """
    model = ScBert(encoder, seed=seed) if isinstance(encoder, ScBertConfig) else copy.deepcopy(encoder)
    stage = None if checkpoints is None else Path(checkpoints) / hash_genes(list(train.obs_names))[:12]
    n_epochs = max(n_epochs, math.ceil(min_steps / math.ceil(train.n_obs / (batch_size * accumulate))))
    patience = max(patience, n_epochs // 3) if min_steps else patience
    if pretrain_epochs:
        pretrain(
            model, train, n_epochs=pretrain_epochs, learning_rate=3e-3, seed=seed, progress=progress,
            checkpoint=stage and f"{stage}-pretrain.pt",
        )  # fmt: skip
    classifier = finetune(
        model, train, label_key=label_key, validation=validation, n_epochs=n_epochs, patience=patience,
        batch_size=batch_size, accumulate=accumulate, learning_rate=learning_rate, recipe=recipe, seed=seed,
        cache=cache, checkpoint=stage and f"{stage}-finetune.pt", companions=False, progress=progress,
    )  # fmt: skip

    return wrap_classifier(classifier, train.n_obs * (pretrain_epochs + classifier.outcome["epochs"]))


def wrap_classifier(classifier: Classifier, cell_steps: int = 0) -> Callable:
    """Return `predict` of a fine-tuned model, with the attributes that `fit_scbert` names."""

    def predict(adata):
        return predict_proba(classifier, adata)

    predict.classifier, predict.read_out = classifier, functools.partial(read_out_scbert, classifier)
    predict.history, predict.cell_steps, predict.outcome = classifier.history, cell_steps, classifier.outcome
    return predict


FITS: dict[str, Callable] = {
    "majority": fit_majority,
    "logistic_regression": fit_logistic_regression,
    "nearest_centroid": fit_nearest_centroid,
    "knn_pca": fit_neighbours,
    "knn_harmony": functools.partial(fit_neighbours, space="harmony"),
    "celltypist": fit_celltypist,
    "singler": fit_singler,
    "scanvi": fit_scanvi,
}


def check_methods(names: Sequence[str], also: Sequence[str] = ()) -> None:
    """Raise a ValueError if a name is neither in `FITS` nor in `also`, or if its package is not installed."""
    known = [*FITS, *also]
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ValueError(f"There is no method {unknown[0]!r}: choose from {', '.join(known)}.")
    for name in names:
        _check_installed(name)


def rebalance(train: anndata.AnnData, *, label_key: str, how: str, seed: int = 0) -> anndata.AnnData:
    """Return training cells with equally many of each label.

    The `how` is "subsample": cells of large labels are left out, down to the smallest, be it a single cell; or
    "oversample": cells of small ones are drawn again, as <cell>-copy<n>, up to the largest. Returned is a copy with all
    layers and columns, in order, drawn cells last. A ValueError: another `how`, no such column, or missing labels.

    Khan et al. 2023 subsample, and draw new cells between neighbours of a small label by SMOTE. This can't be done
    here: a token between two tokens has no meaning, and copies are what remains.
    """
    if how not in ("subsample", "oversample"):
        raise ValueError(f"how must be 'subsample' or 'oversample', not {how!r}.")
    check_column(train, label_key, "The training set", constant_is_fine=True)
    labels, random = train.obs[label_key].astype(str).to_numpy(), np.random.default_rng(seed)
    rows = {label: np.flatnonzero(labels == label) for label in np.unique(labels)}
    counts = [len(cells) for cells in rows.values()]
    if how == "subsample":
        kept = [random.choice(cells, min(counts), replace=False) for cells in rows.values()]
        return train[np.sort(np.concatenate(kept))].copy()
    drawn = [random.choice(cells, max(counts) - len(cells)) for cells in rows.values()]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Observation names are not unique", UserWarning)  # for a moment
        more = train[np.concatenate([np.arange(train.n_obs), *drawn])].copy()
        more.obs_names_make_unique(join="-copy")
    return more


def fit_rebalanced(
    train: anndata.AnnData,
    validation: anndata.AnnData,
    *,
    label_key: str,
    seed: int = 0,
    fit: Callable,
    how: str,
    checkpoints: str | Path | None = None,
    progress: bool = True,
) -> Callable:
    """Fit a method on rebalanced training cells, see `rebalance`; validation cells stay as they are.

    ``functools.partial(fit_rebalanced, fit=fit_logistic_regression, how="oversample")`` is a method like any other.
    """
    rebalanced = rebalance(train, label_key=label_key, how=how, seed=seed)
    return call(fit, rebalanced, validation, label_key=label_key, seed=seed, checkpoints=checkpoints, progress=progress)


def call(fit: Callable, train: anndata.AnnData, validation: anndata.AnnData, *, label_key: str, seed: int, **options):
    """Fit a method, handing on those of the options that it takes."""
    return fit(train, validation, label_key=label_key, seed=seed, **offer(fit, **options))


def offer(fit: Callable, **options) -> dict:
    """Return those of the options that a method takes: not all of them train for long."""
    return {name: value for name, value in options.items() if name in inspect.signature(fit).parameters}


def read_out(predict: Callable, adata: anndata.AnnData) -> tuple[pd.DataFrame, np.ndarray | None]:
    """Return a fitted method's logits (cells x labels), whose softmax is its probabilities, and its vectors of cells.

    Of methods that decide on each label against the rest, or tell probabilities alone, logits are their logarithms.
    """
    if hasattr(predict, "read_out"):
        return predict.read_out(adata)
    return np.log(predict(adata).clip(lower=1e-12)), None


def to_probabilities(logits: pd.DataFrame) -> pd.DataFrame:
    """Return the softmax of logits, cells x labels."""
    return pd.DataFrame(softmax(logits.to_numpy(np.float64), axis=1), logits.index, logits.columns)


def _check_installed(method):
    module, package, extra = NEEDS.get(method, (None, None, None))
    if module and find_spec(module) is None:
        raise ValueError(f"{package} is not installed: pip install -c requirements.lock 'scbert-companion[{extra}]'.")


def _read_labels(train, validation, label_key):
    """Return the labels of training cells, and of validation cells where there are any, once they are in order."""
    check_column(train, label_key, "The training set", constant_is_fine=False)
    y = train.obs[label_key].astype(str).to_numpy()
    if validation is None:
        return y
    check_column(validation, label_key, "The validation set", constant_is_fine=True)
    truth = validation.obs[label_key].astype(str).to_numpy()
    if not len(truth):
        raise ValueError("There are no validation cells, and something is to be chosen on them.")
    check_known(truth, y)
    return y, truth


def _predict_from_scores(score, labels, validation, truth):
    """Return `predict`, the softmax of scores (cells, labels) over the temperature that validation cells choose."""
    scores, column = score(validation), pd.Index(labels).get_indexer(truth)
    losses = [-log_softmax(scores / t, axis=1)[np.arange(len(truth)), column].mean() for t in TEMPERATURES]
    temperature = TEMPERATURES[int(np.argmin(losses))]

    def read_out(adata):
        return pd.DataFrame(score(adata) / temperature, adata.obs_names, labels), None

    predict = _predict_from_logits(read_out)
    predict.chosen = f"temperature={temperature:g}"
    return predict


def _predict_from_logits(read_out):
    def predict(adata):
        return to_probabilities(read_out(adata)[0])

    predict.read_out = read_out
    return predict


def _lognormalized(adata):
    """Return cells with log-normalised counts in ``X``, as float32, and no more than their names."""
    x = lognormalize(adata).astype(np.float32)
    return anndata.AnnData(x, pd.DataFrame(index=adata.obs_names), pd.DataFrame(index=adata.var_names))


def _whole_counts(adata, label):
    """Return cells with counts in ``X`` and ``obs["label"]``, or raise a ValueError where counts are fractional."""
    x = sparse.csr_matrix(adata.X, dtype=np.float32)
    if not is_whole(x):
        raise ValueError("scANVI models whole counts, and X holds fractional values: leave scanvi out for this set.")
    obs = pd.DataFrame({"label": label}, index=adata.obs_names)
    return anndata.AnnData(x, obs, pd.DataFrame(index=adata.var_names))


@contextlib.contextmanager
def _silenced(*names):
    """Keep a package's warnings and remarks to itself, and undo what importing it does to those of others."""
    loggers = [logging.getLogger(), *(logging.getLogger(name) for name in names)]
    before = [(logger, logger.level, list(logger.handlers)) for logger in loggers]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for logger in loggers[1:]:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level, handlers in before:
                logger.setLevel(level)
                logger.handlers[:] = handlers
