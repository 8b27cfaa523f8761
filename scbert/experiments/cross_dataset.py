"""Sets joined: to pretrain on, without cells that are tested on, and to carry annotation from one to another."""

import warnings
from collections.abc import Mapping
from pathlib import Path

import anndata
import numpy as np
import pandas as pd

from ..sources import datasets
from ..evaluate.hygiene import drop_duplicates, find_duplicates
from ..data.preprocess import library_size
from ..evaluate.protocols import choose_pool
from ..sources.simulate import simulate_studies


def load_sets(names: str, *, label_key: str | None = None, batch_key: str | None = None) -> dict[str, anndata.AnnData]:
    """Load the sets of a notebook's parameter `dataset`: one, or several with `` + `` between them.

    Parameters
    ----------
    names
        Catalogue names and paths, such as ``"pbmc_pool + zheng_facs"``.
    label_key, batch_key
        As in `scbert.datasets.load`; a set of the catalogue without labels needs none.

    Raises
    ------
    ValueError
        A set is named twice, or see `scbert.datasets.load`.
    """
    parts = [name.strip() for name in names.split(" + ")]
    if len(set(parts)) < len(parts):
        raise ValueError(f"dataset names a set twice: {names}.")
    sets = {}
    for name in parts:
        has_labels = datasets.CATALOGUE.get(name, {}).get("labels", True)
        sets[name] = datasets.load(name, label_key=label_key if has_labels else None, batch_key=batch_key)
    return sets


