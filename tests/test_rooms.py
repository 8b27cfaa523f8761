"""The rooms of the package: who may import whom, how small the core stays, and that every name leads somewhere."""

import importlib
import os
import re
import shutil
import subprocess
import sys
import tokenize
from pathlib import Path

import pytest

import scbert

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "scbert"
CORE = ["data", "model", "train", "annotate.py"]


def lint_imports(folder):
    """Hold the package in a folder to the contracts of pyproject.toml; return the exit status and what was said."""
    command = [sys.executable, "-c", "from importlinter.cli import lint_imports_command; lint_imports_command()"]
    command += ["--no-cache", "--no-logo", str(ROOT / "pyproject.toml")]
    environment = os.environ | {"PYTHONPATH": str(folder), "NO_COLOR": "1", "COLUMNS": "200"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr


@pytest.fixture
def copy(tmp_path):
    """A copy of the package's code, to add faults to."""
    shutil.copytree(
        PACKAGE, tmp_path / "scbert", ignore=lambda folder, names: [n for n in names if not is_code(folder, n)]
    )
    return tmp_path


def is_code(folder, name):
    return name.endswith(".py") or (Path(folder, name).is_dir() and name != "__pycache__")


def test_every_room_imports_only_from_rooms_below_it():
    status, said = lint_imports(ROOT)
    assert status == 0, said
    assert "2 kept, 0 broken" in said


@pytest.mark.parametrize(
    ("module", "line", "contract", "chain"),
    [
        (
            "data/preprocess.py",
            "from ..figures import plot",
            "data flows down",
            "scbert.data.preprocess -> scbert.figures.plot",
        ),
        (
            "model/config.py",
            "def late():\n    from ..train import recipe\n    return recipe",  # no way around it inside a function
            "data flows down",
            "scbert.model.config -> scbert.train.recipe",
        ),
        (
            "sources/genes.py",
            "from ..scale import stream",  # neither of the two is below the other
            "data flows down",
            "scbert.sources.genes -> scbert.scale.stream",
        ),
        ("model/config.py", "from . import encoder", "No circles", ".config -> .encoder"),
    ],
)
def test_an_import_upwards_or_in_a_circle_breaks_a_contract(copy, module, line, contract, chain):
    assert lint_imports(copy)[0] == 0
    with open(copy / "scbert" / module, "a") as file:
        file.write(f"\n\n{line}\n")
    status, said = lint_imports(copy)
    assert status == 1, said
    assert chain in said
    (broken,) = [row for row in said.splitlines() if row.endswith("BROKEN")]
    assert contract in broken


def count_lines(*files):
    return sum(len(file.read_text().splitlines()) for file in files)


def test_the_core_is_read_in_half_an_hour():
    files = [
        file for name in CORE for file in ([PACKAGE / name] if name.endswith(".py") else (PACKAGE / name).rglob("*.py"))
    ]
    n_lines = count_lines(*files)
    assert 1_000 < n_lines <= 3_300, (
        f"{', '.join(CORE)} have {n_lines} lines: move what is not scBERT itself out of them."
    )


def test_the_package_stays_within_its_budget():
    n_lines = count_lines(*PACKAGE.rglob("*.py"))
    assert 5_000 < n_lines <= 17_100, f"The package has {n_lines} lines: a library may do part of it."


def find_packed(path):
    """Return the lines of a file whose code goes on after 120 characters, texts and comments left out."""
    with open(path, "rb") as file:
        found = list(tokenize.tokenize(file.readline))
    kinds = {tokenize.OP, tokenize.NAME, tokenize.NUMBER}
    return sorted({token.end[0] for token in found if token.type in kinds and token.end[1] > 120})


def test_no_line_is_packed(tmp_path):
    packed = {str(path.relative_to(ROOT)): find_packed(path) for path in PACKAGE.rglob("*.py")}
    assert {path: lines for path, lines in packed.items() if lines} == {}
    (tmp_path / "packed.py").write_text(f"x = [{'1, ' * 50}]  # fmt: skip\ny = '{'x' * 200}'\n")
    assert find_packed(tmp_path / "packed.py") == [1]


@pytest.mark.parametrize("name", [*scbert._MODULES, *scbert._FUNCTIONS])
def test_every_alias_leads_to_what_is_there(name):
    assert name in dir(scbert)
    found = getattr(scbert, name)
    if name in scbert._MODULES:
        assert found.__name__ == f"scbert.{scbert._MODULES[name]}"
    else:
        assert found.__module__.startswith("scbert.") and found.__doc__


def test_every_room_and_module_has_one_line_that_says_what_it_is_for():
    for path in PACKAGE.rglob("*.py"):
        first = path.read_text().partition("\n")[0]
        assert first.startswith('"""') and len(first) > 20, f"{path.relative_to(ROOT)} does not say what it is for."


def test_what_docstrings_name_is_there():
    named = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        for name in re.findall(r"`(scbert\.[\w.]+)`", path.read_text()):
            named.setdefault(name, path.relative_to(PACKAGE))
    assert len(named) > 60
    assert {name: str(path) for name, path in named.items() if not resolves(name)} == {}


def resolves(name):
    """Return whether a dotted name, such as scbert.datasets.load, leads to something."""
    found = scbert
    for part in name.split(".")[1:]:
        if not hasattr(found, part):
            try:
                found = importlib.import_module(f"{found.__name__}.{part}")
                continue
            except (ImportError, AttributeError):
                return False
        found = getattr(found, part)
    return True
