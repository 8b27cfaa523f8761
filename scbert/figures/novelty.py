"""Figures of novel types, each returned as its axes: confidence, what cells are called, thresholds, calibration."""

import os
import textwrap
from collections.abc import Callable, Sequence
from importlib.util import find_spec

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.patches import PathPatch, Rectangle
from matplotlib.path import Path

from ..evaluate.novelty import PAPER, count_calls
from .plot import color_labels, dodge, legend_beside, make_panels, spell, studies, style_methods

KNOWN, NOVEL = "#9ecae1", "#d55e00"
LINES = {"recall": ("#d55e00", "-"), "jaccard": ("#56308c", "--"), "known_accuracy": ("#029e73", "-.")}


def confidence_by_type(cells: pd.DataFrame, methods: Sequence[str]) -> np.ndarray:
    """Draw the largest probability of the cells of each true type, a panel a method; novel types in orange, below.

    `cells` are test cells of `scbert.novel_types.score_jobs`, of one data set and level. A box is the middle half of a
    type's cells, its whiskers are the 5th and 95th percentiles.

    Paper: Fig. 4b, left.
    """
    types = cells.drop_duplicates("cell").groupby("truth")["seen"].agg(["first", "size"])
    types = types.sort_values(["first", "size"], ascending=[False, False])
    axes = make_panels(len(methods), width=2.6, height=1.1 + 0.3 * len(types), beside=2.2, sharey=True)
    for ax, method in zip(axes, methods, strict=True):
        own = cells[cells["method"] == method]
        for y, (label, seen) in enumerate(types["first"].items()):
            box = ax.boxplot(
                1 - own.loc[own["truth"] == label, "max_probability"], positions=[y], orientation="horizontal",
                widths=0.7, whis=(5, 95), showfliers=False, patch_artist=True, manage_ticks=False,
                medianprops={"color": "black"},
            )  # fmt: skip
            box["boxes"][0].set(facecolor=KNOWN if seen else NOVEL, hatch="" if seen else "///")
        ax.axhline(types["first"].sum() - 0.5, color="black", lw=0.8)
        ax.axvline(PAPER, color="black", ls="--", lw=1)
        ax.set(title=spell(method), xlim=(0, 1.02), xticks=(0, 0.5, 1), xlabel="largest probability")
    names = [f"{textwrap.fill(str(label), 26)} ({n})" for label, n in types["size"].items()]
    axes[0].set_yticks(range(len(types)), names, fontsize=8)
    for tick, seen in zip(axes[0].get_yticklabels(), types["first"], strict=True):
        tick.set(fontweight="normal" if seen else "bold")
    axes[0].invert_yaxis()
    return axes


def sankey(calls: pd.DataFrame, methods: Sequence[str], *, thin: float = 0.02) -> np.ndarray:
    """Draw what the cells of each true type are called, as bands from left to right, a panel a method.

    `calls` are from `scbert.novelty.count_calls`. Bands of novel types are coloured, those of known ones pale grey.
    Bands of fewer of their type's cells than the share `thin` are drawn as one, to "other types".

    Paper: Fig. 4b, right.
    """
    novel = sorted(set(calls.loc[calls["novel"], "truth"]))
    colors = color_labels(novel)
    n_types = max(calls["truth"].nunique(), calls["called"].nunique() + 1)
    axes = make_panels(len(methods), width=5.6, height=1 + 0.27 * n_types)
    for ax, method in zip(axes, methods, strict=True):
        own = calls[calls["method"] == method].copy()
        small = own["cells"] < thin * own.groupby("truth")["cells"].transform("sum")
        own.loc[small & (own["called"] != "Unassigned"), "called"] = "other types"
        own = own.groupby(["truth", "novel", "called"])["cells"].sum().reset_index()
        true = own.groupby(["novel", "truth"])["cells"].sum().sort_values(ascending=False).sort_index(
            level="novel", sort_remaining=False
        ).droplevel("novel")  # fmt: skip
        last = [name for name in ("other types", "Unassigned") if name in set(own["called"])]
        order = [name for name in true.index if name in set(own["called"])]
        order += [name for name in own["called"].unique() if name not in [*order, *last]] + last
        left, right = _stack(true), _stack(own.groupby("called")["cells"].sum().reindex(order))
        free = {0: {k: top for k, (top, _) in left.items()}, 1: {k: top for k, (top, _) in right.items()}}
        own["from"], own["to"] = own["truth"].map(list(true.index).index), own["called"].map(order.index)
        for row in own.sort_values(["from", "to"]).itertuples():
            height = row.cells / true.sum()
            y0, y1 = free[0][row.truth], free[1][row.called]
            free[0][row.truth], free[1][row.called] = y0 + height, y1 + height
            color, alpha = (colors[row.truth], 0.7) if row.novel else ("0.85", 1)
            ax.add_patch(_band(y0, y1, height, color=color, alpha=alpha, zorder=3 if row.novel else 2))
        for x, nodes in ((0, left), (1, right)):
            for name, (top, height) in nodes.items():
                color = "0.25" if x else colors.get(name, "0.4")
                ax.add_patch(Rectangle((x - 0.015, top), 0.03, height, color=color, zorder=4))
                weight = "bold" if name in novel or name == "Unassigned" else "normal"
                ax.text(
                    x + (0.03 if x else -0.03), top + height / 2, str(name), fontsize=8, fontweight=weight, va="center",
                    ha="left" if x else "right",
                )  # fmt: skip
        bottom = max(top + height for nodes in (left, right) for top, height in nodes.values())
        ax.set(xlim=(-0.88, 1.88), ylim=(bottom + 0.02, -0.02), title=spell(method))
        ax.axis("off")
    return axes


