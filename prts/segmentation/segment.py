"""Segmentation: what a segmenter is, and what those that work block by block share."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import numpy as np
import shapely

from prts.errors import InputError

if TYPE_CHECKING:
    import geopandas as gpd
    from numpy.typing import NDArray

    from prts.io.slide import Slide

logger = logging.getLogger(__name__)

_SAMPLE_WINDOW = 512
_SAMPLE_WINDOWS_A_SIDE = 8


class Segmenter(Protocol):
    """Anything that turns a slide into nuclei."""

    advice: ClassVar[str]
    """What a user may change where no nucleus is found."""

    def __call__(self, slide: Slide) -> gpd.GeoDataFrame:
        """Nuclei of the slide, as `prts.io.nuclei.make_nuclei` returns them."""
        ...

    def settings(self) -> dict[str, Any]:
        """All that decides the result beside the slide, JSON-like: the fingerprint of the nuclei."""
        ...


def segment(slide: Slide, segmenter: Segmenter) -> gpd.GeoDataFrame:
    """Nuclei of a slide, at least one.

    Raises
    ------
    InputError
        If none is found.
    """
    nuclei = segmenter(slide)
    name = segmenter.settings()["name"]
    if not len(nuclei):
        raise InputError(
            f"{slide.path}: {name} found no nuclei at {slide.mpp:g} um/px (from {slide.mpp_source}); check that this is "
            f"an H&E image and its um/px is right, or {segmenter.advice}"
        )
    logger.info(
        "%s: %s nuclei by %s, median %.0f um2", slide.path, f"{len(nuclei):,}", name, nuclei["area_um2"].median()
    )
    return nuclei


@dataclass(frozen=True)
class Block:
    """A block of the grid at some um/px: `x0 <= x < x1`, `y0 <= y < y1`; blocks cover the grid once."""

    x0: int
    y0: int
    x1: int
    y1: int


def blocks(width: int, height: int, size: int) -> list[Block]:
    """Blocks of at most `size` px a side that cover a grid, all of about the same size."""
    columns = np.linspace(0, width, -(-width // size) + 1).astype(int)
    rows = np.linspace(0, height, -(-height // size) + 1).astype(int)
    return [Block(int(x0), int(y0), int(x1), int(y1)) for y0, y1 in pairwise(rows) for x0, x1 in pairwise(columns)]


def owned(polygons: NDArray[Any], block: Block) -> NDArray[np.bool_]:
    """Which polygons (grid px) belong to a block: those whose centroid it holds, so that each belongs to one block."""
    xy = shapely.get_coordinates(shapely.centroid(polygons))
    return np.asarray(((xy >= [block.x0, block.y0]) & (xy < [block.x1, block.y1])).all(axis=1))


def without_doubles(polygons: NDArray[Any], block_of: NDArray[np.intp]) -> NDArray[np.bool_]:
    """Which polygons to keep so that no nucleus on a seam counts twice.

    A nucleus that two blocks outlined differently may have a centroid in each. Of two polygons of different blocks that
    share more than half of the smaller one, the larger is kept.

    Parameters
    ----------
    polygons
        (n,) polygons.
    block_of
        (n,) the block that each comes from.
    """
    keep = np.ones(len(polygons), bool)
    if not len(block_of) or (block_of == block_of[0]).all():
        return keep
    first, second = shapely.STRtree(polygons).query(polygons, predicate="intersects")
    pair = (first < second) & (block_of[first] != block_of[second])
    first, second = first[pair], second[pair]
    area = shapely.area(polygons)
    shared = shapely.area(shapely.intersection(polygons[first], polygons[second]))
    double = shared > 0.5 * np.minimum(area[first], area[second])
    keep[np.where(area[first] < area[second], first, second)[double]] = False
    return keep


def sample(slide: Slide, mpp: float) -> Iterator[NDArray[np.uint8]]:
    """Windows that stand for the slide's colours: all of a small slide, else 8 x 8 windows of 512 px spread evenly.

    Full-size pixels, not a thumbnail: reducing an image blends nuclei with what is around them and narrows its range.
    """
    width, height = slide.size_at(mpp)
    side = _SAMPLE_WINDOW * _SAMPLE_WINDOWS_A_SIDE
    if width * height <= side * side:
        for block in blocks(width, height, side):
            yield slide.read_region(block.x0, block.y0, block.x1 - block.x0, block.y1 - block.y0, mpp)
        return
    w, h = min(width, _SAMPLE_WINDOW), min(height, _SAMPLE_WINDOW)
    for y in np.linspace(0, height - h, _SAMPLE_WINDOWS_A_SIDE).astype(int):
        for x in np.linspace(0, width - w, _SAMPLE_WINDOWS_A_SIDE).astype(int):
            yield slide.read_region(int(x), int(y), w, h, mpp)