def join_sets(
    sets: Mapping[str, anndata.AnnData], *, label_key: str = "cell_type", seed: int = 0
) -> tuple[anndata.AnnData, anndata.AnnData]:
    """Join sets on the genes they share, and hold some of each one's cells out of training.

    Parameters
    ----------
    sets
        Name -> counts, such as `load_sets` returns.
    label_key
        Column of labels, which only chooses cells to hold out; a set without it may be among them.
    seed
        Draws the cells that are held out, where no split is saved.

    Returns
    -------
    Cells to learn from, and cells to measure on: of a labelled set the test cells of `scbert.protocols.choose_pool`,
    which the other notebooks test on, of an unlabelled one a twentieth. ``obs["set"]`` says where a cell is from,
    ``obs["n_counts"]`` its total over all genes of its own set; labels are those of the sets that have any.

    Cells that are in a set named under ``shares_cells_with`` in the catalogue, or in an earlier one of `sets`, are
    dropped, and how many is printed.

    Raises
    ------
    ValueError
        The sets share no gene, or a label has too few cells to be split.

    Paper: Methods, "pretraining" holds no cells out that are named; the script's validation cells are a twentieth.
    """
    learn, held_out, earlier = [], [], {}
    for name, adata in sets.items():
        others = {
            other: datasets.load(other) for other in datasets.CATALOGUE.get(name, {}).get("shares_cells_with", [])
        }
        for other, cells in (others | earlier).items():
            adata = drop_duplicates(adata, cells, other)
        earlier[name] = adata
        if label_key in adata.obs:
            rest, test = choose_pool(adata, name, label_key=label_key, seed=seed)
        else:
            order = np.random.default_rng(seed).permutation(adata.n_obs)
            n_held_out = max(1, adata.n_obs // 20)
            rest, test = np.sort(order[n_held_out:]), np.sort(order[:n_held_out])
        part = _describe(adata, name, label_key)
        learn.append(part[rest])
        held_out.append(part[test])
    return tuple(_concatenate(parts, list(sets)) for parts in (learn, held_out))


def _describe(adata, name, label_key):
    """Return the counts with the three columns that sets of different makes have in common."""
    obs = pd.DataFrame({"set": name, "n_counts": library_size(adata)}, index=adata.obs_names)
    if label_key in adata.obs:
        obs[label_key] = adata.obs[label_key].astype(str)
    return anndata.AnnData(adata.X, obs=obs, var=pd.DataFrame(index=adata.var_names))


def _concatenate(parts, names):
    if len(parts) == 1:
        return parts[0].copy()
    genes = parts[0].var_names
    for part in parts[1:]:
        genes = genes[genes.isin(part.var_names)]
    if not len(genes):
        raise ValueError(f"The sets {', '.join(names)} share no gene name: use the same kind of symbols in all.")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Observation names are not unique", UserWarning)  # for a moment
        joined = anndata.concat([part[:, genes] for part in parts], join="outer")  # of obs: cells without labels stay
    joined.obs_names_make_unique()
    return joined


def load_experiments(
    text: str,
    *,
    label_key: str = "cell_type",
    batch_key: str = "",
    n_studies: int = 3,
    severity: float = 1.0,
    seed: int = 0,
) -> dict[str, anndata.AnnData]:
    """Load the sets that notebook 05 carries annotation across: each with its studies in ``obs["study"]``.

    Parameters
    ----------
    text
        Experiments with semicolons between them, such as ``"pancreas_5tech; zheng_facs -> pbmc3k by cell_type_broad"``.
        A set alone: its studies are left out one at a time. With an arrow: all of one set trains, the other is tested,
        and so are those cells of the first that never train (`scbert.protocols.choose_pool`); both keep the genes that
        they share. ``by`` names another label column than `label_key`.
    label_key, batch_key
        Columns of ``obs``. Where `batch_key` is empty, a set alone is dealt out to simulated studies.
    n_studies, severity, seed
        Of `scbert.simulate.simulate_studies`. With ``n_studies=1`` nothing is simulated: where no `batch_key` is named, all cells are of one study.

    Returns
    -------
    Name -> cells, the name being the set's or ``"<set>-><other>"``. ``obs[label_key]`` and ``obs["study"]`` are text,
    ``obs["n_counts"]``, with an arrow or where the file has it, the totals over all genes measured. ``uns["scbert"]``: "caveat", what to bear in mind, and
    "train_on", the study that trains, for sets with an arrow. Cells that two studies share, see
    `scbert.hygiene.drop_duplicates`, are left in the first only.

    Raises
    ------
    ValueError
        Another form, an experiment named twice, or see `scbert.datasets.load`.
    """
    asked, experiments = {}, {}
    for part in filter(None, map(str.strip, text.split(";"))):
        sets, _, key = (word.strip() for word in part.partition(" by "))
        names = [name.strip() for name in sets.split("->")]
        if not all(names) or len(names) > 2:
            raise ValueError(f"dataset must be a set, or like 'one -> other by column', not {part!r}.")
        stems = [Path(name).stem for name in names]
        if len(set(stems)) < len(stems):
            raise ValueError(
                f"In {part!r} both sets are called {stems[0]}: an experiment is from one set to another, so name the files apart."
            )
        if "->".join(stems) in asked:
            raise ValueError(f"dataset names {part} twice.")
        asked["->".join(stems)] = names, stems, key or label_key
    for title, (names, stems, key) in asked.items():
        loaded = [
            datasets.load(name, label_key=key, batch_key=batch_key or None if len(names) == 1 else None)
            for name in names
        ]
        if len(names) == 1:
            adata = _take_studies(loaded[0], key, batch_key, n_studies, severity, seed)
        else:
            adata = _join_two(loaded, names, stems, key)
        adata.obs[label_key] = adata.obs[key].astype(str)
        experiments[title] = adata
    if not experiments:
        raise ValueError("dataset is empty: name a set, or 'one -> other'.")
    return experiments


def _take_studies(adata, label_key, batch_key, n_studies, severity, seed):
    if not batch_key and n_studies == 1:
        adata.obs["study"] = "all"
        return adata
    if not batch_key:
        return simulate_studies(adata, n_studies=n_studies, severity=severity, label_key=label_key, seed=seed)
    adata.obs["study"] = adata.obs[batch_key].astype(str)
    if adata.uns.get("scbert", {}).get("fractional_counts"):
        print("Counts are fractional, so cells that two studies share cannot be told.")
        return adata
    kept = None
    for study in sorted(set(adata.obs["study"])):
        own = adata[adata.obs["study"] == study]
        if kept is not None:
            shared = own.obs_names.isin(find_duplicates(own, adata[kept], minimum_genes=0)["cell"])
            print(f"{shared.sum()} of {own.n_obs} cells of {study} are in an earlier study too and are left out.")
            own = own[~shared]
        kept = own.obs_names if kept is None else kept.append(own.obs_names)
    return adata[adata.obs_names.isin(kept)].copy()


def _join_two(sets, names, stems, label_key):
    """Return the cells of two sets on their shared genes; obs: set, study, n_counts and the label."""
    one, other = sets
    other = drop_duplicates(other, one, names[0])
    parts = [_describe(adata, name, label_key) for adata, name in zip((one, other), stems, strict=True)]
    joined = _concatenate(parts, names)
    joined.obs["study"] = joined.obs["set"].astype(str)
    caveats = [
        f"{stem}: {adata.uns['scbert']['caveat']}"
        for stem, adata in zip(stems, sets, strict=True)
        if adata.uns.get("scbert", {}).get("caveat")
    ]
    if names[0] in datasets.CATALOGUE.get(names[1], {}).get("labels_from", []):
        caveats.append(
            f"The labels of {names[1]} were made by comparing its cells with those of {names[0]}: naming them recovers a "
            "labelling procedure, and is no test on labels found otherwise."
        )
    joined.uns["scbert"] = {"train_on": stems[0], "caveat": "\n".join(caveats)}
    fractional = [adata.uns.get("scbert", {}).get("fractional_counts") for adata in sets]
    if any(fractional):
        joined.uns["scbert"]["fractional_counts"] = "; ".join(filter(None, fractional))
    return joined
