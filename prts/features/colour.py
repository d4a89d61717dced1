"""Twelve color statistics: the features of a baseline that sees the stain around a nucleus but not its structure.

The columns are mean and standard deviation of the optical density (-log10 of transmitted light) of red, green and blue, in the 128 um
tile (`global`, 6) and within the nucleus (`local`, 6; its central pixel, if it is too small to contain one).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from prts.features import texture as tx
from prts.features.classical_nucleus import CROP, nucleus_masks
from prts.features.encoders.base import Encoder, Floats

COLUMNS = tuple(f"{channel}_{figure}" for figure in ("mean", "sd") for channel in ("red", "green", "blue"))


class ColourStats(Encoder):
    """Mean and spread of color in tile and nucleus, as an encoder, so that extraction and caching work as for any other.

    Parameters
    ----------
    batch_size
        Nuclei per batch.
    mpp, tile_px
        The tile, at least 64 px wide.
    """

    name = "colour"
    global_width = len(COLUMNS)
    local_width = len(COLUMNS)
    # Increased when a column changes.
    version = 1

    def __init__(self, batch_size: int = 32, *, mpp: float = Encoder.mpp, tile_px: int = Encoder.tile_px) -> None:
        self.batch_size, self.mpp, self.tile_px = batch_size, mpp, tile_px

    def settings(self) -> dict[str, Any]:
        """Everything that affects the features."""
        return {"name": self.name, "version": self.version, "mpp": self.mpp, "tile": self.tile_px}

    def encode(self, tiles: NDArray[np.uint8], polygons: NDArray[np.object_]) -> tuple[Floats, Floats]:
        """Tile (b, 6) and nucleus (b, 6) of tiles (b, 256, 256, 3) and polygons (b,) in pixels of their tile."""
        edge = (self.tile_px - CROP) // 2
        density = tx.optical_density(tiles)
        central = density[..., edge : edge + CROP, edge : edge + CROP]
        nucleus, _ = nucleus_masks(polygons, edge)
        everywhere = torch.ones((len(tiles), 1, self.tile_px, self.tile_px))
        return _mean_and_sd(density, everywhere), _mean_and_sd(central, nucleus[:, None].float())


def colour_reader(*, bins: bool) -> ColourStats:
    """The color statistics of nuclei, or of bins: a section has ten times as many, which are seen at 2 um per pixel.

    Parameters
    ----------
    bins
        Whether the units are bins.
    """
    return ColourStats(batch_size=256, mpp=2.0, tile_px=64) if bins else ColourStats()


def _mean_and_sd(density: torch.Tensor, weight: torch.Tensor) -> Floats:
    """Mean and standard deviation over the pixels with weight 1: (b, 3, rows, columns) and (b, 1, rows, columns) -> (b, 6)."""
    mean = tx.weighted(density, weight)
    deviation = density - mean[:, 0, :, None, None]
    sd = tx.weighted(deviation * deviation, weight).sqrt()
    columns: Floats = torch.cat([mean, sd], dim=1).flatten(1).numpy()
    return columns
