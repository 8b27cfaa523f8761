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


def test_a_method_has_one_colour_and_marker_in_all_figures_and_no_two_share_both():
    known = plot.style_methods(plot.STYLES)
    assert plot.style_methods(["scbert"])["scbert"] == known["scbert"] == {"color": "#0173b2", "marker": "o"}
    assert len({tuple(style.values()) for style in known.values()}) == len(known)
    more = plot.style_methods(["own", "scbert", "other", "own"])
    assert list(more) == ["own", "scbert", "other"]
    assert len({style["color"] for style in [*known.values(), more["own"], more["other"]]}) == len(known) + 2


def test_embeddings_place_the_same_cells_by_each_basis_in_the_same_colours(make_cells):
    adata = make_cells()
    adata.obsm["X_own"] = np.random.default_rng(0).normal(size=(60, 4))
    adata.obsm["X_umap"] = np.zeros((60, 2))  # of an earlier day: not drawn
    adata.obs.loc["cell0", "cell_type"] = np.nan
    before = adata.copy()
    left, right = plot.embeddings(adata, "cell_type", {"own": "X_own", "components": None})
    assert (left.get_title(), right.get_title()) == ("own", "components")
    assert left.get_legend() is None
    assert [text.get_text() for text in right.get_legend().texts] == ["no label", "B", "Monocyte", "T/NK"]
    for ax in (left, right):
        assert [len(points.get_offsets()) for points in ax.collections] == [1, 19, 20, 20]
        assert np.ptp(np.concatenate([points.get_offsets() for points in ax.collections])) > 1
    assert [tuple(points.get_facecolor()[0]) for points in left.collections] == [
        tuple(points.get_facecolor()[0]) for points in right.collections
    ]
    pd.testing.assert_frame_equal(adata.obs, before.obs)
    assert set(adata.obsm) == {"X_own", "X_umap"} and not adata.obsm["X_umap"].any()


def test_confusions_share_labels_and_scale_and_only_the_first_names_the_true_types():
    rows = {"truth": ["a", "a", "b"] * 2, "predicted": ["a", "b", "b", "a", "a", "Unassigned"]}
    predictions = pd.DataFrame({"method": ["x"] * 3 + ["own_one"] * 3} | rows)
    axes = plot.confusions(predictions, ["own_one", "x"])
    assert [ax.get_title() for ax in axes] == ["own one", "x"]
    for ax in axes:
        assert [label.get_text() for label in ax.get_xticklabels()] == ["Unassigned", "a", "b"]
        assert ax.collections[0].get_clim() == (0, 1)
    np.testing.assert_allclose(axes[0].collections[0].get_array().reshape(2, 3), [[0, 1, 0], [1, 0, 0]])
    np.testing.assert_allclose(axes[1].collections[0].get_array().reshape(2, 3), [[0, 0.5, 0.5], [0, 0, 1]])
    assert [label.get_text() for label in axes[0].get_yticklabels()] == ["a (2)", "b (1)"]
    assert axes[1].get_yticklabels() == []
    assert len(axes[0].figure.axes) == 3  # one colour bar


def test_boxes_show_every_training_in_a_panel_a_data_set_best_on_top():
    table = pd.DataFrame({"data": ["one"] * 6 + ["two"] * 2, "method": ["low", "scbert"] * 4})
    table["macro_f1"] = [0.1, 0.9, 0.2, 0.8, 0.3, 0.7, 0.4, 0.6]
    left, right = plot.boxes(table, "macro_f1")
    assert [label.get_text() for label in left.get_yticklabels()] == ["scbert", "low"]
    assert left.get_ylim()[0] > left.get_ylim()[1]
    assert [points.get_offsets()[:, 0].tolist() for points in left.collections] == [[0.9, 0.8, 0.7], [0.1, 0.2, 0.3]]
    assert [points.get_offsets()[:, 0].tolist() for points in right.collections] == [[0.6], [0.4]]
    assert (left.get_title(), right.get_title(), left.get_xlabel()) == ("one", "two", "macro F1")
    assert left.lines and not right.lines  # no box of a single training
    (ax,) = plot.boxes(table, "macro_f1", order=["low", "scbert"], by="data")[:1]
    assert [label.get_text() for label in ax.get_yticklabels()] == ["low", "scbert"]


