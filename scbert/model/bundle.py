"""Bundles: the directory that a model is kept in, written in one step and read as tensors and text only."""

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from ..data.preprocess import hash_genes
from ..paths import first_line, hash_file, seal
from .config import ScBertConfig

FILES = {"model.safetensors", "memory.safetensors", "config.json", "genes.txt", "labels.json", "README.md"}


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
    """Write everything into a temporary sibling, then let it take the place of a bundle that is there.

    That one stays beside it, as ``<path>.before``, until the new one is in place: killed at any moment, one of the two is
    read. ``config.json`` has the sha256 of the weights.

    Raises
    ------
    ValueError
        The model has no gene names, or one with a line end in it, or `path` holds other things than a bundle.
    """
    if genes is None:
        raise ValueError("The model has no gene names yet: give ScBert(config, genes=...), or train it on cells.")
    if broken := [gene for gene in genes if "\n" in gene]:
        raise ValueError(f"The name of the gene {broken[0]!r} has a line end in it: rename it.")
    path = _recover(Path(path))
    if path.is_file():
        raise ValueError(f"{path} is a file, and a bundle is a folder: give another name.")
    inside = {file.name for file in path.iterdir()} if path.is_dir() else set()
    is_bundle = "config.json" in inside and inside <= FILES and b'"format"' in (path / "config.json").read_bytes()
    if inside and not is_bundle:
        raise ValueError(
            f"{path} is no model bundle, or has other files too, and a bundle would replace all that is in it: give another "
            "folder."
        )
    temporary, before = path.with_name(f"{path.name}.{os.getpid()}.tmp"), _find_before(path)
    for left in path.parent.glob(f"{path.name}.*.tmp"):  # of a writer that was killed
        shutil.rmtree(left, ignore_errors=True)
    temporary.mkdir(parents=True)
    write_tensors(weights, temporary / "model.safetensors")
    if memory:
        write_tensors(memory, temporary / "memory.safetensors")
    hashes = {file.name: hash_file(file) for file in temporary.glob("*.safetensors")}
    about = {"format": 1, "files_sha256": hashes, "genes_sha256": hash_genes(genes), **asdict(config)}
    about |= {} if labels is None else {"labels_sha256": hash_genes(labels)}
    more = {"licence": licence, "ontology_ids": ontology_ids, "outcome": outcome, "head": head}
    about |= {name: value for name, value in more.items() if value}
    about["sha256"] = seal(about)
    texts = {"config.json": json.dumps(about, indent=1), "genes.txt": "\n".join(genes)}
    texts |= {} if labels is None else {"labels.json": json.dumps(list(labels), indent=1)}
    card = card or _write_card(config, labels, licence)
    texts["README.md"] = f"{card}\n{say_outcome(outcome)}" if outcome else card.removesuffix("\n")
    for name, text in texts.items():
        (temporary / name).write_bytes(f"{text}\n".encode())  # UTF-8 and these line ends, whatever the machine's
    for file in temporary.glob("*.safetensors"):  # written for their owner alone, whatever the umask
        shutil.copymode(temporary / "config.json", file)
    shutil.rmtree(before, ignore_errors=True)
    if path.exists():
        path.rename(before)
    temporary.rename(path)
    shutil.rmtree(before, ignore_errors=True)


def write_tensors(tensors: Mapping[str, torch.Tensor], file: Path) -> None:
    """Write tensors by name; an OSError if the disk is full, where safetensors raises an error of its own."""
    try:
        save_file({name: tensor.detach().contiguous() for name, tensor in tensors.items()}, file)
    except SafetensorError as error:
        raise OSError(f"{file} could not be written ({first_line(error)}): free some room.") from None


def _find_before(path):
    return path.with_name(path.name + ".before")


def _recover(path):
    """Return the path of a bundle, once the one before is back in place if its successor never came."""
    if not path.exists() and _find_before(path).is_dir():
        _find_before(path).rename(path)
    return path


