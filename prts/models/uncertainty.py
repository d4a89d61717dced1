"""Intervals of counts around the expected UMI, calibrated on validation.

A count is modeled as negative binomial around the expected UMI, with a dispersion per gene. An interval covers at least the nominal level
of that distribution, and more where it covered validation counts less often than that (conformal calibration, one number per gene: Romano
et al. 2019). Genes with few UMI on validation share their numbers with genes of similar expression.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import nbinom

from prts.data.gene_arrays import gene_slices

if TYPE_CHECKING:
    from prts.data.nucleus_set import NucleusSet

Floats = NDArray[np.float64]
Ints = NDArray[np.int32]

LEVEL = 0.9
# With UMI in this many nuclei, a gene gets its own dispersion and calibration.
_MIN_EXPRESSED = 100
_STRATA = 5
# Expected UMI at which bounds are computed, four per octave; each nucleus takes the nearest.
_PER_OCTAVE = 4
_OCTAVES = (-8, 12)
_GRID = 2.0 ** (np.arange(_OCTAVES[0] * _PER_OCTAVE, _OCTAVES[1] * _PER_OCTAVE + 1) / _PER_OCTAVE)
# Candidate shares of the uncovered mass below the interval; the narrowest interval is taken.
BELOW = (0.0, 0.25, 0.5)
_MAX_MASS = 0.9999
# A model whose sums are further from the counts than this has not learned the gene. Counts fit into int32.
_SCALES = (1e-4, 1e4)
_MAX_DISPERSION = 100.0
_HALVINGS = 8
# Calibration uses at most this many nuclei per section, evenly chosen.
_MAX_NUCLEI = 20_000


@dataclass(frozen=True)
class CountIntervals:
    """Intervals of counts for genes, from their expected UMI.

    Parameters
    ----------
    level
        Share of the counts that the intervals should cover.
    scale
        Mean count per expected UMI on validation, (g,).
    dispersion
        phi of a count with mean m and variance m + phi m^2, (g,).
    mass
        Probability of that distribution that the interval covers, (g,).
    """

    level: float
    scale: Floats
    dispersion: Floats
    mass: Floats

    def settings(self) -> dict[str, Any]:
        """All fields, JSON-like, to four digits."""
        arrays = {"scale": self.scale, "dispersion": self.dispersion, "mass": self.mass}
        return {"level": self.level} | {name: [float(f"{v:.4g}") for v in values] for name, values in arrays.items()}

    @classmethod
    def from_settings(cls, settings: Mapping[str, Any]) -> CountIntervals:
        """Restore from `settings`.

        Raises
        ------
        ValueError
            If a number is outside the range of `calibrate_intervals`.
        """
        limits = {"scale": _SCALES, "dispersion": (0.0, _MAX_DISPERSION), "mass": (0.0, 1.0)}
        arrays = {name: np.array(settings[name], dtype=np.float64) for name in limits}
        for name, (least, most) in limits.items():
            if not ((arrays[name] >= least) & (arrays[name] <= most)).all():
                raise ValueError(f"{name} of intervals must be between {least:g} and {most:g}")
        return cls(float(settings["level"]), **arrays)

    def table(self) -> tuple[Ints, Ints]:
        """Lower and upper bounds of every gene at each expected UMI of the grid, each (g, grid)."""
        return _bounds(self.scale, self.dispersion, self.mass)

    def bounds(
        self, umi: NDArray[np.float32], table: tuple[Ints, Ints] | None = None, genes: slice = slice(None)
    ) -> tuple[Ints, Ints]:
        """Lower and upper bounds of nuclei.

        Parameters
        ----------
        umi
            Expected UMI, (b, g).
        table
            From `table`, to compute it once for many chunks.
        genes
            The genes that the columns of `umi` are.

        Returns
        -------
        Smallest and largest count of each interval, both (b, g); the expected UMI is between them, except that an upper bound of 0 is
        kept where less than one UMI is expected.
        """
        lower, upper = self.table() if table is None else table
        place, gene = _place(umi), np.arange(len(lower))[genes]
        # a miscalibrated sum may move the interval off the expected UMI that is written beside it; below one UMI, 0 is inside
        whole = np.floor(umi)
        least = np.minimum(lower[gene, place], whole).astype(np.int32)
        most = np.maximum(upper[gene, place], np.where(umi < 1, 0, np.ceil(umi))).astype(np.int32)
        return least, most


def calibrate_intervals(
    umi: Sequence[NDArray[np.float32]], sets: Sequence[NucleusSet], *, level: float = LEVEL
) -> CountIntervals:
    """Fit the intervals on validation nuclei.

    Parameters
    ----------
    umi
        Expected UMI of the nuclei of each section, (n, g).
    sets
        The nuclei, with their counts.
    level
        Share of the counts that the intervals should cover.
    """
    rows = [np.linspace(0, len(part) - 1, min(len(part), _MAX_NUCLEI)).astype(np.intp) for part in sets]
    expected = np.concatenate([part[take] for part, take in zip(umi, rows, strict=True)])
    counts = np.concatenate([part.counts[take].toarray() for part, take in zip(sets, rows, strict=True)])
    group = _groups((counts > 0).sum(axis=0), counts.mean(axis=0))

    def pooled(per_gene: Floats) -> Floats:
        """Sum over the genes of each gene's group."""
        summed: Floats = np.bincount(group, weights=per_gene)[group].astype(np.float64)
        return summed

    total = pooled(counts.sum(axis=0, dtype=np.float64))
    predicted = pooled(expected.sum(axis=0, dtype=np.float64))
    scale = np.divide(total, predicted, out=np.ones_like(total), where=(predicted > 0) & (total > 0)).clip(*_SCALES)
    excess, power = np.zeros(len(total)), np.zeros(len(total))
    for genes in gene_slices(*counts.shape):
        mean = expected[:, genes] * scale[genes]
        excess[genes] = (np.square(counts[:, genes] - mean) - mean).sum(axis=0)
        power[genes] = np.square(mean).sum(axis=0)
    power = pooled(power)
    dispersion = np.divide(pooled(excess), power, out=np.zeros_like(power), where=power > 0).clip(0.0, _MAX_DISPERSION)

    n = len(counts) * pooled(np.ones(len(total)))
    # this share of the n calibration counts must be inside for the next count to be inside with probability `level`
    wanted = np.minimum(np.ceil((n + 1) * level) / n, 1.0)
    # never less than the nominal mass, or a rare gene would have the bound 0 even if it is expected
    low, high = np.full(len(total), level), np.full(len(total), _MAX_MASS)
    place = _place(expected)
    at = np.arange(len(total))

    def covers(mass: Floats) -> NDArray[np.bool_]:
        lower, upper = _bounds(scale, dispersion, mass)
        inside = np.empty(len(total))
        for genes in gene_slices(*counts.shape):
            here, k = (at[genes], place[:, genes]), counts[:, genes]
            inside[genes] = ((lower[here] <= k) & (k <= upper[here])).sum(axis=0)
        enough: NDArray[np.bool_] = pooled(inside) >= wanted * n
        return enough

    enough = covers(low)
    high = np.where(enough, low, high)
    for _ in range(0 if enough.all() else _HALVINGS):
        middle = 1 - np.sqrt((1 - low) * (1 - high))  # halves the share outside the interval
        enough = covers(middle)
        low, high = np.where(enough, low, middle), np.where(enough, middle, high)
    return CountIntervals(level, scale, dispersion, high)


