"""Readers of slides: levels of tiles that are decoded to RGB one at a time, for the formats of OpenSlide and Pillow.

For TIFF see `slide_tiff`.
"""

from __future__ import annotations

import functools
import logging
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
from prts.io.limits import check_pixels
from prts.io.mpp import UM_PER_INCH, MppSource, from_axes
from prts.io.slide_bounds import Bounds

logger = logging.getLogger(__name__)

# Of the tag of TIFF and EXIF, and what to set to see the image upright.
ORIENTATION_TAG = 274
_UPRIGHT_BY = {
    2: "`flip` to horizontal",
    3: "`rotate` to 180",
    4: "`flip` to vertical",
    5: "`rotate` to 90 and `flip` to vertical",
    6: "`rotate` to 270",
    7: "`rotate` to 90 and `flip` to horizontal",
    8: "`rotate` to 90",
}
# Bits of a camera that are stored in 16.
_CAMERA_BITS = (8, 10, 12, 14)

_PILLOWS_LIMIT = threading.Lock()
_PIXELS_AT_ONCE = 1 << 22


@dataclass(frozen=True)
class Level:
    """A resolution of an image and its grid of tiles; the last tiles end with the image."""

    width: int
    height: int
    tile_width: int
    tile_height: int


class Reader(Protocol):
    """An open image: levels, finest first, whose tiles can be decoded in any order, and the part that was scanned, if not all."""

    levels: list[Level]
    bounds: Bounds | None

    def tile(self, level: int, row: int, column: int) -> NDArray[np.uint8]:
        """RGB pixels of a tile, (height, width, 3); errors of the decoder are passed on."""
        ...

    def mpp_sources(self) -> list[MppSource]:
        """um/px at full resolution according to the metadata of the file."""
        ...

    def close(self) -> None:
        """Close the file."""
        ...


