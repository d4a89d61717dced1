"""A region of interest on a slide: a box, or polygons from a GeoJSON file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import shapely
from numpy.typing import NDArray

from prts.errors import InputError

if TYPE_CHECKING:
    from geopandas import GeoDataFrame
    from shapely.geometry.base import BaseGeometry


def read_region(text: str, width: int, height: int) -> BaseGeometry:
    """The region that `roi=` names.

    Parameters
    ----------
    text
        `[x0,y0,x1,y1]` in full-resolution pixels, or the path of a GeoJSON file with polygons in the same pixels (QuPath's annotations).
    width, height
        Size of the image in full-resolution pixels.

    Returns
    -------
    A polygon or several.

    Raises
    ------
    InputError
        If it is neither, empty, or does not touch the image.
    """
    text = str(text).strip()
    region = _box(text) if text.startswith("[") else _polygons(Path(text))
    if region.area == 0 or region.intersection(shapely.box(0, 0, width, height)).area == 0:
        bounds = "empty" if region.is_empty else ", ".join(f"{value:g}" for value in region.bounds)
        raise InputError(
            f"roi={text}: covers nothing of the image ({bounds} of {width} x {height} px); give full-resolution pixels, x before y"
        )
    return region


def inside(region: BaseGeometry, nuclei: GeoDataFrame) -> NDArray[np.bool_]:
    """Nuclei whose centroid lies in the region, (n,)."""
    xy = shapely.get_coordinates(shapely.centroid(nuclei.geometry.to_numpy()))
    shapely.prepare(region)
    within: NDArray[np.bool_] = shapely.contains_xy(region, xy)
    return within


def _box(text: str) -> BaseGeometry:
    try:
        x0, y0, x1, y1 = (float(value) for value in json.loads(text))
    except (ValueError, TypeError):
        raise InputError(f"roi={text}: is no box; four numbers in pixels are needed, roi=[x0,y0,x1,y1]") from None
    if not (np.isfinite([x0, y0, x1, y1]).all() and x0 < x1 and y0 < y1):
        raise InputError(f"roi={text}: is no box; x0 < x1 and y0 < y1 are needed, in pixels")
    return shapely.box(x0, y0, x1, y1)


def _polygons(path: Path) -> BaseGeometry:
    if not path.is_file():
        raise InputError(f"roi={path}: no such file; a GeoJSON file with polygons is needed, or a box [x0,y0,x1,y1]")
    try:
        found = shapely.from_geojson(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, shapely.errors.ShapelyError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"roi={path}: is no GeoJSON ({reason}); draw polygons in QuPath and export them") from error
    parts = shapely.get_parts(shapely.get_parts(found))
    areas = parts[np.isin(shapely.get_type_id(parts), (3, 6))]
    if len(areas) == 0:
        raise InputError(f"roi={path}: holds no polygon; draw the region as an area, not as points or lines")
    return shapely.union_all(shapely.make_valid(areas))
