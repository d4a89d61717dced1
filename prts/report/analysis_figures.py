"""Figures of an analysis: clusters in UMAP and on the tissue, markers, shares of types, confusion, quality control, enrichment.

Groups get the colours of Okabe and Ito and of Tol, which colour-blind eyes tell apart, and their names beside or on the picture; a group
has one colour in all panels of a figure.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib as mpl
import matplotlib.patheffects
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from prts.analysis.annotate import UNASSIGNED
from prts.report.figures_canvas import BLUE, GREY, ORANGE, PANEL_IN, SEQUENTIAL, STYLE, Window, draw_scale_bar, save

if TYPE_CHECKING:
    import anndata as ad
    from matplotlib.axes import Axes
    from numpy.typing import NDArray

# Okabe and Ito 2008 without black and yellow, then Tol's muted scheme
_COLOURS = (
    *("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00"),
    *("#332288", "#117733", "#999933", "#882255", "#44aa99", "#aa4499", "#ddcc77", "#661100", "#6699cc", "#888888"),
)
_NONE = "#d9d9d9"
_MIDDLE_INK = 0.6
_TERMS = 5


def umaps(
    out: Sequence[Path], sides: Mapping[str, ad.AnnData], columns: Mapping[str, str], colours: Mapping[str, str]
) -> None:
    """UMAPs, a column a side and a row a grouping.

    Parameters
    ----------
    out
        .png, .pdf, .svg.
    sides
        By title: nuclei with `obsm["X_umap"]` and the groupings in `obs`.
    columns
        Of `obs`: the groupings, and what to call each.
    colours
        Of `group_colours`, for all groupings but clusters, whose numbers mean another on each side.
    """
    with mpl.rc_context(STYLE):
        figure, panels = _grid(len(columns), len(sides), PANEL_IN)
        for row, (column, called) in enumerate(columns.items()):
            for axes, (title, nuclei) in zip(panels[row], sides.items(), strict=True):
                xy = np.asarray(nuclei.obsm["X_umap"], dtype=float)
                shades = _shades(column, nuclei, colours)
                _scatter_groups(axes, xy, nuclei.obs[column], shades, size=max(0.4, min(6.0, 9000 / len(xy))))
                for name, at in _medians(xy, nuclei.obs[column]).items():
                    text = axes.text(*at, name, ha="center", va="center", fontsize=6)
                    text.set_path_effects([mpl.patheffects.withStroke(linewidth=1.5, foreground="white")])
                axes.set(xticks=[], yticks=[], xlabel="UMAP 1", title=title if row == 0 else "")
            panels[row][0].set_ylabel(f"{called}\n\nUMAP 2")
        save(figure, out)


def tissue_groups(
    out: Sequence[Path],
    sides: Mapping[str, ad.AnnData],
    column: str,
    called: str,
    colours: Mapping[str, str],
    mpp: float,
) -> None:
    """A grouping on the tissue, a panel a side, with a legend and a scale bar.

    Parameters
    ----------
    out, sides
        As for `umaps`, with `obsm["spatial"]` in full-resolution pixels.
    column, called
        Of `obs`, and what to call it.
    colours
        As for `umaps`.
    mpp
        um a full-resolution pixel.
    """
    window = Window.around(np.vstack([nuclei.obsm["spatial"] for nuclei in sides.values()]))
    with mpl.rc_context(STYLE):
        figure, panels = _grid(1, len(sides), 1.35 * PANEL_IN, aspect=window.height / window.width, legend_in=1.3)
        shown: dict[str, str] = {}
        for axes, (title, nuclei) in zip(panels[0], sides.items(), strict=True):
            xy = np.asarray(nuclei.obsm["spatial"], dtype=float)
            shades = _shades(column, nuclei, colours)
            shown |= {name: shades[name] for name in nuclei.obs[column].cat.categories.astype(str)}
            _scatter_groups(axes, xy, nuclei.obs[column], shades, size=_point_size(xy, window, 1.35 * PANEL_IN))
            window.show(axes, framed=False)
            axes.set_title(title)
        draw_scale_bar(panels[0][0], window, mpp)
        names = sorted(shown, key=lambda name: (name == UNASSIGNED, len(name) if column == "cluster" else 0, name))
        dots = [_dot(4, shown[name], name) for name in names]
        if any(nuclei.obs[column].isna().any() for nuclei in sides.values()):
            dots.append(_dot(4, _NONE, "left out"))
        figure.legend(handles=dots, loc="outside right center", frameon=False, title=called, title_fontsize=7)
        save(figure, out)


def qc_maps(out: Sequence[Path], sides: Mapping[str, ad.AnnData], mpp: float) -> None:
    """Total counts and number of genes of each nucleus on the tissue, a column a side; colours from 0 to the 99th percentile.

    Each panel has colours of its own: a prediction counts the genes of its panel only, a section all.

    Parameters
    ----------
    out, sides, mpp
        As for `tissue_groups`, with `obs["total_counts"]` and `obs["n_genes_by_counts"]`.
    """
    window = Window.around(np.vstack([nuclei.obsm["spatial"] for nuclei in sides.values()]))
    labels = {"total_counts": "UMI", "n_genes_by_counts": "genes"}
    with mpl.rc_context(STYLE):
        figure, panels = _grid(2, len(sides), PANEL_IN + 0.5, aspect=window.height / window.width * 0.85)
        for row, (column, label) in zip(panels, labels.items(), strict=True):
            for axes, (title, nuclei) in zip(row, sides.items(), strict=True):
                values = nuclei.obs[column].to_numpy(dtype=float)
                _map_values(
                    axes,
                    np.asarray(nuclei.obsm["spatial"]),
                    values,
                    window,
                    f"{label} a nucleus,\n0 to 99th percentile",
                )
                axes.set_title(f"{title} ({nuclei.n_vars:,} genes)" if column == "total_counts" else "")
        draw_scale_bar(panels[0][0], window, mpp)
        save(figure, out)


def marker_dots(
    out: Sequence[Path], nuclei: ad.AnnData, markers: pd.DataFrame, names: pd.DataFrame | None = None, *, each: int = 3
) -> None:
    """The best markers of each cluster in all clusters: colour is the mean, from 0 to the gene's highest; size the share of nuclei.

    Parameters
    ----------
    out
        .png, .pdf, .svg.
    nuclei
        Log-normalised, with `obs["cluster"]`.
    markers, names
        Of the clusters (`prts.analysis`); names are written beside the numbers.
    each
        Markers a cluster.
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
        figure.colorbar(
            dots, ax=axes, shrink=0.8, aspect=12, label="mean over the\ngene's highest"
        ).outline.set_linewidth(0.4)
        sizes = [_dot(np.sqrt(2 + 55 * s), GREY, f"{s:.0%}") for s in (0.25, 0.5, 1)]
        figure.legend(
            handles=sizes,
            loc="outside lower center",
            ncols=3,
            frameon=False,
            title="nuclei with ≥ 0.5 UMI of it",
            title_fontsize=7,
        )
        save(figure, out)


