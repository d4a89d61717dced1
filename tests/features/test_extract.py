from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import h5py
import numpy as np
import pytest
import shapely
import torch

from prts.errors import InputError
from prts.features import extract as extract_module
from prts.features.encoders import Encoder
from prts.features.extract import extract
from prts.features.store import Rows, read_features, read_store_attrs, write_store


class MeanEncoder(Encoder):
    """Global: mean color and center pixel of the tile; local: area and centroid of the polygon. Fails when told to."""

    name, batch_size = "mean", 16
    global_width, local_width = 6, 3

    def __init__(self, fail_at: int | None = None, version: int = 1) -> None:
        self.fail_at, self.version, self.encoded = fail_at, version, 0

    def settings(self):
        return {**super().settings(), "version": self.version}

    def encode(self, tiles, polygons):
        if self.fail_at is not None and self.encoded + len(tiles) > self.fail_at:
            raise RuntimeError("killed")
        self.encoded += len(tiles)
        pooled = np.concatenate([tiles[:, ::16, ::16].mean(axis=(1, 2)), tiles[:, 128, 128]], axis=1).astype(np.float32)
        local = np.column_stack([shapely.area(polygons), shapely.get_coordinates(shapely.centroid(polygons))])
        return pooled, (self.version * local).astype(np.float32)


@pytest.fixture
def case(fake_slide, nuclei_at, monkeypatch):
    monkeypatch.setattr(extract_module, "CHUNK", 64)
    slide = fake_slide()
    xy = np.random.default_rng(0).uniform(0, [slide.width, slide.height], (300, 2))
    return slide, nuclei_at(xy, np.linspace(5, 20, 300))


def test_each_nucleus_gets_its_own_features(case, tmp_path):
    slide, nuclei = case
    out = tmp_path / "features-mean.h5"
    extract(slide, nuclei, MeanEncoder(), out, provenance={"image": "fake", "sections": ["a"]})
    xy = shapely.get_coordinates(shapely.centroid(nuclei.geometry.array))
    centre = np.floor(xy * 0.5 + 0.5).astype(int)
    asked = np.random.default_rng(1).permutation(300)[:120]
    features = read_features(out, nuclei["cell_id"].to_numpy()[asked], use=("local", "global"))
    assert features.shape == (120, 9) and features.dtype == np.float32
    np.testing.assert_allclose(features[:, 0], nuclei.area.to_numpy()[asked] / 4, rtol=1e-5)
    inside = (centre < slide.rescaled.shape[1::-1]).all(axis=1)[asked]
    here = centre[asked[inside]]
    np.testing.assert_array_equal(features[inside, 6:], slide.rescaled[here[:, 1], here[:, 0]])
    np.testing.assert_array_equal(
        read_features(out, nuclei["cell_id"].to_numpy()[asked], use=("global",)), features[:, 3:]
    )
    attrs = read_store_attrs(out)
    assert attrs["provenance"] == {"image": "fake", "sections": ["a"]}
    assert (attrs["encoder"], attrs["mpp"], attrs["tile"], attrs["pooling"], attrs["precision"]) == (
        "mean",
        0.5,
        256,
        "nucleus",
        "fp32",
    )
    with h5py.File(out) as store:
        order = store["cell_id"].asstr()[:]
        np.testing.assert_allclose(store["spatial"][:], xy[[int(name[1:]) for name in order]])
    assert list(tmp_path.glob("features*")) == [out]


@pytest.mark.parametrize("fail_at", [1, 64, 200, 299])
def test_an_interrupted_run_ends_with_the_same_bytes(case, tmp_path, fail_at):
    slide, nuclei = case
    whole, resumed = tmp_path / "a" / "features.h5", tmp_path / "b" / "features.h5"
    extract(slide, nuclei, MeanEncoder(), whole)
    with pytest.raises(RuntimeError, match="killed"):
        extract(slide, nuclei, MeanEncoder(fail_at), resumed)
    assert not resumed.exists()
    second = MeanEncoder()
    extract(slide, nuclei, second, resumed)
    assert resumed.read_bytes() == whole.read_bytes()
    assert second.encoded == 300 - fail_at // 64 * 64  # what was done in whole chunks is not done again


class SmallDevice(MeanEncoder):
    """Has memory for five tiles, or for none."""

    holds = 5

    def encode(self, tiles, polygons):
        if len(tiles) > self.holds:
            raise torch.OutOfMemoryError(f"CUDA out of memory. Tried to hold {len(tiles)} tiles. Sorry")
        return super().encode(tiles, polygons)


