from __future__ import annotations

from pathlib import Path

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

from prts.analysis.clusters import ClusterSettings
from prts.analysis.spots import SpotSettings, compare_spots, filter_spots, read_visium
from prts.errors import InputError
from prts.io.spots import Spots

SETTINGS = ClusterSettings(n_top_genes=600, n_pcs=5, resolution=0.5)


def make(n_side: int = 8, per_spot: int = 3, seed: int = 0) -> tuple[ad.AnnData, Spots]:
    """Spots on a grid in two domains, with nuclei around each centre that expect the spot's counts together, and nuclei between spots."""
    rng = np.random.default_rng(seed)
    x, y = np.meshgrid(np.arange(n_side), np.arange(n_side))
    xy = 100.0 * np.column_stack([x.ravel(), y.ravel()])
    left = xy[:, 0] < 50 * n_side
    rate = np.where(left[:, None], [40.0] * 10 + [5.0] * 10, [5.0] * 10 + [40.0] * 10)
    counts = rng.poisson(rate)
    genes = [f"G{i}" for i in range(20)]
    spots = ad.AnnData(
        sp.csr_matrix(counts), obs=pd.DataFrame(index=[f"s{i}" for i in range(len(xy))]), var=pd.DataFrame(index=genes)
    )
    inside = np.repeat(xy, per_spot, axis=0) + rng.uniform(-10, 10, (per_spot * len(xy), 2))
    between = xy + 50
    umi = np.vstack([np.repeat(counts / per_spot, per_spot, axis=0), np.full((len(xy), 20), 1e3)]).astype(np.float32)
    prediction = ad.AnnData(
        sp.csr_matrix(umi), obs=pd.DataFrame(index=[f"n{i}" for i in range(len(umi))]), var=pd.DataFrame(index=genes)
    )
    prediction.obsm["spatial"] = np.vstack([inside, between])
    prediction.layers["prob"] = np.full(umi.shape, 0.5, dtype=np.float32)
    return prediction, Spots(spots, xy, 30.0)


def test_sums_of_the_nuclei_inside_are_the_spots() -> None:
    prediction, spots = make()
    side = np.where(prediction.obsm["spatial"][:, 0] < 375, "l", "r")
    clusters = pd.Series(side, index=prediction.obs_names)
    result = compare_spots(prediction, spots, clusters, SETTINGS)
    # what the nuclei inside expect was made to add up to the spot; the nuclei between do not count
    assert (result.spots["n_nuclei"] == 3).all()
    np.testing.assert_allclose(result.spots["total_predicted"], result.spots["total_measured"], rtol=1e-5)
    np.testing.assert_allclose(result.per_gene["pcc"], 1, atol=1e-6)
    assert result.summary["nuclei_per_spot"] == 3
    assert result.summary["n_nuclei_in_spots"] == 3 * 64
    # a gene is seen in a spot unless all three nuclei miss it
    np.testing.assert_allclose(result.spots["features_predicted"], 20 * (1 - 0.5**3), rtol=1e-5)
    assert result.summary["n_domains"] == 2
    assert result.composition is not None
    assert sorted(result.composition.max(axis=1)) == [1.0, 1.0]
    assert result.summary["domain_nmi"] == pytest.approx(1)


def test_spots_outside_the_limits_are_left_out() -> None:
    counts = sp.csr_matrix(np.array([[5, 0, 0], [5, 5, 0], [100, 1, 1], [5, 4, 1]]))
    spots = Spots(ad.AnnData(counts), np.zeros((4, 2)), 1.0)
    kept = filter_spots(spots, SpotSettings(min_counts=9, max_counts=50, min_genes=2, max_genes=3))
    assert kept.counts.X.sum(axis=1).ravel().tolist() == [[10, 10]]
    with pytest.raises(InputError, match=r"none of the 4 spots has 1000-100000 UMI \(found 5-102\)"):
        filter_spots(spots, SpotSettings())


def test_no_nucleus_in_a_spot_is_refused() -> None:
    prediction, spots = make()
    prediction.obsm["spatial"] = prediction.obsm["spatial"] + 1e6
    with pytest.raises(InputError, match="no predicted nucleus is inside a spot"):
        compare_spots(prediction, spots, None, SETTINGS)


@pytest.mark.parametrize("name", ["tissue_positions.csv", "tissue_positions_list.csv"])
def test_visium_folders_of_both_ages(tmp_path: Path, name: str) -> None:
    outs = tmp_path / "outs"
    (outs / "spatial").mkdir(parents=True)
    barcodes = [f"AAAC{i}-1" for i in range(3)]
    counts = sp.csc_matrix(np.array([[1, 0, 2], [0, 3, 4]]))  # genes x spots
    with h5py.File(outs / "filtered_feature_bc_matrix.h5", "w") as h:
        m = h.create_group("matrix")
        m["barcodes"] = np.array(barcodes, dtype="S")
        m["data"], m["indices"], m["indptr"], m["shape"] = counts.data, counts.indices, counts.indptr, counts.shape
        for key, values in {
            "id": ["ENSG1", "ENSG2"],
            "name": ["A", "B"],
            "feature_type": ["Gene Expression"] * 2,
            "genome": ["x"] * 2,
        }.items():
            m[f"features/{key}"] = np.array(values, dtype="S")
    head = "barcode,in_tissue,array_row,array_col,pxl_row_in_fullres,pxl_col_in_fullres\n"
    # in another order than the matrix; the second spot is off tissue
    rows = f"{barcodes[2]},1,0,0,30,300\n{barcodes[1]},0,0,1,20,200\n{barcodes[0]},1,1,0,10,100\n"
    (outs / "spatial" / name).write_text(rows if "list" in name else head + rows)
    (outs / "spatial/scalefactors_json.json").write_text('{"spot_diameter_fullres": 89.0}')
    spots = read_visium(outs)
    assert spots.counts.obs_names.tolist() == [barcodes[0], barcodes[2]]
    assert spots.xy.tolist() == [[100, 10], [300, 30]]  # x is the column
    assert spots.radius_px == 44.5
    assert spots.counts.X.toarray().tolist() == [[1, 0], [2, 4]]
    assert spots.counts.var["gene_id"].tolist() == ["ENSG1", "ENSG2"]
    (outs / "spatial/scalefactors_json.json").unlink()
    with pytest.raises(InputError, match=r"has no scalefactors_json\.json"):
        read_visium(outs)


@pytest.mark.real
@pytest.mark.parametrize("section", ["section1", "section2"])
def test_genuine_visium_folders_are_read(prts_data: Path, section: str) -> None:
    folder = prts_data / "visium_hd_schema/visium_v1" / section / "outs"
    spots = read_visium(folder)
    positions = pd.read_csv(folder / "spatial/tissue_positions_list.csv", header=None, index_col=0)
    names = spots.counts.obs_names
    assert 0 < len(names) <= 50
    assert spots.counts.n_vars == 49
    assert (positions.loc[names, 1] == 1).all()
    assert (spots.xy == positions.loc[names, [5, 4]].to_numpy()).all()
    with pytest.raises(InputError, match="folder of a Visium run"):
        read_visium(folder / "spatial")
