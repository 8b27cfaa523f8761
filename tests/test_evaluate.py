"""Splits that never overlap, baselines that behave, metrics that equal scikit-learn's."""

from functools import partial

import anndata
import numpy as np
import pandas as pd
import pytest
import sklearn.metrics

import scbert
from scbert import evaluate

SIZES = {"common": 60, "middle": 25, "rare": 5}


@pytest.fixture
def labels():
    """90 labels in random order, the rarest five times."""
    return np.random.default_rng(0).permutation(np.repeat(list(SIZES), list(SIZES.values())))


# Splits


@pytest.mark.parametrize("n_folds", [1, 2, 5])
def test_training_validation_and_test_never_overlap_and_leave_no_cell_out(labels, n_folds):
    splits = evaluate.stratified_splits(labels, n_folds)
    assert len(splits) == n_folds
    for parts in splits:
        assert sorted(np.concatenate(parts)) == list(range(90))
        assert all((np.diff(part) > 0).all() for part in parts)


def test_each_cell_is_tested_once(labels):
    tests = [test for _, _, test in evaluate.stratified_splits(labels, 5)]
    assert sorted(np.concatenate(tests)) == list(range(90))


def test_each_part_has_its_share_of_each_label(labels):
    for train, validation, test in evaluate.stratified_splits(labels, 5):
        assert len(test) == 18
        assert len(validation) == 9
        assert pd.Series(labels[test]).value_counts().to_dict() == {"common": 12, "middle": 5, "rare": 1}
        for part in (train, validation):
            shares = pd.Series(labels[part]).value_counts(normalize=True)
            assert abs(shares["common"] - 60 / 90) < 0.12


def test_splits_follow_from_the_seed(labels):
    first, again, other = (evaluate.stratified_splits(labels, 5, seed) for seed in (0, 0, 1))
    assert all((a == b).all() for a, b in zip(first[0], again[0], strict=True))
    assert first[0][2].tolist() != other[0][2].tolist()


def test_one_split_is_the_first_of_five_folds(labels):
    assert (evaluate.stratified_splits(labels, 1)[0][2] == evaluate.stratified_splits(labels, 5)[0][2]).all()


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
        evaluate.stratified_splits(["a"] * 20 + ["b"] * n_cells, n_folds)


@pytest.mark.parametrize(("n_folds", "n_cells"), [(1, 5), (2, 4), (3, 3)])
def test_just_enough_cells_of_a_label_are_split(n_folds, n_cells):
    assert len(evaluate.stratified_splits(["a"] * 20 + ["b"] * n_cells, n_folds)) == n_folds


def test_the_published_recipe_reports_on_validation_cells(labels):
    adata = anndata.AnnData(np.ones((len(labels), 2)), obs={"cell_type": labels})
    methods = {"majority": evaluate.fit_majority}
    _, validation, test = evaluate.stratified_splits(labels, 1)[0]
    for recipe, scored in ((scbert.Recipe.sound(), test), (scbert.Recipe.published(), validation)):
        rows = evaluate.cross_validate(adata, methods, n_folds=1, recipe=recipe)
        assert set(rows["cell"]) == set(adata.obs_names[scored])


def test_one_label_or_no_folds_are_refused(labels):
    with pytest.raises(ValueError, match="All cells have the label 'a'"):
        evaluate.stratified_splits(["a"] * 20)
    with pytest.raises(ValueError, match="n_folds must be at least 1, not 0"):
        evaluate.stratified_splits(labels, 0)


def test_a_cell_in_two_parts_is_an_error():
    evaluate.check_disjoint(["a", "b"], ["c"], ["d"])
    with pytest.raises(ValueError, match=r"1 cells are in more than one .* \(first: b\)"):
        evaluate.check_disjoint(["a", "b"], ["c"], ["b", "d"])


# Baselines


@pytest.fixture
def parts(make_cells):
    """Training, validation and test cells of labels that are easily told apart."""
    return [scbert.preprocess.tokenize(make_cells(n, seed=seed)) for seed, n in enumerate((60, 24, 30))]


