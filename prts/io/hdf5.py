"""Write HDF5 files on a disk that may be full.

If a write fails, HDF5 (1.14) can neither finish nor close the file, and the process ends with a segmentation fault. Here HDF5 never sees a
write fail: after the first failure its output is kept in memory, and `NewFile.check` or closing the file raises the error.
"""

from __future__ import annotations

import io
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import h5py

if TYPE_CHECKING:
    import anndata as ad


class NewFile(h5py.File):  # type: ignore[misc]
    """A new HDF5 file whose `check` and `close` raise the OSError of a full disk.

    Parameters
    ----------
    path
        The file; an existing one is overwritten.
    **options
        Options of `h5py.File`.
    """

    def __init__(self, path: Path, **options: Any) -> None:
        self._sink = _Sink(path)
        try:
            super().__init__(self._sink, "w", **options)
        except BaseException:
            self._sink.close()
            raise

    def check(self) -> None:
        """Raise the error of a failed write, if any; call it now and then while writing much.

        Raises
        ------
        OSError
            The error of the operating system.
        """
        if self._sink.error is not None:
            raise self._sink.error

    def close(self) -> None:
        """Write the rest and close the file.

        Raises
        ------
        OSError
            The error of the operating system, now or earlier: the file is incomplete.
        """
        if self._sink.closed:
            return
        try:
            super().close()
        finally:
            self._sink.close()
        self.check()


def write_h5ad(data: ad.AnnData, path: Path, compression: str | None = None) -> None:
    """Write like `AnnData.write_h5ad`, but raise an error if the disk is full.

    Parameters
    ----------
    data
        Data to write; text columns become categorical, as in anndata.
    path
        The file.
    compression
        Compression of all arrays, such as gzip.
    """
    from anndata.io import write_elem

    data.strings_to_categoricals()
    options = {} if compression is None else {"compression": compression}
    with NewFile(path) as file:
        file.attrs.update({"encoding-type": "anndata", "encoding-version": "0.1.0"})
        for name in ("X", "raw", "obs", "var", "obsm", "varm", "obsp", "varp", "layers", "uns"):
            part = getattr(data, name)
            if part is not None:  # older versions of anndata cannot read None
                write_elem(file, name, dict(part) if isinstance(part, Mapping) else part, dataset_kwargs=options)
                file.check()


class _Sink(io.RawIOBase):
    """A file that accepts all writes and keeps in memory what the disk refuses."""

    def __init__(self, path: Path) -> None:
        self.error: OSError | None = None
        self._at = self._end = 0
        self._refused: list[tuple[int, bytes]] = []
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | _FLAGS, 0o666)

    def readable(self) -> bool:
        return True

    def writable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int:
        self._at = offset + (0, self._at, self._end)[whence]
        return self._at

    def tell(self) -> int:
        return self._at

    def write(self, data: Any, /) -> int:
        view = memoryview(data).cast("B")
        if self.error is None:
            try:
                done = 0
                while done < len(view):
                    done += _write(self._file, view[done:], self._at + done)
            except OSError as error:
                self.error = error
        if self.error is not None:  # also later writes that would succeed: writes may overlap
            self._refused.append((self._at, bytes(view)))
        self._at += len(view)
        self._end = max(self._end, self._at)
        return len(view)

    def readinto(self, buffer: Any, /) -> int:
        view = memoryview(buffer).cast("B")
        size = min(len(view), max(0, self._end - self._at))
        stored = _read(self._file, size, self._at)
        view[:size] = stored + bytes(size - len(stored))
        for at, data in self._refused:
            start, stop = max(at, self._at), min(at + len(data), self._at + size)
            if start < stop:
                view[start - self._at : stop - self._at] = data[start - at : stop - at]
        self._at += size
        return size

    def truncate(self, size: int | None = None, /) -> int:
        self._end = self._at if size is None else size
        if self.error is None:
            try:
                os.ftruncate(self._file, self._end)
            except OSError as error:
                self.error = error
        return self._end

    def close(self) -> None:
        if not self.closed:
            os.close(self._file)
        super().close()


# Windows has neither of them, and needs another one.
_FLAGS = getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)


def _read(file: int, size: int, at: int) -> bytes:
    if hasattr(os, "pread"):
        return os.pread(file, size, at)
    os.lseek(file, at, os.SEEK_SET)
    return os.read(file, size)


def _write(file: int, data: memoryview, at: int) -> int:
    if hasattr(os, "pwrite"):
        return os.pwrite(file, data, at)
    os.lseek(file, at, os.SEEK_SET)
    return os.write(file, data)
