"""Tiles on a lattice, shared by nearby nuclei, so that the work grows with the area of tissue, not with the number of nuclei.

The centers of the tiles are at multiples of `stride` px of the rescaled slide. A nucleus takes its global vector from the four tiles around
its center, weighted bilinearly, and its local vector from the tokens of the tile whose center is nearest. Tiles that no nucleus needs are
neither read nor encoded.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import shapely
from numpy.typing import NDArray

from prts.features.tiles import Ints, TilePlan, center_pixel, in_tile

if TYPE_CHECKING:
    from geopandas import GeoDataFrame

# The tiles around a point, as steps to the right and down from the tile at its upper left.
_CORNERS = np.array([[0, 0], [1, 0], [0, 1], [1, 1]])


def plan_grid(nuclei: GeoDataFrame, slide_mpp: float, mpp: float, tile_px: int, stride: int) -> TilePlan:
    """Choose the tiles of the lattice that the nuclei need, row by row, and assign them to nuclei.

    The center of a nucleus is the pixel nearest to its centroid, as in exact extraction. If it is also the center of a tile, the nucleus
    uses only that tile and has the same vectors as in exact extraction.

    Parameters
    ----------
    nuclei
        Nuclei in full-resolution pixels, n rows.
    slide_mpp
        um per full-resolution pixel.
    mpp
        um per pixel of the tiles.
    tile_px
        Side of the tiles in pixels.
    stride
        px between tiles, at most their side.
    """
    geometry = np.asarray(nuclei.geometry.array, dtype=object)
    centroid = shapely.get_coordinates(shapely.centroid(geometry))
    scale = slide_mpp / mpp
    node, past = np.divmod(center_pixel(centroid * scale), stride)
    share = past / stride
    # (n, 4): product over x and y of the share of this side
    weight = np.where(_CORNERS, share[:, None], 1.0 - share[:, None]).prod(axis=2)
    around = node[:, None] + _CORNERS
    nearest = np.take_along_axis(around, weight.argmax(axis=1)[:, None, None], axis=1)[:, 0]
    nearest = _within_reach(geometry, nearest, scale, tile_px, stride)
    # A corner of weight 0 needs no tile, so the tile of the local vector takes its place.
    around = np.where(weight[..., None] > 0, around, nearest[:, None])

    # Row by row and so band by band, as tiles are cut: sorted by y, then x.
    rows_first = np.concatenate([around, nearest[:, None]], axis=1)[..., ::-1]
    lattice, index = np.unique(rows_first.reshape(-1, 2), axis=0, return_inverse=True)
    index = index.reshape(len(geometry), 5)
    order = np.lexsort((past[:, 0], past[:, 1], index[:, 4]))
    origin = lattice[:, ::-1] * stride - tile_px // 2
    tile = index[order, 4]
    return TilePlan(
        origin=origin,
        order=order,
        spatial=centroid[order],
        tile=tile,
        polygons=in_tile(geometry[order], scale, origin[tile]),
        around=index[order, :4],
        weight=weight[order].astype(np.float32),
        tile_px=tile_px,
    )


def _within_reach(geometry: NDArray[np.object_], nearest: Ints, scale: float, tile_px: int, stride: int) -> Ints:
    """Lattice points (n, 2) of tiles that overlap the nucleus; for a crescent or ring, the one nearest to a point inside it."""
    moved = in_tile(geometry, scale, nearest * stride - tile_px // 2)
    outside = ~shapely.relate_pattern(moved, shapely.box(0, 0, tile_px, tile_px), "T********")
    inner = shapely.get_coordinates(shapely.point_on_surface(geometry[outside])) * scale
    nearest = nearest.copy()
    nearest[outside] = np.floor(inner / stride + 0.5).astype(np.int64)
    return nearest
