"""What masked pretraining learnt: masked tokens against rivals that need no network, and the company that genes keep."""

import gzip
import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import anndata
import numpy as np
import pandas as pd
import torch
from sklearn.preprocessing import MultiLabelBinarizer

from ..data.cells import open_cells, open_for
from ..data.checks import check_tokenized, check_unique
from ..data.preprocess import library_size
from ..evaluate.hygiene import drop_duplicates
from ..evaluate.metrics import bootstrap
from ..evaluate.protocols import choose_pool
from ..sources import datasets
from ..sources.datasets import fetch
from ..sources.genes import load_vocabulary, rename_genes

if TYPE_CHECKING:
    from ..model.encoder import ScBert
    from ..scale.stream import CellStore

RIVALS = {"cell": "cell_tokens", "gene": "gene_tokens", "both": "gene_and_cell_tokens"}
"""Rivals of `scbert.masks.score_masks`: their prefix there, and the method's name in `summarise_masks` and `by_token`."""


GENES_AT_ONCE = 1024
"""Genes that are compared with all others in one go."""


def summarise_masks(scores: pd.DataFrame, *, seed: int = 0) -> pd.DataFrame:
    """Measure the model and its rivals on masked tokens, with 95 % intervals by bootstrap over cells.

    `scores` are from `scbert.masks.score_masks`. Every masked token counts alike; a ValueError if there is none.

    Returns
    -------
    A row for each `method` and `metric`, the index; columns value, low, high and n (cells).

    - Methods: ``scbert``, and the rivals ``cell_tokens``, ``gene_tokens`` and ``gene_and_cell_tokens``, which always say
      their commonest token.
    - Metrics of each: ``masked_accuracy``, and ``cross_entropy`` in nats a token.
    - Of ``scbert`` alone: ``masked_accuracy_minus_<rival>`` and ``cross_entropy_minus_<rival>`` on the same masks; and
      ``predicted_mode_share``, of masks at which the model says the commonest token that the cell shows.
    """
    cells = scores.groupby("cell").sum()
    cells = cells[cells["n_masked"] > 0]
    if cells.empty:
        raise ValueError("No token was masked in these scores: cells have no non-zero token, or there are no cells.")
    columns = {}
    for method, prefix in _prefixes(scores).items():
        columns[method, "masked_accuracy"] = cells[f"{prefix}correct"]
        columns[method, "cross_entropy"] = cells[f"{prefix}loss"]
    for method, metric in list(columns):
        if method != "scbert":
            columns["scbert", f"{metric}_minus_{method}"] = columns["scbert", metric] - columns[method, metric]
    columns["scbert", "predicted_mode_share"] = cells["predicted_mode"]

    rows = [bootstrap(_divide, sums, cells["n_masked"], seed=seed) for sums in columns.values()]
    return pd.DataFrame(rows, index=pd.MultiIndex.from_tuples(columns, names=["method", "metric"]))


def _divide(one, other, axis):
    return one.sum(axis=axis) / other.sum(axis=axis)


def by_token(scores: pd.DataFrame) -> pd.DataFrame:
    """Return one row a true token: `n_masked`, and the accuracy of each method of `summarise_masks`, NaN without masks."""
    sums = scores.groupby("token").sum()
    masks = sums["n_masked"].replace(0, np.nan)
    accuracy = {method: sums[f"{prefix}correct"] / masks for method, prefix in _prefixes(scores).items()}
    return pd.DataFrame({"n_masked": sums["n_masked"]} | accuracy)


def _prefixes(scores):
    """Return method -> prefix of its columns, of the model and the rivals that were scored."""
    rivals = {method: f"{rival}_" for rival, method in RIVALS.items() if f"{rival}_loss" in scores}
    return {"scbert": ""} | rivals


@torch.inference_mode()
def embed_genes(model: "ScBert", adata: "anndata.AnnData | CellStore", *, batch_size: int = 16) -> np.ndarray:
    """Return each gene's vector: what the encoder makes of it, averaged over the cells that express it.

    `adata` are tokenized cells of the encoder's vocabulary, else a ValueError, or a store of them, read in one pass. Returned
    are (genes, dim) float32, the mean of `ScBert.encode` over cells in which the gene has a non-zero token; zero for a gene
    that has none. The vectors that the model adds to each token are ``model.pos_emb.emb.weight[:-1]``.
    """
    cells, device = open_for(model, adata), next(model.parameters()).device
    sums, counts = np.zeros((len(cells.genes), model.config.dim)), np.zeros((len(cells.genes), 1))
    for _, bins in cells.in_order(batch_size):
        expressed = (bins > 0).to(device)  # (cells, genes + 1)
        hidden = model.encode(bins.to(device)).float()  # (cells, genes + 1, dim)
        sums += torch.einsum("cgd,cg->gd", hidden, expressed.float())[:-1].cpu().numpy()
        counts[:, 0] += expressed[:, :-1].sum(0).cpu().numpy()
    return (sums / counts.clip(min=1)).astype(np.float32)


