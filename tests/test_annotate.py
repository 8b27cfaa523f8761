"""What is written into the cells, that it depends on nothing but the cell, and that nothing else is touched."""

import os
import subprocess
import sys
from dataclasses import replace

import anndata
import numpy as np
import pandas as pd
import pytest
import torch

import scbert
from scbert import annotate, embed, predict_proba
from scbert.annotate import read_out
from scbert.data.preprocess import tokenize
from scbert.scale.stream import plan_batches


def test_labels_confidence_probabilities_and_embedding_are_written(make_cells, classifier):
    adata = make_cells()
    annotate(adata, classifier, unassigned_below=0.0)
    probabilities = adata.obsm["scbert_probabilities"]
    assert probabilities.columns.tolist() == ["B", "Monocyte", "T|NK"]
    assert probabilities.index.equals(adata.obs_names)
    assert probabilities.sum(axis=1).to_numpy() == pytest.approx(np.ones(60), abs=1e-6)
    best = probabilities.to_numpy().argmax(1)
    assert adata.obs["scbert_cell_type"].tolist() == [classifier.labels[i] for i in best]
    assert adata.obs["scbert_confidence"].tolist() == probabilities.max(axis=1).tolist()
    assert adata.obsm["X_scbert"].shape == (60, 8)
    assert adata.obs["scbert_cell_type"].nunique() > 1  # or all of this says little


def test_it_says_what_the_model_says(cells, classifier):
    import torch

    bins = scbert.cells.CellDataset(cells).batch(range(60))
    expected = torch.softmax(classifier(bins), 1).detach().numpy()
    assert predict_proba(classifier, cells).to_numpy() == pytest.approx(expected, abs=1e-6)
    assert predict_proba(classifier, cells).columns.tolist() == classifier.labels
    annotate(cells, classifier)
    assert cells.obsm["scbert_probabilities"].to_numpy() == pytest.approx(expected, abs=1e-6)


def test_cells_below_the_threshold_are_unassigned_and_the_others_are_not(make_cells, classifier):
    adata = make_cells()
    confidence = predict_proba(classifier, adata).max(axis=1)
    threshold = float(confidence.sort_values().iloc[30])  # the 31st cell is just sure enough
    annotate(adata, classifier, unassigned_below=threshold)
    is_unassigned = adata.obs["scbert_cell_type"] == "Unassigned"
    assert is_unassigned.tolist() == (confidence < threshold).tolist()
    assert is_unassigned.sum() == adata.uns["scbert"]["annotate"]["unassigned"] == 30
    assert adata.uns["scbert"]["annotate"]["unassigned_below"] == threshold


def test_a_cell_without_tokens_is_unassigned(make_cells, classifier):
    adata = make_cells()
    adata.obs.loc["cell3", "n_counts"] = 1e9
    annotate(adata, classifier, unassigned_below=0.0)
    assert (adata.obs["scbert_cell_type"] == "Unassigned").to_numpy().nonzero()[0].tolist() == [3]
    assert adata.uns["scbert"]["annotate"]["cells_without_tokens"] == 1
    assert not adata.obsm["X_scbert"][3].any()
    assert np.isfinite(adata.obs["scbert_confidence"]).all()


def test_cells_sorted_by_length_come_back_in_their_order(make_cells, classifier, monkeypatch):
    classifier.encoder.set_expressed_only(True)
    adata = make_cells()
    alone = np.concatenate([scbert.predict_proba(classifier, adata[i : i + 1].copy()) for i in range(adata.n_obs)])
    monkeypatch.setattr("scbert.scale.stream.CELLS_A_WINDOW", 23)
    monkeypatch.setattr("scbert.scale.stream.POSITIONS", 100)
    for batch_size in (None, 4):
        np.testing.assert_allclose(scbert.predict_proba(classifier, adata, batch_size=batch_size), alone, atol=1e-6)
        for pool in ("expressed", "all"):
            vectors = scbert.embed(classifier, adata, pool=pool, batch_size=batch_size)
            one = scbert.embed(classifier, adata[5:6].copy(), pool=pool)[0]
            np.testing.assert_allclose(vectors[5], one, atol=1e-6)


