"""What masked pretraining learnt: masked tokens against rivals that need no network, and the company that genes keep."""

import gzip
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import anndata
import numpy as np
import pandas as pd
import torch
from scipy import sparse

from ..data.cells import check_cells, check_tokenized, find_commonest_bin, mask_bins, open_cells
from ..sources.datasets import fetch
from ..data.preprocess import check_unique

if TYPE_CHECKING:
    from ..model.encoder import ScBert
    from ..scale.stream import CellStore

RIVALS = {"cell": "cell_tokens", "gene": "gene_tokens", "both": "gene_and_cell_tokens"}
"""Rivals of `score_masks`: their prefix there, and the method's name in `summarise_masks` and `by_token`."""

CELLS_AT_ONCE = 256
"""Cells that are counted in one go."""

GENES_AT_ONCE = 1024
"""Genes that are compared with all others in one go."""


def count_tokens(adata: "anndata.AnnData | CellStore") -> np.ndarray:
    """Count how often each gene has each non-zero token: what the rivals of `score_masks` know of genes.

    Parameters
    ----------
    adata
        Tokenized cells, or a store of them, read in one pass; training cells only.

    Returns
    -------
    (genes + 1, n_bins) int64; column `t` counts token ``t + 1``, and the trailing token, always 0, has none.

    Raises
    ------
    ValueError
        The cells are not tokenized.
    """
    cells = open_cells(adata)
    check_tokenized(cells)
    shape = (len(cells.genes) + 1, cells.n_bins)
    table = np.zeros(shape, np.int64)
    for _, bins in cells.in_order(CELLS_AT_ONCE):
        bins = bins.numpy()  # (cells, genes + 1)
        cell, gene = np.nonzero(bins)
        table += np.bincount(gene * cells.n_bins + bins[cell, gene] - 1, minlength=table.size).reshape(shape)
    return table


@torch.no_grad()  # not inference_mode: sharded weights gathered under it could not be trained afterwards
def score_masks(
    model: "ScBert",
    adata: "anndata.AnnData | CellStore",
    table: np.ndarray | None = None,
    *,
    module: torch.nn.Module | None = None,
    seed: int = 0,
    mask_share: float = 0.15,
    batch_size: int = 16,
    part: tuple[int, int] = (0, 1),
) -> pd.DataFrame:
    """Predict masked tokens of cells, beside rivals that know the cell, the gene, or both, and no other gene.

    Parameters
    ----------
    model, adata
        An encoder, and tokenized cells of its vocabulary, which no rival has counted: test or validation cells.
    table
        `count_tokens` of training cells; without it the cell is the only rival.
    module
        What to call in place of the model: the model as Lightning Fabric wrapped it.
    seed
        Fixes the masks, cell by cell: neither batches nor parts change them.
    mask_share
        As in `pretrain`; every masked token is hidden, since one that stayed visible could be copied.
    batch_size
        Cells a forward pass.
    part
        (rank, number of processes): batches number rank, rank + processes, ... are scored, and all processes call the
        module equally often, as sharded weights need. The frames of all parts, concatenated, are the whole.

    Returns
    -------
    A row for each cell and true token, 1 to n_bins, also where the cell has no such mask (index `cell`, `token`), so
    that ``groupby("cell").sum()`` and ``groupby("token").sum()`` are the totals. Columns: `n_masked`; of the model,
    `correct` and `loss`, the summed cross-entropy in nats over all its n_bins + 2 tokens; `predicted_mode`, how often
    it says the commonest non-zero token that the cell shows; and ``<rival>_correct`` and ``<rival>_loss`` of

    - `cell`: the shares of the non-zero tokens that the cell shows, one count added to each token. It says the
      commonest, the lowest of several, and 1 for a cell that shows none.
    - `gene`: the shares of the gene's tokens in the table, with one more, which is spread as the tokens of all genes
      are. It says the commonest; a gene that the table never saw has the shares of all genes. (The shares of all
      genes have one count added to each token.)
    - `both`: p(token | gene) p(token | cell) / p(token), normalised, of the three shares above. It is what gene and
      cell say apart; genes that tell of each other, or a finer use of the cell's depth, are what can go beyond it.

    Raises
    ------
    ValueError
        Cells not tokenized or for another vocabulary, a table of another shape, or a part that does not exist.

    Paper: Methods, "pretraining"; the rivals are not in it. Boiarsky et al. 2023 measured the commonest bin.
    Differs from the published code: all cells count, where the script's validation accuracy is that of cell 0; every
    masked token is hidden, where a tenth stays visible there, as it does in training.
    """
    cells, n_bins, module = open_cells(adata), model.config.n_bins, module or model
    check_cells(model, cells)
    rank, n_parts = part
    if not 0 <= rank < n_parts:
        raise ValueError(f"part is (rank, number of processes), such as (0, 1), not {part}.")
    by_gene, overall = (None, None) if table is None else _share_tokens(table, (len(cells.genes) + 1, n_bins))
    device, number = next(model.parameters()).device, -1
    none = torch.zeros(0, len(cells.genes) + 1, dtype=torch.int64)
    rows = [np.zeros(0, np.int64)]
    sums = [_score_batch(torch.zeros(0, n_bins + 2), none, none.bool(), n_bins, by_gene, overall)]
    for number, (start, bins) in enumerate(cells.in_order(batch_size)):
        if number % n_parts == rank:
            seeds = [(seed, start + i) for i in range(len(bins))]
            seen, where = mask_bins(bins, model.config.mask_token, seeds, mask_share=mask_share, replace_share=1)
            logits = module(seen.to(device))[where.to(device)].float().cpu()  # (masks, n_bins + 2)
            rows.append(np.arange(start, start + len(bins)))
            sums.append(_score_batch(logits, bins, where, n_bins, by_gene, overall))
    if number >= 0 and number % n_parts < rank:  # this part has a batch less than others
        module(bins.to(device))
    names = pd.Index(adata.obs_names)[np.concatenate(rows)]
    index = pd.MultiIndex.from_product([names, range(1, n_bins + 1)], names=["cell", "token"])
    return pd.DataFrame({name: np.concatenate([batch[name] for batch in sums]) for name in sums[0]}, index=index)


