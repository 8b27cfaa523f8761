"""From a fine-tuned model to annotated cells.

Torch and anndata are imported inside the functions: `scbert.annotate` is a function, bound when the package is
imported, and the command line should not wait for them to say that a parameter is unknown.
"""

import warnings
from pathlib import Path
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
    batch_size: int | None = None,
    progress: bool = False,
    name: str = "adata",
    keep: "str | Path | None" = None,
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
        Cells a forward pass; changes speed and memory, never the result (but see ``key_stabiliser="batch"``). If None
        32 or, in the mode ``expressed_only``, as many as have 8,000 positions.
    name
        What messages call the cells.
    keep
        A folder for what the model says of some thousand cells at a time: the same call, after one that was killed, goes on
        from there, to the same result. It is the caller's to remove.

    Writes
    ------
    ``obs["scbert_cell_type"]``, ``obs["scbert_confidence"]`` (largest probability), ``obsm["scbert_probabilities"]``
    (cells x labels, see `name_columns`), ``obsm["X_scbert"]`` (cells x dim, see `embed`), a report in
    ``uns["scbert"]["annotate"]``; ``obs["scbert_cell_type_ontology_term_id"]`` where the model knows its labels' identifiers;
    ``obs["n_counts"]`` where `scbert.totals` finds it for selected genes; with companions their labels, a consensus,
    distances and flags in ``obs`` too, see `scbert.companions.vote`, and a warning for each way in which the query is
    unlike the training cells.

    Returns
    -------
    Of a store, which stays as it is: the two columns of ``obs``, one row a cell, under the names of the cells.

    A ValueError if `X` holds no raw counts, no gene is in the vocabulary, or the store is of another vocabulary.

    Paper: Methods, "novel cell type detection" (threshold 0.5); Fig. 4.
    Differs from the published code: batched, with probabilities; labels and genes come with the model.
    """
    import anndata

    from .data.checks import check_vocabulary
    from .data.counts import read_notes
    from .memory.companions import compare_query, say_what_is_off, vote
    from .model.bundle import say_outcome
    from .sources.totals import supply_totals

    if not hasattr(classifier, "labels"):
        raise ValueError(
            "An encoder without labels, or a path, names nothing: give what scbert.finetune or load returns."
        )
    if not 0 <= unassigned_below <= 1:
        raise ValueError(f"unassigned_below must be a probability between 0 and 1, not {unassigned_below}.")
    if classifier.outcome.get("state") in ("dead", "guessing"):
        warnings.warn(say_outcome(classifier.outcome), stacklevel=2)
    is_store = not isinstance(adata, anndata.AnnData)
    if not is_store and "bins" not in adata.layers:
        supply_totals(adata, name)
    notes = {} if is_store else read_notes(adata)
    tokens, batches = _tokenize_for(classifier, adata, name), []
    if not is_store:
        check_vocabulary(read_notes(tokens)["tokenize"]["matched_share"], tokens.n_vars)
    options = {"head": classifier.head, "keep": keep}
    for logits, embedding, has_tokens in _run(classifier.encoder, tokens, batch_size, progress, **options):
        probabilities = _softmax(logits)
        assigned = (probabilities.max(1) >= unassigned_below) & has_tokens
        best = np.where(assigned, probabilities.argmax(1), -1)  # the last of the names below
        batches.append((best, probabilities.max(1)) + (() if is_store else (probabilities, embedding)))
    best, confidence, *rest = (np.concatenate(arrays) for arrays in zip(*batches, strict=True))
    columns = {"scbert_cell_type": _name(best, classifier.labels), "scbert_confidence": confidence}
    if classifier.ontology_ids:
        terms = [*(classifier.ontology_ids.get(label, "unknown") for label in classifier.labels), "unknown"]
        columns["scbert_cell_type_ontology_term_id"] = pd.Categorical(np.array(terms)[best])
    if is_store:
        return pd.DataFrame(columns, index=adata.obs_names)
    off = []
    if "scores" in classifier.memory:
        predicted, measured = rest[0].argmax(1), np.isin(classifier.genes, adata.var_names)
        cells, found = compare_query(classifier.memory, tokens, predicted, measured)
        off = say_what_is_off(found)
        columns |= vote(cells, predicted, classifier.memory, classifier.labels)
    for column, values in columns.items():
        adata.obs[column] = values
    for sentence in off:
        warnings.warn(f"{name} is unlike what the model was trained on: {sentence}.", stacklevel=2)
    labels = name_columns(classifier.labels)
    adata.obsm["scbert_probabilities"] = pd.DataFrame(rest[0], index=adata.obs_names, columns=labels)
    adata.obsm["X_scbert"] = rest[1]
    report = read_notes(tokens)["tokenize"] | _count_unseen(classifier, tokens)
    report |= {
        "unassigned_below": unassigned_below,
        "unassigned": int((best < 0).sum()),
        "unlike_training": "; ".join(off),
    }
    adata.uns["scbert"] = notes | {"annotate": report}
    return None


def _name(numbers, labels):
    """Return the labels of these numbers, -1 being Unassigned, as a categorical column."""
    names = np.array([*labels, "Unassigned"], dtype=object)[numbers]
    return pd.Categorical(names, categories=[*dict.fromkeys([*labels, "Unassigned"])])


def name_columns(labels: list[str]) -> list[str]:
    """Return the labels as names of columns that h5ad can hold: no "/", none empty, no two alike."""
    names = [label.replace("/", "|").strip() for label in labels]
    names = [f"label {name}".strip() if name in ("", ".", "..", "_index") else name for name in names]
    return [f"{name} ({names[:i].count(name) + 1})" if name in names[:i] else name for i, name in enumerate(names)]


def _count_unseen(classifier, tokens):
    """Return how many genes the query expresses that no training cell did, and which are therefore ignored."""
    seen = classifier.encoder.genes_seen
    expressed = tokens.layers["bins"].getnnz(0) > 0
    return {"genes_ignored": 0 if seen is None else int((expressed & ~seen[:-1].cpu().numpy()).sum())}


def predict_proba(
    classifier: "Classifier", adata: "anndata.AnnData | CellStore", *, batch_size: int | None = None
) -> pd.DataFrame:
    """Return the probability of each label, cells x labels, each row summing to one; see `annotate`."""
    batches = _run(classifier.encoder, _tokenize_for(classifier, adata), batch_size, False, head=classifier.head)
    probabilities = np.concatenate([_softmax(logits) for logits, _, _ in batches])
    return pd.DataFrame(probabilities, index=adata.obs_names, columns=classifier.labels)


def read_out(
    classifier: "Classifier", adata: "anndata.AnnData | CellStore", *, batch_size: int | None = None
) -> tuple[pd.DataFrame, np.ndarray]:
    """Return, of one pass, logits (cells x labels), whose softmax is `predict_proba`, and `embed`'s vectors (cells, dim)."""
    batches = _run(classifier.encoder, _tokenize_for(classifier, adata), batch_size, False, head=classifier.head)
    logits, embedding = zip(*((logits, embedding) for logits, embedding, _ in batches), strict=True)
    return pd.DataFrame(np.concatenate(logits), adata.obs_names, classifier.labels), np.concatenate(embedding)


