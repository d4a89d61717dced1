"""Slides: pixels do not depend on the layout of a file or on tiling, and um/px is never guessed."""

from __future__ import annotations

import logging
import re
from pathlib import Path

import numpy as np
import pytest
import tifffile
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from prts.errors import InputError
from prts.io.orientation import Orientation
from prts.io.slide import open_slide
from prts.io.slide_readers import composite

MPP = 0.27


def smooth_image(height: int = 301, width: int = 403, seed: int = 0) -> np.ndarray:
    """Blobs of all sizes, so that a shift of a fraction of a pixel shows."""
    random = np.random.default_rng(seed)
    coarse = Image.fromarray(random.integers(0, 256, (height // 6, width // 6, 3), dtype=np.uint8))
    noise = random.integers(-20, 21, (height, width, 3))
    image = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC)).astype(int) + noise
    return np.clip(image, 0, 255).astype(np.uint8)


def rescaled(image: np.ndarray, mpp: float, wanted: float, outside: int = 255) -> np.ndarray:
    """The whole image, padded and rescaled at once."""
    height, width = (max(1, round(n * mpp / wanted)) for n in image.shape[:2])
    return resampled(image, wanted / mpp, 0, 0, width, height, outside)


def resampled(image: np.ndarray, scale: float, x: int, y: int, width: int, height: int, outside: int) -> np.ndarray:
    """Antialiased bicubic (Keys, a = -0.5) as two matrices in float64, rounded after each as 8-bit images are."""
    across, left, right = kernel(x, width, scale, image.shape[1])
    down, top, bottom = kernel(y, height, scale, image.shape[0])
    padded = np.pad(image, ((top, bottom), (left, right), (0, 0)), constant_values=outside).astype(float)
    narrow = np.clip(np.rint(np.tensordot(padded, across, (1, 1)).transpose(0, 2, 1)), 0, 255)
    return np.clip(np.rint(np.tensordot(down, narrow, (1, 0))), 0, 255).astype(np.uint8)


def kernel(start: int, n: int, scale: float, n_in: int) -> tuple[np.ndarray, int, int]:
    """Weights (n, padded length) of output pixels from `start`, and the padding needed on either side."""
    reach = 2 * max(1.0, scale)
    centres = (start + np.arange(n) + 0.5) * scale
    before = max(0, int(np.ceil(reach - centres.min(initial=0)))) + 1
    after = max(0, int(np.ceil(centres.max(initial=0) + reach - n_in))) + 1
    distance = np.abs(np.arange(-before, n_in + after)[None] + 0.5 - centres[:, None]) / max(1.0, scale)
    near = (1.5 * distance - 2.5) * distance**2 + 1
    far = ((2.5 - 0.5 * distance) * distance - 4) * distance + 2
    weights = np.where(distance < 1, near, np.where(distance < 2, far, 0))
    return weights / weights.sum(axis=1, keepdims=True), before, after


def difference(one: np.ndarray, other: np.ndarray) -> int:
    assert one.shape == other.shape
    return int(np.abs(one.astype(int) - other).max())


IMAGE = smooth_image()
LAYOUTS = {
    "tiles": {"tile": (64, 48)},
    "tiles-deflate": {"tile": (64, 48), "compression": "zlib", "predictor": True},
    "strips-lzw": {"rowsperstrip": 7, "compression": "lzw"},
    "one-strip": {},
    "one-strip-deflate": {"rowsperstrip": 301, "compression": "zlib"},
    "bigtiff": {"tile": (64, 64), "bigtiff": True},
    "big-endian": {"byteorder": ">", "rowsperstrip": 20, "compression": "zlib"},
    "ome": {"tile": (64, 64), "ome": True},
    "jpeg2000": {"tile": (64, 64), "compression": "jpeg2000", "compressionargs": {"reversible": True}},
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_pixels_of_the_image(layout: str, tmp_path: Path) -> None:
    path = tmp_path / "tissue_image.btf"
    tifffile.imwrite(path, IMAGE, photometric="rgb", **LAYOUTS[layout])
    with open_slide(path, mpp=MPP) as slide:
        assert (slide.width, slide.height) == (403, 301)
        assert np.array_equal(slide.read_region(0, 0, 403, 301), IMAGE)
        assert np.array_equal(slide.read_region(37, 59, 150, 101), IMAGE[59:160, 37:187])


@pytest.mark.parametrize("compression", [None, "zlib"])
@pytest.mark.parametrize("ome", [False, True])
def test_separate_planes_are_combined(compression: str | None, ome: bool, tmp_path: Path) -> None:
    path = tmp_path / "planar.tif"
    planar = np.ascontiguousarray(IMAGE.transpose(2, 0, 1))
    tifffile.imwrite(path, planar, photometric="rgb", planarconfig="separate", compression=compression, ome=ome)
    with open_slide(path, mpp=MPP) as slide:
        assert np.array_equal(slide.read_region(100, 50, 200, 180), IMAGE[50:230, 100:300])


@pytest.mark.parametrize("options", [{}, {"compression": "zlib", "tile": (64, 64)}])
def test_ome_with_one_page_per_color(options: dict, tmp_path: Path) -> None:
    path = tmp_path / "channels.ome.tif"
    planar = np.ascontiguousarray(IMAGE.transpose(2, 0, 1))
    metadata = {"axes": "CYX", "PhysicalSizeX": 0.25, "PhysicalSizeY": 0.25}
    tifffile.imwrite(path, planar, photometric="minisblack", metadata=metadata, **options)
    with open_slide(path) as slide:
        assert slide.mpp == 0.25
        assert "OME" in slide.mpp_source
        assert np.array_equal(slide.read_region(10, 20, 300, 200), IMAGE[20:220, 10:310])


@pytest.mark.parametrize("n", [2, 4, 5])
def test_fluorescence_is_refused(n: int, tmp_path: Path) -> None:
    path = tmp_path / "if.ome.tif"
    tifffile.imwrite(path, np.zeros((n, 60, 70), np.uint8), photometric="minisblack", metadata={"axes": "CYX"})
    with pytest.raises(InputError, match=f"if.ome.tif.*{n} channels"):
        open_slide(path, mpp=0.5)


def test_a_stack_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "stack.tif"
    tifffile.imwrite(path, np.zeros((6, 60, 70, 3), np.uint8), photometric="rgb")
    with pytest.raises(InputError, match="stack of 6"):
        open_slide(path, mpp=0.5)


@pytest.mark.parametrize("damage", ["size", "offset", "length"])
def test_invalid_tile_tables_do_not_reach_openslide(damage: str, tmp_path: Path) -> None:
    """OpenSlide would follow them and end the process."""
    path = tmp_path / "slide.svs"
    about = "Aperio Image Library v12\n96x96 [0,0 96x96] (48x48) JPEG/RGB Q=70|AppMag = 20|MPP = 0.5"
    tifffile.imwrite(
        path, IMAGE[:96, :96], tile=(48, 48), photometric="rgb", compression="jpeg", description=about, metadata=None
    )
    with open_slide(path) as slide:
        assert slide.mpp == 0.5 and slide.read_region(0, 0, 96, 96).shape == (96, 96, 3)
    tag, value = {
        "size": ("ImageWidth", 4000),
        "offset": ("TileOffsets", [1 << 30] * 4),
        "length": ("TileByteCounts", [1 << 30] * 4),
    }[damage]
    with tifffile.TiffFile(path, mode="r+b") as tif:
        tif.pages[0].tags[tag].overwrite(value)
    with pytest.raises(InputError, match="lists 4 of 168 tiles" if damage == "size" else "truncated"):
        open_slide(path)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr"])
def test_decoding_in_bands_equals_the_image(mode: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    image = Image.fromarray(IMAGE[:41, :30])
    image.putalpha(Image.fromarray(IMAGE[:41, :30, 1])) if mode in ("LA", "RGBA") else None
    path = tmp_path / ("image.jpg" if mode in ("CMYK", "YCbCr") else "image.png")
    image.convert(mode).save(path, **({"transparency": 3} if mode == "P" else {}))
    with Image.open(path) as again:
        if mode in ("LA", "RGBA", "P"):
            rgba = np.asarray(again.convert("RGBA"))
            whole = composite(rgba[..., :3], rgba[..., 3])
        else:
            whole = np.asarray(again.convert("RGB"))
    monkeypatch.setattr("prts.io.slide_readers._PIXELS_AT_ONCE", 200)  # six rows
    with open_slide(path, mpp=0.5) as slide:
        np.testing.assert_array_equal(slide.read_region(0, 0, 30, 41), whole)


def test_depth_alpha_palette_and_gray(tmp_path: Path) -> None:
    grey = IMAGE[..., 0]
    alpha = np.full((301, 403, 1), 102, np.uint8)
    on_white = np.round(IMAGE * 0.4 + 255 * 0.6)
    cases = {
        "16.tif": (IMAGE.astype(np.uint16) * 257, IMAGE, {"photometric": "rgb"}),
        "alpha.tif": (np.dstack([IMAGE, alpha]), on_white, {"photometric": "rgb", "extrasamples": ["unassalpha"]}),
        "grey.tif": (grey, np.dstack([grey] * 3), {"photometric": "minisblack"}),
        "white.tif": (255 - grey, np.dstack([grey] * 3), {"photometric": "miniswhite"}),
        "grey16.tif": (grey.astype(np.uint16) * 257, np.dstack([grey] * 3), {"photometric": "minisblack"}),
    }
    table = np.tile(np.arange(256, dtype=np.uint16) * 257, (3, 1))
    table[1] = table[1][::-1]
    cases["palette.tif"] = (grey, np.dstack([grey, 255 - grey, grey]), {"photometric": "palette", "colormap": table})
    for name, (pixels, expected, options) in cases.items():
        tifffile.imwrite(tmp_path / name, pixels, **options)
        with open_slide(tmp_path / name, mpp=0.5) as slide:
            assert difference(slide.read_region(0, 0, 403, 301), expected) <= 1, name


def test_cmyk_becomes_rgb(tmp_path: Path) -> None:
    cmyk = Image.fromarray(IMAGE).convert("CMYK")
    for name in ("cmyk.tif", "cmyk.jpg"):
        cmyk.save(tmp_path / name)
        with open_slide(tmp_path / name, mpp=0.5) as slide:
            assert np.abs(slide.read_region(0, 0, 403, 301).astype(int) - IMAGE).mean() < 12, name


def test_png_of_all_kinds(tmp_path: Path) -> None:
    grey = IMAGE[..., 0]
    Image.fromarray(IMAGE).save(tmp_path / "rgb.png")
    Image.fromarray(grey.astype(np.uint16) * 257).save(tmp_path / "grey16.png")
    clear = np.zeros_like(grey)
    clear[5, 5] = 1  # not transparent everywhere
    Image.fromarray(np.dstack([IMAGE, clear])).save(tmp_path / "clear.png")
    expected = {"rgb.png": IMAGE, "grey16.png": np.dstack([grey] * 3), "clear.png": np.full_like(IMAGE, 255)}
    for name, pixels in expected.items():
        with open_slide(tmp_path / name, mpp=0.5) as slide:
            assert np.abs(slide.read_region(0, 0, 403, 301).astype(int) - pixels).max() <= (name == "clear.png"), name


def saved(path: Path, pixels: np.ndarray, **how) -> Path:
    if path.suffix == ".png":
        Image.fromarray(pixels).save(path)
    else:
        tifffile.imwrite(path, pixels, **how)
    return path


RGBA = np.dstack([IMAGE, np.zeros(IMAGE.shape[:2], np.uint8)])


@pytest.mark.parametrize(
    ("name", "pixels", "how"),
    [
        ("a.png", RGBA, {}),
        ("grey.png", RGBA[..., [0, 3]], {}),
        ("tiled.tif", RGBA, {"photometric": "rgb", "extrasamples": ["unassalpha"], "tile": (64, 64)}),
        ("strips.tif", RGBA, {"photometric": "rgb", "extrasamples": ["assocalpha"], "compression": "zlib"}),
        (
            "planar.tif",
            np.moveaxis(RGBA, -1, 0),
            {"photometric": "rgb", "extrasamples": ["unassalpha"], "planarconfig": "separate"},
        ),
        (
            "deep.tif",
            RGBA.astype(np.uint16) * 257,
            {"photometric": "rgb", "extrasamples": ["unassalpha"], "tile": (64, 64)},
        ),
    ],
)
def test_an_image_that_is_transparent_everywhere_shows_its_colors(name, pixels, how, tmp_path: Path, caplog) -> None:
    expected = np.dstack([IMAGE[..., 0]] * 3) if name == "grey.png" else IMAGE
    with open_slide(saved(tmp_path / name, pixels, **how), mpp=0.5) as slide:
        np.testing.assert_array_equal(slide.read_region(0, 0, 403, 301), expected)
    assert f"{name}: is transparent everywhere (alpha 0)" in caplog.text


@pytest.mark.parametrize("bits", [8, 10, 12, 14])
@pytest.mark.parametrize("how", [{"tile": (64, 64)}, {"compression": "zlib", "rowsperstrip": 7}, {}])
def test_fewer_bits_than_stored_are_scaled(bits: int, how: dict, tmp_path: Path, caplog) -> None:
    samples = IMAGE.astype(np.uint32) * ((1 << bits) - 1) // 255
    path = saved(tmp_path / "a.tif", samples.astype(np.uint16), photometric="rgb", **how)
    with open_slide(path, mpp=0.5) as slide:
        assert difference(slide.read_region(0, 0, 403, 301), IMAGE) <= 1
    assert f"a.tif: uses only {bits} of 16 bits" in caplog.text


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize(
    "how",
    [
        {"photometric": "minisblack", "compression": "zlib"},
        {"photometric": "minisblack", "metadata": {"axes": "TYX"}},
        {"imagej": True, "metadata": {"axes": "ZYX"}},
        {"imagej": True, "metadata": {"axes": "CYX", "mode": "composite"}},
        {"ome": True, "photometric": "minisblack", "metadata": {"axes": "ZYX"}},
    ],
)
def test_three_gray_pages_are_red_green_and_blue(dtype, how: dict, tmp_path: Path, caplog) -> None:
    samples = np.moveaxis(IMAGE, -1, 0).astype(dtype) * (1 if dtype == np.uint8 else 257)
    with open_slide(saved(tmp_path / "a.tif", samples, **how), mpp=0.5) as slide:
        np.testing.assert_array_equal(slide.read_region(0, 0, 403, 301), IMAGE)
    if "C" not in how.get("metadata", {}).get("axes", ""):
        assert "three gray images are read as red, green and blue" in caplog.text


@pytest.mark.parametrize("bits", [10, 12, 16])
@pytest.mark.parametrize("alpha", [None, 0, "half"])
def test_png_of_sixteen_bits_a_color(bits: int, alpha: int | str | None, tmp_path: Path, caplog) -> None:
    import imagecodecs

    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (40, 50, 3)).astype(float)
    image[0, 0] = 255
    deep = (image * ((1 << bits) - 1) / 255).round().astype(np.uint16)
    opacity = np.full((40, 50, 1), 0xFFFF if alpha is None else 0, np.uint16)
    if alpha == "half":
        opacity[:, :25] = 0xFFFF
    samples = deep if alpha is None else np.dstack([deep, opacity])
    (tmp_path / "a.png").write_bytes(imagecodecs.png_encode(samples))
    with open_slide(tmp_path / "a.png", mpp=0.5) as slide:
        found = slide.read_region(0, 0, 50, 40)
    expected = image.copy()
    if alpha == "half":
        expected[:, 25:] = 255
    np.testing.assert_allclose(found, expected, atol=1)
    assert ("uses only" in caplog.text) == (bits < 16) and ("transparent" in caplog.text) == (alpha == 0)


@pytest.mark.parametrize("writer", ["tifffile", "tifffile, tiled", "Pillow"])
def test_three_gray_pages_may_be_written_one_by_one(writer: str, tmp_path: Path, caplog) -> None:
    pages = np.moveaxis(IMAGE, -1, 0)
    if writer == "Pillow":
        first, *others = map(Image.fromarray, pages)
        first.save(tmp_path / "a.tif", save_all=True, append_images=others)
    else:
        with tifffile.TiffWriter(tmp_path / "a.tif") as file:
            for page in pages:
                tile = (64, 64) if writer.endswith("tiled") else None
                file.write(page, photometric="minisblack", contiguous=False, tile=tile)
    with open_slide(tmp_path / "a.tif", mpp=0.5) as slide:
        np.testing.assert_array_equal(slide.read_region(0, 0, 403, 301), IMAGE)
    assert "three gray images are read as red, green and blue" in caplog.text


@pytest.mark.parametrize("name", ["a.tif", "a.png"])
def test_opacity_may_have_fewer_bits_than_stored(name: str, tmp_path: Path) -> None:
    import imagecodecs

    opacity = np.full(IMAGE.shape[:2], 4095, np.uint16)
    opacity[:100] = 0
    samples = np.dstack([IMAGE.astype(np.uint16) * 16, opacity])
    if name == "a.png":
        (tmp_path / name).write_bytes(imagecodecs.png_encode(samples))
    else:
        tifffile.imwrite(tmp_path / name, samples, photometric="rgb", extrasamples=["unassalpha"])
    expected = IMAGE.copy()
    expected[:100] = 255
    with open_slide(tmp_path / name, mpp=0.5) as slide:
        assert difference(slide.read_region(0, 0, 403, 301), expected) <= 1


def test_a_palette_that_is_transparent_everywhere_shows_its_colors(tmp_path: Path, caplog) -> None:
    image = Image.fromarray(IMAGE).quantize(16)
    image.save(tmp_path / "a.png", transparency=bytes(16))
    with open_slide(tmp_path / "a.png", mpp=0.5) as slide:
        np.testing.assert_array_equal(slide.read_region(0, 0, 403, 301), np.asarray(image.convert("RGB")))
    assert "transparent everywhere" in caplog.text


def test_a_stack_of_other_images_is_refused_with_the_cure(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.tif", np.zeros((5, 30, 40), np.uint8), photometric="minisblack")
    with pytest.raises(InputError, match=r"a stack of 5 images; give one H&E image, saved as RGB"):
        open_slide(path, mpp=0.5)


@pytest.mark.parametrize("tag", [2, 3, 4, 5, 6, 7, 8])
def test_an_orientation_tag_names_what_shows_the_image_upright(tag: int, tmp_path: Path, caplog) -> None:
    exif = Image.Exif()
    exif[274] = tag
    Image.fromarray(IMAGE).save(tmp_path / f"{tag}.png", exif=exif)
    with Image.open(tmp_path / f"{tag}.png") as image:
        upright = np.asarray(ImageOps.exif_transpose(image))
    tifffile.imwrite(tmp_path / f"{tag}.tif", IMAGE, photometric="rgb", extratags=[(274, "H", 1, tag, True)])
    for name in (f"{tag}.png", f"{tag}.tif"):
        caplog.clear()
        open_slide(tmp_path / name, mpp=0.5).close()
        (said,) = caplog.messages
        rotate, flip = re.search(r"`rotate` to (\d+)", said), re.search(r"`flip` to (\w+)", said)
        turned = Orientation(int(rotate[1]) if rotate else 0, flip[1] if flip else "none")
        with open_slide(tmp_path / name, mpp=0.5, orientation=turned) as slide:  # the advice works
            np.testing.assert_array_equal(slide.read_region(0, 0, slide.width, slide.height), upright)


@pytest.mark.parametrize(
    ("name", "cure"),
    [
        ("lone.mrxs", "put the slide's folder lone, with Slidedat.ini, next to it"),
        ("scan.vsi", "convert the slide to OME-TIFF"),
        ("Scan.VSI", "convert the slide to OME-TIFF"),
        ("frame.ets", "convert the slide to OME-TIFF"),
        ("slide.czi", "convert the slide to OME-TIFF"),
    ],
)
def test_a_thumbnail_is_never_taken_for_the_slide(name: str, cure: str, tmp_path: Path) -> None:
    with (tmp_path / name).open("wb") as file:
        Image.fromarray(IMAGE).save(file, "TIFF" if name.lower().endswith("vsi") else "JPEG")
    with pytest.raises(InputError, match=rf"{name}: .*{cure}"):
        open_slide(tmp_path / name, mpp=0.5)


@pytest.mark.parametrize(
    ("name", "content", "cure"),
    [
        ("1.dcm", b"", "one of its DICOM files, such as 1.dcm"),
        ("IM0001", bytes(128) + b"DICM", "one of its DICOM files, such as IM0001"),
        ("Slidedat.ini", b"[GENERAL]", r"the file case.mrxs next to it"),
        ("notes.txt", b"nothing", "give the image file"),
    ],
)
def test_a_folder_names_the_file_to_open(name: str, content: bytes, cure: str, tmp_path: Path) -> None:
    (tmp_path / "case").mkdir()
    (tmp_path / "case" / name).write_bytes(content)
    with pytest.raises(InputError, match=cure):
        open_slide(tmp_path / "case", mpp=0.5)


def test_float_pixels_are_refused(tmp_path: Path) -> None:
    tifffile.imwrite(tmp_path / "float.tif", np.zeros((60, 70), np.float32))
    with open_slide(tmp_path / "float.tif", mpp=0.5) as slide, pytest.raises(InputError, match=r"float\.tif.*float32"):
        slide.read_region(0, 0, 10, 10)


def test_premultiplied_colors_are_not_darkened_twice() -> None:
    rgb, alpha = np.full((1, 1, 3), 100, np.uint8), np.full((1, 1), 128, np.uint8)
    assert composite(rgb, alpha, premultiplied=True)[0, 0].tolist() == [227] * 3
    assert composite(rgb, alpha)[0, 0].tolist() == [177] * 3


@pytest.mark.parametrize(("mpp", "wanted"), [(0.69, 0.5), (0.27, 0.5), (0.1, 0.5), (0.5, 0.5), (0.25, 0.5)])
@pytest.mark.parametrize("outside", [255, 0])
def test_tiles_equal_the_rescaled_whole(mpp: float, wanted: float, outside: int, tmp_path: Path) -> None:
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, IMAGE, photometric="rgb", tile=(48, 64))
    expected = rescaled(IMAGE, mpp, wanted, outside)
    with open_slide(path, mpp=mpp) as slide:
        width, height = slide.size_at(wanted)
        assert (height, width) == expected.shape[:2]
        whole = slide.read_region(0, 0, width, height, wanted, outside=outside)
        assert difference(whole, expected) <= 1
        tiled = np.empty_like(whole)
        for y in range(0, height, 37):
            for x in range(0, width, 53):
                h, w = min(37, height - y), min(53, width - x)
                tiled[y : y + h, x : x + w] = slide.read_region(x, y, w, h, wanted, outside=outside)
        assert np.array_equal(tiled, whole)


def test_strong_reductions_use_smaller_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, IMAGE, photometric="rgb", tile=(64, 64))
    monkeypatch.setattr("prts.io.slide._MAX_SOURCE", 30)
    with open_slide(path, mpp=MPP) as slide:
        assert difference(slide.read_region(0, 0, *slide.size_at(0.5), 0.5), rescaled(IMAGE, MPP, 0.5)) <= 1


@settings(max_examples=60, deadline=None)
@given(
    x=st.integers(-80, 320),
    y=st.integers(-80, 260),
    width=st.integers(0, 130),
    height=st.integers(0, 130),
    wanted=st.sampled_from([None, 0.2, 0.5, 0.81]),
)
def test_any_region_is_part_of_the_padded_whole(
    x: int, y: int, width: int, height: int, wanted: float | None, jpeg_slide: tuple[Path, np.ndarray]
) -> None:
    path, image = jpeg_slide
    with open_slide(path, mpp=MPP) as slide:
        region = slide.read_region(x, y, width, height, wanted)
    if width and height:
        assert difference(region, resampled(image, (wanted or MPP) / MPP, x, y, width, height, 255)) <= 1
    assert region.shape == (height, width, 3)
    assert region.dtype == np.uint8


@pytest.fixture(scope="module")
def jpeg_slide(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, np.ndarray]:
    path = tmp_path_factory.mktemp("slide") / "jpeg.tif"
    tifffile.imwrite(path, IMAGE, photometric="rgb", tile=(64, 64), compression="jpeg")
    return path, tifffile.imread(path)


def test_the_edge_blends_with_the_outside(tmp_path: Path) -> None:
    Image.new("RGB", (40, 40), (100, 100, 100)).save(tmp_path / "a.png")
    with open_slide(tmp_path / "a.png", mpp=0.25) as slide:
        white, black = (slide.read_region(-2, 0, 24, 20, 0.5, outside=grey)[10, :, 0].astype(int) for grey in (255, 0))
    assert white[0] > 250
    assert white[2] > 105  # the kernel extends beyond the edge
    assert black[0] < 5
    assert black[2] < 95
    assert set(white[5:18]) == set(black[5:18]) == {100}


@pytest.mark.parametrize("how", ["subifds", "pages", "ome"])
def test_the_coarsest_level_that_is_fine_enough_is_used(how: str, tmp_path: Path) -> None:
    path = tmp_path / "pyramid.tif"
    sizes = [(1201, 1003), (600, 501), (300, 250), (150, 125)]  # halves, rounded down
    levels = [np.full((h, w, 3), 40 * (i + 1), np.uint8) for i, (w, h) in enumerate(sizes)]
    with tifffile.TiffWriter(path, ome=how == "ome") as tif:
        options = {"photometric": "rgb", "tile": (64, 64)}
        tif.write(levels[0], subifds=0 if how == "pages" else len(levels) - 1, **options)
        for level in levels[1:]:
            tif.write(level, subfiletype=1, metadata=None, **options)
    wanted = {0.25: 40, 0.4: 40, 0.4975: 80, 0.5: 80, 0.99: 80, 1.0: 120, 1.9: 120, 2.0: 160, 4.9: 160}
    with open_slide(path, mpp=0.25) as slide:
        assert {mpp: int(slide.read_region(5, 5, 1, 1, mpp)[0, 0, 0]) for mpp in wanted} == wanted


@pytest.mark.parametrize("wanted", [0.5, 0.7, 1.3])
def test_tiles_from_a_pyramid_equal_the_whole(wanted: float, tmp_path: Path) -> None:
    path = tmp_path / "pyramid.tif"
    image = smooth_image(803, 1001)
    half = np.asarray(Image.fromarray(image[:802, :1000]).reduce(2))
    with tifffile.TiffWriter(path) as tif:
        tif.write(image, photometric="rgb", tile=(128, 128), subifds=1)
        tif.write(half, photometric="rgb", tile=(128, 128), subfiletype=1)
    with open_slide(path, mpp=0.25) as slide:
        width, height = slide.size_at(wanted)
        whole = slide.read_region(0, 0, width, height, wanted)
        bands = [slide.read_region(0, y, width, min(100, height - y), wanted) for y in range(0, height, 100)]
    assert np.array_equal(np.concatenate(bands), whole)
    inner = (slice(5, -5), slice(5, -5))  # the level ends before the image
    expected = rescaled(half, 0.5, wanted)[: height - 1, : width - 1]
    assert difference(whole[: height - 1, : width - 1][inner], expected[inner]) <= 1


def test_a_region_decodes_the_tiles_it_touches_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, IMAGE, photometric="rgb", tile=(64, 64), compression="zlib")
    with open_slide(path, mpp=MPP) as slide:
        decoded: list[tuple[int, int, int]] = []
        tile = slide._reader.tile
        monkeypatch.setattr(slide._reader, "tile", lambda *key: decoded.append(key) or tile(*key))
        slide.read_region(70, 70, 50, 50)
        assert decoded == [(0, 1, 1)]
        slide.read_region(100, 100, 60, 50)
        assert sorted(decoded) == [(0, 1, 1), (0, 1, 2), (0, 2, 1), (0, 2, 2)]
        monkeypatch.setattr("prts.io.slide._CACHE_BYTES", 2 * 64 * 64 * 3)
        slide.read_region(0, 0, 403, 301)
        assert sum(tile.nbytes for tile in slide._tiles.values()) == slide._tiles_bytes <= 2 * 64 * 64 * 3


