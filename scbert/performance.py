"""What a model costs: multiplies counted from its shape, and seconds and bytes measured beside the alternatives."""

import multiprocessing
import re
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from performer_pytorch import FastAttention
from torch import nn

from .model import ScBert, ScBertConfig
from .record import measure_peak_memory_mb

ATTENTIONS = ("scbert", "performer_pytorch", "softmax", "fused_softmax")
"""Ours; performer-pytorch's own; softmax written out, a tokens x tokens matrix a head; and torch's fused softmax."""


def count_multiplies(config: ScBertConfig, tokens: int, recompute: bool = True) -> pd.DataFrame:
    """Count the floating-point operations of one cell's matrix multiplies, and the bytes that go in and out of them.

    Parameters
    ----------
    config, tokens
        The shape, and the length of the sequence.
    recompute
        Whether the backward pass computes chunks again, as it does from `scbert.attention.KEPT_CHUNKS` on.

    Returns
    -------
    One row a part of the encoder, all layers together: GFLOP of a `forward` pass and of a `training` step, and MB
    in and out of the part (`moved_mb`, float32, each number once).

    Paper: not in it; Choromanski et al. 2021, section 2 (linear in the tokens).
    """
    width, features, dim = config.heads * config.dim_head, config.heads * config.n_features, config.dim
    values = features * config.dim_head  # a position's features times a head's vectors, over heads
    # Of each part: multiplies a token, numbers read and written a token, and what the backward pass adds, in forward
    # passes: 2, or 1 for the random features, which are no weights; and the share that it computes again, if it does.
    parts = {
        "queries, keys, values": (3 * dim * width, dim + 3 * width, 2, 1),
        "random features": (2 * values, 2 * width + 2 * features, 1, 1),
        "sum over keys": (values + features, features + width, 2, 0),
        "attend": (values + features, features + width, 2, 1),
        "output projection": (width * dim, width + dim, 2, 1),
        "feed-forward": (8 * dim * dim, 10 * dim, 2, 0.5),
    }
    rows = [
        {
            "part": part,
            "forward": 2e-9 * config.depth * tokens * multiplies,
            "training": 2e-9 * config.depth * tokens * multiplies * (1 + backward + (again if recompute else 0)),
            "moved_mb": 4e-6 * config.depth * tokens * numbers,
        }
        for part, (multiplies, numbers, backward, again) in parts.items()
    ]
    return pd.DataFrame(rows).set_index("part")


def make_multiply(size: int = 2048, dtype: str = "float32", device: str = "cpu") -> tuple[Callable, float]:
    """Return a function that multiplies two square matrices, the yardstick of a machine, and its GFLOP."""
    a = torch.randn(size, size, device=device).to(getattr(torch, dtype))
    return lambda: a @ a, 2e-9 * size**3


class _Softmax(nn.Module):
    """Attention without random features, for comparison."""

    def __init__(self, fused):
        super().__init__()
        self.fused = fused

    def forward(self, q, k, v):
        if self.fused:
            return nn.functional.scaled_dot_product_attention(q, k, v)
        return torch.softmax(q @ k.mT * q.shape[-1] ** -0.5, -1) @ v  # (cells, heads, tokens, tokens) in between


def make_step(model: ScBert, attention: str, step: str, bins: torch.Tensor, dtype: str = "float32") -> Callable:
    """Return a function without arguments that runs one forward pass, or one training step, of the encoder.

    Parameters
    ----------
    model
        Whose weights to use; all alternatives share them.
    attention
        One of `ATTENTIONS`. All but ours run performer-pytorch's unmodified `Performer` layers.
    step
        ``"forward"``, which returns the encodings, or ``"training"``, which returns the gradient of each weight.
    bins
        (cells, tokens).
    dtype
        ``"float32"``, or ``"bfloat16"`` for autocast.
    """
    if attention not in ATTENTIONS or step not in ("forward", "training"):
        raise ValueError(
            f"attention must be one of {ATTENTIONS} and step 'forward' or 'training': {attention}, {step}."
        )

    def encode():
        if attention == "scbert":
            return model.encode(bins)
        ours = [layer[0].fn.fast_attention for layer in model.performer.net.layers]
        for layer, own in zip(model.performer.net.layers, ours, strict=True):
            layer[0].fn.fast_attention = _replace_attention(own, attention)
        try:
            return model.norm(model.performer(model.embed(bins)))
        finally:
            for layer, own in zip(model.performer.net.layers, ours, strict=True):
                layer[0].fn.fast_attention = own

    def run():
        with torch.autocast(bins.device.type, torch.bfloat16, enabled=dtype == "bfloat16"):
            if step == "forward":
                with torch.no_grad():
                    return encode()
            loss = model.to_out(encode()).float().logsumexp(-1).mean()
        weights = [*model.performer.parameters(), model.token_emb.weight]
        return torch.autograd.grad(loss, weights)

    return run


