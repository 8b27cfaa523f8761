"""Novelty: scores, thresholds and metrics, each against another way to compute it."""

import types
from collections import namedtuple

import numpy as np
import pandas as pd
import pytest
from scipy import special, stats
from sklearn.metrics import average_precision_score, roc_auc_score

from scbert import calibration, novel_types, novelty, protocols

Kept = namedtuple("Kept", "cells logits embedding distance")
LABELS = ["a", "b", "c"]


def draw_cells(n=300, *, scale=1.0, seed=0, novel=0):
    """Return true labels and logits of which the softmax, at temperature `scale`, is the truth; novel cells have low ones."""
    random = np.random.default_rng(seed)
    logits = random.normal(size=(n, 3)) * 2
    truth = np.array(LABELS, dtype="U3")[(special.softmax(logits, axis=1).cumsum(1) < random.random((n, 1))).sum(1)]
    logits[n - novel :] *= 0.3
    truth[n - novel :] = "new"
    return truth, pd.DataFrame(logits * scale, [f"cell{i}" for i in range(n)], LABELS)


def keep(n=200, *, novel=40, aside=100, seed=0, prefix=""):
    """Return what one training keeps: test cells, novel ones among them, and cells set aside."""
    truth, logits = draw_cells(n, novel=novel, seed=seed, scale=2)
    truth_aside, logits_aside = draw_cells(aside, seed=seed + 1000, scale=2)
    logits = pd.concat([logits, logits_aside]).set_axis([f"{prefix}{i}" for i in range(n + aside)])
    truth = [*truth, *truth_aside]
    p = special.softmax(logits.to_numpy(), axis=1)
    cells = pd.DataFrame(
        {"truth": truth, "predicted": np.array(LABELS)[p.argmax(1)], "confidence": p.max(1)}, index=logits.index
    ).assign(part=["test"] * n + ["aside"] * aside, seen=[label != "new" for label in truth])
    return Kept(cells, logits, np.zeros((n + aside, 2)), np.abs(logits.to_numpy()).sum(1))


@pytest.fixture
def kept():
    return {
        ("set", f"{purpose}:x/y", repeat, method): keep(seed=i)
        for i, (purpose, repeat, method) in enumerate(
            (purpose, repeat, method)
            for purpose in ("held_out", "tuning")
            for repeat in (0, 1)
            for method in ("scbert", "majority")
        )
    }


def test_each_score_is_larger_where_probabilities_are_flatter():
    logits = pd.DataFrame([[9.0, 0, 0], [1, 0, 0], [0, 0, 0]], index=["x", "y", "z"], columns=LABELS)
    scores = novelty.score_cells(logits, distance=[0, 1, 2], temperature=2)
    assert tuple(scores) == novelty.SCORES
    assert (scores.drop(columns="energy").diff().iloc[1:] > 0).all(axis=None)
    assert list(scores.index) == ["x", "y", "z"]
    p = np.exp(1) / (np.exp(1) + 2)
    assert scores.loc["y", "max_probability"] == pytest.approx(1 - p)
    assert scores.loc["y", "margin"] == pytest.approx(1 - (p - (1 - p) / 2))
    assert scores.loc["y", "entropy"] == pytest.approx(stats.entropy([p, (1 - p) / 2, (1 - p) / 2], base=3))
    assert scores.loc["y", "temperature"] == pytest.approx(1 - np.exp(0.5) / (np.exp(0.5) + 2))
    np.testing.assert_allclose(scores["energy"], -np.log(np.exp(logits).sum(axis=1)))
    np.testing.assert_allclose(scores.loc["z", ["max_probability", "margin", "entropy"]].to_numpy(float), [2 / 3, 1, 1])


@pytest.mark.parametrize("logits", [[[0.0, -np.inf]], [[np.nan, 1]], [[1.0], [2.0]]])
def test_logits_that_are_none_are_refused(logits):
    with pytest.raises(ValueError, match="at least two labels"):
        novelty.score_cells(np.array(logits))