def test_thumbnail_fits_and_is_never_enlarged(tmp_path: Path) -> None:
    Image.fromarray(IMAGE).save(tmp_path / "a.png")
    with open_slide(tmp_path / "a.png", mpp=0.5) as slide:
        assert slide.thumbnail(100).shape == (75, 100, 3)
        assert np.array_equal(slide.thumbnail(5000), IMAGE)


def imagej(path: Path, unit: str, per_pixel: float) -> None:
    metadata = {"unit": unit} if unit else {}
    tifffile.imwrite(path, IMAGE, imagej=True, resolution=(1 / per_pixel, 1 / per_pixel), metadata=metadata)


def resolution(path: Path, per_unit: float, unit: str, y: float | None = None) -> None:
    tifffile.imwrite(path, IMAGE, photometric="rgb", resolution=(per_unit, y or per_unit), resolutionunit=unit)


def ome(path: Path, size: float, unit: str, y: float | None = None) -> None:
    metadata = {"PhysicalSizeX": size, "PhysicalSizeXUnit": unit, "PhysicalSizeY": y or size, "PhysicalSizeYUnit": unit}
    tifffile.imwrite(path, IMAGE, photometric="rgb", ome=True, metadata=metadata)


def aperio(path: Path, mpp: str) -> None:
    tifffile.imwrite(path, IMAGE, photometric="rgb", description=f"Aperio converted|AppMag = 20|MPP = {mpp}|x = 1")