def test_a_batch_that_does_not_fit_is_halved(case, tmp_path, caplog):
    slide, nuclei = case
    extract(slide, nuclei, MeanEncoder(), tmp_path / "whole.h5")
    encoder = SmallDevice()
    extract(slide, nuclei, encoder, tmp_path / "halves.h5")
    assert (tmp_path / "halves.h5").read_bytes() == (tmp_path / "whole.h5").read_bytes()
    assert encoder.encoded == 300
    lines = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert [line.partition(" (")[0] for line in lines] == [
        "out of memory with 16 tiles at a time",
        "out of memory with 8 tiles at a time",
    ]
    assert "goes on with 4, set `encoder.batch_size` to that" in lines[-1]


def test_a_device_without_memory_for_one_tile_is_an_error(case, tmp_path):
    slide, nuclei = case
    encoder = SmallDevice()
    encoder.holds = 0
    with pytest.raises(torch.OutOfMemoryError, match="hold 1 tiles"):
        extract(slide, nuclei, encoder, tmp_path / "f.h5")
    assert not (tmp_path / "f.h5").exists()


@pytest.mark.parametrize("change", ["encoder", "polygon", "image", "truncated"])
def test_parts_of_something_else_are_not_mixed_in(case, tmp_path, change):
    slide, nuclei = case
    out, clean = tmp_path / "features.h5", tmp_path / "clean.h5"
    with pytest.raises(RuntimeError, match="killed"):
        extract(slide, nuclei, MeanEncoder(fail_at=250), out)
    encoder, n_redone = MeanEncoder(), 300
    if change == "encoder":
        encoder = MeanEncoder(version=2)
    elif change == "polygon":
        nuclei = nuclei.copy()
        nuclei.loc[0, "geometry"] = nuclei.geometry[0].buffer(1.0)
    elif change == "image":
        slide.rescaled = slide.rescaled[:, ::-1].copy()
        slide.path.write_bytes(b"another slide")
    else:
        part = sorted(out.with_name("features.h5.parts").glob("*.npy"))[1]
        part.write_bytes(part.read_bytes()[:200])
        n_redone = 300 - 2 * 64
    extract(slide, nuclei, encoder, out)
    assert encoder.encoded == n_redone
    extract(slide, nuclei, MeanEncoder(version=encoder.version), clean)
    np.testing.assert_array_equal(read_features(out), read_features(clean))


_KILLED = """
    import os, signal, sys
    from pathlib import Path
    sys.path.insert(0, sys.argv[1])
    import numpy as np
    import conftest, test_extract
    from prts.features import extract as module

    module.CHUNK = 64
    folder, kill_at = Path(sys.argv[2]), int(sys.argv[3])
    (folder / "slide.tif").touch()
    os.utime(folder / "slide.tif", (0, 0))
    slide = conftest.FakeSlide(folder / "slide.tif", np.random.default_rng(0).integers(0, 256, (900, 900, 3), dtype=np.uint8))
    nuclei = conftest.make_nuclei(np.random.default_rng(0).uniform(0, 1800, (250, 2)))

    class Killed(test_extract.MeanEncoder):
        def encode(self, tiles, polygons):
            if self.encoded >= kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
            return super().encode(tiles, polygons)

    module.extract(slide, nuclei, Killed(), folder / "features.h5")
"""


@pytest.mark.slow
def test_kill_9_loses_at_most_a_chunk(tmp_path):
    here = Path(__file__).parent

    def run(folder: Path, kill_at: int) -> int:
        folder.mkdir(exist_ok=True)
        command = [sys.executable, "-c", textwrap.dedent(_KILLED), str(here), str(folder), str(kill_at)]
        return subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False).returncode

    assert run(tmp_path / "whole", 1000) == 0
    assert run(tmp_path / "cut", 80) == -signal.SIGKILL
    assert len(list((tmp_path / "cut" / "features.h5.parts").glob("*.npy"))) == 1
    assert run(tmp_path / "cut", 100) == -signal.SIGKILL
    assert len(list((tmp_path / "cut" / "features.h5.parts").glob("*.npy"))) == 2
    assert run(tmp_path / "cut", 1000) == 0
    assert (tmp_path / "cut" / "features.h5").read_bytes() == (tmp_path / "whole" / "features.h5").read_bytes()


