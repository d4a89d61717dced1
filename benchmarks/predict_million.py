"""A million nuclei: prediction in bounded memory."""

from __future__ import annotations

from benchmarks.harness import Part, child
from benchmarks.predict import predict

NEEDS_DATA = False


def run(quick: bool) -> Part:
    part = Part()
    n, genes = (1_000, 20) if quick else (1_000_000, 200)
    done = child(predict, n=n, genes=genes)
    seconds = done.result["seconds"]
    part.figures = {"predict/million_seconds": seconds, "predict/million_peak_gb": done.peak_gb}
    part.row(
        f"features to `.h5ad`, {n:,} x {genes} ({done.result['gb']:.2f} GB of file)",
        f"{seconds:.0f} s, {done.peak_gb:.1f} GB",
        keys=["predict/million_seconds", "predict/million_peak_gb"],
    )
    return part
