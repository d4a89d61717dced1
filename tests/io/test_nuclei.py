import gzip
import json
import logging

import geopandas as gpd
import numpy as np
import pandas as pd
import pytest
import shapely
import tifffile
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from shapely import MultiPolygon, Polygon, box

from prts.errors import InputError
from prts.io.nuclei import load_nuclei, make_nuclei, read_nuclei, write_nuclei

SHAPES = [box(10, 20, 20, 40), Polygon([(50, 50), (60, 50), (50, 60)]), box(80, 10, 84, 15)]
AREAS = [200.0, 50.0, 20.0]
SIZE = {"mpp": 0.5, "width": 200, "height": 100}


def feature(shape, properties=None, **members):
    return {"type": "Feature", "geometry": shapely.geometry.mapping(shape), "properties": properties, **members}


def write_json(path, document):
    path.write_text(json.dumps(document))
    return path


# --- make_nuclei


def test_repairs_and_drops_with_counts(caplog):
    bow_tie = Polygon([(0, 0), (4, 4), (4, 0), (0, 4)])  # two triangles of 4 px2
    two = MultiPolygon([box(10, 0, 12, 2), box(20, 0, 25, 5)])
    shapes = [bow_tie, two, Polygon(), None, box(30, 0, 31, 1), box(30, 0, 31, 1), Polygon([(0, 0), (1, 1), (2, 2)])]
    shapes.append(Polygon([(0, 0), (np.nan, 1), (1, 0)]))
    with caplog.at_level(logging.INFO):
        nuclei = make_nuclei(shapes, mpp=2.0)
    assert list(nuclei["cell_id"]) == ["0", "1", "4"]
    assert list(nuclei["area_um2"]) == [16.0, 100.0, 4.0]
    assert (nuclei.geom_type == "Polygon").all() and nuclei.is_valid.all() and nuclei.crs is None
    assert list(nuclei.columns) == ["cell_id", "geometry", "area_um2", "score"] and nuclei["score"].isna().all()
    (line,) = [record.getMessage() for record in caplog.records]
    assert "3 nuclei of 8 shapes" in line and "1 exact duplicates dropped" in line and "2 missing or empty" in line
    assert (
        "2 with several parts" in line and "1 with coordinates that are not finite" in line and "1 without area" in line
    )


def test_duplicates_are_dropped_and_shared_ids_get_a_suffix(caplog):
    nuclei = make_nuclei([SHAPES[0], SHAPES[0], SHAPES[1]], 1.0, cell_id=["a", "b", "c"])
    assert list(nuclei["cell_id"]) == ["a", "c"]
    assert list(make_nuclei([SHAPES[0], SHAPES[0]], 1.0, cell_id=[7, 7])["cell_id"]) == ["7"]
    assert not caplog.records
    shared = make_nuclei([*SHAPES, box(0, 0, 1, 1)], 1.0, cell_id=["b", "b", "b-2", "b"])
    assert list(shared["cell_id"]) == ["b", "b-3", "b-2", "b-4"]
    assert "2 nuclei share their id with another one and get a suffix, such as 'b-3'" in caplog.text
    assert list(make_nuclei(SHAPES, 1.0, cell_id=[5, 5, 5])["cell_id"]) == ["5", "5-2", "5-3"]


def test_no_shapes_give_an_empty_frame():
    nuclei = make_nuclei([], 0.5)
    assert len(nuclei) == 0 and list(nuclei.columns) == ["cell_id", "geometry", "area_um2", "score"]


# --- formats


def assert_read(path, ids, **size):
    nuclei = read_nuclei(path, **{**SIZE, **size})
    assert list(nuclei["cell_id"]) == ids
    assert list(nuclei["area_um2"]) == [area * 0.25 for area in AREAS[: len(ids)]]
    for polygon, expected in zip(nuclei.geometry, SHAPES, strict=False):
        assert polygon.equals(expected)
    return nuclei


def test_space_ranger_geojson_by_content_also_gzipped(tmp_path):
    document = {"type": "FeatureCollection", "features": [feature(s, {"cell_id": i + 1}) for i, s in enumerate(SHAPES)]}
    assert_read(write_json(tmp_path / "nuclei.tif", document), ["1", "2", "3"])
    (tmp_path / "nuclei.csv").write_bytes(gzip.compress(json.dumps(document).encode()))
    assert_read(tmp_path / "nuclei.csv", ["1", "2", "3"])


