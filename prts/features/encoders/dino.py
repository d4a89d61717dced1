"""DINO's own ViT-S/16, trained on natural images."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from prts.features.encoders import encoders
from prts.features.encoders.base import checked, signature_of
from prts.features.encoders.timm_model import Timm
from prts.features.encoders.token_settings import IMAGENET_MEAN, IMAGENET_STD, RGB, Positive, TokenSettings

_MODEL = "vit_small_patch16_224.dino"
_WIDTH = 384


@dataclass(frozen=True, kw_only=True)
class DinoViTS16Settings(TokenSettings):
    """Settings of `DinoViTS16` that differ from or extend `TokenSettings`."""

    mean: RGB | None = IMAGENET_MEAN
    std: tuple[Positive, Positive, Positive] | None = IMAGENET_STD
    local_width: Literal[192] | None = 192


@encoders.register("dino_vits16")
@signature_of(DinoViTS16Settings)
class DinoViTS16(Timm):
    """DINO's ViT-S/16 (natural images), whose weights timm downloads from the Hugging Face hub.

    Parameters
    ----------
    weights
        File to read instead of downloading.
    local_width
        192: adjacent channels are averaged; None: all 384 are kept.
    settings
        The other settings of `TokenSettings`.

    Examples
    --------
    >>> DinoViTS16(device="cpu").mean
    (0.485, 0.456, 0.406)
    """

    def __init__(self, weights: str | Path | None = None, **settings: Any) -> None:
        given = checked(DinoViTS16, DinoViTS16Settings, weights=weights, **settings)
        shared = {name: getattr(given, name) for name in TokenSettings.__dataclass_fields__}
        super().__init__(_MODEL, pair_channels=given.local_width is not None, **shared)

    @classmethod
    def _own_arguments(cls, settings: Mapping[str, Any]) -> dict[str, Any]:
        return {"local_width": _WIDTH // 2 if settings["pair_channels"] else None}
