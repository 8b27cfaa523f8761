"""Figures of notebook 06: what depth, platform and study shift do to accuracy, to tokens and to embeddings.

Each function that draws returns its axes.
"""

import textwrap
from collections.abc import Mapping, Sequence

import anndata
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns

from ..data.preprocess import library_size, tokenize
from ..evaluate.embeddings import OF_BATCHES, OF_LABELS
from .plot import (
    SCREEN,
    color_labels,
    dodge,
    draw_intervals,
    draw_trainings,
    legend_beside,
    legend_of_parts,
    make_panels,
    spell,
    style_methods,
    take_metric,
)

SPELT = {  # names of metrics and embeddings in figures
    "label_silhouette": "label silhouette",
    "label_purity": "neighbours of\nthe same label",
    "label_lisi": "label LISI (cLISI)",
    "nmi": "NMI of clusters",
    "nmi_best": "NMI, best\nresolution",
    "ari": "ARI of clusters",
    "ari_best": "ARI, best\nresolution",
    "batch_silhouette": "batch silhouette\nwithin labels",
    "batch_mixing": "neighbours of other\nbatches / chance",
    "batch_lisi": "batch LISI (iLISI)",
    "pca": "PCA",
    "logistic_regression": "logistic\nregression, logits",
    "harmony": "Harmony",
    "scbert": "scBERT",
    "scbert_logits": "scBERT, logits",
    "scbert_encoder": "scBERT, before\nfine-tuning",
}
MARKS = {  # of embeddings: those of the methods have their method's style
    "pca": ("0.45", "X"),
    "harmony": ("#029e73", "D"),
    "scbert_encoder": ("#7fbfea", "^"),
    "scbert_logits": ("#56308c", "v"),
}


def dose_response(
    table: pd.DataFrame,
    metric: str = "accuracy",
    *,
    methods: Sequence[str] | None = None,
    trainings: pd.DataFrame | None = None,
    n_columns: int = 3,
) -> np.ndarray:
    """Draw a metric against the severity of each simulated effect: a panel an effect, a line a method with intervals.

    `table` has value, low and high by level, method and metric, in the index or in columns. Levels are those of
    `scbert.simulate.simulate_doses`: "none:0" is at the left of every panel, "depth:1" in that of depth; those of three
    parts are left out. A ValueError without the metric, or an effect but "none". Each of the `trainings` is a small dot.
    """
    rows = take_metric(table, metric, methods)
    methods = list(dict.fromkeys(rows["method"]) if methods is None else methods)
    parts = rows["level"].str.split(":")
    rows = rows[parts.str.len() == 2].assign(effect=parts.str[0], severity=parts.str[1].astype(float))
    effects = [effect for effect in dict.fromkeys(rows["effect"]) if effect != "none"]
    if not effects:
        raise ValueError("The table has no effect but none: simulate one at least.")
    axes = make_panels(len(effects), n_columns, width=2.9, height=2.7, beside=2, sharex=True, sharey=True)
    styles, severities = style_methods(methods), np.sort(rows["severity"].unique())
    gap = np.diff(severities).min() if len(severities) > 1 else 1.0
    for ax, effect in zip(axes, effects, strict=True):
        own = rows[rows["effect"].isin(["none", effect])].sort_values("severity")
        for shift, method in zip(dodge(len(methods), 0.06) * gap, methods, strict=True):
            line = own[own["method"] == method]
            at = line["severity"].to_numpy(float) + shift
            draw_intervals(ax, at, line, "-", label=spell(method), **styles[method])
            if trainings is not None:
                places = own.drop_duplicates("level").set_index("level")["severity"]
                draw_trainings(ax, trainings[trainings["method"] == method], metric, "protocol", places, shift)
        ax.set(title=spell(effect), xlabel="severity")
        ax.set_xticks(severities, [f"{severity:g}" for severity in severities])
        ax.tick_params(labelbottom=True)
        ax.grid(axis="y", color="0.9")
    for ax in axes[::n_columns]:
        ax.set_ylabel(spell(metric))
    legend_beside(axes[0])
    return axes


