"""Tiles around nuclei, each pixel of the slide read once.

The nuclei are visited in row bands of 512 px of the encoder's grid. A band's tiles need the band and the 256 rows above it, so a buffer
of 768 rows is all that is ever held: moving down a band keeps its lower 256 rows and reads 512 new ones. Requests to the slide lie on a
fixed grid (512 rows x 4096 columns), which makes a tile's pixels independent of where an interrupted extraction went on. Blocks that no
tile needs are not read.

For an encoder on a GPU the buffer lies in its memory and tiles are cut there: each pixel crosses the bus once, not once for each of the
tiles that share it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import shapely
import torch
from numpy.typing import NDArray

if TYPE_CHECKING:
    from geopandas import GeoDataFrame

    from prts.io.slide import Slide

TILE = 256
BAND = 512
BLOCK = 4096

Ints = NDArray[np.int64]


class TilePlan(NamedTuple):
    """Where the tiles lie, in the order in which they are cut, and which of them each nucleus takes its vectors from.

    Attributes
    ----------
    origin
        x, y of the tiles' top left pixels on the encoder's grid, (t, 2), band by band.
    order
        Positions in the nuclei table, (n,), tile by tile; all that follows is in this order.
    spatial
        Centroids in full-resolution pixels, (n, 2).
    tile
        The tile that gives the local vector, (n,), rising.
    polygons
        The nuclei in pixels of that tile, (n,).
    around, weight
        The tiles whose weighted sum is the global vector and their weights, both (n, k).
    """

    origin: Ints
    order: Ints
    spatial: NDArray[np.float64]
    tile: Ints
    polygons: NDArray[np.object_]
    around: Ints
    weight: NDArray[np.float32]

    def nuclei(self, tiles: slice) -> slice:
        """The nuclei whose local vectors consecutive tiles give."""
        start, stop = np.searchsorted(self.tile, [tiles.start, tiles.stop])
        return slice(int(start), int(stop))


def plan_tiles(nuclei: GeoDataFrame, slide_mpp: float, mpp: float) -> TilePlan:
    """Lay a tile around each nucleus, band by band and left to right, for one pass down the slide.

    The tile's centre is the pixel of the encoder's grid nearest to the nucleus' centroid, so that every tile is an exact window of the
    rescaled slide (METHOD.md, Preparation 5).

    Parameters
    ----------
    nuclei
        Nuclei in full-resolution pixels, n rows.
    slide_mpp
        um per full-resolution pixel.
    mpp
        um per pixel of the tiles.
    """
    geometry = np.asarray(nuclei.geometry.array, dtype=object)
    centroid = shapely.get_coordinates(shapely.centroid(geometry))
    scale = slide_mpp / mpp
    origin = centre_pixel(centroid * scale) - TILE // 2
    order = np.lexsort((origin[:, 1], origin[:, 0], _band(origin[:, 1])))
    tile = np.arange(len(order))
    return TilePlan(
        origin=origin[order],
        order=order,
        spatial=centroid[order],
        tile=tile,
        polygons=in_tile(geometry[order], scale, origin[order]),
        around=tile[:, None],
        weight=np.ones((len(order), 1), dtype=np.float32),
    )


def centre_pixel(xy: NDArray[np.float64]) -> Ints:
    """The pixel nearest to each point (n, 2): where a nucleus' tile has its centre."""
    return np.floor(xy + 0.5).astype(np.int64)


def in_tile(polygons: NDArray[np.object_], scale: float, origin: Ints) -> NDArray[np.object_]:
    """Polygons (n,) in full-resolution pixels, in pixels of tiles with these origins (n, 2)."""
    xy, owner = shapely.get_coordinates(polygons, return_index=True)
    # A copy: set_coordinates works in place on the array that it is given.
    moved: NDArray[np.object_] = shapely.set_coordinates(polygons.copy(), xy * scale - origin[owner])
    return moved


def _band(y: Ints) -> Ints:
    """Band of a tile whose top row is y: band k takes tops in [512 k - 256, 512 k + 256)."""
    return np.floor_divide(y + TILE, BAND)


