"""A slide of a few pixels that counts how often each is read, and nuclei on it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import geopandas as gpd
import numpy as np
import pytest
import shapely
from numpy.typing import NDArray


@dataclass
class FakeSlide:
    """Stands for prts.io.slide.Slide: `rescaled` is the whole image on the encoder's grid."""

    path: Path
    rescaled: NDArray[np.uint8]
    mpp: float = 0.25
    reads: NDArray[np.int64] = field(init=False)
    requests: list[tuple[int, int, int, int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.name = self.path.stem
        self.reads = np.zeros(self.rescaled.shape[:2], dtype=np.int64)
        self.width = round(self.rescaled.shape[1] * 0.5 / self.mpp)
        self.height = round(self.rescaled.shape[0] * 0.5 / self.mpp)

    def read_region(
        self, x: int, y: int, width: int, height: int, mpp: float | None = None, *, outside: int = 255
    ) -> NDArray[np.uint8]:
        assert mpp == 0.5
        self.requests.append((x, y, width, height))
        out = np.full((height, width, 3), outside, dtype=np.uint8)
        rows = slice(max(y, 0), min(y + height, self.rescaled.shape[0]))
        cols = slice(max(x, 0), min(x + width, self.rescaled.shape[1]))
        if rows.start < rows.stop and cols.start < cols.stop:
            self.reads[rows, cols] += 1
            out[rows.start - y : rows.stop - y, cols.start - x : cols.stop - x] = self.rescaled[rows, cols]
        return out


def make_nuclei(xy: NDArray[np.float64], radius_px: NDArray[np.float64] | float = 12.0) -> gpd.GeoDataFrame:
    """Discs around full-resolution points (n, 2)."""
    polygons = shapely.buffer(shapely.points(xy), radius_px)
    return gpd.GeoDataFrame({"cell_id": [f"n{k}" for k in range(len(xy))], "geometry": polygons})


@pytest.fixture
def fake_slide(tmp_path: Path) -> Callable[..., FakeSlide]:
    def make(height: int = 1500, width: int = 1100, mpp: float = 0.25, seed: int = 0) -> FakeSlide:
        path = tmp_path / "slide.tif"
        path.write_bytes(b"slide")
        pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
        return FakeSlide(path, pixels, mpp)

    return make


@pytest.fixture
def nuclei_at() -> Callable[..., gpd.GeoDataFrame]:
    return make_nuclei
