"""Readers of nuclei in the formats of other segmentation tools, detected from the content."""

from __future__ import annotations

import gzip
import io
import logging
import re
import zlib
from typing import TYPE_CHECKING, Any, NamedTuple

import geopandas as gpd
import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import shapely
from numpy.typing import NDArray

from prts.errors import InputError
from prts.io.geojson import encoding_of, read_text
from prts.io.nuclei_geojson import shapes_of_geojson
from prts.io.nuclei_parts import ID_NAMES, Shapes, id_name
from prts.io.outlines import labels_to_polygons

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

logger = logging.getLogger(__name__)

NUCLEI_FORMATS = "GeoJSON (also .gz), GeoParquet (or Parquet with WKB), shapefile, CSV/TSV with a WKT column, or a TIFF/PNG label image"
# Labels may be at most this much coarser or finer than the image: masks of 2 um per pixel, of images of 0.25.
_MAX_FACTOR = 8.0


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
        packed = head.startswith(b"\x1f\x8b")
        if packed:
            with gzip.open(path) as handle:
                head = handle.read(4096)
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"{path}: cannot be read ({error}); give {NUCLEI_FORMATS}") from error
    reader = _reader_by(head, path)
    if packed and reader not in (_from_geojson, _from_wkt_table):
        raise InputError(f"{path}: is gzipped, which only GeoJSON and tables may be; unpack it with gunzip")
    return reader


