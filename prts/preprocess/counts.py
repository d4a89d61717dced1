"""Counts of nuclei: the 2 um bins whose centre lies in exactly one nucleus, summed per nucleus and gene, and quality control.

The definition is that of the 10x guide "Nuclei Segmentation and Custom Binning", which the paper follows.
"""

from __future__ import annotations

import logging
import math
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import shapely
from anndata import AnnData
from numpy.typing import NDArray
from scipy.sparse import csr_matrix

from prts.errors import InputError
from prts.geometry import lattice_points_within
from prts.platforms.bin_positions import BinGrid, BinMatrix, matrix_path, read_positions
from prts.progress import track

if TYPE_CHECKING:
    from pathlib import Path

    import geopandas as gpd

logger = logging.getLogger(__name__)

MITOCHONDRIAL_PREFIX = {"human": "MT-", "mouse": "mt-"}
_MAX_NNZ = 20_000_000
_NO_NUCLEUS, _SHARED = -1, -2


def count_nuclei(bins: Path, nuclei: gpd.GeoDataFrame, *, species: str, grid: BinGrid | None = None) -> AnnData:
    """Sum the 2 um bins of each nucleus, for all nuclei and all genes.

    A bin belongs to the nucleus whose polygon holds its centre (shapely's `within`: a centre on a boundary is in none); a
    bin in two or more nuclei is dropped; bins that the matrix does not list count for nothing (10x guide). The matrix is
    streamed: memory is bounded by one chunk of it and the non-zero sums.

    Parameters
    ----------
    bins
        Folder `square_002um` with `filtered_feature_bc_matrix.h5` and `spatial/`.
    nuclei
        Nuclei with `cell_id`, `geometry` in full-resolution pixels, `area_um2`; (n_nuclei,).
    species
        "human" or "mouse": which genes are mitochondrial (`MT-` or `mt-`).
    grid
        Where the bins are, in place of the folder's own positions.

    Returns
    -------
    (n_nuclei, n_genes) with `X` CSR int32 without explicit zeros; `obs_names` = cell_id; obs `area_um2`, `total_counts`,
    `n_genes_by_counts`, `pct_counts_mt` (percent; 0 without counts); `var` of the matrix; `obsm["spatial"]` centroids
    (n_nuclei, 2) in full-resolution pixels; where every bin and UMI went in `uns["prts"]`.

    Raises
    ------
    InputError
        If the species is unknown or not the matrix's, matrix and positions do not belong together, or no nucleus
        receives a UMI.
    """
    if species not in MITOCHONDRIAL_PREFIX:
        raise InputError(f"species: {species!r} is unknown; {' or '.join(MITOCHONDRIAL_PREFIX)} would be right")
    polygons = np.asarray(nuclei.geometry.array, dtype=object)
    path = matrix_path(bins)
    with BinMatrix(path) as matrix:
        var = matrix.var()
        mitochondrial = _mitochondrial(var, species, path)
        owner = nucleus_of_bins(polygons, read_positions(bins) if grid is None else grid, matrix)
        X, umi = sum_bins(matrix, owner, len(polygons))
    report = {
        "species": species,
        "n_nuclei": len(polygons),
        "n_bins": len(owner),
        "n_bins_assigned": int(np.count_nonzero(owner >= 0)),
        "n_bins_shared_dropped": int(np.count_nonzero(owner == _SHARED)),
        **umi,
    }
    if umi["umi_total"] == 0:
        raise InputError(f"{path}: holds no UMI at all; a matrix with counts is needed")
    if umi["umi_assigned"] == 0:
        raise InputError(
            f"{bins}: none of {umi['umi_total']} UMIs falls into one of {len(polygons)} nuclei; "
            "the bins must belong to the same image as the nuclei"
        )
    logger.info(
        "%d of %d bins lie in one nucleus, %d in several (dropped); %d of %d UMIs counted",
        *(report[key] for key in ("n_bins_assigned", "n_bins", "n_bins_shared_dropped", "umi_assigned", "umi_total")),
    )
    total = np.asarray(X.sum(axis=1), dtype=np.int64).ravel()
    in_mitochondria = np.asarray(X[:, mitochondrial].sum(axis=1), dtype=np.int64).ravel()
    obs = pd.DataFrame(
        {
            "area_um2": nuclei["area_um2"].to_numpy(dtype=np.float64),
            "total_counts": total,
            "n_genes_by_counts": np.diff(X.indptr).astype(np.int64),
            "pct_counts_mt": 100.0 * in_mitochondria / np.maximum(total, 1),
        },
        index=pd.Index(nuclei["cell_id"].to_numpy(dtype=object), name="cell_id"),
    )
    centroids = shapely.get_coordinates(shapely.centroid(polygons))
    return AnnData(X, obs=obs, var=var, obsm={"spatial": centroids}, uns={"prts": report})


