"""Counts of sections that are read one at a time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anndata as ad

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


class CountsInTurn(Sequence[ad.AnnData]):
    """Some nuclei of each section, read whenever they are asked for: a pass over all sections holds one of them.

    Parameters
    ----------
    rows
        Which nuclei of each `counts-*.h5ad`, as masks.
    """

    def __init__(self, rows: Mapping[Path, NDArray[np.bool_]]) -> None:
        self._rows = list(rows.items())
        self._last: tuple[int, ad.AnnData] | None = None

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: Any) -> Any:
        """A section, or a list of them."""
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(len(self)))]
        if self._last is None or self._last[0] != index:
            self._last = None  # before the next one is read
            path, rows = self._rows[index]
            counts = ad.read_h5ad(path)
            self._last = index, counts if rows.all() else counts[rows].copy()
        return self._last[1]
