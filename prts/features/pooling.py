"""Pool patch tokens into the local vector of a nucleus: find the patches it overlaps, average them, and halve the channels."""

from __future__ import annotations

import numpy as np
import shapely
import torch
from numpy.typing import NDArray

Bools = NDArray[np.bool_]
Polygons = NDArray[np.object_]


def patch_overlap(polygons: Polygons, tile: int = 256, patch: float = 16) -> Bools:
    """Find the patches of its tile that each nucleus overlaps.

    A patch counts if its interior meets the interior of the polygon, that is, if they share an area: a nucleus that only touches a patch's
    edge does not overlap it. Parts outside the tile are clipped. (Paper, Methods: "patches that overlap the nucleus".)

    Parameters
    ----------
    polygons
        Shapely polygons in pixels of their own tile, (b,).
    tile
        Side of the tile, px.
    patch
        Side of a patch, px; the tile is a whole number of patches.

    Returns
    -------
    (b, rows, columns), True where patch (row, column) overlaps.

    Raises
    ------
    ValueError
        If a polygon is outside its tile.
    """
    grid = round(tile / patch)
    bounds = shapely.bounds(polygons) / patch
    first = np.clip(np.floor(bounds[:, :2]), 0, grid).astype(np.int64)
    stop = np.clip(np.ceil(bounds[:, 2:]), 0, grid).astype(np.int64)
    # GEOS only tests patches that meet the bounding box: a handful, not 256.
    n_cols, n_rows = np.maximum(stop - first, 0).T
    which = np.repeat(np.arange(len(polygons)), n_cols * n_rows)
    place = np.arange(len(which)) - np.repeat(np.cumsum(n_cols * n_rows) - n_cols * n_rows, n_cols * n_rows)
    row, col = np.divmod(place, np.maximum(n_cols, 1)[which])
    row, col = row + first[which, 1], col + first[which, 0]
    boxes = shapely.box(col * patch, row * patch, (col + 1) * patch, (row + 1) * patch)
    # The interiors of two areas meet if and only if they share an area; DE-9IM decides it without rounding.
    meets = shapely.relate_pattern(polygons[which], boxes, "T********")
    overlap = np.zeros((len(polygons), grid, grid), dtype=bool)
    overlap[which[meets], row[meets], col[meets]] = True
    outside = np.flatnonzero(~overlap.any(axis=(1, 2)))
    if len(outside):
        raise ValueError(f"{len(outside)} polygons are outside their tile, the first at position {outside[0]}")
    return overlap


def pool_local(tokens: torch.Tensor, overlap: torch.Tensor) -> torch.Tensor:
    """Mean of the patch tokens that the nucleus overlaps (paper).

    Parameters
    ----------
    tokens
        (b, rows, columns, channels), row 0 at the top of the tile.
    overlap
        (b, rows, columns), from `patch_overlap`.

    Returns
    -------
    (b, channels) float32.
    """
    weight = overlap.to(device=tokens.device, dtype=torch.float32)
    weight = weight / weight.sum(dim=(1, 2), keepdim=True)
    return torch.einsum("bij,bijc->bc", weight, tokens.float())


def patches_around(centers: NDArray[np.float64], tile: int, patch: float) -> Bools:
    """The four patches around each point, for a nucleus anywhere in its tile; the same as `center2x2` at the tile's center.

    Parameters
    ----------
    centers
        x, y in pixels of the tile, (b, 2).
    tile, patch
        As for `patch_overlap`.

    Returns
    -------
    (b, rows, columns). With an odd number of rows or columns, only the one that contains the point. Near the tile's edge, the outermost
    patches.
    """
    grid = round(tile / patch)
    if grid % 2:
        first = stop = np.clip(np.floor(centers / patch), 0, grid - 1)
    else:
        stop = np.clip(np.round(centers / patch), 1, grid - 1)
        first = stop - 1
    steps = np.arange(grid)
    inside = (steps >= first[..., None]) & (steps <= stop[..., None])  # (b, x or y, grid)
    around: Bools = inside[:, 1, :, None] & inside[:, 0, None, :]
    return around


def pool_shared(tokens: torch.Tensor, chosen: torch.Tensor, tile: torch.Tensor) -> torch.Tensor:
    """Like `pool_local`, for several nuclei per tile: reads only the chosen tokens, not a tile for each nucleus.

    Parameters
    ----------
    tokens
        (t, rows, columns, channels).
    chosen
        Patches of each nucleus, (b, rows, columns), at least one.
    tile
        The tile that each nucleus is in, (b,).

    Returns
    -------
    (b, channels) float32.
    """
    if len(chosen) == 0:  # segment_reduce needs at least one
        return tokens.new_empty((0, tokens.shape[3]), dtype=torch.float32)
    chosen, tile = chosen.to(tokens.device), tile.to(tokens.device)
    which, row, col = chosen.nonzero(as_tuple=True)
    lengths = chosen.sum(dim=(1, 2))
    return torch.segment_reduce(tokens[tile[which], row, col].float(), "mean", lengths=lengths, axis=0)


def tokens_at(tokens: torch.Tensor, at: torch.Tensor, tile: torch.Tensor) -> torch.Tensor:
    """Read the grid of patch tokens at points, bilinearly between the centers of patches.

    Parameters
    ----------
    tokens
        (t, rows, columns, channels).
    at
        x, y of each point in patches from the tile's top left corner, (b, 2). Beyond the centers of the outermost patches, their tokens.
    tile
        The tile that each point is in, (b,).

    Returns
    -------
    (b, channels) float32.
    """
    rows, columns = tokens.shape[1:3]
    limit = torch.tensor([columns - 1, rows - 1], dtype=at.dtype)
    place = torch.minimum((at - 0.5).clamp(min=0.0), limit)
    low = torch.minimum(place.floor(), limit - 1).long()
    share = (place - low).float()
    read = tokens.new_zeros((len(at), tokens.shape[3]), dtype=torch.float32)
    for right in (0, 1):
        for down in (0, 1):
            step = torch.tensor([right, down])
            weight = torch.where(step.bool(), share, 1.0 - share).prod(dim=1, keepdim=True).to(tokens.device)
            column, row = (low + step).to(tokens.device).T
            read += weight * tokens[tile.to(tokens.device), row, column].float()
    return read


def center2x2(tokens: torch.Tensor) -> torch.Tensor:
    """Mean of the four patch tokens around the tile's center, for any nucleus (released code).

    Parameters
    ----------
    tokens
        (b, rows, columns, channels). With an odd number of rows or columns, only the middle one.

    Returns
    -------
    (b, channels) float32.
    """
    rows, cols = tokens.shape[1:3]
    center = tokens[:, (rows - 1) // 2 : rows // 2 + 1, (cols - 1) // 2 : cols // 2 + 1]
    return center.float().mean(dim=(1, 2))


def channel_pairs(x: torch.Tensor) -> torch.Tensor:
    """Average channels 0 and 1, 2 and 3, ...: 384 channels become 192 (released code; the paper does not say how).

    Parameters
    ----------
    x
        (b, channels), an even number of channels.

    Returns
    -------
    (b, channels / 2).
    """
    return x.reshape(len(x), x.shape[1] // 2, 2).mean(dim=2)
