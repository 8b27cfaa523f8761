"""Splits that never overlap and leave no cell out."""

import numpy as np
import pandas as pd
import pytest

from scbert import benchmark, novel_types, protocols

SIZES = {"common": 60, "middle": 25, "rare": 5}


def read_splits(path):
    """Return the splits of a file that `protocols.save_splits` wrote."""
    table = pd.read_csv(path, dtype={"cell": str, "protocol": str}, keep_default_na=False)
    splits = []
    for (protocol, repeat, fold), rows in table.groupby(["protocol", "repeat", "fold"], sort=False):
        parts = (rows["cell"][rows["part"] == part].to_numpy() for part in protocols.PARTS)
        splits.append(protocols.Split(protocol, int(repeat), int(fold), *parts))
    return splits


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
    with pytest.raises(ValueError, match=f"{reason}: 'b' \\({n_cells}\\). Merge or drop"):
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
    splits = protocols.split_cells(adata, "mine.h5ad", n_folds=3, seed=1)
    assert [split[:3] for split in splits] == [("", 0, 0), ("", 0, 1), ("", 0, 2)]
    usual = protocols.stratified_splits(adata.obs["cell_type"], 3, 1)[1]
    assert [list(part) for part in splits[1][3:6]] == [list(adata.obs_names[part]) for part in usual]


def test_the_cells_of_a_split_are_taken_by_name_in_its_order(make_cells):
    adata = make_cells()
    names = [adata.obs_names[[5, 2, 9]], adata.obs_names[[0]], adata.obs_names[[7, 3]]]
    taken = protocols.take_cells(adata, protocols.Split("", 0, 0, *names))
    assert [list(part.obs_names) for part in taken] == [list(part) for part in names]
    assert not any(part.is_view for part in taken)


def test_the_saved_test_cells_are_tested_and_nothing_else_learns_from_them(make_cells, monkeypatch):
    adata = make_cells(60)
    test = np.arange(0, 60, 3)
    rest = np.setdiff1d(np.arange(60), test)
    monkeypatch.setattr(protocols, "saved_splits", lambda: ["zheng_facs"])
    monkeypatch.setattr(protocols, "load_split", lambda adata, name: (rest, test))
    adata.obs["cell_type"] = np.repeat(["A", "B"], 30)
    for seed in (0, 1):
        (split,) = protocols.split_cells(adata, "zheng_facs", seed=seed)
        assert list(split.test) == list(adata.obs_names[test])
        assert sorted([*split.train, *split.validation]) == sorted(adata.obs_names[rest])
        assert set(adata.obs["cell_type"][split.validation]) == {"A", "B"}
    with pytest.raises(
        ValueError, match="zheng_facs has one saved split, whose test cells train nothing: n_folds must"
    ):
        protocols.split_cells(adata, "zheng_facs", n_folds=5)


# Protocols


@pytest.fixture
def studies(make_cells):
    """90 cells of four labels, common to rare, in three studies; the third lacks D, and the names are in no order."""
    adata = make_cells(90)
    adata.obs["cell_type"] = np.repeat(["A", "B", "C", "D"], [40, 25, 15, 10])
    adata.obs["study"] = np.array(["s1", "s2", "s3"])[np.arange(90) % 3]
    adata = adata[~((adata.obs["cell_type"] == "D") & (adata.obs["study"] == "s3"))].copy()
    return adata[np.random.default_rng(0).permutation(adata.n_obs)].copy()


@pytest.fixture
def saved(studies, monkeypatch):
    """The same cells as a set with a saved split: 30 % of them, by name, whatever their order in the file."""
    names = np.sort(studies.obs_names)
    tested = {
        cell
        for label in "ABCD"
        for cell in [name for name in names if studies.obs["cell_type"][name] == label][::3]
    }  # fmt: skip

    def load_split(adata, name):
        is_test = adata.obs_names.isin(tested)
        return np.flatnonzero(~is_test), np.flatnonzero(is_test)

    monkeypatch.setattr(protocols, "saved_splits", lambda: ["saved"])
    monkeypatch.setattr(protocols, "load_split", load_split)
    return tested


TWO = {"common": ["A"], "rare": ["B"], "n_common": 12, "n_rare": [12, 6, 2], "n_query": 8}
MAKERS = {
    "folds": lambda adata, data, seed: protocols.cross_validation(adata, data, n_folds=3, seed=seed),
    "sizes": lambda adata, data, seed: protocols.reference_sizes(
        adata, data, fractions=[0.2, 0.6], cells_per_label=[3], n_repeats=2, seed=seed
    ),
    "uneven": lambda adata, data, seed: protocols.class_imbalance(
        adata, data, **(TWO | {"n_query": 6}), n_repeats=2, seed=seed
    ),
    "one out": lambda adata, data, seed: protocols.carry_over(adata, n_repeats=2, seed=seed),
    "one out, some aside": lambda adata, data, seed: protocols.carry_over(adata, n_repeats=2, aside=True, seed=seed),
    "types out": lambda adata, data, seed: protocols.hold_out_types(
        adata, data, together=["C"], alone=["C", "D"], n_repeats=2, seed=seed
    ),
    "between": lambda adata, data, seed: [
        protocols.between_studies(adata, data, train=one, test=other, protocol=f"{one}->{other}", seed=seed)
        for one, other in [("s1", "s2"), ("s2", "s1"), ("s3", "s2")]
    ],
}
PARTS = ("train", "validation", "test")


def names_of(splits):
    """Return all that a list of splits says, the cells of each part without their order."""
    return [(*split[:3], *(tuple(sorted(getattr(split, part))) for part in (*PARTS, "aside"))) for split in splits]


def learns(split):
    return {*split.train, *split.validation}


