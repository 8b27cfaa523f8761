"""Two labellings of the same cells: where they agree, and whose side they take."""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

from scbert import datasets, labellings, plot

BROAD = {"Naive CD4 T cell": "CD4 T cell", "CD8 T cell": "CD8 T cell", "B cell": "B cell"}


def name_cells(labels, broad=BROAD):
    obs = pd.DataFrame({"cell_type": labels}, index=[f"cell{i}" for i in range(len(labels))])
    return obs.assign(cell_type_broad=obs["cell_type"].map(broad))


@pytest.fixture
def obs(monkeypatch):
    """Four cells of a set that another one names too, the first three of them, with a coarser name for T cells."""
    other = name_cells(["CD4 T cell", "CD4 T cell", "B cell"], {"CD4 T cell": "CD4 T cell", "B cell": "B cell"})
    monkeypatch.setitem(datasets.CATALOGUE, "mine", {"kind": "cells", "labelled_by": ["theirs"]})
    monkeypatch.setattr(datasets, "load", lambda name: type("Cells", (), {"obs": {"theirs": other}[name]}))
    return name_cells(["Naive CD4 T cell", "CD8 T cell", "B cell", "B cell"])


def test_labellings_agree_as_far_as_the_coarser_of_both_can_tell(obs):
    other = labellings.read_labellings("mine")["theirs"]
    assert list(labellings.agree(obs[:3], other)) == [True, False, True]
    assert list(labellings.agree(other, obs[:3])) == [True, False, True]


def test_the_ceiling_is_measured_on_the_cells_that_both_name(obs):
    ceiling = labellings.measure_ceiling("mine", obs)
    assert list(ceiling.index) == ["theirs"]
    assert ceiling.loc["theirs", ["value", "n"]].tolist() == [pytest.approx(2 / 3), 3]
    assert ceiling.loc["theirs", "low"] < 2 / 3 < ceiling.loc["theirs", "high"]


def test_there_is_no_ceiling_without_another_labelling_or_without_cells_of_it(obs):
    assert labellings.measure_ceiling("zheng_facs", obs).empty
    assert labellings.measure_ceiling("my.h5ad", obs).empty
    assert labellings.measure_ceiling("mine", obs[3:]).empty
    assert labellings.measure_ceiling("mine", obs[["cell_type"]]).empty


def test_where_a_method_and_a_label_disagree_another_labelling_is_asked(obs):
    said = {"cell0": "CD8 T cell", "cell1": "Naive CD4 T cell", "cell2": "B cell", "cell3": "CD8 T cell"}
    predictions = pd.DataFrame({"cell": list(said), "method": "one", "prediction": list(said.values())})
    found = labellings.blame("mine", obs, predictions)
    assert found.loc[("theirs", "one")].to_dict() == {"n": 2, "label": 0.5, "method": 0.5, "neither": 0}


def test_the_band_reaches_over_all_labellings_and_an_empty_table_draws_none():
    table = pd.DataFrame({"value": [0.8, 0.9], "low": [0.75, 0.85], "high": [0.85, 0.95], "n": 9}, index=["a", "b"])
    for along in ("x", "y"):
        ax = plt.subplots()[1]
        plot.ceiling(ax, table[:0], along)
        assert not ax.patches
        plot.ceiling([ax], table, along)
        corners = ax.patches[0].get_corners() if hasattr(ax.patches[0], "get_corners") else ax.patches[0].get_xy()
        assert np.ptp(np.asarray(corners)[:, "xy".index(along)]) == pytest.approx(0.2)
    plt.close("all")
