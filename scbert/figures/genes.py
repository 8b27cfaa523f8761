"""Figures of genes: what attention they receive, which sets they are in, and what becomes of cells without them."""

import itertools
from collections.abc import Sequence

import anndata
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes

from ..data.preprocess import lognormalize
from .plot import GREY, SCREEN, color_labels, embedding, place_cells

RANKINGS = {  # safe for colour-blind readers, and no two share a marker
    "attention": ("#0173b2", "o"),
    "even": ("#7fbfea", "X"),
    "weights": ("#de8f05", "s"),
    "expression": ("#029e73", "D"),
    "gradients": ("#d55e00", "^"),
    "random": ("0.45", "v"),
}


def style_rankings(rankings: Sequence[str]) -> dict[str, dict]:
    """Return colour and marker of each way to rank genes, as matplotlib's keywords; grey for one without its own."""
    return {name: dict(zip(("color", "marker"), RANKINGS.get(name, ("0.3", "P")), strict=True)) for name in rankings}


def attention_heatmap(means: pd.DataFrame, top: pd.DataFrame, *, n: int = 10, ax: Axes | None = None) -> Axes:
    """Draw what the top genes of each type receive in each type: a column a gene, scaled to its own largest value.

    Parameters
    ----------
    means
        Types x genes, mean attention in the cells of each type.
    top
        As `scbert.interpret.find_top` returns it; the first `n` genes of each type are shown, under their type.

    Paper: Fig. 5a.
    """
    shown = top[top["rank"] <= n]
    types = [kind for kind in means.index if (shown["type"] == kind).any()]
    genes = pd.concat([shown.loc[shown["type"] == kind, "gene"] for kind in types])
    values = means.loc[types, genes]
    ax = (
        ax
        or plt.subplots(figsize=(2.6 + 0.135 * len(genes), 1.4 + 0.2 * len(types)), layout="constrained", dpi=SCREEN)[1]
    )
    sns.heatmap(
        values / values.max(), vmin=0, vmax=1, cmap="viridis", ax=ax, xticklabels=True, yticklabels=True,
        cbar_kws={"label": "attention / largest of the gene", "pad": 0.01},
    )  # fmt: skip
    edges = np.cumsum([0] + [(shown["type"] == kind).sum() for kind in types])
    ax.vlines(edges[1:-1], 0, len(types), color="white", lw=1.5)
    for row, (left, right) in enumerate(zip(edges[:-1], edges[1:], strict=True)):
        ax.add_patch(plt.Rectangle((left, row), right - left, 1, fill=False, ec="#d55e00", lw=1.5))
    ax.set(xlabel="", ylabel="")
    ax.tick_params(axis="x", labelsize=7, rotation=90)
    ax.tick_params(axis="y", labelsize=8)
    return ax


def dot_plot(
    means: pd.DataFrame, shares: pd.DataFrame, top: pd.DataFrame, *, n: int = 3, ax: Axes | None = None
) -> Axes:
    """Draw the top genes of each type as dots: size is the share of cells that express it, colour the z-score of attention.

    Parameters
    ----------
    means, shares
        Types x genes: mean attention, z-scored over types for each gene; and the share of cells that express it.
    top
        As `scbert.interpret.find_top` returns it; the first `n` genes of each type, each once.

    Paper: Fig. 5c.
    """
    genes = list(dict.fromkeys(top.loc[top["rank"] <= n, "gene"]))
    types, values = list(means.index), means[genes]
    z = (values - values.mean()) / values.std(ddof=0)
    ax = (
        ax
        or plt.subplots(figsize=(3.1 + 0.16 * len(genes), 1.1 + 0.165 * len(types)), layout="constrained", dpi=SCREEN)[
            1
        ]
    )
    x, y = np.meshgrid(np.arange(len(genes)), np.arange(len(types)))
    limit = float(np.abs(z.to_numpy()).max())
    size = 85 * shares.loc[types, genes].to_numpy()
    colors = plt.get_cmap("PuOr_r", 11)  # few colours keep the file small
    dots = ax.scatter(x, y, s=size, c=z.to_numpy().ravel(), cmap=colors, vmin=-limit, vmax=limit, linewidths=0)
    ax.set(xlim=(-0.7, len(genes) - 0.3), ylim=(len(types) - 0.4, -0.6))
    ax.set_xticks(range(len(genes)), genes, rotation=90, fontsize=7)
    ax.set_yticks(range(len(types)), types, fontsize=7.5)
    ax.figure.colorbar(dots, ax=ax, label="z-score of attention", pad=0.01, aspect=15)
    keys = [ax.scatter([], [], s=85 * share, color="0.6", label=f"{share:.0%}") for share in (0.25, 0.5, 1)]
    title = "cells that\nexpress it"
    ax.figure.legend(handles=keys, title=title, frameon=False, fontsize=8, title_fontsize=8, loc="outside right center")
    sns.despine(ax=ax)
    return ax