@pytest.mark.parametrize("data", ["mine.h5ad", "saved"])
@pytest.mark.parametrize("maker", MAKERS)
def test_no_cell_is_on_two_sides_of_any_protocols_splits(studies, saved, maker, data):
    splits = MAKERS[maker](studies, data, 0)
    assert len({split[:3] for split in splits}) == len(splits) >= 3
    for split in splits:
        cells = np.concatenate(split[3:])
        assert len(set(cells)) == len(cells)
        assert set(cells) <= set(studies.obs_names)
        assert all(len(getattr(split, part)) for part in PARTS)
        taught = set(studies.obs["cell_type"][split.train])
        assert set(studies.obs["cell_type"][split.validation]) == taught
        if (maker, data) != ("between", "saved"):  # where all test cells of the training study are set aside
            assert set(studies.obs["cell_type"][split.aside]) <= taught


@pytest.mark.parametrize("data", ["mine.h5ad", "saved"])
@pytest.mark.parametrize("maker", MAKERS)
def test_the_seed_fixes_the_splits_and_another_makes_others(studies, saved, maker, data):
    first, again, other = (names_of(MAKERS[maker](studies, data, seed)) for seed in (0, 0, 1))
    assert first == again
    assert [split[:3] for split in first] == [split[:3] for split in other]
    assert all(a[3:] != b[3:] for a, b in zip(first, other, strict=True))
    assert len({split[3:] for split in first}) == len(first)  # nor is one split of a list another one of it


@pytest.mark.parametrize(
    ("maker", "data"),
    [
        ("sizes", "saved"),
        ("uneven", "saved"),
        ("uneven", "mine.h5ad"),
        ("one out", "mine.h5ad"),
        ("one out, some aside", "mine.h5ad"),
        ("types out", "saved"),
        ("between", "saved"),
        ("between", "mine.h5ad"),
    ],
)
def test_the_order_of_cells_in_the_file_does_not_matter_to_what_is_drawn_by_name(studies, saved, maker, data):
    turned = studies[::-1].copy()
    assert names_of(MAKERS[maker](studies, data, 0)) == names_of(MAKERS[maker](turned, data, 0))


@pytest.mark.parametrize("maker", ["folds", "sizes", "uneven"])
def test_the_cells_of_a_saved_split_never_train_and_all_of_it_is_tested(studies, saved, maker):
    for split in MAKERS[maker](studies, "saved", 0):
        assert not learns(split) & saved
        assert set(split.test) <= saved
        if maker != "uneven":
            assert set(split.test) == saved


def test_testing_the_rest_is_refused_where_a_split_is_saved(studies, saved):
    with pytest.raises(
        ValueError, match="saved has a saved split, whose test cells train nothing: query must be fixed"
    ):
        protocols.reference_sizes(studies, "saved", query="rest")


@pytest.mark.parametrize("maker", ["sizes", "uneven", "one out"])
def test_validation_has_each_label_that_is_learnt_and_not_all_cells_of_it(studies, maker):
    for split in MAKERS[maker](studies, "mine.h5ad", 0):
        labels = studies.obs["cell_type"].astype(str)
        train, validation = labels[split.train].value_counts(), labels[split.validation].value_counts()
        assert set(train.index) == set(validation.index)
        for label, n in validation.items():
            assert n == max(1, round((n + train[label]) / 8))


def test_folds_are_each_tested_once_or_with_a_saved_split_choose_once(studies, saved):
    free = protocols.cross_validation(studies, "mine.h5ad", n_folds=3)
    assert [(split.protocol, split.repeat, split.fold) for split in free] == [("", 0, 0), ("", 0, 1), ("", 0, 2)]
    assert sorted(np.concatenate([split.test for split in free])) == sorted(studies.obs_names)
    assert all(len(learns(split)) + len(split.test) == studies.n_obs for split in free)
    kept = protocols.cross_validation(studies, "saved", n_folds=3)
    assert [(split.protocol, split.repeat, split.fold) for split in kept] == [("", 0, 0), ("", 1, 0), ("", 2, 0)]
    assert sorted(np.concatenate([split.validation for split in kept])) == sorted(set(studies.obs_names) - saved)
    assert all(learns(split) == set(studies.obs_names) - saved for split in kept)


def test_a_smaller_reference_is_part_of_a_larger_one_and_has_its_share_of_each_label(studies):
    splits = protocols.reference_sizes(studies, "mine.h5ad", fractions=[0.1, 0.5, 0.9], n_repeats=2)
    labels = studies.obs["cell_type"].astype(str)
    pool, _ = protocols.choose_pool(studies, "mine.h5ad")
    sizes = labels[pool].value_counts()
    assert [(split.protocol, split.repeat) for split in splits] == [
        (f"reference:{share}", repeat) for repeat in (0, 1) for share in ("0.10", "0.50", "0.90")
    ]
    for repeat in (splits[:3], splits[3:]):
        assert learns(repeat[0]) < learns(repeat[1]) < learns(repeat[2]) < set(pool)
        for split, share in zip(repeat, (0.1, 0.5, 0.9), strict=True):
            found = labels[sorted(learns(split))].value_counts().to_dict()
            assert found == {label: max(2, round(share * n)) for label, n in sizes.items()}
    assert learns(splits[0]) != learns(splits[3])
    assert len({tuple(sorted(split.test)) for split in splits}) == 1
    assert not set(splits[0].test) & set(pool)


def test_few_cells_are_so_many_of_each_label_or_all_that_it_has(studies):
    labels = studies.obs["cell_type"].astype(str)
    pool, _ = protocols.choose_pool(studies, "mine.h5ad")
    splits = protocols.reference_sizes(studies, "mine.h5ad", fractions=[], cells_per_label=[2, 10], n_repeats=1)
    assert [split.protocol for split in splits] == ["few:2", "few:10"]
    for split, n in zip(splits, (2, 10), strict=True):
        found = labels[sorted(learns(split))].value_counts().to_dict()
        assert found == {label: min(n, size) for label, size in labels[pool].value_counts().items()}
    assert labels[pool].value_counts()["D"] < 10
    assert learns(splits[0]) < learns(splits[1])


