"""Export a prediction to SpatialData, QuPath GeoJSON, Parquet or CSV.

usage: prts export prediction=FILE.h5ad format=spatialdata|geojson|parquet|csv out=PATH [genes=[A,B]] [image=FILE]
                   [analysis=FILE.h5ad] [classification=COLUMN] [overwrite=true]

spatialdata   a zarr folder: image pyramid `he`, shapes `nuclei`, table `prediction`, in px (`global`) and um (`um`)
geojson       detections for QuPath 0.4 or newer, with classification and measurements; id and name are the cell_id
parquet, csv  a table: cell_id, x, y (full-resolution px), the columns of obs, and the expected UMI of each gene

Polygons are read from FILE.nuclei.parquet next to FILE.h5ad. All genes are written, except that GeoJSON contains the 20 with the highest
validation PCC unless `genes` is given. With `analysis`, the clusters, cell types and scores of `prts analyze` are exported, too; GeoJSON
classifies nuclei by cell type, else by cluster, unless `classification` names another column. Without `image`, SpatialData uses the
predicted image if it is still where it was relative to FILE.h5ad, or next to it, else the thumbnail in FILE.h5ad.

example: prts export prediction=slide.h5ad format=geojson genes=[EPCAM,CD3E] out=slide.geojson
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from prts.cli.app import require

if TYPE_CHECKING:
    from omegaconf import DictConfig


def main(cfg: DictConfig) -> None:
    """Export a prediction."""
    require(cfg, "prediction", "format", "out")

    from prts.export.pipeline import export_prediction
    from prts.io.limits import allow_pixels

    allow_pixels(cfg.max_pixels)
    export_prediction(
        cfg.prediction,
        cfg.out,
        format=cfg.format,
        genes=cfg.genes,
        image=cfg.image,
        analysis=cfg.analysis,
        classification=cfg.classification,
        overwrite=cfg.overwrite,
    )
