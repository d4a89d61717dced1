"""Weights files: find them, read them without running code, and load them into the network."""

from __future__ import annotations

import argparse
import difflib
import os
import re
import urllib.error
import urllib.request
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

import prts._torchvision  # noqa: F401  (must come before timm, which imports torchvision)
from prts.errors import ParameterError

if TYPE_CHECKING:
    from timm.models import PretrainedCfg

_PREFIXES = ("module.", "backbone.")
# Seconds until the hub counts as unreachable. Its own client tries for most of a minute.
_HUB_TIMEOUT = 10.0


def read_weights(path: Path, checkpoint_key: str | None = None) -> dict[str, torch.Tensor]:
    """Read the tensors of a checkpoint as float32, without the prefixes `module.` and `backbone.` of DINO.

    A DINOv2 network saved by `transformers` gets the names of its original (`as_dinov2`).

    Parameters
    ----------
    path
        A `.safetensors` file, or one written by `torch.save`. Only tensors, containers and `argparse.Namespace` (which DINO keeps its
        arguments in) are unpickled: a file with anything else is refused.
    checkpoint_key
        Entry that holds the network, if the file has several ("teacher" in DINO's). A file that holds only tensors needs none.

    Raises
    ------
    ParameterError
        If the file is missing, is not a checkpoint, or has no such entry.
    """
    path = Path(path)
    if not path.is_file():
        raise ParameterError("encoder", "weights", f"{path}: no such file")
    tensors = _read_safetensors(path) if path.suffix == ".safetensors" else _read_checkpoint(path, checkpoint_key)
    out = {}
    if nameless := [key for key in tensors if not isinstance(key, str)]:
        raise ParameterError(
            "encoder", "weights", f"{path}: names a tensor {nameless[0]!r}; names in a checkpoint are text"
        )
    for key, tensor in tensors.items():
        name = key
        while name.startswith(_PREFIXES):
            name = name.split(".", 1)[1]
        out[name] = tensor.float() if tensor.is_floating_point() else tensor
    return as_dinov2(out) if "embeddings.cls_token" in out else out


