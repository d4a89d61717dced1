"""Linear models in closed form: the gene's mean, and ridge regression on features.

Both predict log1p UMI, which the metrics compare, and return UMI.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray

from prts.data.nucleus_set import CountBlocks, NucleusSet, feature_moments

logger = logging.getLogger(__name__)

# Penalties per training nucleus. The Gram matrix of standardized features has a mean eigenvalue of 1.
PENALTIES = tuple(float(penalty) for penalty in np.logspace(-4, 2, 13))

_CHUNK = 4096
_MOST_PERMUTED = 100_000


@dataclass(frozen=True)
class LinearBaseline:
    """A fitted linear map from features to log1p UMI: `intercept + features @ weights`.

    Parameters
    ----------
    weights
        (d, g) float32; d = 0 for a baseline without features.
    intercept
        (g,) float32.
    penalty
        The chosen penalty per training nucleus, if any.
    scores
        Mean per-gene PCC on validation for each penalty.
    """

    weights: NDArray[np.float32]
    intercept: NDArray[np.float32]
    penalty: float | None = None
    scores: dict[float, float] = field(default_factory=dict)

    def predict(self, features: NDArray[np.float32], out: NDArray[np.float32] | None = None) -> NDArray[np.float32]:
        """Expected UMI (n, g) from features (n, d), written into `out` if given. Its log1p is the fitted map, clipped at 0."""
        umi = np.empty((len(features), len(self.intercept)), dtype=np.float32) if out is None else out
        for start in range(0, len(umi), _CHUNK):
            rows = slice(start, start + _CHUNK)
            level = features[rows] @ self.weights + self.intercept if len(self.weights) else self.intercept
            umi[rows] = np.expm1(np.clip(level, 0.0, None))
        return umi


def gene_mean(train_sets: Sequence[NucleusSet]) -> LinearBaseline:
    """Predict each gene's mean log1p UMI over training nuclei.

    Parameters
    ----------
    train_sets
        Training nuclei.
    """
    n = sum(map(len, train_sets))
    total = sum(np.asarray(counts.log1p().sum(axis=0)).ravel() for counts in CountBlocks(train_sets))
    intercept = np.asarray(total / n, dtype=np.float32)
    return LinearBaseline(np.empty((0, len(intercept)), dtype=np.float32), intercept)


def ridge(
    train_sets: Sequence[NucleusSet],
    val_sets: Sequence[NucleusSet],
    penalties: Sequence[float] = PENALTIES,
    *,
    name: str = "ridge",
) -> LinearBaseline:
    """Fit ridge regression of log1p UMI on standardized features, in closed form, with the penalty chosen on validation.

    One eigendecomposition of the Gram matrix serves every penalty. The validation correlation of a linear map follows from the moments of
    features and counts without predicting, so a penalty costs d^2 g instead of n d g. (The choice therefore ignores that predictions are
    clipped at 0.) Time is O(n d^2 + d nnz); counts stay sparse.

    Parameters
    ----------
    train_sets
        Training nuclei.
    val_sets
        Validation nuclei. The penalty with the greatest mean per-gene PCC, averaged over sections, wins.
    penalties
        Penalties per training nucleus: the map minimizes |Y - XW|^2 + n penalty |W|^2.
    name
        Name in the log.
    """
    mean, scale = feature_moments(train_sets)
    train = [_moments(nuclei, mean, scale) for nuclei in train_sets]
    n = sum(moments.n for moments in train)
    intercept = sum(moments.n * moments.y_mean for moments in train) / n
    # about the means over all training sections; the mean of the features is 0 by construction
    gram = sum(moments.xx + moments.n * np.outer(moments.x_mean, moments.x_mean) for moments in train) / n
    cross = sum(moments.xy + moments.n * np.outer(moments.x_mean, moments.y_mean - intercept) for moments in train) / n

    values, vectors = np.linalg.eigh(gram)
    rotated = vectors.T @ cross
    shrunk = 1.0 / (np.maximum(values, 0.0)[:, None] + np.asarray(penalties))
    scores = np.zeros(len(penalties))
    for nuclei in val_sets:
        scores += _mean_pcc(_moments(nuclei, mean, scale), vectors, rotated, shrunk) / len(val_sets)
    best = int(np.argmax(scores))
    logger.info(
        "baseline %s: penalty %.3g of %.3g-%.3g, validation PCC %.4f",
        name,
        penalties[best],
        penalties[0],
        penalties[-1],
        scores[best],
    )

    weights = vectors @ (shrunk[:, best, None] * rotated) / scale[:, None]
    return LinearBaseline(
        weights=weights.astype(np.float32),
        intercept=(intercept - mean @ weights).astype(np.float32),
        penalty=float(penalties[best]),
        scores=dict(zip(map(float, penalties), scores.tolist(), strict=True)),
    )


def permuted(sets: Sequence[NucleusSet], *, seed: int = 0) -> list[NucleusSet]:
    """The same nuclei with the counts of each gene permuted independently.

    For the regression of one gene, this amounts to permuting the rows of the features. With a single permutation, all genes would
    share its chance direction, and their mean PCC would scatter around 0 as widely as the PCC of one gene. (Each gene's permutation is
    one random order rotated by a random offset, which costs no more than the non-zero counts.)

    Parameters
    ----------
    sets
        Nuclei of one or more sections; counts are permuted across sections. Of more than 100,000 nuclei, that many are taken, evenly, since
        the counts of all must be in memory.
    seed
        Seed of the permutations.
    """
    rng = np.random.default_rng(seed)
    sets = _thinned(sets, _MOST_PERMUTED)
    counts = sp.vstack([nuclei.counts for nuclei in sets], format="csc")
    n, n_genes = counts.shape
    order, turn = rng.permutation(n), rng.integers(n, size=n_genes)
    gene = np.repeat(np.arange(n_genes), np.diff(counts.indptr))
    dealt = sp.csr_matrix((counts.data, ((order[counts.indices] + turn[gene]) % n, gene)), shape=counts.shape)
    stops = np.cumsum([len(nuclei) for nuclei in sets])
    return [replace(nuclei, counts=dealt[stop - len(nuclei) : stop]) for nuclei, stop in zip(sets, stops, strict=True)]


def _thinned(sets: Sequence[NucleusSet], most: int) -> list[NucleusSet]:
    """Evenly chosen nuclei of all sets, in memory; the sets themselves if they are in memory and have no more than `most`."""
    n = sum(map(len, sets))
    chosen = []
    for nuclei in sets:
        few = nuclei
        if n > most:
            few = nuclei.take(np.linspace(0, len(nuclei) - 1, max(1, len(nuclei) * most // n)).astype(np.intp))
        counts = few.counts if sp.issparse(few.counts) else few.counts[:]
        chosen.append(replace(few, features=few.features[:], counts=counts))
    return chosen


@dataclass(frozen=True)
class _Moments:
    """Means of features (d,) and log1p UMI (g,) of a section, and the centered sums of xx (d, d), xy (d, g) and yy (g,)."""

    n: int
    x_mean: NDArray[np.float64]
    y_mean: NDArray[np.float64]
    xx: NDArray[np.float64]
    xy: NDArray[np.float64]
    yy: NDArray[np.float64]


def _chunks(nuclei: NucleusSet) -> Iterator[tuple[NDArray[np.float32], Any]]:
    for start in range(0, len(nuclei), _CHUNK):
        yield nuclei.features[start : start + _CHUNK], nuclei.counts[start : start + _CHUNK]


def _moments(nuclei: NucleusSet, mean: NDArray[np.float64], scale: NDArray[np.float64]) -> _Moments:
    d, g = len(mean), nuclei.counts.shape[1]
    x_sum, y_sum = np.zeros(d), np.zeros(g)
    xx, xy, yy = np.zeros((d, d)), np.zeros((d, g)), np.zeros(g)
    for features, counts in _chunks(nuclei):
        x = (features - mean) / scale
        y = counts.astype(np.float64).log1p()
        x_sum += x.sum(axis=0)
        y_sum += np.asarray(y.sum(axis=0)).ravel()
        yy += np.asarray(y.multiply(y).sum(axis=0)).ravel()
        xx += x.T @ x
        xy += (y.T @ x).T  # sparse: at a density of 10%, twice as fast as the dense product
    n = len(nuclei)
    x_mean, y_mean = x_sum / n, y_sum / n
    return _Moments(
        n=n,
        x_mean=x_mean,
        y_mean=y_mean,
        xx=xx - n * np.outer(x_mean, x_mean),
        xy=xy - n * np.outer(x_mean, y_mean),
        yy=yy - n * np.square(y_mean),
    )


def _mean_pcc(
    moments: _Moments, vectors: NDArray[np.float64], rotated: NDArray[np.float64], shrunk: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Mean per-gene PCC of the map of every penalty (columns of `shrunk`) on a section, from its moments."""
    measured = moments.yy > 1e-12 * moments.n
    if not measured.any():
        return np.zeros(shrunk.shape[1])
    xx = vectors.T @ moments.xx @ vectors
    xy = vectors.T @ moments.xy[:, measured]
    scores = np.zeros(shrunk.shape[1])
    for column, shrink in enumerate(shrunk.T):
        weights = shrink[:, None] * rotated[:, measured]
        variance = np.einsum("dg,dg->g", weights, xx @ weights)
        covariance = np.einsum("dg,dg->g", weights, xy)
        power = variance * moments.yy[measured]
        # a gene with a constant prediction scores 0
        pcc = np.divide(
            covariance,
            np.sqrt(power, where=power > 0, out=np.ones_like(power)),
            out=np.zeros_like(power),
            where=power > 0,
        )
        scores[column] = pcc.mean()
    return scores
