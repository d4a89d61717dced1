from __future__ import annotations

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

from prts.analysis.clusters import (
    ClusterSettings,
    bisect,
    cluster,
    cluster_to_match,
    embed,
    find_markers,
    log_normalise,
    score_subtypes,
    silhouette,
)
from prts.errors import InputError

TYPES = ("a", "b", "c", "d")
SIZES = (150, 100, 70, 10)
SETTINGS = ClusterSettings(n_pcs=10, resolution=0.5, min_share=0.05)


def planted(seed: int = 0) -> ad.AnnData:
    """Four types of 12 own genes each, 12 genes of none; the fourth type is rare."""
    rng = np.random.default_rng(seed)
    kind = np.repeat(np.arange(4), SIZES)
    rate = np.full((len(kind), 60), 1.0)
    for k in range(4):
        rate[kind == k, 12 * k : 12 * (k + 1)] = 8.0
    names = [f"{TYPES[g // 12]}{g % 12}" if g < 48 else f"x{g}" for g in range(60)]
    counts = ad.AnnData(
        sp.csr_matrix(rng.poisson(rate).astype(np.int32)),
        obs=pd.DataFrame({"kind": [TYPES[k] for k in kind]}, index=[f"n{i}" for i in range(len(kind))]),
        var=pd.DataFrame(index=names),
    )
    counts.obsm["spatial"] = rng.uniform(0, 1000, (len(kind), 2))
    return counts


@pytest.fixture(scope="module")
def nuclei() -> ad.AnnData:
    nuclei = embed(planted(), SETTINGS)
    cluster(nuclei, SETTINGS)
    return nuclei


def test_planted_types_are_the_clusters_and_the_rare_one_is_dropped(nuclei: ad.AnnData) -> None:
    # 10 of 330 nuclei are less than 5 %
    table = pd.crosstab(nuclei.obs["kind"], nuclei.obs["cluster"])
    assert list(nuclei.obs["cluster"].cat.categories) == ["0", "1", "2"]
    assert table.loc["a", "0"] == 150
    assert table.loc["b", "1"] == 100
    assert table.loc["c", "2"] == 70
    assert nuclei.obs.loc[nuclei.obs["kind"] == "d", "cluster"].isna().all()
    assert nuclei.uns["clusters"]["n_dropped_nuclei"] == 10
    assert silhouette(nuclei, nuclei.obs["cluster"]) > 0.5


def test_counts_are_kept_and_x_is_log_normalised(nuclei: ad.AnnData) -> None:
    counts = planted().X.toarray()
    total = counts.sum(axis=1)
    assert (nuclei.layers["umi"].toarray() == counts).all()
    expected = np.log1p(counts / total[:, None] * np.median(total))
    np.testing.assert_allclose(nuclei.X.toarray(), expected, rtol=1e-5)
    assert (nuclei.obs["n_genes_by_counts"] == (counts > 0).sum(axis=1)).all()


def test_features_of_a_prediction_are_the_expected_number() -> None:
    counts = planted()
    counts.layers["prob"] = np.full(counts.shape, 0.25)
    assert embed(counts, SETTINGS).obs["n_genes_by_counts"].unique() == [15.0]


def test_the_same_settings_give_the_same_clusters(nuclei: ad.AnnData) -> None:
    again = embed(planted(), SETTINGS)
    cluster(again, SETTINGS)
    assert (again.obs["cluster"].astype(str) == nuclei.obs["cluster"].astype(str)).all()
    np.testing.assert_array_equal(again.obsm["X_umap"], nuclei.obsm["X_umap"])


def test_markers_are_the_planted_genes_and_higher_in_the_cluster(nuclei: ad.AnnData) -> None:
    markers = find_markers(nuclei)
    for name, kind in {"0": "a", "1": "b", "2": "c"}.items():
        own = markers[markers["cluster"] == name]
        assert set(own["gene"].head(12)) == {f"{kind}{i}" for i in range(12)}
        assert own["rank"].tolist() == list(range(1, len(own) + 1))
    assert (markers["log2fc"] > 0.25).all()
    assert (markers["p_adj"] < 0.05).all()


def test_a_score_is_the_mean_of_the_markers_less_that_of_genes_of_like_expression() -> None:
    level = np.ones((40, 100))
    level[:20, :5], level[20:, :5] = 2, 0
    nuclei = ad.AnnData(level, obs=pd.DataFrame(index=[f"n{i}" for i in range(40)]))
    markers = pd.DataFrame({"cluster": "3", "rank": range(1, 8), "gene": [f"{i}" for i in range(7)]})
    scores = score_subtypes(nuclei, markers)["score_3"]
    np.testing.assert_allclose(scores, np.repeat([1.0, -1.0], 20))


@pytest.mark.parametrize("wanted", [3, 5])
def test_the_resolution_that_gives_as_many_clusters_is_found(wanted: int) -> None:
    nuclei = embed(planted(), SETTINGS)
    assert cluster_to_match(nuclei, SETTINGS, wanted) == wanted
    assert nuclei.obs["cluster"].nunique() == wanted


def test_bisection_finds_a_step() -> None:
    assert 3 <= bisect(lambda x: int(x), 3, 0.02, 8.0) < 4


def test_one_cluster_only_is_refused() -> None:
    nuclei = embed(planted(), SETTINGS)
    with pytest.raises(InputError, match=r"1 of them with at least 132 nuclei.*raise `resolution`"):
        cluster(nuclei, ClusterSettings(resolution=0.1, min_share=0.4))


@pytest.mark.parametrize("n_genes", [2, 12])
def test_markers_of_a_small_panel_are_scored(n_genes: int) -> None:
    rng = np.random.default_rng(0)
    rates = np.ones((120, n_genes))
    rates[:60, 0], rates[60:, 1] = 8, 8
    nuclei = ad.AnnData(sp.csr_matrix(rng.poisson(rates).astype(np.float32)))
    nuclei.obs["cluster"] = pd.Categorical(np.repeat(["0", "1"], 60))
    log_normalise(nuclei)
    scores = score_subtypes(nuclei, find_markers(nuclei))
    for name in ("0", "1"):
        inside = (nuclei.obs["cluster"] == name).to_numpy()
        assert scores.loc[inside, f"score_{name}"].mean() > scores.loc[~inside, f"score_{name}"].mean() + 0.5


def test_nuclei_that_are_all_alike_are_refused() -> None:
    counts = ad.AnnData(sp.csr_matrix(np.ones((40, 10), np.float32)))
    counts.obsm["spatial"] = np.zeros((40, 2))
    with pytest.raises(InputError, match="all nuclei have the same expression"):
        embed(counts, SETTINGS)


def test_too_few_nuclei_are_refused() -> None:
    with pytest.raises(InputError, match="5 nuclei x 60 genes are too few"):
        embed(planted()[:5].copy(), SETTINGS)


@pytest.mark.parametrize(
    "wrong", [{"resolution": 0}, {"min_share": 1.0}, {"min_cells": 1}, {"n_top_genes": 1}, {"n_neighbors": 0}]
)
def test_settings_that_make_no_sense_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(InputError, match=rf"clusters.{next(iter(wrong))}"):
        ClusterSettings(**wrong)
