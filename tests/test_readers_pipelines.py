"""What pipelines write: matrices with their names beside them, .h5 files, and whole series of samples."""

import gzip
import tarfile
import zipfile

import anndata
import h5py
import numpy as np
import pandas as pd
import pytest
from scipy import sparse
from scipy.io import mmwrite

from scbert.sources.readers import read_cells

GENES = ["CD3D", "MS4A1", "LYZ"]
IDS = ["ENSG00000167286", "ENSG00000156738", "ENSG00000090382"]
CELLS = ["AAACCTGAACGTACGT-1", "AAACCTGCACGTACGT-1"]
COUNTS = np.array([[1, 0, 3], [0, 2, 0]])  # (cells, genes)


def write(folder, files, matrix, counts=COUNTS):
    """Write text files (name -> lines) and a matrix of this name; those whose name ends in .gz are gzipped."""
    folder.mkdir(parents=True, exist_ok=True)
    mmwrite(folder / "plain.mtx", sparse.coo_matrix(counts))
    (folder / "plain.mtx").rename(folder / matrix.removesuffix(".gz"))
    for name, lines in files.items():
        (folder / name.removesuffix(".gz")).write_text("\n".join(lines) + "\n")
    for name in [*files, matrix]:
        if name.endswith(".gz"):
            plain = folder / name.removesuffix(".gz")
            (folder / name).write_bytes(gzip.compress(plain.read_bytes()))
            plain.unlink()
    return folder / matrix


def write_10x(folder, before="", counts=COUNTS, genes=GENES, ids=IDS, kind="Gene Expression"):
    kinds = [kind] * len(genes) if isinstance(kind, str) else kind
    features = ["\t".join(row) for row in zip(ids, genes, kinds, strict=True)]
    files = {f"{before}barcodes.tsv.gz": CELLS, f"{before}features.tsv.gz": features}
    return write(folder, files, f"{before}matrix.mtx.gz", np.asarray(counts).T)


def write_h5(path, counts=COUNTS, genes=GENES, ids=IDS, kinds=None, genomes=None):
    matrix = sparse.csr_matrix(counts, dtype=np.int32)
    with h5py.File(path, "w") as file:
        group = file.create_group("matrix")
        group["data"], group["indices"], group["indptr"] = matrix.data, matrix.indices, matrix.indptr
        group["shape"], group["barcodes"] = np.array(matrix.shape[::-1]), np.array(CELLS, "S")
        columns = {"id": ids, "name": genes, "feature_type": kinds or ["Gene Expression"] * len(genes)}
        for key, values in (columns | {"genome": genomes or ["GRCh38"] * len(genes)}).items():
            group[f"features/{key}"] = np.array(values, "S")
    return path


def check(path, genes=tuple(GENES), ids=tuple(IDS), counts=COUNTS, cells=tuple(CELLS)):
    adata = read_cells(path)
    assert adata.to_df().to_numpy().tolist() == np.asarray(counts).tolist()
    assert (list(adata.obs_names), list(adata.var_names)) == (list(cells), list(genes))
    assert list(adata.var["gene_ids"]) == list(ids)
    return adata


# One sample


@pytest.mark.parametrize("end", ["", ".gz"])
def test_a_matrix_of_kallisto_is_read_with_its_symbols(tmp_path, end):
    names = {"barcodes.txt": CELLS, "genes.txt": [f"{i}.7" for i in IDS], "genes.names.txt": ["CD3D", "", "LYZ"]}
    files = {f"cells_x_genes.{name}{end}": lines for name, lines in names.items()}
    path = write(tmp_path / "counts_unfiltered", files, f"cells_x_genes.mtx{end}")
    for each in (path, path.parent, tmp_path):
        check(each, ["CD3D", f"{IDS[1]}.7", "LYZ"], [f"{i}.7" for i in IDS])


def test_parts_of_a_count_of_kallisto_are_read_by_name_and_not_as_samples(tmp_path):
    names = {"cells_x_genes.barcodes.txt": CELLS, "cells_x_genes.genes.txt": IDS}
    for part in ("mature", "nascent"):
        path = write(tmp_path, names, f"cells_x_genes.{part}.mtx")
    check(path, IDS)
    with pytest.raises(
        ValueError, match=r"several matrices of the same cells \(cells_x_genes.mature.mtx, .*\): name one"
    ):
        read_cells(tmp_path)


