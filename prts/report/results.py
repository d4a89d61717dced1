"""Write the test sections of a training run into the run folder: predictions, figures and pages.

Files of the first section have plain names; files of further sections end in the section's name.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from prts.io.nuclei import load_nuclei
from prts.models.predict import Chunk, write_prediction
from prts.models.predictor import CHUNK
from prts.report.figures import training_figure
from prts.report.html import write_page
from prts.report.load import content_after_training
from prts.report.section_figures import scored_figures

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from prts.data.datamodule import PRTSDataModule
    from prts.evaluation.scored_section import ScoredSection
    from prts.models.bundle import Bundle


def write_predictions(
    datamodule: PRTSDataModule, bundle: Bundle, test: Sequence[ScoredSection], folder: Path, best_epoch: int | None
) -> None:
    """Write predictions.h5ad and figures/; further sections go to predictions-<section>.h5ad.

    Parameters
    ----------
    datamodule
        Prepared sections and panel.
    bundle
        The model that predicted.
    test
        Its predictions.
    folder
        Run folder.
    best_epoch
        Epoch whose weights were kept, to mark in the training curves.
    """
    for suffix, scored in _with_suffix(test):
        prepared = datamodule.tissue.sections[scored.nuclei.section]
        cell_id = np.asarray(scored.nuclei.cell_id, dtype=object)
        polygons = load_nuclei(prepared.nuclei).set_index("cell_id").loc[cell_id].reset_index(names="cell_id")
        ood = None if bundle.ood is None else bundle.ood.share(datamodule.as_read([scored.nuclei])[0].features)
        chunks = _chunks(scored, ood)
        out = folder / f"predictions{suffix}.h5ad"
        write_prediction(out, bundle, prepared.section, polygons, chunks, store=prepared.features)
        scored_figures(folder / "figures", scored, datamodule.panel.genes, polygons.geometry.to_numpy(), suffix=suffix)
    training_figure(folder, folder / "figures", best_epoch=best_epoch)


def _chunks(scored: ScoredSection, ood: NDArray[np.float32] | None) -> Iterator[Chunk]:
    """The prediction in small parts: what is computed for the file takes several times the memory of its part."""
    for start in range(0, len(scored.umi), CHUNK):
        rows = slice(start, start + CHUNK)
        yield Chunk(scored.umi[rows], scored.prob[rows], None if ood is None else ood[rows])


def write_pages(bundle: Bundle, test: Sequence[ScoredSection], metrics: dict[str, Any], folder: Path) -> None:
    """Write report.html and report-<section>.html, after `write_predictions`.

    Parameters
    ----------
    bundle, test, folder
        As for `write_predictions`.
    metrics
        Content of metrics.json.
    """
    for suffix, scored in _with_suffix(test):
        page = content_after_training(folder / f"predictions{suffix}.h5ad", scored, metrics, bundle.metadata)
        write_page(folder / f"report{suffix}.html", page)


def _with_suffix(test: Sequence[ScoredSection]) -> Iterator[tuple[str, ScoredSection]]:
    for i, scored in enumerate(test):
        yield "" if i == 0 else f"-{scored.nuclei.section}", scored
