"""What a run of a notebook leaves behind: where it goes, what is in it, and whether its numbers hold.

The only module that knows paths. Everything a run makes goes to ``runs/<profile>/<notebook>/``.
"""

import hashlib
import json
import os
import platform
import random
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

import numpy as np
import pandas as pd

PACKAGES = ("scbert-companion", "torch", "performer-pytorch", "scanpy", "anndata", "scikit-learn", "numpy")


def find_root() -> Path:
    """Return the folder that holds ``notebooks/`` and ``Snakefile``: up from here, else beside the package, else here."""
    here = Path.cwd()
    for folder in (here, *here.parents, Path(__file__).resolve().parent.parent):
        if (folder / "notebooks").is_dir() and (folder / "Snakefile").is_file():
            return folder
    return here


def find_file(path: str | Path) -> Path:
    """Return a path as given from the current folder or, if nothing is there, from the root: notebooks start elsewhere."""
    return Path(path) if Path(path).exists() or not (find_root() / path).exists() else find_root() / path


def count_processes() -> int:
    """Return how many processes torchrun or srun started for this program, this one included: 1 without them."""
    return int(os.environ.get("WORLD_SIZE") or os.environ.get("SLURM_STEP_NUM_TASKS") or 1)


def find_rank() -> int:
    """Return the number of this process among those of `count_processes`."""
    return int(os.environ.get("RANK") or os.environ.get("SLURM_PROCID") or 0) if count_processes() > 1 else 0


class PartDone(Exception):
    """What ends the notebook of a part of a benchmark: its share of the jobs is computed, as its one line says."""

    def _render_traceback_(self):  # asked for by IPython: no traceback, since nothing failed
        return [f"PartDone: {self}"]


def find_part() -> tuple[int, int] | None:
    """Return which part of a benchmark's jobs this process computes and of how many, from $SCBERT_PART; None if all.

    (2, 8) for "2/8", the second of eight: `scbert run 04 --part 2/8`.

    Raises
    ------
    ValueError
        The variable is no such part.
    """
    text = os.environ.get("SCBERT_PART")
    if not text:
        return None
    found = re.fullmatch("([0-9]+)/([0-9]+)", text)
    part, n_parts = map(int, found.groups()) if found else (0, 0)
    if not 1 <= part <= n_parts:
        raise ValueError(f"A part is written as 2/8 (the second of eight, at most 8/8), not {text!r}.")
    return part, n_parts


def run_directory(profile: str, notebook: str) -> Path:
    """Return where a notebook's results go: ``runs/<profile>/<notebook>`` below the root, or below $SCBERT_RUNS."""
    return Path(os.environ.get("SCBERT_RUNS") or find_root() / "runs") / profile / notebook


def write_text(path: Path, text: str) -> None:
    """Write a file in one step: it is there whole, or as it was before."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    temporary.write_text(text)
    os.replace(temporary, path)


def first_line(error: Exception) -> str:
    """Return what an error says, in one line."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def read_records(profile: str) -> dict[str, dict]:
    """Return notebook -> record: this machine's run where there is one, else the published one.

    Each has a further entry "source": "this machine", with the names of parameters that differ from those of the
    published run, or "published".
    """
    records = {}
    published = sorted((find_root() / "figures" / profile).glob("*.json"))
    own = sorted(run_directory(profile, "x").parent.glob("*/record.json"))
    for source, files in (("published", published), ("this machine", own)):
        for file in files:
            record = json.loads(file.read_text())
            usual = records.get(record["notebook"], record)["parameters"]
            changed = [name for name, value in record["parameters"].items() if usual.get(name) != value]
            note = f", changed: {', '.join(changed)}" if changed else ""
            records[record["notebook"]] = record | {"source": source + note}
    return records


def hash_data(adata) -> str:
    """Return the sha256 of the counts, cell names and gene names."""
    from ..data.preprocess import iterate_rows

    digest = hashlib.sha256("\n".join([*adata.obs_names, "", *adata.var_names]).encode())
    for _, rows in iterate_rows(adata):
        rows.sort_indices()
        for array in (rows.indptr.astype("<i8"), rows.indices.astype("<i8"), rows.data.astype("<f8")):
            digest.update(array.tobytes())
    return digest.hexdigest()


def say_licence(licence: str) -> str:
    """Say on a model card what follows from weights that training started from."""
    return f"it started from weights under {licence}, and is not to be passed on under another licence"


