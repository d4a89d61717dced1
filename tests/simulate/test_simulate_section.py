"""The simulated section: layout of Space Ranger, reproducible, nothing overwritten, consistent with its truth."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import anndata as ad
import geopandas as gpd
import h5py
import numpy as np
import pyarrow.parquet as pq
import pytest
import shapely
import tifffile
from scipy import sparse

from prts.errors import InputError
from prts.simulate import section as section_module
from prts.simulate.section import simulate_section

BINS = "binned_outputs/square_002um"


def hashes(folder: Path) -> dict[str, str]:
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def read_matrix(folder: Path) -> tuple[sparse.csr_matrix, np.ndarray, list[str]]:
    with h5py.File(folder / BINS / "filtered_feature_bc_matrix.h5") as h:
        m = h["matrix"]
        columns = (m["data"][:], m["indices"][:].astype(int), m["indptr"][:].astype(int))
        matrix = sparse.csc_matrix(columns, shape=tuple(m["shape"][:])).T.tocsr()
        return matrix, m["barcodes"][:].astype(str), m["features/name"][:].astype(str).tolist()


def read_positions(folder: Path):
    return pq.read_table(folder / BINS / "spatial/tissue_positions.parquet").to_pandas()


def count_in(folder: Path, polygons: np.ndarray) -> np.ndarray:
    """UMIs of bins whose center is within exactly one polygon, computed with shapely."""
    matrix, barcodes, _ = read_matrix(folder)
    at = read_positions(folder).set_index("barcode").loc[barcodes]
    tree = shapely.STRtree(shapely.points(at["pxl_col_in_fullres"], at["pxl_row_in_fullres"]))
    polygon, bins = tree.query(polygons, predicate="contains_properly")
    once = np.bincount(bins, minlength=len(at))[bins] == 1
    total = np.asarray(matrix.sum(axis=1)).ravel()
    return np.bincount(polygon[once], weights=total[bins[once]], minlength=len(polygons))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return simulate_section(tmp_path_factory.mktemp("sim") / "a", cells=500, genes=150, seed=3)


def test_same_arguments_same_bytes(tmp_path: Path) -> None:
    same = {"cells": 60, "genes": 50, "name": "x"}
    first = hashes(simulate_section(tmp_path / "a", seed=4, **same))
    assert first == hashes(simulate_section(tmp_path / "b", seed=4, **same))
    other = hashes(simulate_section(tmp_path / "c", seed=5, **same))
    assert set(first) == set(other)
    for name in ("tissue_image.tif", "truth.h5ad", f"{BINS}/filtered_feature_bc_matrix.h5"):
        assert first[name] != other[name]


def test_hdf5_files_contain_no_timestamps(folder: Path) -> None:
    for name in ("truth.h5ad", f"{BINS}/filtered_feature_bc_matrix.h5"):
        with h5py.File(folder / name) as h:
            times: list[int] = []
            h.visit(lambda key, h=h, times=times: times.append(h5py.h5g.get_objinfo(h[key].id).mtime))
        assert times and set(times) == {0}


def test_every_umi_is_in_a_bin_or_lost(folder: Path) -> None:
    matrix, barcodes, genes = read_matrix(folder)
    truth = ad.read_h5ad(folder / "truth.h5ad")
    drawn, lost = truth.uns["prts"]["umi_drawn"], truth.uns["prts"]["umi_lost"]
    assert matrix.sum() == drawn - lost
    assert 0 < lost < 0.02 * drawn
    assert genes == truth.var_names.tolist()
    positions = read_positions(folder)
    assert barcodes.tolist() == positions["barcode"][positions["in_tissue"] == 1].tolist()
    assert (positions["in_tissue"] == 0).any()
    parts = positions["barcode"].str.extract(r"^s_002um_(\d{5})_(\d{5})-1$").astype(int)
    assert (parts[0] == positions["array_row"]).all() and (parts[1] == positions["array_col"]).all()


def test_median_nucleus_holds_150_umis(folder: Path) -> None:
    counted = count_in(folder, gpd.read_parquet(folder / "truth_nuclei.parquet").geometry.to_numpy())
    assert 120 < np.median(counted) < 180


@pytest.mark.slow
@pytest.mark.parametrize("genes", [100, 3000])
def test_depth_does_not_depend_on_the_number_of_genes(tmp_path: Path, genes: int) -> None:
    folder = simulate_section(tmp_path / "s", cells=600, genes=genes, seed=1)
    counted = count_in(folder, gpd.read_parquet(folder / "truth_nuclei.parquet").geometry.to_numpy())
    assert 120 < np.median(counted) < 180


@pytest.mark.slow
def test_without_diffusion_nuclei_hold_what_truth_expects(tmp_path: Path) -> None:
    folder = simulate_section(tmp_path / "s", cells=600, genes=100, seed=1, diffusion_um=0)
    nuclei = gpd.read_parquet(folder / "truth_nuclei.parquet")
    truth = ad.read_h5ad(folder / "truth.h5ad")
    counted = count_in(folder, nuclei.geometry.to_numpy())
    expected = truth.X.sum(axis=1)
    # There are no bins outside the capture area.
    positions = read_positions(folder)
    inner = truth.obsm["spatial"][:, 0] < positions["pxl_col_in_fullres"].max() - 60
    # Ambient UMIs are added and bins shared by two nuclei are dropped, each below 5 %.
    assert counted[inner].sum() == pytest.approx(expected[inner].sum(), rel=0.05)
    assert np.corrcoef(np.log(counted[inner] + 1), np.log(expected[inner]))[0, 1] > 0.9


@pytest.mark.parametrize("tilt_deg", [1.3, pytest.param(-4.0, marks=pytest.mark.slow)])
def test_tilt_and_pitch_are_in_the_positions(tmp_path: Path, tilt_deg: float) -> None:
    folder = simulate_section(tmp_path / "s", cells=60, genes=50, mpp=0.4, tilt_deg=tilt_deg)
    p = read_positions(folder)
    design = np.column_stack([p["array_col"], p["array_row"], np.ones(len(p))])
    fit, *_ = np.linalg.lstsq(design, p[["pxl_col_in_fullres", "pxl_row_in_fullres"]].to_numpy(), rcond=None)
    assert np.rad2deg(np.arctan2(fit[0, 1], fit[0, 0])) == pytest.approx(tilt_deg, abs=1e-6)
    assert np.hypot(*fit[0]) == pytest.approx(2 / 0.4) == np.hypot(*fit[1])
    # A rotation, not a reflection.
    assert np.linalg.det(fit[:2]) > 0


def test_a_shift_moves_reported_positions_and_nothing_else(tmp_path: Path) -> None:
    plain = simulate_section(tmp_path / "a", cells=60, genes=50, name="x")
    moved = simulate_section(tmp_path / "b", cells=60, genes=50, name="x", shift_um=(6.0, -3.0))
    columns = ["pxl_col_in_fullres", "pxl_row_in_fullres"]
    by = read_positions(moved)[columns] - read_positions(plain)[columns]
    np.testing.assert_allclose(by, np.broadcast_to([12.0, -6.0], by.shape), atol=1e-9)
    same = [name for name, h in hashes(plain).items() if hashes(moved)[name] == h]
    assert {"tissue_image.tif", "truth_nuclei.parquet", f"{BINS}/filtered_feature_bc_matrix.h5"} <= set(same)


def test_image_states_its_resolution(folder: Path) -> None:
    with tifffile.TiffFile(folder / "tissue_image.tif") as tif:
        page = tif.pages[0]
        across, per = page.tags["XResolution"].value
        assert page.tags["ResolutionUnit"].value == 3
        assert 10_000 / (across / per) == pytest.approx(0.5, rel=1e-6)
        assert page.is_tiled and page.dtype == np.uint8 and page.shape[2] == 3
        image = page.asarray()
    scalefactors = json.loads((folder / BINS / "spatial/scalefactors_json.json").read_text())
    assert scalefactors["microns_per_pixel"] == 0.5
    from PIL import Image

    small = np.asarray(Image.open(folder / BINS / "spatial/tissue_lowres_image.png"))
    assert small.shape[1] == pytest.approx(image.shape[1] * scalefactors["tissue_lowres_scalef"], abs=1)
    np.testing.assert_allclose(small.mean(axis=(0, 1)), image.mean(axis=(0, 1)), atol=1.5)
    # Glass is white, in all three channels: the color space of the tiles is right.
    assert image[:20, :20].mean(axis=(0, 1)).min() > 225


def test_sections_of_a_tissue_share_only_the_gene_programs(folder: Path, tmp_path: Path) -> None:
    one = ad.read_h5ad(folder / "truth.h5ad")
    two = ad.read_h5ad(simulate_section(tmp_path / "b", cells=60, genes=150, seed=9) / "truth.h5ad")
    assert one.var.equals(two.var)
    for key in ("type", "domain", "gradient", "latent"):
        np.testing.assert_array_equal(one.varm[key], two.varm[key])
    other = ad.read_h5ad(simulate_section(tmp_path / "c", cells=60, genes=150, seed=9, program_seed=1) / "truth.h5ad")
    assert not np.allclose(other.varm["type"], two.varm["type"])
    np.testing.assert_array_equal(other.obsm["spatial"], two.obsm["spatial"])


def test_big_sections_keep_factors_instead_of_rates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(section_module, "DENSE_ENTRIES", 100)
    truth = ad.read_h5ad(simulate_section(tmp_path / "s", cells=60, genes=50, species="mouse") / "truth.h5ad")
    assert truth.X is None and "type" in truth.varm
    assert truth.var_names[0] == "mt-Nd1" and truth.uns["prts"]["parameters"]["species"] == "mouse"


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"cells": 49}, "cells"),
        ({"cells": 100.5}, "cells"),
        ({"genes": 10}, "genes"),
        ({"mpp": 0.05}, "mpp"),
        ({"mpp": float("nan")}, "mpp"),
        ({"mpp": "0.5"}, "mpp"),
        ({"seed": -1}, "seed"),
        ({"stain": 9}, "stain"),
        ({"tilt_deg": 60}, "tilt_deg"),
        ({"shift_um": (1.0,)}, "shift_um"),
        ({"species": "rat"}, "species"),
    ],
)
def test_invalid_settings_are_named(tmp_path: Path, wrong: dict, named: str) -> None:
    with pytest.raises(InputError, match=f"^{named}: "):
        simulate_section(tmp_path / "s", **wrong)
    assert not list(tmp_path.iterdir())


def test_only_a_simulated_section_is_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = simulate_section(tmp_path / "s", cells=60, genes=50)
    before = hashes(out)
    simulate_section(out, cells=60, genes=50, seed=1)
    assert hashes(out) != before
    (out / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match=r"notes\.txt"):
        simulate_section(out, cells=60, genes=50)
    assert (out / "notes.txt").read_text() == "mine"
    real = tmp_path / "real"
    real.mkdir()
    (real / "tissue_image.tif").write_bytes(b"real")
    with pytest.raises(InputError, match="not part of a simulated section"):
        simulate_section(real, cells=60, genes=50)
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="is a file"):
        simulate_section(tmp_path / "file", cells=60, genes=50)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(InputError, match="current folder"):
        simulate_section(Path(), cells=60, genes=50)


def test_a_failure_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> None:
        raise RuntimeError

    monkeypatch.setattr(section_module, "_write_image", fails)
    with pytest.raises(RuntimeError):
        simulate_section(tmp_path / "s", cells=60, genes=50)
    assert not list(tmp_path.iterdir())


def test_the_section_opens_like_any_other(folder: Path) -> None:
    from prts.section import open_section_folder

    opened = open_section_folder(folder)
    assert opened.mpp == 0.5 and opened.measurement is not None
    # Its true nuclei are not used.
    assert opened.nuclei is None


@pytest.mark.real
def test_files_match_the_genuine_ones(folder: Path, prts_data: Path) -> None:
    genuine = prts_data / "visium_hd_schema" / BINS
    assert set(json.loads((folder / BINS / "spatial/scalefactors_json.json").read_text())) == set(
        json.loads((genuine / "spatial/scalefactors_json.json").read_text())
    )
    where = "spatial/tissue_positions.parquet"
    ours, theirs = pq.ParquetFile(folder / BINS / where), pq.ParquetFile(genuine / where)
    assert ours.schema_arrow.remove_metadata() == theirs.schema_arrow.remove_metadata()

    def tree(path: Path) -> dict[str, str]:
        found: dict[str, str] = {}
        with h5py.File(path) as h:
            h.visititems(lambda name, node: found.__setitem__(name, str(getattr(node, "dtype", "group"))))
        # String lengths and the name of the probe set depend on the data.
        strings = {n: "S" if d.startswith("|S") else d for n, d in found.items()}
        return {n if "target_sets/" not in n else "matrix/features/target_sets/*": d for n, d in strings.items()}

    wanted = tree(genuine / "filtered_feature_bc_matrix.h5")
    # `matrix/genes` was added by the tool that reduced the file; the format of 10x has no such dataset.
    wanted.pop("matrix/genes")
    assert tree(folder / BINS / "filtered_feature_bc_matrix.h5") == wanted
