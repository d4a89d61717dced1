"""A recipe refuses what cannot work before any work, and `fit` trains it without a config."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from torch.optim.lr_scheduler import ReduceLROnPlateau

from prts.data.datamodule import PRTSDataModule
from prts.data.nucleus_set import NucleusSet
from prts.errors import ParameterError
from prts.models.fit import Recipe, fit
from prts.models.likelihoods.hurdle import Hurdle
from prts.models.likelihoods.paper import Paper
from prts.models.likelihoods.poisson import Poisson
from prts.models.module import KeepBest
from prts.models.network import PRTSNet
from prts.models.output import OutputSettings

Draw = Callable[..., NucleusSet]


def recipe(**changes: Any) -> Recipe:
    trainer: dict[str, Any] = {
        "accelerator": "cpu",
        "max_epochs": 2,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        **changes.pop("trainer", {}),
    }
    return Recipe(
        **{
            "network": partial(PRTSNet, hidden=(8,)),
            "likelihood": Paper(),
            "optimizer": partial(torch.optim.AdamW, lr=0.01),
            "trainer": partial(pl.Trainer, **trainer),
            "callbacks": [KeepBest()],
            **changes,
        }
    )


def data(train: list[NucleusSet], val: list[NucleusSet]) -> PRTSDataModule:
    """Set up without a prepared tissue."""
    module = PRTSDataModule(lambda: None, lambda *_: {}, batch_size=64)
    module.train_sets, module.val_sets, module._is_set_up = train, val, True
    module.feature_widths = {"local": train[0].features.shape[1]}
    module.panel = type("Panel", (), {"genes": [str(gene) for gene in range(train[0].counts.shape[1])]})()
    return module


def test_the_likelihood_learns_from_training_nuclei_only(poisson_nuclei: Draw) -> None:
    train, val = [poisson_nuclei(150, 1), poisson_nuclei(100, 2)], [poisson_nuclei(100, 3, mean=50.0)]
    given = recipe()
    fitted = fit(given, data(train, val))
    counts = np.vstack([nuclei.counts.toarray() for nuclei in train]).astype(float)
    counts[counts == 0] = np.nan
    scaler = fitted.likelihood.scaler
    np.testing.assert_array_equal(scaler.minimum, np.nanmin(counts, axis=0))
    np.testing.assert_array_equal(scaler.range, np.nanmax(counts, axis=0) - np.nanmin(counts, axis=0))
    assert (fitted.best_epoch in (0, 1)) and fitted.is_global_zero
    assert given.likelihood.n_genes == 0  # a recipe can be fitted again


def test_a_poisson_network_starts_at_each_genes_mean(poisson_nuclei: Draw) -> None:
    seen: list[torch.Tensor] = []

    class Start(pl.Callback):
        def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            seen.append(pl_module.net.level.bias.detach().clone())

    train = poisson_nuclei(200, 1)
    fit(recipe(likelihood=Poisson(), callbacks=[Start()]), data([train], [poisson_nuclei(50, 2)]))
    np.testing.assert_allclose(seen[0].exp(), train.counts.toarray().mean(axis=0), rtol=1e-5)


def test_a_baseline_needs_no_epoch(poisson_nuclei: Draw) -> None:
    fitted = fit(
        recipe(baseline="ridge", trainer={"max_epochs": 0}), data([poisson_nuclei(200, 1)], [poisson_nuclei(50, 2)])
    )
    assert fitted.best_epoch is None
    assert fitted.output.gate == "none"
    assert fitted.likelihood.settings()["target"] == "log1p"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"likelihood": Hurdle(), "network": partial(PRTSNet, heads="single")},
            "network heads: 'single' does not go",
        ),
        (
            {"likelihood": Hurdle(), "output": OutputSettings("hard")},
            "output gate: 'hard' does not go with the hurdle",
        ),
        ({"network": partial(PRTSNet, hidden=5)}, "network hidden: 5 is not accepted"),
        ({"network": partial(PRTSNet, dropout=1.0)}, "network dropout: 1.0 is not accepted"),
        ({"optimizer": partial(torch.optim.AdamW, lr=-1)}, "optimizer: Invalid learning rate: -1"),
        ({"scheduler": partial(ReduceLROnPlateau, factor=2.0)}, "scheduler: Factor should be < 1.0"),
        ({"trainer": {"accelerator": "abacus"}}, "trainer: .*abacus"),
        ({"trainer": {"max_epochs": 0}}, "trainer max_epochs: 0 trains nothing"),
        ({"trainer": {"max_steps": 0}}, "trainer max_steps: 0 trains nothing"),
        ({"trainer": {"limit_train_batches": 0}}, "trainer limit_train_batches: 0 trains nothing"),
        ({"baseline": "position"}, "baseline: position cannot predict another slide"),
    ],
)
def test_what_cannot_work_is_refused_at_once(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ParameterError, match=f"^{message}") as refusal:
        recipe(**changes)
    assert "\n" not in str(refusal.value)


def test_a_run_without_a_step_is_refused(poisson_nuclei: Draw) -> None:
    with pytest.raises(ParameterError, match="ended before its first step"):
        fit(
            recipe(trainer={"max_time": {"seconds": 0}}, callbacks=[]),
            data([poisson_nuclei(100, 1)], [poisson_nuclei(50, 2)]),
        )
