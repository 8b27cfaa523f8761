"""What a profile needs is listed from runs, from what is stated and from the catalogue, and compared with what is free."""

import json
import os
import re
from pathlib import Path

import nbformat
import pandas as pd
import pytest
import torch
import yaml

from scbert import datasets, preflight
from scbert.paths import write_text

PARAMETERS = """
profile: str = "demo"  # the profile
dataset: str = "bundled"  # which cells
shifts: str = ""  # others
n_epochs: int = 3  # passes
rate: float = -0.5  # negative
made = 3 * 4
seed: int = 0
"""
CATALOGUE = {
    "bundled": {"files": []},
    "two_files": {"files": [{"url": "https://x/a", "bytes": 3_000_000_000}, {"url": "https://x/b", "bytes": 500_000}]},
    "unsized": {"files": [{"url": "https://x/c", "bytes": None}]},
    "handmade": {"files": [], "by_hand": {"from": "somewhere", "files": ["cells.csv"]}},
}
NEEDS = """
small:
  04_other: {minutes: 120, memory_gb: 6, gpu_memory_gb: 20, disk_gb: 2, data: [unsized], basis: "estimate, for an H100"}
"""


@pytest.fixture(autouse=True)
def root(clone, tmp_path, monkeypatch):
    """A project of two notebooks, a catalogue of four sets of which nothing is here, and no GPU in use."""
    cells = [nbformat.v4.new_markdown_cell("# Title")]
    cells += [nbformat.v4.new_code_cell(PARAMETERS, metadata={"tags": ["parameters"]}), nbformat.v4.new_code_cell("1")]
    for name in ("03_test", "04_other"):
        write_text(tmp_path / "notebooks" / f"{name}.ipynb", nbformat.writes(nbformat.v4.new_notebook(cells=cells)))
    small = "03_test: {dataset: two_files}\n04_other: {n_epochs: 7}\n"
    write_text(tmp_path / "notebooks" / "profiles" / "small.yaml", small)
    write_text(tmp_path / "notebooks" / "profiles" / "needs.yaml", NEEDS)
    for name in ("SCBERT_RUNS", "SCBERT_MIRROR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("SCBERT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(datasets, "CATALOGUE", CATALOGUE)
    return tmp_path


@pytest.fixture
def machine(monkeypatch):
    """Return a function that sets what is free, in GB."""

    def have(memory=100, disk=100, gpu=100, one_disk=True):
        free = {"memory_gb": memory, "cache_gb": disk, "runs_gb": disk, "gpu_memory_gb": gpu, "one_disk": one_disk}
        monkeypatch.setattr(preflight, "measure_resources", lambda profile, gpu: free)

    have()
    return have


def publish(root, notebook, seconds=90, megabytes=2000, profile="small", own=False, **parameters):
    used = {"profile": profile, "dataset": "two_files", "shifts": "", "n_epochs": 3, "rate": -0.5, "seed": 0}
    written = {"notebook": notebook, "seconds": seconds, "peak_memory_mb": megabytes, "parameters": used | parameters}
    file = f"runs/{profile}/{notebook}/record.json" if own else f"figures/{profile}/{notebook}.json"
    write_text(root / file, json.dumps(written))


# What is needed


def test_literals_of_the_parameters_cell_are_read(root):
    defaults = preflight.read_defaults(root / "notebooks" / "03_test.ipynb")
    assert defaults == {
        "profile": "demo", "dataset": "bundled", "shifts": "", "n_epochs": 3, "rate": -0.5, "seed": 0
    }  # fmt: skip


def test_a_profile_lists_the_notebooks_with_a_section_and_the_demo_all(root):
    assert preflight.list_needs("small").index.tolist() == ["03_test", "04_other"]
    write_text(root / "notebooks" / "profiles" / "small.yaml", "04_other: {}\n")
    assert preflight.list_needs("small").index.tolist() == ["04_other"]
    assert preflight.list_needs("demo").index.tolist() == ["03_test", "04_other"]
    assert preflight.list_needs("demo", [root / "notebooks" / "03_test.ipynb"]).index.tolist() == ["03_test"]


def test_time_and_memory_are_measured_where_a_run_was_published(root):
    publish(root, "03_test")
    row = preflight.list_needs("small").loc["03_test"]
    assert row["minutes"] == 1.5
    assert row["memory_gb"] == pytest.approx(2.097152)  # of 2,000 x 2^20 bytes
    assert row["basis"] == "measured, published"


def test_a_run_on_this_machine_comes_before_the_published_one(root):
    publish(root, "03_test")
    publish(root, "03_test", seconds=30, own=True)
    row = preflight.list_needs("small").loc["03_test"]
    assert row["minutes"] == 0.5
    assert row["basis"] == "measured, this machine"


def test_a_measurement_with_other_parameters_says_so(root):
    publish(root, "03_test", n_epochs=1, seed=5)
    assert preflight.list_needs("small").loc["03_test", "basis"] == "measured, published, with another n_epochs"
    row = preflight.list_needs("small", ["03_test"], {"n_epochs": 1, "rate": 2.0}).iloc[0]
    assert row["basis"] == "measured, published, with another rate"


def test_without_a_run_what_is_stated_counts_and_a_run_leaves_the_rest_of_it(root):
    row = preflight.list_needs("small").loc["04_other"]
    assert row[["minutes", "memory_gb", "gpu_memory_gb", "disk_gb"]].tolist() == [120, 6, 20, 2]
    assert row["basis"] == "estimate, for an H100"
    publish(root, "04_other", n_epochs=7, dataset="bundled")
    row = preflight.list_needs("small").loc["04_other"]
    assert row[["minutes", "gpu_memory_gb", "disk_gb"]].tolist() == [1.5, 20, 2]
    assert row["basis"] == "measured, published"


def test_what_nobody_knows_is_not_a_number():
    row = preflight.list_needs("small").loc["03_test"]
    assert row[["minutes", "memory_gb", "gpu_memory_gb", "disk_gb"]].isna().all()
    assert row["basis"] == "not known"


@pytest.mark.parametrize(
    ("parameters", "urls"),
    [
        ({}, ["https://x/a", "https://x/b"]),  # of the profile's section
        ({"dataset": "bundled"}, []),
        ({"dataset": "mine.h5ad"}, []),
        ({"dataset": "my two_files atlas.h5ad"}, []),  # a word of a path
        ({"dataset": "bundled", "label_key": "two_files", "held_out": "unsized"}, []),  # labels
        (
            {"dataset": "bundled", "shifts": "unsized; two_files -> bundled by kind"},
            ["https://x/c", "https://x/a", "https://x/b"],
        ),
        ({"dataset": "bundled", "shifts": "two_files + unsized"}, ["https://x/a", "https://x/b", "https://x/c"]),
    ],
)
def test_downloads_are_the_sets_that_parameters_name(parameters, urls):
    row = preflight.list_needs("small", ["03_test"], parameters).iloc[0]
    assert [file["url"] for file in row["files"]] == urls


def test_sets_that_no_parameter_names_are_stated():
    assert [file["url"] for file in preflight.list_needs("small").loc["04_other", "files"]] == ["https://x/c"]


def test_what_is_here_already_is_not_downloaded(monkeypatch):
    monkeypatch.setattr(datasets, "missing_files", lambda name: CATALOGUE[name]["files"][1:])
    needs = preflight.list_needs("small", ["03_test"])
    assert [file["url"] for file in needs.loc["03_test", "files"]] == ["https://x/b"]


def test_a_file_of_two_notebooks_is_downloaded_once():
    needs = preflight.list_needs("small", None, {"dataset": "two_files"})
    assert preflight.sum_downloads(needs) == (3_000_500_000, 1)


@pytest.mark.parametrize("profile", ["papre", "needs"])
def test_an_unknown_profile_is_refused(profile):
    with pytest.raises(ValueError, match=f"no profile '{profile}': choose demo, small, large, core or paper"):
        preflight.list_needs(profile)


def test_an_unknown_notebook_is_refused():
    with pytest.raises(ValueError, match="no notebook 09_none in"):
        preflight.list_needs("small", ["09_none"])


def test_the_table_says_what_is_known_and_what_is_not(root):
    publish(root, "03_test", seconds=3600)
    lines = preflight.describe_needs(preflight.list_needs("small", None, {"shifts": "handmade"})).splitlines()
    assert lines[0].split() == [
        *["notebook", "minutes", "memory", "GPU", "memory", "disk", "download", "time", "and", "memory"]
    ]
    assert "60.0" in lines[1] and "2.1 GB" in lines[1] and "3.0 GB" in lines[1] and "handmade by hand" in lines[1]
    assert "120.0" in lines[2] and "20.0 GB" in lines[2] and "1 of unknown size, handmade by hand" in lines[2]
    assert lines[3] == "All: 2 notebooks, 3.0 hours, downloads: 3.0 GB + 1 of unknown size."


# What is short


def say_shortages(*chosen, jobs=1):
    return " ".join(preflight.find_shortages(preflight.list_needs("small", *chosen), "small", jobs=jobs))


def test_a_machine_that_has_all_is_not_short_of_anything(machine):
    assert preflight.find_shortages(preflight.list_needs("small"), "small") == []


@pytest.mark.parametrize(
    ("free", "message"),
    [
        ({"memory": 5.9}, r"^04_other \(estimate, for an H100\) needs 6.0 GB of memory, and 5.9 GB are free: close"),
        ({"gpu": 19}, r"^04_other .* needs 20.0 GB of GPU memory, and 19.0 GB are free: free the GPU"),
        ({"gpu": 0}, r"^04_other .* needs 20.0 GB of GPU memory, and there is none: "),
        (
            {"disk": 5},
            r"^5.0 GB are to be written below .*runs.small, and 5.0 GB are free there: free some room, or set",
        ),
    ],
)
def test_what_is_short_is_refused_in_one_sentence(machine, free, message):
    machine(**free)
    said = say_shortages()
    assert re.search(message, said) and "\n" not in said


@pytest.mark.parametrize("free", [{"memory": 6.0}, {"gpu": 20}, {"disk": 5.1}])
def test_just_enough_is_enough(machine, free):
    machine(**free)
    assert say_shortages() == ""


def test_notebooks_that_run_at_once_need_their_memory_at_once(machine, root):
    publish(root, "03_test", megabytes=3000)  # 3.1 GB, beside 6 GB
    machine(memory=9)
    assert say_shortages() == ""
    due = r"04_other .* and 03_test \(measured, published\) need 9.1 GB of memory, and 9.0"
    assert re.search(due, say_shortages(jobs=2))


@pytest.mark.parametrize(
    ("cores", "free", "gpu", "expected"),
    [(1, 99, False, 1), (2, 9.2, False, 2), (2, 9, False, 1), (64, 99, False, 8), (8, 1, False, 1), (8, 99, True, 1)],
)
def test_one_notebook_a_core_runs_at_once_as_memory_allows(root, monkeypatch, cores, free, gpu, expected):
    publish(root, "03_test", megabytes=3000)  # 3.1 GB, beside 6 GB
    monkeypatch.setattr(preflight, "_measure_memory", lambda: free * preflight.GB)
    monkeypatch.setattr(preflight.joblib, "cpu_count", lambda: cores)
    needs = preflight.list_needs("small")
    assert preflight.count_jobs(needs.assign(gpu_memory_gb=20.0 if gpu else 0.0)) == expected


def test_two_disks_are_compared_each_with_its_own(machine):
    machine(disk=2.5, one_disk=False)  # 2 GB of results, 3 GB of downloads
    shortages = preflight.find_shortages(preflight.list_needs("small"), "small")
    assert len(shortages) == 1
    assert "3.0 GB are to be written below" in shortages[0] and "SCBERT_CACHE" in shortages[0]


def test_what_has_to_be_downloaded_by_hand_is_said_before_anything_runs(machine, root):
    chosen = ["03_test"], {"dataset": "handmade"}
    assert "handmade has to be downloaded by hand: scbert fetch handmade says" in say_shortages(*chosen)
    write_text(root / "cache" / "by_hand" / "handmade" / "cells.csv", "")
    assert say_shortages(*chosen) == ""


# What is there


def test_this_machine_has_memory_and_disk_and_no_gpu_is_asked_for():
    free = preflight.measure_resources("small")
    assert set(free) == {"memory_gb", "cache_gb", "runs_gb", "one_disk"}
    assert min(free["memory_gb"], free["cache_gb"], free["runs_gb"]) > 0
    assert free["one_disk"] is True  # both below one temporary folder


def test_a_gpu_is_asked_for_only_if_a_notebook_needs_one(machine, monkeypatch):
    asked, measure = [], preflight.measure_resources
    monkeypatch.setattr(preflight, "measure_resources", lambda profile, gpu: asked.append(gpu) or measure(profile, gpu))
    for names in (["03_test"], ["03_test", "04_other"]):
        preflight.find_shortages(preflight.list_needs("small", names), "small")
    assert asked == [False, True]


def test_the_gpu_with_most_free_memory_counts(monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda i: ([3 * 10**9, 7 * 10**9][i], 8 * 10**9))
    assert preflight.measure_resources("small", gpu=True)["gpu_memory_gb"] == 7
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert preflight.measure_resources("small", gpu=True)["gpu_memory_gb"] == 0


@pytest.mark.parametrize(
    ("limit", "free"), [("1000000", 600_000), ("300000", 0), ("max", float("inf")), (None, float("inf"))]
)
def test_a_container_has_its_limit_less_what_it_holds(tmp_path, limit, free):
    if limit:
        write_text(tmp_path / "memory.max", f"{limit}\n")
        write_text(tmp_path / "memory.stat", "anon 400000\nfile 900000\n")
    assert preflight._measure_container(tmp_path) == free


# Multiplies


COUNTED = """
paper:
  04_other: {minutes: 70, petaflop: 216, cache_gb: 371, memory_gb: 6, gpu_memory_gb: 20, basis: counted}
"""  # 60 minutes of multiplies at 60 TFLOP/s, and 10 of others


@pytest.fixture
def counted(root):
    write_text(root / "notebooks" / "profiles" / "paper.yaml", "03_test: {}\n04_other: {}\n")
    write_text(root / "notebooks" / "profiles" / "needs.yaml", COUNTED)
    return preflight.list_needs("paper")


def test_minutes_of_counted_multiplies_follow_from_the_rate_of_the_gpu(counted):
    rates = {"float32": 50e12, "TF32": 400e12, "bfloat16": 700e12}
    needs, said = preflight.scale_needs(counted, "paper", "H200", rates)
    assert needs.loc["04_other", "minutes"] == pytest.approx(10 + 60 * 60 / 120)
    assert needs.loc["04_other", "basis"] == "multiplies counted, at 0.3 of the rate measured here in TF32"
    assert pd.isna(needs.loc["03_test", "minutes"]) and needs.loc["03_test", "basis"] == "not known"
    assert said.splitlines() == [
        "H200 multiplies 50 TFLOP/s in float32, 400 TFLOP/s in TF32, 700 TFLOP/s in bfloat16; trainings, assumed: 0.3 of "
        "TF32, 120 TFLOP/s.",
        "04_other: 216 PFLOP at most, 1.0 hours at 60 TFLOP/s, 0.5 here",
        "Frozen layers take 371 GB of disk at most, a tenth of which stays free.",
    ]


def test_a_profile_that_stays_in_float32_is_timed_in_it(counted):
    needs, _ = preflight.scale_needs(counted, "small", "H200", {"float32": 50e12, "TF32": 400e12})
    assert needs.loc["04_other", "minutes"] == pytest.approx(10 + 60 * 60 / 15)


def test_without_a_gpu_the_minutes_are_the_stated_ones_and_the_hours_here_are_said(counted):
    needs, said = preflight.scale_needs(counted, "paper", "CPU", {"float32": 0.2e12})
    pd.testing.assert_frame_equal(needs, counted)
    assert "1.0 hours at 60 TFLOP/s, 1,000.0 here" in said


def test_the_rate_of_this_machine_is_measured():
    device, rates = preflight.measure_rates()
    assert device == "CPU" or "TF32" in rates
    assert all(1e8 < rate < 1e16 for rate in rates.values())
    assert not torch.backends.cuda.matmul.allow_tf32


def test_a_run_that_was_measured_needs_no_count(counted, root):
    publish(root, "04_other", profile="paper")
    assert preflight.list_needs("paper")["petaflop"].isna().all()


# This project


def test_every_notebook_of_a_profile_has_a_published_run_or_states_its_needs():
    root = Path(__file__).resolve().parent.parent
    stated = yaml.safe_load((root / "notebooks" / "profiles" / "needs.yaml").read_text())
    for profile in ("small", "core", "paper"):
        sections = yaml.safe_load((root / "notebooks" / "profiles" / f"{profile}.yaml").read_text())
        for name in sections:
            published = root / "figures" / profile / f"{name}.json"
            assert published.exists() or name in stated[profile], (
                f"{name} has a {profile} profile but no run of it is published: state minutes, memory_gb and basis in "
                "notebooks/profiles/needs.yaml."
            )
        for name, entry in stated[profile].items():
            assert name in sections, f"needs.yaml states what {name} needs in {profile}, which has no section for it."
            assert set(entry) <= {*preflight.NUMBERS, "data", "basis"}, name
            assert {"minutes", "memory_gb", "basis"} <= set(entry), name
            assert not pd.isna([float(entry[key]) for key in ("minutes", "memory_gb")]).any()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("03_test:\n  n_epochs: 1\n bad: [", r"small.yaml, line \d+ is no YAML"),
        ("03_test: 5\n", "small.yaml must have a name for each section"),
        ("- a\n- b\n", "small.yaml must have a name for each section"),
        ("03_test:\n  seed: 0\n\x00", "small.yaml is no YAML: unacceptable character"),
    ],
)
def test_a_profile_with_a_mistake_is_one_sentence_with_file_and_line(root, text, message):
    (root / "notebooks" / "profiles" / "small.yaml").write_text(text)
    with pytest.raises(ValueError, match=message) as error:
        preflight.read_sections(root / "notebooks", "small")
    assert "\n" not in str(error.value)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_of_runs_that_can_not_be_written_to_is_named(tmp_path, monkeypatch):
    tmp_path.chmod(0o555)
    monkeypatch.setenv("SCBERT_RUNS", str(tmp_path / "runs"))
    try:
        needs = preflight.list_needs("demo", ["11_scoreboard"])
        assert "Nothing can be written below" in " ".join(preflight.find_shortages(needs, "demo"))
    finally:
        tmp_path.chmod(0o755)
