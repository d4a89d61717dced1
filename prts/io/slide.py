"""Slides: any H&E image, read region by region at a wanted um/px."""

from __future__ import annotations

import logging
import math
import threading
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

import numpy as np
import openslide
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from prts.errors import InputError
from prts.io.mpp import MPP_RANGE, Source, is_plausible, resolve_mpp
from prts.io.orientation import UPRIGHT, Orientation
from prts.io.slide_readers import Level, OpenSlideReader, Reader, read_pillow
from prts.io.slide_tiff import open_tiff, require_whole_tiles

logger = logging.getLogger(__name__)

# Decoded tiles kept: two neighbouring bands of a large slide share a row of tiles, which this holds.
_CACHE_BYTES = 256 << 20
# Resampling goes in blocks of 256 x 256 pixels, or of half, a quarter, ... where these would need a wider part of the image.
_BLOCK = 256
_MAX_SOURCE = 4096
# A level up to 1 % coarser than wanted counts as fine enough: a pyramid of 0.2506 um/px serves 0.5 from its level 1.
_LEVEL_TOLERANCE = 1.01
_TIFF_MAGIC = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")


class StainTransform(Protocol):
    """What changes the colours of pixels as they are read, such as `prts.preprocess.stains.base.StainMatching`."""

    def __call__(self, rgb: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """The same pixels in other colours, (..., 3)."""
        ...

    def settings(self) -> dict[str, Any]:
        """All that decides on the colours beside the slide."""
        ...


class Slide:
    """An H&E image, opened by `open_slide`; a context manager.

    Attributes
    ----------
    path
        The file.
    width, height
        Full-resolution pixels, as the slide is read.
    file_size
        Width and height as the image lies in its file.
    orientation
        How it is turned and mirrored from there; all regions are of the turned slide.
    mpp
        um per full-resolution pixel.
    mpp_source
        Where `mpp` stands.
    recolour
        Changes the colours of what `read_region` returns, where there is one. The thumbnail shows the slide as it is.
    """

    recolour: StainTransform | None = None

    def __init__(
        self, path: Path, reader: Reader, mpp: float, mpp_source: str, orientation: Orientation = UPRIGHT
    ) -> None:
        self.path = path
        self.mpp = mpp
        self.mpp_source = mpp_source
        self.orientation = orientation
        self._reader = reader
        full = reader.levels[0]
        self.file_size = full.width, full.height
        self.width, self.height = orientation.size(*self.file_size)
        factors = [_level_factors(full, level) for level in reader.levels]
        self._factors = [orientation.size(*factor) for factor in factors]
        self._starts = [
            _level_start(full, level, factor, orientation) for level, factor in zip(reader.levels, factors, strict=True)
        ]
        self._tiles: OrderedDict[tuple[int, int, int], NDArray[np.uint8]] = OrderedDict()
        self._tiles_bytes = 0
        self._lock = threading.Lock()

    def __enter__(self) -> Slide:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Release the file and the decoded tiles."""
        with self._lock:
            self._tiles.clear()
            self._tiles_bytes = 0
            self._reader.close()

    def size_at(self, mpp: float) -> tuple[int, int]:
        """Width and height of the whole image at another um/px, in whole pixels."""
        scale = self.mpp / _checked(mpp)
        return max(1, round(self.width * scale)), max(1, round(self.height * scale))

    def read_region(
        self, x: int, y: int, width: int, height: int, mpp: float | None = None, *, outside: int = 255
    ) -> NDArray[np.uint8]:
        """Pixels of a region at a wanted um/px.

        The grid of pixels at that um/px starts at the image's top left corner, and a pixel's value depends on its
        place on this grid only: regions side by side are what one large region gives. Resampling is bicubic, with
        antialiasing where it reduces, from the coarsest level of the pyramid that is at least as fine.

        Parameters
        ----------
        x, y
            Left column and top row on the grid at `mpp`; may be negative.
        width, height
            Size on the same grid; the region may reach outside the image on every side.
        mpp
            Wanted um/px; full resolution if left out.
        outside
            Grey level of what lies outside the image: white (255), the colour of empty glass, unless told; `outside=0`
            is the paper's zero. The image is padded before it is resampled, so at its edge the two blend.

        Returns
        -------
        RGB, (height, width, 3).

        Raises
        ------
        InputError
            If the file turns out to be truncated or corrupt there.
        """
        pixels = self._read(x, y, width, height, mpp, outside)
        return pixels if self.recolour is None else self.recolour(pixels)

    def _read(self, x: int, y: int, width: int, height: int, mpp: float | None, outside: int) -> NDArray[np.uint8]:
        if width < 0 or height < 0:
            raise ValueError(f"a region of {width} x {height} pixels")
        scale = 1.0 if mpp is None else _checked(mpp) / self.mpp
        level = max(i for i, factors in enumerate(self._factors) if i == 0 or max(factors) <= scale * _LEVEL_TOLERANCE)
        step = (scale / self._factors[level][0], scale / self._factors[level][1])
        if step == (1.0, 1.0) and self._starts[level] == (0.0, 0.0):
            return self._window(level, x, y, width, height, outside)
        return self._resample(x, y, width, height, level, step, outside)

    def thumbnail(self, max_side: int) -> NDArray[np.uint8]:
        """The whole image, reduced (never enlarged) until no side is longer than `max_side` pixels."""
        mpp = self.mpp * max(1.0, max(self.width, self.height) / max_side)
        width, height = self.size_at(mpp)
        return self._read(0, 0, width, height, mpp, 255)

    def _resample(
        self, x: int, y: int, width: int, height: int, level: int, step: tuple[float, float], outside: int
    ) -> NDArray[np.uint8]:
        """A region of the grid that has `step` pixels of the level to a pixel, in blocks whose place is fixed on this grid.

        Whatever region asks for a pixel, it comes from the same block and so is the same to the last bit.
        """
        out = np.empty((height, width, 3), np.uint8)
        size = _BLOCK
        while size > 1 and size * max(step) > _MAX_SOURCE:
            size //= 2
        for top in range(y // size * size, y + height, size):
            rows = slice(max(top, y), min(top + size, y + height))
            for left in range(x // size * size, x + width, size):
                columns = slice(max(left, x), min(left + size, x + width))
                block = self._block(left, top, size, level, step, outside)
                out[_shift(rows, y), _shift(columns, x)] = block[_shift(rows, top), _shift(columns, left)]
        return out

    def _block(
        self, x: int, y: int, size: int, level: int, step: tuple[float, float], outside: int
    ) -> NDArray[np.uint8]:
        start = self._starts[level]
        left, right = _with_margin(x, size, step[0], start[0])
        top, bottom = _with_margin(y, size, step[1], start[1])
        window = self._window(level, left, top, right - left, bottom - top, outside)
        # One axis after the other: given both at once, Pillow takes them in the order that is cheaper for the window's shape
        from_left, from_top = start[0] + left, start[1] + top
        across = (x * step[0] - from_left, 0, (x + size) * step[0] - from_left, bottom - top)
        down = (0, y * step[1] - from_top, size, (y + size) * step[1] - from_top)
        narrow = Image.fromarray(window).resize((size, bottom - top), Image.Resampling.BICUBIC, across)
        return np.asarray(narrow.resize((size, size), Image.Resampling.BICUBIC, down))

    def _window(self, level: int, x: int, y: int, width: int, height: int, outside: int) -> NDArray[np.uint8]:
        """Pixels of a level as they are read, turned from where they lie in the file: the same to the last bit."""
        grid = self._reader.levels[level]
        place = self.orientation.window(x, y, width, height, (grid.width, grid.height))
        return self.orientation.pixels(self._window_in_file(level, *place, outside))

    def _window_in_file(self, level: int, x: int, y: int, width: int, height: int, outside: int) -> NDArray[np.uint8]:
        """Pixels of a level, put together from its tiles."""
        grid = self._reader.levels[level]
        window = np.full((height, width, 3), outside, np.uint8)
        x0, x1 = max(x, 0), min(x + width, grid.width)
        y0, y1 = max(y, 0), min(y + height, grid.height)
        if x0 >= x1 or y0 >= y1:
            return window
        for row in range(y0 // grid.tile_height, (y1 - 1) // grid.tile_height + 1):
            top = row * grid.tile_height
            a, b = max(y0, top), min(y1, top + grid.tile_height)
            for column in range(x0 // grid.tile_width, (x1 - 1) // grid.tile_width + 1):
                left = column * grid.tile_width
                c, d = max(x0, left), min(x1, left + grid.tile_width)
                tile = self._tile(level, row, column)
                window[a - y : b - y, c - x : d - x] = tile[a - top : b - top, c - left : d - left]
        return window

    def _tile(self, level: int, row: int, column: int) -> NDArray[np.uint8]:
        key = (level, row, column)
        with self._lock:
            if key in self._tiles:
                self._tiles.move_to_end(key)
                return self._tiles[key]
            try:
                tile = self._reader.tile(level, row, column)
            except InputError as error:
                raise InputError(f"{self.path}: {error}") from error
            except Exception as error:
                raise InputError(
                    f"{self.path}: truncated or corrupt, the tile in row {row}, column {column} cannot be decoded "
                    f"({_reason(error)}); get a complete copy"
                ) from error
            self._tiles[key] = tile
            self._tiles_bytes += tile.nbytes
            while self._tiles_bytes > _CACHE_BYTES and len(self._tiles) > 1:
                self._tiles_bytes -= self._tiles.popitem(last=False)[1].nbytes
            return tile


def open_slide(
    path: Path | str,
    *,
    mpp: float | None = None,
    sources: Sequence[Source] = (),
    orientation: Orientation = UPRIGHT,
) -> Slide:
    """Open an H&E image: TIFF, BigTIFF, OME-TIFF, what OpenSlide reads (SVS, NDPI, MRXS, ...), PNG or JPEG.

    Only what a region touches is decoded, except from PNG, JPEG and TIFFs in a single compressed strip.

    Parameters
    ----------
    path
        The image.
    mpp
        um per full-resolution pixel, where the user says it.
    sources
        um/px that the section's other files give, such as `microns_per_pixel` of scalefactors_json.json.
    orientation
        How the slide is to be read.

    Returns
    -------
    The slide. Its `mpp` is the first there is of: `mpp`, `sources`, OME, Aperio or OpenSlide metadata, TIFF
    resolution or dpi tags. Metadata outside 0.05-5 um/px, such as a default of 72 dpi, is no source.

    Raises
    ------
    InputError
        If the file is missing, no image, truncated, or no RGB or grey one; if no source gives um/px, or two of them
        differ by more than 2 %.
    """
    path = Path(path)
    if mpp is not None and not is_plausible(mpp):
        raise InputError(
            f"mpp={mpp}: no microscope's um per pixel; it must be within {MPP_RANGE[0]:g}-{MPP_RANGE[1]:g}"
        )
    reader = _open_reader(path)
    try:
        given: list[Source] = [] if mpp is None else [("mpp=", mpp)]
        source, value = resolve_mpp(path, [*given, *sources, *_own_sources(path, reader)])
    except BaseException:
        reader.close()
        raise
    logger.debug("%s: %.4g um/px from %s", path, value, source)
    return Slide(path, reader, value, source, orientation)


def _own_sources(path: Path, reader: Reader) -> list[Source]:
    """What the image itself says of its um/px."""
    try:
        return reader.mpp_sources()
    except (
        TypeError,
        ValueError,
        LookupError,
        ArithmeticError,
    ) as error:  # a tag may hold values of any kind and number
        raise InputError(
            f"{path}: its tags of um/px cannot be read ({_reason(error)}); get a complete copy, or save it anew"
        ) from error


def image_size(path: Path) -> tuple[int, int]:
    """Width and height of an image's full resolution, px, whatever its um/px.

    Raises
    ------
    InputError
        If the file is missing or no image.
    """
    reader = _open_reader(Path(path))
    try:
        return reader.levels[0].width, reader.levels[0].height
    finally:
        reader.close()


def _open_reader(path: Path) -> Reader:
    if path.is_dir():
        raise InputError(f"{path}: is a folder; the image file itself is needed")
    if not path.is_file():
        raise InputError(f"{path}: no such file; an H&E image is needed")
    try:
        with path.open("rb") as handle:
            magic = handle.read(4)
        if not magic:
            raise InputError("is empty; get a complete copy")
        vendor = openslide.OpenSlide.detect_format(str(path))
        if vendor not in (None, "generic-tiff"):
            if magic in _TIFF_MAGIC:
                require_whole_tiles(path)
            return OpenSlideReader(path)
        return open_tiff(path) if magic in _TIFF_MAGIC else read_pillow(path)
    except InputError as error:
        raise InputError(str(error) if str(error).startswith(str(path)) else f"{path}: {error}") from error
    except UnidentifiedImageError as error:
        raise InputError(
            f"{path}: is no image, whatever its name says, or a damaged one; TIFF, SVS, NDPI, MRXS, SCN, BIF, PNG and JPEG are read"
        ) from error
    except OSError as error:
        if isinstance(error, PermissionError):
            raise InputError(f"{path}: may not be read ({error.strerror})") from error
        raise InputError(f"{path}: no image that can be read, or a damaged one ({_reason(error)})") from error
    except Exception as error:
        raise InputError(f"{path}: no image that can be read, or a damaged one ({_reason(error)})") from error


def _reason(error: Exception) -> str:
    return str(error) or type(error).__name__


def _checked(mpp: float) -> float:
    if not (math.isfinite(mpp) and mpp > 0):
        raise InputError(f"mpp={mpp}: must be a positive number of um per pixel")
    return mpp


def _shift(place: slice, origin: int) -> slice:
    return slice(place.start - origin, place.stop - origin)


def _with_margin(first: int, length: int, step: float, start: float) -> tuple[int, int]:
    """The pixels that `length` pixels of `step` draw on: the cubic kernel reaches two (output) pixels to either side."""
    margin = 2 * max(1.0, step) + 1
    return math.floor(first * step - start - margin), math.ceil((first + length) * step - start + margin)


def _level_factors(full: Level, level: Level) -> tuple[float, float]:
    """Full-resolution pixels to a level's pixel, along x and y.

    Writers halve the image and round its size, so the ratio of the sizes is a little off the true, whole factor: over
    the width of a slide that would shift the pixels.
    """
    whole = round(full.width / level.width)
    if abs(whole * level.width - full.width) <= whole and abs(whole * level.height - full.height) <= whole:
        return float(whole), float(whole)
    return full.width / level.width, full.height / level.height


def _level_start(
    full: Level, level: Level, factor: tuple[float, float], orientation: Orientation
) -> tuple[float, float]:
    """Where the first pixel of a level begins as it is read, in its pixels: off 0 where rounding its size fell on a mirrored side."""
    rest = orientation.size(full.width / factor[0] - level.width, full.height / factor[1] - level.height)
    across, down = orientation.mirrors
    return rest[0] if across else 0.0, rest[1] if down else 0.0
