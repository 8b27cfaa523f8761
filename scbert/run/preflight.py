"""Before hours of computing: what the notebooks of a profile need, and whether this machine has it."""

import ast
import contextlib
import json
import os
import re
import shutil
import timeit
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import joblib
import pandas as pd
import psutil
import yaml

from ..paths import find_root, first_line, run_directory
from ..sources import datasets
from ..sources.download import cache_directory, format_bytes
from .record import TF32
from .report import read_records

GB = 10**9
RATE = 60e12  # FLOP/s that the minutes of needs.yaml are for where multiplies were counted
SHARE = 0.3  # of a device's own rate of multiplies, assumed: trainings on a GPU were not measured
NUMBERS = ["minutes", "memory_gb", "gpu_memory_gb", "disk_gb", "petaflop", "cache_gb"]


def list_needs(
    profile: str, notebooks: Sequence[str | Path] | None = None, parameters: dict | None = None
) -> pd.DataFrame:
    """List what each notebook of a profile needs.

    Time and memory are those of a finished run where there is one, of this machine before the published one; else,
    and for GPU memory and disk, they are as stated in ``notebooks/profiles/needs.yaml``. Downloads are the catalogue
    sets named by the notebook's parameters, and those under `data` in ``needs.yaml``, that are not here yet.

    Notebooks are given by stem or path; None is all of `read_sections`. `parameters` were chosen on the command line,
    beyond the profile's section, for all notebooks alike. No such profile or notebook is a ValueError.

    Returns
    -------
    One row a notebook: minutes, memory_gb, gpu_memory_gb, disk_gb (GB of 10^9 bytes, NaN where nothing is known),
    petaflop and cache_gb (multiplies counted, and what frozen layers take where there is room; NaN where not counted),
    basis (where these come from), files (to be downloaded: url, bytes), by_hand (sets to be downloaded by hand).
    """
    root = find_root()
    stated = _read_yaml(root / "notebooks" / "profiles" / "needs.yaml").get(profile) or {}
    sections = read_sections(root / "notebooks", profile)
    measured = read_records(profile)
    rows = {}
    for notebook in sections if notebooks is None else notebooks:
        stem = Path(notebook).stem
        source = Path(notebook) if Path(notebook).is_file() else root / "notebooks" / f"{stem}.ipynb"
        if not source.is_file():
            raise ValueError(f"There is no notebook {stem} in {source.parent}.")
        chosen = read_defaults(source) | (sections.get(stem) or {}) | (parameters or {})
        entry = stated.get(stem) or {}
        row = {name: float(entry.get(name, "nan")) for name in NUMBERS}
        row["basis"] = entry.get("basis", "not known")
        if stem in measured:
            found = measured[stem]
            row["minutes"], row["memory_gb"] = found["seconds"] / 60, found["peak_memory_mb"] * 2**20 / GB
            used = found["parameters"] | {name: chosen[name] for name in ("profile", "seed") if name in chosen}
            changed = [name for name in chosen if used.get(name) != chosen[name]]
            row["petaflop"], row["basis"] = float("nan"), f"measured, {found['source'].split(',')[0]}"
            row["basis"] += f", with another {' and '.join(changed)}" if changed else ""
        row["files"], row["by_hand"] = _find_downloads([*_name_entries(chosen), *entry.get("data", [])])
        rows[stem] = row
    columns = [*NUMBERS, "basis", "files", "by_hand"]
    table = pd.DataFrame.from_dict(rows, orient="index", columns=columns).rename_axis("notebook")
    return table.astype(dict.fromkeys(NUMBERS, float))  # of no notebook too


