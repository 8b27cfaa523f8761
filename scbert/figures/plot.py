"""One function a figure: each draws on the axes it is given, or on its own, and returns them."""

import itertools
import textwrap
from collections.abc import Mapping, Sequence

import anndata
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from sklearn.metrics import confusion_matrix

from ..evaluate.embeddings import embed_pca

GREY = "0.45"
SCREEN = 72  # dots an inch of figures with many panels in a notebook, to keep it small; files have 120
STYLES = {  # of the methods, in all figures: safe for colour-blind readers, and no two share a marker and a hue
    "scbert": ("#0173b2", "o"),
    "scbert_scratch": ("#7fbfea", "o"),
    "logistic_regression": ("#de8f05", "s"),
    "majority": ("0.6", "X"),
    "nearest_centroid": ("#029e73", "D"),
    "celltypist": ("#cc78bc", "^"),
    "singler": ("#8c5a2b", "v"),
    "scanvi": ("#d55e00", "P"),
}
MORE_STYLES = [("#56308c", "<"), ("#c9b800", ">"), ("#fbafe4", "p"), ("#222255", "h"), ("#44aa99", "*"), ("0.3", "d")]


def color_labels(labels: Sequence[str]) -> dict[str, tuple | str]:
    """Return a colour for each label, safe for colour-blind readers up to ten labels; ``Unassigned`` is grey."""
    names = [label for label in sorted(set(labels)) if label != "Unassigned"]
    safe = [color for i, color in enumerate(sns.color_palette("colorblind", 10)) if i != 7] + ["#222255"]  # 7 is grey
    palette = safe if len(names) <= len(safe) else sns.husl_palette(len(names))
    colors = dict(zip(names, palette, strict=False))
    return colors | {"Unassigned": GREY} if "Unassigned" in set(labels) else colors


def style_methods(methods: Sequence[str]) -> dict[str, dict]:
    """Return colour, marker and filling of each method, as matplotlib's keywords: its own one in all figures, if it has one.

    A variant, such as "scbert:oversample", has the colour of its method, and a marker of its own that is not filled.
    """
    parts = {name: name.partition(":")[::2] for name in methods}  # name -> method, variant
    others = [method for method in dict.fromkeys(method for method, _ in parts.values()) if method not in STYLES]
    styles = STYLES | dict(zip(others, itertools.cycle(MORE_STYLES), strict=False))
    suffixes = sorted({variant for _, variant in parts.values()} - {""})
    variants = dict(zip(suffixes, itertools.cycle("<>^dvp"), strict=False))
    chosen = {}
    for name, (method, variant) in parts.items():
        color, marker = styles[method]
        chosen[name] = {"color": color, "marker": variants.get(variant, marker)}
        chosen[name] |= {"markerfacecolor": "white"} if variant else {}
    return chosen


def spell(name: str) -> str:
    """Return the name of a method, metric or column as figures write it: "macro F1" for "macro_f1"."""
    return str(name).replace("_", " ").replace("f1", "F1")


