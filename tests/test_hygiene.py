"""A cell on both sides is found, a shared barcode alone is not, and the saved split is what it says."""

import gzip
import os

import numpy as np
import pandas as pd
import pytest
from make_split import make_split
from scipy import sparse

import scbert
from scbert import datasets, hygiene
from scbert.sources.readers import tables

needs_files = pytest.mark.skipif(not os.environ.get("SCBERT_MIRROR"), reason="SCBERT_MIRROR names no real files")


@pytest.fixture
def barcodes():
    """120 barcodes of 16 letters, all different."""
    letters = np.random.default_rng(0).choice(list("ACGT"), size=(120, 16))
    return ["".join(row) for row in letters]


@pytest.fixture
def two_sets(make_cells, barcodes):
    """60 and 60 other cells of 24 genes; five cells of the first are in the second, under another prefix."""
    one, other = make_cells(seed=1), make_cells(seed=2)
    one.obs_names = [f"{code}-1" for code in barcodes[:60]]
    other.obs_names = [f"lib_{code}" for code in [*barcodes[5:10], *barcodes[65:]]]
    one.X, other.X = one.X.toarray(), other.X.toarray()
    other.X[:5] = one.X[5:10]
    return one, other


# Duplicates


def test_cells_with_the_same_barcode_and_counts_are_found(two_sets):
    one, other = two_sets
    found = hygiene.find_duplicates(one, other)
    assert found["cell"].tolist() == one.obs_names[5:10].tolist()
    assert found["other_cell"].tolist() == other.obs_names[:5].tolist()
    assert (found["shared_genes"] == 24).all()
    assert found["expressed_genes"].tolist() == (one.X[5:10] > 0).sum(1).tolist()
    assert found["shared_counts"].tolist() == one.X[5:10].sum(1).tolist()
    assert found.attrs == {"same_barcode": 5, "by_chance": 0, "undecided": 0, "without_barcode": 0}


def test_order_form_and_further_genes_do_not_matter(two_sets):
    one, other = two_sets
    other = other[::-1, ::-1].copy()
    other.X = sparse.csc_matrix(other.X)
    other.var_names = ["unmeasured" if gene == "gene3" else gene for gene in other.var_names]
    found = hygiene.find_duplicates(one, other)
    assert sorted(found["cell"]) == sorted(one.obs_names[5:10])
    assert (found["shared_genes"] == 23).all()
    assert sorted(hygiene.find_duplicates(other, one)["other_cell"]) == sorted(one.obs_names[5:10])


def test_a_file_on_disk_is_compared_too(two_sets, tmp_path):
    one, other = two_sets
    one.X = sparse.csr_matrix(one.X)
    one.write_h5ad(tmp_path / "one.h5ad")
    backed = scbert.datasets.load(tmp_path / "one.h5ad", backed=True)
    assert len(hygiene.find_duplicates(backed, other)) == 5


def test_a_cell_counted_by_another_pipeline_is_still_the_same_cell(two_sets):
    one, other = two_sets
    one.X[5:10], other.X[:5] = 10 * one.X[5:10], 10 * other.X[:5]
    other.X[:5] = np.random.default_rng(0).binomial(other.X[:5].astype(int), 0.95)
    found = hygiene.find_duplicates(one, other)
    assert found["cell"].tolist() == one.obs_names[5:10].tolist()
    assert found["overlap"].between(0.85, 0.99).all()
    assert hygiene.drop_duplicates(one, other).n_obs == 55


def test_other_counts_under_one_barcode_are_another_cell(two_sets):
    one, other = two_sets
    other.X[0] = other.X[0, ::-1].copy()
    found = hygiene.find_duplicates(one, other)
    assert found["cell"].tolist() == one.obs_names[6:10].tolist()
    assert found.attrs["same_barcode"] == 5
    assert found.attrs["by_chance"] == 1


