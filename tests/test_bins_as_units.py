"""Bins as units, from the files of a section to scores."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import shapely

import prts
from prts.api.polygons import nuclei_of
from prts.cli.app import run
from prts.errors import InputError
from prts.platforms.bin_units import bin_um_of
from prts.preprocess.counts import QCSettings, measured_counts
from prts.segmentation.bins import Bins, measured_bins
from prts.simulate.section import simulate_section

SIDE = 4  # 2 um bins along one of 8 um
COMMON = (
    *("encoder=classical", "encoder.tile_px=64"),  # quicker than 256
    *("trainer=cpu", "logger=none", "report=false", "trainer.max_epochs=2"),
)


def write_8um(folder: Path) -> None:
    """`square_008um`, each bin the sum of 4 x 4 bins of 2 um, bin by bin."""
    small, large = (folder / f"binned_outputs/square_{size:03}um" for size in (2, 8))
    (large / "spatial").mkdir(parents=True)
    factors = json.loads((small / "spatial/scalefactors_json.json").read_text())
    factors |= {"bin_size_um": 8.0, "spot_diameter_fullres": 4 * factors["spot_diameter_fullres"]}
    (large / "spatial/scalefactors_json.json").write_text(json.dumps(factors))

    positions = pd.read_parquet(small / "spatial/tissue_positions.parquet")
    for axis in ("array_row", "array_col"):
        positions[axis] //= SIDE
    by = positions.groupby(["array_row", "array_col"], as_index=False)
    means = by[["pxl_row_in_fullres", "pxl_col_in_fullres"]].mean()
    means["in_tissue"] = by["in_tissue"].max()["in_tissue"].astype(np.int32)
    means = means[by.size()["size"] == SIDE**2].reset_index(drop=True)
    means["barcode"] = [
        f"s_008um_{row:05}_{col:05}-1" for row, col in zip(means.array_row, means.array_col, strict=True)
    ]
    means.to_parquet(large / "spatial/tissue_positions.parquet", index=False)

    with h5py.File(small / "filtered_feature_bc_matrix.h5") as old:
        matrix = old["matrix"]
        by_bin = sp.csr_matrix(
            (matrix["data"][:], matrix["indices"][:], matrix["indptr"][:]), tuple(matrix["shape"][:][::-1])
        )
        names = [text.decode() for text in matrix["barcodes"][:]]
        sums: dict[str, np.ndarray] = {}
        listed = set(means["barcode"])
        for i, name in enumerate(names):
            row, col = int(name[8:13]) // SIDE, int(name[14:19]) // SIDE
            key = f"s_008um_{row:05}_{col:05}-1"
            if key in listed:
                sums[key] = sums.get(key, 0) + by_bin[i].toarray().ravel()
        counts = sp.csr_matrix(np.stack(list(sums.values())))
        with h5py.File(large / "filtered_feature_bc_matrix.h5", "w") as new:
            old.copy("matrix/features", new.create_group("matrix"))
            for name, values in {
                "barcodes": np.array(list(sums), dtype="S"),
                "data": counts.data.astype(np.int32),
                "indices": counts.indices,
                "indptr": counts.indptr,
                "shape": np.array(counts.shape[::-1]),
            }.items():
                new["matrix"][name] = values


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("sections")
    for seed, name in enumerate(("first", "second", "third")):
        simulate_section(root / name, name=name, cells=150, genes=80, seed=seed)
        write_8um(root / name)
    shutil.rmtree(root / "third/binned_outputs/square_002um")
    return {name: root / name for name in ("first", "second", "third")}


def table(folder: Path) -> pd.DataFrame:
    """The 8 um matrix, bins x genes."""
    with h5py.File(folder / "binned_outputs/square_008um/filtered_feature_bc_matrix.h5") as file:
        matrix = file["matrix"]
        shape = tuple(matrix["shape"][:][::-1])
        dense = sp.csr_matrix((matrix["data"][:], matrix["indices"][:], matrix["indptr"][:]), shape).toarray()
        names = [text.decode() for text in matrix["barcodes"][:]]
    return pd.DataFrame(dense, index=names)


def units_of(section: prts.Section):
    own = measured_bins(section, Bins(8))
    assert own is not None
    with section.open_slide() as slide:
        return own(slide)


def test_units_are_the_bins_of_the_matrix_with_its_rows_as_counts(folders):
    section = prts.read_visium_hd(folders["first"], units="bins")
    units, rows = units_of(section), table(folders["first"])

    assert bin_um_of(units) == 8
    assert set(units["cell_id"]) <= set(rows.index)
    assert len(units) > 0.9 * len(rows)
    np.testing.assert_allclose(units["area_um2"], 64, rtol=1e-6)
    counts = measured_counts(section, units, species="human", qc=QCSettings.for_bins(), report_shift=True)
    np.testing.assert_array_equal(counts.X.toarray(), rows.loc[counts.obs_names])
    assert "registration" not in counts.uns["prts"]
    assert set(counts.obs_names) == {name for name in units["cell_id"] if rows.loc[name].sum() > 10}


def test_squares_cover_the_bins_without_gap_or_overlap(folders):
    units = units_of(prts.read_visium_hd(folders["first"], units="bins"))
    some = units.geometry.to_numpy()[:200]
    assert shapely.union_all(some).area == pytest.approx(shapely.area(some).sum(), rel=1e-6)


def test_summing_2_um_bins_in_the_squares_gives_the_same_counts(folders):
    section = prts.read_visium_hd(folders["first"], units="bins")
    units = units_of(section)
    renamed = units.assign(cell_id=[f"nucleus {i}" for i in range(len(units))])
    summed = prts.read_visium_hd(folders["first"]).measurement.counts(renamed)
    np.testing.assert_array_equal(summed.X.toarray(), section.measurement.counts(units).X.toarray())


def test_a_section_with_8_um_bins_only_opens_and_refuses_nuclei(folders):
    section = prts.read_visium_hd(folders["third"])
    assert section.measurement.bin_um == 8
    units = units_of(section)
    with pytest.raises(InputError, match="bins of 8 um are too large to be summed in nuclei"):
        section.measurement.counts(units.assign(cell_id=[str(i) for i in range(len(units))]))
    with pytest.raises(InputError, match=r"square_016um is not next to it; set `bin_um` to a size that is there \(8\)"):
        prts.read_visium_hd(folders["third"], units="bins", bin_um=16)


def test_squares_of_a_tiling_are_on_tissue_and_are_not_mistaken_for_bins_of_the_same_name(folders):
    section = prts.read_visium_hd(folders["third"])
    with section.open_slide() as slide:
        tiles = Bins(8)(slide)
    bounds = tiles.geometry.total_bounds
    assert (bounds >= -1e-6).all()
    assert bounds[2] <= section.width + 1e-6
    assert bounds[3] <= section.height + 1e-6
    assert 0 < len(tiles) < section.width * section.height * section.mpp**2 / 64
    counts = section.measurement.counts(tiles)
    assert counts.uns["prts"]["umi_assigned"] > 0.8 * counts.uns["prts"]["umi_total"]
    shared = counts.obs_names.intersection(table(folders["third"]).index)
    assert (counts[shared].X.toarray() != table(folders["third"]).loc[shared]).to_numpy().any()


@pytest.fixture(scope="module")
def configs(folders, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Options of a tissue of these sections."""
    root = tmp_path_factory.mktemp("mine")
    (root / "tissue").mkdir()
    lines = ["name: squares", "species: human", "sections:"]
    for name, folder in folders.items():
        image = next(folder.glob("tissue_image.*"))
        lines.append(f"  {name}: {{image: {image}, bins: {folder}/binned_outputs/square_008um}}")
    lines += ["train: [first]", "val: [second]", "test: [third]"]
    (root / "tissue/squares.yaml").write_text("\n".join(lines))
    return [f"--config-dir={root}", "tissue=squares", "panel=top", "panel.n_genes=30", f"paths.cache_dir={root}/cache"]


