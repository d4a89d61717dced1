"""From UMI counts to what the network is asked for, and back.

A scaler is a module whose buffers (one value per gene) travel with the network: to the device, and into the bundle.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from prts.errors import InputError

# No nucleus holds more UMI than exp(15) = 3.3 million; keeps expm1 of an untrained network's output finite.
MAX_LOG_UMI = 15.0


class Scaler(nn.Module):
    """What every scaler offers. `name` is its value of `data.target` and its name in a bundle.

    `start`, where fitting found one, is the level (g,) of each gene's mean: a network that starts there need not spend its first epochs
    on finding out that rare genes are rare.
    """

    name: ClassVar[str]
    start: Tensor | None = None

    def __init__(self, n_genes: int) -> None:
        super().__init__()
        self.n_genes = n_genes

    def fit(self, counts: Sequence[Any]) -> Self:
        """Learn from training counts.

        Parameters
        ----------
        counts
            CSR matrices (n, g) of raw UMI, one per section; not densified.
        """
        return self

    def transform(self, counts: Tensor) -> Tensor:
        """Raw counts (b, g) to targets (b, g)."""
        raise NotImplementedError

    def inverse(self, level: Tensor) -> Tensor:
        """The network's level (b, g) to expected UMI (b, g), never negative."""
        raise NotImplementedError


class MinMax(Scaler):
    """Each gene's non-zero training range mapped to [0, 1] (paper's targets; ranges as in the released code).

    Zeros and the smallest non-zero count both map to 0, so "expressed" must be read from the counts, never from this target. A gene with
    one distinct non-zero count has range 1; a gene without any has minimum 0 and range 1.
    """

    name = "minmax"
    minimum: Tensor
    range: Tensor

    def __init__(self, n_genes: int) -> None:
        super().__init__(n_genes)
        self.register_buffer("minimum", torch.zeros(n_genes))
        self.register_buffer("range", torch.ones(n_genes))

    def fit(self, counts: Sequence[Any]) -> Self:
        """Find the non-zero range of every gene; see `Scaler.fit`."""
        low = np.full(self.n_genes, np.inf)
        high = np.zeros(self.n_genes)
        for matrix in counts:
            section_low, section_high = _nonzero_range(matrix)
            low, high = np.minimum(low, section_low), np.maximum(high, section_high)
        spread = high - low
        self.minimum = torch.from_numpy(np.where(np.isfinite(low), low, 0.0).astype(np.float32)).to(self.minimum.device)
        self.range = torch.from_numpy(np.where(spread > 0, spread, 1.0).astype(np.float32)).to(self.range.device)
        return self

    def transform(self, counts: Tensor) -> Tensor:
        """Scale; counts below the training minimum, zeros among them, give 0."""
        return ((counts - self.minimum) / self.range).clamp_(min=0.0)

    def inverse(self, level: Tensor) -> Tensor:
        """Scale back."""
        return (level * self.range + self.minimum).clamp_(min=0.0)


class Log1p(Scaler):
    """The natural logarithm of 1 + UMI."""

    name = "log1p"

    def transform(self, counts: Tensor) -> Tensor:
        """log(1 + counts)."""
        return torch.log1p(counts)

    def inverse(self, level: Tensor) -> Tensor:
        """exp(level) - 1."""
        return torch.expm1(level.clamp(0.0, MAX_LOG_UMI))


class Counts(Scaler):
    """UMI as they are."""

    name = "counts"

    def transform(self, counts: Tensor) -> Tensor:
        """The counts themselves."""
        return counts

    def inverse(self, level: Tensor) -> Tensor:
        """The level, but not below 0."""
        return level.clamp(min=0.0)


class LogRate(Scaler):
    """The level is the natural logarithm of the expected UMI; the target is the count itself (`PoissonLoss`)."""

    name = "log_rate"

    def fit(self, counts: Sequence[Any]) -> Self:
        """Find the level of each gene's mean; see `Scaler.fit`."""
        self.start = torch.from_numpy(_log_mean(counts, self.n_genes)).float()
        return self

    def transform(self, counts: Tensor) -> Tensor:
        """The counts themselves."""
        return counts

    def inverse(self, level: Tensor) -> Tensor:
        """exp(level)."""
        return level.clamp(max=MAX_LOG_UMI).exp()


