from __future__ import annotations

import numpy as np
import pytest
import torch

from prts.evaluation.expression import pearson_per_gene
from prts.models.pearson import GenePearson


def accumulated(x: np.ndarray, y: np.ndarray, batch: int) -> GenePearson:
    pearson = GenePearson()
    for start in range(0, len(x), batch):
        pearson.update(torch.from_numpy(x[start : start + batch]), torch.from_numpy(y[start : start + batch]))
    return pearson


@pytest.mark.parametrize("batch", [1, 7, 100])
def test_any_batch_size_gives_the_correlation_of_the_whole(batch: int) -> None:
    rng = np.random.default_rng(0)
    counts = rng.poisson(1.0, (100, 5)).astype(np.float32)
    predicted = (counts + rng.exponential(2, (100, 5)) + 50).astype(np.float32)
    counts[:, 3] = 2  # constant truth
    predicted[:, 4] = 0.3  # a gene that the model cannot emit
    ours = accumulated(np.log1p(predicted), np.log1p(counts), batch).compute().numpy()
    np.testing.assert_allclose(
        ours[:3], [np.corrcoef(np.log1p(predicted[:, g]), np.log1p(counts[:, g]))[0, 1] for g in range(3)], rtol=1e-4
    )
    assert np.isnan(ours[3]) and ours[4] == 0
    np.testing.assert_allclose(ours, pearson_per_gene(counts, predicted), rtol=1e-4)


def test_merged_states_equal_one_pass() -> None:
    rng = np.random.default_rng(1)
    x, y = rng.normal(size=(2, 90, 4)).astype(np.float32)
    merged = GenePearson()
    for part in (slice(0, 20), slice(20, 90)):
        merged.merge(*accumulated(x[part], y[part], 16).state)
    torch.testing.assert_close(merged.compute(), accumulated(x, y, 90).compute(), rtol=1e-5, atol=1e-6)
