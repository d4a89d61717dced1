"""Export a prediction to the formats of other tools."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

import numpy as np

from prts.errors import ParameterError, did_you_mean
from prts.export.geojson import class_column, write_geojson
from prts.export.source import open_prediction
from prts.export.spatial import find_image, write_spatialdata
from prts.export.tables import write_csv, write_parquet
from prts.io.analysis import join_analysis
from prts.io.prediction import plain_text
from prts.io.unit_names import unit_name

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from prts.export.source import PredictionFile

logger = logging.getLogger(__name__)

Format = Literal["spatialdata", "geojson", "parquet", "csv"]
FORMATS: tuple[str, ...] = get_args(Format)
_N_MEASUREMENTS = 20


def export_prediction(
    prediction: str | Path,
    out: str | Path,
    *,
    format: Format,
    genes: Sequence[str] | None = None,
    image: str | Path | None = None,
    analysis: str | Path | None = None,
    classification: str | None = None,
    overwrite: bool = False,
) -> Path:
    """Write a prediction as SpatialData, QuPath GeoJSON, Parquet or CSV.

    Parameters
    ----------
    prediction
        Prediction (.h5ad). SpatialData and GeoJSON also need its polygons next to it (.nuclei.parquet).
    out
        The file or, for SpatialData, the zarr folder to write.
    format
        "spatialdata", "geojson", "parquet" or "csv".
    genes
        Genes to write. By default all, or the 20 with the highest validation PCC for GeoJSON.
    image
        Full-resolution image for SpatialData. By default the image that the prediction names, if it is next to it, else the small picture
        in the prediction.
    analysis
        analysis.h5ad of `prts analyze`: its clusters, types and scores become columns of the nuclei.
    classification
        Column of `obs` that classifies nuclei in GeoJSON; by default a cell type or cluster, if there is one.
    overwrite
        Replace `out` if it exists.

    Returns
    -------
    `out`

    Raises
    ------
    InputError
        If a file is missing or malformed, a gene or column does not exist, or `out` cannot be written.

    Examples
    --------
    >>> export_prediction("slide.h5ad", "slide.geojson", format="geojson", genes=["EPCAM", "CD3E"])  # doctest: +SKIP
    """
    if format not in FORMATS:
        raise ParameterError(
            "", "format", f"{format} is unknown{did_you_mean(str(format), FORMATS)}; choose one of {', '.join(FORMATS)}"
        )
    out = _check_out(Path(out), folder=format == "spatialdata", overwrite=overwrite)
    source = open_prediction(Path(prediction))
    if analysis is not None:
        source = replace(source, obs=plain_text(join_analysis(source.obs, Path(analysis))))
    columns = _gene_columns(source, genes, format)
    if format == "spatialdata":
        found = find_image(source, None if image is None else Path(image))
        if found is None:
            logger.info(
                "the full-resolution image was not found; exporting the small picture (give `image` to change this)"
            )
        write_spatialdata(source, columns, out, found)
    elif format == "geojson":
        write_geojson(source, columns, out, class_column(source, classification))
    else:
        (write_csv if format == "csv" else write_parquet)(source, columns, out)
    logger.info("wrote %s: %d %s x %d genes", out, len(source.obs), unit_name(source.obs.index), len(columns))
    return out


def _check_out(out: Path, *, folder: bool, overwrite: bool) -> Path:
    """Check the output path before doing any work."""
    if not out.parent.is_dir():
        problem = f"the folder {out.parent} does not exist; create it or choose another"
    elif out.exists() and not overwrite:
        problem = f"{out} exists; choose another name, or set `overwrite`"
    elif out.is_dir() and not (folder and any((out / name).is_file() for name in ("zarr.json", ".zgroup"))):
        problem = f"{out} is a folder and not a zarr; choose another name"
    elif folder and out.is_file():
        problem = f"{out} is a file, but SpatialData is a folder; choose another name"
    else:
        return out
    raise ParameterError("", "out", problem)


def _gene_columns(source: PredictionFile, genes: Sequence[str] | None, format: str) -> NDArray[np.intp]:
    if genes is not None:
        return source.genes_at(list(dict.fromkeys([genes] if isinstance(genes, str) else map(str, genes))))
    if format == "geojson" and "val_pcc" in source.var:
        return np.argsort(-source.var["val_pcc"].fillna(-1).to_numpy(), kind="stable")[:_N_MEASUREMENTS]
    return np.arange(len(source.var))
