"""A written prediction in the usual chains of scanpy and squidpy, as their tutorials run them."""

from __future__ import annotations

from pathlib import Path

import anndata as ad
import matplotlib.pyplot as plt
import numpy as np
import pytest
import scanpy as sc

from prts.export.pipeline import export_prediction

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("default")]


@pytest.fixture(scope="module")
def written(trained, sections, cache, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("written") / "slide.h5ad"
    trained.predict(sections["third"], nuclei="watershed", out=out, cache_dir=cache)
    return out


@pytest.fixture
def adata(written) -> ad.AnnData:
    return sc.read_h5ad(written)


def test_index_types_agree(adata):
    for matrix in (adata.X, adata.layers["lower"], adata.layers["upper"]):
        assert matrix.indices.dtype == matrix.indptr.dtype == np.int32


def test_the_scanpy_tutorial_runs(adata, tmp_path):
    sc.pp.calculate_qc_metrics(adata, inplace=True, percent_top=(20,))
    sc.pp.filter_genes(adata, min_cells=3)
    adata.layers["counts"] = adata.X.copy()
    sc.pp.normalize_total(adata)
    sc.pp.log1p(adata)
    sc.pp.highly_variable_genes(adata, n_top_genes=30)
    sc.pp.pca(adata, n_comps=10)
    sc.pp.neighbors(adata)
    sc.tl.leiden(adata, flavor="igraph", n_iterations=2, directed=False)
    sc.tl.umap(adata, maxiter=20)
    sc.tl.rank_genes_groups(adata, "leiden", method="wilcoxon")
    assert np.isfinite(adata.obsm["X_umap"]).all()
    assert adata.obs["leiden"].nunique() > 1
    sc.pl.spatial(adata, color="leiden", show=False)
    adata.write_h5ad(tmp_path / "again.h5ad")
    assert sc.read_h5ad(tmp_path / "again.h5ad").shape == adata.shape


def test_the_squidpy_tutorial_runs(adata):
    sq = pytest.importorskip("squidpy")
    adata.obs["group"] = (np.asarray(adata.X.sum(axis=1)).ravel() > np.median(np.asarray(adata.X.sum(axis=1)))).astype(
        str
    )
    adata.obs["group"] = adata.obs["group"].astype("category")
    sq.gr.spatial_neighbors(adata, coord_type="generic", delaunay=True)
    sq.gr.nhood_enrichment(adata, cluster_key="group", n_perms=20, seed=0, show_progress_bar=False)
    sq.gr.spatial_autocorr(adata, mode="moran", genes=list(adata.var_names[:5]), n_perms=None)
    assert np.isfinite(adata.uns["moranI"]["I"]).all()
    assert np.isfinite(adata.uns["group_nhood_enrichment"]["zscore"]).all()
    sq.pl.spatial_scatter(adata, color="group")
    plt.close("all")


def test_spatialdata_gets_the_slide_from_where_it_is(written, sections, tmp_path):
    sd = pytest.importorskip("spatialdata")
    export_prediction(written, tmp_path / "slide.zarr", format="spatialdata")
    data = sd.read_zarr(tmp_path / "slide.zarr")
    assert data.images["he"].shape[1:] == (sections["third"].height, sections["third"].width)
    assert set(data.tables["prediction"].obs["cell_id"]) == set(data.shapes["nuclei"].index)
