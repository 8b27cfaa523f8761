"""Pretraining and fine-tuning: two flat loops on Lightning Fabric."""

import contextlib
import copy
import functools
import hashlib
import math
import sys
import time
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

from ..data.cells import check_cells, mask_bins, open_cells
from ..scale.checkpoint import read_checkpoint, write_checkpoint
from ..sources.datasets import check_column, check_known
from ..model.encoder import Classifier, ScBert
from ..scale.prefix import FrozenPrefix
from ..experiments.pretraining import score_masks
from ..scale.processes import (
    add_up,
    check_devices,
    gather_random_state,
    gather_weights,
    launch,
    make_fabric,
    save_state,
    set_random_state,
)
from .recipe import Recipe, learning_rate_at, make_optimizer
from ..run.record import count_processes
from ..scale.stream import CellStore


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
    clip_norm: float | None = 1.0,
    redraw_every: int = 1000,
    recipe: Recipe = Recipe(),
    seed: int = 0,
    checkpoint: str | Path | None = None,
    checkpoint_every: int = 500,
    log: str | Path | None = None,
    accelerator: str = "auto",
    devices: int = 1,
    nodes: int = 1,
    strategy: str = "auto",
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
    n_epochs
        Passes over the cells.
    batch_size, accumulate
        Cells a forward pass, shared out over all devices, so that their number changes the time and not the result;
        and forward passes an optimiser step, between which gradients are not synchronised.
    learning_rate, clip_norm
        Peak rate of the optimiser, and the largest norm of the gradient of the mean loss over a step's masks; None
        not to clip.
    mask_share
        Share of each cell's non-zero tokens to predict.
    redraw_every
        Optimiser steps between redraws of the random features; which ones follows from seed and step.
    recipe
        Of its switches, sampling, leftover_steps, lr_schedule, optimizer and key_stabiliser matter here.
    checkpoint, checkpoint_every
        A file for the state after each epoch and each so many optimiser steps: the same call continues from it after
        an interruption, on any number of devices. The one before is kept beside it, and read if the newest is damaged.
    log
        A CSV file for the history.
    accelerator, precision
        Handed to Lightning Fabric: "32-true" or "bf16-mixed".
    devices, nodes, strategy
        GPUs, or processes of a CPU, on each of so many machines. Several on one machine are started here; under
        torchrun and srun leave these out: what they started is used. "auto" is "ddp"; "fsdp" needs GPUs.
    progress
        Show a progress bar.

    Returns
    -------
    One row an epoch: learning rate, optimiser steps so far, cells seen, training loss and masked accuracy and, with
    validation cells, `val_loss`, `val_accuracy` and `val_mode_accuracy` (always the cell's commonest bin, see
    `scbert.probe.score_masks`). ``.attrs["seconds"]`` and ``.attrs["validation_seconds"]`` say how long training and
    measuring took, interruptions left out, ``.attrs["earlier_seconds"]`` how much of both was before the last one.

    Raises
    ------
    ValueError
        Cells not tokenized, for another vocabulary, or with other bins than the model's; more devices than there are;
        a loss that is no number.

    Paper: Methods, "pretraining"; Fig. 1a. Optimiser, rate, batch and masks are not in the paper.
    Differs from the published code: each cell once an epoch, a step on what is left over, a schedule per step, AdamW
    (all in `Recipe`); the loss is the mean over all masks of a step, where the script averages means of batches;
    metrics over all validation cells, under fixed masks, summed as they come.
    """
    cells = open_cells(adata)
    check_cells(model, cells)
    model.genes = list(cells.genes)
    if validation is not None:
        check_cells(model, validation)
    check_devices(devices, nodes, strategy)
    if min(n_epochs + 1, batch_size, accumulate, redraw_every, checkpoint_every) < 1:
        raise ValueError("batch_size, accumulate, redraw_every and checkpoint_every must be at least 1.")
    model.set_key_stabiliser(recipe.key_stabiliser)
    options = {
        "n_epochs": n_epochs, "batch_size": batch_size, "accumulate": accumulate, "learning_rate": learning_rate,
        "mask_share": mask_share, "clip_norm": clip_norm, "redraw_every": redraw_every, "recipe": recipe, "seed": seed,
        "precision": precision,
    }  # fmt: skip
    identity = _identify(model, (cells, validation), *options.values()) if checkpoint else ""
    where = {"checkpoint": checkpoint, "checkpoint_every": checkpoint_every, "log": log, "identity": identity,
             "accelerator": accelerator, "strategy": strategy, "progress": progress}  # fmt: skip
    if devices == 1 or count_processes() > 1:
        history, attributes, _ = _pretrain(model, cells, validation, **options, **where)
    else:
        history, attributes, weights = launch(_pretrain_here, devices, model, cells, validation, options | where)
        model.load_state_dict({name: torch.from_numpy(array) for name, array in weights.items()})
    model.eval()
    history = pd.DataFrame(history)
    history.attrs = attributes
    return history


def _pretrain_here(model, cells, validation, options):
    """Run one of several processes; weights come back as arrays, which pickle by value."""
    history, attributes, weights = _pretrain(model, cells, validation, **options)
    return history, attributes, {name: tensor.cpu().numpy() for name, tensor in weights.items()}


def _pretrain(
    model, cells, validation, *, n_epochs, batch_size, accumulate, learning_rate, mask_share, clip_norm, redraw_every,
    recipe, seed, precision, checkpoint, checkpoint_every, log, identity, accelerator, strategy, progress,
):  # fmt: skip
    """Train in this process, beside those that were started with it; return history, attributes and weights."""
    fabric = make_fabric(accelerator, strategy, precision)
    part, is_first = (fabric.global_rank, fabric.world_size), fabric.is_global_zero
    trained = copy.deepcopy(model) if strategy == "fsdp" else model  # FSDP takes a model's weights apart
    module, optimizer = fabric.setup(trained, make_optimizer(recipe, trained.parameters(), learning_rate))
    steps_per_epoch = _steps_per_epoch(len(cells), batch_size, accumulate, recipe)
    n_batches = math.ceil(len(cells) / batch_size)
    state = _resume(fabric, module, optimizer, checkpoint, identity)
    history, step, rate, seconds, skip = (state[name] for name in ("history", "step", "rate", "seconds", "batch"))
    earlier = sum(seconds.values())
    # Summed loss, hits, masks and cells of the epoch so far, of this process; after an interruption the first has all.
    totals = torch.tensor(state["totals"], dtype=torch.float64) * is_first
    clock = time.monotonic()

    def keep(epoch, batch):
        nonlocal clock
        seconds["training"] += time.monotonic() - clock
        if checkpoint:
            save_state(fabric, checkpoint, {
                "model": module, "optimizer": optimizer, "identity": identity, "epoch": epoch, "batch": batch,
                "step": step, "rate": rate, "totals": add_up(fabric, totals).tolist(), "history": history,
                "seconds": seconds, "random": gather_random_state(fabric),
            })  # fmt: skip
        clock = time.monotonic()

    done = state["epoch"] * len(cells) + min(skip * batch_size, len(cells))
    with _progress_bar("pretrain", done, n_epochs * len(cells), progress and is_first) as bar:
        for epoch in range(state["epoch"], n_epochs):
            batches = _batches(cells, batch_size, accumulate, seed, epoch, recipe, skip, part)
            pending = 0  # masks since the last step of the optimiser
            for number, indices, bins, is_step in batches:
                if not len(indices):  # fewer cells than processes: this one joins in with a cell without tokens
                    bins = bins.new_zeros(1, bins.shape[1])
                masks = [(seed, epoch, number, int(cell)) for cell in indices] or [(seed,)]
                seen, where = mask_bins(bins, model.config.mask_token, masks, mask_share=mask_share)
                target = bins[where].to(fabric.device)  # (masked positions,)
                with fabric.no_backward_sync(module, enabled=not is_step):
                    logits = module(seen.to(fabric.device), where.to(fabric.device))  # (masked positions, n_bins + 2)
                    loss = F.cross_entropy(logits, target, reduction="sum")
                    fabric.backward(loss)
                hits = (logits.argmax(1) == target).sum().item()
                totals += torch.tensor([loss.item(), hits, len(target), len(indices)], dtype=torch.float64)
                pending += len(target)
                if is_step:
                    n_masks = add_up(fabric, torch.tensor(float(pending))).item()
                    rate = learning_rate_at(
                        step, n_epochs * steps_per_epoch, steps_per_epoch, learning_rate, recipe.lr_schedule
                    )
                    # Processes yield the mean of their gradients; what is wanted is their sum over all masks.
                    _scale_gradients(trained, fabric.world_size / max(n_masks, 1))
                    if clip_norm is not None:
                        fabric.clip_gradients(module, optimizer, max_norm=clip_norm, error_if_nonfinite=False)
                    _take_step(optimizer, rate)
                    _check_loss(totals[0], step, learning_rate)
                    step, pending = step + 1, 0
                    if step % redraw_every == 0:
                        trained.redraw_features(seed + step)
                    # Gradients that leak into the next epoch are in no checkpoint: the step before them is the last.
                    leaks = recipe.leftover_steps == "leak" and n_batches - accumulate <= number < n_batches - 1
                    if step % checkpoint_every == 0 or leaks:
                        keep(epoch, number + 1)
                bar.update(len(indices) * part[1])
            loss_sum, correct, n_masked, n_cells = add_up(fabric, totals).tolist()
            row = {
                "epoch": epoch + 1,
                "learning_rate": rate,
                "cells": int(n_cells),
                "loss": loss_sum / max(n_masked, 1),
                "accuracy": correct / max(n_masked, 1),
            }
            if validation is not None:
                start = time.monotonic()
                row |= _measure_masks(fabric, trained, module, validation, seed, mask_share, batch_size)
                seconds["validation"] += time.monotonic() - start
                clock += time.monotonic() - start
            history.append(row)
            totals, skip = totals * 0, 0
            bar.set_postfix({name: f"{row[name]:.3f}" for name in row if name.endswith(("loss", "accuracy"))})
            if not pending:
                keep(epoch + 1, 0)
            if is_first:
                _write_log(log, history)
    attributes = {
        "seconds": seconds["training"], "validation_seconds": seconds["validation"], "earlier_seconds": earlier
    }  # fmt: skip
    return history, attributes, gather_weights(trained, module, is_sharded=strategy == "fsdp")


def _resume(fabric, module, optimizer, checkpoint, identity):
    """Continue from the checkpoint that the first process finds, if any; return all that is not in the objects."""
    file = fabric.broadcast(read_checkpoint(checkpoint, identity)[0] if fabric.is_global_zero else None)
    if file is None:
        return {"epoch": 0, "batch": 0, "step": 0, "rate": 0.0, "totals": [0.0] * 4, "history": [],
                "seconds": {"training": 0.0, "validation": 0.0}}  # fmt: skip
    state = fabric.load(file, {"model": module, "optimizer": optimizer}, weights_only=True)
    set_random_state(fabric, state["random"])
    return state


def _measure_masks(fabric, model, module, validation, seed, mask_share, batch_size):
    """Return the columns of the history that say how well masked tokens of validation cells are predicted."""
    part = (fabric.global_rank, fabric.world_size)
    scores = score_masks(
        model, validation, module=module, part=part, seed=seed, mask_share=mask_share, batch_size=batch_size
    )
    columns = ["loss", "correct", "cell_correct", "n_masked"]
    loss, correct, mode_correct, n_masked = add_up(fabric, torch.tensor(scores[columns].sum().to_numpy(float))).tolist()
    total = max(n_masked, 1)
    return {"val_loss": loss / total, "val_accuracy": correct / total, "val_mode_accuracy": mode_correct / total}


def _scale_gradients(module, factor):
    for parameter in module.parameters():
        if parameter.grad is not None:
            parameter.grad.mul_(factor)


def _check_loss(loss_sum, step, learning_rate):
    if not math.isfinite(loss_sum):
        raise ValueError(
            f"The loss is {float(loss_sum)} at step {step + 1}: lower learning_rate ({learning_rate}), or set clip_norm."
        )


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
    module, optimizer = fabric.setup(classifier, make_optimizer(recipe, trainable, learning_rate))
    _, state = read_checkpoint(checkpoint, identity)
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
    n_frozen = _count_frozen(classifier, recipe) if cache and not model.config.expressed_only else 0
    inputs = FrozenPrefix(model, cells, n_frozen, memory=cache_memory, **keep)
    held_out = FrozenPrefix(model, held_out, n_frozen, memory=cache_memory - inputs.bytes_in_memory, **keep)
    bar = _progress_bar("fine-tune", len(history) * len(cells), n_epochs * len(cells), progress)
    with contextlib.closing(inputs), contextlib.closing(held_out), bar:
        for epoch in range(len(history), n_epochs):
            if best and epoch - best["epoch"] >= patience:
                break
            loss_sum = correct = 0
            for _, indices, bins, is_step in _batches(cells, batch_size, accumulate, seed, epoch, recipe):
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
            kept = {
                "identity": identity, "model": classifier.state_dict(), "optimizer": optimizer.state_dict(),
                "gradients": _get_gradients(classifier), "history": history, "step": step, "best": best,
            }  # fmt: skip
            write_checkpoint(checkpoint, functools.partial(torch.save, kept))
            _write_log(log, history)
    classifier.load_state_dict(best["model"])
    classifier.history = pd.DataFrame(history).assign(best=lambda rows: rows["epoch"] == best["epoch"])
    return classifier.eval()


def _encode_labels(adata, label_key, labels):
    names = adata.obs[label_key].astype(str)
    check_known(names, labels)
    return pd.Categorical(names, categories=labels).codes.astype(np.int64)


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


def _batches(cells, batch_size, accumulate, seed, epoch, recipe, skip=0, part=(0, 1)):
    """Yield (number of the batch, cell numbers, bins, whether an optimiser step follows)."""
    n_batches = math.ceil(len(cells) / batch_size)
    batches = cells.epoch(batch_size, seed, epoch, recipe.sampling, skip=skip, part=part)
    for number, (indices, bins) in enumerate(batches, skip):
        is_last = number + 1 == n_batches and recipe.leftover_steps == "step"
        yield number, indices, bins, (number + 1) % accumulate == 0 or is_last


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


def _progress_bar(what, done, total, progress):
    return tqdm(desc=what, total=total, initial=done, unit="cell", file=sys.stdout, mininterval=1, disable=not progress)


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


def _write_log(path, history):
    if path:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        pd.DataFrame(history).to_csv(path, index=False)
