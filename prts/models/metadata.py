"""What model.json says of a model beside what its network, scaler and output rule say of themselves."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from hydra.utils import instantiate

from prts import provenance
from prts.evaluation.predictable import predictable
from prts.evaluation.summaries import mean_per_gene
from prts.io.cache import fingerprint
from prts.io.nuclei import load_nuclei
from prts.models.scale import describe_nuclei
from prts.preprocess.stain import sample_slides, statistics

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    from prts.data.datamodule import PRTSDataModule
    from prts.data.prepare import PreparedTissue
    from prts.evaluation.scored_section import ScoredSection
    from prts.models.uncertainty import CountIntervals


def bundle_metadata(
    config: Mapping[str, Any],
    datamodule: PRTSDataModule,
    validation: Sequence[ScoredSection],
    beyond: Mapping[str, NDArray[np.bool_]],
    intervals: CountIntervals,
) -> dict[str, Any]:
    """The `metadata` of `prts.models.bundle.save_bundle` for the model of a run.

    Parameters
    ----------
    config
        The run's whole config as plain containers.
    datamodule
        What the model was fitted on.
    validation
        Its predictions of the validation nuclei.
    beyond
        Genes, (g,), in which it was better there than nothing and than each baseline (`prts.evaluation.predictable.validated_genes`).
    intervals
        Of the counts, calibrated there.
    """
    encoder = instantiate(config["encoder"]).settings()
    weights = config["encoder"].get("weights")
    is_network = not config["model"]["baseline"]
    per_gene = mean_per_gene([scored.result.per_gene for scored in validation])
    return {
        "encoder": encoder,
        "encoder_weights": None if weights is None else str(Path(weights).resolve()),
        "mpp": encoder["mpp"],
        "tile": encoder["tile"],
        "pooling": encoder["pooling"],
        "input": {"use": list(datamodule.use), "widths": datamodule.feature_widths},
        "baseline": config["model"]["baseline"],
        "optimizer": config["model"]["optimizer"] if is_network else None,
        "segmentation": _segmentation(dict(config["segmentation"]), datamodule),
        "qc": config["qc"],
        "tissue": config["tissue"]["name"],
        "species": config["tissue"]["species"],
        "train_sections": _train_sections(datamodule),
        "split": datamodule.split_report,
        "seed": config["seed"],
        "stain": _colours(datamodule),
        "panel": {"method": datamodule.panel.method, **datamodule.panel.steps},
        "validation": {
            "pcc": per_gene["pcc"].tolist(),
            "ceiling": per_gene["ceiling"].tolist(),
            "predictable": predictable(beyond).tolist(),
            "beyond": {name: np.flatnonzero(flags).tolist() for name, flags in beyond.items()},
        },
        "intervals": intervals.settings(),
        "nuclei": _nuclei(datamodule),
        "provenance": run_provenance(config, datamodule.tissue),
    }


def run_provenance(config: Mapping[str, Any], tissue: PreparedTissue) -> dict[str, Any]:
    """Code, config and data that made the model; places on this machine are left out."""
    kept = {key: value for key, value in config.items() if key not in ("paths", "logger", "resume")}
    return {
        "code": provenance.code(),
        "config": kept,
        "config_fingerprint": fingerprint(kept),
        "data": {name: provenance.section_files(part.section) for name, part in tissue.sections.items()},
    }


def _train_sections(datamodule: PRTSDataModule) -> list[str]:
    return sorted({nuclei.section for nuclei in datamodule.train_sets})


def _colours(datamodule: PRTSDataModule) -> dict[str, Any]:
    """How the tissue of the training sections is stained, for every method that can match a new slide to it."""
    with ExitStack() as stack:
        sections = (datamodule.tissue.sections[name].section for name in _train_sections(datamodule))
        return statistics(sample_slides(stack.enter_context(section.open_slide()) for section in sections))


def _nuclei(datamodule: PRTSDataModule) -> dict[str, Any]:
    """Size and density of all nuclei of the training and validation sections, with those that fail quality control, as in `predict`."""
    names = {part.section for part in (*datamodule.train_sets, *datamodule.val_sets)}
    prepared = {name: datamodule.tissue.sections[name] for name in sorted(names)}
    mpp = {name: part.section.mpp for name, part in prepared.items()}
    return describe_nuclei({name: load_nuclei(part.nuclei) for name, part in prepared.items()}, mpp)


def _segmentation(node: dict[str, Any], datamodule: PRTSDataModule) -> dict[str, Any]:
    """How the training nuclei were found, so that prediction finds nuclei in the same way."""
    prefer_given = node.pop("prefer_given")
    if prefer_given and any(datamodule.tissue.sections[name].section.nuclei for name in _train_sections(datamodule)):
        return {"name": "given", "arguments": {}}
    return {"name": str(node.pop("_target_")).rsplit(".", 1)[-1].lower(), "arguments": node}
