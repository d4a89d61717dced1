"""Simulated tissue: cell types, domains, and the layout of a section (outline, layers, ducts, vessels, clusters)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from scipy import ndimage

from prts.simulate.fields import smooth_field

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Floats = NDArray[np.float32]

GRID_UM = 2.0
"""Grid spacing of the layout's maps."""


@dataclass(frozen=True)
class CellType:
    """Appearance of a cell type. Optical densities are base 10, per stain (1 is a dark nucleus in hematoxylin)."""

    name: str
    diameter_um: float
    """Diameter of a disc with the median area of the nucleus."""
    size_sd: float
    """Log-normal standard deviation of the diameter."""
    elongation: float
    irregular: float
    """Standard deviation of the harmonics of the outline, as a fraction of the radius."""
    sagitta_um: float
    """How far the ends of the nucleus are bent sideways."""
    haematoxylin: float
    clumps: float
    """Contrast of coarse chromatin."""
    grain: float
    """Contrast of fine chromatin."""
    rim: float
    nucleolus: float
    cytoplasm_eosin: float
    cytoplasm_haematoxylin: float
    membrane: float
    reach_um: float
    """Distance from the center up to which cytoplasm covers the matrix."""
    cytoplasm_umi: float
    """UMIs in the cytoplasm per UMI in the nucleus."""
    along: str
    """Direction of the long axis: `fibre`, `edge` (toward the nearest lumen or surface) or `any`."""


TYPES = (
    CellType("EPI", 7.8, 0.08, 1.5, 0.03, 0.0, 0.92, 0.12, 0.18, 0.18, 0.15, 0.29, 0.12, 0.50, 15.0, 1.3, "edge"),
    CellType("TUM", 10.2, 0.15, 1.22, 0.06, 0.0, 0.60, 0.32, 0.18, 0.50, 1.00, 0.23, 0.15, 0.35, 15.0, 1.4, "any"),
    CellType("FIB", 7.2, 0.12, 4.2, 0.05, 0.9, 0.95, 0.08, 0.14, 0.05, 0.0, 0.23, 0.04, 0.0, 3.2, 0.8, "fibre"),
    CellType("LYM", 6.1, 0.07, 1.10, 0.025, 0.0, 1.22, 0.26, 0.10, 0.05, 0.0, 0.16, 0.10, 0.0, 4.0, 0.5, "any"),
    CellType("PLA", 7.0, 0.07, 1.18, 0.025, 0.0, 1.02, 0.42, 0.08, 0.22, 0.0, 0.24, 0.30, 0.05, 6.5, 1.2, "any"),
    CellType("END", 6.6, 0.10, 5.0, 0.04, 1.3, 1.08, 0.08, 0.10, 0.05, 0.0, 0.30, 0.04, 0.0, 2.6, 0.6, "fibre"),
    CellType("MAC", 8.4, 0.11, 1.45, 0.05, 1.2, 0.62, 0.16, 0.18, 0.22, 0.2, 0.11, 0.04, 0.05, 7.5, 1.2, "any"),
    CellType("SMC", 7.7, 0.10, 5.0, 0.03, 0.4, 0.74, 0.08, 0.16, 0.10, 0.0, 0.40, 0.03, 0.0, 5.0, 1.0, "fibre"),
)
TYPE_NAMES = tuple(kind.name for kind in TYPES)

DOMAIN_NAMES = ("stroma", "tumour", "duct", "lymphoid", "vessel", "muscle", "surface")
STROMA, TUMOUR, DUCT, LYMPHOID, VESSEL, MUSCLE, SURFACE = range(len(DOMAIN_NAMES))
EMPTY = -1
"""Glass and lumens."""

UM2_PER_NUCLEUS = np.array([560.0, 185.0, 95.0, 62.0, 170.0, 430.0, 95.0])
"""Tissue area per nucleus, by domain."""

TYPE_SHARES = np.array(
    [  # EPI   TUM   FIB   LYM   PLA   END   MAC   SMC
        [0.00, 0.02, 0.58, 0.12, 0.10, 0.07, 0.11, 0.00],
        [0.00, 0.84, 0.03, 0.05, 0.00, 0.02, 0.06, 0.00],
        [0.93, 0.00, 0.02, 0.04, 0.00, 0.00, 0.01, 0.00],
        [0.00, 0.00, 0.01, 0.82, 0.10, 0.01, 0.06, 0.00],
        [0.00, 0.00, 0.10, 0.03, 0.00, 0.30, 0.02, 0.55],
        [0.00, 0.00, 0.08, 0.03, 0.00, 0.04, 0.03, 0.82],
        [0.90, 0.00, 0.02, 0.06, 0.00, 0.00, 0.02, 0.00],
    ]
)
"""Fraction of each cell type among the nuclei of each domain, (domains, types)."""

N_GRADIENTS = 2
"""The first gradient also tints the eosin and lowers the cell density; the second darkens and enlarges nuclei."""

