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


def test_differences_are_rounding_and_grow_where_something_differs(model, bins, monkeypatch):
    apart = performance.measure_differences(model, bins)
    assert list(apart) == ["encodings", "gradients", "batch"]
    assert all(type(value) is float and value < 1e-5 for value in apart.values())
    make_step = performance.make_step

    def swap(model, attention, step, bins):  # in place of performer-pytorch's: softmax
        return make_step(model, "softmax" if attention == "performer_pytorch" else attention, step, bins)

    monkeypatch.setattr(performance, "make_step", swap)
    wrong = performance.measure_differences(model, bins)
    assert wrong["encodings"] > 1e-4 and wrong["gradients"] > 1e-4
    assert wrong["batch"] == apart["batch"]


def test_functions_take_turns(model):
    calls = []
    times = performance.compare({name: lambda name=name: calls.append(name) for name in "ab"}, n_pairs=3)
    assert calls == list("ab" * 4)
    assert times.shape == (3, 2)
    assert (times > 0).all(axis=None)


def test_a_sweep_leaves_out_long_softmax_and_training_of_it():
    cases = performance.plan_sweep(SHAPE, [10, 20], 10, "cuda")
    assert len(cases) == 4 + 2 + 4  # random features forward, softmax forward, training
    softmax = [case for case in cases if "softmax" in case["attention"]]
    assert {(case["step"], case["tokens"]) for case in softmax} == {("forward", 10)}
    assert cases[0] == {"config": SHAPE, "tokens": 10, "attention": "scbert", "step": "forward", "device": "cuda"}


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


PLAN = {"n_epochs": 2, "cards": {"card": (1e12, 1e15)}, "shares": {"half": 0.5}, "tokens": [40]}


def estimate(devices, n_cells=3600, **changes):
    """Estimate the rows of one card and scenario, indexed by devices."""
    config = scbert.ScBertConfig(n_genes=39, gene_embedding="frozen", **SHAPE)
    return performance.estimate_pretraining(config, n_cells, devices, **(PLAN | changes)).droplevel([0, 1, 2])


def test_parameters_are_those_of_the_published_layout_and_of_a_model():
    assert performance.count_parameters(scbert.ScBertConfig.published()) == (8_388_607, 5_007_207)
    for kind in ("learned", "none"):
        model = scbert.ScBert(scbert.ScBertConfig(n_genes=39, gene_embedding=kind, **SHAPE))
        counted = sum(parameter.numel() for parameter in model.parameters())
        assert performance.count_parameters(model.config) == (counted, counted)


def test_one_device_takes_the_multiplies_over_the_rate_that_it_reaches():
    row = estimate([1]).loc[1]
    # A position of a layer: 3 forward passes of projections and feed-forward, and of both sums over 2 heads x 16
    # features; 2 of the random features, which are no weights. dim 16, heads 2 x 8.
    multiplies = 3 * (4 * 16 * 16 + 8 * 16 * 16) + 3 * 2 * (2 * 16 * 8 + 2 * 16) + 2 * 2 * 2 * 16 * 8
    assert row["gflop"] == pytest.approx(2e-9 * 2 * 40 * multiplies)
    assert row["gflop_recomputed"] > row["gflop"]
    assert row["compute_s"] == pytest.approx(3600 * row["gflop"] * 1e9 / 0.5e12)
    assert row["synchronise_s"] == 0
    assert row["efficiency"] == pytest.approx(1)
    assert row["gpu_hours"] == pytest.approx(2 * row["compute_s"] / 3600)
    assert row["days"] == pytest.approx(row["gpu_hours"] / 24)
    assert row["basis"] == "estimate"


