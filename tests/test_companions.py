"""What a bundle remembers of its training cells, and what annotate says of a query that is unlike them."""

import warnings

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import sparse
from sklearn.linear_model import LogisticRegression
from sklearn.multiclass import OneVsRestClassifier

import scbert
from scbert import annotate, companions, methods
from scbert.__main__ import list_scores
from scbert.data.preprocess import lognormalize, tokenize
from scbert.memory import regression

LABELS = ["B", "Monocyte", "T/NK"]


@pytest.fixture(scope="module")
def cells(make_cells):
    return [tokenize(make_cells(n, 60, seed=seed)) for n, seed in ((300, 2), (90, 3), (120, 4))]


@pytest.fixture(scope="module")
def memory(cells):
    learnt = companions.learn_companions(*cells[:2], LABELS, label_key="cell_type")
    seen = torch.from_numpy(cells[0].layers["bins"].getnnz(0) > 0)
    return learnt | {"genes_seen": seen}


def compare(memory, query, predicted=None):
    query = tokenize(query.copy())
    predicted = np.arange(query.n_obs) % 3 if predicted is None else predicted
    cells, found = companions.compare_query(memory, query, predicted, np.ones(query.n_vars, bool))
    return cells, companions.say_what_is_off(found)


def test_everything_is_an_array_for_safetensors(memory, tmp_path):
    from safetensors.torch import load_file, save_file

    save_file({name: tensor.contiguous() for name, tensor in memory.items()}, tmp_path / "memory.safetensors")
    back = load_file(tmp_path / "memory.safetensors")
    assert all(torch.equal(back[name], tensor) for name, tensor in memory.items())


def test_depth_genes_and_classes_are_those_of_the_training_cells(memory, cells):
    assert memory["n_counts"].tolist() == [2000.0] * 5
    assert memory["class_counts"].tolist() == [100, 100, 100]
    n_genes = cells[0].X.getnnz(1)
    assert memory["n_genes"][[0, 2, 4]].tolist() == [n_genes.min(), np.median(n_genes), n_genes.max()]


@pytest.mark.parametrize("n_labels", [2, 3])
def test_both_forms_of_logistic_regression_predict_as_scikit_learn_does(cells, n_labels):
    y = np.arange(300) % n_labels
    x = lognormalize(cells[0])
    for penalty in ("l2", "l1"):
        arrays, chosen = regression.fit_regression(x, y, x, y, penalties=[penalty], strengths=[1.0])
        if penalty == "l2":
            expected = LogisticRegression(C=1.0, max_iter=1000).fit(x, y).predict_proba(x)
        else:
            model = OneVsRestClassifier(LogisticRegression(penalty="l1", C=1.0, solver="liblinear", random_state=0))
            expected = model.fit(x, y).predict_proba(x)
        assert chosen == f"{penalty}, C=1"
        assert regression.predict_regression(arrays, x) == pytest.approx(expected, abs=1e-12)


def test_a_companion_is_what_the_benchmark_fits_on_the_same_cells(memory, cells):
    predict = methods.fit_logistic_regression(*cells[:2], label_key="cell_type")
    assert memory["one_vs_rest"] == predict.arrays["one_vs_rest"]
    np.testing.assert_array_equal(memory["logistic_regression"], predict.arrays["logistic_regression"])


def test_the_distance_is_mahalanobis_and_genes_that_were_not_measured_have_no_part(memory, cells):
    arrays = {name: tensor.numpy() for name, tensor in memory.items()}
    x = lognormalize(cells[2])
    vectors = (x.toarray() - arrays["pca_mean"]) @ arrays["pca_axes"].T
    covariance = arrays["pca_root"] @ arrays["pca_root"].T
    apart = vectors[:, None] - arrays["pca_centres"]
    expected = np.sqrt(np.einsum("clk,kj,clj->cl", apart, np.linalg.inv(covariance), apart).min(1))
    assert companions.measure_distance(arrays, x) == pytest.approx(expected, rel=1e-6)
    without, measured = x.tolil(), np.arange(60) != 7
    without[:, 7] = 0
    mean = sparse.csr_matrix(np.where(measured, x.toarray(), arrays["pca_mean"]))
    assert companions.measure_distance(arrays, without.tocsr(), measured) == pytest.approx(
        companions.measure_distance(arrays, mean), rel=1e-6
    )


