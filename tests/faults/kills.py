"""Kill, starve and forbid every file operation of every writer: python tests/faults/kills.py [rows.csv] [--writers a b]

Each writer first makes what is good and then writes something new over it, in a process of its own that fails at its
first, second, third ... file operation: killed there, told that the disk is full, or that it may not write. Others run
with a limit on the size of a file, which C libraries feel too, or on memory. What is read afterwards must be the old or the
new, whole; the same call, made again, must give the new and leave nothing else behind. Then stages of work are killed at
random moments, and continued until they end as one that was never killed. A row a fault: what it was, and what came of it:

survived      old or new is there, and the same call goes on to the new
half          something else is read, or nothing where something good was
silent        the call ended well without writing the new, and said nothing
traceback     an error that is no sentence for users (neither ValueError nor OSError)
lost          the same call, made again, does not come to the new
debris        all is well but for files left behind

Exit status 1 if any did not survive. Ten minutes on one core.
"""

import argparse
import contextlib
import errno
import hashlib
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import anndata
import numpy as np
import pandas as pd
import torch
from nbconvert import HTMLExporter  # noqa: F401 - before processes are forked
from scipy import sparse

import scbert
from scbert.evaluate import fitted, kept, runner
from scbert.paths import write_text
from scbert.run import annotated, record, report
from scbert.scale import checkpoint, shards

torch.set_num_threads(1)
GENES = [f"gene{i}" for i in range(24)]
SHAPE = {"n_genes": 24, "dim": 8, "depth": 1, "heads": 2, "dim_head": 4}
KINDS = ("killed", "disk full", "no permission")
CRASHED, SAID, UNSAID = 97, 98, 99  # exit statuses of a child: an error of another kind, a sentence, a warning


class Writer(NamedTuple):
    """How something is written: what is `good` before, what is `new`, and `read`, of which equal results are equal."""

    good: Callable[[Path], None]
    new: Callable[[Path], None]
    read: Callable[[Path], object]


def make_cells(n_cells=48, seed=0):
    """Return cells of three labels that a third of the genes each tells apart."""
    draw = np.random.default_rng(seed)
    label = np.arange(n_cells) % 3
    counts = draw.poisson(np.where(np.arange(24) % 3 == label[:, None], 6, 1)).astype(np.float32)
    counts[:, 0] += 1
    obs = pd.DataFrame({"cell_type": pd.Categorical(np.array(["B", "T", "NK"])[label])})
    obs.index = [f"cell{i}" for i in range(n_cells)]
    return anndata.AnnData(sparse.csr_matrix(counts), obs=obs, var=pd.DataFrame(index=GENES))