def make_panels(
    n: int, n_columns: int | None = None, *, width: float, height: float, beside: float = 0, above: float = 0, **options
) -> np.ndarray:
    """Return the axes of `n` panels, row by row, `n_columns` side by side (all if None), each `width` x `height` inches.

    `beside` and `above` are inches of the whole figure for more names and a legend, `options` of `plt.subplots`.
    """
    n_columns = min(n_columns or n, n)
    n_rows = -(-n // n_columns)
    size = (width * n_columns + beside, height * n_rows + above)
    _, axes = plt.subplots(n_rows, n_columns, figsize=size, squeeze=False, layout="constrained", dpi=SCREEN, **options)
    sns.despine()
    for ax in axes.flat[n:]:
        ax.remove()
    return axes.ravel()[:n]


def dodge(n: int, half: float) -> np.ndarray:
    """Return `n` places side by side, from -`half` to `half`, so that no interval hides another; 0 for one."""
    return np.linspace(-half, half, n) if n > 1 else np.zeros(n)


def legend_beside(ax: Axes, handles: Sequence | None = None, labels: Sequence[str] | None = None, **options) -> None:
    """Draw a legend on the right of the figure: of what these axes show, or of handles, with their own labels or others."""
    if handles is None:
        handles, labels = ax.get_legend_handles_labels()
    labels = [handle.get_label() for handle in handles] if labels is None else labels
    ax.figure.legend(handles, labels, frameon=False, fontsize=8, loc="outside right center", **options)


def legend_of_parts(ax: Axes, parts: Mapping[str, Mapping[str, tuple | str]], *, size: float = 6) -> None:
    """Draw one legend on the right of the figure, of title -> label -> colour: each part under its title, in bold."""
    dots = []
    for title, colors in parts.items():
        dots.append(plt.Line2D([], [], ls="", label=title))
        for name, color in colors.items():
            marker = "x" if name == "Unassigned" else "o"
            dots.append(plt.Line2D([], [], ls="", marker=marker, ms=size, color=color, label=name))
    legend = ax.figure.legend(handles=dots, frameon=False, fontsize=7, loc="outside right center")
    for text in legend.get_texts():
        text.set_fontweight("bold" if text.get_text() in parts else "normal")


def place_cells(adata: anndata.AnnData, seed: int = 0, *, basis: str | None = None) -> None:
    """Give cells without ``obsm["X_umap"]`` one: UMAP of 30 principal components of log-normalised counts.

    With `basis`, such as "X_scbert", UMAP of these columns of ``obsm``, in place of any there is.
    """
    if "X_umap" in adata.obsm and basis is None:
        return
    import scanpy

    light = anndata.AnnData(obs=adata.obs[[]].copy())
    light.obsm["X_pca"] = embed_pca(adata, seed=seed) if basis is None else adata.obsm[basis]
    scanpy.pp.neighbors(light, use_rep="X_pca", random_state=seed)
    scanpy.tl.umap(light, random_state=seed)
    adata.obsm["X_umap"] = light.obsm["X_umap"]


def embeddings(
    adata: anndata.AnnData, color: str, bases: Mapping[str, str | None], *, width: float = 5, seed: int = 0
) -> np.ndarray:
    """Scatter the same cells by UMAPs of several vectors side by side, coloured by label; cells without one are grey.

    Labels are in the column `color` of `obs`. `bases` is title -> what is placed, as in `place_cells`: columns of
    ``obsm``, or principal components of the counts if None. A panel is `width` inches wide.

    Paper: Fig. 2b, 5d.
    """
    labels = adata.obs[color].astype(object)
    palette = {"no label": "0.85"} if labels.isna().any() else {}
    palette |= color_labels(labels.dropna().astype(str))
    figure, axes = plt.subplots(1, len(bases), figsize=(width * len(bases), 0.8 * width), squeeze=False)
    for ax, (title, basis) in zip(axes[0], bases.items(), strict=True):
        vectors = {basis: adata.obsm[basis]} if basis else {}
        cells = anndata.AnnData(adata.X, obs=adata.obs.assign(**{color: labels.fillna("no label")}), obsm=vectors)
        place_cells(cells, seed, basis=basis)
        embedding(cells, color, title=title, palette=palette, legend=ax is axes[0, -1], ax=ax)
    figure.tight_layout()
    return axes[0]


def embedding(
    adata: anndata.AnnData,
    color: str,
    *,
    background: np.ndarray | None = None,
    palette: dict | None = None,
    title: str = "",
    legend: bool = True,
    ax: Axes | None = None,
) -> Axes:
    """Scatter cells, coloured by a column of `obs`: labels with a legend, or numbers with a colour bar.

    `background`, (cells, 2), are further points in pale grey behind. `palette` is label -> colour, to share between
    panels; the legend names all of it. `color_labels` of the column if None.

    Paper: Fig. 2b.
    """
    ax = ax or plt.subplots(figsize=(4.5, 4))[1]
    if background is not None:
        ax.scatter(*background[:, :2].T, s=5, color="0.88", linewidths=0, rasterized=True)
    x, y = adata.obsm["X_umap"][:, :2].T
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


def annotation(adata: anndata.AnnData, table: pd.DataFrame) -> np.ndarray:
    """Scatter annotated cells before all others in pale grey, a panel for each column of a table: labels and numbers.

    `adata` are all cells, with ``obsm["X_umap"]``. `table` has a row an annotated cell: labels, and numbers from 0 to 1.

    Paper: Fig. 2b.
    """
    place = adata.obsm["X_umap"]
    light = anndata.AnnData(obs=table, obsm={"X_umap": place[adata.obs_names.get_indexer(table.index)]})
    texts = [name for name in table if not pd.api.types.is_numeric_dtype(table[name])]
    palette = color_labels([label for name in texts for label in table[name].astype(str)])
    n_rows = table.shape[1] // 2 + 1  # with a place for the legend, the last
    every = plt.subplots(n_rows, 2, figsize=(7.2, 3.3 * n_rows), layout="constrained")[1].ravel()
    axes = every[: table.shape[1]]
    for ax in every:
        ax.axis("off")
    for ax, name in zip(axes, table, strict=True):
        embedding(light, name, background=place, palette=palette, title=spell(name), legend=False, ax=ax)
    dots = axes[list(table).index(texts[-1])].get_legend_handles_labels()
    every[-1].legend(*dots, frameon=False, fontsize=9, markerscale=1.5, loc="center left")
    return axes


def named_cells(
    adata: anndata.AnnData,
    predictions: pd.DataFrame,
    methods: Sequence[str],
    label_key: str = "cell_type",
    batch_key: str | None = None,
    *,
    n_columns: int = 3,
) -> np.ndarray:
    """Scatter cells by batch, by true label, and by what each method calls them, in the same colours.

    `adata` has ``obsm["X_umap"]``; a panel of batches comes first if there is a `batch_key`. Of each method and cell the
    first row of `predictions` counts. Cells without are pale grey; a ValueError if all are.

    Paper: Fig. 2b, 3a, 3b, 3e, 3f.
    """
    named = {
        method: cells.drop_duplicates("cell").set_index("cell")["predicted"].reindex(adata.obs_names)
        for method, cells in predictions.groupby("method")
    }
    for method in methods:
        if method not in named or named[method].isna().all():
            raise ValueError(f"The predictions of {method!r} name none of these cells.")
    truth = adata.obs[label_key].astype(str)
    palette = color_labels([*truth, *(label for method in methods for label in named[method].dropna())])
    panels = {} if batch_key is None else {spell(batch_key): adata.obs[batch_key].astype(str)}
    panels |= {"true label": truth} | {spell(method): named[method] for method in methods}
    axes = make_panels(len(panels), n_columns, width=3.1, height=3.1, beside=2.4)
    parts = {"cell type": palette}
    for ax, (title, values) in zip(axes, panels.items(), strict=True):
        colors = palette
        if batch_key is not None and ax is axes[0]:
            batches = sorted(set(values))
            colors = parts[title] = dict(zip(batches, sns.color_palette("viridis", len(batches)), strict=True))
        shown = anndata.AnnData(obs=pd.DataFrame({title: values}), obsm={"X_umap": adata.obsm["X_umap"]})
        embedding(shown, title, background=adata.obsm["X_umap"], palette=colors, legend=False, ax=ax)
    legend_of_parts(axes[0], parts)
    return axes


def confusion(
    truth: Sequence[str],
    predicted: Sequence[str],
    *,
    labels: Sequence[str] | None = None,
    colorbar: bool = True,
    title: str = "",
    ax: Axes | None = None,
) -> Axes:
    """Draw what became of each true type: rows sum to one, the number of cells stands beside the name.

    `labels` are the columns, and the order of all; those that are true or predicted if None.

    Paper: Fig. 2c.
    """
    labels = sorted(set(truth) | set(predicted)) if labels is None else list(labels)
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
        xticklabels=True, yticklabels=True, cbar=colorbar, cbar_kws={"label": "share of the true type", "shrink": 0.7},
    )  # fmt: skip
    ax.tick_params(labelsize=8)
    ax.set_xticklabels(ax.get_xticklabels(), rotation=45, ha="right", rotation_mode="anchor")
    ax.set(title=title, xlabel="predicted", ylabel="true (cells)")
    return ax


