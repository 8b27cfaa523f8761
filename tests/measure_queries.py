"""Which queries should be warned of, and which are: the limits of `scbert.memory.companions.say_what_is_off`.

    SCBERT_MIRROR=... python tests/measure_queries.py            # all pairs of the sets that are here

References are catalogue sets; what a bundle remembers of each is learnt as `scbert.finetune` does, without a network:
logistic regression stands in for scBERT's labels. Clean pairs are of the same tissue, share types, and have median counts
within threefold. Bad ones: another species under the same names, another tissue, cells ten times shallower, genes in
another order, few genes, and the same cells under other names. Every second pair set the limits; all are printed.
"""

import os
import sys
import warnings
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import torch
from make_split import make_split

import scbert
from scbert.data.preprocess import tokenize
from scbert.memory import companions

OTHERS = {
    "kang_control": "clean",
    "kang_stimulated": "clean",
    "heart_1k": "bad",
}  # files of the mirror, see `read_others`
KANG = {
    "CD14 Mono": "Monocyte", "CD16 Mono": "Monocyte", "CD4 Naive T": "CD4 T cell", "CD4 Memory T": "CD4 T cell",
    "CD8 T": "CD8 T cell", "B": "B cell", "activated B": "B cell", "NK": "NK cell", "DC": "Dendritic cell",
    "pDC": "Dendritic cell", "MK": "Megakaryocyte or platelet",
}  # "activated T" is neither CD4 nor CD8, and left out  # fmt: skip
BLOOD = ("zheng_facs", "pbmc68k_reduced", "pbmc3k", "pbmc_3tech")


def learn(reference: anndata.AnnData, seed: int = 0) -> tuple[dict, list[str], list[str]]:
    """Return what a bundle remembers of a set, its genes (the 1,000 most variable) and its labels."""
    split = make_split(reference, test_share=0.15, seed=seed)["part"].reindex(reference.obs_names)
    train, validation = (reference[(split == part).to_numpy()] for part in ("train", "test"))
    genes = scbert.genes.choose_genes(train, "1000" if train.n_vars > 1000 else "all")
    train, validation = (tokenize(part.copy(), genes=genes) for part in (train, validation))
    labels = sorted(set(train.obs["cell_type"].astype(str)))
    memory = companions.learn_companions(train, validation, labels, label_key="cell_type", seed=seed)
    seen = train.layers["bins"].getnnz(0) > 0
    return memory | {"genes_seen": torch.from_numpy(seen)}, genes, labels


def judge(memory: dict, genes: list[str], query: anndata.AnnData) -> tuple[dict, list[str]]:
    """Return the numbers of a query, and what is said of it."""
    tokens, measured = tokenize(query.copy(), genes=genes), np.isin(genes, query.var_names)
    x = scbert.preprocess.lognormalize(tokens)
    predicted = companions.predict_regression({name: value.numpy() for name, value in memory.items()}, x).argmax(1)
    _, found = companions.compare_query(memory, tokens, predicted, measured)
    return found, companions.say_what_is_off(found)


def thin(adata: anndata.AnnData, share: float, seed: int = 0) -> anndata.AnnData:
    """Return cells with a share of their counts."""
    thinned = adata.copy()
    thinned.X = thinned.X.tocsr().copy()
    thinned.X.data = np.random.default_rng(seed).binomial(thinned.X.data.astype(int), share).astype(np.float32)
    if "n_counts" in thinned.obs:
        thinned.obs["n_counts"] = np.maximum(thinned.obs["n_counts"] * share, np.asarray(thinned.X.sum(1)).ravel())
    thinned.X.eliminate_zeros()
    return thinned[np.asarray(thinned.X.sum(1)).ravel() > 0].copy()


