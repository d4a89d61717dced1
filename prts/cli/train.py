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
from typing import TYPE_CHECKING, Any, NamedTuple

from prts.cli.app import plain
from prts.cli.prepare import preparation
from prts.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    import numpy as np
    from numpy.typing import NDArray
    from omegaconf import DictConfig

    from prts.data.datamodule import PRTSDataModule
    from prts.data.sets import NucleusSet
    from prts.models.bundle import Bundle
    from prts.models.checkpoint import EpochCheckpoint
    from prts.models.comparison import Predict
    from prts.models.mlp import PRTSNet
    from prts.models.predictor import Predictor
    from prts.models.scoring import Scored
    from prts.models.uncertainty import CountIntervals
    from prts.report.loggers import RunLoggers
    from prts.stopwatch import Stopwatch

logger = logging.getLogger(__name__)

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
    from prts.report.loggers import RunLoggers

    with RunLoggers(cfg, folder) as loggers:
        return _train(cfg, folder, loggers)


def _train(cfg: DictConfig, folder: Path, loggers: RunLoggers) -> dict[str, Any]:
    from functools import partial

    from omegaconf import OmegaConf

    from prts.io.cache import atomic
    from prts.models.bundle import load_bundle, save_bundle
    from prts.models.checkpoint import NAME, EpochCheckpoint, find_checkpoint
    from prts.models.module import seed_everything
    from prts.models.ood import Unusual
    from prts.models.output import choose_output
    from prts.models.predictable import predictable, validated_genes
    from prts.models.predictor import Predictor
    from prts.models.scoring import gene_sets, json_ready, mean_per_gene, unpooled_mean
    from prts.models.uncertainty import calibrate_intervals, marginal_bounds, score_intervals
    from prts.stopwatch import Stopwatch, peak_rss_mb

    seed_everything(cfg.seed)
    cfg = _settled(cfg)
    watch = Stopwatch()
    datamodule = _data(cfg, watch)
    inputs = _inputs(datamodule)
    checkpoint = EpochCheckpoint(folder / NAME, inputs)
    goes_on_from = find_checkpoint(folder, plain(cfg), inputs) if cfg.resume else None
    folder.mkdir(parents=True, exist_ok=True)
    if goes_on_from is None:
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
    OmegaConf.save(cfg, folder / "config.yaml", resolve=True)

    with watch("train"):
        fit = _fit_linear if cfg.model.baseline else partial(_fit, checkpoint=checkpoint, goes_on_from=goes_on_from)
        fitted = fit(cfg, datamodule, loggers)
    if not fitted.is_global_zero:
        return {"metrics": {}}  # the other processes of a DDP job end here: one tests and writes
    net, scaler = fitted.net, datamodule.scaler
    rule = choose_output(net, scaler, datamodule.val_sets, gates=fitted.gates, **plain(cfg.model.output))
    genes = list(zip(datamodule.panel.genes, datamodule.panel.gene_ids, strict=True))
    parts: dict[str, Any] = {"net": net, "scaler": scaler, "rule": rule, "genes": genes}
    sets = gene_sets(datamodule.train_sets, datamodule.panel, cfg.tissue.get("markers") or [])
    predictor = Predictor(net, scaler, rule)
    validation = _evaluate(cfg, datamodule, predictor, datamodule.val_sets, sets, watch)
    baselines = _baselines(cfg, datamodule, watch)
    with watch("baselines"):
        beyond = validated_genes([baselines(part.nuclei.section) for part in validation], validation, cfg.evaluation)
    intervals = calibrate_intervals([part.umi for part in validation], datamodule.val_sets)
    parts["ood"] = Unusual.fit(datamodule.train_sets, datamodule.val_sets)
    save_bundle(folder / "model", **parts, metadata=_metadata(cfg, datamodule, validation, beyond, intervals))
    # read back: what is tested is what is shipped
    bundle = load_bundle(folder / "model")
    test = _evaluate(cfg, datamodule, bundle, datamodule.test_sets, sets, watch)
    marginal = marginal_bounds(datamodule.val_sets)
    test = [score_intervals(part, intervals, marginal) for part in test]
    metrics: dict[str, float | str] = {}
    metrics |= unpooled_mean({scored.nuclei.section: scored.result.summary for scored in validation}, "val")
    metrics |= unpooled_mean({scored.nuclei.section: scored.result.summary for scored in test}, "test")
    with watch("baselines"):
        metrics |= _compare(cfg, datamodule, baselines, test, sets, predictable(beyond))
    metrics |= _registration(cfg, datamodule)
    if datamodule.split_report["warning"] is not None:
        metrics["warning/split"] = datamodule.split_report["warning"]
    mean_per_gene([scored.result.per_gene for scored in test]).to_csv(folder / "per_gene.csv", index=False)
    with watch("write"):
        _write(datamodule, bundle, test, folder, fitted.best_epoch)
    metrics |= {f"seconds/{stage}": seconds for stage, seconds in watch.seconds.items()}
    metrics["peak_rss_mb"] = peak_rss_mb()
    with atomic(folder / "metrics.json") as path:
        path.write_text(json.dumps(json_ready(metrics), indent=1, allow_nan=False) + "\n", encoding="utf-8")
    checkpoint.remove()
    loggers.results(metrics)
    _log_summary(metrics)
    if cfg.report:
        _report(bundle, test, metrics, folder)
    return {"metrics": metrics, "bundle": bundle, "datamodule": datamodule}


