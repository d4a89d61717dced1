"""Score a segmentation by one-to-one matches of nuclei at an intersection over union."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import shapely
from scipy.sparse import coo_array
from scipy.sparse.csgraph import maximum_bipartite_matching

if TYPE_CHECKING:
    from numpy.typing import NDArray


@dataclass(frozen=True)
class Matching:
    """Counts of a matching. Add the counts of several images for a joint score."""

    true_positives: int
    n_predicted: int
    n_true: int

    def __add__(self, other: Matching) -> Matching:
        return Matching(
            self.true_positives + other.true_positives, self.n_predicted + other.n_predicted, self.n_true + other.n_true
        )

    @property
    def precision(self) -> float:
        """Share of the predicted nuclei that match; NaN if none is predicted."""
        return self.true_positives / self.n_predicted if self.n_predicted else np.nan

    @property
    def recall(self) -> float:
        """Share of the true nuclei that are matched; NaN if there is none."""
        return self.true_positives / self.n_true if self.n_true else np.nan

    @property
    def f1(self) -> float:
        """2 TP / (2 TP + FP + FN); NaN if there are no nuclei on either side."""
        total = self.n_predicted + self.n_true
        return 2 * self.true_positives / total if total else np.nan


def match_nuclei(true: NDArray[Any], predicted: NDArray[Any], iou: float = 0.5) -> Matching:
    """Find the most one-to-one pairs of nuclei whose intersection over union is at least `iou`.

    Parameters
    ----------
    true, predicted
        (n,), (m,) polygons in the same pixels; predicted ones may overlap.
    iou
        Smallest intersection over union, above 0.

    Returns
    -------
    The counts behind F1@IoU, as in the Data Science Bowl 2018 and StarDist (Schmidt et al. 2018).
    """
    p, t = shapely.STRtree(true).query(predicted, predicate="intersects")
    shared = shapely.area(shapely.intersection(predicted[p], true[t]))
    union = shapely.area(predicted[p]) + shapely.area(true[t]) - shared
    close = shared >= iou * union
    graph = coo_array((np.ones(close.sum(), np.int8), (p[close], t[close])), shape=(len(predicted), len(true)))
    partner = maximum_bipartite_matching(graph.tocsr(), perm_type="column")
    return Matching(int((partner >= 0).sum()), len(predicted), len(true))
