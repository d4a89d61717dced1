"""Run a command through Hydra."""

from __future__ import annotations

import functools
import importlib
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode

from prts.cli.check import check
from prts.cli.config import config_dir
from prts.cli.exit_status import input_error
from prts.cli.hydra_errors import explained
from prts.cli.overrides import MULTIRUN, search_path
from prts.cli.run_folder import RunFolder, remove_bare_run, remove_bare_sweep
from prts.errors import InputError, full_disk

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from prts.cohort.cohort import Cohort


def launch(command: str, overrides: Sequence[str], flags: Sequence[str], folders: Sequence[Path]) -> int:
    """Run a command under Hydra; a multirun of `train` ends with its summary, even if jobs failed.

    Parameters
    ----------
    command
        One of `prts.cli.schema.SCHEMAS`.
    overrides
        In Hydra's grammar.
    flags
        Hydra's.
    folders
        The user's folders of config groups.

    Returns
    -------
    The exit status.
    """
    cohort: Cohort | None = None
    if command == "predict" and any(flag in flags for flag in MULTIRUN):
        from prts.cli.cohort import plan_multirun

        cohort, overrides = plan_multirun(overrides, folders)
    main: Any = importlib.import_module(f"prts.cli.{command}").main
    refused: list[InputError] = []

    @functools.wraps(main)
    def task(cfg: DictConfig) -> Any:
        multirun = HydraConfig.get().mode is RunMode.MULTIRUN
        if multirun and command == "train":
            from prts.cli.jobs import run_job  # imports pandas, which is not needed to print a config

            return run_job(command, cfg)
        if multirun and cfg.get("slides") is not None:
            from prts.cli.jobs import run_worker

            return run_worker(command, cfg)
        try:
            check(command, cfg)
            return main(cfg)
        except Exception as error:
            known = input_error(error)
            if known is None or multirun:
                raise
            refused.append(known)  # Hydra would print its own line before ours
            if command == "train":
                remove_bare_run()

    start = hydra.main(version_base="1.3", config_path=str(config_dir()), config_name=command)(task)
    # unless other processes of a DDP job inherit them
    search = [] if any(each.startswith("hydra.searchpath=") for each in overrides) else search_path(folders)
    # the module's own file: Lightning starts the other processes of a DDP job as `python <argv[0]> <overrides>`
    script = str(sys.modules[main.__module__].__file__)
    RunFolder.forget()
    status = 0
    try:
        with _arguments([script, *overrides, *search, *flags]):
            start()
    except Exception as error:
        _refuse_full_disk(error)
        cause = explained(error, command, overrides, folders)
        if cause is error:
            raise
        raise cause from error
    finally:
        if RunFolder.sweep is not None and not remove_bare_sweep():
            from prts.cli.jobs import summarize

            status = summarize(RunFolder.sweep)
        if cohort is not None:
            from prts.cli.cohort import conclude

            status = conclude(cohort, workers=True)
    if refused:
        raise refused[0]
    return status


@contextmanager
def _arguments(argv: list[str]) -> Iterator[None]:
    """Set `sys.argv`, the only way to give `hydra.main` its arguments; Lightning reads it, too."""
    saved, sys.argv = sys.argv, argv
    try:
        yield
    finally:
        sys.argv = saved


def _refuse_full_disk(error: Exception) -> None:
    """Raise an InputError if the disk was full when Hydra made the run folder."""
    full = full_disk(error)
    if RunFolder.run is not None and full is not None and input_error(error) is None:
        remove_bare_run()
        raise InputError(f"{RunFolder.run}: {full}") from error
