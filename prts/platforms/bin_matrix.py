"""The matrix of bins and genes in 10x's HDF5 file, streamed: a section has 11 million bins and hundreds of millions of counts."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, ClassVar, Self

import h5py
import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.sparse import csr_matrix

from prts.errors import InputError
from prts.io.h5_checks import DAMAGED, fits_in_file
from prts.platforms.bin_positions import bin_size, bins_folder, is_raw, read_positions
from prts.platforms.bin_text import as_hdf5

_ROW, _COLUMN = slice(8, 13), slice(14, 19)
_BARCODES_AT_ONCE = 1 << 21


def barcode(bin_um: int, row: int, col: int) -> str:
    """The barcode of one bin, as 10x writes it.

    Examples
    --------
    >>> barcode(8, 12, 34)
    's_008um_00012_00034-1'
    """
    return f"s_{bin_um:03d}um_{row:05d}_{col:05d}-1"


def bin_names(bin_um: int, row: NDArray[Any], col: NDArray[Any]) -> NDArray[np.object_]:
    """Barcodes (n,) of bins at these rows and columns of the array.

    Examples
    --------
    >>> bin_names(8, np.array([0, 12]), np.array([1, 34])).tolist()
    ['s_008um_00000_00001-1', 's_008um_00012_00034-1']
    """
    return bin_barcodes(bin_um, row, col).astype(str).astype(object)


def bin_barcodes(bin_um: int, row: NDArray[Any], col: NDArray[Any]) -> NDArray[np.bytes_]:
    """Barcodes (n,) as bytes, as 10x's HDF5 files store them."""
    start = barcode(bin_um, 0, 0).encode()
    text = np.empty((len(row), len(start)), np.uint8)
    text[:] = np.frombuffer(start, np.uint8)
    for at, number in ((8, row), (14, col)):
        digits = np.asarray(number, np.int64)[:, None] // np.array([10_000, 1_000, 100, 10, 1]) % 10
        text[:, at : at + 5] += digits.astype(np.uint8)
    return text.view(f"S{len(start)}").ravel()


