"""Encoders: what turns the 128 um tile of a nucleus into a global and a local vector.

The token encoders are pretrained networks of timm (`prts.features.tokens` has what they share); `prts.features.classical` is the encoder
that needs no weights. A bundle's record makes its encoder again: `encoder_from_settings`.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from prts.errors import InputError
from prts.features.classical import Classical
from prts.features.tokens import Compile, Floats, Precision, Sampling, TokenEncoder
from prts.features.weights import (
    cached_hub_weights,
    dino_position_embedding,
    hub_weights,
    load_strictly,
    pretrained_config,
    read_weights,
)
from prts.io.cache import sha256_file

logger = logging.getLogger(__name__)

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
_HIPT = "https://github.com/mahmoodlab/HIPT"


class Encoder(Protocol):
    """What extraction, bundles and the command line know of an encoder."""

    name: str
    tile_px: int
    mpp: float
    pooling: str
    batch_size: int

    @property
    def global_width(self) -> int:
        """Width of the global vector (after `load`)."""
        ...

    @property
    def local_width(self) -> int:
        """Width of the local vector (after `load`)."""
        ...

    @property
    def weights_sha256(self) -> str | None:
        """SHA-256 of the weights file; None for an encoder without weights."""
        ...

    def settings(self) -> dict[str, Any]:
        """Everything that changes the features, JSON-like: `encoder_from_settings` makes the encoder again from it."""
        ...

    def load(self) -> None:
        """Read the weights; done once, at the first call."""
        ...

    def encode(self, tiles: NDArray[np.uint8], polygons: NDArray[np.object_]) -> tuple[Floats, Floats]:
        """Global (b, G) and local (b, L) vectors of tiles (b, 256, 256, 3) and polygons (b,) in pixels of their tile."""
        ...


class ViT256(TokenEncoder):
    """ViT-S/16 at 256 px from a DINO checkpoint file, HIPT's `vit256_small_dino.pth` in the paper.

    Parameters
    ----------
    weights
        Checkpoint file, `.pth` or `.safetensors`.
    mean, std
        Normalisation of red, green and blue, 0 to 1.
    checkpoint_key
        Entry of the checkpoint that holds the network.
    pooling
        Which patch tokens make the local vector: `nucleus`, those that the nucleus overlaps (paper), or `center2x2` (released code).
    local_width
        192: adjacent channels are averaged (released code); None: all 384 are kept.
    sampling
        `exact`, a tile around each nucleus (paper), or `grid`, a tile every `stride` px whose vectors the nuclei share.
    stride
        px at 0.5 um between the tiles of the grid, 16 to 256.
    precision
        `bf16`, `fp32`, or `auto`: bf16 where the processor computes in it.
    device
        `auto` (CUDA if there is one), or what torch calls it.
    batch_size
        Tiles at a time; None: 16 on a CPU, 128 elsewhere.
    compile
        Whether torch compiles the network first; `auto`: on a CPU, where there are tiles enough to pay for it.

    Raises
    ------
    InputError
        If an option has no such value; on use, if the weights are missing or for another network.
    """

    name = "vit256"
    _WIDTH = 384

    def __init__(
        self,
        weights: str | Path | None = None,
        mean: Sequence[float] = (0.5, 0.5, 0.5),
        std: Sequence[float] = (0.5, 0.5, 0.5),
        checkpoint_key: str | None = "teacher",
        pooling: str = "nucleus",
        local_width: int | None = 192,
        sampling: Sampling = "exact",
        stride: int = 128,
        precision: Precision = "auto",
        device: str = "auto",
        batch_size: int | None = None,
        compile: Compile = "auto",
    ) -> None:
        super().__init__(
            weights=weights,
            mean=mean,
            std=std,
            checkpoint_key=checkpoint_key,
            pooling=pooling,
            pair_channels=_pairs(local_width, self._WIDTH),
            sampling=sampling,
            stride=stride,
            precision=precision,
            device=device,
            batch_size=batch_size,
            compile=compile,
        )

    @property
    def global_width(self) -> int:
        """384, known without the weights."""
        return self._WIDTH

    @property
    def local_width(self) -> int:
        """192, or 384 if channels are not paired."""
        return self._WIDTH // 2 if self.pair_channels else self._WIDTH

    def _build(self) -> tuple[torch.nn.Module, int]:
        from timm.models.vision_transformer import VisionTransformer

        network = VisionTransformer(
            img_size=self.tile_px, patch_size=16, embed_dim=self._WIDTH, num_heads=6, num_classes=0
        )
        # A DINO checkpoint carries the projection head of its training beside the backbone.
        tensors = {
            key: tensor
            for key, tensor in read_weights(self.weights_path, self.checkpoint_key).items()
            if not key.startswith("head.")
        }
        embedding = tensors.get("pos_embed")
        if embedding is not None and embedding.ndim == 3 and embedding.shape[::2] == (1, self._WIDTH):
            tensors["pos_embed"] = dino_position_embedding(embedding, self.tile_px // 16)
        load_strictly(network, tensors, self.weights_path)
        return network, self.tile_px

    def _default_weights(self) -> Path:
        raise InputError(f"encoder.weights: not given{self._where()}")

    def _where(self) -> str:
        return f"; download HIPT's vit256_small_dino.pth ({_HIPT}) and give it as encoder.weights=FILE"


class Timm(TokenEncoder):
    """Any network of timm, or of the Hugging Face hub in timm's format, that has patch tokens or a feature map.

    Parameters
    ----------
    model_name
        Timm's name, such as `vit_base_patch16_224.augreg_in21k`, or `hf-hub:owner/name`.
    weights
        File to read instead of the published weights.
    mean, std
        Normalisation; None: what the model was published with.
    checkpoint_key
        Entry of the weights file that holds the network, if it has several.
    pooling
        As for `ViT256`.
    pair_channels
        Average adjacent channels of the local vector; else all are kept.
    sampling, stride, precision, device, batch_size, compile
        As for `ViT256`.

    Raises
    ------
    InputError
        If timm knows no such model or an option has no such value; on use, if weights cannot be had or do not fit, or the network gives no
        grid of tokens.

    Notes
    -----
    Position embeddings are interpolated to 256 px by timm. Where 256 is no multiple of the patch (14 px), tiles are brought to the next
    smaller size that is (252).
    """

    name = "timm"

    def __init__(
        self,
        model_name: str,
        weights: str | Path | None = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        checkpoint_key: str | None = None,
        pooling: str = "nucleus",
        pair_channels: bool = True,
        sampling: Sampling = "exact",
        stride: int = 128,
        precision: Precision = "auto",
        device: str = "auto",
        batch_size: int | None = None,
        compile: Compile = "auto",
    ) -> None:
        super().__init__(
            weights=weights,
            mean=mean,
            std=std,
            checkpoint_key=checkpoint_key,
            pooling=pooling,
            pair_channels=pair_channels,
            sampling=sampling,
            stride=stride,
            precision=precision,
            device=device,
            batch_size=batch_size,
            compile=compile,
        )
        self.model_name = model_name

    def settings(self) -> dict[str, Any]:
        """Everything that changes the features."""
        return {**super().settings(), "model_name": self.model_name}

    @cached_property
    def _config(self) -> dict[str, Any]:
        """What the model was published with: normalisation, name of the classifier."""
        config = pretrained_config(self.model_name)
        if config is not None:
            return dict(vars(config))
        from timm.models import load_model_config_from_hf

        try:
            published, _, _ = load_model_config_from_hf(self.model_name.partition(":")[2])
        except OSError as error:
            raise InputError(f"encoder.model_name: {self.model_name} cannot be had from the hub ({error})") from error
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
        # With as many classes on both sides timm loads strictly; it also brings position embeddings to the size.
        overlay = {"state_dict": tensors, "num_classes": 0}
        options: dict[str, Any] = {"pretrained": True, "pretrained_cfg_overlay": overlay, "num_classes": 0}
        try:
            try:
                network = timm.create_model(self.model_name, img_size=size, **options)
            except TypeError as error:
                if "img_size" not in str(error):
                    raise
                network = timm.create_model(self.model_name, **options)  # convolutional: takes any size
        except RuntimeError as error:
            reason = str(error).partition("\n")[2] or str(error)
            raise InputError(
                f"encoder.weights: {self.weights_path}: is not for {self.model_name} ({reason[:200]})"
            ) from error
        module: torch.nn.Module = network
        return module

    def _default_weights(self) -> Path:
        return hub_weights(self.model_name)

    def _own_normalisation(self) -> tuple[Sequence[float], Sequence[float]]:
        return self._config.get("mean") or IMAGENET_MEAN, self._config.get("std") or IMAGENET_STD


class DinoViTS16(Timm):
    """DINO's own ViT-S/16 (natural images), whose weights timm downloads from the Hugging Face hub.

    Parameters
    ----------
    weights
        File to read instead of downloading.
    mean, std
        Normalisation; those of ImageNet.
    checkpoint_key
        Entry of the weights file that holds the network, if it has several.
    pooling, local_width, sampling, stride, precision, device, batch_size, compile
        As for `ViT256`.
    """

    name = "dino_vits16"
    _WIDTH = 384

    def __init__(
        self,
        weights: str | Path | None = None,
        mean: Sequence[float] = IMAGENET_MEAN,
        std: Sequence[float] = IMAGENET_STD,
        checkpoint_key: str | None = None,
        pooling: str = "nucleus",
        local_width: int | None = 192,
        sampling: Sampling = "exact",
        stride: int = 128,
        precision: Precision = "auto",
        device: str = "auto",
        batch_size: int | None = None,
        compile: Compile = "auto",
    ) -> None:
        super().__init__(
            "vit_small_patch16_224.dino",
            weights=weights,
            mean=mean,
            std=std,
            checkpoint_key=checkpoint_key,
            pooling=pooling,
            pair_channels=_pairs(local_width, self._WIDTH),
            sampling=sampling,
            stride=stride,
            precision=precision,
            device=device,
            batch_size=batch_size,
            compile=compile,
        )


def _pairs(local_width: int | None, width: int) -> bool:
    if local_width not in (None, width // 2):
        raise InputError(
            f"encoder.local_width: {local_width} cannot be; {width // 2} (channel pairs) or null (all {width})"
        )
    return local_width is not None


def encoder_from_settings(settings: dict[str, Any], weights: Path | None = None, **runtime: Any) -> Encoder:
    """The encoder that `settings()` described, for a bundle that is used elsewhere.

    Parameters
    ----------
    settings
        What `Encoder.settings` returned.
    weights
        The weights file, for the encoders that need one.
    runtime
        `device`, `batch_size` and `compile`, which do not belong to the settings.

    Returns
    -------
    The encoder, not loaded yet. Where the settings say bf16 and this processor does not compute in it, fp32 takes its place: the features
    then differ by bf16's rounding, about 1 %, which is logged as a warning.

    Raises
    ------
    InputError
        If the encoder is unknown or of another version, its settings lack something, or the weights file is missing or another one.
    """
    try:
        return _from_settings(settings, weights, runtime)
    except (LookupError, TypeError, ValueError) as error:
        raise InputError(
            f"encoder: the model's settings of it are not as prts writes them ({type(error).__name__}: {error}); train again"
        ) from error


def _from_settings(settings: dict[str, Any], weights: Path | None, runtime: dict[str, Any]) -> Encoder:
    name = settings.get("name")
    if name == Classical.name:
        if settings.get("version") != Classical.version:
            raise InputError(
                f"encoder: the model was trained on version {settings.get('version')} of the classical features, this prts makes version "
                f"{Classical.version}; predict with the prts that trained it, or train again"
            )
        return Classical(pooling=settings["pooling"])
    if name not in (ViT256.name, DinoViTS16.name, Timm.name):
        raise InputError(
            f"encoder: {name!r} is unknown to this version of prts; it knows vit256, dino_vits16, timm and classical"
        )
    common = {
        "weights": weights,
        "mean": settings["mean"],
        "std": settings["std"],
        "checkpoint_key": settings["checkpoint_key"],
        "pooling": settings["pooling"],
        # bundles of before there was a choice have neither key
        "sampling": settings.get("sampling", "exact"),
        "stride": settings.get("stride", 128),
        "precision": "auto" if settings["precision"] == "bf16" else "fp32",
        **runtime,
    }
    encoder: TokenEncoder
    if name == Timm.name:
        encoder = Timm(settings["model_name"], pair_channels=settings["pair_channels"], **common)
    else:
        kind = ViT256 if name == ViT256.name else DinoViTS16
        encoder = kind(local_width=192 if settings["pair_channels"] else None, **common)
    if encoder.weights_sha256 != settings["weights_sha256"]:
        raise InputError(
            f"encoder.weights: {encoder.weights_path} has sha256 {encoder.weights_sha256}, the model was trained with "
            f"{settings['weights_sha256']}; give that file as encoder.weights=FILE"
        )
    if encoder.precision != settings["precision"]:
        logger.warning(
            "encoder: the model was trained on features in %s, which %s does not compute in: %s takes its place, and features differ by "
            "about 1 %%",
            settings["precision"],
            encoder.device,
            encoder.precision,
        )
    return encoder


def weights_of(settings: dict[str, Any], file: str | None) -> tuple[str, str, str]:
    """What `prts doctor` says of the weights that a bundle's encoder needs: PASS or WARN, a name, a sentence.

    Parameters
    ----------
    settings
        The encoder's settings in the bundle.
    file
        The weights file that training read, or None.
    """
    name, sha256 = settings["name"], settings.get("weights_sha256")
    if sha256 is None:
        return "PASS", "weights", f"the encoder {name} needs none"
    if file is not None and Path(file).is_file() and sha256_file(Path(file)) == sha256:
        return "PASS", "weights", f"{name}: {file}"
    if name == ViT256.name:
        called = "" if file is None else f" {Path(file).name}"
        return (
            "WARN",
            "weights",
            f"{name} is given its file{called} at prediction: encoder.weights=FILE with sha256 {sha256}",
        )
    model_name = settings["model_name"]
    path = cached_hub_weights(model_name)
    if path is None:
        return (
            "WARN",
            "weights",
            f"{model_name} is not on this machine: fetched from the hub at prediction, or encoder.weights=FILE",
        )
    if sha256_file(path) != sha256:
        return (
            "WARN",
            "weights",
            f"{path} is not the file the model was trained with: encoder.weights=FILE with sha256 {sha256}",
        )
    return "PASS", "weights", f"{model_name}: {path}"
