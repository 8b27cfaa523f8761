"""Read damaged and foreign files, thousands of each format: python tests/faults/damage.py [rows.csv] [--each 600] [--formats a b]

Each input is a sound file after one seeded change: a bit, a byte, a piece that is cut off, left out, doubled, zeroed or put
in; of text also lines and fields that are lost, doubled or exchanged; or another file under its name. Binary formats that
outside libraries read without checksums of their own (HDF5, Matrix Market) are only cut off, or replaced by another file:
what else does to those libraries is theirs to say. All is read in a process of its own, with a time limit. What came of it:

refused      one sentence that names the file, in a ValueError or OSError
as before    the same is read: the change does not matter, or a checksum let it be computed or found again
otherwise    something else is read; a fault where the format or this package has a checksum
traceback    an error of another kind, or one that names no file
died         the process crashed, or ran out of its time

Exit status 1 for a traceback, a death, or something else read in spite of a checksum. Ten minutes on one core.
"""

import argparse
import contextlib
import gzip
import json
import os
import shutil
import sys
import tarfile
import tempfile
import time
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
import yaml
from kills import (
    GENES,
    compute_jobs,
    digest,
    in_child,
    make_cells,
    read_store,
    save_classifier,
    start_run,
    write_state,
    write_store,
)

import scbert
from scbert.run import preflight, report
from scbert.scale import blocks, checkpoint

BYTES = ("bit", "byte", "cut off", "left out", "doubled", "zeroed", "put in")
LINES = ("line lost", "line doubled", "lines exchanged", "field lost", "field doubled")
WHOLE = ("cut off", "empty", "page", "zip", "folder", "other text")


class Format(NamedTuple):
    """How a sound file or folder is made, which of its files are damaged and how, and what reads it."""

    make: Callable[[Path], None]
    read: Callable[[Path], object]
    files: tuple[str, ...]
    changes: tuple[str, ...]
    checked: bool = False
    """Whether the format, or this package, has a checksum over it: nothing else may be read then."""


def read_cells(name):
    """Return a reader of cells of that name below a folder, as users call it."""

    def read(folder):
        adata = scbert.datasets.read(folder / name)
        counts = np.asarray(adata.X.todense()) if hasattr(adata.X, "todense") else np.asarray(adata.X)
        return digest(
            (counts.astype(float).tobytes(), list(map(str, adata.obs_names)), list(map(str, adata.var_names)))
        )

    return read


def table_of(adata):
    return pd.DataFrame(adata.X.toarray().astype(int), adata.obs_names, adata.var_names).T


def make_csv(name, sep=","):
    return lambda folder: table_of(make_cells(30)).to_csv(folder / name, sep=sep)


def write_mtx(folder, packed):
    from scipy.io import mmwrite

    adata, ends = make_cells(30), ".gz" if packed else ""
    folder.mkdir(exist_ok=True)
    mmwrite(folder / "matrix.mtx", adata.X.T.astype(int).tocoo(), field="integer")
    texts = {"barcodes.tsv": "\n".join(adata.obs_names) + "\n"}
    rows = [f"ENSG{i:011d}\t{gene}\tGene Expression" for i, gene in enumerate(adata.var_names)]
    texts["features.tsv"] = "\n".join(rows) + "\n"
    for name, text in texts.items():
        write = gzip.open if packed else open
        with write(folder / f"{name}{ends}", "wt") as file:
            file.write(text)
    if packed:
        (folder / "matrix.mtx.gz").write_bytes(gzip.compress((folder / "matrix.mtx").read_bytes()))
        (folder / "matrix.mtx").unlink()


def make_archive(name):
    """Make an archive of one sample as a series has it, in files of 10x."""

    def make(folder):
        write_mtx(folder / "s", True)
        files = {f"GSM1_{file.name}": file for file in (folder / "s").iterdir()}
        if name.endswith("zip"):
            with zipfile.ZipFile(folder / name, "w") as archive:
                for inside, file in files.items():
                    archive.write(file, inside)
        else:
            with tarfile.open(folder / name, "w:gz" if name.endswith("gz") else "w") as archive:
                for inside, file in files.items():
                    archive.add(file, inside)
        shutil.rmtree(folder / "s")

    return make


