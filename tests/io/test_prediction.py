import os
import tracemalloc

import anndata as ad
import geopandas as gpd
import h5py
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import shapely

from prts.errors import InputError
from prts.io.prediction import PredictionWriter, check_out, nuclei_path, read_prediction, spatial_uns


def make_nuclei(n):
    centres = np.column_stack([np.arange(n) * 30.0 + 20, np.arange(n) % 7 * 30.0 + 20])
    half = np.array([5, 10])
    return gpd.GeoDataFrame(
        {
            "cell_id": [f"n{i}" for i in range(n)],
            "geometry": shapely.box(*(centres - half).T, *(centres + half).T),
            "area_um2": np.full(n, 12.5),
            "score": np.nan,
        }
    )


def make_genes(names):
    return pd.DataFrame(
        {
            "gene_id": [f"ENSG{i}" for i in range(len(names))],
            "val_pcc": np.linspace(0, 1, len(names)),
            "ceiling": 0.5,
            "predictable": [i % 2 == 0 for i in range(len(names))],
        },
        index=pd.Index(names, name="gene"),
    )


PICTURE = np.random.default_rng(0).integers(0, 255, (700, 2600, 3), dtype=np.uint8)
UNS = {
    "spatial": spatial_uns("lung é 1", PICTURE, 26_000, 30.0),
    "prts": {
        "bundle": {"sha256": "ab", "layers": [512, 1024], "gate": None},
        "train": ["a", "b"],
        "empty": [],
        "mixed": [{"x": 1}, 2],
        "mpp": 0.5,
        "cut/off": True,
    },
}


def write(path, umi, prob, chunk=17, nuclei=None):
    genes = make_genes([f"g{j}" for j in range(umi.shape[1])])
    with PredictionWriter(path, genes, make_nuclei(len(umi)) if nuclei is None else nuclei, UNS) as writer:
        for start in range(0, len(umi), chunk):
            writer.write(start, umi[start : start + chunk], prob[start : start + chunk])


@pytest.fixture
def values():
    rng = np.random.default_rng(0)
    umi = rng.gamma(0.5, 1, size=(50, 11)).astype(np.float32)
    umi[umi < 0.2] = 0
    umi[10:13] = 0
    return umi, rng.random(umi.shape).astype(np.float32)


def test_intervals_are_sparse_layers_of_whole_counts(tmp_path, values):
    umi, prob = values
    lower = np.random.default_rng(1).poisson(0.1, umi.shape)
    upper = lower + np.random.default_rng(2).poisson(0.5, umi.shape)
    path = tmp_path / "p.h5ad"
    with PredictionWriter(path, make_genes([*"abcdefghijk"]), make_nuclei(50), UNS, intervals=True) as writer:
        for start in range(0, 50, 17):
            rows = slice(start, start + 17)
            writer.write(start, umi[rows], prob[rows], (lower[rows], upper[rows]))
    layers = ad.read_h5ad(path).layers
    for name, values in (("lower", lower), ("upper", upper)):
        assert layers[name].format == "csr" and layers[name].dtype == np.int32
        assert layers[name].nnz == np.count_nonzero(values)
        np.testing.assert_array_equal(layers[name].toarray(), values)


@pytest.mark.parametrize("chunk", [1, 17, 50])
def test_round_trip_for_any_chunks(tmp_path, values, chunk):
    umi, prob = values
    path = tmp_path / "new folder, =é" / "p.h5ad"
    write(path, umi, prob, chunk)
    read = ad.read_h5ad(path)
    assert isinstance(read.X, sp.csr_matrix)
    assert read.X.dtype == np.float32
    assert read.X.nnz == np.count_nonzero(umi)
    assert read.X.has_canonical_format
    np.testing.assert_array_equal(read.X.toarray(), umi)
    np.testing.assert_array_equal(read.layers["prob"], prob)
    assert read.obs_names.tolist() == [f"n{i}" for i in range(50)]
    assert read.obs.columns.tolist() == ["area_um2"]
    assert read.var_names.tolist() == [f"g{j}" for j in range(11)]
    assert read.var.columns.tolist() == ["gene_id", "val_pcc", "ceiling", "predictable"]
    assert read.var["predictable"].tolist() == [j % 2 == 0 for j in range(11)]
    np.testing.assert_allclose(read.obsm["spatial"][8], [8 * 30 + 20, 50])
    polygons = gpd.read_parquet(nuclei_path(path))
    assert polygons["cell_id"].tolist() == read.obs_names.tolist()
    # anndata can write what it read.
    read.write_h5ad(tmp_path / "again.h5ad")
    np.testing.assert_array_equal(ad.read_h5ad(tmp_path / "again.h5ad").X.toarray(), umi)
    assert sorted(p.name for p in path.parent.iterdir()) == ["p.h5ad", "p.nuclei.parquet"]