def confusions(predictions: pd.DataFrame, methods: Sequence[str] | None = None) -> np.ndarray:
    """Draw a confusion matrix a method, side by side, on one colour scale and with the same labels.

    Of `predictions` (method, truth, predicted) all repeats and folds are pooled. All methods if None.

    Paper: Fig. 2c, 2e.
    """
    methods = list(dict.fromkeys(predictions["method"]) if methods is None else methods)
    predictions = predictions[predictions["method"].isin(methods)]
    labels = sorted({*predictions["truth"], *predictions["predicted"]})
    size, longest = max(0.42 * len(labels) + 0.3, 1.6), max(map(len, labels))
    beside, above = 1.6 + 0.07 * longest, 0.8 + 0.055 * longest  # the names need room on the left, and slanted below
    axes = make_panels(len(methods), width=size, height=size, beside=beside, above=above)
    for ax, method in zip(axes, methods, strict=True):
        cells = predictions[predictions["method"] == method]
        confusion(cells["truth"], cells["predicted"], labels=labels, colorbar=False, title=spell(method), ax=ax)
        if ax is not axes[0]:
            ax.set(ylabel="", yticks=[])
    shares = axes[0].collections[0]
    axes[0].figure.colorbar(shares, ax=axes, label="share of the true type", shrink=0.6, pad=0.01)
    return axes


