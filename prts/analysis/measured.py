"""What a section measured in the nuclei of a prediction, or in those of a training section."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anndata as ad

from prts.errors import InputError
from prts.evaluation.matching import MatchedNuclei, align_genes, match
from prts.io.mpp import require_agreement
from prts.io.nuclei import load_nuclei, read_nuclei
from prts.preprocess.counts import count_nuclei, quality_control
from prts.section import Section, open_section_folder

if TYPE_CHECKING:
    import geopandas as gpd
    import scipy.sparse as sp

    from prts.segmentation.segment import Segmenter

_ABOUT = ("width", "height", "mpp", "species", "qc")


@dataclass(frozen=True)
class Measured:
    """A predicted section's own measurement.

    Attributes
    ----------
    section
        The section.
    counts
        Nuclei of the prediction that pass its model's quality control x all measured genes.
    matched
        The same nuclei and the genes of the prediction, on both sides.
    """

    section: Section
    counts: ad.AnnData
    matched: MatchedNuclei


def measure(prediction: ad.AnnData, nuclei: Path, folder: Path) -> Measured:
    """Count the bins of a section's folder in the nuclei of a prediction made on its image.

    Parameters
    ----------
    prediction
        Of `prts.io.prediction.read_prediction`.
    nuclei
        Its polygons.
    folder
        The section's.

    Raises
    ------
    InputError
        If the section has no bins or another image, or no nucleus or gene is left.
    """
    _about(prediction)
    return measure_section(prediction, nuclei, _with_bins("section", folder), what=f"section={folder}")


def measure_section(prediction: ad.AnnData, nuclei: Path, section: Section, *, what: str) -> Measured:
    """`measure` of a section that is open already; `what` is how messages call it."""
    about = _about(prediction)
    if (about["width"], about["height"]) != (section.width, section.height):
        raise InputError(
            f"{what}: its image is {section.width} x {section.height} px, the prediction's was {about['width']} x "
            f"{about['height']}; give the section that was predicted"
        )
    require_agreement(section.image, [("the prediction", float(about["mpp"])), (section.mpp_source, section.mpp)])
    counts = _count(section, load_nuclei(nuclei), about)
    matched = match(prediction, counts, mpp=section.mpp)
    return Measured(section, counts[list(matched.cell_id)].copy(), matched)


def measure_training(
    prediction: ad.AnnData, folder: Path, nuclei: Path | None, segmenter: Segmenter | None
) -> tuple[Section, ad.AnnData, sp.csr_matrix]:
    """Count the bins of a training section.

    Parameters
    ----------
    prediction
        Whose model was trained on it.
    folder
        The section's.
    nuclei
        Its nuclei; None takes those in the folder.
    segmenter
        Finds them where there are none.

    Returns
    -------
    section
        The section.
    counts
        Nuclei that pass quality control x all genes.
    panel
        The same nuclei x the genes of the prediction.
    """
    from prts.segmentation.segment import segment

    about = _about(prediction)
    section = _with_bins("train_section", folder)
    path = nuclei if nuclei is not None else section.nuclei
    if path is not None:
        found = read_nuclei(path, mpp=section.mpp, width=section.width, height=section.height)
    elif segmenter is not None:
        with section.open_slide() as slide:
            found = segment(slide, segmenter)
    else:
        raise InputError(
            f"train_section={folder}: has no nuclei; name their file as train_nuclei=FILE (training left one in its cache), or segment "
            "with segmentation=watershed or segmentation=stardist"
        )
    counts = _count(section, found, about)
    ids = prediction.var["gene_id"].astype(str).tolist() if "gene_id" in prediction.var else None
    return section, counts, align_genes(counts, prediction.var_names.astype(str).tolist(), ids, "train_section")


def _about(prediction: ad.AnnData) -> Mapping[str, Any]:
    about: Mapping[str, Any] = prediction.uns["prts"]
    missing = [key for key in _ABOUT if key not in about]
    if missing:
        raise InputError(f"prediction: lacks uns['prts'][{missing[0]!r}]; predict again with this prts")
    return about


def _with_bins(key: str, folder: Path) -> Section:
    section = open_section_folder(folder)
    if section.bins is None:
        raise InputError(f"{key}={folder}: has no binned_outputs/square_002um, so nothing was measured there")
    return section


def _count(section: Section, nuclei: gpd.GeoDataFrame, about: Mapping[str, Any]) -> ad.AnnData:
    if section.bins is None:
        raise ValueError(f"section {section.name} has no bins")
    counts = count_nuclei(section.bins, nuclei, species=str(about["species"]))
    return quality_control(counts, mpp=section.mpp, **dict(about["qc"]))
