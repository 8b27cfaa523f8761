"""From a fine-tuned model to annotated cells.

Torch and anndata are imported inside the functions: `scbert.annotate` is a function, bound when the package is
imported, and the command line should not wait for them to say that a parameter is unknown.
"""

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

if TYPE_CHECKING:
    import anndata

    from .model.classifier import Classifier
    from .model.encoder import ScBert
    from .scale.stream import CellStore


def annotate(
    adata: "anndata.AnnData | CellStore",
    classifier: "Classifier",
    *,
    unassigned_below: float = 0.5,
    batch_size: int = 32,
    progress: bool = False,
    name: str = "adata",
) -> pd.DataFrame | None:
    """Annotate cells, in place, with the label the classifier finds most probable.

    Parameters
    ----------
    adata
        Cells with counts in ``X``, or tokenized for the classifier's vocabulary; genes in any order. Or a store
        of more cells than memory, written with ``genes=classifier.genes`` (`scbert.stream`).
    classifier
        A fine-tuned model.
    unassigned_below
        A cell whose largest probability is below this is ``Unassigned``, and so is one without a token.
    batch_size
        Cells a forward pass; changes speed and memory, never the result (but see ``key_stabiliser="batch"``).
    progress
        Show a progress bar.
    name
        What error messages call the cells.

    Writes
    ------
    ``obs["scbert_cell_type"]``, ``obs["scbert_confidence"]`` (largest probability), ``obsm["scbert_probabilities"]``
    (cells x labels; "/" in a label is "|" in its column, since h5ad allows none), ``obsm["X_scbert"]`` (cells x dim,
    see `embed`), and in ``uns["scbert"]`` the report of `tokenize` and the threshold.

    Returns
    -------
    Of a store, which stays as it is: the two columns of ``obs``, one row a cell, under the names of the cells.

    Raises
    ------
    ValueError
        `X` holds no raw counts, no gene is shared with the classifier's vocabulary, or gene names are duplicated; or
        the store is one of another vocabulary.

    Paper: Methods, "novel cell type detection" (threshold 0.5); Fig. 4.
    Differs from the published code: batched, with probabilities; labels and genes come with the model.
    """
    import anndata

    tokens, is_store = _tokenize_for(classifier, adata, name), not isinstance(adata, anndata.AnnData)
    batches = []
    for logits, embedding, has_tokens in _run(classifier.encoder, tokens, batch_size, progress, head=classifier.head):
        probabilities = _softmax(logits)
        assigned = (probabilities.max(1) >= unassigned_below) & has_tokens
        best = np.where(assigned, probabilities.argmax(1), -1)  # the last of the names below
        batches.append((best, probabilities.max(1)) + (() if is_store else (probabilities, embedding)))
    best, confidence, *rest = (np.concatenate(arrays) for arrays in zip(*batches, strict=True))
    cell_type = np.array([*classifier.labels, "Unassigned"], dtype=object)[best]
    columns = {
        "scbert_cell_type": pd.Categorical(cell_type, categories=[*dict.fromkeys([*classifier.labels, "Unassigned"])]),
        "scbert_confidence": confidence,
    }
    if is_store:
        return pd.DataFrame(columns, index=adata.obs_names)
    for name, column in columns.items():
        adata.obs[name] = column
    labels = [label.replace("/", "|") for label in classifier.labels]
    adata.obsm["scbert_probabilities"] = pd.DataFrame(rest[0], index=adata.obs_names, columns=labels)
    adata.obsm["X_scbert"] = rest[1]
    report = tokens.uns["scbert"]["tokenize"]
    adata.uns["scbert"] = dict(adata.uns.get("scbert", {})) | {
        "annotate": {**report, "unassigned_below": unassigned_below, "unassigned": int((best < 0).sum())}
    }
    return None


def predict_proba(
    classifier: "Classifier", adata: "anndata.AnnData | CellStore", *, batch_size: int = 32
) -> pd.DataFrame:
    """Return the probability of each label, cells x labels, each row summing to one; see `annotate`."""
    batches = _run(classifier.encoder, _tokenize_for(classifier, adata), batch_size, False, head=classifier.head)
    probabilities = np.concatenate([_softmax(logits) for logits, _, _ in batches])
    return pd.DataFrame(probabilities, index=adata.obs_names, columns=classifier.labels)


