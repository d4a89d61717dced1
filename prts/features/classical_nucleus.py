"""Local columns of the classical encoder: the nucleus, the 4 um ring around it, and its shape."""

from __future__ import annotations

import numpy as np
import shapely
import torch
from numpy.typing import NDArray

from prts.features import texture as tx
from prts.features.classical_tile import (
    CHANNELS,
    DARK_H,
    E_RANGE,
    H_RANGE,
    STAINS,
    coherence,
    correlation,
    entropy,
    numbers,
)
from prts.geometry import lattice_points_within

Polygons = NDArray[np.object_]
Floats = NDArray[np.float64]

CROP = 64  # px, the central 32 um at 0.5 um per pixel: nuclei are about 20 px wide

_RING = 8  # px
_RIM = 2  # px
_RADIAL_EDGES = (0.0, 4.0, 8.0, 12.0, 16.0, 24.0, 32.0)  # px
_REGIONS = ("nucleus", "ring")
_PERCENTILES = (10, 50, 90)
_MPP = 0.5
_SHAPE = (
    *(
        "log_area_um2",
        "log_perimeter_um",
        "major_10um",
        "minor_10um",
        "eccentricity",
        "solidity",
        "circularity",
        "convexity",
    ),
    *(
        "rectangularity",
        "aspect",
        "radius_sd",
        "radius_min",
        "radius_max",
        "diameter_10um",
        "hole_share",
        "cos_2angle",
        "sin_2angle",
    ),
)
LOCAL_BLOCKS: dict[str, tuple[tuple[str, ...], ...]] = {
    "colour": (_REGIONS, CHANNELS, ("mean", "sd", "skewness", *(f"p{p}" for p in _PERCENTILES))),
    "contrast": (CHANNELS,),
    "histogram": (("nucleus_H", "ring_H", "ring_E"), numbers(8)),
    "dog": (("0.5um", "1um", "2um"), _REGIONS, STAINS),
    "edge": (("core", "rim", "ring"), ("mean", "sd")),
    "lbp": (_REGIONS, numbers(10)),
    "chromatin": (
        (
            "lag0.5um",
            "lag1um",
            "lag2um",
            "dense",
            "pale",
            "entropy",
            "log_integrated_H",
            "log_integrated_E",
            "coherence",
        ),
    ),
    "pair": (_REGIONS,),
    "radial": (numbers(6), STAINS),
    "context": (("ring_dark", "rest_dark", "H_minus_tile", "E_minus_tile", "share_inside"),),
    "shape": (_SHAPE,),
    "hu": (numbers(7),),
}


