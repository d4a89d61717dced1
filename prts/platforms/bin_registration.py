"""Measure and correct the shift and small rotation between bins and nuclei.

Nuclei contain more UMIs than the space between them, so the density of UMIs, correlated with the mask of the nuclei on the lattice of
bins, peaks where the two coincide (normalized cross-correlation: Lewis 1995). Large structure (domains, spots, the edge of the tissue) is
removed first, since it need not be centered on nuclei. The correlation is kept per block of the lattice: a rotation is a shift that
grows with the distance from the center, so for each angle the blocks' correlations are shifted against each other and summed. All blocks
contribute, however weak the signal of each.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from scipy import fft, ndimage, optimize

from prts.geometry import lattice_points_within
from prts.platforms.base import CONFIDENT, Registration
from prts.platforms.bin_matrix import BinMatrix
from prts.platforms.bin_positions import BIN_SIZE_UM, BinGrid, matrix_path, read_positions

if TYPE_CHECKING:
    from pathlib import Path

    import geopandas as gpd

    Floats = NDArray[np.float32]
    Spectra = NDArray[np.complex64]

MAX_SHIFT_UM = 40.0
MAX_ROTATION_DEG = 1.0

_REACH = 30  # bins: largest shift of the correlations; the part beyond MAX_SHIFT_UM is background only
_PEAK = 8  # bins around the peak that are not background
_LARGE = 5.0  # bins: sigma beyond which structure is removed
_SMOOTH = 1.0  # bins: sigma of the smoothing of the correlation, below the size of a nucleus
_BLOCK = 256  # bins per side of the largest block; a small section is cut into 4 x 4
_ENTRIES = 20_000_000


def register_bins(bins: Path, nuclei: gpd.GeoDataFrame, mpp: float, grid: BinGrid | None = None) -> Registration:
    """Measure the displacement of a section's bins from its files; the matrix is streamed once.

    Parameters
    ----------
    bins
        Folder `square_002um`.
    nuclei
        Its nuclei, in full-resolution pixels.
    mpp
        um per full-resolution pixel.
    grid
        Positions of the bins, instead of the folder's own.
    """
    grid = read_positions(bins) if grid is None else grid
    with BinMatrix(matrix_path(bins)) as matrix:
        umi = np.zeros((grid.n_rows, grid.n_cols), np.float32)
        listed = grid.lists(matrix.array_row, matrix.array_col)
        for start, stop, counts in matrix.chunks(_ENTRIES):
            keep = listed[start:stop]
            rows, cols = matrix.array_row[start:stop][keep], matrix.array_col[start:stop][keep]
            umi[rows, cols] = np.asarray(counts.sum(axis=1), np.float32).ravel()[keep]
    return measure(umi, grid, np.asarray(nuclei.geometry.array, dtype=object), mpp)


def measure(umi: Floats, grid: BinGrid, polygons: NDArray[Any], mpp: float) -> Registration:
    """Measure shift and rotation of the bins' positions against the nuclei.

    Parameters
    ----------
    umi
        UMIs of each bin, (n_rows, n_cols).
    grid
        Recorded positions of the bins.
    polygons
        Nuclei in full-resolution pixels, (n_nuclei,).
    mpp
        um per full-resolution pixel.
    """
    valid = grid.in_tissue if grid.in_tissue.any() else ~np.isnan(grid.positions[..., 0])
    rows, cols = np.nonzero(valid)
    centre = np.array([cols.mean(), rows.mean()])
    spread = math.sqrt(float((cols - centre[0]).var() + (rows - centre[1]).var()))
    cover = _without_large(cover_of_bins(polygons, grid), valid)
    signal = _without_large(umi, valid, poisson=True)
    norm = math.sqrt(float(np.square(cover, dtype=np.float64).sum() * np.square(signal, dtype=np.float64).sum()))
    x_px, y_px = grid.affine @ [*centre, 1.0]
    nothing = Registration(False, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, float(x_px), float(y_px), mpp)
    if norm == 0:
        return nothing
    spectra, offsets = _block_spectra(cover, signal, centre)
    angle, shift, surface = _best(spectra, offsets, math.hypot(*valid.shape) / 2)
    peak, confidence = _stands_out(surface, shift)
    if confidence < CONFIDENT:
        return replace(nothing, confidence=confidence, peak=peak / norm)
    # the lattice may be tilted against the image, or mirrored
    linear = grid.affine[:, :2] * mpp
    turn = angle * math.copysign(1.0, float(np.linalg.det(linear)))
    # the UMIs are where the lattice was before it was rotated
    shift_um = _rotation(-turn) @ linear @ shift
    return Registration(
        measured=True,
        shift_x_um=float(shift_um[0]),
        shift_y_um=float(shift_um[1]),
        rotation_deg=math.degrees(turn),
        displacement_um=math.hypot(float(np.hypot(*shift_um)), abs(angle) * spread * BIN_SIZE_UM),
        confidence=confidence,
        peak=peak / norm,
        centre_x_px=float(x_px),
        centre_y_px=float(y_px),
        mpp=mpp,
    )


def corrected(grid: BinGrid, found: Registration) -> BinGrid:
    """The bins at their true positions; the same grid if nothing could be measured.

    Parameters
    ----------
    grid
        Bins at their recorded positions.
    found
        Their displacement.
    """
    if not found.measured:
        return grid
    shift = np.array([found.shift_x_um, found.shift_y_um]) / found.mpp
    return moved(grid, -shift, -found.rotation_deg, np.array([found.centre_x_px, found.centre_y_px]))


def moved(grid: BinGrid, shift_px: NDArray[np.float64], rotation_deg: float, about_px: NDArray[np.float64]) -> BinGrid:
    """The same bins at other positions: rotated about a point (clockwise on the image, y pointing down), then shifted."""
    matrix = _rotation(math.radians(rotation_deg))
    offset = about_px + shift_px - matrix @ about_px
    affine = matrix @ grid.affine
    affine[:, 2] += offset
    # a rotated residual is as long, but may point along an axis
    return BinGrid(grid.positions @ matrix.T + offset, grid.in_tissue, affine, math.sqrt(2) * grid.residual_px)


def cover_of_bins(polygons: NDArray[Any], grid: BinGrid) -> Floats:
    """Share of each bin within nuclei, (n_rows, n_cols), in quarters; overlapping nuclei are added."""
    linear, offset = grid.affine[:, :2], grid.affine[:, 2]
    finer = np.column_stack([linear / 2, offset - linear.sum(axis=1) / 4])
    _, row, col = lattice_points_within(polygons, finer, 2 * grid.n_cols, 2 * grid.n_rows)
    place = (row // 2) * grid.n_cols + col // 2
    count = np.bincount(place, minlength=grid.n_rows * grid.n_cols)
    return (count.reshape(grid.n_rows, grid.n_cols) / 4).astype(np.float32)


def _rotation(angle: float) -> NDArray[np.float64]:
    return np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])


def _without_large(values: Floats, valid: NDArray[np.bool_], *, poisson: bool = False) -> Floats:
    """Difference from the local mean, 0 outside the tissue; with `poisson` relative to the noise of counts with this mean."""
    weight = ndimage.gaussian_filter(valid.astype(np.float32), _LARGE)
    mean = ndimage.gaussian_filter(np.where(valid, values, 0).astype(np.float32), _LARGE) / np.maximum(weight, 1e-3)
    rest = values - mean
    if poisson:
        rest = np.clip(
            rest / np.sqrt(mean + 0.05), -5, 5
        )  # one bin with thousands of UMIs says little about the position
    return np.where(valid, rest, np.float32(0)).astype(np.float32)


def _block_spectra(cover: Floats, signal: Floats, centre: NDArray[np.float64]) -> tuple[Spectra, NDArray[np.float64]]:
    """Spectra (b, q, q // 2 + 1) of the blocks' cross-correlations at shifts up to _REACH, and the blocks' offsets (b, 2) from the center.

    Correlation at shift d: the sum over a block of cover[x] signal[x + d].
    """
    side = min(_BLOCK, max(32, -(-max(cover.shape) // 4)))
    n_down, n_right = (-(-n // side) for n in cover.shape)
    pad = [(0, n * side - have) for n, have in zip((n_down, n_right), cover.shape, strict=True)]
    cover = np.pad(cover, pad)
    signal = np.pad(signal, [(_REACH, _REACH + more) for _, more in pad])
    wide = side + 2 * _REACH
    size = fft.next_fast_len(wide, real=True)
    windows = np.lib.stride_tricks.sliding_window_view(signal, (wide, wide))[::side, ::side]
    n_shifts = 2 * _REACH + 1
    # room for shifts of one block against another without wrapping around
    small = fft.next_fast_len(n_shifts + _REACH, real=True)
    spectra, offsets = [], []
    for down in range(n_down):
        strip = cover[down * side : (down + 1) * side].reshape(side, n_right, side).transpose(1, 0, 2)
        here = np.flatnonzero(np.abs(strip).max(axis=(1, 2)) > 0)
        if not len(here):
            continue
        strip = strip[here]
        cross = np.conj(fft.rfft2(strip, (size, size))) * fft.rfft2(windows[down, here], (size, size))
        surface = fft.irfft2(cross, (size, size))[:, :n_shifts, :n_shifts]
        spectra.append(fft.rfft2(surface, (small, small)))
        weight = np.abs(strip)
        total = weight.sum(axis=(1, 2))
        # center of the nuclei in the block: at the edge of the tissue that is not its middle
        at = np.arange(side)
        x = np.einsum("brc,c->b", weight, at) / total + here * side - centre[0]
        y = np.einsum("brc,r->b", weight, at) / total + down * side - centre[1]
        offsets.append(np.column_stack([x, y]))
    return np.concatenate(spectra).astype(np.complex64), np.concatenate(offsets)


def _best(
    spectra: Spectra, offsets: NDArray[np.float64], half_diagonal: float
) -> tuple[float, NDArray[np.float64], Floats]:
    """The angle (radians) and the shift (columns, rows) at which the correlation is highest, and its surface at this angle."""
    n = spectra.shape[1]
    smooth = np.exp(-2 * (np.pi * _SMOOTH * fft.fftfreq(n)) ** 2)
    spectra = spectra * (smooth[:, None] * smooth[: spectra.shape[2]]).astype(np.float32)
    down, right = 2j * np.pi * fft.fftfreq(n), 2j * np.pi * fft.rfftfreq(n)

    def summed(angle: float) -> Spectra:
        """Sum of the blocks' correlations, each shifted as the rotation shifts its block."""
        dx, dy = -angle * offsets[:, 1], angle * offsets[:, 0]
        ramp_y, ramp_x = (np.exp(k * d[:, None]).astype(np.complex64) for k, d in ((down, dy), (right, dx)))
        return np.asarray(np.einsum("bij,bi,bj->ij", spectra, ramp_y, ramp_x, optimize=True))

    limit = min(math.radians(MAX_ROTATION_DEG), _REACH / 2 / half_diagonal)
    steps = max(1, math.ceil(limit * half_diagonal))
    reach = int(MAX_SHIFT_UM / BIN_SIZE_UM)
    near = slice(_REACH - reach, _REACH + reach + 1)
    highest, start = -np.inf, np.zeros(3)
    for angle in np.linspace(-limit, limit, 2 * steps + 1):
        surface = fft.irfft2(summed(angle), (n, n))[near, near]
        row, col = np.unravel_index(surface.argmax(), surface.shape)
        if surface[row, col] > highest:
            highest, start = surface[row, col], np.array([angle * half_diagonal, col - reach, row - reach])
    # rfft2 omits half of the columns, which are conjugate to those that it keeps
    twice = np.full(spectra.shape[2], 2.0)
    twice[0] = 1.0
    if n % 2 == 0:
        twice[-1] = 1.0

    def height(at: NDArray[np.float64]) -> float:
        spectrum = summed(at[0] / half_diagonal)
        values = np.exp(down * (at[2] + _REACH)) @ spectrum @ (twice * np.exp(right * (at[1] + _REACH)))
        return float(-values.real / n**2)

    # all three in bins: the angle as the distance that it moves a corner
    found = optimize.minimize(
        height,
        start,
        method="Nelder-Mead",
        options={
            "xatol": 1e-3,
            "fatol": 1e-6 * abs(highest),
            "initial_simplex": start + np.vstack([np.zeros(3), 0.5 * np.eye(3)]),
        },
    )
    angle = float(found.x[0] / half_diagonal)
    surface = fft.irfft2(summed(angle), (n, n))[: 2 * _REACH + 1, : 2 * _REACH + 1]
    return angle, np.asarray(found.x[1:]), surface


def _stands_out(surface: Floats, shift: NDArray[np.float64]) -> tuple[float, float]:
    """Height of the peak, and the same in spreads above the background."""
    at = np.arange(-_REACH, _REACH + 1)
    away = np.hypot(at[None, :] - shift[0], at[:, None] - shift[1])
    background = surface[away > _PEAK]
    middle = float(np.median(background))
    spread = 1.4826 * float(np.median(np.abs(background - middle)))
    peak = float(surface[away < 1.5].max(initial=middle))
    return peak, (peak - middle) / spread if spread > 0 else 0.0
