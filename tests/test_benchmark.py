"""Each method on each split: the same cells for all, computed once, kept, and computed anew where need be."""

import importlib.util
import json
import math
import shutil
import sys
import threading
import time
from functools import partial

import numpy as np
import pandas as pd
import pytest
from scipy import sparse
from sklearn.metrics import f1_score

import scbert
from scbert import benchmark, genes, kept, methods, paths, protocols, record, runner
from scbert.evaluate import fitted
from scbert.train import finetune as finetuning

CALLS = []  # of `fit_fake`: (name, training cells, validation cells, seed)
FAILURES = {}  # number of a call, from 0 -> what it raises


def fit_fake(train, validation, *, label_key, seed=0, name="one", strength=1.0):
    """Say the commonest label."""
    CALLS.append((name, train.copy(), validation.copy(), seed))
    if len(CALLS) - 1 in FAILURES:
        raise FAILURES[len(CALLS) - 1]
    predict = methods.fit_majority(train, validation, label_key=label_key)

    def predict_and_say(adata):
        return predict(adata)

    predict_and_say.chosen = f"strength {strength:g}"
    return predict_and_say


def fit_first_gene(train, validation, *, label_key, seed=0):
    """Say B where the first gene has many counts, else T/NK."""

    def predict(adata):
        high = adata.X.toarray()[:, 0] > 4
        return pd.DataFrame({"T/NK": 0.9 - 0.7 * high, "B": 0.1 + 0.7 * high}, index=adata.obs_names)

    return predict


FAKES = {"one": fit_fake, "two": partial(fit_fake, name="two")}


@pytest.fixture(autouse=True)
def no_calls(monkeypatch, tmp_path):
    CALLS.clear()
    FAILURES.clear()
    monkeypatch.delenv("SCBERT_PART", raising=False)
    monkeypatch.setenv("SCBERT_RUNS", str(tmp_path))


def start(notebook="04_test", profile="demo"):
    parameters = {"profile": profile, "seed": 0}
    return record.Run(notebook, {**parameters, "__annotations__": dict.fromkeys(parameters)})


def run_quietly(jobs, run):
    return runner.run(jobs, run, progress=False)


def called():
    """Return the names of the methods called since the last time."""
    names = [name for name, *_ in CALLS]
    CALLS.clear()
    return names


def split_by_number(adata, protocol, train, validation, test, repeat=0, fold=0):
    return protocols.Split(protocol, repeat, fold, *(adata.obs_names[part] for part in (train, validation, test)))


@pytest.fixture
def toy(make_cells):
    return make_cells(60)


@pytest.fixture
def halves(toy):
    """Two splits of different cells."""
    return [
        split_by_number(toy, "first", slice(0, 15), slice(15, 21), slice(21, 30)),
        split_by_number(toy, "second", slice(30, 45), slice(45, 51), slice(51, 60)),
    ]


def test_there_is_a_job_for_each_split_and_method_the_methods_of_a_split_together(toy, halves):
    jobs = runner.plan(toy, halves, FAKES, data="toy")
    assert [(job.split.protocol, job.method) for job in jobs] == [
        ("first", "one"), ("first", "two"), ("second", "one"), ("second", "two"),
    ]  # fmt: skip
    assert len({job.identity for job in jobs}) == 4
    overlapping = split_by_number(toy, "", slice(0, 15), slice(15, 21), slice(20, 30))
    with pytest.raises(ValueError, match=r"1 cells are in more than one of training, validation and test"):
        runner.plan(toy, [overlapping], FAKES, data="toy")


