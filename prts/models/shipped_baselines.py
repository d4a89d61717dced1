"""Linear baselines of a run, small enough to be stored in its bundle, so that any later prediction can be compared with them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from prts.models.ridge import LinearBaseline


class ShippedBaselines(nn.Module):
    """Fitted linear maps from features to log1p UMI, as tensors.

    Parameters
    ----------
    widths
        Number of features of each baseline by name; 0 for the gene mean.
    n_genes
        Number g of genes.
    """

    def __init__(self, widths: Mapping[str, int], n_genes: int) -> None:
        super().__init__()
        self.widths = dict(widths)
        for name, width in self.widths.items():
            self.register_buffer(f"{name}_weights", torch.zeros(width, n_genes))
            self.register_buffer(f"{name}_intercept", torch.zeros(n_genes))

    @classmethod
    def from_fitted(cls, fitted: Mapping[str, LinearBaseline]) -> Self:
        """Create from fitted baselines of the same genes."""
        n_genes = len(next(iter(fitted.values())).intercept)
        shipped = cls({name: len(baseline.weights) for name, baseline in fitted.items()}, n_genes)
        for name, baseline in fitted.items():
            shipped._tensor(name, "weights").copy_(torch.from_numpy(baseline.weights))
            shipped._tensor(name, "intercept").copy_(torch.from_numpy(baseline.intercept))
        return shipped

    def predict(self, name: str, features: NDArray[np.float32]) -> NDArray[np.float32]:
        """Expected UMI (n, g) of one baseline from its features (n, d)."""
        weights, intercept = (self._tensor(name, part).cpu().numpy() for part in ("weights", "intercept"))
        return LinearBaseline(weights, intercept).predict(features)

    def _tensor(self, name: str, part: str) -> Tensor:
        return self.get_buffer(f"{name}_{part}")