def nucleus_of_bins(polygons: NDArray[Any], grid: BinGrid, matrix: BinMatrix) -> NDArray[np.int32]:
    """Which nucleus each bin of the matrix belongs to.

    Parameters
    ----------
    polygons
        Nuclei in full-resolution pixels, (n_nuclei,).
    grid
        Positions of the bins.
    matrix
        Whose bins are asked for.

    Returns
    -------
    (n_bins,) index of the nucleus, -1 for a bin in none, -2 for a bin in several.

    Raises
    ------
    InputError
        If the matrix has bins without a position.
    """
    row, col = matrix.array_row, matrix.array_col
    unlisted = int(np.count_nonzero(~grid.lists(row, col)))
    if unlisted:
        raise InputError(
            f"{matrix.path}: {unlisted} of {len(row)} bins are not in spatial/tissue_positions.parquet; matrix and positions "
            "must come from one run of Space Ranger"
        )
    # The residual is the largest along one axis.
    nucleus, at_row, at_col = lattice_points_within(
        polygons, grid.affine, grid.n_cols, grid.n_rows, xy=grid.xy, residual=1.5 * grid.residual_px
    )
    place = at_row * grid.n_cols + at_col
    owner = np.full(grid.n_rows * grid.n_cols, _NO_NUCLEUS, dtype=np.int32)
    owner[place] = nucleus
    # A nucleus claims a bin once, so whoever does not find itself the owner shares the bin with another.
    owner[place[owner[place] != nucleus]] = _SHARED
    of_bin: NDArray[np.int32] = owner[row.astype(np.int64) * grid.n_cols + col]
    return of_bin


def quality_control(
    counts: AnnData,
    *,
    mpp: float,
    min_umi: int = 20,
    max_area_um2: float = 150.0,
    max_area_px: float | None = None,
    max_pct_mt: float = 15.0,
) -> AnnData:
    """Keep nuclei with area < maximum, UMIs > minimum and mitochondrial share < maximum (paper; all three strict).

    Parameters
    ----------
    counts
        From `count_nuclei`, (n_nuclei, n_genes).
    mpp
        um/px of the full-resolution image, for `max_area_px`.
    min_umi
        Nuclei need more UMIs than this over all genes.
    max_area_um2
        The paper's 2,000 px^2 at its 0.2738 um/px.
    max_area_px
        The paper's own rule, in full-resolution px^2, in place of `max_area_um2`.
    max_pct_mt
        Percent of UMIs.

    Returns
    -------
    The nuclei kept, (n_kept, n_genes); thresholds and how many nuclei each rule alone would remove in
    `uns["prts"]["qc"]`.

    Raises
    ------
    InputError
        If no nucleus is left.
    """
    obs = counts.obs
    area_key, max_area = ("max_area_um2", max_area_um2) if max_area_px is None else ("max_area_px", max_area_px)
    area = obs["area_um2"].to_numpy() / (1.0 if max_area_px is None else mpp**2)
    failed = {
        "area": ~(area < max_area),
        "umi": ~(obs["total_counts"].to_numpy() > min_umi),
        "mt": ~(obs["pct_counts_mt"].to_numpy() < max_pct_mt),
    }
    keep = ~np.logical_or.reduce(list(failed.values()))
    removed = {f"n_failed_{rule}": int(fails.sum()) for rule, fails in failed.items()}
    reasons = (
        f"{removed['n_failed_area']} for {area_key}={max_area:g}, {removed['n_failed_umi']} for min_umi={min_umi}, "
        f"{removed['n_failed_mt']} for max_pct_mt={max_pct_mt:g} (a nucleus may fail several)"
    )
    if not keep.any():
        raise InputError(
            f"quality control keeps none of {len(keep)} nuclei: {reasons}; relax the rule that removes most"
        )
    logger.info("quality control keeps %d of %d nuclei; failed: %s", keep.sum(), len(keep), reasons)
    kept = counts[keep].copy()
    thresholds = {"min_umi": min_umi, area_key: max_area, "max_pct_mt": max_pct_mt}
    report = {"n_nuclei": len(keep), "n_kept": int(keep.sum()), **removed, **thresholds}
    kept.uns["prts"] = {**kept.uns.get("prts", {}), "qc": report}
    return kept


def _mitochondrial(var: pd.DataFrame, species: str, path: Path) -> NDArray[np.bool_]:
    """Which genes are mitochondrial; a matrix that has those of another species only is refused."""
    of = {name: var["symbol"].str.startswith(prefix).to_numpy() for name, prefix in MITOCHONDRIAL_PREFIX.items()}
    for other, genes in of.items():
        if genes.any() and not of[species].any():
            raise InputError(
                f"species: {species}, but {path} has no gene {MITOCHONDRIAL_PREFIX[species]}... and {genes.sum()} genes "
                f"{MITOCHONDRIAL_PREFIX[other]}...; {other} would be right"
            )
    if not of[species].any():
        logger.warning("%s has no mitochondrial gene (%s...): their share is 0", path, MITOCHONDRIAL_PREFIX[species])
    chosen: NDArray[np.bool_] = of[species]
    return chosen


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
        # Like a binary counter: only sums of similar size are added, so each non-zero is moved O(log chunks) times.
        while len(parts) > 1 and parts[-2].nnz <= 2 * parts[-1].nnz:
            last = parts.pop()
            parts[-1] = parts[-1] + last
    X = csr_matrix((n_nuclei, matrix.n_genes), dtype=np.int32)
    while parts:
        X = X + parts.pop()
    X.eliminate_zeros()
    return csr_matrix(X, dtype=np.int32), umi
