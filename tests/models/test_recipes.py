"""`experiment=paper` and `experiment=released` against the table of the method, and ablations as config files."""

from __future__ import annotations

import functools

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf
from torch.optim.lr_scheduler import OneCycleLR

from prts.cli.app import config_dir
from prts.cli.train import settled, training_plan
from prts.errors import InputError


@functools.cache
def config(*overrides: str) -> DictConfig:
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        return compose("train", list(overrides))


METHOD = {  # key: (paper, released)
    "data.use": (["local", "global"], ["global", "local"]),
    "data.target": ("minmax", "minmax"),
    "data.batch_size": (256, 512),
    "data.permute": (False, False),
    "encoder.pooling": ("nucleus", "center2x2"),
    "encoder.local_width": (192, 192),
    "encoder.layer": (None, None),
    "encoder.scales": (None, None),
    "data.scale": ("training", "training"),
    "model.net.rank": (None, None),
    "model.net.hidden": ([512, 512, 1024, 1024], [512, 512, 1024, 1024]),
    "model.net.order": ("paper", "released"),
    "model.net.dropout": (0.1, 0.1),
    "model.net.heads": ("dual", "dual"),
    "model.net.standardize": (False, False),
    "model.optimizer._target_": ("torch.optim.AdamW", "torch.optim.AdamW"),
    "model.optimizer.lr": (0.01, 0.001),
    "model.optimizer.weight_decay": (0.05, 0.001),
    "model.scheduler._target_": (None, "torch.optim.lr_scheduler.ReduceLROnPlateau"),
    "model.scheduler.factor": (None, 0.5),
    "model.scheduler.patience": (None, 10),
    "model.output.gate": ("none", "hard"),
    "model.output.threshold": ("auto", 0.2),
    "model.output.min_umi": (0.5, 0.5),
    "loss.name": ("paper", "released"),
    "loss.w_0": (1, None),
    "loss.alpha_w": (5, None),
    "loss.lambda_1": (1, 30),
    "loss.lambda_2": (20, 1),
    "loss.alpha": (None, 0.7),
    "loss.gamma": (None, 2),
    "trainer.max_epochs": (100, 50),
    "trainer.gradient_clip_val": (None, 1.0),
    "callbacks.early_stopping.patience": (10, 20),
    "callbacks.early_stopping.monitor": ("val/loss", "val/loss"),
    "callbacks.early_stopping.mode": ("min", "min"),
    "callbacks.keep_best.monitor": ("val/loss", "val/loss"),
    "callbacks.keep_best.mode": ("min", "min"),
}


@pytest.mark.parametrize("column", [0, 1], ids=["paper", "released"])
def test_an_experiment_is_the_methods_setting(column: int) -> None:
    cfg = settled(config("tissue=lung", f"experiment={('paper', 'released')[column]}"))
    assert {key: OmegaConf.select(cfg, key) for key in METHOD} == {
        key: values[column] for key, values in METHOD.items()
    }


@pytest.mark.parametrize("native", [True, False])
def test_precision_follows_the_processor_where_it_is_auto(monkeypatch: pytest.MonkeyPatch, native: bool) -> None:
    monkeypatch.setattr("prts.precision.computes_bf16", lambda device: native)
    auto = "bf16-mixed" if native else "32-true"
    for experiment, precision in (("best", auto), ("paper", "32-true"), ("released", "32-true")):
        ready = settled(config("tissue=demo", "trainer=cpu", f"experiment={experiment}"))
        assert ready.trainer.precision == precision, experiment
    for asked in ("32-true", "bf16-mixed"):
        given = config("tissue=demo", "trainer=cpu", f"trainer.precision={asked}")
        assert settled(given).trainer.precision == asked
    wide = config("tissue=demo", "trainer=cpu", "experiment=paper", "trainer.precision=auto")
    assert settled(wide).trainer.precision == auto
    assert wide.trainer.precision == "auto"  # the composed config itself stays as it is


