"""Figures of novel types: that what is drawn is what the tables say, and that the slider is there only for somebody."""

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from test_novelty import keep

from scbert import calibration, novel_types, novelty, plot_novelty

matplotlib.use("Agg")
METHODS = ["logistic_regression", "scbert"]


@pytest.fixture(autouse=True)
def _close_figures():
    yield
    plt.close("all")


@pytest.fixture(scope="module")
def kept():
    return {
        ("set", f"{purpose}:{level}", 0, method): keep(seed=i)
        for i, (method, purpose, level) in enumerate(
            (method, purpose, level)
            for method in METHODS
            for purpose in ("held_out", "tuning")
            for level in ("together", "new", "other")
        )
    }


@pytest.fixture(scope="module")
def cells(kept):
    one = kept["set", "held_out:together", 0, "scbert"]
    kept = kept | {("set", "held_out:together", 0, "logistic_regression"): one}  # the same cells
    return novel_types.score_jobs(kept)


@pytest.fixture(scope="module")
def tested(cells):
    return cells[(cells["purpose"] == "held_out") & (cells["part"] == "test") & (cells["level"] == "together")]


@pytest.fixture(scope="module")
def measured(cells):
    return novel_types.measure_all(cells, novelty.choose_thresholds(cells))


def test_confidence_has_a_box_a_type_and_novel_types_are_bold_and_last(tested):
    axes = plot_novelty.confidence_by_type(tested, METHODS)
    names = axes[0].get_yticklabels()
    assert [name.get_text() for name in names][-1] == "new (40)"
    assert [name.get_fontweight() for name in names] == ["normal"] * 3 + ["bold"]
    own = tested[(tested["method"] == "scbert") & (tested["truth"] == "new")]
    medians = [
        line.get_xdata()[0] for line in axes[1].lines if line.get_color() == "black" and len(line.get_xdata()) == 2
    ]
    assert any(np.isclose(medians, 1 - own["max_probability"].median()))


def bands(ax):
    """Return the heights of a panel's bands, where they start."""
    paths = [patch.get_path().vertices for patch in ax.patches if len(patch.get_path().vertices) == 9]
    return sorted(round(float(path[7, 1] - path[0, 1]), 6) for path in paths)


def test_a_band_is_as_wide_as_its_share_of_cells_and_thin_ones_are_one():
    calls = pd.DataFrame(
        [["x", "a", False, "a", 60], ["x", "new", True, "Unassigned", 38], ["x", "new", True, "a", 1], ["x", "new", True, "b", 1]],
        columns=["method", "truth", "novel", "called", "cells"],
    )  # fmt: skip
    ax = plot_novelty.sankey(calls, ["x"], thin=0.05)[0]
    assert bands(ax) == [0.02, 0.38, 0.6]
    texts = {text.get_text() for text in ax.texts}
    assert texts == {"a", "new", "other types", "Unassigned"}
    assert bands(plot_novelty.sankey(calls, ["x"], thin=0)[0]) == [0.01, 0.01, 0.38, 0.6]


def test_names_of_a_sankey_do_not_overlap(tested):
    ax = plot_novelty.sankey(novelty.count_calls(tested, 0.6), METHODS)[0]
    ax.figure.canvas.draw()
    boxes = [text.get_window_extent() for text in ax.texts]
    assert not any(one.overlaps(other) for i, one in enumerate(boxes) for other in boxes[:i])


def test_calls_are_counted_cell_by_cell(tested):
    calls = novelty.count_calls(tested, 0.5)
    own = tested[(tested["method"] == "scbert") & (tested["truth"] == "new")]
    expected = (own["confidence"] < 0.5).sum()
    row = calls.query("method == 'scbert' and truth == 'new' and called == 'Unassigned' and novel")
    assert row["cells"].item() == expected > 0
    assert calls.groupby("method")["cells"].sum().tolist() == [200, 200]


def test_the_dot_of_the_papers_threshold_lies_where_its_cells_say(tested):
    axes = plot_novelty.roc_and_pr(novelty.trace_curves(tested), METHODS)
    own = tested[tested["method"] == "scbert"]
    unassigned, novel = own["confidence"] < 0.5, ~own["seen"].astype(bool)
    dot = [line for line in axes[0].lines if line.get_marker() == "o"][0]
    np.testing.assert_allclose(dot.get_xydata(), [[unassigned[~novel].mean(), unassigned[novel].mean()]])
    dot = [line for line in axes[1].lines if line.get_marker() == "o"][0]
    np.testing.assert_allclose(dot.get_xydata(), [[unassigned[novel].mean(), novel[unassigned].mean()]])


