"""Make a slide look as the training slide did: `histogram`, `reinhard` or `macenko`.

A model has seen the colours of one laboratory and scanner. The statistics of the training section's tissue go into the bundle, for all
methods; those of a new slide are taken from the slide itself when it is predicted, and its pixels are recoloured as they are read, before
segmentation and features. Glass stays glass under `histogram` and `macenko`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from prts.errors import InputError
from prts.io.optical_density import GLASS_OD, OPTICAL_DENSITY
from prts.segmentation.segment import sample

if TYPE_CHECKING:
    from prts.io.slide import Slide
    from prts.section import Section

    Floats = NDArray[np.float32]
    Pixels = NDArray[np.uint8]

METHODS = ("histogram", "reinhard", "macenko")

_MPP = 1.0  # of the pixels that statistics are taken from
_WINDOW, _PER_WINDOW, _ALL = 512 * 512, 20_000, 500_000
_PERCENTILES = np.r_[0.1, 0.5, np.arange(1, 100), 99.5, 99.9]
_MIN_PIXELS = 1000
# RGB to the cones' LMS, and log LMS to the decorrelated space (Reinhard et al. 2001, equations 4 and 6).
_LMS = np.array([[0.3811, 0.5783, 0.0402], [0.1967, 0.7244, 0.0782], [0.0241, 0.1288, 0.8444]])
_LAB = np.diag(1 / np.sqrt([3, 6, 2])) @ np.array([[1, 1, 1], [1, 1, -2], [1, -1, 0]])


class Sampled(NamedTuple):
    """Pixels of a slide's tissue, (n, 3) uint8, and the colour of its glass, (3,)."""

    tissue: Pixels
    white: NDArray[np.float64]


@dataclass(frozen=True)
class StainMatching:
    """Recolours the pixels of one slide.

    Parameters
    ----------
    method
        One of `METHODS`.
    reference, own
        Statistics of the training section and of this slide, from `statistics`.
    """

    method: str
    reference: Mapping[str, Any]
    own: Mapping[str, Any]
    _parts: dict[str, Any] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        prepare = {"histogram": _histogram, "reinhard": _reinhard, "macenko": _macenko}[self.method]
        object.__setattr__(self, "_parts", prepare(self.reference, self.own))

    def settings(self) -> dict[str, Any]:
        """What decides on the colours beside the slide itself."""
        keys = (self.method, "white") if self.method == "macenko" else (self.method,)
        return {"method": self.method, "reference": {key: self.reference[key] for key in keys}}

    def __call__(self, rgb: Pixels) -> Pixels:
        """The same pixels, (..., 3) uint8, as the training slide would show them."""
        parts = self._parts
        if self.method == "histogram":
            return np.stack([parts["table"][channel][rgb[..., channel]] for channel in range(3)], axis=-1)
        if self.method == "reinhard":
            # linear in the logarithm of LMS, so the way there, through the decorrelated space and back is one matrix
            lms = parts["linear"][rgb[..., 0], 0] + parts["linear"][rgb[..., 1], 1] + parts["linear"][rgb[..., 2], 2]
            light = np.exp(np.log(lms) @ parts["matrix"].T + parts["offset"]) @ parts["back"].T
        else:
            density = np.stack([parts["log"][channel][rgb[..., channel]] for channel in range(3)], axis=-1)
            light = parts["white"] * np.exp(-density @ parts["matrix"].T)
        return np.asarray(np.clip(light + 0.5, 0, 255), np.uint8)


def statistics(sampled: Sampled) -> dict[str, Any]:
    """What all methods need to know of a slide, JSON-like and small.

    Parameters
    ----------
    sampled
        Pixels of its tissue, n of them.

    Returns
    -------
    `white` (3,); `histogram`: percentiles of each channel; `reinhard`: mean and standard deviation of the decorrelated channels (Reinhard
    et al. 2001); `macenko`: the two stains' unit vectors of optical density and the 99th percentile of their amounts (Macenko et al. 2009).

    Raises
    ------
    InputError
        If there is too little tissue to tell.
    """
    tissue, white = sampled
    if len(tissue) < _MIN_PIXELS:
        raise InputError(f"stain: {len(tissue)} sampled pixels show tissue, too few to match colours; use stain=none")
    lab = np.log(np.maximum(tissue, 1) @ _LMS.T) @ _LAB.T
    vectors = _stain_vectors(tissue, white)
    amounts = _density(tissue, white) @ np.linalg.pinv(vectors)
    return {
        "white": white.tolist(),
        "histogram": np.percentile(tissue, _PERCENTILES, axis=0).T.round(2).tolist(),
        "reinhard": {"mean": lab.mean(axis=0).tolist(), "sd": lab.std(axis=0).tolist()},
        "macenko": {"stains": vectors.tolist(), "amounts": np.percentile(amounts, 99, axis=0).tolist()},
    }


