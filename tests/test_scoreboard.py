"""A verdict follows from the band alone, and only the paper profile gives one."""

import numpy as np
import pandas as pd
import pytest

from scbert import report, scoreboard

PUBLISHED = """experiment,metric,paper,source,figure,n,band,band_reason,reproduction,reproduction_source,stand_in
E1,big/scbert/accuracy,0.9,P,Fig. 2a,100,0.01,ten runs,0.88,K,tiny/scbert/accuracy
E1,big/scbert/accuracy,0.9,P,Fig. 2a,100,0.01,ten runs,0.8912,B,tiny/scbert/accuracy
E1,big/logistic_regression/accuracy,,B,,100,,,0.95,B,tiny/logistic_regression/accuracy
E4,big:held_out/scbert/macro_f1,0.7,P,Fig. 3c,100,0.05,none,,,
"""


def number(value):
    return {"value": value, "low": value - 0.01, "high": value + 0.01}


@pytest.fixture
def published(tmp_path):
    (tmp_path / "paper.csv").write_text(PUBLISHED)
    return scoreboard.read_published(tmp_path / "paper.csv")


@pytest.mark.parametrize(
    ("value", "verdict"),
    [
        (0.75, "reproduced"),
        (0.625, "reproduced"),  # an edge, of numbers that are exact in binary
        (0.875, "reproduced"),
        (0.62, "close"),
        (0.5, "close"),
        (0.49, "not reproduced"),
        (1.01, "not reproduced"),  # better is no reproduction either
    ],
)
def test_a_verdict_follows_from_the_distance_in_bands(value, verdict):
    assert scoreboard.judge(number(value), 0.75, 0.125) == verdict


def test_without_a_run_or_a_published_value_there_is_no_verdict():
    assert scoreboard.judge(None, 0.9, 0.01) == "not run"
    assert scoreboard.judge(number(0.9), np.nan, np.nan) == "not run"


def test_the_paper_profile_is_judged_and_others_show_stand_ins(published):
    metrics = {"big/scbert/accuracy": number(0.905), "big/majority/accuracy": number(0.4)}
    metrics |= {"tiny/scbert/accuracy": number(0.9), "tiny/logistic_regression/accuracy": number(0.7)}
    paper = scoreboard.fill_board(published, metrics, "paper")
    assert list(paper.index) == [
        "big/scbert/accuracy", "big/logistic_regression/accuracy", "big:held_out/scbert/macro_f1",
    ]  # fmt: skip
    assert paper["verdict"].tolist() == ["reproduced", "not run", "not run"]
    assert paper["this run"].tolist() == ["0.905 [0.895, 0.915]", "", ""]
    assert paper["majority"].tolist() == ["0.400 [0.390, 0.410]", "0.400 [0.390, 0.410]", ""]
    assert paper["published reproductions"].tolist() == ["0.8800 [K], 0.8912 [B]", "0.9500 [B]", ""]

    records = {"05": {"metrics": {"tiny/scbert/accuracy": number(0.8)}, "source": "published"}}
    shipped = scoreboard.fill_board(published, scoreboard.gather_metrics(records), "demo")
    assert shipped["this run (demo stand-in)"].tolist() == ["0.800 [0.790, 0.810] (published run)", "", ""]

    demo = scoreboard.fill_board(published, metrics, "demo")
    assert set(demo["verdict"]) == {"not run"}  # however near the stand-in lies
    assert demo["this run (demo stand-in)"].tolist() == ["0.900 [0.890, 0.910]", "0.700 [0.690, 0.710]", ""]
    assert demo["logistic_regression"].tolist() == ["0.700 [0.690, 0.710]", "0.700 [0.690, 0.710]", ""]
    assert published.shape == (4, 11)  # as it was


def test_only_what_others_ran_again_is_drawn(published):
    drawn = scoreboard.select_reproduced(published)
    assert drawn["reproduction_source"].tolist() == ["K", "B"]
    assert scoreboard.select_reproduced(published, "macro_f1").empty


