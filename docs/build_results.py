"""Fill the results of docs/results.md and of the README from the published records, by python docs/build_results.py.

``docs/results.template.md`` becomes ``docs/results.md``, and ``docs/readme_results.template.md`` the part of
``README.md`` between ``<!-- results:begin -->`` and ``<!-- results:end -->``. The templates are Jinja's. They hold no
number of a result: each comes from ``figures/<profile>/<notebook>.json`` or a CSV file beside it, by the functions
below. Sentences that a number could make untrue stand in ``claim``, which stops where they no longer hold.

A run is named by its profile and number, such as "small/04"; a method that has no metric was not run.
"""

import argparse
import json
import shlex
from collections.abc import Iterable
from functools import cache
from pathlib import Path

import jinja2
import pandas as pd
import yaml
from scipy import stats

from scbert import metrics
from scbert.experiments.benchmark import summarise_costs
from scbert.experiments.scoreboard import gather_metrics, judge_claims
from scbert.run.preflight import read_defaults, read_sections

ROOT = Path(__file__).resolve().parent.parent
BEGIN, END = "<!-- results:begin -->", "<!-- results:end -->"
METHODS = {
    "majority": "majority class",
    "logistic_regression": "logistic regression",
    "nearest_centroid": "nearest centroid",
    "celltypist": "CellTypist",
    "singler": "SingleR",
    "scanvi": "scANVI",
    "scbert": "scBERT",
    "scbert_scratch": "scBERT from random weights",
    "scbert_tuned": "scBERT, its settings chosen",
    "scbert_published": "scBERT, published recipe",
    "head_on_tokens": "control: the head alone, no encoder layer",
    "head_on_random_encoder": "control: the head on a frozen random encoder",
}
REMEDIES = {
    "class_weight": "classes weighted", "subsample": "common type subsampled", "oversample": "rare type oversampled",
}  # fmt: skip
WORDS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")


@cache
def find_record(run: str) -> Path:
    """Return the file of a published record, such as that of "small/04"."""
    profile, number = run.split("/")
    (file,) = (ROOT / "figures" / profile).glob(f"{number}_*.json")
    return file


@cache
def record(run: str) -> dict:
    """Return a published record."""
    return json.loads(find_record(run).read_text())


def metric(run: str, name: str) -> dict:
    """Return a metric of a record: value, low, high, n, unit."""
    metrics = record(run)["metrics"]
    if name not in metrics:
        raise KeyError(f"{run} has no metric {name}.")
    return metrics[name]


def rows(run: str, table: str, **chosen) -> list[dict]:
    """Return the rows of a CSV file beside a record, those whose columns have the values chosen."""
    frame = pd.read_csv(find_record(run).with_suffix("") / f"{table}.csv")
    for column, value in chosen.items():
        frame = frame[frame[column] == value]
    return frame.to_dict("records")


def costs(run: str) -> list[dict]:
    """Return what each method cost in a run, as `scbert.benchmark.summarise_costs` sums it up, the least first."""
    table = pd.read_csv(find_record(run).with_suffix("") / "costs.csv", keep_default_na=False, na_values=[""])
    table["protocol"] = table["protocol"].fillna("")
    return summarise_costs(table, protocol="").reset_index().sort_values("cpu_hours_in_all").to_dict("records")


def row(run: str, table: str, **chosen) -> dict:
    """Return the only row of a CSV file with the values chosen."""
    found = rows(run, table, **chosen)
    if len(found) != 1:
        raise ValueError(f"{table} of {run} has {len(found)} rows with {chosen}.")
    return found[0]


def difference(run: str, table: str, rival: str) -> dict:
    """Return scBERT minus a rival, with the limits that are corrected for the number of rivals in the table."""
    found = row(run, table, method=rival)
    return {name: found[name] for name in ("value", "low", "high", "n")}


def paired(run: str, data: str, protocol: str, method: str, other: str) -> dict:
    """Return the accuracy of a method minus that of another, from the published predictions of a benchmark's test cells."""
    wide = pd.read_csv(find_record(run).with_suffix("") / "predictions.csv.gz", keep_default_na=False)
    wide = wide[(wide["data"] == data) & (wide["protocol"] == protocol) & (wide["part"] == "test")]
    keep = ["protocol", "repeat", "fold", "cell", "truth"]
    return metrics.compare(wide.melt(keep, [method, other], "method", "predicted"), method, other)


@cache
def measured(name: str) -> pd.DataFrame:
    """Return what a script of the tests measured: "heads" or "layers"."""
    return pd.read_csv(ROOT / "tests" / "expected" / f"{name}.csv")


def few_cells(encoder: str, head: str, n: int, column: str = "test accuracy") -> pd.Series:
    """Return the accuracies with few cells of each label, by seed; see ``tests/measure_heads.py``."""
    table = measured("heads")
    chosen = (table["encoder"] == encoder) & (table["head"] == head) & (table["cells a label"] == n)
    return table[chosen].set_index("seed")[column].sort_index()


