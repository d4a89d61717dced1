"""Batches of nuclei gathered from arrays in memory, and the order of an epoch.

Nothing here works nucleus by nucleus: the sampler yields an array of indices per batch, and the dataset gathers its rows at once. Counts
stay sparse in memory and are densified for one batch at a time; on a GPU whose memory holds the whole set, there.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

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

    While an encoder is trained, `prts.data.tile_batches.Seen` takes the place of the features. The target is computed from the counts on
    the network's device.
    """

    features: Any
    counts: Tensor
    exposure: Tensor | None = None


def draw_views(n: int, views: int, seed: int, epoch: int) -> NDArray[np.int64]:
    """Which image each of n nuclei is read from in an epoch, (n,): 0 is the unchanged one, all are equally likely."""
    return np.random.default_rng((seed, epoch, views)).integers(0, views, n)


class NucleusBatches(Dataset[Batch]):
    """Nuclei of one or more sections, fetched in batches: `dataset[indices]` is a `Batch`.

    Index `k n + i` is nucleus i of all n in their k-th view, with the unchanged image as view 0.
    """

    def __init__(self, sets: Sequence[NucleusSet]) -> None:
        self._features = [nuclei.features for nuclei in sets]
        self._views = [nuclei.views for nuclei in sets]
        # converted once, so that each batch is densified in the network's dtype
        self._counts = [nuclei.counts.astype(np.float32) for nuclei in sets]
        self._exposure = exposures(sets)
        self._starts = np.cumsum([0, *(len(nuclei) for nuclei in sets)])

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, indices: NDArray[np.int64]) -> Batch:
        view, nuclei = np.divmod(indices, len(self))
        if len(self._features) == 1 and not view.any():
            features, counts = self._features[0][nuclei], self._counts[0][nuclei].toarray()
        else:
            features = np.empty((len(indices), self._features[0].shape[1]), dtype=np.float32)
            counts = np.empty((len(indices), self._counts[0].shape[1]), dtype=np.float32)
            section = np.searchsorted(self._starts, nuclei, side="right") - 1
            for number in np.unique(section):
                mine = np.flatnonzero(section == number)
                rows = nuclei[mine] - self._starts[number]
                counts[mine] = self._counts[number][rows].toarray()
                for k, seen in enumerate((self._features[number], *self._views[number])):
                    here = view[mine] == k
                    features[mine[here]] = seen[rows[here]]
        exposure = None if self._exposure is None else torch.from_numpy(self._exposure[nuclei])
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
        views = zip(*((nuclei.features, *nuclei.views) for nuclei in sets), strict=True)
        self._features = torch.cat([torch.from_numpy(part) for view in views for part in view]).to(device)
        self._umi = torch.from_numpy(counts.data).to(device)
        self._gene = torch.from_numpy(counts.indices).to(device)
        exposure = exposures(sets)
        self._exposure = None if exposure is None else torch.from_numpy(exposure).to(device)

    @staticmethod
    def n_bytes(sets: Sequence[NucleusSet]) -> int:
        """Memory that these nuclei need."""
        return sum((1 + len(nuclei.views)) * nuclei.features.nbytes + 8 * nuclei.counts.nnz for nuclei in sets)

    def __len__(self) -> int:
        return len(self._indptr) - 1

    def __getitem__(self, indices: NDArray[np.int64]) -> Batch:
        nuclei = indices % len(self)
        first, n_expressed = self._indptr[nuclei], self._indptr[nuclei + 1] - self._indptr[nuclei]
        total = int(n_expressed.sum())
        before = np.cumsum(n_expressed) - n_expressed
        wanted = np.stack([indices, nuclei, first - before, n_expressed])
        chosen, nucleus, shift, repeats = torch.from_numpy(wanted).to(self._umi.device)
        row = torch.arange(len(indices), device=chosen.device).repeat_interleave(repeats, output_size=total)
        place = torch.arange(total, device=chosen.device) + shift[row]
        counts = self._umi.new_zeros((len(indices), self._n_genes))
        counts[row, self._gene[place].long()] = self._umi[place]
        return Batch(self._features[chosen], counts, None if self._exposure is None else self._exposure[nucleus])


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
    with fewer nuclei than processes. With several views, each nucleus gets one of them (`draw_views`), as an index of `NucleusBatches`.
    """

    def __init__(
        self, n: int, batch_size: int, seed: int, epoch: int = 0, share: Share = ALL, *, views: int = 1
    ) -> None:
        self._n = n
        self._batch_size = batch_size
        self._seed = seed
        self._epoch = epoch
        self._share = share
        self._views = views

    def set_epoch(self, epoch: int) -> None:
        """Set the number of the next epoch; Lightning calls this before each."""
        self._epoch = epoch

    def __len__(self) -> int:
        full, rest = divmod(self._n, self._batch_size)
        return full + (rest >= self._share.smallest())

    def __iter__(self) -> Iterator[NDArray[np.int64]]:
        order = np.random.default_rng((self._seed, self._epoch)).permutation(self._n)
        if self._views > 1:
            order += self._n * draw_views(self._n, self._views, self._seed, self._epoch)[order]
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
