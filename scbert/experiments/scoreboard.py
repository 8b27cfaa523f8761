"""The paper's numbers beside those of others and of this run, and a verdict on each (notebook 11)."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import pandas as pd

from ..paths import find_file

CLAIMS = ["claim", "experiment", "paper", "others", "against", "metric", "rival", "lower_is_better"]
RIVALS = ("logistic_regression", "majority")
"""Methods that stand beside each of scBERT's numbers, on the same cells."""

COLUMNS = [
    *("experiment", "metric", "paper", "source", "figure", "n", "band", "band_reason"),
    *("reproduction", "reproduction_source", "stand_in"),
]


def read_published(path: str | Path) -> pd.DataFrame:
    """Read a list of published numbers, such as ``tests/expected/paper.csv``: one row a number or a reproduction of it.

    `path` is as in `scbert.paths.find_file`. A ValueError if a column is missing, or the band of a published number.

    The columns are `experiment`, as in the paper; `metric`, its name in a record, repeated where several reproduced it;
    `paper`, the published value, or NaN; its `source`, `figure` and `n`, the cells behind it; `band`, how far from it a
    run may lie to have reproduced it, and `band_reason`; `reproduction`, a value that others found, and
    `reproduction_source`; and `stand_in`, the metric of the demo that is nearest to it.
    """
    table = _read_list(path, COLUMNS)
    without = table["metric"][table["paper"].notna() & ~(table["band"] > 0)]
    if len(without):
        raise ValueError(f"{path} has a published value but no band of: {', '.join(without)}.")
    return table


def judge_claims(path: str | Path, metrics: Mapping[str, dict]) -> pd.DataFrame:
    """Return what the records of a profile say of the paper's claims, such as those of ``tests/expected/claims.csv``.

    `metrics` is from `gather_metrics`. A claim has `paper`, its evidence, `others`, what published reproductions found, both
    with tags of their sources; and what asks it here: `metric`, a regular expression of names without the rival, `rival`, and
    `lower_is_better`. Of each metric the difference to the rival on record decides, or else the two intervals apart.

    One row a claim: how often scBERT is `ahead`, `behind`, or it is `not decided`, and the `verdict`: "supported" if it is
    ahead each time, "supported with conditions" if sometimes, "not supported" if never, "not yet tested" without a metric. It
    is about the cells and models of this profile. A ValueError if a column is missing.
    """
    table, rows = _read_list(path, CLAIMS), []
    for row in table.itertuples():
        names = sorted({name.split("_minus_")[0] for name in metrics})
        found = [_compare(metrics, name, row.rival) for name in names if re.fullmatch(row.metric, name)]
        signs = [(-1) ** row.lower_is_better * sign for sign in found if sign is not None]
        counts = {"ahead": signs.count(1), "not decided": signs.count(0), "behind": signs.count(-1)}
        some = "supported with conditions" if counts["ahead"] else "not supported"
        verdict = "supported" if signs and counts["ahead"] == len(signs) else some if signs else "not yet tested"
        rows.append(counts | {"verdict": verdict})
    return table.set_index("claim")[CLAIMS[1:5]].join(pd.DataFrame(rows, index=table["claim"]))


def _compare(metrics, name, rival):
    """Return 1 if a method is above a rival, -1 if below, 0 if that is not decided, None if there is no such rival."""
    number = metrics.get(f"{name}_minus_{rival}")
    if number is None:
        one, other = metrics.get(name), metrics.get(re.sub("/scbert(?=[:/])", f"/{rival}", name))
        if one is None or other is None or one is other:
            return None
        number = {"low": one["low"] - other["high"], "high": one["high"] - other["low"]}
    return int(number["low"] > 0) - int(number["high"] < 0)


def list_runs(records: Mapping[str, dict], *, without: str = "") -> pd.DataFrame:
    """List records by notebook: where each is from, its seconds, and how many metrics it holds.

    `records` are from `scbert.report.read_records`; `without` is a notebook to leave out, the one that asks.
    """
    rows = {
        name: {"source": record["source"], "seconds": record["seconds"], "metrics": len(record["metrics"])}
        for name, record in records.items()
        if name != without
    }
    return pd.DataFrame(rows).T


def _read_list(path, columns):
    table = pd.read_csv(find_file(path), keep_default_na=False, na_values=[""])
    missing = [column for column in columns if column not in table]
    if missing:
        raise ValueError(f"{path} lacks the columns {', '.join(missing)}: it needs {', '.join(columns)}.")
    return table


def gather_metrics(records: Mapping[str, dict]) -> dict[str, dict]:
    """Return name -> number of all records of a profile, see `scbert.report.read_records`, each with its "source"."""
    return {
        name: number | {"source": record["source"]}
        for record in records.values()
        for name, number in record["metrics"].items()
    }


def judge(number: dict | None, published: float, band: float) -> str:
    """Return a verdict on a number of a record: "reproduced" within the band, "close" within twice the band.

    Further away it is "not reproduced"; and "not run" where there is no number, or none was published.
    """
    if number is None or pd.isna(published):
        return "not run"
    distance = abs(number["value"] - published) / band
    return "reproduced" if distance <= 1 else "close" if distance <= 2 else "not reproduced"


def fill_board(published: pd.DataFrame, metrics: Mapping[str, dict], profile: str) -> pd.DataFrame:
    """Put the paper's numbers, those of others and of this run in one table, with a verdict on each.

    `published` is from `read_published`; `metrics` is from `gather_metrics`. Only "paper" runs the paper's quantities, and
    gets verdicts; in others a row shows its stand-in, of other cells, and says "not run".

    One row a metric: `experiment`, `paper`, `published reproductions` with their sources, `this run`, the same of each
    of `RIVALS`, and `verdict`.
    """
    is_paper = profile in ("core", "paper")
    board = published.drop_duplicates("metric").set_index("metric")
    others = published["reproduction"].map("{:.4f}".format, na_action="ignore")
    others = (others + " [" + published["reproduction_source"] + "]").groupby(published["metric"])
    board["published reproductions"] = others.agg(lambda found: ", ".join(found.dropna()))
    names = board.index.to_series() if is_paper else board["stand_in"].fillna("")
    this_run = "this run" if is_paper else f"this run ({profile} stand-in)"
    board[this_run] = _write_numbers(metrics, names)
    for method in RIVALS:
        board[method] = _write_numbers(metrics, names.str.replace(r"/[^/]+/", f"/{method}/", regex=True))
    found = [metrics.get(name) if is_paper else None for name in board.index]
    board["verdict"] = [judge(*row) for row in zip(found, board["paper"], board["band"], strict=True)]
    return board[["experiment", "paper", "published reproductions", this_run, *RIVALS, "verdict"]]


def _write_numbers(metrics: Mapping[str, dict], names: Sequence[str]) -> list[str]:
    """Return each metric as ``value [low, high]``, marked if not of this machine, and an empty text where there is none."""
    form = "{value:.3f} [{low:.3f}, {high:.3f}]"
    marks = [" (published run)" if metrics.get(name, {}).get("source") == "published" else "" for name in names]
    return [
        form.format(**metrics[name]) + mark if name in metrics else "" for name, mark in zip(names, marks, strict=True)
    ]


def select_reproduced(published: pd.DataFrame, metric: str = "accuracy") -> pd.DataFrame:
    """Return the rows of a metric that have a published value and a reproduction: what can be drawn side by side."""
    is_metric = published["metric"].str.endswith(f"/{metric}")
    return published[is_metric & published["reproduction"].notna() & published["paper"].notna()]
