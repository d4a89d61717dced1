"""Visium HD bins: what is read equals what was written, in chunks of any size, and every contradiction is found."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import shapely
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.sparse import csc_matrix, csr_matrix, random_array, vstack

from prts.errors import InputError
from prts.io.nuclei import make_nuclei
from prts.platforms.bin_counts import count_bins
from prts.platforms.bin_matrix import BinMatrix
from prts.platforms.bin_positions import matrix_path, read_positions, read_scalefactors
from prts.platforms.bin_units import measured_squares

AFFINE = np.array([[-7.3, 0.11, 21_000.0], [0.12, 7.298, 46.8]])
GENES = {
    "id": [b"E1", b"E2", b"E3", b"E4", b"E5"],
    "name": [b"Actb", b"Dup", b"Dup", b"", b"Ttr"],
    "feature_type": [b"Gene Expression"] * 5,
    "genome": [b"mm10"] * 5,
}


def barcodes(row: np.ndarray, col: np.ndarray) -> np.ndarray:
    return np.array([f"s_002um_{r:05}_{c:05}-1".encode() for r, c in zip(row, col, strict=True)], dtype="S21")


def write_matrix(path: Path, counts: np.ndarray, row: np.ndarray, col: np.ndarray, **features: list[bytes]) -> Path:
    """10x's layout of bins x genes."""
    columns = csc_matrix(counts.T)
    with h5py.File(path, "w") as h5:
        matrix = h5.create_group("matrix")
        matrix["barcodes"] = barcodes(row, col)
        matrix["data"] = columns.data
        matrix["indices"] = columns.indices.astype(np.int64)
        matrix["indptr"] = columns.indptr.astype(np.int64)
        matrix["shape"] = np.array(columns.shape, np.int32)
        for name, values in (GENES | features).items():
            matrix[f"features/{name}"] = np.array(values)
    return path


@pytest.fixture
def counts() -> np.ndarray:
    return np.random.default_rng(0).poisson(0.7, (30, 5)).astype(np.int32)


@pytest.fixture
def matrix_file(tmp_path: Path, counts: np.ndarray) -> Path:
    row, col = np.divmod(np.random.default_rng(1).permutation(60)[:30], 10)
    return write_matrix(tmp_path / "filtered_feature_bc_matrix.h5", counts, row, col)


def write_positions(bins: Path, n_rows: int = 6, n_cols: int = 9, **columns: object) -> pd.DataFrame:
    row, col = (axis.ravel() for axis in np.mgrid[:n_rows, :n_cols])
    x, y = AFFINE @ np.stack([col, row, np.ones_like(col)])
    frame = pd.DataFrame(
        {
            "barcode": barcodes(row, col).astype(str),
            "in_tissue": np.int32(1),
            "array_row": row.astype(np.int32),
            "array_col": col.astype(np.int32),
            "pxl_row_in_fullres": y,
            "pxl_col_in_fullres": x,
        }
    ).assign(**columns)
    (bins / "spatial").mkdir(parents=True, exist_ok=True)
    frame.to_parquet(bins / "spatial/tissue_positions.parquet")
    return frame


def write_scalefactors(bins: Path, content: object) -> Path:
    (bins / "spatial").mkdir(parents=True, exist_ok=True)
    (bins / "spatial/scalefactors_json.json").write_text(content if isinstance(content, str) else json.dumps(content))
    return bins


# matrix


@pytest.mark.parametrize("max_nnz", [1, 7, 10_000])
def test_chunks_are_the_matrix(matrix_file: Path, counts: np.ndarray, max_nnz: int) -> None:
    with BinMatrix(matrix_file) as matrix:
        chunks = list(matrix.chunks(max_nnz))
        assert (matrix.n_bins, matrix.n_genes, matrix.nnz) == (30, 5, np.count_nonzero(counts))
    assert [first for first, _, _ in chunks] == [0, *(stop for _, stop, _ in chunks[:-1])]
    assert chunks[-1][1] == 30
    assert all(chunk.nnz <= max_nnz or stop - first == 1 for first, stop, chunk in chunks)
    assert all(chunk.dtype == np.int32 and chunk.format == "csr" for _, _, chunk in chunks)
    assert np.array_equal(vstack([chunk for _, _, chunk in chunks]).toarray(), counts)
    assert len(chunks) == 1 or max_nnz < 10_000


