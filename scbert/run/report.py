"""The records of a profile, and its executed notebooks as pages."""

import contextlib
import json
import warnings
from pathlib import Path

import filelock
import pandas as pd

from ..paths import find_root, first_line, run_directory, write_text
from .record import settle


def read_records(profile: str) -> dict[str, dict]:
    """Return notebook -> record: this machine's run where there is one, else the published one.

    Each has a further entry "source": "published", or "this machine" with the names of parameters that differ from it.
    """
    records = {}
    published = sorted((find_root() / "figures" / profile).glob("*.json"))
    for staged in run_directory(profile, "x").parent.glob("*/unfinished/record.json"):  # killed while it took its place
        with contextlib.suppress(filelock.Timeout), filelock.FileLock(staged.parent.parent / ".lock", blocking=False):
            settle(staged.parent.parent)
    own = sorted(run_directory(profile, "x").parent.glob("*/record.json"))
    for source, files in (("published", published), ("this machine", own)):
        for file in files:
            record = read_record(file)
            if not record:
                continue
            usual = records.get(record["notebook"], record)["parameters"]
            changed = [name for name, value in record["parameters"].items() if usual.get(name) != value]
            note = f", changed: {', '.join(changed)}" if changed else ""
            records[record["notebook"]] = record | {"source": source + note}
    return records


def read_record(file: Path) -> dict | None:
    """Return a record, None without one; one that is damaged counts as absent, and is named in a warning."""
    try:
        record = json.loads(file.read_bytes()) if file.exists() else None
        if record is None or {"notebook", "parameters", "seconds", "peak_memory_mb"} <= set(record):
            return record
        reason = "it lacks what a record has"
    except (OSError, ValueError, TypeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is cut off, or no JSON"
    warnings.warn(
        f"The record {file} is damaged ({reason}) and counts as absent: run its notebook again.", stacklevel=3
    )
    return None


def write_report(profile: str, output: Path) -> pd.DataFrame | None:
    """Turn the executed notebooks of a profile into HTML, with an index page, and return the scoreboard if there is one.

    A ValueError says that no notebook of the profile was run.
    """
    from nbconvert import HTMLExporter

    found = sorted(run_directory(profile, "x").parent.glob("*/*.ipynb"))
    notebooks = {path.stem.removesuffix(".unfinished"): path for path in reversed(found)}  # a whole one wins
    if not notebooks:
        raise ValueError(
            f"No notebook of the {profile} profile was run by scbert run or make reproduce yet. What JupyterLab or papermill "
            "run keeps its pages where you put them."
        )
    rows = []
    for stem, path in sorted(notebooks.items()):
        try:
            page = HTMLExporter().from_filename(str(path))[0]
        except Exception as error:  # nbformat's are of many types
            warnings.warn(f"{path} is no notebook ({first_line(error)}), and is left out: run it again.", stacklevel=2)
            continue
        write_text(output / f"{stem}.html", page)
        done = read_record(path.parent / "record.json")
        lacks = "did not finish" if path.stem.endswith(".unfinished") else "its record is missing or damaged"
        state = f"{done['seconds']:.0f} s, {len(done['checks'])} checks passed" if done else lacks
        rows.append(f'<li><a href="{stem}.html">{stem}</a>: {state}</li>')
    page = (
        f"<!doctype html><html lang=en><meta charset=utf-8><title>scBERT companion, {profile} profile</title>"
        "<style>body{font:16px/1.6 sans-serif;max-width:44em;margin:3em auto;padding:0 1em}</style>"
        f"<h1>scBERT companion: {profile} profile</h1><p>Executed notebooks. Only the paper profile is a reproduction.</p>"
        f"<ul>{''.join(rows)}</ul></html>\n"
    )
    write_text(output / "index.html", page)
    scoreboard = run_directory(profile, "11_scoreboard") / "scoreboard.csv"
    return pd.read_csv(scoreboard) if scoreboard.exists() else None
