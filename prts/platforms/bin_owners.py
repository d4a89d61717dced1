"""Which unit each 2 um bin belongs to: the nucleus around its center, or the cell that grows from the nearest nucleus."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
import shapely
from numpy.typing import NDArray
from pydantic import Field
from scipy import ndimage

from prts.geometry import lattice_points_within
from prts.io.outlines import largest_parts
from prts.platforms.bin_positions import BIN_SIZE_UM

if TYPE_CHECKING:
    from prts.platforms.bin_positions import BinGrid

NO_UNIT, SHARED = -1, -2


@dataclass(frozen=True)
class CountSettings:
    """Which bins are counted for a nucleus; the defaults are the paper's.

    Parameters
    ----------
    expand_um
        Distance up to which a bin belongs to the nearest nucleus; 0: only bins in nuclei, 8: the cells of Space Ranger 4.
    shared
        Bins in several nuclei: `drop` them, give them to the `nearest` centroid, or `split` their UMIs at random.
    sigma_um
        With `split`, a nucleus at distance d of its centroid gets a UMI with a probability proportional to exp(-d^2 / 2 sigma^2).
    seed
        Seed of the random split.
    """

    expand_um: Annotated[float, Field(ge=0, le=100)] = 0.0
    shared: Literal["drop", "nearest", "split"] = "drop"
    sigma_um: Annotated[float, Field(gt=0, le=100)] = 4.0
    seed: Annotated[int, Field(ge=0, le=2**32 - 1)] = 0

    @classmethod
    def from_stored(cls, stored: Mapping[str, Any]) -> CountSettings:
        """Settings from a prediction or a bundle."""
        return cls(**{key: np.asarray(value).item() for key, value in stored.items()})

    def settings(self) -> dict[str, Any]:
        """What decides the counts beyond the default, JSON-like; nothing for the default, so that its counts keep their name."""
        used = asdict(self)
        if self.shared != "split":
            del used["sigma_um"], used["seed"]
        default = asdict(CountSettings())
        return {key: value for key, value in used.items() if key in ("sigma_um", "seed") or value != default[key]}


@dataclass(frozen=True)
class SharedBins:
    """Bins in several nuclei, one row per bin and nucleus, sorted by bin.

    Attributes
    ----------
    place
        (n,) index of the bin in the flattened array.
    unit
        (n,) one of its nuclei.
    share
        (n,) probability that a UMI of the bin is of this nucleus; the shares of a bin add up to 1.
    """

    place: NDArray[np.int64]
    unit: NDArray[np.int64]
    share: NDArray[np.float64]


@dataclass(frozen=True)
class BinOwners:
    """The unit of each bin of an array.

    Attributes
    ----------
    unit
        (n_rows, n_cols) int32: index of the unit, `NO_UNIT`, or `SHARED` for a bin in several nuclei that is dropped.
    in_nucleus
        (n_rows, n_cols): whether the center of the bin is in the nucleus of its unit.
    shared
        With `shared="split"`, the bins whose UMIs are divided; `unit` is then their nearest nucleus.
    """

    unit: NDArray[np.int32]
    in_nucleus: NDArray[np.bool_]
    shared: SharedBins | None = None


def assign_bins(polygons: NDArray[Any], grid: BinGrid, settings: CountSettings | None = None) -> BinOwners:
    """Assign each bin of an array to a unit.

    A bin belongs to the nucleus whose polygon contains its center (shapely's `within`: a center on a boundary is in none). With
    `expand_um`, a bin outside all nuclei belongs to the unit of the nearest nuclear bin, up to ceil(expand_um / 2) bins away as Space
    Ranger 4 measures it; of several at the same distance, to the unit whose centroid is nearer. Bins that are cut off from the largest
    piece of their unit (bins that share a side) are then dropped.

    Parameters
    ----------
    polygons
        Nuclei in full-resolution pixels, (n_units,).
    grid
        Positions of the bins.
    settings
        How far nuclei grow, and what happens to bins in several; the paper's rule if None.
    """
    settings = CountSettings() if settings is None else settings
    # the residual is the largest along one axis
    nucleus, row, col = lattice_points_within(
        polygons, grid.affine, grid.n_cols, grid.n_rows, xy=grid.xy, residual=1.5 * grid.residual_px
    )
    place = row * grid.n_cols + col
    unit = np.full(grid.n_rows * grid.n_cols, NO_UNIT, dtype=np.int32)
    unit[place] = nucleus
    # a nucleus claims a bin once, so a nucleus that is not the owner shares the bin with another
    unit[place[unit[place] != nucleus]] = SHARED
    centroids = shapely.get_coordinates(shapely.centroid(polygons))
    shared = None
    if settings.shared != "drop":
        shared = _shared_bins(nucleus, place, unit, centroids, grid, settings.sigma_um)
        unit[shared.place] = _nearest(shared)
    owner = unit.reshape(grid.n_rows, grid.n_cols)
    nuclear = owner >= 0
    if settings.expand_um > 0:
        owner = _expanded(owner, centroids, grid, math.ceil(settings.expand_um / BIN_SIZE_UM))
        parts, _ = largest_parts(np.maximum(owner, NO_UNIT) + 1)
        owner = np.where((owner >= 0) & (parts == 0), np.int32(NO_UNIT), owner)
        nuclear &= owner >= 0
    if settings.shared == "split" and shared is not None:
        kept = owner.ravel()[shared.place] >= 0
        shared = SharedBins(shared.place[kept], shared.unit[kept], shared.share[kept])
    return BinOwners(owner, nuclear, shared if settings.shared == "split" else None)


def _shared_bins(
    nucleus: NDArray[np.int64],
    place: NDArray[np.int64],
    unit: NDArray[np.int32],
    centroids: NDArray[np.float64],
    grid: BinGrid,
    sigma_um: float,
) -> SharedBins:
    """The bins in several nuclei, with their shares."""
    several = np.flatnonzero(unit[place] == SHARED)
    several = several[np.lexsort((nucleus[several], place[several]))]
    at, owner = place[several], nucleus[several]
    if not len(at):
        return SharedBins(at, owner, np.empty(0))
    px = np.linalg.norm(grid.xy(*np.divmod(at, grid.n_cols)) - centroids[owner], axis=1)
    log_weight = -0.5 * np.square(px * BIN_SIZE_UM / float(np.mean(grid.pitch_px)) / sigma_um)
    first = np.flatnonzero(np.r_[True, at[1:] != at[:-1]])
    n = np.diff(np.r_[first, len(at)])
    weight = np.exp(log_weight - np.repeat(np.maximum.reduceat(log_weight, first), n))
    return SharedBins(at, owner, weight / np.repeat(np.add.reduceat(weight, first), n))


def _nearest(shared: SharedBins) -> NDArray[np.int64]:
    """The unit with the largest share of each row's bin, the first among equals, (n,)."""
    if not len(shared.place):
        return shared.unit
    order = np.lexsort((shared.unit, -shared.share, shared.place))
    first = np.flatnonzero(np.r_[True, np.diff(shared.place) > 0])
    return np.repeat(shared.unit[order][first], np.diff(np.r_[first, len(shared.place)]))


def _expanded(owner: NDArray[np.int32], centroids: NDArray[np.float64], grid: BinGrid, reach: int) -> NDArray[np.int32]:
    """Owners after unowned bins went to the nearest owned bin, at most `reach` bins away."""
    if not (owner >= 0).any():
        return owner
    # a squared distance between bins is a whole number
    squared = np.rint(np.square(ndimage.distance_transform_edt(owner < 0))).astype(np.int32)
    row, col = np.nonzero((owner == NO_UNIT) & (squared <= reach**2))
    ring = squared[row, col]
    del squared
    order = np.argsort(ring, kind="stable")
    grown = owner.copy()
    offsets = np.arange(-reach, reach + 1)
    norm = np.add.outer(offsets**2, offsets**2)
    for size in np.unique(ring):
        at = order[slice(*np.searchsorted(ring[order], [size, size + 1]))]
        r, c = row[at], col[at]
        xy = grid.xy(r, c)
        best, distance = np.full(len(at), NO_UNIT, np.int32), np.full(len(at), np.inf)
        for dy, dx in zip(*np.nonzero(norm == size), strict=True):
            y, x = r + offsets[dy], c + offsets[dx]
            inside = np.flatnonzero((y >= 0) & (y < grid.n_rows) & (x >= 0) & (x < grid.n_cols))
            found = owner[y[inside], x[inside]]
            inside, found = inside[found >= 0], found[found >= 0]
            px = np.square(xy[inside] - centroids[found]).sum(axis=1)
            nearer = (px < distance[inside]) | ((px == distance[inside]) & (found < best[inside]))
            best[inside[nearer]], distance[inside[nearer]] = found[nearer], px[nearer]
        grown[r, c] = best
    return grown
