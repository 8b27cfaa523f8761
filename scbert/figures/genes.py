"""Figures of genes: what attention they receive, which sets they are in, and what becomes of cells without them.

Each function returns its axes.
"""

import itertools
from collections.abc import Sequence

import anndata
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes

from ..data.preprocess import lognormalize
from .plot import GREY, curve, dodge, legend_beside, make_panels, place_cells, spell

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


def attention_heatmap(means: pd.DataFrame, top: pd.DataFrame, control: pd.DataFrame, *, n: int = 10) -> np.ndarray:
    """Draw what the top genes of each type receive in each type: a column a gene, scaled to its own largest value.

    `means`, types x genes, is mean attention in the cells of each type, and `control` the same of attention that is spread
    evenly, drawn below: what looks alike in both, expression alone explains. The first `n` genes of each type in `top`,
    from `scbert.interpret.find_top`, are framed under their type.

    Paper: Fig. 5a, without the control.
    """
    shown = top[top["rank"] <= n]
    types = [kind for kind in means.index if (shown["type"] == kind).any()]
    genes = pd.concat([shown.loc[shown["type"] == kind, "gene"] for kind in types])
    edges = np.cumsum([0] + [(shown["type"] == kind).sum() for kind in types])
    axes = make_panels(2, 1, width=2.6 + 0.135 * len(genes), height=0.7 + 0.19 * len(types), sharex=True)
    for ax, table, title in zip(axes, (means, control), ("scBERT", "attention spread evenly"), strict=True):
        values = table.loc[types, genes]
        sns.heatmap(
            values / values.max(), vmin=0, vmax=1, cmap=plt.get_cmap("viridis", 16), ax=ax, cbar=False,
            xticklabels=True, yticklabels=True,
        )  # fmt: skip
        for row, (left, right) in enumerate(zip(edges[:-1], edges[1:], strict=True)):
            ax.add_patch(plt.Rectangle((left, row), right - left, 1, fill=False, ec="#d55e00", lw=1.5))
        ax.set(xlabel="", ylabel="")
        ax.set_title(title, fontsize=9)
        ax.tick_params(axis="x", labelsize=7, rotation=90)
        ax.tick_params(axis="y", labelsize=8)
    axes[0].tick_params(axis="x", bottom=False, labelbottom=False)
    axes[0].figure.colorbar(
        axes[0].collections[0], ax=axes, label="attention / largest of the gene", pad=0.01, aspect=30
    )
    return axes


def dot_plot(means: pd.DataFrame, shares: pd.DataFrame, top: pd.DataFrame, *, n: int = 3) -> Axes:
    """Draw the top genes of each type as dots: size is the share of cells that express it, colour its attention.

    `means` and `shares` are types x genes: mean attention, whose z-scores over types are drawn for each gene; and the
    share of cells that express it. Of `top`, from `scbert.interpret.find_top`, the first `n` of each type are shown.

    Paper: Fig. 5c.
    """
    genes = list(dict.fromkeys(top.loc[top["rank"] <= n, "gene"]))
    types, values = list(means.index), means[genes]
    z = (values - values.mean()) / values.std(ddof=0)
    ax = make_panels(1, width=3.1 + 0.16 * len(genes), height=1.1 + 0.165 * len(types))[0]
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
    legend_beside(ax, keys, title="cells that\nexpress it", title_fontsize=8)
    return ax


