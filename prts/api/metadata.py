"""The metadata of a trained model in `model.json`, apart from its network, likelihood and output rule."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from prts import provenance
from prts.evaluation.predictable import predictable
from prts.evaluation.summaries import mean_per_gene
from prts.io.cache import fingerprint
from prts.io.nuclei import load_nuclei
from prts.models.predictor import LIMIT_MULTIPLE, highest_counts
from prts.models.scale import describe_nuclei
from prts.platforms.base import HasOutlines
from prts.preprocess.stains.base import sample_slides, statistics
from prts.segmentation.segment import describe_segmenter

if TYPE_CHECKING:
    from geopandas import GeoDataFrame
    from numpy.typing import NDArray

    from prts.api.training_plan import TrainingPlan
    from prts.data.datamodule import PRTSDataModule
    from prts.data.prepare import PreparedTissue
    from prts.evaluation.scored_section import ScoredSection
    from prts.models.uncertainty import CountIntervals


def bundle_metadata(
    plan: TrainingPlan,
    datamodule: PRTSDataModule,
    validation: Sequence[ScoredSection],
    beyond: Mapping[str, NDArray[np.bool_]],
    intervals: CountIntervals,
) -> dict[str, Any]:
    """The `metadata` of `prts.models.bundle.save_bundle` for the model of a run.

    Parameters
    ----------
    plan
        The training plan.
    datamodule
        The data it was fitted on.
    validation
        Predictions of the validation nuclei.
    beyond
        Genes, (g,), predicted better there than chance and every baseline (`prts.evaluation.predictable.validated_genes`).
    intervals
        Of the counts, calibrated there.
    """
    preparation, recipe = plan.preparation, plan.recipe
    encoder = preparation.encoder.settings()
    weights = getattr(preparation.encoder, "weights", None)
    per_gene = mean_per_gene([scored.result.per_gene for scored in validation])
    return {
        "encoder": encoder,
        "encoder_weights": None if weights is None else str(Path(weights).resolve()),
        "mpp": encoder["mpp"],
        "tile": encoder["tile"],
        "pooling": encoder["pooling"],
        "input": {"use": list(datamodule.use), "widths": datamodule.feature_widths, "scale": datamodule.scale},
        "baseline": recipe.baseline,
        "optimizer": None if recipe.baseline else _described(recipe.optimizer),
        "segmentation": _segmentation(plan, datamodule),
        "qc": preparation.qc.settings(),
        "register": preparation.register,
        "counting": preparation.counting.settings(),
        "tissue": datamodule.tissue.name,
        "species": datamodule.tissue.species,
        "train_sections": _train_sections(datamodule),
        "skipped_sections": dict(datamodule.tissue.skipped),
        "split": datamodule.split_report,
        "seed": recipe.seed,
        "stain": _colors(datamodule),
        "panel": {"method": datamodule.panel.method, **datamodule.panel.steps},
        "validation": {
            "pcc": per_gene["pcc"].tolist(),
            "ceiling": per_gene["ceiling"].tolist(),
            "predictable": predictable(beyond).tolist(),
            "beyond": {name: np.flatnonzero(flags).tolist() for name, flags in beyond.items()},
        },
        "intervals": intervals.settings(),
        "limits": {"multiple": LIMIT_MULTIPLE, "highest": highest_counts(datamodule.train_sets).tolist()},
        "nuclei": _nuclei(datamodule),
        "provenance": run_provenance(plan.config, datamodule.tissue),
    }


def run_provenance(config: Mapping[str, Any], tissue: PreparedTissue) -> dict[str, Any]:
    """Code, config and data behind the model, without paths on this machine."""
    kept = provenance.portable(config)
    return {
        "code": provenance.code(),
        "config": kept,
        "config_fingerprint": fingerprint(kept),
        "data": {name: provenance.section_files(part.section) for name, part in tissue.sections.items()},
    }


def _described(factory: Callable[..., Any]) -> dict[str, Any]:
    """Name and arguments of a partial such as `partial(torch.optim.AdamW, lr=0.003)`."""
    if isinstance(factory, partial):
        return {"name": factory.func.__name__, **factory.keywords}
    return {"name": getattr(factory, "__name__", type(factory).__name__)}


def _train_sections(datamodule: PRTSDataModule) -> list[str]:
    return sorted({nuclei.section for nuclei in datamodule.train_sets})


def _colors(datamodule: PRTSDataModule) -> dict[str, Any]:
    """The stain of the training sections' tissue, for every method that can match a new slide to it."""
    with ExitStack() as stack:
        sections = (datamodule.tissue.sections[name].section for name in _train_sections(datamodule))
        return statistics(sample_slides(stack.enter_context(section.open_slide()) for section in sections))


def _nuclei(datamodule: PRTSDataModule) -> dict[str, Any]:
    """Size and density of all nuclei of the training and validation sections, including those that fail quality control."""
    names = {part.section for part in (*datamodule.train_sets, *datamodule.val_sets)}
    prepared = {name: datamodule.tissue.sections[name] for name in sorted(names)}
    mpp = {name: part.section.mpp for name, part in prepared.items()}
    return describe_nuclei(_InTurn({name: part.nuclei for name, part in prepared.items()}), mpp)


class _InTurn(Mapping[str, "GeoDataFrame"]):
    """Nuclei by section, read whenever they are asked for."""

    def __init__(self, paths: Mapping[str, Path]) -> None:
        self._paths = paths

    def __getitem__(self, name: str) -> GeoDataFrame:
        return load_nuclei(self._paths[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._paths)

    def __len__(self) -> int:
        return len(self._paths)


def _segmentation(plan: TrainingPlan, datamodule: PRTSDataModule) -> dict[str, Any]:
    """The segmenter of the training nuclei by its registered name, so that prediction finds nuclei in the same way."""
    sections = datamodule.tissue.sections
    given = (sections[name].section for name in _train_sections(datamodule))
    if plan.preparation.prefer_given and any(
        section.nuclei or isinstance(section.measurement, HasOutlines) for section in given
    ):
        return {"name": "given", "arguments": {}}
    return describe_segmenter(plan.preparation.segmenter)