def local_blocks(channels: torch.Tensor, polygons: Polygons, mpp: float = _MPP) -> dict[str, torch.Tensor]:
    """All local blocks of some nuclei.

    Parameters
    ----------
    channels
        (b, 6, tile_px, tile_px): `CHANNELS` of the tiles.
    polygons
        Shapely polygons in pixels of their tile, (b,). What is outside the central 64 px only counts for the shape.
    mpp
        um per pixel.

    Returns
    -------
    For each block of `LOCAL_BLOCKS` its values, (b, *axes).
    """
    edge = (channels.shape[-1] - CROP) // 2
    x = channels[..., edge : edge + CROP, edge : edge + CROP].contiguous()
    nucleus, share_inside = nucleus_masks(polygons, edge)
    ring = _or(tx.dilate(nucleus, _RING) & ~nucleus, nucleus)
    core = _or(~tx.dilate(~nucleus, _RIM) & nucleus, nucleus)
    rim = _or(nucleus & ~core, nucleus)
    regions = torch.stack([nucleus, ring], dim=1).float()

    h, e = x[:, 3:4], x[:, 4:5]
    moments = [tx.moments(x, region[:, None].float()) for region in (nucleus, ring)]
    colour = [
        torch.cat([moment, tx.percentiles(x, region, _PERCENTILES)], dim=2)
        for moment, region in zip(moments, (nucleus, ring), strict=True)
    ]
    h_bins, e_bins = tx.bins(h, *H_RANGE, 8), tx.bins(e, *E_RANGE, 8)
    in_nucleus, in_ring = regions[:, :1], regions[:, 1:]
    histogram = torch.cat(
        [tx.histogram(h_bins, 8, in_nucleus), tx.histogram(h_bins, 8, in_ring), tx.histogram(e_bins, 8, in_ring)], dim=1
    )
    along, down = tx.gradient(h)
    strength = (along * along + down * down).sqrt()
    edges = torch.cat([tx.moments(strength, part[:, None].float())[..., :2] for part in (core, rim, ring)], dim=1)
    patterns = tx.binary_patterns(tx.blur(h))
    radial = tx.rings(CROP, _RADIAL_EDGES).expand(len(x), -1, -1, -1)
    dark = (h > DARK_H).float()
    tile_he = channels[:, 3:5].mean(dim=(2, 3))
    rest = _or(~nucleus & ~ring, ring)[:, None].float()
    mean_he = moments[0][:, 3:5, 0]
    area = torch.from_numpy(shapely.area(polygons) * mpp**2).float()
    return {
        "colour": torch.stack(colour, dim=1),
        "contrast": moments[0][..., 0] - moments[1][..., 0],
        "histogram": histogram,
        "dog": _dog(x[:, 3:5], regions),
        "edge": edges,
        "lbp": torch.cat([tx.histogram(patterns, 10, in_nucleus), tx.histogram(patterns, 10, in_ring)], dim=1),
        "chromatin": torch.stack(
            [
                *_autocorrelation(h[:, 0], nucleus, (1, 2, 4)),
                *_chromatin_shares(h, moments[0][:, 3], in_nucleus),
                entropy(histogram[:, 0]),
                *torch.log10(1.0 + mean_he.clamp_min(0.0) * area[:, None]).unbind(1),
                _coherence(along, down, in_nucleus),
            ],
            dim=1,
        ),
        "pair": torch.stack([correlation(h[:, 0], e[:, 0], regions[:, k]) for k in range(2)], dim=1),
        "radial": tx.weighted(x[:, 3:5], radial),
        "context": torch.cat(
            [
                tx.weighted(dark, in_ring)[:, 0],
                tx.weighted(dark, rest)[:, 0],
                mean_he - tile_he,
                share_inside[:, None],
            ],
            dim=1,
        ),
        "shape": shape_columns(polygons, mpp),
        "hu": hu_moments(nucleus),
    }


