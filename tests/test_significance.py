"""Tests over few trainings: exact where they can be, and plain about what they cannot show."""

import math

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from scbert import significance


def predict(right, repeat=0, fold=0, method="x"):
    """Cells of two labels, of which those said are right."""
    right = np.asarray(right)
    truth = np.where(np.arange(len(right)) % 2, "a", "b")
    predicted = np.where(right, truth, np.where(truth == "a", "b", "a"))
    cells = {"cell": [f"fold{fold}cell{i}" for i in range(len(right))], "truth": truth, "predicted": predicted}
    return pd.DataFrame({"method": method, "repeat": repeat, "fold": fold} | cells)


@pytest.fixture
def predictions():
    """Five folds of 60 cells: scbert is much better than bad, like twin, and the same as same."""
    random = np.random.default_rng(0)
    rows = []
    for fold in range(5):
        right = random.random(60) < 0.8
        rows.append(predict(right, fold=fold, method="scbert"))
        rows.append(predict(right, fold=fold, method="same"))
        rows.append(predict(random.random(60) < 0.8, fold=fold, method="twin"))
        rows.append(predict(right & (random.random(60) < 0.5), fold=fold, method="bad"))
    return pd.concat(rows, ignore_index=True)


@pytest.mark.parametrize("k", [2, 3, 5, 12])
def test_wilcoxon_without_ties_is_that_of_scipy(k):
    differences = np.random.default_rng(k).normal(0.3, 1, k)
    assert significance.wilcoxon_test(differences) == pytest.approx(stats.wilcoxon(differences, method="exact").pvalue)


@pytest.mark.parametrize("k", range(2, 11))
def test_wilcoxon_with_ties_and_zeros_is_that_of_scipy_over_all_signs(k):
    differences = np.random.default_rng(k).integers(-2, 4, k) / 10
    kept = differences[differences != 0]
    expected = stats.wilcoxon(kept, method=stats.PermutationMethod(n_resamples=2**k)).pvalue
    assert significance.wilcoxon_test(differences) == pytest.approx(expected, abs=1e-12)


def test_wilcoxon_of_many_tied_pairs_is_near_the_normal_approximation():
    differences = np.random.default_rng(0).integers(-10, 11, 200) / 60
    expected = stats.wilcoxon(differences[differences != 0], method="asymptotic").pvalue
    assert significance.wilcoxon_test(differences) == pytest.approx(expected, rel=0.05)


def test_five_folds_cannot_go_below_0_0625():
    assert significance.wilcoxon_test(np.array([0.1, 0.2, 0.3, 0.4, 0.5])) == 0.0625
    assert significance.smallest_wilcoxon_p(5) == 0.0625
    assert significance.smallest_wilcoxon_p(6) == 0.03125


def test_equal_shares_of_cells_are_ties_whatever_their_rounding():
    assert significance.wilcoxon_test(np.array([0.1 + 0.2, 0.3, -0.3])) == 1.0


def test_the_corrected_t_test_is_the_plain_one_without_shared_cells_and_wider_with_them():
    differences = np.array([0.02, 0.05, 0.01, 0.04, 0.03])
    plain = stats.ttest_1samp(differences, 0).pvalue
    assert significance.corrected_t_test(differences, 0) == pytest.approx(plain)
    t = differences.mean() / math.sqrt((1 / 5 + 1 / 4) * differences.var(ddof=1))
    assert significance.corrected_t_test(differences, 0.25) == pytest.approx(2 * stats.t.sf(t, 4))
    assert significance.corrected_t_test(differences, 0.25) > plain


@pytest.mark.parametrize("differences", [[0.1], [0.0, 0.0, 0.0]])
def test_tests_of_one_training_or_of_no_difference_are_not_defined(differences):
    assert math.isnan(significance.corrected_t_test(np.array(differences), 0.25))
    assert math.isnan(significance.wilcoxon_test(np.array(differences)))


def test_holm_leaves_out_what_is_not_defined():
    corrected = significance.correct_by_holm(pd.Series([0.01, math.nan, 0.04, 0.03]))
    np.testing.assert_allclose(corrected, [0.03, math.nan, 0.06, 0.06])
    assert np.isnan(significance.correct_by_holm(pd.Series([math.nan]))).all()


