"""The records of a profile, and its executed notebooks as pages."""

import json
from pathlib import Path

import pandas as pd

from ..paths import find_root, run_directory, write_text


def read_records(profile: str) -> dict[str, dict]:
    """Return notebook -> record: this machine's run where there is one, else the published one.

    Each has a further entry "source": "published", or "this machine" with the names of parameters that differ from it.
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


def write_report(profile: str, output: Path) -> pd.DataFrame | None:
    """Turn the executed notebooks of a profile into HTML, with an index page, and return the scoreboard if there is one.

    A ValueError says that no notebook of the profile was run.
    """
    from nbconvert import HTMLExporter

    notebooks = sorted(run_directory(profile, "x").parent.glob("*/*.ipynb"))
    if not notebooks:
        raise ValueError(f"No notebook of the {profile} profile was run yet: make reproduce PROFILE={profile}.")
    rows = []
    for path in notebooks:
        write_text(output / f"{path.stem}.html", HTMLExporter().from_filename(str(path))[0])
        file = path.parent / "record.json"
        done = json.loads(file.read_text()) if file.exists() else None
        state = f"{done['seconds']:.0f} s, {len(done['checks'])} checks passed" if done else "did not finish"
        rows.append(f'<li><a href="{path.stem}.html">{path.stem}</a>: {state}</li>')
    page = (
        f"<!doctype html><html lang=en><meta charset=utf-8><title>scBERT companion, {profile} profile</title>"
        "<style>body{font:16px/1.6 sans-serif;max-width:44em;margin:3em auto;padding:0 1em}</style>"
        f"<h1>scBERT companion: {profile} profile</h1><p>Executed notebooks. Only the paper profile is a reproduction.</p>"
        f"<ul>{''.join(rows)}</ul></html>\n"
    )
    write_text(output / "index.html", page)
    scoreboard = run_directory(profile, "11_scoreboard") / "scoreboard.csv"
    return pd.read_csv(scoreboard) if scoreboard.exists() else None
