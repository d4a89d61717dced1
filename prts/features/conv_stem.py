"""The first layers of CTransPath, in place of Swin's patch embedding."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


class ConvStem(nn.Module):
    """Three convolutions from pixels to tokens of 4 px (Wang et al. 2022).

    Parameters
    ----------
    img_size
        Side of the tile, px.
    patch_size
        4.
    in_chans
        Channels of the tile.
    embed_dim
        Channels of a token.
    norm_layer
        Makes the norm of the tokens.
    unused
        Other arguments of timm's `PatchEmbed`.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int],
        patch_size: int = 4,
        in_chans: int = 3,
        embed_dim: int = 96,
        norm_layer: Any = None,
        **unused: Any,
    ) -> None:
        super().__init__()
        height, width = (img_size, img_size) if isinstance(img_size, int) else img_size
        self.img_size, self.patch_size = (height, width), (patch_size, patch_size)
        self.grid_size = (height // patch_size, width // patch_size)
        self.num_patches = self.grid_size[0] * self.grid_size[1]
        layers: list[nn.Module] = []
        channels = in_chans
        for out in (embed_dim // 8, embed_dim // 4):
            layers += [nn.Conv2d(channels, out, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(out), nn.ReLU(True)]
            channels = out
        self.proj = nn.Sequential(*layers, nn.Conv2d(channels, embed_dim, 1))
        self.norm = norm_layer(embed_dim) if norm_layer else nn.Identity()

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """(b, in_chans, height, width) -> (b, height / 4, width / 4, embed_dim)."""
        tokens: torch.Tensor = self.norm(self.proj(pixels).permute(0, 2, 3, 1))
        return tokens
