"""Frozen layers are run once a cell, and fine-tuning cannot tell."""

import collections
import contextlib
import re
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch

import scbert
from scbert import Recipe, finetune, prefix
from scbert.data.cells import CellDataset
from scbert.scale.prefix import FrozenPrefix
from scbert.train import finetune as finetuning

QUIET = {"progress": False, "accelerator": "cpu"}
IN_A_FILE = {"cache_memory": 0}


@pytest.fixture
def encoder():
    """An untrained encoder of three layers."""
    return scbert.ScBert(scbert.ScBertConfig(n_genes=24, dim=8, depth=3, heads=2, dim_head=4))


@pytest.fixture
def fit(encoder, cells, more_cells):
    """Return a function that fine-tunes for three epochs."""

    def fit(layers=(-2,), recipe=None, **arguments):
        recipe = replace(recipe or Recipe(trainable_layers=layers), until_converged=False)
        return finetune(encoder, cells, validation=more_cells, n_epochs=3, recipe=recipe, **QUIET, **arguments)

    return fit


@pytest.fixture
def n_runs(monkeypatch):
    """Count how many cells pass through how many layers."""
    counts = collections.Counter()
    run_layers = scbert.ScBert.run_layers

    def count(self, x, start=0, stop=None):
        counts[len(self.performer.net.layers[start:stop])] += len(x)
        return run_layers(self, x, start, stop)

    monkeypatch.setattr(scbert.ScBert, "run_layers", count)
    return counts


def assert_alike(one, other, tolerance=1e-5):
    """Compare the histories and weights of two classifiers."""
    for name in ("loss", "val_loss", "val_macro_f1"):
        np.testing.assert_allclose(one.history[name], other.history[name], atol=tolerance)
    weights = other.state_dict()
    for name, tensor in one.state_dict().items():
        torch.testing.assert_close(tensor, weights[name], atol=tolerance, rtol=0)


@pytest.mark.parametrize("where", [{}, IN_A_FILE], ids=["memory", "file"])
@pytest.mark.parametrize("layers", [(-2,), "last", "head"])
@pytest.mark.parametrize("sampling", ["epoch", "bootstrap"])
def test_training_is_the_same_with_and_without_it(fit, layers, where, sampling):
    recipe = Recipe(trainable_layers=layers, sampling=sampling)
    assert_alike(fit(recipe=recipe, **where), fit(recipe=recipe, cache=None))


@pytest.mark.parametrize(("layers", "n_frozen"), [((-2,), 1), ("last", 2), ("head", 3)])
def test_frozen_layers_run_once_a_cell_and_the_others_once_an_epoch(fit, n_runs, layers, n_frozen):
    fit(layers)
    assert n_runs == {n_frozen: 90, 3 - n_frozen: 3 * 90}


@pytest.mark.parametrize(
    "recipe",
    [
        Recipe(),
        Recipe(trainable_layers=(0, 2)),
        Recipe(trainable_layers="last", redraw_features=True),
        Recipe(trainable_layers="last", key_stabiliser="batch"),
    ],
)
def test_nothing_is_kept_where_that_would_change_the_training(fit, n_runs, recipe):
    fit(recipe=recipe)
    assert n_runs == {3: 3 * 90}


def test_half_precision_takes_half_the_bytes_and_is_close(encoder, cells):
    cells = CellDataset(cells)
    full, half = (FrozenPrefix(encoder, cells, 2, precision=p, progress=False) for p in ("float32", "float16"))
    assert half.bytes_in_memory * 2 == full.bytes_in_memory == 60 * 25 * 8 * 4
    everyone = np.arange(60)
    difference = (half.batch(everyone) - full.batch(everyone)).abs().max()
    assert 0 < difference < 1e-3 * full.batch(everyone).abs().max()


def test_what_half_precision_cannot_hold_is_computed_again(encoder, cells):
    with torch.no_grad():
        encoder.token_emb.weight.mul_(1e6)
    cells, everyone = CellDataset(cells), np.arange(60)
    with pytest.warns(UserWarning, match="of 0 of 60 cells are kept .float16 cannot hold them: cache='float32' can"):
        kept = FrozenPrefix(encoder, cells, 1, precision="float16", progress=False)
    full = FrozenPrefix(encoder, cells, 1, progress=False)
    torch.testing.assert_close(kept.batch(everyone), full.batch(everyone))


def test_another_precision_is_refused_before_any_work(fit, n_runs):
    with pytest.raises(ValueError, match="cache must be 'float32', 'float16' or None, not 'float8'"):
        fit(cache="float8")
    assert not n_runs


@pytest.mark.parametrize("memory", [2**30, 0], ids=["memory", "file"])
def test_any_cells_in_any_order_are_what_the_layers_make_of_them(encoder, cells, memory):
    cells = CellDataset(cells)
    kept = FrozenPrefix(encoder, cells, 2, memory=memory, batch_size=7, progress=False)
    indices = np.array([59, 3, 3, 0, 58])
    expected = encoder.run_layers(encoder.embed(cells.batch(indices)), stop=2)
    for n_kept in (60, 0):
        assert kept.n_kept == n_kept
        torch.testing.assert_close(kept.batch(indices), expected, atol=1e-6, rtol=0)
        kept.close()


GB = 10**9


@pytest.fixture
def disk(monkeypatch):
    """Return a function that sets how many bytes of the disk are free, and how many it has; files take from the former."""
    state, write = {"free": 10**15, "total": 0}, FrozenPrefix._write

    def take(self, start, rows):
        write(self, start, rows)
        if self.file is not None:
            state["free"] -= rows.nbytes

    def usage(_):
        return shutil._ntuple_diskusage(state["total"], 0, state["free"])

    monkeypatch.setattr(FrozenPrefix, "_write", take)
    monkeypatch.setattr(shutil, "disk_usage", usage)
    return state.update


