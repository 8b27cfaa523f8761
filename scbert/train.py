"""Pretraining and fine-tuning: two flat loops on Lightning Fabric."""

import contextlib
import copy
import hashlib
import math
import os
import sys
import warnings
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import torch
from lightning_fabric import Fabric
from sklearn.metrics import f1_score
from sklearn.model_selection import StratifiedShuffleSplit
from sklearn.utils.class_weight import compute_class_weight
from torch.nn import functional as F
from tqdm import tqdm

from .cells import check_cells, find_commonest_bin, mask_bins, open_cells
from .datasets import check_column
from .model import Classifier, ScBert
from .prefix import FrozenPrefix
from .recipe import Recipe, learning_rate_at
from .stream import CellStore


def pretrain(
    model: ScBert,
    adata: anndata.AnnData | CellStore,
    *,
    validation: anndata.AnnData | CellStore | None = None,
    n_epochs: int = 10,
    batch_size: int = 16,
    accumulate: int = 1,
    learning_rate: float = 1e-3,
    mask_share: float = 0.15,
    redraw_every: int = 1000,
    recipe: Recipe = Recipe(),
    seed: int = 0,
    checkpoint: str | Path | None = None,
    log: str | Path | None = None,
    accelerator: str = "auto",
    precision: str = "32-true",
    progress: bool = True,
) -> pd.DataFrame:
    """Train a model, in place, to predict masked expression tokens.

    Parameters
    ----------
    model
        The encoder; it takes on the cells' gene names if it has none.
    adata
        Tokenized cells, or a store of them (`scbert.stream`); labels are not read.
    validation
        Tokenized cells to measure on after each epoch, under masks that never change.
    n_epochs, batch_size, accumulate, learning_rate
        Passes over the cells, cells a forward pass, forward passes an optimiser step, peak rate of AdamW.
    mask_share
        Share of each cell's non-zero tokens to predict.
    redraw_every
        Optimiser steps between redraws of the random features; which ones follows from seed and step.
    recipe
        Of its switches, sampling, leftover_steps, lr_schedule and key_stabiliser matter here.
    checkpoint
        A file for the state after each epoch: the same call continues from it after an interruption.
    log
        A CSV file for the history.
    accelerator, precision
        Handed to Lightning Fabric.

    Returns
    -------
    One row an epoch: learning rate, training loss and masked accuracy and, with validation cells, `val_loss`,
    `val_accuracy` and `val_mode_accuracy` (always the cell's commonest bin, see `masked_accuracy`).

    Raises
    ------
    ValueError
        Cells not tokenized, for another vocabulary, or with other bins than the model's.

    Paper: Methods, "pretraining"; Fig. 1a. Optimiser, rate, batch and masks are not in the paper.
    Differs from the published code: each cell once an epoch, a step on what is left over, a schedule per step
    (all in `Recipe`); AdamW; metrics over all validation cells, under fixed masks.
    """
    cells = open_cells(adata)
    check_cells(model, cells)
    model.genes = list(cells.genes)
    if validation is not None:
        check_cells(model, validation)
    model.set_key_stabiliser(recipe.key_stabiliser)
    identity = _identify(model, (cells, validation), n_epochs, batch_size, accumulate, learning_rate, mask_share,
                         redraw_every, recipe, seed, precision) if checkpoint else ""  # fmt: skip
    fabric = Fabric(accelerator=accelerator, devices=1, precision=precision)
    module, optimizer = fabric.setup(model, torch.optim.AdamW(model.parameters(), lr=learning_rate))
    state = _read_checkpoint(checkpoint, identity)
    if state:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        _set_gradients(model, state["gradients"])
    history, step = state.get("history", []), state.get("step", 0)
    rate = history[-1]["learning_rate"] if history else 0.0  # an epoch may pass without a step
    steps_per_epoch = _steps_per_epoch(len(cells), batch_size, accumulate, recipe)
    with _progress_bar("pretrain", len(history), n_epochs, len(cells), progress) as bar:
        for epoch in range(len(history), n_epochs):
            loss_sum = correct = n_masked = 0
            for micro, (indices, bins, is_step) in enumerate(
                _batches(cells, batch_size, accumulate, seed, epoch, recipe)
            ):
                seen, where = mask_bins(bins, model.config.mask_token, (seed, epoch, micro), mask_share=mask_share)
                target = bins[where].to(fabric.device)  # (masked positions,)
                logits = module(seen.to(fabric.device), where.to(fabric.device))  # (masked positions, n_bins + 2)
                loss = F.cross_entropy(logits, target, reduction="sum")
                fabric.backward(loss / max(len(target), 1) / accumulate)
                loss_sum += loss.item()
                correct += (logits.argmax(1) == target).sum().item()
                n_masked += len(target)
                if is_step:
                    rate = learning_rate_at(
                        step, n_epochs * steps_per_epoch, steps_per_epoch, learning_rate, recipe.lr_schedule
                    )
                    _take_step(optimizer, rate)
                    step += 1
                    if step % redraw_every == 0:
                        model.redraw_features(seed + step)
                bar.update(len(indices))
            row = {
                "epoch": epoch + 1,
                "learning_rate": rate,
                "loss": loss_sum / max(n_masked, 1),
                "accuracy": correct / max(n_masked, 1),
            }
            if validation is not None:
                total = masked_accuracy(
                    model, validation, seed=seed, mask_share=mask_share, batch_size=batch_size
                ).sum()
                for name in ("loss", "accuracy", "mode_accuracy"):
                    row[f"val_{name}"] = float(total[name.replace("accuracy", "correct")] / total["n_masked"])
            history.append(row)
            bar.set_postfix({name: f"{row[name]:.3f}" for name in row if name.endswith(("loss", "accuracy"))})
            _write_checkpoint(
                checkpoint, identity, model=model.state_dict(), optimizer=optimizer.state_dict(),
                gradients=_get_gradients(model), history=history, step=step,
            )  # fmt: skip
            _write_log(log, history)
    model.eval()
    return pd.DataFrame(history)


