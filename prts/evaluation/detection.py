"""How well a prediction separates genes that a nucleus expresses (at least one UMI) from the others, in one section."""

from __future__ import annotations

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray

from prts.data.gene_arrays import GeneRows, Matrix, gene_slices, sorted_runs

_N_BINS = 15


def detection_scores(
    measured: Matrix, prob: Matrix, threshold: ArrayLike, scored: NDArray[np.bool_] | None = None
) -> tuple[pd.DataFrame, dict[str, float]]:
    """Detection scores of each gene and of all of them.

    Parameters
    ----------
    measured
        UMI counts, sparse or dense, (n_nuclei, n_genes); expressed is > 0.
    prob
        P(expressed), sparse or dense, (n_nuclei, n_genes).
    threshold
        A gene is called expressed where prob >= threshold; one number or (n_genes,).
    scored
        Genes to include in the summary, (n_genes,); None means all.

    Returns
    -------
    per_gene
        `auroc` and `auprc` (average precision; both treat ties as scikit-learn does; NaN if all nuclei are of one class),
        `accuracy`, `majority_accuracy`, `mcc` (0 if undefined).
    summary
        * `auroc`, `auprc`: mean over genes that have both classes;
        * `accuracy`: share of gene x nucleus pairs called correctly;
        * `majority_accuracy`: the same for the best constant call of each gene, max(share expressed, share not), with which every
          accuracy should be compared (calling everything "not expressed" scores no more than this);
        * `balanced_accuracy`, `mcc`: over pooled gene x nucleus pairs, so knowing which genes are common already helps;
          `mcc_gene_mean`, the mean of the per-gene MCC, does not have this bias;
        * `calibration_error`: expected calibration error of the pooled pairs in 15 equal bins (Naeini et al. 2015).
    """
    truth, guess = GeneRows(measured, "measured"), GeneRows(prob, "prob")
    n_nuclei, n_genes = truth.shape
    scored = np.ones(n_genes, dtype=bool) if scored is None else scored
    cut = np.broadcast_to(np.asarray(threshold, dtype=np.float64), (n_genes,))
    auroc, auprc = np.full(n_genes, np.nan), np.full(n_genes, np.nan)
    # Rows: called and expressed, called and not, not called and expressed, neither.
    pairs = np.zeros((4, n_genes))
    bins = np.zeros((3, _N_BINS))
    for genes in gene_slices(n_nuclei, n_genes):
        expressed, score = truth[genes] > 0, guess[genes]
        auroc[genes], auprc[genes] = _ranking(expressed, score)
        called = score >= cut[genes, None]
        hit, n_called, n_expressed = (called & expressed).sum(1), called.sum(1), expressed.sum(1)
        pairs[:, genes] = hit, n_called - hit, n_expressed - hit, n_nuclei - n_called - n_expressed + hit
        bins += _calibration_bins(expressed[scored[genes]], score[scored[genes]])

    hit, _, miss, reject = pairs
    share = (hit + miss) / max(n_nuclei, 1)
    per_gene = pd.DataFrame(
        {
            "auroc": auroc,
            "auprc": auprc,
            "accuracy": (hit + reject) / max(n_nuclei, 1),
            "majority_accuracy": np.maximum(share, 1 - share),
            "mcc": _mcc(*pairs),
        }
    )
    kept = per_gene[scored]
    pooled = pairs[:, scored].sum(axis=1)
    summary = {
        "accuracy": float(kept["accuracy"].mean()),
        "majority_accuracy": float(kept["majority_accuracy"].mean()),
        "balanced_accuracy": float(np.mean([_share(pooled[0], pooled[2]), _share(pooled[3], pooled[1])])),
        "mcc": float(_mcc(*pooled)),
        "mcc_gene_mean": float(kept["mcc"].mean()),
        "auroc": float(kept["auroc"].mean()),
        "auprc": float(kept["auprc"].mean()),
        "calibration_error": float(np.abs(bins[1] - bins[2]).sum() / max(bins[0].sum(), 1)),
    }
    return per_gene, summary


def _ranking(
    expressed: NDArray[np.bool_], score: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """AUROC by the rank sum and average precision; a run of equal scores enters as one threshold."""
    n = score.shape[1]
    order, first, last = sorted_runs(score)
    positive = np.take_along_axis(expressed, order, axis=1)
    n_positive = positive.sum(axis=1).astype(np.float64)
    n_negative = n - n_positive
    rank_sum = (positive * ((first + last) / 2 + 1)).sum(axis=1)
    # Positives below each place; those at or above a run are all but the ones below its first place.
    below = np.cumsum(positive, axis=1, dtype=np.int32) - positive
    at_or_above = n_positive[:, None] - np.take_along_axis(below, first, axis=1)
    precision = at_or_above / (n - first)
    with np.errstate(invalid="ignore", divide="ignore"):
        auroc = (rank_sum - n_positive * (n_positive + 1) / 2) / (n_positive * n_negative)
        auprc = (positive * precision).sum(axis=1) / n_positive
    both = (n_positive > 0) & (n_negative > 0)
    return np.where(both, auroc, np.nan), np.where(both, auprc, np.nan)


def _calibration_bins(expressed: NDArray[np.bool_], prob: NDArray[np.float64]) -> NDArray[np.float64]:
    """Pairs, their summed probability and the expressed ones in each bin of probability, (3, n_bins)."""
    flat = prob.ravel()
    index = np.minimum((flat * _N_BINS).astype(np.intp), _N_BINS - 1)
    return np.stack(
        [np.bincount(index, weights=w, minlength=_N_BINS) for w in (None, flat, expressed.ravel())], dtype=np.float64
    )


def _mcc(hit: ArrayLike, false_alarm: ArrayLike, miss: ArrayLike, reject: ArrayLike) -> NDArray[np.float64]:
    """Matthews correlation of a 2 x 2 table; 0 if a margin is empty."""
    tp, fp, fn, tn = (np.asarray(v, dtype=np.float64) for v in (hit, false_alarm, miss, reject))
    # Roots before the product, which would lose digits for four margins of 10^8 pairs.
    margin = np.sqrt(tp + fp) * np.sqrt(tp + fn) * np.sqrt(tn + fp) * np.sqrt(tn + fn)
    mcc: NDArray[np.float64] = np.divide(tp * tn - fp * fn, margin, out=np.zeros_like(margin), where=margin > 0)
    return mcc


def _share(part: float, rest: float) -> float:
    return part / (part + rest) if part + rest > 0 else 0.0