def measure_rates() -> tuple[str, dict[str, float]]:
    """Return this machine's device, and the FLOP/s of a large square multiply by precision, the best of six."""
    import torch

    has_gpu, on_gpu, rates = torch.cuda.is_available(), torch.backends.cuda.matmul, {}
    x = torch.rand([8192 if has_gpu else 1024] * 2, device="cuda" if has_gpu else "cpu")
    for kind in ("float32", "TF32", "bfloat16") if has_gpu else ("float32",):
        on_gpu.allow_tf32 = kind == "TF32"
        y = x.bfloat16() if kind == "bfloat16" else x
        rates[kind] = 2 * len(x) ** 3 / min(timeit.repeat(lambda y=y: float((y @ y)[0, 0]), number=1, repeat=6))
    on_gpu.allow_tf32 = False
    return torch.cuda.get_device_name() if has_gpu else "CPU", rates


def scale_needs(needs: pd.DataFrame, profile: str, device: str, rates: dict[str, float]) -> tuple[pd.DataFrame, str]:
    """Return `list_needs` with the minutes of counted multiplies at the rate of a GPU (else at `RATE`), and hours in words."""
    kind = "TF32" if "TF32" in rates and profile in TF32 else "float32"
    pace, flop = SHARE * rates[kind], needs["petaflop"].dropna() * 1e15
    found = ", ".join(f"{rate / 1e12:.3g} TFLOP/s in {name}" for name, rate in rates.items())
    lines = [f"{device} multiplies {found}; trainings, assumed: {SHARE} of {kind}, {pace / 1e12:.3g} TFLOP/s."]
    for name, number in flop.items():
        hours = f"{number / RATE / 3600:,.1f} hours at {RATE / 1e12:.0f} TFLOP/s, {number / pace / 3600:,.1f} here"
        lines.append(f"{name}: {number / 1e15:,.0f} PFLOP at most, {hours}")
    lines.append(f"Frozen layers take {needs['cache_gb'].max():.0f} GB of disk at most, a tenth of which stays free.")
    if device != "CPU":
        needs = needs.assign(minutes=needs["minutes"].add(flop / 60 * (1 / pace - 1 / RATE), fill_value=0))
        needs.loc[flop.index, "basis"] = f"multiplies counted, at {SHARE} of the rate measured here in {kind}"
    return needs, "\n".join(lines)


def read_defaults(source: Path) -> dict:
    """Return name -> value of a notebook's parameters cell, of those that are literals."""
    values = {}
    for cell in json.loads(source.read_text())["cells"]:
        if "parameters" in cell.get("metadata", {}).get("tags", ()):
            for line in ast.parse("".join(cell["source"])).body:
                with contextlib.suppress(ValueError, AttributeError):  # no literal, or no `name: type = value`
                    values[line.target.id] = ast.literal_eval(line.value)
    return values


def has_benchmark(source: Path) -> bool:
    """Say whether a notebook calls `scbert.runner.run`, whose jobs can be shared out over processes."""
    return source.is_file() and "runner.run(" in source.read_text()