def enrichment(table: pd.DataFrame, *, n: int = 3, n_columns: int = 5, level: float = 0.05) -> np.ndarray:
    """Draw the best sets of each type: a panel a type, bars of -log10 FDR, the type's own sets filled.

    Parameters
    ----------
    table
        As `scbert.interpret.enrich` or `enrich_all` returns it; of the latter, the first collection and ranking.
    n
        Sets shown of each type; its own one of the best rank is added if it is not among them.
    level
        FDR at which the dashed line stands.

    Returns
    -------
    The axes, one a panel.

    Paper: Fig. 5b.
    """
    for column in [name for name in ("collection", "ranking") if name in table]:
        table = table[table[column] == table[column].iloc[0]]
    types = list(dict.fromkeys(table["type"]))
    n_columns = min(n_columns, len(types))
    n_rows = -(-len(types) // n_columns)
    figure, axes = plt.subplots(
        n_rows, n_columns, figsize=(2.4 * n_columns, 0.7 + (0.42 + 0.16 * (n + 1)) * n_rows),
        sharex=True, squeeze=False, layout="constrained", dpi=SCREEN,
    )  # fmt: skip
    for ax, kind in zip(axes.flat, types, strict=False):
        rows = table[table["type"] == kind].sort_values(["p", "term"])
        shown = rows[rows["overlap"] > 0].head(n)
        if not shown["own"].any():
            shown = pd.concat([shown, rows[rows["own"]].head(1)])
        for y, (_, row) in enumerate(shown.iterrows()):
            ax.barh(
                y, -np.log10(row["fdr"]), color="#0173b2" if row["own"] else "white", edgecolor="#0173b2", height=0.7
            )
        names = [f"{_shorten(row.term)} ({row.overlap}/{row.size})" for row in shown.itertuples()]
        ax.set_yticks(range(len(shown)), names, fontsize=7)
        ax.tick_params(axis="x", labelsize=8)
        ax.set_ylim(n + 0.6, -0.6)
        ax.axvline(-np.log10(level), color=GREY, ls="--", lw=1)
        ax.set_title(kind, fontsize=8)
        sns.despine(ax=ax)
    for ax in axes.flat[len(types) :]:
        ax.remove()
    for ax in axes[-1 - (len(types) % n_columns > 0), len(types) % n_columns :]:
        ax.tick_params(labelbottom=True)  # nothing stands below these
    figure.supxlabel("-log10 FDR (dashed: 0.05; filled: a set of the type itself)", fontsize=9)
    return axes.ravel()[: len(types)]


def _shorten(name, longest=30):
    name = name.removeprefix("REACTOME_").replace("_", " ")
    return name if len(name) <= longest else name[: longest - 1] + "…"


def matrix(table: pd.DataFrame, *, title: str = "", ax: Axes | None = None) -> Axes:
    """Draw attention between genes as multiples of an even spread, blank where two are never together.

    Paper: Extended Data Fig. 1d.
    """
    ax = (
        ax
        or plt.subplots(figsize=(2.2 + 0.2 * len(table), 1.4 + 0.2 * len(table)), layout="constrained", dpi=SCREEN)[1]
    )
    away = float(np.nanmax(np.abs(table.to_numpy() - 1)))
    sns.heatmap(
        table, cmap="PuOr_r", vmin=1 - away, vmax=1 + away, square=True, ax=ax, xticklabels=True, yticklabels=True,
        cbar_kws={"label": "attention / even spread", "shrink": 0.7},
    )  # fmt: skip
    ax.tick_params(labelsize=7)
    ax.set(xlabel="gene that is attended to", ylabel="gene that attends", title=title)
    ax.set_facecolor("0.9")
    return ax


def deletion_curves(shares: pd.DataFrame, *, judge: str | None = None) -> np.ndarray:
    """Draw what is left of the true type's probability against the number of genes: deletion, and insertion.

    Parameters
    ----------
    shares
        As ``scbert.deletion.measure_areas(curves, by_number=True)`` returns it.
    judge
        Whose predictions; a row of panels for each if None.

    Returns
    -------
    The axes, (judges, kinds).
    """
    judges = list(dict.fromkeys(shares["judge"])) if judge is None else [judge]
    kinds, numbers = list(dict.fromkeys(shares["kind"])), np.sort(shares["number"].unique()).astype(float)
    names = list(dict.fromkeys(shares["ranking"]))
    styles, ratio = style_rankings(names), (numbers[1] / numbers[0] if len(numbers) > 1 else 2)
    figure, axes = plt.subplots(
        len(judges), len(kinds), figsize=(2.9 * len(kinds) + 1.1, 2.2 * len(judges)), squeeze=False, sharex=True,
        layout="constrained", dpi=SCREEN,
    )  # fmt: skip
    for row, who in zip(axes, judges, strict=True):
        for ax, kind in zip(row, kinds, strict=True):
            for shift, name in zip(np.linspace(-0.12, 0.12, len(names)), names, strict=True):
                here = (shares["judge"] == who) & (shares["kind"] == kind) & (shares["ranking"] == name)
                line = shares[here].sort_values("number")
                x = line["number"] * ratio**shift  # side by side, so that no interval hides another
                ax.vlines(x, line["low"], line["high"], color=styles[name]["color"], lw=1)
                ax.plot(x, line["value"], lw=1, ms=4, label=name, **styles[name])
            ax.axhline(1, color="0.8", lw=1, zorder=0)
            ax.set(xscale="log")
            ax.set_title(f"{kind}, judged by {_spell(who)}", fontsize=9)
            ax.set_xticks(numbers, [f"{number:g}" for number in numbers])
            ax.minorticks_off()
            ax.set_ylim(bottom=0)
            sns.despine(ax=ax)
    for ax in axes[:, 0]:
        ax.set_ylabel("share of the probability", fontsize=9)
    for ax, kind in zip(axes[-1], kinds, strict=True):
        ax.set_xlabel("genes deleted" if kind == "deletion" else "genes kept" if kind == "insertion" else "genes")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, frameon=False, fontsize=8, loc="outside right center")
    return axes


