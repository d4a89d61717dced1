"""Color around a nucleus at seven scales: 42 numbers that say what tissue it is in.

At each scale of 3, 6, 12, 24, 48, 96 and 192 um: the mean and the standard deviation of the optical density (-log10 of transmitted light)
of red, green and blue, weighted by a Gaussian of that standard deviation around the centroid. The choices behind the numbers:

* The slide is read at 2 um/px (`MPP`): the finest Gaussian is then 1.5 px wide. Outside the image is white, whose optical density is 0.
* The Gaussian is cut off at 3 standard deviations (`TRUNCATE`) and sums to 1.
* Optical density and its square are averaged over 2 x 2 px while the Gaussian is wider than 4 px (`WIDEST`), so that every Gaussian is at
  most 4 px wide and costs the same. This widens it by less than 1%.
* Means are read at the centroid itself, bilinearly between pixels, which widens a Gaussian by up to 3% (6% at the finest scale).
* sd = sqrt(max(E[x^2] - E[x]^2, 0)) of the interpolated moments, in double precision from single-precision means. In perfectly even, dark
  color the difference of the two is rounding, and gives an sd of up to 0.001 instead of 0.

The slide is processed in square blocks, of which the part with nuclei is read with a margin as wide as the widest Gaussian reaches, channel
by channel, so that memory depends neither on the size of the slide nor on the number of nuclei. What is read starts on multiples of the
coarsest pixel, so that the numbers do not depend on the size of a block. Blocks without nuclei are not read.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter

from prts.io.optical_density import read_without_black
from prts.progress import track

if TYPE_CHECKING:
    from collections.abc import Iterator

    from prts.io.slide import Slide

    Floats = NDArray[np.float32]
    Points = NDArray[np.float64]

MPP = 2.0
SIGMAS_UM = (3.0, 6.0, 12.0, 24.0, 48.0, 96.0, 192.0)
TRUNCATE = 3.0
WIDEST = 4.0
FINE = 3
"""Scales up to 12 um: a nucleus and those next to it."""
COLUMNS = tuple(
    f"{channel}_{figure}_{sigma:g}um"
    for sigma in SIGMAS_UM
    for figure in ("mean", "sd")
    for channel in ("red", "green", "blue")
)

# Raised when a column changes.
_VERSION = 1
# Side of a block without its margin, px: with the margin 2,688 px square, about 250 MB in all.
_BLOCK = 2048
DENSITY = -np.log10((np.arange(256, dtype=np.float32) + 1) / 256).astype(np.float32)


def settings() -> dict[str, Any]:
    """Everything that decides the numbers apart from the image and the centroids."""
    return {
        "name": "context",
        "version": _VERSION,
        "mpp": MPP,
        "sigmas_um": list(SIGMAS_UM),
        "truncate": TRUNCATE,
        "widest": WIDEST,
    }


def context(slide: Slide, xy: Points, *, block: int = _BLOCK) -> Floats:
    """Mean and spread of color around points, at seven scales.

    Parameters
    ----------
    slide
        The image.
    xy
        Points such as centroids of nuclei, (n, 2) in full-resolution pixels.
    block
        Side of the blocks in which the slide is processed, in pixels of 2 um, a multiple of 32. It decides memory and speed, not the
        numbers.

    Returns
    -------
    (n, 42) float32, columns as in `COLUMNS`.
    """
    if block < 1 or block % _COARSEST:
        raise ValueError(f"block {block} is not a multiple of {_COARSEST}")
    at = np.asarray(xy, dtype=np.float64) * (slide.mpp / MPP)
    out = np.empty((len(at), len(COLUMNS)), dtype=np.float32)
    for members in track(list(by_block(at, block)), "context"):
        (left, top), (width, height) = window(at[members], _MARGIN, _COARSEST)
        pixels = read_without_black(slide, left, top, width, height, MPP)
        here = at[members] - (left, top)
        for channel in range(3):
            out[members, channel::3] = _channel(DENSITY[pixels[..., channel]], here)
    return out


def _levels() -> list[tuple[int, float]]:
    """Of each scale, how many pixels of the slide form one pixel along an axis, and the Gaussian's width in these."""
    found, factor = [], 1
    for sigma in SIGMAS_UM:
        while sigma / (MPP * factor) > WIDEST:
            factor *= 2
        found.append((factor, sigma / (MPP * factor)))
    return found


def _reach(width: float) -> int:
    """Pixels that a Gaussian reaches, and one more for interpolation."""
    return int(TRUNCATE * width + 0.5) + 1


_LEVELS = _levels()
_COARSEST = _LEVELS[-1][0]
# Of all scales, in whole pixels of the coarsest level.
_REACH = max(factor * _reach(width) for factor, width in _LEVELS)
_MARGIN = -(-_REACH // _COARSEST) * _COARSEST


def by_block(at: Points, block: int) -> Iterator[NDArray[np.intp]]:
    """Which points (n, 2) each square block holds, row of blocks by row of blocks, without empty blocks."""
    if len(at) == 0:
        return
    cell = np.floor(at / block).astype(np.int64)
    order = np.lexsort((cell[:, 0], cell[:, 1]))
    cuts = np.flatnonzero(np.any(np.diff(cell[order], axis=0), axis=1)) + 1
    yield from np.split(order, cuts)


def window(at: Points, margin: int, step: int = 1) -> tuple[tuple[int, int], tuple[int, int]]:
    """Upper left corner and size of the smallest region on a grid of `step` px with a margin around points (n, 2)."""
    low = np.floor(at.min(axis=0) / step).astype(int) * step - margin
    high = (np.floor(at.max(axis=0) / step).astype(int) + 1) * step + margin
    (left, top), (width, height) = low.tolist(), (high - low).tolist()
    return (left, top), (width, height)


def _channel(density: Floats, at: Points) -> Floats:
    """Mean and sd of one channel at each scale around points (n, 2) in pixels of the block: (n, 14)."""
    first, second, factor = density, density * density, 1
    columns: list[NDArray[np.float64]] = []
    for wanted, width in _LEVELS:
        while factor < wanted:
            first, second, factor = _halved(first), _halved(second), 2 * factor
        (left, top), (across, down) = window(at / factor, _reach(width))
        here, seen = at / factor - (left, top), np.s_[top : top + down, left : left + across]
        mean, square = (_interpolated(_blurred(moment[seen], width), here) for moment in (first, second))
        columns += [mean, np.sqrt(np.maximum(square - mean * mean, 0.0))]
    return np.stack(columns, axis=1).astype(np.float32)


def _halved(image: Floats) -> Floats:
    """Mean of 2 x 2 pixels."""
    rows = image[0::2] + image[1::2]
    halved: Floats = (rows[:, 0::2] + rows[:, 1::2]) * np.float32(0.25)
    return halved


def _blurred(image: Floats, width: float) -> Floats:
    # no point is closer to the edge than the Gaussian reaches
    blurred: Floats = gaussian_filter(image, width, mode="nearest", truncate=TRUNCATE)
    return blurred


def _interpolated(image: Floats, at: Points) -> NDArray[np.float64]:
    """Bilinear between the centers of pixels, which are at .5, (n,)."""
    low = np.floor(at - 0.5).astype(np.intp)
    x, y = low.T
    right, down = (at - 0.5 - low).T
    upper = image[y, x] * (1 - right) + image[y, x + 1] * right
    lower = image[y + 1, x] * (1 - right) + image[y + 1, x + 1] * right
    value: NDArray[np.float64] = upper * (1 - down) + lower * down
    return value
