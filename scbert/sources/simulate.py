"""Several studies out of one: the same real cells, as if laboratories that differ had sequenced a part each; and a remedy."""

from collections.abc import Sequence

import anndata
import numpy as np
import pandas as pd
from scipy import sparse

from ..data.checks import check_column, check_counts
from ..data.counts import is_whole
from ..data.preprocess import library_size

EFFECTS = ("depth", "capture", "ambient", "labels")
KEPT_BY_SHALLOWEST = 1 / 3  # share of the counts that the shallowest study keeps, at severity 1
CAPTURE_SPREAD = 0.5  # standard deviation of a gene's log capture between studies, at severity 1
AMBIENT_SHARES = (0.02, 0.15)  # of a cell's counts, in the cleanest and the dirtiest study, at severity 1
LABEL_SPREAD = 0.7  # standard deviation of a label's log odds between studies, at severity 1
CELLS_A_LABEL = 5  # what each study keeps of each label, if there are that many: five-fold splits need them


def simulate_studies(
    adata: anndata.AnnData,
    *,
    n_studies: int = 3,
    severity: float = 1.0,
    effects: Sequence[str] = EFFECTS,
    label_key: str = "cell_type",
    seed: int = 0,
) -> anndata.AnnData:
    """Deal real cells to several studies, and give each study its own depth, capture, ambient RNA and label shares.

    The cells, with whole counts, are dealt first, each to exactly one study and label by label; only then are counts
    changed, so no cell is in two studies. What is left of a cell's counts is real; how the studies differ is known. The
    seed fixes everything: an effect's factors are the same alone and beside others, and the same way at any severity.

    Parameters
    ----------
    severity
        0: the partition alone. Every effect grows with it, and beyond 5 hardly a count is left. At 1, depth spans a factor of
        3, and a gene's log ratio between two studies spreads by 0.7 (in "pbmc_3tech" 2.4, and 0.4 to 0.75).
    effects
        Any of
        "depth": each count stays with the study's probability; the shares kept are spaced evenly in logarithm from
        1 to ``(1/3) ** severity``, in random order;
        "capture": it stays with a probability of its gene and study. The study best at a gene keeps all, and the
        logarithms of the others lag behind as normal draws with a standard deviation of 0.5 x severity do;
        "ambient": a share of a cell's counts, 2 to 15 % x severity by study and at most 90 %, gives way to as many
        draws from the study's pooled profile;
        "labels": the odds of a label's cells to land in a study are log-normal with 0.7 x severity.

    Returns
    -------
    A new AnnData with the cells in their order and ``obs["study"]`` (study_0, study_1, ...). Each study has at least
    five cells of each label; of a label too rare for that, as many as go into all studies alike. A cell that thinning
    would empty keeps one of its counts, drawn at random. ``obs["n_counts"]``, if there, is thinned along: what it
    counts beyond ``X`` by the study's depth and mean capture. The factors drawn are in
    ``uns["scbert"]["simulate_studies"]``, those of capture in ``varm["capture"]``, (genes, studies). Layers, ``.raw``
    and embeddings belong to the old counts and are left out.

    A ValueError if counts are not whole, the label column is missing or incomplete, or there are fewer cells than studies.
    """
    effects = [effects] if isinstance(effects, str) else list(effects)
    unknown = [effect for effect in effects if effect not in EFFECTS]
    if unknown:
        raise ValueError(f"There is no effect {unknown[0]!r}: choose among {', '.join(EFFECTS)}.")
    if n_studies not in range(2, adata.n_obs + 1):
        raise ValueError(f"n_studies must be from 2 to the number of cells, {adata.n_obs}, not {n_studies}.")
    if not 0 <= severity < np.inf:
        raise ValueError(f"severity must be 0 or a positive number, not {severity}.")
    adata, before = _read_counts(adata, label_key, seed)
    if not is_whole(before):
        raise ValueError("X of adata holds estimated, fractional counts: only whole counts can be thinned.")
    totals = library_size(adata)  # before anything: it checks n_counts
    strength = {effect: severity if effect in effects else 0.0 for effect in EFFECTS}
    random = {name: np.random.default_rng([seed, i]) for i, name in enumerate(("deal", *EFFECTS, "thin", "rest"))}

    labels = adata.obs[label_key].astype(str).to_numpy()
    names, label = np.unique(labels, return_inverse=True)
    tilt = np.exp(strength["labels"] * LABEL_SPREAD * random["labels"].standard_normal((len(names), n_studies)))
    study = _deal(label, tilt / tilt.sum(1, keepdims=True), random["deal"])  # (cells,)

    spacing = np.arange(n_studies) / (n_studies - 1)
    depth = KEPT_BY_SHALLOWEST ** (strength["depth"] * random["depth"].permutation(spacing))  # (studies,)
    lag = random["capture"].standard_normal((n_studies, adata.n_vars))
    lag -= lag.max(0)
    capture = np.exp(strength["capture"] * CAPTURE_SPREAD * lag)  # (studies, genes), each gene at most 1
    low, high = AMBIENT_SHARES
    ambient = np.minimum(strength["ambient"] * (low + (high - low) * random["ambient"].permutation(spacing)), 0.9)

    counts = _thin(before, study, depth[:, None] * capture, random["thin"])
    pooled = np.array([np.asarray(before[study == s].sum(0), np.float64).ravel() for s in range(n_studies)])
    mean_capture = (pooled * capture).sum(1) / pooled.sum(1)  # over the counts of the study
    counts = _mix(counts, study, ambient, random["ambient"])

    obs = adata.obs.copy()
    obs["study"] = pd.Categorical.from_codes(study, [f"study_{s}" for s in range(n_studies)])
    if "n_counts" in obs:
        rest = totals - np.asarray(before.sum(1), np.float64).ravel()
        kept = (depth * mean_capture)[study]
        thinned = random["rest"].binomial(np.rint(rest.clip(0)).astype(np.int64), kept.clip(max=1))
        obs["n_counts"] = np.asarray(counts.sum(1), np.float64).ravel() + np.where(kept < 1, thinned, rest)
    shares = pd.crosstab(pd.Series(study), pd.Series(label)).reindex(index=range(n_studies)).to_numpy()
    result = anndata.AnnData(counts, obs=obs, var=adata.var.copy())
    result.varm["capture"] = capture.T
    drawn = {"n_studies": n_studies, "severity": float(severity), "effects": effects, "seed": seed}
    drawn |= {"studies": list(obs["study"].cat.categories), "depth": depth, "mean_capture": mean_capture}
    drawn |= {"ambient": ambient, "labels": list(names), "cells": shares}  # (studies, labels)
    noted = {name: note for name, note in adata.uns.get("scbert", {}).items() if name != "tokenize"}
    result.uns["scbert"] = noted | {"simulate_studies": drawn}
    return result


