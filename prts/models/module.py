"""The Lightning module: one network, one likelihood, one optimizer, and what they log."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Callable, Iterable
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, OneCycleLR, ReduceLROnPlateau

from prts.arguments import checked
from prts.data.batches import Batch
from prts.errors import ParameterError
from prts.models.distributed import summed
from prts.models.likelihoods.base import Likelihood
from prts.models.output import OutputRule
from prts.models.pearson import GenePearson

if TYPE_CHECKING:
    import pandas as pd

logger = logging.getLogger(__name__)


# Warnings that nobody who trains can act on.
_NOISE = (
    "The `srun` command is available",
    r"`isinstance\(treespec, LeafSpec\)` is deprecated",
    r"Found \d+ module\(s\) in eval mode",  # a frozen encoder
)


def quiet_lightning() -> None:
    """Keep Lightning's notices and hints out of the log; its warnings about the run stay."""
    logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)
    for message in _NOISE:
        warnings.filterwarnings("ignore", message=message)


def seed_everything(seed: int) -> None:
    """Seed Python, NumPy, torch and the workers of data loaders, and keep Lightning's hints for developers out of the log."""
    # With cuBLAS's default workspace, sums can differ from run to run. Lightning sets this too, but cuBLAS reads it at first use,
    # and the encoder may have used CUDA by then. A value set by the user is kept.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    quiet_lightning()
    pl.seed_everything(seed, workers=True, verbose=False)


def lacks_length(scheduler: Callable[..., LRScheduler]) -> bool:
    """Whether a scheduler is a one-cycle schedule that is as long as the training."""
    return (
        isinstance(scheduler, partial)
        and scheduler.func is OneCycleLR
        and not {"total_steps", "epochs", "steps_per_epoch"} & scheduler.keywords.keys()
    )


class PRTSModule(pl.LightningModule):
    """Trains a network on counts, and logs `train/*` and `val/*` once per epoch.

    Logged: `train/loss`, `train/reg`, `train/bin` (or other parts of the likelihood's loss), the same under `val/`, and `val/pcc`: the mean
    over validation sections of the mean per-gene PCC between log1p of the predicted UMI and log1p of the measured UMI. The gate is the
    first that the likelihood allows: `none` for all but the hurdle's `soft`.

    Parameters
    ----------
    net
        Called with features (b, d), returns the likelihood's outputs, (b, g) each.
    likelihood
        Fitted on the training counts.
    optimizer
        Makes the optimizer from the parameters.
    scheduler
        Makes a learning-rate scheduler from the optimizer; stepped once per epoch, on `val/loss` if it watches a plateau. A partial of
        `OneCycleLR` without its length takes that of the training, and is stepped after every batch.
    """

    def __init__(
        self,
        net: nn.Module,
        likelihood: Likelihood,
        optimizer: Callable[[Iterable[nn.Parameter]], Optimizer],
        scheduler: Callable[..., LRScheduler] | None = None,
    ) -> None:
        super().__init__()
        self.net = net
        self.likelihood = likelihood
        self._make_optimizer = optimizer
        self._make_scheduler = scheduler
        self._rule = OutputRule(likelihood.allowed_gates[0], threshold=0.5)
        self._train = _Means()
        self._val = _Means()
        self._pearson: dict[int, GenePearson] = {}

    def forward(self, features: Tensor) -> tuple[Tensor, ...]:
        """The network's outputs, (b, g) each."""
        outputs: tuple[Tensor, ...] = self.net(features)
        return outputs

    def on_train_start(self) -> None:
        """Give each process of a DDP job its own random numbers: with equal ones, all would drop the same hidden units."""
        if self.global_rank > 0:
            torch.manual_seed(torch.initial_seed() + self.global_rank)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Loss of a batch."""
        parts = self._losses(batch)[0]
        n = len(batch.features)
        self._train.add(parts, n)
        if self.trainer.world_size == 1:
            return parts["loss"]
        # DDP averages gradients over processes, each of which has some of the batch: weighted, the average is that of the whole batch
        total = summed(torch.tensor(float(n), device=self.device))
        return parts["loss"] * (self.trainer.world_size * n / total)

    def on_train_epoch_end(self) -> None:
        """Log the epoch's mean losses."""
        self._log_means("train", self._train)

    def validation_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Add a batch to the epoch's losses and correlations."""
        parts, outputs = self._losses(batch)
        self._val.add(parts, len(batch.features))
        predicted = torch.log1p(self._rule.apply(self.likelihood.mean(outputs), self.likelihood.prob(outputs)))
        self._pearson.setdefault(dataloader_idx, GenePearson()).update(predicted, torch.log1p(batch.counts))

    def on_validation_epoch_end(self) -> None:
        """Log the epoch's mean losses and mean per-gene PCC."""
        means = self._log_means("val", self._val)
        per_section = torch.stack(
            [self._over_processes(pearson).compute().nanmean() for pearson in self._pearson.values()]
        )
        self._pearson.clear()
        pcc = per_section.nanmean().float()
        self.log("val/pcc", pcc, sync_dist=self.trainer.world_size > 1)
        if self.trainer.state.fn == "fit" and not self.trainer.sanity_checking and self.trainer.is_global_zero:
            logger.info("epoch %3d: val/loss %.4f, val/pcc %.4f", self.current_epoch, means["loss"], pcc)

    def configure_optimizers(self) -> Any:
        """The optimizer, and the scheduler if there is one."""
        optimizer = self._make_optimizer(self.parameters())
        if self._make_scheduler is None:
            return optimizer
        if lacks_length(self._make_scheduler):
            scheduler = self._make_scheduler(optimizer, total_steps=int(self.trainer.estimated_stepping_batches))
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}
        scheduler = self._make_scheduler(optimizer)
        config: dict[str, Any] = {"scheduler": scheduler, "interval": "epoch"}
        if isinstance(scheduler, ReduceLROnPlateau):
            config["monitor"] = "val/loss"
        return {"optimizer": optimizer, "lr_scheduler": config}

    def _losses(self, batch: Batch) -> tuple[dict[str, Tensor], tuple[Tensor, ...]]:
        # float32 even if the network ran in bf16, because the loss sums over half a million pairs
        outputs = tuple(output.float() for output in self.net(batch.features))
        exposed = outputs if batch.exposure is None else self.likelihood.exposed(outputs, batch.exposure)
        return self.likelihood.loss(exposed, batch.counts), outputs

    def _log_means(self, stage: str, means: _Means) -> dict[str, Tensor]:
        taken = means.take(summed if self.trainer.world_size > 1 else None)
        for name, value in taken.items():
            self.log(f"{stage}/{name}", value, sync_dist=self.trainer.world_size > 1)
        return taken

    def _over_processes(self, pearson: GenePearson) -> GenePearson:
        """Merge the correlations of all processes, each of which has seen part of the section."""
        if self.trainer.world_size == 1:
            return pearson
        n, state = pearson.state
        merged = GenePearson()
        counts = self.all_gather(torch.tensor(n, device=self.device))
        for count, part in zip(counts, self.all_gather(state), strict=True):
            merged.merge(float(count), part)
        return merged


