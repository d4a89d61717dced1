import numpy as np
import pytest
import scipy.sparse as sp
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import pearsonr, rankdata, spearmanr

from prts.data import gene_arrays
from prts.evaluation.expression import expression_per_gene, pearson_per_gene


@pytest.fixture
def section():
    rng = np.random.default_rng(0)
    rate = rng.gamma(0.7, 0.8, size=(300, 12))
    counts = rng.poisson(rate).astype(np.int32)
    predicted = (rate * rng.lognormal(0, 0.5, size=rate.shape)).astype(np.float32)
    predicted[:, 3] = np.round(predicted[:, 3])  # ties
    return sp.csr_matrix(counts), predicted


def test_scores_equal_scipy_one_gene_at_a_time(section):
    counts, predicted = section
    scores = expression_per_gene(counts, predicted)
    dense = counts.toarray()
    for j in range(dense.shape[1]):
        x, y = np.log1p(dense[:, j].astype(float)), np.log1p(predicted[:, j].astype(float))
        assert scores["pcc"][j] == pytest.approx(pearsonr(x, y)[0], abs=1e-12)
        assert scores["spearman"][j] == pytest.approx(spearmanr(x, y)[0], abs=1e-12)
        assert scores["rmse"][j] == pytest.approx(np.sqrt(np.mean((x - y) ** 2)))
        assert scores["skill"][j] == pytest.approx(1 - np.mean((x - y) ** 2) / np.mean((x - x.mean()) ** 2))
    np.testing.assert_allclose(pearson_per_gene(counts, predicted), scores["pcc"], atol=1e-12)


def test_hand_computed_pcc_is_on_log1p():
    counts = np.array([[0], [0], [3], [3]])
    predicted = np.array([[0.0], [1.0], [1.0], [3.0]])
    # log2(1 + x): x = 0 0 2 2, y = 0 1 1 2 -> covariance 0.5, variances 1 and 0.5
    assert pearson_per_gene(counts, predicted)[0] == pytest.approx(0.5 / np.sqrt(0.5))


def test_constant_genes_are_left_out_and_constant_predictions_score_zero(section):
    counts, predicted = section
    counts = counts.tolil()
    counts[:, 0] = 0
    predicted[:, 1] = 0.7
    predicted[:, 2] = 0
    # What a mean predicted in two batches looks like: one value but for the last digit.
    predicted[::2, 4] = np.nextafter(np.float32(0.3), np.float32(1))
    predicted[1::2, 4] = np.float32(0.3)
    scores = expression_per_gene(counts.tocsr(), predicted)
    assert scores["constant"].tolist() == [True] + [False] * 11
    assert scores.loc[0, ["pcc", "spearman", "rmse", "skill", "lognorm_pcc", "deviance_explained"]].isna().all()
    assert scores.loc[0, "mean_counts"] == 0
    assert scores.loc[[1, 2, 4], "pcc"].tolist() == [0, 0, 0]
    assert scores.loc[[1, 2], "spearman"].tolist() == [0, 0]


def test_the_best_constant_has_no_skill_and_explains_no_deviance(section):
    counts, _ = section
    dense = counts.toarray().astype(float)
    best_log = np.expm1(np.log1p(dense).mean(axis=0, keepdims=True)).repeat(len(dense), axis=0)
    assert np.abs(expression_per_gene(counts, best_log)["skill"]).max() < 1e-12
    best_rate = dense.mean(axis=0, keepdims=True).repeat(len(dense), axis=0)
    assert np.abs(expression_per_gene(counts, best_rate)["deviance_explained"]).max() < 1e-12


def test_deviance_explained_against_scikit_learn(section):
    from sklearn.metrics import d2_tweedie_score

    counts, predicted = section
    predicted = np.maximum(predicted, 1e-3)
    scores = expression_per_gene(counts, predicted)
    for j in range(12):
        expected = d2_tweedie_score(counts.toarray()[:, j], predicted[:, j].astype(float), power=1)
        assert scores["deviance_explained"][j] == pytest.approx(expected, abs=1e-9)


def test_lognorm_pcc_scales_both_sides_to_the_median_measured_total(section):
    counts, predicted = section
    dense = counts.toarray().astype(float)
    dense[0], predicted[0] = 0, 0  # a nucleus without counts stays one
    some = dense.sum(1) > 0
    target = np.median(dense[some].sum(1))
    x, y = dense.copy(), predicted.astype(float)
    x[some] *= target / x[some].sum(1, keepdims=True)
    y[1:] *= target / y[1:].sum(1, keepdims=True)
    scores = expression_per_gene(sp.csr_matrix(dense), predicted)
    expected = [pearsonr(np.log1p(x[:, j]), np.log1p(y[:, j]))[0] for j in range(12)]
    np.testing.assert_allclose(scores["lognorm_pcc"], expected, atol=1e-6)
    # What differs between nuclei in depth alone does not count.
    depth = np.random.default_rng(1).lognormal(0, 1, size=(300, 1))
    deeper = expression_per_gene(sp.csr_matrix(dense), predicted.astype(float) * depth)
    np.testing.assert_allclose(deeper["lognorm_pcc"], scores["lognorm_pcc"], atol=1e-6)


def test_sparse_predictions_and_small_slices_give_the_same(section, monkeypatch):
    counts, predicted = section
    predicted[predicted < 0.3] = 0
    whole = expression_per_gene(counts, predicted)
    monkeypatch.setattr(gene_arrays, "_VALUES_AT_ONCE", 700)
    parts = expression_per_gene(counts.toarray(), sp.csr_matrix(predicted))
    np.testing.assert_allclose(parts.astype(float), whole.astype(float), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("wrong", [-0.1, np.nan, np.inf])
def test_values_that_are_no_counts_are_refused(section, wrong):
    counts, predicted = section
    predicted[5, 5] = wrong
    with pytest.raises(ValueError, match="predicted"):
        expression_per_gene(counts, predicted)
    with pytest.raises(ValueError, match="same nuclei"):
        pearson_per_gene(counts, predicted[1:])


@settings(max_examples=50, deadline=None)
@given(st.lists(st.lists(st.integers(0, 4), min_size=7, max_size=7), min_size=1, max_size=4))
def test_average_ranks_equal_scipy(rows):
    np.testing.assert_array_equal(gene_arrays.average_ranks(np.array(rows)), rankdata(rows, axis=1))
