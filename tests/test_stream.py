"""A store says what tokenize says, no half of one opens, and training and annotation cannot tell it from an AnnData."""

import importlib.util
import json
import multiprocessing
import os
import resource
import shutil
import sys
from dataclasses import replace

import anndata
import h5py
import numpy as np
import pandas as pd
import pytest
import torch
from scipy import sparse

import scbert
from scbert import Recipe, finetune, pretrain, shards, stream
from scbert.data.cells import CellDataset
from scbert.data.preprocess import tokenize
from scbert.evaluate.masks import score_masks
from scbert.scale.shards import write_store
from scbert.scale.stream import open_store
from scbert.train import steps

QUIET = {"progress": False, "accelerator": "cpu"}
N_CELLS = 330


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Let 330 cells take several blocks, and reads that mix a part of the cells only."""
    monkeypatch.setattr(shards, "CELLS_AT_ONCE", 40)
    monkeypatch.setattr(stream, "CELLS_A_FETCH", 96)
    monkeypatch.setattr(stream, "CELLS_A_RUN", 4)
    monkeypatch.setattr(shards, "SAMPLE", 20)


@pytest.fixture
def counts(make_cells):
    """330 cells of three labels, of which some are missing."""
    adata = make_cells(N_CELLS)
    adata.obs["depth"] = np.arange(N_CELLS)
    return adata


@pytest.fixture
def file(counts, tmp_path):
    counts.write_h5ad(tmp_path / "counts.h5ad")
    return tmp_path / "counts.h5ad"


@pytest.fixture
def write(file, tmp_path):
    """Return a function that writes a store of four shards."""
    return lambda source=file, **options: write_store(
        source, tmp_path / "store", **{"shard_cells": 100, "progress": False, **options}
    )


@pytest.fixture
def reads(monkeypatch):
    """Return the list of cells that are read from the source from now on."""
    starts, tokenize_block = [], shards._tokenize_block
    monkeypatch.setattr(
        shards,
        "_tokenize_block",
        lambda part, start, *a, **k: (starts.append(start), tokenize_block(part, start, *a, **k))[1],
    )
    return starts


needs_scdataset = pytest.mark.skipif(not importlib.util.find_spec("scdataset"), reason="scDataset is not installed.")


def assert_same_tokens(store, tokens):
    assert store.genes == list(tokens.var_names)
    assert len(store) == store.n_obs == tokens.n_obs
    assert (store.read(np.arange(len(store))) != tokens.layers["bins"]).nnz == 0


# Written


@pytest.mark.parametrize("kind", ["file", "backed", "memory", "dense", "columns first"])
def test_tokens_are_those_of_tokenize(write, file, counts, kind):
    source = counts
    if kind == "dense":
        source.X = source.X.toarray()
    elif kind == "columns first":
        source.X = source.X.tocsc()
    elif kind != "memory":
        source = file if kind == "file" else anndata.read_h5ad(file, backed="r")
    store = write(source)
    assert_same_tokens(store, tokenize(counts))
    if kind == "backed":
        source.file.close()


def test_a_dense_file_is_read_too(write, counts, tmp_path):
    counts.X = counts.X.toarray()
    counts.write_h5ad(tmp_path / "dense.h5ad")
    assert_same_tokens(write(tmp_path / "dense.h5ad"), tokenize(counts))


@pytest.mark.parametrize("library", ["all", "aligned"])
@pytest.mark.parametrize("has_n_counts", [True, False])
def test_genes_are_aligned_by_name_and_depth_is_that_of_all_measured_genes(write, counts, file, library, has_n_counts):
    if not has_n_counts:
        del counts.obs["n_counts"]
        counts.write_h5ad(file)
    options = {"genes": ["gene17", "nowhere", *counts.var_names[12:3:-1]], "n_bins": 7, "library": library}
    expected = tokenize(counts, **options)
    assert_same_tokens(write(**options), expected)
    assert expected.layers["bins"].max() > 5


def test_several_sources_follow_one_another(write, counts, make_cells, tmp_path):
    more = make_cells(50, seed=3)[:, ::-1].copy()  # no column "depth"
    with pytest.raises(ValueError, match="Cell names, among the first of each source, are duplicated"):
        write([tmp_path / "counts.h5ad", more])
    more.obs_names = [f"more-{name}" for name in more.obs_names]
    store = write([tmp_path / "counts.h5ad", more])
    assert_same_tokens(store[:N_CELLS], tokenize(counts))
    assert_same_tokens(store[N_CELLS:], tokenize(more, genes=counts.var_names))
    assert list(store.obs) == ["cell_type", "batch", "n_counts"]
    assert store.obs["cell_type"].tolist() == [*counts.obs["cell_type"], *more.obs["cell_type"]]
    assert [path.name for path in sorted((tmp_path / "store").iterdir())] == [
        *(f"shard-0000{i}.h5ad" for i in range(5)),
        "store.json",
    ]


def test_sources_of_different_genes_need_a_vocabulary(write, counts, make_cells):
    others = make_cells(50, n_genes=30)
    others.obs_names = [f"other-{name}" for name in others.obs_names]
    with pytest.raises(ValueError, match="different genes: pass genes="):
        write([counts, others])
    assert len(write([counts, others], genes=list(others.var_names))) == N_CELLS + 50


def test_a_shard_is_an_anndata_of_tokenized_cells(write, counts, tmp_path):
    write()
    shard = anndata.read_h5ad(tmp_path / "store" / "shard-00002.h5ad")
    assert shard.X is None
    assert (shard.layers["bins"] != tokenize(counts)[200:300].layers["bins"]).nnz == 0
    assert shard.layers["bins"].dtype == np.uint8
    pd.testing.assert_frame_equal(shard.obs, counts.obs[200:300], check_categorical=False, check_dtype=False)
    assert CellDataset(shard).n_bins == 5


def test_columns_of_obs_are_read_one_at_a_time(write, counts):
    counts.obs["score"] = np.where(np.arange(N_CELLS) % 3, 0.5, np.nan)
    counts.obs["marked"] = np.arange(N_CELLS) % 2 == 0
    counts.obs["maybe"] = pd.array([None, 1, 2] * (N_CELLS // 3), dtype="Int64")
    counts.obs.loc["cell3", "cell_type"] = None
    store = write(counts)
    assert list(store.obs) == list(store.obs.columns) == list(counts.obs)
    rows = [3, 99, 100, 329]
    for part, expected in ((store, counts.obs), (store[rows], counts.obs.iloc[rows]), (store[5], counts.obs[5:6])):
        for name in ("cell_type", "depth", "score", "marked", "maybe", "batch"):
            assert part.obs[name].isna().tolist() == expected[name].isna().tolist()
            assert part.obs[name].dropna().tolist() == expected[name].dropna().tolist()
        assert part.obs_names.equals(expected.index)
    assert "louvain" not in store.obs
    with pytest.raises(KeyError, match="louvain"):
        store.obs["louvain"]


def test_no_column_is_read_to_say_that_it_is_there(write, monkeypatch):
    store = write()
    monkeypatch.setattr(stream, "read_column", None)
    assert "cell_type" in store.obs


# Read


def test_cells_come_by_number_in_any_order_and_more_than_once(write, counts):
    store, expected = write(), tokenize(counts).layers["bins"].toarray()
    for numbers in ([5], [329, 0, 100, 99, 0, 5, 6, 7, 5], range(50, 250)):
        bins = store.batch(np.array(numbers))
        assert bins.dtype == torch.int64
        assert bins[:, :-1].tolist() == expected[list(numbers)].tolist()
        assert not bins[:, -1].any()
    assert store.batch(np.array([], dtype=int)).shape == (0, 25)
    for wrong in ([330], [-1]):
        with pytest.raises(IndexError, match="has cells 0 to 329"):
            store.batch(np.array(wrong))


def test_a_part_of_a_store_is_a_store(write, counts):
    store, tokens = write(), tokenize(counts)
    mask = np.arange(N_CELLS) % 7 == 2
    for rows in (slice(90, 120), mask, np.flatnonzero(mask)):
        assert_same_tokens(store[rows], tokens[rows])
    part = store[mask][10:20]
    assert_same_tokens(part, tokens[mask][10:20])
    assert torch.equal(part.batch(np.array([3, 1])), store[mask].batch(np.array([13, 11])))
    for wrong in ([5, 2], [3, 3], [-1, 4], [4, 330]):
        with pytest.raises(ValueError, match="increasing numbers below 330"):
            store[wrong]


def test_batches_in_order_meet_each_cell_once_and_say_which_is_first(write, counts):
    store, expected = write(), CellDataset(tokenize(counts))
    for batch_size in (32, 100, 1000):
        ours, theirs = list(store.in_order(batch_size)), list(expected.in_order(batch_size))
        assert [start for start, _ in ours] == [start for start, _ in theirs]
        assert all(torch.equal(a, b) for (_, a), (_, b) in zip(ours, theirs, strict=True))


@needs_scdataset
@pytest.mark.parametrize("rows", [slice(None), slice(20, 311, 2)])
def test_an_epoch_visits_each_cell_once_in_an_order_of_its_own(write, rows):
    store = write()[rows]

    def order(seed, epoch):
        batches = list(store.epoch(16, seed, epoch))
        for indices, bins in batches:
            assert torch.equal(bins, store.batch(indices))
        assert [len(indices) for indices, _ in batches] == [16] * (len(store) // 16) + [len(store) % 16]
        return np.concatenate([indices for indices, _ in batches]).tolist()

    torch.manual_seed(1)
    np.random.seed(1)
    orders = [order(*key) for key in ((0, 1), (0, 2), (1, 1), (1000, 0))]  # scDataset alone takes 0, 1 for 1000, 0
    assert all(sorted(each) == list(range(len(store))) for each in orders)
    assert len(set(map(tuple, orders))) == 4
    np.random.seed(2)
    assert order(0, 1) == orders[0]


@needs_scdataset
def test_an_epoch_mixes_cells_from_everywhere(write):
    labels = np.arange(N_CELLS) // 110  # as if the file was sorted by type
    batches = [labels[indices] for indices, _ in write().epoch(16, 0, 0)]
    assert np.mean([len(set(batch)) for batch in batches]) > 2.5


@needs_scdataset
def test_a_bootstrap_epoch_meets_63_percent_of_the_cells(write):
    batches = list(write().epoch(10, 0, 0, "bootstrap"))
    order = np.concatenate([indices for indices, _ in batches])
    assert len(order) == N_CELLS
    assert abs(len(set(order)) / N_CELLS - (1 - np.exp(-1))) < 0.05


def test_without_scdataset_training_says_what_to_install(write, encoder, monkeypatch):
    monkeypatch.setitem(sys.modules, "scdataset", None)
    with pytest.raises(ModuleNotFoundError, match="Training from a store needs scDataset: pip install"):
        pretrain(encoder, write(), **QUIET)


# Trained on and annotated


def weights(module):
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def equal(a, b):
    return all(torch.equal(a[name], b[name]) for name in a)


def run_pretrain(config, store, **arguments):
    model = scbert.ScBert(config)
    history = pretrain(model, store, **{"n_epochs": 2, "batch_size": 64, **QUIET, **arguments})
    return weights(model), history.to_dict("list")


def run_finetune(config, store, recipe=None, **arguments):
    recipe = replace(recipe or Recipe(), until_converged=False)
    options = {"n_epochs": 2, "batch_size": 64, "recipe": recipe, **QUIET, **arguments}
    classifier = finetune(scbert.ScBert(config), store, **options)
    return weights(classifier), classifier.history.to_dict("list")


both = pytest.mark.parametrize("run", [run_pretrain, run_finetune])


@needs_scdataset
def test_training_from_a_store_learns_and_takes_validation_cells_from_it(write, config, more_cells):
    store = write()
    before = score_masks(scbert.ScBert(config), store[250:]).sum()
    history = pretrain(
        scbert.ScBert(config), store[:250], validation=store[250:], n_epochs=3, learning_rate=1e-2, **QUIET
    )
    assert history["val_loss"].iloc[-1] < 0.8 * before["loss"] / before["n_masked"]
    classifier = finetune(scbert.ScBert(config), store, n_epochs=4, learning_rate=1e-2, **QUIET)
    predicted = scbert.predict_proba(classifier, more_cells).idxmax(axis=1)
    assert (predicted.to_numpy() == more_cells.obs["cell_type"].to_numpy()).mean() > 0.8
    assert classifier.genes == store.genes


@needs_scdataset
@both
def test_the_same_seed_gives_the_same_weights_and_another_seed_others(run, write, config):
    store = write()
    torch.manual_seed(1)
    first, history = run(config, store)
    torch.manual_seed(2)
    again, history_again = run(config, store)
    other, _ = run(config, store, seed=1)
    assert equal(first, again)
    assert history == history_again
    assert not equal(first, other)


@needs_scdataset
@both
@pytest.mark.parametrize("recipe", [Recipe(), Recipe.published()], ids=["sound", "published"])
def test_interrupted_and_continued_equals_uninterrupted(run, recipe, write, config, tmp_path, monkeypatch):
    store, epochs = write(), []
    arguments = {"recipe": recipe, "accumulate": 4, "n_epochs": 3}  # an epoch is six batches
    expected = run(config, store, **arguments)
    arguments["checkpoint"] = tmp_path / "a.pt"

    def kill(path, history):
        if len(history) == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(steps, "write_log", kill)
    with pytest.raises(KeyboardInterrupt):
        run(config, store, **arguments)
    monkeypatch.setattr(steps, "write_log", lambda path, history: epochs.append(len(history)))
    result = run(config, open_store(store.path), **arguments)
    # Of pretraining, gradients that leak into the next epoch are in no checkpoint: the batches behind them run again.
    leaks = run is run_pretrain and recipe.leftover_steps == "leak"
    assert epochs == ([1, 2, 3] if leaks else [2, 3])
    assert equal(result[0], expected[0])
    assert result[1] == expected[1]


def test_a_checkpoint_knows_the_cells_of_a_store_without_reading_them(write, monkeypatch, tmp_path):
    store = write()
    shutil.move(store.path, tmp_path / "first")
    other = write(n_bins=7)
    monkeypatch.setattr(stream.CellStore, "_open_shard", None)
    parts = [store, other, store[:50], store[50:100]]
    identities = [b"".join(part.identity()) for part in parts]
    assert len(set(identities)) == 4
    assert b"".join(store[np.arange(50)].identity()) == identities[2]


@needs_scdataset
@pytest.mark.parametrize("where", [{}, {"cache_memory": 0}], ids=["memory", "file"])
def test_frozen_layers_can_be_kept(write, config, where):
    store, recipe = write(), Recipe(trainable_layers="last")
    kept, _ = run_finetune(config, store, recipe=recipe, **where)
    expected, _ = run_finetune(config, store, recipe=recipe, cache=None)
    for name, tensor in kept.items():
        torch.testing.assert_close(tensor, expected[name], atol=1e-5, rtol=0)


def test_a_store_is_annotated_as_the_same_cells_are_in_memory(write, counts, classifier):
    store = write(genes=classifier.genes)
    for threshold in (0.5, 0.9, 1.0):
        result = scbert.annotate(store, classifier, unassigned_below=threshold)
        scbert.annotate(counts, classifier, unassigned_below=threshold)
        pd.testing.assert_frame_equal(result, counts.obs[["scbert_cell_type", "scbert_confidence"]])
    assert (result["scbert_cell_type"] == "Unassigned").all()
    assert scbert.predict_proba(classifier, store).equals(scbert.predict_proba(classifier, counts))
    assert np.array_equal(scbert.embed(classifier, store), scbert.embed(classifier, counts))
    assert scbert.annotate(store[[3, 200]], classifier).index.tolist() == ["cell3", "cell200"]


def test_scores_of_masks_are_those_of_the_same_cells_in_memory(write, counts, encoder):
    pd.testing.assert_frame_equal(score_masks(encoder, write()), score_masks(encoder, tokenize(counts)))


# Interrupted, full, damaged


def test_interrupted_writing_continues_and_an_unfinished_store_does_not_open(
    write, counts, reads, tmp_path, monkeypatch
):
    expected = {path.name: path.read_bytes() for path in write().path.iterdir()}
    shutil.rmtree(tmp_path / "store")
    write_shard, written = shards._write_shard, []

    def interrupt(file, *rest):
        if len(written) == 2:
            (tmp_path / "store" / "shard-00002.h5ad.part").write_text("half")
            raise KeyboardInterrupt
        written.append(file)
        return write_shard(file, *rest)

    monkeypatch.setattr(shards, "_write_shard", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write()
    with pytest.raises(ValueError, match="unfinished: call write_store again with the same arguments") as error:
        open_store(tmp_path / "store")
    assert "\n" not in str(error.value)
    monkeypatch.setattr(shards, "_write_shard", write_shard)
    reads.clear()
    store = write()
    assert reads == [0, 200, 240, 280, 300]  # the sample, and the two shards that were missing
    assert_same_tokens(store, tokenize(counts))
    assert {path.name for path in store.path.iterdir()} == set(expected)
    assert json.loads((store.path / "store.json").read_text())["sha256"] == json.loads(expected["store.json"])["sha256"]
    reads.clear()
    write()
    assert reads == [0]


def test_a_call_with_other_cells_or_options_does_not_continue_a_store(write, counts, make_cells, tmp_path):
    write(counts)
    relabelled = counts.copy()
    relabelled.obs["cell_type"] = relabelled.obs["cell_type"].to_numpy()[::-1]
    others = [{"n_bins": 7}, {"library": "aligned"}, {"shard_cells": 99}, {"genes": list(counts.var_names[::-1])}]
    others += [{"source": make_cells(N_CELLS, seed=1)}, {"source": relabelled}, {"source": tmp_path / "counts.h5ad"}]
    for other in others:
        with pytest.raises(ValueError, match="holds cells of another call"):
            write(**{"source": counts} | other)


def test_a_folder_with_anything_else_in_it_is_left_alone(write, tmp_path):
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "thesis.txt").write_text("ten years of work")
    with pytest.raises(ValueError, match="is no store of cells: give another folder"):
        write()
    assert [path.name for path in (tmp_path / "store").iterdir()] == ["thesis.txt"]
    with pytest.raises(ValueError, match=r"is no store of cells: store\.json is missing"):
        open_store(tmp_path / "store")


def test_too_little_room_is_said_before_anything_is_written(write, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(0, 0, 20_000))
    with pytest.raises(ValueError, match=r"needs about .* GB, and 0\.0 GB are free in .*: free some space"):
        write()
    assert not (tmp_path / "store").exists()


def test_the_room_a_store_needs_is_estimated_within_a_fifth(write, tmp_path, monkeypatch):
    wide = anndata.AnnData(sparse.csr_matrix(np.random.default_rng(0).poisson(0.2, (500, 3000)), dtype=np.float32))
    rooms = []
    monkeypatch.setattr(shards, "_check_room", lambda path, needed: rooms.append(needed))
    write(wide, shard_cells=500)
    written = sum(path.stat().st_size for path in (tmp_path / "store").iterdir())
    assert 0.8 < rooms[0] / written < 1.2


def fill_up(monkeypatch):
    """Let the disk have no room left after a block of the second shard."""
    rooms = iter([10**12] * 5)  # one look ahead, three blocks of the first shard, one of the second
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(0, 0, next(rooms, 0)))


def test_a_disk_that_fills_up_leaves_whole_shards_and_the_call_continues(write, counts, reads, tmp_path, monkeypatch):
    with monkeypatch.context() as patched:
        fill_up(patched)
        with pytest.raises(OSError, match="could not be written .*: whole shards are kept, so free some") as error:
            write()
    assert "\n" not in str(error.value)
    assert sorted(path.name for path in (tmp_path / "store").iterdir()) == ["shard-00000.h5ad", "unfinished.json"]
    with pytest.raises(ValueError, match="unfinished"):
        open_store(tmp_path / "store")
    reads.clear()
    assert_same_tokens(write(), tokenize(counts))
    assert reads[1] == 100


def _write_with_limited_files(source, path, size):
    """Write a store where no file may grow beyond `size`, and say what came of it beside the store."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
    try:
        write_store(source, path, shard_cells=100, progress=False)
    except OSError as error:
        path.with_name("said.txt").write_text(str(error))
    os._exit(0)  # HDF5 brings a process down that ends with a file it could not close


