"""Each method on each split: the same cells for all."""

import anndata
import numpy as np
import pytest

import scbert
from scbert import benchmark, methods, protocols

SIZES = {"common": 60, "middle": 25, "rare": 5}


@pytest.fixture
def labels():
    """90 labels in random order, the rarest five times."""
    return np.random.default_rng(0).permutation(np.repeat(list(SIZES), list(SIZES.values())))


def test_the_published_recipe_reports_on_validation_cells(labels):
    adata = anndata.AnnData(np.ones((len(labels), 2)), obs={"cell_type": labels})
    majority = {"majority": methods.fit_majority}
    _, validation, test = protocols.stratified_splits(labels, 1)[0]
    for recipe, scored in ((scbert.Recipe.sound(), test), (scbert.Recipe.published(), validation)):
        rows = benchmark.cross_validate(adata, majority, n_folds=1, recipe=recipe)
        assert set(rows["cell"]) == set(adata.obs_names[scored])


def test_cross_validation_gives_each_method_the_same_cells_and_never_the_tested_ones(cells):
    seen = []

    def fit_spy(train, validation, *, label_key, seed):
        seen.append((set(train.obs_names), set(validation.obs_names)))
        return methods.fit_majority(train, validation, label_key=label_key)

    predictions = benchmark.cross_validate(cells, {"majority": methods.fit_majority, "spy": fit_spy}, n_folds=3)
    assert predictions.columns.tolist() == ["method", "fold", "cell", "truth", "predicted", "confidence"]
    for _, rows in predictions.groupby("method"):
        assert sorted(rows["cell"]) == sorted(cells.obs_names)
        assert rows["truth"].tolist() == cells.obs.loc[rows["cell"], "cell_type"].astype(str).tolist()
    for fold, (train, validation) in enumerate(seen):
        in_fold = (predictions["fold"] == fold) & (predictions["method"] == "spy")
        tested = set(predictions.loc[in_fold, "cell"])
        assert len(tested) == 20
        assert not train & validation
        assert not (train | validation) & tested


def test_the_published_report_is_on_the_cells_that_chose_the_epoch(cells):
    majority = {"majority": methods.fit_majority}
    splits = protocols.stratified_splits(cells.obs["cell_type"], 2)
    for report_on, part in (("validation", 1), ("test", 2)):
        recipe = scbert.Recipe(report_on=report_on)
        predictions = benchmark.cross_validate(cells, majority, n_folds=2, recipe=recipe)
        expected = [name for split in splits for name in cells.obs_names[split[part]]]
        assert predictions["cell"].tolist() == expected


def test_cross_validation_takes_splits_that_were_made_before(make_cells):
    adata = make_cells(30)
    splits = [(np.arange(10), np.arange(10, 20), np.arange(20, 30))]
    predictions = benchmark.cross_validate(adata, {"majority": methods.fit_majority}, splits=splits)
    assert list(predictions["cell"]) == list(adata.obs_names[20:])