@pytest.fixture
def by_size():
    """Scores of two methods at three sizes, b the better at last, in an index as `concat` makes it."""
    keys = pd.MultiIndex.from_product(
        [[2, 17, 170], ["a", "b"], ["accuracy", "mcc"]], names=["cells", "method", "metric"]
    )
    values = np.repeat([0.5, 0.4, 0.6, 0.7, 0.7, 0.9], 2)
    return pd.DataFrame({"value": values, "low": values - 0.2, "high": values + 0.1}, index=keys)


@pytest.mark.parametrize("logarithmic", [False, True])
def test_a_curve_has_a_line_a_method_with_its_intervals_in_the_order_of_the_last_values(by_size, logarithmic):
    ax = plot.curve(by_size, "cells", "accuracy", logarithmic=logarithmic)
    assert [text.get_text() for text in ax.get_legend().texts] == ["b", "a"]
    line, _, (bars,) = ax.containers[0]
    assert line.get_ydata().tolist() == [0.4, 0.7, 0.9]
    np.testing.assert_allclose([segment[:, 1] for segment in bars.get_segments()], [[0.2, 0.5], [0.5, 0.8], [0.7, 1]])
    assert [label.get_text() for label in ax.get_xticklabels()] == ["2", "17", "170"]
    np.testing.assert_allclose(line.get_xdata(), [2, 17, 170], rtol=0.5 if logarithmic else 0, atol=3)
    assert ax.get_xscale() == ("log" if logarithmic else "linear")
    assert ax.get_legend_handles_labels()[1] == ["b", "a"]
    (only,) = plot.curve(by_size.reset_index(), "cells", "mcc", methods=["a"]).get_legend().texts
    assert only.get_text() == "a"


def test_studies_have_a_slot_each_in_which_methods_stand_side_by_side(by_size):
    ax = plot.studies(by_size, "accuracy", by="cells", methods=["b", "a"])
    b, a = (container[0] for container in ax.containers)
    assert b.get_ydata().tolist() == [0.4, 0.7, 0.9]
    np.testing.assert_allclose((b.get_xdata() + a.get_xdata()) / 2, [0, 1, 2])
    assert (b.get_xdata() < a.get_xdata()).all()
    assert [label.get_text() for label in ax.get_xticklabels()] == ["2", "17", "170"]
    with pytest.raises(ValueError, match="The table has no recall"):
        plot.studies(by_size, "recall", by="cells")


def test_a_bar_joins_methods_whose_ranks_differ_by_less_than_the_critical_difference():
    table = pd.DataFrame({"mean_rank": [1.0, 1.8, 2.0, 3.4]}, index=["scbert", "a_b", "b", "c"])
    table.attrs = {"blocks": 9, "friedman_p": 0.01, "friedman_p_smallest": 1e-4, "critical_difference": 1.1}
    table.attrs["largest_difference"] = 2
    ax = plot.ranks(table)
    bars = [line.get_xdata().tolist() for line in ax.lines if line.get_color() == "k"]
    assert bars == [[1, 1.8, 2]]
    assert [point.get_offsets()[0, 0] for point in ax.collections] == [1, 1.8, 3.4, 2]
    assert [text.get_text().strip() for text in ax.texts] == [
        "scbert",
        "a b",
        "c",
        "b",
    ]  # on the left, and on the right
    assert ax.lines[1].get_color() == "#0173b2"
    assert ax.get_title() == (
        "9 blocks: critical difference 1.10, largest possible 2\nFriedman p = 0.01 (smallest possible 0.0001)"
    )
    table.attrs["friedman_p"] = float("nan")
    assert "Friedman" not in plot.ranks(table).get_title()