def test_a_failure_that_hdf5_learns_from_the_system_leaves_no_half_of_a_store(write, file, counts, tmp_path):
    size = next(write().path.glob("shard-*")).stat().st_size // 2
    shutil.rmtree(tmp_path / "store")
    arguments = (file, tmp_path / "store", size)
    process = multiprocessing.get_context("spawn").Process(target=_write_with_limited_files, args=arguments)
    process.start()
    process.join(timeout=120)
    assert "could not be written" in (tmp_path / "said.txt").read_text()
    assert [path.name for path in (tmp_path / "store").iterdir()] == ["unfinished.json"]
    with pytest.raises(ValueError, match="unfinished"):
        open_store(tmp_path / "store")
    assert_same_tokens(write(), tokenize(counts))


@pytest.mark.parametrize("damage", ["truncated", "removed"])
def test_a_shard_that_is_not_whole_is_refused_and_written_again(write, counts, reads, damage):
    store = write()
    shard = store.path / "shard-00001.h5ad"
    if damage == "truncated":
        shard.write_bytes(shard.read_bytes()[:5000])
    else:
        shard.unlink()
    with pytest.raises(ValueError, match=r"shard-00001\.h5ad of the store .* is missing or damaged"):
        open_store(store.path)
    reads.clear()
    assert_same_tokens(write(), tokenize(counts))
    assert reads == [0, 100, 140, 180]


