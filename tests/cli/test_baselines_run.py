"""A run whose test nuclei share a section with those that train: all seven baselines, and the warning that goes with it."""

import json

import numpy as np
import pytest
from hydra import compose, initialize_config_dir

from prts.cli.app import config_dir
from prts.cli.train import train

pytestmark = pytest.mark.slow


def test_a_random_split_has_a_position_baseline_and_a_warning(tmp_path):
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        cfg = compose(
            "train",
            [
                *(f"tissue.sections.train.simulate.{size}" for size in ("cells=400", "genes=150")),
                "tissue.val=[]",
                "tissue.test=[]",
                "split=random",
                f"paths.cache_dir={tmp_path / 'cache'}",
                "panel.n_genes=60",
                "trainer.max_epochs=1",
                "trainer.accelerator=cpu",
                "evaluation.bootstrap=50",
                "logger=none",
                "report=false",
                "encoder.tile_px=64",  # quicker than 256
            ],
        )
    train(cfg, tmp_path / "run")
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    names = {key.split("/")[1] for key in metrics if key.startswith("baseline/")}
    assert names == {"gene_mean", "position", "colour", "context", "morphology", "ridge", "permuted"}
    for name in names - {"gene_mean", "permuted"}:
        assert metrics[f"baseline/{name}/pcc_mean"] > 0.05, name
    assert abs(metrics["baseline/permuted/pcc_mean"]) < 0.06
    assert metrics["warning/split"] == "neighboring nuclei in different parts share tiles"
    for figure in ("hvg50_pcc_mean", "hvg200_pcc_mean", "moran_agreement", "ssim_mean"):
        assert np.isfinite(metrics[f"test/{figure}"]), figure
    assert list((tmp_path / "cache/demo/train").glob("colour-????????.h5"))
    assert list((tmp_path / "cache/demo/train").glob("context-????????.h5"))
