"""The jobs of a multirun of `prts train`: each in a process of its own, so that one that crashes or is killed leaves the others alone.

Hydra's launcher (basic, joblib, submitit) calls `supervise` for a job. That starts `python -m prts.cli.jobs`, hands over the composed
config and waits. What became of the job stands in its folder: metrics.json, or error.txt, whose first line says why there is none.
A job whose folder holds the metrics of the same config is not run again: a sweep that was stopped goes on with
`hydra.sweep.dir=<its folder>`.
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
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from hydra.experimental.callback import Callback

from prts.io.cache import fingerprint, lock
from prts.report.jobs import OBJECTIVE

if TYPE_CHECKING:
    from omegaconf import DictConfig

logger = logging.getLogger(__name__)


class RememberSweep(Callback):
    """Hydra callback that tells the command line the folder of its multirun, or of its run."""

    folder: ClassVar[Path | None] = None
    run: ClassVar[Path | None] = None
    # what the folder of the run held before; None: there was none
    before: ClassVar[frozenset[str] | None] = None

    @classmethod
    def forget(cls) -> None:
        """Before a new command."""
        cls.folder = cls.run = cls.before = None

    def on_run_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Keep the folder, for what goes wrong before the run has anything to keep."""
        run = Path(config.hydra.run.dir).absolute()
        type(self).run = run
        type(self).before = frozenset(path.name for path in run.iterdir()) if run.is_dir() else None

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Keep the folder; it holds the time of the start, so nobody else could compute it."""
        type(self).folder = Path(config.hydra.sweep.dir).absolute()


def supervise(command: str, cfg: DictConfig) -> float:
    """Run a job in a process of its own and wait for it.

    Parameters
    ----------
    command
        Whose `main` runs the job in Hydra's output folder.
    cfg
        The job's config.

    Returns
    -------
    The figure that a sweep maximises; NaN where the job failed.
    """
    from hydra.core.hydra_config import HydraConfig
    from omegaconf import OmegaConf

    settings = HydraConfig.get()
    folder = Path(settings.runtime.output_dir)
    config = OmegaConf.to_container(cfg, resolve=True, enum_to_str=True)
    with lock(folder / "job"):  # a launcher that lost its workers may start a job again while it still runs
        done, this = folder / ".done", fingerprint({"config": config})
        if (folder / "metrics.json").is_file() and done.is_file() and done.read_text(encoding="utf-8") == this:
            logger.info("job %s is done already: %s", settings.job.num, folder)
            return _objective(folder)
        for name in (".done", "metrics.json", "error.txt"):
            (folder / name).unlink(missing_ok=True)
        node: Any = settings
        hydra = OmegaConf.to_container(node, resolve=False, enum_to_str=True)
        assert isinstance(hydra, dict)
        hydra["sweep"]["dir"] = settings.sweep.dir  # as resolved here: the job would resolve the time of its own start
        status = _run({"command": command, "config": config, "hydra": hydra})
        if status == 130:
            raise KeyboardInterrupt
        error = folder / "error.txt"
        if status != 0 and not error.exists():
            error.write_text(f"{_cause(status)}\n", encoding="utf-8")
        if status != 0:
            logger.error("job %s %s", settings.job.num, error.read_text(encoding="utf-8").splitlines()[0])
            return math.nan
        done.write_text(this, encoding="utf-8")
        return _objective(folder)


def _objective(folder: Path) -> float:
    value = json.loads((folder / "metrics.json").read_text(encoding="utf-8")).get(OBJECTIVE)
    return math.nan if value is None else float(value)


def _run(message: dict[str, Any]) -> int:
    process = subprocess.Popen([sys.executable, "-m", "prts.cli.jobs"], stdin=subprocess.PIPE, text=True)
    assert process.stdin is not None
    try:
        # the pipe stays open: the job ends when it closes, that is when this process dies
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
    if status >= 0:
        return f"failed: the process ended with status {status}; what it said is on the screen only"
    name = signal.Signals(-status).name
    return f"killed: by {name}" + (" (out of memory, or by hand)" if name == "SIGKILL" else "")


def _die_with_supervisor() -> None:
    sys.stdin.read()
    os._exit(1)


def _job() -> int:
    """The process of one job; the message of its supervisor comes on stdin, one line."""
    from hydra.conf import HydraConf
    from hydra.core.hydra_config import HydraConfig
    from hydra.core.utils import configure_log, setup_globals
    from omegaconf import OmegaConf

    from prts.cli.app import verdict

    message = json.loads(sys.stdin.readline())
    threading.Thread(target=_die_with_supervisor, daemon=True).start()
    setup_globals()
    settings = OmegaConf.create({"hydra": OmegaConf.structured(HydraConf, flags={"struct": False})})
    settings.hydra.merge_with(message["hydra"])
    HydraConfig.instance().set_config(settings)
    configure_log(settings.hydra.job_logging, settings.hydra.verbose)
    try:
        importlib.import_module(f"prts.cli.{message['command']}").main(OmegaConf.create(message["config"]))
    except KeyboardInterrupt:
        return 130
    except Exception as error:  # noqa: BLE001  (the last frame of the job: every error becomes its error.txt)
        status, reason = verdict(error)
        kind = "wrong input" if status == 2 else "failed"
        text = f"{kind}: {reason}\n\n{traceback.format_exc()}"
        (Path(settings.hydra.runtime.output_dir) / "error.txt").write_text(text, encoding="utf-8")
        return status
    return 0


if __name__ == "__main__":
    sys.exit(_job())
