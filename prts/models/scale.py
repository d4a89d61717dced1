"""Check um/px by comparing the size and density of a slide's nuclei with the training nuclei.

A wrong um/px raises no error elsewhere: the encoder gets tiles of the wrong magnification and the network predicts anyway.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import shapely
from numpy.typing import NDArray
from scipy.spatial import cKDTree

from prts.errors import InputError

if TYPE_CHECKING:
    from geopandas import GeoDataFrame

    from prts.section import Section

logger = logging.getLogger(__name__)

# Half or twice the true um/px makes nuclei look a quarter or four times as large, and somewhat less after segmentation.
GROSS = 2.5
# Warn above this factor at least, and above this power of the spread between training sections.
_LEAST, _POWER = 1.3, 2
_NEIGHBOURS = 5
_COARSER = 1.5
_QUANTILES = (5, 25, 50, 75, 95)


def describe_nuclei(nuclei: Mapping[str, GeoDataFrame], mpp: Mapping[str, float]) -> dict[str, Any]:
    """Describe size and density of the nuclei that a model was trained on.

    Parameters
    ----------
    nuclei
        ALL nuclei of the training and validation sections, by section, in full-resolution pixels.
    mpp
        um/px of the sections.

    Returns
    -------
    JSON-like: quantiles of the area (um2) and density (nuclei per mm2) over all sections; `factor`, by which a median area may differ from
    training without a warning (the square of the ratio between the sections' own medians, at least 1.3); and the sections' um/px.
    """
    areas, densities = {}, []
    for name, part in nuclei.items():  # once, since a mapping may read them one after the other
        areas[name] = part["area_um2"].to_numpy(dtype=float)
        densities.append(_density(part, mpp[name]))
    medians = [float(np.median(area)) for area in areas.values()]
    levels = np.percentile(np.concatenate(list(areas.values())), _QUANTILES)
    density = np.median(densities)
    return {
        "area_um2": {str(level): round(float(area), 2) for level, area in zip(_QUANTILES, levels, strict=True)},
        "density_per_mm2": round(float(density), 1),
        "factor": round(max(_LEAST, (max(medians) / min(medians)) ** _POWER), 3),
        "mpp": {name: float(value) for name, value in mpp.items()},
    }


def check_scale(
    nuclei: GeoDataFrame, section: Section, model_mpp: float, training: Mapping[str, Any] | None, *, refuse: bool
) -> dict[str, Any]:
    """Compare the nuclei of a slide with the training nuclei.

    Parameters
    ----------
    nuclei
        All nuclei of the slide.
    section
        The slide.
    model_mpp
        um/px of the encoder's input, to which the slide is rescaled.
    training
        From `describe_nuclei`, or None if the bundle lacks it.
    refuse
        Whether a gross difference is an error instead of a warning.

    Returns
    -------
    For provenance: um/px of slide and model, the factor between them, median areas and densities.

    Raises
    ------
    InputError
        If the median area is more than 2.5 times as large, or as small, as in training.
    """
    area, density = float(nuclei["area_um2"].median()), _density(nuclei, section.mpp)
    found = {
        "slide_mpp": section.mpp,
        "model_mpp": model_mpp,
        "rescaled_by": section.mpp / model_mpp,
        "median_area_um2": area,
        "density_per_mm2": density,
    }
    if training is None:
        return found
    usual = float(training["area_um2"]["50"])
    found |= {"training_median_area_um2": usual, "training_density_per_mm2": float(training["density_per_mm2"])}
    ratio = max(area / usual, usual / area)
    text = (
        f"{section.mpp:.4g} um/px ({section.mpp_source}) may be wrong: the median nucleus has {area:.0f} um2, but {usual:.0f} in training "
        f"({density:.0f} vs. {training['density_per_mm2']:.0f} nuclei per mm2), and they would match at "
        f"{section.mpp * np.sqrt(usual / area):.2g} um/px"
    )
    if ratio > GROSS and refuse:
        raise InputError(
            f"{section.image}: {text}; give the correct `mpp`, or set `check_scale` to false if these nuclei are as expected"
        )
    if ratio > training["factor"]:
        logger.warning("%s: %s", section.image, text)
    coarsest = max(training["mpp"].values())
    if section.mpp > _COARSER * coarsest:
        logger.warning(
            "%s: %.3g um/px is coarser than the training images (%.3g); upscaling does not add detail",
            section.image, section.mpp, coarsest,
        )  # fmt: skip
    return found


def _density(nuclei: GeoDataFrame, mpp: float) -> float:
    """Nuclei per mm2 of tissue, from the median distance to the fifth neighbor; 0 with fewer nuclei."""
    xy_um: NDArray[np.float64] = shapely.get_coordinates(shapely.centroid(nuclei.geometry.to_numpy())) * mpp
    if len(xy_um) <= _NEIGHBOURS:
        return 0.0
    distance, _ = cKDTree(xy_um).query(xy_um, k=[_NEIGHBOURS + 1])
    radius = max(float(np.median(distance)), 1e-3)
    return _NEIGHBOURS / (np.pi * radius**2) * 1e6
