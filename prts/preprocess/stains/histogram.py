"""Match the percentiles of each color channel."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from prts.preprocess.stains import stains

if TYPE_CHECKING:
    from prts.preprocess.stains.base import Pixels, TissueSample

_PERCENTILES = np.r_[0.1, 0.5, np.arange(1, 100), 99.5, 99.9]


@stains.register("histogram")
class Histogram:
    """Maps the tissue's percentiles to those of the reference, channel by channel; glass and black are unchanged.

    Parameters
    ----------
    reference, own
        Statistics of the training section and of this slide: percentiles of each channel, (3, 103).
    """

    name: ClassVar[str]
    uses: ClassVar[tuple[str, ...]] = ("histogram",)

    def __init__(self, reference: Mapping[str, Any], own: Mapping[str, Any]) -> None:
        levels = np.arange(256)
        self._table = np.empty((3, 256), np.uint8)
        for channel, (source, target) in enumerate(zip(own["histogram"], reference["histogram"], strict=True)):
            source, first = np.unique(np.maximum.accumulate(source), return_index=True)
            target = np.asarray(target)[first]
            inner = (source > 0) & (source < 255)
            x, y = np.r_[0, source[inner], 255], np.r_[0, target[inner], 255]
            self._table[channel] = np.rint(np.interp(levels, x, y))

    @staticmethod
    def statistics(sample: TissueSample) -> list[list[float]]:
        """Percentiles of each channel, (3, 103)."""
        found: list[list[float]] = np.percentile(sample.tissue, _PERCENTILES, axis=0).T.round(2).tolist()
        return found

    def __call__(self, rgb: Pixels) -> Pixels:
        """The pixels in the reference's colors, (..., 3) uint8."""
        return np.stack([self._table[channel][rgb[..., channel]] for channel in range(3)], axis=-1)
