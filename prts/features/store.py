"""The feature store: an HDF5 file with a global and a local vector for each nucleus, indexed by `cell_id`."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import h5py
import numpy as np
import pandas as pd
from numpy.typing import NDArray

from prts.errors import InputError
from prts.io.cache import atomic
from prts.io.h5_checks import DAMAGED, check_h5
from prts.io.hdf5 import NewFile

if TYPE_CHECKING:
    from collections.abc import Iterator

Floats = NDArray[np.float32]

_DATASETS = ("cell_id", "global", "local", "spatial")
_ROWS_PER_READ = 65_536


class Rows(NamedTuple):
    """Features of some nuclei: `global_` (m, G) and `local` (m, L)."""

    global_: Floats
    local: Floats


def write_store(
    path: Path,
    cell_ids: Sequence[str] | NDArray[np.object_],
    spatial: NDArray[np.float64],
    widths: tuple[int, int],
    chunks: Iterable[Rows],
    attrs: Mapping[str, Any],
) -> None:
    """Write a store, chunk by chunk, under a temporary name that is renamed at the end.

    The same input gives the same bytes (no timestamps).

    Parameters
    ----------
    path
        The `.h5` to write.
    cell_ids
        Keys of the nuclei, (n,).
    spatial
        Centroids in full-resolution pixels, (n, 2).
    widths
        Widths of the global and the local vector.
    chunks
        Features of consecutive nuclei, n rows in all.
    attrs
        Attributes of the file: text and numbers, anything else as JSON; None is omitted.
    """
    n = len(cell_ids)
    with atomic(path) as temporary, NewFile(temporary) as store:
        store.create_dataset("cell_id", data=np.asarray(cell_ids, dtype=object), dtype=h5py.string_dtype())
        store.create_dataset("spatial", data=spatial, dtype=np.float64)
        sets = [
            store.create_dataset(name, shape=(n, width), dtype=np.float32, chunks=(min(max(n, 1), 512), width))
            for name, width in zip(("global", "local"), widths, strict=True)
        ]
        start = 0
        for rows in chunks:
            stop = start + len(rows.global_)
            sets[0][start:stop], sets[1][start:stop] = rows
            start = stop
            store.check()
        if start != n:
            raise ValueError(f"{start} rows of features for {n} nuclei")
        for key, value in attrs.items():
            if value is not None:
                store.attrs[key] = value if isinstance(value, str | int | float) else json.dumps(value, sort_keys=True)


def join_stores(paths: Sequence[Path], out: Path, provenance: Mapping[str, Any]) -> None:
    """Write a store with the vectors of several stores of the same nuclei next to each other.

    Parameters
    ----------
    paths
        The stores, in the order of the vectors.
    out
        The store to write.
    provenance
        Its `settings`, under `encoder`, and all else that decides what it holds.
    """
    readers = [StoreReader(path) for path in paths]
    cell_ids = readers[0].known.to_numpy()
    with _opened(paths[0]) as first:
        spatial = first["spatial"][:]

    def rows() -> Iterator[Rows]:
        for start in range(0, len(cell_ids), _ROWS_PER_READ // 4):
            some = cell_ids[start : start + _ROWS_PER_READ // 4]
            yield Rows(*(np.hstack([reader.read(some, (name,)) for reader in readers]) for name in ("global", "local")))

    widths = tuple(sum(reader.width(name) for reader in readers) for name in ("global", "local"))
    attrs = {**read_store_attrs(paths[0]), "settings": provenance["encoder"], "provenance": provenance}
    write_store(out, cell_ids, spatial, (widths[0], widths[1]), rows(), attrs)


class StoreReader:
    """Reader of a feature store for repeated use, which reads the index of nuclei once.

    Parameters
    ----------
    path
        A feature store.

    Attributes
    ----------
    known
        Keys of the nuclei, in the order of the store.

    Raises
    ------
    InputError
        If the file is not a feature store, or truncated.
    """

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        check_h5(_existing(self.path))
        with _opened(self.path) as store:
            self.known = pd.Index(store["cell_id"].asstr()[:])
            shapes = {name: store[name].shape for name in ("global", "local")}
            numbers = all(store[name].dtype.kind in "fiu" for name in shapes)
        n = len(self.known)
        if not self.known.is_unique or not numbers or not all(len(s) == 2 and s[0] == n for s in shapes.values()):
            raise InputError(
                f"{self.path}: not a feature store: {n} cell_id, which must be unique, for global {shapes['global']} and local "
                f"{shapes['local']}; extract the features again"
            )
        self._widths = {name: int(shape[1]) for name, shape in shapes.items()}

    def width(self, block: str) -> int:
        """Columns of `global` or `local`."""
        return self._widths[block]

    def read(self, cell_ids: Sequence[str] | NDArray[np.object_] | None, use: Sequence[str]) -> Floats:
        """As `read_features`. A call reads each row of the store at most once, so request many nuclei at a time."""
        if cell_ids is None:
            target = np.arange(len(self.known))
        else:
            target = rows_of(
                self.known, cell_ids, f"{self.path}: has no features of", "extract them from the same nuclei file"
            )
        stops = np.cumsum([self.width(name) for name in use])
        out = np.empty((len(target), stops[-1]), dtype=np.float32)
        order = np.argsort(target, kind="stable")
        ascending = target[order]
        with _opened(self.path) as store:
            for first in range(0, len(self.known), _ROWS_PER_READ):
                here = slice(*np.searchsorted(ascending, [first, first + _ROWS_PER_READ]))
                rows = ascending[here]
                if len(rows) == 0:
                    continue
                for name, stop in zip(use, stops, strict=True):
                    block = store[name][rows[0] : rows[-1] + 1]
                    out[order[here], stop - block.shape[1] : stop] = block[rows - rows[0]]
        return out


def read_features(
    path: Path, cell_ids: Sequence[str] | NDArray[np.object_] | None = None, use: Sequence[str] = ("local", "global")
) -> Floats:
    """Read the features of some nuclei, in the given order.

    Parameters
    ----------
    path
        A feature store.
    cell_ids
        Keys of the n nuclei; None for all, in the order of the store.
    use
        Vectors to concatenate, in this order; (local, global) in the paper.

    Returns
    -------
    (n, width) float32.

    Raises
    ------
    InputError
        If the file is not a feature store, or truncated, or a nucleus is not in it.
    """
    return StoreReader(path).read(cell_ids, use)


def rows_of(known: pd.Index, cell_ids: Sequence[str] | NDArray[np.object_], lacks: str, cure: str) -> NDArray[np.intp]:
    """Positions of some nuclei in an index.

    Parameters
    ----------
    known
        The index.
    cell_ids
        Keys to look up, (n,).
    lacks, cure
        Beginning and end of the message if one is missing.

    Raises
    ------
    InputError
        If a nucleus is missing.
    """
    rows: NDArray[np.intp] = known.get_indexer(pd.Index(np.asarray(cell_ids, dtype=object)))
    if (absent := np.flatnonzero(rows < 0)).size:
        raise InputError(
            f"{lacks} {absent.size} of {len(rows)} nuclei (cell_id {str(cell_ids[absent[0]])!r} among them); {cure}"
        )
    return rows


def read_store_attrs(path: Path) -> dict[str, Any]:
    """Attributes of a store (encoder, weights_sha256, mpp, ...), JSON decoded.

    Raises
    ------
    InputError
        If the file is not a feature store.
    """
    with _opened(path) as store:
        attrs = {key: value.item() if isinstance(value, np.generic) else value for key, value in store.attrs.items()}
        return {key: _decoded(value) for key, value in attrs.items()}


def _decoded(value: Any) -> Any:
    if isinstance(value, str) and value[:1] in ("{", "["):
        return json.loads(value)
    return value


@contextmanager
def _opened(path: Path) -> Iterator[h5py.File]:
    path = _existing(Path(path))
    try:
        store = h5py.File(path, "r")
    except OSError as error:
        raise InputError(f"{path}: cannot be read as HDF5 ({error}); extract the features again") from error
    with store:
        try:
            if missing := [name for name in _DATASETS if not isinstance(store.get(name), h5py.Dataset)]:
                raise InputError(f"{path}: not a feature store, it has no /{missing[0]}; extract the features again")
            yield store
        except DAMAGED as error:
            raise InputError(f"{path}: is damaged ({error}); extract the features again") from error


def _existing(path: Path) -> Path:
    if not path.is_file():
        raise InputError(f"{path}: no such file; give a feature store (features-*.h5)")
    return path
