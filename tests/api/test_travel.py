"""The judge of other stains, scanners and orientations."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from scipy.ndimage import gaussian_filter

import prts
from prts.api.polygons import nuclei_of
from prts.evaluation.expression import pearson_per_gene
from prts.evaluation.measured import measure_predicted
from prts.simulate.stain import Stain, shifted_stain

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks import travel, variants


def pixels_of(section: prts.Section) -> np.ndarray:
    with section.open_slide() as slide:
        return slide.read_region(0, 0, slide.width, slide.height)


def test_the_unchanged_line_is_the_prediction_and_a_turn_moves_the_units(
    trained: prts.Model, sections: dict[str, prts.Section], cache: Path
) -> None:
    section = sections["third"]
    prediction = trained.predict(section, cache_dir=cache)
    matched = measure_predicted(prediction, nuclei_of(prediction), section).matched
    rows = travel.some(len(matched.cell_id), 60)
    pcc = np.nanmean(pearson_per_gene(matched.measured[rows], matched.predicted[rows]))

    found = travel.measure(trained.bundle, section, units=60, images=["a tenth brighter", "turned by 90"])

    unchanged, brighter, turned = found
    assert unchanged.pcc == pytest.approx(pcc, abs=1e-6) and pcc > 0.05
    assert brighter.difference == pytest.approx(brighter.pcc - unchanged.pcc, abs=1e-9)
    assert brighter.low <= brighter.difference <= brighter.high
    # units that were left behind would read other tissue
    assert abs(turned.difference) < 0.05
    mean, lost = travel.summary(found)
    assert mean == pytest.approx((brighter.pcc + turned.pcc) / 2)
    assert lost == pytest.approx(1 - mean / unchanged.pcc)
    assert travel.table(found).count("\n") == 5


def test_restaining_to_the_reference_changes_nothing_and_a_shift_pales_nuclei() -> None:
    rng = np.random.default_rng(0)
    rgb = rng.integers(30, 240, (40, 40, 3)).astype(np.uint8)
    same = variants.restained(rgb, Stain()).astype(int)
    assert np.abs(same - rgb).max() <= 1

    # pure hematoxylin at 1 unit, by hand
    violet = np.round(np.array([243.0, 242.0, 244.0]) * 10 ** -np.array([0.61, 0.72, 0.34] / np.float64(1.0028459)))
    paler = variants.restained(violet.astype(np.uint8), shifted_stain(1.0))
    amount = np.exp(-0.12) * np.array([0.65, 0.72, 0.30]) / np.linalg.norm([0.65, 0.72, 0.30])
    assert np.abs(paler - np.array([244, 241, 242]) * 10**-amount).max() < 2


def test_jitter_of_one_and_nothing_changes_nothing() -> None:
    rgb = np.random.default_rng(0).integers(60, 250, (20, 20, 3)).astype(np.uint8)
    assert np.abs(variants.jittered(rgb, (1, 1, 1), 0.0).astype(int) - rgb).max() <= 1
    darker = variants.jittered(rgb, (1.2, 1.2, 1.2), 0.0)
    wanted = 255 * (np.maximum(rgb, 1) / 255) ** 1.2
    assert np.abs(darker - wanted).max() <= 1


def test_an_image_is_changed_as_a_whole(sections: dict[str, prts.Section], tmp_path: Path) -> None:
    """Tiles of the written file leave no seams, and only what is named changes."""
    section = sections["third"]
    before = pixels_of(section)
    assert max(before.shape) > 512
    made = {name: variants.variant(section, name, tmp_path) for name in variants.NAMES}

    padded = np.pad(before, ((16, 16), (16, 16), (0, 0)), constant_values=255).astype(np.float32)
    blurred = gaussian_filter(padded, (1, 1, 0))[16:-16, 16:-16]
    assert np.abs(pixels_of(made["blurred by 1 px"]) - blurred).max() <= 0.51
    darker = pixels_of(made["a tenth darker"])
    np.testing.assert_array_equal(darker, np.floor(before * np.float32(0.9) + 0.5).astype(np.uint8))
    packed = pixels_of(made["JPEG of quality 30"]).astype(int)
    assert 0.5 < np.abs(packed - before).mean() < 20
    np.testing.assert_array_equal(pixels_of(made["turned by 90"]), np.rot90(before))
    np.testing.assert_array_equal(pixels_of(made["mirrored"]), before[:, ::-1])
    assert all(one.measurement is section.measurement and one.mpp == section.mpp for one in made.values())
