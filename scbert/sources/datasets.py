"""Cells by name or by path: always counts in `X`, and labels and batches where they are asked for."""

import difflib
import os
import re
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import yaml
from scipy import sparse

from ..data.checks import check_column, check_counts, check_unique
from ..paths import find_file, first_line
from ..sources import download, readers, sets
from .simulate import simulate_studies
from .totals import supply_totals

__all__ = ["CATALOGUE", "fetch", "list_catalogue", "load", "missing_files", "simulate_studies"]

NO_LABEL = {"", "nan", "na", "n/a", "none", "null", "unassigned"}
CATALOGUE: dict[str, dict] = yaml.safe_load((Path(__file__).parent / "catalogue.yaml").read_text())
"""Name -> address, hash, licence, citation, reader and caveats of everything that can be fetched."""
SHUFFLED = " shuffled"
"""What stands behind a `label_key` for a control without anything to learn."""


def load(
    name: str | Path,
    *,
    label_key: str | None = None,
    batch_key: str | None = None,
    labels: str | Path | None = None,
    backed: bool = False,
    round_counts: bool = False,
) -> anndata.AnnData:
    """Load a data set of the catalogue, or one's own file, as counts.

    Parameters
    ----------
    name
        A name of the catalogue (`list_catalogue`), fetched if it is not here yet, or the path of a file with raw
        counts, from the current folder or from the root of the project: ``.h5ad``, or any format of
        `scbert.readers.read_cells`. "matrix.mtx with table.csv" names `labels` too.
    label_key, batch_key
        Columns of ``obs`` that must be there, of other names than those that scbert writes (``scbert_...``). Catalogue
        sets have "batch" and, if labelled, "cell_type" and "cell_type_broad", a coarser name that several sets share.
        "cell_type shuffled" is a control: the labels of that column, each given to another cell, as a column of this name.
    labels
        A table (CSV or TSV) that has the two columns, and names the cells in one called barcode or cell, or in its first.
        Cells without a label in it are left out, and counted.
    backed
        Leave the matrix on disk (``.h5ad`` files only).
    round_counts
        Round the fractional counts of one's own file to whole numbers; what is within rounding of one always is.

    Returns
    -------
    Cells x genes with whole, non-negative counts in ``X``; where a set's counts are fractional,
    ``uns["scbert"]["fractional_counts"]`` says why. ``obs["n_counts"]`` is the total over all measured genes where
    ``X`` holds a selection of them: taken from the file, else there is a warning, see `scbert.totals`.
    ``uns["scbert"]["caveat"]`` is what to bear in mind about a catalogue set.

    Cells that stand in the file twice, by their counts of ten genes or more, are left in it once, and that is printed.

    A ValueError: no such set or file, another format, no counts, duplicated genes, an empty cell, or a label or batch
    column that is missing, incomplete or (labels) constant; a table that names none of the cells, or one twice; and
    what `fetch` raises.

    Paper: Reporting Summary, "Data". Labels are merged by the tables in ``scbert/sources/labels``.
    """
    name, *table = part_names(str(name), " with ")
    adata = read(name, backed=backed, round_counts=round_counts)
    if labels or table:
        whole = label_key and label_key.removesuffix(SHUFFLED)
        adata = _join_table(adata, find_cells(labels or table[0]), name, whole, batch_key)
    check_counts(adata, str(name))
    adata = _drop_copies(adata, str(name))
    if label_key and label_key.endswith(SHUFFLED) and label_key not in adata.obs:
        check_column(adata, label_key.removesuffix(SHUFFLED), str(name), constant_is_fine=False)
        adata.obs[label_key] = np.random.default_rng(0).permutation(adata.obs[label_key.removesuffix(SHUFFLED)])
        print(f"{name}: a control, in which each cell has the label of another: what is told apart now is an error.")
    if label_key:
        check_column(adata, label_key, str(name), constant_is_fine=False)
        names = adata.obs[label_key].astype(str)  # cluster numbers are names too
        _check_labels(names, label_key, str(name))
        adata.obs[label_key] = names.astype("category")
    if batch_key:
        check_column(adata, batch_key, str(name), constant_is_fine=True)
    return adata


def _drop_copies(adata, name, minimum_genes=10):
    """Leave out cells with the same counts as an earlier one: they would be on both sides of a split. Not of a backed file."""
    if adata.isbacked:
        return adata
    counts = sparse.csr_matrix(adata.X, dtype=np.float32, copy=True)
    counts.eliminate_zeros()
    counts.sort_indices()
    ends = zip(counts.indptr, counts.indptr[1:], strict=False)
    rows = pd.Series([hash((counts.indices[i:j].tobytes(), counts.data[i:j].tobytes())) for i, j in ends])
    copies = rows.duplicated().to_numpy() & (np.diff(counts.indptr) >= minimum_genes)
    if not copies.any():
        return adata
    print(f"{name}: {copies.sum():,} of {adata.n_obs:,} cells have the same counts as another, and are left out.")
    return adata[~copies].copy()


