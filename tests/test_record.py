"""A run's record: exactly the agreed keys, strict JSON, and none at all where a number is out of its band."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy import sparse

import scbert
from scbert import counts, paths
from scbert.paths import write_text
from scbert.run.record import Run
from scbert.run.report import read_records


@pytest.fixture(autouse=True)
def root(clone, monkeypatch):
    """An empty project to run in."""
    for name in ("SCBERT_RUNS", "SCBERT_BANDS", "SCBERT_PART"):
        monkeypatch.delenv(name, raising=False)
    return clone


def start(notebook="03_test", **parameters):
    parameters = {"profile": "demo", "seed": 0, "n_epochs": 3, **parameters}
    return Run(notebook, {**parameters, "helper": 1, "__annotations__": dict.fromkeys(parameters)})


def write_bands(root, metrics, parameters=None, notebook="03_test"):
    file = root / "tests" / "expected" / f"{notebook}.json"
    write_text(file, json.dumps({"parameters": parameters or {}, "metrics": metrics}))


def refuse_nan(text):
    raise AssertionError(f"{text} is no JSON")


def test_the_record_has_exactly_the_agreed_keys(root, make_cells):
    run = start(rate=0.5, name="x", flag=True)
    run.note_data("pbmc", make_cells())
    run.note_metric("pbmc/scbert/accuracy", np.float32(0.75), 0.5, 1, np.int64(60))
    run.check("pbmc/scbert/accuracy", band=(0.7, 0.8))
    run.finish()
    text = (root / "runs" / "demo" / "03_test" / "record.json").read_text()
    written = json.loads(text, parse_constant=refuse_nan)
    assert list(written) == [
        *["notebook", "profile", "parameters", "seed", "git_commit", "versions", "data", "seconds", "peak_memory_mb"],
        *["metrics", "checks", "figures"],
    ]
    assert (written["notebook"], written["profile"], written["seed"]) == ("03_test", "demo", 0)
    assert written["parameters"] == {
        "profile": "demo", "seed": 0, "n_epochs": 3, "rate": 0.5, "name": "x", "flag": True
    }  # fmt: skip
    assert written["metrics"] == {"pbmc/scbert/accuracy": {"value": 0.75, "low": 0.5, "high": 1.0, "n": 60, "unit": ""}}
    assert written["checks"] == [{"name": "pbmc/scbert/accuracy", "value": 0.75, "band": [0.7, 0.8], "passed": True}]
    assert list(written["data"]) == ["pbmc"]
    assert len(written["data"]["pbmc"]) == 64
    assert {"python", "torch", "performer-pytorch"} <= set(written["versions"])
    assert 0 <= written["seconds"] < 1000
    assert written["peak_memory_mb"] > 10


@pytest.mark.parametrize(("value", "passes"), [(0.5, True), (0.7, True), (0.9, True), (0.49, False), (0.91, False)])
def test_a_number_outside_its_band_stops_the_run_and_leaves_no_record(root, value, passes):
    start().finish()  # an earlier run
    run = start()
    assert not run.path("record.json").exists()
    if passes:
        run.check("number", value, (0.5, 0.9))
    else:
        with pytest.raises(AssertionError, match=rf"number is {value}, outside its band \[0.5, 0.9\]"):
            run.check("number", value, (0.5, 0.9))
    assert not run.path("record.json").exists()


def test_a_run_that_failed_a_check_cannot_be_finished():
    run = start()
    with pytest.raises(AssertionError, match="outside its band"):
        run.check("number", 2, (0, 1))
    with pytest.raises(AssertionError, match="No record is written: number failed"):
        run.finish()
    assert not run.path("record.json").exists()


def test_not_a_number_passes_no_check():
    with pytest.raises(AssertionError, match="number is nan"):
        start().check("number", float("nan"), (0, 1))


def test_bands_are_read_from_the_expected_values_of_the_notebook(root):
    write_bands(root, {"a/b/accuracy": {"value": 0.8, "tolerance": 0.05}}, {"n_epochs": 3})
    run = start()
    run.note_metric("a/b/accuracy", 0.76, 0.7, 0.8, 10)
    run.check("a/b/accuracy")
    run.note_metric("a/b/accuracy", 0.74, 0.7, 0.8, 10)
    with pytest.raises(AssertionError, match=r"a/b/accuracy is 0.74, outside its band \[0.75, 0.85\]"):
        run.check("a/b/accuracy")


def test_a_band_that_was_measured_with_other_parameters_is_skipped(root, capsys):
    write_bands(root, {"a/b/accuracy": {"value": 0.8, "tolerance": 0.05}}, {"n_epochs": 20})
    run = start()
    run.note_metric("a/b/accuracy", 0.1, 0.0, 0.2, 10)
    run.check("a/b/accuracy")
    run.finish()
    assert "its band was measured with other parameters (n_epochs)" in capsys.readouterr().out
    assert json.loads(run.path("record.json").read_text())["checks"] == []


def test_a_notebook_without_measured_bands_is_skipped(root, monkeypatch, capsys):
    run = start()
    run.note_metric("a/b/accuracy", 0.1, 0.0, 0.2, 10)
    run.check("a/b/accuracy")
    write_bands(root, {"a/b/accuracy": {"value": 0.8, "tolerance": 0.05}})
    monkeypatch.setenv("SCBERT_BANDS", "off")  # while they are measured
    run.check("a/b/accuracy")
    assert capsys.readouterr().out.count("no band was measured yet") == 2
    assert not run.checks


def test_a_metric_without_a_band_is_an_error(root):
    write_bands(root, {})
    run = start()
    run.note_metric("a/b/accuracy", 0.1, 0.0, 0.2, 10)
    with pytest.raises(KeyError, match="03_test.json has no band for a/b/accuracy"):
        run.check("a/b/accuracy")


@pytest.mark.parametrize("numbers", [(np.nan, 0, 1), (0.5, -np.inf, 1), (0.5, 0, np.nan)])
def test_a_metric_that_is_not_a_number_is_refused(numbers):
    run = start()
    with pytest.raises(ValueError, match="a/b/accuracy is .*: not a number to put on record"):
        run.note_metric("a/b/accuracy", *numbers, 10)
    assert not run.metrics


def test_a_number_where_a_word_is_due_is_taken_as_the_word_whoever_wrote_it():
    space = {"profile": "demo", "seed": 0, "references": 0.1, "batch_key": None, "rate": 1, "flag": True}
    kinds = {"profile": str, "seed": int, "references": str, "batch_key": str, "rate": float, "flag": bool}
    space["__annotations__"] = kinds
    run = Run("03_test", space)
    assert (space["references"], space["batch_key"], space["rate"], space["flag"]) == ("0.1", "", 1.0, True)
    assert run.parameters["references"] == "0.1"


@pytest.mark.parametrize(
    ("name", "kind", "value", "message"),
    [
        ("references", str, [0.1, 0.3], r"Parameter references must be of type str, not \[0.1, 0.3\]"),
        ("n_epochs", int, 1.5, "Parameter n_epochs must be of type int, not 1.5"),
        ("n_folds", int, True, "Parameter n_folds must be of type int, not True"),
        ("n_folds", int, None, "Parameter n_folds must be of type int, not None"),
        ("n_seeds", int, 0, "n_seeds must be at least 1, not 0"),
        ("unassigned_below", float, 50, "unassigned_below must be between 0 and 1, not 50.0"),
        ("level", float, float("nan"), "level must be between 0 and 1, not nan"),
        ("numbers", str, "1 two", "Parameter numbers must be of type int, not 'two'"),
        ("numbers", str, "1 0", "numbers must be at least 1, not 0"),
        ("resolutions", str, " ", "resolutions must be some numbers with blanks between"),
        ("severities", str, "0 -1", "severities must be at least 0, not -1.0"),
        ("shape", str, "32 2 4", "shape must be four numbers with blanks between"),
        ("encoder", str, "nowhere", "There is no bundle or file nowhere, and no encoder of that name"),
        ("label_key", str, "scbert_consensus", r"obs\['scbert_consensus'\] is a column that scbert writes itself"),
    ],
)
def test_a_value_that_cannot_be_meant_is_refused_in_a_sentence(name, kind, value, message):
    space = {"profile": "demo", "seed": 0, name: value}
    with pytest.raises(ValueError, match=message):
        Run("03_test", space | {"__annotations__": {"profile": str, "seed": int, name: kind}})


def test_a_run_seeds_all_generators():
    import random

    import torch

    def draw():
        return random.random(), np.random.rand(), torch.rand(1).item()

    start(seed=4)
    first = draw()
    start(seed=5)
    other = draw()
    start(seed=4)
    assert draw() == first
    assert not set(first) & set(other)


def test_checkpoints_live_until_the_run_is_finished():
    run = start()
    write_text(run.checkpoint("pretrain"), "state")
    again = start()  # after an interruption
    assert again.checkpoint("pretrain").read_text() == "state"
    again.finish()
    assert not again.checkpoint("pretrain").exists()


def test_the_part_is_read_from_the_environment(monkeypatch):
    assert paths.find_part() is None
    for text, part in {"": None, "2/8": (2, 8), "1/1": (1, 1), "12/12": (12, 12)}.items():
        monkeypatch.setenv("SCBERT_PART", text)
        assert paths.find_part() == part


@pytest.mark.parametrize("text", ["9/8", "x", "0/4", "2", "1/0", "-1/4", "1/2/3", "1 / 2"])
def test_what_is_no_part_is_refused_in_one_sentence(text, monkeypatch):
    monkeypatch.setenv("SCBERT_PART", text)
    with pytest.raises(ValueError, match=f"A part is written as 2/8 .* not '{text}'"):
        paths.find_part()
    with pytest.raises(ValueError, match="A part is written as 2/8"):
        start()


def test_a_part_leaves_record_and_checkpoints_to_others(monkeypatch, capsys):
    start(n_epochs=9).finish()
    write_text(start(n_epochs=9).checkpoint("job"), "of another part")
    start(n_epochs=9).path("record.json").write_text("whole")
    monkeypatch.setenv("SCBERT_PART", "2/8")
    run = start()
    assert run.path("record.json").read_text() == "whole"
    run.finish()
    assert run.path("record.json").read_text() == "whole"
    assert run.checkpoint("job").read_text() == "of another part"
    assert "No record is written" in capsys.readouterr().out


def test_runs_go_below_scbert_runs_if_that_is_set(root, monkeypatch):
    assert start().directory == root / "runs" / "demo" / "03_test"
    monkeypatch.setenv("SCBERT_RUNS", str(root / "elsewhere"))
    assert start().directory == root / "elsewhere" / "demo" / "03_test"


def test_the_root_is_found_from_a_folder_inside(root, monkeypatch):
    monkeypatch.chdir(root / "notebooks")
    assert paths.find_root() == root


def test_a_file_is_written_whole_or_stays_as_it_was(root, monkeypatch):
    file = root / "new" / "file.txt"
    write_text(file, "old")

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(OSError, match="disk full"):
        write_text(file, "new")
    assert file.read_text() == "old"
    monkeypatch.undo()
    write_text(file, "new")
    assert file.read_text() == "new"


def test_this_machines_record_is_preferred_to_the_published_one(root):
    cost = {"seconds": 1, "peak_memory_mb": 1}
    published = cost | {"notebook": "03_test", "parameters": {"profile": "demo", "seed": 0, "n_epochs": 3}}
    write_text(root / "figures" / "demo" / "03_test.json", json.dumps(published))
    write_text(
        root / "figures" / "demo" / "04_other.json", json.dumps(cost | {"notebook": "04_other", "parameters": {}})
    )
    assert read_records("demo")["03_test"] == published | {"source": "published"}
    start(n_epochs=99).finish()
    records = read_records("demo")
    assert records["03_test"]["parameters"]["n_epochs"] == 99
    assert {name: entry["source"] for name, entry in records.items()} == {
        "03_test": "this machine, changed: n_epochs",
        "04_other": "published",
    }
    assert read_records("small") == {}


def test_the_hash_of_data_sees_counts_and_names_but_not_how_they_are_stored(make_cells):
    adata = make_cells()
    expected = counts.hash_data(adata)
    dense = make_cells()
    dense.X = dense.X.toarray()
    assert counts.hash_data(dense) == expected
    unsorted = make_cells()
    unsorted.X = sparse.csr_matrix(unsorted.X.toarray()[:, ::-1])
    unsorted.X.indices = 23 - unsorted.X.indices  # the same matrix, each row stored from right to left
    unsorted.X.has_sorted_indices = False
    assert (unsorted.X.toarray() == dense.X).all()
    assert counts.hash_data(unsorted) == expected
    scbert.preprocess.tokenize(adata)
    adata.obs["more"] = 1
    assert counts.hash_data(adata) == expected
    dense.X[3, 4] += 1
    assert counts.hash_data(dense) != expected
    adata.var_names = ["geneX", *adata.var_names[1:]]
    assert counts.hash_data(adata) != expected


def test_a_figure_is_stamped_with_its_profile_and_comes_with_its_data():
    from matplotlib.figure import Figure

    run = start(profile="small")
    figure = Figure()
    figure.subplots().plot([1, 2])
    run.save_figure(figure, "fig1", pd.DataFrame({"x": [1, 2]}))
    assert {path.name for path in run.path("fig1.png").parent.iterdir()} == {"fig1.png", "fig1.svg", "fig1.csv"}
    assert [text.get_text() for text in figure.texts] == ["small profile"]
    assert pd.read_csv(run.path("fig1.csv"))["x"].tolist() == [1, 2]
    assert b"<dc:date>" not in run.path("fig1.svg").read_bytes()


def test_the_memory_of_a_run_is_the_most_of_its_processes():
    run = start()
    run.earlier_memory_mb = 1e6
    run.finish()
    assert json.loads(run.path("record.json").read_text())["peak_memory_mb"] == 1e6


def test_the_seconds_of_an_interrupted_run_are_all_of_them(tmp_path, monkeypatch):
    monkeypatch.setenv("SCBERT_RUNS", str(tmp_path))
    run = Run("03_test", {"profile": "demo", "seed": 0, "__annotations__": {"profile": str, "seed": int}})
    run.earlier_seconds = 5000.0
    run.finish()
    assert json.loads(run.path("record.json").read_text())["seconds"] >= 5000


def test_the_card_says_how_a_model_was_trained(tmp_path, monkeypatch):
    monkeypatch.setenv("SCBERT_RUNS", str(tmp_path))
    run = Run("03_test", {"profile": "demo", "seed": 0, "__annotations__": {"profile": str, "seed": int}})
    assert "Training:" not in run.write_card("A model")
    assert "\nTraining:\n- 12 cells seen\n- slowly\n\nMetrics" in run.write_card(
        "A model", notes=["12 cells seen", "slowly"]
    )


def leave(seed):
    """Let a run leave a model and a table, and return it unfinished."""
    run = start(seed=seed)
    write_text(run.path("annotator") / "config.json", str(seed))
    run.save_table(pd.DataFrame({"seed": [seed]}), "table")
    return run


def read(folder):
    """Return the seeds that model, table and record in a folder are of."""
    record = json.loads((folder / "record.json").read_text())
    return (
        int((folder / "annotator" / "config.json").read_text()),
        pd.read_csv(folder / "table.csv")["seed"][0],
        record["seed"],
    )


def test_a_run_takes_the_place_of_the_one_before_when_it_has_finished(root):
    leave(1).finish()
    run = leave(2)
    assert read(run.directory) == (1, 1, 1)
    run.finish()
    assert read(run.directory) == (2, 2, 2)
    assert run.path("table.csv") == run.directory / "table.csv"
    assert sorted(path.name for path in run.directory.iterdir()) == [".lock", "annotator", "record.json", "table.csv"]


def test_what_a_run_that_did_not_finish_left_is_not_the_next_ones(root):
    leave(1)
    run = start()
    run.save_table(pd.DataFrame({"seed": [2]}), "other")
    run.finish()
    assert sorted(path.name for path in run.directory.iterdir()) == [".lock", "other.csv", "record.json"]


@pytest.mark.parametrize("read_again", [start, lambda: read_records("demo")])
def test_a_run_that_was_killed_while_it_took_its_place_takes_it_later(root, read_again, monkeypatch):
    leave(1).finish()
    run, replace = leave(2), os.replace

    def stop(source, target):
        if source.name == "record.json":
            raise KeyboardInterrupt
        replace(source, target)

    with monkeypatch.context() as context, pytest.raises(KeyboardInterrupt):
        context.setattr(os, "replace", lambda source, target: stop(Path(source), target))
        run.finish()
    run._held.release(force=True)  # as the end of its process does
    read_again()
    assert read(run.directory) == (2, 2, 2)
    assert not (run.directory / "unfinished" / "record.json").exists()


def test_a_run_that_is_refused_before_it_writes_leaves_what_was_there(root):
    run = start()
    write_text(run.path("annotator") / "config.json", "{}")
    run.finish()
    later = start()
    there = [".lock", "annotator", "record.json"]
    assert sorted(path.name for path in run.directory.iterdir()) == there
    later.path("jobs")  # the work begins, and what is there is of the run before
    assert sorted(path.name for path in run.directory.iterdir()) == [*there, "unfinished"]


def test_a_run_that_is_refused_after_one_that_was_killed_leaves_the_mark_of_that_one(root):
    run = start()
    write_text(run.path("annotator") / "config.json", "{}")
    run.finish()
    write_text(start().path("scores.csv"), "of a run that did not finish")
    start()  # refused by a later cell
    assert paths.say_unfinished(run.directory / "annotator")
    again = start()
    again.path("jobs")
    assert not again.path("scores.csv").exists()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
@pytest.mark.parametrize("name", ["", "jobs", "annotator"])
def test_a_folder_that_can_not_be_written_to_is_named_before_any_work(root, name):
    run = start()
    run.path("annotator").mkdir()
    run.path("jobs").mkdir()
    run.finish()
    shut = run.directory / name
    shut.chmod(0o555)
    try:
        with pytest.raises(ValueError, match=f"Nothing can be written to {shut} .permission denied.: set SCBERT_RUNS"):
            start()
    finally:
        shut.chmod(0o755)


def test_a_folder_that_can_not_be_made_is_named(root, monkeypatch):
    (root / "file").touch()
    monkeypatch.setenv("SCBERT_RUNS", str(root / "file"))
    with pytest.raises(ValueError, match="Nothing can be written to .*file.*: set SCBERT_RUNS"):
        start()


def test_in_one_process_the_later_of_two_runs_takes_the_place_of_the_other(root):
    one, two = start(), start()
    two.save_table(pd.DataFrame({"x": [1]}), "t")
    with pytest.raises(ValueError, match="This run of 03_test has ended: a later one took its place"):
        one.finish()
    two.finish()
    assert two.path("t.csv").exists()


def test_two_processes_do_not_run_one_notebook_at_once(root):
    run = start()
    run.finish()
    hold = "import filelock, sys; lock = filelock.FileLock(sys.argv[1]); lock.acquire(); print(); sys.stdin.read()"
    command = [sys.executable, "-c", hold, str(run.directory / ".lock")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        other.stdout.readline()
        with pytest.raises(ValueError, match=r"Another run of 03_test is writing into .*03_test: wait for it, end it"):
            start()
        assert (run.directory / "record.json").exists()
    start().finish()


@pytest.mark.parametrize(
    ("cell", "written"),
    [
        ("=1+1", "'=1+1"),
        ("@a", "'@a"),
        ("-0.5", "-0.5"),
        ("+", "'+"),
        ("-1e-05", "-1e-05"),
        ("-T", "'-T"),
        ("T-", "T-"),
    ],
)
def test_no_label_of_a_table_is_a_formula(cell, written):
    run = start()
    run.save_table(pd.DataFrame({"label": [cell], "x": [1]}, index=pd.MultiIndex.from_tuples([(cell, 2)])), "t")
    assert run.path("t.csv").read_text() == f",,label,x\n{written},2,{written},1\n"


@pytest.mark.parametrize("text", ["", "{}", "[1]", "\x00", '{"notebook": "03_test"}'])
def test_a_damaged_record_is_named_and_counts_as_absent(root, text):
    run = start()
    run.finish()
    (run.directory / "record.json").write_text(text)
    with pytest.warns(UserWarning, match=r"record.json is damaged .* and counts as absent: run its notebook again"):
        assert "03_test" not in read_records("demo")
