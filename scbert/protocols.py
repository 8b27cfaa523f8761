"""Who trains, who chooses, who is tested: the splits of each of the paper's protocols, as cells by name."""

import math
from collections.abc import Sequence

import anndata
import numpy as np
import pandas as pd
from sklearn.model_selection import StratifiedKFold, StratifiedShuffleSplit

from .hygiene import load_split, saved_splits

Split = tuple[np.ndarray, np.ndarray, np.ndarray]


def stratified_splits(labels: Sequence[str], n_folds: int = 5, seed: int = 0) -> list[Split]:
    """Split cells into training, validation and test, label by label.

    Parameters
    ----------
    labels
        (cells,)
    n_folds
        How many of five folds to return for 1, else how many folds to make: with 1, a fifth of the cells is
        tested once; with k of 2 or more, each cell is tested once.
    seed
        Fixes the splits.

    Returns
    -------
    A list of (training, validation, test) cell numbers, sorted. An eighth of what is not test is validation.

    Raises
    ------
    ValueError
        A label has fewer cells than folds (than five, for one fold).

    Paper: Methods, "benchmarking" (five-fold cross-validation).
    Differs from the published code: real folds, where the script draws one 80/20 split and reports on the
    cells that stopped the training.
    """
    labels = np.asarray(labels, dtype=str)
    n_made = 5 if n_folds == 1 else n_folds
    counts = pd.Series(labels).value_counts()
    if n_folds < 1:
        raise ValueError(f"n_folds must be at least 1, not {n_folds}.")
    if len(counts) < 2:
        raise ValueError(f"All cells have the label {counts.index[0]!r}: there is nothing to tell apart.")
    smallest = counts.iloc[-1]
    if smallest < n_made or smallest - math.ceil(smallest / n_made) < 2:  # two must remain for training and validation
        folds = f"fewer than the {n_made} folds need" if n_folds > 1 else "fewer than 5, and a fifth is tested"
        raise ValueError(f"Label {counts.index[-1]!r} has {smallest} cells, {folds}: merge or drop it.")
    splits = []
    for rest, test in StratifiedKFold(n_made, shuffle=True, random_state=seed).split(labels, labels):
        inner = StratifiedShuffleSplit(1, test_size=max(len(rest) // 8, len(counts)), random_state=seed)
        train, validation = next(inner.split(rest, labels[rest]))
        splits.append((np.sort(rest[train]), np.sort(rest[validation]), test))
    return splits[:n_folds]


def split_cells(
    adata: anndata.AnnData, dataset: str, *, label_key: str = "cell_type", n_folds: int = 1, seed: int = 0
) -> list[Split]:
    """Split the cells of a data set: by its saved split where it has one, else by `stratified_splits`.

    Parameters
    ----------
    adata
        All cells of the set.
    dataset
        Its name; "zheng_facs" has a saved split, whose 30 % are always the test cells, see `scbert.hygiene.load_split`.
    label_key, n_folds, seed
        As in `stratified_splits`; an eighth of the saved training cells is validation, drawn by `seed`.

    Raises
    ------
    ValueError
        Folds are asked of a set with a saved split, cells are missing, or see `stratified_splits`.
    """
    if dataset not in saved_splits():
        return stratified_splits(adata.obs[label_key], n_folds, seed)
    if n_folds != 1:
        raise ValueError(f"{dataset} has one saved split, whose test cells train nothing: n_folds must be 1.")
    rest, test = load_split(adata, dataset)
    labels = adata.obs[label_key].astype(str).to_numpy()
    inner = StratifiedShuffleSplit(1, test_size=max(len(rest) // 8, len(set(labels))), random_state=seed)
    train, validation = next(inner.split(rest, labels[rest]))
    return [(np.sort(rest[train]), np.sort(rest[validation]), test)]


def check_disjoint(*parts: Sequence[str]) -> None:
    """Raise a ValueError if a cell stands in two of the parts (training, validation, test)."""
    cells = pd.Index(np.concatenate([np.asarray(part, dtype=object) for part in parts]))
    if cells.has_duplicates:
        shared = cells[cells.duplicated()].unique()
        raise ValueError(
            f"{len(shared)} cells are in more than one of training, validation and test (first: {shared[0]})."
        )
