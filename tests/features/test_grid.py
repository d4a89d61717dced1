"""Features from tiles on a lattice against a version that encodes each tile on its own and goes nucleus by nucleus."""

from __future__ import annotations

import contextlib
from types import SimpleNamespace

import numpy as np
import pytest
import shapely
import torch
from scipy.ndimage import map_coordinates

import prts._torchvision  # noqa: F401  (before timm)
from prts.data.prepare import STAGE_VERSION, prepare_features
from prts.errors import InputError
from prts.features import extract as extract_module
from prts.features.encoders import Timm, encoder_from_settings
from prts.features.extract import extract
from prts.features.grid import plan_grid
from prts.features.store import read_features, read_store_attrs
from prts.io.cache import file_identity, fingerprint

NAME = "test_vit.r160_in1k"


class CountingVit(Timm):
    """Counts calls of the network, and fails when told to."""

    fail_at: int | None = None
    calls = 0

    def _encode_batch(self, tiles, polygons, tile):
        if self.calls == self.fail_at:
            raise RuntimeError("killed")
        self.calls += 1
        return super()._encode_batch(tiles, polygons, tile)


@pytest.fixture(scope="module")
def vit(tmp_path_factory):
    """Makes encoders of one small random ViT."""
    import timm

    torch.manual_seed(1)
    path = tmp_path_factory.mktemp("weights") / "vit.pth"
    torch.save(timm.create_model(NAME, pretrained=False).state_dict(), path)

    def make(**options):
        return CountingVit(NAME, path, **{"sampling": "grid", "precision": "fp32", "batch_size": 4, **options})

    make.path = path
    return make


@pytest.fixture
def case(fake_slide, nuclei_at):
    """A slide of 350 x 420 um, nuclei anywhere on it, some on its border."""
    slide = fake_slide(height=700, width=840)
    xy = np.random.default_rng(0).uniform(0, [slide.width, slide.height], (60, 2))
    xy[:4] = [[0, 0], [slide.width, slide.height], [0, 700], [slide.width - 3, 5]]
    return slide, nuclei_at(xy, np.linspace(6, 40, 60))


