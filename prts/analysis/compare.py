"""One section as predicted and as measured: both clustered and named by the same steps, and how far they agree."""

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

    from prts.evaluation.matching import MatchedNuclei


@dataclass(frozen=True)
class NamingSettings:
    """How clusters get their markers and names (`prts.analysis.annotate`).

    Attributes
    ----------
    min_log2fc, max_p
        Of markers; `max_p` of names too.
    n_markers, min_genes
        As for `annotate`.
    """

    min_log2fc: float = 0.25
    max_p: float = 0.05
    n_markers: int = 25
    min_genes: int = 2


@dataclass
class Side:
    """A section as it was predicted, or as it was measured.

    Attributes
    ----------
    nuclei
        Of `embed`, with `obs["cluster"]`, and with a marker table `obs["type"]` and `obs["broad"]`; a `score_<cluster>` each.
    markers
        Of `find_markers`.
    names
        Of `annotate`; None without a marker table.
    """

    nuclei: ad.AnnData
    markers: pd.DataFrame
    names: pd.DataFrame | None


@dataclass
class Comparison:
    """Figures of how far two sides agree, and the tables behind them.

    Attributes
    ----------
    summary
        Flat, by `<what>/<figure>`.
    tables
        Confusion tables by name: reference in rows.
    """

    summary: dict[str, float] = field(default_factory=dict)
    tables: dict[str, pd.DataFrame] = field(default_factory=dict)

    def add(self, what: str, figures: Mapping[str, float]) -> None:
        """Put figures into the summary under a name."""
        self.summary |= {f"{what}/{key}": value for key, value in figures.items()}


def analyse_side(
    counts: ad.AnnData,
    settings: ClusterSettings,
    naming: NamingSettings,
    *,
    what: str,
    n_clusters: int | None = None,
    known: pd.DataFrame | None = None,
    classes: Mapping[str, Sequence[str]] | None = None,
) -> Side:
    """Cluster a section, find the markers of the clusters and name them.

    Parameters
    ----------
    counts
        UMI, measured or expected, (n_nuclei, n_genes).
    settings, naming
        Of the steps.
    what
        "prediction" or "section", for messages.
    n_clusters
        How many clusters to look for; None takes the resolution of the settings.
    known
        Marker table of these genes (`read_markers`).
    classes
        Patterns of types by broad class (`broad_class`).
    """
    nuclei = embed(counts, settings, what=what)
    if n_clusters is None:
        cluster(nuclei, settings, what=what)
    else:
        cluster_to_match(nuclei, settings, n_clusters, what=what)
    markers = find_markers(nuclei, min_log2fc=naming.min_log2fc, max_p=naming.max_p)
    nuclei.obs = nuclei.obs.join(score_subtypes(nuclei, markers, seed=settings.seed))
    if known is None:
        return Side(nuclei, markers, None)
    clusters = nuclei.obs["cluster"].cat.categories.astype(str).tolist()
    names = annotate(
        markers, known, nuclei.var_names.tolist(), clusters=clusters,
        max_p=naming.max_p, min_genes=naming.min_genes, n_markers=naming.n_markers,
    )  # fmt: skip
    names["broad"] = broad_class(names["type"], classes or {}).fillna(UNASSIGNED)
    by_cluster = names.set_index("cluster")
    for column in ("type", "broad"):
        nuclei.obs[column] = nuclei.obs["cluster"].astype(object).map(by_cluster[column]).astype("category")
    return Side(nuclei, markers, names)


def describe(side: Side, what: str, result: Comparison) -> None:
    """Figures of one side: clusters kept, resolution, nuclei dropped, silhouette width, clusters with a name."""
    about = side.nuclei.uns["clusters"]
    figures: dict[str, float] = {
        "n_nuclei": side.nuclei.n_obs,
        "n_clusters": len(side.nuclei.obs["cluster"].cat.categories),
        "resolution": about["resolution"],
        "n_dropped_nuclei": about["n_dropped_nuclei"],
        "silhouette": silhouette(side.nuclei, side.nuclei.obs["cluster"]),
    }
    if side.names is not None:
        figures["n_named_clusters"] = int((side.names["type"] != UNASSIGNED).sum())
    result.add(what, figures)


