"""The command line: run a notebook, fetch data, annotate a file, make the report. Nothing that a notebook could not do."""

import json
import logging
import os
import sys
import tempfile
from pathlib import Path

import click

from .run import record

KINDS = {"int": int, "float": float, "str": str, "bool": {"true": True, "false": False}}


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def main():
    """Reproduce, learn from, and adapt scBERT."""
    logging.getLogger("papermill").setLevel(logging.ERROR)


@main.command(add_help_option=False)
@click.argument("notebook", required=False)
@click.option("-p", "pairs", nargs=2, multiple=True, metavar="NAME VALUE", help="Set a parameter; repeatable.")
@click.option("--profile", default="demo", show_default=True, help="demo, small or paper.")
@click.option("--anyway", is_flag=True, help="Run even where memory, disk or a download is short.")
@click.option("--part", metavar="2/8", help="Of a benchmark, compute the second of eight shares of its jobs only.")
@click.option("-h", "--help", "wants_help", is_flag=True, help="With a notebook: print its parameters.")
@click.pass_context
def run(context, notebook, pairs, profile, anyway, part, wants_help):
    """Run a notebook, named by its number or stem, such as: scbert run 03 -p n_folds 5.

    With --part, parts of a benchmark run at once, on one machine or several; the notebook, run without it after
    them, finds their results.
    """
    if notebook is None:
        click.echo(context.get_help())
        return
    source = find_notebook(notebook)
    offered = read_parameters(source)
    if wants_help:
        click.echo(f"scbert run {notebook} [-p NAME VALUE]... [--profile demo|small|paper]\n\n{source.stem}\n")
        for name, (kind, default, text) in offered.items():
            if name == "profile":  # chosen by --profile
                continue
            click.echo(f"  -p {name} {kind.upper()}".ljust(34) + f"{text}  [{default}]")
        return
    parameters = choose_parameters(source, offered, profile, dict(pairs))
    share = choose_part(source, part)
    if record.find_rank():
        run_beside(source, parameters)
        return
    check_room(profile, [source], parameters, anyway=anyway)
    folder = record.run_directory(profile, source.stem)
    if share:
        run_part(source, folder / "parts" / f"{share[0]}of{share[1]}.ipynb", parameters)
        return
    folder.mkdir(parents=True, exist_ok=True)
    execute(source, folder / f"{source.stem}.ipynb", parameters)
    click.echo(f"Wrote {folder}")


def choose_part(source: Path, given: str | None) -> tuple[int, int] | None:
    """Return the part of the benchmark that was asked for, by --part or $SCBERT_PART, checked; None for the whole."""
    if given is not None:
        os.environ["SCBERT_PART"] = given or "nothing"  # inherited by the kernel
    try:
        part = record.find_part()
    except ValueError as error:
        raise click.ClickException(f"{error} Nothing was run.") from None
    if part is None:
        return None
    from .run import preflight

    if not preflight.has_benchmark(source):
        raise click.ClickException(f"{source.stem} has no benchmark to share out: leave out --part. Nothing was run.")
    if record.count_processes() > 1:
        raise click.ClickException(
            "A part is a single process: start it without torchrun, or by srun --ntasks 1. Nothing was run."
        )
    return part


def run_part(source: Path, output: Path, parameters: dict) -> None:
    """Run a notebook until its part of the benchmark is computed, and say so in a file beside `output`, for Snakemake."""
    done = output.with_suffix(".done")
    done.unlink(missing_ok=True)
    output.parent.mkdir(parents=True, exist_ok=True)
    message = execute(source, output, parameters)
    if message is None:
        raise click.ClickException(
            f"{source.stem} ran to its end without a benchmark to share out: run it without --part. Nothing is lost."
        )
    record.write_text(done, f"{message}\n")
    click.echo(message)


def run_beside(source: Path, parameters: dict) -> None:
    """Run a notebook in another than the first process of torchrun or srun: it joins in training and leaves nothing.

    Its kernel inherits the rank, so that `scbert.pretrain` finds the others.
    """
    with tempfile.TemporaryDirectory() as folder:
        os.environ["SCBERT_RUNS"] = folder
        execute(source, Path(folder) / source.name, parameters, progress=False)


