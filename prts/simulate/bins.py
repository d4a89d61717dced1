"""Counts of 2 um bins in the files that Space Ranger writes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from scipy import sparse

import prts
from prts.io.hdf5 import NewFile
from prts.platforms.barcode_mappings import arrow_strings
from prts.platforms.bin_matrix import bin_barcodes
from prts.simulate.lattice import BIN_UM

if TYPE_CHECKING:
    import anndata as ad
    from numpy.typing import NDArray

    from prts.simulate.draw_counts import BinCounts
    from prts.simulate.lattice import BinLattice
    from prts.simulate.layouts.base import Preview

BINS = Path("binned_outputs/square_002um")
GENOME = "simulated"
HIRES_PX = 6000
"""Largest side of `tissue_hires_image.png`."""


def write_bins(
    folder: Path,
    lattice: BinLattice,
    counts: BinCounts,
    truth: ad.AnnData,
    mpp: float,
    shape: tuple[int, int],
    lowres: float,
    bin_um: int = int(BIN_UM),
) -> None:
    """Write `square_NNNum` as Space Ranger 3 does.

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
        Scale of `tissue_lowres_image.png`, which `write_previews` writes.
    bin_um
        Side of the bins that are written, a multiple of 2; each holds the UMIs of the 2 um bins in it.
    """
    (folder / "spatial").mkdir(parents=True)
    times = bin_um // int(BIN_UM)
    tissue, umi = _coarser(counts, times)
    in_tissue = tissue.ravel()
    row, col = (a.ravel() for a in np.indices(tissue.shape, dtype=np.int32))
    barcodes = bin_barcodes(bin_um, row, col)
    middle = (times - 1) / 2
    xy = (lattice.to_um(row * times + middle, col * times + middle) + np.asarray(lattice.shift_um)) / mpp
    table = pa.table(
        {
            "barcode": arrow_strings(barcodes),
            "in_tissue": in_tissue.astype(np.int32),
            "array_row": row,
            "array_col": col,
            "pxl_row_in_fullres": np.ascontiguousarray(xy[:, 1]),
            "pxl_col_in_fullres": np.ascontiguousarray(xy[:, 0]),
        }
    )
    pq.write_table(table, folder / "spatial/tissue_positions.parquet")
    (folder / "spatial/scalefactors_json.json").write_text(
        json.dumps(scalefactors(mpp, shape, lowres, bin_um), indent=4)
    )
    write_matrix(folder / "filtered_feature_bc_matrix.h5", umi, barcodes[in_tissue], truth)


def _coarser(counts: BinCounts, times: int) -> tuple[NDArray[np.bool_], sparse.csr_matrix]:
    """Which larger bins have tissue, and their counts."""
    if times == 1:
        return counts.in_tissue, counts.counts
    row, col = np.nonzero(counts.in_tissue)
    n_rows, n_cols = (-(-side // times) for side in counts.in_tissue.shape)
    outer = row // times * n_cols + col // times
    listed, place = np.unique(outer, return_inverse=True)
    tissue = np.zeros(n_rows * n_cols, np.bool_)
    tissue[listed] = True
    members = sparse.csr_matrix((np.ones(len(place), np.int32), (place, np.arange(len(place)))))
    summed = sparse.csr_matrix(members @ counts.counts)
    summed.sort_indices()
    return tissue.reshape(n_rows, n_cols), summed


def scalefactors(mpp: float, shape: tuple[int, int], lowres: float, bin_um: float = BIN_UM) -> dict[str, float]:
    """Content of `scalefactors_json.json` beside bins; the parameters are those of `write_bins`."""
    hires = min(1.0, HIRES_PX / max(shape))
    return {
        "spot_diameter_fullres": bin_um / mpp,
        "bin_size_um": float(bin_um),
        "microns_per_pixel": mpp,
        "regist_target_img_scalef": hires,
        "tissue_lowres_scalef": lowres,
        "fiducial_diameter_fullres": 330.0 / mpp,
        "tissue_hires_scalef": hires,
    }


def write_previews(spatial: Path, previews: Mapping[str, Preview]) -> None:
    """Write small copies of the image as `tissue_<name>_image.png`."""
    for name, preview in previews.items():
        Image.fromarray(preview.pixels).save(spatial / f"tissue_{name}_image.png")


def write_matrix(path: Path, counts: sparse.csr_matrix, barcodes: NDArray[np.bytes_], truth: ad.AnnData) -> None:
    """Write a feature-barcode matrix, CSC of genes x bins or cells (10x guide, "HDF5 Feature-Barcode Matrix Format").

    Parameters
    ----------
    path
        The file.
    counts
        Bins or cells x genes, with the barcodes `barcodes`.
    barcodes
        Names of the rows.
    truth
        The section's genes: names and a column `gene_id`, and `feature_type` if some are no genes.
    """
    n = truth.n_vars
    kinds = truth.var["feature_type"].to_numpy().astype("S") if "feature_type" in truth.var else b"Gene Expression"
    columns = {
        "matrix/barcodes": barcodes,
        "matrix/data": counts.data.astype(np.int32),
        "matrix/indices": counts.indices.astype(np.uint32),
        "matrix/indptr": counts.indptr.astype(np.uint32),
        "matrix/shape": np.array([n, len(barcodes)], np.uint32),
        "matrix/features/_all_tag_keys": np.array([b"genome"]),
        "matrix/features/feature_type": np.full(n, kinds),
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
