# ruff: noqa: F811
"""Calibration and prediction sets, each against another way to compute it, or a simulated truth."""

import numpy as np
import pandas as pd
import pytest
from scipy import optimize, special, stats
from test_novelty import LABELS, draw_cells, kept  # noqa: F401 (a fixture)

from scbert import calibration


@pytest.mark.parametrize("scale", [0.5, 1.0, 3.0])
def test_the_temperature_undoes_what_logits_were_multiplied_by(scale):
    truth, logits = draw_cells(4000, scale=scale)
    fitted = calibration.fit_temperature(logits, truth)
    assert fitted == pytest.approx(scale, rel=0.1)

    def loss(temperature):
        p = special.softmax(logits.to_numpy() / temperature, axis=1)
        return -np.log(p[np.arange(len(p)), logits.columns.get_indexer(truth)]).mean()

    assert loss(fitted) <= loss(optimize.brute(lambda t: loss(t[0]), [(0.3, 5)], Ns=200)[0]) + 1e-6


def test_cells_of_unknown_labels_calibrate_nothing():
    truth, logits = draw_cells(20, novel=2)
    with pytest.raises(ValueError, match="No known label: new"):
        calibration.fit_temperature(logits, truth)
    with pytest.raises(ValueError, match="no cells to calibrate on"):
        calibration.fit_temperature(logits[:0], truth[:0])


def test_the_calibration_error_is_that_of_torchmetrics():
    metrics = pytest.importorskip("torchmetrics.functional.classification", reason="torchmetrics is not installed")
    torch = pytest.importorskip("torch")
    truth, logits = draw_cells(500, scale=2.5)
    column = torch.from_numpy(logits.columns.get_indexer(truth))
    p = torch.from_numpy(special.softmax(logits.to_numpy(), axis=1))
    theirs = metrics.multiclass_calibration_error(p, column, num_classes=3, n_bins=15, norm="l1")
    assert calibration.measure_calibration(logits, truth)["value"] == pytest.approx(float(theirs), abs=1e-6)


@pytest.mark.parametrize(("scale", "least"), [(1.0, 56), (2.5, 50)])
def test_the_interval_of_the_calibration_error_holds_the_true_one(scale, least):
    """The true one is that of a million cells; simulated, 60 times 300 cells."""
    truth, logits = draw_cells(1_000_000, scale=scale, seed=1)
    true = calibration.measure_calibration(logits, truth, n_resamples=1)["value"]
    found = [
        calibration.measure_calibration(logits[i : i + 300], truth[i : i + 300], n_resamples=300, seed=i)
        for i in range(0, 60 * 300, 300)
    ]
    assert sum(one["low"] <= true <= one["high"] for one in found) >= least
    if scale == 1:  # of a perfect method, all of the value is by chance
        assert np.mean([one["value"] for one in found]) == pytest.approx(
            np.mean([o["by_chance"] for o in found]), rel=0.1
        )
    assert all(one["low"] <= one["value"] <= one["high"] and one["n"] == 300 for one in found)


def test_the_reliability_table_holds_all_cells_and_its_error_is_the_calibration_error():
    truth, logits = draw_cells(400, scale=2)
    table = calibration.tabulate_reliability(logits, truth)
    assert table["n"].sum() == 400
    error = (np.abs(table["confidence"] - table["accuracy"]) * table["n"]).sum() / 400
    assert error == pytest.approx(calibration.measure_calibration(logits, truth, n_resamples=1)["value"])
    assert ((table["low"] <= table["accuracy"]) & (table["accuracy"] <= table["high"])).all()


