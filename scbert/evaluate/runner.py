"""Methods on splits: planned, computed once, kept, continued, and shared out to several processes."""

import ast
import contextlib
import functools
import hashlib
import inspect
import io
import json
import math
import shutil
import sys
import textwrap
import threading
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import anndata
import joblib
import numpy as np
import pandas as pd
import psutil
import torch
from tqdm import tqdm

from ..data.counts import hash_data
from ..data.preprocess import library_size, tokenize
from ..paths import PartDone, find_part, first_line, measure_peak_memory_mb, replace_whole, write_text
from ..sources.genes import choose_genes
from . import fitted
from . import kept as kept_files
from .methods import FITS, NEEDS, offer
from .metrics import accuracy, macro_f1
from .protocols import Split, check_disjoint, find_unseen
from .tuning import LAYERS, RATES, fit_on_all, fit_tuned

if TYPE_CHECKING:
    from ..run.record import Run

PACKAGE = Path(__file__).parent.parent
# The rooms whose code makes a result: what a change in them makes void.
ROOMS = ("data", "sources", "memory", "evaluate")
ROOMS_OF_SCBERT = ("model", "scale", "train", "annotate.py")


class Job(NamedTuple):
    """One method on one split of one data set."""

    data: str
    adata: anndata.AnnData
    genes: str | tuple[str, ...]
    n_bins: int
    split: Split
    method: str
    fit: Callable
    label_key: str
    seed: int
    identity: str
    """What the result depends on, hashed: the name of its file."""
    cell_steps: int
    """Training cells that pass through a network at most; 0 for other methods."""
    keep: bool = False
    """Whether logits and vectors of the predicted cells are kept, see `read_kept`."""
    keep_model: bool = False
    """Whether the fitted method is kept, see `read_model`."""


def plan(
    adata: anndata.AnnData,
    splits: Sequence[Split],
    methods: dict[str, Callable],
    *,
    data: str,
    label_key: str = "cell_type",
    genes: str | Sequence[str] = "all",
    n_bins: int = 5,
    keep: bool = False,
    keep_models: Sequence[str] = (),
    report_on: str = "test",
    seed: int = 0,
) -> list[Job]:
    """Return one job for each split and method, the methods of a split together.

    Parameters
    ----------
    methods
        Name -> ``fit(train, validation, label_key=, seed=)``, see `scbert.methods`; `functools.partial` carries options.
    genes
        Names, in the model's order; or a choice of `scbert.genes.choose_genes`, on each split's training and validation cells.
    keep, keep_models
        Whether logits and vectors of the predicted cells are kept, for `read_kept`; names of the methods that are kept as
        fitted, for `read_model`: scBERT and logistic regression can be.
    report_on
        Which cells are predicted: "test", or "validation", as published; see `Recipe.report_on`.
    seed
        Of a split's trainings, plus its repeat.

    Raises
    ------
    ValueError
        A cell on two sides of a split, another `report_on`, or in `keep_models` what is not planned or can't be kept.
    """
    if report_on not in ("test", "validation"):
        raise ValueError(f"report_on must be 'test' or 'validation', not {report_on!r}.")
    for name in keep_models:
        if name not in methods:
            raise ValueError(f"keep_models names {name!r}, which is not planned: {', '.join(methods)} are.")
        fitted.check_keepable(name, methods[name])
    labels = adata.obs[label_key].astype(str)
    genes = genes if isinstance(genes, str) else tuple(genes)
    cells_hash = joblib.hash((hash_data(adata), library_size(adata)))
    described = {name: describe_method(fit) for name, fit in methods.items()}
    jobs = []
    for split in splits:
        check_disjoint(split.train, split.validation, split.test, split.aside)
        if report_on == "validation":
            split = split._replace(test=split.validation)
        parts = (split.train, split.validation, split.test, *([split.aside] if len(split.aside) else []))
        cells = [list(labels[part].items()) for part in parts]
        for name, fit in methods.items():
            own_seed, keeps = seed + split.repeat, (keep, name in keep_models)
            identity = joblib.hash((cells_hash, cells, genes, n_bins, described[name], own_seed, keeps))
            steps = count_cell_steps(fit, len(split.train))
            jobs.append(Job(data, adata, genes, n_bins, split, name, fit, label_key, own_seed, identity, steps, *keeps))
    return jobs


