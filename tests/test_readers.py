"""Each format that others publish in, read back to the counts that were written."""

import faulthandler
import gzip
import os
import signal
import subprocess
import sys
import tarfile
import time
from types import SimpleNamespace

import anndata
import h5py
import numpy as np
import pandas as pd
import pytest
from scipy import sparse
from scipy.io import mmwrite

from scbert.data import preprocess
from scbert.sources import datasets, readers
from scbert.sources.readers import matrices, r_objects, read_cells
from scbert.sources.readers.matrices import recover_counts, sum_repeats

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


@pytest.mark.parametrize(
    "name", ["x.h5ad", "x.h5ad.gz", "x.h5", "x.loom", "x.h5mu", "x.tar.gz", "x.tar", "x.csv.gz", "x.rds", "x.RData"]
)
def test_a_damaged_file_is_one_sentence(tmp_path, name):
    (tmp_path / name).write_bytes(b"no such format" * 10)
    with pytest.raises(ValueError, match=r"cannot be read as .* \(.+\): is it another format, or damaged\?"):
        read_cells(tmp_path / name)


def test_a_folder_without_a_matrix_says_what_it_lacks(tmp_path):
    with pytest.raises(ValueError, match="it holds 0 files matrix.mtx where one is due"):
        read_cells(tmp_path)


def test_an_unknown_suffix_lists_the_formats(tmp_path):
    (tmp_path / "cells.xyz").write_text("")
    with pytest.raises(ValueError, match=r"of no format that is read here: .h5ad, .h5ad.gz, 10x .h5"):
        read_cells(tmp_path / "cells.xyz")


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("x.h5seurat", r"of SeuratDisk: in R, saveRDS\(SeuratDisk::LoadH5Seurat\('x.h5seurat'\)"),
        ("x.qs", r"of R's qs: in R, saveRDS\(qs::qread"),
        ("x.xlsx", r"a spreadsheet.*pandas.read_excel\('x.xlsx'\).to_csv"),
        ("x.parquet", r"pandas.read_parquet\('x.parquet'\).to_csv"),
        ("x.pkl", "a pickle, which can run anything"),
        ("x.cloupe", "take filtered_feature_bc_matrix.h5"),
        ("x_Expression_Data.st.gz", r"of BD Rhapsody, a row a cell and gene: take \*_MolsPerCell.csv"),
    ],
)
def test_a_format_that_is_known_and_not_read_gets_the_line_that_converts_it(tmp_path, name, line):
    (tmp_path / name).write_text("")
    with pytest.raises(ValueError, match=line) as error:
        read_cells(tmp_path / name)
    assert "damaged" not in str(error.value)


def test_counts_of_genes_of_one_name_are_summed():
    counts, genes = sum_repeats(sparse.csr_matrix(COUNTS), ["B", "A", "B"])
    assert list(genes) == ["B", "A"]
    assert (counts.toarray() == [[4, 0], [0, 2]]).all()


@pytest.mark.parametrize("dtype", [np.uint8, np.int8, np.int16, bool, np.int64, np.float32])
def test_a_sum_of_repeats_does_not_wrap(dtype):
    values = np.array([[100, 100, 1], [1, 90, 3]]).astype(dtype)
    counts, _ = sum_repeats(sparse.csr_matrix(values), ["A", "A", "B"])
    assert counts.toarray().tolist() == (values.astype(int) @ [[1, 0], [1, 0], [0, 1]]).tolist()


def test_the_identifiers_of_summed_genes_are_all_kept():
    cells = matrices.make_cells(COUNTS, CELLS, ["A", "B", "A"], gene_ids=["ENSG1", "ENSG2", "ENSG3"])
    assert cells.var["gene_ids"].to_dict() == {"A": "ENSG1;ENSG3", "B": "ENSG2"}
    assert cells.X.toarray().tolist() == [[4, 0], [0, 2]]
    same = matrices.make_cells(COUNTS, CELLS, ["A", "B", "A"], gene_ids=["ENSG1", "ENSG2", "ENSG1"])
    assert same.var["gene_ids"].to_list() == ["ENSG1", "ENSG2"]


def test_one_genome_is_taken_off_the_genes_and_two_are_refused():
    cells = matrices.make_cells(COUNTS, CELLS, ["GRCh38_A", "GRCh38_B", "GRCh38_C"], gene_ids=["GRCh38_E1", "E2", "E3"])
    assert (list(cells.var_names), list(cells.var["gene_ids"])) == (["A", "B", "C"], ["E1", "E2", "E3"])
    for genes in (
        ["GRCh38_A", "mm10___a", "mm10___b"],
        ["HUMAN_A", "MOUSE_A", "MOUSE_B"],
        ["hg19-A", "mm10-a", "mm10-b"],
    ):
        with pytest.raises(
            ValueError, match="its genes are of several genomes, .* and .*: keep the cells and genes of one"
        ):
            matrices.make_cells(COUNTS, CELLS, genes)


def write_values(path, values, **more):
    anndata.AnnData(values, obs=pd.DataFrame(index=CELLS), var=pd.DataFrame(index=GENES), **more).write_h5ad(path)
    return path


