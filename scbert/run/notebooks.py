"""Running a notebook by papermill, its parameters checked before a kernel starts."""

import contextlib
import difflib
import os
import re
import shutil
import sys
import tempfile
import threading
import time
from pathlib import Path

import click
import filelock
import psutil

from ..paths import PartDone, count_processes, find_part, find_rank, find_root, is_clone, is_held, say_held, write_text
from . import preflight
from .parameters import check_parameters


def choose_part(source: Path, given: str | None) -> tuple[int, int] | None:
    """Return the part of the benchmark that was asked for, by --part or $SCBERT_PART, checked; None for the whole."""
    if given is not None:
        os.environ["SCBERT_PART"] = given or "nothing"  # inherited by the kernel
    try:
        part = find_part()
    except ValueError as error:
        raise click.ClickException(f"{error} Nothing was run.") from None
    if part is not None and not preflight.has_benchmark(source):
        raise click.ClickException(f"{source.stem} has no benchmark to share out: leave out --part. Nothing was run.")
    if part is not None and count_processes() > 1:
        raise click.ClickException(
            "A part is a single process: start it without torchrun, or by srun --ntasks 1. Nothing was run."
        )
    return part


def run_part(source: Path, output: Path, parameters: dict) -> None:
    """Run a notebook until its part of the benchmark is computed, and say so in a file beside `output`, for Snakemake."""
    done = output.with_suffix(".done")
    done.unlink(missing_ok=True)
    output.parent.mkdir(parents=True, exist_ok=True)
    message = execute(source, output, parameters)
    if message is None:
        raise click.ClickException(
            f"{source.stem} ran to its end without a benchmark to share out: run it without --part. Nothing is lost."
        )
    write_text(done, f"{message}\n")
    click.echo(message)


def run_beside(source: Path, parameters: dict) -> None:
    """Run a notebook in another than the first process of torchrun or srun: it joins in training and leaves nothing."""
    with tempfile.TemporaryDirectory() as folder:
        os.environ["SCBERT_RUNS"] = folder
        execute(source, Path(folder) / source.name, parameters, progress=False)


def check_clone(command: str) -> None:
    """Stop in a sentence where there is no clone: the notebooks and their profiles don't come with the package."""
    root = find_root()
    if not is_clone(root):
        raise click.ClickException(
            f"{command} needs a clone of the repository, whose notebooks do not come with the package: none was found "
            f"from {root} upwards. Get one by git clone, and start scbert inside it."
        )


def check_room(profile, notebooks=None, parameters=None, *, jobs=1, parts=1, anyway=False):
    """Print what is needed, but for a demo, and stop in a sentence if this machine is short of it."""
    if notebooks is None:
        check_clone("scbert preflight")
    try:
        needs = preflight.list_needs(profile, notebooks, parameters)
    except ValueError as error:
        raise click.ClickException(str(error)) from None
    if needs["petaflop"].notna().any():
        needs, pace = preflight.scale_needs(needs, profile, *preflight.measure_rates())
        click.echo(pace)
    if profile != "demo" or notebooks is None:
        click.echo(preflight.describe_needs(needs))
    shortages = preflight.find_shortages(needs, profile, jobs=jobs, parts=parts)
    if shortages and not anyway:
        raise click.ClickException(" ".join([*shortages, "Nothing was run; --anyway runs it all the same."]))


def find_notebook(name: str) -> Path:
    """Return the path of the notebook with this number, stem or path; only a path needs no clone."""
    if Path(name).suffix == ".ipynb" and Path(name).is_file():
        return Path(name)
    check_clone("scbert run")
    folder = find_root() / "notebooks"
    stem = f"{int(name):02d}_" if name.isdigit() else Path(name).stem
    matches = sorted(folder.glob(f"{stem}*.ipynb"))
    if len(matches) != 1:
        known = ", ".join(path.stem for path in sorted(folder.glob("*.ipynb"))) or f"none in {folder}"
        raise click.ClickException(f"No single notebook is called {name!r}. There are: {known}.")
    return matches[0]


def read_parameters(source: Path) -> dict[str, tuple[str, str, str]]:
    """Return name -> (type, default as written, help) of a notebook's parameters cell."""
    import papermill

    found = papermill.inspect_notebook(str(source))
    return {name: (p["inferred_type_name"], p["default"], p["help"]) for name, p in found.items()}


