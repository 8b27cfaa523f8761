"""What is kept of predicted cells: the method's own probabilities, and distances as anyone would compute them."""

from functools import partial

import numpy as np
import pandas as pd
import pytest
from scipy.spatial.distance import cdist
from sklearn.covariance import LedoitWolf
from sklearn.decomposition import PCA

import scbert
from scbert import kept, methods


@pytest.fixture
def clouds():
    """60 vectors of five dimensions that vary unequally and together, three labels, and 20 others."""
    random = np.random.default_rng(0)
    mixing = random.normal(size=(5, 5)) * [3, 1, 1, 0.3, 0.1]
    labels = np.repeat(["b", "a", "c"], [30, 20, 10])
    centres = {"a": 0, "b": 4, "c": -4}
    train = random.normal(size=(60, 5)) @ mixing + np.array([[centres[label]] for label in labels])
    return train, labels, random.normal(size=(20, 5)) * 5 @ mixing


def mahalanobis(train, labels, vectors):
    """Return the distances cell by cell and label by label, with the inverse of scikit-learn's estimate."""
    names = sorted(set(labels))
    centred = np.concatenate([train[labels == name] - train[labels == name].mean(0) for name in names])
    inverse = LedoitWolf(assume_centered=True, store_precision=True).fit(centred).precision_
    distance = []
    for vector in vectors:
        gaps = [vector - train[labels == name].mean(0) for name in names]
        distance.append(min(gap @ inverse @ gap for gap in gaps) ** 0.5)
    return np.array(distance)


def test_distance_is_mahalanobis_to_the_nearest_mean(clouds):
    train, labels, vectors = clouds
    assert kept.measure_distance(train, labels, vectors) == pytest.approx(mahalanobis(*clouds), rel=1e-6)
    order = np.random.default_rng(1).permutation(60)
    assert kept.measure_distance(train[order], labels[order], vectors) == pytest.approx(mahalanobis(*clouds), rel=1e-6)
    single = kept.measure_distance(train.astype(np.float32), labels, vectors.astype(np.float32))
    assert single == pytest.approx(mahalanobis(*clouds), rel=1e-4)


def test_distance_is_none_at_a_mean_and_grows_with_a_vector_along_a_line(clouds):
    train, labels, _ = clouds
    mean = train[labels == "b"].mean(0)
    line = mean + np.outer([0, 0.1, 0.2, 100, 200], np.ones(5))
    distance = kept.measure_distance(train, labels, line)
    assert distance[0] == pytest.approx(0, abs=1e-9)
    assert distance[2] == pytest.approx(2 * distance[1])
    assert distance[4] == pytest.approx(2 * distance[3], rel=0.1)


def test_distance_takes_the_scale_of_each_direction_from_within_labels():
    """Nearer in Euclid's sense is further where labels hardly vary."""
    random = np.random.default_rng(2)
    labels = np.repeat(["a", "b"], 200)
    train = random.normal(size=(400, 2)) * [10, 0.1] + np.where(labels == "a", 0, 50)[:, None] * [0, 1]
    along, across = kept.measure_distance(train, labels, np.array([[10.0, 0], [0, 5.0]]))
    assert along < 2 < 5 < across


def test_distance_knows_what_never_varied_and_stays_a_number(clouds):
    train, labels, vectors = clouds
    flat = np.column_stack([train, np.full(60, 7.0)])
    same = kept.measure_distance(flat, labels, np.column_stack([vectors, np.full(20, 7.0)]))
    moved = kept.measure_distance(flat, labels, np.column_stack([vectors, np.full(20, 8.0)]))
    assert np.isfinite(same).all() and np.isfinite(moved).all()
    assert same == pytest.approx(mahalanobis(flat, labels, np.column_stack([vectors, np.full(20, 7.0)])), rel=1e-4)
    assert (moved > same).all()
    unused = np.column_stack([vectors, np.full(20, 7.0)])  # with no shrinkage at all to hide it
    many, names = np.tile(flat, (200, 1)), np.tile(labels, 200)
    assert np.isfinite(kept.measure_distance(many, names, unused)).all()