@pytest.mark.parametrize("chunk", [7, 50])
def test_each_row_is_written_once(tmp_path, values, monkeypatch, chunk):
    umi, prob = values
    rows, appended, write_to = np.zeros(50, dtype=int), {"data": [], "indices": []}, h5py.Dataset.__setitem__

    def counted(self, part, content):
        name = self.name.rpartition("/")[2]
        if self.name == "/layers/prob":
            rows[part] += 1
        elif self.name in ("/X/data", "/X/indices"):
            assert part.start == sum(appended[name])  # appended, never overwritten
            appended[name].append(len(content))
        write_to(self, part, content)

    monkeypatch.setattr(h5py.Dataset, "__setitem__", counted)
    write(tmp_path / "p.h5ad", umi, prob, chunk)
    np.testing.assert_array_equal(rows, 1)
    for sizes in appended.values():
        assert len(sizes) == -(-50 // chunk) and sum(sizes) == np.count_nonzero(umi)


def test_uns_holds_provenance_and_the_picture(tmp_path, values):
    write(tmp_path / "p.h5ad", *values)
    uns = read_prediction(tmp_path / "p.h5ad").uns
    prts = uns["prts"]
    assert prts["scale"] == "umi"
    assert prts["bundle"]["layers"].tolist() == [512, 1024]
    assert "gate" not in prts["bundle"]
    assert prts["train"].tolist() == ["a", "b"]
    assert len(prts["empty"]) == 0
    assert prts["mixed"] == '[{"x": 1}, 2]'
    assert prts["cut_off"]
    library = uns["spatial"]["lung é 1"]
    hires, lowres = library["images"]["hires"], library["images"]["lowres"]
    assert hires.shape == (538, 2000, 3)
    assert lowres.shape == (161, 600, 3)
    assert library["scalefactors"]["tissue_hires_scalef"] == pytest.approx(2000 / 26_000)
    assert library["scalefactors"]["tissue_lowres_scalef"] == pytest.approx(600 / 26_000)
    assert library["scalefactors"]["spot_diameter_fullres"] == 30
    assert abs(hires.mean() - PICTURE.mean()) < 1


@pytest.mark.filterwarnings("ignore")  # scanpy points to squidpy
def test_scanpy_draws_it(tmp_path, values):
    import matplotlib as mpl

    mpl.use("Agg")
    import scanpy as sc

    write(tmp_path / "p.h5ad", *values)
    axes = sc.pl.spatial(read_prediction(tmp_path / "p.h5ad"), color="g1", show=False)
    assert axes[0].images[0].get_array().shape[:2] == (538, 2000)


def test_additional_columns_of_nuclei_become_obs(tmp_path, values):
    nuclei = make_nuclei(50)
    nuclei["ood"] = np.linspace(0, 1, 50)
    write(tmp_path / "p.h5ad", *values, nuclei=nuclei)
    assert read_prediction(tmp_path / "p.h5ad").obs["ood"].tolist() == nuclei["ood"].tolist()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda u, p: u.__setitem__((20, 3), np.nan), "finite"),
        (lambda u, p: u.__setitem__((20, 3), -1), "negative"),
        (lambda u, p: p.__setitem__((20, 3), 1.01), r"\[0, 1\]"),
        (lambda u, p: p.__setitem__((20, 3), np.nan), r"\[0, 1\]"),
    ],
)
def test_a_wrong_value_leaves_no_file_and_the_old_one_in_place(tmp_path, values, change, message):
    umi, prob = values
    write(tmp_path / "p.h5ad", umi, prob)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    change(umi, prob)
    for name in ("p.h5ad", "other.h5ad"):
        with pytest.raises(ValueError, match=message):
            write(tmp_path / name, umi, prob)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_chunks_must_follow_each_other_to_the_end(tmp_path, values):
    umi, prob = values
    genes, nuclei = make_genes([f"g{j}" for j in range(11)]), make_nuclei(50)
    with pytest.raises(ValueError, match="20 of"), PredictionWriter(tmp_path / "p.h5ad", genes, nuclei, UNS) as writer:
        writer.write(0, umi[:20], prob[:20])
        writer.write(30, umi[30:], prob[30:])
    with (
        pytest.raises(ValueError, match="20 of 50 nuclei"),
        PredictionWriter(tmp_path / "p.h5ad", genes, nuclei, UNS) as writer,
    ):
        writer.write(0, umi[:20], prob[:20])
    assert list(tmp_path.iterdir()) == []


