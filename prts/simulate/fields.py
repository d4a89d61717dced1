"""Smooth random fields, periodic noise tiles, and interpolation between their grids."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from scipy import fft, ndimage

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Floats = NDArray[np.float32]


def smooth_field(rng: np.random.Generator, shape: tuple[int, int], pitch_um: float, wavelength_um: float) -> Floats:
    """Random field with zero mean, about unit deviation, and no detail below a wavelength.

    Parameters
    ----------
    rng
        Source of the node values.
    shape
        Rows and columns of the grid.
    pitch_um
        Distance between grid points.
    wavelength_um
        Twice the distance between nodes of the cubic interpolation.

    Returns
    -------
    Field, shape `shape`.
    """
    step = max(wavelength_um / 2 / pitch_um, 1.0)
    nodes = rng.standard_normal([int(n / step) + 5 for n in shape]).astype(np.float32)
    # Separable: a grid of ten million points costs two thin matrix products instead of a 2-D spline.
    rows, cols = (_cubic_weights(n, step, m) for n, m in zip(shape, nodes.shape, strict=True))
    return np.asarray(rows @ nodes @ cols.T, np.float32) * np.float32(1.25)


def _cubic_weights(n: int, step: float, n_nodes: int) -> Floats:
    """(n, n_nodes) weights of a cubic spline through nodes `step` grid points apart."""
    at = np.arange(n) / step + 1
    points = np.stack([np.repeat(at, n_nodes), np.tile(np.arange(n_nodes), n)])
    weights = ndimage.map_coordinates(np.eye(n_nodes, dtype=np.float32), points, order=3, mode="nearest")
    return np.asarray(weights.reshape(n, n_nodes), np.float32)


def noise_tile(rng: np.random.Generator, size: int, sigma: float | tuple[float, float]) -> Floats:
    """Gaussian noise with unit deviation that tiles without a seam, (size, size); `sigma` is the size of its grain in pixels."""
    # In Fourier space noise is periodic, and a coarse grain costs no more than a fine one.
    down, right = (np.exp(-2 * (np.pi * s * fft.fftfreq(size)) ** 2) for s in np.broadcast_to(sigma, 2))
    spectrum = fft.rfft2(rng.standard_normal((size, size), dtype=np.float32))
    spectrum *= (down[:, None] * right[: spectrum.shape[1]]).astype(np.float32)
    tile = fft.irfft2(spectrum, (size, size))
    return np.asarray((tile - tile.mean()) / tile.std(), np.float32)


def repeat_tile(tile: Floats, row: int, n_rows: int, n_cols: int) -> Floats:
    """A window of the plane tiled by `tile`: `n_rows` rows from `row`, `n_cols` columns from 0."""
    size = tile.shape[0]
    rows = tile[np.arange(row, row + n_rows) % size]
    return np.tile(rows, (1, -(-n_cols // size)))[:, :n_cols]


class Bilinear:
    """Bilinear interpolation of many fields from one grid (values at the centers of its squares) to a finer one.

    Parameters
    ----------
    shape
        Rows and columns of the fields.
    pitch_um
        Distance between their points.
    rows_um, cols_um
        Coordinates of the finer grid; outside the field its edge values are used.
    """

    def __init__(
        self,
        shape: tuple[int, int],
        pitch_um: float,
        rows_um: NDArray[np.floating[Any]],
        cols_um: NDArray[np.floating[Any]],
    ) -> None:
        self._row, row_share = _left_node(rows_um, pitch_um, shape[0])
        self._col, self._col_share = _left_node(cols_um, pitch_um, shape[1])
        self._row_share = row_share[:, None]

    def __call__(self, field: Floats) -> Floats:
        """The field on the finer grid, (len(rows_um), len(cols_um))."""
        above, below = field[self._row], field[self._row + 1]
        rows = above + self._row_share * (below - above)
        step = np.diff(rows, axis=1)
        return np.asarray(rows[:, self._col] + self._col_share * step[:, self._col], np.float32)


def _left_node(at_um: NDArray[np.floating[Any]], pitch_um: float, n: int) -> tuple[NDArray[np.intp], Floats]:
    """Index of the node to the left and weight of the one to the right."""
    at = np.clip(at_um / pitch_um - 0.5, 0, n - 1)
    left = np.minimum(at.astype(np.intp), n - 2)
    return left, (at - left).astype(np.float32)


def sample_field(field: NDArray[Any], pitch_um: float, xy_um: NDArray[np.float64]) -> NDArray[Any]:
    """Value of the grid square that contains each point; `xy_um` is (n, 2)."""
    col, row = (np.clip((xy_um[:, k] / pitch_um).astype(np.intp), 0, field.shape[1 - k] - 1) for k in (0, 1))
    return np.asarray(field[row, col])
