"""Measured Visium spots of a section, to compare with the sums of predicted nuclei."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_matrix

from prts.errors import InputError
from prts.io.h5_checks import check_matrix, read_checked_h5ad


@dataclass(frozen=True)
class Spots:
    """Spots of a section.

    Attributes
    ----------
    counts
        (n_spots, n_genes) measured UMI counts, CSR int32.
    xy
        (n_spots, 2) centers in full-resolution pixels, x right, y down.
    radius_px
        Radius of a spot in full-resolution pixels.
    mpp
        um/px of the image that the positions refer to, if the file states it (`uns["mpp"]`).
    """

    counts: ad.AnnData
    xy: NDArray[np.float64]
    radius_px: float
    mpp: float | None = None


def read_spots(path: Path | str) -> Spots:
    """Read `spots.h5ad`: `X` counts, `obsm["spatial"]` px, `uns["spot_radius_px"]`.

    Raises
    ------
    InputError
        If the file is missing or not an h5ad, lacks one of these, or contains invalid counts or positions.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path}: no such file; give an .h5ad of measured spots")
    counts = read_checked_h5ad(path)
    if counts.X is None or counts.n_obs == 0 or counts.n_vars == 0:
        raise InputError(f"{path}: contains no counts; X must be spots x genes")
    if not (counts.obs_names.is_unique and counts.var_names.is_unique):
        raise InputError(f"{path}: duplicate names of spots or genes; make them unique")
    check_matrix(path, "X", counts.X)
    counts.X = _integers(path, counts.X)
    xy = np.asarray(counts.obsm.get("spatial", np.empty(0)))
    if xy.shape != (counts.n_obs, 2) or xy.dtype.kind not in "iuf" or not np.isfinite(xy).all():
        raise InputError(
            f"{path}: obsm['spatial'] is missing or invalid; give x and y of every spot in full-resolution pixels"
        )
    radius = _number(counts.uns.get("spot_radius_px"))
    if not (np.isfinite(radius) and radius > 0):
        raise InputError(
            f"{path}: uns['spot_radius_px'] is missing or invalid; give the radius of a spot in full-resolution pixels"
        )
    mpp = _number(counts.uns["mpp"]) if "mpp" in counts.uns else None
    return Spots(counts, xy.astype(np.float64), radius, mpp)


def _integers(path: Path, X: Any) -> csr_matrix:
    matrix = csr_matrix(X)
    with np.errstate(invalid="ignore"):
        counts = matrix.astype(np.int32)
        is_count = matrix.data.dtype.kind in "iufb" and (matrix.data >= 0).all() and (counts.data == matrix.data).all()
    if not is_count:
        raise InputError(
            f"{path}: X contains negative or fractional values; give raw UMI counts, not normalized values"
        )
    return counts


def _number(value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError):
        return float("nan")
