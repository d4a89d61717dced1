"""Cluster sections and name the clusters, and compare a predicted section with the measured one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from prts.analysis.annotate import UNASSIGNED, annotate, broad_class
from prts.analysis.clusters import (
    ClusterSettings,
    cluster,
    cluster_to_match,
    embed,
    find_markers,
    score_subtypes,
    silhouette,
)
from prts.analysis.types import TypeClassifier, accuracy, agreement, confusion, true_rows

if TYPE_CHECKING:
    import anndata as ad

    from prts.evaluation.measured import MeasuredSection


@dataclass(frozen=True)
class NamingSettings:
    """How marker genes are found and clusters are named.

    Attributes
    ----------
    tissues
        Tissues of the marker table to use, such as `["Brain"]`; all if empty.
    min_log2fc
        Minimum log2 fold change of a marker.
    max_p
        Maximum adjusted p value of markers and names.
    n_markers
        Number of top markers of a cluster that are compared with the table.
    min_genes
        Minimum number of known markers that support a name.
    """

    tissues: Sequence[str] = ()
    min_log2fc: float = 0.25
    max_p: float = 0.05
    n_markers: int = 25
    min_genes: int = 2


@dataclass
class ClusteredSection:
    """A predicted or measured section after clustering.

    Attributes
    ----------
    nuclei
        Result of `embed` with `obs["cluster"]`, a `score_<cluster>` column per cluster and, if there is a marker table, `obs["type"]` and
        `obs["broad"]`.
    markers
        Result of `find_markers`.
    names
        Result of `annotate`; None without a marker table.
    """

    nuclei: ad.AnnData
    markers: pd.DataFrame
    names: pd.DataFrame | None


@dataclass
class Comparison:
    """Scores of an analysis and the confusion tables behind them.

    Attributes
    ----------
    summary
        Scores by `<what>/<score>`.
    tables
        Confusion tables by name, with the reference in rows.
    """

    summary: dict[str, float] = field(default_factory=dict)
    tables: dict[str, pd.DataFrame] = field(default_factory=dict)

    def add(self, what: str, scores: Mapping[str, float]) -> None:
        """Add scores under a name."""
        self.summary |= {f"{what}/{key}": value for key, value in scores.items()}


def cluster_section(
    counts: ad.AnnData,
    settings: ClusterSettings,
    naming: NamingSettings,
    *,
    what: str,
    n_clusters: int | None = None,
    known: pd.DataFrame | None = None,
    classes: Mapping[str, Sequence[str]] | None = None,
) -> ClusteredSection:
    """Cluster a section, find marker genes and name the clusters.

    Parameters
    ----------
    counts
        Measured or expected UMI, (n_nuclei, n_genes).
    settings, naming
        Settings of clustering and naming.
    what
        Name of the section in messages.
    n_clusters
        Number of clusters to aim for; None uses the resolution of the settings.
    known
        Marker table of these genes (`read_markers`).
    classes
        Name patterns of the types in each broad class (`broad_class`).
    """
    nuclei = embed(counts, settings, what=what)
    if n_clusters is None:
        cluster(nuclei, settings, what=what)
    else:
        cluster_to_match(nuclei, settings, n_clusters, what=what)
    markers = find_markers(nuclei, min_log2fc=naming.min_log2fc, max_p=naming.max_p)
    nuclei.obs = nuclei.obs.join(score_subtypes(nuclei, markers, seed=settings.seed))
    if known is None:
        return ClusteredSection(nuclei, markers, None)
    clusters = nuclei.obs["cluster"].cat.categories.astype(str).tolist()
    names = annotate(
        markers, known, nuclei.var_names.tolist(), clusters=clusters,
        max_p=naming.max_p, min_genes=naming.min_genes, n_markers=naming.n_markers,
    )  # fmt: skip
    names["broad"] = broad_class(names["type"], classes or {}).fillna(UNASSIGNED)
    by_cluster = names.set_index("cluster")
    for column in ("type", "broad"):
        nuclei.obs[column] = nuclei.obs["cluster"].astype(object).map(by_cluster[column]).astype("category")
    return ClusteredSection(nuclei, markers, names)


def summarize_clusters(section: ClusteredSection, what: str, result: Comparison) -> None:
    """Add the number of clusters, resolution, dropped nuclei, silhouette width and number of named clusters."""
    about = section.nuclei.uns["clusters"]
    scores: dict[str, float] = {
        "n_nuclei": section.nuclei.n_obs,
        "n_clusters": len(section.nuclei.obs["cluster"].cat.categories),
        "resolution": about["resolution"],
        "n_dropped_nuclei": about["n_dropped_nuclei"],
        "silhouette": silhouette(section.nuclei, section.nuclei.obs["cluster"]),
    }
    if section.names is not None:
        scores["n_named_clusters"] = int((section.names["type"] != UNASSIGNED).sum())
    result.add(what, scores)


def compare_sections(predicted: ClusteredSection, measured: ClusteredSection, result: Comparison) -> None:
    """Compare clusters, types and broad classes over the nuclei that both sections contain.

    Types are compared over nuclei with a name in both; `share_named` is their share.
    """
    shared = predicted.nuclei.obs.loc[measured.nuclei.obs_names]
    result.add("clusters", agreement(measured.nuclei.obs["cluster"], shared["cluster"]))
    result.tables["clusters"] = confusion(measured.nuclei.obs["cluster"], shared["cluster"])
    if predicted.names is None or measured.names is None:
        return
    for column in ("type", "broad"):
        a, b = (_assigned(obs[column]) for obs in (measured.nuclei.obs, shared))
        scores = accuracy(a, b)
        result.add(column, {**scores, "share_named": scores["n"] / len(shared)})
        if scores["n"]:
            result.tables[column] = confusion(a, b)


def classify_nuclei(
    classifier: TypeClassifier,
    measured: MeasuredSection,
    truth: ad.AnnData | None,
    result: Comparison,
    classes: Mapping[str, Sequence[str]] | None = None,
) -> pd.DataFrame:
    """Classify the measured and the predicted counts of the same nuclei, and score the labels.

    Parameters
    ----------
    classifier
        Trained on measured nuclei of a training section, with the genes of the prediction.
    measured
        The section; its `matched` nuclei are classified.
    truth
        Ground truth of a simulated section. The true types are then the reference, and classifying the true rates, and the rates that the
        image determines, gives the upper bound. Without it, the labels of the measured counts are the reference.
    result
        Receives `classifier/<name>/...`, the same over broad classes as `classifier_broad/<name>/...`, and the confusion tables.
    classes
        Name patterns of the types in each broad class (`broad_class`).

    Returns
    -------
    Labels in a column each for `measured`, `predicted` and, with ground truth, `true`, `rates` and `image_rates`; indexed by `cell_id`.
    Nuclei without a true counterpart have no label in the last three.
    """
    matched = measured.matched
    labels: dict[str, Any] = {"measured": classifier(matched.measured), "predicted": classifier(matched.predicted)}
    if truth is not None:
        labels |= _true_labels(classifier, measured, truth)
    types = pd.DataFrame(labels, index=pd.Index(matched.cell_id, name="cell_id"), dtype=object)
    reference = "measured" if truth is None else "true"
    for name in types.columns.drop(reference):
        result.add(f"classifier/{name}", accuracy(types[reference], types[name]))
        a, b = (broad_class(types[column], classes or {}) for column in (reference, name))
        result.add(f"classifier_broad/{name}", accuracy(a, b))
        if name in ("measured", "predicted"):
            result.tables[f"classifier_{name}"] = confusion(types[reference], types[name])
            result.tables[f"classifier_broad_{name}"] = confusion(a, b)
    return types


def _true_labels(classifier: TypeClassifier, measured: MeasuredSection, truth: ad.AnnData) -> dict[str, Any]:
    """True types, and the classes of the true rates if the truth has all predicted genes."""
    matched = measured.matched
    rows = true_rows(matched.xy_px, truth, measured.section.mpp)
    names = truth.obs["cell_type"].astype(str).to_numpy(dtype=object)
    labels = {"true": np.where(rows >= 0, names[rows], np.array(None))}
    genes = [gene for gene in matched.genes if gene in truth.var_names]
    for name, rates in {"rates": truth.X, "image_rates": truth.layers.get("image_rate")}.items():
        if rates is not None and len(genes) == len(matched.genes):
            found = classifier(np.asarray(rates[:, truth.var_names.get_indexer(genes)])[rows])
            labels[name] = np.where(rows >= 0, found, np.array(None))
    return labels


def score_against_truth(section: ClusteredSection, what: str, types: pd.Series, result: Comparison) -> None:
    """Add the agreement of the clusters with the true types of a simulated section (`types`, by `cell_id`)."""
    shared = section.nuclei.obs_names.intersection(types.index)
    result.add(f"truth/{what}", agreement(types.loc[shared], section.nuclei.obs.loc[shared, "cluster"]))


def share_of_types(predicted: pd.Series, measured: pd.Series | None) -> pd.DataFrame:
    """Share of nuclei per type: `name, predicted, measured`, most common first; nuclei without a type are not counted."""
    columns = {"predicted": predicted} | ({} if measured is None else {"measured": measured})
    parts = {key: types.dropna().astype(str).value_counts(normalize=True) for key, types in columns.items()}
    table = pd.DataFrame(parts).fillna(0.0)
    table = table.loc[table.mean(axis=1).sort_values(ascending=False, kind="stable").index]
    return table.rename_axis("name").reset_index()


def _assigned(types: pd.Series) -> pd.Series:
    values = types.astype(object)
    return values.where(values.notna() & (values != UNASSIGNED), None)