def test_another_size_or_repeat_leaves_the_splits_of_the_others_as_they_were(studies):
    few = protocols.reference_sizes(studies, "mine.h5ad", fractions=[0.5], cells_per_label=[4], n_repeats=1)
    more = protocols.reference_sizes(studies, "mine.h5ad", fractions=[0.2, 0.5], cells_per_label=[3, 4], n_repeats=2)
    assert set(names_of(few)) < set(names_of(more))
    few = protocols.class_imbalance(studies, "mine.h5ad", **(TWO | {"n_rare": [2]}), n_repeats=1)
    more = protocols.class_imbalance(studies, "mine.h5ad", **TWO, n_repeats=2)
    assert set(names_of(few)) < set(names_of(more))


def test_testing_the_rest_tests_all_that_is_not_reference(studies):
    for split in protocols.reference_sizes(studies, "mine.h5ad", fractions=[0.2, 0.7], query="rest", n_repeats=2):
        assert learns(split) | set(split.test) == set(studies.obs_names)
        assert len(learns(split)) + len(split.test) == studies.n_obs


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"fractions": [1.0]}, "A reference is a share of the cells between 0 and 1, or at least 2 cells"),
        ({"fractions": [-0.1]}, "A reference is a share of the cells between 0 and 1, or at least 2 cells"),
        ({"cells_per_label": [1]}, "A reference is a share of the cells between 0 and 1, or at least 2 cells"),
        ({"query": "all"}, "query must be fixed or rest, not 'all'"),
        ({"fractions": [0.101, 0.1]}, "reference:0.10 is asked for twice"),
        ({"cells_per_label": [5, 5]}, "few:5 is asked for twice"),
        ({"fractions": [], "cells_per_label": [1000], "query": "rest"}, "few:1000 leaves no cell to test"),
    ],
)
def test_a_reference_that_cannot_be_is_refused(studies, options, reason):
    with pytest.raises(ValueError, match=reason):
        protocols.reference_sizes(studies, "mine.h5ad", **options)


@pytest.mark.parametrize("data", ["mine.h5ad", "saved"])
def test_uneven_references_have_their_sizes_and_one_query_of_as_many_of_each(studies, saved, data):
    labels = studies.obs["cell_type"].astype(str)
    options = TWO | {"common": ["A", "C"], "n_common": 8, "n_rare": [9, 5, 2], "n_query": 5}
    splits = protocols.class_imbalance(studies, data, **options, n_repeats=2)
    assert [(split.protocol, split.repeat) for split in splits] == [
        (f"imbalance:{n}", repeat) for repeat in (0, 1) for n in (9, 5, 2)
    ]
    for repeat in (splits[:3], splits[3:]):
        for split, n in zip(repeat, (9, 5, 2), strict=True):
            assert labels[sorted(learns(split))].value_counts().to_dict() == {"A": 8, "C": 8, "B": n}
            assert labels[split.test].value_counts().to_dict() == {"A": 5, "B": 5, "C": 5}
            assert (split.test == repeat[0].test).all()
        assert learns(repeat[2]) < learns(repeat[1]) < learns(repeat[0])
    assert set(splits[0].test) != set(splits[3].test)


def test_a_rare_label_needs_no_more_cells_than_are_asked_of_it(studies):
    options = {"common": ["A"], "rare": ["D"], "n_common": 30, "n_rare": [3, 2], "n_query": 3}
    splits = protocols.class_imbalance(studies, "mine.h5ad", **options, n_repeats=1)  # 6 cells of D
    found = [studies.obs["cell_type"].astype(str)[sorted(learns(split))].value_counts().to_dict() for split in splits]
    assert found == [{"A": 30, "D": 3}, {"A": 30, "D": 2}]


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"rare": ["X", "Y"]}, r"obs\['cell_type'\] lacks X, Y\. There are: A, B, C, D\."),
        ({"rare": ["A"]}, "each needs a label of its own"),
        ({"rare": []}, "each needs a label of its own"),
        ({"n_common": 40}, "A has 40 cells to train on and 40 to test: not enough for 40 as reference"),
        ({"n_rare": [18]}, "B has 25 cells to train on and 25 to test: not enough for 18 as reference"),
        ({"n_rare": [12, 1]}, r"not enough for .* \(at least 2\)"),
        ({"n_query": 0}, "n_query must be at least 1"),
        ({"n_rare": []}, "n_rare must name"),
        ({"n_rare": [6, 6]}, "n_rare must name"),
    ],
)
def test_an_imbalance_that_cannot_be_is_refused(studies, options, reason):
    with pytest.raises(ValueError, match=reason):
        protocols.class_imbalance(studies, "mine.h5ad", **(TWO | options))


def test_a_study_left_out_is_tested_whole_and_trains_nothing(studies):
    splits = protocols.carry_over(studies)
    assert [split.protocol for split in splits] == ["held_out:s1", "held_out:s2", "held_out:s3"]
    for split in splits:
        out = studies.obs["study"] == split.protocol.removeprefix("held_out:")
        assert set(split.test) == set(studies.obs_names[out])
        assert learns(split) == set(studies.obs_names[~out])
    repeats = protocols.carry_over(studies, n_repeats=2)
    assert names_of(repeats[:3]) == names_of(splits)
    for one, other in zip(repeats[:3], repeats[3:], strict=True):
        assert (one.repeat, other.repeat) == (0, 1)
        assert learns(one) == learns(other)
        assert set(one.validation) != set(other.validation)


def test_of_shared_labels_those_that_a_study_lacks_take_no_part(studies):
    labels = studies.obs["cell_type"].astype(str)
    for split in protocols.carry_over(studies, labels="shared"):
        assert set(labels[split.test]) == set(labels[split.train]) == {"A", "B", "C"}
        assert learns(split) | set(split.test) == set(labels.index[labels != "D"])


