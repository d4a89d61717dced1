"""Cells as AnnData: every form of outline leads to the same counts, and units and registration are honored."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import shapely
import tifffile
from skimage.draw import polygon as fill

from prts.platforms.anndata_cells import AnnDataCells
from prts.platforms.cell_units import is_control
from prts.section import read_section


@pytest.fixture
def path(cells: ad.AnnData, tmp_path: Path) -> Path:
    cells.write_h5ad(tmp_path / "cells.h5ad")
    return tmp_path / "cells.h5ad"


def opened(measured: SimpleNamespace, path: Path, **settings: object) -> tuple[AnnDataCells, float]:
    section = read_section(measured.image, platform="anndata", cells=path, layer="counts", **settings)
    assert isinstance(section.measurement, AnnDataCells)
    return section.measurement, section.mpp


def same_cells(measured: SimpleNamespace, platform: AnnDataCells, mpp: float, places_px: float = 1e-6) -> None:
    outlines = platform.outlines(mpp)
    assert outlines["cell_id"].tolist() == measured.nuclei["cell_id"].tolist()
    off = shapely.distance(
        shapely.centroid(outlines.geometry.to_numpy()), shapely.centroid(measured.nuclei.geometry.to_numpy())
    )
    assert off.max() < places_px
    counts = platform.counts(outlines)
    assert (counts.X != measured.counts.X).nnz == 0
    assert counts.var["gene_id"].tolist() == measured.counts.var["gene_id"].tolist()
    half = outlines.iloc[::-2]
    assert (platform.counts(half).X != measured.counts[half["cell_id"]].X).nnz == 0


def test_polygons_of_a_file_in_px(measured: SimpleNamespace, path: Path) -> None:
    polygons = measured.visium / "truth_nuclei.parquet"
    same_cells(measured, *opened(measured, path, coordinates="px", polygons=polygons))


def test_polygons_of_a_geojson_in_um(measured: SimpleNamespace, path: Path, tmp_path: Path) -> None:
    frame = measured.nuclei.assign(geometry=shapely.transform(measured.nuclei.geometry.to_numpy(), lambda xy: xy * 0.5))
    shuffled = frame[["cell_id", "geometry"]].sample(frac=1, random_state=0)
    (tmp_path / "cells.geojson").write_text(shuffled.to_json())
    same_cells(measured, *opened(measured, path, coordinates="um", polygons=tmp_path / "cells.geojson"))


def test_wkb_of_a_plain_table_with_one_outline_per_plane(measured: SimpleNamespace, path: Path, tmp_path: Path) -> None:
    """As MERSCOPE writes cell_boundaries.parquet."""
    shapes = measured.nuclei.geometry.to_numpy()
    smaller = shapely.transform(shapes, lambda xy: xy)  # the same cell in another plane
    smaller = shapely.buffer(smaller, -1.0)
    table = pd.DataFrame(
        {
            "EntityID": np.tile(np.arange(len(shapes)) + 1, 2),
            "ZIndex": np.repeat([0, 1], len(shapes)),
            "Geometry": shapely.to_wkb(np.concatenate([smaller, shapes])),
        }
    )
    table.to_parquet(tmp_path / "cell_boundaries.parquet")
    given = {"coordinates": "px", "polygons": tmp_path / "cell_boundaries.parquet", "id_column": "number"}
    same_cells(measured, *opened(measured, path, **given))


def test_a_column_of_outlines(measured: SimpleNamespace, path: Path) -> None:
    same_cells(measured, *opened(measured, path, coordinates="px", polygons="outline"))


@pytest.mark.parametrize("radius", ["radius", 4.0])
def test_centers_with_a_radius(measured: SimpleNamespace, path: Path, radius: str | float) -> None:
    platform, mpp = opened(measured, path, coordinates="um", radius=radius)
    same_cells(measured, platform, mpp)
    expected = measured.nuclei["area_um2"] if radius == "radius" else np.pi * 16
    np.testing.assert_allclose(platform.outlines(mpp)["area_um2"], expected, rtol=0.01)


def test_a_label_image(measured: SimpleNamespace, path: Path, tmp_path: Path) -> None:
    width, height = tifffile.imread(measured.image).shape[1::-1]
    labels = np.zeros((height, width), np.int32)
    for number, shape in enumerate(measured.nuclei.geometry, start=1):
        x, y = np.array(shape.exterior.coords).T
        labels[fill(y - 0.5, x - 0.5, labels.shape)] = number
    tifffile.imwrite(tmp_path / "labels.tif", labels)
    given = {"labels": tmp_path / "labels.tif", "id_column": "number"}
    same_cells(measured, *opened(measured, path, coordinates="px", **given), places_px=1.5)
    # a label image of another scale needs the way to the image
    tifffile.imwrite(tmp_path / "labels.tif", np.kron(labels, np.ones((2, 2), np.int32)))
    given["affine"] = [[0.5, 0, 0], [0, 0.5, 0]]
    same_cells(measured, *opened(measured, path, coordinates="px", **given), places_px=1.5)


def test_an_affine_matrix_registers_the_cells(measured: SimpleNamespace, cells: ad.AnnData, tmp_path: Path) -> None:
    """Positions on another microscope: rotated by 90 degrees, mirrored and shifted, in um."""
    um = cells.obsm["spatial"]
    cells.obsm["elsewhere"] = np.column_stack([um[:, 1] + 30.0, um[:, 0] - 7.0])
    cells.write_h5ad(tmp_path / "cells.h5ad")
    matrix = [[0, 2, 14.0], [2, 0, -60.0], [0, 0, 1]]  # x_px = 2 (y' + 7), y_px = 2 (x' - 30)
    given = {"coordinates": "um", "radius": 4.0, "spatial_key": "elsewhere"}
    same_cells(measured, *opened(measured, tmp_path / "cells.h5ad", affine=matrix, **given))
    np.savetxt(tmp_path / "affine.csv", matrix, delimiter=",")
    same_cells(measured, *opened(measured, tmp_path / "cells.h5ad", affine=tmp_path / "affine.csv", **given))


def test_nuclei_of_another_source_get_the_cells_whose_center_they_hold(measured: SimpleNamespace, path: Path) -> None:
    platform, _ = opened(measured, path, coordinates="um", radius=2.0)
    squares = [shapely.box(x, y, x + 90, y + 90) for x in range(0, 500, 80) for y in range(0, 400, 80)]
    frame = measured.nuclei.iloc[: len(squares)].assign(geometry=squares, area_um2=90.0**2 / 4)
    frame["cell_id"] = [f"square {i}" for i in range(len(squares))]
    counts = platform.counts(frame)
    centers = measured.nuclei.geometry.centroid
    holds = np.array([[square.contains(center) for center in centers] for square in squares])
    holds[:, holds.sum(axis=0) > 1] = False  # in several squares
    np.testing.assert_array_equal(counts.X.toarray(), holds @ measured.counts.X.toarray())
    assert 0 < counts.X.sum() < measured.counts.X.sum()


def test_controls_are_left_out(measured: SimpleNamespace, cells: ad.AnnData, tmp_path: Path) -> None:
    names = np.array(cells.var_names, dtype=object)
    names[[3, 7, 11]] = ["NegPrb1", "Blank-12", "SystemControl4"]
    cells.var_names = names
    cells.write_h5ad(tmp_path / "cells.h5ad")
    platform, mpp = opened(measured, tmp_path / "cells.h5ad", coordinates="um", radius=4.0)
    counts = platform.counts(platform.outlines(mpp))
    kept = np.setdiff1d(np.arange(60), [3, 7, 11])
    assert counts.var_names.tolist() == names[kept].tolist()
    np.testing.assert_array_equal(counts.X.toarray(), measured.counts.X.toarray()[:, kept])
    cells.var["feature_types"] = ["Gene Expression"] * 59 + ["Antibody Capture"]
    cells.write_h5ad(tmp_path / "cells.h5ad")
    assert len(AnnDataCells(tmp_path / "cells.h5ad", "um", radius=4.0).genes()) == 56


def test_genes_that_begin_like_controls_stay() -> None:
    genes = ["NEGR1", "BLNK", "NEU1", "INTU", "SYS1", "UNC5A", "DEPTOR", "ANTXR1", "FALZ", "NEGRO"]
    assert not is_control(pd.Series(genes)).any()
    controls = (
        "NegControlCodeword_0500 antisense_LGALS3 UnassignedCodeword_0001 DeprecatedCodeword_0321 Negative5 FalseCode9"
    )
    assert is_control(pd.Series([*controls.split(), "Intergenic_Region_104", "NegAdd12"])).all()


def test_cells_without_an_outline_are_left_out(
    measured: SimpleNamespace, path: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    measured.nuclei.iloc[10:].to_parquet(tmp_path / "some.parquet")
    platform, mpp = opened(measured, path, coordinates="px", polygons=tmp_path / "some.parquet")
    outlines = platform.outlines(mpp)
    assert "10 of 150 cells have no outline" in caplog.text
    np.testing.assert_array_equal(platform.counts(outlines).X.toarray(), measured.counts.X.toarray()[10:])


def test_um_that_fit_on_the_image_as_px_are_reported(
    measured: SimpleNamespace, path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    opened(measured, path, coordinates="px", radius=4.0)
    assert "if they are in um, set `coordinates: um`" in caplog.text


def test_what_decides_the_counts_is_in_the_identity(path: Path) -> None:
    base = {"cells": path, "coordinates": "um", "radius": 4.0}
    others = [{"coordinates": "px"}, {"radius": 5.0}, {"layer": "counts"}, {"affine": [[2, 0, 0], [0, 2, 0]]}]
    found = [AnnDataCells(**base | other).identity() for other in ({}, *others)]
    assert all(one != other for i, one in enumerate(found) for other in found[:i])