def test_the_chosen_threshold_is_the_best_of_all():
    random = np.random.default_rng(0)
    for _ in range(30):
        scores, novel = random.integers(6, size=12) / 6, np.arange(12) % 3 == 0

        def balanced(threshold, scores=scores, novel=novel):
            return ((scores > threshold)[novel].mean() + (scores <= threshold)[~novel].mean()) / 2

        chosen = novelty.choose_threshold(scores, novel)
        tried = np.arange(-1, 12) / 12  # between all scores, and at them
        assert balanced(chosen) == pytest.approx(max(map(balanced, tried)))
        higher = scores[scores > chosen]  # of several best ones, the largest
        assert all(balanced(threshold) < balanced(chosen) - 1e-12 for threshold in higher)


def test_a_threshold_without_information_leaves_no_cell_unassigned():
    assert novelty.choose_threshold([0.4, 0.4, 0.4], [True, False, False]) == 0.4
    assert novelty.choose_threshold([1, 2, 3, 4.0], [False, False, True, True]) == 2.5
    with pytest.raises(ValueError, match="both kinds"):
        novelty.choose_threshold([1, 2], [True, True])


def test_ranking_under_weights_is_that_of_scikit_learn_with_ties():
    random = np.random.default_rng(0)
    score, novel = random.integers(20, size=200) / 20, random.random(200) < 0.3
    weights = random.exponential(size=(5, 200))
    auroc, aupr = novelty._rank_cells(score, novel, weights)
    for i in range(5):
        assert auroc[i] == pytest.approx(roc_auc_score(novel, score, sample_weight=weights[i]))
        assert aupr[i] == pytest.approx(average_precision_score(novel, score, sample_weight=weights[i]))


def measured_by_hand(part, score, threshold):
    """Return the metrics of one training at a threshold, cell by cell."""
    novel, unassigned = ~part["seen"].to_numpy(), part[score].to_numpy() > threshold
    right = (part["truth"] == part["predicted"]).to_numpy()
    return {
        "jaccard": (novel & unassigned).sum() / (novel | unassigned).sum(),
        "recall": unassigned[novel].mean(),
        "kept": 1 - unassigned[~novel].mean(),
        "known_accuracy": (right & ~unassigned)[~novel].mean(),
        "balanced_accuracy": (unassigned[novel].mean() + 1 - unassigned[~novel].mean()) / 2,
    }


def test_metrics_are_means_over_repeats_of_those_counted_by_hand(kept):
    cells = novel_types.score_jobs(kept)
    thresholds = novelty.choose_thresholds(cells)
    table = novel_types.measure_all(cells, thresholds).sort_index()
    test = cells[(cells["purpose"] == "held_out") & (cells["part"] == "test")]
    for (method, score, rule), of in thresholds.groupby(["method", "score", "rule"]):
        parts = [test[(test["method"] == method) & (test["repeat"] == row.repeat)] for row in of.itertuples()]
        by_hand = [measured_by_hand(part, score, at) for part, at in zip(parts, of["threshold"], strict=True)]
        found = table.loc[("set", "x/y", method, score, rule)]["value"].to_dict()
        assert found == pytest.approx(pd.DataFrame(by_hand).mean().to_dict())
        auroc = np.mean([roc_auc_score(~part["seen"].astype(bool), part[score]) for part in parts])
        assert table.loc[("set", "x/y", method, score, "", "auroc"), "value"] == pytest.approx(auroc)
    assert ((table["low"] <= table["value"] + 1e-9) & (table["value"] <= table["high"] + 1e-9)).all()
    assert set(thresholds["rule"]) == {"tuned", "paper", "best"}
    assert set(thresholds.loc[thresholds["rule"] == "paper", "score"]) == {"max_probability", "temperature"}
    assert table.xs("recall", level="metric")["n"].unique() == [40]
    assert table.xs("known_accuracy", level="metric")["n"].unique() == [160]


