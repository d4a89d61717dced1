"""One training run: prepare, fit, choose output rule and threshold on validation, test next to the baselines, write the run folder."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import yaml

from prts.api.metadata import bundle_metadata
from prts.api.training_plan import TrainingPlan
from prts.data.datamodule import PRTSDataModule
from prts.data.stream import Streaming
from prts.evaluation.against_baselines import RunBaselines, compare_with_baselines
from prts.evaluation.gene_sets import gene_sets
from prts.evaluation.intervals import marginal_bounds, score_intervals
from prts.evaluation.per_section import SECTIONS, section_table, without_sections
from prts.evaluation.predictable import predictable, validated_genes
from prts.evaluation.registration import registration_figures
from prts.evaluation.scored_section import Scoring, score_sections
from prts.evaluation.stripes import stripe_figures
from prts.evaluation.summaries import json_ready, mean_per_gene, unpooled_mean
from prts.io.cache import atomic, filling, reading
from prts.io.unit_names import unit_name
from prts.models.bundle import Bundle, add_scores, load_bundle, save_bundle
from prts.models.checkpoint import NAME, EpochCheckpoint, cache_files, find_checkpoint
from prts.models.fit import Fitted, fit
from prts.models.module import EpochHistory, seed_everything
from prts.models.ood import MahalanobisOOD
from prts.models.output import choose_output
from prts.models.predictor import LIMIT_MULTIPLE, Predictor, highest_counts
from prts.models.uncertainty import calibrate_intervals
from prts.progress import working
from prts.stopwatch import Stopwatch, peak_rss_mb

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    import numpy as np
    import pandas as pd
    from numpy.typing import NDArray

    from prts.data.nucleus_set import NucleusSet
    from prts.evaluation.scored_section import PredictsNuclei, ScoredSection

logger = logging.getLogger(__name__)

# Settings that may differ when an interrupted run resumes: they do not change what it learns.
_IRRELEVANT = ("resume", "paths", "logger", "max_pixels", "check_image", "report")


@dataclass(frozen=True)
class Run:
    """A finished run.

    Attributes
    ----------
    metrics
        As in metrics.json; empty except in the first process of a DDP job.
    bundle
        The trained model, read back from the run folder; None in the other processes.
    history
        One row per epoch: `epoch`, `train/loss`, `val/loss`, `val/pcc`, ...
    datamodule
        The data it was trained on.
    """

    metrics: dict[str, Any]
    bundle: Bundle | None
    history: pd.DataFrame
    datamodule: PRTSDataModule


class NoLoggers:
    """Replaces `prts.report.loggers.RunLoggers` in a run without loggers."""

    def start(self) -> list[Any]:
        """No loggers for Lightning's Trainer."""
        return []

    def results(self, metrics: Mapping[str, Any]) -> None:
        """Send nothing."""


def train_run(
    plan: TrainingPlan,
    folder: Path | str,
    *,
    cache_dir: Path | str,
    loggers: AbstractContextManager[Any] | None = None,
    resume: bool = False,
    report: bool = True,
) -> Run:
    """Train a model and write its run folder.

    Parameters
    ----------
    plan
        The model to train, and its data.
    folder
        The run folder; made if needed. It gets `config.yaml`, `model/`, `metrics.json`, `per_gene.csv`, `predictions.h5ad`, `figures/`.
    cache_dir
        Folder of the cache that `plan.prepare` fills.
    loggers
        Context that opens and closes the run's loggers (`prts.report.loggers.RunLoggers`); None: no loggers.
    resume
        Continue an interrupted run in this folder.
    report
        Whether to write `report.html`.

    Returns
    -------
    Metrics, model and history.

    Raises
    ------
    InputError
        If data or settings are wrong.
    """
    from contextlib import nullcontext

    folder = Path(folder)
    with reading(Path(cache_dir)), filling(folder), loggers or nullcontext(NoLoggers()) as opened:
        seed_everything(plan.recipe.seed)
        return _Training(plan, folder, opened).run(resume=resume, report=report)