def test_eight_devices_compute_an_eighth_and_send_their_gradients_around_a_ring(monkeypatch):
    monkeypatch.setattr(performance, "LINK_BANDWIDTH", 1e6)
    monkeypatch.setattr(performance, "LATENCY", 1e-3)
    one, eight = estimate([1, 8], cells_per_step=80).to_dict("index").values()
    trainable = 2 * (4 * 16 * 16 + 16 + 8 * 16 * 16 + 5 * 16 + 4 * 16) + 2 * 7 * 16 + 7 + 2 * 16
    a_step = 2 * 7 / 8 * 4 * trainable / 1e6 + 2 * 7 * 1e-3
    assert eight["compute_s"] == pytest.approx(one["compute_s"] / 8)
    assert eight["synchronise_s"] == pytest.approx(3600 / 80 * a_step)
    seconds = eight["compute_s"] + eight["synchronise_s"]
    assert eight["hours_per_epoch"] == pytest.approx(seconds / 3600)
    assert eight["efficiency"] == pytest.approx(one["compute_s"] / (8 * seconds))
    assert eight["gpu_hours"] == pytest.approx(2 * 8 * seconds / 3600)


def test_a_step_waits_for_the_device_with_most_cells(monkeypatch):
    monkeypatch.setattr(performance, "LINK_BANDWIDTH", float("inf"))
    monkeypatch.setattr(performance, "LATENCY", 0)
    efficiency = estimate([1, 60, 64, 90], cells_per_step=180)["efficiency"]
    assert efficiency.tolist() == pytest.approx([1, 1, 180 / 192, 1])


def test_efficiency_is_one_for_one_device_and_falls_with_more():
    efficiency = estimate([1, 2, 4, 8, 16], cells_per_step=16)["efficiency"].to_numpy()
    assert efficiency[0] == pytest.approx(1)
    assert (np.diff(efficiency) < 0).all()


def test_twice_the_cells_or_half_the_share_take_twice_the_time():
    devices = [1, 8, 64]
    whole = estimate(devices)
    cost = ["compute_s", "synchronise_s", "hours_per_epoch", "days", "gpu_hours"]
    pd.testing.assert_frame_equal(estimate(devices, n_cells=7200)[cost], 2 * whole[cost])
    slow = estimate(devices, shares={"quarter": 0.25})["compute_s"]
    pd.testing.assert_series_equal(slow, 2 * whole["compute_s"])


def test_a_part_that_moves_its_numbers_more_slowly_than_it_multiplies_takes_that_long():
    config = scbert.ScBertConfig(n_genes=39, **SHAPE)
    counted = performance.count_multiplies(config, 40, recompute=False)
    moved = (counted["moved_mb"] * counted["training"] / counted["forward"]).sum()
    row = estimate([1], cards={"card": (1e15, 1e9)}).loc[1]
    assert row["compute_s"] == pytest.approx(3600 * moved * 1e6 / 0.5e9)


def test_each_length_card_and_scenario_has_its_rows():
    config = scbert.ScBertConfig.published()
    cards, shares = {"slow": (1e12, 1e12), "fast": (2e12, 1e12)}, {"low": 0.1, "high": 0.5}
    table = performance.estimate_pretraining(
        config, 1000, n_epochs=1, cards=cards, shares=shares, tokens=[config.n_genes + 1, 900]
    )
    assert table.index.names == ["tokens", "card", "scenario", "devices"]
    assert len(table) == 2 * 2 * 2 * 3
    slow = table.xs(("slow", "low", 1), level=["card", "scenario", "devices"])
    assert slow.loc[16_907, "gflop"] == pytest.approx(855.0, abs=0.1)
    assert slow.loc[16_907, "compute_s"] == pytest.approx(1000 * 855.03 / 100, rel=1e-5)
    assert slow.loc[900, "gflop"] / slow.loc[16_907, "gflop"] == pytest.approx(900 / 16_907)
    default = performance.estimate_pretraining(config, 1000, n_epochs=1, cards=cards, shares=shares)
    pd.testing.assert_frame_equal(default, table.xs(16_907, drop_level=False))