def count_cell_steps(fit: Callable, n_cells: int) -> int:
    """Return how many cells pass through a network at most while a method trains on `n_cells`; 0 if it has no epochs."""
    options = {name: parameter.default for name, parameter in inspect.signature(fit).parameters.items()}
    if callable(options.get("fit")):
        times = {fit_tuned: len(RATES) * len(LAYERS), fit_on_all: 2}.get(getattr(fit, "func", fit), 1)
        return times * count_cell_steps(options["fit"], n_cells)
    if "encoder" not in options:
        return 0
    steps_an_epoch = math.ceil(n_cells / (options["batch_size"] * options["accumulate"]))
    n_epochs = max(options["n_epochs"], math.ceil(options["min_steps"] / steps_an_epoch))
    return n_cells * (n_epochs + options["pretrain_epochs"])


def describe_method(fit: Callable) -> tuple:
    """Return all that a method's results depend on: code of its rooms, options, weights, versions of packages."""
    versions = [metadata.version(NEEDS[name][1]) for name in NEEDS if FITS[name] is fit]
    if isinstance(fit, functools.partial):
        own = {key: value for key, value in sorted(fit.keywords.items()) if key not in ("checkpoints", "progress")}
        return describe_method(fit.func), *((key, _describe(value)) for key, value in own.items()), *versions
    rooms = ROOMS + (ROOMS_OF_SCBERT if "encoder" in inspect.signature(fit).parameters else ())
    code = [hash_room(room) for room in rooms]
    if not fit.__module__.startswith(tuple(f"{PACKAGE.name}.{room}." for room in rooms)):  # somebody's own
        code.append(hash_code(_read_source(fit)))
    versions = [*map(metadata.version, ("torch", "scikit-learn", "numpy")), *versions]
    return f"{fit.__module__}.{fit.__qualname__}{inspect.signature(fit)}", *code, *versions


def _read_source(fit):
    """Return the source of a function's module or, where that is a notebook, of the function."""
    try:
        return inspect.getsource(inspect.getmodule(fit))
    except (OSError, TypeError):
        return inspect.getsource(fit)


def _describe(value):
    if isinstance(value, torch.nn.Module):
        weights = {name: tensor.detach().cpu().numpy() for name, tensor in value.state_dict().items()}
        return repr(value.config), weights, *map(hash_room, ROOMS_OF_SCBERT)
    return describe_method(value) if callable(value) else repr(value)


@functools.cache
def hash_room(room: str) -> str:
    """Return a hash of the code of a folder of the package, or of one file: comments and docstrings do not count."""
    path = PACKAGE / room
    files = [path] if path.is_file() else sorted(path.rglob("*.py"))
    return hash_code(*(file.read_text() for file in files))


def hash_code(*sources: str) -> str:
    """Return a hash of what Python sources do: comments, layout and docstrings do not count."""
    digest = hashlib.sha256()
    for tree in (ast.parse(textwrap.dedent(source)) for source in sources):
        for node in ast.walk(tree):
            if isinstance(body := getattr(node, "body", None), list):
                node.body = [part for part in body if not _is_docstring(part)]
        digest.update(ast.dump(tree).encode())
    return digest.hexdigest()


def _is_docstring(node):
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


