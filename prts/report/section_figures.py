"""Figures of one section: maps of genes, of a region and of quality control, calibration, and PCC against the noise ceiling."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import scipy.sparse as sp
from scipy.spatial import cKDTree

from prts.errors import ParameterError, did_you_mean
from prts.io.slide import open_slide
from prts.report.figures import pcc_vs_ceiling
from prts.report.figures_calibration import calibration
from prts.report.figures_canvas import NucleusPositions, read_picture
from prts.report.figures_maps import MapRow, gene_rows, region_views, tissue_maps

if TYPE_CHECKING:
    import anndata as ad
    from numpy.typing import NDArray

    from prts.evaluation.scored_section import ScoredSection
    from prts.io.slide import Slide

_N_MAPS = 4
_N_REGION = 3
_CANDIDATES = 200
_SIMILAR = 0.2
_REGION_UM = 250.0
_SQUARES = 500  # candidate regions, around as many nuclei
_FULL = 0.7  # share of the nuclei in the fullest square


@dataclass(frozen=True)
class Region:
    """What is shown enlarged, in addition to the whole section.

    Attributes
    ----------
    box_px
        x0, y0, x1, y1 in full-resolution pixels; None picks an informative square.
    second
        Another image with the same field of view, such as registered IHC.
    genes
        Genes to show in all maps, before those with the highest rank.
    """

    box_px: Sequence[float] | None = None
    second: Path | None = None
    genes: Sequence[str] = ()


@dataclass(frozen=True)
class MapData:
    """Values of nuclei to draw on maps.

    Attributes
    ----------
    nuclei
        Their positions.
    genes
        Gene names, (n_genes,).
    umi, prob
        Predicted UMI and P(expressed), (n_nuclei, n_genes).
    rank
        Score by which genes are chosen, such as the PCC on validation, (n_genes,).
    measured
        Measured UMI of the same nuclei and genes, or None.
    pcc
        PCC to print on the maps, (n_genes,), or None.
    """

    nuclei: NucleusPositions
    genes: Sequence[str]
    umi: NDArray[np.float32] | sp.csr_matrix
    prob: NDArray[np.float32]
    rank: NDArray[np.float64]
    measured: sp.csr_matrix | None = None
    pcc: NDArray[np.float64] | None = None


def scored_figures(
    folder: Path,
    scored: ScoredSection,
    genes: Sequence[str],
    outlines: NDArray[Any],
    *,
    suffix: str = "",
    region: Region | None = None,
) -> None:
    """Draw all figures of a section with measured counts, as PNG and PDF.

    Parameters
    ----------
    folder
        Output folder.
    scored
        Predicted and measured counts and their scores.
    genes
        Gene names.
    outlines
        Polygons of the nuclei in full-resolution pixels, (n_nuclei,).
    suffix
        Suffix of the file names, for runs with several test sections.
    region
        What to show enlarged.
    """
    table = scored.result.per_gene
    pcc = table["pcc"].to_numpy()
    data = MapData(
        nuclei=NucleusPositions(scored.nuclei.xy_um / scored.section.mpp, scored.section.mpp, outlines),
        genes=genes,
        umi=scored.umi,
        prob=scored.prob,
        rank=pcc,
        measured=scored.nuclei.counts,
        pcc=pcc,
    )
    with scored.section.open_slide() as slide:
        map_figures(folder, slide, data, suffix=suffix, region=region)
    calibration(_png_and_pdf(folder, f"calibration{suffix}"), scored.nuclei.counts, scored.umi, scored.prob)
    pcc_vs_ceiling(table, _png_and_pdf(folder, f"pcc_vs_ceiling{suffix}"))


def prediction_figures(
    folder: Path, prediction: ad.AnnData, image: Path, outlines: NDArray[Any], *, region: Region | None = None
) -> None:
    """Draw the maps of a prediction without measured counts; genes are chosen by their PCC on validation.

    Parameters
    ----------
    folder
        Output folder.
    prediction
        Result of `prts predict`.
    image
        Its full-resolution image.
    outlines
        Polygons of its nuclei in full-resolution pixels, (n_nuclei,).
    region
        What to show enlarged.
    """
    mpp = float(prediction.uns["prts"]["mpp"])
    data = MapData(
        nuclei=NucleusPositions(np.asarray(prediction.obsm["spatial"], dtype=np.float64), mpp, outlines),
        genes=list(prediction.var_names),
        umi=prediction.X,
        prob=np.asarray(prediction.layers["prob"]),
        rank=np.asarray(prediction.var["val_pcc"], dtype=np.float64),
    )
    with open_slide(image, mpp=mpp) as slide:
        map_figures(folder, slide, data, region=region)


def map_figures(folder: Path, slide: Slide, data: MapData, *, suffix: str = "", region: Region | None = None) -> None:
    """Write `gene_maps`, `region` and `qc_maps` as PNG and PDF, with measured next to predicted counts if there are any.

    Parameters
    ----------
    folder
        Output folder.
    slide
        The H&E image.
    data
        What to draw. Genes are those with the highest rank among genes with different patterns.
    suffix
        Suffix of the file names.
    region
        What to show enlarged, and genes to show first.

    Raises
    ------
    InputError
        If the region or a gene does not exist, or the second image has another field of view.
    """
    region = region or Region()
    named = pd.Index(data.genes).get_indexer(pd.Index(region.genes, dtype=object))
    if (named < 0).any():
        unknown = region.genes[int((named < 0).argmax())]
        raise ParameterError("", "genes", f"the prediction has no gene {unknown!r}{did_you_mean(unknown, data.genes)}")
    best = diverse_top_genes(np.nan_to_num(data.rank, nan=-1), data.umi if data.measured is None else data.measured)
    best = np.array(list(dict.fromkeys([*named.tolist(), *best.tolist()]))[: max(_N_MAPS, len(named))])
    rows = gene_rows(
        [data.genes[gene] for gene in best],
        np.log1p(_columns(data.umi, best)),
        None if data.measured is None else np.log1p(_columns(data.measured, best)),
        None if data.pcc is None else data.pcc[best].tolist(),
    )
    box = region.box_px or informative_region(data.nuclei, np.column_stack([row.predicted for row in rows]))
    second = None if region.second is None else (region.second.stem, region.second)
    enlarged = rows[: max(_N_REGION, len(named))]
    files = _png_and_pdf(folder, f"region{suffix}")
    region_views(files, enlarged, slide=slide, nuclei=data.nuclei, box_px=box, second=second)
    whole = read_picture(slide)
    tissue_maps(_png_and_pdf(folder, f"gene_maps{suffix}"), rows, nuclei=data.nuclei, picture=whole)
    tissue_maps(_png_and_pdf(folder, f"qc_maps{suffix}"), _qc_rows(data), nuclei=data.nuclei, picture=whole)


def informative_region(
    nuclei: NucleusPositions, values: NDArray[np.float64], side_um: float = _REGION_UM
) -> tuple[float, ...]:
    """The densely populated square in which the values vary most.

    Parameters
    ----------
    nuclei
        Nuclei of the section.
    values
        Values on the maps, (n_nuclei, n_maps).
    side_um
        Side of the square, um.

    Returns
    -------
    x0, y0, x1, y1 in full-resolution pixels.
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


