"""Clusters, cell types, markers, enrichment and spots of a prediction, beside what its section measured.

usage: prts analyze prediction=FILE.h5ad out=DIR [section=DIR] [markers=FILE] [train_section=DIR] [visium=DIR]

Clusters the predicted nuclei and finds the clusters' markers. markers=FILE (PanglaoDB, CellMarker, or a table `type, gene`) names them.
section=DIR does the same with the measured counts of the same nuclei, at the resolution that gives as many clusters, and compares.
train_section=DIR trains a classifier on a measured training section, which then names measured and predicted nuclei: the fair type
accuracy. visium=DIR, or the section's spots.h5ad, compares sums of nuclei with measured spots. enrich.gmt=[FILE] or enrich.obo=FILE
with enrich.annotations=FILE tests the markers for gene sets. Writes analysis.h5ad, measured.h5ad, analysis.json, tables and figures.

example: prts analyze prediction=slide.h5ad section=data/lung/lung2 markers=PanglaoDB.tsv out=analysis
"""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prts.cli.app import plain, require
from prts.errors import InputError

if TYPE_CHECKING:
    import anndata as ad
    import pandas as pd
    from omegaconf import DictConfig

    from prts.analysis.compare import Comparison, Side
    from prts.analysis.measured import Measured
    from prts.analysis.spots import SpotComparison
    from prts.analysis.symbols import Orthologs
    from prts.io.spots import Spots

logger = logging.getLogger(__name__)


@dataclass
class Findings:
    """What an analysis found, before anything is written."""

    prediction: ad.AnnData
    predicted: Side
    measured: Side | None
    comparison: Comparison
    tables: dict[str, pd.DataFrame] = field(default_factory=dict)
    spots: SpotComparison | None = None
    mpp: float = 1.0


def main(cfg: DictConfig) -> None:
    """Read, analyse, write."""
    require(cfg, "prediction", "out")
    out = Path(cfg.out)
    if out.exists() and not out.is_dir():
        raise InputError(f"out={out}: is a file; name a folder for analysis.h5ad, tables and figures")
    formats = list(cfg.figures)
    if not set(formats) <= {"png", "pdf", "svg"}:
        raise InputError(f"figures={formats}: png, pdf and svg are the formats; [] draws none")
    _check_enrich(cfg)
    found = analyse(cfg)
    write(found, out, formats)


