"""Counts per nucleus on Visium HD: the 2 um bins of each nucleus, summed per nucleus and gene.

By default these are the bins whose center is within exactly one nucleus. This definition is that of the 10x guide "Nuclei Segmentation and
Custom Binning", which the paper follows; `prts.platforms.bin_owners.CountSettings` has others.
"""

from __future__ import annotations

import logging
import math
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_matrix

from prts.errors import InputError
from prts.platforms.array_effects import ArrayEffects, fit_array_effects, umi_of_bins
from prts.platforms.barcode_mappings import write_barcode_mappings
from prts.platforms.base import counts_table
from prts.platforms.bin_matrix import BinMatrix
from prts.platforms.bin_owners import NO_UNIT, SHARED, CountSettings, assign_bins
from prts.platforms.bin_positions import BinGrid, matrix_path, read_positions
from prts.platforms.bin_split import BinSplit
from prts.progress import track

if TYPE_CHECKING:
    from pathlib import Path

    import geopandas as gpd
    from anndata import AnnData

logger = logging.getLogger(__name__)

_MAX_NNZ = 20_000_000


def count_bins(
    bins: Path, nuclei: gpd.GeoDataFrame, grid: BinGrid | None = None, settings: CountSettings | None = None
) -> AnnData:
    """Sum the 2 um bins of each nucleus, for all nuclei and all genes.

    Bins are assigned by `prts.platforms.bin_owners.assign_bins`; bins that the matrix does not list have no counts. The matrix is streamed:
    memory is bounded by one chunk of it and the non-zero sums.

    Parameters
    ----------
    bins
        Folder `square_002um` with `filtered_feature_bc_matrix.h5` and `spatial/`.
    nuclei
        Nuclei with `cell_id`, `geometry` in full-resolution pixels, `area_um2`; (n_nuclei,).
    grid
        Positions of the bins, instead of the folder's own.
    settings
        How far nuclei grow, and what happens to bins in several; the paper's rule if None.

    Returns
    -------
    Counts as in `prts.platforms.base.counts_table`; `uns["prts"]` says how many bins and UMIs were assigned, shared and outside.

    Raises
    ------
    InputError
        If matrix and positions do not belong together, or no nucleus receives a UMI.
    """
    settings = CountSettings() if settings is None else settings
    polygons = np.asarray(nuclei.geometry.array, dtype=object)
    path = matrix_path(bins)
    with BinMatrix(path) as matrix:
        grid = read_positions(bins) if grid is None else grid
        require_positions(matrix, grid)
        owners = assign_bins(polygons, grid, settings)
        owner = owners.unit[matrix.array_row, matrix.array_col]
        split = None if owners.shared is None else BinSplit(owners.shared, matrix, grid.n_cols, settings.seed)
        X, umi = sum_bins(matrix, owner, len(polygons), split)
        in_nucleus = owners.in_nucleus[matrix.array_row, matrix.array_col]
        var = matrix.var()
    report: dict[str, Any] = {
        "n_bins": len(owner),
        "n_bins_assigned": int(np.count_nonzero(owner >= 0)),
        "n_bins_shared_dropped": int(np.count_nonzero(owner == SHARED)),
        **umi,
    }
    if settings.settings():
        report |= {
            "n_bins_outside_nucleus": report["n_bins_assigned"] - int(np.count_nonzero(in_nucleus)),
            "n_bins_divided": 0 if split is None else split.n_bins,
            "counting": settings.settings(),
        }
    if umi["umi_total"] == 0:
        raise InputError(f"{path}: contains no UMI; give a matrix with counts")
    if umi["umi_assigned"] == 0:
        raise InputError(
            f"{bins}: none of {umi['umi_total']} UMIs falls into one of {len(polygons)} nuclei; "
            "give bins and nuclei of the same image"
        )
    logger.info(
        "%d of %d bins belong to one nucleus, %d in several are dropped%s; %d of %d UMIs counted",
        report["n_bins_assigned"] - (0 if split is None else split.n_bins),
        *(report[key] for key in ("n_bins", "n_bins_shared_dropped")),
        f", {split.n_bins} are divided" if split is not None else "",
        *(report[key] for key in ("umi_assigned", "umi_total")),
    )
    return counts_table(X, nuclei, var, report)


