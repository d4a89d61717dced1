import numpy as np
import pytest
import scipy.sparse as sp

from prts.evaluation import bootstrap
from prts.evaluation.bootstrap import (
    block_sums,
    mean_pcc_difference,
    mean_pcc_interval,
    resampling_weights,
    spatial_blocks,
)
from prts.evaluation.expression import pearson_per_gene


@pytest.fixture
def section():
    rng = np.random.default_rng(0)
    xy_um = rng.random((600, 2)) * 1000
    rate = rng.gamma(1, 1, size=(600, 8))
    counts = sp.csr_matrix(rng.poisson(rate))
    return counts, (rate + rng.random(rate.shape)).astype(np.float32), xy_um


def test_a_replicate_equals_the_pcc_of_the_repeated_nuclei(section):
    counts, predicted, xy_um = section
    predicted[:, 2] = 0.5
    counts = counts.tolil()
    counts[:, 3] = 0
    counts = counts.tocsr()
    blocks, _ = spatial_blocks(xy_um, 250)
    weights = resampling_weights(blocks.max() + 1, 5, seed=1)
    means = block_sums(counts, predicted, blocks).mean_pcc(weights)
    for replicate, mean in zip(weights, means, strict=True):
        rows = np.repeat(np.arange(600), replicate[blocks].astype(int))
        assert mean == pytest.approx(np.nanmean(pearson_per_gene(counts[rows], predicted[rows])), abs=1e-9)
    every = block_sums(counts, predicted, blocks).mean_pcc(np.ones((1, len(weights[0]))))
    assert every[0] == pytest.approx(np.nanmean(pearson_per_gene(counts, predicted)), abs=1e-12)


def test_weights_draw_as_many_blocks_as_there_are():
    weights = resampling_weights(30, 200, seed=0)
    assert (weights.sum(axis=1) == 30).all()
    assert weights.var() == pytest.approx(1 - 1 / 30, rel=0.1)
    np.testing.assert_array_equal(weights, resampling_weights(30, 200, seed=0))


def test_blocks_are_squares_of_the_stated_side(section):
    _, _, xy_um = section
    labels, side = spatial_blocks(xy_um, 200)
    assert side == 200
    assert labels.max() + 1 == 25
    for label in range(25):
        assert np.ptp(xy_um[labels == label], axis=0).max() <= 200


def test_blocks_of_a_small_section_are_halved_until_there_are_enough(section):
    _, _, xy_um = section
    labels, side = spatial_blocks(xy_um, 500)
    assert side == 125  # 4 blocks at 500 um, 16 at 250
    assert labels.max() + 1 > 20
    _, side = spatial_blocks(xy_um[:3] * 0.01, 250)
    assert side >= bootstrap._MIN_BLOCK_UM


def test_interval_covers_what_it_should():
    # 60 sections with a true PCC of a half: the interval holds it about 95 times in 100.
    rng = np.random.default_rng(3)
    held = 0
    for _ in range(60):
        signal = rng.normal(size=(400, 4))
        x = np.expm1(np.clip(4 + 0.5 * signal + 0.5 * rng.normal(size=signal.shape), 0, None))
        y = np.expm1(np.clip(4 + 0.5 * signal + 0.5 * rng.normal(size=signal.shape), 0, None))
        low, high = mean_pcc_interval(block_sums(x, y, np.arange(400) // 4), n_replicates=200)
        held += low <= 0.5 <= high
    assert 51 <= held <= 60


def test_spatially_alike_nuclei_widen_the_interval():
    rng = np.random.default_rng(5)
    area = np.repeat(np.arange(30), 20)
    rate = rng.gamma(1, 2, size=(30, 20))[area]
    counts, predicted = rng.poisson(rate), rate * rng.lognormal(0, 1, size=(30, 20))[area]
    block = np.ptp(mean_pcc_interval(block_sums(counts, predicted, area)))
    nucleus = np.ptp(mean_pcc_interval(block_sums(counts, predicted, np.arange(600))))
    assert block > 2 * nucleus


def test_paired_difference_is_sharper_than_two_intervals(section):
    counts, predicted, xy_um = section
    blocks, _ = spatial_blocks(xy_um, 100)
    worse = predicted + np.random.default_rng(9).random(predicted.shape).astype(np.float32)
    good, bad = block_sums(counts, predicted, blocks), block_sums(counts, worse, blocks)
    difference, low, high = mean_pcc_difference(good, bad)
    assert difference == pytest.approx(
        pearson_per_gene(counts, predicted).mean() - pearson_per_gene(counts, worse).mean()
    )
    assert 0 < low < difference < high
    assert high - low < np.ptp(mean_pcc_interval(good))
    assert mean_pcc_difference(good, good) == (0, 0, 0)
    with pytest.raises(ValueError, match="same blocks"):
        mean_pcc_difference(good, block_sums(counts, predicted, np.arange(600) // 100))


def test_one_block_has_no_interval(section):
    counts, predicted, _ = section
    assert np.isnan(mean_pcc_interval(block_sums(counts, predicted, np.zeros(600, dtype=int)))).all()
