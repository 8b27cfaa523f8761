"""What tools make of gene names, read back without any table: identifiers, numbers for repeats, R's names, Excel's dates."""

import re
from collections.abc import Sequence

import anndata
import numpy as np
import pandas as pd

ENSEMBL = re.compile(r"(ENSG\d{11})(?:\.\d+)?(?:_PAR_Y)?")
SUMMARY = re.compile(  # of htseq, STAR, featureCounts, CITE-seq-Count; Seurat writes - for _, R an X before
    r"X?[_-]{2}.+|(no_feature|ambiguous|too_low_aqual|not_aligned|alignment_not_unique)"
    r"|N[_-](unmapped|multimapping|noFeature|ambiguous)|(un)?assigned([_-]\w+)?|_?unmapped|\*",
    re.IGNORECASE,
)
SPIKE_IN = re.compile(r"ERCC[-._]\d{5}.*", re.IGNORECASE)
MADE_UNIQUE = re.compile(r"(.+)([-.])([1-9])")
MONTHS = ["jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec"]
MONTH, DAY, NUMBER = "(jan|feb|mar|apr|may|june?|july?|aug|sept?|oct|nov|dec)", r"([0-2]?\d|3[01])", "(0[1-9]|1[0-2])"
DATE = re.compile(
    rf"X?{DAY}[-. /]{MONTH}(?:[-. /]\d\d(?:\d\d)?)?|{MONTH}[-. /]{DAY}|{DAY}/{DAY}/\d\d(?:\d\d)?"
    rf"|X?(?:19|20)\d\d[-./]{NUMBER}[-./]{DAY}(?:[ .]00.00.00)?",
    re.IGNORECASE,
)
IDENTIFIERS = re.compile("(ensembl|gene|feature)*ids?|ensembl|ensg|accession")  # names of columns, letters only
SYMBOLS = re.compile("(gene|feature|hgnc)?(short)?(names?|symbols?)")


def find_names(adata: anndata.AnnData) -> tuple[pd.Index, pd.Index | None]:
    """Return the symbols of the genes, and their Ensembl identifiers if `adata` has some, each from the index or a column."""
    index = adata.var_names.astype(str)
    indexed_by_ids = _are_identifiers(index)
    wanted = SYMBOLS if indexed_by_ids else IDENTIFIERS
    columns = [name for name in adata.var if wanted.fullmatch(re.sub("[^a-z]", "", str(name).lower()))]
    values = (pd.Index(adata.var[column].astype(str)) for column in columns)
    beside = next((each for each in values if _are_identifiers(each) != indexed_by_ids), None)
    return (index if beside is None else beside, index) if indexed_by_ids else (index, beside)


def _are_identifiers(names):
    return sum(bool(ENSEMBL.search(name)) for name in names) > len(names) / 2


def find_no_genes(names: Sequence[str]) -> np.ndarray:
    """Return which rows of a table are no genes, (names,) of "summary" (what a pipeline adds up), "spike_in" or ""."""
    kinds = ["summary" if SUMMARY.fullmatch(name) else "spike_in" if SPIKE_IN.fullmatch(name) else "" for name in names]
    return np.array(kinds, dtype=object)


def make_r_name(name: str) -> str:
    """Return what R's ``make.names`` makes of a name, as ``read.csv`` and ``data.frame`` do: HLA.A, MT.CO1, X7SK."""
    name = re.sub(r"[^A-Za-z0-9._]", ".", name)
    return name if re.match(r"[A-Za-z]|\.(?!\d)", name) else f"X{name}"


def read_date(name: str, *, with_numbers: bool = False) -> list[tuple[str, str]] | None:
    """Return the genes that Excel may have made this date of, each by its newer and its older symbol.

    A `name` such as 2-Sep, Sep-02, 2021-09-02, or X2.Sep after R; and, `with_numbers`, 44441, the number behind 2-Sep of
    2021. Which is the day in 9/2/2021 is not known: no gene is returned. One pair a gene, two for 1-Mar and 2-Mar (MARCH1
    and MARC1); none for another day; None if it is no date.
    """
    if with_numbers and re.fullmatch(r"[34]\d{4}(\.0)?", name):
        name = f"{pd.Timestamp('1899-12-30') + pd.Timedelta(days=float(name)):%Y-%m-%d}"
    match = DATE.fullmatch(name)
    if not match:
        return None
    first, month, other, last, _, _, number, day = match.groups()
    month = (month or other or (number and MONTHS[int(number) - 1]) or "")[:3].lower()
    day = int(first or last or day or 0)
    if month == "mar" and 1 <= day <= 11:
        return [(f"MARCHF{day}", f"MARCH{day}"), (f"MTARC{day}", f"MARC{day}")][: 2 if day <= 2 else 1]
    if month == "sep" and 1 <= day <= 15:
        return [(f"SEPTIN{day}", f"SEPT{day}") if day < 15 else ("SELENOF", "SEP15")]
    return [("DELEC1", "DEC1")] if month == "dec" and day == 1 else []
