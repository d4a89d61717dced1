"""Render the H&E image of a simulated section in bands: stain amounts, Beer-Lambert colors, optics, camera noise."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from scipy import ndimage
from scipy.spatial import cKDTree

from prts.simulate.fields import Bilinear, noise_tile, repeat_tile, sample_field, smooth_field
from prts.simulate.nuclei import SimulatedNuclei, lattice_around
from prts.simulate.tissue import DUCT, GRID_UM, SURFACE, TUMOUR, TYPES, VESSEL, Layout

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    Floats = NDArray[np.float32]

BAND_ROWS = 512
"""Rows of pixels rendered at a time."""

_FINE_UM = 1.0
_LN10 = np.float32(np.log(10))
# Optical density per unit of stain in red, green, blue: hematoxylin and eosin halfway between Ruifrok & Johnston 2001 and a measured
# section (Macenko et al. 2009), hemoglobin by eye.
_STAINS = np.array([[0.61, 0.72, 0.34], [0.17, 0.84, 0.48], [0.18, 0.78, 0.68]])
# Stain between the cells, by domain: eosin, hematoxylin, fraction of fibers.
_MATRIX = np.array(
    [
        [0.25, 0.035, 1.0],
        [0.22, 0.08, 0.25],
        [0.26, 0.08, 0.0],
        [0.16, 0.06, 0.25],
        [0.36, 0.03, 0.5],
        [0.34, 0.03, 0.75],
        [0.27, 0.08, 0.0],
        [0.0, 0.0, 0.0],
    ]
)
# Sides of the noise tiles: a small common multiple would be visible as a pattern, and large primes are slow to transform.
_GRAIN_PX, _CLUMP_PX, _COARSE_PX, _FIBRE_PX, _CAMERA_PX = 720, 675, 1000, 1024, 768


@dataclass(frozen=True)
class Stain:
    """Stain and scanner of a laboratory."""

    haematoxylin: float = 1.0
    eosin: float = 1.0
    turn: float = 0.0
    """Shifts the color of both stains: positive toward red, negative toward blue."""
    white: tuple[float, float, float] = (243.0, 242.0, 244.0)
    blur_um: float = 0.32


def shifted_stain(shift: float) -> Stain:
    """The stain on a different day, in a different laboratory, or with a different scanner.

    Parameters
    ----------
    shift
        0 is the reference; 1 is as far as good laboratories differ (paler nuclei, stronger and redder eosin), -1 is the opposite.
    """
    return Stain(
        haematoxylin=float(np.exp(-0.12 * shift)),
        eosin=float(np.exp(0.12 * shift)),
        turn=0.04 * shift,
        white=(243.0 + shift, 242.0 - shift, 244.0 - 2 * shift),
        blur_um=float(0.32 * np.exp(0.15 * shift)),
    )


def stain_colours(stain: Stain, jitter: NDArray[np.float64] | float = 0.0) -> NDArray[np.float64]:
    """Optical density of hematoxylin, eosin and hemoglobin (rows) in red, green and blue, scaled to length 1; `jitter` is added first."""
    colours = _STAINS + np.array([stain.turn, 0.0, -stain.turn]) + jitter
    scaled: NDArray[np.float64] = colours / np.linalg.norm(colours, axis=1, keepdims=True)
    return scaled


class _Tiles(NamedTuple):
    """Periodic noise tiles of several grain sizes."""

    grain: Floats
    clump: Floats
    coarse: Floats
    thin: Floats
    thick: Floats
    camera: Floats


def render(
    layout: Layout, nuclei: SimulatedNuclei, shape: tuple[int, int], mpp: float, stain: Stain, rng: np.random.Generator
) -> Iterator[NDArray[np.uint8]]:
    """Render a section from top to bottom.

    Parameters
    ----------
    layout, nuclei
        The section.
    shape
        Rows and columns of the image.
    mpp
        um per pixel.
    stain
        Colors and optics; the colors are slightly jittered.
    rng
        Source of textures and noise.

    Yields
    ------
    Bands of at most BAND_ROWS rows, (rows, columns, 3) uint8; the image does not depend on their height.
    """
    canvas = _Canvas(layout, nuclei, shape, mpp, stain, rng)
    for top in range(0, shape[0], BAND_ROWS):
        yield canvas.band(top, min(BAND_ROWS, shape[0] - top))


class _Canvas:
    """State shared by all bands."""

    def __init__(
        self,
        layout: Layout,
        nuclei: SimulatedNuclei,
        shape: tuple[int, int],
        mpp: float,
        stain: Stain,
        rng: np.random.Generator,
    ) -> None:
        self.layout, self.nuclei, self.shape, self.mpp, self.stain = layout, nuclei, shape, mpp, stain
        order = np.argsort(nuclei.xy_um[:, 1], kind="stable")
        self.nuclei = nuclei[order]
        self.tree = cKDTree(self.nuclei.xy_um)
        n = len(nuclei)
        kind = self.nuclei.kind
        g0, g1 = self.nuclei.gradients.T
        self.table = {f: np.array([getattr(t, f) for t in TYPES], np.float32)[kind] for f in _LOOKS}
        self.confined = np.isin(self.nuclei.domain, (TUMOUR, DUCT, SURFACE)) & (self.table["reach_um"] > 10)
        self.table["reach_um"] = np.where(
            self.confined, self.table["reach_um"], np.minimum(self.table["reach_um"], 7.5)
        )
        self.table["haematoxylin"] *= np.exp(0.13 * rng.standard_normal(n) + 0.09 * g1).astype(np.float32)
        self.table["cytoplasm_eosin"] *= np.exp(0.10 * rng.standard_normal(n) + 0.05 * g0).astype(np.float32)
        self.table["cytoplasm_haematoxylin"] *= np.exp(0.15 * rng.standard_normal(n)).astype(np.float32)
        self.nucleoli_um = rng.normal(0, 0.22, (n, 2, 2)) * self.nuclei.half_um[:, None, 1:]
        # About half of the nuclei have a second nucleolus; in the others both coincide.
        self.nucleoli_um[:, 1] = np.where(rng.random((n, 1)) < 0.5, self.nucleoli_um[:, 0], self.nucleoli_um[:, 1])
        self.tiles = _Tiles(
            grain=noise_tile(rng, _GRAIN_PX, 0.28 / mpp),
            clump=noise_tile(rng, _CLUMP_PX, 0.62 / mpp),
            coarse=noise_tile(rng, _COARSE_PX, 2.2 / mpp),
            thin=noise_tile(rng, _FIBRE_PX, (3.0, 24.0)),
            thick=noise_tile(rng, _FIBRE_PX, (8.0, 56.0)),
            camera=noise_tile(rng, _CAMERA_PX, 0.35),
        )
        maps = _MATRIX.astype(np.float32)[layout.domain]
        self.matrix = [ndimage.gaussian_filter(maps[..., k], 1.5) for k in range(3)]
        thickness = 1 + 0.07 * smooth_field(rng, layout.domain.shape, GRID_UM, 150)
        self.thickness = np.asarray(thickness, np.float32)
        self.red_xy, self.red_radius = _red_cells(layout, rng)
        self.colours = stain_colours(stain, rng.normal(0, 0.006, (3, 3))).astype(np.float32)
        self.lamp = rng.uniform(0, 6.3, 2)

    def band(self, top: int, n_rows: int) -> NDArray[np.uint8]:
        """Render `n_rows` rows from `top`."""
        halo = int(4 * self.stain.blur_um / self.mpp) + 2
        row0, rows, cols = top - halo, n_rows + 2 * halo, self.shape[1]
        haematoxylin, eosin, red = self._amounts(row0, rows, cols)
        light = np.empty((n_rows, cols, 3), np.float32)
        y = (np.arange(top, top + n_rows, dtype=np.float32)[:, None] + 0.5) * self.mpp
        x = (np.arange(cols, dtype=np.float32) + 0.5) * self.mpp
        # Fields of view of the scanner are slightly brighter in the middle.
        lamp = (
            1 + 0.008 * np.cos(2 * np.pi * y / 410 + self.lamp[0]) + 0.008 * np.cos(2 * np.pi * x / 530 + self.lamp[1])
        )
        for channel in range(3):
            per_h, per_e, per_r = self.colours[:, channel]
            density = (
                haematoxylin * (per_h * self.stain.haematoxylin) + eosin * (per_e * self.stain.eosin) + red * per_r
            )
            sharp = np.exp(-_LN10 * density)
            blurred = ndimage.gaussian_filter(sharp, self.stain.blur_um / self.mpp)[halo : halo + n_rows]
            grey = np.float32(self.stain.white[channel]) * lamp.astype(np.float32) * blurred
            noise = repeat_tile(self.tiles.camera, top + 301 * channel, n_rows, cols)
            light[..., channel] = grey + noise * (0.6 + 0.09 * np.sqrt(grey))
        return np.asarray(np.clip(light + 0.5, 0, 255), np.uint8)

    def _amounts(self, row0: int, rows: int, cols: int) -> tuple[Floats, Floats, Floats]:
        """Amounts of hematoxylin, eosin and hemoglobin in each pixel."""
        tiles, mpp = self.tiles, self.mpp
        y_um, x_um = (np.arange(row0, row0 + rows) + 0.5) * mpp, (np.arange(cols) + 0.5) * mpp
        fine_row0, fine = self._cells(y_um[0], y_um[-1])
        up_fine = Bilinear(fine[0].shape, _FINE_UM, y_um - fine_row0 * _FINE_UM, x_um)
        eosin, haematoxylin, matrix, fibres, membrane = (up_fine(field) for field in fine)
        up = Bilinear(self.layout.domain.shape, GRID_UM, y_um, x_um)
        across, along, clearance = (up(f) for f in (self.layout.across, self.layout.along, self.layout.clearance))

        thin = tiles.thin[(across * 2.4).astype(np.intp) % _FIBRE_PX, (along * 1.8).astype(np.intp) % _FIBRE_PX]
        thick = tiles.thick[(across * 1.9).astype(np.intp) % _FIBRE_PX, (along * 1.3).astype(np.intp) % _FIBRE_PX]
        grain = repeat_tile(tiles.grain, row0, rows, cols)
        coarse = repeat_tile(tiles.coarse, row0, rows, cols)
        # Strands, with clefts where the tissue has torn along them.
        matrix *= np.maximum(1 + fibres * (0.30 * thin + 0.22 * thick), 0.1) * (
            1 - 0.9 * fibres * np.clip(1.6 * (-thick - 1.0), 0, 1)
        )
        clump = repeat_tile(tiles.clump, row0 + 300, rows, cols)
        texture = 1 + 0.10 * grain + 0.15 * clump + 0.12 * coarse
        eosin = (eosin + matrix) * texture + 0.25 * membrane
        haematoxylin = haematoxylin * (1 + 0.12 * grain + 0.18 * clump + 0.15 * coarse) + 0.10 * membrane
        present = np.clip((clearance + 0.7 * coarse) / 1.4 + 0.5, 0, 1)
        eosin *= present
        haematoxylin *= present

        cover, nuclear = self._nuclei(row0, rows, cols)
        haematoxylin = haematoxylin * (1 - cover) + nuclear
        eosin *= 1 - 0.35 * cover
        thickness = up(self.thickness)
        return haematoxylin * thickness, eosin * thickness, self._red(row0, rows, cols)

    def _cells(self, top_um: float, bottom_um: float) -> tuple[int, list[Floats]]:
        """Cytoplasm and matrix at 1 um: first row, and eosin, hematoxylin, matrix eosin, fibers, membrane."""
        row0 = int(top_um / _FINE_UM) - 2
        y = (np.arange(row0, int(bottom_um / _FINE_UM) + 3) + 0.5) * _FINE_UM
        x = (np.arange(int(np.ceil(self.layout.width_um / _FINE_UM)) + 1) + 0.5) * _FINE_UM
        up = Bilinear(self.layout.domain.shape, GRID_UM, y, x)
        matrix, matrix_haematoxylin, fibres = (up(field) for field in self.matrix)
        tint = 1 + 0.15 * up(self.layout.gradients[0])
        shape = matrix.shape
        inside = np.flatnonzero(up(self.layout.clearance).ravel() > -3)
        near = np.full((shape[0] * shape[1], 2), np.inf)
        owner = np.zeros(near.shape, np.intp)
        points = np.stack([x[inside % shape[1]], y[inside // shape[1]]], axis=1)
        near[inside], owner[inside] = self.tree.query(points, 2)
        first, second = near.astype(np.float32).T
        own = owner[:, 0]
        reach = self.table["reach_um"][own]
        rough = repeat_tile(self.tiles.coarse, row0, *shape).ravel()
        mine = np.clip((reach + 1.1 * rough - first) / 1.6 + 0.5, 0, 1)
        # Epithelium and tumor end at the border of their domain.
        here = sample_field(self.layout.domain, GRID_UM, np.stack(np.meshgrid(x, y), axis=-1).reshape(-1, 2))
        mine *= ~self.confined[own] | (here == self.nuclei.domain[own])
        with np.errstate(invalid="ignore"):  # inf - inf on glass
            rim = np.nan_to_num(np.exp(-(((second - first) / 1.1) ** 2)) * (second < 40))
        rim *= mine * 0.5 * (self.table["membrane"][own] + self.table["membrane"][owner[:, 1]])
        eosin = mine * self.table["cytoplasm_eosin"][own]
        haematoxylin = mine * self.table["cytoplasm_haematoxylin"][own] + (1 - mine) * matrix_haematoxylin.ravel()
        fields = [eosin, haematoxylin, (1 - mine) * matrix.ravel(), (1 - 0.7 * mine) * fibres.ravel(), rim]
        out = [ndimage.gaussian_filter(np.asarray(f.reshape(shape), np.float32), 0.6) for f in fields]
        out[0] *= tint
        out[2] *= tint
        return row0, out

    def _nuclei(self, row0: int, rows: int, cols: int) -> tuple[Floats, Floats]:
        """Fraction of each pixel covered by nuclei, and their hematoxylin."""
        mpp, tiles = self.mpp, self.tiles
        y = self.nuclei.xy_um[:, 1]
        first, last = np.searchsorted(y, [row0 * mpp - 25, (row0 + rows) * mpp + 25])
        some = self.nuclei[first:last]
        centre = some.xy_um / mpp - 0.5 - [0, row0]
        row, col, index = lattice_around(centre, (some.reach_um() + 0.8) / mpp, (rows, cols))
        dx, dy = ((at - centre[index, k]) * mpp for k, at in ((0, col), (1, row)))
        depth = some.depth(index, dx, dy)
        radius = np.sqrt(some.half_um.prod(axis=1))
        edge = (1 - depth) * radius[index]
        keep = edge > -0.35
        row, col, index, dx, dy, depth, edge = (a[keep] for a in (row, col, index, dx, dy, depth, edge))
        look = {name: values[first:last][index] for name, values in self.table.items()}
        cover = np.clip(edge / 0.7 + 0.5, 0, 1).astype(np.float32)
        grain = tiles.grain[(row + row0) % tiles.grain.shape[0], col % tiles.grain.shape[1]]
        clump = tiles.clump[(row + row0) % tiles.clump.shape[0], col % tiles.clump.shape[1]]
        amount = 1 + look["grain"] * grain + look["clumps"] * np.tanh(1.4 * clump) * (0.5 + 0.7 * depth)
        amount += look["rim"] * np.exp(-(((depth - 0.9) / 0.11) ** 2))
        for spot in np.moveaxis(self.nucleoli_um[first:last], 1, 0):
            away = (dx - spot[index, 0]) ** 2 + (dy - spot[index, 1]) ** 2
            amount += 0.7 * look["nucleolus"] * np.exp(-away / (2 * 0.62**2))
        flat = row * cols + col
        shares, stain = np.zeros(rows * cols, np.float32), np.zeros(rows * cols, np.float32)
        np.maximum.at(shares, flat, cover)
        np.maximum.at(stain, flat, (look["haematoxylin"] * np.maximum(amount, 0.25) * cover).astype(np.float32))
        return shares.reshape(rows, cols), stain.reshape(rows, cols)

    def _red(self, row0: int, rows: int, cols: int) -> Floats:
        """Hemoglobin: discs, paler in the middle."""
        centre = self.red_xy / self.mpp - 0.5 - [0, row0]
        near = (centre[:, 1] > -30 / self.mpp) & (centre[:, 1] < rows + 30 / self.mpp)
        centre, radius = centre[near], self.red_radius[near]
        row, col, index = lattice_around(centre, (radius + 0.6) / self.mpp, (rows, cols))
        away = np.hypot(col - centre[index, 0], row - centre[index, 1]) * self.mpp / radius[index]
        amount = np.clip((1 - away) * 4, 0, 1) * (0.58 - 0.20 * np.exp(-((away / 0.5) ** 2)))
        out = np.zeros(rows * cols, np.float32)
        np.maximum.at(out, row * cols + col, amount.astype(np.float32))
        return out.reshape(rows, cols)


_LOOKS = (
    "haematoxylin",
    "clumps",
    "grain",
    "rim",
    "nucleolus",
    "cytoplasm_eosin",
    "cytoplasm_haematoxylin",
    "membrane",
    "reach_um",
)


def _red_cells(layout: Layout, rng: np.random.Generator) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Centers (um) and radii (um) of red blood cells in the lumens of some vessels."""
    clotted = smooth_field(rng, layout.domain.shape, GRID_UM, 200) > -0.4
    rows, cols = np.nonzero((layout.lumen == VESSEL) & (layout.clearance < -3.5) & clotted)
    taken = rng.random(len(rows)) < 1.3 * GRID_UM**2 / 42
    xy = (np.stack([cols, rows], axis=1)[taken] + rng.random((int(taken.sum()), 2))) * GRID_UM
    for _ in range(12):
        if len(xy) < 2:
            break
        distance, other = cKDTree(xy).query(xy, 2)
        d = xy - xy[other[:, 1]]
        moved = xy + d / np.maximum(distance[:, 1:], 1e-6) * np.maximum(6.2 - distance[:, 1:], 0) * 0.4
        free = sample_field(layout.clearance, GRID_UM, moved) < -2.5
        xy[free] = moved[free]
    return xy, 3.2 + 0.25 * rng.standard_normal(len(xy))
