"""Writing HDF5 files on a full disk raises an error, while HDF5 alone would end the process."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

from prts.io.hdf5 import NewFile, write_h5ad

VALUES = np.random.default_rng(0).random((300, 200))


class SmallDisk:
    """Replaces `os.pwrite` by that of a small disk, which writes what still fits."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, room: int) -> None:
        self.room, self._write = room, os.pwrite
        monkeypatch.setattr(os, "pwrite", self)

    def __call__(self, file: int, data: memoryview, at: int) -> int:
        size = max(os.fstat(file).st_size, at + len(data))
        if size > self.room:
            data = data[: max(0, self.room - at)]
            if not len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return self._write(file, data, at)


def chunked(path: Path) -> None:
    with NewFile(path, rdcc_nbytes=100_000) as file:
        rows = file.create_dataset("rows", VALUES.shape, float, chunks=(16, 50), compression="lzf")
        grows = file.create_dataset("grows", (0,), float, chunks=(128,), maxshape=(None,))
        for start in range(0, len(VALUES), 10):
            rows[start : start + 10] = VALUES[start : start + 10]
            grows.resize((start + 10,))
            grows[start:] = VALUES[start : start + 10, 0]
        file.create_group("more").attrs["text"] = "é" * 1000
        np.testing.assert_array_equal(rows[:], VALUES)  # also what is kept in memory


def table() -> ad.AnnData:
    kind = pd.DataFrame({"kind": ["a", "b"] * 150}, index=[f"n{i}" for i in range(300)])
    return ad.AnnData(sp.csr_matrix(VALUES), obs=kind, uns={"prts": {"x": "1"}}, layers={"dense": VALUES})


def test_round_trip(tmp_path: Path) -> None:
    chunked(tmp_path / "a.h5")
    with h5py.File(tmp_path / "a.h5") as file:
        np.testing.assert_array_equal(file["rows"][:], VALUES)
        np.testing.assert_array_equal(file["grows"][:], VALUES[:, 0])
    write_h5ad(table(), tmp_path / "b.h5ad", compression="gzip")
    table().write_h5ad(tmp_path / "c.h5ad", compression="gzip")
    ours, theirs = (ad.read_h5ad(tmp_path / name) for name in ("b.h5ad", "c.h5ad"))
    assert (ours.X != theirs.X).nnz == 0 and ours.obs.equals(theirs.obs) and ours.uns == theirs.uns
    assert isinstance(ours.obs["kind"].dtype, pd.CategoricalDtype)
    with h5py.File(tmp_path / "b.h5ad") as ours_h5, h5py.File(tmp_path / "c.h5ad") as theirs_h5:
        assert ours_h5["layers/dense"].compression == theirs_h5["layers/dense"].compression == "gzip"
        assert sorted(ours_h5) == sorted(theirs_h5) and dict(ours_h5.attrs) == dict(theirs_h5.attrs)


@pytest.mark.parametrize("share", [0.0, 0.001, 0.1, 0.5, 0.9, 0.999])
@pytest.mark.parametrize("what", ["chunked", "h5ad"])
def test_a_full_disk_is_an_error_when_the_file_is_closed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str, share: float
) -> None:
    def write(path: Path) -> None:
        chunked(path) if what == "chunked" else write_h5ad(table(), path, compression="gzip")

    write(tmp_path / "whole")
    SmallDisk(monkeypatch, int(share * (tmp_path / "whole").stat().st_size))
    with pytest.raises(OSError, match="No space left on device") as caught:
        write(tmp_path / "cut")
    assert caught.value.errno == errno.ENOSPC
    monkeypatch.undo()
    write(tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == (tmp_path / "whole").read_bytes()


def test_a_long_write_can_stop_early(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    SmallDisk(monkeypatch, 5_000)
    file = NewFile(tmp_path / "a.h5")
    file.check()
    file["x"] = VALUES
    with pytest.raises(OSError, match="No space"):
        file.check()
    with pytest.raises(OSError, match="No space"):
        file.close()
    file.close()  # closing twice is harmless
