"""Batches of nuclei gathered from arrays in memory, and the order of an epoch.

Nothing here works nucleus by nucleus: the sampler yields an array of indices per batch, and the dataset gathers its rows at once. Counts
stay sparse in memory and are densified for one batch at a time; on a GPU whose memory holds the whole set, there.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import scipy.sparse as sp
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset, Sampler

if TYPE_CHECKING:
    from prts.data.nucleus_set import NucleusSet


class Batch(NamedTuple):
    """Features (b, d) and raw counts (b, g), both float32, and exposures (b, 1) if the nuclei have any.

    The target is computed from the counts on the network's device.
    """

    features: Tensor
    counts: Tensor
    exposure: Tensor | None = None


class NucleusBatches(Dataset[Batch]):
    """Nuclei of one or more sections, fetched in batches: `dataset[indices]` is a `Batch`."""

    def __init__(self, sets: Sequence[NucleusSet]) -> None:
        self._features = [nuclei.features for nuclei in sets]
        # converted once, so that each batch is densified in the network's dtype
        self._counts = [nuclei.counts.astype(np.float32) for nuclei in sets]
        self._exposure = exposures(sets)
        self._starts = np.cumsum([0, *(len(nuclei) for nuclei in sets)])

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, indices: NDArray[np.int64]) -> Batch:
        if len(self._features) == 1:
            features, counts = self._features[0][indices], self._counts[0][indices].toarray()
        else:
            features = np.empty((len(indices), self._features[0].shape[1]), dtype=np.float32)
            counts = np.empty((len(indices), self._counts[0].shape[1]), dtype=np.float32)
            section = np.searchsorted(self._starts, indices, side="right") - 1
            for number in np.unique(section):
                mine = section == number
                rows = indices[mine] - self._starts[number]
                features[mine] = self._features[number][rows]
                counts[mine] = self._counts[number][rows].toarray()
        exposure = None if self._exposure is None else torch.from_numpy(self._exposure[indices])
        return Batch(torch.from_numpy(features), torch.from_numpy(counts), exposure)


class DeviceBatches(Dataset[Batch]):
    """Like `NucleusBatches`, but all nuclei are kept in device memory, so that only the indices of a batch are transferred.

    Parameters
    ----------
    sets
        The nuclei.
    device
        Device to copy them to.
    """

    def __init__(self, sets: Sequence[NucleusSet], device: torch.device) -> None:
        counts = sp.vstack([nuclei.counts for nuclei in sets], format="csr", dtype=np.float32)
        counts.sum_duplicates()
        self._n_genes = counts.shape[1]
        self._indptr = counts.indptr.astype(np.int64)  # stays here: sizes are known without asking the device
        self._features = torch.cat([torch.from_numpy(nuclei.features) for nuclei in sets]).to(device)
        self._umi = torch.from_numpy(counts.data).to(device)
        self._gene = torch.from_numpy(counts.indices).to(device)
        exposure = exposures(sets)
        self._exposure = None if exposure is None else torch.from_numpy(exposure).to(device)

    @staticmethod
    def n_bytes(sets: Sequence[NucleusSet]) -> int:
        """Memory that these nuclei need."""
        return sum(nuclei.features.nbytes + 8 * nuclei.counts.nnz for nuclei in sets)

    def __len__(self) -> int:
        return len(self._indptr) - 1

    def __getitem__(self, indices: NDArray[np.int64]) -> Batch:
        first, n_expressed = self._indptr[indices], self._indptr[indices + 1] - self._indptr[indices]
        total = int(n_expressed.sum())
        before = np.cumsum(n_expressed) - n_expressed
        chosen, shift, repeats = torch.from_numpy(np.stack([indices, first - before, n_expressed])).to(self._umi.device)
        row = torch.arange(len(indices), device=chosen.device).repeat_interleave(repeats, output_size=total)
        place = torch.arange(total, device=chosen.device) + shift[row]
        counts = self._umi.new_zeros((len(indices), self._n_genes))
        counts[row, self._gene[place].long()] = self._umi[place]
        return Batch(self._features[chosen], counts, None if self._exposure is None else self._exposure[chosen])


def exposures(sets: Sequence[NucleusSet]) -> NDArray[np.float32] | None:
    """Exposures (n, 1) of the nuclei of all sets; None if no set has any."""
    if all(nuclei.exposure is None for nuclei in sets):
        return None
    known = [np.ones(len(part), np.float32) if part.exposure is None else part.exposure for part in sets]
    return np.concatenate(known)[:, None]


class Share(NamedTuple):
    """Which part of every batch a process of a DDP job takes, so that all processes together see the batches of a single one.

    Attributes
    ----------
    rank, processes
        Number of the process, from 0, and how many there are.
    """

    rank: int = 0
    processes: int = 1

    def of(self, batch: NDArray[np.int64]) -> NDArray[np.int64]:
        """The part of a batch that is this process's; sizes differ by one nucleus at most."""
        return batch[self.rank :: self.processes]

    def smallest(self) -> int:
        """Nuclei that a training batch needs: one for each process, and two for the variance of batch normalization."""
        return max(2, self.processes)


ALL = Share()


class ShuffledBatches(Sampler[NDArray[np.int64]]):
    """A new random order each epoch, cut into batches. The order depends only on the seed and the epoch.

    If the last batch has a single nucleus, it is dropped, because batch normalization needs a variance. The same goes for a last batch
    with fewer nuclei than processes.
    """

    def __init__(self, n: int, batch_size: int, seed: int, epoch: int = 0, share: Share = ALL) -> None:
        self._n = n
        self._batch_size = batch_size
        self._seed = seed
        self._epoch = epoch
        self._share = share

    def set_epoch(self, epoch: int) -> None:
        """Set the number of the next epoch; Lightning calls this before each."""
        self._epoch = epoch

    def __len__(self) -> int:
        full, rest = divmod(self._n, self._batch_size)
        return full + (rest >= self._share.smallest())

    def __iter__(self) -> Iterator[NDArray[np.int64]]:
        order = np.random.default_rng((self._seed, self._epoch)).permutation(self._n)
        self._epoch += 1
        for batch in range(len(self)):
            yield self._share.of(order[batch * self._batch_size : (batch + 1) * self._batch_size])


class OrderedBatches(Sampler[NDArray[np.int64]]):
    """All nuclei in their order, cut into batches. A process may get no nucleus of the last batch, but every process gets every batch."""

    def __init__(self, n: int, batch_size: int, share: Share = ALL) -> None:
        self._n = n
        self._batch_size = batch_size
        self._share = share

    def __len__(self) -> int:
        return -(-self._n // self._batch_size)

    def __iter__(self) -> Iterator[NDArray[np.int64]]:
        for start in range(0, self._n, self._batch_size):
            yield self._share.of(np.arange(start, min(start + self._batch_size, self._n)))
