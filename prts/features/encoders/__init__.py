"""Encoders: each turns the tile around a nucleus into a global and a local feature vector.

An encoder is one file of this package (or of another one, through the entry point group `prts.encoders`) with a class that derives from
`Encoder` and is registered by name, and one file `configs/encoder/<name>.yaml`:

>>> from prts.features.encoders import Encoder, encoders
>>> encoders.names()
['classical', 'dino_vits16', 'timm', 'vit256']

Every registered encoder is also an attribute of this module, as in `prts.encoders.vit256("vit256.pth")`. For this reason, a file must not
have the same name as its encoder: importing it would hide the encoder.

>>> from prts.features import encoders as module
>>> module.classical(tile_px=128).tile_px
128
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prts.errors import ParameterError
from prts.features.encoders.base import Encoder, WeightsStatus
from prts.registry import Registry

if TYPE_CHECKING:
    from prts.features.encoders.dino import DinoViTS16
    from prts.features.encoders.handcrafted import Classical
    from prts.features.encoders.hipt import ViT256
    from prts.features.encoders.timm_model import Timm
    from prts.features.encoders.token_settings import IMAGENET_MEAN, IMAGENET_STD
    from prts.features.encoders.tokens import TokenEncoder

    classical, dino_vits16, timm, vit256 = Classical, DinoViTS16, Timm, ViT256

__all__ = [
    "IMAGENET_MEAN",
    "IMAGENET_STD",
    "Classical",
    "DinoViTS16",
    "Encoder",
    "Timm",
    "TokenEncoder",
    "ViT256",
    "WeightsStatus",
    "classical",
    "dino_vits16",
    "encoder_from_settings",
    "encoders",
    "timm",
    "vit256",
    "weights_status",
]

encoders: Registry[Encoder] = Registry("encoder", package=__name__, group="prts.encoders")

# Imported on first use, because these modules import torch, which listing the encoders does not need.
_LAZY = {
    "ViT256": "hipt",
    "DinoViTS16": "dino",
    "Timm": "timm_model",
    "Classical": "handcrafted",
    "TokenEncoder": "tokens",
    "IMAGENET_MEAN": "token_settings",
    "IMAGENET_STD": "token_settings",
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(f"{__name__}.{_LAZY[name]}"), name)
    if not name.startswith("_") and name in encoders:
        return encoders[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def encoder_from_settings(settings: Mapping[str, Any], weights: Path | None = None, **runtime: Any) -> Encoder:
    """Rebuild an encoder from its `Encoder.settings`, such as the encoder of a bundle.

    Parameters
    ----------
    settings
        Result of `Encoder.settings`.
    weights
        The weights file, for encoders that need one.
    runtime
        `device`, `batch_size` and `compile`, which are not part of the settings, and the file `adapter`, if they name one. Encoders
        without such an argument ignore it.

    Returns
    -------
    The encoder, not loaded yet. If the settings say bf16 and this processor does not support it, the encoder uses fp32 and logs a
    warning: features then differ by bf16's rounding, about 1%.

    Raises
    ------
    ParameterError
        If the encoder is not registered or has another version, its settings are incomplete, or the weights file is missing or differs.
    """
    try:
        return _class_of(settings).from_settings(settings, weights, **runtime)
    except (LookupError, TypeError, ValueError) as error:
        raise ParameterError(
            "encoder",
            "",
            f"the model's encoder settings are damaged ({type(error).__name__}: {error}); train the model again",
        ) from error


def weights_status(settings: Mapping[str, Any], file: str | None = None) -> WeightsStatus:
    """Whether the weights of a bundle's encoder are on this machine.

    Parameters
    ----------
    settings
        The encoder's settings in the bundle.
    file
        The weights file used in training, or None.
    """
    return _class_of(settings).weights_status(settings, file)


def _class_of(settings: Mapping[str, Any]) -> type[Encoder]:
    name = settings.get("name")
    if name == "none":
        from prts.features.no_encoder import NoEncoder

        return NoEncoder
    if not isinstance(name, str):
        raise ParameterError("encoder", "", f"the model's encoder settings name no encoder ({name!r})")
    return encoders[name]