class _Training:
    """The steps of one run, in order; each uses the results of the previous one."""

    def __init__(self, plan: TrainingPlan, folder: Path, loggers: Any) -> None:
        self.plan, self.folder, self.loggers = plan, folder, loggers
        self.watch = Stopwatch()
        self.history = EpochHistory()

    def run(self, *, resume: bool, report: bool) -> Run:
        if self.plan.finetune is not None:
            from prts.api.finetune import with_trained_encoder

            with self.watch("finetune"):
                self.plan = with_trained_encoder(self.plan, self._data, self.folder)
        datamodule = self._data(self.plan)
        fitted = self._fit(datamodule, resume)
        if not fitted.is_global_zero:
            return Run({}, None, self.history.table(), datamodule)  # the first process of a DDP job tests and writes
        bundle, validation, flagged = self._ship(datamodule, fitted)
        test, metrics = self._test(datamodule, bundle, validation, flagged)
        bundle = add_scores(bundle, _scores(metrics, datamodule))
        self._write(datamodule, bundle, test, metrics, fitted.best_epoch)
        self.loggers.results(metrics)
        _log_summary(metrics)
        if report and test:
            from prts.report.results import write_pages
            from prts.report.run_index import write_index

            with working("report"):
                write_pages(bundle, test, metrics, self.folder)
            write_index(self.folder, metrics)
        return Run(metrics, bundle, self.history.table(), datamodule)

    def _data(self, plan: TrainingPlan) -> PRTSDataModule:
        """Prepare, split and load the sections."""
        datamodule = PRTSDataModule(
            lambda: plan.prepare(self.watch),
            plan.preparation.splitter,
            use=plan.data.use,
            scale=plan.data.scale,
            permute=plan.data.permute,
            batch_size=plan.data.batch_size,
            num_workers=plan.data.num_workers,
            memory=plan.data.memory,
            streaming=Streaming(plan.data.chunk, plan.data.buffer),
            seed=plan.recipe.seed,
        )
        datamodule.prepare_data()
        with self.watch("load"):
            datamodule.setup()
        n = datamodule.split_report["n"]
        logger.info(
            "%s: %d training, %d validation, %d test %s (%d left out), %d genes, %d features",
            datamodule.tissue.name, n["train"], n["val"], n["test"], unit_name(datamodule.train_sets[0].cell_id),
            n["left_out"], datamodule.n_genes, datamodule.in_features,
        )  # fmt: skip
        return datamodule

    def _fit(self, datamodule: PRTSDataModule, resume: bool) -> Fitted:
        """Fit the network, from the start or from the checkpoint of an interrupted run."""
        settings = {key: value for key, value in self.plan.config.items() if key not in _IRRELEVANT}
        identity = {**settings, "cache": cache_files(datamodule)}
        if datamodule.streams:  # in another order than in memory
            identity["streamed"] = True
        self._checkpoint = EpochCheckpoint(self.folder / NAME, identity)
        start_from = find_checkpoint(self.folder, identity) if resume else None
        self.folder.mkdir(parents=True, exist_ok=True)
        if start_from is None:
            self._checkpoint.remove()
        _remove_results(self.folder)
        with atomic(self.folder / "config.yaml") as path:
            path.write_text(
                yaml.safe_dump(dict(self.plan.config), sort_keys=False, allow_unicode=True), encoding="utf-8"
            )
        with self.watch("train"), working("training"):
            return fit(
                replace(self.plan.recipe, callbacks=[*self.plan.recipe.callbacks, self.history]),
                datamodule,
                start_loggers=self.loggers.start,
                checkpoint=self._checkpoint,
                resume_from=start_from,
            )

    def _ship(
        self, datamodule: PRTSDataModule, fitted: Fitted
    ) -> tuple[Bundle, dict[str, dict[str, float]], NDArray[np.bool_]]:
        """Choose the output rule, compute the model's metadata on validation, and write the bundle.

        Returns the bundle, the scores of each validation section (not their predictions, which are large), and the predictable genes.
        """
        plan = self.plan
        net, likelihood = fitted.net, fitted.likelihood
        rule = choose_output(net, likelihood, datamodule.val_sets, fitted.output)
        sets = gene_sets(datamodule.train_sets, datamodule.panel, plan.markers)
        self._scoring = Scoring(datamodule.panel, sets, plan.evaluation)
        limit = torch.from_numpy(highest_counts(datamodule.train_sets)) * LIMIT_MULTIPLE
        validation = self._score(Predictor(net, likelihood, rule, limit=limit), datamodule.val_sets, datamodule)
        with self.watch("baselines"), working("baselines"):
            self._baselines = RunBaselines.fit(datamodule, seed=plan.recipe.seed)
            beside = [self._baselines(part.nuclei.section) for part in validation]
            beyond = validated_genes(beside, validation, plan.evaluation)
        intervals = calibrate_intervals([part.umi for part in validation], datamodule.val_sets)
        save_bundle(
            self.folder / "model",
            net=net,
            likelihood=likelihood,
            rule=rule,
            genes=list(zip(datamodule.panel.genes, datamodule.panel.gene_ids, strict=True)),
            # a slide that had to be matched is unusual, too
            ood=MahalanobisOOD.fit(datamodule.as_read(datamodule.train_sets), datamodule.as_read(datamodule.val_sets)),
            baselines=self._baselines.shipped(),
            slide_scale=datamodule.slide_scale,
            adapter=getattr(plan.preparation.encoder, "adapter", None),
            metadata=bundle_metadata(plan, datamodule, validation, beyond, intervals),
        )
        # read back, so that the tested model is the one on disk
        scores = {part.nuclei.section: part.result.summary for part in validation}
        return load_bundle(self.folder / "model"), scores, predictable(beyond)

    def _score(
        self, model: PredictsNuclei, sections: Sequence[NucleusSet], datamodule: PRTSDataModule
    ) -> list[ScoredSection]:
        return score_sections(model, sections, datamodule, self._scoring, self.watch)

    def _test(
        self,
        datamodule: PRTSDataModule,
        bundle: Bundle,
        validation: Mapping[str, Mapping[str, float]],
        flagged: NDArray[np.bool_],
    ) -> tuple[list[ScoredSection], dict[str, Any]]:
        """Predict the test sections with the bundle, and compute all scores of the run."""
        test = self._score(bundle, datamodule.test_sets, datamodule)
        marginal = marginal_bounds(datamodule.val_sets)
        intervals = bundle.intervals
        assert intervals is not None  # `_ship` wrote them
        test = [score_intervals(part, intervals, marginal) for part in test]
        tested = {part.nuclei.section: part.result.summary for part in test}
        metrics: dict[str, Any] = unpooled_mean(validation, "val") | unpooled_mean(tested, "test")
        with self.watch("baselines"), working("baselines"):
            metrics |= compare_with_baselines(self._baselines, test, self._scoring, flagged)
        metrics |= stripe_figures(datamodule.tissue)
        metrics |= registration_figures(datamodule.tissue, moved_back=self.plan.preparation.register)
        metrics |= {f"skipped/{name}": reason for name, reason in datamodule.tissue.skipped.items()}
        if datamodule.split_report["warning"] is not None:
            metrics["warning/split"] = datamodule.split_report["warning"]
        return test, metrics

    def _write(
        self,
        datamodule: PRTSDataModule,
        bundle: Bundle,
        test: list[ScoredSection],
        metrics: dict[str, Any],
        best_epoch: int | None,
    ) -> None:
        """Write tables, predictions and figures; metrics.json comes last, because it marks a run as done."""
        if test:
            with atomic(self.folder / "per_gene.csv") as path:
                mean_per_gene([scored.result.per_gene for scored in test]).to_csv(path, index=False)
            with self.watch("write"), working("figures"):
                from prts.report.results import write_predictions  # plotting libraries take seconds to import

                write_predictions(datamodule, bundle, test, self.folder, best_epoch)
        roles = _roles(datamodule)
        with atomic(self.folder / SECTIONS) as path:
            section_table(metrics, roles).to_csv(path, index=False)
        metrics |= {f"seconds/{stage}": seconds for stage, seconds in self.watch.seconds.items()}
        metrics["peak_rss_mb"] = peak_rss_mb()
        with atomic(self.folder / "metrics.json") as path:
            flat = json_ready(without_sections(metrics, roles))
            path.write_text(json.dumps(flat, indent=1, allow_nan=False) + "\n", encoding="utf-8")
        self._checkpoint.remove()


