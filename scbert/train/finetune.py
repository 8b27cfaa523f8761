"""Pretraining and fine-tuning: two flat loops on Lightning Fabric."""

import contextlib
import copy
import functools
import math
import warnings
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import torch
from lightning_fabric import Fabric
from scipy import sparse
from sklearn.model_selection import StratifiedShuffleSplit
from sklearn.utils.class_weight import compute_class_weight
from torch.nn import functional as F

from ..data.cells import open_cells, to_tokens
from ..data.checks import check_cells, check_column, check_known, check_vocabulary
from ..data.preprocess import bin_counts, library_size, thin_counts
from ..memory.companions import remember
from ..memory.regression import score_labels
from ..model.bundle import say_outcome
from ..model.classifier import Classifier
from ..model.encoder import ScBert
from ..model.packed import few_threads
from ..scale.checkpoint import read_checkpoint, write_checkpoint
from ..scale.prefix import FrozenPrefix
from ..scale.stream import CellStore
from . import steps
from .recipe import Recipe, learning_rate_at, make_optimizer

ATTEMPTS = 3
"""Heads that a training starts from at most, one after the other, while it does not learn."""
CYCLES = 2
"""How often the schedule of the epochs runs at most, one after the other, while a training still learns."""


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
    companions: bool = True,
    progress: bool = True,
) -> Classifier:
    """Train an annotator on labelled cells, starting from an encoder, which is left as it was.

    Parameters
    ----------
    adata
        Tokenized cells with ``obs[label_key]``, or a store of them (`scbert.stream`).
    validation
        Tokenized, labelled cells that choose the best epoch; an eighth of `adata`, stratified, if None. Test
        cells have no place here.
    n_epochs, patience
        Passes over the cells, and how many without a better validation score end the training. With
        ``Recipe.until_converged`` it takes up to twice as many, and starts from another head where it has not learnt.
    batch_size, accumulate, learning_rate
        Cells a forward pass, forward passes an optimiser step, peak rate of AdamW.
    checkpoint, log, accelerator, precision
        As in `pretrain`.
    cache
        With frozen first layers, run them once for each cell and keep what they yield, as ``"float32"`` or
        ``"float16"``; None to run them in every epoch. Nothing is kept where that would change the training:
        random features redrawn, cells thinned, or ``key_stabiliser="batch"``.
    cache_memory
        Bytes to keep in memory; more goes to a file beside the checkpoint, else to the temporary folder. A full
        disk costs time, not the training; with a store far larger than the disk, pass ``cache=None``.
    companions
        Remember the training cells, see `scbert.memory.companions`: which genes they express, since all others are to be
        ignored in a query, and (but of a store, which holds no counts) logistic regression and nearest centroid of the
        same cells, depths and distances, with which `scbert.annotate` compares.

    Returns
    -------
    The classifier of the best epoch; ``.history`` has one row an epoch, ``.outcome`` says whether it has learnt (else there
    is a warning), ``.ontology_ids`` the identifiers of the labels, from ``obs[f"{label_key}_ontology_term_id"]`` or
    CELLxGENE's ``obs["cell_type_ontology_term_id"]``.

    A ValueError if cells are not tokenized for the model, have less than a tenth of its genes, no such column (or one that
    scbert writes itself), one label only, or too few of a label to leave any for validation.

    Paper: Methods, "fine-tuning". Optimiser, rate, batch and stopping are not in the paper.
    Differs from the published code: the cells that choose the epoch are neither training nor test cells; random
    features stay as they are; all layers learn by default; see `Recipe`.
    """
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
    cells, targets = open_cells(adata), _encode_labels(adata, label_key, labels)
    held_out = open_cells(validation)
    check_cells(model, cells)
    check_vocabulary(cells.matched_share, len(cells.genes))
    truth = _encode_labels(validation, label_key, labels)
    if recipe.thin < 1 and getattr(adata, "X", None) is None:
        raise ValueError("Recipe.thin needs the counts of the training cells, which these do not have: set it to 1.")
    counts = (sparse.csr_matrix(adata.X), library_size(adata)) if recipe.thin < 1 else None
    weight = None
    if recipe.class_weight == "balanced":
        classes = np.arange(len(labels))
        weight = torch.tensor(compute_class_weight("balanced", classes=classes, y=targets), dtype=torch.float32)
    model = copy.deepcopy(model)
    model.genes = list(cells.genes)
    check_cells(model, held_out)
    model.set_key_stabiliser(recipe.key_stabiliser)
    options = {
        "n_epochs": n_epochs, "patience": patience, "batch_size": batch_size, "accumulate": accumulate,
        "learning_rate": learning_rate, "recipe": recipe, "seed": seed, "precision": precision, "cache": cache,
    }  # fmt: skip
    where = {"log": log, "accelerator": accelerator, "cache_memory": cache_memory, "progress": progress}
    labelled, kept, epochs = (label_key, list(truth), list(targets)), None, 0
    for attempt in range(1, 1 + (ATTEMPTS if recipe.until_converged else 1)):
        classifier = Classifier(copy.deepcopy(model), labels, seed + 1000 * (attempt - 1), recipe.head)
        _choose_trainable(classifier, recipe.trainable_layers)
        identity = steps.identify(classifier, (cells, held_out), *labelled, *options.values()) if checkpoint else ""
        file = checkpoint if attempt == 1 or not checkpoint else f"{checkpoint}.{attempt}"
        score = _train(classifier, cells, held_out, targets, truth, weight, counts, **options, **where,
                       checkpoint=file, identity=identity)  # fmt: skip
        epochs += len(classifier.history)
        if kept is None or score > kept[0]:
            kept = score, classifier
        if classifier.outcome["state"] != "dead":
            break
    classifier = kept[1]
    classifier.outcome |= {"epochs": epochs, "attempts": attempt}
    if classifier.outcome["state"] != "converged":
        warnings.warn(say_outcome(classifier.outcome), stacklevel=2)
    classifier.ontology_ids = _find_ontology_ids(adata.obs, label_key)
    if companions and isinstance(adata, anndata.AnnData):
        remember(classifier, adata, validation, label_key, seed=seed, class_weight=recipe.class_weight)
    elif companions:
        classifier.remember({"genes_seen": torch.from_numpy(cells.genes_seen())})
    return classifier.eval()


