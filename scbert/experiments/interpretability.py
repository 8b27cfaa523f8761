"""Which genes the model looks at: exact attention, contrasts between types, agreement, enrichment.

What a gene receives is the mean of its column of the attention matrix, over the genes that attend, heads and layers.
With FAVOR+ the matrix is A = D^-1 Q' K'^T, where Q' and K' are the random features of queries and keys, (genes,
features), and D holds the sums of its rows. The mean of its columns is then

    K' (Q'^T D^-1 1) / n

a sum over genes for each feature, and a product with each gene's features: linear in the genes, and exact. No matrix
of genes x genes is formed but with exact softmax attention, over the some hundred genes that a cell expresses. `measure_distance` forms its rows all the same, by the definition, to hold the former against.

Paper: Methods, "model interpretability"; Fig. 5, Extended Data Fig. 1d.
Differs from the published code: its script can't load what fine-tuning saves; applies attention a second time; sums in
half precision, by which rows sum to 0.73 in place of 1; holds a matrix of all genes x all genes for each head; and
averages over zero genes that attend and the trailing token. Here each layer's own attention is averaged, over expressed
genes that attend.

What attention is not: it says which genes were read, not which decided. `scbert.deletion` asks the latter.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from itertools import combinations
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import torch
import yaml
from scipy import stats

from ..annotate import embed
from ..data.cells import open_for
from ..evaluate.embeddings import embed_pca
from ..evaluate.metrics import bootstrap
from ..model.attention import EPS
from ..model.classifier import Classifier
from ..model.config import ScBertConfig
from ..model.encoder import ScBert, find_entered
from ..train.pretrain import pretrain
from .pretraining import read_sets

PERMUTATIONS_AT_ONCE = 20
ROWS_AT_ONCE = 512
SET_SIZES = range(3, 201)  # genes of a set that is tested for enrichment


def prepare_encoder(start: ScBert | ScBertConfig, train: anndata.AnnData, *, n_epochs: int, seed: int = 0) -> ScBert:
    """Return the encoder that trainings start from: as it is or, of a shape, pretrained on their tokenized cells.

    `start` is from `choose_encoder`. Pretraining takes twice the epochs of fine-tuning, `n_epochs`.
    """
    if isinstance(start, ScBert):
        return start
    encoder = ScBert(start, seed=seed)
    pretrain(encoder, train, n_epochs=2 * n_epochs, learning_rate=3e-3, seed=seed)
    return encoder


def gene_attention(
    classifier: Classifier | ScBert, adata: anndata.AnnData, *, batch_size: int = 32, by_layer: bool = False
) -> pd.DataFrame | dict[int, pd.DataFrame]:
    """Attention that each gene receives, averaged over expressed genes that attend, heads and layers, exact.

    `classifier` is a fine-tuned model, or an encoder; `adata` are tokenized cells of its vocabulary, else a ValueError. With
    `by_layer` there is a table a layer, numbered from 1, in place of their mean.

    Returns
    -------
    Cells x genes, non-negative, each row summing to one, the share of what all genes receive, or to zero for a cell
    without a token. The trailing token is left out. With ``config.expressed_only`` genes not expressed get nothing.

    Paper: Methods, "model interpretability"; Fig. 5a.
    Differs from the published code: see the head of this module.
    """
    encoder = getattr(classifier, "encoder", classifier)
    cells, device, batches = open_for(encoder, adata), next(encoder.parameters()).device, []
    for _, bins in cells.in_order(batch_size):
        columns = encoder.attention_columns(bins.to(device), expressed_only=True)
        batches.append(columns[..., :-1].mean(2).cpu().numpy())  # (cells, depth, genes)
    received = np.concatenate(batches).astype(np.float64)

    def share(values):
        total = values.sum(1, keepdims=True)
        return pd.DataFrame(values / np.where(total > 0, total, 1), adata.obs_names, encoder.genes)

    if by_layer:
        return {layer + 1: share(received[:, layer]) for layer in range(received.shape[1])}
    return share(received.mean(1))


def attend(trained: Mapping[int, Callable], adata: anndata.AnnData) -> dict[int, dict[int, pd.DataFrame]]:
    """Return seed -> layer -> `gene_attention` of these cells, of what `fit_scbert` returned for each seed."""
    return {seed: gene_attention(predict.classifier, adata, by_layer=True) for seed, predict in trained.items()}


def share_expressed(adata: anndata.AnnData, labels: Sequence[str]) -> pd.DataFrame:
    """Return the share of each type's cells, tokenized, that express a gene: types x genes."""
    expressed = pd.DataFrame((adata.layers["bins"] > 0).toarray(), columns=adata.var_names)
    return expressed.groupby(np.asarray(labels)).mean()


