"""Gene vocabularies: which genes a model reads and in what order, what other names they go by, and their vectors."""

import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
from scipy import sparse

from ..data.checks import check_unique
from ..data.preprocess import hash_genes, lognormalize
from ..model.published import PUBLISHED_GENES_SHA256
from .datasets import fetch, load
from .readers.matrices import sum_repeats

STATUSES = ("matched", "renamed", "outside", "ambiguous", "unknown")
ENSEMBL = re.compile(r"^(ENSG\d{11})(\.\d+)?(_PAR_Y)?$")


def load_vocabulary() -> list[str]:
    """Return the 16,906 gene symbols of the published weights, in their order; fetched, see `scbert.datasets.fetch`.

    Raises
    ------
    ValueError
        The list cannot be fetched, or is not the published one.

    Paper: how these genes were chosen is not stated.
    """
    genes = fetch("scbert_genes")[0].read_text().split()
    if hash_genes(genes) != PUBLISHED_GENES_SHA256:
        raise ValueError(
            "The fetched gene list is not that of the published weights: scbert_genes in the catalogue is wrong."
        )
    return genes


@cache
def read_gene_table(path: str | Path | None = None) -> pd.DataFrame:
    """Read NCBI's table of human genes as one row a name: `name`, `gene_id`, and how (symbol, synonym, ensembl).

    Parameters
    ----------
    path
        A ``Homo_sapiens.gene_info`` file, gzipped or not; the pinned one if None, fetched.

    NCBI lists previous symbols and aliases together, as synonyms: the two can't be told apart here.
    """
    columns = ["GeneID", "Symbol", "Synonyms", "dbXrefs"]
    source = pd.read_csv(path or fetch("ncbi_gene_info")[0], sep="\t", usecols=columns, dtype=str, na_filter=False)
    parts = []
    for how, names in {
        "symbol": source["Symbol"].str.split("|"),
        "synonym": source["Synonyms"].str.split("|"),
        "ensembl": source["dbXrefs"].str.findall(r"Ensembl:(ENSG\d{11})"),
    }.items():
        parts.append(pd.DataFrame({"name": names, "gene_id": source["GeneID"], "how": how}).explode("name"))
    table = pd.concat(parts, ignore_index=True).dropna()
    return table[table["name"] != "-"].drop_duplicates(ignore_index=True)


def resolve(names: Sequence[str], vocabulary: Sequence[str], table: pd.DataFrame | None = None) -> pd.DataFrame:
    """Find the vocabulary's name of each gene of the data.

    A name that is in the vocabulary stays. Otherwise both sides are traced to genes of the table, by current symbol
    first, then by previous symbol or alias, and the data's also by Ensembl identifier, with or without its version.
    What could be several genes is refused: upper-casing or guessing is not resolution.

    Parameters
    ----------
    names
        Of the data, in any number of mixtures of symbols and Ensembl identifiers.
    vocabulary
        The names to arrive at.
    table
        From `read_gene_table`; the pinned one if None.

    Returns
    -------
    One row a name, in the given order: `gene`, the vocabulary's name or None, and `status`:

    - "matched": the name is in the vocabulary;
    - "renamed": another name of a gene that is;
    - "outside": a known gene that the vocabulary lacks;
    - "ambiguous": a name of several genes;
    - "unknown": in neither.

    Paper: Methods, "data preprocessing" (symbols revised by the NCBI Gene database of 10 January 2020).
    Differs from the published code: the script does no such revision.
    """
    if isinstance(vocabulary, str):
        raise ValueError("vocabulary must be a list of gene names, such as scbert.genes.load_vocabulary().")
    table = read_gene_table() if table is None else table
    ids = {}  # kind of name -> name -> ids of genes
    for name, gene_id, how in table.itertuples(index=False):
        ids.setdefault(how, {}).setdefault(name, set()).add(gene_id)
    names, vocabulary = pd.Index(names).astype(str), pd.Index(vocabulary).astype(str)
    check_unique(vocabulary, "Gene names of the vocabulary")

    def trace(name, kinds):
        """Return the ids of the first kind of name that knows it, and that kind."""
        for how in kinds:
            found = ids.get(how, {}).get(name)
            if found:
                return found, how
        return set(), None

    known = {}  # gene id -> [(kind of name, vocabulary name)]
    for gene in vocabulary:
        found, how = trace(gene, ("symbol", "synonym"))
        if len(found) == 1:
            known.setdefault(next(iter(found)), []).append((how, gene))
    target = {}  # gene id -> the one vocabulary name; a current symbol goes before a synonym
    for gene_id, candidates in known.items():
        best = [gene for how, gene in candidates if how == "symbol"] or [gene for _, gene in candidates]
        target[gene_id] = best[0] if len(best) == 1 else None
    in_vocabulary, rows = set(vocabulary), []
    for name in names:
        if name in in_vocabulary:
            rows.append((name, "matched"))
            continue
        ensembl = ENSEMBL.match(name.strip())
        found, _ = trace(ensembl[1] if ensembl else name.strip(), ("ensembl",) if ensembl else ("symbol", "synonym"))
        inside = {target[gene_id] for gene_id in found if gene_id in target}
        if not found:
            rows.append((None, "unknown"))
        elif len(found) > 1 or None in inside:
            rows.append((None, "ambiguous"))
        elif inside:
            rows.append((next(iter(inside)), "renamed"))
        else:
            rows.append((None, "outside"))
    return pd.DataFrame(rows, index=names.rename("name"), columns=["gene", "status"])