def _settled(cfg: DictConfig) -> DictConfig:
    """The config with `data.target: auto` replaced, after refusing what makes no sense together, before any work."""
    from hydra.errors import InstantiationException
    from hydra.utils import get_class, instantiate

    from prts.metrics.evaluate import check_intervals
    from prts.models.linear import TARGET, check_linear
    from prts.models.losses import check_recipe

    for group in ("loss", "encoder"):
        kind = get_class(cfg[group]._target_)
        known = inspect.signature(kind).parameters
        for key in cfg[group]:
            if key != "_target_" and key not in known:
                raise InputError(
                    f"{group}.{key}: {kind.__name__} has no such setting (it has {', '.join(known)}); an ablation that sets it does not "
                    f"apply to this {group}"
                )
    check_intervals(cfg.evaluation.block_um, cfg.evaluation.bootstrap)
    try:
        for node in (cfg.model.optimizer, cfg.model.scheduler, *cfg.callbacks.values()):
            instantiate(node)
        instantiate(cfg.trainer, logger=False)
    except InstantiationException as error:
        raise InputError(f"{error.__cause__ or error}; `prts train --cfg job` shows the settings") from error
    for name, node in cfg.callbacks.items():
        if "monitor" in node and node.monitor not in MONITORED:
            raise InputError(f"callbacks.{name}.monitor: {node.monitor} is not logged ({', '.join(MONITORED)} are)")
    cfg = cfg.copy()
    if cfg.model.baseline:
        check_linear(cfg.model.baseline)
        cfg.data.target, cfg.model.output.gate = TARGET, "none"
        if cfg.model.baseline == "morphology":
            cfg.data.use = ["morphology"]
        return cfg
    cfg.data.target = check_recipe(
        instantiate(cfg.loss), target=cfg.data.target, heads=cfg.model.net.heads, gate=cfg.model.output.gate
    )
    return cfg


def _data(cfg: DictConfig, watch: Stopwatch) -> PRTSDataModule:
    from hydra.utils import instantiate

    from prts.data.datamodule import PRTSDataModule

    datamodule = PRTSDataModule(preparation(cfg, watch), instantiate(cfg.split), seed=cfg.seed, **cfg.data)
    datamodule.prepare_data()
    with watch("load"):
        datamodule.setup()
    n = datamodule.split_report["n"]
    logger.info(
        "%s: %d training, %d validation, %d test nuclei (%d left out), %d genes, %d features",
        cfg.tissue.name, n["train"], n["val"], n["test"], n["left_out"], datamodule.n_genes, datamodule.in_features,
    )  # fmt: skip
    return datamodule


