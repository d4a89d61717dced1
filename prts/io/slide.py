"""Slides: H&E images in any format, read region by region at any um/px."""

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

from prts.errors import InputError, ParameterError
from prts.io.mpp import MPP_RANGE, MppSource, is_plausible, resolve_mpp
from prts.io.orientation import UPRIGHT, Orientation
from prts.io.slide_paths import refuse_thumbnail, slide_of
from prts.io.slide_readers import Level, OpenSlideReader, Reader, read_pillow
from prts.io.slide_tiff import check_tiles, open_tiff
from prts.io.slide_zarr import ZarrReader, is_zarr_image

logger = logging.getLogger(__name__)

# Cache of decoded tiles: holds the row of tiles that two adjacent bands of a large slide share.
_CACHE_BYTES = 256 << 20
# Resampling works in blocks of 256 x 256 pixels, or smaller ones if these would need a larger part of the image.
_BLOCK = 256
_MAX_SOURCE = 4096
# A level up to 1 % too coarse is accepted: a pyramid of 0.2506 um/px provides 0.5 from its level 1.
_LEVEL_TOLERANCE = 1.01
_TIFF_MAGIC = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")


class StainTransform(Protocol):
    """Changes the colors of pixels as they are read, such as stain matching."""

    def __call__(self, rgb: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Recolor pixels, (..., 3)."""
        ...

    def settings(self) -> dict[str, Any]:
        """Everything that determines the colors apart from the slide."""
        ...


class Look(Protocol):
    """Changes pixels as they are read in a way that depends on um/px and on the pixels around them, as a blur does."""

    def reach(self, mpp: float) -> int:
        """Pixels around a region that affect it."""
        ...

    def __call__(self, rgb: NDArray[np.uint8], mpp: float) -> NDArray[np.uint8]:
        """Change the pixels of a region, (h, w, 3), at this um/px."""
        ...

    def settings(self) -> dict[str, Any]:
        """Everything that determines the pixels apart from the slide."""
        ...


class Slide:
    """An H&E image, opened by `open_slide`; a context manager.

    Attributes
    ----------
    path
        The file.
    name
        Name in logs: the section's, else that of the file.
    width, height
        Size in full-resolution pixels, as the slide is read.
    file_size
        Width and height of the image in the file.
    orientation
        Rotation and flip as the slide is read; all regions are of the reoriented slide.
    bounds
        The part of the image file that was scanned, if that is not all of it.
    mpp
        um per full-resolution pixel.
    mpp_source
        Name of the source of `mpp`.
    max_pixels
        Limit on the size of images that are decoded whole; see `prts.io.limits`.
    recolour
        Changes the colors of `read_region`, if set. The thumbnail shows the original colors.
    look
        Changes the pixels of `read_region` after that, if set.
    """

    recolour: StainTransform | None = None
    look: Look | None = None
    max_pixels: int | None = None

    def __init__(
        self, path: Path, reader: Reader, mpp: float, mpp_source: str, orientation: Orientation = UPRIGHT
    ) -> None:
        self.path, self.name = path, path.stem
        self.mpp = mpp
        self.mpp_source = mpp_source
        self.orientation = orientation
        self.bounds = reader.bounds
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
        """Close the file and free the decoded tiles."""
        with self._lock:
            self._tiles.clear()
            self._tiles_bytes = 0
            self._reader.close()

    def size_at(self, mpp: float) -> tuple[int, int]:
        """Width and height of the whole image at another um/px, px."""
        scale = self.mpp / _checked(mpp)
        return max(1, round(self.width * scale)), max(1, round(self.height * scale))

    def read_region(
        self, x: int, y: int, width: int, height: int, mpp: float | None = None, *, outside: int = 255
    ) -> NDArray[np.uint8]:
        """Read a region at any um/px.

        The grid of pixels at that um/px starts at the top left corner of the image, and the value of a pixel depends only on its position
        on this grid: adjacent regions together equal one large region. Resampling is bicubic, with antialiasing if it reduces, from the
        coarsest level of the pyramid that is at least as fine.

        Parameters
        ----------
        x, y
            Left column and top row on the grid at `mpp`; may be negative.
        width, height
            Size on the same grid; the region may extend beyond the image.
        mpp
            um/px of the result; full resolution by default.
        outside
            Gray level outside the image: white (255), the color of empty glass, by default; the paper uses 0. The image is padded before it
            is resampled, so that both blend at its edge.

        Returns
        -------
        RGB, (height, width, 3).

        Raises
        ------
        InputError
            If the file is truncated or corrupt there.
        """
        if self.look is None:
            return self._recoloured(x, y, width, height, mpp, outside)
        at = self.mpp if mpp is None else mpp
        reach = self.look.reach(at)
        wide = self._recoloured(x - reach, y - reach, width + 2 * reach, height + 2 * reach, mpp, outside)
        return np.ascontiguousarray(self.look(wide, at)[reach : reach + height, reach : reach + width])

    def _recoloured(
        self, x: int, y: int, width: int, height: int, mpp: float | None, outside: int
    ) -> NDArray[np.uint8]:
        pixels = self._read(x, y, width, height, mpp, outside)
        return pixels if self.recolour is None else self.recolour(pixels)

    def _read(self, x: int, y: int, width: int, height: int, mpp: float | None, outside: int) -> NDArray[np.uint8]:
        if width < 0 or height < 0:
            raise ValueError(f"negative size of region: {width} x {height} pixels")
        scale = 1.0 if mpp is None else _checked(mpp) / self.mpp
        level = max(i for i, factors in enumerate(self._factors) if i == 0 or max(factors) <= scale * _LEVEL_TOLERANCE)
        step = (scale / self._factors[level][0], scale / self._factors[level][1])
        if step == (1.0, 1.0) and self._starts[level] == (0.0, 0.0):
            return self._window(level, x, y, width, height, outside)
        return self._resample(x, y, width, height, level, step, outside)

    def thumbnail(self, max_side: int) -> NDArray[np.uint8]:
        """The whole image, reduced until no side is longer than `max_side` pixels, never enlarged."""
        mpp = self.mpp * max(1.0, max(self.width, self.height) / max_side)
        width, height = self.size_at(mpp)
        return self._read(0, 0, width, height, mpp, 255)

    def _resample(
        self, x: int, y: int, width: int, height: int, level: int, step: tuple[float, float], outside: int
    ) -> NDArray[np.uint8]:
        """Resample a region of the grid with `step` pixels of the level per pixel, in blocks at fixed positions of this grid.

        A pixel comes from the same block for every region, and so is identical to the last bit.
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
        # One axis at a time: given both, Pillow chooses the cheaper order for the shape of the window
        from_left, from_top = start[0] + left, start[1] + top
        across = (x * step[0] - from_left, 0, (x + size) * step[0] - from_left, bottom - top)
        down = (0, y * step[1] - from_top, size, (y + size) * step[1] - from_top)
        narrow = Image.fromarray(window).resize((size, bottom - top), Image.Resampling.BICUBIC, across)
        return np.asarray(narrow.resize((size, size), Image.Resampling.BICUBIC, down))

    def _window(self, level: int, x: int, y: int, width: int, height: int, outside: int) -> NDArray[np.uint8]:
        """Pixels of a level as read: those of the file, reoriented without resampling."""
        grid = self._reader.levels[level]
        place = self.orientation.window(x, y, width, height, (grid.width, grid.height))
        return self.orientation.pixels(self._window_in_file(level, *place, outside))

    def _window_in_file(self, level: int, x: int, y: int, width: int, height: int, outside: int) -> NDArray[np.uint8]:
        """Pixels of a level, assembled from its tiles."""
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
                    f"{self.path}: truncated or corrupt, tile in row {row}, column {column} cannot be decoded "
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
    sources: Sequence[MppSource] = (),
    fallback: Sequence[MppSource] = (),
    orientation: Orientation = UPRIGHT,
    max_pixels: int | None = None,
) -> Slide:
    """Open an H&E image: TIFF, BigTIFF, OME-TIFF, OME-Zarr, formats of OpenSlide (SVS, NDPI, MRXS, ...), PNG or JPEG.

    Only the tiles that a region touches are decoded, except for PNG, JPEG and TIFF in a single compressed strip.

    Parameters
    ----------
    path
        The image.
    mpp
        um per full-resolution pixel, as given by the user.
    sources
        um/px in other files of the section, such as `microns_per_pixel` of scalefactors_json.json.
    fallback
        um/px that are used only if nothing else states them, and compared with nothing here.
    orientation
        Rotation and flip as the slide is read.
    max_pixels
        Limit on the size of images that must be decoded whole; 537 million px by default.

    Returns
    -------
    The slide. Its `mpp` is the first one of: `mpp`, `sources`, OME, Aperio or OpenSlide metadata, TIFF resolution or dpi tags,
    `fallback`. Metadata outside 0.05-5 um/px, such as a default of 72 dpi, is ignored. If metadata contradicts `mpp`, a warning names both.

    Raises
    ------
    InputError
        If the file is missing, truncated, or not an RGB or gray image; if nothing states um/px, or `mpp` is None and two sources
        differ by more than 2 %.
    """
    path = Path(path)
    if mpp is not None and not is_plausible(mpp):
        raise ParameterError(
            "", "mpp", f"{mpp} is out of range; give um per pixel within {MPP_RANGE[0]:g}-{MPP_RANGE[1]:g}"
        )
    reader = _open_reader(path, max_pixels)
    try:
        stated = [*sources, *_metadata_sources(path, reader, mpp)]
        if not any(is_plausible(value) for _, value in stated):
            stated = [*stated, *fallback]
        source, value = resolve_mpp(path, stated, mpp)
    except BaseException:
        reader.close()
        raise
    logger.debug("%s: %.4g um/px from %s", path, value, source)
    slide = Slide(path, reader, value, source, orientation)
    slide.max_pixels = max_pixels
    return slide