def make_10x(folder):
    import h5py

    adata = make_cells(30)
    with h5py.File(folder / "a.h5", "w") as file:
        group, counts = file.create_group("matrix"), adata.X.tocsr()
        for name in ("data", "indices", "indptr"):
            group[name] = getattr(counts, name).astype(np.int32)
        group["shape"], group["barcodes"] = [24, 30], adata.obs_names.to_numpy().astype("S")
        features = group.create_group("features")
        for name, values in (
            ("id", GENES),
            ("name", GENES),
            ("feature_type", ["Gene Expression"] * 24),
            ("genome", ["x"] * 24),
        ):
            features[name] = np.array(values, dtype="S")


def make_loom(folder):
    import h5py

    adata = make_cells(30)
    with h5py.File(folder / "a.loom", "w") as file:
        file["matrix"] = adata.X.toarray().T
        file["row_attrs/Gene"], file["col_attrs/CellID"] = np.array(GENES, "S"), adata.obs_names.to_numpy().astype("S")
        for group in ("layers", "row_graphs", "col_graphs"):
            file.create_group(group)


def make_rds(folder):
    sys.path.insert(0, str(Path(__file__).parent.parent))
    import r_files

    r_files.write_sparse_rds(folder / "a.rds", make_cells(30)) if hasattr(r_files, "write_sparse_rds") else None


def read_job(folder):
    """Return what a benchmark says with its results as they are: a damaged one is computed again."""
    with contextlib.suppress(FileNotFoundError):
        (folder / "seen.txt").unlink()
    compute_jobs(0)(folder)
    return (folder / "seen.txt").read_text()


def make_profile(folder):
    section = {
        "dataset": "zheng_facs",
        "label_key": "cell_type",
        "n_epochs": 3,
        "learning_rate": 0.001,
        "methods": "scbert",
    }
    (folder / "profiles").mkdir()
    (folder / "profiles" / "own.yaml").write_text(
        yaml.safe_dump({"03_finetune_and_annotate": section, "04_benchmark": dict(section)})
    )


def make_record(folder):
    run = start_run(folder, 3)
    with contextlib.redirect_stdout(None):
        for i in range(5):
            run.note_metric(f"a/{i}/accuracy", 0.1 * i, 0, 1, 10)
        run.finish()


def read_record(folder):
    found = report.read_record(folder / "demo" / "03_faults" / "record.json")
    if found is None:
        raise ValueError("record.json counts as absent, and a warning says so")
    return digest(found)


def make_block(folder):
    blocks.write_block(folder / "a.npz", [np.arange(300.0), np.ones((30, 8), np.float32), np.ones(30, bool)])


def read_block(folder):
    found = blocks.read_block(folder / "a.npz")
    if found is None:
        raise ValueError("a.npz is computed again")
    return digest([array.tobytes() for array in found])


def read_state(folder):
    found, state = checkpoint.read_checkpoint(folder / "a.pt", "same")
    if found is None:
        raise ValueError("a.pt is named in a warning, and training starts from the beginning")
    return digest({"step": state["step"], "weights": state["weights"]})


def make_published(folder):
    torch.manual_seed(0)
    encoder = scbert.ScBert(scbert.ScBertConfig(24, dim=8, depth=1, heads=2, dim_head=4), seed=0)
    torch.save({"model_state_dict": encoder.state_dict()}, folder / "published.pth")


def read_published(folder):
    shutil.rmtree(folder / "converted", ignore_errors=True)
    scbert.weights.convert(folder / "published.pth", folder / "converted", GENES)
    return digest(scbert.load(folder / "converted").state_dict())


def make_labels(folder):
    make_csv("a.csv")(folder)
    cells = make_cells(30)
    cells.obs.rename_axis("cell").to_csv(folder / "labels.csv")


def read_labels(folder):
    adata = scbert.datasets.load(f"{folder / 'a.csv'} with {folder / 'labels.csv'}", label_key="cell_type")
    return digest((list(adata.obs_names), list(adata.obs["cell_type"].astype(str))))


