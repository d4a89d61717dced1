"""Where the nuclei of a slide come from: a file, polygons in memory, a segmenter, or what training used."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeAlias

import shapely

from prts.errors import InputError, ParameterError
from prts.io.nuclei import make_nuclei
from prts.segmentation import segmenters
from prts.segmentation.bins import Bins
from prts.segmentation.measured import measured_outlines
from prts.segmentation.polygons import Polygons
from prts.segmentation.segment import recorded_segmenter

if TYPE_CHECKING:
    import pandas as pd
    from geopandas import GeoDataFrame

    from prts.io.slide import Slide
    from prts.models.bundle import Bundle
    from prts.section import Section
    from prts.segmentation.segment import Segmenter

NucleiSource: TypeAlias = "str | Path | GeoDataFrame | Segmenter | None"


class _GivenNuclei:
    """Polygons in memory, used like a segmenter."""

    name: ClassVar[str] = "polygons"
    extra: ClassVar[str | None] = None
    hint: ClassVar[str] = "give other polygons"

    def __init__(self, nuclei: GeoDataFrame) -> None:
        self._nuclei = nuclei

    def __call__(self, slide: Slide) -> GeoDataFrame:
        nuclei = make_nuclei(self._nuclei.geometry, slide.mpp, cell_id=self._ids(), source="nuclei")
        return slide.orientation.nuclei(nuclei, slide.file_size)

    def settings(self) -> dict[str, Any]:
        digest = hashlib.sha256("\n".join(map(str, self._ids())).encode())
        digest.update(b"".join(shapely.to_wkb(self._nuclei.geometry.to_numpy())))
        return {"name": self.name, "sha256": digest.hexdigest()}

    def _ids(self) -> pd.Series[Any]:
        ids: pd.Series[Any] = self._nuclei.get("cell_id", self._nuclei.index.to_series())
        return ids


def uses_bins(bundle: Bundle) -> bool:
    """Whether a model was trained on bins."""
    return bool(bundle.metadata["segmentation"]["name"] == Bins.name)


def as_segmenter(nuclei: NucleiSource, bundle: Bundle, section: Section) -> Segmenter:
    """The segmenter for a slide, from the user's choice.

    Parameters
    ----------
    nuclei
        As for `predict_slide`.
    bundle
        The model, which names the segmenter used in training.
    section
        The section, whose own nuclei are used if training used nuclei from a file.

    Raises
    ------
    InputError
        If there is no such segmenter or file, training used nuclei from a file and this section has none, or the bins have another size.
    """
    chosen = _chosen_segmenter(nuclei, bundle, section)
    if isinstance(chosen, Bins) and uses_bins(bundle):
        trained_on = bundle.metadata["segmentation"]["arguments"]["bin_um"]
        if chosen.bin_um != trained_on:
            raise ParameterError(
                "",
                "bin_um",
                f"{chosen.bin_um} is not the size of the bins that this model was trained on, and counts grow with it; give {trained_on}",
            )
    return chosen


def _chosen_segmenter(nuclei: NucleiSource, bundle: Bundle, section: Section) -> Segmenter:
    if nuclei is None:
        try:
            trained = recorded_segmenter(bundle.metadata["segmentation"])
        except ParameterError as error:
            raise InputError(
                f"{bundle.folder}: its segmenter cannot be built by this version of prts ({error}); choose another one"
            ) from error
        if trained is not None:
            return trained
        if section.nuclei is not None:
            return Polygons(section.nuclei)
        if (outlined := measured_outlines(section)) is not None:
            return outlined
        raise ParameterError(
            "",
            "nuclei",
            f"not given, and this model was trained on nuclei from a file; name a file or a segmenter "
            f"({', '.join(name for name in segmenters.names() if name != Polygons.name)})",
        )
    if isinstance(nuclei, str) and nuclei in segmenters and not Path(nuclei).exists():
        return segmenters.build({"name": nuclei})
    if isinstance(nuclei, str | Path):
        return Polygons(nuclei)
    if hasattr(nuclei, "geometry"):
        return _GivenNuclei(nuclei)
    return nuclei
