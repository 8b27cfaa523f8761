"""Attention against the definition, permutations against simulated truth, enrichment against the hypergeometric law."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import sparse, stats

import scbert
from scbert import interpret, methods
from scbert.data.cells import CellDataset


def tokens_of(cells):
    return CellDataset(cells).batch(range(cells.n_obs))


def dense_attention(model, bins):
    """Return the matrices of one cell, (depth, heads, positions, positions), and the positions, columns of `bins`."""
    positions, layers = interpret._read_features(model, bins)
    rows = [interpret._form_rows(q, k, model.encoder.config.attention) for q, k in layers]
    return torch.stack(rows).numpy(), positions.numpy()


@pytest.fixture(params=["all favor", "expressed favor", "expressed softmax"])
def either_mode(request, classifier):
    """A trained classifier that reads all genes or the expressed ones, by random features or by exact attention."""
    enter, attention = request.param.split()
    encoder = classifier.encoder
    encoder.set_expressed_only(enter == "expressed")
    encoder.config = replace(encoder.config, attention=attention)
    return classifier


# Attention


def test_columns_are_those_of_the_matrix_by_the_definition(either_mode, more_cells):
    bins = tokens_of(more_cells)[:5]
    columns = either_mode.encoder.attention_columns(bins).numpy()  # (cells, depth, heads, genes + 1)
    for cell in range(5):
        matrix, positions = dense_attention(either_mode, bins[cell])
        np.testing.assert_allclose(matrix.sum(3), 1, atol=1e-12)
        np.testing.assert_allclose(columns[cell][..., positions], matrix.mean(2), atol=1e-6)
        absent = np.setdiff1d(np.arange(25), positions)
        assert (columns[cell][..., absent] == 0).all()
        if either_mode.config.expressed_only:
            assert len(positions) == (bins[cell] > 0).sum() + 1
        else:
            assert len(positions) == 25


def test_gene_attention_is_the_mean_over_expressed_queries_heads_and_layers_without_the_trailing_token(
    either_mode, more_cells
):
    table = interpret.gene_attention(either_mode, more_cells, batch_size=7)
    bins = tokens_of(more_cells)
    for cell in (0, 17):
        matrix, positions = dense_attention(either_mode, bins[cell])
        asks = bins[cell].numpy()[positions] > 0
        expected = np.zeros(25)
        expected[positions] = matrix[:, :, asks].mean((0, 1, 2))
        np.testing.assert_allclose(table.iloc[cell], expected[:24] / expected[:24].sum(), atol=1e-6)
    assert list(table.index) == list(more_cells.obs_names)
    assert list(table.columns) == either_mode.genes


def test_layers_are_tables_that_each_sum_to_one_and_differ(classifier, cells):
    layers = interpret.gene_attention(classifier, cells, by_layer=True)
    assert list(layers) == [1, 2]
    for table in layers.values():
        np.testing.assert_allclose(table.sum(axis=1), 1)
    assert np.abs(layers[1] - layers[2]).to_numpy().max() > 1e-4


def test_the_dense_matrix_follows_the_models_own_layers(either_mode, more_cells):
    """The second layer's matrix depends on all that the first one does: perturb its feed-forward part."""
    bins = tokens_of(more_cells)[0]
    before, _ = dense_attention(either_mode, bins)
    with torch.no_grad():
        either_mode.encoder.performer.net.layers[0][1].fn.fn.w2.bias += torch.randn(8)
    after, _ = dense_attention(either_mode, bins)
    np.testing.assert_array_equal(before[0], after[0])
    assert np.abs(before[1] - after[1]).max() > 1e-4


def test_a_cell_without_tokens_receives_nothing(classifier, cells):
    kept = sparse.diags((np.arange(60) != 3).astype(np.uint8), dtype=np.uint8)
    cells.layers["bins"] = sparse.csr_matrix(kept @ cells.layers["bins"])
    table = interpret.gene_attention(classifier, cells)
    assert (table.iloc[3] == 0).all()
    assert len(interpret.measure_focus(table)) == 59


def test_attention_of_other_cells_than_the_model_reads_is_refused(classifier, make_cells):
    with pytest.raises(ValueError, match="not tokenized"):
        interpret.gene_attention(classifier, make_cells())
    classifier.encoder.set_key_stabiliser("batch")
    with pytest.raises(ValueError, match="'head'"):
        dense_attention(classifier, torch.zeros(25, dtype=torch.long))


