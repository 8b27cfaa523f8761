"""Names are traced to genes by the table alone: no guess, no upper case, and nothing is lost unsaid."""

import os

import anndata
import numpy as np
import pandas as pd
import pytest
from scipy import sparse

import scbert
from scbert import genes, preprocess
from scbert.sources.gene_names import find_names, find_no_genes, make_r_name, read_date
from scbert.sources.gene_vectors import train_gene2vec
from scbert.sources.genes import read_gene_table, rename_genes, resolve, tidy_names

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
    named.write_h5ad(tmp_path / "twice.h5ad")
    with pytest.raises(ValueError, match=r"1 genes have to be summed: load this file into memory"):
        rename_genes(anndata.read_h5ad(tmp_path / "twice.h5ad", backed="r"), VOCABULARY, table)
    named[:, 1:].copy().write_h5ad(tmp_path / "once.h5ad")
    renamed = rename_genes(anndata.read_h5ad(tmp_path / "once.h5ad", backed="r"), VOCABULARY, table)
    assert list(renamed.var_names)[0] == "NEW1"
    assert renamed.isbacked


# Identifiers


@pytest.mark.parametrize(
    ("name", "gene_id", "gene", "status", "how"),
    [
        ("ALIEN", "ENSG00000000001.4", "NEW1", "renamed", "identifier"),  # a symbol younger than the table
        ("NEW2", "ENSG00000000002", "NEW2", "matched", "name"),
        ("OLD1", "ENSG00000000004", "THEN4", "renamed", "identifier"),  # its symbol was another gene's name once
        ("NEW2", "ENSG00000000001", "NEW1", "renamed", "identifier"),  # so was this one, which the vocabulary has
        ("OLD1", "ENSG00000000003", None, "outside", ""),  # better lost than added to another gene
        ("NEW1", "ENSG00000000003", "NEW1", "matched", "name"),  # the table's gene is none of the vocabulary
        ("NEW1", "ENSG00000009999", "NEW1", "matched", "name"),  # the table doesn't know it
        ("OLD1", "CD3_antibody", "NEW1", "renamed", "symbol"),
        ("OLD1", "nan", "NEW1", "renamed", "symbol"),
        ("SHARED", "ENSG00000000022", "NEW2", "renamed", "identifier"),
        ("TWICE", "ENSG00000000002;ENSG00000000022", "NEW2", "renamed", "identifier"),
        ("TWICE", "ENSG00000000002;ENSG00000009999", "NEW2", "renamed", "identifier"),  # all that are known
        ("TWICE", "ENSG00000000001;ENSG00000000002", None, "ambiguous", ""),
        ("NEW1", "ENSG00000000001;ENSG00000000002", "NEW1", "matched", "name"),
        ("NEW1-1", "ENSG00000000004", "THEN4", "renamed", "identifier"),
        ("NEW2_ENSG00000009999", "", "NEW2", "renamed", "symbol"),  # scater, and CELLxGENE of old, for repeats
        ("OLD1_ENSG00000000004.2", "", "THEN4", "renamed", "identifier"),
    ],
)
def test_an_identifier_goes_before_a_symbol(table, name, gene_id, gene, status, how):
    rows = [("3", "LEFT3", "ensembl"), ("3", "ENSG00000000003", "ensembl")]
    table = pd.concat([table, pd.DataFrame(rows, columns=["gene_id", "name", "how"])])
    row = resolve([name], VOCABULARY, table, gene_ids=[gene_id]).iloc[0]
    assert (row["gene"], row["status"], row["how"]) == (gene, status, how)


def test_two_names_of_one_gene_in_the_vocabulary_are_told_apart_by_the_names(table):
    found = resolve(["THEN4", "NOW4"], ["THEN4", "NOW4"], table, gene_ids=["ENSG00000000004"] * 2)
    assert found["gene"].tolist() == ["THEN4", "NOW4"]


def test_a_vocabulary_of_identifiers_is_met_from_symbols_and_from_identifiers(table):
    vocabulary = ["ENSG00000000001", "ENSG00000000004.7"]
    found = resolve(["OLD1", "NOW4", "ENSG00000000001.3", "x"], vocabulary, table)
    assert found["gene"].tolist() == [*vocabulary, vocabulary[0], None]
    offline = resolve(["a", "b"], vocabulary, genes.NO_TABLE, gene_ids=["ENSG00000000004", "ENSG00000000001.1"])
    assert offline["gene"].tolist() == vocabulary[::-1]