@pytest.mark.parametrize(
    ("write", "arguments", "mpp", "source"),
    [
        (imagej, ("micron", 0.3), 0.3, "ImageJ"),
        (imagej, ("um", 0.3), 0.3, "ImageJ"),
        (imagej, ("mm", 0.0003), 0.3, "ImageJ"),
        (resolution, (20_000, "CENTIMETER"), 0.5, "TIFF"),
        (resolution, (50_800, "INCH"), 0.5, "TIFF"),
        (resolution, (20_000, "CENTIMETER", 20_100), 0.49876, "TIFF"),
        (ome, (0.25, "µm"), 0.25, "OME"),
        (ome, (250, "nm"), 0.25, "OME"),
        (ome, (0.00025, "mm"), 0.25, "OME"),
        (aperio, ("0.2524",), 0.2524, "Aperio"),
    ],
)
def test_um_per_pixel_in_metadata(write, arguments, mpp: float, source: str, tmp_path: Path) -> None:
    write(tmp_path / "a.tif", *arguments)
    with open_slide(tmp_path / "a.tif") as slide:
        assert slide.mpp == pytest.approx(mpp, rel=1e-4)
        assert source in slide.mpp_source


@pytest.mark.parametrize(
    ("write", "arguments"),
    [
        (resolution, (72, "INCH")),
        (resolution, (96, "INCH")),
        (resolution, (1, "NONE")),
        (resolution, (2, "NONE")),
        (imagej, ("", 0.5)),
        (imagej, ("pixel", 0.5)),
        (ome, (1.0, "pixel")),
        (ome, (20.0, "µm")),
        (aperio, ("none",)),
    ],
)
def test_implausible_sources_are_ignored(write, arguments, tmp_path: Path) -> None:
    write(tmp_path / "a.tif", *arguments)
    with pytest.raises(InputError, match=r"a\.tif.*set mpp to"):
        open_slide(tmp_path / "a.tif")
    with open_slide(tmp_path / "a.tif", mpp=0.5) as slide:
        assert slide.mpp == 0.5