CELL = 25 * 8 * 4  # bytes


@pytest.mark.parametrize(("total", "spared"), [(100 * GB, 20 * GB), (650 * GB, 65 * GB)])
def test_a_disk_too_small_keeps_what_fits_and_computes_the_rest(fit, disk, n_runs, total, spared):
    expected = fit(cache=None)
    n_runs.clear()
    disk(free=spared + 50 * CELL - 1, total=total)
    with pytest.warns(UserWarning, match="cells are kept .* can be taken.* Free some disk space") as warned:
        assert_alike(fit(**IN_A_FILE), expected)
    of = [said[1] for warning in warned if (said := re.search("of (.*) cells are", str(warning.message)))]
    assert of == ["49 of 60", "0 of 30"]  # of those that train, and that choose the epoch
    assert n_runs[1] == 49 + 3 * (11 + 30)


def test_half_precision_has_room_for_twice_the_cells(encoder, cells, disk):
    disk(free=20 * GB + 30 * CELL)
    cells = CellDataset(cells)
    options = {"memory": 0, "batch_size": 10, "progress": False}
    with pytest.warns(UserWarning, match="of 30 of 60 cells are kept"):
        full = FrozenPrefix(encoder, cells, 2, **options)
    disk(free=20 * GB + 30 * CELL)
    half = FrozenPrefix(encoder, cells, 2, precision="float16", **options)
    with contextlib.closing(full), contextlib.closing(half):
        assert (full.n_kept, half.n_kept) == (30, 60)


def test_what_it_takes_is_said_before_it_is_taken(encoder, cells, disk, capsys):
    FrozenPrefix(encoder, CellDataset(cells), 2, memory=0).close()
    said = capsys.readouterr().out
    assert said.startswith("To keep the frozen layers of 60 cells 0.0 GB are needed, and 999980.0 GB of the disk of")


def test_what_others_write_meanwhile_is_never_the_last_of_the_disk(encoder, cells, disk, monkeypatch):
    read = CellDataset.in_order

    def fill_up(self, batch_size):
        for start, bins in read(self, batch_size):
            if start == 20:
                disk(free=20 * GB + 5 * CELL)
            yield start, bins

    monkeypatch.setattr(CellDataset, "in_order", fill_up)
    with pytest.warns(UserWarning, match="of 20 of 60 cells are kept .the rest of the disk is left to others"):
        kept = FrozenPrefix(encoder, CellDataset(cells), 2, memory=0, batch_size=10, progress=False)
    assert kept.n_kept == 20
    kept.close()


def test_a_disk_that_fills_up_meanwhile_warns_and_loses_nothing(fit, monkeypatch):
    expected = fit(cache=None)
    write, calls = FrozenPrefix._write, []

    def fail(self, start, rows):
        calls.append(start)
        if len(calls) > 2:
            raise OSError(28, "No space left on device")
        write(self, start, rows)

    monkeypatch.setattr(FrozenPrefix, "_write", fail)
    with pytest.warns(UserWarning, match="cells are kept .*No space left on device") as warned:
        assert_alike(fit(**IN_A_FILE), expected)
    assert "32 of 60" in str(warned[0].message)


def test_a_folder_that_cannot_be_written_warns_and_loses_nothing(fit, monkeypatch):
    def fail(**_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(prefix.tempfile, "TemporaryFile", fail)
    with pytest.warns(UserWarning, match="of 0 of .* cells are kept .*Permission denied"):
        assert_alike(fit(**IN_A_FILE), fit(cache=None))


def test_the_file_is_beside_the_checkpoint_and_gone_afterwards(fit, monkeypatch, tmp_path):
    folders, temporary_file = [], prefix.tempfile.TemporaryFile
    monkeypatch.setattr(prefix.tempfile, "TemporaryFile", lambda dir: (folders.append(dir), temporary_file(dir=dir))[1])
    fit(**IN_A_FILE, checkpoint=tmp_path / "new" / "a.pt")
    assert folders == [tmp_path / "new"] * 2
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["a.before.pt", "a.pt"]


def test_both_sets_share_the_memory(fit, monkeypatch):
    limits, init = [], FrozenPrefix.__init__
    monkeypatch.setattr(
        FrozenPrefix, "__init__", lambda *a, memory, **k: (limits.append(memory), init(*a, memory=memory, **k))[1]
    )
    fit(cache_memory=60 * 25 * 8 * 4 + 10)
    assert limits == [60 * 25 * 8 * 4 + 10, 10]


def test_layers_are_counted_up_to_the_first_that_learns(encoder):
    classifier = scbert.model.classifier.Classifier(encoder, ["a", "b"])
    for layers, expected in (("all", 0), ("last", 2), ("head", 3), ((-2,), 1), ((0,), 0), ((1, 2), 1)):
        classifier.requires_grad_(True)
        finetuning._choose_trainable(classifier, layers)
        assert finetuning._count_frozen(classifier, Recipe(trainable_layers=layers)) == expected


def test_bfloat16_with_sums_in_float32_trains_much_the_same(fit):
    full, half = fit(), fit(precision="bf16-mixed")
    np.testing.assert_allclose(half.history["val_loss"], full.history["val_loss"], rtol=0.02)
    assert (half.history["val_loss"] != full.history["val_loss"]).any()
    assert all(parameter.dtype == torch.float32 for parameter in half.parameters())
