"""Xenium: the alignment has the right direction, and counts equal those of a loop over transcripts."""

from __future__ import annotations

import dataclasses
import json
import logging
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import scanpy as sc
import shapely

import prts.platforms.xenium_transcripts as transcripts_module
from prts.platforms.affine import fit_similarity, move, read_matrix
from prts.platforms.xenium import Xenium
from prts.platforms.xenium_files import read_alignment
from prts.section import open_section_folder, read_section

# Published by 10x Genomics as an example (knowledge base, "How can I convert coordinates between H&E image and Xenium data").
EXAMPLE = [
    [0.011071028838929093, 1.2895790134339569, 807.9788953065927],
    [-1.2895790134339569, 0.011071028838929093, 73097.655174759],
    [0, 0, 1],
]
PIXEL = 0.2125


@pytest.fixture
def example(tmp_path: Path) -> Path:
    path = tmp_path / "he_imagealignment.csv"
    path.write_text("\n".join(",".join(map(repr, row)) for row in EXAMPLE))
    return path


def test_the_matrix_leads_from_the_image_to_xenium_so_it_is_inverted(example: Path) -> None:
    to_px = read_alignment(example, PIXEL)
    # the top left corner of the H&E image, and the point (1000, 2000) of it, computed by hand
    in_xenium_px = [
        (807.9788953065927, 73097.655174759),
        (
            0.011071028838929093 * 1000 + 1.2895790134339569 * 2000 + 807.9788953065927,
            -1.2895790134339569 * 1000 + 0.011071028838929093 * 2000 + 73097.655174759,
        ),
    ]
    um = np.array(in_xenium_px) * PIXEL
    np.testing.assert_allclose(move(to_px, um), [[0, 0], [1000, 2000]], atol=1e-6)


def test_keypoints_give_the_matrix_they_were_fitted_to(example: Path, tmp_path: Path) -> None:
    he = np.array([[0.0, 0.0], [9000.0, 500.0], [4000.0, 8000.0], [100.0, 7000.0]])
    for mirror in (1.0, -1.0):
        matrix = np.array(EXAMPLE) @ np.diag([1.0, mirror, 1.0])
        np.savetxt(example, matrix, delimiter=",")
        rows = np.hstack([move(matrix, he), he])
        path = tmp_path / "keypoints.csv"
        pd.DataFrame(rows, columns=["fixedX", "fixedY", "alignmentX", "alignmentY"]).to_csv(path, index=False)
        np.testing.assert_allclose(read_alignment(path, PIXEL), read_alignment(example, PIXEL), rtol=1e-6, atol=1e-6)