def test_an_even_spread_is_even_and_one_gene_that_takes_all_is_not(cells):
    even = interpret.even_attention(cells)
    focus = interpret.measure_focus(even)
    np.testing.assert_allclose(focus[["largest", "effective_share"]], 1)
    np.testing.assert_array_equal(focus["genes"], cells.layers["bins"].getnnz(axis=1))
    peaked = pd.DataFrame([[0.97, 0.01, 0.01, 0.01]])
    row = interpret.measure_focus(peaked).iloc[0]
    assert row["largest"] == pytest.approx(3.88)
    assert row["effective_share"] == pytest.approx(np.exp(-0.97 * np.log(0.97) - 0.03 * np.log(0.01)) / 4)
    del cells.layers["bins"]
    with pytest.raises(ValueError, match="not tokenized"):
        interpret.even_attention(cells)


def test_the_distance_from_dense_matrices_is_small_and_grows_with_an_error(either_mode, more_cells, monkeypatch):
    few = more_cells[:3].copy()
    monkeypatch.setattr(interpret, "ROWS_AT_ONCE", 7)
    assert interpret.measure_distance(either_mode, few) < 1e-6
    right = scbert.ScBert.attention_columns
    monkeypatch.setattr(scbert.ScBert, "attention_columns", lambda self, bins: right(self, bins) + 0.01)
    assert interpret.measure_distance(either_mode, few) == pytest.approx(0.01, abs=1e-5)


def test_an_average_comes_with_the_interval_of_its_mean():
    values = np.random.default_rng(0).normal(5, 2, size=400)
    found = interpret.average(pd.Series(values))
    assert found["value"] == pytest.approx(values.mean())
    assert found["n"] == 400
    half = 1.96 * values.std() / 20
    np.testing.assert_allclose([found["low"], found["high"]], values.mean() + np.array([-half, half]), atol=0.03)


def test_the_average_matrix_is_relative_to_an_even_spread_over_what_enters(classifier, more_cells):
    classifier.encoder.set_expressed_only(True)
    few, genes = more_cells[:4].copy(), ["gene5", "gene1"]
    table = interpret.average_matrix(classifier, few, genes)
    values = []
    for bins in tokens_of(few):
        if bins[5] > 0 and bins[1] > 0:
            matrix, positions = dense_attention(classifier, bins)
            i, j = (list(positions).index(gene) for gene in (5, 1))
            values.append(matrix.mean((0, 1))[i, j] * len(positions))
    assert len(values) > 0
    assert table.loc["gene5", "gene1"] == pytest.approx(np.mean(values))
    with pytest.raises(ValueError, match="nothing is not a gene"):
        interpret.average_matrix(classifier, few, ["gene1", "nothing"])


# Contrasts


@pytest.fixture
def simulated():
    """120 cells of 3 types, 50 genes: gene 7 is higher in type b, gene 9 never varies, all others are noise."""
    random = np.random.default_rng(0)
    labels = np.repeat(["a", "b", "c"], [60, 40, 20])
    values = random.gamma(2, size=(120, 50))
    values[labels == "b", 7] += 3
    values[:, 9] = 0
    return pd.DataFrame(values, columns=[f"gene{i}" for i in range(50)]), labels


def test_means_and_differences_are_those_of_pandas(simulated):
    values, labels = simulated
    table = interpret.contrast_types(values, labels, n_permutations=0)
    assert list(table.columns) == ["type", "gene", "cells", "mean_in", "mean_out", "difference"]
    for kind, part in table.groupby("type"):
        np.testing.assert_allclose(part["mean_in"], values[labels == kind].mean())
        np.testing.assert_allclose(part["mean_out"], values[labels != kind].mean())
        assert (part["cells"] == (labels == kind).sum()).all()
    np.testing.assert_allclose(table["difference"], table["mean_in"] - table["mean_out"], atol=1e-12)


def test_the_planted_gene_is_found_and_nothing_else(simulated):
    table = interpret.contrast_types(*simulated, n_permutations=2000)
    found = table[table["fdr"] < 0.05].set_index(["type", "gene"])
    assert ("b", "gene7") in found.index
    assert set(found.index.get_level_values("gene")) == {"gene7"}
    assert found.loc[("b", "gene7"), "p"] == pytest.approx(1 / 2001)
    assert (table.loc[table["gene"] == "gene9", ["p", "z"]] == [1, 0]).all(axis=None)
    np.testing.assert_allclose(table["fdr"], stats.false_discovery_control(table["p"]))


