"""Compare predicted maps with measured maps: spatial autocorrelation of each gene (Moran's I) and local structure (SSIM).

Both are computed on log1p(UMI) over the nuclei of one section.
"""

from __future__ import annotations

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter
from scipy.spatial import cKDTree

from prts.data.gene_arrays import GeneRows, Matrix, gene_slices, is_constant

MORAN_NEIGHBOURS = 6
SSIM_UM_PER_PX = 50.0
# Wang et al. 2004: window of sigma 1.5 and 11 x 11 px, constants that stabilize small denominators.
_SIGMA, _RADIUS, _K1, _K2 = 1.5, 5, 0.01, 0.03


def neighbor_weights(xy_um: NDArray[np.float64], k: int = MORAN_NEIGHBOURS) -> sp.csr_matrix:
    """Row-normalized weights of the k nearest other nuclei, (n_nuclei, n_nuclei): 1 / k each.

    Parameters
    ----------
    xy_um
        Centers of the nuclei, (n_nuclei, 2).
    k
        Neighbors of a nucleus; at most n_nuclei - 1.
    """
    n = len(xy_um)
    k = min(k, n - 1)
    if k < 1:
        return sp.csr_matrix((n, n))
    # one more for the nucleus itself, which need not come first among nuclei at the same place
    _, near = cKDTree(xy_um).query(xy_um, k=k + 1)
    self_ = near == np.arange(n)[:, None]
    self_[~self_.any(axis=1), -1] = True
    return sp.csr_matrix((np.full(n * k, 1 / k), near[~self_], np.arange(0, n * k + 1, k)), shape=(n, n))


def morans_i(values: Matrix, weights: sp.csr_matrix) -> NDArray[np.float64]:
    """Moran's I of log1p of each gene: the correlation of a nucleus with the mean of its neighbors (Moran 1950).

    Parameters
    ----------
    values
        UMI, sparse or dense, (n_nuclei, n_genes).
    weights
        Row-normalized, (n_nuclei, n_nuclei), as `neighbor_weights` gives them.

    Returns
    -------
    (n_genes,); NaN if a gene is constant.
    """
    rows = GeneRows(values, "values")
    moran = np.full(rows.shape[1], np.nan)
    for genes in gene_slices(*rows.shape):
        z = np.log1p(rows[genes], dtype=np.float64)
        varies = ~is_constant(z)
        z = z[varies] - z[varies].mean(axis=1, keepdims=True)
        lagged = (weights @ z.T).T
        moran[np.arange(rows.shape[1])[genes][varies]] = np.einsum("gn,gn->g", z, lagged) / np.einsum("gn,gn->g", z, z)
    return moran


def moran_agreement(measured: NDArray[np.float64], predicted: NDArray[np.float64]) -> tuple[float, float]:
    """Pearson correlation over genes, and mean absolute difference, of Moran's I of measured and of predicted genes.

    Parameters
    ----------
    measured, predicted
        Moran's I, (n_genes,). Genes whose measured counts are constant (NaN) are left out; one whose prediction is constant
        counts as 0.
    """
    known = np.isfinite(measured)
    x, y = measured[known], np.nan_to_num(predicted[known])
    if len(x) < 2:
        return float("nan"), float("nan")
    difference = float(np.abs(x - y).mean())
    if np.ptp(x) == 0:
        return float("nan"), difference
    return (float(np.corrcoef(x, y)[0, 1]) if np.ptp(y) > 0 else 0.0), difference


def map_ssim(
    measured: Matrix, predicted: Matrix, xy_um: NDArray[np.float64], um_per_px: float = SSIM_UM_PER_PX
) -> NDArray[np.float64]:
    """Structural similarity of the measured and the predicted map of each gene (Wang et al. 2004).

    A map's pixel is the mean log1p(UMI) of the nuclei in it. Pixels without a nucleus are in no window (the Gaussian weights of the
    others are normalized to 1) and get no SSIM; the rest are averaged. The dynamic range is taken from the measured map.

    Parameters
    ----------
    measured, predicted
        UMI, sparse or dense, (n_nuclei, n_genes); all genes are densified at once, so pass only a few.
    xy_um
        Centers of the nuclei, (n_nuclei, 2).
    um_per_px
        Side of a pixel.

    Returns
    -------
    (n_genes,); NaN if the measured map is constant.
    """
    cell = np.floor((xy_um - xy_um.min(axis=0)) / um_per_px).astype(np.intp)
    width, height = cell.max(axis=0) + 1
    pixel = cell[:, 1] * width + cell[:, 0]
    n = np.bincount(pixel, minlength=height * width)
    mean = sp.csr_matrix((1 / n[pixel], (pixel, np.arange(len(pixel)))), shape=(height * width, len(pixel)))

    def raster(values: Matrix) -> NDArray[np.float64]:
        logged = np.log1p(GeneRows(values, "values")[:], dtype=np.float64)
        return np.asarray((mean @ logged.T).T).reshape(-1, height, width)

    occupied = (n > 0).reshape(height, width)

    def smooth(maps: NDArray[np.float64]) -> NDArray[np.float64]:
        smoothed: NDArray[np.float64] = gaussian_filter(maps, _SIGMA, mode="constant", radius=_RADIUS, axes=(-2, -1))
        return smoothed

    inside = np.where(occupied, smooth(occupied.astype(np.float64)), 1.0)
    x, y = raster(measured), raster(predicted)
    span = np.where(is_constant(x[:, occupied]), np.nan, np.ptp(x[:, occupied], axis=1))
    c1, c2 = (_K1 * span[:, None, None]) ** 2, (_K2 * span[:, None, None]) ** 2
    mx, my, xx, yy, xy = (smooth(maps) / inside for maps in (x, y, x * x, y * y, x * y))
    similar = (2 * mx * my + c1) * (2 * (xy - mx * my) + c2)
    similar /= (mx * mx + my * my + c1) * (xx - mx * mx + yy - my * my + c2)
    mean_similar: NDArray[np.float64] = similar[:, occupied].mean(axis=1)
    return mean_similar
