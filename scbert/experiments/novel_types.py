"""Notebook 07: novelty scores of kept jobs, and what goes on record."""

from collections.abc import Mapping

import anndata
import pandas as pd

from ..evaluate.calibration import GROUP, fit_temperature
from ..evaluate.novelty import _take_held_out, measure_novelty, score_cells
from .benchmark import split_labels


def score_jobs(kept: Mapping[tuple, tuple]) -> pd.DataFrame:
    """Score the cells of all trainings: what the other functions of this module read.

    Parameters
    ----------
    kept
        (data, protocol, repeat, method) -> `scbert.benchmark.Kept`, protocols as in `scbert.protocols.hold_out_types`. The
        temperature of each is fitted on its cells set aside or, where it has none, on test cells of known types.

    Returns
    -------
    A row a training and cell: data, purpose ("held_out" or "tuning"), level ("together" or a type), repeat, method, cell,
    part, truth, predicted, seen, fitted (the temperature), and `SCORES`.
    """
    tables = []
    for (data, protocol, repeat, method), one in kept.items():
        purpose, _, level = protocol.partition(":")
        known = one.cells["seen"].to_numpy(bool)
        chosen = known & (one.cells["part"] == "aside").to_numpy()
        chosen = chosen if chosen.any() else known
        fitted = fit_temperature(one.logits[chosen], one.cells.loc[chosen, "truth"])
        own = {"data": data, "purpose": purpose, "level": level, "repeat": repeat, "method": method, "fitted": fitted}
        scores = score_cells(one.logits, one.distance, fitted).reset_index(drop=True)
        tables.append(one.cells.rename_axis("cell").reset_index().assign(**own).join(scores))
    return pd.concat(tables, ignore_index=True).astype({"seen": bool})


def measure_all(cells: pd.DataFrame, thresholds: pd.DataFrame, *, seed: int = 0) -> pd.DataFrame:
    """Apply `measure_novelty` to each data set, level and method of `score_jobs` and `choose_thresholds`."""
    own = dict(iter(thresholds.groupby(GROUP)))
    test = _take_held_out(cells)
    return pd.concat(
        {key: measure_novelty(part, own[key], seed=seed) for key, part in test.groupby(GROUP, sort=False)}, names=GROUP
    )


def trim(measured: pd.DataFrame) -> pd.DataFrame:
    """Leave out of `measure_all`, of types held out alone, the majority class and the threshold that nobody could know."""
    level, method, rule = (measured.index.get_level_values(name) for name in ("level", "method", "rule"))
    return measured[(level == "together") | ((method != "majority") & (rule != "best"))]


def note_novelty(run, measured: pd.DataFrame, calibrated: pd.DataFrame) -> None:
    """Put what `measure_all` and `calibrate_jobs` found on record, to four decimals, after `trim`.

    As ``<data>:held_out:<level>/<method>:<score>/<metric>`` at the tuned threshold, without a score at the paper's: its
    0.5 of the largest probability. A "/" in a type is "|". Of types alone, a few metrics are left to the tables.
    """
    every = {"auroc", "aupr", "jaccard", "recall", "known_accuracy", "known_accuracy_all", "coverage"}
    every |= {"calibration_error", "calibration_error_scaled"}
    of_level = "{}:held_out:{}".format
    for (data, level, method, score, rule, metric), row in trim(measured).round(4).iterrows():
        of_paper = rule == "paper" and score == "max_probability"
        if (metric in every or level == "together") and (rule in ("", "tuned") or of_paper):
            name = f"{method}:{score}" if score and not of_paper else method
            run.note_metric(f"{of_level(data, level.replace('/', '|'))}/{name}/{metric}", *row)
    for (data, level, method, metric), row in calibrated[["value", "low", "high", "n"]].dropna().round(4).iterrows():
        if level == "together" or (metric in every and method != "majority"):
            run.note_metric(f"{of_level(data, level.replace('/', '|'))}/{method}/{metric}", *row)


def read_held_out(
    text: str, alone: str, adata: anndata.AnnData, *, label_key: str = "cell_type", minimum: int = 20
) -> tuple[list[str], list[str]]:
    """Return the types that a notebook's parameters hold out: all at once, and one at a time.

    Parameters
    ----------
    text
        Labels with commas between them; or "auto": of an experiment with an arrow the types that the training set
        lacks, else every third label by size, from the second on, of those with `minimum` cells.
    alone
        "held_out": the same types; "last": the last of them; "all": all types with `minimum` cells; labels with commas between them; empty, or with
        an arrow: none.
    adata
        The cells.

    Raises
    ------
    ValueError
        Another word, or "auto" finds no type.
    """
    labels = adata.obs[label_key].astype(str)
    first = adata.uns.get("scbert", {}).get("train_on")
    sizes = labels.value_counts().sort_index().sort_values(ascending=False, kind="stable")
    common = list(sizes.index[sizes >= minimum])
    if not text.strip():
        raise ValueError("held_out is empty: name types with commas between them, or auto.")
    if text.strip() != "auto":
        together = split_labels(text.strip(), labels)
    elif first is not None:
        together = sorted(set(labels) - set(labels[(adata.obs["study"] == first).to_numpy()]))
    else:
        together = common[1::3]
    if not together:
        why = "the training set has all types" if first is not None else f"fewer than two have {minimum} cells"
        raise ValueError(
            f"held_out = auto finds no type to hold out, since {why}: name types with commas between them."
        )
    choices = {"": [], "last": together[-1:], "held_out": together, "all": common}
    single = choices[alone] if alone in choices else split_labels(alone.strip(), labels)
    if not set(single) <= set(labels):
        raise ValueError(f"alone must be last, held_out, all, empty, or types with commas between them, not {alone!r}.")
    return together, [] if first is not None else single
