"""Measured Visium spots of a section, to compare with the sums of predicted nuclei."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.sparse import csr_matrix

from prts.errors import InputError
from prts.io.h5_checks import check_matrix, read_checked_h5ad
from prts.io.prediction import plain_text

logger = logging.getLogger(__name__)

# Ids of genes, as prts, scanpy, CELLxGENE and spatialdata-io call their column, and symbols of genes that are named by ids.
_GENE_IDS = ("gene_id", "gene_ids", "ensembl_id", "feature_id")
_SYMBOLS = ("symbol", "gene_symbols", "gene_symbol", "gene_name", "feature_name", "gene_short_name")


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
    """Read measured spots as AnnData: `X` or `layers["counts"]` counts, `obsm["spatial"]` px.

    The radius is `uns["spot_radius_px"]`, else half of the `spot_diameter_fullres` that `scanpy.read_visium` keeps in
    `uns["spatial"]`. Genes may be named by symbol or by id, with the other in a column of `var`; the second gene with a name gets a
    suffix.

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
    counts.X = _counts(path, counts)
    counts.obs, counts.var = plain_text(counts.obs), _genes(plain_text(counts.var))
    for what, names in (("spots", counts.obs_names), ("genes", counts.var_names)):
        if not names.is_unique:
            logger.warning(
                "%s: %d %s share their name with another; they get a suffix", path, names.duplicated().sum(), what
            )
    counts.obs_names_make_unique()
    counts.var_names_make_unique()
    xy = _positions(counts.obsm.get("spatial"), counts.n_obs)
    if xy is None:
        raise InputError(
            f"{path}: obsm['spatial'] is missing or invalid; give x and y of every spot in full-resolution pixels"
        )
    mpp = _number(counts.uns["mpp"]) if "mpp" in counts.uns else None
    return Spots(counts, xy, _radius(path, counts.uns), mpp)


def _counts(path: Path, spots: ad.AnnData) -> csr_matrix:
    """`X`, or the layer in which scanpy's tutorials keep the counts of a normalized table."""
    check_matrix(path, "X", spots.X)
    found = _integers(spots.X)
    if found is None and "counts" in spots.layers:
        check_matrix(path, "layers['counts']", spots.layers["counts"])
        found = _integers(spots.layers["counts"])
    if found is None:
        raise InputError(
            f"{path}: X contains negative or fractional values; give raw UMI counts, not normalized values, in X or layers['counts']"
        )
    return found


def _genes(var: pd.DataFrame) -> pd.DataFrame:
    """Genes with their ids in the column `gene_id` and their symbols in `symbol`, where the file has them."""
    named_by_id = len(var) > 0 and var.index.str.fullmatch(r"(ENS[A-Z]*G|FBgn|WBGene)\d+(\.\d+)?").mean() > 0.5
    for name, known in (("gene_id", _GENE_IDS), ("symbol", _SYMBOLS)):
        given = next((var[column] for column in known if column in var), None)
        if given is not None:
            var[name] = given.astype(object)
        elif name == "gene_id" and named_by_id:
            var[name] = var.index.to_numpy(dtype=object)
    if "gene_id" in var:
        var["gene_id"] = var["gene_id"].astype(str).str.replace(r"^(ENS[A-Z]*G\d+)\.\d+$", r"\1", regex=True)
    return var


def _positions(stored: Any, n: int) -> NDArray[np.float64] | None:
    """Positions (n, 2); None if they are not valid. Old versions of scanpy store numbers as text."""
    try:
        xy = np.asarray(np.empty(0) if stored is None else stored).astype(np.float64)
    except (TypeError, ValueError):
        return None
    return xy if xy.shape == (n, 2) and np.isfinite(xy).all() else None


def _radius(path: Path, uns: Mapping[str, Any]) -> float:
    if "spot_radius_px" in uns:
        found = {_number(uns["spot_radius_px"])}
    else:
        libraries = uns.get("spatial")
        factors = [
            library["scalefactors"]
            for library in (libraries.values() if isinstance(libraries, Mapping) else ())
            if isinstance(library, Mapping) and isinstance(library.get("scalefactors"), Mapping)
        ]
        found = {_number(each.get("spot_diameter_fullres")) / 2 for each in factors}
    if len(found) > 1:
        raise InputError(
            f"{path}: uns['spatial'] has {len(found)} libraries with spots of different sizes; keep the one of this section"
        )
    radius = found.pop() if found else float("nan")
    if not (np.isfinite(radius) and radius > 0):
        raise InputError(
            f"{path}: uns['spot_radius_px'] is missing or invalid, and so is spot_diameter_fullres in uns['spatial']; give the radius of "
            "a spot in full-resolution pixels"
        )
    return radius


def _integers(X: Any) -> csr_matrix | None:
    """Counts as CSR int32; None if they are not counts."""
    matrix = csr_matrix(X)
    with np.errstate(invalid="ignore"):
        counts = matrix.astype(np.int32)
        is_count = matrix.data.dtype.kind in "iufb" and (matrix.data >= 0).all() and (counts.data == matrix.data).all()
    return counts if is_count else None


def _number(value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError):
        return float("nan")
