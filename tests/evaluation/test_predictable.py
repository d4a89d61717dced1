from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from prts.data.nucleus_set import NucleusSet
from prts.evaluation.bootstrap import block_sums, genes_above, resampling_weights, spatial_blocks
from prts.evaluation.predictable import genes_beyond, precision, predictable, validated_genes
from prts.evaluation.scored_section import ScoredSection
from prts.evaluation.settings import EvaluationSettings

SETTINGS = EvaluationSettings(250, 200)


@pytest.fixture
def nuclei(poisson_nuclei: Callable[..., NucleusSet]) -> NucleusSet:
    return replace(poisson_nuclei(600, 1), xy_um=np.random.default_rng(0).uniform(0, 1000, (600, 2)))


def noisy(nuclei: NucleusSet, sd: list[float]) -> np.ndarray:
    """The counts under noise that differs by gene: 20 genes, the five sds in turn."""
    spread = np.tile(sd, 4)
    noise = np.random.default_rng(1).normal(0, 1, nuclei.counts.shape) * spread
    return np.expm1(np.clip(np.log1p(nuclei.counts.toarray()) + noise, 0, 8)).astype(np.float32)


def test_a_gene_is_above_another_prediction_where_the_plain_bootstrap_says_so(nuclei: NucleusSet) -> None:
    blocks, _ = spatial_blocks(nuclei.xy_um, 250)
    ours, theirs = noisy(nuclei, [0.3, 1, 1, 2, 30]), noisy(nuclei, [2, 0.9, 1.2, 2, 30])
    measured = np.log1p(nuclei.counts.toarray())
    slow = []
    for weight in resampling_weights(blocks.max() + 1, 200, seed=0):
        rows = np.repeat(np.arange(600), weight[blocks].astype(int))
        pcc = [
            [np.corrcoef(measured[rows, g], np.log1p(umi[rows, g]))[0, 1] for g in range(20)] for umi in (ours, theirs)
        ]
        slow.append(pcc)
    slow = np.array(slow)
    sums = [block_sums(nuclei.counts, umi, blocks) for umi in (ours, theirs)]
    above_zero, above_theirs = genes_above(sums[0], n_replicates=200), genes_above(*sums, n_replicates=200)
    np.testing.assert_array_equal(above_zero, np.percentile(slow[:, 0], 2.5, axis=0) > 0)
    np.testing.assert_array_equal(above_theirs, np.percentile(slow[:, 0] - slow[:, 1], 2.5, axis=0) > 0)
    assert above_zero[::5].all() and above_theirs[::5].all() and not above_theirs[4::5].all()


def test_noise_and_what_a_baseline_knows_are_not_predictable(nuclei: NucleusSet) -> None:
    blocks, _ = spatial_blocks(nuclei.xy_um, 250)
    model = block_sums(nuclei.counts, noisy(nuclei, [0.3, 0.3, 0.3, 0.3, 30]), blocks)
    colour = block_sums(nuclei.counts, noisy(nuclei, [2, 0.3, 2, 2, 2]), blocks)
    ridge = block_sums(nuclei.counts, noisy(nuclei, [2, 2, 0.3, 2, 2]), blocks)
    beyond = genes_beyond(model, {"colour": colour, "context": ridge, "ridge": ridge}, n_replicates=200)
    assert list(beyond) == ["zero", "colour", "context", "ridge"]
    assert not beyond["ridge"][2::5].any()
    # a rival that sees the same features, or other tissue, takes nothing away, one that sees colours only does
    np.testing.assert_array_equal(predictable(beyond), np.tile([True, False, True, True, False], 4))


def test_a_gene_must_hold_in_every_validation_section(nuclei: NucleusSet) -> None:
    blocks, _ = spatial_blocks(nuclei.xy_um, 250)
    scored = []
    for sd in ([0.3, 0.3, 30, 0.3, 0.3], [0.3, 0.3, 0.3, 30, 0.3]):
        umi = noisy(nuclei, sd)
        result = SimpleNamespace(sums=block_sums(nuclei.counts, umi, blocks))
        scored.append(ScoredSection(nuclei, SimpleNamespace(mpp=0.5), None, umi, umi, result))
    worse = noisy(nuclei, [2, 2, 2, 2, 2])
    beyond = validated_genes([{"colour": lambda _: worse}] * 2, scored, SETTINGS)
    np.testing.assert_array_equal(predictable(beyond), np.tile([True, True, False, False, True], 4))


def test_precision_is_the_share_that_holds_elsewhere() -> None:
    flagged, holds = np.array([1, 1, 1, 0], bool), np.array([1, 0, 1, 1], bool)
    assert precision(flagged, holds) == {"n_predictable": 3, "predictable_precision": pytest.approx(2 / 3)}
    assert np.isnan(precision(~flagged & ~holds, holds)["predictable_precision"])
