"""Gene vocabularies: which genes a model reads and in what order, what other names they go by, and their vectors."""

import warnings
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
from .gene_names import ENSEMBL, MADE_UNIQUE, find_names, find_no_genes, make_r_name, read_date
from .readers.matrices import sum_repeats

STATUSES = ("matched", "renamed", "outside", "ambiguous", "unknown")
HOW = ("identifier", "r_name", "made_unique", "excel_date", "summary", "spike_in")  # of `resolve`, counted in reports
SEVERAL = "several genes"
NO_TABLE = pd.DataFrame({"name": [], "gene_id": [], "how": []})


def load_vocabulary() -> list[str]:
    """Return the 16,906 gene symbols of the published weights, in their order; fetched, see `scbert.datasets.fetch`.

    A ValueError if the list cannot be fetched, or is not the published one.

    Paper: how these genes were chosen is not stated.
    """
    genes = fetch("scbert_genes")[0].read_text().split()
    if hash_genes(genes) != PUBLISHED_GENES_SHA256:
        raise ValueError("This gene list is not that of the published weights: scbert_genes in the catalogue is wrong.")
    return genes


@cache
def read_gene_table(path: str | Path | None = None) -> pd.DataFrame:
    """Read NCBI's table of human genes as one row a name: `name`, `gene_id`, and how (symbol, synonym, ensembl).

    `path` is a ``Homo_sapiens.gene_info`` file, gzipped or not; the pinned one if None, fetched. NCBI lists previous
    symbols and aliases together, as synonyms: the two can't be told apart here.
    """
    columns = ["GeneID", "Symbol", "Synonyms", "dbXrefs"]
    source = pd.read_csv(path or fetch("ncbi_gene_info")[0], sep="\t", usecols=columns, dtype=str, na_filter=False)
    names = {"symbol": source["Symbol"].str.split("|"), "synonym": source["Synonyms"].str.split("|")}
    names["ensembl"] = source["dbXrefs"].str.findall(r"Ensembl:(ENSG\d{11})")
    parts = [pd.DataFrame({"name": own, "gene_id": source["GeneID"], "how": how}) for how, own in names.items()]
    table = pd.concat(parts).explode("name", ignore_index=True).dropna()
    return table[table["name"] != "-"].drop_duplicates(ignore_index=True)


