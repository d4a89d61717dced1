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

import prts
from prts.io.hdf5 import NewFile
from prts.platforms.barcode_mappings import arrow_strings
from prts.platforms.bin_matrix import bin_barcodes
from prts.simulate.lattice import BIN_UM

if TYPE_CHECKING:
    import anndata as ad
    from numpy.typing import NDArray
    from scipy import sparse

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
        Scale of `tissue_lowres_image.png`, which `write_previews` writes.
    """
    (folder / "spatial").mkdir(parents=True)
    in_tissue = counts.in_tissue.ravel()
    row, col = (a.ravel() for a in np.indices(counts.in_tissue.shape, dtype=np.int32))
    barcodes = bin_barcodes(int(BIN_UM), row, col)
    xy = (lattice.to_um(row, col) + np.asarray(lattice.shift_um)) / mpp
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
    (folder / "spatial/scalefactors_json.json").write_text(json.dumps(scalefactors(mpp, shape, lowres), indent=4))
    write_matrix(folder / "filtered_feature_bc_matrix.h5", counts.counts, barcodes[in_tissue], truth)


def scalefactors(mpp: float, shape: tuple[int, int], lowres: float) -> dict[str, float]:
    """Content of `scalefactors_json.json` beside bins of 2 um; the parameters are those of `write_bins`."""
    hires = min(1.0, HIRES_PX / max(shape))
    return {
        "spot_diameter_fullres": BIN_UM / mpp,
        "bin_size_um": BIN_UM,
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
