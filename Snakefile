# One job a notebook, in a profile: `make reproduce`, or by hand
#   snakemake --cores 2 --config profile=small
#   snakemake --workflow-profile notebooks/profiles/slurm --config profile=paper threads=8
# parts=8 shares the jobs of each benchmark out over eight processes, or jobs of the cluster.
# devices="8 bf16-mixed" nodes=2 give notebook 02 so many GPUs on each of so many machines, in place of its section's.
# A job runs again when its notebook, the package, its bands or its section of the profile changed.

import os
from glob import glob
from pathlib import Path

import yaml
from snakemake.exceptions import WorkflowError

SCOREBOARD = "11_scoreboard"
PROFILE = config.get("profile", "demo")
RUNS = os.environ.get("SCBERT_RUNS", "runs")  # as scbert.record does
THREADS = int(config.get("threads", 1))  # of each process
ANYWAY = "--anyway" if config.get("anyway") else ""  # run where memory, disk or a download is short
PRETRAINS = "02_pretrain"  # the notebook that trains on several devices
PARTED = ("04_benchmark", "05_cross_dataset", "06_batch_effect", "07_novel_cell_types")  # those whose jobs can be shared out: `scbert run 04 --part 2/8`
NOTEBOOKS = sorted(path.stem for path in Path("notebooks").glob("[0-9][0-9]_*.ipynb"))

# The demo profile is the defaults of the notebooks. The others hold a section for each notebook that has them.
if PROFILE == "demo":
    sections = {name: {} for name in NOTEBOOKS}
else:
    file = Path("notebooks/profiles", f"{PROFILE}.yaml")
    if not file.exists():
        raise WorkflowError(f"There is no profile {PROFILE}: choose demo, small, large or paper.")
    sections = yaml.safe_load(file.read_text()) or {}
    unknown = sorted(set(sections) - set(NOTEBOOKS))
    if unknown:
        raise WorkflowError(f"{file} has sections for notebooks that do not exist: {', '.join(unknown)}.")
    if not sections:
        raise WorkflowError(f"No notebook has a {PROFILE} profile yet: {file} is empty.")


# Of each machine; a precision may stand behind, as in the notebook's parameter.
devices = str(config.get("devices", (sections.get(PRETRAINS) or {}).get("devices", "1")))
try:
    DEVICES, NODES = int(devices.split()[0]), int(config.get("nodes", 1))
except (IndexError, ValueError):
    raise WorkflowError(f"devices must be a number, and may name a precision (8 bf16-mixed), not {devices!r}.")
if min(DEVICES, NODES) < 1:
    raise WorkflowError(f"devices and nodes must be at least 1, not {DEVICES} and {NODES}.")
if NODES == 1:  # what this process starts ends with it, however it ends; on another machine nobody can see it
    shell.prefix(f"export SCBERT_WATCH={os.getpid()}; ")
if {"devices", "nodes"} & set(config) and PRETRAINS not in sections:
    raise WorkflowError(f"devices and nodes are for {PRETRAINS}, which has no {PROFILE} profile: leave them out.")

try:
    PARTS = int(config.get("parts", 1))
except ValueError:
    PARTS = 0
if PARTS < 1:
    raise WorkflowError(f"parts must be a number of at least 1, not {config['parts']!r}.")
parted = [name for name in PARTED if name in sections and PARTS > 1]
if PARTS > 1 and not parted:
    raise WorkflowError(f"parts are for {' and '.join(PARTED)}, which have no {PROFILE} profile: leave them out.")

needs = yaml.safe_load(Path("notebooks/profiles/needs.yaml").read_text()).get(PROFILE) or {}


def need(name, what, otherwise):
    return (needs.get(name) or {}).get(what, otherwise)


def need_minutes(name):
    """A third to spare; of a benchmark in parts it is that of each: the notebook finds their results."""
    return int(need(name, "minutes", 60) * 4 / 3 / (PARTS if name in parted else 1)) + 10


def need_memory(name):
    """In MB, with a third to spare; each device's process holds the cells."""
    return int(need(name, "memory_gb", 4) * 4000 / 3) * (DEVICES if name == PRETRAINS else 1)


