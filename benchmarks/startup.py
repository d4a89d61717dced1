"""How long the command line takes to answer."""

from __future__ import annotations

import subprocess
import sys

from benchmarks.harness import ROOT, Part, interleave

NEEDS_DATA = False
_COMMANDS = {
    "startup/help_seconds": ("`prts --help`", ["-m", "prts.cli.main", "--help"]),
    "startup/compose_seconds": ("`python train.py --cfg job`", ["train.py", "--cfg", "job"]),
}


def run(quick: bool) -> Part:
    part = Part()
    part.figures = interleave(
        {key: lambda command=command: _call(command) for key, (_, command) in _COMMANDS.items()}, 1 if quick else 7
    )
    for key, (name, _) in _COMMANDS.items():
        part.row(name, f"{part.figures[key]:.2f} s", keys=[key])
    return part


def _call(command: list[str]) -> None:
    subprocess.run([sys.executable, *command], cwd=ROOT, check=True, capture_output=True)
