"""Black areas that a scanner did not reach count as glass; fluorescence on black is still refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from prts.errors import InputError
from prts.io.optical_density import without_black
from prts.io.slide import open_slide
from prts.preprocess.image_check import require_h_and_e
from prts.preprocess.stains.base import sample_slides
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
