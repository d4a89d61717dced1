"""Write a prediction as a CSV or Parquet table with one row per nucleus."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd

from prts.errors import ParameterError
from prts.io.cache import atomic

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from prts.export.source import PredictionFile


def write_csv(prediction: PredictionFile, columns: NDArray[np.intp], out: Path) -> None:
    """Write `cell_id, x, y` (full-resolution px), the columns of `obs`, and the expected UMI of the genes at `columns`.

    UMI are written with six significant digits.

    Raises
    ------
    InputError
        If a gene has the same name as another column.
    """
    with atomic(out) as temporary, temporary.open("w", encoding="utf-8", newline="") as file:
        for i, frame in enumerate(_frames(prediction, columns)):
            frame.to_csv(file, index=False, header=i == 0, float_format="%.6g")


def write_parquet(prediction: PredictionFile, columns: NDArray[np.intp], out: Path) -> None:
    """Write the table of `write_csv` as Parquet, UMI as float32.

    Raises
    ------
    InputError
        If a gene has the same name as another column.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = None
    with atomic(out) as temporary:
        writer = None
        try:
            for frame in _frames(prediction, columns):
                table = pa.Table.from_pandas(frame, schema=schema, preserve_index=False)
                if writer is None:
                    schema = table.schema
                    writer = pq.ParquetWriter(temporary, schema, compression="zstd")
                writer.write_table(table)
        finally:
            if writer is not None:
                writer.close()


def _frames(prediction: PredictionFile, columns: NDArray[np.intp]) -> Iterator[pd.DataFrame]:
    obs = prediction.obs.rename_axis("cell_id").reset_index()
    obs["cell_id"] = obs["cell_id"].astype(object)
    obs.insert(1, "x", prediction.xy_px[:, 0])
    obs.insert(2, "y", prediction.xy_px[:, 1])
    # as categories, columns would differ between chunks
    categorical = obs.select_dtypes("category").columns
    obs[categorical] = obs[categorical].astype(object)
    genes = prediction.var.index[columns]
    twice = obs.columns.intersection(genes)
    if len(twice):
        raise ParameterError("", "genes", f"{twice[0]!r} is also the name of another column; give `genes` without it")
    for rows, umi in prediction.chunks(columns):
        yield pd.concat([obs.iloc[rows].reset_index(drop=True), pd.DataFrame(umi, columns=genes)], axis=1)