def even_attention(adata: anndata.AnnData) -> pd.DataFrame:
    """Return what genes would receive if each expressed one received the same, cells x genes: a control.

    A ValueError if the cells are not tokenized.
    """
    if "bins" not in adata.layers:
        raise ValueError("These cells are not tokenized: call scbert.preprocess.tokenize(adata) first.")
    expressed = (adata.layers["bins"] > 0).toarray().astype(np.float64)
    return pd.DataFrame(expressed / expressed.sum(1, keepdims=True).clip(min=1), adata.obs_names, adata.var_names)


def average(values: Sequence[float], *, seed: int = 0) -> dict[str, float]:
    """Return the mean over cells, or over types, with its 95 % interval by bootstrap: value, low, high and n."""
    return bootstrap(np.mean, np.asarray(values, np.float64), seed=seed)


def measure_focus(attention: pd.DataFrame) -> pd.DataFrame:
    """Say how far each cell's attention is from an even spread over the genes that receive any.

    A row a cell: `genes` that receive any; `largest`, what the most attended receives, as a multiple of an even share; and
    `effective_share`, the exponential of the entropy over the number of genes: 1 for an even spread, near 0 for one gene.
    """
    values = attention.to_numpy()
    values = values[values.any(1)]
    genes = (values > 0).sum(1)
    entropy = stats.entropy(values, axis=1)
    table = {"genes": genes, "largest": values.max(1) * genes, "effective_share": np.exp(entropy) / genes}
    return pd.DataFrame(table, index=attention.index[attention.to_numpy().any(1)])


@torch.no_grad()
def _read_features(model, bins):
    """Return the positions of a cell that enter, and of each layer what `_form_rows` takes, (heads, positions, features).

    These are phi(q) and phi(k) or, with exact attention, q and k themselves.
    """
    encoder = getattr(model, "encoder", model)
    if encoder.config.key_stabiliser != "head":
        raise ValueError("Dense attention needs key_stabiliser='head': with 'batch' a cell is not alone.")
    encoder = copy.deepcopy(encoder).cpu().double()
    bins = encoder.hide_unseen(bins.cpu()[None])[0]
    enters = find_entered(bins[None])[0] if encoder.config.expressed_only else torch.ones_like(bins, dtype=torch.bool)
    positions, layers = enters.nonzero().squeeze(1), []
    x = encoder.embed(bins[None], positions[None])[0]  # (positions, dim)
    for attention_block, feed_block in encoder.performer.net.layers:
        normed, layer = attention_block.norm(x), attention_block.fn
        q, k, v = (
            linear(normed).unflatten(1, (layer.heads, -1)).transpose(0, 1)  # (heads, positions, dim_head)
            for linear in (layer.to_q, layer.to_k, layer.to_v)
        )
        if encoder.config.attention == "softmax":
            out = _form_rows(q, k, "softmax") @ v
        else:
            projection = layer.fast_attention.projection_matrix
            q, k = _map_features(q, projection, axes=(2,)), _map_features(k, projection, axes=(1, 2))
            out = q @ (k.mT @ v) / (q @ k.sum(1, keepdim=True).mT)
        x = x + layer.to_out(out.transpose(0, 1).flatten(1))
        x = x + feed_block.fn(feed_block.norm(x))
        layers.append((q, k))
    return positions, layers