def test_array_positions_come_from_barcodes(tmp_path: Path) -> None:
    row, col = np.array([0, 3349, 99_999, 120]), np.array([3349, 7, 12_345, 0])
    path = write_matrix(tmp_path / "m.h5", np.eye(4, 5, dtype=np.int32), row, col)
    with BinMatrix(path) as matrix:
        assert matrix.array_row.tolist() == row.tolist()
        assert matrix.array_col.tolist() == col.tolist()
        assert matrix.array_row.dtype == np.int32


def test_names_of_genes_are_unique(matrix_file: Path) -> None:
    with BinMatrix(matrix_file) as matrix:
        var = matrix.var()
        assert matrix.genome == "mm10"
    assert var.index.tolist() == ["Actb", "Dup_E2", "Dup_E3", "E4", "Ttr"]
    assert var["symbol"].tolist() == ["Actb", "Dup", "Dup", "", "Ttr"]
    assert var["gene_id"].tolist() == ["E1", "E2", "E3", "E4", "E5"]


def test_a_symbol_that_looks_like_a_made_name(tmp_path: Path) -> None:
    names = [b"A", b"A", b"A_E1", b"B", b"B"]
    path = write_matrix(tmp_path / "m.h5", np.ones((1, 5), np.int32), np.array([1]), np.array([2]), name=names)
    with BinMatrix(path) as matrix:
        assert matrix.var().index.is_unique


def test_other_features_are_dropped(tmp_path: Path, counts: np.ndarray) -> None:
    types = [b"Gene Expression", b"Antibody Capture", b"Gene Expression", b"Gene Expression", b"Custom"]
    path = write_matrix(tmp_path / "m.h5", counts, np.arange(30), np.arange(30), feature_type=types)
    with BinMatrix(path) as matrix:
        assert matrix.gene_ids.tolist() == ["E1", "E3", "E4"]
        ((_, _, chunk),) = matrix.chunks()
    assert np.array_equal(chunk.toarray(), counts[:, [0, 2, 3]])


def test_unsorted_indices_and_other_integers(matrix_file: Path, counts: np.ndarray) -> None:
    with h5py.File(matrix_file, "r+") as h5:
        matrix = h5["matrix"]
        start, stop = matrix["indptr"][3:5]
        for name in ("data", "indices"):
            matrix[name][start:stop] = matrix[name][start:stop][::-1]
        for name, dtype in {"data": np.uint8, "indices": np.uint32, "indptr": np.uint32}.items():
            values = matrix[name][:].astype(dtype)
            del matrix[name]
            matrix.create_dataset(name, data=values, chunks=True, maxshape=(None,), compression="gzip")
    with BinMatrix(matrix_file) as matrix:
        assert np.array_equal(vstack([c for _, _, c in matrix.chunks(11)]).toarray(), counts)


def test_counts_stored_as_whole_floats_are_counts(matrix_file: Path, counts: np.ndarray) -> None:
    replace("data", lambda data: data.astype(np.float32))(matrix_file)
    with BinMatrix(matrix_file) as matrix:
        ((_, _, chunk),) = matrix.chunks()
    assert np.array_equal(chunk.toarray(), counts)


@pytest.mark.parametrize("n_bins", [0, 3])
def test_an_empty_matrix_can_be_read(tmp_path: Path, n_bins: int) -> None:
    path = write_matrix(tmp_path / "m.h5", np.zeros((n_bins, 5), np.int32), np.arange(n_bins), np.arange(n_bins))
    with BinMatrix(path) as matrix:
        assert (matrix.n_bins, matrix.nnz) == (n_bins, 0)
        assert sum(stop - first for first, stop, _ in matrix.chunks()) == n_bins