def test_tuned_thresholds_come_from_the_tuning_training_alone(kept):
    cells = novel_types.score_jobs(kept)
    before = novelty.choose_thresholds(cells)
    held_out = cells["purpose"] == "held_out"
    cells.loc[held_out, list(novelty.SCORES)] = 1 - cells.loc[held_out, list(novelty.SCORES)]
    after = novelty.choose_thresholds(cells)
    same = before["threshold"] == after["threshold"]
    assert same[before["rule"] == "tuned"].all()
    assert not same[before["rule"] == "best"].any()


def test_intervals_hold_the_truth_as_often_as_they_say():
    """Scores of novel cells are N(1, 1), of known ones N(0, 1): the AUROC is Phi(1 / sqrt 2)."""
    true, recall = stats.norm.cdf(1 / np.sqrt(2)), stats.norm.sf(-0.5)
    random, inside = np.random.default_rng(0), []
    for seed in range(150):
        part = pd.DataFrame({"cell": np.arange(160), "repeat": 0, "seen": np.arange(160) >= 50})
        part = part.assign(truth="a", predicted="a", energy=random.normal(size=160) + ~part["seen"])
        at = pd.DataFrame({"repeat": [0], "score": "energy", "rule": "tuned", "threshold": 0.5})
        found = novelty.measure_novelty(part, at, seed=seed, n_resamples=300)
        for key, value in {("energy", "", "auroc"): true, ("energy", "tuned", "recall"): recall}.items():
            inside.append(found.loc[key, "low"] <= value <= found.loc[key, "high"])
    assert 0.91 <= np.mean(inside) <= 0.985


def test_a_resample_of_two_thousand_cells_takes_little_time():
    import time

    random = np.random.default_rng(0)
    part = pd.DataFrame({"cell": np.arange(2000), "repeat": 0, "seen": np.arange(2000) >= 200})
    part = part.assign(truth="a", predicted="a", entropy=random.random(2000))
    at = pd.DataFrame({"repeat": [0], "score": "entropy", "rule": "tuned", "threshold": 0.5})
    start = time.process_time()
    novelty.measure_novelty(part, at)
    assert time.process_time() - start < 2


def test_two_methods_are_compared_on_the_same_resamples(kept):
    one = {key: value for key, value in kept.items() if key[3] == "scbert"}
    kept = one | {(*key[:3], "majority"): value for key, value in one.items()}
    cells = novel_types.score_jobs(kept)
    thresholds = novelty.choose_thresholds(cells)
    assert (novelty.compare_methods(cells, thresholds, "scbert", "majority") == 0).all(axis=None)
    lost = cells.drop(cells.index[(cells["method"] == "majority") & (cells["part"] == "test")][:1])
    with pytest.raises(ValueError, match="not tested on the same cells"):
        novelty.compare_methods(lost, thresholds, "scbert", "majority")


def test_a_repeat_without_novel_cells_is_refused(kept):
    cells = novel_types.score_jobs(kept).query("purpose == 'held_out' and method == 'scbert' and part == 'test'")
    cells = cells[cells["seen"] | (cells["repeat"] == 0)]
    with pytest.raises(ValueError, match="a repeat has no novel"):
        novelty.measure_novelty(cells, pd.DataFrame(columns=["repeat", "score", "rule", "threshold"]))


def test_a_sweep_holds_the_metrics_at_each_threshold(kept):
    cells = novel_types.score_jobs(kept)
    part = cells[(cells["purpose"] == "held_out") & (cells["part"] == "test") & (cells["method"] == "scbert")]
    table = novelty.sweep_thresholds(part, n_steps=5)
    by_hand = [measured_by_hand(part[part["repeat"] == repeat], "max_probability", 0.5) for repeat in (0, 1)]
    assert table.loc[0.5, "value"].to_dict() == pytest.approx(pd.DataFrame(by_hand).mean().to_dict())
    assert list(table.index.unique("threshold")) == [0, 0.25, 0.5, 0.75, 1]
    assert table.loc[(0.0, "recall"), "value"] == 0


