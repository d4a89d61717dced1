"""Views of a section: its image as it would look in another stain, on another scanner, or placed otherwise on the slide.

Training reads the features of a few views besides those of the unchanged image, so that a network learns what a change of laboratory
does to them. A view is turned or mirrored, its hematoxylin and eosin are jittered, and it is brighter or darker, out of focus, and of
slightly larger or smaller nuclei. Everything that reads a section reads a view, since a view is a section, too.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter
from scipy.stats import qmc
from skimage.color import hed_from_rgb, rgb_from_hed

from prts.io.optical_density import OPTICAL_DENSITY, is_black
from prts.io.orientation import FLIP, ROTATE, Orientation
from prts.preprocess.stains.base import rounded

if TYPE_CHECKING:
    from prts.section import Section

Pixels = NDArray[np.uint8]

STAIN = (0.8, 1.2)
"""Range of the factors of hematoxylin and eosin."""
REST = (0.9, 1.1)
"""Range of the factor of what is neither."""
OFFSET = (-0.04, 0.04)
"""Range of what is added to hematoxylin and eosin, as a share of the optical density."""
BRIGHTNESS = (0.85, 1.15)
BLUR_UM = (0.0, 0.75)
"""Range of the standard deviation of the Gaussian."""
SCALE = (0.9, 1.1)

_DENSITY = OPTICAL_DENSITY.astype(np.float32)
_TRUNCATE = 4.0
# Drawn numbers: orientation, hematoxylin, eosin, rest, offset, brightness, blur, scale.
_DRAWN = 8


def jittered(rgb: Pixels, factors: tuple[float, float, float], offset: float) -> Pixels:
    """Hematoxylin, eosin and the rest, each multiplied, and both stains shifted (HED jitter: Tellez et al. 2018).

    Parameters
    ----------
    rgb
        (..., 3).
    factors
        Of the three amounts.
    offset
        Added to the amounts of hematoxylin and eosin where there is tissue, as a share of the optical density.
    """
    # the amounts and the mean density are linear in the density, and so is the result
    shift = offset / 3 * np.ones((3, 1)) @ np.array([[1.0, 1.0, 0.0]])
    change = (hed_from_rgb @ np.diag(factors) + shift) @ rgb_from_hed
    density = np.maximum(_DENSITY[rgb] @ change.astype(np.float32), 0)
    return rounded(255 * np.exp(-np.log(10) * density))


def brighter(rgb: Pixels, factor: float) -> Pixels:
    """All gray levels times a factor."""
    return rounded(rgb * np.float32(factor))


def blurred(rgb: Pixels, px: float) -> Pixels:
    """Out of focus: a Gaussian with this standard deviation."""
    return rounded(gaussian_filter(rgb.astype(np.float32), (px, px, 0), truncate=_TRUNCATE))


@dataclass(frozen=True)
class Look:
    """How a view changes pixels; the `look` of a section.

    Parameters
    ----------
    factors, offset
        As for `jittered`.
    brightness
        As for `brighter`.
    blur_um
        Standard deviation of the blur.
    """

    factors: tuple[float, float, float]
    offset: float
    brightness: float
    blur_um: float

    @classmethod
    def random(cls, rng: np.random.Generator) -> Self:
        """A change drawn from the ranges of the views."""
        h, e, rest, shift, light, focus = rng.random(6).tolist()
        factors = (_within(STAIN, h), _within(STAIN, e), _within(REST, rest))
        return cls(factors, _within(OFFSET, shift), _within(BRIGHTNESS, light), _within(BLUR_UM, focus))

    def reach(self, mpp: float) -> int:
        """Pixels around a region that affect it."""
        return math.ceil(_TRUNCATE * self.blur_um / mpp)

    def __call__(self, rgb: Pixels, mpp: float) -> Pixels:
        """The pixels (h, w, 3) of a region at this um/px; those within `reach` of the edge depend on what is beyond."""
        changed = brighter(jittered(rgb, self.factors, self.offset), self.brightness)
        changed = blurred(changed, self.blur_um / mpp)
        # so that what was not scanned is still recognized
        return np.where(is_black(rgb)[..., None], rgb, changed)

    def settings(self) -> dict[str, Any]:
        """Everything that decides the pixels, JSON-like."""
        return {
            "version": 1,
            "factors": list(self.factors),
            "offset": self.offset,
            "brightness": self.brightness,
            "blur_um": self.blur_um,
        }


def random_orientation(rng: np.random.Generator) -> Orientation:
    """One of the eight ways to turn and mirror an image."""
    return Orientation(ROTATE[rng.integers(len(ROTATE))], FLIP[rng.integers(2)])


@dataclass(frozen=True)
class View:
    """A view of a section.

    Parameters
    ----------
    orientation
        How it lies.
    look
        How its pixels differ.
    scale
        Size of its nuclei relative to those of the section.
    """

    orientation: Orientation
    look: Look
    scale: float

    @classmethod
    def draw(cls, seed: int, section: str, number: int) -> Self:
        """A view of a section by its number; the first few of a section are spread over the ranges.

        Parameters
        ----------
        seed
            Seed of the run.
        section
            Name of the section.
        number
            Number of the view, from 0.
        """
        name = int.from_bytes(hashlib.sha256(section.encode()).digest()[:8], "big")
        points = qmc.Sobol(_DRAWN, seed=np.random.default_rng((seed, name)))
        lies, h, e, rest, shift, light, focus, size = points.random_base2(number.bit_length())[number].tolist()
        flip, turn = divmod(int(lies * 8), len(ROTATE))
        factors = (_within(STAIN, h), _within(STAIN, e), _within(REST, rest))
        look = Look(factors, _within(OFFSET, shift), _within(BRIGHTNESS, light), _within(BLUR_UM, focus))
        return cls(Orientation(ROTATE[turn], FLIP[flip]), look, _within(SCALE, size))

    def of(self, section: Section) -> Section:
        """The section as the view shows it: its files keep the pixels of the image, as with `Section.reoriented`."""
        return replace(section.reoriented(self.orientation), look=self.look, mpp=section.mpp * self.scale)

    def __str__(self) -> str:
        turned, h, e = self.orientation, *self.look.factors[:2]
        return (
            f"turned by {turned.rotate}{'' if turned.flip == 'none' else ' and mirrored'}, hematoxylin x {h:.2f}, eosin x {e:.2f}, "
            f"light x {self.look.brightness:.2f}, blur {self.look.blur_um:.2f} um, size x {self.scale:.2f}"
        )


def _within(span: tuple[float, float], share: float) -> float:
    low, high = span
    return round(low + (high - low) * share, 4)