def test_qupath_nuclei_ids_and_annotations(tmp_path):
    document = [
        feature(box(0, 0, 199, 99), {"objectType": "annotation"}, id="tissue"),
        feature(box(0, 0, 50, 50), {"objectType": "cell", "classification": {"name": "Tumor"}}, id="3f-1"),
        feature(SHAPES[1], {"objectType": "detection"}, id="3f-2"),
        feature(MultiPolygon([SHAPES[2], box(0, 0, 1, 1)]), {"objectType": "detection"}, id="3f-3"),
    ]
    document[1]["nucleusGeometry"] = shapely.geometry.mapping(SHAPES[0])
    assert_read(write_json(tmp_path / "q.geojson", document), ["3f-1", "3f-2", "3f-3"])
    only_annotations = [feature(s, {"objectType": "annotation"}, id=str(i)) for i, s in enumerate(SHAPES)]
    assert_read(write_json(tmp_path / "a.geojson", only_annotations), ["0", "1", "2"])


GRID = [box(20 * x + 1, 20 * y + 1, 20 * x + 1 + 8 + y, 20 * y + 11) for x in range(10) for y in range(5)]


@pytest.mark.parametrize("geometry", [MultiPolygon, shapely.GeometryCollection])
@pytest.mark.parametrize("bare", [True, False])
def test_shapes_that_hold_a_class_are_taken_apart(tmp_path, geometry, bare, caplog):
    classes = {"Neoplastic": GRID[:30], "Dead": GRID[30:48], "Stroma": GRID[48:]}  # the last: two adjacent nuclei
    features = [
        feature(geometry(s), {"classification": {"name": n, "color": [0, 1, 2]}}, id=n) for n, s in classes.items()
    ]
    features.append(feature(box(181, 61, 183, 62), {"classification": "Tiny"}, id="Tiny"))
    document = features if bare else {"type": "FeatureCollection", "features": features}
    with caplog.at_level(logging.INFO):
        nuclei = read_nuclei(write_json(tmp_path / "c.geojson", document), **SIZE)
    assert nuclei["classification"].value_counts().to_dict() == {"Neoplastic": 30, "Dead": 18, "Stroma": 2, "Tiny": 1}
    assert list(nuclei["cell_id"][:2]) == ["Neoplastic-1", "Neoplastic-2"] and nuclei["cell_id"].iloc[-1] == "Tiny"
    assert "3 shapes that hold many nuclei taken apart into 50" in caplog.text
    write_nuclei(nuclei, tmp_path / "n.parquet")
    pd.testing.assert_frame_equal(pd.DataFrame(load_nuclei(tmp_path / "n.parquet")), pd.DataFrame(nuclei))


def test_tables_with_a_row_for_each_class_are_taken_apart(tmp_path):
    frame = gpd.GeoDataFrame({"class": ["a", "b"]}, geometry=[MultiPolygon(GRID[::2]), MultiPolygon(GRID[1::2])])
    frame.to_parquet(tmp_path / "n.parquet")
    nuclei = read_nuclei(tmp_path / "n.parquet", **SIZE)
    assert len(nuclei) == 50 and (nuclei["classification"] == "a").sum() == 25 and nuclei["cell_id"].is_unique
    pd.DataFrame({"class": frame["class"], "wkt": frame.geometry.to_wkt()}).to_csv(tmp_path / "n.csv", index=False)
    assert len(read_nuclei(tmp_path / "n.csv", **SIZE)) == 50


@pytest.mark.parametrize(
    ("word", "kept"),
    [
        ("PathCellObject", True),
        ("PathDetectionObject", True),
        ("PathAnnotationObject", False),
        ("TMACoreObject", False),
        ("PathTileObject", False),
    ],
)
def test_type_words_of_qupath_are_not_ids(tmp_path, word, kept):
    features = [feature(s, id="PathCellObject") for s in GRID] + [feature(box(181, 61, 189, 69), id=word)]
    nuclei = read_nuclei(write_json(tmp_path / "q.geojson", features), **SIZE)
    assert list(nuclei["cell_id"]) == [str(i) for i in range(50 + kept)]


