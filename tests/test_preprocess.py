"""Tokens against the definition value by value, genes against the dictionary, and dense, sparse and backed alike."""

import math

import anndata
import numpy as np
import pandas as pd
import pytest
from scipy import sparse

from scbert.data.preprocess import align, bin_counts, hash_genes, library_size, thin_counts, tokenize


def define_bin(count, total, n_bins=5):
    """The definition, for one value."""
    return min(math.floor(math.log2(1 + 10_000 * count / total)), n_bins)


def align_naively(counts, names, vocabulary):
    """The published loop: one gene of the vocabulary at a time."""
    aligned = np.zeros((len(counts), len(vocabulary)))
    for j, gene in enumerate(vocabulary):
        if gene in names:
            aligned[:, j] = counts[:, list(names).index(gene)]
    return aligned


@pytest.mark.parametrize("n_bins", [3, 5, 9])
def test_bins_equal_the_definition_value_by_value(n_bins):
    random = np.random.default_rng(0)
    counts = random.poisson(random.gamma(0.3, 20, size=(20, 30)))
    totals = counts.sum(1) + random.integers(1, 9_000, size=20)  # 1 in 10,000 cells or so would be at an edge
    bins = bin_counts(sparse.csr_matrix(counts), totals, n_bins).toarray()
    expected = [[define_bin(c, total, n_bins) for c in row] for row, total in zip(counts, totals, strict=True)]
    assert bins.tolist() == expected
    assert set(bins.ravel()) == set(range(n_bins + 1))


@pytest.mark.parametrize("total", [10_000.0, 3_000_000.0, 70_000.0])
def test_a_value_exactly_at_an_edge_belongs_to_the_upper_bin(total):
    edges = np.array([[1, 3, 7, 15, 31]]) * total / 10_000
    at, below = (bin_counts(sparse.csr_matrix(counts), np.array([total])).toarray()[0] for counts in (edges, edges - 1))
    assert at.tolist() == [1, 2, 3, 4, 5]
    assert below.tolist() == [define_bin(c, total) for c in (edges - 1)[0]]
    assert (below < at).all()


@pytest.mark.parametrize(
    ("total", "token"),
    [(500, 4), (1_000, 3), (1_300, 3), (2_000, 2), (3_000, 2), (5_000, 1), (10_000, 1), (10_001, 0), (20_000, 0)],
)
def test_the_token_of_a_single_molecule_tells_the_depth_of_the_cell(total, token):
    assert bin_counts(sparse.csr_matrix([[1.0]]), np.array([total])).toarray() == token


def test_sparse_counts_give_sparse_small_integers_without_stored_zeros(make_cells):
    adata = make_cells()
    adata.obs["n_counts"] = 30_000.0  # one and two counts are token 0
    bins = tokenize(adata).layers["bins"]
    assert sparse.issparse(bins)
    assert bins.format == "csr"
    assert bins.dtype == np.uint8
    assert 0 < bins.nnz == bins.count_nonzero() < adata.X.nnz


def test_explicit_zeros_have_no_tokens_and_a_cell_of_nothing_else_is_refused():
    counts = sparse.csr_matrix((np.array([0.0, 4.0, 0.0]), ([0, 0, 1], [0, 1, 1])), shape=(2, 3))
    adata = anndata.AnnData(counts)
    with pytest.raises(ValueError, match=r"adata has empty cells, .* first: 1\): drop them"):
        tokenize(adata)
    adata.obs["n_counts"] = [4.0, 9.0]  # over all genes; these are a selection
    adata = tokenize(adata)
    assert adata.layers["bins"].toarray().tolist() == [[0, 5, 0], [0, 0, 0]]
    assert adata.uns["scbert"]["tokenize"]["cells_without_tokens"] == 1


@pytest.mark.parametrize(
    ("value", "message"), [(1.5, "fractional values such as 1.5"), (-1, "negative values"), (np.nan, "NaN or infinite")]
)
def test_what_is_no_count_is_refused(make_cells, value, message):
    adata = make_cells()
    adata.X = adata.X.toarray().astype(float)
    adata.X[7, 3] = value
    with pytest.raises(ValueError, match=f"X of mine holds {message}"):
        tokenize(adata, name="mine")


