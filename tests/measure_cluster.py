"""Share a toy benchmark out over an imitated SLURM: python tests/measure_cluster.py

Stand-ins for sbatch, sacct and the other commands that Snakemake's SLURM plug-in calls run each job script here, two at
a time, and refuse what is not in `OFFERED`. The Snakefile and its SLURM profile are those of the project; the notebooks
are toys: one benchmark of eight jobs in four parts, one other. Shown: the jobs that are submitted and with what options;
a part that fails; Snakemake interrupted, and killed, halfway and called again. No job that has a result is computed
again. Exit status 1 if anything differs; nine minutes on a busy machine with two cores.

What an imitation can't show: limits of time and memory, other machines and the file system between them, GPUs, accounts.
"""

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
OFFERED = {"account": "lab", "partition": "cpu"}
SLOTS = 2  # jobs that run at once
N_JOBS, PARTS = 8, 4
COMMANDS = ("sbatch", "srun", "sacct", "sacctmgr", "scancel", "sinfo", "scontrol", "squeue", "sshare")

# What scbert.runner.run does with its jobs: one file a result, and the end of a part.
BENCHMARK = """
import os, sys, time
from pathlib import Path
from scbert import paths

def run(jobs, run):
    part, n_parts = paths.find_part() or (1, 1)
    share = jobs[part - 1 :: n_parts]
    due = [job for job in share if not run.path(f"jobs/{job}.json").exists()]
    for job in due:
        if os.environ.get("TOY_FAILS") == job:
            raise ValueError(f"{job} cannot be computed")
        time.sleep(float(os.environ.get("TOY_SECONDS", 0.1)))
        paths.write_text(run.path(f"jobs/{job}.json"), "1")
        with open("computed.txt", "a") as file:
            print(job, os.environ.get("SLURM_JOB_ID"), file=file)
    if paths.find_part():
        raise paths.PartDone(f"part {part}/{n_parts} is done: {len(share)} jobs, {len(due)} computed")
"""
PARAMETERS = 'profile: str = "demo"  # the profile\nseed: int = 0  # the seed'
START = 'from scbert.run.record import Run\nrun = Run("{name}", globals())'
RUN_JOBS = f'import toy_benchmark as benchmark\nbenchmark.run([f"job{{i}}" for i in range({N_JOBS})], run)'
COUNT = 'run.note_metric("toy/jobs/n", n := len(list(run.path("jobs").glob("*.json"))), n, n, n)'


# The imitated SLURM: each function is one of its commands.


