"""Bundles: the directory that a model is kept in, written in one step and read as tensors and text only."""

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from ..data.preprocess import hash_genes
from .config import ScBertConfig


class Bundle(NamedTuple):
    """What a bundle directory holds."""

    config: ScBertConfig
    weights: dict[str, torch.Tensor]
    genes: list[str]
    labels: list[str] | None
    """Of a classifier; None of an encoder."""
    licence: str
    """Of the weights, where it is not the trainer's to choose."""
    memory: dict[str, torch.Tensor]
    """Of a classifier what it remembers of its training cells, see `scbert.memory.companions`; empty of others."""
    ontology_ids: dict[str, str]
    """Label -> its identifier in the Cell Ontology or another, where the training cells had one."""
    outcome: dict[str, str | int]
    """Of a classifier what its training came to, see `say_outcome`; may be empty."""
    head: str
    """Of a classifier the kind of its head; those that do not say are older, and "published"."""


def write_bundle(
    path: str | Path,
    weights: Mapping[str, torch.Tensor],
    config: ScBertConfig,
    genes: Sequence[str] | None,
    labels: Sequence[str] | None = None,
    *,
    licence: str = "",
    memory: Mapping[str, torch.Tensor] | None = None,
    ontology_ids: Mapping[str, str] | None = None,
    outcome: Mapping[str, str | int] | None = None,
    head: str = "",
    card: str = "",
) -> None:
    """Write everything into a temporary sibling, then put it in place in one step.

    Raises
    ------
    ValueError
        The model has no gene names, or `path` holds other things than a bundle.
    """
    if genes is None:
        raise ValueError("The model has no gene names yet: give ScBert(config, genes=...), or train it on cells.")
    path = Path(path)
    if path.is_file():
        raise ValueError(f"{path} is a file, and a bundle is a folder: give another name.")
    if path.is_dir() and any(path.iterdir()) and not (path / "config.json").is_file():
        raise ValueError(
            f"{path} is no model bundle, and a bundle would replace all that is in it: give another folder."
        )
    temporary = path.with_name(path.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    save_file({k: v.detach().contiguous() for k, v in weights.items()}, temporary / "model.safetensors")
    if memory:
        save_file({k: v.detach().contiguous() for k, v in memory.items()}, temporary / "memory.safetensors")
    about = {"format": 1, "genes_sha256": hash_genes(genes), **asdict(config)}
    about |= {} if labels is None else {"labels_sha256": hash_genes(labels)}
    more = {"licence": licence, "ontology_ids": ontology_ids, "outcome": outcome, "head": head}
    about |= {name: value for name, value in more.items() if value}
    (temporary / "config.json").write_text(json.dumps(about, indent=1) + "\n")
    (temporary / "genes.txt").write_text("\n".join(genes) + "\n")
    if labels is not None:
        (temporary / "labels.json").write_text(json.dumps(list(labels), indent=1) + "\n")
    for file in temporary.glob("*.safetensors"):  # written for their owner alone, whatever the umask
        shutil.copymode(temporary / "config.json", file)
    card = card or _write_card(config, labels, licence)
    (temporary / "README.md").write_text(f"{card}\n{say_outcome(outcome)}\n" if outcome else card)
    shutil.rmtree(path, ignore_errors=True)
    temporary.rename(path)


def _write_card(config, labels, licence):
    what = "encoder" if labels is None else f"annotator of {len(labels)} cell types: {', '.join(labels)}"
    size = f"{config.n_genes} genes, dim {config.dim}, depth {config.depth}"
    size += ", expressed genes only" if config.expressed_only else ""
    whose = say_licence(licence) if licence else "the weights are the trainer's own"
    return f"# scBERT {what}\n\nShape: {size}.\nTrained with scbert-companion; {whose}.\n"


def say_licence(licence: str) -> str:
    """Say on a model card what follows from weights that training started from."""
    return f"it started from weights under {licence}, and is not to be passed on under another licence"


def say_outcome(outcome: dict[str, str | int]) -> str:
    """Say what a training came to, see `scbert.train.steps.judge`."""
    heads = outcome["attempts"]
    how = f"{outcome['epochs']} epochs" + (f" in all ({heads} heads were tried)" if heads > 1 else "")
    nothing = "its names mean nothing. Train on more cells of each label, or with another learning_rate"
    return {
        "dead": f"The training has not learnt in {how}: it knows its own cells no better than a guess, so {nothing}.",
        "guessing": f"The training of {how} names validation cells no better than always the commonest label: "
        f"{nothing}.",
        "unfinished": f"The training was still improving after {how}: give it more n_epochs.",
        "converged": f"The training converged within {how}.",
    }[outcome["state"]]


def read_bundle(path: str | Path) -> Bundle:
    """Read a bundle directory: its files, each checked against the others.

    Raises
    ------
    ValueError
        A file is missing or truncated, or genes, labels and config do not fit each other.
    """
    path = Path(path)
    for name in ("config.json", "genes.txt", "model.safetensors"):
        if not (path / name).is_file():
            raise ValueError(f"{path} is not a model bundle: {name} is missing.")
    try:
        about = json.loads((path / "config.json").read_text())
        genes = (path / "genes.txt").read_text().splitlines()
        labels_file = path / "labels.json"
        labels = json.loads(labels_file.read_text()) if labels_file.exists() else None
        weights = load_file(path / "model.safetensors")
        memory_file = path / "memory.safetensors"
        memory = load_file(memory_file) if memory_file.exists() else {}
    except (SafetensorError, json.JSONDecodeError) as error:
        raise ValueError(f"The bundle {path} is damaged, copy or train it again ({error}).") from None
    genes_hash, labels_hash = about.pop("genes_sha256", None), about.pop("labels_sha256", None)
    licence, ontology_ids, outcome = about.pop("licence", ""), about.pop("ontology_ids", {}), about.pop("outcome", {})
    head = about.pop("head", "published")
    if about.pop("format", None) != 1:
        raise ValueError(f"The bundle {path} was written by another version of this package.")
    if genes_hash != hash_genes(genes):
        raise ValueError(f"genes.txt of the bundle {path} is not the gene list its weights were trained on.")
    if labels_hash != (None if labels is None else hash_genes(labels)):
        raise ValueError(f"labels.json of the bundle {path} is not the list of labels its weights were trained on.")
    config = ScBertConfig(**about)
    if len(genes) != config.n_genes:
        raise ValueError(f"The bundle {path} has {len(genes)} gene names, but its config says {config.n_genes}.")
    if "genes_seen" in memory and len(memory["genes_seen"]) != config.n_genes:
        raise ValueError(f"memory.safetensors of the bundle {path} is of another list of genes.")
    return Bundle(config, weights, genes, labels, licence, memory, ontology_ids, outcome, head)
