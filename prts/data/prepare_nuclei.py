"""The nuclei of a section and the artifacts among them, kept in the cache."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd

from prts.data.prepare_input import STAGE_VERSION, build
from prts.io.cache import file_identity, fingerprint
from prts.io.nuclei import load_nuclei, write_nuclei
from prts.preprocess.artefacts import KINDS, find_artefacts
from prts.preprocess.image_check import require_h_and_e
from prts.segmentation.bins import measured_bins
from prts.segmentation.measured import measured_outlines
from prts.segmentation.polygons import Polygons
from prts.segmentation.segment import segment

if TYPE_CHECKING:
    from prts.section import Section
    from prts.segmentation.segment import Segmenter


def prepare_nuclei(
    folder: Path, section: Section, segmenter: Segmenter | None, prefer_given: bool, *, check_image: bool = True
) -> Path:
    """The cache file with a section's nuclei, made if needed.

    Parameters
    ----------
    folder
        The section's cache folder.
    section
        The section.
    segmenter
        Finds nuclei in an image; None if the section's own nuclei are the only source.
    prefer_given
        Use the section's own nuclei file, if it has one.
    check_image
        Refuse an image that cannot be H&E.

    Raises
    ------
    InputError
        If the image is not H&E, no nucleus is found, or the nuclei file does not fit the image.
    """
    used: Segmenter
    outlined = measured_outlines(section)
    given = prefer_given or segmenter is None
    if given and (section.nuclei is not None or outlined is not None):
        used = Polygons(section.nuclei) if section.nuclei is not None or outlined is None else outlined
    else:
        used = measured_bins(section, segmenter) or segmenter or Polygons(None)
    settings = {
        "version": STAGE_VERSION["nuclei"],
        "image": file_identity(section.image),
        "mpp": section.mpp,
        "segmenter": used.settings(),
        **section.reading(),
    }

    def make(path: Path) -> None:
        with section.open_slide() as slide:
            if check_image:
                require_h_and_e(slide)
            write_nuclei(segment(slide, used), path)

    name = used.settings()["name"]
    return build(folder / f"nuclei-{fingerprint(settings)}.parquet", make, what=f"{section.name}: nuclei by {name}")


def prepare_artefacts(folder: Path, section: Section, nuclei: Path) -> pd.Categorical:
    """The kind of artifact at each nucleus of a section, in the order of the nuclei; computed and cached if needed.

    The slide is read in its own colors, as in training: the rules compare a nucleus with the others of its slide, so matched colors would
    add nothing, and they would make pen and folds look more like tissue.

    Parameters
    ----------
    folder
        The section's cache folder.
    section
        The section.
    nuclei
        The cache file with its nuclei.
    """
    own = replace(section, recolour=None)
    settings = {
        "version": STAGE_VERSION["artefacts"],
        "nuclei": nuclei.stem,
        "image": file_identity(own.image),
        "mpp": own.mpp,
        **own.reading(),
    }

    def make(path: Path) -> None:
        polygons = load_nuclei(nuclei)
        with own.open_slide() as slide:
            kinds = find_artefacts(slide, polygons)
        pd.DataFrame({"cell_id": polygons["cell_id"], "artefact": kinds}).to_parquet(path, index=False)

    path = folder / f"artefacts-{fingerprint(settings)}.parquet"
    found = pd.read_parquet(build(path, make, what=f"{section.name}: artefacts"))
    kinds: pd.Categorical = pd.Categorical(found["artefact"].astype(str).to_numpy(object), categories=list(KINDS))
    return kinds
