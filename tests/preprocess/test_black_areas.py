"""Black areas that a scanner did not reach count as glass; fluorescence on black is still refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from shapely import box

from prts.errors import InputError
from prts.features.context import context
from prts.features.tiles import cut_tiles, plan_tiles
from prts.io.nuclei import make_nuclei
from prts.io.optical_density import without_black
from prts.io.slide import open_slide
from prts.preprocess.image_check import require_h_and_e
from prts.preprocess.stains.base import sample_slides
from prts.segmentation.bins import Bins
from prts.segmentation.watershed import Watershed

GLASS, PINK, VIOLET = (243, 242, 244), (225, 160, 200), (90, 60, 140)


def tissue(side: int = 400) -> np.ndarray:
    """Violet nuclei on pink stroma, a third of it glass."""
    rng = np.random.default_rng(0)
    image = np.full((side, side, 3), GLASS, float)
    image[:, : side * 2 // 3] = PINK
    y, x = np.mgrid[:side, :side]
    for cy, cx in rng.uniform(15, side - 15, (60, 2)) * (1, 0.6):
        image[(y - cy) ** 2 + (x - cx) ** 2 < 60] = VIOLET
    return np.clip(image + rng.normal(0, 4, image.shape), 0, 255).astype(np.uint8)


def black_border(image: np.ndarray) -> np.ndarray:
    return np.pad(image, ((150, 150), (150, 150), (0, 0)))


def black_below(image: np.ndarray) -> np.ndarray:
    return np.concatenate([image, np.full_like(image, 3), np.full_like(image, 3)])


def black_corner(image: np.ndarray) -> np.ndarray:
    tilted = image.copy()
    y, x = np.mgrid[: len(image), : len(image)]
    tilted[x + y < 250] = 0
    return tilted


@pytest.mark.parametrize("change", [black_border, black_below, black_corner])
@pytest.mark.parametrize("suffix", ["png", "jpg"])
def test_black_counts_as_glass(change, suffix: str, tmp_path: Path) -> None:
    image = tissue()
    Image.fromarray(change(image)).save(tmp_path / f"a.{suffix}", **({"quality": 80} if suffix == "jpg" else {}))
    Image.fromarray(image).save(tmp_path / "whole.png")
    with open_slide(tmp_path / f"a.{suffix}", mpp=0.5) as slide, open_slide(tmp_path / "whole.png", mpp=0.5) as whole:
        require_h_and_e(slide)
        found, expected = Watershed()(slide), Watershed()(whole)
        assert 0.6 * len(expected) <= len(found) <= len(expected)
        assert found["area_um2"].median() == pytest.approx(expected["area_um2"].median(), rel=0.1)
        assert sample_slides([slide]).tissue.min() > 30


@pytest.mark.parametrize("color", [(20, 20, 230), (10, 240, 20), (230, 30, 200), (90, 90, 100)])
@pytest.mark.parametrize("share", [0.03, 0.1, 0.3])
def test_fluorescence_on_black_is_still_refused(color, share: float, tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    image = np.zeros((400, 400, 3), np.uint8)
    image[rng.random((40, 40)).repeat(10, 0).repeat(10, 1) < share] = color
    Image.fromarray(image).save(tmp_path / "a.png")
    with open_slide(tmp_path / "a.png", mpp=0.5) as slide, pytest.raises(InputError, match=r"a\.png: "):
        require_h_and_e(slide)


def test_dark_nuclei_stay() -> None:
    image = tissue()
    image[100:108, 100:108] = 5  # a pigment of 4 um
    assert without_black(image) is image


@pytest.mark.parametrize("fill", [0, 6])
def test_what_models_read_is_the_same_beside_black_as_beside_white(fill: int, tmp_path: Path) -> None:
    image = tissue(300)
    for name, value in (("black", fill), ("white", 255)):
        canvas = np.full((700, 700, 3), value, np.uint8)
        canvas[180:480, 150:450] = image
        if name == "white":  # the rim that is taken for an artifact of compression
            canvas[180:188], canvas[472:480], canvas[:, 150:158], canvas[:, 442:450] = 255, 255, 255, 255
        Image.fromarray(canvas).save(tmp_path / f"{name}.png")
    nuclei = make_nuclei([box(x, y, x + 16, y + 16) for x in (170, 290, 420) for y in (200, 330)], 0.5)
    xy = np.array([[158.0 + 20, 208.0], [298.0, 338.0]])
    tiles, surroundings, bins = [], [], []
    for name in ("black", "white"):
        with open_slide(tmp_path / f"{name}.png", mpp=0.5) as slide:
            plan = plan_tiles(nuclei, 0.5, 0.5, 256)
            tiles.append(next(cut_tiles(slide, 0.5, plan, [slice(0, 6)])).numpy())
            surroundings.append(context(slide, xy, block=32))
            bins.append(len(Bins(bin_um=8)(slide)))
    assert np.array_equal(*tiles)
    assert 0.85 * bins[1] <= bins[0] <= bins[1]
    # at 2 um per pixel the rim is a little wider
    np.testing.assert_allclose(*surroundings, atol=0.03)
