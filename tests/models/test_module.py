from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from torch.optim.lr_scheduler import OneCycleLR, ReduceLROnPlateau
from torch.utils.data import DataLoader

from prts.data.datamodule import NucleusBatches, ShuffledBatches
from prts.data.nucleus_set import NucleusSet
from prts.errors import InputError
from prts.evaluation.expression import pearson_per_gene
from prts.models.likelihoods.paper import Paper
from prts.models.likelihoods.released import Released
from prts.models.module import KeepBest, PRTSModule, seed_everything
from prts.models.network import PRTSNet
from prts.models.output import choose_output
from prts.models.ridge import gene_mean

CONFIGS = Path(__file__).parents[2] / "configs"


class Log(pl.Callback):
    """Everything logged, epoch by epoch."""

    def __init__(self) -> None:
        self.epochs: list[dict[str, float]] = []

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.epochs.append({name: float(value) for name, value in trainer.callback_metrics.items()})


def fit(
    train: Sequence[NucleusSet],
    val: Sequence[NucleusSet],
    *,
    epochs: int,
    seed: int = 0,
    lr: float = 0.01,
    target: str = "log1p",
    callbacks: Sequence[pl.Callback] = (),
    scheduler: Callable[..., object] | None = None,
    precision: str = "32-true",
    fused: bool = False,
) -> PRTSModule:
    pl.seed_everything(seed, verbose=False)
    genes = train[0].counts.shape[1]
    module = PRTSModule(
        PRTSNet(train[0].features.shape[1], genes, hidden=(32, 32)),
        Paper(target=target).fit([nuclei.counts for nuclei in train]),
        partial(torch.optim.AdamW, lr=lr, weight_decay=0.05, fused=fused),
        scheduler,
    )
    dataset = NucleusBatches(train)
    trainer = pl.Trainer(
        accelerator="cpu",
        precision=precision,
        max_epochs=epochs,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        callbacks=list(callbacks),
    )
    trainer.fit(
        module,
        DataLoader(dataset, batch_size=None, sampler=ShuffledBatches(len(dataset), 64, seed)),
        [DataLoader(NucleusBatches([nuclei]), batch_size=None, sampler=[np.arange(len(nuclei))]) for nuclei in val],
    )
    return module


def predicted_umi(module: PRTSModule, nuclei: NucleusSet) -> np.ndarray:
    with torch.no_grad():
        outputs = module.net.eval()(torch.from_numpy(nuclei.features))
        return module.likelihood.mean(outputs).numpy()


@pytest.mark.slow
def test_the_network_learns_what_the_gene_mean_cannot(poisson_nuclei: Callable[..., NucleusSet]) -> None:
    train, val, test = (poisson_nuclei(n, seed) for n, seed in ((1500, 1), (400, 2), (400, 3)))
    module = fit([train], [val], epochs=15, callbacks=[KeepBest()])
    rule = choose_output(module.net, module.likelihood, [val])
    with torch.no_grad():
        outputs = module.net.eval()(torch.from_numpy(test.features))
    umi = rule.apply(module.likelihood.mean(outputs), module.likelihood.prob(outputs)).numpy()
    assert np.nanmean(pearson_per_gene(test.counts, umi)) > 0.35
    error = np.square(np.log1p(umi) - np.log1p(test.counts.toarray())).mean()
    trivial = np.square(np.log1p(gene_mean([train]).predict(test.features)) - np.log1p(test.counts.toarray())).mean()
    assert error < trivial


def test_the_same_seed_gives_the_same_weights_bit_for_bit(poisson_nuclei: Callable[..., NucleusSet]) -> None:
    train, val = poisson_nuclei(200, 1), poisson_nuclei(50, 2)
    first, second, other = (fit([train], [val], epochs=2, seed=seed).net.state_dict() for seed in (3, 3, 4))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["level.weight"], other["level.weight"])


