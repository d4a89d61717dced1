from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from scipy.stats import nbinom

from prts.data.nucleus_set import NucleusSet
from prts.evaluation.intervals import marginal_bounds, score_intervals
from prts.evaluation.scored_section import ScoredSection
from prts.evaluation.section_scores import SectionScores
from prts.models.uncertainty import CountIntervals, calibrate_intervals

PHI = np.array([0.0, 0.5, 1.0, 0.2, 2.0, 0.0])
MEAN = np.array([0.02, 0.2, 1.0, 4.0, 1.0, 30.0])


def draw(n: int, seed: int) -> tuple[np.ndarray, NucleusSet]:
    """Expected UMI that differ twentyfold between nuclei, and negative binomial counts around them."""
    rng = np.random.default_rng(seed)
    expected = MEAN * np.exp(rng.normal(0, 0.7, (n, 6)) - 0.7**2 / 2)
    noise = np.where(PHI > 0, rng.gamma(1 / np.maximum(PHI, 1e-9), PHI, (n, 6)), 1.0)
    counts = sp.csr_matrix(rng.poisson(expected * noise).astype(np.int32))
    empty = np.zeros(n)
    ids = np.arange(n).astype(str).astype(object)
    return expected.astype(np.float32), NucleusSet("s", ids, empty[:, None], empty[:, None], counts, empty, empty)


def inside(intervals: CountIntervals, umi: np.ndarray, nuclei: NucleusSet) -> np.ndarray:
    lower, upper = intervals.bounds(umi)
    counts = nuclei.counts.toarray()
    return (lower <= counts) & (counts <= upper)


def test_new_counts_are_covered_whatever_is_expected_of_them() -> None:
    umi, nuclei = draw(4000, 0)
    intervals = calibrate_intervals([umi], [nuclei])
    np.testing.assert_allclose(intervals.scale[1:], 1, rtol=0.1)
    np.testing.assert_allclose(intervals.dispersion[1:], PHI[1:], atol=0.15, rtol=0.15)
    umi, nuclei = draw(20_000, 1)
    held = inside(intervals, umi, nuclei)
    assert (held.mean(axis=0) >= 0.9 - 0.01).all()
    assert held[:, 5].mean() < 0.93  # many UMI: the steps between counts are small, and so is what is covered too much
    for gene in range(1, 6):  # not only on the whole, but for the nuclei where much is expected, too
        most = umi[:, gene] > np.quantile(umi[:, gene], 0.9)
        assert held[most, gene].mean() >= 0.87


def test_the_expected_umi_is_inside_even_where_the_sum_is_off() -> None:
    intervals = CountIntervals(0.9, np.array([0.1, 1.0, 10.0]), np.array([0.0, 0.5, 0.0]), np.full(3, 0.9))
    umi = np.geomspace(1, 1e6, 300, dtype=np.float32)[:, None].repeat(3, axis=1)
    lower, upper = intervals.bounds(umi)
    assert lower.dtype == upper.dtype == np.int32
    assert (lower <= umi).all() and (umi <= upper).all()
    lower, upper = intervals.bounds(np.full((1, 3), 0.01, np.float32))
    assert lower.tolist() == [[0, 0, 0]] and upper[0, 0] == 0  # nine in ten such counts are 0


def test_the_interval_is_the_narrowest_of_the_negative_binomial() -> None:
    intervals = CountIntervals(0.9, np.ones(1), np.array([0.5]), np.array([0.9]))
    for mean in (0.0625, 0.5, 1.0, 8.0, 64.0):
        counts = nbinom(2, 2 / (2 + mean))
        widths = [counts.ppf(min(counts.cdf(low - 1) + 0.9, 1)) - low for low in range(int(counts.ppf(0.1)) + 1)]
        lower, upper = intervals.bounds(np.array([[mean]], np.float32))
        assert counts.cdf(upper[0, 0]) - counts.cdf(lower[0, 0] - 1) >= 0.9
        assert upper[0, 0] - lower[0, 0] <= 1.1 * min(widths)


