"""Fair terms for scBERT: as many settings to choose among as logistic regression has, and a last fit on all reference cells."""

import functools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import anndata

from ..train.recipe import Recipe
from .methods import fit_logistic_regression, fit_scbert, offer

RATES, LAYERS = (1e-4, 3e-4, 1e-3, 3e-3), ("all", "head")
"""Learning rates, and layers that learn (`Recipe.trainable_layers`): eight settings, as many as logistic regression has."""


def fit_tuned(
    train: anndata.AnnData,
    validation: anndata.AnnData,
    *,
    label_key: str,
    seed: int = 0,
    fit: Callable,
    checkpoints: str | Path | None = None,
    progress: bool = True,
) -> Callable:
    """Fine-tune scBERT once under each pair of `RATES` and `LAYERS`, and keep the training that validation cells like best.

    `fit` is `fit_scbert` with its options. The best macro-F1 on validation cells wins, ties go to the smaller loss, as for
    logistic regression. Which won is ``predict.chosen``; ``predict.cell_steps`` are of all.

    Differs from the published code: its rate, 1e-4, and its one trained layer are fixed.
    """
    recipe, best, cell_steps = getattr(fit, "keywords", {}).get("recipe", Recipe()), None, 0
    for layers in LAYERS:
        for rate in RATES:
            setting = functools.partial(fit, learning_rate=rate, recipe=replace(recipe, trainable_layers=layers))
            own = checkpoints and Path(checkpoints) / f"{layers}-{rate:g}"
            options = offer(setting, checkpoints=own, progress=progress)
            predict = setting(train, validation, label_key=label_key, seed=seed, **options)
            cell_steps += predict.cell_steps
            reached = max(zip(predict.history["val_macro_f1"], -predict.history["val_loss"], strict=True))
            if best is None or reached > best[0]:
                best = reached, predict, setting, f"rate={rate:g}, layers={layers}"
    _, predict, predict.fit, predict.chosen = best
    predict.cell_steps = cell_steps
    return predict


def fit_on_all(
    train: anndata.AnnData,
    validation: anndata.AnnData,
    *,
    label_key: str,
    seed: int = 0,
    fit: Callable,
    checkpoints: str | Path | None = None,
    progress: bool = True,
) -> Callable:
    """Let validation cells choose a setting, then learn under it from training and validation cells together.

    For references of some cells a label, where two cells of ten are much to lose and twenty are few to choose an epoch by.
    Logistic regression keeps its penalty and strength, `fit_tuned` its setting; scBERT trains anew, as long, and keeps the
    epoch of the least loss on all of these cells. A score on validation cells then says nothing: they were learnt from.
    """
    first = _call(fit, train, validation, label_key, seed, checkpoints and Path(checkpoints) / "first", progress)
    everything = anndata.concat([train, validation], merge="first", uns_merge="first")
    again, chosen = getattr(first, "fit", fit), getattr(first, "chosen", "")
    function = getattr(again, "func", again)
    if function is fit_logistic_regression:
        penalty, strength = chosen.split(", C=")
        again = functools.partial(again, penalties=(penalty,), strengths=(float(strength),))
    elif function is fit_scbert:
        recipe = again.keywords.get("recipe", Recipe())
        again = functools.partial(again, recipe=replace(recipe, select_by="loss"))
    predict = _call(again, everything, everything, label_key, seed, checkpoints and Path(checkpoints) / "all", progress)
    if chosen:
        predict.chosen = chosen
    if hasattr(predict, "cell_steps"):
        predict.cell_steps += first.cell_steps
    return predict


def _call(fit, train, validation, label_key, seed, checkpoints, progress):
    options = offer(fit, checkpoints=checkpoints, progress=progress)
    return fit(train, validation, label_key=label_key, seed=seed, **options)