def test_a_bad_keypoint_is_reported(example: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    he = np.array([[0.0, 0.0], [9000.0, 500.0], [4000.0, 8000.0]])
    rows = np.hstack([move(np.array(EXAMPLE), he), he])
    rows[0, :2] += 200.0
    path = tmp_path / "keypoints.csv"
    pd.DataFrame(rows, columns=["fixedX", "fixedY", "alignmentX", "alignmentY"]).to_csv(path, index=False)
    read_alignment(path, PIXEL)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "um (root mean square) off their fit" in caplog.text


def test_the_similarity_is_that_of_least_squares() -> None:
    rng = np.random.default_rng(0)
    source = rng.normal(size=(20, 2)) * 100
    target = source @ [[0.3, 1.1], [-1.1, 0.3]] + [5, -7] + rng.normal(size=(20, 2))
    matrix, rms = fit_similarity(source, target)
    # x' = a x - b y + c, y' = b x + a y + d as a linear system
    x, y = source.T
    one, zero = np.ones(20), np.zeros(20)
    system = np.vstack([np.column_stack([x, -y, one, zero]), np.column_stack([y, x, zero, one])])
    (a, b, c, d), residual, *_ = np.linalg.lstsq(system, np.r_[target[:, 0], target[:, 1]])
    np.testing.assert_allclose(matrix, [[a, -b, c], [b, a, d], [0, 0, 1]], atol=1e-8)
    assert rms == pytest.approx(np.sqrt(residual[0] / 20))


def slow_counts(outs: Path, min_qv: float = 20.0) -> pd.DataFrame:
    """Nuclear transcripts of each cell and gene, one transcript at a time."""
    genes = sc.read_10x_h5(outs / "cell_feature_matrix.h5").var_names
    cells = pd.read_parquet(outs / "cells.parquet")["cell_id"]
    counts = {cell: dict.fromkeys(genes, 0) for cell in cells}
    for row in pd.read_parquet(outs / "transcripts.parquet").itertuples():
        if row.qv >= min_qv and row.overlaps_nucleus == 1 and row.cell_id in counts and row.feature_name in genes:
            counts[row.cell_id][row.feature_name] += 1
    return pd.DataFrame.from_dict(counts, orient="index")[list(genes)]


@pytest.mark.parametrize("batch", [700, 1 << 20])
def test_nuclei_hold_what_a_loop_over_transcripts_finds(
    measured: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, batch: int
) -> None:
    monkeypatch.setattr(transcripts_module, "_BATCH", batch)
    xenium = Xenium(measured.outs)
    nuclei = xenium.outlines(0.5).iloc[::-1].iloc[:100]
    counts = xenium.counts(nuclei)
    slow = slow_counts(measured.outs)
    assert counts.obs_names.tolist() == nuclei["cell_id"].tolist()
    np.testing.assert_array_equal(counts.X.toarray(), slow.loc[counts.obs_names, counts.var_names].to_numpy())
    assert counts.X.has_sorted_indices and counts.X.dtype == np.int32 and (counts.X.data > 0).all()
    assert counts.uns["prts"]["umi_assigned"] == counts.X.sum()


def test_the_same_truth_gives_the_counts_of_visium_hd(measured: SimpleNamespace) -> None:
    section = open_section_folder(measured.xenium)
    assert section.measurement.name == "xenium"
    nuclei = section.measurement.outlines(section.mpp)
    there = shapely.centroid(measured.nuclei.geometry.to_numpy())
    assert shapely.distance(shapely.centroid(nuclei.geometry.to_numpy()), there).max() < 0.01  # px
    np.testing.assert_allclose(nuclei["area_um2"], measured.nuclei["area_um2"], rtol=1e-4)
    counts = section.measurement.counts(nuclei)
    assert counts.var_names.tolist() == measured.counts.var_names.tolist()
    assert (counts.X != measured.counts.X).nnz == 0
    assert counts.X.sum() > 10_000


def test_quality_decides(measured: SimpleNamespace) -> None:
    everything = Xenium(measured.outs, min_qv=0.0)
    nuclei = everything.outlines(0.5)
    slow = slow_counts(measured.outs, min_qv=0.0)
    np.testing.assert_array_equal(everything.counts(nuclei).X.toarray(), slow.to_numpy())
    assert slow.to_numpy().sum() > 1.05 * slow_counts(measured.outs).to_numpy().sum()


def test_cells_keep_the_counts_of_the_matrix_without_controls(measured: SimpleNamespace) -> None:
    xenium = Xenium(measured.outs, units="cell")
    cells = xenium.outlines(0.5)
    counts = xenium.counts(cells)
    plain = sc.read_10x_h5(measured.outs / "cell_feature_matrix.h5", gex_only=True)
    assert sc.read_10x_h5(measured.outs / "cell_feature_matrix.h5", gex_only=False).n_vars > plain.n_vars
    np.testing.assert_array_equal(counts.X.toarray(), plain[counts.obs_names].X.toarray())
    assert counts.var["gene_id"].tolist() == plain.var["gene_ids"].tolist()
    assert cells["area_um2"].median() > 1.5 * measured.nuclei["area_um2"].median()
    assert xenium.identity() != Xenium(measured.outs).identity()


def test_other_nuclei_hold_the_transcripts_within_them(measured: SimpleNamespace) -> None:
    nuclei = measured.nuclei.assign(cell_id=[f"aaaaaa{i:02d}-1" for i in range(len(measured.nuclei))]).iloc[:40]
    twin = nuclei.iloc[[3]].assign(cell_id="twin")
    nuclei = pd.concat([nuclei, twin], ignore_index=True)
    counts = Xenium(measured.outs).counts(nuclei)
    rows = pd.read_parquet(measured.outs / "transcripts.parquet")
    rows = rows[(rows["qv"] >= 20) & rows["feature_name"].isin(counts.var_names)]
    um = rows[["x_location", "y_location"]].to_numpy(np.float64)
    xy = move(np.linalg.inv(read_matrix(measured.outs / "he_imagealignment.csv")), um / PIXEL)
    slow = np.zeros(counts.shape, np.int64)
    for row, polygon in enumerate(nuclei.geometry[:40]):
        inside = shapely.contains_xy(polygon, xy[:, 0], xy[:, 1])
        found = rows.loc[inside, "feature_name"].value_counts()
        slow[row] = found.reindex(counts.var_names, fill_value=0)
    slow[3] = 0  # in two nuclei
    np.testing.assert_array_equal(counts.X.toarray(), slow)
    assert slow.sum() > 1000


def test_ids_of_another_segmentation_do_not_pass_for_xenium_cells(measured: SimpleNamespace) -> None:
    xenium = Xenium(measured.outs)
    own = xenium.outlines(0.5)
    mixed_up = own.assign(cell_id=np.roll(own["cell_id"], 1))
    assert (xenium.counts(mixed_up).X != xenium.counts(own).X).nnz > 0
    assert xenium.counts(mixed_up).uns["prts"].keys() != xenium.counts(own).uns["prts"].keys()


def rewrite(path: Path, change: dict[str, pa.Array], drop: str | None = None) -> None:
    table = pq.read_table(path)
    for name, values in change.items():
        table = table.set_column(table.schema.get_field_index(name), name, values)
    pq.write_table(table if drop is None else table.drop_columns(drop), path, row_group_size=5000)


def test_files_of_older_software_read_the_same(measured: SimpleNamespace, tmp_path: Path) -> None:
    outs = tmp_path / "outs"
    outs.mkdir()
    for path in measured.outs.iterdir():
        (outs / path.name).write_bytes(path.read_bytes())
    table = pq.read_table(outs / "transcripts.parquet")
    names = {name: table[name].cast(pa.binary()) for name in ("feature_name", "cell_id")}
    rewrite(outs / "transcripts.parquet", names, drop="is_gene")
    for kind in ("nucleus", "cell"):
        rewrite(outs / f"{kind}_boundaries.parquet", {}, drop="label_id")
    pd.read_parquet(outs / "cells.parquet").to_csv(outs / "cells.csv.gz", index=False)
    (outs / "cells.parquet").unlink()
    section = read_section(measured.image, platform="xenium", outs=tmp_path)
    nuclei = section.measurement.outlines(0.5)
    assert (section.measurement.counts(nuclei).X != measured.counts.X).nnz == 0


def test_a_cell_with_several_nuclei_keeps_the_largest_outline_and_all_counts(
    measured: SimpleNamespace, tmp_path: Path
) -> None:
    outs = tmp_path / "outs"
    outs.mkdir()
    for path in measured.outs.iterdir():
        (outs / path.name).write_bytes(path.read_bytes())
    table = pd.read_parquet(outs / "nucleus_boundaries.parquet")
    first, second = table["cell_id"].drop_duplicates()[:2]
    smaller, larger = sorted(
        (first, second),
        key=lambda cell: shapely.Polygon(table.loc[table["cell_id"] == cell, ["vertex_x", "vertex_y"]]).area,
    )
    table.loc[table["cell_id"] == smaller, "cell_id"] = larger
    table.to_parquet(outs / "nucleus_boundaries.parquet")
    xenium, whole = Xenium(outs), Xenium(measured.outs)
    nuclei, before = xenium.outlines(0.5), whole.outlines(0.5).set_index("cell_id")
    assert len(nuclei) == len(before) - 1 and smaller not in set(nuclei["cell_id"])
    assert nuclei.set_index("cell_id").loc[larger, "area_um2"] == before.loc[larger, "area_um2"]
    np.testing.assert_array_equal(
        xenium.counts(nuclei)[larger].X.toarray(), whole.counts(before.reset_index())[larger].X.toarray()
    )


def test_um_per_px_come_from_the_alignment_if_the_image_does_not_state_them(
    measured: SimpleNamespace, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    import tifffile

    image = tmp_path / "he.tif"
    tifffile.imwrite(image, tifffile.imread(measured.image), photometric="rgb", tile=(256, 256))
    with caplog.at_level(logging.INFO):
        section = read_section(image, platform="xenium", outs=measured.outs)
    assert section.mpp == pytest.approx(0.5)
    assert "he_imagealignment.csv" in section.mpp_source
    version = json.loads((measured.outs / "experiment.xenium").read_text())["analysis_sw_version"]
    assert f"software {version}, 0.2125 um/px" in caplog.text


def test_a_section_of_xenium_is_found_and_its_settings_are_checked(measured: SimpleNamespace) -> None:
    found = Xenium.find(measured.xenium)
    assert found == Xenium(measured.outs)
    assert Xenium.find(measured.visium) is None
    assert found.path == dataclasses.replace(found, outs=measured.xenium).path