def test_identifiers_without_a_name_each_are_refused(table):
    with pytest.raises(ValueError, match="There are 1 gene_ids for 2 names"):
        resolve(["A", "B"], VOCABULARY, table, gene_ids=["ENSG00000000001"])


@pytest.mark.parametrize("column", ["gene_ids", "Ensembl ID", "ENSEMBL", "feature_id", "Accession"])
def test_identifiers_are_found_in_a_column_of_genes(named, column):
    ids = [f"ENSG0000000000{i}" for i in range(4)] + ["antibody", ""]
    named.var["feature_types"], named.var[column] = "Gene Expression", pd.Categorical(ids)
    names, found = find_names(named)
    assert list(names) == list(named.var_names) and list(found) == ids
    named.var[column] = "Mmus"  # a column of that name that holds no identifiers of human genes
    assert find_names(named)[1] is None


def test_the_same_cells_give_the_same_counts_by_folder_by_file_and_by_identifiers(make_cells, table):
    """A symbol of two rows: summed by readers, numbered by scanpy, repeated beside the identifiers by CELLxGENE."""
    numbered = make_cells(6, 4)
    ids = ["ENSG00000000002", "ENSG00000000001", "ENSG00000000022", "ENSG00000000003"]
    numbered.var_names, numbered.var["gene_ids"] = ["NEW2", "YOUNG", "NEW2-1", "LEFT3"], ids
    counts = numbered.X.toarray()
    due = counts[:, [0, 1, 3]] + counts[:, [2]] * [1, 0, 0]
    summed = anndata.AnnData(
        sparse.csr_matrix(due),
        var=pd.DataFrame({"gene_ids": [";".join(ids[::2]), *ids[1::2]]}, index=["NEW2", "YOUNG", "LEFT3"]),
    )
    indexed = numbered.copy()
    indexed.var_names, indexed.var["feature_name"] = ids, ["NEW2", "YOUNG", "NEW2", "LEFT3"]
    for adata, last in ((numbered, "LEFT3"), (summed, "LEFT3"), (indexed, ids[3])):
        renamed = rename_genes(adata, VOCABULARY, table)
        assert list(renamed.var_names) == ["NEW2", "NEW1", last]
        assert (renamed.X.toarray() == due).all()
        assert renamed.var["gene_ids"].tolist() == [";".join(ids[::2]), *ids[1::2]]
        assert renamed.uns["scbert"]["genes"]["identifier"] == (2 if adata is numbered else 1)
    assert rename_genes(numbered, VOCABULARY, table).var["original_name"].tolist() == ["NEW2;NEW2-1", "YOUNG", "LEFT3"]


# What tools make of names


def test_repeats_that_were_numbered_are_the_gene_unless_a_gene_is_called_so(table):
    names = ["NEW1", "NEW1-1", "NEW1.1", "NEW1-2", "LEFT3", "LEFT3.1", "NEW2", "NEW2-4", "lower5-1", "lower5"]
    found = resolve(names, VOCABULARY, table)
    assert found["gene"].tolist() == ["NEW1"] * 4 + [None, None, "NEW2", None, "lower5", "lower5"]
    assert found.loc["LEFT3.1", "status"] == "outside"
    assert found.loc["NEW2-4", "status"] == "unknown"  # no repeat can be the fourth without a third
    assert (found["how"] == "made_unique").sum() == 4
    assert resolve(["NEW1-1"], VOCABULARY, table)["status"].tolist() == ["unknown"]  # NEW1 isn't there
    called = pd.concat([table, pd.DataFrame([("NEW1-1", "3", "synonym")], columns=["name", "gene_id", "how"])])
    assert resolve(names[:2], VOCABULARY, called)["status"].tolist() == ["matched", "outside"]


@pytest.mark.parametrize(
    ("name", "made"),  # by R 4.5
    [("HLA-A", "HLA.A"), ("7SK", "X7SK"), ("__no_feature", "X__no_feature"), ("A b/c", "A.b.c"), (".1a", "X.1a"),
     ("A_1.2", "A_1.2"), ("", "X")],
)  # fmt: skip
def test_names_are_made_as_r_makes_them(name, made):
    assert make_r_name(name) == made


