"""What a model costs: multiplies counted, seconds and bytes measured, and from both an estimate for GPUs."""

import copy
import itertools
import math
import multiprocessing
import re
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from performer_pytorch import FastAttention
from torch import nn

from ..model.attention import KEPT_CHUNKS, split_chunks
from ..model.config import ScBertConfig
from ..model.encoder import ScBert
from ..paths import measure_peak_memory_mb

ATTENTIONS = ("scbert", "performer_pytorch", "softmax", "fused_softmax")
"""Ours; performer-pytorch's own; softmax written out, a tokens x tokens matrix a head; and torch's fused softmax."""

BATCH_SIZE = 3  # cells a forward pass of pretraining, those of the script
LINK_BANDWIDTH = 10e9  # bytes/s between neighbours of a ring; 100 Gb/s may give that
LATENCY = 20e-6  # seconds a message


def count_multiplies(config: ScBertConfig, tokens: int, recompute: bool = True) -> pd.DataFrame:
    """Count the floating-point operations of one cell's matrix multiplies, and the bytes that go in and out of them.

    `tokens` is the length of the sequence, `recompute` whether the backward pass computes chunks again (`KEPT_CHUNKS`).

    One row a part of the encoder, all layers together: GFLOP of a `forward` pass and of a `training` step, and MB in
    and out of the part (`moved_mb`, float32, each number once).

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


def count_parameters(config: ScBertConfig) -> tuple[int, int]:
    """Count the encoder's parameters with its masked-expression head: all, and those that pretraining changes."""
    width, dim, bins = config.heads * config.dim_head, config.dim, config.n_bins + 2
    layer = 4 * dim * width + dim + 8 * dim * dim + 5 * dim + 4 * dim  # attention, feed-forward, two norms
    learned = config.depth * layer + 2 * bins * dim + bins + 2 * dim  # tokens in and out, and the last norm
    genes = 0 if config.gene_embedding == "none" else (config.n_genes + 1) * dim
    return learned + genes, learned + (genes if config.gene_embedding == "learned" else 0)


def estimate_memory(config: ScBertConfig, tokens: int, cells: int) -> float:
    """Estimate the GB (10^9 bytes) of a GPU that a training step on `cells` cells takes, in float32.

    Weights, gradients, Adam's two moments, and what the backward pass needs: of up to `scbert.attention.KEPT_CHUNKS`
    chunks what autograd saves in all layers; of more, each layer's input and one chunk, computed again. In both cases
    two tensors of a chunk's features on top, for their gradients. Without weights and moments, torch allocated 63 to
    95 % of this on a CPU; what CUDA itself takes, and what an allocator leaves unused, is not in it.
    """
    groups = split_chunks((torch.empty(cells, tokens, 0, device="meta"),), config.heads, config.n_features)
    chunk = groups[0][0][0].shape[:2].numel()  # positions of one chunk, over cells
    width, features, dim = config.heads * config.dim_head, config.heads * config.n_features, config.dim
    kept = 2 * features + 5 * width + 13 * dim  # numbers that autograd saves of a position in a layer
    if sum(map(len, groups)) > KEPT_CHUNKS:
        activations = (config.depth + 1) * cells * tokens * dim + chunk * kept
    else:
        activations = config.depth * cells * tokens * kept
    weights, trainable = count_parameters(config)
    return 4e-9 * (weights + 3 * trainable + activations + 2 * chunk * features)