def test_a_damaged_byte_is_noticed_where_it_is_read(write, counts):
    store = write()
    shard = store.path / "shard-00001.h5ad"
    with h5py.File(shard) as opened:
        start = opened["layers/bins/data"].id.get_chunk_info(0).byte_offset
    content = bytearray(shard.read_bytes())
    content[start + 10] ^= 7
    shard.write_bytes(content)
    store = open_store(store.path)
    assert len(store.batch(np.arange(100))) == 100
    with pytest.raises(
        ValueError, match=r"shard-00001\.h5ad is damaged .*: remove it and call write_store again"
    ) as error:
        store.batch(np.arange(101))
    assert "\n" not in str(error.value)
    shard.unlink()
    assert_same_tokens(write(), tokenize(counts))


@pytest.mark.parametrize("change", [lambda text: text[:100], lambda text: text.replace('"gene3"', '"geneX"')])
def test_a_damaged_index_is_refused(write, change):
    file = write().path / "store.json"
    file.write_text(change(file.read_text()))
    with pytest.raises(ValueError, match=r"store\.json is damaged, or was written by another version"):
        open_store(file.parent)


# Cells that do not fit


@pytest.mark.parametrize("cell", [3, 300])
@pytest.mark.parametrize(
    ("value", "message"), [(0.5, "fractional values such as 0.5"), (-1, "negative values"), (np.nan, "NaN or infinite")]
)
def test_values_that_are_no_counts_are_refused_wherever_they_are(write, counts, file, tmp_path, cell, value, message):
    counts.X.data[counts.X.indptr[cell]] = value  # of gene 0, which every cell has
    counts.write_h5ad(file)
    with pytest.raises(ValueError, match=message):
        write()
    assert (tmp_path / "store").exists() == (cell == 300)  # the first cells are looked at before anything is written
    with pytest.raises(ValueError, match="no store|unfinished"):
        open_store(tmp_path / "store")


