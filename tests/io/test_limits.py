from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image

from prts.errors import InputError
from prts.io.limits import MAX_PIXELS, pixel_limit
from prts.io.nuclei import read_nuclei
from prts.io.slide import open_slide

IMAGE = np.random.default_rng(0).integers(0, 256, (60, 50, 3), dtype=np.uint8)


def memory_kib(name: str) -> int:
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1])


def png_header(path: Path, width: int, height: int) -> Path:
    """A PNG of a hundred bytes that claims to be large."""
    parts = [
        (b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)),
        (b"IDAT", zlib.compress(b"")),
        (b"IEND", b""),
    ]
    chunks = (struct.pack(">I", len(d)) + k + d + struct.pack(">I", zlib.crc32(k + d)) for k, d in parts)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(chunks))
    return path


def write_whole(folder: Path) -> dict[str, Path]:
    """60 x 50 px in every format that is decoded whole."""
    for name in ("a.png", "a.jpg"):
        Image.fromarray(IMAGE).save(folder / name)
    strip = {"photometric": "rgb", "compression": "zlib", "rowsperstrip": 60}
    tifffile.imwrite(folder / "strip.tif", IMAGE, **strip)
    tifffile.imwrite(folder / "one tile.tif", IMAGE, photometric="rgb", tile=(64, 64), compression="zlib")
    return {path.name: path for path in folder.iterdir()}


def test_images_decoded_whole_are_limited(tmp_path: Path) -> None:
    files = write_whole(tmp_path)
    before = Image.MAX_IMAGE_PIXELS
    for name, path in files.items():
        n = 64 * 64 if name == "one tile.tif" else 3000
        with pytest.raises(InputError, match=rf"^{path}: .* px must be decoded whole.*tiled TIFF.*max_pixels={n}$"):
            open_slide(path, mpp=0.5, max_pixels=n - 1)
        with open_slide(path, mpp=0.5, max_pixels=n) as slide:
            assert slide.read_region(0, 0, 50, 60).shape == IMAGE.shape
    assert before == Image.MAX_IMAGE_PIXELS


def test_images_read_in_parts_are_not_limited(tmp_path: Path) -> None:
    tifffile.imwrite(tmp_path / "tiled.tif", IMAGE, photometric="rgb", tile=(16, 16), compression="zlib")
    tifffile.imwrite(tmp_path / "plain.tif", IMAGE, photometric="rgb", rowsperstrip=60)
    for name in ("tiled.tif", "plain.tif"):
        with open_slide(tmp_path / name, mpp=0.5, max_pixels=16 * 16) as slide:
            np.testing.assert_array_equal(slide.read_region(0, 0, 50, 60), IMAGE)


def test_a_bomb_is_refused_before_it_is_decoded(tmp_path: Path) -> None:
    bomb = png_header(tmp_path / "bomb.png", 40_000, 40_000)
    with pytest.raises(InputError, match=r"a PNG of 40,000 x 40,000 px.*11\.2 GB.*max_pixels=1600000000"):
        open_slide(bomb, mpp=0.5)


def test_a_refused_tiff_is_closed(tmp_path: Path) -> None:
    path = tmp_path / "strip.tif"
    tifffile.imwrite(path, IMAGE, compression="zlib", rowsperstrip=60, photometric="rgb")
    with pytest.raises(InputError, match="max_pixels"):
        open_slide(path, mpp=0.5, max_pixels=100)
    assert str(path) not in [str(f.readlink()) for f in Path("/proc/self/fd").iterdir() if f.is_symlink()]


def test_a_slide_of_ten_gigapixels_needs_no_override(tmp_path: Path) -> None:
    """100,000 x 100,000 px in a pyramid of tiles; all but one are empty glass."""
    path, side = tmp_path / "large.tif", 100_000
    assert side**2 > 10 * MAX_PIXELS

    def tiles(side: int) -> Iterator[bytes]:
        yield zlib.compress(bytes([7]) * (1024 * 1024 * 3))
        yield from (b"" for _ in range((-(-side // 1024)) ** 2 - 1))

    with tifffile.TiffWriter(path, bigtiff=True) as tif:
        options = {"dtype": "uint8", "tile": (1024, 1024), "photometric": "rgb", "compression": "zlib"}
        for n, level in enumerate((side, side // 4, side // 16)):
            how = {"subfiletype": 1} if n else {"subifds": 2}
            tif.write(tiles(level), shape=(level, level, 3), **options, **how)
    before = memory_kib("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    with open_slide(path, mpp=0.25) as slide:
        assert (slide.width, slide.height) == (side, side)
        assert slide.read_region(500, 500, 3, 3).max() == 7
        assert slide.read_region(99_000, 99_000, 900, 900, 0.5).min() == 255
        assert slide.thumbnail(1000).shape == (1000, 1000, 3)
    assert memory_kib("VmHWM") - before < 1 << 20


@pytest.mark.parametrize("max_pixels", [0, -1, 2.5, "many", True])
def test_invalid_limits_are_refused(max_pixels: object) -> None:
    with pytest.raises(InputError, match=r"^max_pixels: .* is not a number of pixels; give a whole number"):
        pixel_limit(max_pixels)  # type: ignore[arg-type]


def test_the_size_of_a_label_image_is_checked_before_decoding(tmp_path: Path) -> None:
    bomb = png_header(tmp_path / "bomb.png", 40_000, 40_000)
    with pytest.raises(InputError, match=r"bomb\.png: .*40000 x 40000 px for an image of 50 x 60 px"):
        read_nuclei(bomb, mpp=0.5, width=50, height=60)
    with pytest.raises(InputError, match=r"bomb\.png: a label image of 40,000 x 40,000 px.*max_pixels=1600000000"):
        read_nuclei(bomb, mpp=0.5, width=40_000, height=40_000)
    labels = np.zeros((60, 50), np.uint16)
    labels[10:20, 10:20], labels[30:40, 5:15] = 1, 2
    tifffile.imwrite(tmp_path / "labels.tif", labels)
    size = {"mpp": 0.5, "width": 50, "height": 60}
    with pytest.raises(InputError, match=r"labels\.tif: a label image of 50 x 60 px.*give polygons.*max_pixels=3000"):
        read_nuclei(tmp_path / "labels.tif", **size, max_pixels=2999)
    assert len(read_nuclei(tmp_path / "labels.tif", **size, max_pixels=3000)) == 2
