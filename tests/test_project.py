"""pyproject.toml, the lock, conda, Docker, CI and what is installed say the same."""

import csv
import re
import tomllib
from collections import Counter
from importlib import metadata
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
LINUX = {"os_name": "posix", "platform_system": "Linux", "sys_platform": "linux"}
PIN = re.compile(r'^[A-Za-z0-9._-]+==[0-9][A-Za-z0-9.!]*( ; python_version (<|>=) "3\.\d+")?$')


def read(name):
    return (ROOT / name).read_text()


def read_lock():
    lines = [line for line in read("requirements.lock").splitlines() if line and not line.startswith("#")]
    return lines, {canonicalize_name(Requirement(line).name): Requirement(line) for line in lines if PIN.match(line)}


def pinned_version(pin):
    return Version(next(iter(pin.specifier)).version)


def is_needed(requirement, extras):
    """Whether an installed distribution needs it here, and on Linux, for which the lock was resolved."""
    return requirement.marker is None or all(
        any(requirement.marker.evaluate(system | {"extra": extra}) for extra in {"", *extras}) for system in ({}, LINUX)
    )


def is_cuda(requirement):
    return requirement.name == "triton" or requirement.name.startswith(("nvidia-", "cuda-"))


def walk_installed(name, extras):
    """Yield the name of everything that an installed distribution needs, without CUDA: torch pins that."""
    todo, seen = [(canonicalize_name(name), frozenset(extras))], set()
    while todo:
        name, extras = todo.pop()
        if (name, extras) in seen or not find_version(name):
            continue
        seen.add((name, extras))
        for requirement in map(Requirement, metadata.requires(name) or []):
            if is_needed(requirement, extras) and not is_cuda(requirement):
                yield canonicalize_name(requirement.name)
                todo.append((canonicalize_name(requirement.name), frozenset(requirement.extras)))


def find_version(name):
    try:
        return Version(metadata.version(name)).public  # without torch's build tag
    except metadata.PackageNotFoundError:
        return None


def test_every_line_of_the_lock_is_one_exact_pin():
    lines, _ = read_lock()
    loose = [line for line in lines if not PIN.match(line)]
    assert not loose, f"Write these lines of requirements.lock as name==version, without a build tag: {loose}"
    twice = [n for n, k in Counter(canonicalize_name(Requirement(line).name) for line in lines).items() if k > 1]
    assert not twice, f"requirements.lock names these twice, keep one line of each: {twice}"


@pytest.mark.parametrize("extra", [None, *EXTRAS])
def test_every_requirement_has_a_pin_that_satisfies_it(extra):
    _, lock = read_lock()
    for text in EXTRAS[extra] if extra else PROJECT["dependencies"]:
        requirement = Requirement(text)
        if requirement.name == PROJECT["name"]:
            unknown = requirement.extras - set(EXTRAS)
            assert not unknown, f"pyproject.toml: extra {extra} takes {unknown}, which do not exist: correct the names."
            continue
        pin = lock.get(canonicalize_name(requirement.name))
        assert pin, f"requirements.lock has no pin for {text}: regenerate it as its header says."
        version = pinned_version(pin)
        assert requirement.specifier.contains(version), (
            f"pyproject.toml wants {text}, requirements.lock pins {version}: regenerate the lock, or change the bound."
        )


def test_torch_is_pinned_without_a_build_tag():
    lines, _ = read_lock()
    assert "torch==2.13.0" in lines, (
        "requirements.lock must say torch==2.13.0: with a build tag such as +cpu it installs from one index only. "
        "If torch was updated on purpose, update this test and the bands of tests/expected too."
    )


def test_conda_environment_follows_the_lock():
    dependencies = yaml.safe_load(read("environment.yml"))["dependencies"]
    python = next(d for d in dependencies if isinstance(d, str) and d.startswith("python="))
    assert SpecifierSet(PROJECT["requires-python"]).contains(python.removeprefix("python=")), (
        f"environment.yml asks for {python}, pyproject.toml for {PROJECT['requires-python']}: make them agree."
    )
    pip = next(d["pip"] for d in dependencies if isinstance(d, dict))
    assert "-c requirements.lock" in pip, "environment.yml: put '-c requirements.lock' into the pip section."
    extras = set(re.fullmatch(r"-e \.\[(.+)\]", pip[-1]).group(1).split(","))
    assert extras <= set(EXTRAS), f"environment.yml installs extras that do not exist: {extras - set(EXTRAS)}"