def test_bf16_trains_as_float32_does(poisson_nuclei: Callable[..., NucleusSet]) -> None:
    train, val = [poisson_nuclei(400, 1)], [poisson_nuclei(200, 2)]
    losses = []
    for precision in ("32-true", "bf16-mixed"):
        log = Log()
        module = fit(train, val, epochs=4, callbacks=[log], precision=precision)
        losses.append([epoch["val/loss"] for epoch in log.epochs])
        assert all(weight.dtype == torch.float32 for weight in module.net.parameters())
    assert losses[0] != losses[1]  # the products were rounded
    np.testing.assert_allclose(losses[1], losses[0], rtol=0.02)
    assert losses[1][-1] < losses[1][0]


def test_bf16_keeps_features_of_small_spread_on_a_large_mean_apart(poisson_nuclei: Callable[..., NucleusSet]) -> None:
    x = torch.from_numpy(poisson_nuclei(200, 2).features + np.float32(1000))
    net = PRTSNet(8, 20, hidden=(16,), dropout=0.0).train()  # as in training, batch normalisation takes the mean away
    with torch.no_grad():
        exact = net(x)[0]
        with torch.autocast("cpu", torch.bfloat16):
            rounded = net(x)[0]
    assert rounded.dtype == torch.bfloat16  # the layers behind are rounded
    # in steps of 4, which bfloat16 has at 1000, nothing would be left of features whose spread is 1
    assert ((rounded - exact).std(0) / exact.std(0)).max() < 0.02


def test_the_fused_optimiser_steps_as_the_plain_one_does(poisson_nuclei: Callable[..., NucleusSet]) -> None:
    sets = [poisson_nuclei(400, 1)], [poisson_nuclei(100, 2)]
    weights = [fit(*sets, epochs=2, fused=fused).net.state_dict() for fused in (True, False)]
    for name, tensor in weights[0].items():
        torch.testing.assert_close(tensor, weights[1][name], rtol=1e-3, atol=1e-5)


def test_logged_figures_are_those_of_the_whole_epoch(poisson_nuclei: Callable[..., NucleusSet]) -> None:
    log, val = Log(), [poisson_nuclei(50, 2), poisson_nuclei(70, 3)]
    module = fit([poisson_nuclei(200, 1)], val, epochs=2, callbacks=[log])
    assert set(log.epochs[-1]) >= {"train/loss", "train/reg", "train/bin", "val/loss", "val/reg", "val/bin", "val/pcc"}
    pcc = [np.nanmean(pearson_per_gene(nuclei.counts, predicted_umi(module, nuclei))) for nuclei in val]
    assert log.epochs[-1]["val/pcc"] == pytest.approx(np.mean(pcc), rel=1e-4)
    batch = NucleusBatches(val)[np.arange(120)]
    with torch.no_grad():
        parts = module.likelihood.loss(module.net(batch.features), batch.counts)
    for name, value in parts.items():
        assert log.epochs[-1][f"val/{name}"] == pytest.approx(float(value), rel=1e-5)
    assert log.epochs[-1]["train/loss"] == pytest.approx(
        log.epochs[-1]["train/reg"] + 20 * log.epochs[-1]["train/bin"], rel=1e-5
    )


def test_the_best_epochs_weights_are_put_back(poisson_nuclei: Callable[..., NucleusSet]) -> None:
    log, keep = Log(), KeepBest("val/loss")
    val = poisson_nuclei(100, 2)
    module = fit([poisson_nuclei(100, 1)], [val], epochs=8, lr=0.05, callbacks=[log, keep])
    losses = [epoch["val/loss"] for epoch in log.epochs]
    assert keep.best_epoch == int(np.argmin(losses)) < 7
    batch = NucleusBatches([val])[np.arange(100)]
    with torch.no_grad():
        loss = module.likelihood.loss(module.net.eval()(batch.features), batch.counts)["loss"]
    assert float(loss) == pytest.approx(min(losses), rel=1e-5)


