"""What the notebooks of the paper's profiles would train and predict, counted in multiplies before anything runs.

    python tests/count_paper.py           # the table
    python tests/count_paper.py --write   # into notebooks/profiles/needs.yaml and docs/cluster.md

Each notebook's cells run up to the line that would compute its jobs, on made-up cells in the paper's numbers (Reporting
Summary, "Data"), and the jobs that it has planned are counted by `scbert.performance.count_finetuning`: training cells
times epochs at most, validation cells after each epoch, and all cells predicted. An early stop costs less. So a plan that
changes, in a notebook or in its profile, changes the numbers. What is no job (attention, deletions, embeddings before
fine-tuning) is a hundredth of it, and methods without a network run on the CPU: neither is counted.
"""

import argparse
import contextlib
import dataclasses
import inspect
import io
import json
import math
import re
import warnings
from functools import cache
from pathlib import Path
from unittest import mock

import anndata
import numpy as np
import pandas as pd
import yaml
from scipy import sparse

import scbert
from scbert import benchmark, performance, runner
from scbert.run.preflight import read_defaults, read_sections

ROOT = Path(__file__).resolve().parent.parent
NEEDS = ROOT / "notebooks" / "profiles" / "needs.yaml"
RATE = 60e12
"""FLOP/s that the hours of needs.yaml are for: a third of an A100's data sheet in TF32."""
EXPRESSED = 900
"""Genes that enter the encoder where only expressed ones do: 898 a cell in PanglaoDB (Boiarsky et al., notebooks)."""
GENES = [f"g{i}" for i in range(16_906)]
# Cells by the paper's Reporting Summary and text; of Zheng68K in the printed per cent of its labels.
ZHENG68K = {
    "CD8+ Cytotoxic T": 20_740, "CD8+/CD45RA+ Naive Cytotoxic": 16_633, "CD56+ NK": 8_762, "CD4+/CD25 T Reg": 6_161,
    "CD19+ B": 5_887, "CD4+/CD45RO+ Memory": 3_080, "CD14+ Monocyte": 2_875, "Dendritic": 2_125,
    "CD4+/CD45RA+/CD25- Naive T": 1_848, "CD34+": 242, "CD4+ T Helper2": 97,
}  # fmt: skip
PANCREAS = {"Baron": 5_707, "Muraro": 1_554, "Segerstolpe": 1_467, "Xin": 1_492}  # 10,220 of four types; shares do not matter
MACPARLAND = {
    "Hepatocyte": 3_501, "alpha-beta T cell": 961, "Inflammatory macrophage": 813, "gamma-delta T cell": 569,
    "Plasma cell": 511, "NK-like cell": 488, "Non-inflammatory macrophage": 379, "Central venous LSEC": 327,
    "Periportal LSEC": 306, "Portal endothelial cell": 211, "Mature B cell": 129, "Cholangiocyte": 119,
    "Erythroid cell": 93, "Hepatic stellate cell": 37,
}  # fmt: skip


class Planned(Exception):
    """All jobs of a notebook are planned."""


@cache
def make_cells(name: str) -> anndata.AnnData:
    """Return cells in the numbers of a set of the paper, each with a count of one gene."""
    if name == "pancreas":
        rows = [(kind, study) for study, n in PANCREAS.items() for kind in np.resize(["alpha", "beta", "delta", "gamma"], n)]
    else:
        rows = [(kind, "one") for kind, n in {"zheng68k": ZHENG68K, "macparland": MACPARLAND}[name].items() for _ in range(n)]
    cells = [f"{name}-{i}" for i in range(len(rows))]
    x = sparse.csr_matrix((np.full(len(rows), 9.0, np.float32), (range(len(rows)), np.arange(len(rows)) % len(GENES))),
                          shape=(len(rows), len(GENES)))  # fmt: skip
    adata = anndata.AnnData(x, pd.DataFrame(rows, cells, ["cell_type", "batch"]), pd.DataFrame(index=GENES))
    adata.uns["scbert"] = {"fractional_counts": "so that no study is searched for another's cells"}
    return adata


@cache
def make_encoder() -> scbert.ScBert:
    """Return an encoder of the published shape, of other weights."""
    config = scbert.ScBertConfig.published()
    return scbert.ScBert(config, np.zeros((config.n_genes, config.dim), np.float32), GENES)


