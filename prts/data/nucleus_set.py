"""The nuclei of one section in one part of the split (train, val or test), as arrays."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy.sparse as sp
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
        (n, d) float32; an array, or `prts.data.on_disk.StoredFeatures`, which is read when it is indexed.
    counts
        (n, g) CSR int32, UMI of the panel's genes; or `prts.data.on_disk.StoredCounts`.
    total_counts
        (n,) UMI of all genes.
    area_um2
        (n,) area in um2.
    exposure
        (n,) relative capture of the nucleus's bins, with which expected counts are multiplied in training; None: 1.
    views
        Features of the same nuclei in further views of the image (`prts.features.views`), each like `features`. Only training reads them.
    """

    section: str
    cell_id: NDArray[np.object_]
    xy_um: NDArray[np.float64]
    features: Any
    counts: Any
    total_counts: NDArray[np.int64]
    area_um2: NDArray[np.float64]
    exposure: NDArray[np.float32] | None = None
    views: tuple[Any, ...] = ()

    def __len__(self) -> int:
        return len(self.cell_id)

    def take(self, rows: NDArray[np.intp] | NDArray[np.bool_]) -> NucleusSet:
        """The nuclei at `rows` (indices or a mask); the set itself if these are all, in their order."""
        if rows.dtype != bool and np.array_equal(rows, np.arange(len(self))):
            return self
        return NucleusSet(
            section=self.section,
            cell_id=self.cell_id[rows],
            xy_um=self.xy_um[rows],
            features=_taken(self.features, rows),
            counts=_taken(self.counts, rows),
            total_counts=self.total_counts[rows],
            area_um2=self.area_um2[rows],
            exposure=None if self.exposure is None else self.exposure[rows],
            views=tuple(_taken(view, rows) for view in self.views),
        )


def _taken(values: Any, rows: NDArray[np.intp] | NDArray[np.bool_]) -> Any:
    """Rows of an array, or of values that stay on disk (`prts.data.on_disk`)."""
    return values.take(rows) if hasattr(values, "starts") or hasattr(values, "parts") else values[rows]


class CountBlocks(Sequence[Any]):
    """The counts of some sets as CSR matrices: one for each set in memory, and several that are read when needed for one on disk.

    Parameters
    ----------
    sets
        The sets.
    size
        Nuclei at a time of a set on disk.
    """

    def __init__(self, sets: Sequence[NucleusSet], size: int = 32_768) -> None:
        self._sets = sets
        self._at = [
            (number, slice(start, start + step))
            for number, nuclei in enumerate(sets)
            for step in (len(nuclei) if sp.issparse(nuclei.counts) else size,)
            for start in range(0, max(len(nuclei), 1), max(step, 1))
        ]

    def __len__(self) -> int:
        return len(self._at)

    def __getitem__(self, index: Any) -> Any:
        """One matrix (n, g)."""
        number, rows = self._at[index]
        counts = self._sets[number].counts
        return counts if sp.issparse(counts) else counts[rows]


def feature_moments(sets: Sequence[NucleusSet]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Mean and standard deviation of the features over all nuclei of all sets.

    Returns
    -------
    Two (d,) arrays. The standard deviation of a constant feature is 1, so that it can be divided by.
    """
    n = sum(map(len, sets))

    def total(of: Callable[[NDArray[np.float32]], NDArray[np.float64]]) -> NDArray[np.float64]:
        """Sum over all nuclei, one chunk after the other."""
        return sum(
            of(nuclei.features[start : start + 4096]) for nuclei in sets for start in range(0, len(nuclei), 4096)
        )  # type: ignore[return-value]

    mean = total(lambda chunk: chunk.sum(axis=0, dtype=np.float64)) / n
    spread = np.sqrt(total(lambda chunk: np.square(chunk - mean).sum(axis=0)) / n)
    # float32 rounding of a constant does not count as spread
    spread[spread <= 1e-6 * np.abs(mean)] = 1.0
    return mean, spread