BUNDLE = ("config.json", "genes.txt", "labels.json", "model.safetensors")
FORMATS = {
    "bundle": Format(save_classifier(0), lambda folder: digest(scbert.load(folder / "model").state_dict()),
                     tuple(f"model/{name}" for name in BUNDLE), BYTES + WHOLE, True),
    "result of a job": Format(compute_jobs(0), read_job, ("demo/03_faults/jobs/*",), BYTES + WHOLE[:4], True),
    "kept block": Format(make_block, read_block, ("a.npz",), BYTES + WHOLE, True),
    "checkpoint": Format(write_state(1), read_state, ("a.pt",), BYTES + WHOLE, True),
    "published weights": Format(make_published, read_published, ("published.pth",), BYTES + WHOLE),
    "store": Format(write_store(0), read_store, ("store/store.json",), BYTES + WHOLE, True),
    "store's shards": Format(write_store(0), read_store, ("store/shard*",), WHOLE, True),
    "record": Format(make_record, read_record, ("demo/03_faults/record.json",), BYTES + LINES + WHOLE),
    "profile": Format(make_profile, lambda folder: digest(preflight.read_sections(folder, "own")),
                      ("profiles/own.yaml",), BYTES + LINES + WHOLE),
    "table of counts": Format(make_csv("a.csv"), read_cells("a.csv"), ("a.csv",), BYTES + LINES + WHOLE),
    "table, tabs": Format(make_csv("a.tsv", "\t"), read_cells("a.tsv"), ("a.tsv",), BYTES + LINES + WHOLE),
    "table, gzipped": Format(make_csv("a.csv.gz"), read_cells("a.csv.gz"), ("a.csv.gz",), BYTES + WHOLE, True),
    "table of labels": Format(make_labels, read_labels, ("labels.csv",), BYTES + LINES + WHOLE),
    "10x folder, names": Format(lambda folder: write_mtx(folder / "s", False), read_cells("s"),
                                ("s/barcodes.tsv", "s/features.tsv"), BYTES + LINES + WHOLE),
    "10x folder, gzipped": Format(lambda folder: write_mtx(folder / "s", True), read_cells("s"),
                                  ("s/*",), BYTES + WHOLE, True),
    "10x folder, matrix": Format(lambda folder: write_mtx(folder / "s", False), read_cells("s"), ("s/matrix.mtx",), WHOLE),
    "series, tar.gz": Format(make_archive("a.tar.gz"), read_cells("a.tar.gz"), ("a.tar.gz",), BYTES + WHOLE, True),
    "series, zip": Format(make_archive("a.zip"), read_cells("a.zip"), ("a.zip",), BYTES + WHOLE, True),
    "h5ad": Format(lambda folder: make_cells(30).write_h5ad(folder / "a.h5ad"), read_cells("a.h5ad"), ("a.h5ad",), WHOLE),
    "10x h5": Format(make_10x, read_cells("a.h5"), ("a.h5",), WHOLE),
    "loom": Format(make_loom, read_cells("a.loom"), ("a.loom",), WHOLE),
}  # fmt: skip


def change(file, how, draw):
    """Change a file in one way, by a random generator; return what was done, in words."""
    data = bytearray(file.read_bytes())
    n = max(1, len(data))
    at, length = int(draw.integers(n)), int(draw.integers(1, max(2, min(n, 200))))
    piece = data[at : at + length]
    if how == "folder":
        file.unlink()
        file.mkdir()
        return
    if how in LINES:
        lines = data.split(b"\n")
        i, j = map(int, draw.integers(len(lines), size=2))
        sep = next((sep for sep in (b"\t", b",", b": ") if sep in lines[i]), b" ")
        fields = lines[i].split(sep)
        k = int(draw.integers(len(fields)))
        if how == "line lost":
            del lines[i]
        elif how == "line doubled":
            lines.insert(i, lines[i])
        elif how == "lines exchanged":
            lines[i], lines[j] = lines[j], lines[i]
        else:
            fields[k : k + 1] = [] if how == "field lost" else [fields[k]] * 2
            lines[i] = sep.join(fields)
        data = bytearray(b"\n").join(lines)
    elif how == "bit":
        data[at] ^= 1 << int(draw.integers(8))
    elif how == "byte":
        data[at] = int(draw.integers(256))
    elif how == "cut off":
        del data[at:]
    elif how == "left out":
        del data[at : at + length]
    elif how == "doubled":
        data[at:at] = piece
    elif how == "zeroed":
        data[at : at + length] = bytes(len(piece))
    elif how == "put in":
        data[at:at] = draw.bytes(length)
    else:
        packed = file.with_name("other.zip")
        with zipfile.ZipFile(packed, "w") as archive:
            archive.writestr("a.txt", "text")
        others = {"zip": packed.read_bytes(), "empty": b"", "other text": b"other text\n" * int(draw.integers(1, 9))}
        packed.unlink()
        data = others.get(how, b"<!doctype html><html><body>Not found</body></html>\n")
    file.write_bytes(data)