def test_a_label_of_one_training_cell_is_not_learnt_and_its_test_cells_count_as_unseen(studies):
    studies.obs["cell_type"] = studies.obs["cell_type"].astype(str)
    d = studies.obs_names[studies.obs["cell_type"] == "D"]
    in_s1 = d[studies.obs.loc[d, "study"] == "s1"]
    lone = d.difference(in_s1)[0]
    studies = studies[~studies.obs_names.isin(d.difference([*in_s1, lone]))].copy()
    split = protocols.carry_over(studies)[0]
    assert lone not in learns(split) | set(split.test)
    unseen = protocols.find_unseen(studies, split)
    assert unseen.dtype == bool
    assert set(split.test[unseen]) == set(in_s1)
    home = protocols.carry_over(studies)[2]  # s1 trains, and teaches D
    assert not protocols.find_unseen(studies, home).any()


@pytest.mark.parametrize(
    ("study", "options", "reason"),
    [
        (None, {}, "adata has no column 'study' in obs"),
        ("study", {"label_key": "labels"}, "adata has no column 'labels' in obs"),
        ("batch", {}, r"obs\['study'\] of adata has one value only \(b1\)"),
        ("study", {"labels": "common"}, "labels must be any or shared, not 'common'"),
        ("study", {"label_key": "origin", "labels": "shared"}, "The studies share 0 labels: take labels = any"),
        ("half", {"label_key": "origin"}, "held_out:one leaves 1 labels of two cells or more"),
    ],
)
def test_studies_that_cannot_be_left_out_are_refused(studies, study, options, reason):
    studies.obs["half"] = np.where(studies.obs["study"] == "s1", "two", "one")
    studies.obs["origin"] = own = studies.obs.pop("study")
    if study is not None:
        studies.obs["study"] = own if study == "study" else studies.obs[study]
    with pytest.raises(ValueError, match=reason):
        protocols.carry_over(studies, **options)


@pytest.mark.parametrize("train_on", ["s1", "saved"])
@pytest.mark.parametrize("labels", ["any", "shared"])
def test_annotation_is_carried_from_one_set_to_another_and_tested_at_home_too(studies, saved, train_on, labels):
    studies = studies[studies.obs["cell_type"] != "D"].copy()  # of its few cells a fifth cannot be tested
    studies.obs["study"] = np.where(studies.obs["study"] == "s1", train_on, "other")
    away = studies.obs["study"] == "other"
    studies.obs["cell_type"] = np.where(away & (studies.obs["cell_type"] == "C"), "E", studies.obs["cell_type"])
    truth, home = studies.obs["cell_type"].astype(str), studies.obs["study"] == train_on
    splits = protocols.carry_over(studies, train_on=train_on, labels=labels, n_repeats=2)
    assert [(split.protocol, split.repeat, split.fold) for split in splits] == [("", 0, 0), ("", 1, 0)]
    taught = {"A", "B"} if labels == "shared" else {"A", "B", "C"}
    for split in splits:
        assert set(truth[split.train]) == taught
        assert home[sorted(learns(split))].all()
        tested_away = set(split.test[~home[split.test].to_numpy()])
        wanted = taught if labels == "shared" else {"A", "B", "E"}
        assert tested_away == set(studies.obs_names[(~home & truth.isin(wanted)).to_numpy()])
        assert learns(split) | set(split.test) == set(studies.obs_names[truth.isin(taught | wanted).to_numpy()])
        if train_on == "saved":
            assert set(split.test[home[split.test].to_numpy()]) == saved & set(
                studies.obs_names[home & truth.isin(taught)]
            )
        unseen = truth[split.test[protocols.find_unseen(studies, split)]]
        assert set(unseen) == (set() if labels == "shared" else {"E"})


def test_a_study_that_is_to_train_and_has_no_cell_is_refused(studies):
    for make, options in ((protocols.carry_over, {}), (protocols.hold_out_types, {"dataset": "x", "together": ["A"]})):
        with pytest.raises(ValueError, match="No cell is of the study 's9' that is to train: see obs"):
            make(studies, train_on="s9", **options)


def test_training_on_named_cells_refuses_what_cannot_be_learnt_or_is_tested(studies):
    names, labels = studies.obs_names, studies.obs["cell_type"].astype(str)
    with pytest.raises(ValueError, match="The reference leaves 1 labels of two cells or more to learn"):
        protocols.make_split(studies, names[labels == "A"], names[labels == "B"])
    with pytest.raises(ValueError, match="cells are in more than one of training, validation and test"):
        protocols.make_split(studies, names, names[:2])


def test_splits_come_back_from_their_file_which_has_the_same_bytes_each_time(studies, tmp_path):
    studies.obs_names = ["NA", "007", 'a,"b"', *studies.obs_names[3:]]
    studies.obs["study"] = studies.obs["study"].map({"s1": "NA", "s2": "a, b", "s3": "s3"})
    # "between" names the studies, and "one out" makes splits of the same names as with some aside.
    makers = [make for name, make in MAKERS.items() if name not in ("between", "one out")]
    splits = [split for make in makers for split in make(studies, "mine.h5ad", 0)]
    files = [tmp_path / "one.csv.gz", tmp_path / "two.csv.gz"]
    protocols.save_splits(splits, files[0])
    back = read_splits(files[0])
    protocols.save_splits(back, files[1])
    assert files[0].read_bytes() == files[1].read_bytes()
    assert len(back) == len(splits)
    for one, other in zip(splits, back, strict=True):
        assert one[:3] == other[:3]
        for part in (*PARTS, "aside"):
            assert list(getattr(one, part)) == list(getattr(other, part))
    assert pd.read_csv(files[0]).columns.tolist() == ["protocol", "repeat", "fold", "part", "cell"]


