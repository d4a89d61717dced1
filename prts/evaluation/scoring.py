"""Figures of a trained model and of its baselines on prepared sections, under the names of metrics.json."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import scipy.sparse as sp

from prts.evaluation.bootstrap import BlockSums, block_sums, mean_pcc_difference, spatial_blocks
from prts.evaluation.comparison import refuse_leakage
from prts.evaluation.expression import pearson_per_gene
from prts.evaluation.predictable import genes_beyond
from prts.evaluation.section_scores import Evaluation, evaluate_section, spot_pcc, sum_in_spots

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from prts.data.nucleus_set import NucleusSet
    from prts.evaluation.comparison import PredictFn
    from prts.io.spots import Spots
    from prts.preprocess.panel import Panel
    from prts.section import Section

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Scored:
    """One section's nuclei, what was predicted for them, and how good that is. `umi` and `prob` are (n, g) float32."""

    nuclei: NucleusSet
    section: Section
    spots: Spots | None
    umi: NDArray[np.float32]
    prob: NDArray[np.float32]
    result: Evaluation


def evaluate_set(
    nuclei: NucleusSet,
    umi: NDArray[np.float32],
    prob: NDArray[np.float32] | None,
    panel: Panel,
    threshold: float,
    spots: Spots | None,
    mpp: float,
    settings: Mapping[str, Any],
    gene_sets: Mapping[str, NDArray[np.intp]],
) -> Evaluation:
    """Evaluate a prediction of one section's nuclei, with the spot level where the section has measured spots.

    Parameters
    ----------
    nuclei
        The measured nuclei.
    umi, prob
        Prediction for them, each (n, g); `prob` None where the predictor has none.
    panel
        Names and ids of the genes.
    threshold
        Of P(expressed).
    spots
        Measured spots, or None.
    mpp
        um/px of the section.
    settings
        The `evaluation` config node.
    gene_sets
        Positions of genes in the panel by the name of a set (`gene_sets`).
    """
    result = evaluate_section(
        nuclei.counts,
        umi,
        prob,
        genes=panel.genes,
        threshold=threshold,
        xy_um=nuclei.xy_um,
        gene_sets=gene_sets,
        block_um=settings["block_um"],
        n_replicates=settings["bootstrap"],
    )
    if spots is not None:
        result.summary["spot_pcc_mean"], _ = spot_pcc(umi, nuclei.xy_um / mpp, spots, panel.genes, panel.gene_ids)
    return result


def gene_sets(train_sets: Sequence[NucleusSet], panel: Panel, markers: Sequence[str]) -> dict[str, NDArray[np.intp]]:
    """Genes whose figures are also given apart: positions in the panel of `hvg50`, `hvg200` and, where it has any, `markers`.

    Parameters
    ----------
    train_sets
        Training nuclei.
    panel
        The genes.
    markers
        Names of the tissue's marker genes; those that the panel has not are left out.
    """
    sets = variable_genes(train_sets)
    found = np.flatnonzero(np.isin(np.array(panel.genes, dtype=object), np.array(markers, dtype=object)))
    if len(found):
        sets["markers"] = found
    if len(found) < len(markers):
        logger.info("gene set markers: %d of the tissue's %d are in the panel", len(found), len(markers))
    return sets


def variable_genes(train_sets: Sequence[NucleusSet]) -> dict[str, NDArray[np.intp]]:
    """The panel's genes that vary most in training nuclei: positions of `hvg50` and `hvg200`, most variable first.

    Variance of log1p of counts scaled to the median total of all genes, as in `prts.preprocess.panel.TopPanel`.

    Parameters
    ----------
    train_sets
        Training nuclei, all sections together.
    """
    from sklearn.utils.sparsefuncs import mean_variance_axis

    total = np.concatenate([nuclei.total_counts for nuclei in train_sets]).astype(np.float64)
    factor = np.divide(np.median(total[total > 0]), total, out=np.zeros_like(total), where=total > 0)
    counts = sp.vstack([nuclei.counts for nuclei in train_sets], format="csr", dtype=np.float64)
    _, variance = mean_variance_axis((sp.diags_array(factor) @ counts).tocsr().log1p(), axis=0)
    order = np.argsort(-variance, kind="stable")
    return {f"hvg{size}": order[:size] for size in (50, 200)}


