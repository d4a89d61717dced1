"""Train a model, and test it next to baselines.

usage: prts train [tissue=demo|her2st|brain|lung|breast|kidney|...] [units=nuclei|bins] [bin_um=8]
                  [ablation=full|local_only|global_only] [encoder=...] [seed=0] [finetune=lora]

Prepares the sections if needed, fits the network, chooses output rule and threshold on validation, and scores the test sections.
Writes outputs/<tissue>/<date>_<time>/ with metrics.json, per_gene.csv, predictions.h5ad (further test sections in
predictions-<section>.h5ad), figures/, report.html (omitted with report=false), the model bundle model/, config.yaml and train.log.
`tissue=demo`, the default, simulates its sections and needs no download. finetune=lora first trains the encoder, a ViT, on the same
sections; its changes are part of the model.

To resume a killed run, give its folder and resume=true; it ends with the same weights as an uninterrupted run.

example: prts train tissue=lung encoder.weights=vit256_small_dino.pth
example: prts train tissue=lung encoder.weights=vit256_small_dino.pth hydra.run.dir=outputs/lung/2026-11-22_09-30-00 resume=true
example: prts train tissue=kidney experiment=bins finetune=lora
example: prts train -m tissue=demo ablation=full,local_only,global_only seed=1,2,3
"""

from __future__ import annotations

import logging
import math
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from prts.cli.app import plain
from prts.cli.prepare import preparation, with_units
from prts.errors import InputError, ParameterError
from prts.io.cache import log_size

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from prts.api.train import Run
    from prts.api.training_plan import TrainingPlan
    from prts.models.finetune import FinetuneSettings
    from prts.models.fit import Recipe
    from prts.models.likelihoods import Likelihood
    from prts.section import Section

logger = logging.getLogger(__name__)

# What the training module logs for a callback to watch.
MONITORED = ("val/loss", "val/reg", "val/bin", "val/pcc", "train/loss", "train/reg", "train/bin")


def train(cfg: DictConfig, folder: Path) -> Run:
    """Run a training run from preparation to test.

    Parameters
    ----------
    cfg
        A composed `train` config.
    folder
        The run folder; made if needed.

    Returns
    -------
    `metrics` (as in metrics.json), `bundle`, `history` and `datamodule`.

    Raises
    ------
    InputError
        If data or config are wrong.
    """
    from prts.api.train import train_run
    from prts.cli.loggers import run_loggers

    plan = training_plan(cfg)
    loggers = run_loggers(cfg, folder)
    run = train_run(plan, folder, cache_dir=cfg.paths.cache_dir, loggers=loggers, resume=cfg.resume, report=cfg.report)
    if run.bundle is not None:  # not in the other processes of a DDP job
        log_size(Path(cfg.paths.cache_dir) / cfg.tissue.name)
        logger.info("model: %s", _shown(folder / "model"))
        logger.info("to predict a slide: %s", predict_command(run, folder))
    return run


def predict_command(run: Run, folder: Path) -> str:
    """The command that predicts a section of a run, which is the pattern for any slide."""
    from prts.models.bundle import load_bundle

    tissue, roles = run.datamodule.tissue, (run.datamodule.test_sets, run.datamodule.val_sets)
    prepared = tissue.sections[next(part.section for parts in roles for part in parts)]
    section = prepared.section
    given: dict[str, object] = {"bundle": _shown(folder / "model"), "image": _shown(section.image)}
    if not _states_mpp(section):
        given["mpp"] = f"{section.mpp:.6g}"
    if load_bundle(folder / "model").metadata["segmentation"]["name"] == "given":
        given["nuclei"] = _shown(section.nuclei or prepared.nuclei)
    given["out"] = "slide.h5ad"
    return shlex.join(["prts", "predict", *(f"{key}={value}" for key, value in given.items())])


def _states_mpp(section: Section) -> bool:
    """Whether the image alone states the um/px that the section has."""
    from prts.io.slide import open_slide

    try:
        with open_slide(section.image) as slide:
            return math.isclose(slide.mpp, section.mpp, rel_tol=1e-3)
    except InputError:
        return False


def _shown(path: Path) -> Path:
    """A path as short as it can be written here."""
    path, here = path.absolute(), Path.cwd()
    return path.relative_to(here) if path.is_relative_to(here) else path


