"""Read a nuclei x genes matrix a few genes at a time, and rank values within a gene."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray

_VALUES_AT_ONCE = 4_000_000
# Values that differ only in the last digits of float32 count as equal, because batches of different sizes round differently.
_RELATIVE_RANGE = 1e-6

Matrix = Any  # a NumPy array or a SciPy sparse matrix, (n_nuclei, n_genes)


def gene_slices(n_nuclei: int, n_genes: int) -> Iterator[slice]:
    """Slices of genes, each with about four million values over all nuclei."""
    step = max(1, _VALUES_AT_ONCE // max(n_nuclei, 1))
    for start in range(0, n_genes, step):
        yield slice(start, min(start + step, n_genes))


class GeneRows:
    """A nuclei x genes matrix, dense or sparse, read as contiguous rows of genes.

    Parameters
    ----------
    matrix
        (n_nuclei, n_genes).
    name
        Name for error messages.

    Raises
    ------
    ValueError
        While reading, if a value is negative or not finite.
    """

    def __init__(self, matrix: Matrix, name: str = "counts") -> None:
        self.shape: tuple[int, int] = matrix.shape
        self._name = name
        self._rows = sp.csr_matrix(matrix.T) if sp.issparse(matrix) else np.asarray(matrix).T

    def __getitem__(self, genes: slice) -> NDArray[Any]:
        """Values of some genes, (n_genes_of_slice, n_nuclei), in C order."""
        part: Any = self._rows[genes]
        rows: NDArray[Any] = part.toarray() if sp.issparse(part) else np.ascontiguousarray(part)
        # NaN fails both comparisons.
        if rows.size and not (rows.min() >= 0 and rows.max() < np.inf):
            raise ValueError(f"{self._name}: a value is negative or not finite")
        return rows


def is_constant(rows: NDArray[Any]) -> NDArray[np.bool_]:
    """Whether each row (a gene) is constant, up to the rounding of float32, (n_genes,)."""
    low, high = rows.min(axis=1), rows.max(axis=1)
    constant: NDArray[np.bool_] = (high - low) <= _RELATIVE_RANGE * np.maximum(np.abs(low), np.abs(high))
    return constant


def sorted_runs(rows: NDArray[Any]) -> tuple[NDArray[np.intp], NDArray[np.int32], NDArray[np.int32]]:
    """Sort each row and find the runs of equal values (ties).

    Parameters
    ----------
    rows
        (n_genes, n_nuclei).

    Returns
    -------
    Three arrays (n_genes, n_nuclei): the order that sorts each row; and for each place in that order the first and the last place
    of its run, counted from 0.
    """
    n = rows.shape[1]
    order = np.argsort(rows, axis=1)
    ordered = np.take_along_axis(rows, order, axis=1)
    starts = np.ones(rows.shape, dtype=bool)
    np.not_equal(ordered[:, 1:], ordered[:, :-1], out=starts[:, 1:])
    place = np.broadcast_to(np.arange(n, dtype=np.int32), rows.shape)
    if starts.all():
        return order, place, place
    first = np.maximum.accumulate(np.where(starts, place, 0), axis=1)
    ends = np.ones(rows.shape, dtype=bool)
    ends[:, :-1] = starts[:, 1:]
    last = np.minimum.accumulate(np.where(ends, place, n)[:, ::-1], axis=1)[:, ::-1]
    return order, first.astype(np.int32, copy=False), last.astype(np.int32, copy=False)


def average_ranks(rows: NDArray[Any]) -> NDArray[np.float64]:
    """Ranks within each row from 1, ties sharing their mean rank, (n_genes, n_nuclei)."""
    order, first, last = sorted_runs(rows)
    ranks = np.empty(rows.shape)
    np.put_along_axis(ranks, order, (first + last) / 2 + 1, axis=1)
    return ranks
