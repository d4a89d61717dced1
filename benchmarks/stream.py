"""Training from disk: memory by number of nuclei, time against training from memory, and what the size of a chunk costs in quality."""

from __future__ import annotations

import shutil
import statistics
from pathlib import Path
from typing import Any

from benchmarks.harness import Part, cache_folder, child, interleave, slope

NEEDS_DATA = False
FEATURES, GENES, BATCH = 597, 1_000, 256
NUCLEI = 56_761
SIZES = (200_000, 600_000, 2_000_000)
PER_SECTION = 100_000
CHUNKS = (1, 32, 128, 512, 2048)


def run(quick: bool) -> Part:
    part = Part()
    size: dict[str, Any] = {"features": 24, "genes": 30} if quick else {"features": FEATURES, "genes": GENES}
    sizes, n = ((400, 800), 600) if quick else (SIZES, NUCLEI)
    folder = cache_folder() / ("stream-quick" if quick else "stream")
    try:
        child(write, n=sizes[-1], folder=str(folder), **size)
        peaks = {n_nuclei: child(epoch_from_disk, n=n_nuclei, folder=str(folder), **size) for n_nuclei in sizes}
        largest = peaks[sizes[-1]]
        ratio = child(over_whole, n=n, rounds=1 if quick else 5, folder=str(folder), **size).result
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    part.figures = {
        "stream/peak_gb": largest.peak_gb,
        # memory that shrinks does not grow
        "stream/growth": max(0.0, slope({n_nuclei: done.peak_gb for n_nuclei, done in peaks.items()})),
        "stream/over_whole": ratio["over_whole"],
    }
    part.row(
        f"an epoch from disk, {sizes[-1]:,} x {size['features']} -> {size['genes']:,} ({largest.result['gb']:.1f} GB of files), with "
        "a hidden layer of 64",
        f"{largest.result['seconds']:.0f} s, {largest.peak_gb:.2f} GB",
        keys=["stream/peak_gb"],
    )
    listed = ", ".join(f"{n_nuclei:,}: {done.peak_gb:.2f}" for n_nuclei, done in peaks.items())
    part.row(
        "peak memory by nuclei", f"{listed} GB; exponent {part.figures['stream/growth']:.3f}", keys=["stream/growth"]
    )
    part.row(
        f"an epoch of {n:,} nuclei from disk, the paper's network",
        f"{ratio['stream']:.1f} s",
        f"from memory: {ratio['whole']:.1f} s",
        keys=["stream/over_whole"],
    )
    quality = child(by_chunk, n=800 if quick else 20_000, epochs=1 if quick else 8, folder=str(folder)).result
    shutil.rmtree(folder, ignore_errors=True)
    listed = ", ".join(f"{chunk}: {pcc:.4f}" for chunk, pcc in quality.items())
    part.row("validation PCC by nuclei per chunk, of tissue in stripes", listed)
    return part


def write(n: int, features: int, genes: int, folder: str) -> int:
    """Write sections of 100,000 nuclei, and return their number."""
    return len(_sections(n, features, genes, folder))


def epoch_from_disk(n: int, features: int, genes: int, folder: str) -> dict[str, float]:
    """Seconds of an epoch over sections that are on disk, and the size of their files."""
    import time

    sets = _sections(n, features, genes, folder)
    start = time.perf_counter()
    _epoch(_module(features, genes, (64,)), _data(sets, streams=True).train_dataloader())
    files = [path for nuclei in sets for path in (nuclei.counts.path, nuclei.features.parts[0].path)]
    return {"seconds": time.perf_counter() - start, "gb": sum(path.stat().st_size for path in files) / 1e9}


def _sections(n: int, features: int, genes: int, folder: str) -> list[Any]:
    return [
        _stored(Path(folder), f"s{number}", min(PER_SECTION, n - start), features, genes, number)
        for number, start in enumerate(range(0, n, PER_SECTION))
    ]


def over_whole(n: int, features: int, genes: int, rounds: int, folder: str) -> dict[str, float]:
    """Seconds of an epoch from disk and from memory, interleaved."""
    from dataclasses import replace

    stored = _stored(Path(folder), "s0", n, features, genes, 0)
    here = replace(stored, features=stored.features[:], counts=stored.counts[:])
    module = _module(features, genes, (512, 512, 1024, 1024))
    loaders = {
        "stream": _data([stored], streams=True).train_dataloader(),
        "whole": _data([here], streams=False).train_dataloader(),
    }
    ways = {name: lambda loader=loader: _epoch(module, loader) for name, loader in loaders.items()}
    interleave(ways, 1)
    pairs = [interleave(ways, 1) for _ in range(rounds)]
    seconds = {name: statistics.median(pair[name] for pair in pairs) for name in ways}
    return {**seconds, "over_whole": statistics.median(pair["stream"] / pair["whole"] for pair in pairs)}