class Fitted(NamedTuple):
    """A fitted network, the gates that its level allows, and the epoch whose weights it has (None: fitted without epochs)."""

    net: PRTSNet
    gates: tuple[str, ...]
    best_epoch: int | None
    is_global_zero: bool


def _fit_linear(cfg: DictConfig, datamodule: PRTSDataModule, loggers: RunLoggers) -> Fitted:
    from prts.models.linear import fit_linear

    loggers.start()
    net = fit_linear(cfg.model.baseline, datamodule.train_sets, datamodule.val_sets, seed=cfg.seed)
    return Fitted(net, ("none",), None, True)


def _inputs(datamodule: PRTSDataModule) -> dict[str, str]:
    """The cache files that are learnt from: their names change with what they hold."""
    tissue = datamodule.tissue
    parts = {
        f"{name}'s {kind}": getattr(section, kind)
        for name, section in tissue.sections.items()
        for kind in ("counts", "features")
    }
    return {kind: path.name for kind, path in {**parts, "the gene panel": tissue.panel}.items()}


def _fit(
    cfg: DictConfig,
    datamodule: PRTSDataModule,
    loggers: RunLoggers,
    checkpoint: EpochCheckpoint,
    goes_on_from: Path | None,
) -> Fitted:
    from hydra.utils import instantiate

    from prts.models.module import KeepBest, PRTSModule

    net = instantiate(cfg.model.net)(in_features=datamodule.in_features, n_genes=datamodule.n_genes)
    if net.standardize:
        net.set_input_scaling(*datamodule.feature_moments())
    if datamodule.scaler.start is not None:
        net.start_at(datamodule.scaler.start)
    module = PRTSModule(
        net,
        instantiate(cfg.loss),
        datamodule.scaler,
        instantiate(cfg.model.optimizer),
        None if cfg.model.scheduler is None else instantiate(cfg.model.scheduler),
    )
    callbacks = [checkpoint, *(instantiate(node) for node in cfg.callbacks.values())]
    trainer = instantiate(cfg.trainer, callbacks=callbacks, logger=loggers.start() or False)
    if goes_on_from is not None:
        logger.info("going on from %s", goes_on_from)
    trainer.fit(module, datamodule=datamodule, ckpt_path=goes_on_from, weights_only=True)
    best_epoch = next((callback.best_epoch for callback in callbacks if isinstance(callback, KeepBest)), None)
    return Fitted(net, module.loss.gates, best_epoch, module.trainer.is_global_zero)


def _evaluate(
    cfg: DictConfig,
    datamodule: PRTSDataModule,
    model: Predictor,
    sections: Sequence[NucleusSet],
    sets: Mapping[str, NDArray[np.intp]],
    watch: Stopwatch,
) -> list[Scored]:
    from prts.io.spots import read_spots
    from prts.models.scoring import Scored, evaluate_set

    scored = []
    for nuclei in sections:
        section = datamodule.tissue.sections[nuclei.section].section
        shares = datamodule.split_report["sections"][nuclei.section]
        # a spot across the edge of a carved part would hold some of its nuclei but all of its measured UMIs
        whole = sum(n > 0 for n in shares.values()) == 1
        spots = read_spots(section.spots) if whole and section.spots is not None else None
        with watch("predict"):
            umi, prob = model.predict_all(nuclei.features)
        with watch("evaluate"):
            threshold = model.rule.threshold
            result = evaluate_set(
                nuclei, umi, prob, datamodule.panel, threshold, spots, section.mpp, cfg.evaluation, sets
            )
        scored.append(Scored(nuclei, section, spots, umi, prob, result))
    return scored


