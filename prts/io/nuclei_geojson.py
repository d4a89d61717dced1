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
from prts.io.nuclei_parts import ID_NAMES, Shapes, id_name

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
        If the file is not GeoJSON.
    """
    features = read_features(path)
    parts: list[NDArray[Any]] = []
    kinds: list[str] = []
    ids: dict[str, list[Any]] = {name: [] for name in ID_NAMES}
    scores: list[Any] = []
    classes: list[str | None] = []
    while batch := list(islice(features, _AT_ONCE)):
        parts.append(_polygons([feature.get("nucleusGeometry") or feature.get("geometry") for feature in batch]))
        for feature in batch:
            about = feature["properties"]
            kinds.append(_kind(feature))
            found: dict[str | None, Any] = {id_name(key): value for key, value in about.items()}
            found["feature id"] = feature.get("id")
            for name, values in ids.items():
                value = found.get(name)
                values.append(None if _is_type(value) else value)
            scores.append(about.get("score"))
            classes.append(_class(about))
    shapes = Shapes(
        np.concatenate(parts) if parts else np.empty(0, dtype=object),
        {name: pd.Series(values, dtype=object).to_numpy() for name, values in ids.items()},
        pd.to_numeric(pd.Series(scores, dtype=object), errors="coerce").to_numpy(float),
        np.array(classes, dtype=object) if any(classes) else None,
    )
    kind = pd.Series(kinds, dtype=object)
    never, drawn = kind.isin(_NEVER_NUCLEI), kind == "annotation"
    region = never if (drawn | never).all() else drawn | never  # or nuclei that somebody drew
    if region.any() and not region.all():
        logger.info("%s: %d QuPath annotations that are not nuclei left out", path, region.sum())
        shapes = shapes.take(np.flatnonzero(~region))
    return shapes


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