def test_a_matrix_of_alevin_fry_is_read(tmp_path):
    path = write(tmp_path / "alevin", {"quants_mat_rows.txt": CELLS, "quants_mat_cols.txt": IDS}, "quants_mat.mtx")
    for each in (path, path.parent, tmp_path):
        check(each, IDS)


def test_spliced_and_ambiguous_counts_of_alevin_fry_are_added(tmp_path, capsys):
    genes = ["HLA-A", "HLA-U", "LYZ"]  # of which two end as the other columns do
    columns = [*genes, *(f"{gene}-U" for gene in genes), *(f"{gene}-A" for gene in genes)]
    counts = np.hstack([COUNTS, 50 + COUNTS, 100 + COUNTS])
    files = {"quants_mat_rows.txt": CELLS, "quants_mat_cols.txt": columns}
    check(write(tmp_path, files, "quants_mat.mtx", counts), genes, genes, 100 + 2 * COUNTS)
    assert "spliced and ambiguous counts are added" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["count_matrix.mtx", "DGE.mtx"])
def test_a_matrix_of_parse_is_read_with_its_samples(tmp_path, name):
    genes = ["gene_id,gene_name,genome", *(f"{i},{gene},hg38" for i, gene in zip(IDS, GENES, strict=True))]
    cells = ["bc_wells,sample,species", *(f"{cell},s1,hg38" for cell in CELLS)]
    path = write(tmp_path, {"all_genes.csv": genes, "cell_metadata.csv": cells}, name)
    for each in (path, tmp_path):
        assert list(check(each).obs["sample"]) == ["s1", "s1"]
    (tmp_path / "all_genes.csv").write_text("\n".join([*genes[:3], f"{IDS[2]},Lyz,mm39"]) + "\n")
    with pytest.raises(ValueError, match="its genes are of several genomes, hg38 and mm39"):
        read_cells(tmp_path)


def test_identifiers_of_cell_ranger_are_kept_and_those_of_one_symbol_joined(tmp_path):
    check(write_10x(tmp_path / "a").parent)
    check(write_h5(tmp_path / "a.h5"))
    counts = COUNTS[:, [0, 1]] + COUNTS[:, [2, 2]] * [1, 0]
    for path in (write_10x(tmp_path / "b", genes=["X", "Y", "X"]), write_h5(tmp_path / "b.h5", genes=["X", "Y", "X"])):
        check(path, ["X", "Y"], [f"{IDS[0]};{IDS[2]}", IDS[1]], counts)


def test_a_square_matrix_is_read_as_its_pipeline_writes_it(tmp_path):
    check(write_10x(tmp_path / "a", "", COUNTS[:, :2], GENES[:2], IDS[:2]), GENES[:2], IDS[:2], COUNTS[:, :2])
    names = {"cells_x_genes.barcodes.txt": CELLS, "cells_x_genes.genes.txt": IDS[:2]}
    check(write(tmp_path / "b", names, "cells_x_genes.mtx", COUNTS[:, :2]), IDS[:2], IDS[:2], COUNTS[:, :2])


def test_features_that_are_no_genes_are_left_out_and_a_file_of_them_refused(tmp_path):
    kinds = ["Gene Expression", "Antibody Capture", "Gene Expression"]
    for path in (write_10x(tmp_path / "a", kind=kinds), write_h5(tmp_path / "a.h5", kinds=kinds)):
        check(path, ["CD3D", "LYZ"], [IDS[0], IDS[2]], COUNTS[:, [0, 2]])
    for kind in ("Antibody Capture", "Peaks", "CRISPR Guide Capture"):
        for path in (write_10x(tmp_path / kind, kind=kind), write_h5(tmp_path / f"{kind}.h5", kinds=[kind] * 3)):
            with pytest.raises(ValueError, match=f"its features are {kind}, and none is Gene Expression"):
                read_cells(path)
    check(write_10x(tmp_path / "c", kind="protein_coding"))  # another column, of no types


# Two genomes, and what is no matrix


