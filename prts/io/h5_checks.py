"""Checks of HDF5 files that other programs wrote: links, sizes, and matrices that scipy would read out of bounds."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import h5py
from scipy.sparse import issparse

from prts.errors import InputError

if TYPE_CHECKING:
    import anndata as ad

# What h5py raises for a damaged file; SystemError if it loses its own error.
DAMAGED = (OSError, RuntimeError, LookupError, ValueError, TypeError, SystemError)

# Deflate, the densest of HDF5's own filters, expands one byte to at most 1,032; 16 MiB of values that were never written are accepted.
_MAX_RATIO = 1100
_FREE_BYTES = 16 << 20


def fits_in_file(dataset: h5py.Dataset) -> bool:
    """Whether the file stores enough bytes for all values; HDF5 fills in values that were never written, however many."""
    n_bytes = math.prod(dataset.shape or ()) * dataset.dtype.itemsize
    return bool(n_bytes <= _FREE_BYTES + _MAX_RATIO * dataset.id.get_storage_size())


def check_h5(path: Path) -> None:
    """Refuse an HDF5 file with links to other places, data in other files, or datasets larger than the file can hold.

    Raises
    ------
    InputError
        If it contains any of these, or cannot be read.
    """
    try:
        with h5py.File(path, "r") as file:
            fault = file.visititems_links(_link_fault) or file.visititems(_fault)  # a returned value ends the visit
    except DAMAGED as error:
        raise InputError(f"{path}: not HDF5, or damaged ({error}); get a complete copy") from error
    if fault is not None:
        raise InputError(f"{path}: {fault}")


def _link_fault(name: str, link: Any) -> str | None:
    return None if isinstance(link, h5py.HardLink) else f"{name} is a link; save the file with its data included"


def _fault(name: str, item: h5py.Group | h5py.Dataset) -> str | None:
    if not isinstance(item, h5py.Dataset):
        return None
    if item.is_virtual or item.external:
        return f"{name} is stored in another file; save the file with its data included"
    return None if fits_in_file(item) else f"{name} claims more values than the file holds; get a complete copy"


def read_checked_h5ad(path: Path) -> ad.AnnData:
    """Read an .h5ad that another program may have written, after `check_h5`.

    Raises
    ------
    InputError
        If the file fails the check or anndata cannot read it.
    """
    import anndata as ad

    check_h5(path)
    try:
        return ad.read_h5ad(path)
    except Exception as error:  # anndata raises anything for unexpected contents
        raise InputError(
            f"{path}: cannot be read as .h5ad ({type(error).__name__}: {error}); write it with anndata"
        ) from error


def check_matrix(path: Path, name: str, matrix: Any) -> None:
    """Refuse a matrix that is not numeric, or a sparse one whose indices are out of bounds, which scipy would follow.

    Parameters
    ----------
    path, name
        The file, and the name of the matrix in it.
    matrix
        Sparse or dense, as read by anndata.

    Raises
    ------
    InputError
        If the matrix is not valid.
    """
    kind = getattr(getattr(matrix, "dtype", None), "kind", "")
    if kind not in tuple("iufb"):
        raise InputError(
            f"{path}: {name} contains {getattr(matrix, 'dtype', type(matrix).__name__)}; it must contain numbers"
        )
    try:
        if issparse(matrix):
            matrix.check_format(full_check=True)
    except (ValueError, TypeError, AttributeError) as error:
        raise InputError(f"{path}: {name} is inconsistent ({error}); get a complete copy") from error
