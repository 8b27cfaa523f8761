"""What `scbert annotate` leaves: a file of annotated cells or a table of their names, never over what was good."""

import contextlib
import os
import re
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import anndata
import filelock
import h5py
import pandas as pd

from ..paths import first_line, remove, replace_whole

COLUMNS = ("cell_type", "cell_type_ontology_term_id", "confidence", "consensus", "agreement", "logistic_regression",
           "nearest_centroid", "distance", "unlike_training")  # fmt: skip
"""Of ``obs`` that `scbert.annotate` writes, each after ``scbert_``, in the order of the table."""


def check_output(source: Path, output: Path, overwrite: bool) -> None:
    """Raise a ValueError, before any work, if the output can't be written, or would replace something else.

    A name that ends in .h5ad is the annotated file, one in .csv a table. A file that is there is replaced only if
    `overwrite` says so and it is of the same kind; the input is never replaced.
    """
    if output.is_dir():
        raise ValueError(f"{output} is a folder: name a file in it.")
    if output.suffix not in (".h5ad", ".csv"):
        raise ValueError(f"{output} must end in .h5ad (all cells, annotated) or .csv (a table of their names).")
    if not output.parent.is_dir():
        raise ValueError(f"There is no folder {output.parent} to write {output.name} into.")
    if not os.access(output.parent, os.W_OK):
        raise ValueError(f"The folder {output.parent} can't be written to: name another.")
    if output.exists() and source.exists() and output.samefile(source):
        raise ValueError(f"{output} is the input itself: give the annotated file another name.")
    if output.exists() and not overwrite:
        raise ValueError(f"{output} is there already: give another name, or say --overwrite.")
    if output.exists() and output.suffix == ".h5ad" and not h5py.is_hdf5(output):
        raise ValueError(f"{output} is no h5ad file, whatever its name: it is left alone. Give another name.")


@contextlib.contextmanager
def hold_output(output: Path) -> Iterator[Path]:
    """Yield the folder of what is kept for an output until it is written; a ValueError while another program holds it."""
    kept = output.with_name(f"{output.name}.unfinished")
    kept.mkdir(exist_ok=True)
    lock = filelock.FileLock(kept / ".lock")
    try:
        lock.acquire(blocking=False)
    except filelock.Timeout:
        raise ValueError(f"Another scbert annotate is writing {output}: wait for it, or give another name.") from None
    try:
        yield kept
    finally:
        if kept.is_dir() and all(file.name == ".lock" for file in kept.iterdir()):
            remove(kept)
        lock.release()


def describe_model(folder: Path, labels: Sequence[str]) -> str:
    """Return a line on what an annotator learnt from, as its card says, how many labels it knows, and when it was written."""
    card = (folder / "README.md").read_text(encoding="utf-8") if (folder / "README.md").is_file() else ""
    data = ", ".join(re.findall(r"^- (.+), sha256 ", card, re.M)) or "cells that its card does not name"
    key = "".join(re.findall(r"^- label_key: (.+)$", card, re.M)[:1])
    written = time.strftime("%Y-%m-%d %H:%M", time.localtime((folder / "config.json").stat().st_mtime))
    return f"Model: trained on {data}{key and f' ({key})'}, {len(labels)} labels, written {written}."


def write_annotated(adata: anndata.AnnData, output: Path) -> None:
    """Write cells as ``.h5ad``, or their columns of `COLUMNS` as ``.csv``, in one step; a ValueError if that fails."""
    try:
        with replace_whole(output) as temporary:
            if output.suffix == ".csv":
                take_columns(adata).to_csv(temporary, encoding="utf-8")
            else:
                make_plain(adata).write_h5ad(temporary)
    except Exception as error:  # h5py and anndata raise errors of many types
        raise ValueError(
            f"{output} could not be written ({first_line(error)}). The names are not lost for good: the same command with "
            f"-o {output.with_suffix('.csv').name} writes them as a table."
        ) from None


def take_columns(adata: anndata.AnnData) -> pd.DataFrame:
    """Return the columns that `scbert.annotate` wrote, under the names of the cells."""
    names = [f"scbert_{name}" for name in COLUMNS if f"scbert_{name}" in adata.obs]
    return adata.obs[names].rename_axis("cell")


def make_plain(adata: anndata.AnnData) -> anndata.AnnData:
    """Turn the nullable strings of newer anndata into plain ones, in place, since this anndata refuses to write them."""
    adata.obs_names = pd.Index(adata.obs_names.astype(object), name=adata.obs_names.name)  # those of obsm's tables too
    adata.var_names = pd.Index(adata.var_names.astype(object), name=adata.var_names.name)
    for table in (adata.obs, adata.var):
        for name, column in list(table.items()):
            if isinstance(column.dtype, pd.StringDtype):
                table[name] = column.astype(object).where(column.notna(), "")
            elif isinstance(getattr(column.dtype, "categories", column).dtype, pd.StringDtype):
                table[name] = column.cat.rename_categories(column.cat.categories.astype(object))
    return adata


def summarise(adata: anndata.AnnData) -> pd.DataFrame:
    """Return a row a label: cells, their median confidence and, with companions, how many of them all methods agree on."""
    groups = adata.obs.groupby("scbert_cell_type", observed=False)
    table = groups["scbert_confidence"].agg(cells="size", confidence="median")
    if "scbert_cell_type_ontology_term_id" in adata.obs:
        table.insert(0, "ontology_term_id", groups["scbert_cell_type_ontology_term_id"].first())
    if "scbert_agreement" in adata.obs:
        table["all_agree"] = groups["scbert_agreement"].agg(lambda shares: (shares == 1).mean())
        table["unlike_training"] = groups["scbert_unlike_training"].mean()
    return table.sort_values("cells", ascending=False).round(2)
