"""What a fitted method says of cells, beyond their label: logits, vectors, and how far from all known types they lie."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import anndata
import numpy as np
import pandas as pd
from sklearn.decomposition import PCA

from ..data.preprocess import lognormalize
from ..memory.companions import fit_centres, measure_to_centres
from ..paths import replace_whole
from .methods import read_out, to_probabilities

__all__ = ["Kept", "describe_cells", "measure_distance", "read_file", "to_probabilities", "write_file"]

N_COMPONENTS = 30  # of the expression, for methods without vectors of their own


class Kept(NamedTuple):
    """What one method, trained on one split, says of the cells it predicts: those tested, and after them those set aside."""

    cells: pd.DataFrame
    """A row a cell, by name: truth, predicted, confidence, seen (some training cell has its true label), and part, "test" or "aside"."""
    logits: pd.DataFrame
    """Cells x labels; their softmax is the method's probabilities, see `scbert.methods.read_out`."""
    embedding: np.ndarray
    """(cells, dim)"""
    distance: np.ndarray
    """(cells,), see `measure_distance`."""


def describe_cells(
    predict: Callable, train: anndata.AnnData, cells: anndata.AnnData, *, label_key: str = "cell_type", seed: int = 0
) -> tuple[pd.DataFrame, np.ndarray, np.ndarray]:
    """Return logits (cells x labels), vectors (cells, dim) and distances (cells,) of a fitted method; see `Kept`.

    The vectors are the method's own, or principal components of log-normalised counts, fitted on the training cells.
    """
    logits, vectors = read_out(predict, cells)
    if vectors is None:
        pca = PCA(min(N_COMPONENTS, train.n_obs - 1, train.n_vars), random_state=seed)
        learnt = pca.fit_transform(lognormalize(train).toarray())
        vectors = pca.transform(lognormalize(cells).toarray())
    else:
        learnt = read_out(predict, train)[1]
    distance = measure_distance(learnt, train.obs[label_key].astype(str).to_numpy(), vectors)
    return logits, vectors.astype(np.float32), distance.astype(np.float32)


def measure_distance(train: np.ndarray, labels: np.ndarray, vectors: np.ndarray) -> np.ndarray:
    """Return the Mahalanobis distance of each vector, (cells, dim), to the nearest label's mean; (cells,).

    The covariance is that of the vectors `train`, (cells, dim), within labels: see `scbert.companions.fit_centres`.
    """
    names, index = np.unique(labels, return_inverse=True)
    root, centres = fit_centres(train.astype(np.float64), index, len(names))
    return measure_to_centres(vectors.astype(np.float64), root, centres)


def write_file(path: Path, logits: pd.DataFrame, embedding: np.ndarray, distance: np.ndarray) -> None:
    """Write what `read_file` reads, in one step; the cells' names stand elsewhere."""
    labels = np.array(logits.columns, dtype=str)
    arrays = {"logits": logits.to_numpy(np.float32), "labels": labels, "embedding": embedding, "distance": distance}
    with replace_whole(path) as temporary, open(temporary, "wb") as file:
        np.savez_compressed(file, **arrays)


def read_file(path: Path, cells: pd.DataFrame) -> Kept:
    """Read what `write_file` wrote of these cells, in their order."""
    with np.load(path) as file:
        logits = pd.DataFrame(file["logits"].astype(np.float64), cells.index, file["labels"].astype(object))
        return Kept(cells, logits, file["embedding"], file["distance"])