def test_numbers_are_noted_under_agreed_names(kept):
    noted = {}
    run = types.SimpleNamespace(note_metric=lambda name, value, low, high, n: noted.update({name: (value, n)}))
    cells = novel_types.score_jobs(kept)
    measured = novel_types.measure_all(cells, novelty.choose_thresholds(cells))
    novel_types.note_novelty(run, measured, calibration.calibrate_jobs(kept))
    for name in ("entropy/auroc", "entropy/aupr", "distance/jaccard", "margin/recall", "energy/known_accuracy"):
        assert f"set:held_out:x|y/scbert:{name}" in noted
    assert "set:held_out:x|y/scbert/calibration_error_scaled" in noted
    assert "set:held_out:x|y/scbert/coverage" in noted
    assert not any("/majority" in name for name in noted), "of types held out alone it is left out"
    paper = measured.sort_index().loc[("set", "x/y", "scbert", "max_probability", "paper", "jaccard")]
    assert noted["set:held_out:x|y/scbert/jaccard"] == (round(paper["value"], 4), paper["n"])
    assert not any("nan" in str(values) for values in noted.values())


def test_of_types_alone_majority_and_the_best_threshold_are_left_out(kept):
    cells = novel_types.score_jobs(kept)
    measured = novel_types.measure_all(cells, novelty.choose_thresholds(cells))
    trimmed = novel_types.trim(measured).reset_index()
    assert set(trimmed["method"]) == {"scbert"} and "best" not in set(trimmed["rule"])
    together = measured.rename(index={"x/y": "together"}, level="level")
    assert novel_types.trim(together).equals(together)


def test_held_out_cells_are_taken_without_those_set_aside_or_for_tuning(kept):
    cells = novel_types.score_jobs(kept)
    taken = novelty.take_held_out(cells)
    assert set(taken["purpose"]) == {"held_out"}
    assert set(taken["part"]) == {"test"}
    assert len(taken) == 4 * 200
    assert len(novelty.take_held_out(cells, "x/y")) == 4 * 200
    assert novelty.take_held_out(cells, "together").empty


def test_parts_of_the_first_repeat_are_counted():
    split = protocols.Split("held_out:a", 0, 0, *(np.arange(n).astype(str) for n in (5, 4, 3, 2)))
    more = [split._replace(protocol="tuning:a", aside=np.array([])), split._replace(repeat=1, train=np.array(["x"]))]
    table = novel_types.count_parts({"one": [split, *more], "two": [split]})
    assert table.index.names == ["data", "training"]
    assert list(table.columns) == ["train", "validation", "test", "aside"]
    assert table.loc[("one", "held_out:a")].to_list() == table.loc[("two", "held_out:a")].to_list() == [5, 4, 3, 2]
    assert table.loc[("one", "tuning:a")].to_list() == [5, 4, 3, 0]
    assert len(table) == 3


def test_what_jobs_kept_is_gathered_under_their_names(monkeypatch):
    monkeypatch.setattr(novel_types, "read_kept", lambda job, run: (job.method, run))
    jobs = [
        types.SimpleNamespace(data="one", split=types.SimpleNamespace(protocol="held_out:a", repeat=1), method=method)
        for method in ("majority", "scbert")
    ]
    shown = pd.DataFrame({"data": "one", "protocol": "held_out:a", "repeat": [1]})
    assert novel_types.gather_kept(jobs, "run", shown) == {
        ("one", "held_out:a", 1, method): (method, "run") for method in ("majority", "scbert")
    }
    assert novel_types.gather_kept(jobs, "run", shown.assign(repeat=0)) == {}  # left out


