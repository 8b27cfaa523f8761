"""Who trains, who chooses, who is tested: the paper's protocols, each as a list of splits that all methods share."""

import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import anndata
import numpy as np
import pandas as pd
from sklearn.model_selection import StratifiedKFold, StratifiedShuffleSplit

from ..data.checks import check_column
from .hygiene import load_split, save_split, saved_splits

Parts = tuple[np.ndarray, np.ndarray, np.ndarray]  # training, validation and test cells by number
PARTS = ("train", "validation", "test", "aside")  # of a `Split`


class Split(NamedTuple):
    """Training, validation and test cells, by name, of one training of a protocol."""

    protocol: str
    """Which one, and its level: "", "reference:0.30", "few:10", "imbalance:17", "held_out:celseq"."""
    repeat: int
    """Counts trainings that test anew: on the same cells, or on what another draw leaves."""
    fold: int
    """Counts the parts of one repeat, each of which tests other cells."""
    train: np.ndarray
    validation: np.ndarray
    test: np.ndarray
    aside: np.ndarray = np.array([], dtype=object)
    """Cells that neither train, choose nor count as tested, of studies that train: for calibration, or to see what is
    lost between studies. A label among them can be one that no cell trains, see `find_unseen`."""


def stratified_splits(labels: Sequence[str], n_folds: int = 5, seed: int = 0) -> list[Parts]:
    """Split cells into training, validation and test, label by label, as sorted cell numbers.

    With one fold, a fifth of the cells is tested; with more, each cell is tested once. An eighth of what is not test is
    validation. A label with fewer cells than folds (than five, for one fold) is a ValueError.

    Paper: Methods, "benchmarking" (five-fold cross-validation).
    Differs from the published code: the script draws one 80/20 split and reports on the cells that stopped the training.
    """
    labels = np.asarray(labels, dtype=str)
    n_made = 5 if n_folds == 1 else n_folds
    counts = pd.Series(labels).value_counts()
    if n_folds < 1:
        raise ValueError(f"n_folds must be at least 1, not {n_folds}.")
    if len(counts) < 2:
        raise ValueError(f"All cells have the label {counts.index[0]!r}: there is nothing to tell apart.")
    # Two must remain for training and validation.
    few = counts[(counts < n_made) | (counts - np.ceil(counts / n_made) < 2)]
    if len(few):
        folds = f"fewer than the {n_made} folds need" if n_folds > 1 else "fewer than 5, and a fifth is tested"
        names = ", ".join(f"{name!r} ({n})" for name, n in few[:5].items())
        names += f" and {len(few) - 5} more (is the column a measurement, and no label?)" if len(few) > 5 else ""
        raise ValueError(f"Too few cells have a label of these, {folds}: {names}. Merge or drop them.")
    folds = StratifiedKFold(n_made, shuffle=True, random_state=seed).split(labels, labels)
    return [_draw_validation(labels, rest, test, seed) for rest, test in folds][:n_folds]


