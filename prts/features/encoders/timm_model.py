"""Any timm network, or one on the Hugging Face hub in timm's format."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field

from prts.errors import ParameterError, did_you_mean
from prts.features.encoders import encoders
from prts.features.encoders.base import checked, signature_of
from prts.features.encoders.token_settings import IMAGENET_MEAN, IMAGENET_STD, TokenSettings
from prts.features.encoders.tokens import TokenEncoder
from prts.features.weights import cached_hub_weights, hub_weights, pretrained_config, read_weights

# Layers by name, as in `timm.layers`: a config and a bundle hold text, never code.
_MLP_LAYERS = ("Mlp", "GluMlp", "SwiGLU", "SwiGLUPacked")
# Arguments that say where weights come from or what is returned, which is settled here.
_NOT_OF_THE_NETWORK = ("num_classes", "img_size", "features_only", "out_indices", "in_chans", "kwargs_filter")


@dataclass(frozen=True, kw_only=True)
class TimmSettings(TokenSettings):
    """Settings of `Timm` that extend `TokenSettings`."""

    model_name: str
    hub: Annotated[str, Field(pattern=r"^[^/\s]+/[^/\s]+$", description="owner/name")] | None = None
    kwargs: dict[str, Any] | None = None
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
        File to read instead of the published weights. The network is then built without the hub, unless `model_name` is on it. Weights of
        DINOv2 in the layout of `transformers` are recognized.
    hub
        `owner/name` of a repository with weights for `model_name`.
    kwargs
        Arguments of the network's constructor, such as `init_values`, `reg_tokens` or `mlp_ratio`. `mlp_layer` is the name of a layer
        (Mlp, GluMlp, SwiGLU, SwiGLUPacked), `act_layer` one of timm's (gelu, silu), `embed_layer` can be ConvStem (CTransPath).
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
        self.model_name, self.hub, self.kwargs = given.model_name, given.hub, dict(given.kwargs or {})
        _check_kwargs(self.kwargs)

    def settings(self) -> dict[str, Any]:
        """Everything that affects the features, and where their weights are."""
        return {
            **super().settings(),
            "model_name": self.model_name,
            **({"hub": self.hub} if self.hub else {}),
            **({"kwargs": self.kwargs} if self.kwargs else {}),
        }

    @classmethod
    def find_weights(cls, settings: Mapping[str, Any]) -> Path | None:
        """The file in the local cache of the Hugging Face hub."""
        return cached_hub_weights(_published(settings["model_name"], settings.get("hub")))

    @classmethod
    def weights_hint(cls, settings: Mapping[str, Any]) -> str:
        """Say that the hub may have them."""
        published = settings.get("hub") or settings["model_name"]
        return f"is not here; prediction downloads {published} from the hub, or takes a file as the encoder's weights"

    @classmethod
    def _own_arguments(cls, settings: Mapping[str, Any]) -> dict[str, Any]:
        return {
            "model_name": settings["model_name"],
            "hub": settings.get("hub"),
            "kwargs": settings.get("kwargs"),
            "pair_channels": settings["pair_channels"],
        }

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
        options: dict[str, Any] = {
            **_built(self.kwargs),
            "pretrained": True,
            "pretrained_cfg_overlay": overlay,
            "num_classes": 0,
        }
        try:
            try:
                network = timm.create_model(self.model_name, img_size=size, **options)
            except TypeError as error:
                if "img_size" not in str(error):
                    raise
                network = timm.create_model(self.model_name, **options)  # convolutional networks accept any size
        except (TypeError, KeyError, AssertionError, ValueError) as error:
            if not self.kwargs:
                raise
            reason = str(error).partition("\n")[0]
            raise ParameterError(
                "encoder", "kwargs", f"{self.model_name} cannot be built with these ({reason})"
            ) from error
        except RuntimeError as error:
            reason = str(error).partition("\n")[2] or str(error)
            raise ParameterError(
                "encoder", "weights", f"{self.weights_path}: does not fit {self.model_name} ({reason[:200]})"
            ) from error
        module: torch.nn.Module = network
        return module

    def _default_weights(self) -> Path:
        return hub_weights(_published(self.model_name, self.hub))

    def _own_normalization(self) -> tuple[Sequence[float], Sequence[float]]:
        return self._config.get("mean") or IMAGENET_MEAN, self._config.get("std") or IMAGENET_STD


def _published(model_name: str, hub: str | None) -> str:
    """The name under which weights are found."""
    return model_name if hub is None else f"hf-hub:{hub}"


def _check_kwargs(kwargs: Mapping[str, Any]) -> None:
    """Refuse arguments that are not the network's, and layers with unknown names, before weights are read."""
    import timm

    taken = {*inspect.signature(timm.create_model).parameters, *_NOT_OF_THE_NETWORK}
    for name, value in kwargs.items():
        if name in taken or name.startswith(("pretrained", "feature")):
            raise ParameterError(
                "encoder", "kwargs", f"{name} is not an argument of the network but set by prts; omit it"
            )
        known = {"mlp_layer": _MLP_LAYERS, "embed_layer": ("ConvStem",)}.get(name)
        if known is not None and value not in known:
            raise ParameterError(
                "encoder",
                "kwargs",
                f"{name} {value!r} is not known{did_you_mean(str(value), known)}; choose one of {', '.join(known)}",
            )


def _built(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments with layers in place of their names."""
    import timm.layers

    from prts.features.conv_stem import ConvStem

    built = dict(kwargs)
    if "mlp_layer" in built:
        built["mlp_layer"] = getattr(timm.layers, built["mlp_layer"])
    if "embed_layer" in built:
        built["embed_layer"] = ConvStem
    return built
