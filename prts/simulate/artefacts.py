"""Draw artifacts (folds, blur, bubbles, pen) onto a rendered image and record which pixels they affect."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from scipy import ndimage

if TYPE_CHECKING:
    from numpy.typing import NDArray

ARTEFACT_KINDS = ("none", "fold", "blur", "bubble", "pen")

_INKS = np.array([[30.0, 40.0, 150.0], [20.0, 120.0, 60.0], [20.0, 20.0, 25.0]])


def draw_artefacts(image: NDArray[np.uint8], mpp: float, n: int, rng: np.random.Generator) -> NDArray[np.uint8]:
    """Draw `n` folds, then as many blurred patches, bubbles and pen strokes, at random positions.

    Parameters
    ----------
    image
        RGB, (rows, columns, 3); modified in place.
    mpp
        um per pixel.
    n
        Number of artifacts of each kind.
    rng
        Source of positions, sizes and inks.

    Returns
    -------
    Index into `ARTEFACT_KINDS` of the topmost artifact at each pixel, (rows, columns).
    """
    rows, cols = image.shape[:2]
    y, x = (np.arange(side, dtype=np.float32) * mpp for side in (rows, cols))
    kind = np.zeros((rows, cols), np.uint8)
    for number, name in enumerate(ARTEFACT_KINDS[1:], start=1):
        for _ in range(n):
            cx, cy, angle = (
                rng.uniform(0.15, 0.85) * cols * mpp,
                rng.uniform(0.15, 0.85) * rows * mpp,
                rng.uniform(0, np.pi),
            )
            along = (x - cx) * np.cos(angle) + (y[:, None] - cy) * np.sin(angle)
            across = (y[:, None] - cy) * np.cos(angle) - (x - cx) * np.sin(angle)
            across += 8 * np.sin(along / 40 + rng.uniform(0, 6))
            if name in ("fold", "pen"):
                width, length = (rng.uniform(45, 60), 130) if name == "fold" else (rng.uniform(25, 40), 120)
                shape = (np.abs(across) < width / 2) & (np.abs(along) < length)
            else:
                radius = rng.uniform(60, 90)
                shape = along**2 + across**2 < radius**2
            if name == "fold":  # two layers of tissue: light passes twice
                image[shape] = (image[shape].astype(np.float32) ** 2 / 244).astype(np.uint8)
            elif name == "pen":
                ink = _INKS[rng.integers(len(_INKS))]
                image[shape] = (0.85 * ink + 0.15 * image[shape]).astype(np.uint8)
            else:
                soft = np.stack([ndimage.gaussian_filter(image[..., c], 2.5 / mpp) for c in range(3)], axis=-1)
                if name == "bubble":  # air: out of focus and pale, with a dark rim
                    soft = (244 - 0.35 * (244 - soft.astype(np.float32))).astype(np.uint8)
                    rim = np.abs(np.sqrt(along**2 + across**2) - radius) < 3
                    image[rim] = (0.4 * image[rim]).astype(np.uint8)
                image[shape] = soft[shape]
            kind[shape] = number
    return kind
