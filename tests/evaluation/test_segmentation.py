import numpy as np
import pytest
from shapely import box

from prts.evaluation.segmentation import Matching, match_nuclei

NOTHING = np.empty(0, object)


def test_f1_by_hand():
    true = np.array([box(0, 0, 10, 10), box(20, 0, 30, 10), box(40, 0, 50, 10)])
    predicted = np.array([box(0, 0, 10, 10), box(20, 0, 30, 6), box(45, 0, 55, 10), box(80, 0, 90, 10)])
    # Intersections over unions: 1, 60/100, 50/150, none.
    assert match_nuclei(true, predicted, 0.5) == Matching(2, 4, 3)
    assert match_nuclei(true, predicted, 0.6) == Matching(2, 4, 3)  # at least 0.6
    assert match_nuclei(true, predicted, 0.61) == Matching(1, 4, 3)
    assert match_nuclei(true, predicted, 0.3) == Matching(3, 4, 3)
    match = match_nuclei(true, predicted)
    assert (match.precision, match.recall, match.f1) == (2 / 4, 2 / 3, 4 / 7)
    # false positives and negatives: 2 TP / (2 TP + FP + FN)
    assert match.f1 == 2 * 2 / (2 * 2 + (4 - 2) + (3 - 2))


def test_one_prediction_serves_one_nucleus_and_the_most_pairs_are_found():
    # The first prediction overlaps both nuclei, the second only the first: the greedy best pair would leave one out.
    true = np.array([box(0, 0, 10, 10), box(4, 0, 14, 10)])
    predicted = np.array([box(1, 0, 11, 10), box(-4, 0, 6, 10)])
    assert match_nuclei(true, predicted, 0.4) == Matching(2, 2, 2)
    assert match_nuclei(true[:1], np.array([box(0, 0, 10, 10)] * 2)) == Matching(1, 2, 1)


def test_nothing_on_either_side():
    some = np.array([box(0, 0, 1, 1)])
    assert match_nuclei(some, NOTHING) == Matching(0, 0, 1)
    assert match_nuclei(NOTHING, some) == Matching(0, 1, 0)
    assert match_nuclei(NOTHING, some).f1 == 0
    assert np.isnan(match_nuclei(NOTHING, NOTHING).f1)
    assert Matching(1, 2, 3) + Matching(4, 5, 6) == Matching(5, 7, 9)


@pytest.mark.real
@pytest.mark.slow
def test_agrees_with_stardists_own_matching_on_labels(prts_data):
    from PIL import Image

    matching = pytest.importorskip("stardist.matching")
    from prts.io.outlines import labels_to_polygons

    labels = np.asarray(Image.open(next((prts_data / "nuclei_dsb2018/labels").glob("*.png")))).astype(int)
    moved = np.roll(labels, (2, 3), axis=(0, 1))
    moved[:3] = moved[:, :4] = 0
    true, predicted = labels_to_polygons(labels), labels_to_polygons(moved)
    assert true[2] == predicted[2] == 0  # nothing was lost in the outlines
    for iou in (0.3, 0.5, 0.7):
        theirs = matching.matching(labels, moved, iou)
        assert match_nuclei(true[1], predicted[1], iou) == Matching(theirs.tp, theirs.n_pred, theirs.n_true)
