"""Score one prediction against one section: nuclei against their counts, and nuclei summed in spots against measured spots."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import scipy.sparse as sp
from numpy.typing import ArrayLike, NDArray
from scipy.spatial import cKDTree

from prts.errors import InputError
from prts.evaluation.arrays import Matrix
from prts.evaluation.bootstrap import BLOCK_UM, BlockSums, block_sums, mean_pcc_interval, random_blocks, spatial_blocks
from prts.evaluation.ceiling import ceiling_share, noise_ceiling
from prts.evaluation.detection import detection_scores
from prts.evaluation.expression import expression_per_gene
from prts.evaluation.spatial import map_ssim, moran_agreement, morans_i, neighbour_weights

if TYPE_CHECKING:
    import anndata as ad

    from prts.io.spots import Spots

logger = logging.getLogger(__name__)

_SSIM_GENES = "hvg50"
_SAME_NUCLEUS_UM = 1.0
_NEAREST_UM = 3.0


@dataclass(frozen=True)
class Evaluation:
    """How good a prediction of one section is.

    Attributes
    ----------
    summary
        Figures by the names of metrics.json without their prefix; NaN where one is not defined. `n_genes` counts all genes of the
        panel, `n_constant_genes` those of them that are constant in the section and left out of every mean.
    per_gene
        One row a gene: the columns of per_gene.csv (`gene, mean_counts, pcc, spearman, rmse, skill, auroc, auprc, ceiling,
        constant`), then the rest that `prts.metrics` knows of a gene.
    sums
        Block sums for paired differences (`prts.evaluation.bootstrap.mean_pcc_difference`); None without coordinates.
    """

    summary: dict[str, float]
    per_gene: pd.DataFrame
    sums: BlockSums | None


@dataclass(frozen=True)
class Matched:
    """The nuclei and genes that a prediction and a section's measured counts share.

    Attributes
    ----------
    measured
        UMI counts, CSR (n_nuclei, n_genes); a gene that the section has not measured is a column of zeros.
    predicted, prob
        Expected UMI and P(expressed), (n_nuclei, n_genes); `prob` is None if the prediction has none.
    genes
        Names of the predicted genes.
    cell_id
        Of the section's nuclei, (n_nuclei,).
    xy_px
        Centres of the section's nuclei in full-resolution pixels, (n_nuclei, 2).
    by
        "cell_id" or "centroid".
    """

    measured: sp.csr_matrix
    predicted: Matrix
    prob: Matrix | None
    genes: tuple[str, ...]
    cell_id: NDArray[np.object_]
    xy_px: NDArray[np.float64]
    by: str


def evaluate_section(
    measured: sp.csr_matrix,
    predicted: Matrix,
    prob: Matrix | None = None,
    *,
    genes: Sequence[str],
    threshold: ArrayLike = 0.5,
    xy_um: NDArray[np.float64] | None = None,
    gene_sets: Mapping[str, NDArray[np.intp]] | None = None,
    block_um: float = BLOCK_UM,
    n_replicates: int = 1000,
    seed: int = 0,
) -> Evaluation:
    """All figures of one section.

    Parameters
    ----------
    measured
        UMI counts, integers, (n_nuclei, n_genes).
    predicted
        Expected UMI, dense or sparse, (n_nuclei, n_genes).
    prob
        P(expressed), dense or sparse, (n_nuclei, n_genes). None takes 1 - exp(-predicted), that of a Poisson count.
    genes
        Their names.
    threshold
        A gene is called expressed where prob >= threshold; one number or (n_genes,).
    xy_um
        Centres of the nuclei in um, (n_nuclei, 2), for blocks and maps. Without them there is no interval of the PCC, no Moran's I
        and no SSIM, and the ceiling takes nuclei as independent.
    gene_sets
        Positions of genes by the name of a set (`hvg50`): each gets a `<name>_pcc_mean`. SSIM is the mean over the set `hvg50`.
    block_um
        Side of the spatial blocks in um (`prts.evaluation.bootstrap.spatial_blocks`).
    n_replicates
        Resamples of the blocks for intervals.
    seed
        Seed of the resampling.

    Raises
    ------
    InputError
        If `block_um` or `n_replicates` gives no interval (`check_intervals`).
    ValueError
        If shapes differ, there is no nucleus, or a value is negative or not finite.
    """
    check_intervals(block_um, n_replicates)
    n_nuclei, n_genes = measured.shape
    if n_nuclei == 0 or len(genes) != n_genes:
        raise ValueError(
            f"{n_nuclei} nuclei x {n_genes} genes with {len(genes)} names: nothing to evaluate, or names do not fit"
        )
    expression = expression_per_gene(measured, predicted)
    scored = ~expression["constant"].to_numpy()
    detection, summary = detection_scores(
        measured, _poisson_prob(predicted) if prob is None else prob, threshold, scored
    )
    blocks, used_um = random_blocks(n_nuclei, seed=seed), None
    if xy_um is not None:
        blocks, used_um = spatial_blocks(xy_um, block_um)
    ceiling = noise_ceiling(measured, blocks, n_replicates=n_replicates, seed=seed)

    per_gene = pd.concat([pd.Series(list(genes), name="gene", dtype=object), expression, detection, ceiling], axis=1)
    per_gene.loc[~scored, [*detection.columns, *ceiling.columns]] = np.nan
    first = ["gene", "mean_counts", "pcc", "spearman", "rmse", "skill", "auroc", "auprc", "ceiling", "constant"]
    per_gene = per_gene[first + [c for c in per_gene.columns if c not in first]]

    summary |= {f"{name}_mean": float(per_gene[name].mean()) for name in _MEANS}
    summary["pcc_median"] = float(per_gene["pcc"].median())
    summary["ceiling_share"] = ceiling_share(per_gene["pcc"].to_numpy(), per_gene["ceiling"].fillna(0).to_numpy())
    summary |= {"n_cells": n_nuclei, "n_genes": n_genes, "n_constant_genes": int((~scored).sum())}
    for name, members in (gene_sets or {}).items():
        summary[f"{name}_pcc_mean"] = float(per_gene["pcc"].iloc[members].mean())
    sums = None
    if xy_um is not None and used_um is not None:
        per_gene = per_gene.join(_spatial(measured, predicted, xy_um))
        summary["moran_agreement"], summary["moran_difference"] = moran_agreement(
            per_gene["moran"].to_numpy(), per_gene["moran_predicted"].to_numpy()
        )
        if gene_sets and _SSIM_GENES in gene_sets:
            members = gene_sets[_SSIM_GENES]
            ssim = map_ssim(measured[:, members], predicted[:, members], xy_um)
            summary["ssim_mean"] = float(pd.Series(ssim).mean())
        sums = block_sums(measured, predicted, blocks)
        low, high = mean_pcc_interval(sums, n_replicates=n_replicates, seed=seed)
        summary |= {"pcc_mean_low": low, "pcc_mean_high": high, "block_um": used_um, "n_blocks": len(sums.n)}
    return Evaluation(summary, per_gene, sums)


def check_intervals(block_um: float, n_replicates: int) -> None:
    """Refuse settings of which no interval comes.

    Parameters
    ----------
    block_um
        Side of the spatial blocks in um, `evaluation.block_um`.
    n_replicates
        Resamples of the blocks, `evaluation.bootstrap`.

    Raises
    ------
    InputError
        If the side is not a positive number, or the resamples are not a whole number of at least 2.
    """
    if not isinstance(block_um, int | float) or not 0 < block_um < math.inf:
        raise InputError(f"evaluation.block_um: {block_um} is no side of a block; give um above 0, e.g. {BLOCK_UM:g}")
    if not isinstance(n_replicates, int) or n_replicates < 2:
        raise InputError(f"evaluation.bootstrap: {n_replicates} resamples give no interval; give 2 or more, e.g. 1000")


def spot_pcc(
    predicted: Matrix,
    xy_px: NDArray[np.float64],
    spots: Spots,
    genes: Sequence[str],
    gene_ids: Sequence[str] | None = None,
) -> tuple[float, pd.DataFrame]:
    """Agreement with measured spots: predicted nuclei summed inside each spot, PCC over spots of log1p of the sums.

    Parameters
    ----------
    predicted
        Expected UMI of ALL nuclei of the section, (n_nuclei, n_genes).
    xy_px
        Their centres in full-resolution pixels, (n_nuclei, 2).
    spots
        Measured spots. A nucleus is in a spot if its centre is no further than the radius from the spot's centre. Spots without a
        nucleus are left out.
    genes, gene_ids
        Names and ids of the predicted genes; ids are looked for first.

    Returns
    -------
    mean
        Mean PCC over genes that vary over the spots.
    per_gene
        `gene`, `mean_counts` (measured, a spot), `pcc` (NaN where constant over spots), `constant`; a gene that the spots have not
        measured counts as constant. `attrs` holds `n_spots` and `n_empty_spots`.

    Raises
    ------
    InputError
        If no spot holds a nucleus or none of the genes was measured.
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

    Parameters, what lies in a spot, and what is raised are those of `spot_pcc`.
    """
    pairs = cKDTree(spots.xy).sparse_distance_matrix(cKDTree(xy_px), spots.radius_px, output_type="coo_matrix")
    inside = sp.csr_matrix((np.ones(pairs.nnz), (pairs.row, pairs.col)), shape=pairs.shape)
    occupied = np.diff(inside.indptr) > 0
    if not occupied.any():
        raise InputError(
            "spots: no predicted nucleus lies in any spot; spots and nuclei must be in pixels of the same image"
        )
    logger.info("spots: %d hold nuclei, %d do not and are left out", occupied.sum(), (~occupied).sum())
    return align_genes(spots.counts, genes, gene_ids, "spots")[occupied], inside[occupied] @ predicted


def match(prediction: ad.AnnData, counts: ad.AnnData, *, mpp: float) -> Matched:
    """Find the nuclei and genes of a prediction among a section's measured counts.

    Nuclei are matched by `cell_id` if at least half of the smaller side's ids are known to the other and their centres agree (median
    distance under 1 um); otherwise two nuclei match if each is the other's nearest and they are no more than 3 um apart. Genes are
    matched by `gene_id`, then by name or symbol.

    Parameters
    ----------
    prediction
        As `prts.io.prediction.read_prediction` gives it.
    counts
        Measured nuclei x all genes with `obsm["spatial"]` in full-resolution pixels.
    mpp
        um a pixel of the section's image.

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
            f"prediction: none of its {len(there)} nuclei is one of the section's {len(here)}, by cell_id or within {_NEAREST_UM:g} um; "
            "it must have been made on this section's image"
        )
    logger.info("%d of the section's %d nuclei matched by %s", len(found), len(here), by)
    genes = tuple(str(g) for g in prediction.var_names)
    gene_ids = prediction.var["gene_id"].astype(str).tolist() if "gene_id" in prediction.var else None
    prob = prediction.layers.get("prob")
    return Matched(
        measured=align_genes(counts, genes, gene_ids, "section")[found],
        predicted=prediction.X[rows],
        prob=None if prob is None else prob[rows],
        genes=genes,
        cell_id=counts.obs_names.to_numpy(dtype=object)[found],
        xy_px=here[found],
        by=by,
    )