def roc_and_pr(
    curves: pd.DataFrame, methods: Sequence[str], scores: Sequence[str] = ("max_probability", "distance")
) -> np.ndarray:
    """Draw how novel cells are found at all thresholds: ROC, and precision against recall; return both axes.

    A dot is at the paper's threshold. `curves` are from `scbert.novelty.trace_curves`; up to three `scores` have a line
    style each.
    """
    axes = make_panels(2, width=3.95, height=3)
    styles = style_methods(methods)
    for method, width in zip(
        methods, np.linspace(2.6, 1.2, len(methods)), strict=True
    ):  # equal lines show under another
        color = styles[method]["color"]
        for score, line in zip(scores, ("-", "--", ":"), strict=False):
            own = curves[(curves["method"] == method) & (curves["score"] == score)]
            name = f"{spell(method)}, {spell(score)}"
            axes[0].plot(own["false_alarms"], own["recall"], line, color=color, label=name, lw=width)
            shown = own[own["recall"] > 0]
            axes[1].plot(shown["recall"], shown["precision"], line, color=color, lw=width)
            if score == "max_probability":
                at = own[own["threshold"] == 1 - PAPER]
                dot = {"ls": "", "ms": 8, "mec": "black", "zorder": 4} | styles[method]
                axes[0].plot(at["false_alarms"], at["recall"], **dot)
                axes[1].plot(at["recall"], at["precision"], **dot)
    first = curves.iloc[-1]  # all cells are unassigned: precision is the share of novel ones
    axes[0].plot([0, 1], [0, 1], ":", color="0.5", lw=1)
    axes[1].axhline(first["precision"], ls=":", color="0.5", lw=1)
    axes[0].set(xlabel="known cells unassigned, share", ylabel="novel cells unassigned, share", title="ROC")
    axes[1].set(xlabel="recall of novel cells", ylabel="precision", title="precision and recall", ylim=(-0.02, 1.02))
    legend_beside(axes[0])
    return axes


def threshold_sweep(table: pd.DataFrame, tuned: pd.Series, methods: Sequence[str]) -> np.ndarray:
    """Draw recall and Jaccard of novel cells, and accuracy on known ones, against the threshold, a panel a method.

    `table` is by method, threshold and metric, of `scbert.novelty.sweep_thresholds`; bands are 95 % intervals. `tuned`
    is method -> threshold chosen on other types, if there is one: a dotted line. The dashed one is the paper's.
    """
    rows = table.reset_index()
    axes = make_panels(len(methods), width=2.6, height=2.8, beside=1.8, sharey=True)
    for ax, method in zip(axes, methods, strict=True):
        for metric, (color, line) in LINES.items():
            own = rows[(rows["method"] == method) & (rows["metric"] == metric)].sort_values("threshold")
            ax.plot(own["threshold"], own["value"], line, color=color, label=spell(metric), lw=1.8)
            ax.fill_between(own["threshold"], own["low"], own["high"], color=color, alpha=0.15, lw=0)
        ax.axvline(PAPER, color="black", ls="--", lw=1, label="the paper's threshold")
        if method in tuned.index:
            ax.axvline(tuned[method], color="black", ls=":", lw=1.5, label="tuned threshold")
        ax.set(title=spell(method), xlabel="threshold of the largest probability")
        ax.set(xticks=(0, 0.5, 1), ylim=(-0.02, 1.02))
    handles = {label: line for ax in axes for line, label in zip(*ax.get_legend_handles_labels(), strict=True)}
    legend_beside(axes[0], list(handles.values()), list(handles))
    return axes