def replace(name: str, change: Callable[[np.ndarray], object]) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        with h5py.File(path, "r+") as h5:
            values = h5["matrix"][name][:]
            del h5["matrix"][name]
            h5["matrix"][name] = change(values)

    return damage


def remove(name: str) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        with h5py.File(path, "r+") as h5:
            del h5[name]

    return damage


def link(name: str, to: object) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        with h5py.File(path, "r+") as h5:
            h5.move(name, "elsewhere")
            h5[name] = to

    return damage


def set_first(value: object) -> Callable[[np.ndarray], np.ndarray]:
    def change(values: np.ndarray) -> np.ndarray:
        values = values.copy()
        values[0] = value
        return values

    return change


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (replace("data", lambda d: -d), "UMI counts"),
        (replace("data", lambda d: d * 0.5), "fractions"),
        (replace("data", lambda d: d * np.nan), "UMI counts"),
        (replace("data", lambda d: d.astype(np.int64) << 32), "UMI counts"),
        (replace("data", lambda d: d[:-1]), "contradict"),
        (replace("data", lambda d: np.stack([d, d], axis=1)), "contradict"),
        (replace("data", lambda d: d.astype("S3")), "must be numbers"),
        (replace("indices", lambda i: i + 3), "5 features"),
        (replace("indices", lambda i: i - 4), "5 features"),
        (replace("indptr", lambda i: i[:-1]), "contradict"),
        (replace("indptr", lambda i: i[::-1]), "contradict"),
        (replace("shape", lambda s: s[::-1]), "contradict"),
        (replace("shape", lambda s: np.full(len(s), np.inf)), "contradict"),
        (replace("shape", lambda s: np.tile(s, (2, 1))), "contradict"),
        (replace("barcodes", lambda b: b[:-1]), "contradict"),
        (replace("barcodes", set_first(b"AAACAACGAATAGTTC-1")), "AAACAACGAATAGTTC-1.*not a 2 um bin"),
        (replace("barcodes", set_first(b"s_002um_00001_0000x-1")), "not a 2 um bin"),
        (replace("barcodes", set_first(b"s_002um_00001_00001-")), "not a 2 um bin"),
        (replace("barcodes", lambda b: np.char.replace(b, b"002um", b"008um")), "bins of 8 um.*square_002um"),
        (replace("barcodes", lambda b: b[[0, *range(len(b) - 1)]]), r"s_002um_\d{5}_\d{5}-1 occurs twice"),
        (replace("features/id", set_first(b"E2")), "'E2' occurs twice"),
        (replace("features/id", lambda i: i[:-1]), "different lengths"),
        (replace("features/id", lambda i: np.stack([i, i], axis=1)), "different lengths"),
        (replace("features/name", set_first(b"\xff")), "damaged"),
        (replace("features/genome", lambda g: np.arange(len(g))), "must be text"),
        (replace("features/feature_type", lambda t: np.full(len(t), b"Custom")), "Gene Expression"),
        (remove("matrix/features/id"), "matrix/features/id is missing"),
        (remove("matrix"), "matrix is missing"),
        (link("matrix/data", h5py.ExternalLink("other.h5", "data")), "matrix/data is a link"),
        (link("matrix", h5py.ExternalLink("other.h5", "matrix")), "matrix is a link"),
        (link("matrix/features/name", h5py.SoftLink("/elsewhere")), "features/name is a link"),
    ],
)
def test_contradictions_are_found(matrix_file: Path, damage: Callable[[Path], None], message: str) -> None:
    damage(matrix_file)
    with pytest.raises(InputError, match=f"filtered_feature_bc_matrix.h5.*{message}"), BinMatrix(matrix_file) as matrix:
        list(matrix.chunks())


def test_sizes_beyond_what_the_file_holds_are_refused(matrix_file: Path) -> None:
    with h5py.File(matrix_file, "r+") as h5:
        del h5["matrix/barcodes"]
        h5["matrix"].create_dataset("barcodes", (1 << 40,), "S21", chunks=(1024,))
    with pytest.raises(InputError, match="matrix/barcodes has more values than the file can contain"):
        BinMatrix(matrix_file)


