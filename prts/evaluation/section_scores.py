"""Score a prediction against the measured counts of one section."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import scipy.sparse as sp
from numpy.typing import ArrayLike, NDArray

from prts.data.gene_arrays import Matrix
from prts.evaluation.bootstrap import BlockSums, block_sums, mean_pcc_interval, random_blocks, spatial_blocks
from prts.evaluation.ceiling import ceiling_share, noise_ceiling
from prts.evaluation.detection import detection_scores
from prts.evaluation.expression import expression_per_gene
from prts.evaluation.settings import EvaluationSettings
from prts.evaluation.spatial import map_ssim, moran_agreement, morans_i, neighbor_weights

_SSIM_GENES = "hvg50"
_COLUMNS = ("gene", "mean_counts", "pcc", "spearman", "rmse", "skill", "auroc", "auprc", "ceiling", "constant")
_MEANS = ("pcc", "spearman", "rmse", "skill", "deviance_explained", "lognorm_pcc", "ceiling", "ceiling_raw")


@dataclass(frozen=True)
class PredictedCounts:
    """A prediction to score.

    Parameters
    ----------
    umi
        Expected UMI, dense or sparse, (n_nuclei, n_genes).
    genes
        Names of the genes.
    prob
        P(expressed), dense or sparse, (n_nuclei, n_genes). None uses 1 - exp(-umi), as for Poisson counts.
    threshold
        A gene is called expressed where prob >= threshold; one number or (n_genes,).
    """

    umi: Matrix
    genes: Sequence[str]
    prob: Matrix | None = None
    threshold: ArrayLike = 0.5


@dataclass(frozen=True)
class SectionScores:
    """Scores of a prediction of one section.

    Attributes
    ----------
    summary
        Metrics by their names in metrics.json without the prefix; NaN if undefined. `n_genes` counts all genes of the panel,
        `n_constant_genes` those that are constant in the section and left out of every mean.
    per_gene
        One row per gene: the columns of per_gene.csv (`gene, mean_counts, pcc, spearman, rmse, skill, auroc, auprc, ceiling, constant`),
        then the other per-gene metrics.
    sums
        Block sums for paired differences (`prts.evaluation.bootstrap.mean_pcc_difference`); None without coordinates.
    """

    summary: dict[str, float]
    per_gene: pd.DataFrame
    sums: BlockSums | None


def score_section(
    measured: sp.csr_matrix,
    predicted: PredictedCounts,
    *,
    xy_um: NDArray[np.float64] | None = None,
    gene_sets: Mapping[str, NDArray[np.intp]] | None = None,
    settings: EvaluationSettings | None = None,
    seed: int = 0,
) -> SectionScores:
    """Compute every metric of one section.

    Parameters
    ----------
    measured
        UMI counts, integers, (n_nuclei, n_genes).
    predicted
        The prediction for these nuclei.
    xy_um
        Centers of the nuclei in um, (n_nuclei, 2), for blocks and maps. Without them there is no interval of the PCC, no Moran's I
        and no SSIM, and the ceiling treats nuclei as independent.
    gene_sets
        Positions of genes by the name of a set (`hvg50`): each gets a `<name>_pcc_mean`. SSIM is the mean over the set `hvg50`.
    settings
        Of the intervals.
    seed
        Seed of the resampling.

    Raises
    ------
    ValueError
        If shapes differ, there is no nucleus, or a value is negative or not finite.
    """
    settings = settings or EvaluationSettings()
    n_nuclei, n_genes = measured.shape
    if n_nuclei == 0 or len(predicted.genes) != n_genes:
        raise ValueError(f"nothing to evaluate: {n_nuclei} nuclei x {n_genes} genes with {len(predicted.genes)} names")
    expression = expression_per_gene(measured, predicted.umi)
    scored = ~expression["constant"].to_numpy()
    prob = _poisson_prob(predicted.umi) if predicted.prob is None else predicted.prob
    detection, summary = detection_scores(measured, prob, predicted.threshold, scored)
    blocks, block_um = random_blocks(n_nuclei, seed=seed), None
    if xy_um is not None:
        blocks, block_um = spatial_blocks(xy_um, settings.block_um)
    ceiling = noise_ceiling(measured, blocks, n_replicates=settings.bootstrap, seed=seed)

    names = pd.Series(list(predicted.genes), name="gene", dtype=object)
    per_gene = pd.concat([names, expression, detection, ceiling], axis=1)
    per_gene.loc[~scored, [*detection.columns, *ceiling.columns]] = np.nan
    per_gene = per_gene[[*_COLUMNS, *(column for column in per_gene.columns if column not in _COLUMNS)]]

    summary |= {f"{name}_mean": float(per_gene[name].mean()) for name in _MEANS}
    summary["pcc_median"] = float(per_gene["pcc"].median())
    summary["ceiling_share"] = ceiling_share(per_gene["pcc"].to_numpy(), per_gene["ceiling"].fillna(0).to_numpy())
    summary |= {"n_cells": n_nuclei, "n_genes": n_genes, "n_constant_genes": int((~scored).sum())}
    for name, members in (gene_sets or {}).items():
        summary[f"{name}_pcc_mean"] = float(per_gene["pcc"].iloc[members].mean())
    if xy_um is None or block_um is None:
        return SectionScores(summary, per_gene, None)
    per_gene = per_gene.join(_morans(measured, predicted.umi, xy_um))
    summary["moran_agreement"], summary["moran_difference"] = moran_agreement(
        per_gene["moran"].to_numpy(), per_gene["moran_predicted"].to_numpy()
    )
    if gene_sets and _SSIM_GENES in gene_sets:
        members = gene_sets[_SSIM_GENES]
        ssim = map_ssim(measured[:, members], predicted.umi[:, members], xy_um)
        summary["ssim_mean"] = float(pd.Series(ssim).mean())
    sums = block_sums(measured, predicted.umi, blocks)
    low, high = mean_pcc_interval(sums, n_replicates=settings.bootstrap, seed=seed)
    summary |= {"pcc_mean_low": low, "pcc_mean_high": high, "block_um": block_um, "n_blocks": len(sums.n)}
    return SectionScores(summary, per_gene, sums)


def _morans(measured: sp.csr_matrix, predicted: Matrix, xy_um: NDArray[np.float64]) -> pd.DataFrame:
    weights = neighbor_weights(xy_um)
    return pd.DataFrame({"moran": morans_i(measured, weights), "moran_predicted": morans_i(predicted, weights)})


def _poisson_prob(predicted: Matrix) -> Matrix:
    if sp.issparse(predicted):
        prob = predicted.copy()
        prob.data = -np.expm1(-prob.data)
        return prob
    return -np.expm1(-predicted)