@pytest.mark.parametrize(
    ("text", "fractions", "cells", "query"),
    [
        ("0.1 0.3 10 rest", [0.1, 0.3], [10], "rest"),
        ("5 .5", [0.5], [5], "fixed"),
        ("", [], [], "fixed"),
    ],
)
def test_references_are_read_from_a_line(text, fractions, cells, query):
    options = {"fractions": fractions, "cells_per_label": cells, "query": query}
    assert benchmark.read_references(text) == options


@pytest.mark.parametrize("text", ["0.1, 0.3", "ten", "0.1 all", "nan", "2.5", "inf"])
def test_a_line_that_is_no_references_is_refused(text):
    with pytest.raises(ValueError, match="references must be numbers, and may end with rest"):
        benchmark.read_references(text)


def test_imbalance_is_read_from_a_line():
    assert benchmark.read_imbalance("A, B/x | C | 170 | 170 17 2 | 60", []) == {
        "common": ["A", "B/x"], "rare": ["C"], "n_common": 170, "n_rare": [170, 17, 2], "n_query": 60,
    }  # fmt: skip


def test_a_label_with_a_comma_can_be_named():
    labels = ["T cell, CD8+", "T cell", "B"]
    options = benchmark.read_imbalance("T cell, CD8+ | B | 20 | 20 | 5", labels)
    assert options["common"] == ["T cell, CD8+"]
    assert benchmark.read_imbalance("T cell, B | T cell, CD8+ | 20 | 20 | 5", labels)["common"] == ["T cell", "B"]


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("CD4+, ab T cell, monocyte", ["CD4+, ab T cell", "monocyte"]),
        ("CD4+,  ab T cell,CD8+, ab T cell", ["CD4+, ab T cell", "CD8+, ab T cell"]),
        ("'CD4+, ab T cell', \"monocyte\"", ["CD4+, ab T cell", "monocyte"]),
        ("'A', 'B'", ["A", "B"]),
        ("A, B", ["A, B"]),  # the longest that is there
        ("5' end, it's", ["5' end", "it's"]),
        ("x,y, 'p|q', 'r; s'", ["x,y", "p|q", "r; s"]),
        ("'no, such', A", ["no, such", "A"]),
    ],
)
def test_labels_with_commas_and_quotes_can_be_named(text, found):
    labels = [
        "CD4+, ab T cell",
        "CD8+, ab T cell",
        "monocyte",
        "A",
        "B",
        "A, B",
        "5' end",
        "it's",
        "x,y",
        "p|q",
        "r; s",
    ]
    assert benchmark.split_labels(text, labels) == found


def test_separators_inside_quotes_part_nothing(types):
    assert benchmark.split_outside("'a; b', c; auto", ";") == ["'a; b', c", "auto"]
    options = benchmark.read_imbalance("'p|q', A | 'x, y' | 20 | 20 2 | 5", ["p|q", "A", "x, y"])
    assert (options["common"], options["rare"]) == (["p|q", "A"], ["x, y"])
    types.obs["kind"] = types.obs["cell_type"].map(lambda name: f"{name}, {name}; auto")
    assert novel_types.read_held_out("'A, A; auto', B, B; auto", "", types, label_key="kind")[0] == [
        *["A, A; auto", "B, B; auto"]
    ]


@pytest.mark.parametrize("text", ["A | B", "A | B | x | 17 | 60", "A | B | 10 | 10, 5 | 60", "automatic", ""])
def test_a_line_that_is_no_imbalance_is_refused(text):
    with pytest.raises(ValueError, match="imbalance must be auto, empty, or like 'A, B"):
        benchmark.read_imbalance(text, ["A", "B"])


