"""Jobs of a multirun of `prts train`, each in its own process, so that a crashed or killed job does not affect the others.

Hydra's launcher (basic, joblib, submitit) calls `run_job`, which starts `python -m prts.cli.jobs`, passes it the composed config and waits.
The job's folder then contains metrics.json, or error.txt with the reason in its first line. A job whose folder already has metrics for the
same config is skipped: to finish a sweep that was stopped, repeat the command with `hydra.sweep.dir=<folder>`.
"""

from __future__ import annotations

import importlib
import json
import logging
import math
import os
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
from prts.cli.exit_status import INTERRUPTED, exit_status_of
from prts.io.cache import fingerprint, lock
from prts.report.jobs import OBJECTIVE

if TYPE_CHECKING:
    from omegaconf import DictConfig

logger = logging.getLogger(__name__)


def run_job(command: str, cfg: DictConfig) -> float:
    """Run a job in its own process and wait for it.

    Parameters
    ----------
    command
        Whose `main` runs the job in Hydra's output folder.
    cfg
        The job's config.

    Returns
    -------
    The figure that a sweep maximizes; NaN where the job failed.
    """
    from hydra.core.hydra_config import HydraConfig
    from omegaconf import OmegaConf

    settings = HydraConfig.get()
    folder = Path(settings.runtime.output_dir)
    with lock(folder / "job"):  # a scheduler may restart a job while it is still running
        done, error = folder / ".done", folder / "error.txt"
        config = OmegaConf.to_container(cfg, resolve=True, enum_to_str=True)
        assert isinstance(config, dict)
        # resuming does not change a job's identity
        this = fingerprint({"config": {key: value for key, value in config.items() if key != "resume"}})
        if (folder / "metrics.json").is_file() and done.is_file() and done.read_text(encoding="utf-8") == this:
            logger.info("job %s is already done: %s", settings.job.num, folder)
            return _objective(folder)
        for path in (done, folder / "metrics.json", error):
            path.unlink(missing_ok=True)
        node: Any = settings
        hydra = OmegaConf.to_container(node, resolve=False, enum_to_str=True)
        assert isinstance(hydra, dict)
        hydra["sweep"]["dir"] = settings.sweep.dir  # resolved here, or ${now:} would give the job's own start time
        with own_gpu(config) as environment:
            status = _wait({"command": command, "config": config, "hydra": hydra}, environment)
        if status == INTERRUPTED:
            raise KeyboardInterrupt
        if not (folder / "metrics.json").is_file() and not error.exists():
            error.write_text(f"{_cause(status)}\n", encoding="utf-8")
        if error.exists():
            logger.error("job %s %s", settings.job.num, error.read_text(encoding="utf-8").splitlines()[0])
            return math.nan
        done.write_text(this, encoding="utf-8")
        return _objective(folder)


def summarize(folder: Path) -> int:
    """Write summary.csv and summary.html of a multirun, name the jobs that failed, and return the exit status.

    Parameters
    ----------
    folder
        Folder of the multirun.

    Raises
    ------
    InputError
        If no job was started.
    """
    from prts.report.sweep import summarise

    jobs = summarise(folder)
    failed = jobs[jobs["status"] != "done"]
    for job in failed.itertuples():
        sys.stderr.write(f"prts: job {job.job}: {job.status}: {job.reason}\n")
    sys.stderr.write(f"prts: {len(jobs) - len(failed)} of {len(jobs)} jobs done: {folder / 'summary.html'}\n")
    if failed.empty:
        return 0
    sys.stderr.write(f"prts: to run only the unfinished jobs, repeat the command with hydra.sweep.dir={folder}\n")
    return 2 if (failed["status"] == "wrong input").all() else 1


def _objective(folder: Path) -> float:
    value = json.loads((folder / "metrics.json").read_text(encoding="utf-8")).get(OBJECTIVE)
    return math.nan if value is None else float(value)


def _wait(message: dict[str, Any], environment: Mapping[str, str]) -> int:
    command = [sys.executable, "-m", "prts.cli.jobs"]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, text=True, env={**os.environ, **environment})
    assert process.stdin is not None
    try:
        # the pipe stays open: the job ends when it closes, which is when this process dies
        process.stdin.write(json.dumps(message) + "\n")
        process.stdin.flush()
        return process.wait()
    except BrokenPipeError:
        return process.wait()
    finally:
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
    """The process of one job; its config arrives on stdin, in one line."""
    from hydra.conf import HydraConf
    from hydra.core.hydra_config import HydraConfig
    from hydra.core.utils import configure_log, setup_globals
    from omegaconf import OmegaConf

    message = json.loads(sys.stdin.readline())
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
        return exit_status_of(error)[0]
    except Exception as error:  # noqa: BLE001  (the last frame of the job: every error becomes its error.txt)
        status, reason = exit_status_of(error)
        kind = "wrong input" if status == 2 else "failed"
        text = f"{kind}: {reason}\n\n{traceback.format_exc()}"
        (Path(settings.hydra.runtime.output_dir) / "error.txt").write_text(text, encoding="utf-8")
        return status
    return 0


if __name__ == "__main__":
    sys.exit(_job())