def test_compare_all_has_a_row_for_each_other_method_and_a_verdict(predictions):
    table = significance.compare_all(predictions)
    assert table.index.tolist() == ["same", "twin", "bad"]
    assert table["verdict"].tolist() == ["not decided", "not decided", "ahead"]
    assert (table["trainings"] == 5).all()
    assert (table["n"] == 300).all()
    assert (table["wilcoxon_p_smallest"] == 0.0625).all()
    same, _, bad = table.drop(columns="verdict").itertuples()
    assert (same.value, same.low, same.high) == (0, 0, 0)
    assert math.isnan(same.t_p) and math.isnan(same.wilcoxon_p_holm)
    assert bad.wilcoxon_p == 0.0625
    assert bad.wilcoxon_p_holm == 0.125  # of two that are defined
    assert bad.t_p < bad.t_p_holm < 0.05
    assert bad.low < bad.value < bad.high
    back = significance.compare_all(predictions, "bad")
    assert back.loc["scbert", "value"] == pytest.approx(-bad.value)
    assert back.loc["scbert", "verdict"] == "behind"


def test_the_differences_are_those_of_compare(predictions):
    from scbert.evaluate import compare

    pair = predictions[predictions["method"].isin(["scbert", "bad"])]  # of one rival, nothing is corrected
    for metric in ("accuracy", "macro_f1", "mcc"):
        row = significance.compare_all(pair, metric=metric, n_resamples=2000).loc["bad"]
        found = compare(predictions, "scbert", "bad", metric=metric)
        assert row[["value", "low", "high", "n"]].astype(float).to_dict() == pytest.approx(found)
        among_three = significance.compare_all(predictions, metric=metric, n_resamples=2000).loc["bad"]
        assert among_three["low"] < found["low"] < found["high"] < among_three["high"]


def test_the_ratio_of_test_and_training_cells_is_that_of_the_folds_a_number_or_a_column(predictions):
    by_folds, by_number, by_column, wider = (
        significance.compare_all(table, test_train_ratio=ratio, n_resamples=100).loc["bad", "t_p"]
        for table, ratio in (
            (predictions, None),
            (predictions, 0.25),
            (predictions.assign(ratio=0.25), "ratio"),
            (predictions, 2),
        )
    )
    assert by_folds == by_number == by_column < wider


def test_one_training_has_an_interval_and_a_verdict_but_no_tests(predictions):
    table = significance.compare_all(predictions[predictions["fold"] == 0])
    assert table.loc["bad", "verdict"] == "ahead"
    tests = table[["t_p", "t_p_holm", "wilcoxon_p", "wilcoxon_p_holm", "wilcoxon_p_smallest"]]
    assert tests.isna().all(axis=None)
    repeated = pd.concat([predictions[predictions["fold"] == 0].assign(repeat=repeat) for repeat in (0, 1)])
    table = significance.compare_all(repeated)
    assert table["t_p"].isna().all()  # one fold: the ratio has to be given
    assert (table["wilcoxon_p_smallest"] == 0.5).all()


def test_the_verdict_against_equal_methods_errs_about_once_in_20_families():
    wrong = 0
    for seed in range(40):
        random = np.random.default_rng(seed)
        rows = [predict(random.random(150) < 0.8, method=method) for method in ("scbert", "a", "b", "c")]
        wrong += (significance.compare_all(pd.concat(rows), n_resamples=500)["verdict"] != "not decided").any()
    assert wrong <= 6


def test_compare_all_refuses_other_cells_and_a_single_method(predictions):
    with pytest.raises(ValueError, match="named cell fold0cell0 in repeat 0, fold 0"):
        significance.compare_all(predictions.drop(index=0))
    with pytest.raises(ValueError, match="No predictions of 'scvi'"):
        significance.compare_all(predictions, "scvi")
    with pytest.raises(ValueError, match="There is only scbert"):
        significance.compare_all(predictions[predictions["method"] == "scbert"])
    with pytest.raises(ValueError, match="No label has 999 cells"):
        significance.compare_all(predictions, metric="macro_f1_common", rare=999)


