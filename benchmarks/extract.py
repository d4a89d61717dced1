"""Exact extraction: end to end against the bare encoder on tiles in memory, the straightforward way, and the bf16 matmul rate."""

from __future__ import annotations

import logging
import math
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.harness import Part, child, data_folder, growth, interleave

NEEDS_DATA = True
NUCLEI, STRAIGHTFORWARD_NUCLEI = 400, 64
# ViT-S/16 at 256 px, 257 tokens: 12 blocks of 4 projections, 2 products of attention and the MLP, and the patch embedding.
_TOKENS, _WIDTH, _DEPTH = 257, 384, 12
FLOP_A_TILE = 2.0 * (_DEPTH * (_TOKENS * 12 * _WIDTH**2 + 2 * _TOKENS**2 * _WIDTH) + 256 * 768 * _WIDTH)


def run(quick: bool) -> Part:
    part = Part()
    n, slow_n = (24, 4) if quick else (NUCLEI, STRAIGHTFORWARD_NUCLEI)
    data = str(data_folder())
    timed = child(compare, data=data, n=n, slow_n=slow_n, rounds=1 if quick else 3).result
    rates = timed["rates"]
    limit = child(bf16_rates, batch=timed["batch"], seconds=0.1 if quick else 3.0).result
    ours, slow = child(once, data=data, n=n), child(straightforward_once, data=data, n=slow_n)
    part.figures = {
        "extract/share_of_encoder": rates["extract"] / rates["encoder"],
        "extract/speedup": rates["extract"] / rates["straightforward"],
        "extract/peak_gb": ours.peak_gb,
        "extract/share_of_limit": rates["extract"] * FLOP_A_TILE / limit["square"],
    }
    part.row(
        f"exact extraction, ViT-S/16 in {timed['precision']}, {n} neighbors in her2st C2 (straightforward: fp32, {slow_n} of them)",
        f"{rates['extract']:.1f} nuclei/s, {ours.peak_gb:.1f} GB",
        f"{rates['straightforward']:.1f} nuclei/s, {slow.peak_gb:.1f} GB",
        f"{rates['encoder']:.1f} tiles/s: the bare encoder on tiles in memory",
        ["extract/share_of_encoder", "extract/speedup", "extract/peak_gb"],
    )
    part.row(
        f"its {FLOP_A_TILE / 1e9:.2f} GFLOP per tile, compared with the bf16 matmul rate of 4096²",
        f"{rates['extract'] * FLOP_A_TILE / 1e9:.0f} GFLOP/s",
        "",
        f"{limit['square'] / 1e9:.0f} GFLOP/s (in the network's own shapes {limit['network'] / 1e9:.0f})",
        ["extract/share_of_limit"],
    )
    variants = child(compare_networks, data=data, batches=1 if quick else 12, rounds=1 if quick else 5).result
    fused, plain, compiled = (variants["rates"][name] for name in ("fused", "plain", "compiled"))
    pays = variants["compile_seconds"] / (1 / plain - 1 / compiled) if compiled > plain else math.inf
    part.row(
        f"the encoder alone, taking turns: attention as plain products (used here: {variants['used']})",
        f"{plain:.1f} tiles/s",
        f"{fused:.1f} tiles/s: torch's fused attention",
    )
    part.row(
        f"the same compiled by torch, in {variants['compile_seconds']:.0f} s: pays from {pays:,.0f} tiles on (`encoder.compile`)",
        f"{compiled:.1f} tiles/s",
    )
    sizes = (8, 16) if quick else (100, 200, 400)
    part.row("growth with nuclei (exact extraction)", growth({m: child(once, data=data, n=m).result for m in sizes}))
    return part


