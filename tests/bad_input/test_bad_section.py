"""Wrong and unusual sections: bins, positions, scale factors, spots."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import pytest

from prts.simulate.section import BINS

Ask = Callable[..., tuple[int, str]]
Refused = Callable[..., None]


def put(group: h5py.Group, name: str, values: Any) -> None:
    """Replace a dataset."""
    del group[name]
    group[name] = values


@pytest.mark.sampled("spoil")
@pytest.mark.parametrize(
    "name", ["filtered_feature_bc_matrix.h5", "spatial/tissue_positions.parquet", "spatial/scalefactors_json.json"]
)
def test_a_damaged_file_of_the_bins_is_named(
    evaluate: Ask, section: Path, refused: Refused, spoil: Callable[[Path], object], name: str
) -> None:
    path = section / BINS / name
    spoil(path)
    refused(evaluate(section=section), str(path))


def _links(matrix: h5py.Group, name: str, link: Any) -> None:
    del matrix[name]
    matrix[name] = link


WRONG_MATRIX: dict[str, tuple[Callable[[h5py.Group], object], str]] = {
    "fractions": (lambda m: put(m, "data", m["data"][:] * 0.5), "fractions"),
    "negative": (lambda m: put(m, "data", -m["data"][:].astype(np.int64)), "give raw UMI counts"),
    "NaN": (lambda m: put(m, "data", np.full(len(m["data"]), np.nan)), "give raw UMI counts"),
    "Inf": (lambda m: put(m, "data", np.full(len(m["data"]), np.inf)), "give raw UMI counts"),
    "beyond 32 bit": (lambda m: put(m, "data", m["data"][:].astype(np.int64) + 2**40), "give raw UMI counts"),
    "text for counts": (lambda m: put(m, "data", ["x"] * len(m["data"])), "must be numbers"),
    "index out of range": (lambda m: put(m, "indices", m["indices"][:] + 10**6), "reaches beyond"),
    "negative index": (lambda m: put(m, "indices", m["indices"][:].astype(np.int64) - 1000), "reaches beyond"),
    "lengths differ": (lambda m: put(m, "indices", m["indices"][:-5]), "contradict each other"),
    "indptr falls": (lambda m: put(m, "indptr", m["indptr"][:][::-1]), "contradict each other"),
    "shape lies": (lambda m: put(m, "shape", np.array([3, 5])), "contradict each other"),
    "two-dimensional": (lambda m: put(m, "data", m["data"][:].reshape(1, -1)), "contradict each other"),
    "indptr of fractions": (lambda m: put(m, "indptr", m["indptr"][:] + 0.5), "indptr"),
    "no barcodes": (lambda m: m.__delitem__("barcodes"), "matrix/barcodes is missing"),
    "barcode twice": (lambda m: put(m, "barcodes", [*m["barcodes"][:-1], m["barcodes"][0]]), "occurs twice"),
    "bins of 8 um": (
        lambda m: put(m, "barcodes", [b.replace(b"002um", b"008um") for b in m["barcodes"][:]]),
        "bins of 8 um",
    ),
    "numbers for barcodes": (lambda m: put(m, "barcodes", np.arange(len(m["barcodes"]))), "must be text"),
    "gene id twice": (
        lambda m: put(m["features"], "id", [m["features/id"][0], *m["features/id"][:-1]]),
        "unique ids",
    ),
    "columns of features differ": (lambda m: put(m["features"], "name", m["features/name"][:-1]), "different lengths"),
    "no gene expression": (
        lambda m: put(m["features"], "feature_type", ["Antibody Capture"] * len(m["features/id"])),
        "Gene Expression",
    ),
    "external link": (lambda m: _links(m, "data", h5py.ExternalLink("/etc/passwd", "/x")), "is a link to another file"),
    "soft link": (lambda m: _links(m, "data", h5py.SoftLink("/matrix/indices")), "is a link to another file"),
    "a group for data": (lambda m: (m.__delitem__("data"), m.create_group("data")), "is not a dataset"),
}


@pytest.mark.sampled("case")
@pytest.mark.parametrize("case", WRONG_MATRIX)
def test_a_wrong_matrix_is_refused(evaluate: Ask, section: Path, matrix: Path, refused: Refused, case: str) -> None:
    change, words = WRONG_MATRIX[case]
    with h5py.File(matrix, "r+") as file:
        change(file["matrix"])
    refused(evaluate(section=section), str(matrix), words)


def _unsorted(matrix: h5py.Group) -> None:
    indptr, data, indices = (matrix[name][:] for name in ("indptr", "data", "indices"))
    order = np.concatenate([np.arange(b - 1, a - 1, -1) for a, b in pairwise(indptr.astype(int))])
    put(matrix, "data", data[order])
    put(matrix, "indices", indices[order])


UNUSUAL_MATRIX: dict[str, Callable[[h5py.Group], object]] = {
    "symbol twice": lambda m: put(m["features"], "name", [m["features/name"][1], *m["features/name"][1:]]),
    "indices unsorted": _unsorted,
    "counts as floats": lambda m: put(m, "data", m["data"][:].astype(np.float32)),
    "a feature that is no gene": lambda m: put(
        m["features"], "feature_type", [*m["features/feature_type"][:-1], b"Antibody Capture"]
    ),
}


@pytest.mark.sampled("case")
@pytest.mark.parametrize("case", UNUSUAL_MATRIX)
def test_an_unusual_matrix_counts_the_same(
    evaluate: Ask, section: Path, matrix: Path, tmp_path: Path, case: str
) -> None:
    assert evaluate(section=section, out=tmp_path / "usual") == (0, "")
    with h5py.File(matrix, "r+") as file:
        UNUSUAL_MATRIX[case](file["matrix"])
    assert evaluate(section=section, out=tmp_path / "unusual") == (0, "")
    usual, unusual = (pd.read_csv(tmp_path / name / "per_gene.csv") for name in ("usual", "unusual"))
    last = -1 if case == "a feature that is no gene" else None
    pd.testing.assert_series_equal(usual["mean_counts"][:last], unusual["mean_counts"][:last])


WRONG_POSITIONS: dict[str, tuple[Callable[[pd.DataFrame], pd.DataFrame], str]] = {
    "no column": (lambda p: p.drop(columns="pxl_col_in_fullres"), "no column pxl_col_in_fullres"),
    "text": (lambda p: p.assign(array_row=p["array_row"].astype(str)), "must have whole numbers"),
    "fractions of bins": (lambda p: p.assign(array_row=p["array_row"] + 0.5), "must have whole numbers"),
    "NaN": (lambda p: p.assign(pxl_row_in_fullres=np.nan), "pxl_row_in_fullres"),
    "Inf": (lambda p: p.assign(pxl_row_in_fullres=np.inf), "not finite"),
    "twice": (lambda p: pd.concat([p, p.iloc[:1]]), "lists bins twice"),
    "negative": (lambda p: p.assign(array_col=p["array_col"] - 10**6), "do not span an array of bins"),
    "absurdly wide": (lambda p: p.assign(array_col=p["array_col"] * 10**6), "do not span an array of bins"),
    "no rows": (lambda p: p.iloc[:0], "lists no bins"),
    "one bin": (lambda p: p.iloc[:1], "fewer than three bins"),
    "another image's": (lambda p: p.assign(pxl_col_in_fullres=p["pxl_col_in_fullres"] + 10**5), "lie outside"),
    "another um/px": (
        lambda p: p.assign(
            pxl_col_in_fullres=p["pxl_col_in_fullres"] / 2, pxl_row_in_fullres=p["pxl_row_in_fullres"] / 2
        ),
        "must agree within 2 %",
    ),
}


@pytest.mark.sampled("case")
@pytest.mark.parametrize("case", WRONG_POSITIONS)
def test_wrong_positions_are_refused(evaluate: Ask, section: Path, refused: Refused, case: str) -> None:
    change, words = WRONG_POSITIONS[case]
    path = section / BINS / "spatial/tissue_positions.parquet"
    change(pd.read_parquet(path)).to_parquet(path)
    refused(evaluate(section=section), words)


WRONG_FACTORS: dict[str, tuple[Any, str]] = {
    "a list": ([1, 2], "a JSON object"),
    "zero um/px": ({"microns_per_pixel": 0}, "give a positive number"),
    "negative um/px": ({"microns_per_pixel": -0.5}, "give a positive number"),
    "NaN um/px": ({"microns_per_pixel": float("nan")}, "give a positive number"),
    "text um/px": ({"microns_per_pixel": "half"}, "give a positive number"),
    "other um/px": ({"microns_per_pixel": 0.25}, "must agree within 2 %"),
    "other bins": ({"bin_size_um": 8.0}, "those of 2 um"),
    "no bin size": ({"bin_size_um": None}, "bin_size_um"),
}


@pytest.mark.sampled("case")
@pytest.mark.parametrize("case", WRONG_FACTORS)
def test_wrong_scale_factors_are_refused(evaluate: Ask, section: Path, refused: Refused, case: str) -> None:
    change, words = WRONG_FACTORS[case]
    path = section / BINS / "spatial/scalefactors_json.json"
    content = json.loads(path.read_text()) | change if isinstance(change, dict) else change
    path.write_text(json.dumps(content))
    refused(evaluate(section=section), words)


def test_an_implausible_scale_factor_is_ignored(evaluate: Ask, section: Path) -> None:
    """Like a default of 72 dpi; image and bins agree on the um/px."""
    path = section / BINS / "spatial/scalefactors_json.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"microns_per_pixel": 400.0}))
    assert evaluate(section=section) == (0, "")


WRONG_SPOTS: dict[str, tuple[Callable[[ad.AnnData], object], str]] = {
    "negative": (lambda s: setattr(s, "X", -s.X), "negative or fractional"),
    "fractions": (lambda s: setattr(s, "X", s.X * 0.5), "negative or fractional"),
    "NaN place": (lambda s: s.obsm.update(spatial=s.obsm["spatial"] * np.nan), "obsm['spatial']"),
    "no place": (lambda s: s.obsm.clear(), "obsm['spatial']"),
    "no radius": (lambda s: s.uns.pop("spot_radius_px"), "spot_radius_px"),
    "radius of nought": (lambda s: s.uns.update(spot_radius_px=0.0), "spot_radius_px"),
    "spot twice": (lambda s: setattr(s, "obs_names", ["s1", "s1"]), "duplicate names"),
    "off the image": (lambda s: s.obsm.update(spatial=s.obsm["spatial"] + 10**6), "are outside"),
    "other um/px": (lambda s: s.uns.update(mpp=0.25), "must agree within 2 %"),
}


@pytest.mark.sampled("case")
@pytest.mark.parametrize("case", WRONG_SPOTS)
def test_wrong_spots_are_refused(evaluate: Ask, section: Path, refused: Refused, case: str) -> None:
    change, words = WRONG_SPOTS[case]
    spots = ad.read_h5ad(section / "spots.h5ad")
    change(spots)
    spots.write_h5ad(section / "spots.h5ad")
    refused(evaluate(section=section), "spots", words)


@pytest.mark.sampled("spoil")
def test_damaged_spots_are_named(
    evaluate: Ask, section: Path, refused: Refused, spoil: Callable[[Path], object], request: pytest.FixtureRequest
) -> None:
    spoil(section / "spots.h5ad")
    answer = evaluate(section=section)
    if "missing" in request.node.name:  # spots are optional
        assert answer == (0, "")
    else:
        refused(answer, str(section / "spots.h5ad"))


def test_a_folder_without_a_section_is_refused(evaluate: Ask, section: Path, refused: Refused, tmp_path: Path) -> None:
    refused(evaluate(section=tmp_path / "nowhere"), "no such folder")
    assert evaluate(section=section / BINS, out=tmp_path / "around") == (0, "")  # the section around it
    (section / "tissue_image.png").write_bytes(b"")
    refused(evaluate(section=section), "exactly one tissue_image.*")