def _write_card(config, labels, licence):
    named = ", ".join(f"`{label}`" for label in labels or [] if label.isprintable())  # labels are data: no HTML
    what = "encoder" if labels is None else f"annotator of {len(labels)} cell types: {named}"
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
        A file is missing or damaged, or genes, labels, config and weights do not fit each other.
    """
    path = _recover(Path(path))
    for name in ("config.json", "genes.txt", "model.safetensors"):
        if not (path / name).is_file():
            raise ValueError(f"{path} is not a model bundle: {name} is missing.")
    try:
        about = json.loads((path / "config.json").read_bytes())
        if about.pop("sha256", None) not in (None, seal(about)):  # older ones have none
            raise ValueError("config.json is not what was written")
        for name, digest in about.pop("files_sha256", {}).items():  # older ones have none
            if not (path / name).is_file():
                raise ValueError(f"{name} is missing")
            if hash_file(path / name) != digest:
                raise ValueError(f"{name} is not what was written")
        genes = (path / "genes.txt").read_bytes().decode().removesuffix("\n").split("\n")
        labels_file = path / "labels.json"
        labels = json.loads(labels_file.read_bytes()) if labels_file.exists() else None
        weights = load_file(path / "model.safetensors")
        memory_file = path / "memory.safetensors"
        memory = load_file(memory_file) if memory_file.exists() else {}
    except (SafetensorError, ValueError, OSError, AttributeError) as error:
        raise ValueError(f"The bundle {path} is damaged, copy or train it again ({error}).") from None
    genes_hash, labels_hash = about.pop("genes_sha256", None), about.pop("labels_sha256", None)
    licence, ontology_ids, outcome = about.pop("licence", ""), about.pop("ontology_ids", {}), about.pop("outcome", {})
    head = about.pop("head", "published")
    if about.pop("format", None) != 1:
        raise ValueError(f"The bundle {path} was written by another version of this package.")
    if genes_hash != hash_genes(genes):
        raise ValueError(f"genes.txt of {path} is not the gene list of its weights: copy or train the bundle again.")
    if labels_hash != (None if labels is None else hash_genes(labels)):
        raise ValueError(f"labels.json of {path} is not the list of its labels: copy or train the bundle again.")
    try:
        config = ScBertConfig(**about)
    except (TypeError, ValueError) as error:
        raise ValueError(f"config.json of the bundle {path} is not one that was written here: {error}") from None
    if len(genes) != config.n_genes:
        raise ValueError(f"The bundle {path} has {len(genes)} gene names, but its config says {config.n_genes}.")
    if "genes_seen" in memory and len(memory["genes_seen"]) != config.n_genes:
        raise ValueError(f"memory.safetensors of the bundle {path} is of another list of genes.")
    expected = _shape_few(config, "" if labels is None else "encoder.")  # before memory is taken for such a model
    compare_shapes(path, expected, {name: weights[name] for name in expected if name in weights})
    if any(not torch.isfinite(tensor).all() for tensor in weights.values()):
        raise ValueError(f"The weights of the bundle {path} hold NaN or infinite numbers: train it again.")
    return Bundle(config, weights, genes, labels, licence, memory, ontology_ids, outcome, head)


def _shape_few(config, prefix):
    """Return the shapes of the weights that tell each number of a config."""
    shapes = {"token_emb.weight": (config.n_bins + 2, config.dim)}
    if config.gene_embedding != "none":
        shapes["pos_emb.emb.weight"] = (config.n_genes + 1, config.dim)
    if config.depth:
        last = f"performer.net.layers.{config.depth - 1}.0.fn.to_q.weight"
        shapes[last] = (config.heads * config.dim_head, config.dim)
    return {prefix + name: shape for name, shape in shapes.items()}


def compare_shapes(path: str | Path, expected: Mapping[str, Sequence], weights: Mapping[str, torch.Tensor]) -> None:
    """Raise a ValueError that names the first weight of a bundle whose shape, by name, is not the one that is due."""
    expected = {name: tuple(shape) for name, shape in expected.items()}
    found = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    if expected != found:
        name = next(name for name in sorted(expected | found) if expected.get(name) != found.get(name))
        raise ValueError(
            f"The weights of the bundle {path} do not fit its config: {name} has shape {found.get(name, 'none')}, "
            f"expected {expected.get(name, 'none')} (another number of bins, genes or labels?)."
        )
