"""Draw figures for a run or a prediction, and write report.html, an interactive page that works offline.

usage: prts report run=DIR [out=DIR]
       prts report prediction=FILE.h5ad image=FILE [section=DIR] [analysis=FILE.h5ad] out=DIR

Writes OUT/report.html (for runs with several test sections also report-<section>.html) and OUT/figures as PNG and PDF. For a run, `out` is
the run folder by default.
section=DIR is the folder of the predicted section with its bins. The page and figures then show scores and measured counts as well.
analysis=FILE (from `prts analyze`) adds its clusters and cell types to the map.
genes= chooses the genes on the map: a number, or names such as [Plp1,Ttr], which are listed first, also in the figures.
region=[x0,y0,x1,y1] in full-resolution px is enlarged in the figures. second=FILE shows another image with the same field of view, such as
registered IHC, next to it.

example: prts report run=outputs/demo/make
example: prts report prediction=slide.h5ad image=slide.svs out=report
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from prts.cli.app import plain, require
from prts.errors import InputError
from prts.progress import working

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from prts.report.pipeline import ReportSettings


def main(cfg: DictConfig) -> None:
    """Report the run or the prediction."""
    if (cfg.run is None) == (cfg.prediction is None):
        raise InputError(
            "run, prediction: give either run=DIR of `prts train` or prediction=FILE.h5ad of `prts predict`"
        )
    given = [key for key in ("image", "section", "analysis") if cfg[key] is not None]
    if cfg.run is not None and given:
        raise InputError(f"{given[0]}: only applies to prediction=FILE; a run knows its own")
    if cfg.run is None:
        require(cfg, "image", "out")

    from prts.io.limits import allow_pixels
    from prts.report.pipeline import report_prediction, report_run

    allow_pixels(cfg.max_pixels)
    settings = _settings(cfg)
    with working("report"):
        if cfg.run is not None:
            report_run(cfg.run, cfg.out, settings=settings)
        else:
            report_prediction(
                cfg.prediction, cfg.image, cfg.out, section=cfg.section, analysis=cfg.analysis, settings=settings
            )


def _settings(cfg: DictConfig) -> ReportSettings:
    from prts.evaluation.settings import EvaluationSettings
    from prts.report.pipeline import ReportSettings

    return ReportSettings(
        genes=_genes(cfg.genes),
        box_px=None if cfg.region is None else list(cfg.region),
        second=None if cfg.second is None else Path(cfg.second),
        evaluation=EvaluationSettings(**plain(cfg.evaluation)),
    )


def _genes(value: object) -> int | list[str] | None:
    """`genes` as a number or names."""
    from omegaconf import ListConfig

    if value is None or isinstance(value, int):
        return value
    return [str(gene) for gene in value] if isinstance(value, ListConfig) else [str(value)]
