"""Training an encoder: tiles with their nuclei, the two stages, and the model that ships the adapter."""

from __future__ import annotations

import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import shapely
import torch

import prts
from prts.cli.app import run as cli
from prts.data.batches import Share, ShuffledBatches
from prts.data.nucleus_set import NucleusSet
from prts.data.tile_batches import ShuffledTiles, TileBatches, TiledNuclei
from prts.errors import InputError
from prts.features.encoders import Timm
from prts.features.extract import extract
from prts.features.grid import plan_grid
from prts.features.store import StoreReader
from prts.features.views import Look, random_orientation
from prts.io.nuclei import make_nuclei
from prts.models.bundle import load_bundle
from prts.models.finetune import FinetuneSettings, TunedNetwork
from prts.models.network import PRTSNet

SIDE, STRIDE = 64, 48
SETTINGS = FinetuneSettings(rank=2, alpha=4.0, blocks=2, epochs=3, lr=0.003, tiles=4)


def vit(vit_weights: Path, **settings: Any) -> Timm:
    given = {"sampling": "grid", "stride": STRIDE, "tile_px": SIDE, "mpp": 1.0, "precision": "fp32", "device": "cpu"}
    shown = {"mean": (0.7, 0.6, 0.7), "std": (0.2, 0.2, 0.2), "pair_channels": False, "pooling": "bilinear"}
    return Timm("test_vit", vit_weights, **{**given, **shown, **settings})


def train(sections: dict[str, prts.Section], cache: Path, vit_weights: Path, out: Path, **settings: Any) -> prts.Model:
    model = prts.Model(vit(vit_weights), network={"hidden": (32,)}, features=("local", "context"))
    given = {"nuclei": "watershed", "genes": 40, "max_epochs": 8, "cache_dir": cache, "trainer": {"accelerator": "cpu"}}
    model.train([sections["first"]], validation=[sections["second"]], out=out, finetune=SETTINGS, **given, **settings)
    return model