def make_queries(sets: dict[str, anndata.AnnData], reference: str):
    """Yield (kind, name, cells) of the queries for a reference."""
    own = sets[reference]
    half = make_split(own, test_share=0.5, seed=1)["part"].reindex(own.obs_names).to_numpy() == "test"
    yield "clean", f"{reference}, other cells", own[half]
    if reference in BLOOD:
        for name in [*BLOOD, "pbmc_pool"]:
            if name in sets and name != reference:
                groups = sets[name].obs.groupby("batch", observed=True).groups
                groups = {"all": slice(None)} if name == "zheng_facs" else groups  # there a batch is a type
                for batch, cells in groups.items():
                    yield "clean", f"{name}/{batch}", sets[name][cells]
    else:
        return
    for name in OTHERS:
        if name in sets:
            yield OTHERS[name], name, sets[name]
    mouse = sets["baron_mini"][sets["baron_mini"].obs["batch"].astype(str).str.contains("mouse")]
    yield "bad", "pancreas", sets["baron_mini"]
    if mouse.n_obs:
        yield "bad", "mouse pancreas", mouse
    yield "bad", "ten times shallower", thin(own[half], 0.1)
    shuffled = own[half].copy()
    shuffled.var_names = np.random.default_rng(0).permutation(shuffled.var_names)
    yield "bad", "genes permuted", shuffled
    yield (
        "bad",
        "a tenth of the genes",
        own[half][:, np.random.default_rng(0).permutation(own.n_vars)[: own.n_vars // 10]],
    )
    same = own[half].copy()
    same.obs_names = [f"other{i}" for i in range(same.n_obs)]
    yield "same cells", "the same cells, renamed", same


def read_others() -> dict[str, anndata.AnnData]:
    """Return sets that the catalogue does not have yet, from files of the mirror, where they are."""
    mirror, found = Path(os.environ.get("SCBERT_MIRROR", "none")), {}
    for name, pattern in {
        "kang_control": "wheels/*/*/datasets/pbmc_ctrl.h5ad",
        "kang_stimulated": "wheels/*/*/datasets/pbmc_stim.h5ad",
        "heart_1k": "**/heart_sub.h5ad",
    }.items():
        for file in sorted(mirror.glob(pattern))[:1]:
            cells = anndata.read_h5ad(file)
            found[name] = cells[np.random.default_rng(0).permutation(cells.n_obs)[:2000]].copy()
    return found


def read_kang(condition: str) -> anndata.AnnData:
    """Return 3,000 labelled cells of the Kang study, "ctrl" or "stim", with ``obs["broad"]``, from files of the mirror."""
    mirror = Path(os.environ["SCBERT_MIRROR"])
    cells = anndata.read_h5ad(next(mirror.glob(f"wheels/*/*/datasets/pbmc_{condition}.h5ad")))
    table = pd.read_csv(next(mirror.glob("bioinfoDZ/RISC/*/RISC_Supplementary/GSE96583/Anno0.tsv")), sep="\t")
    table = table[table["Set"] == {"ctrl": "IFN-", "stim": "IFN+"}[condition]].set_index("scBarcode")["Type0"]
    cells.obs["type"] = table.reindex(cells.obs_names.str.replace(".", "-", regex=False)).to_numpy()
    cells.obs["type"] = cells.obs["type"].str.replace(r"^IFN[+-] ", "", regex=True)
    cells.obs["broad"] = cells.obs["type"].map(KANG)
    cells = cells[cells.obs["broad"].notna()]
    return cells[np.sort(np.random.default_rng(0).permutation(cells.n_obs)[:3000])].copy()


def main():
    """Print a row a pair, and how many clean ones are warned of."""
    sets = {}
    for name in (*BLOOD, "pbmc_pool", "baron_mini"):
        try:
            sets[name] = scbert.datasets.load(name)
        except ValueError as error:
            print(f"{name} is not here: {error}", file=sys.stderr)
    sets |= read_others()
    rows = []
    for reference in [name for name in BLOOD if name in sets]:
        sets[reference] = scbert.protocols.drop_rare(sets[reference], minimum=8)
        half = make_split(sets[reference], test_share=0.5, seed=1)["part"].reindex(sets[reference].obs_names)
        memory, genes, _ = learn(sets[reference][(half == "train").to_numpy()])
        for kind, name, query in make_queries(sets, reference):
            if kind == "same cells":
                query = sets[reference][(half == "train").to_numpy()].copy()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                try:
                    found, said = judge(memory, genes, query)
                except ValueError as error:
                    found, said = {}, [f"refused: {error}"]
            ratio = found.get("depth", np.nan) / found.get("depth_of_training", np.nan)
            apart = not 1 / 3 <= ratio <= 3
            if kind == "clean" and apart:
                kind = "apart in depth"
            row = {"reference": reference, "kind": kind, "query": name, "depth_ratio": ratio} | {
                key: found.get(key)
                for key in ("lacking", "profile", "unlike", "agreement", "largest_share", "same_cells")
            }
            rows.append(row | {"said": " | ".join(said)})
            print({k: round(v, 2) if isinstance(v, float) else v for k, v in rows[-1].items()}, flush=True)
    table = pd.DataFrame(rows)
    table.to_csv(os.environ.get("OUT", "queries.csv"), index=False)
    print(table.assign(warned=table["said"] != "").groupby("kind")["warned"].agg(["size", "sum"]))
    try_limits(table)


def try_limits(table: pd.DataFrame) -> None:
    """Print how limits that one half of the pairs sets do on the other half: by reference, and at random.

    A limit lies half way between the furthest clean pair of that half and the nearest bad one beyond it. Pairs of like depth
    are clean by definition, so that the limit of depth is given.
    """
    table = table[table["kind"].isin(["clean", "bad"])].dropna(subset=["profile"])
    first = table["reference"].isin(["zheng_facs", "pbmc3k"]).to_numpy()
    rows = {"references zheng_facs and pbmc3k set, the other two report": first, "the reverse": ~first}
    for seed in range(100):
        rows[seed] = np.random.default_rng(seed).random(len(table)) < 0.5
    found = []
    for how, sets in rows.items():
        ours, others = table[sets], table[~sets]
        clean, bad = (ours[ours["kind"] == kind] for kind in ("clean", "bad"))
        limits = {}
        for name, sign in (("lacking", 1), ("unlike", 1), ("profile", -1)):
            edge = (sign * clean[name]).max()
            beyond = sign * bad[name][sign * bad[name] > edge]
            limits[name] = sign * (edge + (beyond.min() - edge) / 2) if len(beyond) else sign * np.inf
        off = ~others["depth_ratio"].between(0.2, 5) | (others["lacking"] > limits["lacking"])
        off |= (others["unlike"] > limits["unlike"]) | (others["profile"] < limits["profile"])
        kinds = others.assign(off=off).groupby("kind")["off"].agg(["sum", "size"])
        found.append([*kinds.loc["clean"], *kinds.loc["bad"]])
        if isinstance(how, str):
            said = {name: round(limit, 3) for name, limit in limits.items()}
            print(
                f"{how}: {said}: false {found[-1][0]} of {found[-1][1]} clean, found {found[-1][2]} of {found[-1][3]} bad"
            )
            print(others[off & (others["kind"] == "clean")][["reference", "query", *limits]].to_string())
    clean, n_clean, bad, n_bad = np.sum(found[2:], axis=0)
    print(f"100 random halves: false {clean / n_clean:.1%} of clean, found {bad / n_bad:.1%} of bad")


if __name__ == "__main__":
    main()
