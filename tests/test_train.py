"""Training learns, repeats itself, continues after a kill, and every switch of the recipe does what it says."""

import zipfile
from dataclasses import replace

import numpy as np
import pytest
import torch

import scbert
from scbert import Recipe, finetune, pretrain
from scbert.data.cells import CellDataset
from scbert.data.preprocess import tokenize
from scbert.train import finetune as finetuning
from scbert.train import steps
from scbert.train.recipe import learning_rate_at

QUIET = {"progress": False, "accelerator": "cpu"}


ONCE = scbert.Recipe(until_converged=False)  # the epochs that were asked for, from one head


@pytest.fixture
def model(config):
    """Return a function that makes the same untrained encoder each time."""
    return lambda seed=0: scbert.ScBert(config, seed=seed)


def weights(module):
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def equal(a, b):
    assert a.keys() == b.keys()
    return all(torch.equal(a[name], b[name]) for name in a)


def moved(before, after):
    """Return the names of the weights that changed."""
    return {name for name in before if not torch.equal(before[name], after[name])}


# It learns


def test_pretraining_lowers_the_loss_on_cells_seen_and_unseen(model, cells, more_cells):
    history = pretrain(model(), cells, validation=more_cells, n_epochs=20, learning_rate=1e-2, **QUIET)
    assert history["epoch"].tolist() == list(range(1, 21))
    assert history["loss"].iloc[-1] < 0.8 * history["loss"].iloc[0]
    assert history["val_loss"].iloc[-1] < 0.8 * history["val_loss"].iloc[0]
    assert history["val_mode_accuracy"].nunique() == 1  # the masks never change


def test_no_epochs_make_no_annotator(model, cells):
    with pytest.raises(ValueError, match="n_epochs must be at least 1, not 0"):
        finetune(model(), cells, n_epochs=0, **QUIET)


def test_fine_tuning_learns_the_labels(model, cells, more_cells):
    classifier = finetune(model(), cells, n_epochs=15, learning_rate=1e-2, **QUIET)
    predicted = scbert.predict_proba(classifier, more_cells).idxmax(axis=1)
    assert (predicted.to_numpy() == more_cells.obs["cell_type"].to_numpy()).mean() > 0.8
    assert classifier.labels == ["B", "Monocyte", "T/NK"]
    assert classifier.genes == list(cells.var_names)
    assert not classifier.training


def test_the_history_is_logged_after_each_epoch(model, cells, tmp_path):
    import pandas as pd

    history = pretrain(model(), cells, n_epochs=2, log=tmp_path / "logs" / "pretrain.csv", **QUIET)
    pd.testing.assert_frame_equal(pd.read_csv(tmp_path / "logs" / "pretrain.csv"), history)
    classifier = finetune(model(), cells, n_epochs=2, log=tmp_path / "finetune.csv", **QUIET)
    pd.testing.assert_frame_equal(
        pd.read_csv(tmp_path / "finetune.csv"), classifier.history.drop(columns="best"), check_dtype=False
    )


def test_the_metrics_of_the_best_epoch_are_those_of_the_returned_classifier(model, cells, more_cells):
    classifier = finetune(model(), cells, validation=more_cells, n_epochs=4, learning_rate=1e-2, **QUIET)
    best = classifier.history.query("best").iloc[0]
    predicted = scbert.predict_proba(classifier, more_cells).idxmax(axis=1).to_numpy()
    assert best["val_accuracy"] == (predicted == more_cells.obs["cell_type"].to_numpy()).mean()


# It repeats itself


def run_pretrain(model, cells, more_cells, **arguments):
    encoder = model()
    arguments = {"n_epochs": 3, "redraw_every": 5, "accumulate": 2, **QUIET, **arguments}
    history = pretrain(encoder, cells, validation=more_cells, **arguments)
    return weights(encoder), history.to_dict("list")


def run_finetune(model, cells, more_cells, recipe=ONCE, **arguments):
    recipe = replace(recipe, until_converged=False)
    classifier = finetune(model(), cells, **{"n_epochs": 3, "accumulate": 2, "recipe": recipe, **QUIET, **arguments})
    return weights(classifier), classifier.history.to_dict("list")


