"""Measured counts of a section in the nuclei of a prediction, or of a training section."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from prts.errors import InputError, ParameterError
from prts.evaluation.matching import MatchedNuclei, align_genes, match
from prts.io.mpp import require_agreement
from prts.io.nuclei import read_nuclei
from prts.platforms.base import CountsBins, Registration
from prts.platforms.bin_owners import CountSettings
from prts.preprocess.counts import QCSettings, measured_counts, required_measurement

if TYPE_CHECKING:
    from pathlib import Path

    import anndata as ad
    import geopandas as gpd
    import scipy.sparse as sp

    from prts.section import Section
    from prts.segmentation.segment import Segmenter

logger = logging.getLogger(__name__)

_ABOUT = ("width", "height", "mpp", "species", "qc")


@dataclass(frozen=True)
class MeasuredSection:
    """A predicted section's own measurement.

    Attributes
    ----------
    section
        The section.
    counts
        Nuclei of the prediction that pass quality control x all measured genes.
    matched
        The same nuclei and the genes of the prediction, predicted and measured.
    """

    section: Section
    counts: ad.AnnData
    matched: MatchedNuclei


def measure_predicted(
    prediction: ad.AnnData,
    nuclei: gpd.GeoDataFrame,
    section: Section,
    *,
    qc: QCSettings | None = None,
    register: bool | None = None,
) -> MeasuredSection:
    """Sum a section's measured counts in the nuclei of a prediction, and match the two.

    Parameters
    ----------
    prediction
        From `prts.io.prediction.read_prediction`, (n_nuclei, n_genes).
    nuclei
        Its polygons, in full-resolution pixels.
    section
        The section that was predicted, with a measurement.
    qc
        Limits of quality control; None: as in the model's training.
    register
        Correct the shift between counts and nuclei; None: as in the model's training.

    Raises
    ------
    InputError
        If the section has no measured counts or another image, or no nucleus or gene is left.
    """
    about = _about(prediction)
    required_measurement(section)
    if (about["width"], about["height"]) != (section.width, section.height):
        raise InputError(
            f"section {section.name}: its image is {section.width} x {section.height} px, the prediction's was "
            f"{about['width']} x {about['height']}; give the section that was predicted"
        )
    require_agreement(section.image, [("the prediction", float(about["mpp"])), (section.mpp_source, section.mpp)])
    counts = _counted(section, nuclei, about, qc, register)
    matched = match(prediction, counts, mpp=section.mpp)
    return MeasuredSection(section, counts[list(matched.cell_id)].copy(), matched)


def measure_training(
    prediction: ad.AnnData, section: Section, nuclei: Path | None, segmenter: Segmenter | None
) -> tuple[ad.AnnData, sp.csr_matrix]:
    """Sum a training section's measured counts in its nuclei.

    Parameters
    ----------
    prediction
        Prediction of a model trained on the section.
    section
        The training section.
    nuclei
        Its nuclei; None: those of the section.
    segmenter
        Finds nuclei if the section has none.

    Returns
    -------
    counts
        Nuclei that pass quality control x all genes.
    panel
        The same nuclei x the genes of the prediction.
    """
    from prts.segmentation.measured import measured_outlines
    from prts.segmentation.segment import segment

    about = _about(prediction)
    required_measurement(section)
    path = nuclei if nuclei is not None else section.nuclei
    if path is not None:
        found = read_nuclei(
            path, mpp=section.mpp, width=section.width, height=section.height, max_pixels=section.max_pixels
        )
    elif (source := measured_outlines(section) or segmenter) is not None:
        with section.open_slide() as slide:
            found = segment(slide, source)
    else:
        raise ParameterError(
            "",
            "train_nuclei",
            f"the training section {section.name} has no nuclei; give their file, or choose a segmenter",
        )
    counts = _counted(section, found, about, None, None)
    ids = prediction.var["gene_id"].astype(str).tolist() if "gene_id" in prediction.var else None
    return counts, align_genes(counts, prediction.var_names.astype(str).tolist(), ids, "train_section")


def _about(prediction: ad.AnnData) -> Mapping[str, Any]:
    about: Mapping[str, Any] = prediction.uns["prts"]
    missing = [key for key in _ABOUT if key not in about]
    if missing:
        raise InputError(f"prediction: lacks uns['prts'][{missing[0]!r}]; predict again with this version of prts")
    return about


def _counted(
    section: Section, nuclei: gpd.GeoDataFrame, about: Mapping[str, Any], qc: QCSettings | None, register: bool | None
) -> ad.AnnData:
    counts = measured_counts(
        section,
        nuclei,
        species=str(about["species"]),
        # predictions of older versions do not record it
        register=bool(about.get("register", False)) if register is None else register,
        qc=QCSettings.from_stored(about["qc"]) if qc is None else qc,
        # the counts of other platforms are those of their units
        counting=CountSettings.from_stored(about.get("counting", {}))
        if isinstance(section.measurement, CountsBins)
        else None,
    )
    if "registration" in counts.uns["prts"]:
        logger.info("%s: %s", section.name, Registration.from_report(counts.uns["prts"]["registration"]).sentence())
    return counts
