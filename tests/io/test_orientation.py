from __future__ import annotations

from itertools import product
from pathlib import Path

import geopandas as gpd
import numpy as np
import pytest
import shapely
import tifffile

from prts.errors import InputError
from prts.io.nuclei import make_nuclei, write_nuclei
from prts.io.orientation import FLIP, ROTATE, UPRIGHT, Orientation
from prts.io.slide import open_slide
from prts.section import open_section
from prts.segmentation.polygons import Polygons

RNG = np.random.default_rng(3)
IMAGE = RNG.integers(0, 256, (301, 470, 3), dtype=np.uint8)
SIZE = (470, 301)
ALL = [Orientation(rotate, flip) for rotate, flip in product(ROTATE, FLIP)]


def by_numpy(image: np.ndarray, orientation: Orientation) -> np.ndarray:
    turned = np.rot90(image, orientation.rotate // 90)
    return {"none": lambda a: a, "horizontal": np.fliplr, "vertical": np.flipud}[orientation.flip](turned)


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("slide") / "a.tif"
    tifffile.imwrite(path, IMAGE, tile=(64, 64), photometric="rgb", compression="zlib")
    return path


@pytest.mark.parametrize("orientation", ALL, ids=str)
def test_a_reoriented_slide_equals_the_slide_of_the_reoriented_image(
    file: Path, tmp_path: Path, orientation: Orientation
) -> None:
    tifffile.imwrite(tmp_path / "b.tif", by_numpy(IMAGE, orientation), tile=(64, 64), photometric="rgb")
    with (
        open_slide(file, mpp=0.4, orientation=orientation) as turned,
        open_slide(tmp_path / "b.tif", mpp=0.4) as other,
    ):
        assert (turned.width, turned.height) == (other.width, other.height)
        assert turned.file_size == SIZE
        for x, y, width, height, mpp in ((0, 0, 470, 470, None), (-20, 5, 61, 333, 0.5), (30, 30, 50, 20, 0.9)):
            mine, wanted = (slide.read_region(x, y, width, height, mpp) for slide in (turned, other))
            np.testing.assert_array_equal(mine, wanted)
        np.testing.assert_array_equal(turned.thumbnail(100), other.thumbnail(100))


@pytest.mark.parametrize("orientation", ALL, ids=str)
def test_positions_follow_their_pixels_and_back(orientation: Orientation) -> None:
    """The center of pixel (column, row) is (column + 0.5, row + 0.5) before and after."""
    index = np.arange(SIZE[0] * SIZE[1]).reshape(SIZE[1], SIZE[0])
    turned = by_numpy(index, orientation)
    row, column = np.array([0, 7, 300]), np.array([469, 0, 12])
    found = [np.argwhere(turned == index[r, c])[0, ::-1] for r, c in zip(row, column, strict=True)]
    xy = np.column_stack([column, row]) + 0.5
    np.testing.assert_allclose(orientation.places(xy, SIZE), np.array(found) + 0.5)
    np.testing.assert_allclose(orientation.places_in_file(orientation.places(xy, SIZE), SIZE), xy)


@pytest.mark.parametrize("orientation", ALL, ids=str)
def test_a_pyramid_whose_levels_are_rounded_stays_in_place(tmp_path: Path, orientation: Orientation) -> None:
    """A level of 16 full pixels per pixel lacks the last three rows and columns: mirrored, it does not start at the edge."""
    smooth = np.kron(RNG.integers(60, 255, (11, 17, 3)), np.ones((60, 60, 1))).astype(np.uint8)[:643, :967]
    level = smooth[:640, :964].reshape(160, 4, 241, 4, 3).mean(axis=(1, 3)).round().astype(np.uint8)
    with tifffile.TiffWriter(tmp_path / "pyramid.tif") as tif:
        tif.write(smooth, tile=(64, 64), subifds=1, photometric="rgb")
        tif.write(level, tile=(64, 64), subfiletype=1, photometric="rgb")
    tifffile.imwrite(tmp_path / "flat.tif", smooth, tile=(64, 64), photometric="rgb")
    seen = []
    for name in ("pyramid.tif", "flat.tif"):
        with open_slide(tmp_path / name, mpp=0.25, orientation=orientation) as slide:
            seen.append(slide.read_region(4, 4, 140, 140, 1.0).astype(float))
    assert np.abs(seen[0] - seen[1]).mean() < 2  # 1.4 upright; 4 to 6 if the level started at the edge


def test_given_nuclei_are_reoriented_with_the_slide(file: Path, tmp_path: Path) -> None:
    corner = make_nuclei([shapely.box(440, 0, 470, 10), shapely.box(10, 100, 30, 140)], 0.4, cell_id=["corner", "b"])
    write_nuclei(corner, tmp_path / "n.parquet")
    orientation = Orientation(90)
    section = open_section("s", file, mpp=0.4, nuclei=tmp_path / "n.parquet").reoriented(orientation)
    assert (section.width, section.height, section.file_size) == (301, 470, SIZE)
    with section.open_slide() as slide:
        turned = Polygons(tmp_path / "n.parquet")(slide)
    # counterclockwise: top right becomes top left
    np.testing.assert_allclose(turned.geometry.iloc[0].bounds, (0, 0, 10, 30))
    assert list(turned["area_um2"]) == list(corner["area_um2"])
    back: gpd.GeoDataFrame = orientation.nuclei_in_file(turned, SIZE)
    assert shapely.equals(back.geometry.to_numpy(), corner.geometry.to_numpy()).all()


def test_orientation_changes_the_fingerprint(file: Path) -> None:
    section = open_section("s", file, mpp=0.4)
    assert section.reading() == section.reoriented(UPRIGHT).reading() == {}  # existing caches keep their names
    assert len({str(section.reoriented(orientation).reading()) for orientation in ALL}) == len(ALL)


@pytest.mark.parametrize("rotate", [45, -90, 360, "quarter", None, True, 90.5])
def test_invalid_rotations_are_refused(rotate: object) -> None:
    with pytest.raises(InputError, match=r"rotate: .*0, 90, 180, 270 degrees counterclockwise") as caught:
        Orientation(rotate)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("flip", ["both", "", None, True])
def test_invalid_flips_are_refused(flip: object) -> None:
    with pytest.raises(InputError, match=r"flip: .*none, horizontal, vertical"):
        Orientation(flip=flip)  # type: ignore[arg-type]


@pytest.mark.parametrize("flip", FLIP)
@pytest.mark.parametrize("rotate", ROTATE)
def test_views_are_the_turns_then_also_the_mirror_images(rotate: int, flip: str) -> None:
    image = np.arange(18, dtype=np.uint8).reshape(2, 3, 3)
    this = Orientation(rotate, flip)
    read = [view.pixels(image) for view in this.views(8)]
    assert this.views(1) == (this,) and this.views(4) == this.views(8)[:4]
    # a view is the first one, turned or mirrored further
    for k in range(4):
        assert any(np.array_equal(np.rot90(read[0], k), one) for one in read[:4])
        assert any(np.array_equal(np.rot90(read[0][:, ::-1], k), one) for one in read[4:])
    assert len({(one.shape, one.tobytes()) for one in read}) == 8


@pytest.mark.parametrize("n", [0, 2, 3, 16, True, 4.5, "8"])
def test_another_number_of_views_is_refused(n: object) -> None:
    with pytest.raises(InputError, match=r"tta: .* is not supported; choose one of 1, 4, 8 views"):
        Orientation().views(n)
