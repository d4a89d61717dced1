"""Prepared sections, split and loaded: batches for training and validation, arrays for evaluation."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import h5py
import numpy as np
import pytorch_lightning as pl
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Sampler

from prts.data.batches import Batch, DeviceBatches, NucleusBatches, OrderedBatches, Share, ShuffledBatches
from prts.data.memory import Memory, streams
from prts.data.nucleus_set import NucleusSet, feature_moments
from prts.data.on_disk import StoredFeatures, section_counts, section_features, write_inputs
from prts.data.slide_scale import FEWEST, AsRead, SlideMoments, SlideScale
from prts.data.splits import TEST, TRAIN, VAL, Roles, Splitter, split_report
from prts.data.stream import Buffers, StreamedBatches, Streaming
from prts.errors import InputError, ParameterError
from prts.features.feature_reader import BLOCKS, STORED, InputReader
from prts.io.nuclei import load_nuclei
from prts.io.unit_names import unit_name
from prts.preprocess.artefacts import is_artefact

if TYPE_CHECKING:
    from anndata import AnnData

    from prts.data.prepare import PreparedSection, PreparedTissue
    from prts.preprocess.panel import Panel

logger = logging.getLogger(__name__)


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
        Nuclei per batch. The processes of a DDP job share each batch.
    seed
        Seed of the training order.
    num_workers
        Processes that gather batches, or read buffers of a set on disk. Gathering takes about a millisecond, so the default is none; a set
        that a GPU holds needs none.
    memory
        `whole`: features and counts are loaded. `stream`: they stay on disk and are read when used (`prts.data.on_disk`). `auto`: the
        latter if they would take more than half of the available memory.
    streaming
        Sizes of chunks and buffers in which nuclei on disk are shuffled.
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
        memory: Memory = "whole",
        streaming: Streaming | None = None,
    ) -> None:
        super().__init__()
        self.use = tuple(use)
        if not self.use or len(set(self.use)) != len(self.use) or not set(self.use) <= set(BLOCKS):
            raise ParameterError("data", "use", f"{list(use)} must list some of {', '.join(BLOCKS)}, each once")
        if batch_size < 2:
            raise ParameterError(
                "data", "batch_size", f"{batch_size} is too small for batch normalization; use 2 or more"
            )
        if permute and memory == "stream":
            raise ParameterError("data", "permute", "needs all features in memory; use memory=whole")
        self.memory = memory
        self.streaming = streaming or Streaming()
        self.streams = False
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
        self.streams = not self.permute and streams(self.memory, tissue, self.use, len(panel.genes))
        whole = {
            name: _stored_section(tissue.sections[name], panel, self.use, bins=tissue.bins)
            if self.streams
            else _load_section(tissue.sections[name], panel, self.use)
            for name in roles.by_section()
        }
        self.feature_widths = _common_widths({name: loaded.widths for name, loaded in whole.items()})
        self.slide_scale, self._slides = _matched(whole, roles.train) if self.scale == "slide" else (None, {})
        # split all nuclei that passed QC, so that the parts are those on which the panel was fitted
        parts = self._split({name: loaded.xy_um for name, loaded in whole.items()}, roles)
        self.split_report = split_report(self._split, parts)
        sets: tuple[list[NucleusSet], ...] = ([], [], [])
        self.train_sets, self.val_sets, self.test_sets = sets
        for name in list(whole):
            loaded = whole.pop(
                name
            )  # so that its parts and the section are not in memory for longer than it takes to copy them
            for chosen, part in zip(sets, (TRAIN, VAL, TEST), strict=True):
                if (rows := _rows(loaded, parts[name], part)).size:
                    nuclei = loaded.nuclei if part == TRAIN else replace(loaded.nuclei, views=())
                    chosen.append(nuclei.take(rows))
        self.tissue = tissue
        self.panel = panel
        if sum(map(len, self.train_sets)) < 2:
            raise InputError(f"tissue.train: {tissue.name} has fewer than two training nuclei with counts and features")
        self._is_set_up = True

    def as_read(self, sets: Sequence[NucleusSet]) -> list[NucleusSet]:
        """These sets with their features as they were read, before slides were matched."""
        found = []
        for nuclei in sets:
            features, slide = nuclei.features, self._slides.get(nuclei.section)
            if isinstance(features, StoredFeatures):
                features = replace(features, scale=None, slide=None)
            elif slide is not None and self.slide_scale is not None:
                features = AsRead(features, self.slide_scale, slide)
            found.append(replace(nuclei, features=features))
        return found

    def feature_moments(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation (d,) of the features over training nuclei, for a network that standardizes its input."""
        mean, spread = feature_moments(self.train_sets)
        return torch.from_numpy(mean.astype(np.float32)), torch.from_numpy(spread.astype(np.float32))

    def train_dataloader(self) -> DataLoader[Batch] | StreamedBatches:
        """Shuffled batches of all training sections together, each nucleus in one of its views."""
        sets = _permuted(self.train_sets, self.seed) if self.permute else self.train_sets
        n, share = sum(map(len, sets)), self._agreed_share()
        if self.batch_size < share.smallest():
            raise ParameterError(
                "data", "batch_size", f"{self.batch_size} is too small for {share.processes} processes, which share it"
            )
        if self.streams:
            return self._streamed(sets, self.seed)
        views = 1 + len(sets[0].views)
        return self._loader(sets, ShuffledBatches(n, self.batch_size, self.seed, self.first_epoch, share, views=views))

    def val_dataloader(self) -> list[DataLoader[Batch]] | list[StreamedBatches]:
        """One loader per validation section: figures are computed per section, never pooled."""
        if self.streams:
            return [self._streamed([nuclei], None) for nuclei in self.val_sets]
        share = self._share()
        return [self._loader([nuclei], OrderedBatches(len(nuclei), self.batch_size, share)) for nuclei in self.val_sets]

    def _streamed(self, sets: Sequence[NucleusSet], seed: int | None) -> StreamedBatches:
        sizes, first = [len(nuclei) for nuclei in sets], self.first_epoch
        views = 1 + len(sets[0].views)
        order = Buffers(sizes, self.batch_size, self.streaming, seed, first, self._share(), views=views)
        return StreamedBatches(sets, order, num_workers=self.num_workers, seed=self.seed)

    def _agreed_share(self) -> Share:
        """The share of this process, if all processes decided alike where nuclei are, which gives their order."""
        share = self._share()
        if share.processes > 1 and self.trainer is not None:
            strategy = self.trainer.strategy
            streaming = strategy.reduce(torch.tensor(float(self.streams), device=strategy.root_device), reduce_op="sum")
            if float(streaming) not in (0.0, float(share.processes)):
                raise ParameterError("data", "memory", "auto chose differently in the processes; use whole or stream")
        return share

    def _share(self) -> Share:
        return Share() if self.trainer is None else Share(self.trainer.global_rank, self.trainer.world_size)

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
    row = _with_features(counts, prepared)
    cell_id = counts.obs_names.to_numpy(dtype=object)[row]
    read = InputReader(
        prepared.features, use, lambda: load_nuclei(prepared.nuclei), prepared.section.mpp, prepared.context
    )
    aligned = panel.align(counts)
    nuclei = _nuclei(prepared, counts, row, read(cell_id), aligned if len(row) == counts.n_obs else aligned[row])
    nuclei = replace(nuclei, views=tuple(read.of(*stores)(cell_id) for stores in prepared.views))
    return _Loaded(nuclei, row, _positions(prepared, counts), read.widths, is_artefact(counts.obs)[row])


