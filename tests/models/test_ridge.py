from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from sklearn.linear_model import Ridge
from sklearn.preprocessing import StandardScaler

from prts.data.nucleus_set import NucleusSet
from prts.models import ridge as ridge_module
from prts.models.ridge import gene_mean, ridge


def joined(sets: list[NucleusSet]) -> tuple[np.ndarray, np.ndarray]:
    features = np.vstack([nuclei.features for nuclei in sets]).astype(np.float64)
    return features, np.log1p(np.vstack([nuclei.counts.toarray() for nuclei in sets]).astype(np.float64))


def mean_pcc(predicted: np.ndarray, measured: np.ndarray) -> float:
    return float(np.mean([np.corrcoef(predicted[:, g], measured[:, g])[0, 1] for g in range(measured.shape[1])]))


def test_gene_mean_is_the_mean_of_log1p_umi(poisson_nuclei: Callable[..., NucleusSet]) -> None:
    sets = [poisson_nuclei(30, 1), poisson_nuclei(50, 2)]
    predicted = gene_mean(sets).predict(sets[0].features)
    assert predicted.shape == (30, 20)
    np.testing.assert_allclose(np.log1p(predicted), np.tile(joined(sets)[1].mean(axis=0), (30, 1)), rtol=1e-5)


def test_ridge_is_sklearns_with_the_penalty_that_validates_best(
    poisson_nuclei: Callable[..., NucleusSet], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ridge_module, "_CHUNK", 17)
    train, val = [poisson_nuclei(40, 1), poisson_nuclei(35, 2)], [poisson_nuclei(60, 3), poisson_nuclei(200, 4)]
    penalties = [1e-3, 0.1, 1.0, 30.0]
    fitted = ridge(train, val, penalties)

    x, y = joined(train)
    scaler = StandardScaler().fit(x)
    slow = {penalty: Ridge(alpha=penalty * len(x)).fit(scaler.transform(x), y) for penalty in penalties}
    scores = {
        penalty: np.mean(
            [
                mean_pcc(model.predict(scaler.transform(features)), measured)
                for features, measured in (joined([s]) for s in val)
            ]
        )
        for penalty, model in slow.items()
    }
    assert fitted.scores == pytest.approx(scores, rel=1e-6)
    assert fitted.penalty == max(scores, key=scores.__getitem__)
    expected = slow[fitted.penalty].predict(scaler.transform(joined(val[:1])[0])).clip(0)
    np.testing.assert_allclose(np.log1p(fitted.predict(val[0].features)), expected, atol=1e-5)


def test_ridge_recovers_a_linear_truth(make_nuclei: Callable[..., NucleusSet]) -> None:
    """log1p(UMI) linear in features of very different scales, one of them constant."""
    rng = np.random.default_rng(0)
    effect = rng.normal(0, 0.4, (3, 5))

    def draw(n: int) -> NucleusSet:
        latent = rng.uniform(-1, 1, (n, 3))
        counts = np.round(np.expm1(4 + latent @ effect))
        features = np.hstack([latent * [1e-2, 1, 1e3] + [0, 5, 2e3], np.full((n, 1), 0.1)])
        return make_nuclei(features, counts)

    train, val, test = draw(800), draw(200), draw(200)
    fitted = ridge([train], [val])
    measured = joined([test])[1]
    assert mean_pcc(np.log1p(fitted.predict(test.features)), measured) > 0.995
    assert np.abs(np.log1p(fitted.predict(test.features)) - measured).max() < 0.05
    assert fitted.penalty == ridge_module.PENALTIES[0]


def test_features_without_information_get_the_greatest_penalty_and_no_pcc(
    poisson_nuclei: Callable[..., NucleusSet],
) -> None:
    rng = np.random.default_rng(0)
    sets = [poisson_nuclei(300, seed, g=200) for seed in (1, 2, 3)]
    shuffled = [nuclei.take(np.arange(len(nuclei))) for nuclei in sets]
    for nuclei in shuffled:
        rng.shuffle(nuclei.features)
    fitted = ridge(shuffled[:1], shuffled[1:2])
    assert abs(mean_pcc(np.log1p(fitted.predict(shuffled[2].features)), joined(shuffled[2:])[1])) < 0.03


def test_constant_genes_are_left_out_of_the_choice(make_nuclei: Callable[..., NucleusSet]) -> None:
    rng = np.random.default_rng(0)
    features = rng.normal(size=(100, 2))
    counts = np.stack([rng.poisson(np.exp(features[:, 0])), np.full(100, 3), np.zeros(100)], axis=1)
    nuclei = make_nuclei(features, counts)
    fitted = ridge([nuclei], [nuclei])
    assert all(score > 0.3 for score in fitted.scores.values())
    np.testing.assert_allclose(fitted.predict(features.astype(np.float32))[:, 1:], np.tile([3, 0], (100, 1)), atol=1e-4)
