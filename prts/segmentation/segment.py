"""The interface of a segmenter, and tools for those that work block by block."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import numpy as np
import shapely

from prts.errors import InputError
from prts.segmentation import segmenters

if TYPE_CHECKING:
    import geopandas as gpd
    from numpy.typing import NDArray

    from prts.io.slide import Slide

logger = logging.getLogger(__name__)

_SAMPLE_WINDOW = 512
_SAMPLE_WINDOWS_A_SIDE = 8


class Segmenter(Protocol):
    """Turns a slide into nuclei.

    To add one, write a module with a class that follows this protocol and register it with `@segmenters.register("my_segmenter")`.
    """

    name: ClassVar[str]
    """Name of the segmenter; set by `segmenters.register`."""

    extra: ClassVar[str | None]
    """The optional dependencies (`pip install "prts-spatial[<extra>]"`) that it needs; None if it needs none."""

    hint: ClassVar[str]
    """What a user can change if no nucleus is found."""

    def __call__(self, slide: Slide) -> gpd.GeoDataFrame:
        """Nuclei of the slide, as `prts.io.nuclei.make_nuclei` returns them."""
        ...

    def settings(self) -> dict[str, Any]:
        """Everything except the slide that affects the result, JSON-like, with the `name`: the fingerprint of the nuclei."""
        ...


def segment(slide: Slide, segmenter: Segmenter) -> gpd.GeoDataFrame:
    """Find the nuclei of a slide, at least one.

    Parameters
    ----------
    slide
        The image.
    segmenter
        Finds them.

    Returns
    -------
    Nuclei as `prts.io.nuclei.make_nuclei` returns them, in full-resolution pixels.

    Raises
    ------
    InputError
        If no nucleus is found.

    Examples
    --------
    >>> from prts.segmentation.watershed import Watershed
    >>> nuclei = segment(slide, Watershed())  # doctest: +SKIP
    """
    nuclei = segmenter(slide)
    if not len(nuclei):
        raise InputError(
            f"{slide.path}: {segmenter.name} found no nuclei at {slide.mpp:g} um/px (from {slide.mpp_source}); check that this is "
            f"an H&E image and its um/px is right, or {segmenter.hint}"
        )
    n, area = f"{len(nuclei):,}", nuclei["area_um2"].median()
    logger.info("%s: %s nuclei by %s, median %.0f um2", slide.name, n, segmenter.name, area)
    return nuclei


def recorded_segmenter(recorded: Mapping[str, Any]) -> Segmenter | None:
    """The segmenter used in training, as recorded in a bundle; None if nuclei came from a file.

    Parameters
    ----------
    recorded
        `segmentation` of the bundle's metadata: `name` and `arguments`.

    Raises
    ------
    ParameterError
        If this version of prts has no such segmenter, or it takes other arguments.
    """
    if recorded["name"] in ("given", "polygons"):
        return None
    return segmenters.build({"name": recorded["name"], **recorded["arguments"]})


def describe_segmenter(segmenter: Segmenter) -> dict[str, Any]:
    """The record of a segmenter in a bundle: its name and the arguments to rebuild it.

    Parameters
    ----------
    segmenter
        Keeps each constructor argument as an attribute of the same name.
    """
    names = inspect.signature(type(segmenter)).parameters
    return {"name": segmenter.name, "arguments": {name: getattr(segmenter, name) for name in names}}


@dataclass(frozen=True)
class Block:
    """A block of the grid at some um/px: `x0 <= x < x1`, `y0 <= y < y1`; blocks cover the grid once."""

    x0: int
    y0: int
    x1: int
    y1: int


def blocks(width: int, height: int, size: int) -> list[Block]:
    """Blocks of at most `size` px per side that cover a grid, all of about the same size."""
    columns = np.linspace(0, width, -(-width // size) + 1).astype(int)
    rows = np.linspace(0, height, -(-height // size) + 1).astype(int)
    return [Block(int(x0), int(y0), int(x1), int(y1)) for y0, y1 in pairwise(rows) for x0, x1 in pairwise(columns)]


def owned(polygons: NDArray[Any], block: Block) -> NDArray[np.bool_]:
    """Which polygons (grid px) have their centroid in a block, so that each belongs to exactly one block."""
    xy = shapely.get_coordinates(shapely.centroid(polygons))
    return np.asarray(((xy >= [block.x0, block.y0]) & (xy < [block.x1, block.y1])).all(axis=1))


def without_doubles(polygons: NDArray[Any], block_of: NDArray[np.intp]) -> NDArray[np.bool_]:
    """Which polygons to keep so that no nucleus at the border of two blocks counts twice.

    A nucleus that two blocks outline differently may have a centroid in each. If polygons of two blocks overlap by more
    than half of the smaller one, the larger is kept.

    Parameters
    ----------
    polygons
        (n,) polygons.
    block_of
        (n,) block of each polygon.
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
    """Windows that represent the slide's colors: all of a small slide, else 8 x 8 windows of 512 px spread evenly.

    Full-size pixels, not a thumbnail: downsampling blends nuclei with their surroundings and narrows the range of colors.
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
