"""Attributions that add up, rankings against what is planted, curves and areas against closed forms."""

import copy

import anndata
import numpy as np
import pandas as pd
import pytest
import torch
from scipy import sparse, stats

import scbert
from scbert import deletion, interpret, methods
from scbert.data.cells import CellDataset
from scbert.data.preprocess import lognormalize


@pytest.fixture(params=[False, True], ids=["all genes", "expressed genes"])
def either_mode(request, classifier):
    """A trained classifier that reads all genes, or the expressed ones only."""
    classifier.encoder.set_expressed_only(request.param)
    return classifier


def labels_of(cells):
    return cells.obs["cell_type"].astype(str).to_numpy()


def test_at_most_so_many_cells_of_each_label_are_chosen():
    labels = np.array(["a"] * 10 + ["b"] * 2)
    chosen = deletion.choose_cells(labels, 4, seed=1)
    assert [int((labels[chosen] == kind).sum()) for kind in "ab"] == [4, 2]
    assert (np.diff(chosen) > 0).all()
    assert not np.array_equal(chosen, deletion.choose_cells(labels, 4, seed=2))


# Integrated gradients


def test_attributions_sum_to_the_difference_of_the_logit(either_mode, more_cells):
    pytest.importorskip("captum", reason="captum is an extra")
    few = more_cells[:6].copy()
    values, sums = deletion.integrated_gradients(either_mode, few, labels_of(few), n_steps=32, batch_size=4)
    bins = CellDataset(few).batch(range(6))
    target = [either_mode.labels.index(label) for label in labels_of(few)]
    with torch.no_grad():
        logit = either_mode(bins)[range(6), target]
        if either_mode.config.expressed_only:  # at the start of the path only the trailing token's encoding is left
            positions, present = deletion.find_expressed(bins)
            x = either_mode.encoder.embed(torch.zeros_like(bins), positions)
            hidden = either_mode.encoder.norm(either_mode.encoder.run_expressed(x, present))
            every = torch.zeros(6, 25, 8)
            every[:, -1] = hidden[positions == 24]
            start = either_mode.head(every)[range(6), target]
        else:
            start = either_mode(torch.zeros_like(bins))[range(6), target]
    np.testing.assert_allclose(sums["difference"], logit - start, atol=1e-4)
    np.testing.assert_allclose(values.sum(axis=1), sums["sum"], atol=1e-4)
    missing = (sums["sum"] - sums["difference"]).abs().sum() / sums["difference"].abs().sum()
    assert missing < 0.06
    assert (values.to_numpy()[few.layers["bins"].toarray() == 0] == 0).all()
    assert list(values.columns) == either_mode.genes


def test_batches_change_no_attribution(classifier, more_cells):
    pytest.importorskip("captum", reason="captum is an extra")
    classifier.encoder.set_expressed_only(True)
    few = more_cells[:5].copy()
    one, _ = deletion.integrated_gradients(classifier, few, labels_of(few), n_steps=4, batch_size=1)
    all_at_once, _ = deletion.integrated_gradients(classifier, few, labels_of(few), n_steps=4, batch_size=5)
    np.testing.assert_allclose(one, all_at_once, atol=1e-4)


def test_a_head_without_layers_is_attributed_as_by_hand(more_cells):
    """With no layers and a linear head, a gene is due its own part of the logit: one term a gene."""
    pytest.importorskip("captum", reason="captum is an extra")
    config = scbert.ScBertConfig(n_genes=24, dim=8, depth=0, heads=2, dim_head=4, expressed_only=True)
    model = scbert.model.classifier.Classifier(
        scbert.ScBert(config, genes=list(more_cells.var_names)), ["B", "Monocyte", "T/NK"]
    )
    model.encoder.norm = torch.nn.Identity()
    weight = torch.randn(25, 3, generator=torch.Generator().manual_seed(0))
    model.head = Sum(weight)
    few = more_cells[:3].copy()
    values, sums = deletion.integrated_gradients(model, few, ["B", "T/NK", "B"], n_steps=4)
    bins = CellDataset(few).batch(range(3))
    with torch.no_grad():
        x = model.encoder.embed(bins).sum(2) * (bins > 0)  # (cells, genes + 1)
    expected = (x * weight.T[[0, 2, 0]])[:, :-1].numpy()
    np.testing.assert_allclose(values, expected, atol=1e-4)
    np.testing.assert_allclose(sums["sum"], sums["difference"], atol=1e-4)