@torch.inference_mode()
def masked_accuracy(
    model: ScBert, adata: anndata.AnnData | CellStore, *, seed: int = 0, mask_share: float = 0.15, batch_size: int = 16
) -> pd.DataFrame:
    """Predict masked tokens of cells, beside always saying each cell's commonest bin.

    Parameters
    ----------
    model, adata
        An encoder, and tokenized cells of its vocabulary.
    seed
        Fixes the masks.
    mask_share, batch_size
        As in `pretrain`.

    Returns
    -------
    One row a cell: `n_masked` tokens, all of them hidden (a tenth that stayed visible could be copied), how many
    the model has right (`correct`) and how many the commonest non-zero token among those left visible has right
    (`mode_correct`), how often the model says just that
    token (`predicted_mode`), and the summed cross-entropy in nats (`loss`).

    Paper: not in it; Boiarsky et al. 2023 measured it.
    Differs from the published code: all cells count, where the script's validation accuracy is that of cell 0; and
    every masked token is hidden, where a tenth stays visible there, as it does in training.
    """
    cells, device, rows = open_cells(adata), next(model.parameters()).device, []
    check_cells(model, cells)
    for start, bins in cells.in_order(batch_size):
        # One seed a cell: the masks do not depend on the batch size.
        masked = [
            mask_bins(bins[[i]], model.config.mask_token, (seed, start + i), mask_share=mask_share, replace_share=1)
            for i in range(len(bins))
        ]
        seen, where = (torch.cat(tensors) for tensors in zip(*masked, strict=True))
        logits = model.to_out(model.encode(seen.to(device))).float().cpu()  # (cells, genes + 1, n_bins + 2)
        predicted = logits.argmax(-1)
        mode = find_commonest_bin(bins.masked_fill(where, 0), model.config.n_bins)  # (cells, 1)
        loss = F.cross_entropy(logits.transpose(1, 2), bins, reduction="none")  # (cells, genes + 1)
        per_cell = {
            "n_masked": where,
            "correct": where & (predicted == bins),
            "mode_correct": where & (mode == bins),
            "predicted_mode": where & (predicted == mode),
            "loss": loss * where,
        }
        rows.append(pd.DataFrame({name: values.sum(1).numpy() for name, values in per_cell.items()}))
    return pd.concat(rows, ignore_index=True).set_index(adata.obs_names)


