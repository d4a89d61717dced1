"""A region of interest on a slide: a box, a polygon, or polygons from a GeoJSON file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import shapely
from numpy.typing import NDArray

from prts.errors import InputError, ParameterError
from prts.io.geojson import read_features
from prts.io.slide_bounds import region_on_slide

if TYPE_CHECKING:
    from geopandas import GeoDataFrame
    from shapely.geometry.base import BaseGeometry

    from prts.io.slide_bounds import Bounds


def read_region(text: str, width: int, height: int, bounds: Bounds | None = None) -> BaseGeometry:
    """Read a region of interest.

    Parameters
    ----------
    text
        `[x0,y0,x1,y1]` or the corners of a polygon, `[[x,y],[x,y],[x,y],...]`, in full-resolution pixels; or the path of a GeoJSON file
        with polygons in the same pixels (QuPath's annotations).
    width, height
        Size of the image in full-resolution pixels.
    bounds
        The part of the slide that was scanned, from whose corner QuPath counts pixels; None if it is all of it.

    Returns
    -------
    A polygon or multipolygon.

    Raises
    ------
    ParameterError
        If it is none of these, empty, or outside the image.
    """
    text = str(text).strip()
    drawn = text.startswith("[") and not _is_file(Path(text))
    region = _drawn(text) if drawn else region_on_slide(_polygons(Path(text)), bounds, text)
    if region.area == 0 or region.intersection(shapely.box(0, 0, width, height)).area == 0:
        extent = "empty" if region.is_empty else ", ".join(f"{value:g}" for value in region.bounds)
        raise _error(
            text,
            f"does not overlap the image ({extent} of {width} x {height} px); give full-resolution pixels, x before y",
        )
    return region


def inside(region: BaseGeometry, nuclei: GeoDataFrame) -> NDArray[np.bool_]:
    """Whether the centroid of each nucleus is inside the region, (n,)."""
    xy = shapely.get_coordinates(shapely.centroid(nuclei.geometry.to_numpy()))
    shapely.prepare(region)
    within: NDArray[np.bool_] = shapely.contains_xy(region, xy)
    return within


def _error(region: object, problem: str) -> ParameterError:
    return ParameterError("", "roi", f"{region} {problem}")


def _drawn(text: str) -> BaseGeometry:
    """A box or polygon from its corners."""
    try:
        numbers = np.array(json.loads(text), dtype=np.float64)
    except (ValueError, TypeError):
        numbers = np.empty(0)
    is_box, is_polygon = numbers.shape == (4,), numbers.ndim == 2 and numbers.shape[1] == 2 and len(numbers) >= 3
    if not (is_box or is_polygon) or not np.isfinite(numbers).all():
        raise _error(
            text,
            "is not a region; give a box of four numbers in pixels, [x0,y0,x1,y1], a polygon of at least three corners, "
            "[[x,y],[x,y],[x,y]], or a GeoJSON file",
        )
    if is_polygon:
        return shapely.make_valid(shapely.Polygon(numbers))
    x0, y0, x1, y1 = numbers.tolist()
    if not (x0 < x1 and y0 < y1):
        raise _error(text, "is not a box; give x0 < x1 and y0 < y1 in pixels")
    return shapely.box(x0, y0, x1, y1)


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # the corners of a polygon are too long for a file name
        return False


def _polygons(path: Path) -> BaseGeometry:
    if not _is_file(path):
        raise _error(
            path,
            "does not exist; give a GeoJSON file with polygons, a box [x0,y0,x1,y1] or a polygon [[x,y],[x,y],[x,y]]",
        )
    try:
        features = list(read_features(path))
        found = shapely.from_geojson([json.dumps(feature.get("geometry")) for feature in features])
    except (InputError, TypeError, shapely.errors.ShapelyError) as error:
        reason = str(error).removeprefix(f"{path}: ").splitlines()[0]
        raise _error(path, f"is not GeoJSON ({reason}); draw polygons in QuPath and export them") from error
    parts = shapely.get_parts(shapely.get_parts(found))
    areas = parts[np.isin(shapely.get_type_id(parts), (3, 6))]
    if len(areas) == 0:
        raise _error(path, "contains no polygon; draw the region as an area, not as points or lines")
    return shapely.union_all(shapely.make_valid(areas))
