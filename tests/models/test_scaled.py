from __future__ import annotations

import numpy as np
import pytest
import scipy.sparse as sp
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from prts.errors import ParameterError
from prts.models.likelihoods.paper import Paper
from prts.models.likelihoods.scaled import MinMax

COUNTS = np.array(
    [  # range 2..6, one distinct value, absent, 1..3
        [0, 4, 0, 1],
        [2, 0, 0, 0],
        [6, 4, 0, 3],
        [4, 0, 0, 2],
    ],
    dtype=np.int32,
)


def test_minmax_maps_zeros_and_the_smallest_count_to_zero() -> None:
    scaler = fitted([sp.csr_matrix(COUNTS[:2]), sp.csr_matrix(COUNTS[2:])])
    target = scaler.transform(torch.tensor(COUNTS, dtype=torch.float32))
    expected = [[0, 0, 0, 0], [0, 0, 0, 0], [1, 0, 0, 1], [0.5, 0, 0, 0.5]]
    assert target.tolist() == expected
    assert scaler.minimum.tolist() == [2, 4, 0, 1]
    assert scaler.range.tolist() == [4, 1, 1, 2]


def test_minmax_inverse_returns_counts_and_never_less_than_zero() -> None:
    scaler = fitted([sp.csr_matrix(COUNTS)])
    counts = torch.tensor([[6.0, 4.0, 0.0, 3.0]])
    assert torch.equal(scaler.inverse(scaler.transform(counts)), counts)
    assert scaler.inverse(torch.full((1, 4), -5.0)).tolist() == [[0, 0, 0, 0]]


def test_minmax_ignores_stored_zeros_and_leaves_the_counts_alone() -> None:
    stored_zero = sp.csr_matrix((np.array([0, 3, 5]), ([0, 1, 2], [0, 0, 0])), shape=(3, 1))
    scaler = fitted([stored_zero])
    assert (scaler.minimum.item(), scaler.range.item()) == (3, 2)
    assert stored_zero.nnz == 3


@settings(max_examples=50, deadline=None)
@given(npst.arrays(np.int64, st.tuples(st.integers(1, 12), st.integers(1, 5)), elements=st.integers(0, 9)))
def test_minmax_ranges_agree_with_the_slow_way(counts: np.ndarray) -> None:
    scaler = fitted([sp.csr_matrix(counts)])
    for gene in range(counts.shape[1]):
        values = {int(count) for count in counts[:, gene] if count > 0}
        low, spread = (min(values), max(values) - min(values) or 1) if values else (0, 1)
        assert (scaler.minimum[gene].item(), scaler.range[gene].item()) == (low, spread)


def fitted(counts: list[sp.csr_matrix]) -> MinMax:
    scaler = MinMax()
    scaler.fit(counts)
    return scaler


@pytest.mark.parametrize("name", ["log1p", "counts"])
def test_other_targets_invert_themselves_and_are_not_negative(name: str) -> None:
    scaler = Paper(target=name).scaler
    counts = torch.tensor([[0.0, 1.0, 250.0]])
    torch.testing.assert_close(scaler.inverse(scaler.transform(counts)), counts)
    assert scaler.inverse(torch.tensor([[-1.0, -0.1, 1e9]]))[0, :2].tolist() == [0, 0]


def test_log1p_of_an_absurd_level_stays_finite() -> None:
    assert torch.isfinite(Paper(target="log1p").scaler.inverse(torch.tensor([[1e9]]))).all()


def test_an_unknown_target_names_the_known_ones() -> None:
    with pytest.raises(
        ParameterError, match=r"data target: 'zscore' does not go with the paper .* minmax or log1p or counts"
    ):
        Paper().with_target("zscore")
    with pytest.raises(
        ParameterError, match="likelihood target: 'zscore' is not accepted; give minmax, log1p or counts"
    ):
        Paper(target="zscore")
