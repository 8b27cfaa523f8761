"""Settings that validation cells choose for scBERT, and a last fit on all reference cells."""

from functools import partial

import anndata
import numpy as np
import pandas as pd
import pytest

import scbert
from scbert import benchmark, methods, runner, tuning


@pytest.fixture
def parts(make_cells):
    """Training, validation and test cells, tokenized."""
    names = (make_cells(n, seed=seed) for seed, n in enumerate((60, 24, 30)))
    cells = [scbert.preprocess.tokenize(adata) for adata in names]
    for prefix, adata in zip("abc", cells, strict=True):
        adata.obs_names = prefix + adata.obs_names
    return cells


@pytest.fixture
def fit(config):
    return partial(methods.fit_scbert, encoder=config, n_epochs=2, progress=False)


@pytest.fixture
def trainings(monkeypatch):
    """What each fine-tuning was given, filled as they run."""
    calls, right = [], methods.finetune

    def finetune(model, train, **options):
        calls.append({"cells": list(train.obs_names), "chosen on": list(options["validation"].obs_names)} | options)
        return right(model, train, **options)

    monkeypatch.setattr(methods, "finetune", finetune)
    return calls


def test_as_many_settings_are_tried_as_logistic_regression_has():
    of_regression = len(methods.PENALTIES) * len(methods.STRENGTHS)
    assert len(tuning.RATES) * len(tuning.LAYERS) == of_regression == 8


def test_the_setting_of_the_best_macro_f1_on_validation_cells_wins_and_ties_go_to_the_smaller_loss(
    parts, fit, trainings
):
    train, validation, test = parts
    predict = tuning.fit_tuned(train, validation, label_key="cell_type", seed=3, fit=fit)
    tried = [(call["learning_rate"], call["recipe"].trainable_layers) for call in trainings]
    assert tried == [(rate, layers) for layers in tuning.LAYERS for rate in tuning.RATES]
    again = [
        fit(train, validation, label_key="cell_type", seed=3, learning_rate=rate,
            recipe=scbert.Recipe(trainable_layers=layers))
        for rate, layers in tried
    ]  # fmt: skip
    reached = [max(zip(one.history["val_macro_f1"], -one.history["val_loss"], strict=True)) for one in again]
    best = reached.index(max(reached))
    assert predict.chosen == f"rate={tried[best][0]:g}, layers={tried[best][1]}"
    pd.testing.assert_frame_equal(predict(test), again[best](test))
    assert predict.cell_steps == sum(one.cell_steps for one in again)


def test_other_choices_of_a_recipe_stay(parts, fit, trainings):
    recipe = scbert.Recipe(class_weight="balanced", until_converged=False)
    tuning.fit_tuned(*parts[:2], label_key="cell_type", fit=partial(fit, recipe=recipe))
    assert all(call["recipe"].class_weight == "balanced" for call in trainings)
    assert {len(call["cells"]) for call in trainings} == {60}


def test_logistic_regression_keeps_its_choice_and_learns_from_validation_cells_too(parts):
    train, validation, test = parts
    chosen = methods.fit_logistic_regression(train, validation, label_key="cell_type")
    predict = tuning.fit_on_all(train, validation, label_key="cell_type", fit=methods.fit_logistic_regression)
    assert predict.chosen == chosen.chosen
    penalty, strength = chosen.chosen.split(", C=")
    both = scbert.preprocess.tokenize(anndata.concat([train, validation], merge="first"))
    only = {"penalties": (penalty,), "strengths": (float(strength),)}
    expected = methods.fit_logistic_regression(both, validation, label_key="cell_type", **only)
    pd.testing.assert_frame_equal(predict(test), expected(test))
    assert np.abs(predict(test) - chosen(test)).to_numpy().max() > 1e-4


def test_scbert_trains_anew_on_all_and_keeps_the_epoch_of_least_loss_on_them(parts, fit, trainings):
    train, validation, _ = parts
    predict = tuning.fit_on_all(train, validation, label_key="cell_type", fit=fit)
    alone = fit(train, validation, label_key="cell_type")
    first, last, _ = trainings
    everything = [*train.obs_names, *validation.obs_names]
    assert (len(first["cells"]), len(first["chosen on"])) == (60, 24)
    assert last["cells"] == last["chosen on"] == everything
    assert (first["recipe"].select_by, last["recipe"].select_by) == ("macro_f1", "loss")
    assert predict.cell_steps == alone.cell_steps + 84 * predict.outcome["epochs"]


def test_tuned_scbert_trains_anew_under_the_chosen_setting(parts, fit, trainings):
    predict = tuning.fit_on_all(*parts[:2], label_key="cell_type", fit=partial(tuning.fit_tuned, fit=fit))
    *eight, last = trainings
    assert len(eight) == 8
    assert predict.chosen == f"rate={last['learning_rate']:g}, layers={last['recipe'].trainable_layers}"
    assert len(last["cells"]) == 84


def test_a_method_without_a_choice_learns_from_all_cells(parts):
    train, validation, test = parts
    predict = tuning.fit_on_all(train, validation, label_key="cell_type", fit=methods.fit_majority)
    assert predict(test).iloc[0].to_dict() == pytest.approx({"B": 1 / 3, "Monocyte": 1 / 3, "T/NK": 1 / 3})


def test_both_are_methods_of_the_runner_whose_work_is_counted(fit):
    n = runner.count_cell_steps(fit, 100)
    assert n == 200
    assert runner.count_cell_steps(partial(tuning.fit_tuned, fit=fit), 100) == 8 * n
    both = partial(tuning.fit_on_all, fit=partial(tuning.fit_tuned, fit=fit))
    assert runner.count_cell_steps(both, 100) == 16 * n
    assert runner.count_cell_steps(partial(tuning.fit_on_all, fit=methods.fit_majority), 100) == 0


def test_few_cells_are_learnt_from_whole_and_costly_recipes_run_on_folds_alone(encoder):
    encoder.genes = [f"gene{i}" for i in range(24)]
    chosen = benchmark.choose_methods("majority scbert scbert_scratch scbert_tuned scbert_published", encoder)

    def split(protocol):
        return scbert.protocols.Split(protocol, 0, 0, [], [], [])

    folds, smaller = [split("")], [split("reference:0.10"), split("few:10")]
    uneven = [split("imbalance:20"), split("imbalance:2")]
    work = benchmark.share_work(chosen, folds, smaller, uneven, 20)
    assert [[one.protocol for one in splits] for splits, _ in work] == [
        [""], ["reference:0.10"], ["few:10"], ["imbalance:20"], ["imbalance:2"]
    ]  # fmt: skip
    cross, share, few, even, treated = (list(fits) for _, fits in work)
    plain = ["logistic_regression", "majority", "scbert"]
    assert sorted(even) == plain
    assert sorted(share) == [*plain, "scbert_scratch"]
    assert sorted(few) == [*plain, "scbert_scratch", "scbert_tuned"]
    assert sorted(cross) == [*plain, "scbert_published", "scbert_scratch", "scbert_tuned"]
    assert set(treated) - set(even) == {
        f"{name}:{how}" for name in plain if name != "majority" for how in ("class_weight", "subsample", "oversample")
    }
    assert all(fit.func is tuning.fit_on_all for fit in work[2][1].values())
