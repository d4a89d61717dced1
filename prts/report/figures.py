"""Figures for a paper: gene maps, PCC against its noise ceiling, the ceiling against the truth, training curves.

Each function draws on its own canvas (no pyplot, no global state, no display) and saves by the suffix of `out`: .png (300 dpi), .pdf
or .svg, in which points are rasterised and text stays text.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.patches import Rectangle
from numpy.typing import NDArray
from scipy.spatial import cKDTree

from prts.errors import InputError
from prts.io.cache import atomic
from prts.metrics.ceiling import RELIABLE, ceiling_share

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Viridis is read by colour-blind eyes and in grey; on a light ground its dark end, no expression, still shows the tissue.
_MAP = "viridis"
_BLUE, _ORANGE, _GREY = "#0072b2", "#d55e00", "#999999"  # Okabe and Ito 2008
_DPI = 300
_STYLE: Any = {
    "font.size": 7,
    "axes.titlesize": 8,
    "axes.labelsize": 7,
    "xtick.labelsize": 6,
    "ytick.labelsize": 6,
    "legend.fontsize": 6,
    "axes.linewidth": 0.6,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "pdf.fonttype": 42,
    "svg.fonttype": "none",
}
_PANEL_IN = 2.2


def gene_maps(
    out: Path,
    *,
    image: NDArray[np.uint8],
    image_width_px: int,
    mpp: float,
    genes: Sequence[str],
    xy_px: NDArray[np.float64],
    measured: NDArray[Any],
    predicted: NDArray[Any],
    pcc: Sequence[float] | None = None,
    scale: str = "log1p(UMI)",
) -> Path:
    """Maps of a section, a row a gene: H&E, measured and predicted expression of the same nuclei in the same colours.

    The colours of a row run from 0 to the 99th percentile of its measured nuclei (of the predicted ones, if all of the measured are 0
    there), as the colour bar says.

    Parameters
    ----------
    out
        .png, .pdf or .svg.
    image
        Picture of the whole section, RGB (height, width, 3).
    image_width_px
        Width of the full-resolution image, the unit of `xy_px`.
    mpp
        um a full-resolution pixel.
    genes
        Names of the genes.
    xy_px
        Centres of the nuclei, (n_nuclei, 2), x right, y down.
    measured, predicted
        Values on the scale to show, (n_nuclei, n_genes).
    pcc
        Correlation of each gene, written below its name.
    scale
        What the values are, for the colour bar.
    """
    low, high = xy_px.min(axis=0), xy_px.max(axis=0)
    margin = 0.03 * float((high - low).max()) + 1
    low, high = low - margin, high + margin
    factor = image.shape[1] / image_width_px
    aspect = float(np.clip((high - low)[1] / (high - low)[0], 0.3, 2.5))
    with mpl.rc_context(_STYLE):
        figure = Figure(
            figsize=(3 * _PANEL_IN + 0.9, len(genes) * _PANEL_IN * aspect + 0.35),
            layout=ConstrainedLayoutEngine(w_pad=0.02, h_pad=0.02, wspace=0.02, hspace=0.02),
        )
        panels = figure.subplots(len(genes), 3, squeeze=False)
        size = (_PANEL_IN * 72 * _point_diameter(xy_px, float(np.prod(high - low))) / (high - low)[0]) ** 2
        for row, gene in enumerate(genes):
            picture, *maps = panels[row]
            extent = (0, image_width_px, image.shape[0] / factor, 0)
            picture.imshow(image, extent=extent, interpolation="antialiased")
            top = _top(measured[:, row], predicted[:, row])
            for axes, values in zip(maps, (measured, predicted), strict=True):
                points = axes.scatter(
                    *xy_px.T, c=values[:, row], s=size, cmap=_MAP, vmin=0, vmax=top, linewidths=0, rasterized=True
                )
            bar = figure.colorbar(points, ax=maps, shrink=0.8, aspect=18, extend="max", pad=0.01)
            bar.set_label(f"{scale},\n0 to 99th percentile")
            bar.outline.set_linewidth(0.4)
            picture.set_ylabel(gene, fontstyle="italic", fontsize=9)
            if pcc is not None and np.isfinite(pcc[row]):
                maps[1].text(0.02, 0.02, f"PCC {pcc[row]:.2f}", transform=maps[1].transAxes)
            for axes in panels[row]:
                axes.set(xlim=(low[0], high[0]), ylim=(high[1], low[1]), aspect="equal", xticks=[], yticks=[])
                axes.spines[:].set_visible(False)
        for axes, title in zip(panels[0], ("H&E", "Measured", "Predicted"), strict=True):
            axes.set_title(title)
        _scale_bar(panels[0][0], low, high, mpp)
        return _save(figure, out)


def pcc_vs_ceiling(per_gene: pd.DataFrame, out: Path, *, n_named: int = 8) -> Path:
    """PCC of each gene against what counting noise would let a perfect prediction reach.

    Parameters
    ----------
    per_gene
        `gene, mean_counts, pcc, ceiling` (per_gene.csv). Genes that are constant in the section have no point.
    out
        .png, .pdf or .svg.
    n_named
        How many genes are named at most: those with the highest PCC that have room for their name.
    """
    table = per_gene.dropna(subset=["pcc", "ceiling"])
    counts = np.maximum(table["mean_counts"].to_numpy(), 1e-4)
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(3.4, 3.1), layout="constrained")
        axes = figure.subplots()
        axes.axline((0, 0), slope=1, color=_GREY, linewidth=0.8, linestyle="--", zorder=0)
        axes.axhline(0, color=_GREY, linewidth=0.4, zorder=0)
        reach = table[["pcc", "ceiling"]].to_numpy().max(initial=0.1) * 1.08
        points = axes.scatter(
            table["ceiling"],
            table["pcc"],
            c=counts,
            s=7,
            cmap=_MAP,
            norm=mpl.colors.LogNorm(*((counts.min(), counts.max()) if len(counts) else (0.01, 1))),
            linewidths=0,
            alpha=0.9,
            rasterized=len(table) > 2000,
        )
        figure.colorbar(points, ax=axes, shrink=0.8, aspect=18, label="mean UMI a nucleus").outline.set_linewidth(0.4)
        _name_genes(axes, table, reach, n_named)
        n_reliable = int((table["ceiling"] >= RELIABLE).sum())
        if n_reliable:
            share = ceiling_share(table["pcc"].to_numpy(), table["ceiling"].to_numpy())
            text = f"{share:.0%} of the ceiling\n({n_reliable} genes with a ceiling ≥ {RELIABLE})"
            axes.text(0.03, 0.98, text, transform=axes.transAxes, va="top")
        axes.set(
            xlim=(-0.02, reach),
            ylim=(min(-0.02, table["pcc"].min() * 1.1 if len(table) else 0), reach),
            xlabel="noise ceiling of the PCC",
            ylabel="PCC, log1p(UMI)",
        )
        return _save(figure, out)


def ceiling_check(tables: Mapping[str, pd.DataFrame], out: Path) -> Path:
    """Estimated noise ceilings against what the true rates of a simulated section reach: a panel a table.

    Parameters
    ----------
    tables
        By title: `mean_counts, ceiling` (estimated) and `reached` (PCC of the true rates), a row a gene. Genes with a ceiling of 0,
        suppressed as unreliable, are drawn but not averaged.
    out
        .png, .pdf or .svg.
    """
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(2.7 * len(tables) + 0.6, 2.8), layout="constrained")
        panels = figure.subplots(1, len(tables), squeeze=False, sharex=True, sharey=True)[0]
        counts = np.concatenate([table["mean_counts"].to_numpy() for table in tables.values()])
        norm = mpl.colors.LogNorm(max(float(np.percentile(counts, 1)), 1e-3), float(counts.max()))
        for axes, (title, table) in zip(panels, tables.items(), strict=True):
            axes.axline((0, 0), slope=1, color=_GREY, linewidth=0.8, linestyle="--", zorder=0)
            points = axes.scatter(
                table["reached"], table["ceiling"], c=table["mean_counts"], s=5, cmap=_MAP, norm=norm, linewidths=0
            )
            known = table[table["ceiling"] > 0]
            text = f"mean {known['ceiling'].mean():.2f} estimated, {known['reached'].mean():.2f} reached\n({len(known)} genes)"
            axes.text(0.97, 0.03, text, transform=axes.transAxes, ha="right", va="bottom")
            axes.set(title=title, xlabel="PCC of the true rates", aspect="equal")
        panels[0].set_ylabel("estimated noise ceiling")
        figure.colorbar(points, ax=panels, shrink=0.8, aspect=18, label="mean UMI a nucleus").outline.set_linewidth(0.4)
        return _save(figure, out)


def training_curves(metrics_csv: Path, out: Path, *, best_epoch: int | None = None) -> Path:
    """Curves of a training run: one panel a figure, training and validation in it, and the epoch whose weights were kept.

    Parameters
    ----------
    metrics_csv
        What Lightning's CSV logger wrote: `epoch`, and columns `train/<figure>` and `val/<figure>`.
    out
        .png, .pdf or .svg.
    best_epoch
        The epoch to mark in every panel (which figure chose it is a setting of the run); None marks none.

    Raises
    ------
    InputError
        If the file holds no such columns.
    """
    table = pd.read_csv(metrics_csv)
    matches = {column: re.fullmatch(r"(train|val)[/_](.+?)(?:_epoch)?", column) for column in table.columns}
    curves = {column: match.groups() for column, match in matches.items() if match and not column.endswith("_step")}
    figures = list(dict.fromkeys(name for _, name in curves.values()))
    if not figures or "epoch" not in table:
        raise InputError(
            f"{metrics_csv}: has no columns epoch, train/... and val/...; expected metrics.csv of a CSV logger"
        )
    with mpl.rc_context(_STYLE):
        columns = min(3, len(figures))
        rows = -(-len(figures) // columns)
        figure = Figure(figsize=(2.3 * columns, 1.8 * rows), layout="constrained")
        panels = figure.subplots(rows, columns, squeeze=False).ravel()
        epochs = table.groupby("epoch").mean(numeric_only=True)
        for axes, name in zip(panels, figures, strict=False):
            for column, (part, of) in curves.items():
                values = epochs[column].dropna() if of == name else pd.Series(dtype=float)
                if len(values):
                    colour, label = (_BLUE, "training") if part == "train" else (_ORANGE, "validation")
                    marker = "o" if len(values) == 1 else None
                    axes.plot(values.index, values, color=colour, label=label, linewidth=1, marker=marker, markersize=3)
            low, high = axes.dataLim.intervaly
            if low > 0 and high > 10 * low:  # the first epoch would flatten the rest
                axes.set_yscale("log")
            if best_epoch is not None:
                label = f"best epoch ({best_epoch})"
                axes.axvline(best_epoch, color=_GREY, linewidth=0.6, linestyle=":", label=label)
            axes.set(xlabel="epoch", title=name)
            axes.xaxis.get_major_locator().set_params(integer=True)
        panels[0].legend(frameon=False)
        for axes in panels[len(figures) :]:
            axes.set_visible(False)
        return _save(figure, out)


def _name_genes(axes: Axes, table: pd.DataFrame, reach: float, n_named: int) -> None:
    """Write names left of the highest points, where there is room: no name over another point or name."""
    x, y = table["ceiling"].to_numpy(), table["pcc"].to_numpy()
    heights: list[float] = []
    for i in np.argsort(-y):
        beside = (np.abs(y - y[i]) < 0.015 * reach) & (x < x[i]) & (x > x[i] - 0.17 * reach)
        if len(heights) < n_named and not beside.any() and all(abs(y[i] - other) > 0.03 * reach for other in heights):
            heights.append(y[i])
            axes.annotate(
                table["gene"].iloc[i],
                (x[i], y[i]),
                (-4, 0),
                textcoords="offset points",
                ha="right",
                va="center",
                fontsize=5,
                fontstyle="italic",
            )


def _point_diameter(xy: NDArray[np.float64], area: float) -> float:
    """A diameter that lets nuclei in clumps be told apart and the map still be seen from afar.

    It is the geometric mean of two: the distance at which nearest neighbours touch, and that at which evenly spread ones would.
    """
    if len(xy) < 2:
        return 10.0
    distance, _ = cKDTree(xy).query(xy, k=2)
    return float(np.sqrt(np.median(distance[:, 1]) * np.sqrt(area / len(xy))))


def _top(measured: NDArray[Any], predicted: NDArray[Any]) -> float:
    for values in (measured, predicted):
        top = float(np.percentile(values, 99))
        if top > 0:
            return top
    return float(max(measured.max(), predicted.max())) or 1.0


def _scale_bar(axes: Axes, low: NDArray[np.float64], high: NDArray[np.float64], mpp: float) -> None:
    """A bar of a round length, about a fifth of the panel, bottom left."""
    width = float((high - low)[0])
    exact = width * mpp / 5
    step = 10 ** np.floor(np.log10(exact))
    length = max(m * step for m in (1, 2, 5) if m * step <= exact)
    text = f"{length / 1000:g} mm" if length >= 1000 else f"{length:g} µm"
    x, y = low[0] + 0.04 * width, high[1] - 0.03 * float((high - low)[1])
    thick = 0.012 * width
    axes.add_patch(Rectangle((x, y - thick), length / mpp, thick, facecolor="black", edgecolor="white", linewidth=0.4))
    axes.annotate(text, (x + length / mpp / 2, y - thick), (0, 2), textcoords="offset points", ha="center", fontsize=6)


def _save(figure: Figure, out: Path) -> Path:
    out = Path(out)
    if out.suffix not in (".png", ".pdf", ".svg"):
        raise InputError(f"{out}: a figure is saved as .png, .pdf or .svg")
    FigureCanvasAgg(figure)
    # A PDF or SVG would else carry the time it was made.
    metadata = {".pdf": {"CreationDate": None}, ".svg": {"Date": None}}.get(out.suffix)
    with atomic(out) as temporary:
        figure.savefig(temporary, dpi=_DPI, metadata=metadata)
    return out
