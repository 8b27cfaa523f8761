"""What a run of a notebook leaves behind in ``runs/<profile>/<notebook>/``, and whether its numbers hold."""

import csv
import io
import json
import os
import platform
import random
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

import filelock
import numpy as np
import pandas as pd

from ..data.counts import survey_counts
from ..model.bundle import say_licence
from ..paths import (
    find_part,
    find_root,
    make_writable,
    measure_peak_memory_mb,
    remove,
    run_directory,
    say_held,
    write_text,
)
from ..sources.datasets import part_names
from .parameters import check_parameters

TF32 = ("core", "paper")
"""Profiles in whose jobs a GPU multiplies float32 matrices in TF32, with sums in float32; a CPU never does."""
UNFINISHED = "unfinished"
"""Where the files of a run are, below its folder, until it has finished and they take their places."""
RUNS: dict[Path, "Run"] = {}
"""Folder -> the last run of this process in it, which holds its lock until it is finished."""
PACKAGES = ("scbert-companion", "torch", "performer-pytorch", "scanpy", "anndata", "scikit-learn", "numpy")


class Run:
    """One run of one notebook, named by its stem, such as "03_finetune_and_annotate".

    The namespace is ``globals()`` of the notebook: its annotated names, ``name: type = value``, are the parameters,
    ``profile`` and ``seed`` among them, checked as by `scbert run`. A run seeds Python, numpy and torch, and prints
    versions and device. Its files lie in the folder ``unfinished`` until `finish`: those of the run before stay until
    then. In a part of a benchmark (`find_part`) they stay for good, since other parts run at the same time.
    """

    def __init__(self, notebook: str, namespace: dict):
        import torch

        self.notebook = notebook
        kinds = {name: getattr(kind, "__name__", kind) for name, kind in namespace["__annotations__"].items()}
        self.parameters = check_parameters({name: namespace[name] for name in kinds}, kinds)
        namespace.update(self.parameters)  # papermill makes a number of the word 0.1
        self.profile, self.seed = self.parameters["profile"], self.parameters["seed"]
        self.tf32 = self.profile in TF32
        self.directory = run_directory(self.profile, notebook)
        make_writable(self.directory)
        self._held, self._place, self._begun = None, self.directory / UNFINISHED, False
        if not find_part():
            self._lock()
            settle(self.directory)
        self.data, self.metrics, self.checks, self.warnings = {}, {}, [], []
        self.figures = {}  # name -> number of the cell that saved it, where there are cells
        self.versions = {"python": platform.python_version()} | {name: _version(name) for name in PACKAGES}
        self.earlier_seconds = 0.0  # of an interrupted run that this one continues, and of its parts
        self.earlier_memory_mb = 0.0  # the most that one of their processes held
        self._start = time.monotonic()
        random.seed(self.seed)
        np.random.seed(self.seed)
        torch.manual_seed(self.seed)
        cpu = f"CPU, {torch.get_num_threads()} threads"
        device = torch.cuda.get_device_name() if torch.cuda.is_available() else cpu
        print(f"{notebook} | profile {self.profile} | seed {self.seed} | {device}")
        print(" | ".join(f"{name} {version}" for name, version in self.versions.items()))

    def _lock(self):
        """Hold the folder until this run, or its process, is at its end; a ValueError while another process holds it."""
        earlier = RUNS.get(self.directory)  # of this process: the notebook is run again, and the run before is no more
        self._held = earlier._held if earlier else filelock.FileLock(self.directory / ".lock")
        try:
            self._held.acquire(blocking=False)
        except filelock.Timeout:
            raise ValueError(say_held(self.notebook, self.directory)) from None
        RUNS[self.directory] = self

    def path(self, name: str) -> Path:
        """Return the path of a file of this run: of what it will leave, and of ``jobs``, which the next run finds too."""
        if not self._begun:  # not before: a run that is refused leaves all as it was, a run that did not finish too
            self._begun = True
            if self._held:
                remove(self._place)
            self._place.mkdir(exist_ok=True)
        return (self.directory if Path(name).parts[0] in ("jobs", "checkpoints") else self._place) / name

    def checkpoint(self, stage: str) -> Path:
        """Return the checkpoint file of a stage; checkpoints live until the run is finished."""
        return self.path("checkpoints") / f"{stage}.pt"

    def note_data(self, name: str, adata) -> str:
        """Put a data set and its hash on record, print its size, and return its name: of a file, the stem."""
        name = Path(part_names(str(name), " with ")[0]).stem
        self.data[name], largest = survey_counts(adata)
        counts = "fractional" if adata.uns.get("scbert", {}).get("fractional_counts") else "whole"
        size = f"{adata.n_obs:,} cells x {adata.n_vars:,} genes, {counts} counts up to {largest:,.0f}"
        print(f"{name}: {size}, sha256 {self.data[name][:12]}")
        return name

    def note_metric(self, name: str, value: float, low: float, high: float, n: int, unit: str = "") -> None:
        """Put a number on record, with its 95 % interval and the number of cells or draws behind it."""
        numbers = {"value": float(value), "low": float(low), "high": float(high)}
        if not np.isfinite(list(numbers.values())).all():
            raise ValueError(f"{name} is {numbers}: not a number to put on record.")
        self.metrics[name] = numbers | {"n": int(n), "unit": unit}

    def note_scores(self, data: str, scores: pd.DataFrame) -> None:
        """Put a table of `scbert.evaluate.score` on record, each number as ``<data>/<method>/<metric>``."""
        for (method, metric), row in scores.iterrows():
            self.note_metric(f"{data}/{method}/{metric}", *row[["value", "low", "high", "n"]])

    def write_card(self, title: str, licence: str = "", notes: Sequence[str] = ()) -> str:
        """Return a model card in markdown: data, parameters, notes, the metrics on record so far, licence.

        `licence` is that of published weights which training started from; `notes` say how it was trained.
        """
        lines = [f"# {title}", "", f"Trained by scbert-companion, notebook {self.notebook}, {self.profile} profile."]
        lines += ["", "Data:", *(f"- {name}, sha256 {digest}" for name, digest in self.data.items())]
        lines += ["", "Parameters:", *(f"- {name}: {value}" for name, value in self.parameters.items())]
        lines += ["", "Training:", *(f"- {note}" for note in notes)] if notes else []
        lines += ["", "Metrics, each with its 95 % interval:"]
        form = "- {}: {value:.3f} [{low:.3f}, {high:.3f}], n = {n}"
        lines += [form.format(name, **metric) for name, metric in self.metrics.items()]
        own = "the weights are those of whoever ran this; no published weights are in them"
        return "\n".join([*lines, "", f"Licence: {say_licence(licence) if licence else own}.", ""])

    def warn(self, sentence: str) -> None:
        """Put a warning on record, which `scbert run` repeats at its end."""
        self.warnings.append(sentence)
        print(f"Warning: {sentence}")

    def save_table(self, table: pd.DataFrame, name: str) -> None:
        """Save a table as ``<name>.csv``, in which no label is a formula to a spreadsheet."""
        rows = csv.reader(io.StringIO(table.to_csv()))
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows([_disarm(cell) for cell in row] for row in rows)
        write_text(self.path(f"{name}.csv"), text.getvalue())

    def save_figure(self, figure, name: str, table: pd.DataFrame) -> None:
        """Stamp a figure with its profile and save it as PNG and SVG, with its source data as CSV."""
        import matplotlib

        figure.text(1, -0.01, f"{self.profile} profile", ha="right", va="top", fontsize=7, color="0.45")
        with matplotlib.rc_context({"svg.hashsalt": "scbert"}):
            figure.savefig(self.path(f"{name}.svg"), bbox_inches="tight", metadata={"Date": None})
        figure.savefig(self.path(f"{name}.png"), bbox_inches="tight", dpi=120)
        self.save_table(table, name)
        if "IPython" in sys.modules and (shell := sys.modules["IPython"].get_ipython()):
            shell.display_formatter.formatters["image/png"].for_type(type(figure), _draw_small)
            self.figures[name] = len(shell.user_ns["In"]) - 1  # execution_count may be the next one already

    def check(self, name: str, value: float | None = None, band: tuple[float, float] | None = None) -> None:
        """Raise an AssertionError if a number, a metric on record if None, is outside its band (low, high), both allowed.

        Without a band it is that in ``tests/expected/<notebook>.json``, skipped for other parameters than those named there.
        """
        value = float(self.metrics[name]["value"] if value is None else value)
        band = self._expected_band(name) if band is None else band
        if band is None:
            return
        low, high = map(float, band)
        passed = low <= value <= high
        self.checks.append({"name": name, "value": value, "band": [low, high], "passed": passed})
        print(f"{'ok  ' if passed else 'FAIL'} {name}: {value:.4g} in [{low:.4g}, {high:.4g}]")
        if not passed:
            raise AssertionError(f"{name} is {value:.4g}, outside its band [{low:.4g}, {high:.4g}].")

    def _expected_band(self, name):
        file = find_root() / "tests" / "expected" / f"{self.notebook}.json"
        if not file.exists() or os.environ.get("SCBERT_BANDS") == "off":  # off: while bands are measured
            print(f"--   {name}: no band was measured yet")
            return None
        expected = json.loads(file.read_text())
        others = [key for key, value in expected["parameters"].items() if self.parameters.get(key) != value]
        if others:
            print(f"--   {name}: its band was measured with other parameters ({', '.join(others)})")
            return None
        if name not in expected["metrics"]:
            raise KeyError(f"{file.name} has no band for {name}.")
        band = expected["metrics"][name]
        return band["value"] - band["tolerance"], band["value"] + band["tolerance"]

    def finish(self) -> None:
        """Write ``record.json`` and remove the checkpoints, but in a part; raise an AssertionError if a check failed.

        A ValueError if a later run of this process took the place of this one.
        """
        if self._held and RUNS[self.directory] is not self:
            raise ValueError(
                f"This run of {self.notebook} has ended: a later one took its place. Begin with the first cell."
            )
        failed = [check["name"] for check in self.checks if not check["passed"]]
        if failed:  # a notebook's later cells may have been run all the same
            raise AssertionError(f"No record is written: {', '.join(failed)} failed.")
        if find_part():
            print("No record is written: this process was to compute a part of a benchmark.")
            return
        record = {name: getattr(self, name) for name in ("notebook", "profile", "parameters", "seed")}
        record |= {
            "git_commit": _git_commit(),
            "versions": self.versions,
            "data": self.data,
            "seconds": round(time.monotonic() - self._start + self.earlier_seconds, 1),
            "peak_memory_mb": max(measure_peak_memory_mb(), self.earlier_memory_mb),
            "metrics": self.metrics,
            "checks": self.checks,
            "figures": self.figures,
        } | ({"warnings": self.warnings} if self.warnings else {})
        write_text(self.path("record.json"), json.dumps(record, indent=1, allow_nan=False) + "\n")
        settle(self.directory)
        self._place = self.directory
        remove(self.directory / "checkpoints")
        self._held.release(force=True)
        print(f"{len(self.metrics)} metrics and {len(self.checks)} checks on record.")


