"""Going on with a training run that was killed: a checkpoint at the start of every epoch, and the same weights at the end."""

from __future__ import annotations

import contextlib
import pickle
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.plugins.io import TorchCheckpointIO

from prts.data.datamodule import PRTSDataModule
from prts.errors import InputError
from prts.io.cache import atomic

NAME = "resume.ckpt"
# Of no consequence for the weights: where things lie, who is told, which images are refused, and the wish to go on itself.
_FREE = ("resume", "paths", "logger", "max_pixels", "check_image", "report")


class EpochCheckpoint(pl.Callback):
    """Writes a checkpoint before the first batch of every epoch but the first, whole or not at all.

    At that moment the epoch before is done with in every respect: its schedulers have stepped, the best weights are chosen, the order of
    the epoch is drawn. At the end of an epoch, where Lightning's own checkpoints are made, a scheduler that watches a plateau has not
    stepped yet, and would not do so after a restart.

    Parameters
    ----------
    path
        The file; `torch.load(path, weights_only=True)` reads it.
    inputs
        What the run learns from, such as the names of the cache files: a run with other inputs does not go on from here.
    """

    def __init__(self, path: Path, inputs: Mapping[str, str]) -> None:
        self._path = Path(path)
        self._inputs = dict(inputs)
        self._random: dict[str, Any] | None = None

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Write in the run folder alone."""
        trainer.strategy.checkpoint_io = _InPlace()

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Write the checkpoint, or take the random state of the one that the run goes on from."""
        if batch_idx != 0:
            return
        if self._random is not None:
            _set_random_state(self._random)
            self._random = None
        elif trainer.current_epoch > 0:
            # this writes: optimiser and schedules too, not only weights. Every process of a DDP job takes part, one writes
            with atomic(self._path) if trainer.is_global_zero else nullcontext(self._path) as path:
                trainer.save_checkpoint(path, weights_only=False)

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Add inputs and random states, and count the epoch that has begun as not begun."""
        # of every process of a DDP job: batches of unequal size, and so dropout, draw unequally
        random: list[Any] = [_random_state()] * trainer.world_size
        if trainer.world_size > 1:
            torch.distributed.all_gather_object(random, random[0])
        checkpoint["prts"] = {"inputs": self._inputs, "random": random}
        loop = checkpoint["loops"]["fit_loop"]
        for progress in (loop["epoch_progress"], loop["epoch_loop.batch_progress"]):
            for count in (progress["total"], progress["current"]):
                count.update(dict.fromkeys(("ready", "started", "processed"), count["completed"]))

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Remember the random state: what Lightning does before the first batch draws from it."""
        random = checkpoint["prts"]["random"]
        if len(random) != trainer.world_size:
            raise InputError(
                f"resume=true: {self._path.parent} was begun with {len(random)} processes, now there are {trainer.world_size}; give it as "
                "many devices, or another hydra.run.dir"
            )
        self._random = random[trainer.global_rank]
        if isinstance(datamodule := getattr(trainer, "datamodule", None), PRTSDataModule):
            datamodule.first_epoch = checkpoint["epoch"]

    def remove(self) -> None:
        """The run is finished."""
        self._path.unlink(missing_ok=True)


class _InPlace(TorchCheckpointIO):
    """Lightning's own way leads through a file in the system's temporary folder, which stays there where the process is killed."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        # a file of ours, since torch's own writer does not say that the disk is full
        with Path(path).open("wb") as file:
            torch.save(checkpoint, file)


def learnt_from(datamodule: PRTSDataModule) -> dict[str, str]:
    """The cache files that are learnt from: their names change with what they hold."""
    tissue = datamodule.tissue
    parts = {
        f"{name}'s {kind}": getattr(section, kind)
        for name, section in tissue.sections.items()
        for kind in ("counts", "features")
    }
    return {kind: path.name for kind, path in {**parts, "the gene panel": tissue.panel}.items()}


def find_checkpoint(folder: Path, config: Mapping[str, Any], inputs: Mapping[str, str]) -> Path | None:
    """The checkpoint that a run goes on from; None where it was killed before there was one.

    Parameters
    ----------
    folder
        The run folder.
    config
        The run's whole config.
    inputs
        As for `EpochCheckpoint`.

    Raises
    ------
    InputError
        If the checkpoint is damaged, or was made with another config or of other inputs.
    """
    path = folder / NAME
    if not path.is_file():
        return None
    before = _config_of(folder / "config.yaml")
    for key in dict.fromkeys((*before, *config)):
        if key not in _FREE and before.get(key) != config.get(key):
            name, old, new = _difference(key, before.get(key), config.get(key))
            raise InputError(
                f"resume=true: {folder} was begun with {name}={old}, now it is {new}; give the settings it was begun with, or another "
                "hydra.run.dir"
            )
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        made_of = content["prts"]["inputs"]
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path}: is damaged ({type(error).__name__}); delete it and train anew") from error
    if made_of != dict(inputs):
        changed = next(name for name in dict.fromkeys((*made_of, *inputs)) if made_of.get(name) != inputs.get(name))
        raise InputError(
            f"resume=true: {changed} is no longer what {folder} was begun with; delete {path} and train anew"
        )
    return path


def _config_of(path: Path) -> dict[str, Any]:
    from omegaconf import OmegaConf

    with contextlib.suppress(OSError):
        content = OmegaConf.to_container(OmegaConf.load(path))
        if isinstance(content, dict):
            return {str(key): value for key, value in content.items()}
    return {}


def _difference(name: str, old: Any, new: Any) -> tuple[str, Any, Any]:
    """The first key within two nodes whose values differ."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in dict.fromkeys((*old, *new)):
            if old.get(key) != new.get(key):
                return _difference(f"{name}.{key}", old.get(key), new.get(key))
    return name, old, new


def _random_state() -> dict[str, Any]:
    return {"cpu": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []}


def _set_random_state(state: Mapping[str, Any]) -> None:
    torch.set_rng_state(state["cpu"].cpu())
    if len(state["cuda"]) == torch.cuda.device_count() and torch.cuda.is_available():
        torch.cuda.set_rng_state_all([one.cpu() for one in state["cuda"]])
