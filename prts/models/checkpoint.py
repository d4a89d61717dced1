"""Resume an interrupted run from a checkpoint at the start of an epoch, and end with the same weights."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.plugins.io import TorchCheckpointIO

from prts.data.datamodule import PRTSDataModule
from prts.data.prepared import PreparedSection
from prts.errors import InputError
from prts.io.cache import atomic

NAME = "resume.ckpt"


class EpochCheckpoint(pl.Callback):
    """Writes a checkpoint before the first batch of every epoch but the first, whole or not at all.

    By then the previous epoch is complete: schedulers have stepped, the best weights are chosen, the order of the next epoch is drawn. At
    the end of an epoch, where Lightning writes its own checkpoints, a scheduler that watches a plateau has not stepped yet and would never
    do so after a restart.

    Parameters
    ----------
    path
        The file; `torch.load(path, weights_only=True)` reads it.
    identity
        What determines the weights, such as the settings and the names of the cache files, as plain containers. A run with another
        identity cannot resume from the file.
    """

    def __init__(self, path: Path, identity: Mapping[str, Any]) -> None:
        self._path = Path(path)
        self._identity = dict(identity)
        self._random: dict[str, Any] | None = None

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Write only in the run folder."""
        trainer.strategy.checkpoint_io = _InPlace()

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Write the checkpoint, or restore the random state of the one that the run resumes from."""
        if batch_idx != 0:
            return
        if self._random is not None:
            _set_random_state(self._random)
            self._random = None
        elif trainer.current_epoch > 0:
            # in a DDP job every process takes part and one writes
            with atomic(self._path) if trainer.is_global_zero else nullcontext(self._path) as path:
                trainer.save_checkpoint(path, weights_only=False)  # optimizer and schedulers too

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Add identity and random states, and count the epoch that has just begun as not begun."""
        # of every process of a DDP job, since their last batches differ in size and so use different numbers of random draws
        random: list[Any] = [_random_state()] * trainer.world_size
        if trainer.world_size > 1:
            torch.distributed.all_gather_object(random, random[0])
        checkpoint["prts"] = {"identity": self._identity, "random": random}
        loop = checkpoint["loops"]["fit_loop"]
        for progress in (loop["epoch_progress"], loop["epoch_loop.batch_progress"]):
            for count in (progress["total"], progress["current"]):
                count.update(dict.fromkeys(("ready", "started", "processed"), count["completed"]))

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Save the random state, because Lightning draws from the generator before the first batch."""
        random = checkpoint["prts"]["random"]
        if len(random) != trainer.world_size:
            raise InputError(
                f"{self._path.parent}: this run started with {len(random)} processes, now there are {trainer.world_size}; "
                "use as many devices, or another run folder"
            )
        self._random = random[trainer.global_rank]
        if isinstance(datamodule := getattr(trainer, "datamodule", None), PRTSDataModule):
            datamodule.first_epoch = checkpoint["epoch"]

    @property
    def folder(self) -> Path:
        """The run folder."""
        return self._path.parent

    def remove(self) -> None:
        """Delete the file of a finished run."""
        self._path.unlink(missing_ok=True)


class _InPlace(TorchCheckpointIO):
    """Lightning itself writes to the system's temporary folder first, where a killed process leaves the file behind."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        # through a Python file, because torch's own writer does not report a full disk
        with Path(path).open("wb") as file:
            torch.save(checkpoint, file)


def cache_files(datamodule: PRTSDataModule) -> dict[str, str]:
    """Names of the cache files that a model is trained on, which change with their content."""
    tissue = datamodule.tissue
    kinds = ("counts", "features", *(["context"] if "context" in datamodule.use else []))
    parts = {
        f"{kind} of {name}{seen}": path
        for name, section in tissue.sections.items()
        for seen, part in {"": section, **_views(section)}.items()
        for kind in kinds
        if (path := getattr(part, kind)) is not None
    }
    return {kind: path.name for kind, path in {**parts, "gene panel": tissue.panel}.items()}


def _views(section: PreparedSection) -> dict[str, PreparedSection]:
    return {f" in view {k}": section.seen(view) for k, view in enumerate(section.views, start=1)}


def find_checkpoint(folder: Path, identity: Mapping[str, Any]) -> Path | None:
    """Find the checkpoint of an interrupted run.

    Parameters
    ----------
    folder
        The run folder.
    identity
        As for `EpochCheckpoint`.

    Returns
    -------
    The file, or None if the run was interrupted before its second epoch.

    Raises
    ------
    InputError
        If the checkpoint is damaged or has another identity.
    """
    path = folder / NAME
    if not path.is_file():
        return None
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        before = content["prts"]["identity"]
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path}: is damaged ({type(error).__name__}); delete it and train again") from error
    if before != dict(identity):
        name, old, new = _difference("", before, dict(identity))
        raise InputError(
            f"{folder}: this run started with {name}={old}, now it is {new}; restore the settings and data it started with, or use another "
            "run folder"
        )
    return path


def _difference(name: str, old: Any, new: Any) -> tuple[str, Any, Any]:
    """The first key whose values differ."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in dict.fromkeys((*old, *new)):
            if old.get(key) != new.get(key):
                return _difference(f"{name}.{key}" if name else str(key), old.get(key), new.get(key))
    return name, old, new


def _random_state() -> dict[str, Any]:
    return {"cpu": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []}


def _set_random_state(state: Mapping[str, Any]) -> None:
    torch.set_rng_state(state["cpu"].cpu())
    if len(state["cuda"]) == torch.cuda.device_count() and torch.cuda.is_available():
        torch.cuda.set_rng_state_all([one.cpu() for one in state["cuda"]])
