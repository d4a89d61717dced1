"""Classical segmentation of nuclei, without weights, downloads or extra packages."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import numpy as np
import shapely
from pydantic import Field
from scipy import ndimage
from skimage.color import hed_from_rgb
from skimage.filters import threshold_otsu
from skimage.morphology import reconstruction
from skimage.segmentation import watershed

from prts.cores import cores_given, in_threads
from prts.errors import ParameterError
from prts.io.nuclei import make_nuclei
from prts.io.optical_density import GLASS_OD, OPTICAL_DENSITY, without_black
from prts.io.outlines import labels_to_polygons
from prts.progress import track
from prts.segmentation import segmenters
from prts.segmentation.segment import Block, blocks, owned, sample, without_doubles

if TYPE_CHECKING:
    import geopandas as gpd
    from numpy.typing import NDArray

    from prts.io.slide import Slide

# Rows of an image whose colors are looked up at once: few enough for the processor's cache.
_ROWS = 32
# Blocks that are worked on at once, a core each; a block of 2048 px takes half a GB.
_THREADS = 4
# Gaussians are cut off at this many sigmas, which bounds how far a block sees.
_TRUNCATE = 3.0
_NEIGHBORS = np.ones((3, 3))
# Lower than any nucleus.
_BOTTOM = -10.0


@segmenters.register("watershed")
@dataclass(frozen=True, kw_only=True)
class Watershed:
    """Hematoxylin by color deconvolution, a local and a global threshold, seeded watershed.

    A pixel is nucleus if its smoothed hematoxylin (Ruifrok and Johnston's stain matrix, as in scikit-image) exceeds
    both `floor` x Otsu's threshold over the slide's tissue, which excludes glass and pale tissue, and the mean
    around it, which separates crowded nuclei. Seeds are the maxima of (distance to the mask's border) x (hematoxylin) that
    exceed any saddle to a higher one by a factor 1 / `split`. This is scale-free: large nuclei are not split.
    The slide is processed in blocks with margins as wide as the filters; a nucleus belongs to the block that
    contains its centroid, and one threshold is used for the whole slide, so that blocks leave no seams.

    The defaults were chosen on the 78 images of `nuclei_dsb2018`, so scores on these images are optimistic.

    Parameters
    ----------
    mpp
        um/px to work at.
    smooth_um
        Sigma of the Gaussian on hematoxylin.
    local_um
        Sigma of the Gaussian for the mean around a pixel.
    floor
        Share of Otsu's threshold that a pixel must exceed.
    split
        Saddle over peak above which two maxima are one nucleus.
    min_area_um2, max_area_um2
        Smaller and larger objects are dropped.
    block_px
        Largest side of a block, px at `mpp`.
    """

    mpp: Annotated[float, Field(gt=0)] = 0.5
    smooth_um: Annotated[float, Field(gt=0)] = 0.5
    local_um: Annotated[float, Field(gt=0)] = 10.0
    floor: Annotated[float, Field(gt=0)] = 0.85
    split: Annotated[float, Field(gt=0, lt=1)] = 0.88
    min_area_um2: Annotated[float, Field(gt=0)] = 10.0
    max_area_um2: Annotated[float, Field(gt=0)] = 400.0
    block_px: Annotated[int, Field(ge=64)] = 2048
    name: ClassVar[str]
    extra: ClassVar[str | None] = None
    hint: ClassVar[str] = "lower `floor` or `min_area_um2` of the segmenter"

    def __post_init__(self) -> None:
        if not self.max_area_um2 > self.min_area_um2:
            raise ParameterError(
                "segmenter", "max_area_um2", f"{self.max_area_um2:g} must exceed `min_area_um2`; raise it"
            )

    def settings(self) -> dict[str, Any]:
        """All parameters."""
        return {"name": self.name, **asdict(self)}

    def __call__(self, slide: Slide) -> gpd.GeoDataFrame:
        """Nuclei of the slide; `score` is unknown."""
        threshold = self._threshold(slide)
        if threshold is None:
            return make_nuclei([], slide.mpp, source=str(slide.path))
        width, height = slide.size_at(self.mpp)
        # range of the local mean plus the largest nucleus
        margin = round((_TRUNCATE * self.local_um + 2 * np.sqrt(self.max_area_um2 / np.pi)) / self.mpp)
        found, block_of = [np.empty(0, object)], [np.empty(0, np.intp)]
        grid = blocks(width, height, self.block_px)

        def read() -> Iterator[tuple[Block, NDArray[np.uint8], NDArray[np.intp]]]:
            for block in grid:
                x, y = max(block.x0 - margin, 0), max(block.y0 - margin, 0)
                right, bottom = min(block.x1 + margin, width), min(block.y1 + margin, height)
                rgb = slide.read_region(x, y, right - x, bottom - y, self.mpp)
                yield block, rgb, np.array([x, y])

        def outlines(given: tuple[Block, NDArray[np.uint8], NDArray[np.intp]]) -> NDArray[Any]:
            block, rgb, corner = given
            _, polygons, _ = labels_to_polygons(self._labels(without_black(rgb), threshold))
            polygons = shapely.transform(polygons, lambda xy: xy + corner)
            return polygons[owned(polygons, block)]

        of_blocks = in_threads(outlines, read(), min(cores_given(), _THREADS))
        for number, polygons in enumerate(track(of_blocks, "watershed", total=len(grid))):
            found.append(polygons)
            block_of.append(np.full(len(polygons), number))
        polygons = np.concatenate(found)
        polygons = polygons[without_doubles(polygons, np.concatenate(block_of))]
        scale = self.mpp / slide.mpp
        return make_nuclei(shapely.transform(polygons, lambda xy: xy * scale), slide.mpp, source=slide.name)

    def _threshold(self, slide: Slide) -> float | None:
        """The hematoxylin threshold of the slide, from its tissue; None if it has no tissue."""
        tissue = []
        for window in map(without_black, sample(slide, self.mpp)):
            tissue.append(self._haematoxylin(window)[_optical_density(window) > GLASS_OD])
        values = np.concatenate(tissue)
        if len(values) * self.mpp**2 < self.min_area_um2:
            return None
        return self.floor * float(threshold_otsu(values))  # type: ignore[no-untyped-call]

    def _haematoxylin(self, rgb: NDArray[np.uint8]) -> NDArray[np.float32]:
        return _gaussian(haematoxylin(rgb), self.smooth_um / self.mpp)

    def _labels(self, rgb: NDArray[np.uint8], threshold: float) -> NDArray[np.int32]:
        """Labels of one block with its margin."""
        stain = self._haematoxylin(rgb)
        mask = (stain > threshold) & (_optical_density(rgb) > GLASS_OD)
        if mask.any():
            mask &= stain > _gaussian(stain, self.local_um / self.mpp)
            mask = ndimage.binary_opening(mask)
        if not mask.any():
            return np.zeros(mask.shape, np.int32)
        # pale centers of vesicular nuclei are filled, the lumen of a ring of nuclei is not
        hole, _ = ndimage.label(~mask)
        pale_centre = np.bincount(hole.ravel()) * self.mpp**2 <= 0.1 * self.max_area_um2
        pale_centre[0] = False
        mask |= pale_centre[hole]
        smooth = 0.75 / self.mpp
        depth = _gaussian(ndimage.distance_transform_edt(mask), smooth)[mask]
        stain = _gaussian(stain, smooth)[mask]
        # in logarithms a ratio between peak and saddle is a height
        relief = np.full(mask.shape, _BOTTOM)
        relief[mask] = np.log(np.maximum(depth, 0.5)) + np.log(np.maximum(stain / threshold, 0.1))
        height = -np.log(self.split)
        peak = np.zeros_like(mask)
        peak[mask] = relief[mask] - _reconstruction(relief, height, mask) >= height - 1e-9
        seeds, _ = ndimage.label(peak, _NEIGHBORS)
        labels = watershed(-relief, seeds, mask=mask)  # type: ignore[no-untyped-call]
        area_um2 = np.bincount(labels.ravel()) * self.mpp**2
        fits = (area_um2 >= self.min_area_um2) & (area_um2 <= self.max_area_um2)
        fits[0] = False
        return np.where(fits[labels], labels, 0).astype(np.int32)


def _reconstruction(relief: NDArray[np.float64], height: float, mask: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Reconstruction of the relief, lowered by a height, under itself, at the pixels of the mask.

    It sorts all pixels, most of which are background, so the pieces of the mask are moved together first.
    """
    rows, columns, shape = _packed(mask)
    packed = np.full(shape, _BOTTOM)
    packed[rows, columns] = relief[mask]
    return np.asarray(reconstruction(packed - height, packed)[rows, columns])  # type: ignore[no-untyped-call]


def _packed(mask: NDArray[np.bool_]) -> tuple[NDArray[np.intp], NDArray[np.intp], tuple[int, int]]:
    """Rows and columns of the mask's pixels in an image in which its pieces lie side by side, and the shape of that image."""
    piece, _ = ndimage.label(mask, _NEIGHBORS)
    boxes = ndimage.find_objects(piece)
    top, left = (np.array([box[axis].start for box in boxes]) for axis in (0, 1))
    # with a pixel of background between them
    high, wide = (np.array([box[axis].stop - box[axis].start + 1 for box in boxes]) for axis in (0, 1))
    rows, columns = np.nonzero(mask)
    if np.sum(high * wide) > mask.size:  # boxes of long pieces overlap
        return rows, columns, mask.shape
    width = max(int(np.sqrt(np.sum(high * wide))), int(wide.max()))
    x = y = shelf = 0
    for k in np.argsort(-high, kind="stable"):
        if x + wide[k] > width:
            x, y, shelf = 0, y + shelf, 0
        top[k], left[k] = y - top[k], x - left[k]
        x, shelf = x + wide[k], max(shelf, high[k])
    of = piece[mask] - 1
    return rows + top[of], columns + left[of], (int(y + shelf), width)


def _gaussian(image: NDArray[Any], sigma: float) -> NDArray[Any]:
    return np.asarray(ndimage.gaussian_filter(image, sigma, truncate=_TRUNCATE))


def haematoxylin(rgb: NDArray[np.uint8]) -> NDArray[np.float32]:
    """The first channel of `skimage.color.rgb2hed`, (height, width)."""
    absorbed = np.log(np.maximum(np.arange(256) / 255, 1e-6)) / np.log(1e-6)
    return np.maximum(_sum_over_channels(rgb, hed_from_rgb[:, :1] * absorbed), np.float32(0))


def _optical_density(rgb: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Mean over the channels, base 10."""
    table = OPTICAL_DENSITY.astype(np.float32)
    return _sum_over_channels(rgb, np.stack([table] * 3)) / np.float32(3)


def _sum_over_channels(rgb: NDArray[np.uint8], tables: NDArray[Any]) -> NDArray[np.float32]:
    """Look up each channel's gray levels in its table, (3, 256), and sum them, a few rows at a time."""
    out = np.empty(rgb.shape[:2], np.float32)
    for start in range(0, len(rgb), _ROWS):
        window = rgb[start : start + _ROWS]
        total = tables[0][window[..., 0]]
        total += tables[1][window[..., 1]]
        total += tables[2][window[..., 2]]
        out[start : start + _ROWS] = total
    return out
