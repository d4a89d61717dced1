"""The input of a network: what the encoder read, shape and crowding of each nucleus' polygon, and the color around it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from prts.errors import InputError
from prts.features.morphology import morphology
from prts.features.store import StoreReader, rows_of

if TYPE_CHECKING:
    from geopandas import GeoDataFrame

    Floats = NDArray[np.float32]

STORED = ("local", "global")
BLOCKS = (*STORED, "morphology", "context")


class InputReader:
    """Reader of the network's input for any nuclei of a section.

    Parameters
    ----------
    store
        The section's feature store; None if `use` has neither `local` nor `global`.
    use
        Blocks in the order of the network's input: `local` and `global` of the store, `morphology` (21 columns) of the polygons, `context`
        (42). Larger nuclei have more UMIs, and the size of a nucleus is hardly visible to an encoder of tiles.
    nuclei
        Returns all nuclei of the section, both in training and in prediction, since nuclei that fail quality control are neighbors, too.
        Only called if `use` includes `morphology`.
    mpp
        um per full-resolution pixel.
    context
        The section's context statistics, a store whose `local` and `global` are the fine and the coarse scales; None if `use` lacks them.

    Attributes
    ----------
    widths
        Width of each block.
    """

    def __init__(
        self,
        store: Path | None,
        use: Sequence[str],
        nuclei: Callable[[], GeoDataFrame],
        mpp: float,
        context: Path | None = None,
    ) -> None:
        self._use = tuple(use)
        self._stored = tuple(block for block in self._use if block in STORED)
        self._store = _reader(store, self._stored)
        self._context = _reader(context, [block for block in self._use if block == "context"])
        self._source = store or context or "nuclei"
        self._known, self._columns = pd.Index([]), np.empty((0, 0), dtype=np.float32)
        if "morphology" in self._use:
            polygons = nuclei()
            self._known, self._columns = pd.Index(polygons["cell_id"]), morphology(polygons, mpp)
        self.widths = {block: self._width(block) for block in self._use}

    def of(self, store: Path | None, context: Path | None) -> InputReader:
        """The same input from other stores of the same nuclei, such as those of a view of the image."""
        other = copy.copy(self)
        other._store = _reader(store, self._stored)
        other._context = _reader(context, [block for block in self._use if block == "context"])
        return other

    def _width(self, block: str) -> int:
        if block == "morphology":
            return int(self._columns.shape[1])
        if block == "context":
            assert self._context is not None
            return sum(self._context.width(part) for part in STORED)
        assert self._store is not None
        return self._store.width(block)

    def __call__(self, cell_ids: Sequence[str] | NDArray[np.object_]) -> Floats:
        """Input (n, d) of these nuclei, in this order. Ask for many at a time: each call reads through the stores.

        Raises
        ------
        InputError
            If a store or, for `morphology`, the polygons lack a nucleus.
        """
        parts: dict[str, Floats] = {}
        if self._store is not None:
            values = self._store.read(cell_ids, self._stored)
            if self._stored == self._use:
                return values
            stops = np.cumsum([self.widths[block] for block in self._stored], dtype=np.intp)
            parts |= zip(self._stored, np.split(values, stops[:-1], axis=1), strict=True)
        if self._context is not None:
            parts["context"] = self._context.read(cell_ids, STORED)
        if "morphology" in self._use:
            lacks = f"{self._source}: the polygons lack"
            parts["morphology"] = self._columns[rows_of(self._known, cell_ids, lacks, "prepare the section again")]
        return np.hstack([parts[block] for block in self._use])


def _reader(store: Path | None, blocks: Sequence[str]) -> StoreReader | None:
    """The reader of a store that some blocks come from; None if there are no such blocks."""
    if not blocks:
        return None
    if store is None:
        raise InputError(f"features: {', '.join(blocks)} were not extracted; prepare the section again")
    return StoreReader(store)
