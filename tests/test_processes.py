"""Several processes do what one does: the same losses, each cell once, no waiting for ever."""

import copy

import numpy as np
import pytest
import torch
from lightning_fabric import Fabric

import scbert
from scbert import pretrain, processes
from scbert.data.cells import CellDataset, take_share
from scbert.data.preprocess import tokenize
from scbert.paths import count_processes, find_rank
from scbert.scale.processes import check_devices, launch, make_fabric

OPTIONS = {"n_epochs": 7, "batch_size": 16, "learning_rate": 1e-2, "redraw_every": 5, "progress": False,
           "accelerator": "cpu"}  # fmt: skip


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    """Leave out what a cluster may have set."""
    for name in ("WORLD_SIZE", "RANK", "LOCAL_WORLD_SIZE", "SLURM_STEP_NUM_TASKS", "SLURM_PROCID", "SLURM_NNODES"):
        monkeypatch.delenv(name, raising=False)


def differ(one, other):
    """Return the largest difference of any weight."""
    pairs = zip(one.state_dict().values(), other.state_dict().values(), strict=True)
    return max((a - b).abs().max().item() for a, b in pairs)


def test_two_processes_learn_what_one_learns_and_see_each_cell_once(config, make_cells):
    # 49 cells are three batches of 16 and one of a single cell, of which the second process gets nothing.
    cells, validation = tokenize(make_cells(49)), tokenize(make_cells(17, seed=1))
    one, two = (scbert.ScBert(config) for _ in range(2))
    expected = pretrain(one, cells, validation=validation, **OPTIONS)
    history = pretrain(two, cells, validation=validation, devices=2, **OPTIONS)
    assert history["cells"].tolist() == [49] * 7
    for name in ("loss", "val_loss"):
        assert history[name].to_numpy() == pytest.approx(expected[name].to_numpy(), abs=1e-5)
    for name in ("accuracy", "val_accuracy", "val_mode_accuracy", "learning_rate"):
        assert history[name].to_numpy() == pytest.approx(expected[name].to_numpy(), abs=1e-12)
    assert differ(one, two) < 1e-5
    assert differ(scbert.ScBert(config), two) > 1e-2
    assert not two.training


def test_a_run_of_one_process_goes_on_with_two_and_accumulates_as_one_does(config, make_cells, tmp_path, monkeypatch):
    cells, options = tokenize(make_cells(49)), OPTIONS | {"accumulate": 3, "n_epochs": 3}
    expected, model = scbert.ScBert(config), scbert.ScBert(config)
    pretrain(expected, cells, **options)
    options |= {"checkpoint": tmp_path / "a.pt", "checkpoint_every": 1}
    take_step, steps = scbert.train.steps.take_step, []

    def stop(optimizer, rate):
        steps.append(rate)
        if len(steps) == 4:  # the second step of the second epoch
            raise KeyboardInterrupt
        take_step(optimizer, rate)

    monkeypatch.setattr(scbert.train.steps, "take_step", stop)
    with pytest.raises(KeyboardInterrupt):
        pretrain(copy.deepcopy(model), cells, **options)
    history = pretrain(model, cells, devices=2, log=tmp_path / "log.csv", **options)
    assert history["cells"].tolist() == [49] * 3
    assert differ(expected, model) < 1e-5
    assert len((tmp_path / "log.csv").read_text().splitlines()) == 4
    assert torch.load(tmp_path / "a.pt", weights_only=True)["random"][0].shape[0] == 2  # a state for each process
    again = scbert.ScBert(config)
    assert pretrain(again, cells, devices=2, **options).equals(history)  # read by both
    assert differ(again, model) == 0


def fail(text):
    raise ValueError(text)


def test_an_error_in_a_process_ends_all_and_says_what_it_was():
    with pytest.raises(torch.multiprocessing.ProcessRaisedException, match="ValueError: no such luck"):
        launch(fail, 2, "no such luck")


# Shares


