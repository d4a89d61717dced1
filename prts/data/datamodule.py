"""Batches for training: cached features and sparse counts, gathered as whole arrays.

Nothing here works nucleus by nucleus: the sampler yields an array of indices per batch, and the dataset gathers its rows at once. Counts
stay sparse in memory and are densified for one batch at a time; on a GPU whose memory holds the whole set, there.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import h5py
import numpy as np
import pytorch_lightning as pl
import scipy.sparse as sp
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from prts.data.nucleus_set import NucleusSet, feature_moments
from prts.data.slide_scale import FEWEST, SlideScale
from prts.data.splits import TEST, TRAIN, VAL, Roles, Splitter, split_report
from prts.errors import InputError, ParameterError
from prts.features.feature_reader import BLOCKS, STORED, InputReader
from prts.io.nuclei import load_nuclei
from prts.preprocess.artefacts import is_artefact

if TYPE_CHECKING:
    from prts.data.prepare import PreparedSection, PreparedTissue
    from prts.preprocess.panel import Panel

logger = logging.getLogger(__name__)

__all__ = ["Batch", "DeviceBatches", "NucleusBatches", "NucleusSet", "PRTSDataModule", "ShuffledBatches"]


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
        self._exposure = _exposures(sets)
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
        exposure = _exposures(sets)
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


def _exposures(sets: Sequence[NucleusSet]) -> NDArray[np.float32] | None:
    """Exposures (n, 1) of the nuclei of all sets; None if no set has any."""
    if all(nuclei.exposure is None for nuclei in sets):
        return None
    known = [np.ones(len(part), np.float32) if part.exposure is None else part.exposure for part in sets]
    return np.concatenate(known)[:, None]


class ShuffledBatches(Sampler[NDArray[np.int64]]):
    """A new random order each epoch, cut into batches. The order depends only on the seed and the epoch.

    If the last batch has a single nucleus, it is dropped, because batch normalization needs a variance.
    """

    def __init__(self, n: int, batch_size: int, seed: int, epoch: int = 0) -> None:
        self._n = n
        self._batch_size = batch_size
        self._seed = seed
        self._epoch = epoch

    def set_epoch(self, epoch: int) -> None:
        """Set the number of the next epoch; Lightning calls this before each."""
        self._epoch = epoch

    def __len__(self) -> int:
        full, rest = divmod(self._n, self._batch_size)
        return full + (rest > 1)

    def __iter__(self) -> Iterator[NDArray[np.int64]]:
        order = np.random.default_rng((self._seed, self._epoch)).permutation(self._n)
        self._epoch += 1
        for batch in range(len(self)):
            yield order[batch * self._batch_size : (batch + 1) * self._batch_size]


class _OrderedBatches(Sampler[NDArray[np.int64]]):
    def __init__(self, n: int, batch_size: int) -> None:
        self._n = n
        self._batch_size = batch_size

    def __len__(self) -> int:
        return -(-self._n // self._batch_size)

    def __iter__(self) -> Iterator[NDArray[np.int64]]:
        for start in range(0, self._n, self._batch_size):
            yield np.arange(start, min(start + self._batch_size, self._n))


class PRTSDataModule(pl.LightningDataModule):
    """Prepared sections as training and validation batches, and as arrays for evaluation.

    After `setup`: `tissue`, `panel`, `train_sets`, `val_sets`, `test_sets` (one `NucleusSet` per section), `split_report`, `in_features`,
    `n_genes`, `feature_widths`, `slide_scale` (None unless `scale` is `slide`).

    Parameters
    ----------
    prepare
        Prepares the tissue, or finds it prepared. Called once in each process: the first `prepare_data` or `setup` does it.
    split
        Assigns nuclei to parts.
    use
        Feature blocks in the order of the network's input. The paper's is (local, global); `morphology` and `context` are ours; an
        ablation omits some.
    scale
        `training`: features as they are. `slide`: shifted and scaled so that each section has the mean and spread of all training sections.
    permute
        Shuffle features among all training nuclei (an ablation: the network then learns each gene's mean at best). The arrays,
        validation and test are not shuffled.
    batch_size
        Nuclei per batch.
    seed
        Seed of the training order.
    num_workers
        Processes that gather batches. Gathering takes about a millisecond, so the default is none; a set that a GPU holds needs none.
    """

    tissue: PreparedTissue
    panel: Panel
    train_sets: list[NucleusSet]
    val_sets: list[NucleusSet]
    test_sets: list[NucleusSet]
    split_report: dict[str, Any]
    feature_widths: dict[str, int]
    slide_scale: SlideScale | None

    def __init__(
        self,
        prepare: Callable[[], PreparedTissue],
        split: Splitter,
        *,
        use: Sequence[str] = STORED,
        scale: Literal["training", "slide"] = "training",
        permute: bool = False,
        batch_size: int = 256,
        seed: int = 0,
        num_workers: int = 0,
    ) -> None:
        super().__init__()
        self.use = tuple(use)
        if not self.use or len(set(self.use)) != len(self.use) or not set(self.use) <= set(BLOCKS):
            raise ParameterError("data", "use", f"{list(use)} must list some of {', '.join(BLOCKS)}, each once")
        if batch_size < 2:
            raise ParameterError(
                "data", "batch_size", f"{batch_size} is too small for batch normalization; use 2 or more"
            )
        self.scale = scale
        self.permute = permute
        self.batch_size = batch_size
        self.seed = seed
        self.num_workers = num_workers
        self._prepare = prepare
        self._prepared: PreparedTissue | None = None
        self._split = split
        self._is_set_up = False
        # above 0 when training resumes: workers draw the order before Lightning sets the epoch
        self.first_epoch = 0

    @property
    def in_features(self) -> int:
        """Width of the network's input."""
        return sum(self.feature_widths.values())

    @property
    def n_genes(self) -> int:
        """Number of genes of the panel."""
        return len(self.panel.genes)

    def prepare_data(self) -> None:
        """Build what is missing from the cache, in one process."""
        self._once_prepared()

    def _once_prepared(self) -> PreparedTissue:
        # even if everything is cached, checking that opens every section and every nuclei file
        if self._prepared is None:
            self._prepared = self._prepare()
        return self._prepared

    def setup(self, stage: str | None = None) -> None:
        """Load the cached features and counts and split them.

        Raises
        ------
        InputError
            If a part is left without nuclei, or features and counts do not belong together.
        """
        if self._is_set_up:
            return
        from prts.preprocess.panel import Panel

        tissue = self._once_prepared()
        panel = Panel.from_json(tissue.panel)
        roles = Roles(tissue.train, tissue.val, tissue.test)
        whole = {name: _load_section(tissue.sections[name], panel, self.use) for name in roles.by_section()}
        self.slide_scale = _matched(whole, roles.train) if self.scale == "slide" else None
        # split all nuclei that passed QC, so that the parts are those on which the panel was fitted
        parts = self._split({name: loaded.xy_um for name, loaded in whole.items()}, roles)
        self.split_report = split_report(self._split, parts)
        self.train_sets, self.val_sets, self.test_sets = (
            [
                loaded.nuclei.take(rows)
                for name, loaded in whole.items()
                if (rows := _rows(loaded, parts[name], part)).size
            ]
            for part in (TRAIN, VAL, TEST)
        )
        self.feature_widths = _common_widths({name: loaded.widths for name, loaded in whole.items()})
        self.tissue = tissue
        self.panel = panel
        if sum(map(len, self.train_sets)) < 2:
            raise InputError(f"tissue.train: {tissue.name} has fewer than two training nuclei with counts and features")
        self._is_set_up = True

    def feature_moments(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation (d,) of the features over training nuclei, for a network that standardizes its input."""
        mean, spread = feature_moments(self.train_sets)
        return torch.from_numpy(mean.astype(np.float32)), torch.from_numpy(spread.astype(np.float32))

    def train_dataloader(self) -> DataLoader[Batch]:
        """Shuffled batches of all training sections together."""
        sets = _permuted(self.train_sets, self.seed) if self.permute else self.train_sets
        return self._loader(sets, ShuffledBatches(sum(map(len, sets)), self.batch_size, self.seed, self.first_epoch))

    def val_dataloader(self) -> list[DataLoader[Batch]]:
        """One loader per validation section: figures are computed per section, never pooled."""
        return [self._loader([nuclei], _OrderedBatches(len(nuclei), self.batch_size)) for nuclei in self.val_sets]

    def _loader(self, sets: Sequence[NucleusSet], sampler: Sampler[NDArray[np.int64]]) -> DataLoader[Batch]:
        device = torch.device("cpu") if self.trainer is None else self.trainer.strategy.root_device
        on_device = _fits(sets, device)
        n_workers = 0 if on_device else self.num_workers
        return DataLoader(
            DeviceBatches(sets, device) if on_device else NucleusBatches(sets),
            batch_size=None,  # the sampler's items are batches already
            sampler=sampler,
            # its own, because drawing the workers' seeds from torch's generator would make dropout depend on the number of workers
            generator=torch.Generator().manual_seed(self.seed),
            num_workers=n_workers,
            persistent_workers=n_workers > 0,
            pin_memory=device.type == "cuda" and not on_device,
        )


def _fits(sets: Sequence[NucleusSet], device: torch.device) -> bool:
    """Whether these nuclei fit in half of the GPU's free memory; the other half is for the network and batches."""
    if device.type != "cuda":
        return False
    free, _ = torch.cuda.mem_get_info(device)
    return DeviceBatches.n_bytes(sets) < free // 2


class _Loaded(NamedTuple):
    """A section's nuclei with both counts and features; `row` is the position of each among all nuclei that passed QC (`xy_um`)."""

    nuclei: NucleusSet
    row: NDArray[np.intp]
    xy_um: NDArray[np.float64]
    widths: dict[str, int]
    artefact: NDArray[np.bool_]


def _load_section(prepared: PreparedSection, panel: Panel, use: Sequence[str]) -> _Loaded:
    import anndata as ad

    counts = ad.read_h5ad(prepared.counts)
    described = prepared.features or prepared.context
    with h5py.File(described) as store:
        stored = store["cell_id"].asstr()[:]
    row = np.flatnonzero(counts.obs_names.isin(stored))
    if len(row) == 0:
        raise InputError(
            f"{described}: holds features of none of the nuclei in {prepared.counts}; delete it and prepare again"
        )
    if len(row) < counts.n_obs:
        logger.warning(
            "%s: %d nuclei have no features and are left out", prepared.section.name, counts.n_obs - len(row)
        )
    xy_um = np.asarray(counts.obsm["spatial"], dtype=np.float64) * prepared.section.mpp
    cell_id = counts.obs_names.to_numpy(dtype=object)[row]
    read = InputReader(
        prepared.features, use, lambda: load_nuclei(prepared.nuclei), prepared.section.mpp, prepared.context
    )
    nuclei = NucleusSet(
        section=prepared.section.name,
        cell_id=cell_id,
        xy_um=xy_um[row],
        features=read(cell_id),
        counts=panel.align(counts)[row],
        total_counts=counts.obs["total_counts"].to_numpy(dtype=np.int64)[row],
        area_um2=counts.obs["area_um2"].to_numpy(dtype=np.float64)[row],
        exposure=counts.obs["exposure"].to_numpy(dtype=np.float32)[row] if "exposure" in counts.obs else None,
    )
    return _Loaded(nuclei, row, xy_um, read.widths, is_artefact(counts.obs)[row])


def _matched(whole: Mapping[str, _Loaded], train: Sequence[str]) -> SlideScale:
    """Match the features of each section, in place, to the mean and spread of the training sections, which are returned."""
    reference = SlideScale.fit([whole[name].nuclei for name in train])
    for name, loaded in whole.items():
        features = loaded.nuclei.features
        if len(features) < FEWEST:
            logger.warning(
                "%s: %d nuclei are too few to know the mean and spread of the slide; its features stay as they are",
                name,
                len(features),
            )
        else:
            reference.match(features, reference.moments([features]))
    return reference


def _permuted(sets: Sequence[NucleusSet], seed: int) -> list[NucleusSet]:
    """The same nuclei, each with the features of another one."""
    stacked = np.concatenate([nuclei.features for nuclei in sets])
    stacked = stacked[np.random.default_rng(seed).permutation(len(stacked))]
    stops = np.cumsum([len(nuclei) for nuclei in sets])[:-1]
    return [replace(nuclei, features=part) for nuclei, part in zip(sets, np.split(stacked, stops), strict=True)]


def _rows(loaded: _Loaded, parts: NDArray[np.int8], part: int) -> NDArray[np.intp]:
    """Rows of the loaded nuclei that belong to a part."""
    wanted = parts[loaded.row] == part
    # training skips flagged nuclei; validation and test keep all
    return np.flatnonzero(wanted & ~loaded.artefact if part == TRAIN else wanted)


def _common_widths(widths: Mapping[str, dict[str, int]]) -> dict[str, int]:
    """The feature widths, which all sections must share."""
    first, *rest = widths
    for name in rest:
        if widths[name] != widths[first]:
            raise InputError(
                f"features of {name} have widths {widths[name]}, but those of {first} {widths[first]}; use the same settings for both"
            )
    return widths[first]
