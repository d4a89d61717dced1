"""Loggers of a training run from the config group `logger`."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prts.cli.app import plain
from prts.report.loggers import LoggerSpec, RunLoggers

if TYPE_CHECKING:
    from omegaconf import DictConfig


def run_loggers(cfg: DictConfig, folder: Path) -> RunLoggers:
    """The loggers named in a `train` config, not yet opened."""
    config = plain(cfg)
    specs = {}
    for name, node in (config.pop("logger") or {}).items():
        settings = {key: value for key, value in node.items() if value is not None and key != "_target_"}
        specs[name] = LoggerSpec(functools.partial(_instantiate, node["_target_"]), settings)
    sweep, title = _place(cfg)
    return RunLoggers(specs, folder, hyperparameters=config, title=title, sweep=sweep)


def _instantiate(target: str, **settings: Any) -> Any:
    from hydra.utils import instantiate

    return instantiate({"_target_": target, **settings})


def _place(cfg: DictConfig) -> tuple[Path | None, str]:
    """Folder of the sweep that this run belongs to, if any, and a name for the run."""
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode

    if not HydraConfig.initialized() or HydraConfig.get().mode is not RunMode.MULTIRUN:
        return None, str(cfg.tissue.name)
    hydra = HydraConfig.get()
    return Path(hydra.sweep.dir), f"{hydra.job.num} {hydra.job.override_dirname}".strip()
