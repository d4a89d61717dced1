"""Run a command through Hydra."""

from __future__ import annotations

import functools
import importlib
import sys
import warnings
from collections import Counter
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
from prts.cli.multirun import grid, progress, say_what_runs_on, start_jobs
from prts.cli.overrides import MULTIRUN, search_path
from prts.cli.prepare_jobs import prepare_by_section
from prts.cli.run_folder import RunFolder, remove_bare_run, remove_bare_sweep
from prts.errors import InputError, full_disk

if TYPE_CHECKING:
    from omegaconf import DictConfig


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
    if set(MULTIRUN) & set(flags):
        _refuse_one_output(overrides, command)
        if command == "prepare" and _is_one_job(overrides):
            return prepare_by_section(overrides, flags, folders, launch)
    main: Any = importlib.import_module(f"prts.cli.{command}").main
    refused: list[InputError] = []
    relaunched = False  # the launcher sends the task, with this value, to its workers

    @functools.wraps(main)
    def task(cfg: DictConfig) -> Any:
        multirun = HydraConfig.get().mode is RunMode.MULTIRUN
        if multirun and (command == "train" or cfg.get("section") is not None):
            from prts.cli.jobs import run_job  # imports pandas, which is not needed to print a config

            return run_job(command, cfg, relaunched=relaunched)
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

    run = hydra.main(version_base="1.3", config_path=str(config_dir()), config_name=command)(task)
    # unless other processes of a DDP job inherit them
    search = [] if any(each.startswith("hydra.searchpath=") for each in overrides) else search_path(folders)
    # the module's own file: Lightning starts the other processes of a DDP job as `python <argv[0]> <overrides>`
    script = str(sys.modules[main.__module__].__file__)
    RunFolder.forget()

    def start(again: Sequence[str]) -> None:
        nonlocal relaunched
        relaunched = bool(again)
        with _arguments([script, *overrides, *again, *search, *flags]), warnings.catch_warnings():
            # our launcher configs are defaults for the plugins' schemas of the same name, which Hydra 1.3 merges and warns of
            warnings.filterwarnings(
                "ignore", message=r"\s*'hydra/launcher/\w+' is validated against ConfigStore schema"
            )
            run()

    status = 0
    try:
        with progress(lambda: RunFolder.sweep, lambda: RunFolder.planned):
            start_jobs(start, lambda: RunFolder.sweep)
    except KeyboardInterrupt:
        if RunFolder.sweep is not None:
            say_what_runs_on(RunFolder.sweep)
        raise
    except Exception as error:
        _refuse_full_disk(error)
        cause = explained(error, command, overrides, folders)
        if cause is error:
            raise
        raise cause from error
    finally:
        if RunFolder.sweep is not None and not remove_bare_sweep():
            from prts.cli.jobs import summarize

            status = summarize(command, RunFolder.sweep, RunFolder.planned)
    if refused:
        raise refused[0]
    return status


def _is_one_job(overrides: Sequence[str]) -> bool:
    """Whether a multirun sweeps over nothing."""
    jobs = _grid(overrides)
    return len(jobs) == 1 and not any(each.startswith("section=") for each in jobs[0])


def _grid(overrides: Sequence[str]) -> list[list[str]]:
    try:
        return grid(overrides)
    except Exception:  # noqa: BLE001  (Hydra reports what is wrong with them)
        return []


def _refuse_one_output(overrides: Sequence[str], command: str) -> None:
    """Raise an InputError if the jobs of a multirun would write the same file."""
    outs = Counter(each for job in _grid(overrides) for each in job if each.startswith("out=") and "$" not in each)
    for out, n in outs.items():
        if n > 1:
            hint = "predict a list of slides with slides=, or write" if command == "predict" else "write"
            raise InputError(f"{out}: {n} jobs would write it; {hint} out='{_numbered(out)}'")


def _numbered(out: str) -> str:
    path = Path(out.removeprefix("out=").strip("'"))
    return str(path.with_name(f"{path.stem}-${{hydra:job.num}}{path.suffix}"))


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
