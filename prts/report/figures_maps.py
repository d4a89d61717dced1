"""Tissue maps of genes and quality control, for a section or a region: H&E, measured, predicted, and a second image."""

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

from prts.errors import InputError, ParameterError
from prts.io.slide import Slide, image_size, open_slide
from prts.report.figures_canvas import (
    NOTE_GROUND,
    PANEL_IN,
    STYLE,
    NucleusPositions,
    Picture,
    Window,
    add_colorbar,
    draw_nuclei,
    draw_picture,
    draw_scale_bar,
    read_picture,
    save,
)

_ASPECT = 0.02  # relative tolerance for the aspect ratio of a second image


@dataclass(frozen=True)
class MapRow:
    """One row of maps.

    Attributes
    ----------
    name
        Label on the left.
    unit
        Unit of the values, for the color bar.
    predicted, measured
        Values of all nuclei of the section, even if the figure shows a region, (n_nuclei,); `measured` may be None.
    note
        Text on the predicted map, such as the PCC.
    gene
        Whether the name is a gene, which is set in italics.
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
    """Make one row per gene.

    Parameters
    ----------
    genes
        Names.
    predicted, measured
        Values to show, (n_nuclei, n_genes).
    pcc
        PCC of each gene; NaN is not shown.
    unit
        Unit of the values.
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
    nuclei: NucleusPositions,
    picture: Picture,
    window: Window | None = None,
    second: tuple[str, Picture] | None = None,
) -> None:
    """Draw H&E, measured, predicted and, optionally, a second image of the same tissue, in one row per gene.

    Measured and predicted share one color scale, from 0 to the 99th percentile of the measured nuclei of the whole section (of the
    predicted nuclei if nothing was measured or that percentile is 0). Nuclei are outlines if large enough to be seen, else rasterized
    points, which keeps a PDF or SVG of a whole section small.

    Parameters
    ----------
    out
        One or more paths with the suffix .png, .pdf or .svg.
    rows
        What to draw.
    nuclei
        Nuclei of the whole section.
    picture
        The H&E image, which covers at least the window.
    window
        The part to show; None shows all nuclei.
    second
        Title and picture of another image of the same tissue.
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
            bar_next_to = axes_of_row[-1] if second else maps
            add_colorbar(figure, shown, bar_next_to, f"{row.unit}\n(0 to 99th percentile)", extend="max", pad=0.01)
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
    nuclei: NucleusPositions,
    box_px: Sequence[float],
    second: tuple[str, Path] | None = None,
) -> None:
    """Draw maps of a region, reading the images at the resolution of the figure.

    Parameters
    ----------
    out
        One or more paths with the suffix .png, .pdf or .svg.
    rows
        What to draw; values of all nuclei of the section.
    slide
        The H&E image.
    nuclei
        Nuclei of the whole section, with outlines.
    box_px
        x0, y0, x1, y1 in full-resolution pixels of the slide.
    second
        Title and file of a second image registered to the slide: the same field of view at any resolution.

    Raises
    ------
    InputError
        If the box is empty or contains no nuclei, or the second image has another field of view.
    """
    if len(box_px) != 4 or box_px[0] >= box_px[2] or box_px[1] >= box_px[3]:
        raise ParameterError(
            "", "region", f"{list(box_px)} must be x0, y0, x1, y1 in full-resolution pixels, with x0 < x1 and y0 < y1"
        )
    window = Window(*(float(edge) for edge in box_px))
    n_inside = int(window.holds(nuclei.xy_px).sum())
    if not n_inside:
        (x0, y0), (x1, y1) = nuclei.xy_px.min(axis=0), nuclei.xy_px.max(axis=0)
        raise ParameterError(
            "",
            "region",
            f"{list(box_px)} contains no nuclei; the image is {slide.width} x {slide.height} px, with nuclei at x {x0:.0f} to {x1:.0f} and "
            f"y {y0:.0f} to {y1:.0f}",
        )
    other = None if second is None else (second[0], _registered_picture(second[1], slide, window))
    tissue_maps(out, rows, nuclei=nuclei, picture=read_picture(slide, window), window=window, second=other)


def _registered_picture(path: Path, slide: Slide, window: Window) -> Picture:
    """The window of an image that shows the same field of view as the slide, at its own resolution."""
    width, height = image_size(path)
    factor = slide.width / width
    if abs(slide.height / height / factor - 1) > _ASPECT:
        raise InputError(
            f"{path}: is {width} x {height} px, which does not have the aspect ratio of {slide.path.name} ({slide.width} x {slide.height} "
            "px); give an image that is registered to it, with the same field of view at any resolution"
        )
    with open_slide(path, mpp=slide.mpp * factor) as other:
        picture = read_picture(other, Window(*(window.low / factor), *(window.high / factor)))
    x0, y0, x1, y1 = (edge * factor for edge in picture.box_px)
    return Picture(picture.pixels, (x0, y0, x1, y1))


def _top(row: MapRow) -> float:
    """Upper end of the color scale of a row."""
    both = [values for values in (row.measured, row.predicted) if values is not None]
    for values in both:
        top = float(np.percentile(values, 99))
        if top > 0:
            return top
    return float(max(values.max() for values in both)) or 1.0
