"""Settings that all encoders with patch tokens share."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, StrictBool

from prts.features.encoders.base import Mpp, TileSettings

Precision = Literal["auto", "bf16", "fp32"]
Positive = Annotated[float, Field(gt=0)]
RGB = tuple[float, float, float]

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True, kw_only=True)
class TokenSettings(TileSettings):
    """Settings of every encoder with patch tokens, in addition to `mpp` and `tile_px`.

    Parameters
    ----------
    scales
        um per pixel of several tiles in place of `mpp`, one pass each; their vectors are concatenated.
    weights
        Weights file, `.pth` or `.safetensors`; None for the encoder's own source.
    mean, std
        Normalization of red, green and blue, on a scale from 0 to 1; None for the published values.
    checkpoint_key
        Entry of the weights file that holds the network, if it has several.
    adapter
        Updates of the weights from `experiment=finetune`, `.safetensors` (`prts.features.adapter`).
    pooling
        Patch tokens of the local vector: `nucleus`, the ones that the nucleus overlaps (paper), `center2x2` (released code), or
        `bilinear`, the four around its center, weighted by how near they are.
    layer
        Transformer block whose tokens are used, after the network's last norm; later blocks are not computed. None for the last.
    sampling
        `exact`, a tile around each nucleus (paper), or `grid`, a tile every `stride` px, shared by the nuclei near it.
    stride
        px between the tiles of the grid, from 16 to `tile_px`.
    precision
        `bf16`, `fp32`, or `auto`: bf16 if the processor supports it.
    device
        `auto` (CUDA if available), or a torch device.
    batch_size
        Tiles at a time; None for 16 on a CPU and 128 elsewhere.
    compile
        Whether torch compiles the network first; `auto`: on a CPU, if there are enough tiles to make it worthwhile.
    """

    scales: Annotated[tuple[Mpp, ...], Field(min_length=1)] | None = None
    weights: str | Path | None = None
    mean: RGB | None = None
    std: tuple[Positive, Positive, Positive] | None = None
    checkpoint_key: str | None = None
    adapter: str | Path | None = None
    pooling: Literal["nucleus", "center2x2", "bilinear"] = "nucleus"
    layer: Annotated[int, Field(ge=1, le=1000)] | None = None
    sampling: Literal["exact", "grid"] = "exact"
    stride: Annotated[int, Field(ge=16)] = 128  # a grid finer than the patches adds no information
    precision: Precision = "auto"
    device: str = "auto"
    batch_size: Annotated[int, Field(ge=1)] | None = None
    compile: StrictBool | Literal["auto"] = "auto"
