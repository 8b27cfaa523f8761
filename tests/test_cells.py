"""The right cell, each cell once, and the right tokens hidden."""

import numpy as np
import pytest
import torch

from scbert.data.cells import CellDataset, order_cells
from scbert.data.masking import find_commonest_bin, mask_bins

MASK = 6


def test_cell_i_is_the_one_that_is_asked_for(cells):
    dataset = CellDataset(cells)
    expected = cells.layers["bins"].toarray()
    assert len(dataset) == 60
    for i in (0, 13, 59):
        (bins,) = dataset.batch([i])
        assert bins.dtype == torch.int64
        assert bins.tolist() == [*expected[i], 0]
    bins = dataset.batch([5, 2, 5])
    assert bins[:, :-1].tolist() == expected[[5, 2, 5]].tolist()


def test_a_view_of_cells_is_read_in_its_own_order(cells):
    bins = CellDataset(cells[[9, 3]]).batch([0, 1])
    assert torch.equal(bins, CellDataset(cells).batch([9, 3]))


def test_untokenized_cells_are_refused(make_cells):
    with pytest.raises(ValueError, match=r"not tokenized: call scbert\.preprocess\.tokenize"):
        CellDataset(make_cells())


def test_an_epoch_visits_each_cell_once_in_an_order_of_its_own():
    first, again, next_epoch, other_seed = (order_cells(500, *key) for key in ((0, 1), (0, 1), (0, 2), (1, 1)))
    assert sorted(first) == list(range(500))
    assert first.tolist() == again.tolist()
    assert first.tolist() != next_epoch.tolist() != other_seed.tolist() != first.tolist()


def test_a_bootstrap_epoch_meets_63_percent_of_the_cells():
    order = order_cells(10_000, 0, 0, "bootstrap")
    assert len(order) == 10_000
    assert abs(len(set(order)) / 10_000 - (1 - np.exp(-1))) < 0.015


@pytest.fixture
def tokens():
    """200 cells of 100 tokens above zero, 99 zeros, and the trailing zero."""
    random = np.random.default_rng(0)
    bins = np.zeros((200, 200), dtype=np.int64)
    for row in bins:
        row[random.permutation(199)[:100]] = random.integers(1, 6, size=100)
    return torch.from_numpy(bins)


def test_fifteen_percent_of_each_cells_tokens_are_to_be_predicted(tokens):
    _, where = mask_bins(tokens, MASK, 0)
    assert where.sum(1).tolist() == [15] * 200


def test_no_zero_and_no_trailing_token_is_ever_masked(tokens):
    seen, where = mask_bins(tokens, MASK, 0)
    assert not where[tokens == 0].any()
    assert (seen[tokens == 0] == 0).all()
    assert not where[:, -1].any()


def test_ninety_percent_of_them_are_replaced_and_all_others_stay(tokens):
    seen, where = mask_bins(tokens, MASK, 0)
    assert abs((seen[where] == MASK).float().mean() - 0.9) < 0.02
    assert torch.equal(seen[seen != MASK], tokens[seen != MASK])
    assert (seen[~where] != MASK).all()


def test_each_token_is_as_likely_to_be_masked(tokens):
    chosen = sum(mask_bins(tokens, MASK, seed)[1].int() for seed in range(5))
    by_bin = [chosen[tokens == b].float().mean() / 5 for b in range(1, 6)]
    assert max(abs(share - 0.15) for share in by_bin) < 0.01


def test_a_cell_with_one_token_gets_one_mask_and_a_cell_with_none_gets_none():
    bins = torch.zeros(2, 10, dtype=torch.int64)
    bins[0, 4] = 3
    seen, where = mask_bins(bins, MASK, 0, replace_share=1.0)
    assert where.nonzero().tolist() == [[0, 4]]
    assert seen[0, 4] == MASK
    assert seen[1].tolist() == [0] * 10


def test_masks_follow_from_the_seed_alone(tokens):
    before = tokens.clone()
    first, again, other = (mask_bins(tokens, MASK, seed) for seed in ((0, 1), (0, 1), (0, 2)))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[1], other[1])
    assert torch.equal(tokens, before)


def test_batches_in_order_meet_each_cell_once_and_say_which_is_first(cells):
    dataset = CellDataset(cells)
    batches = list(dataset.in_order(25))
    assert [start for start, _ in batches] == [0, 25, 50]
    assert torch.equal(torch.cat([bins for _, bins in batches]), dataset.batch(range(60)))


def test_the_commonest_bin_leaves_zeros_out_and_takes_the_lowest_of_several():
    bins = torch.tensor([[0, 0, 0, 5, 5, 2, 0], [3, 1, 3, 1, 0, 0, 0], [0, 0, 0, 0, 0, 0, 0]])
    assert find_commonest_bin(bins, n_bins=5).tolist() == [[5], [1], [1]]
