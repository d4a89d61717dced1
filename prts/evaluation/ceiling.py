"""The noise ceiling: the PCC that a perfect prediction of the rate would reach despite counting noise, for each gene.

Split every count c into halves a + b by a fair coin for each UMI (binomial thinning): given the rate, a and b are independent
Poisson draws at half the depth, so their correlation over nuclei (rho) is due to the rate and not to noise. At full depth the
reliability is 2 rho / (1 + rho) (Spearman-Brown), and the ceiling its square root.

The average over infinitely many splits needs no random draws: it depends on each nucleus through c alone, by the expectations of
g(a), g(a)^2 and g(a) g(b) under a ~ Binomial(c, 1/2), which are tabulated here (g is the identity or log1p). For raw counts the
ceiling is then sqrt(1 - mean / variance), exactly the r_max = sqrt(mu CV^2 / (1 + mu CV^2)) of the Poisson model; for log1p the
step from half to full depth is an approximation, .02 too high on average where rates are skewed (benchmarks/ceiling.py).

It is an upper bound for an image model, because bursting, depth and diffusion from neighbors count as signal.
"""

from __future__ import annotations

import numpy as np
import pandas as pd
import scipy.sparse as sp
from numpy.typing import NDArray
from scipy.stats import binom

from prts.evaluation.bootstrap import block_matrix, resampling_weights

# Beyond this count, the second-order expansion around c / 2 is exact to 1e-6.
_TABLE = 1024
RELIABLE = 0.1
"""Smallest ceiling of a gene that counts toward `ceiling_share`."""


def noise_ceiling(
    counts: sp.csr_matrix, blocks: NDArray[np.intp], *, n_replicates: int = 1000, seed: int = 0
) -> pd.DataFrame:
    """Ceiling of the PCC of each gene, on log1p(UMI) and on raw counts.

    A ceiling is 0 if the 95% interval of rho (percentiles over resampled spatial blocks; the splits are averaged out) includes 0.
    Simply clipping the estimate at 0 would be biased upward for rare genes.

    Parameters
    ----------
    counts
        Measured UMI counts, (n_nuclei, n_genes), integers.
    blocks
        Block of each nucleus from 0, (n_nuclei,), as `prts.evaluation.bootstrap.spatial_blocks` gives it.
    n_replicates
        Resamples of the blocks.
    seed
        Seed of the resampling.

    Returns
    -------
    One row per gene: `ceiling`, `ceiling_low`, `ceiling_high` (95% interval, clipped at 0) for log1p, and `ceiling_raw`.
    """
    counts = sp.csr_matrix(counts)
    c = counts.data.astype(np.int64)
    member = block_matrix(blocks)
    weights = resampling_weights(member.shape[0], n_replicates, seed)
    sizes = np.asarray(member.sum(axis=1)).ravel()

    def rho(functions: tuple[NDArray[np.float64], ...]) -> tuple[NDArray[np.float64], ...]:
        """Correlation of the halves, and its percentiles, from g, g^2 and the product at every non-zero count (all 0 at 0)."""
        sums = [(member @ sp.csr_matrix((f, counts.indices, counts.indptr), counts.shape)).toarray() for f in functions]
        estimate = _rho([s.sum(axis=0) for s in sums], sizes.sum())
        low, high = np.full((2, counts.shape[1]), np.nan)
        for genes in _replicate_slices(n_replicates, counts.shape[1]):
            replicates = _rho([weights @ s[:, genes] for s in sums], (weights @ sizes)[:, None])
            low[genes], high[genes] = np.percentile(replicates, [2.5, 97.5], axis=0)
        return estimate, low, high

    raw = rho((c / 2, (c * c + c) / 4, (c * c - c) / 4))
    log = rho(_log1p_halves(c))
    return pd.DataFrame(
        {
            "ceiling": _suppressed(*log),
            "ceiling_low": _ceiling(log[1]),
            "ceiling_high": _ceiling(log[2]),
            "ceiling_raw": _suppressed(*raw),
        }
    )


def ceiling_share(pcc: NDArray[np.float64], ceiling: NDArray[np.float64]) -> float:
    """sum(PCC) / sum(ceiling) over genes with a ceiling of at least `RELIABLE` (the smallest ceilings would dominate a mean of ratios).

    NaN if no gene has such a ceiling.
    """
    reliable = np.isfinite(pcc) & (ceiling >= RELIABLE)
    return float(pcc[reliable].sum() / ceiling[reliable].sum()) if reliable.any() else float("nan")


def _log1p_halves(c: NDArray[np.int64]) -> tuple[NDArray[np.float64], ...]:
    """E log1p(a), E log1p(a)^2 and E log1p(a) log1p(c - a) for a ~ Binomial(c, 1/2)."""
    size = min(int(c.max(initial=0)), _TABLE) + 1
    n, k = np.arange(size)[:, None], np.arange(size)[None, :]
    chance = binom.pmf(k, n, 0.5)
    g = np.log1p(np.arange(size))
    other = np.where(k <= n, g[np.maximum(n - k, 0)], 0.0)
    tables = chance @ g, chance @ g**2, (chance * other) @ g
    first, square, product = (table[np.minimum(c, size - 1)] for table in tables)
    large = c >= size
    if large.any():
        half = c[large] / 2
        value, slope, curve, variance = np.log1p(half), 1 / (1 + half), -1 / (1 + half) ** 2, half / 2
        first[large] = value + curve * variance / 2
        square[large] = value**2 + (slope**2 + value * curve) * variance
        product[large] = value**2 + (value * curve - slope**2) * variance
    return first, square, product


def _rho(sums: list[NDArray[np.float64]], n: NDArray[np.float64]) -> NDArray[np.float64]:
    first, square, product = (s / n for s in sums)
    variance = square - first**2
    covariance = product - first**2
    # a gene without counts in a resample has no correlation
    return np.divide(covariance, variance, out=np.zeros_like(covariance), where=variance > 1e-12)


def _ceiling(rho: NDArray[np.float64]) -> NDArray[np.float64]:
    rho = np.clip(rho, 0, 1)
    return np.sqrt(2 * rho / (1 + rho))


def _suppressed(rho: NDArray[np.float64], low: NDArray[np.float64], high: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.where((low > 0) & (high > 0), _ceiling(rho), 0.0)


def _replicate_slices(n_replicates: int, n_genes: int) -> list[slice]:
    step = max(1, 1_000_000 // n_replicates)
    return [slice(start, min(start + step, n_genes)) for start in range(0, n_genes, step)]
