"""Cut tiles around nuclei, reading each pixel of the slide once.

The nuclei are visited in row bands of the slide, rescaled to the encoder's um/px. A band is 512 px high, or the next multiple for larger
tiles. Its tiles need the band and as many rows above it as a tile has, so a buffer of those rows (768 for tiles of 256 px) is all that is
held: moving down a band keeps the lower rows and reads one band of new ones. Requests to the slide follow a fixed grid (band rows x 4096
columns), so that a tile's pixels do not depend on where an interrupted extraction resumed. Blocks that no tile needs are not read.

For an encoder on a GPU the buffer is in its memory and tiles are cut there: each pixel crosses the bus once, not once for each of the
tiles that share it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import shapely
import torch
from numpy.typing import NDArray

from prts.io.optical_density import read_without_black

if TYPE_CHECKING:
    from geopandas import GeoDataFrame

    from prts.io.slide import Slide

BAND = 512
BLOCK = 4096

Ints = NDArray[np.int64]


class TilePlan(NamedTuple):
    """Positions of the tiles, in the order in which they are cut, and the tiles that each nucleus takes its vectors from.

    Attributes
    ----------
    origin
        x, y of the tiles' top left pixels in the rescaled slide, (t, 2), band by band.
    order
        Positions in the nuclei table, (n,), tile by tile; all that follows is in this order.
    spatial
        Centroids in full-resolution pixels, (n, 2).
    tile
        The tile that gives the local vector, (n,), not descending.
    polygons
        The nuclei in pixels of that tile, (n,).
    around, weight
        The tiles whose weighted sum is the global vector, and their weights, both (n, k).
    tile_px
        Side of the tiles in pixels.
    """

    origin: Ints
    order: Ints
    spatial: NDArray[np.float64]
    tile: Ints
    polygons: NDArray[np.object_]
    around: Ints
    weight: NDArray[np.float32]
    tile_px: int

    def nuclei(self, tiles: slice) -> slice:
        """The nuclei whose local vectors come from consecutive tiles."""
        start, stop = np.searchsorted(self.tile, [tiles.start, tiles.stop])
        return slice(int(start), int(stop))


def plan_tiles(nuclei: GeoDataFrame, slide_mpp: float, mpp: float, tile_px: int) -> TilePlan:
    """Lay a tile around each nucleus, band by band and left to right, for one pass down the slide.

    The tile's center is the pixel of the rescaled slide that is nearest to the centroid of the nucleus, so that every tile is an exact
    window of the rescaled slide.

    Parameters
    ----------
    nuclei
        Nuclei in full-resolution pixels, n rows.
    slide_mpp
        um per full-resolution pixel.
    mpp
        um per pixel of the tiles.
    tile_px
        Side of the tiles in pixels.
    """
    geometry = np.asarray(nuclei.geometry.array, dtype=object)
    centroid = shapely.get_coordinates(shapely.centroid(geometry))
    scale = slide_mpp / mpp
    origin = center_pixel(centroid * scale) - tile_px // 2
    order = np.lexsort((origin[:, 1], origin[:, 0], _band(origin[:, 1], tile_px)))
    tile = np.arange(len(order))
    return TilePlan(
        origin=origin[order],
        order=order,
        spatial=centroid[order],
        tile=tile,
        polygons=in_tile(geometry[order], scale, origin[order]),
        around=tile[:, None],
        weight=np.ones((len(order), 1), dtype=np.float32),
        tile_px=tile_px,
    )


def center_pixel(xy: NDArray[np.float64]) -> Ints:
    """The pixel nearest to each point (n, 2), at which the tile of a nucleus is centered."""
    return np.floor(xy + 0.5).astype(np.int64)


def in_tile(polygons: NDArray[np.object_], scale: float, origin: Ints) -> NDArray[np.object_]:
    """Move polygons (n,) from full-resolution pixels to pixels of tiles with these origins (n, 2)."""
    xy, owner = shapely.get_coordinates(polygons, return_index=True)
    # A copy: set_coordinates works in place.
    moved: NDArray[np.object_] = shapely.set_coordinates(polygons.copy(), xy * scale - origin[owner])
    return moved


def _band_rows(tile_px: int) -> int:
    """Height of a band: at least the height of a tile, so that a tile spans at most two bands."""
    return -(-tile_px // BAND) * BAND


def _band(y: Ints, tile_px: int) -> Ints:
    """Band of a tile whose top row is y; with 256 px, band k takes tops in [512 k - 256, 512 k + 256)."""
    return np.floor_divide(y + tile_px, _band_rows(tile_px))


def cut_tiles(
    slide: Slide, mpp: float, plan: TilePlan, groups: Sequence[slice], device: torch.device | None = None
) -> Iterator[torch.Tensor]:
    """Cut the tiles of each group, in order.

    Parameters
    ----------
    slide
        The image, read at `mpp`, white outside the image.
    mpp
        um per pixel of the tiles.
    plan
        All tiles of the slide. Read requests depend on the whole plan, not on the requested groups.
    groups
        Ascending slices of the plan, such as the batches still to be encoded.
    device
        Where to put the tiles; main memory by default.

    Yields
    ------
    (b, tile_px, tile_px, 3) uint8, one tensor for each group.
    """
    if device is None or device.type == "cpu":
        buffer = _BandBuffer(slide, mpp, plan.origin, plan.tile_px)
    else:
        buffer = _DeviceBandBuffer(slide, mpp, plan.origin, plan.tile_px, device)
    band = _band(plan.origin[:, 1], plan.tile_px)
    for group in groups:
        rows = np.arange(len(band))[group]
        # The rows are sorted by band; a group rarely spans more than two.
        cuts = np.flatnonzero(np.diff(band[rows])) + 1
        parts = [buffer.tiles(int(band[part[0]]), plan.origin[part]) for part in np.split(rows, cuts)]
        yield parts[0] if len(parts) == 1 else torch.cat(parts)


class _BandBuffer:
    """Band k of the slide and the rows above it that its tiles reach, in column blocks that are read when first needed."""

    pixels: Any

    def __init__(self, slide: Slide, mpp: float, origin: Ints, tile_px: int) -> None:
        self.slide, self.mpp, self.tile_px, self.rows = slide, mpp, tile_px, _band_rows(tile_px)
        self.left = int(origin[:, 0].min())
        self.right = int(origin[:, 0].max()) + tile_px
        self.pixels = self._empty((self.rows + tile_px, self.right - self.left, 3))
        self.band: int | None = None
        n_blocks = -(-(self.right - self.left) // BLOCK)
        self.filled = np.zeros(n_blocks, dtype=bool)
        self.overlap_kept = np.zeros(n_blocks, dtype=bool)

    def tiles(self, band: int, origin: Ints) -> torch.Tensor:
        """Copy out the tiles at `origin` (n, 2), all in `band`, after reading the blocks under them."""
        if band != self.band:
            self._advance(band)
        x, y = origin[:, 0] - self.left, origin[:, 1] - (band * self.rows - self.tile_px)
        for block in np.union1d(x // BLOCK, (x + self.tile_px - 1) // BLOCK):
            self._fill(int(block))
        return self._windows(x, y)

    def _advance(self, band: int) -> None:
        self.overlap_kept[:] = self.filled if self.band is not None and band == self.band + 1 else False
        if self.overlap_kept.any():
            self.pixels[: self.tile_px] = self.pixels[self.rows :]
        self.filled[:] = False
        self.band = band

    def _fill(self, block: int) -> None:
        if self.filled[block]:
            return
        assert self.band is not None
        columns = slice(block * BLOCK, min((block + 1) * BLOCK, self.right - self.left))
        if not self.overlap_kept[block]:
            above = self._read(self.band - 1, columns)[self.rows - self.tile_px :]
            self.pixels[: self.tile_px, columns] = self._moved(above)
        self.pixels[self.tile_px :, columns] = self._moved(self._read(self.band, columns))
        self.filled[block] = True

    def _read(self, stripe: int, columns: slice) -> NDArray[np.uint8]:
        return read_without_black(
            self.slide, self.left + columns.start, stripe * self.rows, columns.stop - columns.start, self.rows, self.mpp
        )

    # numpy, not torch, in main memory: this runs in its own thread, and torch would start more threads that compete with the encoder

    def _empty(self, shape: tuple[int, ...]) -> Any:
        return np.empty(shape, dtype=np.uint8)

    def _moved(self, pixels: NDArray[np.uint8]) -> Any:
        return pixels

    def _windows(self, x: Ints, y: Ints) -> torch.Tensor:
        # As bytes, so that the gather copies whole rows of a tile instead of single pixels.
        side = self.tile_px
        lines = self.pixels.reshape(len(self.pixels), -1)
        windows = np.lib.stride_tricks.sliding_window_view(lines, (side, 3 * side))
        return torch.from_numpy(windows[y, 3 * x].reshape(len(x), side, side, 3))


class _DeviceBandBuffer(_BandBuffer):
    """The same buffer in the memory of an accelerator."""

    def __init__(self, slide: Slide, mpp: float, origin: Ints, tile_px: int, device: torch.device) -> None:
        self.device = device
        super().__init__(slide, mpp, origin, tile_px)

    def _empty(self, shape: tuple[int, ...]) -> Any:
        return torch.empty(shape, dtype=torch.uint8, device=self.device)

    def _moved(self, pixels: NDArray[np.uint8]) -> Any:
        block = torch.from_numpy(np.ascontiguousarray(pixels))
        if self.device.type == "cuda":
            block = block.pin_memory()  # so that the copy does not block
        return block.to(self.device, non_blocking=True)

    def _windows(self, x: Ints, y: Ints) -> torch.Tensor:
        # a view, (rows, columns, channels, tile_px, tile_px): the buffer is not copied for each window
        windows = self.pixels.unfold(0, self.tile_px, 1).unfold(1, self.tile_px, 1)
        at = torch.from_numpy(np.stack([y, x])).to(self.device)
        cut: torch.Tensor = windows[at[0], at[1]]
        return cut.permute(0, 2, 3, 1)