def score_baselines(
    baselines: Mapping[str, PredictFn],
    model: Scored,
    panel: Panel,
    settings: Mapping[str, Any],
    gene_sets: Mapping[str, NDArray[np.intp]],
) -> tuple[dict[str, float], dict[str, NDArray[np.bool_]]]:
    """Figures of each baseline on the nuclei the model was scored on, and the model's advantage over it with its interval.

    Parameters
    ----------
    baselines
        By name.
    model
        The model's prediction of the section.
    panel
        Names and ids of the genes.
    settings
        The `evaluation` config node.
    gene_sets
        As for `evaluate_set`.

    Returns
    -------
    `<name>/pcc_mean` and its like; `<name>/difference` is the model's mean PCC minus the baseline's, with `_low` and `_high` from
    resampled blocks, the same for both. `<name>/spot_difference` is that of the spot level, where the section has measured spots, from
    resampled spots: they count as independent, which neighbouring ones are not quite. Then the genes in which the model is above 0 and
    above each baseline (`prts.evaluation.predictable.genes_beyond`).

    Raises
    ------
    RuntimeError
        If the baseline `permuted` predicts the test (`prts.evaluation.comparison.refuse_leakage`).
    """
    counts, xy_um = model.nuclei.counts, model.nuclei.xy_um
    blocks, _ = spatial_blocks(xy_um, settings["block_um"])
    figures: dict[str, float] = {}
    others: dict[str, BlockSums] = {}
    model_sums = model.result.sums
    assert model_sums is not None  # evaluate_set always knows where nuclei are

    def compare(key: str, ours: BlockSums, theirs: BlockSums) -> None:
        interval = mean_pcc_difference(ours, theirs, n_replicates=settings["bootstrap"])
        figures.update({f"{key}{end}": value for end, value in zip(("", "_low", "_high"), interval, strict=True)})

    def of_spots(umi: NDArray[np.float32], spots: Spots) -> BlockSums:
        measured, summed = sum_in_spots(umi, xy_um / model.section.mpp, spots, panel.genes, panel.gene_ids)
        return block_sums(measured, summed, np.arange(measured.shape[0]))  # every spot a block of its own

    model_spots = None if model.spots is None else of_spots(model.umi, model.spots)
    for name, predict in baselines.items():
        umi = predict(model.nuclei)
        pcc = pearson_per_gene(counts, umi)
        if name == "permuted":
            refuse_leakage(pcc, model.nuclei.section)
        figures |= {f"{name}/pcc_mean": _mean(pcc), f"{name}/pcc_median": float(pd.Series(pcc).median())}
        figures |= {f"{name}/{genes}_pcc_mean": _mean(pcc[members]) for genes, members in gene_sets.items()}
        if model.spots is not None and model_spots is not None:
            spot_sums = of_spots(umi, model.spots)
            figures[f"{name}/spot_pcc_mean"] = float(spot_sums.mean_pcc(np.ones((1, len(spot_sums.n))))[0])
            compare(f"{name}/spot_difference", model_spots, spot_sums)
        others[name] = block_sums(counts, umi, blocks)
        compare(f"{name}/difference", model_sums, others[name])
    return figures, genes_beyond(model_sums, others, n_replicates=settings["bootstrap"])


def _mean(pcc: NDArray[np.float64]) -> float:
    """Over genes that are not constant; NaN where all are."""
    return float(pd.Series(pcc).mean())


def unpooled_mean(sections: Mapping[str, Mapping[str, float]], prefix: str) -> dict[str, float]:
    """`<prefix>/<figure>` of one section, or of several `<prefix>/<section>/<figure>` and their mean; never pooled over sections.

    The ends of intervals, `<figure>_low` and `<figure>_high`, stay with their sections: the mean of ends is no end of an interval of the
    mean.
    """
    merged: dict[str, float] = {}
    if len(sections) > 1:
        for section, summary in sections.items():
            merged |= {f"{prefix}/{section}/{key}": value for key, value in summary.items()}
    keys: list[str] = list(dict.fromkeys(key for summary in sections.values() for key in summary))
    if len(sections) > 1:
        keys = [key for key in keys if not key.endswith(("_low", "_high"))]
    for key in keys:
        values = [summary[key] for summary in sections.values() if key in summary and math.isfinite(summary[key])]
        merged[f"{prefix}/{key}"] = float(np.mean(values)) if values else math.nan
    for key in ("n_cells", "n_genes", "n_constant_genes", "n_predictable"):
        if key in keys:
            values = [int(summary[key]) for summary in sections.values()]
            merged[f"{prefix}/{key}"] = sum(values) if key == "n_cells" else max(values)
    return merged


def mean_per_gene(tables: Sequence[pd.DataFrame]) -> pd.DataFrame:
    """The per-gene table of one section, or the unpooled mean of several (a gene is constant if it is so in all)."""
    if len(tables) == 1:
        return tables[0]
    stacked = pd.concat(tables)
    mean = stacked.drop(columns="constant").groupby("gene", sort=False).mean()
    mean["constant"] = stacked.groupby("gene", sort=False)["constant"].all()
    return mean.reset_index()[list(tables[0].columns)]


def json_ready(metrics: Mapping[str, float | str]) -> dict[str, float | str | None]:
    """Metrics as JSON has them: NaN, which JSON has not, becomes null."""
    return {
        key: None if isinstance(value, float) and not math.isfinite(value) else value
        for key, value in sorted(metrics.items())
    }