def _stored_section(prepared: PreparedSection, panel: Panel, use: Sequence[str], *, bins: bool) -> _Loaded:
    """The same with features and counts on disk."""
    import anndata as ad

    inputs = write_inputs(prepared.counts.parent, prepared, panel, with_shape=not bins)
    features, widths = section_features(prepared, inputs, use)
    views = [section_features(prepared.seen(stores), inputs, use)[0] for stores in prepared.views]
    measured = section_counts(inputs, len(panel.genes))
    counts = ad.read_h5ad(prepared.counts, backed="r")
    try:
        row = _with_features(counts, prepared)
        nuclei = _nuclei(prepared, counts, row, features.take(row), measured.take(row))
        compact = replace(
            nuclei,
            cell_id=nuclei.cell_id.astype(np.dtypes.StringDType()),
            views=tuple(view.take(row) for view in views),
        )
        return _Loaded(compact, row, _positions(prepared, counts), widths, is_artefact(counts.obs)[row])
    finally:
        counts.file.close()


def _with_features(counts: AnnData, prepared: PreparedSection) -> NDArray[np.intp]:
    """Rows of the counts whose nuclei have features."""
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
            "%s: %d %s have no features and are left out",
            *(prepared.section.name, counts.n_obs - len(row), unit_name(counts.obs_names)),
        )
    return row


def _positions(prepared: PreparedSection, counts: AnnData) -> NDArray[np.float64]:
    xy_um: NDArray[np.float64] = np.asarray(counts.obsm["spatial"], dtype=np.float64) * prepared.section.mpp
    return xy_um


def _nuclei(
    prepared: PreparedSection, counts: AnnData, row: NDArray[np.intp], features: Any, aligned: Any
) -> NucleusSet:
    """Some nuclei of a section, with their features and their counts of the panel's genes."""
    return NucleusSet(
        section=prepared.section.name,
        cell_id=counts.obs_names.to_numpy(dtype=object)[row],
        xy_um=_positions(prepared, counts)[row],
        features=features,
        counts=aligned,
        total_counts=counts.obs["total_counts"].to_numpy(dtype=np.int64)[row],
        area_um2=counts.obs["area_um2"].to_numpy(dtype=np.float64)[row],
        exposure=counts.obs["exposure"].to_numpy(dtype=np.float32)[row] if "exposure" in counts.obs else None,
    )


def _matched(whole: dict[str, _Loaded], train: Sequence[str]) -> tuple[SlideScale, dict[str, SlideMoments]]:
    """Match the features of each section, in place, to the mean and spread of the training sections.

    Returns these, and the mean and spread of each section that was matched.
    """
    reference, slides = SlideScale.fit([whole[name].nuclei for name in train]), {}
    for name, loaded in whole.items():
        features = loaded.nuclei.features
        if len(features) < FEWEST:
            logger.warning(
                "%s: %d nuclei are too few to know the mean and spread of the slide; its features stay as they are",
                name,
                len(features),
            )
            continue
        # a view is matched as another slide would be
        (own, slides[name]), *views = (_matched_features(each, reference) for each in (features, *loaded.nuclei.views))
        matched = replace(loaded.nuclei, features=own, views=tuple(view for view, _ in views))
        whole[name] = loaded._replace(nuclei=matched)
    return reference, slides


def _matched_features(features: Any, reference: SlideScale) -> tuple[Any, SlideMoments]:
    """The features of a slide matched to the reference, in place if they are in memory, and the slide's own moments."""
    slide = reference.moments([features])
    if isinstance(features, StoredFeatures):
        return replace(features, scale=reference, slide=slide), slide
    return reference.match(features, slide), slide


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
