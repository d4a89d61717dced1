"""Twelve color statistics: the features of a baseline that sees the stain around a nucleus but not its structure.

The columns are mean and standard deviation of the optical density (-log10 of transmitted light) of red, green and blue, in the square tile
around a nucleus (6), 128 um wide, and within the nucleus (6): over the pixels whose centers are in its polygon and in the central 64 px of
the tile, or its central pixel, if there are none.

The slide is processed in blocks, of which the part with nuclei is read with a margin of half a tile. Sums over tiles are differences of
running sums, and pixels of nuclei are found for all nuclei of a block at once, so that no tile is ever cut.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import shapely
from numpy.typing import NDArray

from prts.features.context import DENSITY, by_block, window
from prts.features.tiles import center_pixel, in_tile
from prts.geometry import lattice_points_within
from prts.progress import track

if TYPE_CHECKING:
    from prts.io.slide import Slide

    Floats = NDArray[np.float32]
    Ints = NDArray[np.int64]

COLUMNS = tuple(f"{channel}_{figure}" for figure in ("mean", "sd") for channel in ("red", "green", "blue"))
CROP = 64
"""Side of the window around its center in which a nucleus is seen, px."""

# Raised when a column changes.
_VERSION = 2
_BLOCK = 1024
_PIXEL_CENTERS = np.array([[1.0, 0.0, 0.5], [0.0, 1.0, 0.5]])


@dataclass(frozen=True)
class ColourTile:
    """The tile around each nucleus: um per pixel, and its side in pixels, at least `CROP`."""

    mpp: float = 0.5
    tile_px: int = 256

    def settings(self) -> dict[str, Any]:
        """Everything that decides the numbers apart from the image and the nuclei."""
        return {"name": "colour", "version": _VERSION, **asdict(self)}


def colour_tile(*, bins: bool) -> ColourTile:
    """The tile of nuclei, or of bins: a section has ten times as many, which are seen at 2 um per pixel.

    Parameters
    ----------
    bins
        Whether the units are bins.
    """
    return ColourTile(mpp=2.0, tile_px=64) if bins else ColourTile()


def colour(
    slide: Slide, polygons: NDArray[np.object_], tile: ColourTile, *, block: int = _BLOCK
) -> tuple[Floats, Floats]:
    """Mean and spread of color in the tile around each nucleus and in the nucleus.

    Parameters
    ----------
    slide
        The image.
    polygons
        Shapely polygons in full-resolution pixels, (n,).
    tile
        The tile.
    block
        Side of the blocks in which the slide is processed, in pixels of the tile. It decides memory and speed, not the numbers.

    Returns
    -------
    Of the tile and of the nucleus, (n, 6) each, columns as in `COLUMNS`.
    """
    scale = slide.mpp / tile.mpp
    center = center_pixel(shapely.get_coordinates(shapely.centroid(polygons)) * scale)
    of_tile, of_nucleus = (np.empty((len(center), len(COLUMNS)), dtype=np.float32) for _ in range(2))
    for members in track(list(by_block(center.astype(np.float64), block)), "color"):
        (left, top), (width, height) = window(center[members], tile.tile_px // 2)
        density = DENSITY[slide.read_region(left, top, width, height, mpp=tile.mpp)]
        here = center[members] - (left, top)
        of_tile[members] = _in_squares(density, here - tile.tile_px // 2, tile.tile_px)
        moved = in_tile(polygons[members], scale, np.broadcast_to((left, top), here.shape))
        of_nucleus[members] = _in_polygons(density, moved, here)
    return of_tile, of_nucleus


def _in_squares(density: Floats, corner: Ints, side: int) -> NDArray[np.float64]:
    """Mean and sd (n, 6) in squares with these upper left pixels (n, 2)."""
    (left, top), (right, bottom) = corner.T, corner.T + side

    def mean(values: NDArray[np.float64]) -> NDArray[np.float64]:
        running = np.zeros((values.shape[0] + 1, values.shape[1] + 1, 3))
        running[1:, 1:] = values.cumsum(axis=0).cumsum(axis=1)
        total: NDArray[np.float64] = (
            running[bottom, right] - running[top, right] - running[bottom, left] + running[top, left]
        )
        return total / side**2

    wide = density.astype(np.float64)
    return _mean_and_sd(mean(wide), mean(wide * wide))


def _in_polygons(density: Floats, polygons: NDArray[np.object_], center: Ints) -> NDArray[np.float64]:
    """Mean and sd (n, 6) over the pixels in polygons and near their centers (n, 2)."""
    rows, columns = density.shape[:2]
    which, row, column = lattice_points_within(polygons, _PIXEL_CENTERS, columns, rows)
    step = np.stack([column, row], axis=1) - center[which] + CROP // 2
    near = ((step >= 0) & (step < CROP)).all(axis=1)
    empty = np.setdiff1d(np.arange(len(polygons)), which[near])
    which = np.concatenate([which[near], empty])
    row, column = (np.concatenate([found[near], center[empty, axis]]) for found, axis in ((row, 1), (column, 0)))
    values = density[row, column].astype(np.float64)
    n = np.bincount(which, minlength=len(polygons))[:, None]

    def mean(weights: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.stack([np.bincount(which, channel, minlength=len(polygons)) for channel in weights.T], axis=1) / n

    return _mean_and_sd(mean(values), mean(values * values))


def _mean_and_sd(mean: NDArray[np.float64], square: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.hstack([mean, np.sqrt(np.maximum(square - mean * mean, 0.0))])
