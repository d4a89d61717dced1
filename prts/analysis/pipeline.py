"""Analyze a prediction: clusters, cell types, markers, enrichment, and agreement with the measured section."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from prts.analysis.annotate import UNASSIGNED, read_markers
from prts.analysis.clusters import ClusterSettings
from prts.analysis.compare import (
    Comparison,
    NamingSettings,
    classify_nuclei,
    cluster_section,
    compare_sections,
    score_against_truth,
    share_of_types,
    summarize_clusters,
)
from prts.analysis.enrich import EnrichmentSettings, enrich_clusters
from prts.analysis.spots import SpotSettings, compare_spots, filter_spots, read_visium
from prts.analysis.symbols import read_orthologs
from prts.analysis.types import TypeClassifier, true_types
from prts.errors import InputError, ParameterError
from prts.evaluation.measured import MeasuredSection, measure_predicted, measure_training
from prts.evaluation.summaries import json_ready
from prts.io.cache import atomic
from prts.io.h5_checks import read_checked_h5ad
from prts.io.hdf5 import write_h5ad
from prts.io.nuclei import load_nuclei
from prts.io.prediction import nuclei_path, read_prediction
from prts.io.spots import read_spots
from prts.section import open_section_folder
from prts.simulate.gene_programs import true_rates

if TYPE_CHECKING:
    import anndata as ad
    import pandas as pd

    from prts.analysis.compare import ClusteredSection
    from prts.analysis.spots import SpotComparison
    from prts.analysis.symbols import Orthologs
    from prts.io.spots import Spots
    from prts.segmentation.segment import Segmenter

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class AnalysisSettings:
    """Settings of each step of `analyze`.

    Attributes
    ----------
    clusters
        Clustering of the nuclei.
    annotate
        Marker genes and cluster names.
    enrich
        Gene sets to test the markers for; none by default.
    spots
        Filtering and clustering of Visium spots.
    broad
        Broad cell classes: name patterns of the types in each class (`prts.analysis.annotate.broad_class`).
    """

    clusters: ClusterSettings = field(default_factory=ClusterSettings)
    annotate: NamingSettings = field(default_factory=NamingSettings)
    enrich: EnrichmentSettings = field(default_factory=EnrichmentSettings)
    spots: SpotSettings = field(default_factory=SpotSettings)
    broad: Mapping[str, Sequence[str]] = field(default_factory=dict)


@dataclass(frozen=True)
class TrainingSection:
    """A measured training section, from which `analyze` trains a cell type classifier.

    Attributes
    ----------
    folder
        Folder of the section, with its bins.
    nuclei
        File of its nuclei; None uses the nuclei in the folder.
    segmenter
        Segments the image if there are no nuclei.
    """

    folder: Path
    nuclei: Path | None = None
    segmenter: Segmenter | None = None


@dataclass
class Analysis:
    """Result of `analyze`.

    Attributes
    ----------
    prediction
        The prediction as it was read.
    predicted, measured
        Clustered nuclei of the prediction and, if the section was measured, of the section.
    comparison
        Scores (`analysis.json`) and confusion tables.
    tables
        Tables by file name: clusters, markers, type shares, enrichment, ...
    spots
        Comparison with Visium spots, if there are any.
    """

    prediction: ad.AnnData
    predicted: ClusteredSection
    measured: ClusteredSection | None = None
    comparison: Comparison = field(default_factory=Comparison)
    tables: dict[str, pd.DataFrame] = field(default_factory=dict)
    spots: SpotComparison | None = None

    @property
    def mpp(self) -> float:
        """Pixel size of the full-resolution image, um."""
        return float(self.prediction.uns["prts"]["mpp"])

    @property
    def sections(self) -> dict[str, ClusteredSection]:
        """The clustered sections by name, `measured` first if there is one."""
        return ({} if self.measured is None else {"measured": self.measured}) | {"predicted": self.predicted}

    def write(self, folder: str | Path) -> None:
        """Write analysis.h5ad, measured.h5ad, analysis.json and a CSV file per table.

        Figures are drawn by `prts.report.analysis_figures.draw_analysis`.

        Parameters
        ----------
        folder
            Output folder; created if needed.

        Examples
        --------
        >>> analysis = analyze("slide.h5ad")  # doctest: +SKIP
        >>> analysis.write("analysis/")  # doctest: +SKIP
        """
        folder = Path(folder)
        for name, section in {"analysis": self.predicted, "measured": self.measured}.items():
            if section is not None:
                with atomic(folder / f"{name}.h5ad") as path:
                    write_h5ad(section.nuclei, path, compression="gzip")
        with atomic(folder / "analysis.json") as path:
            scores = json_ready(self.comparison.summary)
            path.write_text(json.dumps(scores, indent=1, allow_nan=False) + "\n", encoding="utf-8")
        for name, table in self.tables.items():
            with atomic(folder / f"{name}.csv") as path:
                table.to_csv(path, index=False)
        logger.info("wrote %d tables to %s", len(self.tables), folder)


def analyze(
    prediction: str | Path,
    *,
    section: str | Path | None = None,
    train_section: TrainingSection | None = None,
    markers: str | Path | None = None,
    orthologs: str | Path | None = None,
    visium: str | Path | None = None,
    settings: AnalysisSettings | None = None,
) -> Analysis:
    """Cluster predicted nuclei, find and name their markers, and compare them with the measured section.

    Parameters
    ----------
    prediction
        Prediction (.h5ad), with its polygons next to it (.nuclei.parquet) if `section` is given.
    section
        Folder of the predicted section. Its measured nuclei are analyzed in the same way and compared.
    train_section
        Measured training section. A classifier trained on its nuclei labels the measured and the predicted nuclei; needs `section`.
    markers
        Marker table that names the clusters: PanglaoDB, CellMarker, or columns `type` and `gene`.
    orthologs
        Table of human and mouse symbols, to use human markers or gene sets on a mouse section.
    visium
        `outs` folder of a Visium run on the same image. Without it, the spots of `section` are used if it has any.
    settings
        Settings of the steps; the defaults are the paper's.

    Returns
    -------
    The analysis; `Analysis.write` saves it.

    Raises
    ------
    InputError
        If a file is missing or malformed, or too few nuclei or genes are left.

    Examples
    --------
    >>> analysis = analyze("slide.h5ad", markers="PanglaoDB.tsv")  # doctest: +SKIP
    >>> analysis.predicted.nuclei.obs["type"].value_counts()  # doctest: +SKIP
    """
    steps = _Steps.start(Path(prediction), markers, orthologs, settings or AnalysisSettings())
    measured = None
    if section is not None:
        outlines = load_nuclei(nuclei_path(Path(prediction)))
        measured = measure_predicted(steps.prediction, outlines, open_section_folder(section))
    elif train_section is not None:
        raise ParameterError("", "train_section", "labels nuclei that were also measured; give `section` as well")
    spots = _find_spots(visium, measured, steps.settings.spots)

    found = Analysis(steps.prediction, steps.cluster(steps.prediction, "prediction"))
    summarize_clusters(found.predicted, "predicted", found.comparison)
    found.tables |= _cluster_tables(found.predicted, "")
    if measured is not None:
        _compare_with_measured(found, measured, train_section, steps)
    for column in ("type", "broad"):
        if column in found.predicted.nuclei.obs:
            other = None if found.measured is None else found.measured.nuclei.obs[column]
            found.tables[f"shares_{column}"] = share_of_types(found.predicted.nuclei.obs[column], other)
    for name, clustered in found.sections.items():
        table = steps.enrich(clustered)
        if table is not None:
            found.tables["enrichment" if name == "predicted" else "measured_enrichment"] = table
    if spots is not None:
        _compare_with_spots(found, spots, steps.settings)
    found.tables |= {f"confusion_{name}": table.reset_index() for name, table in found.comparison.tables.items()}
    return found


@dataclass(frozen=True)
class _Steps:
    """The steps that every section goes through, with what they need."""

    prediction: ad.AnnData
    species: str
    markers: Path | None
    orthologs: Orthologs | None
    settings: AnalysisSettings

    @classmethod
    def start(
        cls, path: Path, markers: str | Path | None, orthologs: str | Path | None, settings: AnalysisSettings
    ) -> _Steps:
        prediction = read_prediction(path)
        species = str(prediction.uns["prts"].get("species", ""))
        if not species:
            raise InputError(f"{path}: uns['prts'] has no species; predict again with this version of prts")
        return cls(
            prediction=prediction,
            species=species,
            markers=None if markers is None else Path(markers),
            orthologs=None if orthologs is None else read_orthologs(Path(orthologs)),
            settings=settings,
        )

    def cluster(self, counts: ad.AnnData, what: str, n_clusters: int | None = None) -> ClusteredSection:
        known = None
        if self.markers is not None:
            known = read_markers(
                self.markers,
                species=self.species,
                genes=counts.var_names.tolist(),
                tissues=self.settings.annotate.tissues,
                orthologs=self.orthologs,
            )
        return cluster_section(
            counts,
            self.settings.clusters,
            self.settings.annotate,
            what=what,
            n_clusters=n_clusters,
            known=known,
            classes=self.settings.broad,
        )

    def enrich(self, section: ClusteredSection) -> pd.DataFrame | None:
        return enrich_clusters(
            section.markers,
            section.nuclei.var_names.tolist(),
            self.settings.enrich,
            species=self.species,
            orthologs=self.orthologs,
        )


def _compare_with_measured(
    found: Analysis, measured: MeasuredSection, train_section: TrainingSection | None, steps: _Steps
) -> None:
    n_clusters = len(found.predicted.nuclei.obs["cluster"].cat.categories)
    found.measured = steps.cluster(measured.counts, "section", n_clusters)
    found.tables |= _cluster_tables(found.measured, "measured_")
    summarize_clusters(found.measured, "measured", found.comparison)
    compare_sections(found.predicted, found.measured, found.comparison)
    truth = _read_truth(measured)
    if truth is not None:
        nuclei = found.measured.nuclei
        types = true_types(nuclei.obsm["spatial"], truth, measured.section.mpp).set_axis(nuclei.obs_names)
        score_against_truth(found.predicted, "predicted", types, found.comparison)
        score_against_truth(found.measured, "measured", types, found.comparison)
    if train_section is not None:
        _classify(found, measured, truth, train_section, steps)


def _classify(
    found: Analysis, measured: MeasuredSection, truth: ad.AnnData | None, training: TrainingSection, steps: _Steps
) -> None:
    """Train a classifier on the training section, and label measured and predicted nuclei with it."""
    section = open_section_folder(training.folder)
    counts, panel = measure_training(found.prediction, section, training.nuclei, training.segmenter)
    if section.truth is not None:
        types = true_types(counts.obsm["spatial"], read_checked_h5ad(section.truth), section.mpp)
    else:
        clustered = steps.cluster(counts, "train_section")
        types = _training_labels(clustered.nuclei.obs)
        found.tables |= _cluster_tables(clustered, "training_")
    labels = classify_nuclei(
        TypeClassifier(panel, types), measured, truth, found.comparison, classes=steps.settings.broad
    )
    found.tables["classifier_types"] = labels.reset_index()
    for name, clustered in found.sections.items():
        obs = clustered.nuclei.obs
        obs["classifier_type"] = labels[name].reindex(obs.index).astype("category")
    found.tables["shares_classifier"] = share_of_types(labels["predicted"], labels["measured"])


def _training_labels(obs: pd.DataFrame) -> pd.Series:
    """Names of the clusters; those without a name are labeled by number."""
    clusters = obs["cluster"].astype(object)
    labels = clusters.where(clusters.isna(), "cluster " + clusters.astype(str)).reset_index(drop=True)
    if "type" in obs:
        names = obs["type"].astype(object).reset_index(drop=True)
        labels = names.where(names.notna() & (names != UNASSIGNED), labels)
    return labels


def _cluster_tables(section: ClusteredSection, prefix: str) -> dict[str, pd.DataFrame]:
    obs = section.nuclei.obs
    sizes = obs["cluster"].value_counts().rename_axis("cluster").rename("n_nuclei").reset_index()
    tables = {
        f"{prefix}clusters": sizes.assign(share=sizes["n_nuclei"] / len(obs)),
        f"{prefix}markers": section.markers,
    }
    return tables if section.names is None else {**tables, f"{prefix}annotation": section.names}


def _read_truth(measured: MeasuredSection) -> ad.AnnData | None:
    """Ground truth of a simulated section; a large one stores factors, from which the rates are computed."""
    if measured.section.truth is None:
        return None
    truth = read_checked_h5ad(measured.section.truth)
    if truth.X is None:
        genes = [gene for gene in measured.matched.genes if gene in truth.var_names]
        rates = {image: true_rates(truth, genes, image=image) for image in (False, True)}
        truth = truth[:, genes].copy()
        truth.X, truth.layers["image_rate"] = rates[False], rates[True]
    return truth


def _find_spots(visium: str | Path | None, measured: MeasuredSection | None, settings: SpotSettings) -> Spots | None:
    """Spots of the Visium run, or else of the section."""
    if visium is not None:
        return filter_spots(read_visium(Path(visium)), settings)
    if measured is not None and measured.section.spots is not None:
        return filter_spots(read_spots(measured.section.spots), settings)
    return None


def _compare_with_spots(found: Analysis, spots: Spots, settings: AnalysisSettings) -> None:
    of_spots = settings.spots.clustering(seed=settings.clusters.seed)
    found.spots = compare_spots(found.prediction, spots, found.predicted.nuclei.obs["cluster"], of_spots)
    found.comparison.add("spots", found.spots.summary)
    found.tables["spots"] = found.spots.spots.rename_axis("spot").reset_index()
    found.tables["spots_per_gene"] = found.spots.per_gene
    if found.spots.composition is not None:
        found.tables["spots_composition"] = found.spots.composition.reset_index()
