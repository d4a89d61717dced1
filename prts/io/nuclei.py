"""Nuclei: polygons in full-resolution pixels, one row each, read from whatever a segmentation tool writes."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import geopandas as gpd
import numpy as np
import pandas as pd
import shapely

from prts.errors import InputError
from prts.io.cache import atomic
from prts.io.nuclei_formats import FORMATS, read_table, reader_of

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

logger = logging.getLogger(__name__)

COLUMNS = ("cell_id", "geometry", "area_um2", "score")
# Below this a typical nucleus is too small to be one: a lymphocyte's section has about 25 um2.
_SMALL_UM2 = 8.0


def make_nuclei(
    geometry: ArrayLike,
    mpp: float,
    *,
    cell_id: ArrayLike | None = None,
    score: ArrayLike | None = None,
    source: str = "nuclei",
) -> gpd.GeoDataFrame:
    """Nuclei from shapes of any kind: repaired, or dropped where nothing is left, with the counts logged in one line.

    Invalid shapes are made valid; of a shape of several parts the largest is kept. Dropped: shapes that are missing,
    empty, without area or with coordinates that are not finite, and all but the first of shapes that are exactly equal.

    Parameters
    ----------
    geometry
        (n,) shapely geometries or None, in full-resolution pixels.
    mpp
        um per full-resolution pixel.
    cell_id
        (n,) keys, made str; row numbers of `geometry` if not given.
    score
        (n,) confidences; NaN if not given.
    source
        What the log line and errors name.

    Returns
    -------
    Columns `cell_id` (str, unique), `geometry` (valid Polygon, full-resolution px), `area_um2`, `score`; maybe no rows.

    Raises
    ------
    InputError
        If one id stands for two different polygons.
    """
    shapes = np.array(geometry, dtype=object, ndmin=1).ravel()
    n = len(shapes)
    ids = np.arange(n).astype(str).astype(object) if cell_id is None else _as_str(cell_id)
    scores = np.full(n, np.nan) if score is None else np.asarray(score, dtype=float)

    shapes, log = _repair(shapes)
    kept = np.flatnonzero(~shapely.is_missing(shapes))
    frame = pd.DataFrame({"cell_id": ids[kept], "score": scores[kept], "row": kept})
    frame["wkb"] = shapely.to_wkb(shapely.normalize(shapes[kept]))
    n_before = len(frame)
    frame = frame.drop_duplicates(["cell_id", "wkb"])
    twice = frame["cell_id"].duplicated()
    if twice.any():
        raise InputError(
            f"{source}: the id {frame['cell_id'][twice].iloc[0]!r} stands for different polygons "
            f"({int(twice.sum())} such rows): give every nucleus an id of its own"
        )
    frame = frame.drop_duplicates("wkb")
    log["exact duplicates dropped"] = n_before - len(frame)

    polygons = shapes[frame["row"].to_numpy()]
    said = "".join(f", {count:,} {what}" for what, count in log.items() if count)
    logger.info("%s: %s nuclei of %s shapes%s", source, f"{len(frame):,}", f"{n:,}", said)
    return _frame(frame["cell_id"].to_numpy(object), polygons, mpp, frame["score"].to_numpy(float))


def read_nuclei(path: Path, *, mpp: float, width: int, height: int) -> gpd.GeoDataFrame:
    """Read nuclei that another tool segmented; the format is told from the content, not from the name.

    GeoJSON of QuPath (of a cell, its nucleus) or of Space Ranger 4 (`nucleus_segmentations.geojson`), also gzipped;
    GeoParquet; shapefile; CSV or TSV with a WKT column; TIFF or PNG label image of the size of the section's image. An id
    is taken from a property or column `cell_id`, else `id`, else from QuPath's feature id, else it is the row number; a
    label is its own id.

    Parameters
    ----------
    path
        The file; coordinates in full-resolution pixels of the section's image.
    mpp
        um per full-resolution pixel.
    width, height
        Size of the section's image, px.

    Returns
    -------
    As `make_nuclei`, at least one row, all centroids inside the image.

    Raises
    ------
    InputError
        If the file is none of these, holds no nucleus, has an id for two polygons or for some nuclei only, or more than
        half of its centroids lie outside the image (another unit, another image).
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path}: no such file; nuclei are read from {FORMATS}")
    geometry, cell_id, score = reader_of(path)(path, (height, width))
    nuclei = make_nuclei(geometry, mpp, cell_id=cell_id, score=score, source=str(path))
    if not len(nuclei):
        raise InputError(
            f"{path}: holds no nucleus with an outline; expected polygons in pixels of the section's image"
        )
    return _inside_image(nuclei, path, mpp, width, height)


def write_nuclei(nuclei: gpd.GeoDataFrame, path: Path) -> None:
    """Write nuclei as GeoParquet, whole or not at all."""
    with atomic(Path(path)) as temporary:
        nuclei.loc[:, list(COLUMNS)].to_parquet(temporary, index=False)


