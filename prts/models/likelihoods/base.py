"""The interface of a likelihood."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Self

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from prts.errors import ParameterError

MAX_LOG_UMI = 15.0
"""No nucleus has more UMI than exp(15) = 3.3 million. Keeps exponentials of an untrained network's output finite."""

Outputs = Sequence[Tensor]
"""The network's outputs, one (b, g) tensor for each name in `Likelihood.outputs`."""

Weight = Annotated[float, Field(ge=0, allow_inf_nan=False)]
PositiveWeight = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class Likelihood(nn.Module):
    """Explains UMI counts by the network's outputs: the loss for training and the expected UMI for prediction.

    A subclass implements `loss` and `mean`, and stores every constructor argument as an attribute of the same name. Per-gene values that it
    learns are buffers or parameters created in `allocate`, so that they move to the device and into the bundle with the network. Parameters
    are trained along with the network.

    Parameters
    ----------
    lambda_1
        Weight of the term for the level. Positive, or nothing would train the level.
    lambda_2
        Weight of the term for "expressed or not".

    Attributes
    ----------
    outputs
        Names of the network's outputs, one linear layer each. The first is the level.
    allowed_heads
        Values of the network's `heads` that it can train.
    allowed_gates
        Gates after which the prediction is still an expected UMI. Training reports scores with the first.
    target
        Name of the scale that the level is on.
    start
        Level (g,) of each gene's mean, set by `fit` where known. A network that starts there need not spend its first epochs on learning
        that rare genes are rare.

    Examples
    --------
    >>> import torch
    >>> from prts.models.likelihoods import likelihoods
    >>> poisson = likelihoods["poisson"]()
    >>> level = torch.log(torch.tensor([[1.0, 4.0]]))
    >>> poisson.mean((level, torch.zeros(1, 2)))
    tensor([[1., 4.]])
    """

    name: ClassVar[str]
    outputs: ClassVar[tuple[str, ...]] = ("level", "logit")
    allowed_heads: ClassVar[tuple[str, ...]] = ("dual", "single")
    allowed_gates: ClassVar[tuple[str, ...]] = ("none", "soft", "hard")

    target: str = "counts"
    start: Tensor | None = None

    def __init__(self, lambda_1: float = 1.0, lambda_2: float = 1.0) -> None:
        super().__init__()
        self.lambda_1 = lambda_1
        self.lambda_2 = lambda_2
        self.n_genes = 0

    @property
    def n_outputs(self) -> int:
        """Number of outputs per gene."""
        return len(self.outputs)

    @property
    def targets(self) -> tuple[str, ...]:
        """Values of `target` that it can train."""
        return (self.target,)

    def settings(self) -> dict[str, Any]:
        """Registered name and constructor arguments, JSON-like."""
        arguments = list(inspect.signature(type(self).__init__).parameters)[1:]
        return {"name": self.name} | {name: getattr(self, name) for name in arguments}

    def with_target(self, target: str) -> Likelihood:
        """The same likelihood with another target, not fitted.

        Parameters
        ----------
        target
            One of `targets`, or `auto` to keep its own.

        Raises
        ------
        ParameterError
            If it cannot train that target.
        """
        if target not in ("auto", *self.targets):
            raise ParameterError("data", "target", self._refusal(target, ("auto", *self.targets)))
        return self

    def require(self, *, heads: str = "dual", gate: str = "auto") -> None:
        """Check that it works with a network and a gate.

        Parameters
        ----------
        heads
            The `heads` of the network.
        gate
            The gate of the output, or `auto`.

        Raises
        ------
        ParameterError
            If it does not.
        """
        if heads not in self.allowed_heads:
            raise ParameterError("network", "heads", self._refusal(heads, self.allowed_heads))
        if gate not in ("auto", *self.allowed_gates):
            raise ParameterError("output", "gate", self._refusal(gate, ("auto", *self.allowed_gates)))
        if heads == "dual" and self.lambda_2 == 0 and "logit" in self.outputs:
            raise ParameterError(
                "likelihood",
                "lambda_2",
                "0 leaves the second head untrained; use a positive weight, or set `heads` to single",
            )

    def _refusal(self, value: str, allowed: Sequence[str]) -> str:
        return f"{value!r} does not go with the {self.name} likelihood; use {' or '.join(allowed)}"

    def allocate(self, n_genes: int) -> Self:
        """Create the per-gene buffers and parameters, for example before the tensors of a bundle are loaded."""
        self.n_genes = n_genes
        return self

    def fit(self, counts: Sequence[Any]) -> Self:
        """Learn from training counts before training starts.

        Parameters
        ----------
        counts
            CSR matrices (n, g) of raw UMI, one per section.
        """
        return self.allocate(counts[0].shape[1])

    def loss(self, outputs: Outputs, counts: Tensor) -> dict[str, Tensor]:
        """Loss of a batch.

        Parameters
        ----------
        outputs
            The network's outputs, float32, (b, g) each.
        counts
            Raw UMI, float32, (b, g).

        Returns
        -------
        Scalars to log. Training minimizes `loss`.
        """
        raise NotImplementedError

    @property
    def takes_exposure(self) -> bool:
        """Whether `exposed` is implemented."""
        return False

    def exposed(self, outputs: Outputs, exposure: Tensor) -> Outputs:
        """The outputs for nuclei whose expected UMIs are multiplied by an exposure, for the loss.

        Parameters
        ----------
        outputs
            The network's outputs, (b, g) each.
        exposure
            (b, 1), positive.
        """
        raise NotImplementedError

    def mean(self, outputs: Outputs) -> Tensor:
        """Expected UMI before the gate, (b, g), never negative."""
        raise NotImplementedError

    def prob(self, outputs: Outputs) -> Tensor:
        """P(at least one UMI), (b, g), from the output `logit`. Override it for a likelihood without one."""
        return outputs[self.outputs.index("logit")].sigmoid()

    def weighted_sum(self, reg: Tensor, binary: Tensor) -> dict[str, Tensor]:
        """Loss of a likelihood with two terms: their weighted sum, and the terms for the log."""
        return {"loss": self.lambda_1 * reg + self.lambda_2 * binary, "reg": reg, "bin": binary}


def cross_entropy(logit: Tensor, counts: Tensor) -> Tensor:
    """Mean binary cross-entropy of "at least one UMI"."""
    return F.binary_cross_entropy_with_logits(logit, (counts > 0).to(logit.dtype))