def mixing(table: pd.DataFrame, *, embeddings: Sequence[str] | None = None, title: str = "") -> np.ndarray:
    """Draw metrics of several embeddings side by side: what is kept of types on the left, how studies mix on the right.

    `table` is from `scbert.embeddings.measure_mixing` or `scbert.batch_effect.average_mixing`, by embedding and metric, in
    the index or in columns; a ValueError if none of these metrics and `embeddings` is there. The latter stand from top to
    bottom within a metric; all if None. The dashed line is at 1, which batch_mixing may exceed.

    Paper: Fig. 3a, 3b, in numbers.
    """
    rows = table.reset_index() if any(table.index.names) else table
    embeddings = list(dict.fromkeys(rows["embedding"]) if embeddings is None else embeddings)
    rows = rows[rows["embedding"].isin(embeddings)]
    sides = [[metric for metric in part if metric in set(rows["metric"])] for part in (OF_LABELS, OF_BATCHES)]
    if not any(sides):
        raise ValueError("The table has no metric of these embeddings: see scbert.embeddings.measure_mixing.")
    styles = style_methods([name for name in embeddings if name not in MARKS])
    styles |= {name: dict(zip(("color", "marker"), MARKS[name], strict=True)) for name in embeddings if name in MARKS}
    height = 1.1 + (0.2 + 0.08 * len(embeddings)) * max(map(len, sides))
    axes = make_panels(2, width=4.8, height=height)
    for ax, metrics, name in zip(axes, sides, ("types kept apart", "studies mixed"), strict=True):
        for shift, embedding in zip(dodge(len(embeddings), 0.32), embeddings, strict=True):
            own = rows[rows["embedding"] == embedding].set_index("metric").reindex(metrics).dropna(subset="value")
            y = np.array([metrics.index(metric) for metric in own.index]) + shift
            arms = np.clip([own["value"] - own["low"], own["high"] - own["value"]], 0, None)
            label = SPELT.get(embedding, spell(embedding))
            ax.errorbar(own["value"], y, xerr=arms, ls="", ms=6, elinewidth=1.2, mec="white", mew=0.4, label=label,
                        **styles[embedding])  # fmt: skip
        for edge in range(1, len(metrics)):
            ax.axhline(edge - 0.5, color="0.88", lw=0.8)
        ax.axvline(1, color="0.6", lw=0.8, ls="--")
        ax.set_yticks(range(len(metrics)), [SPELT.get(metric, spell(metric)) for metric in metrics], fontsize=8)
        ax.set(title=name, ylim=(len(metrics) - 0.5, -0.5), xlabel="0 worst, 1 best")
        own = rows[rows["metric"].isin(metrics)]
        ax.set_xlim(min(0, own["low"].min()) - 0.03, max(1, own["high"].max()) + 0.03)
        ax.grid(axis="x", color="0.93")
        ax.set_axisbelow(True)
        ax.tick_params(axis="y", length=0)
        sns.despine(ax=ax, left=True)
    legend_beside(axes[0] if sides[0] else axes[1])
    if title:
        axes[0].figure.suptitle(title, fontsize=10)
    return axes


def count_token_shares(
    worlds: Mapping[str, anndata.AnnData], genes: Sequence[str] | None = None, *, n_bins: int = 5
) -> pd.DataFrame:
    """Return the share of each token, 1 and up, among the expressed genes of each study's cells, and its median depth.

    `worlds` is name -> cells with counts in ``X`` and ``obs["study"]``; `genes` and `n_bins` are of
    `scbert.preprocess.tokenize`. A gene with too few molecules for token 1 is not among the expressed.

    Returns
    -------
    A row a world and study: columns 1 to `n_bins`, and median_counts, the median library size.
    """
    rows = {}
    for name, cells in worlds.items():
        bins = tokenize(cells.copy(), genes=genes, n_bins=n_bins).layers["bins"].tocsr()
        studies, sizes = cells.obs["study"].astype(str).to_numpy(), library_size(cells)
        for study in sorted(set(studies)):
            own = np.flatnonzero(studies == study)
            counts = np.bincount(bins[own].data, minlength=n_bins + 1)[1:]
            rows[name, study] = [*(counts / counts.sum()), np.median(sizes[own])]
    columns = [*range(1, n_bins + 1), "median_counts"]
    index = pd.MultiIndex.from_tuples(rows, names=["level", "study"])
    return pd.DataFrame(list(rows.values()), index=index, columns=columns)