def embed(
    model: "ScBert | Classifier",
    adata: "anndata.AnnData | CellStore",
    *,
    pool: str = "expressed",
    batch_size: int | None = None,
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
        As in `annotate`.

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

    from .data.checks import check_cells, fit_tokens
    from .data.counts import read_notes
    from .data.preprocess import bin_cells

    if not isinstance(adata, anndata.AnnData):  # a store
        check_cells(model, adata)
        return adata
    n_bins = read_notes(adata).get("tokenize", {}).get("n_bins")
    # Names, not the hash in the report: the genes may have been reordered since, and their tokens with them.
    is_tokenized = "bins" in adata.layers and n_bins == model.config.n_bins
    if is_tokenized and list(adata.var_names) == list(model.genes) and fit_tokens(adata):
        return adata
    genes = pd.Index(model.genes)
    bins, counts, totals, report = bin_cells(adata, genes, model.config.n_bins, name=name)
    obs = pd.DataFrame({"n_counts": totals}, index=adata.obs_names)
    tokens = anndata.AnnData(counts, obs=obs, var=pd.DataFrame(index=genes), layers={"bins": bins})
    tokens.uns["scbert"] = {"tokenize": report}
    return tokens


def _run(encoder, tokens, batch_size, progress, *, head=None, pool="expressed", keep=None):
    """Encode cells; yield, of some thousands at a time, logits (None without a head), pooled vectors, which have a token."""
    import sys

    import torch
    from tqdm import tqdm

    from .data.cells import CellDataset, to_tokens
    from .model.packed import few_threads
    from .scale.blocks import find_block, hash_model, read_block, write_block
    from .scale.stream import CELLS_A_WINDOW, plan_batches

    cells = tokens if hasattr(tokens, "in_order") else CellDataset(tokens)  # held to their counts before
    device, packed = next(encoder.parameters()).device, encoder.config.expressed_only
    bar = tqdm(desc="annotate", total=len(cells), unit="cell", file=sys.stdout, mininterval=1, disable=not progress)
    keep, model, n_kept = keep and Path(keep), keep and f"{hash_model(encoder, head)} {batch_size}", 0
    with bar:
        for window in cells.windows(CELLS_A_WINDOW):
            file = keep and find_block(keep, model, window)
            if file and (kept := read_block(file)):
                bar.update(len(kept[-1]))
                n_kept += len(kept[-1])
                yield kept
                continue
            order, batches = plan_batches(window.getnnz(1) + 1, encoder.config, batch_size), []
            for rows in order:
                with torch.inference_mode(), few_threads(encoder.config):  # left before the caller goes on
                    bins = encoder.hide_unseen(to_tokens(window[rows]).to(device))
                    hidden = encoder.encode_expressed(bins) if packed else (encoder.encode(bins),)
                    pooled, has_tokens = _pool(bins, pool, *hidden), (bins > 0).any(1)
                    logits = None if head is None else head(*hidden).float()
                batches.append([None if x is None else x.cpu().numpy() for x in (logits, pooled, has_tokens)])
                bar.update(len(rows))
            back = np.argsort(np.concatenate(order))
            found = [
                None if arrays[0] is None else np.concatenate(arrays)[back] for arrays in zip(*batches, strict=True)
            ]
            if file and not write_block(file, found):
                keep = None
            yield found
    if n_kept and progress:
        print(f"{n_kept:,} of the {len(cells):,} cells were read from {keep}, where an earlier run had kept them.")


def _pool(bins, pool, hidden, entered=None):
    """Return the mean over genes, or over those expressed, (cells, dim), of what was encoded, see `ScBert`."""
    import torch

    weight = bins > 0 if pool == "expressed" else bins >= 0
    weight[:, -1] = False  # the trailing token is no gene
    weight = weight / weight.sum(1, keepdim=True).clamp(min=1)  # (cells, genes + 1)
    if entered is None:
        return torch.einsum("cgd,cg->cd", hidden.float(), weight.float())
    pooled = hidden.new_zeros(len(bins), hidden.shape[1]).float()
    return pooled.index_add_(0, entered.nonzero()[:, 0], hidden.float() * weight[entered][:, None])


def _softmax(logits):
    exponentials = np.exp(logits - logits.max(1, keepdims=True))
    return exponentials / exponentials.sum(1, keepdims=True)