def look(form, folder, file):
    """Return what came of reading, a word and a text: `file` has to be named by a refusal, or the folder that it is in."""
    with warnings.catch_warnings(), contextlib.redirect_stdout(None):
        warnings.simplefilter("ignore")
        try:
            return "read", form.read(folder)
        except (ValueError, OSError) as error:
            kind, said = type(error).__name__, str(error)
    named = [
        file.name,
        file.stem,
        "a.csv",
        *(part.name for part in file.parents if part != folder and folder in part.parents),
    ]
    if said.count("\n") or not any(name in said for name in named):
        return "traceback", f"{kind}: {said[:300]}"
    return "refused", said


def damage(name, each, seed=0):
    """Yield a row an input of a format."""
    form, _draw = FORMATS[name], np.random.default_rng(seed)
    with tempfile.TemporaryDirectory(prefix="faults-") as top:
        top = Path(os.path.realpath(top))
        good, work, out = top / "good", top / "work", top / "out.json"
        good.mkdir()
        in_child(lambda: form.make(good))
        shutil.copytree(good, work)
        status, said = in_child(lambda: out.write_text(json.dumps(look(form, work, work / "x"))))
        word, before = json.loads(out.read_text()) if out.exists() else ("died", said)
        if word != "read":
            raise RuntimeError(f"{name} is not read as it was made: {before}")
        files = sorted(
            file.relative_to(good) for pattern in form.files for file in good.glob(pattern) if file.is_file()
        )
        plan = [
            (files[i % len(files)], form.changes[(i // len(files)) % len(form.changes)], [seed, i]) for i in range(each)
        ]
        done = 0
        while done < len(plan):
            rows = top / "rows.jsonl"
            rows.write_text("")

            def work_off(start=done, rows=rows):
                for file, how, own in plan[start : start + 200]:
                    shutil.rmtree(work, ignore_errors=True)
                    shutil.copytree(good, work)
                    before_change = (work / file).read_bytes()
                    change(work / file, how, np.random.default_rng(own))
                    is_same = (work / file).is_file() and (work / file).read_bytes() == before_change
                    word, value = ("read", before) if is_same else look(form, work, work / file)
                    with open(rows, "a") as opened:
                        opened.write(json.dumps([str(file), how, word, value]) + "\n")

            status, said = in_child(work_off, seconds=300)
            found = [json.loads(line) for line in rows.read_text().splitlines()]
            for file, how, word, value in found:
                outcome = word if word != "read" else "as before" if value == before else "otherwise"
                yield {"format": name, "file": file, "change": how, "outcome": outcome, "said": value}
            done += len(found)
            if status and len(found) < min(
                200, len(plan) - done + len(found)
            ):  # at the input after the last that is there
                file, how, _ = plan[done]
                outcome = "traceback" if said else "died"
                yield {
                    "format": name,
                    "file": str(file),
                    "change": how,
                    "outcome": outcome,
                    "said": said or f"status {status}",
                }
                done += 1


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, nargs="?", default=None)
    parser.add_argument("--formats", nargs="+", default=list(FORMATS), choices=list(FORMATS))
    parser.add_argument("--each", type=int, default=600)
    parser.add_argument("--seed", type=int, default=0)
    chosen = parser.parse_args()
    rows = []
    for name in chosen.formats:
        start = time.monotonic()
        of_it = list(damage(name, min(chosen.each, 200) if name == "result of a job" else chosen.each, chosen.seed))
        rows += of_it
        print(f"{name}: {len(of_it)} inputs, {time.monotonic() - start:.0f} s", flush=True)
        seen = set()
        for row in of_it:
            bad = row["outcome"] in ("traceback", "died") or (row["outcome"] == "otherwise" and FORMATS[name].checked)
            key = (row["outcome"], row["said"][:60])
            if bad and key not in seen and len(seen) < 12:
                seen.add(key)
                print(f"   {row['file']}, {row['change']}: {row['outcome']}: {row['said'][:220]}", flush=True)
    table = pd.DataFrame(rows)
    if chosen.file:
        table.to_csv(chosen.file, index=False)
    counts = table.pivot_table(
        index="format", columns="outcome", values="said", aggfunc="count", margins=True, sort=False
    )
    counts["checksum"] = ["yes" if name in FORMATS and FORMATS[name].checked else "" for name in counts.index]
    print(counts.fillna(0).to_string(float_format="{:.0f}".format))
    wrong = table["outcome"].eq("otherwise") & table["format"].map(lambda name: FORMATS[name].checked)
    sys.exit(int((wrong | table["outcome"].isin(["traceback", "died"])).any()))


if __name__ == "__main__":
    main()
