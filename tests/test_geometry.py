from __future__ import annotations

import numpy as np
import pytest
import shapely
from hypothesis import given, settings
from hypothesis import strategies as st

from prts import geometry
from prts.geometry import lattice_points_within

IDENTITY = np.array([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
# Identity, fine, tilted by about 1.3 degrees, rotated by a right angle, mirrored and sheared (all but "tilted" exact).
LATTICES = {
    "identity": IDENTITY,
    "half": np.array([[0.5, 0.0, 0.25], [0.0, 0.5, 0.0]]),
    "tilted": np.array([[0.99974, -0.0227, -1.3], [0.0227, 0.99974, 0.7]]),
    "turned": np.array([[0.0, -1.0, 12.0], [1.0, 0.0, 0.0]]),
    "sheared": np.array([[-1.0, 0.5, 12.0], [0.0, 0.5, 0.0]]),
}
N_COLS, N_ROWS = 17, 14


def slow(polygons, affine, n_cols=N_COLS, n_rows=N_ROWS, xy=None):
    """Test every point against every polygon."""
    row, col = np.divmod(np.arange(n_rows * n_cols), n_cols)
    x, y = affine @ np.stack([col, row, np.ones_like(col)]).astype(float) if xy is None else xy(row, col).T
    hits = [shapely.within(shapely.points(x, y), polygon) for polygon in polygons]
    return [(p, int(row[i]), int(col[i])) for p, hit in enumerate(hits) for i in np.flatnonzero(hit)]


def fast(polygons, affine, n_cols=N_COLS, n_rows=N_ROWS, **options):
    found = lattice_points_within(np.array(polygons, dtype=object), affine, n_cols, n_rows, **options)
    return list(zip(*(part.tolist() for part in found), strict=True))


def polygon_parts(geometry_):
    return [part for part in shapely.get_parts(geometry_) if part.geom_type == "Polygon" and part.area > 0]


@st.composite
def polygon_lists(draw):
    """Up to three valid polygons on a half-integer grid, often with holes, extending beyond the lattice."""
    vertex = st.tuples(*[st.integers(-4, 30).map(lambda v: v / 2)] * 2)
    polygons = []
    for _ in range(draw(st.integers(1, 3))):
        shape = shapely.make_valid(shapely.Polygon(draw(st.lists(vertex, min_size=3, max_size=9))))
        hole = shapely.make_valid(shapely.Polygon(draw(st.lists(vertex, min_size=3, max_size=5))))
        cut = shapely.difference(shape, hole)
        polygons += polygon_parts(cut if draw(st.booleans()) else shape)
    return polygons


@settings(max_examples=150, deadline=None)
@given(polygons=polygon_lists(), lattice=st.sampled_from(sorted(LATTICES)))
def test_equals_shapely_within(polygons, lattice):
    assert fast(polygons, LATTICES[lattice]) == slow(polygons, LATTICES[lattice])


@settings(max_examples=50, deadline=None)
@given(polygons=polygon_lists(), seed=st.integers(0, 999), residual=st.sampled_from([1e-4, 0.3, 3.0]))
def test_measured_positions_decide_near_edges(polygons, seed, residual):
    affine = LATTICES["tilted"]
    noise = np.random.default_rng(seed).uniform(-residual, residual, (N_ROWS * N_COLS, 2)) / np.sqrt(2)

    def xy(row, col):
        return np.stack([col, row, np.ones_like(col)], axis=1) @ affine.T + noise[row * N_COLS + col]

    assert fast(polygons, affine, xy=xy, residual=residual) == slow(polygons, affine, xy=xy)


def test_boundary_points_are_not_within():
    square = shapely.box(1, 1, 3, 3)
    assert fast([square], IDENTITY) == [(0, 2, 2)]


def test_points_of_a_hole_and_its_rim_are_outside():
    ring = shapely.Polygon([(0, 0), (6, 0), (6, 6), (0, 6)], [[(2, 2), (4, 2), (4, 4), (2, 4)]])
    found = fast([ring], IDENTITY)
    assert len(found) == 25 - 9
    assert (0, 3, 3) not in found
    assert (0, 2, 2) not in found


def test_multipolygon_and_shared_points_keep_their_index():
    pair = shapely.MultiPolygon([shapely.box(0.5, 0.5, 1.5, 1.5), shapely.box(4.5, 0.5, 5.5, 1.5)])
    assert fast([shapely.box(0.5, 0.5, 1.5, 1.5), pair], IDENTITY) == [(0, 1, 1), (1, 1, 1), (1, 1, 5)]


@pytest.mark.parametrize("polygons", [[], [shapely.box(-9, -9, -5, -5)], [shapely.box(1.2, 1.2, 1.8, 1.8)]])
def test_nothing_inside(polygons):
    assert fast(polygons, IDENTITY) == []


def test_blocks_do_not_change_the_result(monkeypatch):
    rng = np.random.default_rng(0)
    circles = list(shapely.buffer(shapely.points(rng.uniform(0, 14, (40, 2))), rng.uniform(0.5, 3, 40)))
    whole = fast(circles, LATTICES["tilted"])
    monkeypatch.setattr(geometry, "_VERTICES_PER_BLOCK", 100)
    assert fast(circles, LATTICES["tilted"]) == whole == slow(circles, LATTICES["tilted"])


def test_far_from_the_origin():
    shift = np.array([[0.0, 0.0, 2.0**20], [0.0, 0.0, 2.0**20]])
    circle = shapely.buffer(shapely.Point(2.0**20 + 7, 2.0**20 + 6), 4.5)
    square = shapely.box(2.0**20 + 1, 2.0**20 + 1, 2.0**20 + 4, 2.0**20 + 4)
    affine = IDENTITY + shift
    assert fast([circle, square], affine) == slow([circle, square], affine)
