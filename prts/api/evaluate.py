"""Score any prediction against the measured counts of its section, as a training run scores its test sections."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from prts.api.baselines import PredictedSection, baseline_scores
from prts.api.polygons import nuclei_of
from prts.errors import InputError
from prts.evaluation.measured import measure_predicted
from prts.evaluation.section_scores import PredictedCounts, score_section
from prts.evaluation.settings import EvaluationSettings
from prts.evaluation.spot_scores import spot_pcc
from prts.evaluation.summaries import json_ready
from prts.io.cache import atomic, default_cache
from prts.io.nuclei import read_nuclei
from prts.io.spots import read_spots
from prts.preprocess.counts import QCSettings
from prts.section import Section, open_section_folder

if TYPE_CHECKING:
    import pandas as pd
    from anndata import AnnData
    from geopandas import GeoDataFrame

    from prts.api.baselines import TrainedModel
    from prts.evaluation.matching import MatchedNuclei

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Scores:
    """Scores of a prediction of one section.

    Attributes
    ----------
    summary
        Scores named as in metrics.json, such as `test/pcc_mean`, `test/ceiling_mean` and `baseline/ridge/pcc_mean`.
    per_gene
        One row per gene: `gene, mean_counts, pcc, spearman, rmse, skill, auroc, auprc, ceiling, constant`, and more.
    """

    summary: dict[str, float]
    per_gene: pd.DataFrame = field(repr=False)

    def write(self, folder: Path | str) -> None:
        """Write `metrics.json` and `per_gene.csv` to a folder.

        Raises
        ------
        InputError
            If the folder cannot be written.
        """
        folder = Path(folder)
        if folder.exists() and not folder.is_dir():
            raise InputError(f"{folder}: is a file; name a folder for metrics.json and per_gene.csv")
        with atomic(folder / "metrics.json") as path:
            path.write_text(json.dumps(json_ready(self.summary), indent=1, allow_nan=False) + "\n", encoding="utf-8")
        with atomic(folder / "per_gene.csv") as path:
            self.per_gene.to_csv(path, index=False)

    def __str__(self) -> str:
        lines = [
            f"{self.summary['test/n_cells']:,} nuclei x {self.summary['test/n_genes']:,} genes",
            f"PCC {_interval(self.summary)}, noise ceiling {self.summary['test/ceiling_mean']:.3f}",
        ]
        for key, value in self.summary.items():
            if key.startswith("baseline/") and key.endswith("/pcc_mean"):
                lines.append(f"  {key.split('/')[1]} {value:.3f}")
        return "\n".join(lines)


def evaluate(
    prediction: AnnData,
    section: Section | Path | str,
    *,
    nuclei: GeoDataFrame | Path | str | None = None,
    model: TrainedModel | None = None,
    qc: QCSettings | None = None,
    register: bool | None = None,
    settings: EvaluationSettings | None = None,
    cache_dir: Path | str | None = None,
) -> Scores:
    """Score a prediction against the measured counts of its section.

    The section's counts are summed inside the prediction's own nuclei; those that pass quality control are compared, gene by gene, as
    log1p UMI.

    Parameters
    ----------
    prediction
        Nuclei x genes, from `Model.predict` or `prts predict`; a subset of nuclei is fine.
    section
        The predicted section, with its measured counts, or its folder.
    nuclei
        Polygons of the prediction, if it contains none and is not backed by its file.
    model
        The model that was used; its baselines are then scored as well. Models written by older versions have none.
    qc
        Quality control; None: as in training.
    register
        Whether to correct the shift between bins and nuclei first; None: as in training.
    settings
        Blocks and replicates of the intervals.
    cache_dir
        Folder of the cache, for the features of baselines; None: `$PRTS_CACHE`, else `cache`.

    Returns
    -------
    Summary and per-gene scores, with the noise ceiling.

    Raises
    ------
    InputError
        If the section has no measured counts, is not the one that was predicted, or no nucleus can be compared.

    Examples
    --------
    >>> import prts
    >>> section = prts.read_visium_hd(demo_section)
    >>> model = prts.Model.load(demo_model)
    >>> scores = prts.evaluate(model.predict(section, nuclei="watershed"), section, model=model)
    >>> scores.summary["test/pcc_mean"] > scores.summary["baseline/gene_mean/pcc_mean"]
    True
    """
    settings = settings or EvaluationSettings()
    section = section if isinstance(section, Section) else open_section_folder(section)
    threshold = prediction.uns.get("prts", {}).get("threshold")
    if threshold is None:
        raise InputError("prediction: has no uns['prts']['threshold']; predict again with this version of prts")
    polygons = _polygons(prediction, nuclei, section)
    matched = measure_predicted(prediction, polygons, section, qc=qc, register=register).matched
    predicted = PredictedCounts(matched.predicted, matched.genes, matched.prob, float(threshold))
    scored = score_section(matched.measured, predicted, xy_um=matched.xy_px * section.mpp, settings=settings)
    figures = {**scored.summary, **_spot_scores(prediction, matched, section)}
    summary = {f"test/{key}": value for key, value in figures.items()}
    if model is not None:
        compared = PredictedSection(prediction, section, polygons, matched, scored)
        summary |= baseline_scores(model, compared, settings, default_cache(cache_dir))
    return Scores(summary, scored.per_gene)


def _polygons(prediction: AnnData, nuclei: GeoDataFrame | Path | str | None, section: Section) -> GeoDataFrame:
    if nuclei is None:
        return nuclei_of(prediction)
    if isinstance(nuclei, str | Path):
        return read_nuclei(Path(nuclei), mpp=section.mpp, width=section.width, height=section.height)
    return nuclei


def _spot_scores(prediction: AnnData, matched: MatchedNuclei, section: Section) -> dict[str, float]:
    """Compare sums of nuclei with the section's measured spots, if it has any."""
    if section.spots is None:
        return {}
    spots, ids = read_spots(section.spots), prediction.var["gene_id"].astype(str).tolist()
    compared, _ = spot_pcc(matched.predicted, matched.xy_px, spots, matched.genes, ids)
    # a spot also contains nuclei with too few UMIs to be compared individually
    every, _ = spot_pcc(prediction.X, prediction.obsm["spatial"], spots, matched.genes, ids)
    return {"spot_pcc_mean": compared, "spot_pcc_mean_all_nuclei": every}


def _interval(summary: Mapping[str, float]) -> str:
    text = f"{summary['test/pcc_mean']:.3f}"
    if "test/pcc_mean_low" in summary:
        text += f" ({summary['test/pcc_mean_low']:.3f} to {summary['test/pcc_mean_high']:.3f})"
    return text