def test_text_of_any_length_is_read(matrix_file: Path) -> None:
    with h5py.File(matrix_file, "r+") as h5:
        names = h5["matrix/features/name"][:].astype(object)
        del h5["matrix/features/name"]
        h5["matrix/features"].create_dataset("name", data=names, dtype=h5py.string_dtype())
    with BinMatrix(matrix_file) as matrix:
        assert matrix.gene_names.tolist() == ["Actb", "Dup", "Dup", "", "Ttr"]


def test_data_kept_in_other_files_is_refused(matrix_file: Path, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_bytes(b"\1\0\0\0" * 200)
    with h5py.File(matrix_file, "r+") as h5:
        n = len(h5["matrix/data"])
        del h5["matrix/data"]
        h5["matrix"].create_dataset("data", (n,), np.int32, external=[(str(secret), 0, 4 * n)])
    with pytest.raises(InputError, match="matrix/data is stored in other files"):
        BinMatrix(matrix_file)


@pytest.mark.parametrize("content", [b"", b"no HDF5 at all"])
def test_what_is_no_hdf5(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "m.h5").write_bytes(content)
    with pytest.raises(InputError, match=r"m\.h5: not HDF5"):
        BinMatrix(tmp_path / "m.h5")
    with pytest.raises(InputError, match="no such file"):
        BinMatrix(tmp_path / "none.h5")


def test_a_truncated_file(matrix_file: Path) -> None:
    matrix_file.write_bytes(matrix_file.read_bytes()[:-200])
    with pytest.raises(InputError, match="damaged"):
        BinMatrix(matrix_file)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 1000), n_bins=st.integers(0, 40), density=st.floats(0, 1), max_nnz=st.integers(1, 60))
