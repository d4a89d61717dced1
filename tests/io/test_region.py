from __future__ import annotations

import gzip
import json
from pathlib import Path

import geopandas as gpd
import numpy as np
import pytest
import shapely

from prts.errors import InputError
from prts.io.region import inside, read_region


def nuclei() -> gpd.GeoDataFrame:
    xy = np.stack(np.meshgrid(np.arange(10) * 10 + 5, np.arange(10) * 10 + 5), axis=-1).reshape(-1, 2)
    return gpd.GeoDataFrame({"geometry": shapely.box(*(xy - 4).T, *(xy + 4).T)})


def feature(geometry: shapely.Geometry) -> dict:
    return {"type": "Feature", "properties": {}, "geometry": json.loads(shapely.to_geojson(geometry))}


def test_a_box_selects_nuclei_by_their_center() -> None:
    taken = inside(read_region("[0, 20, 30.5, 49]", 100, 100), nuclei())
    x, y = np.arange(100) % 10 * 10 + 5, np.arange(100) // 10 * 10 + 5
    np.testing.assert_array_equal(taken, (x < 30.5) & (y > 20) & (y < 49))


def test_a_polygon_selects_nuclei_by_their_center() -> None:
    x, y = np.arange(100) % 10 * 10 + 5, np.arange(100) // 10 * 10 + 5
    taken = inside(read_region("[[0,0],[60, 0],[0,60]]", 100, 100), nuclei())
    np.testing.assert_array_equal(taken, x + y < 60)
    hourglass = inside(read_region("[[0,0],[101,101],[101,0],[0,101]]", 100, 100), nuclei())
    off_diagonal = (x != y) & (x + y != 101)
    np.testing.assert_array_equal(hourglass[off_diagonal], (abs(y - 50.5) < abs(x - 50.5))[off_diagonal])


def test_a_polygon_may_be_longer_than_a_file_name() -> None:
    circle = shapely.Point(50, 50).buffer(30, quad_segs=25)
    text = json.dumps(shapely.get_coordinates(circle)[:-1].round(3).tolist())
    assert len(text) > 255
    taken = inside(read_region(text, 100, 100), nuclei())
    np.testing.assert_array_equal(taken, inside(circle, nuclei()))
    with pytest.raises(InputError, match="does not exist"):
        read_region("x" * 5000, 100, 100)


def test_a_file_name_may_start_with_a_bracket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("[roi].geojson").write_text(json.dumps(feature(shapely.box(0, 0, 20, 20))))
    assert inside(read_region("[roi].geojson", 100, 100), nuclei()).sum() == 4


def test_polygons_of_a_file_are_united(tmp_path: Path) -> None:
    triangle, square = shapely.Polygon([(0, 0), (60, 0), (0, 60)]), shapely.box(80, 80, 100, 100)
    path = tmp_path / "two regions, = é.geojson"
    path.write_text(json.dumps({"type": "FeatureCollection", "features": [feature(triangle), feature(square)]}))
    taken = inside(read_region(str(path), 100, 100), nuclei())
    x, y = np.arange(100) % 10 * 10 + 5, np.arange(100) // 10 * 10 + 5
    np.testing.assert_array_equal(taken, (x + y < 60) | ((x > 80) & (y > 80)))
    path.write_text(json.dumps(feature(shapely.MultiPolygon([triangle, square]))))
    np.testing.assert_array_equal(inside(read_region(str(path), 100, 100), nuclei()), taken)


@pytest.mark.parametrize("pack", [bytes, lambda data: b"\xef\xbb\xbf" + data, gzip.compress])
@pytest.mark.parametrize(
    "nest", [lambda f: [f], lambda f: {"type": "FeatureCollection", "features": [f]}, lambda f: f["geometry"]]
)
def test_regions_are_read_from_the_same_files_as_nuclei(tmp_path: Path, pack, nest) -> None:
    path = tmp_path / "roi.geojson"
    path.write_bytes(pack(json.dumps(nest(feature(shapely.box(0, 0, 20, 40)))).encode()))
    assert inside(read_region(str(path), 100, 100), nuclei()).sum() == 8


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[0,0,10]", "four numbers"),
        ("[0,0,ten,10]", "four numbers"),
        ("[[0,0],[9,9]]", "three corners"),
        ("[[0,0],[9,9],[9]]", "three corners"),
        ("[[0,0],[5,5],[9,9]]", "does not overlap the image"),
        ("[10,0,0,10]", "x0 < x1"),
        ("[200,0,300,10]", "does not overlap the image"),
        ("missing.geojson", "does not exist"),
    ],
)
def test_invalid_regions_are_refused_in_one_line(text: str, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        read_region(text, 100, 100)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [("{", "is not GeoJSON"), (json.dumps(feature(shapely.Point(1, 1))), "no polygon"), ("\x00", "is not GeoJSON")],
)
def test_a_file_without_polygons_is_refused_in_one_line(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "roi.geojson"
    path.write_text(content)
    with pytest.raises(InputError, match=message) as caught:
        read_region(str(path), 100, 100)
    assert "\n" not in str(caught.value)
