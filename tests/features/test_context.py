"""The 42 context statistics against direct sums, at any size of block, in bounded memory."""

from __future__ import annotations

import tracemalloc
from dataclasses import dataclass

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter

from prts.features.context import COLUMNS, MPP, SIGMAS_UM, context, settings


@dataclass
class Image:
    """Stands for prts.io.slide.Slide: `pixels` is the whole image at 2 um/px."""

    pixels: NDArray[np.uint8]
    mpp: float = 0.5
    read: int = 0

    def read_region(
        self, x: int, y: int, width: int, height: int, mpp: float | None = None, *, outside: int = 255
    ) -> NDArray[np.uint8]:
        assert mpp == MPP
        assert outside == 255
        self.read += 1
        out = np.full((height, width, 3), outside, np.uint8)
        rows, columns = self.pixels.shape[:2]
        y0, y1, x0, x1 = max(y, 0), min(y + height, rows), max(x, 0), min(x + width, columns)
        if y0 < y1 and x0 < x1:
            out[y0 - y : y1 - y, x0 - x : x1 - x] = self.pixels[y0:y1, x0:x1]
        return out


def tissue(height: int, width: int, seed: int = 0) -> NDArray[np.uint8]:
    """Color that varies at all scales, as tissue does."""
    rng = np.random.default_rng(seed)
    total = sum(
        gaussian_filter(rng.normal(size=(height, width, 3)), (scale, scale, 0)) * scale for scale in (1, 4, 16, 50)
    )
    return np.clip(150 + 60 * total / total.std(), 0, 255).astype(np.uint8)


def direct(pixels: NDArray[np.uint8], x: float, y: float) -> list[float]:
    """Gaussian-weighted sums over all pixels within 3 sigma along each axis of a point in um, white outside the image."""
    found = []
    for sigma in SIGMAS_UM:
        reach = int(np.ceil(3 * sigma / MPP)) + 2
        column, row = int(x / MPP), int(y / MPP)
        i, j = np.meshgrid(*(place + np.arange(-reach, reach + 1) for place in (row, column)), indexing="ij")
        inside = (i >= 0) & (i < pixels.shape[0]) & (j >= 0) & (j < pixels.shape[1])
        window = np.full((*inside.shape, 3), 255.0)
        window[inside] = pixels[i[inside], j[inside]]
        density = -np.log10((window + 1) / 256)
        offset = np.arange(-reach, reach + 1) + 0.5
        down, across = (offset + row) * MPP - y, (offset + column) * MPP - x
        weight = [np.exp(-0.5 * (d / sigma) ** 2) * (np.abs(d) <= 3 * sigma) for d in (down, across)]
        kernel = np.outer(*weight)[..., None] / np.outer(*weight).sum()
        mean = (kernel * density).sum(axis=(0, 1))
        found += [*mean, *np.sqrt((kernel * (density - mean) ** 2).sum(axis=(0, 1)))]
    return found


def test_columns_are_gaussian_weighted_mean_and_sd_of_optical_density() -> None:
    pixels = tissue(500, 600)
    xy_um = np.array([[601.3, 488.8], [300.0, 700.0], [30.4, 21.9], [1199.0, 999.0], [800.7, 411.2]])
    columns = context(Image(pixels), xy_um / 0.5, block=512)
    assert columns.shape == (5, 42) == (len(xy_um), len(COLUMNS))
    assert columns.dtype == np.float32
    expected = np.array([direct(pixels, *point) for point in xy_um])
    # pyramid and interpolation widen a Gaussian: by up to 6 % at 3 um, 3 % elsewhere; optical density varies here by .2 to .4
    np.testing.assert_allclose(columns[:, :6], expected[:, :6], atol=0.03)
    np.testing.assert_allclose(columns[:, 6:], expected[:, 6:], atol=0.01)
    assert np.abs(columns - expected).mean() < 0.003


def test_even_color_and_white_are_exact() -> None:
    even = np.full((400, 400, 3), (99, 49, 199), np.uint8)
    columns = context(Image(even, mpp=2.0), np.array([[200.0, 200.0]]), block=256)[0].reshape(7, 2, 3)
    white = Image(np.full((50, 50, 3), 255, np.uint8))
    od = -np.log10(np.array([100, 50, 200]) / 256)
    np.testing.assert_allclose(columns[:5, 0], np.tile(od, (5, 1)), rtol=1e-5)  # finer than the way to the edge
    assert columns[:5, 1].max() < 2e-3
    assert columns[6, 1].min() > 0.01  # 192 um reach beyond the image, which is white there
    assert not context(white, np.array([[100.0, 100.0], [-9.0, 900.0]]), block=256).any()


def test_the_size_of_a_block_changes_nothing() -> None:
    pixels = tissue(300, 400, seed=1)
    xy = np.random.default_rng(2).uniform(-20, 1700, (60, 2))
    whole = context(Image(pixels), xy, block=1024)
    for block in (128, 288):
        np.testing.assert_allclose(context(Image(pixels), xy, block=block), whole, atol=1e-6)
    some = np.array([40, 3, 17])
    np.testing.assert_allclose(context(Image(pixels), xy[some], block=288), whole[some], atol=1e-6)


def test_blocks_without_nuclei_are_not_read_and_a_wrong_size_is_refused() -> None:
    image = Image(tissue(100, 4000))
    context(image, np.array([[10.0, 10.0], [15_900.0, 300.0]]), block=512)
    assert image.read == 2
    assert context(image, np.empty((0, 2))).shape == (0, 42)
    with pytest.raises(ValueError, match="multiple of 32"):
        context(image, np.array([[10.0, 10.0]]), block=100)


def test_memory_does_not_grow_with_the_slide() -> None:
    peaks = []
    for width in (600, 4800):
        image = Image(np.full((256, width, 3), 128, np.uint8))
        xy = np.stack([np.linspace(0, 4 * width, 400), np.full(400, 300.0)], axis=1)
        tracemalloc.start()
        context(image, xy, block=256)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.2 * peaks[0]


def test_settings_name_every_scale() -> None:
    assert settings()["sigmas_um"] == list(SIGMAS_UM)
    assert COLUMNS[:6] == (
        "red_mean_3um",
        "green_mean_3um",
        "blue_mean_3um",
        "red_sd_3um",
        "green_sd_3um",
        "blue_sd_3um",
    )
