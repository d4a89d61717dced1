"""Scaled counts as targets, for likelihoods that compare the level with them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, Self, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from prts.models.likelihoods.base import MAX_LOG_UMI, Likelihood, Outputs

Target = Literal["minmax", "log1p", "counts"]


class ScaledLikelihood(Likelihood):
    """A likelihood whose level is a count on the scale of `target`.

    Parameters
    ----------
    lambda_1, lambda_2
        See `Likelihood`.
    target
        `minmax`, `log1p` or `counts`.
    """

    def __init__(self, lambda_1: float, lambda_2: float, target: Target) -> None:
        super().__init__(lambda_1, lambda_2)
        self.target = target
        self.scaler = _SCALERS[target]()

    @property
    def targets(self) -> tuple[str, ...]:
        """All scales."""
        return get_args(Target)

    def with_target(self, target: str) -> Likelihood:
        """See `Likelihood.with_target`."""
        super().with_target(target)
        settings = {key: value for key, value in self.settings().items() if key != "name"}
        return type(self)(**(settings if target == "auto" else settings | {"target": target}))

    def allocate(self, n_genes: int) -> Self:
        """Create the scale of each gene."""
        self.scaler.allocate(n_genes)
        return super().allocate(n_genes)

    def fit(self, counts: Sequence[Any]) -> Self:
        """Find the scale of each gene; see `Likelihood.fit`."""
        super().fit(counts)
        self.scaler.fit(counts)
        return self

    def mean(self, outputs: Outputs) -> Tensor:
        """The level scaled back."""
        return self.scaler.inverse(outputs[0])


class Counts(nn.Module):
    """UMI as they are; also the interface of a scaler."""

    def allocate(self, n_genes: int) -> None:
        """Create buffers of one value per gene."""

    def fit(self, counts: Sequence[Any]) -> None:
        """Learn from training counts; see `Likelihood.fit`."""

    def transform(self, counts: Tensor) -> Tensor:
        """Raw counts (b, g) to targets (b, g)."""
        return counts

    def inverse(self, level: Tensor) -> Tensor:
        """The network's level (b, g) to expected UMI (b, g), never negative."""
        return level.clamp(min=0.0)


class Log1p(Counts):
    """The natural logarithm of 1 + UMI."""

    def transform(self, counts: Tensor) -> Tensor:
        """log(1 + counts)."""
        return torch.log1p(counts)

    def inverse(self, level: Tensor) -> Tensor:
        """exp(level) - 1."""
        return torch.expm1(level.clamp(0.0, MAX_LOG_UMI))


class MinMax(Counts):
    """Each gene's non-zero training range mapped to [0, 1] (the paper's targets; ranges as in the released code).

    Zeros and the smallest non-zero count both map to 0, so "expressed" must be read from the counts, never from this target. A gene with
    one distinct non-zero count has range 1; a gene without any has minimum 0 and range 1.
    """

    minimum: Tensor
    range: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("minimum", torch.zeros(()))
        self.register_buffer("range", torch.ones(()))

    def allocate(self, n_genes: int) -> None:
        """Create minimum 0 and range 1 of each gene."""
        self.minimum, self.range = self.minimum.new_zeros(n_genes), self.range.new_ones(n_genes)

    def fit(self, counts: Sequence[Any]) -> None:
        """Find the non-zero range of each gene."""
        n_genes = counts[0].shape[1]
        low = np.full(n_genes, np.inf)
        high = np.zeros(n_genes)
        for matrix in counts:
            section_low, section_high = _nonzero_range(matrix)
            low, high = np.minimum(low, section_low), np.maximum(high, section_high)
        spread = high - low
        self.minimum = self.minimum.new_tensor(np.where(np.isfinite(low), low, 0.0).astype(np.float32))
        self.range = self.range.new_tensor(np.where(spread > 0, spread, 1.0).astype(np.float32))

    def transform(self, counts: Tensor) -> Tensor:
        """Scale. Counts below the training minimum, zeros among them, give 0."""
        return ((counts - self.minimum) / self.range).clamp_(min=0.0)

    def inverse(self, level: Tensor) -> Tensor:
        """Scale back."""
        return (level * self.range + self.minimum).clamp_(min=0.0)


_SCALERS: dict[str, type[Counts]] = {"minmax": MinMax, "log1p": Log1p, "counts": Counts}


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
