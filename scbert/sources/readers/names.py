"""Which names are genes and which are cells: what tells the way round of a matrix where its format does not."""

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path

import numpy as np
import pandas as pd

from .refusal import Refusal

GENE_ID = re.compile(
    r"(ENS[A-Z]*G\d{6,}|FBgn\d{7}|WBGene\d{8}|AT[1-5CM]G\d{5}|LOC\w*\d{4,}|gene[_.-]?\d+)([._-].*)?", re.I
)
"""Of Ensembl, any species; FlyBase, WormBase, TAIR, NCBI's LOC; numbered genes."""

GENE_FAMILY = re.compile(
    r"(MT-|HLA-|RP[LS]P?\d|CD\d|C[CX]+[CR][LR]\d|IL\d|IFN|TNF|SLC\d|ZNF\d|ZFP\d|TMEM\d|KRT\d|COL\d+A|ATP\d|NDUF|COX\d|EIF\d|PSM[A-D]\d"
    r"|UBE\d|HSP[A-H]|S100A|GZM|KLR|TR[ABDG][CVDJ]|IG[HKL][ACGMDEVJ]|FCG?R|TUB[ABG]|ACT[ABG]|SOX\d|FOX[A-R]\d|HOX[A-D]\d|PAX\d"
    r"|WNT\d|GATA\d|NOTCH\d|SNAP\d|SYT\d|GAD\d|GRI[AKN]\d|GABR|KCN|CACN|SCN\d|AQP\d|ADAM|MMP\d|CYP\d|ABC[A-G]\d|FAM\d|CCDC\d"
    r"|KIF\d|MY[OHL]\d|PTPR|RAB\d|ARHG|MAP\dK|STAT\d|IRF\d|LINC\d|MIR\d|SNH?[OR]|TGFB|BMP\d|FGF\d|VEGF|PDGF|CDK\d|CCN[A-E]\d"
    r"|TOP\d|MCM\d|HIST|H[1234][ABCF-]|DDX\d|SRSF|HNRN|POLR|MRP[LS]|CALM\d|APO[ABCE]|LGALS|ANXA)[A-Z0-9.-]*",
    re.I,
)
"""Symbols of families that most tissues have, human or mouse."""

CELL = re.compile(
    r".*(?<![A-Z])[ACGTN]{8,}(?![A-Z]).*|([SED]RR|GSM|SAM(N|EA|D))\d{4,}.*|\d+(_\d+)+.*|.+[_.-][A-P]\d{1,2}|.+\.bam"
    r"|(cell|well|barcode|bc|spot)[_. -]?\d+",
    re.I,
)
"""Barcodes, accessions of runs and samples, combined wells of Parse, wells of plates, BAM files, numbered cells."""

OTHER_FEATURE = re.compile(r".+ (Capture|Output)|Peaks|Custom|Antigen.*|Antibody.*")
"""Cell Ranger's types of what are no genes."""

CELL_WORDS = {"cell", "cells", "cellid", "cell_id", "cell_index", "cellname", "barcode", "barcodes", "bc_wells", "spot"}
GENE_WORDS = {"gene", "genes", "geneid", "gene_id", "gene_name", "gene_symbol", "symbol", "feature", "ensembl_gene_id"}

GENOME = re.compile(r"^(GRC[a-z]+\d+|hg\d+|mm\d+|rn\d+|human|mouse|dmel\w*|danRer\d+)[_-]+(?=.)", re.I)
"""What Cell Ranger, Seurat and Drop-seq put before the genes of a reference of several genomes."""


@cache
def _load_known_genes():
    genes = Path(__file__).parent.parent / "encoders" / "pbmc-small" / "genes.txt"
    return frozenset(name.upper() for name in genes.read_text().split())


def is_gene(name: str) -> bool:
    """Return whether a name is surely a gene's: an identifier, of a large family, or one that blood cells express."""
    return bool(GENE_ID.fullmatch(name) or GENE_FAMILY.fullmatch(name)) or name.upper() in _load_known_genes()


def rows_are_cells(rows: Sequence[str], columns: Sequence[str], corner: str = "") -> bool | None:
    """Return whether a matrix has its cells in rows, by its names; None if it seems so and nothing says it.

    Genes that are known on one side only decide; then the corner above the names of rows ("gene", "Cell_Index"); then
    which side is named as cells are. Where none of these speaks, genes are in rows, as most tables have them: but rows
    that follow one pattern (s1_004, s1_005) under columns that don't seem to be cells.
    """
    in_rows, in_columns = _share(rows, is_gene), _share(columns, is_gene)
    if max(in_rows, in_columns) > 0.1 and min(in_rows, in_columns) < 0.02:
        return in_columns > in_rows
    if corner.strip().lower() in CELL_WORDS | GENE_WORDS:
        return corner.strip().lower() in CELL_WORDS
    cells = _share(rows, CELL.fullmatch) - _share(columns, CELL.fullmatch)
    if abs(cells) > 0.5:
        return cells > 0
    return None if _follow_one_pattern(rows) and len(columns) > 4 and not _follow_one_pattern(columns) else False


def _share(names, test):
    return sum(bool(test(name)) for name in names) / max(len(names), 1)


def _follow_one_pattern(names):
    patterns = Counter(re.sub(r"\d+", "0", name) for name in names if not is_gene(name) and not name.isdigit())
    return len(names) > 4 and max(patterns.values(), default=0) > len(names) / 2


def find_ids(names: Sequence[str], table: Mapping[str, Iterable]) -> np.ndarray | None:
    """Return the first column of a gene table, as long as `names`, that holds identifiers; None if none does."""
    for _, values in table.items():
        values = np.asarray(values).astype(str)
        if values.shape == (len(names),) and _share(values[:1000], GENE_ID.fullmatch) > 0.5:
            return values
    return None


def find_rna(types: Iterable[str] | None) -> np.ndarray | None:
    """Return which features are genes, by Cell Ranger's types; None where all are, or nothing says it.

    Raises a Refusal if none is: antibodies, peaks or guides only.
    """
    types = np.asarray([] if types is None else types).astype(str)
    is_gene_expression = types == "Gene Expression"
    others = dict.fromkeys(types[~is_gene_expression])
    if is_gene_expression.any():
        return is_gene_expression if others else None
    if any(OTHER_FEATURE.fullmatch(other) for other in others):
        raise Refusal(f"its features are {', '.join(others)}, and none is Gene Expression")
    return None


def join_distinct(values: Sequence[str], groups: np.ndarray) -> pd.Series:
    """Return the distinct values of each group joined by ";", in the order of groups 0, 1, ... and of their mention."""
    table = pd.DataFrame({"value": pd.Series(np.asarray(values, dtype=str)).str.split(";"), "group": groups})
    return table.explode("value").drop_duplicates().groupby("group")["value"].agg(";".join)