def _check_labels(labels, key, name):
    """Raise a ValueError for labels that are no types, or have blanks around them."""
    wrong = labels.str.strip().str.lower().isin(NO_LABEL) | (labels != labels.str.strip())
    if wrong.any():
        names = ", ".join(map(repr, sorted(set(labels[wrong]))))
        raise ValueError(f"{name}: obs[{key!r}] is {names} in {wrong.sum()} cells, no type: drop or correct them.")


def read(name: str | Path, *, backed: bool = False, round_counts: bool = False) -> anndata.AnnData:
    """Read a data set as `load` does, its matrix unchecked: for what passes over it anyway, such as `scbert.annotate`.

    A ValueError says: no such set or file, or another format; a warning, that totals lack (`scbert.totals`).
    """
    if str(name) in CATALOGUE:
        return _read_catalogued(str(name))
    adata = readers.read_cells(find_cells(name), backed, round_counts=round_counts)
    supply_totals(adata, str(name))
    return adata


def find_cells(name: str | Path) -> Path:
    """Return the path of one's own file; a ValueError if there is none."""
    if re.match(r"\w{2,}:/", str(name)):
        raise ValueError(f"{name} is an address: download the file, and give its path.")
    path = find_file(Path(name).expanduser())
    if not path.exists():
        known = [key for key, entry in CATALOGUE.items() if entry["kind"] == "cells"]
        near = difflib.get_close_matches(str(name), known) or known
        raise ValueError(f"There is no file {path}, and no data set of that name in the catalogue ({', '.join(near)}).")
    return path


def part_names(text: str, separator: str) -> list[str]:
    """Return what stands between separators; what is as a whole a name of the catalogue, or a file, is not parted."""
    is_file = bool(text.strip()) and os.path.exists(find_file(Path(text.strip()).expanduser()))
    return [part.strip() for part in ([text] if is_file or text in CATALOGUE else text.split(separator))]


def name_sets(text: str) -> list[str]:
    """Return the sets and files that a notebook's parameter names, such as "one -> other by column; third + fourth"."""
    arrows = [part_names(part, " by ")[0] for part in part_names(text, ";")]
    sums = [name for arrow in arrows for name in part_names(arrow, "->")]
    return [name for each in sums for name in part_names(each, " + ") if name]


def _join_table(adata, path, name, label_key, batch_key):
    """Return the cells that have a label in a table, with its columns."""
    try:
        table = pd.read_csv(path, sep="," if ".csv" in path.name.lower() else "\t", dtype=str)
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read as a table of labels ({first_line(error)}).") from None
    if not isinstance(table.index, pd.RangeIndex):  # R's header lacks the column of names
        table = table.rename_axis("cell" if "cell" not in table else "name of the row").reset_index()
    if label_key not in table:
        raise ValueError(f"{path} has no column {label_key!r} for label_key; it has: {', '.join(table)}.")
    if len(table.columns) < 2:
        raise ValueError(f"{path} has one column only: another must name the cells, first or called barcode or cell.")
    keys = [key for key in dict.fromkeys([label_key, batch_key]) if key in table]
    named = [column for column in table if column.lower() in ("barcode", "cell") and column not in keys]
    table = table.set_index((named or list(table))[0])[keys].dropna(subset=label_key)
    cells = adata.obs_names.astype(str)
    if not cells.isin(table.index).any():  # the "-1" of Cell Ranger may stand on one side only
        bare = cells.str.replace(r"-\d+$", "", regex=True)
        print(f"No cell is named alike in {name} and {path.name}: the ends of barcodes, such as -1, are ignored.")
        cells, table.index = bare if bare.is_unique else cells, table.index.str.replace(r"-\d+$", "", regex=True)
    check_unique(table.index, f"Cells of {path}")
    known = cells.isin(table.index)
    if not known.any():
        raise ValueError(
            f"None of the cells of {name} ({cells[0]}, ...) has a label in {path} ({', '.join(table.index[:1])}, ...)."
        )
    if not known.all():
        print(f"{known.sum():,} of {len(known):,} cells have a label in {path.name}; the others are left out.")
        adata = (adata.to_memory() if adata.isbacked else adata)[known].copy()
    adata.obs[keys] = table.loc[cells[known]].to_numpy()
    return adata


