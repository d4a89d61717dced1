"""Stain and texture of image batches: the array operations of the classical encoder.

All take float32 tensors of shape (b, c, rows, columns) and process each image separately.
"""

from __future__ import annotations

import itertools

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

# Optical density of pure hematoxylin and eosin in red, green, blue (Ruifrok & Johnston 2001); the third axis is orthogonal to both.
_HEMATOXYLIN = np.array([0.65, 0.70, 0.29])
_EOSIN = np.array([0.07, 0.99, 0.11])
_NEIGHBORS = ((-1, -1), (-1, 0), (-1, 1), (0, 1), (1, 1), (1, 0), (1, -1), (0, -1))


def _unmixing() -> torch.Tensor:
    """(3, 3): optical density (r, g, b) to amounts (hematoxylin, eosin, residual), one stain per row."""
    stains = np.stack([_HEMATOXYLIN, _EOSIN, np.cross(_HEMATOXYLIN, _EOSIN)], axis=1)
    return torch.from_numpy(np.linalg.inv(stains / np.linalg.norm(stains, axis=0))).float()


_UNMIX = _unmixing()


def _patterns() -> NDArray[np.uint8]:
    """The pattern, 0 to 9, of each of the 256 combinations of brighter neighbors, a bit each."""
    bits = (np.arange(256)[:, None] >> np.arange(8)) & 1
    changes = (bits != np.roll(bits, 1, axis=1)).sum(axis=1)
    return np.where(changes > 2, 9, bits.sum(axis=1)).astype(np.uint8)


_PATTERNS = _patterns()
_DENSITY = torch.arange(256).float().add_(1.0).mul_(1.0 / 256.0).log10_().neg_().numpy()
"""-log10 of the transmitted light of each gray level, 0 for white."""


def channels(tiles: NDArray[np.uint8]) -> torch.Tensor:
    """Optical density of red, green and blue, and amounts of hematoxylin, eosin and residual by fixed color deconvolution.

    (b, rows, columns, 3) uint8 -> (b, 6, rows, columns).
    """
    out = torch.empty((len(tiles), 6, *tiles.shape[1:3]))
    np.take(_DENSITY, tiles.transpose(0, 3, 1, 2), out=out[:, :3].numpy(), mode="clip")
    red, green, blue = out[:, :3].unbind(1)
    for stain, (r, g, b) in zip(out[:, 3:].unbind(1), _UNMIX.tolist(), strict=True):
        torch.mul(red, r, out=stain)
        stain.add_(green, alpha=g).add_(blue, alpha=b)
    return out


def halve(x: torch.Tensor) -> torch.Tensor:
    """Mean of 2 x 2 pixels."""
    rows = x[..., 0::2, :] + x[..., 1::2, :]
    return (rows[..., 0::2] + rows[..., 1::2]) * 0.25


def blur(x: torch.Tensor) -> torch.Tensor:
    """Binomial blur (1, 4, 6, 4, 1) along both axes, sigma 1 px, edges mirrored."""
    x = F.pad(x, (2, 2, 2, 2), mode="reflect")
    # (1, 1) four times; each sum is a single pass over memory
    for _ in range(4):
        x = x[..., 1:, :] + x[..., :-1, :]
    for _ in range(4):
        x = x[..., 1:] + x[..., :-1]
    return x.mul_(1.0 / 256.0)