def _map_features(x, projection, axes):
    """Return phi(x), (heads, positions, features), the maximum being taken over `axes`; a common factor is left out."""
    scale = x.shape[2] ** -0.25
    exponent = scale * x @ projection.T
    half_square = scale**2 * x.square().sum(2, keepdim=True) / 2
    return torch.exp(exponent - half_square - exponent.amax(axes, keepdim=True)) + EPS


def _form_rows(q, k, attention):
    """Return rows of the attention matrix, (heads, queries, positions), each summing to one."""
    rows = q @ k.mT
    return torch.softmax(rows * q.shape[2] ** -0.5, 2) if attention == "softmax" else rows / rows.sum(2, keepdim=True)


def average_matrix(classifier: Classifier | ScBert, adata: anndata.AnnData, genes: Sequence[str]) -> pd.DataFrame:
    """Average the attention between chosen genes, as multiples of an even spread, over cells, heads and layers.

    `classifier` and `adata` are as in `gene_attention`; a few cells will do, each is on its own. `genes` are of the
    vocabulary, else a ValueError; the rows of these alone are formed.

    Returns
    -------
    Genes x genes: row i is what i attends to, over the cells in which both genes enter the encoder; NaN for two that
    never do so together. 1 is what each would receive if attention were spread evenly over what enters.

    Paper: Extended Data Fig. 1d, of all genes.
    """
    encoder = getattr(classifier, "encoder", classifier)
    cells = open_for(encoder, adata)
    chosen = pd.Index(encoder.genes).get_indexer(list(genes))
    if (chosen < 0).any():
        raise ValueError(f"{list(genes)[int(np.argmin(chosen))]} is not a gene of this model: choose among its genes.")
    (total, count), attention = np.zeros((2, len(chosen), len(chosen))), encoder.config.attention
    for _, bins in cells.in_order(1):
        positions, layers = _read_features(encoder, bins[0])
        where = pd.Index(positions.numpy()).get_indexer(chosen)
        here = np.flatnonzero(where >= 0)
        rows = torch.stack([_form_rows(q[:, where[here]], k, attention) for q, k in layers]).mean(
            (0, 1)
        )  # (here, positions)
        total[np.ix_(here, here)] += rows.numpy()[:, where[here]] * len(positions)
        count[np.ix_(here, here)] += 1
    with np.errstate(invalid="ignore"):
        return pd.DataFrame(total / np.where(count > 0, count, np.nan), list(genes), list(genes))


def measure_distance(model: Classifier | ScBert, adata: anndata.AnnData) -> float:
    """Return the largest distance of `ScBert.attention_columns` from the column means of dense matrices, over all cells.

    Both compute the same numbers, the former in float32 and without a matrix: a few parts in 10^8 apart is right.
    """
    encoder, worst = getattr(model, "encoder", model), 0.0
    device, attention = next(encoder.parameters()).device, encoder.config.attention
    for _, bins in open_for(encoder, adata).in_order(1):
        positions, layers = _read_features(encoder, bins[0])
        columns = encoder.attention_columns(bins.to(device))[0].cpu()  # (depth, heads, genes + 1)
        for received, (q, k) in zip(columns[..., positions], layers, strict=True):
            parts = (_form_rows(part, k, attention).sum(1) for part in q.split(ROWS_AT_ONCE, 1))
            dense = sum(parts) / len(positions)
            worst = max(worst, float((received - dense).abs().max()))
    return worst


