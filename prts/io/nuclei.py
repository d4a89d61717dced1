"""Nuclei: polygons in full-resolution pixels, one per row, from prts or from other segmentation tools."""

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
from prts.io.nuclei_formats import NUCLEI_FORMATS, ImageSize, read_table, reader_of
from prts.io.nuclei_parts import one_each, without_regions

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

logger = logging.getLogger(__name__)

NUCLEI_COLUMNS = ("cell_id", "geometry", "area_um2", "score")
# Only if the file that was read has classes; categorical.
CLASSIFICATION = "classification"
# A median area below this is too small: a section through a lymphocyte has about 25 um2.
_SMALL_UM2 = 8.0


def make_nuclei(
    geometry: ArrayLike,
    mpp: float,
    *,
    cell_id: ArrayLike | None = None,
    score: ArrayLike | None = None,
    classification: ArrayLike | None = None,
    source: str = "nuclei",
) -> gpd.GeoDataFrame:
    """Make nuclei from shapes of any kind, repairing or dropping invalid ones; counts are logged in one line.

    Invalid shapes are repaired, and the largest part of a shape with several parts is kept. Dropped are missing and empty shapes, shapes
    without area or with coordinates that are not finite, and exact duplicates.

    Parameters
    ----------
    geometry
        (n,) shapely geometries or None, in full-resolution pixels.
    mpp
        um per full-resolution pixel.
    cell_id
        (n,) keys, converted to str; row numbers of `geometry` by default. The second of two different polygons with the key `a`
        gets `a-2`, with a warning.
    score
        (n,) confidences; NaN by default.
    classification
        (n,) names of classes, None for nuclei without one.
    source
        Name for log lines and errors.

    Returns
    -------
    Columns `cell_id` (str, unique), `geometry` (valid Polygon, full-resolution px), `area_um2`, `score`, and `classification`
    (categorical) if given; possibly without rows.
    """
    shapes = np.array(geometry, dtype=object, ndmin=1).ravel()
    n = len(shapes)
    ids = np.arange(n).astype(str).astype(object) if cell_id is None else as_str(cell_id)
    scores = np.full(n, np.nan) if score is None else np.asarray(score, dtype=float)

    shapes, log = _repair(shapes)
    kept = np.flatnonzero(~shapely.is_missing(shapes))
    frame = pd.DataFrame({"cell_id": ids[kept], "score": scores[kept], "row": kept})
    frame["wkb"] = shapely.to_wkb(shapely.normalize(shapes[kept]))
    n_before = len(frame)
    frame = frame.drop_duplicates(["cell_id", "wkb"])
    frame = frame.drop_duplicates("wkb")
    frame["cell_id"] = _unique(frame["cell_id"].to_numpy(object), source)
    log["exact duplicates dropped"] = n_before - len(frame)

    rows = frame["row"].to_numpy()
    polygons = shapes[rows]
    said = "".join(f", {count:,} {what}" for what, count in log.items() if count)
    logger.info("%s: %s nuclei of %s shapes%s", source, f"{len(frame):,}", f"{n:,}", said)
    nuclei = _frame(frame["cell_id"].to_numpy(object), polygons, mpp, frame["score"].to_numpy(float))
    if classification is not None:
        nuclei[CLASSIFICATION] = pd.Categorical(np.asarray(classification, dtype=object)[rows])
    return nuclei


