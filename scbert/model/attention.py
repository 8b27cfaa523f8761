"""FAVOR+ attention in time and memory linear in the number of genes: functions on tensors, and no more.

For one head, with random features P (features x dim_head) and c = dim_head^(-1/4),

    phi_q(x) = exp(c P x - c^2 |x|^2 / 2 - max over features of c P x) + eps
    phi_k(x) = the same, with the maximum over features and positions
    out_i    = phi_q(i) . sum_j phi_k(j) v_j  /  phi_q(i) . sum_j phi_k(j)

(Choromanski et al. 2021, eq. 5 and Lemma 1; scBERT Methods, "Performer encoder"). The published factor
m^(-1/2) stands in numerator and denominator alike and is left out.

How it is computed. `_Features` yields w(x) = exp(c P x - its own maximum), which lies in (0, 1] whatever the
norm of x, and the rest of each phi is one number a position, which moves from the features to what they multiply:

    phi_q(x) ~ w(x) + eps exp(c^2 |x|^2 / 2)                    (a query's scale cancels in out_i)
    phi_k(x) = w(x) exp(own maximum - c^2 |x|^2 / 2 - largest maximum) + eps

The sums over j are taken in one pass over chunks of keys, under a running maximum; the eps terms have rank one
and are added afterwards. All features together, (heads, positions, features), need never exist. Tensors are
"features first": positions are the last axis, the layout in which the multiplies run fastest. Exponents are powers
of two, since exp2 takes a third of the time of exp on a CPU.

Where only the genes that a cell expresses enter, `scbert.model.packed` computes the same in one piece; keys that are
not `present` are padding then, and enter no sum and no maximum.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

EPS = 1e-4
LOWEST = -1e30
"""Stands for the maximum over no keys: finite, so that a difference of two of them is 0 and no NaN."""
LOG2E = math.log2(math.e)
CHUNK_BYTES = {"cpu": 12 * 2**20, "cuda": 2**28}
"""Bytes of one chunk's features: what stays in the cache of a CPU (measured), what fills a GPU (not measured)."""
KEPT_CHUNKS = 2
"""Chunks whose features a layer keeps for its backward pass; of more, each is computed again instead."""


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


def _in_full_precision(function):
    """Leave autocast and widen half precision, for exponents and sums over thousands of positions."""

    @functools.wraps(function)
    def widened(*tensors, **options):
        with torch.autocast(tensors[0].device.type, enabled=False):
            half = (torch.bfloat16, torch.float16)
            return function(*(t.float() if getattr(t, "dtype", None) in half else t for t in tensors), **options)

    return widened


class _Features(torch.autograd.Function):
    """w(x) = exp(c P x - own maximum), and that maximum in powers of two; autograd would keep three copies.

    The gradient is that of exp(c P x - c^2 |x|^2 / 2 - a constant): maxima are constants, as in
    performer-pytorch, and a position's |x|^2 reaches its scale through here only.
    """

    @staticmethod
    def forward(ctx, x, projection):
        # x (batch, dim_head, positions), projection (features, dim_head)
        scaled = projection.to(x.dtype) * (x.shape[1] ** -0.25 * LOG2E)
        features = torch.bmm(scaled.expand(len(x), -1, -1), x)  # (batch, features, positions)
        top = features.amax(1, keepdim=True)  # (batch, 1, positions)
        features.sub_(top).exp2_()
        ctx.save_for_backward(x, projection, features)
        ctx.mark_non_differentiable(top)
        return features, top

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad, _):
        x, projection, features = ctx.saved_tensors
        grad = grad * features  # now of the exponent
        scaled = projection.T.to(x.dtype) * x.shape[1] ** -0.25
        grad_x = torch.bmm(scaled.expand(len(x), -1, -1), grad)  # (batch, dim_head, positions)
        return grad_x.addcmul_(x, grad.sum(1, keepdim=True), value=-(x.shape[1] ** -0.5)), None


def _half_square(x):
    """Return c^2 |x|^2 / 2 in powers of two, (batch, 1, positions), without a gradient: `_Features` has it."""
    return x.detach().square().sum(1, keepdim=True) * (x.shape[1] ** -0.5 / 2 * LOG2E)


class KeySummary(NamedTuple):
    """What attention needs to know of any number of keys; a column of ones beside v yields the normaliser."""

    context: torch.Tensor
    """sum_j (v_j, 1) exp(c P k_j - c^2 |k_j|^2 / 2 - top), (batch, dim_head + 1, features)."""
    values: torch.Tensor
    """sum_j (v_j, 1), (batch, dim_head + 1, 1)."""
    top: torch.Tensor
    """Largest c P k_j, in powers of two, (batch, 1, 1)."""


