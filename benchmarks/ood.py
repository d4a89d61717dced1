"""How well `obs["ood"]` tells the nuclei of a foreign slide from those of a familiar one.

usage: python -m benchmarks.ood FAMILIAR.h5ad FOREIGN.h5ad

Both are predictions of one bundle. Prints a row of the table in docs/trust.md: nuclei, share of strange ones (ood > 0.95) and AUROC.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from sklearn.metrics import roc_auc_score

from prts.io.prediction import read_prediction
from prts.models.ood import STRANGE


def main(familiar: Path, foreign: Path) -> None:
    """Print the row."""
    shares = [read_prediction(path).obs["ood"].to_numpy() for path in (familiar, foreign)]
    label = np.repeat([0, 1], [len(part) for part in shares])
    auroc = roc_auc_score(label, np.concatenate(shares))
    counts = " | ".join(f"{len(part)} | {(part > STRANGE).mean():.0%}" for part in shares)
    print("| familiar nuclei | strange | foreign nuclei | strange | AUROC |\n|---|---|---|---|---|")
    print(f"| {counts} | {auroc:.3f} |")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(Path(sys.argv[1]), Path(sys.argv[2]))
