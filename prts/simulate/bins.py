"""Counts of 2 um bins in the files that Space Ranger writes."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

import prts
from prts.io.hdf5 import NewFile
from prts.simulate.lattice import BIN_UM

if TYPE_CHECKING:
    from pathlib import Path

    import anndata as ad
    from numpy.typing import NDArray
    from scipy import sparse

    from prts.simulate.draw_counts import BinCounts
    from prts.simulate.lattice import BinLattice

GENOME = "simulated"


def write_bins(
    folder: Path,
    lattice: BinLattice,
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
        The folder to create and fill.
    lattice, counts
        Positions and counts of the bins.
    truth
        The section's genes: names and a column `gene_id`.
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
    """Strings of equal length, without one Python object per string."""
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
