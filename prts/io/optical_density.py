"""Optical density of pixels, and the areas that show nothing."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

OPTICAL_DENSITY = -np.log10(np.maximum(np.arange(256), 1) / 255)
"""Optical density (base 10) of each gray level, (256,)."""

GLASS_OD = 0.05
"""Mean optical density over red, green and blue below which a pixel is empty glass: gray levels above 227."""

# Scanners fill what they did not scan with black. Compression leaves a rim of up to a block of 8 px that is not quite black.
_BLACK, _SIDE, _RIM = 10, 9, 8


def without_black(rgb: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Pixels (h, w, 3) with unscanned, black areas as white as glass; the same array if there are none.

    Such areas are at least 9 px wide, so nothing that a stain colors is one.
    """
    black = (rgb <= _BLACK).all(axis=2)
    if np.count_nonzero(black) < _SIDE**2:
        return rgb
    wide = ndimage.minimum_filter(black.astype(np.uint8), _SIDE)
    if not wide.any():
        return rgb
    white = rgb.copy()
    white[ndimage.maximum_filter(wide, _SIDE + 2 * _RIM) > 0] = 255
    return white
