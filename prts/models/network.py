"""The network: features of a nucleus in, expression level and "expressed or not" of every gene out."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from prts.errors import InputError


class PRTSNet(nn.Module):
    """Multilayer perceptron with two outputs per gene (paper, Methods).

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
        `dual`: a linear layer for the level and one for the logit (the loss needs both). `single`: one linear layer gives the level,
        and the logit is a_i level_i + b_i with two learned scalars per gene: the 4.0 million parameters that the paper states.
    standardize
        Whether the input is first centred and scaled by fixed values, set with `set_input_scaling` from training nuclei.
        The paper does not.

    Raises
    ------
    InputError
        For an unknown order or kind of heads, or widths that are no positive numbers.
    """

    input_mean: Tensor
    input_scale: Tensor

    def __init__(
        self,
        in_features: int,
        n_genes: int,
        hidden: Sequence[int] = (512, 512, 1024, 1024),
        order: str = "paper",
        dropout: float = 0.1,
        heads: str = "dual",
        standardize: bool = False,
    ) -> None:
        super().__init__()
        if order not in _BLOCKS:
            raise InputError(f"model.net.order: {order!r} is not one of {', '.join(_BLOCKS)}")
        if heads not in ("dual", "single"):
            raise InputError(f"model.net.heads: {heads!r} is not one of dual, single")
        if any(width < 1 for width in hidden):
            raise InputError(f"model.net.hidden: {list(hidden)} must list one positive width per hidden layer")
        if not 0 <= dropout < 1:
            raise InputError(f"model.net.dropout: {dropout} must lie in [0, 1)")
        self.in_features = in_features
        self.n_genes = n_genes
        self.hidden = tuple(int(width) for width in hidden)
        self.order = order
        self.dropout = float(dropout)
        self.heads = heads
        self.standardize = bool(standardize)

        widths = (in_features, *self.hidden)
        block = _BLOCKS[order]
        self.body = nn.Sequential(*(block(a, b, self.dropout) for a, b in pairwise(widths)))
        self.level = nn.Linear(widths[-1], n_genes)
        if heads == "dual":
            self.logit = nn.Linear(widths[-1], n_genes)
        else:
            self.logit_slope = nn.Parameter(torch.ones(n_genes))
            self.logit_offset = nn.Parameter(torch.zeros(n_genes))
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
        }

    def set_input_scaling(self, mean: Tensor, scale: Tensor) -> None:
        """Fix the mean and scale (d,) by which the input is standardised."""
        self.input_mean = mean.to(self.input_mean)
        self.input_scale = scale.to(self.input_scale)

    def start_at(self, level: Tensor) -> None:
        """Let the level of an untrained network lie around these values (g,)."""
        with torch.no_grad():
            self.level.bias.copy_(level)

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Predict.

        Parameters
        ----------
        features
            (b, d).

        Returns
        -------
        Level (b, g) on the scale of the targets, and logit (b, g) of "at least one UMI".
        """
        if self.standardize:
            features = (features - self.input_mean) / self.input_scale
        hidden = features
        for number, block in enumerate(self.body):
            hidden = block(hidden) if number or self.standardize else _in_float32(block, hidden)
        level = self.level(hidden)
        logit = self.logit(hidden) if self.heads == "dual" else self.logit_slope * level + self.logit_offset
        return level, logit


def _in_float32(block: nn.Module, features: Tensor) -> Tensor:
    """A block on raw features, whatever autocast says: bfloat16 has too few digits for a small spread on a large mean."""
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
