"""Masked tokens against rivals computed by hand, and gene sets found again in vectors that hold them."""

import os

import anndata
import numpy as np
import pandas as pd
import pytest
import torch
from scipy import sparse

import scbert
from scbert.data.cells import CellDataset
from scbert.data.masking import mask_bins
from scbert.data.preprocess import tokenize
from scbert.evaluate.masks import count_tokens, score_masks
from scbert.experiments.pretraining import (
    RIVALS,
    by_token,
    correlate_genes,
    embed_genes,
    measure_company,
    read_sets,
    share_of_neighbours,
    summarise_masks,
)
from scbert.scale.shards import write_store

COUNTS = ["n_masked", "correct", "predicted_mode", "cell_correct", "gene_correct", "both_correct"]


def to_counts(tokens):
    """Return the least counts of cells of 10,000 that have these tokens."""
    return sparse.csr_matrix(2.0 ** np.asarray(tokens) - 1, dtype=np.float32)


def from_tokens(rows):
    """Return tokenized cells of these tokens, (cells, genes)."""
    bins = sparse.csr_matrix(np.array(rows, np.uint8))
    adata = anndata.AnnData(to_counts(bins.toarray()), layers={"bins": bins})
    adata.obs_names = [f"cell{i}" for i in range(adata.n_obs)]
    adata.uns["scbert"] = {"tokenize": {"n_bins": 5}}
    return adata


def masks_of(adata, seed=0, mask_share=0.15):
    """Return tokens and masks of each cell, one seed a cell."""
    bins = CellDataset(adata).batch(range(adata.n_obs))
    return bins, torch.cat([mask_bins(bins[[i]], 6, (seed, i), mask_share=mask_share)[1] for i in range(len(bins))])


@pytest.fixture
def table(more_cells):
    return count_tokens(more_cells)


class Answer(torch.nn.Module):
    """Say, at each position of these cells, what `logits` say; note what was seen."""

    def __init__(self, logits):
        super().__init__()
        self.logits, self.start, self.seen = logits, 0, []

    def forward(self, bins):
        self.seen.append(bins)
        self.start += len(bins)
        return self.logits[self.start - len(bins) : self.start]


# Counting


def test_tokens_are_counted_gene_by_gene():
    table = count_tokens(from_tokens([[1, 5, 0], [1, 2, 0], [3, 0, 0]]))
    assert table.dtype == np.int64
    assert table.tolist() == [[2, 0, 1, 0, 0], [0, 1, 0, 0, 1], [0] * 5, [0] * 5]


def test_counting_in_pieces_counts_each_cell_once(cells, monkeypatch):
    whole = count_tokens(cells)
    monkeypatch.setattr("scbert.evaluate.masks.CELLS_AT_ONCE", 7)
    assert np.array_equal(count_tokens(cells), whole)
    assert whole.sum() == cells.layers["bins"].nnz


def test_counting_cells_that_are_not_tokenized_is_refused(make_cells):
    with pytest.raises(ValueError, match=r"not tokenized: call scbert\.preprocess\.tokenize"):
        count_tokens(make_cells())


# Masks


def test_every_masked_token_is_hidden_under_the_masks_of_the_cells_own_seed(encoder, cells, table):
    bins, where = masks_of(cells, seed=3)
    answer = Answer(torch.zeros(60, 25, 7))
    scores = score_masks(encoder, cells, table, module=answer, seed=3)
    assert torch.equal(torch.cat(answer.seen), bins.masked_fill(where, 6))
    totals = pd.crosstab(np.nonzero(where.numpy())[0], bins[where].numpy()).reindex(range(60), fill_value=0)
    totals = totals.reindex(columns=range(1, 6), fill_value=0)
    assert scores["n_masked"].tolist() == totals.to_numpy().ravel().tolist()
    assert list(scores.index) == [(cell, token) for cell in cells.obs_names for token in range(1, 6)]
    assert scores.index.names == ["cell", "token"]