def test_two_genomes_in_one_h5_are_refused_with_the_lines_that_keep_one(tmp_path):
    with h5py.File(tmp_path / "old.h5", "w") as file:
        for genome in ("hg19", "mm10"):
            matrix = sparse.csr_matrix(COUNTS, dtype=np.int32)
            group = file.create_group(genome)
            group["data"], group["indices"], group["indptr"] = matrix.data, matrix.indices, matrix.indptr
            group["shape"], group["barcodes"] = np.array([3, 2]), np.array(CELLS, "S")
            group["genes"] = group["gene_names"] = np.array([f"{genome}_{gene}" for gene in GENES], "S")
    with pytest.raises(ValueError, match="two genomes, hg19 and mm10.*read_10x_h5.'old.h5', genome='hg19'.*write_h5ad"):
        read_cells(tmp_path / "old.h5")
    names = ["GRCh38_CD3D", "mm10___Cd3d", "mm10___Lyz"]
    write_h5(tmp_path / "new.h5", genes=names, genomes=["GRCh38", "mm10", "mm10"])
    with pytest.raises(ValueError, match="two genomes, GRCh38 and mm10.*read_10x_h5.'new.h5', genome='GRCh38'"):
        read_cells(tmp_path / "new.h5")


def test_the_lines_that_keep_one_genome_do_so(tmp_path):
    import scanpy

    names = ["GRCh38_CD3D", "mm10___Cd3d", "GRCh38_LYZ"]
    write_h5(tmp_path / "new.h5", genes=names, genomes=["GRCh38", "mm10", "GRCh38"])
    adata = scanpy.read_10x_h5(tmp_path / "new.h5", genome="GRCh38")
    adata.var_names = adata.var_names.str.replace("^GRCh38_+", "", regex=True)
    adata.write_h5ad(tmp_path / "GRCh38.h5ad")
    check(tmp_path / "GRCh38.h5ad", ["CD3D", "LYZ"], [IDS[0], IDS[2]], COUNTS[:, [0, 2]])


@pytest.mark.parametrize("keys", [("barcode_idx", "feature_idx", "umi", "count"), ("barcode", "gene", "umi", "reads")])
def test_the_table_of_molecules_is_no_matrix(tmp_path, keys):
    with h5py.File(tmp_path / "molecule_info.h5", "w") as file:
        for key in keys:
            file[key] = np.zeros(4, "u4")
    with pytest.raises(ValueError, match="Cell Ranger's table of molecules .*: take filtered_feature_bc_matrix.h5"):
        read_cells(tmp_path / "molecule_info.h5")


def test_a_folder_of_genomes_holds_no_samples(tmp_path):
    for genome in ("hg19", "mm10"):
        write_10x(tmp_path / "filtered_gene_bc_matrices" / genome)
    with pytest.raises(ValueError, match="it holds the genomes hg19 and mm10: name the folder of one, such as hg19"):
        read_cells(tmp_path)


# Several samples


OTHER = COUNTS + [[0, 5, 1], [2, 0, 0]]


def check_two(path, first="GSM1_a", second="GSM2_b"):
    """Of two samples: the genes of IDS and GENES, and those whose last gene is another."""
    names = [f"{sample}_{cell}" for sample in (first, second) for cell in CELLS]
    counts = np.vstack(
        [np.hstack([COUNTS, np.zeros((2, 1))]), np.hstack([OTHER[:, :2], np.zeros((2, 1)), OTHER[:, 2:]])]
    )
    adata = check(path, [*GENES, "NKG7"], [IDS[0], f"{IDS[1]};ENSG9", IDS[2], "ENSG8"], counts, names)
    assert list(adata.obs["batch"]) == [first, first, second, second]
    assert list(adata.obs["n_counts"]) == list(counts.sum(1))
    return adata


def write_second(folder, before=""):
    return write_10x(folder, before, OTHER, [*GENES[:2], "NKG7"], [IDS[0], "ENSG9", "ENSG8"])


def test_a_folder_of_prefixed_matrices_is_a_series_on_all_genes(tmp_path, capsys):
    write_10x(tmp_path, "GSM1_a_")
    write_second(tmp_path, "GSM2_b_")
    check_two(tmp_path)
    said = capsys.readouterr().out
    assert (
        "2 samples (GSM1_a, GSM2_b), 4 genes, 2 of them in every sample; a gene that a sample does not list is 0"
        in said
    )