def test_names_that_r_changed_come_back_where_one_gene_fits(table):
    vocabulary = ["NEW-1", "7SK", "A-B", "A/B", "NEW1"]
    rows = [("NEW.1", "1", "synonym"), ("NEW.1", "2", "synonym"), ("OLD-1", "1", "synonym"), ("OUT-3", "3", "synonym")]
    table = pd.concat([table, pd.DataFrame(rows, columns=["name", "gene_id", "how"])])
    found = resolve(["NEW.1", "X7SK", "A.B", "OLD.1", "OUT.3", "NEW.1.1"], vocabulary, table)
    assert found["gene"].tolist() == ["NEW-1", "7SK", None, "NEW1", None, "NEW-1"]
    assert found["status"].tolist() == ["renamed", "renamed", "unknown", "renamed", "outside", "renamed"]
    assert found["how"].tolist() == ["r_name", "r_name", "", "r_name", "", "made_unique"]


SEPT2, MARCH1, MARC1 = ("SEPTIN2", "SEPT2"), ("MARCHF1", "MARCH1"), ("MTARC1", "MARC1")


@pytest.mark.parametrize(
    ("name", "symbols"),
    [
        *((name, [SEPT2]) for name in ("2-Sep", "02-Sep", "Sep-02", "2-Sep-21", "2.Sep", "X2.Sep", "2-SEPT")),
        *((name, [SEPT2]) for name in ("2021-09-02", "2021-09-02 00:00:00", "X2021.09.02", "2021/09/02", "44441")),
        ("1-Mar", [MARCH1, MARC1]),
        ("3-Mar", [("MARCHF3", "MARCH3")]),
        ("15-Sep", [("SELENOF", "SEP15")]),
        ("Dec-01", [("DELEC1", "DEC1")]),
        ("9/2/2021", []),  # September or February
        ("4-Oct", []),
        ("20-Mar", []),
        *((name, None) for name in ("SEPT2", "MARCH1", "Sep-60", "2021-13-05", "NOVA-1", "MAR1", "12345", "HLA-A")),
    ],
)
def test_dates_are_told_from_names_and_say_which_genes_they_were(name, symbols):
    assert read_date(name, with_numbers=True) == symbols


def test_dates_are_named_and_mapped_where_one_gene_fits(make_cells, table):
    rows = [("SEPTIN9", "9", "symbol"), ("SEPT9", "9", "synonym"), ("SEPT9", "8", "synonym")]
    table = pd.concat([table, pd.DataFrame(rows, columns=["name", "gene_id", "how"])])
    adata = make_cells(6, 6)
    adata.var_names = ["NEW1", "2-Sep", "1-Mar", "Sep-09", "3-Mar", "NEW2"]
    vocabulary = ["NEW1", "NEW2", "SEPT2", "MARCH1", "MARC1", "SEPT9"]
    with pytest.warns(
        UserWarning, match=r"4 genes have dates for names, .*\(2-Sep, 1-Mar, Sep-09, .*2 got theirs back"
    ):
        renamed = rename_genes(adata, vocabulary, table)
    assert list(renamed.var_names) == ["NEW1", "SEPT2", "1-Mar", "SEPT9", "3-Mar", "NEW2"]
    report = renamed.uns["scbert"]["genes"]
    assert (report["excel_date"], report["renamed"], report["ambiguous"], report["unknown"]) == (4, 2, 1, 1)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        *((name, "summary") for name in ("__no_feature", "__alignment_not_unique", "X__no_feature", "too_low_aQual")),
        *((name, "summary") for name in ("N_unmapped", "N-noFeature", "Unassigned_MultiMapping", "unmapped", "*")),
        *((name, "spike_in") for name in ("ERCC-00002", "ERCC.00171", "ERCC-00004__chrERCC")),
        *((name, "") for name in ("ERCC1", "ERCC6L2", "N4BP1", "NOL1", "ASSIGN", "AC004556.1", "")),
    ],
)
def test_rows_of_a_table_that_are_no_genes_are_told(name, kind):
    assert find_no_genes([name]).tolist() == [kind]


def test_rows_that_are_no_genes_are_left_out_of_genes_and_of_totals(named, table):
    counts = named.X.toarray()
    named.var_names = ["NEW1", "N_unmapped", "ERCC-00002", "NOW4", "dust", "__no_feature"]
    found = resolve(named.var_names, VOCABULARY, table)
    table_of_shares = genes.count_statuses(named, found)
    assert table_of_shares.loc["no_gene", "genes"] == 3
    for renamed in (rename_genes(named, VOCABULARY, table), tidy_names(named, VOCABULARY)):
        assert (renamed.X.toarray() == counts[:, [0, 3, 4]]).all()
        report = renamed.uns["scbert"]["genes"]
        assert (report["summary"], report["spike_in"]) == (2, 1)
    model_reads_it = tidy_names(named, [*VOCABULARY, "__no_feature"])
    assert list(model_reads_it.var_names) == ["NEW1", "NOW4", "dust", "__no_feature"]