def sample_slides(slides: Iterable[Slide]) -> Sampled:
    """Pixels of the tissue of one or several slides, spread over them, at 1 um/px."""
    rng = np.random.default_rng(0)
    tissue, glass = [np.empty((0, 3), np.uint8)], [np.empty((0, 3), np.uint8)]
    for slide in slides:
        for window in sample(slide, max(_MPP, slide.mpp)):
            pixels = window.reshape(-1, 3)
            # a small slide comes as one window, a large one as 64
            some = pixels[
                rng.integers(0, len(pixels), min(len(pixels), _PER_WINDOW if len(pixels) <= _WINDOW else _ALL))
            ]
            shows = OPTICAL_DENSITY[some].mean(axis=1) > GLASS_OD
            tissue.append(some[shows])
            glass.append(some[~shows])
    empty = np.concatenate(glass)
    white = np.median(empty, axis=0) if len(empty) >= _MIN_PIXELS else np.full(3, 255.0)
    return Sampled(np.concatenate(tissue), white)


def matched(section: Section, method: str, reference: Mapping[str, Any] | None, bundle: str) -> Section:
    """The section, whose image is read in the colours of training.

    Parameters
    ----------
    section
        The section to be predicted.
    method
        One of `METHODS`, or `none`.
    reference
        What the bundle says of the training section; None if nothing.
    bundle
        Its name, for the message.

    Raises
    ------
    InputError
        If there is no such method, the bundle holds no reference, or the slide shows too little tissue.
    """
    if method == "none":
        return section
    if method not in METHODS:
        raise InputError(f"stain={method}: no such method (there are: none, {', '.join(METHODS)})")
    if reference is None:
        raise InputError(
            f"stain={method}: {bundle} holds no colours of its training section; use stain=none or train again"
        )
    with section.open_slide() as slide:
        own = statistics(sample_slides([slide]))
    return replace(section, recolour=StainMatching(method, reference, own))


def _density(rgb: Pixels, white: NDArray[np.float64]) -> NDArray[np.float64]:
    """Optical density (natural logarithm) against the slide's own glass."""
    return np.asarray(np.maximum(np.log(white) - np.log(np.maximum(rgb, 1)), 0.0))


def _stain_vectors(tissue: Pixels, white: NDArray[np.float64]) -> NDArray[np.float64]:
    """Haematoxylin and eosin, (2, 3) unit vectors: the robust ends of the fan of colours in the plane that holds most of them.

    The steps and their two constants are those of Macenko et al. 2009: density above 0.15, 1st and 99th percentile.
    """
    density = _density(tissue, white)
    dense = density[(density > 0.15).all(axis=1)]
    dense = dense if len(dense) >= _MIN_PIXELS else density
    plane = np.linalg.eigh(np.cov(dense.T))[1][:, :0:-1]
    plane *= np.where(plane.sum(axis=0) < 0, -1, 1)
    at = dense @ plane
    ends = np.percentile(np.arctan2(at[:, 1], at[:, 0]), [1, 99])
    vectors = np.abs(np.column_stack([np.cos(ends), np.sin(ends)]) @ plane.T)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    # haematoxylin takes more red light than eosin
    return np.asarray(vectors[np.argsort(-vectors[:, 0])])


def _histogram(reference: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """A table (3, 256): the tissue's percentiles onto those of the reference, glass and black onto themselves."""
    levels = np.arange(256)
    table = np.empty((3, 256), np.uint8)
    for channel, (source, target) in enumerate(zip(own["histogram"], reference["histogram"], strict=True)):
        source, first = np.unique(np.maximum.accumulate(source), return_index=True)
        target = np.asarray(target)[first]
        inner = (source > 0) & (source < 255)
        x, y = np.r_[0, source[inner], 255], np.r_[0, target[inner], 255]
        table[channel] = np.rint(np.interp(levels, x, y))
    return {"table": table}


def _reinhard(reference: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    target, source = ({key: np.asarray(value) for key, value in side["reinhard"].items()} for side in (reference, own))
    ratio = target["sd"] / np.maximum(source["sd"], 1e-6)
    back = np.linalg.inv(_LAB)
    grey = np.maximum(np.arange(256), 1)
    return {
        "linear": (grey[:, None, None] * _LMS.T[None]).astype(np.float32),
        "matrix": (back @ np.diag(ratio) @ _LAB).astype(np.float32),
        "offset": (back @ (target["mean"] - ratio * source["mean"])).astype(np.float32),
        "back": np.linalg.inv(_LMS).astype(np.float32),
    }


def _macenko(reference: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """One matrix from density to density: amounts of the slide's stains, scaled, in the reference's stains."""
    target, source = ({key: np.asarray(value) for key, value in side["macenko"].items()} for side in (reference, own))
    scale = target["amounts"] / np.maximum(source["amounts"], 1e-6)
    matrix = np.linalg.pinv(source["stains"]) @ np.diag(scale) @ target["stains"]
    grey = np.log(np.maximum(np.arange(256), 1))
    log = np.maximum(np.log(np.asarray(own["white"]))[:, None] - grey, 0.0)
    return {
        "log": log.astype(np.float32),
        "matrix": matrix.T.astype(np.float32),
        "white": np.asarray(reference["white"], np.float32),
    }