def accuracy_of(predict, adata):
    return (predict(adata).idxmax(axis=1).to_numpy() == adata.obs["cell_type"].to_numpy()).mean()


def test_lognormalize_is_log1p_of_counts_per_10000_of_all_measured_genes(parts):
    expected = np.log1p(parts[0].X.toarray() / 2000 * 10_000)
    assert evaluate.lognormalize(parts[0]).toarray() == pytest.approx(expected)


def test_the_majority_says_the_commonest_label_with_its_share(parts):
    train, validation, test = parts
    train = train[np.flatnonzero((train.obs["cell_type"] == "Monocyte") | (np.arange(60) < 30))]
    predict = evaluate.fit_majority(train, validation, label_key="cell_type")
    assert set(predict(test).idxmax(axis=1)) == {"Monocyte"}
    assert predict(test).drop_duplicates().to_dict("records") == [{"Monocyte": 0.5, "B": 0.25, "T/NK": 0.25}]


def test_logistic_regression_learns_labels_that_can_be_told_apart(parts):
    train, validation, test = parts
    predict = evaluate.fit_logistic_regression(train, validation, label_key="cell_type")
    assert accuracy_of(predict, test) > 0.95
    assert predict(test).sum(axis=1).tolist() == pytest.approx([1] * 30)
    assert predict.chosen.split(", C=")[0] in ("l1", "l2")


def test_logistic_regression_does_not_learn_labels_drawn_by_lot(parts):
    for adata in parts:
        adata.obs["cell_type"] = np.random.default_rng(0).permutation(adata.obs["cell_type"].to_numpy())
    train, validation, test = parts
    predict = evaluate.fit_logistic_regression(train, validation, label_key="cell_type", strengths=(0.1,))
    assert accuracy_of(predict, test) < 0.6


@pytest.mark.parametrize("penalty", ["l1", "l2"])
def test_validation_cells_choose_penalty_and_strength(parts, penalty):
    train, validation, _ = parts
    fit = partial(evaluate.fit_logistic_regression, train, validation, label_key="cell_type", penalties=[penalty])
    assert fit(strengths=[1e-6, 1.0]).chosen == f"{penalty}, C=1"  # the first leaves nothing to tell labels by
    assert fit(strengths=[1.0, 1e-6]).chosen == f"{penalty}, C=1"


def test_l1_leaves_out_genes_that_l2_keeps(parts):
    train, validation, test = parts
    n_used = {}
    for penalty in ("l1", "l2"):
        fit = evaluate.fit_logistic_regression
        predict = fit(train, validation, label_key="cell_type", penalties=[penalty], strengths=[0.05])
        moved = []
        for gene in range(24):
            other = test.copy()
            other.X = other.X.toarray()
            other.X[:, gene] += 1
            moved.append(not np.allclose(predict(other), predict(test), atol=1e-12))
        n_used[penalty] = sum(moved)
    assert n_used["l1"] < n_used["l2"] == 24


def test_fit_scbert_learns_and_leaves_the_given_encoder_as_it_was(parts, config):
    train, validation, test = parts
    encoder = scbert.ScBert(config)
    before = {name: tensor.clone() for name, tensor in encoder.state_dict().items()}
    predict = evaluate.fit_scbert(
        train, validation, label_key="cell_type", encoder=encoder, pretrain_epochs=1, n_epochs=12,
        progress=False,
    )  # fmt: skip
    assert all((tensor == before[name]).all() for name, tensor in encoder.state_dict().items())
    assert accuracy_of(predict, test) > 0.6
    assert predict.classifier.labels == ["B", "Monocyte", "T/NK"]


def test_fit_scbert_continues_from_its_checkpoints(parts, config, tmp_path):
    train, validation, _ = parts
    fit = partial(
        evaluate.fit_scbert, train, validation, label_key="cell_type", encoder=config, pretrain_epochs=1, n_epochs=1,
        checkpoints=tmp_path, progress=False,
    )  # fmt: skip
    first, again = fit().classifier.state_dict(), fit().classifier.state_dict()
    assert sorted(path.name.split("-")[1] for path in tmp_path.iterdir()) == ["finetune.pt", "pretrain.pt"]
    assert all((tensor == again[name]).all() for name, tensor in first.items())