@pytest.mark.parametrize("size", [50, 400])
def test_the_two_commonest_labels_are_taken_on_request_and_their_cells_suffice(make_cells, size):
    adata = make_cells(2 * size + 20)
    adata.obs["cell_type"] = np.repeat(["C", "B", "A"], [size, size, 20])  # a tie goes by name
    options = benchmark.read_imbalance("auto", adata.obs["cell_type"])
    n_query = min(60, size // 4)
    n = min(170, int(0.7 * size) - n_query)
    assert options == {"common": ["B"], "rare": ["C"], "n_common": n, "n_rare": [n, n // 10], "n_query": n_query}
    splits = protocols.class_imbalance(adata, "mine.h5ad", **options, n_repeats=1)
    assert [split.protocol for split in splits] == [f"imbalance:{n}", f"imbalance:{n // 10}"]
    with pytest.raises(ValueError, match="A has 20 cells: too few for imbalance = auto"):
        benchmark.read_imbalance("auto", ["A"] * 20 + ["B"] * 30)
    with pytest.raises(ValueError, match="imbalance = auto needs two labels"):
        benchmark.read_imbalance("auto", ["B"] * 100)


def test_labels_of_few_cells_are_dropped_by_name(studies, capsys):
    studies.obs["cell_type"] = studies.obs["cell_type"].astype(str)
    assert protocols.drop_rare(studies) is studies
    assert capsys.readouterr().out == ""
    kept = protocols.drop_rare(studies, minimum=7)  # of D there are six
    assert list(kept.obs_names) == list(studies.obs_names[studies.obs["cell_type"] != "D"])
    assert "Left out, fewer than 7 cells: D (6)" in capsys.readouterr().out
    assert protocols.drop_rare(studies, minimum=6) is studies
    with pytest.raises(ValueError, match=r"Fewer than two labels of obs\['cell_type'\] have 30 cells"):
        protocols.drop_rare(studies, minimum=30)


# Cells set aside


def test_an_eighth_of_each_label_of_eight_or_more_is_set_aside(studies):
    labels = studies.obs["cell_type"].astype(str)
    cells = studies.obs_names[::-1]
    rest, aside = protocols.set_aside(labels, cells, np.random.default_rng(0))
    assert labels[aside].value_counts().to_dict() == {"A": 5, "B": 3, "C": 1}  # of 40, 25 and 15; D has six
    assert list(rest) == [cell for cell in cells if cell not in set(aside)]
    again = protocols.set_aside(labels, studies.obs_names, np.random.default_rng(0))[1]
    assert list(again) == list(aside)
    assert set(protocols.set_aside(labels, cells, np.random.default_rng(1))[1]) != set(aside)
    few = cells[labels[cells] == "D"]
    rest, aside = protocols.set_aside(labels, few, np.random.default_rng(0))
    assert (list(rest), list(aside)) == (list(few), [])


def test_cells_set_aside_are_of_the_training_studies_and_of_labels_that_train(studies):
    labels, study = studies.obs["cell_type"].astype(str), studies.obs["study"].astype(str)
    plain = protocols.carry_over(studies)
    assert all(split.aside.tolist() == [] for split in plain)
    splits = protocols.carry_over(studies, aside=True, n_repeats=2)
    for split, before in zip(splits, plain * 2, strict=True):
        out = split.protocol.removeprefix("held_out:")
        assert set(split.test) == set(before.test)
        assert learns(split) | set(split.aside) == learns(before)
        assert out not in set(study[split.aside])
        pool = labels[(study != out).to_numpy()].value_counts()
        assert labels[split.aside].value_counts().to_dict() == {name: n // 8 for name, n in pool.items() if n >= 8}
        assert set(labels[split.aside]) <= set(labels[split.train])
    assert set(splits[0].aside) != set(splits[3].aside)
    shared = protocols.carry_over(studies, aside=True, labels="shared")
    assert all({"A"} <= set(labels[split.aside]) <= {"A", "B", "C"} for split in shared)


def test_what_would_be_tested_at_home_is_set_aside_on_request(studies, saved):
    studies = studies[studies.obs["cell_type"] != "D"].copy()
    studies.obs["study"] = np.where(studies.obs["study"] == "s1", "saved", "other")
    away = studies.obs["study"] == "other"
    studies.obs["cell_type"] = np.where(away & (studies.obs["cell_type"] == "C"), "E", studies.obs["cell_type"])
    for labels in ("any", "shared"):
        options = {"train_on": "saved", "labels": labels, "n_repeats": 2}
        tested = protocols.carry_over(studies, **options)
        for split, before in zip(protocols.carry_over(studies, **options, aside=True), tested, strict=True):
            assert (learns(split), set(split.validation)) == (learns(before), set(before.validation))
            assert [*split.test, *split.aside] == list(before.test)
            assert set(split.aside) == {cell for cell in before.test if not away[cell]} != set()
            assert away[split.test].all()


def test_a_cell_set_aside_neither_trains_nor_is_tested(studies):
    names = studies.obs_names
    split = protocols.make_split(studies, names[:60], names[60:80], "x", aside=names[80:], seed=2)
    assert set(split.aside) == set(names[80:])
    assert (
        names_of([split])[0][:6]
        == names_of([protocols.make_split(studies, names[:60], names[60:80], "x", seed=2)])[0][:6]
    )
    for number in (5, 65):
        with pytest.raises(ValueError, match=rf"1 cells are in more than one of .* \(first: {names[number]}\)"):
            protocols.make_split(studies, names[:60], names[60:80], aside=[names[number]])


def test_of_tested_cells_and_then_of_those_aside_it_is_said_which_have_an_unseen_label(studies):
    labels = studies.obs["cell_type"].astype(str)
    a, b, c = (studies.obs_names[labels == name] for name in "ABC")
    split = protocols.Split("", 0, 0, a[:5], a[5:8], np.array([*b[:2], a[10]]), np.array([a[11], c[0], a[12]]))
    assert protocols.find_unseen(studies, split).tolist() == [True, True, False, False, True, False]
    assert protocols.find_unseen(studies, split._replace(aside=split.aside[:0])).tolist() == [True, True, False]


# Between simulated studies


def test_between_studies_of_a_saved_split_only_pool_cells_train_and_only_test_cells_are_tested(studies, saved):
    study = studies.obs["study"].astype(str)
    split = protocols.between_studies(studies, "saved", train="s1", test="s2", protocol="to s2", repeat=4)
    assert split[:3] == ("to s2", 4, 0)
    s1, s2 = (set(studies.obs_names[study == name]) for name in ("s1", "s2"))
    assert learns(split) == s1 - saved
    assert set(split.test) == s2 & saved
    assert set(split.aside) == s1 & saved
    other = protocols.between_studies(studies, "saved", train="s1", test="s2", protocol="to s2", repeat=5)
    assert set(other.validation) != set(split.validation)
    assert (set(other.test), set(other.aside)) == (set(split.test), set(split.aside))


def test_between_studies_of_another_set_an_eighth_is_set_aside_and_all_of_the_other_study_is_tested(studies):
    study, labels = studies.obs["study"].astype(str), studies.obs["cell_type"].astype(str)
    splits = [protocols.between_studies(studies, "mine", train="s3", test="s1", repeat=repeat) for repeat in (0, 1)]
    for split in splits:
        assert set(split.test) == set(studies.obs_names[study == "s1"])
        assert learns(split) | set(split.aside) == set(studies.obs_names[study == "s3"])
        assert labels[split.aside].value_counts().to_dict() == {
            name: n // 8 for name, n in labels[study == "s3"].value_counts().items() if n >= 8
        }
        assert set(labels[split.test[protocols.find_unseen(studies, split)[: len(split.test)]]]) == {"D"}  # not in s3
    assert set(splits[0].aside) != set(splits[1].aside)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"train": "s9"}, "There is no study 's9': there are s1, s2, s3"),
        ({"test": ""}, "There is no study '': there are s1, s2, s3"),
        ({"test": "s1"}, "cells are in more than one of training, validation and test"),
    ],
)
@pytest.mark.parametrize("data", ["mine", "saved"])
def test_studies_between_which_nothing_can_be_carried_are_refused(studies, saved, data, options, reason):
    with pytest.raises(ValueError, match=reason):
        protocols.between_studies(studies, data, **({"train": "s1", "test": "s2"} | options))


