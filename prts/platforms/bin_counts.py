"""Counts per nucleus on Visium HD: the 2 um bins whose center is within exactly one nucleus, summed per nucleus and gene.

The definition is that of the 10x guide "Nuclei Segmentation and Custom Binning", which the paper follows.
"""

from __future__ import annotations

import logging
import math
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_matrix

from prts.errors import InputError
from prts.geometry import lattice_points_within
from prts.platforms.base import counts_table
from prts.platforms.bin_matrix import BinMatrix
from prts.platforms.bin_positions import BinGrid, is_raw, matrix_path, read_positions
from prts.progress import track

if TYPE_CHECKING:
    from pathlib import Path

    import geopandas as gpd
    from anndata import AnnData

logger = logging.getLogger(__name__)

_MAX_NNZ = 20_000_000
_NO_NUCLEUS, _SHARED = -1, -2


def count_bins(bins: Path, nuclei: gpd.GeoDataFrame, grid: BinGrid | None = None) -> AnnData:
    """Sum the 2 um bins of each nucleus, for all nuclei and all genes.

    A bin belongs to the nucleus whose polygon contains its center (shapely's `within`: a center on a boundary is in none). Bins in
    two or more nuclei are dropped; bins that the matrix does not list have no counts. The matrix is streamed: memory is bounded by
    one chunk of it and the non-zero sums.

    Parameters
    ----------
    bins
        Folder `square_002um` with `filtered_feature_bc_matrix.h5` and `spatial/`.
    nuclei
        Nuclei with `cell_id`, `geometry` in full-resolution pixels, `area_um2`; (n_nuclei,).
    grid
        Positions of the bins, instead of the folder's own.

    Returns
    -------
    Counts as in `prts.platforms.base.counts_table`; `uns["prts"]` says how many bins and UMIs were assigned, shared and outside.

    Raises
    ------
    InputError
        If matrix and positions do not belong together, or no nucleus receives a UMI.
    """
    polygons = np.asarray(nuclei.geometry.array, dtype=object)
    path = matrix_path(bins)
    with BinMatrix(path) as matrix:
        owner = nucleus_of_bins(polygons, read_positions(bins) if grid is None else grid, matrix)
        X, umi = sum_bins(matrix, owner, len(polygons))
        var = matrix.var()
    report = {
        "n_bins": len(owner),
        "n_bins_assigned": int(np.count_nonzero(owner >= 0)),
        "n_bins_shared_dropped": int(np.count_nonzero(owner == _SHARED)),
        **umi,
    }
    if umi["umi_total"] == 0:
        raise InputError(f"{path}: contains no UMI; give a matrix with counts")
    if umi["umi_assigned"] == 0:
        raise InputError(
            f"{bins}: none of {umi['umi_total']} UMIs falls into one of {len(polygons)} nuclei; "
            "give bins and nuclei of the same image"
        )
    logger.info(
        "%d of %d bins are within one nucleus, %d in several (dropped); %d of %d UMIs counted",
        *(report[key] for key in ("n_bins_assigned", "n_bins", "n_bins_shared_dropped", "umi_assigned", "umi_total")),
    )
    return counts_table(X, nuclei, var, report)


def nucleus_of_bins(polygons: NDArray[Any], grid: BinGrid, matrix: BinMatrix) -> NDArray[np.int32]:
    """Assign each bin of the matrix to a nucleus.

    Parameters
    ----------
    polygons
        Nuclei in full-resolution pixels, (n_nuclei,).
    grid
        Positions of the bins.
    matrix
        The matrix, for its bins.

    Returns
    -------
    (n_bins,) index of the nucleus, -1 for a bin in none, -2 for a bin in several.

    Raises
    ------
    InputError
        If the matrix has bins without a position.
    """
    row, col = matrix.array_row, matrix.array_col
    require_positions(matrix, grid)
    # the residual is the largest along one axis
    nucleus, at_row, at_col = lattice_points_within(
        polygons, grid.affine, grid.n_cols, grid.n_rows, xy=grid.xy, residual=1.5 * grid.residual_px
    )
    place = at_row * grid.n_cols + at_col
    owner = np.full(grid.n_rows * grid.n_cols, _NO_NUCLEUS, dtype=np.int32)
    owner[place] = nucleus
    # a nucleus claims a bin once, so a nucleus that is not the owner shares the bin with another
    owner[place[owner[place] != nucleus]] = _SHARED
    of_bin: NDArray[np.int32] = owner[row.astype(np.int64) * grid.n_cols + col]
    return np.where(in_tissue(matrix, grid), of_bin, _NO_NUCLEUS).astype(np.int32)


def in_tissue(matrix: BinMatrix, grid: BinGrid) -> NDArray[np.bool_]:
    """Whether the filtered matrix has these bins, (n_bins,): all of it, and those in tissue of a raw one."""
    if not is_raw(matrix.path) or not grid.in_tissue.any():
        return np.ones(matrix.n_bins, np.bool_)
    return np.asarray(grid.in_tissue[matrix.array_row, matrix.array_col])


def require_positions(matrix: BinMatrix, grid: BinGrid) -> None:
    """Refuse a matrix that has bins without a position.

    Raises
    ------
    InputError
        If it has some.
    """
    unlisted = int(np.count_nonzero(~grid.lists(matrix.array_row, matrix.array_col)))
    if unlisted:
        raise InputError(
            f"{matrix.path}: {unlisted} of {matrix.n_bins} bins have no position in the folder's spatial/; give matrix and "
            "positions of one run of Space Ranger"
        )


def sum_bins(matrix: BinMatrix, owner: NDArray[np.int32], n_nuclei: int) -> tuple[csr_matrix, dict[str, int]]:
    """Sum the bins of each nucleus.

    Parameters
    ----------
    matrix
        The bins, streamed.
    owner
        From `nucleus_of_bins`, (n_bins,).
    n_nuclei
        Number of nuclei.

    Returns
    -------
    (n_nuclei, n_genes) CSR int32, sorted and without explicit zeros; and how many UMIs there were, were assigned, shared, outside.
    """
    parts: list[csr_matrix] = []
    umi = dict.fromkeys(("umi_total", "umi_assigned", "umi_shared_dropped", "umi_outside"), 0)
    chunks = track(matrix.chunks(_MAX_NNZ), "counts", total=math.ceil(matrix.nnz / _MAX_NNZ))
    for start, stop, chunk in chunks:
        nucleus = owner[start:stop]
        bin_umi = np.asarray(chunk.sum(axis=1), dtype=np.int64).ravel()
        umi["umi_total"] += int(bin_umi.sum())
        umi["umi_assigned"] += int(bin_umi[nucleus >= 0].sum())
        umi["umi_shared_dropped"] += int(bin_umi[nucleus == _SHARED].sum())
        umi["umi_outside"] += int(bin_umi[nucleus == _NO_NUCLEUS].sum())
        bins = np.flatnonzero(nucleus >= 0)
        ones = np.ones(len(bins), dtype=np.int32)
        selector = csr_matrix((ones, (nucleus[bins], bins)), shape=(n_nuclei, stop - start))
        part = selector @ chunk
        part.sort_indices()
        parts.append(part)
        # like a binary counter: only sums of similar size are added, so each non-zero is moved O(log chunks) times
        while len(parts) > 1 and parts[-2].nnz <= 2 * parts[-1].nnz:
            last = parts.pop()
            parts[-1] = parts[-1] + last
    X = csr_matrix((n_nuclei, matrix.n_genes), dtype=np.int32)
    while parts:
        X = X + parts.pop()
    X.eliminate_zeros()
    return csr_matrix(X, dtype=np.int32), umi
