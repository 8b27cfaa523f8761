"""Two labellings of the same cells: how far they agree bounds what any method can be seen to reach."""

from functools import cache

import numpy as np
import pandas as pd

from ..evaluate.metrics import bootstrap
from ..sources import datasets

SIDES = {"with_label": "truth", "with_method": "predicted"}
SIDE_BY_SIDE = ["labelling", "method", "truth", "second", "predicted"]  # columns of `ask_others`: a confusion of three


@cache
def read_labellings(dataset: str) -> dict[str, pd.DataFrame]:
    """Return what others called the cells of a set: name of the labelling -> `cell_type` and `cell_type_broad` by cell.

    The catalogue names them under ``labelled_by``; none for other sets, and one's own files. Of "one->other" it is the other.
    """
    names = datasets.CATALOGUE.get(dataset.rsplit("->")[-1], {}).get("labelled_by", [])
    return {name: datasets.load(name).obs[["cell_type", "cell_type_broad"]].astype(str) for name in names}


def agree(dataset: str, names: pd.Series, other: pd.DataFrame) -> np.ndarray:
    """Return of cells whether a name and another labelling agree, as far as the coarser of both can tell.

    They do where the name is the other's `cell_type`, or one's name is the other's `cell_type_broad`: "Naive CD4 T cell" and
    "CD4 T cell" agree. `names` are of the set's `cell_type`, or coarser, in the order of `other`.
    """
    table = datasets.read_labels(dataset.rsplit("->")[-1]).drop_duplicates("cell_type").set_index("cell_type")
    names = names.astype(str).reset_index(drop=True)
    broad = names.map(table["cell_type_broad"]).fillna(names)
    theirs = other.reset_index(drop=True)
    is_same = (names == theirs["cell_type"]) | (broad == theirs["cell_type"]) | (names == theirs["cell_type_broad"])
    return is_same.to_numpy()


def ask_others(predictions: pd.DataFrame) -> pd.DataFrame:
    """Set what others call the cells of a set beside its own labels, and beside what methods say.

    `predictions` have data (the set's name), cell, truth and predicted. Returns those of cells that another labelling names,
    a row for each that does, with columns labelling and second (what it says), and with_label and with_method: whether it
    agrees with either.
    """
    found = [predictions[:0].assign(labelling="", second="", with_label=False, with_method=False)]
    for dataset, own in predictions.groupby("data", sort=False):
        for name, other in read_labellings(dataset).items():
            rows = own[own["cell"].isin(other.index)]
            second = other.loc[rows["cell"]]
            sides = {side: agree(dataset, rows[column], second) for side, column in SIDES.items()}
            found.append(rows.assign(labelling=name, second=second["cell_type"].to_numpy(), **sides))
    return pd.concat(found[1:] or found)


def measure_ceiling(predictions: pd.DataFrame, *, seed: int = 0) -> pd.DataFrame:
    """Measure how often other labellings agree with a set's own, on those of the tested cells that they name.

    `predictions` are as in `ask_others`. A method that is no better than people is not to be expected above these numbers. A
    row a labelling, the index; columns value, low, high (95 %, bootstrap over cells) and n.
    """
    once = ask_others(predictions).drop_duplicates(["labelling", "cell"]).groupby("labelling", sort=False)["with_label"]
    rows = {name: bootstrap(np.mean, part.to_numpy(float), seed=seed) for name, part in once}
    return pd.DataFrame.from_dict(rows, orient="index", columns=["value", "low", "high", "n"])


def blame(asked: pd.DataFrame) -> pd.DataFrame:
    """Tell with whom another labelling agrees where a method and the set's label do not.

    `asked` is from `ask_others`. A row a labelling and method: `n` of these cells, and the shares with which it takes the
    side of the `label`, of the `method`, and of neither.
    """
    rows = asked[asked["truth"] != asked["predicted"]]
    rows = rows.assign(n=1, label=rows["with_label"], neither=~(rows["with_label"] | rows["with_method"]))
    by = rows.rename(columns={"method": "who", "with_method": "method"}).groupby(["labelling", "who"], sort=False)
    table = by[["label", "method", "neither"]].mean().rename_axis(["labelling", "method"])
    table.insert(0, "n", by["n"].sum())
    return table
