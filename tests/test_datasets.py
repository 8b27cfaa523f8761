"""The bundled cells, one's own file, and every bad file told in a sentence that says what to do."""

import gzip
import os

import anndata
import h5py
import numpy as np
import pandas as pd
import pytest
from scipy import sparse

import scbert
from scbert import datasets, sets
from scbert.sources.datasets import load
from scbert.sources.readers import r_objects
from scbert.sources.readers.matrices import recover_counts


@pytest.fixture(scope="module")
def pbmc():
    return load("pbmc68k_reduced", label_key="cell_type", batch_key="batch")


def test_pbmc68k_reduced_has_its_cells_genes_and_labels(pbmc):
    assert pbmc.shape == (700, 765)
    assert pbmc.obs["cell_type"].nunique() == 10
    assert pbmc.obs["cell_type"].value_counts()["Dendritic"] == 240
    assert pbmc.obs["batch"].nunique() > 1
    assert pbmc.obsm["X_umap"].shape == (700, 2)


def test_pbmc68k_reduced_holds_whole_counts_below_the_totals(pbmc):
    counts = pbmc.X.toarray()
    assert (counts == np.rint(counts)).all()
    assert counts.min() == 0
    assert (counts.sum(1) > 0).all()
    assert (counts.sum(1) <= pbmc.obs["n_counts"]).all()


def test_normalising_the_recovered_counts_again_gives_what_the_file_holds(pbmc):
    import scanpy

    stored = scanpy.datasets.pbmc68k_reduced().raw.X.toarray()
    again = np.log1p(pbmc.X.toarray() / pbmc.obs["n_counts"].to_numpy()[:, None] * 10_000)
    assert np.abs(again - stored).max() < 6e-4  # the file has three decimals


def test_labels_are_shuffled_as_a_control(make_cells, tmp_path, capsys):
    make_cells().write_h5ad(tmp_path / "a.h5ad")
    one, other = (datasets.load(tmp_path / "a.h5ad", label_key="cell_type shuffled") for _ in range(2))
    shuffled, labels = one.obs["cell_type shuffled"].astype(str), one.obs["cell_type"].astype(str)
    assert sorted(shuffled) == sorted(labels)
    assert 0.15 < (shuffled == labels).mean() < 0.55  # a third, by chance
    assert shuffled.equals(other.obs["cell_type shuffled"].astype(str))
    assert "a control, in which each cell has the label of another" in capsys.readouterr().out
    with pytest.raises(ValueError, match="cluster"):
        datasets.load(tmp_path / "a.h5ad", label_key="cluster shuffled")


def test_counts_come_back_from_rounded_log_values():
    random = np.random.default_rng(0)
    counts = random.poisson(2, size=(10, 20))
    totals = counts.sum(1) + 500.0
    rounded = np.log1p(counts / totals[:, None] * 10_000).round(3)
    assert (recover_counts(rounded, totals).toarray() == counts).all()


def test_values_that_are_no_logs_of_counts_are_refused():
    with pytest.raises(ValueError, match=r"not log1p of counts per 10,000: off a whole number by 0\.[1-5]"):
        recover_counts(np.random.default_rng(0).uniform(1, 3, size=(5, 6)), np.full(5, 2000.0))


def test_totals_below_the_recovered_counts_are_refused():
    values = np.log1p(np.array([[6.0, 6.0]]) / 10 * 10_000)  # six and six of ten
    with pytest.raises(ValueError, match="totals are too small"):
        recover_counts(values, np.array([10.0]))


@pytest.mark.parametrize("form", ["dense", "sparse", "backed"])
def test_ones_own_file_is_read_as_it_is(make_cells, tmp_path, form):
    adata = make_cells()
    counts = adata.X.toarray()
    if form == "dense":
        adata.X = counts
    adata.write_h5ad(tmp_path / "mine.h5ad")
    back = load(str(tmp_path / "mine.h5ad"), label_key="cell_type", batch_key="batch", backed=form == "backed")
    assert back.isbacked == (form == "backed")
    matrix = back.X[:] if form == "backed" else back.X
    assert ((matrix.toarray() if sparse.issparse(matrix) else matrix) == counts).all()
    assert back.obs["cell_type"].tolist() == adata.obs["cell_type"].tolist()