class Sum(torch.nn.Module):
    """A linear head: the sum of each gene's encoding, weighted."""

    def __init__(self, weight):
        super().__init__()
        self.weight = weight

    def forward(self, hidden):
        return hidden.sum(2) @ self.weight


def test_an_unknown_label_and_raw_cells_are_refused(classifier, cells, make_cells):
    pytest.importorskip("captum", reason="captum is an extra")
    with pytest.raises(ValueError, match="Martian"):
        deletion.integrated_gradients(classifier, cells[:1].copy(), ["Martian"])
    with pytest.raises(ValueError, match="not tokenized"):
        deletion.integrated_gradients(classifier, make_cells()[:1].copy(), ["B"])


# Rankings


def marked(cells, kind):
    """Return the genes that the fixture makes higher in a type: every third."""
    return set(cells.var_names[np.arange(24) % 3 == ["B", "Monocyte", "T/NK"].index(kind)])


@pytest.mark.parametrize("score", [deletion.score_by_weights, deletion.score_by_expression])
def test_planted_markers_come_out_on_top(cells, score):
    n_threads = torch.get_num_threads()
    table = score(cells)
    assert list(table.columns) == list(cells.var_names)
    for kind, genes in deletion.order_genes(table, 6).items():
        assert set(genes) <= marked(cells, kind)
    assert torch.get_num_threads() == n_threads


def test_gradients_of_a_trained_model_prefer_planted_markers(classifier, cells):
    pytest.importorskip("captum", reason="captum is an extra")
    table, missed = deletion.score_by_gradients(classifier, cells, n_cells=6)
    assert 0 < missed < 0.15
    found = [len(set(genes) & marked(cells, kind)) for kind, genes in deletion.order_genes(table, 6).items()]
    assert sum(found) >= 12  # of 18, 6 by chance


def test_a_gene_that_no_cell_expresses_has_no_score(cells):
    cells.X = sparse.csr_matrix(cells.X @ sparse.diags(np.arange(24) != 4, dtype=np.float32))
    assert (deletion.score_by_expression(cells)["gene4"] == 0).all()


def test_expression_scores_are_wilcoxons(cells):
    table, x = deletion.score_by_expression(cells), lognormalize(cells).toarray()
    inside = labels_of(cells) == "Monocyte"
    for gene in (2, 5, 16):
        other = stats.mannwhitneyu(x[inside, gene], x[~inside, gene], use_continuity=False, method="asymptotic")
        z = table.loc["Monocyte"].iloc[gene]
        assert 2 * stats.norm.sf(abs(z)) == pytest.approx(other.pvalue, rel=1e-3)


def test_weights_of_two_types_mirror_each_other(make_cells):
    two = make_cells(40, labels=("a", "b"))
    table = deletion.score_by_weights(two)
    means = np.vstack([lognormalize(two).toarray()[labels_of(two) == kind].mean(0) for kind in "ab"])
    np.testing.assert_allclose(table.loc["a"] / means[0], -table.loc["b"] / means[1])


def test_scores_of_a_contrast_keep_the_order_of_the_genes():
    contrast = pd.DataFrame({"type": list("bbaa"), "gene": ["z", "a"] * 2, "difference": [1.0, 2, 3, 4]})
    table = deletion.tabulate_scores(contrast)
    assert table.columns.tolist() == ["z", "a"]
    assert table.loc["b"].tolist() == [1, 2]
    assert deletion.order_genes(table, 1) == {"a": ["a"], "b": ["a"]}


def test_attention_is_scored_by_differences_of_means():
    table = deletion.score_by_attention(pd.DataFrame([[1.0, 0], [3, 0], [0, 6]], columns=["y", "x"]), ["a", "a", "b"])
    assert table.columns.tolist() == ["y", "x"]
    np.testing.assert_allclose(table, [[2, -6], [-2, 6]])


def test_random_genes_are_others_of_about_the_same_expression(make_cells):
    cells = make_cells(60, n_genes=300)
    level = np.linspace(0.2, 9, 300)
    cells.X = sparse.csr_matrix(np.random.default_rng(0).poisson(level, (60, 300)).astype(np.float32))
    cells.obs["n_counts"] = 5000.0
    ranking = {"B": [f"gene{i}" for i in range(40, 260, 11)]}
    drawn, another = (draw["B"] for draw in deletion.match_genes(ranking, cells, n_draws=2, n_nearest=10, seed=3))
    assert drawn != another
    assert len(set(drawn)) == len(drawn) == 20
    assert not set(drawn) & set(ranking["B"])
    found, wanted = (cells.var_names.get_indexer(genes) for genes in (drawn, ranking["B"]))
    assert np.abs(found - wanted).max() < 60
    assert (found != wanted + 1).any()
    values = lognormalize(cells)[labels_of(cells) == "B"]
    assert values[:, wanted].mean() == pytest.approx(values[:, found].mean(), rel=0.03)
    assert deletion.match_genes(ranking, cells, seed=3)[0]["B"] == drawn