def reopen_slide(
    path: Path, mpp: MppSource, *, orientation: Orientation = UPRIGHT, max_pixels: int | None = None
) -> Slide:
    """Open an image whose um/px is settled, without comparing it with the metadata again.

    Parameters
    ----------
    path
        The image.
    mpp
        The source of its um/px, and the value.
    orientation, max_pixels
        As for `open_slide`.
    """
    slide = Slide(path, _open_reader(path, max_pixels), mpp[1], mpp[0], orientation)
    slide.max_pixels = max_pixels
    return slide


def _metadata_sources(path: Path, reader: Reader, given: float | None) -> list[MppSource]:
    try:
        return reader.mpp_sources()
    except (TypeError, ValueError, LookupError, ArithmeticError) as error:  # tags may contain anything
        if given is None:
            raise InputError(
                f"{path}: its um/px tags cannot be read ({_reason(error)}); set mpp to the value of the scanner"
            ) from error
        logger.warning("%s: its um/px tags cannot be read (%s); mpp=%.4g is used", path, _reason(error), given)
        return []


def image_size(path: Path, max_pixels: int | None = None) -> tuple[int, int]:
    """Width and height of an image at full resolution, px.

    Raises
    ------
    InputError
        If the file is missing or not an image.
    """
    reader = _open_reader(Path(path), max_pixels)
    try:
        return reader.levels[0].width, reader.levels[0].height
    finally:
        reader.close()


