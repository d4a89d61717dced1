"""The figures of a training run."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from prts.report.figures import gene_maps, pcc_vs_ceiling, training_curves

if TYPE_CHECKING:
    from prts.models.scoring import Scored
    from prts.preprocess.panel import Panel

_N_MAPS = 4
_THUMBNAIL_PX = 2000


def run_figures(folder: Path, scored: Scored, panel: Panel, *, curves: Path | None, suffix: str = "") -> None:
    """Maps of the best-predicted genes, PCC against ceiling, and training curves.

    Parameters
    ----------
    folder
        Where the PNG files go.
    scored
        Prediction and evaluation of a section.
    panel
        Names of the genes.
    curves
        What Lightning's CSV logger wrote, or None.
    suffix
        Of the file names, where a run tests several sections.
    """
    table = scored.result.per_gene
    best = table["pcc"].fillna(-1).to_numpy().argsort()[::-1][:_N_MAPS]
    with scored.section.open_slide() as slide:
        image = slide.thumbnail(_THUMBNAIL_PX)
    gene_maps(
        folder / f"gene_maps{suffix}.png",
        image=image,
        image_width_px=scored.section.width,
        mpp=scored.section.mpp,
        genes=[panel.genes[gene] for gene in best],
        xy_px=scored.nuclei.xy_um / scored.section.mpp,
        measured=np.log1p(scored.nuclei.counts[:, best].toarray()),
        predicted=np.log1p(scored.umi[:, best]),
        pcc=table["pcc"].to_numpy()[best].tolist(),
    )
    pcc_vs_ceiling(table, folder / f"pcc_vs_ceiling{suffix}.png")
    if curves is not None and curves.is_file():
        training_curves(curves, folder / "training.png")