@_in_full_precision
def summarise_keys(
    k: torch.Tensor, v: torch.Tensor, projection: torch.Tensor, present: torch.Tensor | None = None
) -> KeySummary:
    """Summarise keys and values, (batch, dim_head, positions) each; batch stands for cells times heads.

    With `present`, booleans (batch, 1, positions), only the keys where it is true.
    """
    features, own_top = _Features.apply(k, projection)
    if present is not None:
        own_top, v = own_top.masked_fill(~present, LOWEST), v * present
    top = own_top.amax(2, keepdim=True)
    scale = torch.exp2(own_top - top - _half_square(k))  # (batch, 1, positions)
    count = v.new_full((len(v), 1, 1), v.shape[2])
    if present is not None:
        scale, count = scale * present, present.sum(2, keepdim=True).to(v.dtype)
    context = torch.bmm(torch.cat([v * scale, scale], 1), features.mT)
    return KeySummary(context, torch.cat([v.sum(2, keepdim=True), count], 1), top)


def merge_summaries(one: KeySummary, other: KeySummary) -> KeySummary:
    """Merge the summaries of two sets of keys, rescaled to the larger maximum (as online softmax does)."""
    top = torch.maximum(one.top, other.top)
    context = one.context * torch.exp2(one.top - top) + other.context * torch.exp2(other.top - top)
    return KeySummary(context, one.values + other.values, top)


def close_summary(keys: KeySummary, key_stabiliser: str, eps: float = EPS) -> KeySummary:
    """Apply the stabiliser and add eps: from here on, context is sum_j phi_k(j) (v_j, 1)."""
    top = keys.top.amax().expand_as(keys.top) if key_stabiliser == "batch" else keys.top
    return KeySummary(keys.context * torch.exp2(keys.top - top) + eps * keys.values, keys.values, top)


