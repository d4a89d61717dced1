"""Slides of which a part was scanned (MRXS, SCN, BIF): OpenSlide counts pixels from the corner of the slide, QuPath from that of the part.

Polygons do not say which of the two they count from, so the image decides: nuclei are dark.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import shapely
from numpy.typing import NDArray

from prts.io.optical_density import OPTICAL_DENSITY, without_black

if TYPE_CHECKING:
    from collections.abc import Mapping

    from geopandas import GeoDataFrame
    from shapely.geometry.base import BaseGeometry

    from prts.io.slide import Slide

logger = logging.getLogger(__name__)

_SAMPLE = 200
# Of the patch that is compared, about the size of a small nucleus.
_MPP, _PX = 1.0, 4
# How much darker nuclei must be at one place than at the other to tell them apart.
_CLEARLY = 1.15


class Bounds(NamedTuple):
    """The part of a slide that was scanned, in full-resolution pixels from the corner of the slide."""

    x: int
    y: int
    width: int
    height: int

    @classmethod
    def of(cls, properties: Mapping[str, str]) -> Bounds | None:
        """The part that OpenSlide names; None if it is the whole slide, or not known."""
        try:
            found = cls(*(int(properties[f"openslide.bounds-{name}"]) for name in ("x", "y", "width", "height")))
        except (KeyError, ValueError):
            return None
        return found if (found.x, found.y) != (0, 0) and min(found[2:]) > 0 else None


def nuclei_on_slide(nuclei: GeoDataFrame, slide: Slide, source: object) -> GeoDataFrame:
    """Nuclei in pixels from the corner of the slide, also if they are counted from the corner of the part that was scanned.

    Parameters
    ----------
    nuclei
        Nuclei in pixels of the image file, (n,).
    slide
        The slide.
    source
        Their file, for messages.
    """
    bounds = slide.bounds
    if bounds is None or not len(nuclei):
        return nuclei
    rows = np.unique(np.linspace(0, len(nuclei) - 1, _SAMPLE).astype(int))
    xy = shapely.get_coordinates(shapely.centroid(nuclei.geometry.to_numpy()[rows]))
    on_slide, on_part = _darkness(slide, xy), _darkness(slide, xy + bounds[:2])
    moved = on_part > on_slide
    dark, pale = max(on_slide, on_part), min(on_slide, on_part)
    said = "of the part of the slide that was scanned, as in QuPath" if moved else "of the whole slide"
    logger.log(
        logging.INFO if dark > _CLEARLY * pale else logging.WARNING,
        "%s: pixels are counted from the corner %s%s",
        source,
        said,
        "" if dark > _CLEARLY * pale else f", or so it seems; that of the part is at x={bounds.x}, y={bounds.y}",
    )
    return nuclei.assign(geometry=_moved(nuclei.geometry.to_numpy(), bounds.x, bounds.y)) if moved else nuclei


def region_on_slide(region: BaseGeometry, bounds: Bounds | None, source: object) -> BaseGeometry:
    """A region from a file, in pixels from the corner of the slide; one that fits both is taken for QuPath's.

    Parameters
    ----------
    region
        The region.
    bounds
        The part of the slide that was scanned, if it is not all of it.
    source
        The file, for messages.
    """
    if bounds is None:
        return region
    part = shapely.box(0, 0, bounds.width, bounds.height)
    on_slide, on_part = (region.intersection(box).area for box in (_moved(part, bounds.x, bounds.y), part))
    if on_slide > on_part or not on_part:
        return region
    fits_both = on_slide > 0.5 * on_part
    logger.log(
        logging.WARNING if fits_both else logging.INFO,
        "%s: pixels are counted from the corner of the part of the slide that was scanned, x=%d, y=%d, as in QuPath%s",
        *(
            source,
            bounds.x,
            bounds.y,
            "; to count from that of the slide, give the corners of the region" if fits_both else "",
        ),
    )
    return _moved(region, bounds.x, bounds.y)


def to_part(outlines: NDArray[Any], bounds: Bounds) -> NDArray[Any]:
    """Outlines (n,) in pixels from the corner of the part that was scanned, for QuPath."""
    return np.asarray(_moved(outlines, -bounds.x, -bounds.y))


def _moved(shapes: Any, x: float, y: float) -> Any:
    return shapely.transform(shapes, lambda xy: xy + np.array([x, y], dtype=float))


def _darkness(slide: Slide, xy: NDArray[np.float64]) -> float:
    """Mean optical density around points (n, 2) of the image file."""
    places = slide.orientation.places(xy, slide.file_size) * (slide.mpp / _MPP) - _PX / 2
    patches = [slide.read_region(round(x), round(y), _PX, _PX, _MPP) for x, y in places.tolist()]
    return float(OPTICAL_DENSITY[np.array([without_black(patch) for patch in patches])].mean())
