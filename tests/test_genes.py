"""Names are traced to genes by the table alone: no guess, no upper case, and nothing is lost unsaid."""

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import sparse

import scbert
from scbert import gene_vectors, genes, preprocess
from scbert.sources.gene_vectors import read_gene2vec, train_gene2vec
from scbert.sources.genes import read_gene_table, rename_genes, resolve

HEAD = "#tax_id\tGeneID\tSymbol\tSynonyms\tdbXrefs\n"
ROWS = [
    ("1", "NEW1", "OLD1|SHARED", "MIM:1|Ensembl:ENSG00000000001"),
    ("2", "NEW2", "SHARED|NEW1", "Ensembl:ENSG00000000002|Ensembl:ENSG00000000022"),
    ("3", "LEFT3", "OLD3", "-"),
    ("4", "NOW4", "THEN4|ALSO4", "Ensembl:ENSG00000000004"),
    ("5", "TWIN", "-", "Ensembl:ENSG00000000055"),
    ("6", "TWIN6", "-", "Ensembl:ENSG00000000055"),
]
VOCABULARY = ["NEW1", "NEW2", "THEN4", "lower5", "UNHEARD"]


@pytest.fixture
def table(tmp_path):
    path = tmp_path / "Homo_sapiens.gene_info"
    path.write_text(HEAD + "".join("9606\t" + "\t".join(row) + "\n" for row in ROWS))
    return read_gene_table(path)


@pytest.mark.parametrize(
    ("name", "gene", "status"),
    [
        ("NEW1", "NEW1", "matched"),  # though it is an alias of another gene too
        ("UNHEARD", "UNHEARD", "matched"),  # though the table does not know it
        ("OLD1", "NEW1", "renamed"),
        ("NOW4", "THEN4", "renamed"),  # the vocabulary has the old name
        ("ALSO4", "THEN4", "renamed"),  # an alias of the gene that the vocabulary calls by its old name
        ("ENSG00000000001", "NEW1", "renamed"),
        ("ENSG00000000004.12", "THEN4", "renamed"),
        ("ENSG00000000022", "NEW2", "renamed"),
        ("SHARED", None, "ambiguous"),
        ("ENSG00000000055", None, "ambiguous"),
        ("LEFT3", None, "outside"),
        ("OLD3", None, "outside"),
        ("new1", None, "unknown"),  # upper-casing is not resolution
        ("LOWER5", None, "unknown"),
        ("ENSG00000009999", None, "unknown"),
    ],
)
def test_each_name_is_traced_or_refused_for_a_reason(table, name, gene, status):
    row = resolve([name], VOCABULARY, table).iloc[0]
    assert (row["gene"], row["status"]) == (gene, status)


def test_a_current_symbol_of_the_vocabulary_goes_before_an_old_name_of_the_same_gene(table):
    found = resolve(["ENSG00000000004"], ["THEN4", "NOW4"], table)
    assert found["gene"].tolist() == ["NOW4"]


def test_two_old_names_of_one_gene_in_the_vocabulary_are_ambiguous(table):
    assert resolve(["NOW4"], ["THEN4", "ALSO4"], table)["status"].tolist() == ["ambiguous"]


@pytest.fixture
def named(make_cells):
    adata = make_cells(6, 6)
    adata.var_names = ["NEW1", "OLD1", "SHARED", "NOW4", "dust", "NEW2"]
    return adata


def test_counts_of_one_gene_are_summed_and_no_count_is_lost(named, table):
    counts = named.X.toarray()
    renamed = rename_genes(named, VOCABULARY, table)
    assert list(renamed.var_names) == ["NEW1", "SHARED", "THEN4", "dust", "NEW2"]
    assert (renamed[:, "NEW1"].X.toarray().ravel() == counts[:, 0] + counts[:, 1]).all()
    assert renamed.X.sum() == counts.sum()
    assert renamed.obs.equals(named.obs)
    assert list(named.var_names)[1] == "OLD1"  # what was given stays as it was


def test_the_report_adds_up(named, table):
    report = rename_genes(named, VOCABULARY, table).uns["scbert"]["genes"]
    assert {status: report[status] for status in genes.STATUSES} == {
        "matched": 2, "renamed": 2, "outside": 0, "ambiguous": 1, "unknown": 1,
    }  # fmt: skip
    assert report["summed"] == 1
    assert report["share_before"] == 2 / 5
    assert report["share_after"] == 3 / 5


