"""Losses over level and "expressed or not". Labels and weights always come from raw counts, never from scaled targets.

A loss is called with level, logit, target and counts, each (b, g), and returns scalars: `loss`, which training minimises, and its parts
`reg` and `bin` before their weights.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from prts.errors import InputError


class PaperLoss(nn.Module):
    """lambda_1 x weighted squared error + lambda_2 x binary cross-entropy (paper, Methods; defaults are its grid search's optimum).

    Both terms are means over nuclei and genes. The paper sums both over genes, which leaves their ratio the same.

    Parameters
    ----------
    w_0
        Weight of the squared error where no UMI was counted.
    alpha_w
        Weight where at least one was; not below `w_0`.
    lambda_1
        Weight of the squared error.
    lambda_2
        Weight of the cross-entropy.

    Raises
    ------
    InputError
        If a weight is negative or `alpha_w` is below `w_0`.
    """

    def __init__(self, w_0: float = 1.0, alpha_w: float = 5.0, lambda_1: float = 1.0, lambda_2: float = 20.0) -> None:
        super().__init__()
        _refuse_negative(w_0=w_0, alpha_w=alpha_w, lambda_1=lambda_1, lambda_2=lambda_2)
        if alpha_w < w_0:
            raise InputError(
                f"loss.alpha_w: {alpha_w:g} is below w_0 = {w_0:g}; expressed genes weigh at least as much as the rest"
            )
        self.w_0 = w_0
        self.alpha_w = alpha_w
        self.lambda_1 = lambda_1
        self.lambda_2 = lambda_2

    def forward(self, level: Tensor, logit: Tensor, target: Tensor, counts: Tensor) -> dict[str, Tensor]:
        """Loss of a batch; see the module."""
        expressed = (counts > 0).to(level.dtype)
        weight = self.w_0 + (self.alpha_w - self.w_0) * expressed
        reg = (weight * (level - target).square()).mean()
        binary = F.binary_cross_entropy_with_logits(logit, expressed)
        return {"loss": self.lambda_1 * reg + self.lambda_2 * binary, "reg": reg, "bin": binary}


class ReleasedLoss(nn.Module):
    """lambda_1 x squared error over expressed pairs only + lambda_2 x focal loss (released code).

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

    Raises
    ------
    InputError
        If a weight is negative or `alpha` is no share.
    """

    def __init__(self, lambda_1: float = 30.0, lambda_2: float = 1.0, alpha: float = 0.7, gamma: float = 2.0) -> None:
        super().__init__()
        _refuse_negative(lambda_1=lambda_1, lambda_2=lambda_2, alpha=alpha, gamma=gamma)
        if alpha > 1:
            raise InputError(f"loss.alpha: {alpha:g} must lie between 0 and 1")
        self.lambda_1 = lambda_1
        self.lambda_2 = lambda_2
        self.alpha = alpha
        self.gamma = gamma

    def forward(self, level: Tensor, logit: Tensor, target: Tensor, counts: Tensor) -> dict[str, Tensor]:
        """Loss of a batch; see the module."""
        expressed = (counts > 0).to(level.dtype)
        # a batch without any expressed pair has no squared error
        reg = (expressed * (level - target).square()).sum() / expressed.sum().clamp(min=1.0)
        entropy = F.binary_cross_entropy_with_logits(logit, expressed, reduction="none")
        p_other = (logit * (1.0 - 2.0 * expressed)).sigmoid()  # 1 - p_t without cancellation
        share = (1.0 - self.alpha) + (2.0 * self.alpha - 1.0) * expressed
        focal = (share * p_other**self.gamma * entropy).mean()
        return {"loss": self.lambda_1 * reg + self.lambda_2 * focal, "reg": reg, "bin": focal}


def _refuse_negative(**weights: float) -> None:
    for name, weight in weights.items():
        if weight < 0:
            raise InputError(f"loss.{name}: {weight:g} is negative")
