"""GeoJSON as segmentation tools write it: also gzipped, with a byte order mark, as a bare list, or as a GeometryCollection."""

from __future__ import annotations

import gzip
import json
import zlib
from typing import TYPE_CHECKING, Any

from prts.errors import InputError

if TYPE_CHECKING:
    from pathlib import Path

_GEOMETRIES = ("Polygon", "MultiPolygon", "GeometryCollection", "Point", "MultiPoint", "LineString", "MultiLineString")


def read_text(path: Path) -> str:
    """Text of a UTF-8 file, gzipped or not, without its byte order mark.

    Raises
    ------
    InputError
        If it cannot be read, or is not text.
    """
    try:
        data = path.read_bytes()
        return (gzip.decompress(data) if data.startswith(b"\x1f\x8b") else data).decode("utf-8-sig")
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read as text ({error}); get a complete copy") from error


def read_features(path: Path) -> list[dict[str, Any]]:
    """Features of a GeoJSON file, each with a mapping as its `properties`.

    A bare geometry is a feature without properties; a geometry collection of the whole file is one feature per geometry.

    Raises
    ------
    InputError
        If the file is not GeoJSON.
    """
    try:
        document = json.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: looks like GeoJSON but cannot be parsed ({error}); export it again") from error
    items = document if isinstance(document, list) else [document]
    if isinstance(document, dict):
        items = document.get("features" if "features" in document else "geometries", items)
    features = [_feature(item) for item in items] if isinstance(items, list) else [None]
    known = [feature for feature in features if feature is not None]
    if len(known) < len(features):
        raise InputError(f"{path}: JSON, but not GeoJSON; give a FeatureCollection or a list of features")
    if not all(isinstance(feature["properties"], dict) for feature in known):
        raise InputError(f"{path}: not GeoJSON: the properties of a feature must be an object; export it again")
    return known


def _feature(item: Any) -> dict[str, Any] | None:
    if not isinstance(item, dict):
        return None
    if item.get("type") == "Feature":
        return {**item, "properties": item.get("properties") or {}}
    if item.get("type") in _GEOMETRIES:
        other = {key: value for key, value in item.items() if key not in ("type", "coordinates", "geometries")}
        return {"type": "Feature", "geometry": item, "properties": other}
    return None