def check_room(profile, notebooks=None, parameters=None, *, jobs=1, parts=1, anyway=False):
    """Print what is needed, but for a demo, and stop in a sentence if this machine is short of it."""
    from .run import preflight

    try:
        needs = preflight.list_needs(profile, notebooks, parameters)
    except ValueError as error:
        raise click.ClickException(str(error)) from None
    if profile != "demo" or notebooks is None:
        click.echo(preflight.describe_needs(needs))
    shortages = preflight.find_shortages(needs, profile, jobs=jobs, parts=parts)
    if shortages and not anyway:
        raise click.ClickException(" ".join([*shortages, "Nothing was run; --anyway runs it all the same."]))


@main.command()
@click.option("--profile", default="demo", show_default=True, help="demo, small or paper.")
@click.option("--jobs", type=click.IntRange(1), default=1, show_default=True, help="Notebooks that run at once.")
@click.option("--parts", type=click.IntRange(1), default=1, show_default=True, help="Shares of a benchmark.")
@click.option("--anyway", is_flag=True, help="Only list; do not fail where something is short.")
def preflight(profile, jobs, parts, anyway):
    """List what the notebooks of a profile need, and compare it with what this machine has."""
    check_room(profile, jobs=jobs, parts=parts, anyway=anyway)


def find_notebook(name: str) -> Path:
    """Return the path of the notebook with this number, stem or path."""
    folder = record.find_root() / "notebooks"
    stem = f"{int(name):02d}_" if name.isdigit() else Path(name).stem
    matches = [Path(name)] if Path(name).is_file() else sorted(folder.glob(f"{stem}*.ipynb"))
    if len(matches) != 1:
        known = ", ".join(path.stem for path in sorted(folder.glob("*.ipynb"))) or f"none in {folder}"
        raise click.ClickException(f"No single notebook is called {name!r}. There are: {known}.")
    return matches[0]


def read_parameters(source: Path) -> dict[str, tuple[str, str, str]]:
    """Return name -> (type, default as written, help) of a notebook's parameters cell."""
    import papermill

    found = papermill.inspect_notebook(str(source))
    return {name: (p["inferred_type_name"], p["default"], p["help"]) for name, p in found.items()}


def choose_parameters(source: Path, offered: dict, profile: str, given: dict[str, str]) -> dict:
    """Return what to inject: the profile's section for this notebook, overridden by what was given, all checked."""
    chosen = {}
    if profile != "demo":  # the demo is the defaults of the notebooks
        from .run import preflight

        try:
            sections = preflight.read_sections(source.parent, profile)
        except ValueError as error:
            raise click.ClickException(f"{error} Nothing was run.") from None
        if source.stem not in sections:
            raise click.ClickException(
                f"{source.stem} has no {profile} profile yet ({profile}.yaml has no section for it)."
            )
        chosen = {"profile": profile} | (sections[source.stem] or {})
    if "profile" in given:
        raise click.ClickException("The profile is chosen by --profile, not by -p.")
    chosen = chosen | given
    unknown = sorted(set(chosen) - set(offered))
    if unknown:
        raise click.ClickException(
            f"{source.stem} has no parameter {', '.join(unknown)}. It has: {', '.join(offered)}. Nothing was run."
        )
    return {name: parse_value(name, value, offered[name][0]) for name, value in chosen.items()}


def parse_value(name: str, value, kind: str):
    """Return a parameter's value in the type of its default: "3" is no number where a word is due, nor the reverse."""
    try:
        if kind == "bool":
            return KINDS["bool"][str(value).lower()]
        return KINDS[kind](value)
    except (KeyError, ValueError):
        raise click.ClickException(
            f"Parameter {name} must be of type {kind}, not {value!r}. Nothing was run."
        ) from None