def finetune(
    model: ScBert,
    adata: anndata.AnnData | CellStore,
    *,
    label_key: str = "cell_type",
    validation: anndata.AnnData | CellStore | None = None,
    n_epochs: int = 20,
    patience: int = 5,
    batch_size: int = 16,
    accumulate: int = 1,
    learning_rate: float = 1e-3,
    recipe: Recipe = Recipe(),
    seed: int = 0,
    checkpoint: str | Path | None = None,
    log: str | Path | None = None,
    accelerator: str = "auto",
    precision: str = "32-true",
    cache: str | None = "float32",
    cache_memory: int = 2 * 2**30,
    progress: bool = True,
) -> Classifier:
    """Train an annotator on labelled cells, starting from an encoder, which is left as it was.

    Parameters
    ----------
    model
        The encoder, pretrained or not; a copy of it is trained.
    adata
        Tokenized cells with ``obs[label_key]``, or a store of them (`scbert.stream`).
    validation
        Tokenized, labelled cells that choose the best epoch; an eighth of `adata`, stratified, if None. Test
        cells have no place here.
    n_epochs, patience
        Most passes over the cells, and how many without a better validation score end the training.
    batch_size, accumulate, learning_rate
        Cells a forward pass, forward passes an optimiser step, peak rate of AdamW.
    recipe
        See `Recipe`.
    checkpoint, log, accelerator, precision
        As in `pretrain`.
    cache
        With frozen first layers, run them once for each cell and keep what they yield, as ``"float32"`` or
        ``"float16"``; None to run them in every epoch. Nothing is kept where that would change the training:
        random features redrawn, or ``key_stabiliser="batch"``.
    cache_memory
        Bytes to keep in memory; more goes to a file beside the checkpoint, else to the temporary folder. A full
        disk costs time, not the training; with a store far larger than the disk, pass ``cache=None``.

    Returns
    -------
    The classifier of the best epoch; ``.history`` has one row an epoch.

    Raises
    ------
    ValueError
        Cells not tokenized or for another vocabulary, no such label column, one label only, or a label
        with too few cells to leave any for validation.

    Paper: Methods, "fine-tuning". Optimiser, rate, batch and stopping are not in the paper.
    Differs from the published code: the cells that choose the epoch are neither training nor test cells; random
    features stay as they are; all layers learn by default; see `Recipe`.
    """
    check_cells(model, adata)
    if n_epochs < 1:
        raise ValueError(f"n_epochs must be at least 1, not {n_epochs}: an annotator has to learn its labels.")
    if cache not in ("float32", "float16", None):
        raise ValueError(f"cache must be 'float32', 'float16' or None, not {cache!r}.")
    for part, name in ((adata, "The training set"), (validation, "The validation set")):
        if part is not None:
            check_column(part, label_key, name, constant_is_fine=True)
    if validation is None:
        adata, validation = _split_off_validation(adata, label_key, seed)
    labels = sorted(set(adata.obs[label_key].astype(str)))
    if len(labels) < 2:
        raise ValueError(f"obs[{label_key!r}] has one value only ({labels[0]}): there is nothing to tell apart.")
    cells = open_cells(adata, _encode_labels(adata, label_key, labels))
    held_out = open_cells(validation)
    truth = _encode_labels(validation, label_key, labels)
    weight = None
    if recipe.class_weight == "balanced":
        classes = np.arange(len(labels))
        weight = torch.tensor(compute_class_weight("balanced", classes=classes, y=cells.targets), dtype=torch.float32)
    model = copy.deepcopy(model)
    model.genes = list(cells.genes)
    check_cells(model, held_out)
    model.set_key_stabiliser(recipe.key_stabiliser)
    classifier = Classifier(model, labels, seed)
    _choose_trainable(classifier, recipe.trainable_layers)
    identity = _identify(classifier, (cells, held_out), label_key, list(truth), list(cells.targets), n_epochs, patience,
                         batch_size, accumulate, learning_rate, recipe, seed, precision, cache) if checkpoint else ""  # fmt: skip
    fabric = Fabric(accelerator=accelerator, devices=1, precision=precision)
    trainable = [parameter for parameter in classifier.parameters() if parameter.requires_grad]
    module, optimizer = fabric.setup(classifier, torch.optim.AdamW(trainable, lr=learning_rate))
    state = _read_checkpoint(checkpoint, identity)
    if state:
        classifier.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        _set_gradients(classifier, state["gradients"])
    history, step, best = state.get("history", []), state.get("step", 0), state.get("best", {})
    rate = history[-1]["learning_rate"] if history else 0.0  # an epoch may pass without a step
    weight = None if weight is None else weight.to(fabric.device)
    steps_per_epoch = _steps_per_epoch(len(cells), batch_size, accumulate, recipe)
    keep = {"precision": cache, "batch_size": batch_size, "progress": progress,
            "folder": Path(checkpoint).parent if checkpoint else None}  # fmt: skip
    n_frozen = _count_frozen(classifier, recipe) if cache else 0
    inputs = FrozenPrefix(model, cells, n_frozen, memory=cache_memory, **keep)
    held_out = FrozenPrefix(model, held_out, n_frozen, memory=cache_memory - inputs.bytes_in_memory, **keep)
    bar = _progress_bar("fine-tune", len(history), n_epochs, len(cells), progress)
    with contextlib.closing(inputs), contextlib.closing(held_out), bar:
        for epoch in range(len(history), n_epochs):
            if best and epoch - best["epoch"] >= patience:
                break
            loss_sum = correct = 0
            for indices, bins, is_step in _batches(cells, batch_size, accumulate, seed, epoch, recipe):
                target = torch.from_numpy(cells.targets[indices]).to(fabric.device)
                logits = module(inputs.batch(indices, bins), n_frozen)  # (cells, classes)
                loss = F.cross_entropy(logits, target, weight)
                fabric.backward(loss / accumulate if recipe.scale_loss_by_accumulation else loss)
                loss_sum += loss.item() * len(target)
                correct += (logits.argmax(1) == target).sum().item()
                if is_step:
                    rate = learning_rate_at(
                        step, n_epochs * steps_per_epoch, steps_per_epoch, learning_rate, recipe.lr_schedule
                    )
                    _take_step(optimizer, rate)
                    step += 1
                    if recipe.redraw_features and step % 1000 == 0:
                        model.redraw_features(seed + step)
                bar.update(len(indices))
            row = {
                "epoch": epoch + 1,
                "learning_rate": rate,
                "loss": loss_sum / len(cells),
                "accuracy": correct / len(cells),
            }
            row |= _measure(classifier, held_out, truth, batch_size)
            history.append(row)
            score = -row["val_loss"] if recipe.select_by == "loss" else row[f"val_{recipe.select_by}"]
            if not best or score > best["score"]:
                best = {"epoch": epoch + 1, "score": score, "model": copy.deepcopy(classifier.state_dict())}
            bar.set_postfix({name: f"{row[name]:.3f}" for name in ("loss", "val_loss", "val_accuracy", "val_macro_f1")})
            _write_checkpoint(
                checkpoint, identity, model=classifier.state_dict(), optimizer=optimizer.state_dict(),
                gradients=_get_gradients(classifier), history=history, step=step, best=best,
            )  # fmt: skip
            _write_log(log, history)
    classifier.load_state_dict(best["model"])
    classifier.history = pd.DataFrame(history).assign(best=lambda rows: rows["epoch"] == best["epoch"])
    return classifier.eval()


