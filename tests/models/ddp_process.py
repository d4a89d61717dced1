"""One process of the DDP job that tests/models/test_ddp.py starts: `python ddp_process.py FOLDER`, with torchrun's variables set.

Without them it trains alone. It writes what it saw to FOLDER/<processes>-<rank>.pt.
"""

from __future__ import annotations

import os
import sys
from functools import partial
from pathlib import Path
from typing import Any

import prts._torchvision  # noqa: F401  (before Lightning)

# isort: split

import numpy as np
import pytorch_lightning as pl
import torch

from prts.data.datamodule import PRTSDataModule
from prts.data.nucleus_set import NucleusSet
from prts.data.stream import Streaming
from prts.models.checkpoint import NAME, EpochCheckpoint, find_checkpoint
from prts.models.fit import Fitted, Recipe, fit
from prts.models.likelihoods.paper import Paper
from prts.models.module import KeepBest, seed_everything
from prts.models.network import PRTSNet
from tests.conftest import nuclei_from

IDENTITY = {"seed": 0}
EPOCHS = 3


class KilledError(Exception):
    """In place of SIGKILL."""


class Watch(pl.Callback):
    """Keeps every loss, what each epoch logged, and the first epoch's order of nuclei."""

    def __init__(self, kill: bool = False) -> None:
        self.steps: list[float] = []
        self.epochs: list[dict[str, float]] = []
        self.seen: list[list[float]] = []
        self.kill = kill

    def on_train_batch_end(
        self, trainer: pl.Trainer, module: pl.LightningModule, outputs: Any, batch: Any, i: int
    ) -> None:
        loss = outputs["loss"].detach().clone()
        if trainer.world_size > 1:  # each process holds its weighted part
            torch.distributed.all_reduce(loss)
            loss /= trainer.world_size
        self.steps.append(float(loss))
        self.seen.append(batch.features[:, 0].tolist())
        if self.kill and (trainer.current_epoch, i) == (1, 1):
            raise KilledError

    def on_train_epoch_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        if trainer.current_epoch > 0:
            self.on_train_end(trainer, module)

    def on_train_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self.epochs.append({name: float(value) for name, value in trainer.callback_metrics.items()})


def nuclei(n: int, seed: int) -> NucleusSet:
    rng, world = np.random.default_rng(seed), np.random.default_rng(42)
    features = rng.normal(size=(n, 8))
    return nuclei_from(features, rng.poisson(0.5 * np.exp(features @ world.normal(0, 0.3, (8, 12)))), f"s{seed}")


def data(streams: bool = False) -> PRTSDataModule:
    """57 = 3 x 16 + 9 training nuclei in two sections; validation sections of 33 and 1 nuclei, of which one process gets none."""
    module = PRTSDataModule(lambda: None, lambda *_: {}, batch_size=16, seed=5)
    module.train_sets, module.val_sets, module._is_set_up = (
        [nuclei(40, 1), nuclei(17, 2)],
        [nuclei(33, 3), nuclei(1, 4)],
        True,
    )
    module.streams, module.streaming = streams, Streaming(chunk=4, buffer=32)
    module.feature_widths = {"local": 8}
    module.panel = type("Panel", (), {"genes": [str(gene) for gene in range(12)]})()
    return module


def train(
    watch: Watch, *, dropout: float = 0.0, folder: Path | None = None, resume: bool = False, streams: bool = False
) -> Fitted:
    seed_everything(3)
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    recipe = Recipe(
        network=partial(PRTSNet, hidden=(16, 16), dropout=dropout),
        likelihood=Paper(target="log1p"),
        optimizer=partial(torch.optim.SGD, lr=0.1, momentum=0.9),
        trainer=partial(
            pl.Trainer,
            accelerator="cpu",
            devices=processes,
            strategy="ddp" if processes > 1 else "auto",
            max_epochs=EPOCHS,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
            deterministic=True,
        ),
        callbacks=[KeepBest(), watch],
    )
    return fit(
        recipe,
        data(streams),
        checkpoint=None if folder is None else EpochCheckpoint(folder / NAME, IDENTITY),
        resume_from=find_checkpoint(folder, IDENTITY) if resume and folder is not None else None,
    )


def weights(fitted: Fitted) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in fitted.net.state_dict().items()}


def main(folder: Path) -> None:
    rank, processes = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    watch, dropped, streamed = Watch(), Watch(), Watch()
    found: dict[str, Any] = {"plain": weights(train(watch)), "steps": watch.steps, "epochs": watch.epochs}
    found["seen"] = watch.seen
    found["streamed"], found["streamed_steps"] = weights(train(streamed, streams=True)), streamed.steps
    if processes > 1:
        found["dropout"] = weights(train(dropped, dropout=0.3, folder=folder / "whole"))
        try:
            train(Watch(kill=True), dropout=0.3, folder=folder / "killed")
        except KilledError:
            found["resumed"] = weights(train(Watch(), dropout=0.3, folder=folder / "killed", resume=True))
        found["random"] = torch.rand(3)
    torch.save(found, folder / f"{processes}-{rank}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
