"""The records of a profile, and its executed notebooks as pages."""

import contextlib
import json
import re
import shutil
import warnings
from pathlib import Path

import filelock
import jinja2
import markupsafe
import nbformat
import pandas as pd

from ..paths import find_root, first_line, replace_whole, run_directory, write_text
from ..sources import datasets
from .record import settle

PAGES = Path(__file__).with_name("pages")
"""The templates of the report, and its style."""


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
    """Turn the executed notebooks of a profile into pages that need no network, and return the scoreboard if there is one.

    The front page has the scoreboard, the notebooks, all figures with their panel of the paper, their data and the cell that
    made them, and how all was made. A ValueError says that no notebook of the profile was run.
    """
    folder = run_directory(profile, "x").parent
    notebooks = {path.stem.removesuffix(".unfinished"): path for path in sorted(folder.glob("*/*.ipynb"), reverse=True)}
    if not notebooks:  # a whole one wins over an unfinished one
        raise ValueError(
            f"No notebook of the {profile} profile was run by scbert run or make reproduce yet. What JupyterLab or papermill "
            "run keeps its pages where you put them."
        )
    pages, records, figures, texts, known = [], [], [], [], read_records(profile)
    file = find_root() / "figures" / "FIGURE_MAP.csv"
    panels = pd.read_csv(file) if file.exists() else pd.DataFrame(columns=["figure", "notebook", "panel", "what"])
    for stem, path in sorted(notebooks.items()):
        try:
            notebook = nbformat.read(path, as_version=4)
        except Exception as error:  # nbformat's are of many types
            warnings.warn(f"{path} is no notebook ({first_line(error)}), and is left out: run it again.", stacklevel=2)
            continue
        record, facts = _describe(path, known.get(stem))
        records += [record] if record else []
        title = next(iter(re.findall(r"^# (?:\d+ · )?(.+)$", notebook.cells[0].source, re.M)), stem)
        page = {"stem": stem, "title": title, "facts": facts, "warnings": (record or {}).get("warnings", ())}
        pages.append(page | {"notebook": notebook})
        figures += [*_list_figures(notebook, record, panels, path.parent, output)] if record else []
        prose = [cell for cell in notebook.cells if cell.cell_type == "markdown"]
        texts += [[f"{stem}.html#cell-id={cell.id}", stem, " ".join(cell.source.split())] for cell in prose]
    files = [folder / "11_scoreboard" / f"{name}.csv" for name in ("scoreboard", "claims")]
    board, claims = (pd.read_csv(file) if file.exists() else None for file in files)
    if claims is not None:
        claims.insert(1, "verdict", claims.pop("verdict"))  # seen first on a phone
    tables = ["" if table is None else table.fillna("").to_html(index=False, border=0) for table in (board, claims)]
    stems = [page["stem"] for page in pages]
    for before, page, after in zip([None, *stems], pages, [*stems[1:], None], strict=False):
        body = _write_cells(page["notebook"], figures, stems)
        _write_page(
            output / f"{page['stem']}.html", "page", **page, profile=profile, before=before, after=after, body=body
        )
    _write_page(
        output / "index.html", "index", title="Report", profile=profile, board=tables[0], claims=tables[1], pages=pages,
        figures=figures, texts=texts, made=_say_how(records),
    )  # fmt: skip
    return board


def _write_page(path, name, **what):
    loader = jinja2.FileSystemLoader(PAGES)
    text = jinja2.Environment(loader=loader, autoescape=True).get_template(f"{name}.html.j2")
    safe = {key: markupsafe.Markup(what[key]) for key in ("board", "claims", "body") if key in what}
    write_text(path, text.render(what | safe))


