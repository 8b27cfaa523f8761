"""FAVOR+ against performer-pytorch, against its equations written out, and against softmax attention."""

import favor
import pytest
import torch
from performer_pytorch import FastAttention

from scbert import attention
from scbert.model.attention import CHUNK_BYTES, FavorAttention, attend, draw_projection, summarise_keys, weigh_queries

STABILISERS = pytest.mark.parametrize("key_stabiliser", ["head", "batch"])
CHUNKS = {"one chunk": 120, "two cells a chunk": 80, "three chunks a cell": 15, "single positions": 1}
"""Positions in a chunk, for cells of 40."""


def draw(scale=1.0, dtype=torch.float64, cells=3, heads=3, positions=40, dim_head=16):
    """Return random q, k, v."""
    generator = torch.Generator().manual_seed(0)
    return [(scale * torch.randn(cells, heads, positions, dim_head, generator=generator)).to(dtype) for _ in range(3)]


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


PROJECTION = draw_projection(44, 16, seeded())


def favor_attention(*inputs, **options):
    """Return what is found, without columns."""
    return favor.favor_attention(*inputs, **options)[0]


def attention_columns(q, k, projection, where, key_stabiliser="head"):
    """Return what each position receives from those that attend: `where`, (cells, positions)."""
    weight = weigh_queries(where.to(q.dtype))
    return favor.favor_attention(q, k, k[..., :0], projection, key_stabiliser, weight=weight)[1]


@pytest.fixture(params=CHUNKS.values(), ids=CHUNKS)
def chunked(request, monkeypatch):
    """Let what `draw` returns be computed in chunks."""
    monkeypatch.setitem(CHUNK_BYTES, "cpu", 4 * 3 * 44 * request.param)
    monkeypatch.setattr("scbert.model.attention.KEPT_CHUNKS", 1)


def matrix(q, k, projection, key_stabiliser, present=None):
    """The equations of the module's docstring, one by one, through the positions x positions matrix."""
    present = torch.ones(len(k), k.shape[2], dtype=torch.bool) if present is None else present
    present = present[:, None, :, None]  # (cells, 1, positions, 1)
    c, eps = q.shape[-1] ** -0.25, 1e-4
    q_projected, k_projected = (c * x @ projection.T.to(x.dtype) for x in (q, k))
    q_half, k_half = (c**2 * x.square().sum(-1, keepdim=True) / 2 for x in (q, k))
    q_max = q_projected.detach().amax(-1, keepdim=True)
    k_max = k_projected.detach().masked_fill(~present, -torch.inf)
    k_max = k_max.amax((-2, -1), keepdim=True) if key_stabiliser == "head" else k_max.max()
    phi_q = (q_projected - q_half - q_max).exp() + eps
    phi_k = ((k_projected - k_half - k_max).exp() + eps).masked_fill(~present, 0)
    weights = phi_q @ phi_k.transpose(-1, -2)
    return weights / weights.sum(-1, keepdim=True)


def formula(q, k, v, projection, key_stabiliser="head", present=None):
    return matrix(q, k, projection, key_stabiliser, present) @ v


def with_gradients(function, inputs, *options):
    """Return a function's result and its gradients with respect to q, k and v."""
    inputs = [x.clone().requires_grad_() for x in inputs]
    out = function(*inputs, PROJECTION, *options)
    return [out, *torch.autograd.grad(out.sin().sum(), inputs)]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
def test_it_equals_performer_pytorch(dtype, tolerance):
    q, k, v = draw(dtype=dtype)
    theirs = FastAttention(16)
    ours = favor_attention(q, k, v, theirs.projection_matrix)
    torch.testing.assert_close(ours, theirs(q, k, v), atol=tolerance, rtol=0)


def enlarge_one_cell(k):
    return torch.cat([k[:1], 3 * k[1:2], k[2:]])


def grow(k):
    k = k * torch.linspace(0.1, 3, k.shape[2])[:, None]
    return k.gather(2, k.norm(dim=-1, keepdim=True).argsort(2).expand_as(k))


def shrink(k):
    return grow(k).flip(2)


@STABILISERS
@pytest.mark.parametrize("change", [enlarge_one_cell, grow, shrink])
def test_value_and_gradients_equal_those_of_the_formula(chunked, change, key_stabiliser):
    q, k, v = draw()
    ours, theirs = (with_gradients(f, (q, change(k), v), key_stabiliser) for f in (favor_attention, formula))
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, atol=1e-10, rtol=1e-8)


@STABILISERS
@pytest.mark.parametrize("fit", [9, 6, 2])
def test_without_eps_gradients_are_those_of_finite_differences(monkeypatch, fit, key_stabiliser):
    # The maxima, constants in the gradient, cancel in the value only where eps is 0.
    monkeypatch.setitem(CHUNK_BYTES, "cpu", 4 * 1 * 5 * fit)
    inputs = [x.requires_grad_() for x in draw(cells=3, heads=1, positions=3, dim_head=2)]
    projection = draw_projection(5, 2, seeded())
    assert torch.autograd.gradcheck(lambda *qkv: favor_attention(*qkv, projection, key_stabiliser, eps=0.0), inputs)


