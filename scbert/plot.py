"""One function a figure: each draws on the axes it is given, or on its own, and returns them."""

from collections.abc import Sequence

import anndata
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from sklearn.metrics import confusion_matrix

GREY = "0.45"


def color_labels(labels: Sequence[str]) -> dict[str, tuple | str]:
    """Return a colour for each label, safe for colour-blind readers up to ten labels; ``Unassigned`` is grey."""
    names = [label for label in sorted(set(labels)) if label != "Unassigned"]
    safe = [color for i, color in enumerate(sns.color_palette("colorblind", 10)) if i != 7] + ["#222255"]  # 7 is grey
    palette = safe if len(names) <= len(safe) else sns.husl_palette(len(names))
    colors = dict(zip(names, palette, strict=False))
    return colors | {"Unassigned": GREY} if "Unassigned" in set(labels) else colors


def place_cells(adata: anndata.AnnData, seed: int = 0, *, basis: str | None = None) -> None:
    """Give cells without ``obsm["X_umap"]`` one: UMAP of 30 principal components of log-normalised counts.

    With `basis`, such as "X_scbert", UMAP of these columns of ``obsm``, in place of any there is.
    """
    if "X_umap" in adata.obsm and basis is None:
        return
    import scanpy

    from .preprocess import lognormalize

    light = anndata.AnnData(lognormalize(adata), obs=adata.obs[[]].copy())
    if basis is None:
        scanpy.pp.pca(light, n_comps=min(30, min(light.shape) - 1), random_state=seed)
    else:
        light.obsm["X_pca"] = adata.obsm[basis]
    scanpy.pp.neighbors(light, use_rep="X_pca", random_state=seed)
    scanpy.tl.umap(light, random_state=seed)
    adata.obsm["X_umap"] = light.obsm["X_umap"]


def embedding(
    adata: anndata.AnnData,
    color: str,
    *,
    basis: str = "X_umap",
    background: np.ndarray | None = None,
    palette: dict | None = None,
    title: str = "",
    legend: bool = True,
    ax: Axes | None = None,
) -> Axes:
    """Scatter cells, coloured by a column of `obs`: labels with a legend, or numbers with a colour bar.

    Parameters
    ----------
    background
        (cells, 2), further points in pale grey behind.
    palette
        Label -> colour, to share between panels; the legend names all of it. `color_labels` of the column if None.

    Paper: Fig. 2b.
    """
    ax = ax or plt.subplots(figsize=(4.5, 4))[1]
    if background is not None:
        ax.scatter(*background[:, :2].T, s=5, color="0.88", linewidths=0, rasterized=True)
    x, y = adata.obsm[basis][:, :2].T
    values = adata.obs[color]
    size = float(np.clip(6000 / max(len(x), 1), 4, 26))
    if pd.api.types.is_numeric_dtype(values):
        points = ax.scatter(x, y, c=values, s=size, cmap="viridis", vmin=0, vmax=1, linewidths=0, rasterized=True)
        ax.figure.colorbar(points, ax=ax, shrink=0.7)
    else:
        for label, dot in (palette or color_labels(values.astype(str))).items():
            here = (values == label).to_numpy()
            style = {"marker": "x", "linewidths": 1} if label == "Unassigned" else {"linewidths": 0}
            ax.scatter(x[here], y[here], s=size, color=dot, label=label, rasterized=True, **style)
        if legend:
            ax.legend(frameon=False, fontsize=7, markerscale=1.5, loc="center left", bbox_to_anchor=(1, 0.5))
    ax.set(title=title or color, xticks=[], yticks=[], xlabel="UMAP 1", ylabel="UMAP 2")
    sns.despine(ax=ax, left=True, bottom=True)
    return ax


def confusion(truth: Sequence[str], predicted: Sequence[str], *, title: str = "", ax: Axes | None = None) -> Axes:
    """Draw what became of each true type: rows sum to one, the number of cells stands beside the name.

    Paper: Fig. 2c.
    """
    labels = sorted(set(truth) | set(predicted))
    counts = confusion_matrix(truth, predicted, labels=labels)
    totals = counts.sum(1)
    rows = totals > 0
    shares = pd.DataFrame(
        counts[rows] / totals[rows, None],
        index=[f"{label} ({n})" for label, n in zip(labels, totals, strict=True) if n],
        columns=labels,
    )
    ax = ax or plt.subplots(figsize=(1.5 + 0.5 * len(labels), 1 + 0.42 * len(labels)))[1]
    numbers = shares.map(lambda share: f"{share:.2f}" if share else "")
    sns.heatmap(
        shares, vmin=0, vmax=1, cmap="cividis", annot=numbers, fmt="", annot_kws={"size": 7}, square=True, ax=ax,
        cbar_kws={"label": "share of the true type", "shrink": 0.7},
    )  # fmt: skip
    ax.tick_params(labelsize=8)
    ax.set_xticklabels(ax.get_xticklabels(), rotation=45, ha="right")
    ax.set(title=title, xlabel="predicted", ylabel="true (cells)")
    return ax