UM2_PER_NUCLEUS_OVERALL = 270.0
_OUTLINE_SHARE = 0.66
_ASPECT = 1.15
# Domain, tissue area (um2) per structure, range of radii (um), thickness of the wall (um, 0: solid).
_STRUCTURES = (
    (LYMPHOID, 0.35e6, (55.0, 95.0), 0.0),
    (DUCT, 0.13e6, (45.0, 80.0), 27.0),
    (VESSEL, 0.20e6, (32.0, 60.0), 15.0),
)


@dataclass(frozen=True)
class Layout:
    """Maps of a section on a grid of GRID_UM: value [row, column] at ((column + .5) GRID_UM, (row + .5) GRID_UM)."""

    width_um: float
    height_um: float
    domain: NDArray[np.int8]
    """Index into DOMAIN_NAMES, or EMPTY."""
    outline: NDArray[np.bool_]
    """Inside the outer border of the tissue, including lumens."""
    clearance: Floats
    """Distance (um) to the nearest glass or lumen; negative inside these."""
    lumen: NDArray[np.int8]
    """Domain that encloses the lumen, or EMPTY."""
    across: Floats
    """Stream function (um): collagen and muscle fibers run along its level lines."""
    along: Floats
    """Coordinate (um) along the fibers."""
    gradients: Floats
    """(N_GRADIENTS, rows, columns), zero mean and unit deviation over the tissue, clipped to -2..2."""
    density: Floats
    """Nuclei per um2; 0 close to an edge."""


def build_layout(cells: int, rng: np.random.Generator) -> Layout:
    """Lay out a section with room for a number of nuclei.

    Parameters
    ----------
    cells
        Number of nuclei; it determines the area, but not the size of ducts, vessels and clusters (unless they would not fit).
    rng
        Source of the geometry.
    """
    height_um = float(np.sqrt(cells * UM2_PER_NUCLEUS_OVERALL / _OUTLINE_SHARE / _ASPECT))
    width_um = _ASPECT * height_um
    shape = (int(np.ceil(height_um / GRID_UM)), int(np.ceil(width_um / GRID_UM)))
    scale = min(1.0, height_um / 700)
    y, x = np.ogrid[: shape[0], : shape[1]]
    x_um, y_um = (x + np.float32(0.5)) * np.float32(GRID_UM), (y + np.float32(0.5)) * np.float32(GRID_UM)

    outline = _outline(x_um / width_um, y_um / height_um, rng) > smooth_field(rng, shape, GRID_UM, 60 * scale) * 0.008
    depth = GRID_UM * ndimage.distance_transform_edt(np.pad(outline, 1))[1:-1, 1:-1].astype(np.float32)
    domain = np.where(outline, np.int8(STROMA), np.int8(EMPTY))

    # Tumor nests separated by thin septa of stroma.
    nests = smooth_field(rng, shape, GRID_UM, 420 * scale) + 0.15 * smooth_field(rng, shape, GRID_UM, 50 * scale)
    septa = np.abs(smooth_field(rng, shape, GRID_UM, 170 * scale)) < 0.11
    domain[outline & (nests > np.quantile(nests[outline], 0.60)) & ~septa & (depth > 40 * scale)] = TUMOUR
    # Layers: muscle at the bottom, epithelium on the upper surface.
    border = 0.76 + 0.035 * smooth_field(rng, shape, GRID_UM, 500 * scale)
    domain[outline & (y_um / height_um > border)] = MUSCLE
    skin = (26 + 4 * smooth_field(rng, shape, GRID_UM, 120)) * max(scale, 0.5)
    domain[outline & (depth < skin) & (y_um / height_um < 0.42)] = SURFACE
    lumen = np.full(shape, EMPTY, np.int8)
    _add_structures(domain, lumen, depth, outline, scale, rng)

    solid = domain >= 0
    inside = ndimage.distance_transform_edt(np.pad(solid, 1))[1:-1, 1:-1]
    outside = ndimage.distance_transform_edt(~solid)
    clearance = (GRID_UM * (inside - outside)).astype(np.float32)
    # Half a square in either direction puts the zero level on the border itself.
    clearance -= np.float32(0.5 * GRID_UM) * np.sign(clearance)

    angle = rng.uniform(-0.5, 0.5)
    bend = 28 * scale * smooth_field(rng, shape, GRID_UM, 260 * scale)
    ring = 90 * np.exp(-np.maximum(clearance, 0) / np.float32(40 * scale)) * scale
    gradients = np.stack(
        [_gradient(rng, shape, x_um / width_um, y_um / height_um, solid, scale) for _ in range(N_GRADIENTS)]
    )
    per_um2 = np.append(1 / UM2_PER_NUCLEUS, 0.0)[domain] * (1 - 0.12 * gradients[0])
    density = np.where(clearance > 3.2 * scale, per_um2, 0).astype(np.float32)
    density *= np.float32(cells / (density.sum(dtype=np.float64) * GRID_UM**2))
    return Layout(
        width_um=width_um,
        height_um=height_um,
        domain=domain,
        outline=outline,
        clearance=clearance,
        lumen=lumen,
        across=np.asarray(y_um * np.cos(angle) - x_um * np.sin(angle) + bend + ring, np.float32),
        along=np.asarray(x_um * np.cos(angle) + y_um * np.sin(angle) + 0.5 * bend, np.float32),
        gradients=gradients,
        density=density,
    )


