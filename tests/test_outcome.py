"""Trainings that do not learn: judged, tried again, said, and left out of means."""

import warnings

import numpy as np
import pandas as pd
import pytest
import torch

import scbert
from scbert import benchmark
from scbert.model.bundle import say_outcome
from scbert.train import steps

ENOUGH = {"n_epochs": 20, "learning_rate": 3e-3, "patience": 20}
GUESSED = (1.0, 1.0, 0.5, 0.3)  # losses on training and validation cells, accuracy and macro-F1 of a guess


def rows(losses, val_losses, accuracy=0.9):
    return [
        {"epoch": i + 1, "loss": loss, "val_loss": val, "val_accuracy": accuracy, "val_macro_f1": accuracy}
        for i, (loss, val) in enumerate(zip(losses, val_losses, strict=True))
    ]


@pytest.mark.parametrize(
    ("history", "state"),
    [
        (rows([1, 0.5, 0.3, 0.3], [1, 0.5, 0.6, 0.7]), "converged"),  # validation loss was best before
        (rows([1, 0.7, 0.6, 0.5], [1, 0.7, 0.6, 0.5]), "unfinished"),
        (rows([1, 0.5, 0.2, 0.05], [1, 0.7, 0.6, 0.5]), "converged"),  # known by heart
        (rows([1, 0.95, 0.92, 0.91], [1, 1, 0.99, 0.99]), "dead"),
        (rows([1, 0.95, 0.92, 0.91], [1, 0.9, 0.9, 0.9]), "unfinished"),  # begins to learn
        (rows([1, np.nan, np.nan, np.nan], [1, np.nan, np.nan, np.nan]), "dead"),
        (rows([1, 0.5, 0.2, 0.1], [1, 2, 3, 4], accuracy=0.3), "guessing"),  # no better than the commonest label
    ],
)
def test_a_training_is_dead_guessing_unfinished_or_converged(history, state):
    assert steps.judge(history, GUESSED, 4) == state


def test_a_guess_knows_the_shares_of_the_labels():
    targets, truth = np.array([0, 0, 0, 1]), np.array([0, 1])
    loss, validation_loss, accuracy, macro_f1 = steps.guess(targets, truth)
    assert validation_loss == pytest.approx(-(np.log(0.75) + np.log(0.25)) / 2)
    assert loss == pytest.approx(-0.75 * np.log(0.75) - 0.25 * np.log(0.25))
    assert (accuracy, macro_f1) == (0.5, pytest.approx(1 / 3))
    assert steps.guess(targets, truth, torch.tensor([2 / 3, 2.0]))[0] == pytest.approx(np.log(2))


@pytest.fixture
def start(encoder, cells, more_cells):
    """Return a function that fine-tunes, with or without what is to be changed."""

    def finetune(**options):
        options = {"n_epochs": 3, "companions": False, "progress": False, "validation": more_cells} | options
        return scbert.finetune(encoder, cells, **options)

    return finetune


def test_what_does_not_learn_is_tried_from_other_heads_and_said(start, more_cells, tmp_path):
    with pytest.warns(UserWarning, match="has not learnt in 18 epochs in all .3 heads were tried."):
        classifier = start(learning_rate=0.0)
    assert classifier.outcome == {"state": "dead", "epochs": 18, "attempts": 3}
    classifier.save(tmp_path / "a", card="A card.")
    assert "has not learnt" in (tmp_path / "a" / "README.md").read_text()
    loaded = scbert.load(tmp_path / "a")
    assert loaded.outcome == classifier.outcome
    with pytest.warns(UserWarning, match="its names mean nothing"):
        scbert.annotate(more_cells, loaded)


def test_the_published_recipe_takes_what_comes(start):
    with pytest.warns(UserWarning, match="has not learnt"):
        classifier = start(learning_rate=0.0, recipe=scbert.Recipe(until_converged=False))
    assert classifier.outcome["attempts"] == 1


def stop_heads(monkeypatch, *seeds):
    """Let the heads of these seeds pass nothing."""
    head, made = scbert.AnnotationHead, []

    class Head(head):
        def __init__(self, config, n_classes, seed=0, *more):
            super().__init__(config, n_classes, seed, *more)
            made.append(seed)
            if seed in seeds:
                for parameter in self.parameters():
                    torch.nn.init.zeros_(parameter).requires_grad_(False)

    monkeypatch.setattr("scbert.model.classifier.AnnotationHead", Head)
    return made


def test_another_head_is_started_from_where_one_is_dead(start, monkeypatch, tmp_path):
    made = stop_heads(monkeypatch, 0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        classifier = start(**ENOUGH)
    assert made == [0, 1000]
    assert classifier.outcome["attempts"] == 2
    assert classifier.outcome["state"] == "converged"
    assert "2 heads were tried" in say_outcome(classifier.outcome)
    file = tmp_path / "a.pt"
    first, again = (start(**ENOUGH, checkpoint=file) for _ in range(2))  # the second finds both trainings finished
    for weights in zip(
        classifier.state_dict().values(), first.state_dict().values(), again.state_dict().values(), strict=True
    ):
        assert all(torch.equal(weights[0], other) for other in weights[1:])


def test_what_still_learns_goes_on_and_no_further_than_twice(start):
    with pytest.warns(UserWarning, match="still improving after 8 epochs"):
        classifier = start(n_epochs=4)
    assert len(classifier.history) == 8
    assert (
        classifier.history["learning_rate"].iloc[4] > classifier.history["learning_rate"].iloc[3]
    )  # the schedule again


def test_a_table_leaves_dead_trainings_out_and_says_so(clone, capsys):
    split = {"data": "set", "protocol": "few:10", "fold": 0}
    cells = pd.DataFrame({"cell": list("ab"), "truth": ["T", "B"]})
    parts = {
        (0, "scbert"): ["T", "B"],
        (1, "scbert"): ["T", "T"],
        (0, "majority"): ["T", "T"],
        (1, "majority"): ["T", "T"],
    }
    predictions = pd.concat(
        [
            cells.assign(**split, repeat=repeat, method=method, predicted=found)
            for (repeat, method), found in parts.items()
        ],
        ignore_index=True,
    )
    costs = pd.DataFrame(
        [{**split, "repeat": repeat, "method": method} | ({} if method == "majority" else {
            "state": "dead" if repeat else "converged", "attempts": 3 if repeat else 1})
         for repeat, method in parts]
    )  # fmt: skip
    run = scbert.record.Run(
        "04_test", {"profile": "demo", "seed": 0, "__annotations__": {"profile": None, "seed": None}}
    )
    kept = benchmark.leave_out_dead(run, predictions, costs)
    assert set(kept["repeat"]) == {0}
    assert set(kept["method"]) == {"scbert", "majority"}
    said = "1 trainings of scbert on set:few:10 have not learnt; accuracy 0.750 with them, 1.000 without."
    assert run.warnings == [said]
    assert (
        "2 trainings of scBERT: 1 converged, 0 unfinished, 0 guessing, 1 dead; 1 needed another head"
        in capsys.readouterr().out
    )
    dead = costs.assign(state=costs["state"].replace("converged", "dead"))
    assert len(benchmark.leave_out_dead(run, predictions, dead)) == len(
        predictions
    )  # all of a level: that is its result
    assert len(benchmark.leave_out_dead(run, predictions, costs.drop(columns=["state", "attempts"]))) == len(
        predictions
    )