def _share_tokens(table, shape):
    """Return the shares of each gene's tokens, (genes + 1, n_bins), and of all genes', (n_bins,)."""
    table = np.asarray(table, np.float64)
    if table.shape != shape:
        raise ValueError(
            f"The table has shape {table.shape}, but these cells need {shape}: count_tokens of training cells with the "
            "same genes and bins."
        )
    overall = table.sum(0) + 1
    overall /= overall.sum()
    return (table + overall) / (table.sum(1, keepdims=True) + 1), overall


def _score_batch(logits, bins, where, n_bins, by_gene, overall):
    """Sum each measure over the masks of each (cell, true token); logits are those of the masks, (masks, n_bins + 2)."""
    visible = bins.masked_fill(where, 0)  # (cells, genes + 1)
    cell, gene = (axis.numpy() for axis in where.nonzero(as_tuple=True))  # (masks,)
    target = bins[where].numpy()
    mode = find_commonest_bin(visible, n_bins).numpy()[cell, 0]
    predicted = logits.argmax(1).numpy()
    measures = {
        "n_masked": np.ones(len(cell), bool),
        "correct": predicted == target,
        "loss": torch.nn.functional.cross_entropy(logits, bins[where], reduction="none").numpy(),
        "predicted_mode": predicted == mode,
    }
    shown, position = visible.nonzero(as_tuple=True)
    code = (shown * n_bins + visible[shown, position] - 1).numpy()
    counts = np.bincount(code, minlength=len(bins) * n_bins).reshape(len(bins), n_bins) + 1.0
    shares = {"cell": (counts / counts.sum(1, keepdims=True))[cell]}  # (masks, n_bins) each
    if by_gene is not None:
        shares["gene"] = by_gene[gene]
        product = shares["gene"] * shares["cell"] / overall
        shares["both"] = product / product.sum(1, keepdims=True)
    for rival, share in shares.items():
        says = mode if rival == "cell" else share.argmax(1) + 1
        measures[f"{rival}_correct"] = says == target
        measures[f"{rival}_loss"] = -np.log(share[np.arange(len(target)), target - 1])
    row, n_rows = cell * n_bins + target - 1, len(bins) * n_bins
    return {  # float64 sums; what is counted stays whole
        name: np.bincount(row, values, n_rows).astype(np.int64 if values.dtype == bool else np.float64)
        for name, values in measures.items()
    }