def nucleus_masks(polygons: Polygons, edge: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Pixels of the central crop whose centers are in the polygon, and the share of the polygon's area in the crop.

    Parameters
    ----------
    polygons
        (b,), in pixels of their tile.
    edge
        Where the crop begins in the tile, px.

    Returns
    -------
    (b, 64, 64) bool, with the center pixel set if a polygon contains no pixel center; (b,) 0 to 1.
    """
    n = len(polygons)
    # Side by side in one long strip, the crops are one lattice; a polygon wider than its crop is cut off below.
    strip = polygons.copy()
    xy, owner = shapely.get_coordinates(strip, return_index=True)
    strip = shapely.set_coordinates(strip, xy - edge + np.stack([owner * CROP, np.zeros(len(owner))], axis=1))
    affine = np.array([[1.0, 0.0, 0.5], [0.0, 1.0, 0.5]])
    which, row, col = lattice_points_within(strip, affine, n * CROP, CROP)
    own = col // CROP == which
    mask = np.zeros((n, CROP, CROP), dtype=bool)
    mask[which[own], row[own], col[own] % CROP] = True
    share = np.clip(mask.sum(axis=(1, 2)) / np.maximum(shapely.area(polygons), 1.0), 0.0, 1.0)
    mask[~mask.any(axis=(1, 2)), CROP // 2, CROP // 2] = True
    return torch.from_numpy(mask), torch.from_numpy(share).float()


def _or(region: torch.Tensor, otherwise: torch.Tensor) -> torch.Tensor:
    """The region, or another one for nuclei where it is empty."""
    return torch.where(region.any(dim=(1, 2))[:, None, None], region, otherwise)


def _dog(he: torch.Tensor, regions: torch.Tensor) -> torch.Tensor:
    """(b, level, region, stain): mean size of H and E differences of Gaussians at 0.5, 1 and 2 um."""
    out = []
    for _ in range(3):
        smooth = tx.blur(he)
        out.append(tx.weighted((he - smooth).abs(), regions))
        he, regions = tx.halve(smooth), tx.halve(regions)
    return torch.stack(out, dim=1)


def _autocorrelation(h: torch.Tensor, inside: torch.Tensor, lags: tuple[int, ...]) -> list[torch.Tensor]:
    """Correlation of H with itself some pixels to the right and below, over pairs within the nucleus; 0 without pairs."""
    out = []
    for lag in lags:
        pairs = [inside[..., lag:] & inside[..., :-lag], inside[..., lag:, :] & inside[..., :-lag, :]]
        shifted = [(h[..., lag:], h[..., :-lag]), (h[..., lag:, :], h[..., :-lag, :])]
        both = [
            correlation(a, b, _or(pair, torch.ones_like(pair)).float()) * pair.any(dim=(1, 2))
            for (a, b), pair in zip(shifted, pairs, strict=True)
        ]
        out.append((both[0] + both[1]) / 2.0)
    return out


def _chromatin_shares(h: torch.Tensor, moments: torch.Tensor, inside: torch.Tensor) -> list[torch.Tensor]:
    """Shares of the nucleus more than one sd above and below its mean H."""
    mean, sd = moments[:, 0, None, None, None], moments[:, 1, None, None, None]
    shares = torch.cat([(h > mean + sd).float(), (h < mean - sd).float()], dim=1)
    return list(tx.weighted(shares, inside)[:, 0].unbind(1))


def _coherence(along: torch.Tensor, down: torch.Tensor, inside: torch.Tensor) -> torch.Tensor:
    products = torch.cat([along * along, down * down, along * down], dim=1)
    return coherence(*tx.weighted(products, inside)[:, 0].unbind(1))


def shape_columns(polygons: Polygons, mpp: float = _MPP) -> torch.Tensor:
    """Shape of the polygons themselves, exact: (b, 17), the labels of the block `shape`.

    Axes are those of the ellipse with the same second moments, which Green's theorem gives from the vertices. `mpp` is um per pixel.
    """
    area = shapely.area(polygons)
    perimeter = shapely.length(polygons)
    hull = shapely.convex_hull(polygons)
    box = shapely.oriented_envelope(polygons)
    corners = shapely.get_coordinates(shapely.get_exterior_ring(box)).reshape(len(polygons), 5, 2)
    sides = np.sort(np.linalg.norm(np.diff(corners[:, :3], axis=1), axis=2), axis=1)
    xx, yy, xy, radius = _second_moments(polygons)
    spread = np.sqrt((xx - yy) ** 2 + 4.0 * xy**2)
    major, minor = (4.0 * np.sqrt(np.maximum(xx + yy + sign * spread, 0.0) / 2.0) for sign in (1.0, -1.0))
    eccentricity = np.sqrt(np.clip(1.0 - (minor / major) ** 2, 0.0, 1.0))
    filled = shapely.area(shapely.polygons(shapely.get_exterior_ring(polygons)))
    # A polygon without direction (a square, a disc) has 0 for both.
    direction = np.where(spread > 1e-9, spread, np.inf)
    columns = [
        np.log10(area * mpp**2),
        np.log10(perimeter * mpp),
        major * mpp / 10.0,
        minor * mpp / 10.0,
        eccentricity,
        area / shapely.area(hull),
        4.0 * np.pi * area / perimeter**2,
        shapely.length(hull) / perimeter,
        area / shapely.area(box),
        sides[:, 0] / sides[:, 1],
        *radius,
        2.0 * np.sqrt(area / np.pi) * mpp / 10.0,
        1.0 - area / filled,
        eccentricity * (xx - yy) / direction,
        eccentricity * 2.0 * xy / direction,
    ]
    return torch.from_numpy(np.stack(columns, axis=1)).float()


def _second_moments(polygons: Polygons) -> tuple[Floats, Floats, Floats, Floats]:
    """Central second moments xx, yy, xy (px2) of the outlines' areas; sd, least and largest vertex distance in mean distances."""
    n = len(polygons)
    outline, owner = shapely.get_coordinates(shapely.get_exterior_ring(polygons), return_index=True)
    outline = outline - shapely.get_coordinates(shapely.centroid(polygons))[owner]
    edge = np.flatnonzero(owner[:-1] == owner[1:])
    of, (x0, y0), (x1, y1) = owner[edge], outline[edge].T, outline[edge + 1].T
    cross = x0 * y1 - x1 * y0

    def total(term: Floats) -> Floats:
        return np.bincount(of, cross * term, n).astype(np.float64)

    area = total(np.full(len(of), 0.5))
    cx, cy = total((x0 + x1) / 6.0) / area, total((y0 + y1) / 6.0) / area
    xx = total((x0 * x0 + x0 * x1 + x1 * x1) / 12.0) / area - cx * cx
    yy = total((y0 * y0 + y0 * y1 + y1 * y1) / 12.0) / area - cy * cy
    xy = total((2.0 * (x0 * y0 + x1 * y1) + x0 * y1 + x1 * y0) / 24.0) / area - cx * cy
    distance = np.hypot(x0, y0)
    count = np.bincount(of, minlength=n)
    mean = np.bincount(of, distance, n) / count
    sd = np.sqrt(np.maximum(np.bincount(of, distance**2, n) / count - mean**2, 0.0))
    first = np.flatnonzero(np.diff(of, prepend=-1))
    least, largest = np.minimum.reduceat(distance, first), np.maximum.reduceat(distance, first)
    return xx, yy, xy, np.stack([sd, least, largest]) / mean


def hu_moments(mask: torch.Tensor) -> torch.Tensor:
    """Hu's seven invariants to translation, scale and rotation (1962) of masks (b, rows, columns): sign(h) log10(1 + 1e6 |h|) / 6."""
    rows, cols = mask.shape[1:]
    y, x = torch.meshgrid(torch.arange(rows).double(), torch.arange(cols).double(), indexing="ij")
    weight = mask.double()
    total = weight.sum(dim=(1, 2))
    x = x - ((weight * x).sum(dim=(1, 2)) / total)[:, None, None]
    y = y - ((weight * y).sum(dim=(1, 2)) / total)[:, None, None]

    def eta(p: int, q: int) -> torch.Tensor:
        moment: torch.Tensor = (weight * x**p * y**q).sum(dim=(1, 2)) / total ** (1.0 + (p + q) / 2.0)
        return moment

    n20, n02, n11, n30, n03, n21, n12 = (eta(*pq) for pq in ((2, 0), (0, 2), (1, 1), (3, 0), (0, 3), (2, 1), (1, 2)))
    a, b = n30 + n12, n21 + n03
    c, d = n30 - 3.0 * n12, 3.0 * n21 - n03
    invariants = torch.stack(
        [
            n20 + n02,
            (n20 - n02) ** 2 + 4.0 * n11**2,
            c**2 + d**2,
            a**2 + b**2,
            c * a * (a**2 - 3.0 * b**2) + d * b * (3.0 * a**2 - b**2),
            (n20 - n02) * (a**2 - b**2) + 4.0 * n11 * a * b,
            d * a * (a**2 - 3.0 * b**2) - c * b * (3.0 * a**2 - b**2),
        ],
        dim=1,
    )
    return (invariants.sign() * torch.log10(1.0 + 1e6 * invariants.abs()) / 6.0).float()