def write_bin_table(
    path: Path,
    bins: Path,
    nuclei: gpd.GeoDataFrame,
    grid: BinGrid | None = None,
    settings: CountSettings | None = None,
) -> None:
    """Write the bins that `count_bins` counts, with the nucleus of each, in the columns of Space Ranger's `barcode_mappings.parquet`.

    Parameters
    ----------
    path
        The file.
    bins, nuclei, grid, settings
        As for `count_bins`. With `shared="split"`, a bin has one row per nucleus and the column `share`.
    """
    settings = CountSettings() if settings is None else settings
    polygons = np.asarray(nuclei.geometry.array, dtype=object)
    grid = read_positions(bins) if grid is None else grid
    owners = assign_bins(polygons, grid, settings)
    with BinMatrix(matrix_path(bins)) as matrix:
        require_positions(matrix, grid)
        place = np.sort(matrix.array_row.astype(np.int64) * grid.n_cols + matrix.array_col)
    unit = owners.unit.ravel()[place]
    place, unit = place[unit >= 0], unit[unit >= 0].astype(np.int64)
    share = None
    if owners.shared is not None:
        own = ~np.isin(place, owners.shared.place)
        listed = np.isin(owners.shared.place, place)
        place = np.concatenate([place[own], owners.shared.place[listed]])
        order = np.argsort(place, kind="stable")
        unit = np.concatenate([unit[own], owners.shared.unit[listed]])[order]
        share = np.concatenate([np.ones(own.sum()), owners.shared.share[listed]])[order]
        place = place[order]
    row, col = np.divmod(place, grid.n_cols)
    ids = nuclei["cell_id"].to_numpy(dtype=object)
    write_barcode_mappings(path, row, col, unit, ids, owners.in_nucleus.ravel()[place], share)


def exposure_of_nuclei(
    bins: Path, nuclei: gpd.GeoDataFrame, grid: BinGrid | None = None, settings: CountSettings | None = None
) -> tuple[NDArray[np.float64], ArrayEffects]:
    """Mean effect of rows and columns of the array over the bins that `count_bins` counts.

    Parameters
    ----------
    bins, nuclei, grid, settings
        As for `count_bins`.

    Returns
    -------
    exposure
        (n_nuclei,); all 1 if the effects do not explain bins that they were not fitted on.
    effects
        The effects of rows and columns.
    """
    polygons = np.asarray(nuclei.geometry.array, dtype=object)
    grid = read_positions(bins) if grid is None else grid
    with BinMatrix(matrix_path(bins)) as matrix:
        require_positions(matrix, grid)
        umi, listed = umi_of_bins(matrix, (grid.n_rows, grid.n_cols))
    effects = fit_array_effects(umi, listed)
    said = "stripe index of rows and columns %.4f, %.4f with their effects as exposure%s"
    logger.info(
        said,
        effects.stripes_before,
        effects.stripes_after,
        "" if effects.helps else ": no improvement, left off",
    )
    if not effects.helps:
        return np.ones(len(polygons)), effects
    unit = np.where(listed, assign_bins(polygons, grid, settings).unit, NO_UNIT)
    return effects.exposure(unit, len(polygons)), effects


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
    require_positions(matrix, grid)
    of_bin: NDArray[np.int32] = assign_bins(polygons, grid).unit[matrix.array_row, matrix.array_col]
    return of_bin


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


def sum_bins(
    matrix: BinMatrix, owner: NDArray[np.int32], n_nuclei: int, split: BinSplit | None = None
) -> tuple[csr_matrix, dict[str, int]]:
    """Sum the bins of each nucleus.

    Parameters
    ----------
    matrix
        The bins, streamed.
    owner
        From `nucleus_of_bins`, (n_bins,).
    n_nuclei
        Number of nuclei.
    split
        Divides the bins that several nuclei share.

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
        umi["umi_shared_dropped"] += int(bin_umi[nucleus == SHARED].sum())
        umi["umi_outside"] += int(bin_umi[nucleus == NO_UNIT].sum())
        bins = np.flatnonzero(nucleus >= 0)
        divided = None
        if split is not None:
            rows, divided = split(start, chunk, n_nuclei)
            bins = np.setdiff1d(bins, rows, assume_unique=True)
        ones = np.ones(len(bins), dtype=np.int32)
        selector = csr_matrix((ones, (nucleus[bins], bins)), shape=(n_nuclei, stop - start))
        part = selector @ chunk if divided is None else selector @ chunk + divided
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
