"""The figures of a training run."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from prts.report.figures import gene_maps, pcc_vs_ceiling, training_curves

if TYPE_CHECKING:
    import scipy.sparse as sp
    from numpy.typing import NDArray

    from prts.models.scoring import Scored
    from prts.preprocess.panel import Panel

_N_MAPS = 4
_CANDIDATES = 200
_ALIKE = 0.2
_THUMBNAIL_PX = 2000


def run_figures(
    folder: Path,
    scored: Scored,
    panel: Panel,
    *,
    curves: Path | None,
    best_epoch: int | None = None,
    suffix: str = "",
) -> None:
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
    best_epoch
        The epoch whose weights were kept, marked in the curves; None marks none.
    suffix
        Of the file names, where a run tests several sections.
    """
    table = scored.result.per_gene
    best = _best_and_different(table["pcc"].fillna(-1).to_numpy(), scored.nuclei.counts)
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
        training_curves(curves, folder / "training.png", best_epoch=best_epoch)


def _best_and_different(pcc: NDArray[np.float64], counts: sp.csr_matrix) -> NDArray[np.intp]:
    """The best-predicted genes of which no two follow the same pattern: four markers of one cell type would be one map four times."""
    ranked = pcc.argsort()[::-1][:_CANDIDATES]
    alike = np.nan_to_num(np.corrcoef(np.log1p(counts[:, ranked].toarray()), rowvar=False))
    chosen: list[int] = []
    for i in range(len(ranked)):
        if all(alike[i, j] < _ALIKE for j in chosen):
            chosen.append(i)
    # where fewer patterns than maps are there, the best of the rest
    chosen += [i for i in range(len(ranked)) if i not in chosen]
    return ranked[chosen[:_N_MAPS]]
