"""Visium HD with cells, as Space Ranger 4 delivers it.

The nuclei are the true ones. A cell is its nucleus and the bins nearest to it up to 8 um away, Space Ranger's default.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import shapely
from scipy.sparse import csr_matrix

from prts.io.outlines import labels_to_polygons
from prts.platforms.barcode_mappings import MAPPINGS, SIZES_UM, write_barcode_mappings
from prts.platforms.bin_owners import BinOwners, CountSettings, assign_bins
from prts.platforms.bin_positions import bins_folder, read_positions
from prts.simulate.bins import BINS, HIRES_PX, scalefactors, write_bins, write_matrix, write_previews
from prts.simulate.layouts import layouts

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

    from prts.simulate.layouts.base import SimulatedSection

EXPAND_UM = 8.0


@layouts.register("spaceranger4")
class SpaceRanger4Layout:
    """`outs` with bins of 2, 8 and 16 um, cells, and the table of bins and cells."""

    name: ClassVar[str]
    entries: ClassVar[frozenset[str]] = frozenset({"outs"})
    previews: ClassVar[Mapping[str, int]] = {"lowres": 600, "hires": HIRES_PX}

    def write(self, folder: Path, section: SimulatedSection) -> None:
        """Write `binned_outputs`, `segmented_outputs` and `barcode_mappings.parquet`."""
        outs = folder / "outs"
        bins, segmented = outs / BINS, outs / "segmented_outputs"
        lowres = section.previews["lowres"].scale
        for size in SIZES_UM:
            square = bins.parent / bins_folder(size)
            write_bins(square, section.lattice, section.counts, section.truth, section.mpp, section.shape, lowres, size)
            write_previews(square / "spatial", section.previews)
        grid = read_positions(bins)
        # StarDist's nuclei do not overlap
        nuclei = np.asarray(section.outlines.geometry.array, dtype=object)
        owners = assign_bins(nuclei, grid, CountSettings(expand_um=EXPAND_UM, shared="nearest"))
        (segmented / "spatial").mkdir(parents=True)
        number, outlines, _ = labels_to_polygons(owners.unit + 1)
        # pixel i of the label image covers [i, i + 1); bin i is centered at i
        outlines = shapely.transform(outlines, lambda xy: (xy - 0.5) @ grid.affine[:, :2].T + grid.affine[:, 2])
        order = np.argsort(number)
        write_geojson(segmented / "cell_segmentations.geojson", outlines[order], number[order])
        write_geojson(segmented / "nucleus_segmentations.geojson", nuclei, np.arange(1, len(nuclei) + 1))
        _write_cell_matrix(segmented / "filtered_feature_cell_matrix.h5", section, owners)
        factors = scalefactors(section.mpp, section.shape, lowres)
        for of_bins in ("bin_size_um", "spot_diameter_fullres"):
            del factors[of_bins]
        (segmented / "spatial/scalefactors_json.json").write_text(json.dumps(factors, indent=4))
        write_previews(segmented / "spatial", section.previews)
        row, col = (a.ravel() for a in np.indices(owners.unit.shape, dtype=np.int32))
        ids = cell_barcodes(np.arange(1, len(nuclei) + 1)).astype(str).astype(object)
        write_barcode_mappings(outs / MAPPINGS, row, col, owners.unit.ravel(), ids, owners.in_nucleus.ravel())


def cell_barcodes(number: NDArray[np.integer[Any]]) -> NDArray[np.bytes_]:
    """Space Ranger's names of cells, (n,).

    Examples
    --------
    >>> cell_barcodes(np.array([7])).tolist()
    [b'cellid_000000007-1']
    """
    return np.char.mod("cellid_%09d-1", number).astype("S")


def write_geojson(path: Path, polygons: NDArray[Any], number: NDArray[np.integer[Any]]) -> None:
    """Write polygons in full-resolution pixels, (n,), with their `cell_id`, (n,)."""
    features = [
        {"type": "Feature", "geometry": json.loads(geometry), "properties": {"cell_id": int(cell)}}
        for geometry, cell in zip(shapely.to_geojson(polygons), number, strict=True)
    ]
    path.write_text(json.dumps({"type": "FeatureCollection", "features": features}))


def _write_cell_matrix(path: Path, section: SimulatedSection, owners: BinOwners) -> None:
    """Counts of the cells that have any."""
    owner = owners.unit[section.counts.in_tissue]
    bins = np.flatnonzero(owner >= 0)
    ones = np.ones(len(bins), np.int32)
    cells = csr_matrix((ones, (owner[bins], bins)), shape=(section.truth.n_obs, len(owner))) @ section.counts.counts
    cells.sort_indices()
    has_umi = np.diff(cells.indptr) > 0
    write_matrix(path, cells[has_umi], cell_barcodes(np.flatnonzero(has_umi) + 1), section.truth)