def test_any_matrix_is_read_as_written(
    seed: int, n_bins: int, density: float, max_nnz: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    random = np.random.default_rng(seed)
    counts = (random_array((n_bins, 5), density=density, rng=random).toarray() * 50).astype(np.int32)
    place = random.permutation(10_000)[:n_bins]
    path = write_matrix(tmp_path_factory.mktemp("any") / "m.h5", counts, place // 100, place % 100)
    with BinMatrix(path) as matrix:
        dense = np.zeros_like(counts)
        for first, stop, chunk in matrix.chunks(max_nnz):
            dense[first:stop] = chunk.toarray()
        assert np.array_equal(matrix.array_row.astype(int) * 100 + matrix.array_col, place)
    assert np.array_equal(dense, counts)


# positions


def test_positions_and_affine(tmp_path: Path) -> None:
    frame = write_positions(tmp_path)
    grid = read_positions(tmp_path)
    assert (grid.n_rows, grid.n_cols) == (6, 9)
    row, col = frame["array_row"].to_numpy(), frame["array_col"].to_numpy()
    assert np.array_equal(grid.xy(row, col), frame[["pxl_col_in_fullres", "pxl_row_in_fullres"]])
    assert np.allclose(grid.affine, AFFINE, atol=1e-8)
    assert grid.residual_px < 1e-8
    assert grid.pitch_px == pytest.approx((np.hypot(7.3, 0.12), np.hypot(0.11, 7.298)))


def test_positions_that_are_not_quite_affine(tmp_path: Path) -> None:
    row, col = np.mgrid[:6, :9]
    bulge = 0.4 * np.sin(row + 2.0 * col).ravel()
    x = (AFFINE @ np.stack([col.ravel(), row.ravel(), np.ones(54)]))[0] + bulge
    frame = write_positions(tmp_path, pxl_col_in_fullres=x.astype(np.float32))
    grid = read_positions(tmp_path)
    lattice = np.stack([col.ravel(), row.ravel(), np.ones(54)], axis=1)
    positions = frame[["pxl_col_in_fullres", "pxl_row_in_fullres"]].to_numpy(np.float64)
    expected = np.linalg.lstsq(lattice, positions, rcond=None)[0].T
    assert np.allclose(grid.affine, expected, atol=1e-6)
    assert grid.residual_px == pytest.approx(np.abs(lattice @ expected.T - positions).max())
    assert np.array_equal(grid.xy(row.ravel(), col.ravel()), positions)


def test_bins_that_are_not_listed(tmp_path: Path) -> None:
    frame = write_positions(tmp_path)
    frame[frame.index != 4 * 9 + 2].to_parquet(tmp_path / "spatial/tissue_positions.parquet")
    grid = read_positions(tmp_path)
    row, col = np.array([4, 4, 6, -1, 0]), np.array([2, 3, 0, 0, 9])
    assert grid.lists(row, col).tolist() == [False, True, False, False, False]
    assert grid.xy(row[:1], col[:1])[0] == pytest.approx(AFFINE @ [2, 4, 1])


def test_share_of_bins_outside_the_image(tmp_path: Path) -> None:
    frame = write_positions(tmp_path)
    x, y = frame["pxl_col_in_fullres"], frame["pxl_row_in_fullres"]
    width, height = int(x.median()), 10_000
    assert read_positions(tmp_path).share_outside(width, height) == pytest.approx((x > width).mean())
    in_tissue = (x < x.quantile(0.25)).astype(np.int32)
    write_positions(tmp_path, in_tissue=in_tissue)
    assert read_positions(tmp_path).share_outside(width, height) == 0
    assert read_positions(tmp_path).share_outside(width, int(y.min())) > 0.8


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"array_row": 3}, "twice"),
        ({"array_row": -1}, "do not span an array of bins"),
        ({"array_row": 2**31 - 1}, "do not span an array of bins"),
        ({"array_row": 1.5}, "whole numbers"),
        ({"pxl_row_in_fullres": np.nan}, "position|numbers"),
        ({"pxl_row_in_fullres": np.inf}, "finite"),
        ({"pxl_row_in_fullres": "a"}, "numbers"),
        ({"array_row": np.uint64(2**64 - 1)}, "do not span an array of bins"),
    ],
)
def test_wrong_positions_are_refused(tmp_path: Path, columns: dict, message: str) -> None:
    write_positions(tmp_path, **columns)
    with pytest.raises(InputError, match=rf"tissue_positions\.parquet.*({message})"):
        read_positions(tmp_path)


def test_positions_of_other_integers_are_read(tmp_path: Path) -> None:
    frame = write_positions(tmp_path)
    expected = read_positions(tmp_path)
    write_positions(
        tmp_path, array_row=frame["array_row"].astype("uint64"), array_col=frame["array_col"].astype("int8")
    )
    assert np.array_equal(read_positions(tmp_path).positions, expected.positions)


def test_a_column_there_twice_and_a_name_that_is_no_text(tmp_path: Path) -> None:
    write_positions(tmp_path)
    path = tmp_path / "spatial/tissue_positions.parquet"
    table = pq.read_table(path)
    pq.write_table(table.append_column("array_col", table["array_col"]), path)
    with pytest.raises(InputError, match="two columns array_col"):
        read_positions(tmp_path)
    pq.write_table(table, path)
    path.write_bytes(path.read_bytes().replace(b"barcode", b"barc\xffde"))
    with pytest.raises(InputError, match="not a readable Parquet file"):
        read_positions(tmp_path)


def test_more_rows_than_bins_there_are_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_positions(tmp_path)
    monkeypatch.setattr("prts.platforms.bin_positions._MAX_GRID", 53)
    with pytest.raises(InputError, match="lists 54 bins"):
        read_positions(tmp_path)


def test_positions_that_span_no_plane(tmp_path: Path) -> None:
    write_positions(tmp_path, n_rows=1)
    with pytest.raises(InputError, match="not on one line"):
        read_positions(tmp_path)
    write_positions(tmp_path, n_rows=0)
    with pytest.raises(InputError, match="no bin"):
        read_positions(tmp_path)