def simulate_doses(
    adata: anndata.AnnData,
    effects: Sequence[str],
    severities: Sequence[float],
    *,
    n_repeats: int = 1,
    label_key: str = "cell_type",
    seed: int = 0,
) -> dict[tuple[str, int], anndata.AnnData]:
    """Simulate two studies at each severity of each effect, and once more at equal depth.

    Parameters
    ----------
    effects
        Any of `EFFECTS`, and "all" for all of them at once.
    severities
        Whole numbers or fractions; 0 is simulated once for all effects: two halves that differ by chance.
    n_repeats
        Repeats 2 i and 2 i + 1 are the same simulation, seeded ``seed + i``: one for each direction between two studies.

    Returns
    -------
    (level, repeat) -> cells, see `simulate_studies`. Levels are "none:0", "<effect>:<severity>", and for "depth" and "all"
    at the largest severity "<effect>:<severity>:equalised", see `equalize_depth`. No effect or severity, or one named
    twice, is a ValueError.
    """
    effects, doses = list(effects), sorted(float(severity) for severity in severities)
    for what, values in (("effects", effects), ("severities", doses)):
        if not values or len(set(values)) < len(values):
            raise ValueError(f"{what} must be one or more, each once, not {values}.")
    levels = [("none", dose) for dose in doses if not dose]
    levels += [(effect, dose) for effect in effects for dose in doses if dose]
    worlds = {}
    for repeat in range(n_repeats):
        for effect, dose in levels:
            touched, own = {"all": EFFECTS, "none": ()}.get(effect, (effect,)), seed + repeat // 2
            cells = simulate_studies(adata, n_studies=2, severity=dose, effects=touched, label_key=label_key, seed=own)
            worlds[f"{effect}:{dose:g}", repeat] = cells
            if effect in ("depth", "all") and dose == doses[-1]:
                worlds[f"{effect}:{dose:g}:equalised", repeat] = equalize_depth(cells, seed=own)
    return worlds