# Bad files. Each entry changes good cells; the message must say what is wrong and what to do.


def set_value(value):
    def change(adata):
        adata.X[4, 0] = value

    return change


def log_normalise(adata):
    adata.layers["raw_counts"] = adata.X.copy()
    adata.X = np.log1p(adata.X)


def duplicate_a_gene(adata):
    adata.var_names = pd.Index(["gene1", *adata.var_names[1:]])


def remove_labels(adata):
    del adata.obs["cell_type"]


def forget_a_label(adata):
    adata.obs.loc["cell5", "cell_type"] = np.nan


def give_all_the_same_label(adata):
    adata.obs["cell_type"] = "B"


def empty_a_cell(adata):
    adata.X[8] = 0


@pytest.mark.parametrize(
    ("change", "what", "advice"),
    [
        (log_normalise, r"holds fractional values such as \d\.\d+ \(log-normalised\?\)", r"put the raw counts into X"),
        (log_normalise, "log-normalised", r"layers\['raw_counts'\] may hold them"),
        (set_value(-1), "holds negative values", "needs raw counts"),
        (set_value(np.nan), "holds NaN or infinite values", "needs raw counts"),
        (set_value(np.inf), "holds NaN or infinite values", "needs raw counts"),
        (duplicate_a_gene, r"Gene names of .* are duplicated \(1 of them, first: gene1\)", "sum or rename them"),
        (remove_labels, "has no column 'cell_type' in obs", "it has: batch, n_counts"),
        (forget_a_label, r"obs\['cell_type'\] of .* has 1 missing values", "fill or drop them"),
        (give_all_the_same_label, r"has one value only \(B\)", "nothing to tell apart"),
        (
            empty_a_cell,
            r"empty cells, without a single count \(1 .*first: cell8",
            "drop them with scanpy.pp.filter_cells",
        ),
    ],
)
@pytest.mark.parametrize("form", ["dense", "sparse"])
@pytest.mark.filterwarnings("ignore:Variable names are not unique:UserWarning")  # anndata, while reading
def test_a_bad_file_is_refused_in_one_sentence(make_cells, tmp_path, change, what, advice, form):
    adata = make_cells()
    adata.X = adata.X.toarray()
    change(adata)
    if form == "sparse":
        adata.X = sparse.csr_matrix(adata.X)
    file = tmp_path / "mine.h5ad"
    adata.write_h5ad(file)
    with pytest.raises(ValueError, match=what) as error:
        load(file, label_key="cell_type")
    error.match(advice)
    error.match("mine.h5ad")
    assert "\n" not in str(error.value)


def write_text(file):
    file.write_text("cell,gene\n1,2\n")


def write_like_cell_ranger(file):
    with h5py.File(file, "w") as other:
        other["matrix/data"] = np.ones(3)


def write_half_a_file(file):
    anndata.AnnData(np.ones((50, 40), dtype=np.float32)).write_h5ad(file)
    file.write_bytes(file.read_bytes()[:3000])


def write_without_counts(file):
    anndata.AnnData(obs=pd.DataFrame(index=["a", "b"]), var=pd.DataFrame(index=["g"])).write_h5ad(file)


def write_without_cells(file):
    anndata.AnnData(np.zeros((0, 3), dtype=np.float32)).write_h5ad(file)


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (write_text, "cannot be read as an h5ad file .*: is it another format, or damaged"),
        (write_half_a_file, "cannot be read as an h5ad file .*: is it another format, or damaged"),
        (write_like_cell_ranger, "cannot be read as an h5ad file"),
        (lambda file: file.mkdir(), "cannot be read as an h5ad file"),
        (lambda file: None, "There is no file .*mine.h5ad, and no data set of that name .*pbmc68k_reduced"),
        (write_without_counts, "has no X"),
        (write_without_cells, "has 0 cells and 3 genes"),
    ],
)
@pytest.mark.filterwarnings("ignore:Element .* was written without encoding metadata")  # anndata, while reading
def test_what_is_no_h5ad_file_of_counts_is_refused_in_one_sentence(tmp_path, write, message):
    file = tmp_path / "mine.h5ad"
    write(file)
    with pytest.raises(ValueError, match=message) as error:
        load(file)
    assert "\n" not in str(error.value)
    assert "Traceback" not in str(error.value)
    assert error.value.__suppress_context__ or error.value.__context__ is None  # no library's traceback above ours


