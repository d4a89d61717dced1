"""Write a prediction as a SpatialData zarr: image pyramid, shapes of the nuclei, and the table that annotates them."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import scipy.sparse as sp

from prts.errors import InputError, ParameterError
from prts.export.source import by_rows
from prts.extras import install_command
from prts.io.cache import atomic
from prts.io.slide import Slide, open_slide

if TYPE_CHECKING:
    import anndata as ad
    from numpy.typing import NDArray

    from prts.export.source import PredictionFile

logger = logging.getLogger(__name__)

_BLOCK_PX = 1024
_ROWS = 1024
_SMALLEST_PX = 512


def find_image(prediction: PredictionFile, image: Path | None) -> Path | None:
    """The full-resolution image: the given one, else the predicted one if it is where it was, or next to the prediction, else None.

    Raises
    ------
    InputError
        If the given image does not have the size of the image that was predicted.
    """
    about = prediction.uns["prts"]
    known = [str(about[key]) for key in ("image_path", "image") if about.get(key)]
    candidates = [prediction.path.parent / name for name in known] if image is None else [image]
    for path in candidates:
        if image is None and not path.exists():
            continue
        with open_slide(path, mpp=float(about["mpp"])) as slide:
            if (slide.width, slide.height) == (about["width"], about["height"]):
                return path
            if image is not None:
                raise InputError(
                    f"{path}: is {slide.width} x {slide.height} px, but the predicted image was {about['width']} x {about['height']} px; "
                    "give the image that was predicted"
                )
    return None


def write_spatialdata(
    prediction: PredictionFile, columns: NDArray[np.intp], out: Path, image: Path | None = None
) -> None:
    """Write `images/he`, `shapes/nuclei` and `tables/prediction` in the coordinate systems `global` (px) and `um`.

    Without the full-resolution image, `he` is the small picture in the prediction, scaled to the same coordinates.

    Parameters
    ----------
    prediction
        The prediction, with its polygons next to it.
    columns
        Columns of the genes.
    out
        The zarr folder.
    image
        The full-resolution image.

    Raises
    ------
    InputError
        If spatialdata is not installed.
    """
    try:
        import spatialdata as sd
    except ImportError as error:
        raise ParameterError("", "format", f"spatialdata is not installed; run {install_command('spatial')}") from error
    from spatialdata.models import Image2DModel, ShapesModel, TableModel
    from spatialdata.transformations import Identity, Scale, Sequence

    mpp = float(prediction.uns["prts"]["mpp"])

    def systems(px: float = 1.0) -> dict[str, Any]:
        """Transformations of an element whose pixels are `px` full-resolution pixels wide."""
        to_px = Identity() if px == 1 else Scale([px, px], axes=("x", "y"))
        return {"global": to_px, "um": Sequence([to_px, Scale([mpp, mpp], axes=("x", "y"))])}

    nuclei = prediction.nuclei().set_index("cell_id")
    with warnings.catch_warnings(), atomic(out) as temporary:
        warnings.simplefilter("ignore")  # internals of dask and zarr
        slide = None if image is None else open_slide(image, mpp=mpp)
        try:
            if slide is None:
                picture, px = _small_picture(prediction)
            else:
                picture, px = _lazy_picture(slide), 1.0
            levels = int(np.clip(np.log2(max(picture.shape[1:]) / _SMALLEST_PX), 0, 6))
            he = Image2DModel.parse(
                picture,
                dims=("c", "y", "x"),
                c_coords=["r", "g", "b"],
                scale_factors=[2] * levels or None,
                chunks=(3, _BLOCK_PX, _BLOCK_PX),
                transformations=systems(px),
            )
            table = TableModel.parse(
                _table(prediction, columns), region="nuclei", region_key="region", instance_key="cell_id"
            )
            shapes = ShapesModel.parse(nuclei[["geometry", "area_um2"]], transformations=systems())
            data = sd.SpatialData(images={"he": he}, shapes={"nuclei": shapes}, tables={"prediction": table})
            data.write(temporary)
        finally:
            if slide is not None:
                slide.close()


def _table(prediction: PredictionFile, columns: NDArray[np.intp]) -> ad.AnnData:
    """The prediction as AnnData with dask matrices, read in chunks of rows when they are written."""
    import anndata as ad
    import h5py
    from anndata.experimental import read_elem_lazy

    obs, var = prediction.obs.rename_axis(index=None), prediction.var.iloc[columns]
    width = len(prediction.var)

    def lazy(element: h5py.Group | h5py.Dataset) -> Any:
        stored = by_rows(element)
        if sp.issparse(stored):
            return stored[:, columns]
        matrix = read_elem_lazy(element, chunks=(_ROWS, width))
        if np.array_equal(columns, np.arange(width)):
            return matrix
        chunks = (matrix.chunks[0], (len(columns),))
        return matrix.map_blocks(lambda rows: rows[:, columns], dtype=matrix.dtype, meta=matrix._meta, chunks=chunks)

    with h5py.File(prediction.path) as file:
        umi = lazy(file["X"])
        layers = {name: lazy(layer) for name, layer in file["layers"].items()} if "layers" in file else {}
    obs = obs.assign(cell_id=obs.index.to_numpy(dtype=object), region=pd.Categorical(["nuclei"] * len(obs)))
    return ad.AnnData(
        X=umi,
        obs=obs,
        var=var,
        layers=layers,
        obsm={"spatial": prediction.xy_px},
        uns={"prts": prediction.uns["prts"]},
    )


def _small_picture(prediction: PredictionFile) -> tuple[NDArray[np.uint8], float]:
    """The picture in `uns["spatial"]`, (3, height, width), and the size of its pixels in full-resolution pixels."""
    library = next(iter(prediction.uns["spatial"].values()))
    picture = np.asarray(library["images"]["hires"], dtype=np.uint8)
    return np.moveaxis(picture, -1, 0), 1 / float(library["scalefactors"]["tissue_hires_scalef"])


def _lazy_picture(slide: Slide) -> Any:
    """The slide as a lazy dask array of uint8, (3, height, width)."""
    import dask.array as da

    def read(block_info: dict[Any, Any]) -> NDArray[np.uint8]:
        (_, _), (y0, y1), (x0, x1) = block_info[None]["array-location"]
        return np.moveaxis(slide.read_region(x0, y0, x1 - x0, y1 - y0), -1, 0)

    def parts(length: int) -> tuple[int, ...]:
        whole, rest = divmod(length, _BLOCK_PX)
        return (_BLOCK_PX,) * whole + ((rest,) if rest else ())

    return da.map_blocks(  # type: ignore[no-untyped-call]
        read, dtype=np.uint8, chunks=((3,), parts(slide.height), parts(slide.width)), meta=np.empty((0, 0, 0), np.uint8)
    )