def scores(table: pd.DataFrame, metric: str, *, highlight: str = "scbert", ax: Axes | None = None) -> Axes:
    """Draw each method's score with its 95 % interval, best on top; `table` is that of `evaluate.score`.

    Paper: Fig. 2a, with intervals in place of box plots.
    """
    rows = table.xs(metric, level="metric").sort_values("value")
    ax = ax or plt.subplots(figsize=(5, 0.6 + 0.4 * len(rows)))[1]
    for y, (method, row) in enumerate(rows.iterrows()):
        color = "C0" if method.startswith(highlight) else "0.35"
        ax.plot([row["low"], row["high"]], [y, y], color=color, lw=2)
        ax.plot(row["value"], y, "o", color=color, ms=6)
    ax.set(yticks=range(len(rows)), yticklabels=rows.index, xlim=(0, 1), xlabel=metric.replace("_", " "))
    ax.grid(axis="x", color="0.9")
    sns.despine(ax=ax, left=True)
    return ax


def gene_names(table: pd.DataFrame) -> np.ndarray:
    """Draw how many genes have which status, and what share of the counts is theirs; of `genes.count_statuses`.

    Returns
    -------
    Two axes.
    """
    _, axes = plt.subplots(1, 2, figsize=(9, 2.6), sharey=True)
    for ax, column, color, number in zip(axes, table, ["C0", "C1"], ["{:,}", "{:.1%}"], strict=True):
        bars = ax.barh(table.index, table[column], color=color)
        ax.bar_label(bars, labels=[number.format(value) for value in table[column]], padding=3, fontsize=8)
        ax.set(xlabel=column.replace("_", " "), xlim=(0, table[column].max() * 1.2))
        ax.locator_params(axis="x", nbins=5)
        sns.despine(ax=ax)
    axes[0].invert_yaxis()
    axes[0].figure.tight_layout()
    return axes


def history(table: pd.DataFrame, columns: dict[str, str], *, ylabel: str, ax: Axes | None = None) -> Axes:
    """Draw columns of a training history against the epoch; `columns` is column -> name in the legend."""
    ax = ax or plt.subplots(figsize=(4.5, 3))[1]
    for (column, name), style in zip(columns.items(), ("-o", "--s", ":^", "-."), strict=False):
        ax.plot(table["epoch"], table[column], style, ms=3, label=name)
    ax.set(xlabel="epoch", ylabel=ylabel)
    ax.legend(frameon=False, fontsize=8)
    sns.despine(ax=ax)
    return ax


def by_token(table: pd.DataFrame, names: dict[str, str], ax: Axes | None = None) -> Axes:
    """Draw masked accuracy against the true token, one line a method; `names` says which columns, and their labels."""
    ax = ax or plt.subplots(figsize=(5.5, 3.2))[1]
    for (column, label), marker in zip(names.items(), "oSDv^"[: len(names)].lower(), strict=True):
        ax.plot(table.index.astype(str), table[column], marker=marker, label=label, lw=2 if marker == "o" else 1)
    ax.set_xticks(range(len(table)), [f"{token}\n(n = {n:,})" for token, n in table["n_masked"].items()], fontsize=8)
    ax.set(xlabel="true token (masks)", ylabel="masked accuracy", ylim=(-0.03, 1.03))
    ax.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    sns.despine(ax=ax)
    return ax


def scale_logarithmically(ax: Axes, x_ticks: Sequence[int]) -> Axes:
    """Make both axes logarithmic, with plain numbers: the given ones below, 1, 2 and 5 times powers of ten beside."""
    ax.set(xscale="log", yscale="log")
    ax.set_xticks(x_ticks, [f"{tick:,}" for tick in x_ticks])
    ax.yaxis.set_major_locator(plt.LogLocator(subs=(1, 2, 5)))
    ax.yaxis.set_major_formatter("{x:g}")
    ax.minorticks_off()
    return ax


def costs(sweep: pd.DataFrame) -> np.ndarray:
    """Draw seconds and peak memory against tokens, a column a step and a line an attention.

    Parameters
    ----------
    sweep
        From `scbert.performance.measure_afresh`: tokens, attention, step, seconds and peak_mb.

    Returns
    -------
    The axes, (2, steps).
    """
    lengths, steps = sorted(sweep["tokens"].unique()), sweep["step"].unique()
    colors = dict(zip(sweep["attention"].unique(), sns.color_palette("colorblind"), strict=False))
    _, axes = plt.subplots(2, len(steps), figsize=(9, 6.4), sharex=True, squeeze=False)
    for row, (column, label) in zip(
        axes, {"seconds": "seconds a cell", "peak_mb": "peak MB a cell"}.items(), strict=True
    ):
        for ax, step in zip(row, steps, strict=True):
            lines = sweep[sweep["step"] == step].groupby("attention", sort=False)
            for marker, (name, part) in zip("osD^", lines, strict=False):
                ax.plot(part["tokens"], part[column], f"{marker}-", color=colors[name], label=name.replace("_", " "))
            scale_logarithmically(ax, lengths).set(ylabel=label, title=step if column == "seconds" else "")
    for ax in axes[1]:
        ax.set_xlabel("tokens")
    axes[0, 0].legend(fontsize=8, loc="upper left")
    axes[0, 0].figure.tight_layout()
    return axes