def test_p_and_z_agree_with_scipys_permutation_test(simulated):
    values, labels = simulated
    table = interpret.contrast_types(values, labels, n_permutations=2000).set_index(["type", "gene"])
    for kind, gene in (("a", "gene3"), ("c", "gene11"), ("b", "gene20")):
        inside, outside = values.loc[labels == kind, gene], values.loc[labels != kind, gene]
        other = stats.permutation_test(
            (inside, outside), lambda x, y, axis: x.mean(axis=axis) - y.mean(axis=axis), n_resamples=5000, rng=1
        )
        two_sided = (np.abs(other.null_distribution) >= abs(other.statistic)).mean()
        assert table.loc[(kind, gene), "p"] == pytest.approx(two_sided, abs=0.04)
        z = other.statistic / other.null_distribution.std()
        assert table.loc[(kind, gene), "z"] == pytest.approx(z, abs=0.12)


def test_p_is_even_where_labels_mean_nothing():
    values = pd.DataFrame(np.random.default_rng(3).normal(size=(60, 400)))
    p = interpret.contrast_types(values, ["a", "b"] * 30, n_permutations=200)["p"].iloc[:400]
    assert stats.kstest(p, "uniform").pvalue > 0.01


def test_permutations_depend_on_the_seed_alone(simulated):
    values, labels = simulated
    one, same, other = (interpret.contrast_types(values, labels, n_permutations=50, seed=s) for s in (1, 1, 2))
    pd.testing.assert_frame_equal(one, same)
    assert not one["p"].equals(other["p"])


def test_contrasts_need_a_label_a_cell_and_two_types(simulated):
    with pytest.raises(ValueError, match="3 labels for 120 cells"):
        interpret.contrast_types(simulated[0], ["a", "b", "c"])
    with pytest.raises(ValueError, match="no other type"):
        interpret.contrast_types(simulated[0], ["a"] * 120)


def test_top_genes_are_the_largest_differences_above_zero():
    table = pd.DataFrame({"type": list("aaabbb"), "gene": list("xyzxyz"), "difference": [1, 3, 2, -1, 5, 0.0]})
    top = interpret.find_top(table, 2)
    assert top[["type", "gene", "rank"]].to_numpy().tolist() == [["a", "y", 1], ["a", "z", 2], ["b", "y", 1]]


# Sets


def test_our_markers_are_sets_of_symbols_and_each_type_names_sets_that_exist():
    sets, names = interpret.load_sets("markers")
    assert all(4 <= len(genes) == len(set(genes)) <= 11 for genes in sets.values())
    assert all(isinstance(gene, str) and gene == gene.upper() for genes in sets.values() for gene in genes)
    assert {name for own in names.values() for name in own} == set(sets)


def test_each_type_of_the_bundled_data_has_markers():
    _, names = interpret.load_sets("markers")
    assert set(scbert.datasets.load("pbmc68k_reduced").obs["cell_type"]) <= set(names)


def test_an_unknown_collection_is_refused():
    with pytest.raises(ValueError, match="nonsense"):
        interpret.load_sets("nonsense")


def test_members_are_marked_and_a_type_without_sets_is_left_open():
    top = pd.DataFrame({"type": ["a", "a", "b"], "gene": ["x", "y", "x"]})
    marked = interpret.mark_members(
        top, {"first": ({"one": ["x"], "two": ["z"]}, {"a": ["one", "two"]}), "second": ({}, {})}
    )
    assert marked["member"].tolist() == [True, False, None]
    assert interpret.write_top(marked) == "a: x* y\nb: x"


def test_known_genes_have_their_rank_in_each_ranking():
    scores = pd.DataFrame({"x": [3, 0], "y": [2, 1], "z": [1, 1]}, index=["a", "b"])
    collections = {"first": ({"one": ["x", "z"], "two": ["x", "none"]}, {"a": ["one", "two"], "c": ["one"]})}
    table = interpret.rank_known({"high": scores, "low": -scores}, collections)
    assert table.to_dict("list") == {"type": ["a", "a"], "gene": ["x", "z"], "high": [1, 3], "low": [3, 1]}
    assert list(interpret.rank_known({"high": scores}, {}).columns) == ["type", "gene", "high"]