def test_another_species_is_refused(make_cells, table):
    with pytest.raises(ValueError, match=r"0 of the data's 24 genes \(gene0, gene1, .*is it another species"):
        rename_genes(make_cells(), VOCABULARY, table)


def test_a_backed_file_is_renamed_but_not_summed(named, table, tmp_path):
    import anndata

    named.write_h5ad(tmp_path / "twice.h5ad")
    with pytest.raises(ValueError, match=r"1 genes have to be summed: load this file into memory"):
        rename_genes(anndata.read_h5ad(tmp_path / "twice.h5ad", backed="r"), VOCABULARY, table)
    named[:, 1:].copy().write_h5ad(tmp_path / "once.h5ad")
    renamed = rename_genes(anndata.read_h5ad(tmp_path / "once.h5ad", backed="r"), VOCABULARY, table)
    assert list(renamed.var_names)[0] == "NEW1"
    assert renamed.isbacked


# Gene vectors


def write_vectors(path, head=""):
    path.write_text(head + "A 1 2\nB 3 4\nC\t5\t6\n")
    return path


@pytest.mark.parametrize("head", ["", "3 2\n"])
def test_vectors_are_read_in_the_order_of_the_genes(tmp_path, head):
    vectors, missing = read_gene2vec(write_vectors(tmp_path / "g.txt", head), ["C", "X", "A"])
    assert vectors.tolist() == [[5, 6], [0, 0], [1, 2]]
    assert vectors.dtype == np.float32
    assert missing == ["X"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "is empty: it should hold a gene and its numbers"),
        ("A 1 2\nB 3\n", "Line 2 of .* has 1 numbers: the file is cut off"),
        ("A 1 2\nB three 4\n", "Line 2 of .* is no gene with its numbers"),
        ("A 1 nan\n", "holds NaN or infinite values"),
        ("X 1 2\n", r"has no vector for any of the 2 genes \(A, B"),
    ],
)
def test_a_file_that_holds_no_vectors_is_one_sentence(tmp_path, content, message):
    (tmp_path / "g.txt").write_text(content)
    with pytest.raises(ValueError, match=message):
        read_gene2vec(tmp_path / "g.txt", ["A", "B"])


def test_no_file_of_vectors_says_how_to_get_one(tmp_path):
    with pytest.raises(ValueError, match="There is no file .*g.txt: scbert fetch gene2vec"):
        read_gene2vec(tmp_path / "g.txt", ["A"])


def test_vectors_come_out_of_a_checkpoint_by_name(tmp_path, monkeypatch):
    weight = torch.randn(4, 5, dtype=torch.float64)
    torch.save({"model_state_dict": {"pos_emb.emb.weight": weight}}, tmp_path / "weights.pth")
    monkeypatch.setattr(gene_vectors, "load_vocabulary", lambda: ["A", "B", "C"])
    vectors, missing = read_gene2vec(tmp_path / "weights.pth", ["C", "A"])
    assert np.allclose(vectors, weight[[2, 0]].numpy())
    assert missing == []


@pytest.fixture
def coexpressed(make_cells):
    """Cells whose genes are expressed in three groups, and one gene that never varies."""
    adata = make_cells(300, 24)
    counts = adata.X.toarray()
    counts[:, 23] = 0
    adata.X = sparse.csr_matrix(counts)
    return adata


def test_genes_that_are_expressed_together_get_close_vectors(coexpressed):
    pytest.importorskip("gensim", reason="needs the extra gene2vec")
    vectors = train_gene2vec(coexpressed, dim=8, n_epochs=60)
    assert vectors.shape == (24, 8)
    assert (vectors[23] == 0).all()
    unit = vectors[:23] / np.linalg.norm(vectors[:23], axis=1, keepdims=True)
    closeness = pd.DataFrame(unit @ unit.T)
    group = np.arange(23) % 3
    same = group[:, None] == group
    np.fill_diagonal(same, False)
    others = group[:, None] != group
    assert closeness.to_numpy()[same].mean() > closeness.to_numpy()[others].mean() + 0.1


def test_the_same_seed_gives_the_same_vectors(coexpressed):
    pytest.importorskip("gensim", reason="needs the extra gene2vec")
    first, again, other = (train_gene2vec(coexpressed, dim=4, n_epochs=2, seed=seed) for seed in (0, 0, 1))
    assert (first == again).all()
    assert (first != other).any()