def test_a_model_that_is_off_and_too_sure_is_corrected() -> None:
    umi, nuclei = draw(4000, 0)
    rng = np.random.default_rng(2)

    def wrong(umi: np.ndarray) -> np.ndarray:
        return (umi / 2 * rng.lognormal(0, 0.5, umi.shape)).astype(np.float32)

    intervals = calibrate_intervals([wrong(umi)], [nuclei])
    np.testing.assert_allclose(intervals.scale, 2 / np.exp(0.125), rtol=0.2)
    umi, nuclei = draw(20_000, 1)
    assert (inside(intervals, wrong(umi), nuclei).mean(axis=0) >= 0.89).all()


def test_heavy_tails_take_more_of_the_distribution_than_the_level() -> None:
    rng = np.random.default_rng(0)
    _, nuclei = draw(4000, 0)
    # a gene that is either there or not: no negative binomial, and its body needs more than 90 % of one
    counts = sp.csr_matrix(np.where(rng.random((4000, 6)) < 0.2, 100, 0).astype(np.int32))
    intervals = calibrate_intervals([np.full((4000, 6), 20, np.float32)], [replace(nuclei, counts=counts)])
    assert (intervals.mass > 0.9).all()
    lower, upper = intervals.bounds(np.full((1, 6), 20, np.float32))
    assert (lower == 0).all() and (upper >= 100).all()


def test_rare_genes_share_what_they_know_and_common_ones_do_not() -> None:
    rng = np.random.default_rng(0)
    rate = np.array([0.004, 0.005, 0.006, 0.5, 0.6] * 3)
    nuclei = draw(2000, 0)[1]
    counts = sp.csr_matrix(rng.poisson(rate, (2000, 15)).astype(np.int32))
    intervals = calibrate_intervals([np.tile(rate, (2000, 1)).astype(np.float32)], [replace(nuclei, counts=counts)])
    rare = rate < 0.1
    assert len(np.unique(intervals.scale[rare])) == 5
    assert len(np.unique(intervals.scale[~rare])) == 6


def test_a_bundle_keeps_them_to_four_digits() -> None:
    umi, nuclei = draw(500, 0)
    intervals = calibrate_intervals([umi], [nuclei])
    again = CountIntervals.from_settings(intervals.settings())
    for name in ("scale", "dispersion", "mass"):
        np.testing.assert_allclose(getattr(again, name), getattr(intervals, name), rtol=1e-3)
    assert again.settings() == intervals.settings()


def test_marginal_bounds_are_the_narrowest_stretch_of_the_sorted_counts() -> None:
    counts = np.zeros((999, 2), np.int32)
    counts[:, 0] = np.arange(999)
    counts[900:, 1] = 7
    nuclei = replace(draw(999, 0)[1], counts=sp.csr_matrix(counts))
    lower, upper = marginal_bounds([nuclei])
    assert (upper - lower).tolist() == [
        899,
        0,
    ]  # 900 of 999 counts, so that the next one is inside with probability 0.9
    assert (lower[1], upper[1]) == (0, 0)


def test_coverage_and_width_by_hand() -> None:
    umi = np.array([[1.0, 8.0], [1.0, 8.0]], np.float32)
    counts = np.array([[0, 500], [3, 5]], np.int32)
    nuclei = replace(draw(2, 0)[1], counts=sp.csr_matrix(counts))
    intervals = CountIntervals(0.9, np.ones(2), np.zeros(2), np.full(2, 0.9))
    result = SectionScores({"pcc_mean": 0.5}, pd.DataFrame({"gene": ["a", "b"]}), None)
    scored = ScoredSection(nuclei, SimpleNamespace(), None, umi, umi, result)
    marginal = np.array([0, 0], np.int32), np.array([2, 600], np.int32)
    scored = score_intervals(scored, intervals, marginal)
    # Poisson of 1: P(0..2) = 0.92; of 8: the narrowest that holds 0.9
    table = scored.result.per_gene
    assert table["coverage90"].tolist() == [0.5, 0.5] and table["interval_width"].tolist() == [2, 9]
    assert table["coverage90_marginal"].tolist() == [0.5, 1] and table["interval_width_marginal"].tolist() == [2, 600]
    assert scored.result.summary == pytest.approx(
        {
            "pcc_mean": 0.5,
            "coverage90": 0.5,
            "interval_width": 5.5,
            "coverage90_marginal": 0.75,
            "interval_width_marginal": 301,
        }
    )
