"""Each set's reader, on files of the form that its authors published."""

import gzip
import tarfile

import anndata
import numpy as np
import pandas as pd
import pytest
from scipy import sparse
from scipy.io import mmwrite

from scbert import sets

GENES = ["GeneA", "GeneB", "GeneC"]
CELLS = ["AAAC-1", "CCCG-1"]
COUNTS = np.array([[1, 0, 3], [0, 2, 0]], dtype=np.float32)  # (cells, genes)


def write_tar(path):
    folder = path.parent / "hg19"
    folder.mkdir()
    mmwrite(folder / "matrix.mtx", sparse.coo_matrix(COUNTS.T.astype(int)))
    (folder / "barcodes.tsv").write_text("\n".join(CELLS) + "\n")
    (folder / "genes.tsv").write_text("".join(f"ENSG{i}\t{name}\n" for i, name in enumerate(GENES)))
    with tarfile.open(path, "w:gz") as archive:
        archive.add(folder, "filtered_matrices_mex/hg19")


def write_table(path):
    pd.DataFrame(COUNTS.T.astype(int), index=GENES, columns=CELLS).to_csv(path)


def test_ones_own_download_is_a_matrix_and_a_table_of_cells(tmp_path):
    write_table(tmp_path / "matrix.csv")
    pd.DataFrame({"cell": CELLS[::-1], "cell_type": ["T", "B"]}).to_csv(tmp_path / "cells.csv", index=False)
    adata = sets.read_by_hand([tmp_path / "matrix.csv", tmp_path / "cells.csv"])
    assert adata.obs["label"].tolist() == ["B", "T"]
    assert (adata.X.toarray() == COUNTS).all()


def test_a_table_without_labels_or_with_other_cells_is_refused(tmp_path):
    write_table(tmp_path / "matrix.csv")
    paths = [tmp_path / "matrix.csv", tmp_path / "cells.csv"]
    pd.DataFrame({"cell": CELLS, "colour": ["red", "blue"]}).to_csv(paths[1], index=False)
    with pytest.raises(ValueError, match="has no column cell_type; it has: cell, colour"):
        sets.read_by_hand(paths)
    pd.DataFrame({"cell": ["x", "y"], "cell_type": ["T", "B"]}).to_csv(paths[1], index=False)
    with pytest.raises(ValueError, match="has no label for 2 of the 2 cells"):
        sets.read_by_hand(paths)


def test_the_published_files_of_zheng68k_are_put_together_by_barcode(tmp_path):
    write_tar(tmp_path / "counts.tar.gz")
    rows = pd.DataFrame({"barcodes": CELLS[::-1], "TSNE.1": 0, "TSNE.2": 0, "celltype": ["CD19+ B", "Dendritic"]})
    rows.to_csv(tmp_path / "labels.tsv", sep="\t", index=False)
    adata = sets.read_zheng68k([tmp_path / "counts.tar.gz", tmp_path / "labels.tsv"])
    assert adata.obs["label"].tolist() == ["Dendritic", "CD19+ B"]


def test_the_authors_file_gives_its_counts_back(tmp_path):
    counts = np.random.default_rng(0).poisson(2, size=(20, 30))
    counts[:, 0] = 1
    values = np.log2(1 + counts / counts.sum(1, keepdims=True) * 10_000).astype(np.float32)
    adata = anndata.AnnData(sparse.csr_matrix(values), obs=pd.DataFrame({"celltype": "B"}, index=map(str, range(20))))
    adata.write_h5ad(tmp_path / "plain.h5ad")
    (tmp_path / "authors.h5ad.gz").write_bytes(gzip.compress((tmp_path / "plain.h5ad").read_bytes()))
    back = sets.read_published_h5ad([tmp_path / "authors.h5ad.gz"])
    assert (back.X.toarray() == counts).all()
    assert set(back.obs["label"]) == {"B"}


def test_the_papers_studies_and_types_are_taken_from_the_scib_file(tmp_path):
    obs = pd.DataFrame(
        {"tech": ["inDrop1", "celseq2", "smarter", "celseq", "smartseq2"],
         "celltype": ["alpha", "beta", "gamma", "alpha", "acinar"]},
        index=list("abcde"),
    )  # fmt: skip
    adata = anndata.AnnData(sparse.csr_matrix(np.ones((5, 3), np.float32)), obs=obs)
    adata.layers["counts"] = sparse.csr_matrix(np.arange(15, dtype=np.float32).reshape(5, 3))
    adata.write_h5ad(tmp_path / "24539828")
    adata = sets.read_pancreas_scib([tmp_path / "24539828"])
    assert adata.obs["batch"].tolist() == ["Baron", "Muraro", "Xin"]
    assert adata.obs["label"].tolist() == ["alpha", "beta", "gamma"]
    assert (adata.X.toarray()[:, 0] == [0, 3, 6]).all()
