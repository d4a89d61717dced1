"""Licenses of published encoder weights, for model cards. The presets in `configs/encoder` name the same ones."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_NO_COMMERCE = "CC BY-NC-ND 4.0, no commercial use"
_BY_HUB = {
    "1aurent/swin_tiny_patch4_window7_224.CTransPath": "GPL 3.0",
    "1aurent/vit_small_patch16_224.lunit_dino": "Lunit's non-commercial license",
    "1aurent/vit_small_patch8_224.lunit_dino": "Lunit's non-commercial license",
    "MahmoodLab/UNI": _NO_COMMERCE,
    "MahmoodLab/UNI2-h": _NO_COMMERCE,
    "bioptimus/H-optimus-0": "Apache 2.0",
    "bioptimus/H-optimus-1": _NO_COMMERCE,
    "bioptimus/H0-mini": _NO_COMMERCE,
    "histai/hibou-L": "Apache 2.0",
    "histai/hibou-b": "Apache 2.0",
    "kaiko-ai/midnight": "MIT",
    "owkin/phikon-v2": "Owkin's non-commercial license",
    "paige-ai/Virchow2": _NO_COMMERCE,
    "prov-gigapath/prov-gigapath": "Apache 2.0, with terms of use on the hub",
}
# DINOv2-small with its patches resized to 16 px (`encoder=dinov2_vits16`, `dinov2_bins`)
_BY_SHA256 = {"43f91bf0c636d95070fe000706c686e30ff44a3c04b92f5c761de4b17f6d9b8b": "Apache 2.0 (DINOv2)"}


def weights_license(settings: Mapping[str, Any]) -> str | None:
    """License of an encoder's weights; None if prts does not know it.

    Parameters
    ----------
    settings
        The encoder's settings in a bundle.

    Examples
    --------
    >>> weights_license({"name": "timm", "model_name": "vit_base_patch14_reg4_dinov2", "hub": "histai/hibou-b"})
    'Apache 2.0'
    """
    if settings.get("name") == "dino_vits16":
        return "Apache 2.0"
    hub = settings.get("hub") or str(settings.get("model_name", "")).partition(":")[2]
    return _BY_HUB.get(hub) or _BY_SHA256.get(str(settings.get("weights_sha256")))