def resolve(
    names: Sequence[str],
    vocabulary: Sequence[str],
    table: pd.DataFrame | None = None,
    *,
    gene_ids: Sequence[str] | None = None,
) -> pd.DataFrame:
    """Find the vocabulary's name of each gene of the data.

    An identifier goes first: the gene of the table that it is of. Without one, a name that is in the vocabulary stays, and
    others are traced to genes of the table, by current symbol first, then by previous symbol or alias. What is left is
    read as what tools make of names, where that fits one gene only: R's HLA.A, the MATR3-1 of a name that stood twice,
    Excel's 2-Sep. What could be several genes is refused: upper-casing or guessing is not resolution.

    `names` may mix symbols and Ensembl identifiers; `table` is that of `read_gene_table`, the pinned one if None.
    `gene_ids` are the Ensembl identifiers beside the names, with or without version; several are joined by ";", and count
    where all that the table knows are of one gene. Anything else counts as none.

    Returns
    -------
    One row a name, in the given order: `gene`, the vocabulary's name or None; `status`:

    - "matched": the name is in the vocabulary;
    - "renamed": another name of a gene that is;
    - "outside": a known gene that the vocabulary lacks;
    - "ambiguous": a name of several genes;
    - "unknown": in neither;
    - "no_gene": a sum that a pipeline adds, such as __no_feature, or a spike-in;

    and `how` it was found: "name", "identifier", "symbol" (or alias), "r_name", "made_unique", "excel_date", "summary",
    "spike_in", or "".

    Paper: Methods, "data preprocessing" (symbols revised by the NCBI Gene database of 10 January 2020).
    Differs from the published code: the script does no such revision.
    """
    if isinstance(vocabulary, str):
        raise ValueError("vocabulary must be a list of gene names, such as scbert.genes.load_vocabulary().")
    table = read_gene_table() if table is None else table
    names, vocabulary = pd.Index(names).astype(str).str.strip(), pd.Index(vocabulary).astype(str)
    identifiers = names if gene_ids is None else pd.Index(gene_ids).astype(str)
    if len(identifiers) != len(names):
        raise ValueError(f"There are {len(identifiers)} gene_ids for {len(names)} names.")
    check_unique(vocabulary, "Gene names of the vocabulary")
    kinds = {how: _index(part["name"], part["gene_id"]) for how, part in table.groupby("how")}
    ensembl, current = kinds.get("ensembl", {}), kinds.get("symbol", {})
    symbols = kinds.get("synonym", {}) | current  # name -> gene id
    own_ids = {match[1]: gene for gene in vocabulary if (match := ENSEMBL.fullmatch(gene))}
    owner = {gene: symbols.get(gene) for gene in vocabulary} | {own_ids[each]: ensembl.get(each) for each in own_ids}
    traced = [gene for gene in vocabulary if owner[gene] not in (None, SEVERAL)]
    target = {}  # gene id -> the one vocabulary name; a current symbol goes before a synonym
    for genes in ([gene for gene in traced if gene not in current], [gene for gene in traced if gene in current]):
        target |= _index([owner[gene] for gene in genes], genes)
    with_numbers = sum(name.isdigit() for name in names) < 0.01 * len(names)

    @cache
    def r_names():
        """Return what R makes of names -> the vocabulary's name, and -> gene id."""
        return [
            _index([make_r_name(name) for name in known], known.values())
            for known in (dict(zip(vocabulary, vocabulary, strict=True)), symbols)
        ]

    def judge(gene_id, how):
        """Return the row of a gene of the table."""
        gene = SEVERAL if gene_id == SEVERAL else target.get(gene_id)
        if gene is None:
            return None, "unknown" if gene_id is None else "outside", ""
        return (None, "ambiguous", "") if gene == SEVERAL else (gene, "renamed", how)

    def find(name, identifier):
        """Return the row of a name: gene, status, how."""
        ids = ENSEMBL.findall(identifier) or ENSEMBL.findall(name)
        given = {own_ids[each] for each in ids if each in own_ids}
        if len(given) == 1:
            gene = given.pop()
            return gene, "matched" if gene in (name, identifier) else "renamed", "identifier"
        known = {ensembl[each] for each in ids if each in ensembl}
        by_id = judge((known.pop() if len(known) == 1 else SEVERAL) if known else None, "identifier")
        bare = ENSEMBL.sub("", name).strip("_-|: ") or name  # of MATR3_ENSG00000015479
        if bare in owner:  # the vocabulary's, unless the identifier is of another gene of it
            goes = by_id[0] not in (None, bare, target.get(owner[bare]))
            return by_id if goes else (bare, *(("matched", "name") if bare == name else ("renamed", "symbol")))
        by_name = judge(symbols.get(bare), "symbol")
        for row in (by_id, by_name):
            if row[1] in ("renamed", "outside"):
                return row
        if "." in name or name.startswith("X"):
            gene, gene_id = (known.get(name) for known in r_names())
            if gene not in (None, SEVERAL):
                return gene, "renamed", "r_name"
            if gene_id is not None and by_name[1] == "unknown":
                return judge(gene_id, "r_name")
        dated = read_date(name, with_numbers=with_numbers)
        if dated is not None:
            spelled = dated[0] if len(dated) == 1 else ()
            rows = [(each, "renamed") for each in spelled if each in owner]
            rows += [row[:2] for each in spelled if (row := judge(symbols.get(each), ""))[1] in ("renamed", "outside")]
            return *(rows or [(None, "ambiguous" if len(dated) > 1 else "unknown")])[0], "excel_date"
        return by_id if by_id[1] == "ambiguous" else by_name

    rows = {}  # (name, identifier) -> row
    for *both, kind in zip(names, identifiers, find_no_genes(names), strict=True):
        is_gene = not kind or both[0] in owner
        rows[tuple(both)] = find(*both) if is_gene else (None, "no_gene", kind)
    first = {name: row for (name, _), row in reversed(rows.items())}
    for (name, identifier), row in rows.items():
        match = MADE_UNIQUE.fullmatch(name) if row[1] == "unknown" else None
        if match and match[1] in first and (match[3] == "1" or f"{match[1]}{match[2]}{int(match[3]) - 1}" in first):
            gene, status, _ = first[match[1]]
            rows[name, identifier] = (gene, "renamed", "made_unique") if gene else (None, status, "")
    rows = [rows[both] for both in zip(names, identifiers, strict=True)]
    return pd.DataFrame(rows, index=names.rename("name"), columns=["gene", "status", "how"])


