"""Notebook 06: shifts that are simulated, what equal depth brings, and what embeddings keep of types and of studies."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import anndata
import numpy as np
import pandas as pd

from ..annotate import embed
from ..data.preprocess import tokenize
from ..evaluate import metrics
from ..evaluate.embeddings import RESOLUTIONS, correct_by_harmony, embed_pca, measure_mixing, sweep_clusters
from ..evaluate.runner import read_kept
from ..model.encoder import ScBert
from ..sources.genes import choose_genes
from .benchmark import name_level

if TYPE_CHECKING:
    from ..run.record import Run


def take_strongest(worlds: Mapping[tuple[str, int], anndata.AnnData]) -> dict[str, anndata.AnnData]:
    """Return, of `scbert.simulate.simulate_doses`, the first simulation of each effect at its strongest, and of none.

    By level, such as "none:0", if simulated, "depth:3" and "depth:3:equalised" where 3 is the largest severity.
    """
    severity = {level: float(level.split(":")[1]) for level, _ in worlds}
    largest = max(severity.values())
    return {
        level: cells
        for (level, repeat), cells in worlds.items()
        if repeat == 0 and (level == "none:0" or severity[level] == largest)
    }


def mark_within(predictions: pd.DataFrame) -> pd.DataFrame:
    """Return the predictions with the column level: the protocol, and ``<protocol>:within`` for cells set aside.

    Cells set aside are of the study that trains: the others are to be compared with them.
    """
    within = (predictions["protocol"] + ":within").str.lstrip(":")
    return predictions.assign(level=predictions["protocol"].where(predictions["part"] == "test", within))


def compare_equalised(predictions: pd.DataFrame, *, seed: int = 0) -> pd.DataFrame:
    """Compare each method with itself: accuracy with studies at equal depth, minus as they were, on the same cells.

    `predictions` are of test cells. Protocols "<level>:equalised" are compared with "<level>", others are left out. By
    data, level, method and the metric "accuracy_minus_unequal": value, low, high, n; empty where nothing was equalised.
    """
    rows = {}
    for (data, level), after in predictions.groupby(["data", "protocol"], sort=False):
        if not level.endswith(":equalised"):
            continue
        is_before = (predictions["data"] == data) & (predictions["protocol"] == level.removesuffix(":equalised"))
        after = after.assign(method=after["method"] + " at equal depth")
        both = pd.concat([predictions[is_before], after]).assign(protocol=level)
        for method in predictions.loc[is_before, "method"].unique():
            found = metrics.compare(both, f"{method} at equal depth", method, seed=seed)
            rows[data, level, method, "accuracy_minus_unequal"] = found
    index = pd.MultiIndex.from_tuples(rows, names=["data", "level", "method", "metric"])
    return pd.DataFrame(list(rows.values()), index=index, columns=["value", "low", "high", "n"])


def pair_equalised(scores: pd.DataFrame) -> pd.DataFrame:
    """Return the scores of levels that were also simulated at equal depth, and of these, each named for a figure.

    `scores` have a column level, such as "depth:3" and "depth:3:equalised"; a column study is the level without colons.
    """
    equalised = scores.loc[scores["level"].str.endswith(":equalised"), "level"]
    pairs = scores[scores["level"].str.removesuffix(":equalised").isin(equalised.str.removesuffix(":equalised"))]
    return pairs.assign(study=pairs["level"].str.replace(":", " "))


def gather_embeddings(job, kept, control, *, encoder: ScBert | None = None, seed: int = 0) -> anndata.AnnData:
    """Return the cells that a trained scBERT predicted, with its embedding of them and others beside it in ``obsm``.

    `job` is one of scBERT, see `scbert.runner.plan`, and `kept` what `scbert.runner.read_kept` returns of it; `control` is
    what logistic regression kept on the same split, a ValueError if that is of other cells. The `encoder` is scBERT as it
    was before fine-tuning; anything but an encoder if each split pretrained its own.

    Returns
    -------
    Tested cells and those set aside, on the genes that the methods read, with ``obsm``: "pca" and "harmony", of these
    cells and without labels; "scbert_encoder", if there is one, also without; and what has learnt from labels of
    training cells: "scbert", pooled as in `scbert.embed`, "scbert_logits", and "logistic_regression", its logits.
    """
    names = kept.cells.index
    if not names.equals(control.cells.index):
        raise ValueError("scBERT and the control were kept on different cells: take both of one split.")
    genes, split = job.genes, job.split
    if isinstance(genes, str):
        genes = choose_genes(job.adata[np.concatenate([split.train, split.validation])], genes)
    cells = tokenize(job.adata[names].copy(), genes=list(genes), n_bins=job.n_bins)
    cells.obsm["pca"] = embed_pca(cells, seed=seed)
    cells.obsm["harmony"] = correct_by_harmony(cells.obsm["pca"], cells.obs["study"], seed=seed)
    if isinstance(encoder, ScBert):
        cells.obsm["scbert_encoder"] = embed(encoder, cells)
    cells.obsm["scbert"] = kept.embedding
    cells.obsm["scbert_logits"] = kept.logits.to_numpy(np.float32)
    cells.obsm["logistic_regression"] = control.logits.to_numpy(np.float32)
    return cells


def measure_jobs(jobs: Sequence, run, encoders: Mapping, *, seed: int = 0) -> tuple[pd.DataFrame, dict]:
    """Measure what the embeddings of kept jobs keep of types and studies, averaged over the splits of each data set.

    Of the `jobs` of `run` those planned with ``keep`` are measured: scBERT and, of the same splits, logistic
    regression. `encoders` is data -> scBERT before fine-tuning, see `gather_embeddings`. Returns rows of `average_mixing`
    by data, embedding and metric; and data -> the cells of its first split, with all embeddings.
    """
    kept = {(job.data, *job.split[:3], job.method): job for job in jobs if job.keep}
    tables, first = {}, {}
    for (*split, method), job in kept.items():
        if method != "scbert":
            continue
        outputs = [read_kept(kept[*split, name], run) for name in ("scbert", "logistic_regression")]
        cells = gather_embeddings(job, *outputs, encoder=encoders[job.data], seed=seed)
        first.setdefault(job.data, cells)
        for name, place in cells.obsm.items():
            table = measure_mixing(place, cells.obs[job.label_key], cells.obs["study"], seed=seed)
            tables.setdefault((job.data, name), []).append(table)
    averages = {key: average_mixing(own) for key, own in tables.items()}
    return pd.concat(averages, names=["data", "embedding", "metric"]), first


def note_embeddings(run: "Run", measured: pd.DataFrame, level: str = "") -> None:
    """Put what `measure_jobs` found on record, as ``<data>:<level>:embedding/<embedding>/<metric>``."""
    for data, own in measured.groupby(level="data", sort=False):
        run.note_scores(f"{name_level(data, level)}:embedding", own.droplevel("data"))


def sweep_embeddings(
    embeddings: Mapping[str, np.ndarray],
    labels: Sequence[str],
    resolutions: Sequence[float | str] = RESOLUTIONS,
    *,
    seed: int = 0,
) -> pd.DataFrame:
    """Apply `scbert.embeddings.sweep_clusters` to embeddings of the same cells; the column `embedding` says which."""
    steps = [float(resolution) for resolution in resolutions]
    tables = {name: sweep_clusters(embedding, labels, steps, seed=seed) for name, embedding in embeddings.items()}
    return pd.concat(tables, names=["embedding"]).reset_index("embedding").reset_index(drop=True)


def average_mixing(tables: Sequence[pd.DataFrame]) -> pd.DataFrame:
    """Average the metrics of one embedding over splits: columns value, low, high, n (cells, in all) and splits.

    The two arms of the interval are those of the splits, added in squares and divided by their number, as for independent
    cells. A metric that a split lacks is averaged over the others. A ValueError without any table.
    """
    if not len(tables):
        raise ValueError("There is no table to average: give one a split.")
    rows = pd.concat(tables)
    rows = rows.assign(below=(rows["value"] - rows["low"]) ** 2, above=(rows["high"] - rows["value"]) ** 2)
    by_metric = rows.groupby(level=0, sort=False)
    splits, value = by_metric.size(), by_metric["value"].mean()
    low = value - np.sqrt(by_metric["below"].sum()) / splits
    high = value + np.sqrt(by_metric["above"].sum()) / splits
    return pd.DataFrame({"value": value, "low": low, "high": high, "n": by_metric["n"].sum(), "splits": splits})