def test_batches_hold_cells_of_about_one_length_up_to_a_number_of_positions():
    config = scbert.ScBertConfig(10, expressed_only=True)
    lengths = np.array([900, 10, 4_000, 12, 5_000, 11])
    assert [batch.tolist() for batch in plan_batches(lengths, config, None)] == [[1, 5, 3, 0, 2], [4]]
    assert [batch.tolist() for batch in plan_batches(lengths, config, 4)] == [[1, 5, 3, 0], [2, 4]]
    for other in ({"expressed_only": False}, {"key_stabiliser": "batch"}):
        batches = plan_batches(lengths, replace(config, **other), 4)
        assert [batch.tolist() for batch in batches] == [[0, 1, 2, 3], [4, 5]]


def test_the_batch_size_changes_nothing(make_cells, classifier):
    adata = make_cells()
    adata.X[0] *= 50  # a cell that would pull the others along
    adata.obs.loc["cell0", "n_counts"] = 100_000
    for function in (predict_proba, embed):
        results = [np.asarray(function(classifier, adata, batch_size=size)) for size in (1, 7, 60)]
        assert results[0] == pytest.approx(results[1], abs=1e-6)
        assert results[0] == pytest.approx(results[2], abs=1e-6)


def test_shuffled_and_extra_genes_change_nothing_and_missing_ones_count_as_zero(make_cells, classifier):
    expected, zeroed = make_cells(), make_cells()
    order = np.random.default_rng(0).permutation(24)
    extra = anndata.AnnData(
        np.ones((60, 2), dtype=np.float32), obs=expected.obs[[]], var=pd.DataFrame(index=["x", "y"])
    )
    shuffled = anndata.concat([extra, expected[:, order]], axis=1, merge="first")
    assert shuffled.n_vars == 26
    assert predict_proba(classifier, shuffled).equals(predict_proba(classifier, expected))

    zeroed.X = zeroed.X.toarray()
    zeroed.X[:, [2, 9]] = 0
    kept = [name for name in expected.var_names if name not in ("gene2", "gene9")]
    missing = expected[:, kept].copy()
    assert predict_proba(classifier, missing).equals(predict_proba(classifier, zeroed))
    annotate(missing, classifier)
    assert missing.uns["scbert"]["annotate"]["genes_matched"] == 22


def test_tokenized_cells_whose_genes_were_reordered_since_are_tokenized_anew(cells, classifier):
    reordered = cells[:, ::-1].copy()  # the tokens and their report came along
    assert predict_proba(classifier, reordered).equals(predict_proba(classifier, cells))


@pytest.mark.parametrize("tokenized", [True, False])
def test_counts_layers_and_columns_are_left_as_they_were(make_cells, classifier, tokenized):
    adata = make_cells()
    adata.layers["spliced"] = adata.X * 2
    if tokenized:
        tokenize(adata)
    before = adata.copy()
    annotate(adata, classifier)
    assert (adata.X != before.X).nnz == 0
    assert list(adata.layers) == list(before.layers)
    assert all((adata.layers[name] != before.layers[name]).nnz == 0 for name in before.layers)
    assert adata.obs[before.obs.columns.tolist()].equals(before.obs)
    columns = ["cell_type", "confidence", "logistic_regression", "nearest_centroid", "consensus", "agreement"]
    columns += ["distance", "unlike_training"]
    assert set(adata.obs) - set(before.obs) == {f"scbert_{name}" for name in columns}
    assert adata.var.equals(before.var)
    assert adata.uns["scbert"].get("tokenize") == before.uns.get("scbert", {}).get("tokenize")


def test_predicting_and_embedding_leave_the_cells_alone(make_cells, classifier):
    adata = make_cells()
    predict_proba(classifier, adata)
    embed(classifier, adata)
    assert not adata.layers
    assert not adata.uns
    assert not adata.obsm


def test_an_annotation_that_was_killed_goes_on_from_what_is_kept(make_cells, classifier, tmp_path, monkeypatch):
    monkeypatch.setattr(scbert.stream, "CELLS_A_WINDOW", 16)
    whole, one, other = (make_cells() for _ in range(3))
    annotate(whole, classifier)
    calls = []

    def stop(*_):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt

    classifier.head.register_forward_pre_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        annotate(one, classifier, keep=tmp_path / "kept")
    assert len([*(tmp_path / "kept").iterdir()]) == 2
    damaged = next((tmp_path / "kept").iterdir())
    damaged.write_bytes(damaged.read_bytes()[:-30])
    annotate(other, classifier, keep=tmp_path / "kept")
    assert len(calls) == 3 + 3  # the damaged block, and the two that were not there
    pd.testing.assert_frame_equal(other.obs, whole.obs)
    assert (other.obsm["X_scbert"] == whole.obsm["X_scbert"]).all()


