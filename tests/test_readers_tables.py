"""Tables of counts: what stands between the names, which side the cells are on, and what pipelines add."""

import numpy as np
import pytest

from scbert.sources.readers import read_cells
from scbert.sources.readers.names import rows_are_cells

GENES = ["GeneA", "GeneB", "GeneC"]
CELLS = ["AAAC-1", "CCCG-1"]
COUNTS = np.array([[1, 0, 3], [0, 2, 0]], dtype=np.float32)  # (cells, genes)


def write_text(path, text):
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    "text",
    ["g,AAAC-1,CCCG-1\nGeneA,1,0\nGeneB,0,2\nGeneC,3,0\n", "g;AAAC-1;CCCG-1\nGeneA;1;0\nGeneB;0;2\nGeneC;3;0\n",
     "AAAC-1\tCCCG-1\nGeneA\t1\t0\nGeneB\t0\t2\nGeneC\t3\t0\n", "g AAAC-1 CCCG-1\nGeneA 1 0\nGeneB 0 2\nGeneC 3 0\n"],
    ids=["commas", "semicolons", "tabs, no corner", "blanks"],
)  # fmt: skip
def test_a_table_is_read_by_the_separator_of_its_first_line(tmp_path, text):
    adata = read_cells(write_text(tmp_path / "x.txt", text))
    assert (adata.X.toarray() == COUNTS).all()
    assert list(adata.obs_names) == CELLS
    assert list(adata.var_names) == GENES


def test_a_gene_called_na_is_a_gene(tmp_path):
    assert list(read_cells(write_text(tmp_path / "x.csv", "g,a,b\nNA,1,2\nGeneB,0,2\n")).var_names) == ["NA", "GeneB"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("g,Length,a\nGeneA,1200,2\n", "its columns Length are no cells: drop them"),
        ("g,a,a\nGeneA,1,2\n", r"its header names a cell twice \(a\): rename one"),
        ("g,name,a\nGeneA,x,2\n", "its column name holds text where counts are due"),
        (",a,b\n0,1,2\n1,3,4\n", "its rows are numbered, where genes are named"),
        ("nothing\nhere\n", "its first line has no tab, comma, semicolon or blank"),
        ("g,a,b\n", "it has no row under its header"),
        ("g,a\nGeneA,1,2,3\n", "its header names 2 columns, and its first row has 3"),
        ("", "its first line has no tab"),
    ],
)
def test_a_table_that_is_no_genes_by_cells_says_what_it_is(tmp_path, text, message):
    with pytest.raises(ValueError, match=message):
        read_cells(write_text(tmp_path / "x.csv", text))


ACCESSIONS = [f"SRR10000{i}" for i in range(8)]
WELLS = [f"{i:02d}_{i + 10}_{i + 20}" for i in range(8)]
OF_A_PLATE = [f"plate1_{row}{column}" for row in "AB" for column in range(1, 5)]
NAMED = [f"F1S4_1601{i:02d}_001" for i in range(8)]
BLOOD, BRAIN = ["CD3D", "MS4A1", "LYZ", "NKG7", "GNLY"], ["Slc17a7", "Gad1", "Snap25", "Aqp4", "Mog"]
MOUSE = [f"ENSMUSG{i:011d}" for i in range(5)]
UNKNOWN = ["Zic", "Bora", "Elp", "Wiz", "Nop"]


@pytest.mark.parametrize(
    "cells", [ACCESSIONS, WELLS, OF_A_PLATE, NAMED, [f"cell_{i}" for i in range(8)], list("abcdefgh")]
)
@pytest.mark.parametrize("genes", [BLOOD, BRAIN, MOUSE])
def test_the_known_genes_of_a_table_say_which_way_round_it_is(tmp_path, capsys, cells, genes):
    counts = np.arange(len(cells) * len(genes)).reshape(len(cells), -1) % 7
    for rows, columns, values in ((cells, genes, counts), (genes, cells, counts.T)):
        lines = [",".join(["", *columns]), *(",".join([r, *map(str, v)]) for r, v in zip(rows, values, strict=True))]
        adata = read_cells(write_text(tmp_path / "x.csv", "\n".join(lines) + "\n"))
        assert (adata.X.toarray() == counts).all()
        assert (list(adata.obs_names), list(adata.var_names)) == (cells, genes)
        assert ("x.csv: its rows are cells and its columns genes" in capsys.readouterr().out) == (rows is cells)


@pytest.mark.parametrize("cells", [ACCESSIONS, WELLS, OF_A_PLATE, ["ACGTACGTACGT", "TTGTACGTACGT", "CCGTACGTACGT"]])
def test_without_known_genes_the_names_of_cells_say_it(cells):
    assert rows_are_cells(cells, UNKNOWN) is True
    assert rows_are_cells(UNKNOWN, cells) is False