both = pytest.mark.parametrize("run", [run_pretrain, run_finetune])


@both
def test_the_same_seed_gives_the_same_weights_and_another_seed_others(run, model, cells, more_cells):
    torch.manual_seed(1)
    first, history = run(model, cells, more_cells)
    torch.manual_seed(2)
    again, history_again = run(model, cells, more_cells)
    other, _ = run(model, cells, more_cells, seed=1)
    assert equal(first, again)
    assert history == history_again
    assert not equal(first, other)


@pytest.fixture
def kill_after(monkeypatch):
    """Return a function that makes training end with KeyboardInterrupt after an epoch."""

    def arm(epoch):
        def write_log(path, history):
            if len(history) == epoch:
                raise KeyboardInterrupt

        monkeypatch.setattr(steps, "write_log", write_log)

    return arm


@both
@pytest.mark.parametrize(
    "recipe",
    [Recipe(), Recipe.published(), Recipe(trainable_layers="last"), Recipe(thin=0.5)],
    ids=["sound", "published", "frozen layers kept", "thinned"],
)
def test_interrupted_and_continued_equals_uninterrupted(
    run, recipe, model, cells, more_cells, tmp_path, kill_after, monkeypatch
):
    # Three batches an optimiser step: with the published recipe gradients leak from one epoch into the next.
    arguments = {"recipe": recipe, "accumulate": 3, "n_epochs": 4}
    expected = run(model, cells, more_cells, **arguments)
    arguments["checkpoint"] = tmp_path / "checkpoints" / "a.pt"
    for epoch in (1, 3):
        kill_after(epoch)
        with pytest.raises(KeyboardInterrupt):
            run(model, cells, more_cells, **arguments)
    epochs = []
    monkeypatch.setattr(steps, "write_log", lambda path, history: epochs.append(len(history)))
    result = run(model, cells, more_cells, **arguments)
    # Gradients that leak into the next epoch are in no checkpoint of pretraining: the batches behind them run again.
    leaks = run is run_pretrain and recipe.leftover_steps == "leak"
    assert epochs == ([3, 4] if leaks else [4])  # the others were not computed again
    assert equal(result[0], expected[0])
    assert result[1] == expected[1]
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["a.before.pt", "a.pt"]


@both
def test_the_checkpoint_of_another_call_is_ignored(run, model, cells, more_cells, tmp_path):
    expected = run(model, cells, more_cells, seed=1)
    run(model, cells, more_cells, seed=0, checkpoint=tmp_path / "a.pt")
    result = run(model, cells, more_cells, seed=1, checkpoint=tmp_path / "a.pt")
    assert equal(result[0], expected[0])


def cut(path):
    path.write_bytes(path.read_bytes()[:1000])


def flip(path):
    """Change one byte of the largest tensor: torch.load would take it."""
    with zipfile.ZipFile(path) as archive:
        data = archive.read(max(archive.infolist(), key=lambda entry: entry.file_size))
    content = bytearray(path.read_bytes())
    content[content.index(data)] ^= 255
    path.write_bytes(content)


@both
@pytest.mark.parametrize("damage", [cut, flip])
def test_a_damaged_checkpoint_warns_and_the_one_before_it_is_continued(run, damage, model, cells, more_cells, tmp_path):
    expected = run(model, cells, more_cells)
    run(model, cells, more_cells, checkpoint=tmp_path / "a.pt")
    damage(tmp_path / "a.pt")
    with pytest.warns(UserWarning, match=r"a\.pt is damaged \(.*\): going on from a\.before\.pt\."):
        result = run(model, cells, more_cells, checkpoint=tmp_path / "a.pt")
    assert equal(result[0], expected[0])
    assert result[1] == expected[1]


