"""Methods that behave: they learn what can be learnt and nothing else."""

from functools import partial

import numpy as np
import pytest

import scbert
from scbert import methods


@pytest.fixture
def parts(make_cells):
    """Training, validation and test cells of labels that are easily told apart."""
    return [scbert.preprocess.tokenize(make_cells(n, seed=seed)) for seed, n in enumerate((60, 24, 30))]


def accuracy_of(predict, adata):
    return (predict(adata).idxmax(axis=1).to_numpy() == adata.obs["cell_type"].to_numpy()).mean()


def test_lognormalize_is_log1p_of_counts_per_10000_of_all_measured_genes(parts):
    expected = np.log1p(parts[0].X.toarray() / 2000 * 10_000)
    assert scbert.preprocess.lognormalize(parts[0]).toarray() == pytest.approx(expected)


def test_the_majority_says_the_commonest_label_with_its_share(parts):
    train, validation, test = parts
    train = train[np.flatnonzero((train.obs["cell_type"] == "Monocyte") | (np.arange(60) < 30))]
    predict = methods.fit_majority(train, validation, label_key="cell_type")
    assert set(predict(test).idxmax(axis=1)) == {"Monocyte"}
    assert predict(test).drop_duplicates().to_dict("records") == [{"Monocyte": 0.5, "B": 0.25, "T/NK": 0.25}]


def test_logistic_regression_learns_labels_that_can_be_told_apart(parts):
    train, validation, test = parts
    predict = methods.fit_logistic_regression(train, validation, label_key="cell_type")
    assert accuracy_of(predict, test) > 0.95
    assert predict(test).sum(axis=1).tolist() == pytest.approx([1] * 30)
    assert predict.chosen.split(", C=")[0] in ("l1", "l2")


def test_logistic_regression_does_not_learn_labels_drawn_by_lot(parts):
    for adata in parts:
        adata.obs["cell_type"] = np.random.default_rng(0).permutation(adata.obs["cell_type"].to_numpy())
    train, validation, test = parts
    predict = methods.fit_logistic_regression(train, validation, label_key="cell_type", strengths=(0.1,))
    assert accuracy_of(predict, test) < 0.6


@pytest.mark.parametrize("penalty", ["l1", "l2"])
def test_validation_cells_choose_penalty_and_strength(parts, penalty):
    train, validation, _ = parts
    fit = partial(methods.fit_logistic_regression, train, validation, label_key="cell_type", penalties=[penalty])
    assert fit(strengths=[1e-6, 1.0]).chosen == f"{penalty}, C=1"  # the first leaves nothing to tell labels by
    assert fit(strengths=[1.0, 1e-6]).chosen == f"{penalty}, C=1"


def test_l1_leaves_out_genes_that_l2_keeps(parts):
    train, validation, test = parts
    n_used = {}
    for penalty in ("l1", "l2"):
        fit = methods.fit_logistic_regression
        predict = fit(train, validation, label_key="cell_type", penalties=[penalty], strengths=[0.05])
        moved = []
        for gene in range(24):
            other = test.copy()
            other.X = other.X.toarray()
            other.X[:, gene] += 1
            moved.append(not np.allclose(predict(other), predict(test), atol=1e-12))
        n_used[penalty] = sum(moved)
    assert n_used["l1"] < n_used["l2"] == 24


def test_fit_scbert_learns_and_leaves_the_given_encoder_as_it_was(parts, config):
    train, validation, test = parts
    encoder = scbert.ScBert(config)
    before = {name: tensor.clone() for name, tensor in encoder.state_dict().items()}
    predict = methods.fit_scbert(
        train, validation, label_key="cell_type", encoder=encoder, pretrain_epochs=1, n_epochs=12,
        progress=False,
    )  # fmt: skip
    assert all((tensor == before[name]).all() for name, tensor in encoder.state_dict().items())
    assert accuracy_of(predict, test) > 0.6
    assert predict.classifier.labels == ["B", "Monocyte", "T/NK"]


def test_fit_scbert_continues_from_its_checkpoints(parts, config, tmp_path):
    train, validation, _ = parts
    fit = partial(
        methods.fit_scbert, train, validation, label_key="cell_type", encoder=config, pretrain_epochs=1, n_epochs=1,
        checkpoints=tmp_path, progress=False,
    )  # fmt: skip
    first, again = fit().classifier.state_dict(), fit().classifier.state_dict()
    assert sorted(path.name.split("-")[1] for path in tmp_path.iterdir()) == ["finetune.pt", "pretrain.pt"]
    assert all((tensor == again[name]).all() for name, tensor in first.items())
