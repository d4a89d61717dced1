"""Nuclei of a simulated section: their shapes, shared by image, bins and polygons, and their positions without overlap."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import shapely
from scipy import ndimage
from scipy.spatial import cKDTree

from prts.simulate.fields import sample_field
from prts.simulate.tissue import DUCT, GRID_UM, SURFACE, TYPE_SHARES, TYPES, VESSEL, Layout

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Floats = NDArray[np.float64]
    Index = NDArray[np.intp]

HARMONICS = 4
"""Number of harmonics (2, 3, ...) by which an outline deviates from an ellipse."""
VERTICES = 40
_REPULSION_ROUNDS = 30


@dataclass(frozen=True)
class SimulatedNuclei:
    """Nuclei of a simulated section; the first axis of every array is the n nuclei.

    An outline is an ellipse (half axes `half_um`) scaled by `1 + sum_k cos_k cos(kt) + sin_k sin(kt)` at parametric angle t, then bent
    (y += bend x^2 along its long axis) and rotated by `angle`.
    """

    xy_um: Floats
    half_um: Floats
    angle: Floats
    bend: Floats
    wobble: NDArray[np.complex128]
    """(n, HARMONICS) amplitude of cos (real) and sin (imaginary)."""
    kind: NDArray[np.int8]
    """Index into TYPES."""
    domain: NDArray[np.int8]
    gradients: Floats
    """(n, N_GRADIENTS) values at the center."""

    def __len__(self) -> int:
        return len(self.kind)

    def __getitem__(self, index: Any) -> SimulatedNuclei:
        """Select nuclei, as in indexing an array."""
        return replace(self, **{name: getattr(self, name)[index] for name in self.__dataclass_fields__})

    def depth(self, index: Index, dx: Floats, dy: Floats) -> Floats:
        """Position relative to the outline: 0 at the center, 1 on the outline, proportional in between.

        Parameters
        ----------
        index
            Nucleus of each point.
        dx, dy
            Offset (um) of each point from the center of its nucleus.
        """
        cos, sin = np.cos(self.angle)[index], np.sin(self.angle)[index]
        p = dx * cos + dy * sin
        q = dy * cos - dx * sin - self.bend[index] * p * p
        z = p / self.half_um[index, 0] + 1j * (q / self.half_um[index, 1])
        radius = np.maximum(np.abs(z), 1e-9)
        return np.asarray(radius / (1 + _wobble(self.wobble[index], z / radius)))

    def reach_um(self) -> Floats:
        """Radius (um) of a circle around each center that contains the nucleus."""
        long = self.half_um[:, 0] * (1 + np.abs(self.wobble).sum(axis=1))
        return np.asarray(long + np.abs(self.bend) * long**2 + 0.1)

    def polygons(self, mpp: float) -> NDArray[np.object_]:
        """Outlines as polygons in full-resolution pixels, shape (n,)."""
        t = np.linspace(0, 2 * np.pi, VERTICES, endpoint=False)
        # Wobble at angle t for all nuclei at once.
        turns = np.exp(1j * t[:, None] * np.arange(2, 2 + HARMONICS))
        scale = 1 + (self.wobble[:, None, :].real * turns.real + self.wobble[:, None, :].imag * turns.imag).sum(axis=2)
        p = self.half_um[:, :1] * np.cos(t) * scale
        q = self.half_um[:, 1:] * np.sin(t) * scale + self.bend[:, None] * p * p
        cos, sin = np.cos(self.angle)[:, None], np.sin(self.angle)[:, None]
        xy = np.stack([p * cos - q * sin, p * sin + q * cos], axis=2) + self.xy_um[:, None, :]
        return np.asarray(shapely.polygons(xy / mpp), dtype=object)


def _wobble(amplitude: NDArray[np.complex128], unit: NDArray[np.complex128]) -> Floats:
    """Deviation from the ellipse at the angle of a unit complex number, from powers instead of trigonometry."""
    total = np.zeros(unit.shape)
    power = unit
    for k in range(HARMONICS):
        power = power * unit
        total += amplitude[:, k].real * power.real + amplitude[:, k].imag * power.imag
    return total


def lattice_around(centre: Floats, reach: Floats, shape: tuple[int, int]) -> tuple[Index, Index, Index]:
    """Points of an integer lattice in a square around each center.

    Parameters
    ----------
    centre
        (n, 2) column and row; lattice point (c, r) is at exactly c, r.
    reach
        (n,) half the side of each square.
    shape
        Rows and columns of the lattice; points outside are omitted.

    Returns
    -------
    Row, column and index of the center, for every point of every square.
    """
    low = np.maximum(np.ceil(centre - reach[:, None]), 0).astype(np.intp)
    high = np.minimum(np.floor(centre + reach[:, None]), np.array([shape[1], shape[0]]) - 1).astype(np.intp)
    size = np.maximum(high - low + 1, 0)
    count = size[:, 0] * size[:, 1]
    index = np.repeat(np.arange(len(centre)), count)
    at = np.arange(count.sum()) - np.repeat(np.cumsum(count) - count, count)
    row, col = np.divmod(at, np.maximum(size[:, 0], 1)[index])
    return row + low[index, 1], col + low[index, 0], index


def place_nuclei(layout: Layout, cells: int, rng: np.random.Generator) -> SimulatedNuclei:
    """Draw types and shapes of nuclei and place them without overlap.

    Parameters
    ----------
    layout
        The section.
    cells
        Number of nuclei.
    rng
        Source of all randomness here.

    Returns
    -------
    Nuclei; neighbors may touch but barely overlap.
    """
    xy_um = _quasi_random(layout, cells, rng)
    domain = sample_field(layout.domain, GRID_UM, xy_um).astype(np.int8)
    clearance = sample_field(layout.clearance, GRID_UM, xy_um).astype(np.float64)
    chance = np.cumsum(TYPE_SHARES, axis=1)[domain]
    kind = np.minimum((rng.random(cells)[:, None] > chance).sum(axis=1), len(TYPES) - 1).astype(np.int8)
    # The endothelium is the innermost layer of a vessel's wall.
    names = [t.name for t in TYPES]
    wall = domain == VESSEL
    kind[wall & (clearance < 5.5)] = names.index("END")
    kind[wall & (clearance >= 5.5) & (kind == names.index("END"))] = names.index("SMC")

    nuclei = _shapes(layout, xy_um, domain, kind, rng)
    return _separate(nuclei, layout, rng)


def _quasi_random(layout: Layout, cells: int, rng: np.random.Generator) -> Floats:
    """Points of the R2 sequence thinned to the layout's density, (cells, 2) um: more even than independent draws."""
    top = float(layout.density.max())
    area = layout.width_um * layout.height_um
    n = int(1.3 * area * top) + 1000
    golden = 1.32471795724474602596
    while True:
        i = np.arange(1, n + 1)
        unit = np.stack([i / golden, i / golden**2], axis=1) + rng.random(2)
        xy = (unit % 1.0) * [layout.width_um, layout.height_um]
        xy += rng.normal(0, 0.25 / np.sqrt(top), xy.shape)
        kept = xy[rng.random(n) * top < sample_field(layout.density, GRID_UM, xy)]
        if len(kept) >= cells:
            # Any stretch of the sequence covers the plane evenly; a random subset would be less even.
            return np.asarray(kept[:cells])
        n = int(n * 1.3)


