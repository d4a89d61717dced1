"""Maps of tissue: genes and quality control, of a whole section or a region; H&E, measured, predicted, and a second image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from numpy.typing import NDArray

from prts.errors import InputError
from prts.io.slide import Slide, image_size, open_slide
from prts.report.figures_canvas import (
    NOTE_GROUND,
    PANEL_IN,
    STYLE,
    Nuclei,
    Picture,
    Window,
    draw_nuclei,
    draw_picture,
    draw_scale_bar,
    read_picture,
    save,
)

_ASPECT = 0.02  # how far the shape of a second image may be from that of the first


@dataclass(frozen=True)
class MapRow:
    """One row of a figure of maps.

    Attributes
    ----------
    name
        At its left.
    unit
        Of the values, for the colour bar.
    predicted, measured
        (n,) values, of all nuclei of the section even where the figure shows a region; `measured` None where nothing was measured.
    note
        Written into the predicted map, such as its PCC.
    gene
        Whether the name is a gene's and so in italics.
    """

    name: str
    unit: str
    predicted: NDArray[Any]
    measured: NDArray[Any] | None = None
    note: str = ""
    gene: bool = True


def gene_rows(
    genes: Sequence[str],
    predicted: NDArray[Any],
    measured: NDArray[Any] | None = None,
    pcc: Sequence[float] | None = None,
    unit: str = "log1p(UMI)",
) -> list[MapRow]:
    """A row a gene.

    Parameters
    ----------
    genes
        Names.
    predicted, measured
        (n_nuclei, n_genes) on the scale to show.
    pcc
        Of each gene; NaN shows none.
    unit
        The scale.
    """
    notes = ["" if pcc is None or not np.isfinite(pcc[i]) else f"PCC {pcc[i]:.2f}" for i in range(len(genes))]
    return [
        MapRow(gene, unit, predicted[:, i], None if measured is None else measured[:, i], notes[i])
        for i, gene in enumerate(genes)
    ]


def tissue_maps(
    out: Path | Sequence[Path],
    rows: Sequence[MapRow],
    *,
    nuclei: Nuclei,
    picture: Picture,
    window: Window | None = None,
    second: tuple[str, Picture] | None = None,
) -> None:
    """Draw rows of views of one piece of tissue: H&E, measured (if any row was), predicted, and a second image if there is one.

    Measured and predicted have the same colours: from 0 to the 99th percentile of the measured nuclei of the whole section (of the
    predicted ones, where nothing was measured or all of that range is 0), as the colour bar says. Nuclei are outlines where the zoom
    lets them be seen, else rasterised points, so that a PDF or SVG of a whole section stays small.

    Parameters
    ----------
    out
        .png, .pdf or .svg; several for several formats.
    rows
        What to draw.
    nuclei
        Of the whole section.
    picture
        The H&E, at least of the window.
    window
        What to show; all nuclei where None.
    second
        Title and picture of another image of the same place.
    """
    region = window is not None
    window = window or Window.around(nuclei.xy_px)
    measured = any(row.measured is not None for row in rows)
    titles = ["H&E", *(["Measured"] if measured else []), "Predicted", *([second[0]] if second else [])]
    aspect = float(np.clip(window.height / window.width, 0.3, 2.5))
    with mpl.rc_context(STYLE):
        figure = Figure(
            figsize=(len(titles) * PANEL_IN + 0.9, len(rows) * PANEL_IN * aspect + 0.35),
            layout=ConstrainedLayoutEngine(compress=True, w_pad=0.02, h_pad=0.02, wspace=0.02, hspace=0.02),
        )
        panels = figure.subplots(len(rows), len(titles), squeeze=False)
        for row, axes_of_row in zip(rows, panels, strict=True):
            views = dict(zip(titles, axes_of_row, strict=True))
            draw_picture(views["H&E"], picture)
            if second is not None:
                draw_picture(axes_of_row[-1], second[1])
            top = _top(row)
            shown = draw_nuclei(views["Predicted"], nuclei, row.predicted, window, top)
            if row.measured is not None:
                draw_nuclei(views["Measured"], nuclei, row.measured, window, top)
            maps = [views[title] for title in ("Measured", "Predicted") if title in views]
            bar = figure.colorbar(
                shown, ax=axes_of_row[-1] if second else maps, shrink=0.8, aspect=18, extend="max", pad=0.01
            )
            bar.set_label(f"{row.unit},\n0 to 99th percentile")
            bar.outline.set_linewidth(0.4)
            views["H&E"].set_ylabel(row.name, fontstyle="italic" if row.gene else "normal", fontsize=9)
            if row.note:
                views["Predicted"].text(
                    *(0.02, 0.02), row.note, transform=views["Predicted"].transAxes, bbox=NOTE_GROUND, zorder=5
                )
            for axes in axes_of_row:
                window.show(axes, framed=region)
        for axes, title in zip(panels[0], titles, strict=True):
            axes.set_title(title)
        draw_scale_bar(panels[0][0], window, nuclei.mpp)
        save(figure, out)


def region_views(
    out: Path | Sequence[Path],
    rows: Sequence[MapRow],
    *,
    slide: Slide,
    nuclei: Nuclei,
    box_px: Sequence[float],
    second: tuple[str, Path] | None = None,
) -> None:
    """Views of a region, with the images read there at the resolution of the figure.

    Parameters
    ----------
    out
        .png, .pdf or .svg; several for several formats.
    rows
        What to draw; values of all nuclei of the section.
    slide
        The H&E.
    nuclei
        Of the whole section; with outlines, which a region has room for.
    box_px
        x0, y0, x1, y1 in full-resolution pixels of the slide.
    second
        Title and file of a second image registered to the slide: the same field of view, at any resolution.

    Raises
    ------
    InputError
        If the box has no area on the slide or no nucleus, or the second image has another field of view.
    """
    if len(box_px) != 4 or box_px[0] >= box_px[2] or box_px[1] >= box_px[3]:
        raise InputError(
            f"region={list(box_px)}: x0, y0, x1, y1 in full-resolution pixels, x0 < x1 and y0 < y1, are needed"
        )
    window = Window(*(float(edge) for edge in box_px))
    n_inside = int(window.holds(nuclei.xy_px).sum())
    if not n_inside:
        raise InputError(
            f"region={list(box_px)}: holds no nucleus; the image is {slide.width} x {slide.height} px, with nuclei from x "
            f"{nuclei.xy_px[:, 0].min():.0f} to {nuclei.xy_px[:, 0].max():.0f}, y {nuclei.xy_px[:, 1].min():.0f} to "
            f"{nuclei.xy_px[:, 1].max():.0f}"
        )
    beside = None
    if second is not None:
        beside = second[0], _registered_picture(second[1], slide, window)
    tissue_maps(out, rows, nuclei=nuclei, picture=read_picture(slide, window), window=window, second=beside)


def _registered_picture(path: Path, slide: Slide, window: Window) -> Picture:
    """The window of an image that shows the same field of view as the slide, at its own resolution."""
    width, height = image_size(path)
    factor = slide.width / width
    if abs(slide.height / height / factor - 1) > _ASPECT:
        raise InputError(
            f"{path}: is {width} x {height} px, which is no field of view of {slide.width} x {slide.height} px; an image registered to "
            f"{slide.path.name}, of the same field at any resolution, is needed"
        )
    with open_slide(path, mpp=slide.mpp * factor) as other:
        picture = read_picture(other, Window(*(window.low / factor), *(window.high / factor)))
    x0, y0, x1, y1 = (edge * factor for edge in picture.box_px)
    return Picture(picture.pixels, (x0, y0, x1, y1))


def _top(row: MapRow) -> float:
    """The end of a row's colours."""
    both = [values for values in (row.measured, row.predicted) if values is not None]
    for values in both:
        top = float(np.percentile(values, 99))
        if top > 0:
            return top
    return float(max(values.max() for values in both)) or 1.0