def run(jobs: Sequence[Job], run: "Run", *, progress: bool = True) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Compute the jobs that have no result yet, and return the results of all.

    A result is a file of the folder ``jobs`` of the run, named by all that it depends on: what was done is not done
    again, and what depends on a changed parameter is. ``scbert run --part 2/8`` computes only a share of the jobs. All
    predictions are in ``predictions.csv.gz``, see `write_predictions`.

    `progress` is a bar, and a word on how long it may take.

    Returns
    -------
    Predictions, a row a job and test cell, and one of each cell set aside: data, protocol, repeat, fold, method, cell,
    truth, predicted, confidence, seen (some training cell has its true label), and part ("test" or "aside").
    Costs, a row a job: data, protocol, repeat, fold, method, training_cells, seconds, cpu_seconds, memory_mb (most that the
    process took beyond what it held, sampled 50 times a second), cell_steps, chosen (on validation cells), accuracy and
    macro_f1 on validation cells and on test cells whose label was seen; and of scBERT the ``outcome`` of its classifier.

    Raises
    ------
    RuntimeError
        Jobs failed, each named with its reason; the results of all others are kept.
    scbert.paths.PartDone
        In a part, when its share is done.
    """
    part = find_part()
    mine = list(jobs) if part is None else share_out(jobs, *part)
    missing = [job for job in mine if _read_done(job, run) is None]
    _announce(jobs, mine, missing, progress)
    on_gpu, before = torch.backends.cuda.matmul, torch.backends.cuda.matmul.allow_tf32
    on_gpu.allow_tf32 = before or getattr(run, "tf32", False)
    failed = _compute(missing, run, progress)
    on_gpu.allow_tf32 = before
    if failed:
        more = f"; and {len(failed) - 3} more" if len(failed) > 3 else ""
        raise RuntimeError(
            f"{len(failed)} of {len(missing)} jobs failed; all others are kept, and the same command tries these again. "
            f"{'; '.join(failed[:3])}{more}"
        )
    if part is not None:
        raise PartDone(f"Part {part[0]}/{part[1]} is done: {len(mine)} jobs, {len(missing)} of them computed.")
    results = [_read_done(job, run) for job in jobs]
    here = {job.identity for job in missing}
    earlier = [done["seconds"] for job, done in zip(jobs, results, strict=True) if job.identity not in here]
    run.earlier_seconds += sum(earlier)
    largest = max((done["memory_mb"] for done in results), default=0)
    run.earlier_memory_mb = max(run.earlier_memory_mb, measure_peak_memory_mb() + largest)  # for preflight
    predictions, costs = _gather(jobs, results)
    write_predictions(predictions, run.path("predictions.csv.gz"))
    return predictions, costs


def write_predictions(predictions: pd.DataFrame, path: Path) -> None:
    """Write what each method calls each cell as a table, compressed: a row a split and cell, a column a method.

    Beside the labels: which split a row is of, the cell's part in it and its true label. From this file every score of a
    notebook can be computed again, without the cells.
    """
    rows = ["data", "protocol", "repeat", "fold", "part", "cell", "truth"]
    wide = predictions.set_index([*rows, "method"])["predicted"].unstack("method")[predictions["method"].unique()]
    packed = io.BytesIO()  # of a file, gzip would note the name
    wide.to_csv(packed, compression={"method": "gzip", "mtime": 1})  # the same bytes for the same labels
    with replace_whole(path) as temporary:
        temporary.write_bytes(packed.getvalue())


def read_kept(job: Job, run: "Run") -> kept_files.Kept:
    """Return what a job kept of its cells, see `scbert.kept.Kept`; a ValueError if it keeps nothing, or was not run."""
    file, done = _find_done(job, run, job.keep, "keeps nothing: plan it with keep=True")
    return kept_files.read_file(file.with_suffix(".npz"), _list_cells(job, done))


def read_model(job: Job, run: "Run") -> Callable:
    """Return `predict` of a job, with the attributes that its method gives it, see `scbert.methods`.

    A ValueError says that its method is none of those planned as `keep_models`, or that it was not run.
    """
    file, _ = _find_done(job, run, job.keep_model, f"keeps no model: plan it with keep_models=[{job.method!r}]")
    return fitted.read_fitted(file.with_suffix(""))


def _file(run, job):
    return run.path("jobs") / f"{job.identity}.json"


def _find_done(job, run, is_kept, else_say):
    """Return the file, and the result, of a job that is done and keeps what is asked for."""
    done = _read_done(job, run) if is_kept else None
    if done is None:
        what = "was not run yet: call run first" if is_kept else else_say
        raise ValueError(f"The job of {job.method} on {job.data} {job.split.protocol} {what}.")
    return _file(run, job), done


def _read_done(job, run):
    """Return the result of a job, None without one; what is damaged, or lies damaged beside it, is named and computed again."""
    file = _file(run, job)
    try:
        done = json.loads(file.read_bytes())
        if done.pop("sha256") == _hash_done(done, file):
            return done
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        pass
    warnings.warn(f"The result {file} is damaged, and counts as absent: it is computed again.", stacklevel=3)
    return None


def _hash_done(done, file):
    """Return a hash of a result and of the files that were written before it."""
    digest = hashlib.sha256(json.dumps(done).encode())
    for beside in sorted([file.with_suffix(".npz"), *file.with_suffix("").rglob("*")]):
        if beside.is_file():
            digest.update(beside.read_bytes())
    return digest.hexdigest()


def share_out(jobs: Sequence[Job], part: int, n_parts: int) -> list[Job]:
    """Return the jobs of one part, from 1: the largest first, each to the part that has least; a split's data may repeat."""
    loads, mine = [0.0] * n_parts, []
    for job in sorted(jobs, key=lambda job: (-_weight(job), job.identity)):
        least = loads.index(min(loads))
        loads[least] += _weight(job)
        if least == part - 1:
            mine.append(job)
    order = {job.identity: number for number, job in enumerate(jobs)}
    return sorted(mine, key=lambda job: order[job.identity])


