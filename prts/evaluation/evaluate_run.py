"""How the model of a run does on its sections, and what stands beside it in metrics.json: baselines, and how bins lay on nuclei."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from prts.evaluation.comparison import fit_baselines, fit_position
from prts.evaluation.predictable import precision, predictable
from prts.evaluation.scoring import Scored, evaluate_set, score_baselines, unpooled_mean
from prts.io.spots import read_spots
from prts.platforms.base import WARN_UM

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    import numpy as np
    from numpy.typing import NDArray

    from prts.data.datamodule import PRTSDataModule
    from prts.data.nucleus_set import NucleusSet
    from prts.data.prepare import PreparedTissue
    from prts.evaluation.comparison import PredictFn
    from prts.models.predictor import Predictor
    from prts.preprocess.panel import Panel
    from prts.stopwatch import Stopwatch


def score_sections(
    model: Predictor,
    sections: Sequence[NucleusSet],
    datamodule: PRTSDataModule,
    settings: Mapping[str, Any],
    sets: Mapping[str, NDArray[np.intp]],
    watch: Stopwatch,
) -> list[Scored]:
    """Predict sections and evaluate what was predicted.

    Parameters
    ----------
    model
        A network with its output rule, or a bundle.
    sections
        Validation or test nuclei of the datamodule, section by section.
    datamodule
        Knows the prepared sections, the split and the panel.
    settings
        The `evaluation` config node.
    sets
        Positions of genes in the panel by the name of a set (`prts.evaluation.scoring.gene_sets`).
    watch
        Gets the seconds of `predict` and `evaluate`.
    """
    scored = []
    for nuclei in sections:
        section = datamodule.tissue.sections[nuclei.section].section
        shares = datamodule.split_report["sections"][nuclei.section]
        # a spot across the edge of a carved part would hold some of its nuclei but all of its measured UMIs
        whole = sum(n > 0 for n in shares.values()) == 1
        spots = read_spots(section.spots) if whole and section.spots is not None else None
        with watch("predict"):
            umi, prob = model.predict_all(nuclei.features)
        with watch("evaluate"):
            threshold = model.rule.threshold
            result = evaluate_set(nuclei, umi, prob, datamodule.panel, threshold, spots, section.mpp, settings, sets)
        scored.append(Scored(nuclei, section, spots, umi, prob, result))
    return scored


def baselines_by_section(datamodule: PRTSDataModule, *, seed: int) -> Callable[[str], dict[str, PredictFn]]:
    """Fit the baselines; what is returned gives those of a section by its name."""
    train_sets, val_sets = datamodule.train_sets, datamodule.val_sets
    fitted = fit_baselines(train_sets, val_sets, datamodule.tissue, seed=seed)

    def of_section(section: str) -> dict[str, PredictFn]:
        position = fit_position(train_sets, val_sets, section)
        return fitted if position is None else fitted | {"position": position}

    return of_section


def compare_with_baselines(
    baselines: Callable[[str], dict[str, PredictFn]],
    test: Sequence[Scored],
    panel: Panel,
    settings: Mapping[str, Any],
    sets: Mapping[str, NDArray[np.intp]],
    flagged: NDArray[np.bool_],
) -> dict[str, float]:
    """Figures of the baselines on the test sections, and how far the genes found predictable on validation are so there.

    Parameters
    ----------
    baselines
        From `baselines_by_section`.
    test
        The model's predictions of the test sections.
    panel, settings, sets
        As for `score_sections`.
    flagged
        (g,) the genes found predictable on validation.
    """
    beside, genes = {}, {}
    for scored in test:
        section = scored.nuclei.section
        beside[section], beyond = score_baselines(baselines(section), scored, panel, settings, sets)
        genes[section] = precision(flagged, predictable(beyond))
    return unpooled_mean(beside, "baseline") | unpooled_mean(genes, "test")


def registration_figures(tissue: PreparedTissue, *, moved_back: bool) -> dict[str, float | str]:
    """How far the bins of each section lay off its nuclei; a warning where that was too far and is left so."""
    found = {
        name: prepared.registration for name, prepared in tissue.sections.items() if prepared.registration is not None
    }
    figures: dict[str, float | str] = {}
    for name, section in found.items():
        figures[f"registration/{name}/confidence"] = section.confidence
        if section.measured:
            figures[f"registration/{name}/shift_um"] = section.shift_um
            figures[f"registration/{name}/rotation_deg"] = section.rotation_deg
            figures[f"registration/{name}/displacement_um"] = section.displacement_um
    off = [name for name, section in found.items() if section.displacement_um > WARN_UM]
    if off and not moved_back:
        figures["warning/registration"] = (
            f"bins of {', '.join(off)} lie over {WARN_UM:g} um off the nuclei; preprocess.register=true moves them back"
        )
    return figures
