"""Slides of which a part was scanned: QuPath counts pixels from the corner of the part, other tools from that of the slide."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import numpy as np
import pytest
import shapely
import tifffile

from prts.io.region import read_region
from prts.io.slide import open_slide
from prts.io.slide_bounds import Bounds, region_on_slide, to_part
from prts.segmentation.polygons import Polygons

SIZE, PART, NM = (1600, 1200), Bounds(700, 400, 500, 600), 500
CENTERS = [(x, y) for x in range(40, 480, 60) for y in range(40, 580, 60)]
IMAGE = """<image name="{name}" uuid="{name}"><creationDate>2020-01-01T00:00:00Z</creationDate><device model="SCN" version="1"/>
<pixels sizeX="{width}" sizeY="{height}"><dimension sizeX="{width}" sizeY="{height}" r="0" ifd="{ifd}"/></pixels>
<view sizeX="{wide}" sizeY="{high}" offsetX="{x}" offsetY="{y}"/><scanSettings><objectiveSettings><objective>{objective}</objective>
</objectiveSettings><illuminationSettings><numericalAperture>0.4</numericalAperture>
<illuminationSource>brightfield</illuminationSource></illuminationSettings></scanSettings></image>"""


def nucleus(x: float, y: float) -> shapely.Polygon:
    return shapely.Point(x, y).buffer(9)


@pytest.fixture(scope="module")
def scn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Leica SCN, of which a part with dark nuclei on pink was scanned."""
    y, x = np.mgrid[: PART.height, : PART.width]
    pixels = np.full((PART.height, PART.width, 3), (225, 160, 200), np.uint8)
    for cx, cy in CENTERS:
        pixels[(x - cx) ** 2 + (y - cy) ** 2 < 81] = (80, 50, 130)
    width, height = (side * NM for side in SIZE)
    described = (
        f'<scn xmlns="http://www.leica-microsystems.com/scn/2010/10/01"><collection name="c" uuid="c" sizeX="{width}" sizeY="{height}">'
        + IMAGE.format(name="macro", width=64, height=48, ifd=1, wide=width, high=height, x=0, y=0, objective=0.6)
        + IMAGE.format(
            name="scan", width=PART.width, height=PART.height, ifd=0, wide=PART.width * NM, high=PART.height * NM,
            x=PART.x * NM, y=PART.y * NM, objective=20,
        )
        + "</collection></scn>"
    )  # fmt: skip
    path = tmp_path_factory.mktemp("scn") / "slide.scn"
    options = {"photometric": "rgb", "compression": "jpeg", "metadata": None}
    with tifffile.TiffWriter(path, bigtiff=True) as writer:
        writer.write(pixels, tile=(256, 256), description=described, **options)
        writer.write(np.full((48, 64, 3), 255, np.uint8), tile=(64, 64), **options)
    return path


def write(path: Path, shapes: list[shapely.Geometry]) -> Path:
    features = [{"type": "Feature", "geometry": shapely.geometry.mapping(s), "properties": {}} for s in shapes]
    path.write_text(json.dumps({"type": "FeatureCollection", "features": features}))
    return path


def test_the_part_that_was_scanned_is_known(scn: Path) -> None:
    with open_slide(scn, mpp=0.5) as slide:
        assert (slide.width, slide.height) == SIZE and slide.bounds == PART
        assert slide.read_region(PART.x + 40, PART.y + 40, 1, 1)[0, 0].max() < 150
        assert slide.read_region(40, 40, 1, 1)[0, 0].min() == 255


@pytest.mark.parametrize("corner", [(0, 0), PART[:2]])
def test_nuclei_land_on_the_tissue(scn: Path, tmp_path: Path, corner: tuple[int, int], caplog) -> None:
    path = write(tmp_path / "n.geojson", [nucleus(x + corner[0], y + corner[1]) for x, y in CENTERS])
    with caplog.at_level(logging.INFO), open_slide(scn, mpp=0.5) as slide:
        nuclei = Polygons(path)(slide)
    found = shapely.get_coordinates(shapely.centroid(nuclei.geometry.to_numpy()))
    np.testing.assert_allclose(found, np.add(CENTERS, PART[:2]), atol=1e-6)
    assert ("of the whole slide" in caplog.text) == (corner != (0, 0))
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_a_doubtful_place_is_a_warning(scn: Path, tmp_path: Path, caplog) -> None:
    path = write(tmp_path / "n.geojson", [nucleus(x, y) for x, y in [(30, 1000), (90, 1100), (150, 1000)]])
    with open_slide(scn, mpp=0.5) as slide:
        Polygons(path)(slide)
    assert "or so it seems; that of the part is at x=700, y=400" in caplog.text


@pytest.mark.parametrize(
    ("drawn", "expected", "warns"),
    [
        ((100, 100, 300, 300), (800, 500, 1000, 700), False),  # outside of the part, if from the corner of the slide
        ((800, 700, 1100, 900), (800, 700, 1100, 900), False),  # outside of the part, if from its corner
        ((0, 0, 500, 600), (700, 400, 1200, 1000), False),
    ],
)
def test_regions_land_on_the_tissue(tmp_path: Path, drawn, expected, warns: bool, caplog) -> None:
    path = write(tmp_path / "r.geojson", [shapely.box(*drawn)])
    assert read_region(str(path), *SIZE, PART).bounds == expected
    assert bool(caplog.records) == warns


def test_a_region_that_fits_both_is_taken_for_that_of_qupath(caplog) -> None:
    bounds = Bounds(50, 20, 500, 600)
    assert region_on_slide(shapely.box(100, 100, 300, 300), bounds, "r.geojson").bounds == (150, 120, 350, 320)
    assert "give the corners of the region" in caplog.text
    assert read_region("[100,100,300,300]", *SIZE, bounds).bounds == (100, 100, 300, 300)


def test_outlines_for_qupath_count_from_the_part() -> None:
    (shape,) = to_part(np.array([shapely.box(800, 500, 810, 510)]), PART)
    assert shape.bounds == (100, 100, 110, 110)


@pytest.mark.parametrize(
    ("properties", "bounds"),
    [
        ({"x": "7", "y": "0", "width": "9", "height": "9"}, Bounds(7, 0, 9, 9)),
        ({"x": "0", "y": "0", "width": "9", "height": "9"}, None),
        ({"x": "7", "y": "8"}, None),
        ({"x": "a", "y": "8", "width": "9", "height": "9"}, None),
        ({}, None),
    ],
)
def test_bounds_of_openslide(properties: dict[str, str], bounds: Bounds | None) -> None:
    assert Bounds.of({f"openslide.bounds-{name}": value for name, value in properties.items()}) == bounds