def execute(source: Path, output: Path, parameters: dict, progress: bool = True) -> str | None:
    """Run a notebook from the caller's folder; what was executed stands in `output`, also after an error.

    Returns what a part of a benchmark said when it was done; None if the notebook ran to its end.
    """
    import nbformat
    import papermill
    from nbconvert.preprocessors import CoalesceStreamsPreprocessor

    message = None
    try:
        papermill.execute_notebook(
            str(source), str(output), parameters, kernel_name="python3",
            progress_bar={"file": sys.stdout} if progress else False,
            extra_arguments=["--HistoryManager.hist_file=:memory:", "--log-level=ERROR"],
        )  # fmt: skip
    except papermill.PapermillExecutionError as error:
        if not (error.ename == record.PartDone.__name__ and record.find_part()):
            kept = "" if record.find_rank() else f"\nAs far as it came: {output}"
            raise click.ClickException(
                f"{source.stem} stopped at cell {error.exec_count}: {error.ename}: {error.evalue}{kept}"
            ) from None
        message = error.evalue
    notebook, _ = CoalesceStreamsPreprocessor().preprocess(
        nbformat.read(output, as_version=4), {}
    )  # finished bars only
    if message:  # papermill writes a warning above a cell that raised
        marked = "papermill-error-cell-tag"
        notebook.cells = [cell for cell in notebook.cells if marked not in cell.metadata.get("tags", ())]
    record.write_text(output, nbformat.writes(notebook))
    return message


@main.command()
@click.argument("source", type=click.Path(path_type=Path))
@click.option("--model", required=True, type=click.Path(path_type=Path), help="Bundle directory of a classifier.")
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="The annotated .h5ad to write.")
@click.option(
    "--unassigned-below", type=click.FloatRange(0, 1), default=0.5, show_default=True, help="Less probable: Unassigned."
)
@click.option("--batch-size", type=click.IntRange(1), default=32, show_default=True, help="Cells a forward pass.")
@click.option("--rename-genes", is_flag=True, help="Trace old symbols and Ensembl identifiers to the model's genes.")
def annotate(source, model, output, unassigned_below, batch_size, rename_genes):
    """Annotate the raw counts of a file with a fine-tuned model."""
    if not output.parent.is_dir():
        raise click.ClickException(f"There is no folder {output.parent} to write {output.name} into.")
    import scbert

    try:
        adata = scbert.datasets.load(source)
        classifier = scbert.load(model)
        if not isinstance(classifier, scbert.Classifier):
            raise ValueError(f"{model} is an encoder without labels: fine-tune it first (notebook 03).")
        read = scbert.genes.rename_genes(adata, classifier.genes) if rename_genes else adata
        scbert.annotate(read, classifier, unassigned_below=unassigned_below, batch_size=batch_size, progress=True)
        if rename_genes:  # what is written keeps the file's own names
            adata.obs, adata.uns = read.obs, read.uns
            adata.obsm.update(read.obsm)
    except ValueError as error:
        raise click.ClickException(str(error)) from None
    report = adata.uns["scbert"]["annotate"]
    click.echo(
        f"Genes: {report['genes_matched']:,} of the model's {report['genes_in_vocabulary']:,} found "
        f"({report['matched_share']:.1%}), {report['cells_without_tokens']:,} cells without any of them."
    )
    if report["genes_matched"] < 0.1 * min(report["genes_in_data"], report["genes_in_vocabulary"]):
        click.echo(
            "Warning: so few genes in common (another species, or other identifiers?) that these names mean little.",
            err=True,
        )
    click.echo(adata.obs["scbert_cell_type"].value_counts().to_string(header=False))
    temporary = output.with_name(f"{output.name}.tmp")
    try:
        adata.write_h5ad(temporary)
        temporary.replace(output)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise click.ClickException(f"{output} could not be written: {error}.") from None
    click.echo(f"Wrote {output}")


