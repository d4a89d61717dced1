"""Files of a Xenium output folder: the manifest, positions and outlines of cells, and the alignment of the H&E image."""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import shapely
from numpy.typing import NDArray

from prts.errors import InputError, some_of
from prts.platforms.affine import Matrix, fit_similarity, read_matrix, scale_of, scaling

if TYPE_CHECKING:
    from collections.abc import Sequence

logger = logging.getLogger(__name__)

Floats = NDArray[np.float64]

MANIFEST = "experiment.xenium"
MATRIX = "cell_feature_matrix.h5"
TRANSCRIPTS = "transcripts.parquet"
CELLS = ("cells.parquet", "cells.csv.gz")
BOUNDARIES = {"nucleus": "nucleus_boundaries.parquet", "cell": "cell_boundaries.parquet"}
# As 10x and Xenium Explorer name the alignment of an H&E image; a matrix is more exact than the points it was fitted to.
ALIGNMENTS = ("*imagealignment.csv", "*matrix.csv", "*keypoints.csv")
_KEYPOINTS = ("fixedX", "fixedY", "alignmentX", "alignmentY")
# Keypoints are set by hand on nuclei.
_WARN_KEYPOINTS_UM = 5.0


def xenium_folder(folder: Path) -> Path | None:
    """The output folder of Xenium: the folder itself or its `outs`; None if neither is one."""
    return next((path for path in (folder, folder / "outs") if _is_output(path)), None)


def _is_output(folder: Path) -> bool:
    return any((folder / name).is_file() for name in (MANIFEST, MATRIX))


def require_file(outs: Path, *names: str) -> Path:
    """A file of the output folder, by any of its names; the error for a folder above or below names the right one.

    Raises
    ------
    InputError
        If it is not there.
    """
    for name in names:
        if (outs / name).is_file():
            return outs / name
    if not outs.is_dir():
        raise InputError(f"{outs}: no such folder; give Xenium's output folder, with {MANIFEST}")
    if not _is_output(outs):
        near = [outs.parent, *(path for path in sorted(outs.iterdir()) if path.is_dir())]
        right = next((found for path in near if (found := xenium_folder(path)) is not None), None)
        raise InputError(f"{outs}: is not Xenium's output folder; give {right or f'the folder with {MANIFEST}'}")
    raise InputError(f"{outs / names[0]}: no such file; copy it from the output folder of the Xenium run")


def read_pixel_size(outs: Path) -> float:
    """The um per pixel of Xenium's images, which alignments refer to.

    Raises
    ------
    InputError
        If the manifest is missing or does not state it.
    """
    path = require_file(outs, MANIFEST)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: not valid JSON ({error}); get a complete copy") from error
    value = content.get("pixel_size") if isinstance(content, dict) else None
    if isinstance(value, bool) or not isinstance(value, int | float) or not (math.isfinite(value) and 0 < value < 10):
        raise InputError(f"{path}: pixel_size is {value!r}; give the manifest that Xenium wrote, with um per pixel")
    version = str(content.get("xenium_ranger", {}).get("version") or content.get("analysis_sw_version") or "unknown")
    logger.info("%s: Xenium output, software %s, %g um/px", outs, version, value)
    return float(value)


def find_alignment(outs: Path) -> Path | None:
    """The alignment of the H&E image in the output folder or next to it; None if there is none.

    Raises
    ------
    InputError
        If there are several.
    """
    for pattern in ALIGNMENTS:
        found = sorted({path for folder in (outs, outs.parent) for path in folder.glob(pattern)})
        if len(found) > 1:
            raise InputError(
                f"{outs}: has several alignments ({some_of(map(str, found))}); name that of the H&E image as `alignment`"
            )
        if found:
            return found[0]
    return None


def read_alignment(path: Path, pixel_size: float) -> Matrix:
    """The map from um of Xenium to full-resolution pixels of the H&E image.

    Xenium Explorer exports the opposite direction, from pixels of the H&E image to pixels of Xenium's image: as a 3 x 3 matrix, or as
    the keypoints that it was fitted to, with the columns fixedX, fixedY (Xenium) and alignmentX, alignmentY (H&E).

    Parameters
    ----------
    path
        The CSV file.
    pixel_size
        um per pixel of Xenium's image.

    Raises
    ------
    InputError
        If it is neither a matrix nor keypoints.
    """
    if not path.is_file():
        raise InputError(f"{path}: no such file; export the alignment of the H&E image from Xenium Explorer")
    try:
        head = path.read_text(encoding="utf-8-sig")[:2000]
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"{path}: cannot be read ({error}); export the alignment from Xenium Explorer again"
        ) from error
    to_xenium = _from_keypoints(path, pixel_size) if _KEYPOINTS[0] in head else read_matrix(path)
    return np.asarray(np.linalg.inv(to_xenium) @ scaling(1 / pixel_size))


