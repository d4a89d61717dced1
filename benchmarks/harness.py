"""What every part shares: processes of their own, interleaved medians, growth, and a word on the machine.

This process imports nothing heavy: on Linux a child's `ru_maxrss` starts at what its parent holds when it forks.
"""

from __future__ import annotations

import gc
import json
import math
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
SIZES = (5_000, 10_000, 20_000, 60_000)
QUICK_SIZES = (200, 400)


class MissingDataError(Exception):
    """A part needs data that are not there; the message says which."""


class Measured(NamedTuple):
    """What a function in a process of its own gave back, and the most memory that process held."""

    result: Any
    peak_gb: float


@dataclass
class Part:
    """Figures by their key in results.json, and lines of the table."""

    figures: dict[str, float] = field(default_factory=dict)
    rows: list[dict[str, Any]] = field(default_factory=list)

    def row(self, what: str, ours: str, straightforward: str = "", limit: str = "", keys: Sequence[str] = ()) -> None:
        """Add a line; `keys` are the figures that stand at its end."""
        cells = {"what": what, "ours": ours, "straightforward": straightforward, "limit": limit, "keys": list(keys)}
        self.rows.append(cells)


def child(function: Callable[..., Any], **arguments: Any) -> Measured:
    """Call a function of a module of this package in a fresh process; arguments and result are JSON-like."""
    command = [sys.executable, "-m", "benchmarks.child", function.__module__, function.__name__, json.dumps(arguments)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{function.__module__}.{function.__name__}({arguments}) failed:\n{done.stderr[-4000:]}")
    answer = json.loads(done.stdout.splitlines()[-1])
    return Measured(answer["result"], answer["peak_gb"])


def peak_gb() -> float:
    """The most memory (10^9 bytes) that this process has held so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1e9 if sys.platform == "darwin" else 1e9 / 1024)


def interleave(ways: Mapping[str, Callable[[], float | None]], rounds: int) -> dict[str, float]:
    """Median seconds of each way, all ways once a round; a way may give its own seconds back."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            gc.collect()
            start = time.perf_counter()
            own = way()
            seconds[name].append(time.perf_counter() - start if own is None else own)
    return {name: statistics.median(values) for name, values in seconds.items()}


def slope(by_size: Mapping[int, float]) -> float:
    """Exponent of growth: slope of log seconds over log size."""
    return statistics.linear_regression([math.log(n) for n in by_size], [math.log(s) for s in by_size.values()]).slope


def growth(by_size: Mapping[int, float]) -> str:
    """Seconds by size and their exponent, for a cell of the table."""
    listed = ", ".join(f"{n:,}: {seconds:.3g}" for n, seconds in by_size.items())
    return f"{listed} s; exponent {slope(by_size):.2f}"


def data_folder() -> Path:
    """The folder that PRTS_DATA names.

    Raises
    ------
    MissingDataError
        If it is not set or no folder.
    """
    folder = os.environ.get("PRTS_DATA", "")
    if not Path(folder, "her2st_hd").is_dir():
        raise MissingDataError(
            f"PRTS_DATA is {folder!r}: it must name the folder that holds her2st_hd/ and weights/; or choose other parts"
        )
    return Path(folder).resolve()


def cache_folder() -> Path:
    """Where what is slow to make is kept between runs: `$PRTS_CACHE/benchmarks`, else `cache/benchmarks`."""
    return Path(os.environ.get("PRTS_CACHE", ROOT / "cache")).resolve() / "benchmarks"


def machine() -> str:
    """Processor, cores, what it computes bf16 with, memory, and versions."""
    cpu, flags = platform.processor() or platform.machine(), ""
    info = Path("/proc/cpuinfo")
    if info.is_file():
        lines = dict(line.split(":", 1) for line in info.read_text().split("\n\n")[0].splitlines() if ":" in line)
        fields = {key.strip(): value.strip() for key, value in lines.items()}
        cpu, flags = fields.get("model name", cpu), fields.get("flags", "")
    bf16 = "AMX" if "amx_bf16" in flags else "AVX-512 bf16" if "avx512_bf16" in flags else "no bf16"
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    return f"{cpu}, {os.cpu_count()} cores, {bf16}, {memory:.0f} GB, torch {version('torch')}"


def commit() -> str:
    """The commit that is measured, with a + if files differ from it."""
    git = ["git", "-C", str(ROOT)]
    name = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    changed = subprocess.run(
        [*git, "status", "--porcelain", "--", "prts", "configs", "benchmarks/*.py"], capture_output=True
    )
    return (name or "unknown") + ("+" if changed.stdout.strip() else "")