def test_too_few_genes_to_draw_from_and_missing_cells_are_refused(cells):
    with pytest.raises(ValueError, match="rank fewer"):
        deletion.match_genes({"B": list(cells.var_names[:20])}, cells)
    with pytest.raises(ValueError, match="No training cell is C"):
        deletion.match_genes({"C": ["gene1"]}, cells)


# Deletion and insertion


def count_share(adata):
    """Say that a cell is B as surely as its genes 0 and 1 are a share of its counts: linear, so curves are known."""
    share = np.asarray(adata.X[:, :2].sum(1)).ravel() / adata.obs["n_counts"].to_numpy()
    return pd.DataFrame({"B": share, "C": 1 - share}, index=adata.obs_names)


@pytest.fixture
def four_cells():
    counts = np.array([[4, 2, 2, 2], [1, 1, 4, 4], [3, 3, 3, 1], [0, 0, 5, 5]], np.float32)
    obs = pd.DataFrame({"n_counts": 10.0}, index=list("wxyz"))
    return anndata.AnnData(sparse.csr_matrix(counts), obs=obs, var=pd.DataFrame(index=["g0", "g1", "g2", "g3"]))


def test_deletion_takes_away_what_the_genes_hold_and_insertion_brings_it(four_cells):
    ranking = {"B": ["g0", "g2", "g1"], "C": ["g3", "g2", "g0"]}
    labels = ["B", "B", "B", "C"]
    table = deletion.delete_genes(count_share, four_cells, ranking, labels, [1, 3]).set_index(["cell", "number"])
    assert table["probability"].unstack().loc[list("wxyz")].to_numpy() == pytest.approx(
        np.array([[0.2, 0], [0.1, 0], [0.3, 0], [1, 1]])
    )
    assert table["intact"].unstack().loc[list("wxyz"), 1].to_numpy() == pytest.approx([0.6, 0.2, 0.6, 1])
    table = deletion.delete_genes(count_share, four_cells, ranking, labels, [1, 3], others=True).set_index(
        ["cell", "number"]
    )
    assert table["probability"].unstack().loc[list("wxy")].to_numpy() == pytest.approx(
        np.array([[0.4, 0.6], [0.1, 0.2], [0.3, 0.6]])
    )


def test_each_judge_and_draw_is_asked_both_ways(four_cells):
    rankings = {"one": [{"B": ["g0", "g1"]}], "random": [{"B": ["g2", "g3"]}, {"B": ["g3", "g2"]}]}
    judges = {"share": count_share, "same": count_share}
    table = deletion.judge_rankings(judges, four_cells, rankings, ["B"] * 4, [1, 2])
    assert len(table) == 2 * 3 * 2 * 4 * 2
    assert set(table.loc[table["ranking"] == "random", "draw"]) == {0, 1}
    part = table.query("judge == 'same' and ranking == 'one' and kind == 'insertion'")
    alone = deletion.delete_genes(count_share, four_cells, rankings["one"][0], ["B"] * 4, [1, 2], others=True)
    pd.testing.assert_frame_equal(part[alone.columns].reset_index(drop=True), alone)


def test_cells_are_left_as_they_were_and_other_tokens_do_not_change(cells):
    seen = []

    def predict(adata):
        seen.append(adata)
        return pd.DataFrame(1 / 3, index=adata.obs_names, columns=["B", "Monocyte", "T/NK"])

    before = cells.X.toarray().copy(), cells.layers["bins"].toarray().copy()
    ranking = {kind: ["gene0", "gene3"] for kind in ("B", "Monocyte", "T/NK")}
    deletion.delete_genes(predict, cells, ranking, labels_of(cells), [2])
    assert (cells.X.toarray() == before[0]).all()
    intact, changed = seen[0][:60], seen[0][60:]
    np.testing.assert_array_equal(intact.layers["bins"].toarray(), before[1])
    anew = anndata.AnnData(changed.X, obs=changed.obs[["n_counts"]].copy(), var=changed.var.copy())
    np.testing.assert_array_equal(
        scbert.preprocess.tokenize(anew).layers["bins"].toarray(), changed.layers["bins"].toarray()
    )
    expected = before[1].copy()
    expected[:, [0, 3]] = 0
    np.testing.assert_array_equal(changed.layers["bins"].toarray(), expected)


