"""Kill pretraining with SIGKILL at random moments and compare what becomes of it: python tests/measure_resume.py

The demo's cells, the shape of notebook 02, three epochs, a checkpoint every five steps. Ten runs are each killed once
and continued; one more is killed ten times before it may end. Weights and history must be those of the run that was
never interrupted, bit for bit. About ten minutes on one core; exit status 1 if anything differs.
"""

import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pandas as pd
import torch

import scbert


def train(folder):
    """Pretrain in this process, with a checkpoint in `folder`; keep weights and history there."""
    learn, _ = scbert.corpus.join_sets(scbert.corpus.load_sets("pbmc68k_reduced", label_key="cell_type"))
    learn = scbert.preprocess.tokenize(learn)
    model = scbert.ScBert(scbert.ScBertConfig(learn.n_vars, 5, 32, 2, 4, 16), seed=0)
    (folder / "started").touch()
    history = scbert.pretrain(
        model, learn, n_epochs=3, learning_rate=0.003, checkpoint=folder / "a.pt", checkpoint_every=5, redraw_every=20,
        accelerator="cpu", progress=False,
    )  # fmt: skip
    torch.save(model.state_dict(), folder / "weights.pt")
    history.to_csv(folder / "history.csv", index=False)


def start(folder):
    folder.mkdir(exist_ok=True)
    (folder / "started").unlink(missing_ok=True)
    child = subprocess.Popen([sys.executable, __file__, str(folder)], env=os.environ | {"OMP_NUM_THREADS": "1"})
    while not (folder / "started").exists() and child.poll() is None:
        time.sleep(0.01)
    return child


def kill(folder, seconds):
    """Start a run, kill it so long after its training began; return the step its checkpoint is at, and debris."""
    child = start(folder)
    time.sleep(seconds)
    child.send_signal(signal.SIGKILL)
    child.wait()
    _, state = scbert.checkpoint.read_checkpoint(folder / "a.pt", read_identity(folder))
    return state.get("step", 0), len(list(folder.glob("*.tmp")))


def read_identity(folder):
    for file in (folder / "a.pt", folder / "a.before.pt"):
        if file.exists():
            return torch.load(file, weights_only=True)["identity"]
    return ""


def is_equal(folder, whole):
    ours, theirs = (torch.load(part / "weights.pt", weights_only=True) for part in (folder, whole))
    same = all(torch.equal(ours[name], theirs[name]) for name in theirs)
    return same and pd.read_csv(folder / "history.csv").equals(pd.read_csv(whole / "history.csv"))


def main():
    """Kill and continue, print a row each, return whether all are equal."""
    chance, equal = random.Random(0), []
    with tempfile.TemporaryDirectory() as folder:
        whole = Path(folder) / "whole"
        child, begun = start(whole), time.monotonic()
        child.wait()
        seconds = time.monotonic() - begun
        print(f"uninterrupted: {seconds:.1f} s of training", flush=True)
        for number in range(10):
            own, moment = Path(folder) / str(number), chance.uniform(0, seconds)
            step, debris = kill(own, moment)
            start(own).wait()
            equal.append(is_equal(own, whole))
            print(
                f"killed after {moment:.1f} s, went on at step {step}, {debris} half-written: {equal[-1]}", flush=True
            )
        own, steps = Path(folder) / "again", []
        for _ in range(10):
            steps.append(kill(own, chance.uniform(0, seconds / 4))[0])
        start(own).wait()
        equal.append(is_equal(own, whole))
        print(f"killed ten times in a row, at steps {steps}: {equal[-1]}")
    return all(equal)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        train(Path(sys.argv[1]))
    else:
        sys.exit(not main())
