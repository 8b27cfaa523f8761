"""README and docs: every number of a result comes from a record, every link, command and name is right.

A number of a result is a decimal with two places or more (0.879), an interval ([0.861, 0.898]) or a percentage, outside
of code and of addresses. Other numbers are not: whole numbers, one decimal, versions (2.13.0, Python 3.11). CONSTANTS are
percentages and decimals that were chosen and not measured.
"""

import ast
import csv
import importlib.util
import json
import re
import shlex
import subprocess
import sys
import tomllib
from functools import cache
from pathlib import Path

import click
import pandas as pd
import pytest
import yaml
from scipy import stats

import scbert
from scbert import metrics
from scbert.__main__ import main
from scbert.run import notebooks, preflight

ROOT = Path(__file__).resolve().parent.parent
PAGES = ["README.md", "docs/results.md", "docs/data.md", "docs/cluster.md"]
TEMPLATES = ["docs/results.template.md", "docs/readme_results.template.md"]
CONSTANTS = {
    "95 %": "the level of all intervals",
    "70 %": "the training part of zheng_facs",
    "30 %": "its test part",
    "0.05": "the level of the tests",
}
NUMBER = r"[−+-]?\d+(?:\.\d+)?"
INTERVAL = re.compile(rf"(?<![\w.])({NUMBER}) \[({NUMBER}), ({NUMBER})\]")
ALONE = re.compile(rf"(?<![\w.,])(?:\[{NUMBER}, {NUMBER}\]|{NUMBER} ?%|[−+-]?\d+\.\d{{2,}}(?![\w.]*\d))")


def read(name):
    return (ROOT / name).read_text()


def load_builder():
    spec = importlib.util.spec_from_file_location("build_results", ROOT / "docs" / "build_results.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def strip(text):
    """Return the prose and tables of a page: no code, comments or addresses."""
    text = re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S)
    text = re.sub(r"<!--.*?-->", "", text, flags=re.S)
    text = re.sub(r"\]\([^)]*\)", "]", re.sub(r"`[^`\n]*`", "", text))
    return re.sub(r"Python 3\.\d+", "Python", text)


def find_numbers(text):
    """Return the numbers of results in a page: (value, low, high) where an interval follows, and all others."""
    text = strip(text)
    alone = {found.group() for found in ALONE.finditer(INTERVAL.sub("", text))}
    return {found.groups() for found in INTERVAL.finditer(text)}, alone - set(CONSTANTS)


def read_code(page):
    """Return the lines of a page's blocks of commands, its commands within the text, and its blocks of Python."""
    blocks = re.findall(r"^```(\w*)\n(.*?)^```$", read(page), flags=re.M | re.S)
    commands = [line for kind, block in blocks if not kind for line in block.splitlines()]
    prose = re.sub(r"^```.*?^```$", "", read(page), flags=re.M | re.S)
    commands += [code for code in re.findall(r"`([^`\n]+)`", prose) if re.match(r"(scbert|make|python) [\w-]", code)]
    return [line for line in commands if line.strip()], [block for kind, block in blocks if kind == "python"]


def read_commands(*programs):
    """Return (page, words) of each command of some programs in the pages, without what stands before and comments."""
    found = []
    for page in PAGES:
        for line in read_code(page)[0]:
            words = shlex.split(line, comments=True)
            while words and (re.fullmatch(r"\w+=.*", words[0])):
                words = words[1:]
            if words and words[0] == "torchrun":
                words = words[words.index("--no-python") + 1 :]
            if words and Path(words[0]).name in programs:
                found.append((page, words[1:]))
    return found


def is_close(shown, value):
    """Whether a number is shown as a value is rounded, or as its share in points of a hundred, of either sign."""
    text = shown.replace("−", "-").replace("%", "").replace("+", "").strip()
    digits = len(text.partition(".")[2])
    # A half is rounded either way: a CSV file holds some numbers rounded once before.
    return any(abs(abs(float(text)) - abs(factor * value)) <= 0.5000001 * 10**-digits for factor in (1, 100))


