"""Published weights: read from either public layout, and checked.

The layout of the official files has the parameter names of `ScBert`, and a counter. The layout of nano-scBERT stacks
the rows of ``to_q``, ``to_k`` and ``to_v`` as ``to_qkv`` and has no wrapper around the feed-forward part.
"""

import io
import pickle
import re
import warnings
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from ..data.preprocess import hash_genes
from .config import ScBertConfig

PUBLISHED_GENES_SHA256 = "4c09ba1912e184682fe5e7f32e2b443bdfb7883d0d0191551b38c6c2f155600f"
"""`hash_genes` of the 16,906 genes that the published weights were trained on."""

N_GENES = ScBertConfig.published().n_genes
LICENCE = "GPL-3.0"
"""Of the published weights: the official LICENSE covers "both the source code and model weights"."""


TOKENS, GENES = "token_emb.weight", "pos_emb.emb.weight"
COUNTER = "performer.calls_since_last_redraw"  # of the published redraw schedule; ours has its own
QUERIES = "performer.net.layers.0.0.fn.to_q.weight"
PROJECTION = "performer.net.layers.0.0.fn.fast_attention.projection_matrix"


class Published(NamedTuple):
    """Published weights, and what follows from their shapes."""

    source: str
    """Where they are from, for messages."""
    weights: dict[str, torch.Tensor]
    config: ScBertConfig
    genes: list[str]
    licence: str

    @property
    def gene_vectors(self) -> torch.Tensor | None:
        """(genes, dim), or None if there are none."""
        return self.weights[GENES][:-1] if GENES in self.weights else None


def read_published(
    path_or_state_dict: str | Path | Mapping,
    genes: Sequence[str],
    name_weights: Callable[[int, str], list[str]],
    *,
    n_bins: int | None = None,
    key_stabiliser: str = "head",
) -> Published:
    """Read and check published weights: see `ScBert.from_published`.

    `name_weights(depth, gene_embedding)` says which names an encoder of so many layers has.
    """
    source = _describe(path_or_state_dict)
    weights = read_weights(path_or_state_dict)
    _check_names(weights, source, name_weights)
    _check_matrices(weights, source)
    found = len(weights[TOKENS]) - 2
    if n_bins not in (None, found):
        raise ValueError(
            f"{source} has {found + 2} tokens, for {found} bins, not for n_bins={n_bins}: tokenize the cells for {found}."
        )
    genes = _check_genes(genes, len(weights[GENES]) - 1 if GENES in weights else None, source)
    config = _infer_config(weights, len(genes), key_stabiliser)
    for name, weight in weights.items():
        if not weight.isfinite().all():
            raise ValueError(f"{source} has NaN or infinity in {name}: fetch it again, or from another place.")
    return Published(source, weights, config, genes, LICENCE if len(genes) == N_GENES else "")


def check_shapes(found: Published, expected: Mapping[str, torch.Tensor]) -> None:
    """Raise a ValueError if a weight has another shape than a model of the config, whose state_dict is `expected`."""
    for name, tensor in expected.items():
        if found.weights[name].shape != tensor.shape:
            raise ValueError(
                f"{found.source} has {name} of shape {tuple(found.weights[name].shape)}, expected {tuple(tensor.shape)}."
            )


def read_weights(path_or_state_dict: str | Path | Mapping) -> dict[str, torch.Tensor]:
    """Read the weights of either layout, under the names of `ScBert`.

    Parameters
    ----------
    path_or_state_dict
        A torch file or what one holds: the weights, or a dictionary with them under ``model_state_dict``; names may
        start with ``module.``. A file is read by ``torch.load(weights_only=True)``, which runs no code of it, and the
        checksums that PyTorch 1.6 and later put into it are verified, which ``torch.load`` does not do.

    Returns
    -------
    name -> float32 tensor, on the CPU.

    A ValueError if there is no such file, or it is damaged, holds other things than tensors, or no weights.
    """
    source = _describe(path_or_state_dict)
    is_mapping = isinstance(path_or_state_dict, Mapping)
    found = path_or_state_dict if is_mapping else _load_file(Path(path_or_state_dict))
    if isinstance(found, Mapping):
        found = found.get("model_state_dict", found)
    if not isinstance(found, Mapping):
        raise ValueError(f"{source} holds no weights by name: give a checkpoint of scBERT's pretraining.")
    weights = {}
    for name, tensor in found.items():
        if isinstance(tensor, torch.Tensor) and tensor.is_floating_point() and tensor.layout == torch.strided:
            name = str(name).removeprefix("module.")
            weights |= _rename(name, tensor.detach().to("cpu", torch.float32), source)
    weights.pop(COUNTER, None)
    return weights


