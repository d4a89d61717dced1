from __future__ import annotations

import logging
from pathlib import Path

import anndata as ad
import geopandas as gpd
import h5py
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import shapely

from prts.errors import InputError
from prts.platforms import bin_counts
from prts.platforms.bin_matrix import BinMatrix
from prts.platforms.visium_hd import VisiumHD
from prts.preprocess.counts import QCSettings, count_nuclei, quality_control

MPP = 0.5
AFFINE = np.array([[4.0, -0.1, 3.0], [0.1, 4.0, 2.0]])  # 2 um bins at 0.5 um/px, tilted


def write_bins(folder: Path, X, *, row, col, symbols, gene_ids=None, positions=None) -> Path:
    """A folder `square_002um` as Space Ranger writes it; X is (n_bins, n_genes)."""
    bins = folder / "square_002um"
    (bins / "spatial").mkdir(parents=True)
    X = sp.csr_matrix(X)
    n_genes = X.shape[1]
    gene_ids = [f"ENSG{i:05d}" for i in range(n_genes)] if gene_ids is None else gene_ids
    with h5py.File(bins / "filtered_feature_bc_matrix.h5", "w") as h:
        matrix = h.create_group("matrix")
        matrix["barcodes"] = np.array([f"s_002um_{r:05d}_{c:05d}-1" for r, c in zip(row, col, strict=True)], dtype="S")
        matrix["data"], matrix["indices"] = X.data.astype(np.int32), X.indices.astype(np.int64)
        matrix["indptr"], matrix["shape"] = X.indptr.astype(np.int64), np.array(X.shape[::-1], dtype=np.int32)
        features = matrix.create_group("features")
        for key, values in {
            "id": gene_ids,
            "name": symbols,
            "feature_type": ["Gene Expression"] * n_genes,
            "genome": ["GRCh38"] * n_genes,
        }.items():
            features[key] = np.array(values, dtype="S")
    at_row, at_col = (np.asarray(row), np.asarray(col)) if positions is None else positions
    x, y = AFFINE @ np.stack([at_col, at_row, np.ones(len(at_row))])
    pd.DataFrame(
        {
            "barcode": [f"s_002um_{r:05d}_{c:05d}-1" for r, c in zip(at_row, at_col, strict=True)],
            "in_tissue": np.ones(len(at_row), dtype=np.uint8),
            "array_row": at_row.astype(np.uint16),
            "array_col": at_col.astype(np.uint16),
            "pxl_row_in_fullres": y.astype(np.float32),
            "pxl_col_in_fullres": x.astype(np.float32),
        }
    ).to_parquet(bins / "spatial" / "tissue_positions.parquet")
    return bins


def make(polygons, cell_id=None) -> gpd.GeoDataFrame:
    polygons = np.asarray(polygons, dtype=object)
    cell_id = [f"n{i}" for i in range(len(polygons))] if cell_id is None else cell_id
    area = shapely.area(polygons) * MPP**2
    return gpd.GeoDataFrame({"cell_id": cell_id, "area_um2": area, "score": np.nan}, geometry=polygons)


def around(row, col, n_rows=1, n_cols=1):
    """A polygon that holds the centres of the bins from (row, col) on."""
    corners = [(-0.5, -0.5), (n_cols - 0.5, -0.5), (n_cols - 0.5, n_rows - 0.5), (-0.5, n_rows - 0.5)]
    return shapely.Polygon([AFFINE @ [col + c, row + r, 1] for c, r in corners])


SYMBOLS = ["A", "TWIN", "TWIN", "MT-CO1"]


@pytest.fixture
def by_hand(tmp_path):
    """Five bins of a row (one in no nucleus, one in two, not in the array's order) and three nuclei, one without bins."""
    col = np.array([5, 0, 1, 2, 3])
    X = [[1, 0, 0, 1], [1, 2, 0, 0], [0, 0, 4, 3], [9, 9, 9, 9], [0, 5, 0, 0]]
    positions = tuple(np.divmod(np.arange(21), 7))
    bins = write_bins(tmp_path, X, row=np.ones(5, dtype=int), col=col, symbols=SYMBOLS, positions=positions)
    nuclei = make([around(1, 0, n_cols=3), around(1, 2, n_cols=3), around(1, 6)], cell_id=["x", "y", "empty"])
    return bins, nuclei


