"""Cells of Space Ranger 4: counts as delivered, its folders at any level, and what is refused."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import pytest
import shapely
from scipy import sparse

import prts
from prts.data.prepare import PrepareSettings, prepare_tissue
from prts.data.splits import Random
from prts.data.tissue import parse_tissue
from prts.errors import InputError
from prts.features.no_encoder import NoEncoder
from prts.io.nuclei import load_nuclei, make_nuclei, read_nuclei
from prts.platforms.spaceranger_cells import SpaceRangerCells
from prts.platforms.spaceranger_outs import find_outs
from prts.platforms.visium_hd import VisiumHD
from prts.preprocess.counts import QCSettings
from prts.preprocess.panel import TopPanel
from prts.section import open_section, open_section_folder
from prts.segmentation.watershed import Watershed
from prts.simulate.section import simulate_section

MPP = 0.5
LEVELS = ("", "outs", "outs/binned_outputs", "outs/binned_outputs/square_002um", "outs/segmented_outputs")


@pytest.fixture(scope="module")
def section(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return simulate_section(
        tmp_path_factory.mktemp("cells") / "s1", cells=150, genes=60, seed=3, layout="spaceranger4", name="s1"
    )


@pytest.fixture
def copy(section: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(section, tmp_path / "copy"))


@pytest.fixture(scope="module")
def delivered(section: Path) -> pd.DataFrame:
    """The matrix, cells x genes, read without prts."""
    with h5py.File(section / "outs/segmented_outputs/filtered_feature_cell_matrix.h5") as file:
        m = file["matrix"]
        columns = (m["data"][:], m["indices"][:].astype(int), m["indptr"][:].astype(int))
        X = sparse.csc_matrix(columns, shape=tuple(m["shape"][:])).toarray().T
        return pd.DataFrame(X, m["barcodes"][:].astype(str), m["features/name"][:].astype(str))


@pytest.mark.parametrize("outline", ["nucleus", "cell"])
def test_counts_are_those_delivered(section: Path, delivered: pd.DataFrame, outline: str) -> None:
    cells = SpaceRangerCells(section / "outs/segmented_outputs", outline)
    units = cells.outlines(MPP)
    truth = load_nuclei(section / "truth_nuclei.parquet")
    if outline == "nucleus":
        assert units["area_um2"].to_numpy() == pytest.approx(truth["area_um2"].to_numpy())
    else:
        assert units["area_um2"].median() > 2 * truth["area_um2"].median()
    counted = cells.counts(units)
    found = pd.DataFrame(counted.X.toarray(), counted.obs_names, counted.var_names)
    pd.testing.assert_frame_equal(found.loc[delivered.index], delivered, check_dtype=False, check_names=False)
    assert found.drop(delivered.index).to_numpy().sum() == 0
    assert cells.genes().index.tolist() == delivered.columns.tolist()


def test_nuclei_from_the_file_keep_their_numbers(section: Path, delivered: pd.DataFrame) -> None:
    opened = open_section_folder(section / "outs/segmented_outputs")
    assert opened.measurement is not None and opened.measurement.name == "spaceranger_cells"
    assert opened.nuclei is not None and opened.name == "s1"
    nuclei = read_nuclei(opened.nuclei, mpp=opened.mpp, width=opened.width, height=opened.height)
    assert nuclei["cell_id"].iloc[:2].tolist() == ["1", "2"]
    counted = opened.measurement.counts(nuclei)
    assert counted.obs_names.tolist() == nuclei["cell_id"].tolist()
    rows = [f"cellid_{int(name):09d}-1" in delivered.index for name in counted.obs_names]
    np.testing.assert_array_equal(counted.X[rows].toarray(), delivered.to_numpy())


def test_other_nuclei_with_the_same_numbers_are_matched_by_place(section: Path, delivered: pd.DataFrame) -> None:
    cells = SpaceRangerCells(section)
    own = cells.outlines(MPP)
    numbers = np.arange(len(own), 0, -1).astype(str)
    reversed_ = make_nuclei(shapely.buffer(own.geometry.to_numpy(), 3), MPP, cell_id=numbers)
    counted = cells.counts(reversed_)
    centers = shapely.points(shapely.get_coordinates(shapely.centroid(own.geometry.to_numpy())))
    for row in (0, 40, len(own) - 1):
        held = [
            cell
            for cell, center in zip(own["cell_id"], centers, strict=True)
            if reversed_.geometry[row].contains(center)
        ]
        once = [
            cell
            for cell in held
            if reversed_.geometry.contains(centers[own["cell_id"].tolist().index(cell)]).sum() == 1
        ]
        expected = delivered.reindex(once, fill_value=0).sum(axis=0).to_numpy()
        np.testing.assert_array_equal(counted.X[row].toarray().ravel(), expected)


@pytest.mark.parametrize("level", LEVELS)
def test_every_folder_of_the_output_is_recognized(section: Path, level: str) -> None:
    given = section / level
    outs = find_outs(given)
    assert outs is not None and outs.path == section / "outs"
    assert SpaceRangerCells(given).path == section / "outs/segmented_outputs" == SpaceRangerCells.find(given).path  # type: ignore[union-attr]
    if not level.endswith("segmented_outputs"):
        assert VisiumHD(given).path == section / "outs/binned_outputs/square_002um"
    opened = open_section_folder(given)
    assert opened.name == "s1" and opened.truth == section / "truth.h5ad"
    expected = "spaceranger_cells" if level.endswith("segmented_outputs") else "visium_hd"
    assert opened.measurement is not None and opened.measurement.name == expected
    read = prts.read_visium_hd(given)
    assert isinstance(read.measurement, VisiumHD)
    assert Path(read.measurement.bins) == section / "outs/binned_outputs/square_002um"
    assert read.nuclei == section / "outs/segmented_outputs/nucleus_segmentations.geojson"


def test_what_was_found_is_logged(copy: Path, caplog: pytest.LogCaptureFixture) -> None:
    outs = find_outs(copy)
    assert outs is not None and outs.version() is None  # prts wrote it
    assert "Space Ranger 4 or later in" in outs.sentence()
    with h5py.File(copy / "outs/segmented_outputs/filtered_feature_cell_matrix.h5", "r+") as file:
        file.attrs["software_version"] = "spaceranger-4.0.1"
    with caplog.at_level(logging.INFO):
        open_section_folder(copy)
    assert (
        f"section copy: Space Ranger 4.0.1 in {copy / 'outs'}: bins of 2, 8, 16 um; outlines of cell and nucleus; counts of cells; "
        "barcode_mappings.parquet"
    ) in caplog.messages
    shutil.rmtree(copy / "outs/segmented_outputs")
    (copy / "outs/barcode_mappings.parquet").unlink()
    assert (
        find_outs(copy)
        .sentence()
        .endswith(f"Space Ranger 3 or later in {copy / 'outs'}: bins of 2, 8, 16 um; no segmentation")
    )  # type: ignore[union-attr]


def test_a_tissue_config_prepares_them(section: Path, delivered: pd.DataFrame, tmp_path: Path) -> None:
    node = {"image": str(section / "tissue_image.tif"), "platform": "spaceranger_cells", "cells": str(section / "outs")}
    tissue = parse_tissue({"name": "t", "species": "human", "sections": {"s1": node}, "train": ["s1"]})
    settings = PrepareSettings(
        segmenter=Watershed(),
        splitter=Random(),
        panel=TopPanel(n_genes=10),
        encoder=NoEncoder(),
        cache_dir=tmp_path,
        qc=QCSettings(min_umi=20, max_area_um2=None, max_pct_mt=None),
    )
    prepared = prepare_tissue(tissue, settings).sections["s1"]
    assert prepared.bin_table is None and prepared.registration is None
    counts = ad.read_h5ad(prepared.counts)
    expected = delivered[delivered.sum(axis=1) > 20]
    assert set(counts.obs_names) == set(expected.index)
    np.testing.assert_array_equal(counts[expected.index].X.toarray(), expected.to_numpy())


def scale_outlines(folder: Path, factor: float) -> None:
    for name in ("cell", "nucleus"):
        path = folder / f"outs/segmented_outputs/{name}_segmentations.geojson"
        content = json.loads(path.read_text())
        for feature in content["features"]:
            rings = feature["geometry"]["coordinates"]
            feature["geometry"]["coordinates"] = [[[x * factor, y * factor] for x, y in ring] for ring in rings]
        path.write_text(json.dumps(content))


def without_segmentation(folder: Path) -> None:
    shutil.rmtree(folder / "outs/segmented_outputs")


def only_spots(folder: Path) -> None:
    shutil.rmtree(folder / "outs")
    (folder / "outs/spatial").mkdir(parents=True)
    (folder / "outs/spatial/tissue_positions_list.csv").write_text("")


def other_numbers(folder: Path) -> None:
    path = folder / "outs/segmented_outputs/nucleus_segmentations.geojson"
    path.write_text(path.read_text().replace('"cell_id": ', '"cell_id": 7000'))
    (folder / "outs/segmented_outputs/cell_segmentations.geojson").unlink()


WRONG = {
    "no folder": (shutil.rmtree, "no such folder; give segmented_outputs of Space Ranger 4"),
    "Space Ranger 3": (without_segmentation, "and has no segmented_outputs, which Space Ranger 4 writes; run Space Ranger 4, or count"),
    "spots": (only_spots, "is Visium with spots of 55 um, which has no cells; give the output of Space Ranger 4"),
    "um in place of px": (lambda f: scale_outlines(f, MPP), "do not cover the bins in tissue; divided by 0.5 um/px they fit: give"),
    "another image": (lambda f: scale_outlines(f, 9), "of the cells are outside .*; give the microscope image"),
    "no matrix": (
        lambda f: (f / "outs/segmented_outputs/filtered_feature_cell_matrix.h5").unlink(),
        "filtered_feature_cell_matrix.h5: no such file; get it from segmented_outputs of Space Ranger 4",
    ),
    "another um/px": (
        lambda f: (f / "outs/segmented_outputs/spatial/scalefactors_json.json").write_text('{"microns_per_pixel": 0.27}'),
        "must agree within 2 %",
    ),
    "other cells": (other_numbers, "are not those of the outlines, such as 'cellid_0"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_wrong_output_is_refused_in_one_line(section: Path, copy: Path, case: str) -> None:
    spoil, words = WRONG[case]
    spoil(copy)
    with pytest.raises(InputError, match=words) as caught:
        opened = open_section("x", section / "tissue_image.tif", measurement=SpaceRangerCells(copy / "outs"))
        assert isinstance(opened.measurement, SpaceRangerCells)
        opened.measurement.counts(opened.measurement.outlines(MPP))
    assert "\n" not in str(caught.value)


def test_a_matrix_without_an_image_is_refused(copy: Path) -> None:
    (copy / "tissue_image.tif").unlink()
    for read in (open_section_folder, prts.read_visium_hd):
        with pytest.raises(InputError, match=r"exactly one tissue_image.*Space Ranger was run with as --image"):
            read(copy / "outs")
    only_spots(copy)
    with pytest.raises(InputError, match=r"is Visium with spots of 55 um; give"):
        prts.read_visium_hd(copy / "outs")
