"""Scale factors and positions of the bins of a Visium HD section, as Space Ranger writes them.

`bins` is always a folder `binned_outputs/square_NNNum` of Space Ranger's output; its name states the size of the bins. A folder with
another name is taken for the 2 um bins.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
from numpy.typing import NDArray

from prts.errors import InputError

BIN_SIZE_UM = 2.0
_FOLDER = re.compile(r"square_(\d{3})um")
SCALEFACTORS = "spatial/scalefactors_json.json"
POSITIONS = "spatial/tissue_positions.parquet"
MATRIX = "filtered_feature_bc_matrix.h5"
# What is read where one of the two is missing: tables of other versions, the matrix as text, and the bins outside tissue, too.
_POSITIONS_ELSE = ("spatial/tissue_positions.csv", "spatial/tissue_positions_list.csv")
_RAW = ("raw_feature_bc_matrix.h5", "raw_feature_bc_matrix")
_MATRIX_ELSE = ("filtered_feature_bc_matrix", *_RAW)
# Of tissue_positions_list.csv, which has no header.
_COLUMNS = ("barcode", "in_tissue", "array_row", "array_col", "pxl_row_in_fullres", "pxl_col_in_fullres")

# A capture area has 3,350 x 3,350 bins; positions are kept on the full grid, and anything larger is not an array of bins.
_MAX_GRID = 1 << 26
_BLOCK = 1 << 20


@dataclass(frozen=True)
class BinGrid:
    """Positions of a section's bins, in full-resolution pixels.

    Attributes
    ----------
    positions
        (n_rows, n_cols, 2): x (`pxl_col_in_fullres`) and y (`pxl_row_in_fullres`) of the center of each bin, NaN for
        bins that the file does not list.
    in_tissue
        (n_rows, n_cols): whether Space Ranger found tissue at the bin.
    affine
        (2, 3): [x, y] = affine @ [array_col, array_row, 1], least squares over all bins.
    residual_px
        Largest distance along an axis between a bin and its position by `affine`.
    """

    positions: NDArray[np.float64]
    in_tissue: NDArray[np.bool_]
    affine: NDArray[np.float64]
    residual_px: float

    @property
    def n_rows(self) -> int:
        """One more than the largest array_row."""
        return int(self.positions.shape[0])

    @property
    def n_cols(self) -> int:
        """One more than the largest array_col."""
        return int(self.positions.shape[1])

    @property
    def pitch_px(self) -> tuple[float, float]:
        """Distance (px) between neighboring bins along a row and along a column of the array."""
        along_row, along_column = np.hypot(self.affine[0], self.affine[1])[:2]
        return float(along_row), float(along_column)

    def xy(self, array_row: NDArray[Any], array_col: NDArray[Any]) -> NDArray[np.float64]:
        """Centers (n, 2) of bins of the grid; those of bins that the file does not list are computed with `affine`."""
        xy: NDArray[np.float64] = self.positions[array_row, array_col]
        absent = np.isnan(xy[:, 0])
        if absent.any():
            lattice = np.stack([array_col[absent], array_row[absent], np.ones(absent.sum())])
            xy[absent] = (self.affine @ lattice).T
        return xy

    def lists(self, array_row: NDArray[Any], array_col: NDArray[Any]) -> NDArray[np.bool_]:
        """Whether the file lists these bins, (n,)."""
        listed = (array_row >= 0) & (array_row < self.n_rows) & (array_col >= 0) & (array_col < self.n_cols)
        listed[listed] = ~np.isnan(self.positions[array_row[listed], array_col[listed], 0])
        return np.asarray(listed)

    def share_outside(self, width: int, height: int) -> float:
        """Share of the bins in tissue (of all bins, if none is) with centers outside an image of this size."""
        x, y = self.positions[..., 0], self.positions[..., 1]
        asked = self.in_tissue if self.in_tissue.any() else ~np.isnan(x)
        outside = (x < 0) | (x > width) | (y < 0) | (y > height)
        return float(outside[asked].mean())


def bins_folder(bin_um: int) -> str:
    """Name of the folder of bins of this size.

    Examples
    --------
    >>> bins_folder(8)
    'square_008um'
    """
    return f"square_{bin_um:03d}um"


def bin_size(bins: Path) -> int:
    """Side (um) of the bins in a folder, by its name; 2 if the name does not say."""
    named = _FOLDER.fullmatch(Path(bins).absolute().name)
    return int(named[1]) if named and int(named[1]) else int(BIN_SIZE_UM)


def bins_folders(parent: Path) -> dict[int, Path]:
    """The folders of bins in `binned_outputs` by the size of the bins (um), the smallest first."""
    found = (path for path in parent.glob("square_*um") if _FOLDER.fullmatch(path.name) and path.is_dir())
    return {bin_size(path): path for path in sorted(found)}


def bin_files(bins: Path) -> dict[str, Path]:
    """The matrix and the positions of a folder of bins, those of Space Ranger's usual names if there are several or none.

    The matrix may also be the folder `filtered_feature_bc_matrix`, or the raw one; the positions may also be CSV.
    """
    names = {"matrix": (MATRIX, *_MATRIX_ELSE), "positions": (POSITIONS, *_POSITIONS_ELSE)}
    paths = {key: [bins / name for name in each] for key, each in names.items()}
    return {key: next((path for path in each if path.exists()), each[0]) for key, each in paths.items()}


def matrix_path(bins: Path) -> Path:
    """The matrix of a folder of bins; see `bin_files`."""
    return _file(Path(bins), bin_files(Path(bins))["matrix"])


def positions_path(bins: Path) -> Path:
    """The table of positions of a folder of bins; see `bin_files`."""
    return _file(Path(bins), bin_files(Path(bins))["positions"])


def is_raw(matrix: Path) -> bool:
    """Whether a matrix also has the bins outside tissue, by its name."""
    return matrix.name in _RAW


def read_scalefactors(bins: Path) -> dict[str, float]:
    """Read `spatial/scalefactors_json.json`.

    Parameters
    ----------
    bins
        The folder `square_NNNum`, or `segmented_outputs`.

    Returns
    -------
    Its numbers by name: if given `bin_size_um`, `microns_per_pixel` (um per full-resolution pixel),
    `tissue_hires_scalef` and others.

    Raises
    ------
    InputError
        If the folder is another one, the file is missing or not a JSON object of positive numbers, or the bins are not of the size that the
        folder is named after.
    """
    path = _file(Path(bins), Path(bins) / SCALEFACTORS)
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: not valid JSON ({error}); give Space Ranger's own file") from error
    if not isinstance(content, dict):
        raise InputError(f"{path}: contains a {type(content).__name__}; give a JSON object of scale factors")
    factors = {
        key: _float(value)
        for key, value in content.items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    }
    for key in ("bin_size_um", "microns_per_pixel"):
        if key in content and not (key in factors and math.isfinite(factors[key]) and factors[key] > 0):
            raise InputError(f"{path}: {key} is {content[key]!r}; give a positive number")
    expected = bin_size(bins)
    # cells have none, and some files of bins lack it
    if factors.get("bin_size_um", expected) != expected:
        raise InputError(
            f"{path}: bins of {factors['bin_size_um']:g} um; give those of {expected} um, in {bins_folder(expected)}"
        )
    return factors


def read_positions(bins: Path) -> BinGrid:
    """Read `spatial/tissue_positions.parquet`, or the same table as CSV: its numbers only, 11 million bins in about 0.6 GB.

    Parameters
    ----------
    bins
        The folder `square_NNNum`.

    Raises
    ------
    InputError
        If the file is missing, not a table or lacks a column, a position is missing or given twice, or the bins do not
        span a plane.
    """
    path = positions_path(bins)
    read = _csv(path) if path.suffix == ".csv" else _parquet(path)
    row, col = _numbers(path, "array_row", read, integer=True), _numbers(path, "array_col", read, integer=True)
    if len(row) == 0:
        raise InputError(f"{path}: lists no bins; give Space Ranger's own file")
    if row.min() < 0 or col.min() < 0 or (int(row.max()) + 1) * (int(col.max()) + 1) > _MAX_GRID:
        raise InputError(
            f"{path}: array_row {row.min()}..{row.max()} and array_col {col.min()}..{col.max()} do not span an array of bins; "
            "give Space Ranger's own file"
        )
    shape = (int(row.max()) + 1, int(col.max()) + 1)
    place = row.astype(np.int64) * shape[1] + col
    in_tissue = np.zeros(shape, np.bool_)
    in_tissue.reshape(-1)[place] = _numbers(path, "in_tissue", read, integer=True) != 0
    positions = np.full((*shape, 2), np.nan)
    for axis, name in enumerate(("pxl_col_in_fullres", "pxl_row_in_fullres")):
        positions.reshape(-1, 2)[place, axis] = _numbers(path, name, read, integer=False)
    if np.isnan(positions[..., 0]).sum() != positions[..., 0].size - len(place):
        raise InputError(f"{path}: lists bins twice; give one position per (array_row, array_col)")
    affine = _fit(path, row, col, positions)
    return BinGrid(positions, in_tissue, affine, _residual(affine, positions))


def _file(bins: Path, path: Path) -> Path:
    """A file in the folder of bins; the error for a folder above names the right one."""
    if path.exists():
        return path
    folder = bins_folder(bin_size(bins))
    if not bins.is_dir():
        raise InputError(f"{bins}: no such folder; give the folder {folder} of Space Ranger's binned outputs")
    for parent in (bins, bins / "binned_outputs", bins / "outs" / "binned_outputs"):
        for size, inner in bins_folders(parent).items():
            raise InputError(f"{bins}: is not the folder of the {size} um bins; give {inner}")
    raise InputError(f"{path}: no such file; get it from Space Ranger's binned_outputs/{folder}")


def _float(value: float) -> float:
    try:
        return float(value)
    except OverflowError:  # JSON has integers of any length
        return math.inf


def _parquet(path: Path) -> Callable[[str], pa.Table]:
    """Reader of one column at a time, which saves memory."""
    try:
        with pq.ParquetFile(path) as file:
            n_rows = file.metadata.num_rows
            _ = file.schema_arrow  # names that are no text
    except (pa.ArrowException, OSError, ValueError) as error:
        raise InputError(f"{path}: not a readable Parquet file ({error}); get a complete copy") from error
    if n_rows > _MAX_GRID:
        raise InputError(f"{path}: lists {n_rows} bins, more than any array has; give Space Ranger's own file")

    def read(name: str) -> pa.Table:
        with pq.ParquetFile(path) as file:  # not read_table, which takes a folder called "a=b" for a column
            column = file.read(columns=[name])
        if column.num_columns == 1 and len(column.column(0)) != n_rows:
            raise InputError(
                f"{path}: column {name} has {len(column.column(0))} of {n_rows} values; get a complete copy"
            )
        return column

    return read


def _csv(path: Path) -> Callable[[str], pa.Table]:
    """Reader of the columns of a CSV file, with or without a header, as Space Ranger, R or a spreadsheet writes them."""
    try:
        with path.open(encoding="utf-8-sig") as file:
            first, second = file.readline(), file.readline()
        separator = max(",;\t", key=first.count)
        named = "array_row" in (name.strip('" \r\n') for name in first.split(separator))
        table = pa.csv.read_csv(
            path,
            pa.csv.ReadOptions(column_names=None if named else _COLUMNS),
            pa.csv.ParseOptions(delimiter=separator),
            pa.csv.ConvertOptions(decimal_point="," if separator != "," and "," in second else "."),
        )
    except (pa.ArrowException, OSError, ValueError) as error:
        raise InputError(f"{path}: not a readable CSV file ({error}); give Space Ranger's own file") from error
    return lambda name: table.select([i for i, column in enumerate(table.column_names) if column == name])


def _numbers(path: Path, name: str, read: Callable[[str], pa.Table], *, integer: bool) -> NDArray[Any]:
    """One numeric column without gaps."""
    try:
        column = read(name)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read ({error}); get a complete copy") from error
    if column.column_names.count(name) != 1:
        what = "two columns" if name in column.column_names else "no column"
        raise InputError(f"{path}: has {what} {name}; give Space Ranger's own file")
    values = column.column(name)
    kind = values.type
    is_number = pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind)
    numbers = values.to_numpy() if is_number and not values.null_count else np.empty(0)
    if integer and numbers.dtype.kind == "f" and len(numbers):  # tables that pandas saved again
        is_number = bool((np.abs(numbers) < _MAX_GRID).all() and (numbers % 1 == 0).all())
        numbers = numbers.astype(np.int64) if is_number else numbers
    if not is_number or values.null_count:
        what = "whole numbers" if integer else "numbers"
        raise InputError(f"{path}: column {name} must have {what} for all bins; give Space Ranger's own file")
    if numbers.dtype == bool:
        numbers = numbers.astype(np.int64)
    if numbers.dtype == np.uint64:  # with other types it would become float
        numbers = np.minimum(numbers, np.uint64(np.iinfo(np.int64).max)).astype(np.int64)
    if not integer and not np.isfinite(numbers).all():
        raise InputError(f"{path}: column {name} has values that are not finite; give a position for every bin")
    return numbers


def _fit(path: Path, row: NDArray[Any], col: NDArray[Any], positions: NDArray[np.float64]) -> NDArray[np.float64]:
    """Least squares by the normal equations, centered for precision and summed block by block to save memory."""
    centre = np.array([col.mean(), row.mean()])
    moments, mixed, sums = np.zeros((2, 2)), np.zeros((2, 2)), np.zeros(2)
    for start in range(0, len(row), _BLOCK):
        r, c = row[start : start + _BLOCK], col[start : start + _BLOCK]
        lattice = np.stack([c, r], axis=1) - centre
        xy = positions[r, c]
        moments += lattice.T @ lattice
        mixed += xy.T @ lattice
        sums += xy.sum(axis=0)
    if np.linalg.det(moments) <= 1e-9 * np.trace(moments) ** 2:
        raise InputError(f"{path}: fewer than three bins that are not on one line; give Space Ranger's own file")
    linear = mixed @ np.linalg.inv(moments)
    return np.column_stack([linear, sums / len(row) - linear @ centre])


def _residual(affine: NDArray[np.float64], positions: NDArray[np.float64]) -> float:
    columns = np.arange(positions.shape[1])
    largest = 0.0
    for r, xy in enumerate(positions):
        fitted = np.outer(columns, affine[:, 0]) + (affine[:, 1] * r + affine[:, 2])
        largest = max(largest, float(np.nanmax(np.abs(xy - fitted), initial=0.0)))
    return largest