def scores(table: pd.DataFrame, metric: str, *, ax: Axes | None = None) -> Axes:
    """Draw each method's score with its 95 % interval, best on top; `table` is that of `scbert.metrics.score`.

    Paper: Fig. 2a, with intervals in place of box plots.
    """
    rows = table.xs(metric, level="metric").sort_values("value")
    ax = ax or plt.subplots(figsize=(5, 0.6 + 0.4 * len(rows)))[1]
    styles = style_methods(rows.index)
    for y, (method, row) in enumerate(rows.iterrows()):
        ax.plot([row["low"], row["high"]], [y, y], color=styles[method]["color"], lw=2)
        ax.plot(row["value"], y, ms=7, mec="white", mew=0.3, **styles[method])
    ax.set(yticks=range(len(rows)), yticklabels=rows.index, xlim=(0, 1), xlabel=metric.replace("_", " "))
    ax.grid(axis="x", color="0.9")
    sns.despine(ax=ax, left=True)
    return ax


def boxes(table: pd.DataFrame, metric: str, *, by: str = "data", order: Sequence[str] | None = None) -> np.ndarray:
    """Draw what each training of each method reached: a box, and every point of it; a panel a data set (column `by`).

    `table` has a row a training and method, from `scbert.metrics.score_trainings`. `order` is that of the methods from
    top to bottom; by median over all panels if None.

    Paper: Fig. 2a.
    """
    if order is None:
        order = table.groupby("method")[metric].median().sort_values(ascending=False).index
    panels, styles = list(dict.fromkeys(table[by])), style_methods(order)
    axes = make_panels(len(panels), width=3, height=0.9 + 0.36 * len(order), beside=1.6, sharey=True)
    for ax, panel in zip(axes, panels, strict=True):
        for y, method in enumerate(order):
            here = (table[by] == panel) & (table["method"] == method)
            values, style = table.loc[here, metric].dropna().to_numpy(), styles[method]
            if len(values) > 2:
                line = {"color": style["color"], "lw": 1.2}
                ax.boxplot(
                    values, positions=[y], orientation="horizontal", widths=0.6, showfliers=False, manage_ticks=False,
                    boxprops=line, whiskerprops=line, capprops=line, medianprops=line | {"lw": 2.4},
                )  # fmt: skip
            ax.scatter(values, y + dodge(len(values), 0.16), s=26, lw=0.3, edgecolors="white", zorder=3, **style)
        ax.set(title=panel if len(panels) > 1 else "", xlabel=spell(metric))
        low = _leave_majority(table[table[by] == panel], metric)
        if low is not None:
            ax.set_xlim(left=low)
            value = table.loc[(table[by] == panel) & (table["method"] == "majority"), metric].mean()
            ax.text(low, list(order).index("majority"), f" \u2190 {value:.2f}", va="center", fontsize=8, color=GREY)
        ax.grid(axis="x", color="0.9")
        ax.set_axisbelow(True)
        sns.despine(ax=ax, left=True)
    axes[0].set(yticks=range(len(order)), yticklabels=[spell(method) for method in order])
    axes[0].invert_yaxis()
    return axes


