"""Prepare if needed, fit, choose output rule and threshold on validation, test beside the baselines.

usage: prts train [tissue=demo|her2st|brain|lung|breast] [ablation=full|local_only|global_only] [encoder=...] [seed=0]

Makes a run folder outputs/<tissue>/<date>_<time>/ with metrics.json, per_gene.csv, predictions.h5ad (first test section; further
ones in predictions-<section>.h5ad), figures/, report.html (`report=false` leaves it out), the model bundle model/, config.yaml and
train.log. `tissue=demo`, the default, simulates its sections: no download.

A run that was killed goes on with resume=true and its folder, and ends with the weights it would have had.

example: prts train tissue=lung encoder.weights=vit256_small_dino.pth
example: prts train tissue=lung encoder.weights=vit256_small_dino.pth hydra.run.dir=outputs/lung/2026-11-22_09-30-00 resume=true
example: prts train -m tissue=demo ablation=full,local_only,global_only seed=1,2,3
"""

from __future__ import annotations

import inspect
import json
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prts.cli.app import plain
from prts.cli.prepare import preparation
from prts.errors import InputError

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from prts.data.datamodule import PRTSDataModule
    from prts.models.fit import Recipe
    from prts.models.likelihoods import Likelihood
    from prts.report.loggers import RunLoggers
    from prts.stopwatch import Stopwatch

logger = logging.getLogger(__name__)

# Settings that may change when a run is resumed, since the weights do not depend on them.
FREE = ("resume", "paths", "logger", "max_pixels", "check_image", "report")
# What the training module logs for a callback to watch.
MONITORED = ("val/loss", "val/reg", "val/bin", "val/pcc", "train/loss", "train/reg", "train/bin")


def train(cfg: DictConfig, folder: Path) -> dict[str, Any]:
    """Run one training from preparation to test.

    Parameters
    ----------
    cfg
        A composed `train` config.
    folder
        The run folder; made if needed.

    Returns
    -------
    `metrics` (as in metrics.json), and the objects `bundle` and `datamodule`.

    Raises
    ------
    InputError
        If data or config are wrong.
    """
    from prts.io.cache import filling, reading
    from prts.report.loggers import RunLoggers

    with reading(Path(cfg.paths.cache_dir)), filling(folder), RunLoggers(cfg, folder) as loggers:
        return _train(cfg, folder, loggers)


