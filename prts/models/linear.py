"""Baselines that can be a run's model (`ridge` and others): a network without hidden layers, fitted in closed form.

A run with such a model is tested, written and shipped like any other, and predicts any slide, which shows what a network adds.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from prts.data.nucleus_set import CountBlocks, NucleusSet
from prts.errors import ParameterError
from prts.models.likelihoods.paper import Paper
from prts.models.network import PRTSNet
from prts.models.ridge import LinearBaseline, gene_mean, permuted, ridge

logger = logging.getLogger(__name__)

LINEAR = ("gene_mean", "morphology", "context", "ridge", "permuted")
LIKELIHOOD = Paper(w_0=1.0, alpha_w=1.0, lambda_2=0.0, target="log1p")
"""They minimize the squared error of log1p UMI."""

_CHUNK = 4096
_NEWTON_STEPS = 12
# Penalty on slope and offset, in units of nuclei. Without it, a gene expressed in all or no nuclei has no finite solution.
_PRIOR = 1e-2


def check_linear(name: str) -> None:
    """Refuse a baseline that cannot be a model.

    Raises
    ------
    ParameterError
        If `name` is not one of `LINEAR`.
    """
    reason = {
        "colour": "its 12 statistics are not among the inputs of a bundle",
        "position": "it knows only the training nuclei of the section that it predicts",
    }.get(name)
    if reason is not None:
        raise ParameterError(
            "",
            "baseline",
            f"{name} cannot predict another slide: {reason}; see baseline/{name} in any run's metrics.json",
        )
    if name not in LINEAR:
        raise ParameterError("", "baseline", f"{name!r} is not one of {', '.join(LINEAR)}")


def fit_linear(
    name: str, train_sets: Sequence[NucleusSet], val_sets: Sequence[NucleusSet], *, seed: int = 0
) -> PRTSNet:
    """A network without hidden layers whose level is the baseline's log1p UMI.

    Parameters
    ----------
    name
        One of `LINEAR`; `morphology` and `context` are ridge on the features of the sets.
    train_sets, val_sets
        Nuclei to fit on and to choose the penalty on.
    seed
        Seed of the permutations.

    Returns
    -------
    In evaluation mode. P(expressed) is a logistic function of the level for each gene, fitted on training nuclei.
    """
    if name == "gene_mean":
        fitted = gene_mean(train_sets)
    else:
        fitted = ridge(permuted(train_sets, seed=seed) if name == "permuted" else train_sets, val_sets, name=name)
    in_features, n_genes = train_sets[0].features.shape[1], train_sets[0].counts.shape[1]
    net = PRTSNet(in_features, n_genes, hidden=(), heads="single", dropout=0.0)
    slope, offset = _calibrate(fitted, train_sets)
    with torch.no_grad():
        weights = fitted.weights if len(fitted.weights) else np.zeros((in_features, n_genes), np.float32)
        net.level.weight.copy_(torch.from_numpy(weights.T))
        net.level.bias.copy_(torch.from_numpy(fitted.intercept))
        net.logit_slope.copy_(torch.from_numpy(slope))
        net.logit_offset.copy_(torch.from_numpy(offset))
    return net.eval()


def _calibrate(
    fitted: LinearBaseline, train_sets: Sequence[NucleusSet]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Slope and offset (g,) of each gene's logistic regression of "expressed" on its level, by Newton's method for all genes together."""
    n_genes = len(fitted.intercept)
    share = sum(np.asarray((counts > 0).sum(axis=0)).ravel() for counts in CountBlocks(train_sets))
    n = sum(map(len, train_sets))
    slope, offset = np.zeros(n_genes), np.log((share + 0.5) / (n - share + 0.5))
    start = offset.copy()
    for _ in range(_NEWTON_STEPS):
        # first and second derivatives of the penalized log-likelihood
        d_slope, d_offset = -_PRIOR * slope, -_PRIOR * (offset - start)
        h_slope, h_both, h_offset = np.full(n_genes, _PRIOR), np.zeros(n_genes), np.full(n_genes, _PRIOR)
        for nuclei in train_sets:
            for rows in range(0, len(nuclei), _CHUNK):
                level = np.log1p(fitted.predict(nuclei.features[rows : rows + _CHUNK])).astype(np.float64)
                p = 1 / (1 + np.exp(-np.clip(slope * level + offset, -30, 30)))
                error = (nuclei.counts[rows : rows + _CHUNK] > 0).toarray() - p
                weight = p * (1 - p)
                d_slope += (error * level).sum(axis=0)
                d_offset += error.sum(axis=0)
                h_slope += (weight * level * level).sum(axis=0)
                h_both += (weight * level).sum(axis=0)
                h_offset += weight.sum(axis=0)
        determinant = h_slope * h_offset - h_both**2
        slope += (h_offset * d_slope - h_both * d_offset) / determinant
        offset += (h_slope * d_offset - h_both * d_slope) / determinant
    return slope, offset
