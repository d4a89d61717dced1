"""Match the mean and spread of a slide's features to training, since stain and scanner shift the features of a whole slide.

Each feature of a slide is shifted and scaled, so that its mean and standard deviation over all nuclei of the slide are those of training
nuclei. What is common to a slide is lost: stain and thickness, but also a composition of cell types that differs from training.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from prts.data.nucleus_set import feature_moments

if TYPE_CHECKING:
    from prts.data.nucleus_set import NucleusSet

    Floats = NDArray[np.float32]

FEWEST = 1000
"""Nuclei below which a slide's own mean and spread are too uncertain, or too much those of one kind of tissue."""

SAMPLE = 4000
"""Nuclei from all over a slide that stand for it where only a region is predicted."""

_CHUNK = 4096


def sample_of_slide(n: int) -> NDArray[np.intp]:
    """Rows of `SAMPLE` of the n nuclei of a slide, evenly spaced in their order, or of all if there are fewer."""
    return np.unique(np.linspace(0, n - 1, min(n, SAMPLE)).astype(np.intp))


class SlideMoments(NamedTuple):
    """Mean and standard deviation (d,) of a slide's features, as distances from the training mean in training standard deviations."""

    mean: NDArray[np.float64]
    spread: NDArray[np.float64]


class SlideScale(nn.Module):
    """The mean and spread to which the features of every slide are matched, those of the training nuclei.

    Parameters
    ----------
    n_features
        Width d of the network's input.
    """

    mean: Tensor
    spread: Tensor

    def __init__(self, n_features: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(n_features))
        self.register_buffer("spread", torch.ones(n_features))

    @classmethod
    def fit(cls, train: Sequence[NucleusSet]) -> Self:
        """Find them from the nuclei of the training sections."""
        mean, spread = feature_moments(train)
        found = cls(len(mean))
        found.mean, found.spread = (torch.from_numpy(part.astype(np.float32)) for part in (mean, spread))
        return found

    def moments(self, parts: Iterable[Floats]) -> SlideMoments:
        """Mean and spread of a slide.

        Parameters
        ----------
        parts
            Features of all its nuclei, (b, d) each.
        """
        n, total, squares = 0, np.zeros(len(self.mean)), np.zeros(len(self.mean))
        for part in parts:
            for start in range(0, len(part), _CHUNK):
                z = self._distance(part[start : start + _CHUNK])
                n, total, squares = n + len(z), total + z.sum(axis=0), squares + np.square(z).sum(axis=0)
        mean = total / n
        spread = np.sqrt(np.maximum(squares / n - np.square(mean), 0.0))
        # rounding of a feature that is constant on this slide does not count as spread
        spread[spread <= 1e-5 * (1.0 + np.abs(mean))] = 1.0
        return SlideMoments(mean, spread)

    def match(self, features: Floats, slide: SlideMoments) -> Floats:
        """Features (n, d) of nuclei of a slide with the mean and spread of training, in place."""
        middle, spread = (part.cpu().numpy().astype(np.float64) for part in (self.mean, self.spread))
        for start in range(0, len(features), _CHUNK):
            rows = slice(start, start + _CHUNK)
            features[rows] = middle + spread * (self._distance(features[rows]) - slide.mean) / slide.spread
        return features

    def unmatched(self, features: Floats, slide: SlideMoments) -> Floats:
        """The inverse of `match`, as a copy: features (n, d) as they were read."""
        middle, spread = (part.cpu().numpy().astype(np.float64) for part in (self.mean, self.spread))
        return (middle + spread * (self._distance(features) * slide.spread + slide.mean)).astype(np.float32)

    def _distance(self, features: Floats) -> NDArray[np.float64]:
        distance: NDArray[np.float64] = (
            features - self.mean.cpu().numpy().astype(np.float64)
        ) / self.spread.cpu().numpy()
        return distance


@dataclass(frozen=True)
class AsRead:
    """Matched features (n, d) of a slide as they were read: `features[rows]` computes them.

    Parameters
    ----------
    features
        Matched.
    scale, slide
        What they were matched with.
    """

    features: Floats
    scale: SlideScale
    slide: SlideMoments

    def __len__(self) -> int:
        return len(self.features)

    def __getitem__(self, rows: slice) -> Floats:
        return self.scale.unmatched(self.features[rows], self.slide)
