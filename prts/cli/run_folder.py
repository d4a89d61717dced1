"""The folder that Hydra makes for a run or a multirun of `prts train`, and the log file in it."""

from __future__ import annotations

import logging
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from hydra.experimental.callback import Callback

from prts.cli.multirun import planned_jobs
from prts.cli.scheduler import submitted, warn_without_accounting
from prts.errors import full_disk

if TYPE_CHECKING:
    from omegaconf import DictConfig


class RunFolder(Callback):
    """Hydra callback that records which folder was made, since its name contains the start time."""

    sweep: ClassVar[Path | None] = None
    # how many jobs a multirun is to have, if that is known
    planned: ClassVar[int | None] = None
    run: ClassVar[Path | None] = None
    # contents of the run folder before; None if it did not exist
    before: ClassVar[frozenset[str] | None] = None
    # folders that did not exist, from the run folder outward
    made: ClassVar[tuple[Path, ...]] = ()

    @classmethod
    def forget(cls) -> None:
        """Start a new command."""
        cls.sweep = cls.planned = cls.run = cls.before = None
        cls.made = ()

    def on_run_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Note the folder of a run and what is in it."""
        run = Path(config.hydra.run.dir).absolute()
        type(self).run = run
        type(self).before = frozenset(path.name for path in run.iterdir()) if run.is_dir() else None
        type(self).made = tuple(path for path in (run, *run.parents) if not path.exists())

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Note the folder of a multirun and the number of its jobs, and check what its launcher needs."""
        type(self).sweep = Path(config.hydra.sweep.dir).absolute()
        type(self).planned = planned_jobs(config.hydra)
        if str(config.hydra.launcher.get("_target_")).endswith("SlurmLauncher"):
            warn_without_accounting()


def remove_bare_run() -> None:
    """Remove what Hydra created for a run that ended without results, but nothing that existed before."""
    folder = RunFolder.run
    if folder is None or not folder.is_dir() or RunFolder.before:
        return
    if {path.name for path in folder.iterdir()} <= {".hydra", "train.log"}:
        shutil.rmtree(folder / ".hydra", ignore_errors=True)
        (folder / "train.log").unlink(missing_ok=True)
        for path in RunFolder.made:
            if any(path.iterdir()):  # another run uses it
                break
            path.rmdir()


def remove_bare_sweep() -> bool:
    """Remove what Hydra created for a multirun that started no job; return whether none was started."""
    folder = RunFolder.sweep
    if folder is None or not folder.is_dir():
        return True
    if any(folder.rglob(".hydra/overrides.yaml")):
        return False
    if {path.name for path in folder.iterdir()} <= {"multirun.yaml", ".submitit"} and not submitted(folder):
        shutil.rmtree(folder)
    return True


class RunLog(logging.FileHandler):
    """The log file of a run. On a full disk it drops lines instead of ending the run."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 (logging's name)
        """Drop the line if the disk is full."""
        if full_disk(sys.exc_info()[1]) is None:
            super().handleError(record)

    def close(self) -> None:
        """Drop the lines if the disk is full."""
        try:
            super().close()
        except OSError as error:
            if full_disk(error) is None:
                raise