def _read_yaml(path):
    """Return the sections of a YAML file, empty without it; a ValueError that names file and line for what is none."""
    try:
        found = (yaml.safe_load(path.read_text(encoding="utf-8")) or {}) if path.is_file() else {}
    except (yaml.YAMLError, UnicodeError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        raise ValueError(f"{path}{where} is no YAML: {getattr(error, 'problem', None) or first_line(error)}.") from None
    if not isinstance(found, dict) or not all(isinstance(section, dict | None) for section in found.values()):
        raise ValueError(f"{path} must have a name for each section, and below it lines such as 'n_epochs: 3'.")
    return found


def read_sections(folder: Path, profile: str) -> dict[str, dict]:
    """Return notebook -> parameters of a profile, from the folder of the notebooks; a ValueError if there is none."""
    if profile == "demo":  # the defaults of the notebooks
        return {path.stem: {} for path in sorted(folder.glob("[0-9][0-9]_*.ipynb"))}
    file = folder / "profiles" / f"{profile}.yaml"
    if not file.is_file() or profile == "needs":
        raise ValueError(f"There is no profile {profile!r}: choose demo, small, large, core or paper.")
    return _read_yaml(file)


def _name_entries(parameters):
    """Return the names that parameters which name sets, weights or collections have: other words mean something else."""
    text = {name: str(parameters.get(name, "")) for name in ("dataset", "shifts", "encoder", "gene_sets", "genes")}
    sets = [*datasets.name_sets(text["dataset"]), *datasets.name_sets(text["shifts"])]
    return [*sets, text["encoder"], *text["gene_sets"].split(), *text["genes"].split()]


def _find_downloads(names):
    """Return what is missing here of the catalogue's sets that are named."""
    files, by_hand = [], []
    for name in dict.fromkeys(names):
        entry = datasets.CATALOGUE.get(name)
        if entry and entry.get("by_hand"):
            by_hand += [name] if datasets.missing_by_hand(name) else []
        elif entry:
            files += [{"url": file["url"], "bytes": file["bytes"]} for file in datasets.missing_files(name)]
    return files, by_hand


def measure_resources(profile: str, *, gpu: bool = False) -> dict[str, float]:
    """Return what is free here, in GB: memory_gb, cache_gb and runs_gb (are they on one_disk?), with `gpu` gpu_memory_gb.

    The GPU is the one with most free memory, 0 if there is none.
    """
    cache, runs = _find_existing(cache_directory()), _find_existing(run_directory(profile, "x"))
    free = {
        "memory_gb": _measure_memory() / GB,
        "cache_gb": shutil.disk_usage(cache).free / GB,
        "runs_gb": shutil.disk_usage(runs).free / GB,
        "one_disk": cache.stat().st_dev == runs.stat().st_dev,
    }
    if gpu:
        import torch

        each = [torch.cuda.mem_get_info(i)[0] for i in range(torch.cuda.device_count())]
        free["gpu_memory_gb"] = max(each, default=0) / GB
    return free


def _measure_memory():
    return min(psutil.virtual_memory().available, _measure_container())


def _measure_container(folder=Path("/sys/fs/cgroup")):
    """Return how much more a container may take, by cgroup version 2; infinity without a limit. psutil knows no containers."""
    try:
        limit = int((folder / "memory.max").read_text())  # "max" without a limit
        taken = int(re.search(r"^anon (\d+)", (folder / "memory.stat").read_text(), re.M).group(1))
    except (OSError, ValueError, AttributeError):
        return float("inf")
    return max(limit - taken, 0)


def _find_existing(folder):
    """Return the folder, or the nearest one above it that exists."""
    folder = Path(folder).absolute()
    return next(place for place in (folder, *folder.parents) if place.exists())


def _list_largest(needs, column, jobs, parts):
    """Return what the `jobs` processes that need most need, by notebook; a benchmark is one process for each part."""
    folder = find_root() / "notebooks"
    processes = [name for name in needs.index for _ in range(parts if has_benchmark(folder / f"{name}.ipynb") else 1)]
    return needs.loc[processes, column].dropna().nlargest(jobs)


def find_shortages(needs: pd.DataFrame, profile: str, *, jobs: int = 1, parts: int = 1) -> list[str]:
    """Say in a sentence each what `list_needs` asks for and this machine has not; what is not known is not counted.

    The memory of the largest `jobs` notebooks is added up; of a benchmark, each of `parts` processes holds what it needs.
    """
    free = measure_resources(profile, gpu=needs["gpu_memory_gb"].max() > 0)
    found = []
    remedies = {
        "memory_gb": ("memory", "close other programs, or take a larger machine or a smaller profile"),
        "gpu_memory_gb": ("GPU memory", "free the GPU, or take a larger one or a smaller profile"),
    }
    for column, (what, remedy) in remedies.items():
        largest = _list_largest(needs, column, jobs, parts)
        if column in free and largest.sum() > free[column]:
            times = {name: f"{n} parts of {name}" if n > 1 else name for name, n in Counter(largest.index).items()}
            names = " and ".join(f"{text} ({needs.loc[name, 'basis']})" for name, text in times.items())
            verb = "need" if len(largest) > 1 else "needs"
            there = f"{free[column]:.1f} GB are free" if free[column] else "there is none"
            found.append(f"{names} {verb} {largest.sum():.1f} GB of {what}, and {there}: {remedy}.")
    cache, runs = cache_directory(), run_directory(profile, "x").parent
    fetched, written = sum_downloads(needs)[0] / GB, needs["disk_gb"].sum()
    if free["one_disk"]:
        fetched, written = 0, fetched + written
    places = [(cache, fetched, free["cache_gb"], "SCBERT_CACHE"), (runs, written, free["runs_gb"], "SCBERT_RUNS")]
    for folder, due, there, name in places:
        if (due or name == "SCBERT_RUNS") and not os.access(_find_existing(folder), os.W_OK):
            found.append(f"Nothing can be written below {folder}: set {name} to a folder that can be.")
        if due > there:
            due, there = format_bytes(int(due * GB)), format_bytes(int(there * GB))
            found.append(
                f"{due} are to be written below {folder}, and {there} are free there: free some room, or set {name} to "
                "another disk."
            )
    for name in dict.fromkeys(name for names in needs["by_hand"] for name in names):
        found.append(f"{name} has to be downloaded by hand: scbert fetch {name} says from where.")
    return found


def count_jobs(needs: pd.DataFrame, *, parts: int = 1, most: int = 8) -> int:
    """Return how many notebooks of `list_needs` to run at once here: one a core, as memory allows; one if they need a GPU."""
    if needs["gpu_memory_gb"].max() > 0:
        return 1
    cores = range(min(most, joblib.cpu_count()), 1, -1)
    free = _measure_memory() / GB
    return next((n for n in cores if _list_largest(needs, "memory_gb", n, parts).sum() <= free), 1)


def sum_downloads(needs: pd.DataFrame) -> tuple[int, int]:
    """Return the bytes of all downloads, each file once, and how many files there are whose size is not known."""
    sizes = {file["url"]: file["bytes"] for files in needs["files"] for file in files}.values()
    return sum(size for size in sizes if size is not None), sum(size is None for size in sizes)


def describe_needs(needs: pd.DataFrame) -> str:
    """Return a table of what `list_needs` found, and a line of sums, as text for the terminal."""

    def say(value, text):
        return "?" if pd.isna(value) else text.format(value)

    def say_downloads(table):
        known, unknown = sum_downloads(table)
        parts = [format_bytes(known)] if known else []
        return " + ".join([*parts, *([f"{unknown} of unknown size"] if unknown else [])]) or "none"

    rows = [("notebook", "minutes", "memory", "GPU memory", "disk", "download", "time and memory")]
    for i, row in enumerate(needs.itertuples()):
        gpu = "none" if not row.gpu_memory_gb > 0 else f"{row.gpu_memory_gb:.1f} GB"
        numbers = [say(row.minutes, "{:.1f}"), say(row.memory_gb, "{:.1f} GB"), gpu, say(row.disk_gb, "{:.1f} GB")]
        downloads = ", ".join([say_downloads(needs.iloc[[i]]), *(f"{name} by hand" for name in row.by_hand)])
        rows.append((row.Index, *numbers, downloads.removeprefix("none, "), row.basis))
    widths = [max(map(len, column)) + 2 for column in zip(*rows, strict=True)]
    lines = ["".join(map(str.ljust, row, widths)).rstrip() for row in rows]
    untimed = needs["minutes"].isna().sum()
    total = f"{needs['minutes'].sum() / 60:.1f} hours" + (f" and {untimed} of unknown time" if untimed else "")
    return "\n".join([*lines, f"All: {len(needs)} notebooks, {total}, downloads: {say_downloads(needs)}."])
