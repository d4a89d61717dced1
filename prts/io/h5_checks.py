"""HDF5 files that hold their own data, and nothing that contradicts itself.

A link could make a file that is handed around read another one of its reader's machine; sizes that are not true ask for all memory there
is, and indices out of range are written to where they point by the loops of scipy.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import h5py
from scipy.sparse import issparse

from prts.errors import InputError

if TYPE_CHECKING:
    import anndata as ad

# What h5py raises of a damaged file, as deep as the damage lies; SystemError where it loses an error of its own.
DAMAGED = (OSError, RuntimeError, LookupError, ValueError, TypeError, SystemError)

ENDLESS = "zeros in a heap of strings, or heaps within heaps"
_HEAP = b"GCOL\1\0\0\0"
# Deflate, the densest of HDF5's own ways to compress, makes one byte of at most 1,032; a few megabytes are made of nothing.
_DENSEST = 1100
_FREE_BYTES = 16 << 20
_WINDOW = 64 << 20
_DEEPEST = 50  # groups in groups


def holds_its_values(dataset: h5py.Dataset) -> bool:
    """Whether all values of a dataset can lie in its file: for those that were never written, HDF5 makes up any number of zeros."""
    n_bytes = math.prod(dataset.shape or ()) * dataset.dtype.itemsize
    return bool(n_bytes <= _FREE_BYTES + _DENSEST * dataset.id.get_storage_size())


def _has_sequences(item: h5py.Group | h5py.Dataset) -> bool:
    """Whether an attribute holds sequences of any length (texts are another type), which nobody writes and HDF5 may crash on."""
    attributes = (h5py.h5a.open(item.id, index=i) for i in range(h5py.h5a.get_num_attrs(item.id)))
    return any(attribute.get_type().detect_class(h5py.h5t.VLEN) for attribute in attributes)


def _has_its_rows(group: h5py.Group) -> bool:
    """Whether a sparse matrix of anndata has a pointer for each of the rows (columns) that it claims, for which anndata makes room."""
    axis = {"csr_matrix": 0, "csc_matrix": 1}.get(str(group.attrs.get("encoding-type")))
    if axis is None or "indptr" not in group:
        return True
    return int(group.attrs["shape"][axis]) + 1 == len(group["indptr"])


def _heaps(data: mmap.mmap) -> Iterator[int]:
    """Where heaps of strings begin, or what looks like one; a window at a time, which is then let go."""
    for start in range(0, len(data), _WINDOW):
        stop = min(start + _WINDOW + len(_HEAP) - 1, len(data))
        at = data.find(_HEAP, start, stop)
        while at >= 0:
            yield at
            at = data.find(_HEAP, at + 1, stop)
        if hasattr(mmap, "MADV_DONTNEED"):  # else gigabytes of the file would count as memory of this process
            data.madvise(mmap.MADV_DONTNEED)


def endless_strings(path: Path) -> bool:
    """Whether HDF5 would never return from a heap of strings of this file: it goes on by the length of each part, and some are 0.

    A block of zeros, as an interrupted copy leaves it, is enough. Also where heaps overlap, which would take as long to walk.
    """
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            steps = len(data) // 16  # heaps do not overlap, and no part is smaller
            for at in _heaps(data):
                end = min(at + int.from_bytes(data[at + 8 : at + 16], "little"), len(data))
                part = at + 16
                while part + 16 <= end:
                    index, length = int.from_bytes(data[part : part + 2], "little"), data[part + 8 : part + 16]
                    n_bytes = int.from_bytes(length, "little")
                    step = (n_bytes if index == 0 else 16 + n_bytes + -n_bytes % 8) % (1 << 64)
                    steps -= 1
                    if step == 0 or steps < 0:
                        return True
                    part += step
    except (OSError, ValueError):  # an empty file, or none: for HDF5 to say
        pass
    return False


def require_own_data(path: Path) -> None:
    """Refuse an HDF5 file with links that lead out of it or in circles, or data that lie in other files or, as to their size, nowhere.

    Raises
    ------
    InputError
        If it has any, or cannot be read.
    """
    if endless_strings(path):
        raise InputError(f"{path}: damaged ({ENDLESS}); get a complete copy")
    try:
        with h5py.File(path, "r") as file:
            # what a function returns ends the visit
            fault = file.visititems_links(_fault_of_link) or _fault("/", file) or file.visititems(_fault)
    except DAMAGED as error:
        raise InputError(f"{path}: not HDF5, or damaged ({error}); get a complete copy") from error
    if fault is not None:
        raise InputError(f"{path}: {fault}")


def _fault_of_link(name: str, link: Any) -> str | None:
    return None if isinstance(link, h5py.HardLink) else _elsewhere(name)


def _elsewhere(name: str) -> str:
    return f"{name} is a link to elsewhere; a file that holds its own data is needed"


def _fault(name: str, item: h5py.Group | h5py.Dataset) -> str | None:
    """What is wrong with a member of a file, and the cure."""
    if _has_sequences(item):
        return f"{name} has an attribute of a kind that anndata does not write; get a complete copy"
    if isinstance(item, h5py.Dataset):
        if item.is_virtual or item.external:
            return _elsewhere(name)
        is_whole = holds_its_values(item)
    # A reader that follows groups without an end is stopped by Python in the middle of h5py, whose lock is then never free again.
    elif h5py.h5o.get_info(item.id).rc > 1 or name.count("/") > _DEEPEST:
        return f"the group {name[:100]} is in several places, or too deep; a file as anndata writes it is needed"
    else:
        is_whole = _has_its_rows(item)
    return None if is_whole else f"{name} has more values than the file can hold; get a complete copy"


def read_foreign_h5ad(path: Path) -> ad.AnnData:
    """Read an .h5ad that anybody may have written, after `require_own_data`.

    Raises
    ------
    InputError
        If it may not be read so, or anndata cannot read it.
    """
    import anndata as ad

    require_own_data(path)
    try:
        return ad.read_h5ad(path)
    except Exception as error:  # anndata raises whatever a foreign HDF5 file leads it to
        raise InputError(f"{path}: cannot be read as .h5ad ({type(error).__name__}: {error})") from error


def require_sound_matrix(path: Path, name: str, matrix: Any) -> None:
    """Refuse what is no matrix of real numbers, or a sparse one whose pointers or indices point out of it: scipy would follow them.

    Parameters
    ----------
    path, name
        The file, and what the matrix is called in it.
    matrix
        As anndata read it, sparse or dense.

    Raises
    ------
    InputError
        If it is so.
    """
    kind = getattr(getattr(matrix, "dtype", None), "kind", "")
    if kind not in tuple("iufb"):
        raise InputError(f"{path}: {name} holds {getattr(matrix, 'dtype', type(matrix).__name__)}; numbers are needed")
    try:
        if issparse(matrix):
            matrix.check_format(full_check=True)
    except (ValueError, TypeError, AttributeError) as error:
        raise InputError(f"{path}: {name} contradicts itself ({error}); get a complete copy") from error
