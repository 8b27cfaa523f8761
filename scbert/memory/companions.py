"""What a classifier remembers of its training cells, as arrays that travel in its bundle, and what follows for a query.

Beside the network a bundle holds two plain classifiers of the same cells and genes, logistic regression and nearest
centroid, and how all three did on validation cells; and which genes, depths, types and distances training saw. So
`scbert.annotate` can say when a query is unlike all that, and which of the three to believe. Not in the paper.

The arrays, by name (genes are those of the vocabulary, in its order; labels those of the classifier):

- ``genes_seen`` (genes,): whether a training cell has a token of the gene; the network ignores all others.
- ``class_means`` (labels, genes): mean log-normalised expression, see `scbert.preprocess.lognormalize`; nearest
  centroid compares with these.
- ``n_counts``, ``n_genes`` (5,): total counts, and expressed genes of the vocabulary: least, 5 %, median, 95 %, most.
- ``class_counts`` (labels,): training cells of each label.
- ``cell_hashes`` (cells,): of the counts of each training cell that expresses `LEAST_GENES` genes, sorted.
- ``pca_mean`` (genes,), ``pca_axes`` (components, genes), ``pca_root`` (components, components), ``pca_centres``
  (labels, components): the space in which distances are measured, and its units, see `measure_distance`.
- ``distances`` (101,): percentiles of the distance of validation cells.
- ``logistic_regression`` (labels, genes + 1) and ``one_vs_rest`` (): see `scbert.memory.regression`.
- ``scores`` (3, 2): accuracy and macro-F1 on validation cells of the methods in `METHODS`; ``n_validation`` ().
"""

import hashlib

import anndata
import numpy as np
import pandas as pd
import torch
from scipy import sparse
from scipy.linalg import solve_triangular
from sklearn.covariance import LedoitWolf
from sklearn.decomposition import PCA
from sklearn.preprocessing import normalize

from ..data.preprocess import library_size, lognormalize
from ..model.classifier import Classifier
from .regression import fit_regression, predict_regression, score_labels

METHODS = ("scbert", "logistic_regression", "nearest_centroid")
N_COMPONENTS = 30
LARGEST = 10_000  # training cells behind the companions: beyond it they take long and gain little
LEAST_GENES = 10  # expressed by a cell whose counts tell it from all others


def learn_companions(
    train: anndata.AnnData, validation: anndata.AnnData, labels: list[str], *, label_key: str, seed: int = 0, **options
) -> dict[str, torch.Tensor]:
    """Fit the companions on counts of training cells, choosing on validation cells; return the arrays named above.

    `labels` are all of the training cells, sorted; `options` are of `scbert.memory.regression.fit_regression`.
    ``genes_seen``, and scBERT's own row of ``scores``, are left to `remember`.
    """
    y = pd.Categorical(train.obs[label_key].astype(str), categories=labels).codes
    truth = pd.Categorical(validation.obs[label_key].astype(str), categories=labels).codes
    counts, totals = sparse.csr_matrix(train.X), library_size(train)
    arrays = {
        "n_counts": np.quantile(totals, [0, 0.05, 0.5, 0.95, 1]),
        "n_genes": np.quantile(counts.getnnz(1), [0, 0.05, 0.5, 0.95, 1]),
        "class_counts": np.bincount(y, minlength=len(labels)),
        "cell_hashes": np.unique(hash_cells(counts)),
        "n_validation": np.array(len(truth)),
    }
    x, x_validation = lognormalize(train, totals), lognormalize(validation)
    chosen = np.random.default_rng(seed).permutation(len(y))[:LARGEST]
    chosen = np.union1d(chosen, np.unique(y, return_index=True)[1])  # sorted, and no label is lost
    x, y = x[chosen], y[chosen]
    arrays |= fit_distance(x, y, len(labels), seed=seed)
    arrays["distances"] = np.percentile(measure_distance(arrays, x_validation), np.arange(101))
    arrays["class_means"] = np.vstack([np.asarray(x[y == i].mean(0)) for i in range(len(labels))])
    arrays |= fit_regression(x, y, x_validation, truth, seed=seed, **options)[0]
    arrays["scores"] = np.stack(
        [score_labels(truth, predict(arrays, x_validation).argmax(1)) for predict in PREDICT.values()]
    )
    return {name: torch.from_numpy(np.array(array)) for name, array in arrays.items()}


def remember(
    classifier: Classifier, train: anndata.AnnData, validation: anndata.AnnData, label_key: str, **options
) -> None:
    """Give a classifier its memory of the tokenized cells that it was fine-tuned on; `options` as in `learn_companions`."""
    memory = learn_companions(train, validation, classifier.labels, label_key=label_key, **options)
    memory["genes_seen"] = torch.from_numpy(train.layers["bins"].getnnz(axis=0) > 0)
    chosen = classifier.history[classifier.history["best"]].iloc[0]
    own = torch.tensor([[chosen["val_accuracy"], chosen["val_macro_f1"]]], dtype=torch.float64)
    classifier.remember(memory | {"scores": torch.cat([own, memory["scores"]])})


