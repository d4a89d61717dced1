"""Platforms that measure expression: each counts transcripts per nucleus.

A platform is one module with a class that follows `prts.platforms.base.Measurement`, registered by name:

>>> from prts.platforms import platforms
>>> "visium_hd" in platforms
True
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from prts.registry import Registry

if TYPE_CHECKING:
    from prts.platforms.base import Measurement

platforms: Registry[Measurement] = Registry("platform", package="prts.platforms", group="prts.platforms")

DEFAULT_PLATFORM = "visium_hd"
"""What a section's files are taken for unless its config names another platform."""