def contrast_types(
    attention: pd.DataFrame, labels: Sequence[str], *, n_permutations: int = 1000, seed: int = 0
) -> pd.DataFrame:
    """Compare what each gene receives in the cells of a type with what it receives in all others.

    `attention` is cells x genes, or any other value of a gene in a cell; `labels`, (cells,), are their types, a ValueError if
    all are one. They are permuted over cells `n_permutations` times; 0 leaves z, p and fdr out.

    Returns
    -------
    A row a type and gene: type, gene, cells (of the type), mean_in, mean_out, difference, z (the difference less its
    mean over permutations, over their standard deviation), p, and fdr (Benjamini and Hochberg over types and genes).
    ``p = (1 + permutations with as large a difference, of either sign) / (1 + permutations)``; 1 if nothing varies.

    No p is below 1 / (1 + permutations). Cells are taken for independent, which those of one donor or run are not.

    Paper: Fig. 5a, c: "compared to other cell types", without a definition or a test.
    """
    labels = np.asarray(labels, dtype=str)
    if len(labels) != len(attention):
        raise ValueError(f"There are {len(labels)} labels for {len(attention)} cells: give one for each cell.")
    types, code = np.unique(labels, return_inverse=True)
    if len(types) < 2:
        raise ValueError(f"All cells are {types[0]}: there is no other type to compare with.")
    values = attention.to_numpy(np.float64)  # (cells, genes)
    sizes, total = np.bincount(code)[:, None], values.sum(0)

    def differ(codes):  # (permutations, cells) -> (permutations, types, genes), mean inside less mean outside
        inside = (codes[:, None] == np.arange(len(types))[:, None]).reshape(-1, codes.shape[1]).astype(np.float64)
        inside = (inside @ values).reshape(len(codes), len(types), -1)
        return inside / sizes - (total - inside) / (len(labels) - sizes)

    found = differ(code[None])[0]
    random, drawn = np.random.default_rng(seed), np.zeros((3, *found.shape))  # exceedances, sum, sum of squares
    threshold = np.abs(found) * (1 - 1e-9)  # rounding must not hide a tie
    for start in range(0, n_permutations, PERMUTATIONS_AT_ONCE):
        n = min(PERMUTATIONS_AT_ONCE, n_permutations - start)
        differences = differ(random.permuted(np.tile(code, (n, 1)), axis=1))
        drawn += (np.abs(differences) >= threshold).sum(0), differences.sum(0), np.square(differences).sum(0)
    inside = found + (total - found * sizes) / len(labels)  # solve both equations of the means
    outside = inside - found
    table = {
        "type": np.repeat(types, values.shape[1]), "gene": np.tile(attention.columns.astype(str), len(types)),
        "cells": np.repeat(sizes.ravel(), values.shape[1]), "mean_in": inside.ravel(), "mean_out": outside.ravel(),
        "difference": found.ravel(),
    }  # fmt: skip
    if n_permutations:
        exceed, mean, square = drawn[0], drawn[1] / n_permutations, drawn[2] / n_permutations
        deviation = np.sqrt(np.maximum(square - mean**2, 0))
        varies = np.ptp(values, axis=0) > 0
        p = np.where(varies, (1 + exceed) / (1 + n_permutations), 1.0)
        z = np.divide(found - mean, deviation, out=np.zeros_like(found), where=varies & (deviation > 0))
        table |= {"z": z.ravel(), "p": p.ravel(), "fdr": stats.false_discovery_control(p.ravel())}
    return pd.DataFrame(table)


def find_top(contrast: pd.DataFrame, n: int = 20) -> pd.DataFrame:
    """Return the `n` genes of each type with the largest difference, above zero, and their `rank` from 1."""
    rows = contrast[contrast["difference"] > 0].sort_values(["type", "difference"], ascending=[True, False])
    rows = rows.groupby("type").head(n).reset_index(drop=True)
    return rows.assign(rank=rows.groupby("type").cumcount() + 1)


def load_sets(name: str) -> tuple[dict[str, list[str]], dict[str, list[str]]]:
    """Return a collection of gene sets, and which of its sets are those of a cell type: label -> sets.

    `name` is "markers", a small table that comes with the package; or one of `scbert.pretraining.read_sets`, which is
    fetched, and raises a ValueError for another name.
    """
    own = yaml.safe_load(Path(__file__).with_name("markers.yaml").read_text(encoding="utf-8"))
    return own["markers"] if name == "markers" else read_sets(name), own["types"].get(name, {})