def _rename(name, tensor, source):
    """Return name -> tensor as in `ScBert`: one, or the three of ``to_qkv``."""
    if name.endswith(".0.fn.to_qkv.weight"):
        if tensor.ndim != 2 or len(tensor) % 3:
            raise ValueError(f"{source} has {name} of shape {tuple(tensor.shape)}, not three matrices stacked.")
        return {
            name.replace("to_qkv", f"to_{part}"): rows for part, rows in zip("qkv", tensor.tensor_split(3), strict=True)
        }
    return {re.sub(r"(\.\d+\.1\.fn)\.(w[12]\.)", r"\1.fn.\2", name): tensor}


def _describe(path_or_state_dict):
    return "The state_dict" if isinstance(path_or_state_dict, Mapping) else str(path_or_state_dict)


def _load_file(path):
    if not path.is_file():
        raise ValueError(f"There is no file {path}: give the path of a published checkpoint.")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about files that are refused anyway
            file = _copy_archive(path) if zipfile.is_zipfile(path) else path
            return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        code, why = re.search(r"GLOBAL ([\w.]*\w)", str(error)), "not what PyTorch writes"
    except Exception as error:  # damage shows as errors of a dozen types
        code, why = None, (str(error) or type(error).__name__).splitlines()[0][:100].rstrip(".")
    if code and zipfile.is_zipfile(path):  # what is read off other files may be chance
        raise ValueError(
            f"{path} asks for {code[1]}, which weights do not need, so nothing of it was read or run: get a file of "
            "tensors only, or have its model_state_dict saved again by somebody you trust."
        )
    raise ValueError(f"{path} is no file of PyTorch, or is damaged: fetch it again ({why}).")


def _copy_archive(path):
    """Copy an archive into memory, checksums verified; no size or flag in it is left to be believed.

    `torch.load` verifies nothing, and an entry shorter than its size is filled up with what lies in memory.
    """
    copy = io.BytesIO()
    with zipfile.ZipFile(path) as archive, zipfile.ZipFile(copy, "w") as clean:
        for name in archive.namelist():
            clean.writestr(name, archive.read(name))
    copy.seek(0)
    return copy


def _check_names(weights, source, name_weights):
    """Refuse more or fewer names than those of an encoder with as many layers."""
    layers = {match[1] for name in weights if (match := re.match(r"performer\.net\.layers\.(\d+)\.", name))}
    expected = name_weights(max(len(layers), 1), "learned" if GENES in weights else "none")
    for names, fault in (
        ([name for name in expected if name not in weights], "lacks weights of an scBERT encoder"),
        ([name for name in weights if name not in expected], "has weights that no scBERT encoder has"),
    ):
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise ValueError(
                f"{source} {fault}, {', '.join(names[:3])}{more}: give a checkpoint of scBERT's pretraining."
            )


def _check_matrices(weights, source):
    """Refuse what the shape of the model can't be read off."""
    for name in (TOKENS, QUERIES, PROJECTION, GENES):
        shape = tuple(weights[name].shape) if name in weights else (1, 1)
        if len(shape) != 2 or 0 in shape:
            raise ValueError(f"{source} has {name} of shape {shape}, expected a matrix.")
    dim_head, inner = weights[PROJECTION].shape[1], len(weights[QUERIES])
    if dim_head < 2:  # int(d ln d) features are none
        raise ValueError(f"{source} has {PROJECTION} of one column, expected one for each of two dimensions or more.")
    if inner % dim_head:
        raise ValueError(f"{source} has {QUERIES} of {inner} rows, expected a multiple of {dim_head}, one head.")


def _infer_config(weights, n_genes, key_stabiliser):
    dim_head = weights[PROJECTION].shape[1]  # the features' number follows from it, and is checked with the shapes
    return ScBertConfig(
        n_genes=n_genes,
        n_bins=len(weights[TOKENS]) - 2,
        dim=weights[TOKENS].shape[1],
        depth=len({name.split(".")[3] for name in weights if name.startswith("performer.")}),
        heads=len(weights[QUERIES]) // dim_head,
        dim_head=dim_head,
        gene_embedding="frozen" if GENES in weights else "none",
        key_stabiliser=key_stabiliser,
    )


def _check_genes(genes, n_genes, source):
    """Return the names, which for as many as were published must be those."""
    if genes is None:
        raise ValueError(
            f"{source} does not name its genes: give them; scbert.genes.load_vocabulary() are the published."
        )
    genes = list(genes)
    if n_genes not in (None, len(genes)):
        raise ValueError(f"{source} is for {n_genes:,} genes, but {len(genes):,} names were given.")
    if len(genes) == N_GENES and hash_genes(genes) != PUBLISHED_GENES_SHA256:
        raise ValueError(
            f"The {N_GENES:,} gene names are not the published ones in their order: scbert.genes.load_vocabulary() are."
        )
    return genes