def test_by_hand(by_hand, tmp_path):
    counts = count_nuclei(VisiumHD(by_hand[0]), by_hand[1], species="human")
    assert counts.X.toarray().tolist() == [[1, 2, 4, 3], [0, 5, 0, 0], [0, 0, 0, 0]]
    assert counts.X.format == "csr"
    assert counts.X.dtype == np.int32
    assert counts.X.has_canonical_format
    assert list(counts.obs_names) == ["x", "y", "empty"]
    assert list(counts.var_names) == ["A", "TWIN_ENSG00001", "TWIN_ENSG00002", "MT-CO1"]
    assert counts.obs["total_counts"].tolist() == [10, 5, 0]
    assert counts.obs["n_genes_by_counts"].tolist() == [4, 1, 0]
    assert counts.obs["pct_counts_mt"].tolist() == [30.0, 0.0, 0.0]
    assert counts.obs["area_um2"].tolist() == by_hand[1]["area_um2"].tolist()
    np.testing.assert_allclose(counts.obsm["spatial"][2], AFFINE @ [6, 1, 1])
    report = counts.uns["prts"]
    assert {key: value for key, value in report.items() if key != "species"} == {
        "n_nuclei": 3,
        "n_bins": 5,
        "n_bins_assigned": 3,
        "n_bins_shared_dropped": 1,
        "umi_total": 53,
        "umi_assigned": 15,
        "umi_shared_dropped": 36,
        "umi_outside": 2,
    }
    kept = quality_control(counts, QCSettings(min_umi=4, max_area_um2=1e6, max_pct_mt=50), mpp=MPP)
    kept.write_h5ad(tmp_path / "counts.h5ad")
    again = ad.read_h5ad(tmp_path / "counts.h5ad")
    assert again.uns["prts"]["qc"] == kept.uns["prts"]["qc"]
    assert (again.X != kept.X).nnz == 0


class Watched:
    """A dataset that remembers which of its entries were read."""

    def __init__(self, dataset: h5py.Dataset) -> None:
        self.dataset, self.reads = dataset, np.zeros(len(dataset), dtype=int)
        self.dtype, self.shape = dataset.dtype, dataset.shape

    def __getitem__(self, part):
        self.reads[part] += 1
        return self.dataset[part]


@pytest.mark.parametrize(("max_nnz", "n_chunks"), [(50, 9), (10**6, 1)])
def test_work_one_pass_over_the_matrix(tmp_path, monkeypatch, max_nnz, n_chunks):
    X = sp.csr_matrix(np.ones((100, 4), dtype=int))  # twelve whole bins, of four entries each, go into a chunk of 50
    row, col = np.divmod(np.arange(100), 10)
    bins = write_bins(tmp_path, X, row=row, col=col, symbols=SYMBOLS)
    watched, sizes, opened = {}, [], BinMatrix._open

    def watch(self):
        opened(self)
        for name in ("_data", "_indices"):
            watched[name] = Watched(getattr(self, name))
            setattr(self, name, watched[name])

    def chunks(self, max_nnz, read=BinMatrix.chunks):
        for first, stop, counts in read(self, max_nnz):
            sizes.append(counts.nnz)
            yield first, stop, counts

    monkeypatch.setattr(BinMatrix, "_open", watch)
    monkeypatch.setattr(BinMatrix, "chunks", chunks)
    monkeypatch.setattr(bin_counts, "_MAX_NNZ", max_nnz)
    counts = count_nuclei(VisiumHD(bins), make([around(1, 1, 3, 3), around(5, 5, 2, 4)]), species="human")
    assert counts.X.sum() == (9 + 8) * 4
    for dataset in watched.values():
        np.testing.assert_array_equal(dataset.reads, 1)
    assert len(sizes) == n_chunks and max(sizes) <= max_nnz


