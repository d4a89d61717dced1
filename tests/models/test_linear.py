from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from prts.data.nucleus_set import NucleusSet
from prts.errors import InputError
from prts.models.linear import LIKELIHOOD, check_linear, fit_linear
from prts.models.ridge import gene_mean, ridge


@pytest.mark.parametrize("name", ["gene_mean", "ridge"])
def test_the_network_predicts_what_the_baseline_does(name: str, poisson_nuclei: Callable[..., NucleusSet]) -> None:
    train, val = [poisson_nuclei(300, 1), poisson_nuclei(200, 2)], [poisson_nuclei(150, 3)]
    expected = {"gene_mean": gene_mean, "ridge": lambda sets: ridge(sets, val)}[name](train).predict(val[0].features)
    with torch.inference_mode():
        outputs = fit_linear(name, train, val)(torch.from_numpy(val[0].features))
    np.testing.assert_allclose(LIKELIHOOD.mean(outputs), expected, rtol=1e-4, atol=1e-5)


def test_p_expressed_is_each_genes_logistic_regression_on_its_level(poisson_nuclei: Callable[..., NucleusSet]) -> None:
    train, val = [poisson_nuclei(4000, 1, g=6), poisson_nuclei(1000, 2, g=6)], [poisson_nuclei(150, 3, g=6)]
    net = fit_linear("ridge", train, val)
    predicted = ridge(train, val)
    level = np.log1p(np.concatenate([predicted.predict(nuclei.features) for nuclei in train]))
    counts = np.concatenate([nuclei.counts.toarray() for nuclei in train])
    for gene in range(6):
        slow = LogisticRegression(C=1e6, tol=1e-8).fit(level[:, [gene]], counts[:, gene] > 0)
        assert net.logit_slope[gene].item() == pytest.approx(slow.coef_.item(), rel=0.01)
        assert net.logit_offset[gene].item() == pytest.approx(slow.intercept_.item(), rel=0.01, abs=0.01)


def test_a_gene_that_all_or_none_express_has_a_finite_logit(make_nuclei: Callable[..., NucleusSet]) -> None:
    features = np.random.default_rng(0).normal(size=(50, 3))
    counts = np.stack([np.ones(50), np.zeros(50), np.arange(50) % 2], axis=1)
    net = fit_linear("ridge", [make_nuclei(features, counts)], [make_nuclei(features, counts)])
    _, logit = net(torch.from_numpy(features.astype(np.float32)))
    prob = logit.sigmoid().detach().numpy().mean(axis=0)
    assert prob[0] > 0.95 and prob[1] < 0.05 and prob[2] == pytest.approx(0.5, abs=0.05)


def test_what_is_no_model_is_refused_with_the_reason() -> None:
    with pytest.raises(InputError, match=r"baseline: position cannot predict another slide.*baseline/position"):
        check_linear("position")
    with pytest.raises(InputError, match="baseline: 'rigde' is not one of"):
        check_linear("rigde")
