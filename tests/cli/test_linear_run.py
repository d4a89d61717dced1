"""`model=ridge` is a run as any other: its test figures are those that other runs print as baseline/ridge."""

import json

import pytest
from hydra import compose, initialize_config_dir

from prts.cli.app import config_dir
from prts.cli.train import train

pytestmark = pytest.mark.slow


def test_ridge_as_a_model_scores_as_ridge_beside_a_model(tmp_path):
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        cfg = compose(
            "train",
            [
                *(f"tissue.sections.{name}.simulate.cells=300" for name in ("train", "val", "test")),
                *(f"tissue.sections.{name}.simulate.genes=120" for name in ("train", "val", "test")),
                f"paths.cache_dir={tmp_path / 'cache'}",
                "panel.n_genes=40",
                "model=ridge",
                "encoder.tile_px=64",  # quicker than 256
                "evaluation.bootstrap=50",
            ],
        )
    train(cfg, tmp_path / "run")
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["test/pcc_mean"] == pytest.approx(metrics["baseline/ridge/pcc_mean"], abs=1e-4)
    assert metrics["test/auroc"] > 0.55
    model = json.loads((tmp_path / "run" / "model" / "model.json").read_text())
    assert (model["baseline"], model["likelihood"]["target"]) == ("ridge", "log1p")
    assert "linear model" in (tmp_path / "run" / "report.html").read_text()
