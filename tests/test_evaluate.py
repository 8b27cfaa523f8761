"""Metrics that equal scikit-learn's, and intervals that cover."""

import numpy as np
import pandas as pd
import pytest
import sklearn.metrics

from scbert import metrics


@pytest.mark.parametrize("seed", range(5))
def test_accuracy_and_macro_f1_equal_those_of_scikit_learn(seed):
    random = np.random.default_rng(seed)
    truth, predicted = random.choice(["a", "b", "c", "d"], size=(2, 50), p=[0.5, 0.3, 0.15, 0.05])
    present = np.unique(truth)
    expected = sklearn.metrics.f1_score(truth, predicted, labels=present, average="macro")
    assert metrics.accuracy(truth, predicted) == pytest.approx(sklearn.metrics.accuracy_score(truth, predicted))
    assert metrics.macro_f1(truth, predicted) == pytest.approx(expected)


def test_macro_f1_counts_a_label_that_is_never_predicted_as_zero():
    assert metrics.macro_f1(np.array(["a", "a", "b"]), np.array(["a", "a", "a"])) == pytest.approx((0.8 + 0) / 2)


def test_an_unassigned_cell_is_a_wrong_cell():
    truth, predicted = np.array(["a", "a", "b"]), np.array(["a", "Unassigned", "b"])
    assert metrics.accuracy(truth, predicted) == pytest.approx(2 / 3)
    assert metrics.macro_f1(truth, predicted) == pytest.approx((2 / 3 + 1) / 2)


