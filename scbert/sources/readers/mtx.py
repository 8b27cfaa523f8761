"""A matrix in Matrix Market form and the files of names beside it, as each pipeline lays them out."""

import re
from collections.abc import Iterator
from pathlib import Path

import anndata
import pandas as pd
from scipy import sparse

from .matrices import make_cells
from .names import find_rna
from .refusal import Refusal

LAYOUTS = (  # pipeline, the matrix's name, its cells, its genes (the first that is there); {} is what the group matched
    ("Parse", r"(.*)(?:count_matrix|DGE)\.mtx", ["{}cell_metadata.csv"], ["{}all_genes.csv", "{}genes.csv"]),
    ("kallisto|bustools", r"(.*)\.mtx", ["{}.barcodes.txt"], ["{}.genes.txt"]),
    ("kallisto|bustools", r"(.*cells_x_genes)\.\w+\.mtx", ["{}.barcodes.txt"], ["{}.genes.txt"]),
    ("alevin-fry", r"(.*quants_mat)\.mtx", ["{}_rows.txt"], ["{}_cols.txt"]),
    ("Cell Ranger", r"(.*)matrix\.mtx", ["{}barcodes.tsv"], ["{}features.tsv", "{}genes.tsv"]),
)


def find_names(matrix: Path) -> tuple[str, Path, Path] | None:
    """Return the pipeline that wrote a matrix and its files of cells and genes, gzipped or not; None if no layout fits."""
    for pipeline, pattern, *wanted in LAYOUTS:
        match = re.fullmatch(pattern, matrix.name.removesuffix(".gz"))
        if match:
            found = [_find_file(matrix.parent, [name.format(match[1]) for name in names]) for names in wanted]
            if all(found):
                return pipeline, *found
    return None


def _find_file(folder, names):
    files = (folder / (name + end) for name in names for end in ("", ".gz"))
    return next((file for file in files if file.is_file()), None)


def find_matrices(folder: Path) -> Iterator[Path]:
    """Yield the matrices of a folder that have their names beside them, or by their own name should have."""
    for path in sorted([*folder.glob("*.mtx"), *folder.glob("*.mtx.gz")]):
        if find_names(path) or path.name.removesuffix(".gz").endswith("matrix.mtx"):
            yield path


def read_mtx(matrix: Path) -> anndata.AnnData:
    """Read a matrix with its names, of Cell Ranger or STARsolo, kallisto|bustools, alevin-fry or Parse.

    Raises a Refusal if the names are not there, or too few, or if no feature is a gene.
    """
    from scipy.io import mmread

    found = find_names(matrix)
    if found is None:
        raise Refusal(_say_what_is_missing(matrix))
    pipeline, cells_file, genes_file = found
    obs, genes, ids, types = (_read_names_of_parse if pipeline == "Parse" else _read_names)(cells_file, genes_file)
    counts, shape = sparse.csr_matrix(mmread(matrix)), (len(obs), len(genes))
    if counts.shape not in (shape, shape[::-1]):
        n_cells, n_genes = counts.shape[::-1] if pipeline == "Cell Ranger" else counts.shape
        raise Refusal(f"{len(obs)} barcodes and {len(genes)} genes for a matrix of {n_cells} x {n_genes}")
    if counts.shape != shape or (shape[0] == shape[1] and pipeline == "Cell Ranger"):  # genes x cells
        counts = counts.T.tocsr()
    kept = find_rna(types)
    if kept is not None:
        counts, genes, ids = counts[:, kept], genes[kept], ids[kept]
    n = len(genes) // 3  # alevin-fry may have three columns a gene: spliced, unspliced, ambiguous
    if n and [f"{gene}-{kind}" for kind in "UA" for gene in genes[:n]] == list(genes[n:]):
        print(f"{matrix.name}: spliced and ambiguous counts are added, as for whole cells; unspliced are left out.")
        counts, genes, ids = counts[:, :n] + counts[:, 2 * n :], genes[:n], ids[:n]
    return make_cells(counts, obs.index, genes, obs, ids)


def _read_names(cells_file, genes_file):
    """Return the table of cells, and of genes names, identifiers, and types or None."""
    options = {"sep": "\t", "header": None, "dtype": str, "na_filter": False, "skip_blank_lines": False}
    cells, genes = pd.read_csv(cells_file, **options), pd.read_csv(genes_file, **options)
    of_kallisto = genes_file.with_name(genes_file.name.replace(".genes.txt", ".genes.names.txt"))
    if of_kallisto != genes_file and of_kallisto.is_file():
        genes[1] = pd.read_csv(of_kallisto, **options)[0]
    names = genes[1].where(genes[1] != "", genes[0]) if 1 in genes else genes[0]
    return pd.DataFrame(index=pd.Index(cells[0])), names.to_numpy(), genes[0].to_numpy(), genes.get(2)


def _read_names_of_parse(cells_file, genes_file):
    cells, genes = pd.read_csv(cells_file, index_col=0), pd.read_csv(genes_file, dtype=str, na_filter=False)
    genomes = genes["genome"].unique() if "genome" in genes else []
    if len(genomes) > 1:
        raise Refusal(f"its genes are of several genomes, {' and '.join(genomes)}: keep the cells and genes of one")
    return cells, genes["gene_name"].to_numpy(), genes["gene_id"].to_numpy(), None


def _say_what_is_missing(matrix):
    before, is_10x, _ = matrix.name.partition("matrix.mtx")
    if is_10x:
        return f"it lacks {before}barcodes.tsv, or {before}genes.tsv or {before}features.tsv, beside {matrix.name}"
    return (
        "the name of a 10x matrix ends in matrix.mtx or matrix.mtx.gz, beside barcodes.tsv and features.tsv; kallisto|bustools "
        "writes cells_x_genes.mtx with .barcodes.txt and .genes.txt, alevin-fry quants_mat.mtx with _rows.txt and _cols.txt, "
        "Parse count_matrix.mtx with all_genes.csv and cell_metadata.csv: name these three so"
    )
