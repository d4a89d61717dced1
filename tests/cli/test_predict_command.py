from __future__ import annotations

import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import anndata as ad
import geopandas as gpd
import numpy as np
import pytest
import tifffile
import torch
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig
from PIL import Image

from prts.api.nuclei_source import as_segmenter
from prts.api.predict import encoder_weights
from prts.cli.app import config_dir, run
from prts.errors import InputError
from prts.features.encoders import Classical
from prts.io.nuclei import load_nuclei, write_nuclei
from prts.io.orientation import Orientation
from prts.models.bundle import Bundle, load_bundle, save_bundle
from prts.models.likelihoods.paper import Paper
from prts.models.network import PRTSNet
from prts.models.output import OutputRule
from prts.precision import torch_device
from prts.preprocess.artefacts import KINDS
from prts.preprocess.stains.base import sample_slides, statistics
from prts.section import open_section
from prts.segmentation.watershed import Watershed
from prts.simulate.section import simulate_section


def config(*overrides: str) -> DictConfig:
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        return compose("predict", ["bundle=model", "image=x.tif", "out=y.h5ad", *overrides])


def bundle(**metadata: object) -> Bundle:
    return SimpleNamespace(metadata=metadata, folder=Path("model"))


def write_bundle(folder: Path) -> Path:
    metadata = {
        "encoder": Classical().settings(),
        "encoder_weights": None,
        "mpp": 0.5,
        "tile": 256,
        "pooling": "nucleus",
        "input": {"use": ["local", "global"], "widths": {"local": 192, "global": 384}},
        "segmentation": {"name": "watershed", "arguments": {}},
        "qc": {},
        "tissue": "demo",
        "species": "human",
        "train_sections": ["train"],
        "split": {},
        "seed": 0,
        "validation": {},
    }
    parts = {
        "net": PRTSNet(576, 1, hidden=(4,)),
        "likelihood": Paper(target="log1p").allocate(1),
        "rule": OutputRule("none", 0.5),
    }
    save_bundle(folder, **parts, genes=[("A", "idA")], metadata=metadata)
    return folder


def test_weights_come_from_the_command_line_then_from_trainings_path(tmp_path: Path) -> None:
    (tmp_path / "w.pth").touch()
    vit = {"name": "vit256", "weights_sha256": "ab" * 32}
    trained = bundle(encoder=vit, encoder_weights=str(tmp_path / "w.pth"))
    assert encoder_weights(trained, tmp_path / "mine.pth") == tmp_path / "mine.pth"
    assert encoder_weights(trained) == tmp_path / "w.pth"
    assert encoder_weights(bundle(encoder=vit, encoder_weights=None)) is None
    classical = bundle(encoder={"name": "classical"}, encoder_weights=None)
    assert encoder_weights(classical) is None
    with pytest.raises(InputError, match=r"encoder weights: .* classical, has none; omit it"):
        encoder_weights(classical, tmp_path / "mine.pth")