def reliability(table: pd.DataFrame, methods: Sequence[str]) -> np.ndarray:
    """Draw accuracy against confidence in bins, before and after temperature scaling, a panel a method.

    `table` is from `scbert.calibration.tabulate_jobs`; the area of a dot is the number of its cells.
    """
    rows = table.reset_index()
    axes = make_panels(len(methods), width=2.6, height=3.2, beside=1.6, sharey=True)
    for ax, method in zip(axes, methods, strict=True):
        ax.plot([0, 1], [0, 1], color="0.7", lw=1)
        for name, color, face in (("as they are", "0.35", "white"), ("scaled", "#0173b2", "#0173b2")):
            own = rows[(rows["method"] == method) & (rows["logits"] == name)]
            ax.vlines(own["confidence"], own["low"], own["high"], color=color, lw=0.8)
            size = 12 + 160 * own["n"] / max(own["n"].sum(), 1)
            ax.plot(own["confidence"], own["accuracy"], color=color, lw=1, label=f"probabilities {name}")
            ax.scatter(own["confidence"], own["accuracy"], s=size, facecolor=face, edgecolor=color, zorder=3)
        ax.set(title=spell(method), xlabel="confidence", xlim=(0, 1.04), ylim=(-0.03, 1.03), aspect="equal")
        ax.set(xticks=(0, 0.5, 1), yticks=(0, 0.5, 1))
    axes[0].set(ylabel="accuracy, known types")
    legend_beside(axes[0])
    return axes


def novelty_accuracy(measured: pd.DataFrame, methods: Sequence[str], level: str = "together") -> np.ndarray:
    """Draw Jaccard of novel types and accuracy on known ones, at the paper's and the tuned threshold; return two axes.

    `measured` is from `scbert.novel_types.measure_all`. A dotted line is the Jaccard of leaving all cells unassigned.

    Paper: Fig. 4a.
    """
    rows = measured.reset_index()
    rows = rows[(rows["score"] == "max_probability") & rows["rule"].isin(["paper", "tuned"]) & (rows["level"] == level)]
    rows = rows.assign(method=rows["method"].where(rows["rule"] == "paper", rows["method"] + ":tuned"))
    names = [name for method in methods for name in (method, f"{method}:tuned") if name in set(rows["method"])]
    width = 0.17 * rows["data"].nunique() * (len(names) + 2)
    axes = make_panels(2, width=width, height=3.4, beside=3, sharey=True)
    rows["data"] = rows["data"].str.replace("->", " -> ")
    for ax, metric, title in zip(axes, ("jaccard", "known_accuracy"), ("novel types", "known types"), strict=True):
        studies(rows, metric, by="data", methods=names, ax=ax)
        ax.set(title=title, ylim=(-0.02, 1.02), ylabel="Jaccard" if metric == "jaccard" else "accuracy")
        if metric == "jaccard":  # all cells unassigned: as many are right as are novel
            cells = rows[rows["method"] == names[0]].groupby(["data", "metric"], sort=False)["n"].first().unstack()
            for x, share in enumerate((cells["recall"] / cells["jaccard"]).reindex(dict.fromkeys(rows["data"]))):
                label = "" if x else "all cells unassigned"
                ax.hlines(share, x - 0.45, x + 0.45, color="black", ls=":", lw=1, label=label)
        ax.get_legend().remove()
    handles, labels = axes[0].get_legend_handles_labels()
    legend_beside(axes[0], handles, [label.replace(":", ", ") for label in labels])
    return axes


