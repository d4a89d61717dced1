from __future__ import annotations

import numpy as np
import pytest
import shapely
import torch
from shapely import affinity

from prts.errors import InputError
from prts.features import texture
from prts.features.classical_nucleus import hu_moments, nucleus_masks, shape_columns
from prts.features.encoders import Classical

GLOBAL, LOCAL = Classical.column_names()


@pytest.fixture(scope="module")
def tissue():
    """Pink tiles with a purple disc in the middle and others around, and polygons around the middle."""
    rng = np.random.default_rng(0)
    tiles = np.empty((11, 256, 256, 3), dtype=np.uint8)
    y, x = np.mgrid[:256, :256] + 0.5
    for tile in tiles:
        image = np.array([225.0, 160.0, 195.0]) + rng.normal(0, 6, (256, 256, 3))
        centres = np.concatenate([[[128, 128]], rng.uniform(0, 256, (30, 2))])
        for cx, cy in centres:
            inside = (x - cx) ** 2 + (y - cy) ** 2 < rng.uniform(6, 12) ** 2
            image[inside] = np.array([90.0, 60.0, 140.0]) + rng.normal(0, 12, (inside.sum(), 3))
        tile[:] = np.clip(image, 0, 255)
    polygons = shapely.buffer(shapely.points(rng.uniform(126, 130, (11, 2))), rng.uniform(5, 12, 11))
    return tiles, polygons


def test_widths_and_names():
    assert (len(GLOBAL), len(LOCAL)) == (384, 192)
    assert len(set(GLOBAL)) == 384 and len(set(LOCAL)) == 192
    encoder = Classical()
    assert (encoder.global_width, encoder.local_width, encoder.weights_sha256) == (384, 192, None)
    with pytest.raises(InputError, match="center2x2"):
        Classical(pooling="center2x2")


def test_same_vectors_in_any_batch_and_order(tissue):
    tiles, polygons = tissue
    pooled, local = Classical(batch_size=4).encode(tiles, polygons)
    order = np.random.default_rng(1).permutation(len(tiles))
    other = Classical(batch_size=7).encode(tiles[order], polygons[order])
    # columns are of the order of 1; matrix products may round differently in another batch on some processors
    np.testing.assert_allclose(other[0], pooled[order], rtol=0, atol=1e-5)
    np.testing.assert_allclose(other[1], local[order], rtol=0, atol=1e-5)
    single = Classical().encode(tiles[3:4], polygons[3:4])
    np.testing.assert_allclose(single[0][0], pooled[3], rtol=0, atol=1e-5)
    assert pooled.dtype == local.dtype == np.float32