def test_what_is_kept_for_the_backward_pass_is_what_autograd_saves():
    config = scbert.ScBertConfig(n_genes=399, gene_embedding="none", depth=2)  # the published width: one chunk a cell
    model, saved = scbert.ScBert(config), {}
    own = {tensor.untyped_storage().data_ptr() for tensor in model.state_dict(keep_vars=True).values()}

    def note(tensor):
        if tensor.untyped_storage().data_ptr() not in own:
            saved[tensor.untyped_storage().data_ptr()] = tensor  # held, so that no address is used twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        model.encode(torch.zeros(1, 400, dtype=torch.long))
    weights, trainable = performance.count_parameters(config)
    gradients = 2 * config.heads * config.n_features * 400
    kept = performance.estimate_memory(config, 400, 1) - 4e-9 * (weights + 3 * trainable + gradients)
    summaries = 2 * config.heads * (config.dim_head + 1) * config.n_features  # of the keys, whatever the length
    n_bytes = sum(tensor.untyped_storage().nbytes() for tensor in saved.values()) - 4 * summaries
    assert n_bytes == pytest.approx(1e9 * kept, rel=0.04)


def test_memory_grows_with_cells_until_chunks_are_computed_again():
    config = scbert.ScBertConfig.published()
    one, two, three, four = (performance.estimate_memory(config, 16_907, cells) for cells in (1, 2, 3, 4))
    assert two - one > 4
    assert three < one
    assert four - three == pytest.approx(4e-9 * 7 * 16_907 * 200)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"n_cells": 0}, "n_cells must be more than 0"),
        ({"n_epochs": 0}, "n_epochs must be more than 0"),
        ({"devices": [0, 1]}, "the fewest devices must be more than 0"),
        ({"devices": []}, "the fewest devices must be more than 0"),
        ({"tokens": []}, "the fewest tokens must be more than 0"),
        ({"cards": {"card": (1e12, 0)}}, "the lowest peak must be more than 0"),
        ({"shares": {}}, "shares must name at least one"),
        ({"shares": {"high": 1.5}}, r"shares must lie in \(0, 1\], but that of 'high' is 1.5"),
        ({"cells_per_step": 7}, r"cells_per_step \(7\) is less than 8 devices"),
    ],
)
def test_an_estimate_from_impossible_numbers_is_refused(changes, reason):
    with pytest.raises(ValueError, match=reason):
        estimate(**({"devices": [1, 8]} | changes))


def test_turns_are_summarised_pair_by_pair():
    times = pd.DataFrame({"scbert": [1.0, 2.0, 4.0], "performer_pytorch": [2.0, 6.0, 4.0], "multiply": [1.0, 1.0, 1.0]})
    summary = performance.summarise_turns(times, gflop=8, multiply_gflop=16)
    assert summary == {
        "seconds, ours": 2, "seconds, performer-pytorch": 4, "ratio": 2, "ratio, least": 1, "ratio, most": 3,
        "share of the rate": 0.25, "share of the rate, least": 0.125, "share of the rate, most": 0.5,
    }  # fmt: skip


def test_days_of_claims_are_those_of_single_estimates():
    cards = {"fast": (1e12, 1e12), "slow": (1e11, 1e12)}
    config, shares = scbert.ScBertConfig(n_genes=99, **SHAPE), {"low": 0.1, "all": 1}
    own = {"cards": {"slow": cards["slow"]}}
    claims = {"a": (10_000, 8, own), "b": (5_000, 1, own | {"n_epochs": 20})}
    days = performance.estimate_days(config, claims, n_epochs=10, cards=cards, shares=shares)
    assert list(days.index) == ["a", "b"] and list(days.columns) == ["low", "all"]
    assert days.columns.name == "ESTIMATE, days"
    assert days["low"].to_numpy() == pytest.approx(10 * days["all"].to_numpy(), rel=0.2)  # but for summing gradients
    alone = performance.estimate_pretraining(config, 10_000, [8], n_epochs=10, shares=shares, **own)["days"]
    assert days.loc["a"].tolist() == alone.tolist()
    assert days.loc["b", "all"] == pytest.approx(
        performance.estimate_pretraining(config, 5_000, [1], n_epochs=20, shares=shares, **own)["days"].iloc[1]
    )


def test_hours_follow_from_the_seconds_of_a_cell():
    hours = performance.estimate_hours(0.36, 3.6, [1_000, 20_000])
    assert list(hours.columns) == ["1,000 cells", "20,000 cells"]
    assert hours["1,000 cells"].tolist() == pytest.approx([0.1, 1, 1 / 3])
    assert hours["20,000 cells"].tolist() == pytest.approx([2, 20, 20 / 3])