@pytest.mark.parametrize(("scale_q", "scale_k"), [(50, 50), (50, 1), (1, 50), (2, 2)])
def test_large_queries_and_keys_give_what_the_formula_gives_in_double_precision(chunked, scale_q, scale_k):
    q, k, v = draw(dtype=torch.float32)
    inputs = scale_q * q, scale_k * k, scale_k * v
    expected = with_gradients(formula, [x.double() for x in inputs])
    for one, other in zip(with_gradients(favor_attention, inputs), expected, strict=True):
        torch.testing.assert_close(one.double(), other, atol=1e-4, rtol=0)  # values and gradients go up to 30


def test_huge_queries_overflow_no_sum_however_large_the_values():
    q, k, v = draw(dtype=torch.float32)
    out = favor_attention(50 * q, k, 1e6 * v, PROJECTION)
    torch.testing.assert_close(out / 1e6, favor_attention(50 * q, k, v, PROJECTION), atol=1e-6, rtol=0)


@STABILISERS
def test_neither_results_nor_gradients_depend_on_the_chunks(chunked, monkeypatch, key_stabiliser):
    inputs = draw(dtype=torch.float32)
    several = with_gradients(favor_attention, inputs, key_stabiliser)
    monkeypatch.setitem(CHUNK_BYTES, "cpu", 2**30)
    for one, other in zip(with_gradients(favor_attention, inputs, key_stabiliser), several, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("cells", "positions"), [(7, 5), (2, 40), (1, 41)])