def _encode_labels(adata, label_key, labels):
    codes = pd.Categorical(adata.obs[label_key].astype(str), categories=labels).codes
    if (codes < 0).any():
        unknown = sorted(set(adata.obs[label_key].astype(str)) - set(labels))
        raise ValueError(f"Validation cells have labels that no training cell has: {', '.join(unknown)}.")
    return codes.astype(np.int64)


def _split_off_validation(adata, label_key, seed):
    labels = adata.obs[label_key].astype(str)
    smallest = labels.value_counts()
    n_validation = max(adata.n_obs // 8, len(smallest))
    if smallest.iloc[-1] < 2 or n_validation + len(smallest) > adata.n_obs:
        raise ValueError(
            f"Label {smallest.index[-1]!r} has {smallest.iloc[-1]} of {adata.n_obs} cells: too few to train on some and "
            "choose the epoch on others; merge or drop it, or pass validation=."
        )
    splitter = StratifiedShuffleSplit(1, test_size=n_validation, random_state=seed)
    train, held_out = next(splitter.split(np.zeros(adata.n_obs), labels))
    return adata[np.sort(train)], adata[np.sort(held_out)]


def _choose_trainable(classifier, layers):
    """Switch gradients off where nothing is learnt: the token head always, and the frozen part of the encoder."""
    encoder = classifier.encoder
    encoder.to_out.requires_grad_(False)
    if layers == "all":
        return
    encoder.requires_grad_(False)
    if layers != "head":
        encoder.norm.requires_grad_(True)
        depth = encoder.config.depth
        for layer in (-1,) if layers == "last" else layers:
            if not -depth <= layer < depth:
                raise ValueError(f"Recipe.trainable_layers names layer {layer}, but the encoder has {depth} layers.")
            encoder.performer.net.layers[layer].requires_grad_(True)


def _count_frozen(classifier, recipe):
    """Count the first layers that never change and whose result is the cell's own: these can be kept."""
    encoder = classifier.encoder
    if encoder.token_emb.weight.requires_grad or recipe.redraw_features or recipe.key_stabiliser == "batch":
        return 0
    frozen = [not any(p.requires_grad for p in layer.parameters()) for layer in encoder.performer.net.layers]
    return [*frozen, False].index(False)


@torch.inference_mode()
def _measure(classifier, held_out, truth, batch_size):
    """Return loss, accuracy and macro-F1 over the labels present, on validation cells."""
    logits = []
    for start, bins in held_out.cells.in_order(batch_size):
        inputs = held_out.batch(np.arange(start, start + len(bins)), bins)
        logits.append(classifier(inputs, held_out.n_layers).float().cpu())
    logits = torch.cat(logits)
    predicted = logits.argmax(1).numpy()
    return {
        "val_loss": F.cross_entropy(logits, torch.from_numpy(truth)).item(),
        "val_accuracy": float((predicted == truth).mean()),
        "val_macro_f1": float(f1_score(truth, predicted, labels=np.unique(truth), average="macro", zero_division=0)),
    }


def _batches(cells, batch_size, accumulate, seed, epoch, recipe):
    """Yield (cell numbers, bins, whether an optimiser step follows)."""
    n_batches = math.ceil(len(cells) / batch_size)
    for number, (indices, bins) in enumerate(cells.epoch(batch_size, seed, epoch, recipe.sampling), 1):
        is_last = number == n_batches and recipe.leftover_steps == "step"
        yield indices, bins, number % accumulate == 0 or is_last


def _steps_per_epoch(n_cells, batch_size, accumulate, recipe):
    steps = math.ceil(n_cells / batch_size) / accumulate
    return max(1, math.ceil(steps) if recipe.leftover_steps == "step" else int(steps))


def _take_step(optimizer, rate):
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.step()
    optimizer.zero_grad()


def _get_gradients(module):
    """Return what leaks into the next epoch: None everywhere but with leftover_steps="leak"."""
    return [parameter.grad for parameter in module.parameters()]


def _set_gradients(module, gradients):
    for parameter, gradient in zip(module.parameters(), gradients, strict=True):
        parameter.grad = None if gradient is None else gradient.to(parameter.device)


def _progress_bar(what, epochs_done, n_epochs, n_cells, progress):
    return tqdm(
        desc=what, total=n_epochs * n_cells, initial=epochs_done * n_cells, unit="cell", file=sys.stdout, mininterval=1,
        disable=not progress,
    )  # fmt: skip


def _identify(module, data, *arguments):
    """Hash all that fixes a training run, so that a checkpoint is continued only by the same call."""
    digest = hashlib.sha256(repr((module.config, arguments)).encode())
    for tensor in module.state_dict().values():
        digest.update(tensor.detach().cpu().numpy().tobytes())
    for adata in data:
        if adata is not None:
            for part in open_cells(adata).identity():
                digest.update(part)
    return digest.hexdigest()


def _read_checkpoint(path, identity):
    """Return the state of an interrupted run of the same call, {} if there is none."""
    if not path or not Path(path).exists():
        return {}
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file raises one of many types
        warnings.warn(
            f"The checkpoint {path} is damaged ({type(error).__name__}): starting from the beginning.", stacklevel=3
        )
        return {}
    return state if state["identity"] == identity else {}


def _write_checkpoint(path, identity, **state):
    if not path:
        return
    path = Path(path)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save({"identity": identity, **state}, temporary)
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # a full disk must not end the training
        with contextlib.suppress(OSError):
            temporary.unlink()
        warnings.warn(f"The checkpoint {path} was not written ({error}): training goes on without.", stacklevel=3)


def _write_log(path, history):
    if path:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        pd.DataFrame(history).to_csv(path, index=False)
