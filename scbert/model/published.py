"""Published weights: read from either public layout, checked, and kept as a bundle.

The layout of the official files has the parameter names of `ScBert`, and a counter. The layout of nano-scBERT stacks
the rows of ``to_q``, ``to_k`` and ``to_v`` as ``to_qkv`` and has no wrapper around the feed-forward part.
"""

import hashlib
import io
import pickle
import re
import warnings
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

from ..sources import genes as gene_lists
from .encoder import ScBert, ScBertConfig

N_GENES = ScBertConfig.published().n_genes
LICENCE = "GPL-3.0"
"""Of the published weights: the official LICENSE covers "both the source code and model weights"."""

ENCODERS = Path(__file__).parent / "encoders"
"""Bundles that ship with the package: trained here, on public data."""

TOKENS, GENES = "token_emb.weight", "pos_emb.emb.weight"
COUNTER = "performer.calls_since_last_redraw"  # of the published redraw schedule; ours has its own
QUERIES = "performer.net.layers.0.0.fn.to_q.weight"
PROJECTION = "performer.net.layers.0.0.fn.fast_attention.projection_matrix"


def read_published(
    path_or_state_dict: str | Path | Mapping,
    genes: Sequence[str] | None = None,
    *,
    n_bins: int | None = None,
    key_stabiliser: str = "head",
) -> ScBert:
    """Make an encoder of published weights: see `ScBert.from_published`."""
    source = _describe(path_or_state_dict)
    weights = read_weights(path_or_state_dict)
    _check_names(weights, source)
    _check_matrices(weights, source)
    found = len(weights[TOKENS]) - 2
    if n_bins not in (None, found):
        raise ValueError(
            f"{source} has {found + 2} tokens, for {found} bins, not for n_bins={n_bins}: tokenize the cells for {found}."
        )
    genes = _choose_genes(genes, len(weights[GENES]) - 1 if GENES in weights else None, source)
    config = _infer_config(weights, len(genes), key_stabiliser)
    vectors = weights[GENES][:-1] if GENES in weights else None
    for name, weight in weights.items():
        if not weight.isfinite().all():
            raise ValueError(f"{source} has NaN or infinity in {name}: fetch it again, or from another place.")
    model = ScBert(config, vectors, genes)
    for name, expected in model.state_dict().items():
        if weights[name].shape != expected.shape:
            raise ValueError(
                f"{source} has {name} of shape {tuple(weights[name].shape)}, expected {tuple(expected.shape)}."
            )
    model.load_state_dict(weights)  # the last row of pos_emb too, which stands for the trailing token
    model.licence = LICENCE if len(genes) == N_GENES else ""
    return model.eval()


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

    Raises
    ------
    ValueError
        No such file, none of PyTorch, damaged, with other things than tensors in it, or without weights.
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


def read_gene2vec(path_or_state_dict: str | Path | Mapping) -> np.ndarray:
    """Return the gene vectors of a checkpoint, (genes, dim) float32: its ``pos_emb.emb.weight`` but the last row.

    Raises
    ------
    ValueError
        As `read_weights`; no gene vectors, or NaN or infinity in them.

    Paper: Methods, "gene embedding". The published vectors are gene2vec (Du et al., 2019), in the order of
    `scbert.genes.load_vocabulary`. Differs from the published code: float32, and no file but the checkpoint.
    """
    source, weights = _describe(path_or_state_dict), read_weights(path_or_state_dict)
    if GENES not in weights or weights[GENES].ndim != 2 or len(weights[GENES]) < 2:
        raise ValueError(f"{source} has no gene vectors ({GENES}): it was trained without gene2vec, or is no scBERT.")
    if not weights[GENES].isfinite().all():
        raise ValueError(f"{source} has NaN or infinity in {GENES}: fetch it again, or from another place.")
    return weights[GENES][:-1].numpy().copy()


def convert(source: str | Path, destination: str | Path, genes: Sequence[str] | None = None) -> None:
    """Turn a published checkpoint into a bundle directory, for `scbert.load`.

    Parameters
    ----------
    source
        A torch file, as in `ScBert.from_published`.
    destination
        The bundle; one that is there already is replaced.
    genes
        As in `ScBert.from_published`.

    Raises
    ------
    ValueError
        As `ScBert.from_published`; `destination` has other things in it.

    Notes
    -----
    The model card names the file and its sha256, and for weights of the published vocabulary their licence, their
    training cells and the paper. The licence stays with whatever is trained from the bundle.
    """
    model = read_published(source, genes)
    model.save(destination, _write_card(model, Path(source)))


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


