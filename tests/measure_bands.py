"""Measure the bands of tests/expected/*.json: python tests/measure_bands.py [notebook ...]

Runs each notebook over ten seeds in the demo profile, and once as a control that has nothing to learn. A band
is the mean over seeds, plus or minus four standard deviations; the control must lie outside.
About half an hour on two cores.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parent.parent
SEEDS = range(10)
# notebook -> metrics held to a band, and its control: the change of parameters or source that leaves nothing to learn
METRICS = {
    "00_quickstart": ["scbert_scratch/accuracy"],
    "02_pretrain": ["scbert/masked_accuracy_minus_cell_tokens", "scbert/predicted_mode_share"],
    "03_finetune_and_annotate": ["scbert/accuracy_minus_majority"]
    + [f"{method}/accuracy" for method in ("scbert", "scbert_scratch", "head_on_tokens", "head_on_random_encoder")],
    "04_benchmark": ["scbert/accuracy_minus_majority", "scbert/accuracy", "scbert_scratch/accuracy"],
    "05_cross_dataset": [
        f":leave_one_study_out/{metric}"
        for metric in ("scbert/accuracy_minus_majority", "scbert/accuracy", "scbert_scratch/accuracy")
    ],
    "06_batch_effect": [f":{level}/scbert/accuracy" for level in ("none:0", "depth:1")],
    "07_novel_cell_types": [":held_out:together/scbert/known_accuracy_all"],
    # Of deletion no band could tell a model of shuffled labels: deleting a gene that it attends to changes its mind too.
    "08_interpretability": ["scbert:attention/insertion_area_minus_random"],
}
# Left out of these runs, since no band depends on it; a band holds whatever they are.
WITHOUT = {
    "04_benchmark": {"references": "", "imbalance": "", "n_repeats": "1"},
    "06_batch_effect": {"effects": "depth"},
    "07_novel_cell_types": {"alone": ""},
}
LOAD = "adata = scbert.datasets.load(dataset, label_key=label_key, batch_key=batch_key or None)"
LOAD_ALONE = "adata = scbert.datasets.load(dataset, label_key=label_key)"
SHUFFLE_ALONE = (
    f"{LOAD_ALONE}\nadata.obs[label_key] = adata.obs[label_key].sample(frac=1, random_state=seed).to_numpy()"
)
SHUFFLE = f"{LOAD}\nadata.obs[label_key] = adata.obs[label_key].sample(frac=1, random_state=seed).to_numpy()"
LOAD_EXPERIMENTS = "    run.note_data(experiment.name, experiment.cells)"
SHUFFLE_EXPERIMENTS = (
    f"{LOAD_EXPERIMENTS}\n    obs = experiment.cells.obs\n"
    "    obs[label_key] = obs[label_key].sample(frac=1, random_state=seed).to_numpy()"
)
CONTROLS = {
    "00_quickstart": ("labels shuffled", LOAD, SHUFFLE),
    "02_pretrain": ("learning rate 0", "learning_rate: float = 0.003", "learning_rate: float = 0.0"),
    "03_finetune_and_annotate": ("labels shuffled", LOAD, SHUFFLE),
    "04_benchmark": ("labels shuffled", LOAD, SHUFFLE),
    "05_cross_dataset": ("labels shuffled", LOAD_EXPERIMENTS, SHUFFLE_EXPERIMENTS),
    "06_batch_effect": ("labels shuffled", LOAD_ALONE, SHUFFLE_ALONE),
    "07_novel_cell_types": ("labels shuffled", LOAD_EXPERIMENTS, SHUFFLE_EXPERIMENTS),
    "08_interpretability": ("labels shuffled", LOAD_ALONE, SHUFFLE_ALONE),
}


def run(source, seed, folder):
    """Run a notebook once, on one core; return its metrics, which a failed check does not take away."""
    environment = os.environ | {"SCBERT_RUNS": str(folder), "SCBERT_BANDS": "off", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "scbert", "run", str(source), "-p", "seed", str(seed)]
    for name, value in WITHOUT.get(source.stem, {}).items():
        command += ["-p", name, value]
    subprocess.run(command, env=environment, check=True, cwd=ROOT, stdout=subprocess.DEVNULL)
    return json.loads((folder / "demo" / source.stem / "record.json").read_text())["metrics"]


def measure(notebook):
    """Return what goes into tests/expected/<notebook>.json."""
    source = ROOT / "notebooks" / f"{notebook}.ipynb"
    what, old, new = CONTROLS[notebook]
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(2) as pool:
        folder = Path(folder)
        text = json.loads(source.read_text())
        for cell in text["cells"]:
            cell["source"] = "".join(cell["source"])
        assert any(old in cell["source"] for cell in text["cells"]), (
            f"{notebook} has no {old!r} for its control to replace"
        )
        for cell in text["cells"]:
            cell["source"] = cell["source"].replace(old, new)
        control = folder / "control" / source.name
        control.parent.mkdir()
        control.write_text(json.dumps(text))
        jobs = [pool.submit(run, source, seed, folder / str(seed)) for seed in SEEDS]
        jobs.append(pool.submit(run, control, 0, folder / "control"))
        *runs, without = [job.result() for job in jobs]
    metrics = {}
    for name in (
        "pbmc68k_reduced" + metric if metric[0] == ":" else f"pbmc68k_reduced/{metric}" for metric in METRICS[notebook]
    ):
        values = [metrics_of_run[name]["value"] for metrics_of_run in runs]
        metrics[name] = {
            "value": round(statistics.mean(values), 4),
            "tolerance": round(4 * statistics.stdev(values), 4),
            "seeds": [round(value, 4) for value in values],
            "control": {what: round(without[name]["value"], 4)},
        }
    # The band holds for the notebook's own parameters, whatever the seed.
    from scbert.run.notebooks import read_parameters

    kinds = {"int": int, "float": float, "str": lambda text: text.strip("\"'"), "bool": lambda text: text == "True"}
    parameters = {name: kinds[kind](default) for name, (kind, default, _) in read_parameters(source).items()}
    for free in ("seed", "unassigned_below", *WITHOUT.get(notebook, {})):
        parameters.pop(free, None)
    return {
        "measured": "mean of ten seeds, plus or minus four standard deviations",
        "parameters": parameters,
        "metrics": metrics,
    }


if __name__ == "__main__":
    for notebook in sys.argv[1:] or METRICS:
        expected = measure(notebook)
        (ROOT / "tests" / "expected" / f"{notebook}.json").write_text(json.dumps(expected, indent=1) + "\n")
        print(notebook, {name: (band["value"], band["tolerance"]) for name, band in expected["metrics"].items()})
