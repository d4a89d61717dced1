"""Match the nuclei and genes of a prediction with a section's measured counts."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray
from scipy.spatial import cKDTree

from prts.data.gene_arrays import Matrix
from prts.errors import InputError
from prts.io.unit_names import unit_name
from prts.preprocess.gene_columns import find_genes, selector

if TYPE_CHECKING:
    import anndata as ad

logger = logging.getLogger(__name__)

_SAME_NUCLEUS_UM = 1.0
_NEAREST_UM = 3.0


@dataclass(frozen=True)
class MatchedNuclei:
    """Nuclei and genes that a prediction and a section's measured counts share.

    Attributes
    ----------
    measured
        UMI counts, CSR (n_nuclei, n_genes); zeros for a gene that the section did not measure.
    predicted, prob
        Expected UMI and P(expressed), (n_nuclei, n_genes); `prob` is None if the prediction has none.
    genes
        Names of the predicted genes.
    cell_id
        Ids of the section's nuclei, (n_nuclei,).
    xy_px
        Centers of the section's nuclei in full-resolution pixels, (n_nuclei, 2).
    by
        How nuclei were matched: "cell_id" or "centroid".
    """

    measured: sp.csr_matrix
    predicted: Matrix
    prob: Matrix | None
    genes: tuple[str, ...]
    cell_id: NDArray[np.object_]
    xy_px: NDArray[np.float64]
    by: str


def match(prediction: ad.AnnData, counts: ad.AnnData, *, mpp: float) -> MatchedNuclei:
    """Match the nuclei and genes of a prediction with a section's measured counts.

    Nuclei are matched by `cell_id` if at least half of the smaller side's ids are known to the other and their centers agree (median
    distance under 1 um); otherwise two nuclei match if each is the other's nearest and they are no more than 3 um apart. Genes are
    matched by `gene_id`, then by name or symbol.

    Parameters
    ----------
    prediction
        Result of `prts.io.prediction.read_prediction`.
    counts
        Measured nuclei x all genes with `obsm["spatial"]` in full-resolution pixels.
    mpp
        um/px of the section's image.

    Raises
    ------
    InputError
        If no nucleus or no gene matches.
    """
    there, here = np.asarray(prediction.obsm["spatial"], float), np.asarray(counts.obsm["spatial"], float)
    rows = prediction.obs_names.get_indexer(counts.obs_names)
    found = np.flatnonzero(rows >= 0)
    by = "cell_id"
    agrees = 2 * len(found) >= min(len(there), len(here)) and len(found) > 0
    if not agrees or np.median(np.linalg.norm(there[rows[found]] - here[found], axis=1)) * mpp >= _SAME_NUCLEUS_UM:
        by = "centroid"
        found, rows = mutual_nearest(here, there, _NEAREST_UM / mpp)
    else:
        rows = rows[found]
    if len(found) == 0:
        raise InputError(
            f"prediction: none of its {len(there)} {unit_name(prediction.obs_names)} matches one of the section's {len(here)} by cell_id "
            f"or within {_NEAREST_UM:g} um; give the prediction of this section's image"
        )
    units = unit_name(counts.obs_names)
    logger.info("%d of the section's %d %s matched by %s", len(found), len(here), units, by)
    genes = tuple(str(g) for g in prediction.var_names)
    gene_ids = prediction.var["gene_id"].astype(str).tolist() if "gene_id" in prediction.var else None
    prob = prediction.layers.get("prob")
    return MatchedNuclei(
        measured=align_genes(counts, genes, gene_ids, "section")[found],
        predicted=prediction.X[rows],
        prob=None if prob is None else prob[rows],
        genes=genes,
        cell_id=counts.obs_names.to_numpy(dtype=object)[found],
        xy_px=here[found],
        by=by,
    )


def mutual_nearest(
    here: NDArray[np.float64], there: NDArray[np.float64], radius: float
) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Rows of the pairs of points, (n_here, 2) and (n_there, 2), that are each other's nearest within a radius."""
    if len(here) == 0 or len(there) == 0:
        return np.zeros(0, dtype=np.intp), np.zeros(0, dtype=np.intp)
    distance, forth = cKDTree(there).query(here)
    _, back = cKDTree(here).query(there)
    mutual = np.flatnonzero((distance <= radius) & (back[forth] == np.arange(len(here))))
    return mutual, forth[mutual]


def align_genes(counts: ad.AnnData, genes: Sequence[str], gene_ids: Sequence[str] | None, what: str) -> sp.csr_matrix:
    """Columns of a counts table for these genes, in their order; zeros for a gene that it did not measure."""
    column = find_genes(counts.var, gene_ids, genes)
    absent = int(np.count_nonzero(column < 0))
    if absent == len(genes):
        raise InputError(
            f"{what}: none of the {len(genes)} predicted genes ({genes[0]}, ...) was measured; check species and genome"
        )
    if absent:
        logger.warning("%s: %d of %d predicted genes were not measured", what, absent, len(genes))
    return sp.csr_matrix(sp.csr_matrix(counts.X) @ selector(column, counts.n_vars, np.int32))
