"""The paper's plan is what its notebooks would run, and one GPU does it in two days, its core in a night."""

import count_paper
import pandas as pd
import pytest
import torch
import yaml
from torch.utils.flop_counter import FlopCounterMode

import scbert
from scbert import attention, performance
from scbert.train import finetune as finetuning

STATED = yaml.safe_load(count_paper.NEEDS.read_text())
# Not notebook 06, whose simulations take ten seconds: python tests/count_paper.py counts it.
COUNTED = [(p, name) for p in count_paper.PROFILES for name in count_paper.list_counted(p) if name != "06_batch_effect"]


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("layers", ["all", "last", "head", (-2,), (0, 2)])
def test_multiplies_of_fine_tuning_some_layers_are_those_that_torch_counts(layers, recompute, monkeypatch):
    model = scbert.ScBert(scbert.ScBertConfig(n_genes=39, dim=16, depth=3, heads=2, dim_head=8))
    bins = torch.randint(6, (1, 40))
    if recompute:
        for device in ("cpu", "cuda"):  # counted as on a GPU
            monkeypatch.setitem(attention.CHUNK_BYTES, device, 4 * 2 * model.config.n_features * 10)
        monkeypatch.setattr(attention, "KEPT_CHUNKS", 1)
    classifier = scbert.Classifier(model, ["a", "b"])
    finetuning._choose_trainable(classifier, layers)
    n_frozen = finetuning._count_frozen(classifier, scbert.Recipe(trainable_layers=layers))
    start = model.embed(bins) if layers == "all" else model.embed(bins).detach()
    with FlopCounterMode(display=False) as frozen, torch.no_grad():
        entering = model.run_layers(start, stop=n_frozen)
    with FlopCounterMode(display=False) as training:
        hidden = model.norm(model.run_layers(entering if n_frozen else start, start=n_frozen))
        if layers != "head":
            hidden.square().mean().backward()
    counted = count_paper.count_cell.__wrapped__(model.config, 40, layers, batch_size=1)
    each = performance.count_multiplies(model.config, 40)["forward"].sum() / 3
    assert frozen.get_total_flops() == pytest.approx(counted["frozen"] * 1e9)
    assert training.get_total_flops() == pytest.approx(counted["training"] * 1e9)
    assert [counted["frozen"], counted["forward"]] == pytest.approx([n_frozen * each, (3 - n_frozen) * each])


@pytest.mark.parametrize(("profile", "notebook"), COUNTED)
def test_what_is_stated_of_a_notebook_is_what_it_plans(profile, notebook):
    row = pd.Series(count_paper.count(profile, notebook))
    stated = {name: STATED[profile][notebook][name] for name in ("minutes", "petaflop", "cache_gb")}
    assert stated == count_paper.state_needs(row), "run python tests/count_paper.py --write"
    table = pd.DataFrame([row], pd.MultiIndex.from_tuples([(profile, notebook)], names=["profile", "notebook"]))
    assert count_paper.write_rows(table)[0] in count_paper.PAGE.read_text(), "run python tests/count_paper.py --write"


@pytest.mark.parametrize(("profile", "hours"), [("core", 8), ("paper", 48)])
def test_one_gpu_of_60_tflop_a_second_does_the_plan_in_time(profile, hours):
    assert count_paper.to_hours(sum(entry.get("petaflop", 0) for entry in STATED[profile].values())) <= hours


def test_each_job_of_the_core_is_one_of_the_papers():
    def describe(job):
        options = count_paper.read_options(job.fit)
        rest = {key: value for key, value in options.items() if key not in ("encoder", "label_key")}
        parts = [tuple(part) for part in job.split[3:]]
        return job.data, job.method, job.seed, job.keep, str(job.split[:3]), str(rest), hash(tuple(parts))

    for notebook in ("05_cross_dataset", "07_novel_cell_types"):
        core, paper = (
            {describe(job) for job in count_paper.plan(profile, notebook)} for profile in count_paper.PROFILES
        )
        assert core < paper


def test_numbers_are_written_where_they_stand():
    table = pd.DataFrame(
        {"plan": [216.4], "nothing kept": [300], "CPU hours": [0.5], "GB": [12.3], "jobs": [3]},
        pd.MultiIndex.from_tuples([("paper", "04_benchmark")], names=["profile", "notebook"]),
    )
    text = "small:\n  04_benchmark:\n    minutes: 5\npaper:\n  04_benchmark:\n    minutes: 1\n    petaflop: 2\n    cache_gb: 0\n"
    written = yaml.safe_load(count_paper.write_needs(text, table))
    assert written["small"]["04_benchmark"] == {"minutes": 5}
    assert written["paper"]["04_benchmark"] == {"minutes": 91, "petaflop": 217, "cache_gb": 13}
