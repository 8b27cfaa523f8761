"""Methods that name cells, behind one signature: ``fit(train, validation, label_key=, seed=)`` returns ``predict(adata)``."""

import copy
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.multiclass import OneVsRestClassifier

from .annotate import predict_proba
from .evaluate import macro_f1
from .genes import hash_genes
from .model import ScBert, ScBertConfig
from .preprocess import lognormalize
from .recipe import Recipe
from .train import finetune, pretrain


def fit_majority(train: anndata.AnnData, validation: anndata.AnnData, *, label_key: str, seed: int = 0) -> Callable:
    """Learn the commonest label; see `scbert.benchmark.cross_validate` for the signature that all methods share."""
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
    validation cells wins, ties go to the smaller loss. The choice is ``predict.chosen``; see `scbert.benchmark.cross_validate`.
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
    """Fine-tune scBERT; see `scbert.benchmark.cross_validate` for the signature.

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