@cache
def read_measured(stem):
    """Return all (value, low, high) and all single numbers of a notebook's published records and their tables."""
    intervals, single = set(), set()
    for file in ROOT.glob(f"figures/*/{stem}.json"):
        for metric in json.loads(file.read_text())["metrics"].values():
            intervals.add((metric["value"], metric["low"], metric["high"]))
            single.add(metric["value"])
    for file in ROOT.glob(f"figures/*/{stem}/*.csv"):
        for row in csv.DictReader(file.read_text().splitlines()):
            for low, high in (("low", "high"), ("low_adjusted", "high_adjusted")):
                if row.get("value") and row.get(low) and row.get(high):
                    intervals.add((float(row["value"]), float(row[low]), float(row[high])))
            if file.stat().st_size < 30_000:  # larger ones hold coordinates of cells
                single |= {float(cell) for cell in row.values() if re.fullmatch(r"-?\d+\.\d+", cell or "")}
    return intervals, single


@cache
def derive_numbers():
    """Return what follows from rows of ``tests/expected`` and from published predictions, computed here once more."""
    heads, layers = (pd.read_csv(ROOT / "tests" / "expected" / f"{name}.csv") for name in ("heads", "layers"))
    by_seed = heads.pivot_table(index=["cells a label", "head", "seed"], columns="encoder", values="test accuracy")
    intervals, single = set(), set()
    for _, table in by_seed.groupby(level=[0, 1]):
        single |= {*table.mean(), *table.min()}
        for encoder in table.columns.drop("random") if table["random"].notna().all() else ():
            found = stats.ttest_rel(table[encoder], table["random"])
            intervals.add(((table[encoder] - table["random"]).mean(), *found.confidence_interval(0.95)))
    sound, published = by_seed.xs("sound", level="head"), by_seed.xs("published", level="head")
    plain = by_seed.xs("none", level="head")["logistic_regression"]
    gains = (sound.sub(sound["random"], axis=0) - published.sub(published["random"], axis=0)).drop(columns="random")
    readers = ["mean of genes", "one number a gene"]
    for_layer = layers.set_index(["encoder", "cells a label", "layer", "seed"])[readers]
    gaps = for_layer.loc["pbmc-small"] - for_layer.loc["random"]
    depth = [
        for_layer.loc[who].xs(0, level="layer") - for_layer.loc[who].xs(2, level="layer")
        for who in ("pbmc-small", "random")
    ]
    for table in (gains, sound.rsub(plain, axis=0), gaps.xs(2, level="layer"), *depth):
        for _, part in table.groupby(level="cells a label"):
            for column in part.columns[part.notna().all()]:
                found = stats.ttest_1samp(part[column], 0)
                intervals.add((part[column].mean(), *found.confidence_interval(0.95)))
    for _, table in layers.groupby(["encoder", "cells a label", "layer"]):
        numbers = table.select_dtypes("number")
        single |= {*numbers.mean(), *numbers[readers].min(), *numbers[readers].max()}
    cells = pd.read_csv(ROOT / "figures" / "small" / "04_benchmark" / "predictions.csv.gz", keep_default_na=False)
    for _, table in cells[cells["part"] == "test"].groupby("protocol"):
        for pair in (["scbert", "scbert_scratch"], ["scbert_tuned", "scbert"]):
            if (table[pair] != "").all(axis=None):
                long = table.melt(["repeat", "fold", "cell", "truth"], pair, "method", "predicted")
                intervals.add(tuple(metrics.compare(long, *pair)[name] for name in ("value", "low", "high")))
    return intervals, single


def find_missing(section):
    """Return the numbers of results in a section that no record of the notebooks it links to has."""
    stems = re.findall(r"notebooks/(\d\d_\w+)\.ipynb", section)
    found = [*map(read_measured, stems), *([derive_numbers()] if "tests/expected/heads.csv" in section else [])]
    intervals, single = (set().union(*parts) for parts in zip(*found, strict=True))
    if "tests/expected/claims.csv" in section:  # which quotes what others published
        single |= {float(number) for number in re.findall(r"\d+(?:\.\d+)?", read("tests/expected/claims.csv"))}
    triples, alone = find_numbers(section)
    missing = [
        f"{triple[0]} [{triple[1]}, {triple[2]}]"
        for triple in sorted(triples)  # a difference may be shown as its size
        if not any(all(map(is_close, triple, (v, *ends))) for v, *b in intervals for ends in (b, b[::-1]))
    ]
    return missing + [
        number
        for number in sorted(alone)
        if not any(is_close(re.search(NUMBER, number).group(), value) for value in single)
    ]


