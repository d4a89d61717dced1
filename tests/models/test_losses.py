from __future__ import annotations

import numpy as np
import pytest
import torch

from prts.errors import InputError
from prts.models.likelihoods import Likelihood
from prts.models.likelihoods.paper import Paper
from prts.models.likelihoods.released import Released


def batch(seed: int = 0, n: int = 6, g: int = 4) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    counts = rng.poisson(0.8, (n, g)).astype(np.float64)
    # the smallest count has target 0, so a label read from the target would be wrong
    return {
        "level": rng.normal(size=(n, g)),
        "logit": 3 * rng.normal(size=(n, g)),
        "target": np.maximum(counts - 1, 0) / 3,
        "counts": counts,
    }


def fitted(likelihood: Likelihood) -> Likelihood:
    """With minmax scales that give the targets of `batch`."""
    likelihood.scaler.minimum, likelihood.scaler.range = torch.tensor(1.0).double(), torch.tensor(3.0).double()
    return likelihood


def parts_of(likelihood: Likelihood, b: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return fitted(likelihood).loss((b["level"], b["logit"]), b["counts"])


def tensors(arrays: dict[str, np.ndarray], dtype: torch.dtype = torch.float64) -> dict[str, torch.Tensor]:
    return {name: torch.tensor(array, dtype=dtype) for name, array in arrays.items()}


def test_paper_loss_is_the_papers_formula() -> None:
    b = batch()
    reg = bin_ = 0.0
    for y_hat, logit, y, count in zip(*(b[key].ravel() for key in ("level", "logit", "target", "counts")), strict=True):
        p = 1 / (1 + np.exp(-logit))
        reg += (5 if count > 0 else 1) * (y_hat - y) ** 2 / b["level"].size
        bin_ -= (np.log(p) if count > 0 else np.log(1 - p)) / b["level"].size
    parts = parts_of(Paper(), tensors(b))
    np.testing.assert_allclose([parts["reg"], parts["bin"], parts["loss"]], [reg, bin_, reg + 20 * bin_], rtol=1e-12)


def test_paper_loss_weights_are_its_arguments() -> None:
    b = tensors(batch())
    parts = parts_of(Paper(w_0=2.0, alpha_w=2.0, lambda_1=3.0, lambda_2=0.0), b)
    torch.testing.assert_close(parts["loss"], 3 * 2 * (b["level"] - b["target"]).square().mean())


def test_released_loss_is_masked_error_and_focal_loss() -> None:
    b = batch()
    squared, focal = [], []
    for y_hat, logit, y, count in zip(*(b[key].ravel() for key in ("level", "logit", "target", "counts")), strict=True):
        p = 1 / (1 + np.exp(-logit))
        p_t, alpha_t = (p, 0.7) if count > 0 else (1 - p, 1 - 0.7)
        focal.append(-alpha_t * (1 - p_t) ** 2 * np.log(p_t))
        if count > 0:
            squared.append((y_hat - y) ** 2)
    parts = parts_of(Released(), tensors(b))
    expected = [np.mean(squared), np.mean(focal), 30 * np.mean(squared) + np.mean(focal)]
    np.testing.assert_allclose([parts["reg"], parts["bin"], parts["loss"]], expected, rtol=1e-12)


@pytest.mark.parametrize("loss", [Paper(), Released()])
def test_float32_and_extreme_logits_stay_finite(loss: Likelihood) -> None:
    b = batch()
    exact = parts_of(loss, tensors(b))["loss"]
    torch.testing.assert_close(parts_of(loss, tensors(b, torch.float32))["loss"].double(), exact, rtol=1e-5, atol=0)
    extreme = tensors({**b, "logit": 1e4 * b["logit"]}, torch.float32)
    extreme["logit"].requires_grad_()
    value = parts_of(loss, extreme)["loss"]
    value.backward()
    assert torch.isfinite(value) and torch.isfinite(extreme["logit"].grad).all()


def test_released_loss_of_a_batch_without_any_umi_is_finite() -> None:
    b = tensors(batch())
    b["counts"] = torch.zeros_like(b["counts"])
    assert parts_of(Released(), b)["reg"] == 0


def test_bad_weights_name_their_key() -> None:
    with pytest.raises(InputError, match=r"^likelihood alpha_w:"):
        Paper(w_0=2, alpha_w=1)
    with pytest.raises(InputError, match=r"^likelihood lambda_2:"):
        Paper(lambda_2=-1)
    with pytest.raises(InputError, match=r"^likelihood alpha:"):
        Released(alpha=1.5)
