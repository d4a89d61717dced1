"""The interface of a stain method, the color statistics stored in bundles, and how a slide is matched to them.

A model has seen the colors of one laboratory and scanner. The bundle has the statistics of the training section's tissue for every
method; a new slide's are computed when it is predicted, and its pixels are recolored as they are read, before segmentation
and features.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from prts.errors import ParameterError, did_you_mean
from prts.io.optical_density import GLASS_OD, OPTICAL_DENSITY, without_black
from prts.preprocess.stains import stains
from prts.segmentation.segment import sample

if TYPE_CHECKING:
    from prts.io.slide import Slide
    from prts.section import Section

Pixels = NDArray[np.uint8]

MIN_PIXELS = 1000
"""With fewer sampled pixels, color statistics are unreliable."""

_MPP = 1.0  # of the pixels that statistics are computed from
_WINDOW, _PER_WINDOW, _ALL = 512 * 512, 20_000, 500_000


class TissueSample(NamedTuple):
    """Pixels of a slide's tissue, (n, 3) uint8, and the color of its glass, (3,)."""

    tissue: Pixels
    white: NDArray[np.float64]


class StainMethod(Protocol):
    """Recolors the pixels of one slide to match the training section.

    To add one, write a module with a class that follows this protocol and register it with `@stains.register("my_method")`. Its
    constructor takes the statistics of the training section and of the slide, each with the method's own under its name and the
    color of the glass, `white`.
    """

    name: ClassVar[str]
    """Name of the method; set by `stains.register`."""

    uses: ClassVar[tuple[str, ...]]
    """The keys of the reference that affect the colors: the method's name, and `white` if it depends on the glass."""

    def __init__(self, reference: Mapping[str, Any], own: Mapping[str, Any]) -> None: ...

    @staticmethod
    def statistics(sample: TissueSample) -> Any:
        """Compute the statistics that the method needs, JSON-like and small."""
        ...

    def __call__(self, rgb: Pixels) -> Pixels:
        """The pixels, (..., 3) uint8, in the colors of the training section."""
        ...


@dataclass(frozen=True)
class StainMatching:
    """Recolors the pixels of one slide; the `recolour` of a section.

    Parameters
    ----------
    method
        A name in `prts.preprocess.stains.stains`.
    reference, own
        Statistics of the training section and of this slide, from `statistics`.
    """

    method: str
    reference: Mapping[str, Any]
    own: Mapping[str, Any]
    _recolor: StainMethod = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_recolor", stains[self.method](self.reference, self.own))

    def settings(self) -> dict[str, Any]:
        """Everything that determines the colors apart from the slide itself."""
        return {"method": self.method, "reference": {key: self.reference[key] for key in self._recolor.uses}}

    def __call__(self, rgb: Pixels) -> Pixels:
        """The pixels, (..., 3) uint8, in the colors of the training section."""
        return self._recolor(rgb)


def statistics(sampled: TissueSample) -> dict[str, Any]:
    """Compute the statistics that all methods need, JSON-like and small.

    Parameters
    ----------
    sampled
        Pixels of its tissue.

    Returns
    -------
    `white`, the color of the glass, (3,), and the statistics of each method under its name.

    Raises
    ------
    ParameterError
        If there is too little tissue.
    """
    if len(sampled.tissue) < MIN_PIXELS:
        raise ParameterError(
            "stain", "", f"only {len(sampled.tissue)} sampled pixels show tissue, too few to match colors; choose none"
        )
    methods = {name: stains[name].statistics(sampled) for name in stains.names()}
    return {"white": sampled.white.tolist(), **methods}


def sample_slides(slides: Iterable[Slide]) -> TissueSample:
    """Pixels of the tissue of one or several slides, spread over them, at 1 um/px."""
    rng = np.random.default_rng(0)
    tissue, glass = [np.empty((0, 3), np.uint8)], [np.empty((0, 3), np.uint8)]
    for slide in slides:
        for window in sample(slide, max(_MPP, slide.mpp)):
            pixels = without_black(window).reshape(-1, 3)
            # a small slide comes as one window, a large one as 64
            n = min(len(pixels), _PER_WINDOW if len(pixels) <= _WINDOW else _ALL)
            some = pixels[rng.integers(0, len(pixels), n)]
            shows = OPTICAL_DENSITY[some].mean(axis=1) > GLASS_OD
            tissue.append(some[shows])
            glass.append(some[~shows])
    empty = np.concatenate(glass)
    white = np.median(empty, axis=0) if len(empty) >= MIN_PIXELS else np.full(3, 255.0)
    return TissueSample(np.concatenate(tissue), white)


def require_method(method: str) -> None:
    """Raise an error unless this is `none` or the name of a stain method.

    Raises
    ------
    ParameterError
        If there is no such method.
    """
    known = ["none", *stains.names()]
    if method not in known:
        raise ParameterError(
            "stain", "", f"{method!r} is not a method{did_you_mean(method, known)}; choose one of {', '.join(known)}"
        )


def match_stain(section: Section, method: str, reference: Mapping[str, Any] | None) -> Section:
    """The section, with its image read in the colors of the training section.

    Parameters
    ----------
    section
        The section to predict.
    method
        A name in `prts.preprocess.stains.stains`, or `none`.
    reference
        Statistics of the training section, from the bundle's metadata; None if it has none.

    Raises
    ------
    ParameterError
        If there is no such method, the bundle has no statistics for it, or the slide shows too little tissue.
    """
    require_method(method)
    if method == "none":
        return section
    if reference is None or not set(stains[method].uses) <= set(reference):
        raise ParameterError(
            "stain",
            "",
            f"the model has no color statistics of its training section for {method}; choose none, or train again",
        )
    with section.open_slide() as slide:
        own = statistics(sample_slides([slide]))
    return replace(section, recolour=StainMatching(method, reference, own))


def rounded(light: NDArray[np.floating[Any]]) -> Pixels:
    """Gray levels as uint8."""
    return np.asarray(np.clip(light + 0.5, 0, 255), np.uint8)