def _outline(x: Floats, y: Floats, rng: np.random.Generator) -> Floats:
    """Positive inside a rounded, lobed shape in the unit square."""
    u, v = (x - 0.5) * 2, (y - 0.5) * 2
    theta = np.arctan2(v, u)
    radius = np.full_like(theta, 0.85)
    for k in (1, 2, 3, 4, 5, 7):
        radius += np.float32(0.05 / k**0.6 * rng.standard_normal()) * np.cos(
            k * theta + np.float32(rng.uniform(0, 6.3))
        )
    radius = np.clip(radius, 0.55, 0.93)
    # A superellipse is fuller than an ellipse, like a trimmed tissue block.
    return np.asarray(radius - (np.abs(u) ** 2.8 + np.abs(v) ** 2.8) ** (1 / 2.8), np.float32)


def _gradient(
    rng: np.random.Generator, shape: tuple[int, int], x: Floats, y: Floats, solid: NDArray[np.bool_], scale: float
) -> Floats:
    """A smooth field: a slope across the section plus slow waves."""
    angle = rng.uniform(0, 2 * np.pi)
    field = 2.2 * (x * np.cos(angle) + y * np.sin(angle)) + 0.6 * smooth_field(rng, shape, GRID_UM, 600 * scale)
    return np.asarray(np.clip((field - field[solid].mean()) / field[solid].std(), -2, 2), np.float32)


def _add_structures(
    domain: NDArray[np.int8],
    lumen: NDArray[np.int8],
    depth: Floats,
    outline: NDArray[np.bool_],
    scale: float,
    rng: np.random.Generator,
) -> None:
    """Draw a few dozen ducts, vessels and lymphoid clusters into the maps, at a distance from each other."""
    tissue_um2 = float(outline.sum()) * GRID_UM**2
    placed: list[tuple[float, float, float]] = []
    for kind, um2_each, radii, wall in _STRUCTURES:
        for _ in range(max(1, round(tissue_um2 / um2_each))):
            radius = rng.uniform(*radii) * scale
            ok = np.flatnonzero((depth > radius * 1.15 + 30 * scale) & (domain != MUSCLE))
            tries = rng.choice(ok, 40) if ok.size else ok
            rows, cols = np.divmod(tries, domain.shape[1])
            apart = [
                all(
                    np.hypot(r - pr, c - pc) * GRID_UM > radius * 1.2 + pradius * 1.2 + 16 * scale
                    for pr, pc, pradius in placed
                )
                for r, c in zip(rows, cols, strict=True)
            ]
            if not any(apart):
                continue
            at = apart.index(True)
            placed.append((float(rows[at]), float(cols[at]), radius))
            disc = _Disc(int(rows[at]), int(cols[at]), radius, kind, wall * scale)
            _add_structure(domain, lumen, outline, disc, rng)


class _Disc(NamedTuple):
    row: int
    col: int
    radius: float  # um
    kind: int
    wall: float  # um; 0: solid


def _add_structure(
    domain: NDArray[np.int8],
    lumen: NDArray[np.int8],
    outline: NDArray[np.bool_],
    disc: _Disc,
    rng: np.random.Generator,
) -> None:
    """Draw a lobed disc of a domain, hollow if it has a wall."""
    row, col, radius, kind, wall = disc
    reach = int(radius * 1.6 / GRID_UM) + 2
    window = (slice(max(row - reach, 0), row + reach + 1), slice(max(col - reach, 0), col + reach + 1))
    rows, cols = np.ogrid[window[0].start : window[0].stop, window[1].start : window[1].stop]
    v, u = (
        (rows[: domain.shape[0] - window[0].start] - row) * GRID_UM,
        (cols[:, : domain.shape[1] - window[1].start] - col) * GRID_UM,
    )
    squeeze, turn = rng.uniform(1.0, 1.25), rng.uniform(0, np.pi)
    p, q = u * np.cos(turn) + v * np.sin(turn), v * np.cos(turn) - u * np.sin(turn)
    theta = np.arctan2(q * squeeze, p / squeeze)
    edge = np.full_like(theta, radius)
    for k in (2, 3, 4, 5):
        edge += radius * 0.09 / np.sqrt(k) * rng.standard_normal() * np.cos(k * theta + rng.uniform(0, 6.3))
    distance = edge - np.hypot(p / squeeze, q * squeeze)
    inside = (distance > 0) & outline[window]
    domain[window][inside] = kind
    if wall:
        hollow = distance > wall
        domain[window][hollow] = EMPTY
        lumen[window][hollow] = kind