def test_an_unknown_name_lists_the_catalogue():
    with pytest.raises(ValueError, match="no data set of that name in the catalogue .*pbmc68k_reduced"):
        scbert.datasets.load("pbmc68k")


# The catalogue.

CELL_SETS = [name for name, entry in datasets.CATALOGUE.items() if entry["kind"] == "cells"]
LABELLED = [name for name in CELL_SETS if datasets.CATALOGUE[name]["labels"]]


@pytest.mark.parametrize("name", datasets.CATALOGUE)
def test_each_entry_says_where_from_by_what_hash_and_under_which_licence(name):
    entry = datasets.CATALOGUE[name]
    assert entry["kind"] in ("cells", "genes", "sets", "weights", "labels")
    assert entry["profile"] in ("demo", "small", "large", "paper")
    assert entry["licence"]
    assert entry["citation"]
    for file in entry["files"]:
        assert file["url"].startswith(("https://", "wheel:"))
        assert ("wheel_sha256" in file) == file["url"].startswith("wheel:")
        assert len(file.get("sha256", "")) == 64 or len(file["git_blob"]) == 40
        assert file["bytes"] or file.get("never_seen"), "the size of a file that was read is known"
    if entry["kind"] == "cells":
        assert entry["files"] or entry.get("by_hand") or name == "pbmc68k_reduced"
        assert callable(getattr(sets, entry["reader"]))
        assert entry["protocol"]
        assert entry["accession"]
        assert entry["caveat"]


@pytest.mark.parametrize("name", LABELLED)
def test_each_table_of_labels_is_complete(name):
    table = datasets.read_labels(name)
    assert list(table.columns) == ["cell_type", "cell_type_broad"]
    assert table.index.is_unique
    assert table.notna().all(axis=None)
    # One fine name never stands for two coarse ones.
    assert table.groupby("cell_type")["cell_type_broad"].nunique().max() == 1


def test_the_papers_four_types_and_fourteen_liver_types_come_out_of_the_tables():
    assert sorted(datasets.read_labels("pancreas")["cell_type"]) == ["alpha", "beta", "delta", "gamma"]
    liver = datasets.read_labels("macparland")
    assert len(liver) == 20
    assert liver["cell_type"].nunique() == 14


@pytest.mark.parametrize("name", [n for n in CELL_SETS if datasets.CATALOGUE[n]["profile"] != "paper"])
def test_a_mirrored_set_is_read_as_the_catalogue_says(name):
    if name != "pbmc68k_reduced" and not os.environ.get("SCBERT_MIRROR"):
        pytest.skip("needs the original files: set SCBERT_MIRROR to a folder that holds them")
    entry = datasets.CATALOGUE[name]
    adata = load(name, batch_key="batch", **({"label_key": "cell_type"} if entry["labels"] else {}))
    assert list(adata.shape) == entry["shape"]
    values = adata.X.data
    assert bool((values == np.rint(values)).all()) == (not entry.get("fractional"))
    assert bool(adata.uns["scbert"].get("fractional_counts")) == bool(entry.get("fractional"))
    if entry["labels"]:
        table = datasets.read_labels(name)
        assert set(adata.obs["cell_type"]) == set(table["cell_type"]) - (
            {"CD4+ T Helper2"} if name == "pbmc68k_reduced" else set()
        )
    rows = {(row.indices.tobytes(), row.data.tobytes()) for row in adata.X}
    assert len(rows) == adata.n_obs, "no cell stands there twice"