def test_what_another_model_said_is_not_gone_on_with(make_cells, classifier, tmp_path):
    one, other = make_cells(), make_cells()
    annotate(one, classifier, keep=tmp_path / "kept")
    with torch.no_grad():
        classifier.head.dense[-1].bias[0] += 1
    annotate(other, classifier, keep=tmp_path / "kept")
    one, other = (adata.obsm["scbert_probabilities"].to_numpy() for adata in (one, other))
    assert (one[:, 0] < other[:, 0]).all()


def test_where_nothing_can_be_kept_all_is_annotated_with_a_warning(make_cells, classifier, tmp_path):
    (tmp_path / "kept").write_text("a file")
    adata = make_cells()
    with pytest.warns(UserWarning, match=r"kept can't be written .*: killed from here on, nothing is kept"):
        annotate(adata, classifier, keep=tmp_path / "kept")
    assert "scbert_cell_type" in adata.obs


def test_annotating_twice_gives_the_same(make_cells, classifier):
    adata = make_cells()
    annotate(adata, classifier)
    first = adata.copy()
    annotate(adata, classifier)
    assert adata.obs.equals(first.obs)
    assert (adata.obsm["X_scbert"] == first.obsm["X_scbert"]).all()


def test_annotated_cells_survive_a_file_though_a_label_has_a_slash(make_cells, classifier, tmp_path):
    adata = make_cells()
    annotate(adata, classifier, unassigned_below=0.0)
    assert "T/NK" in set(adata.obs["scbert_cell_type"])
    adata.write_h5ad(tmp_path / "annotated.h5ad")
    back = anndata.read_h5ad(tmp_path / "annotated.h5ad")
    assert back.obs["scbert_cell_type"].tolist() == adata.obs["scbert_cell_type"].tolist()
    pd.testing.assert_frame_equal(back.obsm["scbert_probabilities"], adata.obsm["scbert_probabilities"])
    assert (back.obsm["X_scbert"] == adata.obsm["X_scbert"]).all()
    assert back.uns["scbert"]["annotate"] == adata.uns["scbert"]["annotate"]


def test_backed_cells_are_annotated_like_those_in_memory(make_cells, classifier, tmp_path):
    adata = make_cells()
    adata.write_h5ad(tmp_path / "cells.h5ad")
    backed = anndata.read_h5ad(tmp_path / "cells.h5ad", backed="r")
    annotate(adata, classifier)
    annotate(backed, classifier)
    assert backed.obs["scbert_cell_type"].tolist() == adata.obs["scbert_cell_type"].tolist()
    backed.file.close()


def test_a_model_with_a_label_called_unassigned_is_no_trouble(make_cells, classifier):
    classifier.labels[0] = "Unassigned"
    adata = make_cells()
    annotate(adata, classifier)
    assert adata.obs["scbert_cell_type"].cat.categories.tolist() == ["Unassigned", "Monocyte", "T/NK"]


@pytest.mark.parametrize("pool", ["expressed", "all"])
def test_the_embedding_is_the_mean_of_the_encoders_output_over_genes(cells, encoder, pool):
    encoder.genes = list(cells.var_names)
    bins = scbert.cells.CellDataset(cells).batch(range(60))
    hidden = encoder.encode(bins).detach().numpy()
    expected = [
        h[:-1][b[:-1] > 0].mean(0) if pool == "expressed" else h[:-1].mean(0)
        for h, b in zip(hidden, bins.numpy(), strict=True)
    ]
    assert embed(encoder, cells, pool=pool) == pytest.approx(np.array(expected), abs=1e-5)


def test_an_unknown_pool_is_refused(cells, classifier):
    with pytest.raises(ValueError, match="'expressed' or 'all', not 'max'"):
        embed(classifier, cells, pool="max")


