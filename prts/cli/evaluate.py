"""Score a prediction against a section's measured counts, and its measured spots if it has any.

usage: prts evaluate prediction=FILE.h5ad section=DIR out=DIR

The section's bins are summed inside the prediction's own nuclei (FILE.nuclei.parquet); those that pass quality control are
compared. Writes DIR/metrics.json and DIR/per_gene.csv, with the figures of a training run's test under the same names, but for
baselines and those over the most variable genes, which need the training nuclei.

example: prts evaluate prediction=slide.h5ad section=data/lung/lung2 out=evaluation
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prts.cli.app import plain, require
from prts.errors import InputError

if TYPE_CHECKING:
    from omegaconf import DictConfig

logger = logging.getLogger(__name__)


def main(cfg: DictConfig) -> None:
    """Count, match, evaluate, write."""
    from prts.evaluation.matching import match
    from prts.evaluation.section_scores import PredictedCounts, score_section
    from prts.evaluation.settings import EvaluationSettings
    from prts.evaluation.spot_scores import spot_pcc
    from prts.evaluation.summaries import json_ready
    from prts.io.cache import atomic
    from prts.io.limits import allow_pixels
    from prts.io.mpp import require_agreement
    from prts.io.nuclei import load_nuclei
    from prts.io.prediction import nuclei_path, read_prediction
    from prts.io.spots import read_spots
    from prts.platforms.bin_positions import read_positions
    from prts.preprocess.counts import count_nuclei, quality_control
    from prts.preprocess.register import corrected, measure_section
    from prts.section import open_section_folder

    require(cfg, "prediction", "section", "out")
    out = Path(cfg.out)
    if out.exists() and not out.is_dir():
        raise InputError(f"out={out}: is a file; name a folder for metrics.json and per_gene.csv")
    allow_pixels(cfg.max_pixels)
    prediction = read_prediction(Path(cfg.prediction))
    section = open_section_folder(Path(cfg.section))
    if section.bins is None:
        raise InputError(
            f"section={cfg.section}: has no binned_outputs/square_002um, so there is nothing to compare with"
        )
    about = prediction.uns["prts"]
    missing = [key for key in ("width", "height", "mpp", "species", "threshold", "qc") if key not in about]
    if missing:
        raise InputError(
            f"prediction={cfg.prediction}: lacks uns['prts'][{missing[0]!r}]; predict again with this prts"
        )
    if (about["width"], about["height"]) != (section.width, section.height):
        raise InputError(
            f"section={cfg.section}: its image is {section.width} x {section.height} px, the prediction's was "
            f"{about['width']} x {about['height']}; give the section that was predicted"
        )
    require_agreement(section.image, [("the prediction", float(about["mpp"])), (section.mpp_source, section.mpp)])
    nuclei = load_nuclei(nuclei_path(Path(cfg.prediction)))
    grid = None
    if cfg.preprocess.register:
        found = measure_section(section.bins, nuclei, section.mpp)
        logger.info("%s: %s", section.name, found.sentence())
        grid = corrected(read_positions(section.bins), found, section.mpp)
    counts = count_nuclei(section.bins, nuclei, species=str(about["species"]), grid=grid)
    # as in training, unless another is asked for; what is not limited is not stored
    qc: dict[str, Any] = dict(about["qc"]) if cfg.get("qc") is None else plain(cfg.qc)
    counts = quality_control(counts, mpp=section.mpp, **qc)
    matched = match(prediction, counts, mpp=section.mpp)
    result = score_section(
        matched.measured,
        PredictedCounts(matched.predicted, matched.genes, matched.prob, float(about["threshold"])),
        xy_um=matched.xy_px * section.mpp,
        settings=EvaluationSettings(**cfg.evaluation),
    )
    summary = dict(result.summary)
    if section.spots is not None:
        spots, ids = read_spots(section.spots), prediction.var["gene_id"].astype(str).tolist()
        summary["spot_pcc_mean"], _ = spot_pcc(matched.predicted, matched.xy_px, spots, matched.genes, ids)
        # a spot also holds nuclei that measured too few UMIs to be compared one by one
        centres = prediction.obsm["spatial"]
        summary["spot_pcc_mean_all_nuclei"], _ = spot_pcc(prediction.X, centres, spots, matched.genes, ids)

    with atomic(out / "metrics.json") as path:
        figures = json_ready({f"test/{key}": value for key, value in summary.items()})
        path.write_text(json.dumps(figures, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    with atomic(out / "per_gene.csv") as path:
        result.per_gene.to_csv(path, index=False)
    logger.info(
        "%d nuclei x %d genes: PCC %.3f (ceiling %.3f), see %s",
        summary["n_cells"], summary["n_genes"], summary["pcc_mean"], summary["ceiling_mean"], out,
    )  # fmt: skip
