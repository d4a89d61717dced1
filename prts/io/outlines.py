"""Exact outlines of the labels of a label image, without a loop over labels."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import shapely
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from skimage.measure import label as connected_parts

if TYPE_CHECKING:
    from numpy.typing import NDArray

# A pixel's sides have four directions: east along its top, south, west, north. The corner (row, column) where each starts.
_CORNER = np.array([[0, 0], [0, 1], [1, 1], [1, 0]])


def labels_to_polygons(labels: NDArray[Any], *, band: int = 512) -> tuple[NDArray[np.int64], NDArray[Any], int]:
    """Outlines of a label image along pixel edges, so that rasterizing a polygon restores exactly its pixels.

    The largest 4-connected part of each label is kept, with its holes. The image is processed in bands of rows; each label is outlined
    with the band in which it starts.

    Parameters
    ----------
    labels
        (height, width), integer; 0 is background.
    band
        Height of a band, px.

    Returns
    -------
    label
        (n,) labels, ascending within a band.
    polygon
        (n,) valid shapely polygons in pixels, x right, y down; pixel i covers [i, i + 1).
    n_parts_dropped
        Number of smaller parts that were dropped.
    """
    height = labels.shape[0]
    starts = list(range(0, height, band))
    first, last = _bands_of_labels(labels, band)
    names: list[NDArray[np.int64]] = []
    polygons: list[NDArray[Any]] = []
    dropped = 0
    for number, start in enumerate(starts):
        own = first == number
        if not own.any():
            continue
        window = labels[start : (int(last[own].max()) + 1) * band]
        if window.shape[0] > band or start > 0:
            window = np.where(own[window], window, 0)
        name, polygon, n_parts = _outline(window)
        names.append(name)
        polygons.append(_moved_down(polygon, start))
        dropped += n_parts
    if not names:
        return np.empty(0, np.int64), np.empty(0, object), 0
    return np.concatenate(names), np.concatenate(polygons), dropped


def _moved_down(polygons: NDArray[Any], rows: int) -> NDArray[Any]:
    return np.asarray(shapely.transform(polygons, lambda xy: xy + np.array([0.0, rows])))


def _bands_of_labels(labels: NDArray[Any], band: int) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """First and last band of every label; -1 for background and unused labels."""
    largest = int(labels.max(initial=0))
    first = np.full(largest + 1, -1, np.int32)
    last = np.full(largest + 1, -1, np.int32)
    for number, start in enumerate(range(0, labels.shape[0], band)):
        present = np.zeros(largest + 1, bool)
        present[labels[start : start + band].ravel()] = True
        present[0] = False
        last[present] = number
        first[present & (first < 0)] = number
    return first, last


def _outline(labels: NDArray[Any]) -> tuple[NDArray[np.int64], NDArray[Any], int]:
    """Outlines of one array; see `labels_to_polygons`."""
    padded, dropped = largest_parts(np.pad(labels, 1))
    pixel, direction = _sides(padded)
    order, ring = _ring_order(_following(padded, pixel, direction))
    pixel, direction, ring = pixel[order], direction[order], ring[order]

    # Only corners become vertices: a side that continues in the direction of the previous one adds none.
    ring_start = np.flatnonzero(np.r_[True, ring[1:] != ring[:-1]])
    ring_stop = np.r_[ring_start[1:], len(ring)]
    before = np.arange(len(ring)) - 1
    before[ring_start] = ring_stop - 1
    corner = direction != direction[before]
    pixel, direction, ring = pixel[corner], direction[corner], ring[corner]
    label = padded.ravel()[pixel]
    row, column = np.divmod(pixel, padded.shape[1])
    xy = np.column_stack([column + _CORNER[direction, 1], row + _CORNER[direction, 0]]).astype(float) - 1.0

    ring_start = np.flatnonzero(np.r_[True, ring[1:] != ring[:-1]])
    length = np.diff(np.r_[ring_start, len(ring)])
    following = np.arange(len(ring)) + 1
    following[ring_start + length - 1] = ring_start
    cross = xy[:, 0] * xy[following, 1] - xy[following, 0] * xy[:, 1]
    is_shell = np.add.reduceat(cross, ring_start) > 0
    # Group the rings by label, the shell first.
    by_label = np.lexsort((~is_shell, label[ring_start]))
    ring_start, length, ring_label = ring_start[by_label], length[by_label], label[ring_start][by_label]
    closed = length + 1
    offset = np.r_[0, np.cumsum(closed)]
    within = np.arange(offset[-1]) - np.repeat(offset[:-1], closed)
    vertex = np.repeat(ring_start, closed) + within % np.repeat(length, closed)
    name, first_ring = np.unique(ring_label, return_index=True)
    polygon = shapely.from_ragged_array(
        shapely.GeometryType.POLYGON, np.ascontiguousarray(xy[vertex]), (offset, np.r_[first_ring, len(ring_start)])
    )
    return name.astype(np.int64), polygon, dropped


def largest_parts(labels: NDArray[Any]) -> tuple[NDArray[Any], int]:
    """Keep the largest 4-connected part of each label.

    Parameters
    ----------
    labels
        (height, width), integer; 0 is background.

    Returns
    -------
    The label image without the other parts, and how many were dropped.
    """
    part, n_parts = connected_parts(labels, background=0, connectivity=1, return_num=True)  # type: ignore[no-untyped-call]
    inside = np.flatnonzero(part)
    part_inside = part.ravel()[inside]
    size = np.bincount(part_inside, minlength=n_parts + 1)
    of_label = np.zeros(n_parts + 1, np.int64)
    of_label[part_inside] = labels.ravel()[inside]
    # Sorted so that the largest part of each label comes first (the first one among equals).
    order = np.lexsort((np.arange(n_parts + 1), -size, of_label))
    largest = np.zeros(n_parts + 1, bool)
    largest[order[np.r_[True, of_label[order][1:] != of_label[order][:-1]]]] = True
    dropped = int(n_parts - largest[1:].sum())
    if dropped:
        labels = np.where(largest[part], labels, 0)
    return labels, dropped


def _sides(padded: NDArray[Any]) -> tuple[NDArray[np.intp], NDArray[np.int8]]:
    """Sides between a label and anything else, the label on the right: pixel (index into `padded`) and direction."""
    flat, width = padded.ravel(), padded.shape[1]
    above = np.flatnonzero(flat[:-width] != flat[width:])
    left = np.flatnonzero(flat[:-1] != flat[1:])
    found = (above + width, left, above, left + 1)
    found = tuple(pixel[flat[pixel] != 0] for pixel in found)
    return np.concatenate(found), np.repeat(np.arange(4, dtype=np.int8), [len(pixel) for pixel in found])


def _following(padded: NDArray[Any], pixel: NDArray[np.intp], direction: NDArray[np.int8]) -> NDArray[np.int32]:
    """The side that follows each side around the same label.

    A right turn stays with the pixel, so that pixels that touch only at a corner are not joined (4-connectivity). A ring that meets itself
    at a corner is split there into two rings that touch, as a valid polygon requires.
    """
    flat, width = padded.ravel(), padded.shape[1]
    number = np.empty(4 * len(flat), np.int32)
    number[4 * pixel + direction] = np.arange(len(pixel), dtype=np.int32)
    label = flat[pixel]
    ahead = pixel + np.array([1, width, -1, -width])[direction]
    # Diagonally across the corner, to the left.
    across = ahead + np.array([-width, 1, width, -1])[direction]
    turns = flat[ahead] != label
    meets = flat[across] == label
    # The next side belongs to the same pixel after a right turn, else to the next pixel or the one across.
    on = np.where(turns, pixel, np.where(meets, across, ahead))
    heading = np.where(turns, direction + 1, np.where(meets, direction - 1, direction)) % 4
    following: NDArray[np.int32] = number[4 * on + heading]
    ring = _cycles(following)
    pinched = np.flatnonzero(turns & meets)
    left = number[4 * across[pinched] + (direction[pinched] - 1) % 4]
    same = ring[following[pinched]] == ring[left]
    following[pinched[same]] = left[same]
    return following


def _ring_order(following: NDArray[np.int32]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Order of the sides ring by ring, and the ring of each side in its original position."""
    n = len(following)
    ring = _cycles(following)
    # Number of steps from each side to the first of its ring, by pointer doubling.
    first = np.full(ring.max(initial=-1) + 1, n)
    np.minimum.at(first, ring, np.arange(n))
    jump, steps = following.copy(), np.ones(n, np.int64)
    jump[first], steps[first] = first, 0
    while True:
        further = steps + steps[jump]
        if np.array_equal(further, steps):
            break
        steps, jump = further, jump[jump]
    length = np.bincount(ring)
    rank = np.where(steps == 0, 0, length[ring] - steps)
    return np.lexsort((rank, ring)), ring


def _cycles(following: NDArray[np.int32]) -> NDArray[np.int64]:
    """Index of the cycle that each element of a permutation belongs to."""
    n = len(following)
    graph = coo_array((np.ones(n, bool), (np.arange(n), following)), shape=(n, n))
    _, number = connected_components(graph, directed=False)
    return np.asarray(number, dtype=np.int64)