def test_the_bootstrap_interval_is_that_of_the_binomial_and_follows_from_the_seed():
    right = np.arange(200) < 160
    first, again, other = (
        metrics.bootstrap(metrics.accuracy, right, np.ones(200, dtype=bool), seed=seed) for seed in (0, 0, 1)
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
        interval = metrics.bootstrap(metrics.accuracy, right, np.ones(150, bool), seed=seed, n_resamples=400)
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
    table = metrics.score(predictions)
    assert table.index.tolist() == [(method, metric) for method in ("good", "bad") for metric in metrics.METRICS]
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
    assert (table["repeats"] == 1).all()


def test_score_leaves_out_the_common_labels_where_there_are_none(predictions):
    assert "macro_f1_common" not in metrics.score(predictions, rare=30).index.get_level_values("metric")


def test_compare_pairs_methods_by_cell(predictions):
    difference = metrics.compare(predictions, "good", "bad")
    assert difference["value"] == pytest.approx(22 / 50)
    assert 0.25 < difference["low"] < 0.44 < difference["high"] < 0.6
    back = metrics.compare(predictions, "bad", "good")
    assert back["value"] == pytest.approx(-22 / 50)
    again = predictions.query("method == 'good'").assign(method="again").sample(frac=1, random_state=1)
    same = metrics.compare(pd.concat([predictions, again]), "good", "again")
    assert (same["value"], same["low"], same["high"], same["n"]) == (0, 0, 0, 50)


def make_predictions(n_cells=60, n_repeats=1, n_folds=1, methods=("x", "y"), seed=0, sd_of_training=0.0):
    """Methods that are right in about four of five cells; the same cells are hard for all, in all repeats."""
    random = np.random.default_rng(seed)
    labels = np.array(["a", "b", "c", "d"])
    truth = labels[np.r_[0, 1, 2, 3, random.choice(4, n_cells - 4, p=[0.5, 0.3, 0.15, 0.05])]]
    ease = random.normal(0, 0.8, n_cells)
    rows = []
    for repeat in range(n_repeats):
        for method in methods:
            level = 0.84 + random.normal(0, sd_of_training)
            right = ease + random.normal(0, 0.6, n_cells) < level
            predicted = np.where(right, truth, labels[(np.searchsorted(labels, truth) + 1) % 4])
            cells = {"cell": [f"cell{i}" for i in range(n_cells)], "truth": truth, "predicted": predicted}
            rows.append(
                pd.DataFrame({"method": method, "repeat": repeat, "fold": np.arange(n_cells) % n_folds} | cells)
            )
    return pd.concat(rows)  # with an index that repeats, as `concat` leaves it


@pytest.mark.filterwarnings("ignore:y_pred contains classes not in y_true:UserWarning")
@pytest.mark.parametrize("seed", range(4))
def test_every_metric_of_score_is_that_of_scikit_learn(seed):
    predictions = make_predictions(seed=seed, methods=["x"]).replace({"predicted": {"d": "Unassigned"}})
    truth, predicted = predictions["truth"], predictions["predicted"]
    present = np.unique(truth)
    f1 = sklearn.metrics.f1_score(truth, predicted, labels=present, average=None, zero_division=0)
    values = metrics.score(predictions, rare=10, n_resamples=10).loc["x", "value"]
    common = [(truth == label).sum() >= 10 for label in present]
    assert 0 < sum(common) < 4
    expected = {
        "accuracy": sklearn.metrics.accuracy_score(truth, predicted),
        "macro_f1": f1.mean(),
        "macro_f1_common": f1[common].mean(),
        "balanced_accuracy": sklearn.metrics.balanced_accuracy_score(truth, predicted),
        "mcc": sklearn.metrics.matthews_corrcoef(truth, predicted),
    }
    assert values.to_dict() == pytest.approx(expected)


def test_precision_recall_and_f1_of_each_label_are_those_of_scikit_learn():
    predictions = make_predictions(methods=["x"]).replace({"predicted": {"d": "Unassigned"}})
    table = metrics.score_classes(predictions, n_resamples=50)
    truth, predicted = predictions["truth"], predictions["predicted"]
    *expected, n = sklearn.metrics.precision_recall_fscore_support(
        truth, predicted, labels=list("abcd"), zero_division=0
    )
    assert table.index.tolist() == [("x", label) for label in "abcd"]
    np.testing.assert_allclose(table[["precision", "recall", "f1"]].to_numpy().T, expected)
    assert table["n"].tolist() == n.tolist()
    never = table.loc[("x", "d")].drop("n")
    assert (never == 0).all()
    for name in ("precision", "recall", "f1"):
        assert (table[f"{name}_low"] <= table[name]).all()
        assert (table[name] <= table[f"{name}_high"]).all()
        assert ((table[f"{name}_high"] - table[f"{name}_low"]) > 0.02).sum() >= 2


def test_the_value_is_the_mean_over_repeats_of_pooled_folds_whatever_the_order_of_the_rows():
    predictions = make_predictions(n_repeats=3, n_folds=4)
    table = metrics.score(predictions, n_resamples=50)
    mine = predictions[predictions["method"] == "x"]
    each = [
        sklearn.metrics.f1_score(cells["truth"], cells["predicted"], average="macro")
        for _, cells in mine.groupby("repeat")
    ]
    assert table.loc[("x", "macro_f1"), "value"] == pytest.approx(np.mean(each))
    assert table.loc[("x", "macro_f1"), ["n", "repeats"]].tolist() == [60, 3]
    shuffled = metrics.score(predictions.sample(frac=1, random_state=0), n_resamples=50)
    pd.testing.assert_frame_equal(table, shuffled.reindex(table.index))


def test_repeats_may_test_other_cells_and_a_label_counts_where_it_is_tested():
    predictions = make_predictions(n_repeats=2, methods=["x"])
    second = (predictions["repeat"] == 1) & ((predictions["truth"] == "d") | (predictions["cell"] == "cell0"))
    table = metrics.score(predictions[~second], n_resamples=50)
    classes = metrics.score_classes(predictions[~second], n_resamples=50)
    assert table.loc[("x", "accuracy"), "n"] == 60
    assert table.notna().all(axis=None)
    assert classes.notna().all(axis=None)
    first = predictions[predictions["repeat"] == 0]
    recall = sklearn.metrics.recall_score(first["truth"], first["predicted"], labels=["d"], average=None)
    assert classes.loc[("x", "d"), "recall"] == pytest.approx(recall[0])


def test_a_label_of_one_cell_is_in_every_resample():
    truth = ["a"] * 99 + ["b"]
    predictions = pd.DataFrame({"method": "m", "cell": range(100), "truth": truth, "predicted": "a"})
    row = metrics.score(predictions).loc[("m", "balanced_accuracy")]
    assert (row["value"], row["low"], row["high"]) == (0.5, 0.5, 0.5)  # without b it would be 1
    assert metrics.score(predictions).loc[("m", "macro_f1"), "high"] <= 0.5
    assert metrics.score(predictions).loc[("m", "mcc"), ["value", "low", "high"]].tolist() == [0, 0, 0]


def test_cells_are_drawn_within_their_folds_where_all_repeats_have_the_same():
    rows = pd.DataFrame({"method": "m", "fold": [0] * 50 + [1] * 50, "cell": range(100), "truth": "a"})
    rows["predicted"] = ["a"] * 50 + ["b"] * 50
    within = metrics.score(rows).loc[("m", "accuracy")]
    across = metrics.score(rows.assign(fold=0)).loc[("m", "accuracy")]
    assert within["high"] - within["low"] < 1e-9  # each fold is all right or all wrong
    assert across["high"] - across["low"] == pytest.approx(2 * 1.96 * 0.05, abs=0.02)


def draw(*arguments, **options):
    return [np.concatenate(parts) for parts in zip(*metrics.draw_weights(*arguments, **options), strict=True)]


def test_weights_keep_the_size_of_a_stratum_are_never_zero_and_do_not_depend_on_the_block():
    strata, sizes = np.repeat([0, 1], [30, 10]), np.repeat([30, 6, 3, 1], [30, 6, 3, 1])
    cells, repeats = draw(strata, sizes, 4, 0, 50)
    for whole, parts in zip((cells, repeats), draw(strata, sizes, 4, 0, 50, block=7), strict=True):
        np.testing.assert_allclose(whole, parts, rtol=1e-12)
    assert (cells > 0).all()
    np.testing.assert_allclose(cells[:, :30].sum(1), 30)
    np.testing.assert_allclose(cells[:, 30:].sum(1), 10)
    np.testing.assert_allclose(repeats.sum(1), 1)


@pytest.mark.parametrize("n", [4, 10, 40])
def test_the_recall_of_a_label_of_few_cells_has_the_variance_of_a_mean_of_so_many(n):
    right = np.arange(n) < n // 2
    cells, _ = draw(np.zeros(n, int), np.full(n, n), 1, 0, 20_000)
    assert np.var(cells @ right / n) == pytest.approx(right.var(ddof=1) / n, rel=0.05)


def test_the_spread_over_repeats_has_the_variance_of_their_mean():
    effects = np.array([0.1, 0.5, 0.6, 0.2, 0.4])
    _, repeats = draw(np.zeros(1, int), np.ones(1, int), 5, 0, 20_000)
    assert np.var(repeats @ effects) == pytest.approx(effects.var(ddof=1) / 5, rel=0.05)


def test_intervals_of_a_crossed_design_cover_about_95_times_in_100():
    options, names = {"sd_of_training": 0.15, "methods": ["x"]}, ["accuracy", "macro_f1"]
    trainings = (make_predictions(4000, seed=10**6 + i, **options) for i in range(40))
    expected = pd.concat(metrics.score_trainings(each) for each in trainings)[names].mean()
    covered, of_one = np.zeros(2), np.zeros(2)
    for seed in range(100):
        predictions = make_predictions(200, 5, seed=seed, **options)
        one = predictions[predictions["repeat"] == 0]  # one training does not know of others
        for table, count in ((predictions, covered), (one, of_one)):
            rows = metrics.score(table, seed=seed, n_resamples=200).loc["x"].loc[names]
            count += (rows["low"] <= expected) & (expected <= rows["high"])
    assert (covered >= 89).all()
    assert (of_one < covered).all()


@pytest.mark.parametrize(("metric", "at_least"), [("accuracy", 90), ("macro_f1", 88)])
def test_the_paired_interval_of_equal_methods_covers_zero_about_95_times_in_100(metric, at_least):
    covered = 0
    for seed in range(100):
        found = metrics.compare(make_predictions(200, seed=seed), "x", "y", metric=metric, n_resamples=200, seed=seed)
        covered += found["low"] <= 0 <= found["high"]
    assert at_least <= covered <= 99


@pytest.mark.parametrize("metric", metrics.METRICS)
def test_compare_is_the_difference_of_scores_and_shorter_than_unpaired(metric):
    predictions = make_predictions(200, 2, 5)
    table = metrics.score(predictions, rare=5).xs(metric, level="metric")
    found = metrics.compare(predictions, "x", "y", metric=metric, rare=5)
    assert found["value"] == pytest.approx(table.loc["x", "value"] - table.loc["y", "value"])
    assert found["n"] == 200
    unpaired = np.hypot(*(table["high"] - table["low"]))
    assert 0 < found["high"] - found["low"] < unpaired


def test_compare_refuses_other_cells_unknown_methods_and_metrics(predictions):
    with pytest.raises(ValueError, match="named cell cell0 in repeat 0, fold 0"):
        metrics.compare(predictions.drop(index=0), "good", "bad")
    with pytest.raises(ValueError, match="No predictions of 'best': there are bad, good"):
        metrics.compare(predictions, "good", "best")
    with pytest.raises(ValueError, match="There is no metric 'f1': take one of accuracy, macro_f1"):
        metrics.compare(predictions, "good", "bad", metric="f1")
    with pytest.raises(ValueError, match="No label has 30 cells: macro_f1_common is not defined"):
        metrics.compare(predictions, "good", "bad", metric="macro_f1_common", rare=30)


def test_predictions_that_cannot_be_pooled_are_refused(predictions):
    two = pd.concat([predictions.assign(protocol="e1"), predictions.assign(protocol="e2")])
    with pytest.raises(ValueError, match=r"2 data sets or protocols \(e1, e2, ...\): take one at a time"):
        metrics.score(two)
    with pytest.raises(ValueError, match="Cell cell0 is named twice by good in one training"):
        metrics.score(pd.concat([predictions, predictions.head(1)]))
    with pytest.raises(ValueError, match="Cell cell0 has two true labels"):
        metrics.score(pd.concat([predictions, predictions.head(1).assign(method="new", truth="b")]))
    with pytest.raises(ValueError, match="need a column 'cell'"):
        metrics.score(predictions.drop(columns="cell"))
    with pytest.raises(ValueError, match="There are no predictions"):
        metrics.score(predictions.head(0))
    with pytest.raises(ValueError, match="no true or no predicted label"):
        metrics.score(predictions.replace({"predicted": {"a": None}}))


def test_score_trainings_measures_each_fold_of_each_data_set():
    predictions = make_predictions(80, 2, 2)
    both = pd.concat([predictions.assign(data="one"), predictions.assign(data="two", truth="a")])
    table = metrics.score_trainings(both)
    keys = ["data", "protocol", "repeat", "fold", "method"]
    assert table.columns.tolist() == [*keys, *metrics.METRICS, "n"]
    assert len(table) == 2 * 2 * 2 * 2
    part = predictions.query("method == 'y' and repeat == 1 and fold == 0")
    row = table.set_index(keys).loc[("one", "", 1, 0, "y")]
    assert row["n"] == len(part)
    assert row["accuracy"] == pytest.approx((part["truth"] == part["predicted"]).mean())
    labels = np.unique(part["truth"])
    f1 = sklearn.metrics.f1_score(part["truth"], part["predicted"], labels=labels, average="macro")
    assert row["macro_f1"] == pytest.approx(f1)