def test_weights_that_are_only_on_the_training_machine_are_asked_for_by_name_and_sum(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gone = str(tmp_path / "there" / "w.pth")
    for encoder in ({"name": "vit256"}, {"name": "dino_vits16", "model_name": "vit_small_patch16_224.dino"}):
        monkeypatch.setattr("prts.features.encoders.timm_model.cached_hub_weights", lambda model_name: None)
        trained = bundle(encoder={**encoder, "weights_sha256": "ab" * 32}, encoder_weights=gone)
        with pytest.raises(InputError, match=rf"encoder weights: .*give w\.pth with SHA-256 {'ab' * 32}") as caught:
            encoder_weights(trained)
        assert "\n" not in str(caught.value)


def test_the_segmenter_of_training_is_made_again_or_refused_in_one_line() -> None:
    def trained(**arguments: object) -> Bundle:
        return bundle(segmentation={"name": "watershed", "arguments": arguments})

    section: Any = SimpleNamespace(nuclei=None)
    assert as_segmenter(None, trained(mpp=0.25), section) == Watershed(mpp=0.25)
    with pytest.raises(InputError, match=r"model: its segmenter cannot be built .*depth.*choose another") as caught:
        as_segmenter(None, trained(depth=3), section)
    assert "\n" not in str(caught.value)


def test_auto_is_stardist_but_for_given_nuclei() -> None:
    auto, stardist = (dict(config(f"segmentation={name}").segmentation) for name in ("auto", "stardist"))
    assert (auto.pop("prefer_given"), stardist.pop("prefer_given")) == (True, False)
    assert auto == stardist and auto["name"] == "stardist"


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
    assert re.search("encoder.device: cuda: torch finds no CUDA device", error) and error.count("\n") == 1
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


@dataclass(frozen=True)
class Slide:
    """A small slide that is not square, its nuclei, and a bundle."""

    pixels: np.ndarray
    nuclei: gpd.GeoDataFrame
    folder: Path

    def image(self, name: str, pixels: np.ndarray) -> Path:
        tifffile.imwrite(self.folder / name, pixels, photometric="rgb")
        return self.folder / name

    def predict(self, image: Path, name: str, *arguments: str) -> tuple[ad.AnnData, gpd.GeoDataFrame]:
        out = self.folder / f"{name}.h5ad"
        given = [f"bundle={self.folder / 'model'}", f"image={image}", f"out={out}", f"mpp={MPP}"]
        assert run("predict", [*given, f"paths.cache_dir={self.folder / 'cache'}", *arguments]) == 0
        return ad.read_h5ad(out), load_nuclei(out.with_suffix(".nuclei.parquet"))


MPP = 0.47  # not that of the encoder and the segmenter, so that pixels are resampled


@pytest.fixture(scope="module")
def slide(tmp_path_factory: pytest.TempPathFactory) -> Slide:
    folder = tmp_path_factory.mktemp("slide")
    section = simulate_section(folder / "section", cells=60, genes=50, seed=5)
    torch.manual_seed(0)
    write_bundle(folder / "model")
    pixels = tifffile.imread(section / "tissue_image.tif")
    pixels = pixels[:, : pixels.shape[1] * 3 // 4]
    nuclei = load_nuclei(section / "truth_nuclei.parquet")
    inside = nuclei.geometry.centroid.x < pixels.shape[1]
    return Slide(np.ascontiguousarray(pixels), nuclei[inside].reset_index(drop=True), folder)


@pytest.mark.parametrize(("rotate", "flip"), [(90, "none"), (270, "vertical"), (180, "horizontal")])
@pytest.mark.parametrize("given", [False, True], ids=["segmented", "given"])
def test_a_turned_slide_is_predicted_as_the_turned_image(slide: Slide, rotate: int, flip: str, given: bool) -> None:
    """Nucleus by nucleus; coordinates stay those of the file."""
    orientation, size = Orientation(rotate, flip), slide.pixels.shape[1::-1]
    file = slide.image("file.tif", slide.pixels)
    other = slide.image(f"{rotate}{flip}.tif", orientation.pixels(slide.pixels))
    nuclei: list[list[str]] = [[], []]
    if given:
        write_nuclei(slide.nuclei, slide.folder / "file.parquet")
        write_nuclei(orientation.nuclei(slide.nuclei, size), slide.folder / "other.parquet")
        nuclei = [[f"nuclei={slide.folder / name}.parquet"] for name in ("file", "other")]
    mine, polygons = slide.predict(file, "mine", f"rotate={rotate}", f"flip={flip}", *nuclei[0])
    wanted, wanted_polygons = slide.predict(other, "wanted", *nuclei[1])

    assert list(mine.obs_names) == list(wanted.obs_names) and mine.n_obs > 30
    np.testing.assert_array_equal(mine.layers["prob"], wanted.layers["prob"])
    assert len(np.unique(mine.layers["prob"])) > 30
    assert list(mine.obs["artefact"]) == list(wanted.obs["artefact"])
    np.testing.assert_allclose(orientation.places(mine.obsm["spatial"], size), wanted.obsm["spatial"])
    back = orientation.nuclei_in_file(wanted_polygons, size)
    np.testing.assert_allclose(polygons.bounds, back.bounds)
    about, other_about = mine.uns["prts"], wanted.uns["prts"]
    assert about["orientation"] == {"rotate": rotate, "flip": flip}
    assert other_about["orientation"] == {"rotate": 0, "flip": "none"}
    assert (about["width"], about["height"]) == size
    picture = next(iter(mine.uns["spatial"].values()))["images"]["hires"]
    assert picture.shape[:2] == slide.pixels.shape[:2]


def test_another_orientation_is_read_anew_and_means_something(slide: Slide) -> None:
    """The cache of the upright slide must not answer for the turned one; the encoder does see the difference."""
    file = slide.image("file.tif", slide.pixels)
    write_nuclei(slide.nuclei, slide.folder / "file.parquet")
    nuclei = f"nuclei={slide.folder / 'file.parquet'}"
    upright, polygons = slide.predict(file, "upright", nuclei)
    turned, turned_polygons = slide.predict(file, "turned", nuclei, "rotate=90")
    again, _ = slide.predict(file, "again", nuclei)
    np.testing.assert_allclose(turned.obsm["spatial"], upright.obsm["spatial"])
    np.testing.assert_allclose(turned_polygons.bounds, polygons.bounds)
    assert not np.array_equal(turned.layers["prob"], upright.layers["prob"])
    np.testing.assert_array_equal(again.layers["prob"], upright.layers["prob"])


def test_a_region_and_an_orientation_go_together(slide: Slide) -> None:
    file = slide.image("file.tif", slide.pixels)
    whole, _ = slide.predict(file, "whole", "rotate=90")
    height = slide.pixels.shape[0]
    part, _ = slide.predict(file, "part", "rotate=90", f"roi=[[0,0],[{height},0],[0,{height}]]")
    inside = whole.obsm["spatial"].sum(axis=1) < height
    assert 5 < inside.sum() < whole.n_obs
    assert list(part.obs_names) == list(whole.obs_names[inside])
    np.testing.assert_allclose(part.layers["prob"], whole[inside].layers["prob"], rtol=1e-5)
    assert list(part.obs["artefact"]) == list(whole.obs["artefact"][inside])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["rotate=45"], "rotate: 45 is not accepted; give 0, 90, 180 or 270"),
        (["rotate=left"], "rotate: 'left' is not accepted; give 0, 90, 180 or 270"),
        (["flip=both"], "flip: 'both' is not accepted; give none, horizontal or vertical"),
        (["artefacts=2"], "artefacts: 2 is not accepted; give true or false"),
        (["max_pixels=none"], "max_pixels: 'none' is not accepted; give a whole number of at least 1, or null"),
    ],
)
def test_a_wrong_value_is_one_line_and_exit_2(
    arguments: list[str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["bundle=model", "image=x.tif", f"out={tmp_path / 'y.h5ad'}"]
    assert run("predict", [*given, *arguments]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and error.startswith(f"prts: {words}")


def test_artefacts_are_said_and_none_is_left_out(slide: Slide, capsys: pytest.CaptureFixture[str]) -> None:
    """A stroke of ink over a quarter of the slide; matching colours must not hide it."""
    inked, side = slide.pixels.copy(), slide.pixels.shape[1]
    inked[:, : side // 4] = (inked[:, : side // 4] * [0.1, 0.15, 0.5]).astype(np.uint8)
    file = slide.image("inked.tif", inked)
    write_nuclei(slide.nuclei, slide.folder / "file.parquet")
    nuclei = f"nuclei={slide.folder / 'file.parquet'}"
    found, _ = slide.predict(file, "found", nuclei)
    assert "inked: artifacts among" in capsys.readouterr().out
    assert list(found.obs["artefact"].cat.categories) == list(KINDS)
    under = found.obsm["spatial"][:, 0] < side // 4 - 10
    beside = found.obsm["spatial"][:, 0] > side // 4 + 10
    assert found.n_obs == len(slide.nuclei)
    assert (found.obs["artefact"][under] == "pen").mean() > 0.6
    assert (found.obs["artefact"][beside] == "pen").mean() < 0.05

    without, _ = slide.predict(file, "without", nuclei, "artefacts=false")
    assert "artefact" not in without.obs
    np.testing.assert_array_equal(without.layers["prob"], found.layers["prob"])

    with open_section("train", slide.image("train.tif", slide.pixels), mpp=MPP).open_slide() as training:
        stain = statistics(sample_slides([training]))
    model = shutil.copytree(slide.folder / "model", slide.folder / "stained")
    about = json.loads((model / "model.json").read_text())
    (model / "model.json").write_text(json.dumps(about | {"stain": stain}))
    for method in ("histogram", "macenko"):
        matched, _ = slide.predict(file, "matched", nuclei, f"stain={method}", f"bundle={model}")
        assert list(matched.obs["artefact"]) == list(found.obs["artefact"])
        assert not np.array_equal(matched.layers["prob"], found.layers["prob"])


def test_max_pixels_lets_a_larger_image_in(slide: Slide, capsys: pytest.CaptureFixture[str]) -> None:
    path = slide.folder / "slide.png"
    Image.fromarray(slide.pixels).save(path)
    given = [f"bundle={slide.folder / 'model'}", f"image={path}", f"out={slide.folder / 'png.h5ad'}", f"mpp={MPP}"]
    assert run("predict", [*given, f"paths.cache_dir={slide.folder / 'cache'}", "max_pixels=1000"]) == 2
    n = slide.pixels.shape[0] * slide.pixels.shape[1]
    assert f"max_pixels={n}" in capsys.readouterr().err
    assert run("predict", [*given, f"paths.cache_dir={slide.folder / 'cache'}", f"max_pixels={n}"]) == 0