def sbatch(words):
    """Take a job, as far as this cluster offers what it asks for, and print its number."""
    parser = argparse.ArgumentParser(allow_abbrev=False)
    for option in ("--job-name", "--output", "--export", "--comment", "--mem", "--ntasks", "--cpus-per-task", "--wrap"):
        parser.add_argument(option, required=True)
    for option in ("-A", "-p", "-t", "-D"):
        parser.add_argument(option, required=True)
    parser.add_argument("--parsable", action="store_true", required=True)
    asked = vars(parser.parse_args(words))  # another option is an error
    if (asked["A"], asked["p"]) != (OFFERED["account"], OFFERED["partition"]):
        sys.exit(f"sbatch: error: Batch job submission failed: Invalid account or partition {asked['A']} {asked['p']}")
    number = 1000
    while True:
        folder = cluster() / str(number)
        try:
            folder.mkdir()
            break
        except FileExistsError:
            number += 1
    (folder / "asked.json").write_text(json.dumps(asked))
    set_state(folder, "PENDING")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")} | {
        "SLURM_JOB_ID": str(number), "SLURM_JOBID": str(number), "SLURM_JOB_NAME": asked["job_name"],
        "SLURM_NTASKS": asked["ntasks"], "SLURM_CPUS_PER_TASK": asked["cpus_per_task"], "SLURM_JOB_NUM_NODES": "1",
        "SLURM_MEM_PER_NODE": asked["mem"], "SLURM_SUBMIT_DIR": asked["D"], "SLURM_PROCID": "0",
    }  # fmt: skip
    subprocess.Popen(
        [sys.executable, __file__, "job", str(folder)], env=environment, cwd=asked["D"], start_new_session=True,
        stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    print(number)


def job(words):
    """Wait for a slot and run the script of a job, with its output in the log; what slurmd does."""
    folder = Path(words[0])
    asked = json.loads((folder / "asked.json").read_text())
    while not take_slot(folder):
        time.sleep(0.1)
    if get_state(folder) == "PENDING":  # or cancelled meanwhile
        set_state(folder, "RUNNING")
        run_script(folder, asked)
    shutil.rmtree(next(slot for slot in cluster().glob("slot*") if (slot / folder.name).exists()))


def run_script(folder, asked):
    log = Path(asked["output"].replace("%j", folder.name))
    with log.open("w") as file:
        child = subprocess.Popen(["sh", "-c", asked["wrap"]], stdout=file, stderr=file, start_new_session=True)
    (folder / "pid").write_text(str(child.pid))
    if get_state(folder) == "CANCELLED":  # before scancel could know the process
        os.killpg(child.pid, signal.SIGTERM)
    status = child.wait()
    if get_state(folder) != "CANCELLED":
        set_state(folder, "FAILED" if status else "COMPLETED")


def take_slot(folder):
    for i in range(SLOTS):
        try:
            (cluster() / f"slot{i}").mkdir()
        except FileExistsError:
            continue
        (cluster() / f"slot{i}" / folder.name).touch()
        return True
    return False


def srun(words):
    """Run a step of a job: the words after the options, once."""
    command = next(i for i, word in enumerate(words) if not word.startswith("-"))
    step = {"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}
    os.execvpe(words[command], words[command:], os.environ | step)


def sacct(words):
    """Print number and state of the jobs of a name; nothing on why a step failed."""
    if "--name" in words:
        print_states(words[words.index("--name") + 1])


def squeue(words):
    print_states(words[words.index("--name") + 1])


def print_states(name):
    for folder in list_jobs():
        if json.loads((folder / "asked.json").read_text())["job_name"] == name:
            print(f"{folder.name}|{get_state(folder)}")


def scancel(words):
    """End jobs: SIGTERM to all processes of each."""
    for folder in (cluster() / word for word in words if word.isdigit()):
        if get_state(folder) in ("PENDING", "RUNNING"):
            set_state(folder, "CANCELLED")
            if (folder / "pid").exists():
                os.killpg(int((folder / "pid").read_text()), signal.SIGTERM)


def sacctmgr(words):
    print(OFFERED["account"])


sshare = sacctmgr


def sinfo(words):
    print(f"PARTITION\n{OFFERED['partition']}*")


def scontrol(words):
    print("MaxArraySize            = 1001\nMinJobAge               = 300 sec")


def cluster():
    return Path(os.environ["TOY_CLUSTER"])


def list_jobs():
    return sorted(folder for folder in cluster().iterdir() if folder.name.isdigit() and (folder / "state").exists())


def get_state(folder):
    return (folder / "state").read_text()


def set_state(folder, state):
    temporary = folder / f"state.{os.getpid()}"
    temporary.write_text(state)
    temporary.replace(folder / "state")


# The toy project, and what is done with it.


def make_project(folder):
    """Write the project's Snakefile and SLURM profile, as a user would set it, beside two toy notebooks."""
    import nbformat

    profiles = folder / "notebooks" / "profiles"
    (profiles / "slurm").mkdir(parents=True)
    for name in ("Snakefile", "pyproject.toml"):
        shutil.copy(ROOT / name, folder)
    # The package runs the notebooks of the clone that it lies in.
    shutil.copytree(ROOT / "scbert", folder / "scbert", ignore=shutil.ignore_patterns("__pycache__"))
    text = (ROOT / "notebooks" / "profiles" / "slurm" / "config.yaml").read_text()
    for name, value in OFFERED.items():
        text = text.replace(f"slurm_{name}: change-me", f"slurm_{name}: {value}")
    (profiles / "slurm" / "config.yaml").write_text(text)
    (profiles / "small.yaml").write_text("01_other: {}\n04_benchmark: {seed: 3}\n")
    (profiles / "needs.yaml").write_text("small:\n  04_benchmark: {minutes: 90, memory_gb: 0.3}\n")
    (folder / "toy_benchmark.py").write_text(BENCHMARK)
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    for name, body in (("01_other", []), ("04_benchmark", [RUN_JOBS, COUNT])):
        sources = [START.format(name=name), *body, "run.finish()"]
        cells = [nbformat.v4.new_code_cell(PARAMETERS, metadata={"tags": ["parameters"]})]
        cells += [nbformat.v4.new_code_cell(source) for source in sources]
        nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=kernel), folder / "notebooks" / f"{name}.ipynb")
    commands = folder / "bin"
    commands.mkdir()
    for name in COMMANDS:
        (commands / name).write_text(f'#!/bin/sh\nexec {sys.executable} {__file__} {name} "$@"\n')
        (commands / name).chmod(0o755)
    (folder / "cluster").mkdir()


