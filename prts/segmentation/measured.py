"""The cells or nuclei that a platform outlined itself, in the role of a segmenter."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from prts.platforms.base import HasOutlines

if TYPE_CHECKING:
    import geopandas as gpd

    from prts.io.slide import Slide
    from prts.section import Section


@dataclass(frozen=True)
class MeasuredOutlines:
    """The outlines that come with a section's counts.

    Parameters
    ----------
    measurement
        What measured them.
    """

    measurement: HasOutlines
    name: ClassVar[str] = "given"
    extra: ClassVar[str | None] = None
    hint: ClassVar[str] = "give the image of these cells"

    def __call__(self, slide: Slide) -> gpd.GeoDataFrame:
        """Outlines with their center on the image."""
        width, height = slide.file_size
        cells = self.measurement.outlines(slide.mpp)
        center = cells.geometry.centroid
        inside = (center.x >= 0) & (center.x < width) & (center.y >= 0) & (center.y < height)
        return slide.orientation.nuclei(cells[inside].reset_index(drop=True), slide.file_size)

    def settings(self) -> dict[str, Any]:
        """The identity of the measurement."""
        measured: Any = self.measurement
        return {"name": self.name, **measured.identity()}


def measured_outlines(section: Section) -> MeasuredOutlines | None:
    """A section's own cells or nuclei, if its platform outlined them.

    Parameters
    ----------
    section
        The section.
    """
    measured: object = section.measurement
    return MeasuredOutlines(measured) if isinstance(measured, HasOutlines) else None