def _train(cfg: DictConfig, folder: Path, loggers: RunLoggers) -> dict[str, Any]:
    from omegaconf import OmegaConf

    from prts.evaluation.against_baselines import baselines_by_section, compare_with_baselines
    from prts.evaluation.gene_sets import gene_sets
    from prts.evaluation.intervals import marginal_bounds, score_intervals
    from prts.evaluation.predictable import predictable, validated_genes
    from prts.evaluation.registration import registration_figures
    from prts.evaluation.scored_section import Scoring, score_sections
    from prts.evaluation.settings import EvaluationSettings
    from prts.evaluation.summaries import json_ready, mean_per_gene, unpooled_mean
    from prts.io.cache import atomic
    from prts.models.bundle import load_bundle, save_bundle
    from prts.models.checkpoint import NAME, EpochCheckpoint, cache_files, find_checkpoint
    from prts.models.fit import fit
    from prts.models.metadata import bundle_metadata
    from prts.models.module import seed_everything
    from prts.models.ood import MahalanobisOOD
    from prts.models.output import choose_output
    from prts.models.predictor import Predictor
    from prts.models.uncertainty import calibrate_intervals
    from prts.stopwatch import Stopwatch, peak_rss_mb

    seed_everything(cfg.seed)
    cfg = _settled(cfg)
    watch = Stopwatch()
    recipe = make_recipe(cfg)
    datamodule = _data(cfg, watch)
    identity = {key: value for key, value in plain(cfg).items() if key not in FREE} | {"cache": cache_files(datamodule)}
    checkpoint = EpochCheckpoint(folder / NAME, identity)
    resume_from = find_checkpoint(folder, identity) if cfg.resume else None
    folder.mkdir(parents=True, exist_ok=True)
    if resume_from is None:
        checkpoint.remove()
    for stale in (
        folder / "metrics.json",
        folder / "per_gene.csv",
        *folder.glob("predictions*"),
        *folder.glob("report*.html"),
    ):
        stale.unlink(
            missing_ok=True
        )  # of an earlier run into the same folder: they would stand beside this run's config
    with atomic(folder / "config.yaml") as path:
        OmegaConf.save(cfg, path, resolve=True)

    with watch("train"):
        fitted = fit(recipe, datamodule, start_loggers=loggers.start, checkpoint=checkpoint, resume_from=resume_from)
    if not fitted.is_global_zero:
        return {"metrics": {}}  # the other processes of a DDP job end here: one tests and writes
    net, likelihood = fitted.net, fitted.likelihood
    rule = choose_output(net, likelihood, datamodule.val_sets, fitted.output)
    genes = list(zip(datamodule.panel.genes, datamodule.panel.gene_ids, strict=True))
    parts: dict[str, Any] = {"net": net, "likelihood": likelihood, "rule": rule, "genes": genes}
    sets = gene_sets(datamodule.train_sets, datamodule.panel, cfg.tissue.get("markers") or [])
    scoring = Scoring(datamodule.panel, sets, EvaluationSettings(**cfg.evaluation))
    predictor = Predictor(net, likelihood, rule)
    validation = score_sections(predictor, datamodule.val_sets, datamodule, scoring, watch)
    with watch("baselines"):
        baselines = baselines_by_section(datamodule, seed=cfg.seed)
        beyond = validated_genes([baselines(part.nuclei.section) for part in validation], validation, scoring.settings)
    intervals = calibrate_intervals([part.umi for part in validation], datamodule.val_sets)
    parts["ood"] = MahalanobisOOD.fit(datamodule.train_sets, datamodule.val_sets)
    metadata = bundle_metadata(plain(cfg), datamodule, validation, beyond, intervals)
    save_bundle(folder / "model", **parts, metadata=metadata)
    # read back: what is tested is what is shipped
    bundle = load_bundle(folder / "model")
    test = score_sections(bundle, datamodule.test_sets, datamodule, scoring, watch)
    marginal = marginal_bounds(datamodule.val_sets)
    test = [score_intervals(part, intervals, marginal) for part in test]
    metrics: dict[str, float | str] = {}
    metrics |= unpooled_mean({scored.nuclei.section: scored.result.summary for scored in validation}, "val")
    metrics |= unpooled_mean({scored.nuclei.section: scored.result.summary for scored in test}, "test")
    with watch("baselines"):
        flagged = predictable(beyond)
        metrics |= compare_with_baselines(baselines, test, scoring, flagged)
    metrics |= registration_figures(datamodule.tissue, moved_back=cfg.preprocess.register)
    if datamodule.split_report["warning"] is not None:
        metrics["warning/split"] = datamodule.split_report["warning"]
    with atomic(folder / "per_gene.csv") as path:
        mean_per_gene([scored.result.per_gene for scored in test]).to_csv(path, index=False)
    with watch("write"):
        from prts.report.results import write_pages, write_predictions  # plotting takes seconds to import

        write_predictions(datamodule, bundle, test, folder, fitted.best_epoch)
    metrics |= {f"seconds/{stage}": seconds for stage, seconds in watch.seconds.items()}
    metrics["peak_rss_mb"] = peak_rss_mb()
    with atomic(folder / "metrics.json") as path:
        path.write_text(json.dumps(json_ready(metrics), indent=1, allow_nan=False) + "\n", encoding="utf-8")
    checkpoint.remove()
    loggers.results(metrics)
    _log_summary(metrics)
    if cfg.report:
        write_pages(bundle, test, metrics, folder)
    return {"metrics": metrics, "bundle": bundle, "datamodule": datamodule}


def make_recipe(cfg: DictConfig) -> Recipe:
    """The recipe of a settled config."""
    from hydra.utils import instantiate

    from prts.models.fit import Recipe
    from prts.models.output import OutputSettings

    return Recipe(
        network=instantiate(cfg.model.net),
        likelihood=_likelihood(cfg),
        optimizer=instantiate(cfg.model.optimizer),
        trainer=instantiate(cfg.trainer, _partial_=True),
        scheduler=instantiate(cfg.model.scheduler),
        callbacks=[instantiate(node) for node in cfg.callbacks.values()],
        output=OutputSettings(**plain(cfg.model.output)),
        baseline=cfg.model.baseline,
        seed=cfg.seed,
    )


