"""What a fitted method learnt, written to files and read again: arrays and text, no pickle.

A folder holds ``fitted.json`` and, of scBERT, a bundle and ``history.csv``; of logistic regression,
``regression.safetensors``. What is read predicts bit for bit as what was written, on the same device.
"""

import inspect
import json
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from lightning_fabric import Fabric
from safetensors.torch import load_file, save_file
from sklearn.linear_model import LogisticRegression
from sklearn.multiclass import OneVsRestClassifier
from sklearn.preprocessing import LabelBinarizer

from ..model.classifier import load
from .methods import fit_logistic_regression, fit_scbert, wrap_classifier, wrap_regression


def check_keepable(name: str, fit: Callable) -> None:
    """Raise a ValueError, which calls it `name`, if what a method learns can't be written by `write_fitted`.

    `fit_scbert` and `fit_logistic_regression` can, with options or on rebalanced cells; all others are refused.
    """
    while (option := inspect.signature(fit).parameters.get("fit")) and callable(option.default):  # of `fit_rebalanced`
        fit = option.default
    if getattr(fit, "func", fit) not in (fit_scbert, fit_logistic_regression):
        raise ValueError(
            f"The fitted {name} can't be kept: only what fit_scbert and fit_logistic_regression learn is written to "
            "files. Leave it out of keep_models."
        )


def write_fitted(predict: Callable, path: str | Path) -> None:
    """Write what `fit_scbert` or `fit_logistic_regression` returned: a folder, put in place of one that is there in one step."""
    path = Path(path)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    if hasattr(predict, "classifier"):
        predict.classifier.save(temporary / "bundle")
        predict.history.to_csv(temporary / "history.csv", index=False)
        about = {"cell_steps": int(predict.cell_steps)}
    else:
        arrays = regression_to_arrays(predict.model)
        # Of the torch kind: safetensors.numpy writes a transposed array in another order than it says.
        tensors = {name: torch.from_numpy(array).contiguous() for name, array in arrays.items()}
        save_file(tensors, temporary / "regression.safetensors")
        about = {"chosen": predict.chosen, "labels": list(predict.model.classes_)}
    (temporary / "fitted.json").write_text(json.dumps(about) + "\n")
    shutil.rmtree(path, ignore_errors=True)
    temporary.rename(path)


def read_fitted(path: str | Path) -> Callable:
    """Return `predict` of a folder that `write_fitted` wrote, scBERT on the device that trains; ValueErrors as of `scbert.load`."""
    path = Path(path)
    about = json.loads((path / "fitted.json").read_text())
    if "labels" in about:
        tensors = load_file(path / "regression.safetensors")
        arrays = {name: tensor.numpy() for name, tensor in tensors.items()}
        return wrap_regression(regression_from_arrays(arrays, about["labels"]), about["chosen"])
    classifier = load(path / "bundle").to(Fabric(devices=1).device)
    classifier.history = pd.read_csv(path / "history.csv", float_precision="round_trip")
    return wrap_classifier(classifier, about["cell_steps"])


def regression_to_arrays(model: LogisticRegression | OneVsRestClassifier) -> dict[str, np.ndarray]:
    """Return what a fitted logistic regression predicts by, but for the labels' names, ``model.classes_``.

    "coef", (labels, genes), and "intercept", (labels,), are float64, of one row for two labels; "one_against_rest" is bool.
    """
    one_against_rest = isinstance(model, OneVsRestClassifier)
    parts = model.estimators_ if one_against_rest else [model]
    return {
        "coef": np.vstack([part.coef_ for part in parts]).astype(np.float64),
        "intercept": np.concatenate([part.intercept_ for part in parts]).astype(np.float64),
        "one_against_rest": np.array(one_against_rest),
    }


def regression_from_arrays(
    arrays: dict[str, np.ndarray], labels: Sequence[str]
) -> LogisticRegression | OneVsRestClassifier:
    """Return the logistic regression that `regression_to_arrays` was given: it predicts, and was not trained on."""
    labels, coef, intercept = np.array(labels, dtype=object), arrays["coef"], arrays["intercept"]
    if not arrays["one_against_rest"]:
        return _set_weights(LogisticRegression(), labels, coef, intercept)
    model = OneVsRestClassifier(LogisticRegression(solver="liblinear"))
    model.label_binarizer_ = LabelBinarizer(sparse_output=True).fit(labels)
    model.classes_, model.n_features_in_ = labels, coef.shape[1]
    model.estimators_ = [
        _set_weights(LogisticRegression(solver="liblinear"), np.array([0, 1]), coef[i : i + 1], intercept[i : i + 1])
        for i in range(len(coef))
    ]
    return model


def _set_weights(model, labels, coef, intercept):
    model.classes_, model.coef_, model.intercept_, model.n_features_in_ = labels, coef, intercept, coef.shape[1]
    return model