def _leave_majority(table, column):
    """Return where an axis may start if the majority is far below all other methods, so that those fill the panel; else None."""
    rest = table.loc[table["method"] != "majority", column].dropna()
    majority = table.loc[table["method"] == "majority", column].dropna()
    if len(rest) < 2 or not len(majority) or rest.min() - majority.max() < rest.max() - rest.min():
        return None
    return rest.min() - 0.12 * (rest.max() - rest.min())


def curve(
    table: pd.DataFrame, x: str, metric: str, *, logarithmic: bool = False, methods: Sequence[str] | None = None
) -> Axes:
    """Draw a metric against the size of the reference: a line a method, with its interval at each size.

    `table` has value, low and high by `x`, method and metric, in the index or in columns. All methods are drawn if None, in
    the order of their last values. One size alone is no curve: methods stand side by side, see `studies`.

    Paper: Fig. 2d.
    """
    rows = take_metric(table, metric, methods)
    if rows[x].nunique() == 1:
        ax = studies(table, metric, by=x, methods=methods)
        _zoom_in(ax, rows)
        return ax
    height = max(3.6, 0.6 + 0.24 * rows["method"].nunique())
    ax = make_panels(1, width=7, height=height)[0]
    sizes = np.sort(rows[x].unique()).astype(float)
    place = np.log10 if logarithmic else np.asarray
    gap = np.diff(place(sizes)).min()
    last = rows.sort_values(x).groupby("method")["value"].last().sort_values(ascending=False)
    styles = style_methods(rows["method"])
    for shift, method in zip(dodge(len(last), 0.07) * gap, last.index, strict=True):
        line = rows[rows["method"] == method].sort_values(x)
        at = place(line[x].to_numpy(float)) + shift
        draw_intervals(ax, 10**at if logarithmic else at, line, "-", label=spell(method), **styles[method])
    ax.set(xlabel=spell(x), ylabel=spell(metric), xscale="log" if logarithmic else "linear")
    ax.set_xticks(sizes, [f"{size:g}" for size in sizes])
    ax.minorticks_off()
    _zoom_in(ax, rows)
    _name_methods(ax)
    return ax


def _zoom_in(ax, rows):
    """Make the majority a note under the axis, where it is far below the rest: not where limits are given."""
    low = _leave_majority(rows.assign(value=rows["low"]), "value")
    if low is not None:
        ax.set_ylim(bottom=low)
        value = rows.loc[rows["method"] == "majority", "value"].max()
        ax.text(1.02, 0, f"majority at most {value:.2f} \u2193", transform=ax.transAxes, fontsize=8, color=GREY)


def _name_methods(ax):
    ax.grid(axis="y", color="0.9")
    ax.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))


