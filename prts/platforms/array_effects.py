"""Effects of the array on how many UMIs a bin captures: rows and columns of the 2 um bins that catch more or fewer than their neighbors.

They are modeled as exposure: E[n_rc] = s_rc a_r b_c, where s varies slowly. A nucleus whose bins caught 10 % more has an exposure of 1.1,
which is an offset of the Poisson likelihood. Counts stay the integers that were measured; rescaling them would not leave them Poisson.

Tissue makes rows differ as well, because the nuclei in one row are not those in the next. An effect of the array is what distant parts of
a row share; what differs between the parts is tissue and chance. Both variances are estimated from the data, and each effect is the best
linear prediction that they allow (empirical Bayes): few UMIs, or tissue that varies from row to row, pull it toward 1.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

if TYPE_CHECKING:
    from prts.platforms.bin_matrix import BinMatrix

Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]

# Width (bins) of three boxes in a row, which give s: nearly a Gaussian of 12 bins, at the same cost for any width.
_BOX = 25
_ROUNDS = 3
# Side (bins) of the parts that rows are compared in, and of the blocks by which effects are fitted and checked on different bins.
_PART = 32
# Rows (columns) apart at which tissue no longer resembles itself; effects of the array are independent from one row to the next.
_REACH = 24
# Neighbors whose shared variance is that of tissue, because it hardly changes over 8 um.
_NEXT = 4
# Spreads of chance above which a shared variance is one of the array.
_CLEAR = 3.0


@dataclass(frozen=True)
class ArrayEffects:
    """Relative capture of the rows and columns of an array; the geometric mean of each is 1.

    Attributes
    ----------
    row, col
        (n_rows,) and (n_cols,).
    stripes_before, stripes_after
        Stripe index on bins that the effects were not fitted on, without and with them: the standard deviation of what distant parts of
        a row or column share, as a share of their UMIs.
    """

    row: Floats
    col: Floats
    stripes_before: float
    stripes_after: float

    @property
    def helps(self) -> bool:
        """Whether the effects explain bins that they were not fitted on."""
        return self.stripes_after < self.stripes_before

    def exposure(self, unit: NDArray[np.int32], n_units: int) -> NDArray[np.float64]:
        """Mean of a_r b_c over the bins of each unit, (n_units,); 1 for a unit without bins.

        Parameters
        ----------
        unit
            (n_rows, n_cols) index of the unit of each bin, negative for none.
        n_units
            Number of units.
        """
        row, col = np.nonzero(unit >= 0)
        owner = unit[row, col]
        n = np.bincount(owner, minlength=n_units)
        total = np.bincount(owner, self.row[row].astype(np.float64) * self.col[col], minlength=n_units)
        return np.where(n > 0, total / np.maximum(n, 1), 1.0)

    def report(self) -> dict[str, Any]:
        """Figures for `uns` and metrics."""
        spread = {"spread_rows": float(np.log(self.row).std()), "spread_columns": float(np.log(self.col).std())}
        return {"stripes_before": self.stripes_before, "stripes_after": self.stripes_after, **spread}


def umi_of_bins(matrix: BinMatrix, shape: tuple[int, int]) -> tuple[Floats, NDArray[np.bool_]]:
    """UMIs of each bin of an array, and whether the matrix lists it; (n_rows, n_cols) both."""
    umi, listed = np.zeros(shape, np.float32), np.zeros(shape, np.bool_)
    listed[matrix.array_row, matrix.array_col] = True
    for start, stop, chunk in matrix.chunks():
        total = np.asarray(chunk.sum(axis=1), np.float32).ravel()
        umi[matrix.array_row[start:stop], matrix.array_col[start:stop]] = total
    return umi, listed


def fit_array_effects(umi: Floats, listed: NDArray[np.bool_]) -> ArrayEffects:
    """Fit the effects of rows and columns, and measure on other bins whether they are real.

    Parameters
    ----------
    umi
        UMIs of each bin, (n_rows, n_cols).
    listed
        Which bins were measured, (n_rows, n_cols).
    """
    row, col = _fit(umi, listed)
    block = np.add.outer(np.arange(umi.shape[0]) // _PART, np.arange(umi.shape[1]) // _PART) % 2 == 0
    before, after = [], []
    for fitted, held_out in ((block, ~block), (~block, block)):
        a, b = _fit(umi, listed & fitted)
        seen = listed & held_out
        before.append(stripe_index(umi, seen, np.ones_like(a), np.ones_like(b)))
        after.append(stripe_index(umi, seen, a, b))
    return ArrayEffects(row, col, float(np.mean(before)), float(np.mean(after)))


def stripe_index(umi: Floats, listed: NDArray[np.bool_], row: Floats, col: Floats) -> float:
    """Standard deviation of what distant parts of rows and of columns share beyond a_r b_c, as a share of their UMIs.

    Parameters
    ----------
    umi, listed
        As for `fit_array_effects`; only listed bins are used.
    row, col
        Effects, (n_rows,) and (n_cols,).
    """
    counts = np.where(listed, umi, np.float32(0))
    exposure = np.where(listed, np.multiply.outer(row, col), np.float32(0))
    expected = _smooth(counts, exposure) * exposure
    shared = [_Parts.of(counts, expected, axis).covariances().array_variance for axis in (0, 1)]
    return float(np.sqrt(np.mean(shared)))


def _fit(umi: Floats, listed: NDArray[np.bool_]) -> tuple[Floats, Floats]:
    """Alternate between the smooth part, rows and columns."""
    effects = [np.ones(size, np.float32) for size in umi.shape]
    counts = np.where(listed, umi, np.float32(0))
    for _ in range(_ROUNDS):
        smooth = _smooth(counts, np.where(listed, np.multiply.outer(*effects), np.float32(0)))
        smooth *= listed
        for axis in (0, 1):
            expected = smooth * np.expand_dims(effects[1 - axis], axis)
            effects[axis] = _Parts.of(counts, expected, axis).effects()
    return effects[0], effects[1]


def _smooth(counts: Floats, exposure: Floats) -> Floats:
    """UMIs per exposure in the surroundings of each bin; both are 0 for bins that were not measured."""
    umi, weight = counts, exposure
    for _ in range(3):
        umi, weight = (ndimage.uniform_filter(each, _BOX, mode="constant") for each in (umi, weight))
    return np.asarray(np.divide(umi, weight, out=np.zeros_like(umi), where=weight > 1e-6))


class _Covariances(NamedTuple):
    """How rows resemble each other, as a share of their UMIs.

    Attributes
    ----------
    array_variance
        Variance of what distant parts of a row share and its neighbors do not; at least 0.
    clear
        Whether that is more than chance makes.
    tissue
        (_REACH + 1,) covariance of the same part of two rows, by their distance, beyond what all parts share.
    overlap
        (_REACH + 1, n_rows) share of that covariance that is left in the sums over rows.
    """

    array_variance: float
    clear: bool
    tissue: Doubles
    overlap: Doubles


class _Parts(NamedTuple):
    """UMIs beyond and as expected without effects of rows, by row and part of the row; (n_rows, n_parts) both."""

    excess: Doubles
    expected: Doubles

    @classmethod
    def of(cls, counts: Floats, expected: Floats, axis: int) -> _Parts:
        """Sums of the parts along the other axis."""
        starts = np.arange(0, counts.shape[1 - axis], _PART)
        n, mean = (
            np.add.reduceat(each if axis == 0 else each.T, starts, axis=1, dtype=np.float64)
            for each in (counts, expected)
        )
        return cls(n - mean, mean)

    def covariances(self) -> _Covariances:
        """Estimate what rows share with each other, by their distance."""
        size = self.expected.shape[0]
        lags = range(min(_REACH, size - 1) + 1)
        excess, expected = self.excess.sum(axis=1), self.expected.sum(axis=1)
        shared, tissue, overlap = np.zeros(_REACH + 1), np.zeros(_REACH + 1), np.zeros((_REACH + 1, size))
        for lag in lags:
            one, other = slice(0, size - lag), slice(lag, None)
            same, weight = (np.sum(each[one] * each[other], axis=1) for each in self)
            both = expected[one] * expected[other]
            overlap[lag, one] = np.divide(weight, both, out=np.zeros_like(both), where=both > 0)
            # pairs of different parts are independent but for what the whole row has in common
            shared[lag] = np.sum(excess[one] * excess[other] - same) / max(np.sum(both - weight), 1.0)
            poisson = expected.sum() if lag == 0 else 0.0
            tissue[lag] = (same.sum() - poisson) / max(weight.sum(), 1.0) - shared[lag]
        above = shared[0] - shared[1 : _NEXT + 1].mean()
        clear = bool(above > _CLEAR * shared[1:].std())
        return _Covariances(max(float(above), 0.0), clear, _nonnegative(tissue), overlap)

    def effects(self) -> Floats:
        """Best linear prediction of the effect of each row, (n_rows,); their geometric mean is 1."""
        from scipy.linalg import solveh_banded

        found = self.covariances()
        total = self.expected.sum(axis=1)
        umi = self.excess.sum(axis=1) + total
        used = (total > 1) & (umi > 0)
        if not found.clear or not used.any():
            return np.ones(len(total), np.float32)
        band = found.tissue[:, None] * found.overlap
        # a variance so large that the row says nothing
        band[0] += found.array_variance + np.divide(1.0, total, out=np.full(len(total), 1e6), where=used)
        # effects of array and tissue multiply
        log_ratio = np.log(np.divide(umi, total, out=np.ones_like(total), where=used))
        weighted, ones = solveh_banded(band, np.stack([log_ratio, used.astype(float)], axis=1), lower=True).T
        level = weighted[used].sum() / ones[used].sum()
        effect = np.where(used, found.array_variance * (weighted - level * ones), 0.0)
        effect[used] -= effect[used].mean()
        return np.exp(effect).astype(np.float32)


def _nonnegative(covariance: Doubles) -> Doubles:
    """The nearest covariance of a stationary process, which has no negative frequencies; tapered to 0 at the largest distance."""
    tapered = covariance * np.cos(np.linspace(0, np.pi / 2, len(covariance)))
    circle = np.concatenate([tapered, np.zeros(2 * len(tapered)), tapered[:0:-1]])
    positive = np.fft.ifft(np.maximum(np.fft.fft(circle).real, 0.0)).real
    return np.asarray(positive[: len(covariance)])
