"""Predictions averaged over turns and mirror images of a slide."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import anndata as ad
import numpy as np
import pytest
import shapely
import tifffile
import torch
from geopandas import GeoDataFrame

from prts.api.predict import SlideSettings, _views, predict_slide
from prts.cli.app import run
from prts.errors import InputError
from prts.features.encoders import Timm
from prts.io.nuclei import make_nuclei
from prts.io.orientation import Orientation
from prts.models.bundle import Bundle, load_bundle, save_bundle
from prts.models.likelihoods.poisson import Poisson
from prts.models.network import PRTSNet
from prts.models.output import OutputRule

GENES = [("A", "idA"), ("B", "idB"), ("C", "idC")]
MPP = 0.5


class Slide(NamedTuple):
    folder: Path
    pixels: np.ndarray
    nuclei: GeoDataFrame


@pytest.fixture(scope="module")
def slide(tmp_path_factory: pytest.TempPathFactory) -> Slide:
    """Ramps and noise, not square, and small nuclei off the middle of their tiles' patches."""
    rng = np.random.default_rng(0)
    folder = tmp_path_factory.mktemp("tta")
    ramp = np.linspace(60, 200, 150)[:, None, None] + np.linspace(-40, 40, 190)[None, :, None]
    pixels = np.clip(ramp + rng.normal(0, 25, (150, 190, 3)), 0, 255).astype(np.uint8)
    at = rng.integers(30, 120, (9, 2)) + 0.3  # never halfway between pixels
    boxes = [shapely.box(x - 5, y - 3, x + 5, y + 3) for x, y in at]
    return Slide(folder, pixels, make_nuclei(boxes, MPP, source="drawn"))


def bundle_of(folder: Path, sampling: str) -> Bundle:
    """A random network on a random ViT."""
    import timm
    from safetensors.torch import save_file

    torch.manual_seed(0)
    weights = folder / "vit.safetensors"
    save_file(timm.create_model("test_vit", num_classes=0).state_dict(), weights)
    encoder = Timm(
        "test_vit",
        weights=weights,
        tile_px=64,
        sampling=sampling,
        stride=32,
        pair_channels=False,
        mean=(0.5, 0.5, 0.5),
        std=(0.2, 0.2, 0.2),
        precision="fp32",
        device="cpu",
    )
    widths = {"local": encoder.local_width, "global": encoder.global_width}
    metadata = {
        "encoder": encoder.settings(),
        "encoder_weights": str(weights),
        "mpp": MPP,
        "tile": 64,
        "pooling": "nucleus",
        "input": {"use": list(widths), "widths": widths},
        "segmentation": {"name": "watershed", "arguments": {}},
        "qc": {},
        "tissue": "none",
        "species": "human",
        "train_sections": ["train"],
        "split": {},
        "seed": 0,
        "validation": {},
    }
    net = PRTSNet(sum(widths.values()), len(GENES), hidden=(8,), outputs=Poisson.outputs)
    parts = {"net": net, "likelihood": Poisson().allocate(len(GENES)), "rule": OutputRule("none", 0.5)}
    save_bundle(folder / "model", **parts, genes=GENES, metadata=metadata)
    return load_bundle(folder / "model")


@pytest.mark.parametrize("sampling", ["exact", "grid"])
def test_the_average_is_that_of_literally_turned_images(slide: Slide, tmp_path: Path, sampling: str) -> None:
    bundle, size = bundle_of(tmp_path, sampling), slide.pixels.shape[1::-1]

    def predict(pixels: np.ndarray, nuclei: GeoDataFrame, name: str, **settings: object) -> ad.AnnData:
        tifffile.imwrite(tmp_path / f"{name}.tif", pixels, photometric="rgb")
        read = SlideSettings(mpp=MPP, check_image=False, check_scale=False, artefacts=False, **settings)
        out = tmp_path / f"{name}.h5ad"
        predict_slide(bundle, tmp_path / f"{name}.tif", out, nuclei=nuclei, settings=read, cache_dir=tmp_path / "cache")
        return ad.read_h5ad(out)

    def turned(k: int, mirror: bool) -> np.ndarray:
        pixels = np.rot90(slide.pixels, k)
        view = Orientation(90 * k, "horizontal" if mirror else "none")
        pixels = np.ascontiguousarray(pixels[:, ::-1] if mirror else pixels)
        return predict(pixels, view.nuclei(slide.nuclei, size), f"{k}{mirror}").X.toarray()

    by_hand = np.stack([turned(k, mirror) for mirror in (False, True) for k in range(4)])
    assert by_hand.std(axis=0).min() > 1e-4

    for n in (4, 8):
        found = predict(slide.pixels, slide.nuclei, f"tta{n}", tta=n)
        np.testing.assert_allclose(found.X.toarray(), by_hand[:n].mean(axis=0), rtol=1e-4)
        spread = np.sqrt(np.log1p(by_hand[:n]).var(axis=0).mean(axis=1))
        np.testing.assert_allclose(found.obs["tta_sd"], spread, rtol=1e-3)
        assert found.uns["prts"]["tta"] == n
        np.testing.assert_allclose(found.obsm["spatial"], shapely.get_coordinates(slide.nuclei.centroid))
    # the four turns of a slide that is itself read turned
    again = predict(slide.pixels, slide.nuclei, "again", tta=4, rotate=270)
    np.testing.assert_allclose(again.X.toarray(), by_hand[:4].mean(axis=0), rtol=1e-4)
    once = predict(slide.pixels, slide.nuclei, "once")
    np.testing.assert_allclose(once.X.toarray(), by_hand[0], rtol=1e-4)
    assert "tta_sd" not in once.obs and once.uns["prts"]["tta"] == 1


def test_a_model_without_an_encoder_has_no_views() -> None:
    model = SimpleNamespace(input_use=("context", "morphology"))
    assert _views(model, Orientation(), 1) == (Orientation(),)
    with pytest.raises(
        InputError, match=r"^tta: 8, but this model has no encoder and reads context and morphology"
    ) as e:
        _views(model, Orientation(), 8)
    assert "\n" not in str(e.value)


def test_another_number_is_one_line_and_exit_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("predict", ["bundle=model", "image=x.tif", f"out={tmp_path / 'y.h5ad'}", "tta=3"]) == 2
    assert capsys.readouterr().err == "prts: tta: 3 is not accepted; give 1, 4 or 8\n"