def depth_of_tokens(table: pd.DataFrame, *, n_columns: int = 2) -> np.ndarray:
    """Draw the share of each token among expressed genes, a bar a study: where depth differs, so do the tokens.

    A panel for each world of `count_token_shares`, with median counts beside the bars. A ValueError if shares of a
    study do not sum to one.
    """
    table, depths = table.drop(columns="median_counts"), table["median_counts"]
    if not np.allclose(table.sum(axis=1).to_numpy(), 1):
        raise ValueError("The shares of a study's tokens must sum to one: see count_token_shares.")
    panels = list(dict.fromkeys(table.index.get_level_values(0)))
    most = max(len(table.loc[panel]) for panel in panels)
    axes = make_panels(len(panels), n_columns, width=4.3, height=0.95 + 0.3 * most, beside=1, sharex=True)
    colors = sns.color_palette("viridis", table.shape[1])
    for ax, panel in zip(axes, panels, strict=True):
        shares, left = table.loc[panel], 0
        for token, color in zip(table.columns, colors, strict=True):
            ax.barh(shares.index, shares[token], left=left, color=color, label=str(token), height=0.75)
            left = left + shares[token]
        for y, study in enumerate(shares.index):
            ax.text(1.02, y, f"{depths.loc[(panel, study)]:,.0f}", va="center", fontsize=8, color="0.3")
        ax.text(1.02, -0.75, "median\ncounts", va="bottom", fontsize=7, color="0.3")
        ax.set(xlim=(0, 1), xlabel="share among expressed genes", ylim=(len(shares) - 0.5, -0.5))
        ax.set_title(textwrap.fill(spell(panel), 34), fontsize=10)
        ax.tick_params(labelsize=8, labelbottom=True)
        sns.despine(ax=ax, left=True)
    legend_beside(axes[0], title="token")
    return axes


def embeddings(places: Mapping[str, np.ndarray], studies: Sequence[str], labels: Sequence[str]) -> np.ndarray:
    """Scatter the same cells in several embeddings: by study in the top row, by type in the bottom row.

    `places` is name -> (cells, 2); `studies` and `labels` are (cells,). Returns the axes, (2, embeddings). A ValueError if
    there is no embedding, or one of another number of cells.

    Paper: Fig. 3a, 3b.
    """
    studies, labels = np.asarray(studies).astype(str), np.asarray(labels).astype(str)
    for name, place in places.items():
        if len(place) != len(studies) or len(studies) != len(labels):
            raise ValueError(f"{name} has {len(place)} cells, for {len(studies)} studies and {len(labels)} labels.")
    if not places:
        raise ValueError("There is no embedding to show.")
    names = sorted(set(studies))
    study_colors = dict(zip(names, plt.cm.viridis(np.linspace(0, 0.88, len(names))), strict=True))
    parts = {"study": (studies, study_colors), "cell type": (labels, color_labels(labels))}
    _, axes = plt.subplots(2, len(places), figsize=(1.9 * len(places) + 2.3, 4.1), squeeze=False,
                           layout="constrained", dpi=SCREEN - 14)  # fmt: skip
    order = np.random.default_rng(0).permutation(len(studies))  # so that no study lies on top of another
    size = float(np.clip(4000 / max(len(studies), 1), 3, 14))
    for (title, (values, palette)), line in zip(parts.items(), axes, strict=True):
        colors = [palette[value] for value in values[order]]
        for ax, (name, place) in zip(line, places.items(), strict=True):
            ax.scatter(*np.asarray(place)[order, :2].T, c=colors, s=size, linewidths=0, rasterized=True)
            ax.set(xticks=[], yticks=[])
            if title == "study":
                ax.set_title(SPELT.get(name, spell(name)), fontsize=9)
            ax.spines[:].set(color="0.75", visible=True)
        line[0].set_ylabel(title)
    legend_of_parts(axes[0, 0], {title: palette for title, (_, palette) in parts.items()}, size=5)
    return axes