def command(name):
    """One process a notebook, which starts one for each of several GPUs itself; on several machines srun does."""
    if name != PRETRAINS:
        return f"scbert run {name}"
    chosen = f" -p devices '{devices}'" if "devices" in config else ""
    if NODES == 1:
        return f"scbert run {name}{chosen}"
    # srun does not take over the processor cores of its job, and would wait for the others where one fails.
    srun = f"srun --nodes {NODES} --ntasks-per-node {DEVICES} --cpus-per-task {THREADS} --kill-on-bad-exit=1"
    return f"{srun} scbert run {name}{chosen}"


def on_devices(one_machine=None, machines=None, otherwise=None):
    """A resource of the notebook that trains on several devices of one machine, or of several, and of all others.

    One that is None is left out. The SLURM plug-in reads these as: gpu, of the job; gres, of each machine; tasks, of the
    job, but for each GPU if tasks_per_gpu does not say otherwise; mpi, that the command starts its processes by srun
    itself, which the plug-in would do once more.
    """

    def choose(wildcards):
        if wildcards.name != PRETRAINS or DEVICES * NODES == 1:
            return otherwise(wildcards.name) if callable(otherwise) else otherwise
        return one_machine if NODES == 1 else machines

    return choose


def record(name):
    return f"{RUNS}/{PROFILE}/{name}/record.json"


def done(name, part):
    return f"{RUNS}/{PROFILE}/{name}/parts/{part}of{PARTS}.done"


# The package, with the encoder that comes with it.
PACKAGE = sorted(
    file
    for kind in ("*.py", "*.yaml", "*.csv", "*.csv.gz", "encoders/*/*")
    for file in glob(f"scbert/**/{kind}", recursive=True)
)


measured = [record(name) for name in sections if name != SCOREBOARD]


rule all:
    input:
        [record(name) for name in sections],


# Only the record is an output: Snakemake deletes the outputs of a failed job, and the notebook shows why it failed.
rule notebook:
    input:
        notebook="notebooks/{name}.ipynb",
        package=PACKAGE,
        bands=lambda wildcards: glob(f"tests/expected/{wildcards.name}.json"),
        parts=lambda wildcards: [done(wildcards.name, part + 1) for part in range(PARTS) if wildcards.name in parted],
        # The scoreboard holds what all the others measured against the paper's numbers.
        others=lambda wildcards: measured + glob("tests/expected/paper.csv") if wildcards.name == SCOREBOARD else [],
    output:
        update(record("{name}")),  # that of the run before stays until the new one is there
    params:
        section=lambda wildcards: sections[wildcards.name],
        command=lambda wildcards: command(wildcards.name),
    # Read by executors of clusters: what the notebook needs.
    resources:
        runtime=lambda wildcards: need_minutes(wildcards.name),
        mem_mb=lambda wildcards: need_memory(wildcards.name),
        gpu=on_devices(DEVICES, None, lambda name: int(need(name, "gpu_memory_gb", 0) > 0) or None),
        gres=on_devices(None, f"gpu:{DEVICES}"),
        nodes=on_devices(1, NODES),
        tasks=on_devices(None, DEVICES * NODES),
        tasks_per_gpu=on_devices(None, 0),
        cpus_per_task=on_devices(DEVICES * THREADS),
        mpi=on_devices(None, "srun"),
    wildcard_constraints:
        name="|".join(sections),
    # Snakemake sets OMP_NUM_THREADS and its like to this.
    threads: THREADS
    shell:
        "echo {wildcards.name}; {params.command} --profile {PROFILE} {ANYWAY}"


if parted:

    # A share of a benchmark's jobs. Each result is a file as soon as it is there: a part that was killed loses one job.
    rule part:
        input:
            notebook="notebooks/{name}.ipynb",
            package=PACKAGE,
            bands=lambda wildcards: glob(f"tests/expected/{wildcards.name}.json"),
        output:
            done("{name}", "{part}"),
        params:
            section=lambda wildcards: sections[wildcards.name],
        resources:
            runtime=lambda wildcards: need_minutes(wildcards.name),
            mem_mb=lambda wildcards: need_memory(wildcards.name),
            gpu=lambda wildcards: int(need(wildcards.name, "gpu_memory_gb", 0) > 0) or None,
        wildcard_constraints:
            name="|".join(parted),
            part="[0-9]+",
        threads: THREADS
        shell:
            "echo {wildcards.name}, part {wildcards.part} of {PARTS}; "
            "scbert run {wildcards.name} --part {wildcards.part}/{PARTS} --profile {PROFILE} {ANYWAY}"