def test_without_either_the_corner_says_it_and_without_that_a_table_that_seems_turned_is_refused(tmp_path):
    text = ",".join(["", *UNKNOWN]) + "\n" + "".join(f"{name},1,2,0,4,5\n" for name in NAMED)
    with pytest.raises(
        ValueError, match=r"\(F1S4_160100_001, .*\) look like cells and its columns \(Zic, .*\) like genes"
    ):
        read_cells(write_text(tmp_path / "x.csv", text))
    assert list(read_cells(write_text(tmp_path / "x.csv", "cell" + text)).obs_names) == NAMED
    assert list(read_cells(write_text(tmp_path / "x.csv", "gene" + text)).obs_names) == UNKNOWN


@pytest.mark.parametrize("rows", [GENES, ["G1", "G2", "G3", "G4", "G5", "G6"], [f"AT1G0{i}010" for i in range(1, 9)]])
def test_genes_are_in_rows_where_nothing_is_known(rows):
    assert rows_are_cells(rows, ["a", "b"]) is False
    assert rows_are_cells(rows, [f"c{i}" for i in range(9)]) is False


def test_names_that_are_genes_on_both_sides_turn_nothing():
    assert rows_are_cells(["CD3D", "IL2", "Xyz", "Abc"] * 5, ["IFN1", "IFN2", "TNF1", "ctrl"]) is False


def test_cells_in_rows_may_be_numbered_and_repeat_a_gene(tmp_path):
    adata = read_cells(write_text(tmp_path / "x.csv", ",CD3D,LYZ,CD3D\n0,1,2,3\n1,4,5,6\n"))
    assert (adata.X.toarray() == [[4, 2], [10, 5]]).all()
    assert (list(adata.obs_names), list(adata.var_names)) == (["0", "1"], ["CD3D", "LYZ"])


def test_a_table_of_featurecounts_is_read_without_its_annotation(tmp_path):
    adata = read_cells(
        write_text(
            tmp_path / "x.txt",
            '# Program:featureCounts v2.0.6; Command:"featureCounts" "-a" "genes.gtf" "a.bam" "b.bam"\n'
            "Geneid\tChr\tStart\tEnd\tStrand\tLength\ta.bam\tb.bam\n"
            "GeneA\tchr1;chr1\t1;5\t2;9\t-;-\t771\t1\t0\nGeneB\tchr2\t1\t2\t+\t30\t0\t2\nGeneC\tchrX\t1\t2\t+\t30\t3\t0\n",
        )
    )
    assert (adata.X.toarray() == COUNTS).all()
    assert (list(adata.obs_names), list(adata.var_names)) == (["a.bam", "b.bam"], GENES)


@pytest.mark.parametrize("before", ["", "# a comment\n", "#### two, of\n\n#### them\n", "\ufeff"])
@pytest.mark.parametrize("corner", ["g", "#g"])
def test_comments_before_a_table_are_passed_over_and_a_header_that_looks_like_one_is_not(tmp_path, before, corner):
    text = before + corner + ",AAAC-1,CCCG-1\nGeneA,1,0\nGeneB,0,2\nGeneC,3,0\n"
    path = tmp_path / "x.csv"
    path.write_text(text, encoding="utf-8")
    adata = read_cells(path)
    assert (adata.X.toarray() == COUNTS).all()
    assert (list(adata.obs_names), list(adata.var_names)) == (CELLS, GENES)


def test_a_table_of_rhapsody_has_cells_in_rows_and_antibodies_that_are_no_genes(tmp_path, capsys):
    text = (
        "####################\n## BD Rhapsody Analysis Pipeline Version 1.11\n####################\n"
        "Cell_Index,CD3:UCHT1|CD3E|AHS0231|pAbO,GeneA|NM_1.4|Reference_end,GeneB,GeneC\n1013,50,1,0,3\n2077,60,0,2,0\n"
    )
    adata = read_cells(write_text(tmp_path / "x_RSEC_MolsPerCell.csv", text))
    assert (adata.X.toarray() == COUNTS).all()
    assert (list(adata.obs_names), list(adata.var_names)) == (["1013", "2077"], GENES)
    assert "1 antibodies (pAbO) are no genes" in capsys.readouterr().out


def test_the_rows_that_count_what_was_not_counted_are_no_genes(tmp_path, capsys):
    text = "g,AAAC-1,CCCG-1\nN_unmapped,9,9\nGeneA,1,0\nGeneB,0,2\nGeneC,3,0\n__no_feature,70,80\n"
    adata = read_cells(write_text(tmp_path / "x.csv", text))
    assert (adata.X.toarray() == COUNTS).all()
    assert list(adata.var_names) == GENES
    assert "N_unmapped, __no_feature are no genes, and are left out" in capsys.readouterr().out
