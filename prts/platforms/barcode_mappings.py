"""`barcode_mappings.parquet`, Space Ranger 4's table of bins and the cells they belong to."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from prts.platforms.bin_matrix import bin_barcodes
from prts.platforms.bin_positions import BIN_SIZE_UM

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

MAPPINGS = "barcode_mappings.parquet"
SIZES_UM = (2, 8, 16)
_ROWS = 1 << 20


def arrow_strings(text: NDArray[np.bytes_]) -> pa.StringArray:
    """Strings of equal length, without one Python object per string."""
    offsets = np.arange(len(text) + 1, dtype=np.int32) * text.dtype.itemsize
    return pa.StringArray.from_buffers(len(text), pa.py_buffer(offsets), pa.py_buffer(text))


def write_barcode_mappings(
    path: Path,
    row: NDArray[np.integer],
    col: NDArray[np.integer],
    unit: NDArray[np.integer],
    cell_id: NDArray[np.object_],
    in_nucleus: NDArray[np.bool_],
    share: NDArray[np.float64] | None = None,
) -> None:
    """Write the table of bins and units.

    Parameters
    ----------
    path
        The file.
    row, col
        Place of each 2 um bin in the array, (n,).
    unit
        Index of its unit in `cell_id`, negative for a bin in none, (n,).
    cell_id
        Names of the units, (n_units,).
    in_nucleus
        Whether the bin is in the nucleus of its unit, (n,).
    share
        Share of the bin's UMIs, for bins that are divided, (n,); they have one row per unit.
    """
    names = pa.array(cell_id, pa.string())
    columns = {f"square_{size:03d}um": pa.string() for size in SIZES_UM}
    schema = pa.schema({**columns, "cell_id": pa.string(), "in_nucleus": pa.bool_(), "in_cell": pa.bool_()})
    if share is not None:
        schema = schema.append(pa.field("share", pa.float64()))
    with pq.ParquetWriter(path, schema) as writer:
        for start in range(0, len(row), _ROWS):
            part = slice(start, start + _ROWS)
            r, c, owner = row[part], col[part], unit[part]
            squares = [
                arrow_strings(bin_barcodes(size, r // (size // int(BIN_SIZE_UM)), c // (size // int(BIN_SIZE_UM))))
                for size in SIZES_UM
            ]
            owned = owner >= 0
            of_unit = names.take(pa.array(np.maximum(owner, 0), mask=~owned))
            values = [*squares, of_unit, pa.array(in_nucleus[part] & owned), pa.array(owned)]
            if share is not None:
                values.append(pa.array(share[part]))
            writer.write_table(pa.Table.from_arrays(values, schema=schema))