def _metadata(
    cfg: DictConfig,
    datamodule: PRTSDataModule,
    validation: Sequence[Scored],
    beyond: Mapping[str, NDArray[np.bool_]],
    intervals: CountIntervals,
) -> dict[str, Any]:
    """What model.json says beside what the network, the scaler and the output rule say of themselves."""
    import numpy as np
    from hydra.utils import instantiate

    from prts.models.predictable import predictable
    from prts.models.scoring import mean_per_gene

    encoder = instantiate(cfg.encoder).settings()
    weights = cfg.encoder.get("weights")
    per_gene = mean_per_gene([scored.result.per_gene for scored in validation])
    return {
        "encoder": encoder,
        "encoder_weights": None if weights is None else str(Path(weights).resolve()),
        "mpp": encoder["mpp"],
        "tile": encoder["tile"],
        "pooling": encoder["pooling"],
        "input": {"use": list(datamodule.use), "widths": datamodule.feature_widths},
        "baseline": cfg.model.baseline,
        "loss": None if cfg.model.baseline else plain(cfg.loss),
        "optimizer": None if cfg.model.baseline else plain(cfg.model.optimizer),
        "segmentation": _segmentation(plain(cfg.segmentation), datamodule),
        "qc": plain(cfg.qc),
        "tissue": cfg.tissue.name,
        "species": cfg.tissue.species,
        "train_sections": sorted({nuclei.section for nuclei in datamodule.train_sets}),
        "split": datamodule.split_report,
        "seed": cfg.seed,
        "stain": _colours(datamodule),
        "panel": {"method": datamodule.panel.method, **datamodule.panel.steps},
        "validation": {
            "pcc": per_gene["pcc"].tolist(),
            "ceiling": per_gene["ceiling"].tolist(),
            "predictable": predictable(beyond).tolist(),
            "beyond": {name: np.flatnonzero(flags).tolist() for name, flags in beyond.items()},
        },
        "intervals": intervals.settings(),
        "nuclei": _nuclei(datamodule),
        "provenance": _provenance(cfg, datamodule),
    }


def _registration(cfg: DictConfig, datamodule: PRTSDataModule) -> dict[str, float | str]:
    """How far the bins of each section lay off its nuclei; a warning where that was too far and is left so."""
    from prts.preprocess.register import WARN_UM

    found = {name: prepared.registration for name, prepared in datamodule.tissue.sections.items()}
    figures: dict[str, float | str] = {}
    for name, section in found.items():
        figures[f"registration/{name}/confidence"] = section.confidence
        if section.measured:
            figures[f"registration/{name}/shift_um"] = section.shift_um
            figures[f"registration/{name}/rotation_deg"] = section.rotation_deg
            figures[f"registration/{name}/displacement_um"] = section.displacement_um
    off = [name for name, section in found.items() if section.displacement_um > WARN_UM]
    if off and not cfg.preprocess.register:
        figures["warning/registration"] = (
            f"bins of {', '.join(off)} lie over {WARN_UM:g} um off the nuclei; preprocess.register=true moves them back"
        )
    return figures


def _colours(datamodule: PRTSDataModule) -> dict[str, Any]:
    """How the tissue of the training sections is stained, for every method that can match a new slide to it."""
    from contextlib import ExitStack

    from prts.preprocess.stain import sample_slides, statistics

    names = sorted({nuclei.section for nuclei in datamodule.train_sets})
    with ExitStack() as stack:
        sections = (datamodule.tissue.sections[name].section for name in names)
        return statistics(sample_slides(stack.enter_context(section.open_slide()) for section in sections))


def _provenance(cfg: DictConfig, datamodule: PRTSDataModule) -> dict[str, Any]:
    """Code, config and data that made the model; places on this machine are left out."""
    from prts import provenance
    from prts.io.cache import fingerprint

    config = {key: value for key, value in plain(cfg).items() if key not in ("paths", "logger")}
    prepared = datamodule.tissue.sections
    return {
        "code": provenance.code(),
        "config": config,
        "config_fingerprint": fingerprint(config),
        "data": {name: provenance.section_files(part.section) for name, part in prepared.items()},
    }


def _nuclei(datamodule: PRTSDataModule) -> dict[str, Any]:
    """Size and density of all nuclei of the training and validation sections, with those that fail quality control, as in `predict`."""
    from prts.io.nuclei import load_nuclei
    from prts.models.scale import describe_nuclei

    names = {part.section for part in (*datamodule.train_sets, *datamodule.val_sets)}
    prepared = {name: datamodule.tissue.sections[name] for name in sorted(names)}
    mpp = {name: part.section.mpp for name, part in prepared.items()}
    return describe_nuclei({name: load_nuclei(part.nuclei) for name, part in prepared.items()}, mpp)


