"""Predictable genes: genes that a model predicts better than chance and simple baselines on validation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from prts.evaluation.bootstrap import BlockSums, block_sums, genes_above, spatial_blocks

if TYPE_CHECKING:
    from prts.evaluation.baselines import PredictFn
    from prts.evaluation.scored_section import ScoredSection
    from prts.evaluation.settings import EvaluationSettings

Flags = NDArray[np.bool_]

ZERO = "zero"
# Ridge regression has the same input as the model, and context sees tissue that the model may not see. A gene that a model and one of them
# predict equally well is still predictable.
RIVALS = ("ridge", "context")


def genes_beyond(model: BlockSums, baselines: Mapping[str, BlockSums], *, n_replicates: int) -> dict[str, Flags]:
    """Find the genes whose PCC is above 0, and above that of each baseline, by 95% intervals over resampled blocks.

    Parameters
    ----------
    model, baselines
        Block sums of the same nuclei in the same blocks.
    n_replicates
        Resamples of the blocks, the same for model and baseline.

    Returns
    -------
    (n_genes,) flags under `zero` and the names of the baselines.
    """
    beyond = {ZERO: genes_above(model, n_replicates=n_replicates)}
    return beyond | {name: genes_above(model, other, n_replicates=n_replicates) for name, other in baselines.items()}


def validated_genes(
    baselines: Sequence[Mapping[str, PredictFn]], validation: Sequence[ScoredSection], settings: EvaluationSettings
) -> dict[str, Flags]:
    """`genes_beyond` over validation sections: a gene must be above a baseline in each of them.

    Parameters
    ----------
    baselines
        Of each section.
    validation
        The model's predictions of the sections, scored.
    settings
        Of the intervals.
    """
    merged: dict[str, Flags] = {}
    for scored, rivals in zip(validation, baselines, strict=True):
        nuclei = scored.nuclei
        blocks, _ = spatial_blocks(nuclei.xy_um, settings.block_um)
        assert scored.result.sums is not None  # nuclei of a run have coordinates
        others = {name: block_sums(nuclei.counts, predict(nuclei), blocks) for name, predict in rivals.items()}
        for name, flags in genes_beyond(scored.result.sums, others, n_replicates=settings.bootstrap).items():
            merged[name] = merged[name] & flags if name in merged else flags
    return merged


def predictable(beyond: Mapping[str, Flags]) -> Flags:
    """Genes above 0 and above every baseline with less input than the model, (n_genes,)."""
    flags: Flags = np.logical_and.reduce([flags for name, flags in beyond.items() if name not in RIVALS])
    return flags


def precision(flagged: Flags, holds: Flags) -> dict[str, float]:
    """Number of flagged genes, and the share of them that is also predictable on another section (NaN if none is flagged)."""
    n = int(flagged.sum())
    return {
        "n_predictable": n,
        "predictable_precision": float((flagged & holds).sum() / n) if n else float("nan"),
    }
