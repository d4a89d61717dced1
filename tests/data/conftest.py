"""A prepared tissue without images."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

from prts.data.prepare import PreparedSection, PreparedTissue
from prts.platforms.base import Registration
from prts.preprocess.panel import Panel
from prts.section import Section

MPP = 0.5
GENES = ("A", "B", "C", "D")


def written(folder: Path, name: str, n: int, seed: int, *, without_features: int = 0) -> PreparedSection:
    """A prepared section whose counts are in one order, its features in another."""
    rng = np.random.default_rng(seed)
    cell_id = np.array([f"{name}-{i}" for i in range(n)])
    counts = ad.AnnData(
        sp.csr_matrix(rng.poisson(1.0, (n, 6)).astype(np.int32)),
        obs=pd.DataFrame({"area_um2": rng.uniform(20, 90, n), "total_counts": rng.integers(20, 99, n)}, index=cell_id),
        var=pd.DataFrame({"gene_id": [f"id{gene}" for gene in "XABCDY"]}, index=list("XABCDY")),
        obsm={"spatial": rng.uniform(0, 4000, (n, 2))},
    )
    counts.write_h5ad(folder / f"{name}.h5ad")
    order = rng.permutation(n)[without_features:]
    with h5py.File(folder / f"{name}.h5", "w") as store:
        store.create_dataset("cell_id", data=cell_id[order].astype(object), dtype=h5py.string_dtype())
        # a feature that says whose it is: local = (i, i), global = (-i, 0, 0)
        store["local"] = np.stack([order, order], 1).astype(np.float32)
        store["global"] = np.stack([-order, 0 * order, 0 * order], 1).astype(np.float32)
        store["spatial"] = counts.obsm["spatial"][order]
    section = Section(
        name=name,
        image=folder / "x.tif",
        mpp=MPP,
        mpp_source="given",
        width=4000,
        height=4000,
        measurement=None,
        nuclei=None,
        spots=None,
    )
    files = (folder / f for f in ("x.parquet", f"{name}.h5ad", f"{name}.h5", f"{name}.c.h5", f"{name}.x.h5"))
    return PreparedSection(section, *files, Registration(True, *[0.0] * 9))


@pytest.fixture
def write_section() -> Callable[..., PreparedSection]:
    """Writes a prepared section: `write_section(folder, name, n, seed, without_features=0)`."""
    return written


@pytest.fixture
def tissue(tmp_path: Path) -> PreparedTissue:
    sections = {
        name: written(tmp_path, name, n, seed)
        for seed, (name, n) in enumerate({"a": 65, "b": 40, "v": 30, "t": 20}.items())
    }
    Panel(GENES, tuple(f"id{gene}" for gene in GENES), "file", {}).to_json(tmp_path / "panel.json")
    return PreparedTissue("demo", "human", sections, ["a", "b"], ["v"], ["t"], tmp_path / "panel.json")
