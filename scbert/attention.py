"""FAVOR+ attention, linear in the number of genes: pure functions on tensors.

For one head, with random features P (features x dim_head) and c = dim_head^(-1/4),

    phi_q(x) = exp(c P x - c^2 |x|^2 / 2 - max over features of c P x) + eps
    phi_k(x) = the same, with the maximum over features and positions
    out_i    = phi_q(i) . sum_j phi_k(j) v_j  /  phi_q(i) . sum_j phi_k(j)

(Choromanski et al. 2021, eq. 5 and Lemma 1; scBERT Methods, "Performer encoder"). The published factor
m^(-1/2) stands in numerator and denominator alike and is left out.
"""

import math

import torch
from torch import nn
from torch.nn import functional as F

EPS = 1e-4


def draw_projection(n_features: int, dim_head: int, generator: torch.Generator | None = None) -> torch.Tensor:
    """Draw orthogonal random features whose rows have the norms of Gaussian vectors.

    Parameters
    ----------
    n_features, dim_head
        Shape of the result.
    generator
        A CPU generator, torch's global one if None.

    Returns
    -------
    (n_features, dim_head), float32, on the CPU.

    Paper: Choromanski et al. 2021, section 2.4 (orthogonal random features).
    """
    blocks = []
    for _ in range(math.ceil(n_features / dim_head)):
        gaussian = torch.randn(dim_head, dim_head, generator=generator)
        blocks.append(torch.linalg.qr(gaussian).Q.T)
    directions = torch.cat(blocks)[:n_features]  # (features, dim_head), unit rows
    norms = torch.randn(n_features, dim_head, generator=generator).norm(dim=1, keepdim=True)
    return directions * norms


def _exponents(x, projection):
    """Return c P x - c^2 |x|^2 / 2, (..., positions, features), and its second term, (..., positions, 1)."""
    x = x * x.shape[-1] ** -0.25
    half_square = x.square().sum(-1, keepdim=True) / 2
    # With -|x|^2/2 as a further column of x, and a column of ones beside P, one multiply yields the exponent.
    exponents = torch.cat([x, -half_square], -1) @ F.pad(projection, (0, 1), value=1.0).T.to(x.dtype)
    return exponents, half_square


def _key_maximum(exponents, half_square, key_stabiliser):
    """Return max of c P k: per cell and head, or over the whole batch tensor as published."""
    per_position = exponents.detach().amax(-1, keepdim=True) + half_square.detach()
    return per_position.amax(-2, keepdim=True) if key_stabiliser == "head" else per_position.amax()


def favor_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, projection: torch.Tensor, key_stabiliser: str = "head"
) -> torch.Tensor:
    """Approximate softmax attention by random features, in time linear in the positions.

    Parameters
    ----------
    q, k, v
        (cells, heads, positions, dim_head).
    projection
        (features, dim_head), see `draw_projection`.
    key_stabiliser
        ``"head"``: the largest key exponent of that cell and head is subtracted, so a cell's result does not
        depend on who shares its batch. ``"batch"``: the largest of the whole batch.

    Returns
    -------
    (cells, heads, positions, dim_head).

    Differs from the published code: "head" is the default, where the script takes one maximum over the batch
    tensor, which together with eps makes a cell's output depend on its neighbours in the batch.
    """
    exponents, half_square = _exponents(q, projection)
    q_max = exponents.detach().amax(-1, keepdim=True) + half_square.detach()
    exp_q = exponents.sub_(q_max).exp_()  # (cells, heads, positions, features)
    exponents, half_square = _exponents(k, projection)
    exp_k = exponents.sub_(_key_maximum(exponents, half_square, key_stabiliser)).exp_()
    # A column of ones beside v carries the normaliser through the same two multiplies; phi = exp + eps, and
    # the eps term is added in closed form.
    v = F.pad(v, (0, 1), value=1.0)  # (cells, heads, positions, dim_head + 1)
    context = exp_k.transpose(-1, -2) @ v + EPS * v.sum(-2, keepdim=True)  # (cells, heads, features, dim_head + 1)
    out = exp_q @ context + EPS * context.sum(-2, keepdim=True)  # (cells, heads, positions, dim_head + 1)
    return out[..., :-1] / out[..., -1:]


class FavorAttention(nn.Module):
    """`favor_attention` with its features as a buffer, in the place and under the name performer-pytorch uses."""

    def __init__(self, projection: torch.Tensor, key_stabiliser: str = "head"):
        super().__init__()
        self.register_buffer("projection_matrix", projection)
        self.key_stabiliser = key_stabiliser

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """Attend over all positions, see `favor_attention`."""
        return favor_attention(q, k, v, self.projection_matrix, self.key_stabiliser)