def settle(folder: Path) -> None:
    """Let the files of a run that has finished, its record last, take the places of the run's before; call it again if killed."""
    staged = folder / UNFINISHED
    if not (staged / "record.json").exists():
        return
    for file in sorted(staged.iterdir(), key=lambda file: file.name == "record.json"):
        if file.is_dir():
            remove(folder / file.name)
        os.replace(file, folder / file.name)
    staged.rmdir()


def _disarm(cell):
    """Return what begins as a formula of a spreadsheet does, and is no number, with an apostrophe before it."""
    is_number = re.fullmatch(r"[+-]?(\d+\.?\d*(e[+-]?\d+)?|inf)", cell)
    return f"'{cell}" if cell.startswith(("=", "+", "-", "@", "\t", "\r")) and not is_number else cell


def _version(package):
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _git_commit():
    command = ["git", "-C", str(find_root()), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10).stdout.strip() or "unknown"
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"


def _draw_small(figure):
    """Return the picture of a figure in a notebook, of 256 colours: a third of the bytes."""
    from IPython.core.pylabtools import print_figure
    from PIL import Image

    picture, small = Image.open(io.BytesIO(print_figure(figure))).convert("RGB"), io.BytesIO()
    picture.quantize(256, dither=Image.Dither.NONE).save(small, "png", optimize=True)
    return small.getvalue()