def test_positions_file_that_is_none(tmp_path: Path) -> None:
    frame = write_positions(tmp_path)
    frame.drop(columns="array_col").to_parquet(tmp_path / "spatial/tissue_positions.parquet")
    with pytest.raises(InputError, match="no column array_col"):
        read_positions(tmp_path)
    (tmp_path / "spatial/tissue_positions.parquet").write_text("barcode,in_tissue\n")
    with pytest.raises(InputError, match="not a readable Parquet"):
        read_positions(tmp_path)


# scale factors, folders


def test_scalefactors(tmp_path: Path) -> None:
    write_scalefactors(tmp_path, {"bin_size_um": 2, "microns_per_pixel": 0.27, "note": "kept out"})
    assert read_scalefactors(tmp_path) == {"bin_size_um": 2.0, "microns_per_pixel": 0.27}
    write_scalefactors(tmp_path, {"microns_per_pixel": 0.3})  # as Space Ranger 4 writes them for cells
    assert read_scalefactors(tmp_path) == {"microns_per_pixel": 0.3}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not valid JSON"),
        ([1], "JSON object"),
        ({"bin_size_um": 8.0}, "bins of 8 um.*square_002um"),
        ({"bin_size_um": 2, "microns_per_pixel": "0.3"}, "microns_per_pixel is '0.3'"),
        ({"bin_size_um": 2, "microns_per_pixel": -1}, "positive"),
        ('{"bin_size_um": 2, "microns_per_pixel": NaN}', "positive"),
        ({"bin_size_um": True}, "positive"),
        ({"bin_size_um": 2, "microns_per_pixel": 10**400}, "positive"),
        ("[" * 100_000, "not valid JSON"),
        ("9" * 5000, "not valid JSON"),
    ],
)
def test_wrong_scalefactors_are_refused(tmp_path: Path, content: object, message: str) -> None:
    write_scalefactors(tmp_path, content)
    with pytest.raises(InputError, match=rf"scalefactors_json\.json.*{message}"):
        read_scalefactors(tmp_path)


@pytest.mark.parametrize("given_folder", ["", "binned_outputs"])
def test_the_folder_above_is_told_the_right_one(tmp_path: Path, given_folder: str) -> None:
    bins = tmp_path / "binned_outputs/square_002um"
    write_positions(bins)
    for read in (read_positions, read_scalefactors, matrix_path):
        with pytest.raises(InputError, match=r"binned_outputs/square_002um$"):
            read(tmp_path / given_folder)
    with pytest.raises(InputError, match="no such folder"):
        read_positions(tmp_path / "none")
    with pytest.raises(InputError, match=r"filtered_feature_bc_matrix\.h5: no such file"):
        matrix_path(bins)


@pytest.mark.real
def test_genuine_10x_files(prts_data: Path) -> None:
    bins = prts_data / "visium_hd_schema/binned_outputs/square_002um"
    assert read_scalefactors(bins)["microns_per_pixel"] == pytest.approx(0.27382429)
    grid = read_positions(bins)
    assert grid.xy(np.array([305]), np.array([1021]))[0].tolist() == pytest.approx([13608.742911, 2385.629488])
    assert [2 / px for px in grid.pitch_px] == pytest.approx([0.2738, 0.2738], rel=0.002)
    with BinMatrix(matrix_path(bins)) as matrix:
        assert (matrix.n_bins, matrix.n_genes, matrix.nnz, matrix.genome) == (10, 10, 0, "mm10")
        assert (matrix.array_row[0], matrix.array_col[0]) == (2448, 1644)
        assert grid.lists(matrix.array_row, matrix.array_col).all()
        assert [(first, stop, chunk.nnz) for first, stop, chunk in matrix.chunks()] == [(0, 10, 0)]


@pytest.mark.real
def test_a_visium_v1_matrix_is_refused(prts_data: Path) -> None:
    with pytest.raises(InputError, match="not a 2 um bin of Visium HD"):
        BinMatrix(prts_data / "visium_hd_schema/visium_v1/section1/outs/raw_feature_bc_matrix.h5")