def analyse(cfg: DictConfig) -> Findings:
    """All that the config asks for, in memory."""
    from prts.analysis.clusters import ClusterSettings
    from prts.analysis.compare import (
        Comparison,
        NamingSettings,
        analyse_side,
        compare_sides,
        describe,
        judge_by_truth,
        shares,
    )
    from prts.analysis.measured import measure
    from prts.analysis.symbols import read_orthologs
    from prts.io.limits import allow_pixels
    from prts.io.prediction import nuclei_path, read_prediction

    allow_pixels(cfg.max_pixels)
    prediction = read_prediction(Path(cfg.prediction))
    species = str(prediction.uns["prts"].get("species", ""))
    if species not in ("human", "mouse"):
        raise InputError(f"prediction={cfg.prediction}: lacks uns['prts']['species']; predict again with this prts")
    settings = ClusterSettings(**plain(cfg.clusters))
    naming_keys = plain(cfg.annotate)
    tissues = naming_keys.pop("tissues")
    naming = NamingSettings(**naming_keys)
    classes = plain(cfg.broad)
    orthologs = None if cfg.orthologs is None else read_orthologs(Path(cfg.orthologs))
    measured_counts = (
        None if cfg.section is None else measure(prediction, nuclei_path(Path(cfg.prediction)), Path(cfg.section))
    )

    if cfg.train_section is not None and measured_counts is None:
        raise InputError(
            "train_section: names nuclei that were measured too; give the predicted section as section=DIR"
        )
    spots = _read_spots(cfg, measured_counts)

    def known(genes: list[str]) -> pd.DataFrame | None:
        from prts.analysis.annotate import read_markers

        if cfg.markers is None:
            return None
        return read_markers(Path(cfg.markers), species=species, genes=genes, tissues=tissues, orthologs=orthologs)

    named: dict[str, Any] = {"naming": naming, "classes": classes}
    predicted = analyse_side(
        prediction, settings, what="prediction", known=known(prediction.var_names.tolist()), **named
    )
    result = Comparison()
    describe(predicted, "predicted", result)
    found = Findings(prediction, predicted, None, result, mpp=float(prediction.uns["prts"]["mpp"]))
    _side_tables(found.tables, predicted, "")
    if measured_counts is not None:
        counts = measured_counts.counts
        n_clusters = len(predicted.nuclei.obs["cluster"].cat.categories)
        measured = analyse_side(
            counts, settings, what="section", n_clusters=n_clusters, known=known(counts.var_names.tolist()), **named
        )
        found.measured = measured
        _side_tables(found.tables, measured, "measured_")
        describe(measured, "measured", result)
        compare_sides(predicted, measured, result)
        truth = _truth(measured_counts)
        if truth is not None:
            from prts.analysis.types import true_types

            xy = measured.nuclei.obsm["spatial"]
            types = true_types(xy, truth, measured_counts.section.mpp).set_axis(measured.nuclei.obs_names)
            for side, what in ((predicted, "predicted"), (measured, "measured")):
                judge_by_truth(side, what, types, result)
        if cfg.train_section is not None:
            _classify(cfg, found, measured_counts, truth, settings, named, known)
    for column in ("type", "broad"):
        if column in predicted.nuclei.obs:
            other = None if found.measured is None else found.measured.nuclei.obs[column]
            found.tables[f"shares_{column}"] = shares(predicted.nuclei.obs[column], other)
    _enrich(cfg, found, species, orthologs)
    if spots is not None:
        _compare_spots(cfg, found, spots)
    found.tables |= {f"confusion_{name}": table.reset_index() for name, table in result.tables.items()}
    return found


