"""Two labellings of the same cells: where they agree, and whose side they take."""

import os

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

import scbert
from scbert import datasets, labellings, plot

LABELS = ["Naive CD4 T cell", "CD8 T cell", "B cell", "B cell"]


@pytest.fixture
def predictions(monkeypatch):
    """On a set of four cells, the first three of which another labelling names too, with a coarser name for T cells."""
    other = pd.DataFrame({"cell_type": ["CD4 T cell", "CD4 T cell", "B cell"]}, index=["cell0", "cell1", "cell2"])
    other["cell_type_broad"] = other["cell_type"]
    table = pd.DataFrame({"cell_type": LABELS[:3], "cell_type_broad": ["CD4 T cell", "CD8 T cell", "B cell"]})
    monkeypatch.setitem(datasets.CATALOGUE, "mine", {"kind": "cells", "labelled_by": ["theirs"]})
    monkeypatch.setattr(datasets, "load", lambda name: type("Cells", (), {"obs": {"theirs": other}[name]}))
    monkeypatch.setattr(datasets, "read_labels", lambda name: {"mine": table}[name])
    said = ["CD8 T cell", "Naive CD4 T cell", "B cell", "CD8 T cell"]
    rows = {"data": "mine", "cell": [f"cell{i}" for i in range(4)], "truth": LABELS, "predicted": said, "method": "one"}
    return pd.DataFrame(rows)


@pytest.mark.parametrize("dataset", ["mine", "other->mine"])
def test_labellings_agree_as_far_as_the_coarser_of_both_can_tell(predictions, dataset):
    asked = labellings.ask_others(predictions.assign(data=dataset))
    assert asked["second"].tolist() == ["CD4 T cell", "CD4 T cell", "B cell"]
    assert asked["with_label"].tolist() == [True, False, True]
    assert asked["with_method"].tolist() == [False, True, True]


def test_labels_of_a_coarser_column_are_compared_as_they_are(predictions):
    predictions["truth"] = ["CD4 T cell", "CD8 T cell", "B cell", "B cell"]
    assert labellings.ask_others(predictions)["with_label"].tolist() == [True, False, True]


def test_the_ceiling_is_measured_once_on_each_cell_that_both_name(predictions):
    twice = pd.concat([predictions, predictions.assign(method="two")])
    ceiling = labellings.measure_ceiling(twice)
    assert list(ceiling.index) == ["theirs"]
    assert ceiling.loc["theirs", ["value", "n"]].tolist() == [pytest.approx(2 / 3), 3]
    assert ceiling.loc["theirs", "low"] < 2 / 3 < ceiling.loc["theirs", "high"]


@pytest.mark.parametrize(("dataset", "start"), [("zheng_facs", 0), ("my.h5ad", 0), ("mine", 3)])
def test_there_is_no_ceiling_without_another_labelling_or_without_cells_of_it(predictions, dataset, start):
    predictions = predictions[start:].assign(data=dataset)
    asked = labellings.ask_others(predictions)
    assert asked.empty
    assert labellings.measure_ceiling(predictions).empty
    assert labellings.blame(asked).empty


def test_where_a_method_and_a_label_disagree_another_labelling_is_asked(predictions):
    found = labellings.blame(labellings.ask_others(predictions))
    assert found.loc[("theirs", "one")].to_dict() == {"n": 2, "label": 0.5, "method": 0.5, "neither": 0}


@pytest.mark.skipif(not os.environ.get("SCBERT_MIRROR"), reason="SCBERT_MIRROR names no real files")
def test_two_labellings_of_kang_agree_with_its_own_on_five_cells_of_six():
    obs = scbert.datasets.load("kang_pbmc").obs
    cells = pd.DataFrame(
        {"data": "kang_pbmc", "cell": obs.index, "truth": obs["cell_type"], "predicted": "B cell", "method": "one"}
    )
    ceiling = labellings.measure_ceiling(cells)
    assert ceiling["n"].to_dict() == {"kang_labels_authors": 949, "kang_labels_seurat": 813}
    assert ceiling["value"].round(3).to_dict() == {"kang_labels_authors": 0.846, "kang_labels_seurat": 0.861}


def test_the_band_reaches_over_all_labellings_and_an_empty_table_draws_none():
    table = pd.DataFrame({"value": [0.8, 0.9], "low": [0.75, 0.85], "high": [0.85, 0.95], "n": 9}, index=["a", "b"])
    for along in ("x", "y"):
        ax = plt.subplots()[1]
        plot.ceiling(ax, table[:0], "accuracy", along)
        plot.ceiling(ax, table, "macro_f1", along)
        assert not ax.patches
        plot.ceiling([ax], table, "accuracy", along)
        corners = ax.patches[0].get_corners() if hasattr(ax.patches[0], "get_corners") else ax.patches[0].get_xy()
        assert np.ptp(np.asarray(corners)[:, "xy".index(along)]) == pytest.approx(0.2)
    plt.close("all")
