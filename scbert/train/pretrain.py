"""Pretraining: a flat loop on Lightning Fabric, over masked tokens."""

import copy
import math
import time
from collections.abc import Iterator
from pathlib import Path

import anndata
import pandas as pd
import torch
from torch.nn import functional as F

from ..data.cells import CellDataset, open_for
from ..data.checks import check_vocabulary
from ..data.masking import find_commonest_bin, mask_bins
from ..model.encoder import ScBert
from ..model.packed import few_threads
from ..paths import count_processes
from ..scale.checkpoint import read_checkpoint
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
from ..scale.stream import CellStore
from . import steps
from .recipe import Recipe, learning_rate_at, make_optimizer


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
    batch_size, accumulate
        Cells a forward pass, shared out over all devices, so that their number changes the time and not the result;
        and forward passes an optimiser step, between which gradients are not synchronised.
    learning_rate, clip_norm
        Peak rate, and the largest norm of the gradient of the mean loss over a step's masks; None not to clip.
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
    precision
        "32-true" or "bf16-mixed", handed to Lightning Fabric as is `accelerator`.
    devices, nodes, strategy
        GPUs, or processes of a CPU, on each of so many machines. Several on one machine are started here; under
        torchrun and srun leave these out: what they started is used. "auto" is "ddp"; "fsdp" needs GPUs.

    Returns
    -------
    One row an epoch: learning rate, optimiser steps so far, cells seen, training loss and masked accuracy and, with
    validation cells, `val_loss`, `val_accuracy` and `val_mode_accuracy` (always the cell's commonest bin, see
    `scbert.masks.score_masks`). ``.attrs["seconds"]`` and ``.attrs["validation_seconds"]`` say how long training and
    measuring took, interruptions left out, ``.attrs["earlier_seconds"]`` how much of both was before the last one.

    A ValueError if cells are not tokenized for this model or have less than a tenth of its genes, there are fewer devices,
    or the loss is no number.

    Paper: Methods, "pretraining"; Fig. 1a. Optimiser, rate, batch and masks are not in the paper.
    Differs from the published code: each cell once an epoch, a step on what is left over, a schedule per step, AdamW
    (all in `Recipe`); the loss is the mean over all masks of a step, where the script averages means of batches;
    metrics over all validation cells, under fixed masks, summed as they come.
    """
    cells = open_for(model, adata)
    check_vocabulary(cells.matched_share, len(cells.genes))
    model.genes = list(cells.genes)
    if validation is not None:
        validation = open_for(model, validation)
    check_devices(devices, nodes, strategy)
    if min(n_epochs + 1, batch_size, accumulate, redraw_every, checkpoint_every) < 1:
        raise ValueError("batch_size, accumulate, redraw_every and checkpoint_every must be at least 1.")
    model.set_key_stabiliser(recipe.key_stabiliser)
    options = {
        "n_epochs": n_epochs, "batch_size": batch_size, "accumulate": accumulate, "learning_rate": learning_rate,
        "mask_share": mask_share, "clip_norm": clip_norm, "redraw_every": redraw_every, "recipe": recipe, "seed": seed,
        "precision": precision,
    }  # fmt: skip
    identity = steps.identify(model, (cells, validation), *options.values()) if checkpoint else ""
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
    steps_per_epoch = steps.count_steps(len(cells), batch_size, accumulate, recipe)
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
    bar = steps.show_progress("pretrain", done, n_epochs * len(cells), progress and is_first)
    with bar, few_threads(model.config):
        for epoch in range(state["epoch"], n_epochs):
            batches = steps.draw_batches(cells, batch_size, accumulate, seed, epoch, recipe, skip, part)
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
                    steps.take_step(optimizer, rate)
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
                steps.write_log(log, history)
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
    options = {"module": module, "seed": seed, "mask_share": mask_share, "batch_size": batch_size}
    totals = torch.zeros(4, dtype=torch.float64)
    for _, bins, where, logits in predict_masks(
        model, validation, part=(fabric.global_rank, fabric.world_size), **options
    ):
        target, commonest = bins[where], find_commonest_bin(bins.masked_fill(where, 0), model.config.n_bins)
        losses = F.cross_entropy(logits, target, reduction="none").double()
        hits = [(says == target).sum() for says in (logits.argmax(1), commonest.expand_as(bins)[where])]
        totals += torch.stack([losses.sum(), *hits, where.sum()])
    loss, correct, mode_correct, n_masked = add_up(fabric, totals).tolist()
    total = max(n_masked, 1)
    return {"val_loss": loss / total, "val_accuracy": correct / total, "val_mode_accuracy": mode_correct / total}


@torch.no_grad()  # not inference_mode: sharded weights gathered under it could not be trained afterwards
def predict_masks(
    model: ScBert,
    cells: CellDataset | CellStore,
    *,
    module: torch.nn.Module | None = None,
    seed: int = 0,
    mask_share: float = 0.15,
    batch_size: int = 16,
    part: tuple[int, int] = (0, 1),
) -> Iterator[tuple[int, torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Yield (number of the first cell, bins, which tokens are masked, logits of these) of batches of cells, in order.

    Parameters
    ----------
    module
        What to call in place of the model: the model as Lightning Fabric wrapped it.
    seed, mask_share
        Fix the masks, cell by cell. Every masked token is hidden, since one that stayed visible could be copied.
    part
        (rank, number of processes): batches number rank, rank + processes, ... are predicted, and all processes call the
        module equally often, as sharded weights need. A ValueError if there is no such part.
    """
    module, (rank, n_parts), number = module or model, part, -1
    if not 0 <= rank < n_parts:
        raise ValueError(f"part is (rank, number of processes), such as (0, 1), not {part}.")
    device = next(model.parameters()).device
    for number, (start, bins) in enumerate(cells.in_order(batch_size)):
        if number % n_parts == rank:
            seeds = [(seed, start + i) for i in range(len(bins))]
            seen, where = mask_bins(bins, model.config.mask_token, seeds, mask_share=mask_share, replace_share=1)
            yield start, bins, where, module(seen.to(device))[where.to(device)].float().cpu()
    if number >= 0 and number % n_parts < rank:  # this part has a batch less than others
        module(bins.to(device))


def _scale_gradients(module, factor):
    for parameter in module.parameters():
        if parameter.grad is not None:
            parameter.grad.mul_(factor)


def _check_loss(loss_sum, step, learning_rate):
    if not math.isfinite(loss_sum):
        raise ValueError(
            f"The loss is {float(loss_sum)} at step {step + 1}: lower learning_rate ({learning_rate}), or set clip_norm."
        )
