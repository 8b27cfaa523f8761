"""Gene vectors: gene2vec as published, and skip-gram on co-expression."""

import zipfile
from collections.abc import Sequence
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
from scipy import sparse

from ..data.checks import check_unique
from ..data.preprocess import lognormalize
from ..model.published import read_published_vectors
from .genes import load_vocabulary


def read_gene2vec(path: str | Path, genes: Sequence[str]) -> tuple[np.ndarray, list[str]]:
    """Read gene vectors from gene2vec's text file, or out of a published checkpoint.

    The file is a text with a gene and its numbers on each line, or a torch file of published weights, which holds vectors
    for the published vocabulary alone. `genes` is the vocabulary, in the model's order.

    Returns
    -------
    (genes, dim) float32, zero for a gene without a vector; and the names of those genes. A ValueError: no such file, lines
    that are no vectors or of different lengths, no shared gene, or NaN.

    Paper: Methods, "gene embedding" (gene2vec, 200 dimensions).
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"There is no file {path}: scbert fetch gene2vec, or give the path of your own vectors.")
    if zipfile.is_zipfile(path):
        names, vectors = load_vocabulary(), read_published_vectors(path)
        if len(names) != len(vectors):
            raise ValueError(
                f"{path} holds {len(vectors)} gene vectors, where the published vocabulary has {len(names)}."
            )
    else:
        names, vectors = _read_vectors(path)
        check_unique(pd.Index(names), f"Genes of {path}")
    if not np.isfinite(vectors).all():
        raise ValueError(f"{path} holds NaN or infinite values: take another copy.")
    position = pd.Index(names).get_indexer(pd.Index(genes))
    if not (position >= 0).any():
        raise ValueError(
            f"{path} has no vector for any of the {len(position)} genes ({', '.join(list(genes)[:3])}, ...)."
        )
    found = np.where((position >= 0)[:, None], vectors[position], 0).astype(np.float32)
    return found, [gene for gene, row in zip(genes, position, strict=True) if row < 0]


def _read_vectors(path):
    names, rows = [], []
    with open(path, encoding="utf-8", errors="replace") as file:
        for number, line in enumerate(file, 1):
            words = line.split()
            if number == 1 and len(words) == 2 and all(word.isdigit() for word in words):
                continue  # word2vec's head: how many vectors, of how many dimensions
            try:
                row = np.array(words[1:], dtype=np.float32)
            except ValueError:
                raise ValueError(
                    f"Line {number} of {path} is no gene with its numbers: is it a gene2vec file?"
                ) from None
            if not row.size or (rows and len(row) != len(rows[0])):
                raise ValueError(
                    f"Line {number} of {path} has {len(row)} numbers: the file is cut off, or no gene2vec file."
                )
            names.append(words[0])
            rows.append(row)
    if not rows:
        raise ValueError(f"{path} is empty: it should hold a gene and its numbers on each line.")
    return names, np.stack(rows)


def train_gene2vec(
    adata: anndata.AnnData, *, dim: int = 200, n_partners: int = 10, n_epochs: int = 10, seed: int = 0
) -> np.ndarray:
    """Train gene vectors by skip-gram on pairs of co-expressed genes, of any dimension.

    Each gene is paired with the genes, at most `n_partners`, whose log-normalised expression correlates best with its own
    over these cells, and positively. Give training cells only. The same seed gives the same vectors (one thread).

    Returns
    -------
    (genes, dim) float32, zero for a gene that is expressed in no cell or constant. A ValueError if gensim is missing, or
    no two genes vary together.

    Paper: Methods, "gene embedding"; after Du et al. 2019, which took pairs from 984 bulk data sets, by a threshold.
    """
    if dim < 1 or n_partners < 1:
        raise ValueError(f"dim and n_partners must be at least 1, not {dim} and {n_partners}.")
    try:
        from gensim.models import Word2Vec
    except ImportError:
        raise ValueError(
            "Training gene vectors needs gensim: pip install -c requirements.lock -e '.[gene2vec]'."
        ) from None
    pairs = _pair_coexpressed(adata, n_partners)
    if not pairs:
        raise ValueError("No two genes of these cells vary together: there is nothing to learn vectors from.")
    model = Word2Vec(  # sample=0: its default drops most pairs of a small vocabulary
        pairs, vector_size=dim, window=1, sg=1, negative=5, sample=0, min_count=1, epochs=n_epochs, seed=seed, workers=1
    )
    vectors = np.zeros((adata.n_vars, dim), np.float32)
    for i in range(adata.n_vars):
        if str(i) in model.wv:
            vectors[i] = model.wv[str(i)]
    return vectors


def _pair_coexpressed(adata, n_partners, genes_at_once=512):
    """Return pairs of gene numbers, as words: each gene with those that correlate best with it."""
    values = lognormalize(adata)
    mean = np.asarray(values.mean(0)).ravel()
    deviation = np.sqrt(np.maximum(np.asarray(values.multiply(values).mean(0)).ravel() - mean**2, 0))
    varies = np.flatnonzero(deviation > 1e-6)
    scaled = sparse.csc_matrix(values[:, varies] @ sparse.diags(1 / deviation[varies]))
    offset = mean[varies] / deviation[varies]
    pairs = []
    for start in range(0, len(varies), genes_at_once):
        block = slice(start, start + genes_at_once)
        correlation = (scaled[:, block].T @ scaled).toarray() / adata.n_obs - np.outer(offset[block], offset)
        rows = np.arange(len(correlation))
        correlation[rows, start + rows] = -1  # a gene is no partner of its own
        best = np.argsort(-correlation, axis=1, kind="stable")[:, :n_partners]
        for row in rows:
            for other in best[row][correlation[row, best[row]] > 0]:
                pairs.append([str(varies[start + row]), str(varies[other])])
    return pairs