def test_the_same_counts_under_another_barcode_are_another_cell(two_sets, barcodes):
    one, other = two_sets
    other.obs_names = barcodes[60:]
    assert len(hygiene.find_duplicates(one, other)) == 0


@pytest.mark.parametrize(("expressed", "is_found"), [(9, False), (10, True)])
def test_equal_counts_on_too_few_genes_are_no_evidence(two_sets, expressed, is_found):
    one, other = two_sets
    for adata, cell in ((one, 5), (other, 0)):
        adata.X[cell] = 0
        adata.X[cell, :expressed] = 1
    found = hygiene.find_duplicates(one, other)
    assert (one.obs_names[5] in found["cell"].tolist()) == is_found
    assert found.attrs["undecided"] == (not is_found)
    assert one.obs_names[5] not in hygiene.drop_duplicates(one, other).obs_names  # who doubts, drops


@pytest.mark.parametrize(
    ("name", "barcode"),
    [
        ("AAACATTGCACTAG", "AAACATTGCACTAG"),
        ("frozen_pbmc_donor_a_AAACATTGCACTAG", "AAACATTGCACTAG"),
        ("CGTGATGATTTCAC-1-b_cells", "CGTGATGATTTCAC"),
        ("E2L5_TGTACAGGTAACGATA", "TGTACAGGTAACGATA"),
        ("5prime_CAGCTGGCATTAGCCA-1", "CAGCTGGCATTAGCCA"),
        ("D101_74", None),
        ("human1_lib2.final_cell_0006", None),
        ("ACGTACGTACGTA", None),  # 13 letters
        ("ACGTACGTACGTACGTA", None),  # 17
    ],
)
def test_the_barcode_is_found_whatever_stands_around_it(name, barcode):
    match = tables.BARCODE.search(name)
    assert (match and match[0]) == barcode


def test_cells_without_barcode_are_counted_not_compared(two_sets, make_cells):
    one, _ = two_sets
    found = hygiene.find_duplicates(one, make_cells())
    assert len(found) == 0
    assert found.attrs["without_barcode"] == 60


def test_sets_without_a_shared_gene_are_refused(two_sets):
    one, other = two_sets
    other.var_names = [f"ENSG{i}" for i in range(24)]
    with pytest.raises(ValueError, match="share no gene name .* use the same symbols"):
        hygiene.find_duplicates(one, other)


def test_dropping_leaves_the_other_cells_and_says_how_many(two_sets, capsys):
    one, other = two_sets
    other.X[0] = other.X[0, ::-1].copy()
    kept = hygiene.drop_duplicates(one, other, "pbmc_3tech")
    assert kept.obs_names.tolist() == [*one.obs_names[:6], *one.obs_names[10:]]
    assert "4 of 60 cells are in pbmc_3tech too and were dropped; 1 shared no more" in capsys.readouterr().out
    assert len(hygiene.find_duplicates(kept, other)) == 0


@needs_files
def test_66_cells_of_the_five_prime_file_are_in_pbmc_3tech_and_no_cell_of_other_sets():
    pool, tested = scbert.datasets.load("pbmc_pool"), scbert.datasets.load("pbmc_3tech")
    found = hygiene.find_duplicates(pool, tested)
    assert len(found) == found["cell"].nunique() == found["other_cell"].nunique() == 66
    assert set(pool.obs.loc[found["cell"], "batch"]) == {"5prime_PBMC_filt_1kcells"}
    assert found["expressed_genes"].min() > 100
    assert found.attrs == {"same_barcode": 66, "by_chance": 0, "undecided": 0, "without_barcode": 0}
    # Of the unrelated sets, some share barcodes by chance.
    unrelated = hygiene.find_duplicates(pool, scbert.datasets.load("pbmc3k"))
    assert len(unrelated) == 0
    assert unrelated.attrs["by_chance"] == 12


# The split


@pytest.fixture
def some(make_cells):
    """100 cells: B 40, Monocyte 30, T/NK 30."""
    adata = make_cells(100)
    adata.obs["cell_type"] = np.repeat(["B", "Monocyte", "T/NK"], [40, 30, 30])
    return adata


