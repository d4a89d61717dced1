"""The figures of a training run, and those of any prediction."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import scipy.sparse as sp
from scipy.spatial import cKDTree

from prts.errors import InputError
from prts.io.slide import open_slide
from prts.report.figures import pcc_vs_ceiling, training_curves
from prts.report.figures_calibration import calibration
from prts.report.figures_canvas import Nuclei, read_picture
from prts.report.figures_maps import MapRow, gene_rows, region_views, tissue_maps

if TYPE_CHECKING:
    import anndata as ad
    from numpy.typing import NDArray

    from prts.evaluation.scored_section import ScoredSection
    from prts.io.slide import Slide
    from prts.preprocess.panel import Panel

_N_MAPS = 4
_N_REGION = 3
_CANDIDATES = 200
_ALIKE = 0.2
_REGION_UM = 250.0
_SQUARES = 500  # that are looked at, around as many nuclei
_FULL = 0.7  # of the nuclei of the fullest square


@dataclass(frozen=True)
class Region:
    """What is drawn large beside the maps of the whole section.

    Attributes
    ----------
    box_px
        x0, y0, x1, y1 in full-resolution px; None: a square with much to see.
    second
        A second image of the section's field of view, such as registered IHC, shown beside the region.
    genes
        Shown in all maps before those of highest rank.
    """

    box_px: tuple[float, ...] | None = None
    second: Path | None = None
    genes: Sequence[str] = ()


def run_figures(
    folder: Path,
    scored: ScoredSection,
    panel: Panel,
    *,
    outlines: NDArray[Any],
    curves: Path | None,
    best_epoch: int | None = None,
    suffix: str = "",
    region: Region | None = None,
) -> None:
    """Maps of genes, of a region and of totals, calibration, PCC against ceiling, and training curves, each as PNG and PDF.

    Parameters
    ----------
    folder
        Where the files go.
    scored
        Prediction and evaluation of a section.
    panel
        Names of the genes.
    outlines
        (n,) polygons of the nuclei that were scored, full-resolution px.
    curves
        What Lightning's CSV logger wrote, or None.
    best_epoch
        The epoch whose weights were kept, marked in the curves; None marks none.
    suffix
        Of the file names, where a run tests several sections.
    region
        What is drawn large.
    """
    table = scored.result.per_gene
    counts = scored.nuclei.counts
    nuclei = Nuclei(scored.nuclei.xy_um / scored.section.mpp, scored.section.mpp, outlines)
    pcc = table["pcc"].to_numpy()
    with scored.section.open_slide() as slide:
        map_figures(
            folder,
            slide,
            nuclei,
            panel.genes,
            scored.umi,
            scored.prob,
            rank=pcc,
            measured=counts,
            pcc=pcc,
            suffix=suffix,
            region=region,
        )
    calibration(_both(folder, f"calibration{suffix}"), counts, scored.umi, scored.prob)
    pcc_vs_ceiling(table, _both(folder, f"pcc_vs_ceiling{suffix}"))
    if curves is not None and curves.is_file():
        training_curves(curves, _both(folder, "training"), best_epoch=best_epoch)


def prediction_figures(
    folder: Path,
    prediction: ad.AnnData,
    image: Path,
    outlines: NDArray[Any],
    *,
    region: Region | None = None,
) -> None:
    """The maps of a prediction of which nothing was measured: genes by the PCC that the model had on validation.

    Parameters
    ----------
    folder
        Where the files go.
    prediction
        Of `prts predict`.
    image
        Its full-resolution image.
    outlines
        (n,) polygons of its nuclei, full-resolution px.
    region
        What is drawn large.
    """
    mpp = float(prediction.uns["prts"]["mpp"])
    nuclei = Nuclei(np.asarray(prediction.obsm["spatial"], dtype=np.float64), mpp, outlines)
    rank = np.asarray(prediction.var["val_pcc"], dtype=np.float64)
    genes = list(prediction.var_names)
    with open_slide(image, mpp=mpp) as slide:
        map_figures(
            folder, slide, nuclei, genes, prediction.X, np.asarray(prediction.layers["prob"]), rank=rank, region=region
        )


def map_figures(
    folder: Path,
    slide: Slide,
    nuclei: Nuclei,
    genes: Sequence[str],
    umi: NDArray[np.float32] | sp.csr_matrix,
    prob: NDArray[np.float32],
    *,
    rank: NDArray[np.float64],
    measured: sp.csr_matrix | None = None,
    pcc: NDArray[np.float64] | None = None,
    suffix: str = "",
    region: Region | None = None,
) -> None:
    """Write `gene_maps`, `region` and `qc_maps`, each as PNG and PDF; with measured counts beside the prediction where there are any.

    Parameters
    ----------
    folder
        Where the files go.
    slide
        The H&E.
    nuclei
        (n,) their places.
    genes
        (g,) names.
    umi, prob
        (n, g) predicted UMI and P(expressed).
    rank
        (g,) what genes are chosen by, such as their PCC on validation: the highest of which no two follow the same pattern.
    measured
        (n, g) counts of the same nuclei and genes, or None.
    pcc
        (g,) to be written into the maps, or None.
    suffix
        Of the file names.
    region
        What is drawn large, and genes to show.

    Raises
    ------
    InputError
        If the region or a gene is not there, or the second image shows another field of view.
    """
    region = region or Region()
    named = pd.Index(genes).get_indexer(pd.Index(region.genes, dtype=object))
    if (named < 0).any():
        raise InputError(f"genes: the prediction has no gene {region.genes[int((named < 0).argmax())]!r}")
    best = best_and_different(np.nan_to_num(rank, nan=-1), umi if measured is None else measured)
    best = np.array(list(dict.fromkeys([*named.tolist(), *best.tolist()]))[: max(_N_MAPS, len(named))])
    rows = gene_rows(
        [genes[gene] for gene in best],
        np.log1p(_columns(umi, best)),
        None if measured is None else np.log1p(_columns(measured, best)),
        None if pcc is None else pcc[best].tolist(),
    )
    box = region.box_px or telling_region(nuclei, np.column_stack([row.predicted for row in rows]))
    second = None if region.second is None else (region.second.stem, region.second)
    large = rows[: max(_N_REGION, len(named))]
    region_views(_both(folder, f"region{suffix}"), large, slide=slide, nuclei=nuclei, box_px=box, second=second)
    whole = read_picture(slide)
    tissue_maps(_both(folder, f"gene_maps{suffix}"), rows, nuclei=nuclei, picture=whole)
    tissue_maps(_both(folder, f"qc_maps{suffix}"), _quality(umi, prob, measured), nuclei=nuclei, picture=whole)


def telling_region(nuclei: Nuclei, values: NDArray[np.float64], side_um: float = _REGION_UM) -> tuple[float, ...]:
    """The square with much to see: of those with nearly as many nuclei as the fullest, the one where values vary most.

    Parameters
    ----------
    nuclei
        Of the section.
    values
        (n, k) of each nucleus, as in the maps.
    side_um
        Of the square.

    Returns
    -------
    x0, y0, x1, y1 in full-resolution px.
    """
    half = side_um / nuclei.mpp / 2
    xy = nuclei.xy_px
    centres = xy[:: -(-len(xy) // _SQUARES)]
    pairs = cKDTree(centres).sparse_distance_matrix(cKDTree(xy), half, p=np.inf, output_type="ndarray")
    inside = sp.csr_matrix((np.ones(len(pairs)), (pairs["i"], pairs["j"])), shape=(len(centres), len(xy)))
    n = inside.sum(axis=1).A1
    spread = values.std(axis=0)
    scaled = (values - values.mean(axis=0)) / np.where(spread > 0, spread, 1)
    variance = ((inside @ scaled**2).T / n - ((inside @ scaled).T / n) ** 2).sum(axis=0)
    x, y = centres[np.where(n >= _FULL * n.max(), variance, -1).argmax()].tolist()
    return x - half, y - half, x + half, y + half


def best_and_different(rank: NDArray[np.float64], values: NDArray[Any] | sp.csr_matrix) -> NDArray[np.intp]:
    """The genes of highest rank of which no two follow the same pattern: four markers of one cell type would be one map four times."""
    ranked = rank.argsort()[::-1][:_CANDIDATES]
    alike = np.nan_to_num(np.atleast_2d(np.corrcoef(np.log1p(_columns(values, ranked)), rowvar=False)))
    chosen: list[int] = []
    for i in range(len(ranked)):
        if all(alike[i, j] < _ALIKE for j in chosen):
            chosen.append(i)
    # where fewer patterns than maps are there, the best of the rest
    chosen += [i for i in range(len(ranked)) if i not in chosen]
    return np.asarray(ranked[chosen[:_N_MAPS]])


def _quality(
    umi: NDArray[np.float32] | sp.csr_matrix, prob: NDArray[np.float32], measured: sp.csr_matrix | None
) -> list[MapRow]:
    """Total UMI and number of genes of each nucleus; of the prediction, the number that P(expressed) lets expect."""
    units = f"UMI (panel of {umi.shape[1]:,})", f"genes with UMI (of {umi.shape[1]:,})"
    predicted = np.asarray(umi.sum(axis=1)).ravel(), prob.sum(axis=1)
    counted: tuple[Any, Any] = (None, None)
    if measured is not None:
        counted = np.asarray(measured.sum(axis=1)).ravel(), np.asarray((measured > 0).sum(axis=1)).ravel()
    names = "Total counts", "Number of genes"
    return [MapRow(*row, gene=False) for row in zip(names, units, predicted, counted, strict=True)]


def _columns(values: NDArray[Any] | sp.csr_matrix, columns: NDArray[np.intp]) -> NDArray[Any]:
    chosen = values[:, columns]
    return np.asarray(chosen.toarray() if hasattr(chosen, "toarray") else chosen)


def _both(folder: Path, name: str) -> list[Path]:
    return [folder / f"{name}.png", folder / f"{name}.pdf"]