def areas(table: pd.DataFrame) -> np.ndarray:
    """Draw the area of each ranking with its interval: a panel a kind, a row a ranking, filled for the first judge.

    Parameters
    ----------
    table
        As `scbert.deletion.measure_areas` returns it.

    Returns
    -------
    The axes, one a kind.
    """
    kinds, judges = (list(dict.fromkeys(table[column])) for column in ("kind", "judge"))
    names = list(dict.fromkeys(table["ranking"]))
    styles = style_rankings(names)
    figure, axes = plt.subplots(
        1, len(kinds), figsize=(2.3 + 2.2 * len(kinds), 1.0 + 0.28 * len(names)), squeeze=False, sharey=True,
        layout="constrained", dpi=SCREEN,
    )  # fmt: skip
    shift = dict(zip(judges, np.linspace(-0.17, 0.17, len(judges)) if len(judges) > 1 else [0], strict=True))
    for ax, kind in zip(axes[0], kinds, strict=True):
        for row in table[table["kind"] == kind].itertuples():
            y, style = names.index(row.ranking) + shift[row.judge], styles[row.ranking]
            ax.plot([row.low, row.high], [y, y], color=style["color"], lw=1.6)
            fill = style["color"] if row.judge == judges[0] else "white"
            ax.plot(row.value, y, ms=6, mfc=fill, mec=style["color"], **style)
        better = {"deletion": "left", "insertion": "right"}.get(kind)
        ax.set(title=f"{kind}: {better} is better" if better else kind, xlabel="mean share left")
        ax.grid(axis="x", color="0.9")
        ax.set_axisbelow(True)
        sns.despine(ax=ax, left=True)
    axes[0, 0].set_yticks(range(len(names)), names)
    axes[0, 0].invert_yaxis()
    keys = [
        plt.Line2D(
            [], [], ls="", marker="o", color="0.3", mfc="0.3" if judge == judges[0] else "white", label=_spell(judge)
        )
        for judge in judges
    ]
    figure.legend(
        handles=keys, title="judged by", frameon=False, fontsize=8, title_fontsize=8, loc="outside right center"
    )
    return axes[0]


