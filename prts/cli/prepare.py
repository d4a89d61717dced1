"""Segment, count, choose genes and compute features for every section of a tissue.

usage: prts prepare [-m] tissue=NAME [units=nuclei|bins] [bin_um=8] [segmentation=...] [encoder=...] [panel=...]
                    [preprocess.register=true] [counts.expand_um=8] [skip_bad=true] [section=NAME]

Writes everything that training needs to the cache (paths.cache_dir). Steps that are up to date are skipped, a killed run resumes where it
stopped, and parallel runs can share a cache. `prts train` runs this step automatically. The shift between bins and nuclei is measured in
every section; `preprocess.register=true` corrects it. All sections are opened first, and those that cannot be used are named together;
`skip_bad=true` leaves them out. With -m, each section is a job of Hydra's launcher, and the gene panel is chosen when all are done;
`section=NAME` prepares one section, without the panel.

example: prts prepare tissue=her2st encoder=vit256 encoder.weights=vit256_small_dino.pth
example: prts prepare -m tissue=lung hydra/launcher=submitit_slurm hydra.launcher.cpus_per_task=8
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prts.cli.app import plain
from prts.errors import ParameterError

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from prts.api.training_plan import Prepare
    from prts.data.prepare import PreparedTissue, PrepareSettings
    from prts.data.tissue import Tissue
    from prts.segmentation.segment import Segmenter
    from prts.stopwatch import Stopwatch

logger = logging.getLogger(__name__)


def preparation(cfg: DictConfig) -> tuple[Prepare, PrepareSettings]:
    """A function that prepares the sections of a config, skipping finished steps, and its settings.

    Raises
    ------
    InputError
        If the tissue config is wrong, or a segmenter, panel or encoder refuses its settings.
    """
    from prts.data.prepare import prepare_tissue

    tissue, own = tissue_settings(cfg)

    def prepare(stopwatch: Stopwatch, settings: PrepareSettings | None = None) -> PreparedTissue:
        return prepare_tissue(tissue, settings or own, stopwatch)

    return prepare, own


def tissue_settings(cfg: DictConfig) -> tuple[Tissue, PrepareSettings]:
    """The sections of a config and how they are prepared."""
    from hydra.utils import instantiate

    from prts.data.prepare import PrepareSettings
    from prts.data.tissue import parse_tissue
    from prts.features.encoders import encoders
    from prts.features.feature_reader import STORED
    from prts.features.no_encoder import needed_encoder
    from prts.platforms.bin_owners import CountSettings
    from prts.preprocess.counts import QCSettings

    segmenter, prefer_given = chosen_segmenter(plain(with_units(cfg).segmentation))
    encoder = plain(cfg.encoder)
    augment = encoder.pop("augment", 0)
    use = plain(cfg.data)["use"] if "data" in cfg else STORED
    counts = plain(cfg.counts)
    exposure = counts.pop("exposure")
    settings = PrepareSettings(
        segmenter=segmenter,
        prefer_given=prefer_given,
        qc=QCSettings(**plain(cfg.qc)),
        counting=CountSettings(**counts, seed=cfg.get("seed", 0)),
        exposure=exposure,
        **plain(cfg.preprocess),
        splitter=instantiate(cfg.split),
        panel=instantiate(cfg.panel),
        encoder=needed_encoder(encoders.build(encoder), use),
        augment=augment,
        seed=cfg.get("seed", 0),
        use=use,
        cache_dir=Path(cfg.paths.cache_dir),
        check_image=cfg.check_image,
        max_pixels=cfg.max_pixels,
        skip_bad=cfg.skip_bad,
    )
    return parse_tissue(plain(cfg.tissue)), settings


def with_units(cfg: DictConfig) -> DictConfig:
    """The config with bins in place of a segmentation, if they are the units: a tissue may name a segmenter of its own.

    Raises
    ------
    ParameterError
        If the segmentation is bins but the units are nuclei, or a segmentation or a way to count was asked
        for and the units are bins.
    """
    from prts.segmentation.bins import Bins

    if cfg.units == "bins":
        if any(given.startswith("segmentation") for given in _overrides()):
            raise ParameterError(
                "", "segmentation", "has no effect on bins, which are not segmented; omit it, or use units=nuclei"
            )
        if any(given.startswith("counts.") for given in _overrides()):
            raise ParameterError(
                "", "counts", "has no effect on bins, which keep their counts; omit it, or use units=nuclei"
            )
        cfg = cfg.copy()
        cfg.segmentation = {"name": Bins.name, "prefer_given": False, "bin_um": cfg.bin_um}
    elif cfg.segmentation.name == Bins.name:
        raise ParameterError(
            "", "segmentation", "bins are chosen with units=bins, which sets their quality control, too"
        )
    return cfg


def _overrides() -> list[str]:
    """What was given on the command line."""
    from hydra.core.hydra_config import HydraConfig

    return list(HydraConfig.get().overrides.task) if HydraConfig.initialized() else []


def chosen_segmenter(node: dict[str, Any]) -> tuple[Segmenter, bool]:
    """The segmenter of a plain `segmentation` node, and whether a section's own nuclei are preferred."""
    from prts.segmentation import segmenters

    prefer_given = bool(node.pop("prefer_given"))
    return segmenters.build(node), prefer_given


def main(cfg: DictConfig) -> None:
    """Prepare every section of a tissue, or one."""
    from prts.data.prepare import prepare_section
    from prts.io.cache import reading
    from prts.stopwatch import Stopwatch

    stopwatch = Stopwatch()
    if cfg.section is not None:
        tissue, settings = tissue_settings(cfg)
        with reading(settings.cache_dir):
            prepare_section(tissue, cfg.section, settings, stopwatch)
        _log_seconds(stopwatch)
        _write_job_result(cfg.section, stopwatch)
        return
    prepare, settings = preparation(cfg)
    with reading(settings.cache_dir):
        prepared = prepare(stopwatch)
    _log_seconds(stopwatch)
    logger.info("%s is prepared: %s", prepared.name, prepared.panel.parent)


def _log_seconds(stopwatch: Stopwatch) -> None:
    for stage, seconds in stopwatch.seconds.items():
        logger.info("%-10s%8.1f s", stage, seconds)


def _write_job_result(section: str, stopwatch: Stopwatch) -> None:
    """In a multirun, what marks the job as done."""
    import json

    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode

    from prts.io.cache import atomic
    from prts.report.jobs import RESULTS

    if not HydraConfig.initialized() or HydraConfig.get().mode is not RunMode.MULTIRUN:
        return
    with atomic(Path(HydraConfig.get().runtime.output_dir) / RESULTS["prepare"]) as path:
        path.write_text(json.dumps({"section": section, "seconds": dict(stopwatch.seconds)}) + "\n", encoding="utf-8")