def gradient(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Central differences along columns and along rows, per px, edges mirrored."""
    padded = F.pad(x, (1, 1, 1, 1), mode="reflect")
    return (
        0.5 * (padded[..., 1:-1, 2:] - padded[..., 1:-1, :-2]),
        0.5 * (padded[..., 2:, 1:-1] - padded[..., :-2, 1:-1]),
    )


def binary_patterns(x: torch.Tensor) -> torch.Tensor:
    """Rotation-invariant uniform local binary pattern of each pixel (Ojala et al. 2002), 0 to 9, uint8.

    The number of the 8 neighbors that are brighter, if they are one run on the circle; else 9. Edges are mirrored.
    """
    code = torch.zeros(x.shape, dtype=torch.uint8)
    for bit, neighbor in enumerate(_neighbors(x)):
        code |= (neighbor > x).view(torch.uint8) << bit
    return torch.from_numpy(_PATTERNS[code.numpy()])


def local_maxima(x: torch.Tensor) -> torch.Tensor:
    """Pixels above their 8 neighbors, bool; of two equal neighbors the first in reading order counts."""
    peak = torch.ones(x.shape, dtype=torch.bool)
    for (row, col), neighbor in zip(_NEIGHBORS, _neighbors(x), strict=True):
        peak &= (x > neighbor) if (row, col) < (0, 0) else (x >= neighbor)
    return peak


def _neighbors(x: torch.Tensor) -> list[torch.Tensor]:
    rows, cols = x.shape[-2:]
    padded = F.pad(x, (1, 1, 1, 1), mode="reflect")
    return [padded[..., 1 + r : 1 + r + rows, 1 + c : 1 + c + cols] for r, c in _NEIGHBORS]


def histogram(index: torch.Tensor, n_bins: int, weight: torch.Tensor | None = None) -> torch.Tensor:
    """Share of each bin 0 .. n_bins - 1 over the last two axes of an index image, optionally weighted.

    Parameters
    ----------
    index
        (b, c, rows, columns), integers.
    n_bins
        Number of bins.
    weight
        Broadcasts to `index`; not 0 everywhere in an image.

    Returns
    -------
    (b, c, n_bins), sums to 1.
    """
    b, c = index.shape[:2]
    images = torch.arange(b * c, dtype=torch.int32).view(b, c, 1, 1)
    flat = (index + images * n_bins).flatten()
    weights = None if weight is None else weight.expand(index.shape).flatten().double()
    counts = torch.bincount(flat, weights, minlength=b * c * n_bins).view(b, c, n_bins)
    return (counts / counts.sum(dim=-1, keepdim=True)).float()


def bins(x: torch.Tensor, low: float, high: float, n: int) -> torch.Tensor:
    """Index of the bin of each value: n equal bins from low to high, the outer ones open."""
    return ((x - low) * (n / (high - low))).clamp_(0, n - 1).to(torch.uint8)


def weighted(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Weighted mean over the last two axes: x (b, c, rows, columns), weight (b, r, rows, columns) -> (b, r, c).

    One product per image, so that rounding does not depend on the position in the batch.
    """
    weight = weight.flatten(2)
    return torch.bmm(weight, x.flatten(2).transpose(1, 2)) / weight.sum(dim=2, keepdim=True)


def moments(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Mean, standard deviation and skewness (within +-10, 0 where flat): (b, c, rows, columns) and (b, 1, rows, columns) -> (b, c, 3)."""
    mean = weighted(x, weight)[:, 0]
    x = x - mean[:, :, None, None]
    square = x * x
    variance = weighted(square, weight)[:, 0]
    sd = variance.clamp_min(0.0).sqrt()
    third = weighted(square * x, weight)[:, 0]
    skewness = torch.where(sd > 1e-4, third / sd.clamp_min(1e-4) ** 3, 0.0).clamp(-10.0, 10.0)
    return torch.stack([mean, sd, skewness], dim=-1)


def percentiles(x: torch.Tensor, inside: torch.Tensor | None, at: tuple[float, ...]) -> torch.Tensor:
    """Nearest-rank percentiles over the last two axes: x (b, c, rows, columns), inside (b, rows, columns) bool -> (b, c, len(at)).

    Parameters
    ----------
    x
        Values.
    inside
        Pixels to include, at least one per image; None includes all.
    at
        Percentiles, 0 to 100.
    """
    values = x.flatten(2)
    n = torch.full((len(x),), values.shape[2])
    if inside is not None:
        values = values.masked_fill(~inside.flatten(1)[:, None], torch.inf)
        n = inside.flatten(1).sum(dim=1)
    ordered = torch.from_numpy(np.sort(values.numpy(), axis=2))
    rank = torch.round((n[:, None] - 1) * (torch.tensor(at, dtype=torch.float64) / 100.0)).long()
    return ordered.gather(2, rank[:, None].expand(-1, x.shape[1], -1))


def disc(radius: int) -> torch.Tensor:
    """A filled disc as a convolution kernel, (1, 1, 2 radius + 1, 2 radius + 1)."""
    axis = torch.arange(-radius, radius + 1)
    return ((axis[:, None] ** 2 + axis**2) <= radius**2).float()[None, None]


def dilate(mask: torch.Tensor, radius: int) -> torch.Tensor:
    """Grow a mask (b, rows, columns), bool, by a disc."""
    return F.conv2d(mask[:, None].float(), disc(radius), padding=radius)[:, 0] > 0.5


def rings(size: int, edges: tuple[float, ...]) -> torch.Tensor:
    """Which pixels of a size x size image are in each ring around its center, (1, n, size, size) float; edges in px, ascending."""
    axis = torch.arange(size) + 0.5 - size / 2
    radius = (axis[:, None] ** 2 + axis**2).sqrt()
    return torch.stack([(radius >= a) & (radius < b) for a, b in itertools.pairwise(edges)]).float()[None]