def equalize_depth(adata: anndata.AnnData, *, batch_key: str = "study", seed: int = 0) -> anndata.AnnData:
    """Thin the counts of each cell so that all studies have the median library size of the shallowest one.

    A remedy that costs counts: what a deep study measured beyond the shallowest is thrown away. Each count stays with the
    same probability, the shallowest study's median library size over that of the cell's own study (both of all measured
    genes, `scbert.preprocess.library_size`), so a cell stays deeper or shallower than others of its study.

    Estimated, fractional counts, which ``uns["scbert"]["fractional_counts"]`` admits, are rounded first, which is
    printed. No counts, a missing or incomplete column of studies, or a seed that is none, are a ValueError.

    Returns
    -------
    A new AnnData with the same cells; the cells of the shallowest study as they were. A cell that thinning or rounding
    would empty keeps one count. ``obs["n_counts"]``, if there, is thinned along: what it counts beyond ``X`` is drawn too,
    rounded. The probabilities are in ``uns["scbert"]["equalize_depth"]``, study -> share kept. Layers, ``.raw`` and
    embeddings belong to the old counts and are left out.

    Differs from the published code: that has no such step; dividing by the library size leaves tokens that depend on it.
    """
    adata, before = _read_counts(adata, batch_key, seed)
    totals = library_size(adata)
    rest = totals - np.asarray(before.sum(1), np.float64).ravel()  # what n_counts has beyond X
    if not is_whole(before):
        before = _round(before)
        totals = rest + np.asarray(before.sum(1), np.float64).ravel()
        print(f"Fractional counts are rounded, to {before.sum():,.0f} in all, before they are thinned.")

    names, study = np.unique(adata.obs[batch_key].astype(str), return_inverse=True)
    medians = np.array([np.median(totals[study == s]) for s in range(len(names))])
    kept = medians.min() / medians  # (studies,)
    random = {name: np.random.default_rng([seed, i]) for i, name in enumerate(("thin", "rest"))}
    counts = _thin(before, study, np.repeat(kept[:, None], adata.n_vars, axis=1), random["thin"])
    result = anndata.AnnData(counts, obs=adata.obs.copy(), var=adata.var.copy())
    if "n_counts" in result.obs:
        drawn = random["rest"].binomial(np.rint(rest.clip(0)).astype(np.int64), kept[study])
        beyond = np.where(kept[study] < 1, drawn, rest.clip(0))
        result.obs["n_counts"] = np.asarray(counts.sum(1), np.float64).ravel() + beyond
    gone = ("tokenize", "fractional_counts")
    noted = {name: note for name, note in adata.uns.get("scbert", {}).items() if name not in gone}
    result.uns["scbert"] = noted | {"equalize_depth": dict(zip(names.tolist(), kept.tolist(), strict=True))}
    return result


def _read_counts(adata, key, seed):
    """Return the cells, in memory, and a copy of their counts, once counts, a column of ``obs`` and the seed are in order."""
    if not isinstance(seed, (int, np.integer)) or seed < 0:
        raise ValueError(f"seed must be a whole number, 0 or more, not {seed}.")
    if adata.isbacked:
        adata = adata.to_memory()
    check_counts(adata, "adata")
    check_column(adata, key, "adata", constant_is_fine=True)
    counts = sparse.csr_matrix(adata.X, copy=True)
    counts.sum_duplicates()
    return adata, counts


