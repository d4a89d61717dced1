"""`prts predict slides=`: one worker, or a multirun of workers, and what is said at the end.

A multirun starts workers and nothing else: which worker takes which slide is decided by the workers (`prts.cohort`).
"""

from __future__ import annotations

import logging
import math
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from prts.cli.app import plain
from prts.cli.check import check
from prts.cli.config import compose
from prts.cli.exit_status import TERMINATED
from prts.cli.overrides import quoted
from prts.cli.scheduler import warn_without_accounting
from prts.errors import ParameterError
from prts.extras import install_command, missing_modules

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from prts.cohort.cohort import Cohort

logger = logging.getLogger(__name__)

WORKERS = "workers"  # folder of a multirun's workers, with their logs, in the cohort folder


def predict_slides(cfg: DictConfig) -> None:
    """Work on a cohort; a worker of a multirun leaves the summary to the command that started it.

    Raises
    ------
    SystemExit
        With status 2 if some inputs were wrong, or 1 if a slide crashed.
    """
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode

    from prts.api.predict import EncoderRuntime
    from prts.cohort.worker import Worker

    cohort = cohort_of(cfg)
    worker = Worker(cohort, EncoderRuntime(**plain(cfg.encoder)), cfg.paths.cache_dir)
    # so that slides in hand are given up at once: SLURM sends the one at the end, and the other before a time limit
    numbers = [getattr(signal, name) for name in ("SIGTERM", "SIGUSR2") if hasattr(signal, name)]
    before = {number: signal.signal(number, _terminate) for number in numbers}
    try:
        worker.run(cfg.slides_per_job)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if not (HydraConfig.initialized() and HydraConfig.get().mode is RunMode.MULTIRUN):
        status = conclude(cohort, partial=cfg.slides_per_job is not None)
        if status:
            raise SystemExit(status)


def cohort_of(cfg: DictConfig) -> Cohort:
    """The cohort of a config, checked."""
    from prts.cli.predict import nuclei_source, slide_settings
    from prts.cohort.cohort import open_cohort
    from prts.models.bundle import load_bundle

    given = plain(cfg)
    if given["image"] is not None:
        raise ParameterError("", "image", "and slides are mutually exclusive; omit one of them")
    if given["nuclei"] is not None:
        raise ParameterError(
            "", "nuclei", "belong to one slide; name those of each in a CSV with the columns image,nuclei"
        )
    page = given["page"]
    if page is None and (missing := missing_modules("report")):
        logger.warning("no pages: %s not installed; run %s", ", ".join(missing), install_command("report"))
        page = False
    bundle = load_bundle(given["bundle"])
    return open_cohort(
        given["slides"],
        given["out"],
        bundle,
        patterns=given["patterns"],
        nuclei=nuclei_source(given, bundle),
        settings=slide_settings(given),
        page=page is not False,
    )


def conclude(cohort: Cohort, *, workers: bool = False, partial: bool = False) -> int:
    """Write the summary, name the slides without a prediction, and return the exit status.

    Parameters
    ----------
    cohort
        The cohort.
    workers
        Whether it was a multirun, whose workers may have ended early.
    partial
        Whether only some slides were wanted, so that it is no error if others are left.
    """
    from prts.cohort.summary import summarise

    table = summarise(cohort.folder, cohort.slides)
    for row in table[table["status"].isin(("wrong input", "failed"))].itertuples():
        sys.stderr.write(f"prts: {row.slide}: {row.status}: {row.error}\n")
    counts = table["status"].value_counts()
    left = int(table["status"].isin(("unfinished", "waiting")).sum())
    errors = [path.read_text(encoding="utf-8").partition("\n")[0] for path in _errors(cohort)] if workers else []
    for error in dict.fromkeys(errors):
        n = errors.count(error)
        sys.stderr.write(f"prts: {n} worker{'' if n == 1 else 's'} ended early: {error}\n")
    said = f"{counts.get('done', 0)} of {len(table)} slides done"
    if "running" in counts:
        said += f", {counts['running']} in the hands of other workers"
    if left:
        said += f", {left} left (run the same command again to predict them)"
    sys.stderr.write(f"prts: {said}: {cohort.folder / 'summary.html'}\n")
    refused = left > 0 and bool(errors) and all(error.startswith("wrong input") for error in errors)
    if "failed" in counts or (left and not (partial or refused)):
        return 1
    return 2 if refused or "wrong input" in counts else 0


def _errors(cohort: Cohort) -> list[Path]:
    """Why workers of a multirun ended early."""
    return sorted((cohort.folder / WORKERS).glob("*/error.txt"))


def _terminate(number: int, frame: Any) -> NoReturn:
    raise SystemExit(TERMINATED)


def plan_multirun(overrides: Sequence[str], folders: Sequence[Path]) -> tuple[Cohort | None, list[str]]:
    """The cohort of a multirun of `prts predict`, checked before its workers start, and the overrides to run.

    Parameters
    ----------
    overrides
        In Hydra's grammar.
    folders
        The user's folders of config groups.

    Returns
    -------
    None for a multirun over single slides.

    Raises
    ------
    InputError
        If workers would differ in more than their number, or something in the cohort's config is wrong.
    """
    from hydra.core.override_parser.overrides_parser import OverridesParser

    parsed = list(zip(overrides, OverridesParser.create().parse_overrides(list(overrides)), strict=True))
    keys = {str(each.key_or_group) for _, each in parsed}
    choices = {
        str(each.key_or_group): list(each.sweep_string_iterator()) for _, each in parsed if each.is_sweep_override()
    }
    varied = [key for key, values in choices.items() if len(values) > 1 and not key.startswith("hydra.")]
    others = [key for key in varied if key not in ("out", "worker")]
    if "slides" not in keys:
        return None, list(overrides)
    if "hydra.sweep.dir" in keys:
        raise ParameterError("", "hydra.sweep.dir", f"is the folder {WORKERS} in `out` for many slides; omit it")
    if others or "out" in varied:
        key = [*others, "out"][0]
        raise ParameterError(
            "", key, "has several values, and all workers of a cohort need the same; run one command for each value"
        )
    first = [
        f"{each.key_or_group}={choices[each.key_or_group][0]}" if each.is_sweep_override() else text
        for text, each in parsed
    ]
    cfg = compose("predict", first, folders)
    check("predict", cfg)
    cohort = cohort_of(cfg)
    for error in _errors(cohort):  # of an earlier run
        error.unlink()
    if "hydra/launcher=submitit_slurm" in overrides:
        warn_without_accounting()
    added = [f"hydra.sweep.dir={quoted(str(cohort.folder / WORKERS))}"]
    if cohort.bundle.origin is not None:  # one commit for all workers, which may have no network
        added.append(f"bundle={quoted(cohort.bundle.origin)}")
    if "worker" not in keys and cfg.slides_per_job is not None:
        added.append(f"worker=range({math.ceil(len(cohort.slides) / cfg.slides_per_job)})")
    return cohort, [*overrides, *added]
