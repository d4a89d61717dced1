"""The loss of the released code."""

from __future__ import annotations

from typing import Annotated

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from prts.arguments import checked
from prts.models.likelihoods import likelihoods
from prts.models.likelihoods.base import Outputs, PositiveWeight, Weight
from prts.models.likelihoods.scaled import ScaledLikelihood, Target


@likelihoods.register("released")
class Released(ScaledLikelihood):
    """lambda_1 x squared error over expressed pairs + lambda_2 x focal loss (released code).

    The squared error is the mean over the (nucleus, gene) pairs with at least one UMI. The focal loss (Lin et al. 2017, equation 5) is the
    mean over all pairs of -alpha_t (1 - p_t)^gamma log p_t.

    Parameters
    ----------
    lambda_1
        Weight of the squared error.
    lambda_2
        Weight of the focal loss.
    alpha
        Focal weight of expressed pairs; the others get 1 - alpha.
    gamma
        Focusing exponent.
    target
        Scale of the level: `minmax`, `log1p` or `counts`.

    Raises
    ------
    ParameterError
        If a weight is negative or `alpha` is not in [0, 1].
    """

    @checked("likelihood")
    def __init__(
        self,
        lambda_1: PositiveWeight = 30.0,
        lambda_2: Weight = 1.0,
        alpha: Annotated[float, Field(ge=0, le=1)] = 0.7,
        gamma: Weight = 2.0,
        target: Target = "minmax",
    ) -> None:
        super().__init__(lambda_1, lambda_2, target)
        self.alpha = alpha
        self.gamma = gamma

    def loss(self, outputs: Outputs, counts: Tensor) -> dict[str, Tensor]:
        """See `Likelihood.loss`."""
        level, logit = outputs
        expressed = (counts > 0).to(level.dtype)
        # a batch without expressed pairs has no squared error
        squared = (level - self.scaler.transform(counts)).square()
        reg = (expressed * squared).sum() / expressed.sum().clamp(min=1.0)
        entropy = F.binary_cross_entropy_with_logits(logit, expressed, reduction="none")
        p_other = (logit * (1.0 - 2.0 * expressed)).sigmoid()  # 1 - p_t without cancellation
        share = (1.0 - self.alpha) + (2.0 * self.alpha - 1.0) * expressed
        focal = (share * p_other**self.gamma * entropy).mean()
        return self.weighted_sum(reg, focal)
