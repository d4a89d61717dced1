"""Find artifacts among nuclei: on glass, in a fold, under a bubble or pen, out of focus, or several nuclei in one outline.

Rules on simple statistics of the image around each nucleus, relative to those of all nuclei of the slide. The slide is read in blocks at
1 um/px; the statistics are box means, computed for all pixels of a block at once and looked up at the nuclei.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import shapely
from numpy.typing import NDArray
from scipy import ndimage

from prts.io.optical_density import GLASS_OD, OPTICAL_DENSITY, without_black
from prts.progress import track
from prts.segmentation.segment import blocks

if TYPE_CHECKING:
    import geopandas as gpd

    from prts.io.slide import Slide

logger = logging.getLogger(__name__)

KINDS = ("none", "glass", "fold", "bubble", "pen", "blur", "aggregate")

_MPP = 1.0
_BLOCK = 1024
# Sides of the boxes, px at 1 um/px.
_NEAR, _AROUND = 10, 20
_MARGIN = _AROUND
_STATISTICS = ("glass", "red", "pale", "texture", "blue", "contrast", "focus")
_DENSITY = OPTICAL_DENSITY.astype(np.float32)


def find_artefacts(slide: Slide, nuclei: gpd.GeoDataFrame) -> pd.Categorical:
    """The kind of artifact of each nucleus, `none` for most.

    "Usual" is the median over the slide's nuclei; boxes are 10 um (near) and 20 um (around) wide; the first rule that applies decides.

    * `glass`: less than a sixth of the area around is tissue.
    * `pen`: ink covers the tissue: near, red light (which eosin transmits) is absorbed 1.6 times the usual, and texture is half the usual.
    * `fold`: two layers: around, blue light (which stains absorb least) is absorbed 1.6 times the usual, and fine contrast is over 3 times.
    * `bubble`: tissue near is half as dense as usual, with softer edges.
    * `blur`: edges around are half as sharp as usual, regardless of their contrast.
    * `aggregate`: over four times the usual area in an outline that fills less than 0.8 of its convex hull.

    Parameters
    ----------
    slide
        The image.
    nuclei
        (n,) nuclei in full-resolution pixels.
    """
    polygons = np.asarray(nuclei.geometry.array, dtype=object)
    values = _measure(slide, polygons)
    usual = values / values.median().clip(lower=1e-6)
    area, hull = shapely.area(polygons), shapely.area(shapely.convex_hull(polygons))
    rules = {
        "glass": values["glass"] > 5 / 6,
        "pen": (usual["red"] > 1.6) & (usual["texture"] < 0.5),
        "fold": (usual["blue"] > 1.6) & (usual["contrast"] > 3),
        "bubble": (usual["pale"] < 0.5) & (usual["focus"] < 0.9),
        "blur": usual["focus"] < 0.5,
        "aggregate": (area > 4 * np.median(area)) & (area < 0.8 * hull),
    }
    kind = np.select([np.asarray(rule) for rule in rules.values()], list(rules), "none")
    return pd.Categorical(kind, categories=list(KINDS))


def is_artefact(obs: pd.DataFrame) -> NDArray[np.bool_]:
    """Which nuclei are flagged, (n,); none if artifacts were not searched for."""
    if "artefact" not in obs:
        return np.zeros(len(obs), bool)
    return np.asarray(obs["artefact"] != "none")


def log_artefacts(section: str, kinds: pd.Series) -> dict[str, int]:
    """Log the number of nuclei of each kind, and return it."""
    counts = {kind: int((kinds == kind).sum()) for kind in KINDS[1:]}
    said = ", ".join(f"{n} {kind}" for kind, n in counts.items() if n) or "none"
    logger.info("%s: artifacts among %d nuclei: %s", section, len(kinds), said)
    return counts


def _measure(slide: Slide, polygons: NDArray[Any]) -> pd.DataFrame:
    """The statistics around the centroid of each nucleus, (n, statistics)."""
    at = np.floor(shapely.get_coordinates(shapely.centroid(polygons)) * slide.mpp / _MPP).astype(np.int64)
    width, height = slide.size_at(_MPP)
    at = np.clip(at, 0, [width - 1, height - 1])
    out = np.zeros((len(polygons), len(_STATISTICS)), np.float32)
    for block in track(blocks(width, height, _BLOCK), "artifacts"):
        inside = np.flatnonzero(((at >= [block.x0, block.y0]) & (at < [block.x1, block.y1])).all(axis=1))
        if not len(inside):
            continue
        left, top = block.x0 - _MARGIN, block.y0 - _MARGIN
        rgb = slide.read_region(left, top, block.x1 - left + _MARGIN, block.y1 - top + _MARGIN, _MPP)
        rgb = without_black(rgb)
        x, y = (at[inside] - [left, top]).T
        out[inside] = np.stack([values[y, x] for values in _maps(rgb)], axis=1)
    return pd.DataFrame(out, columns=list(_STATISTICS))


def _maps(rgb: NDArray[np.uint8]) -> list[NDArray[Any]]:
    """The statistics around every pixel, (rows, columns) each."""
    density = _DENSITY[rgb]
    mean = density.mean(axis=-1)
    tissue = (mean > GLASS_OD).astype(np.float32)
    share = {size: np.maximum(ndimage.uniform_filter(tissue, size), 0.02) for size in (_NEAR, _AROUND)}

    def in_tissue(values: NDArray[Any], size: int) -> NDArray[Any]:
        return np.asarray(ndimage.uniform_filter(values * tissue, size) / share[size])

    pale = in_tissue(mean, _NEAR)
    variance = ndimage.uniform_filter(mean**2, _NEAR) - ndimage.uniform_filter(mean, _NEAR) ** 2
    # blur reduces curvature first: its ratio to the slope is the sharpness of edges, regardless of their contrast
    # smoothed before, so that camera noise is not mistaken for detail
    smooth = ndimage.gaussian_filter(mean, 1.0)
    slope = ndimage.uniform_filter(ndimage.sobel(smooth, 0) ** 2 + ndimage.sobel(smooth, 1) ** 2, _AROUND)
    curvature = ndimage.uniform_filter(ndimage.laplace(smooth) ** 2, _AROUND)
    return [
        1 - ndimage.uniform_filter(tissue, _AROUND),
        in_tissue(density[..., 0], _NEAR),
        pale,
        np.sqrt(np.maximum(variance, 0)) / np.maximum(pale, 1e-6),
        in_tissue(density[..., 2], _AROUND),
        ndimage.uniform_filter(ndimage.laplace(mean) ** 2, _AROUND),
        curvature / np.maximum(slope, 1e-6),
    ]