@both
def test_two_damaged_checkpoints_warn_and_training_starts_over(run, model, cells, more_cells, tmp_path):
    expected = run(model, cells, more_cells)
    run(model, cells, more_cells, checkpoint=tmp_path / "a.pt")
    cut(tmp_path / "a.pt")
    cut(tmp_path / "a.before.pt")
    with pytest.warns(UserWarning, match="is damaged") as warned:
        result = run(model, cells, more_cells, checkpoint=tmp_path / "a.pt")
    said = [str(warning.message).rsplit(": ")[-1] for warning in warned if "is damaged" in str(warning.message)]
    assert said == [
        "going on from a.before.pt.",
        "starting from the beginning.",
    ]
    assert equal(result[0], expected[0])


def test_pretraining_goes_on_in_the_middle_of_an_epoch(model, cells, more_cells, tmp_path, monkeypatch):
    expected = run_pretrain(model, cells, more_cells, batch_size=4, accumulate=2)
    arguments = {"checkpoint": tmp_path / "a.pt", "checkpoint_every": 3, "batch_size": 4, "accumulate": 2}
    take_step, n_steps = steps.take_step, []

    def stop_at(number):
        def step(optimizer, rate):
            n_steps.append(rate)
            if len(n_steps) == number:
                raise KeyboardInterrupt
            take_step(optimizer, rate)

        return step

    # An epoch has eight steps; steps 3 and 6 of it, and its end, are kept: 5 steps, then 11, are not done again.
    for number in (8, 21):
        monkeypatch.setattr(steps, "take_step", stop_at(number))
        with pytest.raises(KeyboardInterrupt):
            run_pretrain(model, cells, more_cells, **arguments)
    monkeypatch.setattr(steps, "take_step", stop_at(0))
    result = run_pretrain(model, cells, more_cells, **arguments)
    assert len(n_steps) == 8 + (21 - 8) + 24 - 18
    assert equal(result[0], expected[0])
    assert result[1] == expected[1]


def test_a_loss_that_is_no_number_ends_pretraining_in_one_sentence(model, cells):
    with pytest.raises(ValueError, match=r"The loss is (nan|inf) at step \d+: lower learning_rate"):
        pretrain(model(), cells, n_epochs=5, learning_rate=1e18, clip_norm=None, **QUIET)


def test_the_gradient_is_that_of_the_mean_over_all_masks_of_a_step_and_is_clipped(model, cells, gradients):
    pretrain(model(), cells, n_epochs=1, batch_size=60, clip_norm=None, **QUIET)
    pretrain(model(), cells, n_epochs=1, batch_size=15, accumulate=4, clip_norm=None, **QUIET)
    pretrain(model(), cells, n_epochs=1, batch_size=60, clip_norm=1e-3, **QUIET)
    assert gradients[1] == pytest.approx(gradients[0], rel=0.2)  # other masks: their seeds follow the batches
    assert gradients[2] < 0.01 * gradients[0]