def test_out_must_be_an_h5ad_file(tmp_path):
    (tmp_path / "folder.h5ad").mkdir()
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"end in \.h5ad"):
        check_out(tmp_path / "p.h5")
    with pytest.raises(InputError, match="is a folder"):
        check_out(tmp_path / "folder.h5ad")
    with pytest.raises(InputError, match="cannot be created"):
        write(tmp_path / "file" / "p.h5ad", np.ones((2, 2)), np.ones((2, 2)))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_permission_is_an_input_error(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(InputError, match="cannot be written"):
        write(tmp_path / "p.h5ad", np.ones((2, 2)), np.ones((2, 2)))


def test_invalid_predictions_are_refused(tmp_path, values):
    with pytest.raises(InputError, match="no such file"):
        read_prediction(tmp_path / "none.h5ad")
    (tmp_path / "text.h5ad").write_text("hello")
    with pytest.raises(InputError, match=r"not an \.h5ad"):
        read_prediction(tmp_path / "text.h5ad")
    with h5py.File(tmp_path / "other.h5ad", "w") as file:
        file["x"] = 1
    with pytest.raises(InputError, match=r"other\.h5ad"):
        read_prediction(tmp_path / "other.h5ad")
    ad.AnnData(np.ones((2, 2))).write_h5ad(tmp_path / "plain.h5ad")
    with pytest.raises(InputError, match=r"uns\['prts'\]"):
        read_prediction(tmp_path / "plain.h5ad")
    ad.AnnData(np.ones((2, 2)), uns={"prts": {"scale": "log1p"}}).write_h5ad(tmp_path / "log.h5ad")
    with pytest.raises(InputError, match="log1p"):
        read_prediction(tmp_path / "log.h5ad")
    ad.AnnData(np.ones((2, 2)), uns={"prts": np.ones(2)}).write_h5ad(tmp_path / "odd.h5ad")
    with pytest.raises(InputError, match=r"uns\['prts'\]"):
        read_prediction(tmp_path / "odd.h5ad")
    write(tmp_path / "p.h5ad", *values)
    with h5py.File(tmp_path / "p.h5ad", "a") as file:
        file["X/indices"][3] = 1_000_000
    with pytest.raises(InputError, match="X is inconsistent"):
        read_prediction(tmp_path / "p.h5ad")
    write(tmp_path / "p.h5ad", *values)
    with h5py.File(tmp_path / "p.h5ad", "a") as file:
        file["X/data"][3] = np.nan
    with pytest.raises(InputError, match="non-finite"):
        read_prediction(tmp_path / "p.h5ad")


def test_memory_does_not_grow_with_the_nuclei(tmp_path):
    def peak(n):
        genes, nuclei = make_genes([f"g{j}" for j in range(200)]), make_nuclei(n)
        chunk = np.full((500, 200), 0.5, dtype=np.float32)
        with PredictionWriter(tmp_path / "p.h5ad", genes, nuclei, UNS) as writer:
            tracemalloc.start()
            for start in range(0, n, 500):
                writer.write(start, chunk, chunk)
            _, high = tracemalloc.get_traced_memory()
            tracemalloc.stop()
        return high

    assert peak(8000) < 1.2 * peak(2000)
