"""Each format that others publish in, read back to the counts that were written."""

import gzip
import tarfile
from types import SimpleNamespace

import anndata
import h5py
import numpy as np
import pandas as pd
import pytest
from scipy import sparse
from scipy.io import mmwrite

from scbert.sources.readers import read_cells
from scbert.sources.readers.matrices import recover_counts, sum_repeats
from scbert.sources.readers.r_objects import to_sparse

GENES = ["GeneA", "GeneB", "GeneC"]
CELLS = ["AAAC-1", "CCCG-1"]
COUNTS = np.array([[1, 0, 3], [0, 2, 0]], dtype=np.float32)  # (cells, genes)


def write_10x(folder):
    folder.mkdir()
    mmwrite(folder / "matrix.mtx", sparse.coo_matrix(COUNTS.T.astype(int)))
    (folder / "barcodes.tsv").write_text("\n".join(CELLS) + "\n")
    (folder / "genes.tsv").write_text("".join(f"ENSG{i}\t{name}\n" for i, name in enumerate(GENES)))


def write_10x_gzipped(folder):
    write_10x(folder)
    (folder / "genes.tsv").rename(folder / "features.tsv")
    features = (folder / "features.tsv").read_text().replace("\n", "\tGene Expression\n")
    (folder / "features.tsv").write_text(features)
    for path in list(folder.iterdir()):
        with gzip.open(f"{path}.gz", "wb") as file:
            file.write(path.read_bytes())
        path.unlink()


def write_tar(path):
    write_10x(path.parent / "hg19")
    with tarfile.open(path, "w:gz") as archive:
        archive.add(path.parent / "hg19", "filtered_matrices_mex/hg19")


def write_10x_h5(path):
    by_gene = sparse.csc_matrix(COUNTS.T.astype(np.int32))  # genes x cells
    with h5py.File(path, "w") as file:
        group = file.create_group("matrix")
        for name in ("data", "indices", "indptr"):
            group[name] = getattr(by_gene, name)
        group["shape"], group["barcodes"] = np.array(by_gene.shape), np.array(CELLS, dtype="S")
        for name, values in {"id": GENES, "name": GENES, "feature_type": ["Gene Expression"] * 3}.items():
            group[f"features/{name}"] = np.array(values, dtype="S")
        group["features/genome"] = np.array(["GRCh38"] * 3, dtype="S")


def write_table(path, sep=","):
    pd.DataFrame(COUNTS.T.astype(int), index=GENES, columns=CELLS).to_csv(path, sep=sep)


def make_adata():
    return anndata.AnnData(
        sparse.csr_matrix(COUNTS), obs=pd.DataFrame(index=CELLS), var=pd.DataFrame(index=pd.Index(GENES))
    )


def write_gzipped_h5ad(path):
    make_adata().write_h5ad(path.with_suffix(""))
    path.write_bytes(gzip.compress(path.with_suffix("").read_bytes()))


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("cells.h5ad", lambda path: make_adata().write_h5ad(path)),
        ("cells.h5ad.gz", write_gzipped_h5ad),
        ("cells.h5", write_10x_h5),
        ("folder", write_10x),
        ("gzipped", write_10x_gzipped),
        ("cells.tar.gz", write_tar),
        ("cells.csv", write_table),
        ("cells.csv.gz", write_table),
        ("cells.tsv", lambda path: write_table(path, "\t")),
    ],
)
def test_each_format_gives_the_counts_back(tmp_path, name, write):
    write(tmp_path / name)
    adata = read_cells(tmp_path / name)
    assert (sparse.csr_matrix(adata.X).toarray() == COUNTS).all()
    assert list(adata.obs_names) == CELLS
    assert list(adata.var_names) == GENES


@pytest.mark.parametrize("name", ["x.h5ad", "x.h5ad.gz", "x.h5", "x.tar.gz", "x.csv.gz", "x.rds", "x.RData"])
def test_a_damaged_file_is_one_sentence(tmp_path, name):
    (tmp_path / name).write_bytes(b"no such format" * 10)
    with pytest.raises(ValueError, match=r"cannot be read as .* \(.+\): is it another format, or damaged\?"):
        read_cells(tmp_path / name)


def test_a_folder_without_a_matrix_says_what_it_lacks(tmp_path):
    with pytest.raises(ValueError, match="it holds 0 files matrix.mtx where one is due"):
        read_cells(tmp_path)


def test_an_unknown_suffix_lists_the_formats(tmp_path):
    (tmp_path / "cells.loom").write_text("")
    with pytest.raises(ValueError, match=r"of no format that is read here: .h5ad, .h5ad.gz, 10x .h5"):
        read_cells(tmp_path / "cells.loom")


def test_counts_of_genes_of_one_name_are_summed():
    counts, genes = sum_repeats(sparse.csr_matrix(COUNTS), ["B", "A", "B"])
    assert list(genes) == ["B", "A"]
    assert (counts.toarray() == [[4, 0], [0, 2]]).all()


