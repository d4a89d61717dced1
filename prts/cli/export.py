"""Write a prediction as SpatialData, QuPath GeoJSON, Parquet or CSV.

usage: prts export prediction=FILE.h5ad format=spatialdata|geojson|parquet|csv out=PATH [genes=[A,B]] [image=FILE]
                   [classification=COLUMN] [overwrite=true]

spatialdata   a zarr folder: image pyramid `he`, shapes `nuclei`, table `prediction`, in px (`global`) and um (`um`)
geojson       detections for QuPath 0.4 or newer, classified, with measurements; id and name are the cell_id
parquet, csv  a table: cell_id, x, y (full-resolution px), the columns of obs, expected UMI of each gene

Polygons come from FILE.nuclei.parquet beside FILE.h5ad. All genes are written; into GeoJSON, the 20 with the highest
validation PCC unless `genes=` names others. The image is `image=`, else the one that the prediction names if it lies beside it,
else the small picture that the prediction holds.

example: prts export prediction=slide.h5ad format=geojson genes=[EPCAM,CD3E] out=slide.geojson
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING

from prts.cli.app import require
from prts.errors import InputError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from omegaconf import DictConfig

    from prts.export.source import PredictionFile

logger = logging.getLogger(__name__)

_N_MEASUREMENTS = 20


def main(cfg: DictConfig) -> None:
    """Check, read, write."""
    from prts.export.geojson import class_column, write_geojson
    from prts.export.source import open_prediction
    from prts.export.spatial import find_image, write_spatialdata
    from prts.export.tables import write_csv, write_parquet
    from prts.io.limits import allow_pixels

    require(cfg, "prediction", "format", "out")
    out = _check_out(Path(cfg.out), folder=cfg.format == "spatialdata", overwrite=cfg.overwrite)
    allow_pixels(cfg.max_pixels)
    prediction = open_prediction(Path(cfg.prediction))
    columns = _genes(prediction, cfg)
    if cfg.format == "spatialdata":
        image = find_image(prediction, None if cfg.image is None else Path(cfg.image))
        if image is None:
            logger.info("the full-resolution image is not at hand (image=FILE): its small picture is exported")
        write_spatialdata(prediction, columns, out, image)
    elif cfg.format == "geojson":
        write_geojson(prediction, columns, out, class_column(prediction, cfg.classification))
    else:
        (write_csv if cfg.format == "csv" else write_parquet)(prediction, columns, out)
    logger.info("wrote %s: %d nuclei x %d genes", out, len(prediction.obs), len(columns))


def _check_out(out: Path, *, folder: bool, overwrite: bool) -> Path:
    """The place to write to, before any work goes into it."""
    if not out.parent.is_dir():
        raise InputError(f"out={out}: the folder {out.parent} does not exist; make it, or choose another")
    if out.exists() and not overwrite:
        raise InputError(f"out={out}: exists; choose another name, or replace it with overwrite=true")
    if out.is_dir() and not (folder and any((out / name).is_file() for name in ("zarr.json", ".zgroup"))):
        raise InputError(f"out={out}: is a folder that is no zarr; choose another name")
    if folder and out.is_file():
        raise InputError(f"out={out}: is a file; format=spatialdata writes a folder, choose another name")
    return out


def _genes(prediction: PredictionFile, cfg: DictConfig) -> NDArray[np.intp]:
    import numpy as np

    if cfg.genes is not None:
        wanted = [cfg.genes] if isinstance(cfg.genes, str) else [str(gene) for gene in cfg.genes]
        return prediction.genes_at(list(dict.fromkeys(wanted)))
    if cfg.format == "geojson" and "val_pcc" in prediction.var:
        return np.argsort(-prediction.var["val_pcc"].fillna(-1).to_numpy(), kind="stable")[:_N_MEASUREMENTS]
    return np.arange(len(prediction.var))