# Offline, on every cell's way


def test_what_tools_made_of_names_is_undone_without_a_table(make_cells, monkeypatch):
    monkeypatch.setattr(genes, "fetch", lambda name: pytest.fail(f"{name} was fetched"))
    adata = make_cells(6, 6)
    adata.var_names = ["NEW1", "NEW1.1", "HLA.A", "CD3D\r", "OLD1", "__no_feature"]
    counts = adata.X.toarray()
    tidy = tidy_names(adata, ["HLA-A", "NEW1", "CD3D"])
    assert list(tidy.var_names) == ["NEW1", "HLA-A", "CD3D", "OLD1"]
    assert (tidy.X.toarray() == np.c_[counts[:, 0] + counts[:, 1], counts[:, 2:5]]).all()
    report = tidy.uns["scbert"]["genes"]
    assert (report["made_unique"], report["r_name"], report["summary"], report["share_before"]) == (1, 1, 1, 1 / 3)


def test_symbols_beside_identifiers_are_taken_without_a_table(make_cells):
    adata = make_cells(6, 3)
    adata.var_names = ["ENSG00000000001", "ENSG00000000002", "ENSG00000000022"]
    adata.var["feature_name"] = pd.Categorical(["NEW1", "NEW2", "NEW2"])
    tidy = tidy_names(adata, VOCABULARY)
    assert list(tidy.var_names) == ["NEW1", "NEW2"]
    assert tidy.var["gene_ids"].tolist() == ["ENSG00000000001", "ENSG00000000002;ENSG00000000022"]


def test_names_that_are_in_order_are_left_alone(named):
    named.layers["bins"] = named.X
    assert tidy_names(named, VOCABULARY) is named
    assert "scbert" not in named.uns


@pytest.mark.skipif(
    "SCBERT_MIRROR" not in os.environ, reason="needs NCBI's table and the published genes: SCBERT_MIRROR"
)
def test_published_genes_come_back_from_r_and_by_identifiers_that_are_younger_than_their_symbols():
    vocabulary = genes.load_vocabulary()
    found = resolve([make_r_name(name) for name in vocabulary], vocabulary)
    assert found["gene"].tolist() == vocabulary
    young = {"CFAP90": "ENSG00000215217", "CFAP107": "ENSG00000157330", "MATR3-1": "ENSG00000015479"}
    found = resolve([*young, "WBP11"], vocabulary, gene_ids=[*young.values(), "ENSG00000084463"])
    assert found["gene"].tolist() == ["C5orf49", "C1orf158", "MATR3", "WBP11"]


# Gene vectors


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


def test_of_the_published_genes_the_most_variable_are_chosen_and_no_others(make_cells, monkeypatch):
    adata = make_cells()
    monkeypatch.setattr(genes, "load_vocabulary", lambda: ["gene9", "elsewhere", "gene2", "gene5"])
    assert genes.choose_genes(adata, "published 20") == ["gene2", "gene5", "gene9"]
    own = adata[:, ["gene2", "gene5", "gene9"]].copy()
    assert genes.choose_genes(adata, "published 2") == genes.choose_genes(own, "2")


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ("many", "genes must be all, a number, a set and a number, or published, not 'many'"),
        ("0", "genes must be all, a number, a set and a number, or published, not '0'"),
        ("-3", "genes must be all, a number, a set and a number, or published, not '-3'"),
    ],
)
def test_another_choice_of_genes_is_one_sentence(make_cells, choice, message):
    with pytest.raises(ValueError, match=message):
        genes.choose_genes(make_cells(), choice)


def test_a_number_beyond_the_genes_of_the_data_is_all_of_them(make_cells):
    assert genes.choose_genes(make_cells(), "25") == list(make_cells().var_names)


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


def test_vectors_without_a_dimension_are_refused(coexpressed):
    with pytest.raises(ValueError, match="dim and n_partners must be at least 1, not 0 and 10"):
        train_gene2vec(coexpressed, dim=0)
