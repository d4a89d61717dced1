"""Measured spots: counts, positions in pixels, and refusal of anything else."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import pytest
from scipy.sparse import csc_matrix, csr_matrix, issparse

from prts.errors import InputError
from prts.evaluation.matching import align_genes
from prts.io.spots import read_spots

COUNTS = np.array([[0, 3, 1], [2, 0, 0]])


def spots() -> ad.AnnData:
    return ad.AnnData(
        csr_matrix(COUNTS.astype(np.float32)),
        obs=pd.DataFrame(index=["a", "b"]),
        var=pd.DataFrame(index=["X", "Y", "Z"]),
        obsm={"spatial": np.array([[10.5, 20.0], [110.5, 21.0]])},
        uns={"spot_radius_px": 50.0, "mpp": 0.69},
    )


@pytest.mark.parametrize("dense", [False, True])
def test_spots_are_read(tmp_path: Path, dense: bool) -> None:
    data = spots()
    if dense:
        data.X = COUNTS.astype(np.int64)
    data.write_h5ad(tmp_path / "spots.h5ad")
    read = read_spots(tmp_path / "spots.h5ad")
    assert issparse(read.counts.X)
    assert read.counts.X.dtype == np.int32
    assert np.array_equal(read.counts.X.toarray(), COUNTS)
    assert read.xy.tolist() == [[10.5, 20.0], [110.5, 21.0]]
    assert (read.radius_px, read.mpp) == (50.0, 0.69)


def change(**changes: object) -> Callable[[ad.AnnData], None]:
    def apply(data: ad.AnnData) -> None:
        for name, value in changes.items():
            setattr(data, name, value)

    return apply


def delete(where: str, key: str) -> Callable[[ad.AnnData], None]:
    return lambda data: getattr(data, where).__delitem__(key)


def put(where: str, key: str, value: object) -> Callable[[ad.AnnData], None]:
    return lambda data: getattr(data, where).__setitem__(key, value)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (change(X=COUNTS * 0.5), "fractional"),
        (change(X=-COUNTS), "negative"),
        (change(X=np.where(COUNTS > 0, COUNTS, np.nan)), "raw UMI counts"),
        (change(X=None), "no counts"),
        (delete("obsm", "spatial"), "spatial"),
        (put("obsm", "spatial", np.zeros((2, 3))), "spatial"),
        (put("obsm", "spatial", np.full((2, 2), np.nan)), "spatial"),
        (delete("uns", "spot_radius_px"), "spot_radius_px"),
        (put("uns", "spot_radius_px", 0.0), "spot_radius_px"),
        (put("uns", "spot_radius_px", "wide"), "spot_radius_px"),
    ],
)
def test_wrong_spots_are_refused(tmp_path: Path, damage: Callable[[ad.AnnData], None], message: str) -> None:
    data = spots()
    damage(data)
    data.write_h5ad(tmp_path / "spots.h5ad")
    with pytest.raises(InputError, match=rf"spots\.h5ad.*{message}"):
        read_spots(tmp_path / "spots.h5ad")


def as_from_scanpy(data: ad.AnnData) -> None:
    """The layout of `scanpy.read_visium`."""
    data.uns = {
        "spatial": {
            "V1_Brain": {"images": {}, "scalefactors": {"spot_diameter_fullres": 89.5, "tissue_hires_scalef": 0.1}}
        }
    }
    data.var_names = ["TBCE", "TBCE", "Z"]
    data.var["gene_ids"] = ["ENSG1", "ENSG2", "ENSG3"]


def as_normalized(data: ad.AnnData) -> None:
    data.layers["counts"] = data.X.copy()
    data.X = csr_matrix(np.log1p(COUNTS * 0.7))


def as_text(data: ad.AnnData) -> None:
    data.obsm["spatial"] = data.obsm["spatial"].astype(str)


def as_nullable(data: ad.AnnData) -> None:
    data.obs["slide"] = pd.array(["s", None], dtype="string")
    data.var["gene_name"] = pd.array(["A", "B", None], dtype="string")
    data.obs["n"] = pd.array([1, None], dtype="Int64")
    data.X = csc_matrix(data.X)


@pytest.mark.filterwarnings("ignore:Variable names are not unique", "ignore:Observation names are not unique")
@pytest.mark.parametrize("change", [as_from_scanpy, as_normalized, as_text, as_nullable])
def test_spots_as_other_programs_write_them_are_read(tmp_path: Path, change: Callable[[ad.AnnData], None]) -> None:
    data = spots()
    change(data)
    ad.settings.allow_write_nullable_strings = True
    data.write_h5ad(tmp_path / "spots.h5ad")
    ad.settings.allow_write_nullable_strings = False
    read = read_spots(tmp_path / "spots.h5ad")
    assert np.array_equal(read.counts.X.toarray(), COUNTS) and read.xy.tolist() == [[10.5, 20.0], [110.5, 21.0]]
    assert read.radius_px == (44.75 if change is as_from_scanpy else 50.0)
    if change is as_from_scanpy:
        assert read.counts.var_names.tolist() == ["TBCE", "TBCE-1", "Z"]
        assert read.counts.var["gene_id"].tolist() == ["ENSG1", "ENSG2", "ENSG3"]


def test_spots_named_by_gene_ids_match_a_prediction_by_id_and_by_symbol(tmp_path: Path) -> None:
    data = spots()
    data.var["feature_name"] = ["A", "B", "C"]
    data.var_names = ["ENSG00000000003.12", "ENSG00000000005", "ENSG00000000419"]
    data.write_h5ad(tmp_path / "spots.h5ad")
    read = read_spots(tmp_path / "spots.h5ad").counts
    by_id = align_genes(read, ["x", "y"], ["ENSG00000000419", "ENSG00000000003"], "spots")
    assert np.array_equal(by_id.toarray(), COUNTS[:, [2, 0]])
    assert np.array_equal(align_genes(read, ["B", "A"], None, "spots").toarray(), COUNTS[:, [1, 0]])


def test_libraries_with_spots_of_different_sizes_are_refused(tmp_path: Path) -> None:
    data = spots()
    sizes = {name: {"scalefactors": {"spot_diameter_fullres": d}} for name, d in (("a", 80.0), ("b", 90.0))}
    data.uns = {"spatial": sizes}
    data.write_h5ad(tmp_path / "spots.h5ad")
    with pytest.raises(InputError, match="2 libraries with spots of different sizes; keep the one"):
        read_spots(tmp_path / "spots.h5ad")


def edit(path: Path, name: str, values: object, **options: object) -> None:
    with h5py.File(path, "r+") as file:
        attributes = dict(file[name].attrs)
        del file[name]
        file.create_dataset(name, data=values, **options).attrs.update(attributes)


def test_indices_out_of_bounds_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "spots.h5ad"
    spots().write_h5ad(path)
    edit(path, "X/indices", np.full(np.count_nonzero(COUNTS), 3_000_000, np.int32))
    with pytest.raises(InputError, match=r"spots\.h5ad: X is inconsistent"):
        read_spots(path)
    edit(path, "X/indices", np.full(np.count_nonzero(COUNTS), b"abc", "V3"))
    with pytest.raises(InputError, match=r"spots\.h5ad: X is inconsistent"):
        read_spots(path)


def test_sizes_beyond_the_file_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "spots.h5ad"
    spots().write_h5ad(path)
    edit(path, "obsm/spatial", None, shape=(2, 1 << 40), dtype="f8", chunks=(1, 1024))
    with pytest.raises(InputError, match="obsm/spatial claims more values than the file holds"):
        read_spots(path)


def test_other_files_and_missing_files(tmp_path: Path) -> None:
    (tmp_path / "spots.h5ad").write_text("barcode,x,y")
    with pytest.raises(InputError, match=r"spots\.h5ad: not HDF5, or damaged"):
        read_spots(tmp_path / "spots.h5ad")
    with pytest.raises(InputError, match="no such file"):
        read_spots(tmp_path / "none.h5ad")


@pytest.mark.real
def test_real_spots(prts_data: Path) -> None:
    read = read_spots(prts_data / "her2st_hd/C2/spots.h5ad")
    assert read.counts.shape == (187, 15_706)
    assert read.xy[0] == pytest.approx([632.13, 2712.13], abs=0.01)
    assert read.radius_px * 2 * 0.6880980086 == pytest.approx(100, rel=1e-3)
