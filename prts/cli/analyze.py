"""Cluster a prediction, name its cell types, and compare it with the measured section.

usage: prts analyze prediction=FILE.h5ad out=DIR [section=DIR] [markers=FILE] [train_section=DIR] [visium=DIR]

Clusters the predicted nuclei and finds the marker genes of each cluster. markers=FILE (PanglaoDB, CellMarker, or a table with columns
`type` and `gene`) names the clusters.
section=DIR does the same for the measured counts of the same nuclei, with the same number of clusters, and compares the two.
train_section=DIR trains a cell type classifier on a measured training section and applies it to measured and predicted nuclei, which is the
fair way to measure cell type accuracy.
visium=DIR (or spots.h5ad in the section's folder) compares nuclei summed within spots with measured Visium spots.
enrich.gmt=[FILE], or enrich.obo=FILE with enrich.annotations=FILE, tests the markers for gene sets.
Writes analysis.h5ad, measured.h5ad, analysis.json, tables and figures.

example: prts analyze prediction=slide.h5ad section=data/lung/lung2 markers=PanglaoDB.tsv out=analysis
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from prts.cli.app import plain, require
from prts.io.outputs import check_out_folder
from prts.progress import working

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from prts.analysis.pipeline import AnalysisSettings, TrainingSection


def main(cfg: DictConfig) -> None:
    """Analyze, write, draw."""
    require(cfg, "prediction", "out")
    out = check_out_folder(cfg.out, "analysis.h5ad, tables and figures")

    from prts.analysis.pipeline import analyze
    from prts.io.limits import allow_pixels
    from prts.report.analysis_figures import draw_analysis

    allow_pixels(cfg.max_pixels)
    with working("analysis"):
        analysis = analyze(
            cfg.prediction,
            section=cfg.section,
            train_section=None if cfg.train_section is None else _training_section(cfg),
            markers=cfg.markers,
            orthologs=cfg.orthologs,
            visium=cfg.visium,
            settings=_settings(cfg),
        )
        analysis.write(out)
    with working("figures"):
        draw_analysis(analysis, out / "figures", list(cfg.figures))


def _settings(cfg: DictConfig) -> AnalysisSettings:
    from prts.analysis.clusters import ClusterSettings
    from prts.analysis.compare import NamingSettings
    from prts.analysis.enrich import EnrichmentSettings
    from prts.analysis.pipeline import AnalysisSettings
    from prts.analysis.spots import SpotSettings

    enrich: dict[str, Any] = plain(cfg.enrich)
    if isinstance(enrich["gmt"], str):
        enrich["gmt"] = [enrich["gmt"]]
    return AnalysisSettings(
        clusters=ClusterSettings(**plain(cfg.clusters)),
        annotate=NamingSettings(**plain(cfg.annotate)),
        enrich=EnrichmentSettings(**enrich),
        spots=SpotSettings(**plain(cfg.spots)),
        broad=plain(cfg.broad),
    )


def _training_section(cfg: DictConfig) -> TrainingSection:
    from prts.analysis.pipeline import TrainingSection
    from prts.cli.prepare import chosen_segmenter

    segmenter = None if cfg.get("segmentation") is None else chosen_segmenter(plain(cfg.segmentation))[0]
    nuclei = None if cfg.train_nuclei is None else Path(cfg.train_nuclei)
    return TrainingSection(Path(cfg.train_section), nuclei, segmenter)