def by_chunk(n: int, epochs: int, folder: str) -> dict[str, float]:
    """Validation PCC after some epochs by the size of a chunk. Nuclei lie in stripes of one type each, as in a file sorted by position."""
    import numpy as np

    from prts.data.stream import Streaming

    rng = np.random.default_rng(0)
    types, loading = rng.normal(size=(12, 40)), rng.normal(0, 0.25, (40, 200))

    def nuclei(name: str, count: int, seed: int) -> Any:
        rng = np.random.default_rng(seed)
        stripe = rng.integers(0, len(types), 40)[np.arange(count) * 40 // count]
        x = (types[stripe] + rng.normal(size=(count, 40))).astype(np.float32)
        counts = rng.poisson(0.3 * np.exp(np.tanh(x) @ loading)).astype(np.int32)
        return _stored(Path(folder), name, count, 40, 200, seed, (x, counts))

    train, val = nuclei("s0", n, 1), nuclei("s1", n // 4, 2)
    found = {}
    for chunk in CHUNKS:
        scores = []
        for seed in range(3):
            data = _data([train], streams=True, streaming=Streaming(chunk, 4096), seed=seed)
            data.val_sets = [val]
            module = _module(40, 200, (64, 64), seed)
            scores.append(_epoch(module, data.train_dataloader(), data.val_dataloader(), epochs))
        found[str(chunk)] = statistics.mean(scores)
    return found


def _stored(folder: Path, name: str, n: int, features: int, genes: int, seed: int, values: Any = None) -> Any:
    """Nuclei on disk in the files of a prepared section, random unless given; the files are written once."""
    import h5py
    import numpy as np
    from scipy.sparse import csr_matrix

    from benchmarks.train import _counts
    from prts.data.nucleus_set import NucleusSet
    from prts.data.on_disk import section_counts, section_features

    folder.mkdir(parents=True, exist_ok=True)
    store, inputs = folder / f"features-{name}.h5", folder / f"inputs-{name}.h5"
    if not inputs.is_file() or h5py.File(inputs)["cell_id"].shape != (n,):
        rng = np.random.default_rng(seed)
        cell_id = np.arange(n).astype(str).astype(object)
        counts = _counts(n, genes, seed) if values is None else csr_matrix(values[1])
        with h5py.File(store, "w") as file:
            file.create_dataset("cell_id", data=cell_id, dtype=h5py.string_dtype())
            file["spatial"] = np.zeros((n, 2))
            for block, width in (("local", features // 3), ("global", features - features // 3)):
                # as in prts.features.store.write_store
                data = file.create_dataset(block, (n, width), np.float32, chunks=(min(n, 512), width))
                for start in range(0, n, 16_384):
                    rows = slice(start, min(start + 16_384, n))
                    if values is None:
                        data[rows] = rng.standard_normal((rows.stop - start, width), dtype=np.float32)
                    else:
                        data[rows] = values[0][rows, : width if block == "local" else None][:, -width:]
        with h5py.File(inputs, "w") as file:
            file.create_dataset("cell_id", data=cell_id, dtype=h5py.string_dtype())
            for key in ("data", "indices", "indptr"):
                file[key] = getattr(counts, key)
    prepared: Any = type("Prepared", (), {"features": store, "context": None, "colour": None})
    found, _ = section_features(prepared, inputs, ("local", "global"))
    return NucleusSet(
        section=name,
        cell_id=np.arange(n).astype(np.dtypes.StringDType()),
        xy_um=np.zeros((n, 2)),
        features=found,  # type: ignore[arg-type]
        counts=section_counts(inputs, genes),
        total_counts=np.zeros(n, np.int64),
        area_um2=np.zeros(n),
    )


def _data(sets: Any, *, streams: bool, streaming: Any = None, seed: int = 0) -> Any:
    from prts.data.datamodule import PRTSDataModule

    def never() -> Any:
        raise AssertionError("nothing is prepared here")

    data = PRTSDataModule(never, never, batch_size=BATCH, streaming=streaming, seed=seed)
    data.train_sets, data.val_sets, data.streams = sets, [], streams
    return data


def _module(features: int, genes: int, hidden: tuple[int, ...], seed: int = 0) -> Any:
    from functools import partial

    import torch

    from prts.models.likelihoods.poisson import Poisson
    from prts.models.module import PRTSModule
    from prts.models.network import PRTSNet

    torch.manual_seed(seed)
    likelihood = Poisson().allocate(genes)
    net = PRTSNet(features, genes, hidden=hidden, outputs=likelihood.outputs)
    return PRTSModule(net, likelihood, partial(torch.optim.AdamW, lr=0.003))


def _epoch(module: Any, train: Any, val: Any = None, epochs: int = 1) -> float | None:
    """Train; the validation PCC, if there is validation."""
    import pytorch_lightning as pl

    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )
    trainer.fit(module, train, val)
    return float(trainer.callback_metrics["val/pcc"]) if val else None
