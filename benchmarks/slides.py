"""Slides without bins: images of simulated sections of any size, and models to predict them with."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np

from prts.io.cache import atomic

GENES = 1_000


def make_slide(path: Path, nuclei: int, tissue_mm2: float, mpp: float, seed: int = 0) -> None:
    """Write the image of a simulated section with this many nuclei on this area of tissue, and glass around it."""
    import tifffile

    from prts.simulate.nuclei import place_nuclei
    from prts.simulate.stain import BAND_ROWS, render, shifted_stain
    from prts.simulate.tissue import UM2_PER_NUCLEUS_OVERALL, build_layout

    rngs = [np.random.default_rng([seed, stream]) for stream in range(3)]
    layout = build_layout(round(1e6 * tissue_mm2 / UM2_PER_NUCLEUS_OVERALL), rngs[0])
    placed = place_nuclei(layout, nuclei, rngs[1])
    shape = (math.ceil(layout.height_um / mpp), math.ceil(layout.width_um / mpp))

    def tiles() -> Any:
        for band in render(layout, placed, shape, mpp, shifted_stain(0.0), rngs[2]):
            whole = np.pad(band, ((0, BAND_ROWS - band.shape[0]), (0, -band.shape[1] % BAND_ROWS), (0, 0)), mode="edge")
            yield from (np.ascontiguousarray(whole[:, x : x + BAND_ROWS]) for x in range(0, whole.shape[1], BAND_ROWS))

    with atomic(path) as temporary, tifffile.TiffWriter(temporary, bigtiff=True) as tif:
        tif.write(
            tiles(),
            shape=(*shape, 3),
            dtype=np.uint8,
            tile=(BAND_ROWS, BAND_ROWS),
            photometric="rgb",
            compression="jpeg",
            compressionargs={"level": 90},
            resolution=(10_000 / mpp, 10_000 / mpp),
            resolutionunit="CENTIMETER",
            metadata=None,
        )


def make_model(folder: Path, weights: Path | None, genes: int = GENES) -> Path:
    """Write a bundle with random weights: on a grid of stride 128 through the ViT, or without weights through `classical`."""
    import torch

    from prts.features.encoders import IMAGENET_MEAN, IMAGENET_STD, Classical, ViT256
    from prts.models.bundle import save_bundle
    from prts.models.likelihoods.paper import Paper
    from prts.models.network import PRTSNet
    from prts.models.output import OutputRule

    encoder: Any = Classical()
    if weights is not None:
        encoder = ViT256(weights, mean=IMAGENET_MEAN, std=IMAGENET_STD, device="cpu", sampling="grid", stride=128)
    torch.manual_seed(0)
    net = PRTSNet(576, genes)
    net.start_at(torch.full((genes,), 2.0))
    save_bundle(
        folder,
        net=net,
        likelihood=Paper().allocate(genes),
        rule=OutputRule("none", 0.5),
        genes=[(f"GENE{g}", f"ENSG{g:011d}") for g in range(genes)],
        metadata={
            "encoder": encoder.settings(),
            "encoder_weights": None if weights is None else str(weights),
            "mpp": 0.5,
            "tile": 256,
            "pooling": "nucleus",
            "input": {"use": ["local", "global"], "widths": {"local": 192, "global": 384}},
            "segmentation": {"name": "watershed", "arguments": {}},
            "qc": {},
            "tissue": "benchmark",
            "species": "human",
            "train_sections": ["benchmark"],
            "split": {},
            "seed": 0,
            "validation": {},
        },
    )
    return folder