def predict_nearest_centroid(arrays, x: sparse.csr_matrix) -> np.ndarray:
    """Return the cosine between each cell and each label's mean profile, (cells, labels)."""
    return normalize(x) @ normalize(np.asarray(arrays["class_means"])).T


PREDICT = {"logistic_regression": predict_regression, "nearest_centroid": predict_nearest_centroid}


def hash_cells(counts: sparse.csr_matrix) -> np.ndarray:
    """Return a 64-bit hash of each cell's counts, of cells that express `LEAST_GENES` genes or more: (such cells,) int64."""
    counts = sparse.csr_matrix(counts, dtype=np.float32)
    counts.sort_indices()
    hashes = []
    for start, stop in zip(counts.indptr[:-1], counts.indptr[1:], strict=True):
        if stop - start >= LEAST_GENES:
            own = counts.indices[start:stop].astype("<i4").tobytes() + counts.data[start:stop].astype("<f4").tobytes()
            hashes.append(int.from_bytes(hashlib.blake2b(own, digest_size=8).digest(), "little", signed=True))
    return np.array(hashes, dtype=np.int64)


def fit_distance(x: sparse.csr_matrix, y: np.ndarray, n_labels: int, *, seed: int = 0) -> dict[str, np.ndarray]:
    """Find the principal components of log-normalised counts, each label's centre, and the spread within labels.

    Of the scores that notebook 07 compares, this distance alone finds Dendritic cells that the reference lacks.
    """
    n = min(N_COMPONENTS, min(x.shape) - 1)
    pca = PCA(n, svd_solver="arpack", random_state=seed).fit(x)
    vectors = pca.transform(x)
    root, centres = fit_centres(vectors, y, n_labels)
    return {"pca_mean": pca.mean_, "pca_axes": pca.components_, "pca_root": root, "pca_centres": centres}


def measure_distance(arrays, x: sparse.csr_matrix, measured: np.ndarray | None = None) -> np.ndarray:
    """Return the Mahalanobis distance of each cell to the nearest label's centre, (cells,), see `fit_distance`.

    Genes where the boolean `measured` is false, (genes,), are taken to be expressed as in the mean training cell.
    """
    mean, axes, root, centres = (np.asarray(arrays[f"pca_{name}"]) for name in ("mean", "axes", "root", "centres"))
    axes_here = axes if measured is None else axes * measured
    return measure_to_centres(x @ axes_here.T - mean @ axes_here.T, root, centres)


