# One job a notebook, in a profile: `make reproduce`, or by hand
#   snakemake --cores 2 --config profile=small
#   snakemake --workflow-profile notebooks/profiles/slurm --config profile=paper threads=8
# devices=N nodes=M give notebook 02 so many GPUs on so many machines; with several machines srun starts a process each.
# A job runs again when its notebook, the package, its bands or its section of the profile changed.

import os
from glob import glob
from pathlib import Path

import yaml
from snakemake.exceptions import WorkflowError

SCOREBOARD = "11_scoreboard"
PROFILE = config.get("profile", "demo")
RUNS = os.environ.get("SCBERT_RUNS", "runs")  # as scbert.record does
ANYWAY = "--anyway" if config.get("anyway") else ""  # run where memory, disk or a download is short
DEVICES, NODES = int(config.get("devices", 1)), int(config.get("nodes", 1))
PRETRAINS = "02_pretrain"  # the notebook that trains on several devices
NOTEBOOKS = sorted(path.stem for path in Path("notebooks").glob("[0-9][0-9]_*.ipynb"))

# The demo profile is the defaults of the notebooks. The others hold a section for each notebook that has them.
if PROFILE == "demo":
    sections = {name: {} for name in NOTEBOOKS}
else:
    file = Path("notebooks/profiles", f"{PROFILE}.yaml")
    if not file.exists():
        raise WorkflowError(f"There is no profile {PROFILE}: choose demo, small or paper.")
    sections = yaml.safe_load(file.read_text()) or {}
    unknown = sorted(set(sections) - set(NOTEBOOKS))
    if unknown:
        raise WorkflowError(f"{file} has sections for notebooks that do not exist: {', '.join(unknown)}.")
    if not sections:
        raise WorkflowError(f"No notebook has a {PROFILE} profile yet: {file} is empty.")


needs = yaml.safe_load(Path("notebooks/profiles/needs.yaml").read_text()).get(PROFILE) or {}


def need(name, what, otherwise):
    return (needs.get(name) or {}).get(what, otherwise)


def command(name):
    """One process a notebook, which starts one for each of several GPUs itself; on several machines srun does."""
    if name != PRETRAINS or DEVICES * NODES == 1:
        return f"scbert run {name}"
    if NODES == 1:
        return f"scbert run {name} -p devices {DEVICES}"
    return f"srun --nodes {NODES} --ntasks-per-node {DEVICES} scbert run {name} -p devices {DEVICES}"


def record(name):
    return f"{RUNS}/{PROFILE}/{name}/record.json"


measured = [record(name) for name in sections if name != SCOREBOARD]


rule all:
    input:
        [record(name) for name in sections],


# Only the record is an output: Snakemake deletes the outputs of a failed job, and the notebook shows why it failed.
rule notebook:
    input:
        notebook="notebooks/{name}.ipynb",
        package=[file for part in ("*.py", "*.yaml", "labels/*", "splits/*") for file in glob(f"scbert/{part}")],
        bands=lambda wildcards: glob(f"tests/expected/{wildcards.name}.json"),
        # The scoreboard holds what all the others measured against the paper's numbers.
        others=lambda wildcards: measured + glob("tests/expected/paper.csv") if wildcards.name == SCOREBOARD else [],
    output:
        record("{name}"),
    params:
        section=lambda wildcards: sections[wildcards.name],
        command=lambda wildcards: command(wildcards.name),
    # Read by executors of clusters: what the notebook needs, with a third to spare.
    resources:
        runtime=lambda wildcards: int(need(wildcards.name, "minutes", 60) * 4 / 3) + 10,
        mem_mb=lambda wildcards: int(need(wildcards.name, "memory_gb", 4) * 4000 / 3),
        nodes=lambda wildcards: NODES if wildcards.name == PRETRAINS else 1,
        tasks=lambda wildcards: DEVICES * NODES if wildcards.name == PRETRAINS and NODES > 1 else 1,
        gpu=lambda wildcards: (
            DEVICES
            if wildcards.name == PRETRAINS and DEVICES * NODES > 1
            else int(need(wildcards.name, "gpu_memory_gb", 0) > 0)
        ),
        # The SLURM plug-in otherwise wraps a job into a srun of its own, in which ours could not start.
        **({"mpi": "srun"} if NODES > 1 else {}),
    wildcard_constraints:
        name="|".join(sections),
    # Snakemake sets OMP_NUM_THREADS and its like to this.
    threads: int(config.get("threads", 1))
    shell:
        "echo {wildcards.name}; {params.command} --profile {PROFILE} {ANYWAY}"