def test_results_are_those_of_the_records(tmp_path):
    subprocess.run(
        [sys.executable, ROOT / "docs" / "build_results.py", "--output", tmp_path], check=True, capture_output=True
    )
    for name in ("README.md", "docs/results.md"):
        assert (tmp_path / name).read_text() == read(name), f"{name} is not up to date: make docs"


def test_each_number_of_a_result_is_in_a_record():
    assert len(find_numbers(read("README.md"))[0]) > 30
    assert find_missing(read("README.md")) == []
    sections = re.split(r"^(?=## )", read("docs/results.md"), flags=re.M)
    assert len(sections) > 8
    assert {section.splitlines()[0]: find_missing(section) for section in sections if any(find_numbers(section))} == {
        section.splitlines()[0]: [] for section in sections if any(find_numbers(section))
    }


def test_a_number_that_no_record_has_is_found():
    text = "(notebooks/04_benchmark.ipynb): 0.879 [0.861, 0.898], 0.879 [0.861, 0.899], 0.87654, torch 2.13.0, 95 %"
    assert find_missing(text) == ["0.879 [0.861, 0.899]", "0.87654"]


@pytest.mark.parametrize("template", TEMPLATES)
def test_templates_hold_no_number_of_a_result(template):
    text = read(template)
    sentences = re.findall(r'claim\("((?:[^"\\]|\\.)*)"', text)
    assert len(sentences) == text.count("claim(")
    prose = re.sub(r"\{\{.*?\}\}|\{%.*?%\}", "", text, flags=re.S)
    for part in [prose, *sentences]:
        assert find_numbers(part) == (set(), set())


@pytest.mark.parametrize("page", ["README.md", "docs/data.md", "docs/cluster.md"])
def test_no_number_of_a_result_is_typed(page):
    text = re.sub(r"<!-- results:begin -->.*<!-- results:end -->", "", read(page), flags=re.S)
    assert find_numbers(text) == (set(), set())


def test_a_sentence_that_no_longer_holds_stops_the_build():
    builder = load_builder()
    assert builder.claim("It is so.", True) == "It is so."
    with pytest.raises(ValueError, match="no longer bear this out: 'It is so.'"):
        builder.claim("It is so.", False)


def test_numbers_are_rounded_signed_and_judged():
    builder = load_builder()
    found = {"value": -0.02034, "low": -0.0394, "high": -0.0005, "n": 1160}
    assert builder.change(found) == "−0.020 [−0.039, −0.001]"
    assert builder.size(found) == "0.020 [0.001, 0.039]"
    assert builder.points(found) == "−2.0 [−3.9, −0.1]"
    assert builder.number(-0.0004) == "0.000"
    assert builder.verdict(found) == "behind"
    assert builder.verdict(found, small_is_good=True) == "ahead"
    assert builder.verdict(found | {"high": 0.0}) == "not decided"
    with pytest.raises(KeyError, match="small/04 has no metric x"):
        builder.metric("small/04", "x")


def read_tables(page):
    """Return (heading, table, what follows it up to the next table or heading) for each table of a page."""
    found = []
    for section in re.split(r"^(?=##+ )", read(page), flags=re.M)[1:]:
        parts = re.split(r"((?:^\|.*\n)+)", section, flags=re.M)
        found += [(section.splitlines()[0], parts[i], parts[i + 1]) for i in range(1, len(parts), 2)]
    return found


