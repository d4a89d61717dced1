"""Nuclei that someone else segmented."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from prts.errors import InputError
from prts.io.cache import file_identity
from prts.io.nuclei import read_nuclei

if TYPE_CHECKING:
    import geopandas as gpd

    from prts.io.slide import Slide


@dataclass(frozen=True)
class Polygons:
    """Read nuclei from a file in place of segmenting.

    Parameters
    ----------
    path
        A file of any format that `prts.io.nuclei.read_nuclei` reads, in full-resolution pixels of the image as it lies in its file.
    """

    path: Path | str | None = None
    advice: ClassVar[str] = "name another file"

    def __call__(self, slide: Slide) -> gpd.GeoDataFrame:
        """Nuclei of the file, checked against the slide."""
        width, height = slide.file_size
        nuclei = read_nuclei(self._path(), mpp=slide.mpp, width=width, height=height, max_pixels=slide.max_pixels)
        return slide.orientation.nuclei(nuclei, slide.file_size)

    def settings(self) -> dict[str, Any]:
        """The identity of the file."""
        return {"name": "polygons", "file": file_identity(self._path())}

    def _path(self) -> Path:
        if self.path is None:
            raise InputError("segmentation.path: is not set; name the file with the nuclei, or the section's `nuclei:`")
        return Path(self.path)
