"""Text tables of genes x cells."""

import csv
import gzip
import re
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
from scipy import sparse

from .matrices import make_cells

NO_CELLS = {"chr", "start", "end", "strand", "length", "gene_id", "gene_name", "gene_symbol"}

COMMON_GENES = {"ACTB", "GAPDH", "B2M", "MALAT1", "RPLP0", "Actb", "Gapdh", "B2m", "Malat1", "Rplp0"}


def read_table(path: Path) -> anndata.AnnData:
    """Read genes x cells, some rows at a time; the separator is that of the first line."""
    separator = find_separator(path)
    with _open_text(path) as file:
        header, first = next(csv.reader(file, delimiter=separator)), next(csv.reader(file, delimiter=separator))
    cells = pd.Index(header if len(header) < len(first) else header[1:])  # R leaves the corner out
    annotation = [name for name in cells if name.lower() in NO_CELLS]
    if annotation:
        raise ValueError(f"its columns {', '.join(annotation)} are no cells: drop them")
    if cells.has_duplicates:
        raise ValueError(f"its header names a cell twice ({cells[cells.duplicated()][0]}): rename one")
    options = {"header": None, "skiprows": 1, "index_col": 0, "dtype": {0: str}, "keep_default_na": False}
    blocks, genes = [], []
    with pd.read_csv(path, sep=separator, chunksize=1000, **options) as chunks:
        for chunk in chunks:
            text = [cells[i] for i in range(len(cells)) if not pd.api.types.is_numeric_dtype(chunk.iloc[:, i])]
            if text:
                raise ValueError(f"its column {text[0]} holds text where counts are due")
            blocks.append(sparse.csr_matrix(chunk.to_numpy(np.float32)))
            genes.extend(chunk.index)
    if all(gene.isdigit() for gene in genes):
        raise ValueError("its rows are numbered, where genes are named")
    rows_are_cells = sum(bool(BARCODE.search(name)) for name in genes) > len(genes) / 2
    if rows_are_cells or COMMON_GENES & set(cells) or sum(name.startswith("ENSG") for name in cells) > len(cells) / 2:
        raise ValueError("its rows are cells and its columns genes: write it the other way round, genes in rows")
    return make_cells(sparse.vstack(blocks, format="csr").T, cells, genes)


def find_separator(path: Path) -> str:
    """Return what stands between the names of a table's first line."""
    line = _first_line(path)
    separator = max("\t,; ", key=line.count)
    if not line.count(separator):
        raise ValueError("its first line has no tab, comma, semicolon or blank between names")
    return separator


def _open_text(path):
    return (gzip.open if path.name.endswith(".gz") else open)(path, "rt", newline="")


def _first_line(path):
    with _open_text(path) as file:
        return file.readline()


BARCODE = re.compile(r"(?<![ACGT])[ACGT]{14,16}(?![ACGT])")  # 10x: 14 letters in v1, 16 since; also of 5 prime