@pytest.mark.parametrize("fit", [1, 2, 13, 40, 1000])
def test_chunks_fit_and_hold_every_position_once_in_order(monkeypatch, cells, positions, fit):
    monkeypatch.setitem(CHUNK_BYTES, "cpu", 4 * 3 * 44 * fit + 3)
    x = torch.arange(cells * positions).view(cells, positions)
    groups = attention.split_chunks((x, -x), 3, 44)
    assert torch.equal(torch.cat([torch.cat([one for one, _ in chunks], 1) for chunks in groups]), x)
    assert torch.equal(torch.cat([torch.cat([other for _, other in chunks], 1) for chunks in groups]), -x)
    assert max(one.numel() for chunks in groups for one, _ in chunks) <= fit
    few = -(-cells // (fit // positions)) if fit >= positions else cells * -(-positions // fit)
    assert sum(map(len, groups)) == few


def test_half_precision_is_widened_for_the_sums_and_comes_back(chunked):
    q, k, v = draw(dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        out, *gradients = with_gradients(favor_attention, (q, k, v))
    assert {x.dtype for x in (out, *gradients)} == {torch.bfloat16}
    expected = formula(q.float(), k.float(), v.float(), PROJECTION)
    torch.testing.assert_close(out.float(), expected, atol=1e-6, rtol=4e-3)  # rounded once, at the end


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_autocast_does_not_reach_features_and_sums(dtype):
    q, k, v = (x.flatten(0, 1).mT for x in draw(dtype=dtype))
    expected = summarise_keys(k.float(), v.float(), PROJECTION)
    with torch.autocast("cpu", torch.bfloat16):
        keys = summarise_keys(k, v, PROJECTION)
        out = attend(q, keys, PROJECTION)
    for one, other in zip((*keys, out), (*expected, attend(q.float(), expected, PROJECTION)), strict=True):
        assert one.dtype == torch.float32
        assert torch.equal(one, other)


def test_a_second_derivative_is_refused(chunked):
    q, k, v = (x.requires_grad_() for x in draw())
    (gradient,) = torch.autograd.grad(favor_attention(q, k, v, PROJECTION).sin().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


@STABILISERS
@pytest.mark.parametrize("share", [1.0, 0.3])
def test_columns_are_the_mean_over_rows_of_the_attention_matrix(chunked, share, key_stabiliser):
    q, k, _ = draw()
    k[1] *= 3
    q[2, :, :20] *= 4  # eps outweighs the features of these queries
    where = torch.rand(3, 40, generator=seeded()) < share
    rows = matrix(q, k, PROJECTION, key_stabiliser)
    expected = torch.stack([rows[cell][:, where[cell]].mean(1) for cell in range(3)])
    columns = attention_columns(q, k, PROJECTION, where, key_stabiliser)
    torch.testing.assert_close(columns, expected, atol=1e-10, rtol=0)
    torch.testing.assert_close(columns.sum(2), torch.ones(3, 3, dtype=torch.float64), atol=1e-10, rtol=0)


def test_a_cell_without_a_query_attends_to_nothing(chunked):
    q, k, _ = draw()
    where = torch.ones(3, 40, dtype=torch.bool)
    where[1] = False
    columns = attention_columns(q, k, PROJECTION, where)
    assert not columns[1].any()
    every = attention_columns(q, k, PROJECTION, torch.ones(3, 40, dtype=torch.bool))
    torch.testing.assert_close(columns[[0, 2]], every[[0, 2]])


def draw_padded(fill):
    """Return q, k, v, and which positions are present; the others hold large numbers, or zeros."""
    present = torch.zeros(3, 40, dtype=torch.bool)
    present[0, :4] = present[1, -1:] = present[2] = True  # short, late, and without padding
    tensors = [x.masked_fill(~present[:, None, :, None], fill) for x in draw()]
    return *tensors, present


def in_one_piece(q, k, v, projection, key_stabiliser="head", present=None):
    """Attend as groups of expressed genes do."""
    mask = present.repeat_interleave(q.shape[1], 0)[:, None]
    out = FavorAttention(projection, key_stabiliser).attend(*(x.mT.flatten(0, 1) for x in (q, k, v)), mask)
    return out.mT.unflatten(0, q.shape[:2])


@STABILISERS
@pytest.mark.parametrize("fill", [0.0, 30.0, -1e3])
def test_padding_enters_neither_values_nor_gradients_whatever_it_holds(fill, key_stabiliser):
    *inputs, present = draw_padded(fill)

    def ignore_padding(function):
        def attend(q, k, v, projection):
            out = function(q, k, v, projection, key_stabiliser, present=present)
            return out.masked_fill(~present[:, None, :, None], 0)

        return attend

    ours, theirs = (with_gradients(ignore_padding(f), inputs) for f in (in_one_piece, formula))
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, atol=1e-10, rtol=1e-8)
        assert not one.masked_fill(present[:, None, :, None], 0).any()


def test_padding_alone_sums_to_nothing_and_merges_with_anything():
    k, v = (x.flatten(0, 1).mT for x in draw()[1:])  # (cells * heads, dim_head, positions)
    nothing = summarise_keys(k, v, PROJECTION, torch.zeros(9, 1, 40, dtype=torch.bool))
    assert not nothing.context.any()
    assert not nothing.values.any()
    something = summarise_keys(k, v, PROJECTION)
    for one, other in ((nothing, something), (something, nothing)):
        for merged, expected in zip(attention.merge_summaries(one, other), something, strict=True):
            assert torch.equal(merged, expected)


def test_a_padded_cell_is_attended_to_as_if_it_were_shorter(chunked):
    *inputs, present = draw_padded(30.0)
    together = in_one_piece(*inputs, PROJECTION, present=present)
    for cell, own in enumerate(present):
        q, k, v = (x[cell : cell + 1, :, own] for x in inputs)
        alone = favor_attention(q, k, v, PROJECTION)
        torch.testing.assert_close(together[cell : cell + 1, :, own], alone, atol=1e-12, rtol=1e-10)


def test_a_cell_does_not_depend_on_who_shares_its_batch():
    q, k, v = draw(dtype=torch.float32)
    k[1] *= 30
    together = favor_attention(q, k, v, PROJECTION)
    alone = favor_attention(q[:1], k[:1], v[:1], PROJECTION)
    torch.testing.assert_close(together[:1], alone, atol=1e-6, rtol=0)


def test_as_published_a_cell_does_depend_on_who_shares_its_batch():
    q, k, v = draw(dtype=torch.float32)
    k[1] *= 30
    together = favor_attention(q, k, v, PROJECTION, "batch")
    alone = favor_attention(q[:1], k[:1], v[:1], PROJECTION, "batch")
    assert (together[:1] - alone).abs().max() > 0.1


def test_identical_keys_give_the_mean_of_the_values():
    q, k, v = draw()
    out = favor_attention(q, k[:, :, :1].expand_as(k), v, PROJECTION)
    torch.testing.assert_close(out, v.mean(2, keepdim=True).expand_as(v))


def test_more_features_come_closer_to_softmax_attention():
    q, k, v = draw(scale=0.5, cells=1)
    exact = torch.softmax(q @ k.transpose(-1, -2) / 16**0.5, -1) @ v
    few, some, many = (
        ((favor_attention(q, k, v, draw_projection(m, 16, seeded())) - exact).abs().mean() / exact.abs().mean()).item()
        for m in (32, 512, 8192)
    )
    assert many < 0.7 * some < 0.5 * few
    assert many < 0.06


def test_features_of_one_block_are_orthogonal_and_as_long_as_gaussian_vectors():
    projection = draw_projection(2 * 16 + 5, 16, seeded())
    assert projection.shape == (37, 16)
    for block in projection.split(16):
        products = block @ block.T
        torch.testing.assert_close(products, products.diag().diag(), atol=1e-4, rtol=0)
    lengths = draw_projection(4096, 16, seeded()).square().sum(1)
    assert abs(lengths.mean() - 16) < 0.5
    assert abs(lengths.var() - 32) < 5


def test_features_follow_from_the_generator_alone():
    torch.manual_seed(1)
    first, state = draw_projection(20, 8, seeded(3)), torch.random.get_rng_state()
    torch.manual_seed(2)
    assert torch.equal(first, draw_projection(20, 8, seeded(3)))
    assert not torch.equal(first, draw_projection(20, 8, seeded(4)))
    torch.manual_seed(1)
    assert torch.equal(state, torch.random.get_rng_state())
