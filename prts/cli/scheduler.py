"""What a scheduler knows of the jobs of a multirun that submitit sent to it, asked with the scheduler's own commands."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

_SUBMITTED = "_submitted.pkl"
_TIMEOUT_S = 60


def submitted(folder: Path) -> list[str]:
    """Ids of the jobs that submitit started for a multirun: SLURM's, such as 12_0, or those of local processes.

    Parameters
    ----------
    folder
        Folder of the multirun.
    """
    files = (Path(folder) / ".submitit").glob(f"*/*{_SUBMITTED}")
    return sorted({path.name.removesuffix(_SUBMITTED) for path in files}, key=_by_number)


def still_there(folder: Path) -> tuple[list[str], str]:
    """Jobs of a multirun that are waiting or running, and the command that ends them."""
    ids = submitted(folder)
    if (queue := _ask("squeue", "--me", "--noheader", "--array", "--format=%i")) is not None:
        listed = set(queue.split())
        if known := [each for each in ids if each in listed]:
            return known, "scancel"
    return [each for each in ids if _is_running(folder, each)], "kill"


def all_gone(folder: Path) -> bool:
    """Whether SLURM answers, and has none of the jobs of a multirun in its queue."""
    queue = _ask("squeue", "--me", "--noheader", "--array", "--format=%i")
    ids = submitted(folder)
    return queue is not None and bool(ids) and not set(ids) & set(queue.split())


def ended_early(folder: Path, since: float) -> list[str]:
    """A line for each job that did not end well, as far as SLURM's accounting knows.

    Parameters
    ----------
    folder
        Folder of the multirun.
    since
        Time of its start, in seconds as `time.time()`; jobs of earlier starts are left out.
    """
    ids = [
        each
        for each in submitted(folder)
        if (folder / ".submitit" / each / f"{each}{_SUBMITTED}").stat().st_mtime >= since
    ]
    states = _ask(
        "sacct", "--noheader", "--allocations", "--parsable2", "--format=JobID,State", f"--jobs={','.join(ids)}"
    )
    if states is None:
        return []
    known = dict(line.split("|", 1) for line in states.splitlines() if "|" in line)
    lines = []
    for job in ids:
        state = known.get(job, "left the queue before it started, perhaps canceled")
        if state != "COMPLETED":
            lines.append(f"SLURM job {job}: {state}; its messages are in {folder / '.submitit' / job}")
    return lines


def warn_without_accounting() -> None:
    """Warn if `sacct` does not work, from which submitit learns that SLURM killed a job."""
    if _ask("sacct", "--noheader", "--allocations", "--format=JobID") is None:
        sys.stderr.write(
            "prts: WARNING: sacct does not answer here, so a job that SLURM kills or that is canceled while it waits is never noticed; "
            "if no progress is shown, press Ctrl-C and repeat the command with hydra.sweep.dir=<folder>\n"
        )


def _ask(*command: str) -> str | None:
    """The output of a command; None if it is not there or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_S, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout


def _is_running(folder: Path, job: str) -> bool:
    """Whether a process of submitit's local executor is running."""
    started_here = not list((folder / ".submitit" / job).glob("*.sh"))
    if not started_here or not job.isdigit():
        return False
    try:
        os.kill(int(job), 0)
    except OSError:
        return False
    return True


def _by_number(job: str) -> list[int]:
    return [int(part) for part in re.findall(r"\d+", job)]
