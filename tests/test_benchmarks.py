"""The benchmarks' runner, table and results, at sizes that mean nothing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy.sparse import csr_matrix
from shapely.geometry import box

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks import straightforward  # noqa: E402
from benchmarks.harness import Part, growth, interleave, slope  # noqa: E402
from benchmarks.table import TARGETS, into_page, markdown, merge  # noqa: E402
from prts.io.nuclei import make_nuclei  # noqa: E402

STAMP = {"machine": "this one", "date": "2026-01-01", "commit": "abc"}


def bench(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment}
    command = [sys.executable, "-m", "benchmarks", *arguments]
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)


def test_quick_parts_fill_their_keys_and_keep_the_others(tmp_path: Path) -> None:
    out = tmp_path / "results.json"
    earlier = {"predict/peak_gb": 1.5, **STAMP, "parts": {"predict": {**STAMP, "rows": []}}}
    out.write_text(json.dumps(earlier))

    done = bench("counts", "startup", "--quick", "--out", str(out), PRTS_CACHE=str(tmp_path))

    assert done.returncode == 0, done.stderr
    results = json.loads(out.read_text())
    expected = {key for key in TARGETS if key.split("/")[0] in ("counts", "startup")} | {"predict/peak_gb"}
    assert set(results) == expected | {"machine", "date", "commit", "parts"}
    assert all(results[key] > 0 for key in expected)
    assert results["predict/peak_gb"] == 1.5
    assert results["parts"]["predict"]["commit"] == "abc"
    assert results["parts"]["counts"]["commit"] == results["commit"] != "abc"
    # the quick comparison itself refuses counts that differ from the straightforward way's
    assert "identical counts" in done.stdout
    assert done.stdout.count("\n| **startup**") == 2


def test_a_part_without_its_data_stops_with_one_line() -> None:
    done = bench("counts", PRTS_DATA="")

    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("PRTS_DATA is ''") and done.stderr.count("\n") == 1


def test_an_unknown_part_is_named() -> None:
    done = bench("count")

    assert done.returncode == 2
    assert done.stderr.startswith("count: no such part")


def test_the_straightforward_counts_drop_shared_bins() -> None:
    # bins at 0.5, 1.5, ... on a line; nuclei over bins 0-2 and 2-4: bin 2 is in both
    positions = pd.DataFrame({"x": np.arange(6) + 0.5, "y": 0.5}, index=[f"b{k}" for k in range(6)])
    nuclei = make_nuclei([box(0, 0, 3, 1), box(2, 0, 5, 1)], 1.0, cell_id=["left", "right"])
    matrix = csr_matrix(np.array([[1, 0], [2, 1], [4, 4], [8, 0], [0, 16], [32, 32]]))

    ids, counts = straightforward.count(positions, pd.Index(positions.index), matrix, nuclei)

    assert ids == ["left", "right"]
    assert counts.toarray().tolist() == [[3, 1], [8, 16]]


def test_growth_is_the_exponent() -> None:
    assert slope({10: 2.0, 20: 8.0, 40: 32.0}) == pytest.approx(2.0)
    assert growth({1_000: 1.0, 2_000: 2.0}) == "1,000: 1, 2,000: 2 s; exponent 1.00"


def test_ways_take_turns() -> None:
    turns: list[str] = []
    seconds = iter([3.0, 1.0, 2.0])

    medians = interleave({"a": lambda: turns.append("a"), "b": lambda: turns.append("b") or next(seconds)}, 3)

    assert turns == list("ababab")
    assert medians["b"] == 2.0


def test_the_table_says_what_is_missed() -> None:
    part = Part({"train/over_matmul": 1.5, "train/speedup": 4.0})
    part.row("an epoch", "15 s", "60 s", "10 s", ["train/over_matmul", "train/speedup"])

    results = merge({}, "train", part, STAMP)

    row = "| **train** an epoch | 15 s | 60 s | 10 s | **over_matmul 1.5** (missed: ≤ 1.35); speedup 4 (≥ 3) |"
    assert row in markdown(results, ["counts", "train"])


def test_unknown_or_infinite_figures_are_refused() -> None:
    for figures in ({"train/mean": 1.0}, {"train/speedup": float("inf")}, {"train/speedup": float("nan")}):
        with pytest.raises(ValueError, match="train"):
            merge({}, "train", Part(figures), STAMP)


def test_only_the_table_of_the_page_changes(tmp_path: Path) -> None:
    page = tmp_path / "benchmarks.md"
    page.write_text("before\n<!-- bench -->\nold\n<!-- /bench -->\nafter\n")

    into_page(page, "new\n")

    assert page.read_text() == "before\n<!-- bench -->\n\nnew\n\n<!-- /bench -->\nafter\n"
    assert (ROOT / "docs/benchmarks.md").read_text().count("<!-- bench -->") == 1
