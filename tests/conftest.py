"""Fixtures that several areas of the tests share."""

from __future__ import annotations

import os
import sys
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.sparse as sp

from prts.data.nucleus_set import NucleusSet


def pytest_configure(config: pytest.Config) -> None:
    """Keep absl, which TensorFlow and with it umap import, from closing the stream that pytest captures when Hydra sets up logging."""
    try:
        from absl.logging import get_absl_handler
    except ImportError:
        return
    get_absl_handler().python_handler.stream = sys.__stderr__


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out nightly tests unless `-m` mentions them; a `-m` in addopts would be replaced by the one of the command line."""
    if "nightly" in config.option.markexpr:
        return
    nightly = [item for item in items if item.get_closest_marker("nightly")]
    if nightly:
        config.hook.pytest_deselected(items=nightly)
        items[:] = [item for item in items if not item.get_closest_marker("nightly")]


@pytest.fixture(scope="session", autouse=True)
def full_dpi() -> int:
    """Draw with 60 dpi, since most runs in the tests draw all their figures, and return the dpi that users get."""
    from prts.report import figures_canvas

    full, figures_canvas._DPI = figures_canvas._DPI, 60
    return full


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


@pytest.fixture(scope="session")
def vit_weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights of timm's tiny `test_vit`."""
    import timm
    import torch
    from safetensors.torch import save_file

    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("vit") / "vit.safetensors"
    save_file(timm.create_model("test_vit", num_classes=0).state_dict(), path)
    return path


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


def slow_cells(positions: Any, nuclei: np.ndarray, reach: int, shared: str = "nearest") -> tuple[dict, dict]:
    """Cell and nucleus of each bin (row, col) that has one, one bin at a time."""
    import shapely

    xy = {(r, c): (x, y) for r, c, y, x in positions.iloc[:, 2:].itertuples(index=False)}
    centre = [(point.x, point.y) for point in shapely.centroid(nuclei)]

    def squared(bin_: tuple, nucleus: int) -> float:
        return (xy[bin_][0] - centre[nucleus][0]) ** 2 + (xy[bin_][1] - centre[nucleus][1]) ** 2

    nucleus_of, dropped = {}, set()
    for bin_, at in xy.items():
        inside = np.flatnonzero(shapely.contains_properly(nuclei, shapely.Point(at))).tolist()
        if inside and (len(inside) == 1 or shared != "drop"):
            nucleus_of[bin_] = min(inside, key=lambda k, bin_=bin_: squared(bin_, k))
        elif inside:
            dropped.add(bin_)
    cell_of = dict(nucleus_of)
    if not reach:
        return cell_of, nucleus_of
    for row, col in xy.keys() - nucleus_of.keys() - dropped:
        found = [
            (dy * dy + dx * dx, squared((row, col), nucleus_of[row + dy, col + dx]), nucleus_of[row + dy, col + dx])
            for dy in range(-reach, reach + 1)
            for dx in range(-reach, reach + 1)
            if dy * dy + dx * dx <= reach * reach and (row + dy, col + dx) in nucleus_of
        ]
        if found:
            cell_of[row, col] = min(found)[2]
    for cell in set(cell_of.values()):
        left = {bin_ for bin_, owner in cell_of.items() if owner == cell}
        pieces = []
        while left:
            piece, ahead = set(), deque([left.pop()])
            while ahead:
                row, col = ahead.popleft()
                piece.add((row, col))
                for beside in ((row - 1, col), (row + 1, col), (row, col - 1), (row, col + 1)):
                    if beside in left:
                        left.discard(beside)
                        ahead.append(beside)
            pieces.append(piece)
        pieces.sort(key=lambda piece: (-len(piece), min(piece)))
        for piece in pieces[1:]:
            for bin_ in piece:
                del cell_of[bin_]
    return cell_of, nucleus_of


@pytest.fixture(scope="session")
def cells_bin_by_bin() -> Callable[..., tuple[dict, dict]]:
    """Assigns bins to cells by the definition of Space Ranger 4, slowly and independently of prts."""
    return slow_cells
