"""Tables that notebooks 04 to 06 show and put on record: levels, studies and shifts, each against what it is made from."""

import anndata
import numpy as np
import pandas as pd
import pytest

from scbert import batch_effect, benchmark, cross_dataset, metrics, significance
from scbert.run.record import Run


def predict(data, protocol, methods, cells, *, seed=0, part="test", fold=0):
    """Return predictions of cells a name each: true labels A and B by turns, three of four named rightly."""
    random, rows = np.random.default_rng([seed, len(cells)]), []
    truth = np.array(["A", "B"])[np.arange(len(cells)) % 2]
    for method in methods:
        right = random.random(len(cells)) < 0.75
        predicted = np.where(right, truth, np.where(truth == "A", "B", "A"))
        own = {"data": data, "protocol": protocol, "repeat": 0, "fold": fold, "method": method, "cell": cells}
        confidence = random.random(len(cells)).round(3)
        more = {"truth": truth, "predicted": predicted, "confidence": confidence, "seen": True, "part": part}
        rows.append(pd.DataFrame(own | more))
    return pd.concat(rows, ignore_index=True)


def name_cells(prefix, n=40):
    return [f"{prefix}{i}" for i in range(n)]


def make_experiment(name, studies, train_on=None, n=40):
    """Return an experiment whose cells are named by study and number."""
    names = [cell for study in studies for cell in name_cells(study, n)]
    obs = pd.DataFrame({"study": np.repeat(studies, n)}, index=names)
    return cross_dataset.Experiment(name, anndata.AnnData(obs=obs), train_on, "")


class Recorder:
    """The part of a run that takes metrics."""

    note_scores, note_metric = Run.note_scores, Run.note_metric

    def __init__(self):
        self.metrics = {}


@pytest.fixture
def experiments():
    """A set of two studies, one of which bears the set's name; and two sets joined, of which the first trains."""
    return [make_experiment("left", ["left", "right"]), make_experiment("one->other", ["one", "other"], "one")]


@pytest.fixture
def predictions():
    """Of `experiments`: the last one lacks scANVI, and tests ten cells of the set that trains."""
    asked = ["majority", "scanvi", "scbert"]
    tested = [("held_out:left", "left"), ("held_out:right", "right")]
    parts = [predict("left", protocol, asked, name_cells(study), seed=i) for i, (protocol, study) in enumerate(tested)]
    away = [*name_cells("other"), *name_cells("one", 10)]
    return pd.concat([*parts, predict("one->other", "", ["majority", "scbert"], away)], ignore_index=True)


# Levels


def test_each_level_is_scored_and_compared_as_alone_and_put_on_record_under_its_name(predictions):
    scores = benchmark.score_levels(predictions, seed=3)
    leads = benchmark.compare_levels(predictions, "scbert", "majority", seed=3)
    keys = [("left", "held_out:left"), ("left", "held_out:right"), ("one->other", "")]
    assert list(dict.fromkeys(key[:2] for key in scores.index)) == [key[:2] for key in leads.index] == keys
    for data, level in keys:
        part = predictions[(predictions["data"] == data) & (predictions["protocol"] == level)]
        pd.testing.assert_frame_equal(scores.loc[(data, level)], metrics.score(part, seed=3))
        lead = leads.loc[(data, level, "scbert", "accuracy_minus_majority")]
        assert lead.to_dict() == pytest.approx(metrics.compare(part, "scbert", "majority", seed=3))
    run = Recorder()
    benchmark.note_levels(run, scores)
    benchmark.note_levels(run, leads)
    assert len(run.metrics) == len(scores) + len(leads)
    for name in ("left:held_out:right/scanvi/accuracy", "one->other/scbert/accuracy_minus_majority"):
        assert run.metrics[name]["n"] == (40 if "right" in name else 50)
    assert run.metrics["one->other/scbert/mcc"]["value"] == scores.loc[("one->other", "", "scbert", "mcc"), "value"]


