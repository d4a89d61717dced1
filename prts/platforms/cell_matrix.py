"""The matrix of cells and genes in 10x's HDF5 file."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import pandas as pd
from scipy.sparse import csr_matrix, vstack

from prts.errors import InputError
from prts.platforms.bin_matrix import BinMatrix

if TYPE_CHECKING:
    import h5py
    from numpy.typing import NDArray


class CellMatrix(BinMatrix):
    """`cell_feature_matrix.h5` of Xenium; a context manager.

    Only features of the type "Gene Expression" are included: control probes, control codewords, blanks, and unassigned and deprecated
    codewords have types of their own.

    Attributes
    ----------
    cell_id
        (n_cells,) object array of str.
    """

    _writer: ClassVar[str] = "Xenium"
    _file_name: ClassVar[str] = "cell_feature_matrix.h5"
    cell_id: NDArray[np.object_]

    def counts(self) -> csr_matrix:
        """All counts, (n_cells, n_genes) CSR int32, sorted and without explicit zeros."""
        parts = [chunk for _, _, chunk in self.chunks()]
        counts = csr_matrix(vstack(parts, format="csr") if parts else csr_matrix((0, self.n_genes), dtype=np.int32))
        counts.sum_duplicates()
        counts.eliminate_zeros()
        return counts

    def _bins(self, barcodes: h5py.Dataset) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        """Cells have no place in an array: they are numbered."""
        if len(barcodes.shape) != 1 or barcodes.dtype.kind not in "SO":
            raise InputError(f"{self.path}: matrix/barcodes must be text; give the file of {self._writer}")
        text: Any = np.asarray(barcodes[:]).astype("S")
        self.cell_id = np.char.decode(text, "utf-8").astype(object) if len(text) else np.empty(0, object)
        if (twice := pd.Series(self.cell_id).duplicated()).any():
            raise InputError(
                f"{self.path}: cell {self.cell_id[twice.argmax()]!r} occurs twice; give a matrix with one column per cell"
            )
        return np.arange(len(text), dtype=np.int32), np.zeros(len(text), np.int32)