def test_a_model_that_copies_what_it_sees_has_no_mask_right(encoder, cells):
    def copy(bins):
        return torch.nn.functional.one_hot(bins, 7).float()

    scores = score_masks(encoder, cells, module=copy)
    assert scores["n_masked"].sum() > 60
    assert scores["correct"].sum() == 0


def test_a_model_that_knows_has_all_masks_right(encoder, cells):
    bins = CellDataset(cells).batch(range(60))
    scores = score_masks(encoder, cells, module=Answer(100.0 * torch.nn.functional.one_hot(bins, 7)))
    assert (scores["correct"] == scores["n_masked"]).all()
    assert scores["loss"].sum() == pytest.approx(0, abs=1e-6)


def test_the_model_is_called_where_no_module_is_given(encoder, cells):
    with torch.no_grad():
        encoder.to_out.weight.zero_()
        encoder.to_out.bias.zero_()
    scores = score_masks(encoder, cells)
    assert scores["loss"].to_numpy() == pytest.approx(scores["n_masked"].to_numpy() * np.log(7), rel=1e-5)
    assert not any(name.startswith(("gene", "both")) for name in scores)


def test_the_model_can_be_trained_after_it_was_scored(encoder, cells, bins):
    score_masks(encoder, cells)
    encoder(bins).sum().backward()
    assert encoder.to_out.weight.grad is not None


def test_scores_do_not_depend_on_the_batch_size(encoder, cells, table):
    one, many = (score_masks(encoder, cells, table, batch_size=size) for size in (1, 60))
    pd.testing.assert_frame_equal(one[COUNTS], many[COUNTS])
    pd.testing.assert_frame_equal(one, many, rtol=1e-5)