def cut_tiles(
    slide: Slide, mpp: float, plan: TilePlan, groups: Sequence[slice], device: torch.device | None = None
) -> Iterator[torch.Tensor]:
    """Cut the tiles of each group, in order.

    Parameters
    ----------
    slide
        The image; asked for pixels of the grid at `mpp`, white outside the image.
    mpp
        um per pixel of the tiles.
    plan
        All tiles of the slide. Requests follow from the whole plan, not from the groups asked for.
    groups
        Rising slices of the plan, such as the batches that are still to be encoded.
    device
        Where the tiles are wanted; main memory if not given.

    Yields
    ------
    (b, 256, 256, 3) uint8, one tensor for each group.
    """
    if device is None or device.type == "cpu":
        buffer = _BandBuffer(slide, mpp, plan.origin)
    else:
        buffer = _DeviceBandBuffer(slide, mpp, plan.origin, device)
    band = _band(plan.origin[:, 1])
    for group in groups:
        rows = np.arange(len(band))[group]
        # A group seldom spans more than two bands; the rows are sorted by band.
        cuts = np.flatnonzero(np.diff(band[rows])) + 1
        parts = [buffer.tiles(int(band[part[0]]), plan.origin[part]) for part in np.split(rows, cuts)]
        yield parts[0] if len(parts) == 1 else torch.cat(parts)


class _BandBuffer:
    """768 rows of the slide: band k and the 256 rows above it, in column blocks that are read when first needed."""

    pixels: Any

    def __init__(self, slide: Slide, mpp: float, origin: Ints) -> None:
        self.slide, self.mpp = slide, mpp
        self.left = int(origin[:, 0].min())
        self.right = int(origin[:, 0].max()) + TILE
        self.pixels = self._empty((BAND + TILE, self.right - self.left, 3))
        self.band: int | None = None
        n_blocks = -(-(self.right - self.left) // BLOCK)
        self.filled = np.zeros(n_blocks, dtype=bool)
        self.overlap_kept = np.zeros(n_blocks, dtype=bool)

    def tiles(self, band: int, origin: Ints) -> torch.Tensor:
        """Copy out the tiles at `origin` (n, 2), which lie in `band`, after reading the blocks under them."""
        if band != self.band:
            self._advance(band)
        x, y = origin[:, 0] - self.left, origin[:, 1] - (band * BAND - TILE)
        for block in np.union1d(x // BLOCK, (x + TILE - 1) // BLOCK):
            self._fill(int(block))
        return self._windows(x, y)

    def _advance(self, band: int) -> None:
        self.overlap_kept[:] = self.filled if self.band is not None and band == self.band + 1 else False
        if self.overlap_kept.any():
            self.pixels[:TILE] = self.pixels[BAND:]
        self.filled[:] = False
        self.band = band

    def _fill(self, block: int) -> None:
        if self.filled[block]:
            return
        assert self.band is not None
        columns = slice(block * BLOCK, min((block + 1) * BLOCK, self.right - self.left))
        if not self.overlap_kept[block]:
            self.pixels[:TILE, columns] = self._moved(self._read(self.band - 1, columns)[BAND - TILE :])
        self.pixels[TILE:, columns] = self._moved(self._read(self.band, columns))
        self.filled[block] = True

    def _read(self, stripe: int, columns: slice) -> NDArray[np.uint8]:
        return self.slide.read_region(
            self.left + columns.start, stripe * BAND, columns.stop - columns.start, BAND, mpp=self.mpp
        )

    # numpy, not torch, in main memory: this runs in a thread of its own, and torch would start further ones beside the encoder's

    def _empty(self, shape: tuple[int, ...]) -> Any:
        return np.empty(shape, dtype=np.uint8)

    def _moved(self, pixels: NDArray[np.uint8]) -> Any:
        return pixels

    def _windows(self, x: Ints, y: Ints) -> torch.Tensor:
        # As bytes, so that the gather copies runs of 768 and not pixels one by one.
        lines = self.pixels.reshape(len(self.pixels), -1)
        windows = np.lib.stride_tricks.sliding_window_view(lines, (TILE, 3 * TILE))
        return torch.from_numpy(windows[y, 3 * x].reshape(len(x), TILE, TILE, 3))


class _DeviceBandBuffer(_BandBuffer):
    """The same in the memory of an accelerator."""

    def __init__(self, slide: Slide, mpp: float, origin: Ints, device: torch.device) -> None:
        self.device = device
        super().__init__(slide, mpp, origin)

    def _empty(self, shape: tuple[int, ...]) -> Any:
        return torch.empty(shape, dtype=torch.uint8, device=self.device)

    def _moved(self, pixels: NDArray[np.uint8]) -> Any:
        block = torch.from_numpy(np.ascontiguousarray(pixels))
        if self.device.type == "cuda":
            block = block.pin_memory()  # the copy then makes nobody wait
        return block.to(self.device, non_blocking=True)

    def _windows(self, x: Ints, y: Ints) -> torch.Tensor:
        # a view, (rows, columns, channels, 256, 256): no copy of the buffer for each window
        windows = self.pixels.unfold(0, TILE, 1).unfold(1, TILE, 1)
        at = torch.from_numpy(np.stack([y, x])).to(self.device)
        cut: torch.Tensor = windows[at[0], at[1]]
        return cut.permute(0, 2, 3, 1)
