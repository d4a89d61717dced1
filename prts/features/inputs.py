"""What a network reads of a nucleus: blocks of the feature store, and the shape and crowding of its polygon."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import h5py
import numpy as np
import pandas as pd
from numpy.typing import NDArray

from prts.features.morphology import morphology
from prts.features.store import read_features

if TYPE_CHECKING:
    from geopandas import GeoDataFrame

    Floats = NDArray[np.float32]

STORED = ("local", "global")
BLOCKS = (*STORED, "morphology")


class InputReader:
    """Reads the input of any nuclei of a section.

    Parameters
    ----------
    store
        The section's feature store.
    use
        Blocks in the order of the network's input: `local` and `global` of the store, `morphology` (21 columns) of the polygons. Larger
        nuclei hold more UMI, which an encoder of tiles hardly sees.
    nuclei
        Gives ALL nuclei of the section, those that fail quality control too, in training as in prediction: they are neighbours. Called
        only where `use` has `morphology`.
    mpp
        um a full-resolution pixel.

    Attributes
    ----------
    widths
        Width of each block.
    """

    def __init__(self, store: Path, use: Sequence[str], nuclei: Callable[[], GeoDataFrame], mpp: float) -> None:
        self._store = store
        self._use = tuple(use)
        self._known, self._columns = pd.Index([]), np.empty((0, 0), dtype=np.float32)
        if "morphology" in self._use:
            polygons = nuclei()
            self._known, self._columns = pd.Index(polygons["cell_id"]), morphology(polygons, mpp)
        with h5py.File(store) as file:
            self.widths = {
                block: self._columns.shape[1] if block == "morphology" else int(file[block].shape[1])
                for block in self._use
            }

    def __call__(self, cell_ids: Sequence[str] | NDArray[np.object_]) -> Floats:
        """Input (n, d) of these nuclei, in this order."""
        stored = [block for block in self._use if block in STORED]
        values = read_features(self._store, cell_ids, stored) if stored else np.empty((len(cell_ids), 0), np.float32)
        if len(stored) == len(self._use):
            return values
        parts = dict(
            zip(stored, np.split(values, np.cumsum([self.widths[block] for block in stored])[:-1], axis=1), strict=True)
        )
        if "morphology" in self._use:
            parts["morphology"] = self._columns[self._known.get_indexer(pd.Index(cell_ids))]
        return np.hstack([parts[block] for block in self._use])
