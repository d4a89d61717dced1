"""Square bins in place of nuclei: those that a section measured, or a tiling of the tissue."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import numpy as np
from pydantic import Field
from scipy import ndimage

from prts.io.optical_density import GLASS_OD, OPTICAL_DENSITY, read_without_black
from prts.platforms.base import HasUnits
from prts.platforms.bin_matrix import bin_names
from prts.platforms.bin_units import squares
from prts.segmentation import segmenters
from prts.segmentation.segment import blocks

if TYPE_CHECKING:
    import geopandas as gpd
    from numpy.typing import NDArray

    from prts.io.slide import Slide
    from prts.section import Section
    from prts.segmentation.segment import Segmenter

# Pixels along a bin when tissue is searched, and bins in a block.
_PX = 4
_BLOCK = 256
# The least share of tissue in the area around a bin, and the side of that area: the rule for glass in `prts.preprocess.artefacts`.
_TISSUE, _AROUND_UM = 1 / 6, 20.0
_DENSITY = OPTICAL_DENSITY.astype(np.float32)


@segmenters.register("bins")
@dataclass(frozen=True)
class Bins:
    """Tile the tissue of a slide with squares; glass is left out.

    The squares start at the top left corner of the image. Their ids are written like barcodes of Visium HD, `s_008um_00012_00034-1` for
    row 12 and column 34. For a section that measured bins of this size, its own bins are taken instead (`measured_bins`).

    Parameters
    ----------
    bin_um
        Side of a square.
    """

    bin_um: Annotated[int, Field(ge=2, le=512)] = 8
    name: ClassVar[str]
    extra: ClassVar[str | None] = None
    hint: ClassVar[str] = "choose smaller bins"

    def __call__(self, slide: Slide) -> gpd.GeoDataFrame:
        """Squares on tissue."""
        row, col = np.nonzero(_on_tissue(slide, self.bin_um))
        side = self.bin_um / slide.mpp
        centers = (np.stack([col, row], axis=1).astype(np.float64) + 0.5) * side
        affine = np.array([[side, 0.0, 0.5 * side], [0.0, side, 0.5 * side]])
        return squares(centers, affine, bin_names(self.bin_um, row, col), slide.mpp)

    def settings(self) -> dict[str, Any]:
        """The size of the squares."""
        return {"name": self.name, "bin_um": self.bin_um}


@dataclass(frozen=True)
class MeasuredBins:
    """The bins that a section measured, in the role of a segmenter.

    Parameters
    ----------
    measurement
        What measured them.
    """

    measurement: HasUnits
    name: ClassVar[str] = "bins"
    extra: ClassVar[str | None] = None
    hint: ClassVar[str] = "give the image of these bins"

    def __call__(self, slide: Slide) -> gpd.GeoDataFrame:
        """Bins with their center on the image."""
        units = self.measurement.units(slide.mpp)
        center = units.geometry.centroid
        width, height = slide.file_size
        inside = (center.x >= 0) & (center.x < width) & (center.y >= 0) & (center.y < height)
        return slide.orientation.nuclei(units[inside].reset_index(drop=True), slide.file_size)

    def settings(self) -> dict[str, Any]:
        """The identity of the measurement."""
        measured: Any = self.measurement
        return {"name": self.name, "bin_um": self.measurement.bin_um, **measured.identity()}


def measured_bins(section: Section, segmenter: Segmenter | None) -> MeasuredBins | None:
    """A section's own bins, if bins of their size are asked for.

    Parameters
    ----------
    section
        The section.
    segmenter
        What was asked for.
    """
    measured: object = section.measurement
    if isinstance(segmenter, Bins) and isinstance(measured, HasUnits) and measured.bin_um == segmenter.bin_um:
        return MeasuredBins(measured)
    return None


def _on_tissue(slide: Slide, bin_um: int) -> NDArray[np.bool_]:
    """Which squares of the tiling are on tissue, (rows, columns)."""
    mpp = bin_um / _PX
    columns, rows = (max(1, int(side * slide.mpp / bin_um)) for side in (slide.width, slide.height))
    share = np.zeros((rows, columns), np.float32)
    for block in blocks(columns, rows, _BLOCK):
        width, height = block.x1 - block.x0, block.y1 - block.y0
        rgb = read_without_black(slide, block.x0 * _PX, block.y0 * _PX, width * _PX, height * _PX, mpp)
        tissue = _DENSITY[rgb].mean(axis=-1) > GLASS_OD
        share[block.y0 : block.y1, block.x0 : block.x1] = tissue.reshape(height, _PX, width, _PX).mean(axis=(1, 3))
    around = 2 * round(_AROUND_UM / bin_um / 2) + 1  # an odd number of squares
    on_tissue: NDArray[np.bool_] = ndimage.uniform_filter(share, around, mode="nearest") >= _TISSUE
    return on_tissue