def test_columns_against_numpy(tissue):
    """Independent values of columns from most blocks, straight from the pixels."""
    tiles, polygons = tissue
    pooled, local = Classical().encode(tiles, polygons)
    density = -np.log10((tiles[0].astype(float) + 1) / 256)
    unit = np.array([[0.65, 0.70, 0.29], [0.07, 0.99, 0.11]])
    unit = np.vstack([unit, np.cross(*unit)])
    unit /= np.linalg.norm(unit, axis=1, keepdims=True)
    stain = density @ np.linalg.inv(unit)
    um1, um2 = (stain.reshape(256 // f, f, 256 // f, f, 3).mean(axis=(1, 3)) for f in (2, 4))
    y, x = np.mgrid[:256, :256] + 0.5
    mask = shapely.contains_xy(polygons[0], x, y)

    def g(name):
        return pooled[0, GLOBAL.index(name)]

    def n(name):
        return local[0, LOCAL.index(name)]

    h = um2[..., 0]
    assert g("colour/H/mean") == pytest.approx(h.mean(), abs=1e-5)
    assert g("colour/E/sd") == pytest.approx(um2[..., 1].std(), abs=1e-5)
    assert g("colour/H/skewness") == pytest.approx(((h - h.mean()) ** 3).mean() / h.std() ** 3, abs=1e-3)
    assert g("colour/H/p95") == pytest.approx(np.percentile(h, 95, method="nearest"), abs=1e-5)
    counts = np.histogram(np.clip(um1[..., 0], -0.0999, 1.4999), 16, (-0.1, 1.5))[0]
    np.testing.assert_allclose([g(f"histogram/H/{k}") for k in range(16)], counts / counts.sum(), atol=1e-3)
    assert g("grid/H/1/2") == pytest.approx(h[16:32, 32:48].mean(), abs=1e-5)
    assert g("tissue/dark") == pytest.approx((h > 0.5).mean(), abs=1e-3)
    radius = np.hypot(*(np.mgrid[:64, :64] + 0.5 - 32))
    assert g("ring/2/H_sd") == pytest.approx(h[(radius >= 8) & (radius < 12)].std(), abs=1e-4)

    inside = stain[..., 0][mask]
    assert n("colour/nucleus/H/mean") == pytest.approx(inside.mean(), abs=1e-5)
    assert n("colour/nucleus/H/p50") == pytest.approx(np.percentile(inside, 50, method="nearest"), abs=1e-5)
    ring = shapely.contains_xy(polygons[0].buffer(8), x, y) & ~mask
    assert n("colour/ring/green/mean") == pytest.approx(density[..., 1][ring].mean(), abs=0.02)  # the ring is of pixels
    assert n("chromatin/dense") == pytest.approx((inside > inside.mean() + inside.std()).mean(), abs=1e-3)
    assert n("pair/nucleus") == pytest.approx(np.corrcoef(inside, stain[..., 1][mask])[0, 1], abs=1e-4)
    assert n("contrast/H") > 0.3  # a purple nucleus in pink
    assert n("context/H_minus_tile") == pytest.approx(inside.mean() - stain[..., 0].mean(), abs=1e-4)


def test_local_vectors_see_only_the_central_32_um(tissue):
    tiles, polygons = tissue
    changed = tiles.copy()
    changed[:, :90], changed[:, :, :90] = 255, 0
    before, after = Classical().encode(tiles, polygons)[1], Classical().encode(changed, polygons)[1]
    same = [k for k, name in enumerate(LOCAL) if not name.endswith("_minus_tile")]
    np.testing.assert_array_equal(after[:, same], before[:, same])


@pytest.mark.parametrize("level", [0, 200, 255])
def test_finite_on_flat_tiles_and_odd_polygons(level):
    polygons = np.array(
        [
            shapely.box(128.1, 128.1, 128.2, 128.2),  # between pixel centres
            shapely.box(-300, -300, 500, 500),  # fills the tile
            shapely.box(100, 100, 101.3, 250),  # outside the central crop
            shapely.Point(128, 128).buffer(9).difference(shapely.Point(128, 128).buffer(4)),
        ]
    )
    pooled, local = Classical().encode(np.full((4, 256, 256, 3), level, np.uint8), polygons)
    assert np.isfinite(pooled).all() and np.isfinite(local).all()


def test_masks_are_the_pixels_within(tissue):
    polygons = np.array([*tissue[1], shapely.box(0, 0, 256, 256), shapely.box(60, 120, 100.2, 130)])
    mask, share = nucleus_masks(polygons, 96)
    y, x = np.mgrid[96:160, 96:160] + 0.5
    for polygon, own in zip(polygons, mask.numpy(), strict=True):
        np.testing.assert_array_equal(own, shapely.contains_xy(polygon, x, y))
    assert share[-2].item() == pytest.approx(64**2 / 256**2)
    assert share[-1].item() == pytest.approx(40 / 402, abs=1e-3)


def test_shape_of_an_ellipse_and_a_rectangle():
    ellipse = affinity.rotate(affinity.scale(shapely.Point(128, 128).buffer(1, quad_segs=128), 20, 10), 30)
    rectangle = shapely.box(100, 120, 130, 140)
    ring = shapely.Polygon(shapely.box(0, 0, 10, 10).exterior, [shapely.box(2, 2, 7, 7).exterior])
    columns = shape_columns(np.array([ellipse, rectangle, ring])).numpy()
    value = {name.split("/")[1]: columns[:, k] for k, name in enumerate(n for n in LOCAL if n.startswith("shape/"))}
    # Semi-axes 20 and 10 px are axes of 20 and 10 um; labels say 10 um.
    assert value["major_10um"][0] == pytest.approx(2.0, rel=1e-3) and value["minor_10um"][0] == pytest.approx(
        1.0, rel=1e-3
    )
    assert value["eccentricity"][0] == pytest.approx(np.sqrt(0.75), rel=1e-3)
    assert value["cos_2angle"][0] == pytest.approx(np.sqrt(0.75) * np.cos(np.pi / 3), abs=1e-3)
    assert value["sin_2angle"][0] == pytest.approx(np.sqrt(0.75) * np.sin(np.pi / 3), abs=1e-3)
    assert value["log_area_um2"][1] == pytest.approx(np.log10(600 / 4))
    assert value["log_perimeter_um"][1] == pytest.approx(np.log10(50))
    assert value["aspect"][1] == pytest.approx(2 / 3) and value["rectangularity"][1] == pytest.approx(1)
    assert value["major_10um"][1] == pytest.approx(4 * 30 / np.sqrt(12) / 20, rel=1e-5)
    assert value["circularity"][1] == pytest.approx(4 * np.pi * 600 / 100**2)
    assert value["solidity"][2] == pytest.approx(0.75) and value["hole_share"][2] == pytest.approx(0.25)


def test_hu_moments_do_not_change_with_place_turn_or_size():
    from skimage.measure import moments_central, moments_hu, moments_normalized

    mask = np.zeros((64, 64), dtype=bool)
    mask[10:30, 12:20] = mask[24:30, 12:40] = True
    turned = np.roll(np.rot90(mask), (7, -3), (0, 1))
    doubled = np.kron(mask[8:40, 8:40], np.ones((2, 2), bool))
    hu = hu_moments(torch.from_numpy(np.stack([mask, turned, doubled]))).numpy()
    np.testing.assert_allclose(hu[1], hu[0], atol=1e-6)
    np.testing.assert_allclose(hu[2], hu[0], atol=0.01)
    # scikit-image takes rows for x, a reflection, which turns the sign of the seventh.
    reference = moments_hu(moments_normalized(moments_central(mask.T.astype(float))))
    np.testing.assert_allclose(hu[0], np.sign(reference) * np.log10(1 + 1e6 * np.abs(reference)) / 6, atol=1e-5)


def test_binary_patterns_against_the_definition():
    image = np.random.default_rng(0).integers(0, 10**6, (40, 40))
    ours = texture.binary_patterns(torch.from_numpy(image).float()[None, None])[0, 0].numpy()
    ring = [(-1, -1), (-1, 0), (-1, 1), (0, 1), (1, 1), (1, 0), (1, -1), (0, -1)]
    for row, col in np.ndindex(38, 38):
        bits = [image[row + 1 + r, col + 1 + c] > image[row + 1, col + 1] for r, c in ring]
        changes = sum(a != b for a, b in zip(bits, bits[1:] + bits[:1], strict=True))
        assert ours[row + 1, col + 1] == (sum(bits) if changes <= 2 else 9)


def test_a_peak_of_two_pixels_counts_once():
    image = torch.zeros(1, 1, 9, 9)
    image[0, 0, 2, 2] = 3.0
    image[0, 0, 6, 5:7] = 2.0
    assert texture.local_maxima(image).nonzero()[:, 2:].tolist() == [[2, 2], [6, 5]]


def test_blur_and_gradient_keep_a_ramp():
    ramp = (torch.arange(20.0)[:, None] * 2.0 + torch.arange(30.0) * 3.0)[None, None]
    torch.testing.assert_close(texture.blur(ramp)[..., 2:-2, 2:-2], ramp[..., 2:-2, 2:-2])
    along, down = texture.gradient(ramp)
    assert torch.all(along[..., 1:-1] == 3.0) and torch.all(down[..., 1:-1, :] == 2.0)
