import numpy as np
import pytest
import shapely

from prts.features.morphology import morphology
from prts.io.nuclei import make_nuclei

MPP = 0.25


@pytest.fixture
def nuclei():
    rng = np.random.default_rng(0)
    centres = rng.uniform(0, 1500, (200, 2)) / MPP
    size = rng.uniform(4, 8, (200, 2)) / MPP
    return make_nuclei([shapely.box(*(c - s / 2), *(c + s / 2)) for c, s in zip(centres, size, strict=True)], MPP)


def test_shape_is_in_um_at_any_pixel_size(nuclei):
    columns = morphology(nuclei, MPP)
    assert columns.shape == (200, 21)
    x0, y0, x1, y1 = nuclei.geometry.bounds.to_numpy().T * MPP
    np.testing.assert_allclose(columns[:, 0], np.log10((x1 - x0) * (y1 - y0)), rtol=1e-4)
    np.testing.assert_allclose(columns[:, 1], np.log10(2 * (x1 - x0 + y1 - y0)), rtol=1e-4)
    np.testing.assert_allclose(columns[:, 5], 1, rtol=1e-5)  # solidity
    coarse = make_nuclei(nuclei.geometry.scale(0.5, 0.5, origin=(0, 0)), 2 * MPP)
    np.testing.assert_allclose(morphology(coarse, 2 * MPP), columns, atol=2e-3)


def test_crowding_is_counted_without_the_nucleus_itself(nuclei):
    centre = shapely.get_coordinates(shapely.centroid(nuclei.geometry.to_numpy())) * MPP
    distance = np.linalg.norm(centre[:, None] - centre[None], axis=2)
    np.fill_diagonal(distance, np.inf)
    expected = [np.log10(1 + (distance <= r).sum(axis=1)) for r in (25, 50, 100)]
    np.testing.assert_allclose(morphology(nuclei, MPP)[:, 17:20], np.stack(expected, axis=1), rtol=1e-5)
    np.testing.assert_allclose(morphology(nuclei, MPP)[:, 20], np.log10(1 + distance.min(axis=1)), rtol=1e-5)


def test_a_lone_nucleus_has_no_neighbour(nuclei):
    assert not morphology(nuclei.iloc[:1], MPP)[0, 17:].any()
