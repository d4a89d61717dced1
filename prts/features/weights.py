"""Weights files: found, read without running code from them, and fitted to the network."""

from __future__ import annotations

import argparse
import difflib
import os
import urllib.error
import urllib.request
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from prts.errors import InputError

if TYPE_CHECKING:
    from timm.models import PretrainedCfg

_PREFIXES = ("module.", "backbone.")
# Seconds to wait for the hub before believing that there is none. Its own client tries for most of a minute.
_HUB_TIMEOUT = 10.0


def read_weights(path: Path, checkpoint_key: str | None = None) -> dict[str, torch.Tensor]:
    """Read the tensors of a checkpoint, float32, without the prefixes `module.` and `backbone.` that DINO leaves.

    Parameters
    ----------
    path
        A `.safetensors` file or what `torch.save` wrote. Only tensors, containers and `argparse.Namespace` (which DINO keeps its
        arguments in) are unpickled: a file that asks for more is refused.
    checkpoint_key
        Entry that holds the network, where the file has several ("teacher" in DINO's). A file of tensors alone needs none.

    Raises
    ------
    InputError
        If the file is missing, no checkpoint, or has no such entry.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"encoder.weights: {path}: no such file")
    tensors = _read_safetensors(path) if path.suffix == ".safetensors" else _read_checkpoint(path, checkpoint_key)
    out = {}
    if nameless := [key for key in tensors if not isinstance(key, str)]:
        raise InputError(f"encoder.weights: {path}: names a tensor {nameless[0]!r}; a network's checkpoint has text")
    for key, tensor in tensors.items():
        name = key
        while name.startswith(_PREFIXES):
            name = name.split(".", 1)[1]
        out[name] = tensor.float() if tensor.is_floating_point() else tensor
    return out


def _read_safetensors(path: Path) -> dict[str, torch.Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors: dict[str, torch.Tensor] = load_file(path)
    except (SafetensorError, OSError) as error:
        raise InputError(f"encoder.weights: {path}: is no safetensors file ({error})") from error
    return tensors


def _read_checkpoint(path: Path, checkpoint_key: str | None) -> dict[str, torch.Tensor]:
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # the unpickler raises what the bytes of a foreign file lead it to
        reason = str(error).partition(".")[0]
        raise InputError(f"encoder.weights: {path}: is no checkpoint that can be read safely ({reason})") from error
    if isinstance(content, dict) and checkpoint_key in content:
        content = content[checkpoint_key]
    if not isinstance(content, dict) or not content or not all(isinstance(t, torch.Tensor) for t in content.values()):
        keys = _some(sorted(map(str, content))) if isinstance(content, dict) else type(content).__name__
        raise InputError(
            f"encoder.weights: {path}: has no tensors under {checkpoint_key!r}, it holds {keys}; "
            "set encoder.checkpoint_key to the entry with the network"
        )
    return content


def load_strictly(network: torch.nn.Module, tensors: dict[str, torch.Tensor], path: Path) -> None:
    """Load tensors whose names and shapes are exactly the network's.

    Raises
    ------
    InputError
        Naming some of the keys that are missing, too many or of another shape.
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
        raise InputError(
            f"encoder.weights: {path}: is not for this network: it {told}; the encoder's own checkpoint is wanted"
        )
    network.load_state_dict(tensors)


def _some(keys: list[str], n: int = 3) -> str:
    return ", ".join(keys[:n]) + (f" and {len(keys) - n} more" if len(keys) > n else "")


def dino_position_embedding(embedding: torch.Tensor, grid: int) -> torch.Tensor:
    """Interpolate a position embedding to another grid as DINO's and HIPT's own `interpolate_pos_encoding` does.

    Bicubic, with the scale taken from grid + 0.1 as there: timm's resampling (antialiased, scale from the sizes) differs from it by about
    1 % in the [CLS] token, and the weights were made with this one.

    Parameters
    ----------
    embedding
        (1, 1 + n * n, channels), the class token's first.
    grid
        Patches along a side of the tile.

    Returns
    -------
    (1, 1 + grid * grid, channels); the same values where n is `grid` already.
    """
    n = round((embedding.shape[1] - 1) ** 0.5)
    if n == grid:
        return embedding
    patches = embedding[:, 1:].reshape(1, n, n, -1).permute(0, 3, 1, 2)
    scale = (grid + 0.1) / n
    patches = F.interpolate(patches, scale_factor=(scale, scale), mode="bicubic")
    return torch.cat([embedding[:, :1], patches.permute(0, 2, 3, 1).flatten(1, 2)], dim=1)


def pretrained_config(model_name: str) -> PretrainedCfg | None:
    """Timm's record of a model by name; None for a model of the hub (`hf-hub:owner/name`), which carries its own.

    Raises
    ------
    InputError
        If timm knows no such model, with the nearest names.
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
        hint = f"did you mean {', '.join(near)}?" if near else "timm.list_models() names them"
        raise InputError(f"encoder.model_name: timm has no model {model_name!r}; {hint}")
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
    InputError
        If the hub cannot be reached or does not give the file, naming `encoder.weights` as the way without it.
    """
    from huggingface_hub import hf_hub_download, hf_hub_url

    if (cached := cached_hub_weights(model_name)) is not None:
        return cached
    repository, names = _hub_files(model_name)
    instead = f"download it where there is a network and give it as encoder.weights=FILE (https://huggingface.co/{repository})"
    if os.environ.get("HF_HUB_OFFLINE", "0") in ("", "0"):
        try:
            head = urllib.request.Request(hf_hub_url(repository, names[0]), method="HEAD")
            urllib.request.urlopen(head, timeout=_HUB_TIMEOUT).close()
        except urllib.error.HTTPError:
            pass  # it answers; the client below knows what the answer means
        except OSError as error:
            raise InputError(
                f"encoder: weights of {model_name} are not here and the hub cannot be reached; {instead}"
            ) from error
    failure: OSError | None = None
    for name in names:
        try:
            return Path(hf_hub_download(repository, name))
        except OSError as error:
            failure = failure or error
    reason = str(failure).strip().partition("\n")[0]
    raise InputError(f"encoder: weights of {model_name} cannot be downloaded ({reason}); {instead}") from failure


def _hub_files(model_name: str) -> tuple[str, list[str]]:
    """Repository of a model on the hub, and the names its weights may have there."""
    config = pretrained_config(model_name)
    repository = _hub_id(model_name) if config is None else config.hf_hub_id
    if not repository:
        raise InputError(
            f"encoder.model_name: {model_name} has no published weights in timm; give a file as encoder.weights=FILE"
        )
    return repository, [(config and config.hf_hub_filename) or "model.safetensors", "pytorch_model.bin"]


def _hub_id(model_name: str) -> str | None:
    """`owner/name` of `hf-hub:owner/name`."""
    prefix, colon, name = model_name.partition(":")
    return name if colon and prefix in ("hf-hub", "hf_hub") else None