def start(folder, **toy):
    """Call Snakemake as on a login node, with its words in snakemake.log."""
    paths = [folder / "bin", Path(sys.executable).parent, os.environ["PATH"]]
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "SCBERT_"))} | {
        "PATH": ":".join(map(str, paths)), "TOY_CLUSTER": str(folder / "cluster"), "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(folder),
    }  # fmt: skip
    command = [sys.executable, "-m", "snakemake", "--workflow-profile", "notebooks/profiles/slurm"]
    command += ["--slurm-init-seconds-before-status-checks", "2", "--config", "profile=small", f"parts={PARTS}"]
    with (folder / "snakemake.log").open("w") as file:
        return subprocess.Popen(
            command, cwd=folder, env=environment | toy, stdout=file, stderr=file, start_new_session=True
        )


def wait_for(condition, seconds=180):
    """Wait until something holds; a RuntimeError if it takes too long."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            raise RuntimeError("This takes too long.")
        time.sleep(0.1)


def list_computed(folder):
    file = folder / "computed.txt"
    return [line.split()[0] for line in file.read_text().splitlines()] if file.exists() else []


def read_asked(folder):
    """Return what each job that was submitted so far asked for, in their order."""
    return [json.loads((path / "asked.json").read_text()) for path in sorted((folder / "cluster").glob("[0-9]*"))]


def list_states(folder):
    return [get_state(path) for path in sorted((folder / "cluster").glob("[0-9]*"))]


def find_record(folder):
    return folder / "runs" / "small" / "04_benchmark" / "record.json"


failures = []


def expect(what, holds):
    print(f"{'ok  ' if holds else 'FAIL'} {what}", flush=True)
    if not holds:
        failures.append(what)


def show_whole_run(folder):
    """Four parts are four jobs, and the notebook is submitted after them."""
    expect("Snakemake ends well", start(folder).wait() == 0)
    asked = read_asked(folder)
    comments = [entry["comment"] for entry in asked]
    parts = [f"rule_part_wildcards_04_benchmark_{i + 1}" for i in range(PARTS)]
    expect(f"{PARTS} parts and two notebooks are six jobs: {', '.join(comments)}",
           sorted(comments) == sorted([*parts, "rule_notebook_wildcards_01_other", "rule_notebook_wildcards_04_benchmark"]))  # fmt: skip
    expect("the benchmark's notebook is the last", comments[-1] == "rule_notebook_wildcards_04_benchmark")
    for entry in asked:
        print(f"     {entry['comment']}: -t {entry['t']} --mem {entry['mem']} --cpus-per-task {entry['cpus_per_task']}")
    expect("each job is computed once", sorted(list_computed(folder)) == [f"job{i}" for i in range(N_JOBS)])
    numbers = [line.split()[1] for line in (folder / "computed.txt").read_text().splitlines()]
    expect(f"by {PARTS} jobs of the cluster", len(set(numbers)) == PARTS)
    found = json.loads(find_record(folder).read_text())
    expect("the record counts all of them, with the profile's seed",
           (found["metrics"]["toy/jobs/n"]["value"], found["seed"]) == (N_JOBS, 3))  # fmt: skip
    text = (find_record(folder).parent / "parts" / f"2of{PARTS}.done").read_text()
    expect(f"a part says: {text.strip()}", text == f"part 2/{PARTS} is done: 2 jobs, 2 computed\n")
    expect("called again, nothing is submitted", start(folder).wait() == 0 and len(read_asked(folder)) == len(asked))


def show_failure(folder):
    """A part that fails ends Snakemake with the path of its log; called again, only what lacks is computed."""
    expect("a part that fails makes Snakemake fail", start(folder, TOY_FAILS="job5").wait() == 1)
    text = (folder / "snakemake.log").read_text()
    logs = re.findall(r"\S+/rule_part/04_benchmark_2/\d+\.log", text)
    log = Path(logs[-1]) if logs else folder / "none"
    expect(f"its log is named: {log.relative_to(folder)}", log.is_file())
    expect("and says why", "04_benchmark stopped at cell 4: ValueError: job5 cannot be computed" in log.read_text())
    expect("the other parts are done, there is no record",
           len(list_computed(folder)) == N_JOBS - 1 and not find_record(folder).exists())  # fmt: skip
    before = len(read_asked(folder))
    expect("called again, it ends well", start(folder).wait() == 0 and find_record(folder).exists())
    expect("with one part and the notebook submitted", len(read_asked(folder)) == before + 2)
    expect("and only what lacked was computed", sorted(list_computed(folder)) == [f"job{i}" for i in range(N_JOBS)])


def show_stop(folder, sign):
    """Snakemake ends halfway, by Ctrl-C or SIGKILL; called again, it goes on."""
    child = start(folder, TOY_SECONDS="4")
    wait_for(lambda: len(list_computed(folder)) >= 2)
    os.killpg(child.pid, sign)
    expect(f"{sign.name}: Snakemake is gone", child.wait() != 0 and not find_record(folder).exists())
    if sign == signal.SIGINT:
        states = list_states(folder)
        expect(f"its jobs are cancelled: {', '.join(states)}", not {"PENDING", "RUNNING"} & set(states))
    else:
        print(f"     the cluster goes on with: {', '.join(list_states(folder))}")
    kept = list_computed(folder)
    submitted = len(read_asked(folder))
    expect("called again, it ends well", start(folder).wait() == 0 and find_record(folder).exists())
    comments = [entry["comment"].replace("wildcards_", "") for entry in read_asked(folder)[submitted:]]
    computed = list_computed(folder)
    twice = sorted({job for job in computed if computed.count(job) > 1})
    print(
        f"     {len(kept)} jobs were there, {len(computed) - len(kept)} computed later; submitted: {', '.join(comments)}"
    )
    print(f"     computed twice, by a part that went on and its successor: {', '.join(twice) or 'none'}")
    expect("what was there is not computed again", not set(twice) & set(kept))
    if sign == signal.SIGINT:
        expect("and nothing twice", not twice)


def main():
    began = time.monotonic()
    signal.signal(
        signal.SIGINT, signal.default_int_handler
    )  # ignored, and by all that is started, where this runs by `&`
    show = {"whole": show_whole_run, "failure": show_failure, "interrupt": lambda folder: show_stop(folder, signal.SIGINT),
            "kill": lambda folder: show_stop(folder, signal.SIGKILL)}  # fmt: skip
    for name in sys.argv[1:] or show:
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
            make_project(Path(folder))
            begun = time.monotonic()
            try:
                show[name](Path(folder))
            except Exception:
                print((Path(folder) / "snakemake.log").read_text(), file=sys.stderr)
                raise
            print(f"     {name}: {time.monotonic() - begun:.0f} s", flush=True)
    print(f"{len(failures)} failures, {time.monotonic() - began:.0f} s")
    sys.exit(bool(failures))


if __name__ == "__main__":
    if len(sys.argv) > 1 and sys.argv[1] in (*COMMANDS, "job"):
        globals()[sys.argv[1]](sys.argv[2:])
    else:
        main()
