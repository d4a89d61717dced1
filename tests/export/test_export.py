"""Exports, read back with the tools they are made for."""

import json
import tracemalloc
from types import SimpleNamespace

import anndata as ad
import geopandas as gpd
import h5py
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import shapely
import tifffile

from prts.cli.app import run
from prts.errors import InputError
from prts.export.pipeline import export_prediction
from prts.export.source import open_prediction
from prts.export.tables import write_csv
from prts.io.nuclei import read_nuclei
from prts.io.prediction import PredictionWriter, nuclei_path, read_prediction, spatial_uns

MPP, WIDTH, HEIGHT = 0.5, 1500, 1100
GENES = ["Plp1", "HLA-DRA", 'a"b', "Mbp"]


def write_prediction(path, n=60, genes=GENES, seed=0):
    rng = np.random.default_rng(seed)
    xy = rng.random((n, 2)) * [WIDTH - 80, HEIGHT - 80] + 40
    outlines = shapely.buffer(shapely.points(xy), 8, quad_segs=3)
    nuclei = gpd.GeoDataFrame(
        {
            "cell_id": [f"n é{i}" for i in rng.permutation(n)],
            "geometry": outlines,
            "area_um2": shapely.area(outlines) * MPP**2,
            "score": np.nan,
        }
    )
    nuclei["ood"] = np.where(np.arange(n) == 3, np.nan, rng.random(n))
    nuclei["cluster"] = pd.Categorical(np.where(np.arange(n) == 5, None, rng.choice(["T cell", "tumour"], n)))
    var = pd.DataFrame(
        {"gene_id": [f"E{i}" for i in range(len(genes))], "val_pcc": np.linspace(0, 1, len(genes))},
        index=pd.Index(genes, name="gene"),
    )
    umi = rng.gamma(0.5, 1, (n, len(genes))).astype(np.float32)
    umi[umi < 0.1] = 0
    prob = rng.random(umi.shape).astype(np.float32)
    picture = rng.integers(0, 255, (HEIGHT // 5, WIDTH // 5, 3), dtype=np.uint8)
    about = {"width": WIDTH, "height": HEIGHT, "mpp": MPP, "image": "he.tif"}
    uns = {"prts": about, "spatial": spatial_uns("s1", picture, WIDTH, 16.0)}
    with PredictionWriter(path, var, nuclei, uns) as writer:
        writer.write(0, umi, prob)
    return SimpleNamespace(path=path, nuclei=nuclei, umi=umi, prob=prob, xy=xy, picture=picture)


@pytest.fixture
def prediction(tmp_path):
    return write_prediction(tmp_path / "a slide, = é.h5ad")


def saved_again(made, layout):
    """Save a prediction as another program would."""
    ad.settings.allow_write_nullable_strings = True
    table = ad.read_h5ad(made.path)
    if layout == "csc":
        table.X = sp.csc_matrix(table.X)
        table.layers["prob"] = sp.csc_matrix(table.layers["prob"])
    elif layout == "dense":
        table.X = table.X.toarray()
        del table.layers["prob"]
    else:
        table.obs["cluster"] = table.obs["cluster"].astype("string")
        table.var["gene_id"] = table.var["gene_id"].astype("string")
        table.obs.index, table.var.index = table.obs.index.astype("string"), table.var.index.astype("string")
    table.write_h5ad(made.path, compression="gzip" if layout == "csc" else None)
    ad.settings.allow_write_nullable_strings = False


@pytest.mark.parametrize("layout", ["csc", "dense", "strings"])
@pytest.mark.parametrize("n", [3, 60])
def test_a_prediction_saved_again_is_read_rightly(prediction, tmp_path, layout, n):
    """With fewer nuclei than genes, rows could be taken for columns unnoticed."""
    made = write_prediction(tmp_path / "again.h5ad", n=n, genes=[f"g{i}" for i in range(8)])
    saved_again(made, layout)
    genes = ["g6", "g1"]
    for form in ("csv", "parquet"):
        assert export(made, form, tmp_path / f"t.{form}", "genes=[g6,g1]") == 0
    for table in (pd.read_csv(tmp_path / "t.csv"), pd.read_parquet(tmp_path / "t.parquet")):
        np.testing.assert_allclose(table[genes], made.umi[:, [6, 1]], rtol=1e-5)
        assert table["cell_id"].tolist() == made.nuclei["cell_id"].tolist()
    assert export(made, "geojson", tmp_path / "t.geojson", "genes=[g6]") == 0
    features = json.loads((tmp_path / "t.geojson").read_text())["features"]
    np.testing.assert_allclose([f["properties"]["measurements"]["g6"] for f in features], made.umi[:, 6], atol=1e-6)
    read = read_prediction(made.path)
    np.testing.assert_array_equal(read.X.toarray(), made.umi)
    assert read.X.format == "csr" and read.obs.index.dtype == read.var["gene_id"].dtype == object
    if layout != "dense":
        np.testing.assert_array_equal(read.layers["prob"], made.prob)


@pytest.mark.parametrize("layout", ["csc", "dense", "strings"])
def test_a_prediction_saved_again_becomes_spatialdata(tmp_path, layout):
    spatialdata = pytest.importorskip("spatialdata")
    made = write_prediction(tmp_path / "again.h5ad")
    saved_again(made, layout)
    export_prediction(made.path, tmp_path / "s.zarr", format="spatialdata", genes=["Mbp", "Plp1"])
    table = spatialdata.read_zarr(tmp_path / "s.zarr").tables["prediction"]
    values = table.X.toarray() if sp.issparse(table.X) else np.asarray(table.X)
    np.testing.assert_array_equal(values, made.umi[:, [3, 0]])


def export(prediction, form, out, *more):
    return run("export", [f"prediction={prediction.path}", f"format={form}", f"out={out}", *more])


@pytest.mark.parametrize("form", ["csv", "parquet"])
def test_a_table_holds_every_nucleus_with_its_place_and_the_genes_asked_for(prediction, tmp_path, form):
    out = tmp_path / f"t.{form}"
    assert export(prediction, form, out, "genes=[Mbp,HLA-DRA]") == 0
    table = pd.read_csv(out) if form == "csv" else pd.read_parquet(out)
    assert table.columns.tolist() == ["cell_id", "x", "y", "area_um2", "ood", "cluster", "Mbp", "HLA-DRA"]
    assert table["cell_id"].tolist() == prediction.nuclei["cell_id"].tolist()
    np.testing.assert_allclose(table[["x", "y"]], prediction.xy, rtol=1e-5)
    np.testing.assert_allclose(table[["Mbp", "HLA-DRA"]], prediction.umi[:, [3, 1]], rtol=1e-5)
    assert np.flatnonzero(table["ood"].isna()).tolist() == [3]
    assert np.flatnonzero(table["cluster"].isna()).tolist() == [5]
    assert export(prediction, form, tmp_path / f"all.{form}") == 0
    every = pd.read_csv(tmp_path / f"all.{form}") if form == "csv" else pd.read_parquet(tmp_path / f"all.{form}")
    assert every.columns.tolist()[6:] == GENES


def test_chunks_follow_each_other_without_a_seam(prediction):
    file = open_prediction(prediction.path)
    for size in (1, 7, 60, 100):
        parts = [umi for _, umi in file.chunks(np.arange(4), size)]
        np.testing.assert_array_equal(np.concatenate(parts), prediction.umi)


def test_qupath_gets_detections_with_classes_and_measurements(prediction, tmp_path):
    out = tmp_path / "q.geojson"
    assert export(prediction, "geojson", out, "genes=[Plp1,'a\"b']") == 0
    collection = json.loads(out.read_text(encoding="utf-8"))
    assert collection["type"] == "FeatureCollection"
    features = collection["features"]
    assert [f["id"] for f in features] == prediction.nuclei["cell_id"].tolist()
    first = features[0]
    assert first["properties"]["objectType"] == "detection"
    assert first["properties"]["name"] == first["id"]
    assert list(first["properties"]["measurements"]) == ["area_um2", "ood", "Plp1", 'a"b']
    values = [[f["properties"]["measurements"][gene] for gene in ("Plp1", 'a"b')] for f in features]
    np.testing.assert_allclose(values, prediction.umi[:, [0, 2]], atol=1e-6)
    assert "ood" not in features[3]["properties"]["measurements"]  # QuPath takes no null
    classes = [f["properties"].get("classification", {}).get("name") for f in features]
    assert classes == [None if pd.isna(c) else c for c in prediction.nuclei["cluster"]]
    colours = {c["name"]: tuple(c["color"]) for f in features if (c := f["properties"].get("classification"))}
    assert len(set(colours.values())) == 2
    # geopandas reads it, and so does prts: nuclei for another prediction, under the same ids
    read = gpd.read_file(out)
    assert shapely.equals_exact(read.geometry.to_numpy(), prediction.nuclei.geometry.to_numpy(), 1e-9).all()
    again = read_nuclei(out, mpp=MPP, width=WIDTH, height=HEIGHT)
    assert again["cell_id"].tolist() == prediction.nuclei["cell_id"].tolist()


def test_qupath_gets_the_best_genes_where_none_are_named(tmp_path):
    prediction = write_prediction(tmp_path / "p.h5ad", genes=[f"g{i}" for i in range(30)])
    assert export(prediction, "geojson", tmp_path / "q.geojson") == 0
    first = json.loads((tmp_path / "q.geojson").read_text())["features"][0]
    assert list(first["properties"]["measurements"])[2:] == [f"g{i}" for i in range(29, 9, -1)]


@pytest.mark.slow
def test_spatialdata_reads_image_shapes_and_table_at_their_place(prediction, tmp_path):
    import spatialdata as sd
    from spatialdata.transformations import get_transformation

    pixels = np.random.default_rng(1).integers(0, 255, (HEIGHT, WIDTH, 3), dtype=np.uint8)
    tifffile.imwrite(tmp_path / "he.tif", pixels, photometric="rgb")  # beside the prediction, which names it
    out = tmp_path / "sd.zarr"
    assert export(prediction, "spatialdata", out) == 0
    data = sd.read_zarr(out)
    scales = data.images["he"]
    assert [scales[s]["image"].shape for s in scales] == [(3, 1100, 1500), (3, 550, 750)]
    np.testing.assert_array_equal(np.moveaxis(scales["scale0"]["image"].to_numpy(), 0, -1), pixels)
    shapes, table = data.shapes["nuclei"], data.tables["prediction"]
    assert shapes.index.tolist() == table.obs["cell_id"].tolist() == prediction.nuclei["cell_id"].tolist()
    assert shapely.equals_exact(shapes.geometry.to_numpy(), prediction.nuclei.geometry.to_numpy(), 0).all()
    np.testing.assert_array_equal(table.X.toarray(), prediction.umi)
    np.testing.assert_array_equal(table.layers["prob"], prediction.prob)
    assert table.var_names.tolist() == GENES
    assert float(table.uns["prts"]["mpp"]) == MPP
    to_um = get_transformation(data.shapes["nuclei"], "um").to_affine_matrix(("x", "y"), ("x", "y"))
    np.testing.assert_allclose(to_um, np.diag([MPP, MPP, 1]))
    values = sd.get_values("Mbp", sdata=data, element_name="nuclei", table_name="prediction")
    np.testing.assert_array_equal(values["Mbp"], prediction.umi[:, 3])


@pytest.mark.slow
def test_spatialdata_without_the_image_holds_the_small_picture_at_its_place(prediction, tmp_path):
    import spatialdata as sd
    from spatialdata.transformations import get_transformation

    tifffile.imwrite(tmp_path / "he.tif", np.zeros((50, 60, 3), np.uint8), photometric="rgb")  # not the one predicted
    assert export(prediction, "spatialdata", tmp_path / "sd.zarr", "genes=[Mbp,Plp1]") == 0
    data = sd.read_zarr(tmp_path / "sd.zarr")
    np.testing.assert_array_equal(np.moveaxis(data.images["he"].to_numpy(), 0, -1), prediction.picture)
    to_px = get_transformation(data.images["he"], "global").to_affine_matrix(("x", "y"), ("x", "y"))
    np.testing.assert_allclose(to_px, np.diag([5, 5, 1]))
    table = data.tables["prediction"]
    assert table.var_names.tolist() == ["Mbp", "Plp1"]
    np.testing.assert_array_equal(table.X.toarray(), prediction.umi[:, [3, 0]])
    np.testing.assert_array_equal(table.layers["prob"], prediction.prob[:, [3, 0]])


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_squidpy_draws_a_prediction_as_it_is(prediction):
    import matplotlib as mpl

    mpl.use("Agg")
    import squidpy as sq

    axes = sq.pl.spatial_scatter(ad.read_h5ad(prediction.path), color="Mbp", shape="circle", return_ax=True)
    assert axes.images[0].get_array().shape[:2] == (HEIGHT // 5, WIDTH // 5)
    drawn = np.asarray(axes.collections[0].get_array(), dtype=float)
    np.testing.assert_allclose(np.sort(drawn), np.sort(prediction.umi[:, 3]))


def test_a_large_prediction_is_never_dense_at_once(tmp_path):
    n, g = 12_000, 150
    prediction = write_prediction(tmp_path / "p.h5ad", n, [f"g{i}" for i in range(g)])
    del prediction
    file = open_prediction(tmp_path / "p.h5ad")
    tracemalloc.start()
    for _ in file.chunks(np.arange(g), 512):
        pass
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < n * g * 4 / 4  # X alone would be 7.2 MB
    write_csv(file, np.arange(2), tmp_path / "t.csv")
    assert sum(1 for _ in (tmp_path / "t.csv").open()) == n + 1


def test_export_is_a_function_of_plain_arguments(prediction, tmp_path):
    out = export_prediction(prediction.path, tmp_path / "t.csv", format="csv", genes=["Mbp"])
    assert pd.read_csv(out).columns.tolist()[6:] == ["Mbp"]
    with pytest.raises(InputError, match="format: geojsn is unknown, did you mean 'geojson'"):
        export_prediction(prediction.path, tmp_path / "q", format="geojsn")


@pytest.mark.parametrize(
    ("form", "more", "words"),
    [
        ("geojsn", [], ["format: 'geojsn' is not accepted", "geojson"]),
        ("csv", ["genes=[Plp2]"], ["Plp2", "did you mean 'Plp1'"]),
        ("geojson", ["classification=leiden"], ["classification: leiden", "area_um2"]),
        ("csv", ["prediction=nowhere.h5ad"], ["nowhere.h5ad: no such file"]),
        ("spatialdata", ["image=nowhere.tif"], ["nowhere.tif: no such file"]),
    ],
)
def test_wrong_input_is_one_line_and_leaves_nothing(prediction, tmp_path, capsys, form, more, words):
    assert export(prediction, form, tmp_path / "out", *more) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    for word in words:
        assert word in error
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a slide, = é.h5ad", "a slide, = é.nuclei.parquet"]


def test_an_image_of_another_size_is_refused(prediction, tmp_path, capsys):
    tifffile.imwrite(tmp_path / "other.tif", np.zeros((50, 60, 3), np.uint8), photometric="rgb")
    assert export(prediction, "spatialdata", tmp_path / "out", f"image={tmp_path / 'other.tif'}") == 2
    assert "is 60 x 50 px, but the predicted image was 1500 x 1100 px" in capsys.readouterr().err


def test_what_is_there_is_replaced_only_when_told(prediction, tmp_path, capsys):
    out = tmp_path / "t.csv"
    out.write_text("mine")
    assert export(prediction, "csv", out) == 2
    assert "exists; choose another name, or set `overwrite`" in capsys.readouterr().err
    assert out.read_text() == "mine"
    assert export(prediction, "csv", out, "overwrite=true") == 0
    assert len(pd.read_csv(out)) == 60
    # a folder that holds something else is never replaced
    (tmp_path / "folder").mkdir()
    assert export(prediction, "spatialdata", tmp_path / "folder", "overwrite=true") == 2
    assert export(prediction, "csv", tmp_path / "missing" / "t.csv") == 2
    assert "missing does not exist" in capsys.readouterr().err


def test_polygons_must_lie_beside_the_prediction(prediction, tmp_path, capsys):
    nuclei = nuclei_path(prediction.path)
    gpd.read_parquet(nuclei).iloc[1:].to_parquet(nuclei)
    assert export(prediction, "geojson", tmp_path / "q.geojson") == 2
    assert f"has no nucleus {prediction.nuclei['cell_id'][0]!r}" in capsys.readouterr().err
    nuclei.unlink()
    assert export(prediction, "geojson", tmp_path / "q.geojson") == 2
    error = capsys.readouterr().err
    assert "nuclei.parquet: no such file" in error
    assert error.count("\n") == 1
    assert export(prediction, "csv", tmp_path / "t.csv") == 0  # a table needs none


def test_a_gene_named_like_another_column_is_refused(tmp_path, capsys):
    prediction = write_prediction(tmp_path / "p.h5ad", genes=["x", "B"])
    assert export(prediction, "csv", tmp_path / "t.csv") == 2
    assert "'x' is also the name of another column" in capsys.readouterr().err
    assert export(prediction, "csv", tmp_path / "t.csv", "genes=B") == 0


@pytest.mark.parametrize(
    ("name", "value", "why"),
    [
        ("X/indices", 1_000_000, "X is damaged"),
        ("X/indptr", 1_000_000, "X is damaged"),
        ("uns/prts/scale", "log1p", "log1p"),
        ("obsm/spatial", "a", "is not a prediction"),
        ("obs", h5py.ExternalLink("other.h5ad", "obs"), "is a link"),
    ],
)
def test_a_file_that_is_no_sound_prediction_is_refused(tmp_path, name, value, why):
    write_prediction(tmp_path / "p.h5ad")
    with h5py.File(tmp_path / "p.h5ad", "r+") as file:
        if name.startswith("X/"):
            file[name][5] = value
        else:
            del file[name]
            file[name] = value
    with pytest.raises(InputError, match=why):
        list(open_prediction(tmp_path / "p.h5ad").chunks(np.array([0])))


def test_polygons_of_one_id_twice_are_refused(tmp_path):
    write_prediction(tmp_path / "p.h5ad")
    polygons = gpd.read_parquet(nuclei_path(tmp_path / "p.h5ad"))
    polygons.assign(cell_id="a").to_parquet(nuclei_path(tmp_path / "p.h5ad"))
    with pytest.raises(InputError, match="does not contain unique ids"):
        open_prediction(tmp_path / "p.h5ad").nuclei()


def test_an_analysis_travels_along(prediction, tmp_path):
    types = pd.Categorical(np.where(np.arange(50) % 2, "T cell", "tumor cell"))
    obs = pd.DataFrame(
        {"cluster": "9", "type": types, "score_0": 0.5}, index=prediction.nuclei["cell_id"][:50].astype(str)
    )
    analysis = ad.AnnData(np.zeros((50, 1), np.float32), obs=obs.drop(columns="cluster").iloc[::-1])
    analysis.obsm["spatial"] = np.zeros((50, 2))
    analysis.uns["clusters"] = {"resolution": 0.6}
    analysis.write_h5ad(tmp_path / "analysis.h5ad")
    out = tmp_path / "typed.geojson"
    export_prediction(
        prediction.path, out, format="geojson", analysis=tmp_path / "analysis.h5ad", classification="type"
    )
    features = json.loads(out.read_text(encoding="utf-8"))["features"]
    named = [feature["properties"].get("classification", {}).get("name") for feature in features]
    assert named == [*types.astype(object), *[None] * 10]
    assert features[0]["properties"]["measurements"]["score_0"] == 0.5
    export_prediction(prediction.path, tmp_path / "typed.csv", format="csv", analysis=tmp_path / "analysis.h5ad")
    assert pd.read_csv(tmp_path / "typed.csv")["type"].tolist()[:50] == list(types)
    with pytest.raises(InputError, match="is an analysis; give the prediction here"):
        export_prediction(tmp_path / "analysis.h5ad", tmp_path / "x.csv", format="csv")
    ad.AnnData(np.zeros((3, 1), np.float32)).write_h5ad(tmp_path / "other.h5ad")
    with pytest.raises(InputError, match="shares no nuclei"):
        export_prediction(prediction.path, tmp_path / "x.csv", format="csv", analysis=tmp_path / "other.h5ad")
