"""Pearson correlation per gene from batches, without storing the predictions."""

from __future__ import annotations

import torch
from torch import Tensor


class GenePearson:
    """Running means, squares and products of two (n, g) arrays that come in batches.

    Batches are centered on their own mean and merged (Chan et al. 1983), which avoids cancellation. Sums are in float64 where the device
    supports it.
    """

    def __init__(self) -> None:
        self._n = 0.0
        # rows: mean of x, mean of y, then the sums of (x - mean)^2, (y - mean)^2 and (x - mean)(y - mean)
        self._state: Tensor | None = None

    @property
    def state(self) -> tuple[float, Tensor]:
        """Number of rows and (5, g) running values, to merge with another process's."""
        if self._state is None:
            raise RuntimeError("GenePearson has seen no batch")
        return self._n, self._state

    def update(self, x: Tensor, y: Tensor) -> None:
        """Add a batch, both (b, g); b may be 0."""
        wide = torch.float32 if x.device.type == "mps" else torch.float64
        if len(x) == 0:
            self.merge(0.0, torch.zeros((5, x.shape[1]), dtype=wide, device=x.device))
            return
        mean = torch.stack([x.mean(0), y.mean(0)])
        x, y = x - mean[0], y - mean[1]
        sums = torch.stack([x.square().sum(0), y.square().sum(0), (x * y).sum(0)])
        self.merge(float(len(x)), torch.cat([mean, sums]).to(wide))

    def merge(self, n: float, state: Tensor) -> None:
        """Add another accumulator's `state`."""
        if self._state is None or self._n == 0:
            self._n, self._state = n, state.clone()
            return
        if n == 0:
            return
        both = self._n + n
        shift = state[:2] - self._state[:2]
        self._state[:2] += shift * (n / both)
        self._state[2:] += state[2:] + torch.stack([shift[0].square(), shift[1].square(), shift[0] * shift[1]]) * (
            self._n * n / both
        )
        self._n = both

    def compute(self) -> Tensor:
        """Correlation (g,): NaN where y is constant, 0 where only x is (a gene that the model cannot emit)."""
        n, (mean_x, mean_y, xx, yy, xy) = self.state
        correlation: Tensor = xy / (xx * yy).sqrt().clamp(min=torch.finfo(xy.dtype).tiny)
        correlation = correlation.clamp(-1.0, 1.0).masked_fill(_is_constant(xx, mean_x, n), 0.0)
        return correlation.masked_fill(_is_constant(yy, mean_y, n), torch.nan)


def _is_constant(squares: Tensor, mean: Tensor, n: float) -> Tensor:
    """Whether the spread is no more than the rounding of float32 values about their mean."""
    return torch.le((squares / n).sqrt(), 1e-6 * mean.abs())
