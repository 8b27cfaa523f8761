"""Splits that never overlap and leave no cell out."""

import numpy as np
import pandas as pd
import pytest

from scbert import protocols

SIZES = {"common": 60, "middle": 25, "rare": 5}


@pytest.fixture
def labels():
    """90 labels in random order, the rarest five times."""
    return np.random.default_rng(0).permutation(np.repeat(list(SIZES), list(SIZES.values())))


@pytest.mark.parametrize("n_folds", [1, 2, 5])
def test_training_validation_and_test_never_overlap_and_leave_no_cell_out(labels, n_folds):
    splits = protocols.stratified_splits(labels, n_folds)
    assert len(splits) == n_folds
    for parts in splits:
        assert sorted(np.concatenate(parts)) == list(range(90))
        assert all((np.diff(part) > 0).all() for part in parts)


def test_each_cell_is_tested_once(labels):
    tests = [test for _, _, test in protocols.stratified_splits(labels, 5)]
    assert sorted(np.concatenate(tests)) == list(range(90))


def test_each_part_has_its_share_of_each_label(labels):
    for train, validation, test in protocols.stratified_splits(labels, 5):
        assert len(test) == 18
        assert len(validation) == 9
        assert pd.Series(labels[test]).value_counts().to_dict() == {"common": 12, "middle": 5, "rare": 1}
        for part in (train, validation):
            shares = pd.Series(labels[part]).value_counts(normalize=True)
            assert abs(shares["common"] - 60 / 90) < 0.12


def test_splits_follow_from_the_seed(labels):
    first, again, other = (protocols.stratified_splits(labels, 5, seed) for seed in (0, 0, 1))
    assert all((a == b).all() for a, b in zip(first[0], again[0], strict=True))
    assert first[0][2].tolist() != other[0][2].tolist()


def test_one_split_is_the_first_of_five_folds(labels):
    assert (protocols.stratified_splits(labels, 1)[0][2] == protocols.stratified_splits(labels, 5)[0][2]).all()


@pytest.mark.parametrize(
    ("n_folds", "n_cells", "reason"),
    [
        (1, 4, "fewer than 5, and a fifth is tested"),
        (6, 4, "fewer than the 6 folds need"),
        (2, 3, "fewer than the 2 folds need"),  # one would remain for training and validation
    ],
)
def test_a_label_with_too_few_cells_is_refused(n_folds, n_cells, reason):
    with pytest.raises(ValueError, match=f"'b' has {n_cells} cells, {reason}: merge or drop it"):
        protocols.stratified_splits(["a"] * 20 + ["b"] * n_cells, n_folds)


@pytest.mark.parametrize(("n_folds", "n_cells"), [(1, 5), (2, 4), (3, 3)])
def test_just_enough_cells_of_a_label_are_split(n_folds, n_cells):
    assert len(protocols.stratified_splits(["a"] * 20 + ["b"] * n_cells, n_folds)) == n_folds


def test_one_label_or_no_folds_are_refused(labels):
    with pytest.raises(ValueError, match="All cells have the label 'a'"):
        protocols.stratified_splits(["a"] * 20)
    with pytest.raises(ValueError, match="n_folds must be at least 1, not 0"):
        protocols.stratified_splits(labels, 0)


def test_a_cell_in_two_parts_is_an_error():
    protocols.check_disjoint(["a", "b"], ["c"], ["d"])
    with pytest.raises(ValueError, match=r"1 cells are in more than one .* \(first: b\)"):
        protocols.check_disjoint(["a", "b"], ["c"], ["b", "d"])


def test_a_set_without_a_saved_split_is_split_as_any_other(make_cells):
    adata = make_cells()
    for ours, usual in zip(
        protocols.split_cells(adata, "mine.h5ad", n_folds=3, seed=1)[1],
        protocols.stratified_splits(adata.obs["cell_type"], 3, 1)[1],
        strict=True,
    ):
        assert (ours == usual).all()


def test_the_saved_test_cells_are_tested_and_nothing_else_learns_from_them(make_cells, monkeypatch):
    adata = make_cells(60)
    test = np.arange(0, 60, 3)
    rest = np.setdiff1d(np.arange(60), test)
    monkeypatch.setattr(protocols, "saved_splits", lambda: ["zheng_facs"])
    monkeypatch.setattr(protocols, "load_split", lambda adata, name: (rest, test))
    adata.obs["cell_type"] = np.repeat(["A", "B"], 30)
    for seed in (0, 1):
        ((train, validation, tested),) = protocols.split_cells(adata, "zheng_facs", seed=seed)
        assert (tested == test).all()
        assert sorted([*train, *validation]) == list(rest)
        assert set(adata.obs["cell_type"].iloc[validation]) == {"A", "B"}
    with pytest.raises(
        ValueError, match="zheng_facs has one saved split, whose test cells train nothing: n_folds must"
    ):
        protocols.split_cells(adata, "zheng_facs", n_folds=5)