@pytest.mark.parametrize("kind", ["annotation", "tmaCore", "tma core", "TMA core", None])
@pytest.mark.parametrize("region", [box(1, 1, 199, 99), shapely.Point(100, 50).buffer(45), box(100, 0, 200, 100)])
def test_regions_among_nuclei_are_left_out(tmp_path, kind, region, caplog):
    about = {} if kind is None else {"objectType": kind}
    nucleus = {"objectType": "annotation"} if kind == "annotation" else {}
    features = [feature(s, nucleus, id=f"n{i}") for i, s in enumerate(GRID)] + [feature(region, about, id="ROI")]
    size = {**SIZE, "mpp": 1.0}
    with caplog.at_level(logging.INFO):
        nuclei = read_nuclei(write_json(tmp_path / "q.geojson", features), **size)
    assert list(nuclei["cell_id"]) == [f"n{i}" for i in range(50)]
    assert sum("left out" in record.getMessage() for record in caplog.records) == 1
    assert len(read_nuclei(write_json(tmp_path / "q.geojson", features[:1] + features[-1:]), **size)) == 1
    assert (
        len(read_nuclei(write_json(tmp_path / "q.geojson", features[-1:]), **size)) == 1
    )  # alone, it is what was given


@pytest.mark.parametrize("about", [{}, {"name": "ROI"}, {"id": "only the region has this kind"}])
def test_regions_need_no_id(tmp_path, about):
    features = [feature(s, {"cell_id": i + 1}) for i, s in enumerate(GRID)] + [feature(box(1, 1, 199, 99), about)]
    nuclei = read_nuclei(write_json(tmp_path / "q.geojson", features), **{**SIZE, "mpp": 1.0})
    assert list(nuclei["cell_id"]) == [str(i + 1) for i in range(50)]


@pytest.mark.parametrize("name", ["cell_ID", "CellID", "Cell ID", "EntityID", "cell", "Object ID", "label_id"])
def test_ids_in_any_spelling(tmp_path, name):
    ids = ["a", "b", "c"]
    features = [feature(s, {name: i}) for s, i in zip(SHAPES, ids, strict=True)]
    assert_read(write_json(tmp_path / "n.geojson", features), ids)
    gpd.GeoDataFrame({name: ids}, geometry=SHAPES).to_parquet(tmp_path / "n.parquet")
    assert_read(tmp_path / "n.parquet", ids)


def test_merscope_counts_rows_as_id(tmp_path):
    table = {"ID": [0, 1, 2], "EntityID": [71, 72, 73]}
    gpd.GeoDataFrame(table, geometry=SHAPES).to_parquet(tmp_path / "n.parquet")
    assert_read(tmp_path / "n.parquet", ["71", "72", "73"])


def test_the_index_of_geoparquet_holds_ids(tmp_path):
    frame = gpd.GeoDataFrame(geometry=SHAPES, index=["aaaa-1", "aaab-1", "aaac-1"])
    for name in (None, "cell_id", "instance_id"):
        frame.rename_axis(name).to_parquet(tmp_path / "n.parquet")
        assert_read(tmp_path / "n.parquet", list(frame.index))
    frame.set_index(pd.Index([7, 3, 12])).to_parquet(tmp_path / "n.parquet")
    assert_read(tmp_path / "n.parquet", ["7", "3", "12"])
    levels = pd.MultiIndex.from_product([["s1"], frame.index], names=["section", "cell_id"])
    frame.set_index(levels).to_parquet(tmp_path / "n.parquet")
    assert_read(tmp_path / "n.parquet", list(frame.index))
    frame.set_index(pd.Index([0, 1, 0])).to_parquet(tmp_path / "n.parquet")  # two tables joined: not ids
    assert_read(tmp_path / "n.parquet", ["0", "1", "2"])


@pytest.mark.parametrize("pack", [lambda data: data, lambda data: b"\xef\xbb\xbf" + data, gzip.compress])
def test_a_collection_of_geometries(tmp_path, pack):
    geometries = [{**shapely.geometry.mapping(s), "cell": 10 * i} for i, s in enumerate(SHAPES)]
    for document in ({"type": "GeometryCollection", "geometries": geometries}, geometries):
        (tmp_path / "b.json").write_bytes(pack(json.dumps(document).encode()))
        assert_read(tmp_path / "b.json", ["0", "10", "20"])


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16])
def test_labels_may_be_whole_floating_point_numbers(tmp_path, dtype):
    labels = np.zeros((100, 200), dtype)
    labels[20:40, 10:20], labels[50:60, 50:55] = 300, 7
    tifffile.imwrite(tmp_path / "l.tif", labels)
    assert set(read_nuclei(tmp_path / "l.tif", **SIZE)["cell_id"]) == {"300", "7"}
    for wrong in (0.5, np.nan, np.inf, -1, 1e30):
        labels[0, 0] = np.minimum(wrong, np.finfo(dtype).max)
        tifffile.imwrite(tmp_path / "l.tif", labels)
        with pytest.raises(InputError, match=r"l\.tif: not a label image"):
            read_nuclei(tmp_path / "l.tif", **SIZE)