def test_docker_and_ci_have_the_python_of_conda_and_the_lock():
    python = re.search(r"python=(\S+)", read("environment.yml")).group(1)
    for name, line in {
        "Dockerfile": f"FROM python:{python}-slim",
        ".github/workflows/ci.yml": f'python-version: "{python}"',
        ".devcontainer/devcontainer.json": f"devcontainers/python:{python}",
    }.items():
        assert line in read(name), f"{name} must say {line!r}, the Python of environment.yml and of the lock."
    assert re.search(r"^COPY .*\brequirements\.lock\b", read("Dockerfile"), re.M), "Dockerfile: copy requirements.lock."
    assert "-c requirements.lock" in read("Makefile"), "Makefile: install with '-c requirements.lock'."
    installs = read("Dockerfile") + read(".devcontainer/devcontainer.json")
    unknown = set(re.findall(r"\.venv/(\w+)\.installed", installs)) - set(EXTRAS)
    assert not unknown, f"Dockerfile or devcontainer.json installs extras that do not exist: {unknown}"


def test_ci_runs_the_tests_of_the_makefile():
    jobs = yaml.safe_load(read(".github/workflows/ci.yml"))["jobs"].values()
    runs = {step["run"] for job in jobs for step in job["steps"] if "run" in step}
    assert {"make test", "make lint"} <= runs, ".github/workflows/ci.yml must run 'make test' and 'make lint'."
    assert read(".ci/run").splitlines()[-1] == "make test", ".ci/run must end in 'make test'."


def test_make_lint_holds_style_rooms_and_notebooks():
    recipe = read("Makefile").partition("\nlint:")[2].partition("\n\n")[0]
    missing = [tool for tool in ("ruff check", "ruff format --check", "lint-imports", "--verify") if tool not in recipe]
    assert not missing, f"Makefile: make lint must run {', '.join(missing)}."


def test_pre_commit_has_the_versions_and_flags_of_make_lint():
    _, lock = read_lock()
    hooks = {repo["repo"].split("/")[-1]: repo for repo in yaml.safe_load(read(".pre-commit-config.yaml"))["repos"]}
    for repo, package in {"ruff-pre-commit": "ruff", "nbstripout": "nbstripout"}.items():
        rev, version = hooks[repo]["rev"], pinned_version(lock[package])
        assert Version(rev) == version, f".pre-commit-config.yaml: set rev of {repo} to {version}, as in the lock."
    flags = hooks["nbstripout"]["hooks"][0]["args"]
    makefile = read("Makefile").replace('"', "").replace("--extra-keys ", "--extra-keys=")
    missing = [flag for flag in flags if flag not in makefile]
    assert not missing, f"Give nbstripout the same flags in Makefile and .pre-commit-config.yaml; not so: {missing}"


def test_what_is_installed_is_what_is_locked():
    _, lock = read_lock()
    names = set(walk_installed(PROJECT["name"], ["test"])) - {canonicalize_name(PROJECT["name"])}  # extras name extras
    assert "torch" in names, "Install the project first: make test."
    wrong = {}
    for name in names:
        installed, locked = find_version(name), str(pinned_version(lock[name])) if name in lock else None
        if installed != locked or locked is None:
            wrong[name] = f"installed {installed}, locked {locked}"
    assert not wrong, f"Install the lock (rm -r .venv, make test), or regenerate it as its header says: {wrong}"


def test_figure_map_names_notebooks_and_panels_that_exist():
    for row in csv.DictReader(read("figures/FIGURE_MAP.csv").splitlines()):
        notebook = ROOT / "notebooks" / f"{row['notebook']}.ipynb"
        if row["panel"]:
            assert notebook.exists() and f'\\"{row["panel"]}\\"' in notebook.read_text(), (
                f"figures/FIGURE_MAP.csv: {row['figure']} should be {row['panel']} of {row['notebook']}, "
                "which saves no figure of that name: correct the row."
            )
