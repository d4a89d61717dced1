import numpy as np
import shapely

from prts.features.colour import ColourStats


def density(pixels):
    return -np.log10((pixels.astype(float) + 1) / 256)


def test_columns_are_mean_and_sd_of_optical_density_in_tile_and_nucleus():
    rng = np.random.default_rng(0)
    tiles = rng.integers(0, 256, (3, 256, 256, 3), dtype=np.uint8)
    polygons = np.array(
        [shapely.box(120, 125, 136, 133), shapely.Point(128, 128).buffer(9), shapely.box(100, 120, 150, 140)]
    )
    of_tile, of_nucleus = ColourStats().encode(tiles, polygons)
    col, row = (a.ravel() + 0.5 for a in np.meshgrid(np.arange(256), np.arange(256)))
    for i, polygon in enumerate(polygons):
        od = density(tiles[i]).reshape(-1, 3)
        np.testing.assert_allclose(of_tile[i], [*od.mean(axis=0), *od.std(axis=0)], rtol=1e-4)
        inside = shapely.contains_xy(polygon, col, row) & (np.abs(col - 128) < 32) & (np.abs(row - 128) < 32)
        np.testing.assert_allclose(of_nucleus[i], [*od[inside].mean(axis=0), *od[inside].std(axis=0)], rtol=1e-4)


def test_flat_white_is_zero_and_a_dark_nucleus_shows():
    tile = np.full((1, 256, 256, 3), 255, dtype=np.uint8)
    polygon = np.array([shapely.box(120, 120, 136, 136)])
    of_tile, of_nucleus = ColourStats().encode(tile, polygon)
    assert not of_tile.any()
    assert not of_nucleus.any()
    tile[:, 120:136, 120:136, 0] = 99
    of_tile, of_nucleus = ColourStats().encode(tile, polygon)
    od = -np.log10(100 / 256)
    share = (16 / 256) ** 2
    np.testing.assert_allclose(of_nucleus[0], [od, 0, 0, 0, 0, 0], atol=1e-6)
    np.testing.assert_allclose(of_tile[0, [0, 3]], [share * od, od * np.sqrt(share * (1 - share))], rtol=1e-4)


def test_settings_give_a_fingerprint_of_their_own():
    assert ColourStats().settings()["name"] == "colour"
    assert ColourStats.global_width + ColourStats.local_width == 12