def choose_parameters(source: Path, offered: dict, profile: str, given: dict[str, str]) -> dict:
    """Return what to inject: the profile's section for this notebook, overridden by what was given, all checked.

    "labels", a table of labels for a file without (in notebook 05 they are "any" or "shared"), is given with the dataset.
    """
    chosen = {}
    if profile != "demo":  # the demo is the defaults of the notebooks
        if not (source.parent / "profiles").is_dir():
            check_clone(f"scbert run --profile {profile}")
        try:
            sections = preflight.read_sections(source.parent, profile)
        except ValueError as error:
            raise click.ClickException(f"{error} Nothing was run.") from None
        if source.stem not in sections:
            why = f"({profile}.yaml has no section for it)"
            raise click.ClickException(f"{source.stem} has no {profile} profile yet {why}.")
        chosen = {"profile": profile} | (sections[source.stem] or {})
    if "profile" in given:
        raise click.ClickException("The profile is chosen by --profile, not by -p.")
    chosen, written = chosen | given, preflight.read_defaults(source)
    if "dataset" in offered and chosen.get("labels", "any") not in ("any", "shared"):
        chosen["dataset"] = f"{(written | chosen)['dataset']} with {chosen.pop('labels')}"
    unknown = sorted(set(chosen) - set(offered))
    if unknown:
        near = difflib.get_close_matches(unknown[0], offered)
        meant = f"Did you mean {' or '.join(near)}?" if near else f"It has: {', '.join(offered)}."
        raise click.ClickException(f"{source.stem} has no parameter {', '.join(unknown)}. {meant} Nothing was run.")
    try:
        kinds = {name: kind for name, (kind, _, _) in offered.items() if name in written | chosen}
        checked = check_parameters({name: (written | chosen)[name] for name in kinds}, kinds)
    except ValueError as error:
        raise click.ClickException(f"{error} Nothing was run.") from None
    return {name: checked[name] for name in chosen}


def execute(source: Path, output: Path, parameters: dict, progress: bool = True) -> str | None:
    """Run a notebook into `output`; return what a part of a benchmark said, None at the end.

    Until then, and for good after an error, it is ``<stem>.unfinished.ipynb`` beside it: a good one stays.
    """
    lock = filelock.FileLock(output.with_name(f".{output.stem}.lock"))  # Run takes another, in the kernel, and later
    with contextlib.suppress(filelock.Timeout):
        lock.acquire(blocking=False)
    if is_held(output.parent) or not lock.is_locked:  # its notebook there is being written
        lock.release()
        raise click.ClickException(f"{say_held(source.stem, output.parent)} Nothing was run.")
    try:
        return _execute(source, output, parameters, progress)
    finally:
        lock.release()


def _execute(source, output, parameters, progress):
    import nbformat
    import papermill
    from nbclient.exceptions import DeadKernelError
    from nbconvert.preprocessors import CoalesceStreamsPreprocessor

    message, unfinished = None, output.with_name(f"{output.stem}.unfinished.ipynb")
    _end_with(os.environ.get("SCBERT_WATCH"))
    try:
        papermill.execute_notebook(
            str(source), str(unfinished), parameters, kernel_name="python3",
            progress_bar={"file": sys.stdout} if progress else False,
            stdout_file=Bars() if progress and sys.stdout.isatty() else None,
            extra_arguments=["--HistoryManager.hist_file=:memory:", "--log-level=ERROR"],
        )  # fmt: skip
    except papermill.PapermillExecutionError as error:
        if not (error.ename == PartDone.__name__ and find_part()):
            kept = "" if find_rank() else f"\nAs far as it came: {unfinished}"
            what = f"{source.stem} stopped at cell {error.exec_count}: {error.ename}: {error.evalue}{kept}"
            raise click.ClickException(what) from None
        message = error.evalue
    except DeadKernelError:
        raise click.ClickException(
            f"The kernel of {source.stem} died, most likely killed for want of memory: close other programs, or run it on "
            "fewer cells. What it had finished is kept, and the same command goes on."
        ) from None
    executed = nbformat.read(unfinished, as_version=4)
    notebook, _ = CoalesceStreamsPreprocessor().preprocess(executed, {})  # finished bars only
    if message:  # papermill writes a warning above a cell that raised
        marked = "papermill-error-cell-tag"
        notebook.cells = [cell for cell in notebook.cells if marked not in cell.metadata.get("tags", ())]
    write_text(output, nbformat.writes(notebook))
    unfinished.unlink()
    return message


class Bars:
    """A file for what a notebook prints, which shows the newest bar in it, of a training or of jobs: cells, rate, time left."""

    def write(self, text: str) -> None:
        """Show the last bar of a text in the line of the terminal."""
        if bars := re.findall(r"([^\r\n|]*\d%)\|[^|\r\n]*\|([^\r\n]*\])", text):
            width = shutil.get_terminal_size().columns - 1
            print("\r" + "".join(bars[-1])[:width].ljust(width), end="", flush=True)

    def flush(self) -> None:
        """Do nothing: each bar is shown at once."""


def _end_with(pid):
    """End this process and its kernel within seconds of another's end: of Snakemake, which starts notebooks and names itself."""
    if not pid or not psutil.pid_exists(int(pid)):
        return
    starter = psutil.Process(int(pid))

    def watch():
        while starter.is_running() and starter.status() != psutil.STATUS_ZOMBIE:
            time.sleep(2)
        for child in psutil.Process().children(recursive=True):
            child.kill()
        os._exit(143)

    threading.Thread(target=watch, daemon=True).start()
