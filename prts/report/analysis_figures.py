"""Figures of an analysis: clusters and cell types on UMAP and tissue, quality control, and Visium spots.

Groups have colors that color-blind readers can tell apart (Okabe and Ito, then Tol), the same in all panels of a figure, and are labeled.
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

from prts.analysis.annotate import UNASSIGNED
from prts.report.analysis_charts import confusion_matrix, enrichment_dots, marker_dots, type_shares
from prts.report.figures_canvas import (
    GREY,
    PANEL_IN,
    SEQUENTIAL,
    STYLE,
    Window,
    add_colorbar,
    draw_scale_bar,
    legend_dot,
    save,
)

if TYPE_CHECKING:
    import anndata as ad
    from matplotlib.axes import Axes
    from numpy.typing import NDArray

    from prts.analysis.pipeline import Analysis

# Okabe and Ito 2008 without black and yellow, then Tol's muted scheme
_COLOURS = (
    *("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00"),
    *("#332288", "#117733", "#999933", "#882255", "#44aa99", "#aa4499", "#ddcc77", "#661100", "#6699cc", "#888888"),
)
_NONE = "#d9d9d9"
_GROUPINGS = {"cluster": "cluster", "type": "cell type (markers)", "classifier_type": "cell type (classifier)"}
_CONFUSION_TITLES = {"clusters": "Clusters", "type": "Cell types (markers)", "broad": "Broad classes (markers)"}


def draw_analysis(analysis: Analysis, folder: str | Path, formats: Sequence[str] = ("png", "pdf")) -> None:
    """Draw all figures of an analysis.

    Parameters
    ----------
    analysis
        Result of `prts.analysis.pipeline.analyze`.
    folder
        Output folder; created if needed.
    formats
        File formats: png, pdf, svg. None are drawn if empty.

    Examples
    --------
    >>> draw_analysis(analysis, "analysis/figures", ["png"])  # doctest: +SKIP
    """
    if not formats:
        return

    def files(name: str) -> list[Path]:
        return [Path(folder) / f"{name}.{suffix}" for suffix in formats]

    nuclei = {name: section.nuclei for name, section in analysis.sections.items()}
    groupings = {column: name for column, name in _GROUPINGS.items() if all(column in n.obs for n in nuclei.values())}
    columns = [n.obs[column] for n in nuclei.values() for column in ("type", "classifier_type") if column in n.obs]
    colours = group_colours(columns)
    umaps(files("umap"), nuclei, groupings, colours)
    for column, name in groupings.items():
        tissue_groups(files(f"tissue_{column}"), nuclei, column, name, colours, analysis.mpp)
    qc_maps(files("qc_maps"), nuclei, analysis.mpp)
    for name, section in analysis.sections.items():
        if len(section.markers):
            marker_dots(files(f"markers_{name}"), section.nuclei, section.markers, section.names)
    for name, table in analysis.tables.items():
        if name.startswith("shares_") and len(table):
            type_shares(files(name), table, group_colours([table["name"]]) if name == "shares_broad" else colours)
        if name.endswith("enrichment") and len(table):
            enrichment_dots(files(name), table)
    for name, table in analysis.comparison.tables.items():
        title, reference, found = _confusion_labels(name, truth="classifier/rates/n" in analysis.comparison.summary)
        confusion_matrix(files(f"confusion_{name}"), table, title, reference=reference, found=found)
    if analysis.spots is not None:
        spot_maps(files("spots"), analysis.spots.spots, nuclei["predicted"], analysis.spots.radius_px, analysis.mpp)


def _confusion_labels(name: str, *, truth: bool) -> tuple[str, str, str]:
    """Title and axis labels of a confusion matrix."""
    if name in _CONFUSION_TITLES:
        return _CONFUSION_TITLES[name], "measured", "predicted"
    title = "Broad classes (classifier)" if "broad" in name else "Cell types (classifier)"
    return title, "true" if truth else "measured", name.rsplit("_", 1)[-1]


def umaps(
    out: Sequence[Path], sides: Mapping[str, ad.AnnData], columns: Mapping[str, str], colours: Mapping[str, str]
) -> None:
    """UMAPs with one column per section and one row per grouping.

    Parameters
    ----------
    out
        Paths with the suffix .png, .pdf or .svg.
    sides
        Nuclei with `obsm["X_umap"]` and the groupings in `obs`, by title.
    columns
        Labels of the groupings, by column of `obs`.
    colours
        Result of `group_colours`. Not used for clusters, whose numbers differ between sections.
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
    """A grouping on the tissue, one panel per section, with a legend and a scale bar.

    Parameters
    ----------
    out, sides
        As for `umaps`, with `obsm["spatial"]` in full-resolution pixels.
    column, called
        Column of `obs` and its label.
    colours
        As for `umaps`.
    mpp
        um per full-resolution pixel.
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
        dots = [legend_dot(4, shown[name], name) for name in names]
        if any(nuclei.obs[column].isna().any() for nuclei in sides.values()):
            dots.append(legend_dot(4, _NONE, "not clustered"))
        figure.legend(handles=dots, loc="outside right center", frameon=False, title=called, title_fontsize=7)
        save(figure, out)


def qc_maps(out: Sequence[Path], sides: Mapping[str, ad.AnnData], mpp: float) -> None:
    """Total counts and number of genes per nucleus on the tissue, one column per section.

    Each panel has its own color scale, since a prediction covers only the genes of its panel.

    Parameters
    ----------
    out, sides, mpp
        As for `tissue_groups`, with `obs["total_counts"]` and `obs["n_genes_by_counts"]`.
    """
    window = Window.around(np.vstack([nuclei.obsm["spatial"] for nuclei in sides.values()]))
    labels = {"total_counts": "UMI per nucleus", "n_genes_by_counts": "genes per nucleus"}
    with mpl.rc_context(STYLE):
        figure, panels = _grid(2, len(sides), PANEL_IN + 0.5, aspect=window.height / window.width * 0.85)
        for row, (column, label) in zip(panels, labels.items(), strict=True):
            for axes, (title, nuclei) in zip(row, sides.items(), strict=True):
                values = nuclei.obs[column].to_numpy(dtype=float)
                _map_values(axes, np.asarray(nuclei.obsm["spatial"]), values, window, label)
                axes.set_title(f"{title} ({nuclei.n_vars:,} genes)" if column == "total_counts" else "")
        draw_scale_bar(panels[0][0], window, mpp)
        save(figure, out)


def spot_maps(out: Sequence[Path], spots: pd.DataFrame, clusters: ad.AnnData, radius_px: float, mpp: float) -> None:
    """Measured spots next to the sums of predicted nuclei, and spot domains next to nucleus clusters.

    Parameters
    ----------
    out
        Paths with the suffix .png, .pdf or .svg.
    spots
        `prts.analysis.spots.SpotComparison.spots`.
    clusters
        Predicted nuclei with `obs["cluster"]`.
    radius_px
        Radius of a spot, full-resolution pixels.
    mpp
        um per full-resolution pixel.
    """
    xy = spots[["x", "y"]].to_numpy(dtype=float)
    window = Window.around(np.vstack([xy - radius_px, xy + radius_px]))
    width = PANEL_IN + 0.4
    size = (2 * radius_px * 72 * 0.8 * width / window.width) ** 2
    panels_of = {
        "total_measured": "measured: UMI", "total_predicted": "predicted: expected UMI",
        "features_measured": "measured: genes detected", "features_predicted": "predicted: genes expected",
    }  # fmt: skip
    with mpl.rc_context(STYLE):
        figure, panels = _grid(3, 2, width, aspect=window.height / window.width * 0.85)
        for axes, (column, title) in zip(panels.ravel()[:4], panels_of.items(), strict=True):
            values = spots[column].to_numpy(dtype=float)
            _map_values(axes, xy, values, window, "per spot, genes of the panel", size=size)
            axes.set_title(title)
        domains, nuclei = panels[2]
        _scatter_groups(domains, xy, spots["domain"], group_colours([spots["domain"]]), size=size)
        domains.set_title("measured: spot domains")
        at = np.asarray(clusters.obsm["spatial"], dtype=float)
        _scatter_groups(
            nuclei,
            at,
            clusters.obs["cluster"],
            group_colours([clusters.obs["cluster"]]),
            size=_point_size(at, window, width),
        )
        nuclei.set_title("predicted: nucleus clusters")
        for axes in panels.ravel():
            window.show(axes, framed=False)
        draw_scale_bar(panels[0][0], window, mpp)
        save(figure, out)


def group_colours(groups: Sequence[pd.Series]) -> dict[str, str]:
    """A color for each group in several columns, by name; colors repeat after 16 groups, and unassigned is gray."""
    names: set[str] = set().union(*(set(column.dropna().astype(str)) for column in groups))
    order = sorted(names - {UNASSIGNED}, key=lambda name: (name.isdigit(), int(name) if name.isdigit() else 0, name))
    return {name: _COLOURS[i % len(_COLOURS)] for i, name in enumerate(order)} | {UNASSIGNED: GREY}


def _shades(column: str, nuclei: ad.AnnData, colours: Mapping[str, str]) -> Mapping[str, str]:
    return group_colours([nuclei.obs[column]]) if column == "cluster" else colours


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
    add_colorbar(axes.figure, points, axes, f"{label}\n(0 to 99th percentile)", extend="max", pad=0.01)


def _point_size(xy: NDArray[np.float64], window: Window, panel_in: float) -> float:
    """Area in pt^2 at which evenly spaced points cover about half of a panel."""
    spacing_px = np.sqrt(window.width * window.height / max(len(xy), 1))
    return float((0.65 * 72 * panel_in * spacing_px / window.width) ** 2)


def _medians(xy: NDArray[np.float64], groups: pd.Series) -> dict[str, NDArray[np.float64]]:
    table = pd.DataFrame(xy).groupby(groups.astype(object).to_numpy()).median()
    return {str(name): at for name, at in zip(table.index, table.to_numpy(), strict=True)}
