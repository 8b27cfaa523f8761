"""R's objects, each written as R serialises it, and read back to its counts."""

import anndata
import numpy as np
import pytest
from r_files import S4, R, frame, sparse_matrix, write_rda, write_rds

from scbert.sources.readers import read_cells

GENES = ["CD3D", "MS4A1", "LYZ"]
CELLS = ["AAACCTGAACGTACGT-1", "AAACCTGCACGTACGT-1", "AAACCTGGACGTACGT-1", "AAACCTGTACGTACGT-1"]
COUNTS = np.array([[1, 0, 2], [0, 3, 1], [4, 0, 0], [0, 1, 5]])  # (cells, genes)
MATRIX = sparse_matrix(COUNTS.T, GENES, CELLS)
TYPES = ["T", "B", "T", "B"]
PROJECT = R([1, 1, 1, 1], "INT", levels=["SeuratProject"], **{"class": ["factor"]})
META = frame({"orig.ident": PROJECT, "nCount_RNA": [3.0, 4.0, 4.0, 6.0], "cell_type": TYPES}, CELLS)
FUNCTION, NOTHING = R(None, "function"), R("\1NULL\1", "symbol")


def dense_matrix(matrix, rows, columns, kind="INT"):
    return R(np.asarray(matrix), kind, dim=R(list(np.shape(matrix)), "INT"), dimnames=[rows, columns])


def check(path, genes=tuple(GENES), counts=COUNTS):
    adata = read_cells(path)
    assert adata.to_df().to_numpy().tolist() == np.asarray(counts).tolist()
    assert (list(adata.obs_names), list(adata.var_names)) == (CELLS, list(genes))
    adata.write_h5ad(path.with_suffix(".h5ad"))  # nothing in it that can't be kept
    assert list(anndata.read_h5ad(path.with_suffix(".h5ad")).obs) == list(adata.obs)
    return adata


# Matrices


@pytest.mark.parametrize("kind", ["dgCMatrix", "dgRMatrix", "dgTMatrix", "lgCMatrix", "lgTMatrix", "ngCMatrix"])
def test_sparse_matrices_of_each_class_are_read(tmp_path, kind):
    write_rds(tmp_path / "x.rds", sparse_matrix(COUNTS.T, GENES, CELLS, kind))
    check(tmp_path / "x.rds", counts=COUNTS if kind[0] == "d" else COUNTS > 0)


def test_a_dense_matrix_of_the_package_matrix_is_read(tmp_path):
    slots = {"Dim": R([3, 4], "INT"), "Dimnames": [GENES, CELLS], "x": COUNTS.T.ravel(order="F").astype(float)}
    write_rds(tmp_path / "x.rds", S4("dgeMatrix", **slots))
    check(tmp_path / "x.rds")


@pytest.mark.parametrize("kind", ["INT", "REAL"])
def test_a_dense_matrix_is_read(tmp_path, kind):
    write_rds(tmp_path / "x.rds", dense_matrix(COUNTS.T.astype(int if kind == "INT" else float), GENES, CELLS, None))
    check(tmp_path / "x.rds")


def test_a_matrix_with_cells_in_rows_is_turned_and_that_is_said(tmp_path, capsys):
    write_rds(tmp_path / "x.rds", sparse_matrix(COUNTS, CELLS, GENES))
    check(tmp_path / "x.rds")
    assert "x.rds: its rows are cells and its columns genes" in capsys.readouterr().out


def test_a_data_frame_is_read_with_its_names_in_the_rows_or_in_the_one_column_of_text(tmp_path):
    columns = {cell: [int(n) for n in counts] for cell, counts in zip(CELLS, COUNTS, strict=True)}
    write_rds(tmp_path / "x.rds", frame(columns, GENES))
    check(tmp_path / "x.rds")
    write_rds(tmp_path / "x.rds", frame({"gene": GENES} | columns, ["1", "2", "3"]))
    check(tmp_path / "x.rds")
    write_rds(tmp_path / "x.rds", frame({"gene": GENES, "kind": GENES} | columns, ["1", "2", "3"]))
    with pytest.raises(ValueError, match="the columns gene, kind of its data frame hold text where counts are due"):
        read_cells(tmp_path / "x.rds")


# Workspaces and lists


@pytest.mark.parametrize(
    "beside", [{"qc": FUNCTION}, {"qc": FUNCTION, "n": 7.0, "umap": dense_matrix([[1.0]], ["a"], ["b"])}]
)
def test_what_stands_beside_a_matrix_in_a_workspace_is_passed_over(tmp_path, beside):
    write_rda(tmp_path / "x.RData", beside | {"expression": MATRIX})
    check(tmp_path / "x.RData")