def _weight(job):
    """Return a job's size for the progress bar, in cells: those that pass a network, or those that train."""
    return job.cell_steps or len(job.split.train)


def _name(job):
    """Return the columns that say whose a row of predictions or costs is."""
    of_split = {name: getattr(job.split, name) for name in ("protocol", "repeat", "fold")}
    return {"data": job.data, **of_split, "method": job.method}


def _announce(jobs, mine, missing, progress):
    share = "" if len(mine) == len(jobs) else f", {len(mine)} of them this part's"
    print(f"{len(jobs)} jobs (method x split){share}; {len(mine) - len(missing)} are there, {len(missing)} to compute")
    trained = [job for job in missing if "encoder" in inspect.signature(job.fit).parameters]
    if trained and progress:
        steps = sum(job.cell_steps for job in missing)
        try:
            minutes = steps * _time_cell(max(trained, key=lambda job: job.cell_steps)) / 60
            pace = f", about {minutes:.1f} minutes at this machine's pace; others: seconds each"
        except Exception as error:  # its job will say so, and all others are computed
            pace = f"; its pace was not measured ({first_line(error)})"
        print(f"scBERT: {steps:,} cell-steps, up to twice as many where it has not converged{pace}")


def _time_cell(job):
    """Return seconds of training a cell: one epoch over up to 32 training cells, after another that warms up."""
    prepared = _prepare(job)
    labels = prepared.obs[job.label_key].astype(str)
    train, validation = (
        prepared[labels[cells].groupby(labels[cells].to_numpy()).head(8).index[:32]].copy()
        for cells in (job.split.train, job.split.validation)
    )
    validation = validation[validation.obs[job.label_key].isin(set(train.obs[job.label_key])).to_numpy()].copy()
    recipe = replace(inspect.signature(job.fit).parameters["recipe"].default, until_converged=False)
    options = {"n_epochs": 1, "pretrain_epochs": 0, "min_steps": 0, "progress": False, "recipe": recipe}
    seconds = []
    for _ in range(2):
        start = time.monotonic()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The training ")  # of one epoch
            job.fit(train, validation, label_key=job.label_key, seed=0, **options)
        seconds.append(time.monotonic() - start)
    return min(seconds) / train.n_obs


def _compute(jobs, run, progress):
    """Compute jobs, each kept as soon as it is there; return those that failed, in words."""
    failed, last, prepared = [], None, None
    shown = {"unit": "cell", "desc": "jobs", "mininterval": 1, "disable": not progress, "file": sys.stdout}
    with tqdm(total=sum(map(_weight, jobs)), **shown) as bar:
        for job in jobs:
            bar.set_postfix_str(f"{job.data} {job.split.protocol} {job.method}".replace("  ", " "), refresh=False)
            try:
                if (key := (id(job.adata), id(job.split), job.genes, job.n_bins)) != last:
                    prepared, last = _prepare(job), key
                done, kept, predict = _compute_job(job, prepared, run.path("checkpoints"))
                file = _file(run, job)
                if job.keep:
                    kept_files.write_file(file.with_suffix(".npz"), *kept)
                if job.keep_model:
                    fitted.write_fitted(predict, file.with_suffix(""))
                done["sha256"] = _hash_done(done, file)
                write_text(file, json.dumps(done) + "\n")  # last: it says that all is there
                shutil.rmtree(run.path("checkpoints") / job.identity, ignore_errors=True)
            except Exception as error:  # all other jobs of a long night are computed all the same
                reason = f"{type(error).__name__}: {first_line(error)}"
                where = f"{job.data} {job.split.protocol}".strip()
                failed.append(f"{job.method} on {where}, repeat {job.split.repeat}, fold {job.split.fold}: {reason}")
            bar.update(_weight(job))
    return failed


def _prepare(job):
    """Return the cells of a split with the genes that its methods read, tokenized."""
    split = job.split
    adata = job.adata[pd.unique(np.concatenate([split.train, split.validation, split.test, split.aside]))]
    genes = job.genes
    if isinstance(genes, str):
        genes = choose_genes(adata[: len(split.train) + len(split.validation)], genes)
    return tokenize(adata.copy(), genes=list(genes), n_bins=job.n_bins)