def test_sizes_of_labels_say_which_are_common(predictions):
    sizes = pd.Series({"A": 19, "B": 100})
    scores = benchmark.score_levels(predictions, sizes=sizes)
    everything = benchmark.score_levels(predictions)
    common = scores.xs("macro_f1_common", level="metric")["value"]
    assert (common != everything.xs("macro_f1_common", level="metric")["value"]).any()


def test_a_table_has_the_methods_of_all_experiments_where_the_last_lacks_one(predictions):
    scores = benchmark.score_levels(predictions)
    for table in (predictions, scores, scores[::-1]):
        assert set(benchmark.list_methods(table)) == {"majority", "scanvi", "scbert"}
    assert benchmark.list_methods(predictions) == benchmark.list_methods(scores) == ["majority", "scanvi", "scbert"]
    text = benchmark.write_levels(scores, "accuracy")
    assert list(text.columns) == ["majority", "scanvi", "scbert"]
    assert list(text.index) == [("left", "held_out:left"), ("left", "held_out:right"), ("one->other", "")]
    assert text["scanvi"].isna().tolist() == [False, False, True]
    for key, said in text.stack().items():
        (row,) = scores.loc[[(*key, "accuracy")], ["value", "low", "high"]].to_numpy()
        assert said == "{:.3f} [{:.3f}, {:.3f}]".format(*row)


def test_a_method_that_the_first_experiment_lacks_keeps_its_place(predictions):
    back = predictions.sort_values("data", ascending=False, kind="stable")
    assert benchmark.list_methods(back) == ["majority", "scanvi", "scbert"]


def test_references_are_taken_by_their_share(predictions):
    parts = [predictions[predictions["data"] != "left"].assign(data="set", protocol=protocol)
             for protocol in ("", "reference:0.10", "few:10", "reference:0.30", "imbalance:2")]  # fmt: skip
    scores = benchmark.score_levels(pd.concat(parts)).loc["set"]
    assert set(benchmark.take_levels(scores, "reference", "few").index.get_level_values("protocol")) == {
        *["reference:0.10", "reference:0.30", "few:10"]
    }
    found = benchmark.take_references(scores)
    assert found.index.names == ["share of the reference cells", "method", "metric"]
    assert list(found.index.unique(0)) == [0.1, 0.3]
    pd.testing.assert_frame_equal(found.loc[0.3], scores.loc["reference:0.30"])
    assert benchmark.take_references(scores.loc[["", "few:10"]]).empty


def test_the_recall_of_the_rare_type_stands_by_the_size_of_its_reference(predictions):
    rows = predictions[predictions["data"] != "left"]
    uneven = pd.concat([rows.assign(protocol=f"imbalance:{size}") for size in (17, 2)])
    found = benchmark.score_rare(uneven, "B", seed=1)
    assert found.index.names == [benchmark.SIZE_OF_RARE, "method", "metric"]
    assert list(found.index.unique(0)) == [2, 17]
    assert set(found.index.get_level_values("metric")) == {"recall_of_rare"}
    for (_, method, _), row in found.iterrows():
        own = rows[(rows["method"] == method) & (rows["truth"] == "B")]
        assert row["value"] == pytest.approx((own["predicted"] == "B").mean())
        assert row["low"] <= row["value"] <= row["high"]
        assert row["n"] == len(own)


def test_a_comparison_is_put_on_record_and_said(predictions):
    part = predictions[predictions["protocol"] == "held_out:left"]
    comparison = significance.compare_all(part, "scbert", "macro_f1", n_resamples=200)
    run = Recorder()
    benchmark.note_comparison(run, "left:x", comparison)
    assert set(run.metrics) == {f"left:x/scbert/macro_f1_minus_{other}" for other in ("majority", "scanvi")}
    noted = run.metrics["left:x/scbert/macro_f1_minus_scanvi"]
    assert [noted[key] for key in ("value", "low", "high", "n")] == list(
        comparison.loc["scanvi", ["value", "low", "high", "n"]]
    )
    said = benchmark.say_comparison(comparison)
    assert significance.say_limits(comparison) in said
    assert f"{comparison.loc['scanvi', 'value']:.3f}" in said