def test_of_several_matrices_the_one_called_counts_is_read(tmp_path, capsys):
    values = sparse_matrix(np.log1p(COUNTS.T), GENES, CELLS)
    write_rda(tmp_path / "x.rda", {"logcounts": values, "counts": MATRIX})
    check(tmp_path / "x.rda")
    assert "x.rda: counts is read, of 2 objects that hold numbers" in capsys.readouterr().out
    write_rds(tmp_path / "x.rds", {"Antibody Capture": values, "Gene Expression": MATRIX})
    check(tmp_path / "x.rds")
    assert "x.rds: x$Gene Expression is read" in capsys.readouterr().out
    write_rds(tmp_path / "x.rds", R({"counts": dense_matrix(COUNTS.T, GENES, CELLS), "samples": META}, names=["counts", "samples"], **{"class": ["DGEList"]}))  # fmt: skip
    check(tmp_path / "x.rds")
    write_rds(tmp_path / "x.rds", {"a": values, "b": {"c": MATRIX}})
    with pytest.raises(
        ValueError, match=r'it may be x\$a or x\$b\$c that holds the counts: in R, saveRDS\(x\$a, "counts.rds"'
    ):
        read_cells(tmp_path / "x.rds")


@pytest.mark.parametrize(
    ("value", "classes"),
    [
        (FUNCTION, "function"),
        ({"a": 1.0, "b": ["text"]}, "list"),
        (S4("ExpressionSet", assayData=R({}, "environment")), "ExpressionSet"),
    ],
)
def test_what_holds_no_counts_is_called_by_its_class(tmp_path, value, classes):
    write_rds(tmp_path / "x.rds", value)
    with pytest.raises(
        ValueError, match=rf"no counts of a form that is read, but {classes}: in R, make them a matrix .* saveRDS"
    ):
        read_cells(tmp_path / "x.rds")


# Seurat


def assay(matrix=MATRIX, name="Assay", **more):
    return S4(name, counts=matrix, data=matrix, key=["rna_"], **more)


def assay5(layers, features=None, cells=None):
    """Layers: name -> (matrix without names, the genes and the cells of it)."""
    masks = {}
    for axis, (every, which) in {"features": (features or GENES, 1), "cells": (cells or CELLS, 2)}.items():
        of_layers = [np.isin(every, layer[which]) for layer in layers.values()]
        masks[axis] = R(np.array(of_layers).T, dim=R([len(every), len(layers)], "INT"), dimnames=[every, list(layers)], **{"class": ["LogMap"]})  # fmt: skip
    bare = {layer: sparse_matrix(part[0], None, None) for layer, part in layers.items()}
    return S4("Assay5", layers=bare, **masks, key=["rna_"])


def seurat(assays, active, meta=META):
    commands = {"NormalizeData": S4("SeuratCommand", call__string=["NormalizeData(x)"], params={"f": FUNCTION})}
    return S4("Seurat", assays=assays, meta__data=meta, active__assay=[active], commands=commands)


ADT = sparse_matrix([[30, 2, 35, 1], [1, 40, 3, 50]], ["CD3", "CD19"], CELLS)


def test_a_seurat_object_of_version_3_is_read_with_its_cells(tmp_path, capsys):
    features = frame(
        {"vst.mean": [1.0, 2.0, 3.0], "id": ["ENSG00000167286", "ENSG00000156738", "ENSG00000090382"]}, GENES
    )
    write_rds(tmp_path / "x.rds", seurat({"RNA": assay(meta__features=features)}, "RNA"))
    adata = check(tmp_path / "x.rds")
    assert list(adata.obs["cell_type"]) == TYPES
    assert list(adata.var["gene_ids"]) == ["ENSG00000167286", "ENSG00000156738", "ENSG00000090382"]
    assert not capsys.readouterr().out


def test_columns_of_cells_that_h5ad_cannot_hold_are_left_out(tmp_path):
    missing = -(2**31)
    columns = {
        "factor": R([1, 2, missing, 1], "INT", levels=["x", "y"], **{"class": ["factor"]}),
        "a/b": R([1, missing, 3, 4], "INT"),
        "time": R([1.0, 2.0, 3.0, 4.0], **{"class": ["POSIXct", "POSIXt"]}),
        "list": [[1.0], [2.0], None, ["a"]],
        "function": FUNCTION,
    }
    write_rds(tmp_path / "x.rds", seurat({"RNA": assay()}, "RNA", frame(columns, CELLS)))
    obs = check(tmp_path / "x.rds").obs
    assert list(obs) == ["factor", "a|b", "time"]
    assert obs["factor"].isna().tolist() == [False, False, True, False]
    assert obs["a|b"].isna().tolist() == [False, True, False, False]