def estimate_pretraining(
    config: ScBertConfig,
    n_cells: int,
    devices: Sequence[int] = (1, 8, 64),
    *,
    n_epochs: int,
    cards: Mapping[str, tuple[float, float]],
    shares: Mapping[str, float],
    tokens: Sequence[int] | None = None,
    cells_per_step: int = 180,
) -> pd.DataFrame:
    """Estimate how long pretraining would take on GPUs, from multiplies counted and a share of the peak assumed.

    What is no matrix multiply (reading, masking, validation) costs nothing here but through `shares`.

    Parameters
    ----------
    n_epochs
        Neither the paper nor the script's maximum of 100 says how many were run.
    devices
        Numbers of GPUs, alike, that share the cells of each optimiser step.
    cards
        Name -> peak multiply rate (FLOP/s) and memory bandwidth (bytes/s) of one GPU, from its data sheet. Each part
        of the encoder takes the longer of its multiplies and its transfers.
    shares
        Scenario -> share of those peaks that training reaches, as `measure` defines it.
    tokens
        Lengths of the sequence: genes + 1 if None, about 900 where only expressed genes enter the encoder.
    cells_per_step
        Cells of an optimiser step on all GPUs together. The GPU with most cells sets the pace: 180 cells on 64 GPUs
        take as long as 192. A forward pass has 3 at most.

    Returns
    -------
    Indexed by tokens, card, scenario and devices: `share`; `gflop`, and `gflop_recomputed` where chunks are computed
    again, of a cell's training step; seconds an epoch of computing (`compute_s`) and of summing gradients in a ring
    (`synchronise_s`, 2 (W - 1) messages a step); `hours_per_epoch`; of all epochs `days` and `gpu_hours`; `efficiency`,
    one GPU's time / (W x that of W); `memory_gb` of a GPU; the assumptions; `basis`, always "estimate".

    A ValueError for a number that cannot be, a share outside (0, 1], or fewer cells in a step than devices.

    Paper: not in it; it has no timings.
    """
    tokens = [config.n_genes + 1] if tokens is None else list(tokens)
    sizes = {"depth": config.depth, "n_cells": n_cells, "n_epochs": n_epochs}
    sizes |= {"the fewest tokens": min(tokens, default=0), "the fewest devices": min(devices, default=0)}
    sizes["the lowest peak"] = min((min(peaks) for peaks in cards.values()), default=0)
    for name, value in sizes.items():
        if not value > 0:
            raise ValueError(f"{name} must be more than 0 for an estimate, not {value}.")
    if not shares:
        raise ValueError("shares must name at least one scenario, such as {'low': 0.05}.")
    for scenario, share in shares.items():
        if not 0 < share <= 1:
            raise ValueError(f"shares must lie in (0, 1], but that of {scenario!r} is {share}.")
    if cells_per_step < max(devices):
        raise ValueError(
            f"cells_per_step ({cells_per_step}) is less than {max(devices)} devices, and some would have nothing to "
            "do: raise it, or take fewer devices."
        )
    gradients = 4 * count_parameters(config)[1]  # bytes
    rows = {}
    for length, (card, (flops_per_second, bytes_per_second)) in itertools.product(tokens, cards.items()):
        once, again = (count_multiplies(config, length, recompute=recompute) for recompute in (False, True))
        computing = once["training"] * 1e9 / flops_per_second
        moving = once["moved_mb"] * 1e6 / bytes_per_second * once["training"] / once["forward"]
        at_peak = float(np.maximum(computing, moving).sum())  # seconds a cell
        for (scenario, share), n_devices in itertools.product(shares.items(), devices):
            alone = n_cells * at_peak / share  # seconds an epoch on one device
            own = math.ceil(cells_per_step / n_devices)  # cells of a step on the device that has most
            compute = alone * own / cells_per_step
            message = gradients / n_devices / LINK_BANDWIDTH + LATENCY
            synchronise = n_cells / cells_per_step * 2 * (n_devices - 1) * message
            seconds = compute + synchronise
            rows[length, card, scenario, n_devices] = {
                "share": share,
                "gflop": once["training"].sum(),
                "gflop_recomputed": again["training"].sum(),
                "compute_s": compute,
                "synchronise_s": synchronise,
                "hours_per_epoch": seconds / 3600,
                "days": n_epochs * seconds / 86400,
                "gpu_hours": n_epochs * n_devices * seconds / 3600,
                "efficiency": alone / (n_devices * seconds),
                "memory_gb": estimate_memory(config, length, min(BATCH_SIZE, own)),
            }
    index = pd.MultiIndex.from_tuples(rows, names=["tokens", "card", "scenario", "devices"])
    table = pd.DataFrame(list(rows.values()), index)
    return table.assign(n_cells=n_cells, n_epochs=n_epochs, cells_per_step=cells_per_step, basis="estimate")


def estimate_days(config: ScBertConfig, claims: Mapping[str, tuple[int, int, Mapping]], **options) -> pd.DataFrame:
    """Estimate the days of trainings that others reported, to hold their timings against.

    `claims` is name -> cells, number of GPUs, and options of `estimate_pretraining` that are this training's own;
    further `options` are of all. One row a claim and one column a scenario of `shares`: days, an estimate each.
    """
    rows = {}
    for claim, (n_cells, n_devices, own) in claims.items():
        estimate = estimate_pretraining(config, n_cells, [n_devices], **(options | dict(own)))
        rows[claim] = estimate["days"].groupby("scenario", sort=False).first()
    return pd.DataFrame(rows).T.rename_axis(columns="ESTIMATE, days")