def enrichment(table: pd.DataFrame, *, n: int = 3, n_columns: int = 5) -> np.ndarray:
    """Draw the best sets of each type: a panel a type, bars of -log10 FDR, the type's own sets filled.

    Of a table of `scbert.interpret.enrich_all`, the first collection and ranking are drawn. `n` sets are shown of each
    type; its own one of the best rank is added if it is not among them.

    Paper: Fig. 5b.
    """
    for column in [name for name in ("collection", "ranking") if name in table]:
        table = table[table[column] == table[column].iloc[0]]
    types = list(dict.fromkeys(table["type"]))
    axes = make_panels(len(types), n_columns, width=2.4, height=0.42 + 0.16 * (n + 1), above=0.7, sharex=True)
    for ax, kind in zip(axes, types, strict=True):
        rows = table[table["type"] == kind].sort_values(["p", "term"])
        shown = rows[rows["overlap"] > 0].head(n)
        if not shown["own"].any():
            shown = pd.concat([shown, rows[rows["own"]].head(1)])
        for y, (_, row) in enumerate(shown.iterrows()):
            color = "#0173b2" if row["own"] else "white"
            ax.barh(y, -np.log10(row["fdr"]), color=color, edgecolor="#0173b2", height=0.7)
        names = [f"{_shorten(row.term)} ({row.overlap}/{row.size})" for row in shown.itertuples()]
        ax.set_yticks(range(len(shown)), names, fontsize=7)
        ax.tick_params(axis="x", labelsize=8)
        ax.set_ylim(n + 0.6, -0.6)
        ax.axvline(-np.log10(0.05), color=GREY, ls="--", lw=1)
        ax.set_title(kind, fontsize=8)
    for ax in axes[-n_columns:]:
        ax.tick_params(labelbottom=True)  # nothing stands below these
    axes[0].figure.supxlabel("-log10 FDR (dashed: 0.05; filled: a set of the type itself)", fontsize=9)
    return axes


def _shorten(name, longest=30):
    name = name.removeprefix("REACTOME_").replace("_", " ")
    return name if len(name) <= longest else name[: longest - 1] + "…"


def matrix(table: pd.DataFrame, *, title: str = "", ax: Axes | None = None) -> Axes:
    """Draw attention between genes as multiples of an even spread, blank where two are never together.

    Paper: Extended Data Fig. 1d.
    """
    ax = ax or make_panels(1, width=2.2 + 0.2 * len(table), height=1.4 + 0.2 * len(table))[0]
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
    """Draw what is left of the true type's probability against the number of genes; return the axes, (judges, kinds).

    `shares` are from `scbert.deletion.measure_areas`, by number. A row of panels for a `judge`, or for each if None.
    """
    judges = list(dict.fromkeys(shares["judge"])) if judge is None else [judge]
    kinds, numbers = list(dict.fromkeys(shares["kind"])), np.sort(shares["number"].unique()).astype(float)
    names = list(dict.fromkeys(shares["ranking"]))
    styles, ratio = style_rankings(names), (numbers[1] / numbers[0] if len(numbers) > 1 else 2)
    axes = make_panels(len(judges) * len(kinds), len(kinds), width=2.9, height=2.2, beside=1.1, sharex=True)
    axes = axes.reshape(len(judges), len(kinds))
    for row, who in zip(axes, judges, strict=True):
        for ax, kind in zip(row, kinds, strict=True):
            for shift, name in zip(dodge(len(names), 0.12), names, strict=True):
                here = (shares["judge"] == who) & (shares["kind"] == kind) & (shares["ranking"] == name)
                line = shares[here].sort_values("number")
                x = line["number"] * ratio**shift
                ax.vlines(x, line["low"], line["high"], color=styles[name]["color"], lw=1)
                ax.plot(x, line["value"], lw=1, ms=4, label=name, **styles[name])
            ax.axhline(1, color="0.8", lw=1, zorder=0)
            ax.set(xscale="log")
            ax.set_title(f"{kind}, judged by {spell(who)}", fontsize=9)
            ax.set_xticks(numbers, [f"{number:g}" for number in numbers])
            ax.minorticks_off()
            ax.set_ylim(bottom=0)
    for ax in axes[:, 0]:
        ax.set_ylabel("share of the probability", fontsize=9)
    for ax, kind in zip(axes[-1], kinds, strict=True):
        ax.set_xlabel("genes deleted" if kind == "deletion" else "genes kept" if kind == "insertion" else "genes")
    legend_beside(axes[0, 0])
    return axes


def areas(table: pd.DataFrame) -> np.ndarray:
    """Draw the area of each ranking with its interval: a panel a kind, a row a ranking, filled for the first judge.

    `table` is from `scbert.deletion.measure_areas`.
    """
    kinds, judges = (list(dict.fromkeys(table[column])) for column in ("kind", "judge"))
    names = list(dict.fromkeys(table["ranking"]))
    styles = style_rankings(names)
    axes = make_panels(len(kinds), width=2.2, height=1.0 + 0.28 * len(names), beside=2.3, sharey=True)
    shift = dict(zip(judges, dodge(len(judges), 0.17), strict=True))
    for ax, kind in zip(axes, kinds, strict=True):
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
    axes[0].set_yticks(range(len(names)), names)
    axes[0].invert_yaxis()
    faces = {judge: "0.3" if judge == judges[0] else "white" for judge in judges}
    keys = [
        plt.Line2D([], [], ls="", marker="o", color="0.3", mfc=faces[judge], label=spell(judge)) for judge in judges
    ]
    legend_beside(axes[0], keys, title="judged by", title_fontsize=8)
    return axes


