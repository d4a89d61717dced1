import numpy as np
import shapely
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from shapely import Polygon, box
from skimage.measure import label as parts

from prts.io.outlines import labels_to_polygons


def rasterise(names, polygons, shape):
    rows, columns = np.mgrid[: shape[0], : shape[1]] + 0.5
    labels = np.zeros(shape, int)
    for name, polygon in zip(names, polygons, strict=True):
        labels[shapely.contains_xy(polygon, columns, rows)] = name
    return labels


def test_known_outlines():
    labels = np.zeros((6, 8), np.uint8)
    labels[1:4, 2:4] = 5
    labels[1, 4] = 5
    labels[0:5, 5:8] = 2
    labels[2, 6] = 0
    names, polygons, dropped = labels_to_polygons(labels)
    assert list(names) == [2, 5] and dropped == 0
    assert polygons[0].equals(Polygon(box(5, 0, 8, 5).exterior, [box(6, 2, 7, 3).exterior]))
    assert polygons[1].equals(Polygon([(2, 1), (5, 1), (5, 2), (4, 2), (4, 4), (2, 4)]))
    assert len(polygons[1].exterior.coords) == 7  # corners only


def test_the_largest_part_is_kept_and_corners_do_not_join():
    labels = np.array([[1, 0, 0, 1], [0, 1, 1, 0], [0, 0, 0, 0], [3, 3, 0, 0]])
    names, polygons, dropped = labels_to_polygons(labels)
    assert list(names) == [1, 3] and dropped == 2
    assert polygons[0].equals(box(1, 1, 3, 2)) and polygons[1].equals(box(0, 3, 2, 4))


def test_nothing_to_outline():
    names, polygons, dropped = labels_to_polygons(np.zeros((4, 5), np.uint16))
    assert len(names) == len(polygons) == dropped == 0


@settings(max_examples=150, deadline=None)
@given(arrays(np.int8, array_shapes(min_dims=2, max_dims=2, max_side=9), elements=st.integers(0, 3)), st.integers(1, 9))
def test_rasterized_outlines_equal_the_labels(blobs, band):
    labels = parts(blobs, background=0, connectivity=1)
    names, polygons, dropped = labels_to_polygons(labels, band=band)
    assert dropped == 0 and sorted(names) == list(range(1, labels.max() + 1))
    assert shapely.is_valid(polygons).all() and all(shapely.get_type_id(polygons) == 3)
    assert (rasterise(names, polygons, labels.shape) == labels).all()