def estimate_hours(
    annotating: float, training: float, n_cells: Sequence[int] = (10_000, 100_000, 1_000_000)
) -> pd.DataFrame:
    """Estimate hours of annotating and of fine-tuning from the seconds of one cell's forward pass and training step.

    One column a number of cells; rows: annotate; an epoch of all layers; and one of the fifth layer alone, which takes
    a third of the training from the second epoch on, since the layers below it run once and are kept.
    """
    seconds = {"annotate": annotating, "an epoch, all layers": training, "an epoch, fifth layer": training / 3}
    return pd.DataFrame({f"{n:,} cells": pd.Series(seconds) * n / 3600 for n in n_cells})


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

    `attention` is one of `ATTENTIONS`, which share the weights of `model`; all but ours run performer-pytorch's unmodified
    `Performer` layers. `step` is ``"forward"``, which returns the encodings, or ``"training"``, which returns the gradient
    of each weight; `bins` are (cells, tokens), and `dtype` ``"float32"``, or ``"bfloat16"`` for autocast.
    """
    if attention not in ATTENTIONS or step not in ("forward", "training"):
        raise ValueError(f"attention must be one of {ATTENTIONS}, step 'forward' or 'training': {attention}, {step}.")

    if attention != "scbert":
        model = copy.deepcopy(model, {id(weight): weight for weight in model.parameters()})  # of the same weights
        for block, _ in model.performer.net.layers:
            block.fn.fast_attention = _replace_attention(block.fn.fast_attention, attention)

    def encode():
        return model.encode(bins) if attention == "scbert" else model.norm(model.performer(model.embed(bins)))

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


def measure_differences(model: ScBert, bins: torch.Tensor) -> dict[str, float]:
    """Measure how far what is fast here lies from what it stands for: each the largest difference of any number.

    `bins`, (cells, tokens), are of few cells.

    - `encodings`, to performer-pytorch's own attention with the same weights;
    - `gradients` of all weights, likewise, relative to the largest of them;
    - `batch`, of the first cell alone to the same cell beside copies of all.
    """
    apart = {}
    for name, step in {"encodings": "forward", "gradients": "training"}.items():
        ours, theirs = (
            torch.cat([part.flatten() for part in make_step(model, attention, step, bins)()])
            for attention in ATTENTIONS[:2]
        )
        apart[name] = float((ours - theirs).abs().max() / (1 if step == "forward" else theirs.abs().max()))

    with torch.no_grad():
        alone, beside = model.encode(bins[:1]), model.encode(bins.repeat(3, 1))[:1]
    apart["batch"] = float((beside - alone).abs().max())
    return apart


def compare(runs: dict[str, Callable], n_pairs: int = 5, device: str = "cpu") -> pd.DataFrame:
    """Time functions in turn, `n_pairs` times each after one run to warm up, in one process.

    Returns seconds, one row a turn and one column a function.
    """
    for run in runs.values():
        run()
    return pd.DataFrame([{name: _time(run, device) for name, run in runs.items()} for _ in range(n_pairs)])


def summarise_turns(times: pd.DataFrame, gflop: float, multiply_gflop: float) -> dict[str, float]:
    """Summarise turns of ours, performer-pytorch's attention and a square multiply, which did so many GFLOP.

    Median seconds of both; how many times faster ours is, and the share of the multiply's rate that it reaches: each
    the median over turns, with the least and the most.
    """
    ratio = times["performer_pytorch"] / times["scbert"]
    share = (gflop / times["scbert"]) / (multiply_gflop / times["multiply"])
    summary = {
        "seconds, ours": times["scbert"].median(),
        "seconds, performer-pytorch": times["performer_pytorch"].median(),
    }
    for name, values in (("ratio", ratio), ("share of the rate", share)):
        summary |= {name: values.median(), f"{name}, least": values.min(), f"{name}, most": values.max()}
    return summary


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

    Returns the arguments, and `seconds`, `peak_mb` (above what the process and the weights took before), `gflop_per_s`
    of a square multiply in `dtype`, and the `share` of it that the multiplies of the step reach, none of them counted
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


def plan_sweep(config: dict, lengths: Sequence[int], softmax_tokens: int, device: str = "cpu") -> list[dict]:
    """Plan the cases of a sweep over sequence lengths, for `measure_afresh`.

    A forward pass of each of `ATTENTIONS` and a training step of the first two, at each length; softmax attention up to
    `softmax_tokens` only, since its memory is quadratic where it is written out.
    """
    attentions = {"forward": ATTENTIONS, "training": ATTENTIONS[:2]}
    return [
        {"config": config, "tokens": n, "attention": attention, "step": step, "device": device}
        for step in attentions
        for attention in attentions[step]
        for n in lengths
        if n <= softmax_tokens or "softmax" not in attention
    ]


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
