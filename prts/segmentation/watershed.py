"""Classical segmentation of nuclei: needs no weights, no download and no further package."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import shapely
from scipy import ndimage
from skimage.color import hed_from_rgb
from skimage.filters import threshold_otsu
from skimage.morphology import reconstruction
from skimage.segmentation import watershed

from prts.errors import InputError
from prts.io.nuclei import make_nuclei
from prts.io.optical_density import GLASS_OD, OPTICAL_DENSITY
from prts.io.outlines import labels_to_polygons
from prts.progress import track
from prts.segmentation.segment import blocks, owned, sample, without_doubles

if TYPE_CHECKING:
    import geopandas as gpd
    from numpy.typing import NDArray

    from prts.io.slide import Slide

# Rows of an image whose colours are looked up at once: few enough for a processor's cache.
_ROWS = 32
# Gaussians are cut off at this many sigmas, which bounds how far a block sees.
_TRUNCATE = 3.0


@dataclass(frozen=True, kw_only=True)
class Watershed:
    """Haematoxylin by colour deconvolution, a local and a global threshold, seeded watershed.

    A pixel is nucleus where its smoothed haematoxylin (Ruifrok and Johnston's stain matrix, as in scikit-image) exceeds
    both `floor` x Otsu's threshold over the slide's tissue, so that glass and pale tissue give nothing, and the mean
    around it, which parts crowded nuclei. Seeds are the maxima of (distance to the mask's border) x (haematoxylin) that
    stand out by a factor 1 / `split` from any saddle to a higher one, which is scale-free: large nuclei are not cut up.
    The slide is worked in blocks whose surroundings reach as far as any filter; a nucleus belongs to the block that
    holds its centroid, and the slide's one threshold holds in all blocks: no seams.

    The defaults were chosen while looking at the 78 images of `nuclei_dsb2018`: the score there is not one on unseen
    images.

    Parameters
    ----------
    mpp
        um/px to work at.
    smooth_um
        Sigma of the Gaussian on haematoxylin.
    local_um
        Sigma of the Gaussian that gives the mean around a pixel.
    floor
        Share of Otsu's threshold that a pixel must exceed.
    split
        Saddle over peak above which two maxima are one nucleus.
    min_area_um2, max_area_um2
        Smaller and larger objects are dropped.
    block_px
        Largest side of a block, px at `mpp`.
    """

    mpp: float = 0.5
    smooth_um: float = 0.5
    local_um: float = 10.0
    floor: float = 0.85
    split: float = 0.88
    min_area_um2: float = 10.0
    max_area_um2: float = 400.0
    block_px: int = 2048
    advice: ClassVar[str] = "lower segmentation.floor or segmentation.min_area_um2"

    def __post_init__(self) -> None:
        for key in ("mpp", "smooth_um", "local_um", "floor", "min_area_um2"):
            if not getattr(self, key) > 0:
                raise InputError(f"segmentation.{key}={getattr(self, key)}: must be greater than 0")
        if not 0 < self.split < 1:
            raise InputError(f"segmentation.split={self.split}: must lie between 0 and 1")
        if not self.max_area_um2 > self.min_area_um2:
            raise InputError(f"segmentation.max_area_um2={self.max_area_um2}: must exceed min_area_um2")
        if self.block_px < 64:
            raise InputError(f"segmentation.block_px={self.block_px}: must be at least 64")

    def settings(self) -> dict[str, Any]:
        """All parameters."""
        return {"name": "watershed", **asdict(self)}

    def __call__(self, slide: Slide) -> gpd.GeoDataFrame:
        """Nuclei of the slide; `score` is unknown."""
        threshold = self._threshold(slide)
        if threshold is None:
            return make_nuclei([], slide.mpp, source=str(slide.path))
        width, height = slide.size_at(self.mpp)
        # As far as the local mean reaches, and then the largest nucleus.
        margin = round((_TRUNCATE * self.local_um + 2 * np.sqrt(self.max_area_um2 / np.pi)) / self.mpp)
        found, block_of = [np.empty(0, object)], [np.empty(0, np.intp)]
        grid = blocks(width, height, self.block_px)
        for number, block in enumerate(track(grid, f"watershed {slide.path.name}")):
            x, y = max(block.x0 - margin, 0), max(block.y0 - margin, 0)
            right, bottom = min(block.x1 + margin, width), min(block.y1 + margin, height)
            labels = self._labels(slide.read_region(x, y, right - x, bottom - y, self.mpp), threshold)
            _, polygons, _ = labels_to_polygons(labels)
            polygons = shapely.transform(polygons, lambda xy, x=x, y=y: xy + np.array([x, y]))
            polygons = polygons[owned(polygons, block)]
            found.append(polygons)
            block_of.append(np.full(len(polygons), number))
        polygons = np.concatenate(found)
        polygons = polygons[without_doubles(polygons, np.concatenate(block_of))]
        scale = self.mpp / slide.mpp
        return make_nuclei(shapely.transform(polygons, lambda xy: xy * scale), slide.mpp, source=str(slide.path))

    def _threshold(self, slide: Slide) -> float | None:
        """The least haematoxylin of a nucleus, from the slide's tissue; None where it has none."""
        tissue = []
        for window in sample(slide, self.mpp):
            tissue.append(self._haematoxylin(window)[_optical_density(window) > GLASS_OD])
        values = np.concatenate(tissue)
        if len(values) * self.mpp**2 < self.min_area_um2:
            return None
        return self.floor * float(threshold_otsu(values))  # type: ignore[no-untyped-call]

    def _haematoxylin(self, rgb: NDArray[np.uint8]) -> NDArray[np.float32]:
        return _gaussian(haematoxylin(rgb), self.smooth_um / self.mpp)

    def _labels(self, rgb: NDArray[np.uint8], threshold: float) -> NDArray[np.int32]:
        """Labels of one block with its surroundings."""
        stain = self._haematoxylin(rgb)
        mask = (stain > threshold) & (_optical_density(rgb) > GLASS_OD)
        if mask.any():
            mask &= stain > _gaussian(stain, self.local_um / self.mpp)
            mask = ndimage.binary_opening(mask)
        if not mask.any():
            return np.zeros(mask.shape, np.int32)
        # Pale centres of vesicular nuclei are filled; the lumen of a ring of nuclei is not.
        hole, _ = ndimage.label(~mask)
        pale_centre = np.bincount(hole.ravel()) * self.mpp**2 <= 0.1 * self.max_area_um2
        pale_centre[0] = False
        mask |= pale_centre[hole]
        smooth = 0.75 / self.mpp
        depth = _gaussian(ndimage.distance_transform_edt(mask), smooth)[mask]
        stain = _gaussian(stain, smooth)[mask]
        # In logarithms a ratio between peak and saddle is a height.
        relief = np.full(mask.shape, -10.0)
        relief[mask] = np.log(np.maximum(depth, 0.5)) + np.log(np.maximum(stain / threshold, 0.1))
        height = -np.log(self.split)
        lowered = reconstruction(relief - height, relief)  # type: ignore[no-untyped-call]
        seeds, _ = ndimage.label((relief - lowered >= height - 1e-9) & mask, np.ones((3, 3)))
        labels = watershed(-relief, seeds, mask=mask)  # type: ignore[no-untyped-call]
        area_um2 = np.bincount(labels.ravel()) * self.mpp**2
        fits = (area_um2 >= self.min_area_um2) & (area_um2 <= self.max_area_um2)
        fits[0] = False
        return np.where(fits[labels], labels, 0).astype(np.int32)


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
    """The sum of what three tables, (3, 256), say of a pixel's grey levels, a few rows at a time."""
    out = np.empty(rgb.shape[:2], np.float32)
    for start in range(0, len(rgb), _ROWS):
        window = rgb[start : start + _ROWS]
        total = tables[0][window[..., 0]]
        total += tables[1][window[..., 1]]
        total += tables[2][window[..., 2]]
        out[start : start + _ROWS] = total
    return out
