"""What a slide is read through: levels cut into tiles, decoded one at a time to RGB; OpenSlide's and Pillow's formats.

TIFF has a module of its own, `slide_tiff`.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import openslide
from numpy.typing import NDArray
from PIL import Image

from prts.errors import InputError
from prts.io.limits import require_decodable
from prts.io.mpp import UM_PER_INCH, Source, from_axes

_PILLOWS_LIMIT = threading.Lock()
_PIXELS_AT_ONCE = 1 << 22


@dataclass(frozen=True)
class Level:
    """One resolution of the image, and the grid of tiles that it is decoded by; the last ones end with the image."""

    width: int
    height: int
    tile_width: int
    tile_height: int


class Reader(Protocol):
    """A file format: levels, finest first, whose tiles can be decoded in any order."""

    levels: list[Level]

    def tile(self, level: int, row: int, column: int) -> NDArray[np.uint8]:
        """RGB pixels (height, width, 3) of one tile; raises whatever its decoder raises."""
        ...

    def mpp_sources(self) -> list[Source]:
        """What the file itself says of its um/px at full resolution."""
        ...

    def close(self) -> None:
        """Release the file."""
        ...


def composite(rgb: NDArray[np.uint8], alpha: NDArray[np.uint8], *, premultiplied: bool = False) -> NDArray[np.uint8]:
    """Lay pixels (h, w, 3) with their opacity (h, w) on white, the colour of empty glass."""
    opacity = alpha[..., None].astype(np.uint16)
    colour = rgb.astype(np.uint32) * (255 if premultiplied else opacity)
    blended: NDArray[np.uint8] = np.minimum((colour + 255 * (255 - opacity) + 127) // 255, 255).astype(np.uint8)
    return blended


def to_uint8(pixels: NDArray[Any], bits: int) -> NDArray[np.uint8]:
    """Scale unsigned samples of any depth up to 16 bits to 0..255.

    Raises
    ------
    InputError
        If they are signed, floating point or deeper: then the image is no photograph.
    """
    if pixels.dtype == np.uint8 and bits == 8:
        return pixels
    if pixels.dtype.kind not in "bu" or bits > 16:
        raise InputError(f"holds {pixels.dtype} pixels; an RGB image of 8 or 16 bits is needed")
    top = (1 << bits) - 1
    return ((pixels.astype(np.uint32) * 255 + top // 2) // top).astype(np.uint8)


class OpenSlideReader:
    """Whole-slide formats of scanners (SVS, NDPI, MRXS, SCN, BIF, ...) through OpenSlide."""

    # Reading on a fixed grid gives a pixel the same value whatever region asks for it: at levels with a fractional
    # downsampling, OpenSlide shifts what it returns by a part of a pixel that depends on the corner.
    _TILE = 1024

    def __init__(self, path: Path) -> None:
        self._slide = openslide.OpenSlide(str(path))
        self.levels = [Level(width, height, self._TILE, self._TILE) for width, height in self._slide.level_dimensions]

    def tile(self, level: int, row: int, column: int) -> NDArray[np.uint8]:
        """See `Reader`."""
        top, left = row * self._TILE, column * self._TILE
        size = (
            min(self._TILE, self.levels[level].width - left),
            min(self._TILE, self.levels[level].height - top),
        )
        downsample = self._slide.level_downsamples[level]
        corner = (round(left * downsample), round(top * downsample))
        rgba: NDArray[np.uint8] = np.asarray(self._slide.read_region(corner, level, size))
        if rgba[..., 3].min() == 255:
            return np.array(rgba[..., :3])
        return composite(rgba[..., :3], rgba[..., 3])

    def mpp_sources(self) -> list[Source]:
        """See `Reader`."""
        properties = self._slide.properties
        x, y = (properties.get(name) for name in (openslide.PROPERTY_NAME_MPP_X, openslide.PROPERTY_NAME_MPP_Y))
        vendor = properties.get(openslide.PROPERTY_NAME_VENDOR, "scanner")
        return from_axes(f"the {vendor} metadata", None if x is None else float(x), None if y is None else float(y))

    def close(self) -> None:
        """See `Reader`."""
        self._slide.close()


class ArrayReader:
    """An image that is decoded whole: PNG, JPEG, and the TIFF layouts that cannot be read in parts."""

    def __init__(self, pixels: NDArray[np.uint8], sources: list[Source]) -> None:
        self._pixels = pixels
        self._sources = sources
        height, width = pixels.shape[:2]
        self.levels = [Level(width, height, width, height)]

    def tile(self, level: int, row: int, column: int) -> NDArray[np.uint8]:
        """See `Reader`."""
        return self._pixels

    def mpp_sources(self) -> list[Source]:
        """See `Reader`."""
        return self._sources

    def close(self) -> None:
        """See `Reader`."""
        self._pixels = np.empty((0, 0, 3), np.uint8)


def read_pillow(path: Path) -> ArrayReader:
    """Decode an image that Pillow knows, and take um/px from its density tag.

    Raises
    ------
    InputError
        If the image is too big to be decoded whole, or holds no photograph. Pillow's own errors pass through.
    """
    with open_pillow(path) as image:
        require_decodable(*image.size, f"a {image.format}", n_bytes=7)  # 4 in Pillow, 3 in the array
        dpi = image.info.get("dpi")
        pixels = _pillow_rgb(image)
    x, y = (UM_PER_INCH / float(v) if v else None for v in dpi) if dpi else (None, None)
    return ArrayReader(pixels, from_axes("the image's dpi", x, y))


@contextmanager
def open_pillow(path: Path) -> Iterator[Image.Image]:
    """An image that Pillow knows, its header read; decoding it is for the block, after `require_decodable`: Pillow's own limit is off."""
    with _PILLOWS_LIMIT:  # of the whole process, and looked at where a header is read
        limit = Image.MAX_IMAGE_PIXELS
        Image.MAX_IMAGE_PIXELS = None
        try:
            image = Image.open(path)
        finally:
            Image.MAX_IMAGE_PIXELS = limit
    with image:
        yield image


def _pillow_rgb(image: Image.Image) -> NDArray[np.uint8]:
    if image.mode.startswith("I"):  # 16-bit grey; "I" is what older files of it open as
        grey = to_uint8(np.asarray(image).astype(np.uint16), 16)
        return np.repeat(grey[..., None], 3, axis=2)
    if image.mode == "F":
        raise InputError("holds floating point pixels; an RGB image of 8 or 16 bits is needed")
    pixels = np.empty((image.height, image.width, 3), np.uint8)
    # some rows at a time: converting and copying a whole image would take its size in memory several times over
    n_rows = max(1, _PIXELS_AT_ONCE // image.width)
    for top in range(0, image.height, n_rows):
        rows = image.crop((0, top, image.width, min(top + n_rows, image.height)))
        if image.has_transparency_data:
            rgba = np.asarray(rows.convert("RGBA"))
            pixels[top : top + n_rows] = composite(rgba[..., :3], rgba[..., 3])
        else:
            pixels[top : top + n_rows] = np.asarray(rows.convert("RGB"))
    return pixels