def _replace_attention(own, attention):
    if attention != "performer_pytorch":
        return _Softmax(attention == "fused_softmax")
    features, dim_head = own.projection_matrix.shape
    theirs = FastAttention(dim_head, features)
    theirs.projection_matrix = own.projection_matrix
    return theirs


def compare(runs: dict[str, Callable], n_pairs: int = 5, device: str = "cpu") -> pd.DataFrame:
    """Time functions in turn, `n_pairs` times each after one run to warm up, in one process.

    Returns
    -------
    Seconds, one row a turn and one column a function.
    """
    for run in runs.values():
        run()
    return pd.DataFrame([{name: _time(run, device) for name, run in runs.items()} for _ in range(n_pairs)])


def measure(
    config: dict,
    tokens: int,
    attention: str = "scbert",
    step: str = "forward",
    cells: int = 1,
    dtype: str = "float32",
    threads: int | None = None,
    repeats: int = 3,
    device: str = "cpu",
) -> dict:
    """Measure one case in this process: seconds (median), peak memory, matrix-multiply rate.

    Returns
    -------
    The arguments, and `seconds`, `peak_mb` (above what the process and the weights took before), `gflop_per_s` of a
    square multiply in `dtype`, and the `share` of it that the multiplies of the step reach, none of them counted
    twice (the softmax attentions have no share: their multiplies are others).
    """
    if threads:
        torch.set_num_threads(threads)
    config = ScBertConfig(n_genes=tokens - 1, **config)
    model = ScBert(config).to(device).eval()
    bins = torch.from_numpy(np.random.default_rng(0).poisson(0.2, (cells, tokens)).clip(max=config.n_bins)).to(device)
    run = make_step(model, attention, step, bins, dtype)
    peak = measure_peak(run, device)
    multiply, multiply_gflop = make_multiply(dtype=dtype, device=device)
    times = compare({"step": run, "multiply": multiply}, repeats, device).median()
    seconds, rate = times["step"], multiply_gflop / times["multiply"]
    gflop = cells * count_multiplies(config, tokens, recompute=False)[step].sum()
    result = {"tokens": tokens, "attention": attention, "step": step, "cells": cells, "dtype": dtype}
    result |= {"threads": torch.get_num_threads(), "device": device, "seconds": seconds, "peak_mb": peak}
    share = gflop / seconds / rate if attention in ATTENTIONS[:2] else None
    return result | {"gflop_per_s": rate, "share": share}


def measure_afresh(cases: Sequence[dict]) -> pd.DataFrame:
    """Measure each case, the keyword arguments of `measure`, in a process of its own; one row a case.

    A case that fails, for want of memory say, has empty measurements, and the reason in `error`.
    """
    # A server that has imported this module, and never computed, forks a process for each case.
    method = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
    context = multiprocessing.get_context(method)
    if method == "forkserver":
        context.set_forkserver_preload([__name__])
    rows = []
    for case in cases:
        with ProcessPoolExecutor(1, mp_context=context) as pool:
            try:
                rows.append(pool.submit(measure, **case).result())
            except Exception as error:  # a process killed for its memory, or any error of the case itself
                about = {key: value for key, value in case.items() if key != "config"}
                rows.append({**about, "error": f"{type(error).__name__}: {error}"})
    return pd.DataFrame(rows)


def fit_exponent(sizes: Sequence[float], costs: Sequence[float]) -> float:
    """Return the slope of log cost against log size: 1 for a linear cost, 2 for a quadratic one."""
    return float(np.polyfit(np.log(np.asarray(sizes, float)), np.log(np.asarray(costs, float)), 1)[0])


def fit_exponents(sweep: pd.DataFrame) -> pd.DataFrame:
    """Fit the exponents of seconds and memory in the tokens, where an attention was measured at three lengths or more.

    Returns
    -------
    Columns `seconds` and `peak_mb`; one row a step and attention.
    """
    rows = {
        key: {cost: fit_exponent(part["tokens"], part[cost]) for cost in ("seconds", "peak_mb")}
        for key, part in sweep.groupby(["step", "attention"], sort=False)
        if len(part) > 2
    }
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis(["step", "attention"])


def _time(run, device):
    _synchronize(device)
    start = time.perf_counter()
    run()
    _synchronize(device)
    return time.perf_counter() - start


def _synchronize(device):
    if device != "cpu":
        torch.cuda.synchronize()


def measure_peak(run: Callable, device: str = "cpu") -> float:
    """Return the MB that `run` takes at most, above what is taken before."""
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    status = Path("/proc/self/status")
    if not status.exists():  # no Linux: the peak of the process so far is all that can be had
        before = measure_peak_memory_mb()
        run()
        return measure_peak_memory_mb() - before
    Path("/proc/self/clear_refs").write_text("5")  # sets the high-water mark back to what is taken now
    before = _read_status(status, "VmRSS")
    run()
    return _read_status(status, "VmHWM") - before


def _read_status(status, name):
    return int(re.search(rf"{name}:\s+(\d+) kB", status.read_text())[1]) / 2**10