def correlate_genes(adata: "anndata.AnnData | CellStore") -> np.ndarray:
    """Return Pearson correlations of the genes' tokens over cells: vectors of genes that need no network.

    `adata` are tokenized cells, else a ValueError, or a store of them, read in one pass. Returned are (genes, genes)
    float32; a gene's row is its vector. Rows and columns of a gene that never changes are zero.
    """
    cells = open_cells(adata)
    check_tokenized(cells)
    n_genes = len(cells.genes)
    sums, products = np.zeros(n_genes), np.zeros((n_genes, n_genes))
    for _, bins in cells.in_order(256):
        values = bins[:, :-1].numpy().astype(np.float64)  # (cells, genes)
        sums += values.sum(0)
        products += values.T @ values
    covariance = len(cells) * products - np.outer(sums, sums)  # of whole numbers: exactly 0 where nothing changes
    scale = np.sqrt(covariance.diagonal())
    scale = np.divide(1, scale, out=np.zeros(n_genes), where=scale > 0)
    return (covariance * scale * scale[:, None]).astype(np.float32)


def read_sets(name: str) -> dict[str, list[str]]:
    """Return gene sets of the catalogue, fetched: set -> gene symbols.

    `name` is "reactome", pathways; or "panglaodb_markers", the human markers of each cell type; a ValueError for
    others. Symbols are those of the files (MSigDB of 2018, PanglaoDB of 2020): a gene renamed since is missed.
    """
    if name == "reactome":
        with gzip.open(fetch(name)[0], "rt") as file:
            lines = [line.rstrip("\n").split("\t") for line in file]  # set, address, genes ...
        return {line[0]: list(dict.fromkeys(line[2:])) for line in lines}
    if name == "panglaodb_markers":
        markers = pd.read_csv(fetch(name)[0], sep="\t", dtype=str)
        human = markers[markers["species"].str.contains("Hs", na=False)]
        return {kind: list(dict.fromkeys(genes)) for kind, genes in human.groupby("cell type")["official gene symbol"]}
    raise ValueError(f"Gene sets are 'reactome' or 'panglaodb_markers', not {name!r}.")


