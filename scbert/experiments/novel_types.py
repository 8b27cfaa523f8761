"""Notebook 07: which types are held out, novelty scores of kept jobs, the tables shown of them, and what goes on record."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import anndata
import pandas as pd

from ..evaluate.calibration import GROUP, fit_temperature
from ..evaluate.kept import Kept
from ..evaluate.metrics import write_out
from ..evaluate.novelty import measure_novelty, score_cells, sweep_thresholds, take_held_out
from ..evaluate.protocols import PARTS, Split
from ..evaluate.runner import Job, read_kept
from .benchmark import split_labels

if TYPE_CHECKING:
    from ..run.record import Run


def count_parts(splits: Mapping[str, Sequence[Split]]) -> pd.DataFrame:
    """Return how many cells train, choose, are tested and are set aside, by data and training, of the first repeat."""
    sizes = {
        (data, split.protocol): [len(getattr(split, part)) for part in PARTS]
        for data, own in splits.items()
        for split in own
        if split.repeat == 0
    }
    index = pd.MultiIndex.from_tuples(sizes, names=["data", "training"])
    return pd.DataFrame(list(sizes.values()), index=index, columns=list(PARTS))


def gather_kept(jobs: Sequence[Job], run: "Run", predictions: pd.DataFrame) -> dict[tuple, Kept]:
    """Return what done jobs kept of their cells: (data, protocol, repeat, method) -> `scbert.runner.read_kept`.

    Only of the splits among the `predictions`, from which `scbert.benchmark.leave_out_dead` may have taken some.
    """
    shown = set(predictions[["data", "protocol", "repeat"]].itertuples(index=False, name=None))
    keys = {(job.data, job.split.protocol, job.split.repeat, job.method): job for job in jobs}
    return {key: read_kept(job, run) for key, job in keys.items() if key[:3] in shown}


def score_jobs(kept: Mapping[tuple, Kept]) -> pd.DataFrame:
    """Score how new the cells of all trainings look: what `scbert.novelty` and the other functions of this module read.

    `kept` is from `gather_kept`, protocols as in `scbert.protocols.hold_out_types`. The temperature of each training is
    fitted on its cells set aside or, where it has none, on test cells of known types.

    A row a training and cell: data, purpose ("held_out" or "tuning"), level ("together" or a type), repeat, method,
    cell, part, truth, predicted, seen, fitted (the temperature), and `scbert.novelty.SCORES`.
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
    """Apply `scbert.novelty.measure_novelty` to each data set, level and method.

    `cells` are from `score_jobs`, `thresholds` from `scbert.novelty.choose_thresholds`.
    """
    own, tested = dict(iter(thresholds.groupby(GROUP))), take_held_out(cells).groupby(GROUP, sort=False)
    return pd.concat({key: measure_novelty(part, own[key], seed=seed) for key, part in tested}, names=GROUP)


def trim(measured: pd.DataFrame) -> pd.DataFrame:
    """Leave out of `measure_all`, of types held out alone, the majority class and the threshold that nobody could know."""
    level, method, rule = (measured.index.get_level_values(name) for name in ("level", "method", "rule"))
    return measured[(level == "together") | ((method != "majority") & (rule != "best"))]