def test_recovered_counts_give_the_stored_values_again():
    if not os.environ.get("SCBERT_MIRROR"):
        pytest.skip("needs the original files: set SCBERT_MIRROR to a folder that holds them")
    adata = load("pbmc3k")
    values, genes, _ = r_objects.read_matrix(r_objects.open_r(datasets.fetch("pbmc3k")[0])["pbmc_matrix"])
    stored = values.T.tocsr()
    again = sparse.diags(10_000 / adata.obs["n_counts"].to_numpy()) @ adata.X.astype(np.float64)
    assert list(genes) == list(adata.var_names)
    assert abs(again.log1p() - stored).max() < 1e-9
    assert (adata.obs["n_counts"] == adata.X.sum(1).A1).all()


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SCBERT_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("SCBERT_MIRROR", raising=False)
    return tmp_path / "cache"


def test_a_set_without_a_pinned_address_says_which_files_and_from_where(own_cache):
    with pytest.raises(
        ValueError, match="macparland has no address that can be pinned: download GSE115469_Data.csv.gz "
    ):
        load("macparland")


def test_a_set_that_was_downloaded_by_hand_is_read_and_named(own_cache, monkeypatch):
    folder = own_cache / "by_hand" / "macparland"
    folder.mkdir(parents=True)
    table = pd.DataFrame({"CellName": ["a", "b", "c"], "Cluster": ["Hepatocyte_1", "Hepatocyte_6", "Cholangiocytes"]})
    table.to_csv(folder / "GSE115469_CellClusterType.txt.gz", sep="\t", index=False)
    counts = pd.DataFrame([[1, 0, 2], [3, 4, 0]], index=["G1", "G2"], columns=["a", "b", "c"])
    counts.to_csv(folder / "GSE115469_Data.csv.gz")
    with pytest.raises(ValueError, match="macparland was read as 3 cells x 2 genes, where 8,444 x 2 are due"):
        load("macparland")
    monkeypatch.setitem(datasets.CATALOGUE["macparland"], "cells", 3)
    adata = load("macparland", label_key="cell_type")
    assert adata.obs["cell_type"].tolist() == ["Hepatocyte", "Hepatocyte", "Cholangiocyte"]
    table.assign(Cluster="Alien").to_csv(folder / "GSE115469_CellClusterType.txt.gz", sep="\t", index=False)
    with pytest.raises(ValueError, match="labels that scbert/sources/labels/macparland.csv does not name: Alien"):
        load("macparland")


def test_weights_are_no_cells():
    with pytest.raises(ValueError, match="scbert_checkpoint is no data set of cells but the published weights"):
        load("scbert_checkpoint")


def test_what_cannot_be_fetched_lists_what_can():
    with pytest.raises(ValueError, match="zheng is not in the catalogue. It has: pbmc68k_reduced, zheng_facs"):
        datasets.fetch("zheng")


def test_the_list_holds_size_licence_and_state_of_what_a_profile_uses(own_cache):
    assert set(datasets.list_catalogue("demo").index) == {"pbmc68k_reduced"}
    small = datasets.list_catalogue("small")
    assert small.loc["zheng_facs", "size"] == "3.7 MB"
    assert small.loc["zheng_facs", "state"] == "to fetch"
    assert "scbert_checkpoint" not in small.index
    paper = datasets.list_catalogue()
    assert paper.loc["scbert_checkpoint", "licence"] == "GPL-3.0 (weights)"
    assert paper.loc["tucker", "state"] == "by hand"
    assert len(datasets.missing_files("pbmc_pool")) == 5


def test_estimated_counts_pass_where_the_reason_is_given(make_cells, tmp_path):
    adata = make_cells()
    adata.X = adata.X * 1.5
    adata.write_h5ad(tmp_path / "mine.h5ad")
    with pytest.raises(
        ValueError, match=r"fractional values .* pass if uns\['scbert'\]\['fractional_counts'\] says why"
    ):
        load(tmp_path / "mine.h5ad")
    adata.uns["scbert"] = {"fractional_counts": "RSEM estimates"}
    adata.write_h5ad(tmp_path / "mine.h5ad")
    assert load(tmp_path / "mine.h5ad").n_obs == adata.n_obs


