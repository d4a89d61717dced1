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
from typing import TYPE_CHECKING

from prts.cli.app import plain, require
from prts.errors import InputError

if TYPE_CHECKING:
    from omegaconf import DictConfig

logger = logging.getLogger(__name__)


def main(cfg: DictConfig) -> None:
    """Count, match, evaluate, write."""
    from prts.evaluation.measured import measure_predicted
    from prts.evaluation.section_scores import evaluate_section, spot_pcc
    from prts.evaluation.summaries import json_ready
    from prts.io.cache import atomic
    from prts.io.limits import allow_pixels
    from prts.io.nuclei import load_nuclei
    from prts.io.prediction import nuclei_path, read_prediction
    from prts.io.spots import read_spots
    from prts.preprocess.counts import QCSettings
    from prts.section import open_section_folder

    require(cfg, "prediction", "section", "out")
    out = Path(cfg.out)
    if out.exists() and not out.is_dir():
        raise InputError(f"out={out}: is a file; name a folder for metrics.json and per_gene.csv")
    allow_pixels(cfg.max_pixels)
    prediction = read_prediction(Path(cfg.prediction))
    section = open_section_folder(Path(cfg.section))
    if "threshold" not in prediction.uns["prts"]:
        raise InputError(f"prediction={cfg.prediction}: lacks uns['prts']['threshold']; predict again with this prts")
    matched = measure_predicted(
        prediction,
        load_nuclei(nuclei_path(Path(cfg.prediction))),
        section,
        qc=None if cfg.get("qc") is None else QCSettings(**plain(cfg.qc)),
        register=cfg.preprocess.register,
    ).matched
    result = evaluate_section(
        matched.measured,
        matched.predicted,
        matched.prob,
        genes=matched.genes,
        threshold=float(prediction.uns["prts"]["threshold"]),
        xy_um=matched.xy_px * section.mpp,
        block_um=cfg.evaluation.block_um,
        n_replicates=cfg.evaluation.bootstrap,
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