def load_collections(names: str, train: anndata.AnnData, types: Sequence[str]) -> dict[str, tuple[dict, dict]]:
    """Return name -> what `load_sets` returns, of the collections that a notebook's parameter names, blanks between.

    One without a set to test among the genes that the tokenized training cells express is left out. It is printed what a
    notebook lacks without it, and where no set is of one of the `types`.
    """
    expressed = train.var_names[train.layers["bins"].getnnz(0) > 0]
    loaded = {name: load_sets(name) for name in names.split()}
    usable = {name: found for name, found in loaded.items() if choose_tested(found[0], expressed)}
    for name in [name for name in loaded if name not in usable]:
        print(f"No set of {name} has enough of these genes (are both named by symbols?): it is left out.")
    if not usable:
        print("There are no gene sets to ask for: what needs them, such as enrichment, is left out.")
    if not any(set(types).intersection(own) for _, own in list(usable.values())[:1]):
        print("No gene set is of one of these types: the figure of known and new genes is left out.")
    return usable


def mark_members(top: pd.DataFrame, collections: Mapping[str, tuple[Mapping, Mapping]]) -> pd.DataFrame:
    """Add to the table of `find_top` the column `member`: whether a gene is in a set of its type; None without a set.

    Of the `collections`, as `load_collections` returns them, the first counts.
    """
    sets, names = next(iter(collections.values()), ({}, {}))
    members = {kind: {gene for name in own for gene in sets[name]} for kind, own in names.items()}
    pairs = zip(top["type"], top["gene"], strict=True)
    return top.assign(member=[gene in members[kind] if kind in members else None for kind, gene in pairs])


def rank_known(
    rankings: Mapping[str, pd.DataFrame], collections: Mapping[str, tuple[Mapping, Mapping]]
) -> pd.DataFrame:
    """Return where each ranking puts the genes that are known of a type: 1 is the first of all genes of that type.

    `rankings` are name -> scores (types x genes), the most important gene the largest; what is known is in the sets of the
    first of the `collections`, as in `mark_members`. One row a type and gene that the rankings have, a column each ranking.
    """
    sets, names = next(iter(collections.values()), ({}, {}))
    ranks = {name: scores.rank(axis=1, ascending=False, method="min") for name, scores in rankings.items()}
    rows = [
        {"type": kind, "gene": gene} | {name: int(table.loc[kind, gene]) for name, table in ranks.items()}
        for kind, own in names.items()
        for gene in dict.fromkeys(gene for name in own for gene in sets[name])
        if all(kind in table.index and gene in table.columns for table in ranks.values())
    ]
    return pd.DataFrame(rows, columns=["type", "gene", *rankings])


def write_top(top: pd.DataFrame) -> str:
    """Return a line for each type: its top genes, best first, with a star at each `member` of a set of the type."""
    starred = top["gene"] + np.where(top["member"].eq(True), "*", "")
    return "\n".join(f"{kind}: {' '.join(genes)}" for kind, genes in starred.groupby(top["type"]))


