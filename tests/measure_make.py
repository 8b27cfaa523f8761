"""How long a newcomer waits: `make reproduce`, `make test` and first sight, of two clones in turns.

    python tests/measure_make.py test ../before .           # or: first-sight --pairs 5
    python tests/measure_make.py reproduce ../before . --pairs 1 --neighbours 2

The first root is the one to compare with; each has its .venv with the extras installed (`make` does that once, before
the clock runs). Every turn starts from an empty folder of runs. `--neighbours 2` runs two processes that compute all the
time beside it. `first-sight` is scbert --help, import scbert (both in seconds of the processor), and notebook 00 from
its start to its first picture. `--only 01 05` runs these notebooks in place of all, and of `test` the files of these
names (tokens, train). A row a turn is printed, then the medians and how many times faster the second root is, the median
over pairs.
"""

import argparse
import contextlib
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

FIRST_PICTURE = """import json, time
start = time.monotonic()
for cell in json.load(open("notebooks/00_quickstart.ipynb"))["cells"]:
    if cell["cell_type"] == "code":
        exec("".join(cell["source"]), globals())
        if "save_figure" in "".join(cell["source"]):
            break
print("seconds", time.monotonic() - start)
"""


@contextlib.contextmanager
def beside(n):
    """Keep `n` processes busy meanwhile."""
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(n)]
    try:
        yield
    finally:
        for process in busy:
            process.kill()
            process.wait()


def run(root, command, **environment):
    """Run a command in a clone; return its seconds, of the clock and of the processor, and what it printed."""
    start, before = time.monotonic(), resource.getrusage(resource.RUSAGE_CHILDREN)
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    kept |= {"PATH": f"{root / '.venv/bin'}:{os.environ['PATH']}"} | environment
    done = subprocess.run(command, cwd=root, env=kept, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(map(str, command))} failed in {root}:\n{done.stdout[-3000:]}")
    used, after = time.monotonic() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    return used, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, done.stdout


def find(root, pattern, only):
    found = [path for name in only for path in sorted(root.glob(pattern.format(name)))]
    if only and not found:
        sys.exit(f"{root} has no {' or '.join(map(pattern.format, only))}.")
    return found


def time_reproduce(root, only, folder):
    targets = [f"{folder}/demo/{path.stem}/record.json" for path in find(root, "notebooks/{}_*.ipynb", only)]
    if targets:  # what `make reproduce` calls, for these alone: two at once, one thread each, in both roots
        command = ["snakemake", *targets, "--cores", "2", "--nolock", "--quiet", "all", "--config", "threads=1"]
    else:
        command = ["make", "reproduce", "ANYWAY=1"]
    used, cpu, _ = run(root, command, SCBERT_RUNS=folder)
    return {"seconds": used, "of the processor": cpu}


def time_test(root, only, folder):
    tests = find(root, "tests/test_{}*.py", only)
    command = ["python", "-m", "pytest", "-q", *tests] if tests else ["make", "test"]
    used, cpu, _ = run(root, command)
    return {"seconds": used, "of the processor": cpu}


def time_first_sight(root, only, folder):
    python = str(root / ".venv/bin/python")
    picture = run(root, [python, "-c", FIRST_PICTURE], MPLBACKEND="agg", SCBERT_RUNS=folder)[2]
    return {
        "scbert --help": run(root, [python, "-m", "scbert", "--help"])[1],
        "import scbert": run(root, [python, "-c", "import scbert"])[1],
        "first picture": float(picture.rsplit("seconds ", 1)[1]),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = {"reproduce": time_reproduce, "test": time_test, "first-sight": time_first_sight}
    parser.add_argument("what", choices=what)
    parser.add_argument("roots", nargs=2, type=lambda text: Path(text).resolve())
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--neighbours", type=int, default=0)
    parser.add_argument("--only", nargs="*", default=[])
    chosen = parser.parse_args()
    rows = []
    with beside(chosen.neighbours):
        for pair in range(chosen.pairs):
            order = chosen.roots if pair % 2 == 0 else chosen.roots[::-1]  # neither is always the first
            rows.append({})
            for root in order:
                with tempfile.TemporaryDirectory() as folder:
                    rows[-1][root] = what[chosen.what](root, chosen.only, folder)
                print(root.name, {name: round(value, 2) for name, value in rows[-1][root].items()}, flush=True)
    first, second = chosen.roots
    for name in rows[0][first]:
        medians = [statistics.median(row[root][name] for row in rows) for root in chosen.roots]
        faster = statistics.median(row[first][name] / row[second][name] for row in rows)
        print(f"{name}: {medians[0]:.2f} and {medians[1]:.2f}, {faster:.2f} times faster")


if __name__ == "__main__":
    main()
