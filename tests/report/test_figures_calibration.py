import numpy as np
import pytest
import scipy.sparse as sp

from prts.report import figures_calibration
from prts.report.figures_calibration import calibration, level_groups, reliability


def test_reliability_by_hand():
    prob = np.array([[0.01, 0.99], [0.04, 1.0], [0.52, 0.52]], dtype=np.float32)
    bins = reliability(sp.csr_matrix([[0, 3], [1, 1], [0, 2]]), prob)
    assert bins["n"].tolist() == [2, *[0] * 9, 2, *[0] * 8, 2]
    known = bins.dropna()
    np.testing.assert_allclose(known["predicted"], [0.025, 0.52, 0.995], rtol=1e-6)
    np.testing.assert_allclose(known["observed"], [0.5, 0.5, 1])


def test_blocks_of_nuclei_and_genes_do_not_show(monkeypatch):
    rng = np.random.default_rng(0)
    counts, umi = sp.csr_matrix(rng.poisson(1.0, (103, 7))), rng.random((103, 7)).astype(np.float32)
    monkeypatch.setattr(figures_calibration, "_MIN_UMI", 1)
    bins, groups = reliability(counts, umi), level_groups(counts, umi)
    monkeypatch.setattr(figures_calibration, "_ROWS", 10)
    monkeypatch.setattr(figures_calibration, "_GENES", 3)
    np.testing.assert_allclose(reliability(counts, umi), bins)
    np.testing.assert_allclose(level_groups(counts, umi), groups)


def test_a_true_rate_is_on_the_diagonal_and_a_shrunken_one_does_not():
    rng = np.random.default_rng(0)
    rate = rng.gamma(1.0, 2.0, (20_000, 3)).astype(np.float32)
    counts = sp.csr_matrix(rng.poisson(rate))
    predicted, measured = level_groups(counts, rate)
    np.testing.assert_allclose(predicted, measured, atol=0.06)
    np.testing.assert_allclose(measured.mean(axis=0), 1, rtol=1e-6)
    predicted, measured = level_groups(counts, 1 + rate / 2)
    assert (measured[-1] > predicted[-1] * 1.2).all()
    assert (measured[0] < predicted[0] * 0.5).all()


def test_groups_by_hand(monkeypatch):
    monkeypatch.setattr(figures_calibration, "_MIN_UMI", 20)
    counts = np.column_stack([np.arange(20), np.r_[np.zeros(19), 19]])
    umi = np.column_stack([np.arange(20.0)[::-1], np.arange(20.0)])  # the first gene just the wrong way round
    groups = level_groups(sp.csr_matrix(counts), umi.astype(np.float32))
    assert groups.shape == (2, 10, 1)  # the second has too few UMI
    mean = counts[:, 0].mean()
    np.testing.assert_allclose(groups[0, :, 0], np.arange(0.5, 20, 2) / mean)
    np.testing.assert_allclose(groups[1, :, 0], np.arange(18.5, 0, -2) / mean)


def test_calibration_error_is_written(tmp_path, monkeypatch):
    kept = []
    monkeypatch.setattr(figures_calibration, "save", lambda figure, out: kept.append(figure))
    prob = np.full((100, 2), 0.8, dtype=np.float32)
    counts = sp.csr_matrix((np.arange(200).reshape(100, 2) % 2).astype(int))
    calibration(tmp_path / "c.png", counts, prob, prob)
    chance = kept[0].axes[0]
    assert chance.texts[0].get_text() == "calibration error 0.300"
    assert chance.lines[1].get_xydata() == pytest.approx(np.array([[0.8, 0.5]]))
    (tmp_path / "none").mkdir()
    calibration(tmp_path / "none" / "c.png", sp.csr_matrix((100, 2)), prob, prob)  # no gene with enough UMI is no error