def test_a_store_of_other_bins_or_genes_than_the_models_is_refused(write, encoder, classifier, counts, tmp_path):
    store = write(n_bins=7)
    with pytest.raises(ValueError, match="into 7 bins, but the model reads 5: .*store, with n_bins=5"):
        pretrain(encoder, store, **QUIET)
    with pytest.raises(ValueError, match="into 7 bins"):
        scbert.annotate(store, classifier)
    shutil.rmtree(store.path)
    store = write(genes=list(counts.var_names[::-1]))
    for function in (scbert.annotate, lambda *a: finetune(a[1].encoder, a[0], **QUIET)):
        with pytest.raises(ValueError, match="in another order: .*write their store with genes=model.genes"):
            function(store, classifier)


def test_labels_of_a_store_are_checked_like_those_of_an_anndata(write, encoder):
    with pytest.raises(ValueError, match="no column 'cluster' in obs.*cell_type"):
        finetune(encoder, write(), label_key="cluster")
    with pytest.raises(ValueError, match=r"one value only \(b1\)"):
        finetune(encoder, write(), label_key="batch")


def save_by_columns(counts, file):
    counts.X = counts.X.tocsc()
    counts.write_h5ad(file)


def save_without_counts(counts, file):
    del counts.X
    counts.write_h5ad(file)


