"""What an extraction has finished, kept beside the store until that is complete, so that a killed run goes on from it."""

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
    """The chunks that are done: `<k>.npy`, float32, in a folder that knows what it belongs to.

    Parameters
    ----------
    folder
        Where they lie. Chunks that another identity left there are thrown away.
    sizes
        How many numbers each chunk has.
    identity
        Fingerprint of everything that the numbers follow from.
    """

    def __init__(self, folder: Path, sizes: Sequence[int], identity: str) -> None:
        self.folder, self.sizes = folder, sizes
        label = folder / "fingerprint"
        if folder.is_dir() and not (label.is_file() and label.read_text() == identity):
            logger.info("%s: left by a run with other inputs or settings, starting afresh", folder)
            shutil.rmtree(folder)
        folder.mkdir(parents=True, exist_ok=True)
        with atomic(label) as temporary:
            temporary.write_text(identity)

    def missing(self) -> list[int]:
        """Numbers of the chunks that are still to be made."""
        todo = [k for k, size in enumerate(self.sizes) if not self._is_whole(k, size)]
        if (done := len(self.sizes) - len(todo)) > 0:
            logger.info("%s: %d of %d chunks were done before", self.folder, done, len(self.sizes))
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
        """Throw all away: the store is complete."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _path(self, k: int) -> Path:
        return self.folder / f"{k:06d}.npy"

    def _is_whole(self, k: int, size: int) -> bool:
        # A power cut, unlike a kill, can leave a file that was renamed before its content reached the disk.
        with contextlib.suppress(OSError, ValueError, EOFError):
            return bool(self.read(k).shape == (size,))
        return False