def plan(profile: str, notebook: str) -> list[runner.Job]:
    """Return the jobs that a notebook plans in a profile: its cells are run up to the call of `scbert.runner.run`."""
    source = ROOT / "notebooks" / f"{notebook}.ipynb"
    parameters = read_defaults(source) | read_sections(ROOT / "notebooks", profile)[notebook] | {"profile": profile}
    jobs = []

    def collect(planned, run):
        jobs.extend(planned)
        raise Planned

    def make_run(notebook, namespace):
        return mock.MagicMock(note_data=lambda name, adata: name)

    def is_published(genes):
        return len(genes) == len(GENES)

    patches = {
        "scbert.record.Run": make_run, "scbert.runner.run": collect, "scbert.protocols.save_splits": mock.Mock(),
        "scbert.datasets.load": lambda name, **_: make_cells(name).copy(), "scbert.load_encoder": lambda _: make_encoder(),
        "scbert.benchmark.load_encoder": lambda _: make_encoder(), "scbert.genes.is_published": is_published,
        "scbert.benchmark.is_published": is_published, "scbert.genes.rename_genes": lambda adata, _: adata,
        "scbert.benchmark.rename_genes": lambda adata, _: adata, "scbert.plot_shift.count_token_shares": mock.Mock(),
        "scbert.plot_shift.depth_of_tokens": mock.MagicMock(), "scbert.interpret.load_collections": mock.Mock(),
        "scbert.runner.joblib.hash": lambda _: "", "scbert.runner.describe_method": lambda _: "", "scbert.methods._check_installed": lambda _: None,
    }  # fmt: skip
    names = {"display": lambda _: None}
    with contextlib.ExitStack() as stack, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
        stack.enter_context(contextlib.suppress(Planned))
        for name, other in patches.items():
            stack.enter_context(mock.patch(name, other))
        for cell in json.loads(source.read_text())["cells"]:
            if cell["cell_type"] == "code":
                exec("".join(cell["source"]), names)
                if "parameters" in cell["metadata"].get("tags", ()):
                    names |= parameters
    return jobs


def read_options(fit) -> dict:
    """Return what a method's trainings depend on: the parameters of `scbert.methods.fit_scbert`, or nothing."""
    options = {name: parameter.default for name, parameter in inspect.signature(fit).parameters.items()}
    if callable(options.get("fit")):
        own = read_options(options["fit"])
        return own and own | {"how": options["how"]}
    if "encoder" not in options:
        return {}
    return options | {"config": getattr(options["encoder"], "config", options["encoder"])}


def count_job(job: runner.Job, change=lambda options: options) -> tuple[float, float]:
    """Return the PFLOP of a job, and the GB that its frozen layers take; with another plan if `change` returns one."""
    options = read_options(job.fit)
    if not options:
        return 0.0, 0.0
    options = change(options)
    config, recipe, batch_size = (options[name] for name in ("config", "recipe", "batch_size"))
    train, validation = len(job.split.train), len(job.split.validation)
    if "how" in options:
        sizes = job.adata.obs.loc[job.split.train, job.label_key].value_counts()
        sizes = sizes[sizes > 0]
        train = len(sizes) * (sizes.min() if options["how"] == "subsample" else sizes.max())
    epochs = max(options["n_epochs"], math.ceil(options["min_steps"] / math.ceil(train / (batch_size * options["accumulate"]))))
    tokens = (EXPRESSED if config.expressed_only else config.n_genes) + 1
    cost = performance.count_finetuning(config, tokens, recipe.trainable_layers, batch_size)
    is_kept = not (config.expressed_only or recipe.redraw_features or recipe.key_stabiliser == "batch" or recipe.thin < 1)
    is_kept = is_kept and options.get("cache", "float32") is not None and cost["frozen"] > 0
    predicted = len(job.split.test) + len(job.split.aside) + validation + (train if job.keep else 0)
    gflop = cost["frozen"] * (train + validation) * (1 if is_kept else epochs) + (cost["frozen"] + cost["forward"]) * predicted
    gflop += epochs * (cost["training"] * train + cost["forward"] * validation)
    bytes_each = np.dtype(options.get("cache", "float32")).itemsize if is_kept else 0
    return gflop * 1e-6, (train + validation) * tokens * config.dim * bytes_each / 1e9


def tabulate(jobs: list[runner.Job], change=lambda options: options) -> pd.Series:
    """Return the PFLOP of each method's jobs."""
    costs = pd.Series([count_job(job, change)[0] for job in jobs], [job.method for job in jobs], dtype=float)
    costs = costs.groupby(level=0, sort=False).sum()
    return costs[costs > 0]


if __name__ == "__main__":
    import time
    total = 0
    for name, section in read_sections(ROOT / "notebooks", "paper").items():
        if section.get("encoder"):
            t = time.time()
            jobs = plan("paper", name)
            costs = tabulate(jobs)
            gb = max(count_job(job)[1] for job in jobs)
            print(name, len(jobs), f"{costs.sum():.0f} PFLOP, {costs.sum() * 1e15 / RATE / 3600:.1f} h, cache {gb:.0f} GB, planning {time.time() - t:.0f} s")
            print(pd.DataFrame({"PFLOP": costs, "hours": costs * 1e15 / RATE / 3600, "jobs": pd.Series([j.method for j in jobs]).value_counts()}).dropna().round(1).to_string())
            total += costs.sum()
    print(f"{total:.0f} PFLOP, {total * 1e15 / RATE / 3600:.1f} h")