def test_between_simulated_studies_no_cell_of_the_saved_test_part_trains(studies, saved):
    from scbert.sources.simulate import simulate_studies

    del studies.obs["study"]
    dealt = simulate_studies(studies[studies.obs["cell_type"] != "D"].copy(), n_studies=2, seed=1)
    one, other = sorted(set(dealt.obs["study"]))
    split = protocols.between_studies(dealt, "saved", train=one, test=other)
    assert not learns(split) & saved
    assert {*split.test, *split.aside} == saved & set(dealt.obs_names)


# Types held out

TYPES = ("A", "B", "C", "D", "E", "F")


@pytest.fixture
def types(make_cells):
    """156 cells of six types, 48 to 10, in an order of their own."""
    adata = make_cells(156)
    adata.obs["cell_type"] = np.repeat(TYPES, [48, 36, 24, 20, 18, 10])
    return adata[np.random.default_rng(1).permutation(156)].copy()


@pytest.fixture
def saved_types(types, monkeypatch):
    """A third of each type, by name, as the saved split of the set "saved"."""
    labels = types.obs["cell_type"].astype(str)
    tested = {cell for name in TYPES for cell in np.sort(labels.index[labels == name])[::3]}

    def load_split(adata, name):
        assert name == "saved"
        is_test = adata.obs_names.isin(tested)
        return np.flatnonzero(~is_test), np.flatnonzero(is_test)

    monkeypatch.setattr(protocols, "saved_splits", lambda: ["saved"])
    monkeypatch.setattr(protocols, "load_split", load_split)
    return tested


def pairs(splits):
    """Return {(repeat, name): (held-out split, its tuning split or None)}."""
    found = {(split.repeat, *split.protocol.split(":", 1)[::-1]): split for split in splits}
    return {
        (repeat, name): (split, found.get((repeat, name, "tuning")))
        for (repeat, name, kind), split in found.items()
        if kind == "held_out"
    }


HELD = {"together": ["B", "E"], "alone": ["A", "E"]}


@pytest.mark.parametrize("data", ["mine", "saved"])
def test_types_held_out_are_in_no_part_but_the_tested_and_there_all_of_them(types, saved_types, data):
    labels = types.obs["cell_type"].astype(str)
    splits = protocols.hold_out_types(types, data, **HELD, n_repeats=2)
    assert [(split.protocol, split.repeat) for split in splits] == [
        (f"{kind}:{name}", repeat)
        for repeat in (0, 1) for name in ("together", "A", "E") for kind in ("held_out", "tuning")
    ]  # fmt: skip
    for (_, name), (held, tuning) in pairs(splits).items():
        out = set(HELD["together"]) if name == "together" else {name}
        for split in (held, tuning):
            assert not out & set(labels[[*sorted(learns(split)), *split.aside]])
        assert set(labels[held.train]) == set(TYPES) - out
        unseen = protocols.find_unseen(types, held)
        n = len(held.test)
        assert set(labels[held.test[unseen[:n]]]) == out
        assert not unseen[n:].any()
        assert set(labels[held.test]) == set(TYPES)  # known types are tested beside them
        novel = set(held.test[unseen[:n]])
        everything = set(types.obs_names[labels.isin(out).to_numpy()])
        assert novel == (everything & saved_types if data == "saved" else everything)
        sizes = labels[[*sorted(learns(held)), *held.aside]].value_counts()
        assert labels[held.aside].value_counts().to_dict() == {
            name: size // 8 for name, size in sizes.items() if size >= 8
        }


@pytest.mark.parametrize("data", ["mine", "saved"])
def test_a_threshold_is_tuned_on_other_cells_and_other_new_types_than_those_tested(types, saved_types, data):
    labels = types.obs["cell_type"].astype(str)
    splits = protocols.hold_out_types(types, data, **HELD, n_repeats=2)
    for (_, name), (held, tuning) in pairs(splits).items():
        out = set(HELD["together"]) if name == "together" else {name}
        used = learns(tuning) | set(tuning.test) | set(tuning.aside)
        assert not used & set(held.test)
        assert not out & set(labels[sorted(used)])
        if data == "saved":
            assert not used & saved_types
        assert used == learns(held) | set(held.aside)
        known = set(TYPES) - out
        new = known - set(labels[tuning.train])
        assert len(new) == len(known) // 3
        unseen = protocols.find_unseen(types, tuning)
        assert set(labels[tuning.test[unseen]]) == new
        assert set(tuning.test[unseen]) == {cell for cell in used if labels[cell] in new}
        assert set(tuning.test[~unseen]) == {cell for cell in held.aside if labels[cell] not in new}
        assert (~unseen).any()


def test_of_a_saved_split_the_tested_are_the_same_whatever_is_held_out_or_drawn(types, saved_types):
    for seed in (0, 1):
        splits = protocols.hold_out_types(types, "saved", **HELD, n_repeats=2, seed=seed)
        assert all(set(held.test) == saved_types for held, _ in pairs(splits).values())
        assert not any(learns(split) & saved_types for split in splits)


def test_what_is_held_out_beside_leaves_a_split_as_it_was(types, saved_types):
    few = names_of(protocols.hold_out_types(types, "mine", together=[], alone=["E"]))
    more = names_of(protocols.hold_out_types(types, "mine", together=["B"], alone=["A", "E"], n_repeats=2))
    assert len(few) == 2
    assert set(few) < set(more)