@pytest.mark.parametrize("factor", [2, 0.5])
def test_labels_at_another_resolution_are_scaled(tmp_path, factor, caplog):
    labels = np.zeros((100, 200), np.uint16)
    labels[20:40, 10:20], labels[50:60, 50:62], labels[10:14, 80:84] = 4, 9, 70
    labels = labels.repeat(2, 0).repeat(2, 1) if factor == 2 else labels[::2, ::2]
    tifffile.imwrite(tmp_path / "l.tif", labels)
    nuclei = read_nuclei(tmp_path / "l.tif", **SIZE)
    assert sorted(nuclei["cell_id"]) == ["4", "70", "9"]
    assert nuclei.set_index("cell_id").loc["4"].geometry.equals(box(10, 20, 20, 40))
    assert f"{200 * factor:.0f} x {100 * factor:.0f} px for an image of 200 x 100 px" in caplog.text
    tifffile.imwrite(tmp_path / "l.tif", np.pad(labels, ((0, 30), (0, 0))))
    with pytest.raises(InputError, match="give one of the same area"):
        read_nuclei(tmp_path / "l.tif", **SIZE)


HOVERNET = {
    "mag": 40,
    "nuc": {
        str(i + 7): {
            "bbox": [],
            "centroid": [],
            "contour": [list(xy) for xy in shape.exterior.coords[:-1]],
            "type_prob": 0.9,
            "type": i,
        }
        for i, shape in enumerate(SHAPES)
    },
}
CELLVIT = {
    "wsi_metadata": {"base_mpp": 0.25},
    "type_map": {"0": "Background", "1": "Neoplastic", "2": "Dead"},
    "cells": [{**cell, "offset_global": [0, 0]} for cell in HOVERNET["nuc"].values()],
}


@pytest.mark.parametrize(
    ("document", "ids", "classes"),
    [(HOVERNET, ["7", "8", "9"], ["0", "1", "2"]), (CELLVIT, ["0", "1", "2"], ["Background", "Neoplastic", "Dead"])],
)
def test_the_own_json_of_hovernet_and_cellvit(tmp_path, document, ids, classes):
    nuclei = assert_read(write_json(tmp_path / "n.json", document), ids)
    assert nuclei["classification"].tolist() == classes and nuclei["score"].tolist() == [0.9] * 3


@pytest.mark.parametrize("key", ["objectType", "object_type"])
def test_types_and_derived_classes_of_any_qupath(tmp_path, key):
    features = [feature(s, {key: "detection", "classification": {"names": ["Tumor", "Positive"]}}) for s in SHAPES]
    features.append(feature(box(1, 1, 30, 30), {key: "annotation"}))
    nuclei = assert_read(write_json(tmp_path / "q.geojson", features), ["0", "1", "2"])
    assert set(nuclei["classification"]) == {"Tumor: Positive"}


def test_circles_of_spatialdata(tmp_path):
    circles = gpd.GeoDataFrame(
        {"radius": [5.0, 8.0]}, geometry=shapely.points([[20, 30], [60, 50]]), index=["a-1", "b-1"]
    )
    circles.to_parquet(tmp_path / "c.parquet")
    nuclei = read_nuclei(tmp_path / "c.parquet", **SIZE)
    assert nuclei["cell_id"].tolist() == ["a-1", "b-1"]
    np.testing.assert_allclose(nuclei["area_um2"], np.pi * np.array([25, 64]) / 4, rtol=0.02)


def test_arrays_of_numpy_are_named(tmp_path):
    np.save(tmp_path / "cells_seg.npy", np.zeros((3, 3), int))
    np.savez(tmp_path / "labels.npz", np.zeros((3, 3), int))
    for name in ("cells_seg.npy", "labels.npz"):
        with pytest.raises(InputError, match=rf"{name}: a NumPy file or an archive; save its labels with tifffile"):
            read_nuclei(tmp_path / name, **SIZE)


