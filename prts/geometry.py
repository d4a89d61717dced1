"""Find the points of a regular lattice within polygons, such as 2 um bins or pixels in nuclei.

A lattice needs no spatial index. In lattice coordinates (column, row) an edge of a polygon crosses a lattice row at one column, and the
points of the row inside the polygon are between an odd and the next even crossing. This is computed for all edges of all polygons at once;
only points too close to an edge for floating point (or for a lattice that is not perfectly regular) are tested by GEOS.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import shapely
from numpy.typing import NDArray

if TYPE_CHECKING:
    from collections.abc import Callable

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]
PolygonArray = NDArray[np.object_]

# Rounding errors of the affine map and the crossings are about 1e-15 of the largest coordinate; this leaves a wide margin.
_RELATIVE_TOLERANCE = 1e-11
# Limits the edge arrays (about 20) to a few hundred MiB.
_VERTICES_PER_BLOCK = 1_000_000


class _Lattice(NamedTuple):
    affine: Floats
    n_cols: int
    n_rows: int
    xy: Callable[[Ints, Ints], Floats] | None
    residual: float


def lattice_points_within(
    polygons: PolygonArray,
    affine: Floats,
    n_cols: int,
    n_rows: int,
    *,
    xy: Callable[[Ints, Ints], Floats] | None = None,
    residual: float = 0.0,
) -> tuple[Ints, Ints, Ints]:
    """Lattice points strictly within each polygon, exactly as `within` of shapely (points on a boundary are not within).

    Parameters
    ----------
    polygons
        Valid shapely PolygonArray or MultiPolygons, also with holes, (n_polygons,).
    affine
        The lattice, (2, 3): point (col, row) is at [x, y] = affine @ [col, row, 1] in the coordinates of the polygons.
    n_cols, n_rows
        Size of the lattice: 0 <= col < n_cols and 0 <= row < n_rows.
    xy
        Function that returns exact coordinates (n, 2) of points (row, col), if `affine` is a fit to measured positions. Called only for
        points near an edge. If None, the affine map is exact.
    residual
        Largest difference between `xy` and `affine`, in the unit of the polygons. Points within this distance of an edge are tested by
        their exact coordinates: a larger value costs time, not exactness.

    Returns
    -------
    polygon, row, col
        One entry per (polygon, point within it), sorted by polygon, row, column.
    """
    polygons = np.asarray(polygons, dtype=object)
    lattice = _Lattice(np.asarray(affine, dtype=np.float64), n_cols, n_rows, xy, residual)
    n_vertices = np.cumsum(shapely.get_num_coordinates(polygons))
    first = [0, *(np.flatnonzero(np.diff(n_vertices // _VERTICES_PER_BLOCK)) + 1).tolist()]
    keys = np.concatenate(
        [
            _within_block(polygons[start:stop], lattice) + start * n_rows * n_cols
            for start, stop in zip(first, [*first[1:], len(polygons)], strict=True)
        ]
    )
    return _unpack(keys, lattice)


def _unpack(keys: Ints, lattice: _Lattice) -> tuple[Ints, Ints, Ints]:
    """Polygon, row and column from keys (polygon * n_rows + row) * n_cols + col."""
    line, col = np.divmod(keys, lattice.n_cols)
    polygon, row = np.divmod(line, lattice.n_rows)
    return polygon, row, col


def _within_block(polygons: PolygonArray, lattice: _Lattice) -> Ints:
    """Sorted keys of the points within the polygons."""
    n_cols, n_rows = lattice.n_cols, lattice.n_rows
    to_lattice: Floats = np.linalg.inv(lattice.affine[:, :2]).astype(np.float64)
    tail, head, owner, largest = _edges(polygons, lattice.affine[:, 2], to_lattice)
    # The tolerance in columns and rows.
    slack = (lattice.residual + _RELATIVE_TOLERANCE * largest) * np.linalg.norm(to_lattice, axis=1)

    low, high = np.minimum(tail[:, 1], head[:, 1]), np.maximum(tail[:, 1], head[:, 1])
    edge, row = _integers(low - slack[1], high + slack[1], n_rows)
    start, step = tail[edge], head[edge] - tail[edge]
    level = step[:, 1] == 0.0
    rise = np.where(level, 1.0, step[:, 1])

    # Half-open in rows: a vertex on a lattice row counts once for the two edges that meet there.
    crosses = (low[edge] <= row) & (row < high[edge])
    column = start[:, 0] + step[:, 0] * np.clip((row - start[:, 1]) / rise, 0.0, 1.0)
    inside = _fill(owner[edge[crosses]] * n_rows + row[crosses], column[crosses], n_cols)

    # The stretch of each edge within the slack of a lattice row, and the columns within the slack of that stretch.
    share = [np.clip((row + side * slack[1] - start[:, 1]) / rise, 0.0, 1.0) for side in (-1.0, 1.0)]
    from_col, to_col = (
        start[:, 0] + step[:, 0] * np.where(level, end, part) for part, end in zip(share, (0.0, 1.0), strict=True)
    )
    near, col = _integers(np.minimum(from_col, to_col) - slack[0], np.maximum(from_col, to_col) + slack[0], n_cols)
    if len(near) == 0:
        return inside
    doubtful = np.unique((owner[edge[near]] * n_rows + row[near]) * n_cols + col)
    return _settle(inside, doubtful, polygons, lattice)


def _edges(polygons: PolygonArray, origin: Floats, to_lattice: Floats) -> tuple[Floats, Floats, Ints, float]:
    """Tail and head (n_edges, 2) of all rings' edges as (col, row), the polygon of each, and the largest coordinate."""
    rings, polygon_of_ring = _rings(polygons)
    vertices, ring = shapely.get_coordinates(rings, return_index=True)
    largest = max(np.abs(vertices).max(initial=1.0), np.abs(origin).max())
    vertices = (vertices - origin) @ to_lattice.T
    in_ring = np.flatnonzero(ring[:-1] == ring[1:])
    return vertices[in_ring], vertices[in_ring + 1], polygon_of_ring[ring[in_ring]], float(largest)