def average(by_seed: pd.Series) -> dict:
    """Return the mean of numbers, one a seed, with Student's interval."""
    half = stats.t.ppf(0.975, len(by_seed) - 1) * by_seed.sem()
    return {"value": by_seed.mean(), "low": by_seed.mean() - half, "high": by_seed.mean() + half}


def lead(encoder: str, head: str, n: int) -> dict:
    """Return an encoder's accuracy minus that of random weights with the same head, seed by seed."""
    return average(few_cells(encoder, head, n) - few_cells("random", head, n))


def share_of_head(encoder: str, n: int) -> dict:
    """Return how much less an encoder is behind random weights with the mended head than with the published one."""
    heads = [few_cells(encoder, head, n) - few_cells("random", head, n) for head in ("sound", "published")]
    return average(heads[0] - heads[1])


def count_states(encoder: str, head: str) -> dict[str, int]:
    """Return how many of an encoder's trainings with few cells of each label came to what, see `scbert.train.steps.judge`."""
    table = measured("heads")
    return table[(table["encoder"] == encoder) & (table["head"] == head)]["state"].value_counts().to_dict()


def layer(encoder: str, n: int, number_of_layer: int, column: str) -> pd.Series:
    """Return what ``tests/measure_layers.py`` measured, by draw."""
    table = measured("layers")
    chosen = (table["encoder"] == encoder) & (table["cells a label"] == n) & (table["layer"] == number_of_layer)
    return table[chosen].set_index("seed")[column].sort_index()


def number(value: float, digits: int = 3, sign: bool = False) -> str:
    """Return a number rounded, with a true minus, and a plus if `sign`; zero has none."""
    text = f"{value:+.{digits}f}" if sign else f"{value:.{digits}f}"
    return text.lstrip("+-") if float(text) == 0 else text.replace("-", "−")


def score(found: dict, digits: int = 3, sign: bool = False) -> str:
    """Return a number with its interval: 0.879 [0.861, 0.898]; with more digits where a limit that is not zero would look so."""
    while digits < 6 and any(
        0 < abs(found[key]) < 0.5 * 10**-digits for key in ("low", "high") if verdict(found) != "not decided"
    ):
        digits += 1
    value, low, high = (number(found[key], digits, sign) for key in ("value", "low", "high"))
    return f"{value} [{low}, {high}]"


def change(found: dict, digits: int = 3) -> str:
    """Return a difference with its interval, signed."""
    return score(found, digits, sign=True)


def size(found: dict, digits: int = 3) -> str:
    """Return how large a difference is, with its interval, without a sign: for "ahead by" and "behind by"."""
    if found["value"] >= 0:
        return score(found, digits)
    return score({"value": -found["value"], "low": -found["high"], "high": -found["low"]}, digits)


def percent(value: float) -> str:
    """Return a share in per cent."""
    return f"{100 * value:.0f} %"


def points(found: dict) -> str:
    """Return a difference of shares in points of a hundred, with its interval."""
    return score({key: 100 * found[key] for key in ("value", "low", "high")}, 1)


def verdict(found: dict, small_is_good: bool = False) -> str:
    """Say whether a difference is ahead, behind, or not decided, since its interval holds zero."""
    if found["low"] <= 0 <= found["high"]:
        return "not decided"
    return "ahead" if (found["value"] > 0) != small_is_good else "behind"


def count(n: int, what: str) -> str:
    """Return "one training", "5 trainings" as "five trainings"; above ten in figures."""
    n = int(n)
    return f"{WORDS[n] if n < len(WORDS) else f'{n:,}'} {what}{'' if n == 1 else 's'}"


def label(method: str, run: str | None = None) -> str:
    """Return a method's name as it stands in tables; scBERT with where its weights come from, if a run is named.

    A remedy for rare types stands behind a colon: "scbert:oversample".
    """
    method, _, remedy = method.partition(":")
    name = METHODS[method]
    if method == "scbert" and not remedy and run is not None:
        encoder = record(run)["parameters"]["encoder"]
        name += f" from `{encoder}`" if encoder else ", pretrained on the training cells"
    return f"{name}, {REMEDIES[remedy]}" if remedy else name


def rank(run: str, pattern: str) -> list[str]:
    """Return the methods that have a metric such as "zheng_facs/{}/accuracy", best first."""
    found = {m: record(run)["metrics"].get(pattern.format(m)) for m in METHODS}
    return sorted((m for m in found if found[m]), key=lambda m: -found[m]["value"])


def say_verdicts(run: str, rival: str) -> list[str]:
    """Return the verdicts on scBERT's accuracy against a rival, one a set of the run."""
    tables = sorted(find_record(run).with_suffix("").glob("differences_*_accuracy.csv"))
    return [verdict(difference(run, table.stem, rival)) for table in tables if rows(run, table.stem, method=rival)]


