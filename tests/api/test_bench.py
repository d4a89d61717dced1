"""Ranking of encoders on one section."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import timm
from geopandas import GeoDataFrame
from safetensors.torch import save_file

import prts
from prts.api import bench
from prts.api.bench import BenchSettings, bench_encoders
from prts.cli.app import run
from prts.errors import InputError
from prts.features.encoders import Classical, Timm
from prts.features.extract import extract
from prts.features.store import read_features
from prts.io.nuclei import load_nuclei
from prts.segmentation.watershed import Watershed


def test_what_tells_the_counts_beats_noise(
    sections: dict[str, prts.Section], cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    section = sections["first"]
    truth = {}

    def read(encoder: Classical, section: prts.Section, units: GeoDataFrame) -> bench._Read:
        rng = np.random.default_rng(encoder.tile_px)
        if not truth:
            counts = bench.measured_counts(section, units, species="human")
            truth["counts"] = np.log1p(counts[units["cell_id"]].X.toarray())
        noise = rng.normal(size=(len(units), 5))
        informed = truth["counts"] @ rng.normal(size=(truth["counts"].shape[1], 60))
        np.save(tmp_path / "read.npy", (noise if encoder.tile_px == 128 else informed).astype(np.float32))
        return bench._Read(tmp_path / "read.npy", 0.5, 300.0)

    monkeypatch.setattr(bench, "_in_own_process", read)
    monkeypatch.setattr(bench, "_FEWEST", 10)
    encoders = {"noise": Classical(tile_px=128), "informed": Classical(tile_px=256)}
    settings = BenchSettings(units=250, genes=40)
    table = bench_encoders(encoders, section, Watershed(), settings=settings, cache_dir=cache)

    assert table["encoder"].tolist() == ["informed", "noise"]
    informed, noise = table.itertuples(index=False)
    assert informed.pcc > 0.3 > 0.15 > abs(noise.pcc)
    assert informed.low < informed.pcc < informed.high and noise.low < noise.pcc < noise.high
    assert (informed.width, noise.width) == (60, 5)
    assert informed.cpu_seconds == pytest.approx(0.5 / 250 * 1000) and informed.peak_mb == 300


def test_an_encoder_in_its_own_process_reads_the_same(
    sections: dict[str, prts.Section], cache: Path, tmp_path: Path
) -> None:
    section = sections["second"]
    save_file(timm.create_model("test_vit", num_classes=0).state_dict(), tmp_path / "vit.safetensors")
    encoder = Timm("test_vit", tmp_path / "vit.safetensors", tile_px=64, precision="fp32", device="cpu")
    encoder.settings()
    units = load_nuclei(section.image.parent / "truth_nuclei.parquet").head(20)
    read = bench._in_own_process(encoder, section, units)
    with section.open_slide() as slide:
        extract(slide, units, encoder, tmp_path / "here.h5")
    np.testing.assert_allclose(
        np.load(read.features), read_features(tmp_path / "here.h5", units["cell_id"].to_numpy()), rtol=1e-4, atol=1e-5
    )
    assert 0 < read.cpu_seconds < 60 and 100 < read.peak_mb < 4000
    read.features.unlink()


def test_the_command_writes_the_table(
    sections: dict[str, prts.Section], cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench, "_FEWEST", 10)
    given = [f"section={sections['first'].image.parent}", f"paths.cache_dir={cache}", "segmentation=watershed"]
    assert run("bench", [*given, "encoders=[classical]", "n=100", "genes=30", f"out={tmp_path / 'table.csv'}"]) == 0
    table = pd.read_csv(tmp_path / "table.csv")
    assert table["encoder"].tolist() == ["classical"] and table["width"].tolist() == [576]
    assert (table["cpu_seconds"] > 0).all() and np.isfinite(table["pcc"]).all()


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (["encoders=[clasical]"], "prts: encoders: 'clasical' is not an encoder, did you mean 'classical'?"),
        (["encoders=[classical]", "weights={vit256: w.pth}"], "prts: weights: vit256 is not among the encoders"),
        (["encoders=[]"], "prts: encoders"),
        (["encoders=[vit256]"], "prts: encoder.weights: not given; download HIPT's"),
    ],
)
def test_what_is_wrong_is_one_line_and_exit_2(
    arguments: list[str],
    why: str,
    sections: dict[str, prts.Section],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    given = [f"section={sections['first'].image.parent}", f"paths.cache_dir={tmp_path}"]
    assert run("bench", [*given, *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith(why) and error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_too_few_units_are_refused(sections: dict[str, prts.Section], cache: Path) -> None:
    with pytest.raises(InputError, match=r"^section first: \d+ units for training and \d+ for validation are too few"):
        bench_encoders(
            {"classical": Classical()},
            sections["first"],
            Watershed(),
            settings=BenchSettings(units=60),
            cache_dir=cache,
        )
