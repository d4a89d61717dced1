"""The nuclei of one section in one part of the split (train, val or test), as arrays."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class NucleusSet:
    """Nuclei of one section with features and counts. All arrays share their rows.

    Parameters
    ----------
    section
        Name of the section.
    cell_id
        (n,) ids of the nuclei.
    xy_um
        (n, 2) centroids in um from the top left corner of the image.
    features
        (n, d) float32.
    counts
        (n, g) CSR int32, UMI of the panel's genes.
    total_counts
        (n,) UMI of all genes.
    area_um2
        (n,) area in um2.
    exposure
        (n,) relative capture of the nucleus's bins, with which expected counts are multiplied in training; None: 1.
    """

    section: str
    cell_id: NDArray[np.object_]
    xy_um: NDArray[np.float64]
    features: NDArray[np.float32]
    counts: Any
    total_counts: NDArray[np.int64]
    area_um2: NDArray[np.float64]
    exposure: NDArray[np.float32] | None = None

    def __len__(self) -> int:
        return len(self.cell_id)

    def take(self, rows: NDArray[np.intp] | NDArray[np.bool_]) -> NucleusSet:
        """The nuclei at `rows` (indices or a mask)."""
        return NucleusSet(
            section=self.section,
            cell_id=self.cell_id[rows],
            xy_um=self.xy_um[rows],
            features=self.features[rows],
            counts=self.counts[rows],
            total_counts=self.total_counts[rows],
            area_um2=self.area_um2[rows],
            exposure=None if self.exposure is None else self.exposure[rows],
        )


def feature_moments(sets: Sequence[NucleusSet]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Mean and standard deviation of the features over all nuclei of all sets.

    Returns
    -------
    Two (d,) arrays. The standard deviation of a constant feature is 1, so that it can be divided by.
    """
    n = sum(map(len, sets))
    chunks = [nuclei.features[start : start + 4096] for nuclei in sets for start in range(0, len(nuclei), 4096)]
    mean = sum(chunk.sum(axis=0, dtype=np.float64) for chunk in chunks) / n
    spread = np.sqrt(sum(np.square(chunk - mean).sum(axis=0) for chunk in chunks) / n)
    # float32 rounding of a constant does not count as spread
    spread[spread <= 1e-6 * np.abs(mean)] = 1.0
    return mean, spread