def _index(keys, values):
    """Return key -> value, or SEVERAL where it has several."""
    pairs = pd.DataFrame({"key": list(keys), "value": list(values)}).drop_duplicates()
    several = pairs["key"][pairs["key"].duplicated()]
    return dict(zip(pairs["key"], pairs["value"], strict=True)) | dict.fromkeys(several, SEVERAL)


def count_statuses(adata: anndata.AnnData, found: pd.DataFrame) -> pd.DataFrame:
    """Count what `resolve` found for the genes of `adata`: a row a status, columns genes and share_of_counts.

    Rows that are no genes have one, "no_gene", where there are some.
    """
    counts = np.asarray(adata.X.sum(0), np.float64).ravel()
    table = found.assign(counts=counts / counts.sum()).groupby("status")["counts"].agg(["size", "sum"])
    statuses = [*STATUSES, *(["no_gene"] if "no_gene" in table.index else [])]
    table = table.set_axis(["genes", "share_of_counts"], axis=1).reindex(statuses, fill_value=0)
    return table.astype({"genes": int, "share_of_counts": float})


def rename_genes(
    adata: anndata.AnnData, vocabulary: Sequence[str], table: pd.DataFrame | None = None
) -> anndata.AnnData:
    """Give genes the vocabulary's names where `resolve` finds them, and sum what are names of one gene.

    Ensembl identifiers go before symbols. They are the index of `var`, with symbols in a column such as "feature_name"
    (CELLxGENE), or a column such as "gene_ids" beside it. Counts are summed before anything is normalised. Genes that
    are not resolved keep their names, and count in a cell's total; rows that are no genes (__no_feature) are left out.

    Returns
    -------
    A new AnnData with the same `obs` and `obsm` (a backed one is renamed itself; layers, ``.raw`` and columns of `var`
    belong to the old names and are left out, but `var` has "original_name" and, if there were, "gene_ids", joined by ";"),
    and a report in ``uns["scbert"]["genes"]``: how many names have each status, how many were summed, the vocabulary's
    share in the data before and after, and how many were found by identifier only, were R's, numbered repeats or Excel's
    dates, or were left out as summaries or spike-ins (see `resolve`).

    A ValueError if names of a backed file would have to be summed, or fewer than 5 % of the genes are resolved, as happens
    with another species; a warning if genes are named by dates.
    """
    names, gene_ids = find_names(adata)
    found = resolve(names, vocabulary, table, gene_ids=gene_ids)
    if found["gene"].notna().sum() < 0.05 * min(adata.n_vars, len(vocabulary)):
        raise ValueError(
            f"{found['gene'].notna().sum()} of the data's {adata.n_vars} genes ({', '.join(adata.var_names[:3])}, ...) "
            f"could be traced to the vocabulary ({', '.join(list(vocabulary)[:3])}, ...): is it another species?"
        )
    return _rename(adata, vocabulary, found, gene_ids)


def tidy_names(adata: anndata.AnnData, vocabulary: Sequence[str]) -> anndata.AnnData:
    """Do what `rename_genes` can do offline, without a table: undo what tools make of names, and refuse nothing.

    A vocabulary of symbols is met by the symbols that stand beside identifiers, one of identifiers by identifiers;
    repeats that were numbered are summed, R's names and Excel's dates read back, rows that are no genes left out. Old
    symbols, and identifiers without symbols, need the table.

    Returns `adata` itself where there is nothing to do, else as `rename_genes`, but has no error for another species.
    """
    names, gene_ids = find_names(adata)
    found = resolve(names, vocabulary, NO_TABLE, gene_ids=gene_ids)
    changed = found["gene"].notna() & (found["gene"].to_numpy() != adata.var_names)
    if not changed.any() and not found["how"].isin(["summary", "spike_in", "excel_date"]).any():
        return adata
    return _rename(adata, vocabulary, found, gene_ids)


