"""Finished chunks of an extraction, kept next to the store until it is complete, so that a killed run can resume."""

from __future__ import annotations

import contextlib
import logging
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from prts.io.cache import atomic

logger = logging.getLogger(__name__)


class Parts:
    """The chunks that are done: `<k>.npy`, float32, in a folder labeled with the fingerprint of its inputs.

    Parameters
    ----------
    folder
        Folder to keep them in. Chunks with another identity found there are deleted.
    sizes
        Number of values in each chunk.
    identity
        Fingerprint of everything that the numbers depend on.
    """

    def __init__(self, folder: Path, sizes: Sequence[int], identity: str) -> None:
        self.folder, self.sizes = folder, sizes
        label = folder / "fingerprint"
        if folder.is_dir() and not (label.is_file() and label.read_text() == identity):
            logger.info("%s: left by a run with different inputs or settings, starting over", folder)
            shutil.rmtree(folder)
        folder.mkdir(parents=True, exist_ok=True)
        with atomic(label) as temporary:
            temporary.write_text(identity)

    def missing(self) -> list[int]:
        """Indices of the missing chunks."""
        todo = [k for k, size in enumerate(self.sizes) if not self._is_whole(k, size)]
        if (done := len(self.sizes) - len(todo)) > 0:
            logger.info("%s: %d of %d chunks are already done", self.folder, done, len(self.sizes))
        return todo

    def write(self, k: int, values: NDArray[np.float32]) -> None:
        """Keep a chunk, (size,)."""
        with atomic(self._path(k)) as temporary:
            np.save(temporary, values)

    def read(self, k: int) -> NDArray[np.float32]:
        """A chunk, (size,); on disk until it is used."""
        values: NDArray[np.float32] = np.load(self._path(k), mmap_mode="r")
        return values

    def delete(self) -> None:
        """Delete all chunks, once the store is complete."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _path(self, k: int) -> Path:
        return self.folder / f"{k:06d}.npy"

    def _is_whole(self, k: int, size: int) -> bool:
        # A power cut, unlike a kill, can leave a file that was renamed before its contents reached the disk.
        with contextlib.suppress(OSError, ValueError, EOFError):
            return bool(self.read(k).shape == (size,))
        return False