def _roles(datamodule: PRTSDataModule) -> dict[str, list[str]]:
    """The sections of each part."""
    sets = {"train": datamodule.train_sets, "val": datamodule.val_sets, "test": datamodule.test_sets}
    return {role: [part.section for part in parts] for role, parts in sets.items()}


def _scores(metrics: Mapping[str, Any], datamodule: PRTSDataModule) -> dict[str, Any]:
    """The part of metrics.json that belongs to the model, wherever it goes: scores, but no times and nothing about the data."""
    kept = ("val/", "test/", "baseline/")
    flat = json_ready(without_sections(metrics, _roles(datamodule)))
    return {key: value for key, value in flat.items() if key.startswith(kept)}


def _remove_results(folder: Path) -> None:
    """Remove files of an earlier run in the same folder, which would not match the new config."""
    stale = (
        folder / "metrics.json",
        folder / "per_gene.csv",
        folder / SECTIONS,
        folder / "index.html",
        *folder.glob("predictions*"),
        *folder.glob("report*.html"),
    )
    for file in stale:
        file.unlink(missing_ok=True)


def _log_summary(metrics: dict[str, Any]) -> None:
    if "test/pcc_mean" not in metrics:
        logger.info("validation PCC %.3f (noise ceiling %.3f)", metrics["val/pcc_mean"], metrics["val/ceiling_mean"])
        return
    logger.info("test PCC %.3f (noise ceiling %.3f)", metrics["test/pcc_mean"], metrics["test/ceiling_mean"])
    n, share = metrics["test/n_predictable"], metrics["test/predictable_precision"]
    logger.info("%d genes predictable on validation%s", n, f", {share:.0%} of them on test" if n else "")
    for key, value in metrics.items():
        if key.startswith("baseline/") and key.endswith("/pcc_mean") and key.count("/") == 2:
            logger.info("%8s %s %.3f", "", key.split("/")[1], value)
