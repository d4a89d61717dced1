"""Losses over level and "expressed or not". Labels and weights always come from raw counts, never from scaled targets.

A loss is called with level, logit, target and counts, each (b, g), and returns scalars: `loss`, which training minimises, and its parts
`reg` and `bin` before their weights lambda_1 and lambda_2.

| loss | the level is | targets | gates | X, the expected UMI |
|---|---|---|---|---|
| paper, released | the scaled count | minmax, log1p, counts | none, soft, hard | the level scaled back, then the gate |
| poisson | the log of the expected UMI | log_rate | none | exp(level) |
| poisson, offset=library | the log of the gene's share of the panel's UMI | log_share | none | the share times the mean training depth |
| hurdle | the log rate of a Poisson count that is known not to be 0 | log_truncated | soft | P(expressed) times the mean of such a count |
| hurdle, level=lognormal | the mean log of a count that is not 0 | log_positive | soft | P(expressed) times the mean of such a count |
"""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prts.data.targets import MAX_LOG_UMI, SCALED
from prts.errors import InputError


class Loss(nn.Module):
    """What every loss offers.

    Parameters
    ----------
    lambda_1
        Weight of the level's term.
    lambda_2
        Weight of the term of "expressed or not".
    """

    heads: ClassVar[tuple[str, ...]] = ("dual", "single")
    """Kinds of heads it can train."""

    gates: ClassVar[tuple[str, ...]] = ("none", "soft", "hard")
    """Gates after which X is an expected UMI; the first one needs no choosing while training goes on."""

    def __init__(self, lambda_1: float, lambda_2: float) -> None:
        super().__init__()
        _refuse_negative(lambda_1=lambda_1, lambda_2=lambda_2)
        self.lambda_1 = lambda_1
        self.lambda_2 = lambda_2

    @property
    def targets(self) -> tuple[str, ...]:
        """Values of `data.target` whose level it can train; the first is the usual one."""
        return tuple(SCALED)

    def forward(self, level: Tensor, logit: Tensor, target: Tensor, counts: Tensor) -> dict[str, Tensor]:
        """Loss of a batch; see the module."""
        raise NotImplementedError

    def _parts(self, reg: Tensor, binary: Tensor) -> dict[str, Tensor]:
        return {"loss": self.lambda_1 * reg + self.lambda_2 * binary, "reg": reg, "bin": binary}


def check_recipe(loss: Loss, *, target: str = "auto", heads: str = "dual", gate: str = "auto") -> str:
    """Refuse a loss together with a target, heads or a gate that make no sense beside it.

    Parameters
    ----------
    loss
        The loss.
    target
        `data.target`; `auto` is the loss's usual one.
    heads
        `model.net.heads`.
    gate
        `model.output.gate`; `auto` is among the loss's own.

    Returns
    -------
    The target, never `auto`.

    Raises
    ------
    InputError
        If the combination makes no sense, with the reason.
    """
    name = type(loss).__name__.removesuffix("Loss").lower()
    if target != "auto" and target not in loss.targets:
        raise InputError(
            f"data.target: {target!r} does not go with loss={name}, whose level is {_LEVELS[loss.targets[0]]}; "
            f"use auto or {' or '.join(loss.targets)}"
        )
    if heads not in loss.heads:
        raise InputError(
            f"model.net.heads: {heads!r} does not go with loss={name}, which fits P(expressed) and the level of what is expressed "
            f"apart; use {' or '.join(loss.heads)}"
        )
    if gate != "auto" and gate not in loss.gates:
        raise InputError(
            f"model.output.gate: {gate!r} does not go with loss={name}: only gate={' or '.join(loss.gates)} makes its X the expected "
            "UMI; use auto"
        )
    if loss.lambda_1 == 0:
        raise InputError("loss.lambda_1: 0 leaves the level untrained; give it a positive weight")
    if loss.lambda_2 == 0 and heads == "dual":
        raise InputError(
            "loss.lambda_2: 0 leaves the second head untrained, and P(expressed) without meaning; use model.net.heads=single, which "
            "reads P(expressed) from the level, or a positive weight"
        )
    return loss.targets[0] if target == "auto" else target


class PaperLoss(Loss):
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
        super().__init__(lambda_1, lambda_2)
        _refuse_negative(w_0=w_0, alpha_w=alpha_w)
        if alpha_w < w_0:
            raise InputError(
                f"loss.alpha_w: {alpha_w:g} is below w_0 = {w_0:g}; expressed genes weigh at least as much as the rest"
            )
        self.w_0 = w_0
        self.alpha_w = alpha_w

    def forward(self, level: Tensor, logit: Tensor, target: Tensor, counts: Tensor) -> dict[str, Tensor]:
        """Loss of a batch; see the module."""
        expressed = (counts > 0).to(level.dtype)
        weight = self.w_0 + (self.alpha_w - self.w_0) * expressed
        reg = (weight * (level - target).square()).mean()
        binary = F.binary_cross_entropy_with_logits(logit, expressed)
        return self._parts(reg, binary)


class ReleasedLoss(Loss):
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
        super().__init__(lambda_1, lambda_2)
        _refuse_negative(alpha=alpha, gamma=gamma)
        if alpha > 1:
            raise InputError(f"loss.alpha: {alpha:g} must lie between 0 and 1")
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
        return self._parts(reg, focal)


