"""Cells to pretrain on: those of one set or of several, without those that something is tested on."""

from collections.abc import Mapping

import anndata
import numpy as np
import pandas as pd

from . import datasets
from .hygiene import drop_duplicates
from .preprocess import library_size
from .protocols import split_cells


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
    Cells to learn from, and cells to measure on: of a labelled set the test cells of `scbert.protocols.split_cells`,
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
            train, validation, test = split_cells(adata, name, label_key=label_key, seed=seed)[0]
            rest = np.sort([*train, *validation])
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
    joined = anndata.concat([part[:, genes] for part in parts], join="outer")  # of obs: cells without labels stay
    joined.obs_names_make_unique()
    return joined