def read_out(
    classifier: "Classifier", adata: "anndata.AnnData | CellStore", *, batch_size: int = 32
) -> tuple[pd.DataFrame, np.ndarray]:
    """Return, of one pass, logits (cells x labels), whose softmax is `predict_proba`, and `embed`'s vectors (cells, dim)."""
    batches = _run(classifier.encoder, _tokenize_for(classifier, adata), batch_size, False, head=classifier.head)
    logits, embedding = zip(*((logits, embedding) for logits, embedding, _ in batches), strict=True)
    return pd.DataFrame(np.concatenate(logits), adata.obs_names, classifier.labels), np.concatenate(embedding)


def embed(
    model: "ScBert | Classifier", adata: "anndata.AnnData | CellStore", *, pool: str = "expressed", batch_size: int = 32
) -> np.ndarray:
    """Return one vector a cell: the mean of the encoder's output over genes, (cells, dim).

    Parameters
    ----------
    model
        An encoder or a classifier.
    adata
        As in `annotate`.
    pool
        Mean over the "expressed" genes, those with a token above 0, or over "all".
    batch_size
        Cells a forward pass; changes speed and memory, never the result.

    Paper: Fig. 5d. How cells were pooled there is not stated. An encoder that was never fine-tuned separates cell
    types poorly this way.
    """
    if pool not in ("expressed", "all"):
        raise ValueError(f"pool must be 'expressed' or 'all', not {pool!r}.")
    encoder = getattr(model, "encoder", model)
    batches = _run(encoder, _tokenize_for(encoder, adata), batch_size, False, pool=pool)
    return np.concatenate([embedding for _, embedding, _ in batches])


def _tokenize_for(model, adata, name="adata"):
    """Return the cells as tokens of the model's vocabulary, without touching `adata`: one pass over its matrix."""
    import anndata

    from .data.checks import check_cells
    from .data.preprocess import bin_cells

    if not isinstance(adata, anndata.AnnData):  # a store
        check_cells(model, adata)
        return adata
    n_bins = adata.uns.get("scbert", {}).get("tokenize", {}).get("n_bins")
    # Names, not the hash in the report: the genes may have been reordered since, and their tokens with them.
    if "bins" in adata.layers and n_bins == model.config.n_bins and list(adata.var_names) == list(model.genes):
        return adata
    genes = pd.Index(model.genes)
    bins, counts, totals, report = bin_cells(adata, genes, model.config.n_bins, name=name)
    obs = pd.DataFrame({"n_counts": totals}, index=adata.obs_names)
    tokens = anndata.AnnData(counts, obs=obs, var=pd.DataFrame(index=genes), layers={"bins": bins})
    tokens.uns["scbert"] = {"tokenize": report}
    return tokens


def _run(encoder, tokens, batch_size, progress, *, head=None, pool="expressed"):
    """Encode cells in batches; yield of each logits (None without a head), pooled vectors, and which have a token."""
    import sys

    import torch
    from tqdm import tqdm

    from .data.cells import open_cells

    cells, device = open_cells(tokens), next(encoder.parameters()).device
    bar = tqdm(desc="annotate", total=len(cells), unit="cell", file=sys.stdout, mininterval=1, disable=not progress)
    with bar:
        for _, bins in cells.in_order(batch_size):
            with torch.inference_mode():  # left before the caller goes on
                bins = bins.to(device)
                hidden = encoder.encode(bins)  # (cells, genes + 1, dim)
                has_tokens = (bins > 0).any(1).cpu().numpy()
                weight = (bins > 0) if pool == "expressed" else torch.ones_like(bins, dtype=torch.bool)
                weight[:, -1] = False  # the trailing token is no gene
                weight = weight / weight.sum(1, keepdim=True).clamp(min=1)  # (cells, genes + 1)
                pooled = torch.einsum("cgd,cg->cd", hidden.float(), weight.float()).cpu().numpy()
                logits = None if head is None else head(hidden).float().cpu().numpy()
            yield logits, pooled, has_tokens
            bar.update(len(bins))


def _softmax(logits):
    exponentials = np.exp(logits - logits.max(1, keepdims=True))
    return exponentials / exponentials.sum(1, keepdims=True)
