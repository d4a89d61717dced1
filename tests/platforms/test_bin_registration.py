"""The shift between bins and nuclei: known shifts are found, and none is reported where none can be measured."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import shapely

from prts.io.nuclei import load_nuclei
from prts.platforms.bin_counts import count_bins
from prts.platforms.bin_positions import BinGrid, read_positions
from prts.platforms.bin_registration import corrected, cover_of_bins, measure, moved, register_bins
from prts.simulate.section import BINS, simulate_section

MPP = 0.5


def lattice(n: int, affine=((4.0, 0.0, 50.0), (0.0, 4.0, 50.0)), in_tissue=None) -> BinGrid:
    affine = np.asarray(affine)
    row, col = np.indices((n, n))
    positions = np.stack([col, row, np.ones((n, n))], axis=-1) @ affine.T
    return BinGrid(positions, np.ones((n, n), bool) if in_tissue is None else in_tissue, affine, 0.0)


def discs(rng, n: int, side_px: float) -> np.ndarray:
    return shapely.buffer(shapely.points(rng.uniform(60, side_px, (n, 2))), rng.uniform(6, 12, n))


def distance_um(a: BinGrid, b: BinGrid) -> float:
    return float(np.nanmean(np.hypot(*np.moveaxis(a.positions - b.positions, -1, 0)))) * MPP


def test_the_cover_of_a_bin_counts_its_quarters():
    """Bin (1, 2) is centred at x 58, y 54, so its quarters' centres are at 57 and 59, 53 and 55."""
    left_half = shapely.box(56.5, 52.5, 57.5, 55.5)
    cover = cover_of_bins(np.array([left_half], object), lattice(4))
    expected = np.zeros((4, 4))
    expected[1, 2] = 0.5
    np.testing.assert_array_equal(cover, expected)


@pytest.mark.parametrize("affine", [((4.0, -0.1, 50.0), (0.1, 4.0, 50.0)), ((-4.0, 0.1, 1050.0), (0.1, 4.0, 50.0))])
@pytest.mark.parametrize(("shift_um", "turn_deg"), [((3.3, -1.7), 0.0), ((-12.5, 6.0), 0.6)])
def test_a_known_shift_and_rotation_are_measured_in_the_images_axes(affine, shift_um, turn_deg):
    """UMIs fall where the nuclei are; then the positions are moved. The second lattice is mirrored."""
    rng = np.random.default_rng(0)
    polygons = discs(rng, 900, 1040)
    true = lattice(250, affine)
    umi = rng.poisson(0.15 + 1.5 * cover_of_bins(polygons, true)).astype(np.float32)
    middle = true.affine @ [124.5, 124.5, 1]
    reported = moved(true, np.array(shift_um) / MPP, turn_deg, middle)
    found = measure(umi, reported, polygons, MPP)
    assert (found.shift_x_um, found.shift_y_um) == pytest.approx(shift_um, abs=0.2)
    assert found.rotation_deg == pytest.approx(turn_deg, abs=0.05)
    # radius of gyration of a square of 500 um: 500 / sqrt(6)
    way = np.hypot(found.shift_um, np.radians(found.rotation_deg) * 500 / np.sqrt(6))
    assert found.displacement_um == pytest.approx(way, rel=0.01)
    assert distance_um(corrected(reported, found), true) < 0.3
    np.testing.assert_allclose(
        reported.affine @ [7, 3, 1], reported.positions[3, 7], err_msg="the moved grid contradicts its own map"
    )


def test_a_flat_density_cannot_be_measured_and_is_left_alone():
    rng = np.random.default_rng(1)
    polygons, grid = discs(rng, 900, 1040), lattice(250)
    for umi in (rng.poisson(0.5, (250, 250)), np.full((250, 250), 2), np.zeros((250, 250))):
        found = measure(umi.astype(np.float32), grid, polygons, MPP)
        assert not found.measured
        assert found.shift_um == 0
        assert "cannot be measured" in found.sentence()
        assert corrected(grid, found) is grid


