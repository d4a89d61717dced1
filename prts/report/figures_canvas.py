"""What every figure shares: type and line weights, colours, the map of a piece of tissue, and saving.

Figures are drawn on canvases of their own: no pyplot, no global state, no display.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import shapely
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import PolyCollection
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from numpy.typing import NDArray
from scipy.spatial import cKDTree

from prts.errors import InputError
from prts.io.cache import atomic

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.collections import Collection

    from prts.io.slide import Slide

# Viridis is read by colour-blind eyes and in grey; on a light ground its dark end, no expression, still shows the tissue.
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
# keeps text readable over tissue and nuclei
NOTE_GROUND: Any = {"boxstyle": "square,pad=0.15", "facecolor": "white", "edgecolor": "none", "alpha": 0.75}
_DPI = 300
_OUTLINE_PT = 2.0  # a nucleus smaller than this on paper is drawn as a point


@dataclass(frozen=True)
class Picture:
    """RGB pixels (height, width, 3) and the box of the section that they show: x0, y0, x1, y1 in its full-resolution pixels."""

    pixels: NDArray[np.uint8]
    box_px: tuple[float, float, float, float]


@dataclass(frozen=True)
class Nuclei:
    """Where nuclei lie.

    Attributes
    ----------
    xy_px
        (n, 2) centres in full-resolution pixels, x right, y down.
    mpp
        um a full-resolution pixel.
    outlines
        (n,) polygons in full-resolution pixels, or None: nuclei are then points at any zoom.
    """

    xy_px: NDArray[np.float64]
    mpp: float
    outlines: NDArray[Any] | None = None


class Window:
    """The box of a section that a panel shows, in full-resolution pixels."""

    def __init__(self, x0: float, y0: float, x1: float, y1: float) -> None:
        self.low, self.high = np.array([x0, y0], dtype=float), np.array([x1, y1], dtype=float)
        self.width, self.height = (self.high - self.low).tolist()

    @classmethod
    def around(cls, xy_px: NDArray[np.float64]) -> Window:
        """All nuclei with a margin."""
        low, high = xy_px.min(axis=0), xy_px.max(axis=0)
        margin = 0.03 * float((high - low).max()) + 1
        return cls(*(low - margin), *(high + margin))

    def holds(self, xy_px: NDArray[np.float64], margin_px: float = 0.0) -> NDArray[np.bool_]:
        """Which points lie inside, or up to `margin_px` outside."""
        return np.asarray(((xy_px >= self.low - margin_px) & (xy_px <= self.high + margin_px)).all(axis=1))

    def show(self, axes: Axes, *, framed: bool) -> None:
        """Let the axes show this box, y down; a thin frame says where nuclei are cut off."""
        x, y = (self.low[0], self.high[0]), (self.high[1], self.low[1])
        axes.set(xlim=x, ylim=y, aspect="equal", xticks=[], yticks=[])
        axes.spines[:].set(visible=framed, linewidth=0.4, color=GREY)


def read_picture(slide: Slide, window: Window | None = None, side_px: int = 1400) -> Picture:
    """What the slide shows in a window, or all of it, with at most about `side_px` pixels a side.

    Parameters
    ----------
    slide
        The image.
    window
        In its full-resolution pixels; may reach over its edge.
    side_px
        1,400 px are 300 dpi on a panel twice as wide as those of `PANEL_IN`.
    """
    if window is None:
        return Picture(slide.thumbnail(side_px), (0, 0, slide.width, slide.height))
    step = max(1.0, max(window.width, window.height) / side_px)
    x0, y0 = np.floor(window.low / step).astype(int).tolist()
    x1, y1 = np.ceil(window.high / step).astype(int).tolist()
    pixels = slide.read_region(x0, y0, x1 - x0, y1 - y0, slide.mpp * step)
    return Picture(pixels, (x0 * step, y0 * step, x1 * step, y1 * step))


def draw_picture(axes: Axes, picture: Picture) -> None:
    """The picture at its place in the section."""
    x0, y0, x1, y1 = picture.box_px
    axes.imshow(picture.pixels, extent=(x0, x1, y1, y0), interpolation="antialiased")


def draw_nuclei(axes: Axes, nuclei: Nuclei, values: NDArray[Any], window: Window, top: float) -> Collection:
    """Nuclei of a window coloured from 0 to `top`: outlines where they are large enough to be seen, else rasterised points."""
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
    """A diameter that lets nuclei in clumps be told apart and the map still be seen from afar.

    It is the geometric mean of two: the distance at which nearest neighbours touch, and that at which evenly spread ones would.
    """
    if len(xy) < 2:
        return 10.0
    distance, _ = cKDTree(xy).query(xy, k=2)
    return float(np.sqrt(np.median(distance[:, 1]) * np.sqrt(area / len(xy))))


def draw_scale_bar(axes: Axes, window: Window, mpp: float) -> None:
    """A bar of a round length, about a fifth of the panel, bottom left."""
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


def save(figure: Figure, out: Path | Sequence[Path]) -> None:
    """Save a figure by the suffix of each path: .png (300 dpi), .pdf or .svg.

    Raises
    ------
    InputError
        If a suffix is none of these.
    """
    paths = [Path(path) for path in ([out] if isinstance(out, Path) else out)]
    for path in paths:
        if path.suffix not in (".png", ".pdf", ".svg"):
            raise InputError(f"{path}: a figure is saved as .png, .pdf or .svg")
    FigureCanvasAgg(figure)
    logging.getLogger("fontTools").setLevel(logging.WARNING)  # it tells of every table of every font in a PDF
    for path in paths:
        # a PDF or SVG would else carry the time it was made
        metadata = {".pdf": {"CreationDate": None}, ".svg": {"Date": None}}.get(path.suffix)
        with atomic(path) as temporary:
            figure.savefig(temporary, dpi=_DPI, metadata=metadata)
        figure.set_layout_engine("none")  # solved for the first format; it would cost the others as much again
