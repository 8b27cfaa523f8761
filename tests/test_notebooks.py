"""The notebooks as files: their anatomy, their stored outputs, and that their checks can fail."""

import csv
import json
import re
import statistics
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
import yaml

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
EXPECTED = [
    *["00_quickstart", "01_data_and_tokens", "02_pretrain", "03_finetune_and_annotate"],
    *["04_benchmark", "05_cross_dataset", "06_batch_effect", "07_novel_cell_types", "08_interpretability"],
    *["10_performance", "11_scoreboard"],
]
MUST_FAIL = sorted((ROOT / "tests" / "notebooks_must_fail").glob("*.yaml"))
BANNED = [
    r"detach\(\)\.numpy",
    r"!pip",
    r"%cd",
    r"sys\.path",
    r"filterwarnings",
    r"^class ",
    r"(?<![\w.])/(home|root|tmp|work|Users)/",
]


def anatomy_faults(notebook):
    """Return what a notebook lacks of the anatomy that all of them share, in words."""
    cells = notebook.cells
    code = [cell for cell in cells if cell.cell_type == "code"]
    tags = [cell.metadata.get("tags", []) for cell in code]
    lengths = sorted(len(cell.source.splitlines()) for cell in code)
    texts = [
        re.sub(r"\]\(\S+\)", "]", cell.source) for cell in cells if cell.cell_type == "markdown"
    ]  # without addresses
    prose = sum(len(re.findall(r"\w+", text)) for text in texts)
    outputs = [output for cell in code for output in cell.outputs]
    rules = {
        "it opens with a title, a question and a table": bool(
            re.match(r"# \d\d · [\s\S]*\?[\s\S]*\| profile", cells[0].source)
        ),
        "the second cell, and no other, is tagged parameters": [i for i, t in enumerate(tags) if "parameters" in t]
        == [0]
        and cells[1].cell_type == "code",
        "the third cell makes the run": "scbert.record.Run(" in cells[2].source,
        "exactly one cell is compared by nbval": sum("nbval-check-output" in t and "keep_output" in t for t in tags)
        == 1,
        "the last code cell checks and finishes the run": "run.check(" in code[-1].source
        and "run.finish()" in code[-1].source,
        "it ends with what to see, what to change, and the differences": all(
            word in cells[-1].source
            for word in (
                "What you should see",
                "When it looks wrong",
                "Change one thing",
                "Differs from the published code",
            )
        ),
        "cells were executed in order": [cell.execution_count for cell in code] == list(range(1, len(code) + 1)),
        "no output is an error or goes to stderr": not any(
            output.output_type == "error" or output.get("name") == "stderr" for output in outputs
        ),
        "a figure is shown": any("image/png" in output.get("data", {}) for output in outputs),
        "cells are short": statistics.median(lengths) <= 8 and lengths[-1] <= 12 and sum(lengths) <= 120,
        "lines of code are at most 100 characters": all(
            len(line) <= 100 for cell in code for line in cell.source.splitlines()
        ),
        "there are 4 to 12 words of prose a line of code": 4 <= prose / sum(lengths) <= 12,
        "nothing banned is in the code": not any(
            re.search(pattern, cell.source, re.MULTILINE) for cell in code for pattern in BANNED
        ),
    }
    return [rule for rule, holds in rules.items() if not holds]


def test_the_notebooks_are_those_we_expect():
    assert [path.stem for path in NOTEBOOKS] == EXPECTED


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_each_notebook_has_the_anatomy(path):
    assert anatomy_faults(nbformat.read(path, as_version=4)) == []
    assert path.stat().st_size < 400_000, "committed notebooks stay under 400 kB"


