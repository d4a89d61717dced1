"""Difference in mean PCC between two runs of one tissue, with its interval, on the same validation and test nuclei.

usage: python -m benchmarks.compare_runs RUN_DIR OTHER_RUN_DIR

RUN minus OTHER, for every validation and test section: resampled blocks of tissue, the same for both. The caches that the runs used
must still be there.
"""

from __future__ import annotations

import sys
from pathlib import Path

from omegaconf import OmegaConf

from prts.cli.train import training_plan
from prts.data.datamodule import PRTSDataModule
from prts.evaluation.bootstrap import BlockSums, block_sums, mean_pcc_difference, spatial_blocks
from prts.models.bundle import load_bundle
from prts.stopwatch import Stopwatch


def sums(run: Path) -> tuple[dict[str, BlockSums], int]:
    """What each section contributes to the PCC, block by block, under the name of its part; and the number of replicates."""
    plan = training_plan(OmegaConf.load(run / "config.yaml"))
    data = PRTSDataModule(
        lambda: plan.prepare(Stopwatch()), plan.preparation.splitter, use=plan.data.use, scale=plan.data.scale
    )
    data.setup()
    bundle = load_bundle(run / "model")
    found = {}
    for part, sets in {"validation": data.val_sets, "test": data.test_sets}.items():
        for nuclei in sets:
            umi, _ = bundle.predict_all(nuclei.features)
            blocks, _ = spatial_blocks(nuclei.xy_um, plan.evaluation.block_um)
            found[f"{part} {nuclei.section}"] = block_sums(nuclei.counts, umi, blocks)
    return found, plan.evaluation.bootstrap


def main(run: Path, other: Path) -> None:
    """Print the table."""
    (ours, n_replicates), (theirs, _) = sums(run), sums(other)
    print("| section | difference in mean PCC |\n|---|---|")
    for name, mine in ours.items():
        difference, low, high = mean_pcc_difference(mine, theirs[name], n_replicates=n_replicates)
        print(f"| {name} | {difference:+.4f} ({low:+.4f} to {high:+.4f}) |")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(Path(sys.argv[1]), Path(sys.argv[2]))
