"""Tiles of any size and um/px against windows that are read from the slide one by one."""

from __future__ import annotations

import numpy as np
import pytest
import shapely
import tifffile
import torch

import prts._torchvision  # noqa: F401  (before timm)
from prts.features import tiles as tiles_module
from prts.features.encoders import Classical, Timm, ViT256
from prts.features.extract import extract
from prts.features.grid import plan_grid
from prts.features.store import read_features, read_store_attrs
from prts.features.tiles import cut_tiles, plan_tiles
from prts.io.slide import open_slide

MPP = 0.4
WIDTH, HEIGHT = 1700, 2600


@pytest.fixture(scope="module")
def image(tmp_path_factory):
    """A smooth pattern with noise, 680 x 1040 um."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    pixels = np.stack([128 + 100 * np.sin(x / 37 + k) * np.cos(y / 53 - k) for k in range(3)], axis=2)
    path = tmp_path_factory.mktemp("slide") / "slide.tif"
    tifffile.imwrite(path, np.clip(pixels + rng.normal(0, 10, pixels.shape), 0, 255).astype(np.uint8), tile=(256, 256))
    return path


@pytest.fixture
def nuclei(nuclei_at):
    """Anywhere on the slide, some on its border."""
    xy = np.random.default_rng(1).uniform(0, [WIDTH, HEIGHT], (40, 2))
    xy[:4] = [[0, 0], [WIDTH, HEIGHT], [0, 1300], [WIDTH - 3, 5]]
    return nuclei_at(xy, np.linspace(6, 25, 40))


def _one_by_one(slide, mpp, tile_px, centroids):
    """The window around each centroid, read from the slide on its own."""
    tiles = []
    for x, y in centroids:
        left, top = (int(np.floor(v * slide.mpp / mpp + 0.5)) - tile_px // 2 for v in (x, y))
        tiles.append(slide.read_region(left, top, tile_px, tile_px, mpp=mpp))
    return np.stack(tiles)


@pytest.mark.slow
@pytest.mark.parametrize("on_device", [False, True])
@pytest.mark.parametrize("mpp", [0.5, 1.0])
@pytest.mark.parametrize("tile_px", [128, 224, 256, 320, 600])
def test_tiles_are_the_windows_that_the_slide_gives(image, nuclei, monkeypatch, mpp, tile_px, on_device):
    monkeypatch.setattr(tiles_module, "BLOCK", 640)
    if on_device:  # the buffer of accelerators, in main memory
        buffer = tiles_module._DeviceBandBuffer
        monkeypatch.setattr(tiles_module, "_BandBuffer", lambda *given: buffer(*given, torch.device("cpu")))
    with open_slide(image, mpp=MPP) as slide:
        plan = plan_tiles(nuclei, slide.mpp, mpp, tile_px)
        groups = [slice(k, min(k + 7, 40)) for k in range(0, 40, 7)]
        cut = np.concatenate([tiles.numpy() for tiles in cut_tiles(slide, mpp, plan, groups)])
        centroids = shapely.get_coordinates(shapely.centroid(nuclei.geometry.array))
        expected = _one_by_one(slide, mpp, tile_px, centroids[plan.order])
    assert cut.shape == (40, tile_px, tile_px, 3)
    np.testing.assert_array_equal(cut, expected)


def _center_pixel(encoder):
    """An encoder whose global vector is the middle pixel of the tile, its local vector the centroid of the polygon."""

    class Center(Classical):
        global_width, local_width = 3, 2

        def encode(self, tiles, polygons):
            assert tiles.shape[1:] == (self.tile_px, self.tile_px, 3)
            middle = tiles[:, self.tile_px // 2, self.tile_px // 2].astype(np.float32)
            return middle, shapely.get_coordinates(shapely.centroid(polygons)).astype(np.float32)

    return Center(**encoder)


@pytest.mark.parametrize(("mpp", "tile_px"), [(0.5, 128), (1.0, 320)])
def test_extraction_uses_the_encoders_geometry(image, nuclei, tmp_path, mpp, tile_px):
    encoder = _center_pixel({"mpp": mpp, "tile_px": tile_px})
    with open_slide(image, mpp=MPP) as slide:
        extract(slide, nuclei, encoder, tmp_path / "f.h5")
        got = read_features(tmp_path / "f.h5", nuclei["cell_id"].to_numpy())
        for (x, y), row in zip(shapely.get_coordinates(shapely.centroid(nuclei.geometry.array)), got, strict=True):
            at = np.floor(np.array([x, y]) * MPP / mpp + 0.5)
            np.testing.assert_array_equal(row[2:], slide.read_region(*map(int, at), 1, 1, mpp=mpp)[0, 0])
            np.testing.assert_allclose(row[:2], np.array([x, y]) * MPP / mpp - at + tile_px // 2, atol=1e-3)
    attrs = read_store_attrs(tmp_path / "f.h5")
    assert (attrs["mpp"], attrs["tile"]) == (mpp, tile_px)


def test_a_grid_of_smaller_tiles(image, nuclei):
    plan = plan_grid(nuclei, MPP, 0.5, 96, 48)
    assert set(np.unique((plan.origin + 48) % 48)) == {0}
    centers = plan.origin[plan.tile] + 48
    centroids = shapely.get_coordinates(shapely.centroid(nuclei.geometry.array)) * MPP / 0.5
    assert np.abs(centers - np.floor(centroids[plan.order] + 0.5)).max() <= 24  # within half a stride of the nearest
    inside = shapely.intersects(plan.polygons, shapely.box(0, 0, 96, 96))
    assert inside.all()
    np.testing.assert_allclose(plan.weight.sum(axis=1), 1, rtol=1e-6)


@pytest.mark.parametrize("tile_px", [64, 128, 224, 320])
def test_classical_features_of_other_tiles(tile_px):
    encoder = Classical(tile_px=tile_px, mpp=1.0)
    tiles = np.random.default_rng(0).integers(0, 256, (2, tile_px, tile_px, 3), dtype=np.uint8)
    middle = tile_px / 2
    polygons = shapely.buffer(shapely.points([[middle, middle], [middle + 1, middle - 1]]), [5.0, 8.0])
    pooled, local = encoder.encode(tiles, polygons)
    assert pooled.shape == (2, 384) and local.shape == (2, 192)
    assert np.isfinite(pooled).all() and np.isfinite(local).all()
    area = local[:, encoder.column_names()[1].index("shape/log_area_um2")]
    np.testing.assert_allclose(area, np.log10(shapely.area(polygons)), rtol=1e-5)  # a pixel is 1 um2


@pytest.mark.parametrize("tile_px", [96, 224, 320])
def test_a_vit_at_other_tile_sizes(tmp_path, tile_px):
    import timm

    torch.manual_seed(1)
    path = tmp_path / "vit.pth"
    torch.save(timm.create_model("test_vit.r160_in1k", pretrained=False).state_dict(), path)
    encoder = Timm("test_vit.r160_in1k", path, tile_px=tile_px, precision="fp32", batch_size=2, pair_channels=False)
    tiles = np.random.default_rng(0).integers(0, 256, (1, tile_px, tile_px, 3), dtype=np.uint8)
    row, col = 2, 3
    polygon = np.array([shapely.box(16 * col + 1, 16 * row + 1, 16 * col + 15, 16 * row + 15)])
    _, local = encoder.encode(tiles, polygon)
    with torch.inference_mode():
        tokens = encoder._network(torch.from_numpy(tiles))[1].numpy()
    assert tokens.shape[1:3] == (tile_px // 16, tile_px // 16)
    np.testing.assert_allclose(local[0], tokens[0, row, col], atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("tile_px", [128, 320])
def test_vit256_interpolates_its_position_embedding_to_the_tile(tmp_path, tile_px):
    from timm.models.vision_transformer import VisionTransformer

    from prts.features.weights import dino_position_embedding

    def network(size):
        return VisionTransformer(img_size=size, patch_size=16, embed_dim=384, num_heads=6, num_classes=0).eval()

    torch.manual_seed(0)
    tensors = network(224).state_dict()
    tensors["pos_embed"] = torch.randn(1, 197, 384) * 0.2
    torch.save({"teacher": tensors}, tmp_path / "vit.pth")
    tiles = np.random.default_rng(0).integers(0, 256, (1, tile_px, tile_px, 3), dtype=np.uint8)
    polygon = np.array([shapely.Point(tile_px / 2, tile_px / 2).buffer(10)])
    encoder = ViT256(tmp_path / "vit.pth", tile_px=tile_px, precision="fp32", batch_size=1)
    by_hand = network(tile_px)
    by_hand.load_state_dict({**tensors, "pos_embed": dino_position_embedding(tensors["pos_embed"], tile_px // 16)})
    with torch.inference_mode():
        pixels = torch.from_numpy(tiles / 127.5 - 1.0).permute(0, 3, 1, 2).float()
        expected = by_hand.forward_features(pixels)[:, 0].numpy()
    np.testing.assert_allclose(encoder.encode(tiles, polygon)[0], expected, atol=1e-4)