def test_cells_without_a_shared_gene_are_refused(make_cells, classifier):
    adata = make_cells()
    adata.var_names = [f"ENSG{i}" for i in range(24)]
    with pytest.raises(ValueError, match="None of the data's 24 genes .* is in the vocabulary of 24"):
        annotate(adata, classifier)
    assert "scbert_cell_type" not in adata.obs


@pytest.mark.parametrize("first", ["import scbert", "import scbert.annotate", "from scbert.annotate import embed"])
def test_scbert_annotate_is_a_function_and_importing_it_waits_for_neither_torch_nor_scanpy(first):
    code = (
        f"{first}; import sys, scbert, scbert.annotate; assert scbert.annotate.__name__ == 'annotate'; "
        "assert callable(scbert.annotate); slow = {'torch', 'scanpy', 'sklearn'} & set(sys.modules); assert not slow, slow"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_package_and_its_command_line_answer_before_anything_large_is_loaded():
    code = "import sys, scbert.__main__; slow = {'numpy', 'pandas', 'torch', 'anndata'} & set(sys.modules); assert not slow, slow"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(("given", "expected"), [({}, "PASSIVE 4 None"), ({"OMP_WAIT_POLICY": "ACTIVE"}, "ACTIVE 4 None"),
                                                 ({"OMP_NUM_THREADS": "2"}, "PASSIVE 4 2")])  # fmt: skip
def test_threads_that_wait_sleep_unless_the_user_says_otherwise(given, expected):
    names = ("OMP_WAIT_POLICY", "OPENBLAS_THREAD_TIMEOUT", "NUMBA_NUM_THREADS")
    left_out = {*names, "OMP_NUM_THREADS"}
    environment = {name: value for name, value in os.environ.items() if name not in left_out} | given
    code = f"import os, scbert; print(*map(os.environ.get, {names}))"
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == expected


def test_every_name_the_package_offers_is_there():
    for name in scbert.__all__:
        assert getattr(scbert, name) is not None
    with pytest.raises(AttributeError, match="has no attribute 'anotate'"):
        scbert.anotate  # noqa: B018


def test_values_that_are_no_counts_are_refused(classifier, make_cells):
    adata = make_cells()
    adata.X = np.log1p(adata.X)
    with pytest.raises(ValueError, match="fractional values .*put the raw counts into X"):
        scbert.annotate(adata, classifier)


@pytest.mark.parametrize("batch_size", [7, 60])
def test_logits_and_vectors_are_read_out_of_one_pass(make_cells, classifier, batch_size, monkeypatch):
    adata = make_cells()
    adata.obs.loc["cell3", "n_counts"] = 1e9  # without a token
    before = adata.copy()
    logits, vectors = read_out(classifier, adata, batch_size=batch_size)
    own = np.exp(logits.to_numpy(np.float64))
    probabilities = predict_proba(classifier, adata)
    assert own / own.sum(1, keepdims=True) == pytest.approx(probabilities.to_numpy(), abs=1e-6)
    assert (logits.to_numpy().argmax(1) == probabilities.to_numpy().argmax(1)).all()
    assert logits.index.equals(adata.obs_names)
    assert logits.columns.tolist() == classifier.labels
    assert vectors == pytest.approx(embed(classifier, adata), abs=1e-6)
    assert not vectors[3].any()
    pd.testing.assert_frame_equal(adata.obs, before.obs)
    assert not adata.layers and not adata.obsm and not adata.uns
    passes, encode = [], classifier.encoder.encode
    monkeypatch.setattr(classifier.encoder, "encode", lambda bins: passes.append(len(bins)) or encode(bins))
    read_out(classifier, adata, batch_size=batch_size)
    assert sum(passes) == 60


def test_logits_are_what_the_model_says(cells, classifier):
    bins = scbert.cells.CellDataset(cells).batch(range(60))
    logits, _ = read_out(classifier, cells)
    assert logits.to_numpy() == pytest.approx(classifier(bins).detach().numpy(), abs=1e-5)
    assert np.ptp(logits.to_numpy()) > 0.1


# What the model remembers of its training cells


def test_genes_that_training_never_saw_change_nothing_and_are_counted(make_cells, config):
    train = make_cells(seed=2)
    train.X = train.X.toarray()
    train.X[:, [3, 7]] = 0
    model = scbert.ScBert(config)
    classifier = scbert.finetune(model, tokenize(train), n_epochs=1, accelerator="cpu", progress=False)
    query = make_cells()
    cut = query[:, [gene not in ("gene3", "gene7") for gene in query.var_names]].copy()
    assert predict_proba(classifier, query).equals(predict_proba(classifier, cut))
    assert (embed(classifier, query) == embed(classifier, cut)).all()
    annotate(query, classifier)
    annotate(cut, classifier)
    assert query.uns["scbert"]["annotate"]["genes_ignored"] == 2
    assert cut.uns["scbert"]["annotate"]["genes_ignored"] == 0


def test_a_bundle_remembers_which_genes_training_saw(make_cells, classifier, tmp_path):
    classifier.remember({"genes_seen": classifier.memory["genes_seen"] & (torch.arange(24) != 5)})
    classifier.save(tmp_path / "bundle")
    back = scbert.load(tmp_path / "bundle")
    assert back.encoder.genes_seen.tolist() == [i != 5 for i in range(25)]
    adata = make_cells()
    assert predict_proba(back, adata).equals(predict_proba(classifier, adata))


def test_what_training_saw_is_remembered_on_the_device_of_the_weights(classifier):
    classifier.to("meta")  # as after training on a GPU
    classifier.remember(classifier.memory)
    assert classifier.encoder.genes_seen.device.type == "meta"


@pytest.mark.parametrize("change", ["reversed", "thinned", "a token too high", "a token of nothing"])
def test_tokens_of_other_counts_are_not_used(make_cells, classifier, change):
    adata = tokenize(make_cells())
    if change == "reversed":
        adata.X = adata.X[::-1].copy()
    elif change == "thinned":
        adata.X = adata.X.multiply(np.arange(24) % 2).tocsr()
        adata = adata[np.asarray(adata.X.sum(1)).ravel() > 0].copy()
    elif change == "a token too high":
        adata.layers["bins"].data[5] = 9
    else:
        bins = adata.layers["bins"].tolil()
        bins[0, np.flatnonzero(adata.X[0].toarray()[0] == 0)[0]] = 1
        adata.layers["bins"] = bins.tocsr()
    fresh = make_cells()[: adata.n_obs].copy()
    fresh.X, fresh.obs = adata.X.copy(), adata.obs[["n_counts"]].copy()
    assert predict_proba(classifier, adata).equals(predict_proba(classifier, fresh))
    with pytest.raises(ValueError, match="not those of the counts in X"):
        scbert.finetune(classifier.encoder, adata, n_epochs=1, progress=False)


@pytest.mark.parametrize("threshold", [50, -0.1, float("nan")])
def test_a_threshold_that_is_no_probability_is_refused(make_cells, classifier, threshold):
    with pytest.raises(ValueError, match="must be a probability between 0 and 1"):
        annotate(make_cells(), classifier, unassigned_below=threshold)


def test_uns_of_another_program_is_left_alone_in_a_sentence(make_cells, classifier):
    adata = make_cells()
    adata.uns["scbert"] = "mine"
    with pytest.raises(ValueError, match=r"uns\['scbert'\] holds something of another program \(str\)"):
        annotate(adata, classifier)
    assert adata.uns["scbert"] == "mine"


def test_labels_become_columns_that_a_file_can_hold(make_cells, classifier, tmp_path):
    classifier.labels = ["a/b", "a|b", ""]
    adata = make_cells()
    annotate(adata, classifier)
    assert adata.obsm["scbert_probabilities"].columns.tolist() == ["a|b", "a|b (2)", "label"]
    adata.write_h5ad(tmp_path / "cells.h5ad")
    back = anndata.read_h5ad(tmp_path / "cells.h5ad")
    assert back.obsm["scbert_probabilities"].equals(adata.obsm["scbert_probabilities"])


def test_a_refusal_says_which_layer_may_hold_the_counts(make_cells, classifier):
    adata = make_cells()
    adata.layers["counts"] = adata.X.copy()
    adata.X = adata.X.toarray() - 1.5
    with pytest.raises(ValueError, match=r"negative values .*; layers\['counts'\] may hold them"):
        scbert.annotate(adata, classifier)


IDS = {"B": "CL:0000236", "Monocyte": "CL:0000576", "T/NK": "CL:0000542"}


def learn_with_ids(adata, encoder, label_key="cell_type"):
    """Fine-tune for an epoch and return label -> identifier, as the model knows it."""
    options = {"n_epochs": 1, "companions": False, "accelerator": "cpu", "progress": False}
    return scbert.finetune(encoder, tokenize(adata), label_key=label_key, **options)


def test_identifiers_beside_the_labels_come_back_with_the_names(make_cells, encoder, tmp_path):
    adata = make_cells()
    adata.obs["cell_type_ontology_term_id"] = pd.Categorical([IDS[label] for label in adata.obs["cell_type"]])
    classifier = learn_with_ids(adata, encoder)
    assert classifier.ontology_ids == IDS
    classifier.save(tmp_path / "model")
    query = make_cells(30, seed=1)
    query.obs.loc["cell3", "n_counts"] = 1e9  # without a token
    annotate(query, scbert.load(tmp_path / "model"), unassigned_below=0.34)
    expected = [(IDS | {"Unassigned": "unknown"})[label] for label in query.obs["scbert_cell_type"]]
    assert query.obs["scbert_cell_type_ontology_term_id"].tolist() == expected
    assert expected[3] == "unknown"
    assert len(set(expected)) > 1
    query.write_h5ad(tmp_path / "named.h5ad")
    table = scbert.annotated.summarise(query)
    known = IDS | {"Unassigned": "unknown"}
    assert table["ontology_term_id"].dropna().to_dict() == {
        label: known[label] for label in table.index[table["cells"] > 0]
    }
    assert "scbert_cell_type_ontology_term_id" in scbert.annotated.take_columns(query)


def test_only_an_identifier_that_all_cells_of_a_label_have_is_kept(make_cells, encoder):
    adata = make_cells()
    ids = pd.Series([IDS[label] for label in adata.obs["cell_type"]], adata.obs_names)
    ids[adata.obs_names[:30:3]] = "CL:0000788"  # half of the B cells are naive ones
    ids[adata.obs["cell_type"] == "Monocyte"] = "unknown"
    adata.obs["cell_type_ontology_term_id"] = ids
    classifier = learn_with_ids(adata, encoder)
    assert classifier.ontology_ids == {"T/NK": IDS["T/NK"]}
    annotate(adata, classifier, unassigned_below=0.0)
    terms = adata.obs["scbert_cell_type_ontology_term_id"].astype(str)
    assert (terms == "unknown").tolist() == (adata.obs["scbert_cell_type"] != "T/NK").tolist()


def test_the_column_named_after_the_labels_goes_first_and_labels_that_are_identifiers_need_none(make_cells, encoder):
    adata = make_cells()
    adata.obs["mine"] = adata.obs["cell_type"]
    adata.obs["mine_ontology_term_id"] = [IDS[label] for label in adata.obs["cell_type"]]
    adata.obs["cell_type_ontology_term_id"] = "CL:0000003"
    assert learn_with_ids(adata, encoder, "mine").ontology_ids == IDS
    adata.obs["cell_type_ontology_term_id"] = adata.obs["mine_ontology_term_id"]
    classifier = learn_with_ids(adata, encoder, "cell_type_ontology_term_id")
    assert classifier.labels == sorted(IDS.values())
    assert classifier.ontology_ids == {}
    annotate(adata, classifier)
    assert "scbert_cell_type_ontology_term_id" not in adata.obs


def test_a_model_trained_on_a_store_has_identifiers_too_and_gives_them_to_one(make_cells, encoder, tmp_path):
    adata = make_cells()
    adata.obs["cell_type_ontology_term_id"] = [IDS[label] for label in adata.obs["cell_type"]]
    store = scbert.write_store(adata, tmp_path / "store", genes=list(adata.var_names), progress=False)
    options = {"n_epochs": 1, "validation": tokenize(make_cells(seed=1)), "accelerator": "cpu", "progress": False}
    classifier = scbert.finetune(encoder, store, **options)
    assert classifier.ontology_ids == IDS
    table = annotate(store, classifier, unassigned_below=0.0)
    assert table["scbert_cell_type_ontology_term_id"].tolist() == [IDS[label] for label in table["scbert_cell_type"]]
