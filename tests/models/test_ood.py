from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from prts.data.nucleus_set import NucleusSet
from prts.models.bundle import load_bundle
from prts.models.ood import COMPONENTS, MahalanobisOOD, verdict

V1 = Path(__file__).parent / "data" / "bundle_v1"
# Written by the prts that made it, for its mean training nucleus and one a tenth of a standard deviation off in every feature.
UMI = [[11.191261, 3.379181, 3.491085], [11.229364, 3.400187, 3.442295]]
PROB = [[0.897562, 0.742978, 0.748668], [0.897852, 0.744076, 0.746200]]


def draw(make_nuclei: Callable[..., NucleusSet], n: int, seed: int, d: int = 90) -> NucleusSet:
    """Features that lie near a plane of 5 dimensions, the first column constant."""
    world, rng = np.random.default_rng(7), np.random.default_rng(seed)
    features = rng.normal(size=(n, 5)) @ world.normal(size=(5, d)) * 3 + rng.normal(size=(n, d)) + 10
    features[:, 0] = 4
    return make_nuclei(features, np.zeros((n, 1)))


@pytest.fixture
def fitted(make_nuclei: Callable[..., NucleusSet]) -> MahalanobisOOD:
    return MahalanobisOOD.fit([draw(make_nuclei, 1500, 1), draw(make_nuclei, 500, 2)], [draw(make_nuclei, 2000, 3)])


def test_shares_of_nuclei_of_the_same_kind_are_uniform(
    make_nuclei: Callable[..., NucleusSet], fitted: MahalanobisOOD
) -> None:
    shares = fitted.share(draw(make_nuclei, 4000, 4).features)
    assert shares.dtype == np.float32 and shares.min() >= 0 and shares.max() <= 1
    for level in (0.1, 0.5, 0.9, 0.95):
        assert (shares <= level).mean() == pytest.approx(level, abs=0.03)


def test_the_distance_is_the_mahalanobis_distance_of_the_plain_formula(
    make_nuclei: Callable[..., NucleusSet], fitted: MahalanobisOOD
) -> None:
    train = np.concatenate([draw(make_nuclei, 1500, 1).features, draw(make_nuclei, 500, 2).features]).astype(float)
    spread = train.std(axis=0)
    spread[0] = 1
    new = draw(make_nuclei, 50, 5).features
    z = (new - train.mean(axis=0)) / spread
    values, vectors = np.linalg.eigh(np.cov((train - train.mean(axis=0)) / spread, rowvar=False, bias=True))
    values[:-COMPONENTS] = values[:-COMPONENTS].mean()
    slow = np.einsum("nd,de,ne->n", z, vectors @ np.diag(1 / values) @ vectors.T, z)
    np.testing.assert_allclose(fitted.distance(new), slow, rtol=1e-3)


def test_what_lies_off_the_plane_is_unusual_though_no_column_is(
    make_nuclei: Callable[..., NucleusSet], fitted: MahalanobisOOD
) -> None:
    usual = draw(make_nuclei, 300, 6).features
    shuffled = np.stack([np.random.default_rng(j).permutation(column) for j, column in enumerate(usual.T)], axis=1)
    assert np.median(fitted.share(usual)) < 0.6
    assert fitted.share(shuffled).min() > 0.99


def test_the_verdict_follows_the_share_of_strange_nuclei() -> None:
    flags = np.array([True, False, True])
    for strange, words in ((0.05, "looks like"), (0.3, "parts of the slide"), (0.8, "should not be believed")):
        ood = np.where(np.arange(100) < strange * 100, 0.99, 0.5).astype(np.float32)
        said, believable = verdict(ood, flags)
        assert believable is (strange < 0.5)
        assert words in said and f"{strange:.0%} of nuclei" in said and "2 of 3 genes were" in said
    assert "genes" not in verdict(np.zeros(3, np.float32), None).text


def test_the_verdict_names_artefacts_where_they_are_many() -> None:
    ood = np.zeros(100, np.float32)
    assert "12% of nuclei are on a likely artifact" in verdict(ood, None, np.arange(100) < 12).text
    assert "artifact" not in verdict(ood, None, np.arange(100) < 4).text + verdict(ood, None).text


def test_the_verdict_names_counts_at_the_limit() -> None:
    ood, capped = np.zeros(100, np.float32), np.where(np.arange(100) < 7, 3, 0)
    assert "In 7% of nuclei" in verdict(ood, None, capped=capped).text
    assert "cut at" not in verdict(ood, None, capped=np.zeros(100, np.int32)).text


def test_a_bundle_of_format_version_1_predicts_as_when_it_was_made() -> None:
    bundle = load_bundle(V1)
    assert json.loads((V1 / "model.json").read_text())["format_version"] == 1
    assert bundle.ood is None and bundle.intervals is None and bundle.predictable is None
    mean, scale = bundle.net.input_mean, bundle.net.input_scale
    umi, prob = bundle.predict(torch.stack([mean, mean + scale * 0.1]))
    np.testing.assert_allclose(umi[:, :3].numpy(), UMI, rtol=1e-4)
    np.testing.assert_allclose(prob[:, :3].numpy(), PROB, rtol=1e-4)
