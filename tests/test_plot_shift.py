"""Figures of notebook 06: that they draw the numbers they are given, and say what they cannot draw."""

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

from scbert import embeddings, plot_shift
from scbert.data.preprocess import tokenize

matplotlib.use("Agg")


@pytest.fixture(autouse=True)
def _close_figures():
    yield
    plt.close("all")


@pytest.fixture
def doses():
    severities = {
        "all:1": 1,
        "all:3": 3,
        "all:3:equalised": 9,
        "all:1:within": 9,
        "depth:1": 1,
        "depth:3": 3,
        "none:0": 0,
    }
    rows = [
        {"level": level, "method": method, "metric": "accuracy", "value": start - 0.1 * severity}
        for level, severity in severities.items()
        for method, start in [("scbert", 0.8), ("logistic_regression", 0.9)]
    ]
    table = pd.DataFrame(rows)
    return table.assign(low=table["value"] - 0.02, high=table["value"] + 0.05, n=100)


@pytest.fixture
def measured():
    metrics = (*embeddings.OF_LABELS, *embeddings.OF_BATCHES)
    random = np.random.default_rng(0)
    table = pd.DataFrame({"value": random.uniform(0.2, 0.9, 3 * len(metrics))})
    table.index = pd.MultiIndex.from_product([["pca", "harmony", "scbert"], metrics], names=["embedding", "metric"])
    return table.assign(low=table["value"] - 0.1, high=table["value"] + 0.1)


def texts(axis_or_legend):
    return [text.get_text() for text in axis_or_legend]


def test_each_effect_is_a_panel_that_starts_at_severity_zero(doses):
    axes = plot_shift.dose_response(doses)
    assert [ax.get_title() for ax in axes] == ["all", "depth"]
    for ax in axes:
        line = next(c for c in ax.containers if c.get_label() == "logistic regression")
        np.testing.assert_allclose(line[0].get_ydata().astype(float), [0.9, 0.8, 0.6])
        np.testing.assert_allclose(line[0].get_xdata().astype(float), [0, 1, 3], atol=0.1)
        (ends,) = (np.array(part.get_segments())[:, :, 1] for part in line[2])
        np.testing.assert_allclose(ends, [[0.88, 0.95], [0.78, 0.85], [0.58, 0.65]])
        assert texts(ax.get_xticklabels()) == ["0", "1", "3"]
    assert axes[0].get_ylim() == axes[1].get_ylim()
    assert texts(axes[0].figure.legends[0].get_texts()) == ["scbert", "logistic regression"]


def test_methods_are_chosen_and_ordered_and_panels_wrap(doses):
    axes = plot_shift.dose_response(doses.set_index("level"), methods=["scbert"], n_columns=1)
    assert axes[0].get_position().y0 > axes[1].get_position().y0
    assert texts(axes[0].figure.legends[0].get_texts()) == ["scbert"]
    with pytest.raises(ValueError, match="no macro_f1"):
        plot_shift.dose_response(doses, "macro_f1")
    with pytest.raises(ValueError, match="no effect but none"):
        plot_shift.dose_response(doses[doses["level"] == "none:0"])


def test_metrics_of_types_are_left_and_those_of_studies_right(measured):
    left, right = plot_shift.mixing(measured, title="set")
    assert len(left.get_yticks()) == len(embeddings.OF_LABELS) and len(right.get_yticks()) == len(embeddings.OF_BATCHES)
    pca, _, scbert = right.containers
    np.testing.assert_allclose(
        pca[0].get_xdata().astype(float), measured.loc["pca"].loc[list(embeddings.OF_BATCHES), "value"]
    )
    np.testing.assert_allclose(np.round(scbert[0].get_ydata().astype(float)), [0, 1, 2])
    assert texts(left.figure.legends[0].get_texts()) == ["PCA", "Harmony", "scBERT"]
    colors = [container[0].get_color() for container in left.containers]
    assert len(set(colors)) == 3 and colors[2] == "#0173b2"