def load_nuclei(path: Path) -> gpd.GeoDataFrame:
    """Read what `write_nuclei` wrote, as it was written.

    Raises
    ------
    InputError
        If the file is missing or not such a file.
    """
    if not Path(path).is_file():
        raise InputError(f"{path}: no such file; expected nuclei written by prts")
    frame = read_table(gpd.read_parquet, Path(path))
    if list(frame.columns) != list(COLUMNS):
        raise InputError(f"{path}: has the columns {list(frame.columns)}, not {list(COLUMNS)} as prts writes them")
    kinds = [pd.api.types.is_float_dtype(frame[name]) for name in ("area_um2", "score")]
    polygons = shapely.get_type_id(frame.geometry.to_numpy()) == shapely.GeometryType.POLYGON
    if not all(kinds) or not polygons.all() or not frame["cell_id"].is_unique:
        raise InputError(f"{path}: does not hold unique ids, polygons, areas and scores, as prts writes nuclei")
    return frame


def _frame(cell_id: NDArray[Any], polygons: NDArray[Any], mpp: float, score: NDArray[np.float64]) -> gpd.GeoDataFrame:
    area = shapely.area(polygons).astype(float) * mpp**2
    columns = {"cell_id": pd.Series(cell_id, dtype=object), "geometry": polygons, "area_um2": area, "score": score}
    return gpd.GeoDataFrame(columns, geometry="geometry", crs=None)


def _as_str(ids: ArrayLike) -> NDArray[Any]:
    """Ids as str; whole numbers that a table holds as floats lose their `.0`."""
    values = pd.Series(np.asarray(ids)).infer_objects()
    if pd.api.types.is_float_dtype(values) and (values % 1 == 0).all():
        values = values.astype(np.int64)
    return values.astype(str).to_numpy(object)


def _repair(shapes: NDArray[Any]) -> tuple[NDArray[Any], dict[str, int]]:
    """Valid polygons, None where nothing with area is left, and what was done how often."""
    shapes = shapely.force_2d(shapes)
    n_missing = int((shapely.is_missing(shapes) | shapely.is_empty(shapes)).sum())
    xy, owner = shapely.get_coordinates(shapes, return_index=True)
    not_finite = np.unique(owner[~np.isfinite(xy).all(axis=1)])
    shapes[not_finite] = None
    invalid = ~shapely.is_valid(shapes) & ~shapely.is_missing(shapes)
    shapes[invalid] = shapely.make_valid(shapes[invalid])

    # Collections nest: a repaired ring may be a collection of a multipolygon and a line.
    parts, owner = shapely.get_parts(shapes, return_index=True)
    parts, inner = shapely.get_parts(parts, return_index=True)
    owner = owner[inner]
    area = shapely.area(parts)
    parts, owner, area = parts[area > 0], owner[area > 0], area[area > 0]
    largest = np.lexsort((-area, owner))
    largest = largest[np.r_[True, owner[largest][1:] != owner[largest][:-1]]] if len(largest) else largest
    polygons = np.full(len(shapes), None, dtype=object)
    polygons[owner[largest]] = parts[largest]
    n_parts = np.bincount(owner, minlength=len(shapes))
    return polygons, {
        "invalid repaired": int((invalid & (n_parts > 0)).sum()),
        "of several parts reduced to the largest": int((n_parts > 1).sum()),
        "with coordinates that are not finite dropped": len(not_finite),
        "missing or empty dropped": n_missing,
        "without area dropped": int((n_parts == 0).sum()) - len(not_finite) - n_missing,
    }


def _inside_image(nuclei: gpd.GeoDataFrame, path: Path, mpp: float, width: int, height: int) -> gpd.GeoDataFrame:
    """Only nuclei whose centroid lies in the image; an error if that leaves out more than half of them."""
    xy = shapely.get_coordinates(shapely.centroid(nuclei.geometry.to_numpy()))

    def inside(points: NDArray[np.float64]) -> NDArray[np.bool_]:
        return np.asarray(((points >= 0) & (points < [width, height])).all(axis=1))

    good = inside(xy)
    if 2 * good.sum() < len(good):
        low, high = xy.min(axis=0), xy.max(axis=0)
        unit = ""
        if 2 * inside(xy / mpp).sum() >= len(good):
            unit = f"; divided by {mpp:g} um/px they fit, so they look like um instead of px"
        elif 2 * inside(xy[:, ::-1]).sum() >= len(good):
            unit = "; with x and y exchanged they fit"
        raise InputError(
            f"{path}: {int((~good).sum()):,} of {len(good):,} nuclei lie outside the image of {width} x {height} px "
            f"(their centroids span x {low[0]:.0f} to {high[0]:.0f}, y {low[1]:.0f} to {high[1]:.0f}); "
            f"expected full-resolution pixels of this image{unit}"
        )
    if not good.all():
        logger.info("%s: %s nuclei outside the image dropped", path, f"{int((~good).sum()):,}")
        nuclei = nuclei[good].reset_index(drop=True)
    typical = float(nuclei["area_um2"].median())
    if typical < _SMALL_UM2 and 2 * inside(xy / mpp).sum() >= len(good):
        # Coordinates in um are smaller than in px for mpp < 1, so they always fit and only the size gives them away.
        logger.warning(
            "%s: the median nucleus has %.2g um2, too small for a nucleus: are the coordinates in um, not px?",
            path,
            typical,
        )
    return nuclei
