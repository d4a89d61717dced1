"""Load what a report shows: the test sections of a run, or a prediction with its image and, if measured, its section."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import yaml
from scipy.spatial import cKDTree

from prts.data.nucleus_set import NucleusSet
from prts.data.resolve import resolve_section
from prts.data.tissue import parse_tissue
from prts.errors import InputError
from prts.evaluation.measured import measure_predicted
from prts.evaluation.scored_section import ScoredSection
from prts.evaluation.section_scores import PredictedCounts, SectionScores, score_section
from prts.evaluation.settings import EvaluationSettings
from prts.io.analysis import join_analysis, read_analysis_obs
from prts.io.nuclei import load_nuclei
from prts.io.prediction import nuclei_path, read_prediction
from prts.io.slide import open_slide
from prts.report.html import MeasuredCounts, PageContent
from prts.section import open_section_folder

if TYPE_CHECKING:
    import anndata as ad
    from numpy.typing import NDArray

    from prts.evaluation.matching import MatchedNuclei
    from prts.section import Section

logger = logging.getLogger(__name__)

PICTURE_PX = 2400
_REQUIRED = ("section", "width", "height", "mpp", "threshold")


@dataclass(frozen=True)
class ReportSource:
    """A predicted section to report on.

    Attributes
    ----------
    path
        The prediction (.h5ad).
    page
        Content of its page.
    scored
        Predicted and measured counts with their scores, for the figures; None if nothing was measured.
    suffix
        Suffix of the output file names.
    """

    path: Path
    page: PageContent
    scored: ScoredSection | None = None
    suffix: str = ""


def load_run(folder: Path, evaluation: EvaluationSettings) -> list[ReportSource]:
    """Load the test sections of a run; the first has no suffix.

    Parameters
    ----------
    folder
        Run folder of `prts train`.
    evaluation
        For runs with several test sections, which are evaluated again: their per_gene.csv holds the mean over sections.

    Raises
    ------
    InputError
        If the folder is not a finished run, or a section of its config no longer exists.
    """
    files = {name: folder / name for name in ("config.yaml", "predictions.h5ad", "metrics.json", "per_gene.csv")}
    files["model.json"] = folder / "model" / "model.json"
    for name, path in files.items():
        if not path.is_file():
            raise InputError(f"{folder}: has no {name}; expected the folder of a finished `prts train` run")
    config: Any = yaml.safe_load(files["config.yaml"].read_text(encoding="utf-8"))
    tissue = parse_tissue(config["tissue"])
    metrics, model = (json.loads(files[name].read_text(encoding="utf-8")) for name in ("metrics.json", "model.json"))
    per_gene = pd.read_csv(files["per_gene.csv"], converters={"gene": str})  # a gene may be called NAN
    paths = [files["predictions.h5ad"], *sorted(folder.glob("predictions-*.h5ad"))]
    found = []
    for path in paths:
        prediction = read_prediction(path)
        name = str(prediction.uns["prts"]["section"])
        if name not in tissue.sections:
            raise InputError(f"{path}: was predicted for section {name!r}, which is not in {files['config.yaml']}")
        section = resolve_section(tissue.sections[name], tissue.name, Path(config["paths"]["cache_dir"]))
        prediction.uns["prts"].setdefault("qc", config["qc"])
        prediction.uns["prts"].setdefault("register", config.get("preprocess", {}).get("register", False))
        matched = measure_predicted(prediction, load_nuclei(nuclei_path(path)), section).matched
        result = (
            SectionScores({}, per_gene, None)
            if len(paths) == 1
            else _evaluate(matched, prediction, section, evaluation)
        )
        page = PageContent(
            prediction,
            _picture(section),
            _measured_counts(prediction, matched),
            per_gene=result.per_gene,
            metrics=metrics,
            model=model,
            outlines=_outlines(path, prediction.obs_names),
        )
        scored = _scored(prediction, section, matched, result)
        found.append(ReportSource(path, page, scored, path.stem.removeprefix("predictions")))
    return found


def load_prediction(
    path: Path,
    image: Path,
    section_folder: Path | None = None,
    analysis: Path | None = None,
    evaluation: EvaluationSettings | None = None,
) -> ReportSource:
    """Load a prediction and its image.

    Parameters
    ----------
    path
        The prediction (.h5ad).
    image
        The image that was predicted.    section_folder
        Folder of the section with its bins, if it was measured.
    analysis
        analysis.h5ad of `prts analyze`; its columns can be shown on the map.
    evaluation
        For the confidence intervals of a measured section.

    Raises
    ------
    InputError
        If a file is missing, or the files do not belong together.
    """
    prediction = read_prediction(path)
    about = prediction.uns["prts"]
    for key in _REQUIRED:
        if key not in about:
            raise InputError(f"{path}: uns['prts'] has no {key!r}; predict again with this version of prts")
    with open_slide(image, mpp=float(about["mpp"])) as slide:
        if (slide.width, slide.height) != (about["width"], about["height"]):
            raise InputError(
                f"{image}: is {slide.width} x {slide.height} px, but the prediction was made from {about['width']} x "
                f"{about['height']} px; give the image that was predicted"
            )
        picture = slide.thumbnail(PICTURE_PX)
    measured_obs = None if analysis is None else _join_analysis(prediction, analysis)
    outlines = _outlines(path, prediction.obs_names)
    if section_folder is None:
        return ReportSource(path, PageContent(prediction, picture, outlines=outlines))
    section = open_section_folder(section_folder)
    matched = measure_predicted(prediction, load_nuclei(nuclei_path(path)), section).matched
    result = _evaluate(matched, prediction, section, evaluation or EvaluationSettings())
    page = PageContent(
        prediction,
        picture,
        _measured_counts(prediction, matched),
        measured_obs=measured_obs,
        per_gene=result.per_gene,
        metrics={f"test/{key}": value for key, value in result.summary.items()},
        outlines=outlines,
    )
    return ReportSource(path, page, _scored(prediction, section, matched, result))


def content_after_training(
    path: Path, scored: ScoredSection, metrics: Mapping[str, Any], model: Mapping[str, Any]
) -> PageContent:
    """Page content of a test section at the end of training, when its arrays are still in memory.

    Parameters
    ----------
    path
        The prediction file, from which metadata and picture are read.
    scored
        Nuclei of the section, in the order of the prediction.
    metrics
        Metrics of the run.
    model
        Metadata of the bundle.
    """
    import anndata as ad
    import h5py
    from anndata.io import read_elem

    with h5py.File(path) as file:
        parts = {key: read_elem(file[key]) for key in ("obs", "var", "uns")}
        xy = read_elem(file["obsm/spatial"])
        layers = {name: read_elem(file["layers"][name]) for name in ("lower", "upper") if name in file["layers"]}
    layers["prob"] = scored.prob
    prediction = ad.AnnData(scored.umi, **parts, obsm={"spatial": xy}, layers=layers)
    picture = parts["uns"]["spatial"][scored.section.name]["images"]["hires"]
    measured = MeasuredCounts(scored.nuclei.counts, np.arange(len(scored.nuclei)))
    return PageContent(
        prediction,
        picture,
        measured,
        per_gene=scored.result.per_gene,
        metrics=metrics,
        model=model,
        outlines=_outlines(path, prediction.obs_names),
    )


def _outlines(path: Path, cell_ids: pd.Index) -> NDArray[np.object_] | None:
    """Polygons next to a prediction, in the order of its nuclei; None if the file was not kept, or belongs to another prediction."""
    file = nuclei_path(path)
    if not file.is_file():
        logger.info("%s is not there; the page shows points instead of outlines", file.name)
        return None
    nuclei = load_nuclei(file)
    place = pd.Index(nuclei["cell_id"]).get_indexer(cell_ids)
    if (place < 0).any():
        logger.warning("%s: lacks nuclei of %s; the page shows points instead of outlines", file, path.name)
        return None
    return nuclei.geometry.to_numpy()[place]


def _picture(section: Section) -> NDArray[np.uint8]:
    with section.open_slide() as slide:
        return slide.thumbnail(PICTURE_PX)


def _rows(prediction: ad.AnnData, matched: MatchedNuclei) -> NDArray[np.intp]:
    """Row of the prediction for each matched nucleus; those matched by centroid are the nearest."""
    if matched.by == "cell_id":
        return np.asarray(prediction.obs_names.get_indexer(matched.cell_id), dtype=np.intp)
    return np.asarray(cKDTree(prediction.obsm["spatial"]).query(matched.xy_px)[1], dtype=np.intp)


def _measured_counts(prediction: ad.AnnData, matched: MatchedNuclei) -> MeasuredCounts:
    return MeasuredCounts(matched.measured, _rows(prediction, matched))


def _scored(prediction: ad.AnnData, section: Section, matched: MatchedNuclei, result: SectionScores) -> ScoredSection:
    rows = _rows(prediction, matched)
    nuclei = NucleusSet(
        section=section.name,
        cell_id=matched.cell_id,
        xy_um=matched.xy_px * section.mpp,
        features=np.empty((len(rows), 0), np.float32),
        counts=matched.measured,
        total_counts=np.asarray(matched.measured.sum(axis=1)).ravel(),
        area_um2=prediction.obs["area_um2"].to_numpy()[rows],
    )
    umi, prob = _dense(matched.predicted), _dense(matched.predicted if matched.prob is None else matched.prob)
    return ScoredSection(nuclei, section, None, umi, prob, result)


def _evaluate(
    matched: MatchedNuclei, prediction: ad.AnnData, section: Section, evaluation: EvaluationSettings
) -> SectionScores:
    threshold = float(prediction.uns["prts"]["threshold"])
    predicted = PredictedCounts(matched.predicted, matched.genes, matched.prob, threshold)
    return score_section(matched.measured, predicted, xy_um=matched.xy_px * section.mpp, settings=evaluation)


def _join_analysis(prediction: ad.AnnData, path: Path) -> pd.DataFrame | None:
    """Add the columns of an analysis to the nuclei of the prediction, and return those of measured.h5ad next to it, if any."""
    before = prediction.obs.columns
    joined = join_analysis(prediction.obs, path)
    named = _score_names(joined)
    prediction.obs = joined.rename(columns=named)
    measured = path.with_name("measured.h5ad")
    if not measured.is_file():
        return None
    of_measured = read_analysis_obs(measured)
    columns = [column for column in joined.columns if column not in before and column in of_measured]
    return of_measured[columns].reindex(prediction.obs_names).rename(columns=named)


def _score_names(obs: pd.DataFrame) -> dict[str, str]:
    """Readable names of the columns `score_<cluster>`, with the cell type of the cluster if it has one."""
    clusters = obs["cluster"].dropna().astype(str).unique() if "cluster" in obs else []
    found = {}
    for cluster in clusters:
        name = f"marker score, cluster {cluster}"
        types = obs.loc[obs["cluster"].astype(str) == cluster, "type"].dropna() if "type" in obs else ()
        found[f"score_{cluster}"] = f"{name} ({types.iloc[0]})" if len(types) else name
    return found


def _dense(matrix: Any) -> NDArray[np.float32]:
    return np.asarray(matrix.toarray() if hasattr(matrix, "toarray") else matrix, dtype=np.float32)
