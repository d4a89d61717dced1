"""um/px of an image: the value that the user gives, else the one on which all metadata must agree.

It is never guessed: a wrong magnification raises no error later, it only makes every prediction worse.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from itertools import combinations
from xml.etree import ElementTree

import tifffile

from prts.errors import InputError

logger = logging.getLogger(__name__)

# Name of a source of um/px, and its value.
MppSource = tuple[str, float]
# The name of the value that the user gives.
GIVEN = "mpp="

# Microscopes are within this range; the 72 and 96 dpi (353 and 265 um/px) that many programs write are not.
MPP_RANGE = (0.05, 5.0)
MPP_TOLERANCE = 0.02

UM_PER_INCH = 25_400.0
_UM_PER_UNIT = {
    "nm": 1e-3,
    "um": 1.0,
    "micron": 1.0,
    "microns": 1.0,
    "micrometer": 1.0,
    "micrometre": 1.0,
    "mm": 1e3,
    "cm": 1e4,
    "m": 1e6,
    "inch": UM_PER_INCH,
    "in": UM_PER_INCH,
}
# ResolutionUnit of TIFF 6.0; "none" (1) gives an aspect ratio only.
_UM_PER_RESOLUTION_UNIT = {2: UM_PER_INCH, 3: 1e4, 4: 1e3, 5: 1.0}


def is_plausible(mpp: float) -> bool:
    """Whether a value can be the um/px of a microscope image."""
    return MPP_RANGE[0] <= mpp <= MPP_RANGE[1]


def agree(one: float, other: float) -> bool:
    """Whether two values agree within 2 %."""
    return max(one, other) <= min(one, other) * (1 + MPP_TOLERANCE)


def resolve_mpp(name: object, sources: Sequence[MppSource], given: float | None = None) -> MppSource:
    """The um/px that the user gives, else the one on which all sources agree.

    Programs leave stale tags behind when they reduce or convert an image, so a value that the user gives wins over metadata, with a
    warning.

    Parameters
    ----------
    name
        The file, for messages.
    sources
        Metadata in order of precedence; values outside 0.05-5 um/px are ignored.
    given
        The value that the user gives.

    Returns
    -------
    The name of the source, `mpp=` for the given value, and the value.

    Raises
    ------
    InputError
        If there is no source, or no value is given and two sources differ by more than 2 %.
    """
    for where, value in sources:
        if not is_plausible(value):
            logger.info("%s: %.4g um/px in %s is out of range and ignored", name, value, where)
    used = [source for source in sources if is_plausible(source[1])]
    if given is not None:
        other = ", ".join(f"{value:.4g} in {where}" for where, value in used if not agree(value, given))
        if other:
            logger.warning("%s: um/px is %.4g in %s but %s; %s is used", name, given, GIVEN, other, GIVEN)
        return GIVEN, given
    if not used:
        raise InputError(
            f"{name}: the um per pixel are unknown; set mpp to the value of the scanner (about 0.25 for a 40x scan, 0.5 for 20x)"
        )
    require_agreement(name, used)
    return used[0]


def require_agreement(name: object, sources: Sequence[MppSource]) -> None:
    """Raise InputError if two of the sources differ by more than 2 %."""
    for (one, a), (other, b) in combinations(sources, 2):
        if not agree(a, b):
            raise InputError(
                f"{name}: um/px is {a:.4g} in {one} but {b:.4g} in {other}; "
                "they must agree within 2 %: correct the wrong one, set mpp to the right value, or use the matching image"
            )


def from_axes(where: str, x: float | None, y: float | None) -> list[MppSource]:
    """Source of um/px given along x and y: their mean, or two sources if they differ."""
    values = {axis: float(v) for axis, v in (("x", x), ("y", y)) if v is not None and is_plausible(float(v))}
    if len(values) == 2 and not agree(*values.values()):
        return [(f"{where} along {axis}", value) for axis, value in values.items()]
    return [(where, sum(values.values()) / len(values))] if values else []


def tiff_sources(tif: tifffile.TiffFile, page: tifffile.TiffPage) -> list[MppSource]:
    """um/px in OME-XML, the ImageJ and Aperio descriptions and the resolution tags of a TIFF, in this order.

    Parameters
    ----------
    tif
        The open file.
    page
        The page of the full-resolution image.
    """
    sources = _ome_sources(tif.ome_metadata, page.imagewidth, page.imagelength) if tif.is_ome else []
    description = page.description or ""
    if description.startswith("Aperio") and (match := re.search(r"\bMPP\s*=\s*([0-9.eE+-]+)", description)):
        sources += from_axes("the Aperio description", _number(match[1]), None)
    if tif.is_imagej:
        # ImageJ states the unit of the resolution tags in its description
        unit = str((tif.imagej_metadata or {}).get("unit", "")).encode().decode("unicode_escape", "ignore")
        return sources + _resolution_sources(page, um_per_unit(unit), "the ImageJ resolution")
    tag = page.tags.get("ResolutionUnit")
    um = _UM_PER_RESOLUTION_UNIT.get(int(_scalar(tag.value) or 0) if tag is not None else 2)
    return sources + _resolution_sources(page, um, "the TIFF resolution tags")


def _resolution_sources(page: tifffile.TiffPage, um_per_unit: float | None, where: str) -> list[MppSource]:
    if um_per_unit is None:
        return []
    values: list[float | None] = []
    for name in ("XResolution", "YResolution"):
        tag = page.tags.get(name)
        pixels = None if tag is None else _scalar(tag.value)
        values.append(um_per_unit / pixels if pixels else None)
    return from_axes(where, values[0], values[1])


def _scalar(value: object) -> float | None:
    """The value of a tag: a rational, or the plain number that some programs write instead."""
    if isinstance(value, tuple) and len(value) == 2:
        return value[0] / value[1] if value[1] else None
    if isinstance(value, tuple) and len(value) == 1:
        value = value[0]
    return float(value) if isinstance(value, int | float) else None


def _ome_sources(xml: str | None, width: int, height: int) -> list[MppSource]:
    """um/px of the image with this size: the first one in the file may be a label or a macro image."""
    try:
        root = ElementTree.fromstring(xml or "")
    except ElementTree.ParseError:
        return []
    images = root.findall("./{*}Image/{*}Pixels")
    same = [each for each in images if (each.get("SizeX"), each.get("SizeY")) == (str(width), str(height))]
    pixels = next(iter(same or images), None)
    if pixels is None:
        return []
    values: list[float | None] = []
    for axis in "XY":
        size = _number(pixels.get(f"PhysicalSize{axis}"))
        um = um_per_unit(pixels.get(f"PhysicalSize{axis}Unit", "um"))
        values.append(None if size is None or um is None else size * um)
    return from_axes("the OME metadata", values[0], values[1])


def um_per_unit(unit: str) -> float | None:
    """Um per unit of length, by its name; None if it is not one.

    Examples
    --------
    >>> um_per_unit("Micrometer"), um_per_unit("pixel")
    (1.0, None)
    """
    # the micro sign and the Greek letter mu are two characters
    return _UM_PER_UNIT.get(unit.strip().lower().replace("\u00b5", "u").replace("\u03bc", "u"))


def _number(text: str | None) -> float | None:
    try:
        return None if text is None else float(text)
    except ValueError:
        return None