@pytest.mark.parametrize("batch_size", [16, 64])
def test_work_pixels_are_read_once_and_tiles_encoded_in_full_batches(fake_slide, nuclei_at, tmp_path, batch_size):
    """A separate tile for each of 600 nuclei would be 65,536 px per nucleus; read once, it is the area of the slide and a margin."""
    slide = fake_slide(height=1000, width=1000)
    nuclei = nuclei_at(np.random.default_rng(5).uniform(0, 2000, (600, 2)))
    calls = []

    class Counting(MeanEncoder):
        def encode(self, tiles, polygons):
            calls.append(len(tiles))
            return super().encode(tiles, polygons)

    encoder = Counting()
    encoder.batch_size = batch_size
    extract(slide, nuclei, encoder, tmp_path / "f.h5")
    assert slide.reads.max() == 1
    asked = sum(width * height for *_, width, height in slide.requests)
    assert asked / 600 < 65_536 / 15  # (1000 + 256) x (3 or 4 stripes of 512)
    assert len(slide.requests) == len(set(slide.requests))
    # chunks are whole batches, but for the last
    assert sum(calls) == 600 and len(calls) == -(-600 // batch_size)


def test_an_error_of_the_reader_thread_arrives(case, tmp_path):
    slide, nuclei = case
    slide.read_region = lambda *args, **kwargs: (_ for _ in ()).throw(InputError("slide.tif: is damaged"))
    with pytest.raises(InputError, match="is damaged"):
        extract(slide, nuclei, MeanEncoder(), tmp_path / "features.h5")


def test_no_nuclei_and_stray_nuclei_are_refused(case, nuclei_at, tmp_path):
    slide, _ = case
    with pytest.raises(InputError, match="no nuclei"):
        extract(slide, nuclei_at(np.empty((0, 2))), MeanEncoder(), tmp_path / "features.h5")
    ring = nuclei_at(np.array([[800.0, 800.0]]))
    ring["geometry"] = [shapely.Point(800, 800).buffer(600).difference(shapely.Point(800, 800).buffer(500))]
    with pytest.raises(InputError, match="'n0' does not reach"):
        extract(slide, ring, MeanEncoder(), tmp_path / "features.h5")
    assert not list(tmp_path.glob("features*"))


def test_the_rate_is_logged(case, tmp_path, caplog):
    with caplog.at_level(logging.INFO, logger="prts.features.extract"):
        extract(*case, MeanEncoder(), tmp_path / "features.h5")
    assert "300 nuclei in" in caplog.text and "nuclei/s" in caplog.text


def _store(path, n=10):
    rows = Rows(np.arange(2.0 * n, dtype=np.float32).reshape(n, 2), np.arange(n, dtype=np.float32)[:, None])
    write_store(
        path, [f"c{k}" for k in range(n)], np.zeros((n, 2)), (2, 1), [rows], {"encoder": "x", "weights_sha256": None}
    )
    return path


def test_rows_come_in_the_asked_order(tmp_path, monkeypatch):
    monkeypatch.setattr("prts.features.store._ROWS_PER_READ", 3)
    path = _store(tmp_path / "s.h5")
    np.testing.assert_array_equal(
        read_features(path, ["c9", "c0", "c4", "c0"]),
        np.array([[9, 18, 19], [0, 0, 1], [4, 8, 9], [0, 0, 1]], np.float32),
    )
    np.testing.assert_array_equal(read_features(path, use=("global",))[:2], [[0, 1], [2, 3]])
    assert read_features(path, []).shape == (0, 3)
    assert "weights_sha256" not in read_store_attrs(path)


def test_wrong_stores_are_refused_in_one_line(tmp_path):
    path = _store(tmp_path / "s.h5", n=4000)
    with pytest.raises(InputError, match=r"no features of 1 of 2 nuclei \(cell_id 'nobody'"):
        read_features(path, ["c1", "nobody"])
    text = tmp_path / "text.h5"
    text.write_text("not HDF5")
    truncated = tmp_path / "truncated.h5"
    truncated.write_bytes(path.read_bytes()[:-30_000])
    other = tmp_path / "other.h5"
    with h5py.File(other, "w") as file:
        file["matrix"] = 1
    for wrong, why in (
        (text, "HDF5"),
        (truncated, "HDF5"),
        (other, "no /cell_id"),
        (tmp_path / "gone.h5", "no such file"),
    ):
        with pytest.raises(InputError, match=why) as caught:
            read_features(wrong)
        assert "\n" not in str(caught.value) and wrong.name in str(caught.value)


@pytest.mark.parametrize(
    ("name", "values", "why"),
    [
        ("global", np.zeros((9, 2), np.float32), "not a feature store: 10 cell_id"),
        ("global", np.zeros(10, np.float32), "not a feature store"),
        ("local", np.full((10, 1), "a", object), "not a feature store"),
        ("cell_id", np.full(10, "twice", object), "must be unique"),
        ("cell_id", np.arange(10), "damaged"),
        ("cell_id", h5py.SoftLink("/spatial"), "is a link"),
    ],
)
def test_stores_that_contradict_themselves_are_refused(tmp_path, name, values, why):
    path = _store(tmp_path / "s.h5")
    with h5py.File(path, "r+") as file:
        del file[name]
        file[name] = values
    with pytest.raises(InputError, match=why):
        read_features(path)


def test_attributes_that_are_no_json_are_refused(tmp_path):
    path = _store(tmp_path / "s.h5")
    with h5py.File(path, "r+") as file:
        file.attrs["encoder"] = "{"
    with pytest.raises(InputError, match=r"s\.h5: is damaged"):
        read_store_attrs(path)