def test_a_folder_of_h5_files_is_a_series_without_what_is_raw(tmp_path):
    write_h5(tmp_path / "GSM1_a_filtered_feature_bc_matrix.h5")
    write_h5(tmp_path / "GSM1_a_raw_feature_bc_matrix.h5", COUNTS + 100)
    write_h5(tmp_path / "GSM2_b_filtered_feature_bc_matrix.h5", OTHER, [*GENES[:2], "NKG7"], [IDS[0], "ENSG9", "ENSG8"])
    (tmp_path / "GSM1_a_molecule_info.h5").write_bytes(b"not read")
    check_two(tmp_path)


def test_folders_of_samples_are_a_series(tmp_path):
    write_10x(tmp_path / "GSM1_a" / "outs" / "filtered_feature_bc_matrix")
    write_10x(tmp_path / "GSM1_a" / "outs" / "raw_feature_bc_matrix", counts=COUNTS + 100)
    write_second(tmp_path / "GSM2_b" / "outs" / "filtered_feature_bc_matrix")
    check_two(tmp_path)
    check(tmp_path / "GSM1_a")


@pytest.mark.parametrize("name", ["GSE1_RAW.tar", "GSE1.tar.gz", "GSE1.zip"])
def test_an_archive_of_a_series_is_read_and_the_archives_in_it(tmp_path, name):
    write_10x(tmp_path / "x", "GSM1_a_")
    write_second(tmp_path / "y")
    with tarfile.open(tmp_path / "x" / "GSM2_b.tar.gz", "w:gz") as archive:
        archive.add(tmp_path / "y", "filtered_feature_bc_matrix")
    if name == "GSE1.zip":
        with zipfile.ZipFile(tmp_path / name, "w") as archive:
            for path in (tmp_path / "x").iterdir():
                archive.write(path, path.name)
    else:
        with tarfile.open(tmp_path / name, "w:gz" if name.endswith("gz") else "w") as archive:
            for path in sorted((tmp_path / "x").iterdir()):
                archive.add(path, path.name)
    check_two(tmp_path / name)


def test_tables_whose_names_begin_with_their_sample_are_a_series(tmp_path):
    for name, counts in {"GSM1_a": COUNTS, "GSM2_b": OTHER}.items():
        table = pd.DataFrame(counts.T, GENES, CELLS)
        table.to_csv(tmp_path / f"{name}_counts.csv.gz")
        table.iloc[:1].T.to_csv(tmp_path / f"{name}_metadata.csv.gz")
    adata = read_cells(tmp_path)
    assert adata.to_df().to_numpy().tolist() == [*COUNTS.tolist(), *OTHER.tolist()]
    assert list(adata.obs["batch"]) == ["GSM1_a_counts"] * 2 + ["GSM2_b_counts"] * 2


def test_an_archive_of_one_table_is_that_table(tmp_path):
    pd.DataFrame(COUNTS.T, GENES, CELLS).to_csv(tmp_path / "counts.csv")
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        archive.write(tmp_path / "counts.csv", "GSE1/counts.csv")
    assert read_cells(tmp_path / "x.zip").to_df().to_numpy().tolist() == COUNTS.tolist()


def test_what_is_wrong_with_one_sample_is_said_of_it(tmp_path):
    write_10x(tmp_path, "GSM1_a_")
    write_10x(tmp_path, "GSM2_b_", kind="Antibody Capture")
    with pytest.raises(ValueError, match="not read: of GSM2_b_matrix.mtx.gz: its features are Antibody Capture"):
        read_cells(tmp_path)
    write_10x(tmp_path, "GSM2_b_", genes=["HTO1", "HTO2", "HTO3"])
    with pytest.raises(ValueError, match="its samples GSM1_a and GSM2_b have no gene in common: read them apart"):
        read_cells(tmp_path)


def test_a_series_of_one_word_names_is_annotated_as_one_set(tmp_path):
    for name, counts in {"one": COUNTS, "two": OTHER}.items():
        write_h5(tmp_path / f"{name}.h5", counts)
    adata = read_cells(tmp_path)
    assert adata.obs["batch"].value_counts().to_dict() == {"one": 2, "two": 2}
    adata.write_h5ad(tmp_path / "all.h5ad")
    assert list(anndata.read_h5ad(tmp_path / "all.h5ad").obs_names) == list(adata.obs_names)
