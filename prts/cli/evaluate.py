"""Score a prediction against a section's measured counts, and its measured spots if it has any.

usage: prts evaluate prediction=FILE.h5ad section=DIR out=DIR [bundle=DIR]

Sums the section's counts inside the predicted nuclei (FILE.nuclei.parquet) and compares the nuclei that pass quality control. Writes
DIR/metrics.json and DIR/per_gene.csv with the same names as a training run. bundle=DIR adds the model's baselines. Scores over the most
variable genes are missing, since they need the training nuclei.

example: prts evaluate prediction=slide.h5ad section=data/lung/lung2 out=evaluation
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING

from prts.cli.app import plain, require
from prts.errors import InputError
from prts.progress import working

if TYPE_CHECKING:
    from omegaconf import DictConfig

logger = logging.getLogger(__name__)


def main(cfg: DictConfig) -> None:
    """Score a prediction and write the scores."""
    require(cfg, "prediction", "section", "out")
    from prts.api.evaluate import evaluate
    from prts.api.model import Model
    from prts.api.polygons import nuclei_of
    from prts.evaluation.settings import EvaluationSettings
    from prts.io.prediction import read_prediction
    from prts.preprocess.counts import QCSettings
    from prts.section import open_section_folder

    out = Path(cfg.out)
    if out.exists() and not out.is_dir():
        raise InputError(f"{out}: is a file; name a folder for metrics.json and per_gene.csv")
    file = Path(cfg.prediction)
    prediction = read_prediction(file)
    with working("scores"):
        scores = evaluate(
            prediction,
            open_section_folder(Path(cfg.section), max_pixels=cfg.max_pixels),
            nuclei=nuclei_of(prediction, file),
            model=None if cfg.bundle is None else Model.load(cfg.bundle),
            qc=None if cfg.get("qc") is None else QCSettings(**plain(cfg.qc)),
            register=cfg.preprocess.register,
            settings=EvaluationSettings(**plain(cfg.evaluation)),
        )
    scores.write(out)
    for line in str(scores).splitlines():
        logger.info("%s", line)
    logger.info("wrote %s", out)