class PoissonLoss(Loss):
    """lambda_1 x Poisson deviance of the counts under a log link + lambda_2 x binary cross-entropy (ours).

    Without offset the network predicts the log of the expected UMI, depth and all. With `offset=library` the log of the nucleus's measured
    UMI over the panel is added in training, so that the network learns what share each gene has, not how deep the nucleus was read; X is
    then the expected UMI of a nucleus of the mean training depth. Depth depends on what the image shows (size, type), so without offset
    log1p UMI is predicted better.

    Parameters
    ----------
    lambda_1
        Weight of the likelihood: the mean over nuclei and genes of mu - k log mu, which is the negative log-likelihood up to a term of
        the counts alone.
    lambda_2
        Weight of the cross-entropy.
    offset
        `none` or `library`.

    Raises
    ------
    InputError
        If a weight is negative or the offset unknown.
    """

    gates = ("none",)

    def __init__(self, lambda_1: float = 1.0, lambda_2: float = 1.0, offset: str = "none") -> None:
        super().__init__(lambda_1, lambda_2)
        if offset not in ("none", "library"):
            raise InputError(f"loss.offset: {offset!r} is not one of none, library")
        self.offset = offset

    @property
    def targets(self) -> tuple[str, ...]:
        """The target whose level has the meaning that the offset gives it."""
        return ("log_rate",) if self.offset == "none" else ("log_share",)

    def forward(self, level: Tensor, logit: Tensor, target: Tensor, counts: Tensor) -> dict[str, Tensor]:
        """Loss of a batch; see the module."""
        level = level.clamp(max=MAX_LOG_UMI)
        depth = counts.sum(dim=1, keepdim=True) if self.offset == "library" else 1.0
        # k log(depth) is left out of k log mu: it depends on the counts alone, and a nucleus of depth 0 then needs no special case
        reg = (depth * level.exp() - counts * level).mean()
        return self._parts(reg, F.binary_cross_entropy_with_logits(logit, (counts > 0).to(level.dtype)))


class HurdleLoss(Loss):
    """lambda_1 x likelihood of how much is expressed + lambda_2 x binary cross-entropy of whether (hurdle model, Mullahy 1986).

    Whether a gene has any UMI and how many it then has are fitted apart. `level=poisson`: the level is the log rate lambda of a Poisson
    count k that is known not to be 0, with P(k) = lambda^k exp(-lambda) / (k! (1 - exp(-lambda))); X = P(expressed) lambda / (1 -
    exp(-lambda)). `level=lognormal`: log k of an expressed pair is normal around the level, of variance 1; X = P(expressed) times the mean
    of such a count (`prts.data.targets.LogPositive`).

    Parameters
    ----------
    lambda_1
        Weight of the likelihood: the sum over expressed pairs of lambda + log(1 - exp(-lambda)) - k log lambda, or of half the squared
        error of log k, over the number of all pairs, so that with equal weights both terms add up to the likelihood of the whole model.
    lambda_2
        Weight of the cross-entropy.
    level
        `poisson` or `lognormal`.

    Raises
    ------
    InputError
        If a weight is negative or the level unknown.
    """

    heads = ("dual",)
    gates = ("soft",)

    def __init__(self, lambda_1: float = 1.0, lambda_2: float = 1.0, level: str = "poisson") -> None:
        super().__init__(lambda_1, lambda_2)
        if level not in ("poisson", "lognormal"):
            raise InputError(f"loss.level: {level!r} is not one of poisson, lognormal")
        self.level = level

    @property
    def targets(self) -> tuple[str, ...]:
        """The one target whose level is what the likelihood takes it for."""
        return ("log_truncated",) if self.level == "poisson" else ("log_positive",)

    def forward(self, level: Tensor, logit: Tensor, target: Tensor, counts: Tensor) -> dict[str, Tensor]:
        """Loss of a batch; see the module."""
        expressed = (counts > 0).to(level.dtype)
        if self.level == "lognormal":
            # a count of 0 has no logarithm and no share in the sum
            reg = (expressed * 0.5 * (level - counts.clamp(min=1.0).log()).square()).mean()
        else:
            # a smaller rate than exp(-15) is a count of 1 with the same certainty, and its logarithm still has a gradient here
            level = level.clamp(-MAX_LOG_UMI, MAX_LOG_UMI)
            rate = level.exp()
            # log(exp(rate) - 1) - k log(rate), where rate + log(1 - exp(-rate)) is the former without overflow
            reg = (expressed * (rate + torch.log(-torch.expm1(-rate)) - counts * level)).mean()
        return self._parts(reg, F.binary_cross_entropy_with_logits(logit, expressed))


def _refuse_negative(**weights: float) -> None:
    for name, weight in weights.items():
        if weight < 0:
            raise InputError(f"loss.{name}: {weight:g} is negative")


_LEVELS = {
    "minmax": "the scaled count",
    "log_rate": "the log of the expected UMI",
    "log_share": "the log of the gene's share of the panel's UMI",
    "log_truncated": "the log rate of a zero-truncated Poisson count",
    "log_positive": "the mean log of a count that is not 0",
}