@pytest.mark.parametrize("dim", [1, 3])
def test_distance_of_one_training_cell_a_label_ranks_as_euclids(dim):
    random = np.random.default_rng(3)
    train, vectors = random.normal(size=(4, dim)), random.normal(size=(15, dim))
    distance = kept.measure_distance(train, np.array(list("abcd")), vectors)
    assert np.isfinite(distance.astype(np.float32)).all()
    nearest = cdist(vectors, train).min(1)
    assert distance / distance[0] == pytest.approx(nearest / nearest[0])


def test_one_training_cell_of_a_label_among_others_of_many_is_a_mean_like_any_other(clouds):
    train, labels, vectors = clouds
    train, labels = np.vstack([train, [[40.0] * 5]]), np.append(labels, "lone")
    near = np.vstack([vectors, [[40.0] * 5]])
    distance = kept.measure_distance(train, labels, near)
    assert distance == pytest.approx(mahalanobis(train, labels, near), rel=1e-6, abs=1e-9)
    assert distance[-1] == pytest.approx(0, abs=1e-9)


def test_softmax_of_logits_however_large():
    logits = pd.DataFrame([[0.0, np.log(3)], [1000.0, 1000.0], [-1e5, 0.0]], ["x", "y", "z"], ["A", "B"])
    probabilities = kept.to_probabilities(logits)
    assert probabilities.to_numpy() == pytest.approx(np.array([[0.25, 0.75], [0.5, 0.5], [0, 1]]))
    assert list(probabilities.index) == ["x", "y", "z"]
    assert list(probabilities.columns) == ["A", "B"]


@pytest.fixture
def parts(make_cells):
    """Training, validation and predicted cells; the last hold a label that the others lack."""
    parts = [scbert.preprocess.tokenize(make_cells(n, seed=seed)) for seed, n in enumerate((60, 24, 30))]
    parts[2].obs["cell_type"] = np.where(np.arange(30) < 3, "new", parts[2].obs["cell_type"].astype(str))
    return parts


def test_of_other_methods_vectors_are_components_of_expression_that_training_cells_alone_define(parts):
    train, validation, cells = parts
    predict = methods.fit_nearest_centroid(train, validation, label_key="cell_type")
    logits, vectors, distance = kept.describe_cells(predict, train, cells)
    assert vectors.dtype == distance.dtype == np.float32
    assert vectors.shape == (30, 24)  # no more components than genes
    x, x_cells = (np.log1p(adata.X.toarray() * 5.0) for adata in (train, cells))
    pca = PCA(24, svd_solver="full").fit(x)
    assert np.abs(vectors) == pytest.approx(np.abs(pca.transform(x_cells)), abs=1e-4)  # but for signs
    expected = mahalanobis(pca.transform(x), train.obs["cell_type"].astype(str).to_numpy(), pca.transform(x_cells))
    assert distance == pytest.approx(expected, rel=1e-3)
    pd.testing.assert_frame_equal(kept.to_probabilities(logits), predict(cells))
    alone = kept.describe_cells(predict, train, cells[:5].copy())
    assert alone[1] == pytest.approx(vectors[:5], abs=1e-4)
    assert alone[2] == pytest.approx(distance[:5], rel=1e-4)


@pytest.mark.parametrize(("n_cells", "n_genes", "dim"), [(60, 40, 30), (9, 40, 8)])
def test_there_are_thirty_components_or_as_many_as_the_training_cells_allow(make_cells, n_cells, n_genes, dim):
    train, cells = make_cells(n_cells, n_genes), make_cells(12, n_genes, seed=1)
    predict = methods.fit_majority(train, train, label_key="cell_type")
    logits, vectors, distance = kept.describe_cells(predict, train, cells, seed=3)
    assert vectors.shape == (12, dim)
    assert np.isfinite(distance).all()
    again = kept.describe_cells(predict, train, cells, seed=3)
    assert (again[1] == vectors).all() and (again[2] == distance).all()