def test_precedence_of_ids(tmp_path):
    both = [feature(s, {"cell_id": f"c{i}", "id": "x"}, id="y") for i, s in enumerate(SHAPES)]
    assert_read(write_json(tmp_path / "b.geojson", both), ["c0", "c1", "c2"])
    assert_read(write_json(tmp_path / "n.geojson", [feature(s) for s in SHAPES]), ["0", "1", "2"])
    some = [feature(s, {"id": i} if i else {}) for i, s in enumerate(SHAPES)]
    with pytest.raises(InputError, match="1 of 3 nuclei have no id"):
        read_nuclei(write_json(tmp_path / "s.geojson", some), **SIZE)


def test_geojson_with_open_rings_and_nan(tmp_path):
    shape = {"type": "Polygon", "coordinates": [[[10, 20], [20, 20], [20, 40], [10, 40]]]}
    nan = {"type": "Polygon", "coordinates": [[[0, 0], [float("nan"), 1], [1, 1], [0, 0]]]}
    features = [{"type": "Feature", "geometry": g, "properties": {}} for g in (shape, nan, None, {"type": "Point"})]
    assert_read(write_json(tmp_path / "o.geojson", features), ["0"])


def test_geoparquet_and_shapefile(tmp_path):
    frame = gpd.GeoDataFrame({"cell_id": [4, 5, 6], "score": [0.5, 0.25, 1.0]}, geometry=SHAPES)
    frame.to_parquet(tmp_path / "nuclei.geojson")
    assert list(assert_read(tmp_path / "nuclei.geojson", ["4", "5", "6"])["score"]) == [0.5, 0.25, 1.0]
    frame.to_file(tmp_path / "nuclei.shp")
    assert_read(tmp_path / "nuclei.shp", ["4", "5", "6"])


@pytest.mark.parametrize("separator", [",", "\t", ";"])
def test_wkt_tables(tmp_path, separator):
    frame = pd.DataFrame({"note": "", "outline": [f"SRID=0;{s.wkt}" for s in SHAPES], "id": ["007", "NA", "x y"]})
    frame.to_csv(tmp_path / "nuclei.geojson", sep=separator, index=False)
    assert_read(tmp_path / "nuclei.geojson", ["007", "NA", "x y"])


@pytest.mark.parametrize(("index", "ids"), [(["x", "y", "z"], ["x", "y", "z"]), ([1, 2, 3], ["0", "1", "2"])])
def test_the_first_column_of_a_table_may_be_its_index(tmp_path, index, ids):
    pd.DataFrame({"wkt": [s.wkt for s in SHAPES]}, index=index).to_csv(tmp_path / "n.csv")
    assert_read(tmp_path / "n.csv", ids)


def test_text_of_windows(tmp_path):
    """UTF-16 of a spreadsheet or of PowerShell, a byte order mark, and line ends of two characters."""
    table = pd.DataFrame({"wkt": [s.wkt for s in SHAPES], "cell_id": ["ä", "b", "c"]})
    features = [feature(s, {"cell_id": i}) for s, i in zip(SHAPES, "äbc", strict=True)]
    text = json.dumps(features, indent=1, ensure_ascii=False).replace("\n", "\r\n")
    for encoding in ("utf-16", "utf-8-sig"):
        table.to_csv(tmp_path / "n.txt", sep="\t", index=False, encoding=encoding, lineterminator="\r\n")
        assert_read(tmp_path / "n.txt", ["ä", "b", "c"])
        data = text.encode(encoding)
        for name, content in (("n.geojson", data), ("n.geojson.gz", gzip.compress(data))):
            (tmp_path / name).write_bytes(content)
            assert_read(tmp_path / name, ["ä", "b", "c"])
    table.to_csv(tmp_path / "n.csv", index=False, encoding="latin-1")
    with pytest.raises(InputError, match=r"cannot be read as text .*; save it as UTF-8"):
        read_nuclei(tmp_path / "n.csv", **SIZE)


@pytest.mark.parametrize("before", ["", "\x1e"])
def test_one_feature_a_line(tmp_path, before):
    lines = [before + json.dumps(feature(s, {"id": f"n{i}"})) for i, s in enumerate(SHAPES)]
    (tmp_path / "n.geojsonl").write_text("\n".join(lines))
    assert_read(tmp_path / "n.geojsonl", ["n0", "n1", "n2"])


def test_a_gzipped_label_image_is_refused_with_the_cure(tmp_path):
    tifffile.imwrite(tmp_path / "l.tif", np.ones((100, 200), np.uint8))
    (tmp_path / "l.tif.gz").write_bytes(gzip.compress((tmp_path / "l.tif").read_bytes()))
    with pytest.raises(InputError, match=r"is gzipped, .* unpack it"):
        read_nuclei(tmp_path / "l.tif.gz", **SIZE)


