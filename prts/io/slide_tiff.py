"""TIFF, BigTIFF and OME-TIFF: the tiles or strips that a region touches are decoded, and no others."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tifffile
from numpy.typing import NDArray
from PIL import Image

from prts.errors import InputError
from prts.io.limits import allowed_pixels, require_decodable
from prts.io.mpp import Source, tiff_sources
from prts.io.slide_readers import ArrayReader, Level, Reader, composite, to_uint8

# Rows of an uncompressed image are read in strips of about this many bytes, however long the file's own strips are.
_STRIP_BYTES = 1 << 21

_MINISWHITE, _RGB, _PALETTE, _CMYK, _YCBCR = 0, 2, 3, 5, 6
_ASSOCIATED_ALPHA, _UNASSOCIATED_ALPHA = 1, 2
# These decoders turn YCbCr into RGB themselves: old and new JPEG, JPEG in Aperio's JPEG 2000 numbers, JPEG XR, WebP.
_CONVERTING = {6, 7, 22610, 33004, 33005, 34712, 34892, 34934, 50001}


@dataclass(frozen=True)
class _Plane:
    """Where some of the samples of every pixel are: a page, or one colour of a page that keeps them apart."""

    page: Any
    first: int  # the plane's first segment
    offset: int  # bytes from the page's data to the plane's, where the page is uncompressed
    samples: int


class TiffReader:
    """The largest image of a TIFF, with its pyramid where it has one (SubIFDs, or pages of falling size)."""

    def __init__(self, path: Path) -> None:
        # companion files that OME-XML may name are not followed
        self._tif = tifffile.TiffFile(path, _multifile=False)
        try:
            self._open()
        except BaseException:
            self._tif.close()
            raise

    def _open(self) -> None:
        require_sizes(self._tif)
        series = max(self._tif.series, key=lambda s: s.keyframe.imagewidth * s.keyframe.imagelength)
        self._series = series
        planes = [_planes(level) for level in series.levels]
        if planes[0] is None:
            raise _NotInParts
        self._planes = [level for level in planes if level is not None]
        self._in_rows = [all(p.page.is_final and not p.page.is_tiled for p in level) for level in self._planes]
        self.levels = [_level(level[0].page, rows) for level, rows in zip(self._planes, self._in_rows, strict=True)]
        for grid, in_rows in zip(self.levels, self._in_rows, strict=True):
            if not in_rows:
                require_decodable(grid.tile_width, grid.tile_height, "one compressed piece")
        size = self._tif.filehandle.size
        for level, grid, in_rows in zip(self._planes, self.levels, self._in_rows, strict=True):
            if not all(_is_complete(plane, grid, in_rows, size) for plane in level):
                raise InputError("is truncated: not all of its pixels lie within the file; get a complete copy")

    def tile(self, level: int, row: int, column: int) -> NDArray[np.uint8]:
        """See `Reader`."""
        grid = self.levels[level]
        top, left = row * grid.tile_height, column * grid.tile_width
        shape = (min(grid.tile_height, grid.height - top), min(grid.tile_width, grid.width - left))
        index = row * -(-grid.width // grid.tile_width) + column
        planes = self._planes[level]
        parts = [self._rows(p, top, shape) if self._in_rows[level] else self._segment(p, index, shape) for p in planes]
        found = [part for part in parts if part is not None]
        if len(found) < len(parts):
            return np.full((*shape, 3), 255, np.uint8)  # a sparse file leaves empty glass out
        rgb = _to_rgb(planes[0].page, found[0] if len(found) == 1 else np.concatenate(found, axis=2))
        if rgb.shape != (*shape, 3):
            raise ValueError("a tile holds other samples than its page says")
        return rgb

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
            if _jpeg_pixels(data) > allowed_pixels():  # its decoder would ask for memory for all of them
                raise ValueError("a tile says that it is larger than any")
            pixels = page.decode(data, index, jpegtables=page.jpegtables, jpegheader=page.jpegheader)[0]
        else:
            pixels = page.decode(data, index)[0]
        if pixels is None or pixels.shape[1] < shape[0] or pixels.shape[2] < shape[1]:
            raise ValueError("a tile holds too few pixels")
        cut: NDArray[Any] = pixels[0, : shape[0], : shape[1]]
        return cut

    def _read(self, offset: int, n_bytes: int) -> bytes:
        handle = self._tif.filehandle
        handle.seek(offset)
        data: bytes = handle.read(n_bytes)
        if len(data) < n_bytes:
            raise ValueError("the file ends within a tile")
        return data

    def mpp_sources(self) -> list[Source]:
        """See `Reader`."""
        return tiff_sources(self._tif, self._series.keyframe)

    def close(self) -> None:
        """See `Reader`."""
        self._tif.close()


class _NotInParts(Exception):  # noqa: N818 - never leaves this module
    """The layout of the samples is one that only tifffile as a whole can put together."""


def require_sizes(tif: tifffile.TiffFile) -> None:
    """Refuse pages of less than nothing: tifffile counts them to find its series, and never gets to the end.

    Raises
    ------
    InputError
        If a page has a negative number of samples.
    """
    for page in tif.pages:
        if min(page.shape, default=1) < 0:
            raise InputError(f"holds a page of {' x '.join(map(str, page.shape))} samples; get a complete copy")


def require_whole_tiles(path: Path) -> None:
    """Refuse a scanner's TIFF whose tables of tiles are too short or lead out of it: OpenSlide would follow them and end the process.

    Raises
    ------
    InputError
        If it is so.
    """
    with tifffile.TiffFile(path, _multifile=False) as tif:
        if tif.is_ndpi:  # which keeps the upper halves of its offsets elsewhere
            return
        require_sizes(tif)
        size = tif.filehandle.size
        page: Any
        for page in tif.pages:
            if not page.is_tiled:
                continue
            tiles = -(-page.imagewidth // page.tilewidth) * -(-page.imagelength // page.tilelength)
            tiles *= page.samplesperpixel if page.planarconfig == 2 else 1
            offsets, n_bytes = (np.array(table, np.uint64) for table in (page.dataoffsets, page.databytecounts))
            if not len(offsets) == len(n_bytes) == tiles:
                raise InputError(f"lists {len(offsets):,} tiles where {tiles:,} are needed; get a complete copy")
            if ((offsets > size) | (n_bytes > size) | (offsets + n_bytes > size)).any():
                raise InputError("is truncated: not all of its pixels lie within the file; get a complete copy")


def open_tiff(path: Path) -> Reader:
    """Open a TIFF of any kind.

    Raises
    ------
    InputError
        If it holds no RGB or grey photograph, or is truncated. tifffile's own errors pass through.
    """
    try:
        return TiffReader(path)
    except _NotInParts:
        return _read_whole(path)


def _planes(level: tifffile.TiffPageSeries) -> list[_Plane] | None:
    """The planes whose samples, side by side, are the pixels of a level; None if it must be read whole."""
    sizes = {axis: n for axis, n in zip(level.axes, level.shape, strict=True) if n > 1}
    stack = {axis: n for axis, n in sizes.items() if axis not in "YXSC"}
    if stack:
        raise InputError(f"is a stack of {np.prod(list(stack.values()))} images; one H&E image is needed")
    page: Any = level.keyframe
    channels, samples = sizes.get("C", 1), page.samplesperpixel
    n = channels * samples if "S" in sizes or samples == 1 else channels
    is_alpha = bool(page.extrasamples) and page.extrasamples[-1] in (_ASSOCIATED_ALPHA, _UNASSOCIATED_ALPHA)
    if not (n in (1, 3) or (n == 2 and is_alpha) or (n == 4 and page.photometric in (_RGB, _CMYK))):
        raise InputError(f"has {n} channels, like a fluorescence image; an H&E image in RGB or grey is needed")
    if page.imagedepth > 1:
        return None
    pages = list(level.pages)
    if channels > 1:
        if samples > 1 or len(pages) != channels or any(p is None for p in pages) or level.axes[-2:] != "YX":
            return None
        return [_Plane(p.aspage(), 0, 0, 1) for p in pages if p is not None]
    if len(pages) != 1:
        return None
    if page.planarconfig == 1 or samples == 1:
        return [_Plane(page, 0, 0, samples)]
    segments = len(page.dataoffsets) // samples
    plane_bytes = page.imagelength * page.imagewidth * page.dtype.itemsize
    return [_Plane(page, s * segments, s * plane_bytes, 1) for s in range(samples)]


def _jpeg_pixels(data: bytes) -> int:
    """Pixels that the header of a JPEG stream says there are; 0 where it says nothing."""
    at = 2
    while at + 9 <= len(data) and data[at] == 0xFF:
        marker, length = data[at + 1], int.from_bytes(data[at + 2 : at + 4], "big")
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            return int.from_bytes(data[at + 5 : at + 7], "big") * int.from_bytes(data[at + 7 : at + 9], "big")
        at += 1 if marker == 0xFF else 2 + length
    return 0


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


def _to_rgb(page: Any, samples: NDArray[Any]) -> NDArray[np.uint8]:
    """Samples (h, w, n) of a page as RGB on white."""
    if page.photometric == _PALETTE:
        table = to_uint8(np.asarray(page.colormap, np.uint16), 16).T
        return np.asarray(table[samples[..., 0]])
    pixels = to_uint8(samples, page.bitspersample)
    n = pixels.shape[2]
    if page.photometric == _CMYK and n == 4:
        return np.asarray(Image.fromarray(np.ascontiguousarray(pixels), "CMYK").convert("RGB"))
    if page.photometric == _YCBCR and n == 3 and page.compression not in _CONVERTING:
        return np.asarray(Image.fromarray(np.ascontiguousarray(pixels), "YCbCr").convert("RGB"))
    if page.photometric == _MINISWHITE:
        pixels = 255 - pixels
    rgb = np.repeat(pixels[..., :1], 3, axis=2) if n < 3 else pixels[..., :3]
    extra = page.extrasamples[-1] if page.extrasamples and n in (2, 4) else None
    if extra in (_ASSOCIATED_ALPHA, _UNASSOCIATED_ALPHA):
        return composite(rgb, pixels[..., -1], premultiplied=extra == _ASSOCIATED_ALPHA)
    return np.ascontiguousarray(rgb)


def _read_whole(path: Path) -> ArrayReader:
    with tifffile.TiffFile(path, _multifile=False) as tif:
        series = max(tif.series, key=lambda s: s.keyframe.imagewidth * s.keyframe.imagelength)
        page = series.keyframe
        require_decodable(page.imagewidth, page.imagelength, "a rare layout")
        pixels = series.asarray()
        order = [axis for axis in series.axes if axis in "YXCS"]
        pixels = pixels.reshape([n for axis, n in zip(series.axes, series.shape, strict=True) if axis in order])
        last = [order.index(axis) for axis in "YXCS" if axis in order]
        pixels = pixels.transpose(last).reshape(*(pixels.shape[i] for i in last[:2]), -1)
        return ArrayReader(_to_rgb(series.keyframe, pixels), tiff_sources(tif, series.keyframe))
