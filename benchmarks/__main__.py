"""Speed and memory of every stage, compared with a straightforward version and the limit of the machine.

usage: python -m benchmarks [PART ...] [--quick] [--out FILE] [--no-docs]

Prints a table and writes it to benchmarks/results.json and docs/benchmarks.md. Parts that are not run keep their earlier figures. Takes
about half an hour on two idle cores. PRTS_DATA names the folder of real data; what is slow to make is kept in $PRTS_CACHE/benchmarks.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
import time
from datetime import date
from pathlib import Path

from benchmarks.harness import ROOT, MissingDataError, commit, data_folder, machine
from benchmarks.table import into_page, markdown, merge, write

PARTS = (
    "counts",
    "platforms",
    "extract",
    "grid",
    "train",
    "predict",
    "predict_million",
    "segment",
    "startup",
    "travel",
    "whole_slide",
    "page",
    "cohort",
)
# Half an hour of extraction, and 7 GB of files: only on request.
ON_DEMAND = ("grid_pcc", "stream")


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument(
        "parts", nargs="*", metavar="PART", help=f"{' '.join(PARTS)} (all by default); {' '.join(ON_DEMAND)}"
    )
    parser.add_argument(
        "--quick", action="store_true", help="tiny sizes, to check that it runs; figures mean nothing and are not saved"
    )
    parser.add_argument("--out", type=Path, help="default: benchmarks/results.json; nothing with --quick")
    parser.add_argument("--no-docs", action="store_true", help="do not change docs/benchmarks.md")
    given = parser.parse_args()
    wanted = given.parts or list(PARTS)
    if unknown := [name for name in wanted if name not in PARTS + ON_DEMAND]:
        print(f"{unknown[0]}: no such part; choose from {', '.join(PARTS + ON_DEMAND)}", file=sys.stderr)
        return 2
    modules = {name: importlib.import_module(f"benchmarks.{name}") for name in wanted}
    try:
        if not given.quick and any(module.NEEDS_DATA for module in modules.values()):
            data_folder()
    except MissingDataError as error:
        print(error, file=sys.stderr)
        return 2
    out = given.out or (None if given.quick else ROOT / "benchmarks/results.json")
    results = json.loads(out.read_text(encoding="utf-8")) if out is not None and out.is_file() else {}
    stamp = {"machine": machine(), "date": date.today().isoformat(), "commit": commit()}
    for name, module in modules.items():
        start = time.perf_counter()
        results = merge(results, name, module.run(given.quick), stamp)
        print(f"{name}: {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)
        if out is not None:
            write(out, results)  # after each part, so that a later failure loses nothing
    table = markdown(results, [*PARTS, *ON_DEMAND])
    print(table)
    if not given.quick and not given.no_docs:
        into_page(ROOT / "docs/benchmarks.md", table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
