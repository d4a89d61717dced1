import time

import numpy as np
import pytest
import scipy.sparse as sp
from skimage.metrics import structural_similarity

from prts.evaluation.spatial import map_ssim, moran_agreement, morans_i, neighbor_weights


def test_morans_i_is_the_double_sum():
    rng = np.random.default_rng(0)
    xy, counts = rng.uniform(0, 100, (60, 2)), rng.poisson(1.0, (60, 4))
    counts[:, 3] = 2
    distance = np.linalg.norm(xy[:, None] - xy[None], axis=2) + np.diag(np.full(60, np.inf))
    w = np.zeros((60, 60))
    for i in range(60):
        w[i, np.argsort(distance[i])[:6]] = 1 / 6
    expected = []
    for g in range(3):
        z = np.log1p(counts[:, g]) - np.log1p(counts[:, g]).mean()
        expected.append(60 / w.sum() * sum(w[i, j] * z[i] * z[j] for i in range(60) for j in range(60)) / (z @ z))
    weights = neighbor_weights(xy)
    np.testing.assert_allclose(weights.toarray(), w)
    for given in (counts, sp.csr_matrix(counts)):
        np.testing.assert_allclose(morans_i(given, weights), [*expected, np.nan])


def test_morans_i_of_a_chessboard_and_of_halves():
    x, y = (a.ravel() for a in np.meshgrid(np.arange(20.0), np.arange(20.0)))
    weights = neighbor_weights(np.stack([x, y], axis=1), k=4)
    inside = (x > 0) & (x < 19) & (y > 0) & (y < 19)
    board, halves = (x + y) % 2, (x < 10).astype(float)
    # within the board each nucleus has its four opposites; at the rim k = 4 reaches further
    assert np.all((weights @ board)[inside] == 1 - board[inside])
    moran = morans_i(np.stack([board, halves], axis=1), weights)
    assert moran[0] < -0.8
    assert moran[1] > 0.85


def test_nuclei_at_one_place_are_not_their_own_neighbours():
    weights = neighbor_weights(np.zeros((20, 2)), k=3)
    assert weights.diagonal().sum() == 0
    np.testing.assert_allclose(weights.sum(axis=1), 1)
    assert neighbor_weights(np.zeros((1, 2))).nnz == 0


def test_moran_agreement_counts_a_gene_that_cannot_be_emitted_as_no_pattern():
    measured = np.array([0.1, 0.5, np.nan, 0.3])
    predicted = np.array([0.2, np.nan, 0.9, 0.3])
    agreement, difference = moran_agreement(measured, predicted)
    assert agreement == pytest.approx(np.corrcoef([0.1, 0.5, 0.3], [0.2, 0.0, 0.3])[0, 1])
    assert difference == pytest.approx((0.1 + 0.5 + 0.0) / 3)


def test_ssim_of_a_full_raster_is_that_of_scikit_image():
    rng = np.random.default_rng(1)
    row, col = (a.ravel() for a in np.meshgrid(np.arange(40), np.arange(32), indexing="ij"))
    measured = rng.poisson(np.exp(np.sin(row / 5))[:, None] * [0.5, 2.0])
    predicted = np.exp(np.sin(row / 5 + 0.4))[:, None] * [0.5, 2.0] + 0.3 * rng.random((len(row), 2))
    ours = map_ssim(sp.csr_matrix(measured), predicted, np.stack([col, row], axis=1) * 10.0 + 5, um_per_px=10)
    for g in range(2):
        x, y = (np.log1p(v[:, g].astype(float)).reshape(40, 32) for v in (measured, predicted))
        _, theirs = structural_similarity(
            x, y, data_range=np.ptp(x), gaussian_weights=True, use_sample_covariance=False, full=True
        )
        # windows that reach over the edge are cut off here and mirrored there
        inner = map_ssim_pixels(x, y)[5:-5, 5:-5]
        np.testing.assert_allclose(inner, theirs[5:-5, 5:-5], rtol=1e-6)
        assert ours[g] == pytest.approx(map_ssim_pixels(x, y).mean())


def map_ssim_pixels(x, y):
    """Slowly: window by window, without what lies outside."""
    offset = np.arange(-5, 6)
    gauss = np.exp(-(offset**2) / (2 * 1.5**2))
    out = np.empty(x.shape)
    c1, c2 = (0.01 * np.ptp(x)) ** 2, (0.03 * np.ptp(x)) ** 2
    for r in range(x.shape[0]):
        for c in range(x.shape[1]):
            rows, cols = r + offset, c + offset
            rk, ck = (rows >= 0) & (rows < x.shape[0]), (cols >= 0) & (cols < x.shape[1])
            w = np.outer(gauss[rk], gauss[ck])
            w /= w.sum()
            a, b = x[np.ix_(rows[rk], cols[ck])], y[np.ix_(rows[rk], cols[ck])]
            ma, mb = (w * a).sum(), (w * b).sum()
            va, vb, cov = (w * a * a).sum() - ma**2, (w * b * b).sum() - mb**2, (w * a * b).sum() - ma * mb
            out[r, c] = (2 * ma * mb + c1) * (2 * cov + c2) / ((ma**2 + mb**2 + c1) * (va + vb + c2))
    return out


def test_ssim_ignores_where_no_nucleus_is():
    rng = np.random.default_rng(2)
    xy = np.concatenate([rng.uniform(0, 1000, (400, 2)), rng.uniform(5000, 6000, (400, 2))])
    counts = rng.poisson(2.0, (800, 3))
    np.testing.assert_allclose(map_ssim(counts, counts, xy), 1)
    moved = xy + [0, 20_000] * (xy[:, :1] > 3000)
    guess = rng.gamma(2.0, 1.0, (800, 3))
    np.testing.assert_allclose(map_ssim(counts, guess, xy), map_ssim(counts, guess, moved))
    # a flat prediction has no structure, a constant gene no range
    flat = np.full((800, 3), 2.0)
    assert (map_ssim(counts, flat, xy) < 0.5).all()
    assert np.isnan(map_ssim(flat, counts, xy)).all()


@pytest.mark.slow
def test_a_thousand_genes_take_two_seconds():
    rng = np.random.default_rng(3)
    xy, counts = rng.uniform(0, 2000, (5000, 2)), sp.random(5000, 1000, 0.1, "csr", rng=rng)
    predicted = rng.random((5000, 1000), dtype=np.float32)
    started = time.perf_counter()
    weights = neighbor_weights(xy)
    assert np.isfinite(morans_i(counts, weights)).all()
    assert np.isfinite(morans_i(predicted, weights)).all()
    map_ssim(counts[:, :50], predicted[:, :50], xy)
    assert time.perf_counter() - started < 6  # 0.5 s on an idle core