def summarise_masks(scores: pd.DataFrame, *, seed: int = 0) -> pd.DataFrame:
    """Measure the model and its rivals on masked tokens, with 95 % intervals by bootstrap over cells.

    Parameters
    ----------
    scores
        As `score_masks` returns them, in any order; cells without a masked token have no say.
    seed
        Fixes the resampling.

    Returns
    -------
    A row for each `method` and `metric` (the index, as in ``<data>/<method>/<metric>`` of a record); columns value,
    low, high and n (cells). Each value is a ratio of sums: every masked token counts alike.

    - Methods: ``scbert``, and the rivals ``cell_tokens``, ``gene_tokens`` and ``gene_and_cell_tokens``, whose accuracy
      is that of always saying their commonest token (of the cell, of the gene, of both).
    - Metrics of each: ``masked_accuracy``, and ``cross_entropy`` in nats a token.
    - Of ``scbert`` alone: ``masked_accuracy_minus_<rival>``, good if above 0, and ``cross_entropy_minus_<rival>``,
      good if below, on the same masks, the interval being the difference's own; and ``predicted_mode_share``, the
      share of masks at which the model says the commonest token that the cell shows.

    Raises
    ------
    ValueError
        No token was masked.
    """
    from ..evaluate.metrics import bootstrap

    cells = scores.groupby("cell").sum()
    cells = cells[cells["n_masked"] > 0]
    if cells.empty:
        raise ValueError(
            "No token was masked in these scores: the cells have no non-zero token, or there are no cells."
        )
    columns = {}
    for method, prefix in _prefixes(scores).items():
        columns[method, "masked_accuracy"] = cells[f"{prefix}correct"]
        columns[method, "cross_entropy"] = cells[f"{prefix}loss"]
    for method, metric in list(columns):
        if method != "scbert":
            columns["scbert", f"{metric}_minus_{method}"] = columns["scbert", metric] - columns[method, metric]
    columns["scbert", "predicted_mode_share"] = cells["predicted_mode"]

    def divide(sums, masks, axis):
        return sums.sum(axis=axis) / masks.sum(axis=axis)

    rows = [bootstrap(divide, sums, cells["n_masked"], seed=seed) for sums in columns.values()]
    return pd.DataFrame(rows, index=pd.MultiIndex.from_tuples(columns, names=["method", "metric"]))


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

    Parameters
    ----------
    model, adata
        An encoder, and tokenized cells of its vocabulary, or a store of them, read in one pass.
    batch_size
        Cells a forward pass.

    Returns
    -------
    (genes, dim) float32, the mean of `ScBert.encode` over cells in which the gene has a non-zero token; zero for a gene
    that has none. The vectors that the model adds to each token are ``model.pos_emb.emb.weight[:-1]``.

    Raises
    ------
    ValueError
        Cells not tokenized or for another vocabulary.
    """
    cells, device = open_cells(adata), next(model.parameters()).device
    check_cells(model, cells)
    sums, counts = np.zeros((len(cells.genes), model.config.dim)), np.zeros((len(cells.genes), 1))
    for _, bins in cells.in_order(batch_size):
        expressed = (bins > 0).to(device)  # (cells, genes + 1)
        hidden = model.encode(bins.to(device)).float()  # (cells, genes + 1, dim)
        sums += torch.einsum("cgd,cg->gd", hidden, expressed.float())[:-1].cpu().numpy()
        counts[:, 0] += expressed[:, :-1].sum(0).cpu().numpy()
    return (sums / counts.clip(min=1)).astype(np.float32)


def correlate_genes(adata: "anndata.AnnData | CellStore") -> np.ndarray:
    """Return Pearson correlations of the genes' tokens over cells: vectors of genes that need no network.

    Parameters
    ----------
    adata
        Tokenized cells, or a store of them, read in one pass.

    Returns
    -------
    (genes, genes) float32; a gene's row is its vector. Rows and columns of a gene that never changes are zero.

    Raises
    ------
    ValueError
        The cells are not tokenized.
    """
    cells = open_cells(adata)
    check_tokenized(cells)
    n_genes = len(cells.genes)
    sums, products = np.zeros(n_genes), np.zeros((n_genes, n_genes))
    for _, bins in cells.in_order(CELLS_AT_ONCE):
        values = bins[:, :-1].numpy().astype(np.float64)  # (cells, genes)
        sums += values.sum(0)
        products += values.T @ values
    covariance = len(cells) * products - np.outer(sums, sums)  # of whole numbers: exactly 0 where nothing changes
    scale = np.sqrt(covariance.diagonal())
    scale = np.divide(1, scale, out=np.zeros(n_genes), where=scale > 0)
    return (covariance * scale * scale[:, None]).astype(np.float32)


def read_sets(name: str) -> dict[str, list[str]]:
    """Return gene sets of the catalogue, fetched: set -> gene symbols.

    Parameters
    ----------
    name
        "reactome", pathways; or "panglaodb_markers", the human markers of each cell type.

    Raises
    ------
    ValueError
        Another name, or what `scbert.datasets.fetch` raises.

    Symbols are those of the files (MSigDB of 2018, PanglaoDB of 2020): a gene renamed since is missed.
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

    Parameters
    ----------
    vectors
        (genes, dim); compared by cosine. Genes with a zero vector are left out, both from pairs and from chance.
    genes
        Their names.
    sets
        Set -> genes, see `read_sets`. Genes of no set that is kept are left out.
    levels
        How strongly each gene is expressed, such as its mean token, (genes,). Genes of one level lie close in many
        vectors, and share sets: ribosomal genes are the strongest, and all in one pathway. With levels, each pair's
        chance is the share among all pairs of the same two tenths by level, so that what is left is not the level's.
    n_neighbours
        Genes that lie closest to each, of those with a set. Of equally close ones, `seed` draws.
    minimum, maximum
        Sets with so many members among `genes` are kept: a large one says little.
    seed
        Fixes the resampling, too.

    Returns
    -------
    `share`, of the pairs of a gene and its neighbour, that are in a common set; `chance`, the mean chance of these
    pairs, which without levels is the share among all pairs; `ratio` of the two; 95 % intervals `share_low`,
    `share_high`, `ratio_low` and `ratio_high`, over genes; `n_genes` and `n_sets`.

    The intervals take genes for independent, which members of one set are not: they are too narrow. Compare vectors
    on the same genes (`n_genes`) only.

    Raises
    ------
    ValueError
        Shapes that do not fit, NaN, no more genes with a set than neighbours, or no two genes in a common set.
    """
    from ..evaluate.metrics import bootstrap

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

    def divide(hits, chance, axis):
        return hits.sum(axis=axis) / chance.sum(axis=axis)

    share = bootstrap(lambda hits, axis: hits.mean(axis=axis), hits.mean(1), seed=seed)
    ratio = bootstrap(divide, hits.mean(1), chance.mean(1), seed=seed)
    return pd.Series(
        {
            "share": share["value"], "share_low": share["low"], "share_high": share["high"], "chance": chance.mean(),
            "ratio": ratio["value"], "ratio_low": ratio["low"], "ratio_high": ratio["high"],
            "n_genes": len(chosen), "n_sets": members.shape[1],
        }
    )  # fmt: skip


def _find_members(genes, sets, minimum, maximum):
    """Return which gene is in which set, (genes, sets), of sets with a fitting number of members among the genes."""
    index, rows, n_sets = pd.Index(genes), [], 0
    check_unique(index, "Gene names")
    for names in sets.values():
        found = index.get_indexer(pd.unique(np.asarray(names, object)))
        found = found[found >= 0]
        if minimum <= len(found) <= maximum:
            rows.append(np.stack([found, np.full(len(found), n_sets)]))
            n_sets += 1
    row, column = np.concatenate([np.zeros((2, 0), np.int64), *rows], axis=1)
    return sparse.csr_matrix((np.ones(len(row), np.int32), (row, column)), shape=(len(index), n_sets))
