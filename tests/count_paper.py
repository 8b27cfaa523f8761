"""What the notebooks of the paper's profiles would train and predict, counted in multiplies before anything runs.

    python tests/count_paper.py           # the table
    python tests/count_paper.py --write   # into notebooks/profiles/needs.yaml and docs/cluster.md

Each notebook's cells run up to the line that would compute its jobs, on made-up cells in the paper's numbers (Reporting
Summary, "Data"), and the jobs that it has planned are counted by `scbert.performance.count_multiplies`: training cells
times epochs at most, validation cells after each epoch, and all cells predicted. An early stop costs less. So a plan that
changes, in a notebook or in its profile, changes the numbers. What is no job (attention, deletions, embeddings before
fine-tuning) is a hundredth of it, and is not counted. Methods without a network run on the CPU: their hours are
extrapolated from the small profile.
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
import torch
from scipy import sparse

import scbert
from scbert import attention, performance, runner
from scbert.model.attention import split_chunks
from scbert.run.preflight import RATE, read_defaults, read_sections

ROOT = Path(__file__).resolve().parent.parent
NEEDS = ROOT / "notebooks" / "profiles" / "needs.yaml"
BACKWARD = pd.DataFrame(
    {"inputs": [1, 1, 2, 2, 1, 1], "weights": [1, 0, 0, 0, 1, 1], "again": [1, 1, 0, 1, 1, 0.5]},
    ["queries, keys, values", "random features", "sum over keys", "attend", "output projection", "feed-forward"],
)
"""Forward passes that the backward pass takes: for what enters a part, for weights that learn, and to compute it again."""
PAGE, BEGIN, END = ROOT / "docs" / "cluster.md", "<!-- plan:begin -->", "<!-- plan:end -->"
PROFILES = ("core", "paper")
SECONDS = {"logistic_regression": 7e-3, "celltypist": 2e-3, "nearest_centroid": 1e-4}
"""A training cell on one thread: notebook 04 of the small profile, times three for more genes a cell. An extrapolation."""
SINGLER = 2.3e-6
"""Seconds a training cell and predicted cell of SingleR: the same notebook. An extrapolation."""
EXPRESSED = 900
"""Genes that enter the encoder where only expressed ones do: 898 a cell in PanglaoDB (Boiarsky et al., notebooks)."""
GENES = [f"g{i}" for i in range(16_906)]
# Cells by the paper's Reporting Summary and text; of Zheng68K in the printed per cent of its labels.
ZHENG68K = {
    "CD8+ Cytotoxic T": 20_740, "CD8+/CD45RA+ Naive Cytotoxic": 16_633, "CD56+ NK": 8_762, "CD4+/CD25 T Reg": 6_161,
    "CD19+ B": 5_887, "CD4+/CD45RO+ Memory": 3_080, "CD14+ Monocyte": 2_875, "Dendritic": 2_125,
    "CD4+/CD45RA+/CD25- Naive T": 1_848, "CD34+": 242, "CD4+ T Helper2": 97,
}  # fmt: skip
PANCREAS = {
    "Baron": 5_707,
    "Muraro": 1_554,
    "Segerstolpe": 1_467,
    "Xin": 1_492,
}  # 10,220 cells of four types by the paper; how they are shared out over the studies does not matter
# 8,444 cells of 14 types; how many of each is not printed, so all are taken to be of one size.
TYPES = ["alpha-beta T cell", "gamma-delta T cell", "Mature B cell", "Plasma cell", *(f"type {i}" for i in range(10))]
MACPARLAND = {name: 8_444 // 14 + (i < 8_444 % 14) for i, name in enumerate(TYPES)}


class Planned(Exception):
    """All jobs of a notebook are planned."""


@cache
def make_cells(name: str) -> anndata.AnnData:
    """Return cells in the numbers of a set of the paper, each with a count of one gene."""
    if name == "pancreas":
        rows = [
            (kind, study) for study, n in PANCREAS.items() for kind in np.resize(["alpha", "beta", "delta", "gamma"], n)
        ]
    else:
        rows = [
            (kind, "one")
            for kind, n in {"zheng68k": ZHENG68K, "macparland": MACPARLAND}[name].items()
            for _ in range(n)
        ]
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
        "scbert.runner.joblib.hash": lambda _: "", "scbert.sources.simulate._thin": lambda counts, *_: counts.copy(),
        "scbert.sources.simulate._mix": lambda counts, *_: counts.copy(), "scbert.runner.describe_method": lambda _: "", "scbert.methods._check_installed": lambda _: None,
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


@cache
def count_cell(config: scbert.ScBertConfig, tokens: int, layers="all", batch_size: int = 16) -> dict[str, float]:
    """Return the GFLOP of a cell in fine-tuning, of which some layers learn, by `scbert.performance.count_multiplies`.

    `layers` are ``Recipe.trainable_layers``; of batches that make many chunks on a GPU, chunks are computed again in the
    backward pass. ``frozen``: the layers below the first that learns, which can be run once a cell; ``training`` of all
    others, and ``forward``, their forward pass. The head is left out.
    """
    depth, parts = config.depth, performance.count_multiplies(config, tokens)["forward"] / max(1, config.depth)
    learns = range(depth) if layers == "all" else {"last": [depth - 1], "head": []}.get(layers, layers)
    learns = {layer % depth for layer in learns if depth}
    n_rest = depth - min(learns, default=depth)
    chunks = split_chunks((torch.empty(batch_size, tokens, 0, device="meta"),), config.heads, config.n_features)
    passes = 1 + BACKWARD["inputs"] + BACKWARD["again"] * (sum(map(len, chunks)) > attention.KEPT_CHUNKS)
    training = (parts * (n_rest * passes + len(learns) * BACKWARD["weights"])).sum()
    return {"frozen": (depth - n_rest) * parts.sum(), "training": training, "forward": n_rest * parts.sum()}


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
    epochs = max(
        options["n_epochs"], math.ceil(options["min_steps"] / math.ceil(train / (batch_size * options["accumulate"])))
    )
    tokens = (EXPRESSED if config.expressed_only else config.n_genes) + 1
    cost = count_cell(config, tokens, recipe.trainable_layers, batch_size)
    is_kept = not (
        config.expressed_only or recipe.redraw_features or recipe.key_stabiliser == "batch" or recipe.thin < 1
    )
    is_kept = is_kept and options.get("cache", "float32") is not None and cost["frozen"] > 0
    predicted = len(job.split.test) + len(job.split.aside) + validation + (train if job.keep else 0)
    gflop = (
        cost["frozen"] * (train + validation) * (1 if is_kept else epochs)
        + (cost["frozen"] + cost["forward"]) * predicted
    )
    gflop += epochs * (cost["training"] * train + cost["forward"] * validation)
    bytes_each = np.dtype(options.get("cache", "float32")).itemsize if is_kept else 0
    return gflop * 1e-6, (train + validation) * tokens * config.dim * bytes_each / 1e9


def count_cpu_hours(job: runner.Job) -> float:
    """Return the hours of a job without a network on one thread, extrapolated."""
    train = len(job.split.train)
    if job.method == "singler":
        return SINGLER * train * (len(job.split.test) + len(job.split.aside) + len(job.split.validation)) / 3600
    return SECONDS.get(job.method.partition(":")[0], 0) * train / 3600


def read_all_genes(options: dict) -> dict:
    """Let what reads expressed genes read all."""
    return options | {"config": dataclasses.replace(options["config"], expressed_only=False)}


def follow_letter(options: dict, n_epochs: int | None = None) -> dict:
    """Let the published recipe be as the script has it, in 40 or so many epochs."""
    if options["recipe"].report_on != "validation":
        return options
    return options | {"recipe": scbert.Recipe.published(), "n_epochs": n_epochs or options["n_epochs"], "cache": None}


def keep_nothing(options: dict) -> dict:
    """Run frozen layers in each epoch."""
    return options | {"cache": None}


CHANGES = {
    "plan": lambda options: options,
    "nothing kept": keep_nothing,
    "all genes": read_all_genes,
    "letter": follow_letter,
    "letter, 100 epochs": lambda options: follow_letter(options, 100),
}


def count(profile: str, notebook: str) -> dict[str, float]:
    """Return the PFLOP of a notebook by `CHANGES`, its CPU hours, the GB of its largest cache, and its jobs."""
    jobs = plan(profile, notebook)
    counted = {name: sum(count_job(job, change)[0] for job in jobs) for name, change in CHANGES.items()}
    cpu_hours = sum(count_cpu_hours(job) for job in jobs)
    return counted | {"CPU hours": cpu_hours, "GB": max(count_job(job)[1] for job in jobs), "jobs": len(jobs)}


def list_counted(profile: str) -> list[str]:
    """Return the notebooks of a profile that train networks."""
    return [
        name for name, section in read_sections(ROOT / "notebooks", profile).items() if "encoder" in (section or {})
    ]


def tabulate() -> pd.DataFrame:
    """Return `count` of all notebooks of both profiles."""
    rows = {(profile, name): count(profile, name) for profile in PROFILES for name in list_counted(profile)}
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis(["profile", "notebook"])


def to_hours(petaflop: float) -> float:
    """Return the hours of multiplies at `RATE`."""
    return petaflop * 1e15 / RATE / 3600


def state_needs(row: pd.Series) -> dict[str, int]:
    """Return what needs.yaml states of a notebook."""
    minutes = 60 * (to_hours(row["plan"]) + row["CPU hours"])
    return {"minutes": math.ceil(minutes), "petaflop": math.ceil(row["plan"]), "cache_gb": math.ceil(row["GB"])}


def write_needs(text: str, table: pd.DataFrame) -> str:
    """Return needs.yaml with the numbers of the table in place of those it has."""
    profile = notebook = None
    lines = text.splitlines(keepends=True)
    for i, line in enumerate(lines):
        if found := re.match(r"(\w+):", line):
            profile = found[1]
        elif found := re.match(r"  (\w+):", line):
            notebook = found[1]
        elif (found := re.match(r"    (\w+): [\d.]+$", line)) and (profile, notebook) in table.index:
            stated = state_needs(table.loc[profile, notebook])
            if found[1] in stated:
                lines[i] = f"    {found[1]}: {stated[found[1]]}\n"
    return "".join(lines)


def say(petaflop: float) -> str:
    """Return two cells of a table, PFLOP and hours."""
    return f"{petaflop:,.0f} | {to_hours(petaflop):,.1f}"


def write_rows(table: pd.DataFrame) -> list[str]:
    """Return the rows of notebooks in the table of docs/cluster.md."""
    return [
        f"| `{profile}` {name} | {row['jobs']:,.0f} | {say(row['plan'])} | {to_hours(row['nothing kept']):,.1f} | "
        f"{row['GB']:,.0f} GB | {row['CPU hours']:,.1f} |"
        for (profile, name), row in table.iterrows()
    ]


def write_plan(table: pd.DataFrame) -> str:
    """Return the tables of docs/cluster.md."""

    lines = [
        "| profile, notebook | jobs | PFLOP | hours | hours, frozen layers run in each epoch | disk to keep them | other methods, CPU hours |",
        "|---|---|---|---|---|---|---|",
    ]
    for profile, own in table.groupby("profile", sort=False):
        everything = own.sum().rename((profile, "**all**")).to_frame().T.assign(GB=own["GB"].max())
        lines += write_rows(pd.concat([own, everything]))
    lines += ["", "| left out of `paper` | PFLOP | hours |", "|---|---|---|"]
    all_in_all, core = table.loc["paper"].sum(), table.loc["core"]
    letter, longer = all_in_all["letter"] - all_in_all["plan"], all_in_all["letter, 100 epochs"] - all_in_all["letter"]
    genes = all_in_all["all genes"] - all_in_all["plan"]
    left_out = {
        "all 16,906 genes in every arm but the published recipe's, in place of 900 expressed ones": genes,
        "features redrawn and cells stabilised by the batch, as the script has it: nothing can be kept": letter,
        "epochs 41 to 100 of the script, which stops after ten without a better one": longer,
        "SingleR in notebook 06, 40 trainings: some 28 CPU hours, extrapolated": 0.0,
        "**the plan before**": all_in_all["plan"] + genes + letter + longer,
    }
    lines += [f"| {what} | {say(petaflop)} |" for what, petaflop in left_out.items()]
    lines += ["", "| left out of `core` | PFLOP | hours |", "|---|---|---|"]
    what = {
        "04_benchmark": "04: four of five folds, smaller and unequal references, random weights, other rivals",
        "05_cross_dataset": "05: the second and third training, random weights, other rivals",
        "07_novel_cell_types": "07: the second and third training, plasma cells held out alone, CellTypist",
    }
    for name, row in table.loc["paper"].iterrows():
        rest = row["plan"] - (core.loc[name, "plan"] if name in core.index else 0)
        lines.append(f"| {what.get(name, f'{name[:2]}: all of it')} | {say(rest)} |")
    return "\n".join(lines)


def fill_page(text: str, table: pd.DataFrame) -> str:
    """Return docs/cluster.md with the tables between its marks."""
    before, rest = text.split(BEGIN)
    return f"{before}{BEGIN}\n{write_plan(table)}\n{END}{rest.split(END)[1]}"


def main() -> None:
    """Print the tables, or write them."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--write", action="store_true", help="into needs.yaml and docs/cluster.md")
    write, table = parser.parse_args().write, tabulate()
    print(table.round(1).to_string(), write_plan(table), sep="\n\n")
    if write:
        NEEDS.write_text(write_needs(NEEDS.read_text(), table))
        PAGE.write_text(fill_page(PAGE.read_text(), table))


if __name__ == "__main__":
    main()
