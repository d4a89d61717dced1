"""A stain method that gives every slide the same background."""

from typing import ClassVar

import numpy as np

from prts.preprocess.stains import stains


@stains.register("white_point")
class WhitePoint:
    """Scales each channel so that glass has the color that it has in training.

    Parameters
    ----------
    reference, own
        Statistics of the training section and of this slide; `white` is the color of the glass, (3,).
    """

    uses: ClassVar[tuple[str, ...]] = ("white",)  # what decides the colors

    def __init__(self, reference, own) -> None:
        gray = np.arange(256)[:, None] * np.asarray(reference["white"]) / np.asarray(own["white"])
        self._table = np.clip(np.rint(gray), 0, 255).astype(np.uint8)

    @staticmethod
    def statistics(sample):
        """What the bundle keeps of the training tissue; `white` is there anyway."""
        return {}

    def __call__(self, rgb):
        """The pixels, (..., 3) uint8, with the background of training."""
        return np.stack([self._table[rgb[..., channel], channel] for channel in range(3)], axis=-1)
