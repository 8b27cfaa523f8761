"""Cells as the genes they express: sequences of different length, run together in groups of about one length.

Where all genes enter, `scbert.model.encoder.run_layer` computes them chunk by chunk. Expressed genes are few: here a group
of cells is one tensor, "features first" all the way, (cells, dim, positions), so that nothing is turned around for the heads.
Where cells of a group differ in length, `present` tells their positions from padding. Padding enters no sum and no maximum,
so each cell's result is that of its own positions alone; what it yields itself has no meaning.
"""

import contextlib
import math
from collections.abc import Iterable, Iterator

import torch
from torch import nn
from torch.nn import functional as F

from .attention import count_positions
from .config import ScBertConfig

OVERHEAD = 4_000
"""What one more group of cells costs, in padded positions of one dimension (measured on a CPU)."""
MULTIPLE = 16
"""Positions of a group are a multiple of this: the multiplies of FAVOR+ run up to three times faster (measured on a CPU)."""


@contextlib.contextmanager
def few_threads(config: ScBertConfig) -> Iterator[None]:
    """Leave the processor one thread where groups are small: below 200 dimensions a second makes them slower (measured)."""
    before = torch.get_num_threads()
    torch.set_num_threads(1 if config.expressed_only and config.dim < 200 else before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def group_cells(lengths: torch.Tensor, config: ScBertConfig) -> list[tuple[torch.Tensor, torch.Tensor | None]]:
    """Group cells of about one length, to run together with little padding.

    `lengths`, (cells,), are how many positions each has, at least one; these lie one cell after the other. A group ends
    where its padding costs more than one more group, or its features fill a chunk; with ``key_stabiliser="batch"`` never.

    Returned is for each group which positions are its cells', (cells, longest), and which of these are no padding, None if all.
    """
    overhead, most = OVERHEAD / config.dim, count_positions(lengths.device, config.heads, config.n_features)
    if config.key_stabiliser == "batch":
        overhead = most = math.inf
    multiple = 1 if config.attention == "softmax" else MULTIPLE
    device, groups, padded = lengths.device, [[]], 0
    starts = lengths.cumsum(0) - lengths
    lengths, order = lengths.cpu().sort(stable=True)
    longest = int(lengths[0])
    for cell, length in enumerate(lengths.tolist()):
        padded += (length - longest) * len(groups[-1])
        if padded > overhead or groups[0] and (len(groups[-1]) + 1) * length > most:
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
    layers: Iterable[nn.ModuleList], x: torch.Tensor, present: torch.Tensor | None, attention: str = "favor"
) -> torch.Tensor:
    """Run encoder layers on a group of cells, (cells, positions, dim), and return such; `present` (cells, positions).

    What is computed is what `scbert.model.encoder.run_layer` does of each cell alone, or with exact softmax attention.
    """
    x = x.mT.contiguous()  # (cells, dim, positions)
    for first, second in layers:
        mix, feed, normed = first.fn, second.fn.fn, _norm(first.norm, x)
        # (cells * heads, dim_head, positions) each
        q, k, v = (
            _linear(to, normed).view(len(x) * mix.heads, -1, x.shape[2]) for to in (mix.to_q, mix.to_k, mix.to_v)
        )
        if attention == "softmax":
            out = attend_softmax(q, k, v, mix.heads, present)
        else:
            mask = None if present is None else present.repeat_interleave(mix.heads, 0)[:, None]
            out = mix.fast_attention.attend(q, k, v, mask)
        x = x + _linear(mix.to_out, out.reshape(len(x), -1, x.shape[2]))
        x = x + _linear(feed.w2, F.gelu(_linear(feed.w1, _norm(second.norm, x))))
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


def run_softmax_layer(layer: nn.ModuleList, x: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Run one layer as `scbert.model.encoder.run_layer` does with a `weight`, with exact attention: its matrix is held."""
    attend, normed = layer[0].fn, layer[0].norm(x)
    q, k = (to(normed).unflatten(2, (attend.heads, -1)).transpose(1, 2) for to in (attend.to_q, attend.to_k))
    matrix = torch.softmax(q @ k.mT * q.shape[3] ** -0.5, 3)  # (cells, heads, positions, positions)
    received = torch.einsum("cq,chqk->chk", weight.to(matrix.dtype), matrix)
    return run_packed([layer], x, None, "softmax"), received