def test_a_list_that_lacks_a_column_or_a_band_is_refused(tmp_path):
    file = tmp_path / "mine.csv"
    file.write_text(PUBLISHED.replace("stand_in", "other"))
    with pytest.raises(ValueError, match="lacks the columns stand_in"):
        scoreboard.read_published(file)
    file.write_text(PUBLISHED.replace("0.05,none", ","))
    with pytest.raises(ValueError, match="no band of: big:held_out/scbert/macro_f1"):
        scoreboard.read_published(file)


def test_the_project_s_own_list_is_found_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    published = scoreboard.read_published("tests/expected/paper.csv")
    assert list(published.columns) == scoreboard.COLUMNS


def test_runs_are_listed_by_notebook():
    records = {
        name: {"source": "published", "seconds": 3.5, "metrics": dict.fromkeys(range(n))}
        for n, name in enumerate(["00_a", "01_b", "11_scoreboard"])
    }
    runs = scoreboard.list_runs(records, without="11_scoreboard")
    expected = {"source": ["published"] * 2, "seconds": [3.5] * 2, "metrics": [0, 1]}
    pd.testing.assert_frame_equal(runs, pd.DataFrame(expected, ["00_a", "01_b"], dtype=object))


CLAIM = """claim,experiment,paper,others,against,metric,rival,lower_is_better
best,E1,paper [P],none,a line,[^:/]+/scbert/accuracy,line,0
deletes,E8,paper [P],none,even,[^:/]+/scbert:attention/area,even,1
finds,E6,paper [P],none,a line,[^:/]+:held_out/scbert/recall,line,0
vectors,none,not tested [P],p [B],others,[^:/]+/scbert/accuracy,other,0
"""


@pytest.mark.parametrize(
    ("differences", "counts", "verdict"),
    [
        ({"a": 0.1, "b": 0.2}, [2, 0, 0], "supported"),
        ({"a": 0.1, "b": -0.2}, [1, 0, 1], "supported with conditions"),
        ({"a": 0.005, "b": -0.2}, [0, 1, 1], "not supported"),
        ({}, [0, 0, 0], "not yet tested"),
    ],
)
def test_a_claim_is_judged_by_each_difference_on_record(tmp_path, differences, counts, verdict):
    (tmp_path / "claims.csv").write_text(CLAIM)
    metrics = {f"{name}/scbert/accuracy_minus_line": number(value) for name, value in differences.items()}
    board = scoreboard.judge_claims(tmp_path / "claims.csv", metrics)
    row = board.loc["best"]
    assert (row[["ahead", "not decided", "behind"]].tolist(), row["verdict"]) == (counts, verdict)
    assert row["against"] == "a line"
    assert board.loc["vectors", "verdict"] == "not yet tested"


def test_small_is_good_where_a_claim_says_so_and_intervals_apart_decide_without_a_difference(tmp_path):
    (tmp_path / "claims.csv").write_text(CLAIM)
    metrics = {"a/scbert:attention/area_minus_even": number(-0.1)}
    metrics |= {"a:held_out/scbert/recall": number(0.5), "a:held_out/line/recall": number(0.3)}
    metrics |= {"b:held_out/scbert/recall": number(0.5), "b:held_out/line/recall": number(0.51)}
    board = scoreboard.judge_claims(tmp_path / "claims.csv", metrics)
    assert board.loc["deletes", "verdict"] == "supported"
    assert board.loc["finds", ["ahead", "not decided", "behind"]].tolist() == [1, 1, 0]


def test_claims_without_a_column_are_refused(tmp_path):
    (tmp_path / "claims.csv").write_text(CLAIM.replace("rival", "enemy"))
    with pytest.raises(ValueError, match="lacks the columns rival"):
        scoreboard.judge_claims(tmp_path / "claims.csv", {})


@pytest.mark.parametrize("profile", ["demo", "small"])
def test_each_claim_but_gene2vec_is_asked_by_some_profile(profile):
    records = {name: r for name, r in report.read_records(profile).items() if r["source"] == "published"}
    board = scoreboard.judge_claims("tests/expected/claims.csv", scoreboard.gather_metrics(records))
    open_claims = board.index[board["verdict"] == "not yet tested"].tolist()
    assert "gene2vec matters" in open_claims
    assert len(open_claims) == (1 if profile == "small" else 2)
