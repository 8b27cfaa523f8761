"""Checkpoints: whole or not at all, the one before kept, damage noticed."""

import os

import pytest
import torch

from scbert.scale.checkpoint import find_before, read_checkpoint, write_checkpoint


def keep(path, number, identity="me"):
    write_checkpoint(path, lambda file: torch.save({"identity": identity, "number": number}, file))


def test_the_newest_is_read_and_the_one_before_is_kept(tmp_path):
    path = tmp_path / "new" / "a.pt"
    for number in range(4):
        keep(path, number)
        assert read_checkpoint(path, "me")[1]["number"] == number
    assert torch.load(find_before(path))["number"] == 2
    assert sorted(os.listdir(path.parent)) == ["a.before.pt", "a.pt"]


def test_what_a_killed_writer_left_is_removed_by_the_next(tmp_path):
    (tmp_path / "a.pt.12345.tmp").write_text("half")
    keep(tmp_path / "a.pt", 0)
    assert os.listdir(tmp_path) == ["a.pt"]


def test_after_a_kill_between_the_two_names_the_one_before_is_read_without_a_warning(tmp_path):
    path = tmp_path / "a.pt"
    keep(path, 0)
    os.replace(path, find_before(path))
    assert read_checkpoint(path, "me") == (find_before(path), {"identity": "me", "number": 0})


def test_checkpoints_of_other_calls_are_passed_over(tmp_path):
    path = tmp_path / "a.pt"
    assert read_checkpoint(None, "me") == read_checkpoint(path, "me") == (None, {})
    keep(path, 0, "me")
    keep(path, 1, "another")
    assert read_checkpoint(path, "me")[1]["number"] == 0
    assert read_checkpoint(path, "a third") == (None, {})


def test_what_runs_code_is_not_run(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "was run"),)

    path = tmp_path / "a.pt"
    torch.save({"identity": "me", "evil": Evil()}, path)
    with pytest.warns(UserWarning, match=r"a\.pt is damaged \(UnpicklingError\): starting from the beginning"):
        assert read_checkpoint(path, "me") == (None, {})
    assert not (tmp_path / "was run").exists()


def test_a_write_that_fails_leaves_what_was_there(tmp_path):
    path = tmp_path / "a.pt"
    keep(path, 0)

    def fail(file):
        file.write_text("half")
        raise OSError("No space left on device")

    with pytest.warns(UserWarning, match=r"a\.pt was not written \(No space left on device\): training goes on"):
        write_checkpoint(path, fail)
    assert os.listdir(tmp_path) == ["a.pt"]
    assert read_checkpoint(path, "me")[1]["number"] == 0
