"""Shape and crowding of nuclei from their polygons alone: the features of a baseline that never looks at the image."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import shapely
from numpy.typing import NDArray
from scipy.spatial import cKDTree

from prts.features.classical_nucleus import shape_columns

if TYPE_CHECKING:
    from geopandas import GeoDataFrame

RADII_UM = (25.0, 50.0, 100.0)
_TILE_MPP = 0.5  # um per pixel of the polygons that `shape_columns` expects


def morphology(nuclei: GeoDataFrame, mpp: float) -> NDArray[np.float32]:
    """Shape of each nucleus and how close the others are.

    Parameters
    ----------
    nuclei
        All nuclei of a section, n polygons in full-resolution pixels; nuclei that fail quality control are neighbors, too.
    mpp
        um per full-resolution pixel.

    Returns
    -------
    (n, 21): the 17 shape columns of the encoder `classical` (area, perimeter, axes, eccentricity, solidity, ...), log10(1 + number of
    other nuclei with their centroid within 25, 50 and 100 um), and log10(1 + um to the nearest one) (all 0 for a lone nucleus).
    """
    polygons = np.asarray(nuclei.geometry.array, dtype=object)
    scaled = shapely.transform(polygons, lambda xy: xy * (mpp / _TILE_MPP))
    centroid = shapely.get_coordinates(shapely.centroid(polygons)) * mpp
    tree = cKDTree(centroid)
    crowd = [tree.query_ball_point(centroid, radius, return_length=True) - 1 for radius in RADII_UM]
    nearest = tree.query(centroid, k=2)[0][:, 1]
    around = np.log10(1 + np.stack([*crowd, np.where(np.isfinite(nearest), nearest, 0.0)], axis=1))
    return np.hstack([shape_columns(scaled).numpy(), around.astype(np.float32)])
