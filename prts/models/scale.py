"""Whether um/px can be right: nuclei of a slide against those of training, in size and density.

A wrong um/px raises no error by itself: the encoder sees tiles of the wrong magnification and the network answers all the same.
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

# Half or twice the true um/px makes nuclei look a quarter or four times as large; segmenters, which expect nuclei, find somewhat less.
GROSS = 2.5
# The least factor that is worth a word, and the power of the training sections' own spread that is.
_LEAST, _POWER = 1.3, 2
_NEIGHBOURS = 5
_COARSER = 1.5
_QUANTILES = (5, 25, 50, 75, 95)


def describe_nuclei(nuclei: Mapping[str, GeoDataFrame], mpp: Mapping[str, float]) -> dict[str, Any]:
    """Size and density of the nuclei a model has learnt from.

    Parameters
    ----------
    nuclei
        ALL nuclei of the training and validation sections, by section, in full-resolution pixels.
    mpp
        um/px of the sections.

    Returns
    -------
    JSON-like: quantiles of the area (um2) and density (nuclei a mm2) over all sections, `factor`, by which a median area may differ from
    the training's without a word (the square of the ratio between the sections' own medians, and at least 1.3), and the sections' um/px.
    """
    areas = {name: part["area_um2"].to_numpy(dtype=float) for name, part in nuclei.items()}
    medians = [float(np.median(area)) for area in areas.values()]
    levels = np.percentile(np.concatenate(list(areas.values())), _QUANTILES)
    density = np.median([_density(part, mpp[name]) for name, part in nuclei.items()])
    return {
        "area_um2": {str(level): round(float(area), 2) for level, area in zip(_QUANTILES, levels, strict=True)},
        "density_per_mm2": round(float(density), 1),
        "factor": round(max(_LEAST, (max(medians) / min(medians)) ** _POWER), 3),
        "mpp": {name: float(value) for name, value in mpp.items()},
    }


def check_scale(
    nuclei: GeoDataFrame, section: Section, model_mpp: float, training: Mapping[str, Any] | None, *, refuse: bool
) -> dict[str, Any]:
    """Hold the nuclei of a slide against those of training.

    Parameters
    ----------
    nuclei
        All nuclei of the slide.
    section
        The slide.
    model_mpp
        um/px that the encoder sees; the slide is rescaled to it.
    training
        Of `describe_nuclei`; None where the bundle does not say.
    refuse
        Whether a gross difference stops the prediction; it is a warning else.

    Returns
    -------
    What was found, for provenance: um/px of slide and model, the factor between them, median areas and densities.

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
        f"is {section.mpp:.4g} um/px ({section.mpp_source}) right? The median nucleus has {area:.0f} um2 here, {usual:.0f} in training "
        f"({density:.0f} and {training['density_per_mm2']:.0f} nuclei a mm2); with {section.mpp * np.sqrt(usual / area):.2g} um/px they "
        "would be alike"
    )
    if ratio > GROSS and refuse:
        raise InputError(f"{section.image}: {text}; give the right mpp=, or check_scale=false if such nuclei are meant")
    if ratio > training["factor"]:
        logger.warning("%s: %s", section.image, text)
    coarsest = max(training["mpp"].values())
    if section.mpp > _COARSER * coarsest:
        logger.warning(
            "%s: %.3g um/px shows less than the model learnt from (%.3g): what is enlarged is not sharper",
            section.image, section.mpp, coarsest,
        )  # fmt: skip
    return found


def _density(nuclei: GeoDataFrame, mpp: float) -> float:
    """Nuclei a mm2 where nuclei are, from the median distance to the fifth neighbour; 0 with fewer."""
    xy_um: NDArray[np.float64] = shapely.get_coordinates(shapely.centroid(nuclei.geometry.to_numpy())) * mpp
    if len(xy_um) <= _NEIGHBOURS:
        return 0.0
    distance, _ = cKDTree(xy_um).query(xy_um, k=[_NEIGHBOURS + 1])
    radius = max(float(np.median(distance)), 1e-3)
    return _NEIGHBOURS / (np.pi * radius**2) * 1e6