@main.command()
@click.argument("names", nargs=-1, metavar="[NAME]...")
@click.option("--all", "everything", is_flag=True, help="All that the profile uses.")
@click.option("--profile", type=click.Choice(["demo", "small", "paper"]), help="For --all and --list.")
@click.option("--list", "only_list", is_flag=True, help="Print what there is, with size and licence; fetch nothing.")
def fetch(names, everything, profile, only_list):
    """Fetch data sets, gene lists and weights by name, each held to its pinned hash."""
    from .sources import datasets
    from .sources.download import cache_directory

    if only_list:
        try:
            table = datasets.list_catalogue(profile)
        except (OSError, ValueError) as error:
            raise click.ClickException(str(error)) from None
        shown = table.sort_values("kind", kind="stable").drop(columns="title")
        widths = [max(map(len, [column, *shown[column]])) + 2 for column in shown]
        for name, row in [("", shown.columns), *zip(shown.index, shown.to_numpy(), strict=True)]:
            click.echo(name.ljust(24) + "".join(map(str.ljust, row, widths)).rstrip())
        click.echo(f"\nFiles are kept in {cache_directory()} (SCBERT_CACHE), and looked for in SCBERT_MIRROR first.")
        return
    if not names and not everything:
        raise click.ClickException("Name what to fetch, or say --all --profile small; scbert fetch --list shows it.")
    unknown = [name for name in names if name not in datasets.CATALOGUE]
    if unknown:
        raise click.ClickException(
            f"Not in the catalogue: {', '.join(unknown)}. It has: {', '.join(datasets.CATALOGUE)}. Nothing was fetched."
        )
    # By hand is by name only: --all should not fail for what no one can automate.
    used = datasets.list_names(profile) if everything else []
    wanted = [name for name in used if datasets.CATALOGUE[name]["files"]]
    failed = []
    for name in dict.fromkeys([*names, *wanted]):
        try:
            files = datasets.fetch(name)
            where = f"{len(files)} file(s) in {files[0].parent}" if files else "comes with scanpy"
            click.echo(f"{name}: {where}. Licence: {datasets.CATALOGUE[name]['licence']}.")
        except ValueError as error:
            failed.append(name)
            click.echo(f"{name}: {error}", err=True)
    by_hand = [name for name in used if datasets.CATALOGUE[name].get("by_hand")]
    if by_hand:
        click.echo(f"To be downloaded by hand, scbert fetch NAME says how: {', '.join(by_hand)}.")
    if failed:
        raise click.ClickException(f"Not fetched: {', '.join(failed)}. What was fetched is kept.")


@main.command()
@click.argument("source", type=click.Path(path_type=Path))
@click.argument("destination", type=click.Path(path_type=Path))
@click.option(
    "--genes", type=click.Path(path_type=Path), help="Gene names, one a line; the published ones if left out."
)
def convert(source, destination, genes):
    """Turn a published checkpoint into a bundle directory, with the licence of its weights on the card."""
    from .model import published

    try:
        names = None if genes is None else genes.read_text().split()
    except (OSError, ValueError) as error:
        raise click.ClickException(f"{genes} cannot be read as a list of genes ({error}).") from None
    try:
        published.convert(source, destination, names)
    except (OSError, ValueError) as error:
        raise click.ClickException(str(error)) from None
    click.echo(f"Wrote {destination}")


@main.command()
@click.option("--profile", default="demo", show_default=True)
@click.option("-o", "--output", default="report", show_default=True, type=click.Path(path_type=Path))
def report(profile, output):
    """Turn the executed notebooks of a profile into HTML, with an index page."""
    from nbconvert import HTMLExporter

    notebooks = sorted(record.run_directory(profile, "x").parent.glob("*/*.ipynb"))
    if not notebooks:
        raise click.ClickException(
            f"No notebook of the {profile} profile was run yet: make reproduce PROFILE={profile}."
        )
    rows = []
    for path in notebooks:
        record.write_text(output / f"{path.stem}.html", HTMLExporter().from_filename(str(path))[0])
        file = path.parent / "record.json"
        done = json.loads(file.read_text()) if file.exists() else None
        state = f"{done['seconds']:.0f} s, {len(done['checks'])} checks passed" if done else "did not finish"
        rows.append(f'<li><a href="{path.stem}.html">{path.stem}</a>: {state}</li>')
    page = (
        f"<!doctype html><html lang=en><meta charset=utf-8><title>scBERT companion, {profile} profile</title>"
        "<style>body{font:16px/1.6 sans-serif;max-width:44em;margin:3em auto;padding:0 1em}</style>"
        f"<h1>scBERT companion: {profile} profile</h1><p>Executed notebooks. Only the paper profile is a reproduction.</p>"
        f"<ul>{''.join(rows)}</ul></html>\n"
    )
    record.write_text(output / "index.html", page)
    scoreboard = record.run_directory(profile, "11_scoreboard") / "scoreboard.csv"
    if scoreboard.exists():
        import pandas as pd

        click.echo(pd.read_csv(scoreboard).fillna("").to_string(index=False))
    click.echo(f"Wrote {output / 'index.html'}")


if __name__ == "__main__":
    main()
