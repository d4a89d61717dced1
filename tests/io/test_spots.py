"""Measured spots: counts as they are, positions in pixels, and nothing else passes."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import pytest
from scipy.sparse import csr_matrix, issparse

from prts.errors import InputError
from prts.io.h5_checks import endless_strings
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
        (change(var_names=["X", "X", "Z"]), "twice"),
        (delete("obsm", "spatial"), "spatial"),
        (put("obsm", "spatial", np.zeros((2, 3))), "spatial"),
        (put("obsm", "spatial", np.full((2, 2), np.nan)), "spatial"),
        (delete("uns", "spot_radius_px"), "spot_radius_px"),
        (put("uns", "spot_radius_px", 0.0), "spot_radius_px"),
        (put("uns", "spot_radius_px", "wide"), "spot_radius_px"),
    ],
)
@pytest.mark.filterwarnings("ignore:Variable names are not unique")
def test_wrong_spots_are_refused(tmp_path: Path, damage: Callable[[ad.AnnData], None], message: str) -> None:
    data = spots()
    damage(data)
    data.write_h5ad(tmp_path / "spots.h5ad")
    with pytest.raises(InputError, match=rf"spots\.h5ad.*{message}"):
        read_spots(tmp_path / "spots.h5ad")


def edit(path: Path, name: str, values: object, **options: object) -> None:
    with h5py.File(path, "r+") as file:
        attributes = dict(file[name].attrs)
        del file[name]
        file.create_dataset(name, data=values, **options).attrs.update(attributes)


def test_a_sparse_matrix_that_points_out_of_itself_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "spots.h5ad"
    spots().write_h5ad(path)
    edit(path, "X/indices", np.full(np.count_nonzero(COUNTS), 3_000_000, np.int32))
    with pytest.raises(InputError, match=r"spots\.h5ad: X contradicts itself"):
        read_spots(path)
    edit(path, "X/indices", np.full(np.count_nonzero(COUNTS), b"abc", "V3"))
    with pytest.raises(InputError, match=r"spots\.h5ad: X contradicts itself"):
        read_spots(path)


def test_sizes_beyond_what_the_file_holds_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "spots.h5ad"
    spots().write_h5ad(path)
    edit(path, "obsm/spatial", None, shape=(2, 1 << 40), dtype="f8", chunks=(1, 1024))
    with pytest.raises(InputError, match="obsm/spatial has more values than the file can hold"):
        read_spots(path)
    spots().write_h5ad(path)
    with h5py.File(path, "r+") as file:
        file["X"].attrs["shape"] = [1 << 56, COUNTS.shape[1]]
    with pytest.raises(InputError, match="X has more values than the file can hold"):
        read_spots(path)


def test_attributes_on_which_hdf5_crashes_are_not_read(tmp_path: Path) -> None:
    path = tmp_path / "spots.h5ad"
    spots().write_h5ad(path)
    with h5py.File(path, "r+") as file:
        del file["varp"].attrs["encoding-type"]
        sequences = h5py.h5t.vlen_create(h5py.h5t.STD_I32LE)
        h5py.h5a.create(file["varp"].id, b"encoding-type", sequences, h5py.h5s.create(h5py.h5s.SCALAR))
    with pytest.raises(InputError, match="varp has an attribute of a kind"):
        read_spots(path)


@pytest.mark.parametrize("where", ["uns/again", "uns/deep"])
def test_groups_without_an_end_are_refused(where: str, tmp_path: Path) -> None:
    """Python's limit of recursion, met within h5py, would leave its lock locked for all other threads."""
    path = tmp_path / "spots.h5ad"
    spots().write_h5ad(path)
    with h5py.File(path, "r+") as file:
        if where == "uns/again":
            file[where] = file["uns"]
        else:
            file.create_group("/".join(["uns/deep", *("a" * 400)]))
    with pytest.raises(InputError, match="is in several places, or too deep"):
        read_spots(path)
    free = []
    thread = threading.Thread(
        target=lambda: free.append(h5py._objects.phil.acquire(False) and not h5py._objects.phil.release())
    )
    thread.start()
    thread.join()
    assert free == [True]


def test_zeros_among_strings_do_not_hang_hdf5(tmp_path: Path) -> None:
    path = tmp_path / "spots.h5ad"
    spots().write_h5ad(path)
    data = bytearray(path.read_bytes())
    heap = data.index(b"GCOL") + 16
    data[heap : heap + 64] = bytes(64)
    path.write_bytes(data)
    with pytest.raises(InputError, match="zeros in a heap of strings"):
        read_spots(path)


def test_heaps_within_heaps_take_no_longer_than_the_file_is_long(tmp_path: Path) -> None:
    unit = b"GCOL\1\0\0\0" + (1 << 40).to_bytes(8, "little") + bytes(8) + (32).to_bytes(8, "little")
    path = tmp_path / "heaps"
    path.write_bytes(unit * (1 << 17))  # 4 MB; to walk each to the end takes a day
    assert endless_strings(path)


def test_what_is_no_h5ad(tmp_path: Path) -> None:
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
