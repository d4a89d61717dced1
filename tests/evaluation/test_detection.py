import numpy as np
import pytest
import scipy.sparse as sp
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score, balanced_accuracy_score, matthews_corrcoef, roc_auc_score

from prts.evaluation.detection import detection_scores


@pytest.fixture
def section():
    rng = np.random.default_rng(1)
    prob = rng.random((200, 9))
    prob[:, :4] = np.round(prob[:, :4], 1)  # many ties
    counts = rng.poisson(np.where(rng.random(prob.shape) < prob, 2.0, 0.1))
    return sp.csr_matrix(counts), prob.astype(np.float32)


def test_every_gene_equals_scikit_learn(section):
    counts, prob = section
    per_gene, _ = detection_scores(counts, prob, 0.4)
    for j in range(9):
        y = counts.toarray()[:, j] > 0
        assert per_gene["auroc"][j] == pytest.approx(roc_auc_score(y, prob[:, j]), abs=1e-12)
        assert per_gene["auprc"][j] == pytest.approx(average_precision_score(y, prob[:, j]), abs=1e-12)
        assert per_gene["mcc"][j] == pytest.approx(matthews_corrcoef(y, prob[:, j] >= 0.4))
        assert per_gene["accuracy"][j] == pytest.approx(np.mean(y == (prob[:, j] >= 0.4)))
        assert per_gene["majority_accuracy"][j] == pytest.approx(max(y.mean(), 1 - y.mean()))


def test_pooled_figures_equal_scikit_learn_over_pairs(section):
    counts, prob = section
    threshold = np.linspace(0.1, 0.9, 9)
    _, summary = detection_scores(counts, sp.csr_matrix(prob), threshold)
    y, called = (counts.toarray() > 0).ravel(), (prob >= threshold).ravel()
    assert summary["accuracy"] == pytest.approx(np.mean(y == called))
    assert summary["balanced_accuracy"] == pytest.approx(balanced_accuracy_score(y, called))
    assert summary["mcc"] == pytest.approx(matthews_corrcoef(y, called))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.integers(0, 3)), min_size=2, max_size=12))
def test_ties_as_scikit_learn(pairs):
    y, score = np.array([p[0] for p in pairs]), np.array([p[1] / 4 for p in pairs])
    per_gene, _ = detection_scores(y[:, None].astype(int), score[:, None], 0.5)
    if y.all() or not y.any():
        assert np.isnan(per_gene.loc[0, ["auroc", "auprc"]].to_numpy(float)).all()
    else:
        assert per_gene["auroc"][0] == pytest.approx(roc_auc_score(y, score))
        assert per_gene["auprc"][0] == pytest.approx(average_precision_score(y, score))


def test_a_constant_call_scores_the_majority_and_nothing_else():
    counts = np.zeros((100, 2), dtype=int)
    counts[:10, 0], counts[:30, 1] = 1, 5
    _, summary = detection_scores(counts, np.zeros((100, 2)), 0.5)
    assert summary["accuracy"] == summary["majority_accuracy"] == pytest.approx(0.8)
    assert summary["balanced_accuracy"] == 0.5
    assert summary["mcc"] == summary["mcc_gene_mean"] == 0
    assert summary["auroc"] == 0.5
    assert summary["auprc"] == pytest.approx(0.2)
    # Always "0 %" where 20 % are expressed.
    assert summary["calibration_error"] == pytest.approx(0.2)


def test_calibration_error_by_hand_and_zero_for_true_probabilities():
    counts = np.array([[1], [0], [1], [1]])
    prob = np.array([[0.2], [0.2], [0.9], [0.9]])
    _, summary = detection_scores(counts, prob, 0.5)
    assert summary["calibration_error"] == pytest.approx(0.5 * abs(0.5 - 0.2) + 0.5 * abs(1 - 0.9))
    rng = np.random.default_rng(0)
    prob = rng.random((50_000, 2))
    _, summary = detection_scores((rng.random(prob.shape) < prob).astype(int), prob, 0.5)
    assert summary["calibration_error"] < 0.01


def test_genes_left_out_do_not_enter_the_summary(section):
    counts, prob = section
    scored = np.array([True] * 5 + [False] * 4)
    _, summary = detection_scores(counts, prob, 0.4, scored)
    _, alone = detection_scores(counts[:, :5], prob[:, :5], 0.4)
    assert summary == alone
