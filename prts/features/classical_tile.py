"""Global columns of the classical encoder: stain and texture of the whole tile."""

from __future__ import annotations

import math

import torch

from prts.features import texture as tx

CHANNELS = ("red", "green", "blue", "H", "E", "R")
STAINS = ("H", "E")
# Amounts of stain: where histograms begin and end, what is a nucleus' H, a strong E, and glass (mean optical density).
H_RANGE, E_RANGE = (-0.1, 1.5), (-0.1, 0.4)
DARK_H, STRONG_E, EMPTY = 0.5, 0.1, 0.06

_PERCENTILES = (5, 25, 50, 75, 95)
_N_RINGS = 8


def numbers(n: int) -> tuple[str, ...]:
    """Labels "0" to "n - 1"."""
    return tuple(map(str, range(n)))


GLOBAL_BLOCKS: dict[str, tuple[tuple[str, ...], ...]] = {
    "colour": (CHANNELS, ("mean", "sd", "skewness", *(f"p{p}" for p in _PERCENTILES))),
    "histogram": (STAINS, numbers(16)),
    "joint": (numbers(6), numbers(6)),
    "grid": (STAINS, numbers(4), numbers(4)),
    "ring": (numbers(8), ("H_mean", "E_mean", "R_mean", "H_sd", "E_sd", "H_dog", "dark", "empty")),
    "dog": (("0.5um", "1um", "2um", "4um", "8um"), STAINS, ("size", "rms", "skewness")),
    "orientation": (("1um", "4um"), STAINS, numbers(8)),
    "gradient": (STAINS, ("mean", "sd", "p50", "p95")),
    "tensor": (("1um", "2um", "4um"), STAINS, ("energy", "coherence", "local_coherence")),
    "lbp": (("1um", "2um", "4um"), STAINS, numbers(10)),
    "correlation": (("2um", "4um", "8um", "16um"), ("HH", "EE", "HE")),
    "blobs": (("zone0", "zone1", "zone2", "zone3", "H_mean", "H_sd"),),
    "tissue": (("empty", "dark", "eosin_rich", "H_entropy", "E_entropy", "HE_correlation"),),
}


def global_blocks(channels: torch.Tensor, mpp: float = 0.5) -> dict[str, torch.Tensor]:
    """All global blocks of some tiles.

    Parameters
    ----------
    channels
        (b, 6, tile_px, tile_px): `CHANNELS` of the tiles, tile_px a multiple of 32. Names such as `um2` are for 0.5 um per pixel.
    mpp
        um per pixel.

    Returns
    -------
    For each block of `GLOBAL_BLOCKS` its values, (b, *axes).
    """
    um1 = tx.halve(channels[:, 3:])  # H, E, R at 1 um
    um2 = tx.halve(tx.halve(channels))
    h2, e2 = um2[:, 3], um2[:, 4]
    binned = [tx.bins(um1[:, 0], *H_RANGE, 16), tx.bins(um1[:, 1], *E_RANGE, 16)]
    histogram = tx.histogram(torch.stack(binned, dim=1), 16)
    joint = tx.bins(h2, *H_RANGE, 6).int() * 6 + tx.bins(e2, *E_RANGE, 6)
    everywhere = torch.ones((len(channels), 1, *um2.shape[2:]))
    dark = (h2 > DARK_H).float()
    empty = (um2[:, :3].mean(dim=1) < EMPTY).float()
    fine = um1[:, :1] - tx.blur(um1[:, :1])
    moments = tx.moments(um2, everywhere)
    side = um2.shape[-1] // 4
    return {
        "colour": torch.cat([moments, tx.percentiles(um2, None, _PERCENTILES)], dim=2),
        "histogram": histogram,
        "joint": tx.histogram(joint[:, None], 36).view(-1, 6, 6),
        "grid": um2[:, 3:5].reshape(len(um2), 2, 4, side, 4, side).mean(dim=(3, 5)),
        "ring": _rings(um2, tx.halve(fine.abs())[:, 0], dark, empty),
        **_pyramid(channels[:, 3:5]),
        "correlation": _correlations(um2[:, 3:5], (1, 2, 4, 8)),
        "blobs": _blobs(tx.blur(um2[:, 3:4]), 4.0 * mpp),
        "tissue": torch.stack(
            [
                empty.mean(dim=(1, 2)),
                dark.mean(dim=(1, 2)),
                (e2 > STRONG_E).float().mean(dim=(1, 2)),
                *entropy(histogram).unbind(1),
                correlation(h2, e2, everywhere[:, 0]),
            ],
            dim=1,
        ),
    }


def _rings(um2: torch.Tensor, fine: torch.Tensor, dark: torch.Tensor, empty: torch.Tensor) -> torch.Tensor:
    """(b, ring, 8): means of the stains, sd of H and E, fine texture, shares of dark and empty, in rings of 8 um."""
    size = um2.shape[-1]
    zone = tx.rings(size, tuple(size / 2 / _N_RINGS * k for k in range(_N_RINGS + 1))).expand(len(um2), -1, -1, -1)
    he = um2[:, 3:5]
    values = torch.cat([um2[:, 3:6], he * he, fine[:, None], dark[:, None], empty[:, None]], dim=1)
    mean = tx.weighted(values, zone)
    mean[..., 3:5] = (mean[..., 3:5] - mean[..., :2] ** 2).clamp_min(0.0).sqrt()
    return mean


