from __future__ import annotations

import logging
from pathlib import Path
from types import SimpleNamespace

import geopandas as gpd
import numpy as np
import pytest
import shapely

from prts.errors import InputError
from prts.models.scale import check_scale, describe_nuclei


def lattice(side_um: float, step_um: float = 20.0, mpp: float = 0.5) -> gpd.GeoDataFrame:
    """400 square nuclei on a square lattice."""
    xy = np.stack(np.meshgrid(np.arange(20), np.arange(20)), axis=-1).reshape(-1, 2) * step_um / mpp
    half = side_um / mpp / 2
    area = np.full(400, side_um**2)
    return gpd.GeoDataFrame({"area_um2": area, "geometry": shapely.box(*(xy - half).T, *(xy + half).T)})


def section(mpp: float = 0.5) -> SimpleNamespace:
    return SimpleNamespace(image=Path("slide.tif"), mpp=mpp, mpp_source="mpp=")


TRAINING = describe_nuclei({"a": lattice(7), "b": lattice(7.5)}, {"a": 0.5, "b": 0.5})


def test_what_a_bundle_keeps_of_its_nuclei() -> None:
    assert TRAINING["area_um2"] == {"5": 49, "25": 49, "50": 52.62, "75": 56.25, "95": 56.25}
    # on a square lattice the fifth neighbour lies across the diagonal
    assert TRAINING["density_per_mm2"] == pytest.approx(5 / (np.pi * 2 * 20**2) * 1e6, abs=0.1)
    assert TRAINING["factor"] == pytest.approx((56.25 / 49) ** 2, abs=1e-3)
    assert describe_nuclei({"a": lattice(7)}, {"a": 0.5})["factor"] == 1.3


def test_a_slide_at_half_its_um_per_px_is_refused_in_one_line_that_names_the_right_one() -> None:
    """The nuclei of training, read at 0.25 um/px: a quarter of the area."""
    with pytest.raises(InputError, match=r"slide.tif: 0.25 um/px \(mpp=\) may be wrong") as caught:
        check_scale(lattice(3.6, 10), section(0.25), 0.5, TRAINING, refuse=True)
    message = str(caught.value)
    assert (
        "13 um2, but 53 in training" in message
        and "at 0.5 um/px" in message
        and "set `check_scale` to false" in message
    )
    assert "\n" not in message
    with pytest.raises(InputError, match="210 um2, but 53 in training"):
        check_scale(lattice(14.5, 40), section(1.0), 0.5, TRAINING, refuse=True)


def test_a_difference_beyond_that_of_the_training_sections_is_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        check_scale(lattice(8), section(), 0.5, TRAINING, refuse=True)
        assert not caplog.records
        found = check_scale(lattice(9), section(), 0.5, TRAINING, refuse=True)
        assert "81 um2, but 53 in training" in caplog.text
        caplog.clear()
        check_scale(lattice(3.6), section(), 0.5, TRAINING, refuse=False)
        assert "may be wrong" in caplog.text
    assert (found["median_area_um2"], found["training_median_area_um2"]) == (81, 52.62)


def test_rescaling_is_recorded_and_enlarging_warned_about(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        found = check_scale(lattice(7.2, mpp=1.0), section(1.0), 0.5, TRAINING, refuse=True)
    assert (found["slide_mpp"], found["model_mpp"], found["rescaled_by"]) == (1.0, 0.5, 2.0)
    assert "is coarser than the training images (0.5)" in caplog.text
    assert "training_median_area_um2" not in check_scale(lattice(1), section(), 0.5, None, refuse=True)
