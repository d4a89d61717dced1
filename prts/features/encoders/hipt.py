"""HIPT's ViT-S/16, the encoder of the paper, and any other ViT-S/16 in the layout of a DINO checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from prts.errors import ParameterError
from prts.features.encoders import encoders
from prts.features.encoders.base import checked, signature_of
from prts.features.encoders.token_settings import RGB, Positive, TokenSettings
from prts.features.encoders.tokens import TokenEncoder
from prts.features.weights import dino_position_embedding, load_strictly, read_weights

_PATCH = 16
_WIDTH = 384
_DEPTH = 12
_SOURCE = "https://github.com/mahmoodlab/HIPT"


@dataclass(frozen=True, kw_only=True)
class ViT256Settings(TokenSettings):
    """Settings of `ViT256` that differ from or extend `TokenSettings`."""

    mean: RGB | None = (0.5, 0.5, 0.5)
    std: tuple[Positive, Positive, Positive] | None = (0.5, 0.5, 0.5)
    checkpoint_key: str | None = "teacher"
    local_width: Literal[192] | None = 192


@encoders.register("vit256")
@signature_of(ViT256Settings)
class ViT256(TokenEncoder):
    """ViT-S/16 from a DINO checkpoint file, HIPT's `vit256_small_dino.pth` in the paper.

    Position embeddings are interpolated to the tile as DINO does. HIPT's weights are for non-commercial academic use only; the presets
    `hibou_b` (Apache 2.0) and `midnight` (MIT) of `Timm` allow commercial use.

    Parameters
    ----------
    weights
        Checkpoint file, `.pth` or `.safetensors`.
    local_width
        192: adjacent channels are averaged (released code); None: all 384 are kept.
    settings
        The other settings of `TokenSettings`; `tile_px` must be a multiple of 16.

    Raises
    ------
    ParameterError
        If a setting is wrong; on use, if the weights are missing or for another network.

    Examples
    --------
    >>> encoder = ViT256("vit256_small_dino.pth", pooling="center2x2", device="cpu")
    >>> encoder.global_width, encoder.local_width
    (384, 192)
    """

    def __init__(self, weights: str | Path | None = None, **settings: Any) -> None:
        given = checked(ViT256, ViT256Settings, weights=weights, **settings)
        if given.tile_px % _PATCH:
            raise ParameterError("encoder", "tile_px", f"{given.tile_px} is not a multiple of the patch, {_PATCH} px")
        if given.layer is not None and given.layer > _DEPTH:
            raise ParameterError(
                "encoder", "layer", f"{given.layer} is not a block of this network; choose 1 to {_DEPTH}"
            )
        super().__init__(given, pair_channels=given.local_width is not None)

    @property
    def global_width(self) -> int:
        """384, known without the weights."""
        return _WIDTH

    @property
    def local_width(self) -> int:
        """192, or 384 if channels are not paired."""
        return _WIDTH // 2 if self.pair_channels else _WIDTH

    @classmethod
    def weights_hint(cls, settings: Mapping[str, Any]) -> str:
        """Say that the file must be given."""
        return "must be given at prediction as the encoder's weights"

    @classmethod
    def _own_arguments(cls, settings: Mapping[str, Any]) -> dict[str, Any]:
        return {"local_width": _WIDTH // 2 if settings["pair_channels"] else None}

    def _build(self) -> tuple[torch.nn.Module, int]:
        from timm.models.vision_transformer import VisionTransformer

        network = VisionTransformer(
            img_size=self.tile_px, patch_size=_PATCH, embed_dim=_WIDTH, num_heads=6, num_classes=0
        )
        # A DINO checkpoint also holds the projection head of its training.
        tensors = {
            key: tensor
            for key, tensor in read_weights(self.weights_path, self.checkpoint_key).items()
            if not key.startswith("head.")
        }
        embedding = tensors.get("pos_embed")
        if embedding is not None and embedding.ndim == 3 and embedding.shape[::2] == (1, _WIDTH):
            tensors["pos_embed"] = dino_position_embedding(embedding, self.tile_px // _PATCH)
        load_strictly(network, tensors, self.weights_path)
        return network, self.tile_px

    def _default_weights(self) -> Path:
        raise ParameterError("encoder", "weights", f"not given{self._where()}")

    def _where(self) -> str:
        return (
            f"; download HIPT's vit256_small_dino.pth (non-commercial use only) from {_SOURCE} and give its path, or choose another "
            "encoder, such as hibou_b (Apache 2.0)"
        )
