"""Match the colors of a slide to the training slide.

A stain method is one module with a class that follows `prts.preprocess.stains.base.StainMethod`, registered by name:

>>> from prts.preprocess.stains import stains
>>> stains.names()
['histogram', 'macenko', 'reinhard']
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from prts.registry import Registry

if TYPE_CHECKING:
    from prts.preprocess.stains.base import StainMethod

stains: Registry[StainMethod] = Registry("stain method", package="prts.preprocess.stains", group="prts.stains")
