"""Match the two stains and their amounts (Macenko et al. 2009)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from prts.preprocess.stains import stains
from prts.preprocess.stains.base import MIN_PIXELS, rounded

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from prts.preprocess.stains.base import Pixels, TissueSample


@stains.register("macenko")
class Macenko:
    """Separates the slide's stains, scales their amounts, and renders them in the reference's stains; glass stays white.

    Parameters
    ----------
    reference, own
        Statistics of the training section and of this slide: `stains`, (2, 3) unit vectors of optical density, `amounts`, their
        99th percentiles, (2,), and the color of the glass, `white`.
    """

    name: ClassVar[str]
    uses: ClassVar[tuple[str, ...]] = ("macenko", "white")

    def __init__(self, reference: Mapping[str, Any], own: Mapping[str, Any]) -> None:
        target, source = (
            {key: np.asarray(value) for key, value in side["macenko"].items()} for side in (reference, own)
        )
        scale = target["amounts"] / np.maximum(source["amounts"], 1e-6)
        # from density to density: amounts of the slide's stains, scaled, in the reference's stains
        matrix = np.linalg.pinv(source["stains"]) @ np.diag(scale) @ target["stains"]
        gray = np.log(np.maximum(np.arange(256), 1))
        self._density = np.maximum(np.log(np.asarray(own["white"]))[:, None] - gray, 0.0).astype(np.float32)
        self._matrix = matrix.T.astype(np.float32)
        self._white = np.asarray(reference["white"], np.float32)

    @staticmethod
    def statistics(sample: TissueSample) -> dict[str, list[Any]]:
        """The two stains' vectors and the 99th percentiles of their amounts."""
        vectors = _stain_vectors(sample)
        amounts = _density(sample) @ np.linalg.pinv(vectors)
        return {"stains": vectors.tolist(), "amounts": np.percentile(amounts, 99, axis=0).tolist()}

    def __call__(self, rgb: Pixels) -> Pixels:
        """The pixels in the reference's colors, (..., 3) uint8."""
        density = np.stack([self._density[channel][rgb[..., channel]] for channel in range(3)], axis=-1)
        return rounded(self._white * np.exp(-density @ self._matrix.T))


def _density(sample: TissueSample) -> NDArray[np.float64]:
    """Optical density (natural logarithm) against the slide's own glass."""
    return np.asarray(np.maximum(np.log(sample.white) - np.log(np.maximum(sample.tissue, 1)), 0.0))


def _stain_vectors(sample: TissueSample) -> NDArray[np.float64]:
    """Hematoxylin and eosin, (2, 3) unit vectors: the robust ends of the fan of colors in the plane that contains most of them.

    Steps and constants as in Macenko et al. 2009: density above 0.15, 1st and 99th percentile.
    """
    density = _density(sample)
    dense = density[(density > 0.15).all(axis=1)]
    dense = dense if len(dense) >= MIN_PIXELS else density
    plane = np.linalg.eigh(np.cov(dense.T))[1][:, :0:-1]
    plane *= np.where(plane.sum(axis=0) < 0, -1, 1)
    at = dense @ plane
    ends = np.percentile(np.arctan2(at[:, 1], at[:, 0]), [1, 99])
    vectors = np.abs(np.column_stack([np.cos(ends), np.sin(ends)]) @ plane.T)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    # hematoxylin absorbs more red light than eosin
    return np.asarray(vectors[np.argsort(-vectors[:, 0])])
