"""Whether an image can be H&E on a bright background at all, before hours go into what is not."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import numpy as np

from prts.errors import InputError
from prts.io.optical_density import GLASS_OD, OPTICAL_DENSITY
from prts.segmentation.segment import sample

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from prts.io.slide import Slide

logger = logging.getLogger(__name__)

# Grey levels. Of the images that the limits were chosen on (three her2st sections, CMU-1, histo.jpg, 78 of nuclei_dsb2018, three simulated
# sections) the darkest has a median of 132; fluorescence lies below 30.
_DARK = 60.0
# A pixel is coloured where its channels span more grey levels than noise does. Haematoxylin and eosin, blue to pink, both absorb green
# most: in the images above green is the lowest channel of at least 75 % of the coloured pixels, in a dozen photographs of at most 39 %.
_COLOURED, _TIE, _GREEN_LOWEST = 20, 3, 0.5
# Below this share of coloured pixels an image is grey, and says nothing of its stain.
_GREY = 0.05
_MPP = 0.5  # um/px to look at, or the slide's own where that is coarser
_STRIDE = 4
_THUMBNAIL = 2048

_ANYWAY = "check_image=false takes it as it is"


def require_h_and_e(slide: Slide) -> None:
    """Refuse an image that is dark, has no tissue, or is not coloured like haematoxylin and eosin.

    Looks at 64 windows spread over the slide (all of a small one), and at a reduced picture where these show glass only. A grey image
    is taken, with a warning: its stain cannot be told.

    Parameters
    ----------
    slide
        The image.

    Raises
    ------
    InputError
        If it cannot be H&E on a bright background.
    """
    rgb = np.concatenate([w[::_STRIDE, ::_STRIDE].reshape(-1, 3) for w in sample(slide, max(_MPP, slide.mpp))])
    median = float(np.median(rgb.mean(axis=1)))
    if median < _DARK:
        raise InputError(
            f"{slide.path}: is dark (median grey level {median:.0f} of 255), like fluorescence; H&E on a bright background is needed "
            f"({_ANYWAY})"
        )
    tissue = _without_glass(rgb)
    if not len(tissue):
        tissue = _without_glass(slide.thumbnail(_THUMBNAIL).reshape(-1, 3))
    if not len(tissue):
        raise InputError(f"{slide.path}: shows no tissue, only white; an image of an H&E section is needed ({_ANYWAY})")
    coloured = tissue[np.ptp(tissue, axis=1) > _COLOURED].astype(np.int16)
    if len(coloured) < _GREY * len(tissue):
        logger.warning(
            "%s: is grey, so that it cannot be told whether it is H&E; a model that learnt from coloured H&E is hardly right about it",
            slide.path,
        )
        return
    share = float((coloured[:, 1] <= coloured.min(axis=1) + _TIE).mean())
    if share < _GREEN_LOWEST:
        raise InputError(
            f"{slide.path}: is not coloured like H&E: {share:.0%} of its coloured pixels are violet to pink, as haematoxylin and eosin are "
            f"(in H&E over {_GREEN_LOWEST:.0%}); is it a photograph, or another stain? An H&E image is needed ({_ANYWAY})"
        )


def _without_glass(rgb: NDArray[np.uint8]) -> NDArray[np.uint8]:
    tissue: NDArray[np.uint8] = rgb[OPTICAL_DENSITY[rgb].mean(axis=1) > GLASS_OD]
    return tissue
