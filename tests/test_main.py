"""The command line: parameters are checked before anything runs, and every bad input is one sentence."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import anndata
import filelock
import nbformat
import numpy as np
import pandas as pd
import pytest
from click.testing import CliRunner

import scbert
from scbert.__main__ import main
from scbert.run import annotated, notebooks

PARAMETERS = """
profile: str = "demo"  # the profile
n_epochs: int = 3  # passes over the cells
rate: float = 0.5  # how fast
dataset: str = "pbmc3k"  # which cells
use_labels: bool = True  # or not
label_key: str = "cell_type"  # which labels
seed: int = 0
"""
BODY = """
import json, pathlib
assert n_epochs != 13, "thirteen epochs bring bad luck"
pathlib.Path("seen.json").write_text(json.dumps([profile, n_epochs, rate, dataset, use_labels]))
"""


@pytest.fixture
def scbert_cli(clone, tmp_path, monkeypatch):
    """Run `scbert` with the given words in a folder with two small notebooks; return exit code and output."""
    (tmp_path / "notebooks" / "profiles").mkdir(parents=True)
    (tmp_path / "notebooks" / "profiles" / "small.yaml").write_text("03_test: {n_epochs: 7, rate: 1}\n")
    cells = [nbformat.v4.new_code_cell(PARAMETERS, metadata={"tags": ["parameters"]}), nbformat.v4.new_code_cell(BODY)]
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    for name in ("03_test", "04_other"):
        notebook = nbformat.v4.new_notebook(cells=cells, metadata=kernel)
        nbformat.write(notebook, tmp_path / "notebooks" / f"{name}.ipynb")
    monkeypatch.delenv("SCBERT_RUNS", raising=False)

    def run(*words):
        result = CliRunner().invoke(main, [str(word) for word in words])
        if result.exception and not isinstance(result.exception, SystemExit):
            raise result.exception  # a traceback is never an answer
        return result.exit_code, result.output

    return run


# scbert run


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["03", "-p", "n_epoch", "5"], "03_test has no parameter n_epoch. Did you mean n_epochs? Nothing was run."),
        (["03", "-p", "zzz", "5"], "03_test has no parameter zzz. It has: profile, n_epochs, rate,"),
        (["03", "-p", "dataset", "pbmc3"], "no data set of that name in the catalogue (pbmc3k, "),
        (["03", "-p", "n_epochs", "many"], "Parameter n_epochs must be of type int, not 'many'"),
        (["03", "-p", "n_epochs", "1.5"], "Parameter n_epochs must be of type int, not '1.5'"),
        (["03", "-p", "rate", "fast"], "Parameter rate must be of type float, not 'fast'"),
        (["03", "-p", "use_labels", "maybe"], "Parameter use_labels must be of type bool, not 'maybe'"),
        (["03", "-p", "profile", "small"], "The profile is chosen by --profile, not by -p"),
        (["07"], "No single notebook is called '07'. There are: 03_test, 04_other."),
        (["0"], "No single notebook is called '0'. There are: 03_test, 04_other."),
        (["03", "--profile", "paper"], "There is no profile 'paper'"),
        (["04", "--profile", "small"], "04_other has no small profile yet (small.yaml has no section for it)"),
        (["03", "-p", "n_epochs"], "requires 2 arguments"),
    ],
)
def test_what_cannot_run_is_refused_before_anything_is_written(scbert_cli, tmp_path, words, message):
    code, output = scbert_cli("run", *words)
    assert code != 0
    assert message in output
    assert not (tmp_path / "runs").exists()
    assert not (tmp_path / "seen.json").exists()


def test_the_version_is_said(scbert_cli):
    assert scbert_cli("--version") == (0, f"scbert, version {scbert.__version__}\n")


def test_help_on_a_notebook_prints_its_parameters(scbert_cli):
    for words in (["run", "03", "--help"], ["run", "--help", "03_test"]):
        code, output = scbert_cli(*words)
        assert code == 0
        for line in ("-p n_epochs INT", "passes over the cells  [3]", "-p dataset STR", 'which cells  ["pbmc3k"]'):
            assert line in output


def test_help_without_a_notebook_explains_the_command(scbert_cli):
    for words in (["run"], ["run", "--help"], ["--help"], ["annotate", "--help"]):
        code, output = scbert_cli(*words)
        assert code == 0
        assert "Usage:" in output


def test_a_notebook_gets_the_profiles_and_the_given_values(scbert_cli, tmp_path):
    (tmp_path / "7").write_text("")
    words = ["-p", "n_epochs", "5", "-p", "use_labels", "False", "-p", "dataset", "7"]
    code, output = scbert_cli("run", "03", "--profile", "small", *words)
    assert code == 0, output
    assert json.loads((tmp_path / "seen.json").read_text()) == ["small", 5, 1.0, "7", False]
    executed = nbformat.read(tmp_path / "runs" / "small" / "03_test" / "03_test.ipynb", as_version=4)
    assert all(cell.execution_count for cell in executed.cells if cell.cell_type == "code")
    assert "Wrote" in output


def test_beside_the_first_process_a_notebook_runs_and_leaves_nothing(scbert_cli, tmp_path, monkeypatch):
    for name, value in {"WORLD_SIZE": "2", "RANK": "1", "SCBERT_RUNS": str(tmp_path / "runs")}.items():
        monkeypatch.setenv(name, value)
    code, output = scbert_cli("run", "03", "-p", "n_epochs", "5")
    assert (code, output) == (0, "")
    assert json.loads((tmp_path / "seen.json").read_text())[1] == 5
    assert not (tmp_path / "runs").exists()
    code, output = scbert_cli("run", "03", "-p", "n_epochs", "13")
    assert code == 1
    assert output == "Error: 03_test stopped at cell 3: AssertionError: thirteen epochs bring bad luck\n"
    assert not Path(os.environ["SCBERT_RUNS"]).exists()
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("SCBERT_RUNS", str(tmp_path / "runs"))
    code, output = scbert_cli("run", "03")
    assert code == 0
    assert (tmp_path / "runs" / "demo" / "03_test" / "03_test.ipynb").exists()


def test_a_failing_notebook_says_where_and_why(scbert_cli, tmp_path):
    code, output = scbert_cli("run", "03", "-p", "n_epochs", "13")
    assert code != 0
    assert "03_test stopped at cell" in output
    assert "AssertionError: thirteen epochs bring bad luck" in output
    assert "Traceback" not in output.split("Error: 03_test stopped")[1]
    folder = tmp_path / "runs" / "demo" / "03_test"
    assert f"As far as it came: {folder / '03_test.unfinished.ipynb'}" in output
    assert [path.name for path in folder.glob("*.ipynb")] == ["03_test.unfinished.ipynb"]
    assert not (tmp_path / "seen.json").exists()
    scbert_cli("run", "03")
    good = (folder / "03_test.ipynb").read_bytes()
    assert scbert_cli("run", "03", "-p", "n_epochs", "13")[0] == 1
    assert (folder / "03_test.ipynb").read_bytes() == good  # a failing run writes over no good one


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"n_epochs": 0}, "n_epochs must be at least 1, not 0."),
        ({"seed": -1}, "seed must be at least 0, not -1."),
        ({"rate": "nan"}, "rate must be finite, not nan."),
        ({"dataset": "nowhere.h5ad"}, "There is no file nowhere.h5ad, and no data set of that name"),
        ({"dataset": "pbmc3k -> nowhere.h5ad by kind"}, "There is no file nowhere.h5ad, and no data set of that name"),
        (
            {"dataset": "cells.h5ad", "label_key": "kind"},
            "cells.h5ad has no column 'kind' in obs; it has: cell_type, ba",
        ),
        (
            {"dataset": "cells.h5ad", "label_key": "kind shuffled"},
            "cells.h5ad has no column 'kind shuffled' in obs; it has: cell_type, ba",
        ),
        ({"label_key": "scbert_cell_type"}, "obs['scbert_cell_type'] is a column that scbert writes itself: copy"),
        ({"labels": "nowhere.csv"}, "There is no file nowhere.csv"),
    ],
)
def test_values_that_cannot_be_meant_are_refused_before_a_kernel_starts(
    scbert_cli, tmp_path, make_cells, given, message
):
    make_cells().write_h5ad(tmp_path / "cells.h5ad")
    code, output = scbert_cli("run", "03", *(word for pair in given.items() for word in ("-p", *pair)))
    assert code == 1
    assert output.startswith("Error: ") and message in output and output.endswith("Nothing was run.\n")
    assert not (tmp_path / "seen.json").exists()


def test_labels_are_shuffled_of_a_column_that_is_there(scbert_cli, tmp_path, make_cells):
    make_cells().write_h5ad(tmp_path / "cells.h5ad")
    code, output = scbert_cli("run", "03", "-p", "dataset", "cells.h5ad", "-p", "label_key", "cell_type shuffled")
    assert code == 0, output


def test_a_table_of_labels_goes_with_the_data_set(scbert_cli, tmp_path):
    (tmp_path / "labels.csv").write_text("")
    code, output = scbert_cli("run", "03", "-p", "labels", "labels.csv")
    assert code == 0, output
    assert json.loads((tmp_path / "seen.json").read_text())[3] == "pbmc3k with labels.csv"
    assert "-p labels STR" in scbert_cli("run", "03", "--help")[1]


# Which notebooks are ours


def test_notebooks_of_somebody_elses_project_are_never_run(scbert_cli, tmp_path, monkeypatch):
    folder = tmp_path / "mine"
    (folder / "notebooks").mkdir(parents=True)
    (folder / "Snakefile").write_text("")
    (folder / "03").write_text("")
    shutil.copy(tmp_path / "notebooks" / "03_test.ipynb", folder / "notebooks" / "03_mine.ipynb")
    for mine in (None, '[project]\nname = "mine"\ndependencies = ["scbert-companion"]\n', "no toml"):
        if mine:
            (folder / "pyproject.toml").write_text(mine)
        monkeypatch.chdir(folder)
        assert scbert.paths.find_root() == tmp_path
        assert notebooks.find_notebook("03") == tmp_path / "notebooks" / "03_test.ipynb"
        assert scbert_cli("preflight")[0] == 0
        monkeypatch.setattr(scbert.paths, "__file__", str(tmp_path / "site" / "scbert" / "paths.py"))
        assert scbert.paths.find_root() == tmp_path  # around the current folder
        monkeypatch.setattr(scbert.paths, "__file__", str(tmp_path / "scbert" / "paths.py"))


# Without a clone, as after an install of the wheel


@pytest.fixture
def elsewhere(scbert_cli, tmp_path, monkeypatch):
    """A folder without a clone around it or beside the package; what is below tmp_path/notebooks stays a path away."""
    folder = tmp_path / "home" / "me"
    folder.mkdir(parents=True)
    (tmp_path / "pyproject.toml").unlink()
    monkeypatch.setattr(scbert.paths, "__file__", str(tmp_path / "site" / "scbert" / "paths.py"))
    monkeypatch.chdir(folder)
    return folder


@pytest.mark.parametrize(
    "words",
    [
        ["run", "03"],
        ["run", "03", "--help"],
        ["run", "03", "-p", "no_such", "1", "--profile", "no_such"],
        ["run", "nowhere.ipynb", "--part", "9/8"],
        ["preflight"],
        ["preflight", "--profile", "small", "--anyway"],
        ["report"],
    ],
)
def test_without_a_clone_one_sentence_says_what_is_missing(scbert_cli, elsewhere, words):
    code, output = scbert_cli(*words)
    assert code == 1
    expected = f"Error: scbert {words[0]} needs a clone of the repository, whose notebooks do not come with the package: none was found"
    assert output.startswith(f"{expected} from {elsewhere} upwards. Get one by git clone,")
    assert list(elsewhere.iterdir()) == []


def test_without_a_clone_a_notebook_runs_by_its_path_and_is_reported(scbert_cli, elsewhere, tmp_path):
    code, output = scbert_cli("run", "../../notebooks/03_test.ipynb", "-p", "n_epochs", "4")
    assert code == 0, output
    assert json.loads((elsewhere / "seen.json").read_text())[1] == 4
    assert (elsewhere / "runs" / "demo" / "03_test" / "03_test.ipynb").is_file()
    assert scbert_cli("report")[0] == 0
    (elsewhere / "mine.ipynb").write_text((tmp_path / "notebooks" / "03_test.ipynb").read_text())
    code, output = scbert_cli("run", "mine.ipynb", "--profile", "small")
    assert code == 1
    assert output.startswith("Error: scbert run --profile small needs a clone of the repository")


def test_the_package_alone_says_it_too(tmp_path):
    """As an install leaves it: a copy of the package, and no file beside it."""
    package = Path(scbert.__file__).parent
    shutil.copytree(package, tmp_path / "site" / "scbert", ignore=shutil.ignore_patterns("__pycache__"))
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "site")}
    environment.pop("SCBERT_RUNS", None)
    command = [sys.executable, "-m", "scbert", "run", "03"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith("Error: scbert run needs a clone of the repository"), done.stderr


# scbert run --part

BENCHMARK = """
from scbert import paths
from scbert.run.record import Run
class runner:  # computes a job for each part, and fails where the fast ones are asked for
    def run(jobs, run):
        assert rate < 9, "too fast"
        part = paths.find_part()
        paths.write_text(run.path(f"jobs/{part}.json"), dataset)
        if part and use_labels:
            raise paths.PartDone(f"part {part[0]}/{part[1]} is done: 1 jobs, 1 computed")
