"""What belongs to one nucleus: shapes that hold many are taken apart, and regions drawn around many are left out."""

from __future__ import annotations

import functools
import logging
import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import shapely
from numpy.typing import NDArray

from prts.errors import InputError

if TYPE_CHECKING:
    from pathlib import Path

logger = logging.getLogger(__name__)

# The parts of a torn nucleus are within 30 um and all but one are crumbs; those of a class are spread over the image.
_EXTENT_UM, _NUCLEUS_UM2 = 30.0, 8.0
# Even the nuclei of megakaryocytes are below 2,000 um2; the second limit keeps nuclei whose um/px is wrong.
_REGION_UM2, _REGION_MEDIANS = 2000.0, 10.0


# What programs call the id of a nucleus; the one to prefer comes first. The id of a feature is beside its properties in GeoJSON; `id` of
# MERSCOPE only counts rows.
ID_NAMES = ("cell_id", "EntityID", "id", "feature id", "cell", "object id", "instance_id", "label_id")


@functools.lru_cache(maxsize=1024)
def id_name(name: str) -> str | None:
    """The member of `ID_NAMES` that a column or property is called, in any spelling (`cellID`, `Cell ID`); None if it is no id."""
    return _ID_WORDS.get(_word(name))


def _word(name: str) -> str:
    return re.sub(r"[ _]", "", name).lower()


_ID_WORDS = {_word(name): name for name in ID_NAMES}


@dataclass
class Shapes:
    """Shapes of a file, one per row.

    Attributes
    ----------
    geometry
        (n,) shapely geometries or None, in the pixels of the image.
    ids
        (n,) values of each kind of id in the file, None for shapes without one; the kind to prefer comes first.
    score, classification
        (n,) values, or None if the file has none.
    """

    geometry: NDArray[Any]
    ids: dict[str, NDArray[Any]] = field(default_factory=dict)
    score: Any = None
    classification: Any = None

    def take(self, rows: NDArray[Any], geometry: NDArray[Any] | None = None) -> Shapes:
        """Some rows, with their geometry or another one."""
        ids = {kind: values[rows] for kind, values in self.ids.items()}
        columns = (None if each is None else np.asarray(each)[rows] for each in (self.score, self.classification))
        return Shapes(self.geometry[rows] if geometry is None else geometry, ids, *columns)

    def chosen_ids(self, path: Path) -> NDArray[Any] | None:
        """The first kind of id that any shape has, (n,); then all shapes must have it.

        Raises
        ------
        InputError
            If only some shapes have it, or it is not text or a number.
        """
        for kind, values in self.ids.items():
            absent = _absent(values)
            if absent.all():
                continue
            if not all(isinstance(value, str | int | float) for value in values[~absent].tolist()):
                raise InputError(f"{path}: {kind} contains values other than text and numbers; give valid ids")
            if absent.any():
                raise InputError(
                    f"{path}: {int(absent.sum())} of {len(values)} nuclei have no {kind}; give it to all nuclei or to none"
                )
            return values
        return None


def one_each(shapes: Shapes, source: str, mpp: float) -> Shapes:
    """Take apart multipolygons and collections that hold many nuclei, such as one per class.

    The parts of shape `a` get the ids `a-1`, `a-2`, ...

    Parameters
    ----------
    shapes
        (n,) shapes of a file.
    source
        The file, for log lines.
    mpp
        um per full-resolution pixel.
    """
    several = np.isin(shapely.get_type_id(shapes.geometry), (3, 6, 7)) & (
        shapely.get_num_geometries(shapes.geometry) > 1
    )
    rows = np.flatnonzero(several)
    parts, owner = shapely.get_parts(shapes.geometry[rows], return_index=True)
    parts, inner = shapely.get_parts(parts, return_index=True)
    owner = rows[owner[inner]]
    area = shapely.area(parts)
    parts, owner, area = parts[area > 0], owner[area > 0], area[area > 0]
    large = np.bincount(owner[area * mpp**2 >= _NUCLEUS_UM2], minlength=len(shapes.geometry)) > 1
    x0, y0, x1, y1 = shapely.bounds(shapes.geometry).T
    spread = np.fmax(x1 - x0, y1 - y0) * mpp > _EXTENT_UM
    # one shape spread over the image shows that those of the file hold classes, also a class of two adjacent nuclei
    apart = large if (large & spread).any() else np.zeros_like(large)
    if not apart.any():
        return shapes
    taken = apart[owner]
    parts, owner = parts[taken], owner[taken]
    order = np.argsort(np.r_[np.flatnonzero(~apart), owner], kind="stable")
    rows = np.r_[np.flatnonzero(~apart), owner][order]
    found = shapes.take(rows, np.concatenate([shapes.geometry[~apart], parts])[order])
    number = np.arange(len(rows)) - np.searchsorted(rows, rows) + 1
    for kind, values in found.ids.items():
        named = zip(values, apart[rows] & ~_absent(values), number, strict=True)
        found.ids[kind] = np.array([f"{name}-{i}" if split else name for name, split, i in named], dtype=object)
    logger.info("%s: %d shapes that hold many nuclei taken apart into %d", source, apart.sum(), taken.sum())
    return found


def without_regions(shapes: Shapes, source: str, mpp: float) -> Shapes:
    """Leave out shapes larger than any nucleus among much smaller ones: annotations, regions of interest, cores of a TMA.

    Parameters
    ----------
    shapes
        (n,) shapes of a file.
    source
        The file, for log lines.
    mpp
        um per full-resolution pixel.
    """
    with np.errstate(all="ignore"):
        area = np.nan_to_num(shapely.area(shapes.geometry)) * mpp**2
    usual = np.percentile(area[area > 0], 50, method="lower") if (area > 0).any() else np.inf
    region = area > max(_REGION_UM2, _REGION_MEDIANS * usual)
    if not region.any():
        return shapes
    logger.info(
        "%s: %d regions left out, larger than any nucleus (from %.0f um2 on; the median shape has %.0f um2)",
        *(source, region.sum(), area[region].min(), usual),
    )
    return shapes.take(np.flatnonzero(~region))


def _absent(values: NDArray[Any]) -> NDArray[np.bool_]:
    column = pd.Series(values, dtype=object)
    absent: NDArray[np.bool_] = column.isna().to_numpy()
    if absent.all():
        return absent
    empty: NDArray[np.bool_] = np.fromiter((isinstance(v, str) and not v for v in column), bool, len(column))
    return absent | empty
