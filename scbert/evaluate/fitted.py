"""What a fitted method learnt, written to files and read again: arrays and text, no pickle.

A folder holds ``fitted.json`` and, of scBERT, a bundle and ``history.csv``; of logistic regression,
``regression.safetensors``. What is read predicts bit for bit as what was written, on the same device.
"""

import inspect
import json
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import torch
from lightning_fabric import Fabric
from safetensors.torch import load_file

from ..model.bundle import write_tensors
from ..model.classifier import load
from ..paths import remove, replace_whole
from .methods import fit_logistic_regression, fit_scbert, wrap_classifier, wrap_regression

REGRESSION = "regression.safetensors"


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
    with replace_whole(Path(path)) as temporary:
        temporary.mkdir()
        if hasattr(predict, "classifier"):
            predict.classifier.save(temporary / "bundle")
            predict.history.to_csv(temporary / "history.csv", index=False)
            about = {"cell_steps": int(predict.cell_steps)}
        else:
            # Of the torch kind: safetensors.numpy writes a transposed array in another order than it says.
            write_tensors(
                {name: torch.from_numpy(array) for name, array in predict.arrays.items()}, temporary / REGRESSION
            )
            about = {"chosen": predict.chosen, "labels": predict.labels}
        (temporary / "fitted.json").write_text(json.dumps(about) + "\n")
        remove(Path(path))


def read_fitted(path: str | Path) -> Callable:
    """Return `predict` of a folder that `write_fitted` wrote, scBERT on the device that trains; ValueErrors as of `scbert.load`."""
    path = Path(path)
    about = json.loads((path / "fitted.json").read_text())
    if "labels" in about:
        tensors = load_file(path / REGRESSION)
        arrays = {name: tensor.numpy() for name, tensor in tensors.items()}
        return wrap_regression(about["labels"], arrays, about["chosen"])
    classifier = load(path / "bundle").to(Fabric(devices=1).device)
    classifier.history = pd.read_csv(path / "history.csv", float_precision="round_trip")
    return wrap_classifier(classifier, about["cell_steps"])
