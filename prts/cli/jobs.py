"""Jobs of a multirun of `prts train`, each in its own process, so that a crashed or killed job does not affect the others.

Hydra's launcher (basic, joblib, submitit) calls `run_job`, which starts `python -m prts.cli.jobs`, passes it the composed config and waits.
The job's folder then contains metrics.json, or error.txt with the reason in its first line. A job whose folder already has metrics for the
same config is skipped, and one that was interrupted goes on from its checkpoint: to finish a sweep that was stopped, repeat the command
with `hydra.sweep.dir=<folder>`.
"""

from __future__ import annotations

import importlib
import json
import logging
import math
import os
import shlex
import signal
import subprocess
import sys
import threading
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prts.cli.check import check
from prts.cli.devices import own_gpu
from prts.cli.exit_status import INTERRUPTED, verdict
from prts.cli.processes import process_rank
from prts.io.cache import fingerprint, lock
from prts.report.jobs import OBJECTIVE, RESULTS, job_folders, outcome

if TYPE_CHECKING:
    from omegaconf import DictConfig

logger = logging.getLogger(__name__)

CHECKPOINT = "resume.ckpt"  # `prts.models.checkpoint.NAME`; importing it would load torch
_MESSAGE = ".message"  # the config of a running job
_BEGUN = ".job"  # the fingerprint of the config that the folder's files belong to
_THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS", "TF_NUM_INTRAOP_THREADS")


def run_job(command: str, cfg: DictConfig, *, relaunched: bool = False) -> float:
    """Run a job in its own process and wait for it.

    Parameters
    ----------
    command
        Whose `main` runs the job in Hydra's output folder.
    cfg
        The job's config.
    relaunched
        Whether the launcher was started again after it lost a worker; jobs that had failed by then are not repeated.

    Returns
    -------
    The figure that a sweep maximizes; NaN where the job failed.
    """
    from hydra.core.hydra_config import HydraConfig
    from omegaconf import OmegaConf

    settings = HydraConfig.get()
    folder = Path(settings.runtime.output_dir)
    # a scheduler may start every process of a DDP job here; they run together, and the first one keeps the books
    rank = process_rank()
    with lock(folder / (f"job-{rank}" if rank else "job")):  # it may also restart a job while it is still running
        config = OmegaConf.to_container(cfg, resolve=True, enum_to_str=True)
        assert isinstance(config, dict)
        begun, result, error = folder / _BEGUN, folder / RESULTS[command], folder / "error.txt"
        # resuming does not change a job's identity
        this = fingerprint({"config": {key: value for key, value in config.items() if key != "resume"}})
        same = begun.is_file() and begun.read_text(encoding="utf-8") == this
        if same and error.is_file() and relaunched:
            return math.nan
        if same and result.is_file() and not error.exists():
            logger.info("job %s is already done: %s", settings.job.num, folder)
            return _objective(result)
        if rank == 0:
            for path in (result, error, *([] if same else [folder / CHECKPOINT])):
                path.unlink(missing_ok=True)
            begun.write_text(this, encoding="utf-8")
        if "resume" in config:
            # goes on by itself; without a checkpoint of these settings, it starts at the beginning
            config["resume"] = config["resume"] or (same and (folder / CHECKPOINT).is_file())
        node: Any = settings
        hydra = OmegaConf.to_container(node, resolve=False, enum_to_str=True)
        assert isinstance(hydra, dict)
        hydra["sweep"]["dir"] = settings.sweep.dir  # resolved here, or ${now:} would give the job's own start time
        hydra["run"]["dir"] = str(folder)  # which Lightning passes to the processes that it starts
        message = folder / (f"{_MESSAGE}-{rank}" if rank else _MESSAGE)
        status = _run(message, {"command": command, "config": config, "hydra": hydra}, settings.launcher)
        if status == INTERRUPTED:
            raise KeyboardInterrupt
        if rank > 0 and status == 0:
            return math.nan  # the first process has the results, now or later
        if not result.is_file() and not error.exists():
            error.write_text(f"{_cause(status)}\n", encoding="utf-8")
        if error.exists():
            logger.error("job %s %s", settings.job.num, error.read_text(encoding="utf-8").splitlines()[0])
            return math.nan
        return _objective(result)


def run_worker(command: str, cfg: DictConfig) -> None:
    """Run a worker of a cohort in its own process and wait for it; error.txt in its folder says why it ended early.

    Parameters
    ----------
    command
        Whose `main` runs the worker.
    cfg
        Its config.
    """
    from hydra.core.hydra_config import HydraConfig
    from omegaconf import OmegaConf

    settings: Any = HydraConfig.get()
    error = Path(settings.runtime.output_dir) / "error.txt"
    config = OmegaConf.to_container(cfg, resolve=True, enum_to_str=True)
    hydra = OmegaConf.to_container(settings, resolve=False, enum_to_str=True)
    assert isinstance(config, dict)
    message = error.with_name(f"{_MESSAGE}-worker")
    status = _run(message, {"command": command, "config": config, "hydra": hydra}, settings.launcher)
    if status == INTERRUPTED:
        raise KeyboardInterrupt
    if status and not error.exists():
        error.write_text(f"{_cause(status)}\n", encoding="utf-8")