def _shapes(
    layout: Layout, xy_um: Floats, domain: NDArray[np.int8], kind: NDArray[np.int8], rng: np.random.Generator
) -> SimulatedNuclei:
    """Shapes drawn per cell type; long axes follow the fibers or point to the nearest edge."""
    n = len(kind)
    table = {
        f: np.array([getattr(t, f) for t in TYPES])[kind]
        for f in ("diameter_um", "size_sd", "elongation", "irregular", "sagitta_um")
    }
    gradients = np.stack([sample_field(g, GRID_UM, xy_um) for g in layout.gradients], axis=1).astype(np.float64)
    radius = 0.5 * table["diameter_um"] * np.exp(table["size_sd"] * rng.standard_normal(n) + 0.03 * gradients[:, 1])
    stretch = np.sqrt(np.maximum(table["elongation"] * np.exp(0.12 * rng.standard_normal(n)), 1.02))
    half = np.stack([radius * stretch, radius / stretch], axis=1)
    fall = 1 / np.arange(1, HARMONICS + 1) ** 0.7
    cos, sin = rng.standard_normal((2, n, HARMONICS)) * fall * table["irregular"][:, None]
    wobble = np.asarray(cos + 1j * sin, np.complex128)
    wobble /= np.maximum(1, np.abs(wobble).sum(axis=1) / 0.3)[:, None]
    bend = table["sagitta_um"] / half[:, 0] ** 2 * rng.normal(0.6, 0.6, n)

    slope = _angle(ndimage.gaussian_filter(layout.across, 1.5), xy_um) + np.pi / 2
    edge = _angle(ndimage.gaussian_filter(layout.clearance, 2.0), xy_um)
    along = np.array([t.along for t in TYPES])[kind]
    # Nuclei in a vessel follow its wall, not the stroma around it.
    slope = np.where(domain == VESSEL, edge + np.pi / 2, slope)
    lined = (along == "edge") & np.isin(domain, (DUCT, SURFACE))
    angle = np.where(along == "fibre", slope, np.where(lined, edge, rng.uniform(0, np.pi, n)))
    return SimulatedNuclei(xy_um, half, angle + 0.16 * rng.standard_normal(n), bend, wobble, kind, domain, gradients)


