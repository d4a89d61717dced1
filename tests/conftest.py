"""Fixtures that several areas of the tests share."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import scipy.sparse as sp

from prts.data.nucleus_set import NucleusSet


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out nightly tests unless `-m` mentions them; a `-m` in addopts would be replaced by the one of the command line."""
    if "nightly" in config.option.markexpr:
        return
    nightly = [item for item in items if item.get_closest_marker("nightly")]
    if nightly:
        config.hook.pytest_deselected(items=nightly)
        items[:] = [item for item in items if not item.get_closest_marker("nightly")]


@pytest.fixture(scope="session")
def prts_data() -> Path:
    """The folder of real data; tests that need it carry the mark `real` and are skipped, visibly, without it."""
    folder = os.environ.get("PRTS_DATA")
    if not folder:
        pytest.skip("PRTS_DATA is not set: it names the folder of real data")
    path = Path(folder)
    if not path.is_dir():
        pytest.fail(f"PRTS_DATA is {folder!r}, which is no folder")
    return path.resolve()


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
