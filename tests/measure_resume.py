"""Kill pretraining with SIGKILL at random moments and compare what becomes of it: python tests/measure_resume.py

The demo's cells, the shape of notebook 02, three epochs, a checkpoint every five steps. Ten runs are each killed once
and continued; one is killed ten times before it may end; one is killed three times while it writes a checkpoint.
Weights and history must be those of the run that was never interrupted, bit for bit. Two runs at once: seven minutes of
processor time, sixteen minutes on a busy machine with two cores. Exit status 1 if anything differs.
"""

import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

import scbert


def train(folder):
    """Pretrain in this process, with a checkpoint in `folder`; keep weights and history there."""
    learn, _ = scbert.pretraining.join_sets(scbert.pretraining.load_sets("pbmc68k_reduced", label_key="cell_type"))
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
    """Start a run, or go on with it, and return its process as soon as training begins."""
    folder.mkdir(exist_ok=True)
    (folder / "started").unlink(missing_ok=True)
    child = subprocess.Popen([sys.executable, __file__, str(folder)], env=os.environ | {"OMP_NUM_THREADS": "1"})
    while not (folder / "started").exists() and child.poll() is None:
        time.sleep(0.01)
    return child


def finish(folder):
    if start(folder).wait():
        raise RuntimeError(f"The run in {folder} failed.")


def find_debris(folder):
    return set(folder.glob("*.tmp"))


def kill(folder, seconds, writing=False):
    """Kill a run so long after training began, or then at its next write; return where it is, or None if it had ended.

    That is the step of its checkpoint, and whether the kill left a half-written one.
    """
    before = find_debris(folder)
    child = start(folder)
    time.sleep(seconds)
    while writing and child.poll() is None and find_debris(folder) <= before:
        time.sleep(0.0002)
    child.send_signal(signal.SIGKILL)
    if child.wait() != -signal.SIGKILL:
        return None
    _, state = scbert.checkpoint.read_checkpoint(folder / "a.pt", read_identity(folder))
    return state.get("step", 0), find_debris(folder) > before


def read_identity(folder):
    for file in (folder / "a.pt", folder / "a.before.pt"):
        if file.exists():
            return torch.load(file, weights_only=True)["identity"]
    return ""


def is_equal(folder, whole):
    ours, theirs = (torch.load(part / "weights.pt", weights_only=True) for part in (folder, whole))
    histories = [(part / "history.csv").read_bytes() for part in (folder, whole)]
    same = ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in theirs)
    return same and histories[0] == histories[1]


def interrupt(folder, whole, moments, writing=False):
    """Kill a run at each of these moments, let it end, and return the kills and whether it came to the same."""
    kills = [kill(folder, moment, writing) for moment in moments]
    finish(folder)
    return kills, is_equal(folder, whole)


def main():
    """Kill and continue, print a row each, return whether all are equal and all kills hit a run."""
    chance = random.Random(0)
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(2) as pool:
        whole = Path(folder) / "whole"
        child, begun = start(whole), time.monotonic()
        child.wait()
        seconds = time.monotonic() - begun
        print(f"uninterrupted: {seconds:.1f} s of training, {read_steps(whole)} steps", flush=True)
        plans = [([chance.uniform(0, 0.95 * seconds)], False) for _ in range(10)]
        plans.append(([chance.uniform(0, seconds / 12) for _ in range(10)], False))
        plans.append(([chance.uniform(0, seconds / 4) for _ in range(3)], True))
        runs = [pool.submit(interrupt, Path(folder) / str(i), whole, *plan) for i, plan in enumerate(plans)]
        all_kills, equal = [], []
        for (moments, writing), run in zip(plans, runs, strict=True):
            kills, same = run.result()
            all_kills += kills
            equal.append(same)
            times = " ".join(f"{moment:.1f}" for moment in moments)
            found = ["it had ended" if k is None else f"{k[0]}{' (writing)' * k[1]}" for k in kills]
            aimed = ", at the next write" * writing
            print(f"killed after {times} s{aimed}; went on at step {', '.join(found)}; equal: {same}", flush=True)
        hit = [k for k in all_kills if k]
        print(f"{len(hit)} kills of {len(all_kills)} hit a run, {sum(k[1] for k in hit)} within a write")
    return all(equal) and len(hit) == len(all_kills)


def read_steps(folder):
    return torch.load(folder / "a.pt", weights_only=True)["step"]


if __name__ == "__main__":
    if len(sys.argv) > 1:
        train(Path(sys.argv[1]))
    else:
        sys.exit(not main())