def _open_reader(path: Path, max_pixels: int | None) -> Reader:
    if not path.exists():
        raise InputError(f"{path}: no such file; give an H&E image")
    try:
        if path.is_dir():
            if is_zarr_image(path):
                return ZarrReader(path, max_pixels)
            raise InputError(f"is a folder; give {slide_of(path)}")
        with path.open("rb") as handle:
            magic = handle.read(4)
        if not magic:
            raise InputError("empty file; get a complete copy")
        refuse_thumbnail(path)
        vendor = openslide.OpenSlide.detect_format(str(path))
        if vendor not in (None, "generic-tiff"):
            if magic in _TIFF_MAGIC:
                check_tiles(path)
            return OpenSlideReader(path)
        return open_tiff(path, max_pixels) if magic in _TIFF_MAGIC else read_pillow(path, max_pixels)
    except ParameterError:
        raise
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    except UnidentifiedImageError as error:
        raise InputError(
            f"{path}: not an image, or damaged; give TIFF, SVS, NDPI, MRXS, SCN, BIF, PNG or JPEG"
        ) from error
    except PermissionError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); change its permissions") from error
    except Exception as error:
        raise InputError(f"{path}: the image cannot be read ({_reason(error)}); get a complete copy") from error


def _reason(error: Exception) -> str:
    return str(error) or type(error).__name__


def _checked(mpp: float) -> float:
    if not (math.isfinite(mpp) and mpp > 0):
        raise ParameterError("", "mpp", f"{mpp} is not valid; give a positive number of um per pixel")
    return mpp


def _shift(place: slice, origin: int) -> slice:
    return slice(place.start - origin, place.stop - origin)


def _with_margin(first: int, length: int, step: float, start: float) -> tuple[int, int]:
    """Range of source pixels of `length` output pixels: the cubic kernel extends two output pixels to either side."""
    margin = 2 * max(1.0, step) + 1
    return math.floor(first * step - start - margin), math.ceil((first + length) * step - start + margin)


def _level_factors(full: Level, level: Level) -> tuple[float, float]:
    """Full-resolution pixels per pixel of a level, along x and y.

    Programs halve the image and round its size, so that the ratio of the sizes differs slightly from the true, integer factor; across a
    slide, this would shift the pixels.
    """
    whole = round(full.width / level.width)
    if abs(whole * level.width - full.width) <= whole and abs(whole * level.height - full.height) <= whole:
        return float(whole), float(whole)
    return full.width / level.width, full.height / level.height


def _level_start(
    full: Level, level: Level, factor: tuple[float, float], orientation: Orientation
) -> tuple[float, float]:
    """Start of the first pixel of a level as read, in its pixels; not 0 if its size was rounded on a mirrored side."""
    rest = orientation.size(full.width / factor[0] - level.width, full.height / factor[1] - level.height)
    across, down = orientation.mirrors
    return rest[0] if across else 0.0, rest[1] if down else 0.0