def training_plan(cfg: DictConfig) -> TrainingPlan:
    """All that a config says of a run, as objects; refused here, before any work, if it makes no sense."""
    from prts.api.plan import usable_features
    from prts.api.training_plan import DataSettings, TrainingPlan
    from prts.evaluation.settings import EvaluationSettings

    cfg = settled(with_units(cfg))
    prepare, settings = preparation(cfg)
    cfg.data.use = list(usable_features(cfg.data.use, settings.segmenter))
    data = plain(cfg.data)
    del data["target"]  # the likelihood's
    return TrainingPlan(
        prepare=prepare,
        preparation=settings,
        data=DataSettings(**{**data, "use": tuple(data["use"])}),
        recipe=_recipe(cfg),
        evaluation=EvaluationSettings(**plain(cfg.evaluation)),
        finetune=_finetune(cfg),
        markers=tuple(cfg.tissue.get("markers") or ()),
        config=plain(cfg),
    )


def _finetune(cfg: DictConfig) -> FinetuneSettings | None:
    from prts.models.finetune import FinetuneSettings

    return None if cfg.finetune is None else FinetuneSettings(**plain(cfg.finetune))


def _recipe(cfg: DictConfig) -> Recipe:
    from hydra.utils import instantiate

    from prts.models.fit import Recipe
    from prts.models.output import OutputSettings

    return Recipe(
        network=instantiate(cfg.model.net, _convert_="all"),
        likelihood=_likelihood(cfg),
        optimizer=instantiate(cfg.model.optimizer, _convert_="all"),
        trainer=instantiate(cfg.trainer, _partial_=True, _convert_="all"),
        scheduler=instantiate(cfg.model.scheduler),
        callbacks=[instantiate(node) for node in cfg.callbacks.values()],
        output=OutputSettings(**plain(cfg.model.output)),
        baseline=cfg.model.baseline,
        seed=cfg.seed,
    )


def _likelihood(cfg: DictConfig) -> Likelihood:
    from prts.models.likelihoods import likelihoods

    return likelihoods.build(plain(cfg.loss)).with_target("auto" if cfg.model.baseline else cfg.data.target)


def settled(cfg: DictConfig) -> DictConfig:
    """The config with each `auto` resolved for this machine and likelihood."""
    from hydra.utils import instantiate

    from prts.models.linear import LIKELIHOOD
    from prts.models.module import quiet_lightning
    from prts.models.slurm import own_processes
    from prts.precision import training_precision

    quiet_lightning()
    cfg, precision = cfg.copy(), cfg.trainer.precision
    if precision == "auto":
        cfg.trainer.precision = "32-true"  # until Lightning has found the device
        trainer = instantiate(cfg.trainer, _partial_=True)
        device = trainer(logger=False, **own_processes(trainer)).strategy.root_device
        cfg.trainer.precision = training_precision(precision, device)
    for name, node in cfg.callbacks.items():
        if "monitor" in node and node.monitor not in MONITORED:
            raise ParameterError(
                "", f"callbacks.{name}.monitor", f"{node.monitor!r} is not logged; choose one of {', '.join(MONITORED)}"
            )
    if cfg.model.baseline:
        cfg.data.target, cfg.model.output.gate = LIKELIHOOD.target, "none"
        if cfg.model.baseline in ("morphology", "context"):
            cfg.data.use = [cfg.model.baseline]
    else:
        cfg.data.target = _likelihood(cfg).target
    return cfg


def main(cfg: DictConfig) -> float:
    """Train in Hydra's run folder; a sweep maximizes the validation PCC."""
    from hydra.core.hydra_config import HydraConfig

    from prts.cli.processes import log_once

    log_once()
    hydra = HydraConfig.get()
    named = ("hydra.run.dir=", "hydra.sweep.dir=")
    if cfg.resume and not any(given.startswith(named) for given in hydra.overrides.hydra):
        raise InputError("resume: needs the folder of the run to resume; give it as hydra.run.dir=DIR")
    metrics = train(cfg, Path(hydra.runtime.output_dir)).metrics
    return float(metrics.get("val/pcc_mean", float("nan")))


if __name__ == "__main__":  # how Lightning starts the other processes of a DDP job
    import sys

    from prts.cli.app import run

    sys.exit(run("train", sys.argv[1:]))
