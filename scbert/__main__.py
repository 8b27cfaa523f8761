"""The command line: run a notebook, fetch data, annotate a file, make the report. Nothing that a notebook could not do."""

import contextlib
import logging
import warnings
from pathlib import Path

import click

from .paths import find_rank, make_writable, remove, run_directory, say_unfinished


@contextlib.contextmanager
def in_a_sentence():
    """Let what can't be done end the program with a sentence, and no traceback."""
    try:
        yield
    except (OSError, ValueError) as error:
        raise click.ClickException(str(error)) from None
    except (MemoryError, RuntimeError) as error:
        of_torch = any(
            words in str(error) for words in ("allocate memory", "create a primitive")
        )  # it has no type for it
        if not isinstance(error, MemoryError) and not of_torch:
            raise
        raise click.ClickException(
            "There is not enough memory: close other programs, take fewer cells at a time, or see docs/cluster.md, "
            "More cells than memory."
        ) from None


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="scbert-companion", prog_name="scbert")
def main():
    """Reproduce, learn from, and adapt scBERT."""
    logging.getLogger("papermill").setLevel(logging.ERROR)


@main.command(add_help_option=False)
@click.argument("notebook", required=False)
@click.option("-p", "pairs", nargs=2, multiple=True, metavar="NAME VALUE", help="Set a parameter; repeatable.")
@click.option("--profile", default="demo", show_default=True, help="demo, small, large or paper.")
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
    from .run import notebooks

    source = notebooks.find_notebook(notebook)
    offered = notebooks.read_parameters(source)
    if wants_help:
        click.echo(f"scbert run {notebook} [-p NAME VALUE]... [--profile demo|small|large|paper]\n\n{source.stem}\n")
        for name, (kind, default, text) in offered.items():
            if name == "profile":  # chosen by --profile
                continue
            click.echo(f"  -p {name} {kind.upper()}".ljust(34) + f"{text}  [{default}]")
        if "dataset" in offered:
            click.echo("  -p labels STR".ljust(34) + 'table of labels; also as dataset "matrix.mtx with labels.csv"')
        return
    parameters = notebooks.choose_parameters(source, offered, profile, dict(pairs))
    share = notebooks.choose_part(source, part)
    if find_rank():
        notebooks.run_beside(source, parameters)
        return
    notebooks.check_room(profile, [source], parameters, anyway=anyway)
    folder = run_directory(profile, source.stem)
    try:
        make_writable(folder)
    except ValueError as error:
        raise click.ClickException(f"{error} Nothing was run.") from None
    if share:
        notebooks.run_part(source, folder / "parts" / f"{share[0]}of{share[1]}.ipynb", parameters)
        return
    notebooks.execute(source, folder / f"{source.stem}.ipynb", parameters)
    for line in list_found(folder / "record.json"):
        click.echo(line)
    click.echo(f"Wrote {folder}")


def list_found(file):
    """Return lines on what a run put on record: the accuracy of each method on each whole set, and each warning."""
    import json
    import re

    record = json.loads(file.read_text()) if file.exists() else {"metrics": {}}
    form = "{0} on {1}: accuracy {value:.3f} [{low:.3f}, {high:.3f}], {n:,} cells"
    found = [
        form.format(name[2].replace("_", " "), name[1], **metric)
        for text, metric in record["metrics"].items()
        if (name := re.fullmatch("([^:/]*)/([^/]*)/accuracy", text))
    ]
    return found + [f"Warning: {sentence}" for sentence in record.get("warnings", [])]


@main.command()
@click.option("--profile", default="demo", show_default=True, help="demo, small, large or paper.")
@click.option("--jobs", type=click.IntRange(1), default=1, show_default=True, help="Notebooks that run at once.")
@click.option("--parts", type=click.IntRange(1), default=1, show_default=True, help="Shares of a benchmark.")
@click.option("--anyway", is_flag=True, help="Only list; do not fail where something is short.")
@click.option("--count-jobs", is_flag=True, help="Only print how many notebooks to run at once here.")
def preflight(profile, jobs, parts, anyway, count_jobs):
    """List what the notebooks of a profile need, and compare it with what this machine has."""
    from .run.notebooks import check_room
    from .run.preflight import count_jobs as count
    from .run.preflight import list_needs

    if count_jobs:
        with in_a_sentence():
            click.echo(count(list_needs(profile), parts=parts))
        return
    check_room(profile, jobs=jobs, parts=parts, anyway=anyway)