def _reader_by(head: bytes, path: Path) -> Callable[[Path, ImageSize], Shapes]:
    if head.startswith(b"PAR1"):
        return _from_geoparquet
    if head.startswith(b"\x00\x00\x27\x0a"):
        return _from_shapefile
    if head[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+") or head.startswith(b"\x89PNG"):
        return _from_label_image
    if head.startswith((b"\x93NUMPY", b"PK\x03\x04")):
        raise InputError(f"{path}: a NumPy file or an archive; save its labels with tifffile.imwrite, or give polygons")
    text = head.decode(encoding_of(head), "ignore")
    if text.lstrip(" \t\r\n\x1e")[:1] in ("{", "["):
        return _from_geojson
    if text and "\0" not in text:
        return _from_wkt_table
    raise InputError(f"{path}: unknown format of nuclei; give {NUCLEI_FORMATS}")


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


def _columns(frame: pd.DataFrame) -> tuple[Any, Any, Any]:
    """Ids, scores and classes of a table."""
    index = frame.index
    columns: dict[Any, Any] = {name: index.get_level_values(i) for i, name in enumerate(index.names)}
    columns |= {name: frame[name] for name in frame.columns}
    candidates = {known: column for name, column in columns.items() if (known := id_name(str(name)))}
    ids = {name: candidates[name].to_numpy(object) for name in ID_NAMES if name in candidates}
    if not isinstance(index, pd.MultiIndex | pd.RangeIndex) and (
        pd.api.types.is_string_dtype(index) or index.is_unique
    ):
        ids["index"] = index.to_numpy(object)  # as SpatialData writes shapes
    score = pd.to_numeric(frame["score"], errors="coerce") if "score" in frame else None
    named = next((frame[name] for name in ("classification", "class") if name in frame), pd.Series(dtype=object))
    text = named.map(lambda value: value if isinstance(value, str) and value else None).astype(object)
    return ids, score, text.to_numpy(object) if text.notna().any() else None


def _from_geojson(path: Path, _size: ImageSize) -> Shapes:
    return shapes_of_geojson(path)


def _from_geoparquet(path: Path, _size: ImageSize) -> Shapes:
    frame = read_table(_read_parquet, path)
    shapes = frame.geometry.to_numpy()
    if "radius" in frame and (shapely.get_type_id(shapes) == shapely.GeometryType.POINT).all():  # SpatialData's circles
        shapes = shapely.buffer(shapes, pd.to_numeric(frame["radius"], errors="coerce").fillna(0).to_numpy(float))
    return Shapes(shapes, *_columns(frame))


def _read_parquet(path: Path) -> gpd.GeoDataFrame | pd.DataFrame:
    """GeoParquet, or a table with a column of WKB, such as `Geometry` of MERSCOPE's cell_boundaries.parquet."""
    if b"geo" in (pq.read_schema(path).metadata or {}):
        return gpd.read_parquet(path)
    table = pd.read_parquet(path)
    for name in table.columns:
        if len(filled := table[name].dropna()) and isinstance(filled.iloc[0], bytes):
            shapes = shapely.from_wkb(table[name].to_numpy(object), on_invalid="ignore")
            return gpd.GeoDataFrame(table.drop(columns=name), geometry=shapes)
    return table


def _from_shapefile(path: Path, _size: ImageSize) -> Shapes:
    with path.open("rb") as handle:
        handle.seek(24)
        n_bytes = 2 * int.from_bytes(handle.read(4), "big")  # the header counts words
    if n_bytes != path.stat().st_size:  # GDAL would silently read the part that is there
        raise InputError(
            f"{path}: truncated, {path.stat().st_size} bytes instead of {n_bytes} as stated in its header; get a complete copy"
        )
    frame = read_table(gpd.read_file, path)
    return Shapes(frame.geometry.to_numpy(), *_columns(frame))


def _from_wkt_table(path: Path, _size: ImageSize) -> Shapes:
    text = read_text(path)
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
            return Shapes(np.asarray(shapes, dtype=object), *_columns(_with_index(table)))
    raise InputError(
        f"{path}: no column with WKT polygons among {', '.join(map(str, table.columns[:8]))}; give {NUCLEI_FORMATS}"
    )


def _with_index(table: pd.DataFrame) -> pd.DataFrame:
    """A table whose first column, if it has no name, is the index that pandas and R write, unless it only counts rows."""
    first = table.columns[0]
    if first != "Unnamed: 0" or table[first].tolist() in (
        [str(i + start) for i in range(len(table))] for start in (0, 1)
    ):
        return table
    return table.set_index(first)


def _from_label_image(path: Path, size: ImageSize) -> Shapes:
    labels = _read_labels(path, size)
    # Sparse labels (such as hashes) would make tables as long as the largest label.
    names: NDArray[Any] | None = None
    if int(labels.max(initial=0)) > max(labels.size, 1 << 24):
        names, inverse = np.unique(np.append(labels.ravel(), 0), return_inverse=True)
        labels = inverse[:-1].reshape(labels.shape)
    label, polygons, n_parts = labels_to_polygons(labels)
    if labels.shape != size[:2]:
        polygons = _enlarged(polygons, labels.shape, size, path)
    if n_parts:
        logger.info("%s: %d smaller parts of labels dropped", path, n_parts)
    if len(label) == 1 and n_parts > 1:
        raise InputError(f"{path}: a mask, one label in {n_parts + 1} parts; give one label per nucleus")
    return Shapes(polygons, {"label": label if names is None else names[label]})


def _enlarged(polygons: NDArray[Any], shape: tuple[int, ...], size: ImageSize, path: Path) -> NDArray[Any]:
    """Outlines in the pixels of the image, from those of labels at another resolution."""
    factor = np.array([size.width / shape[1], size.height / shape[0]])
    logger.warning(
        "%s: %d x %d px for an image of %d x %d px; taken for the same area at another resolution, and scaled by %.4g",
        *(path, shape[1], shape[0], size.width, size.height, factor.mean()),
    )
    return np.asarray(shapely.transform(polygons, lambda xy: xy * factor))


def _is_rescaled(width: int, height: int, size: ImageSize) -> bool:
    """Whether an image of this size may be the other one at another resolution, with its size rounded either way."""
    low = max(size.width / (width + 1), size.height / (height + 1))
    high = min(size.width / max(width - 1, 0.5), size.height / max(height - 1, 0.5))
    return low < high and low < _MAX_FACTOR and high > 1 / _MAX_FACTOR


def _read_labels(path: Path, size: ImageSize) -> NDArray[Any]:
    """Pixels of a label image, decoded only if its header states the right kind and size."""
    import tifffile

    from prts.io.limits import check_pixels
    from prts.io.slide_readers import open_pillow

    def check(width: int, height: int, what: str, dtype: np.dtype[Any]) -> None:
        check_pixels((width, height), what, size.max_pixels, cure="give polygons", n_bytes=dtype.itemsize)

    def require(shape: tuple[int, ...], dtype: np.dtype[Any], low: int = 0) -> None:
        if len(shape) != 2 or dtype.kind not in "iuf" or low < 0:
            what = f"its smallest value is {low}" if low < 0 else f"shape {shape}, type {dtype}"
            raise InputError(f"not a label image ({what}); give one channel of whole numbers, 0 outside nuclei")
        if shape != size[:2] and not _is_rescaled(shape[1], shape[0], size):
            raise InputError(
                f"a label image of {shape[1]} x {shape[0]} px for an image of {size.width} x {size.height} px; give one of the same area"
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
        if labels.dtype.kind == "f":
            labels = _whole(labels)
        require(labels.shape, labels.dtype, labels.min(initial=0))
        return labels
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    except Exception as error:  # decoders raise many classes of errors
        raise InputError(f"{path}: the image cannot be read ({error}); get a complete copy") from error


def _whole(labels: NDArray[Any]) -> NDArray[Any]:
    """Labels that ImageJ stored as floating point numbers."""
    # beyond 2^24, float32 cannot tell consecutive labels apart
    top = 2.0 ** min(np.finfo(labels.dtype).nmant + 1, 53)
    if not (np.isfinite(labels).all() and (np.trunc(labels) == labels).all() and labels.max(initial=0) <= top):
        raise InputError(
            f"not a label image (type {labels.dtype}, with fractions, NaN or values above {top:.0f}); give one channel of whole "
            "numbers, 0 outside nuclei"
        )
    return labels.astype(np.int64)
