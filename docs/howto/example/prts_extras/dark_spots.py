"""A segmenter that treats dark spots as nuclei."""

from dataclasses import asdict, dataclass
from typing import ClassVar

import numpy as np
import shapely
from scipy import ndimage

from prts.io.nuclei import make_nuclei
from prts.io.outlines import labels_to_polygons
from prts.segmentation import segmenters


@segmenters.register("dark_spots")
@dataclass(frozen=True, kw_only=True)
class DarkSpots:
    """Connected pixels below a gray level.

    Parameters
    ----------
    mpp
        um/px at which the slide is read.
    max_level
        Highest gray level of a nucleus, 0 to 255.
    min_area_um2
        Smaller spots are dropped.
    """

    mpp: float = 0.5
    max_level: float = 120.0
    min_area_um2: float = 10.0
    extra: ClassVar[None] = None  # optional dependencies, if it needs any
    hint: ClassVar[str] = "raise `max_level`"  # shown if no nucleus is found

    def settings(self):
        """Everything that affects the result, for caches and bundles."""
        return {"name": self.name, **asdict(self)}

    def __call__(self, slide):
        """The nuclei of a slide, as a GeoDataFrame in full-resolution pixels."""
        width, height = slide.size_at(self.mpp)
        rgb = slide.read_region(0, 0, width, height, self.mpp)
        gray = ndimage.gaussian_filter(rgb.mean(axis=2), 1)
        labels, _ = ndimage.label(gray < self.max_level)
        _, polygons, _ = labels_to_polygons(labels.astype(np.int32))
        polygons = polygons[shapely.area(polygons) * self.mpp**2 >= self.min_area_um2]
        scale = self.mpp / slide.mpp
        return make_nuclei(shapely.transform(polygons, lambda xy: xy * scale), slide.mpp, source=str(slide.path))