def _read_catalogued(name):
    entry = CATALOGUE[name]
    if entry["kind"] != "cells":
        raise ValueError(f"{name} is no data set of cells but {entry['title']}: scbert.datasets.fetch({name!r}).")
    adata = getattr(sets, entry["reader"])(fetch(name))
    for column, values in entry.get("only", {}).items():
        adata = adata[adata.obs[column].isin(values)].copy()
    expected = entry.get("shape", [entry.get("cells", adata.n_obs), adata.n_vars])
    if list(adata.shape) != expected:
        raise ValueError(
            f"{name} was read as {adata.n_obs:,} cells x {adata.n_vars:,} genes, where {expected[0]:,} x "
            f"{expected[1]:,} are due: the file is another one."
        )
    if entry["labels"]:
        _name_cell_types(adata, name)
    elif "label" in adata.obs:
        adata.obs = adata.obs.rename(columns={"label": "cell_type"})
    for column in ("cell_type", "batch"):
        if column in adata.obs:
            adata.obs[column] = adata.obs[column].astype("category")
    notes = {"caveat": entry["caveat"]}
    if entry.get("fractional"):
        notes["fractional_counts"] = entry["fractional"]
    adata.uns["scbert"] = notes
    return adata


def _name_cell_types(adata, name):
    """Replace the file's labels by the names that stand beside them in ``scbert/sources/labels/<name>.csv``."""
    table = read_labels(name)
    labels = adata.obs.pop("label")
    unknown = sorted(set(labels.dropna().astype(str)) - set(table.index))
    if unknown or labels.isna().any():
        what = (
            f"labels that scbert/sources/labels/{name}.csv does not name: {', '.join(unknown)}"
            if unknown
            else "unlabelled cells"
        )
        raise ValueError(f"{name} has {what}. Add them to that table, or drop the cells.")
    for column in reversed(table.columns):
        adata.obs.insert(0, column, pd.Categorical(labels.astype(str).map(table[column])))


def read_labels(name: str) -> pd.DataFrame:
    """Return a set's table of labels: the file's own name -> `cell_type`, `cell_type_broad`."""
    return pd.read_csv(Path(__file__).parent / "labels" / f"{name}.csv", index_col="label", dtype=str)


def fetch(name: str, *, progress: bool = True) -> list[Path]:
    """Return the files of a catalogue entry, each with the pinned hash, downloading what is not here yet.

    A ValueError says: no such entry; a file that has to be downloaded by hand is not there (which, from where, and where
    to put it); or what `scbert.download.fetch_file` says.
    """
    if name not in CATALOGUE:
        raise ValueError(f"{name} is not in the catalogue. It has: {', '.join(CATALOGUE)}.")
    by_hand = CATALOGUE[name].get("by_hand")
    if by_hand:
        folder, missing = folder_by_hand(name), missing_by_hand(name)
        if missing:
            raise ValueError(
                f"{name} has no address that can be pinned: download {' and '.join(missing)} from {by_hand['from']}, "
                f"put {'them' if len(missing) > 1 else 'it'} into {folder}, and call again."
            )
        return [folder / file for file in by_hand["files"]]
    return [download.fetch_file(file, progress=progress) for file in CATALOGUE[name]["files"]]


def folder_by_hand(name: str) -> Path:
    """Return the folder where files of a set that the user downloads are looked for."""
    return download.cache_directory() / "by_hand" / name


def missing_by_hand(name: str) -> list[str]:
    """Return the names of the files that the user still has to download, none for an entry with pinned addresses."""
    wanted = CATALOGUE[name].get("by_hand", {}).get("files", [])
    return [file for file in wanted if not (folder_by_hand(name) / file).is_file()]


def missing_files(name: str) -> list[dict]:
    """Return the files of an entry that would have to be downloaded: `url`, `bytes` and hash of each."""
    return [file for file in CATALOGUE[name]["files"] if download.find_copy(file) is None]


def list_names(profile: str | None = None) -> list[str]:
    """Return the names of the entries that a profile uses: those of demo, also those of small, or all (paper, None)."""
    order = ("demo", "small", "large", "paper")
    last = order.index(profile) if profile else len(order)
    return [name for name, entry in CATALOGUE.items() if order.index(entry["profile"]) <= last]


def list_catalogue(profile: str | None = None) -> pd.DataFrame:
    """Return what a profile uses (all, if None), one row an entry: kind, title, size, licence, profile, and whether it is here."""
    rows = {}
    for name in list_names(profile):
        entry = CATALOGUE[name]
        sizes = [file["bytes"] for file in entry["files"]]
        by_hand = entry.get("by_hand")
        size = None if None in sizes else sum(sizes)
        state = "by hand" if by_hand else "with scanpy" if not sizes else "to fetch" if missing_files(name) else "here"
        text = "" if by_hand or not sizes else download.format_bytes(size)
        rows[name] = {"kind": entry["kind"], "profile": entry["profile"], "size": text, "state": state,
                      "licence": entry["licence"], "title": entry["title"]}  # fmt: skip
    return pd.DataFrame.from_dict(rows, orient="index")