@pytest.mark.parametrize("n_aside", [9, 25, 200])
def test_sets_cover_what_they_promise_and_not_much_more(n_aside):
    truth, logits = draw_cells(200_000, scale=3, seed=2)  # too sure of itself: coverage does not care
    covered = []
    for start in range(0, 300 * (n_aside + 100), n_aside + 100):
        aside, test = slice(start, start + n_aside), slice(start + n_aside, start + n_aside + 100)
        sets = calibration.predict_sets(logits[test], calibration.find_quantile(logits[aside], truth[aside], 0.9))
        covered.append(sets.to_numpy()[np.arange(100), sets.columns.get_indexer(truth[test])].mean())
    expected = np.ceil((n_aside + 1) * 0.9) / (n_aside + 1)
    error = stats.beta(*(k := np.ceil((n_aside + 1) * 0.9), n_aside + 1 - k)).std() / np.sqrt(300)
    assert np.mean(covered) == pytest.approx(expected, abs=4 * (error + 0.002))


def test_too_few_cells_aside_leave_every_label_in_every_set():
    truth, logits = draw_cells(8)
    quantile = calibration.find_quantile(logits, truth, 0.9)
    assert quantile == np.inf
    assert calibration.predict_sets(logits, quantile).all(axis=None)
    with pytest.raises(ValueError, match="between 0 and 1"):
        calibration.find_quantile(logits, truth, 90)


def test_sets_are_measured_on_known_types_and_novel_ones_apart():
    sets = pd.DataFrame([[1, 0, 0], [1, 1, 0], [0, 0, 0], [0, 0, 0], [0, 1, 0]], columns=LABELS).astype(bool)
    found = calibration.measure_sets(sets, ["a", "c", "b", "new", "new"], [True, True, True, False, False], n_aside=20)
    expected = {"coverage": 1 / 3, "one_label": 1 / 3, "empty": 1 / 3, "set_size": 1}
    expected |= {"novel_empty": 0.5, "novel_one_label": 0.5}
    assert found["value"].to_dict() == pytest.approx(expected)
    assert found["n"].to_dict() == {name: 2 if name.startswith("novel") else 3 for name in expected}
    low, high = stats.beta.ppf([0.025, 0.975], [1, 2], [3, 2])  # Clopper-Pearson of 1 of 3
    assert tuple(found.loc["coverage", ["low", "high"]]) == pytest.approx((low, high))
    assert found.loc["coverage", "expected_low"] <= 0.9 <= found.loc["coverage", "expected_high"]


def test_coverage_is_where_it_is_expected_in_95_of_100_cases():
    truth, logits = draw_cells(60_000, seed=3)
    covered = []
    for start in range(0, 60_000, 150):
        aside, test = slice(start, start + 50), slice(start + 50, start + 150)
        sets = calibration.predict_sets(logits[test], calibration.find_quantile(logits[aside], truth[aside], 0.8))
        covered.append(sets.to_numpy()[np.arange(100), sets.columns.get_indexer(truth[test])].mean())
    expected = calibration.measure_sets(sets, truth[test], np.ones(100, bool), n_aside=50, level=0.8).loc["coverage"]
    inside = [expected["expected_low"] <= share <= expected["expected_high"] for share in covered]
    assert 0.92 <= np.mean(inside) <= 0.985  # 400 cases; a range of whole cells holds a little more


def test_jobs_are_calibrated_on_cells_set_aside_and_measured_on_test_cells(kept):
    table = calibration.calibrate_jobs(kept, 0.8)
    own = table.loc[("set", "x/y", "scbert")]
    errors, temperatures = [], []
    for repeat in (0, 1):
        one = kept["set", "held_out:x/y", repeat, "scbert"]
        aside, known = one.cells["part"] == "aside", (one.cells["part"] == "test") & one.cells["seen"]
        temperatures.append(calibration.fit_temperature(one.logits[aside], one.cells.loc[aside, "truth"]))
        errors.append(calibration.measure_calibration(one.logits[known], one.cells.loc[known, "truth"])["value"])
    assert own.loc["temperature", "value"] == pytest.approx(np.mean(temperatures))
    assert own.loc["calibration_error", "value"] == pytest.approx(np.mean(errors))
    assert own.loc["calibration_error_scaled", "value"] < own.loc["calibration_error", "value"]  # logits were doubled
    assert own.loc["coverage", "n"] == 160
    assert own.loc["novel_empty", "n"] == 40
