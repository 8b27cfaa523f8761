"""Cells of several sets become one, without those that are tested on or that stand in two of them."""

import anndata
import numpy as np
import pytest

from scbert import cross_dataset, datasets, pretraining, protocols, simulate
from scbert.experiments.pretraining import join_sets, load_sets


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


def test_with_published_genes_a_set_that_lacks_one_has_none_of_it(two_sets, monkeypatch):
    published = ["gene29", "gene0", "gene7", "elsewhere", "old8"]
    asked = []

    def rename(adata, vocabulary):
        asked.append(vocabulary)
        return adata[:, :].copy() if adata.n_vars == 24 else rename_one(adata)

    def rename_one(adata):
        adata = adata.copy()
        adata.var_names = ["old8" if name == "gene8" else name for name in adata.var_names]
        return adata

    monkeypatch.setattr(pretraining, "load_vocabulary", lambda: published)
    monkeypatch.setattr(pretraining, "rename_genes", rename)
    learn, held_out = join_sets(two_sets, genes="published 2000")
    assert asked == [published] * 2
    assert sorted(learn.var_names) == sorted(held_out.var_names) == ["gene0", "gene29", "gene7", "old8"]
    one = (learn.obs["set"] == "one").to_numpy()
    assert not learn[one, ["gene29", "old8"]].X.nnz
    other = two_sets["other"][learn.obs_names[~one], ["gene0", "gene29", "gene7", "gene8"]].X
    assert (learn[~one, ["gene0", "gene29", "gene7", "old8"]].X.toarray() == other).all()
    assert (learn.obs["n_counts"][one] == 2000).all()  # of all genes, the published and the others


def test_library_sizes_are_of_all_genes_of_a_cells_own_set(two_sets):
    learn, _ = join_sets(two_sets)
    own = learn[learn.obs["set"] == "other"]
    source = two_sets["other"][own.obs_names]
    assert own.obs["n_counts"].to_numpy() == pytest.approx(np.asarray(source.X.sum(1)).ravel())
    assert (own.obs["n_counts"].to_numpy() > np.asarray(own.X.sum(1)).ravel()).all()
    assert (learn[learn.obs["set"] == "one"].obs["n_counts"] == 2000).all()


def test_the_cells_held_out_of_one_labelled_set_are_those_that_other_notebooks_test_on(two_sets):
    from scbert.evaluate.protocols import split_cells

    adata = two_sets["one"]
    learn, held_out = join_sets({"one": adata}, seed=5)
    (split,) = split_cells(adata, "one", seed=5)
    assert list(held_out.obs_names) == list(split.test)
    assert set(learn.obs_names) == {*split.train, *split.validation}
    assert (held_out.obs["cell_type"] == adata.obs["cell_type"][split.test].astype(str)).all()


def test_cells_that_the_catalogue_says_are_elsewhere_too_are_dropped(two_sets, monkeypatch, capsys):
    monkeypatch.setitem(datasets.CATALOGUE, "other", {"labels": False, "shares_cells_with": ["one"]})
    monkeypatch.setattr(cross_dataset.datasets, "load", lambda name, **options: two_sets[name])
    learn, held_out = join_sets({"other": two_sets["other"]})
    assert learn.n_obs + held_out.n_obs == 34
    assert "6 of 40 cells are in one too and were dropped" in capsys.readouterr().out


def test_the_pool_of_the_catalogue_is_kept_apart_from_the_set_that_shares_its_cells():
    assert datasets.CATALOGUE["pbmc_pool"]["shares_cells_with"] == ["pbmc_3tech"]


def test_a_set_without_labels_is_loaded_without(monkeypatch):
    asked = {}
    monkeypatch.setattr(
        cross_dataset.datasets, "load", lambda name, **options: asked.setdefault(name, options["label_key"])
    )
    load_sets("pbmc_pool + zheng_facs + my + file.h5ad".replace("my + file", "my+file"), label_key="cell_type")
    assert asked == {"pbmc_pool": None, "zheng_facs": "cell_type", "my+file.h5ad": "cell_type"}
    with pytest.raises(ValueError, match="names a set twice"):
        load_sets("zheng_facs + zheng_facs")


