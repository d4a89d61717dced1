"""Stain matching: known mixtures of stains are recovered, and a slide of another stain gets the training slide's colours."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tifffile

from prts.errors import InputError
from prts.preprocess.stains import stains
from prts.preprocess.stains.base import StainMatching, TissueSample, match_stain, sample_slides, statistics
from prts.section import open_section

HE = np.array([[0.65, 0.70, 0.29], [0.07, 0.99, 0.11]])
WHITE = np.array([240.0, 240.0, 240.0])


def mixture(stains=HE, strength=(1.0, 1.0), white=WHITE, n=20_000, seed=0) -> np.ndarray:
    """Pixels (n, 3) of random amounts of two stains, a fifth of them nearly pure in either."""
    rng = np.random.default_rng(seed)
    amounts = rng.gamma(2.0, 0.35, (n, 2))
    amounts[: n // 10, 0] = amounts[n // 10 : n // 5, 1] = 0
    unit = stains / np.linalg.norm(stains, axis=1, keepdims=True)
    light = white * np.exp(-(amounts * strength) @ unit)
    return np.clip(np.rint(light), 1, 255).astype(np.uint8)


def known(pixels: np.ndarray, white=WHITE) -> dict:
    return statistics(TissueSample(pixels, white))


def test_macenko_finds_the_stains_that_were_mixed():
    found = np.array(known(mixture())["macenko"]["stains"])
    expected = HE / np.linalg.norm(HE, axis=1, keepdims=True)
    angle = np.degrees(np.arccos(np.clip((found * expected).sum(axis=1), -1, 1)))
    assert angle.max() < 3


def test_macenko_turns_one_laboratorys_pixels_into_the_others():
    """The same amounts of two other stains, other strengths, another lamp: pixel by pixel the reference comes back."""
    other = np.array([[0.55, 0.76, 0.35], [0.12, 0.95, 0.28]])
    target, source = mixture(), mixture(other, strength=(0.7, 1.4), white=np.array([250.0, 247, 252]))
    match = StainMatching("macenko", known(target), known(source, np.array([250.0, 247, 252])))
    difference = np.abs(match(source).astype(int) - target)
    assert np.median(difference) <= 4
    assert np.median(np.abs(source.astype(int) - target)) > 12
    np.testing.assert_array_equal(match(np.array([[250, 247, 252]], np.uint8)), [[240, 240, 240]])


def test_histogram_undoes_any_rising_curve_and_leaves_black_and_white():
    target = mixture(seed=1)
    curve = np.rint(255 * (np.arange(256) / 255) ** 0.6).astype(np.uint8)
    source = curve[target]
    match = StainMatching("histogram", known(target), known(source))
    assert np.abs(match(source).astype(int) - target).mean() < 1.5
    assert np.abs(source.astype(int) - target).mean() > 20
    assert match(np.array([[0, 0, 0], [255, 255, 255]], np.uint8)).tolist() == [[0] * 3, [255] * 3]


def test_reinhard_gives_mean_and_spread_of_the_reference():
    target, source = mixture(), mixture(strength=(0.6, 1.3), seed=3)
    match = StainMatching("reinhard", known(target), known(source))
    before, after, wanted = (known(pixels)["reinhard"] for pixels in (source, match(source), target))
    for key in ("mean", "sd"):
        off = np.abs(np.subtract(after[key], wanted[key])).max()
        assert off < 0.03
        assert np.abs(np.subtract(before[key], wanted[key])).max() > 3 * off


@pytest.mark.parametrize("method", stains.names())
def test_the_reference_itself_is_left_as_it_is(method):
    pixels = mixture()
    match = StainMatching(method, known(pixels), known(pixels))
    assert np.abs(match(pixels).astype(int) - pixels).mean() < 1.5


def test_a_matched_section_is_read_in_the_references_colours(tmp_path: Path):
    side = 300
    for name, strength in (("a", (1.0, 1.0)), ("b", (0.6, 1.5))):
        image = mixture(strength=strength, n=side * side).reshape(side, side, 3)
        image[:40] = 240  # glass
        tifffile.imwrite(
            tmp_path / f"{name}.tif", image, photometric="rgb", resolution=(20_000, 20_000), resolutionunit=3
        )
    a, b = (open_section(name, tmp_path / f"{name}.tif") for name in "ab")
    with a.open_slide() as slide:
        reference = statistics(sample_slides([slide]))
        wanted = slide.read_region(50, 50, 200, 200).mean(axis=(0, 1))
    np.testing.assert_array_equal(reference["white"], [240] * 3)
    assert match_stain(b, "none", None) is b
    for method in stains.names():
        recoloured = match_stain(b, method, reference)
        with b.open_slide() as plain, recoloured.open_slide() as slide:
            before = plain.read_region(50, 50, 200, 200).mean(axis=(0, 1))
            after = slide.read_region(50, 50, 200, 200).mean(axis=(0, 1))
            np.testing.assert_array_equal(slide.thumbnail(100), plain.thumbnail(100))
        assert np.abs(after - wanted).max() < 0.35 * np.abs(before - wanted).max(), method


def test_a_bundle_without_reference_and_an_unknown_method_are_refused_in_one_line(tmp_path: Path):
    tifffile.imwrite(tmp_path / "x.tif", np.full((64, 64, 3), 255, np.uint8), photometric="rgb")
    section = open_section("x", tmp_path / "x.tif", mpp=0.5)
    for method, reference, said in (
        (
            "reinhard",
            None,
            r"stain: the model has no color statistics of its training section for reinhard; choose none",
        ),
        ("vahadane", None, r"stain: 'vahadane' is not a method; choose one of none, histogram, macenko, reinhard"),
        ("macenko", known(mixture()), "too few to match colors; choose none"),
    ):
        with pytest.raises(InputError, match=said):
            match_stain(section, method, reference)
