"""Bins as units: squares that are predicted like nuclei, with the rows of the matrix as their counts."""

from __future__ import annotations

from typing import TYPE_CHECKING

import geopandas as gpd
import numpy as np
import pandas as pd
import shapely
from numpy.typing import NDArray

from prts.errors import InputError
from prts.io.unit_names import BARCODE
from prts.platforms.base import counts_table
from prts.platforms.bin_counts import require_positions, sum_bins
from prts.platforms.bin_matrix import BinMatrix, bin_names
from prts.platforms.bin_positions import matrix_path, read_positions

if TYPE_CHECKING:
    from pathlib import Path

    from anndata import AnnData

# Share of a bin's side. Squares that are further off are others with the same names, such as a tiling of the image.
_SAME_PLACE = 0.25


def bin_um_of(nuclei: gpd.GeoDataFrame) -> int | None:
    """Side (um) of the bins that are the units of a table of nuclei; None if it holds nuclei."""
    ids = nuclei["cell_id"]
    first = BARCODE.fullmatch(str(ids.iloc[0])) if len(ids) else None
    if first is None or not ids.str.fullmatch(BARCODE).all():
        return None
    return int(first[1])


def squares(
    centers: NDArray[np.float64], affine: NDArray[np.float64], cell_id: NDArray[np.object_], mpp: float
) -> gpd.GeoDataFrame:
    """Bins as polygons in the table of nuclei.

    Parameters
    ----------
    centers
        Centers in full-resolution pixels, (n, 2).
    affine
        The lattice, (2, 3): its first two columns are the steps to the next column and to the next row of bins.
    cell_id
        Barcodes, (n,).
    mpp
        um per full-resolution pixel.

    Returns
    -------
    Columns as `prts.io.nuclei.make_nuclei` returns them.
    """
    corners = np.array([[-0.5, -0.5], [0.5, -0.5], [0.5, 0.5], [-0.5, 0.5]]) @ affine[:, :2].T
    shapes = shapely.polygons(centers[:, None] + corners)
    columns = {
        "cell_id": pd.Series(cell_id, dtype=object),
        "geometry": shapes,
        "area_um2": shapely.area(shapes) * mpp**2,
        "score": np.full(len(shapes), np.nan),
    }
    return gpd.GeoDataFrame(columns, geometry="geometry", crs=None)


def measured_squares(bins: Path, mpp: float) -> gpd.GeoDataFrame:
    """The bins that a matrix lists, as squares in its order.

    Parameters
    ----------
    bins
        A folder `square_NNNum`.
    mpp
        um per full-resolution pixel.

    Raises
    ------
    InputError
        If a file is damaged, or the matrix has bins without a position.
    """
    with BinMatrix(matrix_path(bins)) as matrix:
        row, col, bin_um = matrix.array_row, matrix.array_col, matrix.bin_um
        grid = read_positions(bins)
        require_positions(matrix, grid)
    return squares(grid.xy(row, col), grid.affine, bin_names(bin_um, row, col), mpp)


def count_squares(bins: Path, nuclei: gpd.GeoDataFrame) -> AnnData | None:
    """The rows of the matrix that are the units of a table, with no reassignment.

    Parameters
    ----------
    bins
        A folder `square_NNNum` with bins of the size of the units.
    nuclei
        Units with barcodes as `cell_id`, in any order; (n,).

    Returns
    -------
    Counts as in `prts.platforms.base.counts_table`, zeros for a bin that the matrix does not list; None if the squares are not at the
    positions of these bins.

    Raises
    ------
    InputError
        If a file is damaged, or none of the bins has a UMI.
    """
    grid = read_positions(bins)
    row, col = _places(nuclei)
    listed = grid.lists(row, col)
    if not listed.all():
        return None
    centers = shapely.get_coordinates(shapely.centroid(np.asarray(nuclei.geometry.array, dtype=object)))
    if np.abs(centers - grid.xy(row, col)).max() > _SAME_PLACE * min(grid.pitch_px):
        return None
    with BinMatrix(matrix_path(bins)) as matrix:
        require_positions(matrix, grid)
        unit = np.full((grid.n_rows, grid.n_cols), -1, np.int32)
        unit[row, col] = np.arange(len(nuclei), dtype=np.int32)
        owner = unit[matrix.array_row, matrix.array_col]
        X, umi = sum_bins(matrix, owner, len(nuclei))
        var = matrix.var()
    if umi["umi_assigned"] == 0:
        raise InputError(f"{matrix.path}: has no UMI in any of {len(nuclei)} bins; give a matrix with counts")
    report = {"n_bins": len(owner), "n_bins_assigned": int(np.count_nonzero(owner >= 0)), **umi}
    return counts_table(X, nuclei, var, report)


def _places(nuclei: gpd.GeoDataFrame) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Rows and columns of the array, from the digits of the barcodes."""
    text = nuclei["cell_id"].to_numpy(dtype=object).astype("S21").view(np.uint8).reshape(len(nuclei), -1)
    digits = text.astype(np.int64) - ord("0")
    place = 10 ** np.arange(4, -1, -1)
    return digits[:, 8:13] @ place, digits[:, 14:19] @ place