def _check_names(weights, source):
    """Refuse more or fewer names than those of an encoder with as many layers."""
    layers = {match[1] for name in weights if (match := re.match(r"performer\.net\.layers\.(\d+)\.", name))}
    gene_embedding = "learned" if GENES in weights else "none"
    least = ScBertConfig(1, 1, dim=2, depth=max(len(layers), 1), heads=1, dim_head=2, gene_embedding=gene_embedding)
    expected = list(ScBert(least).state_dict())
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


def _choose_genes(genes, n_genes, source):
    """Return the names, which for as many as were published must be those."""
    if genes is None:
        if n_genes not in (None, N_GENES):
            raise ValueError(
                f"{source} is for {n_genes:,} genes, not for the {N_GENES:,} published ones: give their names as genes."
            )
        genes = gene_lists.load_vocabulary()
    genes = list(genes)
    if n_genes not in (None, len(genes)):
        raise ValueError(f"{source} is for {n_genes:,} genes, but {len(genes):,} names were given.")
    if len(genes) == N_GENES and gene_lists.hash_genes(genes) != gene_lists.PUBLISHED_GENES_SHA256:
        raise ValueError(
            f"The {N_GENES:,} gene names are not the published ones in their order: leave genes out to have those."
        )
    return genes


def _write_card(model, source):
    with source.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    config = model.config
    about = [
        f"- Converted from `{source.name}`, sha256 `{digest}`, by scbert-companion: the same weights, in float32.",
        f"- Shape: {config.n_genes:,} genes, {config.n_bins} bins, dim {config.dim}, depth {config.depth}, "
        f"{config.heads} heads of {config.dim_head}, gene embedding {config.gene_embedding}.",
        "- The key stabiliser is per cell and head; published training had one a batch, see `set_key_stabiliser`.",
    ]
    if model.licence != LICENCE:
        about += ["- Licence and training data: those of the file, which does not name them. Write them down here."]
        return "\n".join(["# scBERT encoder, converted", "", *about, ""])
    return "\n".join(
        [
            *["---", "license: gpl-3.0", "---", "# scBERT encoder, converted from published weights", "", *about],
            f"- Licence of the weights: {LICENCE}. The official LICENSE covers both the source code and model weights.",
            "  They, and what is trained from them, must not be redistributed under another licence;",
            "  the BSD-3 licence of scbert-companion is that of its code, not of these weights.",
            "- Trained on: PanglaoDB, 209 human data sets, 74 tissues, 1,126,580 cells (as the paper says).",
            "- That the file is the published one follows from its name and vocabulary only: compare the sha256.",
            "- Cite: Yang F, Wang W, Wang F, Fang Y, Tang D, Huang J, Lu H, Yao J. scBERT as a large-scale pretrained",
            "  deep language model for cell type annotation of single-cell RNA-seq data.",
            "  Nature Machine Intelligence 4, 852-866 (2022). https://doi.org/10.1038/s42256-022-00534-z",
            "",
        ]
    )


def load_encoder(source: str | Path) -> ScBert:
    """Load a pretrained encoder, from wherever it is.

    Parameters
    ----------
    source
        A name that ships with the package ("pbmc-small": our own, pretrained on public PBMC in notebook 02, see its
        card); a name of the catalogue ("scbert_checkpoint"), fetched if need be; a bundle directory, of an encoder or
        of a classifier, whose encoder is taken; or a file of published weights.

    Raises
    ------
    ValueError
        No such name, folder or file; and what `scbert.datasets.fetch`, `scbert.load` and `ScBert.from_published` raise.
    """
    from ..sources.datasets import CATALOGUE, fetch
    from .encoder import load
    from ..run.record import find_file

    shipped = sorted(path.parent.name for path in ENCODERS.glob("*/config.json"))
    weights = [name for name, entry in CATALOGUE.items() if entry["kind"] == "weights"]
    if str(source) in shipped:
        return load(ENCODERS / str(source))
    if str(source) in weights:
        return read_published(fetch(str(source))[0])
    path = find_file(source)
    if not path.exists():
        names = ", ".join([*shipped, *weights])
        raise ValueError(f"There is no bundle or file {path}, and no weights of that name ({names}).")
    if path.is_file():
        return read_published(path)
    model = load(path)
    return getattr(model, "encoder", model)