def test_sets_without_a_common_gene_are_refused(two_sets):
    two_sets["other"].var_names = [f"ENSG{i:011d}" for i in range(30)]
    with pytest.raises(ValueError, match="share no gene name"):
        join_sets(two_sets)


# Experiments


def load_experiments(text, *methods, **options):
    """Return name -> experiment."""
    experiments = cross_dataset.load_experiments(text, *methods, **options)
    assert all(type(one) is cross_dataset.Experiment for one in experiments)
    return {one.name: one for one in experiments}


def load_one(text, **options):
    """Return the cells of the only experiment."""
    (one,) = load_experiments(text, **options).values()
    return one.cells


@pytest.fixture
def files(make_cells, tmp_path, monkeypatch):
    """Two files: 60 cells of 24 genes, and 40 of 21 of these in another order and 5 more; six cells are in both."""
    monkeypatch.chdir(tmp_path)
    one, other = name_barcodes(make_cells(60), "a"), name_barcodes(make_cells(40, n_genes=26, seed=1), "b", start=100)
    values = other.X.toarray()
    values[:6, :21] = one.X[:6].toarray()[:, :21]
    other = anndata.AnnData(values, obs=other.obs.drop(columns="n_counts"), var=other.var)
    other.var_names = [*(f"gene{i}" for i in range(21)), *(f"other{i}" for i in range(5))]
    other = other[:, ::-1].copy()
    other.obs_names = [*(name.replace("a_", "b_") for name in one.obs_names[:6]), *other.obs_names[6:]]
    for adata in (one, other):
        adata.obs = adata.obs.rename(columns={"cell_type": "kind", "batch": "chip"})
        adata.obs["coarse"] = adata.obs["kind"].astype(str).map({"B": "B", "Monocyte": "not B", "T/NK": "not B"})
        adata.obs["chip"] = np.array(["c1", "c2", "c3"])[np.arange(adata.n_obs) // 2 % 3]
    one.write_h5ad("one.h5ad")
    other.write_h5ad("other.h5ad")
    return {"one": one, "other": other}


def test_a_set_alone_has_its_batches_as_studies(files):
    experiments = load_experiments("one.h5ad", label_key="kind", batch_key="chip")
    assert list(experiments) == ["one"]
    name, adata, train_on, methods = experiments["one"]
    assert (name, train_on, methods) == ("one", None, "")
    assert list(adata.obs_names) == list(files["one"].obs_names)
    assert (adata.X != files["one"].X).nnz == 0
    assert list(adata.obs["study"]) == list(files["one"].obs["chip"])
    assert list(adata.obs["kind"]) == list(files["one"].obs["kind"].astype(str))
    splits = protocols.carry_over(adata, label_key="kind")
    assert [split.protocol for split in splits] == ["held_out:c1", "held_out:c2", "held_out:c3"]


def test_of_a_set_with_tested_batches_these_alone_are_tested_and_all_others_train(files, monkeypatch):
    monkeypatch.setitem(cross_dataset.datasets.CATALOGUE, "one", {"kind": "cells", "tested": ["c2"]})
    monkeypatch.setattr(cross_dataset.datasets, "load", lambda name, **_: files[name.split(".")[0]].copy())
    for adata in files.values():
        adata.obs["batch"] = adata.obs["chip"]
    (experiment,) = load_experiments("one", label_key="kind", batch_key="batch").values()
    adata, is_c2 = experiment.cells, (files["one"].obs["chip"] == "c2").to_numpy()
    assert experiment.train_on == "one"
    assert list(adata.obs["study"]) == ["c2" if tested else "one" for tested in is_c2]
    [split] = protocols.carry_over(adata, train_on=experiment.train_on, label_key="kind")
    assert sorted(split.test) == sorted(adata.obs_names[is_c2])
    assert not {*split.train, *split.validation} & {*split.test}
    (arrow,) = load_experiments("one -> other.h5ad by coarse", label_key="kind").values()
    assert set(arrow.cells.obs["batch"]) == {"c1", "c2", "c3"}


def test_a_cell_that_two_studies_share_is_left_in_the_first_alone(files, capsys):
    one = files["one"]
    one = one[one.obs["chip"] != "c3"].copy()
    first, second = (np.flatnonzero(one.obs["chip"] == chip) for chip in ("c1", "c2"))
    values = one.X.toarray()
    values[second[:3]] = values[first[:3]]
    values[second[:3], 0] += 1  # counted by another pipeline: equal ones are left out before
    one = anndata.AnnData(values, obs=one.obs, var=one.var)
    names = one.obs_names.to_numpy().copy()
    names[second[:3]] = [name.replace("a_", "again_") for name in names[first[:3]]]
    one.obs_names = names
    one.write_h5ad("one.h5ad")
    adata = load_one("one.h5ad", label_key="kind", batch_key="chip")
    assert list(adata.obs_names) == list(np.delete(names, second[:3]))
    assert "3 of 20 cells of c2 are in an earlier study too and are left out." in capsys.readouterr().out


def test_cells_of_studies_with_fractional_counts_are_not_compared(files, capsys):
    one = files["one"]
    one.X = one.X * 0.5
    one.uns["scbert"] = {"fractional_counts": "halved"}
    one.write_h5ad("one.h5ad")
    adata = load_one("one.h5ad", label_key="kind", batch_key="chip")
    assert adata.n_obs == 60
    assert "Counts are fractional, so cells that two studies share cannot be told." in capsys.readouterr().out
    assert adata.uns["scbert"]["fractional_counts"] == "halved"


def test_without_batches_a_set_is_dealt_out_to_simulated_studies(files):
    options = {"label_key": "kind", "n_studies": 4, "severity": 2.0, "seed": 3}
    adata = load_one("one.h5ad", **options)
    expected = simulate.simulate_studies(datasets.load("one.h5ad", label_key="kind"), **options)
    assert (adata.X != expected.X).nnz == 0
    assert list(adata.obs["study"]) == list(expected.obs["study"])
    assert set(adata.obs["study"]) == {"study_0", "study_1", "study_2", "study_3"}
    assert (adata.X != files["one"].X).nnz > 0


def test_of_one_study_nothing_is_simulated(files):
    adata = load_one("one.h5ad", label_key="kind", n_studies=1, severity=9.0)
    assert (adata.X != files["one"].X).nnz == 0
    assert list(adata.obs_names) == list(files["one"].obs_names)
    assert set(adata.obs["study"]) == {"all"}
    assert list(adata.obs["kind"]) == list(files["one"].obs["kind"].astype(str))
    splits = protocols.hold_out_types(adata, "one", together=["B"], label_key="kind")
    assert set(adata.obs["kind"][splits[0].train]) == {"Monocyte", "T/NK"}
    with pytest.raises(ValueError, match=r"obs\['study'\] of adata has one value only \(all\)"):
        protocols.carry_over(adata, label_key="kind")
    with_batches = load_one("one.h5ad", label_key="kind", batch_key="chip", n_studies=1)
    assert set(with_batches.obs["study"]) == {"c1", "c2", "c3"}


def test_with_an_arrow_two_sets_are_joined_on_the_genes_of_both_without_cells_of_both(files, capsys):
    experiments = load_experiments("one.h5ad -> other.h5ad by coarse", label_key="cell_type")
    assert list(experiments) == ["one->other"]
    adata = experiments["one->other"].cells
    assert "6 of 40 cells are in one.h5ad too and were dropped" in capsys.readouterr().out
    assert list(adata.var_names) == [f"gene{i}" for i in range(21)]
    assert list(adata.obs_names) == [*files["one"].obs_names, *files["other"].obs_names[6:]]
    for name, start in (("one", 0), ("other", 6)):
        own, source = adata[(adata.obs["study"] == name).to_numpy()], files[name][start:]
        assert (own.X.toarray() == source[:, adata.var_names].X).all()
        assert list(own.obs["cell_type"]) == list(own.obs["coarse"]) == list(source.obs["coarse"])
    totals = np.asarray(files["other"].X.sum(1)).ravel()[6:]
    assert list(adata.obs["n_counts"]) == [2000] * 60 + list(totals)
    assert adata.uns["scbert"] == {"caveat": ""}
    assert (experiments["one->other"].train_on, experiments["one->other"].caveat) == ("one", "")
    [split] = protocols.carry_over(adata, train_on="one")
    assert set(adata.obs["study"][split.train]) == {"one"}
    assert set(adata.obs_names[60:]) < set(split.test)
    assert len(split.test) == 34 + 12  # and a fifth of the first


@pytest.mark.parametrize("key", ["study", "set", "scbert_cell_type"])
def test_columns_that_an_experiment_writes_hold_no_labels(make_cells, tmp_path, key):
    adata = make_cells()
    adata.obs[key] = adata.obs["cell_type"]
    adata.write_h5ad(tmp_path / "mine.h5ad")
    for text, named in ((str(tmp_path / "mine.h5ad"), key), (f"{tmp_path / 'mine.h5ad'} by {key}", "cell_type")):
        with pytest.raises(ValueError, match=rf"obs\['{key}'\] is a column that scbert writes itself"):
            load_experiments(text, label_key=named)


def test_cells_of_the_same_name_in_two_sets_are_two_cells(make_cells, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate(("one", "other")):
        make_cells(30, seed=seed).write_h5ad(f"{name}.h5ad")
    adata = load_one("one.h5ad -> other.h5ad")
    assert adata.obs_names.is_unique
    assert list(adata.obs_names[:30]) == [f"cell{i}" for i in range(30)]
    assert adata.obs["study"].value_counts().to_dict() == {"one": 30, "other": 30}


def test_several_experiments_have_columns_of_the_same_names(files):
    experiments = load_experiments(
        " one.h5ad; one.h5ad->other.h5ad by coarse ; other.h5ad by kind;", label_key="kind", n_studies=2
    )
    assert list(experiments) == ["one", "one->other", "other"]
    for name, labels in (("one", 3), ("one->other", 2), ("other", 3)):
        obs = experiments[name].cells.obs
        assert obs["kind"].nunique() == labels
        assert {type(value) for column in ("kind", "study") for value in obs[column]} == {str}
    assert [one.train_on for one in experiments.values()] == [None, "one", None]
    assert [one.file_name for one in experiments.values()] == ["one", "one_to_other", "other"]


def test_the_name_of_another_column_stays_with_its_experiment(files):
    experiments = load_experiments("one.h5ad by coarse; other.h5ad", label_key="kind", batch_key="chip")
    assert set(experiments["one"].cells.obs["kind"]) == {"B", "not B"}
    assert set(experiments["other"].cells.obs["kind"]) == {"B", "Monocyte", "T/NK"}


def test_caveats_of_both_sets_are_handed_on_and_labels_that_come_from_the_other_are_said(files, monkeypatch):
    catalogue = {"mine": {"labels_from": ["theirs"]}, "theirs": {"labels_from": []}}
    files["one"].uns["scbert"] = {"caveat": "Old cells."}
    files["other"].uns["scbert"] = {"caveat": "New cells."}
    loaded = {"theirs": files["one"], "mine": files["other"]}
    monkeypatch.setattr(cross_dataset.datasets, "CATALOGUE", catalogue)
    monkeypatch.setattr(cross_dataset.datasets, "load", lambda name, **options: loaded[name].copy())
    there = load_experiments("theirs -> mine", label_key="kind")["theirs->mine"].caveat.split("\n")
    assert there[:2] == ["theirs: Old cells.", "mine: New cells."]
    assert there[2].startswith("The labels of mine were made by comparing its cells with those of theirs: ")
    back = load_experiments("mine -> theirs", label_key="kind")["mine->theirs"].caveat.split("\n")
    assert back == ["mine: New cells.", "theirs: Old cells."]


def test_the_demo_set_is_known_to_have_its_labels_from_the_sorted_cells():
    assert datasets.CATALOGUE["pbmc68k_reduced"]["labels_from"] == ["zheng_facs"]


def test_two_sets_of_which_one_is_fractional_say_so(files):
    for name in ("one", "other"):
        files[name].X = files[name].X * 0.5
        files[name].uns["scbert"] = {"fractional_counts": f"{name} is halved"}
        files[name].write_h5ad(f"{name}.h5ad")
    adata = load_one("one.h5ad -> other.h5ad", label_key="kind")
    assert adata.uns["scbert"]["fractional_counts"] == "one is halved; other is halved"


def test_methods_that_need_whole_counts_are_left_out_of_fractional_ones_alone(files, capsys):
    files["one"].X = files["one"].X * 0.5
    files["one"].uns["scbert"] = {"fractional_counts": "halved"}
    files["one"].write_h5ad("one.h5ad")
    asked = "majority scanvi scbert"
    experiments = load_experiments("other.h5ad; one.h5ad", asked, label_key="kind", batch_key="chip")
    assert {name: one.methods for name, one in experiments.items()} == {"other": asked, "one": "majority scbert"}
    said = capsys.readouterr().out
    assert "one has fractional counts, so scanvi is left out there: it models whole counts." in said
    assert "other has" not in said
    load_experiments("one.h5ad", "majority", label_key="kind", batch_key="chip")
    assert "left out there" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "dataset is empty: name a set, or 'one -> other'"),
        (" ; ", "dataset is empty: name a set, or 'one -> other'"),
        ("one.h5ad -> other.h5ad -> one.h5ad", "dataset must be a set, or like 'one -> other by column', not 'one"),
        ("-> other.h5ad", "dataset must be a set, or like 'one -> other by column', not '-> other.h5ad'"),
        ("one.h5ad ->", "dataset must be a set, or like 'one -> other by column', not 'one.h5ad ->'"),
        ("one.h5ad; one.h5ad by coarse", "dataset names one.h5ad by coarse twice"),
        ("one.h5ad -> other.h5ad by typo", "one.h5ad has no column 'typo' in obs"),
        ("nothing.h5ad", "There is no file nothing.h5ad"),
        ("one.h5ad -> one.h5ad", "both sets are called one: an experiment is from one set to another"),
        ("one.h5ad -> more/one.h5ad", "both sets are called one: an experiment is from one set to another"),
    ],
)
def test_experiments_of_another_form_are_refused(files, text, reason, tmp_path):
    (tmp_path / "more").mkdir()
    files["other"].write_h5ad(tmp_path / "more" / "one.h5ad")
    with pytest.raises(ValueError, match=reason):
        load_experiments(text, label_key="kind")


def test_a_batch_column_that_is_missing_is_refused(files):
    with pytest.raises(ValueError, match="one.h5ad has no column 'donor' in obs"):
        load_experiments("one.h5ad", label_key="kind", batch_key="donor")


def test_what_cannot_be_read_is_refused_before_anything_is_loaded(files, monkeypatch):
    monkeypatch.setattr(cross_dataset.datasets, "load", lambda *names, **options: pytest.fail("loaded"))
    for text in ("one.h5ad; -> other.h5ad", "one.h5ad; one.h5ad"):
        with pytest.raises(ValueError, match="dataset"):
            load_experiments(text, label_key="kind")