def test_each_table_with_scbert_has_its_baselines_and_says_of_what_it_is():
    without = {  # sections with tables where a majority class has no meaning; logistic regression stands in all but one
        "## The paper's claims",  # verdicts
        "## What pretraining learns",  # the commonest bin is the majority there
        "### Embeddings of real shifts",
        "## Which genes it looks at, and whether they matter",
    }
    tables = [entry for entry in read_tables("docs/results.md") if entry[0] != "## What it costs"]
    assert len(tables) > 20
    for heading, table, after in tables:
        if heading == "### Does pretraining hurt?" and "majority" not in table:  # of parts of scBERT, beside one of all
            assert sum(other[0] == heading and "majority class" in other[1] for other in tables) == 1
            continue
        assert "scBERT" in table or "attention" in table, heading
        if heading != "## What pretraining learns" and "attention minus" not in table:
            assert "logistic regression" in table, heading
        if heading not in without:
            assert "majority class" in table, heading
        note = after.strip().split("\n\n")[0]
        says = r"(Small|Demo) profile; .*\d.*, seed \d+; (95 % intervals over .*`scbert run \d\d|`python tests/measure_heads)"
        assert re.match(says, note), heading
        elsewhere = heading in ("## The demo", "## What pretraining learns") or table.startswith("| `pancreas_5tech` |")
        if not elsewhere:  # all other tables are, in part, of zheng_facs
            assert "**Confounded:** in `zheng_facs`" in note, heading


def test_readme_is_short_and_in_order():
    text = read("README.md")
    assert len(text.encode()) <= 8_000
    headings = re.findall(r"^## (.*)$", text, flags=re.M)
    assert headings == [
        "Install and run", "Your own cells", "Five findings", "Notebooks", "Limits", "Hardware and minutes", "Links",
    ]  # fmt: skip
    results = text.split("<!-- results:begin -->")[1].split("<!-- results:end -->")[0]
    assert len(re.findall(r"^\d\. ", results, flags=re.M)) == 5
    assert "**Confounded:**" in results
    listed = re.findall(r"\(notebooks/(.*?)\.ipynb\)", text)
    assert listed == sorted(path.stem for path in (ROOT / "notebooks").glob("[0-9][0-9]_*.ipynb"))


def test_times_are_near_those_of_the_records():
    text = read("README.md")
    seconds = {
        profile: sum(json.loads(file.read_text())["seconds"] for file in (ROOT / "figures" / profile).glob("*.json"))
        for profile in ("demo", "small")
    }
    needs = yaml.safe_load(read("notebooks/profiles/needs.yaml"))["paper"]
    stated = {
        r"\| (\d+) minutes; \d+ minutes \|": seconds["demo"] / 60,
        r"\| (\d+) hours of one thread \|": seconds["small"] / 3600,
        r"\| (\d+) days, estimated": sum(entry["minutes"] for entry in needs.values()) / 60 / 24,
    }
    for pattern, measured in stated.items():
        assert float(re.search(pattern, text).group(1)) == pytest.approx(measured, rel=1 / 3), pattern


def slug(heading):
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


@pytest.mark.parametrize("page", [*PAGES, "CONTRIBUTING.md", "CHANGELOG.md"])
def test_links_lead_somewhere(page):
    links = re.findall(r"\]\(([^)\s]+)\)", re.sub(r"^```.*?^```$", "", read(page), flags=re.M | re.S))
    for link in links:
        if link.startswith("https://"):
            continue
        path, _, anchor = link.partition("#")
        target = (ROOT / page).parent / path if path else ROOT / page
        assert target.exists(), f"{page} links to {link}"
        if anchor:
            assert anchor in map(slug, re.findall(r"^##* (.*)$", target.read_text(), flags=re.M)), f"{page}: {link}"