@pytest.mark.parametrize(
    ("added", "rule"),
    [
        ("value = 0\n" * 11, None),  # 12 lines with the one that is there
        ("value = 0\n" * 12, "cells are short"),
        (f"text = '{'x' * 91}'\n", None),  # 100 characters
        (f"text = '{'x' * 92}'\n", "lines of code are at most 100 characters"),
    ],
)
def test_a_long_cell_and_a_long_line_are_faults(added, rule):
    notebook = nbformat.read(ROOT / "notebooks" / "11_scoreboard.ipynb", as_version=4)
    notebook.cells[3]["cell_type"] = "code"
    notebook.cells[3] |= {"source": f"{added}value", "outputs": [], "execution_count": 3}
    faults = [fault for fault in anatomy_faults(notebook) if fault != "cells were executed in order"]
    assert faults == ([rule] if rule else [])


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_the_defaults_are_the_demo_profile(path):
    from scbert.run.notebooks import read_parameters

    parameters = read_parameters(path)
    assert parameters["profile"][1] == '"demo"'
    assert all(kind in ("int", "float", "str", "bool") and text for kind, _, text in parameters.values())
    assert len(parameters) <= 12


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_published_demo_record_exists_with_the_agreed_keys(path):
    record = json.loads((ROOT / "figures" / "demo" / f"{path.stem}.json").read_text())
    assert set(record) - {"figures"} == {
        "notebook", "profile", "parameters", "seed", "git_commit", "versions", "data", "seconds", "peak_memory_mb",
        "metrics", "checks",
    }  # fmt: skip
    assert record["checks"]
    assert all(check["passed"] for check in record["checks"])


@pytest.mark.parametrize("path", sorted((ROOT / "tests" / "expected").glob("*.json")), ids=lambda path: path.stem)
def test_bands_were_measured_over_ten_seeds_and_exclude_their_control(path):
    for name, band in json.loads(path.read_text())["metrics"].items():
        assert len(band["seeds"]) >= 10
        (control,) = band["control"].values()
        assert abs(control - band["value"]) > band["tolerance"], f"{name}: a run with nothing to learn would pass"


def test_every_published_number_has_a_source_and_every_judged_one_a_band():
    with open(ROOT / "tests" / "expected" / "paper.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) >= 20
    assert all(row["source"] for row in rows)
    assert all(float(row["band"]) > 0 and row["band_reason"] for row in rows if row["paper"])


def break_notebook(path, folder):
    """Apply the edit of a must-fail file; return (broken notebook, its path, the file's content)."""
    fault = yaml.safe_load(path.read_text())
    notebook = nbformat.read(ROOT / "notebooks" / f"{fault['notebook']}.ipynb", as_version=4)
    old, new = fault["replace"].strip(), fault["with"].strip()
    targets = [cell for cell in notebook.cells if cell.cell_type == "code" and old in cell.source]
    assert targets, f"{path.name}: {fault['notebook']} no longer has the text it replaces"
    targets[0].source = targets[0].source.replace(old, new, 1)
    broken = folder / f"{path.stem}.ipynb"
    nbformat.write(notebook, broken)
    return notebook, broken, fault


def test_there_are_saboteurs_of_each_kind():
    assert {path.stem for path in MUST_FAIL} >= {
        "shuffled_labels",
        "wrong_bins",
        "stripped_check_cell",
        "leaked_test_cells",
    }


@pytest.mark.parametrize("path", MUST_FAIL, ids=lambda path: path.stem)
def test_a_broken_notebook_turns_red(path, tmp_path, monkeypatch):
    notebook, broken, fault = break_notebook(path, tmp_path)
    if fault["by"] == "anatomy":
        assert anatomy_faults(notebook) == [fault["says"]]
        return
    monkeypatch.setenv("SCBERT_RUNS", str(tmp_path / "runs"))
    command = [sys.executable, "-m", "pytest", "--nbval-lax", "--nbval-current-env", "--nbval-cell-timeout=600"]
    command += ["--exitfirst"] if fault.get("at_once") else []  # what comes after need not be trained
    done = subprocess.run(
        [*command, "-p", "no:cacheprovider", broken.name], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 1, done.stdout[-3000:]
    assert fault["says"] in done.stdout, done.stdout[-3000:]
