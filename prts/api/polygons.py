"""The polygons of a prediction in memory, stored in `uns`, so that any subset can be evaluated, drawn or exported."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import shapely

from prts.errors import InputError
from prts.io.nuclei import load_nuclei
from prts.io.prediction import nuclei_path

if TYPE_CHECKING:
    from anndata import AnnData
    from geopandas import GeoDataFrame

KEY = "nuclei"


def attach_nuclei(adata: AnnData, nuclei: GeoDataFrame) -> None:
    """Store polygons as flat arrays in `uns["nuclei"]`, which every writer of AnnData understands.

    Parameters
    ----------
    adata
        The prediction; changed in place.
    nuclei
        Polygons in full-resolution pixels with `cell_id`, `area_um2` and `score`.
    """
    _, xy, (rings, polygons) = shapely.to_ragged_array(nuclei.geometry.to_numpy())
    adata.uns[KEY] = {
        "cell_id": nuclei["cell_id"].to_numpy(dtype=object).astype(str),
        "area_um2": nuclei["area_um2"].to_numpy(dtype=float),
        "score": nuclei["score"].to_numpy(dtype=float),
        "xy": xy,
        "rings": rings,
        "polygons": polygons,
    }


def nuclei_of(adata: AnnData, path: Path | str | None = None) -> GeoDataFrame:
    """The polygons of a prediction's nuclei, in the same order.

    Parameters
    ----------
    adata
        A prediction, or a subset of one.
    path
        The file it was read from, if that is known; `<name>.nuclei.parquet` is next to it.

    Raises
    ------
    InputError
        If the prediction has no polygons, or lacks those of some nuclei.

    Examples
    --------
    >>> import prts
    >>> adata = prts.Model.load(demo_model).predict(demo_slide, nuclei="watershed")
    >>> prts.nuclei_of(adata[:5]).geom_type.unique().tolist()
    ['Polygon']
    """
    if KEY in adata.uns:
        nuclei = _from_arrays(adata)
    else:
        path = path or adata.filename
        if path is None:
            raise InputError(
                "nuclei: this prediction contains no polygons; give the GeoDataFrame or file it was made from"
            )
        nuclei = load_nuclei(nuclei_path(Path(path)))
    rows = pd.Index(nuclei["cell_id"]).get_indexer(adata.obs_names)
    if (rows < 0).any():
        missing = adata.obs_names[rows < 0]
        raise InputError(
            f"nuclei: no polygon for {missing[0]!r} and {len(missing) - 1} more; give the file that was predicted"
        )
    return nuclei.iloc[rows].reset_index(drop=True)


def _from_arrays(adata: AnnData) -> GeoDataFrame:
    import geopandas as gpd

    stored = adata.uns[KEY]
    try:
        offsets = (np.asarray(stored["rings"]), np.asarray(stored["polygons"]))
        shapes = shapely.from_ragged_array(shapely.GeometryType.POLYGON, np.asarray(stored["xy"]), offsets)
        columns = {name: np.asarray(stored[name]) for name in ("cell_id", "area_um2", "score")}
        frame = gpd.GeoDataFrame(columns, geometry=shapes)
    except (LookupError, TypeError, ValueError) as error:
        raise InputError(f"uns[{KEY!r}]: not as prts writes it ({error}); predict again") from error
    return frame[["cell_id", "geometry", "area_um2", "score"]]
