"""Color statistics against numpy on each tile by itself."""

from __future__ import annotations

import numpy as np
import pytest
import shapely

from prts.features.colour import COLUMNS, ColourTile, colour, colour_tile


def density(pixels):
    return -np.log10((pixels.astype(float) + 1) / 256)


def one_at_a_time(slide, polygons, tile):
    """Every tile cut and every polygon drawn on its own."""
    scale, side, pad = slide.mpp / tile.mpp, tile.tile_px, 600
    padded = density(np.pad(slide.rescaled, ((pad, pad), (pad, pad), (0, 0)), constant_values=255))
    rows = []
    for polygon in polygons:
        moved = shapely.transform(polygon, lambda xy: xy * scale)
        x, y = np.floor(np.array([moved.centroid.x, moved.centroid.y]) + 0.5).astype(int)
        left, top = x - side // 2 + pad, y - side // 2 + pad
        around = padded[top : top + side, left : left + side].reshape(-1, 3)
        columns, lines = np.arange(x - 32, x + 32), np.arange(y - 32, y + 32)
        inside = shapely.contains_xy(moved, *(grid + 0.5 for grid in np.meshgrid(columns, lines)))
        near = padded[y - 32 + pad : y + 32 + pad, x - 32 + pad : x + 32 + pad]
        within = near[inside] if inside.any() else near[32:33, 32]
        rows.append([*around.mean(axis=0), *around.std(axis=0), *within.mean(axis=0), *within.std(axis=0)])
    return np.array(rows)


@pytest.mark.parametrize("tile", [ColourTile(), ColourTile(tile_px=64)])
def test_equals_one_nucleus_at_a_time_whatever_the_blocks(fake_slide, tile):
    slide = fake_slide(height=700, width=500)
    rng = np.random.default_rng(0)
    xy = rng.uniform(0, [slide.width, slide.height], (40, 2))
    xy[:3] = [[0, 0], [slide.width, slide.height], [slide.width / 2, 3]]
    polygons = shapely.buffer(shapely.points(xy), rng.uniform(3, 40, 40))
    polygons[3] = shapely.box(600.1, 600.1, 600.4, 600.4)  # holds no center of a pixel
    polygons[4] = shapely.box(300, 600, 700, 620)  # wider than what is looked at
    polygons[5] = shapely.Point(500, 500).buffer(60).difference(shapely.Point(500, 500).buffer(30))
    expected = one_at_a_time(slide, polygons, tile)
    whole = np.hstack(colour(slide, polygons, tile))
    assert whole.shape == (40, 2 * len(COLUMNS))
    np.testing.assert_allclose(whole, expected, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(np.hstack(colour(slide, polygons, tile, block=97)), whole, atol=1e-5)


def test_flat_white_is_zero_and_a_dark_nucleus_shows(fake_slide):
    slide = fake_slide(height=256, width=256)
    slide.rescaled[:] = 255
    polygon = np.array([shapely.box(240, 240, 272, 272)])  # at 0.25 um/px, 16 px wide at 0.5
    assert not np.any(colour(slide, polygon, ColourTile()))
    slide.rescaled[120:136, 120:136, 0] = 99
    (of_tile,), (of_nucleus,) = colour(slide, polygon, ColourTile())
    od = -np.log10(100 / 256)
    share = (16 / 256) ** 2
    np.testing.assert_allclose(of_nucleus, [od, 0, 0, 0, 0, 0], atol=1e-6)
    np.testing.assert_allclose(of_tile[[0, 3]], [share * od, od * np.sqrt(share * (1 - share))], rtol=1e-4)


def test_bins_are_seen_at_two_um_per_pixel():
    assert colour_tile(bins=True) == ColourTile(2.0, 64) and colour_tile(bins=False) == ColourTile(0.5, 256)
    assert colour_tile(bins=True).settings()["mpp"] == 2.0
