"""An encoder that describes a nucleus by mean colors."""

import numpy as np
import shapely

from prts.features.encoders import Encoder, encoders


@encoders.register("mean_color")
class MeanColor(Encoder):
    """Mean color of the tile (global) and of the pixels around the nucleus (local).

    Parameters
    ----------
    margin_um
        Added on each side of the nucleus's bounding box, in um.
    """

    global_width = 3
    local_width = 3

    def __init__(self, margin_um: float = 2.0) -> None:
        self.margin_um = margin_um

    def settings(self):
        """Everything that affects the features, for caches and bundles."""
        return {**super().settings(), "margin_um": self.margin_um}

    def encode(self, tiles, polygons):
        """Tiles (b, tile_px, tile_px, 3) and polygons in their pixels -> (b, 3) and (b, 3)."""
        margin = self.margin_um / self.mpp
        local = np.empty((len(tiles), 3), np.float32)
        for i, (x0, y0, x1, y1) in enumerate(shapely.bounds(polygons)):
            rows = slice(max(int(y0 - margin), 0), int(np.ceil(y1 + margin)))
            columns = slice(max(int(x0 - margin), 0), int(np.ceil(x1 + margin)))
            local[i] = tiles[i, rows, columns].mean(axis=(0, 1))
        return tiles.mean(axis=(1, 2), dtype=np.float32) / 255, local / 255
