"""No cell on both sides: cells that two sets share, one saved split, and types too small for a claim."""

import gzip
from collections.abc import Sequence
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
from scipy import sparse

from ..data.checks import check_unique
from ..data.counts import is_whole, iterate_rows
from ..sources.datasets import CATALOGUE
from ..sources.readers.tables import BARCODE

SPLITS = Path(__file__).parent / "splits"

SAME_CELL = 0.6
"""Overlap of counts from which equal barcodes are one cell: cells counted by two versions of Cell Ranger had .88 or more,
unrelated ones with equal barcodes .43 at most (443 pairs of 15 sets)."""


def find_duplicates(adata: anndata.AnnData, other: anndata.AnnData, *, minimum_genes: int = 10) -> pd.DataFrame:
    """Find the cells of one set that are in another: the same barcode, and about the same counts on the genes of both.

    One library counted by two pipelines has other counts in nearly every cell: 297 of 300 cells of GSE115189 are those of
    10x's pbmc3k. So what two cells share is measured: the sum of the smaller of both counts over that of the larger.

    Parameters
    ----------
    adata, other
        Counts. Only cells with equal barcodes are compared: 14 to 16 letters A, C, G, T anywhere in the cell's name.
    minimum_genes
        How many genes of both sets must have a count in the cell before its counts count as evidence. Of 64,000
        random pairs of unrelated blood cells with 5 genes or more none had equal counts; with one gene one in 30 had.

    Returns
    -------
    One row a pair: cell, other_cell, barcode, shared_genes (in both sets), expressed_genes (of these, with a count),
    shared_counts (on these) and overlap, 1 for equal counts and `SAME_CELL` or more. ``.attrs`` says what else was met:
    "same_barcode", pairs with equal barcodes; "by_chance", those of them with other counts; "undecided", those with
    the same counts on too few genes; "without_barcode", cells of either set that cannot be compared.

    A ValueError: the sets share no gene name, gene names are duplicated, or only one of the sets holds whole counts.
    """
    check_unique(adata.var_names, "Gene names of adata")
    check_unique(other.var_names, "Gene names of other")
    if len({all(is_whole(rows) for _, rows in iterate_rows(each)) for each in (adata, other)}) > 1:
        raise ValueError(
            "One of the sets holds counts and the other fractional values (log-normalised?): give counts of both."
        )
    genes = adata.var_names.intersection(other.var_names)
    if not len(genes):
        raise ValueError(
            f"The sets share no gene name ({adata.var_names[0]}, ... and {other.var_names[0]}, ...): their cells cannot "
            "be compared before both use the same symbols."
        )
    barcodes = [[match and match[0] for match in map(BARCODE.search, each.obs_names)] for each in (adata, other)]
    left, right = (
        pd.DataFrame({"barcode": found, number: np.arange(len(found))}).dropna()
        for found, number in zip(barcodes, ("row", "other_row"), strict=True)
    )
    pairs = left.merge(right, on="barcode")
    mine = _take(adata, pairs["row"].to_numpy(), genes)
    theirs = _take(other, pairs["other_row"].to_numpy(), genes)
    smaller, larger = (
        np.asarray(part.sum(axis=1), np.float64).ravel() for part in (mine.minimum(theirs), mine.maximum(theirs))
    )
    overlap = np.divide(smaller, larger, out=np.ones(len(pairs)), where=larger > 0)
    differs = overlap < SAME_CELL
    expressed = mine.getnnz(axis=1)
    few = ~differs & (expressed < minimum_genes)
    columns = {
        "cell": adata.obs_names[pairs["row"]],
        "other_cell": other.obs_names[pairs["other_row"]],
        "barcode": pairs["barcode"].to_numpy(),
        "shared_genes": len(genes),
        "expressed_genes": expressed,
        "shared_counts": np.asarray(mine.sum(axis=1)).ravel(),
        "overlap": overlap,
    }
    found = pd.DataFrame(columns)[~differs & ~few].reset_index(drop=True)
    found.attrs = {
        "same_barcode": len(pairs),
        "by_chance": int(differs.sum()),
        "undecided": int(few.sum()),
        "without_barcode": adata.n_obs + other.n_obs - len(left) - len(right),
    }
    return found