def test_commands_of_scbert_parse(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    commands = read_commands("scbert")
    assert len(commands) > 20
    for page, words in commands:
        where = f"{page}: scbert {shlex.join(words)}"
        assert words[0] in main.commands, where
        command = main.commands[words[0]]
        if "--help" in words:
            notebooks.find_notebook(words[1])
        if "--help" in words or len(words) == 1:
            continue
        try:
            given = command.make_context(words[0], words[1:]).params
            if words[0] == "run":
                source = notebooks.find_notebook(given["notebook"])
                offered = notebooks.read_parameters(source)
                for value in dict(given["pairs"]).values():
                    for word in re.findall(r"[\w/]+\.[a-z]\w+", value):
                        Path(word).touch()  # the reader's own file
                notebooks.choose_parameters(source, offered, given["profile"], dict(given["pairs"]))
                assert given["part"] is None or preflight.has_benchmark(source), where
            if words[0] == "fetch":
                assert set(given["names"]) <= set(scbert.datasets.CATALOGUE), where
        except click.ClickException as error:
            pytest.fail(f"{where}: {error.format_message()}")


def test_other_commands_name_what_there_is():
    targets = re.findall(r"^([a-z]+):", read("Makefile"), flags=re.M)
    variables = {"PROFILE", "JOBS", "PARTS", "TORCH_INDEX", "ANYWAY"}
    makes = read_commands("make")
    assert len(makes) > 5
    for page, words in makes:
        names = [word for word in words if "=" not in word]
        assert names and set(names) <= set(targets), f"{page}: make {words}"
        assert {word.split("=")[0] for word in words if "=" in word} <= variables, f"{page}: make {words}"
    for page, words in read_commands("python"):
        script = ROOT / words[0]
        assert script.is_file(), f"{page}: python {words}"
        for word in words[1:]:
            assert word.isdigit() or word.lstrip("-") in script.read_text(), f"{page}: python {words}"
    for _, words in read_commands("snakemake"):
        assert (ROOT / words[words.index("--workflow-profile") + 1] / "config.yaml").is_file()
        for word in words[words.index("--config") + 1 :]:
            assert f'"{word.split("=")[0]}"' in read("Snakefile")
    extras = tomllib.loads(read("pyproject.toml"))["project"]["optional-dependencies"]
    for _, words in read_commands("pip"):
        assert set(re.fullmatch(r"\.\[(.*)\]", words[-1]).group(1).split(",")) <= set(extras)


def test_names_of_the_package_are_there():
    found = set()
    for page in PAGES:
        commands, blocks = read_code(page)
        for block in blocks:
            ast.parse(block)
        text = re.sub(r"^```\n.*?^```$", "", read(page), flags=re.M | re.S)
        code = blocks + re.findall(r"`([^`\n]+)`", text)
        found |= {(page, name) for part in code for name in re.findall(r"\bscbert(?:\.[A-Za-z]\w*)+", part)}
    assert len(found) > 15
    for page, name in found:
        thing = scbert
        for part in name.split(".")[1:]:
            assert hasattr(thing, part), f"{page} names {name}"
            thing = getattr(thing, part)


def test_table_of_data_sets_is_that_of_the_catalogue():
    rows = re.findall(r"^\| `(\w+)` \| ([\d,]+) x ([\d,]+) \| (\w+) \|", read("docs/data.md"), flags=re.M)
    catalogue = scbert.datasets.CATALOGUE
    offered = [n for n, entry in catalogue.items() if entry["kind"] == "cells" and entry["profile"] != "paper"]
    assert [row[0] for row in rows] == offered
    for name, n_cells, n_genes, n_labels in rows:
        assert [int(n.replace(",", "")) for n in (n_cells, n_genes)] == catalogue[name]["shape"]
        if catalogue[name]["labels"]:
            file = ROOT / "scbert" / "sources" / "labels" / f"{name}.csv"
            types = {row["cell_type"] for row in csv.DictReader(file.read_text().splitlines())}
            if name == "pbmc68k_reduced":  # none of its cells has one of Zheng68K's eleven
                types = set(scbert.datasets.load(name).obs["cell_type"])
            assert int(n_labels) == len(types), name
        else:
            assert n_labels == "none"


def test_size_of_the_downloads_is_that_of_the_catalogue():
    entries = [entry for entry in scbert.datasets.CATALOGUE.values() if entry["profile"] in ("demo", "small")]
    size = sum(file["bytes"] for entry in entries for file in entry["files"]) / 1e6
    for page in ("README.md", "docs/cluster.md"):
        assert f"{size:.0f} MB of downloads" in read(page)