def test_enrichment_is_the_hypergeometric_test_over_all_sets():
    pytest.importorskip("gseapy", reason="gseapy is an extra")
    background = [f"g{i}" for i in range(100)]
    sets = {"hit": background[:10] + ["elsewhere"], "missed": background[50:60], "small": ["g1", "g2"], "none": ["x"]}
    genes = {"a": background[:5] + background[90:95] + ["elsewhere"], "b": background[90:95]}
    table = interpret.enrich(genes, sets, background, names={"a": ["hit"]})
    assert set(table["term"]) == {"hit", "missed"}
    first = table.iloc[0]
    assert (first["type"], first["term"], first["overlap"], first["size"], first["drawn"]) == ("a", "hit", 5, 10, 10)
    assert first["own"]
    assert first["genes"] == "g0 g1 g2 g3 g4"
    p = stats.hypergeom.sf(4, 100, 10, 10)
    assert first["p"] == pytest.approx(p)
    assert table["p"].iloc[1:].tolist() == [1, 1, 1]
    assert first["fdr"] == pytest.approx(4 * p)  # four tests, not the one that is hit
    assert table["rank"].tolist() == [1, 2, 1, 1]


def test_several_rankings_and_collections_are_enriched_and_counted_each_on_its_own():
    pytest.importorskip("gseapy", reason="gseapy is an extra")
    background = [f"g{i}" for i in range(100)]
    sets = {"low": background[:10], "high": background[90:]}
    rankings = {
        "right": {"a": background[:6], "b": background[90:96], "c": background[50:56]},
        "wrong": {"a": background[90:96], "b": background[:6], "c": background[50:56]},
    }
    collections = {"one": (sets, {"a": ["low"], "b": ["high"], "c": ["low"]}), "two": ({"mid": background[48:58]}, {})}
    table = interpret.enrich_all(rankings, collections, background)
    assert table.columns[:3].tolist() == ["collection", "ranking", "type"]
    alone = interpret.enrich(rankings["right"], sets, background)
    part = table[(table["collection"] == "one") & (table["ranking"] == "right")]
    np.testing.assert_allclose(part["fdr"], alone["fdr"])
    counts = interpret.count_first(table)
    assert counts.loc[("one", "right")].tolist() == [3, 2, 2]
    assert counts.loc[("one", "wrong")].tolist() == [3, 0, 0]
    assert len(counts) == 2  # no type has a set in the other collection


def test_sets_that_share_no_gene_with_the_background_are_refused():
    pytest.importorskip("gseapy", reason="gseapy is an extra")
    with pytest.raises(ValueError, match="None of the 1 sets"):
        interpret.enrich({"a": ["g1"]}, {"one": ["h1", "h2", "h3"]}, ["g1", "g2"])


def test_without_sets_that_fit_the_rest_goes_on_and_it_is_said_what_is_left_out(cells, capsys):
    cells.var_names = ["CD3D", "CD3E", "IL7R", "MS4A1", "CD79A", "CD79B", *cells.var_names[6:]]
    found = interpret.load_collections("markers", cells, ["CD19+ B"])
    assert found == {"markers": interpret.load_sets("markers")}
    assert capsys.readouterr().out == ""
    assert interpret.load_collections("markers", cells, ["cluster 7"]) == found
    assert (
        capsys.readouterr().out
        == "No gene set is of one of these types: the figure of known and new genes is left out.\n"
    )
    cells.var_names = [f"Mouse{i}" for i in range(24)]
    for names, said in (("markers", "No set of markers has enough of these genes"), ("", "There are no gene sets")):
        assert interpret.load_collections(names, cells, ["CD19+ B"]) == {}
        assert said in capsys.readouterr().out
    table = interpret.enrich_all({"one": {"a": ["CD3D"]}}, {}, list(cells.var_names))
    counts = interpret.count_first(table)
    assert len(table) == len(counts) == 0
    assert counts.index.names == ["collection", "ranking"]
    top = pd.DataFrame({"type": ["a"], "gene": ["CD3D"], "rank": 1})
    assert interpret.mark_members(top, {})["member"].tolist() == [None]


# Agreement


def test_agreement_of_scores_with_themselves_their_reverse_and_noise():
    random = np.random.default_rng(0)
    scores = pd.DataFrame(random.normal(size=(2, 1000)), index=["a", "b"])
    noise = pd.DataFrame(random.normal(size=(2, 1000)), index=["a", "b"])
    table = interpret.measure_agreement({"one": scores, "same": scores * 2, "reverse": -scores, "noise": noise}, n=100)
    table = table.set_index(["one", "other", "type"])
    assert table.loc[("one", "same", "a"), ["spearman", "overlap"]].tolist() == [1, 1]
    assert table.loc[("one", "reverse", "b"), ["spearman", "overlap"]].tolist() == [-1, 0]
    assert table.loc[("one", "noise", "a"), "overlap"] == pytest.approx(0.1, abs=0.07)
    assert (table["chance"] == 0.1).all()
    assert len(table) == 12