def test_a_classifier_predicts_cells_with_nothing_left(either_mode, cells):
    ranking = {kind: list(cells.var_names) for kind in ("B", "Monocyte", "T/NK")}
    table = deletion.delete_genes(
        lambda adata: scbert.predict_proba(either_mode, adata), cells, ranking, labels_of(cells), [24]
    )
    assert (table.groupby("type")["probability"].agg(np.ptp) < 1e-5).all()  # nothing left to tell them apart
    assert table["probability"].between(0, 1).all()


def test_rankings_that_do_not_fit_are_refused(four_cells):
    labels = ["B"] * 4
    for ranking, numbers, says in (
        ({"C": ["g0"]}, [1], "no genes for B"),
        ({"B": ["g0"]}, [1, 2], "rank more genes"),
        ({"B": ["nothing"]}, [1], "lack"),
    ):
        with pytest.raises(ValueError, match=says):
            deletion.delete_genes(count_share, four_cells, ranking, labels, numbers)
    with pytest.raises(ValueError, match="Martian"):
        deletion.delete_genes(count_share, four_cells, {"Martian": ["g0"]}, ["Martian"] * 4, [1])


# Areas


def make_curves(n_cells=400, seeds=(0,), seed=0):
    """Return curves of three rankings whose shares left are 0.5, 0.8 and 0.8 on average, with noise by cell."""
    random = np.random.default_rng(seed)
    rows = []
    intact = random.uniform(0.4, 1, n_cells)
    for training in seeds:
        for ranking, share in (("good", 0.5), ("poor", 0.8), ("twin", 0.8)):
            noise = random.normal(0, 0.05, n_cells)
            for number, more in ((1, 0.1), (10, -0.1)):
                rows.append(
                    pd.DataFrame(
                        {
                            "cell": [f"c{i}" for i in range(n_cells)], "type": np.where(np.arange(n_cells) % 2, "a", "b"),
                            "number": number, "probability": intact * (share + more + noise), "intact": intact,
                            "ranking": ranking, "seed": training,
                        }
                    )
                )  # fmt: skip
    return pd.concat(rows, ignore_index=True)


def test_areas_are_ratios_of_means_with_intervals_that_hold_the_truth():
    curves = make_curves()
    table = deletion.measure_areas(curves).set_index("ranking")
    for ranking, truth in (("good", 0.5), ("poor", 0.8), ("twin", 0.8)):
        row, own = table.loc[ranking], curves[curves["ranking"] == ranking]
        assert row["value"] == pytest.approx(own["probability"].mean() / own["intact"].mean())
        assert row["low"] < truth < row["high"]
        assert row["high"] - row["low"] == pytest.approx(2 * 1.96 * 0.05 / 20, rel=0.25)  # 400 cells
        assert (row["n"], row["seeds"]) == (400, 1)


def test_differences_are_paired_and_of_the_sign_of_the_first():
    table = deletion.measure_areas(make_curves(), against="good").set_index("ranking")
    assert list(table.index) == ["poor", "twin"]
    assert table.loc["poor", "value"] == pytest.approx(-0.3, abs=0.02)
    assert table.loc["poor", "high"] < 0
    assert table["verdict"].tolist() == ["ahead", "ahead"]  # less is left
    same = deletion.measure_areas(make_curves(), against="poor").set_index("ranking").loc["twin"]
    assert same["low"] < 0 < same["high"]
    assert same["verdict"] == "not decided"
    kept = deletion.measure_areas(make_curves().assign(judge="x", kind="insertion"), against="good")
    assert kept.loc["x:good/insertion_area_minus_poor", "verdict"] == "behind"  # less is brought back


def test_each_number_has_its_share_and_each_judge_and_kind_its_own_rows():
    curves = pd.concat([make_curves(50).assign(judge=judge, kind="insertion") for judge in ("one", "other")])
    table = deletion.measure_areas(curves, by_number=True)
    assert table.groupby(["judge", "kind", "ranking", "number"]).ngroups == len(table) == 12
    good = table[table["ranking"] == "good"].set_index(["judge", "number"])["value"]
    assert good["one", 1] == pytest.approx(0.6, abs=0.03)
    assert good["other", 10] == pytest.approx(0.4, abs=0.03)


