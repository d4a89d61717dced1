"""UMIs of bins in several nuclei, divided among these at random."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from scipy.sparse import coo_matrix, csr_matrix

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from prts.platforms.bin_matrix import BinMatrix
    from prts.platforms.bin_owners import SharedBins


class BinSplit:
    """Draws the nucleus of each UMI of shared bins, chunk by chunk in the order of the matrix.

    Every UMI of a bin is drawn independently with the bin's shares, so that the counts of each gene are multinomial. The result does not
    depend on the size of the chunks.

    Parameters
    ----------
    shared
        The bins and their shares.
    matrix
        The matrix, for its bins.
    n_cols
        Columns of the array of bins.
    seed
        Seed of the draws.
    """

    def __init__(self, shared: SharedBins, matrix: BinMatrix, n_cols: int, seed: int) -> None:
        places, first, self._n = np.unique(shared.place, return_index=True, return_counts=True)
        place = matrix.array_row.astype(np.int64) * n_cols + matrix.array_col
        at = np.minimum(np.searchsorted(places, place), max(len(places) - 1, 0))
        # rows of the matrix that are divided, ascending
        self._bins = np.flatnonzero(places[at] == place) if len(places) else np.empty(0, np.int64)
        self._first, self._n = first[at[self._bins]], self._n[at[self._bins]]
        self._shared = shared
        # one generator per rank among a bin's nuclei, each drawing in the order of the matrix
        self._rngs = [np.random.default_rng([seed, rank]) for rank in range(int(self._n.max(initial=0)))]

    @property
    def n_bins(self) -> int:
        """Number of bins that are divided."""
        return len(self._bins)

    def __call__(self, start: int, chunk: csr_matrix, n_nuclei: int) -> tuple[NDArray[np.int64], csr_matrix]:
        """Divide the shared bins of a chunk.

        Parameters
        ----------
        start
            Row of the matrix at which the chunk starts; chunks must come in order.
        chunk
            Counts, (n_bins, n_genes).
        n_nuclei
            Number of nuclei.

        Returns
        -------
        rows
            Rows of the chunk that were divided.
        counts
            (n_nuclei, n_genes) their UMIs.
        """
        part = slice(*np.searchsorted(self._bins, [start, start + chunk.shape[0]]))
        rows, first, n = self._bins[part] - start, self._first[part], self._n[part]
        held = chunk[rows].tocoo()
        left, share_left = held.data.astype(np.int64), np.ones(held.nnz)
        nuclei, genes, counts = [], [], []
        for rank, rng in enumerate(self._rngs):
            here = np.flatnonzero(n[held.row] > rank)
            at = first[held.row[here]] + rank
            last = n[held.row[here]] == rank + 1
            share = np.where(last, 1.0, self._shared.share[at] / np.maximum(share_left[here], 1e-300))
            drawn = rng.binomial(left[here], np.clip(share, 0.0, 1.0))
            left[here] -= drawn
            share_left[here] -= self._shared.share[at]
            nuclei.append(self._shared.unit[at])
            genes.append(held.col[here])
            counts.append(drawn)
        if not nuclei:
            return rows, csr_matrix((n_nuclei, chunk.shape[1]), dtype=np.int32)
        entries = np.concatenate(counts).astype(np.int32), (np.concatenate(nuclei), np.concatenate(genes))
        return rows, coo_matrix(entries, shape=(n_nuclei, chunk.shape[1])).tocsr()