def save_duplicated_genes(counts, file):
    counts.var_names = ["gene0", *counts.var_names[:-1]]
    counts.write_h5ad(file)


@pytest.mark.parametrize(
    ("save", "message"),
    [
        (save_by_columns, r"stored by genes \(csc_matrix\).*adata.X.tocsr"),
        (save_without_counts, "has no X"),
        (save_duplicated_genes, "Gene names of .* are duplicated"),
        (lambda counts, file: file.write_text("cells"), "cannot be read as an h5ad file"),
        (lambda counts, file: file.unlink(), "cannot be read as an h5ad file"),
    ],
)
def test_a_file_that_holds_no_counts_of_cells_is_refused(write, counts, file, tmp_path, save, message):
    save(counts, file)
    with pytest.raises(ValueError, match=message) as error:
        write()
    assert "\n" not in str(error.value)
    assert not (tmp_path / "store").exists()


def test_no_cells_a_shard_and_no_sources_are_refused(write):
    for wrong, message in (
        ({"shard_cells": 0}, "shard_cells must be at least 1"),
        ({"source": []}, "There is no source"),
    ):
        with pytest.raises(ValueError, match=message):
            write(**wrong)


def test_a_damaged_label_of_a_shard_is_noticed(tmp_path, make_cells):
    adata = make_cells()
    scbert.write_store(adata, tmp_path / "s", progress=False)
    (shard,) = (tmp_path / "s").glob("shard-*.h5ad")
    with h5py.File(shard) as file:
        codes = file["obs/cell_type/codes"]
        place, was = codes.id.get_offset(), int(codes[0])
    with open(shard, "r+b") as file:
        file.seek(place)
        file.write(bytes([(was + 1) % 3]))
    store = scbert.open_store(tmp_path / "s")
    with pytest.raises(
        ValueError, match=r"Column cell_type of shard-00000.h5ad in the store .* is damaged: delete that file"
    ):
        store.obs["cell_type"]
    assert list(store.obs_names) == list(adata.obs_names)
