"""A training run that is killed and resumed ends with the weights of an undisturbed one."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
from torch.optim.lr_scheduler import OneCycleLR, ReduceLROnPlateau
from torch.utils.data import DataLoader

from prts.data.datamodule import NucleusBatches, ShuffledBatches
from prts.data.nucleus_set import NucleusSet
from prts.errors import InputError
from prts.models.checkpoint import NAME, EpochCheckpoint, find_checkpoint
from prts.models.likelihoods.paper import Paper
from prts.models.module import KeepBest, PRTSModule
from prts.models.network import PRTSNet

EPOCHS = 7
IDENTITY = {"seed": 0, "data": {"batch_size": 256}, "cache": {"gene panel": "panel-01234567.json"}}
Draw = Callable[..., NucleusSet]
PLATEAU = partial(ReduceLROnPlateau, patience=0, factor=0.3, threshold=0.2)


class KilledError(Exception):
    """In place of SIGKILL."""


class Kill(pl.Callback):
    """Stops at a batch of an epoch."""

    def __init__(self, epoch: int, batch: int) -> None:
        self._at = epoch, batch

    def on_train_batch_end(self, trainer: pl.Trainer, *args: object) -> None:
        if (trainer.current_epoch, args[-1]) == self._at:
            raise KilledError


def fit(
    draw: Draw,
    folder: Path,
    *,
    kill: tuple[int, int] | None = None,
    resume: bool = False,
    precision: str = "32-true",
    scheduler: Callable[..., object] = PLATEAU,
) -> tuple[PRTSModule, KeepBest]:
    """Dropout, a scheduler, and early stopping: everything that has a state."""
    train, val = draw(200, 1), draw(100, 2)
    pl.seed_everything(3, verbose=False)
    module = PRTSModule(
        PRTSNet(8, 20, hidden=(16, 16), dropout=0.2),
        Paper(target="log1p").fit([train.counts]),
        partial(torch.optim.AdamW, lr=0.05),
        scheduler,
    )
    best = KeepBest()
    callbacks = [EpochCheckpoint(folder / NAME, IDENTITY), pl.callbacks.EarlyStopping("val/loss", patience=3), best]
    trainer = pl.Trainer(
        accelerator="cpu",
        precision=precision,
        max_epochs=EPOCHS,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        callbacks=callbacks if kill is None else [*callbacks, Kill(*kill)],
    )
    sets = NucleusBatches([train]), NucleusBatches([val])
    order = ShuffledBatches(200, 32, 3)
    loaders = (
        DataLoader(sets[0], batch_size=None, sampler=order),
        DataLoader(sets[1], batch_size=None, sampler=ShuffledBatches(100, 50, 0)),
    )
    path = find_checkpoint(folder, IDENTITY) if resume else None
    trainer.fit(module, *loaders, ckpt_path=path, weights_only=True)
    return module, best


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("at", "precision"), [((1, 0), "32-true"), ((3, 4), "32-true"), ((5, 6), "32-true"), ((3, 4), "bf16-mixed")]
)
def test_a_killed_run_resumes_to_the_same_weights(
    tmp_path: Path, poisson_nuclei: Draw, at: tuple[int, int], precision: str
) -> None:
    whole, best = fit(poisson_nuclei, tmp_path / "whole", precision=precision)
    with pytest.raises(KilledError):
        fit(poisson_nuclei, tmp_path / "killed", kill=at, precision=precision)
    after, again = fit(poisson_nuclei, tmp_path / "killed", resume=True, precision=precision)
    assert after.trainer.current_epoch == whole.trainer.current_epoch
    assert after.trainer.global_step == whole.trainer.global_step
    assert again.best_epoch == best.best_epoch
    assert again.best_value == best.best_value
    for name, tensor in whole.state_dict().items():
        assert torch.equal(after.state_dict()[name], tensor), name
    rates = [module.optimizers().param_groups[0]["lr"] for module in (whole, after)]
    assert rates[0] == rates[1] < 0.05  # the schedule had something to remember


@pytest.mark.filterwarnings("ignore")
def test_a_killed_run_with_one_cycle_resumes_within_it(tmp_path: Path, poisson_nuclei: Draw) -> None:
    cycle = partial(OneCycleLR, max_lr=0.05)
    whole, _ = fit(poisson_nuclei, tmp_path / "whole", scheduler=cycle)
    with pytest.raises(KilledError):
        fit(poisson_nuclei, tmp_path / "killed", kill=(3, 4), scheduler=cycle)
    after, _ = fit(poisson_nuclei, tmp_path / "killed", resume=True, scheduler=cycle)
    for name, tensor in whole.state_dict().items():
        assert torch.equal(after.state_dict()[name], tensor), name
    rates = [module.optimizers().param_groups[0]["lr"] for module in (whole, after)]
    assert rates[0] == rates[1] < 0.05


@pytest.mark.filterwarnings("ignore")
def test_only_the_same_run_resumes(tmp_path: Path, poisson_nuclei: Draw) -> None:
    assert find_checkpoint(tmp_path, IDENTITY) is None
    with pytest.raises(KilledError):
        fit(poisson_nuclei, tmp_path, kill=(2, 0))
    assert find_checkpoint(tmp_path, IDENTITY) == tmp_path / NAME
    with pytest.raises(InputError, match=r"started with data\.batch_size=256, now it is 64"):
        find_checkpoint(tmp_path, IDENTITY | {"data": {"batch_size": 64}})
    with pytest.raises(InputError, match=r"cache\.gene panel=panel-01234567\.json, now it is panel-76543210\.json"):
        find_checkpoint(tmp_path, IDENTITY | {"cache": {"gene panel": "panel-76543210.json"}})
    (tmp_path / NAME).write_bytes((tmp_path / NAME).read_bytes()[:-1000])
    with pytest.raises(InputError, match=r"is damaged .*delete it and train again"):
        find_checkpoint(tmp_path, IDENTITY)