def _rings(polygons: PolygonArray) -> tuple[PolygonArray, Ints]:
    """Rings and the polygon of each; a polygon without holes is used as its own ring, since extracting rings takes time."""
    whole = (shapely.get_type_id(polygons) == shapely.GeometryType.POLYGON) & (
        shapely.get_num_interior_rings(polygons) == 0
    )
    others = np.flatnonzero(~whole)
    parts, of_part = shapely.get_parts(polygons[others], return_index=True)
    rings, of_ring = shapely.get_rings(parts, return_index=True)
    return np.concatenate([polygons[whole], rings]), np.concatenate([np.flatnonzero(whole), others[of_part[of_ring]]])


def _integers(low: Floats, high: Floats, n: int) -> tuple[Ints, Ints]:
    """All integers in the closed ranges [low, high] and in [0, n), with the index of their range."""
    first = np.clip(np.ceil(low), 0, n).astype(np.int64)
    last = np.clip(np.floor(high), -1, n - 1).astype(np.int64)
    length = np.maximum(last - first + 1, 0)
    which = np.repeat(np.arange(len(first)), length)
    before = np.cumsum(length) - length
    return which, np.arange(len(which)) + (first - before)[which]


def _fill(line: Ints, column: Floats, n_cols: int) -> Ints:
    """Sorted keys of the points between odd and even crossings of each line (polygon * n_rows + row)."""
    order = np.lexsort((column, line))
    line, column = line[order[::2]], column[order]
    interval, col = _integers(column[::2], column[1::2], n_cols)
    return line[interval] * n_cols + col


def _settle(inside: Ints, doubtful: Ints, polygons: PolygonArray, lattice: _Lattice) -> Ints:
    """Test the doubtful points by their exact coordinates with GEOS."""
    polygon, row, col = _unpack(doubtful, lattice)
    if lattice.xy is None:
        x, y = lattice.affine @ np.stack([col, row, np.ones_like(col)]).astype(np.float64)
    else:
        x, y = lattice.xy(row, col).T
    asked = polygons[polygon]
    shapely.prepare(asked)
    within = shapely.contains_xy(asked, x, y)
    shapely.destroy_prepared(asked)  # the caller owns the arrays
    at = np.minimum(np.searchsorted(doubtful, inside), len(doubtful) - 1)
    # A point found twice (where a ring touches itself) is on an edge, and so among the doubtful ones.
    return np.sort(np.concatenate([inside[doubtful[at] != inside], doubtful[within]]))
