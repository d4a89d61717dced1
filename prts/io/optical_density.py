"""Optical density of pixels."""

from __future__ import annotations

import numpy as np

OPTICAL_DENSITY = -np.log10(np.maximum(np.arange(256), 1) / 255)
"""Optical density (base 10) of each gray level, (256,)."""

GLASS_OD = 0.05
"""Mean optical density over red, green and blue below which a pixel is empty glass: gray levels above 227."""