def _spell(name):
    return str(name).replace("_", " ")


def agreement(table: pd.DataFrame, value: str = "overlap") -> np.ndarray:
    """Draw agreement between scores of genes as triangles of numbers, the mean over types: a panel a comparison.

    Parameters
    ----------
    table
        What `scbert.interpret.measure_agreement` returns, with a column ``between`` that makes the panels.
    value
        "overlap", with the level of chance above it, or "spearman".

    Returns
    -------
    The axes, one a panel.
    """
    panels = dict(iter(table.groupby("between", sort=False)))
    names = {title: list(dict.fromkeys([*part["one"], *part["other"]])) for title, part in panels.items()}
    widths = [len(own) - 1 for own in names.values()]
    _, axes = plt.subplots(
        1, len(panels), figsize=(1.1 + 0.42 * sum(widths) + 0.85 * len(panels), 1.4 + 0.42 * max(widths)),
        squeeze=False, width_ratios=widths, layout="constrained", dpi=SCREEN,
    )  # fmt: skip
    for ax, (title, part) in zip(axes[0], panels.items(), strict=True):
        means = (
            part.groupby(["other", "one"])[value]
            .mean()
            .unstack()
            .reindex(index=names[title][1:], columns=names[title][:-1])
        )
        sns.heatmap(
            means, vmin=0, vmax=1, cmap="cividis", annot=True, fmt=".2f", annot_kws={"size": 8}, cbar=False,
            square=True, ax=ax, xticklabels=True, yticklabels=True,
        )  # fmt: skip
        ax.set_anchor("N")
        ax.set_xticklabels(ax.get_xticklabels(), rotation=45, ha="right", rotation_mode="anchor", fontsize=8)
        ax.tick_params(axis="y", labelsize=8, rotation=0)
        ax.set(xlabel="", ylabel="")
        chance = f" (chance {part['chance'].mean():.2f})" if value == "overlap" else ""
        ax.set_title(f"{title}\n{value}{chance}", fontsize=9)
    return axes[0]


