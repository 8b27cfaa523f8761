"""Gene vectors: skip-gram on co-expression, as gene2vec."""

import anndata
import numpy as np
from scipy import sparse

from ..data.preprocess import lognormalize


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
        raise ValueError("gensim is not installed: pip install -c requirements.lock -e '.[gene2vec]'.") from None
    pairs = _pair_coexpressed(adata, n_partners)
    if not pairs:
        raise ValueError("No two genes of these cells vary together: there is nothing to learn vectors from.")
    model = Word2Vec(  # sample=0: its default drops most pairs of a small vocabulary
        pairs, vector_size=dim, window=1, sg=1, negative=5, sample=0, min_count=1, epochs=n_epochs, seed=seed, workers=1
    )
    vectors = np.zeros((adata.n_vars, dim), np.float32)
    vectors[list(map(int, model.wv.index_to_key))] = model.wv.vectors
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
