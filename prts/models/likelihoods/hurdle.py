"""Whether a gene is expressed, and how many UMI it then has, modeled separately."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, Self

import numpy as np
import torch
from torch import Tensor

from prts.arguments import checked
from prts.models.likelihoods import likelihoods
from prts.models.likelihoods.base import MAX_LOG_UMI, Likelihood, Outputs, PositiveWeight, Weight, cross_entropy


@likelihoods.register("hurdle")
class Hurdle(Likelihood):
    """lambda_1 x likelihood of how much is expressed + lambda_2 x binary cross-entropy of whether (hurdle model, Mullahy 1986).

    `level=poisson`: the level is the log rate lambda of a Poisson count k known not to be 0, with
    P(k) = lambda^k exp(-lambda) / (k! (1 - exp(-lambda))). Expected UMI are P(expressed) lambda / (1 - exp(-lambda)).

    `level=lognormal`: log k of an expressed pair is normal around the level with variance 1. Expected UMI are P(expressed) times
    exp(level) times a smearing factor (Duan 1983): for each gene the mean over the geometric mean of its positive training counts.

    Parameters
    ----------
    lambda_1
        Weight of the likelihood: the sum over expressed pairs of lambda + log(1 - exp(-lambda)) - k log lambda, or of half the squared
        error of log k, divided by the number of all pairs. With equal weights both terms add up to the likelihood of the whole model.
    lambda_2
        Weight of the cross-entropy.
    level
        `poisson` or `lognormal`.

    Raises
    ------
    ParameterError
        If a weight is negative or the level unknown.
    """

    allowed_heads = ("dual",)
    allowed_gates = ("soft",)
    smearing: Tensor

    @checked("likelihood")
    def __init__(
        self,
        lambda_1: PositiveWeight = 1.0,
        lambda_2: Weight = 1.0,
        level: Literal["poisson", "lognormal"] = "poisson",
    ) -> None:
        super().__init__(lambda_1, lambda_2)
        self.level = level
        self.target = "log_truncated" if level == "poisson" else "log_positive"
        if level == "lognormal":
            self.register_buffer("smearing", torch.ones(()))

    def allocate(self, n_genes: int) -> Self:
        """Create the smearing factor of each gene."""
        if self.level == "lognormal":
            self.smearing = self.smearing.new_ones(n_genes)
        return super().allocate(n_genes)

    def fit(self, counts: Sequence[Any]) -> Self:
        """Find the smearing factor of each gene; see `Likelihood.fit`."""
        super().fit(counts)
        if self.level == "lognormal":
            n, total, log_total = (np.zeros(self.n_genes) for _ in range(3))
            for matrix in counts:
                positive = matrix.copy()
                positive.eliminate_zeros()
                n += np.bincount(positive.indices, minlength=self.n_genes)
                total += np.bincount(positive.indices, weights=positive.data, minlength=self.n_genes)
                log_total += np.bincount(positive.indices, weights=np.log(positive.data), minlength=self.n_genes)
            n = np.maximum(n, 1)  # a gene without UMI has a total of 0, which makes its factor 1
            factor = np.where(total > 0, total / n, 1.0) / np.exp(log_total / n)
            self.smearing = self.smearing.new_tensor(factor)
        return self

    def loss(self, outputs: Outputs, counts: Tensor) -> dict[str, Tensor]:
        """See `Likelihood.loss`."""
        level, logit = outputs
        expressed = (counts > 0).to(level.dtype)
        if self.level == "lognormal":
            # a count of 0 has no logarithm and does not contribute
            reg = (expressed * 0.5 * (level - counts.clamp(min=1.0).log()).square()).mean()
        else:
            # a rate below exp(-15) gives a count of 1 with the same certainty, and its logarithm still has a gradient here
            level = level.clamp(-MAX_LOG_UMI, MAX_LOG_UMI)
            rate = level.exp()
            # log(exp(rate) - 1) - k log(rate), with the former as rate + log(1 - exp(-rate)), which does not overflow
            reg = (expressed * (rate + torch.log(-torch.expm1(-rate)) - counts * level)).mean()
        return self.weighted_sum(reg, cross_entropy(logit, counts))

    def mean(self, outputs: Outputs) -> Tensor:
        """Mean of a count that is not 0. The soft gate multiplies it by P(expressed)."""
        level = outputs[0]
        if self.level == "lognormal":
            return (level.clamp(max=MAX_LOG_UMI).exp() * self.smearing).clamp(min=1.0)
        rate = level.clamp(-MAX_LOG_UMI, MAX_LOG_UMI).exp()
        return rate / -torch.expm1(-rate)
