"""Score the baselines stored with a model on a section that was predicted later."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import pandas as pd
import shapely

from prts.api.nuclei_source import uses_bins
from prts.api.predict import EncoderRuntime, build_encoder
from prts.data.nucleus_set import NucleusSet
from prts.data.prepare import prepare_colour, prepare_context, prepare_input
from prts.data.slide_scale import FEWEST
from prts.evaluation.against_baselines import score_baselines
from prts.evaluation.scored_section import ScoredSection, Scoring
from prts.features.colour import colour_tile
from prts.features.feature_reader import InputReader
from prts.features.morphology import morphology
from prts.features.store import read_features
from prts.io.orientation import Orientation
from prts.io.spots import read_spots
from prts.preprocess.panel import Panel
from prts.preprocess.stains.base import match_stain

if TYPE_CHECKING:
    from anndata import AnnData
    from geopandas import GeoDataFrame
    from numpy.typing import NDArray

    from prts.evaluation.matching import MatchedNuclei
    from prts.evaluation.section_scores import SectionScores
    from prts.evaluation.settings import EvaluationSettings
    from prts.models.bundle import Bundle
    from prts.section import Section

    Floats = NDArray[np.float32]

logger = logging.getLogger(__name__)


class TrainedModel(Protocol):
    """What is asked of the model: `prts.Model` has it."""

    runtime: EncoderRuntime

    @property
    def bundle(self) -> Bundle:
        """The trained network."""
        ...


@dataclass(frozen=True)
class PredictedSection:
    """A prediction and the section it was compared with.

    Parameters
    ----------
    prediction, section, polygons
        The prediction, its section, and all its nuclei.
    matched, result
        The nuclei that were compared, and the model's scores.
    """

    prediction: AnnData
    section: Section
    polygons: GeoDataFrame
    matched: MatchedNuclei
    result: SectionScores


def baseline_scores(
    model: TrainedModel, compared: PredictedSection, settings: EvaluationSettings, cache: Path
) -> dict[str, float]:
    """Score a model's baselines on the compared nuclei, with differences from the model and their intervals.

    The slide is read as in the prediction (stain, rotation, flip). Features come from the cache or are extracted.

    Parameters
    ----------
    model
        The model that predicted.
    compared
        The prediction and the model's scores.
    settings
        Blocks and replicates of the intervals.
    cache
        Folder of the cache.

    Returns
    -------
    `baseline/<name>/pcc_mean`, `baseline/<name>/difference`, ...; empty if the model has no baselines.
    """
    bundle = model.bundle
    if bundle.baselines is None:
        return {}
    section, matched = compared.section, compared.matched
    features = _Features(bundle, model.runtime, compared, cache)
    readers: dict[str, Callable[[], Floats]] = {
        "gene_mean": features.nothing,
        "colour": features.colour,
        "context": features.context,
        "morphology": features.morphology,
    }
    if features.knows_input:
        readers["ridge"] = features.model_input
    else:
        logger.info("ridge: not compared, since only a region was predicted and this model matches whole slides")
    columns = [bundle.genes.index(gene) for gene in matched.genes]
    baselines = {
        name: _constant(bundle.baselines.predict(name, readers[name]())[:, columns])
        for name in bundle.baselines.widths
        if name in readers
    }
    scored = ScoredSection(
        _nuclei(section, matched),
        section,
        None if section.spots is None else read_spots(section.spots),
        _dense(matched.predicted),
        _dense(matched.predicted if matched.prob is None else matched.prob),
        compared.result,
    )
    panel = Panel(tuple(matched.genes), tuple(bundle.gene_ids[column] for column in columns), "", {})
    figures, _ = score_baselines(baselines, scored, Scoring(panel, settings=settings))
    return {f"baseline/{key}": value for key, value in figures.items()}


class _Features:
    """Features of the compared nuclei for each baseline, (n, d) each, with the slide read as in the prediction."""

    def __init__(self, bundle: Bundle, runtime: EncoderRuntime, compared: PredictedSection, cache: Path) -> None:
        about, section = compared.prediction.uns["prts"], compared.section
        orientation = Orientation(int(about["orientation"]["rotate"]), str(about["orientation"]["flip"]))
        self._bundle, self._runtime, self._folder = bundle, runtime, cache / "predict" / section.name
        self._seen = match_stain(section.reoriented(orientation), str(about["stain"]), bundle.metadata.get("stain"))
        self._everywhere = orientation.nuclei(compared.polygons, section.file_size)
        self._ids = compared.matched.cell_id
        # a region is matched by the mean and spread of its slide, which the prediction does not hold
        self.knows_input = bundle.slide_scale is None or "roi" not in about
        self._rows = pd.Index(self._everywhere["cell_id"]).get_indexer(self._ids)
        self._nuclei = self._everywhere.iloc[self._rows].reset_index(drop=True)
        digest = hashlib.sha256("\n".join(map(str, self._ids)).encode())
        digest.update(b"".join(shapely.to_wkb(self._nuclei.geometry.to_numpy())))
        self._source = f"compared-{digest.hexdigest()[:16]}"

    def nothing(self) -> Floats:
        return np.empty((len(self._ids), 0), np.float32)

    def colour(self) -> Floats:
        tile = colour_tile(bins=uses_bins(self._bundle))
        store = prepare_colour(self._folder, self._seen, self._nuclei, tile, self._source)
        return read_features(store, self._ids)

    def context(self) -> Floats:
        return read_features(prepare_context(self._folder, self._seen, self._nuclei, self._source), self._ids)

    def morphology(self) -> Floats:
        columns: Floats = morphology(self._everywhere, self._seen.mpp)[self._rows]
        return columns

    def model_input(self) -> Floats:
        use = self._bundle.input_use
        stores = prepare_input(
            self._folder,
            self._seen,
            self._nuclei,
            use,
            lambda: build_encoder(self._bundle, self._runtime),
            self._source,
        )
        read = InputReader(stores.features, use, lambda: self._everywhere, self._seen.mpp, stores.context)
        seen, matching = read(self._ids), self._bundle.slide_scale
        if matching is None or len(seen) < FEWEST:  # the prediction used them as they are, too
            return seen
        return matching.match(seen, matching.moments([seen]))


def _nuclei(section: Section, matched: MatchedNuclei) -> NucleusSet:
    n = len(matched.cell_id)
    return NucleusSet(
        section=section.name,
        cell_id=matched.cell_id,
        xy_um=matched.xy_px * section.mpp,
        features=np.empty((n, 0), np.float32),
        counts=matched.measured,
        total_counts=np.asarray(matched.measured.sum(axis=1)).ravel(),
        area_um2=np.zeros(n),
    )


def _constant(umi: Floats) -> Callable[[NucleusSet], Floats]:
    return lambda _: umi


def _dense(matrix: Any) -> Floats:
    return np.asarray(matrix.toarray() if hasattr(matrix, "toarray") else matrix, dtype=np.float32)