def test_repeated_entries_are_one_count(make_cells):
    repeated = sparse.csr_matrix((np.array([1.0, 2.0, 4.0]), np.array([1, 1, 0]), np.array([0, 3])), shape=(1, 3))
    adata = tokenize(anndata.AnnData(repeated))
    assert adata.layers["bins"].toarray().tolist() == [[5, 5, 0]]
    assert adata.X.nnz == 3  # the caller's matrix stays as it was


def test_the_counts_are_left_as_they_were(make_cells):
    adata, before = make_cells(), make_cells().X.toarray()
    assert tokenize(adata) is adata
    assert (adata.X.toarray() == before).all()
    tokenize(adata, genes=["gene5", "other"])
    assert (adata.X.toarray() == before).all()


@pytest.mark.parametrize("library", ["all", "aligned"])
@pytest.mark.parametrize("has_n_counts", [True, False])
def test_shuffled_missing_and_extra_genes_end_up_where_a_loop_over_genes_puts_them(make_cells, library, has_n_counts):
    adata = make_cells()
    if not has_n_counts:
        del adata.obs["n_counts"]
    random = np.random.default_rng(0)
    vocabulary = [*random.permutation(adata.var_names)[:15], "absent1", "absent2"]
    random.shuffle(vocabulary)
    result = tokenize(adata, genes=vocabulary, library=library)

    counts = align_naively(adata.X.toarray(), adata.var_names, vocabulary)
    every = np.full(60, 2000.0) if has_n_counts else adata.X.toarray().sum(1)
    totals = every if library == "all" else counts.sum(1)
    expected = [[define_bin(c, total) for c in row] for row, total in zip(counts, totals, strict=True)]
    assert list(result.var_names) == vocabulary
    assert (result.X.toarray() == counts).all()
    assert result.layers["bins"].toarray().tolist() == expected
    assert result.obs[adata.obs.columns].equals(adata.obs)
    if library == "all":  # the totals travel with the cells, since the matrix no longer holds all genes
        assert (result.obs["n_counts"] == every).all()
    assert result.var["matched"].tolist() == ["absent" not in gene for gene in vocabulary]


def test_dense_sparse_and_backed_counts_give_the_same_tokens(make_cells, tmp_path, monkeypatch):
    monkeypatch.setattr("scbert.data.counts.CELLS_AT_ONCE", 7)  # several blocks, the last one smaller
    adata = make_cells()
    adata.obs["n_counts"] = np.linspace(500, 20_000, 60)
    vocabulary = [*adata.var_names[3:20][::-1], "absent"]
    expected = tokenize(adata, genes=vocabulary).layers["bins"].toarray()
    variants = {"dense": adata.X.toarray(), "csc": adata.X.tocsc(), "integer": adata.X.toarray().astype(np.uint8)}
    for name, counts in variants.items():
        variant = anndata.AnnData(counts, obs=adata.obs, var=adata.var)
        assert (tokenize(variant, genes=vocabulary).layers["bins"].toarray() == expected).all(), name
        variant.write_h5ad(tmp_path / f"{name}.h5ad")
        backed = anndata.read_h5ad(tmp_path / f"{name}.h5ad", backed="r")
        assert (tokenize(backed, genes=vocabulary).layers["bins"].toarray() == expected).all(), f"{name}, backed"
        backed.file.close()


def test_thinned_cells_keep_the_share_of_counts_that_their_totals_say():
    counts = sparse.csr_matrix(np.full((400, 50), 40.0))
    kept, totals = thin_counts(counts, np.full(400, 4000.0), 0.2, np.random.default_rng(0))
    shares = totals / 4000
    assert 0.2 <= shares.min() < 0.25 and 0.95 < shares.max() <= 1
    assert np.median(shares) == pytest.approx(0.2**0.5, abs=0.05)  # even in the logarithm
    found = np.asarray(kept.sum(1)).ravel() / 2000
    assert found == pytest.approx(shares, abs=0.05)  # binomial, of 2,000 counts
    assert counts.data.min() == 40  # the cells themselves are left as they are


def test_the_library_size_is_n_counts_where_the_matrix_is_a_selection_of_the_genes(make_cells):
    adata = make_cells()
    assert library_size(adata).tolist() == [2000.0] * 60
    del adata.obs["n_counts"]
    assert library_size(adata).tolist() == adata.X.toarray().sum(1).tolist()