def test_dpi_of_png_and_jpeg(tmp_path: Path) -> None:
    for name, dpi in (("a.png", 50_800), ("b.jpg", 50_800)):
        Image.fromarray(IMAGE).save(tmp_path / name, dpi=(dpi, dpi))
        with open_slide(tmp_path / name) as slide:
            assert slide.mpp == pytest.approx(0.5, rel=1e-3)
    Image.fromarray(IMAGE).save(tmp_path / "c.jpg", dpi=(96, 96))
    with pytest.raises(InputError, match=r"c\.jpg.*set mpp to"):
        open_slide(tmp_path / "c.jpg")


def test_precedence_and_contradiction(tmp_path: Path) -> None:
    path = tmp_path / "a.tif"
    ome(path, 0.5, "µm")
    with open_slide(path, mpp=0.505, sources=[("scalefactors_json.json", 0.502)]) as slide:
        assert (slide.mpp, slide.mpp_source) == (0.505, "mpp=")
    with open_slide(path, sources=[("scalefactors_json.json", 0.502)]) as slide:
        assert (slide.mpp, slide.mpp_source) == (0.502, "scalefactors_json.json")
    with open_slide(path, sources=[("scalefactors_json.json", 12.0)]) as slide:  # implausible, so ignored
        assert slide.mpp == 0.5
    with pytest.raises(
        InputError, match=r"0\.515 in scalefactors_json\.json but 0\.5 in the OME.*set mpp to the right value"
    ):
        open_slide(path, sources=[("scalefactors_json.json", 0.515)])
    with open_slide(path, mpp=0.507, sources=[("scalefactors_json.json", 0.515)]) as slide:  # the advice works
        assert slide.mpp == 0.507
    with pytest.raises(InputError, match=r"mpp: 0\.01 is out of range"):
        open_slide(path, mpp=0.01)
    ome(path, 0.5, "µm", y=0.6)
    with pytest.raises(InputError, match=r"OME metadata along x.*along y"):
        open_slide(path)