def test_draws_are_averaged_within_a_seed_and_seeds_widen_the_interval():
    curves = make_curves(seeds=(0, 1, 2))
    drawn = pd.concat(
        [curves.assign(draw=0, probability=curves["probability"] * 2), curves.assign(draw=1, probability=0.0)]
    )
    pd.testing.assert_frame_equal(deletion.measure_areas(curves), deletion.measure_areas(drawn))
    apart = curves.assign(probability=curves["probability"] * curves["seed"].map({0: 0.6, 1: 1.0, 2: 1.4}))
    widths = [np.ptp(deletion.measure_areas(table).iloc[0][["low", "high"]]) for table in (curves, apart)]
    assert widths[1] > 10 * widths[0]
    assert deletion.measure_areas(apart)["value"].iloc[0] == pytest.approx(
        apart.query("ranking == 'good'")["probability"].mean() / apart.query("ranking == 'good'")["intact"].mean()
    )


def test_rankings_of_other_cells_are_not_compared():
    curves = make_curves(20)
    with pytest.raises(ValueError, match="same cells"):
        deletion.measure_areas(curves[(curves["ranking"] != "twin") | (curves["cell"] != "c3")])
    with pytest.raises(ValueError, match="No|no ranking 'nothing'"):
        deletion.measure_areas(curves, against="nothing")


# One table of rankings


@pytest.fixture
def rankings(classifier, cells):
    """Two trainings, one a copy of the other with another head, their contrasts, and the table of all rankings."""
    pytest.importorskip("captum", reason="captum is an extra")
    other = copy.deepcopy(classifier)
    other.head = scbert.AnnotationHead(other.config, 3, seed=5)
    trained = {4: methods.wrap_classifier(classifier), 5: methods.wrap_classifier(other)}
    layers = interpret.attend(trained, cells)
    contrasts = {
        seed: interpret.contrast_types(sum(own.values()) / 2, labels_of(cells), n_permutations=0)
        for seed, own in layers.items()
    }
    scores, missed = deletion.score_genes(trained, cells, contrasts, n_cells=2)
    return trained, layers, contrasts, scores, missed


def test_one_table_holds_each_ranking_of_each_training(rankings, cells):
    trained, _, contrasts, scores, missed = rankings
    assert scores.columns.tolist() == ["seed", "ranking", "type", "gene", "score"]
    assert len(scores) == 2 * 5 * 3 * 24
    assert not scores.isna().any(axis=None)
    for seed, part in scores.groupby("seed"):
        own = deletion.split_scores(part, "ranking")
        assert list(own) == ["attention", "even", "weights", "expression", "gradients"]
        gradients, share = deletion.score_by_gradients(trained[seed].classifier, cells, n_cells=2)
        for name, expected in {
            "attention": deletion.tabulate_scores(contrasts[seed]),
            "even": deletion.score_by_attention(interpret.even_attention(cells), labels_of(cells)),
            "weights": deletion.score_by_weights(cells),
            "expression": deletion.score_by_expression(cells),
            "gradients": gradients,
        }.items():
            np.testing.assert_array_equal(own[name], expected)
            assert list(own[name].index) == ["B", "Monocyte", "T/NK"]
            assert list(own[name].columns) == list(cells.var_names)
        assert missed[seed] == share
    seeds = deletion.split_scores(scores[scores["ranking"] == "even"], "seed")
    assert list(seeds) == [4, 5]
    np.testing.assert_array_equal(seeds[4], seeds[5])


def test_genes_that_are_not_contrasted_are_not_ranked(rankings, cells):
    trained, layers, *_ = rankings
    some = ["gene7", "gene2", "gene11"]
    contrasts = {4: interpret.contrast_types(sum(layers[4].values())[some] / 2, labels_of(cells), n_permutations=0)}
    scores, _ = deletion.score_genes(trained, cells, contrasts, n_cells=2)
    for table in deletion.split_scores(scores, "ranking").values():
        assert list(table.columns) == some