def composite(rgb: NDArray[np.uint8], alpha: NDArray[np.uint8], *, premultiplied: bool = False) -> NDArray[np.uint8]:
    """Blend pixels (h, w, 3) with opacity (h, w) onto white, the color of empty glass."""
    opacity = alpha[..., None].astype(np.uint16)
    colour = rgb.astype(np.uint32) * (255 if premultiplied else opacity)
    blended: NDArray[np.uint8] = np.minimum((colour + 255 * (255 - opacity) + 127) // 255, 255).astype(np.uint8)
    return blended


def to_uint8(pixels: NDArray[Any], bits: int) -> NDArray[np.uint8]:
    """Scale unsigned samples of any depth up to 16 bits to 0..255.

    Raises
    ------
    InputError
        If they are signed, floating point or have more than 16 bits.
    """
    if pixels.dtype == np.uint8 and bits == 8:
        return pixels
    if pixels.dtype.kind not in "bu" or bits > 16:
        raise InputError(f"contains {pixels.dtype} pixels; give an RGB image with 8 or 16 bits")
    top = (1 << bits) - 1
    pixels = np.minimum(pixels, top)
    return ((pixels.astype(np.uint32) * 255 + top // 2) // top).astype(np.uint8)


@functools.cache
def warn_once(text: str) -> None:
    """Warn of something in a file, which is opened many times, once per process."""
    logger.warning(text)


def opacity_bits(path: Path, top: int, bits: int) -> int | None:
    """Bits of alpha with a largest value of `top`, as in `used_bits`; None, with a warning, if it is 0 everywhere and to be ignored."""
    if top == 0:
        warn_once(f"{path}: is transparent everywhere (alpha 0), so its transparency is ignored")
        return None
    return _smallest(top, bits)


def warn_of_orientation(path: Path, tag: object) -> None:
    """Warn that the orientation tag of a file is not applied."""
    if isinstance(tag, int) and tag in _UPRIGHT_BY:
        warn_once(
            f"{path}: its orientation tag ({int(tag)}) is not applied, pixels are read as stored; to predict it upright, set "
            f"{_UPRIGHT_BY[tag]}"
        )


def used_bits(path: Path, top: int, bits: int) -> int:
    """Bits of samples with a largest value of `top`: cameras store 10, 12 or 14 bits in 16 without scaling them."""
    found = _smallest(top, bits)
    if found < bits:
        warn_once(f"{path}: uses only {found} of {bits} bits (its largest value is {top}) and is scaled")
    return found


def _smallest(top: int, bits: int) -> int:
    return next((n for n in _CAMERA_BITS if 0 < top < 1 << n), bits) if bits == 16 else bits


class OpenSlideReader:
    """Scanner formats (SVS, NDPI, MRXS, SCN, BIF, ...) read by OpenSlide."""

    # On a fixed grid, the value of a pixel does not depend on the region: at levels with fractional downsampling, OpenSlide shifts
    # its result by a fraction of a pixel that depends on the corner.
    _TILE = 1024

    def __init__(self, path: Path) -> None:
        self._slide = openslide.OpenSlide(str(path))
        self.levels = [Level(width, height, self._TILE, self._TILE) for width, height in self._slide.level_dimensions]
        self.bounds = Bounds.of(self._slide.properties)

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

    def mpp_sources(self) -> list[MppSource]:
        """See `Reader`."""
        properties = self._slide.properties
        x, y = (properties.get(name) for name in (openslide.PROPERTY_NAME_MPP_X, openslide.PROPERTY_NAME_MPP_Y))
        vendor = properties.get(openslide.PROPERTY_NAME_VENDOR, "scanner")
        return from_axes(f"the {vendor} metadata", None if x is None else float(x), None if y is None else float(y))

    def close(self) -> None:
        """See `Reader`."""
        self._slide.close()


class ArrayReader:
    """An image that is decoded whole: PNG, JPEG, and TIFF layouts that cannot be read in parts."""

    bounds: Bounds | None = None

    def __init__(self, pixels: NDArray[np.uint8], sources: list[MppSource]) -> None:
        self._pixels = pixels
        self._sources = sources
        height, width = pixels.shape[:2]
        self.levels = [Level(width, height, width, height)]

    def tile(self, level: int, row: int, column: int) -> NDArray[np.uint8]:
        """See `Reader`."""
        return self._pixels

    def mpp_sources(self) -> list[MppSource]:
        """See `Reader`."""
        return self._sources

    def close(self) -> None:
        """See `Reader`."""
        self._pixels = np.empty((0, 0, 3), np.uint8)


def read_pillow(path: Path, max_pixels: int | None = None) -> ArrayReader:
    """Decode an image with Pillow and read um/px from its dpi.

    Raises
    ------
    InputError
        If the image is too large to be decoded whole or not RGB or gray. Errors of Pillow are passed on.
    """
    with open_pillow(path) as image:
        check_pixels(image.size, f"a {image.format}", max_pixels, n_bytes=7)  # 4 in Pillow, 3 in the array
        dpi = image.info.get("dpi")
        warn_of_orientation(path, image.getexif().get(ORIENTATION_TAG))
        pixels = _pillow_rgb(image, path)
    x, y = (UM_PER_INCH / float(v) if v else None for v in dpi) if dpi else (None, None)
    return ArrayReader(pixels, from_axes("the dpi of the image", x, y))


@contextmanager
def open_pillow(path: Path) -> Iterator[Image.Image]:
    """Read the header of an image without the limit of Pillow; call `check_pixels` before decoding."""
    with _PILLOWS_LIMIT:  # it is global, and applied when a header is read
        limit = Image.MAX_IMAGE_PIXELS
        Image.MAX_IMAGE_PIXELS = None
        try:
            image = Image.open(path)
        finally:
            Image.MAX_IMAGE_PIXELS = limit
    with image:
        yield image


def _pillow_rgb(image: Image.Image, path: Path) -> NDArray[np.uint8]:
    if image.mode.startswith("I"):  # 16-bit gray; older files open as "I"
        samples = np.asarray(image).astype(np.uint16)
        grey = to_uint8(samples, used_bits(path, int(samples.max(initial=0)), 16))
        return np.repeat(grey[..., None], 3, axis=2)
    if image.mode in ("RGB", "RGBA", "LA") and _is_deep_png(path):
        return _deep_rgb(path)
    if image.mode == "F":
        raise InputError("contains floating point pixels; give an RGB image with 8 or 16 bits")
    alpha_bits = None
    if image.has_transparency_data:
        top = max(np.asarray(rows.convert("RGBA"))[..., 3].max() for _, rows in _bands(image))
        alpha_bits = opacity_bits(path, int(top), 8)
    pixels = np.empty((image.height, image.width, 3), np.uint8)
    for place, rows in _bands(image):
        if alpha_bits is None:
            pixels[place] = np.asarray(rows.convert("RGB"))
        else:
            rgba = np.asarray(rows.convert("RGBA"))
            pixels[place] = composite(rgba[..., :3], rgba[..., 3])
    return pixels


def _bands(image: Image.Image) -> Iterator[tuple[slice, Image.Image]]:
    """Bands of an image: converting and copying all of it at once would take several times its memory."""
    n_rows = max(1, _PIXELS_AT_ONCE // image.width)
    for top in range(0, image.height, n_rows):
        bottom = min(top + n_rows, image.height)
        yield slice(top, bottom), image.crop((0, top, image.width, bottom))


def _is_deep_png(path: Path) -> bool:
    """Whether a file is a PNG of 16 bits a color, by its header: Pillow's image does not say."""
    with path.open("rb") as file:
        head = file.read(25)
    return head.startswith(b"\x89PNG") and head[24:] == b"\x10"


def _deep_rgb(path: Path) -> NDArray[np.uint8]:
    """A PNG of 16 bits a color, of which Pillow would read the upper eight."""
    import imagecodecs

    samples = imagecodecs.png_decode(path.read_bytes())
    n_colours = 1 if samples.shape[2] == 2 else 3
    colours, alpha = samples[..., :n_colours], samples[..., n_colours:]
    rgb = to_uint8(colours, used_bits(path, int(colours.max(initial=0)), 16))
    rgb = np.repeat(rgb, 3, axis=2) if n_colours == 1 else rgb
    if alpha.size and (bits := opacity_bits(path, int(alpha.max()), 16)) is not None:
        return composite(rgb, to_uint8(alpha[..., 0], bits))
    return np.ascontiguousarray(rgb)