@pytest.mark.parametrize("n_parts", [1, 2, 3, 7])
def test_the_shares_of_all_processes_are_the_batches_in_as_many_turns(cells, n_parts):
    data = CellDataset(cells)
    whole = [indices for indices, _ in data.epoch(7, 0, 1)]
    parts = [[indices for indices, _ in data.epoch(7, 0, 1, part=(i, n_parts))] for i in range(n_parts)]
    assert {len(part) for part in parts} == {len(whole)}
    for batch, *shares in zip(whole, *parts, strict=True):
        assert np.concatenate(shares).tolist() == batch.tolist()
        assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_an_epoch_goes_on_after_the_batches_that_are_skipped(cells):
    data = CellDataset(cells)
    whole, rest = list(data.epoch(7, 0, 1)), list(data.epoch(7, 0, 1, skip=3))
    assert len(rest) == len(whole) - 3
    assert all(np.array_equal(a[0], b[0]) and torch.equal(a[1], b[1]) for a, b in zip(whole[3:], rest, strict=True))
    assert take_share(np.arange(5), (1, 2)).tolist() == [3, 4]


# What can be asked for


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"devices": 0}, "devices and nodes must be at least 1, not 0 and 1"),
        ({"nodes": 2}, "nodes=2 needs a program started on each of them: srun .*torchrun"),
        ({"strategy": "deepspeed"}, "strategy must be 'auto', 'ddp' or 'fsdp', not 'deepspeed'"),
        ({"strategy": "fsdp"}, "fsdp' shards a model over GPUs: set devices to two or more"),
        ({"batch_size": 0}, "batch_size, accumulate, redraw_every and checkpoint_every must be at least 1"),
    ],
)
def test_devices_that_cannot_be_had_are_refused_in_one_sentence(config, cells, options, message):
    with pytest.raises(ValueError, match=message):
        pretrain(scbert.ScBert(config), cells, **OPTIONS | options)


def test_more_gpus_than_there_are_are_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    check_devices(4, 1, "auto")
    with pytest.raises(ValueError, match="devices=8, but this machine has 4 GPUs: ask for 4"):
        check_devices(8, 1, "auto")


def test_sharding_needs_gpus(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="strategy='fsdp' needs GPUs: use strategy='ddp' on CPUs"):
        make_fabric("cpu", "fsdp", "32-true")


def test_processes_that_were_started_join_from_a_notebook_too(monkeypatch):
    started = {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": "x"}
    for name, value in started.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("lightning_fabric.connector._IS_INTERACTIVE", True)  # as in a kernel
    monkeypatch.setattr(Fabric, "launch", lambda fabric: None)  # would wait for the other process
    assert make_fabric("cpu", "ddp", "32-true").world_size == 2


@pytest.mark.parametrize(
    ("environment", "n_processes", "rank"),
    [
        ({}, 1, 0),
        ({"WORLD_SIZE": "8", "RANK": "3"}, 8, 3),  # torchrun
        ({"SLURM_STEP_NUM_TASKS": "16", "SLURM_PROCID": "9"}, 16, 9),  # srun
        ({"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0", "SLURM_NNODES": "1"}, 1, 0),
        ({"SLURM_PROCID": "3"}, 1, 0),
    ],
)
def test_processes_are_counted_as_they_were_started(environment, n_processes, rank, monkeypatch):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert (count_processes(), find_rank()) == (n_processes, rank)
    check_devices(1, 1, "auto")
    if n_processes > 1:
        check_devices(n_processes // 2, 2, "auto")
        monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
        check_devices(4, 1, "auto")  # of each machine
        with pytest.raises(ValueError, match=f"{n_processes} processes were started, but devices=3 and nodes=1"):
            check_devices(3, 1, "auto")


def test_the_first_process_hands_over_what_its_function_returns(monkeypatch):
    monkeypatch.setattr(processes, "_run", processes._run)
    assert launch(np.arange, 2, 200_000).sum() == 19999900000  # more than a pipe holds
