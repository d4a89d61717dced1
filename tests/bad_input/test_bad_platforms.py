"""Wrong files of Xenium and of cells as AnnData: one line that names the likely cause, exit status 2."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import tifffile

from prts.cli.exit_status import verdict
from prts.data.resolve import resolve_section
from prts.data.tissue import parse_tissue
from prts.platforms.affine import read_matrix, scaling
from prts.preprocess.counts import QCSettings, measured_counts
from prts.simulate.section import simulate_section

MATRIX, ALIGNMENT = "cell_feature_matrix.h5", "he_imagealignment.csv"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return simulate_section(tmp_path_factory.mktemp("xenium") / "s", cells=60, genes=50, seed=5, layout="xenium")


def prepare(cache: Path, **section: Any) -> tuple[int, str]:
    """Open and count a section as `prts prepare` does; exit status and line."""
    node = {key: str(value) if isinstance(value, Path) else value for key, value in section.items()}
    tissue = {"name": "t", "species": "human", "sections": {"s": node}, "train": ["s"]}
    try:
        parsed = parse_tissue(tissue)
        opened = resolve_section(parsed.sections["s"], "t", cache)
        nuclei = opened.measurement.outlines(opened.mpp)  # type: ignore[union-attr]
        measured_counts(opened, nuclei, species="human", qc=QCSettings(min_umi=0))
    except Exception as error:  # noqa: BLE001 (what the command line does with it is what is tested)
        return verdict(error)
    return 0, ""


def write_matrix(path: Path, change: Callable[[np.ndarray], np.ndarray]) -> None:
    np.savetxt(path, change(read_matrix(path)), delimiter=",", fmt="%.15g")


def rewrite(path: Path, change: Callable[[pd.DataFrame], pd.DataFrame]) -> None:
    change(pq.read_table(path).to_pandas()).to_parquet(path, index=False)


def rename_type(path: Path, old: bytes, new: bytes) -> None:
    with h5py.File(path, "r+") as file:
        kinds = file["matrix/features/feature_type"][:].astype("S30")
        del file["matrix/features/feature_type"]
        file["matrix/features/feature_type"] = np.where(kinds == old, new, kinds)


def halved(path: Path) -> None:
    with h5py.File(path, "r+") as file:
        values = file["matrix/data"][:] * 0.5
        del file["matrix/data"]
        file["matrix/data"] = values


def manifest(outs: Path, **values: Any) -> None:
    path = outs / "experiment.xenium"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


SPOILT: dict[str, tuple[Callable[[Path], object], str, str]] = {
    "no alignment": (lambda o: (o / ALIGNMENT).unlink(), "", "alignment of the H&E image is missing"),
    "two alignments": (lambda o: shutil.copy(o / ALIGNMENT, o / f"b_{ALIGNMENT}"), "", "name that of the H&E image"),
    "inverted": (lambda o: write_matrix(o / ALIGNMENT, np.linalg.inv), ALIGNMENT, "it seems to be inverted"),
    "leads to um": (lambda o: write_matrix(o / ALIGNMENT, lambda m: scaling(0.2125) @ m), ALIGNMENT, "lead to um"),
    "another scale": (lambda o: write_matrix(o / ALIGNMENT, lambda m: m @ scaling(4)), ALIGNMENT, "at full resolution"),
    "elsewhere": (
        lambda o: write_matrix(o / ALIGNMENT, lambda m: np.add(m, [[0, 0, 9e4], [0, 0, 0], [0, 0, 0]])),
        "",
        "are outside {image}",
    ),
    "not a matrix": (lambda o: (o / ALIGNMENT).write_text("a,b\nc,d\n"), ALIGNMENT, "not a matrix of numbers"),
    "two keypoints": (
        lambda o: (o / ALIGNMENT).write_text("fixedX,fixedY,alignmentX,alignmentY\n0,0,1,1\n5,5,9,9\n"),
        ALIGNMENT,
        "has 2 keypoints",
    ),
    "keypoints without a column": (
        lambda o: (o / ALIGNMENT).write_text("fixedX,fixedY,alignmentX\n0,0,1\n"),
        ALIGNMENT,
        "give the columns fixedX",
    ),
    "no manifest": (lambda o: (o / "experiment.xenium").unlink(), "experiment.xenium", "no such file"),
    "no pixel size": (lambda o: manifest(o, pixel_size=None), "experiment.xenium", "pixel_size is None"),
    "no matrix": (lambda o: (o / MATRIX).unlink(), MATRIX, "no such file"),
    "no outlines": (
        lambda o: (o / "nucleus_boundaries.parquet").unlink(),
        "nucleus_boundaries.parquet",
        "no such file",
    ),
    "no transcripts": (lambda o: (o / "transcripts.parquet").unlink(), "transcripts.parquet", "no such file"),
    "no cells": (lambda o: (o / "cells.parquet").unlink(), "cells.parquet", "no such file"),
    "centers in px": (
        lambda o: rewrite(
            o / "cells.parquet", lambda t: t.assign(x_centroid=t.x_centroid / 0.2125, y_centroid=t.y_centroid / 0.2125)
        ),
        "",
        "must be in um",
    ),
    "only controls": (
        lambda o: rename_type(o / MATRIX, b"Gene Expression", b"Blank Codeword"),
        MATRIX,
        "no feature of the type Gene Expression",
    ),
    "normalized": (lambda o: halved(o / MATRIX), MATRIX, "give raw UMI counts"),
    "transcripts without quality": (
        lambda o: rewrite(o / "transcripts.parquet", lambda t: t.drop(columns="qv")),
        "transcripts.parquet",
        "has no column qv",
    ),
    "damaged transcripts": (
        lambda o: (o / "transcripts.parquet").write_bytes((o / "transcripts.parquet").read_bytes()[:5000]),
        "transcripts.parquet",
        "not a readable Parquet file",
    ),
    "another panel": (
        lambda o: rewrite(o / "transcripts.parquet", lambda t: t.assign(feature_name="other " + t.feature_name)),
        "",
        "has no transcript of a gene in cell_feature_matrix.h5 with a quality of 20 or more",
    ),
}


@pytest.mark.parametrize("case", SPOILT)
def test_wrong_files_of_xenium_are_refused(folder: Path, tmp_path: Path, case: str) -> None:
    change, name, words = SPOILT[case]
    outs, image = shutil.copytree(folder / "outs", tmp_path / "outs"), folder / "tissue_image.tif"
    change(outs)
    units = "cell" if case == "normalized" else "nucleus"
    status, line = prepare(tmp_path, image=image, platform="xenium", outs=outs, units=units)
    assert status == 2, line
    assert str(outs / name) in line and words.format(image=image) in line and ";" in line and "\n" not in line


def test_the_right_folder_is_named(folder: Path, tmp_path: Path) -> None:
    (folder / "outs/analysis").mkdir(exist_ok=True)
    above = tmp_path / "run"
    shutil.copytree(folder / "outs", above / "region" / "outs")
    for wrong, right in ((folder / "outs/analysis", folder / "outs"), (above, above / "region/outs")):
        status, line = prepare(tmp_path, image=folder / "tissue_image.tif", platform="xenium", outs=wrong)
        assert status == 2 and f"{wrong}: is not Xenium's output folder; give {right}" in line


def test_a_missing_image_and_wrong_keys_are_named(folder: Path, tmp_path: Path) -> None:
    status, line = prepare(tmp_path, image=tmp_path / "he.tif", platform="xenium", outs=folder / "outs")
    assert (status, line.split(";")[0]) == (2, f"{tmp_path / 'he.tif'}: no such file")
    given = {"image": folder / "tissue_image.tif", "platform": "xenium", "outs": folder / "outs"}
    status, line = prepare(tmp_path, **given, aligment="x")
    assert status == 2 and line.startswith("tissue.sections.s.aligment: no such key, did you mean 'alignment'")
    status, line = prepare(tmp_path, **given, units="nuclei")
    assert (status, line) == (2, "tissue.sections.s.units: 'nuclei' is not accepted; give nucleus or cell")


@pytest.fixture
def cells(folder: Path, tmp_path: Path) -> Path:
    truth = ad.read_h5ad(folder / "truth.h5ad")
    X = np.random.default_rng(0).poisson(truth.X).astype(np.float32)
    um = {"spatial": truth.obsm["spatial"] * 0.5}
    data = ad.AnnData(np.log1p(X), obs=truth.obs[[]], var=truth.var[["gene_id"]], layers={"counts": X}, obsm=um)
    data.write_h5ad(tmp_path / "cells.h5ad")
    return tmp_path / "cells.h5ad"


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (
            {"coordinates": "um", "radius": 4.0},
            "which are not raw counts; name the layer with raw counts as `layer` (counts)",
        ),
        ({"coordinates": "um", "radius": 4.0, "layer": "count"}, "has no layers/count, did you mean 'counts'"),
        (
            {"coordinates": "um", "radius": 4.0, "spatial_key": "spatiall"},
            "has no obsm/spatiall, did you mean 'spatial'",
        ),
        ({"coordinates": "um", "polygons": "{nuclei}"}, "taken as pixels they fit: set `coordinates: px`"),
        ({"coordinates": "um", "polygons": "{stage}"}, "give `affine`, from the pixels or um of the cells"),
        ({"coordinates": "px", "polygons": "{nuclei}", "affine": [[0, 0, 1], [0, 0, 1]]}, "maps the plane to a line"),
        ({"coordinates": "px", "polygons": "{nuclei}", "affine": [[1, 0], [0, 1]]}, "not an affine matrix"),
        ({"coordinates": "um", "radius": 4.0, "affine": [[0.5, 0, 0], [0, 0.5, 0]]}, "makes 2 um/px of"),
        ({"coordinates": "px", "polygons": "{other ids}"}, "name the column of obs with the ids of the outlines"),
        ({"coordinates": "px", "polygons": "missing.geojson"}, "missing.geojson: no such file"),
        ({"coordinates": "px", "polygons": "outline"}, "obs has no column 'outline'"),
        ({"coordinates": "px", "labels": "{labels}"}, "give one of the same size, or `affine`"),
        ({"coordinates": "um", "labels": "{labels}"}, "label images are in px"),
        ({"coordinates": "px"}, "give exactly one of polygons, labels and radius"),
        ({"coordinates": "px", "radius": 4.0, "polygons": "x.geojson"}, "polygons and radius given"),
        ({"coordinates": "nm", "radius": 4.0}, "'nm' is not accepted; give px or um"),
    ],
)
def test_wrong_cells_are_refused(
    folder: Path, cells: Path, tmp_path: Path, settings: dict[str, Any], words: str
) -> None:
    import geopandas as gpd
    import shapely

    nuclei = gpd.read_parquet(folder / "truth_nuclei.parquet")
    stage = nuclei.assign(geometry=shapely.transform(nuclei.geometry.to_numpy(), lambda xy: xy * 0.5 + 5000))
    files = {"nuclei": folder / "truth_nuclei.parquet", "stage": tmp_path / "um.parquet"}
    stage.to_parquet(files["stage"])
    files["labels"] = tmp_path / "labels.tif"
    files["other ids"] = tmp_path / "ids.parquet"
    nuclei.assign(cell_id=[f"cell {i}" for i in range(len(nuclei))]).to_parquet(files["other ids"])
    tifffile.imwrite(files["labels"], np.ones((20, 20), np.int32))
    given = {
        key: str(files.get(value.strip("{}"), value)) if isinstance(value, str) else value
        for key, value in settings.items()
    }
    status, line = prepare(tmp_path, image=folder / "tissue_image.tif", platform="anndata", cells=cells, **given)
    assert status == 2 and words in line and ";" in line and "\n" not in line, line


def test_the_unit_has_to_be_said(folder: Path, cells: Path, tmp_path: Path) -> None:
    status, line = prepare(tmp_path, image=folder / "tissue_image.tif", platform="anndata", cells=cells, radius=4.0)
    assert (status, line) == (2, "tissue.sections.s.coordinates: is required for the platform anndata")