def compare(data: str, n: int, slow_n: int, rounds: int) -> dict[str, Any]:
    """Nuclei a second of the three ways, interleaved."""
    import torch

    slide_path, mpp, nuclei = section(data, n)
    encoder = make_encoder(data)
    encoder.load()
    network = encoder._network.network
    tiles = torch.randn((encoder.batch_size, 3, 256, 256)).to(next(network.parameters()).dtype)
    plain = make_encoder(data, precision="fp32")
    plain.load()

    @torch.inference_mode()
    def bare() -> None:
        for _ in range(-(-n // encoder.batch_size)):
            network.forward_features(tiles)

    ways = {
        "extract": lambda: extract_seconds(slide_path, mpp, nuclei, encoder),
        "encoder": bare,
        "straightforward": lambda: _straightforward(slide_path, mpp, nuclei[:slow_n], plain),
    }
    bare()  # the first call of each shape is slower
    seconds = interleave(ways, rounds)
    done = {"extract": n, "encoder": -(-n // encoder.batch_size) * encoder.batch_size, "straightforward": slow_n}
    rates = {name: done[name] / seconds[name] for name in ways}
    return {"rates": rates, "precision": encoder.precision, "batch": encoder.batch_size}


def compare_networks(data: str, batches: int, rounds: int) -> dict[str, Any]:
    """Tiles a second of the encoder's variants on tiles in memory, interleaved, and the seconds that compiling takes from nothing."""
    import os

    import torch

    from prts.features.token_network import attend_plainly

    with tempfile.TemporaryDirectory() as folder:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = folder  # else what an earlier process compiled is taken over
        encoders = {name: make_encoder(data, compile=name == "compiled") for name in ("fused", "plain", "compiled")}
        for encoder in encoders.values():
            encoder.load()
        used = "plain" if not encoders["plain"]._network.network.blocks[0].attn.fused_attn else "fused"
        for block in encoders["fused"]._network.network.blocks:
            block.attn.fused_attn = True
        attend_plainly(encoders["plain"]._network)
        start = time.perf_counter()
        encoders["compiled"].compile_for(1)
        compile_seconds = time.perf_counter() - start
        n = encoders["plain"].batch_size
        tiles = torch.randint(0, 256, (n, 256, 256, 3), dtype=torch.uint8)
        networks = {name: e._compiled if e.compiled else e._network for name, e in encoders.items()}

        def run_of(network: Any) -> Any:
            @torch.inference_mode()
            def passes() -> None:
                for _ in range(batches):
                    network(tiles)

            return passes

        ways = {name: run_of(network) for name, network in networks.items()}
        interleave(ways, 1)
        seconds = interleave(ways, rounds)
    rates = {name: n * batches / value for name, value in seconds.items()}
    return {"rates": rates, "used": used, "compile_seconds": compile_seconds}


def once(data: str, n: int) -> float:
    """Seconds of one extraction, the loading of weights apart."""
    slide_path, mpp, nuclei = section(data, n)
    encoder = make_encoder(data)
    encoder.load()
    return extract_seconds(slide_path, mpp, nuclei, encoder)


def straightforward_once(data: str, n: int) -> float:
    """Seconds of the straightforward way."""
    slide_path, mpp, nuclei = section(data, n)
    encoder = make_encoder(data, precision="fp32")
    encoder.load()
    return _straightforward(slide_path, mpp, nuclei, encoder)


def bf16_rates(batch: int, seconds: float) -> dict[str, float]:
    """FLOP a second of bf16 products: large squares, and the network's own (the harmonic mean over its FLOP)."""
    from benchmarks.machine import matmul_rate

    rows = batch * _TOKENS
    shapes = [
        (rows, _WIDTH, 3 * _WIDTH),
        (rows, _WIDTH, _WIDTH),
        (rows, _WIDTH, 4 * _WIDTH),
        (rows, 4 * _WIDTH, _WIDTH),
    ]
    flop = [float(m * k * n) for m, k, n in shapes]
    rates = [matmul_rate("bfloat16", shape, seconds / 4) for shape in shapes]
    return {
        "square": matmul_rate("bfloat16", seconds=seconds),
        "network": sum(flop) / sum(work / rate for work, rate in zip(flop, rates, strict=True)),
    }


def section(data: str, n: int | None = None) -> tuple[Path, float, Any]:
    """Image and um/px of her2st C2, and all its nuclei or n neighbours in the order in which extraction visits them."""
    import numpy as np

    from prts.features.tiles import plan_tiles
    from prts.io.nuclei import read_nuclei
    from prts.section import read_visium_hd

    folder = Path(data) / "her2st_hd/C2"
    image = folder / "tissue_image.tif"
    opened = read_visium_hd(folder)
    outlines = folder / "nucleus_segmentations.geojson.gz"
    nuclei = read_nuclei(outlines, mpp=opened.mpp, width=opened.width, height=opened.height)
    if n is not None:
        order = plan_tiles(nuclei, opened.mpp, 0.5, 256).order
        middle = len(order) // 2
        nuclei = nuclei.iloc[np.sort(order[middle : middle + n])].reset_index(drop=True)
    return image, opened.mpp, nuclei


def make_encoder(data: str, **settings: Any) -> Any:
    """The encoder of her2st: ViT-S/16 with DINOv2's weights."""
    from prts.features.encoders import IMAGENET_MEAN, IMAGENET_STD, ViT256

    logging.getLogger("prts").setLevel(logging.ERROR)
    weights = Path(data) / "weights/vits16_dinov2_fp16.pth"
    return ViT256(weights, mean=IMAGENET_MEAN, std=IMAGENET_STD, device="cpu", **settings)


def extract_seconds(image: Path, mpp: float, nuclei: Any, encoder: Any) -> float:
    """Seconds from an image to a store of features."""
    from prts.features.extract import extract
    from prts.io.slide import open_slide

    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        with open_slide(image, mpp=mpp) as slide:
            extract(slide, nuclei, encoder, Path(folder) / "features.h5")
        return time.perf_counter() - start


def _straightforward(image: Path, mpp: float, nuclei: Any, encoder: Any) -> float:
    import tifffile

    from benchmarks import straightforward

    pixels = tifffile.imread(image)  # once for all nuclei of the slide, so not part of the time of these few
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        features = straightforward.extract(pixels, mpp, nuclei, encoder._network.network, encoder, Path(folder))
        seconds = time.perf_counter() - start
    assert features.shape == (len(nuclei), 576)
    return seconds