def test_cross_validation_gives_each_method_the_same_cells_and_never_the_tested_ones(cells):
    seen = []

    def fit_spy(train, validation, *, label_key, seed):
        seen.append((set(train.obs_names), set(validation.obs_names)))
        return evaluate.fit_majority(train, validation, label_key=label_key)

    predictions = evaluate.cross_validate(cells, {"majority": evaluate.fit_majority, "spy": fit_spy}, n_folds=3)
    assert predictions.columns.tolist() == ["method", "fold", "cell", "truth", "predicted", "confidence"]
    for _, rows in predictions.groupby("method"):
        assert sorted(rows["cell"]) == sorted(cells.obs_names)
        assert rows["truth"].tolist() == cells.obs.loc[rows["cell"], "cell_type"].astype(str).tolist()
    for fold, (train, validation) in enumerate(seen):
        in_fold = (predictions["fold"] == fold) & (predictions["method"] == "spy")
        tested = set(predictions.loc[in_fold, "cell"])
        assert len(tested) == 20
        assert not train & validation
        assert not (train | validation) & tested


def test_the_published_report_is_on_the_cells_that_chose_the_epoch(cells):
    methods = {"majority": evaluate.fit_majority}
    splits = evaluate.stratified_splits(cells.obs["cell_type"], 2)
    for report_on, part in (("validation", 1), ("test", 2)):
        recipe = scbert.Recipe(report_on=report_on)
        predictions = evaluate.cross_validate(cells, methods, n_folds=2, recipe=recipe)
        expected = [name for split in splits for name in cells.obs_names[split[part]]]
        assert predictions["cell"].tolist() == expected


# Metrics


@pytest.mark.parametrize("seed", range(5))
def test_accuracy_and_macro_f1_equal_those_of_scikit_learn(seed):
    random = np.random.default_rng(seed)
    truth, predicted = random.choice(["a", "b", "c", "d"], size=(2, 50), p=[0.5, 0.3, 0.15, 0.05])
    present = np.unique(truth)
    expected = sklearn.metrics.f1_score(truth, predicted, labels=present, average="macro")
    assert evaluate.accuracy(truth, predicted) == pytest.approx(sklearn.metrics.accuracy_score(truth, predicted))
    assert evaluate.macro_f1(truth, predicted) == pytest.approx(expected)


def test_macro_f1_counts_a_label_that_is_never_predicted_as_zero():
    assert evaluate.macro_f1(np.array(["a", "a", "b"]), np.array(["a", "a", "a"])) == pytest.approx((0.8 + 0) / 2)


def test_an_unassigned_cell_is_a_wrong_cell():
    truth, predicted = np.array(["a", "a", "b"]), np.array(["a", "Unassigned", "b"])
    assert evaluate.accuracy(truth, predicted) == pytest.approx(2 / 3)
    assert evaluate.macro_f1(truth, predicted) == pytest.approx((2 / 3 + 1) / 2)


def test_the_bootstrap_interval_is_that_of_the_binomial_and_follows_from_the_seed():
    right = np.arange(200) < 160
    first, again, other = (
        evaluate.bootstrap(evaluate.accuracy, right, np.ones(200, dtype=bool), seed=seed) for seed in (0, 0, 1)
    )
    assert first == again != other
    assert (first["value"], first["n"]) == (0.8, 200)
    half = 1.96 * np.sqrt(0.8 * 0.2 / 200)
    assert first["low"] == pytest.approx(0.8 - half, abs=0.01)
    assert first["high"] == pytest.approx(0.8 + half, abs=0.01)


def test_the_bootstrap_interval_covers_the_truth_about_95_times_in_100():
    random = np.random.default_rng(0)
    covered = 0
    for seed in range(100):
        right = random.random(150) < 0.7
        interval = evaluate.bootstrap(evaluate.accuracy, right, np.ones(150, bool), seed=seed, n_resamples=400)
        covered += interval["low"] <= 0.7 <= interval["high"]
    assert 88 <= covered <= 100


