"""Layouts of a simulated section: one truth, and files that agree with each other and with the definition of Space Ranger's cells."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import anndata as ad
import geopandas as gpd
import h5py
import numpy as np
import pandas as pd
import pytest
import shapely
from PIL import Image
from scipy import sparse

from prts.errors import InputError
from prts.section import open_section_folder
from prts.simulate.section import simulate_section

BINS = "binned_outputs/square_002um"


def read_10x(path: Path) -> pd.DataFrame:
    """Counts, barcodes x genes."""
    with h5py.File(path) as file:
        m = file["matrix"]
        columns = (m["data"][:], m["indices"][:].astype(int), m["indptr"][:].astype(int))
        X = sparse.csc_matrix(columns, shape=tuple(m["shape"][:])).toarray().T
        return pd.DataFrame(X, m["barcodes"][:].astype(str), m["features/name"][:].astype(str))


@pytest.fixture(scope="module")
def sections(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("layouts")
    same = {"cells": 120, "genes": 60, "seed": 2, "name": "x", "shift_um": (1.0, -2.0)}
    return {layout: simulate_section(root / layout, layout=layout, **same) for layout in ("visium_hd", "spaceranger4")}


@pytest.fixture(scope="module")
def mappings(sections: dict[str, Path]) -> pd.DataFrame:
    return pd.read_parquet(sections["spaceranger4"] / "outs/barcode_mappings.parquet")


def test_image_truth_and_bins_are_the_same(sections: dict[str, Path]) -> None:
    ours, theirs = sections["visium_hd"], sections["spaceranger4"]
    for name in ("tissue_image.tif", "truth.h5ad", "truth_nuclei.parquet"):
        assert (ours / name).read_bytes() == (theirs / name).read_bytes()
    for path in (ours / BINS).rglob("*.*"):
        assert path.read_bytes() == (theirs / "outs" / path.relative_to(ours)).read_bytes()


def test_the_table_lists_every_bin_with_those_around_it(sections: dict[str, Path], mappings: pd.DataFrame) -> None:
    positions = pd.read_parquet(sections["spaceranger4"] / "outs" / BINS / "spatial/tissue_positions.parquet")
    assert mappings.columns.tolist() == [
        *("square_002um", "square_008um", "square_016um"),
        *("cell_id", "in_nucleus", "in_cell"),
    ]
    assert mappings["square_002um"].tolist() == positions["barcode"].tolist()
    for size in (8, 16):
        at = positions[["array_row", "array_col"]] * 2 // size
        expected = [f"s_{size:03d}um_{r:05d}_{c:05d}-1" for r, c in at.to_numpy()]
        assert mappings[f"square_{size:03d}um"].tolist() == expected
    assert (mappings["in_cell"] == mappings["cell_id"].notna()).all()
    assert not (mappings["in_nucleus"] & ~mappings["in_cell"]).any()


def test_cells_follow_the_definition_bin_by_bin(
    sections: dict[str, Path], mappings: pd.DataFrame, cells_bin_by_bin: Callable
) -> None:
    outs = sections["spaceranger4"] / "outs"
    positions = pd.read_parquet(outs / BINS / "spatial/tissue_positions.parquet")
    nuclei = gpd.read_file(outs / "segmented_outputs/nucleus_segmentations.geojson").geometry.to_numpy()
    cell_of, nucleus_of = cells_bin_by_bin(positions, nuclei, reach=4)
    bins = list(zip(positions["array_row"], positions["array_col"], strict=True))
    expected = [f"cellid_{cell_of[b] + 1:09d}-1" if b in cell_of else None for b in bins]
    assert mappings["cell_id"].tolist() == expected
    assert mappings["in_nucleus"].tolist() == [b in cell_of and b in nucleus_of for b in bins]
    assert 0.2 < mappings["in_nucleus"].sum() / mappings["in_cell"].sum() < 0.6


def test_cells_hold_the_counts_of_their_bins(sections: dict[str, Path], mappings: pd.DataFrame) -> None:
    outs = sections["spaceranger4"] / "outs"
    cells = read_10x(outs / "segmented_outputs/filtered_feature_cell_matrix.h5")
    bins = read_10x(outs / BINS / "filtered_feature_bc_matrix.h5")
    cell_of = mappings.set_index("square_002um")["cell_id"].reindex(bins.index)
    pd.testing.assert_frame_equal(cells, bins.groupby(cell_of.to_numpy()).sum(), check_dtype=False)


def test_larger_bins_hold_those_of_2_um(sections: dict[str, Path]) -> None:
    binned = sections["spaceranger4"] / "outs/binned_outputs"
    small = pd.read_parquet(binned / "square_002um/spatial/tissue_positions.parquet")
    counts = read_10x(binned / "square_002um/filtered_feature_bc_matrix.h5")
    for size in (8, 16):
        positions = pd.read_parquet(binned / f"square_{size:03d}um/spatial/tissue_positions.parquet")
        inner = small.assign(r=small["array_row"] * 2 // size, c=small["array_col"] * 2 // size).groupby(["r", "c"])
        whole = (inner.size() == (size // 2) ** 2).to_numpy()
        for name in ("pxl_row_in_fullres", "pxl_col_in_fullres"):
            np.testing.assert_allclose(positions[name][whole], inner[name].mean()[whole], atol=1e-9)
        assert (positions["in_tissue"] == inner["in_tissue"].max().to_numpy()).all()
        at = small.set_index("barcode").loc[counts.index]
        outer = [
            f"s_{size:03d}um_{r:05d}_{c:05d}-1" for r, c in (at[["array_row", "array_col"]] * 2 // size).to_numpy()
        ]
        large = read_10x(binned / f"square_{size:03d}um/filtered_feature_bc_matrix.h5")
        pd.testing.assert_frame_equal(large, counts.groupby(outer).sum().loc[large.index], check_dtype=False)
        assert large.index.tolist() == positions["barcode"][positions["in_tissue"] == 1].tolist()
        assert (
            json.loads((binned / f"square_{size:03d}um/spatial/scalefactors_json.json").read_text())["bin_size_um"]
            == size
        )


def test_outlines_contain_the_bins_of_their_cell(sections: dict[str, Path], mappings: pd.DataFrame) -> None:
    outs = sections["spaceranger4"] / "outs"
    positions = pd.read_parquet(outs / BINS / "spatial/tissue_positions.parquet")
    outlines = gpd.read_file(outs / "segmented_outputs/cell_segmentations.geojson")
    points = shapely.points(positions["pxl_col_in_fullres"], positions["pxl_row_in_fullres"])
    outline, bin_ = shapely.STRtree(points).query(outlines.geometry.to_numpy(), predicate="contains_properly")
    found = np.full(len(points), None, dtype=object)
    found[bin_] = [f"cellid_{cell:09d}-1" for cell in outlines["cell_id"].iloc[outline]]
    assert len(bin_) == mappings["in_cell"].sum()
    assert found.tolist() == mappings["cell_id"].tolist()
    truth = ad.read_h5ad(sections["spaceranger4"] / "truth.h5ad")
    nuclei = gpd.read_file(outs / "segmented_outputs/nucleus_segmentations.geojson")
    own = gpd.read_parquet(sections["spaceranger4"] / "truth_nuclei.parquet")
    assert (own["cell_id"] == truth.obs_names).all()
    assert (own["cell_id"] == nuclei["cell_id"].map("nucleus_{:06d}".format)).all()
    assert shapely.equals(own.geometry.to_numpy(), nuclei.geometry.to_numpy()).all()


def test_spatial_files_of_the_cells(sections: dict[str, Path]) -> None:
    spatial = sections["spaceranger4"] / "outs/segmented_outputs/spatial"
    factors = json.loads((spatial / "scalefactors_json.json").read_text())
    assert factors["microns_per_pixel"] == 0.5
    assert not {"bin_size_um", "spot_diameter_fullres"} & set(factors)
    section = open_section_folder(sections["spaceranger4"])
    with Image.open(spatial / "tissue_hires_image.png") as hires:
        assert hires.size == (section.width, section.height)
        pixels = np.asarray(hires, float)
    with Image.open(spatial / "tissue_lowres_image.png") as lowres:
        assert lowres.width == np.ceil(section.width * factors["tissue_lowres_scalef"])
        assert np.abs(np.asarray(lowres, float).mean((0, 1)) - pixels.mean((0, 1))).max() < 1


def test_another_layout_replaces_a_section(tmp_path: Path) -> None:
    out = simulate_section(tmp_path / "s", cells=50, genes=50, layout="spaceranger4")
    simulate_section(out, cells=50, genes=50)
    assert {path.name for path in out.iterdir()} == {
        *("binned_outputs", "tissue_image.tif", "truth.h5ad", "truth_nuclei.parquet")
    }
    with pytest.raises(InputError, match=r"^layout: 'spaceranger' is not known.*did you mean.*; choose"):
        simulate_section(tmp_path / "t", layout="spaceranger")
