"""The main process of a multirun while its jobs run: progress, restarts after a lost worker, and what an interrupt leaves running."""

from __future__ import annotations

import math
import os
import shlex
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from prts.errors import InputError, chain

_RELAUNCHES = 3
_EVERY_S = 60.0
_POLL_S = 5.0
# Submitit itself sees within seconds that a job has ended; its results may take longer over a network.
_GONE_POLL_S, _GONE_POLLS = 15.0, 3


def planned_jobs(hydra: Any) -> int | None:
    """How many jobs a multirun is to have; None if its sweeper does not say.

    Parameters
    ----------
    hydra
        The `hydra` node of the config.
    """
    trials = hydra.sweeper.get("n_trials")
    if trials is not None:
        return int(trials)
    if not str(hydra.sweeper.get("_target_")).endswith(".BasicSweeper"):
        return None
    params = [f"{key}={value}" for key, value in (hydra.sweeper.params or {}).items()]
    return len(grid([*params, *hydra.overrides.task]))


def grid(overrides: Sequence[str]) -> list[list[str]]:
    """The overrides of each job of Hydra's own sweeper."""
    from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
    from hydra.core.override_parser.overrides_parser import OverridesParser

    parsed = OverridesParser.create().parse_overrides(list(overrides))
    return [list(job) for job in BasicSweeper.split_arguments(parsed, None)[0]]


def start_jobs(start: Callable[[Sequence[str]], None], sweep: Callable[[], Path | None]) -> None:
    """Start the jobs of a multirun, again if workers are lost, and wait for all of them even if the launcher gives up on one.

    Parameters
    ----------
    start
        Starts the jobs with further overrides.
    sweep
        Folder of the multirun, once there is one.

    Raises
    ------
    InputError
        If workers are killed again and again.
    """
    from prts.cli.overrides import quoted

    again: list[str] = []
    since = time.time()
    for attempt in range(_RELAUNCHES + 1):
        try:
            with _noticing_gone_jobs(sweep):
                start(again)
            return
        except _JobsGoneError:
            folder = sweep()
            assert folder is not None
            _wait_for_the_rest(folder, since)
            return
        except Exception as error:
            folder = sweep()
            if folder is not None and _is(error, "UncompletedJobError") and "sbatch: " not in str(error):
                _wait_for_the_rest(folder, since)
                return
            if folder is None or not _is(error, "BrokenProcessPool"):
                raise
            if attempt == _RELAUNCHES:
                raise InputError(
                    f"hydra/launcher=joblib: workers were killed {_RELAUNCHES + 1} times, perhaps for lack of memory; "
                    "run fewer jobs at a time with hydra.launcher.n_jobs=1"
                ) from error
            sys.stderr.write("prts: a worker was killed; the jobs that it ended start again and resume\n")
            again = [f"hydra.sweep.dir={quoted(str(folder))}"]


class _JobsGoneError(Exception):
    """SLURM has none of the jobs any more, but the launcher waits for one."""


@contextmanager
def _noticing_gone_jobs(sweep: Callable[[], Path | None]) -> Iterator[None]:
    """Raise `_JobsGoneError` if SLURM has no job any more: accounting never hears of one that is canceled while it waits.

    Parameters
    ----------
    sweep
        Folder of the multirun, once there is one.
    """
    from prts.cli.scheduler import all_gone

    # an alarm, since a shell may have told this process to ignore interrupts; Windows has neither alarms nor SLURM
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "SIGALRM"):
        yield
        return
    ended = threading.Event()

    def gone(*_: object) -> None:
        raise _JobsGoneError

    def watch() -> None:
        times = 0
        while not ended.wait(_GONE_POLL_S):
            folder = sweep()
            times = times + 1 if folder is not None and all_gone(folder) else 0
            if times == _GONE_POLLS and not ended.is_set():
                os.kill(os.getpid(), signal.SIGALRM)
                return

    before = signal.signal(signal.SIGALRM, gone)
    threading.Thread(target=watch, daemon=True).start()
    try:
        yield
    finally:
        ended.set()
        signal.signal(signal.SIGALRM, before)


def _is(error: Exception, name: str) -> bool:
    """Whether an error is of a class of a launcher, which may not be installed."""
    return any(kind.__name__ == name for each in chain(error) for kind in type(each).__mro__)


def _wait_for_the_rest(folder: Path, since: float) -> None:
    """Submitit raises for the first job that SLURM ended; the others run on."""
    from prts.cli.scheduler import ended_early, still_there

    while still_there(folder)[0]:
        time.sleep(_POLL_S)
    for line in ended_early(folder, since):
        sys.stderr.write(f"prts: {line}\n")


def say_what_runs_on(folder: Path) -> None:
    """After an interrupt, name the jobs that a scheduler goes on with, and how to end them."""
    from prts.cli.scheduler import still_there

    jobs, end = still_there(folder)
    if jobs:
        again = shlex.quote(f"hydra.sweep.dir={folder}")
        sys.stderr.write(
            f"prts: {len(jobs)} submitted jobs run or wait on; end them with `{end} {' '.join(jobs)}`, or repeat the command with {again} "
            "to wait for them\n"
        )


@contextmanager
def progress(line: Callable[[], str | None]) -> Iterator[None]:
    """Write a line a minute on the jobs of a multirun.

    Parameters
    ----------
    line
        How far they are; None until they have started.
    """
    ended = threading.Event()
    began = time.monotonic()

    def report() -> None:
        while not ended.wait(_EVERY_S):
            if (text := line()) is not None:
                sys.stderr.write(f"prts: {(time.monotonic() - began) / 60:.0f} min: {text}\n")
                sys.stderr.flush()

    thread = threading.Thread(target=report, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def progress_line(folder: Path, planned: int | None) -> str:
    """How far the jobs of a multirun are.

    Parameters
    ----------
    folder
        Folder of the multirun.
    planned
        How many jobs it is to have, if that is known.
    """
    from prts.report.jobs import job_folders, outcome

    states = {job: outcome(job)[0] for job in job_folders(folder)}
    counts = Counter(states.values())
    running, waiting = counts.pop("unfinished", 0), max(0, (planned or 0) - len(states))
    total = f" of {len(states) + waiting}" if planned else ""
    parts = [f"{counts.pop('done', 0)}{total} jobs done"]
    parts += [f"{n} {state}" for state, n in sorted(counts.items())]
    parts += [f"{n} {word}" for n, word in ((running, "running"), (waiting, "not started")) if n]
    line = ", ".join(parts)
    if not running:
        return line
    latest = max((job for job, state in states.items() if state == "unfinished"), key=_last_change)
    return f"{line}; job {latest.relative_to(folder)}: {_last_message(latest)}"


def _last_change(job: Path) -> float:
    return max((path.stat().st_mtime for path in job.glob("*.log")), default=-math.inf)


def _last_message(job: Path) -> str:
    """The last line of a job's log, without time and module."""
    lines = [line for log in job.glob("*.log") for line in log.read_text("utf-8", errors="replace").splitlines()]
    return lines[-1].rpartition(": ")[2] if lines else "starting"
