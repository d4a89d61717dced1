"""How close predicted expression is to measured expression, gene by gene over the nuclei of one section.

Everything is on log1p(UMI), as in the paper, except the Poisson deviance, which is on UMI. A gene whose measured counts are constant
scores NaN (it is counted, and left out of means); a gene whose prediction is constant, such as one that the model cannot predict,
scores 0.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import scipy.sparse as sp
from numpy.typing import NDArray
from scipy.special import xlogy

from prts.data.gene_arrays import GeneRows, Matrix, average_ranks, gene_slices, is_constant

# A predicted rate of 0 has infinite deviance if a UMI was measured, so rates are at least one UMI per thousand nuclei.
RATE_FLOOR = 1e-3


def pearson_per_gene(measured: Matrix, predicted: Matrix) -> NDArray[np.float64]:
    """Pearson correlation of log1p(UMI) over nuclei for each gene.

    Parameters
    ----------
    measured
        UMI counts, sparse or dense, (n_nuclei, n_genes).
    predicted
        Expected UMI, sparse or dense, (n_nuclei, n_genes).

    Returns
    -------
    (n_genes,); NaN if the measured gene is constant, 0 if the prediction is.
    """
    truth, guess = _pair(measured, predicted)
    pcc = np.empty(truth.shape[1])
    for genes in gene_slices(*truth.shape):
        pcc[genes] = _pearson(_log1p(truth[genes]), _log1p(guess[genes]))
    return pcc


def expression_per_gene(measured: Matrix, predicted: Matrix) -> pd.DataFrame:
    """Compute all expression scores of each gene.

    Parameters
    ----------
    measured
        UMI counts, sparse or dense, (n_nuclei, n_genes).
    predicted
        Expected UMI, sparse or dense, (n_nuclei, n_genes).

    Returns
    -------
    One row per gene, with

    * `mean_counts`: mean measured UMI per nucleus;
    * `pcc`, `spearman` (average ranks), `rmse`: log1p(predicted) against log1p(measured);
    * `skill`: 1 - MSE / MSE of the best constant, the section's own mean of log1p(UMI), so 0 is the best score of a constant;
    * `deviance_explained`: 1 - D(predicted) / D(section's mean UMI) with the Poisson deviance D, rates below 0.001 taken as 0.001;
    * `lognorm_pcc`: PCC after both sides were scaled, nucleus by nucleus, to the same total over these genes (the median measured
      total of nuclei that have any), then log1p;
    * `constant`: the measured counts are constant; the scores are then NaN.
    """
    truth, guess = _pair(measured, predicted)
    n_nuclei, n_genes = truth.shape
    truth_total, guess_total = _totals(measured), _totals(predicted)
    target = float(np.median(truth_total[truth_total > 0])) if (truth_total > 0).any() else 1.0
    truth_factor, guess_factor = _size_factors(truth_total, target), _size_factors(guess_total, target)

    scores = {name: np.full(n_genes, np.nan) for name in _COLUMNS}
    constant = np.zeros(n_genes, dtype=bool)
    for genes in gene_slices(n_nuclei, n_genes):
        x_umi, y_umi = truth[genes].astype(np.float64), guess[genes]
        x, y = np.log1p(x_umi), _log1p(y_umi)
        constant[genes] = is_constant(x)
        scores["mean_counts"][genes] = x_umi.mean(axis=1)
        scores["pcc"][genes] = _pearson(x, y)
        scores["spearman"][genes] = _pearson(average_ranks(x_umi), average_ranks(y_umi))
        mse = np.square(x - y).mean(axis=1)
        scores["rmse"][genes] = np.sqrt(mse)
        scores["skill"][genes] = 1 - _ratio(mse, x.var(axis=1))
        y_umi = y_umi.astype(np.float64)
        scores["deviance_explained"][genes] = _deviance_explained(x_umi, y_umi)
        scores["lognorm_pcc"][genes] = _pearson(np.log1p(x_umi * truth_factor), np.log1p(y_umi * guess_factor))
    frame = pd.DataFrame(scores)
    frame.loc[constant, [name for name in _COLUMNS if name != "mean_counts"]] = np.nan
    frame["constant"] = constant
    return frame


_COLUMNS = ("mean_counts", "pcc", "spearman", "rmse", "skill", "deviance_explained", "lognorm_pcc")


def _pair(measured: Matrix, predicted: Matrix) -> tuple[GeneRows, GeneRows]:
    if measured.shape != predicted.shape:
        raise ValueError(
            f"measured is {measured.shape}, predicted {predicted.shape}: they must be the same nuclei and genes"
        )
    return GeneRows(measured, "measured"), GeneRows(predicted, "predicted")


def _log1p(rows: NDArray[Any]) -> NDArray[np.float64]:
    logged: NDArray[np.float64] = np.log1p(rows, dtype=np.float64)
    return logged


def _pearson(x: NDArray[np.float64], y: NDArray[np.float64]) -> NDArray[np.float64]:
    """Correlation of rows; `x` is measured."""
    x_constant, y_constant = is_constant(x), is_constant(y)
    x = x - x.mean(axis=1, keepdims=True)
    y = y - y.mean(axis=1, keepdims=True)
    product = np.einsum("gn,gn->g", x, y)
    pcc = _ratio(product, np.sqrt(np.einsum("gn,gn->g", x, x) * np.einsum("gn,gn->g", y, y)))
    return np.where(x_constant, np.nan, np.where(y_constant, 0.0, pcc))


def _deviance_explained(counts: NDArray[np.float64], rate: NDArray[np.float64]) -> NDArray[np.float64]:
    rate = np.maximum(rate, RATE_FLOOR)
    saturated = xlogy(counts, counts).sum(axis=1)
    total, mean = counts.sum(axis=1), counts.mean(axis=1)
    deviance = saturated - np.einsum("gn,gn->g", counts, np.log(rate)) - total + rate.sum(axis=1)
    return 1 - _ratio(deviance, saturated - xlogy(total, mean))


def _totals(matrix: Matrix) -> NDArray[np.float64]:
    """Sum of each nucleus in float64 without a float64 copy of the matrix."""
    sums = matrix @ np.ones(matrix.shape[1]) if sp.issparse(matrix) else matrix.sum(axis=1, dtype=np.float64)
    return np.asarray(sums, dtype=np.float64)


def _size_factors(totals: NDArray[np.float64], target: float) -> NDArray[np.float64]:
    return np.divide(target, totals, out=np.zeros_like(totals), where=totals > 0)


def _ratio(numerator: NDArray[np.float64], denominator: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.divide(numerator, denominator, out=np.zeros_like(numerator), where=denominator > 0)
