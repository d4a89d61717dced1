"""Shared parts of all figures: style, colors, color bars and legends, tissue maps, and saving.

Figures are drawn without pyplot: no global state, no display.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import shapely
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import PolyCollection
from matplotlib.figure import Figure, SubFigure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from numpy.typing import NDArray
from scipy.spatial import cKDTree

from prts.errors import InputError
from prts.io.cache import atomic

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.collections import Collection

    from prts.io.slide import Slide

# Viridis works for color-blind readers and in grayscale; on a light background its dark end, no expression, still shows the tissue.
SEQUENTIAL = "viridis"
BLUE, ORANGE, GREY = "#0072b2", "#d55e00", "#999999"  # Okabe and Ito 2008
STYLE: Any = {
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
    "svg.hashsalt": "prts",
}
PANEL_IN = 2.2
# keeps text readable on top of tissue and nuclei
NOTE_GROUND: Any = {"boxstyle": "square,pad=0.15", "facecolor": "white", "edgecolor": "none", "alpha": 0.75}
_DPI = 300
_OUTLINE_PT = 2.0  # nuclei smaller than this on paper are drawn as points


@dataclass(frozen=True)
class Picture:
    """RGB pixels (height, width, 3), and the box of the section they show: x0, y0, x1, y1 in full-resolution pixels."""

    pixels: NDArray[np.uint8]
    box_px: tuple[float, float, float, float]


@dataclass(frozen=True)
class NucleusPositions:
    """Positions of nuclei, as drawn on a map.

    Attributes
    ----------
    xy_px
        Centers in full-resolution pixels, x right, y down, (n_nuclei, 2).
    mpp
        um per full-resolution pixel.
    outlines
        Polygons in full-resolution pixels, (n_nuclei,); None draws points at any zoom.
    """

    xy_px: NDArray[np.float64]
    mpp: float
    outlines: NDArray[Any] | None = None


class Window:
    """The part of a section that a panel shows, in full-resolution pixels."""

    def __init__(self, x0: float, y0: float, x1: float, y1: float) -> None:
        self.low, self.high = np.array([x0, y0], dtype=float), np.array([x1, y1], dtype=float)
        self.width, self.height = (self.high - self.low).tolist()

    @classmethod
    def around(cls, xy_px: NDArray[np.float64]) -> Window:
        """The window around all nuclei, with a margin."""
        low, high = xy_px.min(axis=0), xy_px.max(axis=0)
        margin = 0.03 * float((high - low).max()) + 1
        return cls(*(low - margin), *(high + margin))

    def holds(self, xy_px: NDArray[np.float64], margin_px: float = 0.0) -> NDArray[np.bool_]:
        """Whether each point is inside the window, or at most `margin_px` outside."""
        return np.asarray(((xy_px >= self.low - margin_px) & (xy_px <= self.high + margin_px)).all(axis=1))

    def show(self, axes: Axes, *, framed: bool) -> None:
        """Set the axes to this window, y down; a thin frame shows that nuclei are cut off."""
        x, y = (self.low[0], self.high[0]), (self.high[1], self.low[1])
        axes.set(xlim=x, ylim=y, aspect="equal", xticks=[], yticks=[])
        axes.spines[:].set(visible=framed, linewidth=0.4, color=GREY)


def read_picture(slide: Slide, window: Window | None = None, side_px: int = 1400) -> Picture:
    """Read a window of a slide, or all of it, with at most about `side_px` pixels per side.

    Parameters
    ----------
    slide
        The image.
    window
        In full-resolution pixels; may extend beyond the image.
    side_px
        1,400 px are 300 dpi on a panel twice as wide as `PANEL_IN`.
    """
    if window is None:
        return Picture(slide.thumbnail(side_px), (0, 0, slide.width, slide.height))
    step = max(1.0, max(window.width, window.height) / side_px)
    x0, y0 = np.floor(window.low / step).astype(int).tolist()
    x1, y1 = np.ceil(window.high / step).astype(int).tolist()
    pixels = slide.read_region(x0, y0, x1 - x0, y1 - y0, slide.mpp * step)
    return Picture(pixels, (x0 * step, y0 * step, x1 * step, y1 * step))


def draw_picture(axes: Axes, picture: Picture) -> None:
    """Draw a picture at its position in the section."""
    x0, y0, x1, y1 = picture.box_px
    axes.imshow(picture.pixels, extent=(x0, x1, y1, y0), interpolation="antialiased")


def draw_nuclei(axes: Axes, nuclei: NucleusPositions, values: NDArray[Any], window: Window, top: float) -> Collection:
    """Draw nuclei with colors from 0 to `top`, as outlines if large enough to be seen, else as rasterized points."""
    diameter_pt = 0.0
    if nuclei.outlines is not None and len(nuclei.outlines):
        typical_px = 2 * np.sqrt(np.median(shapely.area(nuclei.outlines[:1000])) / np.pi)
        diameter_pt = 72 * PANEL_IN * typical_px / window.width
    colours: Any = {"cmap": SEQUENTIAL, "clim": (0, top)}
    if nuclei.outlines is not None and diameter_pt >= _OUTLINE_PT:
        inside = window.holds(nuclei.xy_px, margin_px=0.1 * window.width)
        rings = shapely.get_exterior_ring(nuclei.outlines[inside])
        xy, owner = shapely.get_coordinates(rings, return_index=True)
        vertices = np.split(xy, np.flatnonzero(np.diff(owner)) + 1)
        shown = PolyCollection(vertices, array=values[inside], linewidths=0.2, edgecolors="#404040", **colours)
        axes.add_collection(shown)
        return shown
    size = (PANEL_IN * 72 * _point_diameter(nuclei.xy_px, window.width * window.height) / window.width) ** 2
    return axes.scatter(
        nuclei.xy_px[:, 0],
        nuclei.xy_px[:, 1],
        c=values,
        s=size,
        cmap=SEQUENTIAL,
        vmin=0,
        vmax=top,
        linewidths=0,
        rasterized=True,
    )


def _point_diameter(xy: NDArray[np.float64], area: float) -> float:
    """Diameter that separates nuclei in dense regions but still fills the map.

    It is the geometric mean of two distances: those at which nearest neighbors touch, and at which evenly spaced nuclei would.
    """
    if len(xy) < 2:
        return 10.0
    distance, _ = cKDTree(xy).query(xy, k=2)
    return float(np.sqrt(np.median(distance[:, 1]) * np.sqrt(area / len(xy))))


def draw_scale_bar(axes: Axes, window: Window, mpp: float) -> None:
    """Draw a scale bar with a round length, about a fifth of the panel, at the bottom left."""
    exact = window.width * mpp / 5
    step = 10 ** np.floor(np.log10(exact))
    length = max(m * step for m in (1, 2, 5) if m * step <= exact)
    text = f"{length / 1000:g} mm" if length >= 1000 else f"{length:g} µm"
    x, y = window.low[0] + 0.05 * window.width, window.high[1] - 0.04 * window.height
    thick = 0.012 * window.width
    axes.add_patch(Rectangle((x, y - thick), length / mpp, thick, facecolor="black", edgecolor="white", linewidth=0.4))
    axes.annotate(
        text,
        (x + length / mpp / 2, y - thick),
        (0, 2),
        textcoords="offset points",
        ha="center",
        fontsize=6,
        bbox=NOTE_GROUND,
    )


def add_colorbar(
    figure: Figure | SubFigure,
    colours: Any,
    axes: Any,
    label: str,
    *,
    shrink: float = 0.8,
    aspect: float = 18,
    **options: Any,
) -> None:
    """Add a color bar with a thin outline."""
    bar = figure.colorbar(colours, ax=axes, shrink=shrink, aspect=aspect, label=label, **options)
    bar.outline.set_linewidth(0.4)


def legend_dot(size_pt: float, colour: str, label: str) -> Line2D:
    """Legend entry: a dot of a size and color."""
    return Line2D([], [], marker="o", linestyle="", markersize=size_pt, color=colour, label=label)


def add_size_legend(figure: Figure, areas: Mapping[str, float], title: str) -> None:
    """Add a legend for the size of dots, below the axes; areas are in pt^2, as for `Axes.scatter`, by label."""
    dots = [legend_dot(float(np.sqrt(area)), GREY, label) for label, area in areas.items()]
    figure.legend(
        handles=dots, loc="outside lower center", ncols=len(dots), frameon=False, title=title, title_fontsize=7
    )


def save(figure: Figure, out: Path | Sequence[Path]) -> None:
    """Save a figure in the format of each path's suffix: .png (300 dpi), .pdf or .svg.

    Raises
    ------
    InputError
        If a path has another suffix.
    """
    paths = [Path(path) for path in ([out] if isinstance(out, Path) else out)]
    for path in paths:
        if path.suffix not in (".png", ".pdf", ".svg"):
            raise InputError(f"{path}: cannot save a figure in this format; use .png, .pdf or .svg")
    FigureCanvasAgg(figure)
    logging.getLogger("fontTools").setLevel(logging.WARNING)  # it logs every table of every font in a PDF
    for path in paths:
        # without this, PDF and SVG contain the time of writing
        metadata = {".pdf": {"CreationDate": None}, ".svg": {"Date": None}}.get(path.suffix)
        with atomic(path) as temporary:
            figure.savefig(temporary, dpi=_DPI, metadata=metadata)
        figure.set_layout_engine("none")  # already laid out for the first format
