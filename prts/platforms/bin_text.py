"""The matrix of bins and genes as text: Space Ranger's folder of `matrix.mtx.gz`, `features.tsv.gz` and `barcodes.tsv.gz`.

It is converted once per process to the HDF5 file that `BinMatrix` streams, in the folder for temporary files.
"""

from __future__ import annotations

import functools
import gzip
import logging
import tempfile
import zlib
from itertools import repeat
from pathlib import Path
from typing import TextIO

import h5py
import numpy as np
import pandas as pd

from prts.errors import InputError, full_disk
from prts.io.hdf5 import NewFile
from prts.progress import track

logger = logging.getLogger(__name__)

_HEAD = ["%%MatrixMarket", "matrix", "coordinate"]
_ENTRIES = 5_000_000
_OWN = "give Space Ranger's own folder, or filtered_feature_bc_matrix.h5"
_kept: list[tempfile.TemporaryDirectory[str]] = []  # until the process ends


def as_hdf5(folder: Path) -> Path:
    """The same matrix as a temporary file in 10x's HDF5 layout.

    Parameters
    ----------
    folder
        With `matrix.mtx`, `barcodes.tsv` and `features.tsv` (or `genes.tsv`), each also gzipped.

    Raises
    ------
    InputError
        If a file is missing or damaged, or they do not belong together.
    """
    matrix, barcodes = _member(folder, "matrix.mtx"), _member(folder, "barcodes.tsv")
    stamp = matrix.stat()
    return _converted(folder, matrix, barcodes, (stamp.st_size, stamp.st_mtime_ns))


@functools.cache
def _converted(folder: Path, matrix: Path, barcodes: Path, _version: tuple[int, int]) -> Path:
    logger.info("%s: converted to HDF5, which takes a while", folder)
    place = tempfile.TemporaryDirectory(prefix="prts-")
    path = Path(place.name) / "matrix.h5"
    try:
        features = _table(_member(folder, "features.tsv", "genes.tsv"))
        names = _table(barcodes)[0].to_numpy()
        with NewFile(path) as out:
            _write_features(out, features)
            out["matrix/barcodes"] = np.char.encode(names.astype(str), "utf-8")
            out["matrix/shape"] = np.array([len(features), len(names)])
            _write_entries(out, matrix, len(features), len(names))
    except (OSError, EOFError, zlib.error, ValueError, KeyError) as error:
        if (full := full_disk(error)) is not None:
            raise InputError(f"{place.name}: {full}") from error
        raise InputError(f"{folder}: cannot be read as a matrix ({error}); {_OWN}") from error
    _kept.append(place)
    return path


def _member(folder: Path, *names: str) -> Path:
    for name in names:
        for path in (folder / f"{name}.gz", folder / name):
            if path.is_file():
                return path
    raise InputError(f"{folder}: has no {names[0]}.gz; {_OWN}")


def _open(path: Path) -> TextIO:
    with path.open("rb") as file:
        packed = file.read(2) == b"\x1f\x8b"  # not by the name: browsers unpack what they download
    return gzip.open(path, "rt", encoding="utf-8") if packed else path.open(encoding="utf-8")


def _table(path: Path) -> pd.DataFrame:
    with _open(path) as text:
        table: pd.DataFrame = pd.read_csv(text, sep="\t", header=None, dtype=str, keep_default_na=False, quoting=3)
    for name in table:  # as R writes them
        table[name] = table[name].str.replace(r'^"(.*)"$', r"\1", regex=True)
    return table


def _write_features(out: h5py.File, features: pd.DataFrame) -> None:
    kinds = features[2] if 2 in features else repeat("Gene Expression", len(features))
    columns = {
        "id": features[0],
        "name": features[features.columns[min(1, features.shape[1] - 1)]],
        "feature_type": kinds,
    }
    for name, values in {**columns, "genome": repeat("", len(features))}.items():
        out[f"matrix/features/{name}"] = np.char.encode(np.array(list(values), dtype=str), "utf-8")


def _write_entries(out: h5py.File, path: Path, n_features: int, n_bins: int) -> None:
    """The entries in the order of the bins, which is that of Space Ranger; those of other programs are sorted in memory."""
    with _open(path) as text:
        head = text.readline().split()
        line = text.readline()
        while line.startswith("%"):
            line = text.readline()
        rows, columns, nnz = map(int, line.split()) if head[:3] == _HEAD else (0, 0, 0)
        if head[:3] != _HEAD or (nnz and (head[3:4] == ["pattern"] or head[4:] != ["general"])):
            raise ValueError(f"{path.name} begins with {' '.join(head)!r}")
        if (rows, columns) != (n_features, n_bins):
            raise ValueError(
                f"{path.name} has {rows} x {columns} values for {n_features} features and {n_bins} barcodes"
            )
        data, indices, bins = (
            out.create_dataset(name, (nnz,), dtype, maxshape=(None,), chunks=(1 << 18,))
            for name, dtype in (("matrix/data", np.float64), ("matrix/indices", np.int64), ("bins", np.int64))
        )
        start, last, is_sorted = 0, 0, True
        per_bin = np.zeros(n_bins, np.int64)
        chunks = pd.read_csv(text, sep=r"\s+", header=None, names=[0, 1, 2], chunksize=_ENTRIES, dtype=np.float64)
        for chunk in track(chunks if nnz else [], path.name, total=-(-nnz // _ENTRIES)):
            feature, column = (chunk[i].to_numpy().astype(np.int64) - 1 for i in (0, 1))
            if column.min() < 0 or column.max() >= n_bins or start + len(chunk) > nnz:
                raise ValueError(f"{path.name} has entries beyond its {n_bins} bins or {nnz} values")
            part = slice(start, start + len(chunk))
            data[part], indices[part], bins[part] = chunk[2].to_numpy(), feature, column
            per_bin += np.bincount(column, minlength=n_bins)
            is_sorted &= bool((np.diff(column) >= 0).all() and column[0] >= last)
            start, last = part.stop, int(column[-1])
    if start != nnz:
        raise ValueError(f"{path.name} ends after {start} of {nnz} values")
    if not is_sorted:
        order = np.argsort(bins[:], kind="stable")
        data[:], indices[:] = data[:][order], indices[:][order]
    del out["bins"]
    out["matrix/indptr"] = np.r_[0, np.cumsum(per_bin)]
