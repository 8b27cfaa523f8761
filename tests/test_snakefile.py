"""What Snakemake plans: one job a notebook, and a job for each part of a benchmark."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("snakemake") is None, reason="Snakemake is not installed: make reproduce installs it"
)


@pytest.fixture
def plan(tmp_path):
    """Return a function that plans the runs of a small project; it returns the exit status and what was said."""
    shutil.copy(ROOT / "Snakefile", tmp_path)
    (tmp_path / "notebooks" / "profiles").mkdir(parents=True)
    for name in ("01_other", "04_benchmark"):
        (tmp_path / "notebooks" / f"{name}.ipynb").write_text("{}")
    (tmp_path / "scbert" / "encoders" / "tiny").mkdir(parents=True)
    (tmp_path / "scbert" / "encoders" / "tiny" / "config.json").write_text("{}")
    profiles = tmp_path / "notebooks" / "profiles"
    (profiles / "small.yaml").write_text("01_other: {}\n04_benchmark: {}\n")
    (profiles / "paper.yaml").write_text("01_other: {}\n")
    (profiles / "needs.yaml").write_text("small:\n  04_benchmark: {minutes: 90, memory_gb: 3, gpu_memory_gb: 8}\n")

    def run(*config):
        command = [sys.executable, "-m", "snakemake", "--dry-run", "--cores", "2", "--config", *config]
        environment = {name: value for name, value in os.environ.items() if name != "SCBERT_RUNS"}
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        return done.returncode, done.stdout + done.stderr

    return run


def read_jobs(output):
    """Return rule -> the text on each of its jobs."""
    jobs = {}
    for rule, text in re.findall(r"^rule (\w+):\n((?: {4}.*\n)+)", output, re.M):
        jobs.setdefault(rule, []).append(text)
    return jobs


def test_four_parts_are_four_jobs_which_the_notebook_waits_for(plan):
    status, output = plan("profile=small", "parts=4")
    assert status == 0, output
    jobs = read_jobs(output)
    files = [f"runs/small/04_benchmark/parts/{i + 1}of4.done" for i in range(4)]
    assert sorted(re.search("output: (.*)", text).group(1) for text in jobs["part"]) == files
    for text in jobs["part"]:
        assert "threads: " not in text  # one, which Snakemake does not print
        assert "runtime=40, mem_mb=4000," in text  # a fourth of 120 minutes, and ten
        assert "gpu=1" in text
        assert "scbert/encoders/tiny/config.json" in text
    other, benchmark = sorted(jobs["notebook"], key=lambda text: "04_benchmark" in text)
    assert all(file in benchmark for file in files)
    assert "parts/" not in other
    assert "gpu=" not in other


def test_without_parts_there_are_only_notebooks(plan):
    status, output = plan("profile=small", "parts=1")
    assert status == 0, output
    jobs = read_jobs(output)
    assert "part" not in jobs
    assert len(jobs["notebook"]) == 2
    assert "parts/" not in output
    assert "runtime=130, mem_mb=4000," in output


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (["profile=small", "parts=many"], "parts must be a number of at least 1, not 'many'."),
        (["profile=small", "parts=0"], "parts must be a number of at least 1, not 0."),
        (["profile=paper", "parts=4"], "which have no paper profile: leave them out."),
    ],
)
def test_parts_that_cannot_be_are_refused_in_one_sentence(plan, config, message):
    status, output = plan(*config)
    assert status == 1
    assert message in output