@_in_full_precision
def attend(
    q: torch.Tensor, keys: KeySummary, projection: torch.Tensor, eps: float = EPS, weight: torch.Tensor | None = None
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Return out_i of queries (batch, dim_head, positions), in their shape.

    With a `weight` of each query, (batch, 1, positions), return also sum_i weight_i phi_q(i) / normaliser_i,
    (batch, features, 1): all that `weigh_keys` has to know of the queries.
    """
    features, _ = _Features.apply(q, projection)
    # Where exp(c^2 |q|^2 / 2) is beyond 2^60, eps outweighs all features already, and more would only overflow.
    floor = eps * torch.exp2(_half_square(q).clamp(max=60))  # (batch, 1, positions)
    out = torch.baddbmm(keys.context.sum(2, keepdim=True) * floor, keys.context, features)
    normaliser = out[:, -1:]
    if weight is None:
        return out[:, :-1] / normaliser
    share = weight / normaliser
    queries = (features * share).sum(2, keepdim=True) + (floor * share).sum(2, keepdim=True)
    return out[:, :-1] / normaliser, queries


@_in_full_precision
def weigh_keys(
    k: torch.Tensor, queries: torch.Tensor, keys: KeySummary, projection: torch.Tensor, eps: float = EPS
) -> torch.Tensor:
    """Return phi_k(j) . queries, (batch, positions): the attention each key receives from all queries summed."""
    features, own_top = _Features.apply(k, projection)
    scale = torch.exp2(own_top - keys.top - _half_square(k))  # (batch, 1, positions)
    return ((features * queries).sum(1, keepdim=True) * scale + eps * queries.sum(1, keepdim=True)).squeeze(1)


def count_positions(device: torch.device, heads: int, n_features: int) -> int:
    """Return how many positions' features, of all heads, are `CHUNK_BYTES`."""
    return max(1, CHUNK_BYTES.get(device.type, CHUNK_BYTES["cuda"]) // (4 * heads * n_features))


def split_chunks(inputs: tuple[torch.Tensor, ...], heads: int, n_features: int) -> list[list[tuple]]:
    """Cut tensors (cells, positions, ...) into groups of cells, and each group into chunks of positions.

    The features of a chunk, (cells * heads, n_features, positions) in float32, take at most `CHUNK_BYTES`: it is
    some whole cells where these are short, and a stretch of one cell where they are long.
    """
    positions, fit = inputs[0].shape[1], count_positions(inputs[0].device, heads, n_features)
    group = max(1, fit // positions)
    length = math.ceil(positions / math.ceil(positions / fit))  # chunks of one length
    groups = zip(*(x.split(group) for x in inputs), strict=True)
    return [list(zip(*(x.split(length, 1) for x in part), strict=True)) for part in groups]


def read_chunks(read: Callable, groups: list[list[tuple]], key_stabiliser: str, eps: float = EPS) -> list[KeySummary]:
    """Summarise the keys of all chunks, one in memory at a time: ``read(*chunk)`` returns its `KeySummary`."""
    read = _recompute(read, groups)
    summaries = [functools.reduce(merge_summaries, (read(*chunk) for chunk in chunks)) for chunks in groups]
    sizes = [len(keys.top) for keys in summaries]
    keys = close_summary(KeySummary(*map(torch.cat, zip(*summaries, strict=True))), key_stabiliser, eps)
    return [KeySummary(*part) for part in zip(*(tensor.split(sizes) for tensor in keys), strict=True)]


def map_chunks(function: Callable, groups: list[list[tuple]], context: list) -> tuple[torch.Tensor, ...]:
    """Put together what ``function(context of its group, *chunk)`` returns: tensors (cells, positions, ...)."""
    function = _recompute(function, groups)
    done = [
        [torch.cat(parts, 1) for parts in zip(*(function(own, *chunk) for chunk in chunks), strict=True)]
        for own, chunks in zip(context, groups, strict=True)
    ]
    return tuple(torch.cat(parts) for parts in zip(*done, strict=True))


def _recompute(function, groups):
    """Where gradients are wanted and there are many chunks, let each keep its inputs only.

    A chunk is then computed again in the backward pass: a quarter more multiplies, and memory for the features of
    one chunk instead of all.
    """
    if torch.is_grad_enabled() and sum(map(len, groups)) > KEPT_CHUNKS:
        return functools.partial(checkpoint, function, use_reentrant=False, preserve_rng_state=False)
    return function


def features_first(x: torch.Tensor) -> torch.Tensor:
    """Turn (cells, positions, heads, d) into (cells * heads, d, positions)."""
    return x.permute(0, 2, 3, 1).flatten(0, 1)


def positions_first(x: torch.Tensor, heads: int) -> torch.Tensor:
    """Turn (cells * heads, d, positions) into (cells, positions, heads, d)."""
    return x.unflatten(0, (-1, heads)).permute(0, 3, 1, 2)


def attend_in_chunks(
    inputs: Sequence[torch.Tensor],
    heads: int,
    projection: torch.Tensor,
    key_stabiliser: str,
    project: Callable,
    finish: Callable,
    *,
    weight: torch.Tensor | None = None,
    eps: float = EPS,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Let all positions of a cell attend to each other, some in memory at a time: all keys are read, then each asks.

    `inputs`, tensors (cells, positions, ...), are cut into chunks alike. ``project(names, *chunk)`` returns those of "q",
    "k" and "v" that are named, (cells * heads, dim_head, positions) each; ``finish(out, *chunk)`` makes the chunk's output,
    (cells, positions, ...), of what its queries found. With the `key_stabiliser` "head" a key's
    exponent is measured from the largest of that cell and head, so no result depends on who shares the batch; with "batch",
    as published, from the largest of all.

    Returned are all outputs; and with a `weight` of the attending positions, (cells, positions), from `weigh_queries`,
    the attention that each position receives from them, (cells, heads, positions).
    """
    n, more = len(inputs), [] if weight is None else [weight]

    def to_each_head(x):  # (cells, positions) -> (cells * heads, 1, positions)
        return x.repeat_interleave(heads, 0)[:, None]

    def read(*chunk):
        return summarise_keys(*project("kv", *chunk[:n]), projection)

    def write(keys, *chunk):
        (q,) = project("q", *chunk[:n])
        if weight is None:
            return (finish(attend(q, keys, projection, eps), *chunk[:n]),)
        out, queries = attend(q, keys, projection, eps, to_each_head(chunk[-1]))
        return finish(out, *chunk[:n]), positions_first(
            queries, heads
        )  # (cells, 1, heads, features), one of each chunk

    def weigh(context, *chunk):
        (k,) = project("k", *chunk[:n])
        return (weigh_keys(k, *context, projection, eps).unflatten(0, (-1, heads)).mT,)

    groups = split_chunks((*inputs, *more), heads, len(projection))
    keys = read_chunks(read, groups, key_stabiliser, eps)
    if weight is None:
        return map_chunks(write, groups, keys)[0], None
    out, queries = map_chunks(write, groups, keys)
    return out, map_chunks(weigh, groups, pair_queries(queries, keys))[0].mT


def weigh_queries(where: torch.Tensor) -> torch.Tensor:
    """Turn the queries to average over, (cells, positions), into weights that sum to one in each cell."""
    return where / where.sum(1, keepdim=True).clamp(min=1)


def pair_queries(queries: torch.Tensor, keys: list[KeySummary]) -> list[tuple[torch.Tensor, KeySummary]]:
    """Sum each chunk's queries, (cells, chunks, heads, features), and put them beside their group's keys."""
    queries = queries.sum(1).flatten(0, 1)[..., None]  # (cells * heads, features, 1)
    return list(zip(queries.split([len(part.top) for part in keys]), keys, strict=True))


class FavorAttention(nn.Module):
    """Attention in one piece, its features a buffer in the place and under the name performer-pytorch uses."""

    def __init__(self, projection: torch.Tensor, key_stabiliser: str = "head"):
        super().__init__()
        self.register_buffer("projection_matrix", projection)
        self.key_stabiliser = key_stabiliser

    def attend(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, present: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Attend to keys that are `present`; tensors (cells * heads, dim_head, positions), see `summarise_keys`."""
        keys = close_summary(summarise_keys(k, v, self.projection_matrix, present), self.key_stabiliser)
        return attend(q, keys, self.projection_matrix)

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """Attend over all positions; tensors (cells, heads, positions, dim_head)."""
        return self.attend(*(x.mT.flatten(0, 1) for x in (q, k, v))).mT.unflatten(0, q.shape[:2]).to(q.dtype)
