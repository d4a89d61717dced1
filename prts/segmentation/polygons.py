"""Nuclei segmented by another tool."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from prts.errors import ParameterError
from prts.io.cache import file_identity
from prts.io.nuclei import read_nuclei
from prts.io.slide_bounds import nuclei_on_slide
from prts.segmentation import segmenters

if TYPE_CHECKING:
    import geopandas as gpd

    from prts.io.slide import Slide


@segmenters.register("polygons")
@dataclass(frozen=True)
class Polygons:
    """Read nuclei from a file instead of segmenting.

    Parameters
    ----------
    path
        A file in any format that `prts.io.nuclei.read_nuclei` reads, in full-resolution pixels of the image file or, as QuPath counts them,
        of the part of it that was scanned.
    """

    path: Path | str | None = None
    name: ClassVar[str]
    extra: ClassVar[str | None] = None
    hint: ClassVar[str] = "give another file"

    def __call__(self, slide: Slide) -> gpd.GeoDataFrame:
        """Read the nuclei and check them against the slide."""
        width, height = slide.file_size
        nuclei = read_nuclei(self._path(), mpp=slide.mpp, width=width, height=height, max_pixels=slide.max_pixels)
        return slide.orientation.nuclei(nuclei_on_slide(nuclei, slide, self.path), slide.file_size)

    def settings(self) -> dict[str, Any]:
        """The identity of the file."""
        return {"name": self.name, "file": file_identity(self._path())}

    def _path(self) -> Path:
        if self.path is None:
            raise ParameterError(
                "segmenter", "path", "is not set; give the file with the nuclei, or the section's `nuclei`"
            )
        return Path(self.path)