def make_classifier(seed=0):
    """Return a classifier with random weights."""
    encoder = scbert.ScBert(scbert.ScBertConfig(**SHAPE), genes=GENES, seed=seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return scbert.Classifier(encoder, ["B", "T", "NK"]).eval()


def digest(value):
    """Return a short hash of arrays, tables and text."""
    if isinstance(value, dict):
        value = sorted((key, digest(each)) for key, each in value.items())
    if isinstance(value, torch.Tensor):
        value = value.numpy()
    if isinstance(value, np.ndarray) and value.dtype != object:
        return hashlib.sha256(np.ascontiguousarray(value).tobytes()).hexdigest()[:12]
    return hashlib.sha256(repr(value).encode()).hexdigest()[:12]


def read_bundle(folder):
    return digest(scbert.load(folder / "model").state_dict())


def save_encoder(seed):
    return lambda folder: scbert.ScBert(scbert.ScBertConfig(**SHAPE), genes=GENES, seed=seed).save(folder / "model")


def save_classifier(seed):
    return lambda folder: make_classifier(seed).save(folder / "model")


def convert(seed):
    def act(folder):
        encoder = scbert.ScBert(scbert.ScBertConfig(**SHAPE), seed=seed)
        torch.save({"model_state_dict": encoder.state_dict()}, folder.parent / f"published{seed}.pth")
        scbert.weights.convert(folder.parent / f"published{seed}.pth", folder / "model", GENES)

    return act


def start_run(folder, seed):
    os.environ["SCBERT_RUNS"] = str(folder)
    record.RUNS.clear()  # as in a new process
    with contextlib.redirect_stdout(None):
        return record.Run(
            "03_faults", {"profile": "demo", "seed": seed, "__annotations__": {"profile": str, "seed": int}}
        )


def finish_run(seed):
    def act(folder):
        run = start_run(folder, seed)
        with contextlib.redirect_stdout(None):
            make_classifier(seed).save(run.path("annotator"))
            run.note_metric("a/b/accuracy", 0.1 * seed, 0, 1, 10)
            run.save_table(pd.DataFrame({"seed": [seed] * 50}), "table")
            run.finish()

    return act


def read_run(folder):
    """Return what a reader takes for the run: a record with the table and the model that lie beside it."""
    os.environ["SCBERT_RUNS"], place = str(folder), folder / "demo" / "03_faults"
    found = report.read_records("demo").get("03_faults")
    if found is None:
        return None
    table = pd.read_csv(place / "table.csv")["seed"]
    return found["seed"], sorted(set(table)), len(table), digest(scbert.load(place / "annotator").state_dict())


def compute_jobs(seed):
    def act(folder):
        run = start_run(folder, 0)
        splits = scbert.protocols.split_cells(make_cells(seed=seed), "cells", label_key="cell_type", seed=0)
        methods = {"logistic_regression": scbert.methods.fit_logistic_regression}
        options = {"data": "cells", "keep": True, "keep_models": list(methods)}
        jobs = runner.plan(make_cells(seed=seed), splits, methods, **options)
        with contextlib.redirect_stdout(None):
            predictions, _ = runner.run(jobs, run, progress=False)
        logits = [runner.read_kept(job, run).logits.to_numpy() for job in jobs]
        arrays = [runner.read_model(job, run).arrays for job in jobs]
        write_text(folder / "seen.txt", repr((digest(predictions.to_csv()), *map(digest, (*logits, *arrays)))))

    return act


def write_jobs_model(seed):
    def act(folder):
        train, validation = (scbert.preprocess.tokenize(make_cells(seed=seed + i)) for i in (0, 1))
        predict = scbert.methods.fit_logistic_regression(train, validation, label_key="cell_type", seed=seed)
        fitted.write_fitted(predict, folder / "fitted")

    return act


def write_kept(seed):
    draw = np.random.default_rng(seed)
    logits = pd.DataFrame(draw.normal(size=(500, 3)), columns=list("abc"), index=[f"cell{i}" for i in range(500)])
    return lambda folder: kept.write_file(
        folder / "kept.npz", logits, draw.normal(size=(500, 8)), draw.normal(size=500)
    )


def read_kept(folder):
    return digest(dict(np.load(folder / "kept.npz").items()))


def write_state(seed):
    state = {"identity": "same", "step": seed, "weights": torch.full((2_000,), float(seed))}
    return lambda folder: checkpoint.write_checkpoint(folder / "a.pt", lambda file: torch.save(state, file))


def read_state(folder):
    _, state = checkpoint.read_checkpoint(folder / "a.pt", "same")
    return digest(state) if state else None


def write_store(seed):
    def act(folder):
        shards.write_store(make_cells(90, seed), folder / "store", shard_cells=40, progress=False)

    return act


def read_store(folder):
    store = scbert.stream.open_store(folder / "store")
    return digest(
        (store.read(np.arange(len(store))).toarray().tobytes(), list(store.obs["cell_type"]), list(store.obs_names))
    )


def write_annotated(name, seed):
    def act(folder):
        adata = make_cells(seed=seed)
        scbert.annotate(adata, make_classifier(seed), unassigned_below=0)
        annotated.write_annotated(adata, folder / name)

    return act


def read_h5ad(folder):
    adata = anndata.read_h5ad(folder / "out.h5ad")
    return digest((adata.X.toarray().tobytes(), adata.obs.to_csv(), adata.obsm["X_scbert"].tobytes()))


def read_text(name):
    return lambda folder: digest((folder / name).read_text())


def make_table(seed):
    return lambda folder: runner.write_predictions(
        pd.DataFrame(dict.fromkeys(("data", "protocol", "part", "truth"), "x"), index=range(60)).assign(
            repeat=0, fold=0, cell=[f"cell{i}" for i in range(60)], method="m", predicted=f"label{seed}"
        ),
        folder / "predictions.csv.gz",
    )


def read_table(folder):
    return digest(pd.read_csv(folder / "predictions.csv.gz").to_csv())


def fetch(seed):
    """Fetch from a mirror by address, as from the network: `seed` is the version of the file, held to its hash."""

    def act(folder):
        import threading
        from functools import partial
        from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

        from scbert.sources import download

        served = folder.parent / "served"
        served.mkdir(exist_ok=True)
        data = random.Random(seed).randbytes(20_000)
        (served / "file.bin").write_bytes(data)
        handler = type("Silent", (SimpleHTTPRequestHandler,), {"log_message": lambda *_: None})
        server = ThreadingHTTPServer(("127.0.0.1", 0), partial(handler, directory=str(served)))
        threading.Thread(target=server.serve_forever, daemon=True).start()
        os.environ |= {"SCBERT_CACHE": str(folder / "cache")}
        os.environ.pop("SCBERT_MIRROR", None)
        os.environ["NO_PROXY"] = "127.0.0.1"
        download._address_of = lambda _: f"http://127.0.0.1:{server.server_port}/file.bin"
        entry = {"url": "http://example.org/file.bin", "bytes": 20_000, "sha256": hashlib.sha256(data).hexdigest()}
        download.fetch_file(entry, progress=False)
        server.shutdown()

    return act


def read_fetched(folder):
    file = folder / "cache" / "file.bin"
    return digest(file.read_bytes()) if file.exists() else None


def write_report(seed):
    def act(folder):
        import nbformat

        os.environ["SCBERT_RUNS"] = str(folder / "runs")
        place = folder / "runs" / "demo" / "00_faults"
        place.mkdir(parents=True, exist_ok=True)
        if not (place / "00_faults.ipynb").exists():
            book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell("text", id="a")])
            nbformat.write(book, place / "00_faults.ipynb")
        done = {"notebook": "00_faults", "parameters": {}, "seconds": 60 + seed, "peak_memory_mb": 1, "checks": []}
        write_text(place / "record.json", json.dumps(done))
        report.write_report("demo", folder / "report")

    return act