def _describe(path, record):
    """Return the record of an executed notebook, None if it is of another run, and a sentence on the run."""
    if path.stem.endswith(".unfinished"):
        return None, "did not finish: as far as it came."
    if record is None or record["source"] == "published":
        warnings.warn(f"{path.name} has no record beside it, or a damaged one: run it again.", stacklevel=3)
        return None, "its record is missing or damaged."
    if (path.parent / "record.json").stat().st_mtime > path.stat().st_mtime:  # scbert run writes the notebook last
        return None, "its record is of a later run, by JupyterLab or papermill: run it again by scbert run."
    data = ", ".join(f"{name} (sha256 {digest[:12]})" for name, digest in record["data"].items()) or "none"
    key = record["parameters"].get("label_key") or "none"
    data += f", labels: {key}" + (", A SHUFFLED CONTROL" if key.endswith(datasets.SHUFFLED) else "")
    if changed := record["source"].partition("changed: ")[2]:
        data += f". Its {changed} differ from the published run's, which the text is about"
    minutes = f"{record['seconds']:.0f} s" if record["seconds"] < 120 else f"{record['seconds'] / 60:.0f} minutes"
    return record, f"{minutes}, {len(record['checks'])} checks passed, seed {record['seed']}, data: {data}."


def _list_figures(notebook, record, panels, folder, output):
    """Yield what the front page says of each figure of a run, once its picture and its table are copied to the report."""
    known = panels[panels["notebook"] == record["notebook"]].groupby("panel")[["figure", "what"]].agg(list)
    by_count = {cell.get("execution_count"): cell for cell in notebook.cells if cell.cell_type == "code"}
    for name, number in record.get("figures", {}).items():
        if not (folder / f"{name}.png").exists() or number not in by_count:
            warnings.warn(f"{folder} lacks the figure {name}, or the cell that drew it: run it again.", stacklevel=3)
    for picture in sorted(folder.glob("*.png")):
        name, cell = picture.stem, by_count.get(record.get("figures", {}).get(picture.stem))
        for file in (picture, picture.with_suffix(".csv")):
            if file.exists():
                with replace_whole(output / "figures" / folder.name / file.name) as temporary:
                    shutil.copyfile(file, temporary)
        drawn = [f"scbert.{name}" for name in re.findall(r"\bplot(?:_\w+)?\.\w+", cell.source if cell else "")]
        place = f"figures/{folder.name}/{name}"
        yield {
            "stem": folder.name, "name": name, "file": f"{place}.png",
            "table": f"{place}.csv" if picture.with_suffix(".csv").exists() else "",
            "panel": " and ".join(known["figure"].get(name, ["Not in the paper"])),
            "what": "; ".join(known["what"].get(name, [name.replace("_", " ")])),
            "cell": list(by_count.values()).index(cell) + 1 if cell else "?",
            "id": cell.id if cell else "", "source": f"By {', '.join(drawn)}." if drawn else "",
            "page": f"{folder.name}.html#cell-id={cell.id}" if cell else f"{folder.name}.html",
        }  # fmt: skip


def _write_cells(notebook, figures, stems):
    """Return the cells of a notebook as HTML, its pictures described, its links to pages of the report, or none."""
    from nbconvert import HTMLExporter

    what = {figure["id"]: figure["what"] for figure in figures}
    for cell in notebook.cells:
        for output in cell.get("outputs", ()):
            if "image/png" in output.get("data", {}):
                output.metadata["image/png"] = {"alt": what.get(cell.id, "A figure, described in the text around it")}
    exporter = HTMLExporter(extra_template_basedirs=[str(PAGES)], template_name="cells")
    body = exporter.from_notebook_node(notebook)[0]

    def link(found):
        stem = re.fullmatch(r"(\d\d_\w+)\.ipynb", found[1])
        if re.match("https?://|#", found[1]):
            return found[0]
        return f'<a href="{stem[1]}.html">{found[2]}</a>' if stem and stem[1] in stems else found[2]

    return re.sub(r'<a href="([^"]*)"[^>]*>(.*?)</a>', link, body, flags=re.S)


def _say_how(records):
    """Return what all records say of how they were made: commit, versions, seeds, time."""

    def gather(values):
        return ", ".join(dict.fromkeys(map(str, values))) or "not known"

    versions = [f"{name} {version}" for record in records for name, version in record["versions"].items()]
    return {
        "Commit": gather(record["git_commit"] for record in records),
        "Versions": gather(versions),
        "Seeds": gather(record["seed"] for record in records),
        "Minutes in all": f"{sum(record['seconds'] for record in records) / 60:.1f}",
    }
