"""The tilted lattice of 2 um bins."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from prts.simulate.tissue import Layout

    Floats = NDArray[np.float64]

BIN_UM = 2.0


@dataclass(frozen=True)
class BinLattice:
    """Positions of bins: bin (row, col) is centered at `origin_um + R(tilt) [col, row] BIN_UM`; the files report it moved by the shift."""

    n_rows: int
    n_cols: int
    origin_um: tuple[float, float]
    tilt: float
    """Radians; positive tilts the columns down."""
    shift_um: tuple[float, float]

    def to_um(self, row: NDArray[np.generic], col: NDArray[np.generic]) -> Floats:
        """True centers, (n, 2), x and y in um."""
        cos, sin = np.cos(self.tilt), np.sin(self.tilt)
        x, y = np.asarray(col, float) * BIN_UM, np.asarray(row, float) * BIN_UM
        return np.stack([self.origin_um[0] + x * cos - y * sin, self.origin_um[1] + x * sin + y * cos], axis=-1)

    def from_um(self, xy_um: Floats) -> Floats:
        """Column and row of points, (n, 2), not rounded."""
        cos, sin = np.cos(self.tilt), np.sin(self.tilt)
        x, y = (xy_um - np.asarray(self.origin_um)).T / BIN_UM
        return np.stack([x * cos + y * sin, y * cos - x * sin], axis=-1)


def make_lattice(layout: Layout, tilt_deg: float, shift_um: tuple[float, float]) -> BinLattice:
    """A capture area around the center of the image; a thin strip of the image stays uncovered."""
    tilt = np.deg2rad(tilt_deg)
    n_cols, n_rows = (int(0.94 * side / BIN_UM) for side in (layout.width_um, layout.height_um))
    cos, sin = np.cos(tilt), np.sin(tilt)
    half_x, half_y = (n_cols - 1) / 2 * BIN_UM, (n_rows - 1) / 2 * BIN_UM
    middle_x, middle_y = 0.49 * layout.width_um, 0.5 * layout.height_um
    origin = (middle_x - half_x * cos + half_y * sin, middle_y - half_x * sin - half_y * cos)
    return BinLattice(n_rows, n_cols, origin, float(tilt), shift_um)
