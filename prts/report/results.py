"""What a training leaves of its test sections in the run folder: predictions, figures, pages.

The first section has the plain file names, the others have theirs in it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from prts.io.nuclei import load_nuclei
from prts.models.predict import Chunk, write_prediction
from prts.report.html import write_page
from prts.report.load import scored_page
from prts.report.run import run_figures

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from prts.data.datamodule import PRTSDataModule
    from prts.evaluation.scored_section import ScoredSection
    from prts.models.bundle import Bundle


def write_predictions(
    datamodule: PRTSDataModule, bundle: Bundle, test: Sequence[ScoredSection], folder: Path, best_epoch: int | None
) -> None:
    """predictions.h5ad and figures/, predictions-<section>.h5ad and figures beside them.

    Parameters
    ----------
    datamodule
        Knows the prepared sections and the panel.
    bundle
        What predicted.
    test
        What it predicted.
    folder
        The run folder.
    best_epoch
        The epoch whose weights the model has, marked in the training curves.
    """
    for suffix, scored in _with_suffix(test):
        prepared = datamodule.tissue.sections[scored.nuclei.section]
        polygons = load_nuclei(prepared.nuclei).set_index("cell_id").loc[scored.nuclei.cell_id].reset_index()
        ood = None if bundle.ood is None else bundle.ood.share(scored.nuclei.features)
        chunks = [Chunk(scored.umi, scored.prob, ood)]
        out = folder / f"predictions{suffix}.h5ad"
        write_prediction(out, bundle, prepared.section, polygons, chunks, store=prepared.features)
        run_figures(
            folder / "figures",
            scored,
            datamodule.panel,
            outlines=polygons.geometry.to_numpy(),
            curves=folder / "csv" / "metrics.csv",
            best_epoch=best_epoch,
            suffix=suffix,
        )


def write_pages(bundle: Bundle, test: Sequence[ScoredSection], metrics: dict[str, Any], folder: Path) -> None:
    """report.html and report-<section>.html.

    Parameters
    ----------
    bundle, test, folder
        As for `write_predictions`, after it.
    metrics
        As in metrics.json.
    """
    for suffix, scored in _with_suffix(test):
        page = scored_page(folder / f"predictions{suffix}.h5ad", scored, metrics, bundle.metadata)
        write_page(folder / f"report{suffix}.html", page)


def _with_suffix(test: Sequence[ScoredSection]) -> Iterator[tuple[str, ScoredSection]]:
    for i, scored in enumerate(test):
        yield "" if i == 0 else f"-{scored.nuclei.section}", scored