@both
def test_a_checkpoint_that_cannot_be_written_warns_and_training_goes_on(run, model, cells, more_cells, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.warns(UserWarning, match="was not written .*: training goes on without"):
        result = run(model, cells, more_cells, checkpoint=tmp_path / "file" / "a.pt")
    assert equal(result[0], run(model, cells, more_cells)[0])


# What is trained


def test_fine_tuning_leaves_the_given_model_as_it_was(model, cells):
    encoder = model()
    before = weights(encoder)
    recipe = replace(Recipe.published(), trainable_layers="head")
    finetune(encoder, cells, n_epochs=1, recipe=recipe, **QUIET)
    assert equal(before, weights(encoder))
    assert encoder.genes is None
    assert encoder.config.key_stabiliser == "head"
    assert all(parameter.requires_grad for parameter in encoder.parameters())


@pytest.mark.parametrize(
    ("layers", "parts"),
    [
        ("head", []),
        ("last", ["norm.", "performer.net.layers.1."]),
        ((-2,), ["norm.", "performer.net.layers.0."]),
        ((0, 1), ["norm.", "performer.net."]),
        ("all", ["norm.", "performer.net.", "token_emb.", "pos_emb."]),
    ],
)
def test_only_the_trainable_layers_move(model, cells, layers, parts):
    encoder = model()
    classifier = finetune(encoder, cells, n_epochs=1, recipe=Recipe(trainable_layers=layers), **QUIET)
    changed = moved(weights(encoder), weights(classifier.encoder))
    assert changed == {
        name for name in encoder.state_dict() if name.startswith(tuple(parts)) and "projection_matrix" not in name
    }
    head = moved(weights(scbert.Classifier(encoder, classifier.labels, 0).head), weights(classifier.head))
    assert head == set(classifier.head.state_dict())


def test_a_layer_that_is_not_there_cannot_be_trained(model, cells):
    with pytest.raises(ValueError, match="trainable_layers .* 2 layers"):
        finetune(model(), cells, recipe=Recipe(trainable_layers=(-3,)), **QUIET)


def test_frozen_gene_vectors_do_not_learn(cells):
    config = scbert.ScBertConfig(24, dim=8, depth=1, heads=2, dim_head=4, gene_embedding="frozen")
    encoder = scbert.ScBert(config, np.random.default_rng(0).normal(size=(24, 8)))
    before = weights(encoder)
    pretrain(encoder, cells, n_epochs=1, **QUIET)
    assert "pos_emb.emb.weight" not in moved(before, weights(encoder))
    assert "token_emb.weight" in moved(before, weights(encoder))


def test_training_stops_when_patience_runs_out_and_keeps_the_best_epoch(model, cells, more_cells):
    # With no learning rate to speak of, the first epoch stays the best.
    classifier = finetune(model(), cells, validation=more_cells, n_epochs=9, patience=3, learning_rate=1e-12, **QUIET)
    assert classifier.history["epoch"].tolist() == [1, 2, 3, 4]
    assert classifier.history["best"].tolist() == [True, False, False, False]


# The recipe


@pytest.mark.parametrize("name", ["adamw", "adam"])
def test_the_optimizer_of_the_recipe_is_used(model, cells, name, monkeypatch):
    used = []
    monkeypatch.setattr(steps, "take_step", lambda optimizer, rate: used.append(type(optimizer.optimizer).__name__))
    pretrain(model(), cells, n_epochs=1, recipe=Recipe(optimizer=name), **QUIET)
    finetune(model(), cells, n_epochs=1, recipe=Recipe(optimizer=name), **QUIET)
    assert {kind.lower() for kind in used} == {name}


def test_the_schedule_is_used(model, cells):
    rates = {
        schedule: pretrain(model(), cells, n_epochs=2, recipe=Recipe(lr_schedule=schedule), **QUIET)["learning_rate"]
        for schedule in ("per_step", "per_epoch")
    }
    assert rates["per_epoch"].tolist() == pytest.approx([1e-5, 1e-5 + 0.99e-3 / 5])
    assert rates["per_step"].tolist() == pytest.approx([learning_rate_at(s, 8, 4, 1e-3, "per_step") for s in (3, 7)])


@pytest.mark.parametrize(("sampling", "is_once"), [("epoch", True), ("bootstrap", False)])
def test_sampling_says_which_cells_an_epoch_visits(model, cells, more_cells, sampling, is_once, monkeypatch):
    visited, batch = [], CellDataset.batch
    monkeypatch.setattr(CellDataset, "batch", lambda self, rows: (visited.extend(rows), batch(self, rows))[1])
    pretrain(model(), cells, n_epochs=1, recipe=Recipe(sampling=sampling), **QUIET)
    assert len(visited) == 60
    assert (sorted(visited) == list(range(60))) == is_once


@pytest.fixture
def gradients(monkeypatch):
    """Return a list which the size of the gradient at each optimiser step is added to."""
    sizes, take_step = [], steps.take_step

    def note(optimizer, rate):
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        sizes.append(sum(parameter.grad.abs().sum().item() for parameter in parameters if parameter.grad is not None))
        take_step(optimizer, rate)

    monkeypatch.setattr(steps, "take_step", note)
    return sizes


@pytest.mark.parametrize(("leftover", "n_steps"), [("step", 2), ("leak", 1)])
def test_leftover_batches_get_a_step_of_their_own_or_leak(model, cells, gradients, leftover, n_steps):
    # 60 cells in batches of 16 are four batches; three of them make a step.
    recipe = replace(ONCE, leftover_steps=leftover)
    pretrain(model(), cells, n_epochs=3, accumulate=3, recipe=recipe, **QUIET)
    finetune(model(), cells, validation=cells, n_epochs=3, accumulate=3, recipe=recipe, **QUIET)
    assert len(gradients) == 2 * 3 * n_steps


def test_leaked_batches_without_a_single_step_do_no_harm(model, cells):
    recipe = replace(ONCE, leftover_steps="leak")
    history = pretrain(model(), cells, n_epochs=2, accumulate=60, recipe=recipe, **QUIET)
    history = history.to_dict("list") | finetune(
        model(), cells, n_epochs=2, accumulate=60, recipe=recipe, **QUIET
    ).history.to_dict("list")
    assert len(history["loss"]) == 2


@pytest.mark.parametrize(("scale", "ratio"), [(True, 1), (False, 4)])
def test_the_loss_is_divided_by_the_number_of_accumulated_batches_or_not(model, cells, gradients, scale, ratio):
    recipe = replace(ONCE, scale_loss_by_accumulation=scale)
    finetune(model(), cells, validation=cells, n_epochs=1, batch_size=60, recipe=recipe, **QUIET)
    finetune(model(), cells, validation=cells, n_epochs=1, batch_size=15, accumulate=4, recipe=recipe, **QUIET)
    assert gradients[1] / gradients[0] == pytest.approx(ratio, rel=1e-3)


def test_balanced_classes_weigh_the_same_in_the_loss(model, make_cells, more_cells):
    def first_loss(cells, class_weight):
        classifier = finetune(
            model(), cells, validation=more_cells, n_epochs=1, batch_size=99, recipe=Recipe(class_weight=class_weight),
            **QUIET,
        )  # fmt: skip
        return classifier.history["loss"][0]

    even = tokenize(make_cells())
    uneven = even[np.flatnonzero((even.obs["cell_type"] != "B") | (np.arange(60) < 6))].copy()
    assert first_loss(even, "balanced") == pytest.approx(first_loss(even, None))
    assert first_loss(uneven, "balanced") != pytest.approx(first_loss(uneven, None), rel=1e-4)


@pytest.mark.parametrize(("select_by", "best"), [("loss", 1), ("accuracy", 2), ("macro_f1", 3)])
def test_select_by_chooses_the_epoch_whose_weights_are_returned(model, cells, select_by, best, monkeypatch):
    measured = [
        {"val_loss": loss, "val_accuracy": accuracy, "val_macro_f1": macro_f1}
        for loss, accuracy, macro_f1 in [(3, 0.1, 0.1), (1, 0.2, 0.2), (2, 0.9, 0.3), (4, 0.4, 0.8), (4, 0.4, 0.8)]
    ]
    after = []

    def measure(classifier, *rest):
        after.append(weights(classifier))
        return measured[len(after) - 1]

    monkeypatch.setattr(finetuning, "_measure", measure)
    classifier = finetune(model(), cells, n_epochs=5, recipe=Recipe(select_by=select_by), **QUIET)
    assert classifier.history["best"].tolist() == [epoch == best for epoch in range(5)]
    assert equal(weights(classifier), after[best])
    assert not equal(after[best], after[-1])


@pytest.mark.parametrize("key_stabiliser", ["head", "batch"])
def test_the_key_stabiliser_of_the_recipe_is_the_models(model, cells, key_stabiliser):
    encoder = model()
    pretrain(encoder, cells, n_epochs=1, recipe=Recipe(key_stabiliser=key_stabiliser), **QUIET)
    classifier = finetune(model(), cells, n_epochs=1, recipe=Recipe(key_stabiliser=key_stabiliser), **QUIET)
    for trained in (encoder, classifier.encoder):
        attentions = [layer[0].fn.fast_attention for layer in trained.performer.net.layers]
        assert [attention.key_stabiliser for attention in attentions] == [key_stabiliser] * 2
        assert trained.config.key_stabiliser == key_stabiliser


def has_new_features(before, after):
    names = [name for name in before if "projection_matrix" in name]
    return [not torch.equal(before[name], after[name]) for name in names]


def test_thinned_cells_enter_with_other_tokens_in_each_epoch(model, cells, more_cells, monkeypatch):
    seen = []
    forward = scbert.Classifier.forward

    def watch(self, bins, n_layers_done=0):
        if torch.is_grad_enabled():  # not of validation cells
            seen.append(bins.clone())
        return forward(self, bins, n_layers_done)

    monkeypatch.setattr(scbert.Classifier, "forward", watch)
    options = {"validation": more_cells, "n_epochs": 2, "batch_size": len(cells), **QUIET}
    finetune(model(), cells, recipe=Recipe(thin=0.2), **options)
    thinned = [int((bins > 0).sum()) for bins in seen]
    seen.clear()
    finetune(model(), cells, **options)
    whole = [int((bins > 0).sum()) for bins in seen]
    assert whole[0] == whole[1] == cells.layers["bins"].nnz
    assert thinned[0] != thinned[1]
    assert max(thinned) < 0.9 * whole[0]


def test_thinning_needs_counts_and_a_share(model, cells):
    with pytest.raises(ValueError, match="Recipe.thin must be a share above 0 and up to 1, not 0"):
        Recipe(thin=0)
    tokens = cells.copy()
    del tokens.X
    with pytest.raises(ValueError, match="Recipe.thin needs the counts of the training cells"):
        finetune(model(), tokens, recipe=Recipe(thin=0.5), **QUIET)


def test_pretraining_redraws_the_random_features_on_schedule(model, cells):
    for redraw_every, is_new in ((4, True), (5, False)):  # an epoch has four steps
        encoder = model()
        before = weights(encoder)
        pretrain(encoder, cells, n_epochs=1, redraw_every=redraw_every, **QUIET)
        assert has_new_features(before, weights(encoder)) == [is_new, is_new]


@pytest.mark.parametrize("redraw", [True, False])
def test_fine_tuning_redraws_them_after_1000_steps_if_told_so(make_cells, monkeypatch, redraw):
    monkeypatch.setattr(scbert.train.steps, "take_step", lambda optimizer, rate: optimizer.zero_grad())  # 1000 of them
    encoder = scbert.ScBert(scbert.ScBertConfig(24, dim=4, depth=1, heads=1, dim_head=4))
    cells = tokenize(make_cells(1000))
    validation = tokenize(make_cells(3))
    recipe = Recipe(redraw_features=redraw, trainable_layers="head")
    classifier = finetune(encoder, cells, validation=validation, n_epochs=1, batch_size=1, recipe=recipe, **QUIET)
    assert has_new_features(weights(encoder), weights(classifier.encoder)) == [redraw]


# Cells that do not fit


def test_cells_that_are_not_tokenized_are_refused(model, make_cells):
    for function in (pretrain, finetune):
        with pytest.raises(ValueError, match=r"not tokenized: call scbert\.preprocess\.tokenize"):
            function(model(), make_cells())


@pytest.mark.parametrize("train", [pretrain, finetune])
def test_cells_with_less_than_a_tenth_of_the_genes_train_nothing(train, config, make_cells, tmp_path):
    adata = make_cells()[:, :2].copy()
    adata.X[:, 0] = 5  # no cell is empty
    genes = [f"gene{i}" for i in range(24)]
    store = scbert.write_store(adata, tmp_path / "store", genes=genes, progress=False)
    for few in (tokenize(adata, genes=genes), store):
        with pytest.raises(ValueError, match="The cells have 2 of the model's 24 genes: too few."):
            train(scbert.ScBert(config), few, **QUIET)
    enough = tokenize(make_cells()[:, :3].copy(), genes=genes)
    train(scbert.ScBert(config), enough, n_epochs=1, **QUIET)


def test_cells_in_other_bins_are_refused(model, make_cells):
    with pytest.raises(ValueError, match=r"into 7 bins, but the model reads 5: .*n_bins=5"):
        pretrain(model(), tokenize(make_cells(), n_bins=7))


def test_cells_with_other_genes_or_another_order_are_refused(model, cells, make_cells):
    encoder = model()
    with pytest.raises(ValueError, match="23 genes.*24 are others or in another order"):
        pretrain(encoder, tokenize(make_cells(n_genes=23)))
    pretrain(encoder, cells, n_epochs=1, **QUIET)
    with pytest.raises(ValueError, match="another order.*genes=model.genes"):
        finetune(encoder, tokenize(make_cells()[:, ::-1].copy()))


@pytest.mark.parametrize("function", [pretrain, finetune])
def test_validation_cells_must_fit_too_and_are_checked_before_training(function, model, cells, make_cells):
    shuffled = tokenize(make_cells()[:, ::-1].copy())
    with pytest.raises(ValueError, match="another order"):
        function(model(), cells, validation=shuffled, **QUIET)


def test_a_missing_label_column_is_refused(model, cells, more_cells):
    with pytest.raises(ValueError, match="no column 'cluster' in obs.*cell_type"):
        finetune(model(), cells, label_key="cluster")
    del more_cells.obs["cell_type"]
    with pytest.raises(ValueError, match="no column 'cell_type' in obs"):
        finetune(model(), cells, validation=more_cells)


def test_a_missing_label_is_refused(model, cells):
    cells.obs.loc["cell3", "cell_type"] = np.nan
    with pytest.raises(ValueError, match=r"obs\['cell_type'\].* has 1 missing values"):
        finetune(model(), cells)


def test_one_label_only_is_refused(model, cells):
    cells.obs["cell_type"] = "B"
    with pytest.raises(ValueError, match=r"one value only \(B\)"):
        finetune(model(), cells)


def test_a_label_that_only_validation_cells_have_is_refused(model, cells, make_cells):
    validation = tokenize(make_cells(6, labels=("B", "NK")))
    with pytest.raises(ValueError, match="labels that no training cell has: NK"):
        finetune(model(), cells, validation=validation)


def test_a_label_with_a_single_cell_is_refused_unless_validation_cells_are_given(model, cells, more_cells):
    cells.obs["cell_type"] = cells.obs["cell_type"].astype(str)
    cells.obs.loc["cell3", "cell_type"] = "rare"
    with pytest.raises(ValueError, match="'rare' has 1 of 60 cells: too few.*merge or drop it, or pass validation="):
        finetune(model(), cells)
    classifier = finetune(model(), cells, validation=more_cells, n_epochs=1, **QUIET)
    assert classifier.labels[-1] == "rare"


def test_validation_is_an_eighth_of_the_cells_with_some_of_each_label(model, make_cells, monkeypatch):
    parts = []
    measure = finetuning._measure
    monkeypatch.setattr(
        finetuning, "_measure", lambda c, x, truth, size: (parts.append(truth), measure(c, x, truth, size))[1]
    )
    finetune(model(), tokenize(make_cells(96)), n_epochs=1, **QUIET)
    assert np.bincount(parts[0]).tolist() == [4, 4, 4]


@pytest.mark.parametrize(("head", "expressed_only", "starts"), [("sound", True, 1), ("published", True, 0),
                                                                ("sound", False, 0)])  # fmt: skip
def test_only_a_sound_head_over_expressed_genes_is_set_to_a_start(
    head, expressed_only, starts, model, cells, more_cells, monkeypatch, tmp_path
):
    made, start = [], scbert.AnnotationHead.start
    monkeypatch.setattr(scbert.AnnotationHead, "start", lambda self, hidden: made.append(1) or start(self, hidden))
    encoder = model()
    encoder.set_expressed_only(expressed_only)
    recipe = replace(ONCE, head=head)
    for _ in range(2):  # the second goes on from the first
        finetune(
            encoder, cells, validation=more_cells, n_epochs=1, recipe=recipe, checkpoint=tmp_path / "a.pt", **QUIET
        )
    assert len(made) == starts