class Run:
    """One run of one notebook.

    Parameters
    ----------
    notebook
        The notebook's stem, such as "03_finetune_and_annotate".
    namespace
        ``globals()`` of the notebook: its annotated names, ``name: type = value``, are the parameters. ``profile``
        and ``seed`` must be among them.

    It seeds Python, numpy and torch, and prints versions and device. In a part of a benchmark (`find_part`) it leaves
    the record as it is, since other parts run at the same time.
    """

    def __init__(self, notebook: str, namespace: dict):
        import torch

        self.notebook = notebook
        self.parameters = {name: namespace[name] for name in namespace["__annotations__"]}
        self.profile, self.seed = self.parameters["profile"], self.parameters["seed"]
        self.directory = run_directory(self.profile, notebook)
        self.directory.mkdir(parents=True, exist_ok=True)
        if not find_part():
            (self.directory / "record.json").unlink(missing_ok=True)  # an unfinished run has no record
        self.data, self.metrics, self.checks = {}, {}, []
        self.versions = {"python": platform.python_version()} | {name: _version(name) for name in PACKAGES}
        self.earlier_seconds = 0.0  # of an interrupted run that this one continues, and of its parts
        self.earlier_memory_mb = 0.0  # the most that one of their processes held
        self._start = time.monotonic()
        random.seed(self.seed)
        np.random.seed(self.seed)
        torch.manual_seed(self.seed)
        device = (
            torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
        )
        print(f"{notebook} | profile {self.profile} | seed {self.seed} | {device}")
        print(" | ".join(f"{name} {version}" for name, version in self.versions.items()))

    def path(self, name: str) -> Path:
        """Return the path of a file of this run."""
        return self.directory / name

    def checkpoint(self, stage: str) -> Path:
        """Return the checkpoint file of a stage; checkpoints live until the run is finished."""
        return self.directory / "checkpoints" / f"{stage}.pt"

    def note_data(self, name: str, adata) -> str:
        """Put a data set and its hash on record, print its size, and return its name: of a file, the stem."""
        from ..data.preprocess import iterate_rows

        name = Path(name).stem
        self.data[name] = hash_data(adata)
        largest = max(rows.max() for _, rows in iterate_rows(adata))
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

        `licence` is that of weights which training started from, where they are published ones: `encoder.licence`;
        `notes` are lines on how it was trained.
        """
        lines = [f"# {title}", "", f"Trained by scbert-companion, notebook {self.notebook}, {self.profile} profile."]
        lines += ["", "Data:", *(f"- {name}, sha256 {digest}" for name, digest in self.data.items())]
        lines += ["", "Parameters:", *(f"- {name}: {value}" for name, value in self.parameters.items())]
        lines += ["", "Training:", *(f"- {note}" for note in notes)] if notes else []
        lines += ["", "Metrics, each with its 95 % interval:"]
        lines += [
            f"- {k}: {m['value']:.3f} [{m['low']:.3f}, {m['high']:.3f}], n = {m['n']}" for k, m in self.metrics.items()
        ]
        own = "the weights are those of whoever ran this; no published weights are in them."
        theirs = f"{say_licence(licence)}."
        return "\n".join([*lines, "", f"Licence: {theirs if licence else own}", ""])

    def save_table(self, table: pd.DataFrame, name: str) -> None:
        """Save a table as ``<name>.csv``."""
        write_text(self.path(f"{name}.csv"), table.to_csv())

    def save_figure(self, figure, name: str, table: pd.DataFrame) -> None:
        """Stamp a figure with its profile and save it as PNG and SVG, with its source data as CSV."""
        import matplotlib

        figure.text(1, -0.01, f"{self.profile} profile", ha="right", va="top", fontsize=7, color="0.45")
        with matplotlib.rc_context({"svg.hashsalt": "scbert"}):
            figure.savefig(self.path(f"{name}.svg"), bbox_inches="tight", metadata={"Date": None})
        figure.savefig(self.path(f"{name}.png"), bbox_inches="tight", dpi=120)
        self.save_table(table, name)

    def check(self, name: str, value: float | None = None, band: tuple[float, float] | None = None) -> None:
        """Raise an AssertionError if a number is outside its band.

        Parameters
        ----------
        name
            What is checked; a metric on record if `value` is None.
        band
            (low, high), both allowed; if None, the one measured for this metric in
            ``tests/expected/<notebook>.json``, which holds for the parameters named there and is skipped for others.
        """
        value = float(self.metrics[name]["value"] if value is None else value)
        if band is None:
            band = self._expected_band(name)
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
        """Write ``record.json`` and remove the checkpoints, but in a part; raise an AssertionError if a check failed."""
        failed = [check["name"] for check in self.checks if not check["passed"]]
        if failed:  # a notebook's later cells may have been run all the same
            raise AssertionError(f"No record is written: {', '.join(failed)} failed.")
        if find_part():
            print("No record is written: this process was to compute a part of a benchmark.")
            return
        record = {
            "notebook": self.notebook,
            "profile": self.profile,
            "parameters": self.parameters,
            "seed": self.seed,
            "git_commit": _git_commit(),
            "versions": self.versions,
            "data": self.data,
            "seconds": round(time.monotonic() - self._start + self.earlier_seconds, 1),
            "peak_memory_mb": max(measure_peak_memory_mb(), self.earlier_memory_mb),
            "metrics": self.metrics,
            "checks": self.checks,
        }
        write_text(self.path("record.json"), json.dumps(record, indent=1, allow_nan=False) + "\n")
        shutil.rmtree(self.directory / "checkpoints", ignore_errors=True)
        print(f"{len(self.metrics)} metrics and {len(self.checks)} checks on record.")


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


def measure_peak_memory_mb() -> float:
    """Return the most memory this process has held so far, in MB."""
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(peak / (2**20 if sys.platform == "darwin" else 2**10), 1)
