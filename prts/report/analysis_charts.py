"""Charts of an analysis: marker genes, type shares, confusion matrices and enriched gene sets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from prts.report.figures_canvas import BLUE, GREY, ORANGE, SEQUENTIAL, STYLE, add_colorbar, add_size_legend, save

if TYPE_CHECKING:
    import anndata as ad

_MIDDLE_INK = 0.6
_TERMS = 5


def marker_dots(
    out: Sequence[Path], nuclei: ad.AnnData, markers: pd.DataFrame, names: pd.DataFrame | None = None, *, each: int = 3
) -> None:
    """Dot plot of the top markers of each cluster: color is mean expression scaled per gene, size the share of nuclei.

    Parameters
    ----------
    out
        Paths with the suffix .png, .pdf or .svg.
    nuclei
        Log-normalized nuclei with `obs["cluster"]`.
    markers, names
        Markers and names of the clusters (`prts.analysis.compare.ClusteredSection`).
    each
        Number of markers per cluster.
    """
    genes = list(dict.fromkeys(markers.loc[markers["rank"] <= each, "gene"]))
    clusters = nuclei.obs["cluster"].cat.categories.tolist()
    at = nuclei.var_names.get_indexer(genes)
    mean, share = np.zeros((len(clusters), len(genes))), np.zeros((len(clusters), len(genes)))
    for row, name in enumerate(clusters):
        inside = (nuclei.obs["cluster"] == name).to_numpy()
        mean[row] = np.asarray(nuclei.X[inside][:, at].mean(axis=0)).ravel()
        share[row] = np.asarray((nuclei.layers["umi"][inside][:, at] >= 0.5).mean(axis=0)).ravel()
    called = {} if names is None else names.set_index("cluster")["type"].to_dict()
    labels = [f"{name}  {called[name]}" if name in called else str(name) for name in clusters]
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(1.9 + 0.17 * len(genes), 1.1 + 0.17 * len(clusters)), layout="constrained")
        axes = figure.subplots()
        x, y = np.meshgrid(np.arange(len(genes)), np.arange(len(clusters)))
        scaled = mean / np.maximum(mean.max(axis=0), 1e-9)
        dots = axes.scatter(
            x, y, c=scaled, s=2 + 55 * share, cmap=SEQUENTIAL, vmin=0, vmax=1, edgecolors="#404040", linewidths=0.2
        )
        axes.set_xticks(np.arange(len(genes)), genes, rotation=90, fontstyle="italic", fontsize=6)
        axes.set_yticks(np.arange(len(clusters)), labels)
        axes.set(xlim=(-0.7, len(genes) - 0.3), ylim=(len(clusters) - 0.4, -0.6), ylabel="cluster")
        add_colorbar(figure, dots, axes, "mean expression\n(scaled per gene)", aspect=12)
        areas = {f"{s:.0%}": 2 + 55 * s for s in (0.25, 0.5, 1)}
        add_size_legend(figure, areas, "nuclei with ≥ 0.5 UMI")
        save(figure, out)


def type_shares(out: Sequence[Path], table: pd.DataFrame, colours: Mapping[str, str]) -> None:
    """Shares of cell types as bars, measured and predicted, and as a pie chart each.

    Parameters
    ----------
    out
        Paths with the suffix .png, .pdf or .svg.
    table
        `name, predicted` and, if measured, `measured` (`prts.analysis.compare.share_of_types`).
    colours
        Colors of the slices by name; others are gray.
    """
    sides = [side for side in ("measured", "predicted") if side in table]
    with mpl.rc_context(STYLE):
        height = max(1.8, 0.6 + 0.26 * len(table))
        figure = Figure(figsize=(3.2 + 1.7 * len(sides), height), layout="constrained")
        panels = figure.subplots(1, 1 + len(sides), squeeze=False, width_ratios=[1.6] + [1] * len(sides))[0]
        y, thick = np.arange(len(table)), 0.8 / len(sides)
        for i, side in enumerate(sides):
            colour = {"measured": BLUE, "predicted": ORANGE}[side]
            panels[0].barh(y + (i - (len(sides) - 1) / 2) * thick, table[side], thick, color=colour, label=side)
        panels[0].set_yticks(y, table["name"])
        panels[0].set(ylim=(len(table) - 0.5, -0.5), xlabel="share of nuclei")
        panels[0].legend(frameon=False)
        for axes, side in zip(panels[1:], sides, strict=True):
            # small slices have no room for a label; the bars have them all
            wedges = [name if share >= 0.04 else "" for name, share in zip(table["name"], table[side], strict=True)]
            axes.pie(
                table[side], labels=wedges, colors=[colours.get(name, GREY) for name in table["name"]], startangle=90, counterclock=False,
                wedgeprops={"linewidth": 0.4, "edgecolor": "white"}, textprops={"fontsize": 6},
            )  # fmt: skip
            axes.set_title(side)
        save(figure, out)


def confusion_matrix(
    out: Sequence[Path], table: pd.DataFrame, title: str, *, reference: str = "measured", found: str = "predicted"
) -> None:
    """Confusion matrix: share of each row as color, number of nuclei as text.

    Parameters
    ----------
    out
        Paths with the suffix .png, .pdf or .svg.
    table
        Numbers of nuclei, reference x found.
    title
        Title of the figure.
    reference, found
        Axis labels.
    """
    counts = table
    share = counts.to_numpy() / np.maximum(counts.to_numpy().sum(axis=1, keepdims=True), 1)
    with mpl.rc_context(STYLE):
        size = 1.5 + 0.36 * len(counts.columns), 1.2 + 0.3 * len(counts)
        figure = Figure(figsize=size, layout="constrained")
        axes = figure.subplots()
        picture = axes.imshow(share, cmap=SEQUENTIAL, vmin=0, vmax=1, aspect="auto")
        for (row, column), value in np.ndenumerate(counts.to_numpy()):
            if value:
                colour = "black" if share[row, column] > _MIDDLE_INK else "white"
                axes.text(column, row, f"{value}", ha="center", va="center", fontsize=5, color=colour)
        turn = max(map(len, map(str, counts.columns))) > 3
        axes.set_xticks(np.arange(len(counts.columns)), counts.columns, rotation=90 if turn else 0)
        axes.set_yticks(np.arange(len(counts)), counts.index)
        axes.set(xlabel=found, ylabel=reference, title=title)
        axes.spines[:].set_visible(False)
        axes.tick_params(length=0)
        add_colorbar(figure, picture, axes, "share of row", aspect=14)
        save(figure, out)


def enrichment_dots(out: Sequence[Path], table: pd.DataFrame, *, each: int = _TERMS) -> None:
    """Dot plot of the most significant terms per cluster and namespace: color is -log10 adjusted p, size the number of genes.

    Parameters
    ----------
    out
        Paths with the suffix .png, .pdf or .svg.
    table
        Significant terms (`prts.analysis.enrich`), at least one.
    each
        Number of terms per cluster and namespace.
    """
    best = table.sort_values("p_adj").groupby(["cluster", "namespace"], sort=False).head(each)
    order = (
        best.groupby(["namespace", "name"], sort=False)["p_adj"].min().reset_index().sort_values(["namespace", "p_adj"])
    )
    rows = {(n, t): i for i, (n, t) in enumerate(zip(order["namespace"], order["name"], strict=True))}
    shown = table[[key in rows for key in zip(table["namespace"], table["name"], strict=True)]]
    clusters = sorted(table["cluster"].astype(str).unique(), key=lambda c: (len(c), c))
    x = shown["cluster"].astype(str).map({name: i for i, name in enumerate(clusters)})
    y = [rows[key] for key in zip(shown["namespace"], shown["name"], strict=True)]
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(4.4 + 0.2 * len(clusters), 1.2 + 0.14 * len(rows)), layout="constrained")
        axes = figure.subplots()
        strength = -np.log10(np.maximum(shown["p_adj"], 1e-30))
        dots = axes.scatter(
            x, y, c=strength, s=6 + 5 * shown["n_found"].clip(upper=15), cmap=SEQUENTIAL, vmin=0, linewidths=0
        )
        axes.set_xticks(np.arange(len(clusters)), clusters)
        axes.set_yticks(np.arange(len(rows)), [f"{_short(name)}  {namespace}" for namespace, name in rows])
        axes.set(xlim=(-0.7, len(clusters) - 0.3), ylim=(len(rows) - 0.4, -0.6), xlabel="cluster")
        axes.grid(linewidth=0.3, color="#e6e6e6")
        axes.set_axisbelow(True)
        add_colorbar(figure, dots, axes, "-log10 adjusted p", shrink=0.5, aspect=14)
        areas = {label: 6 + 5 * n for label, n in {"2": 2, "5": 5, "≥ 15": 15}.items()}
        add_size_legend(figure, areas, "number of genes")
        save(figure, out)


def _short(name: str, length: int = 60) -> str:
    return name if len(name) <= length else f"{name[: length - 1]}…"