def enrich(
    genes: Mapping[str, Sequence[str]],
    sets: Mapping[str, Sequence[str]],
    background: Sequence[str],
    *,
    names: Mapping[str, Sequence[str]] | None = None,
) -> pd.DataFrame:
    """Ask which sets a type's genes are in more often than by chance: the hypergeometric test, by gseapy.

    `genes` is type -> its top genes, `sets` set -> genes, and `names` type -> its own sets, see `load_sets`. The `background`
    are all genes that could have come out on top: the model's own, and those that the cells express. Sets with
    `SET_SIZES` genes in it are tested.

    Returns
    -------
    A row a type and set: type, term, overlap, size (genes of the set in the background), drawn (genes of the type),
    odds_ratio, p, fdr (Benjamini and Hochberg over all types and sets), rank (by p, within the type), own (whether it
    is a set of this type), genes (those in common). Sets without any are rows too, with p = 1.

    A ValueError: gseapy is not installed, or no set has enough genes in the background.

    Paper: Fig. 5b, by Enrichr, whose background is about 20,000 genes, which a model of fewer has never seen.
    Differs from gseapy: it corrects over the sets that are hit only; here all tested sets count.
    """
    if find_spec("gseapy") is None:
        raise ValueError("gseapy is not installed: pip install -c requirements.lock 'scbert-companion[interpret]'.")
    import gseapy

    known, tested = set(background), choose_tested(sets, background)
    if not tested:
        raise ValueError(
            f"None of the {len(sets)} sets has {SET_SIZES[0]} to {SET_SIZES[-1]} genes among the {len(known)} of the "
            "background: are both named by symbols?"
        )
    rows = []
    for kind, own in genes.items():
        own = sorted(known.intersection(own))
        found = pd.DataFrame(columns=["Term", "P-value", "Odds Ratio", "Genes"])
        if any(set(own).intersection(members) for members in tested.values()):
            found = gseapy.enrich(own, tested, background=list(known), outdir=None, cutoff=1, no_plot=True).results
        found = found.set_index("Term").reindex(list(tested))
        hits = found["Genes"].fillna("").map(lambda names: sorted(filter(None, names.split(";"))))
        table = {
            "type": kind, "term": list(tested), "overlap": hits.map(len).to_numpy(),
            "size": [len(members) for members in tested.values()], "drawn": len(own),
            "odds_ratio": found["Odds Ratio"].astype(float).to_numpy(),
            "p": found["P-value"].astype(float).fillna(1).to_numpy(),
            "own": [name in (names or {}).get(kind, ()) for name in tested], "genes": hits.map(" ".join).to_numpy(),
        }  # fmt: skip
        rows.append(pd.DataFrame(table))
    table = pd.concat(rows, ignore_index=True)
    table.insert(7, "fdr", stats.false_discovery_control(table["p"]))
    table.insert(8, "rank", table.groupby("type")["p"].rank(method="min").astype(int))
    return table.sort_values(["type", "p", "term"], ignore_index=True)


def choose_tested(sets: Mapping[str, Sequence[str]], background: Sequence[str]) -> dict[str, list[str]]:
    """Return set -> its genes in the background, of the sets that have `SET_SIZES` of them there."""
    found = {name: sorted(set(background).intersection(members)) for name, members in sets.items()}
    return {name: members for name, members in found.items() if len(members) in SET_SIZES}


def enrich_all(
    rankings: Mapping[str, Mapping[str, Sequence[str]]],
    collections: Mapping[str, tuple[Mapping, Mapping]],
    background: Sequence[str],
) -> pd.DataFrame:
    """Apply `enrich` to the top genes of several rankings in several collections (columns collection, ranking).

    `rankings` is name -> type -> genes, `collections` name -> what `load_sets` returns. Each is corrected on its own;
    without any the table is empty.
    """
    if not collections:
        return pd.DataFrame(columns=["collection", "ranking", "own", "overlap"])
    tables = {
        (name, ranking): enrich(genes, sets, background, names=names)
        for name, (sets, names) in collections.items()
        for ranking, genes in rankings.items()
    }
    return pd.concat(tables, names=["collection", "ranking"]).reset_index([0, 1]).reset_index(drop=True)


def count_first(enrichment: pd.DataFrame, level: float = 0.05) -> pd.DataFrame:
    """Count the types whose best set, with an FDR below `level`, is one of their own: the paper's "top-1".

    A row a collection and ranking: `types` that have a set, `enriched`, those for which a set of their own has an FDR
    below the level, and `first`, those for which one also has the smallest p, or shares it. Without sets, no row.
    """
    rows = {}
    for key, table in enrichment.groupby(["collection", "ranking"], sort=False):
        own = table[table["own"]]
        if own.empty:
            continue
        below = own[own["fdr"] < level]
        first = below.loc[below["rank"] == 1, "type"].nunique()
        rows[key] = {"types": own["type"].nunique(), "enriched": below["type"].nunique(), "first": first}
    index = pd.MultiIndex.from_frame(pd.DataFrame(list(rows), columns=["collection", "ranking"]))
    return pd.DataFrame(list(rows.values()), index=index, columns=["types", "enriched", "first"])