def pretrain(folder):
    """Pretrain with a checkpoint each other step."""
    model = scbert.ScBert(scbert.ScBertConfig(**SHAPE), seed=0)
    options = {"n_epochs": 6, "checkpoint": folder / "a.pt", "checkpoint_every": 2, "log": folder / "history.csv"}
    scbert.pretrain(model, scbert.preprocess.tokenize(make_cells(480)), accelerator="cpu", progress=False, **options)
    write_text(folder / "end.txt", digest(model.state_dict()))


def finetune(folder):
    """Fine-tune with a checkpoint each epoch."""
    model = scbert.ScBert(scbert.ScBertConfig(**SHAPE), genes=GENES, seed=0)
    options = {
        "n_epochs": 8,
        "checkpoint": folder / "a.pt",
        "accelerator": "cpu",
        "progress": False,
        "label_key": "cell_type",
    }
    trained = scbert.finetune(model, scbert.preprocess.tokenize(make_cells(240)), **options)
    write_text(folder / "end.txt", digest(trained.state_dict()))


def benchmark(folder):
    """Compute nine jobs, each kept as soon as it is there."""
    run = start_run(folder, 0)
    splits = scbert.protocols.cross_validation(make_cells(90), "cells", label_key="cell_type", n_folds=3, seed=0)
    fits = {name: scbert.methods.FITS[name] for name in ("majority", "logistic_regression", "nearest_centroid")}
    with contextlib.redirect_stdout(None):
        predictions, _ = runner.run(runner.plan(make_cells(90), splits, fits, data="cells"), run, progress=False)
    write_text(folder / "end.txt", digest(predictions.to_csv()))


def annotate_much(folder):
    """Annotate 6,000 cells in windows of 256, each kept."""
    scbert.stream.CELLS_A_WINDOW, adata = 256, make_cells(6_000)
    scbert.annotate(adata, make_classifier(), unassigned_below=0, keep=folder / "kept")
    write_text(folder / "end.txt", digest((adata.obs.to_csv(), adata.obsm["X_scbert"].tobytes())))


def store_much(folder):
    """Write 6,000 cells as a store of 24 shards."""
    shards.write_store(make_cells(6_000), folder / "store", shard_cells=250, progress=False)
    write_text(folder / "end.txt", read_store(folder))


STAGES = {
    "pretraining": pretrain,
    "fine-tuning": finetune,
    "benchmark": benchmark,
    "annotating": annotate_much,
    "writing a store": store_much,
}