def _angle(field: NDArray[np.float32], xy_um: Floats) -> Floats:
    """Direction in which a field rises fastest at each point."""
    down, right = (np.asarray(slope) for slope in np.gradient(field))
    return np.asarray(np.arctan2(sample_field(down, GRID_UM, xy_um), sample_field(right, GRID_UM, xy_um)), np.float64)


def _separate(nuclei: SimulatedNuclei, layout: Layout, rng: np.random.Generator) -> SimulatedNuclei:
    """Push touching nuclei apart within their domain, then shrink the few that still overlap."""
    xy = nuclei.xy_um.copy()
    xy += rng.normal(0, 1e-3, xy.shape)
    neighbours = min(8, len(nuclei))
    me = np.repeat(np.arange(len(nuclei)), neighbours - 1)
    for _ in range(_REPULSION_ROUNDS):
        other, gap, d = _gaps(nuclei, xy, me, neighbours)
        # Leave a small gap; each nucleus moves half of the way.
        push = np.where(gap < 0.35, 0.5 * (0.35 - gap), 0)[:, None] * d
        step = np.zeros_like(xy)
        np.add.at(step, me, -push)
        length = np.linalg.norm(step, axis=1, keepdims=True)
        new = xy + step * np.minimum(1, 2.5 / np.maximum(length, 1e-9))
        stays = (sample_field(layout.domain, GRID_UM, new) == nuclei.domain) & (
            sample_field(layout.clearance, GRID_UM, new) > 2.0
        )
        xy[stays] = new[stays]
    other, gap, d = _gaps(nuclei, xy, me, neighbours)
    distance = np.linalg.norm(xy[other] - xy[me], axis=1)
    shrink = np.ones(len(nuclei))
    np.minimum.at(shrink, me, np.where(gap < 0, distance / (distance - gap), 1))
    return replace(nuclei, xy_um=xy, half_um=nuclei.half_um * np.maximum(shrink, 0.7)[:, None])


def _gaps(nuclei: SimulatedNuclei, xy: Floats, me: Index, neighbours: int) -> tuple[Index, Floats, Floats]:
    """Neighbors of every nucleus, the gap (um, negative if they overlap) on the line between them, and its unit direction."""
    other = cKDTree(xy).query(xy, neighbours)[1][:, 1:].ravel()
    d = xy[other] - xy[me]
    distance = np.maximum(np.linalg.norm(d, axis=1), 1e-6)
    own = distance / np.maximum(nuclei.depth(me, d[:, 0], d[:, 1]), 1e-6)
    theirs = distance / np.maximum(nuclei.depth(other, -d[:, 0], -d[:, 1]), 1e-6)
    return other, distance - own - theirs, d / distance[:, None]