def compare_sides(predicted: Side, measured: Side, result: Comparison) -> None:
    """Clusters, and named types and broad classes, of the nuclei that both sides have.

    Broad classes are compared over nuclei that have a name on both sides; `broad/share_named` says how many those are.
    """
    of = predicted.nuclei.obs.loc[measured.nuclei.obs_names]
    result.add("clusters", agreement(measured.nuclei.obs["cluster"], of["cluster"]))
    result.tables["clusters"] = confusion(measured.nuclei.obs["cluster"], of["cluster"])
    if predicted.names is None or measured.names is None:
        return
    for column in ("type", "broad"):
        a, b = (_named(obs[column]) for obs in (measured.nuclei.obs, of))
        figures = accuracy(a, b)
        result.add(column, {**figures, "share_named": figures["n"] / len(of)})
        if figures["n"]:
            result.tables[column] = confusion(a, b)


def classify_sides(
    classifier: TypeClassifier,
    matched: MatchedNuclei,
    truth: ad.AnnData | None,
    mpp: float,
    result: Comparison,
    classes: Mapping[str, Sequence[str]] | None = None,
) -> pd.DataFrame:
    """Types of the measured and of the predicted counts of the same nuclei, by a classifier that was trained elsewhere.

    Parameters
    ----------
    classifier
        Trained on measured training nuclei and the genes of the prediction.
    matched
        The nuclei and genes.
    truth
        Of a simulated section: then the true types are the reference, and the classifier on the true rates, and on what a perfect reader
        of the image expects, is the ceiling. None takes the types of the measured counts as the reference.
    mpp
        um a pixel.
    result
        Gets `classifier/<side>/...` (measured is there only with the truth), the same over broad classes as `classifier_broad/...`,
        and confusion tables.
    classes
        Of `broad_class`.

    Returns
    -------
    A column a side, (n_nuclei,), indexed by `cell_id`; `true` with the truth, missing for nuclei that it does not know.
    """
    sides: dict[str, Any] = {"measured": classifier(matched.measured), "predicted": classifier(matched.predicted)}
    if truth is not None:
        rows = true_rows(matched.xy_px, truth, mpp)
        names = truth.obs["cell_type"].astype(str).to_numpy(dtype=object)
        sides["true"] = np.where(rows >= 0, names[rows], np.array(None))
        for side, rates in {"rates": truth.X, "image_rates": truth.layers.get("image_rate")}.items():
            genes = [gene for gene in matched.genes if gene in truth.var_names]
            if rates is None or len(genes) < len(matched.genes):
                continue
            found = classifier(np.asarray(rates[:, truth.var_names.get_indexer(genes)])[rows])
            sides[side] = np.where(rows >= 0, found, np.array(None))
    types = pd.DataFrame(sides, index=pd.Index(matched.cell_id, name="cell_id"), dtype=object)
    reference = "measured" if truth is None else "true"
    for name in types.columns.drop(reference):
        result.add(f"classifier/{name}", accuracy(types[reference], types[name]))
        a, b = (broad_class(types[column], classes or {}) for column in (reference, name))
        result.add(f"classifier_broad/{name}", accuracy(a, b))
        if name in ("measured", "predicted"):
            result.tables[f"classifier_{name}"] = confusion(types[reference], types[name])
            result.tables[f"classifier_broad_{name}"] = confusion(a, b)
    return types


def judge_by_truth(side: Side, what: str, types: pd.Series, result: Comparison) -> None:
    """How far the clusters of a side are the true types of a simulated section (`types`, by `cell_id`)."""
    shared = side.nuclei.obs_names.intersection(types.index)
    result.add(f"truth/{what}", agreement(types.loc[shared], side.nuclei.obs.loc[shared, "cluster"]))


def shares(predicted: pd.Series, measured: pd.Series | None) -> pd.DataFrame:
    """Share of the nuclei that each type has: `name, predicted, measured`, commonest first; nuclei without a type do not count."""
    columns = {"predicted": predicted} | ({} if measured is None else {"measured": measured})
    parts = {key: types.dropna().astype(str).value_counts(normalize=True) for key, types in columns.items()}
    table = pd.DataFrame(parts).fillna(0.0)
    table = table.loc[table.mean(axis=1).sort_values(ascending=False, kind="stable").index]
    return table.rename_axis("name").reset_index()


def _named(types: pd.Series) -> pd.Series:
    values = types.astype(object)
    return values.where(values.notna() & (values != UNASSIGNED), None)