def _take(adata, rows, genes):
    """Return counts of the given rows, which may repeat, on the given genes: (rows, genes), no stored zeros."""
    unique, position = np.unique(rows, return_inverse=True)
    counts = sparse.csr_matrix(adata.X[unique])[position][:, adata.var_names.get_indexer(genes)]
    counts.eliminate_zeros()
    return counts


def drop_duplicates(adata: anndata.AnnData, other: anndata.AnnData, name: str = "the other set") -> anndata.AnnData:
    """Return the cells of `adata` that are not, nor may be, in `other`, see `find_duplicates`; print how many were dropped."""
    found = find_duplicates(adata, other, minimum_genes=0)
    kept = ~adata.obs_names.isin(found["cell"])
    met = found.attrs
    if met["without_barcode"]:
        print(f"{met['without_barcode']:,} of the {adata.n_obs + other.n_obs:,} cells have no barcode: not compared.")
    print(
        f"{(~kept).sum()} of {adata.n_obs:,} cells are in {name} too and were dropped; "
        f"{met['by_chance']} shared no more than the barcode."
    )
    return adata[kept].copy()


def save_split(split: pd.DataFrame, path: str | Path) -> None:
    """Write a split, a row a cell, as gzipped CSV, the same bytes each time."""
    text = split.to_csv(lineterminator="\n").encode()
    with open(path, "wb") as raw, gzip.GzipFile(filename="", mode="wb", fileobj=raw, mtime=0) as file:
        file.write(text)


def saved_splits() -> list[str]:
    """Return the names of the sets that have a saved split, or batches of which the catalogue says that they are tested."""
    return sorted([path.name.split(".")[0] for path in SPLITS.glob("*.csv.gz")] + [*find_tested()])


def find_tested() -> dict[str, list[str]]:
    """Return set -> its batches that are tested, whatever trains: of `kang_pbmc` two donors, who are in no pool."""
    return {name: entry["tested"] for name, entry in CATALOGUE.items() if "tested" in entry}


def load_split(adata: anndata.AnnData, name: str = "zheng_facs") -> tuple[np.ndarray, np.ndarray]:
    """Return the saved split of all cells of a set, in any order, as (training, test) cell numbers, sorted.

    "zheng_facs": 70 and 30 % of each label, made once and for all by ``tests/make_split.py``. Pretraining sees the 70
    only; whatever trains, trains inside the 70 and reports on the 30. Of a set of
    `find_tested` its batches are tested. Other splits are files of ``scbert/evaluate/splits``; no such file, or other cells
    than the split's, is a ValueError.
    """
    if tested := find_tested().get(name):
        is_tested = adata.obs["batch"].isin(tested).to_numpy()
        return np.flatnonzero(~is_tested), np.flatnonzero(is_tested)
    file = SPLITS / f"{name}.csv.gz"
    if not file.exists():
        raise ValueError(f"There is no saved split of {name}; there are: {', '.join(saved_splits())}.")
    parts = pd.read_csv(file, index_col="cell", dtype=str)["part"]
    check_unique(adata.obs_names, f"Cell names of {name}")
    unknown, missing = adata.obs_names.difference(parts.index), parts.index.difference(adata.obs_names)
    if len(unknown) or len(missing):
        raise ValueError(
            f"These are not the {len(parts):,} cells of the split {name}: {len(unknown):,} are not in it and "
            f"{len(missing):,} of it are missing (first: {[*unknown, *missing][0]}); give it the whole set, unfiltered."
        )
    part = parts.loc[adata.obs_names].to_numpy()
    return np.flatnonzero(part == "train"), np.flatnonzero(part == "test")


def mark_small_classes(labels: Sequence[str], minimum: int = 20) -> pd.DataFrame:
    """Count the cells of each label, the largest first, ties by name, and mark those too `small` for a claim on them alone.

    A label of `minimum` cells is large enough; `scbert.evaluate.score` leaves the others out of ``macro_f1_common``.
    """
    cells = pd.Series(np.asarray(labels, dtype=str)).value_counts().rename_axis("label").to_frame("cells")
    cells = cells.sort_index().sort_values("cells", ascending=False, kind="stable")
    return cells.assign(small=cells["cells"] < minimum)
