"""Nuclei in GeoJSON, read in batches: a section of half a million cells has a file of a gigabyte."""

from __future__ import annotations

import logging
import re
import sys
from itertools import chain, islice
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import shapely
from numpy.typing import NDArray

from prts.io.geojson import read_features
from prts.io.nuclei_parts import Shapes, choose_id

if TYPE_CHECKING:
    from pathlib import Path

logger = logging.getLogger(__name__)

_AT_ONCE = 1000
# Object types of QuPath that are regions, not nuclei; annotations are nuclei if nothing else is there.
_NEVER_NUCLEI = ("tile", "root", "tmacore")
_QUPATH_REGIONS = ("annotation", *_NEVER_NUCLEI)
# Types that some versions and converters write in place of an id.
_TYPE_WORDS = r"Path\w*Object|TMACoreObject|tmaCore|PathRoot\w*"


def shapes_of_geojson(path: Path) -> Shapes:
    """Shapes of a GeoJSON file, the nucleus of each cell of QuPath; annotations among detections are left out.

    Raises
    ------
    InputError
        If the file is not GeoJSON, or has ids for only some nuclei.
    """
    features = read_features(path)
    parts: list[NDArray[Any]] = []
    columns: dict[str, list[Any]] = {
        key: [] for key in ("kind", "cell_id", "id", "feature id", "cell", "score", "class")
    }
    while batch := list(islice(features, _AT_ONCE)):
        parts.append(_polygons([feature.get("nucleusGeometry") or feature.get("geometry") for feature in batch]))
        for feature in batch:
            about = feature["properties"]
            columns["kind"].append(_kind(feature))
            for key, source, name in (
                ("cell_id", about, "cell_id"),
                ("id", about, "id"),
                ("feature id", feature, "id"),
                ("cell", about, "cell"),
            ):
                columns[key].append(_id(source, name))
            columns["score"].append(about.get("score"))
            columns["class"].append(_class(about))
    geometry = np.concatenate(parts) if parts else np.empty(0, dtype=object)
    table = {key: pd.Series(values, dtype=object) for key, values in columns.items()}

    kinds = table.pop("kind")
    never, drawn = kinds.isin(_NEVER_NUCLEI), kinds == "annotation"
    region = never if (drawn | never).all() else drawn | never  # or nuclei that somebody drew
    if region.any() and not region.all():
        logger.info("%s: %d QuPath annotations that are not nuclei left out", path, region.sum())
        geometry = geometry[~region]
        table = {key: values[~region].reset_index(drop=True) for key, values in table.items()}
    score = pd.to_numeric(table.pop("score"), errors="coerce")
    named = table.pop("class")
    return Shapes(geometry, choose_id(table, path), score, named.to_numpy(object) if named.notna().any() else None)


def _word(text: Any) -> str:
    return re.sub(r"[^a-z]|^path|object$", "", str(text).lower())


def _kind(feature: dict[str, Any]) -> str:
    """The type of a QuPath object; older versions write it as the id, such as `PathDetectionObject`."""
    about = feature["properties"]
    kind = feature.get("objectType") or about.get("objectType") or about.get("object_type")
    return sys.intern(_word(kind or (feature.get("id") if _is_type(feature.get("id")) else "")))


def _is_type(identifier: Any) -> bool:
    return isinstance(identifier, str) and re.fullmatch(_TYPE_WORDS, identifier) is not None


def _class(properties: dict[str, Any]) -> str | None:
    """The class of a shape, if any: its name, or text."""
    value = properties.get("classification", properties.get("class"))
    if isinstance(value, dict):
        names = value.get("names")  # QuPath's derived classes, such as Tumor and Positive
        value = ": ".join(map(str, names)) if isinstance(names, list) else value.get("name")
    return sys.intern(value) if isinstance(value, str) and value else None


def _id(source: dict[str, Any], key: str) -> Any:
    value = source.get(key)
    return None if _is_type(value) else value


def _polygons(geometries: list[Any]) -> NDArray[Any]:
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
