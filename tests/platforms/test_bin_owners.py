"""Which bins are counted for which nucleus, against a slow version that looks at one bin at a time, and the table of bins."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import geopandas as gpd
import h5py
import numpy as np
import pandas as pd
import pytest
import shapely
from scipy import sparse

from prts.data.prepare import PrepareSettings, prepare_sections
from prts.data.splits import Random, Roles
from prts.errors import InputError, ParameterError
from prts.features.no_encoder import NoEncoder
from prts.io.nuclei import load_nuclei, make_nuclei, read_nuclei
from prts.platforms import bin_counts
from prts.platforms.bin_counts import count_bins, write_bin_table
from prts.platforms.bin_owners import CountSettings, assign_bins
from prts.platforms.bin_positions import read_positions
from prts.preprocess.counts import QCSettings, count_nuclei
from prts.preprocess.panel import TopPanel
from prts.section import open_section_folder
from prts.segmentation.polygons import Polygons
from prts.simulate.section import simulate_section

MPP = 0.5


@pytest.fixture(scope="module")
def section(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return simulate_section(
        tmp_path_factory.mktemp("owners") / "s", cells=50, genes=50, seed=4, layout="spaceranger4", name="s"
    )


@pytest.fixture(scope="module")
def bins(section: Path) -> Path:
    return section / "outs/binned_outputs/square_002um"


@pytest.fixture(scope="module")
def crowded(section: Path) -> gpd.GeoDataFrame:
    """Nuclei that overlap: grown by 2 um, and one that is cut into two pieces."""
    own = load_nuclei(section / "truth_nuclei.parquet")
    shapes = shapely.buffer(own.geometry.to_numpy(), 2 / MPP)
    x0, y0, x1, y1 = shapes[0].bounds
    middle = (x0 + x1) / 2
    shapes[0] = shapely.MultiPolygon(
        [shapely.box(x0 - 9, y0, middle - 14, y1), shapely.box(middle + 14, y0, x1 + 9, y1)]
    )
    return gpd.GeoDataFrame(
        {"cell_id": own["cell_id"], "geometry": shapes, "area_um2": shapely.area(shapes) * MPP**2, "score": np.nan},
        geometry="geometry",
    )


def matrix_of(bins: Path) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Positions of all bins, and counts of those in the matrix."""
    with h5py.File(bins / "filtered_feature_bc_matrix.h5") as file:
        m = file["matrix"]
        columns = (m["data"][:], m["indices"][:].astype(int), m["indptr"][:].astype(int))
        X = sparse.csc_matrix(columns, shape=tuple(m["shape"][:])).toarray().T
        counts = pd.DataFrame(X, m["barcodes"][:].astype(str), m["features/name"][:].astype(str))
    return pd.read_parquet(bins / "spatial/tissue_positions.parquet"), counts


@pytest.mark.parametrize(
    ("expand_um", "shared"), [(0, "drop"), (0, "nearest"), (3, "drop"), (8, "nearest"), (8, "drop")]
)
def test_bins_go_where_the_slow_version_puts_them(
    bins: Path, crowded: gpd.GeoDataFrame, cells_bin_by_bin: Callable, expand_um: float, shared: str
) -> None:
    nuclei = crowded.geometry.to_numpy()
    positions, counts = matrix_of(bins)
    cell_of, nucleus_of = cells_bin_by_bin(positions, nuclei, int(np.ceil(expand_um / 2)), shared)
    owners = assign_bins(nuclei, read_positions(bins), CountSettings(expand_um=expand_um, shared=shared))
    found = {(int(r), int(c)): int(owners.unit[r, c]) for r, c in zip(*np.nonzero(owners.unit >= 0), strict=True)}
    assert found == cell_of
    assert {tuple(map(int, b)) for b in np.argwhere(owners.in_nucleus)} == {b for b in nucleus_of if b in cell_of}
    if expand_um == 0 and shared == "drop":
        assert (owners.unit == -2).sum() > 20  # nuclei do overlap

    counted = count_bins(bins, crowded, settings=CountSettings(expand_um=expand_um, shared=shared))
    expected = np.zeros(counted.shape)
    at = positions.set_index("barcode")
    for barcode, row in counts.iterrows():
        bin_ = (at.at[barcode, "array_row"], at.at[barcode, "array_col"])
        if bin_ in cell_of:
            expected[cell_of[bin_]] += row.to_numpy()
    np.testing.assert_array_equal(counted.X.toarray(), expected)