@pytest.mark.slow
def test_from_training_to_scores(folders, configs, tmp_path, capsys):
    folder = tmp_path / "run"
    assert run("train", [*configs, *COMMON, "units=bins", f"hydra.run.dir={folder}"]) == 0, capsys.readouterr().err
    about = json.loads((folder / "model/model.json").read_text())
    assert about["segmentation"] == {"name": "bins", "arguments": {"bin_um": 8}}
    assert about["input"]["use"] == ["local", "global"]
    assert about["qc"]["max_pct_mt"] is None
    metrics = json.loads((folder / "metrics.json").read_text())
    assert {"baseline/ridge/pcc_mean", "baseline/colour/pcc_mean"} <= set(metrics)
    tested = ad.read_h5ad(folder / "predictions.h5ad")
    assert set(tested.obs_names) <= set(table(folders["third"]).index)

    image, out = next(folders["third"].glob("tissue_image.*")), tmp_path / "slide.h5ad"
    cache = next(option for option in configs if option.startswith("paths."))
    predict = [f"bundle={folder}/model", f"image={image}", f"out={out}", cache, "mpp=0.5"]
    assert run("predict", predict) == 0, capsys.readouterr().err
    assert run("evaluate", [f"prediction={out}", f"section={folders['third']}", f"out={tmp_path}/scores"]) == 0
    assert np.isfinite(json.loads((tmp_path / "scores/metrics.json").read_text())["test/pcc_mean"])
    assert all(name.startswith("s_008um_") for name in ad.read_h5ad(out).obs_names)
    assert run("export", [f"prediction={out}", "format=parquet", f"out={tmp_path}/table.parquet"]) == 0
    capsys.readouterr()

    wrong = {("units=bins", "bin_um=16"): "bin_um: 16 is not the size", ("units=nuclei",): "units: nuclei, but"}
    for options, message in wrong.items():
        assert run("predict", [*predict, *options]) == 2
        assert message in capsys.readouterr().err

    model = prts.Model.load(folder / "model")
    section = prts.read_visium_hd(folders["third"], units="bins")
    own = model.predict(section, cache_dir=tmp_path / "cache")
    assert set(nuclei_of(own)["cell_id"]) <= set(table(folders["third"]).index)
    scores = model.evaluate(own, section, cache_dir=tmp_path / "cache")
    assert scores.summary["test/pcc_mean"] == pytest.approx(metrics["test/pcc_mean"], abs=1e-3)