@pytest.fixture
def together(kept):
    """What is kept of types held out together, scored, with thresholds and measures."""
    kept = {(data, protocol.replace("x/y", "together"), *rest): one for (data, protocol, *rest), one in kept.items()}
    cells = novel_types.score_jobs(kept)
    thresholds = novelty.choose_thresholds(cells)
    return kept, cells, thresholds, novel_types.measure_all(cells, thresholds)


def test_quartiles_of_confidence_are_those_of_each_type(together):
    _, cells, _, _ = together
    tested = novelty.take_held_out(cells, "together")
    table = novel_types.tabulate_confidence(tested)
    assert list(table.columns) == ["25%", "50%", "75%"]
    for (method, truth, seen), row in table.iterrows():
        own = 1 - tested.loc[(tested["method"] == method) & (tested["truth"] == truth), "max_probability"]
        assert seen == (truth != "new")
        np.testing.assert_allclose(row, np.quantile(own, [0.25, 0.5, 0.75]))


def test_each_method_is_swept_and_has_its_tuned_probability(together):
    _, cells, thresholds, _ = together
    tested = novelty.take_held_out(cells, "together")
    sweep = novel_types.sweep_methods(tested)
    for method in ("scbert", "majority"):
        own = tested[tested["method"] == method]
        pd.testing.assert_frame_equal(sweep.loc[method], novelty.sweep_thresholds(own))
        rows = thresholds.query("method == @method and score == 'max_probability' and rule == 'tuned'")
        assert len(rows) == 2
        assert novel_types.take_tuned(thresholds, "set")[method] == pytest.approx(1 - rows["threshold"].mean())


def test_what_tuning_costs_stands_beside_the_balanced_accuracies(together):
    *_, measured = together
    table = novel_types.tabulate_tuning(measured.query("level == 'together'").droplevel("level"))
    assert list(table.columns) == ["best", "paper", "tuned", "cost"]
    row = table.loc[("set", "scbert", "entropy")]
    assert np.isnan(row["paper"])  # 0.5 is a probability, and entropy none
    assert float(row["cost"].split()[0]) == pytest.approx(row["best"] - row["tuned"], abs=0.006)


def test_without_a_tuned_threshold_its_cost_is_left_out_with_a_sentence(together, capsys):
    _, cells, thresholds, _ = together
    measured = novel_types.measure_all(cells, thresholds[thresholds["rule"] != "tuned"])
    table = novel_types.tabulate_tuning(measured.query("level == 'together'").droplevel("level"))
    assert list(table.columns) == ["best", "paper"]
    assert "No threshold was tuned, since that needs three known types" in capsys.readouterr().out


def test_tables_of_calibration_and_of_prediction_sets_hold_what_was_measured(together):
    kept, *_ = together
    of_level = calibration.calibrate_jobs(kept).query("level == 'together'").droplevel("level")
    errors = novel_types.tabulate_calibration(of_level)
    assert list(errors.columns) == ["calibration_error", "calibration_error_scaled", "by chance", "temperature"]
    row = of_level.loc[("set", "scbert", "calibration_error")]
    assert errors.loc[("set", "scbert"), "calibration_error"].startswith(f"{row['value']:.3f} [")
    assert errors.loc[("set", "scbert"), "by chance"] == pytest.approx(row["by_chance"], abs=6e-4)
    temperature = of_level.loc[("set", "scbert", "temperature"), "value"]
    assert errors.loc[("set", "scbert"), "temperature"] == pytest.approx(temperature, abs=6e-3)
    table = novel_types.tabulate_sets(of_level)
    assert list(table.columns[:3]) == ["coverage", "expected", "set_size"]
    coverage = of_level.loc[("set", "scbert", "coverage")]
    expected = f"{coverage['expected_low']:.2f} to {coverage['expected_high']:.2f}"
    assert table.loc[("set", "scbert"), "expected"] == expected
    assert table.loc[("set", "scbert"), "coverage"].startswith(f"{coverage['value']:.2f} [")