def summarize(command: str, folder: Path, planned: int | None) -> int:
    """Name the jobs of a multirun that failed, and return the exit status; of training, write summary.csv and summary.html, too.

    Parameters
    ----------
    command
        What the jobs run.
    folder
        Folder of the multirun.
    planned
        How many jobs it was to have, if that is known.

    Raises
    ------
    InputError
        If no job was started.
    """
    from prts.report.sweep import summarise

    if command == "train":
        table = summarise(folder)
        jobs = list(zip(table["job"], table["status"], table["reason"], strict=True))
        where = folder / "summary.html"
    else:
        jobs = [(job.name, *outcome(job)) for job in sorted(job_folders(folder))]
        where = folder
    failed = [job for job in jobs if job[1] != "done"]
    total = max(len(jobs), planned or 0)
    for name, status, reason in failed:
        sys.stderr.write(f"prts: job {name}: {status}: {reason}\n")
    if total > len(jobs):
        sys.stderr.write(f"prts: {total - len(jobs)} of {total} jobs were never started\n")
    sys.stderr.write(f"prts: {len(jobs) - len(failed)} of {total} jobs done: {where}\n")
    if not failed and total == len(jobs):
        return 0
    again = shlex.quote(f"hydra.sweep.dir={folder}")
    sys.stderr.write(f"prts: to run only the unfinished jobs, repeat the command with {again}\n")
    return 2 if total == len(jobs) and all(status == "wrong input" for _, status, _ in failed) else 1


def _objective(result: Path) -> float:
    value = json.loads(result.read_text(encoding="utf-8")).get(OBJECTIVE)
    return math.nan if value is None else float(value)


def threads(launcher: Any, environment: Mapping[str, str]) -> dict[str, str]:
    """Environment variables that keep a job's libraries to its share of the cores; the user's own win.

    Without them, every job of a node starts as many threads as the node has cores. joblib sets them itself.

    Parameters
    ----------
    launcher
        Hydra's `hydra.launcher`.
    environment
        Of this process.
    """
    if "submitit" not in str(launcher.get("_target_")):
        return {}
    cores = environment.get("SLURM_CPUS_PER_TASK") or launcher.get("cpus_per_task")
    bound = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    n = bound if cores is None else min(int(cores), bound)
    return {name: str(n) for name in _THREADS if name not in environment}


def _run(message: Path, content: dict[str, Any], launcher: Any) -> int:
    """Run a job in its own process, with its share of the cores and a GPU of its own; the file `message` tells it what to do."""
    message.write_text(json.dumps(content), encoding="utf-8")
    try:
        with own_gpu(content["config"]) as gpu:
            return _wait(message, {**threads(launcher, os.environ), **gpu})
    finally:
        message.unlink(missing_ok=True)


def _wait(message: Path, environment: Mapping[str, str]) -> int:
    process = subprocess.Popen(
        [sys.executable, "-m", "prts.cli.jobs", str(message)],
        stdin=subprocess.PIPE,  # stays open: the job's processes end when it closes, which is when this process dies
        env={**os.environ, **environment},
    )
    try:
        return process.wait()
    finally:
        if process.stdin is not None:
            process.stdin.close()
        if process.poll() is None:
            process.terminate()
            process.wait()


def _cause(status: int) -> str:
    """The first line of error.txt for a process that wrote none."""
    number = -status if status < 0 else status - 128
    if number in (signal.SIGTERM, signal.SIGKILL) or status < 0:
        name = signal.Signals(number).name
        return f"killed: by {name}" + (" (out of memory, or killed manually)" if name == "SIGKILL" else "")
    return f"failed: the process ended with status {status} and without metrics.json; see its messages in the terminal"


def _die_with_supervisor() -> None:
    sys.stdin.read()
    os._exit(1)


def _job() -> int:
    """A process of one job. Its config is in a file, because Lightning starts further ones with the same arguments for DDP."""
    from hydra.conf import HydraConf
    from hydra.core.hydra_config import HydraConfig
    from hydra.core.utils import configure_log, setup_globals
    from omegaconf import OmegaConf

    if hasattr(signal, "SIGUSR2"):  # sent by SLURM before the time limit, for the process that waits for this one
        signal.signal(signal.SIGUSR2, signal.SIG_IGN)
    message = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    threading.Thread(target=_die_with_supervisor, daemon=True).start()
    setup_globals()
    settings = OmegaConf.create({"hydra": OmegaConf.structured(HydraConf, flags={"struct": False})})
    settings.hydra.merge_with(message["hydra"])
    HydraConfig.instance().set_config(settings)
    configure_log(settings.hydra.job_logging, settings.hydra.verbose)
    try:
        cfg = OmegaConf.create(message["config"])
        check(message["command"], cfg)
        importlib.import_module(f"prts.cli.{message['command']}").main(cfg)
    except KeyboardInterrupt:
        return INTERRUPTED
    except SystemExit as error:
        return verdict(error)[0]
    except Exception as error:  # noqa: BLE001  (the last frame of the job: every error becomes its error.txt)
        status, reason = verdict(error)
        kind = "wrong input" if status == 2 else "failed"
        text = f"{kind}: {reason}\n\n{traceback.format_exc()}"
        path = Path(settings.hydra.runtime.output_dir) / "error.txt"
        if process_rank() == 0 or not path.exists():
            path.write_text(text, encoding="utf-8")
        return status
    return 0


if __name__ == "__main__":
    sys.exit(_job())