class BinMatrix:
    """`filtered_feature_bc_matrix.h5` of the bins of one size, or the same matrix as a folder of text; a context manager.

    Attributes
    ----------
    path
        The file or folder.
    bin_um
        Side of the bins, which the folder states (`prts.platforms.bin_positions.bin_size`).
    gene_ids, gene_names
        (n_genes,) object arrays of str: Ensembl ids (unique) and symbols (not always unique). Only features of the type
        "Gene Expression" are included.
    genome
        The reference genome, or several joined by commas.
    n_bins, n_genes, nnz
        Size, and number of stored entries.
    array_row, array_col
        (n_bins,) int32, from the barcodes. Of a raw matrix, only bins in tissue are listed.

    Raises
    ------
    InputError
        If the file is not HDF5 or not 10x's, links to other files, has bins of another size, duplicate bins or gene ids, or
        inconsistent content.
    """

    # What wrote the file, and how it calls it, for messages.
    _writer: ClassVar[str] = "Space Ranger"
    _file_name: ClassVar[str] = "filtered_feature_bc_matrix.h5"
    _keep: NDArray[np.bool_] | None = None

    array_row: NDArray[np.int32]
    array_col: NDArray[np.int32]

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self.bin_um = bin_size(self.path.parent)
        if not self.path.exists():
            raise InputError(f"{self.path}: no such file; give {self._writer}'s {self._file_name}")
        stored = as_hdf5(self.path) if self.path.is_dir() else self.path
        try:
            self._file = h5py.File(stored, "r")
        except OSError as error:
            raise InputError(f"{self.path}: not HDF5, or damaged ({error}); get a complete copy") from error
        try:
            with self._reading():
                self._open()
            if is_raw(self.path):
                self._leave_out_glass()
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Release the file."""
        self._file.close()

    def var(self) -> pd.DataFrame:
        """The genes, (n_genes,): `gene_id`, `symbol`, `genome`, indexed by a unique name.

        The name is the symbol if it is unique in the file, else `<symbol>_<gene_id>`, or the id if there is no symbol.
        """
        ids, symbols = pd.Series(self.gene_ids, dtype=object), pd.Series(self.gene_names, dtype=object)
        names = symbols.where(symbols != "", ids)
        while (twice := names.duplicated(keep=False)).any():
            names = names.where(~twice, names + "_" + ids)
        frame = pd.DataFrame(
            {"gene_id": self.gene_ids, "symbol": self.gene_names, "genome": pd.Categorical(self._genomes)}
        )
        return frame.set_index(pd.Index(names.to_numpy(dtype=object), dtype=object))

    def chunks(self, max_nnz: int = 20_000_000) -> Iterator[tuple[int, int, csr_matrix]]:
        """Iterate over the matrix in the order of bins, with one chunk in memory.

        Parameters
        ----------
        max_nnz
            Maximum number of entries in a chunk; a bin is never split.

        Yields
        ------
        first, stop, counts
            The counts of bins first..stop-1: (stop - first, n_genes) int32. Indices within a bin are those of the file and
            may be unsorted.

        Raises
        ------
        InputError
            If a count is negative or fractional, a gene index is out of range, or the file is damaged.
        """
        first, done, n_stored = 0, 0, len(self._indptr) - 1
        while first < n_stored:
            start = int(self._indptr[first])
            stop = int(np.searchsorted(self._indptr, start + max_nnz, side="right")) - 1
            stop = min(max(stop, first + 1), n_stored)
            end = int(self._indptr[stop])
            with self._reading():
                data, indices = self._data[start:end], self._indices[start:end]
            n_features = len(self._is_gene)
            if len(indices) and (indices.min() < 0 or indices.max() >= n_features):
                raise InputError(
                    f"{self.path}: matrix/indices reaches beyond the {n_features} features; get a complete copy"
                )
            indptr = self._indptr[first : stop + 1] - start
            counts = csr_matrix(
                (self._counts(data), indices.astype(np.int32), indptr), shape=(stop - first, n_features)
            )
            counts = counts if self._is_gene.all() else counts[:, self._is_gene]
            counts = counts if self._keep is None else counts[self._keep[first:stop]]
            yield done, done + counts.shape[0], counts
            first, done = stop, done + counts.shape[0]

    def _leave_out_glass(self) -> None:
        """Of a raw matrix, list the bins in tissue only, which are those of the filtered one."""
        grid = read_positions(self.path.parent)
        listed = grid.lists(self.array_row, self.array_col)
        if not grid.in_tissue.any():
            return
        keep = ~listed  # bins without a position are not dropped silently
        keep[listed] = grid.in_tissue[self.array_row[listed], self.array_col[listed]]
        self._keep, self.n_bins = keep, int(keep.sum())
        self.array_row, self.array_col = self.array_row[keep], self.array_col[keep]

    def _counts(self, data: NDArray[Any]) -> NDArray[np.int32]:
        if len(data) and not (data.min() >= 0 and data.max() <= np.iinfo(np.int32).max):  # NaN fails both
            raise InputError(f"{self.path}: matrix/data has values {data.min()}..{data.max()}; give raw UMI counts")
        counts: NDArray[np.int32] = data.astype(np.int32)
        if data.dtype.kind == "f" and not np.array_equal(counts, data):
            raise InputError(f"{self.path}: matrix/data has fractions; give raw UMI counts, not normalized ones")
        return counts

    def _open(self) -> None:
        matrix = self._get(self._file, "matrix", h5py.Group)
        features = self._get(matrix, "features", h5py.Group)
        ids, names, types, genomes = (self._strings(features, n) for n in ("id", "name", "feature_type", "genome"))
        if not (len(ids),) == ids.shape == names.shape == types.shape == genomes.shape:
            raise InputError(f"{self.path}: matrix/features has columns of different lengths; get a complete copy")
        self._is_gene = types == "Gene Expression"
        if not self._is_gene.any():
            raise InputError(
                f"{self.path}: has no feature of the type Gene Expression; give the matrix of a gene expression library"
            )
        self.gene_ids, self.gene_names = ids[self._is_gene], names[self._is_gene]
        self._genomes = genomes[self._is_gene]
        self.genome = ",".join(dict.fromkeys(self._genomes))
        if (twice := pd.Series(self.gene_ids).duplicated()).any():
            raise InputError(
                f"{self.path}: gene id {self.gene_ids[twice.argmax()]!r} occurs twice; give a matrix with unique ids"
            )
        self._data = self._get(matrix, "data", h5py.Dataset)
        self._indices = self._get(matrix, "indices", h5py.Dataset)
        if self._data.dtype.kind not in "iuf" or self._indices.dtype.kind not in "iu":
            raise InputError(
                f"{self.path}: matrix/data and matrix/indices must be numbers; give the file of {self._writer}"
            )
        indptr = self._get(matrix, "indptr", h5py.Dataset)
        if indptr.dtype.kind not in "iu":
            raise InputError(f"{self.path}: matrix/indptr must be whole numbers; give the file of {self._writer}")
        self._indptr = indptr[:].astype(np.int64)
        self.array_row, self.array_col = self._bins(self._get(matrix, "barcodes", h5py.Dataset))
        self.n_bins, self.n_genes, self.nnz = len(self.array_row), len(self.gene_ids), self._data.shape[0]
        stored = self._get(matrix, "shape", h5py.Dataset)
        shape = tuple(stored[:].tolist()) if stored.shape == (2,) else stored.shape
        if (
            shape != (len(ids), self.n_bins)
            or self._indptr.shape != (self.n_bins + 1,)
            or self._indptr[0] != 0
            or (np.diff(self._indptr) < 0).any()
            or not (self._indptr[-1],) == self._data.shape == self._indices.shape
        ):
            raise InputError(
                f"{self.path}: shape {shape}, {len(ids)} features, {self.n_bins} barcodes, {self.nnz} counts and indptr "
                "contradict each other; get a complete copy"
            )

    def _bins(self, barcodes: h5py.Dataset) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        """Rows and columns of the array, from the digits of `s_<size>um_<row>_<column>-1`."""
        if len(barcodes.shape) != 1 or barcodes.dtype.kind not in "SO":
            raise InputError(f"{self.path}: matrix/barcodes must be text; give the file of {self._writer}")
        rows = np.empty(barcodes.shape[0], np.int32)
        columns = np.empty_like(rows)
        pattern = np.frombuffer(barcode(self.bin_um, 0, 0).encode(), np.uint8)
        is_digit = (pattern >= ord("0")) & (pattern <= ord("9"))
        is_digit[:8] = False  # the bin size is fixed
        place = 10 ** np.arange(4, -1, -1)
        for start in range(0, len(rows), _BARCODES_AT_ONCE):
            stop = start + _BARCODES_AT_ONCE
            text = np.asarray(barcodes[start:stop]).astype("S")
            letters = text.astype(f"S{len(pattern)}").view(np.uint8).reshape(len(text), -1)
            digits = letters - np.uint8(ord("0"))  # other characters wrap to more than 9
            fits = (np.char.str_len(text) == len(pattern)) & np.where(is_digit, digits <= 9, letters == pattern).all(
                axis=1
            )
            if not fits.all():
                self._refuse_barcode(text[~fits][0].decode(errors="replace"))
            rows[start:stop] = digits[:, _ROW].astype(np.int32) @ place
            columns[start:stop] = digits[:, _COLUMN].astype(np.int32) @ place
        key = rows.astype(np.int64) * 100_000 + columns
        key.sort()
        if (key[1:] == key[:-1]).any():
            twice = int(key[1:][key[1:] == key[:-1]][0])
            raise InputError(
                f"{self.path}: barcode {barcode(self.bin_um, *divmod(twice, 100_000))} occurs twice; "
                "give a matrix with one column per bin"
            )
        return rows, columns

    def _refuse_barcode(self, text: str) -> None:
        size = re.match(r"s_0*(\d+)um_", text)
        other = size is not None and size[1] != str(self.bin_um)
        what = f"bins of {size[1]} um" if size and other else f"not a {self.bin_um} um bin of Visium HD"
        raise InputError(
            f"{self.path}: barcode {text!r}: {what}; give the matrix of binned_outputs/{bins_folder(self.bin_um)}, with barcodes such "
            f"as {barcode(self.bin_um, 0, 0)!r}"
        )

    def _strings(self, group: h5py.Group, name: str) -> NDArray[Any]:
        dataset = self._get(group, name, h5py.Dataset)
        if dataset.dtype.kind == "S":
            return np.char.decode(dataset[:], "utf-8").astype(object)
        if h5py.check_string_dtype(dataset.dtype) is None:
            raise InputError(f"{self.path}: {dataset.name[1:]} must be text; give the file of {self._writer}")
        return np.asarray(dataset.asstr()[:], dtype=object)

    def _get(self, group: h5py.Group, name: str, kind: type) -> Any:
        """A member of a group that is in this file: links could make a shared file read another one."""
        where = f"{group.name}/{name}".lstrip("/")
        link = group.get(name, getlink=True)
        if link is None:
            raise InputError(f"{self.path}: {where} is missing; give 10x's {self._file_name} (version 3)")
        if not isinstance(link, h5py.HardLink):
            raise InputError(f"{self.path}: {where} is a link to another file; give a file that contains its own data")
        found = group[name]
        if not isinstance(found, kind):
            raise InputError(f"{self.path}: {where} is not a {kind.__name__.lower()}; give the file of {self._writer}")
        if isinstance(found, h5py.Dataset) and (found.is_virtual or found.external):
            raise InputError(f"{self.path}: {where} is stored in other files; give a file that contains its own data")
        if isinstance(found, h5py.Dataset) and not fits_in_file(found):
            raise InputError(f"{self.path}: {where} has more values than the file can contain; get a complete copy")
        return found

    @contextmanager
    def _reading(self) -> Iterator[None]:
        try:
            yield
        except DAMAGED as error:
            raise InputError(f"{self.path}: damaged ({error}); get a complete copy") from error