def slow_counts(bins: Path, nuclei: gpd.GeoDataFrame):
    """The 10x guide's way: geopandas join of bin centres, drop those found twice, then add up UMI by UMI."""
    positions = pd.read_parquet(bins / "spatial" / "tissue_positions.parquet")
    centres = gpd.points_from_xy(positions["pxl_col_in_fullres"], positions["pxl_row_in_fullres"])
    points = gpd.GeoDataFrame(positions[["barcode"]], geometry=centres)
    joined = gpd.sjoin(points, nuclei[["cell_id", "geometry"]], predicate="within")
    joined = joined[~joined["barcode"].duplicated(keep=False)]
    owner = dict(zip(joined["barcode"], joined["cell_id"], strict=True))
    sums: dict[tuple[str, str], int] = {}
    with h5py.File(bins / "filtered_feature_bc_matrix.h5") as h:
        matrix = {key: h["matrix"][key][:] for key in ("barcodes", "data", "indices", "indptr")}
        ids = h["matrix/features/id"][:].astype(str)
    for i, barcode in enumerate(matrix["barcodes"].astype(str)):
        if barcode in owner:
            for k in range(matrix["indptr"][i], matrix["indptr"][i + 1]):
                key = (owner[barcode], ids[matrix["indices"][k]])
                sums[key] = sums.get(key, 0) + int(matrix["data"][k])
    return sums


def as_dict(counts: ad.AnnData):
    X = counts.X.tocoo()
    names, ids = counts.obs_names.to_numpy(), counts.var["gene_id"].to_numpy()
    return dict(zip(zip(names[X.row], ids[X.col], strict=True), X.data.tolist(), strict=True))


@pytest.mark.parametrize("max_nnz", [7, 200, 10**6])
@pytest.mark.parametrize("seed", [0, 1])
def test_equals_geopandas_join(tmp_path, monkeypatch, seed, max_nnz):
    rng = np.random.default_rng(seed)
    row, col = np.divmod(rng.permutation(40 * 50)[:1200], 50)  # bins without tissue, in no order
    X = sp.random(1200, 12, density=0.2, random_state=seed, data_rvs=lambda n: rng.integers(1, 5, n))
    positions = tuple(np.divmod(np.arange(40 * 50), 50))
    symbols = [f"G{i // 2}" for i in range(11)] + ["MT-1"]
    bins = write_bins(tmp_path, X, row=row, col=col, symbols=symbols, positions=positions)
    centres = shapely.points(rng.uniform(-20, 220, (60, 2)))
    nuclei = make(shapely.buffer(centres, rng.uniform(3, 15, 60), quad_segs=3))  # many overlap, some miss the bins
    monkeypatch.setattr(bin_counts, "_MAX_NNZ", max_nnz)
    counts = count_nuclei(VisiumHD(bins), nuclei, species="human")
    assert as_dict(counts) == slow_counts(bins, nuclei)
    assert counts.X.has_canonical_format
    umi = counts.uns["prts"]
    assert counts.X.sum() == umi["umi_assigned"] > 0
    assert umi["umi_shared_dropped"] > 0
    assert umi["umi_assigned"] + umi["umi_shared_dropped"] + umi["umi_outside"] == umi["umi_total"] == X.sum()


def test_a_centre_on_the_boundary_is_in_no_nucleus(tmp_path):
    row, col = np.divmod(np.arange(9), 3)
    bins = write_bins(tmp_path, np.ones((9, 1), dtype=int), row=row, col=col, symbols=["A"])
    table = bins / "spatial" / "tissue_positions.parquet"
    positions = pd.read_parquet(table)
    positions["pxl_row_in_fullres"], positions["pxl_col_in_fullres"] = row * 4.0, col * 4.0
    positions.to_parquet(table)
    counts = count_nuclei(VisiumHD(bins), make([shapely.box(0, 0, 4, 8), shapely.box(0, 0, 9, 9)]), species="human")
    assert counts.X.toarray().ravel().tolist() == [0, 4]


