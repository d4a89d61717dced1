"""Wrong and unusual images and nuclei."""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import geopandas as gpd
import numpy as np
import pytest
import shapely
import tifffile
from PIL import Image

from prts.io.nuclei import load_nuclei
from prts.io.slide import open_slide

Ask = Callable[..., tuple[int, str]]
Refused = Callable[..., None]
RNG = np.random.default_rng(0)


def save(path: Path, pixels: np.ndarray, **how: Any) -> Path:
    """An image without um/px."""
    if path.suffix == ".tif":
        tifffile.imwrite(path, pixels, photometric=how.pop("photometric", "rgb"), **how)
    else:
        Image.fromarray(pixels).save(path)
    return path


@pytest.mark.sampled("spoil")
@pytest.mark.parametrize("name", ["slide.tif", "slide.png", "slide.jpg"])
def test_a_damaged_image_is_named(
    predict: Ask, pixels: np.ndarray, tmp_path: Path, refused: Refused, spoil: Callable[[Path], object], name: str
) -> None:
    path = save(tmp_path / name, pixels)
    spoil(path)
    refused(predict(image=path), str(path))


WRONG_PIXELS: dict[str, tuple[Callable[[np.ndarray], np.ndarray], dict[str, Any], str]] = {
    "five channels": (lambda p: np.stack([p[..., 0]] * 5), {"photometric": "minisblack"}, "stack of 5 images"),
    "floats": (lambda p: p.astype(np.float32) / 255, {}, "8 or 16 bits"),
    "a stack": (lambda p: np.stack([p] * 3), {}, "stack of 3 images"),
    "one pixel": (lambda p: p[:1, :1], {}, "shows no tissue"),
    "one row": (lambda p: p[:1], {}, "shows no tissue"),
    "dark": (lambda p: p // 12, {}, "is dark"),
    "white": (lambda p: np.full_like(p, 255), {}, "shows no tissue"),
    "green and blue exchanged": (lambda p: p[..., [1, 0, 2]], {}, "does not have the colors of H&E"),
}


@pytest.mark.parametrize("case", WRONG_PIXELS)
def test_wrong_pixels_are_refused(
    predict: Ask, pixels: np.ndarray, tmp_path: Path, refused: Refused, case: str
) -> None:
    change, how, words = WRONG_PIXELS[case]
    path = save(tmp_path / "slide.tif", change(pixels), **how)
    refused(predict(image=path), str(path), words)


@pytest.mark.parametrize(
    ("mpp", "words"),
    [
        (0, "within 0.05-5"),
        (-0.5, "within 0.05-5"),
        (400, "within 0.05-5"),
        (float("nan"), "mpp"),
    ],
)
def test_a_wrong_um_per_px_is_refused(predict: Ask, refused: Refused, mpp: float, words: str) -> None:
    refused(predict(mpp=mpp), words)


def test_no_um_per_px_is_refused(predict: Ask, pixels: np.ndarray, tmp_path: Path, refused: Refused) -> None:
    refused(predict(image=save(tmp_path / "slide.png", pixels), mpp=None), "the um per pixel are unknown", "set mpp")


def _rgba(p: np.ndarray) -> np.ndarray:
    return np.dstack([p, np.full(p.shape[:2], 255, np.uint8)])


UNUSUAL_PIXELS: dict[str, tuple[Callable[[np.ndarray], np.ndarray], dict[str, Any]]] = {
    "RGBA": (_rgba, {"extrasamples": ["unassalpha"]}),
    "grey": (lambda p: p.mean(axis=2).astype(np.uint8), {"photometric": "minisblack"}),
    "16 bit": (lambda p: p.astype(np.uint16) * 257, {}),
    "CMYK": (lambda p: np.dstack([255 - p, np.zeros(p.shape[:2], np.uint8)]), {"photometric": "separated"}),
    "planar": (lambda p: np.moveaxis(p, 2, 0).copy(), {"planarconfig": "separate"}),
}


@pytest.mark.sampled("case")
@pytest.mark.parametrize("case", UNUSUAL_PIXELS)
def test_unusual_pixels_work(predict: Ask, pixels: np.ndarray, tmp_path: Path, case: str) -> None:
    change, how = UNUSUAL_PIXELS[case]
    path = save(tmp_path / "slide.tif", change(pixels), **how)
    assert predict(image=path) == (0, "")
    with open_slide(path, mpp=0.5) as slide:
        read = slide.read_region(0, 0, *pixels.shape[1::-1]).astype(int)
    wanted = np.repeat(pixels.mean(axis=2, keepdims=True), 3, axis=2) if case == "grey" else pixels
    assert np.abs(read - wanted).max() <= 1


@pytest.mark.sampled("name")
@pytest.mark.parametrize("name", ["größe, it's {x}=[y]", "with space", "a,b", "x=y", "北", "[brackets]", "{x}"])
def test_unusual_paths_work(predict: Ask, pixels: np.ndarray, tmp_path: Path, name: str) -> None:
    (tmp_path / name).mkdir()
    path = save(tmp_path / name / f"{name}.tif", pixels)
    assert predict(image=path, out=tmp_path / name / f"{name} slide.h5ad") == (0, "")


@pytest.mark.sampled("spoil")
@pytest.mark.parametrize("suffix", [".geojson", ".geojson.gz", ".parquet", ".shp", ".csv", ".tif"])
def test_damaged_nuclei_are_named(
    predict: Ask, world: Any, tmp_path: Path, refused: Refused, spoil: Callable[[Path], object], suffix: str
) -> None:
    nuclei = load_nuclei(world.nuclei)
    path = tmp_path / f"nuclei{suffix}"
    if suffix.startswith(".geojson"):
        import gzip

        text = nuclei[["cell_id", "geometry"]].to_json().encode()
        path.write_bytes(gzip.compress(text) if suffix.endswith("gz") else text)
    elif suffix == ".csv":
        path.write_text("id,wkt\n" + "".join(f'{i},"{shape.wkt}"\n' for i, shape in enumerate(nuclei.geometry)))
    elif suffix == ".tif":
        with open_slide(world.image) as slide:
            tifffile.imwrite(path, np.ones((slide.height, slide.width), np.uint16))
    elif suffix == ".parquet":
        nuclei.to_parquet(path)
    else:
        nuclei[["cell_id", "geometry"]].to_file(path)
    spoil(path)
    refused(predict(nuclei=path), str(path))


def _moved(nuclei: gpd.GeoDataFrame, scale: float, shift: float = 0.0) -> gpd.GeoDataFrame:
    return nuclei.assign(geometry=shapely.transform(nuclei.geometry.to_numpy(), lambda xy: xy * scale + shift))


WRONG_NUCLEI: dict[str, tuple[Callable[[gpd.GeoDataFrame], gpd.GeoDataFrame], str]] = {
    "off the image": (lambda n: _moved(n, 1.0, 1e5), "are outside the image"),
    "none": (lambda n: n.iloc[:0], "no"),
    "ids for some": (lambda n: n.assign(cell_id=[None, *n["cell_id"][1:]]), "have no cell_id"),
    "lines": (lambda n: n.assign(geometry=n.geometry.boundary), "contains no nuclei"),
    "far beyond": (lambda n: _moved(n, 1e300), "are outside the image"),
    "points": (lambda n: n.assign(geometry=n.geometry.centroid), "contains no nuclei"),
}


@pytest.mark.sampled("case")
@pytest.mark.parametrize("case", WRONG_NUCLEI)
def test_wrong_nuclei_are_refused(predict: Ask, world: Any, tmp_path: Path, refused: Refused, case: str) -> None:
    change, words = WRONG_NUCLEI[case]
    path = tmp_path / "nuclei.parquet"
    change(load_nuclei(world.nuclei)).to_parquet(path)
    refused(predict(nuclei=path), str(path), words)


def test_a_table_without_outlines_is_refused(predict: Ask, tmp_path: Path, refused: Refused) -> None:
    for name, text, words in (
        ("a.csv", "id,x,y\n1,2,3\n", "no column with WKT polygons"),
        ("a.geojson", json.dumps({"type": "Topology"}), "not GeoJSON"),
        ("b.geojson", json.dumps({"type": "FeatureCollection", "features": [7]}), "not GeoJSON"),
    ):
        (tmp_path / name).write_text(text)
        refused(predict(nuclei=tmp_path / name), name, words)


def test_a_label_image_of_another_kind_is_refused(
    predict: Ask, pixels: np.ndarray, tmp_path: Path, refused: Refused
) -> None:
    shape = pixels.shape[:2]
    for labels, words in (
        (np.ones((9, 9), np.uint16), "give one of the same area"),
        (RNG.random(shape).astype(np.float32), "not a label image"),
        ((RNG.random(shape) > 0.9).astype(np.uint8), "a mask"),
    ):
        tifffile.imwrite(tmp_path / "labels.tif", labels)
        refused(predict(nuclei=tmp_path / "labels.tif"), "labels.tif", words)


def test_a_polygon_that_crosses_itself_is_repaired(predict: Ask, world: Any, tmp_path: Path) -> None:
    nuclei = load_nuclei(world.nuclei)
    x, y = nuclei.geometry.iloc[0].centroid.coords[0]
    bow = shapely.Polygon([(x, y), (x + 20, y + 20), (x + 20, y), (x, y + 20)])
    nuclei.loc[0, "geometry"] = bow
    assert not bow.is_valid
    for usual in (nuclei, nuclei.assign(cell_id="c"), nuclei.assign(classification="Tumor")):
        usual.to_parquet(tmp_path / "nuclei.parquet")
        assert predict(nuclei=tmp_path / "nuclei.parquet") == (0, "")


@pytest.mark.sampled("picture")
@pytest.mark.parametrize("picture", ["immunohistochemistry", "astronaut", "coffee", "chelsea", "retina"])
def test_a_photograph_or_another_stain_is_refused(predict: Ask, tmp_path: Path, refused: Refused, picture: str) -> None:
    import skimage.data

    path = save(tmp_path / "holiday.jpg", getattr(skimage.data, picture)())
    refused(
        predict("segmentation=watershed", image=path),
        "holiday.jpg: does not have the colors of H&E",
        "`check_image` option",
    )


def test_a_gray_image_is_predicted_with_a_warning(
    predict: Ask, pixels: np.ndarray, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert predict("segmentation=watershed", image=save(tmp_path / "colour.png", pixels)) == (0, "")
    assert "is gray" not in caplog.text
    grey = save(tmp_path / "grey.png", pixels.mean(axis=2).astype(np.uint8))
    assert predict("segmentation=watershed", image=grey) == (0, "")
    assert "grey.png: is gray" in caplog.text


def test_a_text_named_svs_is_refused(predict: Ask, tmp_path: Path, refused: Refused) -> None:
    (tmp_path / "slide.svs").write_text("to be sent with the next post\n" * 9)
    refused(predict(image=tmp_path / "slide.svs"), "slide.svs: not an image, or damaged", "SVS, NDPI")


def test_fluorescence_is_refused(predict: Ask, pixels: np.ndarray, tmp_path: Path, refused: Refused) -> None:
    blue = np.zeros_like(pixels)
    blue[..., 2] = 255 - pixels.min(axis=2)
    blue[..., 2] //= 4
    path = save(tmp_path / "dapi.tif", blue)
    refused(predict("segmentation=watershed", image=path), "dapi.tif: is dark", "fluorescence")


@pytest.mark.nightly
def test_a_huge_white_image_is_refused_in_bounded_memory(predict: Ask, tmp_path: Path, refused: Refused) -> None:
    """40,000 x 40,000 px, 11.2 GB decoded, in a file of a few MB."""
    import resource

    path = tmp_path / "blank.tif"
    white = zlib.compress(bytes([255]) * (1024 * 1024 * 3))
    tiles = (white for _ in range(40 * 40))
    tifffile.imwrite(
        path,
        tiles,
        shape=(40_000, 40_000, 3),
        dtype=np.uint8,
        tile=(1024, 1024),
        photometric="rgb",
        compression="zlib",
    )
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    refused(predict("segmentation=watershed", image=path), "blank.tif: shows no tissue")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1 << 20  # KiB
