"""How much work each stage does, counted: what a slow machine cannot hide and a fast one cannot excuse."""

from __future__ import annotations

from collections import Counter
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import h5py
import numpy as np
import pytest
import scipy.sparse as sp
import shapely
import tifffile
import torch

from prts.data.datamodule import NucleusBatches, PRTSDataModule
from prts.data.sets import NucleusSet
from prts.data.targets import make_scaler
from prts.features.extract import extract
from prts.io.nuclei import load_nuclei, make_nuclei
from prts.io.slide import Slide, open_slide
from prts.models.losses import PaperLoss
from prts.models.mlp import PRTSNet
from prts.models.module import PRTSModule
from prts.models.output import OutputRule
from prts.models.predictor import Predictor
from prts.preprocess import counts
from prts.simulate.section import BINS, simulate_section


def test_counting_passes_over_the_matrix_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    section = simulate_section(tmp_path / "section", cells=100, genes=50, seed=0)
    with h5py.File(section / BINS / "filtered_feature_bc_matrix.h5") as file:
        entries = len(file["matrix/data"])
    read, seen = h5py.Dataset.__getitem__, Counter()

    def counting(dataset: h5py.Dataset, *arguments: object, **options: object) -> np.ndarray:
        values = read(dataset, *arguments, **options)
        seen[dataset.name] += len(values)
        return values

    monkeypatch.setattr(h5py.Dataset, "__getitem__", counting)
    monkeypatch.setattr(counts, "_MAX_NNZ", entries // 7)

    counts.count_nuclei(section / BINS, load_nuclei(section / "truth_nuclei.parquet"), species="human")

    assert seen["/matrix/data"] == seen["/matrix/indices"] == entries
    assert seen["/matrix/indptr"] == seen["/matrix/barcodes"] + 1


def test_extraction_reads_a_pixel_once_and_calls_the_encoder_once_a_batch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    width, height, n = 1500, 1200, 100
    tifffile.imwrite(tmp_path / "slide.tif", np.full((height, width, 3), 200, np.uint8), tile=(256, 256))
    xy = np.random.default_rng(0).uniform(0, (width, height), (n, 2))
    nuclei = make_nuclei(shapely.buffer(shapely.points(xy), 6.0), 0.5)
    read, pixels, batches = Slide.read_region, np.zeros((4096, 4096), int), []

    def counting(
        slide: Slide, x: int, y: int, width: int, height: int, mpp: float | None = None, **more: int
    ) -> np.ndarray:
        pixels[y + 1024 : y + height + 1024, x + 1024 : x + width + 1024] += 1
        return read(slide, x, y, width, height, mpp, **more)

    def encode(tiles: np.ndarray, polygons: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        batches.append(len(tiles))
        return np.zeros((len(tiles), 2), np.float32), np.zeros((len(tiles), 1), np.float32)

    settings = {
        "name": "fake",
        "mpp": 0.5,
        "tile_px": 256,
        "pooling": "nucleus",
        "batch_size": 16,
        "weights_sha256": None,
    }
    encoder = SimpleNamespace(
        **settings, global_width=2, local_width=1, settings=dict, load=lambda: None, encode=encode
    )
    monkeypatch.setattr(Slide, "read_region", counting)
    with open_slide(tmp_path / "slide.tif", mpp=0.5) as slide:
        extract(slide, nuclei, encoder, tmp_path / "features.h5")

    assert pixels.max() == 1
    assert batches == [16] * 6 + [4]


def _nuclei(n: int, genes: int) -> NucleusSet:
    rng = np.random.default_rng(n)
    return NucleusSet(
        section=str(n),
        cell_id=np.arange(n).astype(str).astype(object),
        xy_um=np.zeros((n, 2)),
        features=rng.standard_normal((n, 8), dtype=np.float32),
        counts=sp.csr_matrix(rng.poisson(0.3, (n, genes)).astype(np.int32)),
        total_counts=np.full(n, 10),
        area_um2=np.full(n, 50.0),
    )


def test_an_epoch_gathers_and_passes_each_batch_once(monkeypatch: pytest.MonkeyPatch) -> None:
    import pytorch_lightning as pl  # not before prts, which mends a torchvision that does not match torch

    data = PRTSDataModule(lambda: None, lambda *_: {}, batch_size=64)
    data.train_sets, data.val_sets = [_nuclei(300, 5)], [_nuclei(100, 5)]
    gather, gathered, passed = NucleusBatches.__getitem__, [], []

    def counting(batches: NucleusBatches, indices: np.ndarray) -> object:
        gathered.append(len(indices))
        return gather(batches, indices)

    monkeypatch.setattr(NucleusBatches, "__getitem__", counting)
    net = PRTSNet(8, 5, hidden=(4,))
    net.register_forward_hook(lambda _net, given, _made: passed.append(len(given[0])))
    module = PRTSModule(net, PaperLoss(), make_scaler("counts", 5), partial(torch.optim.AdamW, lr=0.01))
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    trainer = pl.Trainer(max_epochs=1, accelerator="cpu", num_sanity_val_steps=0, log_every_n_steps=1, **quiet)

    trainer.fit(module, data.train_dataloader(), data.val_dataloader())

    assert gathered == passed == [64, 64, 64, 64, 44, 64, 36]  # training, then validation


def test_a_prediction_passes_each_nucleus_once() -> None:
    net, passed = PRTSNet(8, 5, hidden=(4,)), []
    net.register_forward_hook(lambda _net, given, _made: passed.append(len(given[0])))
    predictor = Predictor(net, make_scaler("counts", 5), OutputRule("none", 0.5))

    chunks = list(predictor.predict_chunks(np.zeros((1000, 8), np.float32), chunk=400))

    assert passed == [len(umi) for umi, _ in chunks] == [400, 400, 200]