def _rename(adata, vocabulary, found, gene_ids):
    """Return the data under the names that were found."""
    kept = (found["status"] != "no_gene").to_numpy()
    names = np.where(found["gene"].isna(), adata.var_names, found["gene"])[kept]
    report = {status: int((found["status"] == status).sum()) for status in STATUSES} | {
        "summed": len(names) - len(set(names)),
        "share_before": float(adata.var_names.isin(vocabulary).sum() / len(vocabulary)),
        "share_after": float(found["gene"].nunique() / len(vocabulary)),
    }
    report |= {how: int((found["how"] == how).sum()) for how in HOW}
    dates = found[found["how"] == "excel_date"]
    if len(dates):
        back = dates["gene"].dropna()
        warnings.warn(
            f"{len(dates)} genes have dates for names, as Excel makes of symbols ({', '.join(dates.index[:3])}, ...): "
            f"{len(back)} got theirs back{''.join(f' ({name} is {gene})' for name, gene in back[:1].items())}, the others "
            "stay as they are, since they could be several genes or none of the vocabulary.",
            stacklevel=3,
        )
    if adata.isbacked:
        if report["summed"] or not kept.all():
            what = "genes have to be summed" if report["summed"] else "rows that are no genes have to be left out"
            raise ValueError(f"{report['summed'] or (~kept).sum()} {what}: load this file into memory (backed=False).")
        adata.var_names = names
    else:
        var = pd.DataFrame({"original_name": adata.var_names} | ({} if gene_ids is None else {"gene_ids": gene_ids}))
        var = var.astype(str)[kept].set_axis(pd.Index(names, dtype=str))
        repeated = var[var.index.duplicated(keep=False)].groupby(level=0).agg(lambda x: ";".join(dict.fromkeys(x)))
        var = var[~var.index.duplicated()]
        var.loc[repeated.index] = repeated
        counts = sparse.csr_matrix(adata.X)
        counts, _ = sum_repeats(counts if kept.all() else counts[:, kept], names)
        adata = anndata.AnnData(counts, obs=adata.obs.copy(), var=var, obsm=dict(adata.obsm), uns=dict(adata.uns))
    adata.uns["scbert"] = dict(adata.uns.get("scbert", {})) | {"genes": report}
    return adata


def choose_genes(adata: anndata.AnnData, choice: str = "all") -> list[str]:
    """Return the genes that a model is to read, in order: a notebook's parameter `genes`.

    `adata` are training cells with counts in ``X``: others must not have a say. The `choice` is "all" genes of the data; a
    number, such as "1000": that many, whose log-normalised values vary most, in the data's order, or all where there are
    no more; or "published", see `load_vocabulary`. A set before the number, as in "pbmc68k_reduced 1000", has its genes
    come first: all that the data have of them, filled up to that many; "published" there has no others but the published
    come in. A ValueError for another choice.

    Paper: how its 16,906 genes were chosen is not stated.
    """
    if choice == "all":
        return list(adata.var_names)
    if choice == "published":
        return load_vocabulary()
    *first, choice = str(choice).rsplit(maxsplit=1) or [""]
    if not choice.isdigit() or int(choice) < 1:
        raise ValueError(f"genes must be all, a number, a set and a number, or published, not {choice!r}.")
    if first == ["published"]:
        adata, first = adata[:, adata.var_names.isin(load_vocabulary())], []
    if int(choice) >= adata.n_vars:
        return list(adata.var_names)
    values = lognormalize(adata)
    variance = np.asarray(values.multiply(values).mean(0) - np.square(values.mean(0))).ravel()
    if first:
        variance[adata.var_names.isin(load(first[0]).var_names)] += variance.max() + 1  # before all others
    return list(adata.var_names[np.sort(np.argsort(-variance, kind="stable")[: int(choice)])])


def is_published(genes: Sequence[str]) -> bool:
    """Return whether these are the 16,906 genes of the published weights, in their order."""
    return hash_genes(genes) == PUBLISHED_GENES_SHA256
