"""Low-rank updates of an encoder's linear layers (LoRA, Hu et al. 2022), trained beside its frozen weights and merged into them to predict.

An adapter is a `.safetensors` file with two matrices for each adapted layer, `<layer>.A` (rank, inputs) and `<layer>.B` (outputs, rank),
and with `rank` and `alpha` in its metadata. The layer's weights become W + alpha / rank * B A.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from prts.errors import ParameterError

_KIND = "prts adapter 1"


class LowRank(nn.Module):
    """A linear layer with a low-rank update of its weights, of which only the update is trained.

    Parameters
    ----------
    layer
        The layer.
    rank
        Rank of the update.
    alpha
        The update is scaled by `alpha / rank`. It starts at zero.
    """

    def __init__(self, layer: nn.Linear, rank: int, alpha: float) -> None:
        super().__init__()
        self.layer, self.scale = layer.requires_grad_(False), alpha / rank
        self.A = nn.Parameter(torch.empty(rank, layer.in_features))
        self.B = nn.Parameter(torch.zeros(layer.out_features, rank))
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))

    @property
    def weight(self) -> Tensor:
        """The updated weights, for networks that read them instead of calling the layer."""
        updated: Tensor = self.layer.weight + self.scale * self.B @ self.A
        return updated

    @property
    def bias(self) -> Tensor | None:
        """The layer's own."""
        return self.layer.bias

    def forward(self, x: Tensor) -> Tensor:
        """(..., inputs) -> (..., outputs)."""
        update: Tensor = nn.functional.linear(nn.functional.linear(x, self.A), self.B)
        updated: Tensor = self.layer(x) + self.scale * update
        return updated


def add_adapter(network: nn.Module, *, rank: int, alpha: float, blocks: int) -> None:
    """Give the linear layers of a network's last transformer blocks a low-rank update, and freeze everything else.

    Parameters
    ----------
    network
        A timm network.
    rank, alpha
        As for `LowRank`.
    blocks
        Number of blocks, counted from the last.

    Raises
    ------
    ParameterError
        If the network has no transformer blocks in a row, or fewer.
    """
    found = getattr(network, "blocks", None)
    if not isinstance(found, nn.Sequential | nn.ModuleList):
        raise ParameterError(
            "encoder",
            "",
            f"{type(network).__name__} has no transformer blocks to train; choose a ViT, or omit finetune",
        )
    if blocks > len(found):
        raise ParameterError(
            "finetune", "blocks", f"{blocks}, but the encoder computes {len(found)} blocks; give 1 to {len(found)}"
        )
    network.requires_grad_(False)
    for block in list(found)[len(found) - blocks :]:
        layers = [(name, layer) for name, layer in block.named_modules() if isinstance(layer, nn.Linear)]
        for name, layer in layers:
            block.set_submodule(name, LowRank(layer, rank, alpha))


def save_adapter(path: Path, network: nn.Module) -> None:
    """Write the updates of a network from `add_adapter`."""
    found = dict(_adapted(network))
    (rank, alpha), *_ = {(len(layer.A), layer.scale * len(layer.A)) for layer in found.values()}
    tensors = {
        f"{name}.{part}": getattr(layer, part).detach().float().cpu().contiguous()
        for name, layer in found.items()
        for part in ("A", "B")
    }
    save_file(tensors, path, {"kind": _KIND, "rank": str(rank), "alpha": repr(float(alpha))})


def merge_adapter(network: nn.Module, path: Path) -> None:
    """Add the updates of a file to the weights of a network.

    Parameters
    ----------
    network
        The network that the adapter was trained with, cut off at the same block or a later one.
    path
        From `save_adapter`.

    Raises
    ------
    ParameterError
        If the file is not an adapter, is damaged or does not fit the network, which is then left unchanged.
    """
    adapter = _read(path)
    updates: list[tuple[Tensor, Tensor]] = []
    for name in sorted({key.rpartition(".")[0] for key in adapter.tensors}):
        layer = dict(network.named_modules()).get(name)
        pair = [adapter.tensors.get(f"{name}.{part}") for part in ("A", "B")]
        if not isinstance(layer, nn.Linear):
            raise _misfit(path, f"{type(network).__name__} has no layer {name}")
        down, up = pair
        shape = (layer.out_features, layer.in_features)
        if down is None or up is None or down.ndim != 2 or up.ndim != 2 or (len(up), down.shape[1]) != shape:
            raise _misfit(path, f"{name} is {shape[0]} x {shape[1]} here")
        if not len(down) == up.shape[1] == adapter.rank:
            raise _misfit(path, f"its {name} has not the rank {adapter.rank} that it states")
        updates.append((layer.weight, adapter.alpha / adapter.rank * (up.float() @ down.float())))
    with torch.no_grad():
        for weight, update in updates:
            weight.add_(update.to(weight))


class _Adapter(NamedTuple):
    tensors: dict[str, Tensor]
    rank: int
    alpha: float


def _read(path: Path) -> _Adapter:
    try:
        with safe_open(path, framework="pt") as file:
            about: dict[str, str] = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  (not a mapping)
    except (OSError, SafetensorError) as error:
        raise ParameterError(
            "encoder", "adapter", f"{path}: is damaged or no safetensors file ({error}); get a complete copy"
        ) from error
    problem: Any = "" if about.get("kind") == _KIND else "does not say that it is one of prts"
    rank, alpha = about.get("rank", ""), about.get("alpha", "")
    if not problem and not (tensors and rank.isdigit() and int(rank) and _is_number(alpha)):
        problem = "does not state its rank and alpha"
    if problem:
        raise ParameterError(
            "encoder", "adapter", f"{path}: is not an adapter ({problem}); give a file that experiment=finetune wrote"
        )
    return _Adapter(tensors, int(rank), float(alpha))


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def _misfit(path: Path, detail: str) -> ParameterError:
    return ParameterError(
        "encoder",
        "adapter",
        f"{path}: does not fit this encoder ({detail}); give the encoder and the encoder.layer that it was trained with",
    )


def _adapted(network: nn.Module) -> Iterator[tuple[str, LowRank]]:
    return ((name, layer) for name, layer in network.named_modules() if isinstance(layer, LowRank))