def test_the_released_pooling_is_left_away_where_an_encoder_has_none() -> None:
    assert config("tissue=demo", "experiment=released").encoder.pooling == "nucleus"


def test_the_context_recipe_is_the_default_without_an_encoder() -> None:
    default, context = (config("tissue=demo", f"experiment={name}") for name in ("best", "context"))
    assert context.data.use == ["context", "morphology"]
    context.data.use = default.data.use
    assert context == default


def test_the_recipe_for_bins_is_a_fast_network_on_context_and_tokens() -> None:
    cfg = config("tissue=kidney", "experiment=bins")
    assert cfg.data.use == ["context", "local"]
    assert (cfg.encoder.mpp, cfg.encoder.layer, cfg.encoder.pooling, cfg.encoder.local_width) == (
        1.0,
        8,
        "bilinear",
        None,
    )
    assert cfg.model.scheduler.max_lr == cfg.model.optimizer.lr
    assert cfg.callbacks.early_stopping.patience == cfg.trainer.max_epochs  # it never stops
    recipe = training_plan(cfg).recipe
    assert recipe.network.keywords["rank"] == 64 and recipe.scheduler.func is OneCycleLR


def test_ablations_of_the_default_recipe_have_the_inputs_that_they_say() -> None:
    said = {
        "full": ["local", "global", "morphology"],
        "no_morphology": ["local", "global"],
        "local_only": ["local"],
        "global_only": ["global"],
        "permuted": ["local", "global", "morphology"],
    }
    sweep = OmegaConf.load(config_dir() / "sweep" / "ablations.yaml").hydra.sweeper.params.ablation
    assert sweep.split(",") == list(said)
    for ablation, use in said.items():
        assert config("tissue=demo", f"ablation={ablation}").data.use == use


@pytest.mark.parametrize(
    ("ablation", "changed"),
    [
        ("full", {}),
        ("local_only", {"data.use": ["local"]}),
        ("global_only", {"data.use": ["global"]}),
        ("no_binary", {"loss.lambda_2": 0, "model.net.heads": "single", "model.output.gate": "none"}),
        ("no_weights", {"loss.alpha_w": 1}),
        ("permuted", {"data.permute": True}),
        ("center2x2", {"encoder.pooling": "center2x2"}),
        ("local384", {"encoder.local_width": None}),
    ],
)
def test_an_ablation_changes_just_what_it_says(ablation: str, changed: dict[str, object]) -> None:
    before = settled(config("tissue=lung", "experiment=paper"))
    after = settled(config("tissue=lung", "experiment=paper", f"ablation={ablation}"))
    for key in METHOD:
        expected = changed[key] if key in changed else OmegaConf.select(before, key)
        assert OmegaConf.select(after, key) == expected, key


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["ablation=local384"], r"encoder local_width: .* has no such setting"),
        (["encoder=timm", "ablation=local384"], r"encoder local_width: .* has no such setting"),
        (["loss=poisson", "ablation=no_weights"], "likelihood alpha_w: poisson has no such setting"),
        (["loss=poisson", "data.target=minmax"], "data target: 'minmax' does not go with the poisson"),
        (
            ["loss=hurdle", "model.net.heads=dual", "model.output.gate=none"],
            "output gate: 'none' does not go with the hurdle",
        ),
        (["model.optimizer.lr=-1"], "optimizer: Invalid learning rate"),
        (["model.net.hidden=5"], "network hidden: 5 is not accepted"),
        (["loss.lambda_1=-1"], "likelihood lambda_1: -1 is not accepted"),
        (["trainer.max_epochs=0"], "trainer max_epochs: 0 trains nothing"),
        (["loss=hurdle", "model.net.heads=single"], "network heads: 'single' does not go with the hurdle"),
    ],
)
def test_what_does_not_apply_is_refused_before_any_work(overrides: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        training_plan(config("tissue=demo", *overrides))