def test_the_default_is_the_paper_s_rule(bins: Path, crowded: gpd.GeoDataFrame) -> None:
    assert CountSettings().settings() == {}
    assert CountSettings(sigma_um=9, seed=3).settings() == {}
    default, drop = count_bins(bins, crowded), count_bins(bins, crowded, settings=CountSettings(shared="drop"))
    assert (default.X != drop.X).nnz == 0
    assert "counting" not in default.uns["prts"]
    split = CountSettings(shared="split", seed=1)
    assert split.settings() == {"shared": "split", "sigma_um": 4.0, "seed": 1}
    assert CountSettings.from_stored(split.settings()) == split


def test_shares_follow_the_distance_to_the_centroids(bins: Path) -> None:
    grid = read_positions(bins)
    x, y = grid.xy(np.array([20]), np.array([20]))[0]
    # two squares of 12 um whose centroids are 3 and 5 um from the bin
    left, right = (shapely.box(x + d - 12, y - 12, x + d + 12, y + 12) for d in (-3 / MPP, 5 / MPP))
    owners = assign_bins(np.array([left, right]), grid, CountSettings(shared="split", sigma_um=4))
    assert owners.shared is not None
    here = owners.shared.place == 20 * grid.n_cols + 20
    weight = np.exp(-(np.array([3.0, 5.0]) ** 2) / (2 * 4**2))
    np.testing.assert_allclose(owners.shared.share[here], weight / weight.sum(), rtol=1e-6)
    assert owners.shared.unit[here].tolist() == [0, 1]
    assert owners.unit[20, 20] == 0


def test_split_umis_are_conserved_and_follow_the_shares(bins: Path, crowded: gpd.GeoDataFrame) -> None:
    nearest = count_bins(bins, crowded, settings=CountSettings(shared="nearest"))
    drop = count_bins(bins, crowded)
    draws = [count_bins(bins, crowded, settings=CountSettings(shared="split", seed=seed)) for seed in range(60)]
    total = nearest.X.sum(axis=0)
    for drawn in draws:
        assert drawn.X.dtype == np.int32
        np.testing.assert_array_equal(drawn.X.sum(axis=0), total)
        assert ((drawn.X - drop.X) < 0).nnz == 0
    assert (draws[0].X != draws[1].X).nnz > 0

    positions, counts = matrix_of(bins)
    owners = assign_bins(crowded.geometry.to_numpy(), read_positions(bins), CountSettings(shared="split"))
    umi = pd.Series(0.0, index=positions["barcode"])
    umi.update(counts.sum(axis=1))
    assert owners.shared is not None
    n = umi.to_numpy()[owners.shared.place]
    added = np.bincount(owners.shared.unit, n * owners.shared.share, minlength=len(crowded))
    spread = np.bincount(
        owners.shared.unit, n * owners.shared.share * (1 - owners.shared.share), minlength=len(crowded)
    )
    mean = np.mean([np.asarray(drawn.X.sum(axis=1)).ravel() for drawn in draws], axis=0)
    expected = np.asarray(drop.X.sum(axis=1)).ravel() + added
    assert (np.abs(mean - expected) <= 4.5 * np.sqrt(spread / len(draws)) + 1e-9).all()
    assert spread.max() > 1