def test_a_gradient_and_the_rim_of_the_tissue_pull_at_nothing():
    """Ten times the UMIs on the right, where there are also more nuclei; half of the lattice is glass."""
    rng = np.random.default_rng(2)
    polygons = discs(rng, 1400, 1040)
    x = shapely.get_x(shapely.centroid(polygons))
    polygons = polygons[rng.random(len(x)) < x / 1040]
    row, col = np.indices((250, 250))
    tissue = np.hypot(row - 125, col - 150) < 95
    grid = lattice(250, in_tissue=tissue)
    rate = (0.1 + cover_of_bins(polygons, grid)) * np.exp(col / 250 * np.log(10)) * tissue
    found = measure(rng.poisson(rate).astype(np.float32), grid, polygons, MPP)
    assert found.measured
    assert found.shift_um < 0.2


@pytest.mark.slow
def test_the_shift_of_a_simulated_section_is_measured_to_half_a_um_and_taken_back(tmp_path: Path):
    section = simulate_section(tmp_path / "s", cells=1200, genes=100, seed=5, mpp=MPP, shift_um=[4.0, -7.5])
    nuclei = load_nuclei(section / "truth_nuclei.parquet")
    bins = section / BINS
    found = register_bins(bins, nuclei, MPP)
    assert np.hypot(found.shift_x_um - 4.0, found.shift_y_um + 7.5) < 0.5
    assert abs(found.rotation_deg) < 0.05

    reported = read_positions(bins)
    true = moved(reported, np.array([-4.0, 7.5]) / MPP, 0.0, np.zeros(2))
    turned = moved(true, np.array([-9.0, 2.0]) / MPP, -0.4, true.affine @ [true.n_cols / 2, true.n_rows / 2, 1])
    write_positions(bins, turned)
    found = register_bins(bins, nuclei, MPP)
    back = corrected(read_positions(bins), found)
    assert distance_um(back, true) < 0.5
    # counted there, nuclei have what they had at the true positions
    totals = [count_bins(bins, nuclei, grid).X.sum(axis=1).A1 for grid in (true, turned, back)]
    assert np.corrcoef(totals[0], totals[2])[0, 1] > 0.98 > np.corrcoef(totals[0], totals[1])[0, 1]


@pytest.mark.slow
def test_prepare_measures_warns_and_corrects(tmp_path: Path, caplog):
    from hydra import compose, initialize_config_dir

    from prts.cli.app import config_dir
    from prts.cli.prepare import preparation
    from prts.stopwatch import Stopwatch

    def prepared(*overrides: str):
        simulate = "tissue.sections.train.simulate"
        small = [f"{simulate}.cells=300", f"{simulate}.genes=150", f"+{simulate}.shift_um=[6.0,0.0]"]
        with initialize_config_dir(str(config_dir()), version_base="1.3"):
            cfg = compose(
                "prepare",
                [
                    *small,
                    "tissue.val=[]",
                    "split=random",
                    "tissue.test=[]",
                    f"paths.cache_dir='{tmp_path}'",
                    "panel.n_genes=40",
                    "encoder.tile_px=64",  # quicker than 256
                    *overrides,
                ],
            )
        caplog.clear()
        with caplog.at_level(logging.INFO):
            return preparation(cfg)[0](Stopwatch()).sections["train"]

    import anndata as ad

    left = prepared()
    assert [r.levelname for r in caplog.records if "the `register` option" in r.message] == ["WARNING"]
    assert left.registration.shift_x_um == pytest.approx(6.0, abs=0.5)
    moved_back = prepared("preprocess.register=true")
    assert not [r for r in caplog.records if r.levelname == "WARNING" and "register" in r.message]
    assert moved_back.counts != left.counts
    assert moved_back.features != left.features
    stored = [ad.read_h5ad(section.counts) for section in (left, moved_back)]
    assert [bool(data.uns["prts"]["registration"]["corrected"]) for data in stored] == [False, True]
    assigned = [int(data.uns["prts"]["umi_assigned"]) for data in stored]
    assert assigned[1] > 1.1 * assigned[0]


def write_positions(bins: Path, grid: BinGrid) -> None:
    path = bins / "spatial/tissue_positions.parquet"
    table = pq.read_table(path)
    row, col = (table.column(f"array_{name}").to_numpy() for name in ("row", "col"))
    for axis, name in enumerate(("pxl_col_in_fullres", "pxl_row_in_fullres")):
        at = table.column_names.index(name)
        table = table.set_column(at, name, pa.array(grid.positions[row, col, axis]))
    pq.write_table(table, path)
