"""Predict the nuclei of prepared sections and score the predictions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from prts.data.on_disk import on_disk, scratch, with_counts_in_memory
from prts.evaluation.section_scores import PredictedCounts, SectionScores, score_section
from prts.evaluation.settings import EvaluationSettings
from prts.evaluation.spot_scores import spot_pcc
from prts.io.spots import read_spots
from prts.progress import of_section, working

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from prts.data.datamodule import PRTSDataModule
    from prts.data.nucleus_set import NucleusSet
    from prts.io.spots import Spots
    from prts.models.output import OutputRule
    from prts.preprocess.panel import Panel
    from prts.section import Section
    from prts.stopwatch import Stopwatch


_CHUNK = 4096


class PredictsNuclei(Protocol):
    """A model that can be scored."""

    @property
    def rule(self) -> OutputRule:
        """Its output rule."""

    def predict_all(self, features: NDArray[np.float32]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """UMI and P(expressed), (n, g) each, from features (n, d)."""


@dataclass(frozen=True)
class ScoredSection:
    """The nuclei of a section, their prediction, and its scores. `umi` and `prob` are (n, g) float32."""

    nuclei: NucleusSet
    section: Section
    spots: Spots | None
    umi: NDArray[np.float32]
    prob: NDArray[np.float32]
    result: SectionScores


@dataclass(frozen=True)
class Scoring:
    """Settings of the scores that all sections of a run share.

    Parameters
    ----------
    panel
        Names and ids of the genes.
    gene_sets
        Positions of genes in the panel by the name of a set (`prts.evaluation.gene_sets.gene_sets`).
    settings
        Of the intervals.
    """

    panel: Panel
    gene_sets: Mapping[str, NDArray[np.intp]] = field(default_factory=dict)
    settings: EvaluationSettings = field(default_factory=EvaluationSettings)


def score_sections(
    model: PredictsNuclei,
    sections: Sequence[NucleusSet],
    datamodule: PRTSDataModule,
    scoring: Scoring,
    watch: Stopwatch,
) -> list[ScoredSection]:
    """Predict sections and score the predictions, also against spots if measured.

    Parameters
    ----------
    model
        A network with its output rule, or a bundle.
    sections
        Validation or test nuclei of the datamodule, section by section.
    datamodule
        Knows the prepared sections and the split.
    scoring
        Settings that the sections share.
    watch
        Adds up the seconds of `predict` and `evaluate`.
    """
    scored = []
    for nuclei in sections:
        section = datamodule.tissue.sections[nuclei.section].section
        shares = datamodule.split_report["sections"][nuclei.section]
        # a spot across the edge of a split part would hold only some of its nuclei but all of its measured UMI
        whole = sum(n > 0 for n in shares.values()) == 1
        spots = read_spots(section.spots) if whole and section.spots is not None else None
        with watch("predict"):
            umi, prob = _predicted(model, nuclei)
            nuclei = with_counts_in_memory(nuclei)
        with watch("evaluate"), of_section(nuclei.section), working("scores"):
            predicted = PredictedCounts(umi, scoring.panel.genes, prob, model.rule.threshold)
            result = score_section(
                nuclei.counts, predicted, xy_um=nuclei.xy_um, gene_sets=scoring.gene_sets, settings=scoring.settings
            )
            if spots is not None:
                xy_px, panel = nuclei.xy_um / section.mpp, scoring.panel
                result.summary["spot_pcc_mean"], _ = spot_pcc(umi, xy_px, spots, panel.genes, panel.gene_ids)
        scored.append(ScoredSection(nuclei, section, spots, umi, prob, result))
    return scored


def _predicted(model: PredictsNuclei, nuclei: NucleusSet) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """UMI and P(expressed), on disk if the features are."""
    if not on_disk(nuclei):
        return model.predict_all(nuclei.features)
    umi, prob = scratch(nuclei), scratch(nuclei)
    for start in range(0, len(nuclei), _CHUNK):
        rows = slice(start, start + _CHUNK)
        umi[rows], prob[rows] = model.predict_all(nuclei.features[rows])
    return umi, prob
