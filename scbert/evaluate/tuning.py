"""Fair terms for scBERT: as many settings to choose among as logistic regression has, and a last fit on all reference cells."""

import functools
import inspect
import itertools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import anndata

from .methods import call, fit_logistic_regression, fit_scbert

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
    best, cell_steps, options = None, 0, {"label_key": label_key, "seed": seed, "progress": progress}
    for layers, rate in itertools.product(LAYERS, RATES):
        setting = functools.partial(_change_recipe(fit, trainable_layers=layers), learning_rate=rate)
        own = checkpoints and Path(checkpoints) / f"{layers}-{rate:g}"
        predict = call(setting, train, validation, checkpoints=own, **options)
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

    For few cells a label. Logistic regression keeps its penalty and strength, `fit_tuned` its setting; scBERT trains anew, and
    keeps the epoch of the least loss on all of these cells. A score on validation cells then says nothing.
    """
    options = {"label_key": label_key, "seed": seed, "progress": progress}
    first = call(fit, train, validation, checkpoints=checkpoints and Path(checkpoints) / "first", **options)
    everything = anndata.concat([train, validation], merge="first", uns_merge="first")
    again, chosen = getattr(first, "fit", fit), getattr(first, "chosen", "")
    function = getattr(again, "func", again)
    if function is fit_logistic_regression:
        penalty, strength = chosen.split(", C=")
        again = functools.partial(again, penalties=(penalty,), strengths=(float(strength),))
    elif function is fit_scbert:
        again = _change_recipe(again, select_by="loss")
    predict = call(again, everything, everything, checkpoints=checkpoints and Path(checkpoints) / "all", **options)
    if chosen:
        predict.chosen = chosen
    if hasattr(predict, "cell_steps"):
        predict.cell_steps += first.cell_steps
    return predict


def _change_recipe(fit, **choices):
    """Return `fit_scbert`, or a partial of it, under other choices of its recipe."""
    return functools.partial(fit, recipe=replace(inspect.signature(fit).parameters["recipe"].default, **choices))