def share_of_neighbours(
    vectors: np.ndarray,
    genes: Sequence[str],
    sets: Mapping[str, Sequence[str]],
    *,
    levels: np.ndarray | None = None,
    n_neighbours: int = 10,
    minimum: int = 5,
    maximum: int = 200,
    seed: int = 0,
) -> pd.Series:
    """Measure how often genes whose vectors lie close belong to the same set, beside chance.

    Vectors, (genes, dim), are compared by cosine; genes with a zero vector, or of no set of `minimum` to `maximum` members,
    are left out, both from pairs and from chance. `sets` is set -> genes, see `read_sets`.

    Parameters
    ----------
    levels
        How strongly each gene is expressed, such as its mean token, (genes,). Genes of one level lie close, and share sets
        (the ribosome's). So each pair's chance is then the share among all pairs of the same two tenths by level.
    n_neighbours
        Genes that lie closest to each, of those with a set. Of equally close ones, `seed` draws.

    Returns
    -------
    `share`, of the pairs of a gene and its neighbour, that are in a common set; `chance`, the mean chance of these
    pairs, which without levels is the share among all pairs; `ratio` of the two; 95 % intervals `share_low`,
    `share_high`, `ratio_low` and `ratio_high`, over genes; `n_genes` and `n_sets`.

    The intervals take genes for independent, which members of one set are not: they are too narrow. A ValueError if no two
    genes are in a common set, or shapes do not fit.
    """
    vectors = np.asarray(vectors, np.float64)
    if vectors.ndim != 2 or len(vectors) != len(genes) or (levels is not None and np.shape(levels) != (len(genes),)):
        raise ValueError(
            f"{len(genes)} genes need as many vectors and levels, not vectors of shape {vectors.shape} and levels of "
            f"shape {np.shape(levels)}."
        )
    if not np.isfinite(vectors).all() or (levels is not None and not np.isfinite(levels).all()):
        raise ValueError("The vectors or levels hold NaN or infinite values.")
    members = _find_members(genes, sets, minimum, maximum)  # (genes, sets)
    chosen = np.flatnonzero((members.getnnz(1) > 0) & vectors.any(1))
    if len(chosen) <= n_neighbours:
        raise ValueError(
            f"{len(chosen)} genes have a vector and a set of {minimum} to {maximum} members, too few for {n_neighbours} "
            "neighbours each: are genes and sets named alike?"
        )
    random = np.random.default_rng(seed)
    chosen = random.permutation(chosen)  # the first of equally close genes is then any of them
    members, vectors = members[chosen], vectors[chosen] / np.linalg.norm(vectors[chosen], axis=1, keepdims=True)
    tenth = np.zeros(len(chosen), np.int64)
    if levels is not None:
        level = np.asarray(levels, np.float64)[chosen]
        tenth = np.searchsorted(np.quantile(level, np.arange(0.1, 0.95, 0.1)), level)
    is_tenth = np.eye(10)[tenth]  # (genes, 10)
    hits = np.zeros((len(chosen), n_neighbours), bool)
    neighbours = np.zeros((len(chosen), n_neighbours), np.int64)
    together = np.zeros((10, 10))  # pairs in a common set, by the tenths of both
    for start in range(0, len(chosen), GENES_AT_ONCE):
        rows = np.arange(start, min(start + GENES_AT_ONCE, len(chosen)))
        is_common = (members[rows] @ members.T).toarray() > 0
        is_common[rows - start, rows] = False  # a gene is no pair with itself
        together += is_tenth[rows].T @ is_common @ is_tenth
        cosine = (vectors[rows] @ vectors.T).round(9)  # rounded: equal vectors are equally close
        cosine[rows - start, rows] = -2
        neighbours[rows] = np.argsort(-cosine, axis=1, kind="stable")[:, :n_neighbours]
        hits[rows] = np.take_along_axis(is_common, neighbours[rows], axis=1)
    if not together.any():
        raise ValueError("No two of these genes are in a common set: there is nothing to find.")
    sizes = np.bincount(tenth, minlength=10)
    pairs = np.outer(sizes, sizes) - np.diag(sizes)
    chance = (together / pairs.clip(min=1))[tenth[:, None], tenth[neighbours]]  # (genes, neighbours)

    share = bootstrap(np.mean, hits.mean(1), seed=seed)
    ratio = bootstrap(_divide, hits.mean(1), chance.mean(1), seed=seed)
    return pd.Series(
        {
            "share": share["value"], "share_low": share["low"], "share_high": share["high"], "chance": chance.mean(),
            "ratio": ratio["value"], "ratio_low": ratio["low"], "ratio_high": ratio["high"],
            "n_genes": len(chosen), "n_sets": members.shape[1],
        }
    )  # fmt: skip


def _find_members(genes, sets, minimum, maximum):
    """Return which gene is in which set, (genes, sets), of sets with a fitting number of members among the genes."""
    index = pd.Index(genes)
    check_unique(index, "Gene names")
    known = [index.intersection(pd.Index(names, dtype=object)) for names in sets.values()]
    fitting = [found for found in known if minimum <= len(found) <= maximum]
    return MultiLabelBinarizer(classes=list(index), sparse_output=True).fit_transform(fitting).T.tocsr()


def load_sets(names: str, *, label_key: str | None = None, batch_key: str | None = None) -> dict[str, anndata.AnnData]:
    """Load the sets of a notebook's parameter `dataset`: one, or several with `` + `` between them.

    `names` are of the catalogue, or paths, such as ``"pbmc_pool + zheng_facs"``; a ValueError if one stands there
    twice. The two keys are as in `scbert.datasets.load`; a set of the catalogue without labels needs none.
    """
    parts = datasets.part_names(names, " + ")
    if len(set(parts)) < len(parts):
        raise ValueError(f"dataset names a set twice: {names}.")
    sets = {}
    for name in parts:
        has_labels = datasets.CATALOGUE.get(name, {}).get("labels", True)
        sets[name] = datasets.load(name, label_key=label_key if has_labels else None, batch_key=batch_key)
    return sets