def _round(counts):
    """Round counts to whole numbers; a cell that would be empty keeps one, of the gene that had most."""
    rounded = counts.copy()
    rounded.data = np.rint(rounded.data)
    for cell in np.flatnonzero(np.asarray(rounded.sum(1)).ravel() == 0):
        span = slice(counts.indptr[cell], counts.indptr[cell + 1])
        rounded.data[span.start + counts.data[span].argmax()] = 1
    rounded.eliminate_zeros()
    return rounded


def simulate_old_names(genes: Sequence[str], *, seed: int = 0) -> tuple[np.ndarray, pd.DataFrame]:
    """Give a third of some genes other names, as between studies of different years, and make a table that knows most.

    Of the genes, 18 % go by a name that the table traces back, 5 % by one that it has for two genes, 10 % by one that
    it lacks. Returned are the names, one a gene, and a table as of `scbert.genes.read_gene_table`.
    """
    genes, fates = np.asarray(genes, dtype=object), ["same", "traced", "shared", "lost"]
    fates = np.random.default_rng(seed).choice(fates, len(genes), p=[0.67, 0.18, 0.05, 0.1])
    names = np.where(fates == "same", genes, [f"old-{i}" for i in range(len(genes))])
    rows = [(gene, i, "symbol") for i, gene in enumerate(genes)]
    rows += [(names[i], i, "synonym") for i in np.flatnonzero((fates == "traced") | (fates == "shared"))]
    rows += [(names[i], -1, "synonym") for i in np.flatnonzero(fates == "shared")]
    return names, pd.DataFrame(rows, columns=["name", "gene_id", "how"])


def _deal(label, odds, random):
    """Return a study for each cell: of each label, shuffled, each study gets its minimum, the rest goes by odds."""
    n_studies = odds.shape[1]
    study, sizes = np.empty(len(label), dtype=np.int64), np.zeros(n_studies, dtype=np.int64)
    for which, share in enumerate(odds):
        cells = random.permutation(np.flatnonzero(label == which))
        minimum = min(CELLS_A_LABEL, len(cells) // n_studies)
        due = (len(cells) - minimum * n_studies) * share
        part = np.floor(due + 1e-9).astype(np.int64)
        # Those left over by rounding go to the largest fractions, among equals to the smallest studies.
        left = len(cells) - minimum * n_studies - part.sum()
        part[np.lexsort((sizes + part, -np.round(due - part, 9)))[:left]] += 1
        part += minimum
        study[cells] = np.repeat(np.arange(n_studies), part)
        sizes += part
    return study


def _thin(counts, study, kept, random):
    """Keep each count with probability ``kept[study, gene]``; a cell that would be empty keeps one, at random."""
    row = np.repeat(np.arange(counts.shape[0]), np.diff(counts.indptr))
    thinned = counts.copy()
    thinned.data = random.binomial(counts.data.astype(np.int64), kept[study[row], counts.indices]).astype(counts.dtype)
    for cell in np.flatnonzero(np.asarray(thinned.sum(1)).ravel() == 0):
        span = slice(counts.indptr[cell], counts.indptr[cell + 1])
        shares = counts.data[span].astype(np.float64)
        thinned.data[random.choice(np.arange(span.start, span.stop), p=shares / shares.sum())] = 1
    thinned.eliminate_zeros()
    return thinned


def _mix(counts, study, shares, random):
    """Replace a share of each cell's counts by draws from its study's pooled counts; totals stay."""
    row = np.repeat(np.arange(counts.shape[0]), np.diff(counts.indptr))
    gone = random.binomial(counts.data.astype(np.int64), shares[study[row]])
    drawn = np.bincount(row, gone, len(study)).astype(np.int64)  # (cells,)
    mixed = counts.copy()
    mixed.data -= gone.astype(counts.dtype)
    for s in np.unique(study):
        cells = np.flatnonzero(study == s)
        edges = np.cumsum(np.asarray(counts[cells].sum(0), np.float64).ravel())
        genes = np.searchsorted(edges, random.random(drawn[cells].sum()) * edges[-1], side="right")
        rows = np.repeat(cells, drawn[cells])
        mixed += sparse.csr_matrix((np.ones(len(rows), counts.dtype), (rows, genes)), shape=counts.shape)
    mixed.eliminate_zeros()
    mixed.sort_indices()
    return mixed
