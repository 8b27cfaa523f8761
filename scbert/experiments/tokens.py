"""What scBERT sees of a cell: how often each token comes, what one molecule becomes, what is lost (notebook 01)."""

from collections.abc import Mapping

import anndata
import numpy as np
import pandas as pd
from scipy import sparse

from ..data.preprocess import bin_counts


def take_seen(counts: sparse.csr_matrix, bins: sparse.csr_matrix) -> np.ndarray:
    """Return the tokens of all values with at least one molecule, cell by cell and gene by gene, token 0 among them.

    `counts` and `bins` are (cells, genes); tokens are stored where they are not 0.
    """
    one_more = (counts.sign() + bins).tocsr()  # stored wherever at least one molecule was seen
    return one_more.sorted_indices().data.astype(int) - 1


def count_tokens(counts: sparse.csr_matrix, bins: sparse.csr_matrix, n_bins: int = 5) -> pd.DataFrame:
    """Count how often each token comes, and say which counts become it.

    One row a token: `from` and `to`, its edges in counts per 10,000, the upper one excluded; `values`, how often it
    comes among all values; and `molecules were seen`, how often among values with at least one molecule.

    Paper: Methods, "expression embedding"; Fig. 1. The edges are in the published code only.
    """
    lowest = [0, *(2**token - 1 for token in range(1, n_bins + 1))]
    values = np.bincount(bins.data, minlength=n_bins + 1)
    values[0] = bins.shape[0] * bins.shape[1] - bins.nnz
    seen = np.bincount(take_seen(counts, bins), minlength=n_bins + 1)
    columns = {"from": lowest, "to": [*lowest[1:], np.inf], "values": values, "molecules were seen": seen}
    return pd.DataFrame(columns, index=pd.RangeIndex(n_bins + 1, name="token"))


def bin_one_molecule(depths: np.ndarray, n_bins: int = 5) -> np.ndarray:
    """Return the token of a single molecule in a cell of each of these depths, its molecules over all genes."""
    return bin_counts(sparse.csr_matrix(np.ones((len(depths), 1))), np.asarray(depths), n_bins).toarray().ravel()


def measure_losses(counts: sparse.csr_matrix, ways: Mapping[str, sparse.csr_matrix], n_bins: int = 5) -> pd.DataFrame:
    """Measure what tokens lose of values with at least one molecule.

    `ways` is name -> tokens of the same counts, (cells, genes), made in another way each, such as with another divisor.
    One column a way: the shares of these values that became token 0, or are cut off at the highest; their mean token.
    """
    losses = {}
    for name, bins in ways.items():
        seen = take_seen(counts, bins)
        losses[name] = [(seen == 0).mean(), (seen == n_bins).mean(), seen.mean()]
    return pd.DataFrame(losses, index=["seen, but token 0", "cut off at the top", "mean token"])


def are_kept(before: anndata.AnnData, after: anndata.AnnData, found: pd.DataFrame) -> bool:
    """Say whether genes have the same tokens under their old names and under those of the model.

    `before` and `after` are the same cells, tokenized under the old names and, aligned to the model's genes, under the
    new ones. `found` is what `scbert.genes.resolve` found for the names of `before`. Genes of several names are left
    out, since their counts are summed; so are names of no gene of the model.
    """
    alone = (found["gene"].notna() & ~found["gene"].duplicated(keep=False)).to_numpy()
    column = after.var_names.get_indexer(found["gene"][alone])
    return (after.layers["bins"][:, column] != before.layers["bins"][:, alone]).nnz == 0