def measure_agreement(scores: Mapping[str, pd.DataFrame], n: int = 20) -> pd.DataFrame:
    """Compare scores of genes pairwise: between seeds, layers, or ways to rank.

    `scores` is name -> types x genes, large where important. A ValueError: fewer than two, or of other types or genes.

    Returns
    -------
    A row a pair and type: one, other, type, genes (that either scores other than zero), spearman over those, overlap
    (share of the `n` top genes of one that are among those of the other), and chance, the overlap of random choices.
    """
    if len(scores) < 2:
        raise ValueError("Agreement needs two tables of scores or more.")
    first, rows = next(iter(scores.values())), []
    for name, table in scores.items():
        if not (table.index.equals(first.index) and table.columns.equals(first.columns)):
            raise ValueError(f"The scores of {name} are of other types or genes than the first: reindex them.")
    for (one, left), (other, right) in combinations(scores.items(), 2):
        for kind in first.index:
            a, b = left.loc[kind].to_numpy(float), right.loc[kind].to_numpy(float)
            used = np.flatnonzero((a != 0) | (b != 0))
            a, b, k = a[used], b[used], min(n, len(used))
            shared = np.intersect1d(np.argsort(-a, kind="stable")[:k], np.argsort(-b, kind="stable")[:k])
            varies = len(used) > 2 and np.ptp(a) > 0 and np.ptp(b) > 0
            rows.append(
                {
                    "one": one, "other": other, "type": kind, "genes": len(used),
                    "spearman": float(stats.spearmanr(a, b).statistic) if varies else np.nan,
                    "overlap": len(shared) / max(k, 1), "chance": k / max(len(used), 1),
                }
            )  # fmt: skip
    return pd.DataFrame(rows)


def embed_cells(
    adata: anndata.AnnData, encoder: ScBert, predict: Callable, regression: Callable, *, seed: int = 0
) -> dict[str, np.ndarray]:
    """Return embeddings of tokenized cells, (cells, dim), by name; `encoder` is as before fine-tuning.

    "pca" of log-normalised counts; "scbert", the mean over expressed genes, and "scbert:before", before fine-tuning (as in
    Fig. 5d); "scbert:logits" and "logistic_regression", the logits of either.
    """
    logits, pooled = predict.read_out(adata)
    return {
        "pca": embed_pca(adata, seed=seed),
        "scbert": pooled,
        "scbert:logits": logits.to_numpy(),
        "scbert:before": embed(encoder, adata),
        "logistic_regression": regression.read_out(adata)[0].to_numpy(),
    }


def say_focus(focus: pd.DataFrame, agreement: pd.DataFrame, firsts: pd.DataFrame) -> str:
    """Say in one sentence how near attention is to an even spread, and whether its top genes need more than that.

    `focus` is from `measure_focus`, `agreement` from `measure_agreement`, with the pair attention and even, and
    `firsts` from `count_first`, of these two rankings.
    """
    pair = agreement[(agreement["one"] == "attention") & (agreement["other"] == "even")]
    share, overlap = focus["effective_share"].mean(), pair["overlap"].mean()
    text = (
        f"scBERT looks {'at what a cell expresses' if overlap >= 0.8 else 'elsewhere than an even spread would'}: its "
        f"attention is spread {'almost evenly' if share >= 0.95 else 'unevenly'} over these genes (effective share "
        f"{share:.3f}), and against an even spread it ranks genes with a Spearman correlation of "
        f"{pair['spearman'].mean():.3f} and {overlap:.1%} of the top genes in common"
    )
    for collection, own in firsts.groupby(level="collection", sort=False):
        n = own.droplevel("collection")["first"]
        text += f"; in {collection} the own set is first for {n['attention']} of {own['types'].iloc[0]} types"
        text += f", and for {n['even']} with an even spread"
    return f"{text}."