def test_cells_without_any_variation_teach_no_vectors(make_cells):
    pytest.importorskip("gensim", reason="needs the extra gene2vec")
    adata = make_cells(5, 4)
    adata.X = sparse.csr_matrix(np.ones((5, 4), np.float32))
    with pytest.raises(ValueError, match="No two genes of these cells vary together"):
        train_gene2vec(adata, dim=4)


# Which genes a model reads


def test_the_most_variable_genes_are_chosen_and_stay_in_order(make_cells):
    adata = make_cells(90, 24)
    counts = adata.X.toarray()
    counts[:, 3:] = counts[:, 3:].mean(0).round()  # only the first three tell the cells apart
    adata.X = sparse.csr_matrix(counts)
    assert genes.choose_genes(adata, "3") == ["gene0", "gene1", "gene2"]
    assert genes.choose_genes(adata) == list(adata.var_names)
    assert len(genes.choose_genes(adata, "10")) == 10


def test_the_genes_of_a_named_set_come_first_and_the_most_variable_fill_up(make_cells, monkeypatch):
    adata, panel = make_cells(), make_cells(6)[:, [20, 23, 21]].copy()
    panel.var_names = ["gene20", "elsewhere", "gene21"]
    monkeypatch.setattr(scbert.genes, "load", lambda name: {"panel": panel}[name])
    chosen = genes.choose_genes(adata, "panel 6")
    assert {"gene20", "gene21"} < set(chosen)
    assert set(chosen) - {"gene20", "gene21"} <= set(genes.choose_genes(adata, "6"))
    assert chosen == [name for name in adata.var_names if name in chosen]  # in the data's order
    assert set(genes.choose_genes(adata, "panel 1")) < {"gene20", "gene21"}


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ("many", "genes must be all, a number, a set and a number, or published, not 'many'"),
        ("0", "genes must be all, a number, a set and a number, or published, not '0'"),
        ("-3", "genes must be all, a number, a set and a number, or published, not '-3'"),
        ("25", "genes = 25 asks for more than the 24 genes of the data: take all, or fewer"),
    ],
)
def test_another_choice_of_genes_is_one_sentence(make_cells, choice, message):
    with pytest.raises(ValueError, match=message):
        genes.choose_genes(make_cells(), choice)


def test_the_published_choice_is_the_fetched_list_and_known_by_its_hash(make_cells, monkeypatch):
    monkeypatch.setattr(genes, "load_vocabulary", lambda: ["A", "B"])
    monkeypatch.setattr(genes, "PUBLISHED_GENES_SHA256", preprocess.hash_genes(["A", "B"]))
    assert genes.choose_genes(make_cells(), "published") == ["A", "B"]
    assert genes.is_published(["A", "B"])
    assert not genes.is_published(["B", "A"])


def test_statuses_are_counted_with_their_share_of_the_counts(named, table):
    report = genes.count_statuses(named, resolve(named.var_names, VOCABULARY, table))
    assert list(report.index) == list(genes.STATUSES)
    assert report["genes"].to_dict() == {"matched": 2, "renamed": 2, "outside": 0, "ambiguous": 1, "unknown": 1}
    counts = named.X.toarray().sum(0)
    assert np.isclose(report.loc["matched", "share_of_counts"], (counts[0] + counts[5]) / counts.sum())
    assert np.isclose(report["share_of_counts"].sum(), 1)


@pytest.mark.parametrize(
    ("vocabulary", "message"),
    [("published", "vocabulary must be a list of gene names, such as scbert.genes.load_vocabulary"),
     (["A", "A"], r"Gene names of the vocabulary are duplicated")],
)  # fmt: skip
def test_a_vocabulary_that_is_none_is_one_sentence(table, vocabulary, message):
    with pytest.raises(ValueError, match=message):
        resolve(["A"], vocabulary, table)


def test_blanks_around_a_name_and_the_mark_of_the_y_chromosome_do_not_hide_a_gene(table):
    assert resolve(["OLD1 ", "ENSG00000000004.10_PAR_Y"], VOCABULARY, table)["gene"].tolist() == ["NEW1", "THEN4"]


def test_a_gene_with_two_vectors_is_refused(tmp_path):
    (tmp_path / "g.txt").write_text("A 1 2\nA 3 4\n")
    with pytest.raises(ValueError, match="Genes of .*g.txt are duplicated"):
        read_gene2vec(tmp_path / "g.txt", ["A"])


def test_vectors_without_a_dimension_are_refused(coexpressed):
    with pytest.raises(ValueError, match="dim and n_partners must be at least 1, not 0 and 10"):
        train_gene2vec(coexpressed, dim=0)
