"""The same section as another laboratory and scanner would show it, or placed otherwise on its slide.

Pixels change as they stand in the file. Turns and mirrors move the units with the tissue (`prts.io.orientation`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import tifffile
from numpy.typing import NDArray

from prts.features.views import blurred, brighter, jittered
from prts.io.orientation import Orientation
from prts.preprocess.stains.base import rounded
from prts.simulate.stain import Stain, shifted_stain, stain_colours

if TYPE_CHECKING:
    from prts.section import Section

Pixels = NDArray[np.uint8]
Change = Callable[[Pixels], Pixels]

_TILE = 512
_MARGIN = 8
_LOSSLESS: dict[str, Any] = {"compression": "zlib", "compressionargs": {"level": 1}, "predictor": True}
_JPEG_30: dict[str, Any] = {"compression": "jpeg", "compressionargs": {"level": 30}}


def restained(rgb: Pixels, stain: Stain) -> Pixels:
    """The tissue under the stain and the lamp of another laboratory, by the model of the simulator.

    Parameters
    ----------
    rgb
        (..., 3).
    stain
        What the image is changed to; it is taken to be in the reference stain.

    Returns
    -------
    The optical density is split into hematoxylin, eosin and hemoglobin, whose amounts, colors and white change as `stain` says. The blur
    of its scanner is left out.
    """
    reference = Stain()
    density = -np.log10(np.maximum(rgb.astype(np.float32), 1) / np.asarray(reference.white, np.float32))
    amounts = np.diag([stain.haematoxylin, stain.eosin, 1.0])
    change = np.linalg.inv(stain_colours(reference)) @ amounts @ stain_colours(stain)
    light = np.asarray(stain.white, np.float32) * np.exp(-np.log(10) * (density @ change.astype(np.float32)))
    # glass that is brighter than the reference white has no stain to change
    return rounded(light)


_CHANGES: dict[str, tuple[Change, dict[str, Any]]] = {
    "restained, +1": (partial(restained, stain=shifted_stain(1.0)), _LOSSLESS),
    "restained, -1": (partial(restained, stain=shifted_stain(-1.0)), _LOSSLESS),
    "HED jitter, more hematoxylin": (partial(jittered, factors=(1.15, 0.9, 1.05), offset=0.02), _LOSSLESS),
    "HED jitter, more eosin": (partial(jittered, factors=(0.85, 1.1, 0.95), offset=-0.02), _LOSSLESS),
    "a tenth darker": (partial(brighter, factor=0.9), _LOSSLESS),
    "a tenth brighter": (partial(brighter, factor=1.1), _LOSSLESS),
    "blurred by 1 px": (partial(blurred, px=1), _LOSSLESS),
    "JPEG of quality 30": (lambda rgb: rgb, _JPEG_30),
}
_TURNS = {
    "turned by 90": Orientation(90),
    "turned by 180": Orientation(180),
    "turned by 270": Orientation(270),
    "mirrored": Orientation(0, "horizontal"),
}
NAMES = (*_CHANGES, *_TURNS)


def variant(section: Section, name: str, folder: Path) -> Section:
    """A section whose image is changed.

    Parameters
    ----------
    section
        The section.
    name
        One of `NAMES`.
    folder
        Where to write the changed image, if it is one.

    Returns
    -------
    The same section with another image or orientation; what was measured keeps the pixels of the image file.
    """
    if name in _TURNS:
        return section.reoriented(_TURNS[name])
    change, compression = _CHANGES[name]
    path = folder / f"{name.replace(' ', '_')}.tif"
    with section.open_slide() as slide:

        def tiles() -> Iterator[Pixels]:
            for top in range(0, slide.height, _TILE):
                for left in range(0, slide.width, _TILE):
                    # a margin, so that a blur does not see the edges of tiles
                    wide = slide.read_region(left - _MARGIN, top - _MARGIN, _TILE + 2 * _MARGIN, _TILE + 2 * _MARGIN)
                    yield change(wide)[_MARGIN:-_MARGIN, _MARGIN:-_MARGIN]

        shape = (slide.height, slide.width, 3)
        tifffile.imwrite(
            path, tiles(), shape=shape, dtype=np.uint8, photometric="rgb", tile=(_TILE, _TILE), **compression
        )
    return replace(section, image=path)