def fault_stage(name, times, seed=0):
    """Yield a row for each of so many runs of a stage, each killed at three random moments, if it lasts, and continued."""
    draw = random.Random(seed)
    with tempfile.TemporaryDirectory(prefix="faults-") as top:
        whole, start = Path(os.path.realpath(top)) / "whole", time.monotonic()
        whole.mkdir()
        status, said = in_child(lambda: STAGES[name](whole))
        seconds, expected = time.monotonic() - start, (whole / "end.txt").read_text()
        for number in range(times):
            folder = Path(os.path.realpath(top)) / str(number)
            folder.mkdir()
            kills = 0
            for _ in range(3):
                pause = draw.uniform(0.05, 0.8) * seconds

                def kill_later(pause=pause):
                    signal.signal(signal.SIGALRM, signal.SIG_DFL)  # which ends the process at once
                    signal.setitimer(signal.ITIMER_REAL, pause)

                kills += in_child(lambda folder=folder: STAGES[name](folder), kill_later)[0] < 0
            status, said = in_child(lambda folder=folder: STAGES[name](folder))
            ended = (folder / "end.txt").read_text() if (folder / "end.txt").exists() else None
            outcome = "survived" if ended == expected else f"lost: {said}" if status not in (0, UNSAID) else "half"
            for kill in range(kills):
                yield {
                    "what": name,
                    "kind": "killed at random",
                    "at": 3 * number + kill,
                    "outcome": outcome,
                    "said": said,
                }


def nothing(_):
    """Leave the folder empty."""


WRITERS = {
    "encoder": Writer(nothing, save_encoder(1), read_bundle),
    "encoder over encoder": Writer(save_encoder(0), save_encoder(1), read_bundle),
    "annotator over annotator": Writer(save_classifier(0), save_classifier(1), read_bundle),
    "annotator over encoder": Writer(save_encoder(0), save_classifier(1), read_bundle),
    "converted over encoder": Writer(convert(0), convert(1), read_bundle),
    "run over run": Writer(finish_run(1), finish_run(2), read_run),
    "jobs": Writer(nothing, compute_jobs(0), read_text("seen.txt")),
    "jobs over jobs": Writer(compute_jobs(0), compute_jobs(1), read_text("seen.txt")),
    "logits over logits": Writer(write_kept(0), write_kept(1), read_kept),
    "checkpoint over checkpoint": Writer(write_state(0), write_state(1), read_state),
    "store": Writer(nothing, write_store(0), read_store),
    "annotated file": Writer(nothing, write_annotated("out.h5ad", 0), read_h5ad),
    "annotated over annotated": Writer(write_annotated("out.h5ad", 0), write_annotated("out.h5ad", 1), read_h5ad),
    "names over names": Writer(write_annotated("a.csv", 0), write_annotated("a.csv", 1), read_text("a.csv")),
    "text over text": Writer(
        lambda folder: write_text(folder / "a.txt", "old\n" * 500),
        lambda folder: write_text(folder / "a.txt", "new\n" * 500),
        read_text("a.txt"),
    ),
    "predictions over predictions": Writer(make_table(0), make_table(1), read_table),
    "download": Writer(nothing, fetch(0), read_fetched),
    "report over report": Writer(write_report(0), write_report(1), read_text("report/index.html")),
}


def watch_operations(folder, fail_at, kind):
    """Count this process's file operations below a folder, for good, and fail at one of them; return the list of counts."""
    seen, changing = [], os.O_WRONLY | os.O_RDWR | os.O_CREAT

    def hook(event, arguments):
        if event == "open":
            path, mode, flags = arguments
            concerns = (isinstance(mode, str) and set(mode) & set("wxa+")) or (mode is None and flags & changing)
        else:
            path = arguments[0]
            concerns = event in ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.chmod", "os.truncate")
        if not concerns or not isinstance(path, (str, bytes, os.PathLike)):
            return
        if not os.path.abspath(os.fsdecode(path)).startswith(f"{folder}{os.sep}"):
            return
        seen.append(event)
        if len(seen) - 1 == fail_at:
            if kind == "killed":
                os._exit(137)
            number = errno.ENOSPC if kind == "disk full" else errno.EACCES
            raise OSError(number, os.strerror(number), os.fsdecode(path))

    sys.addaudithook(hook)
    return seen


def in_child(act, prepare=lambda: None, seconds=120):
    """Run `act` in a process of its own; return its exit status and, of an error, what it said."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        status, said = 0, ""
        os.close(read)
        torch.set_num_threads(1)  # the threads of the process that forked are not here, and would be waited for
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # h5py's complaints about a full disk
        try:
            with warnings.catch_warnings(record=True) as heard:
                warnings.simplefilter("always")
                prepare()
                act()
            if heard:
                status, said = UNSAID, str(heard[0].message)
        except (ValueError, OSError, RuntimeError) as error:  # RuntimeError: of jobs, each with its reason
            status, said = SAID, f"{type(error).__name__}: {error}"
        except BaseException as error:
            status, said = CRASHED, f"{type(error).__name__}: {error}"
        with contextlib.suppress(OSError):
            os.write(write, said.encode()[:4000])
        os._exit(status)
    os.close(write)
    signal.signal(signal.SIGALRM, lambda *_: os.kill(child, signal.SIGKILL))
    signal.alarm(seconds)
    with os.fdopen(read, "rb") as pipe:
        said = pipe.read().decode(errors="replace")
    _, status = os.waitpid(child, 0)
    signal.alarm(0)
    return (os.WEXITSTATUS(status) if os.WIFEXITED(status) else -os.WTERMSIG(status)), said


def look(writer, folder):
    """Return what is read of a folder, or None where reading refuses or finds nothing."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return writer.read(folder)
    except (OSError, ValueError):
        return None