def test_other_cells_of_the_same_kind_are_annotated_without_a_word(memory, cells):
    found, said = compare(memory, cells[2])
    assert said == []
    assert found["unlike_training"].mean() < 0.1


def shallower(adata):
    adata.X.data = np.random.default_rng(0).binomial(adata.X.data.astype(int), 0.3).astype(np.float32)
    adata.X[:, 0] = 1
    adata.obs["n_counts"] = 200.0
    return adata


def permuted(adata):
    adata.X = adata.X[:, np.random.default_rng(1).permutation(60)]
    return adata


def from_elsewhere(adata):
    adata.X = sparse.csr_matrix(np.random.default_rng(0).poisson(9, adata.shape).astype(np.float32))
    return adata


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (shallower, r"its cells have 200 counts \(median\), those of training 2,000"),
        (permuted, r"its genes are expressed otherwise than in training \(correlation"),
        (from_elsewhere, "of its cells lie further from all types than 99 % of validation cells did"),
    ],
)
def test_a_query_that_is_unlike_training_is_told_in_a_sentence(memory, cells, change, message):
    _, said = compare(memory, change(cells[2].copy()))
    assert any(pd.Series(said).str.contains(message)), said


def test_the_very_cells_of_training_are_known_under_other_names(memory, cells):
    query = cells[0][::2].copy()
    query.obs_names = [f"other{i}" for i in range(query.n_obs)]
    _, said = compare(memory, query)
    assert "100% of its cells have the very counts of training cells" in said


def test_genes_that_the_query_lacks_are_weighed_by_what_training_expressed(memory, cells):
    query = tokenize(cells[2].copy())
    predicted = np.arange(query.n_obs) % 3
    _, found = companions.compare_query(memory, query, predicted, np.arange(60) < 12)
    said = companions.say_what_is_off(found)
    assert any("it lacks genes that hold" in sentence for sentence in said)


def test_one_label_for_all_is_told_only_where_the_companions_disagree(memory, cells):
    _, said = compare(memory, cells[2], np.zeros(120, int))
    assert any("one type most probable in 100% of its cells" in sentence for sentence in said)
    _, said = compare(memory, cells[2][::3], np.zeros(40, int))  # they are of one label
    assert said == []


def test_the_consensus_is_the_majority_and_else_that_of_the_best_method(memory):
    cells = pd.DataFrame(
        {
            "distance": 1.0,
            "unlike_training": False,
            "logistic_regression": [1, 1, 0],
            "nearest_centroid": [1, 2, 0],
            "blank": False,
        }
    )
    columns = companions.vote(
        cells, np.array([0, 0, 0]), memory | {"scores": torch.tensor([[0, 0.1], [0, 0.9], [0, 0.2]])}, LABELS
    )
    assert columns["scbert_consensus"].tolist() == ["Monocyte", "Monocyte", "B"]
    assert columns["scbert_agreement"].tolist() == pytest.approx([2 / 3, 1 / 3, 1])


def test_scores_are_listed_in_order_of_merit(memory):
    lines = list_scores(memory | {"scores": torch.tensor([[0.5, 0.1], [0.8, 0.9], [0.7, 0.2]])})
    assert lines[0] == "On 90 validation cells of its training set, by macro-F1:"
    assert [line.split(":")[0].strip() for line in lines[1:]] == ["logistic regression", "nearest centroid", "scBERT"]
    assert list_scores({})[0].startswith("The model has no memory of its training cells")


def test_finetune_keeps_them_and_annotate_warns(make_cells, config, tmp_path):
    train = tokenize(make_cells(120, seed=2))
    classifier = scbert.finetune(scbert.ScBert(config), train, n_epochs=1, accelerator="cpu", progress=False)
    classifier.save(tmp_path / "bundle")
    back = scbert.load(tmp_path / "bundle")
    assert back.memory["scores"].shape == (3, 2)
    query = make_cells(60, seed=9)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        annotate(query, back)
    assert query.obs["scbert_consensus"].notna().all()
    with pytest.warns(UserWarning, match="adata is unlike what the model was trained on: .* very counts of training"):
        annotate(make_cells(120, seed=2), back)
    without = scbert.finetune(
        scbert.ScBert(config), train, n_epochs=1, companions=False, accelerator="cpu", progress=False
    )
    assert without.memory == {}
    assert without.encoder.genes_seen is None
