"""Optical density of pixels, and the areas that show nothing."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

if TYPE_CHECKING:
    from prts.io.slide import Slide

OPTICAL_DENSITY = -np.log10(np.maximum(np.arange(256), 1) / 255)
"""Optical density (base 10) of each gray level, (256,)."""

GLASS_OD = 0.05
"""Mean optical density over red, green and blue below which a pixel is empty glass: gray levels above 227."""

# Scanners fill what they did not scan with black. Compression leaves a rim of up to a block of 8 px that is not quite black.
_BLACK, _SIDE, _RIM = 10, 9, 8


def is_black(rgb: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """Whether each pixel, (h, w, 3), is as black as what was not scanned, (h, w)."""
    return np.asarray((rgb <= _BLACK).all(axis=2))


def without_black(rgb: NDArray[np.uint8], rim: int = _RIM) -> NDArray[np.uint8]:
    """Pixels (h, w, 3) with unscanned, black areas as white as glass; the same array if there are none.

    Such areas are at least 9 px wide, so nothing that a stain colors is one. Pixels up to `rim` px from them become white, too.
    """
    black = is_black(rgb)
    if np.count_nonzero(black) < _SIDE**2:
        return rgb
    wide = ndimage.minimum_filter(black.astype(np.uint8), _SIDE)
    if not wide.any():
        return rgb
    white = rgb.copy()
    white[ndimage.maximum_filter(wide, _SIDE + 2 * rim) > 0] = 255
    return white


def read_without_black(slide: Slide, x: int, y: int, width: int, height: int, mpp: float) -> NDArray[np.uint8]:
    """`Slide.read_region` with unscanned, black areas as white as glass, also those that continue beyond the region."""
    rgb = slide.read_region(x, y, width, height, mpp)
    if np.count_nonzero(is_black(rgb)) < _SIDE**2:
        return rgb
    # a block of full-resolution pixels, and what resampling blends
    rim = min(_RIM, math.ceil(_RIM * slide.mpp / mpp) + 1)
    margin = _SIDE + rim
    wider = slide.read_region(x - margin, y - margin, width + 2 * margin, height + 2 * margin, mpp)
    return np.ascontiguousarray(without_black(wider, rim)[margin:-margin, margin:-margin])
