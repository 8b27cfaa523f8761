"""Figures: colours, and that each function draws what it is given on the axes it is given."""

import anndata
import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

from scbert import plot

matplotlib.use("Agg")


@pytest.fixture(autouse=True)
def _close_figures():
    yield
    plt.close("all")


def test_ten_labels_have_ten_colours_and_unassigned_is_grey_only_where_it_occurs():
    labels = [f"type {i}" for i in range(10)]
    colors = plot.color_labels([*labels, "Unassigned"])
    assert list(colors) == [*labels, "Unassigned"]
    assert len(set(colors.values())) == 11
    assert "Unassigned" not in plot.color_labels(labels)


def test_more_labels_than_safe_colours_still_get_one_each():
    assert len(set(plot.color_labels([f"type {i:02d}" for i in range(25)]).values())) == 25


def test_the_legend_of_an_embedding_names_the_whole_palette():
    adata = anndata.AnnData(np.ones((4, 2)), obs={"kind": ["a", "a", "b", "b"]}, obsm={"X_umap": np.eye(4)[:, :2]})
    ax = plot.embedding(adata, "kind", palette=plot.color_labels(["a", "b", "c"]))
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["a", "b", "c"]


def test_confusion_rows_are_shares_of_the_true_type():
    ax = plot.confusion(["a", "a", "a", "a", "b"], ["a", "a", "a", "b", "b"])
    shares = ax.collections[0].get_array().reshape(2, 2)
    np.testing.assert_allclose(shares, [[0.75, 0.25], [0, 1]])
    assert [label.get_text() for label in ax.get_yticklabels()] == ["a (4)", "b (1)"]


def test_scores_are_drawn_best_on_top_with_their_intervals():
    table = pd.DataFrame(
        {"method": ["x", "scbert"], "metric": "accuracy", "value": [0.9, 0.5], "low": [0.8, 0.4], "high": [1, 0.6]}
    ).set_index(["method", "metric"])
    ax = plot.scores(table, "accuracy")
    assert [label.get_text() for label in ax.get_yticklabels()] == ["scbert", "x"]
    assert list(ax.lines[0].get_xdata()) == [0.4, 0.6]
    with pytest.raises(KeyError):
        plot.scores(table, "macro_f1")


def test_cells_with_a_umap_keep_it():
    adata = anndata.AnnData(np.ones((3, 2)), obsm={"X_umap": np.eye(3)[:, :2]})
    plot.place_cells(adata)
    np.testing.assert_array_equal(adata.obsm["X_umap"], np.eye(3)[:, :2])


def test_logarithmic_axes_carry_plain_numbers():
    figure, ax = plt.subplots()
    ax.plot([1000, 4000], [0.03, 0.4])
    plot.scale_logarithmically(ax, [1000, 4000])
    figure.canvas.draw()
    assert [label.get_text() for label in ax.get_xticklabels()] == ["1,000", "4,000"]
    assert {"0.05", "0.1", "0.2"} <= {label.get_text() for label in ax.get_yticklabels()}


def test_costs_have_a_column_a_step_and_a_line_an_attention():
    sweep = pd.DataFrame({"tokens": [1000, 2000] * 3, "step": ["forward"] * 4 + ["training"] * 2})
    sweep["attention"] = ["scbert"] * 2 + ["fused_softmax"] * 2 + ["scbert"] * 2
    sweep["seconds"], sweep["peak_mb"] = sweep["tokens"] / 1e4, sweep["tokens"] / 10
    axes = plot.costs(sweep)
    assert axes.shape == (2, 2)
    assert [len(ax.lines) for ax in axes.flat] == [2, 1, 2, 1]
    assert [text.get_text() for text in axes[0, 0].get_legend().texts] == ["scbert", "fused softmax"]
    assert list(axes[1, 1].lines[0].get_ydata()) == [100, 200]


def test_gene_names_are_drawn_as_genes_and_as_share_of_counts():
    table = pd.DataFrame({"genes": [1200, 3], "share_of_counts": [0.9, 0.1]}, index=["matched", "unknown"])
    left, right = plot.gene_names(table)
    assert [bar.get_width() for bar in left.patches] == [1200, 3]
    assert [text.get_text() for text in left.texts] == ["1,200", "3"]
    assert [text.get_text() for text in right.texts] == ["90.0%", "10.0%"]
    assert left.get_ylim()[0] > left.get_ylim()[1]  # the first row is on top


def test_by_token_draws_a_line_a_method_over_the_tokens_and_how_many_masks_they_have():
    table = pd.DataFrame({"n_masked": [1200, 3], "scbert": [0.9, 0.1], "rival": [1.0, 0.0]}, index=[1, 2])
    ax = plot.by_token(table, {"scbert": "scBERT", "rival": "a rival"})
    assert [line.get_ydata().tolist() for line in ax.lines] == [[0.9, 0.1], [1.0, 0.0]]
    assert [label.get_text() for label in ax.get_xticklabels()] == ["1\n(n = 1,200)", "2\n(n = 3)"]


def test_cells_are_placed_by_what_is_named_in_place_of_what_is_there():
    random = np.random.default_rng(0)
    adata = anndata.AnnData(random.poisson(3, (40, 8)).astype(np.float32))
    plot.place_cells(adata)
    first = adata.obsm["X_umap"]
    plot.place_cells(adata)
    assert adata.obsm["X_umap"] is first
    adata.obsm["X_own"] = np.repeat([[0.0, 0.0], [9.0, 9.0]], 20, axis=0) + random.normal(0, 0.1, (40, 2))
    plot.place_cells(adata, basis="X_own")
    halves = adata.obsm["X_umap"][:20], adata.obsm["X_umap"][20:]
    assert np.linalg.norm(halves[0].mean(0) - halves[1].mean(0)) > 2 * max(half.std() for half in halves)
