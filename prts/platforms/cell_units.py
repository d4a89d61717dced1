"""Cells of a platform as units.

Its own cells keep their counts; nuclei of another source get those of the cells whose center they hold.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import shapely
from numpy.typing import NDArray
from scipy.sparse import csr_matrix

from prts.errors import InputError
from prts.platforms.base import counts_table

if TYPE_CHECKING:
    import geopandas as gpd
    from anndata import AnnData

logger = logging.getLogger(__name__)

# Cells at the edge may lie outside an image that is cropped to the tissue; with a larger share outside it is another image.
_MAX_OUTSIDE = 0.2
# A section through a lymphocyte's nucleus has about 25 um2.
_SMALL_UM2 = 8.0
# um/px from which on a smaller part of the image is probably the tissue's own.
_CORNER = 0.8
# Full-resolution pixels. A cell with the id of another one, such as "12" of another segmentation, is elsewhere.
_SAME_PLACE_PX = 1.0
# Names of what is measured besides genes: Xenium, CosMx, MERSCOPE.
_CONTROL = re.compile(
    r"(neg(ative)?_?(ctrl|control)?_?(probe|codeword|prb|add)|neg(prb|add)|negative\d|antisense_|blank|falsecode|systemcontrol|"
    r"unassignedcodeword|deprecatedcodeword|intergenic_region)",
    re.IGNORECASE,
)


def is_control(names: pd.Series) -> NDArray[np.bool_]:
    """Which features are negative controls, blanks or unused codewords, by the names that Xenium, CosMx and MERSCOPE give them.

    Parameters
    ----------
    names
        Names of features, (n,).

    Examples
    --------
    >>> is_control(pd.Series(["NEGR1", "NegPrb3", "Blank-12", "BLANK_0180", "SystemControl7", "NegControlProbe_00042"])).tolist()
    [False, True, True, True, True, True]
    """
    found: NDArray[np.bool_] = names.astype(str).str.match(_CONTROL).to_numpy(bool)
    return found


def share_outside(xy: NDArray[np.float64], width: int, height: int) -> float:
    """Share of points outside an image."""
    inside = ((xy >= 0) & (xy <= (width, height))).all(axis=1)
    return float(1 - inside.mean()) if len(xy) else 0.0


def require_inside(
    source: object,
    xy: NDArray[np.float64],
    image: tuple[object, int, int],
    others: Mapping[str, NDArray[np.float64]],
    otherwise: str,
) -> None:
    """Refuse cells that are not on the image, and name the likely cause.

    Parameters
    ----------
    source
        The file or folder, for messages.
    xy
        Positions of the cells in full-resolution pixels, (n, 2).
    image
        Its name, width and height in full-resolution pixels.
    others
        Where the cells would be in other cases: what would then be wrong and what to do, and positions (n, 2).
    otherwise
        What to do if none of these is the case.

    Raises
    ------
    InputError
        If more than a fifth of the cells is outside.
    """
    name, width, height = image
    outside = share_outside(xy, width, height)
    if outside <= _MAX_OUTSIDE:
        return
    low, high = np.nanmin(xy, axis=0), np.nanmax(xy, axis=0)
    cause = next(
        (cause for cause, positions in others.items() if share_outside(positions, width, height) <= _MAX_OUTSIDE),
        otherwise,
    )
    raise InputError(
        f"{source}: {outside:.0%} of the cells are outside {name} ({width} x {height} px): they span x {low[0]:.0f} to {high[0]:.0f}, "
        f"y {low[1]:.0f} to {high[1]:.0f}; {cause}"
    )


def warn_of_corner(source: object, xy: NDArray[np.float64], image: tuple[object, int, int], mpp: float) -> None:
    """Warn of cells that fill only the top left part of an image, of the size that it has in um: um that are taken for pixels.

    Parameters
    ----------
    source
        The file, for messages.
    xy
        Positions that are taken for full-resolution pixels, (n, 2).
    image
        Its name, width and height in full-resolution pixels.
    mpp
        um per full-resolution pixel.
    """
    name, *size = image
    if mpp < _CORNER and (np.nanmax(xy, axis=0) <= np.multiply(size, mpp)).all():
        logger.warning(
            "%s: all cells are in the top left %.0f x %.0f px of %s, its size in um; if they are in um, set `coordinates: um`",
            source,
            *np.multiply(size, mpp),
            name,
        )


def mpp_of(nuclei: gpd.GeoDataFrame) -> float:
    """The um/px of a table of nuclei, from their areas in both units."""
    area_px = shapely.area(np.asarray(nuclei.geometry.array, dtype=object))
    return float(np.sqrt(np.median(nuclei["area_um2"].to_numpy(np.float64) / area_px)))


def warn_of_size(source: object, cells: gpd.GeoDataFrame, coordinates: str) -> None:
    """Warn of cells that are smaller than any nucleus: positions in um that are taken for pixels still fit on the image."""
    typical = float(cells["area_um2"].median()) if len(cells) else np.inf
    if typical < _SMALL_UM2:
        logger.warning(
            "%s: the median cell has an area of only %.2g um2; its outlines are probably not in %s",
            source,
            typical,
            coordinates,
        )


def largest_of_each(ids: NDArray[Any], shapes: NDArray[np.object_]) -> tuple[NDArray[Any], NDArray[np.object_]]:
    """The largest shape of each cell: files list several nuclei of one cell, or one outline per focal plane.

    Parameters
    ----------
    ids
        Cell of each shape, (n_shapes,).
    shapes
        Shapely geometries, (n_shapes,).

    Returns
    -------
    Unique ids in the order of their first shape, and the shape of each.
    """
    table = pd.DataFrame({"id": ids, "area": shapely.area(shapes)})
    table["first"] = table.groupby("id", sort=False)["area"].transform("idxmax")
    kept = table.drop_duplicates("id")["first"].to_numpy(dtype=np.int64, na_value=-1)
    kept = kept[kept >= 0]
    return np.asarray(ids, dtype=object)[kept], shapes[kept]


def own_rows(nuclei: gpd.GeoDataFrame, own: gpd.GeoDataFrame) -> NDArray[np.int64] | None:
    """The row of each nucleus among a platform's own cells; None if they are not these cells.

    Parameters
    ----------
    nuclei
        Nuclei of any source, (n,).
    own
        The platform's cells, in the columns of nuclei.
    """
    rows = pd.Index(own["cell_id"]).get_indexer(pd.Index(nuclei["cell_id"]))
    if (rows < 0).any():
        return None
    here, there = (_centers(frame) for frame in (nuclei, own))
    if np.abs(here - there[rows]).max(initial=0.0) > _SAME_PLACE_PX:
        return None
    return np.asarray(rows, dtype=np.int64)


def count_cells(
    X: csr_matrix,
    cell_id: NDArray[Any],
    var: pd.DataFrame,
    own: gpd.GeoDataFrame,
    nuclei: gpd.GeoDataFrame,
    source: Path,
) -> AnnData:
    """Counts of nuclei from counts of cells.

    A platform's own cells keep their counts. A nucleus of another source gets the counts of all cells whose center it holds; a cell whose
    center is in several nuclei is dropped.

    Parameters
    ----------
    X
        Counts, CSR int32 (n_cells, n_genes).
    cell_id
        The cells of the rows, unique, (n_cells,).
    var
        Genes as in `counts_table`, (n_genes,).
    own
        Outlines of the cells in the columns of nuclei, in any order; cells without one have no counts here.
    nuclei
        The nuclei, in full-resolution pixels.
    source
        The file, for messages.

    Raises
    ------
    InputError
        If no nucleus receives a count.
    """
    row_of_own = pd.Index(cell_id).get_indexer(pd.Index(own["cell_id"]))
    rows = own_rows(nuclei, own)
    report: dict[str, Any] = {"n_cells": len(cell_id), "umi_total": int(X.sum())}
    if rows is not None:
        counts = X[row_of_own[rows]]
    else:
        tree = shapely.STRtree(shapely.points(_centers(own)))
        nucleus, cell = tree.query(np.asarray(nuclei.geometry.array, dtype=object), predicate="contains")
        once = np.bincount(cell, minlength=len(own))[cell] == 1
        report["n_cells_shared_dropped"] = len(np.unique(cell[~once]))
        nucleus, cell = nucleus[once], cell[once]
        member = csr_matrix(
            (np.ones(len(cell), np.int32), (nucleus, row_of_own[cell])), shape=(len(nuclei), len(cell_id))
        )
        counts = csr_matrix(member @ X)
        report["n_cells_assigned"] = len(cell)
        logger.info("%d of %d cells have their center in one of %d nuclei", len(cell), len(cell_id), len(nuclei))
    counts = csr_matrix(counts, dtype=np.int32)
    counts.sort_indices()
    counts.eliminate_zeros()
    report["umi_assigned"] = int(counts.sum())
    if report["umi_assigned"] == 0:
        raise InputError(
            f"{source}: none of {report['umi_total']} counts is in one of {len(nuclei)} nuclei; give cells and nuclei of the same image"
        )
    return counts_table(counts, nuclei, var, report)


def whole_counts(X: Any, source: object, cure: str) -> csr_matrix:
    """Counts as CSR int32, sorted and without explicit zeros.

    Parameters
    ----------
    X
        Sparse or dense numbers, (n_cells, n_genes).
    source
        Where they are from, for messages.
    cure
        What to do if they are not counts.

    Raises
    ------
    InputError
        If a value is negative, not finite, or not whole.
    """
    counts = csr_matrix(X)
    counts.sum_duplicates()
    data = counts.data
    wrong = ~((data >= 0) & (data <= np.iinfo(np.int32).max) & (data == np.trunc(data)))  # NaN fails all
    if wrong.any():
        what = f"{data[wrong][0]:g}" if data.dtype.kind == "f" else str(data[wrong][0])
        raise InputError(f"{source}: has values such as {what}, which are not raw counts; {cure}")
    counts = counts.astype(np.int32)
    counts.eliminate_zeros()
    return counts


def _centers(frame: gpd.GeoDataFrame) -> NDArray[np.float64]:
    shapes = np.asarray(frame.geometry.array, dtype=object)
    return np.asarray(shapely.get_coordinates(shapely.centroid(shapes)), dtype=np.float64)