@main.command()
@click.argument("source", type=click.Path(path_type=Path))
@click.option("--model", required=True, type=click.Path(path_type=Path), help="Folder of an annotator.")
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="What to write: .h5ad, or .csv.")
@click.option("--csv", "table", type=click.Path(path_type=Path), help="Also write the names as a table.")
@click.option("--umap", type=click.Path(path_type=Path), help="Also draw the named cells, as .png or .pdf.")
@click.option(
    "--unassigned-below", type=click.FloatRange(0, 1), default=0.5, show_default=True, help="Less probable: Unassigned."
)
@click.option("--batch-size", type=click.IntRange(1), help="Cells a forward pass; chosen by their length if not given.")
@click.option("--rename-genes", is_flag=True, help="Trace old symbols and Ensembl identifiers to the model's genes.")
@click.option(
    "--round-counts", is_flag=True, help="Round counts with fractions (estimated, corrected) to whole numbers."
)
@click.option("--overwrite", is_flag=True, help="Replace an output that is there.")
def annotate(source, model, output, table, umap, unassigned_below, batch_size, rename_genes, round_counts, overwrite):
    """Annotate the raw counts of a file with a fine-tuned model."""
    from .run.annotated import check_output, describe_model, hold_output, summarise, write_annotated

    with in_a_sentence():
        for file in filter(None, (output, table)):
            check_output(source, file, overwrite)
        if table is not None and table.suffix != ".csv":
            raise ValueError(f"--csv {table} must end in .csv.")
        kept = click.get_current_context().with_resource(hold_output(output))
        check_output(source, output, overwrite)  # another program may have written it by now
    import scbert

    with in_a_sentence():
        if not model.exists():
            raise ValueError(f"There is no folder {model}. Did the run that makes it end with an error?")
        if sentence := say_unfinished(model):
            raise ValueError(sentence)
        if (model / "annotator").is_dir():
            raise ValueError(f"{model} is the folder of a run: give --model {model / 'annotator'}.")
        classifier = scbert.load(model)
        if not isinstance(classifier, scbert.Classifier):
            raise ValueError(f"{model} is an encoder without labels: fine-tune it first (notebook 03).")
        click.echo(describe_model(model, classifier.labels))
        options = {"unassigned_below": unassigned_below, "batch_size": batch_size}
        with warnings.catch_warnings(record=True) as heard:
            warnings.simplefilter("always", UserWarning)
            adata = scbert.datasets.read(source, round_counts=round_counts)
            earlier = ", ".join(column for column in map(str, adata.obs) if column.startswith("scbert_"))
            if earlier:
                click.echo(f"Warning: {source} was annotated before: {earlier} are written anew.", err=True)
            rename = scbert.genes.rename_genes if rename_genes else scbert.genes.tidy_names
            read = rename(adata, classifier.genes)
            scbert.annotate(read, classifier, progress=True, name=str(source), keep=kept, **options)
    if read is not adata:  # what is written keeps the file's own names
        adata.obs, adata.uns = read.obs, read.uns
        adata.obsm.update(read.obsm)
    say_annotated(adata, classifier, heard)
    click.echo(summarise(adata).to_string(na_rep=""))
    with in_a_sentence():
        for file in filter(None, (output, table)):
            check_output(source, file, overwrite)
            write_annotated(adata, file)
            click.echo(f"Wrote {file}")
        remove(kept)
    if umap is not None:
        from .figures import plot

        plot.place_cells(adata)
        axes = plot.annotation(adata, adata.obs[["scbert_cell_type", "scbert_confidence"]])
        axes[0].figure.savefig(umap, bbox_inches="tight", dpi=150)
        click.echo(f"Wrote {umap}")


def say_annotated(adata, classifier, heard):
    """Print how many genes were found, how well the model did on validation cells, and each warning on a line."""
    from .model.bundle import say_outcome

    report = adata.uns["scbert"]["annotate"]
    click.echo(
        f"Genes: {report['genes_matched']:,} of the model's {report['genes_in_vocabulary']:,} found "
        f"({report['matched_share']:.1%}), {report['cells_without_tokens']:,} cells without any of them; "
        f"{report['genes_ignored']:,} that training never saw are ignored."
    )
    for line in list_scores(classifier.memory):
        click.echo(line)
    if classifier.outcome.get("state") == "unfinished":
        click.echo(f"Warning: {say_outcome(classifier.outcome)}", err=True)
    for message in dict.fromkeys(str(warning.message) for warning in heard):
        click.echo(f"Warning: {message}", err=True)


def list_scores(memory):
    """Return lines on how well each method did on validation cells, the best first; none for a bundle without."""
    import numpy as np

    from .memory.companions import METHODS

    if "scores" not in memory:
        return ["The model has no memory of its training cells: nothing tells how far its names can be trusted."]
    scores, n = memory["scores"].numpy(), int(memory["n_validation"])
    lines = [f"On {n:,} validation cells of its training set, by macro-F1:"]
    for i in np.argsort(-scores[:, 1], kind="stable"):
        name = METHODS[i].replace("_", " ").replace("scbert", "scBERT")
        lines.append(f"  {name}: macro-F1 {scores[i, 1]:.3f}, accuracy {scores[i, 0]:.3f}")
    return lines


@main.command()
@click.argument("names", nargs=-1, metavar="[NAME]...")
@click.option("--all", "everything", is_flag=True, help="All that the profile uses.")
@click.option("--profile", type=click.Choice(["demo", "small", "large", "paper"]), help="For --all and --list.")
@click.option("--list", "only_list", is_flag=True, help="Print what there is, with size and licence; fetch nothing.")
def fetch(names, everything, profile, only_list):
    """Fetch data sets, gene lists and weights by name, each held to its pinned hash."""
    from .sources import datasets
    from .sources.download import cache_directory

    if only_list:
        with in_a_sentence():
            table = datasets.list_catalogue(profile)
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
    from .sources import weights

    try:
        names = None if genes is None else genes.read_text().split()
    except (OSError, ValueError) as error:
        raise click.ClickException(f"{genes} cannot be read as a list of genes ({error}).") from None
    with in_a_sentence():
        weights.convert(source, destination, names)
    click.echo(f"Wrote {destination}")


@main.command()
@click.option("--profile", default="demo", show_default=True)
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), help="A folder; $SCBERT_RUNS/report or, without it, report."
)
def report(profile, output):
    """Turn the executed notebooks of a profile into HTML, with an index page."""
    import os

    from .run.notebooks import check_clone
    from .run.report import write_report

    output = output or Path(os.environ.get("SCBERT_RUNS", "")) / "report"
    if not run_directory(profile, "x").parent.is_dir():  # nothing was run, or not here
        check_clone("scbert report")
    with in_a_sentence(), warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always", UserWarning)
        scoreboard = write_report(profile, output)
    for warning in heard:
        click.echo(f"Warning: {warning.message}", err=True)
    if scoreboard is not None:
        click.echo(scoreboard.fillna("").to_string(index=False))
    click.echo(f"Wrote {output / 'index.html'}")


if __name__ == "__main__":
    main()