@pytest.mark.parametrize("form", [np.asarray, sparse.csr_matrix, sparse.csc_matrix])
@pytest.mark.parametrize("error", [1 + 3e-7, 1 - 9e-4 / 3])
def test_counts_within_rounding_of_whole_numbers_are_made_whole_and_that_is_said(tmp_path, capsys, form, error):
    adata = read_cells(write_values(tmp_path / "x.h5ad", form(COUNTS.astype(np.float64) * error)))
    assert (sparse.csr_matrix(adata.X).toarray() == COUNTS).all()
    said = capsys.readouterr().out
    assert said.startswith("x.h5ad: 3 of 3 counts were off a whole number by rounding, such as ")
    assert float(said.split("such as ")[1].split(":")[0]) not in (1, 2, 3)


def test_large_counts_may_be_off_by_a_millionth(tmp_path):
    values = np.array([[1, 0, 20_000], [0, 2, 300_000]])
    adata = read_cells(write_values(tmp_path / "x.h5ad", values * (1 + 5e-7)))
    assert (values == adata.X).all()


def test_larger_fractions_are_rounded_on_request_only(tmp_path, capsys):
    path = write_values(tmp_path / "x.h5ad", COUNTS * np.float32(1.0019583))
    assert not (read_cells(path).X == COUNTS).all()
    with pytest.raises(
        ValueError, match=r"such as 3.0058746 .*rounded by round_counts=True \(scbert annotate --round-counts"
    ):
        datasets.load(path)
    with pytest.raises(ValueError, match="which backed=True leaves on disk: load it into memory"):
        datasets.load(path, backed=True, round_counts=True)
    assert (datasets.load(path, round_counts=True).X == COUNTS).all()
    assert "x.h5ad: 3 of 3 counts had fractions, such as 3.0058746" in capsys.readouterr().out


def test_counts_that_say_why_they_are_fractional_stay_so_unless_they_are_to_be_rounded(tmp_path):
    uns = {"scbert": {"fractional_counts": "estimated"}}
    values = COUNTS + np.float32(1e-4)
    path = write_values(tmp_path / "x.h5ad", values, uns=uns)
    assert (values == read_cells(path).X).all()
    assert (read_cells(path, round_counts=True).X == COUNTS).all()


@pytest.mark.parametrize("values", [COUNTS + [[-0.4, 0, 0.5], [0, 0.3, 0]], COUNTS * [[np.nan], [1.5]]])
def test_values_that_are_no_counts_are_not_made_such(tmp_path, values):
    with pytest.raises(ValueError, match="negative|NaN"):
        datasets.load(write_values(tmp_path / "x.h5ad", values - 1), round_counts=True)


@pytest.mark.parametrize("log", [False, True])
def test_normalised_values_are_not_rounded(tmp_path, log):
    values = COUNTS / COUNTS.sum(1, keepdims=True) * 1e4 / 3
    with pytest.raises(
        ValueError, match=r"its values are .*normalised.* \(every cell sums to 3333.33\): rounding makes no"
    ):
        read_cells(write_values(tmp_path / "x.h5ad", np.log1p(values) if log else values), round_counts=True)


def make_slots(kind, matrix):
    by_column = sparse.csc_matrix(matrix)
    slots = SimpleNamespace(x=by_column.data, Dim=np.array(matrix.shape))
    if kind == "dgTMatrix":
        by_place = by_column.tocoo()
        slots.x, slots.i, slots.j = by_place.data, by_place.row, by_place.col
    else:
        slots.i, slots.p = by_column.indices, by_column.indptr
    slots.__dict__["class"] = np.array([kind])
    return slots


@pytest.mark.parametrize("kind", ["dgCMatrix", "dgTMatrix"])
def test_the_slots_of_r_matrices_are_put_together(kind):
    assert (r_objects._fill(make_slots(kind, COUNTS)).toarray() == COUNTS).all()


def test_another_r_matrix_is_refused():
    with pytest.raises(ValueError, match="a matrix of class dsCMatrix is not read here"):
        r_objects._fill(make_slots("dsCMatrix", COUNTS))


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


def flip(path, start, n=10):
    """Overwrite some bytes with zeros."""
    damaged = bytearray(path.read_bytes())
    damaged[start : start + n] = bytes(n)
    path.write_bytes(damaged)


def test_damage_within_a_file_is_one_sentence_too(tmp_path):
    random = np.random.default_rng(0)
    table = pd.DataFrame(random.poisson(1, (200, 20)), index=[f"G{i}" for i in range(200)])
    table.to_csv(tmp_path / "x.tsv.gz", sep="\t")
    write_gzipped_h5ad(tmp_path / "x.h5ad.gz")
    for name, start in (("x.tsv.gz", 100), ("x.h5ad.gz", 300)):
        flip(tmp_path / name, start)
        with pytest.raises(ValueError, match="is it another format, or damaged"):
            read_cells(tmp_path / name)