def test_costs_are_said_in_hours_and_cell_steps():
    costs = pd.DataFrame({
        "protocol": ["", "x", "x"], "method": ["a", "b", "b"], "seconds": 1.0, "cpu_seconds": [1800, 3600, 3600],
        "memory_mb": 1, "cell_steps": [0, 1000, 500],
    })  # fmt: skip
    assert benchmark.say_costs(costs) == "2.50 CPU hours and 1,500 cell-steps in all"


# Studies


def test_each_cell_has_its_study_and_only_cells_of_a_set_that_trains_are_within(predictions, experiments):
    found = cross_dataset.name_studies(predictions, experiments)
    assert "study" not in predictions
    assert (found["study"] == found["cell"].str.rstrip("0123456789")).all()
    within = found["protocol"] == "within"
    assert set(found.loc[within, "study"]) == {"one"}
    assert set(found.loc[~within, "study"]) == {"left", "right", "other"}  # also left of left, which does not train
    assert (found.loc[~within, "protocol"] == predictions.loc[~within, "protocol"]).all()
    pd.testing.assert_frame_equal(
        found.drop(columns=["study", "protocol"]), predictions.drop(columns="protocol"), check_like=True
    )


def test_scores_of_studies_bear_the_name_of_the_study_or_of_both_sets(predictions, experiments):
    scores = benchmark.score_levels(cross_dataset.name_studies(predictions, experiments))
    across = cross_dataset.take_studies(scores)
    assert across.index.names == ["method", "metric"]
    assert "within" not in set(across["protocol"])
    names = across[["data", "protocol", "study"]].drop_duplicates().to_numpy().tolist()
    assert names == [
        ["left", "held_out:left", "left"],
        ["left", "held_out:right", "right"],
        ["one->other", "", "one\n-> other"],
    ]
    wide = cross_dataset.spread_methods(across, "macro_f1")
    assert list(wide.index) == [("left", "left"), ("left", "right"), ("one->other", "one\n-> other")]
    assert list(wide.columns) == ["majority", "scbert"]  # scANVI lacks a study: it can't be ranked
    value = scores.loc[("left", "held_out:right", "scbert", "macro_f1"), "value"]
    assert wide.loc[("left", "right"), "scbert"] == value


def test_left_out_studies_are_the_folds_of_one_protocol(predictions, experiments):
    pooled = cross_dataset.pool_studies(cross_dataset.name_studies(predictions, experiments))
    assert len(pooled) == len(predictions) - 20
    by_data = dict(iter(pooled.groupby("data")))
    assert set(by_data["left"]["protocol"]) == {"leave_one_study_out"}
    assert set(by_data["one->other"]["protocol"]) == {""}
    folds = by_data["left"].groupby("study")["fold"].unique()
    assert sorted(int(fold) for (fold,) in folds) == [1, 2]
    assert by_data["one->other"]["fold"].nunique() == 1
    for part in by_data.values():
        assert (part.groupby("method")["cell"].nunique() == part.groupby("method").size()).all()
    scores = benchmark.score_levels(pooled)
    assert scores.loc[("left", "leave_one_study_out", "scbert", "accuracy"), "n"] == 80


def test_what_unseen_types_are_called_is_counted(predictions):
    assert cross_dataset.call_unseen(predictions, ["scbert"]).empty
    is_new = (predictions["truth"] == "B") & (predictions["data"] == "left")
    called = cross_dataset.call_unseen(predictions.assign(seen=~is_new), ["scbert", "scanvi"])
    assert called.index.names == ["data", "truth", "method", "predicted"]
    assert set(called.index.get_level_values("method")) == {"scbert", "scanvi"}
    assert called.groupby("method")["share"].sum().to_list() == pytest.approx([1, 1])
    assert set(called["cells"]) == {40}
    own = predictions[is_new & (predictions["method"] == "scbert") & (predictions["predicted"] == "A")]
    row = called.loc[("left", "B", "scbert", "A")]
    assert row["share"] == pytest.approx(len(own) / 40)
    assert row["median confidence"] == own["confidence"].median()


# Shifts


