"""One simulated truth in the files of several platforms."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import anndata as ad
import geopandas as gpd
import numpy as np
import pytest
import scipy.sparse as sp

from prts.section import open_section_folder
from prts.simulate.section import simulate_section


class Platforms(NamedTuple):
    """Folders of the same section as Visium HD and as Xenium; counts of its nuclei on Visium HD, and the nuclei in pixels."""

    visium: Path
    xenium: Path
    counts: ad.AnnData
    nuclei: gpd.GeoDataFrame

    @property
    def image(self) -> Path:
        return self.visium / "tissue_image.tif"

    @property
    def outs(self) -> Path:
        return self.xenium / "outs"


@pytest.fixture(scope="session")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Platforms:
    root = tmp_path_factory.mktemp("platforms")
    visium, xenium = (
        simulate_section(root / layout, layout=layout, cells=150, genes=60, seed=4, name="x")
        for layout in ("visium_hd", "xenium")
    )
    nuclei = gpd.read_parquet(visium / "truth_nuclei.parquet")
    section = open_section_folder(visium)
    assert section.measurement is not None
    return Platforms(visium, xenium, section.measurement.counts(nuclei), nuclei)


@pytest.fixture
def cells(measured: Platforms) -> ad.AnnData:
    """The counts of the nuclei as another tool would hand them over: log-normalized X, raw counts in a layer, positions in um."""
    raw = measured.counts.X
    total = np.asarray(raw.sum(axis=1)).ravel()
    made = ad.AnnData(
        sp.csr_matrix(raw.multiply(100 / np.maximum(total, 1)[:, None])).log1p(),
        obs=measured.counts.obs[[]].copy(),
        var=measured.counts.var[["gene_id"]].copy(),
        layers={"counts": raw.astype(np.float32)},
        obsm={"spatial": measured.counts.obsm["spatial"] * 0.5},
    )
    made.obs["number"] = np.arange(made.n_obs) + 1
    made.obs["radius"] = np.sqrt(measured.nuclei["area_um2"].to_numpy() / np.pi)
    made.obs["outline"] = measured.nuclei.geometry.to_wkb(hex=True).to_numpy()
    return made