def agreement(table: pd.DataFrame, value: str = "overlap") -> np.ndarray:
    """Draw agreement between scores of genes as triangles of numbers, the mean over types: a panel a comparison.

    `table` is from `measure_agreement`, with a column ``between`` that makes the panels. `value` is "overlap" or "spearman".
    """
    panels = dict(iter(table.groupby("between", sort=False)))
    names = {title: list(dict.fromkeys([*part["one"], *part["other"]])) for title, part in panels.items()}
    widths = [len(own) - 1 for own in names.values()]
    height, cells = 1.4 + 0.42 * max(widths), 0.42 * sum(widths)
    axes = make_panels(len(panels), width=0.85, height=height, beside=1.1 + cells, width_ratios=widths)
    for ax, (title, part) in zip(axes, panels.items(), strict=True):
        means = part.groupby(["other", "one"])[value].mean().unstack()
        means = means.reindex(index=names[title][1:], columns=names[title][:-1])
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
    return axes


def clusters(sweep: pd.DataFrame, value: str = "ari") -> Axes:
    """Draw the agreement of clusters with types against the resolution: a line an embedding, with intervals.

    `sweep` has embedding, resolution, and value, value_low, value_high: ``ari`` and so on.

    Paper: Fig. 5d, at a resolution that is not stated.
    """
    names = {"embedding": "method", value: "value", f"{value}_low": "low", f"{value}_high": "high"}
    table = sweep[["resolution", *names]].rename(columns=names)
    ax = curve(table, "resolution", value, logarithmic=True)
    ax.set(xlabel="resolution of Leiden clustering", ylabel=spell(value).upper())
    ax.figure.set_size_inches(6.4, 3)
    return ax


def genes_on_cells(adata: anndata.AnnData, top: pd.DataFrame, *, n: int = 3, seed: int = 0) -> np.ndarray:
    """Scatter cells coloured by the log-normalised counts of top genes, as shares of the most; return an axes a gene.

    The first row has `n` genes that are in a set of their type, the second `n` that are not, each of another type. `top` is
    from `scbert.interpret.mark_members`.

    Paper: Extended Data Fig. 6a, b.
    """
    of_types = top.sort_values(["rank", "type"])
    rows = [of_types[of_types["member"].eq(known)] for known in (True, False)]
    rows = [row.drop_duplicates("type").drop_duplicates("gene").head(n) for row in rows]
    rows = [row for row in rows if len(row)]
    if "X_umap" not in adata.obsm:
        place_cells(adata, seed)
    axes = make_panels(len(rows) * n, n, width=1.9, height=1.65).reshape(-1, n)
    values, used = lognormalize(adata).tocsc(), []
    for line, row in zip(axes, rows, strict=True):
        for ax, gene in itertools.zip_longest(line, row.itertuples()):
            if gene is None:
                ax.remove()
                continue
            level = values[:, adata.var_names.get_loc(gene.gene)].toarray().ravel()
            x, y = adata.obsm["X_umap"][:, :2].T
            order = np.argsort(level, kind="stable")  # the highest on top
            color = level[order] / max(level.max(), 1e-12)
            dots = ax.scatter(x[order], y[order], c=color, s=8, vmin=0, vmax=1, linewidths=0, rasterized=True)
            known = "in" if gene.member else "not in"
            ax.set(xticks=[], yticks=[])
            ax.set_title(f"{gene.gene}, {known} a set of\n{gene.type}", fontsize=8)
            sns.despine(ax=ax, left=True, bottom=True)
            used.append(ax)
    label = "log-normalised counts\n/ the gene's largest"
    used[0].figure.colorbar(dots, ax=used, label=label, shrink=0.7, pad=0.01)
    return np.array(used)