def test_a_type_of_one_cell_has_no_expression_to_rank_by(classifier, cells):
    pytest.importorskip("captum", reason="captum is an extra")
    cells = cells[labels_of(cells) != "T/NK"].copy()
    cells.obs["cell_type"] = ["rare", *labels_of(cells)[1:]]
    classifier.labels = ["B", "Monocyte", "rare"]
    attention = interpret.gene_attention(classifier, cells)
    contrasts = {0: interpret.contrast_types(attention, labels_of(cells), n_permutations=0)}
    scores, _ = deletion.score_genes({0: methods.wrap_classifier(classifier)}, cells, contrasts, n_cells=2)
    expression = deletion.split_scores(scores, "ranking")["expression"]
    assert (expression.loc["rare"] == 0).all()
    assert (expression.loc["B"] != 0).any()


def test_rankings_are_compared_between_trainings_layers_and_each_other(rankings, cells):
    _, layers, _, scores, _ = rankings
    table = deletion.compare_rankings(scores, layers[4], labels_of(cells), 6)
    assert table.groupby("between").size().to_dict() == {"layers": 3, "rankings": 30, "seeds": 3}
    seeds = table[table["between"] == "seeds"]
    assert (seeds["one"].unique(), seeds["other"].unique()) == (["seed 4"], ["seed 5"])
    assert (seeds["overlap"] == 1).all()  # the same encoder
    own = deletion.split_scores(scores[scores["seed"] == 4], "ranking")
    expected = interpret.measure_agreement(own, 6)
    pd.testing.assert_frame_equal(table[table["between"] == "rankings"].iloc[:, 1:].reset_index(drop=True), expected)
    by_layer = {f"layer {i}": deletion.score_by_attention(layers[4][i], labels_of(cells)) for i in (1, 2)}
    found = table[table["between"] == "layers"].iloc[:, 1:].reset_index(drop=True)
    pd.testing.assert_frame_equal(found, interpret.measure_agreement(by_layer, 6))
    one_seed = deletion.compare_rankings(scores[scores["seed"] == 4], layers[4], labels_of(cells), 6)
    assert list(one_seed["between"].unique()) == ["layers", "rankings"]


def test_each_training_is_judged_on_its_own_rankings_and_on_random_ones(rankings, cells, more_cells, capsys):
    trained, _, _, scores, _ = rankings
    regression = methods.fit_logistic_regression(cells, more_cells, label_key="cell_type", strengths=[0.1])
    few = more_cells[:6].copy()
    curves = deletion.judge_trainings(trained, regression, scores, cells, few, [1, 3])
    assert curves.groupby(["seed", "judge"])["ranking"].nunique().tolist() == [6] * 4
    assert len(curves) == 2 * 2 * (5 + 2) * 2 * 2 * 6  # seeds, judges, rankings and draws, kinds, numbers, cells
    own = deletion.split_scores(scores[scores["seed"] == 5], "ranking")
    expected = deletion.delete_genes(trained[5], few, deletion.order_genes(own["gradients"], 3), labels_of(few), [1, 3])
    found = curves.query("seed == 5 and judge == 'scbert' and ranking == 'gradients' and kind == 'deletion'")
    np.testing.assert_array_equal(found["probability"], expected["probability"])
    areas = deletion.measure_areas(curves)
    assert set(areas["seeds"]) == {2}
    beyond = deletion.judge_trainings(trained, regression, scores, cells, few, [1, 3, cells.n_vars // 2 + 1])
    pd.testing.assert_frame_equal(beyond, curves)
    assert f"Numbers beyond half of the {cells.n_vars} genes are left out." in capsys.readouterr().out


def test_the_verdict_is_a_sentence_on_chance_and_on_each_rival():
    areas = pd.DataFrame(
        {"judge": "scbert", "kind": "deletion", "ranking": ["attention", "random"], "value": [0.612, 0.958]}
    )
    differences = pd.DataFrame(
        {
            "judge": ["scbert"] * 5 + ["logistic_regression"],
            "kind": ["deletion"] * 4 + ["insertion", "deletion"],
            "ranking": ["even", "weights", "random", "gradients", "even", "even"],
            "verdict": ["not decided", "behind", "ahead", "not decided", "behind", "behind"],
        }
    )
    assert deletion.say_verdicts(areas, differences) == (
        "The genes of high attention matter: deleting them leaves 0.61 of the true type's probability, deleting others "
        "as strongly expressed 0.96; as a ranking, attention is not decided against even, gradients; behind weights."
    )
    for verdict, words in (("behind", "matter less than chance:"), ("not decided", "are not shown to matter:")):
        differences.loc[2, "verdict"] = verdict
        assert words in deletion.say_verdicts(areas, differences)
