"""Text tables of counts: genes x cells, or cells x genes where their names say so."""

import csv
import gzip
import re
from itertools import islice
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
from scipy import sparse

from .matrices import make_cells
from .names import rows_are_cells
from .refusal import Refusal

NO_CELLS = {"chr", "start", "end", "strand", "length", "gene_id", "gene_name", "gene_symbol"}

FEATURECOUNTS = ["Chr", "Start", "End", "Strand", "Length"]

NO_GENES = re.compile(r"__\w+|N_(unmapped|multimapping|noFeature|ambiguous)")  # the last rows of HTSeq and of STAR


def read_table(path: Path) -> anndata.AnnData:
    """Read a table of counts, some rows at a time; the separator is that of the first line that is no comment.

    Cells may be in rows (`rows_are_cells`), which is printed. Of the tables of featureCounts the annotation is left out,
    of those of BD Rhapsody the antibodies. Raises a Refusal if it is no table of counts, or has columns that are no cells,
    or if it can't be told which side the cells are on.
    """
    n_before, separator, header, first = _read_head(path)
    names = header if len(header) < len(first) else header[1:]  # R leaves the corner out
    corner = "" if len(header) < len(first) else header[0]
    if len(names) != len(first) - 1:
        raise Refusal(f"its header names {len(names)} columns, and its first row has {len(first) - 1}")
    n_left_out = 5 if names[:5] == FEATURECOUNTS else 0
    names = names[n_left_out:]
    annotation = [name for name in names if name.lower() in NO_CELLS]
    if annotation:
        raise Refusal(f"its columns {', '.join(annotation)} are no cells: drop them")
    options = {"header": None, "skiprows": n_before + 1, "index_col": 0, "dtype": {0: str}, "keep_default_na": False}
    blocks, rows = [], []
    with pd.read_csv(path, sep=separator, chunksize=1000, encoding="utf-8-sig", **options) as chunks:
        for chunk in chunks:
            chunk = chunk.iloc[:, n_left_out:]
            are_numbers = list(map(pd.api.types.is_numeric_dtype, chunk.dtypes))
            if not all(are_numbers):
                raise Refusal(f"its column {names[are_numbers.index(False)]} holds text where counts are due")
            blocks.append(sparse.csr_matrix(chunk.to_numpy(np.float32)))
            rows.extend(chunk.index)
    counts = sparse.vstack(blocks, format="csr")
    if corner == "Cell_Index":
        counts, names = _read_rhapsody(counts, names, path.name)
    return _turn(counts, rows, names, corner, path.name)


def _turn(counts, rows, columns, corner, name):
    """Return the cells of a table, whichever way round it is."""
    is_turned = rows_are_cells(rows, columns, corner)
    if is_turned is None:
        raise Refusal(
            f"its rows ({rows[0]}, {rows[1]}, ...) look like cells and its columns ({columns[0]}, {columns[1]}, ...) like genes, "
            f"but none is known: if so, write above its rows the word cell, else gene"
        )
    if is_turned:
        print(f"{name}: its rows are cells and its columns genes, and are read so.")
        return make_cells(counts, rows, columns)
    if all(row.isdigit() for row in rows):
        raise Refusal("its rows are numbered, where genes are named")
    cells = pd.Index(columns)
    if cells.has_duplicates:
        raise Refusal(f"its header names a cell twice ({cells[cells.duplicated()][0]}): rename one")
    kept = np.array([not NO_GENES.fullmatch(row) for row in rows])
    if not kept.all():
        print(f"{name}: {', '.join(np.array(rows)[~kept])} are no genes, and are left out.")
    return make_cells(counts[kept].T, columns, np.array(rows, dtype=object)[kept])


def _read_rhapsody(counts, columns, name):
    """Leave out BD's antibodies (CD3:UCHT1|CD3E|AHS0231|pAbO), and take the gene of its targets (CD3D|NM_000732|PolyA)."""
    is_gene = np.array([not column.endswith("pAbO") for column in columns])
    if not is_gene.all():
        print(f"{name}: {(~is_gene).sum()} antibodies (pAbO) are no genes, and are left out.")
    return counts[:, is_gene], [column.split("|")[0] for column in np.array(columns)[is_gene]]


def find_separator(path: Path) -> str:
    """Return what stands between the names of a table's first line that is no comment."""
    return _read_head(path)[1]


def _read_head(path):
    """Return how many lines stand before the header, the separator, and the header and the first row, split."""
    with (gzip.open if path.name.endswith(".gz") else open)(path, "rt", newline="", encoding="utf-8-sig") as file:
        lines = list(islice(file, 1000))
    content = [i for i, line in enumerate(lines) if line.strip()]
    first = next((i for i in content if lines[i][0] != "#"), None)
    separator = "" if first is None else max("\t,; ", key=lines[first].count)
    if not separator or separator not in lines[first]:
        raise Refusal("its first line has no tab, comma, semicolon or blank between names")
    before = [i for i in content if i < first and lines[i].count(separator) == lines[first].count(separator)]
    header = before[-1] if before and before[-1] == max(i for i in content if i < first) else first  # may begin with #
    row = next((line for line in lines[header + 1 :] if line.strip()), None)
    if row is None:
        raise Refusal("it has no row under its header")
    return header, separator, *csv.reader([lines[header], row], delimiter=separator)


BARCODE = re.compile(r"(?<![ACGT])[ACGT]{14,16}(?![ACGT])")  # 10x: 14 letters in v1, 16 since; also of 5 prime