def _groups(expressed: NDArray[Any], mean: NDArray[Any]) -> NDArray[np.intp]:
    """Group of each gene: its own if it is measured often enough, else that of its stratum of expression."""
    group = np.arange(len(mean))
    rare = np.flatnonzero(expressed < _MIN_EXPRESSED)
    for stratum in np.array_split(rare[np.argsort(mean[rare], kind="stable")], _STRATA):
        if len(stratum):
            group[stratum] = stratum[0]
    return group


def _place(umi: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Index of the nearest grid point for each expected UMI."""
    place = np.log2(np.maximum(umi, np.float32(_GRID[0])))
    place -= _OCTAVES[0]
    place *= _PER_OCTAVE
    return np.rint(place, out=place).clip(max=len(_GRID) - 1).astype(np.uint8)


def _bounds(scale: Floats, dispersion: Floats, mass: Floats) -> tuple[Ints, Ints]:
    mean = _GRID * scale[:, None]
    size = 1.0 / np.maximum(dispersion, 1e-6)[:, None]  # practically Poisson
    counts = nbinom(size, size / (size + mean))
    wanted = mass[:, None]
    lower, upper = np.zeros(mean.shape), np.asarray(counts.ppf(wanted))
    for below in BELOW[1:]:
        start = counts.ppf(below * (1 - wanted))
        stop = counts.ppf(np.minimum(counts.cdf(start - 1) + wanted, _MAX_MASS))
        narrower = stop - start < upper - lower
        lower, upper = np.where(narrower, start, lower), np.where(narrower, stop, upper)
    most = np.iinfo(np.int32).max
    return lower.clip(max=most).astype(np.int32), upper.clip(max=most).astype(np.int32)