def type_shares(out: Sequence[Path], table: pd.DataFrame, colours: Mapping[str, str]) -> None:
    """Shares of types: bars with both sides, and a pie of each.

    Parameters
    ----------
    out
        .png, .pdf, .svg.
    table
        `name, predicted` and, if measured, `measured` (`prts.analysis.compare.shares`).
    colours
        Of the pies' slices; a name without one is grey.
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
            # small slices have no room for a name; the bars name them
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
    """Share of each group of the reference (rows) that was found as each group (columns), with the number of nuclei.

    Parameters
    ----------
    out
        .png, .pdf, .svg.
    table
        Nuclei, reference x found.
    title
        Above the matrix.
    reference, found
        Names of the axes.
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
        figure.colorbar(picture, ax=axes, shrink=0.8, aspect=14, label="share of the row").outline.set_linewidth(0.4)
        save(figure, out)


def enrichment_dots(out: Sequence[Path], table: pd.DataFrame, *, each: int = _TERMS) -> None:
    """The most significant terms of each cluster, a block a namespace: colour is -log10 of the adjusted p, size the genes found.

    Parameters
    ----------
    out
        .png, .pdf, .svg.
    table
        Significant terms (`prts.analysis.enrich`), at least one.
    each
        Terms a cluster and namespace.
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
        figure.colorbar(dots, ax=axes, shrink=0.5, aspect=14, label="-log10 adjusted p").outline.set_linewidth(0.4)
        sizes = [_dot(np.sqrt(6 + 5 * n), GREY, str(n)) for n in (2, 5, 15)]
        figure.legend(
            handles=sizes,
            loc="outside lower center",
            ncols=3,
            frameon=False,
            title="genes found (15 and more alike)",
            title_fontsize=7,
        )
        save(figure, out)


def spot_maps(out: Sequence[Path], spots: pd.DataFrame, clusters: ad.AnnData, radius_px: float, mpp: float) -> None:
    """Measured spots beside the sums of the predicted nuclei inside them, and domains beside the clusters of the nuclei.

    Parameters
    ----------
    out
        .png, .pdf, .svg.
    spots
        `prts.analysis.spots.SpotComparison.spots`.
    clusters
        Predicted nuclei with `obs["cluster"]`.
    radius_px
        Of a spot.
    mpp
        um a full-resolution pixel.
    """
    xy = spots[["x", "y"]].to_numpy(dtype=float)
    window = Window.around(np.vstack([xy - radius_px, xy + radius_px]))
    width = PANEL_IN + 0.4
    size = (2 * radius_px * 72 * 0.8 * width / window.width) ** 2
    panels_of = {
        "total_measured": "measured: UMI", "total_predicted": "predicted: UMI expected",
        "features_measured": "measured: genes seen", "features_predicted": "predicted: genes expected",
    }  # fmt: skip
    with mpl.rc_context(STYLE):
        figure, panels = _grid(3, 2, width, aspect=window.height / window.width * 0.85)
        for axes, (column, title) in zip(panels.ravel()[:4], panels_of.items(), strict=True):
            _map_values(
                axes,
                xy,
                spots[column].to_numpy(dtype=float),
                window,
                "the predicted genes in a spot,\n0 to 99th percentile",
                size=size,
            )
            axes.set_title(title)
        domains, nuclei = panels[2]
        _scatter_groups(domains, xy, spots["domain"], group_colours([spots["domain"]]), size=size)
        domains.set_title("measured: domains of the spots")
        at = np.asarray(clusters.obsm["spatial"], dtype=float)
        _scatter_groups(
            nuclei,
            at,
            clusters.obs["cluster"],
            group_colours([clusters.obs["cluster"]]),
            size=_point_size(at, window, width),
        )
        nuclei.set_title("predicted: clusters of the nuclei")
        for axes in panels.ravel():
            window.show(axes, framed=False)
        draw_scale_bar(panels[0][0], window, mpp)
        save(figure, out)


def group_colours(groups: Sequence[pd.Series]) -> dict[str, str]:
    """A colour for each group of several columns, by name; beyond 16 groups colours come again, and unassigned is grey."""
    names: set[str] = set().union(*(set(column.dropna().astype(str)) for column in groups))
    order = sorted(names - {UNASSIGNED}, key=lambda name: (name.isdigit(), int(name) if name.isdigit() else 0, name))
    return {name: _COLOURS[i % len(_COLOURS)] for i, name in enumerate(order)} | {UNASSIGNED: GREY}


def _shades(column: str, nuclei: ad.AnnData, colours: Mapping[str, str]) -> Mapping[str, str]:
    return group_colours([nuclei.obs[column]]) if column == "cluster" else colours


def _dot(size: float, colour: str, label: str) -> Line2D:
    return Line2D([], [], marker="o", linestyle="", markersize=size, color=colour, label=label)


def _grid(rows: int, columns: int, width: float, *, aspect: float = 1.0, legend_in: float = 0.0) -> tuple[Figure, Any]:
    aspect = float(np.clip(aspect, 0.3, 2.5))
    figure = Figure(figsize=(columns * width + legend_in + 0.2, rows * width * aspect + 0.3), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False)


def _scatter_groups(
    axes: Axes, xy: NDArray[np.float64], groups: pd.Series, colours: Mapping[str, str], size: float
) -> None:
    shades = groups.astype(object).map(lambda name: colours.get(str(name), _NONE) if pd.notna(name) else _NONE)
    rare_last = np.argsort(-groups.map(groups.value_counts()).astype(float).fillna(np.inf).to_numpy(), kind="stable")
    axes.scatter(
        xy[rare_last, 0],
        xy[rare_last, 1],
        c=shades.to_numpy()[rare_last].tolist(),
        s=size,
        linewidths=0,
        rasterized=True,
    )


def _map_values(
    axes: Axes,
    xy: NDArray[np.float64],
    values: NDArray[np.float64],
    window: Window,
    label: str,
    size: float | None = None,
) -> None:
    known = values[np.isfinite(values)]
    top = float(np.percentile(known, 99)) if len(known) else 1.0
    area = _point_size(xy, window, PANEL_IN) if size is None else size
    points = axes.scatter(
        xy[:, 0], xy[:, 1], c=values, s=area, cmap=SEQUENTIAL, vmin=0, vmax=top or 1.0, linewidths=0, rasterized=True
    )
    window.show(axes, framed=False)
    bar = axes.figure.colorbar(points, ax=axes, shrink=0.8, aspect=18, extend="max", pad=0.01, label=label)
    bar.outline.set_linewidth(0.4)


def _point_size(xy: NDArray[np.float64], window: Window, panel_in: float) -> float:
    """Area in pt^2 with which points cover about half of a panel they fill evenly."""
    spacing_px = np.sqrt(window.width * window.height / max(len(xy), 1))
    return float((0.65 * 72 * panel_in * spacing_px / window.width) ** 2)


def _medians(xy: NDArray[np.float64], groups: pd.Series) -> dict[str, NDArray[np.float64]]:
    table = pd.DataFrame(xy).groupby(groups.astype(object).to_numpy()).median()
    return {str(name): at for name, at in zip(table.index, table.to_numpy(), strict=True)}


def _short(name: str, length: int = 60) -> str:
    return name if len(name) <= length else f"{name[: length - 1]}…"
