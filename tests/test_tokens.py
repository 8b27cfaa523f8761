"""Tokens are counted where molecules were seen, and what is lost is what can be counted by hand."""

import anndata
import numpy as np
import pandas as pd
import pytest
from scipy import sparse

import scbert
from scbert import tokens


@pytest.fixture
def shallow_and_deep():
    """Counts of two cells and four genes, and their tokens, of cells of 1,000 and of 20,000 molecules."""
    counts = sparse.csr_matrix(np.array([[1, 0, 4, 0], [1, 2, 0, 80]], np.float32))
    return counts, scbert.preprocess.bin_counts(counts, np.array([1_000, 20_000]))


def test_tokens_of_what_was_seen_are_in_the_order_of_the_counts(shallow_and_deep):
    counts, bins = shallow_and_deep
    assert bins.toarray().tolist() == [[3, 0, 5, 0], [0, 1, 0, 5]]
    assert tokens.take_seen(counts, bins).tolist() == [3, 5, 0, 1, 5]
    unsorted = counts[:, [3, 2, 1, 0]][:, [3, 2, 1, 0]]  # the same matrix, its columns stored in another order
    assert tokens.take_seen(unsorted, bins).tolist() == [3, 5, 0, 1, 5]


def test_every_value_is_counted_once_and_edges_meet(shallow_and_deep):
    table = tokens.count_tokens(*shallow_and_deep)
    assert table["values"].tolist() == [4, 1, 0, 1, 0, 2]
    assert table["molecules were seen"].tolist() == [1, 1, 0, 1, 0, 2]
    assert table["from"].tolist() == [0, 1, 3, 7, 15, 31]
    assert table["to"].tolist() == [1, 3, 7, 15, 31, np.inf]
    assert len(tokens.count_tokens(*shallow_and_deep, n_bins=7)) == 8


def test_a_molecule_weighs_less_in_a_deeper_cell():
    assert tokens.bin_one_molecule([500, 2_000, 10_000, 10_001]).tolist() == [4, 2, 1, 0]
    assert tokens.bin_one_molecule([1], n_bins=7).tolist() == [7]


def test_losses_are_shares_of_what_was_seen(shallow_and_deep):
    counts, bins = shallow_and_deep
    all_cut = bins.copy()
    all_cut.data[:] = 5
    losses = tokens.measure_losses(counts, {"as it is": bins, "cut": all_cut})
    assert losses["as it is"].tolist() == pytest.approx([1 / 5, 2 / 5, 14 / 5])
    assert losses["cut"].tolist() == pytest.approx([1 / 5, 4 / 5, 4])


def test_tokens_are_kept_where_only_names_changed_and_no_counts_were_summed(make_cells):
    before = scbert.preprocess.tokenize(make_cells())
    new = [f"new{i}" for i in range(24)]
    found = pd.DataFrame({"gene": [*new[:20], new[19], None, None, new[23]]}, index=before.var_names)  # 19 of two
    after = anndata.AnnData(
        before.X, obs=before.obs, var=pd.DataFrame(index=new), layers={"bins": before.layers["bins"]}
    )
    after = after[:, np.random.default_rng(0).permutation(24)].copy()
    assert tokens.are_kept(before, after, found)
    changed = after.copy()
    changed.layers["bins"][0, after.var_names.get_loc("new19")] += 1  # of a gene of two names: summed
    assert tokens.are_kept(before, changed, found)
    changed.layers["bins"][0, after.var_names.get_loc("new3")] += 1
    assert not tokens.are_kept(before, changed, found)