def _likelihood(cfg: DictConfig) -> Likelihood:
    from prts.models.likelihoods import likelihoods

    settings = plain(cfg.loss)
    target = "auto" if cfg.model.baseline else cfg.data.target
    return likelihoods[settings.pop("name")](**settings).with_target(target)


def _settled(cfg: DictConfig) -> DictConfig:
    """The config with each `auto` of target and precision replaced, after refusing what makes no sense together, before any work."""
    from hydra.errors import InstantiationException
    from hydra.utils import get_class, instantiate

    from prts.evaluation.settings import EvaluationSettings
    from prts.models.linear import LIKELIHOOD
    from prts.precision import training_precision

    kind = get_class(cfg.encoder._target_)
    known = inspect.signature(kind).parameters
    for key in cfg.encoder:
        if key != "_target_" and key not in known:
            raise InputError(
                f"encoder.{key}: {kind.__name__} has no such setting (it has {', '.join(known)}); an ablation that sets it does not "
                f"apply to this encoder"
            )
    EvaluationSettings(**cfg.evaluation)
    cfg, precision = cfg.copy(), cfg.trainer.precision
    if precision == "auto":
        cfg.trainer.precision = "32-true"  # until Lightning has found the device
    try:
        for node in cfg.callbacks.values():
            instantiate(node)
        trainer = instantiate(cfg.trainer, logger=False)
    except InstantiationException as error:
        raise InputError(f"{error.__cause__ or error}; `prts train --cfg job` shows the settings") from error
    for name, node in cfg.callbacks.items():
        if "monitor" in node and node.monitor not in MONITORED:
            raise InputError(f"callbacks.{name}.monitor: {node.monitor} is not logged ({', '.join(MONITORED)} are)")
    cfg.trainer.precision = training_precision(precision, trainer.strategy.root_device)
    if cfg.model.baseline:
        cfg.data.target, cfg.model.output.gate = LIKELIHOOD.target, "none"
        if cfg.model.baseline == "morphology":
            cfg.data.use = ["morphology"]
    else:
        cfg.data.target = _likelihood(cfg).target
    return cfg


def _data(cfg: DictConfig, watch: Stopwatch) -> PRTSDataModule:
    from hydra.utils import instantiate

    from prts.data.datamodule import PRTSDataModule

    data = {key: value for key, value in cfg.data.items() if key != "target"}  # the likelihood's
    datamodule = PRTSDataModule(preparation(cfg, watch), instantiate(cfg.split), seed=cfg.seed, **data)
    datamodule.prepare_data()
    with watch("load"):
        datamodule.setup()
    n = datamodule.split_report["n"]
    logger.info(
        "%s: %d training, %d validation, %d test nuclei (%d left out), %d genes, %d features",
        cfg.tissue.name, n["train"], n["val"], n["test"], n["left_out"], datamodule.n_genes, datamodule.in_features,
    )  # fmt: skip
    return datamodule


def _log_summary(metrics: dict[str, Any]) -> None:
    logger.info("test PCC %.3f (ceiling %.3f)", metrics["test/pcc_mean"], metrics["test/ceiling_mean"])
    share = metrics["test/predictable_precision"]
    logger.info(
        "%d genes predictable on validation, %.0f %% of them on test", metrics["test/n_predictable"], 100 * share
    )
    for key, value in metrics.items():
        if key.startswith("baseline/") and key.endswith("/pcc_mean") and key.count("/") == 2:
            logger.info("%8s %s %.3f", "", key.split("/")[1], value)


def main(cfg: DictConfig) -> float:
    """Train in Hydra's run folder; the validation PCC is what a sweep maximises."""
    from hydra.core.hydra_config import HydraConfig

    hydra = HydraConfig.get()
    if cfg.resume and not any(
        given.startswith(("hydra.run.dir=", "hydra.sweep.dir=")) for given in hydra.overrides.hydra
    ):
        raise InputError("resume=true: which run is to go on? Name its folder with hydra.run.dir=DIR")
    metrics = train(cfg, Path(hydra.runtime.output_dir))["metrics"]
    return float(metrics.get("val/pcc_mean", float("nan")))


if __name__ == "__main__":  # how Lightning starts the further processes of a DDP job
    import sys

    from prts.cli.app import run

    sys.exit(run("train", sys.argv[1:]))
