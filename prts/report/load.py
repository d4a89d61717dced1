"""What a report is made from: a run folder, or a prediction with its image and, where there is one, its measured section."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from scipy.spatial import cKDTree

from prts.analysis.measured import measure, measure_section
from prts.data.nucleus_set import NucleusSet
from prts.data.prepare import resolve_section
from prts.data.tissue import parse_tissue
from prts.errors import InputError
from prts.evaluation.matching import MatchedNuclei
from prts.evaluation.scored_section import ScoredSection
from prts.evaluation.section_scores import PredictedCounts, SectionScores, score_section
from prts.evaluation.settings import EvaluationSettings
from prts.io.prediction import nuclei_path, read_prediction
from prts.io.slide import open_slide
from prts.preprocess.panel import Panel
from prts.report.html import Measured, Page
from prts.section import Section

if TYPE_CHECKING:
    import anndata as ad
    from numpy.typing import NDArray

logger = logging.getLogger(__name__)

PICTURE_PX = 2400


@dataclass(frozen=True)
class Source:
    """One predicted section: its file and page, and, if it was measured, what the figures of a run are drawn from."""

    path: Path
    page: Page
    scored: ScoredSection | None
    panel: Panel
    suffix: str = ""


def of_run(folder: Path, evaluation: EvaluationSettings) -> list[Source]:
    """The test sections of a run; the first has no suffix.

    Parameters
    ----------
    folder
        Of `prts train`.
    evaluation
        How intervals are made, for runs of several test sections, whose per_gene.csv is their mean.

    Raises
    ------
    InputError
        If the folder is none of a run, or a section of its config is not there any more.
    """
    from omegaconf import OmegaConf

    files = {name: folder / name for name in ("config.yaml", "predictions.h5ad", "metrics.json", "per_gene.csv")}
    files["model.json"] = folder / "model" / "model.json"
    for name, path in files.items():
        if not path.is_file():
            raise InputError(f"run={folder}: has no {name}; expected a run folder of `prts train` that ended well")
    config: Any = OmegaConf.to_container(OmegaConf.load(files["config.yaml"]), resolve=True)
    tissue = parse_tissue(config["tissue"])
    metrics, model = (json.loads(files[name].read_text(encoding="utf-8")) for name in ("metrics.json", "model.json"))
    per_gene = pd.read_csv(files["per_gene.csv"], converters={"gene": str})  # a gene may be called NAN
    found = []
    paths = [files["predictions.h5ad"], *sorted(folder.glob("predictions-*.h5ad"))]
    for path in paths:
        prediction = read_prediction(path)
        name = str(prediction.uns["prts"]["section"])
        if name not in tissue.sections:
            raise InputError(f"{path}: was made on section {name!r}, which is not in {files['config.yaml']}")
        section = resolve_section(tissue.sections[name], tissue.name, Path(config["paths"]["cache_dir"]))
        prediction.uns["prts"].setdefault("qc", config["qc"])
        matched = measure_section(prediction, nuclei_path(path), section, what=f"run={folder}").matched
        result = SectionScores({}, per_gene, None)
        if len(paths) > 1:
            result = _evaluate(matched, prediction, section, evaluation)
        found.append(
            _source(path, prediction, section, matched, result, metrics, model, path.stem.removeprefix("predictions"))
        )
    return found


def of_prediction(
    path: Path, image: Path, section_folder: Path | None, analysis: Path | None, evaluation: EvaluationSettings
) -> Source:
    """A prediction on its image.

    Parameters
    ----------
    path
        The .h5ad.
    image
        The image it was made on.
    section_folder
        The section's folder with its bins, if it was measured.
    analysis
        analysis.h5ad of `prts analyze`: its columns of nuclei can be shown on the map.
    evaluation
        How intervals are made.

    Raises
    ------
    InputError
        If a file is missing or the parts do not belong together.
    """
    prediction = read_prediction(path)
    about = prediction.uns["prts"]
    for key in ("section", "width", "height", "mpp", "threshold"):
        if key not in about:
            raise InputError(f"prediction={path}: lacks uns['prts'][{key!r}]; predict again with this prts")
    with open_slide(image, mpp=float(about["mpp"])) as slide:
        _same_size(f"image={image}", slide.width, slide.height, about)
        picture = slide.thumbnail(PICTURE_PX)
    beside = None if analysis is None else _join(prediction, analysis)
    if section_folder is None:
        return Source(path, Page(prediction, picture), None, _panel(prediction))
    measured = measure(prediction, nuclei_path(path), section_folder)
    section, matched = measured.section, measured.matched
    result = _evaluate(matched, prediction, section, evaluation)
    metrics = {f"test/{key}": value for key, value in result.summary.items()}
    source = _source(path, prediction, section, matched, result, metrics, {}, "", picture)
    return replace(source, page=replace(source.page, measured_obs=beside))


def scored_page(path: Path, scored: ScoredSection, metrics: Mapping[str, Any], model: Mapping[str, Any]) -> Page:
    """The page of a test section at the end of training, whose arrays are in memory already.

    Parameters
    ----------
    path
        The prediction as it was written: its descriptions and its picture are read from there.
    scored
        The section's nuclei, in the order of the prediction.
    metrics
        The run's.
    model
        Of the bundle.
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
    measured = Measured(scored.nuclei.counts, np.arange(len(scored.nuclei)))
    return Page(prediction, picture, measured, per_gene=scored.result.per_gene, metrics=metrics, model=model)