def types_alone(
    measured: pd.DataFrame, methods: Sequence[str], score: str = "max_probability", metric: str = "auroc"
) -> np.ndarray:
    """Draw how well each type is told from the others when it alone was held out, with intervals, a panel a data set.

    `measured` is from `scbert.novel_types.measure_all`; a ValueError if no type in it was held out alone.
    """
    rows = measured.reset_index()
    rows = rows[(rows["metric"] == metric) & (rows["score"] == score) & (rows["level"] != "together")]
    if rows.empty:
        raise ValueError("No type was held out alone: the parameter alone says which are.")
    rows = rows[rows["rule"].isin(["", "tuned"])]
    sets, styles = list(dict.fromkeys(rows["data"])), style_methods(methods)
    most = rows.groupby("data")["level"].nunique().max()
    axes = make_panels(len(sets), width=3.6, height=1.2 + 0.36 * most, beside=2)
    for ax, name in zip(axes, sets, strict=True):
        own = rows[rows["data"] == name]
        order = list(own.groupby("level")["value"].mean().sort_values(ascending=False).index)
        for shift, method in zip(dodge(len(methods), 0.24), methods, strict=True):
            line = own[own["method"] == method]
            y = line["level"].map(order.index) + shift
            style = styles[method]
            ax.hlines(y, line["low"], line["high"], color=style["color"], lw=1.2)
            ax.plot(line["value"], y, ls="", ms=5.5, mec="white", mew=0.3, label=spell(method), **style)
        ax.set_yticks(range(len(order)), [textwrap.fill(str(label), 26) for label in order], fontsize=8)
        ax.axvline(0.5, color="0.5", ls=":", lw=1)
        ax.set(title=name, xlim=(-0.02, 1.02), xlabel=spell(metric).replace("auroc", "AUROC"))
        ax.invert_yaxis()
        ax.grid(axis="y", color="0.93")
    legend_beside(axes[0])
    return axes


def threshold_slider(cells: pd.DataFrame, methods: Sequence[str], threshold: float = PAPER) -> np.ndarray:
    """Draw the Sankey at a threshold, and under it, where somebody can move it, a slider over the threshold.

    `cells` are test cells of `scbert.novel_types.score_jobs`, of one data set and level. Returns the axes of the figure; where
    a notebook is executed without a browser, or ipywidgets is missing, it is all there is.
    """

    def draw(threshold):
        calls = count_calls(cells, threshold)
        axes = sankey(calls, methods)
        for ax, method in zip(axes, methods, strict=True):
            ax.set_title(f"{spell(method)}\n{_say_metrics(calls[calls['method'] == method])}", fontsize=9)
        axes[0].figure.suptitle(f"Unassigned below {threshold:.2f}", fontsize=10)
        return axes

    if os.environ.get("JPY_SESSION_NAME") and find_spec("ipywidgets"):  # a Jupyter server runs this kernel
        show_slider(draw, threshold)
    return draw(threshold)


def show_slider(draw: Callable, threshold: float):
    """Display a slider from 0 to 1 over what ``draw(threshold)`` draws and returns the axes of; return the slider."""
    import ipywidgets
    from IPython.display import display

    slider = ipywidgets.FloatSlider(threshold, max=1, step=0.02, description="threshold", continuous_update=False)

    def redraw(threshold):
        figure = draw(threshold)[0].figure
        display(figure)
        plt.close(figure)  # else the notebook shows it once more

    display(ipywidgets.VBox([slider, ipywidgets.interactive_output(redraw, {"threshold": slider})]))
    return slider


def _say_metrics(calls):
    """Return recall, Jaccard and known accuracy of one method's calls, in words."""
    novel, unassigned = calls["novel"], calls["called"] == "Unassigned"
    both, either = (calls.loc[rows, "cells"].sum() for rows in (novel & unassigned, novel | unassigned))
    right = calls.loc[~novel & (calls["truth"] == calls["called"]), "cells"].sum()
    recall = both / calls.loc[novel, "cells"].sum()
    known = right / calls.loc[~novel, "cells"].sum()
    return f"recall {recall:.2f}, Jaccard {both / either:.2f}, known accuracy {known:.2f}"


def _stack(sizes, room=0.07):
    """Return name -> (top, height) of blocks one below the other, each with room for its name; heights sum to one."""
    heights = sizes / sizes.sum()
    blocks, y = {}, 0.0
    for name, height in heights.items():
        slot = max(height + 0.012, room)
        blocks[name] = (y + (slot - height) / 2, height)
        y += slot
    return blocks


def _band(y0, y1, height, **style):
    """Return a band of constant height from (0, y0) to (1, y1), bent like an S."""
    points = [(0, y0), (0.5, y0), (0.5, y1), (1, y1), (1, y1 + height), (0.5, y1 + height), (0.5, y0 + height)]
    points += [(0, y0 + height), (0, y0)]
    codes = [Path.MOVETO, *[Path.CURVE4] * 3, Path.LINETO, *[Path.CURVE4] * 3, Path.CLOSEPOLY]
    return PathPatch(Path(points, codes), lw=0, antialiased=False, **style)  # else the picture is half as large again
