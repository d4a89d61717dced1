"""The input of a network: blocks of the feature store, and the shape and crowding of each nucleus' polygon."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from prts.features.morphology import morphology
from prts.features.store import StoreReader, rows_of

if TYPE_CHECKING:
    from geopandas import GeoDataFrame

    Floats = NDArray[np.float32]

STORED = ("local", "global")
BLOCKS = (*STORED, "morphology")


class InputReader:
    """Reader of the network's input for any nuclei of a section.

    Parameters
    ----------
    store
        The section's feature store.
    use
        Blocks in the order of the network's input: `local` and `global` of the store, `morphology` (21 columns) of the polygons. Larger
        nuclei have more UMIs, and the size of a nucleus is hardly visible to an encoder of tiles.
    nuclei
        Returns all nuclei of the section, both in training and in prediction, since nuclei that fail quality control are neighbors, too.
        Only called if `use` includes `morphology`.
    mpp
        um per full-resolution pixel.

    Attributes
    ----------
    widths
        Width of each block.
    """

    def __init__(self, store: Path, use: Sequence[str], nuclei: Callable[[], GeoDataFrame], mpp: float) -> None:
        self._store = StoreReader(store)
        self._use = tuple(use)
        self._known, self._columns = pd.Index([]), np.empty((0, 0), dtype=np.float32)
        if "morphology" in self._use:
            polygons = nuclei()
            self._known, self._columns = pd.Index(polygons["cell_id"]), morphology(polygons, mpp)
        self.widths = {
            block: self._columns.shape[1] if block == "morphology" else self._store.width(block) for block in self._use
        }

    def __call__(self, cell_ids: Sequence[str] | NDArray[np.object_]) -> Floats:
        """Input (n, d) of these nuclei, in this order. Ask for many at a time: each call reads through the store.

        Raises
        ------
        InputError
            If the store or, for `morphology`, the polygons lack a nucleus.
        """
        stored = [block for block in self._use if block in STORED]
        values = self._store.read(cell_ids, stored) if stored else np.empty((len(cell_ids), 0), np.float32)
        if len(stored) == len(self._use):
            return values
        stops = np.cumsum([self.widths[block] for block in stored], dtype=np.intp)
        parts = {block: values[:, stop - self.widths[block] : stop] for block, stop in zip(stored, stops, strict=True)}
        if "morphology" in self._use:
            rows = rows_of(
                self._known,
                cell_ids,
                f"{self._store.path}: the polygons lack",
                "prepare the section again",
            )
            parts["morphology"] = self._columns[rows]
        return np.hstack([parts[block] for block in self._use])
