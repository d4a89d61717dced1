"""The likelihoods of counts: their formulas, and that minimising them finds the rates that made the counts."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.sparse as sp
import torch

from prts.errors import ParameterError
from prts.models.likelihoods import Likelihood
from prts.models.likelihoods.hurdle import Hurdle
from prts.models.likelihoods.paper import Paper
from prts.models.likelihoods.poisson import Poisson
from prts.models.likelihoods.released import Released
from prts.models.output import OutputRule


@pytest.fixture
def batch() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    counts = rng.poisson(0.8, (7, 5)).astype(np.float64)
    counts[3] = 0  # a nucleus without any UMI
    return {"level": rng.normal(size=(7, 5)), "logit": 3 * rng.normal(size=(7, 5)), "target": counts, "counts": counts}


def tensors(arrays: dict[str, np.ndarray], dtype: torch.dtype = torch.float64) -> dict[str, torch.Tensor]:
    return {name: torch.tensor(array, dtype=dtype) for name, array in arrays.items()}


def parts_of(likelihood: Likelihood, b: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return likelihood.loss((b["level"], b["logit"]), b["counts"])


def mean(likelihood: Likelihood, level: torch.Tensor) -> torch.Tensor:
    return likelihood.mean((level, torch.zeros_like(level)))


def cross_entropy(b: dict[str, np.ndarray]) -> float:
    p = 1 / (1 + np.exp(-b["logit"]))
    return -float(np.where(b["counts"] > 0, np.log(p), np.log(1 - p)).mean())


def test_poisson_is_the_likelihood_up_to_what_the_counts_alone_decide(batch: dict[str, np.ndarray]) -> None:
    likelihood = [
        math.exp(level) - k * level + math.lgamma(k + 1)
        for level, k in zip(batch["level"].ravel(), batch["counts"].ravel(), strict=True)
    ]
    parts = parts_of(Poisson(lambda_1=2.0, lambda_2=3.0), tensors(batch))
    constant = np.mean([math.lgamma(k + 1) for k in batch["counts"].ravel()])
    assert float(parts["reg"]) + constant == pytest.approx(np.mean(likelihood), rel=1e-12)
    assert float(parts["bin"]) == pytest.approx(cross_entropy(batch), rel=1e-12)
    assert float(parts["loss"]) == pytest.approx(2 * float(parts["reg"]) + 3 * float(parts["bin"]), rel=1e-12)


def test_poisson_with_library_offset_multiplies_shares_by_the_nucleus_own_depth(batch: dict[str, np.ndarray]) -> None:
    total = 0.0
    for levels, counts in zip(batch["level"], batch["counts"], strict=True):
        depth = counts.sum()
        for level, k in zip(levels, counts, strict=True):
            mu = depth * math.exp(level)
            total += mu - (k * math.log(mu / depth) if k else 0.0)  # k log(depth) belongs to the counts
    parts = parts_of(Poisson(offset="library"), tensors(batch))
    assert float(parts["reg"]) == pytest.approx(total / batch["counts"].size, rel=1e-12)


def test_hurdle_is_the_zero_truncated_likelihood_of_expressed_pairs(batch: dict[str, np.ndarray]) -> None:
    total = constant = 0.0
    for level, k in zip(batch["level"].ravel(), batch["counts"].ravel(), strict=True):
        if k > 0:
            rate = math.exp(level)
            total -= math.log(rate**k * math.exp(-rate) / math.factorial(int(k)) / (1 - math.exp(-rate)))
            constant += math.lgamma(k + 1)
    parts = parts_of(Hurdle(), tensors(batch))
    assert float(parts["reg"]) == pytest.approx((total - constant) / batch["counts"].size, rel=1e-12)
    assert float(parts["bin"]) == pytest.approx(cross_entropy(batch), rel=1e-12)


@pytest.mark.parametrize("loss", [Poisson(), Poisson(offset="library"), Hurdle(), Hurdle(level="lognormal")])
def test_float32_and_absurd_levels_stay_finite(loss: Likelihood, batch: dict[str, np.ndarray]) -> None:
    exact = parts_of(loss, tensors(batch))["loss"]
    torch.testing.assert_close(parts_of(loss, tensors(batch, torch.float32))["loss"].double(), exact, rtol=1e-5, atol=0)
    for factor in (1e4, -1e4):
        extreme = tensors({**batch, "level": factor * np.abs(batch["level"])}, torch.float32)
        extreme["level"].requires_grad_()
        value = parts_of(loss, extreme)["loss"]
        value.backward()
        assert torch.isfinite(value) and torch.isfinite(extreme["level"].grad).all()


def minimise(loss: Likelihood, counts: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    """Level and logit (g,), shared by all nuclei, of least loss."""
    k = torch.tensor(counts, dtype=torch.float64)
    free = torch.zeros(2, k.shape[1], dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([free], max_iter=200, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        value: torch.Tensor = loss.loss((free[0].expand_as(k), free[1].expand_as(k)), k)["loss"]
        value.backward()
        return value

    optimizer.step(closure)
    return free[0].detach(), free[1].detach()


RATES = np.array([0.05, 0.4, 1.5, 6.0])


def test_poisson_recovers_known_rates() -> None:
    counts = np.random.default_rng(0).poisson(RATES, (40_000, 4))
    level, _ = minimise(Poisson(), counts)
    umi = mean(Poisson(), level)
    np.testing.assert_allclose(umi, RATES, rtol=0.08)
    np.testing.assert_allclose(umi, counts.mean(axis=0), rtol=1e-4)


def test_library_offset_recovers_shares_whatever_the_depth() -> None:
    rng = np.random.default_rng(0)
    shares = RATES / RATES.sum()
    counts = rng.poisson(rng.lognormal(3, 1, (20_000, 1)) * shares)
    level, _ = minimise(Poisson(offset="library"), counts)
    np.testing.assert_allclose(level.exp(), shares, rtol=0.02)
    fitted = Poisson(offset="library").fit([sp.csr_matrix(counts[:5000]), sp.csr_matrix(counts[5000:])])
    np.testing.assert_allclose(mean(fitted, level), counts.mean(axis=0), rtol=1e-3)


def test_hurdle_recovers_chance_and_truncated_rate() -> None:
    rng = np.random.default_rng(0)
    chance = np.array([0.1, 0.3, 0.6, 0.9])
    drawn = rng.poisson(RATES, (600_000, 4)).astype(float)
    counts = np.zeros((30_000, 4))
    for gene in range(4):
        positive = drawn[drawn[:, gene] > 0, gene][:30_000]
        counts[: len(positive), gene] = positive
        counts[rng.random(30_000) > chance[gene] * 30_000 / len(positive), gene] = 0
    level, logit = minimise(Hurdle(), counts)
    np.testing.assert_allclose(level.exp(), RATES, rtol=0.15, atol=0.02)
    np.testing.assert_allclose(logit.sigmoid(), (counts > 0).mean(axis=0), rtol=1e-3)
    umi = OutputRule("soft", 0.5).apply(mean(Hurdle(), level), logit.sigmoid())
    np.testing.assert_allclose(umi, counts.mean(axis=0), rtol=1e-3)  # X is the expected UMI


def test_lognormal_hurdle_returns_each_genes_mean_count() -> None:
    rng = np.random.default_rng(0)
    counts = rng.poisson(RATES, (20_000, 4)) * rng.integers(1, 4, (20_000, 4))
    level, logit = minimise(Hurdle(level="lognormal"), counts)
    positive = np.ma.masked_equal(counts, 0)
    np.testing.assert_allclose(level, np.ma.log(positive).mean(axis=0), rtol=1e-4, atol=1e-5)
    fitted = Hurdle(level="lognormal").fit([sp.csr_matrix(counts[:5000]), sp.csr_matrix(counts[5000:])])
    np.testing.assert_allclose(mean(fitted, level), positive.mean(axis=0), rtol=1e-4)
    umi = OutputRule("soft", 0.5).apply(mean(fitted, level), logit.sigmoid())
    np.testing.assert_allclose(umi, counts.mean(axis=0), rtol=1e-3)


def test_a_gene_without_training_counts_has_no_smearing() -> None:
    fitted = Hurdle(level="lognormal").fit([sp.csr_matrix([[0, 2], [0, 8]])])
    np.testing.assert_allclose(fitted.smearing, [1, 5 / 4])  # mean 5, geometric mean 4
    np.testing.assert_allclose(mean(fitted, torch.tensor([[-3.0, np.log(4)]])), [[1.0, 5.0]], rtol=1e-6)


def test_a_fitted_rate_starts_at_each_genes_mean() -> None:
    counts = [sp.csr_matrix([[1, 0, 4], [2, 0, 0]]), sp.csr_matrix([[0, 0, 5]])]
    fitted = Poisson().fit(counts)
    np.testing.assert_allclose(mean(fitted, fitted.start), [1, 0.5 / 3, 3], rtol=1e-6)
    fitted = Poisson(offset="library").fit(counts)
    assert fitted.depth.tolist() == [4]
    np.testing.assert_allclose(mean(fitted, fitted.start), [1, 0.5 / 3, 3], rtol=1e-6)
    assert Paper().fit(counts).start is None


LOSSES = {
    "paper": Paper(),
    "released": Released(),
    "poisson": Poisson(),
    "library": Poisson(offset="library"),
    "hurdle": Hurdle(),
    "lognormal": Hurdle(level="lognormal"),
}
SCALED = {"minmax", "log1p", "counts"}
MAKE_SENSE = {
    "paper": (SCALED, {"dual", "single"}, {"none", "soft", "hard"}),
    "released": (SCALED, {"dual", "single"}, {"none", "soft", "hard"}),
    "poisson": ({"log_rate"}, {"dual", "single"}, {"none"}),
    "library": ({"log_share"}, {"dual", "single"}, {"none"}),
    "hurdle": ({"log_truncated"}, {"dual"}, {"soft"}),
    "lognormal": ({"log_positive"}, {"dual"}, {"soft"}),
}


TARGETS = [*sorted(SCALED), "log_rate", "log_share", "log_truncated", "log_positive"]


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("heads", ["dual", "single"])
@pytest.mark.parametrize("gate", ["auto", "none", "soft", "hard"])
@pytest.mark.parametrize("target", ["auto", *TARGETS])
def test_only_combinations_that_make_sense_pass(name: str, heads: str, gate: str, target: str) -> None:
    targets, kinds, gates = MAKE_SENSE[name]
    if target in {*targets, "auto"} and heads in kinds and gate in {*gates, "auto"}:
        chosen = LOSSES[name].with_target(target)
        chosen.require(heads=heads, gate=gate)
        assert chosen.target in targets and target in ("auto", chosen.target)
    else:
        with pytest.raises(ParameterError, match=r"^(data target|network heads|output gate): ") as refusal:
            LOSSES[name].with_target(target).require(heads=heads, gate=gate)
        assert "\n" not in str(refusal.value)


def test_a_part_that_nothing_trains_is_refused() -> None:
    with pytest.raises(ParameterError, match="likelihood lambda_1: 0 is not accepted; give a number above 0"):
        Paper(lambda_1=0)
    with pytest.raises(ParameterError, match="likelihood lambda_2: 0 leaves the second head untrained"):
        Paper(lambda_2=0).require(heads="dual")
    Paper(lambda_2=0).require(heads="single")
    with pytest.raises(ParameterError, match="likelihood offset: 'depth' is not accepted; give none or library"):
        Poisson(offset="depth")