@pytest.mark.parametrize("data", ["mine", "saved"])
def test_of_another_set_all_is_tested_and_what_one_set_teaches_lacks_the_types_held_out(types, saved_types, data):
    labels = types.obs["cell_type"].astype(str)
    types.obs["study"] = np.where(np.arange(156) % 3 == 0, "other", data)
    types = types[~((types.obs["study"] == data) & (labels == "F"))].copy()  # it never was in the training set
    labels, away = labels[types.obs_names], types.obs["study"] == "other"
    splits = protocols.hold_out_types(types, "a name", train_on=data, together=["F", "B"], alone=["C"], n_repeats=2)
    assert len(splits) == 8
    for (_, name), (held, tuning) in pairs(splits).items():
        out = {"F", "B"} if name == "together" else {"C"}
        assert set(held.test) == set(types.obs_names[away])
        assert set(labels[held.train]) == set("ABCDE") - out
        at_home = learns(held) | set(held.aside)
        assert not away[sorted(at_home)].any()
        assert not at_home & saved_types if data == "saved" else len(at_home)
        n = len(held.test)
        assert set(labels[held.test[protocols.find_unseen(types, held)[:n]]]) == out | {"F"}
        assert learns(tuning) | set(tuning.test) == at_home


def test_no_threshold_is_tuned_where_fewer_than_two_types_would_train(types):
    few = types[types.obs["cell_type"].isin(["A", "B", "C"])].copy()
    splits = protocols.hold_out_types(few, "mine", together=["C"], alone=[])
    assert [split.protocol for split in splits] == ["held_out:together"]
    four = types[types.obs["cell_type"].isin(["A", "B", "C", "D"])].copy()
    splits = protocols.hold_out_types(four, "mine", together=["C"], alone=[])
    assert [split.protocol for split in splits] == ["held_out:together", "tuning:together"]
    assert len(set(four.obs["cell_type"][splits[1].train])) == 2


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (
            {"together": ["A", "X"]},
            r"obs\['cell_type'\] lacks the type 'X' to be held out. There are: A, B, C, D, E, F\.",
        ),
        ({"together": [], "alone": ["Y"]}, "lacks the type 'Y'"),
        ({"together": list("ABCDE")}, "held_out:together leaves 1 labels of two cells or more to learn"),
        ({"together": list("ABCDEF")}, "held_out:together leaves 0 labels of two cells or more to learn"),
    ],
)
def test_types_that_cannot_be_held_out_are_refused(types, options, reason):
    with pytest.raises(ValueError, match=reason):
        protocols.hold_out_types(types, "mine", **options)


def test_types_to_hold_out_are_read_from_two_parameters(types):
    read = novel_types.read_held_out
    assert read("B, E", "", types) == (["B", "E"], [])
    assert read(" A ", "held_out", types) == (["A"], ["A"])
    assert read("auto", "held_out", types) == (["B"], ["B"])  # A, B, C, D have 20 cells or more
    assert read("auto", "all", types, minimum=10) == (["B", "E"], list(TYPES))
    assert read("B", "all", types) == (["B"], ["A", "B", "C", "D"])
    types.obs["kind"] = types.obs["cell_type"].map(lambda name: "B, naive" if name == "B" else name)
    assert read("B, naive", "", types, label_key="kind") == (["B, naive"], [])
    types.obs["even"] = np.repeat(["x", "z", "y", "w"], 39)  # ties go by name
    assert read("auto", "all", types, label_key="even") == (["x"], ["w", "x", "y", "z"])


def test_of_another_set_those_types_are_held_out_that_the_training_set_lacks(types):
    types.obs["study"] = np.where(np.arange(156) % 2 == 0, "other", "first")
    less = types[~((types.obs["study"] == "first") & types.obs["cell_type"].isin(["F", "C"]))].copy()
    assert novel_types.read_held_out("auto", "all", less, train_on="first") == (["C", "F"], [])
    assert novel_types.read_held_out("A", "held_out", less, train_on="first") == (["A"], [])
    with pytest.raises(ValueError, match="finds no type to hold out, since the training set has all types: name types"):
        novel_types.read_held_out("auto", "", types, train_on="first")


def test_one_of_the_types_or_any_named_can_be_alone(types):
    names = sorted(set(types.obs["cell_type"].astype(str)))
    assert novel_types.read_held_out(", ".join(names[:2]), "last", types) == (names[:2], names[1:2])
    assert novel_types.read_held_out(names[0], ", ".join(names[1:3]), types) == (names[:1], names[1:3])


def test_types_that_cannot_be_read_are_refused(types):
    with pytest.raises(
        ValueError, match="alone must be last, held_out, all, empty, or types with commas between them, not 'each'"
    ):
        novel_types.read_held_out("A", "each", types)
    with pytest.raises(ValueError, match="finds no type to hold out, since fewer than two have 40 cells: name types"):
        novel_types.read_held_out("auto", "", types, minimum=40)


def test_cells_set_aside_come_back_from_the_file_of_their_splits(types, saved_types, tmp_path):
    splits = protocols.hold_out_types(types, "saved", **HELD)
    protocols.save_splits(splits, tmp_path / "splits.csv.gz")
    back = read_splits(tmp_path / "splits.csv.gz")
    assert [split.protocol for split in back] == [split.protocol for split in splits]
    for one, other in zip(splits, back, strict=True):
        assert [list(part) for part in one[3:]] == [list(part) for part in other[3:]]
    assert [len(split.aside) > 0 for split in back] == [True, False] * 3
    table = pd.read_csv(tmp_path / "splits.csv.gz")
    table[table["part"] != "aside"].to_csv(tmp_path / "old.csv.gz", index=False)
    old = read_splits(tmp_path / "old.csv.gz")
    assert [(list(split.test), list(split.aside)) for split in old] == [(list(split.test), []) for split in splits]
