"""A SpatialData store: elements are chosen by name or because there is one, and transformations are honored."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import anndata as ad
import geopandas as gpd
import numpy as np
import pytest
import shapely

from prts.data.resolve import resolve_section
from prts.data.tissue import parse_tissue
from prts.errors import InputError
from prts.io.slide import open_slide
from prts.platforms.spatialdata_cells import SpatialDataCells
from prts.section import read_section

sd = pytest.importorskip("spatialdata")
from spatialdata.models import Image2DModel, Labels2DModel, ShapesModel, TableModel  # noqa: E402
from spatialdata.transformations import Affine, Identity, Scale, Sequence  # noqa: E402

# From um of the cells to the system `global`, and from px of the image to it.
CELLS = Affine([[0, -3.0, 2000], [3.0, 0, 40], [0, 0, 1]], input_axes=("x", "y"), output_axes=("x", "y"))
UM_PER_PX = 0.5


def element(measured: SimpleNamespace, px: np.ndarray | None = None) -> gpd.GeoDataFrame:
    shapes = measured.nuclei.geometry.to_numpy() if px is None else px
    um = shapely.transform(shapes, lambda xy: xy * UM_PER_PX)
    frame = gpd.GeoDataFrame(geometry=um, index=measured.nuclei["cell_id"].to_numpy())
    return ShapesModel.parse(frame, transformations={"global": CELLS})


def table(cells: ad.AnnData, region: str) -> ad.AnnData:
    obs = cells.obs.assign(cell_id=cells.obs_names, region=region).rename_axis(None)
    obs["region"] = obs["region"].astype("category")
    made = ad.AnnData(cells.layers["counts"], obs=obs, var=cells.var, layers={"lognorm": cells.X})
    return TableModel.parse(made, region=region, region_key="region", instance_key="cell_id")


def image(measured: SimpleNamespace, transformation: object) -> object:
    from prts.io.slide import image_size

    width, height = image_size(measured.image)
    pixels = np.zeros((3, height, width), np.uint8)
    return Image2DModel.parse(pixels, dims=("c", "y", "x"), transformations={"global": transformation})


@pytest.fixture
def store(measured: SimpleNamespace, cells: ad.AnnData, tmp_path: Path) -> Path:
    """Shapes in um; the image leads to `global` by the same rotation, so that px * 0.5 = um."""
    he = image(measured, Sequence([Scale([UM_PER_PX, UM_PER_PX], axes=("x", "y")), CELLS]))
    data = sd.SpatialData(
        images={"he": he}, shapes={"nuclei": element(measured)}, tables={"table": table(cells, "nuclei")}
    )
    data.write(tmp_path / "store.zarr")
    return tmp_path / "store.zarr"


def opened(measured: SimpleNamespace, store: Path, **settings: object) -> SpatialDataCells:
    section = read_section(measured.image, platform="spatialdata", sdata=store, **settings)
    assert isinstance(section.measurement, SpatialDataCells)
    return section.measurement


def same_cells(measured: SimpleNamespace, platform: SpatialDataCells, places_px: float = 1e-6) -> None:
    outlines = platform.outlines(UM_PER_PX)
    assert outlines["cell_id"].tolist() == measured.nuclei["cell_id"].tolist()
    there = shapely.centroid(measured.nuclei.geometry.to_numpy())
    assert shapely.distance(shapely.centroid(outlines.geometry.to_numpy()), there).max() < places_px
    np.testing.assert_array_equal(platform.counts(outlines).X.toarray(), measured.counts.X.toarray())


def test_the_only_elements_are_found_and_transformed_to_the_image(measured: SimpleNamespace, store: Path) -> None:
    platform = opened(measured, store)
    same_cells(measured, platform)
    assert set(platform.identity()) == {"table", "cells", "to_px"}
    assert platform.identity() != opened(measured, store, layer="lognorm").identity()


def test_of_several_elements_the_named_ones_are_read(measured: SimpleNamespace, cells: ad.AnnData, store: Path) -> None:
    data = sd.read_zarr(store)
    moved = shapely.transform(measured.nuclei.geometry.to_numpy(), lambda xy: xy + 20)
    data.images["other"] = image(measured, Identity())
    data.shapes["grown"] = element(measured, shapely.buffer(moved, 2.0))
    data.tables["second"] = table(cells[::-1], "grown")
    for name in ("other", "grown", "second"):
        data.write_element(name)
    with pytest.raises(InputError, match=r"several tables \(second, table\); name one as `table`"):
        opened(measured, store, image_element="he")
    with pytest.raises(InputError, match=r"several images .* as `image_element`"):
        opened(measured, store, table="table")
    same_cells(measured, opened(measured, store, table="table", image_element="he"))
    grown = opened(measured, store, table="table", image_element="he", shapes="grown").outlines(UM_PER_PX)
    off = shapely.distance(shapely.centroid(grown.geometry.to_numpy()), shapely.centroid(moved))
    assert off.max() < 0.5 and grown["area_um2"].median() > 1.3 * measured.nuclei["area_um2"].median()
    second = opened(measured, store, table="second", image_element="he")
    assert second.outlines(UM_PER_PX)["cell_id"].tolist() == measured.nuclei["cell_id"].tolist()[::-1]
    for key, value, hint in (
        ("table", "tabel", "did you mean 'table'"),
        ("shapes", "grow", "did you mean 'grown'"),
        ("image_element", "hee", "did you mean 'he'"),
        ("layer", "lognrm", "did you mean 'lognorm'"),
        ("coordinate_system", "globl", "did you mean 'global'"),
    ):
        given = {"table": "table", "image_element": "he"} | {key: value}
        with pytest.raises(InputError, match=hint):
            opened(measured, store, **given)._counts()


def test_a_coordinate_system_in_place_of_an_image(measured: SimpleNamespace, cells: ad.AnnData, tmp_path: Path) -> None:
    frame = element(measured)
    sd.transformations.set_transformation(frame, Scale([2.0, 2.0], axes=("x", "y")), "he_px")
    data = sd.SpatialData(shapes={"nuclei": frame}, tables={"table": table(cells, "nuclei")})
    data.write(tmp_path / "store.zarr")
    same_cells(measured, opened(measured, tmp_path / "store.zarr", coordinate_system="he_px"))
    with pytest.raises(InputError, match=r"are outside .* `image_element` or `coordinate_system`"):
        opened(measured, tmp_path / "store.zarr", coordinate_system="global")


def test_circles_and_labels(measured: SimpleNamespace, cells: ad.AnnData, store: Path) -> None:
    from skimage.draw import polygon as fill

    from prts.io.slide import image_size

    data = sd.read_zarr(store)
    centers = shapely.get_coordinates(shapely.centroid(measured.nuclei.geometry.to_numpy()))
    data.shapes["circles"] = ShapesModel.parse(
        centers * UM_PER_PX, geometry=0, radius=4.0, index=measured.nuclei["cell_id"], transformations={"global": CELLS}
    )
    width, height = image_size(measured.image)
    labels = np.zeros((height, width), np.int32)
    for number, shape in enumerate(measured.nuclei.geometry, start=1):
        x, y = np.array(shape.exterior.coords).T
        labels[fill(y - 0.5, x - 0.5, labels.shape)] = number
    to_global = Sequence([Scale([UM_PER_PX, UM_PER_PX], axes=("x", "y")), CELLS])
    data.labels["masks"] = Labels2DModel.parse(
        labels, dims=("y", "x"), scale_factors=[2], transformations={"global": to_global}
    )
    numbered = table(cells, "masks")
    numbered.obs["cell_id"] = np.arange(numbered.n_obs) + 1
    data.tables["of_masks"] = numbered
    for name in ("circles", "masks", "of_masks"):
        data.write_element(name)
    circles = opened(measured, store, table="table", shapes="circles")
    same_cells(measured, circles)
    np.testing.assert_allclose(circles.outlines(UM_PER_PX)["area_um2"], np.pi * 16, rtol=0.01)
    masks = opened(measured, store, table="of_masks")
    outlines = masks.outlines(UM_PER_PX)
    assert outlines["cell_id"].tolist() == [str(number) for number in range(1, 151)]
    off = shapely.centroid(outlines.geometry.to_numpy()), shapely.centroid(measured.nuclei.geometry.to_numpy())
    assert shapely.distance(*off).max() < 1.5
    np.testing.assert_array_equal(masks.counts(outlines).X.toarray(), measured.counts.X.toarray())


def test_values_that_are_not_counts_are_refused(measured: SimpleNamespace, store: Path) -> None:
    platform = opened(measured, store, layer="lognorm")
    with pytest.raises(
        InputError, match=r"table lognorm: has values such as .*, which are not raw counts; give a table"
    ):
        platform.counts(platform.outlines(UM_PER_PX))


def test_pickled_objects_are_never_read(measured: SimpleNamespace, store: Path) -> None:
    import json

    path = next(store.rglob("tables/table/X/data/zarr.json"))
    about = json.loads(path.read_text())
    about["codecs"] = [{"name": "numcodecs.pickle", "configuration": {}}]
    path.write_text(json.dumps(about))
    with pytest.raises(InputError, match="contains pickled objects, which can run code"):
        opened(measured, store)


def test_a_folder_above_the_store_is_named(measured: SimpleNamespace, store: Path) -> None:
    with pytest.raises(InputError, match=f"is not a SpatialData store; give {store}"):
        opened(measured, store.parent)


@pytest.mark.parametrize("order", ["rgb", "bgr"])
def test_the_image_of_the_store_is_the_section_s(
    measured: SimpleNamespace, cells: ad.AnnData, tmp_path: Path, order: str
) -> None:
    with open_slide(measured.image) as slide:
        pixels = slide.read_region(0, 0, slide.width, slide.height)
    stored = pixels[..., ["rgb".index(color) for color in order]]
    to_global = Sequence([Scale([UM_PER_PX, UM_PER_PX], axes=("x", "y")), CELLS])
    in_um = Scale([UM_PER_PX, UM_PER_PX], axes=("x", "y"))
    he = Image2DModel.parse(
        np.moveaxis(stored, -1, 0),
        dims=("c", "y", "x"),
        c_coords=list(order),
        scale_factors=[2, 2],
        chunks=(3, 200, 300),
        transformations={"global": to_global, "microns": in_um},
    )
    data = sd.SpatialData(
        images={"he": he}, shapes={"nuclei": element(measured)}, tables={"table": table(cells, "nuclei")}
    )
    data.write(tmp_path / "store.zarr")
    section = read_section(platform="spatialdata", sdata=tmp_path / "store.zarr")
    assert section.image == tmp_path / "store.zarr/images/he" and section.name == "store"
    assert section.mpp == pytest.approx(UM_PER_PX) and section.mpp_source == "the coordinate system 'microns'"
    with section.open_slide() as slide:
        np.testing.assert_array_equal(slide.read_region(0, 0, slide.width, slide.height), pixels)
        assert [level.width for level in slide._reader.levels] == [slide.width, slide.width // 2, slide.width // 4]
        # the levels of the store are read, and show the same as the finest one
        small = slide.read_region(10, 10, 40, 30, mpp=4 * UM_PER_PX).astype(float)
    with open_slide(measured.image) as slide:
        same = slide.read_region(10, 10, 40, 30, mpp=4 * UM_PER_PX).astype(float)
    # spatialdata reduces without a filter, so that single pixels differ
    assert np.abs((small - same).mean(axis=(0, 1))).max() < 4
    same_cells(measured, section.measurement)
    tissue = {"name": "t", "species": "human", "train": ["s"]}
    spec = parse_tissue(
        {**tissue, "sections": {"s": {"platform": "spatialdata", "sdata": str(tmp_path / "store.zarr")}}}
    )
    assert resolve_section(spec.sections["s"], "t", tmp_path).image == section.image


def test_a_store_without_an_image_needs_one(measured: SimpleNamespace, cells: ad.AnnData, tmp_path: Path) -> None:
    sd.SpatialData(shapes={"nuclei": element(measured)}, tables={"table": table(cells, "nuclei")}).write(
        tmp_path / "store.zarr"
    )
    with pytest.raises(InputError, match=r"store\.zarr: has no image; give the H&E image of the section as `image`$"):
        read_section(platform="spatialdata", sdata=tmp_path / "store.zarr")


@pytest.mark.parametrize(
    ("c_coords", "dtype", "words"),
    [(["a", "b"], np.uint8, "has 2 channels"), (["r", "g", "b"], np.float32, "contains float32 pixels")],
)
def test_an_image_that_is_not_rgb_is_refused(tmp_path: Path, c_coords: list[str], dtype: type, words: str) -> None:
    pixels = np.zeros((len(c_coords), 60, 50), dtype)
    he = Image2DModel.parse(pixels, dims=("c", "y", "x"), c_coords=c_coords)
    sd.SpatialData(images={"he": he}).write(tmp_path / "store.zarr")
    with pytest.raises(InputError, match=rf"images/he: {words}"):
        open_slide(tmp_path / "store.zarr/images/he", mpp=0.5)
    with pytest.raises(InputError, match=r"store\.zarr: is a folder; give one of its images, such as .*images/he$"):
        open_slide(tmp_path / "store.zarr", mpp=0.5)
