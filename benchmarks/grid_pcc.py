"""What grid extraction costs in mean PCC: her2st and the demo trained and tested with both kinds of features of the ViT.

About 20 minutes of extraction and ten trainings on two quiet cores, so it runs only where it is asked for; features stay in the cache.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.grid import DEFAULT, STRIDES
from benchmarks.harness import ROOT, Part, data_folder

NEEDS_DATA = True
_TISSUES = {
    "her2st": ["tissue=her2st"],
    "demo": ["tissue=demo", "encoder=dinov2_vits16"],
}


def run(quick: bool) -> Part:
    part = Part()
    losses = {}
    for tissue, overrides in _TISSUES.items():
        exact = _pcc([*overrides, "encoder.sampling=exact"], quick)
        for stride in (DEFAULT,) if quick else STRIDES:
            grid = _pcc([*overrides, "encoder.sampling=grid", f"encoder.stride={stride}"], quick)
            losses[tissue, stride] = exact - grid
            part.row(
                f"{tissue}: mean PCC of the test section, features of the grid at stride {stride} (exact: {exact:.4f})",
                f"{grid:.4f}, {grid - exact:+.4f}",
                keys=["extract/grid_pcc_loss"] if (tissue, stride) == (list(_TISSUES)[-1], DEFAULT) else [],
            )
    part.figures["extract/grid_pcc_loss"] = max(losses[tissue, DEFAULT] for tissue in _TISSUES)  # the dearer of the two
    return part


def _pcc(overrides: list[str], quick: bool) -> float:
    """Test PCC of one training of `experiment=best`, seed 0."""
    env = {**os.environ, "PRTS_DATA": str(data_folder()), "PYTHONPATH": str(ROOT)}
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "train.py", *overrides, f"hydra.run.dir={folder}/run"]
        command += ["trainer.max_epochs=1"] if quick else []
        done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)} failed: {done.stderr[-2000:]}")
        return float(json.loads(Path(folder, "run/metrics.json").read_text())["test/pcc_mean"])