@pytest.mark.parametrize("active", ["RNA", "ADT", "SCT", "integrated"])
def test_the_assay_of_rna_is_read_and_not_the_first_nor_one_made_from_it(tmp_path, capsys, active):
    corrected = sparse_matrix(COUNTS.T + 1, GENES, CELLS)
    empty = assay(dense_matrix(np.zeros((0, 0)), [], []))
    assays = {"ADT": assay(ADT), "SCT": assay(corrected, "SCTAssay"), "RNA": assay(), "integrated": empty}
    write_rds(tmp_path / "x.rds", seurat(assays, active))
    check(tmp_path / "x.rds")
    assert "x.rds: the assay RNA is read, of ADT, SCT, RNA, integrated." in capsys.readouterr().out


def test_an_active_assay_of_another_name_is_read(tmp_path):
    assays = {"RNA": assay(sparse_matrix(COUNTS.T * 0 + 1, GENES, CELLS)), "Spatial": assay()}
    write_rds(tmp_path / "x.rds", seurat(assays, "Spatial"))
    check(tmp_path / "x.rds")


def test_antibodies_alone_are_refused(tmp_path):
    write_rds(tmp_path / "x.rds", seurat({"ADT": assay(ADT), "HTO": assay(ADT)}, "ADT"))
    with pytest.raises(ValueError, match=r"its assays \(ADT, HTO\) hold no counts of RNA: in R, add them"):
        read_cells(tmp_path / "x.rds")


def test_a_seurat_object_of_version_5_is_read(tmp_path):
    layers = {"counts": (COUNTS.T, GENES, CELLS), "data": (np.log1p(COUNTS.T), GENES, CELLS)}
    write_rds(tmp_path / "x.rds", seurat({"RNA": assay5(layers)}, "RNA"))
    assert list(check(tmp_path / "x.rds").obs["cell_type"]) == TYPES


def test_the_layers_of_version_5_are_put_together_in_the_order_of_the_object(tmp_path):
    first, second = [0, 2], [1, 3]  # cells of two donors by turns; the second has no LYZ
    counts = COUNTS.copy()
    counts[second, 2] = 0
    layers = {
        "counts.d1": (counts[first].T, GENES, [CELLS[i] for i in first]),
        "counts.d2": (counts[second][:, :2].T, GENES[:2], [CELLS[i] for i in second]),
        "scale.data": (counts[:, :1].T, GENES[:1], CELLS),
    }
    write_rds(tmp_path / "x.rds", seurat({"RNA": assay5(layers)}, "RNA"))
    check(tmp_path / "x.rds", counts=counts)
    layers["counts.d2"] = layers["counts.d1"]
    write_rds(tmp_path / "x.rds", seurat({"RNA": assay5(layers)}, "RNA"))
    with pytest.raises(ValueError, match=r"layers of counts share cells: in R, x\[\[\"RNA\"\]\] <- JoinLayers"):
        read_cells(tmp_path / "x.rds")


def test_an_assay_of_version_5_with_fewer_cells_than_the_object_takes_their_rows(tmp_path):
    layers = {"counts": (COUNTS[1:].T, GENES, CELLS[1:])}
    write_rds(tmp_path / "x.rds", seurat({"RNA": assay5(layers, cells=CELLS[1:])}, "RNA"))
    adata = read_cells(tmp_path / "x.rds")
    assert (list(adata.obs_names), list(adata.obs["cell_type"])) == (CELLS[1:], TYPES[1:])


def test_a_seurat_object_of_version_2_is_read_without_the_cells_that_were_filtered_out(tmp_path):
    raw = sparse_matrix(np.vstack([[9, 9, 9], COUNTS]).T, GENES, ["ACGT-1", *CELLS])
    write_rds(tmp_path / "x.Robj.rds", S4("seurat", raw__data=raw, meta__data=META))
    assert list(check(tmp_path / "x.Robj.rds").obs["cell_type"]) == TYPES


@pytest.mark.parametrize("kind", ["RenameDims", "DelayedMatrix"])
def test_a_matrix_that_is_kept_in_another_file_is_named(tmp_path, kind):
    layer = S4(kind, matrix=S4("MatrixDir", dir=["/data/counts"]))
    logical = R(np.ones((3, 1), bool), dim=R([3, 1], "INT"), dimnames=[GENES, ["counts"]])
    cells = R(np.ones((4, 1), bool), dim=R([4, 1], "INT"), dimnames=[CELLS, ["counts"]])
    assays = {"RNA": S4("Assay5", layers={"counts": layer}, features=logical, cells=cells)}
    write_rds(tmp_path / "x.rds", seurat(assays, "RNA"))
    with pytest.raises(
        ValueError, match=rf'a matrix of class {kind}, whose values are in another file .* as\(MATRIX, "dgCMatrix"\)'
    ):
        read_cells(tmp_path / "x.rds")


