"""Match mean and spread in a decorrelated color space (Reinhard et al. 2001)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from prts.preprocess.stains import stains
from prts.preprocess.stains.base import rounded

if TYPE_CHECKING:
    from prts.preprocess.stains.base import Pixels, TissueSample

# RGB to the cones' LMS, and log LMS to the decorrelated space (Reinhard et al. 2001, equations 4 and 6).
_LMS = np.array([[0.3811, 0.5783, 0.0402], [0.1967, 0.7244, 0.0782], [0.0241, 0.1288, 0.8444]])
_LAB = np.diag(1 / np.sqrt([3, 6, 2])) @ np.array([[1, 1, 1], [1, 1, -2], [1, -1, 0]])


@stains.register("reinhard")
class Reinhard:
    """Gives the tissue the mean and standard deviation of the reference in the decorrelated space; glass changes, too.

    Parameters
    ----------
    reference, own
        Statistics of the training section and of this slide: `mean` and `sd`, (3,) each.
    """

    name: ClassVar[str]
    uses: ClassVar[tuple[str, ...]] = ("reinhard",)

    def __init__(self, reference: Mapping[str, Any], own: Mapping[str, Any]) -> None:
        target, source = (
            {key: np.asarray(value) for key, value in side["reinhard"].items()} for side in (reference, own)
        )
        ratio = target["sd"] / np.maximum(source["sd"], 1e-6)
        back = np.linalg.inv(_LAB)
        gray = np.maximum(np.arange(256), 1)
        self._linear = (gray[:, None, None] * _LMS.T[None]).astype(np.float32)
        self._matrix = (back @ np.diag(ratio) @ _LAB).astype(np.float32)
        self._offset = (back @ (target["mean"] - ratio * source["mean"])).astype(np.float32)
        self._back = np.linalg.inv(_LMS).astype(np.float32)

    @staticmethod
    def statistics(sample: TissueSample) -> dict[str, list[float]]:
        """Mean and standard deviation of the decorrelated channels."""
        lab = np.log(np.maximum(sample.tissue, 1) @ _LMS.T) @ _LAB.T
        return {"mean": lab.mean(axis=0).tolist(), "sd": lab.std(axis=0).tolist()}

    def __call__(self, rgb: Pixels) -> Pixels:
        """The pixels in the reference's colors, (..., 3) uint8."""
        # linear in the logarithm of LMS, so the way through the decorrelated space and back is one matrix
        lms = self._linear[rgb[..., 0], 0] + self._linear[rgb[..., 1], 1] + self._linear[rgb[..., 2], 2]
        return rounded(np.exp(np.log(lms) @ self._matrix.T + self._offset) @ self._back.T)