@pytest.fixture(scope="module")
def run(
    sections: dict[str, prts.Section], cache: Path, vit_weights: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    folder = tmp_path_factory.mktemp("finetune") / "run"
    train(sections, cache, vit_weights, folder)
    return folder


def test_training_lowers_the_loss_and_keeps_the_best_epoch(run: Path) -> None:
    curve = pd.read_csv(run / "finetune.csv")
    assert curve["epoch"].tolist() == [0, 1, 2, 3]
    assert curve["train/loss"].iloc[-1] < curve["train/loss"].iloc[1]
    assert curve.loc[curve["best"], "val/pcc"].tolist() == [curve["val/pcc"].max()]
    assert curve["val/pcc"].idxmax() > 0  # the adapter does something


def test_the_model_ships_the_adapter_and_predicts_with_it(
    run: Path, sections: dict[str, prts.Section], cache: Path, tmp_path: Path
) -> None:
    moved = tmp_path / "model"
    shutil.copytree(run / "model", moved)  # as if it came from elsewhere
    bundle = load_bundle(moved)
    assert bundle.metadata["format_version"] == 4 and bundle.adapter == moved / "adapter.safetensors"
    assert [file.name for file in bundle.files] == ["model.json", "model.safetensors", "adapter.safetensors"]
    model = prts.Model.load(moved)
    model.predict(sections["second"], nuclei="watershed", cache_dir=tmp_path / "cache")
    # training read the same nuclei with the same encoder: once as it was, once trained
    (mine,) = (StoreReader(file) for file in (tmp_path / "cache").rglob("features-*.h5"))
    stored = [StoreReader(file) for file in cache.rglob("second/features-timm-*.h5")]
    ids = mine.known.intersection(stored[0].known).to_numpy()  # those that pass quality control
    apart = [np.abs(mine.read(ids, ["local"]) - other.read(ids, ["local"])).max() for other in stored]
    assert sorted(apart)[0] < 1e-4 < 0.01 < sorted(apart)[1]


def test_a_bundle_without_its_adapter_is_one_line(run: Path, tmp_path: Path) -> None:
    prts.Model.load(run / "model").save(tmp_path / "saved")
    adapter = tmp_path / "saved/adapter.safetensors"
    content = adapter.read_bytes()
    adapter.write_bytes(content[:-4] + b"else")
    with pytest.raises(InputError, match=r"adapter\.safetensors: its SHA-256 differs"):
        load_bundle(tmp_path / "saved")
    adapter.unlink()
    with pytest.raises(InputError, match=r"adapter\.safetensors: no such file; this model has trained its encoder"):
        load_bundle(tmp_path / "saved")


def test_another_seed_reuses_the_adapter(
    run: Path, sections: dict[str, prts.Section], cache: Path, vit_weights: Path, tmp_path: Path
) -> None:
    before = {file: file.stat().st_mtime_ns for file in cache.rglob("adapter-*")}
    train(sections, cache, vit_weights, tmp_path / "run", seed=7)
    assert {file: file.stat().st_mtime_ns for file in cache.rglob("adapter-*")} == before != {}
    assert (tmp_path / "run/finetune.csv").read_bytes() == (run / "finetune.csv").read_bytes()
    assert (tmp_path / "run/model/adapter.safetensors").read_bytes() == (run / "model/adapter.safetensors").read_bytes()


@pytest.fixture
def tiled(sections: dict[str, prts.Section], vit_weights: Path) -> TiledNuclei:
    """Squares all over a section, with their number as feature, as count and as exposure."""
    section, rng = sections["first"], np.random.default_rng(0)
    at = rng.uniform(20, [section.width - 20, section.height - 20], (150, 2))
    nuclei = make_nuclei([shapely.box(x - 6, y - 4, x + 6, y + 4) for x, y in at], section.mpp, source="drawn")
    number = np.arange(len(at))
    known = NucleusSet(
        section="first",
        cell_id=nuclei["cell_id"].to_numpy(),
        xy_um=at * section.mpp,
        features=number[:, None].astype(np.float32),
        counts=sp.csr_matrix(number[:, None]),
        total_counts=number,
        area_um2=np.ones(len(at)),
        exposure=number.astype(np.float32),
    )
    plan = plan_grid(nuclei, section.mpp, 1.0, SIDE, STRIDE)
    return TiledNuclei(section, known, plan, np.unique(plan.tile))


def test_a_tile_has_its_pixels_and_its_nuclei(tiled: TiledNuclei) -> None:
    batches = TileBatches([tiled, tiled.thinned(3)], 1.0, None)
    with tiled.section.open_slide() as slide:
        whole = slide.read_region(-SIDE, -SIDE, *(np.array(slide.size_at(1.0)) + 2 * SIDE), 1.0)
    seen_numbers = []
    for number in range(len(batches)):
        seen, counts, exposure = batches[None, np.array([number, 0])]
        x, y = tiled.plan.origin[(*tiled.used, *tiled.used[::3])[number]]
        np.testing.assert_array_equal(seen.tiles[0], whole[y + SIDE : y + 2 * SIDE, x + SIDE : x + 2 * SIDE])
        mine = seen.tile == 0
        rows = seen.features[mine, 0].numpy().astype(int)
        np.testing.assert_array_equal(counts[mine, 0], rows)
        np.testing.assert_array_equal(exposure[mine, 0], rows)
        centers = shapely.get_coordinates(shapely.centroid(seen.polygons[mine]))
        np.testing.assert_allclose(centers, tiled.nuclei.xy_um[rows] - [x, y], atol=1e-6)
        # nearest of the lattice: no nucleus is farther from the middle than half a stride
        assert np.abs(centers - SIDE / 2).max() <= STRIDE / 2 + 0.5
        seen_numbers += rows.tolist() if number < len(tiled.used) else []
    assert sorted(seen_numbers) == list(range(150))
    batches.close()


def test_turned_nuclei_lie_where_their_pixels_went(tiled: TiledNuclei, monkeypatch: pytest.MonkeyPatch) -> None:
    unchanged = Look((1.0, 1.0, 1.0), 0.0, 1.0, 0.0)
    monkeypatch.setattr(Look, "random", classmethod(lambda cls, rng: unchanged))
    plain, turned = TileBatches([tiled], 1.0, None), TileBatches([tiled], 1.0, 3)
    turns = set()
    for epoch in range(6):
        for number in range(0, len(plain), 5):
            before, after = plain[None, np.array([number])].features, turned[epoch, np.array([number])].features
            turn = random_orientation(np.random.default_rng((3, epoch, number)))
            turns.add(turn)
            pixels = np.rot90(before.tiles[0].numpy(), turn.rotate // 90)
            pixels = np.fliplr(pixels) if turn.flip == "horizontal" else pixels
            assert np.abs(after.tiles[0].numpy().astype(int) - pixels).max() <= 1  # rounded once more
            # a raster of each nucleus, turned as an image is
            for old, new in zip(before.polygons, after.polygons, strict=True):
                mask = np.rot90(raster(old), turn.rotate // 90)
                np.testing.assert_array_equal(raster(new), np.fliplr(mask) if turn.flip == "horizontal" else mask)
    assert len(turns) == 8
    first, again, *others = (turned[epoch, np.array([0])].features.tiles for epoch in (0, 0, 1, 2, 3))
    assert torch.equal(first, again) and not all(torch.equal(first, other) for other in others)


def raster(polygon: shapely.Polygon) -> np.ndarray:
    """Pixels of a tile whose middle is in a polygon."""
    xx, yy = np.meshgrid(np.arange(SIDE) + 0.5, np.arange(SIDE) + 0.5)
    return shapely.contains_xy(polygon, xx, yy)


def test_processes_share_the_tiles_of_a_batch(tiled: TiledNuclei) -> None:
    alone = list(ShuffledTiles(ShuffledBatches(10, 4, seed=1)))
    parts = [list(ShuffledTiles(ShuffledBatches(10, 4, 1, 0, Share(rank, 2)))) for rank in (0, 1)]
    for (epoch, whole), *both in zip(alone, *parts, strict=True):
        assert epoch == 0 and sorted(whole) == sorted(np.concatenate([numbers for _, numbers in both]))
    none = TileBatches([tiled], 1.0, None)[None, np.empty(0, np.int64)]
    assert len(none.features) == len(none.counts) == 0


@pytest.mark.parametrize("sampling", ["grid", "exact"])
def test_the_trained_network_reads_the_features_of_extraction(
    tiled: TiledNuclei, vit_weights: Path, tmp_path: Path, sampling: str
) -> None:
    encoder = vit(vit_weights, sampling=sampling, pooling="nucleus")
    nuclei = make_nuclei(
        [shapely.box(x - 6, y - 4, x + 6, y + 4) for x, y in tiled.nuclei.xy_um[:20] / tiled.section.mpp],
        tiled.section.mpp,
        source="drawn",
    )
    with tiled.section.open_slide() as slide:
        extract(slide, nuclei, encoder, tmp_path / "f.h5")
    ids = nuclei["cell_id"].to_numpy()
    expected = StoreReader(tmp_path / "f.h5").read(ids, ["local", "global"])
    widths = {"local": encoder.local_width, "global": encoder.global_width}
    plan = encoder.plan(nuclei, tiled.section.mpp)
    stored = np.full((len(ids), sum(widths.values())), 7.0, np.float32)
    part = TiledNuclei(
        tiled.section, replace(tiled.nuclei.take(np.arange(20)), features=stored), plan, np.unique(plan.tile)
    )
    batch = TileBatches([part], 1.0, None)[None, np.arange(len(part.used))]
    head = PRTSNet(sum(widths.values()), 2, hidden=(), outputs=("level",))
    read = {}
    head.forward = lambda x: read.setdefault("input", x)  # type: ignore[method-assign]
    TunedNetwork(encoder, encoder.network(), head, widths)(batch.features)
    back = np.argsort(plan.order)
    found = read["input"].detach().numpy()[back]
    local = slice(0, widths["local"])
    np.testing.assert_allclose(found[:, local], expected[:, local], atol=1e-4)
    beyond = slice(widths["local"], None)
    np.testing.assert_allclose(found[:, beyond], 7.0 if sampling == "grid" else expected[:, beyond], atol=1e-4)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["encoder=classical"], "finetune: the encoder classical has no weights to train"),
        (["experiment=context", "finetune=lora"], "finetune: the encoder none|data.use: "),
        (["encoder.scales=[0.5,1]"], "encoder.scales: cannot be trained; give one um/px"),
        (["encoder.adapter=a.safetensors"], "encoder.adapter: cannot be trained further"),
        (["data.permute=true"], "data.permute: shuffles features"),
        (["data.use=[global]", "encoder.sampling=grid"], "data.use: has only global"),
        (["model=ridge"], "finetune: needs a network to train the encoder with, not ridge"),
        (["finetune.rank=0"], "finetune.rank: 0 is not accepted"),
        (["finetune.rang=4"], "finetune.rang: no such key, did you mean 'finetune.rank'"),
        (["finetune=lorra"], "finetune=lorra"),
    ],
)
def test_what_cannot_be_trained_is_one_line_and_exit_2(
    given: list[str], said: str, vit_weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    encoder = [] if "encoder=classical" in given else ["encoder=timm", f"encoder.weights={vit_weights}"]
    folder = f"hydra.run.dir={tmp_path / 'run'}"
    assert cli("train", ["experiment=finetune", *encoder, f"paths.cache_dir={tmp_path / 'c'}", folder, *given]) == 2
    error = capsys.readouterr().err
    assert re.match(f"prts: ({said})", error) and error.count("\n") == 1, error
    assert not (tmp_path / "c").exists()