@pytest.mark.parametrize(
    ("symbols", "species", "message"),
    [
        (SYMBOLS, "rat", "no gene Mt-... and 1 genes MT-...; choose human, or set `qc.mt_prefix` to 'MT-'"),
        (SYMBOLS, "human being", "'human being' is not known, did you mean 'human'.; choose human, mouse, rat"),
        (["A", "TWIN", "TWIN", "Mt-co1"], "mouse", "choose rat, or set `qc.mt_prefix` to 'Mt-'"),
        (["A", "TWIN", "TWIN", "mt:CoI"], "zebrafish", "choose fruit fly"),
        (SYMBOLS, "mouse", "choose human"),
        (["A", "TWIN", "TWIN", "mt-Co1"], "human", "choose mouse"),
    ],
)
def test_wrong_species(tmp_path, symbols, species, message):
    bins = write_bins(tmp_path, np.ones((4, 4)), row=[0, 0, 1, 1], col=[0, 1, 0, 1], symbols=symbols)
    with pytest.raises(InputError, match=message):
        count_nuclei(VisiumHD(bins), make([around(0, 0)]), species=species)


@pytest.mark.parametrize(
    ("symbol", "species", "prefix"),
    [
        ("Mt-co1", "rat", None),
        ("mt-co1", "zebrafish", None),
        ("mt:CoI", "fruit fly", None),
        ("MTCE.26", "worm", "MTCE."),
    ],
)
def test_mitochondrial_genes_of_any_species(tmp_path, symbol, species, prefix):
    bins = write_bins(tmp_path, np.ones((4, 2)), row=[0, 0, 1, 1], col=[0, 1, 0, 1], symbols=["A", symbol])
    counts = count_nuclei(VisiumHD(bins), make([around(0, 0)]), species=species, mt_prefix=prefix)
    assert counts.obs["pct_counts_mt"].tolist() == [50.0]


def test_a_wrong_prefix_is_refused(tmp_path):
    bins = write_bins(tmp_path, np.ones((4, 4)), row=[0, 0, 1, 1], col=[0, 1, 0, 1], symbols=SYMBOLS)
    with pytest.raises(InputError, match=r"mt_prefix: 'mito-', but .* 1 genes MT-...; set it to 'MT-'"):
        count_nuclei(VisiumHD(bins), make([around(0, 0)]), species="human", mt_prefix="mito-")


def test_no_mitochondrial_gene_is_said(tmp_path, caplog):
    bins = write_bins(tmp_path, np.ones((4, 1)), row=[0, 0, 1, 1], col=[0, 1, 0, 1], symbols=["A"])
    with caplog.at_level(logging.WARNING):
        assert count_nuclei(VisiumHD(bins), make([around(0, 0)]), species="mouse").obs["pct_counts_mt"].tolist() == [
            0.0
        ]
    assert "no mitochondrial gene" in caplog.text


def test_bins_of_another_image(by_hand):
    bins, nuclei = by_hand
    with pytest.raises(InputError, match="none of 53 UMIs falls into one of 3 nuclei"):
        count_nuclei(
            VisiumHD(bins), make(shapely.transform(nuclei.geometry.to_numpy(), lambda xy: xy + 1000)), species="human"
        )
    with pytest.raises(InputError, match="none of 53 UMIs falls into one of 0 nuclei"):
        count_nuclei(VisiumHD(bins), nuclei[:0], species="human")


def test_empty_matrix(tmp_path):
    bins = write_bins(tmp_path, np.zeros((4, 4)), row=[0, 0, 1, 1], col=[0, 1, 0, 1], symbols=SYMBOLS)
    with pytest.raises(InputError, match="contains no UMI"):
        count_nuclei(VisiumHD(bins), make([around(0, 0)]), species="human")


def test_bins_without_position(tmp_path):
    listed = (np.array([0, 0, 1]), np.array([0, 1, 0]))
    bins = write_bins(tmp_path, np.ones((2, 4)), row=[0, 1], col=[0, 1], symbols=SYMBOLS, positions=listed)
    with pytest.raises(InputError, match="1 of 2 bins have no position"):
        count_nuclei(VisiumHD(bins), make([around(0, 0)]), species="human")


