from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from scipy.special import logit
from sklearn.metrics import matthews_corrcoef
from torch import Tensor, nn

from prts.data.nucleus_set import NucleusSet
from prts.errors import ParameterError
from prts.models.likelihoods.paper import Paper
from prts.models.output import OutputRule, OutputSettings, best_threshold, choose_output


class Oracle(nn.Module):
    """Features are the answer: first the level, then the logit of every gene."""

    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Parameter(torch.zeros(1))

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        level, log_odds = features.chunk(2, dim=1)
        return level, log_odds


def test_gates_by_hand() -> None:
    umi = torch.tensor([[2.0, 2.0, 0.4, 0.5]])
    prob = torch.tensor([[0.1, 0.2, 0.9, 0.9]])
    assert OutputRule("none", 0.2).apply(umi, prob) is umi
    torch.testing.assert_close(OutputRule("soft", 0.2).apply(umi, prob), torch.tensor([[0.2, 0.4, 0.36, 0.45]]))
    assert OutputRule("hard", 0.2).apply(umi, prob).tolist() == [[0.0, 2.0, 0.0, 0.5]]


def test_best_threshold_has_the_greatest_mcc() -> None:
    rng = np.random.default_rng(0)
    expressed = rng.random(4000) < 0.1
    prob = np.clip(rng.normal(0.2 + 0.15 * expressed, 0.1), 0, 0.999)
    histogram = np.stack([np.histogram(prob[expressed == kind], bins=50, range=(0, 1))[0] for kind in (False, True)])
    slow = [matthews_corrcoef(expressed, prob >= edge) for edge in np.arange(50) / 50]
    assert best_threshold(histogram) == pytest.approx(np.argmax(slow) / 50)


def test_one_class_alone_has_no_best_threshold() -> None:
    assert best_threshold(np.array([[3, 4], [0, 0]])) == 0.5
    assert best_threshold(np.array([[0, 0], [3, 4]])) == 0.5


@pytest.mark.parametrize("p", [0, 2, 4])
def test_no_threshold_is_best_where_none_separates(p: int) -> None:
    histogram = np.zeros((2, 5), dtype=np.int64)
    histogram[:, p] = 30, 10  # the same P for every pair
    assert best_threshold(histogram) == 0.5


@pytest.fixture
def section(make_nuclei: Callable[..., NucleusSet]) -> NucleusSet:
    """Level says how much a gene would have, P whether it has any: only their combination is right."""
    rng = np.random.default_rng(0)
    much = rng.uniform(2, 6, (300, 4))
    on = rng.random((300, 4)) < 0.4
    prob = np.where(on, 0.8, 0.3)
    return make_nuclei(np.hstack([much, logit(prob)]), np.round(much) * on)


def test_the_gate_of_greatest_pcc_wins(section: NucleusSet) -> None:
    rule = choose_output(Oracle(), Paper(target="counts"), [section], batch_size=64)
    assert rule.gate == "hard"
    assert 0.3 < rule.threshold <= 0.8
    counts, features = section.counts.toarray(), section.features
    level, prob = features[:, :4], 1 / (1 + np.exp(-features[:, 4:]))
    for gate, predicted in (("none", level), ("soft", level * prob), ("hard", level * (prob >= 0.5))):
        slow = np.mean([np.corrcoef(np.log1p(predicted[:, g]), np.log1p(counts[:, g]))[0, 1] for g in range(4)])
        assert rule.scores[gate] == pytest.approx(slow, rel=1e-4)


def test_sections_are_scored_apart(section: NucleusSet, make_nuclei: Callable[..., NucleusSet]) -> None:
    """Two sections of different depth: pooled, the level would look predictive; within each it is noise."""
    rng = np.random.default_rng(0)

    def noise(depth: float, name: str) -> NucleusSet:
        return make_nuclei(
            np.hstack([depth + rng.random((400, 1)), np.zeros((400, 1))]), rng.poisson(depth, (400, 1)), name
        )

    rule = choose_output(Oracle(), Paper(target="counts"), [noise(1, "a"), noise(40, "b")], OutputSettings("none"))
    assert abs(rule.scores["none"]) < 0.1


def test_given_gate_and_threshold_are_kept(section: NucleusSet) -> None:
    rule = choose_output(Oracle(), Paper(target="counts"), [section], OutputSettings("hard", 0.2, 0.5))
    assert (rule.gate, rule.threshold, rule.min_umi) == ("hard", 0.2, 0.5)
    assert list(rule.scores) == ["hard"]


@pytest.mark.parametrize(
    ("arguments", "key"),
    [
        ({"gate": "firm"}, "gate"),
        ({"threshold": 2.0}, "threshold"),
        ({"threshold": "best"}, "threshold"),
        ({"min_umi": -1}, "min_umi"),
    ],
)
def test_bad_rules_name_their_key(arguments: dict[str, object], key: str) -> None:
    with pytest.raises(ParameterError, match=rf"^output {key}: "):
        OutputSettings(**arguments)