def read_nuclei(path: Path, *, mpp: float, width: int, height: int, max_pixels: int | None = None) -> gpd.GeoDataFrame:
    """Read nuclei from another segmentation tool; the format is detected from the content, not from the name.

    Formats: GeoJSON of QuPath (the nucleus of each cell) or Space Ranger 4 (`nucleus_segmentations.geojson`), also gzipped; the JSON of
    HoVer-Net and CellViT; GeoParquet; shapefile; CSV or TSV with a WKT column; TIFF or PNG label image of the whole image, at its
    resolution or another one. Ids are taken from a property or column `cell_id`, else `EntityID`, `id`, the feature id of QuPath, `cell`,
    `object id`, `instance_id`, `label_id` (in any spelling), or the index of a table, else they are row numbers; labels are their own
    ids. Multipolygons that hold many nuclei are taken apart, and regions larger than any nucleus are left out.

    Parameters
    ----------
    path
        The file; coordinates are in full-resolution pixels of the image.
    mpp
        um per full-resolution pixel.
    width, height
        Size of the image, px.
    max_pixels
        Limit on the size of label images; see `prts.io.limits`.

    Returns
    -------
    As `make_nuclei`; at least one nucleus, and all centroids inside the image.

    Raises
    ------
    InputError
        If the file has none of these formats, contains no nuclei, has ids for only some nuclei, or if more than half of the centroids
        are outside the image (another unit, another image).
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path}: no such file; give {NUCLEI_FORMATS}")
    shapes = reader_of(path)(path, ImageSize(height, width, max_pixels))
    shapes = without_regions(one_each(shapes, str(path), mpp), str(path), mpp)
    nuclei = make_nuclei(
        shapes.geometry,
        mpp,
        cell_id=shapes.chosen_ids(path),
        score=shapes.score,
        classification=shapes.classification,
        source=str(path),
    )
    if not len(nuclei):
        raise InputError(f"{path}: contains no nuclei; give polygons in full-resolution pixels of the image")
    return _inside_image(nuclei, path, mpp, width, height)


def write_nuclei(nuclei: gpd.GeoDataFrame, path: Path) -> None:
    """Write nuclei as GeoParquet, whole or not at all."""
    with atomic(Path(path)) as temporary:
        columns = [*NUCLEI_COLUMNS, *(name for name in (CLASSIFICATION,) if name in nuclei)]
        nuclei.loc[:, columns].to_parquet(temporary, index=False)


def load_nuclei(path: Path) -> gpd.GeoDataFrame:
    """Read nuclei written by `write_nuclei`.

    Raises
    ------
    InputError
        If the file is missing or was not written by `write_nuclei`.
    """
    if not Path(path).is_file():
        raise InputError(f"{path}: no such file; give nuclei written by prts")
    frame = read_table(gpd.read_parquet, Path(path))
    if [name for name in frame.columns if name != CLASSIFICATION] != list(NUCLEI_COLUMNS):
        raise InputError(
            f"{path}: has the columns {list(frame.columns)}, not {list(NUCLEI_COLUMNS)}; give nuclei written by prts"
        )
    kinds = [pd.api.types.is_float_dtype(frame[name]) for name in ("area_um2", "score")]
    polygons = shapely.get_type_id(frame.geometry.to_numpy()) == shapely.GeometryType.POLYGON
    if not all(kinds) or not polygons.all() or not frame["cell_id"].is_unique:
        raise InputError(
            f"{path}: does not contain unique ids, polygons, areas and scores; give nuclei written by prts"
        )
    return frame


def _frame(cell_id: NDArray[Any], polygons: NDArray[Any], mpp: float, score: NDArray[np.float64]) -> gpd.GeoDataFrame:
    area = shapely.area(polygons).astype(float) * mpp**2
    columns = {"cell_id": pd.Series(cell_id, dtype=object), "geometry": polygons, "area_um2": area, "score": score}
    return gpd.GeoDataFrame(columns, geometry="geometry", crs=None)


def _unique(ids: NDArray[Any], source: str) -> NDArray[Any]:
    """Ids with a suffix for all but the first nucleus that has one, such as the nuclei of one cell."""
    number = pd.Series(ids).groupby(ids).cumcount().to_numpy() + 1
    repeated = np.flatnonzero(number > 1)
    if not len(repeated):
        return ids
    taken, unique = set(ids), ids.copy()
    for row in repeated:
        i = int(number[row])
        while (name := f"{ids[row]}-{i}") in taken:
            i += 1
        taken.add(name)
        unique[row] = name
    logger.warning(
        "%s: %s nuclei share their id with another one and get a suffix, such as %r",
        source,
        f"{len(repeated):,}",
        unique[repeated[0]],
    )
    return unique


def as_str(ids: ArrayLike) -> NDArray[Any]:
    """Ids as str; integers stored as floats lose their `.0`."""
    values = pd.Series(np.asarray(ids)).infer_objects()
    if pd.api.types.is_float_dtype(values) and (values % 1 == 0).all():
        values = values.astype(np.int64)
    return values.astype(str).to_numpy(object)


def _repair(shapes: NDArray[Any]) -> tuple[NDArray[Any], dict[str, int]]:
    """Valid polygons (None if nothing is left) and counts of what was repaired or dropped."""
    shapes = shapely.force_2d(shapes)
    n_missing = int((shapely.is_missing(shapes) | shapely.is_empty(shapes)).sum())
    xy, owner = shapely.get_coordinates(shapes, return_index=True)
    not_finite = np.unique(owner[~np.isfinite(xy).all(axis=1)])
    shapes[not_finite] = None
    invalid = ~shapely.is_valid(shapes) & ~shapely.is_missing(shapes)
    shapes[invalid] = shapely.make_valid(shapes[invalid])

    # Collections are nested: a repaired ring may be a collection of a multipolygon and a line.
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
        "with several parts reduced to the largest": int((n_parts > 1).sum()),
        "with coordinates that are not finite dropped": len(not_finite),
        "missing or empty dropped": n_missing,
        "without area dropped": int((n_parts == 0).sum()) - len(not_finite) - n_missing,
    }


def _inside_image(nuclei: gpd.GeoDataFrame, path: Path, mpp: float, width: int, height: int) -> gpd.GeoDataFrame:
    """Nuclei whose centroid is inside the image; raises an error if that drops more than half of them."""
    xy = shapely.get_coordinates(shapely.centroid(nuclei.geometry.to_numpy()))

    def inside(points: NDArray[np.float64]) -> NDArray[np.bool_]:
        return np.asarray(((points >= 0) & (points < [width, height])).all(axis=1))

    good = inside(xy)
    if 2 * good.sum() < len(good):
        low, high = xy.min(axis=0), xy.max(axis=0)
        unit = ""
        if 2 * inside(xy / mpp).sum() >= len(good):
            unit = f"; divided by {mpp:g} um/px they fit, so they seem to be in um"
        elif 2 * inside(xy[:, ::-1]).sum() >= len(good):
            unit = "; with x and y swapped they fit"
        raise InputError(
            f"{path}: {int((~good).sum()):,} of {len(good):,} nuclei are outside the image of {width} x {height} px "
            f"(their centroids span x {low[0]:.0f} to {high[0]:.0f}, y {low[1]:.0f} to {high[1]:.0f}); "
            f"give full-resolution pixels of this image{unit}"
        )
    if not good.all():
        logger.info("%s: %s nuclei outside the image dropped", path, f"{int((~good).sum()):,}")
        nuclei = nuclei[good].reset_index(drop=True)
    typical = float(nuclei["area_um2"].median())
    if typical < _SMALL_UM2 and 2 * inside(xy / mpp).sum() >= len(good):
        # For mpp < 1, coordinates in um are smaller than in px and always fit; only the size reveals them.
        logger.warning(
            "%s: the median nucleus has an area of only %.2g um2; coordinates must be in px, not in um",
            path,
            typical,
        )
    return nuclei
