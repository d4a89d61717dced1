from __future__ import annotations

import numpy as np
import pytest
import shapely
import torch

from prts.features import tiles as tiles_module
from prts.features.tiles import cut_tiles, plan_tiles


def _all(slide, plan, size=7):
    n = len(plan.order)
    groups = [slice(k, min(k + size, n)) for k in range(0, n, size)]
    return np.concatenate([tiles.cpu().numpy() for tiles in cut_tiles(slide, 0.5, plan, groups)])


_CUDA = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


@pytest.fixture(params=[None, "cpu", pytest.param("cuda", marks=_CUDA)])
def buffer(request, monkeypatch):
    """Runs a test with both buffers, that of accelerators in main memory too."""
    if request.param is not None:
        device, on_device = torch.device(request.param), tiles_module._DeviceBandBuffer
        monkeypatch.setattr(tiles_module, "_BandBuffer", lambda *given: on_device(*given, device))


@pytest.mark.usefixtures("buffer")
@pytest.mark.parametrize("mpp", [0.25, 0.6889])
def test_tiles_are_windows_of_the_rescaled_slide(fake_slide, nuclei_at, mpp):
    slide = fake_slide(mpp=mpp)
    xy = np.random.default_rng(1).uniform(0, [slide.width, slide.height], (60, 2))
    nuclei = nuclei_at(xy)
    plan = plan_tiles(nuclei, slide.mpp, 0.5, 256)
    tiles = _all(slide, plan)
    padded = np.pad(slide.rescaled, ((300, 300), (300, 300), (0, 0)), constant_values=255)
    assert sorted(plan.order) == list(range(60))
    for position, tile in zip(plan.order, tiles, strict=True):
        left, top = np.floor(xy[position] * mpp / 0.5 + 0.5).astype(int) - 128 + 300
        np.testing.assert_array_equal(tile, padded[top : top + 256, left : left + 256])


@pytest.mark.usefixtures("buffer")
def test_every_pixel_is_read_once_and_glass_never(fake_slide, nuclei_at, monkeypatch):
    monkeypatch.setattr(tiles_module, "BLOCK", 384)
    slide = fake_slide(height=4000, width=1500)
    rng = np.random.default_rng(2)
    # Two clusters, 2,200 px (of 0.5 um) apart: the bands between them hold no nucleus.
    xy = np.concatenate([rng.uniform(0, [2900, 1100], (80, 2)), rng.uniform([1500, 6600], [2900, 7900], (40, 2))])
    plan = plan_tiles(nuclei_at(xy), slide.mpp, 0.5, 256)
    _all(slide, plan)
    assert slide.reads.max() == 1
    assert slide.reads[1300:2300].sum() == 0
    # Tiles begin at 0.5 * 1500 - 128 = 622 in the lower cluster: the first block of 384 columns is not theirs.
    assert slide.reads[2700:, :200].sum() == 0
    assert all(height == 512 and y % 512 == 0 for _, y, _, height in slide.requests)


@pytest.mark.usefixtures("buffer")
def test_a_later_start_asks_for_the_same_regions(fake_slide, nuclei_at):
    slide = fake_slide(height=3000)
    xy = np.random.default_rng(3).uniform(0, [slide.width, slide.height], (90, 2))
    plan = plan_tiles(nuclei_at(xy), slide.mpp, 0.5, 256)
    whole = _all(slide, plan)
    requests = set(slide.requests)
    slide.requests.clear()
    rest = [tiles.cpu() for tiles in cut_tiles(slide, 0.5, plan, [slice(50, 66), slice(70, 90)])]
    np.testing.assert_array_equal(np.concatenate(rest), np.concatenate([whole[50:66], whole[70:]]))
    assert set(slide.requests) <= requests


def test_polygons_are_in_pixels_of_their_tile(nuclei_at):
    nuclei = nuclei_at(np.array([[1000.3, 2000.9], [40.0, 30.0]]), 10.0)
    plan = plan_tiles(nuclei, 0.25, 0.5, 256)
    np.testing.assert_array_equal(plan.order, [1, 0])
    # The lower nucleus: centroid (500.15, 1000.45) on the grid, tile from (372, 872).
    np.testing.assert_array_equal(plan.origin, [[20 - 128, 15 - 128], [372, 872]])
    np.testing.assert_allclose(shapely.bounds(plan.polygons[1]), [123.15, 123.45, 133.15, 133.45], atol=1e-9)
    np.testing.assert_allclose(plan.spatial, [[40.0, 30.0], [1000.3, 2000.9]])
    assert shapely.bounds(nuclei.geometry.array[0])[0] == pytest.approx(990.3)  # the table's own polygons stay


@pytest.mark.real
def test_tiles_of_a_real_slide_are_windows_of_its_rescaled_region(prts_data, nuclei_at):
    from prts.io.slide import open_slide

    with open_slide(prts_data / "images" / "CMU-1-Small-Region.svs") as slide:
        xy = np.random.default_rng(0).uniform(0, [slide.width, slide.height], (30, 2))
        plan = plan_tiles(nuclei_at(xy), slide.mpp, 0.5, 256)
        tiles = _all(slide, plan)
        width, height = slide.size_at(0.5)
        whole = slide.read_region(-200, -200, width + 400, height + 400, mpp=0.5)
    for (x, y), tile in zip(plan.origin, tiles, strict=True):
        window = whole[y + 200 : y + 456, x + 200 : x + 456]
        assert np.abs(tile.astype(int) - window).max() <= 1