def join_sets(
    sets: Mapping[str, anndata.AnnData], *, label_key: str = "cell_type", genes: str = "all", seed: int = 0
) -> tuple[anndata.AnnData, anndata.AnnData]:
    """Join sets on the genes they share, and hold some of each one's cells out of training.

    `sets` is name -> counts, as of `load_sets`. `label_key`, which a set may lack, and `seed` say which are held out. Where
    the parameter `genes` begins with "published", genes are renamed, and the sets joined on all published genes that cells
    to learn from express: one that a set did not measure is 0 there, as it is where nothing was seen of it.

    Returns
    -------
    Cells to learn from, and cells to measure on: of a labelled set the test cells of `scbert.protocols.choose_pool`,
    which the other notebooks test on, of an unlabelled one a twentieth. ``obs["set"]`` says where a cell is from,
    ``obs["n_counts"]`` its total over all genes of its own set; labels are those of the sets that have any.

    Cells that are in a set named under ``shares_cells_with`` in the catalogue, or in an earlier one of `sets`, are
    dropped, and how many is printed. A ValueError if sets share no gene, or a label has too few cells to be split.

    Paper: Methods, "pretraining" holds no cells out that are named; the script's validation cells are a twentieth.
    """
    learn, held_out, earlier = [], [], {}
    vocabulary = load_vocabulary() if genes.startswith("published") else []
    for name, adata in sets.items():
        others = {
            other: datasets.load(other) for other in datasets.CATALOGUE.get(name, {}).get("shares_cells_with", [])
        }
        for other, cells in (others | earlier).items():
            adata = drop_duplicates(adata, cells, other)
        earlier[name] = adata
        if label_key in adata.obs:
            rest, test = choose_pool(adata, name, label_key=label_key, seed=seed)
        else:
            order = np.random.default_rng(seed).permutation(adata.n_obs)
            n_held_out = max(1, adata.n_obs // 20)
            rest, test = np.sort(order[n_held_out:]), np.sort(order[:n_held_out])
        part = take_counts(rename_genes(adata, vocabulary) if vocabulary else adata, name, label_key)
        if vocabulary:
            part = part[:, part.var_names.isin(vocabulary)]
        learn.append(part[rest])
        held_out.append(part[test])
    learn, held_out = (concatenate(parts, list(sets), bool(vocabulary)) for parts in (learn, held_out))
    if vocabulary:
        learn = learn[:, learn.X.getnnz(0) > 0].copy()
        held_out = held_out[:, learn.var_names].copy()
    return learn, held_out


def take_counts(adata, name, label_key):
    """Return the counts with the three columns that sets of different makes have in common."""
    obs = pd.DataFrame({"set": name, "n_counts": library_size(adata)}, index=adata.obs_names)
    if label_key in adata.obs:
        obs[label_key] = adata.obs[label_key].astype(str)
    return anndata.AnnData(adata.X, obs=obs, var=pd.DataFrame(index=adata.var_names))


def concatenate(parts, names, outer=False):
    """Join parts of sets, made by `take_counts`, on the genes that all of them have (or any); cell names become unique."""
    if len(parts) == 1:
        return parts[0].copy()
    genes = parts[0].var_names
    for part in parts[1:]:
        genes = genes.union(part.var_names, sort=False) if outer else genes[genes.isin(part.var_names)]
    if not len(genes):
        raise ValueError(f"The sets {', '.join(names)} share no gene name: use the same kind of symbols in all.")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Observation names are not unique", UserWarning)  # for a moment
        parts = [part[:, genes[genes.isin(part.var_names)]] for part in parts]
        joined = anndata.concat(parts, join="outer", fill_value=0)[:, genes].copy()  # cells without labels stay
    joined.obs_names_make_unique()
    return joined


def measure_company(
    vectors: Mapping[str, np.ndarray],
    adata: anndata.AnnData,
    gene_sets: Mapping[str, Mapping[str, Sequence[str]]],
    *,
    seed: int = 0,
) -> pd.DataFrame:
    """Apply `share_of_neighbours` to several vectors of genes and several collections of gene sets.

    `vectors` is name -> (genes, dim), of the genes of `adata`, in their order; `adata` are the tokenized cells that they were
    learnt from: a gene's level is its mean token in them. `gene_sets` is name of a collection -> what `read_sets` returns
    of it. A row for each collection and name of vectors, the index.
    """
    levels = adata.layers["bins"].toarray().mean(0)
    rows = {
        (name, method): share_of_neighbours(values, adata.var_names, sets, levels=levels, seed=seed)
        for name, sets in gene_sets.items()
        for method, values in vectors.items()
    }
    return pd.DataFrame(rows).T
