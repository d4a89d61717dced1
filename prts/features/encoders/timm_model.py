"""Any timm network, or one on the Hugging Face hub in timm's format."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from prts.errors import ParameterError
from prts.features.encoders import encoders
from prts.features.encoders.base import checked, signature_of
from prts.features.encoders.tokens import IMAGENET_MEAN, IMAGENET_STD, TokenEncoder, TokenSettings
from prts.features.weights import cached_hub_weights, hub_weights, pretrained_config, read_weights


@dataclass(frozen=True, kw_only=True)
class TimmSettings(TokenSettings):
    """Settings of `Timm` that extend `TokenSettings`."""

    model_name: str
    pair_channels: bool = True


@encoders.register("timm")
@signature_of(TimmSettings)
class Timm(TokenEncoder):
    """Any network in timm, or on the Hugging Face hub in timm's format, that has patch tokens or a feature map.

    Position embeddings are interpolated to the tile by timm. If `tile_px` is not a multiple of the patch, tiles are resized to the next
    smaller multiple: 256 to 252 px for patches of 14 px.

    Parameters
    ----------
    model_name
        Timm's name, such as `vit_base_patch16_224.augreg_in21k`, or `hf-hub:owner/name`.
    weights
        File to read instead of the published weights.
    pair_channels
        Average adjacent channels of the local vector, instead of keeping all.
    settings
        The other settings of `TokenSettings`. `mean` and `std` default to the published values.

    Raises
    ------
    ParameterError
        If timm does not know the model or a setting is wrong; on use, if the weights cannot be downloaded or do not fit, or the network has
        no grid of tokens.

    Examples
    --------
    >>> Timm("vit_base_patch16_224.augreg_in21k", tile_px=224, device="cpu").tile_px
    224
    """

    def __init__(self, model_name: str, weights: str | Path | None = None, **settings: Any) -> None:
        given = checked(Timm, TimmSettings, model_name=model_name, weights=weights, **settings)
        super().__init__(given, pair_channels=given.pair_channels)
        self.model_name = given.model_name

    def settings(self) -> dict[str, Any]:
        """Everything that affects the features."""
        return {**super().settings(), "model_name": self.model_name}

    @classmethod
    def find_weights(cls, settings: Mapping[str, Any]) -> Path | None:
        """The file in the local cache of the Hugging Face hub."""
        return cached_hub_weights(settings["model_name"])

    @classmethod
    def weights_hint(cls, settings: Mapping[str, Any]) -> str:
        """Say that the hub may have them."""
        return f"is not here; prediction downloads {settings['model_name']} from the hub, or takes a file as the encoder's weights"

    @classmethod
    def _own_arguments(cls, settings: Mapping[str, Any]) -> dict[str, Any]:
        return {"model_name": settings["model_name"], "pair_channels": settings["pair_channels"]}

    @cached_property
    def _config(self) -> dict[str, Any]:
        """The published configuration: normalization, name of the classifier."""
        config = pretrained_config(self.model_name)
        if config is not None:
            return dict(vars(config))
        from timm.models import load_model_config_from_hf

        try:
            published, _, _ = load_model_config_from_hf(self.model_name.partition(":")[2])
        except OSError as error:
            raise ParameterError(
                "encoder", "model_name", f"{self.model_name} cannot be loaded from the hub ({error})"
            ) from error
        return dict(published)

    def _build(self) -> tuple[torch.nn.Module, int]:
        network = self._create(self.tile_px)
        patch = getattr(getattr(network, "patch_embed", None), "patch_size", (1, 1))
        if self.tile_px % patch[0]:
            size = self.tile_px // patch[0] * patch[0]
            return self._create(size), size
        return network, self.tile_px

    def _create(self, size: int) -> torch.nn.Module:
        import timm

        classifiers = self._config.get("classifier") or ()
        classifiers = (classifiers,) if isinstance(classifiers, str) else tuple(classifiers)
        tensors = {
            key: tensor
            for key, tensor in read_weights(self.weights_path, self.checkpoint_key).items()
            if not key.startswith(tuple(f"{name}." for name in classifiers))
        }
        # With the same number of classes on both sides, timm loads strictly; it also resizes position embeddings.
        overlay = {"state_dict": tensors, "num_classes": 0}
        options: dict[str, Any] = {"pretrained": True, "pretrained_cfg_overlay": overlay, "num_classes": 0}
        try:
            try:
                network = timm.create_model(self.model_name, img_size=size, **options)
            except TypeError as error:
                if "img_size" not in str(error):
                    raise
                network = timm.create_model(self.model_name, **options)  # convolutional networks accept any size
        except RuntimeError as error:
            reason = str(error).partition("\n")[2] or str(error)
            raise ParameterError(
                "encoder", "weights", f"{self.weights_path}: does not fit {self.model_name} ({reason[:200]})"
            ) from error
        module: torch.nn.Module = network
        return module

    def _default_weights(self) -> Path:
        return hub_weights(self.model_name)

    def _own_normalization(self) -> tuple[Sequence[float], Sequence[float]]:
        return self._config.get("mean") or IMAGENET_MEAN, self._config.get("std") or IMAGENET_STD