def test_the_strongest_of_each_effect_is_taken_once_and_beside_it_no_effect():
    levels = ["none:0", "depth:1", "depth:10", "depth:10:equalised", "labels:1", "labels:10"]
    worlds = {(level, repeat): f"{level} {repeat}" for repeat in (0, 1) for level in levels}
    chosen = ["none:0", "depth:10", "depth:10:equalised", "labels:10"]
    assert batch_effect.take_strongest(worlds) == {level: f"{level} 0" for level in chosen}
    assert batch_effect.take_strongest({("none:0", 0): "x"}) == {"none:0": "x"}


def test_cells_set_aside_are_of_the_level_within(predictions):
    aside = predict("left", "held_out:left", ["scbert"], name_cells("aside"), part="aside")
    home = predict("one->other", "", ["scbert"], name_cells("one"), part="aside")
    found = batch_effect.mark_within(pd.concat([predictions, aside, home]))
    assert (found.loc[found["part"] == "test", "level"] == found.loc[found["part"] == "test", "protocol"]).all()
    assert set(found.loc[found["part"] == "aside", "level"]) == {"held_out:left:within", "within"}


@pytest.fixture
def doses():
    """Predictions at two severities, the second of which was also equalised."""
    levels = ["none:0", "depth:1", "depth:2", "depth:2:equalised"]
    parts = [predict("set", level, ["majority", "scbert"], name_cells("c"), seed=i) for i, level in enumerate(levels)]
    return pd.concat(parts, ignore_index=True)


def test_equal_depth_is_compared_with_the_same_cells_as_they_were(doses):
    found = batch_effect.compare_equalised(doses, seed=2)
    assert [key[:2] for key in found.index] == [("set", "depth:2:equalised")] * 2
    for (_, _, method, metric), row in found.iterrows():
        own = doses[doses["method"] == method]
        before, after = own[own["protocol"] == "depth:2"], own[own["protocol"] == "depth:2:equalised"]
        both = pd.concat([before.assign(method="before"), after.assign(method="after")]).assign(protocol="")
        assert metric == "accuracy_minus_unequal"
        assert row.to_dict() == pytest.approx(metrics.compare(both, "after", "before", seed=2))
    run = Recorder()
    benchmark.note_levels(run, found)
    assert "set:depth:2:equalised/scbert/accuracy_minus_unequal" in run.metrics


def test_where_nothing_was_equalised_there_is_nothing_to_compare(doses):
    found = batch_effect.compare_equalised(doses[doses["protocol"] != "depth:2:equalised"])
    assert found.empty
    assert found.index.names == ["data", "level", "method", "metric"]
    benchmark.note_levels(None, found)


def test_levels_with_and_without_equal_depth_stand_side_by_side(doses):
    rows = benchmark.score_levels(doses).loc["set"].rename_axis(["level", "method", "metric"]).reset_index()
    within = rows.assign(level=rows["level"] + ":within")
    pairs = batch_effect.pair_equalised(pd.concat([rows, within]))
    assert list(pairs["level"].unique()) == ["depth:2", "depth:2:equalised"]
    assert list(pairs["study"].unique()) == ["depth 2", "depth 2 equalised"]
    assert len(pairs) == (rows["level"].str.startswith("depth:2")).sum()
    assert batch_effect.pair_equalised(rows[~rows["level"].str.endswith("equalised")]).empty


def test_what_embeddings_keep_is_put_on_record_by_data_and_level():
    index = pd.MultiIndex.from_product([["one", "two"], ["pca"], ["nmi"]], names=["data", "embedding", "metric"])
    measured = pd.DataFrame({"value": [0.5, 0.6], "low": 0.4, "high": 0.7, "n": 10, "splits": 1}, index=index)
    run = Recorder()
    batch_effect.note_embeddings(run, measured)
    batch_effect.note_embeddings(run, measured.loc[["one"]], "all:1")
    assert set(run.metrics) == {f"{name}:embedding/pca/nmi" for name in ("one", "two", "one:all:1")}
    assert run.metrics["two:embedding/pca/nmi"] == {"value": 0.6, "low": 0.4, "high": 0.7, "n": 10, "unit": ""}
