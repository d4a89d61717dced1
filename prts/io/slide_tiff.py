"""TIFF, BigTIFF and OME-TIFF: only the tiles or strips that a region touches are decoded."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tifffile
from numpy.typing import NDArray
from PIL import Image

from prts.errors import InputError
from prts.io.limits import check_pixels
from prts.io.mpp import MppSource, tiff_sources
from prts.io.slide_bounds import Bounds
from prts.io.slide_readers import (
    ArrayReader,
    Level,
    Reader,
    composite,
    opacity_bits,
    to_uint8,
    used_bits,
    warn_of_orientation,
    warn_once,
)

# Tiles that are looked at to see which bits are used and whether anything is opaque.
_PEEKED = 64

# Uncompressed images are read in strips of about this size, regardless of the strips in the file.
_STRIP_BYTES = 1 << 21

_MINISWHITE, _RGB, _PALETTE, _CMYK, _YCBCR = 0, 2, 3, 5, 6
_ASSOCIATED_ALPHA, _UNASSOCIATED_ALPHA = 1, 2
# These decoders convert YCbCr to RGB themselves: old and new JPEG, JPEG 2000 (also of Aperio), JPEG XR, WebP.
_CONVERTING = {6, 7, 22610, 33004, 33005, 34712, 34892, 34934, 50001}


@dataclass(frozen=True)
class _Plane:
    """Samples of every pixel stored together: a page, or one color of a page with separate planes."""

    page: Any
    first: int  # index of the first segment of the plane
    offset: int  # bytes from the data of the page to the plane, if the page is uncompressed
    samples: int


@dataclass(frozen=True)
class _Samples:
    """How the samples of a page are to be understood."""

    bits: int
    alpha_bits: int | None = None  # None: alpha is ignored


class TiffReader:
    """The largest image of a TIFF and its pyramid, if any (SubIFDs, or pages of decreasing size)."""

    bounds: Bounds | None = None

    def __init__(self, path: Path, max_pixels: int | None = None) -> None:
        self._path = path
        self._tif, self._series = _largest_image(path)
        try:
            self._open(max_pixels)
        except BaseException:
            self._tif.close()
            raise

    def _open(self, max_pixels: int | None) -> None:
        series = self._series
        planes = [_planes(level) for level in series.levels]
        if planes[0] is None:
            raise _NotInParts
        self._planes = [level for level in planes if level is not None]
        self._in_rows = [all(p.page.is_final and not p.page.is_tiled for p in level) for level in self._planes]
        self.levels = [_level(level[0].page, rows) for level, rows in zip(self._planes, self._in_rows, strict=True)]
        for grid, in_rows in zip(self.levels, self._in_rows, strict=True):
            if not in_rows:
                check_pixels((grid.tile_width, grid.tile_height), "one compressed piece", max_pixels)
        size = self._tif.filehandle.size
        for level, grid, in_rows in zip(self._planes, self.levels, self._in_rows, strict=True):
            if not all(_is_complete(plane, grid, in_rows, size) for plane in level):
                raise InputError("truncated, some pixels are missing; get a complete copy")
        self._meaning = self._peek()

    def _peek(self) -> _Samples:
        """Look at tiles of the coarsest level for what the tags do not tell."""
        page, level = self._series.keyframe, len(self.levels) - 1
        warn_of_orientation(self._path, _tag(page, "Orientation"))
        _warn_of_stack(self._path, self._series)
        if page.bitspersample != 16 and not _has_alpha(page):
            return _Samples(page.bitspersample)
        grid = self.levels[level]
        n_rows, n_columns = -(-grid.height // grid.tile_height), -(-grid.width // grid.tile_width)
        parts = []
        for index in np.unique(np.linspace(0, n_rows * n_columns - 1, _PEEKED).astype(int)):
            try:
                part = self._samples(level, *divmod(int(index), n_columns))
            except Exception:  # noqa: BLE001  (named with its row and column when it is read)
                continue
            if part is not None:
                parts.append(part)
        return _meaning(self._path, page, parts)

    def tile(self, level: int, row: int, column: int) -> NDArray[np.uint8]:
        """See `Reader`."""
        shape = self._shape(level, row, column)
        samples = self._samples(level, row, column)
        if samples is None:
            return np.full((*shape, 3), 255, np.uint8)  # sparse files omit empty glass
        rgb = _to_rgb(self._planes[level][0].page, samples, self._meaning)
        if rgb.shape != (*shape, 3):
            raise ValueError("a tile has other samples than its page")
        return rgb

    def _shape(self, level: int, row: int, column: int) -> tuple[int, int]:
        grid = self.levels[level]
        top, left = row * grid.tile_height, column * grid.tile_width
        return min(grid.tile_height, grid.height - top), min(grid.tile_width, grid.width - left)

    def _samples(self, level: int, row: int, column: int) -> NDArray[Any] | None:
        """The samples (h, w, n) of a tile as they are stored; None if the file omits it."""
        grid, shape = self.levels[level], self._shape(level, row, column)
        top = row * grid.tile_height
        index = row * -(-grid.width // grid.tile_width) + column
        planes = self._planes[level]
        parts = [self._rows(p, top, shape) if self._in_rows[level] else self._segment(p, index, shape) for p in planes]
        found = [part for part in parts if part is not None]
        if len(found) < len(parts):
            return None
        return found[0] if len(found) == 1 else np.concatenate(found, axis=2)

    def _rows(self, plane: _Plane, top: int, shape: tuple[int, int]) -> NDArray[Any]:
        dtype = np.dtype(plane.page.parent.byteorder + plane.page.dtype.char)
        row_bytes = shape[1] * plane.samples * dtype.itemsize
        data = self._read(plane.page.dataoffsets[0] + plane.offset + top * row_bytes, shape[0] * row_bytes)
        return np.frombuffer(data, dtype).reshape(*shape, plane.samples)

    def _segment(self, plane: _Plane, index: int, shape: tuple[int, int]) -> NDArray[Any] | None:
        page, index = plane.page, plane.first + index
        n_bytes = page.databytecounts[index]
        if n_bytes == 0:
            return None
        data = self._read(page.dataoffsets[index], n_bytes)
        if page.compression in (6, 7):
            pixels = page.decode(data, index, jpegtables=page.jpegtables, jpegheader=page.jpegheader)[0]
        else:
            pixels = page.decode(data, index)[0]
        if pixels is None or pixels.shape[1] < shape[0] or pixels.shape[2] < shape[1]:
            raise ValueError("a tile has too few pixels")
        cut: NDArray[Any] = pixels[0, : shape[0], : shape[1]]
        return cut

    def _read(self, offset: int, n_bytes: int) -> bytes:
        handle = self._tif.filehandle
        handle.seek(offset)
        data: bytes = handle.read(n_bytes)
        if len(data) < n_bytes:
            raise ValueError("the file ends within a tile")
        return data

    def mpp_sources(self) -> list[MppSource]:
        """See `Reader`."""
        return tiff_sources(self._tif, self._series.keyframe)

    def close(self) -> None:
        """See `Reader`."""
        self._tif.close()


class _NotInParts(Exception):  # noqa: N818 - never leaves this module
    """The layout of the samples is one that only tifffile can assemble, from the whole image."""


def check_tiles(path: Path) -> None:
    """Refuse a TIFF of a scanner whose tiles are missing or beyond its end, on which OpenSlide may crash.

    Raises
    ------
    InputError
        If the file is truncated.
    """
    with tifffile.TiffFile(path, _multifile=False) as tif:
        if tif.is_ndpi:  # stores the upper halves of its offsets elsewhere
            return
        size = tif.filehandle.size
        page: Any
        for page in tif.pages:
            if not page.is_tiled:
                continue
            tiles = -(-page.imagewidth // page.tilewidth) * -(-page.imagelength // page.tilelength)
            tiles *= page.samplesperpixel if page.planarconfig == 2 else 1
            offsets, n_bytes = (np.array(table, np.uint64) for table in (page.dataoffsets, page.databytecounts))
            if not len(offsets) == len(n_bytes) == tiles:
                raise InputError(f"lists {len(offsets):,} of {tiles:,} tiles; get a complete copy")
            if ((offsets > size) | (n_bytes > size) | (offsets + n_bytes > size)).any():
                raise InputError("truncated, some pixels are missing; get a complete copy")


def open_tiff(path: Path, max_pixels: int | None = None) -> Reader:
    """Open a TIFF of any kind.

    Raises
    ------
    InputError
        If it is not an RGB or gray image, or is truncated. Errors of tifffile are passed on.
    """
    try:
        return TiffReader(path, max_pixels)
    except _NotInParts:
        return _read_whole(path, max_pixels)


def _largest_image(path: Path) -> tuple[tifffile.TiffFile, tifffile.TiffPageSeries]:
    """A TIFF and the largest of its images; three gray pages are one, also if each was written as an image of its own."""

    def opened(is_shaped: bool | None = None) -> tuple[tifffile.TiffFile, tifffile.TiffPageSeries]:
        # without companion files that OME-XML may name
        tif = tifffile.TiffFile(path, _multifile=False, is_shaped=is_shaped)
        try:
            return tif, max(tif.series, key=lambda s: s.keyframe.imagewidth * s.keyframe.imagelength)
        except BaseException:
            tif.close()
            raise

    tif, series = opened()
    alike = [s for s in tif.series if s.shape == series.shape and s.axes == "YX" == series.axes]
    if len(alike) != 3 or not tif.is_shaped:
        return tif, series
    tif.close()
    return opened(is_shaped=False)


def _axes(series: tifffile.TiffPageSeries) -> str:
    """Axes of an image; a stack of three gray images is taken for red, green and blue, as ImageJ saves them."""
    stack = [axis for axis, n in zip(series.axes, series.shape, strict=True) if n > 1 and axis not in "YXSC"]
    page: Any = series.keyframe
    if len(stack) != 1 or page.samplesperpixel != 1 or series.shape[series.axes.index(stack[0])] != 3:
        return series.axes
    if any(n > 1 for axis, n in zip(series.axes, series.shape, strict=True) if axis in "SC"):
        return series.axes
    return series.axes.replace("C", "_").replace(stack[0], "C")


def _warn_of_stack(path: Path, series: tifffile.TiffPageSeries) -> None:
    if _axes(series) != series.axes:
        warn_once(f"{path}: its three gray images are read as red, green and blue; save it as RGB if they are not")


def _tag(page: Any, name: str) -> object:
    tag = page.tags.get(name)
    return None if tag is None else tag.value


def _has_alpha(page: Any) -> bool:
    return bool(page.extrasamples) and page.extrasamples[-1] in (_ASSOCIATED_ALPHA, _UNASSOCIATED_ALPHA)


def _meaning(path: Path, page: Any, parts: list[NDArray[Any]]) -> _Samples:
    """How to understand samples, from some of them, (h, w, n) each."""
    alpha = _has_alpha(page) and all(part.shape[2] in (2, 4) for part in parts)
    bits = alpha_bits = page.bitspersample
    if alpha and parts and page.dtype.kind == "u":
        alpha_bits = opacity_bits(path, max(int(part[..., -1].max(initial=0)) for part in parts), alpha_bits)
    if bits == 16 and page.dtype == np.uint16 and page.photometric not in (_PALETTE, _CMYK):
        colours = [part[..., :-1] if alpha else part for part in parts]
        bits = used_bits(path, max((int(part.max(initial=0)) for part in colours), default=0), bits)
    return _Samples(bits, alpha_bits)


def _planes(level: tifffile.TiffPageSeries) -> list[_Plane] | None:
    """Planes whose samples together are the pixels of a level; None if it must be read whole."""
    axes = _axes(level)
    sizes = {axis: n for axis, n in zip(axes, level.shape, strict=True) if n > 1}
    stack = {axis: n for axis, n in sizes.items() if axis not in "YXSC"}
    if stack:
        raise InputError(
            f"a stack of {np.prod(list(stack.values()))} images; give one H&E image, saved as RGB (in ImageJ: Image, Type, RGB Color)"
        )
    page: Any = level.keyframe
    channels, samples = sizes.get("C", 1), page.samplesperpixel
    n = channels * samples if "S" in sizes or samples == 1 else channels
    is_alpha = bool(page.extrasamples) and page.extrasamples[-1] in (_ASSOCIATED_ALPHA, _UNASSOCIATED_ALPHA)
    if not (n in (1, 3) or (n == 2 and is_alpha) or (n == 4 and page.photometric in (_RGB, _CMYK))):
        raise InputError(f"has {n} channels, like a fluorescence image; give an H&E image in RGB or gray")
    if page.imagedepth > 1:
        return None
    pages = list(level.pages)
    if channels > 1:
        if samples > 1 or len(pages) != channels or any(p is None for p in pages) or axes[-2:] != "YX":
            return None
        return [_Plane(p.aspage(), 0, 0, 1) for p in pages if p is not None]
    if len(pages) != 1:
        return None
    if page.planarconfig == 1 or samples == 1:
        return [_Plane(page, 0, 0, samples)]
    segments = len(page.dataoffsets) // samples
    plane_bytes = page.imagelength * page.imagewidth * page.dtype.itemsize
    return [_Plane(page, s * segments, s * plane_bytes, 1) for s in range(samples)]


def _level(page: Any, in_rows: bool) -> Level:
    width, height = page.imagewidth, page.imagelength
    if in_rows:
        row_bytes = width * page.samplesperpixel * page.dtype.itemsize
        return Level(width, height, width, min(height, max(1, _STRIP_BYTES // row_bytes)))
    if page.is_tiled:
        return Level(width, height, page.tilewidth, page.tilelength)
    return Level(width, height, width, min(height, page.rowsperstrip))


def _is_complete(plane: _Plane, grid: Level, in_rows: bool, file_size: int) -> bool:
    page = plane.page
    offsets, byte_counts = page.dataoffsets, page.databytecounts
    if min(grid.width, grid.height, grid.tile_width, grid.tile_height) < 1 or len(offsets) == 0:
        return False
    if in_rows:
        n_bytes = grid.width * grid.height * plane.samples * page.dtype.itemsize
        return bool(offsets[0] + plane.offset + n_bytes <= file_size)
    n_tiles = -(-grid.width // grid.tile_width) * -(-grid.height // grid.tile_height)
    if min(len(offsets), len(byte_counts)) < plane.first + n_tiles:
        return False
    return all(offset + n_bytes <= file_size for offset, n_bytes in zip(offsets, byte_counts, strict=False))


def _to_rgb(page: Any, samples: NDArray[Any], meaning: _Samples) -> NDArray[np.uint8]:
    """Convert samples (h, w, n) of a page to RGB on white."""
    if page.photometric == _PALETTE:
        table = to_uint8(np.asarray(page.colormap, np.uint16), 16).T
        return np.asarray(table[samples[..., 0]])
    n_alpha = 1 if _has_alpha(page) and samples.shape[2] in (2, 4) else 0
    pixels = to_uint8(samples, meaning.bits)
    if n_alpha and meaning.alpha_bits is not None and meaning.alpha_bits != meaning.bits:
        pixels = np.concatenate([pixels[..., :-1], to_uint8(samples[..., -1:], meaning.alpha_bits)], axis=2)
    n = pixels.shape[2]
    if page.photometric == _CMYK and n == 4:
        return np.asarray(Image.fromarray(np.ascontiguousarray(pixels), "CMYK").convert("RGB"))
    if page.photometric == _YCBCR and n == 3 and page.compression not in _CONVERTING:
        return np.asarray(Image.fromarray(np.ascontiguousarray(pixels), "YCbCr").convert("RGB"))
    if page.photometric == _MINISWHITE:
        pixels = 255 - pixels
    rgb = np.repeat(pixels[..., :1], 3, axis=2) if n < 3 else pixels[..., :3]
    if n_alpha and meaning.alpha_bits is not None:
        return composite(rgb, pixels[..., -1], premultiplied=page.extrasamples[-1] == _ASSOCIATED_ALPHA)
    return np.ascontiguousarray(rgb)


def _read_whole(path: Path, max_pixels: int | None) -> ArrayReader:
    tif, series = _largest_image(path)
    with tif:
        page = series.keyframe
        check_pixels((page.imagewidth, page.imagelength), "an unusual layout", max_pixels)
        warn_of_orientation(path, _tag(page, "Orientation"))
        _warn_of_stack(path, series)
        axes, pixels = _axes(series), series.asarray()
        order = [axis for axis in axes if axis in "YXCS"]
        pixels = pixels.reshape([n for axis, n in zip(axes, series.shape, strict=True) if axis in order])
        last = [order.index(axis) for axis in "YXCS" if axis in order]
        pixels = pixels.transpose(last).reshape(*(pixels.shape[i] for i in last[:2]), -1)
        rgb = _to_rgb(page, pixels, _meaning(path, page, [pixels]))
        return ArrayReader(rgb, tiff_sources(tif, series.keyframe))