_MEANS = ("pcc", "spearman", "rmse", "skill", "deviance_explained", "lognorm_pcc", "ceiling", "ceiling_raw")


def _spatial(measured: sp.csr_matrix, predicted: Matrix, xy_um: NDArray[np.float64]) -> pd.DataFrame:
    weights = neighbour_weights(xy_um)
    return pd.DataFrame({"moran": morans_i(measured, weights), "moran_predicted": morans_i(predicted, weights)})


def _poisson_prob(predicted: Matrix) -> Matrix:
    if sp.issparse(predicted):
        prob = predicted.copy()
        prob.data = -np.expm1(-prob.data)
        return prob
    return -np.expm1(-predicted)


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
    """The wanted genes of a counts table in their order, zeros where it has not measured one."""
    column = np.full(len(genes), -1)
    searches: list[tuple[Sequence[str] | None, Any]] = [
        (gene_ids, counts.var.get("gene_id")),
        (genes, counts.var_names),
    ]
    searches.append((genes, counts.var.get("symbol")))
    for wanted, names in searches:
        if wanted is None or names is None:
            continue
        index = pd.Index(np.asarray(names, dtype=object))
        unique = np.flatnonzero(~index.duplicated(keep=False))  # a symbol of two genes names neither
        hit = index[unique].get_indexer(pd.Index(list(wanted), dtype=object))
        take = (column < 0) & (hit >= 0)
        column[take] = unique[hit[take]]
    known = np.flatnonzero(column >= 0)
    if len(known) == 0:
        raise InputError(
            f"{what}: none of the {len(genes)} predicted genes ({genes[0]}, ...) was measured; is it another species or genome?"
        )
    if len(known) < len(genes):
        logger.warning("%s: %d of %d predicted genes were not measured", what, len(genes) - len(known), len(genes))
    pick = sp.csr_matrix(
        (np.ones(len(known), dtype=np.int32), (column[known], known)), shape=(counts.n_vars, len(genes))
    )
    return sp.csr_matrix(sp.csr_matrix(counts.X) @ pick)
