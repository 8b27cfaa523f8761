"""Notebook 05, and the experiments that 06 and 07 share with it: which cells, which study trains, and tables by study."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import anndata
import pandas as pd

from ..data.checks import check_key
from ..evaluate.hygiene import drop_duplicates, find_duplicates, find_tested
from ..sources import datasets
from ..sources.simulate import simulate_studies
from .pretraining import concatenate, take_counts

NEED_WHOLE_COUNTS = ("scanvi",)
"""Methods that model counts as such: they can't be fitted to fractional ones."""


class Experiment(NamedTuple):
    """Cells of several studies, who trains, and which methods can be used."""

    name: str
    """The set's, or ``"<set>-><other>"``: the data that results are reported under."""
    cells: anndata.AnnData
    """Counts; ``obs["study"]`` and the column of labels are text."""
    train_on: str | None
    """The study that trains while the other is tested; None where each study in turn is left out."""
    methods: str
    """Names with blanks between, without those that need whole counts where these are fractional."""

    @property
    def file_name(self) -> str:
        """The name without an arrow, as part of a file's name."""
        return name_file(self.name)

    @property
    def caveat(self) -> str:
        """What to bear in mind about the sets; empty if nothing is known."""
        return self.cells.uns.get("scbert", {}).get("caveat", "")


def load_experiments(
    text: str,
    methods: str = "",
    *,
    label_key: str = "cell_type",
    batch_key: str = "",
    n_studies: int = 3,
    severity: float = 1.0,
    seed: int = 0,
) -> list[Experiment]:
    """Load the experiments that a notebook's parameter `dataset` asks for.

    Parameters
    ----------
    text
        Experiments with semicolons between them, such as ``"pancreas_5tech; zheng_facs -> pbmc3k by cell_type_broad"``.
        A set alone: its studies are left out one at a time; of a set of `scbert.hygiene.find_tested` the batches named
        there are tested, and all others train. With an arrow: all of one set trains, the other is tested,
        and so are those cells of the first that never train (`scbert.protocols.choose_pool`); both keep the genes that
        they share. ``by`` names another label column than `label_key`.
    methods
        Names with blanks between, see `scbert.benchmark.choose_methods`. Those that need whole counts are left out of
        experiments whose counts are fractional, which is printed.
    label_key, batch_key
        Columns of ``obs``. Where `batch_key` is empty, a set alone is dealt out to simulated studies.
    n_studies, severity, seed
        Of `scbert.simulate.simulate_studies`; with ``n_studies=1`` all cells are of one study, "all".

    Returns
    -------
    Experiments in the order of `text`. Their cells have ``obs[label_key]``, ``obs["study"]`` and, with an arrow or where the
    file has it, ``obs["n_counts"]``. Cells that two studies share (`drop_duplicates`) are left in the first only.

    A ValueError for another form, or an experiment named twice.
    """
    asked = _read_experiments(text, label_key)
    experiments = []
    for title, (names, stems, key) in asked.items():
        loaded = [
            datasets.load(name, label_key=key, batch_key=batch_key or None if len(names) == 1 else None)
            for name in names
        ]
        if len(names) == 1:
            cells = _take_studies(loaded[0], key, batch_key, n_studies, severity, seed)
        else:
            cells = _join_two(loaded, names, stems, key)
        cells.obs[label_key] = cells.obs[key].astype(str)
        usable = _leave_out(methods, title) if _is_fractional(cells) else methods
        tested = find_tested().get(names[0]) if batch_key and len(names) == 1 else None
        if tested:
            cells.obs["study"] = cells.obs["study"].where(cells.obs["study"].isin(tested), stems[0])
        experiments.append(Experiment(title, cells, stems[0] if tested or len(names) == 2 else None, usable))
    return experiments


def _read_experiments(text, label_key):
    """Return title -> names of sets, their stems, label column; or raise a ValueError before anything is loaded."""
    asked = {}
    for part in filter(None, datasets.part_names(text, ";")):
        sets, *key = datasets.part_names(part, " by ")
        names = datasets.part_names(sets, "->")
        if not all(names) or len(names) > 2:
            raise ValueError(f"dataset must be a set, or like 'one -> other by column', not {part!r}.")
        check_key((key or [label_key])[0], "study", "set")
        stems = [Path(datasets.part_names(name, " with ")[0]).stem for name in names]
        if len(set(stems)) < len(stems):
            raise ValueError(
                f"In {part!r} both sets are called {stems[0]}: an experiment is from one set to another, so name the files apart."
            )
        if "->".join(stems) in asked:
            raise ValueError(f"dataset names {part} twice.")
        asked["->".join(stems)] = names, stems, (key or [label_key])[0]
    if not asked:
        raise ValueError("dataset is empty: name a set, or 'one -> other'.")
    return asked


def _is_fractional(adata):
    return bool(adata.uns.get("scbert", {}).get("fractional_counts"))


def _leave_out(methods, title):
    """Return the methods, by name, that fractional counts can be given to; print which can't."""
    kept = [name for name in methods.split() if name not in NEED_WHOLE_COUNTS]
    without = [name for name in methods.split() if name in NEED_WHOLE_COUNTS]
    if without:
        print(f"{title} has fractional counts, so {', '.join(without)} is left out there: it models whole counts.")
    return " ".join(kept)