def test_folds_give_each_method_the_same_cells_and_never_the_tested_ones(toy):
    splits = protocols.cross_validation(toy, "toy", n_folds=3)
    predictions, _ = run_quietly(runner.plan(toy, splits, FAKES, data="toy"), start())
    for _, rows in predictions.groupby("method"):
        assert sorted(rows["cell"]) == sorted(toy.obs_names)
        assert rows["truth"].tolist() == toy.obs.loc[rows["cell"], "cell_type"].astype(str).tolist()
    for number, (name, train, validation, _) in enumerate(CALLS):
        in_fold = (predictions["fold"] == number // 2) & (predictions["method"] == name)
        tested = set(predictions.loc[in_fold, "cell"])
        assert len(tested) == 20
        assert not set(train.obs_names) & set(validation.obs_names)
        assert not {*train.obs_names, *validation.obs_names} & tested


def test_the_published_report_is_on_the_cells_that_chose_the_epoch(toy):
    splits = protocols.cross_validation(toy, "toy", n_folds=2)
    for recipe, part in ((scbert.Recipe.sound(), "test"), (scbert.Recipe.published(), "validation")):
        jobs = runner.plan(toy, splits, {"one": fit_first_gene}, data="toy", report_on=recipe.report_on)
        predictions, costs = run_quietly(jobs, start())
        assert predictions["cell"].tolist() == [cell for split in splits for cell in getattr(split, part)]
        same = costs["test_accuracy"].equals(costs["validation_accuracy"])
        assert same == (part == "validation")
    with pytest.raises(ValueError, match="report_on must be 'test' or 'validation', not 'train'"):
        runner.plan(toy, splits, FAKES, data="toy", report_on="train")


def test_cells_of_two_sides_are_refused_whichever_are_reported_on(toy):
    overlapping = split_by_number(toy, "", slice(0, 15), slice(15, 21), slice(20, 30))
    with pytest.raises(ValueError, match=r"1 cells are in more than one of training, validation and test"):
        runner.plan(toy, [overlapping], FAKES, data="toy", report_on="validation")


def test_a_job_is_computed_once_whatever_is_added_later(toy, halves):
    first = run_quietly(runner.plan(toy, halves, FAKES, data="toy"), start())
    assert called() == ["one", "two", "one", "two"]
    again = run_quietly(runner.plan(toy, halves, FAKES, data="toy"), start())
    assert called() == []
    for one, other in zip(first, again, strict=True):
        pd.testing.assert_frame_equal(one, other)
    more = {"zero": partial(fit_fake, name="zero"), **FAKES}
    predictions, costs = run_quietly(runner.plan(toy, halves, more, data="toy"), start())
    assert called() == ["zero", "zero"]
    assert costs["method"].tolist() == ["zero", "one", "two"] * 2
    pd.testing.assert_frame_equal(predictions[predictions["method"] != "zero"].reset_index(drop=True), first[0])
    run_quietly(runner.plan(toy, halves[:1], FAKES, data="another name"), start())
    assert called() == []


def test_a_failed_job_is_named_all_others_are_kept_and_only_it_is_tried_again(toy, halves):
    jobs = runner.plan(toy, halves, FAKES, data="toy")
    FAILURES[1] = RuntimeError("out of luck\nand more lines")
    with pytest.raises(RuntimeError) as error:
        run_quietly(jobs, start())
    assert str(error.value) == (
        "1 of 4 jobs failed; all others are kept, and the same command tries these again. "
        "two on toy first, repeat 0, fold 0: RuntimeError: out of luck"
    )
    assert called() == ["one", "two", "one", "two"]
    FAILURES.clear()
    predictions, _ = run_quietly(jobs, start())
    assert called() == ["two"]
    assert len(predictions) == 4 * 9


def test_of_many_failed_jobs_three_are_named(toy):
    splits = protocols.cross_validation(toy, "toy", n_folds=5)
    FAILURES.update({number: ValueError(f"number {number}") for number in range(5)})
    with pytest.raises(
        RuntimeError, match=r"5 of 5 jobs failed; .* one on toy, repeat 0, fold 0: ValueError: number 0"
    ) as e:
        run_quietly(runner.plan(toy, splits, {"one": fit_fake}, data="toy"), start())
    assert str(e.value).endswith("fold 2: ValueError: number 2; and 2 more")


def test_a_split_whose_cells_cannot_be_prepared_fails_alone(toy, halves):
    toy.obs["n_counts"] = 2000.0
    few = protocols.Split("third", 0, 0, *(cells[:2] for cells in halves[0][3:6]))
    jobs = runner.plan(toy, halves[:1], FAKES, data="toy")
    jobs += runner.plan(toy, [few], FAKES, data="toy", genes=["no", "such"])
    with pytest.raises(RuntimeError, match=r"2 of 4 jobs failed.* one on toy third, .*None of the data's 24 genes"):
        run_quietly(jobs, start())
    assert called() == ["one", "two"]


def test_an_interrupted_run_continues_and_ends_as_if_it_had_not_been_interrupted(toy, halves):
    jobs = runner.plan(toy, halves, FAKES, data="toy")
    FAILURES[2] = KeyboardInterrupt()
    run = start()
    with pytest.raises(KeyboardInterrupt):
        run_quietly(jobs, run)
    assert sorted(path.stem for path in run.path("jobs").iterdir()) == sorted(job.identity for job in jobs[:2])
    assert called() == ["one", "two", "one"]
    FAILURES.clear()
    later = start()
    predictions, costs = run_quietly(jobs, later)
    assert called() == ["one", "two"]
    whole, _ = run_quietly(jobs, start("04_other"))
    pd.testing.assert_frame_equal(predictions, whole)
    assert later.earlier_seconds == pytest.approx(costs["seconds"][:2].sum())


def identities(adata, splits, fits=FAKES, **options):
    jobs = runner.plan(adata, splits, fits, data="toy", **options)
    return {(job.split.protocol, job.method): job.identity for job in jobs}


def changed(before, after):
    return {key for key in before if before[key] != after[key]}


def test_a_changed_option_of_one_method_voids_its_results_alone(toy, halves):
    before = identities(toy, halves)
    after = identities(toy, halves, FAKES | {"two": partial(fit_fake, name="two", strength=2.0)})
    assert changed(before, after) == {("first", "two"), ("second", "two")}


def test_a_changed_split_or_label_voids_the_results_of_its_split_alone(toy, halves):
    before, second = identities(toy, halves), {("second", "one"), ("second", "two")}
    moved = protocols.Split(*halves[1][:3], halves[1].train[1:], halves[1].validation, halves[1].test)
    assert changed(before, identities(toy, [halves[0], moved])) == second
    for number in (30, 45, 59):  # a training, a validation and a test cell
        other = toy.copy()
        other.obs["cell_type"] = other.obs["cell_type"].astype(str)
        other.obs.loc[f"cell{number}", "cell_type"] = "other"
        assert changed(before, identities(other, halves)) == second
    swapped = protocols.Split(*halves[1][:3], halves[1].validation, halves[1].train, halves[1].test)
    assert changed(before, identities(toy, [halves[0], swapped])) == second


@pytest.mark.parametrize("what", ["a count", "n_counts", "a name", "genes", "n_bins", "seed"])
def test_changed_data_genes_bins_or_seed_void_all_results(toy, halves, what):
    other, options = toy.copy(), {}
    if what == "a count":
        other.X[59, 0] += 1
    elif what == "n_counts":
        other.obs["n_counts"] *= 2
    elif what == "a name":
        other.var_names = ["other", *other.var_names[1:]]
    else:
        options = {"genes": {"genes": ["gene0"]}, "n_bins": {"n_bins": 4}, "seed": {"seed": 1}}[what]
    before = identities(toy, halves)
    assert changed(before, identities(other, halves, **options)) == set(before)
    assert identities(other, halves, **options) == identities(other, halves, **options)


def test_weights_of_an_encoder_count_and_not_the_object_that_holds_them(toy, halves, config):
    def plan_with(encoder):
        return identities(toy, halves, {"scbert": partial(methods.fit_scbert, encoder=encoder)})

    before = plan_with(scbert.ScBert(config, seed=1))
    assert not changed(before, plan_with(scbert.ScBert(config, seed=1)))
    silent = partial(methods.fit_scbert, encoder=scbert.ScBert(config, seed=1), progress=False, checkpoints="elsewhere")
    assert not changed(before, identities(toy, halves, {"scbert": silent}))
    other = scbert.ScBert(config, seed=1)
    other.pos_emb.emb.weight.data[3, 2] += 1e-3
    assert changed(before, plan_with(other)) == set(before)
    other = scbert.ScBert(config, seed=1)
    other.set_expressed_only(True)
    assert changed(before, plan_with(other)) == set(before)


SOURCE = """
def fit(train, validation, *, label_key, seed=0):
    return inner(train) + 1


def inner(train):
    return 2
"""


def describe_source(folder, source):
    """Return the description of `fit` in a module of that source."""
    number = len(list(folder.glob("module*.py")))
    path = folder / f"module{number}.py"
    path.write_text(source)
    spec = importlib.util.spec_from_file_location("written_module", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "written_module", module)
        return runner.describe_method(module.fit)


def test_changed_code_of_somebodys_own_method_voids_its_results(tmp_path):
    before = describe_source(tmp_path, SOURCE)
    for old, new in [("+ 1", "+ 10"), ("return 2", "return 20"), ("seed=0", "seed=1")]:
        assert describe_source(tmp_path, SOURCE.replace(old, new)) != before
    words = SOURCE.replace("return 2", "return 2  # of all").replace("return inner", '"""One."""\n    return inner')
    assert describe_source(tmp_path, words) == before


@pytest.mark.parametrize(
    ("file", "line", "void"),
    [
        ("figures/plot.py", "EXTRA = 1", set()),
        ("experiments/benchmark.py", "EXTRA = 1", set()),
        ("run/record.py", "EXTRA = 1", set()),
        ("train/finetune.py", "EXTRA = 1", {"scbert"}),
        ("annotate.py", "EXTRA = 1", {"scbert"}),
        ("evaluate/metrics.py", "EXTRA = 1", {"scbert", "majority"}),
        ("data/preprocess.py", "EXTRA = 1", {"scbert", "majority"}),
        ("data/preprocess.py", "# no code", set()),
    ],
)
def test_a_change_in_a_room_voids_the_results_that_its_code_makes(
    toy, halves, config, tmp_path, monkeypatch, file, line, void
):
    fits = {"scbert": partial(methods.fit_scbert, encoder=config), "majority": methods.fit_majority}
    before = identities(toy, halves, fits)
    copy = tmp_path / "scbert"
    shutil.copytree(runner.PACKAGE, copy, ignore=shutil.ignore_patterns("__pycache__", "*.safetensors"))
    monkeypatch.setattr(runner, "PACKAGE", copy)
    runner.hash_room.cache_clear()
    try:
        assert identities(toy, halves, fits) == before
        with open(copy / file, "a") as edited:
            edited.write(f"\n{line}\n")
        runner.hash_room.cache_clear()
        assert {name for _, name in changed(before, identities(toy, halves, fits))} == void
    finally:
        runner.hash_room.cache_clear()


def test_a_comment_a_docstring_and_layout_are_no_code():
    plain = "def f(x):\n    return x + 1\n\n\nclass A:\n    def g(self):\n        return 'text'\n"
    dressed = (
        '"""A module."""\n\ndef f(\n    x,\n):\n    """A function."""\n    # why\n    return (x + 1)\n'
        "class A:\n    '''A class.'''\n\n    def g(self):\n        'A method.'\n        return 'text'\n"
    )
    assert runner.hash_code(plain) == runner.hash_code(dressed)
    for old, new in [("x + 1", "x + 2"), ("'text'", "'texts'"), ("def f", "def h"), ("(x)", "(x=1)")]:
        assert runner.hash_code(plain) != runner.hash_code(plain.replace(old, new))
    assert runner.hash_code("    def f():\n        return 1\n") == runner.hash_code("def f():\n    return 1\n")


def test_parts_share_the_jobs_out_and_their_results_assemble_to_the_same_tables(toy, monkeypatch, capsys):
    splits = protocols.cross_validation(toy, "toy", n_folds=5)
    jobs = runner.plan(toy, splits, FAKES, data="toy")
    expected, _ = run_quietly(jobs, start("04_whole"))
    assert len(called()) == 10
    done = []
    for part in ("1/3", "2/3", "3/3"):
        monkeypatch.setenv("SCBERT_PART", part)
        with pytest.raises(paths.PartDone, match=f"Part {part} is done: . jobs, . of them computed"):
            run_quietly(jobs, start())
        done.append(len(called()))
    assert sum(done) == 10
    assert max(done) - min(done) <= 1
    assert "10 jobs (method x split), 4 of them this part's; 0 are there, 4 to compute" in capsys.readouterr().out
    monkeypatch.setenv("SCBERT_PART", "1/3")
    with pytest.raises(paths.PartDone, match=f"Part 1/3 is done: {done[0]} jobs, 0 of them computed"):
        run_quietly(jobs, start())
    monkeypatch.delenv("SCBERT_PART")
    predictions, _ = run_quietly(jobs, start())
    assert called() == []
    pd.testing.assert_frame_equal(predictions, expected)


def test_shares_are_disjoint_complete_and_of_about_the_same_work(toy, config):
    scbert_like = partial(methods.fit_scbert, encoder=config, n_epochs=4)
    splits = protocols.reference_sizes(toy, "toy", fractions=[0.3, 0.6, 0.9], n_repeats=4)
    jobs = runner.plan(toy, splits, {"one": fit_fake, "scbert": scbert_like}, data="toy")
    shares = [runner.share_out(jobs, part, 4) for part in range(1, 5)]
    assert sorted(job.identity for share in shares for job in share) == sorted(job.identity for job in jobs)
    order = [job.identity for job in jobs]
    for share in shares:
        numbers = [order.index(job.identity) for job in share]
        assert numbers == sorted(numbers)
    work = [sum(job.cell_steps or len(job.split.train) for job in share) for share in shares]
    assert max(work) - min(work) <= min(job.cell_steps for job in jobs if job.cell_steps)
    again = [runner.share_out(jobs[::-1], part, 4) for part in range(1, 5)]
    assert [{job.identity for job in share} for share in again] == [{job.identity for job in share} for share in shares]


def test_a_part_with_a_failed_job_is_not_done(toy, halves, monkeypatch):
    monkeypatch.setenv("SCBERT_PART", "1/1")
    FAILURES[0] = ValueError("no")
    with pytest.raises(RuntimeError, match="1 of 4 jobs failed"):
        run_quietly(runner.plan(toy, halves, FAKES, data="toy"), start())


# Results


def test_predictions_are_a_row_for_each_job_and_test_cell(toy):
    toy.obs["cell_type"] = toy.obs["cell_type"].astype(str)
    toy.obs.loc["cell50", "cell_type"] = "new"
    split = split_by_number(toy, "held_out:x", slice(0, 30), slice(30, 45), slice(48, 57), repeat=2, fold=1)
    fits = {"first gene": fit_first_gene, "majority": methods.fit_majority}
    predictions, costs = run_quietly(runner.plan(toy, [split], fits, data="toy"), start())
    assert predictions.columns.tolist() == [
        *["data", "protocol", "repeat", "fold", "method", "cell", "truth", "predicted", "confidence", "seen", "part"]
    ]
    assert set(predictions["part"]) == {"test"}
    about = predictions[["data", "protocol", "repeat", "fold"]].drop_duplicates()
    assert about.to_numpy().tolist() == [["toy", "held_out:x", 2, 1]]
    own = predictions[predictions["method"] == "first gene"].set_index("cell")
    assert own.index.tolist() == list(toy.obs_names[48:57])
    assert own["truth"].tolist() == list(toy.obs["cell_type"].iloc[48:57])
    high = toy.X.toarray()[48:57, 0] > 4
    assert 0 < high.sum() < 9
    assert own["predicted"].tolist() == list(np.where(high, "B", "T/NK"))
    assert own["confidence"].to_numpy() == pytest.approx(np.where(high, 0.8, 0.9))
    assert own["seen"].tolist() == [cell != "cell50" for cell in own.index]
    seen = own[own["seen"]]
    assert costs["test_accuracy"][0] == pytest.approx((seen["truth"] == seen["predicted"]).mean())
    assert costs["test_macro_f1"][0] == pytest.approx(f1_score(seen["truth"], seen["predicted"], average="macro"))
    validation = toy[30:45]
    named = np.where(validation.X.toarray()[:, 0] > 4, "B", "T/NK")
    assert costs["validation_accuracy"][0] == pytest.approx((named == validation.obs["cell_type"]).mean())


def test_costs_are_a_row_for_each_job(toy, halves):
    repeats = [protocols.Split("second", 3, 0, *halves[1][3:])]
    _, costs = run_quietly(runner.plan(toy, halves[:1] + repeats, FAKES, data="toy", seed=10), start())
    assert costs.columns.tolist() == [
        *["data", "protocol", "repeat", "fold", "method", "training_cells", "seconds", "cpu_seconds", "memory_mb"],
        *["cell_steps", "chosen", "validation_accuracy", "validation_macro_f1", "test_accuracy", "test_macro_f1"],
    ]
    assert costs["training_cells"].tolist() == [15] * 4
    assert costs["chosen"].tolist() == ["strength 1"] * 4
    assert costs["cell_steps"].tolist() == [0] * 4
    assert (costs[["seconds", "memory_mb"]] >= 0).all(axis=None)
    assert [seed for *_, seed in CALLS] == [10, 10, 13, 13]  # plus the repeat


def test_a_split_that_tests_unseen_labels_alone_has_no_test_score(toy):
    toy.obs["cell_type"] = [*toy.obs["cell_type"].astype(str)[:45], *["new"] * 15]
    split = split_by_number(toy, "", slice(0, 30), slice(30, 45), slice(45, 60))
    predictions, costs = run_quietly(runner.plan(toy, [split], {"one": fit_fake}, data="toy"), start())
    assert not predictions["seen"].any()
    assert costs[["test_accuracy", "test_macro_f1"]].isna().all(axis=None)
    assert costs["validation_accuracy"].notna().all()


def test_methods_get_tokenized_cells_of_the_model_genes_and_never_a_test_cell(toy, halves):
    genes = ["gene3", "absent", "gene1"]
    toy.obs["n_counts"] = 500.0
    run_quietly(runner.plan(toy, halves, {"one": fit_fake}, data="toy", genes=genes, n_bins=4), start())
    for split, (_, train_cells, validation, _) in zip(halves, CALLS, strict=True):
        for adata, cells in ((train_cells, split.train), (validation, split.validation)):
            assert list(adata.obs_names) == list(cells)
            assert list(adata.var_names) == genes
            own = toy[list(cells)]
            assert (
                adata.X.toarray() == np.column_stack([own.X.toarray()[:, 3], [0] * len(cells), own.X.toarray()[:, 1]])
            ).all()
            assert (adata.obs["n_counts"] == 500).all()
            assert adata.layers["bins"].max() == 4


def test_genes_are_chosen_anew_on_the_training_and_validation_cells_of_each_split(toy, halves):
    counts = toy.X.toarray()
    counts[:, 20:] = 0
    counts[:15:2, 20] = 900  # varies most in training cells of the first split
    counts[45:51:2, 21] = 900  # in validation cells of the second
    counts[21:30:2, 22] = 1500  # in test cells
    counts[51:60:2, 22] = 1500
    toy.X = sparse.csr_matrix(counts)
    run_quietly(runner.plan(toy, halves, {"one": fit_fake}, data="toy", genes="1"), start())
    assert [list(train_cells.var_names) for _, train_cells, *_ in CALLS] == [["gene20"], ["gene21"]]


def test_the_choice_of_genes_sees_no_test_cell(toy, halves, monkeypatch):
    seen = []
    choose = genes.choose_genes

    def spy(adata, choice):
        seen.append((set(adata.obs_names), choice))
        return choose(adata, choice)

    monkeypatch.setattr(runner, "choose_genes", spy)
    run_quietly(runner.plan(toy, halves, FAKES, data="toy", genes="5"), start())
    assert seen == [({*split.train, *split.validation}, "5") for split in halves]


def test_memory_is_what_came_on_top_of_what_was_held():
    held = np.ones(40 * 2**17)  # 40 MB, before
    with runner.watch_memory() as memory:
        block = np.ones(50 * 2**17)  # 50 MB
        time.sleep(0.06)
        del block
    assert 45 <= memory["peak_mb"] <= 80
    assert len(held)
    with runner.watch_memory() as memory:
        time.sleep(0.06)
    assert memory["peak_mb"] < 20


@pytest.mark.parametrize(("profile", "expected"), [("paper", True), ("core", True), ("demo", False)])
def test_a_gpu_multiplies_in_tf32_where_the_profile_says_so_and_only_in_jobs(toy, halves, profile, expected):
    def fit(train, validation, *, label_key, seed=0):
        seen.append(runner.torch.backends.cuda.matmul.allow_tf32)
        return methods.fit_majority(train, validation, label_key=label_key)

    seen = []
    run_quietly(runner.plan(toy, halves[:1], {"spy": fit}, data="toy"), start(profile=profile))
    assert seen == [expected]
    assert not runner.torch.backends.cuda.matmul.allow_tf32


def test_memory_is_watched_to_the_end_where_a_method_fails():
    before = threading.active_count()
    with pytest.raises(KeyError), runner.watch_memory():
        raise KeyError
    assert threading.active_count() == before


def test_cell_steps_are_cells_times_epochs_of_what_has_a_network(config):
    scbert_like = partial(methods.fit_scbert, encoder=config, n_epochs=4)
    assert runner.count_cell_steps(scbert_like, 100) == 400
    assert runner.count_cell_steps(partial(scbert_like, pretrain_epochs=3), 100) == 700
    assert runner.count_cell_steps(partial(scbert_like, min_steps=70), 100) == 1000  # 7 steps an epoch
    assert runner.count_cell_steps(partial(scbert_like, min_steps=70, batch_size=10, accumulate=5), 100) == 3500
    rebalanced = partial(methods.fit_rebalanced, fit=scbert_like, how="subsample")
    assert runner.count_cell_steps(rebalanced, 100) == 400
    for fit in (methods.fit_majority, methods.fit_logistic_regression, partial(fit_fake, name="x")):
        assert runner.count_cell_steps(fit, 100) == 0
    rebalanced = partial(methods.fit_rebalanced, fit=methods.fit_logistic_regression, how="oversample")
    assert runner.count_cell_steps(rebalanced, 100) == 0


def fit_with_epochs(train, validation, *, label_key, seed=0, n_epochs=5):
    return methods.fit_majority(train, validation, label_key=label_key)


def test_a_method_of_ones_own_may_have_epochs_too(toy, halves):
    assert runner.count_cell_steps(fit_with_epochs, 100) == 0
    predictions, _ = runner.run(runner.plan(toy, halves, {"own": fit_with_epochs}, data="toy"), start())
    assert len(predictions) == 18


@pytest.fixture
def tiny(config):
    """scBERT of two layers, 12 epochs of fine-tuning after one of pretraining."""
    return partial(methods.fit_scbert, encoder=config, pretrain_epochs=1, n_epochs=4, min_steps=12, learning_rate=1e-2)


def test_the_cell_steps_planned_are_those_done_where_nothing_stops_early(toy, halves, tiny):
    [job] = runner.plan(toy, halves[:1], {"scbert": tiny}, data="toy")
    assert job.cell_steps == 15 * (1 + 12)
    _, costs = run_quietly([job], start())
    assert costs["cell_steps"][0] <= job.cell_steps
    patient = partial(tiny, patience=12)
    [job] = runner.plan(toy, halves[:1], {"scbert": patient}, data="toy")
    _, costs = run_quietly([job], start())
    assert costs["cell_steps"][0] == job.cell_steps


def test_a_job_stopped_in_its_training_continues_from_its_checkpoint(toy, halves, tiny, monkeypatch):
    jobs = runner.plan(toy, halves[:1], {"scbert": partial(tiny, patience=12)}, data="toy")
    expected, _ = run_quietly(jobs, start("04_whole"))
    measure, epochs = finetuning._measure, []

    def measure_and_stop(*arguments):
        epochs.append(len(epochs))
        if len(epochs) == 6:
            raise KeyboardInterrupt
        return measure(*arguments)

    monkeypatch.setattr(finetuning, "_measure", measure_and_stop)
    run = start()
    with pytest.raises(KeyboardInterrupt):
        run_quietly(jobs, run)
    assert len(list(run.path("checkpoints").rglob("*-finetune.pt"))) == 1
    assert not run.path("jobs").exists() or not list(run.path("jobs").iterdir())
    predictions, costs = run_quietly(jobs, start())
    assert len(epochs) == 6 + 7  # five of twelve were done
    pd.testing.assert_frame_equal(predictions, expected)
    assert costs["cell_steps"][0] == 15 * 13
    assert not list(run.path("checkpoints").iterdir())  # of a job that is done


def test_rebalanced_scbert_continues_and_shows_no_bar_of_its_own(toy, halves, tiny, monkeypatch, capsys):
    fits = {"scbert:oversample": partial(methods.fit_rebalanced, fit=tiny, how="oversample")}
    stop = pytest.MonkeyPatch()
    stop.setattr(methods, "finetune", lambda *arguments, **options: (_ for _ in ()).throw(KeyboardInterrupt))
    run = start()
    with pytest.raises(KeyboardInterrupt):
        run_quietly(runner.plan(toy, halves[:1], fits, data="toy"), run)
    stop.undo()
    assert list(run.path("checkpoints").rglob("*-pretrain.pt"))
    run_quietly(runner.plan(toy, halves[:1], fits, data="toy"), start())
    assert "pretrain:" not in (out := capsys.readouterr().out)
    assert "fine-tune:" not in out


def test_the_time_it_may_take_is_said_before(toy, halves, tiny, capsys):
    jobs = runner.plan(toy, halves[:1], {"one": fit_fake, "scbert": tiny}, data="toy")
    runner.run(jobs, start())
    out = capsys.readouterr().out
    assert "2 jobs (method x split); 0 are there, 2 to compute" in out
    assert "scBERT: 195 cell-steps, up to twice as many where it has not converged, about 0." in out
    runner.run(jobs, start())
    out = capsys.readouterr().out
    assert "2 are there, 0 to compute" in out
    assert "cell-steps" not in out


def test_a_method_that_fails_while_time_is_taken_stops_no_other(toy, halves, tiny):
    broken = partial(tiny, learning_rate="fast")
    jobs = runner.plan(toy, halves[:1], {"broken": broken, "one": fit_fake}, data="toy")
    with pytest.raises(RuntimeError, match=r"1 of 2 jobs failed; .* broken on toy first"):
        runner.run(jobs, start())
    assert called() == ["one"]


def test_costs_are_medians_a_training_the_most_memory_and_sums_over_all():
    costs = pd.DataFrame(
        {
            "protocol": ["", "", "", "few:2", "", ""],
            "method": ["b", "b", "b", "b", "a", "a"],
            "seconds": [1.0, 2, 9, 100, 1, 2],
            "cpu_seconds": [3600.0, 1800, 1800, 7200, 360, 0],
            "memory_mb": [10.0, 30, 20, 90, 1, 3],
            "cell_steps": [5, 6, 7, 8, 0, 0],
        }
    )
    table = benchmark.summarise_costs(costs, protocol="")
    assert table.index.tolist() == ["b", "a"]
    assert table.loc["b"].to_dict() == {
        "seconds": 2, "cpu_seconds": 1800, "memory_mb": 30, "cpu_hours_in_all": 4, "cell_steps_in_all": 26,
    }  # fmt: skip
    assert table.loc["a", ["seconds", "memory_mb", "cpu_hours_in_all"]].tolist() == pytest.approx([1.5, 3, 0.1])
    assert benchmark.summarise_costs(costs).loc["b", ["seconds", "memory_mb"]].tolist() == [5.5, 90]


def test_optimism_is_the_mean_of_validation_minus_test_with_the_interval_of_its_trainings():
    costs = pd.DataFrame(
        {
            "method": ["three"] * 4 + ["two"] * 2 + ["one"],
            "validation_accuracy": [0.9, 0.8, 0.7, 0.9, 0.9, 0.6, 0.5],
            "test_accuracy": [0.8, 0.8, 0.4, None, 0.8, 0.7, 0.25],
            "validation_macro_f1": [0.5] * 7,
            "test_macro_f1": [0.5, 0.25, 0.75, None, 0.5, 0.5, 1.0],
        }
    )
    table = benchmark.measure_optimism(costs)
    assert table.index.tolist() == [(m, metric) for m in ("three", "two", "one") for metric in ("accuracy", "macro_f1")]
    differences = [0.1, 0.0, 0.3]
    mean = 0.4 / 3
    half = 4.302652729911275 * math.sqrt(sum((d - mean) ** 2 for d in differences) / 2) / math.sqrt(3)  # t, 2 degrees
    row = table.loc[("three", "accuracy")]
    assert row[["value", "low", "high"]].tolist() == pytest.approx([mean, mean - half, mean + half])
    assert table["n"].tolist() == [3, 3, 2, 2, 1, 1]
    assert table.loc[("two", "accuracy"), ["value", "low", "high"]].tolist() == pytest.approx([0, -0.1, 0.1])
    assert table.loc[("one", "accuracy"), ["value", "low", "high"]].tolist() == pytest.approx([0.25] * 3)


def test_results_are_strict_json_that_is_there_whole(toy, halves):
    run = start()
    jobs = runner.plan(toy, halves[:1], FAKES, data="toy")
    run_quietly(jobs, run)
    files = list(run.path("jobs").iterdir())
    assert {file.name for file in files} == {f"{job.identity}.json" for job in jobs}
    for file in files:
        assert json.loads(file.read_text(), parse_constant=pytest.fail)["method"] in FAKES


# What is kept


@pytest.fixture
def some_aside(toy):
    """A split with cells set aside; two tested cells and one set aside have a label that no training cell has."""
    toy.obs["cell_type"] = toy.obs["cell_type"].astype(str)
    toy.obs.loc[["cell40", "cell41", "cell50"], "cell_type"] = "new"
    cells = (toy.obs_names[part] for part in (slice(0, 24), slice(24, 33), slice(33, 45), slice(45, 54)))
    return protocols.Split("held_out:x", 1, 0, *cells)


FITS = {
    "majority": methods.fit_majority,
    "nearest_centroid": methods.fit_nearest_centroid,
    "logistic_regression": partial(methods.fit_logistic_regression, strengths=(0.1,)),
}


def test_cells_set_aside_are_predicted_after_the_tested_and_count_in_no_score(toy, some_aside):
    fits = {"first gene": fit_first_gene}
    predictions, costs = run_quietly(runner.plan(toy, [some_aside], fits, data="toy"), start())
    assert predictions["cell"].tolist() == [*some_aside.test, *some_aside.aside]
    assert predictions["part"].tolist() == ["test"] * 12 + ["aside"] * 9
    own = predictions.set_index("cell")
    assert own.index[~own["seen"]].tolist() == ["cell40", "cell41", "cell50"]
    assert own["truth"].tolist() == list(toy.obs["cell_type"][own.index])
    high = toy[own.index].X.toarray()[:, 0] > 4
    assert own["predicted"].tolist() == list(np.where(high, "B", "T/NK"))
    seen = own[own["seen"] & (own["part"] == "test")]
    assert len(seen) == 10
    right = (seen["truth"] == seen["predicted"]).mean()
    assert right != (own["truth"] == own["predicted"])[own["seen"]].mean()  # or this says little
    assert costs["test_accuracy"][0] == pytest.approx(right)
    assert costs["test_macro_f1"][0] == pytest.approx(f1_score(seen["truth"], seen["predicted"], average="macro"))
    bare, bare_costs = run_quietly(
        runner.plan(toy, [some_aside._replace(aside=np.array([], object))], fits, data="toy"), start()
    )
    pd.testing.assert_frame_equal(bare, predictions[:12])
    columns = ["test_accuracy", "test_macro_f1", "validation_accuracy", "chosen"]
    pd.testing.assert_frame_equal(bare_costs[columns], costs[columns])


def test_no_method_sees_a_cell_set_aside_nor_does_the_choice_of_genes(toy, some_aside):
    counts = toy.X.toarray()
    counts[:24:2, 20] = 900
    counts[45:54:2, 21] = 9000  # of cells set aside
    toy.X, toy.obs["n_counts"] = sparse.csr_matrix(counts), 10_000.0
    run_quietly(runner.plan(toy, [some_aside], {"one": fit_fake}, data="toy", genes="1"), start())
    [(_, train_cells, validation, _)] = CALLS
    assert list(train_cells.var_names) == ["gene20"]
    assert [*train_cells.obs_names, *validation.obs_names] == [*some_aside.train, *some_aside.validation]


def test_a_cell_set_aside_that_trains_is_refused(toy, some_aside):
    for part in ("train", "validation", "test"):
        cell = getattr(some_aside, part)[3]
        with pytest.raises(ValueError, match=rf"1 cells are in more than one of .* \(first: {cell}\)"):
            runner.plan(toy, [some_aside._replace(aside=np.array([cell], object))], FAKES, data="toy")


def test_what_is_kept_is_read_with_the_predictions_of_the_same_cells(toy, some_aside):
    run, jobs = start(), runner.plan(toy, [some_aside], FITS, data="toy", keep=True)
    predictions, _ = run_quietly(jobs, run)
    plain, _ = run_quietly(runner.plan(toy, [some_aside], FITS, data="toy"), start())
    pd.testing.assert_frame_equal(predictions, plain)  # keeping changes no prediction
    for job in jobs:
        kept = runner.read_kept(job, run)
        own = predictions[predictions["method"] == job.method].set_index("cell")
        pd.testing.assert_frame_equal(kept.cells, own[["truth", "predicted", "confidence", "seen", "part"]])
        probabilities = scbert.kept.to_probabilities(kept.logits)
        assert list(probabilities.index) == [*some_aside.test, *some_aside.aside]
        assert set(probabilities.columns) == {"B", "Monocyte", "T/NK"}
        assert probabilities.idxmax(axis=1).tolist() == kept.cells["predicted"].tolist()
        assert probabilities.max(axis=1).to_numpy() == pytest.approx(kept.cells["confidence"].to_numpy(), abs=6e-5)
        assert kept.embedding.shape == (21, 23)  # as many components as 24 training cells allow
        assert kept.distance.shape == (21,) and (kept.distance > 0).all()
    same = [runner.read_kept(job, run).embedding for job in jobs]
    assert (same[0] == same[1]).all() and (same[0] == same[2]).all()


def test_kept_outputs_are_those_of_the_method_trained_on_this_split(toy, some_aside, tiny):
    run = start()
    fits = {"scbert": tiny, "nearest_centroid": methods.fit_nearest_centroid}
    jobs = runner.plan(toy, [some_aside], fits, data="toy", keep=True, seed=4)
    run_quietly(jobs, run)
    cells = scbert.preprocess.tokenize(toy.copy())
    for job in jobs:
        train, validation = (cells[list(part)].copy() for part in (some_aside.train, some_aside.validation))
        predict = job.fit(
            train, validation, label_key="cell_type", seed=5, **methods.offer(job.fit, progress=False)
        )  # plus the repeat
        test = cells[[*some_aside.test, *some_aside.aside]].copy()
        kept = runner.read_kept(job, run)
        assert scbert.kept.to_probabilities(kept.logits).to_numpy() == pytest.approx(
            predict(test).to_numpy(), abs=1e-4
        )  # logits are kept as float32
        if job.method == "scbert":
            assert kept.embedding == pytest.approx(scbert.embed(predict.classifier, test), abs=1e-5)


def test_what_was_not_kept_or_not_run_cannot_be_read(toy, some_aside):
    run = start()
    [job] = runner.plan(toy, [some_aside], {"one": fit_fake}, data="toy", keep=True)
    [bare] = runner.plan(toy, [some_aside], {"one": fit_fake}, data="toy")
    with pytest.raises(ValueError, match="The job of one on toy held_out:x was not run yet: call run first"):
        runner.read_kept(job, run)
    run_quietly([bare], run)
    with pytest.raises(ValueError, match="The job of one on toy held_out:x keeps nothing: plan it with keep=True"):
        runner.read_kept(bare, run)
    with pytest.raises(ValueError, match="was not run yet"):
        runner.read_kept(job, run)
    assert sorted(path.name for path in run.path("jobs").iterdir()) == [f"{bare.identity}.json"]


def test_keeping_and_cells_set_aside_make_another_job_and_nothing_else_does(toy, halves, some_aside, monkeypatch):
    before = identities(toy, halves)
    kept = identities(toy, halves, keep=True)
    assert changed(before, kept) == set(before)
    more = [halves[0], halves[1]._replace(aside=toy.obs_names[:3].to_numpy())]
    second = {("second", "one"), ("second", "two")}
    assert changed(before, identities(toy, more)) == second
    assert changed(kept, identities(toy, more, keep=True)) == second
    fewer = [halves[0], halves[1]._replace(aside=toy.obs_names[:2].to_numpy())]
    assert changed(identities(toy, more), identities(toy, fewer)) == second
    with_aside = identities(toy, more)
    other = toy.copy()
    other.obs.loc["cell1", "cell_type"] = "new"  # the label of a cell set aside
    assert changed(with_aside, identities(other, more)) >= second


def test_a_job_stopped_after_its_outputs_were_kept_and_before_it_was_done_is_computed_anew(
    toy, some_aside, monkeypatch
):
    run, jobs = start(), runner.plan(toy, [some_aside], {"one": fit_fake}, data="toy", keep=True)
    write, stop = runner.write_text, pytest.MonkeyPatch()

    def write_and_stop(path, text):
        if path.parent.name == "jobs":
            raise KeyboardInterrupt
        return write(path, text)

    stop.setattr(runner, "write_text", write_and_stop)
    with pytest.raises(KeyboardInterrupt):
        run_quietly(jobs, run)
    stop.undo()
    file = run.path("jobs") / f"{jobs[0].identity}.npz"
    assert [path.name for path in file.parent.iterdir()] == [file.name]
    file.write_bytes(b"half of a file")
    with pytest.raises(ValueError, match="was not run yet"):
        runner.read_kept(jobs[0], run)
    assert called() == ["one"]
    run_quietly(jobs, start())
    assert called() == ["one"]
    assert runner.read_kept(jobs[0], run).logits.shape == (21, 3)
    run_quietly(jobs, start())
    assert called() == []


def test_parts_keep_too_and_what_they_kept_is_read_together(toy, halves, some_aside, monkeypatch):
    jobs = runner.plan(toy, [*halves, some_aside], FITS, data="toy", keep=True)
    whole = start("04_whole")
    expected, _ = run_quietly(jobs, whole)
    for part in ("1/2", "2/2"):
        monkeypatch.setenv("SCBERT_PART", part)
        with pytest.raises(paths.PartDone):
            run_quietly(jobs, start())
    monkeypatch.delenv("SCBERT_PART")
    run = start()
    monkeypatch.setattr(runner, "_compute_job", lambda *arguments: pytest.fail("computed again"))
    predictions, _ = run_quietly(jobs, run)
    pd.testing.assert_frame_equal(predictions, expected)
    for job in jobs:
        for one, other in zip(runner.read_kept(job, run), runner.read_kept(job, whole), strict=True):
            assert np.array_equal(one, other)


def test_a_job_whose_outputs_cannot_be_kept_is_not_done(toy, some_aside, monkeypatch):
    jobs = runner.plan(toy, [some_aside], {"one": fit_fake}, data="toy", keep=True)
    run, refuse = start(), pytest.MonkeyPatch()
    refuse.setattr(kept, "write_file", lambda *arguments: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(RuntimeError, match="1 of 1 jobs failed; .* one on toy held_out:x, .*OSError: disk full"):
        run_quietly(jobs, run)
    refuse.undo()
    run_quietly(jobs, start())
    assert called() == ["one", "one"]
    assert runner.read_kept(jobs[0], run).cells["part"].value_counts().to_dict() == {"test": 12, "aside": 9}


# Fitted methods that are kept

KEEPABLE = {"logistic_regression": methods.fit_logistic_regression}


def keep_all(toy, splits, fits, **options):
    return runner.plan(toy, splits, fits, data="toy", keep_models=list(fits), **options)


def test_a_kept_method_predicts_bit_for_bit_as_the_one_that_was_fitted(toy, halves, tiny):
    run, fits = start(), KEEPABLE | {"scbert": tiny}
    jobs = keep_all(toy, halves, fits, seed=3)
    predictions, costs = run_quietly(jobs, run)
    cells = scbert.preprocess.tokenize(toy.copy())
    for job, (_, cost) in zip(jobs, costs.iterrows(), strict=True):
        train, validation, test = protocols.take_cells(cells, job.split)
        options = methods.offer(job.fit, progress=False)
        fitted = job.fit(train, validation, label_key="cell_type", seed=3, **options)
        read = runner.read_model(job, run)
        pd.testing.assert_frame_equal(read(test), fitted(test), check_exact=True)
        for one, other in zip(read.read_out(test), fitted.read_out(test), strict=True):
            assert np.array_equal(one, other) or (one is None and other is None)
        own = predictions[(predictions["method"] == job.method) & (predictions["protocol"] == job.split.protocol)]
        assert read(test).idxmax(axis=1).tolist() == own["predicted"].tolist()
        if job.method == "scbert":
            assert read.cell_steps == fitted.cell_steps == cost["cell_steps"] > 0
            assert read.classifier.labels == fitted.classifier.labels
            for history in (read.history, read.classifier.history):
                pd.testing.assert_frame_equal(history, fitted.history, check_exact=True)
        else:
            assert read.chosen == fitted.chosen == cost["chosen"]


def test_keeping_a_method_changes_no_prediction(toy, halves, tiny):
    fits = KEEPABLE | {"scbert": tiny}
    plain, _ = run_quietly(runner.plan(toy, halves[:1], fits, data="toy"), start("04_plain"))
    kept, _ = run_quietly(keep_all(toy, halves[:1], fits), start())
    pd.testing.assert_frame_equal(plain, kept)


def test_only_the_methods_named_are_kept(toy, halves, tiny):
    run = start()
    jobs = runner.plan(toy, halves[:1], FAKES | {"scbert": tiny}, data="toy", keep_models=["scbert"])
    run_quietly(jobs, run)
    folders = [path for path in run.path("jobs").iterdir() if path.is_dir()]
    assert [path.name for path in folders] == [jobs[2].identity]
    assert not list(run.path("jobs").rglob("*.tmp*"))
    with pytest.raises(ValueError, match=r"one on toy first keeps no model: plan it with keep_models=\['one'\]"):
        runner.read_model(jobs[0], run)
    [later] = keep_all(toy, halves[1:], {"scbert": tiny})
    with pytest.raises(ValueError, match="scbert on toy second was not run yet: call run first"):
        runner.read_model(later, run)


def test_a_method_that_cannot_be_kept_says_so_before_anything_is_computed(toy, halves, tiny):
    rebalanced = partial(methods.fit_rebalanced, how="oversample")
    for fit in (tiny, *KEEPABLE.values(), partial(methods.fit_logistic_regression, strengths=(0.1,))):
        keep_all(toy, halves, {"it": fit})
        keep_all(toy, halves, {"it": partial(rebalanced, fit=fit)})
    for fit in (methods.fit_majority, methods.fit_nearest_centroid, fit_fake, partial(rebalanced, fit=fit_fake)):
        with pytest.raises(ValueError, match="The fitted it can't be kept: only what fit_scbert and fit_logistic_reg"):
            keep_all(toy, halves, {"it": fit})
    with pytest.raises(ValueError, match="keep_models names 'three', which is not planned: one, two are"):
        runner.plan(toy, halves, FAKES, data="toy", keep_models=["three"])
    assert called() == []


def test_keeping_a_method_makes_another_job_of_it_alone(toy, halves):
    fits = KEEPABLE | {"one": fit_fake}
    before = identities(toy, halves, fits)
    after = identities(toy, halves, fits, keep_models=list(KEEPABLE))
    assert changed(before, after) == {("first", "logistic_regression"), ("second", "logistic_regression")}
    both = identities(toy, halves, fits, keep_models=list(KEEPABLE), keep=True)
    assert changed(after, both) == changed(identities(toy, halves, fits, keep=True), after) == set(before)


@pytest.mark.parametrize("moment", ["before the model", "within the model", "before the result"])
def test_a_job_stopped_while_its_model_is_kept_is_computed_anew(toy, halves, tiny, monkeypatch, moment):
    run, jobs = start(), keep_all(toy, halves[:1], {"scbert": tiny})
    whole = start("04_whole")
    expected, _ = run_quietly(jobs, whole)

    def stop(*arguments, **options):
        raise KeyboardInterrupt

    stopped = pytest.MonkeyPatch()
    owner, name = {
        "before the model": (fitted, "write_fitted"),
        "within the model": (pd.DataFrame, "to_csv"),
        "before the result": (runner, "write_text"),
    }[moment]
    stopped.setattr(owner, name, stop)
    with pytest.raises(KeyboardInterrupt):
        run_quietly(jobs, run)
    stopped.undo()
    folder = run.path("jobs") / jobs[0].identity
    assert folder.exists() == (moment == "before the result")
    with pytest.raises(ValueError, match="was not run yet"):
        runner.read_model(jobs[0], run)
    if folder.exists():
        (folder / "history.csv").write_text("of another training\n1\n")
    epochs = []
    monkeypatch.setattr(finetuning, "_measure", lambda *arguments: epochs.append(1))
    predictions, _ = run_quietly(jobs, start())
    assert not epochs  # the training itself had come to its end, and its checkpoint was still there
    pd.testing.assert_frame_equal(predictions, expected)
    assert runner.read_model(jobs[0], run).history.equals(runner.read_model(jobs[0], whole).history)


def test_a_job_whose_model_cannot_be_written_is_not_done(toy, halves):
    run, jobs = start(), keep_all(toy, halves[:1], KEEPABLE)
    refuse = pytest.MonkeyPatch()
    refuse.setattr(fitted, "write_tensors", lambda *arguments: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(RuntimeError, match="1 of 1 jobs failed; .* logistic_regression on toy first.*disk full"):
        run_quietly(jobs, run)
    refuse.undo()
    run_quietly(jobs, start())
    assert runner.read_model(jobs[0], run).chosen


def test_the_table_of_predictions_has_the_same_bytes_wherever_it_is_written(toy, halves, tmp_path):
    predictions, _ = run_quietly(runner.plan(toy, halves, {"majority": methods.fit_majority}, data="toy"), start())
    for name in ("a", "b"):
        runner.write_predictions(predictions, tmp_path / name / f"{name}.csv.gz")
    one, other = ((tmp_path / name / f"{name}.csv.gz").read_bytes() for name in ("a", "b"))
    assert one == other


@pytest.mark.parametrize("what", ["cut off", "another number", "no JSON", "its model", "its logits"])
def test_a_damaged_result_is_named_and_computed_again(toy, halves, what):
    run, jobs = start(), keep_all(toy, halves[:1], KEEPABLE, keep=True)
    expected, _ = run_quietly(jobs, run)
    file = run.path("jobs") / f"{jobs[0].identity}.json"
    text = file.read_text()
    if what.startswith("its"):
        damaged = file.with_suffix(".npz") if what == "its logits" else file.with_suffix("") / fitted.REGRESSION
        content = bytearray(damaged.read_bytes())
        content[len(content) // 2] ^= 1
        damaged.write_bytes(content)
    else:
        file.write_text({"cut off": text[:-9], "no JSON": "[]", "another number": text.replace("0.", "1.", 1)}[what])
    with pytest.warns(
        UserWarning, match=rf"The result .*{file.name} is damaged, and counts as absent: it is computed again"
    ):
        predictions, _ = run_quietly(jobs, start())
    pd.testing.assert_frame_equal(predictions, expected)
    assert runner.read_kept(jobs[0], run).cells["predicted"].tolist() == expected["predicted"].tolist()


def test_parts_keep_models_that_are_read_together(toy, halves, tiny, monkeypatch):
    jobs = keep_all(toy, halves, KEEPABLE | {"scbert": tiny})
    whole = start("04_whole")
    expected, _ = run_quietly(jobs, whole)
    for part in ("1/2", "2/2"):
        monkeypatch.setenv("SCBERT_PART", part)
        with pytest.raises(paths.PartDone):
            run_quietly(jobs, start())
    monkeypatch.delenv("SCBERT_PART")
    run = start()
    monkeypatch.setattr(runner, "_compute_job", lambda *arguments: pytest.fail("computed again"))
    predictions, _ = run_quietly(jobs, run)
    pd.testing.assert_frame_equal(predictions, expected)
    cells = scbert.preprocess.tokenize(toy.copy())
    for job in jobs:
        one, other = (runner.read_model(job, there)(cells) for there in (run, whole))
        pd.testing.assert_frame_equal(one, other, check_exact=True)


@pytest.mark.parametrize("labels", [("B", "T/NK"), ("B", "Monocyte", "T/NK")])
@pytest.mark.parametrize("penalty", ["l1", "l2"])
def test_logistic_regression_comes_back_from_its_arrays_bit_for_bit(make_cells, tmp_path, penalty, labels):
    train, validation, test = (make_cells(n, seed=seed, labels=labels) for seed, n in enumerate((60, 24, 30)))
    options = {"label_key": "cell_type", "penalties": [penalty], "strengths": [0.05]}
    predict = methods.fit_logistic_regression(train, validation, **options)
    assert {name: array.dtype for name, array in predict.arrays.items()} == {
        "logistic_regression": np.float64, "one_vs_rest": np.bool_,
    }  # fmt: skip
    assert predict.arrays["logistic_regression"].shape == (len(labels), 25)
    fitted.write_fitted(predict, tmp_path / "kept")
    read = fitted.read_fitted(tmp_path / "kept")
    assert (read.labels, read.chosen) == (list(labels), f"{penalty}, C=0.05")
    pd.testing.assert_frame_equal(read(test), predict(test), check_exact=True)
    pd.testing.assert_frame_equal(read.read_out(test)[0], predict.read_out(test)[0], check_exact=True)


def test_arrays_in_another_order_of_memory_are_written_as_they_are(parts_of_regression, tmp_path):
    predict, test = parts_of_regression
    before = predict(test)
    predict.arrays["logistic_regression"] = np.asfortranarray(predict.arrays["logistic_regression"])
    fitted.write_fitted(predict, tmp_path / "kept")
    pd.testing.assert_frame_equal(fitted.read_fitted(tmp_path / "kept")(test), before, check_exact=True)


@pytest.fixture
def parts_of_regression(make_cells):
    """Multinomial logistic regression of three labels, and cells to predict."""
    train, validation, test = (make_cells(n, seed=seed) for seed, n in enumerate((60, 24, 30)))
    options = {"label_key": "cell_type", "penalties": ["l2"], "strengths": [0.1]}
    return methods.fit_logistic_regression(train, validation, **options), test


def test_a_folder_of_a_fitted_method_is_replaced_and_holds_no_pickle(parts_of_regression, tmp_path):
    predict, test = parts_of_regression
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "half of another").write_text("")
    fitted.write_fitted(predict, tmp_path / "kept")
    assert {path.name for path in (tmp_path / "kept").iterdir()} == {"fitted.json", "regression.safetensors"}
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]


def test_all_predictions_are_in_one_file_and_give_the_scores_again(toy, halves, capsys):
    run = start()
    predictions, _ = runner.run(runner.plan(toy, halves, {"one": fit_fake, "two": fit_fake}, data="toy"), run)
    first = run.path("predictions.csv.gz").read_bytes()
    runner.run(runner.plan(toy, halves, {"one": fit_fake, "two": fit_fake}, data="toy"), run)
    assert run.path("predictions.csv.gz").read_bytes() == first
    table = pd.read_csv(run.path("predictions.csv.gz"), keep_default_na=False, dtype=str)
    assert list(table) == ["data", "protocol", "repeat", "fold", "part", "cell", "truth", "one", "two"]
    again = table.melt(list(table)[:7], var_name="method", value_name="predicted")
    right = again.eval("truth == predicted").groupby(again["method"]).mean()
    pd.testing.assert_series_equal(right, predictions.eval("truth == predicted").groupby(predictions["method"]).mean())