def test_the_report_says_what_was_matched_and_what_was_lost(make_cells):
    adata = make_cells()
    vocabulary = ["gene1", "gene4", "absent", "gene7"]
    kept = adata[:, ["gene1", "gene4", "gene7"]].X.toarray()
    result = tokenize(adata, genes=vocabulary, n_bins=4)
    assert result.uns["scbert"]["tokenize"] == {
        "n_bins": 4,
        "library": "all",
        "genes_sha256": hash_genes(vocabulary),
        "genes_in_data": 24,
        "genes_in_vocabulary": 4,
        "genes_matched": 3,
        "matched_share": 0.75,
        "cells_without_tokens": int((kept.sum(1) == 0).sum()),
    }
    assert "scbert" not in adata.uns


def test_tokens_and_report_survive_a_file(make_cells, tmp_path):
    adata = tokenize(make_cells())
    adata.write_h5ad(tmp_path / "cells.h5ad")
    back = anndata.read_h5ad(tmp_path / "cells.h5ad")
    assert (back.layers["bins"] != adata.layers["bins"]).nnz == 0
    assert back.uns["scbert"]["tokenize"] == adata.uns["scbert"]["tokenize"]


def test_duplicated_genes_are_refused(make_cells):
    adata = make_cells()
    with pytest.raises(ValueError, match=r"of the vocabulary are duplicated \(1 of them, first: gene3\)"):
        tokenize(adata, genes=["gene3", "gene4", "gene3"])
    adata.var_names = pd.Index(["gene0", *adata.var_names[:-1]])
    with pytest.raises(ValueError, match=r"of adata are duplicated \(1 of them, first: gene0\): sum or rename"):
        tokenize(adata)


def test_a_vocabulary_without_a_single_shared_gene_is_refused(make_cells):
    with pytest.raises(ValueError, match=r"None of the data's 24 genes \(gene0.*same gene symbols"):
        tokenize(make_cells(), genes=["ENSG1", "ENSG2"])


@pytest.mark.parametrize("wrong", [3.0, np.nan, np.inf, "high", pd.NA, ""])
@pytest.mark.parametrize("function", [tokenize, library_size])
def test_a_total_below_the_cells_own_counts_or_no_number_is_refused(make_cells, wrong, function):
    adata = make_cells()
    adata.obs["n_counts"] = adata.obs["n_counts"].astype(object)
    adata.obs.loc["cell7", "n_counts"] = wrong
    message = r"1 cells have more.*no number.*first: cell7, with .*correct the column or delete it"
    with pytest.raises(ValueError, match=message):
        function(adata)


@pytest.mark.parametrize("kind", [str, "Int64", "category", np.float32])
def test_totals_are_read_in_any_form(make_cells, kind):
    adata = make_cells()
    adata.obs["n_counts"] = np.arange(2000, 2060)
    adata.obs["n_counts"] = adata.obs["n_counts"].astype(kind)
    assert library_size(adata).tolist() == list(range(2000, 2060))


def test_an_unknown_library_is_refused(make_cells):
    with pytest.raises(ValueError, match="'all' or 'aligned', not 'median'"):
        tokenize(make_cells(), library="median")


def test_alignment_is_by_name_whatever_the_order_and_zero_where_a_gene_is_absent():
    counts = sparse.csr_matrix(np.array([[1, 2, 3], [0, 5, 0]], dtype=np.float32))
    aligned = align(counts, ["B", "X", "A"], ["A", "B", "C"])
    assert (aligned.toarray() == [[3, 1, 0], [0, 0, 0]]).all()
    assert aligned.dtype == np.float32


def test_another_vocabulary_keeps_what_is_known_of_the_cells(make_cells):
    adata = make_cells()
    adata.uns["scbert"] = {"fractional_counts": "why"}
    adata.obsm["X_umap"] = np.zeros((adata.n_obs, 2))
    tokens = tokenize(adata, genes=[*adata.var_names[:5], "another"])
    assert tokens.uns["scbert"]["fractional_counts"] == "why"
    assert "tokenize" not in adata.uns["scbert"]
    assert tokens.obsm["X_umap"].shape == (adata.n_obs, 2)