def list_files(folder):
    """Return the names below a folder, but for locks and caches of names."""
    return sorted(
        str(file.relative_to(folder)) for file in folder.rglob("*") if file.suffix != ".lock" and file.is_file()
    )


def judge(writer, folder, status, said, before, after, files):
    """Return what came of a fault, and do the call again."""
    now = look(writer, folder)
    if status == CRASHED:
        return f"traceback: {said}"
    if now not in (before, after):
        return f"half: {now} is neither {before} nor {after}"
    if status == 0 and now != after:
        return "silent"
    for file in folder.rglob("*.tmp"):  # what was left is removed by the next writer an hour later
        os.utime(file, (0, 0))
    again, said = in_child(lambda: writer.new(folder))
    if again not in (0, UNSAID) or look(writer, folder) != after:
        return f"lost: {said}"
    left = set(list_files(folder)) - set(files)
    return f"debris: {', '.join(sorted(left))}" if left else "survived"


def fault_writer(name, kinds=KINDS, sizes=6, take=None):
    """Yield a row for each fault of one writer; `take` chooses among them, given how many there are."""
    writer = WRITERS[name]
    with tempfile.TemporaryDirectory(prefix="faults-") as top:
        top = Path(os.path.realpath(top))
        good, work = top / "good", top / "work"
        good.mkdir()
        in_child(lambda: writer.good(good))

        def restore():
            shutil.rmtree(work, ignore_errors=True)
            shutil.copytree(good, work)

        restore()
        before = look(writer, work)
        counts = top / "count"

        def count():
            seen = watch_operations(str(work), None, None)
            writer.new(work)
            counts.write_text(str(len(seen)))

        status, said = in_child(count)
        after, files = look(writer, work), list_files(work)
        if status not in (0, UNSAID) or after is None or after == before:
            raise RuntimeError(f"The writer {name} does not write: {status} {said}")
        largest = max(file.stat().st_size for file in work.rglob("*") if file.is_file())
        n = int(counts.read_text())
        faults = [(kind, number) for kind in kinds for number in range(n)]
        faults += [("file limit", int(largest * share)) for share in np.linspace(0, 0.98, sizes)]
        for kind, number in take(faults) if take else faults:
            restore()

            def prepare(kind=kind, number=number):
                if kind == "file limit":
                    resource.setrlimit(resource.RLIMIT_FSIZE, (number, resource.RLIM_INFINITY))
                else:
                    watch_operations(str(work), number, kind)

            status, said = in_child(lambda: writer.new(work), prepare)
            outcome = judge(writer, work, status, said, before, after, files)
            yield {"what": name, "kind": kind, "at": number, "outcome": outcome, "said": said}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, nargs="?", default=None)
    parser.add_argument("--writers", nargs="*", default=list(WRITERS), choices=list(WRITERS))
    parser.add_argument("--stages", nargs="*", default=list(STAGES), choices=list(STAGES))
    parser.add_argument("--times", type=int, default=8)
    chosen = parser.parse_args()
    rows = []
    for name in [*chosen.writers, *chosen.stages]:
        start = time.monotonic()
        rows += fault_writer(name) if name in WRITERS else fault_stage(name, chosen.times)
        of_it = [row["outcome"] for row in rows if row["what"] == name]
        print(f"{name}: {len(of_it)} faults, {time.monotonic() - start:.0f} s", flush=True)
        for row in rows:
            if row["what"] == name and row["outcome"] != "survived":
                print(f"   {row['kind']} at {row['at']}: {row['outcome'][:200]}   [{row['said'][:120]}]", flush=True)
    table = pd.DataFrame(rows)
    if chosen.file:
        table.to_csv(chosen.file, index=False)
    table["outcome"] = table["outcome"].str.split(":").str[0]
    counts = table.pivot_table(index="what", columns="kind", values="at", aggfunc="count", margins=True, sort=False)
    print(counts.fillna(0).astype(int).to_string())
    print(table["outcome"].value_counts().to_string())
    sys.exit(int((table["outcome"] != "survived").any()))


if __name__ == "__main__":
    main()
