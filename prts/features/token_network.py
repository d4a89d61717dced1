"""A timm network that takes uint8 tiles and returns its pooled vector and its patch tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from prts.errors import ParameterError
from prts.precision import cpu_has


class TokenNetwork(torch.nn.Module):
    """A timm network from uint8 tiles to its pooled vector and its patch tokens, both after the last norm."""

    def __init__(self, network: torch.nn.Module, mean: Sequence[float], std: Sequence[float], input_size: int) -> None:
        super().__init__()
        self.network, self.input_size = network, input_size
        scale = 1.0 / (255.0 * torch.tensor(std, dtype=torch.float64))
        offset = -torch.tensor(mean, dtype=torch.float64) / torch.tensor(std, dtype=torch.float64)
        # Plain attributes, not buffers: they stay float32 when the weights become bfloat16.
        self.scale, self.offset = scale.float()[:, None, None], offset.float()[:, None, None]

    def forward(self, tiles: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(b, tile_px, tile_px, 3) uint8 -> (b, G) and (b, rows, columns, C)."""
        pixels = tiles.permute(0, 3, 1, 2).float()
        if self.input_size != pixels.shape[-1]:
            size = (self.input_size, self.input_size)
            pixels = torch.nn.functional.interpolate(pixels, size, mode="bilinear", antialias=True)
        pixels = pixels * self.scale.to(tiles.device) + self.offset.to(tiles.device)
        network: Any = self.network
        features = network.forward_features(pixels.to(next(network.parameters()).dtype))
        return network.forward_head(features, pre_logits=True), self._patch_tokens(features)

    def _patch_tokens(self, features: torch.Tensor) -> torch.Tensor:
        if features.ndim == 4:
            channels_last = getattr(self.network, "output_fmt", "NCHW") == "NHWC"
            return features if channels_last else features.permute(0, 2, 3, 1)
        if features.ndim == 3:
            patches = features[:, getattr(self.network, "num_prefix_tokens", 0) :]
            grid = round(patches.shape[1] ** 0.5)
            if grid * grid == patches.shape[1]:
                return patches.reshape(len(patches), grid, grid, -1)  # row by row, as the patch embedding flattens them
        raise ParameterError(
            "encoder",
            "model_name",
            f"{type(self.network).__name__} returns features of shape {tuple(features.shape[1:])}, not a square grid of patch tokens; "
            "choose a network with patch tokens or a feature map",
        )


def truncate(network: Any, layer: int) -> None:
    """Cut off the transformer blocks after number `layer`, so that the network's last norm follows that block.

    Parameters
    ----------
    network
        A timm network.
    layer
        The last block to keep, counted from 1.

    Raises
    ------
    ParameterError
        If the network has no such block.
    """
    blocks = getattr(network, "blocks", None)
    if not isinstance(blocks, torch.nn.Sequential | torch.nn.ModuleList) or not hasattr(network, "norm"):
        raise ParameterError(
            "encoder", "layer", f"{type(network).__name__} has no transformer blocks in a row; omit it, or choose a ViT"
        )
    if layer > len(blocks):
        raise ParameterError(
            "encoder",
            "layer",
            f"{layer} is not one of the {len(blocks)} blocks of {type(network).__name__}; choose 1 to {len(blocks)}",
        )
    network.blocks = blocks[:layer]


def attend_plainly(network: torch.nn.Module) -> None:
    """Compute timm's attention as two matrix products and a softmax, instead of torch's fused kernel."""
    module: Any
    for module in network.modules():
        if hasattr(module, "fused_attn"):  # timm's switch
            module.fused_attn = False


def plain_attention_is_faster(precision: str, device: torch.device) -> bool:
    """Whether attention as plain products is faster than the fused kernel.

    In bf16 the fused kernel is fast only on AMX and GPUs; with AVX-512 alone it is slower than the products (docs/speed.md).
    """
    return precision == "bf16" and device.type == "cpu" and not cpu_has("_is_amx_tile_supported")
