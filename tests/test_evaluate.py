"""Metrics that equal scikit-learn's, and intervals that cover."""

import numpy as np
import pandas as pd
import pytest
import sklearn.metrics

from scbert import evaluate


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