def test_ranks_are_means_over_blocks_with_the_critical_difference_of_demsar():
    scores = pd.DataFrame(np.random.default_rng(0).random((14, 4)) + [0.5, 0, 0.2, 0], columns=list("abcd"))
    table = significance.rank_methods(scores)
    expected = scores.rank(axis=1, ascending=False).mean().sort_values()
    pd.testing.assert_series_equal(table["mean_rank"], expected, check_names=False)
    assert table["first"].sum() == 14
    found = table.attrs
    # Demsar 2006, table 5: 2.569 for four classifiers; section 3.2.2: 1.25 on 14 data sets, which he rounds up
    assert found["critical_difference"] == pytest.approx(2.569 * math.sqrt(4 * 5 / (6 * 14)), abs=1e-3)
    assert found["friedman_p"] == pytest.approx(stats.friedmanchisquare(*scores.to_numpy().T).pvalue)


@pytest.mark.parametrize(("n_methods", "quantile"), [(2, 1.960), (3, 2.343), (5, 2.728), (8, 3.031), (10, 3.164)])
def test_the_quantiles_of_nemenyi_are_those_of_demsar(n_methods, quantile):
    scores = pd.DataFrame([range(n_methods)])
    difference = significance.rank_methods(scores).attrs["critical_difference"]
    assert difference / math.sqrt(n_methods * (n_methods + 1) / 6) == pytest.approx(quantile, abs=1e-3)


@pytest.mark.parametrize("n_methods", [2, 3, 8])
def test_with_fewer_blocks_than_needed_no_difference_can_be_critical(n_methods):
    scores = pd.DataFrame([range(n_methods)] * 20)
    needed = significance.rank_methods(scores).attrs["blocks_needed"]
    enough, few = (significance.rank_methods(scores.head(n)) for n in (needed, needed - 1))
    assert enough["mean_rank"].iloc[-1] - enough["mean_rank"].iloc[0] == n_methods - 1
    assert enough.attrs["critical_difference"] < n_methods - 1 <= few.attrs["critical_difference"]


def test_the_smallest_friedman_p_is_that_of_blocks_which_agree_and_ties_give_none():
    agreed = significance.rank_methods(pd.DataFrame([[1, 2, 3, 4]] * 3)).attrs
    assert agreed["friedman_p"] == pytest.approx(agreed["friedman_p_smallest"])
    assert math.isnan(significance.rank_methods(pd.DataFrame([[1, 1, 1]] * 3)).attrs["friedman_p"])
    assert math.isnan(significance.rank_methods(pd.DataFrame([[1, 2, 3]])).attrs["friedman_p"])
    assert math.isnan(significance.rank_methods(pd.DataFrame([[1, 2]] * 3)).attrs["friedman_p"])


def test_ranks_need_all_scores_of_two_methods():
    with pytest.raises(ValueError, match="No score of b in some block"):
        significance.rank_methods(pd.DataFrame({"a": [1, 2], "b": [1, None]}))
    with pytest.raises(ValueError, match="One method cannot be ranked"):
        significance.rank_methods(pd.DataFrame({"a": [1, 2]}))


def test_the_sentence_says_cells_trainings_the_smallest_difference_and_the_verdicts(predictions):
    table = significance.compare_all(predictions)
    half = ((table["high"] - table["low"]) / 2).drop("same").sort_values()
    text = significance.say_limits(table)
    assert text.startswith("300 test cells and 5 trainings a method: a difference in accuracy below about ")
    assert f"{half.iloc[0]:.2g} to {half.iloc[1]:.2g} (by method) can't be told from zero over 3 comparisons" in text
    assert "5 pairs give a Wilcoxon p no smaller than 0.0625, and 0.188 after Holm's correction." in text
    assert "scbert is ahead of bad; not decided against same, twin." in text
    assert text.endswith("not about what another training would give.")


def test_the_sentence_about_one_comparison_and_repeats_is_shorter(predictions):
    pair = predictions[predictions["method"].isin(["scbert", "bad"])]
    repeated = pd.concat([pair, pair.assign(repeat=1)])
    text = significance.say_limits(significance.compare_all(repeated))
    assert "10 trainings a method" in text
    assert "10 pairs give a Wilcoxon p no smaller than 0.00195." in text
    assert text.endswith("At 95%, scbert is ahead of bad.")
    one = significance.say_limits(significance.compare_all(pair[pair["fold"] == 0]))
    assert "1 training a method" in one
    assert "one pair allows no test over trainings." in one
