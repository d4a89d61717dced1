"""Readers of nuclei in the formats of other segmentation tools, detected from the content."""

from __future__ import annotations

import gzip
import io
import json
import logging
import re
import zlib
from itertools import chain
from typing import TYPE_CHECKING, Any, NamedTuple

import geopandas as gpd
import numpy as np
import pandas as pd
import shapely
from numpy.typing import NDArray

from prts.errors import InputError
from prts.io.outlines import labels_to_polygons

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

logger = logging.getLogger(__name__)

NUCLEI_FORMATS = "GeoJSON (also .gz), GeoParquet, shapefile, CSV/TSV with a WKT column, or a TIFF/PNG label image"
# Object types of QuPath that are regions, not nuclei.
_QUPATH_REGIONS = ("annotation", "tile", "root", "tma core")

# Geometries (n,), ids (n,) or None, scores (n,) or None, as in the file.
Shapes = tuple[NDArray[Any], Any, Any]


class ImageSize(NamedTuple):
    """Size (px) of the image that nuclei belong to, and the limit on label images."""

    height: int
    width: int
    max_pixels: int | None = None


def reader_of(path: Path) -> Callable[[Path, ImageSize], Shapes]:
    """Choose the reader of a file by its first bytes; it takes the path and the size of the image."""
    try:
        with path.open("rb") as handle:
            head = handle.read(4096)
        if head.startswith(b"\x1f\x8b"):
            with gzip.open(path) as handle:
                head = handle.read(4096)
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"{path}: cannot be read ({error}); give {NUCLEI_FORMATS}") from error
    if head.startswith(b"PAR1"):
        return _from_geoparquet
    if head.startswith(b"\x00\x00\x27\x0a"):
        return _from_shapefile
    if head[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+") or head.startswith(b"\x89PNG"):
        return _from_label_image
    if head.lstrip(b"\xef\xbb\xbf \t\r\n")[:1] in (b"{", b"["):
        return _from_geojson
    if head and b"\0" not in head:
        return _from_wkt_table
    raise InputError(f"{path}: unknown format of nuclei; give {NUCLEI_FORMATS}")


def _text(path: Path) -> str:
    try:
        data = path.read_bytes()
        return (gzip.decompress(data) if data.startswith(b"\x1f\x8b") else data).decode("utf-8-sig")
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read as text ({error}); give {NUCLEI_FORMATS}") from error


def _choose_id(candidates: dict[str, pd.Series], path: Path) -> Any:
    """The first kind of id that any nucleus has; then all nuclei must have it."""
    for name, values in candidates.items():
        if (
            values.dtype == object
            and not values.map(lambda value: value is None or isinstance(value, str | int | float)).all()
        ):
            raise InputError(f"{path}: {name} contains values other than text and numbers; give valid ids")
        absent = values.isna() | (values.astype(str) == "")
        if absent.all():
            continue
        if absent.any():
            raise InputError(
                f"{path}: {int(absent.sum())} of {len(values)} nuclei have no {name}; give it to all nuclei or to none"
            )
        return values.to_numpy(object)
    return None


def _from_geojson(path: Path, _size: ImageSize) -> Shapes:
    try:
        document = json.loads(_text(path))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: looks like GeoJSON but cannot be parsed ({error}); export it again") from error
    features = document.get("features", [document]) if isinstance(document, dict) else document
    if not isinstance(features, list) or not all(_is_feature(item) for item in features):
        raise InputError(f"{path}: JSON, but not GeoJSON; give a FeatureCollection or a list of features")
    properties = [feature.get("properties") or {} for feature in features]
    if not all(isinstance(item, dict) for item in properties):
        raise InputError(f"{path}: not GeoJSON: the properties of a feature must be an object; export it again")
    pairs = list(zip(features, properties, strict=True))
    kinds = np.array([str(feature.get("objectType") or item.get("objectType")).lower() for feature, item in pairs])
    region = np.isin(kinds, _QUPATH_REGIONS)
    if region.any() and not region.all():
        logger.info("%s: %d QuPath annotations that are not nuclei ignored", path, region.sum())
        pairs = [pair for pair, left_out in zip(pairs, region, strict=True) if not left_out]
    features, properties = [feature for feature, _ in pairs], [item for _, item in pairs]

    geometry = _geojson_shapes([feature.get("nucleusGeometry") or feature.get("geometry") for feature in features])
    ids = {
        name: pd.Series([item.get(key) for item in source], dtype=object)
        for name, source, key in (
            ("cell_id", properties, "cell_id"),
            ("id", properties, "id"),
            ("feature id", features, "id"),
        )
    }
    score = pd.to_numeric(pd.Series([item.get("score") for item in properties], dtype=object), errors="coerce")
    return geometry, _choose_id(ids, path), score


def _is_feature(item: Any) -> bool:
    return isinstance(item, dict) and item.get("type") == "Feature"


def _geojson_shapes(geometries: list[Any]) -> NDArray[Any]:
    """Shapes from GeoJSON geometries; None for invalid ones."""
    shapes = np.full(len(geometries), None, dtype=object)
    is_polygon = np.array([isinstance(item, dict) and item.get("type") == "Polygon" for item in geometries], dtype=bool)
    try:
        shapes[is_polygon] = _plain_polygons([geometries[index]["coordinates"] for index in np.flatnonzero(is_polygon)])
        rest = np.flatnonzero(~is_polygon)
    except (ValueError, TypeError, KeyError, OverflowError, shapely.errors.ShapelyError):
        rest = np.arange(len(geometries))  # one of them is irregular: an open ring, a missing number
    for index in rest:
        try:
            with np.errstate(invalid="ignore"):
                shapes[index] = shapely.geometry.shape(geometries[index])
        except (ValueError, TypeError, LookupError, AttributeError, OverflowError, shapely.errors.ShapelyError):
            shapes[index] = None
    return shapes


def _plain_polygons(coordinates: list[list[list[list[float]]]]) -> NDArray[Any]:
    """Polygons from GeoJSON coordinates, all at once; ValueError or TypeError if any of them violates the standard."""
    rings = list(chain.from_iterable(coordinates))
    points = np.array(list(chain.from_iterable(rings)), dtype=float)
    if not len(points):
        raise ValueError("no coordinates")
    n_rings = np.fromiter(map(len, coordinates), np.int64, len(coordinates))
    n_points = np.fromiter(map(len, rings), np.int64, len(rings))
    ring = np.r_[0, np.cumsum(n_points)]
    if not (n_rings > 0).all() or not (n_points > 3).all() or not (points[ring[:-1]] == points[ring[1:] - 1]).all():
        raise ValueError("an empty polygon, a short or an open ring, or a coordinate that is not a number")
    offsets = (ring, np.r_[0, np.cumsum(n_rings)])
    return np.asarray(shapely.from_ragged_array(shapely.GeometryType.POLYGON, points[:, :2].copy(), offsets))


def read_table(reader: Callable[..., Any], path: Path) -> Any:
    """Read a GeoDataFrame with a reader of geopandas, turning its many kinds of errors into one.

    Raises
    ------
    InputError
        If the file cannot be read or has no geometry.
    """
    try:
        frame = reader(path)
    except Exception as error:  # arrow and GDAL raise many classes of errors
        raise InputError(f"{path}: cannot be read ({error}); give {NUCLEI_FORMATS}") from error
    if not isinstance(frame, gpd.GeoDataFrame):
        raise InputError(f"{path}: has no geometry; give {NUCLEI_FORMATS}")
    return frame


def _columns(frame: pd.DataFrame, path: Path) -> tuple[Any, Any]:
    """Ids and scores of a table."""
    ids = _choose_id({name: frame[name] for name in ("cell_id", "id") if name in frame}, path)
    return ids, pd.to_numeric(frame["score"], errors="coerce") if "score" in frame else None


def _from_geoparquet(path: Path, _size: ImageSize) -> Shapes:
    frame = read_table(gpd.read_parquet, path)
    return (frame.geometry.to_numpy(), *_columns(frame, path))


def _from_shapefile(path: Path, _size: ImageSize) -> Shapes:
    with path.open("rb") as handle:
        handle.seek(24)
        n_bytes = 2 * int.from_bytes(handle.read(4), "big")  # the header counts words
    if n_bytes != path.stat().st_size:  # GDAL would silently read the part that is there
        raise InputError(
            f"{path}: truncated, {path.stat().st_size} bytes instead of {n_bytes} as stated in its header; get a complete copy"
        )
    frame = read_table(gpd.read_file, path)
    return (frame.geometry.to_numpy(), *_columns(frame, path))


def _from_wkt_table(path: Path, _size: ImageSize) -> Shapes:
    text = _text(path)
    header = text.split("\n", 1)[0]
    separator = max("\t;,", key=header.count)
    try:
        table = pd.read_csv(io.StringIO(text), sep=separator, dtype=str, keep_default_na=False, na_values=[""])
    except ValueError as error:
        raise InputError(f"{path}: cannot be read as a table ({error}); give {NUCLEI_FORMATS}") from error
    for name in table.columns:
        filled = table[name].dropna()
        if len(filled) and re.match(r"\s*(SRID=\d+;)?\s*(MULTI)?POLYGON", filled.iloc[0], re.IGNORECASE):
            wkt = table[name].fillna("").str.replace(r"^\s*SRID=\d+;", "", regex=True)
            shapes = shapely.from_wkt(wkt.to_numpy(object), on_invalid="ignore")
            return (np.asarray(shapes, dtype=object), *_columns(table, path))
    raise InputError(
        f"{path}: no column with WKT polygons among {', '.join(map(str, table.columns[:8]))}; give {NUCLEI_FORMATS}"
    )


def _from_label_image(path: Path, size: ImageSize) -> Shapes:
    labels = _read_labels(path, size)
    # Sparse labels (such as hashes) would make tables as long as the largest label.
    names: NDArray[Any] | None = None
    if int(labels.max(initial=0)) > max(labels.size, 1 << 24):
        names, inverse = np.unique(np.append(labels.ravel(), 0), return_inverse=True)
        labels = inverse[:-1].reshape(labels.shape)
    label, polygons, n_parts = labels_to_polygons(labels)
    if n_parts:
        logger.info("%s: %d smaller parts of labels dropped", path, n_parts)
    if len(label) == 1 and n_parts > 1:
        raise InputError(f"{path}: a mask, one label in {n_parts + 1} parts; give one label per nucleus")
    return polygons, label if names is None else names[label], None


def _read_labels(path: Path, size: ImageSize) -> NDArray[Any]:
    """Pixels of a label image, decoded only if its header states the right kind and size."""
    import tifffile

    from prts.io.limits import check_pixels
    from prts.io.slide_readers import open_pillow

    def check(width: int, height: int, what: str, dtype: np.dtype[Any]) -> None:
        check_pixels((width, height), what, size.max_pixels, cure="give polygons", n_bytes=dtype.itemsize)

    def require(shape: tuple[int, ...], dtype: np.dtype[Any], low: int = 0) -> None:
        if len(shape) != 2 or not np.issubdtype(dtype, np.integer) or low < 0:
            raise InputError(
                f"not a label image (shape {shape}, type {dtype}); give one channel of whole numbers, 0 outside nuclei"
            )
        if shape != size[:2]:
            raise InputError(
                f"a label image of {shape[1]} x {shape[0]} px for an image of {size.width} x {size.height} px; give one of the same size"
            )
        check(shape[1], shape[0], "a label image", dtype)

    try:
        with path.open("rb") as handle:
            is_png = handle.read(4) == b"\x89PNG"
        if is_png:
            with open_pillow(path) as image:
                require((image.height, image.width), np.dtype(np.int32))
                labels = np.asarray(image)
        else:
            with tifffile.TiffFile(path, _multifile=False) as tif:
                if not tif.series:
                    raise InputError("contains no image; give a label image")
                series = tif.series[0]
                require(tuple(n for n in series.shape if n != 1), series.dtype)
                height, width = series.keyframe.tilelength, series.keyframe.tilewidth
                check(width, height, "a tile of a label image", series.dtype)
                labels = np.squeeze(series.asarray())
        require(labels.shape, labels.dtype, labels.min(initial=0))
        return labels
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    except Exception as error:  # decoders raise many classes of errors
        raise InputError(f"{path}: the image cannot be read ({error}); get a complete copy") from error