def diverse_top_genes(rank: NDArray[np.float64], values: NDArray[Any] | sp.csr_matrix) -> NDArray[np.intp]:
    """Genes with the highest rank and different patterns: four markers of one cell type would give the same map four times."""
    ranked = rank.argsort()[::-1][:_CANDIDATES]
    similarity = np.nan_to_num(np.atleast_2d(np.corrcoef(np.log1p(_columns(values, ranked)), rowvar=False)))
    chosen: list[int] = []
    for i in range(len(ranked)):
        if all(similarity[i, j] < _SIMILAR for j in chosen):
            chosen.append(i)
    # if there are fewer patterns than maps, fill up with the best of the rest
    chosen += [i for i in range(len(ranked)) if i not in chosen]
    return np.asarray(ranked[chosen[:_N_MAPS]])


def _qc_rows(data: MapData) -> list[MapRow]:
    """Total UMI and number of genes per nucleus; for a prediction, the number of genes expected from P(expressed)."""
    n_genes = data.umi.shape[1]
    units = f"UMI (panel of {n_genes:,})", f"genes detected (of {n_genes:,})"
    predicted = np.asarray(data.umi.sum(axis=1)).ravel(), data.prob.sum(axis=1)
    counted: tuple[Any, Any] = (None, None)
    if data.measured is not None:
        counted = np.asarray(data.measured.sum(axis=1)).ravel(), np.asarray((data.measured > 0).sum(axis=1)).ravel()
    names = "Total counts", "Number of genes"
    return [MapRow(*row, gene=False) for row in zip(names, units, predicted, counted, strict=True)]


def _columns(values: NDArray[Any] | sp.csr_matrix, columns: NDArray[np.intp]) -> NDArray[Any]:
    chosen = values[:, columns]
    return np.asarray(chosen.toarray() if hasattr(chosen, "toarray") else chosen)


def _png_and_pdf(folder: Path, name: str) -> list[Path]:
    return [folder / f"{name}.png", folder / f"{name}.pdf"]
