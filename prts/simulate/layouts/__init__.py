"""Layouts that a simulated section can be written in: the files of one platform, with the same truth.

A layout is one module with a class that follows `prts.simulate.layouts.base.SectionLayout`, registered by name:

>>> from prts.simulate.layouts import layouts
>>> "visium_hd" in layouts
True
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from prts.registry import Registry

if TYPE_CHECKING:
    from prts.simulate.layouts.base import SectionLayout

layouts: Registry[SectionLayout] = Registry("layout", package="prts.simulate.layouts", group="prts.simulate_layouts")

DEFAULT_LAYOUT = "visium_hd"
"""What a section is written in unless another layout is asked for."""