class LogShare(LogRate):
    """The level is the natural logarithm of the gene's share of the panel's UMI (`PoissonLoss` with `offset=library`).

    UMI are those expected in a nucleus of `depth`: the mean over training nuclei of the UMI of the whole panel.
    """

    name = "log_share"
    depth: Tensor

    def __init__(self, n_genes: int) -> None:
        super().__init__(n_genes)
        self.register_buffer("depth", torch.ones(1))

    def fit(self, counts: Sequence[Any]) -> Self:
        """Find the mean depth; see `Scaler.fit`."""
        log_mean = _log_mean(counts, self.n_genes)
        depth = float(sum(matrix.sum() for matrix in counts)) / sum(matrix.shape[0] for matrix in counts)
        self.depth = torch.tensor([depth if depth > 0 else 1.0], device=self.depth.device)
        self.start = torch.from_numpy(log_mean - np.log(self.depth.item())).float()
        return self

    def inverse(self, level: Tensor) -> Tensor:
        """exp(level) x depth."""
        return super().inverse(level) * self.depth


class LogTruncated(Scaler):
    """The level is the log rate of a Poisson count that is known not to be 0; the target is the count itself (`HurdleLoss`)."""

    name = "log_truncated"

    def transform(self, counts: Tensor) -> Tensor:
        """The counts themselves."""
        return counts

    def inverse(self, level: Tensor) -> Tensor:
        """Mean of such a count, rate / (1 - exp(-rate)): 1 for the smallest rates."""
        rate = level.clamp(-MAX_LOG_UMI, MAX_LOG_UMI).exp()
        return rate / -torch.expm1(-rate)


class LogPositive(Scaler):
    """The level is the mean logarithm of the UMI where there are any; the target is the count itself (`HurdleLoss`, `level=lognormal`).

    Back on the scale of counts, exp(level) is the geometric mean; `smearing` (Duan 1983) turns it into the mean: for each gene the mean
    over the geometric mean of its positive training counts.
    """

    name = "log_positive"
    smearing: Tensor

    def __init__(self, n_genes: int) -> None:
        super().__init__(n_genes)
        self.register_buffer("smearing", torch.ones(n_genes))

    def fit(self, counts: Sequence[Any]) -> Self:
        """Find the smearing factor of every gene; see `Scaler.fit`."""
        n, total, log_total = (np.zeros(self.n_genes) for _ in range(3))
        for matrix in counts:
            positive = matrix.copy()
            positive.eliminate_zeros()
            n += np.bincount(positive.indices, minlength=self.n_genes)
            total += np.bincount(positive.indices, weights=positive.data, minlength=self.n_genes)
            log_total += np.bincount(positive.indices, weights=np.log(positive.data), minlength=self.n_genes)
        n = np.maximum(n, 1)  # a gene without any UMI has a total of 0: its factor becomes 1
        factor = np.where(total > 0, total / n, 1.0) / np.exp(log_total / n)
        self.smearing = torch.from_numpy(factor).float().to(self.smearing.device)
        return self

    def transform(self, counts: Tensor) -> Tensor:
        """The counts themselves."""
        return counts

    def inverse(self, level: Tensor) -> Tensor:
        """exp(level) x smearing, at least 1: there are no smaller positive counts."""
        return (level.clamp(max=MAX_LOG_UMI).exp() * self.smearing).clamp(min=1.0)


SCALED: dict[str, type[Scaler]] = {scaler.name: scaler for scaler in (MinMax, Log1p, Counts)}
"""Targets that are counts on some scale, for losses that compare level and target."""

SCALERS: dict[str, type[Scaler]] = {
    **SCALED,
    **{scaler.name: scaler for scaler in (LogRate, LogShare, LogTruncated, LogPositive)},
}


def make_scaler(name: str, n_genes: int) -> Scaler:
    """A scaler by name, not fitted.

    Raises
    ------
    InputError
        If there is no such scaler.
    """
    if name not in SCALERS:
        raise InputError(f"data.target: {name!r} is not one of {', '.join(SCALERS)}")
    return SCALERS[name](n_genes)


def _log_mean(counts: Sequence[Any], n_genes: int) -> NDArray[np.float64]:
    """Log of each gene's mean count, a gene without any UMI taken for one with half a UMI in all nuclei together."""
    n = sum(matrix.shape[0] for matrix in counts)
    total = np.zeros(n_genes)
    for matrix in counts:
        total += np.asarray(matrix.sum(axis=0), dtype=np.float64).ravel()
    mean: NDArray[np.float64] = np.log(np.maximum(total, 0.5) / n)
    return mean


def _nonzero_range(counts: Any) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Smallest and largest non-zero count of every gene (inf and 0 where it has none)."""
    columns = counts.tocsc(copy=True)
    columns.eliminate_zeros()
    filled = np.diff(columns.indptr) > 0
    starts = columns.indptr[:-1][filled]
    low = np.full(columns.shape[1], np.inf)
    high = np.zeros(columns.shape[1])
    if len(starts):
        low[filled] = np.minimum.reduceat(columns.data, starts)
        high[filled] = np.maximum.reduceat(columns.data, starts)
    return low, high