def test_scberts_vectors_are_its_own(parts, config):
    train, validation, cells = parts
    predict = methods.fit_scbert(
        train, validation, label_key="cell_type", encoder=config, n_epochs=2, learning_rate=1e-2, progress=False
    )
    logits, vectors, distance = kept.describe_cells(predict, train, cells)
    own = scbert.embed(predict.classifier, cells)
    assert vectors == pytest.approx(own, abs=1e-6)
    learnt = scbert.embed(predict.classifier, train).astype(float)
    expected = mahalanobis(learnt, train.obs["cell_type"].astype(str).to_numpy(), own.astype(float))
    assert distance == pytest.approx(expected, rel=1e-3)
    assert kept.to_probabilities(logits).to_numpy() == pytest.approx(predict(cells).to_numpy(), abs=1e-6)


def test_a_cell_unlike_all_that_trained_is_further_away(make_cells):
    train, validation, cells = (
        make_cells(n, n_genes=40, seed=seed, labels=("A", "B", "C", "D")) for seed, n in enumerate((120, 24, 80))
    )
    known = [adata[(adata.obs["cell_type"] != "D").to_numpy()].copy() for adata in (train, validation)]
    predict = methods.fit_nearest_centroid(*known, label_key="cell_type")
    _, _, distance = kept.describe_cells(predict, known[0], cells)
    is_new = (cells.obs["cell_type"] == "D").to_numpy()
    assert (distance[is_new][:, None] > distance[~is_new]).mean() > 0.9  # the area under the ROC curve


def test_what_is_kept_comes_back(tmp_path):
    names = pd.Index(["cell 1", "NA", "007"], name="cell")
    cells = pd.DataFrame({"truth": ["B", "T/NK", "new"], "part": ["test", "test", "aside"]}, names)
    logits = pd.DataFrame([[0.1, -300.123456, 2], [3, 4, 5], [-1e-9, 0, 1e9]], names, ["B", "T/NK, naïve", "NA"])
    embedding = np.random.default_rng(0).normal(size=(3, 4)).astype(np.float32)
    distance = np.array([0.5, 1e15, 2], dtype=np.float32)
    path = tmp_path / "not" / "there" / "a1b2.npz"
    kept.write_file(path, logits, embedding, distance)
    kept.write_file(path, logits, embedding, distance)  # over an earlier one
    found = kept.read_file(path, cells)
    assert [file.name for file in path.parent.iterdir()] == ["a1b2.npz"]
    assert found.cells is cells
    pd.testing.assert_frame_equal(found.logits, logits, rtol=1e-6, check_names=False)
    assert list(found.logits.columns) == ["B", "T/NK, naïve", "NA"]
    assert (found.embedding == embedding).all() and (found.distance == distance).all()
    with pytest.raises(ValueError, match="Shape of passed values"):
        kept.read_file(path, cells[:2])


def test_methods_without_a_read_out_tell_the_logarithm_of_their_probabilities(parts):
    shares = pd.DataFrame([[0.5, 0.5, 0.0], [0.2, 0.3, 0.5]], ["x", "y"], ["A", "B", "C"])
    logits, vectors = methods.read_out(lambda _: shares, None)
    assert vectors is None
    assert kept.to_probabilities(logits).to_numpy() == pytest.approx(shares.to_numpy(), abs=1e-11)
    assert np.isfinite(logits).all(axis=None)


def test_rebalanced_methods_have_the_read_out_of_what_they_rebalance(parts):
    train, validation, cells = parts
    fit = partial(methods.fit_rebalanced, fit=methods.fit_logistic_regression, how="subsample")
    predict = fit(train[3:].copy(), validation, label_key="cell_type")
    logits, _ = methods.read_out(predict, cells)
    assert kept.to_probabilities(logits).to_numpy() == pytest.approx(predict(cells).to_numpy(), abs=1e-6)
