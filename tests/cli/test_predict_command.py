from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tifffile
import torch
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig

from prts.cli.app import config_dir, run
from prts.cli.predict import _segmenter, _weights
from prts.data.targets import make_scaler
from prts.errors import InputError
from prts.features.encoders import Classical
from prts.features.tokens import torch_device
from prts.models.bundle import Bundle, load_bundle, save_bundle
from prts.models.mlp import PRTSNet
from prts.models.output import OutputRule
from prts.preprocess.watershed import Watershed


def config(*overrides: str) -> DictConfig:
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        return compose("predict", ["bundle=model", "image=x.tif", "out=y.h5ad", *overrides])


def bundle(**metadata: object) -> Bundle:
    return SimpleNamespace(metadata=metadata)


def write_bundle(folder: Path) -> Path:
    metadata = {
        "encoder": Classical().settings(),
        "encoder_weights": None,
        "mpp": 0.5,
        "tile": 256,
        "pooling": "nucleus",
        "input": {"use": ["local", "global"], "widths": {"local": 192, "global": 384}},
        "loss": {},
        "segmentation": {"name": "watershed", "arguments": {}},
        "qc": {},
        "tissue": "demo",
        "species": "human",
        "train_sections": ["train"],
        "split": {},
        "seed": 0,
        "validation": {},
    }
    scaler = make_scaler("log1p", 1)
    parts = {"net": PRTSNet(576, 1, hidden=(4,)), "scaler": scaler, "rule": OutputRule("none", 0.5)}
    save_bundle(folder, **parts, genes=[("A", "idA")], metadata=metadata)
    return folder


def test_weights_come_from_the_command_line_then_from_trainings_path(tmp_path: Path) -> None:
    (tmp_path / "w.pth").touch()
    vit = {"name": "vit256", "weights_sha256": "ab" * 32}
    trained = bundle(encoder=vit, encoder_weights=str(tmp_path / "w.pth"))
    assert _weights(config(f"encoder.weights={tmp_path / 'mine.pth'}"), trained) == tmp_path / "mine.pth"
    assert _weights(config(), trained) == tmp_path / "w.pth"
    assert _weights(config(), bundle(encoder=vit, encoder_weights=None)) is None


def test_weights_that_are_only_on_the_training_machine_are_asked_for_by_name_and_sum(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gone = str(tmp_path / "there" / "w.pth")
    for encoder in ({"name": "vit256"}, {"name": "dino_vits16", "model_name": "vit_small_patch16_224.dino"}):
        monkeypatch.setattr("prts.features.encoders.cached_hub_weights", lambda model_name: None)
        trained = bundle(encoder={**encoder, "weights_sha256": "ab" * 32}, encoder_weights=gone)
        with pytest.raises(
            InputError, match=rf"give w\.pth with sha256 {'ab' * 32} as encoder\.weights=FILE"
        ) as caught:
            _weights(config(), trained)
        assert "\n" not in str(caught.value)


def test_the_segmenter_of_training_is_made_again_or_refused_in_one_line() -> None:
    def trained(**arguments: object) -> Bundle:
        return bundle(segmentation={"name": "watershed", "arguments": arguments})

    segmenter, prefer_given = _segmenter(config(), trained(mpp=0.25))
    assert segmenter == Watershed(mpp=0.25) and not prefer_given
    with pytest.raises(InputError, match=r"model: segmentation\.arguments .*'depth'.*segmentation=stardist") as caught:
        _segmenter(config(), trained(depth=3))
    assert "\n" not in str(caught.value)


def test_auto_is_stardist_but_for_given_nuclei() -> None:
    auto, stardist = (dict(config(f"segmentation={name}").segmentation) for name in ("auto", "stardist"))
    assert (auto.pop("prefer_given"), stardist.pop("prefer_given")) == (True, False)
    assert auto == stardist and auto["_target_"].endswith("StarDist")


def test_a_device_that_is_not_there_is_refused_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The classical encoder asks for no device; the network does."""
    tifffile.imwrite(tmp_path / "x.tif", np.zeros((64, 64, 3), np.uint8))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    model = write_bundle(tmp_path / "model")
    assert load_bundle(model).genes == ["A"]
    paths = [
        f"bundle={model}",
        f"image={tmp_path / 'x.tif'}",
        f"out={tmp_path / 'y.h5ad'}",
        f"paths.cache_dir={tmp_path / 'c'}",
    ]
    assert run("predict", [*paths, "mpp=0.5", "encoder.device=cuda"]) == 2
    error = capsys.readouterr().err
    assert "encoder.device: cuda is asked for" in error and error.count("\n") == 1
    assert not (tmp_path / "c").exists()


def test_auto_is_the_gpu_where_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    for available, kind in ((True, "cuda"), (False, "cpu")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda available=available: available)
        assert torch_device("auto").type == kind


def test_a_bundle_without_the_segmentation_is_refused_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = write_bundle(tmp_path / "model")
    about = json.loads((model / "model.json").read_text())
    del about["segmentation"]
    (model / "model.json").write_text(json.dumps(about))
    assert run("predict", [f"bundle={model}", "image=x.tif", f"out={tmp_path / 'y.h5ad'}"]) == 2
    assert "model.json: lacks segmentation" in capsys.readouterr().err