def _source(
    path: Path,
    prediction: ad.AnnData,
    section: Section,
    matched: MatchedNuclei,
    result: SectionScores,
    metrics: Mapping[str, Any],
    model: Mapping[str, Any],
    suffix: str,
    picture: NDArray[np.uint8] | None = None,
) -> Source:
    if picture is None:
        with section.open_slide() as slide:
            picture = slide.thumbnail(PICTURE_PX)
    # found by centroid, each matched nucleus is the nearest of the prediction's
    rows = (
        prediction.obs_names.get_indexer(matched.cell_id)
        if matched.by == "cell_id"
        else cKDTree(prediction.obsm["spatial"]).query(matched.xy_px)[1]
    )
    page = Page(
        prediction,
        picture,
        Measured(matched.measured, rows),
        per_gene=result.per_gene,
        metrics=metrics,
        model=model,
    )
    nuclei = NucleusSet(
        section=section.name,
        cell_id=matched.cell_id,
        xy_um=matched.xy_px * section.mpp,
        features=np.empty((len(rows), 0), np.float32),
        counts=matched.measured,
        total_counts=np.asarray(matched.measured.sum(axis=1)).ravel(),
        area_um2=prediction.obs["area_um2"].to_numpy()[rows],
    )
    umi, prob = _array(matched.predicted), _array(matched.predicted if matched.prob is None else matched.prob)
    return Source(path, page, ScoredSection(nuclei, section, None, umi, prob, result), _panel(prediction), suffix)


def _evaluate(
    matched: MatchedNuclei, prediction: ad.AnnData, section: Section, evaluation: EvaluationSettings
) -> SectionScores:
    threshold = float(prediction.uns["prts"]["threshold"])
    predicted = PredictedCounts(matched.predicted, matched.genes, matched.prob, threshold)
    return score_section(matched.measured, predicted, xy_um=matched.xy_px * section.mpp, settings=evaluation)


def _same_size(what: str, width: int, height: int, about: Mapping[str, Any]) -> None:
    if (width, height) != (about["width"], about["height"]):
        raise InputError(
            f"{what}: its image is {width} x {height} px, the prediction's was {about['width']} x {about['height']}; "
            "give what was predicted"
        )


def _join(prediction: ad.AnnData, path: Path) -> pd.DataFrame | None:
    """Add the columns of an analysis to the prediction's nuclei, and return those of measured.h5ad beside it, where there is one.

    Nuclei that the analysis left out have none.
    """
    obs = _obs(path)
    shared = prediction.obs_names.isin(obs.index)
    if not shared.any():
        raise InputError(
            f"analysis={path}: none of its nuclei is in the prediction; give the analysis of this prediction"
        )
    new = obs[[column for column in obs.columns if column not in prediction.obs]]
    prediction.obs = prediction.obs.join(new)
    logger.info("analysis: %d of %d nuclei, columns %s", shared.sum(), len(shared), ", ".join(map(str, new.columns)))
    measured = path.with_name("measured.h5ad")
    if not measured.is_file():
        return None
    beside = _obs(measured)
    return beside[[column for column in new.columns if column in beside]].reindex(prediction.obs_names)


def _obs(path: Path) -> pd.DataFrame:
    import h5py
    from anndata.io import read_elem

    if not path.is_file() or not h5py.is_hdf5(path):
        raise InputError(f"analysis={path}: no such .h5ad file; expected analysis.h5ad of `prts analyze`")
    with h5py.File(path) as file:
        if "obs" not in file:
            raise InputError(f"analysis={path}: has no obs; expected analysis.h5ad of `prts analyze`")
        obs: pd.DataFrame = read_elem(file["obs"])
    obs.index = obs.index.astype(str)
    return obs


def _panel(prediction: ad.AnnData) -> Panel:
    names = tuple(prediction.var_names.astype(str))
    ids = tuple(prediction.var["gene_id"].astype(str)) if "gene_id" in prediction.var else names
    return Panel(names, ids, "prediction", {})


def _array(matrix: Any) -> NDArray[np.float32]:
    return np.asarray(matrix.toarray() if hasattr(matrix, "toarray") else matrix, dtype=np.float32)
