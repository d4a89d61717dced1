"""Coverage and width of the intervals of counts on a run's test section, by decile of expression.

usage: python -m benchmarks.intervals RUN_DIR

Prints the table of docs/trust.md from the run's per_gene.csv.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pandas as pd

_COLUMNS = ("coverage90", "interval_width", "coverage90_marginal", "interval_width_marginal")


def main(run: Path) -> None:
    """Print the table."""
    genes = pd.read_csv(run / "per_gene.csv")
    decile = pd.qcut(genes["mean_counts"].rank(method="first"), 10, labels=False)
    print(
        "| decile | mean UMI | coverage | mean width | coverage, marginal | mean width, marginal |\n|---|---|---|---|---|---|"
    )
    for name, part in [*genes.groupby(decile), ("all", genes)]:
        first = name if isinstance(name, str) else int(name) + 1
        values = [part[column].mean() for column in _COLUMNS]
        cells = " | ".join(f"{value:.3f}" if i % 2 == 0 else f"{value:.2f}" for i, value in enumerate(values))
        print(f"| {first} | {part['mean_counts'].mean():.3f} | {cells} |")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(Path(sys.argv[1]))