def _take_studies(adata, label_key, batch_key, n_studies, severity, seed):
    if not batch_key and n_studies == 1:
        adata.obs["study"] = "all"
        return adata
    if not batch_key:
        return simulate_studies(adata, n_studies=n_studies, severity=severity, label_key=label_key, seed=seed)
    adata.obs["study"] = adata.obs[batch_key].astype(str)
    if _is_fractional(adata):
        print("Counts are fractional, so cells that two studies share cannot be told.")
        return adata
    kept = None
    for study in sorted(set(adata.obs["study"])):
        own = adata[adata.obs["study"] == study]
        if kept is not None:
            shared = own.obs_names.isin(find_duplicates(own, adata[kept], minimum_genes=0)["cell"])
            print(f"{shared.sum()} of {own.n_obs} cells of {study} are in an earlier study too and are left out.")
            own = own[~shared]
        kept = own.obs_names if kept is None else kept.append(own.obs_names)
    return adata[adata.obs_names.isin(kept)].copy()


def _join_two(sets, names, stems, label_key):
    """Return the cells of two sets on their shared genes; obs: set, study, n_counts and the label."""
    one, other = sets
    other = drop_duplicates(other, one, names[0])
    parts = [take_counts(adata, name, label_key) for adata, name in zip((one, other), stems, strict=True)]
    joined = concatenate(parts, names)
    joined.obs["study"] = joined.obs["set"].astype(str)
    if names[0] in find_tested():  # whose cells are told apart by it
        joined.obs["batch"] = [*one.obs["batch"], *other.obs["batch"].astype(str)]
    caveats = [
        f"{stem}: {adata.uns['scbert']['caveat']}"
        for stem, adata in zip(stems, sets, strict=True)
        if adata.uns.get("scbert", {}).get("caveat")
    ]
    if names[0] in datasets.CATALOGUE.get(names[1], {}).get("labels_from", []):
        caveats.append(
            f"The labels of {names[1]} were made by comparing its cells with those of {names[0]}: naming them recovers a "
            "labelling procedure, and is no test on labels found otherwise."
        )
    joined.uns["scbert"] = {"caveat": "\n".join(caveats)}
    if any(map(_is_fractional, sets)):
        why = [adata.uns["scbert"]["fractional_counts"] for adata in sets if _is_fractional(adata)]
        joined.uns["scbert"]["fractional_counts"] = "; ".join(why)
    return joined


def name_file(name: str) -> str:
    """Return an experiment's name as part of a file's: an arrow is no letter that every system allows there."""
    return name.replace("->", "_to_")


def name_studies(predictions: pd.DataFrame, experiments: Sequence[Experiment]) -> pd.DataFrame:
    """Say of each predicted cell which study it is from (column study), and mark the cells that were tested at home.

    `predictions` are on splits of `scbert.protocols.carry_over`. Where one study trains and another is tested, cells of
    the first get the protocol "within": what is lost between the two is the difference to them.
    """
    studies = pd.concat({one.name: one.cells.obs["study"].astype(str) for one in experiments})
    study = studies.loc[pd.MultiIndex.from_frame(predictions[["data", "cell"]])].to_numpy()
    at_home = predictions["data"].map({one.name: one.train_on for one in experiments}) == study
    return predictions.assign(study=study, protocol=predictions["protocol"].where(~at_home, "within"))


def take_studies(scores: pd.DataFrame) -> pd.DataFrame:
    """Return the scores on studies that trained nothing, each study under the name that it has in a figure.

    `scores` are from `score_levels` after `name_studies`. By method and metric: data, protocol, study (or both sets).
    """
    across = scores.query("protocol != 'within'").reset_index(["data", "protocol"])
    left_out = across["protocol"].str.removeprefix("held_out:")
    arrows = across["data"].str.replace("->", "\n-> ")
    return across.assign(study=left_out.where(left_out != "", arrows).to_numpy())


def spread_methods(across: pd.DataFrame, metric: str) -> pd.DataFrame:
    """Return a metric of `take_studies`: a row a data set and study, a column for each method that has all studies."""
    rows = across.xs(metric, level="metric").reset_index()
    return rows.pivot_table("value", ["data", "study"], "method").dropna(axis=1)


def pool_studies(predictions: pd.DataFrame) -> pd.DataFrame:
    """Return the predictions on studies that trained nothing, those of one set as the folds of one protocol.

    After `name_studies`; cells tested "within" are left out. The protocol is "leave_one_study_out" where several
    studies of a set were left out, and fold counts them; it is "" where one set was tested by another.
    """
    pooled = predictions[predictions["protocol"] != "within"]
    pooled = pooled.assign(fold=pooled["protocol"].astype("category").cat.codes)
    several = pooled.groupby("data")["fold"].transform("nunique") > 1
    return pooled.assign(protocol=several.map({True: "leave_one_study_out", False: ""}))


def call_unseen(predictions: pd.DataFrame, methods: Sequence[str]) -> pd.DataFrame:
    """Count what the cells of types that no training study has are called by some methods.

    By data, truth, method and predicted label: share of such cells, median confidence, cells (of that type); or empty.
    """
    unseen = predictions[~predictions["seen"] & predictions["method"].isin(methods)]
    by_type = unseen.groupby(["data", "truth", "method"])
    called = by_type["predicted"].value_counts(normalize=True).rename("share").to_frame()
    sure = unseen.groupby(["data", "truth", "method", "predicted"])["confidence"].median()
    cells = unseen.groupby(["data", "truth"])["cell"].nunique()
    return called.join(sure.rename("median confidence")).assign(cells=cells)
