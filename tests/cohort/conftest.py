"""Ten tiny slides that differ, two files that are no slides, and a bundle that takes no time."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch

from prts.features.no_encoder import NoEncoder
from prts.models.bundle import Bundle, load_bundle, save_bundle
from prts.models.likelihoods.paper import Paper
from prts.models.network import PRTSNet
from prts.models.output import OutputRule
from prts.simulate.section import simulate_section

MPP = 0.5
METADATA = {
    "encoder": NoEncoder().settings(),
    "encoder_weights": None,
    "mpp": MPP,
    "tile": None,
    "pooling": None,
    "input": {"use": ["morphology"], "widths": {"morphology": 21}},
    "segmentation": {"name": "watershed", "arguments": {}},
    "qc": {},
    "tissue": "demo",
    "species": "human",
    "train_sections": ["train"],
    "split": {},
    "seed": 0,
    "validation": {},
}


@dataclass(frozen=True)
class Files:
    """A folder of slides, and a bundle."""

    slides: Path
    model: Path

    @property
    def bundle(self) -> Bundle:
        return load_bundle(self.model)

    def few(self, folder: Path, *names: str) -> Path:
        """A folder with some of the slides."""
        folder.mkdir()
        for name in names:
            (folder / name).write_bytes((self.slides / name).read_bytes())
        return folder


@pytest.fixture(scope="session")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    root = tmp_path_factory.mktemp("cohort")
    section = simulate_section(root / "section", cells=60, genes=50, seed=5)
    pixels = tifffile.imread(section / "tissue_image.tif")
    slides = root / "slides"
    slides.mkdir()
    for k in range(10):
        tifffile.imwrite(slides / f"s{k}.tif", np.roll(pixels, 23 * k, axis=1), photometric="rgb")
    column, row = np.meshgrid(np.linspace(0, 1, 300), np.linspace(0, 1, 300))
    photograph = np.stack([60 + 40 * row, 90 + 120 * column, 40 + 30 * row], axis=2).astype(np.uint8)
    tifffile.imwrite(slides / "photograph.tif", photograph, photometric="rgb")
    whole = (slides / "s0.tif").read_bytes()
    (slides / "truncated.tif").write_bytes(whole[: len(whole) // 2])
    torch.manual_seed(0)
    save_bundle(
        root / "model",
        net=PRTSNet(21, 3, hidden=(4,)),
        likelihood=Paper(target="log1p").allocate(3),
        rule=OutputRule("none", 0.5),
        genes=[(name, f"id{name}") for name in "ABC"],
        metadata=METADATA,
    )
    return Files(slides, root / "model")
