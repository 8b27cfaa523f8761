"""Figures of genes: what is drawn is what the table says."""

import anndata
import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

from scbert import plot_genes

matplotlib.use("Agg")


@pytest.fixture(autouse=True)
def _close_figures():
    yield
    plt.close("all")


@pytest.fixture
def means():
    return pd.DataFrame([[4.0, 1, 0.5], [2, 2, 1]], index=["a", "b"], columns=["x", "y", "z"])


@pytest.fixture
def top():
    return pd.DataFrame({"type": list("aab"), "gene": list("xyz"), "rank": [1, 2, 1]})


def texts(labels):
    return [label.get_text() for label in labels]


def test_each_gene_is_scaled_to_its_own_largest_value_and_framed_in_its_type(means, top):
    ax, below = plot_genes.attention_heatmap(means, top, 1 / means)
    np.testing.assert_allclose(ax.collections[0].get_array().reshape(2, 3), [[1, 0.5, 0.5], [0.5, 1, 1]])
    np.testing.assert_allclose(below.collections[0].get_array().reshape(2, 3), [[0.5, 1, 1], [1, 0.5, 0.5]])
    assert texts(below.get_xticklabels()) == ["x", "y", "z"]
    for panel in (ax, below):
        frames = [(p.get_x(), p.get_y(), p.get_width()) for p in panel.patches]
        assert frames == [(0, 0, 2), (2, 1, 1)]


def test_dots_grow_with_the_share_and_are_coloured_by_z(means, top):
    shares = pd.DataFrame([[1.0, 0, 0.5], [0.5, 1, 1]], index=["a", "b"], columns=["x", "y", "z"])
    ax = plot_genes.dot_plot(means, shares, top, n=1)
    dots = ax.collections[0]
    np.testing.assert_allclose(dots.get_sizes(), 85 * np.array([1, 0.5, 0.5, 1]))
    np.testing.assert_allclose(dots.get_array().ravel(), [1, -1, -1, 1])
    assert texts(ax.get_xticklabels()) == ["x", "z"]


def test_bars_are_minus_log_fdr_and_a_types_own_set_is_shown_and_filled():
    table = pd.DataFrame(
        {
            "type": ["a"] * 5, "term": ["REACTOME_ONE_TWO", "t2", "missed", "t4", "mine"], "p": [1e-4, 1e-3, 0.01, 0.1, 0.5],
            "fdr": [1e-3, 0.01, 0.1, 1, 1], "own": [False] * 4 + [True], "overlap": [3, 3, 0, 3, 3], "size": 9,
        }
    )  # fmt: skip
    table = pd.concat([table.assign(collection="one"), table.assign(collection="other", type="b")])
    (ax,) = plot_genes.enrichment(table, n=2)
    assert [bar.get_width() for bar in ax.patches] == pytest.approx([3, 2, 0])
    assert texts(ax.get_yticklabels()) == ["ONE TWO (3/9)", "t2 (3/9)", "mine (3/9)"]
    assert [bar.get_facecolor()[:3] == (1, 1, 1) for bar in ax.patches] == [True, True, False]


def test_the_matrix_is_centred_on_an_even_spread():
    table = pd.DataFrame([[1.3, np.nan], [0.9, 1]], index=["x", "y"], columns=["x", "y"])
    ax = plot_genes.matrix(table)
    assert ax.collections[0].get_clim() == pytest.approx((0.7, 1.3))


@pytest.fixture
def shares():
    rows = [
        {"judge": judge, "kind": kind, "ranking": ranking, "number": number, "value": value}
        for judge in ("scbert", "logistic_regression")
        for kind in ("deletion", "insertion")
        for ranking, value in (("attention", 0.5), ("random", 0.9))
        for number in (1, 10)
    ]
    table = pd.DataFrame(rows)
    return table.assign(low=table["value"] - 0.1, high=table["value"] + 0.1, n=40, seeds=1)


def test_curves_have_a_panel_a_kind_and_judge_and_a_line_a_ranking(shares):
    axes = plot_genes.deletion_curves(shares)
    assert axes.shape == (2, 2)
    lines = {
        line.get_label(): line
        for line in axes[0, 1].lines
        if len(line.get_xdata()) == 2 and line.get_marker() != "None"
    }
    assert set(lines) == {"attention", "random"}
    assert list(lines["random"].get_ydata()) == [0.9, 0.9]
    assert plot_genes.deletion_curves(shares, judge="scbert").shape == (1, 2)


def test_areas_are_points_of_each_judge_beside_each_other(shares):
    axes = plot_genes.areas(shares[shares["number"] == 1])
    assert texts(axes[0].get_yticklabels()) == ["attention", "random"]
    points = [line for line in axes[0].lines if len(line.get_xdata()) == 1]
    assert sorted(line.get_xdata()[0] for line in points) == [0.5, 0.5, 0.9, 0.9]
    assert "left is better" in axes[0].get_title()
    assert "right is better" in axes[1].get_title()


def test_agreement_is_averaged_over_types_and_has_a_panel_a_comparison():
    table = pd.DataFrame(
        {"one": "s0", "other": ["s1", "s1", "s2", "s2"], "spearman": [0.2, 0.4, 0.5, 0.7], "chance": 0.1}
    )
    table = pd.concat([table.assign(between="seeds"), table.assign(between="layers", spearman=1.0)])
    axes = plot_genes.agreement(table, "spearman")
    assert [ax.get_title() for ax in axes] == ["seeds\nspearman", "layers\nspearman"]
    assert texts(axes[0].texts) == ["0.30", "0.60"]


def test_clusters_have_a_line_an_embedding():
    sweep = pd.DataFrame(
        {"embedding": ["PCA"] * 2 + ["scBERT"] * 2, "resolution": [0.5, 1] * 2, "ari": [0.4, 0.5, 0.6, 0.7]}
    )
    sweep = sweep.assign(ari_low=sweep["ari"] - 0.1, ari_high=sweep["ari"] + 0.1)
    ax = plot_genes.clusters(sweep)
    assert texts(ax.get_legend().get_texts()) == ["scBERT", "PCA"]  # best last value first
    assert list(ax.containers[0].lines[0].get_ydata()) == [0.6, 0.7]
    assert ax.get_ylabel() == "ARI"


def test_genes_on_cells_have_a_panel_each_known_ones_first_and_the_highest_on_top():
    counts = np.array([[3.0, 0, 1], [1, 1, 1], [2, 2, 1]])
    adata = anndata.AnnData(counts, obs={"n_counts": [10.0] * 3}, obsm={"X_umap": np.eye(3)[:, :2]})
    adata.var_names = ["x", "y", "z"]
    top = pd.DataFrame({"type": list("abb"), "gene": list("yxz"), "rank": [1, 1, 2], "member": [False, True, None]})
    axes = plot_genes.genes_on_cells(adata, top, n=2)
    assert [ax.get_title() for ax in axes] == ["x, in a set of\nb", "y, not in a set of\na"]
    np.testing.assert_allclose(axes[0].collections[0].get_array(), np.log1p([1000, 2000, 3000]) / np.log1p(3000))
    assert axes[0].figure.axes[-1].get_ylabel() == "log-normalised counts\n/ the gene's largest"


def test_rankings_differ_in_marker_and_a_new_one_is_grey():
    styles = plot_genes.style_rankings([*plot_genes.RANKINGS, "mine"])
    assert len({style["marker"] for style in styles.values()}) == len(styles)
    assert styles["mine"]["color"] == "0.3"