def test_a_split_takes_its_share_of_each_label_and_each_cell_once(some):
    split = make_split(some)
    assert split.index.is_unique and set(split.index) == set(some.obs_names)
    assert split.index.is_monotonic_increasing
    tested = some.obs.loc[split.index[split["part"] == "test"], "cell_type"].value_counts()
    assert tested.to_dict() == {"B": 12, "Monocyte": 9, "T/NK": 9}


def test_a_split_follows_from_names_and_seed_not_from_the_order_of_cells(some):
    split = make_split(some)
    shuffled = some[np.random.default_rng(0).permutation(100)].copy()
    assert make_split(shuffled).equals(split)
    assert not make_split(some, seed=1).equals(split)
    tested = split.index[split["part"] == "test"]
    assert tested[:5].tolist() == ["cell0", "cell1", "cell10", "cell13", "cell18"]  # so on every machine


@pytest.mark.parametrize(("n_cells", "tested"), [(2, 1), (3, 1), (5, 2)])
def test_a_rare_label_is_on_both_sides(some, n_cells, tested):
    some.obs["cell_type"] = ["rare"] * n_cells + ["common"] * (100 - n_cells)
    split = make_split(some)
    assert (split.loc[some.obs_names[:n_cells], "part"] == "test").sum() == tested


def test_a_label_of_one_cell_is_refused(some):
    some.obs["cell_type"] = ["single"] + ["common"] * 99
    with pytest.raises(ValueError, match="'single' has one cell only"):
        make_split(some)


def test_a_saved_split_has_the_same_bytes_each_time_and_comes_back(some, tmp_path, monkeypatch):
    split = make_split(some)
    for name in ("first", "second"):
        hygiene.save_split(split, tmp_path / f"{name}.csv.gz")
    assert (tmp_path / "first.csv.gz").read_bytes() == (tmp_path / "second.csv.gz").read_bytes()
    monkeypatch.setattr(hygiene, "SPLITS", tmp_path)
    train, test = hygiene.load_split(some, "first")
    assert sorted([*train, *test]) == list(range(100))
    assert (np.diff(train) > 0).all() and (np.diff(test) > 0).all()
    assert set(some.obs_names[test]) == set(split.index[split["part"] == "test"])
    back = some[::-1].copy()
    assert set(back.obs_names[hygiene.load_split(back, "first")[1]]) == set(some.obs_names[test])


def test_cells_that_are_not_those_of_the_split_are_refused(some, tmp_path, monkeypatch):
    hygiene.save_split(make_split(some), tmp_path / "mine.csv.gz")
    monkeypatch.setattr(hygiene, "SPLITS", tmp_path)
    with pytest.raises(
        ValueError, match=r"not the 100 cells of the split mine: 0 are not in it and 1 of it are missing"
    ):
        hygiene.load_split(some[1:].copy(), "mine")
    other = some.copy()
    other.obs_names = ["stranger", *some.obs_names[1:]]
    with pytest.raises(ValueError, match=r"1 are not in it and 1 of it are missing \(first: stranger\)"):
        hygiene.load_split(other, "mine")
    with pytest.raises(ValueError, match="no saved split of yours; there are: .*mine"):
        hygiene.load_split(some, "yours")


def test_two_donors_of_kang_are_tested_whatever_trains(make_cells):
    cells = make_cells(n_cells=6)
    cells.obs["batch"] = ["101", "1016", "107", "1488", "1016", "1039"]
    train, test = hygiene.load_split(cells, "kang_pbmc")
    assert train.tolist() == [0, 2, 5]
    assert test.tolist() == [1, 3, 4]
    assert not set(datasets.CATALOGUE["pool_kang_extra"]["only"]["batch"]) & set(hygiene.find_tested()["kang_pbmc"])
    assert set(datasets.CATALOGUE["kang_stim"]["only"]["batch"]) == set(hygiene.find_tested()["kang_ctrl"])