def test_split_does_not_depend_on_the_chunks(
    bins: Path, crowded: gpd.GeoDataFrame, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = CountSettings(shared="split", expand_um=4, seed=5)
    whole = count_bins(bins, crowded, settings=settings)
    assert (whole.X != count_bins(bins, crowded, settings=settings).X).nnz == 0
    monkeypatch.setattr(bin_counts, "_MAX_NNZ", 500)
    assert (whole.X != count_bins(bins, crowded, settings=settings).X).nnz == 0


@pytest.mark.parametrize("shared", ["drop", "split"])
def test_the_table_gives_the_counts(bins: Path, crowded: gpd.GeoDataFrame, tmp_path: Path, shared: str) -> None:
    settings = CountSettings(expand_um=4, shared=shared)
    write_bin_table(tmp_path / "t.parquet", bins, crowded, settings=settings)
    table = pd.read_parquet(tmp_path / "t.parquet")
    counted = count_bins(bins, crowded, settings=settings)
    _, counts = matrix_of(bins)
    assert table["in_cell"].all() and table["cell_id"].notna().all()
    if shared == "drop":
        assert table["square_002um"].is_unique
        own = counts.loc[table["square_002um"]].groupby(table["cell_id"].to_numpy()).sum()
        expected = own.reindex(counted.obs_names, fill_value=0)
        np.testing.assert_array_equal(counted.X.toarray(), expected.to_numpy())
    else:
        assert table.groupby("square_002um")["share"].sum().to_numpy() == pytest.approx(1.0)
        assert (table["share"] < 1).any()
        own = counts.sum(axis=1).loc[table["square_002um"]].to_numpy() * table["share"]
        assert own.sum() == pytest.approx(counted.X.sum())


def test_cells_of_space_ranger_are_reproduced(section: Path) -> None:
    """Nuclei of the outs, expanded by 8 um: the delivered matrix, cell by cell."""
    opened = open_section_folder(section)
    assert opened.nuclei is not None and opened.nuclei.name == "nucleus_segmentations.geojson"
    assert opened.measurement is not None
    nuclei = read_nuclei(opened.nuclei, mpp=opened.mpp, width=opened.width, height=opened.height)
    counting = CountSettings(expand_um=8, shared="nearest")
    counted = count_nuclei(opened.measurement, nuclei, species="human", counting=counting)
    with h5py.File(section / "outs/segmented_outputs/filtered_feature_cell_matrix.h5") as file:
        m = file["matrix"]
        columns = (m["data"][:], m["indices"][:].astype(int), m["indptr"][:].astype(int))
        X = sparse.csc_matrix(columns, shape=tuple(m["shape"][:])).toarray().T
        delivered = pd.DataFrame(X, m["barcodes"][:].astype(str), m["features/name"][:].astype(str))
    ours = pd.DataFrame(counted.X.toarray(), [f"cellid_{int(k):09d}-1" for k in counted.obs_names], counted.var_names)
    ours = ours.loc[ours.sum(axis=1) > 0]
    pd.testing.assert_frame_equal(ours.loc[delivered.index], delivered, check_dtype=False, check_names=False)
    assert len(ours) == len(delivered)


def prepared(section: Path, cache: Path, counting: CountSettings):
    opened = open_section_folder(section)
    settings = PrepareSettings(
        segmenter=Polygons(opened.nuclei),
        splitter=Random(),
        panel=TopPanel(n_genes=10),
        encoder=NoEncoder(),
        cache_dir=cache,
        qc=QCSettings(min_umi=0, max_area_um2=None, max_pct_mt=None),
        counting=counting,
    )
    return prepare_sections("t", "human", {"s": opened}, Roles(("s",), (), ()), settings).sections["s"]


def test_settings_are_part_of_the_preparation(section: Path, tmp_path: Path) -> None:
    import anndata as ad

    paper = prepared(section, tmp_path, CountSettings())
    cells = prepared(section, tmp_path, CountSettings(expand_um=8, shared="nearest"))
    assert paper.nuclei == cells.nuclei
    assert paper.counts != cells.counts and paper.colour != cells.colour
    assert prepared(section, tmp_path, CountSettings(seed=7)).counts == paper.counts  # nothing is drawn
    few, many = (ad.read_h5ad(each.counts) for each in (paper, cells))
    assert many.X.sum() > 1.5 * few.X.sum()
    assert many.uns["prts"]["counting"] == {"expand_um": 8.0, "shared": "nearest"}
    for each, measured in ((paper, few), (cells, many)):
        assert each.bin_table is not None and each.bin_table.name.startswith("barcode_mappings-")
        table = pd.read_parquet(each.bin_table)
        assert len(table) == measured.uns["prts"]["n_bins_assigned"]
        assert set(measured.obs_names) <= set(table["cell_id"])


def test_other_platforms_and_values_are_refused(section: Path) -> None:
    class Cells:
        name = "cells"

    with pytest.raises(InputError, match=r"^counts: cells delivers counts of whole units.*; leave counts.expand_um=0"):
        count_nuclei(Cells(), make_nuclei([shapely.box(0, 0, 9, 9)], MPP), species="human", counting=CountSettings(8))  # type: ignore[arg-type]
    assert issubclass(ParameterError, InputError)
    table = pd.read_parquet(section / "outs/barcode_mappings.parquet")
    assert json.loads(json.dumps(CountSettings(expand_um=8).settings())) == {"expand_um": 8}
    assert table["in_cell"].any()