def test_training_that_diverges_says_so(poisson_nuclei: Callable[..., NucleusSet]) -> None:
    with pytest.raises(InputError, match="training diverged; use a smaller learning rate"):
        fit([poisson_nuclei(200, 1)], [poisson_nuclei(50, 2)], epochs=1, lr=1e25, callbacks=[KeepBest()])


def test_a_figure_that_is_never_finite_has_two_causes(make_nuclei: Callable[..., NucleusSet]) -> None:
    rng = np.random.default_rng(0)
    train, val = (
        make_nuclei(rng.normal(size=(100, 3)), counts) for counts in (rng.poisson(1, (100, 2)), np.ones((100, 2)))
    )
    with pytest.raises(InputError, match=r"val/pcc was never finite: .*constant on validation") as caught:
        fit([train], [val], epochs=1, callbacks=[KeepBest("val/pcc", "max")])
    assert "diverged" in str(caught.value) and "\n" not in str(caught.value)


def test_seeding_fixes_the_workspace_of_cublas_unless_the_user_did(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    seed_everything(0)
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    seed_everything(0)
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":16:8"


def test_a_plateau_scheduler_watches_the_validation_loss(poisson_nuclei: Callable[..., NucleusSet]) -> None:
    scheduler = partial(ReduceLROnPlateau, factor=0.5, patience=0, threshold=1e9)  # nothing ever counts as better
    module = fit([poisson_nuclei(200, 1)], [poisson_nuclei(50, 2)], epochs=3, scheduler=scheduler)
    assert module.trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.01 / 8)


def test_one_cycle_is_as_long_as_the_training_and_steps_every_batch(poisson_nuclei: Callable[..., NucleusSet]) -> None:
    class Rates(pl.Callback):
        def __init__(self) -> None:
            self.used: list[float] = []

        def on_train_batch_start(self, trainer: pl.Trainer, *args: object) -> None:
            self.used.append(trainer.optimizers[0].param_groups[0]["lr"])

    rates = Rates()
    fit(
        [poisson_nuclei(300, 1)],
        [poisson_nuclei(50, 2)],
        epochs=4,
        scheduler=partial(OneCycleLR, max_lr=0.02),
        callbacks=[rates],
    )
    assert len(rates.used) == 4 * 5  # batches of 64
    weight = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([weight], lr=1.0, momentum=0.9)
    by_hand = OneCycleLR(optimizer, max_lr=0.02, total_steps=20)
    expected = []
    for _ in range(20):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        by_hand.step()
    np.testing.assert_allclose(rates.used, expected)
    assert max(rates.used) == pytest.approx(0.02) and rates.used[-1] < 1e-3


def test_the_model_and_loss_configs_are_the_papers() -> None:
    model = instantiate(OmegaConf.load(CONFIGS / "model" / "mlp.yaml"))
    net = model.net(in_features=576, n_genes=1820)
    assert net.settings()["hidden"] == [512, 512, 1024, 1024]
    assert (net.order, net.dropout, net.heads, net.standardize) == ("paper", 0.1, "dual", False)
    optimizer = model.optimizer(net.parameters())
    assert isinstance(optimizer, torch.optim.AdamW)
    assert (optimizer.defaults["lr"], optimizer.defaults["weight_decay"]) == (0.01, 0.05)
    for name, likelihood in (("paper", Paper()), ("released", Released())):
        config = OmegaConf.to_container(OmegaConf.load(CONFIGS / "loss" / f"{name}.yaml"))
        assert likelihood.settings() == config | {"target": "minmax"}


@pytest.mark.parametrize("name", ["by_section", "blocks", "random"])
def test_every_split_config_builds_its_splitter(name: str) -> None:
    config = instantiate(
        OmegaConf.create({"split": OmegaConf.load(CONFIGS / "split" / f"{name}.yaml"), "seed": 7}).split
    )
    assert config.settings()["name"] == name
    assert config.settings().get("seed", 7) == 7