def test_genes_without_a_score_in_either_are_no_agreement():
    one = pd.DataFrame([[1.0, 2, 3, 0, 0, 0]], index=["a"])
    other = pd.DataFrame([[3.0, 2, 1, 0, 0, 0]], index=["a"])
    row = interpret.measure_agreement({"one": one, "other": other}, n=2).iloc[0]
    assert row["genes"] == 3
    assert row["spearman"] == pytest.approx(-1)
    assert row["chance"] == pytest.approx(2 / 3)
    with pytest.raises(ValueError, match="two tables"):
        interpret.measure_agreement({"one": one})
    with pytest.raises(ValueError, match="other types or genes"):
        interpret.measure_agreement({"one": one, "other": other.rename(index={"a": "b"})})


# What a notebook starts from, and what it says


def test_an_encoder_is_taken_as_it_is_and_a_shape_is_pretrained_on_the_training_cells(cells, config, encoder):
    assert interpret.prepare_encoder(encoder, cells, n_epochs=1) is encoder
    model = interpret.prepare_encoder(config, cells, n_epochs=1, seed=3)
    expected = scbert.ScBert(config, seed=3)
    scbert.pretrain(expected, cells, n_epochs=2, learning_rate=3e-3, seed=3, progress=False)
    for name, tensor in expected.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name]), name


def test_the_share_of_a_types_cells_that_express_a_gene(cells):
    labels = cells.obs["cell_type"].astype(str).to_numpy()
    shares = interpret.share_expressed(cells, labels)
    own = (cells[labels == "B"].layers["bins"] > 0).toarray()
    np.testing.assert_allclose(shares.loc["B"], own.mean(0))
    assert list(shares.columns) == list(cells.var_names)


def test_embeddings_are_those_of_before_after_and_of_both_heads(cells, more_cells, encoder, classifier):
    encoder.genes = list(cells.var_names)
    predict = methods.wrap_classifier(classifier)
    regression = methods.fit_logistic_regression(cells, more_cells, label_key="cell_type", strengths=[0.1])
    found = interpret.embed_cells(more_cells, encoder, predict, regression, seed=1)
    assert list(found) == ["pca", "scbert", "scbert:logits", "scbert:before", "logistic_regression"]
    np.testing.assert_array_equal(found["scbert"], scbert.embed(classifier, more_cells))
    np.testing.assert_array_equal(found["scbert:before"], scbert.embed(encoder, more_cells))
    np.testing.assert_array_equal(found["scbert:logits"], predict.read_out(more_cells)[0])
    np.testing.assert_array_equal(found["logistic_regression"], regression.read_out(more_cells)[0])
    np.testing.assert_array_equal(found["pca"], scbert.embeddings.embed_pca(more_cells, seed=1))


def test_the_sentence_says_where_it_looks_and_what_the_control_gives():
    focus = pd.DataFrame({"effective_share": [0.98, 0.96]})
    pairs = [("attention", "even"), ("attention", "weights"), ("even", "weights")]
    agreement = pd.DataFrame(pairs, columns=["one", "other"]).assign(spearman=[0.99, 0.1, 0.2], overlap=[0.9, 0.1, 0.2])
    index = pd.MultiIndex.from_product([["markers"], ["attention", "even"]], names=["collection", "ranking"])
    firsts = pd.DataFrame({"types": [10, 10], "enriched": [10, 9], "first": [8, 7]}, index)
    assert interpret.say_focus(focus, agreement, firsts) == (
        "scBERT looks at what a cell expresses: its attention is spread almost evenly over these genes (effective share "
        "0.970), and against an even spread it ranks genes with a Spearman correlation of 0.990 and 90.0% of the top genes "
        "in common; in markers the own set is first for 8 of 10 types, and for 7 with an even spread."
    )
    other = interpret.say_focus(focus / 2, agreement.assign(overlap=0.2), firsts[:0])
    assert other.startswith("scBERT looks elsewhere than an even spread would: its attention is spread unevenly")
    assert other.endswith("20.0% of the top genes in common.")
