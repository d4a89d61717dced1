"""Images with wrong directories and chunks, and images of every layout: TIFF, PNG and others."""

from __future__ import annotations

import io
import struct
import zlib
from contextlib import suppress
from typing import Any

import numpy as np
import tifffile
from hypothesis import strategies as st
from PIL import Image

from benchmarks.fuzzing.strategies import Draw, mutated


def _entries(data: bytes) -> tuple[str, list[int]]:
    """Byte order, and where the entries of the first directories of a classic TIFF lie."""
    order = "<" if data[:2] == b"II" else ">"
    found: list[int] = []
    (at,) = struct.unpack_from(order + "I", data, 4)
    while at and at + 2 < len(data) and len(found) < 100:
        (n,) = struct.unpack_from(order + "H", data, at)
        found += [at + 2 + 12 * i for i in range(n)]
        (at,) = struct.unpack_from(order + "I", data, at + 2 + 12 * n)
    return order, found


@st.composite
def _edited_tiff(draw: Draw, seeds: list[bytes]) -> bytes:
    """A sound TIFF with entries of its directories exchanged."""
    data = bytearray(draw(st.sampled_from(seeds)))
    order, entries = _entries(data)
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.sampled_from(entries))
        value = draw(
            st.sampled_from([0, 1, 2, 3, 4, 5, 6, 7, 8, 16, 32, 34, 255, 256, 32_773, 65_535, 65_536, 2**31, 2**32 - 1])
            | st.integers(0, 2**16)
        )
        part = draw(st.sampled_from(["tag", "type", "count", "value", "value", "value", "short"]))
        if part in ("tag", "type"):
            struct.pack_into(order + "H", data, at + (0 if part == "tag" else 2), value % 65_536)
        elif part == "short":
            struct.pack_into(order + "H", data, at + 8, value % 65_536)
        else:
            struct.pack_into(order + "I", data, at + (4 if part == "count" else 8), value % 2**32)
    return bytes(data)


@st.composite
def _odd_tiff(draw: Draw) -> bytes:
    """An image of any layout of samples that tifffile writes."""
    stack, samples = (
        draw(st.sampled_from([(), (2,), (2, 2)])),
        draw(st.sampled_from([(), (1,), (2,), (3,), (3,), (4,), (5,)])),
    )
    shape = (*stack, draw(st.integers(1, 33)), draw(st.integers(1, 33)), *samples)
    dtype = draw(st.sampled_from(["u1", "u1", "u1", "u2", "i1", "i4", "u8", "f2", "f4", "f8", "?", "c8"]))
    options: dict[str, Any] = {
        "photometric": draw(st.sampled_from([None, "minisblack", "miniswhite", "rgb", "ycbcr", "separated", "cielab"])),
        "compression": draw(
            st.sampled_from([None, None, "zlib", "lzw", "packbits", "jpeg", "webp", "zstd", "jpeg2000"])
        ),
        "planarconfig": draw(st.sampled_from([None, None, "contig", "separate"])),
        "tile": draw(st.sampled_from([None, (16, 16), (32, 16)])),
        "extrasamples": draw(st.sampled_from([None, None, "unspecified", "assocalpha", "unassalpha"])),
        "description": draw(
            st.sampled_from([None, "ImageJ=1.0\nunit=\\u00B5m", "Aperio|MPP = 0.5", "<OME", "é", "{}", "x" * 3000])
        ),
        "resolution": draw(st.sampled_from([None, (0, 0), (1e9, 1), (20_000, 1e-9), (20_000, 20_000)])),
        "bigtiff": draw(st.booleans()),
        "imagej": draw(st.sampled_from([False, False, False, True])),
    }
    out = io.BytesIO()
    with suppress(Exception):  # not every combination can be written; what was written until then is an input too
        tifffile.imwrite(out, np.full(shape, 1, dtype), **options)
    return out.getvalue()


def tiff(seeds: list[bytes]) -> st.SearchStrategy[bytes]:
    classic = [seed for seed in seeds if seed[:4] in (b"II*\0", b"MM\0*")]
    return _edited_tiff(classic) | _odd_tiff()


@st.composite
def _edited_png(draw: Draw, seeds: list[bytes]) -> bytes:
    """A sound PNG with parts of its chunks exchanged, each with the checksum that belongs to it."""
    data, at, chunks = draw(st.sampled_from(seeds)), 8, []
    while at + 8 <= len(data):
        n = int.from_bytes(data[at : at + 4], "big")
        chunks.append([data[at + 4 : at + 8], bytearray(data[at + 8 : at + 8 + n])])
        at += 12 + n
    for _ in range(draw(st.integers(1, 3))):
        place = draw(st.integers(0, len(chunks) - 1))
        name, body = chunks[place]
        how = draw(st.sampled_from(["byte", "byte", "number", "drop", "repeat", "name", "image"]))
        if how in ("byte", "number") and body:
            spot = draw(st.integers(0, len(body) - 1))
            value = draw(st.sampled_from([0, 1, 2, 3, 4, 6, 8, 16, 127, 255]))
            body[spot : spot + (1 if how == "byte" else 4)] = bytes([value]) * min(
                1 if how == "byte" else 4, len(body) - spot
            )
        elif how == "drop" and len(chunks) > 1:
            del chunks[place]
        elif how == "repeat":
            chunks.insert(place, [name, bytearray(body)])
        elif how == "name":
            chunks[place][0] = draw(
                st.sampled_from([b"IHDR", b"PLTE", b"tRNS", b"pHYs", b"iCCP", b"zTXt", b"acTL", b"eXIf", b"IEND"])
            )
        elif name == b"IDAT":
            chunks[place][1] = bytearray(zlib.compress(draw(st.binary(max_size=40))))
    width, height = (int.from_bytes(chunks[0][1][at : at + 4], "big") for at in (0, 4))
    if 1 << 24 < width * height < 1 << 30:
        return data  # prts decodes up to 537 million pixels, which takes 10 s: not thousands of times
    out = b"".join(len(b).to_bytes(4, "big") + n + b + zlib.crc32(n + b).to_bytes(4, "big") for n, b in chunks)
    return data[:8] + out


@st.composite
def _odd_picture(draw: Draw) -> bytes:
    mode = draw(st.sampled_from(["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I", "I;16", "F", "YCbCr", "HSV"]))
    kind = draw(st.sampled_from(["png", "jpeg", "bmp", "gif", "webp", "ico", "tga", "ppm", "jpeg2000", "tiff", "pcx"]))
    dpi = draw(st.sampled_from([None, (0, 0), (-1, 1), (50_800, 1), (1e-9, 50_800), (float("nan"), 1)]))
    out = io.BytesIO()
    image = Image.new(mode, (draw(st.integers(1, 40)), draw(st.integers(1, 40))), 1)
    with suppress(Exception):  # not every combination can be written
        image.save(out, kind, **({} if dpi is None else {"dpi": dpi}))
    return out.getvalue()


def picture(seeds: list[bytes]) -> st.SearchStrategy[bytes]:
    return _edited_png([seed for seed in seeds if seed.startswith(b"\x89PNG")]) | _odd_picture() | mutated(seeds)