def studies(
    table: pd.DataFrame,
    metric: str,
    *,
    by: str = "study",
    methods: Sequence[str] | None = None,
    trainings: pd.DataFrame | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Draw a metric of each method on each study that was held out, with intervals, the methods side by side.

    `table` is as in `curve`, by study (named `by`), method and metric. Studies are in its order, `methods` all if None. Each
    of the `trainings`, rows with study, method and metric, is a small dot beside.

    Paper: Fig. 3c, 3d.
    """
    rows = take_metric(table, metric, methods)
    slots = {study: slot for slot, study in enumerate(dict.fromkeys(rows[by]))}
    methods = list(dict.fromkeys(rows["method"]) if methods is None else methods)
    width = 2.2 + 0.17 * len(slots) * (len(methods) + 2)
    ax = ax or make_panels(1, width=width, height=3.4)[0]
    styles = style_methods(methods)
    for shift, method in zip(dodge(len(methods), 0.36), methods, strict=True):
        line = rows[rows["method"] == method]
        draw_intervals(ax, line[by].map(slots).to_numpy() + shift, line, "", label=spell(method), **styles[method])
        if trainings is not None:
            draw_trainings(ax, trainings[trainings["method"] == method], metric, by, slots, shift)
    for edge in range(1, len(slots)):
        ax.axvline(edge - 0.5, color="0.85", lw=0.8)
    ax.set(xlim=(-0.5, len(slots) - 0.5), xlabel="" if by == "study" else spell(by), ylabel=spell(metric))
    ax.set_xticks(range(len(slots)), [textwrap.fill(str(study).replace("_", " "), 16) for study in slots])
    _name_methods(ax)
    return ax


def ceiling(axes: Axes | Sequence[Axes], table: pd.DataFrame, metric: str = "accuracy", along: str = "y") -> None:
    """Mark, as a band in each of the axes, how far two labellings of the tested cells agree.

    Nothing is drawn for an empty table, nor for a metric other than accuracy.

    `table` is from `scbert.labellings.measure_ceiling`, and scores lie `along` "x" or "y". The band reaches from the least to
    the most of all labellings, over their intervals.
    """
    for ax in np.ravel(axes) if len(table) and metric == "accuracy" else []:
        low, text = table["low"].min(), {"s": "two labellings agree", "color": "0.35", "fontsize": 8}
        if along == "y":
            ax.axhspan(low, table["high"].max(), color="0.85", lw=0, zorder=0)
            ax.text(0.01, low, va="bottom", transform=ax.get_yaxis_transform(), **text)
        else:
            ax.axvspan(low, table["high"].max(), color="0.85", lw=0, zorder=0)
            ax.text(low, 0.99, va="top", rotation=90, transform=ax.get_xaxis_transform(), **text)


def study_rows(table: pd.DataFrame, metric: str, *, methods: Sequence[str] | None = None, n: int = 5) -> np.ndarray:
    """Draw `studies` in rows of `n`, each row with an axis of its own; return the axes."""
    names = list(dict.fromkeys(table["study"]))
    rows = [names[i : i + n] for i in range(0, len(names), n)]
    axes = make_panels(len(rows), 1, width=9 if len(rows) > 1 else 3 + 1.3 * len(names), height=2.9)
    for ax, row in zip(axes, rows, strict=True):
        part = take_metric(table[table["study"].isin(row)], metric, methods)
        _zoom_in(studies(part, metric, methods=methods, ax=ax), part)
    return axes


def take_metric(table: pd.DataFrame, metric: str, methods: Sequence[str] | None) -> pd.DataFrame:
    """Return the rows of one metric and of some methods, all if None, the index as columns; a ValueError if there are none."""
    rows = table.reset_index() if any(table.index.names) else table
    rows = rows[rows["metric"] == metric] if "metric" in rows else rows
    rows = rows if methods is None else rows[rows["method"].isin(methods)]
    if rows.empty:
        raise ValueError(f"The table has no {metric}{'' if methods is None else ' of ' + ', '.join(methods)}.")
    return rows


def draw_intervals(ax: Axes, x: np.ndarray, rows: pd.DataFrame, line: str, **style) -> None:
    """Draw value, low and high of each row at the given places, joined by a line of matplotlib's style `line`, none if ""."""
    errors = [rows["value"] - rows["low"], rows["high"] - rows["value"]]
    errors = np.clip(errors, 0, None)  # a percentile interval may leave out the value by a hair
    edge = {"mec": style["color"], "mew": 1.2}
    ax.errorbar(x, rows["value"], errors, linestyle=line, lw=1.4, elinewidth=1.2, ms=6, **edge, **style)


def draw_trainings(ax: Axes, rows: pd.DataFrame, metric: str, by: str, places: Mapping, shift: float) -> None:
    """Draw what each training reached as a small black dot, at `places` of the column `by`, `shift` to the side."""
    ax.plot(rows[by].map(places) + shift, rows[metric], ".", color="black", ms=3.5, zorder=5)


def ranks(table: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """Draw mean ranks on a line, best on the left, with a bar under methods that are not told apart.

    `table` is from `scbert.significance.rank_methods`. Two methods are told apart if their mean ranks differ by more
    than its critical difference (Demsar 2006, Journal of Machine Learning Research 7:1-30).
    """
    from scikit_posthocs import critical_difference_diagram  # late: no figure of the demo needs it

    found, means = table.attrs, table["mean_rank"]
    ax = ax or make_panels(1, width=6.4, height=1.5 + 0.16 * len(table))[0]
    apart = np.abs(np.subtract.outer(means.to_numpy(), means.to_numpy())) > found["critical_difference"]
    p = pd.DataFrame(1.0 - apart, index=means.index, columns=means.index)
    colors = {method: style["color"] for method, style in style_methods(table.index).items()}
    places = {"label_fmt_left": "{label} ", "label_fmt_right": " {label}"}
    drawn = critical_difference_diagram(means, p, ax=ax, color_palette=colors, **places)
    ax.spines["top"].set_visible(True)  # the line of the ranks
    for name in drawn["labels"]:
        name.set(text=spell(name.get_text()), color="black")
    for (bar,) in drawn["crossbars"]:
        bar.set_xdata(np.sort(bar.get_xdata()))  # its points come from a set: in another order in each process
    ax.set(xlim=(0.9, len(table) + 0.1), xticks=range(1, len(table) + 1))
    ax.set_xlabel("mean rank (1 is best); a bar joins methods that are not told apart")
    p, difference = found["friedman_p"], found["critical_difference"]
    title = f"{found['blocks']} blocks: critical difference {difference:.2f}, largest possible {found['largest_difference']}"
    title += "" if np.isnan(p) else f"\nFriedman p = {p:.2g} (smallest possible {found['friedman_p_smallest']:.2g})"
    ax.set_title(title, fontsize=9)
    return ax


def gene_names(table: pd.DataFrame) -> np.ndarray:
    """Draw how many genes have which status, and what share of the counts is theirs: `scbert.genes.count_statuses`."""
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
    ax.locator_params(axis="x", integer=True)
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
    """Draw seconds and peak memory against tokens, a column a step and a line an attention; return axes (2, steps).

    `sweep` is from `scbert.performance.measure_afresh`: tokens, attention, step, seconds and peak_mb.
    """
    lengths, steps = sorted(sweep["tokens"].unique()), sweep["step"].unique()
    colors = dict(zip(sweep["attention"].unique(), sns.color_palette("colorblind"), strict=False))
    _, axes = plt.subplots(2, len(steps), figsize=(9, 6.4), sharex=True, squeeze=False)
    labels = {"seconds": "seconds a cell", "peak_mb": "peak MB a cell"}
    for row, (column, label) in zip(axes, labels.items(), strict=True):
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
