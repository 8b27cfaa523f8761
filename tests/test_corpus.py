"""Cells of several sets become one, without those that are tested on or that stand in two of them."""

import anndata
import numpy as np
import pytest

from scbert import corpus, datasets
from scbert.corpus import join_sets, load_sets


def name_barcodes(adata, prefix, start=0):
    """Give cells 10x barcodes, another one each."""
    letters = np.array(list("ACGT"))
    digits = (np.arange(start, start + adata.n_obs)[:, None] // 4 ** np.arange(16)) % 4
    adata.obs_names = [f"{prefix}_{''.join(letters[row])}-1" for row in digits]
    return adata


@pytest.fixture
def two_sets(make_cells):
    """60 labelled cells of 24 genes, and 40 without labels of 30, six of which are the same cells."""
    one, other = make_cells(60), make_cells(40, n_genes=30, seed=1)
    del other.obs["cell_type"], other.obs["n_counts"]
    values = other.X.toarray()
    values[:6, :24] = one.X[:6].toarray()
    other = anndata.AnnData(values, obs=other.obs, var=other.var)
    name_barcodes(one, "a")
    name_barcodes(other, "b", start=100)
    other.obs_names = [*(name.replace("a_", "b_") for name in one.obs_names[:6]), *other.obs_names[6:]]
    return {"one": one, "other": other}


def test_cells_of_both_sets_are_on_one_side_only_and_a_cell_of_both_is_kept_once(two_sets, capsys):
    learn, held_out = join_sets(two_sets, seed=3)
    assert "6 of 40 cells are in one too and were dropped" in capsys.readouterr().out
    assert learn.n_obs + held_out.n_obs == 60 + 34
    assert not set(learn.obs_names) & set(held_out.obs_names)
    assert held_out.obs["set"].value_counts().to_dict() == {"one": 12, "other": 1}  # a fifth, and a twentieth
    assert list(learn.var_names) == [f"gene{i}" for i in range(24)]


def test_library_sizes_are_of_all_genes_of_a_cells_own_set(two_sets):
    learn, _ = join_sets(two_sets)
    own = learn[learn.obs["set"] == "other"]
    source = two_sets["other"][own.obs_names]
    assert own.obs["n_counts"].to_numpy() == pytest.approx(np.asarray(source.X.sum(1)).ravel())
    assert (own.obs["n_counts"].to_numpy() > np.asarray(own.X.sum(1)).ravel()).all()
    assert (learn[learn.obs["set"] == "one"].obs["n_counts"] == 2000).all()


def test_the_cells_held_out_of_one_labelled_set_are_those_that_other_notebooks_test_on(two_sets):
    from scbert.protocols import split_cells

    adata = two_sets["one"]
    learn, held_out = join_sets({"one": adata}, seed=5)
    train, validation, test = split_cells(adata, "one", seed=5)[0]
    assert list(held_out.obs_names) == list(adata.obs_names[test])
    assert set(learn.obs_names) == set(adata.obs_names[[*train, *validation]])
    assert (held_out.obs["cell_type"] == adata.obs["cell_type"].iloc[test].astype(str)).all()


def test_cells_that_the_catalogue_says_are_elsewhere_too_are_dropped(two_sets, monkeypatch, capsys):
    monkeypatch.setitem(datasets.CATALOGUE, "other", {"labels": False, "shares_cells_with": ["one"]})
    monkeypatch.setattr(corpus.datasets, "load", lambda name, **options: two_sets[name])
    learn, held_out = join_sets({"other": two_sets["other"]})
    assert learn.n_obs + held_out.n_obs == 34
    assert "6 of 40 cells are in one too and were dropped" in capsys.readouterr().out


def test_the_pool_of_the_catalogue_is_kept_apart_from_the_set_that_shares_its_cells():
    assert datasets.CATALOGUE["pbmc_pool"]["shares_cells_with"] == ["pbmc_3tech"]


def test_a_set_without_labels_is_loaded_without(monkeypatch):
    asked = {}
    monkeypatch.setattr(corpus.datasets, "load", lambda name, **options: asked.setdefault(name, options["label_key"]))
    load_sets("pbmc_pool + zheng_facs + my + file.h5ad".replace("my + file", "my+file"), label_key="cell_type")
    assert asked == {"pbmc_pool": None, "zheng_facs": "cell_type", "my+file.h5ad": "cell_type"}
    with pytest.raises(ValueError, match="names a set twice"):
        load_sets("zheng_facs + zheng_facs")


def test_sets_without_a_common_gene_are_refused(two_sets):
    two_sets["other"].var_names = [f"ENSG{i:011d}" for i in range(30)]
    with pytest.raises(ValueError, match="share no gene name"):
        join_sets(two_sets)
