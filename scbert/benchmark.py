"""Each method on each split: the same cells for all."""

from collections.abc import Callable

import anndata
import pandas as pd

from .protocols import Split, check_disjoint, stratified_splits
from .recipe import Recipe


def cross_validate(
    adata: anndata.AnnData,
    methods: dict[str, Callable],
    *,
    label_key: str = "cell_type",
    n_folds: int = 5,
    splits: list[Split] | None = None,
    recipe: Recipe = Recipe(),
    seed: int = 0,
) -> pd.DataFrame:
    """Predict the test cells with each method, on the same splits.

    Parameters
    ----------
    adata
        Counts, tokenized if a method needs it.
    methods
        Name -> ``fit(train, validation, label_key=, seed=)``, which returns ``predict(adata)``, which returns
        probabilities (cells x labels, a DataFrame).
    label_key, n_folds, seed
        See `stratified_splits`.
    splits
        Splits already made, by `split_cells` say, in place of `n_folds`.
    recipe
        Its `report_on` says which cells are predicted: test cells, or as published the validation cells.

    Returns
    -------
    One row for each method and test cell, pooled over folds: method, fold, cell, truth, predicted, confidence.

    Raises
    ------
    ValueError
        See `stratified_splits`.

    Paper: Methods, "benchmarking"; Fig. 2a.
    """
    rows = []
    splits = stratified_splits(adata.obs[label_key], n_folds, seed) if splits is None else splits
    for fold, (train, validation, test) in enumerate(splits):
        check_disjoint(*(adata.obs_names[part] for part in (train, validation, test)))
        scored = test if recipe.report_on == "test" else validation
        for name, fit in methods.items():
            predict = fit(adata[train].copy(), adata[validation].copy(), label_key=label_key, seed=seed)
            rows.append(predict_cells(name, predict, adata[scored].copy(), label_key=label_key, fold=fold))
    return pd.concat(rows, ignore_index=True)


def predict_cells(
    method: str, predict: Callable, adata: anndata.AnnData, *, label_key: str = "cell_type", fold: int = 0
) -> pd.DataFrame:
    """Predict cells with a fitted method: one row a cell, in the columns of `cross_validate`."""
    probabilities = predict(adata)
    return pd.DataFrame(
        {
            "method": method,
            "fold": fold,
            "cell": adata.obs_names,
            "truth": adata.obs[label_key].astype(str).to_numpy(),
            "predicted": probabilities.columns[probabilities.to_numpy().argmax(1)],
            "confidence": probabilities.max(axis=1).to_numpy(),
        }
    )