@pytest.mark.parametrize("suffix", [".tif", ".png"])
def test_label_image_keeps_labels_as_ids(tmp_path, suffix):
    labels = np.zeros((100, 200), np.uint16)
    labels[20:40, 10:20] = 300
    labels[50:60, 50:55] = 7
    labels[70, 70] = 7  # a smaller part
    path = tmp_path / f"labels{suffix}"
    tifffile.imwrite(path, labels) if suffix == ".tif" else Image.fromarray(labels).save(path)
    nuclei = read_nuclei(path, **SIZE).set_index("cell_id")
    assert nuclei.area_um2.to_dict() == {"300": 50.0, "7": 12.5}
    assert nuclei.geometry["300"].equals(box(10, 20, 20, 40))
    with pytest.raises(InputError, match="200 x 100 px for an image of 100 x 100"):
        read_nuclei(path, mpp=0.5, width=100, height=100)


def test_a_label_image_does_not_open_files_it_names(tmp_path):
    secret = np.zeros((100, 200), np.uint16)
    secret[10:30, 10:30] = 9
    (tmp_path / "other").mkdir()
    tifffile.imwrite(tmp_path / "other" / "secret.ome.tif", secret, metadata={"axes": "YX"})
    labels = np.zeros((100, 200), np.uint16)
    labels[50:60, 50:60] = 3
    uuid = "urn:uuid:00000000-0000-0000-0000-000000000000"
    description = (
        '<?xml version="1.0" encoding="UTF-8"?><OME xmlns="http://www.openmicroscopy.org/Schemas/OME/2016-06"><Image ID="Image:0">'
        '<Pixels ID="Pixels:0" DimensionOrder="XYCZT" Type="uint16" SizeX="200" SizeY="100" SizeC="1" SizeZ="1" SizeT="1">'
        f'<TiffData IFD="0" PlaneCount="1"><UUID FileName="../other/secret.ome.tif">{uuid}</UUID></TiffData></Pixels></Image></OME>'
    )
    (tmp_path / "labels").mkdir()
    path = tmp_path / "labels" / "labels.ome.tif"
    tifffile.imwrite(path, labels, description=description, metadata=None)
    assert list(read_nuclei(path, **SIZE).cell_id) == ["3"]


def test_other_images_are_not_label_images(tmp_path):
    tifffile.imwrite(tmp_path / "rgb.tif", np.zeros((100, 200, 3), np.uint8))
    with pytest.raises(InputError, match="not a label image"):
        read_nuclei(tmp_path / "rgb.tif", **SIZE)
    mask = np.zeros((100, 200), np.uint8)
    mask[10:20, 10:20] = mask[30:40, 30:40] = mask[50:60, 50:60] = 255
    tifffile.imwrite(tmp_path / "mask.tif", mask)
    with pytest.raises(InputError, match=r"a mask.*give one label per nucleus"):
        read_nuclei(tmp_path / "mask.tif", **SIZE)
    tifffile.imwrite(tmp_path / "none.tif", np.zeros((100, 200), np.uint8))
    with pytest.raises(InputError, match="contains no nuclei"):
        read_nuclei(tmp_path / "none.tif", **SIZE)


def test_large_labels_need_no_large_table(tmp_path):
    labels = np.zeros((100, 200), np.uint32)
    labels[20:40, 10:20] = 4_000_000_000
    tifffile.imwrite(tmp_path / "l.tif", labels)
    assert_read(tmp_path / "l.tif", ["4000000000"])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "unknown format"),
        (b"\x00\x01\x02", "unknown format"),
        (b"\x1f\x8bnot gzip at all", "cannot be read"),
        (b"\x1f\x8b\x08\x00\x00\x00\x00\x00\x00\x03\xff\xff\xff\xff", "cannot be read"),
        (b"{", "cannot be parsed"),
        (b'{"features":' + b"[" * 100_000, "cannot be parsed"),
        (b'{"a": 1}', "not GeoJSON"),
        (b"[1, 2]", "not GeoJSON"),
        (b'{"type": "FeatureCollection", "features": []}', "contains no nuclei"),
        (b"x,y\n1,2\n", "no column with WKT"),
        (b"PAR1 and then nothing", "cannot be read"),
        (b"\x00\x00\x27\x0a and then nothing", "truncated"),
        (b"\x89PNG and then nothing", "cannot be read"),
        (b"II*\x00 and then nothing", "contains no image"),
    ],
)
def test_broken_files_are_input_errors_of_one_line(tmp_path, content, message):
    (tmp_path / "nuclei").write_bytes(content)
    with pytest.raises(InputError, match=message) as caught:
        read_nuclei(tmp_path / "nuclei", **SIZE)
    assert str(tmp_path / "nuclei") in str(caught.value) and "\n" not in str(caught.value)


