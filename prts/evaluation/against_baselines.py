"""Compare a model with the baselines on the same nuclei."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

import numpy as np
import pandas as pd

from prts.evaluation.baselines import FittedBaseline, fit_baselines, fit_position, refuse_leakage
from prts.evaluation.bootstrap import BlockSums, block_sums, mean_pcc_difference, spatial_blocks
from prts.evaluation.expression import pearson_per_gene
from prts.evaluation.predictable import genes_beyond, precision, predictable
from prts.evaluation.spot_scores import sum_in_spots
from prts.evaluation.summaries import unpooled_mean
from prts.models.shipped_baselines import ShippedBaselines

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from prts.data.datamodule import PRTSDataModule
    from prts.data.nucleus_set import NucleusSet
    from prts.evaluation.baselines import PredictFn
    from prts.evaluation.scored_section import ScoredSection, Scoring

SHIPPED = ("gene_mean", "colour", "context", "morphology", "ridge")
"""Baselines that travel with a model; `position` and `permuted` say nothing about another slide."""


@dataclass(frozen=True)
class RunBaselines:
    """The baselines of a run.

    Parameters
    ----------
    fitted
        The baselines that can predict any section.
    train, val
        Nuclei that `position` is fitted on, section by section.
    """

    fitted: Mapping[str, FittedBaseline]
    train: Sequence[NucleusSet]
    val: Sequence[NucleusSet]

    @classmethod
    def fit(cls, datamodule: PRTSDataModule, *, seed: int) -> Self:
        """Fit them on the training nuclei of a run."""
        train, val = datamodule.train_sets, datamodule.val_sets
        return cls(fit_baselines(train, val, datamodule.tissue, seed=seed), train, val)

    def __call__(self, section: str) -> dict[str, PredictFn]:
        """Baselines of a section by its name."""
        position = fit_position(self.train, self.val, section)
        return {**self.fitted} if position is None else {**self.fitted, "position": position}

    def shipped(self) -> ShippedBaselines:
        """The baselines to store in the bundle, which apply to any later slide."""
        return ShippedBaselines.from_fitted({name: self.fitted[name].linear for name in SHIPPED if name in self.fitted})


def compare_with_baselines(
    baselines: Callable[[str], dict[str, PredictFn]],
    test: Sequence[ScoredSection],
    scoring: Scoring,
    flagged: NDArray[np.bool_],
) -> dict[str, float]:
    """Score the baselines on the test sections, and count how many genes predictable on validation are also predictable on test.

    Parameters
    ----------
    baselines
        Of each section.
    test
        The model's predictions of the test sections.
    scoring
        As for `prts.evaluation.scored_section.score_sections`.
    flagged
        (g,) genes found predictable on validation.
    """
    figures, genes = {}, {}
    for scored in test:
        section = scored.nuclei.section
        figures[section], beyond = score_baselines(baselines(section), scored, scoring)
        genes[section] = precision(flagged, predictable(beyond))
    return unpooled_mean(figures, "baseline") | unpooled_mean(genes, "test")


def score_baselines(
    baselines: Mapping[str, PredictFn], model: ScoredSection, scoring: Scoring
) -> tuple[dict[str, float], dict[str, NDArray[np.bool_]]]:
    """Score each baseline on the nuclei that the model was scored on.

    Parameters
    ----------
    baselines
        By name.
    model
        The model's prediction of the section.
    scoring
        As for `prts.evaluation.scored_section.score_sections`.

    Returns
    -------
    figures
        `<name>/pcc_mean` and others. `<name>/difference` is the model's mean PCC minus the baseline's, with `_low` and `_high` from
        resampled blocks, the same for both. `<name>/spot_difference` is the difference over spots, if the section has measured spots, from
        resampled spots, which are treated as independent although neighbors are not quite.
    beyond
        Genes in which the model is above 0 and above each baseline (`prts.evaluation.predictable.genes_beyond`).

    Raises
    ------
    RuntimeError
        If the baseline `permuted` predicts the test (`prts.evaluation.baselines.refuse_leakage`).
    """
    counts = model.nuclei.counts
    n_replicates = scoring.settings.bootstrap
    blocks, _ = spatial_blocks(model.nuclei.xy_um, scoring.settings.block_um)
    assert model.result.sums is not None  # nuclei of a run always have coordinates
    model_spots = _spot_sums(model.umi, model, scoring)
    figures: dict[str, float] = {}
    others: dict[str, BlockSums] = {}
    for name, predict in baselines.items():
        umi = predict(model.nuclei)
        pcc = pearson_per_gene(counts, umi)
        if name == "permuted":
            refuse_leakage(pcc, model.nuclei.section)
        figures |= {f"{name}/pcc_mean": _mean(pcc), f"{name}/pcc_median": float(pd.Series(pcc).median())}
        figures |= {f"{name}/{genes}_pcc_mean": _mean(pcc[members]) for genes, members in scoring.gene_sets.items()}
        spots = _spot_sums(umi, model, scoring)
        if model_spots is not None and spots is not None:
            figures[f"{name}/spot_pcc_mean"] = float(spots.mean_pcc(np.ones((1, len(spots.n))))[0])
            figures |= _difference(f"{name}/spot_difference", model_spots, spots, n_replicates)
        others[name] = block_sums(counts, umi, blocks)
        figures |= _difference(f"{name}/difference", model.result.sums, others[name], n_replicates)
    return figures, genes_beyond(model.result.sums, others, n_replicates=n_replicates)


def _spot_sums(umi: NDArray[np.float32], model: ScoredSection, scoring: Scoring) -> BlockSums | None:
    """Sums for the PCC over spots, with each spot as one block; None without measured spots."""
    if model.spots is None:
        return None
    xy_px, panel = model.nuclei.xy_um / model.section.mpp, scoring.panel
    measured, summed = sum_in_spots(umi, xy_px, model.spots, panel.genes, panel.gene_ids)
    return block_sums(measured, summed, np.arange(measured.shape[0]))


def _difference(key: str, ours: BlockSums, theirs: BlockSums, n_replicates: int) -> dict[str, float]:
    """Difference in mean PCC and the ends of its interval."""
    interval = mean_pcc_difference(ours, theirs, n_replicates=n_replicates)
    return {f"{key}{end}": value for end, value in zip(("", "_low", "_high"), interval, strict=True)}


def _mean(pcc: NDArray[np.float64]) -> float:
    """Mean over genes that are not constant; NaN if all are."""
    return float(pd.Series(pcc).mean())