def fit_centres(vectors: np.ndarray, y: np.ndarray, n_labels: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the root of the covariance within labels, (dim, dim), and each label's mean vector, (labels, dim).

    The covariance is pooled over labels and shrunk as by Ledoit and Wolf. Lee et al. 2018 (NeurIPS) score novelty so.
    """
    centres = np.stack([vectors[y == i].mean(0) for i in range(n_labels)])
    covariance = LedoitWolf(assume_centered=True).fit(vectors - centres[y]).covariance_
    eye = np.eye(len(covariance))
    covariance += 1e-9 * np.trace(covariance) / len(covariance) * eye + 1e-30 * eye
    return np.linalg.cholesky(covariance), centres


def measure_to_centres(vectors: np.ndarray, root: np.ndarray, centres: np.ndarray) -> np.ndarray:
    """Return the Mahalanobis distance of each vector, (cells, dim), to the nearest centre, (cells,)."""
    white, centres = (solve_triangular(root, part.T, lower=True).T for part in (vectors, centres))
    return np.sqrt(np.stack([((white - centre) ** 2).sum(1) for centre in centres]).min(0))


def compare_query(
    memory: dict[str, torch.Tensor], query: anndata.AnnData, predicted: np.ndarray, measured: np.ndarray
) -> tuple[pd.DataFrame, dict[str, float]]:
    """Compare tokenized cells with what training saw.

    `predicted` numbers scBERT's label of each cell, (cells,); `measured` says which genes of the vocabulary the query's
    file has, (genes,).

    Returns
    -------
    A row a cell: ``distance``, ``blank``, ``unlike_training`` (beyond 99 % of the validation cells), and the number of the
    label that each companion gives. And the numbers of the query as a whole that `say_what_is_off` judges.
    """
    arrays = {name: tensor.numpy() for name, tensor in memory.items()}
    known, totals = arrays["genes_seen"].astype(bool), library_size(query)
    x = lognormalize(query, totals)
    cells = pd.DataFrame({"distance": measure_distance(arrays, x, measured)}, index=query.obs_names)
    cells["blank"] = query.layers["bins"][:, known].getnnz(1) == 0  # nothing to go by
    cells["unlike_training"] = (cells["distance"] > arrays["distances"][99]) | cells["blank"]
    for name, predict in PREDICT.items():
        cells[name] = predict(arrays, x).argmax(1)
    # What such a mixture of types should express, by the labels of logistic regression: scBERT may name all alike.
    mixture = np.bincount(cells["logistic_regression"], minlength=len(arrays["class_counts"])) / len(predicted)
    expected, found = mixture @ arrays["class_means"], np.asarray(x.mean(0)).ravel()  # (genes,) each
    both = known & measured
    varies = both.sum() > 2 and min(np.ptp(expected[both]), np.ptp(found[both])) > 0
    same_cells = np.isin(hash_cells(query.X), arrays["cell_hashes"]).sum()
    return cells, {
        "depth": float(np.median(totals)),
        "depth_of_training": float(arrays["n_counts"][2]),
        "lacking": float(expected[known & ~measured].sum() / max(expected[known].sum(), 1e-9)),
        "profile": float(np.corrcoef(expected[both], found[both])[0, 1]) if varies else 0.0,
        "unlike": float(cells["unlike_training"].mean()),
        "agreement": float(np.mean([cells[name] == predicted for name in PREDICT])),
        "largest_share": float(np.bincount(predicted).max() / len(predicted)),
        "same_cells": float(same_cells / max(query.n_obs, 1)),
    }


def vote(
    cells: pd.DataFrame, predicted: np.ndarray, memory: dict[str, torch.Tensor], labels: list[str]
) -> dict[str, pd.Categorical | np.ndarray]:
    """Return the columns of ``obs`` that `scbert.annotate` adds: distance, flag, companions, consensus and agreement.

    The consensus is the label that two or three of the methods give; where all three differ, that of the method whose
    macro-F1 on validation cells is best; a cell without a token has none of these. The agreement is the share of the three.
    """
    votes = np.stack([predicted, *(cells[name] for name in PREDICT)], axis=1)  # (cells, methods), as in METHODS
    best = int(np.asarray(memory["scores"])[:, 1].argmax())
    count = (votes[:, :, None] == votes[:, None]).sum(1)  # (cells, methods): how many say the same
    chosen = np.where(count.max(1) > 1, count.argmax(1), best)
    consensus = votes[np.arange(len(votes)), chosen]
    codes = {name: cells[name] for name in PREDICT} | {"consensus": consensus}
    codes = {name: np.where(cells["blank"], -1, these) for name, these in codes.items()}
    return {f"scbert_{name}": pd.Categorical.from_codes(these, labels) for name, these in codes.items()} | {
        "scbert_agreement": np.where(cells["blank"], np.nan, (votes == consensus[:, None]).mean(1)),
        "scbert_distance": cells["distance"].to_numpy(),
        "scbert_unlike_training": cells["unlike_training"].to_numpy(),
    }


DEPTH, LACKING, PROFILE, UNLIKE, SAME, ONE_LABEL, AGREEMENT = 5.0, 0.75, 0.6, 0.9, 0.005, 0.95, 0.5
BOTH = 0.5, 0.7  # further from all types, and expressed otherwise, where either alone would not do


def say_what_is_off(found: dict[str, float]) -> list[str]:
    """Return a sentence for each number of `compare_query` outside its limits, set by tests/measure_queries.py."""
    said = []
    if not 1 / DEPTH <= found["depth"] / max(found["depth_of_training"], 1e-9) <= DEPTH:
        said.append(
            f"its cells have {found['depth']:,.0f} counts (median), those of training {found['depth_of_training']:,.0f}"
        )
    if found["lacking"] > LACKING:
        said.append(f"it lacks genes that hold {found['lacking']:.0%} of what such cells express")
    if found["profile"] < PROFILE:
        said.append(
            f"its genes are expressed otherwise than in training (correlation {found['profile']:.2f}), as in another "
            "species or tissue, or with genes in another order"
        )
    if found["unlike"] > UNLIKE or (found["unlike"] > BOTH[0] and found["profile"] < BOTH[1]):
        said.append(f"{found['unlike']:.0%} of its cells lie further from all types than 99 % of validation cells did")
    if found["largest_share"] > ONE_LABEL and found["agreement"] < AGREEMENT:
        said.append(
            f"scBERT finds one type most probable in {found['largest_share']:.0%} of its cells, to which logistic "
            f"regression and nearest centroid agree in {found['agreement']:.0%}"
        )
    if found["same_cells"] > SAME:
        said.append(f"{found['same_cells']:.0%} of its cells have the very counts of training cells")
    return said