def _compute_job(job, prepared, checkpoints):
    """Train and predict; return the result, logits and vectors or None, and the fitted method."""
    split, kept = job.split, None
    train, validation, test = (
        prepared[list(cells)].copy() for cells in (split.train, split.validation, [*split.test, *split.aside])
    )
    # Without a progress bar of its own: the jobs have one.
    options = offer(job.fit, checkpoints=checkpoints / job.identity, progress=False)
    with watch_memory() as memory, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The training ")  # it is in the costs
        start, cpu_start = time.monotonic(), time.process_time()
        predict = job.fit(train, validation, label_key=job.label_key, seed=job.seed, **options)
        if job.keep:
            kept = kept_files.describe_cells(predict, train, test, label_key=job.label_key, seed=job.seed)
            probabilities = kept_files.to_probabilities(kept[0])
        name_cells = (lambda _: probabilities) if job.keep else predict
        rows = predict_cells(job.method, name_cells, test, label_key=job.label_key)
        seconds, cpu_seconds = time.monotonic() - start, time.process_time() - cpu_start
    chosen_by = predict_cells(job.method, predict, validation, label_key=job.label_key)
    labels = sorted(set(rows["predicted"]))
    is_test = np.arange(len(rows)) < len(split.test)
    seen = rows[~find_unseen(job.adata, split, job.label_key) & is_test]
    done = _name(job) | {
        "training_cells": train.n_obs, "seconds": round(seconds, 3),
        "cpu_seconds": round(cpu_seconds, 3), "memory_mb": round(memory["peak_mb"], 1),
        "cell_steps": int(getattr(predict, "cell_steps", 0)), "chosen": getattr(predict, "chosen", ""),
    } | getattr(predict, "outcome", {})  # fmt: skip
    for name, cells in (("validation", chosen_by), ("test", seen)):
        truth, predicted = cells["truth"].to_numpy(), cells["predicted"].to_numpy()
        done[f"{name}_accuracy"] = float(accuracy(truth, predicted)) if len(cells) else None
        done[f"{name}_macro_f1"] = float(macro_f1(truth, predicted)) if len(cells) else None
    done |= {
        "labels": labels,
        "predicted": pd.Index(labels).get_indexer(rows["predicted"]).tolist(),
        "confidence": [round(float(value), 4) for value in rows["confidence"]],
    }
    return done, kept, predict


@contextlib.contextmanager
def watch_memory():
    """Yield a dict whose "peak_mb" is, afterwards, the most memory the process took beyond what it held before."""
    process, peak, stop = psutil.Process(), {"peak_mb": 0.0}, threading.Event()
    before = process.memory_info().rss

    def sample():
        while True:
            peak["peak_mb"] = max(peak["peak_mb"], (process.memory_info().rss - before) / 2**20)
            if stop.wait(0.02):
                return

    thread = threading.Thread(target=sample, daemon=True)
    thread.start()
    try:
        yield peak
    finally:
        stop.set()
        thread.join()


def _list_cells(job, done):
    """Return a row a predicted cell, by name: truth, predicted, confidence, seen, part."""
    cells = np.array([*job.split.test, *job.split.aside], dtype=object)
    return pd.DataFrame(
        {
            "truth": job.adata.obs.loc[cells, job.label_key].astype(str).to_numpy(),
            "predicted": np.asarray(done["labels"], dtype=object)[done["predicted"]],
            "confidence": done["confidence"],
            "seen": ~find_unseen(job.adata, job.split, job.label_key),
            "part": np.where(np.arange(len(cells)) < len(job.split.test), "test", "aside"),
        },
        index=pd.Index(cells, name="cell"),
    )


def _gather(jobs, results):
    """Return the predictions and costs of all jobs."""
    predictions, costs = [], []
    for job, done in zip(jobs, results, strict=True):
        own, cells = _name(job), _list_cells(job, done).reset_index()
        predictions.append(cells.assign(**own)[[*own, *cells]])
        kept = ("labels", "predicted", "confidence", *own)
        costs.append(own | {key: value for key, value in done.items() if key not in kept})
    return pd.concat(predictions, ignore_index=True), pd.DataFrame(costs)


def predict_cells(
    method: str, predict: Callable, adata: anndata.AnnData, *, label_key: str = "cell_type"
) -> pd.DataFrame:
    """Predict cells with a fitted method: a row a cell, with method, cell, truth, predicted and confidence."""
    probabilities = predict(adata)
    return pd.DataFrame(
        {
            "method": method,
            "cell": adata.obs_names,
            "truth": adata.obs[label_key].astype(str).to_numpy(),
            "predicted": probabilities.columns[probabilities.to_numpy().argmax(1)],
            "confidence": probabilities.max(axis=1).to_numpy(),
        }
    )
