"""Where runs and files are, and what this process is: its rank, its part of a benchmark, its memory."""

import contextlib
import glob
import hashlib
import json
import os
import re
import shutil
import sys
import time
import tomllib
from collections.abc import Iterator
from pathlib import Path


def find_root() -> Path:
    """Return the clone that the package lies in, else the one around the current folder, else the current folder."""
    here = Path.cwd()
    return next(filter(is_clone, (Path(__file__).resolve().parent.parent, here, *here.parents)), here)


def is_clone(folder: Path) -> bool:
    """Say whether a folder is a clone of this project, by what it is: others have a Snakefile and notebooks too."""
    try:
        project = tomllib.loads((folder / "pyproject.toml").read_text(encoding="utf-8")).get("project", {})
        return project.get("name") == "scbert-companion" and (folder / "notebooks").is_dir()
    except (OSError, ValueError):
        return False


def find_file(path: str | Path) -> Path:
    """Return a path as given from the current folder or, if nothing is there, from the root: notebooks start elsewhere."""
    below = find_root() / path
    return Path(path) if os.path.exists(path) or not os.path.exists(below) else below


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

    (2, 8) for "2/8", the second of eight: `scbert run 04 --part 2/8`. A ValueError if the variable is no such part.
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


def make_writable(folder: Path) -> None:
    """Make a folder if it is not there; a ValueError if nothing can be written to it, or to a folder in it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        shut = [place for place in (folder, *filter(Path.is_dir, folder.iterdir())) if not os.access(place, os.W_OK)]
        why = "permission denied"
    except OSError as error:
        shut, why = [folder], error.strerror
    if shut:
        raise ValueError(f"Nothing can be written to {shut[0]} ({why}): set SCBERT_RUNS to a folder that can be.")


def is_held(folder: Path) -> bool:
    """Say whether a run is writing into a folder now: it holds the lock in it."""
    import filelock

    try:
        if (folder / ".lock").exists():
            with filelock.FileLock(folder / ".lock", blocking=False):
                pass
    except filelock.Timeout:
        return True
    except OSError:  # of somebody else, who may
        pass
    return False


def say_held(notebook: str, folder: Path) -> str:
    """Say what to do where another run of a notebook holds its folder."""
    return (
        f"Another run of {notebook} is writing into {folder}: wait for it, end it (in JupyterLab, shut down its kernel), or "
        "set SCBERT_RUNS to another folder."
    )


def say_unfinished(model: Path) -> str:
    """Say that a model is that of the run before the newest, which has not finished, or nothing."""
    model = Path(model).resolve()
    folder, left = model.parent, model.parent / "unfinished"
    if not left.is_dir() or not (folder / ".lock").exists():
        return ""
    if is_held(folder):
        return f"A run is writing into {folder} now, and {model.name} is of the run before: wait until it has finished."
    return (
        f"The newest run in {folder} has not finished, and {model.name} is of the run before, maybe of other cells: run it "
        f"again or, to use this one all the same, remove {left}."
    )


@contextlib.contextmanager
def replace_whole(path: Path) -> Iterator[Path]:
    """Yield where to write a file that then takes the place of `path` in one step; after an error nothing is changed, or left.

    A folder can be written so where none is. What a writer that was killed left goes after an hour, with the next.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    for left in path.parent.glob(f"{glob.escape(path.name)}.*.tmp"):
        with contextlib.suppress(OSError):  # another process was faster
            if time.time() - left.stat().st_mtime > 3600:  # nobody writes to it any more
                remove(left)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    remove(temporary)
    try:
        yield temporary
        if temporary.is_file():
            with open(temporary, "rb") as file:
                os.fsync(file.fileno())  # on the disk, before it takes a name that is trusted
        os.replace(temporary, path)
    except BaseException:
        remove(temporary)
        raise


def remove(path: Path) -> None:
    """Remove a file or a folder, if there is one and it can be removed."""
    shutil.rmtree(path, ignore_errors=True)
    with contextlib.suppress(OSError):
        path.unlink()


def write_text(path: Path, text: str) -> None:
    """Write a file of text, in UTF-8, in one step: it is there whole, or as it was before."""
    with replace_whole(path) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="\n")


def hash_file(path: Path) -> str:
    """Return the sha256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def seal(said: dict) -> str:
    """Return a hash of what a file of JSON says, to be written into it, last."""
    return hashlib.sha256(json.dumps(said).encode()).hexdigest()


def first_line(error: Exception) -> str:
    """Return what an error says, in one line."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def measure_peak_memory_mb() -> float:
    """Return the most memory this process has held so far, in MB."""
    import resource  # psutil has this peak on Windows alone

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(peak / (2**20 if sys.platform == "darwin" else 2**10), 1)
