"""The network: features of a nucleus in, the outputs of a likelihood for every gene out."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from prts.arguments import checked
from prts.errors import ParameterError

Width = Annotated[int, Field(ge=1)]


class PRTSNet(nn.Module):
    """Multilayer perceptron with one linear output layer for each output of the likelihood (paper, Methods).

    Parameters
    ----------
    in_features
        Width d of the input.
    n_genes
        Number g of genes.
    hidden
        Widths of the hidden layers; none makes a linear model.
    order
        `paper`: Linear, LeakyReLU, BatchNorm, Dropout. `released`: Linear, BatchNorm, ReLU, Dropout.
    dropout
        Probability of dropping a hidden unit in training.
    heads
        `dual`: one linear layer for each output. `single`: the logit is a_i level_i + b_i with two learned scalars per gene instead, which
        gives the 4.0 million parameters that the paper states.
    standardize
        Whether the input is first centered and scaled by fixed values, set with `set_input_scaling` from training nuclei.
        The paper does not do this.
    rank
        Number of factors that all genes share: a linear layer of this width in front of the output layers, which makes them cheap for many
        genes. None for no such layer (paper).
    outputs
        Names of the outputs, as in `Likelihood.outputs`. The first is the level.

    Raises
    ------
    ParameterError
        If an argument is out of range.

    Examples
    --------
    >>> net = PRTSNet(576, 1820, heads="single")
    >>> level, logit = net(torch.randn(8, 576))
    >>> level.shape
    torch.Size([8, 1820])
    """

    input_mean: Tensor
    input_scale: Tensor
    level: nn.Linear

    @checked("network")
    def __init__(
        self,
        in_features: Width,
        n_genes: Width,
        hidden: Sequence[Width] = (512, 512, 1024, 1024),
        order: Literal["paper", "released"] = "paper",
        dropout: Annotated[float, Field(ge=0, lt=1)] = 0.1,
        heads: Literal["dual", "single"] = "dual",
        standardize: bool = False,
        rank: Width | None = None,
        outputs: Sequence[str] = ("level", "logit"),
    ) -> None:
        super().__init__()
        self.in_features = in_features
        self.n_genes = n_genes
        self.hidden = tuple(hidden)
        self.order = order
        self.dropout = dropout
        self.heads = heads
        self.standardize = standardize
        self.rank = rank
        self.outputs = tuple(outputs)
        if not outputs or outputs[0] != "level" or not all(name.isidentifier() for name in outputs):
            raise ParameterError("network", "outputs", f"{list(outputs)} must be names, of which the first is 'level'")

        widths = (in_features, *self.hidden)
        block = _BLOCKS[order]
        self.body = nn.Sequential(*(block(a, b, self.dropout) for a, b in pairwise(widths)))
        if rank is not None:
            self.factors = nn.Linear(widths[-1], rank)
        for name in self.outputs:
            if name == "logit" and heads == "single":
                self.logit_slope = nn.Parameter(torch.ones(n_genes))
                self.logit_offset = nn.Parameter(torch.zeros(n_genes))
            elif hasattr(self, name):
                raise ParameterError("network", "outputs", f"{name!r} is already in use; choose another name")
            else:
                self.add_module(name, nn.Linear(rank or widths[-1], n_genes))
        if standardize:
            self.register_buffer("input_mean", torch.zeros(in_features))
            self.register_buffer("input_scale", torch.ones(in_features))

    def settings(self) -> dict[str, Any]:
        """The constructor's arguments, JSON-like: `PRTSNet(**net.settings())` has the same shape."""
        return {
            "in_features": self.in_features,
            "n_genes": self.n_genes,
            "hidden": list(self.hidden),
            "order": self.order,
            "dropout": self.dropout,
            "heads": self.heads,
            "standardize": self.standardize,
            **({} if self.rank is None else {"rank": self.rank}),
            "outputs": list(self.outputs),
        }

    def set_input_scaling(self, mean: Tensor, scale: Tensor) -> None:
        """Fix the mean and scale (d,) by which the input is standardized."""
        self.input_mean = mean.to(self.input_mean)
        self.input_scale = scale.to(self.input_scale)

    def start_at(self, level: Tensor) -> None:
        """Start the level of an untrained network around these values (g,)."""
        with torch.no_grad():
            self.level.bias.copy_(level)

    def forward(self, features: Tensor) -> tuple[Tensor, ...]:
        """Predict.

        Parameters
        ----------
        features
            (b, d).

        Returns
        -------
        The outputs in their order, (b, g) each.
        """
        if self.standardize:
            features = (features - self.input_mean) / self.input_scale
        hidden = features
        for number, block in enumerate(self.body):
            hidden = block(hidden) if number or self.standardize else _in_float32(block, hidden)
        if self.rank is not None:
            hidden = self.factors(hidden)
        level = self.level(hidden)
        return level, *(self._output(name, hidden, level) for name in self.outputs[1:])

    def _output(self, name: str, hidden: Tensor, level: Tensor) -> Tensor:
        if name == "logit" and self.heads == "single":
            return self.logit_slope * level + self.logit_offset
        output: Tensor = self.get_submodule(name)(hidden)
        return output


def _in_float32(block: nn.Module, features: Tensor) -> Tensor:
    """A block on raw features without autocast, because bfloat16 has too few digits for a small spread around a large mean."""
    with torch.autocast(features.device.type, enabled=False):
        hidden: Tensor = block(features)
    return hidden


def _paper_block(width_in: int, width_out: int, dropout: float) -> nn.Module:
    return nn.Sequential(
        nn.Linear(width_in, width_out), nn.LeakyReLU(inplace=True), nn.BatchNorm1d(width_out), nn.Dropout(dropout)
    )


def _released_block(width_in: int, width_out: int, dropout: float) -> nn.Module:
    return nn.Sequential(
        nn.Linear(width_in, width_out), nn.BatchNorm1d(width_out), nn.ReLU(inplace=True), nn.Dropout(dropout)
    )


_BLOCKS = {"paper": _paper_block, "released": _released_block}