def test_a_coordinate_that_overflows_is_dropped(tmp_path):
    ring = [[10, 10], [30, 10], [30, 30], [10, 10]]
    odd = [[10**400, 10], *ring[1:3], [10**400, 10]]
    path = tmp_path / "n.geojson"
    geometries = [{"type": "Polygon", "coordinates": [one]} for one in (ring, odd)]
    path.write_text(json.dumps([{"type": "Feature", "properties": {}, "geometry": one} for one in geometries]))
    assert read_nuclei(path, **SIZE)["cell_id"].tolist() == ["0"]


def test_ids_other_than_text_and_numbers_are_refused(tmp_path):
    frame = gpd.GeoDataFrame({"cell_id": [b"\xff", b"a"], "geometry": [box(5, 5, 20, 20), box(40, 40, 60, 60)]})
    frame.to_parquet(tmp_path / "n.parquet")
    with pytest.raises(InputError, match="cell_id contains values other than text"):
        read_nuclei(tmp_path / "n.parquet", **SIZE)


def test_a_label_image_of_another_size_is_refused_before_it_is_decoded(tmp_path):
    path = tmp_path / "labels.tif"
    tifffile.imwrite(path, np.zeros((16, 16), np.uint16), tile=(16, 16), compression="zlib")
    with tifffile.TiffFile(path, mode="r+b") as tif:
        for name in ("ImageWidth", "ImageLength"):
            tif.pages[0].tags[name].overwrite(2**20 - 1, dtype="I")
    with pytest.raises(InputError, match="label image of 1048575 x 1048575 px for an image of"):
        read_nuclei(path, **SIZE)


def test_a_label_image_with_huge_tiles_is_refused(tmp_path):
    path = tmp_path / "labels.tif"
    labels = np.zeros((SIZE["height"], SIZE["width"]), np.uint16)
    tifffile.imwrite(path, labels, tile=(16, 16), compression="zlib")
    with tifffile.TiffFile(path, mode="r+b") as tif:
        tif.pages[0].tags["TileWidth"].overwrite(2**31, dtype="I")
    with pytest.raises(InputError, match="a tile of a label image of 2,147,483,648 x 16 px"):
        read_nuclei(path, **SIZE)


@pytest.mark.parametrize("column", ["cell_id", "geometry", "score"])
def test_invalid_nuclei_files_are_refused(tmp_path, column):
    nuclei = make_nuclei([box(5, 5, 20, 20), box(40, 40, 60, 60)], 0.5)
    nuclei[column] = {"cell_id": "a", "geometry": gpd.points_from_xy([1, 2], [1, 2]), "score": "high"}[column]
    nuclei.to_parquet(tmp_path / "n.parquet")
    with pytest.raises(InputError, match="does not contain unique ids, polygons"):
        load_nuclei(tmp_path / "n.parquet")


def test_missing_file_and_parquet_without_geometry(tmp_path):
    with pytest.raises(InputError, match="no such file"):
        read_nuclei(tmp_path / "none.geojson", **SIZE)
    pd.DataFrame({"a": [1]}).to_parquet(tmp_path / "t.parquet")
    with pytest.raises(InputError, match="has no geometry"):
        read_nuclei(tmp_path / "t.parquet", **SIZE)


# --- against the image


def test_few_outside_are_dropped_and_most_outside_is_an_error(tmp_path, caplog):
    inside = [box(10 * i, 10, 10 * i + 5, 15) for i in range(5)]
    frame = gpd.GeoDataFrame(geometry=[*inside, box(300, 10, 310, 20)])
    frame.to_parquet(tmp_path / "n.parquet")
    with caplog.at_level(logging.INFO):
        nuclei = read_nuclei(tmp_path / "n.parquet", **SIZE)
    assert len(nuclei) == 5 and list(nuclei.index) == list(range(5)) and "1 nuclei outside" in caplog.text
    with pytest.raises(InputError, match="are outside the image of 20 x 100 px"):
        read_nuclei(tmp_path / "n.parquet", mpp=0.5, width=20, height=100)