def test_named_cells_have_a_panel_for_batch_truth_and_each_method_in_the_same_colours():
    obs = pd.DataFrame({"kind": ["a", "b", "b"], "study": ["s1", "s2", "s2"]}, index=["c1", "c2", "c3"])
    adata = anndata.AnnData(np.ones((3, 1)), obs=obs, obsm={"X_umap": np.eye(3)[:, :2]})
    predictions = pd.DataFrame({"method": "own_one", "cell": ["c2", "c1", "c2"], "predicted": ["b", "b", "a"]})
    axes = plot.named_cells(adata, predictions, ["own_one"], "kind", "study")
    assert [ax.get_title() for ax in axes] == ["study", "true label", "own one"]
    place = {points.get_label(): points for points in axes[2].collections}
    np.testing.assert_array_equal(place["b"].get_offsets(), [[1, 0], [0, 1]])  # the first row of c2; c3 has none
    assert len(place["a"].get_offsets()) == 0
    names = [text.get_text() for text in axes[0].figure.legends[0].texts]
    assert names == ["cell type", "a", "b", "study", "s1", "s2"]
    assert len(plot.named_cells(adata, predictions, ["own_one"], "kind")) == 2
    with pytest.raises(ValueError, match="predictions of 'other' name none of these cells"):
        plot.named_cells(adata, predictions, ["other"], "kind")


def test_annotated_cells_have_a_panel_for_each_column_before_all_others():
    adata = anndata.AnnData(np.ones((4, 1)), pd.DataFrame(index=["c1", "c2", "c3", "c4"]))
    adata.obsm["X_umap"] = np.arange(8.0).reshape(4, 2)
    table = pd.DataFrame({"true_one": ["a", "b"], "named": ["b", "Unassigned"], "sure": [0.2, 0.9]}, ["c3", "c1"])
    axes = plot.annotation(adata, table)
    assert [ax.get_title() for ax in axes] == ["true one", "named", "sure"]
    for ax in axes:
        assert len(ax.collections[0].get_offsets()) == 4
    place = {points.get_label(): points.get_offsets().tolist() for points in axes[1].collections[1:]}
    assert place == {"a": [], "b": [[4, 5]], "Unassigned": [[0, 1]]}
    assert axes[2].collections[1].get_array().tolist() == [0.2, 0.9]
    (legend,) = [found for ax in axes[0].figure.axes if (found := ax.get_legend())]
    assert legend.axes not in axes
    assert [text.get_text() for text in legend.texts] == ["a", "b", "Unassigned"]
    colors = [{points.get_label(): points.get_facecolor().tolist() for points in ax.collections[1:]} for ax in axes[:2]]
    assert colors[0] == colors[1]


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


def test_a_majority_far_below_leaves_the_panel_to_the_others_and_its_value_is_written(by_size):
    table = pd.DataFrame({"data": "one", "method": ["majority", "a", "b"] * 2})
    table["accuracy"] = [0.2, 0.80, 0.85, 0.2, 0.81, 0.86]
    (ax,) = plot.boxes(table, "accuracy", order=["majority", "a", "b"])
    assert 0.7 < ax.get_xlim()[0] < 0.8
    assert "0.20" in " ".join(text.get_text() for text in ax.texts)
    table.loc[table["method"] == "majority", "accuracy"] = 0.78  # near the others it stays in view
    (ax,) = plot.boxes(table, "accuracy", order=["majority", "a", "b"])
    assert ax.get_xlim()[0] < 0.78
    assert not ax.texts
    near = by_size * 0.05 + 0.8
    level = by_size.xs("a", level="method", drop_level=False).rename(index={"a": "majority"}) * 0 + 0.01
    ax = plot.curve(pd.concat([near, level]), "cells", "accuracy")
    assert ax.get_ylim()[0] > 0.7
    assert "majority at most 0.01" in ax.texts[-1].get_text()


def test_a_variant_has_the_colour_of_its_method_and_a_hollow_marker():
    styles = plot.style_methods(["scbert", "scbert:oversample", "scbert:subsample"])
    assert len({style["color"] for style in styles.values()}) == 1
    assert len({style["marker"] for style in styles.values()}) == 3
    assert [style.get("markerfacecolor") for style in styles.values()] == [None, "white", "white"]
