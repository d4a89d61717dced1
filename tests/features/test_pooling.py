from __future__ import annotations

import numpy as np
import pytest
import shapely
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.ndimage import map_coordinates

from prts.features.pooling import center2x2, channel_pairs, patch_overlap, pool_local, tokens_at


def _slow_overlap(polygon, grid=16, patch=16.0):
    """One nucleus, one patch at a time, by the area they share."""
    out = np.zeros((grid, grid), dtype=bool)
    for row in range(grid):
        for col in range(grid):
            box = shapely.box(col * patch, row * patch, (col + 1) * patch, (row + 1) * patch)
            out[row, col] = polygon.intersection(box).area > 1e-9
    return out


def _random_polygon(rng):
    """A star around some point near the tile's centre, from tiny to wider than the tile."""
    n, size = rng.integers(4, 12), rng.choice([2.0, 15.0, 60.0, 200.0])
    angle = np.sort(rng.uniform(0, 2 * np.pi, n))
    radius = rng.uniform(0.4, 1.0, n) * size
    points = rng.uniform(100, 156, 2) + np.stack([np.cos(angle), np.sin(angle)], axis=1) * radius[:, None]
    return shapely.Polygon(points).buffer(0)


def test_local_vectors_equal_one_nucleus_at_a_time():
    rng = np.random.default_rng(0)
    polygons = np.array(
        [p for p in (_random_polygon(rng) for _ in range(25)) if p.geom_type == "Polygon" and p.area > 0]
    )
    assert len(polygons) >= 20
    overlap = patch_overlap(polygons)
    tokens = torch.from_numpy(rng.normal(size=(len(polygons), 16, 16, 384)).astype(np.float32))
    pooled = channel_pairs(pool_local(tokens, torch.from_numpy(overlap))).numpy()
    for k, polygon in enumerate(polygons):
        mask = _slow_overlap(polygon)
        np.testing.assert_array_equal(overlap[k], mask)
        mean = tokens[k].numpy()[mask].astype(np.float64).mean(axis=0)
        np.testing.assert_allclose(pooled[k], [(mean[2 * i] + mean[2 * i + 1]) / 2 for i in range(192)], atol=1e-6)


def test_a_patch_that_is_only_touched_does_not_count():
    polygons = np.array(
        [shapely.box(112, 128, 128, 144), shapely.box(112, 128, 128.01, 144), shapely.box(-50, -50, 300, 300)]
    )
    overlap = patch_overlap(polygons)
    assert [tuple(map(int, place)) for place in np.argwhere(overlap[0])] == [(8, 7)]  # row 8, column 7
    assert np.argwhere(overlap[1]).tolist() == [[8, 7], [8, 8]]
    assert overlap[2].all()


def test_reading_tokens_at_points_equals_scipys_interpolation():
    rng = np.random.default_rng(0)
    tokens, at = rng.normal(size=(3, 5, 7, 4)).astype(np.float32), rng.uniform(-1, 8, (50, 2))
    at[:4] = [[0.5, 0.5], [6.5, 4.5], [7.0, 5.0], [3.0, 2.0]]  # corners, the edge, a corner of four patches
    tile = rng.integers(3, size=50)
    read = tokens_at(torch.from_numpy(tokens), torch.from_numpy(at), torch.from_numpy(tile)).numpy()
    for k, (x, y) in enumerate(at):
        place = np.array([[y - 0.5], [x - 0.5]])
        expected = [map_coordinates(tokens[tile[k], ..., c], place, order=1, mode="nearest")[0] for c in range(4)]
        np.testing.assert_allclose(read[k], expected, atol=1e-6)
    np.testing.assert_allclose(read[3], tokens[tile[3], 1:3, 2:4].mean(axis=(0, 1)), atol=1e-6)


def test_patches_of_other_sizes():
    overlap = patch_overlap(np.array([shapely.box(120, 130, 121, 131)]), 256, 256 / 18)
    assert np.argwhere(overlap[0]).tolist() == [[9, 8]]  # 130 / 14.22 = 9.14, 120 / 14.22 = 8.44


def test_a_polygon_outside_its_tile_is_refused():
    with pytest.raises(ValueError, match="position 1"):
        patch_overlap(np.array([shapely.box(100, 100, 110, 110), shapely.box(300, 10, 310, 20)]))


@settings(max_examples=50, deadline=None)
@given(
    st.tuples(*[st.floats(0, 250) for _ in range(2)]),
    st.tuples(*[st.floats(0.01, 300) for _ in range(2)]),
)
def test_rectangles_overlap_the_rows_and_columns_they_cover(corner, size):
    (x, y), (w, h) = corner, size
    rows, cols = np.argwhere(patch_overlap(np.array([shapely.box(x, y, x + w, y + h)]))[0]).T
    last = np.minimum(np.ceil(np.array([y + h, x + w]) / 16), 16)
    assert (rows.min(), cols.min()) == (int(y // 16), int(x // 16))
    assert (rows.max() + 1, cols.max() + 1) == tuple(last.astype(int))


def test_center2x2_takes_the_four_middle_tokens():
    tokens = torch.zeros(1, 16, 16, 2)
    tokens[0, 7, 7], tokens[0, 7, 8], tokens[0, 8, 7], tokens[0, 8, 8] = (
        torch.tensor([float(k), 1.0]) for k in (1, 2, 3, 6)
    )
    tokens[0, 6, 7], tokens[0, 9, 8] = 100.0, 100.0
    assert center2x2(tokens).tolist() == [[3.0, 1.0]]
    odd = torch.arange(9.0).reshape(1, 3, 3, 1)
    assert center2x2(odd).item() == 4.0


def test_channel_pairs_average_neighbours():
    assert channel_pairs(torch.tensor([[1.0, 3.0, 10.0, 20.0]])).tolist() == [[2.0, 15.0]]
