"""The tilted lattice of 2 um bins, and the files in which 10x delivers what they caught."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

import prts
from prts.io.hdf5 import NewFile

if TYPE_CHECKING:
    from pathlib import Path

    import anndata as ad
    from numpy.typing import NDArray
    from scipy import sparse

    from prts.simulate.draw_counts import BinCounts
    from prts.simulate.tissue import Layout

    Floats = NDArray[np.float64]

BIN_UM = 2.0
GENOME = "simulated"


@dataclass(frozen=True)
class Lattice:
    """Where the bins lie: bin (row, col) is centred `origin_um + R(tilt) [col, row] BIN_UM` (+ shift, as the files report it)."""

    n_rows: int
    n_cols: int
    origin_um: tuple[float, float]
    tilt: float
    """Radians; positive turns columns downwards."""
    shift_um: tuple[float, float]

    def to_um(self, row: NDArray[np.generic], col: NDArray[np.generic]) -> Floats:
        """True centres (n, 2), x and y in um."""
        cos, sin = np.cos(self.tilt), np.sin(self.tilt)
        x, y = np.asarray(col, float) * BIN_UM, np.asarray(row, float) * BIN_UM
        return np.stack([self.origin_um[0] + x * cos - y * sin, self.origin_um[1] + x * sin + y * cos], axis=-1)

    def from_um(self, xy_um: Floats) -> Floats:
        """Column and row (n, 2), not rounded."""
        cos, sin = np.cos(self.tilt), np.sin(self.tilt)
        x, y = (xy_um - np.asarray(self.origin_um)).T / BIN_UM
        return np.stack([x * cos + y * sin, y * cos - x * sin], axis=-1)


def make_lattice(layout: Layout, tilt_deg: float, shift_um: tuple[float, float]) -> Lattice:
    """A square capture area about the middle of the image that leaves a thin strip of the image uncovered."""
    tilt = np.deg2rad(tilt_deg)
    n_cols, n_rows = (int(0.94 * side / BIN_UM) for side in (layout.width_um, layout.height_um))
    cos, sin = np.cos(tilt), np.sin(tilt)
    half_x, half_y = (n_cols - 1) / 2 * BIN_UM, (n_rows - 1) / 2 * BIN_UM
    middle_x, middle_y = 0.49 * layout.width_um, 0.5 * layout.height_um
    origin = (middle_x - half_x * cos + half_y * sin, middle_y - half_x * sin - half_y * cos)
    return Lattice(n_rows, n_cols, origin, float(tilt), shift_um)


def write_bins(
    folder: Path,
    lattice: Lattice,
    counts: BinCounts,
    truth: ad.AnnData,
    mpp: float,
    shape: tuple[int, int],
    lowres: float,
) -> None:
    """Write `square_002um` as Space Ranger 3 does.

    Parameters
    ----------
    folder
        The folder to fill; made.
    lattice, counts
        What to write.
    truth
        Its genes: names and a column `gene_id`.
    mpp
        um per full-resolution pixel.
    shape
        Rows and columns of the full-resolution image.
    lowres
        Scale of `tissue_lowres_image.png`, which the caller writes.
    """
    (folder / "spatial").mkdir(parents=True)
    in_tissue = counts.in_tissue.ravel()
    row, col = (a.ravel() for a in np.indices(counts.in_tissue.shape, dtype=np.int32))
    barcodes = _barcodes(row, col)
    xy = (lattice.to_um(row, col) + np.asarray(lattice.shift_um)) / mpp
    table = pa.table(
        {
            "barcode": _arrow_strings(barcodes),
            "in_tissue": in_tissue.astype(np.int32),
            "array_row": row,
            "array_col": col,
            "pxl_row_in_fullres": np.ascontiguousarray(xy[:, 1]),
            "pxl_col_in_fullres": np.ascontiguousarray(xy[:, 0]),
        }
    )
    pq.write_table(table, folder / "spatial/tissue_positions.parquet")
    hires = min(1.0, 6000 / max(shape))
    scalefactors = {
        "spot_diameter_fullres": BIN_UM / mpp,
        "bin_size_um": BIN_UM,
        "microns_per_pixel": mpp,
        "regist_target_img_scalef": hires,
        "tissue_lowres_scalef": lowres,
        "fiducial_diameter_fullres": 330.0 / mpp,
        "tissue_hires_scalef": hires,
    }
    (folder / "spatial/scalefactors_json.json").write_text(json.dumps(scalefactors, indent=4))
    _write_matrix(folder / "filtered_feature_bc_matrix.h5", counts.counts, barcodes[in_tissue], truth)


def _barcodes(row: NDArray[np.int32], col: NDArray[np.int32]) -> NDArray[np.bytes_]:
    """`s_002um_RRRRR_CCCCC-1` for every bin."""
    text = np.empty((len(row), 21), np.uint8)
    text[:] = np.frombuffer(b"s_002um_00000_00000-1", np.uint8)
    for at, number in ((8, row), (14, col)):
        digits = number[:, None] // np.array([10_000, 1_000, 100, 10, 1], np.int32) % 10
        text[:, at : at + 5] += digits.astype(np.uint8)
    return text.view("S21").ravel()


def _arrow_strings(text: NDArray[np.bytes_]) -> pa.Array:
    """Strings of one length without a Python object each."""
    offsets = np.arange(len(text) + 1, dtype=np.int32) * text.dtype.itemsize
    return pa.StringArray.from_buffers(len(text), pa.py_buffer(offsets), pa.py_buffer(text))


def _write_matrix(path: Path, counts: sparse.csr_matrix, barcodes: NDArray[np.bytes_], truth: ad.AnnData) -> None:
    """The feature-barcode matrix, CSC of genes x bins (10x guide, "HDF5 Feature-Barcode Matrix Format")."""
    n = truth.n_vars
    columns = {
        "matrix/barcodes": barcodes,
        "matrix/data": counts.data.astype(np.int32),
        "matrix/indices": counts.indices.astype(np.uint32),
        "matrix/indptr": counts.indptr.astype(np.uint32),
        "matrix/shape": np.array([n, len(barcodes)], np.uint32),
        "matrix/features/_all_tag_keys": np.array([b"genome"]),
        "matrix/features/feature_type": np.full(n, b"Gene Expression"),
        "matrix/features/genome": np.full(n, GENOME.encode()),
        "matrix/features/id": truth.var["gene_id"].to_numpy().astype("S"),
        "matrix/features/name": truth.var_names.to_numpy().astype("S"),
        "matrix/features/target_sets/Simulated Probe Set": np.arange(n).astype("S"),
    }
    with NewFile(path) as out:
        out.attrs.update({"chemistry_desc": "simulated Visium HD", "filetype": "matrix", "version": 2})
        out.attrs["software_version"] = f"prts-{prts.__version__}"
        for name, values in columns.items():
            out.create_dataset(name, data=values, compression="gzip", shuffle=True, track_times=False)