def _pyramid(he: torch.Tensor) -> dict[str, torch.Tensor]:
    """The blocks dog, orientation, gradient, tensor and lbp, going from 0.5 um to 8 um a pixel."""
    dog, orientation, tensor, lbp = [], [], [], []
    steepness = torch.empty(0)
    for level in range(5):
        smooth = tx.blur(he)
        difference = he - smooth
        square = difference * difference
        rms = square.mean(dim=(2, 3)).sqrt()
        third = (square * difference).mean(dim=(2, 3))
        skewness = torch.where(rms > 1e-4, third / rms.clamp_min(1e-4) ** 3, 0.0).clamp(-10.0, 10.0)
        dog.append(torch.stack([difference.abs().mean(dim=(2, 3)), rms, skewness], dim=2))
        if level in (1, 2, 3):  # 1, 2, 4 um
            along, down = tx.gradient(smooth)
            tensor.append(_structure(along, down))
            lbp.append(tx.histogram(tx.binary_patterns(smooth), 10))
            strength = (along * along + down * down).sqrt()
            if level == 2:
                everywhere = torch.ones((len(he), 1, *strength.shape[2:]))
                steepness = torch.cat(
                    [tx.moments(strength, everywhere)[..., :2], tx.percentiles(strength, None, (50, 95))], dim=2
                )
            if level in (1, 3):
                angle = torch.atan2(down, along) / math.pi + 1.0  # 0 to 2; a direction and its opposite are one
                sector = (angle * 8.0).to(torch.uint8) % 8
                # The floor makes the histogram of a flat tile uniform instead of undefined.
                orientation.append(tx.histogram(sector, 8, strength + 1e-6))
        he = tx.halve(smooth)
    return {
        "dog": torch.stack(dog, dim=1),
        "orientation": torch.stack(orientation, dim=1),
        "gradient": steepness,
        "tensor": torch.stack(tensor, dim=1),
        "lbp": torch.stack(lbp, dim=1),
    }


def _structure(along: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
    """(b, c, 3): log10 gradient energy, coherence of the summed structure tensor, mean coherence of the blurred one."""
    products = (along * along, down * down, along * down)
    xx, yy, xy = (product.mean(dim=(2, 3)) for product in products)
    local = coherence(*(tx.blur(product) for product in products))
    return torch.stack([torch.log10(xx + yy + 1e-6), coherence(xx, yy, xy), local.mean(dim=(2, 3))], dim=2)


def coherence(xx: torch.Tensor, yy: torch.Tensor, xy: torch.Tensor) -> torch.Tensor:
    """How much one direction prevails in a structure tensor: 0 none, 1 all."""
    return ((xx - yy) ** 2 + 4.0 * xy * xy).sqrt() / (xx + yy + 1e-6)


def correlation(a: torch.Tensor, b: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Weighted Pearson correlation of two images (b, rows, columns) -> (b,); 0 where one of them is flat."""
    values = torch.stack([a, b, a * a, b * b, a * b], dim=1)
    mean_a, mean_b, aa, bb, ab = tx.weighted(values, weight[:, None])[:, 0].unbind(1)
    scale = ((aa - mean_a**2).clamp_min(0.0) * (bb - mean_b**2).clamp_min(0.0)).sqrt()
    return torch.where(scale > 1e-6, (ab - mean_a * mean_b) / scale.clamp_min(1e-6), 0.0).clamp(-1.0, 1.0)


def _correlations(he: torch.Tensor, lags: tuple[int, ...]) -> torch.Tensor:
    """(b, lag, 3): correlation of H with H, E with E and H with E some pixels apart, mean of along and down."""
    he = he - he.mean(dim=(2, 3), keepdim=True)
    sd = (he * he).mean(dim=(2, 3)).sqrt()
    scale = torch.stack([sd[:, 0] ** 2, sd[:, 1] ** 2, sd[:, 0] * sd[:, 1]], dim=1)
    out = []
    for lag in lags:
        pairs = [(he[..., lag:], he[..., :-lag]), (he[..., lag:, :], he[..., :-lag, :])]
        product = [
            torch.stack([(a[:, i] * b[:, j]).mean(dim=(1, 2)) for i, j in ((0, 0), (1, 1), (0, 1))], dim=1)
            for a, b in pairs
        ]
        mean = (product[0] + product[1]) / 2.0
        out.append(torch.where(scale > 1e-6, mean / scale.clamp_min(1e-6), 0.0).clamp(-2.0, 2.0))
    return torch.stack(out, dim=1)


def _blobs(smooth_h: torch.Tensor, um: float) -> torch.Tensor:
    """(b, 6): peaks of H per 1,000 um2 in 4 zones, mean and sd of H at the peaks (0 without peaks); `um` per pixel."""
    size = smooth_h.shape[-1]
    peak = (tx.local_maxima(smooth_h) & (smooth_h > DARK_H / 2)).float()
    zone = tx.rings(size, tuple(size / 8 * k for k in range(5)))
    density = tx.weighted(peak, zone.expand(len(peak), -1, -1, -1))[..., 0] * (1000.0 / um**2)
    count = peak.sum(dim=(1, 2, 3)).clamp_min(1.0)
    mean = (peak * smooth_h).sum(dim=(1, 2, 3)) / count
    square = (peak * smooth_h * smooth_h).sum(dim=(1, 2, 3)) / count
    return torch.cat([density, mean[:, None], (square - mean**2).clamp_min(0.0).sqrt()[:, None]], dim=1)


def entropy(share: torch.Tensor) -> torch.Tensor:
    """Entropy of histograms (..., bins) as a share of the largest possible, 0 to 1."""
    return -torch.xlogy(share, share).sum(dim=-1) / math.log(share.shape[-1])
