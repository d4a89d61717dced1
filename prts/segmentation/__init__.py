"""Find nuclei in an H&E image, or read nuclei from another tool.

A segmenter is one module with a class that follows `prts.segmentation.segment.Segmenter`, registered by name:

>>> from prts.segmentation import segmenters
>>> segmenters.names()
['bins', 'polygons', 'stardist', 'watershed']
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from prts.registry import Registry

if TYPE_CHECKING:
    from prts.segmentation.segment import Segmenter

segmenters: Registry[Segmenter] = Registry("segmenter", package="prts.segmentation", group="prts.segmenters")