@pytest.mark.parametrize(
    ("write", "stale"),
    [
        (lambda path: ome(path, 1.0, "µm"), "1 in the OME metadata"),
        (lambda path: aperio(path, "0.25"), "0.25 in the Aperio description"),
        (lambda path: resolution(path, 1e4, "CENTIMETER"), "1 in the TIFF resolution tags"),
        (lambda path: ome(path, 0.5, "µm", y=0.6), "0.5 in the OME metadata along x, 0.6 in the OME metadata along y"),
    ],
)
def test_a_given_um_per_pixel_wins_over_stale_metadata(write, stale: str, tmp_path: Path, caplog) -> None:
    path = tmp_path / "a.tif"
    write(path)
    with open_slide(path, mpp=0.4) as slide:
        assert (slide.mpp, slide.mpp_source) == (0.4, "mpp=")
    assert f"a.tif: um/px is 0.4 in mpp= but {stale}; mpp= is used" in caplog.text


def test_the_ome_image_that_is_read_gives_its_own_um_per_pixel(tmp_path: Path) -> None:
    path = tmp_path / "macro_first.ome.tif"
    with tifffile.TiffWriter(path, ome=True) as writer:
        for pixels, mpp in ((IMAGE[::8, ::8], 4.0), (IMAGE, 0.5)):
            size = {"PhysicalSizeX": mpp, "PhysicalSizeY": mpp}
            writer.write(pixels, photometric="rgb", metadata={"axes": "YXS", **size})
    with open_slide(path) as slide:
        assert (slide.mpp, slide.width) == (0.5, IMAGE.shape[1])


