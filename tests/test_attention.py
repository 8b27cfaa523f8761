"""FAVOR+ against performer-pytorch, against its equations written out, and against softmax attention."""

import pytest
import torch
from performer_pytorch import FastAttention

from scbert.attention import draw_projection, favor_attention


def draw(scale=1.0, dtype=torch.float64, cells=2, heads=3, positions=40, dim_head=16):
    """Return random q, k, v."""
    generator = torch.Generator().manual_seed(0)
    return [(scale * torch.randn(cells, heads, positions, dim_head, generator=generator)).to(dtype) for _ in range(3)]


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


PROJECTION = draw_projection(44, 16, seeded())


def formula(q, k, v, projection, key_stabiliser):
    """The equations of the module's docstring, one by one, through the positions x positions matrix."""
    c, eps = q.shape[-1] ** -0.25, 1e-4
    q_projected, k_projected = (c * x @ projection.T.to(x.dtype) for x in (q, k))
    q_half, k_half = (c**2 * x.square().sum(-1, keepdim=True) / 2 for x in (q, k))
    q_max = q_projected.detach().amax(-1, keepdim=True)
    k_max = (
        k_projected.detach().amax((-2, -1), keepdim=True) if key_stabiliser == "head" else k_projected.detach().max()
    )
    phi_q = (q_projected - q_half - q_max).exp() + eps
    phi_k = (k_projected - k_half - k_max).exp() + eps
    weights = phi_q @ phi_k.transpose(-1, -2)
    return weights @ v / weights.sum(-1, keepdim=True)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
def test_it_equals_performer_pytorch(dtype, tolerance):
    q, k, v = draw(dtype=dtype)
    theirs = FastAttention(16)
    ours = favor_attention(q, k, v, theirs.projection_matrix)
    torch.testing.assert_close(ours, theirs(q, k, v), atol=tolerance, rtol=0)


@pytest.mark.parametrize("key_stabiliser", ["head", "batch"])
def test_value_and_gradients_equal_those_of_the_formula(key_stabiliser):
    q, k, v = draw()
    k[1] *= 3  # the cells have different maxima
    results = []
    for function in (favor_attention, formula):
        inputs = [x.clone().requires_grad_() for x in (q, k, v)]
        out = function(*inputs, PROJECTION, key_stabiliser)
        results.append([out, *torch.autograd.grad(out.sin().sum(), inputs)])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-10, rtol=1e-8)


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


def test_huge_keys_and_queries_give_finite_numbers():
    q, k, v = draw(scale=100, dtype=torch.float32)
    assert favor_attention(q, k, v, PROJECTION).isfinite().all()


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
