"""The parts of the benchmark of heads that can be computed by hand."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import scipy.sparse as sp
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import head_training
from benchmarks.head_training import (
    Attending,
    Setting,
    Spotted,
    Units,
    fit,
    matched,
    pcc,
    untrained,
    with_own_batch_statistics,
)
from prts.evaluation.expression import pearson_per_gene

SETTING = Setting(("context",), (8,), 0.0, None, 0.01, 0.0, 1.0, 16, 15, 15, False)


@pytest.fixture
def units() -> Units:
    rng = np.random.default_rng(0)
    x = rng.normal(2, 3, (60, 4)).astype(np.float32)
    umi = rng.poisson(np.exp(0.3 * x[:, :1] + [0.0, 0.5, 1.0])).astype(np.float32)
    xy = rng.uniform(0, 100, (60, 2))
    near = np.argsort(np.linalg.norm(xy[:, None] - xy, axis=2), axis=1)[:, 1:5]
    distance = np.linalg.norm(xy[near] - xy[:, None], axis=2).astype(np.float32)
    member = sp.csr_matrix((np.ones(60, np.float32), (np.arange(60) // 10, np.arange(60))))
    return Units({"context": x}, umi, xy, near, distance, {"context": x}, Spotted(member, 2 * (member @ umi)))


def test_the_loop_learns_what_the_features_tell(units: Units) -> None:
    before, after = untrained(units, SETTING), fit(units, units, SETTING, 1)

    assert pcc(units.umi, after.predict(units)) > pcc(units.umi, before.predict(units)) + 0.3


def test_pcc_is_that_of_the_evaluation(units: Units) -> None:
    predicted = np.abs(np.random.default_rng(1).normal(size=units.umi.shape)).astype(np.float32)

    assert pcc(units.umi, predicted) == pytest.approx(
        np.mean(pearson_per_gene(sp.csr_matrix(units.umi), predicted)), abs=1e-5
    )


def test_attention_forgets_what_is_far(units: Units) -> None:
    class Seen(nn.Module):
        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
            return (x[:, 4:],)

    attending = Attending(Seen(), torch.zeros(4), torch.ones(4))  # type: ignore[arg-type]
    around = torch.randn(2, 3, 4)
    far = torch.tensor([[0.0, 1e6, 1e6]]).expand(2, 3)

    (seen,) = attending(torch.randn(2, 4), around, far)

    torch.testing.assert_close(seen, attending.value(around[:, 0]))


def test_the_spot_loss_is_least_at_the_measured_spots(units: Units, monkeypatch: pytest.MonkeyPatch) -> None:
    model, rng = untrained(units, SETTING), np.random.default_rng(0)

    def loss(factor: float) -> float:
        rate = torch.from_numpy(factor * units.umi + 1e-9).log()
        monkeypatch.setattr(model, "outputs", lambda given, rows: (rate[rows],))
        return float(head_training._spot_loss(model, units, rng))

    assert loss(1.0) < min(loss(0.9), loss(1.1))


def test_a_slide_is_matched_by_its_mean_and_spread(units: Units) -> None:
    x = units.blocks["context"]
    other = replace(units, blocks={"context": 3 * x + 5})

    np.testing.assert_allclose(matched(other, units, spread=True).blocks["context"], x, rtol=1e-3, atol=1e-3)
    moved = matched(other, units, spread=False).blocks["context"]
    np.testing.assert_allclose(moved.mean(axis=0), x.mean(axis=0), rtol=1e-3)
    np.testing.assert_allclose(moved.std(axis=0), 3 * x.std(axis=0), rtol=1e-3)


def test_adapted_statistics_are_those_of_the_slide(units: Units) -> None:
    model = fit(units, units, replace(SETTING, epochs=2), 1)
    shifted = replace(units, blocks={"context": units.blocks["context"] + 7})

    # the first layer is linear, so that a shift of the input is a shift of what is normalized
    found = with_own_batch_statistics(model, shifted).predict(shifted)

    np.testing.assert_allclose(found, with_own_batch_statistics(model, units).predict(units), rtol=1e-3)
    assert not np.allclose(found, model.predict(shifted), rtol=1e-2)