@pytest.mark.parametrize("n_parts", [2, 3, 5])
def test_the_parts_are_the_whole_and_call_the_model_equally_often(n_parts, encoder, cells, table):
    whole, calls, parts = score_masks(encoder, cells, table, batch_size=16), [], []
    for rank in range(n_parts):

        def call(bins):
            calls.append(rank)  # noqa: B023
            return encoder(bins)

        parts.append(score_masks(encoder, cells, table, module=call, batch_size=16, part=(rank, n_parts)))
    parts = pd.concat(parts)
    assert parts.index.is_unique
    pd.testing.assert_frame_equal(parts.loc[whole.index], whole)
    assert np.bincount(calls).tolist() == [-(-4 // n_parts)] * n_parts
    pd.testing.assert_frame_equal(summarise_masks(parts), summarise_masks(whole))


def test_a_part_without_a_batch_has_no_rows_and_the_same_columns(encoder, cells, table):
    whole, none = (score_masks(encoder, cells, table, batch_size=60, part=part) for part in ((0, 2), (1, 2)))
    assert none.empty
    assert none.dtypes.equals(whole.dtypes)
    assert none.index.names == whole.index.names


@pytest.mark.parametrize("part", [(2, 2), (-1, 2), (0, 0)])
def test_a_part_that_does_not_exist_is_refused(part, encoder, cells):
    with pytest.raises(ValueError, match=r"part is \(rank, number of processes\)"):
        score_masks(encoder, cells, part=part)


def test_a_table_of_other_genes_is_refused(encoder, cells, table):
    with pytest.raises(ValueError, match=r"table has shape \(24, 5\), but these cells need \(25, 5\)"):
        score_masks(encoder, cells, table[:-1])


def test_cells_of_other_genes_are_refused(encoder, make_cells):
    with pytest.raises(ValueError, match="23 genes"):
        score_masks(encoder, tokenize(make_cells(n_genes=23)))


# Rivals


@pytest.fixture
def tiny():
    """A model of four genes; cells in which all but one of the non-zero tokens are shown; and a table."""
    model = scbert.ScBert(scbert.ScBertConfig(n_genes=4, dim=8, depth=1, heads=2, dim_head=4))
    table = np.zeros((5, 5), int)
    table[0] = [1, 0, 0, 0, 3]
    table[1] = [4, 2, 0, 0, 0]
    table[3] = [0, 0, 5, 5, 0]
    return model, from_tokens([[1, 1, 2, 3], [5, 0, 0, 0], [0, 4, 4, 0]]), table


@pytest.mark.parametrize("seed", range(4))
def test_the_rivals_are_those_computed_by_hand(seed, tiny):
    model, adata, table = tiny
    bins, where = masks_of(adata, seed)
    scores = score_masks(model, adata, table, seed=seed)
    overall = [(n + 1) / 25 for n in (5, 2, 5, 5, 3)]
    for i in range(3):
        (gene,) = where[i].nonzero()[:, 0].tolist()
        truth = int(bins[i, gene])
        shown = [int(token) for j, token in enumerate(bins[i]) if token and j != gene]
        p_cell = [(shown.count(token) + 1) / (len(shown) + 5) for token in range(1, 6)]
        p_gene = [(table[gene, t] + overall[t]) / (table[gene].sum() + 1) for t in range(5)]
        product = [g * c / o for g, c, o in zip(p_gene, p_cell, overall, strict=True)]
        p_both = [p / sum(product) for p in product]
        row = scores.loc[(f"cell{i}", truth)]
        assert row["n_masked"] == 1
        assert not scores.loc[f"cell{i}"].drop(truth).to_numpy().any()
        for rival, shares in {"cell": p_cell, "gene": p_gene, "both": p_both}.items():
            assert row[f"{rival}_loss"] == pytest.approx(-np.log(shares[truth - 1]))
            assert row[f"{rival}_correct"] == (shares.index(max(shares)) + 1 == truth)


def test_a_gene_that_the_table_never_saw_has_the_shares_of_all_genes(tiny):
    model, _, table = tiny
    adata = from_tokens([[0, 0, 1, 0], [0, 0, 3, 0]])  # gene 2 alone, which is masked
    scores = score_masks(model, adata, table).query("n_masked > 0")
    assert scores["gene_loss"].tolist() == pytest.approx([-np.log(6 / 25)] * 2)
    assert scores["gene_correct"].tolist() == [1, 0]  # tokens 1, 3 and 4 are the commonest, and 1 is the lowest


def test_an_empty_table_leaves_every_token_equally_likely(tiny):
    model, adata, table = tiny
    scores = score_masks(model, adata, 0 * table)
    assert scores["gene_loss"].sum() == pytest.approx(3 * np.log(5))
    assert scores["both_loss"].tolist() == pytest.approx(scores["cell_loss"].tolist())


def test_the_rivals_know_nothing_of_what_is_hidden(encoder, table):
    random = np.random.default_rng(0)
    rows = random.integers(1, 6, (20, 24))
    adata = from_tokens(rows)
    adata.var_names = [f"gene{i}" for i in range(24)]
    _, where = masks_of(adata)
    other = rows.copy()
    other[where.numpy()[:, :-1]] = 6 - rows[where.numpy()[:, :-1]]  # other truths, the same masks
    changed = from_tokens(other)
    answer = Answer(torch.zeros(40, 25, 7))
    before = score_masks(encoder, adata, table, module=answer)
    after = score_masks(encoder, changed, table, module=answer)
    assert torch.equal(torch.cat(answer.seen)[:20], torch.cat(answer.seen)[20:])
    sums = [scores.groupby("token")["n_masked"].sum().tolist() for scores in (before, after)]
    assert sums[0] == sums[1][::-1]
    # Of a cell with one way to be right, the rival says one token: all right before, or after, or the middle one.
    right = [scores.groupby("cell")["cell_correct"].sum() for scores in (before, after)]
    middle = before.xs(3, level="token")["n_masked"]
    n_masked = before.groupby("cell")["n_masked"].sum()
    assert (right[0] + right[1] <= n_masked + middle).all()


def test_the_rival_of_the_cell_says_its_commonest_visible_token(encoder):
    adata = from_tokens([[2] * 20 + [5, 0, 0, 0]])
    scores = score_masks(encoder, adata)
    assert scores.loc[("cell0", 2), "cell_correct"] == scores.loc[("cell0", 2), "n_masked"] > 0
    assert scores.loc[("cell0", 5), "cell_correct"] == 0


def test_gene_and_cell_together_beat_either_where_each_has_its_say(encoder):
    random = np.random.default_rng(0)
    cell, gene = random.integers(0, 3, 200), random.integers(1, 4, 24)
    rows = cell[:, None] + gene  # 1 to 5, the sum of what cell and gene have
    adata, train = from_tokens(rows[:60]), from_tokens(rows[60:])
    sums = score_masks(encoder, adata, count_tokens(train)).sum()
    assert sums["both_correct"] > max(sums["cell_correct"], sums["gene_correct"])
    assert sums["both_loss"] < min(sums["cell_loss"], sums["gene_loss"])


# Stores


def test_a_store_has_the_scores_and_vectors_of_the_same_cells_in_memory(encoder, make_cells, table, tmp_path):
    adata = make_cells()
    store = write_store(adata, tmp_path / "store", shard_cells=25, progress=False)
    cells = tokenize(adata)
    pd.testing.assert_frame_equal(score_masks(encoder, store, table), score_masks(encoder, cells, table))
    for function in (count_tokens, correlate_genes, lambda adata: embed_genes(encoder, adata)):
        assert np.array_equal(function(store), function(cells))


# Summaries


def test_the_summary_is_of_ratios_of_sums_with_paired_differences(encoder, cells, table):
    scores = score_masks(encoder, cells, table)
    summary, sums = summarise_masks(scores), scores.sum()
    assert list(summary) == ["value", "low", "high", "n"]
    assert summary.index.names == ["method", "metric"]
    assert len(summary) == 8 + 6 + 1
    assert (summary["n"] == 60).all()
    assert ((summary["low"] <= summary["value"]) & (summary["value"] <= summary["high"])).all()
    assert summary.loc[("scbert", "masked_accuracy"), "value"] == sums["correct"] / sums["n_masked"]
    assert summary.loc[("scbert", "predicted_mode_share"), "value"] == sums["predicted_mode"] / sums["n_masked"]
    for rival, method in RIVALS.items():
        for metric, name in (("masked_accuracy", "correct"), ("cross_entropy", "loss")):
            value = sums[f"{rival}_{name}"] / sums["n_masked"]
            assert summary.loc[(method, metric), "value"] == pytest.approx(value)
            difference = summary.loc[("scbert", f"{metric}_minus_{method}"), "value"]
            assert difference == pytest.approx(sums[name] / sums["n_masked"] - value)
    pd.testing.assert_frame_equal(summarise_masks(scores), summary)
    assert not summarise_masks(scores, seed=1).equals(summary)


def test_a_model_that_does_as_its_rival_differs_from_it_by_nothing(encoder, cells):
    scores = score_masks(encoder, cells)
    scores["correct"], scores["loss"] = scores["cell_correct"], scores["cell_loss"]
    summary = summarise_masks(scores)
    for metric in ("masked_accuracy", "cross_entropy"):
        assert summary.loc[("scbert", f"{metric}_minus_cell_tokens"), ["value", "low", "high"]].tolist() == [0, 0, 0]


def test_cells_without_a_masked_token_have_no_say(tiny):
    model, adata, table = tiny
    summary = summarise_masks(score_masks(model, from_tokens([[1, 2, 0, 0], [0, 0, 0, 0]]), table))
    assert (summary["n"] == 1).all()
    with pytest.raises(ValueError, match="No token was masked"):
        summarise_masks(score_masks(model, from_tokens([[0, 0, 0, 0]]), table))


def test_by_token_splits_the_masks_and_what_is_right(encoder, cells, table):
    scores = score_masks(encoder, cells, table)
    tokens, sums = by_token(scores), scores.sum()
    assert tokens.index.tolist() == [1, 2, 3, 4, 5]
    assert tokens["n_masked"].sum() == sums["n_masked"]
    for method, prefix in {"scbert": "", "cell_tokens": "cell_", "gene_tokens": "gene_"}.items():
        assert (tokens["n_masked"] * tokens[method]).sum() == pytest.approx(sums[f"{prefix}correct"])


def test_by_token_has_no_accuracy_for_a_token_without_masks(tiny):
    model, adata, table = tiny
    tokens = by_token(score_masks(model, from_tokens([[1, 1, 1, 1]]), table))
    assert tokens["n_masked"].tolist() == [1, 0, 0, 0, 0]
    assert tokens["scbert"].isna().tolist() == [False, True, True, True, True]


# Vectors of genes


def test_a_genes_vector_is_the_mean_over_the_cells_that_express_it(encoder, cells):
    cells.layers["bins"] = sparse.csr_matrix(cells.layers["bins"].toarray() * (np.arange(24) != 7))
    cells.X = to_counts(cells.layers["bins"].toarray())
    tokens = CellDataset(cells).batch(range(60))
    with torch.no_grad():
        hidden = encoder.encode(tokens).numpy()
    vectors = embed_genes(encoder, cells)
    assert vectors.shape == (24, 8)
    assert not vectors[7].any()
    for gene in (0, 5, 23):
        assert vectors[gene] == pytest.approx(hidden[tokens[:, gene] > 0, gene].mean(0), abs=1e-5)


def test_gene_vectors_do_not_depend_on_the_batch_size(encoder, cells):
    assert embed_genes(encoder, cells, batch_size=7) == pytest.approx(
        embed_genes(encoder, cells, batch_size=60), abs=1e-5
    )


def test_cells_that_are_not_tokenized_or_do_not_fit_have_no_gene_vectors(encoder, make_cells):
    for function in (lambda adata: embed_genes(encoder, adata), correlate_genes):
        with pytest.raises(ValueError, match="not tokenized"):
            function(make_cells())
    with pytest.raises(ValueError, match="23 genes"):
        embed_genes(encoder, tokenize(make_cells(n_genes=23)))


def test_correlations_are_those_of_numpy_and_zero_for_a_constant_gene(cells, monkeypatch):
    monkeypatch.setattr("scbert.evaluate.masks.CELLS_AT_ONCE", 7)
    tokens = cells.layers["bins"].toarray()
    tokens[:, 3] = 2
    cells.layers["bins"], cells.X = sparse.csr_matrix(tokens), to_counts(tokens)
    others = np.arange(24) != 3
    correlation = correlate_genes(cells)
    assert correlation[np.ix_(others, others)] == pytest.approx(np.corrcoef(tokens[:, others].T), abs=1e-6)
    assert not correlation[3].any()
    assert not correlation[:, 3].any()


# Sets


GENES = [f"gene{i}" for i in range(300)]
MODULES = {f"set{i}": GENES[10 * i : 10 * i + 10] for i in range(30)}
"""30 sets of 10 genes each: 9 of the 299 other genes are in a gene's set."""


def draw_vectors(noise=1.0, seed=0):
    """Return vectors that lie around the centre of each set."""
    random = np.random.default_rng(seed)
    return np.repeat(random.normal(size=(30, 16)), 10, axis=0) + noise * random.normal(size=(300, 16))


def test_sets_are_found_in_vectors_that_hold_them():
    found = share_of_neighbours(draw_vectors(noise=0.01), GENES, MODULES, n_neighbours=9)
    assert found["share"] == found["share_low"] == found["share_high"] == 1
    assert found["chance"] == pytest.approx(9 / 299)
    assert found["ratio"] == pytest.approx(299 / 9)
    assert found[["n_genes", "n_sets"]].tolist() == [300, 30]


def test_the_share_is_that_of_a_loop_over_genes():
    vectors = draw_vectors()
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    cosine = unit @ unit.T - 3 * np.eye(300)
    shares = [np.mean([j // 10 == i // 10 for j in np.argsort(-cosine[i])[:5]]) for i in range(300)]
    found = share_of_neighbours(vectors, GENES, MODULES, n_neighbours=5)
    assert found["share"] == pytest.approx(np.mean(shares))
    assert found["share_low"] < found["share"] < found["share_high"]
    assert found["ratio"] == pytest.approx(found["share"] / found["chance"])


def test_shuffled_vectors_find_no_more_than_chance():
    shuffled = np.random.default_rng(0).permutation(draw_vectors(noise=0.01))
    found = share_of_neighbours(shuffled, GENES, MODULES)
    assert found["ratio_low"] < 1 < found["ratio_high"]
    assert 0.5 < found["ratio"] < 1.5


def test_equally_close_genes_are_drawn_and_not_taken_in_their_order():
    found = [share_of_neighbours(np.ones((300, 2)), GENES, MODULES, n_neighbours=9, seed=seed) for seed in range(8)]
    assert np.mean([series["ratio"] for series in found]) == pytest.approx(1, abs=0.5)  # in order: up to 33
    assert len({series["share"] for series in found}) > 1
    lengths = np.random.default_rng(0).uniform(0.1, 9, (300, 1))  # the cosines differ in their last digits
    again = share_of_neighbours(lengths * [[0.1, 0.7]], GENES, MODULES, n_neighbours=9, seed=0)
    pd.testing.assert_series_equal(again, found[0])


def test_the_same_seed_finds_the_same_and_pieces_change_nothing(monkeypatch):
    vectors = draw_vectors().round()  # with ties
    found = share_of_neighbours(vectors, GENES, MODULES, levels=np.arange(300), seed=1)
    monkeypatch.setattr("scbert.experiments.pretraining.GENES_AT_ONCE", 7)
    pd.testing.assert_series_equal(share_of_neighbours(vectors, GENES, MODULES, levels=np.arange(300), seed=1), found)


def test_genes_without_a_set_or_a_vector_are_left_out_of_pairs_and_chance():
    vectors = draw_vectors()
    vectors[:10] = 0
    sets = {name: members for name, members in MODULES.items() if name != "set29"}
    sets |= {"small": GENES[290:294], "large": GENES[:250], "elsewhere": ["other1", "other2"] * 5}
    found = share_of_neighbours(vectors, GENES, sets, maximum=200)
    assert found[["n_genes", "n_sets"]].tolist() == [280, 29]
    assert found["chance"] == pytest.approx(9 / 279)
    kept = slice(10, 290)
    alone = share_of_neighbours(vectors[kept], GENES[kept], {name: sets[name] for name in list(MODULES)[1:29]})
    assert alone["share"] == pytest.approx(found["share"])


def test_a_gene_named_twice_in_a_set_counts_once():
    twice = {name: members * 2 for name, members in MODULES.items()}
    once = share_of_neighbours(draw_vectors(), GENES, MODULES, maximum=10)
    pd.testing.assert_series_equal(share_of_neighbours(draw_vectors(), GENES, twice, maximum=10), once)


def test_neighbours_that_share_a_level_alone_are_chance_once_levels_are_given():
    random = np.random.default_rng(0)
    levels = random.normal(size=300)
    levels[:60] += 20  # sets 0 to 5 are the strongest genes, and one set
    angle = np.clip(levels, -3, 25) / 20
    vectors = np.stack([np.cos(angle), np.sin(angle)], axis=1)  # cosine knows the level, and nothing else
    sets = MODULES | {"strong": GENES[:60]}
    without, given = (share_of_neighbours(vectors, GENES, sets, levels=part) for part in (None, levels))
    assert without["ratio_low"] > 2
    assert given["share"] == without["share"]
    assert given["ratio_low"] < 1 < given["ratio_high"]


def test_levels_take_nothing_from_sets_that_are_no_matter_of_level():
    found = share_of_neighbours(
        draw_vectors(0.01), GENES, MODULES, levels=np.random.default_rng(0).normal(size=300), n_neighbours=9
    )
    assert found["ratio"] > 15


def test_the_chance_of_a_pair_is_that_of_its_two_tenths():
    levels = np.arange(300) % 10  # ten levels of 30 genes; each set has one gene of each level
    found = share_of_neighbours(draw_vectors(0.01), GENES, MODULES, levels=levels, n_neighbours=9)
    assert found["chance"] == pytest.approx(30 / 900)  # of pairs of two levels, one in 30; of one level, none


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vectors": np.ones((299, 2))}, r"300 genes need as many vectors and levels, not .*\(299, 2\)"),
        ({"levels": np.ones(299)}, r"levels of shape \(299,\)"),
        ({"vectors": np.full((300, 2), np.nan)}, "NaN"),
        ({"levels": np.full(300, np.nan)}, "NaN"),
        ({"sets": {"other": ["other1"] * 10}}, "0 genes have a vector and a set of 5 to 200 members"),
        ({"n_neighbours": 300}, "300 genes have a vector .* too few for 300 neighbours"),
        ({"genes": GENES[:299] + GENES[:1]}, "Gene names are duplicated"),
        ({"sets": {f"set{i}": [f"gene{i}"] for i in range(300)}, "minimum": 1}, "No two of these genes"),
    ],
)
def test_what_cannot_be_compared_is_refused(changes, message):
    arguments = {"vectors": draw_vectors(), "genes": GENES, "sets": MODULES} | changes
    with pytest.raises(ValueError, match=message):
        share_of_neighbours(**arguments)


def test_pathways_are_read_with_their_genes(monkeypatch, tmp_path):
    import gzip

    with gzip.open(tmp_path / "sets.gmt.gz", "wt") as file:
        file.write("ONE\thttp://one\tA\tB\tA\nTWO\thttp://two\tC\n")
    monkeypatch.setattr("scbert.experiments.pretraining.fetch", lambda name: [tmp_path / "sets.gmt.gz"])
    assert read_sets("reactome") == {"ONE": ["A", "B"], "TWO": ["C"]}


def test_markers_of_other_species_are_left_out(monkeypatch, tmp_path):
    rows = ["Mm Hs\tA\tT cells", "Mm\tB\tT cells", "Hs\tC\tT cells", "\tD\tT cells", "Hs\tA\tB cells", "Mm\tE\tNeurons"]
    (tmp_path / "markers.tsv").write_text("\n".join(["species\tofficial gene symbol\tcell type", *rows]))
    monkeypatch.setattr("scbert.experiments.pretraining.fetch", lambda name: [tmp_path / "markers.tsv"])
    assert read_sets("panglaodb_markers") == {"B cells": ["A"], "T cells": ["A", "C"]}


def test_sets_of_another_name_are_refused():
    with pytest.raises(ValueError, match="'reactome' or 'panglaodb_markers', not 'kegg'"):
        read_sets("kegg")


@pytest.mark.skipif("SCBERT_MIRROR" not in os.environ, reason="needs the files of the catalogue")
def test_the_sets_of_the_catalogue_are_read_whole():
    reactome, markers = read_sets("reactome"), read_sets("panglaodb_markers")
    assert (len(reactome), len(markers)) == (674, 178)
    assert "RPL35" in reactome["REACTOME_TRANSLATION"]
    assert "CD79A" in markers["B cells"]


def test_company_is_measured_for_each_collection_and_vectors_at_the_levels_of_the_cells(make_cells):
    adata = tokenize(make_cells(40, 300))
    vectors = {"own": draw_vectors(), "other": draw_vectors(seed=1)}
    sets = dict(zip(MODULES, ([f"gene{i + 1}" for i in range(10 * k, 10 * k + 9)] for k in range(30)), strict=True))
    company = measure_company(vectors, adata, {"modules": MODULES, "shifted": sets}, seed=3)
    assert list(company.index) == [(c, v) for c in ("modules", "shifted") for v in ("own", "other")]
    levels = adata.layers["bins"].toarray().mean(0)
    alone = share_of_neighbours(vectors["other"], list(adata.var_names), sets, levels=levels, seed=3)
    pd.testing.assert_series_equal(company.loc[("shifted", "other")], alone, check_names=False)
    assert measure_company(vectors, adata, {}).empty