def claims(profile: str) -> list[dict]:
    """Return the verdicts on the paper's claims from all published records of a profile."""
    numbers = [file.name[:2] for file in sorted((ROOT / "figures" / profile).glob("*.json"))]
    known = {number: record(f"{profile}/{number}") | {"source": "published"} for number in numbers}
    file = ROOT / "tests" / "expected" / "claims.csv"
    return judge_claims(file, gather_metrics(known)).reset_index().to_dict("records")


def command(run: str) -> str:
    """Return the command of a published run: its profile, and what differs from that profile's parameters."""
    done, source = record(run), ROOT / "notebooks" / f"{find_record(run).stem}.ipynb"
    section = read_sections(source.parent, done["profile"]).get(source.stem) or {}
    usual = read_defaults(source) | section | {"profile": done["profile"]}
    changed = {k: v for k, v in done["parameters"].items() if k in usual and str(usual[k]) != str(v)}
    words = ["scbert", "run", source.stem[:2]]
    words += [] if done["profile"] == "demo" else ["--profile", done["profile"]]
    for name, value in changed.items():
        words += ["-p", name, str(value)]
    return f"`{shlex.join(words)}`"


def cells(run: str, names: Iterable[str]) -> str:
    """Return how many cells are behind some metrics: "500, 1,198 and 460"."""
    *first, last = [f"{metric(run, name)['n']:,}" for name in names]
    return f"{', '.join(first)} and {last}" if first else last


def columns(sets: dict[str, str], what: str) -> dict[str, str]:
    """Return the columns of a `table` of one metric for several sets, from title -> data of the metric's name."""
    return {title: f"{data}/{{}}/{what}" for title, data in sets.items()}


def table(run: str, columns: dict[str, str], digits: int = 3, methods: tuple = (), names: dict | None = None) -> str:
    """Return a table of methods, best first by the first column if no order is given.

    `columns` is title -> metric with {} for the method, such as {"accuracy": "zheng_facs/{}/accuracy"}; `names` are
    names of methods other than `label`'s.
    """
    patterns = list(columns.values())
    lines = [["method", *columns], ["---"] * (1 + len(columns))]
    for method in methods or rank(run, patterns[0]):
        found = [record(run)["metrics"].get(pattern.format(method)) for pattern in patterns]
        name = (names or {}).get(method) or label(method, run)
        lines.append([name, *("not run" if cell is None else score(cell, digits) for cell in found)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def note(run: str, n: str, seeds: str, over: str = "test cells and trainings", sets: Iterable[str] = ()) -> str:
    """Return the lines under a table: profile, cells, seeds, intervals, command, and the caveats of its sets.

    A caveat is the first sentence of the catalogue's; where that says that run and label are confounded, so is it
    said here.
    """
    done = record(run)
    first = f"{done['profile'].capitalize()} profile; {n}; {seeds}, seed {done['seed']}; "
    lines = [f"{first}95 % intervals over {over}. {command(run)}"]
    catalogue = yaml.safe_load((ROOT / "scbert" / "sources" / "catalogue.yaml").read_text())
    for name in sets:
        caveat = catalogue[name]["caveat"].split(". ")[0].rstrip(".")
        if "confounded" in caveat:
            confounded = "each type comes from a run of its own, so part of any score may be the run."
            lines.append(f"**Confounded:** in `{name}` {confounded}")
        else:
            lines.append(f"`{name}`: {caveat[0].lower() + caveat[1:]}.")
    return "\\\n".join(lines)


def claim(sentence: str, holds: bool) -> str:
    """Return a sentence that holds; stop at one that the records no longer bear out."""
    if not holds:
        raise ValueError(f"The records no longer bear this out: {sentence!r}. Correct the template.")
    return sentence


def render(template: str) -> str:
    """Return a template of this folder with its numbers filled in."""
    functions = (
        record, metric, rows, costs, row, difference, number, score, change, size, percent, points, verdict, count, label,
        say_verdicts, rank, cells, columns, table, note, claim, command, paired, measured, few_cells, lead, layer,
        average, share_of_head, count_states, claims,
    )  # fmt: skip
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(ROOT / "docs"), undefined=jinja2.StrictUndefined, trim_blocks=True,
        lstrip_blocks=True, keep_trailing_newline=True,
    )  # fmt: skip
    environment.globals |= {function.__name__: function for function in functions} | {"METHODS": METHODS}
    return environment.get_template(template).render()


def fill_readme(readme: str) -> str:
    """Return the README with its results filled in."""
    before, rest = readme.split(BEGIN)
    after = rest.split(END)[1]
    return f"{before}{BEGIN}\n{render('readme_results.template.md')}{END}{after}"


def main() -> None:
    """Write docs/results.md and the results of README.md, here or below another folder."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=ROOT, help="folder to write README.md and docs/results.md to")
    folder = parser.parse_args().output
    texts = {
        "README.md": fill_readme((ROOT / "README.md").read_text()),
        "docs/results.md": "<!-- Made by docs/build_results.py from docs/results.template.md: edit that. -->\n"
        + render("results.template.md"),
    }
    for name, text in texts.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
        print(f"Wrote {folder / name}")


if __name__ == "__main__":
    main()
