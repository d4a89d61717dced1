"""Draw the figures of a run or a prediction, and report.html: the prediction on its tissue in one file that needs no network.

usage: prts report run=DIR [out=DIR]
       prts report prediction=FILE.h5ad image=FILE [section=DIR] [analysis=FILE.h5ad] out=DIR

Writes DIR/report.html (with several test sections, report-<section>.html of the further ones) and DIR/figures, each as PNG and PDF. Of a
run, `out` is its own folder unless told. `section=` is the folder of the predicted section with its bins: page and figures then show
measured beside predicted, and scores. `analysis=` (of `prts analyze`) adds its clusters and types to the map. `genes=` says which genes the
map can show: a number, or names as [Plp1,Ttr], which come before the best predicted, there and in the figures. `region=[x0,y0,x1,y1]` in
full-resolution px chooses the region that the figures show large; `second=FILE`, an image of the same field of view such as registered IHC,
stands beside it.

example: prts report run=outputs/demo/make
example: prts report prediction=slide.h5ad image=slide.svs out=report
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prts.cli.app import require
from prts.errors import InputError

if TYPE_CHECKING:
    from omegaconf import DictConfig

logger = logging.getLogger(__name__)


def main(cfg: DictConfig) -> None:
    """Read, draw, write."""
    from prts.evaluation.settings import EvaluationSettings
    from prts.io.limits import allow_pixels
    from prts.io.nuclei import load_nuclei
    from prts.io.prediction import nuclei_path
    from prts.report.html import write_page
    from prts.report.load import of_prediction, of_run
    from prts.report.run import Region, prediction_figures, run_figures

    run, prediction = (None if cfg[key] is None else Path(cfg[key]) for key in ("run", "prediction"))
    if (run is None) == (prediction is None):
        raise InputError(
            "run, prediction: give one of them, run=DIR of `prts train` or prediction=FILE.h5ad of `prts predict`"
        )
    given = [key for key in ("image", "section", "analysis") if cfg[key] is not None]
    if run is not None and given:
        raise InputError(f"{given[0]}: goes with prediction=; a run knows its own")
    if run is None:
        require(cfg, "image", "out")
    allow_pixels(cfg.max_pixels)
    genes = _genes(cfg.genes)
    out = Path(cfg.out) if cfg.out is not None else run
    assert out is not None
    if out.exists() and not out.is_dir():
        raise InputError(f"out={out}: is a file; name a folder for report.html and figures")
    region = Region(
        box_px=_box(cfg.region),
        second=None if cfg.second is None else Path(cfg.second),
        genes=genes if isinstance(genes, list) else (),
    )
    evaluation = EvaluationSettings(**cfg.evaluation)
    if run is not None:
        sources = of_run(run, evaluation)
    else:
        assert prediction is not None
        section, analysis = (None if cfg[key] is None else Path(cfg[key]) for key in ("section", "analysis"))
        sources = [of_prediction(prediction, Path(cfg.image), section, analysis, evaluation)]
    for source in sources:
        outlines = load_nuclei(nuclei_path(source.path)).set_index("cell_id").geometry
        if source.scored is None:
            outlines = outlines.loc[source.page.prediction.obs_names].to_numpy()
            prediction_figures(out / "figures", source.page.prediction, Path(cfg.image), outlines, region=region)
        else:
            curves = None if run is None else run / "csv" / "metrics.csv"
            run_figures(
                out / "figures",
                source.scored,
                source.panel,
                outlines=outlines.loc[source.scored.nuclei.cell_id].to_numpy(),
                curves=curves,
                suffix=source.suffix,
                region=region,
            )
        write_page(out / f"report{source.suffix}.html", source.page, genes=genes)


def _box(value: Any) -> tuple[float, ...] | None:
    """`region` as x0, y0, x1, y1."""
    if value is None:
        return None
    try:
        x0, y0, x1, y1 = (float(edge) for edge in value)
    except (TypeError, ValueError) as error:
        raise InputError(f"region={value}: four numbers are needed, [x0,y0,x1,y1] in full-resolution px") from error
    return x0, y0, x1, y1


def _genes(value: object) -> int | list[str] | None:
    """`genes` as a number or names."""
    from omegaconf import ListConfig

    if value is None or isinstance(value, int):
        return value
    return [str(gene) for gene in value] if isinstance(value, ListConfig) else [str(value)]
