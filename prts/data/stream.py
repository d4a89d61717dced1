"""Batches of nuclei that stay on disk: chunks in a random order, shuffled once more within a buffer.

A chunk is a run of consecutive nuclei of a section, which costs one read. The chunks of an epoch are put in a random order and cut into
buffers; the nuclei of a buffer are shuffled and cut into batches. The order is a function of the seed and the epoch alone, whatever the
number of readers: each of them reads whole buffers, which arrive in order.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from prts.data.batches import ALL, Batch, Share, draw_views, exposures

if TYPE_CHECKING:
    from prts.data.nucleus_set import NucleusSet

Indices = NDArray[np.int64]


class Streaming(NamedTuple):
    """How nuclei are read.

    Attributes
    ----------
    chunk
        Consecutive nuclei that are read together. Smaller chunks mix better and take longer to read.
    buffer
        Nuclei that are shuffled together, rounded to whole batches.
    """

    chunk: int = 128
    buffer: int = 16_384


class Buffers(Sampler[list[Indices]]):
    """The batches of an epoch, buffer by buffer.

    Parameters
    ----------
    sizes
        Nuclei of each set.
    batch_size
        Nuclei per batch.
    how
        Sizes of chunks and buffers.
    seed, epoch
        Decide the order; None: in the order of the sets, with every nucleus.
    share
        The part of each batch that this process takes.
    views
        Images of which each nucleus is read from one, drawn as by `ShuffledBatches`.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        batch_size: int,
        how: Streaming,
        seed: int | None,
        epoch: int = 0,
        share: Share = ALL,
        *,
        views: int = 1,
    ) -> None:
        self._sizes = sizes
        self._batch_size = batch_size
        self._chunk = how.chunk
        self._buffer = max(1, round(how.buffer / batch_size)) * batch_size
        self._seed = seed
        self._epoch = epoch
        self._share = share
        self._views = views

    def set_epoch(self, epoch: int) -> None:
        """Set the number of the next epoch; Lightning calls this before each."""
        self._epoch = epoch

    @property
    def n_batches(self) -> int:
        """Batches in an epoch."""
        full, rest = divmod(sum(self._sizes), self._batch_size)
        return full + (rest >= self._least)

    @property
    def _least(self) -> int:
        return 1 if self._seed is None else self._share.smallest()

    def __len__(self) -> int:
        return -(-sum(self._sizes) // self._buffer)

    def __iter__(self) -> Iterator[list[Indices]]:
        order, shift = None, None
        if self._seed is not None:
            order, n = np.random.default_rng((self._seed, self._epoch)), sum(self._sizes)
            if self._views > 1:
                shift = n * draw_views(n, self._views, self._seed, self._epoch)
        self._epoch += 1
        for buffer in self._buffers(order):
            nuclei = buffer if order is None else order.permutation(buffer)
            nuclei = nuclei if shift is None else nuclei + shift[nuclei]
            batches = [nuclei[start : start + self._batch_size] for start in range(0, len(nuclei), self._batch_size)]
            if kept := [self._share.of(batch) for batch in batches if len(batch) >= self._least]:
                yield kept

    def _buffers(self, order: np.random.Generator | None) -> Iterator[Indices]:
        """Indices of the nuclei of each buffer. A chunk may be cut in two, so that all buffers but the last are full."""
        stops = np.cumsum(self._sizes, dtype=np.int64)
        chunks = np.array(
            [
                (start, min(start + self._chunk, stop))
                for stop, size in zip(stops.tolist(), self._sizes, strict=True)
                for start in range(stop - size, stop, self._chunk)
            ],
            dtype=np.int64,
        )
        held: list[Indices] = []
        n = 0
        for start, stop in chunks if order is None else order.permutation(chunks):
            while start < stop:
                taken = min(stop - start, self._buffer - n)
                held.append(np.arange(start, start + taken))
                start, n = start + taken, n + taken
                if n == self._buffer:
                    yield np.concatenate(held)
                    held, n = [], 0
        if held:
            yield np.concatenate(held)


class _Buffer(NamedTuple):
    """Nuclei of a buffer, batch after batch: features, counts as the arrays of a CSR matrix, exposures, and the batches' sizes."""

    features: Tensor
    data: Tensor
    indices: Tensor
    indptr: Tensor
    exposure: Tensor | None
    sizes: list[int]


class _StoredNuclei(Dataset[_Buffer]):
    def __init__(self, sets: Sequence[NucleusSet]) -> None:
        self._sets = sets
        self._exposure = exposures(sets)
        self._starts = np.cumsum([0, *(len(nuclei) for nuclei in sets)])

    def __getitem__(self, batches: list[Indices]) -> _Buffer:
        import scipy.sparse as sp

        view, wanted = np.divmod(np.concatenate(batches), self._starts[-1])
        at = np.argsort(wanted)
        ascending = wanted[at]
        cuts = np.searchsorted(ascending, self._starts)
        features = np.empty((len(wanted), self._sets[0].features.shape[1]), dtype=np.float32)
        parts = []
        for nuclei, first, start, stop in zip(self._sets, self._starts, cuts, cuts[1:], strict=False):
            if start < stop:
                rows, mine = ascending[start:stop] - first, at[start:stop]
                parts.append(nuclei.counts[rows])
                for k, stored in enumerate((nuclei.features, *nuclei.views)):
                    if (here := view[mine] == k).any():
                        features[mine[here]] = stored[rows[here]]
        back = np.empty_like(at)
        back[at] = np.arange(len(at))
        counts = (sp.vstack(parts, format="csr") if parts else self._sets[0].counts[:0])[back]
        exposure = None if self._exposure is None else torch.from_numpy(self._exposure[wanted])
        sizes = [len(batch) for batch in batches]
        return _Buffer(
            torch.from_numpy(features),
            torch.from_numpy(counts.data.astype(np.float32)),
            torch.from_numpy(counts.indices.astype(np.int64)),
            torch.from_numpy(counts.indptr.astype(np.int64)),
            exposure,
            sizes,
        )


class StreamedBatches:
    """Batches of nuclei on disk, for Lightning's Trainer.

    Parameters
    ----------
    sets
        The nuclei.
    sampler
        Their order.
    num_workers
        Processes that read ahead, two buffers each; 0 reads when the next buffer is due.
    seed
        Of the workers.
    """

    def __init__(self, sets: Sequence[NucleusSet], sampler: Buffers, *, num_workers: int = 0, seed: int = 0) -> None:
        # where Lightning looks for `set_epoch`
        self.sampler = sampler
        self.batch_sampler = None
        self._n_genes = sets[0].counts.shape[1]
        self._loader = DataLoader(
            _StoredNuclei(sets),
            batch_size=None,
            sampler=sampler,
            # its own, because drawing the workers' seeds from torch's generator would make dropout depend on the number of workers
            generator=torch.Generator().manual_seed(seed),
            num_workers=num_workers,
            persistent_workers=num_workers > 0,
        )

    def __len__(self) -> int:
        return self.sampler.n_batches

    def __iter__(self) -> Iterator[Batch]:
        for buffer in self._loader:
            start = 0
            for size in buffer.sizes:
                stop = start + size
                indptr = buffer.indptr[start : stop + 1]
                stored = slice(int(indptr[0]), int(indptr[-1]))
                counts = torch.zeros((size, self._n_genes))
                row = torch.arange(size).repeat_interleave(indptr.diff())
                counts[row, buffer.indices[stored]] = buffer.data[stored]
                exposure = None if buffer.exposure is None else buffer.exposure[start:stop]
                yield Batch(buffer.features[start:stop], counts, exposure)
                start = stop