@pytest.mark.real
def test_chunks_of_a_real_section(prts_data: Path) -> None:
    bins = prts_data / "her2st_hd/C2/binned_outputs/square_002um"
    with h5py.File(matrix_path(bins)) as h5:
        expected = int(h5["matrix/data"][:].sum())
    with BinMatrix(matrix_path(bins)) as matrix:
        assert sum(int(chunk.sum()) for _, _, chunk in matrix.chunks(300_000)) == expected
        assert matrix.var().index.is_unique


def read_dense(path: Path) -> tuple[np.ndarray, BinMatrix]:
    with BinMatrix(path) as matrix:
        return vstack([chunk for *_, chunk in matrix.chunks(7)]).toarray(), matrix


@pytest.mark.parametrize("order", ["sorted by bin", "sorted by gene"])
@pytest.mark.parametrize("compress", [False, True])
@pytest.mark.parametrize("features", ["features.tsv", "genes.tsv"])
def test_a_matrix_of_text_equals_that_of_hdf5(
    tmp_path: Path, matrix_file: Path, counts: np.ndarray, order: str, compress: bool, features: str
) -> None:
    expected, with_names = read_dense(matrix_file)
    folder = tmp_path / "filtered_feature_bc_matrix"
    folder.mkdir()
    entries = csc_matrix(counts.T).tocoo() if order == "sorted by bin" else csr_matrix(counts.T).tocoo()
    names = barcodes(with_names.array_row, with_names.array_col).astype(str)
    kinds = ["\tGene Expression"] * 5 if features == "features.tsv" else [""] * 5
    texts = {
        "barcodes.tsv": "\n".join(names) + "\n",
        features: "".join(
            f"{i.decode()}\t{n.decode()}{k}\n" for i, n, k in zip(GENES["id"], GENES["name"], kinds, strict=True)
        ),
        "matrix.mtx": "%%MatrixMarket matrix coordinate integer general\n%metadata_json: {}\n"
        + f"5 30 {entries.nnz}\n"
        + "".join(f"{r + 1} {c + 1} {v}\n" for r, c, v in zip(entries.row, entries.col, entries.data, strict=True)),
    }
    for name, text in texts.items():
        if compress and name != "barcodes.tsv":
            (folder / f"{name}.gz").write_bytes(gzip.compress(text.encode()))
        elif compress:  # unpacked by a browser, and with the quotes of R
            (folder / f"{name}.gz").write_text("".join(f'"{line}"\n' for line in text.split()))
        else:
            (folder / name).write_text(text)
    found, matrix = read_dense(folder)
    assert np.array_equal(found, expected) and np.array_equal(matrix.gene_ids, with_names.gene_ids)
    assert matrix.gene_names.tolist() == ["Actb", "Dup", "Dup", "", "Ttr"]
    matrix_file.unlink()
    assert matrix_path(tmp_path) == folder


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("matrix.mtx", "%%MatrixMarket matrix coordinate integer general\n5 3 2\n1 1 4\n", "ends after 1 of 2"),
        ("matrix.mtx", "%%MatrixMarket matrix coordinate integer general\n5 4 1\n1 1 4\n", "5 x 4 values"),
        ("matrix.mtx", "%%MatrixMarket matrix coordinate integer general\n5 3 1\n1 9 4\n", "beyond its 3 bins"),
        ("matrix.mtx", "gene,bin,count\n", "begins with"),
        ("barcodes.tsv", None, "has no barcodes.tsv.gz"),
    ],
)
def test_a_damaged_matrix_of_text_is_refused(tmp_path: Path, name: str, text: str | None, words: str) -> None:
    (tmp_path / "features.tsv").write_text("".join(f"E{i}\tG{i}\tGene Expression\n" for i in range(5)))
    (tmp_path / "barcodes.tsv").write_text("".join(f"s_002um_00000_0000{i}-1\n" for i in range(3)))
    (tmp_path / "matrix.mtx").write_text("%%MatrixMarket matrix coordinate integer general\n5 3 1\n1 1 4\n")
    assert read_dense(tmp_path)[0].sum() == 4
    if name == "matrix.mtx":  # a matrix without entries is one
        (tmp_path / name).write_text("%%MatrixMarket matrix coordinate pattern symmetric\n5 3 0\n")
        assert read_dense(tmp_path)[0].shape == (3, 5)
    (tmp_path / name).unlink()
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(InputError, match=words):
        read_dense(tmp_path)


