import numpy as np
import pytest
import scipy.sparse as sp
from scipy.stats import poisson

from prts.evaluation.bootstrap import random_blocks
from prts.evaluation.ceiling import _log1p_halves, ceiling_share, noise_ceiling


def gamma_rates(rng, n, mu, cv):
    return rng.gamma(1 / np.square(cv), mu * np.square(cv), size=(n, len(mu)))


def test_raw_ceiling_of_poisson_gamma_counts_is_the_formula():
    rng = np.random.default_rng(0)
    mu, cv = np.array([0.1, 0.3, 1.0, 1.0, 10.0]), np.array([2.0, 1.0, 0.5, 2.0, 1.0])
    counts = sp.csr_matrix(rng.poisson(gamma_rates(rng, 20_000, mu, cv)))
    result = noise_ceiling(counts, random_blocks(20_000), n_replicates=200)
    expected = np.sqrt(mu * cv**2 / (1 + mu * cv**2))
    np.testing.assert_allclose(expected[:4], [0.53, 0.48, 0.45, 0.89], atol=0.006)  # the table in print
    np.testing.assert_allclose(result["ceiling_raw"], expected, atol=0.035)


def test_log1p_ceiling_is_the_pcc_of_the_best_predictor():
    rng = np.random.default_rng(1)
    mu, cv = np.array([0.3, 1.0, 3.0, 3.0, 10.0]), np.array([1.0, 1.0, 0.5, 2.0, 1.0])
    rate = gamma_rates(rng, 20_000, mu, cv)
    result = noise_ceiling(sp.csr_matrix(rng.poisson(rate)), random_blocks(20_000), n_replicates=200)
    for j in range(len(mu)):
        # Nothing predicts log1p(c) better than its mean at the true rate: the truth that no slide knows.
        grid = np.arange(int(rate[:, j].max() * 1.5) + 40)
        pmf = poisson.pmf(grid, rate[:3000, j, None])
        first, second = pmf @ np.log1p(grid), pmf @ np.log1p(grid) ** 2
        best = np.sqrt(first.var() / (second.mean() - first.mean() ** 2))
        assert result["ceiling"][j] == pytest.approx(best, abs=0.02)


def test_the_limit_equals_the_average_over_explicit_splits():
    rng = np.random.default_rng(2)
    counts = rng.poisson(gamma_rates(rng, 2000, np.array([0.2, 1.0, 5.0]), np.array([2.0, 1.0, 1.0])))
    result = noise_ceiling(sp.csr_matrix(counts), random_blocks(2000), n_replicates=200)
    for function, name in ((np.log1p, "ceiling"), (lambda v: v, "ceiling_raw")):
        rho = np.zeros(3)
        for _ in range(60):
            half = rng.binomial(counts, 0.5)
            a, b = function(half), function(counts - half)
            rho += [np.corrcoef(a[:, j], b[:, j])[0, 1] / 60 for j in range(3)]
        np.testing.assert_allclose(result[name], np.sqrt(2 * rho / (1 + rho)), atol=0.01)


def test_pure_noise_has_no_ceiling():
    rng = np.random.default_rng(3)
    counts = sp.csr_matrix(rng.poisson(np.repeat(rng.gamma(1, 0.2, size=(1, 500)), 2000, axis=0)))
    result = noise_ceiling(counts, random_blocks(2000), n_replicates=300)
    # One in forty is the price of a 95 % interval; a clip at 0 would give a mean of .08.
    assert (result["ceiling"] > 0).mean() < 0.05
    assert result["ceiling"].mean() < 0.012


def test_blocks_widen_the_interval_where_nuclei_are_alike():
    rng = np.random.default_rng(4)
    area = np.repeat(np.arange(40), 50)
    counts = sp.csr_matrix(rng.poisson(rng.gamma(1, 1, size=(40, 30))[area]))
    alike = noise_ceiling(counts, area, n_replicates=300)
    independent = noise_ceiling(counts, random_blocks(2000), n_replicates=300)
    wide, narrow = ((r["ceiling_high"] - r["ceiling_low"]).mean() for r in (alike, independent))
    assert wide > 1.5 * narrow


def test_tables_against_sums_by_hand_and_large_counts_against_the_exact_sum():
    first, square, product = _log1p_halves(np.array([0, 1, 2, 1100]))
    log2, log3 = np.log(2), np.log(3)
    np.testing.assert_allclose(first[:3], [0, log2 / 2, (log3 + 2 * log2) / 4])
    np.testing.assert_allclose(square[:3], [0, log2**2 / 2, (log3**2 + 2 * log2**2) / 4])
    np.testing.assert_allclose(product[:3], [0, 0, log2**2 / 2])
    from scipy.stats import binom

    a = np.arange(1101)
    chance = binom.pmf(a, 1100, 0.5)
    np.testing.assert_allclose(product[3], chance @ (np.log1p(a) * np.log1p(1100 - a)), atol=1e-5)
    np.testing.assert_allclose(square[3], chance @ np.log1p(a) ** 2, atol=1e-5)
    np.testing.assert_allclose(first[3], chance @ np.log1p(a), atol=1e-5)


def test_share_is_a_ratio_of_sums_over_reliable_genes():
    pcc, ceiling = np.array([0.2, 0.1, 0.5, np.nan]), np.array([0.4, 0.6, 0.09, 0.5])
    assert ceiling_share(pcc, ceiling) == pytest.approx(0.3)
    assert np.isnan(ceiling_share(pcc, ceiling * 0))


def test_empty_counts_have_no_ceiling():
    result = noise_ceiling(sp.csr_matrix((50, 3), dtype=np.int32), random_blocks(50), n_replicates=20)
    assert (result.to_numpy() == 0).all()