@pytest.fixture
def predictions():
    """Two methods on 50 cells: `good` has all right but two, `bad` calls them all a; c has 4 cells."""
    truth = ["a"] * 26 + ["b"] * 20 + ["c"] * 4
    cell = [f"cell{i}" for i in range(50)]
    good = pd.DataFrame({"method": "good", "cell": cell, "truth": truth, "predicted": ["b", *truth[1:-1], "a"]})
    bad = pd.DataFrame({"method": "bad", "cell": cell, "truth": truth, "predicted": "a"})
    return pd.concat([good, bad.sample(frac=1, random_state=0)], ignore_index=True)


def test_score_measures_each_method_with_and_without_rare_labels(predictions):
    table = evaluate.score(predictions)
    assert table.index.tolist() == [
        (method, metric) for method in ("good", "bad") for metric in ("accuracy", "macro_f1", "macro_f1_common")
    ]
    good = predictions.query("method == 'good'")
    f1 = sklearn.metrics.f1_score(good["truth"], good["predicted"], average=None)
    values = table["value"]
    assert values["good", "accuracy"] == pytest.approx(48 / 50)
    assert values["good", "macro_f1"] == pytest.approx(f1.mean())
    assert values["good", "macro_f1_common"] == pytest.approx(f1[:2].mean())
    assert values["bad", "accuracy"] == pytest.approx(26 / 50)
    assert values["bad", "macro_f1"] == pytest.approx((52 / 76) / 3)
    assert (table["low"] <= table["value"]).all()
    assert (table["value"] <= table["high"]).all()
    assert (table["n"] == 50).all()


def test_score_leaves_out_the_common_labels_where_there_are_none(predictions):
    assert "macro_f1_common" not in evaluate.score(predictions, rare=30).index.get_level_values("metric")


def test_compare_pairs_methods_by_cell(predictions):
    difference = evaluate.compare(predictions, "good", "bad")
    assert difference["value"] == pytest.approx(22 / 50)
    assert 0.25 < difference["low"] < 0.44 < difference["high"] < 0.6
    back = evaluate.compare(predictions, "bad", "good")
    assert back["value"] == pytest.approx(-22 / 50)
    again = predictions.query("method == 'good'").assign(method="again").sample(frac=1, random_state=1)
    same = evaluate.compare(pd.concat([predictions, again]), "good", "again")
    assert (same["value"], same["low"], same["high"], same["n"]) == (0, 0, 0, 50)


# The saved split


def test_a_set_without_a_saved_split_is_split_as_any_other(make_cells):
    adata = make_cells()
    for ours, usual in zip(
        evaluate.split_cells(adata, "mine.h5ad", n_folds=3, seed=1)[1],
        evaluate.stratified_splits(adata.obs["cell_type"], 3, 1)[1],
        strict=True,
    ):
        assert (ours == usual).all()


def test_the_saved_test_cells_are_tested_and_nothing_else_learns_from_them(make_cells, monkeypatch):
    adata = make_cells(60)
    test = np.arange(0, 60, 3)
    rest = np.setdiff1d(np.arange(60), test)
    monkeypatch.setattr(evaluate, "saved_splits", lambda: ["zheng_facs"])
    monkeypatch.setattr(evaluate, "load_split", lambda adata, name: (rest, test))
    adata.obs["cell_type"] = np.repeat(["A", "B"], 30)
    for seed in (0, 1):
        ((train, validation, tested),) = evaluate.split_cells(adata, "zheng_facs", seed=seed)
        assert (tested == test).all()
        assert sorted([*train, *validation]) == list(rest)
        assert set(adata.obs["cell_type"].iloc[validation]) == {"A", "B"}
    with pytest.raises(
        ValueError, match="zheng_facs has one saved split, whose test cells train nothing: n_folds must"
    ):
        evaluate.split_cells(adata, "zheng_facs", n_folds=5)


def test_cross_validation_takes_splits_that_were_made_before(make_cells):
    adata = make_cells(30)
    splits = [(np.arange(10), np.arange(10, 20), np.arange(20, 30))]
    predictions = evaluate.cross_validate(adata, {"majority": evaluate.fit_majority}, splits=splits)
    assert list(predictions["cell"]) == list(adata.obs_names[20:])