def test_the_area_under_the_drawn_roc_is_the_auroc(tested, measured):
    curves = novelty.trace_curves(tested, ["entropy"], n_steps=1000).query("method == 'scbert'")
    area = np.trapezoid(curves["recall"], curves["false_alarms"])
    assert area == pytest.approx(
        measured.xs(("together", "scbert", "entropy", "", "auroc"), level=[1, 2, 3, 4, 5])["value"].item()
    )


def test_a_sweep_marks_both_thresholds_and_a_method_without_a_tuned_one_the_papers(tested):
    table = pd.concat(
        {name: novelty.sweep_thresholds(own, n_steps=5) for name, own in tested.groupby("method")}, names=["method"]
    )
    axes = plot_novelty.threshold_sweep(table, pd.Series({"scbert": 0.8}), METHODS)
    marks = [[line.get_xdata()[0] for line in ax.lines if list(line.get_ydata()) == [0, 1]] for ax in axes]
    assert marks == [[0.5], [0.5, 0.8]]


def test_reliability_has_a_dot_for_each_bin(kept):
    table = calibration.tabulate_jobs(kept).xs("set")
    axes = plot_novelty.reliability(table, METHODS)
    for ax, method in zip(axes, METHODS, strict=True):
        drawn = np.concatenate(
            [dots.get_offsets() for dots in ax.collections if hasattr(dots, "get_sizes") and len(dots.get_sizes())]
        )
        np.testing.assert_allclose(np.sort(drawn[:, 1]), np.sort(table.xs(method, level="method")["accuracy"]))


def test_accuracy_of_novel_types_stands_beside_that_of_leaving_all_unassigned(measured):
    axes = plot_novelty.novelty_accuracy(measured, METHODS)
    segments = [c.get_segments()[0] for c in axes[0].collections if c.get_label() == "all cells unassigned"]
    np.testing.assert_allclose([segment[0, 1] for segment in segments], [0.2])  # 40 of 200 cells are novel
    names = [text.get_text() for text in axes[0].figure.legends[0].get_texts()]
    assert {"scbert", "scbert, tuned"} <= set(names)


def test_types_held_out_alone_stand_one_below_the_other(measured):
    ax = plot_novelty.types_alone(measured, METHODS)[0]
    assert {label.get_text() for label in ax.get_yticklabels()} == {"new", "other"}
    together = measured[measured.index.get_level_values("level") == "together"]
    with pytest.raises(ValueError, match="parameter alone"):
        plot_novelty.types_alone(together, METHODS)


def test_without_a_live_front_end_the_figure_is_all_there_is(tested, monkeypatch):
    monkeypatch.delenv("JPY_SESSION_NAME", raising=False)
    monkeypatch.setattr(plot_novelty, "show_slider", lambda *_: pytest.fail("nobody could move it"))
    axes = plot_novelty.threshold_slider(tested, METHODS, 0.6)
    assert axes[0].figure.get_suptitle() == "Unassigned below 0.60"
    assert len(plt.get_fignums()) == 1


def test_the_title_says_what_the_threshold_does(tested, measured):
    axes = plot_novelty.threshold_slider(tested, METHODS, 0.5)
    found = measured.xs(("together", "scbert", "max_probability", "paper"), level=[1, 2, 3, 4])["value"].droplevel(
        "data"
    )
    said = f"recall {found['recall']:.2f}, Jaccard {found['jaccard']:.2f}, known accuracy {found['known_accuracy']:.2f}"
    assert axes[1].get_title() == f"scbert\n{said}"


def test_in_a_live_front_end_a_slider_redraws_the_figure(tested, monkeypatch):
    pytest.importorskip("ipywidgets", reason="ipywidgets is not installed")
    monkeypatch.setenv("JPY_SESSION_NAME", "notebook.ipynb")
    shown, drawn = [], []
    monkeypatch.setattr("IPython.display.display", shown.append)
    sankey = plot_novelty.sankey
    monkeypatch.setattr(plot_novelty, "sankey", lambda *args: drawn.append(sankey(*args)) or drawn[-1])
    plot_novelty.threshold_slider(tested, METHODS, 0.5)
    box = next(one for one in shown if hasattr(one, "children"))
    slider, before = box.children[0], len(drawn)
    assert slider.value == 0.5
    slider.value = 0.9
    assert len(drawn) == before + 1
    assert drawn[-1][0].figure.get_suptitle() == "Unassigned below 0.90"
    assert len(plt.get_fignums()) == 1  # the static figure; the slider's are closed
