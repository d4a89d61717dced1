"""From features to a prediction file, through the code of `prts predict`."""

from __future__ import annotations

import statistics
import time
from pathlib import Path
from typing import Any

from benchmarks.harness import QUICK_SIZES, SIZES, Part, child, growth

NEEDS_DATA = False
GENES = 1_820


def run(quick: bool) -> Part:
    part = Part()
    sizes, genes = (QUICK_SIZES, 30) if quick else (SIZES, GENES)
    largest = sizes[-1]
    runs: dict[int, list[Any]] = {n: [] for n in sizes}
    slow: list[Any] = []
    for _ in range(1 if quick else 3):
        for n in sizes:
            runs[n].append(child(predict, n=n, genes=genes))
        slow.append(child(straightforward_predict, n=largest, genes=genes))
    ours = {n: statistics.median(run.result["seconds"] for run in these) for n, these in runs.items()}
    peak, slow_peak = (max(run.peak_gb for run in these) for these in (runs[largest], slow))
    part.figures = {"predict/seconds_60k": ours[largest], "predict/peak_gb": peak}
    part.row(
        f"features to `.h5ad`, {largest:,} x {genes:,} ({runs[largest][0].result['gb']:.2f} GB of file)",
        f"{ours[largest]:.1f} s, {peak:.1f} GB",
        f"{statistics.median(run.result for run in slow):.1f} s, {slow_peak:.1f} GB",
        f"{child(forward, n=largest, genes=genes).result:.1f} s: the network alone, on features in memory",
        ["predict/seconds_60k", "predict/peak_gb"],
    )
    part.row("growth with nuclei (features to `.h5ad`)", growth(ours))
    return part


def predict(n: int, genes: int) -> dict[str, float]:
    """Seconds and size of the file for n nuclei: store and polygons are there, as `prts predict` has them after extraction."""
    import tempfile

    from prts.io.nuclei import load_nuclei
    from prts.models.bundle import load_bundle
    from prts.models.predict import predict_store, write_prediction

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        child(make, folder=name, n=n, genes=genes)  # elsewhere: what it needs is no memory of prediction
        section = _section(folder)
        start = time.perf_counter()
        bundle = load_bundle(folder / "model")
        nuclei = load_nuclei(folder / "nuclei.parquet")
        chunks = predict_store(bundle, folder / "features.h5", nuclei, section.mpp)
        out = folder / "prediction.h5ad"
        write_prediction(out, bundle, section, nuclei, chunks, store=folder / "features.h5")
        return {"seconds": time.perf_counter() - start, "gb": out.stat().st_size / 1e9}


def straightforward_predict(n: int, genes: int) -> float:
    """Seconds of the straightforward way, features read whole."""
    import tempfile

    import h5py
    import numpy as np

    from benchmarks import straightforward
    from prts.models.bundle import load_bundle

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        child(make, folder=name, n=n, genes=genes)
        start = time.perf_counter()
        bundle = load_bundle(folder / "model")
        with h5py.File(folder / "features.h5") as store:
            features = np.hstack([store["local"][:], store["global"][:]])
        straightforward.predict(bundle.net, bundle.likelihood, features, bundle.genes, folder / "prediction.h5ad")
        return time.perf_counter() - start


def forward(n: int, genes: int) -> float:
    """Seconds of the network alone."""
    import numpy as np

    predictor = _predictor(genes)
    features = np.random.default_rng(0).standard_normal((min(n, 20_000), 576), dtype=np.float32)
    list(predictor.predict_chunks(features[:4096]))
    start = time.perf_counter()
    for _ in predictor.predict_chunks(features):
        pass
    return (time.perf_counter() - start) * n / len(features)


def make(folder: str, n: int, genes: int) -> None:
    """A bundle with random weights, a feature store in another order than the nuclei, the nuclei, and a small image."""
    import numpy as np
    import shapely
    import tifffile

    from prts.features.store import Rows, write_store
    from prts.io.nuclei import make_nuclei, write_nuclei
    from prts.models.bundle import save_bundle
    from prts.models.bundle_description import GIVEN_KEYS

    rng, where = np.random.default_rng(0), Path(folder)
    predictor = _predictor(genes)
    given = {key: {} if key in ("encoder", "segmentation", "qc", "split") else "benchmark" for key in GIVEN_KEYS}
    save_bundle(
        where / "model",
        net=predictor.net,
        likelihood=predictor.likelihood,
        rule=predictor.rule,
        genes=[(f"GENE{g}", f"ENSG{g:011d}") for g in range(genes)],
        metadata={
            **given,
            "mpp": 0.5,
            "tile": 256,
            "seed": 0,
            "input": {"use": ["local", "global"], "widths": {"local": 192, "global": 384}},
            "train_sections": ["benchmark"],
            "validation": {},
        },
    )
    xy = rng.uniform(0, 1000, (n, 2))
    corners = np.array([(-5, -5), (5, -5), (5, 5), (-5, 5)])
    nuclei = make_nuclei(shapely.polygons(xy[:, None] + corners), 0.5)
    write_nuclei(nuclei, where / "nuclei.parquet")
    order = rng.permutation(n)
    helpings = np.array_split(order, -(-n // 4096))
    rows = (
        Rows(*(rng.standard_normal((len(part), width), dtype=np.float32) for width in (384, 192))) for part in helpings
    )
    write_store(
        where / "features.h5",
        nuclei["cell_id"].to_numpy()[order],
        xy[order],
        (384, 192),
        rows,
        {"settings": {"name": "random"}},
    )
    tifffile.imwrite(where / "image.tif", np.full((1000, 1000, 3), 240, np.uint8))


def _section(folder: Path) -> Any:
    from prts.section import open_section

    return open_section("benchmark", folder / "image.tif", mpp=0.5)


def _predictor(genes: int) -> Any:
    import torch

    from prts.models.likelihoods.paper import Paper
    from prts.models.network import PRTSNet
    from prts.models.output import OutputRule
    from prts.models.predictor import Predictor

    torch.manual_seed(0)
    net = PRTSNet(576, genes)
    # An untrained level is as often below 0 as above it; a trained one seldom is, and zeros would not be stored.
    net.start_at(torch.full((genes,), 2.0))
    return Predictor(net, Paper().allocate(genes), OutputRule("none", 0.5))
