"""Fit a model: a network through Lightning, or a linear model in closed form."""

from __future__ import annotations

import copy
import logging
import os
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import pytorch_lightning as pl
import torch
from lightning_fabric.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from prts.data.nucleus_set import CountBlocks
from prts.errors import ParameterError
from prts.models.distributed import synchronize
from prts.models.likelihoods.base import Likelihood
from prts.models.linear import LIKELIHOOD, check_linear, fit_linear
from prts.models.module import KeepBest, PRTSModule, lacks_length, quiet_lightning
from prts.models.network import PRTSNet
from prts.models.output import OutputSettings
from prts.models.slurm import own_processes

if TYPE_CHECKING:
    from prts.data.datamodule import PRTSDataModule
    from prts.models.checkpoint import EpochCheckpoint

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Recipe:
    """How to train a model. It is checked on construction, so that mistakes surface before hours of preparation.

    Parameters
    ----------
    network
        Makes the network from `in_features`, `n_genes` and `outputs`, such as `functools.partial(PRTSNet, hidden=(256, 256))`.
    likelihood
        Not fitted.
    optimizer
        Makes the optimizer from the parameters.
    trainer
        Makes Lightning's Trainer from `callbacks` and `logger`, such as `functools.partial(pl.Trainer, max_epochs=40)`.
    scheduler
        Makes a learning-rate scheduler from the optimizer.
    callbacks
        Lightning callbacks, such as `KeepBest`.
    output
        How gate and threshold are chosen after training.
    baseline
        One of `prts.models.linear.LINEAR`: fit this linear model instead of the network.
    seed
        Seed of the baseline `permuted`. The network follows torch's generator; see `prts.models.module.seed_everything`.

    Raises
    ------
    ParameterError
        If the parts do not work together, or nothing would be trained.
    """

    network: Callable[..., PRTSNet]
    likelihood: Likelihood
    optimizer: Callable[[Iterable[nn.Parameter]], Optimizer]
    trainer: Callable[..., pl.Trainer]
    scheduler: Callable[[Optimizer], LRScheduler] | None = None
    callbacks: Sequence[pl.Callback] = ()
    output: OutputSettings = field(default_factory=OutputSettings)
    baseline: str | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        quiet_lightning()
        if self.baseline is not None:
            check_linear(self.baseline)
            return
        with torch.device("meta"):
            net = self.network(in_features=1, n_genes=1, outputs=self.likelihood.outputs)
        self.likelihood.require(heads=net.heads, gate=self.output.gate)
        optimizer: Optimizer = _make("optimizer", self.optimizer, [nn.Parameter(torch.zeros(1))])
        if self.scheduler is not None:
            length = {"total_steps": 2} if lacks_length(self.scheduler) else {}
            _make("scheduler", self.scheduler, optimizer, **length)
        trainer: pl.Trainer = _make("trainer", self.trainer, logger=False, **own_processes(self.trainer))
        for name in ("max_epochs", "max_steps", "limit_train_batches"):
            if getattr(trainer, name) == 0:
                raise ParameterError("trainer", name, "0 trains nothing; use 1 or more")


def _make(owner: str, factory: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    try:
        return factory(*args, **kwargs)
    except (TypeError, ValueError, RuntimeError, MisconfigurationException) as error:
        raise ParameterError(owner, "", str(error)) from error


def _root(checkpoint: EpochCheckpoint | None) -> Path:
    """Where Lightning writes `hpc_ckpt_*.ckpt` when SLURM requeues a job.

    It would read such a file before any other, also one that another experiment left in the working folder. Runs resume from the
    checkpoint of their last epoch instead.
    """
    if checkpoint is None:
        return Path(tempfile.gettempdir()) / f"prts-{os.getpid()}"
    for stray in checkpoint.folder.glob("hpc_ckpt_*.ckpt"):
        stray.unlink(missing_ok=True)
    return checkpoint.folder


class Fitted(NamedTuple):
    """A fitted model.

    Attributes
    ----------
    net, likelihood
        The network and its likelihood.
    output
        How its gate and threshold are to be chosen.
    best_epoch
        The epoch of its weights; None if it was fitted without epochs.
    is_global_zero
        Whether this process writes the results; other processes of a DDP job only train.
    """

    net: PRTSNet
    likelihood: Likelihood
    output: OutputSettings
    best_epoch: int | None
    is_global_zero: bool


def fit(
    recipe: Recipe,
    datamodule: PRTSDataModule,
    *,
    start_loggers: Callable[[], list[Any]] = list,
    checkpoint: EpochCheckpoint | None = None,
    resume_from: Path | None = None,
) -> Fitted:
    """Fit a recipe to training nuclei.

    Parameters
    ----------
    recipe
        What to fit.
    datamodule
        Set up.
    start_loggers
        Opens the run's loggers and returns them for Lightning's Trainer.
    checkpoint
        Writes checkpoints for resuming an interrupted run. Linear models need none.
    resume_from
        A checkpoint to resume from.

    Raises
    ------
    ParameterError
        If training diverged or ended before its first step.
    """
    counts = CountBlocks(datamodule.train_sets)
    if recipe.baseline is not None:
        start_loggers()
        net = fit_linear(recipe.baseline, datamodule.train_sets, datamodule.val_sets, seed=recipe.seed)
        return Fitted(net, copy.deepcopy(LIKELIHOOD).fit(counts), replace(recipe.output, gate="none"), None, True)
    likelihood = copy.deepcopy(recipe.likelihood).fit(counts)
    net = recipe.network(in_features=datamodule.in_features, n_genes=datamodule.n_genes, outputs=likelihood.outputs)
    if net.standardize:
        net.set_input_scaling(*datamodule.feature_moments())
    if likelihood.start is not None:
        net.start_at(likelihood.start)
    module = PRTSModule(net, likelihood, recipe.optimizer, recipe.scheduler)
    callbacks = [*recipe.callbacks] if checkpoint is None else [checkpoint, *recipe.callbacks]
    root = _root(checkpoint)
    trainer = recipe.trainer(
        callbacks=callbacks,
        logger=start_loggers() or False,
        default_root_dir=str(root),
        use_distributed_sampler=False,  # the datamodule deals each batch to the processes; Lightning would repeat some nuclei
        **own_processes(recipe.trainer),
    )
    if trainer.world_size > 1:
        synchronize(net)
    processes = f", {trainer.world_size} processes" if trainer.world_size > 1 else ""
    logger.info("network: %s on %s%s", trainer.precision, trainer.strategy.root_device, processes)
    if resume_from is not None:
        logger.info("resuming from %s", resume_from)
    trainer.fit(module, datamodule=datamodule, ckpt_path=resume_from, weights_only=True)
    if trainer.global_step == 0:
        raise ParameterError(
            "trainer", "max_epochs", "training ended before its first step; allow it more epochs or time"
        )
    best_epoch = next((callback.best_epoch for callback in callbacks if isinstance(callback, KeepBest)), None)
    return Fitted(net, likelihood, recipe.output, best_epoch, trainer.is_global_zero)