def test_ones_own_file_may_be_of_another_format(make_cells, tmp_path):
    adata = make_cells()
    pd.DataFrame(adata.X.toarray().T, index=adata.var_names, columns=adata.obs_names).to_csv(tmp_path / "mine.csv")
    assert (load(tmp_path / "mine.csv").X.toarray() == adata.X.toarray()).all()


# Labels in a table of their own


@pytest.fixture
def matrix(make_cells, tmp_path):
    """The path of a file whose cells have no labels."""
    adata = make_cells(9)
    adata.obs = adata.obs[["n_counts"]]
    adata.write_h5ad(tmp_path / "matrix.h5ad")
    return tmp_path / "matrix.h5ad"


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("labels.csv", "barcode,kind,donor\n{}"),
        ("labels.tsv", "kind\tCell\tdonor\n{}"),  # named, though not first
        ("labels.txt.gz", "kind\tdonor\n{}"),  # as R writes it: no name above the names
    ],
)
def test_labels_come_from_a_table_by_the_names_of_cells_in_any_order(matrix, tmp_path, name, text):
    columns = {"cell": [f"cell{i}" for i in range(9)], "kind": list("ABA\u00e9BAABA"), "donor": list("123123123")}
    table = pd.DataFrame(columns).sample(frac=1, random_state=0)
    order = ["kind", "cell", "donor"] if "Cell" in text else list(columns)
    separator = "," if name.endswith(".csv") else "\t"
    rows = table[order].to_csv(sep=separator, index=False, header=False)
    with (gzip.open if name.endswith(".gz") else open)(tmp_path / name, "wt", encoding="utf-8") as file:
        file.write(text.format(rows))
    adata = load(matrix, labels=tmp_path / name, label_key="kind", batch_key="donor")
    assert adata.obs["kind"].tolist() == columns["kind"]
    assert adata.obs["donor"].tolist() == columns["donor"]
    same = load(f"{matrix} with {tmp_path / name}", label_key="kind")
    assert same.obs["kind"].tolist() == columns["kind"]
    assert "donor" not in same.obs


def test_cells_without_a_label_in_the_table_are_left_out_and_counted(matrix, tmp_path, capsys):
    rows = [f"cell{i},{kind}" for i, kind in enumerate(["A", "B", "A", "", "B"])]  # one of the five is blank
    (tmp_path / "labels.csv").write_text("\n".join(["cell,kind", *rows, "other,A", ""]))
    adata = load(matrix, labels=tmp_path / "labels.csv", label_key="kind")
    assert adata.obs_names.tolist() == ["cell0", "cell1", "cell2", "cell4"]
    assert "4 of 9 cells have a label in labels.csv; the others are left out." in capsys.readouterr().out


def test_the_suffix_of_barcodes_may_stand_on_one_side_only(matrix, tmp_path):
    adata = anndata.read_h5ad(matrix)
    adata.obs_names = [f"{name}-1" for name in adata.obs_names]
    adata.write_h5ad(matrix)
    rows = [f"cell{i},{'AB'[i % 2]}" for i in range(9)]
    (tmp_path / "labels.csv").write_text("\n".join(["barcode,kind", *rows, ""]))
    assert load(matrix, labels=tmp_path / "labels.csv", label_key="kind").obs["kind"].tolist() == list("ABABABABA")
    adata.obs_names = [f"cell{i // 2}-{i % 2}" for i in range(9)]  # of two samples: whose label is it?
    adata.write_h5ad(matrix)
    with pytest.raises(ValueError, match=r"None of the cells of .*matrix.h5ad \(cell0-0, ...\) has a label in"):
        load(matrix, labels=tmp_path / "labels.csv", label_key="kind")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("cell,kind\nx,A\ny,B\n", r"None of the cells of .* \(cell0, ...\) has a label in .* \(x, ...\)"),
        ("cell,type\ncell0,A\n", "labels.csv has no column 'kind' for label_key; it has: cell, type"),
        ("cell,kind\ncell0,A\ncell0,B\n", "Cells of .*labels.csv are duplicated"),
        ("", "labels.csv cannot be read as a table of labels"),
    ],
)
def test_a_table_that_is_none_of_these_cells_is_refused(matrix, tmp_path, text, message):
    (tmp_path / "labels.csv").write_text(text)
    with pytest.raises(ValueError, match=message):
        load(matrix, labels=tmp_path / "labels.csv", label_key="kind")


