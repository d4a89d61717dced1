"""The package of the how-to guides: members of the registries from outside prts, found through entry points."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import anndata as ad
import numpy as np
import pytest
import scipy.sparse as sp
import shapely
import tifffile
import torch

from prts.errors import InputError
from prts.features.encoders import encoder_from_settings, encoders
from prts.io.nuclei import make_nuclei
from prts.io.slide import open_slide
from prts.models.likelihoods import likelihoods
from prts.platforms import platforms
from prts.preprocess.stains import stains
from prts.segmentation import segmenters

PACKAGE = Path(__file__).resolve().parents[2] / "docs/howto/example"


@pytest.fixture(autouse=True)
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The example package as pip would install it."""
    project = tomllib.loads((PACKAGE / "pyproject.toml").read_text())["project"]
    info = tmp_path / "site/prts_extras-0.1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n")
    groups = (
        f"[{group}]\n" + "".join(f"{name} = {target}\n" for name, target in points.items())
        for group, points in project["entry-points"].items()
    )
    (info / "entry_points.txt").write_text("\n".join(groups))
    monkeypatch.syspath_prepend(str(info.parent))
    monkeypatch.syspath_prepend(str(PACKAGE))
    yield info.parent
    members = {encoders: "mean_color", likelihoods: "negative_binomial", platforms: "cells"}
    for registry, name in (members | {segmenters: "dark_spots", stains: "white_point"}).items():
        registry._members.pop(name, None)
    for module in [name for name in sys.modules if name.startswith("prts_extras")]:
        del sys.modules[module]


def test_the_encoder_sees_tile_and_nucleus() -> None:
    encoder = encoders["mean_color"](margin_um=0.0)
    tiles = np.zeros((1, 256, 256, 3), np.uint8)
    tiles[0, 100:110, 120:140] = (255, 0, 51)

    wide, local = encoder.encode(tiles, np.array([shapely.box(120, 100, 140, 110)], dtype=object))

    assert local[0].tolist() == pytest.approx([1.0, 0.0, 0.2])
    assert wide[0].tolist() == pytest.approx([200 / 256**2, 0.0, 0.2 * 200 / 256**2])
    assert encoder_from_settings(encoder.settings()).settings() == encoder.settings()


def test_the_likelihood_is_that_of_torch() -> None:
    likelihood = likelihoods["negative_binomial"](lambda_2=0.0).fit([sp.csr_matrix(np.eye(3, dtype=np.int32))])
    level, counts = torch.tensor([[0.0, 1.0, -2.0]]), torch.tensor([[0.0, 3.0, 1.0]])

    loss = likelihood.loss((level, torch.zeros(1, 3)), counts)["loss"]

    theta = likelihood.log_theta.exp()
    expected = torch.distributions.NegativeBinomial(theta, logits=level - likelihood.log_theta).log_prob(counts)
    assert loss.item() == pytest.approx(-expected.mean().item())
    loss.backward()
    assert likelihood.log_theta.grad.abs().min() > 0
    assert likelihood.mean((level, level)).tolist()[0] == pytest.approx([1.0, np.e, np.exp(-2)])


def test_the_platform_counts_cells_in_nuclei(tmp_path: Path) -> None:
    cells = ad.AnnData(sp.csr_matrix(np.array([[1, 0], [2, 5], [4, 0]], np.int32)))
    cells.obsm["spatial"] = np.array([[5.0, 5.0], [6.0, 5.0], [50.0, 50.0]])
    cells.write_h5ad(tmp_path / "cells.h5ad")
    nuclei = make_nuclei([shapely.box(0, 0, 10, 10), shapely.box(20, 20, 30, 30)], 0.5, cell_id=["a", "b"])

    measurement = platforms["cells"].find(tmp_path)
    counted = measurement.counts(nuclei)

    assert counted.X.toarray().tolist() == [[3, 5], [0, 0]]
    assert counted.obs_names.tolist() == ["a", "b"]
    measurement.check(Path("image.tif"), 60, 60, ("image", 0.5))
    with pytest.raises(InputError, match=r"cells outside image\.tif"):
        measurement.check(Path("image.tif"), 40, 60, ("image", 0.5))


def test_the_segmenter_finds_spots(tmp_path: Path) -> None:
    rgb = np.full((100, 120, 3), 240, np.uint8)
    rgb[20:40, 30:50] = 60
    rgb[80:83, 100:103] = 60  # too small
    tifffile.imwrite(tmp_path / "slide.tif", rgb, photometric="rgb")

    with open_slide(tmp_path / "slide.tif", mpp=0.5) as slide:
        nuclei = segmenters.build({"name": "dark_spots", "min_area_um2": 30.0})(slide)

    assert nuclei.geometry.centroid.x.tolist() == pytest.approx([40], abs=1)
    assert nuclei.geometry.centroid.y.tolist() == pytest.approx([30], abs=1)
    assert nuclei["area_um2"].tolist() == pytest.approx([100], rel=0.1)


def test_the_stain_method_moves_the_background() -> None:
    method = stains["white_point"]({"white": [240.0, 240.0, 240.0]}, {"white": [200.0, 240.0, 120.0]})

    assert method(np.array([[200, 240, 120], [100, 0, 60]], np.uint8)).tolist() == [[240, 240, 240], [120, 0, 120]]


@pytest.mark.slow
def test_the_command_line_takes_its_options(installed: Path) -> None:
    options = ["encoder=mean_color", "loss=negative_binomial", "segmentation=dark_spots", "tissue=mine"]
    code = "import sys; from prts.cli.main import main; sys.exit(main(sys.argv[1:]))"
    path = [str(installed), str(PACKAGE), str(PACKAGE.parents[2])]
    done = subprocess.run(
        [sys.executable, "-c", code, "train", "--config-dir", str(PACKAGE / "configs"), *options, "--cfg", "job"],
        env={**os.environ, "PYTHONPATH": ":".join(path)},
        capture_output=True,
        text=True,
    )

    assert done.returncode == 0, done.stderr
    assert "name: mean_color" in done.stdout and "name: negative_binomial" in done.stdout
    assert "platform: cells" in done.stdout
