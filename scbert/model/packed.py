"""Cells as the genes they express: sequences of different length, run together in groups of about one length.

Where all genes enter, `scbert.model.encoder.run_layer` computes them chunk by chunk. Expressed genes are few: here a
group of cells is one tensor, "features first" all the way, (cells, dim, positions), so that nothing has to be turned
around for the heads. Where cells of a group differ in length, `present` tells their positions from padding. Padding enters
no sum and no maximum, so each cell's result is that of its own positions alone; what it yields itself has no meaning.
"""

import math

import torch
from torch import nn
from torch.nn import functional as F

from .attention import EPS, LOWEST, compute_features, half_square, in_full_precision, pull_features


def group_cells(lengths: torch.Tensor, overhead: float, multiple: int = 1) -> list[tuple[torch.Tensor, torch.Tensor | None]]:
    """Group cells of about one length, to run together with little padding.

    Parameters
    ----------
    lengths
        (cells,), how many positions each has, at least one; these lie one cell after the other.
    overhead
        How many padded positions one more group is worth.
    multiple
        Positions of a group are a multiple of this.

    Returns
    -------
    For each group which positions are its cells', (cells, longest), and which of these are no padding, None if all.
    """
    device, groups, padded = lengths.device, [[]], 0
    starts = lengths.cumsum(0) - lengths
    lengths, order = lengths.cpu().sort(stable=True)
    longest = int(lengths[0])
    for cell, length in enumerate(lengths.tolist()):
        padded += (length - longest) * len(groups[-1])
        if padded > overhead:
            groups.append([])
            padded = 0
        groups[-1].append(cell)
        longest = length
    return [_lay_out(starts[order[cells].to(device)], lengths[cells].to(device), multiple) for cells in groups]


def _lay_out(starts, lengths, multiple):
    """Return the positions of cells as a rectangle, see `group_cells`; padding repeats the cell's first position."""
    steps = torch.arange(math.ceil(int(lengths[-1]) / multiple) * multiple, device=starts.device)
    if lengths[0] == len(steps):
        return starts[:, None] + steps, None
    present = steps < lengths[:, None]
    return starts[:, None] + steps * present, present


def run_packed(
    layers: nn.ModuleList, x: torch.Tensor, present: torch.Tensor | None, attention: str, key_stabiliser: str
) -> torch.Tensor:
    """Run encoder layers on a group of cells, (cells, positions, dim), and return such; `present` (cells, positions).

    What is computed is what `scbert.model.encoder.run_layer` does of each cell alone, or with exact softmax attention.
    """
    x = x.mT.contiguous()  # (cells, dim, positions)
    for (attention_norm, attend), (feed_norm, feed) in ((((part.norm, part.fn) for part in layer)) for layer in layers):
        normed, heads = _norm(attention_norm, x), attend.heads
        q, k, v = (
            _linear(to, normed).view(len(x) * heads, -1, x.shape[2]) for to in (attend.to_q, attend.to_k, attend.to_v)
        )  # (cells * heads, dim_head, positions)
        if attention == "softmax":
            out = attend_softmax(q, k, v, heads, present)
        else:
            mask = None if present is None else present.repeat_interleave(heads, 0)[:, None]
            out = attend_favor(q, k, v, attend.fast_attention.projection_matrix, key_stabiliser, mask)
        x = x + _linear(attend.to_out, out.reshape(len(x), -1, x.shape[2]))
        x = x + _linear(feed.fn.w2, F.gelu(_linear(feed.fn.w1, _norm(feed_norm, x))))
    return x.mT


def _linear(layer, x):
    weight = layer.weight.expand(len(x), -1, -1)
    return torch.bmm(weight, x) if layer.bias is None else torch.baddbmm(layer.bias[:, None], weight, x)


def _norm(layer, x):
    x = x - x.mean(1, keepdim=True)
    x = x * (x.square().mean(1, keepdim=True) + layer.eps).rsqrt()
    return torch.addcmul(layer.bias[:, None], x, layer.weight[:, None])


def attend_softmax(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, heads: int, present: torch.Tensor | None = None
) -> torch.Tensor:
    """Attend exactly, by torch's fused kernel: (cells * heads, dim_head, positions) each; `present` (cells, positions)."""
    q, k, v = (x.unflatten(0, (-1, heads)).mT.contiguous() for x in (q, k, v))
    mask = None if present is None else present[:, None, None]
    return F.scaled_dot_product_attention(q, k, v, mask).mT.flatten(0, 1)


