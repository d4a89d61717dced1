"""results.json, the table, and the table's place in the documentation."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.harness import Part

# What every key must reach, on two cores with 24 GB; None: reported only.
TARGETS: dict[str, tuple[str, float] | None] = {
    "counts/speedup": (">=", 25),
    "counts/seconds_full": ("<", 90),
    "counts/peak_gb_full": ("<", 6),
    "platforms/xenium_nuclei_cpu_s": None,
    "platforms/xenium_nuclei_peak_gb": ("<", 2),
    "platforms/xenium_positions_cpu_s": None,
    "platforms/xenium_positions_peak_gb": ("<", 2),
    "platforms/xenium_cells_cpu_s": None,
    "platforms/xenium_cells_peak_gb": ("<", 2),
    "platforms/spaceranger_cells_cpu_s": None,
    "platforms/spaceranger_cells_peak_gb": ("<", 2),
    "platforms/anndata_cpu_s": None,
    "platforms/anndata_peak_gb": ("<", 2),
    "platforms/spatialdata_cpu_s": None,
    "platforms/spatialdata_peak_gb": ("<", 3),
    "extract/share_of_encoder": (">=", 0.92),
    "extract/speedup": (">=", 2.5),
    "extract/peak_gb": ("<", 3),
    "extract/share_of_limit": (">=", 0.65),
    "extract/grid_speedup": (">=", 5),
    "extract/grid_pcc_loss": ("<=", 0.01),
    "train/over_matmul": ("<=", 1.35),
    "train/speedup": (">=", 3),
    "train/peak_gb": ("<", 4),
    "predict/seconds_60k": ("<", 20),
    "predict/peak_gb": ("<", 3),
    "predict/million_seconds": None,
    "predict/million_peak_gb": ("<", 3),
    "stream/peak_gb": ("<", 3),
    "stream/growth": ("<", 0.1),
    "stream/over_whole": ("<=", 1.15),
    "segment/mpx_per_second": None,
    "startup/help_seconds": ("<", 1.0),
    "startup/compose_seconds": ("<", 3.0),
    "travel/demo_lost": ("<=", 0.2),
    "whole_slide/seconds": ("<", 600),
    "whole_slide/peak_gb": ("<", 4),
    "page/smooth_mb": ("<", 30),
    "page/noisy_mb": ("<", 30),
    "cohort/overhead": ("<=", 1.1),
}
_MARKERS = ("<!-- bench -->", "<!-- /bench -->")
_SIGNS = {">=": "≥", "<=": "≤", "<": "<"}


def merge(results: Mapping[str, Any], name: str, part: Part, stamp: Mapping[str, str]) -> dict[str, Any]:
    """Results with a part's figures in place of its earlier ones; the other parts keep theirs, with their own date and commit."""
    unknown = part.figures.keys() - TARGETS.keys()
    if unknown:
        raise ValueError(f"{name}: {sorted(unknown)} are not keys of the table")
    # Training on another sample of tiles, or another image, may also gain a little PCC; nothing else may be below 0.
    may_gain = ("loss", "lost")
    wrong = [
        k for k, value in part.figures.items() if not (math.isfinite(value) and (value >= 0 or k.endswith(may_gain)))
    ]
    if wrong:
        raise ValueError(f"{name}: {wrong} are not figures")
    figures = {key: value for key, value in results.items() if key in TARGETS} | part.figures
    parts = {**results.get("parts", {}), name: {**stamp, "rows": part.rows}}
    return {**{key: _rounded(figures[key]) for key in TARGETS if key in figures}, **stamp, "parts": parts}


def markdown(results: Mapping[str, Any], order: list[str]) -> str:
    """The table of all parts that have been run."""
    lines = ["| | prts | straightforward | limit | target |", "|---|---|---|---|---|"]
    for name in order:
        for row in results["parts"].get(name, {"rows": []})["rows"]:
            targets = "; ".join(_against_target(key, results[key]) for key in row["keys"] if key in results)
            cells = (row["what"], row["ours"], row["straightforward"], row["limit"], targets)
            lines.append("| " + " | ".join((f"**{name}** {cells[0]}", *cells[1:])) + " |")
    runs: dict[str, set[str]] = {}
    for part in results["parts"].values():
        runs.setdefault(part["machine"], set()).add(f"{part['date']}, commit {part['commit']}")
    measured = "; ".join(f"{machine} ({'; '.join(sorted(runs[machine]))})" for machine in sorted(runs))
    return "\n".join(lines) + f"\n\nMeasured on {measured}.\n"


def write(path: Path, results: Mapping[str, Any]) -> None:
    """Write results.json."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def into_page(page: Path, table: str) -> None:
    """Put the table between the markers of a Markdown page."""
    text = page.read_text(encoding="utf-8")
    before, rest = text.split(_MARKERS[0], 1)
    _, after = rest.split(_MARKERS[1], 1)
    page.write_text(f"{before}{_MARKERS[0]}\n\n{table}\n{_MARKERS[1]}{after}", encoding="utf-8")


def _against_target(key: str, value: float) -> str:
    figure = f"{key.split('/')[1]} {value:.3g}"
    target = TARGETS[key]
    if target is None:
        return figure
    sign, bound = target
    met = {">=": value >= bound, "<=": value <= bound, "<": value < bound}[sign]
    asked = f"{_SIGNS[sign]} {bound:g}"
    return f"{figure} ({asked})" if met else f"**{figure}** (missed: {asked})"


def _rounded(value: float) -> float:
    return float(f"{value:.4g}")