def test_bins_cannot_be_trained_on_morphology_alone(configs, capsys):
    assert run("train", [*configs, *COMMON, "units=bins", "data.use=[morphology]"]) == 2
    assert "data.use: morphology alone does not tell bins apart" in capsys.readouterr().err
    assert run("train", [*configs, *COMMON, "units=bins", "segmentation=watershed"]) == 2
    assert "segmentation: has no effect on bins" in capsys.readouterr().err
    assert run("train", [*configs, *COMMON, "segmentation=bins"]) == 2
    assert "units=bins" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.real
def test_kidney_bins_are_counted_as_measured(prts_data):
    section = prts.read_visium_hd(prts_data / "kidney_hd8/K3", units="bins")
    units = units_of(section)
    some = units.iloc[::50].reset_index(drop=True)
    counts = section.measurement.counts(some)
    with h5py.File(section.measurement.files["matrix"]) as file:
        matrix = file["matrix"]
        names = pd.Index([text.decode() for text in matrix["barcodes"][:]])
        indptr = matrix["indptr"][:]
        for i in range(0, len(some), 100):
            at = names.get_loc(some["cell_id"][i])
            expected = np.zeros(counts.n_vars, int)
            expected[matrix["indices"][indptr[at] : indptr[at + 1]]] = matrix["data"][indptr[at] : indptr[at + 1]]
            np.testing.assert_array_equal(counts.X[i].toarray().ravel(), expected)