def _train(
    classifier, cells, held_out, targets, truth, weight, counts, *, n_epochs, patience, batch_size, accumulate,
    learning_rate, recipe, seed, precision, cache, cache_memory, checkpoint, identity, log, accelerator, progress,
):  # fmt: skip
    """Train a classifier from its head's starting weights, and leave it with those of its best epoch; return that score."""
    model, guessed = classifier.encoder, steps.guess(targets, truth, weight)
    fabric = Fabric(accelerator=accelerator, devices=1, precision=precision)
    trainable = [parameter for parameter in classifier.parameters() if parameter.requires_grad]
    module, optimizer = fabric.setup(classifier, make_optimizer(recipe, trainable, learning_rate))
    _, state = read_checkpoint(checkpoint, identity)
    if not state and recipe.head == "sound" and model.config.expressed_only:
        _, bins = next(iter(cells.epoch(64, seed, 0)))
        with torch.no_grad():
            classifier.head.start(model.encode_expressed(bins.to(fabric.device))[0])
    if state:
        classifier.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        _set_gradients(classifier, state["gradients"])
    history, step, best = state.get("history", []), state.get("step", 0), state.get("best", {})
    rate = history[-1]["learning_rate"] if history else 0.0  # an epoch may pass without a step
    weight = None if weight is None else weight.to(fabric.device)
    steps_per_epoch = steps.count_steps(len(cells), batch_size, accumulate, recipe)
    n_steps = n_epochs * steps_per_epoch
    keep = {"precision": cache, "batch_size": batch_size, "progress": progress,
            "folder": Path(checkpoint).parent if checkpoint else None}  # fmt: skip
    n_frozen = _count_frozen(classifier, recipe) if cache and not model.config.expressed_only else 0
    inputs = FrozenPrefix(model, cells, n_frozen, memory=cache_memory, **keep)
    held_out = FrozenPrefix(model, held_out, n_frozen, memory=cache_memory - inputs.bytes_in_memory, **keep)
    bar = steps.show_progress("fine-tune", len(history) * len(cells), n_epochs * len(cells), progress)
    with contextlib.closing(inputs), contextlib.closing(held_out), bar, few_threads(model.config):
        for epoch in range(len(history), n_epochs * (CYCLES if recipe.until_converged else 1)):
            if epoch == n_epochs and steps.judge(history, guessed, n_epochs) == "converged":
                break
            bar.total = len(cells) * n_epochs * (1 + epoch // n_epochs)
            if best and epoch - best["epoch"] >= patience:
                break
            loss_sum, correct, random = 0, 0, np.random.default_rng([seed, epoch, 1])
            for _, indices, bins, is_step in steps.draw_batches(cells, batch_size, accumulate, seed, epoch, recipe):
                target = torch.from_numpy(targets[indices]).to(fabric.device)
                if counts is not None:
                    thinned = thin_counts(*(part[indices] for part in counts), recipe.thin, random)
                    bins = to_tokens(bin_counts(*thinned, model.config.n_bins))
                logits = module(inputs.batch(indices, bins), n_frozen)  # (cells, classes)
                loss = F.cross_entropy(logits, target, weight)
                fabric.backward(loss / accumulate if recipe.scale_loss_by_accumulation else loss)
                loss_sum += loss.item() * len(target)
                correct += (logits.argmax(1) == target).sum().item()
                if is_step:
                    rate = learning_rate_at(step % n_steps, n_steps, steps_per_epoch, learning_rate, recipe.lr_schedule)
                    steps.take_step(optimizer, rate)
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
            steps.write_log(log, history)
    classifier.load_state_dict(best["model"])
    classifier.history = pd.DataFrame(history).assign(best=lambda rows: rows["epoch"] == best["epoch"])
    classifier.outcome = {"state": steps.judge(history, guessed, n_epochs * math.ceil(len(history) / n_epochs))}
    return best["score"]


def _encode_labels(adata, label_key, labels):
    names = adata.obs[label_key].astype(str)
    check_known(names, labels)
    return pd.Categorical(names, categories=labels).codes.astype(np.int64)


def _find_ontology_ids(obs, label_key):
    """Return label -> identifier, of the labels whose cells all have the same in a column such as CELLxGENE's."""
    keys = [f"{key}_ontology_term_id" for key in (label_key, "cell_type")]
    keys = [key for key in keys if key in obs and key != label_key]
    pairs = pd.DataFrame({key: obs[key].astype(str) for key in [label_key, *keys[:1]]}).drop_duplicates()
    pairs = pairs[~pairs[label_key].duplicated(keep=False)]
    return {label: term for label, *terms in pairs.itertuples(index=False) for term in terms if ":" in term}


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
    changes = recipe.redraw_features or recipe.key_stabiliser == "batch" or recipe.thin < 1
    if encoder.token_emb.weight.requires_grad or changes:
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
    accuracy, macro_f1 = score_labels(truth, logits.argmax(1).numpy())
    loss = F.cross_entropy(logits, torch.from_numpy(truth)).item()
    return {"val_loss": loss, "val_accuracy": accuracy, "val_macro_f1": macro_f1}


def _get_gradients(module):
    """Return what leaks into the next epoch: None everywhere but with leftover_steps="leak"."""
    return [parameter.grad for parameter in module.parameters()]


def _set_gradients(module, gradients):
    for parameter, gradient in zip(module.parameters(), gradients, strict=True):
        parameter.grad = None if gradient is None else gradient.to(parameter.device)