@pytest.mark.parametrize(
    "content", [b"", b"not an image", b"II*\0", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff\xe0", b"II*\0" * 99]
)
def test_other_files_are_refused(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "tissue_image.tif"
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"tissue_image\.tif"):
        open_slide(path, mpp=0.5)


@pytest.mark.parametrize("change", [(2, 3), (2, 2), (4, 0), (4, 3)])  # another type; none or three values
def test_resolution_tags_that_are_not_one_ratio_need_mpp(change: tuple[int, int], tmp_path: Path) -> None:
    path = tmp_path / "a.tif"
    resolution(path, 20_000, "CENTIMETER")
    data = bytearray(path.read_bytes())
    for tag in (b"\x1a", b"\x1b"):
        entry = data.index(tag + b"\x01\x05\x00\x01\x00\x00\x00")  # XResolution, YResolution: one ratio
        data[entry + change[0]] = change[1]
    path.write_bytes(data)
    with pytest.raises(InputError, match=r"a\.tif: .*set mpp to"):
        open_slide(path)
    with open_slide(path, mpp=0.5) as slide:  # the advice works
        assert slide.mpp == 0.5


def test_resolution_tags_may_be_plain_numbers(tmp_path: Path) -> None:
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, IMAGE, photometric="rgb", resolution=(20_000, 20_000), resolutionunit="CENTIMETER")
    with tifffile.TiffFile(path, mode="r+b") as tif:
        for name in ("XResolution", "YResolution"):
            tif.pages[0].tags[name].overwrite(20_000.0, dtype="f")
    with open_slide(path) as slide:
        assert slide.mpp == 0.5