def clusters(sweep: pd.DataFrame, value: str = "ari", *, ax: Axes | None = None) -> Axes:
    """Draw the agreement of clusters with types against the resolution: a line an embedding, with intervals.

    Parameters
    ----------
    sweep
        embedding, resolution, and value, value_low, value_high: ``ari`` and so on.

    Paper: Fig. 5d, at a resolution that is not stated.
    """
    ax = ax or plt.subplots(figsize=(5, 2.3), layout="constrained", dpi=SCREEN)[1]
    markers = dict(zip(dict.fromkeys(sweep["embedding"]), "osD^vXP", strict=False))
    colors = dict(zip(markers, ["#de8f05", "#7fbfea", "#0173b2", "#029e73", "#cc78bc", "0.4", "#d55e00"], strict=False))
    for shift, (name, marker) in zip(np.linspace(-0.02, 0.02, len(markers)), markers.items(), strict=True):
        line = sweep[sweep["embedding"] == name].sort_values("resolution")
        x = line["resolution"] * (1 + shift)
        ax.vlines(x, line[f"{value}_low"], line[f"{value}_high"], color=colors[name], lw=1.5)
        ax.plot(x, line[value], marker=marker, color=colors[name], mec="white", mew=0.3, ms=6, lw=1.3, label=name)
    resolutions = np.sort(sweep["resolution"].unique())
    ax.set(xscale="log", xlabel="resolution of Leiden clustering", ylabel=_spell(value).upper())
    ax.set_xticks(resolutions, [f"{resolution:g}" for resolution in resolutions])
    ax.minorticks_off()
    ax.set_ylim(min(0, sweep[f"{value}_low"].min()), 1)
    ax.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    ax.grid(axis="y", color="0.9")
    sns.despine(ax=ax)
    return ax


def embeddings(adata: anndata.AnnData, bases: Sequence[str], label_key: str = "cell_type", seed: int = 0) -> np.ndarray:
    """Scatter cells by type on a UMAP of each embedding, side by side; return the axes.

    Parameters
    ----------
    adata
        With each of `bases` in ``obsm``.

    Paper: Fig. 5d.
    """
    palette = color_labels(adata.obs[label_key].astype(str))
    figure, axes = plt.subplots(
        1, len(bases), figsize=(1.9 * len(bases) + 2.2, 2.1), squeeze=False, layout="constrained", dpi=SCREEN
    )
    for ax, basis in zip(axes[0], bases, strict=True):
        light = anndata.AnnData(adata.X, obs=adata.obs[[label_key]].astype(str), obsm={basis: adata.obsm[basis]})
        place_cells(light, seed, basis=basis)
        embedding(light, label_key, palette=palette, title=basis, legend=ax is axes[0, -1], ax=ax)
    return axes[0]


def genes_on_cells(adata: anndata.AnnData, top: pd.DataFrame, *, n: int = 3) -> np.ndarray:
    """Scatter cells coloured by the log-normalised counts of top genes, from none to the most: a panel a gene.

    Parameters
    ----------
    adata
        With ``obsm["X_umap"]``, see `scbert.plot.place_cells`.
    top
        As `scbert.interpret.mark_members` returns it.
    n
        Genes that are in a set of their type (first row), and that are not (second row), each of another type.

    Returns
    -------
    The axes, one a gene.

    Paper: Extended Data Fig. 6a, b.
    """
    rows = [
        top[top["member"].eq(known)]
        .sort_values(["rank", "type"])
        .drop_duplicates("type")
        .drop_duplicates("gene")
        .head(n)
        for known in (True, False)
    ]
    rows = [row for row in rows if len(row)]
    _, axes = plt.subplots(
        len(rows), n, figsize=(1.9 * n, 1.65 * len(rows)), squeeze=False, layout="constrained", dpi=SCREEN
    )
    values, used = lognormalize(adata).tocsc(), []
    for line, row in zip(axes, rows, strict=True):
        for ax, gene in itertools.zip_longest(line, row.itertuples()):
            if gene is None:
                ax.remove()
                continue
            level = values[:, adata.var_names.get_loc(gene.gene)].toarray().ravel()
            order = np.argsort(level, kind="stable")  # the highest on top
            ax.scatter(
                *adata.obsm["X_umap"][order, :2].T, c=level[order], s=8, cmap="viridis", linewidths=0, rasterized=True
            )
            ax.set(xticks=[], yticks=[])
            ax.set_title(
                f"{gene.gene} ({'known' if gene.member else 'new'}), up to {level.max():.1f}\n{gene.type}", fontsize=8
            )
            sns.despine(ax=ax, left=True, bottom=True)
            used.append(ax)
    return np.array(used)
