"""Pack arrays into compact text for the page; the browser unpacks them when they are shown.

Each block is an array of little-endian numbers, compressed (zlib) and base64-encoded; `page/data.js` reads them. Measured counts are exact.
Predicted UMI are stored as log1p in up to 256 levels to the gene's maximum, and P(expressed) in steps of 2%: finer than colors can show.
"""

from __future__ import annotations

import base64
import zlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import pandas as pd
import scipy.sparse as sp
import shapely
from numpy.typing import NDArray

PROB_STEPS = 50
PERCENTILE = 99
# Columns with more categories than colors can distinguish, such as names of nuclei, are left out.
_MOST_CATEGORIES = 100
_MOST_VERTICES = 255


def packed(values: NDArray[Any]) -> str:
    """Encode numbers: little-endian, compressed, base64."""
    little = np.ascontiguousarray(values, dtype=values.dtype.newbyteorder("<"))
    return base64.b64encode(zlib.compress(little.tobytes(), 6)).decode("ascii")


def packed_text(text: str) -> str:
    """Encode text: UTF-8, compressed, base64."""
    return packed(np.frombuffer(text.encode(), np.uint8))


def predicted_codes(umi: NDArray[np.float32], step: int = 1) -> tuple[NDArray[np.uint8], NDArray[np.float64]]:
    """Quantize predicted UMI to one byte.

    Parameters
    ----------
    umi
        Expected UMI, (n_nuclei, n_genes).
    step
        Only multiples of it are used as codes; it divides 255. Fewer codes compress better.

    Returns
    -------
    codes
        (n_nuclei, n_genes): log1p(UMI) = code / 255 x highest.
    highest
        Maximum of log1p(UMI) per gene, (n_genes,); 0 if a gene is not predicted anywhere.
    """
    level = np.log1p(umi)
    highest = level.max(axis=0, initial=0).astype(np.float64)
    codes = step * np.rint(level * (255 / step / np.where(highest > 0, highest, 1)))
    return codes.astype(np.uint8), highest


def delta_blocks(values: NDArray[np.uint8], codes: NDArray[np.uint8]) -> list[str]:
    """Encode values that follow the predicted level as differences from the mean at that level, which compress well.

    Parameters
    ----------
    values
        P(expressed) in steps, or the end of an interval, (n_nuclei, n_genes).
    codes
        Result of `predicted_codes`.

    Returns
    -------
    One block per gene: the mean for each of the 256 codes, then a byte per nucleus with value = (mean of its code + byte) mod 256.
    """
    blocks = []
    for code, value in zip(codes.T, values.T, strict=True):
        times = np.bincount(code, minlength=256)
        mean = np.rint(np.bincount(code, value, minlength=256) / np.maximum(times, 1)).astype(np.uint8)
        blocks.append(packed(np.concatenate([mean, value - mean[code]])))
    return blocks


def measured_blocks(counts: sp.csr_matrix, rows: NDArray[np.intp], n_nuclei: int) -> Iterator[tuple[str, int]]:
    """Encode measured counts: a block per gene, and the number of bytes per count in it.

    Parameters
    ----------
    counts
        UMI, (n_measured, n_genes).
    rows
        Index of each measured nucleus among all nuclei, (n_measured,). Other nuclei get the largest possible value, which means "missing".
    n_nuclei
        Number of all nuclei.
    """
    columns = sp.csc_matrix(counts)
    for gene in range(columns.shape[1]):
        umi = columns[:, [gene]].toarray().ravel()
        kind = np.uint8 if umi.max(initial=0) < 255 else np.uint16
        missing = np.iinfo(kind).max
        block = np.full(n_nuclei, missing, kind)
        block[rows] = np.minimum(umi, missing - 1)
        yield packed(block), block.itemsize


def outline_blocks(outlines: NDArray[np.object_], xy: NDArray[np.float32], step: float) -> dict[str, str]:
    """Encode polygons as the number of their vertices, one byte, and the vertices' offsets from the center, two bytes each.

    Parameters
    ----------
    outlines
        Polygons, (n_nuclei,).
    xy
        Their centers, (n_nuclei, 2).
    step
        Unit of the offsets, px; polygons are simplified by as much. Vertices more than 127 steps from the center are moved closer.
    """
    rings = shapely.simplify(shapely.get_exterior_ring(outlines), step)
    points, owner = shapely.get_coordinates(rings, return_index=True)
    first = np.searchsorted(owner, np.arange(len(outlines)))
    rank = np.arange(len(owner)) - first[owner]
    n = np.bincount(owner, minlength=len(outlines)) - 1  # the last vertex repeats the first
    keep = (rank < n[owner]) & (rank < _MOST_VERTICES)
    offsets = np.rint((points[keep] - xy[owner[keep]]) / step).clip(-127, 127).astype(np.int8)
    return {"outline_n": packed(np.minimum(n, _MOST_VERTICES).astype(np.uint8)), "outline_xy": packed(offsets)}


def colour_top(values: NDArray[Any]) -> NDArray[np.float64]:
    """Upper end of the color scale of each column: the 99th percentile, or the maximum if that is 0."""
    if len(values) == 0:
        return np.zeros(values.shape[1])
    top = np.percentile(values, PERCENTILE, axis=0)
    colours: NDArray[np.float64] = np.where(top > 0, top, values.max(axis=0)).astype(np.float64)
    return colours


def nucleus_columns(obs: pd.DataFrame, measured: pd.DataFrame | None = None) -> list[dict[str, Any]]:
    """Encode the columns of a table of nuclei that a map can show.

    Parameters
    ----------
    obs
        One row per nucleus. Numbers become float32; categories, booleans and text with at most 100 values become codes (255 for
        missing). Constant columns and text with more values are left out.
    measured
        Some of the same columns for the measured counts. They go to `measured_block`, with the same labels and colors.
    """
    found = []
    for name, values in obs.items():
        other = None if measured is None or name not in measured else measured[name]
        if values.nunique(dropna=True) < 2:
            continue
        column = _categories(values, other) if _is_category(values) else _numbers(values, other)
        if column is not None:
            found.append({"name": str(name), **column})
    return found


def _is_category(values: pd.Series) -> bool:
    return pd.api.types.is_bool_dtype(values) or not pd.api.types.is_numeric_dtype(values)


def _numbers(values: pd.Series, other: pd.Series | None) -> dict[str, Any]:
    sides = [side.to_numpy(dtype=np.float32, na_value=np.nan) for side in (values, other) if side is not None]
    every = np.concatenate(sides)
    every = every[np.isfinite(every)]
    low, high = np.percentile(every, [100 - PERCENTILE, PERCENTILE]).tolist()
    if low == high:
        low, high = float(every.min()), float(every.max())
    low = 0.0 if 0 <= low < 0.1 * high else low
    blocks = [packed(side) for side in sides]
    return {"kind": "number", "low": low, "high": high, "block": blocks[0], "measured_block": [*blocks, None][1]}


def _categories(values: pd.Series, other: pd.Series | None) -> dict[str, Any] | None:
    sides = [side.astype("category") for side in (values, other) if side is not None]
    labels = pd.unique(np.concatenate([side.cat.categories.astype(str) for side in sides]))
    if len(labels) > _MOST_CATEGORIES:
        return None
    blocks = []
    for side in sides:
        codes = pd.Categorical(side.astype(str).where(side.notna()), categories=labels).codes
        blocks.append(packed(np.where(codes < 0, 255, codes).astype(np.uint8)))
    return {
        "kind": "category",
        "labels": [str(label) for label in labels],
        "block": blocks[0],
        "measured_block": [*blocks, None][1],
    }