def test_tiles_too_large_to_decode_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, IMAGE, photometric="rgb", tile=(64, 64), compression="zlib")
    with tifffile.TiffFile(path, mode="r+b") as tif:
        tif.pages[0].tags["TileWidth"].overwrite(2**31, dtype="I")
    with pytest.raises(InputError, match=r"a\.tif: one compressed piece of 2,147,483,648 x 64 px"):
        open_slide(path, mpp=0.5)


def test_a_tile_with_other_samples_than_its_page_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, IMAGE, photometric="rgb", tile=(64, 64), compression="jpeg")
    data = bytearray(path.read_bytes())
    data[data.index(b"\x02\x01\x03\x00") + 2] = 0  # BitsPerSample has an invalid type and is not read
    data[data.index(b"\x15\x01\x03\x00") + 8] = 0  # no SamplesPerPixel
    path.write_bytes(data)
    with pytest.raises(InputError, match=r"a\.tif"), open_slide(path, mpp=0.5) as slide:
        slide.read_region(0, 0, 20, 20)


def test_folder_and_missing_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="folder"):
        open_slide(tmp_path, mpp=0.5)
    with pytest.raises(InputError, match="no such file"):
        open_slide(tmp_path / "none.tif", mpp=0.5)


@pytest.mark.parametrize("name", ["a.tif", "strips.tif", "a.png", "a.jpg"])
@pytest.mark.parametrize("share", [0.3, 0.9])
def test_truncated_files_are_refused(name: str, share: float, tmp_path: Path) -> None:
    path = tmp_path / name
    if name.endswith("tif"):
        options = {"tile": (64, 64), "compression": "zlib"} if name == "a.tif" else {"rowsperstrip": 20}
        tifffile.imwrite(path, IMAGE, photometric="rgb", **options)
    else:
        Image.fromarray(IMAGE).save(path)
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    with pytest.raises(InputError, match=name), open_slide(path, mpp=0.5) as slide:
        slide.read_region(0, 0, 403, 301)


