"""Counts from Xenium's table of transcripts, read in batches: a section has tens to hundreds of millions of them."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import shapely
from numpy.typing import NDArray
from scipy.sparse import coo_matrix, csr_matrix

from prts.errors import InputError
from prts.platforms.affine import Matrix, move
from prts.progress import track

logger = logging.getLogger(__name__)

# Rows in memory at a time.
_BATCH = 1 << 20


class Genes(NamedTuple):
    """Names of the genes, unique, and the least quality of a transcript (Phred scale) that counts."""

    names: NDArray[np.object_]
    min_qv: float


def nuclear_counts(path: Path, cell_id: NDArray[np.object_], genes: Genes) -> tuple[csr_matrix, dict[str, int]]:
    """Transcripts in the nucleus of each cell, as Xenium assigned them: `overlaps_nucleus` and `cell_id`.

    Parameters
    ----------
    path
        `transcripts.parquet`.
    cell_id
        The cells, unique, (n_cells,).
    genes
        The genes; transcripts of other features, such as control probes, are left out.

    Returns
    -------
    counts
        (n_cells, n_genes) CSR int32, sorted.
    report
        How many transcripts of the genes are of sufficient quality, and how many of these were counted.

    Raises
    ------
    InputError
        If the file is damaged or lacks a column.
    """
    cells = pa.array(cell_id, pa.string())
    total = _Sum((len(cell_id), len(genes.names)))
    n_good = 0
    for batch, gene in _good(path, genes, ["cell_id", "overlaps_nucleus"]):
        n_good += len(gene)
        nuclear = pc.equal(batch["overlaps_nucleus"].cast(pa.int8()), 1).to_numpy(zero_copy_only=False)
        cell = _index_in(batch["cell_id"], cells)
        found = nuclear & (cell >= 0)
        total.add(cell[found], gene[found])
    return total.result(), {"umi_total": n_good, "umi_assigned": total.n}


def counts_within(
    path: Path, polygons: NDArray[np.object_], to_px: Matrix, genes: Genes
) -> tuple[csr_matrix, dict[str, int]]:
    """Transcripts within each polygon, by their position; those within several are dropped.

    Parameters
    ----------
    path
        `transcripts.parquet`.
    polygons
        Nuclei in full-resolution pixels, (n_nuclei,).
    to_px
        From um of Xenium to these pixels.
    genes
        The genes.

    Returns
    -------
    As `nuclear_counts`, (n_nuclei, n_genes).

    Raises
    ------
    InputError
        If the file is damaged or lacks a column.
    """
    tree = shapely.STRtree(polygons)
    shapely.prepare(polygons)
    total = _Sum((len(polygons), len(genes.names)))
    n_good = n_shared = 0
    for batch, gene in _good(path, genes, ["x_location", "y_location"]):
        n_good += len(gene)
        um = np.stack([batch[name].to_numpy(zero_copy_only=False) for name in ("x_location", "y_location")], axis=1)
        xy = move(to_px, um.astype(np.float64))
        point, polygon = tree.query(shapely.points(xy))
        within = shapely.contains_xy(polygons[polygon], *xy[point].T)
        point, polygon = point[within], polygon[within]
        once = np.bincount(point, minlength=len(gene))[point] == 1
        n_shared += len(np.unique(point[~once]))
        total.add(polygon[once], gene[point[once]])
    shapely.destroy_prepared(polygons)  # the caller owns the arrays
    return total.result(), {"umi_total": n_good, "umi_assigned": total.n, "umi_shared_dropped": n_shared}


def _good(path: Path, genes: Genes, columns: list[str]) -> Iterator[tuple[pa.RecordBatch, NDArray[np.int64]]]:
    """Batches of the transcripts of genes that are of sufficient quality, and the gene of each."""
    names = pa.array(genes.names, pa.string())
    try:
        with pq.ParquetFile(path) as file:
            lacking = [name for name in ("feature_name", "qv", *columns) if name not in file.schema_arrow.names]
            if lacking:
                raise InputError(f"{path}: has no column {lacking[0]}; give the transcripts.parquet that Xenium wrote")
            n_batches = math.ceil(file.metadata.num_rows / _BATCH)
            batches = file.iter_batches(batch_size=_BATCH, columns=["feature_name", "qv", *columns], use_threads=False)
            for batch in track(batches, "transcripts", total=n_batches):
                good = pc.fill_null(pc.greater_equal(batch["qv"], genes.min_qv), False)
                batch = batch.filter(good)
                gene = _index_in(batch["feature_name"], names)
                known = gene >= 0
                yield batch.filter(pa.array(known)), gene[known]
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{path}: not a readable Parquet file ({error}); get a complete copy") from error


def _index_in(values: pa.Array, known: pa.Array) -> NDArray[np.int64]:
    """The place of each value among the known ones, -1 for others; ids may be stored as text, bytes or numbers."""
    if pa.types.is_dictionary(values.type):
        place: NDArray[np.int64] = _index_in(values.dictionary, known)[values.indices.to_numpy(zero_copy_only=False)]
        return place
    found = pc.index_in(values.cast(pa.string()), value_set=known)
    return np.asarray(pc.fill_null(found, -1).to_numpy(zero_copy_only=False), dtype=np.int64)


class _Sum:
    """Sums of counts by row and column; parts of similar size are merged, so that each count is moved a few times only."""

    def __init__(self, shape: tuple[int, int]) -> None:
        self.n = 0
        self._shape = shape
        self._parts: list[csr_matrix] = []

    def add(self, row: NDArray[Any], column: NDArray[Any]) -> None:
        """Add one at each place."""
        self.n += len(row)
        ones = np.ones(len(row), np.int32)
        self._parts.append(coo_matrix((ones, (row, column)), shape=self._shape).tocsr())
        while len(self._parts) > 1 and self._parts[-1].nnz * 2 >= self._parts[-2].nnz:
            last = self._parts.pop()
            self._parts[-1] = self._parts[-1] + last

    def result(self) -> csr_matrix:
        """All sums, sorted."""
        counts = csr_matrix(
            sum(self._parts[1:], self._parts[0]) if self._parts else csr_matrix(self._shape, dtype=np.int32)
        )
        counts.sort_indices()
        return csr_matrix(counts, dtype=np.int32)


def unique_names(var: pd.DataFrame, source: Path) -> NDArray[np.object_]:
    """The names of genes as transcripts give them.

    Raises
    ------
    InputError
        If two genes have the same name.
    """
    symbols = var["symbol"].where(var["symbol"] != "", var["gene_id"])
    if (twice := symbols.duplicated()).any():
        raise InputError(
            f"{source}: two genes are called {symbols[twice].iloc[0]!r}, which transcripts cannot tell apart; count cells (`units: cell`)"
        )
    return symbols.to_numpy(object)