class KeepBest(pl.Callback):
    """Keeps the weights of the best epoch in memory and restores them when training ends. Checkpoints hold them too.

    Parameters
    ----------
    monitor
        Logged metric to watch.
    mode
        `min` or `max`.

    Attributes
    ----------
    best_epoch, best_value
        The epoch of the restored weights, and its metric.
    """

    @checked("keep_best")
    def __init__(self, monitor: str = "val/loss", mode: Literal["min", "max"] = "min") -> None:
        self.monitor = monitor
        self.mode = mode
        self.best_epoch: int | None = None
        self.best_value = float("inf") if mode == "min" else float("-inf")
        self._weights: dict[str, Tensor] = {}

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Copy the weights if they are the best so far."""
        if trainer.sanity_checking:
            return
        if self.monitor not in trainer.callback_metrics:
            logged = ", ".join(name for name in trainer.callback_metrics if name.startswith("val/"))
            raise ParameterError("keep_best", "monitor", f"{self.monitor!r} is not logged; choose from {logged}")
        value = float(trainer.callback_metrics[self.monitor])
        if value < self.best_value if self.mode == "min" else value > self.best_value:
            self.best_epoch, self.best_value = trainer.current_epoch, value
            self._weights = {name: tensor.detach().clone() for name, tensor in pl_module.state_dict().items()}

    def state_dict(self) -> dict[str, Any]:
        """State for a checkpoint."""
        return {"best_epoch": self.best_epoch, "best_value": self.best_value, "weights": self._weights}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the state of a checkpoint."""
        self.best_epoch, self.best_value = state_dict["best_epoch"], state_dict["best_value"]
        self._weights = state_dict["weights"]

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Restore the best weights.

        Raises
        ------
        InputError
            If no epoch had a finite metric: training diverged, or (`val/pcc`) no gene of the panel varies on validation.
        """
        if self.best_epoch is None:
            cause = "training diverged; use a smaller learning rate"
            if self.monitor == "val/pcc":
                cause += ", or, if every panel gene is constant on validation, more nuclei or `val/loss`"
            raise ParameterError("keep_best", "monitor", f"{self.monitor} was never finite: {cause}")
        pl_module.load_state_dict(self._weights)
        logger.info("kept the weights of epoch %d: %s %.5g", self.best_epoch, self.monitor, self.best_value)


class EpochHistory(pl.Callback):
    """Collects what is logged, one row per epoch."""

    def __init__(self) -> None:
        self._rows: list[dict[str, float]] = []
        self._epoch: int | None = None

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Remember the epoch, because its training metrics are logged after this."""
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._epoch = trainer.current_epoch

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Keep the metrics of the previous epoch."""
        self._keep(trainer)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Keep the metrics of the last epoch."""
        self._keep(trainer)

    def _keep(self, trainer: pl.Trainer) -> None:
        if self._epoch is not None:
            figures = {key: float(value) for key, value in trainer.callback_metrics.items()}
            self._rows.append({"epoch": self._epoch, **figures})
            self._epoch = None

    def table(self) -> pd.DataFrame:
        """One row per epoch; empty for a model that is fitted in closed form."""
        import pandas as pd

        return pd.DataFrame(self._rows)


class _Means:
    """Means over an epoch, weighted by batch size. They stay on the device: reading a value would make it wait."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._n = 0

    def add(self, parts: dict[str, Tensor], n: int) -> None:
        for name, value in parts.items():
            # a process may have no nucleus of a batch, whose mean is then undefined
            term = value.detach() * n if n else torch.zeros_like(value.detach())
            self._sums[name] = self._sums[name] + term if name in self._sums else term
        self._n += n

    def take(self, over_processes: Callable[[Tensor], Tensor] | None = None) -> dict[str, Tensor]:
        if over_processes is None:
            means = {name: total / self._n for name, total in self._sums.items()}
        else:
            sums = torch.stack([*self._sums.values()])
            *totals, n = over_processes(torch.cat([sums, sums.new_tensor([self._n])]))
            means = {name: total / n for name, total in zip(self._sums, totals, strict=True)}
        self._sums, self._n = {}, 0
        return means