def _from_keypoints(path: Path, pixel_size: float) -> Matrix:
    """The similarity from H&E pixels to Xenium pixels that fits pairs of points best."""
    try:
        points = pd.read_csv(path, encoding="utf-8-sig", skipinitialspace=True)[list(_KEYPOINTS)].to_numpy(np.float64)
    except (KeyError, ValueError) as error:
        raise InputError(
            f"{path}: not a table of keypoints ({error}); give the columns {', '.join(_KEYPOINTS)}"
        ) from error
    if len(points) < 3 or not np.isfinite(points).all():
        raise InputError(
            f"{path}: has {len(points)} keypoints; at least three complete ones are needed, set more in Xenium Explorer"
        )
    fixed, moving = points[:, :2], points[:, 2:]
    if min(np.ptp(fixed, axis=0).max(), np.ptp(moving, axis=0).max()) == 0:
        raise InputError(f"{path}: all keypoints are at one place; set some that are far apart in Xenium Explorer")
    matrix, rms = fit_similarity(moving, fixed)
    off = rms * pixel_size
    log = logger.warning if off > _WARN_KEYPOINTS_UM else logger.info
    log("%s: %d keypoints are %.2g um (root mean square) off their fit", path, len(points), off)
    return matrix


def explained(matrix: Matrix, mpp: float, pixel_size: float) -> str:
    """What is probably wrong with an alignment whose scale is not that of the image.

    Parameters
    ----------
    matrix
        From `read_alignment`.
    mpp
        um per full-resolution pixel of the image.
    pixel_size
        um per pixel of Xenium's image.
    """
    found = 1 / scale_of(matrix)
    if _near(found, mpp * pixel_size):
        return "it seems to lead to um; give the matrix that leads to pixels of Xenium's image, as Xenium Explorer exports it"
    if _near(found, pixel_size**2 / mpp):
        return "it seems to be inverted; give the matrix from the H&E image to Xenium's image, as Xenium Explorer exports it"
    return "give the alignment of this image, at full resolution, or correct the image's um/px with `mpp`"


def _near(one: float, other: float) -> bool:
    return abs(math.log(one / other)) < 0.05


def read_centroids(outs: Path) -> tuple[NDArray[np.object_], Floats]:
    """Ids (n,) and centers (n, 2) in um of all cells.

    Raises
    ------
    InputError
        If the table of cells is missing or damaged.
    """
    path = require_file(outs, *CELLS)
    wanted = ["cell_id", "x_centroid", "y_centroid"]
    try:
        table = (
            read_columns(path, wanted).to_pandas() if path.suffix == ".parquet" else pd.read_csv(path, usecols=wanted)
        )
        xy = table[wanted[1:]].to_numpy(np.float64)
    except (ValueError, OSError, EOFError) as error:
        raise InputError(f"{path}: not a table of cells ({error}); get a complete copy") from error
    return text_of(table["cell_id"]), xy


def read_boundaries(path: Path) -> tuple[NDArray[np.object_], NDArray[np.object_]]:
    """Outlines of cells or nuclei in um; a cell with several nuclei has several.

    Parameters
    ----------
    path
        `nucleus_boundaries.parquet` or `cell_boundaries.parquet`: one row per vertex, `cell_id`, `vertex_x`, `vertex_y`, and from
        Xenium Onboard Analysis 3 `label_id`.

    Returns
    -------
    The cell of each outline (n,), and polygons (n,); the ids repeat.

    Raises
    ------
    InputError
        If the file is damaged.
    """
    columns = ["cell_id", "vertex_x", "vertex_y"]
    try:
        with pq.ParquetFile(path) as file:
            columns += [name for name in ("label_id",) if name in file.schema_arrow.names]
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{path}: not a readable Parquet file ({error}); get a complete copy") from error
    table = read_columns(path, columns)
    ids = text_of(table["cell_id"].to_pandas())
    xy = np.stack([table[name].to_numpy() for name in columns[1:3]], axis=1).astype(np.float64)
    if not len(ids) or not np.isfinite(xy).all():
        raise InputError(f"{path}: has no vertices, or some that are not finite; get a complete copy")
    ring = table["label_id"].to_numpy() if "label_id" in columns else pd.factorize(ids)[0]
    start = np.flatnonzero(np.r_[True, (ring[1:] != ring[:-1]) | (ids[1:] != ids[:-1])])
    length = np.diff(start, append=len(ids))
    kept = length >= 3  # shapely closes rings, but a ring needs three points
    vertices = np.repeat(kept, length)
    rings = np.repeat(np.arange(int(kept.sum())), length[kept])
    shapes = shapely.polygons(shapely.linearrings(xy[vertices], indices=rings)) if kept.any() else np.empty(0, object)
    return ids[start[kept]], np.asarray(shapes, dtype=object)


def read_columns(path: Path, columns: Sequence[str]) -> pa.Table:
    """Columns of a Parquet file.

    Raises
    ------
    InputError
        If it is not readable or lacks one.
    """
    try:
        with pq.ParquetFile(path) as file:  # not read_table, which takes a folder called "a=b" for a column
            lacking = [name for name in columns if name not in file.schema_arrow.names]
            if lacking:
                raise InputError(f"{path}: has no column {lacking[0]}; give the file that Xenium wrote")
            return file.read(columns=list(columns))
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{path}: not a readable Parquet file ({error}); get a complete copy") from error


def text_of(ids: pd.Series[Any]) -> NDArray[np.object_]:
    """Ids of cells as str: text, bytes or, in the first versions of the software, whole numbers."""
    first = ids.iloc[0] if len(ids) else ""
    if isinstance(first, bytes):
        ids = ids.str.decode("utf-8")
    return ids.astype(str).to_numpy(object)
