"""Sets joined: to pretrain on, without cells that are tested on, and to carry annotation from one to another."""

from pathlib import Path

import anndata

from ..evaluate.hygiene import drop_duplicates, find_duplicates
from ..sources import datasets
from ..sources.simulate import simulate_studies
from .pretraining import concatenate, take_counts


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
    parts = [take_counts(adata, name, label_key) for adata, name in zip((one, other), stems, strict=True)]
    joined = concatenate(parts, names)
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