@pytest.fixture
def five():
    """Nuclei at and beside each limit."""
    obs = pd.DataFrame(
        {
            "area_um2": [149.9, 150.0, 50.0, 50.0, 50.0],
            "total_counts": [21, 500, 20, 500, 500],
            "n_genes_by_counts": [9, 9, 9, 9, 9],
            "pct_counts_mt": [0.0, 0.0, 0.0, 15.0, 14.9],
        },
        index=list("abcde"),
    )
    return ad.AnnData(sp.csr_matrix(np.eye(5, dtype=np.int32)), obs=obs, uns={"prts": {"n_bins": 7}})


def test_limits_are_strict(five):
    kept = quality_control(five, QCSettings(), mpp=0.5)
    assert list(kept.obs_names) == ["a", "e"]
    assert kept.X.toarray().tolist() == [[1, 0, 0, 0, 0], [0, 0, 0, 0, 1]]
    assert kept.uns["prts"]["n_bins"] == 7
    assert kept.uns["prts"]["qc"] == {
        "n_nuclei": 5,
        "n_kept": 2,
        "n_failed_area": 1,
        "n_failed_umi": 1,
        "n_failed_mt": 1,
        "min_umi": 20,
        "max_area_um2": 150.0,
        "max_pct_mt": 15.0,
    }
    assert "qc" not in five.uns["prts"]


def test_area_limit_in_pixels(five):
    assert list(quality_control(five, QCSettings(max_area_px=600.0), mpp=0.5).obs_names) == ["a", "e"]  # 150 um2
    kept = quality_control(five, QCSettings(max_area_px=600.1), mpp=0.5)
    assert list(kept.obs_names) == ["a", "b", "e"]
    assert kept.uns["prts"]["qc"]["max_area_px"] == 600.1
    assert "max_area_um2" not in kept.uns["prts"]["qc"]


def test_a_limit_of_none_limits_nothing_and_is_not_reported(five):
    kept = quality_control(five, QCSettings(min_umi=None, max_area_um2=None, max_pct_mt=None), mpp=0.5)
    assert kept.n_obs == 5
    assert not {"min_umi", "max_area_um2", "max_pct_mt"} & set(kept.uns["prts"]["qc"])
    assert list(quality_control(five, QCSettings(max_area_um2=None), mpp=0.5).obs_names) == ["a", "b", "e"]


def test_stored_limits_come_back_as_they_were():
    """A file omits what is not limited; the defaults of this version do not take its place."""
    stored = {"min_umi": np.int64(60), "max_area_um2": np.float64(99.5)}
    assert QCSettings.from_stored(stored) == QCSettings(60, 99.5, None, None)
    assert QCSettings.from_stored(QCSettings().settings()) == QCSettings()


def test_whole_numbers_have_one_fingerprint():
    from prts.io.cache import fingerprint

    config = {"min_umi": 20, "max_area_um2": 150, "max_area_px": None, "max_pct_mt": 15}
    assert fingerprint(QCSettings(20, 150.0, None, 15.0).settings()) == fingerprint(config)


def test_nothing_left(five):
    with pytest.raises(
        InputError, match="none of 5 nuclei: 1 for max_area_um2=150, 5 for min_umi=1000, 1 for max_pct_mt"
    ):
        quality_control(five, QCSettings(min_umi=1000), mpp=0.5)


@pytest.mark.real
def test_real_section_equals_geopandas_join(prts_data):
    from prts.io.nuclei import read_nuclei

    section = prts_data / "her2st_hd" / "C2"
    bins = section / "binned_outputs" / "square_002um"
    nuclei = read_nuclei(section / "nucleus_segmentations.geojson.gz", mpp=0.688, width=100_000, height=100_000)
    counts = count_nuclei(VisiumHD(bins), nuclei, species="human")
    assert as_dict(counts) == slow_counts(bins, nuclei)
    kept = quality_control(counts, QCSettings(), mpp=0.688)
    assert 100 < kept.obs["total_counts"].median() < 200


@pytest.mark.real
def test_genuine_empty_matrix_is_refused(prts_data):
    bins = prts_data / "visium_hd_schema" / "binned_outputs" / "square_002um"
    with pytest.raises(InputError, match="contains no UMI"):
        count_nuclei(VisiumHD(bins), make([shapely.box(0, 0, 50_000, 50_000)]), species="mouse")
