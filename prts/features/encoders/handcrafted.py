"""The encoder `classical`: interpretable stain, texture and shape statistics, without weights.

Lengths below are for the default tile of 256 px at 0.5 um. With another `mpp`, those of texture, rings and crop scale with it (they are
numbers of pixels), while areas, densities and the shape stay in um. With another `tile_px`, the squares and rings divide the tile alike.

global (384), of the whole 128 um tile

| block | columns | what |
|---|---|---|
| colour | 48 | optical density of red, green, blue, amounts of hematoxylin (H), eosin (E), residual (R): mean, sd, skewness, p5 to p95 |
| histogram | 32 | H and E in 16 bins |
| joint | 36 | H x E in 6 x 6 bins |
| grid | 32 | mean H and E in 4 x 4 squares of 32 um |
| ring | 64 | 8 rings of 8 um around the center: mean and sd of H and E, mean R, fine H texture, shares of dark and of empty pixels |
| dog | 30 | differences of Gaussians of H and E at sigma 0.5, 1, 2, 4, 8 um: mean size, rms, skewness |
| orientation | 32 | gradient directions of H and E, fine and coarse, in 8 bins weighted by strength |
| gradient | 8 | strength of the gradient of H and E at 2 um: mean, sd, p50, p95 |
| tensor | 18 | structure tensor of H and E at 1, 2, 4 um: energy, coherence of the tile, mean local coherence |
| lbp | 60 | rotation-invariant uniform local binary patterns of H and E at 1, 2, 4 um |
| correlation | 12 | H with H, E with E, H with E, 2, 4, 8, 16 um apart |
| blobs | 6 | H peaks (nuclei): density in 4 zones of 16 um, mean and sd of their H |
| tissue | 6 | shares of empty, dark and eosin-rich pixels, entropies of H and E, correlation of H and E |

local (192), of the nucleus and the 4 um ring around it, in the central 32 um

| block | columns | what |
|---|---|---|
| colour | 72 | nucleus and ring: the six channels' mean, sd, skewness, 3 percentiles |
| contrast | 6 | mean of the nucleus minus mean of the ring |
| histogram | 24 | H in the nucleus, H and E in the ring, 8 bins each |
| dog | 12 | differences of Gaussians of H and E at 0.5, 1, 2 um in nucleus and ring: mean size |
| edge | 6 | gradient of H in the nucleus' core, its 1 um rim and the ring: mean, sd |
| lbp | 20 | local binary patterns of H at 0.5 um in nucleus and ring |
| chromatin | 9 | autocorrelation of H 0.5, 1, 2 um apart, shares of dense and pale chromatin, entropy, log integrated H, E, coherence |
| pair | 2 | correlation of H and E in nucleus and ring |
| radial | 12 | mean H and E 0-2, 2-4, 4-6, 6-8, 8-12, 12-16 um from the centroid |
| context | 5 | dark share of the ring and of the rest, H and E of the nucleus minus the tile's, share of the polygon inside the 32 um |
| shape | 17 | of the polygon: log area and perimeter (um), axes, eccentricity, solidity, circularity, ..., direction |
| hu | 7 | Hu's moment invariants of the mask, signed log10 |

Every column is of the order of 1. `Classical.column_names` has the names in order.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field

from prts.errors import ParameterError
from prts.features.classical_nucleus import CROP, LOCAL_BLOCKS, local_blocks
from prts.features.classical_tile import GLOBAL_BLOCKS, global_blocks
from prts.features.encoders import encoders
from prts.features.encoders.base import Encoder, Floats, Polygons, TileSettings, checked, signature_of
from prts.features.texture import channels


def _names(blocks: dict[str, tuple[tuple[str, ...], ...]]) -> list[str]:
    return ["/".join((block, *labels)) for block, axes in blocks.items() for labels in itertools.product(*axes)]


@dataclass(frozen=True, kw_only=True)
class ClassicalSettings(TileSettings):
    """Settings of `Classical`, in addition to `mpp` and `tile_px`."""

    pooling: Literal["nucleus"] = "nucleus"
    batch_size: Annotated[int, Field(ge=1)] = 8


@encoders.register("classical")
@signature_of(ClassicalSettings)
class Classical(Encoder):
    """Stain, texture and shape statistics; needs no weights and no download.

    Parameters
    ----------
    settings
        `mpp`, `tile_px` (a multiple of 32 from 64), `pooling` (only `nucleus`: the local vector describes the pixels of the nucleus) and
        `batch_size` (nuclei per batch).

    Examples
    --------
    >>> Classical().global_width, Classical().local_width
    (384, 192)
    """

    # Increased when a column changes.
    version = 1

    def __init__(self, **settings: Any) -> None:
        given = checked(Classical, ClassicalSettings, **settings)
        # five levels, each half the size of the previous one, and a central crop
        if given.tile_px % 32 or given.tile_px < CROP:
            raise ParameterError(
                "encoder",
                "tile_px",
                f"{given.tile_px} is not a multiple of 32 from {CROP}; choose a multiple such as 128 or 256",
            )
        self.mpp, self.tile_px = given.mpp, given.tile_px
        self.pooling, self.batch_size = given.pooling, given.batch_size

    @property
    def global_width(self) -> int:
        """384."""
        return len(_names(GLOBAL_BLOCKS))

    @property
    def local_width(self) -> int:
        """192."""
        return len(_names(LOCAL_BLOCKS))

    @staticmethod
    def column_names() -> tuple[list[str], list[str]]:
        """Names of the global and of the local columns, `block/label/...`, in order."""
        return _names(GLOBAL_BLOCKS), _names(LOCAL_BLOCKS)

    def settings(self) -> dict[str, Any]:
        """Everything that affects the features."""
        return {**super().settings(), "version": self.version}

    def encode(self, tiles: NDArray[np.uint8], polygons: Polygons) -> tuple[Floats, Floats]:
        """Global (b, 384) and local (b, 192) vectors of tiles (b, tile_px, tile_px, 3) and polygons (b,) in pixels of their tile."""
        out_global = np.empty((len(tiles), self.global_width), dtype=np.float32)
        out_local = np.empty((len(tiles), self.local_width), dtype=np.float32)
        for start in range(0, len(tiles), self.batch_size):
            batch = slice(start, start + self.batch_size)
            pixels = channels(tiles[batch])
            out_global[batch] = _joined(global_blocks(pixels, self.mpp), GLOBAL_BLOCKS)
            out_local[batch] = _joined(local_blocks(pixels, polygons[batch], self.mpp), LOCAL_BLOCKS)
        return out_global, out_local


def _joined(values: dict[str, torch.Tensor], blocks: dict[str, tuple[tuple[str, ...], ...]]) -> Floats:
    """Concatenate the blocks in their documented order."""
    for block, axes in blocks.items():
        assert values[block].shape[1:] == tuple(map(len, axes)), (block, values[block].shape)
    joined: Floats = torch.cat([values[block].flatten(1) for block in blocks], dim=1).float().numpy()
    return joined
