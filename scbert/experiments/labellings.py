"""Two labellings of the same cells: how far they agree bounds what any method can be seen to reach."""

import numpy as np
import pandas as pd

from ..evaluate.metrics import bootstrap
from ..sources import datasets


def read_labellings(dataset: str) -> dict[str, pd.DataFrame]:
    """Return what others called the cells of a set: name of the labelling -> `cell_type` and `cell_type_broad` by cell.

    The catalogue names them under ``labelled_by``; none for other sets, and one's own files.
    """
    names = datasets.CATALOGUE.get(dataset, {}).get("labelled_by", [])
    return {name: datasets.load(name).obs[["cell_type", "cell_type_broad"]].astype(str) for name in names}


def agree(own: pd.DataFrame, other: pd.DataFrame) -> np.ndarray:
    """Return of the same cells, in the same order, whether two labellings agree as far as the coarser of both can tell.

    They do where the names of `cell_type` are equal, or one's is the other's `cell_type_broad`: "Naive CD4 T cell" and
    "CD4 T cell" agree.
    """
    pairs = [("cell_type", "cell_type"), ("cell_type_broad", "cell_type"), ("cell_type", "cell_type_broad")]
    return np.any([own[one].to_numpy() == other[two].to_numpy() for one, two in pairs], axis=0)


def measure_ceiling(dataset: str, obs: pd.DataFrame, *, seed: int = 0) -> pd.DataFrame:
    """Measure how often other labellings agree with a set's own, on those of the cells that they name.

    `obs` are the cells that are tested, say, with the columns `cell_type` and `cell_type_broad` of a catalogue set. A
    method that is no better than people is not to be expected above these numbers.

    Returns
    -------
    A row a labelling, the index; columns value, low, high (95 %, bootstrap over cells) and n; empty without another
    labelling, and without these columns.
    """
    rows = {}
    if {"cell_type", "cell_type_broad"} <= set(obs):
        own = obs[["cell_type", "cell_type_broad"]].astype(str)
        for name, other in read_labellings(dataset).items():
            cells = own.index.intersection(other.index)
            if len(cells):
                rows[name] = bootstrap(np.mean, agree(own.loc[cells], other.loc[cells]).astype(float), seed=seed)
    return pd.DataFrame.from_dict(rows, orient="index", columns=["value", "low", "high", "n"])


def blame(dataset: str, obs: pd.DataFrame, predictions: pd.DataFrame) -> pd.DataFrame:
    """Ask other labellings about the cells where a method and the set's own label disagree.

    `obs` are as in `measure_ceiling`; `predictions` have cell, method and prediction, in the names of `cell_type`. A row a
    labelling and method: `n` of such cells that it names, and the share with which it is on the side of the `label`, of
    the `method`, and of neither.
    """
    own, rows = obs[["cell_type", "cell_type_broad"]].astype(str), {}
    broad = own.drop_duplicates("cell_type").set_index("cell_type")["cell_type_broad"]
    for name, other in read_labellings(dataset).items():
        asked = predictions[predictions["cell"].isin(own.index.intersection(other.index))]
        for method, part in asked.groupby("method", sort=False):
            said = pd.DataFrame(
                {"cell_type": part["prediction"].to_numpy(), "cell_type_broad": part["prediction"].map(broad)}
            )
            truth, second = own.loc[part["cell"]], other.loc[part["cell"]]
            differs = said["cell_type"].to_numpy() != truth["cell_type"].to_numpy()
            if differs.any():
                label, theirs = (agree(one[differs], second[differs]).mean() for one in (truth, said))
                neither = (~agree(truth[differs], second[differs]) & ~agree(said[differs], second[differs])).mean()
                rows[name, method] = {"n": int(differs.sum()), "label": label, "method": theirs, "neither": neither}
    return pd.DataFrame.from_dict(rows, orient="index", columns=["n", "label", "method", "neither"])