def note_novelty(run: "Run", measured: pd.DataFrame, calibrated: pd.DataFrame) -> None:
    """Put what `measure_all` and `scbert.calibration.calibrate_jobs` found on record, to four decimals, after `trim`.

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


def tabulate_confidence(tested: pd.DataFrame) -> pd.DataFrame:
    """Return quartiles of the largest probability of the cells, by method, true type and whether it was seen.

    `tested` are test cells of `score_jobs`, of one data set and level.
    """
    novelty = tested.groupby(["method", "truth", "seen"])["max_probability"].describe()
    return (1 - novelty[["75%", "50%", "25%"]]).set_axis(["25%", "50%", "75%"], axis=1)


def sweep_methods(tested: pd.DataFrame) -> pd.DataFrame:
    """Apply `scbert.novelty.sweep_thresholds` to each method of test cells of one data set and level."""
    sweeps = {method: sweep_thresholds(part) for method, part in tested.groupby("method")}
    return pd.concat(sweeps, names=["method"])


def take_tuned(thresholds: pd.DataFrame, data: str) -> pd.Series:
    """Return method -> the probability below which a cell is unassigned, tuned for all types held out together.

    The mean over repeats of a data set's thresholds, from `scbert.novelty.choose_thresholds`.
    """
    own = thresholds.query("data == @data and level == 'together' and score == 'max_probability' and rule == 'tuned'")
    return 1 - own.groupby("method")["threshold"].mean()


def tabulate_tuning(together: pd.DataFrame) -> pd.DataFrame:
    """Return balanced accuracy at each rule's threshold, and what tuning costs, with its interval as text.

    `together` is from `measure_all`, of one level. Without any tuned threshold the cost is left out, which is printed.
    """
    balanced = together.xs("balanced_accuracy", level="metric")["value"].unstack("rule")
    if "tuned" not in balanced:
        print("No threshold was tuned, since that needs three known types beside those held out: its cost is left out.")
        return balanced
    cost = together.xs("cost_of_tuning", level="metric").droplevel("rule")
    return balanced.assign(cost=write_out(cost, 2))


def tabulate_calibration(of_level: pd.DataFrame) -> pd.DataFrame:
    """Return calibration errors before and after scaling as text, what chance alone would give, and the temperature.

    `of_level` is from `scbert.calibration.calibrate_jobs`, of one level.
    """
    errors = of_level.query("metric in ('calibration_error', 'calibration_error_scaled')")
    by_chance = errors["by_chance"].unstack("metric")["calibration_error"].round(3)
    temperature = of_level.xs("temperature", level="metric")["value"].round(2)
    return write_out(errors).unstack("metric").assign(**{"by chance": by_chance, "temperature": temperature})


def tabulate_sets(of_level: pd.DataFrame) -> pd.DataFrame:
    """Return what prediction sets hold, as text, and where 95 % of draws of their coverage would fall.

    `of_level` is from `scbert.calibration.calibrate_jobs`, of one level.
    """
    coverage = of_level.xs("coverage", level="metric")
    limits = zip(coverage["expected_low"], coverage["expected_high"], strict=True)
    expected = pd.Series([f"{low:.2f} to {high:.2f}" for low, high in limits], coverage.index)
    text = write_out(of_level.drop("temperature", level="metric"), 2).unstack("metric").assign(expected=expected)
    return text[["coverage", "expected", "set_size", "one_label", "empty", "novel_empty", "novel_one_label"]]


def read_held_out(
    text: str,
    alone: str,
    adata: anndata.AnnData,
    *,
    train_on: str | None = None,
    label_key: str = "cell_type",
    minimum: int = 20,
) -> tuple[list[str], list[str]]:
    """Return the types that a notebook's parameters hold out: all at once, and one at a time.

    Parameters
    ----------
    text
        Labels with commas between them, see `scbert.benchmark.split_labels`; or "auto": with `train_on`, the study that
        trains while others are tested, the types that it lacks, else every third label by size, from the second on, of
        those with `minimum` cells. A ValueError if there are none.
    alone
        "held_out": the same types; "last": the last of them; "all": all types with `minimum` cells; labels with commas
        between them; empty, or with `train_on`: none. A ValueError for another word.
    """
    labels = adata.obs[label_key].astype(str)
    sizes = labels.value_counts().sort_index().sort_values(ascending=False, kind="stable")
    common = list(sizes.index[sizes >= minimum])
    if not text.strip():
        raise ValueError("held_out is empty: name types with commas between them, or auto.")
    if text.strip() != "auto":
        together = split_labels(text.strip(), labels)
    elif train_on is not None:
        together = sorted(set(labels) - set(labels[(adata.obs["study"] == train_on).to_numpy()]))
    else:
        together = common[1::3]
    if not together:
        why = "the training set has all types" if train_on is not None else f"fewer than two have {minimum} cells"
        raise ValueError(f"held_out = auto finds no type to hold out, since {why}: name types with commas between.")
    choices = {"": [], "last": together[-1:], "held_out": together, "all": common}
    single = choices[alone] if alone in choices else split_labels(alone.strip(), labels)
    if not set(single) <= set(labels):
        raise ValueError(f"alone must be last, held_out, all, empty, or types with commas between them, not {alone!r}.")
    return together, [] if train_on is not None else single
