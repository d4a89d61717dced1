"""Report a run or a prediction: figures, and report.html, a page that works offline."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from prts.errors import ParameterError
from prts.evaluation.settings import EvaluationSettings
from prts.io.nuclei import load_nuclei
from prts.io.outputs import check_out_folder
from prts.io.prediction import nuclei_path
from prts.report.figures import training_figure
from prts.report.html import write_page
from prts.report.load import ReportSource, load_prediction, load_run
from prts.report.run_index import write_index
from prts.report.section_figures import Region, prediction_figures, scored_figures


@dataclass(frozen=True)
class ReportSettings:
    """What a report shows.

    Attributes
    ----------
    genes
        Genes on the map: how many (best predicted first), or their names, which come first here and in the figures. None chooses 200, or
        more in small sections.
    box_px
        Region to enlarge in the figures, x0, y0, x1, y1 in full-resolution pixels; None picks one where expression varies.
    second
        Another image with the same field of view, such as registered IHC, to show next to the region.
    evaluation
        Resampling for confidence intervals.
    """

    genes: int | Sequence[str] | None = None
    box_px: Sequence[float] | None = None
    second: Path | None = None
    evaluation: EvaluationSettings = field(default_factory=EvaluationSettings)

    def __post_init__(self) -> None:
        if self.box_px is not None and len(self.box_px) != 4:
            raise ParameterError("", "region", f"{list(self.box_px)} must be four numbers: x0, y0, x1, y1 in px")

    @property
    def region(self) -> Region:
        """What the figures show enlarged."""
        named = () if self.genes is None or isinstance(self.genes, int) else tuple(self.genes)
        return Region(self.box_px, self.second, named)


def report_run(run: str | Path, out: str | Path | None = None, *, settings: ReportSettings | None = None) -> list[Path]:
    """Draw the figures of a training run and write its page.

    Parameters
    ----------
    run
        Run folder of `prts train`.
    out
        Output folder; the run folder by default.
    settings
        What to show.

    Returns
    -------
    The pages: report.html and, for further test sections, report-<section>.html.

    Raises
    ------
    InputError
        If the run is not finished, or its sections no longer exist.

    Examples
    --------
    >>> report_run("outputs/demo/make")  # doctest: +SKIP
    """
    run, settings = Path(run), settings or ReportSettings()
    out = run if out is None else check_out_folder(out, "report.html and figures")
    sources = load_run(run, settings.evaluation)
    pages = [_report_scored(out, source, settings) for source in sources]
    if out == run and sources:
        write_index(run, sources[0].page.metrics or {})
    training_figure(run, out / "figures")
    return pages


def report_prediction(
    prediction: str | Path,
    image: str | Path,
    out: str | Path,
    *,
    section: str | Path | None = None,
    analysis: str | Path | None = None,
    settings: ReportSettings | None = None,
) -> Path:
    """Draw the figures of a prediction and write its page.

    Parameters
    ----------
    prediction
        Prediction (.h5ad), with its polygons next to it (.nuclei.parquet).
    image
        The image that was predicted.
    out
        Output folder.
    section
        Folder of the predicted section with its bins. Page and figures then show measured and predicted counts, and scores.
    analysis
        analysis.h5ad of `prts analyze`, to show its clusters and cell types on the map.
    settings
        What to show.

    Returns
    -------
    The page, report.html.

    Raises
    ------
    InputError
        If a file is missing, or the files do not belong together.

    Examples
    --------
    >>> report_prediction("slide.h5ad", "slide.svs", "report/", settings=ReportSettings(genes=["EPCAM"]))  # doctest: +SKIP
    """
    settings, out, image = settings or ReportSettings(), check_out_folder(out, "report.html and figures"), Path(image)
    section, analysis = (None if path is None else Path(path) for path in (section, analysis))
    source = load_prediction(Path(prediction), image, section, analysis, settings.evaluation)
    if source.scored is not None:
        return _report_scored(out, source, settings)
    nuclei = source.page.prediction
    outlines = load_nuclei(nuclei_path(source.path)).set_index("cell_id").geometry.loc[nuclei.obs_names].to_numpy()
    prediction_figures(out / "figures", nuclei, image, outlines, region=settings.region)
    return write_page(out / "report.html", source.page, genes=settings.genes)


def page_of_prediction(prediction: Path, image: Path, out: Path) -> Path:
    """Write the page of a prediction alone, without figures.

    Parameters
    ----------
    prediction
        Prediction (.h5ad).
    image
        The image that was predicted.
    out
        The .html file to write.
    """
    return write_page(out, load_prediction(prediction, image).page)


def _report_scored(out: Path, source: ReportSource, settings: ReportSettings) -> Path:
    assert source.scored is not None
    outlines = load_nuclei(nuclei_path(source.path)).set_index("cell_id").geometry
    scored_figures(
        out / "figures",
        source.scored,
        source.page.prediction.var_names.astype(str).tolist(),
        outlines.loc[source.scored.nuclei.cell_id.astype(object)].to_numpy(),
        suffix=source.suffix,
        region=settings.region,
    )
    return write_page(out / f"report{source.suffix}.html", source.page, genes=settings.genes)