@pytest.mark.parametrize("options", [{"tile": (64, 64), "compression": "zlib"}, {"rowsperstrip": 20}])
def test_a_file_truncated_while_open(options: dict, tmp_path: Path) -> None:
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, IMAGE, photometric="rgb", **options)
    with open_slide(path, mpp=0.5) as slide:
        with path.open("r+b") as handle:
            handle.truncate(path.stat().st_size // 2)
        with pytest.raises(InputError, match=r"a\.tif.*truncated"):
            slide.read_region(0, 0, 403, 301)


def test_corrupt_tiles_are_found_when_read(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, IMAGE, photometric="rgb", tile=(64, 64), compression="zlib")
    with tifffile.TiffFile(path) as tif:
        offset = tif.pages[0].dataoffsets[8]
    with path.open("r+b") as handle:
        handle.seek(offset)
        handle.write(b"\0" * 200)
    with open_slide(path, mpp=0.5) as slide, caplog.at_level(logging.ERROR):
        assert np.array_equal(slide.read_region(0, 0, 60, 60), IMAGE[:60, :60])
        with pytest.raises(InputError, match=r"a\.tif.*row 1, column 1"):
            slide.read_region(70, 70, 10, 10)


@settings(max_examples=40, deadline=None)
@given(place=st.floats(0, 1), value=st.binary(min_size=1, max_size=8))
def test_damage_anywhere_raises_only_input_errors(
    place: float, value: bytes, jpeg_slide: tuple[Path, np.ndarray]
) -> None:
    path = jpeg_slide[0].with_name("damaged.tif")
    data = bytearray(jpeg_slide[0].read_bytes())
    # the header and tags at the start or end are hit more often than pixels
    at = int(place * 2 * 600) if place < 0.5 else len(data) - int((1 - place) * 2 * 600) - 1
    data[at : at + len(value)] = value
    path.write_bytes(data)
    try:
        with open_slide(path, mpp=0.5) as slide:
            if slide.width * slide.height < 1e7:
                slide.read_region(0, 0, 100, 100)
                slide.thumbnail(64)
    except InputError as error:
        assert "damaged.tif" in str(error)


def test_empty_tiles_of_a_sparse_file_are_white(tmp_path: Path) -> None:
    path = tmp_path / "sparse.tif"

    def tiles():
        for i in range(4):
            yield IMAGE[:64, :64] if i == 0 else None

    tifffile.imwrite(
        path, tiles(), shape=(128, 128, 3), dtype="uint8", photometric="rgb", tile=(64, 64), compression="zlib"
    )
    with open_slide(path, mpp=0.5) as slide:
        region = slide.read_region(0, 0, 128, 128)
    assert np.array_equal(region[:64, :64], IMAGE[:64, :64])
    assert region[64:].min() == 255


@pytest.mark.real
def test_aperio_slide(prts_data: Path) -> None:
    with open_slide(prts_data / "images/CMU-1-Small-Region.svs") as slide:
        assert (slide.width, slide.height, slide.mpp) == (2220, 2967, 0.499)
        assert "aperio" in slide.mpp_source
        region = slide.read_region(900, 900, 300, 300)
        whole = slide.read_region(0, 0, 2220, 2967)
        small = slide.read_region(0, 0, 600, 600, 0.7)
    with tifffile.TiffFile(prts_data / "images/CMU-1-Small-Region.svs") as tif:
        expected = tif.pages[0].asarray()  # another decoder of the same JPEG tiles
    assert np.array_equal(region, whole[900:1200, 900:1200])
    assert np.abs(whole.astype(int) - expected).mean() < 2
    assert difference(small, resampled(whole[:1000, :1000], 0.7 / 0.499, 0, 0, 600, 600, 255)) <= 1


@pytest.mark.real
def test_photograph_without_um_per_pixel(prts_data: Path) -> None:
    with pytest.raises(InputError, match=r"histo\.jpg.*set mpp to"):
        open_slide(prts_data / "images/histo.jpg")


@pytest.mark.real
@pytest.mark.slow
def test_bands_of_a_real_section(prts_data: Path) -> None:
    with open_slide(prts_data / "her2st_hd/C2/tissue_image.tif") as slide:
        assert slide.mpp == pytest.approx(0.6880980086, rel=1e-6)
        width, height = slide.size_at(0.5)
        bands = [slide.read_region(0, y, width, min(500, height - y), 0.5) for y in range(0, height, 500)]
        image = slide.read_region(0, 0, slide.width, slide.height)
        whole = slide.read_region(0, 0, width, height, 0.5)
    assert np.array_equal(np.concatenate(bands), whole)
    expected = resampled(image[:2200, :2200], 0.5 / slide.mpp, 0, 0, 3000, 3000, 255)
    assert difference(whole[:3000, :3000], expected) <= 1
