"""Synthetic nuclei whose counts depend on their features."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import scipy.sparse as sp

from prts.data.sets import NucleusSet


def nuclei_from(features: np.ndarray, counts: np.ndarray, section: str = "s") -> NucleusSet:
    n = len(features)
    return NucleusSet(
        section=section,
        cell_id=np.array([f"{section}-{i}" for i in range(n)], dtype=object),
        xy_um=np.zeros((n, 2)),
        features=features.astype(np.float32),
        counts=sp.csr_matrix(counts.astype(np.int32)),
        total_counts=counts.sum(axis=1).astype(np.int64),
        area_um2=np.full(n, 50.0),
    )


@pytest.fixture
def make_nuclei() -> Callable[..., NucleusSet]:
    """Builds a `NucleusSet` from dense features and counts."""
    return nuclei_from


@pytest.fixture
def poisson_nuclei() -> Callable[..., NucleusSet]:
    """Draws nuclei of one world (the seed only draws nuclei): Poisson counts with a log rate linear in the features."""

    def draw(n: int, seed: int, d: int = 8, g: int = 20, mean: float = 0.5) -> NucleusSet:
        world, rng = np.random.default_rng(42), np.random.default_rng(seed)
        effect = world.normal(0, 1.0, (d, g)) / np.sqrt(d)
        features = rng.normal(size=(n, d))
        return nuclei_from(features, rng.poisson(mean * np.exp(features @ effect)), f"s{seed}")

    return draw