@pytest.mark.parametrize("name", ["x.tar.gz", "x.csv.gz", "x.h5ad.gz"])
def test_the_checksum_of_what_is_gzipped_is_compared(tmp_path, name):
    {"x.tar.gz": write_tar, "x.csv.gz": write_table, "x.h5ad.gz": write_gzipped_h5ad}[name](tmp_path / name)
    read_cells(tmp_path / name)
    flip(tmp_path / name, (tmp_path / name).stat().st_size - 8, 4)
    with pytest.raises(ValueError, match="CRC check failed .*damaged"):
        read_cells(tmp_path / name)


def test_a_file_that_another_program_holds_open_says_so(tmp_path):
    make_adata().write_h5ad(tmp_path / "x.h5ad")
    code = (
        f"import h5py, time; file = h5py.File({str(tmp_path / 'x.h5ad')!r}, 'r+'); print(1, flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as other:
        try:
            other.stdout.readline()
            with pytest.raises(ValueError, match="x.h5ad is held open by another program: close it there"):
                read_cells(tmp_path / "x.h5ad")
        finally:
            other.kill()


def test_a_part_of_an_h5ad_that_anndata_cannot_read_is_left_out(tmp_path, capsys):
    make_adata().write_h5ad(tmp_path / "x.h5ad")
    with h5py.File(tmp_path / "x.h5ad", "r+") as file:
        file["obsm"].create_dataset(
            "X_pca/harmony", data=np.ones((2, 2))
        )  # as older versions wrote a name with a slash
        file["obsm/X_umap"] = np.zeros((2, 2))
        file["obsm/X_umap"].attrs.update({"encoding-type": "array", "encoding-version": "0.2.0"})
        file["uns/new"] = 1
        file["uns/new"].attrs.update({"encoding-type": "of another year", "encoding-version": "9.0"})
    adata = read_cells(tmp_path / "x.h5ad")
    assert (adata.X.toarray() == COUNTS).all()
    assert (list(adata.obs_names), list(adata.var_names), list(adata.obsm)) == (CELLS, GENES, ["X_umap"])
    assert "x.h5ad: anndata can't read obsm['X_pca'], uns['new']: left out" in capsys.readouterr().out


def test_antibodies_of_an_h5ad_are_no_genes(tmp_path, capsys):
    adata = make_adata()
    adata.var["feature_types"] = ["Gene Expression", "Antibody Capture", "Gene Expression"]
    adata.write_h5ad(tmp_path / "x.h5ad")
    assert list(read_cells(tmp_path / "x.h5ad").var_names) == ["GeneA", "GeneC"]
    assert "1 features that are no genes (Antibody Capture) are left out" in capsys.readouterr().out
    adata.var["feature_types"] = "Antibody Capture"
    adata.write_h5ad(tmp_path / "x.h5ad")
    with pytest.raises(ValueError, match="its features are Antibody Capture, and none is Gene Expression"):
        read_cells(tmp_path / "x.h5ad")


def test_an_address_is_no_path():
    with pytest.raises(ValueError, match="cells.h5ad is an address: download the file"):
        datasets.load("https://example.org/cells.h5ad")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (None, "has no X: put the raw counts there"),
        (COUNTS - 1.5, "holds negative values .*needs raw counts"),
        (np.log1p(COUNTS), r"fractional values such as 1.3862944 .*: put the raw counts into X"),
    ],
)
def test_what_is_no_counts_says_which_layer_may_hold_them(tmp_path, values, message):
    layers = {"counts": COUNTS, "scaled": COUNTS - 2}
    with pytest.raises(ValueError, match=rf"{message}; layers\['counts'\] may hold them\."):
        datasets.load(write_values(tmp_path / "x.h5ad", values, layers=layers))


def test_half_precision_is_read(tmp_path):
    adata = datasets.load(write_values(tmp_path / "x.h5ad", COUNTS.astype(np.float16)))
    assert preprocess.tokenize(adata).layers["bins"].shape == COUNTS.shape


@pytest.mark.skipif(sys.platform != "linux", reason="a process is doubled on Linux only")
@pytest.mark.parametrize(
    ("do", "message"),
    [
        (
            lambda: (faulthandler.disable(), os.kill(os.getpid(), signal.SIGSEGV)),
            r"not read: reading it ends the program \(SIGSEGV\), most likely since it is d",
        ),
        (
            lambda: os.kill(os.getpid(), signal.SIGKILL),
            r"not read: reading it ends the program \(SIGKILL\), most likely for want of m",
        ),
        (
            lambda: time.sleep(60),
            "not read: the library that reads it did not end within 1 seconds: it is damaged, most likely",
        ),
    ],
)
def test_a_file_that_ends_or_holds_up_the_program_is_refused_in_a_sentence(
    make_cells, tmp_path, monkeypatch, do, message
):
    make_cells().write_h5ad(tmp_path / "a.h5ad")
    here = os.getpid()
    monkeypatch.setattr(readers, "SECONDS", 1)
    monkeypatch.setattr(readers, "_read_hdf5", lambda *_: do() if os.getpid() != here else pytest.fail("read here too"))
    with pytest.raises(ValueError, match=message):
        readers.read_cells(tmp_path / "a.h5ad")
