"""Poisson counts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from prts.arguments import checked
from prts.models.likelihoods import likelihoods
from prts.models.likelihoods.base import MAX_LOG_UMI, Likelihood, Outputs, PositiveWeight, Weight, cross_entropy


@likelihoods.register("poisson")
class Poisson(Likelihood):
    """lambda_1 x Poisson deviance of the counts under a log link + lambda_2 x binary cross-entropy (not in the paper).

    Without an offset the network predicts the log of the expected UMI, depth included. With `offset=library`, training adds the log of the
    nucleus's measured UMI over the panel, so that the network learns each gene's share and not how deeply the nucleus was sequenced. The
    prediction is then the expected UMI of a nucleus of the mean training depth. Depth depends on what the image shows (size, type), so
    log1p UMI is predicted better without the offset.

    Parameters
    ----------
    lambda_1
        Weight of the likelihood: the mean over nuclei and genes of mu - k log mu, the negative log-likelihood up to a term of the counts.
    lambda_2
        Weight of the cross-entropy.
    offset
        `none` or `library`.

    Raises
    ------
    ParameterError
        If a weight is negative or the offset unknown.
    """

    allowed_gates = ("none",)
    depth: Tensor

    @checked("likelihood")
    def __init__(
        self,
        lambda_1: PositiveWeight = 1.0,
        lambda_2: Weight = 1.0,
        offset: Literal["none", "library"] = "none",
    ) -> None:
        super().__init__(lambda_1, lambda_2)
        self.offset = offset
        self.target = "log_rate" if offset == "none" else "log_share"
        if offset == "library":
            self.register_buffer("depth", torch.ones(1))

    def fit(self, counts: Sequence[Any]) -> Self:
        """Find the level of each gene's mean and the mean depth; see `Likelihood.fit`."""
        super().fit(counts)
        start = _log_mean(counts)
        if self.offset == "library":
            depth = float(sum(matrix.sum() for matrix in counts)) / sum(matrix.shape[0] for matrix in counts)
            self.depth = self.depth.new_tensor([depth if depth > 0 else 1.0])
            start = start - np.log(self.depth.item())
        self.start = torch.from_numpy(start).float()
        return self

    def loss(self, outputs: Outputs, counts: Tensor) -> dict[str, Tensor]:
        """See `Likelihood.loss`."""
        level, logit = outputs
        level = level.clamp(max=MAX_LOG_UMI)
        depth = counts.sum(dim=1, keepdim=True) if self.offset == "library" else 1.0
        # k log mu without k log(depth), which depends on the counts alone: a nucleus of depth 0 then needs no special case
        reg = (depth * level.exp() - counts * level).mean()
        return self.weighted_sum(reg, cross_entropy(logit, counts))

    @property
    def takes_exposure(self) -> bool:
        """Whether the level is the log of a rate; shares do not depend on the exposure."""
        return self.offset == "none"

    def exposed(self, outputs: Outputs, exposure: Tensor) -> Outputs:
        """The level plus the log of the exposure."""
        level, *others = outputs
        return level + exposure.log(), *others

    def mean(self, outputs: Outputs) -> Tensor:
        """exp(level), times the mean depth if the level is a share."""
        rate = outputs[0].clamp(max=MAX_LOG_UMI).exp()
        return rate if self.offset == "none" else rate * self.depth


def _log_mean(counts: Sequence[Any]) -> NDArray[np.float64]:
    """Log of each gene's mean count. A gene without UMI counts as having half a UMI in all nuclei together."""
    n = sum(matrix.shape[0] for matrix in counts)
    total = np.zeros(counts[0].shape[1])
    for matrix in counts:
        total += np.asarray(matrix.sum(axis=0), dtype=np.float64).ravel()
    mean: NDArray[np.float64] = np.log(np.maximum(total, 0.5) / n)
    return mean
