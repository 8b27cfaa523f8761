"""Multiplies are counted right, alternatives compute the same, and a measurement says what it measured."""

import numpy as np
import pandas as pd
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import scbert
from scbert import attention, performance

SHAPE = {"dim": 16, "depth": 2, "heads": 2, "dim_head": 8}


@pytest.fixture
def model():
    """An untrained encoder of 40 tokens."""
    return scbert.ScBert(scbert.ScBertConfig(n_genes=39, **SHAPE)).eval()


@pytest.fixture
def bins():
    """One cell of 40 tokens."""
    return torch.from_numpy(np.random.default_rng(0).integers(0, 6, (1, 40)))


def test_multiplies_of_a_forward_pass_are_those_that_torch_counts(model, bins):
    counted = performance.count_multiplies(model.config, 40)["forward"].sum()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.encode(bins)
    assert counted * 1e9 == counter.get_total_flops()


@pytest.mark.parametrize("recompute", [False, True])
def test_multiplies_of_a_training_step_are_those_that_torch_counts(model, bins, recompute, monkeypatch):
    if recompute:  # several chunks
        monkeypatch.setitem(attention.CHUNK_BYTES, "cpu", 4 * 2 * model.config.n_features * 10)
        monkeypatch.setattr(attention, "KEPT_CHUNKS", 1)
    with FlopCounterMode(display=False) as counter:
        hidden = model.encode(bins)
        torch.autograd.grad(hidden.square().mean(), [*model.performer.parameters(), model.token_emb.weight])
    counted = performance.count_multiplies(model.config, 40, recompute)["training"].sum()
    assert counter.get_total_flops() == pytest.approx(counted * 1e9)


def test_the_published_layout_needs_308_gflop_a_cell():
    counted = performance.count_multiplies(scbert.ScBertConfig.published(), 16_907)["forward"].sum()
    assert counted == pytest.approx(308, abs=0.5)


def test_multiplies_are_proportional_to_tokens_and_layers():
    def total(depth, tokens):
        shape = {**SHAPE, "depth": depth}
        return performance.count_multiplies(scbert.ScBertConfig(n_genes=9, **shape), tokens).sum()

    pd.testing.assert_series_equal(total(1, 100) * 6, total(2, 300))


def test_the_alternatives_are_performer_pytorchs_and_softmax_attention(model, bins):
    ours, theirs, softmax, fused = (
        performance.make_step(model, name, "forward", bins)() for name in performance.ATTENTIONS
    )
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)
    torch.testing.assert_close(softmax, fused, atol=1e-5, rtol=0)
    assert (ours - softmax).abs().max() > 1e-4  # random features approximate


def test_the_model_is_as_it_was_after_an_alternative_ran(model, bins):
    before = model.encode(bins)
    performance.make_step(model, "softmax", "training", bins)()
    assert torch.equal(model.encode(bins), before)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_gradients_of_ours_are_performer_pytorchs(model, bins):
    ours, theirs = (performance.make_step(model, name, "training", bins)() for name in performance.ATTENTIONS[:2])
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("names", [("dense", "forward"), ("scbert", "backward")])
def test_other_names_are_refused(model, bins, names):
    with pytest.raises(ValueError, match="attention must be one of"):
        performance.make_step(model, *names, bins)


def test_functions_take_turns(model):
    calls = []
    times = performance.compare({name: lambda name=name: calls.append(name) for name in "ab"}, n_pairs=3)
    assert calls == list("ab" * 4)
    assert times.shape == (3, 2)
    assert (times > 0).all(axis=None)


def test_a_case_is_measured_in_a_process_of_its_own():
    case = {"config": SHAPE, "tokens": 40, "threads": 1, "repeats": 1}
    measured = performance.measure_afresh([{**case, "step": "training"}, {**case, "tokens": -3}])
    assert measured.loc[0, ["tokens", "attention", "step", "cells", "threads"]].tolist() == [
        40,
        "scbert",
        "training",
        1,
        1,
    ]
    assert measured.loc[0, "seconds"] > 0
    assert measured.loc[0, "peak_mb"] >= 0
    assert measured.loc[0, "share"] > 0
    assert "n_genes" in measured.loc[1, "error"]
    assert pd.isna(measured.loc[1, "seconds"])


def test_the_peak_is_what_a_function_takes_above_what_was_taken():
    held = torch.ones(50 * 2**18)  # 50 MB
    peak = performance.measure_peak(lambda: torch.ones(100 * 2**18).sum(), "cpu")
    assert 95 < peak < 130
    del held


def test_exponents_are_slopes_on_logarithmic_axes():
    sizes = np.array([1, 2, 4, 8])
    assert performance.fit_exponent(sizes, 3.0 * sizes) == pytest.approx(1)
    assert performance.fit_exponent(sizes, 0.5 * sizes**2) == pytest.approx(2)


def test_exponents_are_fitted_where_there_are_three_lengths():
    sweep = pd.DataFrame({"tokens": [1, 2, 4, 1, 2], "attention": [*"aaa", *"bb"], "step": "forward"})
    sweep["seconds"], sweep["peak_mb"] = 3.0 * sweep["tokens"], 2.0 * sweep["tokens"] ** 2
    exponents = performance.fit_exponents(sweep)
    assert exponents.index.tolist() == [("forward", "a")]
    assert exponents.loc[("forward", "a")].tolist() == pytest.approx([1, 2])