def run_softmax_layer(
    layer: nn.ModuleList, x: torch.Tensor, weight: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Run one layer as `scbert.model.encoder.run_layer` does with a `weight`, with exact attention: its matrix is held."""
    attend, normed = layer[0].fn, layer[0].norm(x)
    q, k = (to(normed).unflatten(2, (attend.heads, -1)).transpose(1, 2) for to in (attend.to_q, attend.to_k))
    matrix = torch.softmax(q @ k.mT * q.shape[3] ** -0.5, 3)  # (cells, heads, positions, positions)
    received = torch.einsum("cq,chqk->chk", weight.to(matrix.dtype), matrix)
    return run_packed([layer], x, None, "softmax", "head"), received


@in_full_precision
def attend_favor(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    projection: torch.Tensor,
    key_stabiliser: str = "head",
    present: torch.Tensor | None = None,
    eps: float = EPS,
) -> torch.Tensor:
    """Return `scbert.attention.favor_attention` of (cells * heads, dim_head, positions), in one piece, in such a tensor.

    `present` are booleans (cells * heads, 1, positions). `projection`, (features, dim_head), has no gradient.
    """
    return _Favor.apply(q, k, v, projection, key_stabiliser, present, eps)


class _Favor(torch.autograd.Function):
    """The formula of `scbert.attention`, with gradients written out: autograd would pass over the features thrice as often.

    Let n be sum_j phi_k(j) (v_j, 1) . phi_q(i), numerator and normaliser of out_i. Since out is their quotient, the
    gradient of n is at right angles to n; hence what the exponents' gradients of a query sum to comes from eps alone.
    """

    @staticmethod
    def forward(ctx, q, k, v, projection, key_stabiliser, present, eps):
        offers, top = compute_features(k, projection)
        count = v.new_full((len(v), 1, 1), v.shape[2])
        if present is not None:
            top, v, count = top.masked_fill(~present, LOWEST), v * present, present.sum(2, keepdim=True).to(v.dtype)
        largest = top.amax() if key_stabiliser == "batch" else top.amax(2, keepdim=True)
        scale = torch.exp2(top - largest - half_square(k))  # (batch, 1, positions), 0 for padding
        values = torch.cat([v * scale, scale], 1)  # (batch, dim_head + 1, positions)
        context = torch.bmm(offers, values.mT).mT + eps * torch.cat([v.sum(2, keepdim=True), count], 1)
        offers = offers if any(ctx.needs_input_grad) else None  # else their memory is that of the next features
        asks = compute_features(q, projection)[0]
        floor = eps * torch.exp2(half_square(q).clamp(max=60))  # (batch, 1, positions), see `scbert.attention.attend`
        out = torch.bmm(context, asks.add_(floor))
        out, normaliser = out[:, :-1] / out[:, -1:], out[:, -1:]
        if offers is not None:
            ctx.save_for_backward(
                q, k, projection, asks, offers, floor, scale, values, context, out, normaliser, present
            )
            ctx.eps = eps
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        q, k, projection, asks, offers, floor, scale, values, context, out, normaliser, present = ctx.saved_tensors
        grad = grad / normaliser
        grad = torch.cat([grad, -(grad * out).sum(1, keepdim=True)], 1)  # (batch, dim_head + 1, positions), of n
        grad_context = torch.bmm(asks, grad.mT).mT  # (batch, dim_head + 1, features)
        exponents = torch.bmm(context.mT, grad).mul_(asks - floor)
        total = -floor * (grad * context.sum(2, keepdim=True)).sum(1, keepdim=True)
        grad_q = pull_features(q, projection, exponents, total)
        grad_values = torch.bmm(grad_context, offers)  # (batch, dim_head + 1, positions)
        exponents = torch.bmm(grad_context.mT, values).mul_(offers)
        grad_k = pull_features(k, projection, exponents, (grad_values * values).sum(1, keepdim=True))
        grad_v = ctx.eps * grad_context[:, :-1].sum(2, keepdim=True) + grad_values[:, :-1] * scale
        return grad_q, grad_k, grad_v if present is None else grad_v * present, None, None, None, None