def count_statuses(adata: anndata.AnnData, found: pd.DataFrame) -> pd.DataFrame:
    """Count what `resolve` found for the genes of `adata`: a row a status, columns genes and share_of_counts."""
    counts = np.asarray(adata.X.sum(0), np.float64).ravel()
    table = found.assign(counts=counts / counts.sum()).groupby("status")["counts"].agg(["size", "sum"])
    table = table.set_axis(["genes", "share_of_counts"], axis=1).reindex(STATUSES, fill_value=0)
    return table.astype({"genes": int, "share_of_counts": float})


def rename_genes(
    adata: anndata.AnnData, vocabulary: Sequence[str], table: pd.DataFrame | None = None
) -> anndata.AnnData:
    """Give genes the vocabulary's names where `resolve` finds them, and sum what are names of one gene.

    Counts are summed before anything is normalised. Genes that are not resolved keep their names, so that they still
    count in a cell's total.

    Returns
    -------
    A new AnnData with the same `obs` and `obsm` (a backed one is renamed itself; layers, ``.raw`` and columns of `var`
    belong to the old names and are left out), and a report in ``uns["scbert"]["genes"]``: how many names have each status,
    how many were summed, and the vocabulary's share in the data before and after.

    Raises
    ------
    ValueError
        A backed file in which names would have to be summed; a vocabulary that repeats a name; or fewer than 5 % of the
        genes are resolved, as happens with another species.
    """
    found = resolve(adata.var_names, vocabulary, table)
    resolved = found["gene"].dropna()
    if len(resolved) < 0.05 * min(adata.n_vars, len(vocabulary)):
        raise ValueError(
            f"{len(resolved)} of the data's {adata.n_vars} genes ({', '.join(adata.var_names[:3])}, ...) could be traced "
            f"to the vocabulary ({', '.join(list(vocabulary)[:3])}, ...): is it another species?"
        )
    names = np.where(found["gene"].isna(), found.index, found["gene"])
    report = {status: int((found["status"] == status).sum()) for status in STATUSES} | {
        "summed": len(names) - len(set(names)),
        "share_before": float((found["status"] == "matched").sum() / len(vocabulary)),
        "share_after": float(resolved.nunique() / len(vocabulary)),
    }
    if adata.isbacked:
        if report["summed"]:
            raise ValueError(f"{report['summed']} genes have to be summed: load this file into memory (backed=False).")
        adata.var_names = names
    else:
        counts, names = sum_repeats(sparse.csr_matrix(adata.X), names)
        var = pd.DataFrame(index=pd.Index(names, dtype=str))
        adata = anndata.AnnData(counts, obs=adata.obs.copy(), var=var, obsm=dict(adata.obsm), uns=dict(adata.uns))
    adata.uns["scbert"] = dict(adata.uns.get("scbert", {})) | {"genes": report}
    return adata


def choose_genes(adata: anndata.AnnData, choice: str = "all") -> list[str]:
    """Return the genes that a model is to read, in order: a notebook's parameter `genes`.

    Parameters
    ----------
    adata
        Training cells with counts in ``X``: others must not have a say.
    choice
        "all" genes of the data; a number, such as "1000": that many, whose log-normalised values vary most, in the
        data's order; or "published", the 16,906 of the published weights. A set before the number, as in
        "pbmc68k_reduced 1000", has its genes come first: all that the data have of them, filled up to that many.

    Raises
    ------
    ValueError
        Another choice, or more genes than the data have.

    Paper: how its 16,906 genes were chosen is not stated.
    """
    if choice == "all":
        return list(adata.var_names)
    if choice == "published":
        return load_vocabulary()
    *first, choice = str(choice).rsplit(maxsplit=1) or [""]
    if not choice.isdigit() or int(choice) < 1:
        raise ValueError(f"genes must be all, a number, a set and a number, or published, not {choice!r}.")
    if int(choice) > adata.n_vars:
        raise ValueError(
            f"genes = {choice} asks for more than the {adata.n_vars} genes of the data: take all, or fewer."
        )

    values = lognormalize(adata)
    variance = np.asarray(values.multiply(values).mean(0) - np.square(values.mean(0))).ravel()
    if first:
        variance[adata.var_names.isin(load(first[0]).var_names)] += variance.max() + 1  # before all others
    return list(adata.var_names[np.sort(np.argsort(-variance, kind="stable")[: int(choice)])])


def is_published(genes: Sequence[str]) -> bool:
    """Return whether these are the 16,906 genes of the published weights, in their order."""
    return hash_genes(genes) == PUBLISHED_GENES_SHA256