def make_slots(kind, matrix):
    by_column = sparse.csc_matrix(matrix)
    slots = SimpleNamespace(x=by_column.data, Dim=np.array(matrix.shape), Dimnames=[np.array(CELLS), np.array(GENES)])
    if kind == "dgTMatrix":
        by_place = by_column.tocoo()
        slots.x, slots.i, slots.j = by_place.data, by_place.row, by_place.col
    else:
        slots.i, slots.p = by_column.indices, by_column.indptr
    slots.__dict__["class"] = np.array([kind])
    return slots


@pytest.mark.parametrize("kind", ["dgCMatrix", "dgTMatrix"])
def test_the_slots_of_r_matrices_are_put_together(kind):
    matrix, rows, columns = to_sparse(make_slots(kind, COUNTS))
    assert (matrix.toarray() == COUNTS).all()
    assert (list(rows), list(columns)) == (CELLS, GENES)


def test_another_r_matrix_is_refused():
    with pytest.raises(ValueError, match="a matrix of class dsCMatrix is not read here"):
        to_sparse(make_slots("dsCMatrix", COUNTS))


@pytest.mark.parametrize("base", [np.e, 2])
def test_counts_come_back_without_totals_where_the_smallest_value_is_one_count(base):
    random = np.random.default_rng(0)
    counts = random.poisson(1, size=(30, 40))
    counts[:, 0] = 1
    values = np.log1p(counts / counts.sum(1, keepdims=True) * 10_000) / np.log(base)
    assert (recover_counts(values, None, base=base).toarray() == counts).all()


def test_an_empty_cell_stays_empty_when_counts_are_recovered_without_totals():
    values = np.log1p(np.array([[0.0, 0.0], [2.0, 4.0]]))
    assert (recover_counts(values, None).toarray() == [[0, 0], [1, 2]]).all()


def test_values_that_are_no_multiples_of_the_smallest_are_refused():
    with pytest.raises(ValueError, match="not log1p of counts per 10,000"):
        recover_counts(np.random.default_rng(0).uniform(1, 3, size=(5, 6)), None)


# Tables, and what people hand over for one


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
        (
            "g,CD3D,ACTB\nAAACATTGAGCTAC-1,1,2\nCCACATTGAGCTAC-1,0,2\n",
            "its rows are cells and its columns genes: write",
        ),
        ("g,X1,GAPDH\ncell1,1,2\n", "its rows are cells and its columns genes"),
        ("g,Length,a\nGeneA,1200,2\n", "its columns Length are no cells: drop them"),
        ("g,a,a\nGeneA,1,2\n", r"its header names a cell twice \(a\): rename one"),
        ("g,name,a\nGeneA,x,2\n", "its column name holds text where counts are due"),
        (",a,b\n0,1,2\n1,3,4\n", "its rows are numbered, where genes are named"),
        ("nothing\nhere\n", "its first line has no tab, comma, semicolon or blank"),
    ],
)
def test_a_table_that_is_no_genes_by_cells_says_what_it_is(tmp_path, text, message):
    with pytest.raises(ValueError, match=message):
        read_cells(write_text(tmp_path / "x.csv", text))


def test_the_matrix_that_is_named_is_the_one_that_is_read(tmp_path):
    write_10x(tmp_path / "folder")
    for path in list((tmp_path / "folder").iterdir()):  # as GEO has them
        path.rename(path.with_name(f"GSM1_{path.name}"))
    assert (read_cells(tmp_path / "folder").X.toarray() == COUNTS).all()
    write_10x(tmp_path / "other")
    mmwrite(tmp_path / "other" / "matrix.mtx", sparse.coo_matrix(7 * COUNTS.T.astype(int)))
    for path in (tmp_path / "other").iterdir():
        path.rename(tmp_path / "folder" / path.name)
    assert (read_cells(tmp_path / "folder" / "GSM1_matrix.mtx").X.toarray() == COUNTS).all()
    assert (read_cells(tmp_path / "folder" / "matrix.mtx").X.toarray() == 7 * COUNTS).all()
    with pytest.raises(ValueError, match="it holds 2 files matrix.mtx where one is due"):
        read_cells(tmp_path / "folder")
    (tmp_path / "folder" / "matrix.mtx").rename(tmp_path / "folder" / "counts.mtx")
    with pytest.raises(ValueError, match=r"the name of a 10x matrix ends in matrix.mtx"):
        read_cells(tmp_path / "folder" / "counts.mtx")


def test_a_matrix_without_its_names_or_with_too_few_is_refused(tmp_path):
    write_10x(tmp_path / "folder")
    (tmp_path / "folder" / "barcodes.tsv").write_text("AAAC-1\n")
    with pytest.raises(ValueError, match="1 barcodes and 3 genes for a matrix of 2 x 3"):
        read_cells(tmp_path / "folder")
    (tmp_path / "folder" / "barcodes.tsv").unlink()
    with pytest.raises(ValueError, match=r"it lacks barcodes.tsv, or genes.tsv or features.tsv, beside matrix.mtx"):
        read_cells(tmp_path / "folder")
    slots = make_slots("dgCMatrix", COUNTS)
    slots.Dimnames = [None, np.array(GENES)]
    with pytest.raises(ValueError, match="no names of rows or of columns"):
        to_sparse(slots)
