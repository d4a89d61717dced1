"""Write a prediction as GeoJSON for QuPath (0.4 or newer, Import objects from file), with one detection per nucleus."""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import shapely

from prts.errors import ParameterError
from prts.io.cache import atomic
from prts.io.slide_bounds import Bounds, to_part

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from prts.export.source import PredictionFile

logger = logging.getLogger(__name__)

CLASS_COLUMNS = ("cell_type", "type", "classifier_type", "broad", "cluster", "leiden", "classification")
# Okabe and Ito 2008, then Paul Tol's muted scheme; users can change them in QuPath
_COLOURS = (
    *((0, 114, 178), (213, 94, 0), (0, 158, 115), (204, 121, 167), (230, 159, 0), (86, 180, 233), (240, 228, 66)),
    *((51, 34, 136), (136, 204, 238), (68, 170, 153), (17, 119, 51), (153, 153, 51), (221, 204, 119)),
    *((204, 102, 119), (136, 34, 85), (170, 68, 153), (221, 221, 221)),
)
_NULL = re.compile(r'"(?:[^"\\]|\\.)*":null,?')


def class_column(prediction: PredictionFile, asked: str | None) -> str | None:
    """The column of `obs` that classifies nuclei: the one requested, else the first of `CLASS_COLUMNS` that exists, else None.

    Raises
    ------
    InputError
        If the requested column does not exist.
    """
    if asked is None:
        return next((column for column in CLASS_COLUMNS if column in prediction.obs), None)
    if asked not in prediction.obs:
        there = ", ".join(prediction.obs.columns)
        raise ParameterError(
            "", "classification", f"{asked} is not a column of obs in {prediction.path}; choose one of {there}"
        )
    return asked


def write_geojson(
    prediction: PredictionFile, columns: NDArray[np.intp], out: Path, classification: str | None = None
) -> None:
    """Write a FeatureCollection of detections in full-resolution pixels as QuPath counts them; `id` and name are the `cell_id`.

    Measurements are the numeric columns of `obs` and the expected UMI of genes; NaN values are left out.

    Parameters
    ----------
    prediction
        The prediction, with its polygons next to it.
    columns
        Columns of the genes.
    out
        Output file.
    classification
        Column of `obs`, or None. Nuclei with a missing value are not classified.
    """
    outlines = prediction.nuclei().geometry.to_numpy()
    if (bounds := prediction.uns["prts"].get("bounds")) is not None:
        logger.info(
            "%s: pixels are counted from the corner of the part of the slide that was scanned, as in QuPath", out
        )
        outlines = to_part(outlines, Bounds(*np.asarray(bounds, int).tolist()))
    numbers = prediction.obs.select_dtypes(["number", "bool"]).astype(float)
    names = _json(prediction.obs.index.to_numpy(dtype=object))
    classes = _classes(prediction.obs, classification)
    genes = prediction.var.index[columns]
    with atomic(out) as temporary, temporary.open("w", encoding="utf-8") as file:
        file.write('{"type":"FeatureCollection","features":[')
        for rows, umi in prediction.chunks(columns):
            measured = pd.concat([numbers.iloc[rows].reset_index(drop=True), pd.DataFrame(umi, columns=genes)], axis=1)
            measured = measured.loc[:, ~measured.columns.duplicated()]
            features = (
                '{"type":"Feature","id":' + names[rows]
                + ',"geometry":' + shapely.to_geojson(outlines[rows]).astype(object)
                + ',"properties":{"objectType":"detection","name":' + names[rows]
                + classes[rows] + ',"measurements":' + _measurements(measured) + "}}"
            )  # fmt: skip
            file.write((",\n" if rows.start else "\n") + ",\n".join(features))
        file.write("\n]}\n")


def _json(words: NDArray[Any]) -> NDArray[Any]:
    return np.array([json.dumps(word, ensure_ascii=False) for word in words.tolist()], dtype=object)


def _measurements(table: pd.DataFrame) -> NDArray[Any]:
    """One JSON object per row. QuPath does not accept null, so NaN values are left out."""
    if table.shape[1] == 0:
        return np.full(len(table), "{}", dtype=object)
    text = table.to_json(orient="records", lines=True, double_precision=6).rstrip("\n")
    if table.isna().to_numpy().any():
        text = re.sub(r",}(?=\n|$)", "}", _NULL.sub("", text))
    return np.array(text.split("\n"), dtype=object)


def _classes(obs: pd.DataFrame, column: str | None) -> NDArray[Any]:
    """The `classification` property of each nucleus as text with a leading comma; empty if unclassified."""
    if column is None:
        return np.full(len(obs), "", dtype=object)
    codes, labels = pd.factorize(obs[column].astype(object).map(str, na_action="ignore"), sort=True)
    texts = [
        f',"classification":{{"name":{json.dumps(label, ensure_ascii=False)},"color":{list(_COLOURS[i % len(_COLOURS)])}}}'
        for i, label in enumerate(labels)
    ]
    # missing values have code -1, the last text
    return np.array([*texts, ""], dtype=object)[codes]