def _draw_validation(labels, rest, test, seed):
    """Return training, validation and test cells by number, an eighth of the rest being validation."""
    inner = StratifiedShuffleSplit(1, test_size=max(len(rest) // 8, len(set(labels))), random_state=seed)
    train, validation = next(inner.split(rest, labels[rest]))
    return np.sort(rest[train]), np.sort(rest[validation]), test


def split_cells(
    adata: anndata.AnnData, dataset: str, *, label_key: str = "cell_type", n_folds: int = 1, seed: int = 0
) -> list[Split]:
    """Split all cells of a set, a split a fold: by its saved split where it has one, else by `stratified_splits`.

    The test cells of a saved split are always the same, see `scbert.hygiene.load_split`, and an eighth of its training cells
    is validation, drawn by `seed`. Asked for folds of it, or with cells missing, this raises a ValueError.
    """
    if dataset not in saved_splits():
        return _name_cells(adata, stratified_splits(adata.obs[label_key], n_folds, seed))
    if n_folds != 1:
        raise ValueError(f"{dataset} has one saved split, whose test cells train nothing: n_folds must be 1.")
    labels = adata.obs[label_key].astype(str).to_numpy()
    return _name_cells(adata, [_draw_validation(labels, *load_split(adata, dataset), seed)])


def _name_cells(adata, splits):
    """Return splits of cells by number as those of cells by name, a fold each."""
    return [Split("", 0, fold, *(adata.obs_names[part] for part in parts)) for fold, parts in enumerate(splits)]


def take_cells(adata: anndata.AnnData, split: Split) -> tuple[anndata.AnnData, anndata.AnnData, anndata.AnnData]:
    """Return copies of the training, validation and test cells of a split."""
    return tuple(adata[list(part)].copy() for part in (split.train, split.validation, split.test))


def check_disjoint(*parts: Sequence[str]) -> None:
    """Raise a ValueError if a cell stands in two of the parts (training, validation, test, set aside)."""
    cells = pd.Index(np.concatenate([np.asarray(part, dtype=object) for part in parts]))
    if cells.has_duplicates:
        shared = cells[cells.duplicated()].unique()
        raise ValueError(
            f"{len(shared)} cells are in more than one of training, validation and test (first: {shared[0]})."
        )


def drop_rare(adata: anndata.AnnData, *, label_key: str = "cell_type", minimum: int = 5) -> anndata.AnnData:
    """Return the cells whose label has at least so many, and print which labels were left out; a ValueError if below two stay."""
    sizes = adata.obs[label_key].astype(str).value_counts()
    rare = sizes[sizes < minimum]
    if len(sizes) - len(rare) < 2:
        raise ValueError(f"Fewer than two labels of obs[{label_key!r}] have {minimum} cells: nothing to tell apart.")
    if not len(rare):
        return adata
    names = ", ".join(f"{label} ({n})" for label, n in rare.items())
    print(f"Left out, fewer than {minimum} cells: {names}")
    return adata[(~adata.obs[label_key].astype(str).isin(rare.index)).to_numpy()].copy()


def choose_pool(
    adata: anndata.AnnData, dataset: str, *, label_key: str = "cell_type", seed: int = 0
) -> tuple[pd.Index, pd.Index]:
    """Return the names of the cells that may train, and of those that are tested whatever trains.

    Those of the set's saved split; where there is none, a fifth of each label is tested, drawn by `seed`.
    """
    if dataset in saved_splits():
        rest, test = load_split(adata, dataset)
    else:
        train, validation, test = stratified_splits(adata.obs[label_key], 1, seed)[0]
        rest = np.sort([*train, *validation])
    return adata.obs_names[rest], adata.obs_names[test]


def cross_validation(
    adata: anndata.AnnData, dataset: str, *, label_key: str = "cell_type", n_folds: int = 5, seed: int = 0
) -> list[Split]:
    """Make the splits of stratified cross-validation, each with validation cells of its own (E1).

    Folds are those of `stratified_splits`. Where the set has a saved split, they are of its training cells: each in turn is
    validation, the others train, and the same test cells are tested by each, so that a training is a repeat.

    Paper: Methods, "benchmarking" (five folds); Fig. 2a. Differs from the published code: see `stratified_splits`.
    """
    labels = adata.obs[label_key].astype(str)
    if dataset not in saved_splits():
        return _name_cells(adata, stratified_splits(labels, n_folds, seed))
    rest, test = choose_pool(adata, dataset)
    folds = stratified_splits(labels[rest], n_folds, seed)
    return [
        Split("", repeat, 0, rest[np.sort([*train, *others])], rest[validation], test)
        for repeat, (train, others, validation) in enumerate(folds)
    ]


def reference_sizes(
    adata: anndata.AnnData,
    dataset: str,
    *,
    label_key: str = "cell_type",
    fractions: Sequence[float] = (0.1, 0.3, 0.5, 0.7, 0.9),
    cells_per_label: Sequence[int] = (),
    n_repeats: int = 3,
    query: str = "fixed",
    seed: int = 0,
) -> list[Split]:
    """Make splits with references of several sizes, "reference:0.30" or "few:10" by protocol (E2); see `hold_out`.

    Parameters
    ----------
    fractions
        Of the cells that may train (with query "rest", of all), label by label, at least two; smaller ones are part of larger.
    cells_per_label
        How many cells of each label, for few-shot references; a label that has fewer gives all it has.
    query
        "fixed": the cells of `choose_pool` are tested, whatever the size, so that sizes are compared on the same cells.
        "rest": all that is not reference, as in the paper.

    A ValueError: a fraction outside 0 to 1, fewer than two cells a label, or a label with fewer that may train.

    Paper: Methods, "benchmarking"; Fig. 2d. Repeats are not stated there.
    """
    if any(not 0 < fraction < 1 for fraction in fractions) or any(n < 2 for n in cells_per_label):
        raise ValueError("A reference is a share of the cells between 0 and 1, or at least 2 cells of each label.")
    if query not in ("fixed", "rest"):
        raise ValueError(f"query must be fixed or rest, not {query!r}.")
    if query == "rest" and dataset in saved_splits():
        raise ValueError(f"{dataset} has a saved split, whose test cells train nothing: query must be fixed.")
    levels = [(f"reference:{fraction:.2f}", fraction) for fraction in fractions]
    levels += [(f"few:{n}", n) for n in cells_per_label]
    twice = pd.Index([protocol for protocol, _ in levels])
    if twice.has_duplicates:
        raise ValueError(f"{twice[twice.duplicated()][0]} is asked for twice: name each size once, in whole per cents.")
    labels = adata.obs[label_key].astype(str)
    pool, test = choose_pool(adata, dataset, label_key=label_key, seed=seed)
    everything = pool if query == "fixed" else adata.obs_names
    splits = []
    for repeat in range(n_repeats):
        random = np.random.default_rng([seed, repeat])
        shuffled = {label: random.permutation(cells) for label, cells in _group(labels, everything).items()}
        for protocol, size in levels:
            chosen = [cells[: size if size >= 2 else max(2, round(size * len(cells)))] for cells in shuffled.values()]
            train, validation = hold_out(labels, np.concatenate(chosen), np.random.default_rng([seed, repeat, 1]))
            rest = test if query == "fixed" else everything[~everything.isin(np.concatenate(chosen))]
            if not len(rest):
                raise ValueError(f"{protocol} leaves no cell to test: ask for fewer cells of each label.")
            splits.append(Split(protocol, repeat, 0, train, validation, rest))
    return splits


def class_imbalance(
    adata: anndata.AnnData,
    dataset: str,
    *,
    common: Sequence[str],
    rare: Sequence[str],
    n_common: int = 170,
    n_rare: Sequence[int] = (170, 17, 2),
    n_query: int = 60,
    label_key: str = "cell_type",
    n_repeats: int = 3,
    seed: int = 0,
) -> list[Split]:
    """Make splits of a few labels whose references differ in size, tested on as many cells of each (E3).

    Labels that are `common` give `n_common` reference cells, those that are `rare` each of `n_rare`; `n_query` cells of each
    are tested. The protocol is "imbalance:17" where a rare label has 17 cells. The query is the same for all of a repeat,
    and a smaller reference is part of a larger one. Labels that the data lack, or too few cells, raise a ValueError.

    Paper: Methods, "benchmarking"; Fig. 2e. Of the counts printed there (10,000, 100, 10,000, 100 for CD19+ B, CD8+
    cytotoxic T, CD34+ and CD8+/CD45RA+ cells) only one reading can be drawn from Zheng68K, which has 242 CD34+ cells:
    the two CD8+ types with 10,000, CD19+ B and CD34+ with 100, and 100 cells of each as query.
    """
    labels = adata.obs[label_key].astype(str)
    missing = sorted({*common, *rare} - set(labels))
    if missing or not common or not rare or set(common) & set(rare):
        what = f"obs[{label_key!r}] lacks {', '.join(missing)}" if missing else "each needs a label of its own"
        raise ValueError(
            f"Imbalance is between common and rare labels: {what}. There are: {', '.join(sorted(set(labels)))}."
        )
    if n_query < 1:
        raise ValueError(f"n_query must be at least 1, not {n_query}: cells of each label are to be tested.")
    if not n_rare or len(set(n_rare)) < len(n_rare):
        raise ValueError(f"n_rare must name the sizes of the rare reference, each once, not {list(n_rare)}.")
    if dataset in saved_splits():
        pool, test = choose_pool(adata, dataset, label_key=label_key, seed=seed)
    else:  # reference and query are drawn from the same cells
        pool = test = adata.obs_names
    sizes = {label: max(n_rare) if label in rare else n_common for label in (*common, *rare)}
    own, tested = _group(labels, pool), _group(labels, test)
    for label, size in sizes.items():
        taken = 0 if dataset in saved_splits() else n_query
        if min(n_common, *n_rare) < 2 or len(own[label]) < size + taken or len(tested[label]) < n_query:
            raise ValueError(
                f"{label} has {len(own[label])} cells to train on and {len(tested[label])} to test: not enough for "
                f"{size} as reference (at least 2) beside {n_query} as query. Ask for fewer."
            )
    splits = []
    for repeat in range(n_repeats):
        random = np.random.default_rng([seed, repeat])
        query = {label: random.permutation(tested[label])[:n_query] for label in sizes}
        reference = {label: random.permutation(np.setdiff1d(own[label], query[label])) for label in sizes}
        for n in n_rare:
            chosen = np.concatenate([reference[label][: n if label in rare else n_common] for label in sizes])
            train, validation = hold_out(labels, chosen, np.random.default_rng([seed, repeat, 1]))
            tested_now = np.sort(np.concatenate([*query.values()]))
            splits.append(Split(f"imbalance:{n}", repeat, 0, train, validation, tested_now))
    return splits


def carry_over(
    adata: anndata.AnnData,
    *,
    train_on: str | None = None,
    label_key: str = "cell_type",
    labels: str = "any",
    n_repeats: int = 1,
    aside: bool = False,
    seed: int = 0,
) -> list[Split]:
    """Make the splits that carry annotation from one study, sample or organ to another (E4, E5).

    Labels of one training cell are left out of training.

    Parameters
    ----------
    adata
        Cells of several studies, which ``obs["study"]`` names, such as those of a `scbert.cross_dataset.Experiment`.
    train_on
        The study that trains, while all others are tested; None: each study in turn is tested, and all others train.
        A study that bears the name of a set with a saved split trains on the cells which that split lets train.
    labels
        "any": the training studies teach all labels that they have; tested cells of another label cannot be named
        rightly, and are in the split all the same (see `find_unseen`). "shared": only cells of labels that all studies
        have take part, as in the paper.
    n_repeats
        Draws of the validation cells: an eighth of the training cells, at least one of each label.
    aside
        Whether some cells of the studies that train are set aside: those of `set_aside` or, with `train_on`, the cells that
        `choose_pool` keeps from training, which are tested otherwise.

    Returns
    -------
    Without `train_on`, splits "held_out:<study>". With it, splits of protocol "": tested are the other studies, and those
    cells of the training study that `choose_pool` keeps, to see what is lost on the way.

    A ValueError: no such column, no cell of `train_on`, one study only, or fewer than two labels to learn without one.

    Paper: Methods, "benchmarking"; Fig. 3 (four pancreas studies, four shared types); Extended Data Fig. 5b (organs, by
    its caption in five folds instead).
    """
    options = {"label_key": label_key, "seed": seed}
    if train_on is None:
        return _leave_one_out(adata, labels, n_repeats, aside, **options)
    own, others = _part_studies(adata, train_on)
    pool, kept = choose_pool(own, train_on, **options)
    others = others.obs_names
    if labels == "shared":
        truth = adata.obs[label_key].astype(str)
        pool, others = pool[truth[pool].isin(set(truth[others]))], others[truth[others].isin(set(truth[pool]))]
        kept = kept[truth[kept].isin(set(truth[others]))]
    tested, kept = (others, kept) if aside else (others.append(kept), ())
    return [make_split(adata, pool, tested, repeat=repeat, aside=kept, **options) for repeat in range(n_repeats)]


def _leave_one_out(adata, labels, n_repeats, aside, label_key, seed):
    """Return the splits that test each study in turn."""
    check_column(adata, label_key, "adata", constant_is_fine=False)
    check_column(adata, "study", "adata", constant_is_fine=False)
    if labels not in ("any", "shared"):
        raise ValueError(f"labels must be any or shared, not {labels!r}.")
    truth, batch = adata.obs[label_key].astype(str), adata.obs["study"].astype(str)
    shared = set.intersection(*(set(own) for _, own in truth.groupby(batch)))
    if labels == "shared" and len(shared) < 2:
        raise ValueError(f"The studies share {len(shared)} labels: take labels = any, or merge labels.")
    cells = adata.obs_names[truth.isin(shared) if labels == "shared" else slice(None)]
    splits = []
    for repeat in range(n_repeats):
        for number, study in enumerate(sorted(set(batch))):
            own, others = cells[batch[cells] != study], cells[batch[cells] == study]
            random = np.random.default_rng([seed, repeat, 2, number])
            own, kept = set_aside(truth, own, random) if aside else (own, ())
            options = {"label_key": label_key, "repeat": repeat, "aside": kept, "seed": seed}
            splits.append(make_split(adata, own, others, f"held_out:{study}", **options))
    return splits


def _part_studies(adata, train_on):
    """Return the cells of the study that trains, and those of all others."""
    is_own = (adata.obs["study"] == train_on).to_numpy()
    if not is_own.any():
        raise ValueError(f"No cell is of the study {train_on!r} that is to train: see obs['study'].")
    return adata[is_own], adata[~is_own]


def between_studies(
    adata: anndata.AnnData,
    dataset: str,
    *,
    train: str,
    test: str,
    protocol: str = "",
    label_key: str = "cell_type",
    repeat: int = 0,
    seed: int = 0,
) -> Split:
    """Make the split that trains on one study of `scbert.simulate.simulate_studies`, and tests another.

    Where the set that was dealt out has a saved split, only its training cells train, only its test cells are tested, and
    those of the study that trains are set aside; else an eighth of that study's cells is. No such study is a ValueError.
    """
    labels, study = adata.obs[label_key].astype(str), adata.obs["study"].astype(str)
    for name in (train, test):
        if name not in set(study):
            raise ValueError(f"There is no study {name!r}: there are {', '.join(sorted(set(study)))}.")
    own, others = (adata.obs_names[(study == name).to_numpy()] for name in (train, test))
    if dataset in saved_splits():
        pool, kept = choose_pool(adata, dataset, label_key=label_key)
        own, aside, others = own[own.isin(pool)], own[own.isin(kept)], others[others.isin(kept)]
    else:
        own, aside = set_aside(labels, own, np.random.default_rng([seed, repeat, 2]))
    return make_split(adata, own, others, protocol, label_key=label_key, repeat=repeat, aside=aside, seed=seed)


def hold_out_types(
    adata: anndata.AnnData,
    dataset: str,
    *,
    together: Sequence[str],
    alone: Sequence[str] = (),
    train_on: str | None = None,
    label_key: str = "cell_type",
    n_repeats: int = 1,
    seed: int = 0,
) -> list[Split]:
    """Make splits whose training cells lack some types that are tested (E6).

    Parameters
    ----------
    adata, dataset
        All cells of the set, or of several studies, which ``obs["study"]`` then names; its name, as in `choose_pool`.
    together, alone
        Types that are held out all at once, and those held out one at a time.
    train_on
        The study that trains, as in `carry_over`, while all cells of the others are tested; None: there is one study.

    Returns
    -------
    For each repeat, splits of protocols "held_out:together" and "held_out:<type>". Tested are the test cells of
    `choose_pool`, and all other cells of the types held out, but of a set with a saved split, whose encoder may have met
    those. An eighth of the known training cells is set aside, for calibration. And beside each, "tuning:together" and
    "tuning:<type>", for the choice of a threshold on data that are no test data: a training without a third of the known
    types as well, drawn by lot, which are tested against cells set aside. None where fewer than two types would remain.

    A ValueError: a type that the cells lack, fewer than two types without those held out, or no cell of `train_on`.

    Paper: Methods, "novel cell type detection" (one type at a time); Fig. 4 and Khan et al. 2023 (read as all at once).
    """
    labels = adata.obs[label_key].astype(str)
    missing = sorted({*together, *alone} - set(labels))
    if missing:
        raise ValueError(
            f"obs[{label_key!r}] lacks the type {missing[0]!r} to be held out. There are: {', '.join(sorted(set(labels)))}."
        )
    own, others = (adata, None) if train_on is None else _part_studies(adata, train_on)
    groups = ({"together": list(together)} if len(together) else {}) | {label: [label] for label in alone}
    splits = []
    for repeat in range(n_repeats):
        pool, tested = choose_pool(own, train_on or dataset, label_key=label_key, seed=seed + repeat)
        if others is not None:
            tested = others.obs_names
        for name, types in groups.items():
            random = np.random.default_rng([seed, repeat, zlib.crc32(name.encode())])
            known, aside = set_aside(labels, pool[~labels[pool].isin(types)], random)
            more = pool[labels[pool].isin(types)] if others is None and dataset not in saved_splits() else pool[:0]
            options = {"label_key": label_key, "repeat": repeat, "seed": seed}
            splits.append(make_split(adata, known, tested.append(more), f"held_out:{name}", aside=aside, **options))
            learnt = sorted(set(labels[known]))
            third = random.choice(learnt, max(1, len(learnt) // 3), replace=False)
            if len(learnt) - len(third) >= 2:
                is_new, is_new_aside = (labels[cells].isin(third).to_numpy() for cells in (known, aside))
                tuned = aside[~is_new_aside].append([known[is_new], aside[is_new_aside]])
                splits.append(make_split(adata, known[~is_new], tuned, f"tuning:{name}", **options))
    return splits


def make_split(
    adata: anndata.AnnData,
    train: pd.Index,
    test: pd.Index,
    protocol: str = "",
    *,
    label_key: str = "cell_type",
    repeat: int = 0,
    aside: Sequence[str] = (),
    seed: int = 0,
) -> Split:
    """Make the split that trains on some cells, an eighth of which is validation, and tests others, all by name.

    A ValueError: fewer than two labels with two training cells each, or a cell on both sides, or in `aside`, too.
    """
    labels = adata.obs[label_key].astype(str)
    sizes = labels[train].value_counts()
    learnt = sizes.index[sizes >= 2]
    if len(learnt) < 2:
        raise ValueError(
            f"{protocol or 'The reference'} leaves {len(learnt)} labels of two cells or more to learn: there is nothing "
            "to tell apart."
        )
    kept, validation = hold_out(labels, train[labels[train].isin(learnt)], np.random.default_rng([seed, repeat]))
    aside = np.asarray(aside, dtype=object)
    check_disjoint(kept, validation, test, aside)
    return Split(protocol, repeat, 0, kept, validation, np.asarray(test), aside)


def set_aside(labels: pd.Series, cells: pd.Index, random: np.random.Generator) -> tuple[pd.Index, pd.Index]:
    """Split cells, by name: all others, and an eighth of each label that has eight cells or more."""
    groups = _group(labels, cells).values()
    aside = [cell for own in groups for cell in np.sort(random.permutation(own)[: len(own) // 8])]
    aside = pd.Index(aside, dtype=object)
    return cells[~cells.isin(aside)], aside


def hold_out(labels: pd.Series, cells: Sequence[str], random: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Split cells, by name, into training and validation: an eighth of each label, at least one and not all."""
    validation = []
    for label, own in _group(labels, pd.Index(cells)).items():
        if len(own) < 2:
            raise ValueError(f"Label {label!r} has {len(own)} reference cell: one is to train on, one to choose by.")
        validation.append(random.permutation(own)[: max(1, round(len(own) / 8))])
    validation = np.sort(np.concatenate(validation))
    cells = pd.Index(cells)
    return np.unique(cells[~cells.isin(validation)].to_numpy()), validation  # setdiff1d of text compares each with each


def _group(labels, cells):
    """Return label -> its cells among those given, sorted by name, so that their order in the file does not matter."""
    own = labels[cells]
    return {label: np.sort(np.asarray(own.index[own == label])) for label in sorted(set(own))}


def find_unseen(adata: anndata.AnnData, split: Split, label_key: str = "cell_type") -> np.ndarray:
    """Return which test cells, and after them which cells set aside, have a label that no training cell has: bool."""
    labels = adata.obs[label_key].astype(str)
    return ~labels[[*split.test, *split.aside]].isin(set(labels[split.train])).to_numpy()


def save_splits(splits: Sequence[Split], path: str | Path) -> None:
    """Write splits as gzipped CSV, a row a cell: protocol, repeat, fold, part, cell."""
    rows = [(*split[:3], part, cell) for split in splits for part in PARTS for cell in getattr(split, part)]
    save_split(pd.DataFrame(rows, columns=["protocol", "repeat", "fold", "part", "cell"]).set_index("protocol"), path)
