"""Fitting the model of a run: its network through Lightning, or the linear model that it names."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any, NamedTuple

from hydra.utils import instantiate

from prts.models.linear import fit_linear
from prts.models.module import KeepBest, PRTSModule

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from omegaconf import DictConfig

    from prts.data.datamodule import PRTSDataModule
    from prts.models.checkpoint import EpochCheckpoint
    from prts.models.network import PRTSNet

logger = logging.getLogger(__name__)


class Fitted(NamedTuple):
    """A fitted network, the gates that its level allows, and the epoch whose weights it has (None: fitted without epochs)."""

    net: PRTSNet
    gates: tuple[str, ...]
    best_epoch: int | None
    is_global_zero: bool


def fit(
    cfg: DictConfig,
    datamodule: PRTSDataModule,
    start_loggers: Callable[[], list[Any]],
    checkpoint: EpochCheckpoint,
    goes_on_from: Path | None,
) -> Fitted:
    """Fit what `cfg.model` names.

    Parameters
    ----------
    cfg
        The run's whole config, settled.
    datamodule
        Set up.
    start_loggers
        Opens the run's loggers and returns them for Lightning's Trainer.
    checkpoint
        Writes what an interrupted run goes on from; a linear model needs none.
    goes_on_from
        What it wrote, where the run goes on.
    """
    if cfg.model.baseline:
        start_loggers()
        net = fit_linear(cfg.model.baseline, datamodule.train_sets, datamodule.val_sets, seed=cfg.seed)
        return Fitted(net, ("none",), None, True)
    return _fit_network(cfg, datamodule, start_loggers, checkpoint, goes_on_from)


def _fit_network(
    cfg: DictConfig,
    datamodule: PRTSDataModule,
    start_loggers: Callable[[], list[Any]],
    checkpoint: EpochCheckpoint,
    goes_on_from: Path | None,
) -> Fitted:
    net = instantiate(cfg.model.net)(in_features=datamodule.in_features, n_genes=datamodule.n_genes)
    if net.standardize:
        net.set_input_scaling(*datamodule.feature_moments())
    if datamodule.scaler.start is not None:
        net.start_at(datamodule.scaler.start)
    module = PRTSModule(
        net,
        instantiate(cfg.loss),
        datamodule.scaler,
        instantiate(cfg.model.optimizer),
        None if cfg.model.scheduler is None else instantiate(cfg.model.scheduler),
    )
    callbacks = [checkpoint, *(instantiate(node) for node in cfg.callbacks.values())]
    trainer = instantiate(cfg.trainer, callbacks=callbacks, logger=start_loggers() or False)
    logger.info("network: %s on %s", trainer.precision, trainer.strategy.root_device)
    if goes_on_from is not None:
        logger.info("going on from %s", goes_on_from)
    trainer.fit(module, datamodule=datamodule, ckpt_path=goes_on_from, weights_only=True)
    best_epoch = next((callback.best_epoch for callback in callbacks if isinstance(callback, KeepBest)), None)
    return Fitted(net, module.loss.gates, best_epoch, module.trainer.is_global_zero)
