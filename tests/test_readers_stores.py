"""Stores of other tools: MuData, loom, zarr."""

import anndata
import h5py
import numpy as np
import pandas as pd
import pytest
from scipy import sparse

from scbert.sources.readers import read_cells

GENES = ["CD3D", "MS4A1", "LYZ"]
IDS = ["ENSG00000167286", "ENSG00000156738", "ENSG00000090382"]
CELLS = ["AAAC-1", "CCCG-1"]
COUNTS = np.array([[1, 0, 3], [0, 2, 0]], dtype=np.float32)  # (cells, genes)


def make_adata(genes=GENES):
    obs, var = pd.DataFrame({"donor": ["a", "b"]}, index=CELLS), pd.DataFrame(index=genes)
    return anndata.AnnData(sparse.csr_matrix(COUNTS), obs=obs, var=var)


def check(path):
    adata = read_cells(path)
    assert adata.to_df().to_numpy().tolist() == COUNTS.tolist()
    assert (list(adata.obs_names), list(adata.var_names)) == (CELLS, GENES)
    return adata


def write_mudata(path, modalities):
    """Write what mudata 0.3 writes: the modalities, the cells and features of all, and this encoding."""
    with h5py.File(path, "w") as file:
        file.attrs["encoding-type"], file.attrs["encoding-version"] = "MuData", "0.1.0"
        for name, adata in modalities.items():
            anndata.io.write_elem(file, f"mod/{name}", adata)
        shared = pd.DataFrame({"cell_type": ["T", "B"], "rna:donor": ["a", "b"]}, index=CELLS[::-1])
        anndata.io.write_elem(file, "obs", shared)


@pytest.mark.parametrize("name", ["x.h5mu", "x.h5ad"])
def test_the_rna_of_mudata_is_read_with_the_cells_that_all_share(tmp_path, capsys, name):
    write_mudata(tmp_path / name, {"prot": make_adata(["CD3", "CD19", "CD14"]), "rna": make_adata()})
    assert check(tmp_path / name).obs.to_dict("list") == {"donor": ["a", "b"], "cell_type": ["B", "T"]}
    assert f"{name}: the modality rna is read, of prot, rna." in capsys.readouterr().out


def test_mudata_without_rna_is_refused(tmp_path):
    write_mudata(tmp_path / "x.h5mu", {"prot": make_adata(), "atac": make_adata()})
    with pytest.raises(
        ValueError, match=r"modalities atac, prot, and none is called rna: mudata.read\('x.h5mu'\).mod\[NAME\]"
    ):
        read_cells(tmp_path / "x.h5mu")


def write_loom(path, rows, columns):
    with h5py.File(path, "w") as file:
        file["matrix"] = COUNTS.T
        file["row_graphs/KNN/w"] = np.zeros(3)
        for kind, attributes in (("row_attrs", rows), ("col_attrs", columns)):
            file.create_group(kind)
            for name, values in attributes.items():
                kind_of_text = h5py.string_dtype() if isinstance(values[0], str) else None
                file[kind].create_dataset(name, data=np.array(values, kind_of_text or float))


@pytest.mark.parametrize(
    ("rows", "columns"),
    [
        (
            {"Gene": GENES, "Accession": IDS, "X": [[1.0, 2]] * 3},
            {"CellID": CELLS, "n": [1.0, 2.0], "pca": [[1.0, 2]] * 2},
        ),
        ({"var_names": GENES, "gene_ids": IDS}, {"obs_names": CELLS, "n": [1.0, 2.0]}),
    ],
    ids=["loompy and velocyto", "anndata"],
)
def test_a_loom_file_is_read_with_what_is_known_of_genes_and_cells(tmp_path, monkeypatch, rows, columns):
    monkeypatch.setattr("scbert.sources.readers.stores.ROWS_AT_ONCE", 2)
    write_loom(tmp_path / "x.loom", rows, columns)
    adata = check(tmp_path / "x.loom")
    assert (list(adata.var["gene_ids"]), adata.obs.to_dict("list")) == (IDS, {"n": [1, 2]})


def test_a_loom_file_without_names_says_what_it_has(tmp_path):
    write_loom(tmp_path / "x.loom", {"Gene": GENES}, {"n": [1.0, 2.0]})
    with pytest.raises(
        ValueError, match=r"a loom file whose cells \(n\) or genes \(Gene\) have no attribute CellID or Gene"
    ):
        read_cells(tmp_path / "x.loom")


def test_an_h5ad_is_read_whatever_its_name(tmp_path):
    make_adata().write_h5ad(tmp_path / "x.h5")
    check(tmp_path / "x.h5")


@pytest.mark.filterwarnings("ignore:Writing zarr v2 data")
def test_a_zarr_store_is_read_and_one_of_several_tables_refused(tmp_path):
    make_adata().write_zarr(tmp_path / "x.zarr")
    assert list(check(tmp_path / "x.zarr").obs["donor"]) == ["a", "b"]
    for inner, what in (("tables", "SpatialData"), ("mod", "MuData")):
        (tmp_path / what / inner / "one").mkdir(parents=True)
        (tmp_path / what / "zarr.json").write_text("{}")
        with pytest.raises(
            ValueError, match=rf"a store of {what}: name the folder of its cells, {what}/{inner}/NAME \(one\)"
        ):
            read_cells(tmp_path / what)