def _by_nucleus(slide, nuclei, encoder, *, pooling, pair):
    """Global and local vectors, one nucleus at a time, every tile encoded on its own with timm's network."""
    encoder.load()
    network, stride = encoder._network, encoder.stride
    padded = np.pad(slide.rescaled, ((512, 512), (512, 512), (0, 0)), constant_values=255)

    def tokens(i, j):
        left, top = i * stride - 128 + 512, j * stride - 128 + 512
        with torch.inference_mode():
            pooled, patches = network(torch.from_numpy(padded[None, top : top + 256, left : left + 256].copy()))
        return pooled[0].numpy(), patches[0].numpy()

    rows = []
    for polygon in nuclei.geometry:
        polygon = shapely.transform(polygon, lambda xy: xy * slide.mpp / 0.5)
        cx, cy = polygon.centroid.x, polygon.centroid.y
        x, y = int(np.floor(cx + 0.5)), int(np.floor(cy + 0.5))
        total, best = 0.0, None
        for i in (x // stride, x // stride + 1):
            for j in (y // stride, y // stride + 1):
                weight = (1 - abs(x / stride - i)) * (1 - abs(y / stride - j))
                if weight > 0:
                    total = total + weight * tokens(i, j)[0].astype(float)
                if best is None or weight > best[0]:
                    best = (weight, i, j)
        _, i, j = best
        patches, chosen = tokens(i, j)[1], []
        for row in range(16):
            for col in range(16):
                left, top = i * stride - 128 + col * 16, j * stride - 128 + row * 16
                box = shapely.box(left, top, left + 16, top + 16)
                if pooling == "bilinear":
                    inside = False
                elif pooling == "nucleus":
                    inside = polygon.intersection(box).area > 1e-9
                else:  # the four whose common corner is nearest
                    inside = box.centroid.buffer(16 + 1e-6, cap_style="square").contains(
                        shapely.Point(_corner(cx, cy, i, j, stride))
                    )
                if inside:
                    chosen.append(patches[row, col].astype(float))
        if pooling == "bilinear":
            place = np.clip(np.array([cy - j * stride, cx - i * stride]) / 16 + 7.5, 0, 15)
            channels = np.moveaxis(patches.astype(float), 2, 0)
            chosen = [[map_coordinates(channel, place[:, None], order=1)[0] for channel in channels]]
        local = np.mean(chosen, axis=0)
        rows.append(np.concatenate([local.reshape(-1, 2).mean(axis=1) if pair else local, total]))
    return np.stack(rows)


def _corner(cx, cy, i, j, stride):
    """The corner of four patches nearest to a point; one of the tile's inner corners."""
    left, top = i * stride - 128, j * stride - 128
    corners = (
        [(abs(cx - left - 16 * k), 16 * k + left) for k in range(1, 16)],
        [(abs(cy - top - 16 * k), 16 * k + top) for k in range(1, 16)],
    )
    return min(corners[0])[1], min(corners[1])[1]


@pytest.mark.parametrize(
    ("stride", "pooling", "pair"),
    [(128, "nucleus", True), (256, "nucleus", False), (96, "center2x2", True), (192, "bilinear", False)],
)
def test_equals_one_nucleus_at_a_time(case, vit, tmp_path, stride, pooling, pair):
    slide, nuclei = case
    encoder = vit(stride=stride, pooling=pooling, pair_channels=pair)
    extract(slide, nuclei, encoder, tmp_path / "f.h5")
    some = nuclei[::3].reset_index(drop=True)  # the slow version is slow
    got = read_features(tmp_path / "f.h5", some["cell_id"].to_numpy())
    expected = _by_nucleus(slide, some, encoder, pooling=pooling, pair=pair)
    assert got.shape == expected.shape == (20, encoder.local_width + encoder.global_width)
    np.testing.assert_allclose(got, expected, atol=2e-5 * np.abs(expected).max())


def test_in_the_middle_of_a_tile_it_is_exact_extraction(fake_slide, nuclei_at, vit, tmp_path):
    slide = fake_slide(height=900, width=900)
    xy = np.array([[1, 1], [2, 1], [0, 3], [5, 6]]) * 128 / slide.mpp * 0.5
    nuclei = nuclei_at(xy, np.array([8.0, 20.0, 30.0, 47.0]))
    for pooling in ("nucleus", "center2x2", "bilinear"):
        stores = [tmp_path / f"{pooling}-{sampling}.h5" for sampling in ("exact", "grid")]
        encoders = [vit(sampling=sampling, pooling=pooling) for sampling in ("exact", "grid")]
        for store, encoder in zip(stores, encoders, strict=True):
            extract(slide, nuclei, encoder, store)
        exact, grid = (read_features(store, nuclei["cell_id"].to_numpy()) for store in stores)
        np.testing.assert_allclose(grid, exact, atol=1e-5)
        assert encoders[1].calls == 1  # four tiles, no neighbour without weight


def test_only_tiles_that_a_nucleus_needs_are_read_and_encoded(fake_slide, nuclei_at, vit, tmp_path):
    slide = fake_slide(height=3000, width=1400)
    rng = np.random.default_rng(4)
    cells = np.array([[2, 2], [2, 3], [9, 20]]) * 128  # squares of the lattice that hold nuclei
    xy = (np.repeat(cells, 200, axis=0) + rng.uniform(1, 127, (600, 2))) / slide.mpp * 0.5
    few = nuclei_at(xy[::20], 8.0)
    encoder, again = vit(), vit()
    extract(slide, few, encoder, tmp_path / "few.h5")
    # corners of two squares one above the other, and of one by itself
    assert encoder.calls == np.ceil((6 + 4) / 4)
    assert slide.reads.max() == 1 and slide.reads[1024:2048].sum() == 0
    extract(slide, nuclei_at(xy, 8.0), again, tmp_path / "many.h5")
    assert again.calls == encoder.calls  # twenty times as many nuclei


@pytest.mark.parametrize("fail_at", [0, 3, 6, 11])
def test_an_interrupted_run_ends_with_the_same_bytes(case, vit, tmp_path, monkeypatch, fail_at):
    monkeypatch.setattr(extract_module, "CHUNK", 8)
    slide, nuclei = case
    whole, resumed = tmp_path / "a" / "f.h5", tmp_path / "b" / "f.h5"
    encoder, killed, second = vit(), vit(), vit()
    extract(slide, nuclei, encoder, whole)
    killed.fail_at = fail_at
    with pytest.raises(RuntimeError, match="killed"):
        extract(slide, nuclei, killed, resumed)
    assert not resumed.exists()
    extract(slide, nuclei, second, resumed)
    assert second.calls == encoder.calls - fail_at // 2 * 2  # chunks are of two batches
    assert resumed.read_bytes() == whole.read_bytes()


def test_order_and_company_of_the_nuclei_do_not_matter(case, vit, tmp_path, monkeypatch):
    slide, nuclei = case
    extract(slide, nuclei, vit(), tmp_path / "whole.h5")
    some = nuclei.sample(25, random_state=0)
    monkeypatch.setattr(extract_module, "CHUNK", 5)
    extract(slide, some, vit(), tmp_path / "some.h5")
    extract(slide, nuclei, vit(batch_size=7), tmp_path / "sevens.h5")
    asked = some["cell_id"].to_numpy()
    whole = read_features(tmp_path / "whole.h5", asked)
    # other batches, or another size of batch: the network's own rounding
    np.testing.assert_allclose(read_features(tmp_path / "some.h5", asked), whole, atol=1e-5)
    np.testing.assert_allclose(read_features(tmp_path / "sevens.h5", asked), whole, atol=1e-5)


def test_a_slide_smaller_than_a_tile(fake_slide, nuclei_at, vit, tmp_path):
    slide = fake_slide(height=90, width=60)
    nuclei = nuclei_at(np.array([[3.0, 4.0], [118.0, 175.0], [60.0, 90.0]]), 7.0)
    encoder = vit()
    extract(slide, nuclei, encoder, tmp_path / "f.h5")
    expected = _by_nucleus(slide, nuclei, encoder, pooling="nucleus", pair=True)
    np.testing.assert_allclose(read_features(tmp_path / "f.h5", ["n0", "n1", "n2"]), expected, atol=2e-4)


def test_a_crescent_takes_its_tokens_from_a_tile_that_it_reaches():
    from geopandas import GeoDataFrame

    # its centroid (400, 400 px at 0.25 um) is in the hollow, 200 px at 0.5 um from the ring
    ring = shapely.Point(400, 400).buffer(700).difference(shapely.Point(400, 400).buffer(650))
    plan = plan_grid(GeoDataFrame({"cell_id": ["ring"], "geometry": [ring]}), 0.25, 0.5, 256, 64)
    assert plan.polygons[0].intersection(shapely.box(0, 0, 256, 256)).area > 0
    np.testing.assert_allclose(plan.spatial, [[400, 400]], atol=1e-6)
    np.testing.assert_array_equal(plan.origin[plan.around[0]], [[64, 64], [128, 64], [64, 128], [128, 128]])
    np.testing.assert_allclose(plan.weight, [[49 / 64, 7 / 64, 7 / 64, 1 / 64]])


def test_the_mode_is_recorded_and_made_again(case, vit, tmp_path):
    slide, nuclei = case
    grid, exact = vit(stride=160).settings(), vit(sampling="exact", stride=160).settings()
    assert (grid["sampling"], grid["stride"]) == ("grid", 160)
    assert exact["sampling"] == "exact" and "stride" not in exact  # it changes nothing there
    again = encoder_from_settings(grid, vit.path)
    assert (again.sampling, again.stride) == ("grid", 160) and again.settings() == grid
    before = {key: value for key, value in exact.items() if key != "sampling"}
    assert encoder_from_settings(before, vit.path).settings() == exact
    extract(slide, nuclei, vit(stride=160), tmp_path / "f.h5")
    attrs = read_store_attrs(tmp_path / "f.h5")
    assert (attrs["sampling"], attrs["stride"], attrs["settings"]) == ("grid", 160, grid)
    extract(slide, nuclei, vit(sampling="exact"), tmp_path / "e.h5")
    attrs = read_store_attrs(tmp_path / "e.h5")
    assert attrs["sampling"] == "exact" and "stride" not in attrs


def test_stores_of_each_mode_have_names_of_their_own_and_old_ones_keep_theirs(case, vit, tmp_path):
    slide, nuclei = case
    section = SimpleNamespace(
        image=slide.path, mpp=slide.mpp, reading=dict, open_slide=lambda: contextlib.nullcontext(slide)
    )

    def name(encoder):
        return prepare_features(tmp_path / "cache", section, nuclei, encoder, "counts-1").name

    encoders = [vit(sampling="exact"), vit(), vit(stride=200)]
    names = [name(encoder) for encoder in encoders]
    assert len(set(names)) == 3
    before = encoders[0].settings()
    del before["sampling"]
    settings = {
        "version": STAGE_VERSION["features"],
        "nuclei": "counts-1",
        "image": file_identity(slide.path),
        "mpp": slide.mpp,
        "encoder": before,
    }
    assert names[0] == f"features-timm-{fingerprint(settings)}.h5"


def test_several_scales_are_the_vectors_of_each_side_by_side(case, vit, tmp_path):
    slide, nuclei = case
    half = SimpleNamespace(**{**vars(slide), "rescaled": slide.rescaled[::2, ::2]})

    def read_region(x, y, width, height, mpp, **given):
        return type(slide).read_region(slide if mpp == 0.5 else half, x, y, width, height, 0.5, **given)

    half.reads, fine = half.reads[::2, ::2].copy(), SimpleNamespace(**{**vars(slide), "read_region": read_region})
    section = SimpleNamespace(
        image=slide.path, mpp=slide.mpp, reading=dict, open_slide=lambda: contextlib.nullcontext(fine)
    )

    def prepared(**options):
        path = prepare_features(tmp_path, section, nuclei, vit(**options), "counts-1")
        return path, read_features(path, nuclei["cell_id"].to_numpy(), ("local", "global"))

    (_, coarse), (_, fine_alone) = prepared(mpp=1.0), prepared()
    path, both = prepared(scales=[1.0, 0.5])
    local = coarse.shape[1] - vit().global_width
    expected = [coarse[:, :local], fine_alone[:, :local], coarse[:, local:], fine_alone[:, local:]]
    np.testing.assert_array_equal(both, np.hstack(expected))
    assert not np.array_equal(coarse, fine_alone)
    settings = read_store_attrs(path)["settings"]
    assert settings["scales"] == [1.0, 0.5] and encoder_from_settings(settings, vit.path).settings() == settings
    with pytest.raises(InputError, match=r"encoder.scales: \[1.0, 1.0\] lists one twice"):
        vit(scales=[1.0, 1.0])


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"sampling": "lattice"}, "encoder.sampling: 'lattice' is not accepted; .*exact'? or '?grid"),
        ({"stride": 300}, "encoder.stride: 300 leaves gaps between tiles of 256 px; choose 16 to 256"),
        ({"stride": 8}, "encoder.stride: 8"),
        ({"stride": 100.5}, "encoder.stride: 100.5"),
    ],
)
def test_wrong_options_are_refused(vit, options, why):
    with pytest.raises(InputError, match=why):
        vit(**options)