def test_um_instead_of_px_is_detected(tmp_path, caplog):
    def write(shapes):
        gpd.GeoDataFrame(geometry=shapes).to_parquet(tmp_path / "n.parquet")
        return tmp_path / "n.parquet"

    with pytest.raises(InputError, match="they seem to be in um"):
        read_nuclei(write([box(150 + i, 10, 155 + i, 15) for i in range(5)]), mpp=2.0, width=100, height=100)
    # With mpp < 1 coordinates in um always fit into the image; the nuclei are just too small.
    shapes = [box(10 * i, 10, 10 * i + 7, 17) for i in range(5)]
    read_nuclei(write(shapes), mpp=0.25, width=1000, height=1000)
    assert "coordinates must be in px, not in um" in caplog.text
    with pytest.raises(InputError, match="with x and y swapped they fit"):
        read_nuclei(write([box(10, 150 + i, 15, 155 + i) for i in range(5)]), **SIZE)


# --- the cache's own format


def test_write_and_load_round_trip(tmp_path):
    nuclei = make_nuclei(SHAPES, 0.5, cell_id=["a", "b", "ä"], score=[0.1, 0.2, np.nan])
    write_nuclei(nuclei, tmp_path / "n.parquet")
    loaded = load_nuclei(tmp_path / "n.parquet")
    pd.testing.assert_frame_equal(pd.DataFrame(loaded), pd.DataFrame(nuclei))
    assert loaded.crs is None and [p.name for p in tmp_path.iterdir()] == ["n.parquet"]
    pd.testing.assert_frame_equal(pd.DataFrame(read_nuclei(tmp_path / "n.parquet", **SIZE)), pd.DataFrame(nuclei))
    empty = make_nuclei([], 0.5)
    write_nuclei(empty, tmp_path / "e.parquet")
    assert len(load_nuclei(tmp_path / "e.parquet")) == 0
    with pytest.raises(InputError, match="no such file"):
        load_nuclei(tmp_path / "other.parquet")
    gpd.GeoDataFrame({"a": [1]}, geometry=SHAPES[:1]).to_parquet(tmp_path / "a.parquet")
    with pytest.raises(InputError, match="has the columns"):
        load_nuclei(tmp_path / "a.parquet")


# --- anything at all that parses as JSON

_numbers = st.one_of(st.integers(-5, 205), st.floats(allow_nan=True, allow_infinity=True))
_anything = st.recursive(
    st.one_of(st.none(), st.booleans(), _numbers, st.text(max_size=3)),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=3), inner, max_size=3)),
    max_leaves=6,
)
_rings = st.lists(st.lists(_numbers, min_size=2, max_size=3), min_size=0, max_size=6)
_geometry = st.one_of(
    st.fixed_dictionaries({"type": st.just("Polygon"), "coordinates": st.lists(_rings, max_size=2)}),
    st.fixed_dictionaries({"type": st.just("MultiPolygon"), "coordinates": st.lists(st.lists(_rings, max_size=2), max_size=2)}),
    st.fixed_dictionaries({"type": st.sampled_from(["Point", "Polygon", "nonsense"]), "coordinates": _anything}),
    _anything,
)  # fmt: skip
_features = st.lists(
    st.fixed_dictionaries(
        {"type": st.just("Feature"), "geometry": _geometry},
        optional={
            "properties": st.one_of(
                _anything, st.dictionaries(st.sampled_from(["cell_id", "id", "score", "objectType"]), _anything)
            ),
            "id": _anything,
            "nucleusGeometry": _geometry,
        },
    ),
    max_size=4,
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(features=_features, as_list=st.booleans())
def test_any_geojson_gives_good_nuclei_or_an_input_error(tmp_path, features, as_list):
    path = write_json(
        tmp_path / "h.geojson", features if as_list else {"type": "FeatureCollection", "features": features}
    )
    try:
        nuclei = read_nuclei(path, **SIZE)
    except InputError as error:
        assert str(error).startswith(str(path))
        return
    assert len(nuclei) and nuclei["cell_id"].is_unique and all(isinstance(i, str) for i in nuclei["cell_id"])
    assert (nuclei.geom_type == "Polygon").all() and nuclei.is_valid.all() and (nuclei["area_um2"] > 0).all()
    assert np.isfinite(nuclei["area_um2"]).all()