# Names of `transformers`' Dinov2Model, with and without registers, and of the original, which timm reads.
_TRANSFORMERS = (
    (r"^embeddings\.(cls_token|mask_token|register_tokens)$", r"\1"),
    (r"^embeddings\.position_embeddings$", "pos_embed"),
    (r"^embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    (r"^layernorm\.", "norm."),
    (r"^encoder\.layer\.(\d+)\.", r"blocks.\1."),
    (r"\.attention\.(output\.dense|o_proj)\.", ".attn.proj."),  # before and since version 5
    (r"\.attention\.(attention\.query|q_proj)\.", ".attn.qkv.0."),
    (r"\.attention\.(attention\.key|k_proj)\.", ".attn.qkv.1."),
    (r"\.attention\.(attention\.value|v_proj)\.", ".attn.qkv.2."),
    (r"\.mlp\.gate_proj\.", ".mlp.w12.0."),
    (r"\.mlp\.up_proj\.", ".mlp.w12.1."),
    (r"\.layer_scale([12])\.lambda1$", r".ls\1.gamma"),
    (r"\.mlp\.weights_in\.", ".mlp.w12."),
    (r"\.mlp\.(weights_out|down_proj)\.", ".mlp.w3."),
)
_PART = re.compile(r"^(blocks\.\d+\.(?:attn\.qkv|mlp\.w12))\.(\d)\.(weight|bias)$")


def as_dinov2(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Rename the tensors of a DINOv2 network that `transformers` saved, and join those that the original keeps as one.

    Parameters
    ----------
    tensors
        Under the names of `transformers`.

    Returns
    -------
    The same under the names of the original code.
    """
    out: dict[str, torch.Tensor] = {}
    parts: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in tensors.items():
        for pattern, name in _TRANSFORMERS:
            key = re.sub(pattern, name, key)
        if match := _PART.match(key):
            layer, place, kind = match.groups()
            parts.setdefault(f"{layer}.{kind}", {})[place] = tensor
        else:
            out[key] = tensor
    return out | {key: torch.cat([part[place] for place in sorted(part)]) for key, part in parts.items()}


def _read_safetensors(path: Path) -> dict[str, torch.Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors: dict[str, torch.Tensor] = load_file(path)
    except (SafetensorError, OSError) as error:
        raise ParameterError("encoder", "weights", f"{path}: not a safetensors file ({error})") from error
    return tensors


def _read_checkpoint(path: Path, checkpoint_key: str | None) -> dict[str, torch.Tensor]:
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # the unpickler may raise anything on an arbitrary file
        reason = str(error).partition(".")[0]
        raise ParameterError(
            "encoder", "weights", f"{path}: not a checkpoint that can be read safely ({reason})"
        ) from error
    if isinstance(content, dict) and checkpoint_key in content:
        content = content[checkpoint_key]
    if not isinstance(content, dict) or not content or not all(isinstance(t, torch.Tensor) for t in content.values()):
        keys = _some(sorted(map(str, content))) if isinstance(content, dict) else type(content).__name__
        raise ParameterError(
            "encoder",
            "weights",
            f"{path}: has no tensors under {checkpoint_key!r}, it holds {keys}; set `checkpoint_key` to the entry with the network",
        )
    return content


def load_strictly(network: torch.nn.Module, tensors: dict[str, torch.Tensor], path: Path) -> None:
    """Load tensors whose names and shapes are exactly those of the network.

    Raises
    ------
    ParameterError
        If keys are missing, unexpected or of another shape; names some of them.
    """
    wanted = network.state_dict()
    faults = {
        "lacks": sorted(wanted.keys() - tensors.keys()),
        "also has": sorted(tensors.keys() - wanted.keys()),
        "has other shapes for": [
            f"{key} {tuple(tensors[key].shape)} instead of {tuple(tensor.shape)}"
            for key, tensor in wanted.items()
            if key in tensors and tensors[key].shape != tensor.shape
        ],
    }
    if any(faults.values()):
        told = "; ".join(f"{what} {_some(keys)}" for what, keys in faults.items() if keys)
        raise ParameterError(
            "encoder", "weights", f"{path}: does not fit this network: it {told}; give the encoder's own checkpoint"
        )
    network.load_state_dict(tensors)


def _some(keys: list[str], n: int = 3) -> str:
    return ", ".join(keys[:n]) + (f" and {len(keys) - n} more" if len(keys) > n else "")


def dino_position_embedding(embedding: torch.Tensor, grid: int) -> torch.Tensor:
    """Interpolate a position embedding to another grid as DINO's and HIPT's own `interpolate_pos_encoding` does.

    Bicubic, with the scale taken from grid + 0.1. Timm's resampling (antialiased, scale from the sizes) would change the [CLS] token by
    about 1%; the weights were trained with this one.

    Parameters
    ----------
    embedding
        (1, 1 + n * n, channels), the class token first.
    grid
        Patches along a side of the tile.

    Returns
    -------
    (1, 1 + grid * grid, channels); the same values if n equals `grid`.
    """
    n = round((embedding.shape[1] - 1) ** 0.5)
    if n == grid:
        return embedding
    patches = embedding[:, 1:].reshape(1, n, n, -1).permute(0, 3, 1, 2)
    scale = (grid + 0.1) / n
    patches = F.interpolate(patches, scale_factor=(scale, scale), mode="bicubic")
    return torch.cat([embedding[:, :1], patches.permute(0, 2, 3, 1).flatten(1, 2)], dim=1)


def pretrained_config(model_name: str) -> PretrainedCfg | None:
    """Timm's record of a model; None for a model on the hub (`hf-hub:owner/name`), which includes its own.

    Raises
    ------
    ParameterError
        If timm does not know the model; the message suggests similar names.
    """
    import timm
    from timm.models import get_pretrained_cfg

    if _hub_id(model_name) is not None:
        return None
    if not timm.is_model(model_name.partition(".")[0]) or (
        "." in model_name and model_name not in timm.list_models(pretrained=True)
    ):
        known = timm.list_models(pretrained=True) + timm.list_models()
        near = difflib.get_close_matches(model_name, known, n=3, cutoff=0.5)
        hint = f"did you mean {', '.join(near)}?" if near else "timm.list_models() lists all"
        raise ParameterError("encoder", "model_name", f"timm has no model {model_name!r}; {hint}")
    config: PretrainedCfg | None = get_pretrained_cfg(model_name)
    return config


def cached_hub_weights(model_name: str) -> Path | None:
    """The weights file of a timm model in the local cache of the Hugging Face hub, if it is there."""
    from huggingface_hub import try_to_load_from_cache

    repository, names = _hub_files(model_name)
    for name in names:
        if isinstance(cached := try_to_load_from_cache(repository, name), str):
            return Path(cached)
    return None


def hub_weights(model_name: str) -> Path:
    """The weights file of a timm model, from the local cache of the Hugging Face hub or downloaded into it.

    Raises
    ------
    ParameterError
        If the hub cannot be reached or does not have the file; the message says how to do without it.
    """
    from huggingface_hub import hf_hub_download, hf_hub_url

    if (cached := cached_hub_weights(model_name)) is not None:
        return cached
    repository, names = _hub_files(model_name)
    instead = (
        f"download https://huggingface.co/{repository} on a machine with network access and give the file as `weights`"
    )
    if os.environ.get("HF_HUB_OFFLINE", "0") in ("", "0"):
        try:
            head = urllib.request.Request(hf_hub_url(repository, names[0]), method="HEAD")
            urllib.request.urlopen(head, timeout=_HUB_TIMEOUT).close()
        except urllib.error.HTTPError:
            pass  # it answers; the client below reports the error
        except OSError as error:
            raise ParameterError(
                "encoder", "weights", f"{model_name} is not in the cache and the hub cannot be reached; {instead}"
            ) from error
    failure: OSError | None = None
    for name in names:
        try:
            return Path(hf_hub_download(repository, name))
        except OSError as error:
            failure = failure or error
    reason = str(failure).strip().partition("\n")[0]
    raise ParameterError("encoder", "weights", f"{model_name} cannot be downloaded ({reason}); {instead}") from failure


def _hub_files(model_name: str) -> tuple[str, list[str]]:
    """Repository of a model on the hub, and the possible names of its weights file."""
    config = pretrained_config(model_name)
    repository = _hub_id(model_name) if config is None else config.hf_hub_id
    if not repository:
        raise ParameterError(
            "encoder", "weights", f"timm has no published weights for {model_name}; give a file as `weights`"
        )
    return repository, [(config and config.hf_hub_filename) or "model.safetensors", "pytorch_model.bin"]


def _hub_id(model_name: str) -> str | None:
    """`owner/name` of `hf-hub:owner/name`."""
    prefix, colon, name = model_name.partition(":")
    return name if colon and prefix in ("hf-hub", "hf_hub") else None