@needs_files
def test_cells_of_another_pipeline_are_found_in_the_original_files():
    pool = scbert.datasets.load("pool_pbmc_10studies")
    found = hygiene.find_duplicates(pool, scbert.datasets.load("pbmc3k"))
    assert len(found) == found.attrs["same_barcode"] == 297
    assert found["overlap"].between(0.88, 0.96).all()
    assert set(pool.obs.loc[found["cell"], "batch"]) == {"GSE115189"}


def test_the_saved_file_holds_cell_names_and_parts_alone():
    file = hygiene.SPLITS / "zheng_facs.csv.gz"
    assert file.stat().st_size < 60_000
    lines = gzip.decompress(file.read_bytes()).decode().splitlines()
    assert lines[0] == "cell,part"
    assert len(lines) == 1 + 3874
    assert {line.split(",")[1] for line in lines[1:]} == {"train", "test"}


@needs_files
def test_the_saved_split_of_zheng_facs_is_the_one_that_make_split_makes(tmp_path):
    adata = scbert.datasets.load("zheng_facs")
    hygiene.save_split(make_split(adata), tmp_path / "again.csv.gz")
    saved, again = (pd.read_csv(path) for path in (hygiene.SPLITS / "zheng_facs.csv.gz", tmp_path / "again.csv.gz"))
    assert saved.equals(again)
    train, test = hygiene.load_split(adata)
    assert sorted([*train, *test]) == list(range(adata.n_obs))
    shares = adata.obs["cell_type"].iloc[test].value_counts() / adata.obs["cell_type"].value_counts()
    assert shares.between(0.297, 0.303).all()


# Small classes


def test_labels_under_20_cells_are_marked():
    table = hygiene.mark_small_classes(["b"] * 20 + ["a"] * 19 + ["c"] * 20 + ["d"])
    assert table.index.tolist() == ["b", "c", "a", "d"]
    assert table["cells"].tolist() == [20, 20, 19, 1]
    assert table["small"].tolist() == [False, False, True, True]
    assert not hygiene.mark_small_classes(["a"] * 19, minimum=19)["small"].any()


def test_the_labels_left_out_of_macro_f1_common_are_those_marked(make_cells):
    labels = np.repeat(["a", "b", "c"], [30, 20, 19])
    table = hygiene.mark_small_classes(pd.Categorical(labels))
    predicted = np.where(labels == "c", "c", "b")  # all right but the a
    predictions = pd.DataFrame({"method": "m", "cell": range(69), "truth": labels, "predicted": predicted})
    value = scbert.metrics.score(predictions, sizes=table["cells"]).loc[("m", "macro_f1_common"), "value"]
    f1_of_b = 2 * 20 / (20 + 50)
    assert table.index[~table["small"]].tolist() == ["a", "b"]
    assert value == pytest.approx((0 + f1_of_b) / 2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"test_share": 30}, "test_share must be between 0 and 1, not 30"),
        ({"test_share": 0}, "test_share must be between 0 and 1, not 0"),
        ({"label_key": "zzz"}, "has no column 'zzz' in obs"),
    ],
)
def test_a_split_that_makes_no_sense_is_refused(make_cells, options, message):
    with pytest.raises(ValueError, match=message):
        make_split(make_cells(), **options)


def test_missing_labels_are_not_split(make_cells):
    adata = make_cells()
    adata.obs["cell_type"] = adata.obs["cell_type"].astype(object).where(np.arange(adata.n_obs) > 3)
    with pytest.raises(ValueError, match="missing values: fill or drop them"):
        make_split(adata)


def test_counts_are_not_compared_with_their_logarithms(make_cells):
    adata, other = make_cells(), make_cells()
    other.X = other.X.log1p()
    with pytest.raises(ValueError, match="One of the sets holds counts and the other fractional values"):
        hygiene.find_duplicates(adata, other)