@pytest.mark.parametrize("name", ["tissue_positions.csv", "tissue_positions_list.csv"])
def test_positions_may_be_csv_with_or_without_a_header(tmp_path: Path, name: str) -> None:
    frame = write_positions(tmp_path, in_tissue=np.arange(54) % 2)
    expected = read_positions(tmp_path)
    (tmp_path / "spatial/tissue_positions.parquet").unlink()
    frame.to_csv(tmp_path / "spatial" / name, index=False, header="list" not in name)
    found = read_positions(tmp_path)
    assert np.array_equal(found.in_tissue, expected.in_tissue)
    np.testing.assert_allclose(found.positions, expected.positions, rtol=1e-12)


@pytest.mark.parametrize(
    "how",
    [
        {"quoting": 1, "index": True},  # as R writes it
        {"sep": ";", "decimal": ",", "lineterminator": "\r\n", "encoding": "utf-8-sig"},  # as a spreadsheet does
        {"sep": ";"},
        {"sep": "\t", "header": False},
    ],
)
def test_positions_may_be_csv_of_any_program(tmp_path: Path, how: dict) -> None:
    frame = write_positions(tmp_path)
    expected = read_positions(tmp_path)
    (tmp_path / "spatial/tissue_positions.parquet").unlink()
    frame.to_csv(tmp_path / "spatial/tissue_positions.csv", **{"index": False, **how})
    np.testing.assert_allclose(read_positions(tmp_path).positions, expected.positions)


def test_positions_may_have_been_saved_again_with_other_types(tmp_path: Path) -> None:
    frame = write_positions(tmp_path, in_tissue=np.arange(54) % 2)
    expected = read_positions(tmp_path)
    other = frame.astype({"in_tissue": bool, "array_row": float, "array_col": "Int64"}).set_index("barcode")
    other.to_parquet(tmp_path / "spatial/tissue_positions.parquet")
    found = read_positions(tmp_path)
    assert np.array_equal(found.in_tissue, expected.in_tissue) and np.array_equal(found.positions, expected.positions)
    frame.assign(array_row=frame["array_row"] + 0.25).to_parquet(tmp_path / "spatial/tissue_positions.parquet")
    with pytest.raises(InputError, match="array_row must have whole numbers"):
        read_positions(tmp_path)


def test_of_a_raw_matrix_only_bins_in_tissue_are_used(tmp_path: Path) -> None:
    """Glass next to a nucleus, which the filtered matrix does not have, adds nothing to it."""
    bins = tmp_path / "square_002um"
    frame = write_positions(bins, in_tissue=(np.arange(54) % 9 < 5).astype(int))
    row, col = frame["array_row"].to_numpy(), frame["array_col"].to_numpy()
    inside = frame["in_tissue"].to_numpy() == 1
    counts = np.random.default_rng(0).poisson(2.0, (54, 5)).astype(np.int32)
    corners = (AFFINE @ np.array([[-1, -1, 1], [9, -1, 1], [9, 6, 1], [-1, 6, 1]]).T).T
    nuclei = make_nuclei([shapely.Polygon(corners)], 0.27)
    write_matrix(bins / "filtered_feature_bc_matrix.h5", counts[inside], row[inside], col[inside])
    filtered, squares = count_bins(bins, nuclei).X.toarray(), measured_squares(bins, 0.27)
    (bins / "filtered_feature_bc_matrix.h5").unlink()
    write_matrix(bins / "raw_feature_bc_matrix.h5", counts, row, col)
    assert np.array_equal(count_bins(bins, nuclei).X.toarray(), filtered)
    assert filtered.sum() == counts[inside].sum()
    assert measured_squares(bins, 0.27)["cell_id"].tolist() == squares["cell_id"].tolist()