run = Run("05_benchmark", globals())
runner.run([], run)
run.finish()
"""
EARLIER = '{"notebook": "05_benchmark", "parameters": {}, "seconds": 1, "peak_memory_mb": 1}'


@pytest.fixture
def benchmark(scbert_cli, tmp_path, monkeypatch):
    """Add a notebook with a benchmark and a record of it; return its folder of results."""
    for name in ("SCBERT_PART", "WORLD_SIZE", "SLURM_STEP_NUM_TASKS"):
        monkeypatch.setenv(name, "")  # and as it was, after the test
    monkeypatch.setenv("SCBERT_RUNS", str(tmp_path / "runs"))  # a kernel has the package where it is
    (tmp_path / "mine").write_text("")
    cells = [
        nbformat.v4.new_code_cell(PARAMETERS, metadata={"tags": ["parameters"]}),
        nbformat.v4.new_code_cell(BENCHMARK),
    ]
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    nbformat.write(
        nbformat.v4.new_notebook(cells=cells, metadata=kernel), tmp_path / "notebooks" / "05_benchmark.ipynb"
    )
    folder = tmp_path / "runs" / "demo" / "05_benchmark"
    scbert.paths.write_text(folder / "record.json", EARLIER)
    return folder


def test_a_part_computes_its_share_and_leaves_the_record_to_the_notebook(scbert_cli, benchmark):
    code, output = scbert_cli("run", "05", "--part", "2/8", "-p", "dataset", "mine")
    assert code == 0, output
    message = "part 2/8 is done: 1 jobs, 1 computed\n"
    assert output.endswith(message)
    assert "Wrote" not in output
    assert (benchmark / "parts" / "2of8.done").read_text() == message
    assert (benchmark / "jobs" / "(2, 8).json").read_text() == "mine"
    assert (benchmark / "record.json").read_text() == EARLIER
    executed = nbformat.read(benchmark / "parts" / "2of8.ipynb", as_version=4)
    assert [cell.cell_type for cell in executed.cells] == ["code"] * 3  # and no warning above them
    assert executed.cells[-1].outputs[-1].traceback == [f"PartDone: {message.strip()}"]
    assert not (benchmark / "05_benchmark.ipynb").exists()


def test_a_part_that_fails_says_so_and_is_not_done(scbert_cli, benchmark):
    scbert.paths.write_text(benchmark / "parts" / "2of8.done", "of an earlier run")
    code, output = scbert_cli("run", "05", "--part", "2/8", "-p", "rate", "9")
    assert code == 1
    assert "05_benchmark stopped at cell 3: AssertionError: too fast" in output
    assert str(benchmark / "parts" / "2of8.unfinished.ipynb") in output
    assert not (benchmark / "parts" / "2of8.done").exists()
    assert (benchmark / "record.json").read_text() == EARLIER


def test_a_part_that_runs_to_the_end_of_its_notebook_is_an_error_and_leaves_the_record(scbert_cli, benchmark):
    code, output = scbert_cli("run", "05", "--part", "2/8", "-p", "use_labels", "false")
    assert code == 1
    assert "Error: 05_benchmark ran to its end without a benchmark to share out: run it without --part." in output
    assert not (benchmark / "parts" / "2of8.done").exists()
    assert (benchmark / "record.json").read_text() == EARLIER


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["05", "--part", "9/8"], "A part is written as 2/8 (the second of eight, at most 8/8), not '9/8'. Nothing"),
        (["05", "--part", ""], "A part is written as 2/8 (the second of eight, at most 8/8), not 'nothing'. Nothing"),
        (["03", "--part", "1/2"], "03_test has no benchmark to share out: leave out --part. Nothing was run."),
        (["05", "--part", "1/2", "-p", "epochs", "2"], "05_benchmark has no parameter epochs."),
        (["05", "--part", "1/2", "--profile", "small"], "05_benchmark has no small profile yet"),
    ],
)
def test_parts_that_cannot_be_are_refused_before_anything_runs(scbert_cli, benchmark, words, message):
    code, output = scbert_cli("run", *words)
    assert code == 1
    assert message in output
    assert [path.name for path in benchmark.rglob("*")] == ["record.json"]


def test_parts_are_not_started_as_processes_of_one_training(scbert_cli, benchmark, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "8")
    monkeypatch.setenv("RANK", "3")
    code, output = scbert_cli("run", "05", "--part", "4/8")
    assert code == 1
    assert "A part is a single process: start it without torchrun, or by srun --ntasks 1. Nothing was run." in output


def test_preflight_counts_the_parts_that_run_at_once(scbert_cli, benchmark, short_of_memory, tmp_path):
    profiles = tmp_path / "notebooks" / "profiles"
    (profiles / "small.yaml").write_text("03_test: {}\n05_benchmark: {}\n")
    (profiles / "needs.yaml").write_text("small:\n  03_test: {memory_gb: 0.01}\n  05_benchmark: {memory_gb: 0.04}\n")
    assert scbert_cli("preflight", "--profile", "small", "--jobs", "3")[0] == 0
    assert scbert_cli("preflight", "--profile", "small", "--jobs", "2", "--parts", "8")[0] == 0
    code, output = scbert_cli("preflight", "--profile", "small", "--jobs", "3", "--parts", "8")
    assert code == 1
    assert "Error: 3 parts of 05_benchmark (not known) need 0.1 GB of memory, and 0.1 GB are free" in output
    code, output = scbert_cli("preflight", "--profile", "small", "--jobs", "9", "--parts", "2")
    assert code == 0
    code, output = scbert_cli("preflight", "--profile", "small", "--count-jobs")
    assert code == 0 and output.strip() in list("12345678")


# scbert annotate


@pytest.fixture
def files(tmp_path, make_cells, classifier):
    """A bundle, and a file of raw counts with shuffled, missing and further genes."""
    adata = make_cells()
    order = np.random.default_rng(0).permutation(24)[:20]
    mine = adata[:, order].copy()
    mine.var_names = [f"other{i}" if i < 2 else name for i, name in enumerate(mine.var_names)]
    mine.write_h5ad(tmp_path / "mine.h5ad")
    classifier.save(tmp_path / "model")
    return mine


def test_raw_counts_with_shuffled_and_missing_genes_are_annotated(scbert_cli, tmp_path, files, classifier):
    code, output = scbert_cli(
        "annotate", "mine.h5ad", "--model", "model", "-o", "out.h5ad", "--unassigned-below", 0.4, "--batch-size", 7
    )
    assert code == 0, output
    back = anndata.read_h5ad(tmp_path / "out.h5ad")
    assert (back.X != files.X).nnz == 0
    scbert.annotate(files, classifier, unassigned_below=0.4)
    assert back.obs["scbert_cell_type"].tolist() == files.obs["scbert_cell_type"].tolist()
    assert back.obs["scbert_confidence"].to_numpy() == pytest.approx(
        files.obs["scbert_confidence"].to_numpy(), abs=1e-6
    )
    assert back.obs["batch"].tolist() == files.obs["batch"].tolist()
    assert "Genes: 18 of the model's 24 found (75.0%), 0 cells without any of them; 0 that training" in output
    for name, number in files.obs["scbert_cell_type"].value_counts().items():
        assert any(line.split()[:2] == [name, str(number)] for line in output.splitlines())
    assert "On 7 validation cells of its training set, by macro-F1:" in output
    assert not list(tmp_path.glob("*.tmp"))


def log_normalise(adata):
    adata.X = adata.X.log1p()


def rename_all_genes(adata):
    adata.var_names = [f"ENSG{i}" for i in range(adata.n_vars)]


def understate_totals(adata):
    adata.obs["n_counts"] = 1.0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (log_normalise, "fractional values"),
        (rename_all_genes, "None of the data's 20 genes"),
        (understate_totals, "must be each cell's total over all measured genes"),
    ],
)
def test_bad_cells_are_refused_in_one_sentence(scbert_cli, tmp_path, files, change, message):
    change(files)
    files.write_h5ad("mine.h5ad")
    code, output = scbert_cli("annotate", "mine.h5ad", "--model", "model", "-o", "out.h5ad")
    assert code != 0
    assert message in output
    assert not (tmp_path / "out.h5ad").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nowhere.h5ad", "--model", "model", "-o", "out.h5ad"], "There is no file nowhere.h5ad"),
        (
            ["pyproject.toml", "--model", "model", "-o", "out.h5ad"],
            "pyproject.toml is of no format that is read here: .h5ad",
        ),
        (["mine.h5ad", "--model", "nowhere", "-o", "out.h5ad"], "There is no folder nowhere"),
        (["mine.h5ad", "--model", "mine.h5ad", "-o", "out.h5ad"], "mine.h5ad is not a model bundle"),
        (["mine.h5ad", "--model", "model", "-o", "no/out.h5ad"], "There is no folder no to write out.h5ad into"),
        (["mine.h5ad", "--model", "model", "-o", "notebooks"], "notebooks is a folder: name a file in it."),
        (["mine.h5ad", "--model", "model"], "Missing option '-o'"),
        (["mine.h5ad", "--model", "model", "-o", "out.h5ad", "--batch-size", "0"], "--batch-size"),
        (["mine.h5ad", "--model", "model", "-o", "out.h5ad", "--unassigned-below", "50"], "--unassigned-below"),
    ],
)
def test_bad_words_are_refused_in_one_sentence(scbert_cli, tmp_path, files, words, message):
    code, output = scbert_cli("annotate", *words)
    assert code != 0
    assert message in output
    assert not (tmp_path / "out.h5ad").exists()
    assert not list(tmp_path.glob("*.tmp"))


def test_counts_with_fractions_are_rounded_if_asked(scbert_cli, tmp_path, files):
    files.X = files.X * 1.0019583
    rounded = files.X.rint()
    files.write_h5ad("mine.h5ad")
    words = ["annotate", "mine.h5ad", "--model", "model", "-o", "out.h5ad"]
    code, output = scbert_cli(*words)
    assert (code != 0, "--round-counts" in output) == (True, True)
    code, output = scbert_cli(*words, "--round-counts")
    assert (code, "counts had fractions" in output) == (0, True)
    assert (rounded != anndata.read_h5ad(tmp_path / "out.h5ad").X).nnz == 0


def test_old_gene_names_are_traced_if_asked_and_stay_in_the_file(scbert_cli, tmp_path, files, monkeypatch):
    table = pd.DataFrame({"name": [f"gene{i}" for i in range(24)], "gene_id": range(24), "how": "symbol"})
    older = table.assign(name=[f"old{i}" for i in range(24)], how="synonym")
    monkeypatch.setattr(scbert.genes, "read_gene_table", lambda: pd.concat([table, older]))
    renamed = files.copy()
    renamed.var_names = [name.replace("gene", "old") for name in files.var_names]
    renamed.write_h5ad(tmp_path / "old.h5ad")
    words = ("--model", "model", "-o", "out.h5ad")
    code, output = scbert_cli("annotate", "old.h5ad", *words)
    assert code == 1
    assert "scbert annotate --rename-genes, traces old symbols and Ensembl identifiers" in output
    assert scbert_cli("annotate", "mine.h5ad", *words)[0] == 0
    expected = anndata.read_h5ad(tmp_path / "out.h5ad")
    code, output = scbert_cli("annotate", "old.h5ad", *words, "--rename-genes", "--overwrite")
    assert code == 0, output
    back = anndata.read_h5ad(tmp_path / "out.h5ad")
    assert list(back.var_names) == list(renamed.var_names)
    assert back.obs["scbert_cell_type"].tolist() == expected.obs["scbert_cell_type"].tolist()
    assert back.obsm["X_scbert"].shape == expected.obsm["X_scbert"].shape


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["-o", "mine.h5ad"], "mine.h5ad is the input itself"),
        (["-o", "mine.h5ad", "--overwrite"], "mine.h5ad is the input itself"),
        (["-o", "other.h5ad"], "other.h5ad is there already: give another name, or say --overwrite"),
        (["-o", "other.h5ad", "--overwrite"], "other.h5ad is no h5ad file, whatever its name: it is left alone"),
        (["-o", "names.txt"], "names.txt must end in .h5ad"),
        (["-o", "out.h5ad", "--csv", "names.h5ad"], "--csv names.h5ad must end in .csv"),
        (["-o", "folder.h5ad"], "folder.h5ad is a folder"),
    ],
)
def test_what_would_be_lost_is_refused_before_any_work(scbert_cli, tmp_path, files, words, message):
    (tmp_path / "other.h5ad").write_text("my notes")
    (tmp_path / "folder.h5ad").mkdir()
    before = (tmp_path / "mine.h5ad").read_bytes()
    code, output = scbert_cli("annotate", "mine.h5ad", "--model", "model", *words)
    assert code == 1
    assert message in output
    assert "annotate: " not in output  # no cell was annotated
    assert (tmp_path / "mine.h5ad").read_bytes() == before
    assert (tmp_path / "other.h5ad").read_text() == "my notes"


def test_names_come_as_a_table_too_and_a_picture_is_drawn(scbert_cli, tmp_path, files):
    words = ("--csv", "names.csv", "--umap", "cells.png")
    code, output = scbert_cli("annotate", "mine.h5ad", "--model", "model", "-o", "out.h5ad", *words)
    assert code == 0, output
    table = pd.read_csv(tmp_path / "names.csv", index_col="cell")
    back = anndata.read_h5ad(tmp_path / "out.h5ad")
    assert table["scbert_cell_type"].tolist() == back.obs["scbert_cell_type"].tolist()
    names = [name for name in scbert.annotated.COLUMNS if name != "cell_type_ontology_term_id"]  # its model knows none
    assert list(table) == [f"scbert_{name}" for name in names]
    assert (tmp_path / "cells.png").stat().st_size > 1000


def test_strings_of_a_newer_anndata_are_written_back(scbert_cli, tmp_path, files):
    with anndata.settings.override(allow_write_nullable_strings=True):
        files.obs_names = files.obs_names.astype("string")
        files.obs["barcode"] = pd.array([f"b{i}" for i in range(60)], dtype="string")
        files.obs.loc[files.obs_names[0], "barcode"] = pd.NA
        files.write_h5ad(tmp_path / "newer.h5ad")
    code, output = scbert_cli("annotate", "newer.h5ad", "--model", "model", "-o", "out.h5ad")
    assert code == 0, output
    back = anndata.read_h5ad(tmp_path / "out.h5ad")
    assert back.obs_names.tolist() == files.obs_names.tolist()
    assert back.obs["barcode"].tolist()[1:3] == ["b1", "b2"]
    assert not list(tmp_path.glob("*.tmp"))


def test_an_encoder_annotates_nothing(scbert_cli, tmp_path, files, classifier):
    classifier.encoder.save(tmp_path / "encoder")
    code, output = scbert_cli("annotate", "mine.h5ad", "--model", "encoder", "-o", "out.h5ad")
    assert code != 0
    assert "encoder is an encoder without labels: fine-tune it first" in output


def test_the_annotator_of_the_run_before_one_that_did_not_finish_is_refused(scbert_cli, tmp_path, files, classifier):
    (tmp_path / "run" / "unfinished").mkdir(parents=True)
    (tmp_path / "run" / ".lock").touch()
    classifier.save(tmp_path / "run" / "annotator")
    sentence = (
        f"The newest run in {tmp_path / 'run'} has not finished, and annotator is of the run before, maybe of other"
    )
    (tmp_path / "link").symlink_to(tmp_path / "run" / "annotator")
    for model in ("run/annotator", "link", "run/annotator/."):
        code, output = scbert_cli("annotate", "mine.h5ad", "--model", model, "-o", "out.h5ad")
        assert code != 0
        assert sentence in output
    with pytest.warns(UserWarning, match="has not finished, and annotator is of the run before"):
        scbert.load(tmp_path / "link")
    with filelock.FileLock(tmp_path / "run" / ".lock"):
        code, output = scbert_cli("annotate", "mine.h5ad", "--model", "link", "-o", "out.h5ad")
    assert code != 0
    assert "now, and annotator is of the run before: wait until it has finished" in output
    assert "remove" not in output
    (tmp_path / "run" / "unfinished").rmdir()
    assert scbert_cli("annotate", "mine.h5ad", "--model", "link", "-o", "out.h5ad")[0] == 0


def test_a_run_beside_another_of_the_same_notebook_is_refused_and_leaves_its_notebook_alone(scbert_cli, tmp_path):
    folder = tmp_path / "runs" / "demo" / "03_test"
    folder.mkdir(parents=True)
    (folder / "03_test.unfinished.ipynb").write_text("is being written")
    for lock in (".lock", ".03_test.lock"):  # of its kernel, and of scbert run until that has one
        held = filelock.FileLock(folder / lock, thread_local=False)
        with ThreadPoolExecutor() as others:
            others.submit(held.acquire).result()
            code, output = scbert_cli("run", "03_test")
            others.submit(held.release).result()
        assert code != 0
        assert f"Another run of 03_test is writing into {folder}: wait for it" in output
        assert (folder / "03_test.unfinished.ipynb").read_text() == "is being written"


def test_two_programs_do_not_write_one_output(scbert_cli, tmp_path, files, monkeypatch):
    asked = ("annotate", "mine.h5ad", "--model", "model", "-o", "out.csv")
    kept = tmp_path / "out.csv.unfinished"
    kept.mkdir()
    with filelock.FileLock(kept / ".lock"):
        code, output = scbert_cli(*asked)
        assert code != 0
        assert "Another scbert annotate is writing out.csv: wait for it, or give another name." in output
        assert kept.is_dir()
    summarise = annotated.summarise

    def meanwhile(adata):
        (tmp_path / "out.csv").write_text("written by somebody else")
        return summarise(adata)

    monkeypatch.setattr(annotated, "summarise", meanwhile)
    code, output = scbert_cli(*asked)
    assert code != 0
    assert "out.csv is there already" in output
    assert (tmp_path / "out.csv").read_text() == "written by somebody else"
    assert list(kept.glob("*.npz"))  # what was computed is kept


def test_a_line_says_what_the_model_is(scbert_cli, tmp_path, files, classifier):
    classifier.save(tmp_path / "model", card="# Mine\n\n- blood, sha256 ab\n- gut, sha256 cd\n\n- label_key: kind\n")
    code, output = scbert_cli("annotate", "mine.h5ad", "--model", "model", "-o", "out.csv")
    assert code == 0
    assert "Model: trained on blood, gut (kind), 3 labels, written 20" in output
    memory, classifier.memory = classifier.memory, {}
    classifier.outcome = {"state": "unfinished", "epochs": 2, "attempts": 1}
    classifier.save(tmp_path / "model")
    code, output = scbert_cli("annotate", "mine.h5ad", "--model", "model", "-o", "other.csv")
    assert "The model has no memory of its training cells: nothing tells how far its names can be trusted." in output
    assert "Warning: The training was still improving after 2 epochs: give it more n_epochs." in output
    classifier.memory = memory


def test_what_is_kept_for_an_annotation_that_is_killed_is_gone_when_it_has_ended(scbert_cli, tmp_path, files):
    kept = tmp_path / "out.csv.unfinished"
    scbert.annotate(scbert.datasets.read("mine.h5ad"), scbert.load("model"), batch_size=7, keep=kept)
    code, output = scbert_cli("annotate", "mine.h5ad", "--model", "model", "-o", "other.csv", "--batch-size", 7)
    assert "were read from" not in output
    code, output = scbert_cli("annotate", "mine.h5ad", "--model", "model", "-o", "out.csv", "--batch-size", 7)
    assert code == 0, output
    assert (
        f"{files.n_obs} of the {files.n_obs} cells were read from out.csv.unfinished, where an earlier run had"
        in output
    )
    assert sorted(path.name for path in tmp_path.glob("out*")) == ["out.csv"]


@pytest.mark.parametrize(
    ("printed", "shown"),
    [
        (
            "\rjobs:  40%|####      | 4/10 [00:08<00:12,  0.50cell/s, a scbert]",
            "jobs:  40% 4/10 [00:08<00:12,  0.50cell/s, a scbert]",
        ),
        ("\ra:  10%|#  | 1/10 [x]\ra:  20%|## | 2/10 [y]\n", "a:  20% 2/10 [y]"),
        ("All is well | 40% of it\n", None),
        ("", None),
    ],
)
def test_the_newest_bar_of_a_notebook_is_shown_while_it_runs(capsys, printed, shown):
    notebooks.Bars().write(printed)
    assert capsys.readouterr().out.strip() == (shown or "")


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory")])
def test_want_of_memory_is_a_sentence(scbert_cli, tmp_path, files, monkeypatch, error):
    monkeypatch.setattr(scbert.datasets, "read", lambda *_, **__: (_ for _ in ()).throw(error))
    code, output = scbert_cli("annotate", "mine.h5ad", "--model", "model", "-o", "out.h5ad")
    assert code != 0
    assert "There is not enough memory: close other programs" in output


# scbert report


def test_the_report_links_each_notebook_that_was_run(scbert_cli, tmp_path):
    code, output = scbert_cli("report")
    assert code != 0
    assert "No notebook of the demo profile was run by scbert run or make reproduce yet." in output
    for name in ("03_test", "04_other"):
        folder = tmp_path / "runs" / "demo" / name
        folder.mkdir(parents=True)
        (folder / f"{name}.ipynb").write_text((tmp_path / "notebooks" / f"{name}.ipynb").read_text())
    record = {
        "notebook": "03_test",
        "parameters": {},
        "seconds": 7.4,
        "peak_memory_mb": 1,
        "checks": [{}, {}],
        "seed": 3,
    }
    record |= {"data": {"mine": 64 * "a"}, "versions": {"torch": "2"}, "git_commit": "abc", "profile": "demo"}
    record["parameters"] = {"label_key": "kind shuffled", "n_epochs": 3}
    (tmp_path / "figures" / "demo").mkdir(parents=True)
    published = record | {"parameters": {"label_key": "kind shuffled", "n_epochs": 4}}
    (tmp_path / "figures" / "demo" / "03_test.json").write_text(json.dumps(published))
    file = tmp_path / "runs" / "demo" / "03_test" / "record.json"
    file.write_text(json.dumps(record))
    os.utime(file, (0, 0))
    code, output = scbert_cli("report")
    assert code == 0, output
    page = (tmp_path / "report" / "index.html").read_text()
    assert '<a href="03_test.html">03_test</a>' in page
    assert (
        "7 s, 2 checks passed, seed 3, data: mine (sha256 aaaaaaaaaaaa), labels: kind shuffled, A SHUFFLED CONTR"
        in page
    )
    assert "Its n_epochs differ from the published run" in page
    assert "its record is missing or damaged" in page
    assert "torch 2" in page and "abc" in page
    os.utime(file)  # the notebook was run again elsewhere
    scbert_cli("report")
    page = (tmp_path / "report" / "index.html").read_text()
    assert "its record is of a later run, by JupyterLab or papermill: run it again by scbert run." in page
    assert "7 s" not in page
    assert "n_epochs" in (tmp_path / "report" / "03_test.html").read_text()


def test_a_notebook_that_is_cut_off_is_named_and_the_others_are_shown(scbert_cli, tmp_path, monkeypatch):
    monkeypatch.setenv("SCBERT_RUNS", str(tmp_path / "elsewhere"))
    for name in ("03_test", "04_other"):
        folder = tmp_path / "elsewhere" / "demo" / name
        folder.mkdir(parents=True)
        text = (tmp_path / "notebooks" / f"{name}.ipynb").read_text()
        (folder / f"{name}.unfinished.ipynb").write_text(text[: 50 if name == "03_test" else None])
    code, output = scbert_cli("report")
    assert code == 0, output
    assert "Warning: " in output and "03_test.unfinished.ipynb is no notebook" in output
    page = (tmp_path / "elsewhere" / "report" / "index.html").read_text()
    assert "03_test" not in page
    assert '<a href="04_other.html">04_other</a>' in page and "did not finish" in page


# scbert fetch and scbert convert


@pytest.fixture
def small_catalogue(tmp_path, monkeypatch):
    """Two entries: one whose file is in a mirror, one that no one has; and one to be fetched by hand."""
    content = b"A\nB\n"
    (tmp_path / "mirror" / "lists").mkdir(parents=True)
    (tmp_path / "mirror" / "lists" / "genes.txt").write_bytes(content)
    monkeypatch.setenv("SCBERT_MIRROR", str(tmp_path / "mirror"))
    monkeypatch.setenv("SCBERT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(scbert.download, "PAUSE", 0)
    about = {"kind": "genes", "profile": "small", "licence": "MIT", "citation": "none", "title": "a list"}
    here = {"url": "https://127.0.0.1:9/lists/genes.txt", "bytes": 4, "sha256": hashlib.sha256(content).hexdigest()}
    lost = here | {"url": "https://127.0.0.1:9/lists/lost.txt"}
    catalogue = {"here": about | {"files": [here]}, "lost": about | {"files": [lost], "profile": "paper"}}
    catalogue["hand"] = about | {"files": [], "by_hand": {"from": "a portal", "files": ["x.csv"]}}
    monkeypatch.setattr(scbert.datasets, "CATALOGUE", catalogue)


def test_fetch_by_name_says_where_the_file_is_and_its_licence(scbert_cli, small_catalogue, tmp_path):
    code, output = scbert_cli("fetch", "here")
    assert code == 0
    assert f"here: 1 file(s) in {tmp_path / 'mirror' / 'lists'}. Licence: MIT." in output


def test_fetch_all_of_a_profile_leaves_out_what_is_by_hand_or_of_another_profile(scbert_cli, small_catalogue):
    code, output = scbert_cli("fetch", "--all", "--profile", "small")
    assert code == 0
    assert "here: 1 file(s)" in output
    assert "lost" not in output
    assert "To be downloaded by hand, scbert fetch NAME says how: hand." in output


def test_what_could_be_fetched_is_kept_when_something_else_fails(scbert_cli, small_catalogue):
    code, output = scbert_cli("fetch", "lost", "here")
    assert code == 1
    assert "here: 1 file(s)" in output
    assert "lost: lost.txt could not be fetched from https://127.0.0.1:9/lists/lost.txt in 3 attempts" in output
    assert output.splitlines()[-1] == "Error: Not fetched: lost. What was fetched is kept."


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "Name what to fetch, or say --all --profile small; scbert fetch --list shows it."),
        (["here", "nothing"], "Not in the catalogue: nothing. It has: here, lost, hand. Nothing was fetched."),
        (["hand"], "download x.csv from a portal, put it into"),
        (["--all", "--profile", "huge"], "'huge' is not one of 'demo', 'small', 'large', 'paper'"),
    ],
)
def test_bad_words_after_fetch_are_one_sentence(scbert_cli, small_catalogue, words, message):
    code, output = scbert_cli("fetch", *words)
    assert code != 0
    assert message in output


def test_the_list_has_size_state_and_licence_and_fetches_nothing(scbert_cli, small_catalogue, tmp_path):
    code, output = scbert_cli("fetch", "--list")
    assert code == 0
    rows = {line.split()[0]: line for line in output.splitlines() if line and not line.startswith(" ")}
    assert "4 B" in rows["here"]
    assert "MIT" in rows["here"]
    assert "to fetch" in rows["lost"]
    assert "by hand" in rows["hand"]
    assert not (tmp_path / "cache").exists()


def test_a_mirror_that_is_no_folder_is_one_sentence(scbert_cli, small_catalogue, monkeypatch):
    monkeypatch.setenv("SCBERT_MIRROR", "nowhere")
    for words in (["--list"], ["--all"], ["here"]):
        code, output = scbert_cli("fetch", *words)
        assert code == 1
        assert "SCBERT_MIRROR names nowhere, which is no folder: correct it or unset it." in output


def test_columns_of_an_earlier_annotation_are_named_before_they_are_written_anew(scbert_cli, files):
    words = ["--model", "model", "-o"]
    assert "annotated before" not in scbert_cli("annotate", "mine.h5ad", *words, "once.h5ad")[1]
    code, output = scbert_cli("annotate", "once.h5ad", *words, "twice.h5ad")
    assert code == 0
    assert "Warning: once.h5ad was annotated before: scbert_cell_type, scbert_confidence" in output


def test_few_genes_in_common_are_warned_of(scbert_cli, tmp_path, files):
    adata = anndata.read_h5ad(tmp_path / "mine.h5ad")
    adata.var_names = [name if i in (5, 6, 7) else f"Mouse{i}" for i, name in enumerate(adata.var_names)]
    adata.write_h5ad(tmp_path / "mouse.h5ad")
    code, output = scbert_cli("annotate", "mouse.h5ad", "--model", "model", "-o", "out.h5ad")
    assert code == 0
    assert "Warning: mouse.h5ad is unlike what the model was trained on: it lacks genes that hold" in output


def test_less_than_a_tenth_of_the_genes_names_nothing(scbert_cli, tmp_path, files):
    adata = anndata.read_h5ad(tmp_path / "mine.h5ad")
    adata.var_names = [name if i == 5 else f"Mouse{i}" for i, name in enumerate(adata.var_names)]
    adata.write_h5ad(tmp_path / "mouse.h5ad")
    code, output = scbert_cli("annotate", "mouse.h5ad", "--model", "model", "-o", "out.h5ad")
    assert code == 1
    assert "The cells have 1 of the model's 24 genes: too few." in output
    assert not (tmp_path / "out.h5ad").exists()


def test_the_folder_of_a_run_is_told_from_its_annotator(scbert_cli, tmp_path, files):
    (tmp_path / "run").mkdir()
    (tmp_path / "model").rename(tmp_path / "run/annotator")
    code, output = scbert_cli("annotate", "mine.h5ad", "--model", "run", "-o", "out.h5ad")
    assert code == 1
    assert "run is the folder of a run: give --model run/annotator." in output


def test_convert_refuses_what_is_no_checkpoint_in_one_sentence(scbert_cli, tmp_path):
    (tmp_path / "weights.pth").write_bytes(b"no weights")
    (tmp_path / "genes.txt").write_text("A\nB\n")
    code, output = scbert_cli("convert", "weights.pth", "bundle", "--genes", "genes.txt")
    assert code == 1
    assert output.startswith("Error: weights.pth")
    assert not (tmp_path / "bundle").exists()


# scbert preflight


@pytest.fixture
def short_of_memory(monkeypatch, tmp_path):
    """A machine with a tenth of a GB left, and a notebook that is said to need 2 GB in its small profile."""
    (tmp_path / "notebooks" / "profiles" / "needs.yaml").write_text(
        "small:\n  03_test: {minutes: 90, memory_gb: 2, disk_gb: 0.001, basis: estimate}\n"
    )
    monkeypatch.setattr(scbert.preflight, "_measure_memory", lambda: 10**8)


def test_preflight_lists_needs_and_fails_where_something_is_short(scbert_cli, short_of_memory):
    code, output = scbert_cli("preflight", "--profile", "small")
    assert code == 1
    assert "03_test   90.0     2.0 GB  none" in output
    assert "Error: 03_test (estimate) needs 2.0 GB of memory, and 0.1 GB are free: close other programs" in output
    assert scbert_cli("preflight", "--profile", "small", "--anyway")[0] == 0
    code, output = scbert_cli("preflight", "--profile", "huge")
    assert output == "Error: There is no profile 'huge': choose demo, small, large, core or paper.\n"


def test_a_notebook_that_does_not_fit_is_not_run_unless_anyway(scbert_cli, short_of_memory, tmp_path):
    code, output = scbert_cli("run", "03", "--profile", "small")
    assert code == 1
    assert "Nothing was run; --anyway runs it all the same." in output
    assert not (tmp_path / "runs").exists()
    code, output = scbert_cli("run", "03", "--profile", "small", "--anyway")
    assert code == 0
    assert (tmp_path / "seen.json").exists()


def test_the_end_of_a_run_lists_accuracies_of_whole_sets_and_warnings(tmp_path):
    from scbert.__main__ import list_found

    number = {"value": 0.8, "low": 0.75, "high": 0.85, "n": 1160, "unit": ""}
    names = [
        "set/logistic_regression/accuracy",
        "set/scbert/macro_f1",
        "set:few:10/scbert/accuracy",
        "a->b/scbert/accuracy",
    ]
    file = tmp_path / "record.json"
    file.write_text(json.dumps({"metrics": dict.fromkeys(names, number), "warnings": ["It has not learnt."]}))
    assert list_found(file) == [
        "logistic regression on set: accuracy 0.800 [0.750, 0.850], 1,160 cells",
        "scbert on a->b: accuracy 0.800 [0.750, 0.850], 1,160 cells",
        "Warning: It has not learnt.",
    ]
    assert list_found(tmp_path / "none.json") == []


def test_what_snakemake_started_ends_with_it(tmp_path):
    code = "import sys, time; from scbert.run import notebooks; notebooks._end_with(sys.argv[1]); print(flush=True); time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]) as starter:
        command = [sys.executable, "-c", code, str(starter.pid)]
        with subprocess.Popen(command, stdout=subprocess.PIPE) as started:
            started.stdout.readline()
            starter.kill()
            assert started.wait(timeout=30) == 143
