"""The loss of the paper."""

from __future__ import annotations

from torch import Tensor

from prts.arguments import checked
from prts.errors import ParameterError
from prts.models.likelihoods import likelihoods
from prts.models.likelihoods.base import Outputs, PositiveWeight, Weight, cross_entropy
from prts.models.likelihoods.scaled import ScaledLikelihood, Target


@likelihoods.register("paper")
class Paper(ScaledLikelihood):
    """lambda_1 x weighted squared error + lambda_2 x binary cross-entropy (paper, Methods; defaults are its grid search's optimum).

    Both terms are means over nuclei and genes. The paper sums both over genes, which leaves their ratio the same.

    Parameters
    ----------
    w_0
        Weight of the squared error where no UMI was counted.
    alpha_w
        Weight where at least one was counted; not below `w_0`.
    lambda_1
        Weight of the squared error.
    lambda_2
        Weight of the cross-entropy.
    target
        Scale of the level: `minmax`, `log1p` or `counts`.

    Raises
    ------
    ParameterError
        If a weight is negative or `alpha_w` is below `w_0`.
    """

    @checked("likelihood")
    def __init__(
        self,
        w_0: Weight = 1.0,
        alpha_w: Weight = 5.0,
        lambda_1: PositiveWeight = 1.0,
        lambda_2: Weight = 20.0,
        target: Target = "minmax",
    ) -> None:
        super().__init__(lambda_1, lambda_2, target)
        if alpha_w < w_0:
            raise ParameterError(
                "likelihood",
                "alpha_w",
                f"{alpha_w:g} is below w_0 = {w_0:g}; expressed genes weigh at least as much as the rest",
            )
        self.w_0 = w_0
        self.alpha_w = alpha_w

    def loss(self, outputs: Outputs, counts: Tensor) -> dict[str, Tensor]:
        """See `Likelihood.loss`."""
        level, logit = outputs
        # labels and weights come from the counts: the smallest count and 0 have the same target
        expressed = (counts > 0).to(level.dtype)
        weight = self.w_0 + (self.alpha_w - self.w_0) * expressed
        reg = (weight * (level - self.scaler.transform(counts)).square()).mean()
        return self.weighted_sum(reg, cross_entropy(logit, counts))
