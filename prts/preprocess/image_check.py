"""Check that an image can be H&E on a bright background, before hours of work."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import numpy as np

from prts.errors import InputError
from prts.io.optical_density import GLASS_OD, OPTICAL_DENSITY, without_black
from prts.segmentation.segment import sample

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from prts.io.slide import Slide

logger = logging.getLogger(__name__)

# Gray level. The limits were chosen on three her2st sections, CMU-1, histo.jpg, 78 images of nuclei_dsb2018 and three simulated sections.
# The darkest of them has a median of 132; fluorescence is below 30.
_DARK = 60.0
# A pixel is colored if its channels span more gray levels than noise does. Hematoxylin and eosin, blue to pink, both absorb green
# most: in the images above green is the lowest channel of at least 75% of the colored pixels, in a dozen photographs of at most 39%.
_COLOURED, _TIE, _GREEN_LOWEST = 20, 3, 0.5
# Below this share of colored pixels an image is gray, and its stain unknown.
_GREY = 0.05
# A smaller share of black does not change how dark an image is.
_BLACK_SHARE = 0.05
_MPP = 0.5  # um/px of the pixels that are checked, or the slide's own if that is coarser
_STRIDE = 4
_THUMBNAIL = 2048

_ANYWAY = "or turn the `check_image` option off"


def require_h_and_e(slide: Slide) -> None:
    """Refuse an image that is dark, has no tissue, or does not have the colors of hematoxylin and eosin.

    Checks 64 windows spread over the slide (all of a small one), and a thumbnail if these show only glass. A gray image
    is accepted with a warning, since its stain is unknown. Black areas that were not scanned count as glass, unless what remains
    absorbs one color almost completely, as fluorescence on black does.

    Parameters
    ----------
    slide
        The image.

    Raises
    ------
    InputError
        If it cannot be H&E on a bright background.
    """
    pairs = [
        (w[::_STRIDE, ::_STRIDE].reshape(-1, 3), without_black(w)[::_STRIDE, ::_STRIDE].reshape(-1, 3))
        for w in sample(slide, max(_MPP, slide.mpp))
    ]
    original, rgb = (np.concatenate(part) for part in zip(*pairs, strict=True))
    median = _gray_level(slide, original, (original == rgb).all(axis=1))
    if median < _DARK:
        raise InputError(
            f"{slide.path}: is dark (median gray level {median:.0f} of 255), like fluorescence; give H&E on a bright background, {_ANYWAY}"
        )
    tissue = _without_glass(rgb)
    if not len(tissue):
        tissue = _without_glass(without_black(slide.thumbnail(_THUMBNAIL)).reshape(-1, 3))
    if not len(tissue):
        raise InputError(f"{slide.path}: shows no tissue, only white; give an image of an H&E section, {_ANYWAY}")
    coloured = tissue[np.ptp(tissue, axis=1) > _COLOURED].astype(np.int16)
    if len(coloured) < _GREY * len(tissue):
        logger.warning(
            "%s: is gray, so prts cannot tell whether it is H&E; predictions may be unreliable, since the model was trained on colored H&E",
            slide.path,
        )
        return
    share = float((coloured[:, 1] <= coloured.min(axis=1) + _TIE).mean())
    if share < _GREEN_LOWEST:
        raise InputError(
            f"{slide.path}: does not have the colors of H&E: {share:.0%} of its colored pixels are violet to pink, as in H&E "
            f"(over {_GREEN_LOWEST:.0%} of them); it may be a photograph or another stain: give an H&E image, {_ANYWAY}"
        )


def _gray_level(slide: Slide, rgb: NDArray[np.uint8], scanned: NDArray[np.bool_]) -> float:
    """Median gray level of what was scanned, if that may be H&E, else of the darkest channel or of everything."""
    left = rgb[scanned]
    if len(left) > (1 - _BLACK_SHARE) * len(rgb):
        return float(np.median(rgb.mean(axis=1)))
    if not len(left) or (np.ptp(left, axis=1) > _COLOURED).mean() <= _GREY:
        return float(np.median(rgb.mean(axis=1)))
    darkest = float(np.median(left.min(axis=1)))
    if darkest < _DARK:
        return darkest
    logger.info("%s: %.0f%% of it is black and counts as glass", slide.path, 100 * (1 - len(left) / len(rgb)))
    return float(np.median(left.mean(axis=1)))


def _without_glass(rgb: NDArray[np.uint8]) -> NDArray[np.uint8]:
    tissue: NDArray[np.uint8] = rgb[OPTICAL_DENSITY[rgb].mean(axis=1) > GLASS_OD]
    return tissue
