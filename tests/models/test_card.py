from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from prts.cli.config import config_dir
from prts.features.licenses import weights_license
from prts.io.cache import fingerprint
from prts.models.bundle import Bundle, add_scores, load_bundle, save_bundle
from prts.models.card import model_card
from prts.models.likelihoods.paper import Paper
from prts.models.network import PRTSNet
from prts.models.output import OutputRule

SCORES = {
    "test/pcc_mean": 0.1384,
    "test/pcc_mean_low": 0.1301,
    "test/pcc_mean_high": 0.1467,
    "test/ceiling_mean": 0.2424,
    "test/predictable_precision": 0.875,
    "baseline/ridge/pcc_mean": 0.1176,
    "baseline/ridge/difference": 0.0208,
    "baseline/ridge/difference_low": 0.0151,
    "baseline/ridge/difference_high": 0.0266,
}
REAL = {"sections": {"K1": {"image": "a.tif"}}, "license": "CC BY 4.0", "cite": "10x Genomics, human kidney"}
Save = Callable[..., Bundle]


@pytest.fixture
def saved(tmp_path: Path) -> Save:
    def save(gene_ids: tuple[str, ...] = ("ENSG1", "ENSG2"), tissue: dict[str, Any] = REAL, **more: Any) -> Bundle:
        config = {"tissue": tissue, "seed": 0}
        metadata = {
            "encoder": {"name": "vit256", "weights_sha256": "ab" * 32},
            "encoder_weights": "/home/someone/weights.pth",
            "mpp": 1.0,
            "tile": 256,
            "pooling": "bilinear",
            "input": {"use": ["local"], "widths": {"local": 3}},
            "segmentation": {"name": "bins", "arguments": {"bin_um": 8}},
            "qc": {},
            "tissue": "kidney",
            "species": "human",
            "train_sections": ["K1"],
            "split": {
                "sections": {"K1": {"train": 900, "val": 0, "test": 0}, "K3": {"train": 0, "val": 0, "test": 1200}}
            },
            "seed": 0,
            "validation": {"pcc": [0.31, 0.02], "ceiling": [0.5, 0.4], "predictable": [True, False]},
            "provenance": {"config": config, "config_fingerprint": fingerprint(config)},
            **more,
        }
        save_bundle(
            tmp_path / "run" / "model",
            net=PRTSNet(3, 2, hidden=(4,)),
            likelihood=Paper(target="log1p").allocate(2),
            rule=OutputRule("none", 0.5),
            genes=list(zip(("UMOD", "NPHS2"), gene_ids, strict=True)),
            metadata=metadata,
        )
        return load_bundle(tmp_path / "run" / "model")

    return save


def front_matter(card: str) -> dict[str, Any]:
    return yaml.safe_load(card.split("---\n")[1])


def test_the_card_says_what_the_bundle_says(saved: Save) -> None:
    model = add_scores(saved(), SCORES)
    assert load_bundle(model.folder).metadata["scores"] == SCORES
    card = model_card(model, "lab/kidney", license="cc-by-4.0", datasets=["lab/data"])
    assert front_matter(card) == {
        "license": "cc-by-4.0",
        "library_name": "prts",
        "tags": ["spatial-transcriptomics", "histology", "gene-expression", "human"],
        "datasets": ["lab/data"],
        "metrics": ["pearsonr"],
    }
    for said in (
        "prts predict bundle=hf://lab/kidney image=slide.svs out=slide.h5ad page=true encoder.weights=FILE",
        "every square of 8 um",
        "| training sections | K1 (900 bins) |",
        "K3 (1,200 bins)",
        "| **this model** | **0.138** | 0.130 to 0.147 | |",
        "| 0.118 | | 0.021 (0.015 to 0.027) |",
        "| noise ceiling | 0.242 |",
        "1 of 2 genes were predicted better than chance",
        "On the test sections, 88% of them were again.",
        "With the highest PCC on validation: UMOD (0.31).",
        "* This model: cc-by-4.0.",
        "* Training data: CC BY 4.0.",
        "* The data: 10x Genomics, human kidney.",
        f"`weights.pth` with SHA-256 `{'ab' * 32}`",
        f"SHA-256 `{model.sha256}`",
    ):
        assert said in card
    assert "simulated" not in card and "/home/someone" not in card


def test_what_is_not_recorded_is_not_claimed(saved: Save) -> None:
    card = model_card(saved(tissue={}, validation={}), "lab/kidney")
    assert "license" not in front_matter(card) and "datasets" not in front_matter(card)
    for said in (
        "Scores are not recorded.",
        "Which genes are predictable is not recorded.",
        "* This model: not stated",
        "* Training data: license not recorded.",
        "license not recorded; ask for it where you get them",
        "* The data: not recorded.",
    ):
        assert said in card
    assert not re.search(r"\bnan\b|None|0\.000", card)


@pytest.mark.parametrize(
    "simulated",
    [{"tissue": {"sections": {"K1": {"simulate": {"cells": 50}}}}}, {"gene_ids": ("SIMG1", "SIMG2"), "tissue": {}}],
)
def test_a_simulated_model_says_so_first(saved: Save, simulated: dict[str, Any]) -> None:
    card = model_card(saved(**simulated), "lab/demo")
    title, first = [line for line in card.split("---\n")[2].splitlines() if line][:2]
    assert title.startswith("# demo")
    assert "trained on simulated data" in first and "not for real slides" in first
    assert "simulated-data" in front_matter(card)["tags"]
    assert "* Training data: simulated by prts." in card


def test_an_older_bundle_takes_the_scores_of_its_own_run_only(saved: Save) -> None:
    model = saved()
    run = model.folder.parent
    (run / "metrics.json").write_text(json.dumps(SCORES))
    (run / "config.yaml").write_text(yaml.safe_dump({"tissue": REAL, "seed": 0, "paths": {"data_dir": "/data"}}))
    assert "**0.138**" in model_card(model, "lab/kidney")
    (run / "config.yaml").write_text(yaml.safe_dump({"tissue": REAL, "seed": 1}))
    assert "0.138" not in model_card(model, "lab/kidney")


def test_licenses_of_weights_are_those_that_the_presets_name() -> None:
    compared = 0
    for path in (config_dir() / "encoder").glob("*.yaml"):
        text = path.read_text()
        said, settings = re.search(r"^# License: (.*?)\. (?:Open|Access)", text, re.M), yaml.safe_load(text)
        if said and settings.get("hub"):
            assert weights_license({"name": "timm", **settings}) == said[1], path.name
            compared += 1
    assert compared == 14
    assert (
        weights_license({"name": "timm", "model_name": "hf-hub:MahmoodLab/UNI"}) == "CC BY-NC-ND 4.0, no commercial use"
    )
    assert weights_license({"name": "vit256", "weights_sha256": "ab" * 32}) is None