def write(found: Findings, out: Path, formats: list[str]) -> None:
    """Write what was found: data, figures of merit, tables, figures."""
    from prts.evaluation.summaries import json_ready
    from prts.io.cache import atomic
    from prts.io.hdf5 import write_h5ad

    for name, side in {"analysis": found.predicted, "measured": found.measured}.items():
        if side is not None:
            with atomic(out / f"{name}.h5ad") as path:
                write_h5ad(side.nuclei, path, compression="lzf")
    with atomic(out / "analysis.json") as path:
        figures = json_ready(found.comparison.summary)
        path.write_text(json.dumps(figures, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    for name, table in found.tables.items():
        with atomic(out / f"{name}.csv") as path:
            table.to_csv(path, index=False)
    draw(found, out / "figures", formats)
    logger.info("%d tables, see %s", len(found.tables), out)


def draw(found: Findings, folder: Path, formats: list[str]) -> None:
    """Draw what was found, each figure in every format."""
    from prts.report import analysis_figures as figures

    if not formats:
        return

    def files(name: str) -> list[Path]:
        return [folder / f"{name}.{suffix}" for suffix in formats]

    sides = {} if found.measured is None else {"measured": found.measured}
    sides["predicted"] = found.predicted
    nuclei = {title: side.nuclei for title, side in sides.items()}
    called = {"cluster": "cluster", "type": "type by markers", "classifier_type": "type by classifier"}
    groupings = {column: name for column, name in called.items() if all(column in n.obs for n in nuclei.values())}
    columns = [n.obs[column] for n in nuclei.values() for column in ("type", "classifier_type") if column in n.obs]
    colours = figures.group_colours(columns)
    figures.umaps(files("umap"), nuclei, groupings, colours)
    for column, name in groupings.items():
        figures.tissue_groups(files(f"tissue_{column}"), nuclei, column, name, colours, found.mpp)
    figures.qc_maps(files("qc_maps"), nuclei, found.mpp)
    for title, side in sides.items():
        if len(side.markers):
            figures.marker_dots(files(f"markers_{title}"), side.nuclei, side.markers, side.names)
    for name, table in found.tables.items():
        if name.startswith("shares_"):
            figures.type_shares(
                files(name), table, figures.group_colours([table["name"]]) if name == "shares_broad" else colours
            )
        if name.endswith("enrichment") and len(table):
            figures.enrichment_dots(files(name), table)
    for name, table in found.comparison.tables.items():
        title, reference, other = _axes_of(name, "classifier/rates/n" in found.comparison.summary)
        figures.confusion_matrix(files(f"confusion_{name}"), table, title, reference=reference, found=other)
    if found.spots is not None:
        figures.spot_maps(files("spots"), found.spots.spots, found.predicted.nuclei, found.spots.radius_px, found.mpp)


def _axes_of(name: str, truth: bool) -> tuple[str, str, str]:
    """Title and axes of a confusion matrix by its name."""
    titles = {"clusters": "clusters", "type": "types, named by markers", "broad": "broad classes, named by markers"}
    if name in titles:
        return titles[name], "measured", "predicted"
    title = "broad classes, by classifier" if "broad" in name else "types, by classifier"
    return title, "true" if truth else "measured", name.rsplit("_", 1)[-1]


def _side_tables(tables: dict[str, pd.DataFrame], side: Side, prefix: str) -> None:
    obs = side.nuclei.obs
    sizes = obs["cluster"].value_counts().rename_axis("cluster").rename("n_nuclei").reset_index()
    tables[f"{prefix}clusters"] = sizes.assign(share=sizes["n_nuclei"] / len(obs))
    tables[f"{prefix}markers"] = side.markers
    if side.names is not None:
        tables[f"{prefix}annotation"] = side.names


def _truth(measured: Measured) -> ad.AnnData | None:
    """What the simulation knows, the rates included where it keeps only their factors."""
    from prts.io.h5_checks import read_foreign_h5ad
    from prts.simulate.gene_programs import true_rates

    if measured.section.truth is None:
        return None
    truth = read_foreign_h5ad(measured.section.truth)
    if truth.X is None:
        # the rates of a large section: of the predicted genes only
        genes = [gene for gene in measured.matched.genes if gene in truth.var_names]
        rates = {image: true_rates(truth, genes, image=image) for image in (False, True)}
        truth = truth[:, genes].copy()
        truth.X, truth.layers["image_rate"] = rates[False], rates[True]
    return truth


def _classify(
    cfg: DictConfig,
    found: Findings,
    measured: Measured,
    truth: ad.AnnData | None,
    settings: Any,
    named: dict[str, Any],
    known: Any,
) -> None:
    """Train on the training section and name the nuclei of both sides."""
    from hydra.utils import instantiate

    from prts.analysis.annotate import UNASSIGNED
    from prts.analysis.compare import analyse_side, classify_sides, shares
    from prts.analysis.measured import measure_training
    from prts.analysis.types import TypeClassifier, true_types
    from prts.io.h5_checks import read_foreign_h5ad

    segmenter = None
    if cfg.get("segmentation") is not None:
        node = plain(cfg.segmentation)
        node.pop("prefer_given")
        segmenter = instantiate(node)
    nuclei = None if cfg.train_nuclei is None else Path(cfg.train_nuclei)
    section, counts, panel = measure_training(found.prediction, Path(cfg.train_section), nuclei, segmenter)
    if section.truth is not None:
        types = true_types(counts.obsm["spatial"], read_foreign_h5ad(section.truth), section.mpp)
    else:
        side = analyse_side(counts, settings, what="train_section", known=known(counts.var_names.tolist()), **named)
        clusters = side.nuclei.obs["cluster"].astype(object)
        types = clusters.where(clusters.isna(), "cluster " + clusters.astype(str)).reset_index(drop=True)
        if "type" in side.nuclei.obs:
            names = side.nuclei.obs["type"].astype(object).reset_index(drop=True)
            types = names.where(names.notna() & (names != UNASSIGNED), types)
        _side_tables(found.tables, side, "training_")
    labels = classify_sides(
        TypeClassifier(panel, types), measured.matched, truth, measured.section.mpp, found.comparison, named["classes"]
    )
    found.tables["classifier_types"] = labels.reset_index()
    for name, of in {"measured": found.measured, "predicted": found.predicted}.items():
        if of is not None:
            of.nuclei.obs["classifier_type"] = labels[name].reindex(of.nuclei.obs_names).astype("category")
    found.tables["shares_classifier"] = shares(labels["predicted"], labels["measured"])


def _check_enrich(cfg: DictConfig) -> None:
    obo, annotations = cfg.enrich.obo, cfg.enrich.annotations
    if obo is not None and annotations is None:
        raise InputError(
            f"enrich.obo={obo}: an ontology alone says of no gene what it does; give enrich.annotations=FILE, a GAF or a table of gene "
            "and GO ids"
        )
    if annotations is not None and obo is None:
        raise InputError(f"enrich.annotations={annotations}: needs the ontology, too; give enrich.obo=go-basic.obo")


def _enrich(cfg: DictConfig, found: Findings, species: str, orthologs: Orthologs | None) -> None:
    import pandas as pd

    from prts.analysis.enrich import enrich_gmt, enrich_go, marker_lists

    sides = {"": found.predicted} | ({} if found.measured is None else {"measured_": found.measured})
    gmts = [Path(path) for path in ([cfg.enrich.gmt] if isinstance(cfg.enrich.gmt, str) else cfg.enrich.gmt)]
    for prefix, side in sides.items():
        lists = marker_lists(side.markers, cfg.enrich.n_markers)
        background = side.nuclei.var_names.tolist()
        more: dict[str, Any] = {"species": species, "orthologs": orthologs}
        parts = [enrich_gmt(lists, background, gmt, **more) for gmt in gmts]
        if cfg.enrich.obo is not None:
            parts.append(enrich_go(lists, background, Path(cfg.enrich.obo), Path(cfg.enrich.annotations), **more))
        if parts:
            table = pd.concat([part for part in parts if len(part)] or parts[:1], ignore_index=True)
            significant = table["p_adj"] < cfg.enrich.max_p
            found.tables[f"{prefix}enrichment"] = table[significant].reset_index(drop=True)
            logger.info(
                "%senrichment: %d of %d pairs at p < %g", prefix, significant.sum(), len(table), cfg.enrich.max_p
            )


def _read_spots(cfg: DictConfig, measured: Measured | None) -> Spots | None:
    """The spots to compare with: those of the Visium folder, else the section's own."""
    from prts.analysis.spots import filter_spots, read_visium
    from prts.io.spots import read_spots

    if cfg.visium is not None:
        spots = read_visium(Path(cfg.visium))
    elif measured is not None and measured.section.spots is not None:
        spots = read_spots(measured.section.spots)
    else:
        return None
    return filter_spots(
        spots, **{key: cfg.spots[key] for key in ("min_counts", "max_counts", "min_genes", "max_genes")}
    )


def _compare_spots(cfg: DictConfig, found: Findings, spots: Spots) -> None:
    from prts.analysis.clusters import ClusterSettings
    from prts.analysis.spots import compare_spots

    steps = {key: cfg.spots[key] for key in ("n_top_genes", "n_pcs", "resolution")}
    settings = ClusterSettings(**steps, seed=cfg.clusters.seed)
    found.spots = compare_spots(found.prediction, spots, found.predicted.nuclei.obs["cluster"], settings)
    found.comparison.add("spots", found.spots.summary)
    found.tables["spots"] = found.spots.spots.rename_axis("spot").reset_index()
    found.tables["spots_per_gene"] = found.spots.per_gene
    if found.spots.composition is not None:
        found.tables["spots_composition"] = found.spots.composition.reset_index()