def test_what_is_whole_a_file_or_a_name_is_not_parted(make_cells, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("cells with labels by A; B -> C + D.h5ad", "one.h5ad"):
        make_cells().write_h5ad(name)
        assert datasets.name_sets(name) == [name]
        assert load(name, label_key="cell_type").n_obs == 60
    text = "one.h5ad -> no + more by kind; pbmc3k ; x with y.csv; " + "long" * 100
    assert datasets.name_sets(text) == ["one.h5ad", "no", "more", "pbmc3k", "x with y.csv", "long" * 100]
    assert datasets.name_sets("") == []


@pytest.mark.parametrize("key", ["scbert_cell_type", "scbert_consensus"])
def test_a_column_that_scbert_writes_is_no_label_and_no_batch(make_cells, tmp_path, key):
    adata = make_cells()
    adata.obs[key] = adata.obs["cell_type"]
    adata.write_h5ad(tmp_path / "mine.h5ad")
    for column in ("label_key", "batch_key"):
        with pytest.raises(
            ValueError, match=rf"obs\['{key}'\] is a column that scbert writes itself: copy your labels"
        ):
            load(tmp_path / "mine.h5ad", **{column: key})
    scbert.preprocess.tokenize(adata)
    model = scbert.ScBert(scbert.ScBertConfig(n_genes=24, dim=8, depth=1, heads=2, dim_head=4))
    with pytest.raises(ValueError, match="is a column that scbert writes itself"):
        scbert.finetune(model, adata, label_key=key)


@pytest.mark.parametrize("label", ["", "nan", "Unassigned", "B cell "])
def test_a_label_that_is_no_type_is_refused(tmp_path, make_cells, label):
    adata = make_cells()
    adata.obs["cell_type"] = adata.obs["cell_type"].astype(str)
    adata.obs.iloc[:2, adata.obs.columns.get_loc("cell_type")] = label
    adata.write_h5ad(tmp_path / "mine.h5ad")
    with pytest.raises(ValueError, match="in 2 cells, no type: drop or correct them"):
        datasets.load(tmp_path / "mine.h5ad", label_key="cell_type")


def test_a_table_that_names_no_cells_is_refused(tmp_path, make_cells):
    make_cells().write_h5ad(tmp_path / "mine.h5ad")
    (tmp_path / "labels.csv").write_text("cell_type\nB cell\n")
    with pytest.raises(ValueError, match="has one column only"):
        datasets.load(tmp_path / "mine.h5ad", labels=tmp_path / "labels.csv", label_key="cell_type")


def test_cells_that_stand_in_a_file_twice_are_left_in_it_once(tmp_path, make_cells, capsys):
    once = make_cells()
    rows = [*range(60), 3, 5, 7]
    twice = anndata.AnnData(once.X[rows], pd.DataFrame(index=[f"cell{i}" for i in range(63)]), once.var)
    twice.write_h5ad(tmp_path / "a.h5ad")
    adata = load(tmp_path / "a.h5ad")
    assert list(adata.obs_names) == [f"cell{i}" for i in range(60)]
    assert "3 of 63 cells have the same counts as another, and are left out." in capsys.readouterr().out
    assert load(tmp_path / "a.h5ad", backed=True).n_obs == 63
    few = twice.X.toarray() * (np.arange(24) < 9)
    few[:, 0] = 1
    anndata.AnnData(few, twice.obs).write_h5ad(tmp_path / "few.h5ad")
    assert load(tmp_path / "few.h5ad").n_obs == 63  # nine genes are too few to tell
