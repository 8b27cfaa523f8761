"""What trainings share: batches, steps of the optimiser, who a training is, and how well it names validation cells."""

import hashlib
import math
import sys
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
from scipy.stats import entropy
from tqdm import tqdm

from ..memory.regression import score_labels
from ..paths import write_text


def draw_batches(cells, batch_size, accumulate, seed, epoch, recipe, skip=0, part=(0, 1)):
    """Yield (number of the batch, cell numbers, bins, whether an optimiser step follows)."""
    n_batches = math.ceil(len(cells) / batch_size)
    batches = cells.epoch(batch_size, seed, epoch, recipe.sampling, skip=skip, part=part)
    for number, (indices, bins) in enumerate(batches, skip):
        is_last = number + 1 == n_batches and recipe.leftover_steps == "step"
        yield number, indices, bins, (number + 1) % accumulate == 0 or is_last


def count_steps(n_cells, batch_size, accumulate, recipe):
    """Return the optimiser steps of an epoch, at least 1."""
    steps = math.ceil(n_cells / batch_size) / accumulate
    return max(1, math.ceil(steps) if recipe.leftover_steps == "step" else int(steps))


def take_step(optimizer, rate):
    """Let the optimiser learn from the gradients at this rate, and clear them."""
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.step()
    optimizer.zero_grad()


def show_progress(what, done, total, progress):
    """Return a progress bar in cells, which says rate and time left."""
    return tqdm(desc=what, total=total, initial=done, unit="cell", file=sys.stdout, mininterval=1, disable=not progress)


def identify(module, data, *arguments):
    """Hash all that fixes a training run, so that a checkpoint is continued only by the same call."""
    digest = hashlib.sha256(repr((module.config, arguments)).encode())
    for tensor in module.state_dict().values():
        digest.update(tensor.detach().cpu().numpy().tobytes())
    for cells in data:
        if cells is not None:
            for part in cells.identity():
                digest.update(part)
    return digest.hexdigest()


def write_log(path, history):
    """Write the history so far as CSV; nothing without a path. Where that fails, training goes on with a warning."""
    if path:
        try:
            write_text(Path(path), pd.DataFrame(history).to_csv(index=False))
        except OSError as error:
            warnings.warn(f"The log {path} was not written ({error}): training goes on without.", stacklevel=3)


LEARNT = 0.1
"""Share of the loss of guessing below which training cells are known by heart: further epochs add nothing."""


def guess(targets, truth, weight=None):
    """Return what a classifier reaches that looks at no cell: loss on training and on validation cells, accuracy, macro-F1.

    It gives each label its share of the `targets`, numbers from 0, under a `weight` a label; its name is the commonest.
    """
    counts = np.bincount(targets)
    shares = counts * (1 if weight is None else np.asarray(weight))
    validation_loss = -np.log(shares / shares.sum())[truth].mean()
    return entropy(shares), validation_loss, *score_labels(truth, np.full(len(truth), counts.argmax()))


def judge(history, guessed, n_epochs):
    """Say what a training of `finetune` came to, from its rows, what `guess` returns, and the epochs it was allowed.

    "dead": neither loss ever fell below that of a guess. "guessing": they fell, but no validation cell was named better
    than by a guess. "unfinished": the training loss hardly fell, or validation loss was least in the last quarter of the
    epochs while training cells were not known by heart. Else "converged".
    """
    loss, validation_loss, accuracy, macro_f1 = guessed
    learnt = min(row["loss"] for row in history) < 0.9 * loss  # not so of NaN
    if not learnt and not min(row["val_loss"] for row in history) < 0.98 * validation_loss:
        return "dead"
    if all(row["val_accuracy"] <= accuracy and row["val_macro_f1"] <= macro_f1 for row in history):
        return "guessing"
    best = min(history, key=lambda row: row["val_loss"])
    goes_on = best["epoch"] > 0.75 * n_epochs and history[-1]["loss"] > LEARNT * loss
    return "unfinished" if goes_on or not learnt else "converged"