# SummarizedExperiment and SingleCellExperiment


def data_frame(columns, rows, n):
    return S4("DFrame", rownames=rows or NOTHING, nrows=R([n], "INT"), listData=columns)


def experiment(assays, columns=None, names=GENES, cells=CELLS, old=False, **more):
    held = S4("SimpleList", listData=assays)
    held = (
        S4("ShallowSimpleListAssays", **{".xData": R({"data": held}, "environment")})
        if old
        else S4("SimpleAssays", data=held)
    )
    table = data_frame(columns or {}, None, 3)
    if "ranges" in more:
        more["rowRanges"] = S4("GRanges", ranges=S4("IRanges", NAMES=names), elementMetadata=table)
        del more["ranges"]
    else:
        more |= {"NAMES": names or NOTHING, "elementMetadata": table}
    col_data = more.pop("colData", data_frame({"cell_type": TYPES, "odd": FUNCTION}, cells, 4))
    return S4("SingleCellExperiment", assays=held, colData=col_data, **more)


@pytest.mark.parametrize("more", [{}, {"ranges": True}, {"old": True}])
def test_an_experiment_is_read_with_its_cells(tmp_path, more):
    assays = {"logcounts": sparse_matrix(np.log1p(COUNTS.T), GENES, CELLS), "counts": MATRIX}
    write_rds(tmp_path / "x.rds", experiment(assays, **more))
    adata = check(tmp_path / "x.rds")
    assert (list(adata.obs["cell_type"]), list(adata.obs)) == (TYPES, ["cell_type"])


@pytest.mark.parametrize("more", [{}, {"ranges": True}])
def test_names_that_its_matrix_lacks_are_those_of_the_experiment(tmp_path, more):
    write_rds(tmp_path / "x.rds", experiment({"counts": sparse_matrix(COUNTS.T, None, None)}, **more))
    check(tmp_path / "x.rds")


def test_barcodes_in_a_column_are_the_names_of_cells_that_have_none(tmp_path):
    col_data = data_frame({"Sample": ["a"] * 4, "Barcode": CELLS}, None, 4)
    write_rds(tmp_path / "x.rds", experiment({"counts": sparse_matrix(COUNTS.T, GENES, None)}, colData=col_data))
    check(tmp_path / "x.rds")


def test_identifiers_are_kept_and_symbols_are_the_names_of_genes(tmp_path):
    ids = ["ENSG00000167286", "ENSG00000156738", "ENSG00000090382"]
    of_ids = sparse_matrix(COUNTS.T, ids, CELLS)
    write_rds(tmp_path / "x.rds", experiment({"counts": of_ids}, {"ID": ids, "Symbol": ["CD3D", "MS4A1", ""]}, ids))
    adata = check(tmp_path / "x.rds", genes=["CD3D", "MS4A1", ids[2]])
    assert list(adata.var["gene_ids"]) == ids
    write_rds(tmp_path / "x.rds", experiment({"counts": MATRIX}, {"ensembl": ids}))
    assert list(check(tmp_path / "x.rds").var["gene_ids"]) == ids


def test_features_of_an_experiment_that_are_no_genes_are_left_out(tmp_path):
    types = ["Gene Expression", "Antibody Capture", "Gene Expression"]
    write_rds(tmp_path / "x.rds", experiment({"counts": MATRIX}, {"Type": types}))
    check(tmp_path / "x.rds", genes=["CD3D", "LYZ"], counts=COUNTS[:, [0, 2]])
    more = {"int_metadata": {"mainExpName": ["ADT"]}}
    write_rds(tmp_path / "x.rds", experiment({"counts": MATRIX}, **more))
    with pytest.raises(ValueError, match=r'its main experiment is ADT, no RNA: in R, saveRDS\(swapAltExp\(x, "RNA"\)'):
        read_cells(tmp_path / "x.rds")


def test_an_experiment_without_counts_says_what_it_has(tmp_path):
    write_rds(tmp_path / "x.rds", experiment({"logcounts": MATRIX, "normcounts": MATRIX}))
    with pytest.raises(
        ValueError, match=r"its assays are logcounts, normcounts, and none is counts: in R, counts\(x\) <-"
    ):
        read_cells(tmp_path / "x.rds")


def test_a_wide_data_frame_is_read_without_a_word(tmp_path):
    columns = {f"cell{i}": R([1.0, 0.0, 3.0]) for i in range(300)}  # pandas warns of tables grown by over 100 columns
    write_rds(tmp_path / "x.rds", frame(columns, GENES))
    assert read_cells(tmp_path / "x.rds").shape == (300, 3)
