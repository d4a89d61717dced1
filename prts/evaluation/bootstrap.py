"""Block-bootstrap intervals. Nearby nuclei are alike, so spatial blocks are resampled instead of nuclei (Kunsch 1989)."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray

from prts.data.gene_arrays import GeneRows, Matrix, gene_slices, is_constant

logger = logging.getLogger(__name__)

BLOCK_UM = 250.0
_MIN_BLOCKS = 20
_MIN_BLOCK_UM = 30.0


def spatial_blocks(xy_um: NDArray[np.float64], block_um: float = BLOCK_UM) -> tuple[NDArray[np.intp], float]:
    """Divide tissue into square blocks.

    Parameters
    ----------
    xy_um
        Centers of the nuclei in um, (n_nuclei, 2).
    block_um
        Side of a block in um. It is halved until at least 20 blocks contain nuclei or a block is down to about 30 um, since percentiles
        over a handful of blocks are meaningless (this affects small simulated sections, not slides).

    Returns
    -------
    labels
        Block of each nucleus, from 0 without gaps, (n_nuclei,).
    block_um
        The side used.
    """
    xy = np.asarray(xy_um, dtype=np.float64)
    corner = xy.min(axis=0) if len(xy) else np.zeros(2)
    while True:
        cell = np.floor((xy - corner) / block_um).astype(np.int64)
        key = cell[:, 0] * (cell[:, 1].max(initial=0) + 1) + cell[:, 1]
        _, labels = np.unique(key, return_inverse=True)
        n_blocks = int(labels.max(initial=-1)) + 1
        if n_blocks >= _MIN_BLOCKS or block_um / 2 < _MIN_BLOCK_UM:
            logger.info("%d blocks of %g um for intervals", n_blocks, block_um)
            return labels, block_um
        block_um /= 2


def random_blocks(n_nuclei: int, n_blocks: int = 200, seed: int = 0) -> NDArray[np.intp]:
    """Random groups of nuclei of equal size, (n_nuclei,), for nuclei without coordinates, which count as independent."""
    return np.random.default_rng(seed).permutation(n_nuclei) % max(min(n_blocks, n_nuclei), 1)


def block_matrix(blocks: NDArray[np.intp]) -> sp.csr_matrix:
    """1 where a nucleus is in a block, (n_blocks, n_nuclei). Its product with a matrix sums over the nuclei of each block."""
    n = len(blocks)
    return sp.csr_matrix((np.ones(n), (blocks, np.arange(n))), shape=(int(blocks.max(initial=-1)) + 1, n))


def resampling_weights(n_blocks: int, n_replicates: int, seed: int) -> NDArray[np.float64]:
    """How often each block is drawn in n_blocks draws with replacement, (n_replicates, n_blocks)."""
    if n_blocks == 0:
        return np.zeros((n_replicates, 0))
    draws = np.random.default_rng(seed).multinomial(n_blocks, np.full(n_blocks, 1 / n_blocks), size=n_replicates)
    return draws.astype(np.float64)


@dataclass(frozen=True)
class BlockSums:
    """Sums per block for the PCC of log1p(UMI), which make a bootstrap replicate a small matrix product.

    Attributes
    ----------
    n
        Nuclei of each block, (n_blocks,).
    sums
        Sums of x, y, x^2, y^2 and xy over the nuclei of each block, x measured and y predicted, (5, n_blocks, n_genes).
    x_constant, y_constant
        Genes whose measured or predicted values are constant in the section, (n_genes,).
    """

    n: NDArray[np.float64]
    sums: NDArray[np.float64]
    x_constant: NDArray[np.bool_]
    y_constant: NDArray[np.bool_]

    def mean_pcc(self, weights: NDArray[np.float64]) -> NDArray[np.float64]:
        """Mean PCC over the section's non-constant genes in each replicate, (n_replicates,).

        A gene that is constant in a replicate (a rare one) is left out of it.
        """
        total, count = np.zeros(len(weights)), np.zeros(len(weights))
        for genes in gene_slices(4 * len(weights), self.sums.shape[2]):
            pcc = self.pcc(weights, genes)
            known = ~np.isnan(pcc)
            total += np.where(known, pcc, 0.0).sum(axis=1)
            count += known.sum(axis=1)
        mean: NDArray[np.float64] = np.divide(total, count, out=np.full(len(weights), np.nan), where=count > 0)
        return mean

    def pcc(self, weights: NDArray[np.float64], genes: slice) -> NDArray[np.float64]:
        """PCC of some genes in each replicate, (n_replicates, some genes): NaN where measured, 0 where predicted values are constant."""
        n = (weights @ self.n)[:, None]
        x, y, xx, yy, xy = (weights @ s[:, genes] / n for s in self.sums)
        var_x, var_y, product = xx - x * x, yy - y * y, xy - x * y
        known = ~self.x_constant[genes] & (var_x > 1e-12)
        scored = known & ~self.y_constant[genes] & (var_y > 1e-15)
        pcc = np.divide(product, np.sqrt(np.abs(var_x * var_y)), out=np.zeros_like(product), where=scored)
        return np.where(known, pcc, np.nan)


def block_sums(measured: Matrix, predicted: Matrix, blocks: NDArray[np.intp]) -> BlockSums:
    """Sums over the nuclei of each block.

    Parameters
    ----------
    measured, predicted
        UMI, sparse or dense, (n_nuclei, n_genes).
    blocks
        Block of each nucleus, (n_nuclei,).
    """
    member = block_matrix(blocks)
    truth, guess = GeneRows(measured, "measured"), GeneRows(predicted, "predicted")
    n_genes = truth.shape[1]
    sums = np.zeros((5, member.shape[0], n_genes))
    x_constant, y_constant = np.zeros(n_genes, dtype=bool), np.zeros(n_genes, dtype=bool)
    for genes in gene_slices(*truth.shape):
        x, y = np.log1p(truth[genes], dtype=np.float64), np.log1p(guess[genes], dtype=np.float64)
        x_constant[genes], y_constant[genes] = is_constant(x), is_constant(y)
        for k, values in enumerate((x, y, x * x, y * y, x * y)):
            sums[k, :, genes] = member @ values.T
    return BlockSums(np.asarray(member.sum(axis=1)).ravel(), sums, x_constant, y_constant)


def mean_pcc_interval(sums: BlockSums, *, n_replicates: int = 1000, seed: int = 0) -> tuple[float, float]:
    """95% interval (percentiles) of the mean PCC over genes; NaN with fewer than two blocks."""
    if len(sums.n) < 2:
        return float("nan"), float("nan")
    low, high = np.nanpercentile(sums.mean_pcc(resampling_weights(len(sums.n), n_replicates, seed)), [2.5, 97.5])
    return float(low), float(high)


def mean_pcc_difference(
    sums: BlockSums, other: BlockSums, *, n_replicates: int = 1000, seed: int = 0
) -> tuple[float, float, float]:
    """Difference in mean PCC of two predictions of the same nuclei, with its 95% interval from shared resamples.

    Parameters
    ----------
    sums, other
        Block sums of the two, with the same blocks and the same measured counts.
    n_replicates
        Resamples of the blocks.
    seed
        Seed of the resampling.

    Returns
    -------
    Mean PCC of `sums` minus that of `other`, and the 2.5 and 97.5 percentiles over resamples (NaN with fewer than two blocks).

    Raises
    ------
    ValueError
        If the blocks differ.
    """
    if not np.array_equal(sums.n, other.n):
        raise ValueError("a paired difference needs the same blocks for both predictions")
    every = np.ones((1, len(sums.n)))
    difference = float((sums.mean_pcc(every) - other.mean_pcc(every))[0])
    if len(sums.n) < 2:
        return difference, float("nan"), float("nan")
    weights = resampling_weights(len(sums.n), n_replicates, seed)
    low, high = np.nanpercentile(sums.mean_pcc(weights) - other.mean_pcc(weights), [2.5, 97.5])
    return difference, float(low), float(high)


def genes_above(
    sums: BlockSums, other: BlockSums | None = None, *, n_replicates: int = 1000, seed: int = 0
) -> NDArray[np.bool_]:
    """Find genes whose PCC is above 0, or above that of another prediction, by the 95% interval over resampled blocks.

    Parameters
    ----------
    sums
        Block sums of the prediction.
    other
        Block sums of another prediction of the same nuclei in the same blocks; differences are taken within resamples. None compares
        with 0.
    n_replicates
        Resamples of the blocks.
    seed
        Seed of the resampling.

    Returns
    -------
    Whether the 2.5 percentile is above 0, (n_genes,). A resample in which a gene's measured counts are constant counts as 0, so that a
    gene expressed in a few nuclei is never above. False for all with fewer than two blocks.

    Raises
    ------
    ValueError
        If the blocks differ.
    """
    if other is not None and not np.array_equal(sums.n, other.n):
        raise ValueError("a paired difference needs the same blocks for both predictions")
    n_genes = sums.sums.shape[2]
    above = np.zeros(n_genes, dtype=bool)
    if len(sums.n) < 2:
        return above
    weights = resampling_weights(len(sums.n), n_replicates, seed)
    for genes in gene_slices(4 * n_replicates, n_genes):
        pcc = sums.pcc(weights, genes)
        if other is not None:
            pcc -= other.pcc(weights, genes)
        above[genes] = np.percentile(np.nan_to_num(pcc), 2.5, axis=0) > 0
    return above