def _segmentation(node: dict[str, Any], datamodule: PRTSDataModule) -> dict[str, Any]:
    """How the training nuclei were found, so that prediction finds nuclei in the same way."""
    prefer_given = node.pop("prefer_given")
    sections = {nuclei.section for nuclei in datamodule.train_sets}
    if prefer_given and any(datamodule.tissue.sections[name].section.nuclei for name in sections):
        return {"name": "given", "arguments": {}}
    return {"name": str(node.pop("_target_")).rsplit(".", 1)[-1].lower(), "arguments": node}


def _baselines(cfg: DictConfig, datamodule: PRTSDataModule, watch: Stopwatch) -> Callable[[str], dict[str, Predict]]:
    """What gives the fitted baselines of a section by its name."""
    from prts.models.comparison import fit_baselines, fit_position

    train_sets, val_sets = datamodule.train_sets, datamodule.val_sets
    with watch("baselines"):
        fitted = fit_baselines(train_sets, val_sets, datamodule.tissue, seed=cfg.seed)

    def of_section(section: str) -> dict[str, Predict]:
        position = fit_position(train_sets, val_sets, section)
        return fitted if position is None else fitted | {"position": position}

    return of_section


def _compare(
    cfg: DictConfig,
    datamodule: PRTSDataModule,
    baselines: Callable[[str], dict[str, Predict]],
    test: Sequence[Scored],
    sets: Mapping[str, NDArray[np.intp]],
    flagged: NDArray[np.bool_],
) -> dict[str, float]:
    """Figures of the baselines on the test sections, and how far the genes found predictable on validation are so there."""
    from prts.models.predictable import precision, predictable
    from prts.models.scoring import score_baselines, unpooled_mean

    beside, genes = {}, {}
    for scored in test:
        section = scored.nuclei.section
        beside[section], beyond = score_baselines(baselines(section), scored, datamodule.panel, cfg.evaluation, sets)
        genes[section] = precision(flagged, predictable(beyond))
    return unpooled_mean(beside, "baseline") | unpooled_mean(genes, "test")


def _write(
    datamodule: PRTSDataModule, bundle: Bundle, test: Sequence[Scored], folder: Path, best_epoch: int | None
) -> None:
    """Predictions and figures of every test section; the first has the plain file names, the others their section's beside it."""
    from prts.io.nuclei import load_nuclei
    from prts.models.predict import Chunk, write_prediction
    from prts.report.run import run_figures

    for i, scored in enumerate(test):
        prepared = datamodule.tissue.sections[scored.nuclei.section]
        polygons = load_nuclei(prepared.nuclei).set_index("cell_id").loc[scored.nuclei.cell_id].reset_index()
        suffix = "" if i == 0 else f"-{scored.nuclei.section}"
        ood = None if bundle.ood is None else bundle.ood.share(scored.nuclei.features)
        chunks = [Chunk(scored.umi, scored.prob, ood)]
        out = folder / f"predictions{suffix}.h5ad"
        write_prediction(out, bundle, prepared.section, polygons, chunks, store=prepared.features)
        curves = folder / "csv" / "metrics.csv"
        run_figures(
            folder / "figures",
            scored,
            datamodule.panel,
            outlines=polygons.geometry.to_numpy(),
            curves=curves,
            best_epoch=best_epoch,
            suffix=suffix,
        )


def _report(bundle: Bundle, test: Sequence[Scored], metrics: dict[str, Any], folder: Path) -> None:
    """report.html of the first test section, report-<section>.html of the others."""
    from prts.report.html import write_page
    from prts.report.sources import scored_page

    for i, scored in enumerate(test):
        suffix = "" if i == 0 else f"-{scored.nuclei.section}"
        page = scored_page(folder / f"predictions{suffix}.h5ad", scored, metrics, bundle.metadata)
        write_page(folder / f"report{suffix}.html", page)


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