def test_a_metric_that_one_embedding_lacks_leaves_a_gap(measured):
    rows = measured.drop(index=("pca", "batch_mixing"))
    _, right = plot_shift.mixing(rows, embeddings=["scbert", "pca"])
    assert [len(container[0].get_xdata()) for container in right.containers] == [3, 2]
    with pytest.raises(ValueError, match="no metric"):
        plot_shift.mixing(rows, embeddings=["umap"])


def test_mixing_beyond_one_stays_in_the_panel(measured):
    measured.loc[("pca", "batch_mixing"), ["value", "high"]] = 1.3, 1.5
    _, right = plot_shift.mixing(measured)
    assert right.get_xlim()[1] > 1.5


@pytest.fixture
def worlds(make_cells):
    adata = make_cells()
    adata.obs["study"] = np.where(np.arange(adata.n_obs) < 20, "one", "two")
    shallow = adata.copy()
    shallow.obs["n_counts"] = np.where(shallow.obs["study"] == "two", 500.0, 2000.0)
    return {"none:0": adata, "depth:1": shallow}


def test_token_shares_are_counted_by_study(worlds):
    table = plot_shift.count_token_shares(worlds)
    assert table.index.tolist() == [(name, study) for name in worlds for study in ("one", "two")]
    assert table.columns.tolist() == [1, 2, 3, 4, 5, "median_counts"]
    assert table["median_counts"].tolist() == [2000, 2000, 2000, 500]
    own = tokenize(worlds["depth:1"].copy()).layers["bins"][20:].toarray().ravel()
    for token in range(1, 6):
        assert table.loc[("depth:1", "two"), token] == pytest.approx((own == token).sum() / (own > 0).sum())
    assert table.loc["none:0"].iloc[0].equals(table.loc["depth:1"].iloc[0])
    few = plot_shift.count_token_shares(worlds, list(worlds["none:0"].var_names[:3]))
    assert not np.allclose(few, table)


def test_each_study_is_a_bar_of_its_shares(worlds):
    table = plot_shift.count_token_shares(worlds)
    axes = plot_shift.depth_of_tokens(table)
    assert [ax.get_title() for ax in axes] == ["none:0", "depth:1"]
    widths = np.array([[bar.get_width() for bar in token] for token in axes[1].containers])  # (tokens, studies)
    np.testing.assert_allclose(widths.T, table.loc["depth:1"].drop(columns="median_counts"))
    starts = np.array([[bar.get_x() for bar in token] for token in axes[1].containers])
    np.testing.assert_allclose(starts[-1] + widths[-1], 1)
    assert [text.get_text() for text in axes[1].texts][:2] == ["2,000", "500"]
    with pytest.raises(ValueError, match="sum to one"):
        plot_shift.depth_of_tokens(table * 2)


def test_embeddings_are_columns_with_studies_above_types():
    random = np.random.default_rng(0)
    places = {"pca": random.normal(size=(30, 2)), "scbert": random.normal(size=(30, 2))}
    axes = plot_shift.embeddings(places, ["x", "y"] * 15, list("abc") * 10)
    assert axes.shape == (2, 2)
    assert [ax.get_title() for ax in axes[0]] == ["PCA", "scBERT"]
    shown = np.sort(axes[1, 1].collections[0].get_offsets(), axis=0)
    np.testing.assert_allclose(shown, np.sort(places["scbert"], axis=0))
    assert [len(np.unique(ax.collections[0].get_facecolors(), axis=0)) for ax in axes[:, 0]] == [2, 3]
    names = texts(axes[0, 0].figure.legends[0].get_texts())
    assert names == ["study", "x", "y", "cell type", "a", "b", "c"]
    with pytest.raises(ValueError, match="30 cells, for 29 studies"):
        plot_shift.embeddings(places, ["x"] * 29, ["a"] * 29)
    with pytest.raises(ValueError, match="no embedding"):
        plot_shift.embeddings({}, [], [])
