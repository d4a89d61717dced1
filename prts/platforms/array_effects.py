"""Effects of the array on how many UMIs a bin captures: rows and columns of the 2 um bins that catch more or fewer than their neighbors.

They are modeled as exposure: E[n_rc] = s_rc a_r b_c, where s varies slowly. A nucleus whose bins caught 10 % more has an exposure of 1.1,
which is an offset of the Poisson likelihood. Counts stay the integers that were measured; rescaling them would not leave them Poisson.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

if TYPE_CHECKING:
    from prts.platforms.bin_matrix import BinMatrix

Floats = NDArray[np.float32]

# Standard deviation (bins) of the smoothing that gives s: several rows wide, and smaller than structures of tissue.
_SIGMA = 4.0
_ROUNDS = 8
# UMIs that pull the effect of a row with few counts toward 1.
_PRIOR_UMI = 50.0
# Side of the blocks (bins) by which effects are fitted and checked on different bins of a row.
_BLOCK = 32


@dataclass(frozen=True)
class ArrayEffects:
    """Relative capture of the rows and columns of an array; the geometric mean of each is 1.

    Attributes
    ----------
    row, col
        (n_rows,) and (n_cols,).
    stripes_before, stripes_after
        Stripe index on bins that the effects were not fitted on, without and with them: the spread of rows and columns around their
        surroundings beyond that of Poisson counts, as a share of their UMIs.
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
    block = np.add.outer(np.arange(umi.shape[0]) // _BLOCK, np.arange(umi.shape[1]) // _BLOCK) % 2 == 0
    before, after = [], []
    for fitted, held_out in ((block, ~block), (~block, block)):
        a, b = _fit(umi, listed & fitted)
        seen = listed & held_out
        before.append(stripe_index(umi, seen, np.ones_like(a), np.ones_like(b)))
        after.append(stripe_index(umi, seen, a, b))
    return ArrayEffects(row, col, float(np.mean(before)), float(np.mean(after)))


def stripe_index(umi: Floats, listed: NDArray[np.bool_], row: Floats, col: Floats) -> float:
    """Spread of rows and columns around s_rc a_r b_c beyond that of Poisson counts, as a share of their UMIs.

    Parameters
    ----------
    umi, listed
        As for `fit_array_effects`; only listed bins are used.
    row, col
        Effects, (n_rows,) and (n_cols,).
    """
    exposure = np.where(listed, np.multiply.outer(row, col), 0).astype(np.float32)
    expected = _smooth(umi, listed, exposure) * exposure
    excess = []
    for axis in (1, 0):
        n, mean = (each.sum(axis=axis, dtype=np.float64) for each in (np.where(listed, umi, 0), expected))
        used = mean > _PRIOR_UMI
        if not used.any():
            continue
        ratio = n[used] / mean[used] - 1
        excess.append(np.average(ratio**2 - 1 / mean[used], weights=mean[used]))
    return float(np.sqrt(max(np.mean(excess), 0.0))) if excess else 0.0


def _fit(umi: Floats, listed: NDArray[np.bool_]) -> tuple[Floats, Floats]:
    """Alternate between the smooth part, rows and columns."""
    effects = [np.ones(size, np.float32) for size in umi.shape]
    counts = np.where(listed, umi, np.float32(0))
    for _ in range(_ROUNDS):
        for axis in (0, 1):
            exposure = np.where(listed, np.multiply.outer(*effects), np.float32(0))
            expected = _smooth(umi, listed, exposure)
            other = effects[1 - axis]
            expected *= listed
            mean = expected @ other if axis == 0 else other @ expected
            n = counts.sum(axis=1 - axis, dtype=np.float64)
            found = (n + _PRIOR_UMI) / (mean.astype(np.float64) + _PRIOR_UMI)
            used = n > 0
            if used.any():
                found /= np.exp(np.log(found[used]).mean())
            effects[axis] = np.where(used, found, 1.0).astype(np.float32)
    return effects[0], effects[1]


def _smooth(umi: Floats, listed: NDArray[np.bool_], exposure: Floats) -> Floats:
    """UMIs per exposure in the surroundings of each bin."""
    counts, weight = (
        ndimage.gaussian_filter(np.where(listed, each, 0).astype(np.float32), _SIGMA, mode="constant", truncate=3)
        for each in (umi, exposure)
    )
    return np.asarray(np.divide(counts, weight, out=np.zeros_like(counts), where=weight > 1e-6))
