"""Compare predicted nuclei, summed inside spots, with measured spots."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import scipy.sparse as sp
from numpy.typing import NDArray
from scipy.spatial import cKDTree

from prts.data.gene_arrays import Matrix
from prts.errors import InputError
from prts.evaluation.expression import expression_per_gene
from prts.evaluation.matching import align_genes

if TYPE_CHECKING:
    from prts.io.spots import Spots

logger = logging.getLogger(__name__)


def spot_pcc(
    predicted: Matrix,
    xy_px: NDArray[np.float64],
    spots: Spots,
    genes: Sequence[str],
    gene_ids: Sequence[str] | None = None,
) -> tuple[float, pd.DataFrame]:
    """PCC over spots of log1p of the measured UMI and of the predicted nuclei summed inside each spot.

    Parameters
    ----------
    predicted
        Expected UMI of all nuclei of the section, (n_nuclei, n_genes).
    xy_px
        Their centers in full-resolution pixels, (n_nuclei, 2).
    spots
        Measured spots. A nucleus is in a spot if its center is no further than the radius from the spot's center. Spots without a
        nucleus are left out.
    genes, gene_ids
        Names and ids of the predicted genes; ids take precedence.

    Returns
    -------
    mean
        Mean PCC over genes that vary over the spots.
    per_gene
        `gene`, `mean_counts` (measured, per spot), `pcc` (NaN if constant over spots), `constant`; a gene that was not
        measured counts as constant. `attrs` holds `n_spots` and `n_empty_spots`.

    Raises
    ------
    InputError
        If no spot contains a nucleus, or none of the genes was measured.
    """
    measured, summed = sum_in_spots(predicted, xy_px, spots, genes, gene_ids)
    scores = expression_per_gene(measured, summed)
    per_gene = scores[["mean_counts", "pcc", "constant"]].copy()
    per_gene.insert(0, "gene", list(genes))
    per_gene.attrs = {"n_spots": measured.shape[0], "n_empty_spots": len(spots.xy) - measured.shape[0]}
    return float(per_gene["pcc"].mean()), per_gene


def sum_in_spots(
    predicted: Matrix,
    xy_px: NDArray[np.float64],
    spots: Spots,
    genes: Sequence[str],
    gene_ids: Sequence[str] | None = None,
) -> tuple[sp.csr_matrix, Matrix]:
    """Measured spots and the predicted nuclei summed inside each, both (n_spots, n_genes), for spots that hold a nucleus.

    Parameters and errors are as for `spot_pcc`.
    """
    pairs = cKDTree(spots.xy).sparse_distance_matrix(cKDTree(xy_px), spots.radius_px, output_type="coo_matrix")
    inside = sp.csr_matrix((np.ones(pairs.nnz), (pairs.row, pairs.col)), shape=pairs.shape)
    occupied = np.diff(inside.indptr) > 0
    if not occupied.any():
        raise InputError("spots: no predicted nucleus is inside a spot; give spots in pixels of the same image")
    logger.info("spots: %d contain nuclei, %d do not and are left out", occupied.sum(), (~occupied).sum())
    return align_genes(spots.counts, genes, gene_ids, "spots")[occupied], inside[occupied] @ predicted
